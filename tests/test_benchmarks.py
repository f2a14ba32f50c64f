"""The benchmark compares forms that compute the same, and measures what it says."""

import pytest
import torch

from benchmarks import __main__ as program
from benchmarks import cases
from benchmarks.cases import Case
from utils.errors import UserError

TOY = Case("scoring", "here", "fp32", 0, 64, 2, "cpu", True)
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}  # relative to the largest difference between the logits of two images


def logits(form: str, precision: str = "fp32") -> torch.Tensor:
    """Score two images in one of the forms. Returns (2, 2)."""
    return cases.scoring(TOY._replace(form=form, precision=precision))()


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the largest difference of two results, relative to the difference between the images of the second."""
    return ((a - b).abs().max() / (b[0] - b[1]).abs().max()).item()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("form", ["channels-last", "here"])
def test_the_forms_compute_the_same(form, precision):
    assert error(logits(form, precision), logits("plain")) < 100 * TOLERANCE[precision]


def test_a_changed_network_is_noticed(monkeypatch):
    """The comparison above fails if the re-synthesis of one form is 1 % brighter."""
    expected = logits("plain")
    forward = cases.PlainRDN.forward
    monkeypatch.setattr(cases.PlainRDN, "forward", lambda self, x_lr: 1.01 * forward(self, x_lr) + 0.01)
    assert error(logits("channels-last"), expected) > 100 * TOLERANCE["fp32"]
