"""The benchmarks run, at toy size, and say what they are asked for."""

import json
import mmap

import pytest
import torch

from benchmarks import agreement, compare, gpu, measure, robustness, scaling, training_memory
from data.perturbations import cells
from utils.scores import make_rows, write_rows


@pytest.fixture(scope="module", autouse=True)
def one_vgg():
    """Loaded once."""
    vgg = compare.load_vgg("random")
    with pytest.MonkeyPatch.context() as patch:
        for module in (compare, training_memory):
            patch.setattr(module, "load_vgg", lambda _: vgg)
        yield


def test_compare(tmp_path, capsys):
    out = tmp_path / "numbers.json"
    parts = ["scoring", "memory", "cached epoch", "sr loading"]
    assert compare.main(["--small", "--only", *parts, "--out", str(out)]) == 0
    results = json.loads(out.read_text())
    epochs = {"first epoch, pixels", "later epoch, pixels"}
    assert set(results["times"]) == {"scoring, pixels", "SR loading, a patch", *epochs}
    assert set(results["times"]["later epoch, pixels"]) == {"without", "with cache"}
    assert set(results["memory"]["pixels"]) == set(compare.FORMS)
    assert "plain / ours" in capsys.readouterr().out


def test_the_forms_that_are_compared_compute_the_same():
    plain, fp32, bf16 = (compare.scorer(form, 0, 64, small=True)() for form in compare.FORMS)
    torch.testing.assert_close(fp32, plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bf16, plain, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", ["plain", "all, 2 images, micro-batch 1"])
def test_training_memory(capsys, name):
    assert training_memory.main(["--small", "--only", name]) == 0
    assert name in capsys.readouterr().out


def test_gpu(tmp_path, capsys):
    out = tmp_path / "numbers.json"
    assert gpu.main(["--gpu", "cpu", "--small", "--rounds", "1", "--out", str(out)]) == 0
    results = json.loads(out.read_text())
    assert [got["name"] for got in results["scoring"]] == 2 * list(gpu.FORMS)
    assert all(got["seconds"] > 0 for got in results["scoring"] + results["training"])
    assert len(results["training"]) == 5 and all(got["rate"] > 0 for got in results["rdn"])
    assert "pixels, colorization" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(capfd):
    assert gpu.main([]) == 2
    assert "no GPU that PyTorch can use" in capfd.readouterr().err


def test_what_does_not_fit_on_the_gpu():
    def too_big():
        raise torch.OutOfMemoryError

    measured = gpu.timed(torch.device("cpu"), {"small": lambda: lambda: None, "big": lambda: too_big}, 1)
    assert measured[0]["seconds"] is not None and measured[1]["seconds"] is None
    assert gpu.number(measured[1]["seconds"]) == "-"


def test_the_growth_in_the_table_of_scaling():
    measured = {10: {"seconds": 5.0, "memory": 1.0}, 110: {"seconds": 6.0, "memory": 1.0}}
    assert scaling.lines(measured, str, lambda count: count / 1e3)[1] == ["110", "6.0", "1.00", "10.00"]


def test_what_a_process_of_its_own_says(monkeypatch):
    monkeypatch.setattr(measure.subprocess, "run", lambda *_, **__: run)
    run = measure.subprocess.CompletedProcess([], 0, stdout='a line\n{"peak": 1.0}\n', stderr="")
    assert measure.in_own_process("x", stage=0) == {"peak": 1.0}
    run = measure.subprocess.CompletedProcess([], -9, stdout="", stderr="")
    assert "out of memory" in measure.in_own_process("x")["error"]


def test_peak_memory():
    def use_32_mib():  # asked of the system: what an allocator still has from earlier tests would not show
        with mmap.mmap(-1, 32 * 2**20) as new:
            new.write(bytes([1]) * len(new))

    got = measure.peak_of(use_32_mib)
    assert got["peak"] - got["before"] > 25


def test_agreement_of_two_score_tables(tmp_path, capsys):
    names, tables = ["a.png", "b.png", "c.png"], [str(tmp_path / "one.csv"), str(tmp_path / "two.csv")]
    labels, generators = ["real", "fake", "fake"], ["", "g", "g"]
    write_rows(tables[0], make_rows(names, labels, generators, [[0, 1], [1, 0], [2, 0]]))
    write_rows(tables[1], make_rows(names, labels, generators, [[0, 1], [1, 1.5], [float("nan"), 0]]))
    assert agreement.main(tables) == 0
    found = dict(line.rsplit(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert found["images"] == "2" and found["scored in one table only"] == "1"
    assert found["logits differ at most by"] == "1.5" and found["verdicts that differ"] == "1"
    write_rows(tables[1], make_rows(names[:2], labels[:2], generators[:2], [[0, 1], [1, 0]]))
    assert agreement.main(tables) == 2
    assert "not the same ones" in capsys.readouterr().err


def test_the_table_of_robustness(tmp_path, capsys):
    for i, cell in enumerate(cells("sweep")):
        found = {
            "g": {"auroc": i / 20, "intervals": {"auroc": [i / 40, i / 20]}},
            "h": {"auroc": 0.5, "intervals": {"auroc": [0.5, 0.5]}},
        }
        file = tmp_path / f"mine_{cell.label.replace(' ', '_')}.json"
        file.write_text(json.dumps({"metrics": {"generators": found}}))
    assert robustness.main([str(tmp_path / "mine")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "AUROC in %: g / h" and lines[1].split() == ["mine"]
    assert lines[3].split() == ["none", "0.0", "/", "50.0"] and lines[-2].split()[-3:] == ["95.0", "/", "50.0"]
    assert lines[-1] == "95 % intervals: at most +-23.8"
    assert robustness.main([str(tmp_path / "other")]) == 2
    assert "other_none.json" in capsys.readouterr().err
