"""Start train_sr.py, train_detector.py or test.py in new processes, and interrupt or kill them at chosen moments.

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
SMALL = {"resnet18": (1, 1, 1, 1)}  # number of blocks in each of the four layers of a smaller resnet18
SERVER = multiprocessing.get_context("forkserver")  # forking the test process would be unsafe, because it has threads
SERVER.set_forkserver_preload(["train_sr", "train_detector", "test"])


def start_program(
    program: str, arguments: list[str], log: Path, prepare: Callable[[], None] | None = None, **environment: str
) -> multiprocessing.Process:
    """Start a program such as "train_sr.py" in a new process, which appends its output to a log file.

    Args:
        prepare: picklable function that the new process calls before the program starts.
        environment: additional environment variables of the new process.
    """
    process = SERVER.Process(target=_run_program, args=(program, arguments, log, prepare, environment))
    process.start()
    return process


def _run_program(program, arguments, log, prepare, environment):
    """Run a program in the current process."""
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


def wait_for_exit(process: multiprocessing.Process, seconds: float = 120) -> int:
    """Wait until a process ends, and return its exit status, which is -N if signal N killed the process."""
    process.join(seconds)
    if process.is_alive():
        process.kill()
        raise AssertionError(f"still running after {seconds} s")
    return process.exitcode


def make_environments_of_two_torchrun_processes() -> list[dict[str, str]]:
    """Return two dicts with the environment variables that torchrun sets in two processes, one dict per process."""
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **shared} for rank in range(2)]


@contextlib.contextmanager
def hold_lock_in_process(lock: Path) -> Iterator[Callable[[], None]]:
    """Start a process that locks a file and then starts a worker process.

    Yields a function that kills the process that has locked the file, but not the worker process.
    """
    ours, theirs = SERVER.Pipe()
    process = SERVER.Process(target=_hold_lock_in_process_and_worker, args=(lock, theirs))
    process.start()
    worker = ours.recv()

    def kill_lock_holder():
        process.kill()
        process.join()

    try:
        yield kill_lock_holder
    finally:
        kill_lock_holder()
        os.kill(worker, signal.SIGKILL)


def _hold_lock_in_process_and_worker(lock, connection):
    """Lock a file in this process, fork a worker process, and let both processes sleep for 60 s."""
    with hold_lock_file(lock, World()):
        worker = os.fork()
        if worker:
            connection.send(worker)
        time.sleep(60)


# --- functions for the `prepare` argument of `start_program` ------------------------------------------------------


def patch_progress_bar_to_send_signal(description: str, at: int, number: int, all_processes: bool = False) -> None:
    """Make a program send itself a signal before a chosen iteration of a loop with a progress bar.

    Args:
        description: beginning of the text beside the progress bar, such as "epoch".
        at: number of the iteration, counted from 1 over all loops whose text begins with `description`.
        number: number of the signal, such as 9 for SIGKILL.
        all_processes: if True, the worker processes of the program also get the signal.
    """
    original, count = console.progress_bar, itertools.count(1)
    os.setpgid(0, 0)

    def yield_items_and_signal_this_process(items, text, *more):
        for item in original(items, text, *more):
            if text.startswith(description) and next(count) == at:
                if all_processes:
                    os.killpg(0, number)
                    time.sleep(0.3)
                else:
                    os.kill(os.getpid(), number)
            yield item

    console.progress_bar = yield_items_and_signal_this_process


def patch_progress_bar_to_sleep_first(description: str, seconds: float) -> None:
    """Make the program sleep before each loop whose progress bar has a text that begins with `description`."""
    original = console.progress_bar

    def sleep_and_create_progress_bar(items, text, *more):
        if text.startswith(description):
            time.sleep(seconds)
        return original(items, text, *more)

    console.progress_bar = sleep_and_create_progress_bar


def patch_checkpoint_saving_to_kill_program(save: int) -> None:
    """Make the program truncate checkpoint number `save`, counted from 1, and then kill itself with SIGKILL."""
    original, count = torch.save, itertools.count(1)

    def truncate_file_and_kill_process(file):
        os.ftruncate(file, os.fstat(file).st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    def save_then_make_fsync_kill_process(content, file):
        original(content, file)
        if next(count) == save:
            os.fsync = truncate_file_and_kill_process

    torch.save = save_then_make_fsync_kill_process


def patch_test_py_to_send_signal_before_batch(batch: int, number: int) -> None:
    """Make test.py send itself the signal `number` before it scores the batch `batch`, counted from 1."""
    original, count = scoring.Detector.logits, itertools.count(1)

    def send_signal_and_compute_logits(self, *arguments):
        if next(count) == batch:
            os.kill(os.getpid(), number)
        return original(self, *arguments)

    scoring.Detector.logits = send_signal_and_compute_logits
