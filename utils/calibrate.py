"""Make a detector's P(fake) mean what it says, and choose from where on it says real or fake.

    python -m utils.calibrate SCORES.csv --into DETECTOR.pth.tar [--fpr 0.01 --fnr 0.01]

SCORES.csv is a labelled score table of this detector, written by test.py, on images that neither training nor
the final test uses. A temperature is fitted (Guo et al., "On Calibration of Modern Neural Networks", ICML
2017), then two thresholds: an image is called fake from t_fake on, real up to t_real, and unsure between. They
are stored in the detector's file; test.py uses them from then on, and says so.

Exit status: 0 done, 2 a mistake of the user's.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils import checkpoint
from utils.metrics import expected_calibration_error, negative_log_likelihood, printable
from utils.scores import ScoreError, ScoreTable, predict, read_table, sigmoid

MISTAKE = 2  # exit status
KEY = "calibration"  # where it is in the checkpoint

WANTED_RATE = 0.01
TEMPERATURES = (0.05, 20.0)  # searched; beyond, the table does not determine it
BISECTIONS = 60  # halvings of log T: far below float32


class CalibrationError(ValueError):
    """What cannot be calibrated: one line with what was got, what was wanted, the way out."""


class Thresholds(NamedTuple):
    """Called real up to t_real, fake from t_fake on (t_real <= t_fake), unsure between."""

    t_real: float
    t_fake: float


def calibrate(table: ScoreTable, fpr: float = WANTED_RATE, fnr: float = WANTED_RATE) -> tuple[dict, list[str]]:
    """Fit the temperature and both thresholds to the labelled rows of a table.

    Args:
        fpr: share of the reals that may be called fake. fnr: share of the fakes that may be called real.
    Returns:
        calibration: {"temperature", "t_real", "t_fake", "fpr", "fnr", "n_real", "n_fake"}, plain numbers;
        warnings: what to know before trusting it, a line each.

    Raises:
        CalibrationError: if a class is missing.
    """
    table = table.select(table.scored & (table.is_real | table.is_fake))
    is_fake = table.is_fake
    n_fake = int(is_fake.sum())
    n_real = len(table) - n_fake
    if not n_real or not n_fake:
        raise CalibrationError(f"{n_real} real and {n_fake} fake images with a score: some of each were wanted")
    temperature, warnings = fit_temperature(table.margins, is_fake)
    prob_fake, _ = predict(table.logits, temperature)
    t_real, t_fake = fit_thresholds(prob_fake, is_fake, fpr, fnr)
    warnings += _warnings(n_real, n_fake, fpr, fnr)
    numbers = {"temperature": temperature, "t_real": t_real, "t_fake": t_fake, "fpr": fpr, "fnr": fnr}
    return {**numbers, "n_real": n_real, "n_fake": n_fake}, warnings


def fit_temperature(margins: np.ndarray, is_fake: np.ndarray) -> tuple[float, list[str]]:
    """The temperature T that minimises the mean NLL of P(fake) = sigmoid(margin / T), and warnings.

    The NLL is convex in 1/T, so its slope changes sign once: bisection finds where. Classes that do not
    overlap have no best T (the smaller the better), so T stays 1 for them.

    Args:
        margins: (N,) logit_fake - logit_real. is_fake: (N,) bool.
    """
    agreement = np.where(is_fake, margins, -margins)  # > 0 where the larger logit is right
    if agreement.min() >= 0:
        return 1.0, ["every image is on the right side: that leaves the temperature open, so it stays 1"]

    def slope(temperature: float) -> float:
        """Of the NLL along 1/T, up to a positive factor."""
        return -float(np.mean(agreement * sigmoid(-agreement / temperature)))

    low, high = map(math.log, TEMPERATURES)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(math.exp(middle)) < 0 else (middle, high)
    temperature = math.exp((low + high) / 2)
    if temperature < TEMPERATURES[0] * 1.001 or temperature > TEMPERATURES[1] * 0.999:
        side = "no better than guessing" if temperature > 1 else "almost perfectly separated"
        return temperature, [f"the temperature ran into the end of its range: these images are {side}"]
    return temperature, []


def fit_thresholds(prob_fake: np.ndarray, is_fake: np.ndarray, fpr: float, fnr: float) -> Thresholds:
    """The thresholds that leave as few images unsure as the wanted rates allow.

    At most a share `fpr` of the reals has P(fake) >= t_fake, at most `fnr` of the fakes has P(fake) <=
    t_real. Where both could be met without an unsure zone (t_real would exceed t_fake), they meet halfway,
    and nothing is unsure.

    Args:
        prob_fake: (N,) in [0, 1], calibrated. is_fake: (N,) bool, both classes present.
    """
    t_fake = _lowest_threshold(prob_fake[~is_fake], prob_fake, fpr)
    t_real = -_lowest_threshold(-prob_fake[is_fake], -prob_fake, fnr)
    if t_real >= t_fake:
        t_real = t_fake = (t_real + t_fake) / 2
    return Thresholds(float(t_real), float(t_fake))


def _lowest_threshold(negatives: np.ndarray, scores: np.ndarray, rate: float) -> float:
    """The lowest t with at most a share `rate` of `negatives` >= t; halfway to the next score above, if any."""
    allowed = min(math.floor(rate * len(negatives) + 1e-9), len(negatives) - 1)  # 0.07 * 100 is 7.000000000000001
    barred = np.sort(negatives)[::-1][allowed]  # the highest score that must stay below t
    above = scores[scores > barred]
    nearest = np.nextafter(barred, np.inf)
    return max(nearest, (barred + above.min()) / 2) if len(above) else nearest


def _warnings(n_real: int, n_fake: int, fpr: float, fnr: float) -> list[str]:
    warnings = []
    for rate, count, kind, verdict in ((fpr, n_real, "reals", "fake"), (fnr, n_fake, "fakes", "real")):
        needed = math.ceil(1 / rate - 1e-9) if rate else math.inf
        if count < needed:
            wanted = f"{needed} {kind} or more" if rate else "no finite number"
            warnings.append(
                f"{100 * rate:g} % of the {kind} called {verdict} can be told from none only with {wanted}, there"
                f" are {count}: the threshold lets none of these through, what others will do is anyone's guess"
            )
    return warnings


def store(calibration: dict, path: str | Path) -> None:
    """Put a calibration into a detector's file, everything else in it unchanged.

    Raises:
        CalibrationError: if the file holds no detector. CheckpointError: if it cannot be read or written.
    """
    content = checkpoint.load(path)
    require_detector(content, path)
    checkpoint.save({**content, KEY: calibration}, path)


def require_detector(content: dict, path: str | Path) -> None:
    names = content.get("state_dict")
    if not isinstance(names, dict) or not any(name.endswith("fc.weight") for name in names):
        raise CalibrationError(
            f"{path} holds no detector (no classifier under state_dict): give the file of train_detector.py"
            " that the scores came from"
        )


def report_lines(table: ScoreTable, calibration: dict, warnings: Sequence[str]) -> list[str]:
    """What was fitted and what it changes, for the terminal."""
    table = table.select(table.scored & (table.is_real | table.is_fake))
    temperature, t_real, t_fake = (calibration[key] for key in ("temperature", "t_real", "t_fake"))
    before, _ = predict(table.logits)
    after, verdicts = predict(table.logits, temperature, (t_real, t_fake))
    verdicts = np.array(verdicts)
    lines = [
        f"{calibration['n_real']} real and {calibration['n_fake']} fake images",
        f"temperature {temperature:.4g}",
        f"called fake from P(fake) = {t_fake:.4g} on, real up to {t_real:.4g}, unsure between",
        "P(fake), on the images it was fitted to:  before    after",
    ]
    for name, metric in (("ECE", expected_calibration_error), ("NLL", negative_log_likelihood)):
        lines.append(f"{name:>40}  {metric(before, table.is_fake):7.4f}  {metric(after, table.is_fake):7.4f}")
    for kind, rows in (("real", ~table.is_fake), ("fake", table.is_fake)):
        shares = (f"{100 * np.mean(verdicts[rows] == v):.1f} % {v}" for v in ("real", "fake", "unsure"))
        lines.append(f"truly {kind}: called {', '.join(shares)}")
    return [*lines, *(f"warning: {w}" for w in warnings)]


def rate(text: str) -> float:
    """An argparse type: a share from 0 to below 0.5."""
    value = float(text)
    if not 0 <= value < 0.5:
        raise argparse.ArgumentTypeError(f"{text} (wanted: a share from 0 to below 0.5, such as 0.01)")
    return value


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m utils.calibrate",
        description="Fit a temperature and two thresholds to a score table.",
        allow_abbrev=False,
    )
    parser.add_argument("scores", metavar="SCORES.csv", help="labelled score table of the detector, by test.py")
    parser.add_argument(
        "--into",
        metavar="FILE",
        help="the detector's checkpoint to store it in (default: only show what it would be)",
    )
    parser.add_argument(
        "--fpr", type=rate, nargs="+", default=[WANTED_RATE], metavar="SHARE",
        help="share of REALS that may be called fake (default: 0.01); a second number is taken as --fnr",
    )  # fmt: skip
    parser.add_argument(
        "--fnr", type=rate, metavar="SHARE", help="share of FAKES that may be called real (default: as --fpr)"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Calibrate and print. Returns the exit status."""
    parser = get_parser()
    args = parser.parse_args(arguments)
    if len(args.fpr) + (args.fnr is not None) > 2:
        parser.error("--fpr takes one share or two, and with --fnr one")
    try:
        if args.into:  # before any work
            require_detector(checkpoint.load(args.into), args.into)
        table = read_table(args.scores)
        calibration, warnings = calibrate(table, args.fpr[0], args.fpr[-1] if args.fnr is None else args.fnr)
        calibration["source"] = Path(args.scores).name
        lines = report_lines(table, calibration, warnings)
        if args.into:
            store(calibration, args.into)
            lines.append(f"stored in {args.into}; test.py uses it from now on")
    except (CalibrationError, ScoreError, checkpoint.CheckpointError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return MISTAKE
    sys.stdout.write("\n".join(map(printable, lines)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
