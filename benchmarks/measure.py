"""What the benchmarks share: taking turns, programs in processes of their own, what they are given."""

import os
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from models.build import new_detector
from models.rdn import RDN
from utils.checkpoints import Checkpoint
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
OPEN_FILES = 1024  # at a time: the limit most Linux systems set
PAPER = {}  # arguments of RDN
SMALL = {"num_features": 16, "growth_rate": 16, "num_blocks": 3, "num_layers": 3}  # of script/quickstart.sh
TINY = {"num_features": 4, "growth_rate": 4, "num_blocks": 1, "num_layers": 2}
Tables = dict[str, list[list[str]]]  # by title; the first row is the header


def in_turn(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, once in every round, so that whatever else the machine does falls on all of them alike."""
    times = {name: [] for name in contestants}
    for name, run in [*contestants.items()] * rounds:
        began = time.perf_counter()
        run()
        times[name].append(time.perf_counter() - began)
    return times


def median(values: list[float] | None) -> str:
    return f"{np.median(values):.3g}" if values else "-"


def ratio(values: list[float] | None, others: list[float] | None) -> str:
    """values / others, round by round: the median, and in brackets the quartiles. "-" where one is missing."""
    if not values or not others:
        return "-"
    low, middle, high = np.quantile(np.array(values) / np.array(others), [0.25, 0.5, 0.75])
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


# What a program took: processor time is of all its processes, memory (at most) of the main one
Usage = namedtuple("Usage", ["seconds", "cpu_seconds", "gib"])


def peak(pid: int) -> float:
    """GiB resident of a process, the most there has been (Linux). 0: it has just ended."""
    with suppress(OSError, ValueError):
        fields = Path(f"/proc/{pid}/status").read_text().split()
        return int(fields[fields.index("VmHWM:") + 1]) / 2**20
    return 0.0


@contextmanager
def started(command: str, folder: Path = ROOT, status: int = 0) -> Iterator[subprocess.Popen]:
    """`python COMMAND` in a checkout, killed where the `with` block ends before it. Raises UserError if it fails."""
    with tempfile.TemporaryFile() as log:
        words = [sys.executable, *shlex.split(command)]
        run = subprocess.Popen(words, cwd=folder, stdout=log, stderr=log, start_new_session=True)
        resource.prlimit(run.pid, resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))
        try:
            yield run
        finally:
            ended = run.poll()
            with suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)
            run.wait()
        if ended not in (None, status):
            log.seek(0)
            raise UserError(f"{command[:200]} in {folder} ended with status {ended}: {log.read().decode()[-2000:]}")


def program(command: str, folder: Path = ROOT, status: int = 0) -> Usage:
    """`python COMMAND` in a checkout, from start to end."""
    gib, pid = 0.0, 0
    with started(command, folder, status) as run:
        began = time.perf_counter()
        while not pid:
            gib = max(gib, peak(run.pid))  # ru_maxrss would be of this process, too, if it is larger
            time.sleep(0.01)
            pid, code, usage = os.wait4(run.pid, os.WNOHANG)
        run.returncode = os.waitstatus_to_exitcode(code)
        return Usage(time.perf_counter() - began, usage.ru_utime + usage.ru_stime, gib)


def saved(path: Path, shape: dict, arch: str, stage: int = 0) -> Path:
    """A detector with random weights (neither time nor memory depends on them), as train_detector.py writes it."""
    torch.manual_seed(0)
    rdn = Checkpoint(RDN(**shape).state_dict(), "new")
    detector, config = new_detector(rdn, {"arch": arch, "stage": stage, "dilated": False}, "random")
    calm(detector.classifier.state_dict())
    weights = {"state_dict": detector.classifier.state_dict(), "sr_state_dict": detector.resynthesizer.state_dict()}
    torch.save({"arch": arch, "config": config, **weights}, path)
    return path


def calm(classifier: dict[str, torch.Tensor]) -> None:
    """Small weights of batch norms, in place: without them gradients of a new network on two images have no bounds."""
    for values in (v for name, v in classifier.items() if name.endswith("weight") and v.dim() == 1):
        values.fill_(0.01)


def noise(folder: Path, count: int, side: int) -> Path:
    """A new folder of images of coarse noise, PNG, about as large as photographs of their size."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng([side, *folder.name.encode()])
    for i in range(count):
        pixels = Image.fromarray(rng.integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8))
        pixels.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{i:06d}.png", compress_level=1)
    return folder
