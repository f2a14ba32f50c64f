"""Tests of programs that run in several processes, such as with torchrun."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from files import expect_user_error
from processes import ROOT
from trainings import COMMON

from utils import console
from utils.distributed import World, read_rank_and_world_size
from utils.errors import UserError, run_program

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def set_torchrun_variables(monkeypatch, text):
    """Replace the environment variables of torchrun by the variables in `text`, such as "RANK=1 WORLD_SIZE=2"."""
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    for word in text.split():
        monkeypatch.setenv(*word.split("="))


@pytest.mark.parametrize(
    "text",
    [
        "RANK=1",
        "RANK=0",
        "WORLD_SIZE=2",
        "RANK=a WORLD_SIZE=2",
        "RANK=-1 WORLD_SIZE=2",
        "RANK=2 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=29500",
        "RANK=0 WORLD_SIZE=0",
        "RANK=0 WORLD_SIZE=2 MASTER_ADDR=localhost",
        "RANK=0 WORLD_SIZE=2",
    ],
)
def test_inconsistent_environment_variables_of_torchrun_are_refused(monkeypatch, text):
    set_torchrun_variables(monkeypatch, text)
    with expect_user_error("RANK", "WORLD_SIZE", *text.split()):
        read_rank_and_world_size()


@pytest.mark.parametrize(
    ("text", "world"),
    [
        ("", World(0, 1)),
        ("RANK=0 WORLD_SIZE=1", World(0, 1)),
        ("RANK=1 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=29500", World(1, 2)),
    ],
)
def test_rank_and_world_size_are_read_from_the_environment_variables_of_torchrun(monkeypatch, text, world):
    set_torchrun_variables(monkeypatch, text)
    assert read_rank_and_world_size() == world


@pytest.mark.parametrize("program", ["test.py", "train_detector.py", "train_sr.py"])
def test_a_program_with_a_rank_but_no_world_size_ends_with_an_error(program):
    command = [sys.executable, str(ROOT / program), "--gpu", "cpu"]
    run = subprocess.run(command, env={**os.environ, "RANK": "1"}, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2 and run.stdout == ""
    assert len(run.stderr.splitlines()) == 1 and "WORLD_SIZE" in run.stderr


def test_a_process_with_rank_1_waits_before_it_prints_an_error_and_rank_0_does_not(monkeypatch, capfd):
    """Torchrun ends the waiting process with rank 1, so an error of both processes is printed only once."""
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)

    def raise_user_error():
        raise UserError("raised on purpose by this test")

    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert run_program(raise_user_error) == 2
    assert waits == [console.MISTAKE_DELAY]
    assert capfd.readouterr().err.splitlines() == ["error: raised on purpose by this test"] * 2


def test_an_error_in_both_processes_of_torchrun_is_printed_once(tmp_path):
    command = [*TORCHRUN, str(ROOT / "test.py"), "--gpu", "cpu", "--resume", "absent.pth.tar", "--input", "x.png"]
    command += ["--save_path", "scores"]
    (tmp_path / "x.png").touch()
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=180)
    lines = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert run.returncode != 0 and len(lines) == 1 and "absent.pth.tar" in lines[0]


def test_two_torchrun_processes_train_until_sigterm_and_write_the_same_scores_as_one_process(training_files, tmp_path):
    train = [str(ROOT / "train_detector.py"), *COMMON.split(), "--arch", "resnet18", "--no_dilation", "--fixed-sr"]
    train += [
        "--data-root-pos",
        str(training_files / "real"),
        "--data-root-neg",
        str(training_files / "fake"),
        "--no-cache",
    ]
    train += ["--sr-weights-file", str(training_files / "rdn.pth"), "--output-path", str(tmp_path), "--batch-size", "4"]
    process = subprocess.Popen([*TORCHRUN, *train, "--epochs", "10000"], stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("0001.pth.tar")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert "stopped by SIGTERM; the progress in its output files is saved: to continue, start it again" in err
    state = torch.load(tmp_path / "last.pth.tar", weights_only=True)
    assert state["progress"]["total_steps"] >= 3
    score = [str(ROOT / "test.py"), "--gpu", "cpu", "--workers", "0", "--resume", str(tmp_path / "last.pth.tar")]
    score += [
        "--data-root-pos",
        str(training_files / "real"),
        "--data-root-neg",
        str(training_files / "fake"),
        "--save_path",
    ]
    for launcher, name in (([sys.executable], "one"), (TORCHRUN, "two")):
        run = subprocess.run([*launcher, *score, str(tmp_path / name)], capture_output=True, text=True, timeout=180)
        assert run.returncode == 0, run.stderr
    assert (tmp_path / "two.csv").read_text() == (tmp_path / "one.csv").read_text()
