"""The ground floor: how programs end, one or several processes, files written whole, what is computed with."""

import itertools
import logging
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from files import mistake

from utils.compute import choose_compute
from utils.console import printable, progress, text_table
from utils.errors import UserError, run_program
from utils.files import atomic, make_folder, remove_unfinished, write_json
from utils.random_streams import seeded_generator
from utils.signals import Stopped, StopSignal

ROOT = Path(__file__).parents[1]

@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UserError("got\nthis\x1b"), "got this\\x1b"),
        (OSError(28, "No space left on device", "here"), "here"),
        (PermissionError(13, "Permission denied", "there"), "there"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried."), "--batch-size"),
        (RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed."), "--workers"),
    ],
)
def test_mistakes_are_one_line_and_status_2(error, said, capfd):
    assert run_program(lambda: (_ for _ in ()).throw(error)) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and said in lines[0]


def test_errors_of_the_program_are_not_hidden():
    with pytest.raises(ZeroDivisionError):
        run_program(lambda: 1 / 0)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_only_a_second_ctrl_c_stops_at_once(second):
    """torchrun hands a second SIGTERM on, which must not cost the state."""

    def main():
        with StopSignal() as stop:
            os.kill(os.getpid(), second)
            os.kill(os.getpid(), second)
            raise Stopped(stop.received)

    assert run_program(main) == 128 + second
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(KeyError), atomic(path) as file:
        file.write(b"half")
        raise KeyError
    assert path.read_text() == '{\n  "a": 1\n}\n' and os.listdir(tmp_path) == ["a.json"]
    mask = os.umask(0o027)
    try:
        write_json(path, {})
    finally:
        os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o640


def test_only_torn_files_are_removed(tmp_path):
    kept = {"last.pth", ".p.csv.0-of-1.part", "visible.tmp"}
    for name in (*kept, ".last.pth.tar.12.tmp", ".epoch_3.pth.345.tmp"):
        (tmp_path / name).touch()
    remove_unfinished(tmp_path, age=60)
    assert len(os.listdir(tmp_path)) == 5
    remove_unfinished(tmp_path)
    assert set(os.listdir(tmp_path)) == kept


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch, caplog):
    monkeypatch.setattr("utils.console.LOG_SECONDS", 0.05)
    caplog.set_level(logging.INFO)
    for _ in progress(range(12), "epoch 3"):
        time.sleep(0.02)
    with progress(None, "scoring", total=900, unit="images") as bar:
        time.sleep(0.1)
        bar.update(200)
    assert 2 <= len(caplog.messages) <= 7
    assert "epoch 3: " in caplog.messages[0] and "of 12" in caplog.messages[0]
    assert "scoring: 200 of 900" in caplog.messages[-1]


def test_chance_is_keyed():
    draws = {seeded_generator(*key).random() for key in itertools.product(range(3), repeat=3)}
    assert len(draws) == 27 and seeded_generator(1, 2).random() == seeded_generator(1, 2).random()


def test_names_and_tables_for_a_terminal():
    assert printable("größe\n\udcff\x1b[0m") == "größe\\n\\udcff\\x1b[0m"
    assert text_table([["a", "n"], ["bcd{}", "10"]]) == "a       n\nbcd{}  10"


@pytest.mark.parametrize("deterministic", [True, False])
def test_what_is_computed_with_is_what_was_asked_for(deterministic):
    try:
        compute = choose_compute("cpu", "auto", deterministic, seed=1)
        assert str(compute) == "fp32 on cpu" and torch.initial_seed() == 1
        assert torch.are_deterministic_algorithms_enabled() == torch.backends.cudnn.deterministic == deterministic
        assert torch.backends.cudnn.benchmark != deterministic and not torch.backends.cudnn.allow_tf32
        x = compute.input(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8))
        assert x.dtype == torch.float32 and x.max() == 1 and x.is_contiguous(memory_format=torch.channels_last)
        with choose_compute("cpu", "bf16", deterministic, seed=1).autocast():
            assert (torch.ones(1, 1) @ torch.ones(1, 1)).dtype == torch.bfloat16
    finally:
        choose_compute("cpu", "auto", False, seed=0)
    with mistake("tf32"):
        choose_compute("cpu", "tf32", False, seed=0)


def test_a_folder_that_cannot_be_written_to_is_said(tmp_path):
    (tmp_path / "file").touch()
    with mistake("cannot write", "below"):
        make_folder(tmp_path / "file" / "below")
