"""Start the programs in separate processes, and interrupt, slow down or kill them at chosen moments.

The processes are forked from a server process that has already imported PyTorch.
"""

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
from utils.files import hold_lock_file

ROOT = Path(__file__).parents[1]
SMALL = {"resnet18": (1, 1, 1, 1)}  # half the depth, because writing weights takes most of the time of a tiny training
SERVER = multiprocessing.get_context("forkserver")  # processes of a fork server inherit no threads
SERVER.set_forkserver_preload(["train_sr", "train_detector", "test"])


def start(
    program: str, arguments: list[str], log: Path, prepare: Callable[[], None] | None = None, **environment: str
) -> multiprocessing.Process:
    """Start `python PROGRAM ARGUMENTS >> LOG 2>&1` with one thread.

    Args:
        program: file name of the program, such as "train_sr.py".
        arguments: command line of the program.
        log: file that the output of the program is appended to.
        prepare: picklable function that the new process calls before the program starts.
        environment: additional environment variables of the new process.
    """
    process = SERVER.Process(target=_run, args=(program, arguments, log, prepare, environment))
    process.start()
    return process


def _run(program, arguments, log, prepare, environment):
    """Run a program in the new process. `start` describes the arguments."""
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


def finish(process: multiprocessing.Process, seconds: float = 120) -> int:
    """Wait for a process. Returns its exit status, which is -N if signal N killed it."""
    process.join(seconds)
    if process.is_alive():
        process.kill()
        raise AssertionError(f"still running after {seconds} s")
    return process.exitcode


def two_ranks() -> list[dict[str, str]]:
    """Return two dicts: the environment variables that torchrun sets in each of two processes."""
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **shared} for rank in range(2)]


@contextlib.contextmanager
def killed_exclusive_writer(lock: Path) -> Iterator[Callable[[], None]]:
    """Run a process that holds a lock file and has a worker process.

    Yields a function that kills the process, but not the worker.
    """
    ours, theirs = SERVER.Pipe()
    process = SERVER.Process(target=_hold_lock, args=(lock, theirs))
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


def _hold_lock(lock, connection):
    """Hold a lock file for 60 s in this process and a worker process. Send the worker's process id."""
    with hold_lock_file(lock, World()):
        worker = os.fork()
        if worker:
            connection.send(worker)
        time.sleep(60)


# --- functions for the `prepare` argument of `start` ---------------------------------------------------------


def signal_in(description: str, at: int, number: int, all_processes: bool = False) -> None:
    """Send a signal to the program while a loop with a progress bar processes item `at`.

    Args:
        description: first word of the text of the loop's progress bar, such as "epoch".
        at: number of the item, from 1, counted over all loops with this description.
        number: number of the signal.
        all_processes: also send the signal to the worker processes, and give them time to end.
    """
    original, count = console.progress_bar, itertools.count(1)
    os.setpgid(0, 0)

    def progress_bar(items, text, *more):
        for item in original(items, text, *more):
            if text.startswith(description) and next(count) == at:
                if all_processes:
                    os.killpg(0, number)
                    time.sleep(0.3)
                else:
                    os.kill(os.getpid(), number)
            yield item

    console.progress_bar = progress_bar


def slow_down(description: str, seconds: float) -> None:
    """Make each loop whose progress bar text begins with `description` wait before the first item."""
    original = console.progress_bar

    def progress_bar(items, text, *more):
        if text.startswith(description):
            time.sleep(seconds)
        return original(items, text, *more)

    console.progress_bar = progress_bar


def kill_in_save(save: int) -> None:
    """Kill the program when half of checkpoint number `save` (from 1) is written."""
    original, count = torch.save, itertools.count(1)

    def kill(file):
        os.ftruncate(file, os.fstat(file).st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    def save_and_kill(content, file):
        original(content, file)
        if next(count) == save:
            os.fsync = kill

    torch.save = save_and_kill


def signal_in_batch(batch: int, number: int) -> None:
    """Send signal `number` to test.py when batch `batch` (from 1) is computed, before its rows are written."""
    original, count = scoring.Detector.logits, itertools.count(1)

    def logits(self, *arguments):
        if next(count) == batch:
            os.kill(os.getpid(), number)
        return original(self, *arguments)

    scoring.Detector.logits = logits
