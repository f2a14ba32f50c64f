"""Calibrate a detector: make P(fake) a probability, and choose the thresholds of the verdicts real, fake and unsure.

    python -m tools.calibrate SCORES.csv --into DETECTOR.pth.tar [--fpr 0.01 --fnr 0.01]

SCORES.csv is a labelled score table that test.py wrote with this detector. Neither training nor the final test may use
the images in the table. The program fits a temperature (Guo et al., "On Calibration of Modern Neural Networks", ICML
2017), then two thresholds. They are stored in the checkpoint of the detector under "calibration", where test.py finds
them:

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
from evaluation.loading import image_settings
from evaluation.metrics import confusion, expected_calibration_error, negative_log_likelihood
from evaluation.score_table import ScoreTable, read_record, read_table
from models.released import extract_state_dict
from utils import checkpoints, options
from utils.console import printable
from utils.errors import UserError, run_program

logger = logging.getLogger("tools.calibrate")

TEMPERATURES = (0.05, 20.0)  # range in which the temperature is searched
BISECTIONS = 60  # halvings of the range, more than float32 can resolve
ROUNDING = 1e-9  # tolerance for products such as 0.07 * 100 = 7.000000000000001


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    record = read_record(args.scores)
    content = None
    if args.into:
        content = checkpoints.load(args.into)
        require_same_detector(content, record, args.into)
        require_same_image_settings(content, record, args.into)
    table = read_table(args.scores)
    calibration, warnings = calibrate(table, args.fpr, args.fnr)
    if record.get("trained_on"):
        warnings.append(
            f"the detector was trained on {record['trained_on']} of these images, so its errors are underestimated:"
            " score other images"
        )
    lines = report_lines(table, calibration)
    lines += [f"warning: {text}" for text in warnings]
    if content is not None:
        content["calibration"] = {**calibration, "source": Path(args.scores).name}
        checkpoints.save(content, os.path.realpath(args.into))  # keeps a symbolic link
        lines.append(f"stored in {printable(args.into)}; test.py uses the calibration from now on")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    text = "Fit a temperature and two thresholds to a score table."
    parser = options.Parser("python -m tools.calibrate", text)
    add = parser.add_argument
    add("scores", metavar="SCORES.csv", help="labelled score table of the detector, written by test.py")
    add("--into", metavar="FILE", help="checkpoint of the detector that stores the calibration (default: only print)")
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


def require_same_detector(content: Mapping, record: Mapping, name: str) -> None:
    """Check that a score table was made with a given detector, and from unperturbed images.

    Args:
        content: content of the checkpoint of the detector.
        record: content of SCORES.json. If it is empty, the function only logs a warning.
        name: file name of the checkpoint, for messages.
    Raises:
        UserError: if the weights differ, the images were perturbed, or the checkpoint holds no detector.
    """
    config = content.get("config") or {}
    state = extract_state_dict(content, name)
    is_released_detector = any(key.endswith("fc.weight") for key in state)
    if not is_released_detector and not config.get("classifier"):
        raise UserError(f"{printable(name)} holds no detector (no classifier): give the file that made the scores")
    if not record:
        logger.warning("warning: there is no SCORES.json, so it is not checked that the scores are from this detector")
        return
    scored = record.get("detector") or {}
    fingerprints = {  # part -> (fingerprint in the checkpoint, fingerprint in SCORES.json)
        "classifier": (checkpoints.fingerprint(state), scored.get("classifier_fingerprint")),
        "re-synthesizer": (config.get("resynthesizer_fingerprint"), scored.get("resynthesizer_fingerprint")),
        "VGG": ((config.get("vgg") or {}).get("fingerprint"), (scored.get("vgg") or {}).get("fingerprint")),
    }
    for part, (expected, got) in fingerprints.items():
        if None not in (expected, got) and expected != got:
            raise UserError(
                f"the scores are from another detector: the fingerprint of the {part} is {got}, and {printable(name)}"
                f" has {expected}; score the images with this file first (test.py --resume)"
            )
    perturbation = (record.get("perturbation") or {}).get("name", "none")
    if perturbation != "none":
        raise UserError(f"the scores are from images perturbed by {perturbation}: use scores of unperturbed images")


def require_same_image_settings(content: Mapping, record: Mapping, name: str) -> None:
    """Check that the images of the score table were resized and cropped as test.py does it by default.

    Raises:
        UserError: if the crop size, the resizing or the number of crops differs.
    """
    job = record.get("job") or {}
    trained = (content.get("config") or {}).get("images") or {}
    for setting, expected in image_settings(trained, {})._asdict().items():
        got = job.get(setting, expected)
        if got != expected:
            flag = f"--{setting.replace('_', '-')}"
            raise UserError(
                f"the scores were made with {flag} {got or 0}, and test.py uses {expected or 0} for {printable(name)}:"
                f" score the images again without {flag}"
            )


# --- fitting ---


def calibrate(table: ScoreTable, fpr: float = 0.01, fnr: float = 0.01) -> tuple[dict, list[str]]:
    """Fit the temperature and both thresholds to the labelled rows of a score table.

    Args:
        fpr: fraction of the real images that may be called fake.
        fnr: fraction of the fake images that may be called real.
    Returns:
        The calibration without the entry "source", as plain numbers; and warnings, one line each.
    Raises:
        UserError: if the table has no real or no fake images.
    """
    table = table.select(table.usable)
    n_real, n_fake = int(table.is_real.sum()), int(table.is_fake.sum())
    if not n_real or not n_fake:
        raise UserError(f"expected scores of real and of fake images, got {n_real} real and {n_fake} fake images")
    temperature, warnings = fit_temperature(table.margins, table.is_fake)
    prob_fake, _ = probabilities_and_verdicts(table.logits, {"temperature": temperature})
    t_real, t_fake = fit_thresholds(prob_fake, table.is_fake, fpr, fnr)
    for rate, count, kind in ((fpr, n_real, "real"), (fnr, n_fake, "fake")):
        if rate * count < 1 - ROUNDING:
            warnings.append(
                f"{100 * rate:g} % of {count} {kind} images is less than one image: none of them is called wrong, but"
                " the error rate on other images is not known"
            )
    fitted = {"temperature": temperature, "t_real": t_real, "t_fake": t_fake}
    return {**fitted, "fpr": fpr, "fnr": fnr, "n_real": n_real, "n_fake": n_fake}, warnings


def fit_temperature(margins: np.ndarray, is_fake: np.ndarray) -> tuple[float, list[str]]:
    """Find the temperature T that minimises the mean negative log-likelihood of P(fake) = sigmoid(margin / T).

    The negative log-likelihood is convex in 1 / T. Its slope changes sign once, and bisection finds this point. If the
    larger logit is right for every image, the likelihood grows without end as T becomes smaller. T is then set to 1.

    Args:
        margins: (N,), logit_fake - logit_real.
        is_fake: (N,) bool.
    Returns:
        The temperature, and warnings, one line each.
    """
    agreement = np.where(is_fake, margins, -margins)  # > 0 if the larger logit is right
    if agreement.min() >= 0:
        return 1.0, ["every image is on the right side, which does not determine the temperature: it stays 1"]
    low, high = np.log(TEMPERATURES)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        slope = -np.mean(agreement * sigmoid(-agreement / math.exp(middle)))  # derivative by 1 / T
        if slope < 0:
            high = middle
        else:
            low = middle
    temperature = math.exp((low + high) / 2)
    if TEMPERATURES[0] * 1.001 < temperature < TEMPERATURES[1] * 0.999:
        return temperature, []
    reason = "no better than guessing" if temperature > 1 else "almost perfectly separated"
    return temperature, [f"the temperature is at the end of its range: the scores are {reason}"]


def fit_thresholds(prob_fake: np.ndarray, is_fake: np.ndarray, fpr: float, fnr: float) -> tuple[float, float]:
    """Find the thresholds t_real <= t_fake that call as few images unsure as the error rates allow.

    At most a fraction `fpr` of the real images has P(fake) >= t_fake. At most a fraction `fnr` of the fake images has
    P(fake) <= t_real. If both error rates can be kept without calling any image unsure, both thresholds are equal.

    Args:
        prob_fake: (N,) in [0, 1], calibrated.
        is_fake: (N,) bool, with both classes.
    Returns:
        (t_real, t_fake)
    """
    t_fake = lowest_threshold(prob_fake[~is_fake], prob_fake, fpr)
    t_real = -lowest_threshold(-prob_fake[is_fake], -prob_fake, fnr)
    if t_real >= t_fake:
        t_real = t_fake = (t_real + t_fake) / 2
    return float(t_real), float(t_fake)


def lowest_threshold(negatives: np.ndarray, scores: np.ndarray, rate: float) -> float:
    """Find the lowest threshold t such that at most a fraction `rate` of `negatives` is >= t.

    The result is halfway between the highest score that must stay below t and the next higher score.
    """
    allowed = min(math.floor(rate * len(negatives) + ROUNDING), len(negatives) - 1)
    highest_below = np.sort(negatives)[::-1][allowed]  # the highest score that must stay below t
    above = scores[scores > highest_below]
    smallest_step = np.nextafter(highest_below, np.inf)
    if len(above) == 0:
        return smallest_step
    return max(smallest_step, (highest_below + above.min()) / 2)


# --- what is printed ---


def report_lines(table: ScoreTable, calibration: Mapping) -> list[str]:
    """Describe a calibration, and its effect on the images of the score table."""
    table = table.select(table.usable)
    before, _ = probabilities_and_verdicts(table.logits)
    after, verdicts = probabilities_and_verdicts(table.logits, calibration)
    lines = [
        "fitted to {n_real} real and {n_fake} fake images: temperature {temperature:.4g}; fake if P(fake) >="
        " {t_fake:.4g}, real if P(fake) <= {t_real:.4g}, else unsure".format_map(calibration)
    ]
    for name, metric in (("calibration error (ECE)", expected_calibration_error), ("NLL", negative_log_likelihood)):
        old, new = metric(before, table.is_fake), metric(after, table.is_fake)
        lines.append(f"{name} of P(fake) on these images: {old:.4f} before, {new:.4f} after")
    for truth, counts in confusion(verdicts, table.is_fake).items():
        total = sum(counts.values())
        fractions = [f"{100 * count / total:.1f} % {verdict}" for verdict, count in counts.items()]
        lines.append(f"{truth} images are called: {', '.join(fractions)}")
    return lines


if __name__ == "__main__":
    sys.exit(run_program(main))
