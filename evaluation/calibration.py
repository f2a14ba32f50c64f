"""Convert logits to P(fake) and verdicts, with or without a stored calibration."""

from collections.abc import Mapping

import numpy as np

from utils.checkpoints import Fields
from utils.console import make_printable
from utils.errors import UserError

# A threshold chosen by tools.calibrate can be the largest float below 0 or the smallest float above 1
THRESHOLD_TOLERANCE = 1e-6
UNCALIBRATED = {"temperature": 1.0, "t_real": 0.5, "t_fake": 0.5}


def probabilities_and_verdicts(logits: np.ndarray, calibration: Mapping | None = None) -> tuple[np.ndarray, list[str]]:
    """Convert logits to P(fake) and to verdicts.

    Args:
        logits: (N, 2), with the columns FAKE and REAL.
        calibration: the dict that `tools.calibrate` stores in a checkpoint (default: UNCALIBRATED). The logits are
            divided by calibration["temperature"]. The verdict is fake if P(fake) >= calibration["t_fake"], otherwise
            real if P(fake) <= calibration["t_real"], otherwise unsure.

    Returns:
        P(fake), float64 (N,) in [0, 1], and N verdicts: real, fake or unsure.
    """
    rule = {**UNCALIBRATED, **(calibration or {})}
    logits = np.asarray(logits, dtype=np.float64).reshape(-1, 2)
    margins = logits[:, 0] - logits[:, 1]
    prob_fake = sigmoid(margins / rule["temperature"])  # equals softmax(logits / temperature)[:, FAKE]
    verdicts = np.full(len(prob_fake), "unsure")
    verdicts[prob_fake <= rule["t_real"]] = "real"
    verdicts[prob_fake >= rule["t_fake"]] = "fake"
    return prob_fake, verdicts.tolist()


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Compute 1 / (1 + exp(-x)) without overflow."""
    return np.exp(-np.logaddexp(0, -x))


def check_calibration(calibration: object, name: str) -> dict:
    """Check the entry "calibration" of the checkpoint with the file name `name`.

    Returns:
        The calibration as a dict, which is empty if the checkpoint has no calibration.

    Raises:
        UserError: if a value of the calibration is missing or outside its range, or if t_real is greater than t_fake.
    """
    fields = Fields(calibration, name, "calibration")
    if not fields.values:
        return {}
    fields.get_positive_number_field("temperature")
    t_real = fields.get_number_field("t_real", -THRESHOLD_TOLERANCE, 1 + THRESHOLD_TOLERANCE)
    t_fake = fields.get_number_field("t_fake", -THRESHOLD_TOLERANCE, 1 + THRESHOLD_TOLERANCE)
    if t_real > t_fake:
        raise UserError(
            f"{make_printable(name)} is damaged: the threshold calibration.t_real must not exceed the threshold"
            f" calibration.t_fake, got {t_real:g} and {t_fake:g}; use an undamaged copy"
        )
    return dict(fields.values)
