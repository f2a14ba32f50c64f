"""Programs in processes of their own, without waiting in each for torch to be imported: forked from one that has it."""

import contextlib
import itertools
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from evaluation import detector as scoring
from models.resnet import LAYOUTS
from utils import console
from utils.distributed import World
from utils.files import exclusive_writer

ROOT = Path(__file__).parents[1]
SMALL = {"resnet18": (1, 1, 1, 1)}  # half the weights: most of a tiny training's time is writing them
SERVER = multiprocessing.get_context("forkserver")  # not fork: these have no threads or GPU to be confused about
SERVER.set_forkserver_preload(["train_sr", "train_detector", "test"])


def start(
    program: str, arguments: list[str], log: Path, prepare: Callable[[], None] | None = None, **environment: str
) -> multiprocessing.Process:
    """`python PROGRAM ARGUMENTS > LOG 2>&1`, one thread. `prepare` (of a module, or partial of one) is called first."""
    process = SERVER.Process(target=_run, args=(program, arguments, log, prepare, environment))
    process.start()
    return process


def finish(process: multiprocessing.Process, seconds: float = 60) -> int:
    """The exit status, as `subprocess` gives it."""
    process.join(seconds)
    if process.is_alive():
        process.kill()
        raise AssertionError(f"still running after {seconds} s")
    return process.exitcode


def two_ranks() -> list[dict[str, str]]:
    """What torchrun tells each of two processes, in its environment."""
    with socket.create_server(("localhost", 0)) as free:
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **address} for rank in range(2)]


def signal_in_batch(batch: int, number: int) -> None:
    """test.py gets signal `number` when it has computed its batch `batch` (from 1), before the rows are written."""
    real, count = scoring.Detector.score, itertools.count(1)

    def score(self, *arguments):
        if next(count) == batch:
            os.kill(os.getpid(), number)
        return real(self, *arguments)

    scoring.Detector.score = score


def _run(program, arguments, log, prepare, environment):
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    LAYOUTS.update(SMALL)
    sys.argv = [program, *arguments]
    if prepare:
        prepare()
    runpy.run_path(str(ROOT / program), run_name="__main__")


@contextlib.contextmanager
def killed_exclusive_writer(lock: Path) -> Iterator[Callable[[], None]]:
    """A process is where only one may write. The function given kills it, but not its worker, which lives on."""
    ours, its = SERVER.Pipe()
    process = SERVER.Process(target=_write_alone, args=(lock, its))
    process.start()
    worker = ours.recv()

    def kill():
        process.kill()
        process.join()

    try:
        yield kill
    finally:
        kill()
        os.kill(worker, signal.SIGKILL)


def _write_alone(lock, connection):
    with exclusive_writer(lock, World()):
        if worker := os.fork():
            connection.send(worker)
        time.sleep(60)


# --- what may happen to a program, as `prepare` ---------------------------------------------------------------


def signal_in(what: str, at: int, number: int, all_processes: bool = False) -> None:
    """The program gets signal `number` while it works on item `at` (from 1) of what its bar calls `what`...

    all_processes: its workers, too, and they have the time to end of it.
    """
    real, count = console.progress, itertools.count(1)
    os.setpgid(0, 0)

    def progress(items, name, *more):
        for item in real(items, name, *more):
            if name.startswith(what) and next(count) == at:
                os.killpg(0, number) if all_processes else os.kill(os.getpid(), number)
                time.sleep(0.3 * all_processes)
            yield item

    console.progress = progress


def kill_in_save(save: int) -> None:
    """The program is killed in the middle of writing its checkpoint number `save` (from 1)."""
    real, count = torch.save, itertools.count(1)

    def kill(file):
        os.ftruncate(file, os.fstat(file).st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    def torn(obj, file):
        real(obj, file)
        if next(count) == save:
            os.fsync = kill

    torch.save = torn
