"""Tests of the package benchmarks, which measures the time and memory of three implementations of the detector."""

import pytest
import torch
from pretend_cuda import pretend_cuda

from benchmarks import __main__ as program
from benchmarks import cases
from benchmarks.cases import Case
from utils.errors import UserError

TOY = Case("scoring", "here", "fp32", 0, 64, 2, "cpu", True)
TOLERANCES = {"fp32": 1e-4, "bf16": 1e-2}  # precision -> largest allowed value of `relative_error`


def compute_logits(form: str, precision: str = "fp32") -> torch.Tensor:
    """Compute logits, float (2, 2), of two images with the implementation `form` of the networks, such as "plain"."""
    return cases.prepare_scoring(TOY._replace(form=form, precision=precision))()


def relative_error(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest error of `logits`, divided by the largest difference between the two rows of `expected`."""
    between_images = (expected[0] - expected[1]).abs().max()
    return ((logits - expected).abs().max() / between_images).item()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("form", ["channels-last", "here"])
def test_each_implementation_of_the_networks_gives_the_logits_of_the_plain_implementation(form, precision):
    assert relative_error(compute_logits(form, precision), compute_logits("plain")) < TOLERANCES[precision]


def test_the_comparison_of_implementations_fails_if_one_resynthesizes_brighter_images(monkeypatch):
    expected = compute_logits("plain")
    forward = cases.PlainRDN.forward
    monkeypatch.setattr(cases.PlainRDN, "forward", lambda model, x_lr: 1.01 * forward(model, x_lr) + 0.01)
    assert relative_error(compute_logits("channels-last"), expected) > max(TOLERANCES.values())


@pytest.mark.parametrize("kind", ["step, RDN frozen", "step, fine-tuning", "step, train_sr.py", "RDN alone"])
def test_the_benchmark_measures_time_and_memory_of_training_steps_and_of_rdn(kind):
    result = cases.measure_time_and_memory_of_case(TOY._replace(kind=kind, images=4))
    assert result["seconds"] > 0
    assert result["gib"] > 0.1  # a process that has imported PyTorch uses more than 0.1 GiB of memory


def test_the_fine_tuning_step_changes_the_resynthesizer_and_the_frozen_step_does_not(monkeypatch):
    built = []
    build = cases.build_detector

    def build_detector_and_append_to_list(case):
        built.append(build(case))
        return built[-1]

    monkeypatch.setattr(cases, "build_detector", build_detector_and_append_to_list)
    for kind, moves in (("step, RDN frozen", False), ("step, fine-tuning", True)):
        run = cases.KINDS[kind](TOY._replace(kind=kind, images=4))
        weight = built[-1][0].resynthesizer.output.weight
        before = weight.detach().clone()
        run()
        assert torch.equal(weight, before) != moves


def test_the_flag_quick_makes_the_benchmark_print_one_complete_row(capsys):
    assert program.main(["--quick"]) == 0
    first, header, _, row = capsys.readouterr().out.splitlines()
    assert "1 rows, about 0 minutes" in first
    assert "channels-last / here" in header
    assert "-" not in [cell.strip() for cell in row.split("|")]


def test_each_row_is_printed_before_the_next_row_is_measured(monkeypatch, capsys):
    printed = []

    def count_printed_lines(case, rounds):
        printed.append(len(capsys.readouterr().out.splitlines()))
        return ("1",) * len(program.HEADER)

    monkeypatch.setattr(program, "measure_implementations_of_case", count_printed_lines)
    monkeypatch.setattr(program, "measure_and_print_startup_times", lambda folder: None)
    program.main([])
    # The program prints 3 lines before the first measurement, and one table row after each measurement
    assert printed == [3] + [1] * (len(printed) - 1)


def test_the_benchmark_prints_a_dash_and_exits_with_status_1_if_a_measurement_fails(monkeypatch, capsys):
    monkeypatch.setattr(program, "measure_case_in_new_process", lambda case: None)
    assert program.main(["--quick"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].count(" - ") == 6


def test_the_benchmark_on_a_gpu_scores_with_each_vgg_stage_image_size_and_precision():
    parsed = program.argparse.Namespace(quick=False, gpu="0", stages=[0, 5], side=512)
    rows = program.list_benchmark_cases(parsed)
    scoring = {(row.stage, row.side, row.precision) for row in rows if row.kind == "scoring"}
    assert scoring == {(s, side, p) for s in (0, 5) for side in (256, 512, 1024) for p in ("fp32", "tf32", "bf16")}
    fine_tuning = [row for row in rows if row.kind == "step, fine-tuning"]
    assert {row.stage for row in fine_tuning} == {0, 5}
    assert {row.images for row in fine_tuning} == {6}


@pytest.mark.parametrize("kind", ["scoring", "step, RDN frozen", "step, train_sr.py", "RDN alone", "matrix product"])
def test_each_benchmark_case_except_fine_tuning_keeps_all_tensors_on_the_pretended_gpu(kind):
    """Fine-tuning is left out, because it uses gradient checkpointing, which the pretended GPU does not support."""
    with pretend_cuda():
        cases.KINDS[kind](TOY._replace(kind=kind, images=4, gpu="0"))()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_the_benchmark_refuses_a_gpu_number_in_one_line_if_there_is_no_gpu():
    with pytest.raises(UserError, match="no GPU"):
        program.main(["--gpu", "0"])
