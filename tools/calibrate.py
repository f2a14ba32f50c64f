"""Make a detector's P(fake) mean what it says, and choose from where on it says real or fake.

    python -m tools.calibrate SCORES.csv --into DETECTOR.pth.tar [--fpr 0.01 --fnr 0.01]

SCORES.csv is a labelled score table of this detector, written by test.py, on images that neither training nor the
final test uses. A temperature is fitted (Guo et al., "On Calibration of Modern Neural Networks", ICML 2017), then two
thresholds. What is stored in the detector's file as "calibration", and used by test.py from then on:

    temperature, t_real, t_fake   logits are divided by the first; fake from P(fake) = t_fake on, real up to t_real
    fpr, fnr, n_real, n_fake      the shares of errors that were asked for, and the images it was fitted on
    source                        name of the score table
"""

import argparse
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from evaluation.calibration import probabilities_and_verdicts, sigmoid
from evaluation.metrics import confusion, expected_calibration_error, negative_log_likelihood
from evaluation.score_table import ScoreTable, read_record, read_table
from utils import checkpoints
from utils.console import printable
from utils.errors import UserError, run_program

logger = logging.getLogger("calibrate")

TEMPERATURES = (0.05, 20.0)  # searched; beyond, the table does not determine it
BISECTIONS = 60  # halvings of log T: far below float32


def calibrate(table: ScoreTable, fpr: float = 0.01, fnr: float = 0.01) -> tuple[dict, list[str]]:
    """Fit the temperature and both thresholds to the labelled rows of a table.

    Args:
        fpr: share of the reals that may be called fake. fnr: share of the fakes that may be called real.
    Returns:
        the calibration without its source, plain numbers; what to know before trusting it, a line each.
    Raises:
        UserError: if a class is missing.
    """
    table = table.select(table.usable)
    n_real, n_fake = int(table.is_real.sum()), int(table.is_fake.sum())
    if not n_real or not n_fake:
        raise UserError(f"{n_real} real and {n_fake} fake images with a score: some of each were wanted")
    temperature, warnings = fit_temperature(table.margins, table.is_fake)
    t_real, t_fake = fit_thresholds(probabilities_and_verdicts(table.logits, {"temperature": temperature})[0], table.is_fake, fpr, fnr)
    for rate, count, kind in ((fpr, n_real, "reals"), (fnr, n_fake, "fakes")):
        if rate * count < 1 - 1e-9:
            none = f"{100 * rate:g} % of {count} {kind} is less than one image, so none of them is called wrong"
            warnings.append(f"{none}; what others will be called is anyone's guess")
    fitted = {"temperature": temperature, "t_real": t_real, "t_fake": t_fake}
    return {**fitted, "fpr": fpr, "fnr": fnr, "n_real": n_real, "n_fake": n_fake}, warnings


def fit_temperature(margins: np.ndarray, is_fake: np.ndarray) -> tuple[float, list[str]]:
    """The temperature T that minimises the mean NLL of P(fake) = sigmoid(margin / T), and warnings.

    The NLL is convex in 1/T, so its slope changes sign once: bisection finds where. Classes that do not overlap have
    no best T (the smaller the better), so T stays 1 for them.

    Args:
        margins: (N,) logit_fake - logit_real. is_fake: (N,) bool.
    """
    agreement = np.where(is_fake, margins, -margins)  # > 0 where the larger logit is right
    if agreement.min() >= 0:
        return 1.0, ["every image is on the right side: that leaves the temperature open, so it stays 1"]
    low, high = map(math.log, TEMPERATURES)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        slope = -np.mean(agreement * sigmoid(-agreement / math.exp(middle)))  # of the NLL along 1/T
        low, high = (low, middle) if slope < 0 else (middle, high)
    temperature = math.exp((low + high) / 2)
    if TEMPERATURES[0] * 1.001 < temperature < TEMPERATURES[1] * 0.999:
        return temperature, []
    side = "no better than guessing" if temperature > 1 else "almost perfectly separated"
    return temperature, [f"the temperature ran into the end of its range: these images are {side}"]


def fit_thresholds(prob_fake: np.ndarray, is_fake: np.ndarray, fpr: float, fnr: float) -> tuple[float, float]:
    """The thresholds (t_real, t_fake) that leave as few images unsure as the wanted rates allow.

    At most a share `fpr` of the reals has P(fake) >= t_fake, at most `fnr` of the fakes has P(fake) <= t_real. Where
    both could be met without an unsure zone (t_real would exceed t_fake), they meet halfway, and nothing is unsure.

    Args:
        prob_fake: (N,) in [0, 1], calibrated. is_fake: (N,) bool, both classes present.
    """
    t_fake = _lowest_threshold(prob_fake[~is_fake], prob_fake, fpr)
    t_real = -_lowest_threshold(-prob_fake[is_fake], -prob_fake, fnr)
    if t_real >= t_fake:
        t_real = t_fake = (t_real + t_fake) / 2
    return float(t_real), float(t_fake)


def _lowest_threshold(negatives: np.ndarray, scores: np.ndarray, rate: float) -> float:
    """The lowest t with at most a share `rate` of `negatives` >= t; halfway to the next score above, if any."""
    allowed = min(math.floor(rate * len(negatives) + 1e-9), len(negatives) - 1)  # 0.07 * 100 is 7.000000000000001
    barred = np.sort(negatives)[::-1][allowed]  # the highest score that must stay below t
    above = scores[scores > barred]
    nearest = np.nextafter(barred, np.inf)
    return max(nearest, (barred + above.min()) / 2) if len(above) else nearest


def require_same_detector(content: Mapping, record: Mapping, path: str) -> None:
    """Raises UserError unless a score table is of the detector in the file `path`, and of untouched images.

    content: of the file. record: of SCORES.json; {}: there is none, which is a warning.
    """
    from models.released import state_dict_of
    from utils.checkpoints import fingerprint

    state = content.get("state_dict")
    if not isinstance(state, Mapping) or not any(name.endswith("fc.weight") for name in state):
        raise UserError(f"{printable(path)} holds no detector (no classifier under state_dict): give the one scored with")
    if not record:
        logger.warning("warning: no SCORES.json beside the table, so it is taken on trust to be of this detector")
    config, scored = content.get("config") or {}, record.get("detector") or {}
    parts = {  # of the file, of the scores; None: not known
        "classifier": (fingerprint(state_dict_of(content, path)), scored.get("classifier_fingerprint")),
        "RDN": (config.get("resynthesizer_fingerprint"), scored.get("resynthesizer_fingerprint")),
        "VGG": tuple((c.get("vgg") or {}).get("fingerprint") for c in (config, scored)),
    }
    for part, (wanted, got) in parts.items():
        if None not in (wanted, got) and wanted != got:
            raise UserError(
                f"the scores are of another detector: their {part} is {got}, that of {printable(path)} is {wanted};"
                " score the images with this file first (test.py --resume)"
            )
    perturbation = (record.get("perturbation") or {}).get("name", "none")
    if perturbation != "none":
        raise UserError(f"the scores are of images with {perturbation}: calibrate on untouched ones (--perturb none)")


def report_lines(table: ScoreTable, calibration: Mapping) -> list[str]:
    """What was fitted and what it changes, for the terminal."""
    table = table.select(table.usable)
    (before, _), (after, verdicts) = probabilities_and_verdicts(table.logits), probabilities_and_verdicts(table.logits, calibration)
    lines = [
        "fitted to {n_real} real and {n_fake} fake images: temperature {temperature:.4g}; called fake from P(fake) ="
        " {t_fake:.4g} on, real up to {t_real:.4g}, unsure between".format_map(calibration),
    ]
    for name, metric in (("calibration error (ECE)", expected_calibration_error), ("NLL", negative_log_likelihood)):
        old, new = metric(before, table.is_fake), metric(after, table.is_fake)
        lines.append(f"{name} of P(fake) on them: {old:.4f} before, {new:.4f} after")
    for truth, counts in confusion(verdicts, table.is_fake).items():
        shares = (f"{100 * n / sum(counts.values()):.1f} % {verdict}" for verdict, n in counts.items())
        lines.append(f"truly {truth}: called {', '.join(shares)}")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    about = "Fit a temperature and two thresholds to a score table."
    parser = argparse.ArgumentParser(prog="python -m tools.calibrate", description=about, allow_abbrev=False)
    add = parser.add_argument
    add("scores", metavar="SCORES.csv", help="labelled score table of the detector, by test.py")
    add("--into", metavar="FILE", help="the detector's checkpoint to store it in (default: only show it)")
    add("--fpr", type=float, default=0.01, metavar="SHARE", help="of REALS that may be called fake (default: 0.01)")
    add("--fnr", type=float, metavar="SHARE", help="of FAKES that may be called real (default: as --fpr)")
    args = parser.parse_args(arguments)
    rates = args.fpr, args.fpr if args.fnr is None else args.fnr
    if not all(0 <= rate < 0.5 for rate in rates):
        raise UserError(f"--fpr {rates[0]:g} --fnr {rates[1]:g}: shares from 0 to below 0.5 were wanted, such as 0.01")

    record = read_record(args.scores)
    if args.into:  # before any work
        content = checkpoints.load(args.into)
        require_same_detector(content, record, args.into)
    table = read_table(args.scores)
    calibration, warnings = calibrate(table, *rates)
    if record.get("trained_on"):
        warnings.append(f"it was trained on {record['trained_on']} of these images: take others, or it is too sure")
    lines = [*report_lines(table, calibration), *(f"warning: {text}" for text in warnings)]
    if args.into:
        calibration["source"] = Path(args.scores).name
        checkpoints.save({**content, "calibration": calibration}, args.into)
        lines.append(f"stored in {printable(args.into)}; test.py uses it from now on")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
