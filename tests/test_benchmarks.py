"""The forms that the benchmark compares compute the same, and its rows appear as soon as they are measured."""

import pytest
import torch
from pretend_cuda import pretend_cuda

from benchmarks import __main__ as program
from benchmarks import cases
from benchmarks.cases import Case
from utils.errors import UserError

TOY = Case("scoring", "here", "fp32", 0, 64, 2, "cpu", True)
TOLERANCES = {"fp32": 1e-4, "bf16": 1e-2}  # relative to the difference between the logits of two images


def score(form: str, precision: str = "fp32") -> torch.Tensor:
    """Return the logits of two images in one of the forms, (2, 2)."""
    return cases.scoring(TOY._replace(form=form, precision=precision))()


def relative_error(logits: torch.Tensor, expected: torch.Tensor) -> float:
    between_images = (expected[0] - expected[1]).abs().max()
    return ((logits - expected).abs().max() / between_images).item()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("form", ["channels-last", "here"])
def test_the_forms_compute_the_same(form, precision):
    assert relative_error(score(form, precision), score("plain")) < TOLERANCES[precision]


def test_the_comparison_of_forms_notices_a_brighter_re_synthesis(monkeypatch):
    expected = score("plain")
    forward = cases.PlainRDN.forward
    monkeypatch.setattr(cases.PlainRDN, "forward", lambda model, x_lr: 1.01 * forward(model, x_lr) + 0.01)
    assert relative_error(score("channels-last"), expected) > max(TOLERANCES.values())


@pytest.mark.parametrize("kind", ["step, RDN frozen", "step, fine-tuning", "step, train_sr.py", "RDN alone"])
def test_each_kind_of_row_runs(kind):
    result = cases.measure(TOY._replace(kind=kind, images=4))
    assert result["seconds"] > 0
    assert result["gib"] > 0.1  # PyTorch alone takes more


def test_fine_tuning_changes_the_re_synthesizer_and_the_frozen_step_does_not(monkeypatch):
    built = []
    build = cases.build

    def build_and_remember(case):
        built.append(build(case))
        return built[-1]

    monkeypatch.setattr(cases, "build", build_and_remember)
    for kind, moves in (("step, RDN frozen", False), ("step, fine-tuning", True)):
        run = cases.KINDS[kind](TOY._replace(kind=kind, images=4))
        weight = built[-1][0].resynthesizer.output.weight
        before = weight.detach().clone()
        run()
        assert torch.equal(weight, before) != moves


def test_quick_prints_one_row(capsys):
    assert program.main(["--quick"]) == 0
    first, header, _, row = capsys.readouterr().out.splitlines()
    assert "1 rows, about 0 minutes" in first
    assert "channels-last / here" in header
    assert "-" not in [cell.strip() for cell in row.split("|")]


def test_a_row_is_printed_before_the_next_one_is_measured(monkeypatch, capsys):
    printed = []

    def measure_row(case, rounds):
        printed.append(len(capsys.readouterr().out.splitlines()))
        return ("1",) * len(program.HEADER)

    monkeypatch.setattr(program, "measure_row", measure_row)
    monkeypatch.setattr(program, "print_start", lambda folder: None)
    program.main([])
    assert printed == [3] + [1] * (len(printed) - 1)  # estimate and header, then one row each


def test_a_process_that_fails_is_a_missing_number_and_exit_status_1(monkeypatch, capsys):
    monkeypatch.setattr(program, "in_own_process", lambda case: None)
    assert program.main(["--quick"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].count(" - ") == 6


def test_the_gpu_rows_are_those_that_were_asked_for():
    parsed = program.argparse.Namespace(quick=False, gpu="0", stages=[0, 5], side=512)
    rows = program.cases_of(parsed)
    scoring = {(row.stage, row.side, row.precision) for row in rows if row.kind == "scoring"}
    assert scoring == {(s, side, p) for s in (0, 5) for side in (256, 512, 1024) for p in ("fp32", "tf32", "bf16")}
    fine_tuning = [row for row in rows if row.kind == "step, fine-tuning"]
    assert {row.stage for row in fine_tuning} == {0, 5}
    assert {row.images for row in fine_tuning} == {6}


@pytest.mark.parametrize("kind", ["scoring", "step, RDN frozen", "step, train_sr.py", "RDN alone", "matrix product"])
def test_each_kind_of_row_keeps_its_tensors_on_a_pretended_gpu(kind):
    """Fine-tuning is left out, because recomputation in the backward pass cannot be pretended."""
    with pretend_cuda():
        cases.KINDS[kind](TOY._replace(kind=kind, images=4, gpu="0"))()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_one_clear_line():
    with pytest.raises(UserError, match="no GPU"):
        program.main(["--gpu", "0"])
