"""Calibrate a detector: fit a temperature for its logits, and two thresholds for the verdicts real, fake and unsure.

    python -m tools.calibrate SCORES.csv --into DETECTOR.pth.tar [--fpr 0.01 --fnr 0.01]

The images in SCORES.csv must differ from the training images and from the images of the final test. The program fits
the temperature by the method of Guo et al. ("On Calibration of Modern Neural Networks", ICML 2017). The entry
"calibration" of the checkpoint is a dictionary with these keys:

    temperature          number by which the logits are divided
    t_fake, t_real       an image is called fake if P(fake) >= t_fake, real if P(fake) <= t_real, else unsure
    fpr, fnr             the error rates requested with --fpr and --fnr
    n_real, n_fake       number of real and fake images in the score table
    source               file name of the score table
"""

import argparse
import logging
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from evaluation.calibration import probabilities_and_verdicts, sigmoid
from evaluation.loading import choose_resize_and_crop_settings
from evaluation.metrics import count_verdicts_by_class, expected_calibration_error, negative_log_likelihood
from evaluation.score_table import ScoreTable, read_json_record_of_score_table, read_table
from models.released import extract_state_dict
from utils import checkpoints, options
from utils.console import make_printable
from utils.errors import UserError, run_program

logger = logging.getLogger("tools.calibrate")

TEMPERATURES = (0.05, 20.0)  # smallest and largest temperature that the fit can return
BISECTIONS = 60  # number of bisection steps; more steps do not change the temperature in float64
COUNT_TOLERANCE = 1e-9  # tolerance for rounding errors of rate * image count, such as 0.29 * 100 = 28.999999999999996


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    record = read_json_record_of_score_table(args.scores)
    content = None
    if args.into:
        content = checkpoints.read_checkpoint_content(args.into)
        require_scores_computed_by_detector(content, record, args.into)
        require_scores_with_default_settings(content, record, args.into)
    table = read_table(args.scores)
    calibration, warnings = fit_calibration(table, args.fpr, args.fnr)
    if record.get("trained_on"):
        warnings.append(
            f"the detector was trained on {record['trained_on']} of the scored images, so its error rates are"
            " underestimated: score images that were not used for training"
        )
    lines = describe_calibration(table, calibration)
    lines += [f"warning: {text}" for text in warnings]
    if content is not None:
        content["calibration"] = {**calibration, "source": Path(args.scores).name}
        checkpoints.save_checkpoint(content, os.path.realpath(args.into))
        lines.append(
            f"the calibration is stored in {make_printable(args.into)}; test.py uses the calibration from now on"
        )
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    text = "Fit a temperature and two thresholds to a score table."
    parser = options.Parser("python -m tools.calibrate", text)
    add = parser.add_argument
    add("scores", metavar="SCORES.csv", help="score table that test.py wrote for images with labels")
    add("--into", metavar="FILE", help="write the calibration into the checkpoint FILE (default: only print it)")
    text = "fraction of real images that may be called fake (default: %(default)s)"
    add("--fpr", type=float, default=0.01, metavar="X", help=text)
    text = "fraction of fake images that may be called real (default: the value of --fpr)"
    add("--fnr", type=float, metavar="X", help=text)
    args = parser.parse_args(arguments)
    if args.fnr is None:
        args.fnr = args.fpr
    for flag, rate in (("--fpr", args.fpr), ("--fnr", args.fnr)):
        if not 0 <= rate < 0.5:
            parser.error(f"{flag} must be at least 0 and below 0.5, got {rate:g}")
    return args


# --- checks that the scores belong to the detector ---


def require_scores_computed_by_detector(content: Mapping, record: Mapping, name: str) -> None:
    """Check that the detector of the checkpoint `content` computed the scores of a score table from unperturbed images.

    Args:
        record: content of the JSON file that test.py wrote beside the score table, or {} if there is no JSON file.
    Raises:
        UserError: if another detector computed the scores, if the scored images were perturbed, or if the checkpoint
            contains no classifier.
    """
    config = content.get("config") or {}
    state = extract_state_dict(content, name)
    has_resnet_weights = any(key.endswith("fc.weight") for key in state)
    if not has_resnet_weights and not config.get("classifier"):
        raise UserError(
            f"{make_printable(name)} contains no classifier: give the checkpoint of the detector that computed the"
            " scores"
        )
    if not record:
        logger.warning(
            "warning: cannot check whether the detector %s computed the scores, because the score table has no .json"
            " file beside it",
            make_printable(name),
        )
        return
    scored = record.get("detector") or {}
    fingerprints = {  # for each network, its weight hash in the checkpoint and its weight hash in the JSON file
        "classifier": (checkpoints.compute_fingerprint(state), scored.get("classifier_fingerprint")),
        "re-synthesizer": (config.get("resynthesizer_fingerprint"), scored.get("resynthesizer_fingerprint")),
        "VGG": ((config.get("vgg") or {}).get("fingerprint"), (scored.get("vgg") or {}).get("fingerprint")),
    }
    for part, (expected, got) in fingerprints.items():
        if None not in (expected, got) and expected != got:
            raise UserError(
                f"another detector computed the scores: expected {part} weights with the fingerprint {expected}, got"
                f" the fingerprint {got}; run test.py again with --resume {make_printable(name)}"
            )
    perturbation = (record.get("perturbation") or {}).get("name", "none")
    if perturbation != "none":
        raise UserError(
            f"expected scores of unperturbed images, got scores of images perturbed by {perturbation}: run test.py"
            " without --perturb"
        )


def require_scores_with_default_settings(content: Mapping, record: Mapping, name: str) -> None:
    """Raise a UserError if the scored images were not resized and cropped as test.py does by default."""
    scoring_settings = record.get("scoring_settings") or {}
    trained = (content.get("config") or {}).get("images") or {}
    for setting, expected in choose_resize_and_crop_settings(trained, {})._asdict().items():
        got = scoring_settings.get(setting, expected)
        if got != expected:
            flag = f"--{setting.replace('_', '-')}"
            raise UserError(
                f"the scores were computed with {flag} {got or 0}, but the default for {make_printable(name)} is"
                f" {flag} {expected or 0}: run test.py again without {flag}"
            )


# --- fitting ---


def fit_calibration(table: ScoreTable, fpr: float = 0.01, fnr: float = 0.01) -> tuple[dict, list[str]]:
    """Fit a temperature and the verdict thresholds t_real and t_fake to the labelled images of a score table.

    Args:
        fpr: largest fraction of the real images that may be called fake.
        fnr: largest fraction of the fake images that may be called real.
    Returns:
        The calibration (temperature, thresholds, error rates and image counts), and a list of warnings.
    Raises:
        UserError: if the table has no real images or no fake images.
    """
    table = table.select_rows(table.has_label_and_score)
    n_real, n_fake = int(table.is_real.sum()), int(table.is_fake.sum())
    if not n_real or not n_fake:
        raise UserError(
            f"the score table has scores of {n_real} real and {n_fake} fake images, but needs at least one of each: run"
            " test.py on real and fake images"
        )
    temperature, warnings = fit_temperature(table.logit_margins, table.is_fake)
    prob_fake, _ = probabilities_and_verdicts(table.logits, {"temperature": temperature})
    t_real, t_fake = fit_thresholds(prob_fake, table.is_fake, fpr, fnr)
    for rate, count, kind in ((fpr, n_real, "real"), (fnr, n_fake, "fake")):
        if rate * count < 1 - COUNT_TOLERANCE:
            warnings.append(
                f"{100 * rate:g} % of {count} {kind} images is less than one image, so the error rate on other images"
                f" is not known: use more {kind} images"
            )
    fitted = {"temperature": temperature, "t_real": t_real, "t_fake": t_fake}
    return {**fitted, "fpr": fpr, "fnr": fnr, "n_real": n_real, "n_fake": n_fake}, warnings


def fit_temperature(margins: np.ndarray, is_fake: np.ndarray) -> tuple[float, list[str]]:
    """Find the temperature T that minimises the mean negative log-likelihood of P(fake).

    P(fake) of an image is sigmoid((logit_fake - logit_real) / T). The negative log-likelihood is convex in 1 / T, so
    bisection finds the point where its derivative is 0. If no image has a larger logit for the wrong class,
    `fit_temperature` returns T = 1, because no single temperature minimises the negative log-likelihood.

    Args:
        margins: logit_fake - logit_real of each image, (N,).
        is_fake: whether each image is fake, (N,) bool.
    Returns:
        The temperature, and a list of warnings.
    """
    agreement = np.where(is_fake, margins, -margins)  # positive if the larger logit belongs to the correct class
    if agreement.min() >= 0:
        return 1.0, ["no image has a larger logit for the wrong class, so the temperature is not fitted but set to 1"]
    low, high = np.log(TEMPERATURES)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        # `slope` is the derivative of the mean negative log-likelihood with respect to 1 / T
        slope = -np.mean(agreement * sigmoid(-agreement / math.exp(middle)))
        if slope < 0:
            high = middle
        else:
            low = middle
    temperature = math.exp((low + high) / 2)
    if TEMPERATURES[0] * 1.001 < temperature < TEMPERATURES[1] * 0.999:
        return temperature, []
    reason = "no better than guessing" if temperature > 1 else "almost perfectly separated"
    return temperature, [f"the temperature is at a limit of its range, because the scores are {reason}"]


def fit_thresholds(prob_fake: np.ndarray, is_fake: np.ndarray, fpr: float, fnr: float) -> tuple[float, float]:
    """Choose thresholds of P(fake) for the verdicts "real" (P(fake) <= t_real) and "fake" (P(fake) >= t_fake).

    At most a fraction `fpr` of the real images gets the verdict "fake". At most a fraction `fnr` of the fake images
    gets the verdict "real". As few images as possible get the verdict "unsure" (t_real < P(fake) < t_fake).

    Args:
        prob_fake: calibrated P(fake) of each image, (N,).
        is_fake: whether each image is fake, (N,) bool. At least one image must be real, and at least one must be fake.
    Returns:
        The thresholds t_real and t_fake, with t_real <= t_fake.
    """
    t_fake = threshold_for_error_rate(prob_fake[~is_fake], prob_fake, fpr)
    t_real = -threshold_for_error_rate(-prob_fake[is_fake], -prob_fake, fnr)
    if t_real >= t_fake:
        t_real = t_fake = (t_real + t_fake) / 2
    return float(t_real), float(t_fake)


def threshold_for_error_rate(negatives: np.ndarray, scores: np.ndarray, rate: float) -> float:
    """Choose the lowest threshold such that at most a fraction `rate` of `negatives` is >= the threshold.

    If possible, the threshold is halfway between two values of `scores` that are neighbours in sorted order.

    Args:
        negatives: scores of the images that should stay below the threshold.
    """
    allowed = min(math.floor(rate * len(negatives) + COUNT_TOLERANCE), len(negatives) - 1)
    # At most `allowed` values of `negatives` may reach or exceed the threshold
    highest_below = np.sort(negatives)[::-1][allowed]  # highest value that must stay below the threshold
    above = scores[scores > highest_below]
    smallest_step = np.nextafter(highest_below, np.inf)
    if len(above) == 0:
        return smallest_step
    return max(smallest_step, (highest_below + above.min()) / 2)


# --- what is printed ---


def describe_calibration(table: ScoreTable, calibration: Mapping) -> list[str]:
    """Describe a calibration and its effect on the scored images, as lines of text."""
    table = table.select_rows(table.has_label_and_score)
    before, _ = probabilities_and_verdicts(table.logits)
    after, verdicts = probabilities_and_verdicts(table.logits, calibration)
    lines = [
        "fitted to {n_real} real and {n_fake} fake images: temperature {temperature:.4g}; fake if P(fake) >="
        " {t_fake:.4g}, real if P(fake) <= {t_real:.4g}, else unsure".format_map(calibration)
    ]
    for name, metric in (("calibration error (ECE)", expected_calibration_error), ("NLL", negative_log_likelihood)):
        old, new = metric(before, table.is_fake), metric(after, table.is_fake)
        lines.append(f"{name} of P(fake) on these images: {old:.4f} before, {new:.4f} after")
    for truth, counts in count_verdicts_by_class(verdicts, table.is_fake).items():
        total = sum(counts.values())
        fractions = [f"{100 * count / total:.1f} % {verdict}" for verdict, count in counts.items()]
        lines.append(f"{truth} images are called: {', '.join(fractions)}")
    return lines


if __name__ == "__main__":
    sys.exit(run_program(main))
