"""Programs in processes of their own, forked from a process that has imported PyTorch, and accidents that happen to them."""

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
SMALL = {"resnet18": (1, 1, 1, 1)}  # half the depth: writing the weights takes most of the time of a tiny training
SERVER = multiprocessing.get_context("forkserver")  # its children inherit no threads
SERVER.set_forkserver_preload(["train_sr", "train_detector", "test"])


def start(
    program: str, arguments: list[str], log: Path, prepare: Callable[[], None] | None = None, **environment: str
) -> multiprocessing.Process:
    """Start `python PROGRAM ARGUMENTS >> LOG 2>&1` with one thread.

    Args:
        program: such as "train_sr.py".
        arguments: its command line.
        log: the file for its output.
        prepare: called first, in the new process; a function of a module, or a partial of one.
        environment: further environment variables.
    """
    process = SERVER.Process(target=_run, args=(program, arguments, log, prepare, environment))
    process.start()
    return process


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


def finish(process: multiprocessing.Process, seconds: float = 120) -> int:
    """Wait for a process. Returns its exit status, which is -N if signal N killed it."""
    process.join(seconds)
    if process.is_alive():
        process.kill()
        raise AssertionError(f"still running after {seconds} s")
    return process.exitcode


def two_ranks() -> list[dict[str, str]]:
    """Return the environment variables that torchrun sets in each of two processes."""
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **shared} for rank in range(2)]


@contextlib.contextmanager
def killed_exclusive_writer(lock: Path) -> Iterator[Callable[[], None]]:
    """Run a process that holds a lock file. Yields a function that kills the process, but not its worker."""
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
    with exclusive_writer(lock, World()):
        worker = os.fork()
        if worker:
            connection.send(worker)
        time.sleep(60)


# --- accidents, as `prepare` --------------------------------------------------------------------------------


def signal_in(description: str, at: int, number: int, all_processes: bool = False) -> None:
    """Send signal `number` to the program while it works on item `at` (from 1) of the loop with this description.

    Args:
        description: beginning of the text that the loop's progress bar shows, such as "epoch".
        at: the number of the item, counted over all such loops.
        number: the signal.
        all_processes: send it to the program's workers, too, and give them time to end.
    """
    original, count = console.progress, itertools.count(1)
    os.setpgid(0, 0)

    def progress(items, text, *more):
        for item in original(items, text, *more):
            if text.startswith(description) and next(count) == at:
                if all_processes:
                    os.killpg(0, number)
                    time.sleep(0.3)
                else:
                    os.kill(os.getpid(), number)
            yield item

    console.progress = progress


def slow_down(description: str, seconds: float) -> None:
    """Let the loop with this description pause before its first item."""
    original = console.progress

    def progress(items, text, *more):
        if text.startswith(description):
            time.sleep(seconds)
        return original(items, text, *more)

    console.progress = progress


def kill_in_save(save: int) -> None:
    """Kill the program in the middle of writing checkpoint number `save` (from 1)."""
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
    """Send signal `number` to test.py when it computes batch `batch` (from 1), before the rows are written."""
    original, count = scoring.Detector.logits, itertools.count(1)

    def logits(self, *arguments):
        if next(count) == batch:
            os.kill(os.getpid(), number)
        return original(self, *arguments)

    scoring.Detector.logits = logits
