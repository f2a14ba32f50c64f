"""The benchmarks run, at toy size, and say what they are asked for. The slow ones start many programs."""

import json
import os

import pytest
import torch

from benchmarks import forms, measure
from benchmarks.__main__ import main
from benchmarks.forms import CPU_FORMS, Case
from utils.errors import UserError

TOY = Case(0, 64, quick=True)


def tables(tmp_path, *arguments):
    """The tables of a benchmark, by title."""
    out = tmp_path / "tables.json"
    assert main([*arguments, "--quick", "--out", str(out)]) == 0
    return json.loads(out.read_text())["tables"]


def column(rows, name):
    return [row[rows[0].index(name)] for row in rows[1:]]


def test_list(capsys):
    assert main(["--list"]) == 0
    text = capsys.readouterr().out
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no GPU"):
            main(["gpu"])
    for name in ("compare", "gpu", "training_memory", "cached", "small", "start", "files", "soak", "against"):
        assert f"python -m benchmarks {name}" in text


def test_the_forms_compute_the_same():
    wanted = forms.scorer("plain fp32", TOY)()
    for form in CPU_FORMS[1:]:
        tolerance = {"rtol": 0.1, "atol": 0.1} if "bf16" in form else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(forms.scorer(form, TOY)(), wanted, **tolerance)


def test_on_a_gpu_as_far_as_a_cpu_can_trace_it(tmp_path, capsys):
    found = tables(tmp_path, "gpu", "--gpu", "cpu")
    assert set(found) == {"Scoring on a GPU", "Training on a GPU"}
    assert "--mode-sr colorization step, stage 0, 6 of 64 x 64" in column(found["Training on a GPU"], "")
    assert all(float(seconds) > 0 for rows in found.values() for seconds in column(rows, "seconds"))
    assert "**Scoring on a GPU**" in capsys.readouterr().out


def test_memory_of_a_step(tmp_path):
    rows = tables(tmp_path, "training_memory", "--only", "as it is")["Memory of end-to-end training"]
    assert [row[1] for row in rows[1:]] == ["as it is"] and float(rows[1][2]) > 0.1


def test_a_program_is_measured_alone():
    assert 0.1 < measure.program("-c 'import time; a = bytes(range(256)) * 2**19; time.sleep(0.2)'").gib < 0.2
    assert measure.ratio([2.0, 3.0, 4.0], [1.0, 1.0, 1.0]) == "3.00 [2.50, 3.50]" and measure.median(None) == "-"
    with pytest.raises(UserError, match="status 3"):
        measure.program("-c 'raise SystemExit(3)'")


def test_many_files(tmp_path):
    rows = tables(tmp_path, "files")["Very many files"]
    assert column(rows, "") == ["started", "killed and started again"] * 2
    assert all(float(seconds) > 0 for seconds in column(rows, "seconds to the first row"))


def test_against_another_checkout(tmp_path):
    os.symlink(measure.ROOT, tmp_path / "other")
    found = tables(tmp_path, "against", str(tmp_path / "other"), "--only", "test.py")
    assert column(found["Against an earlier commit"], "GiB at most")[0] > "0"
    assert [row[:2] for row in found["Against an earlier commit"][1:]] == [
        ["test.py, stage 0", k] for k in ("old", "new")
    ]
    with pytest.raises(UserError, match="no other checkout"):
        main(["against", str(tmp_path)])
