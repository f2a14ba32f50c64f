"""What every program does around its work: how it starts, what it records, how it stops."""

import contextlib
import errno
import fcntl
import json
import logging
import math
import os
import random
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from utils.distributed import World, from_main

logger = logging.getLogger(__name__)

EXIT_MISTAKE = 2
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)  # what files may meet with
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class UsageError(ValueError):
    """A user's mistake about options or folders: one line with what was got, what was wanted, the way out."""


class Stopped(Exception):
    """The run was asked to stop by a signal and has saved its state."""

    def __init__(self, signal_number: int):
        super().__init__(signal.Signals(signal_number).name)
        self.exit_status = 128 + signal_number


def run_program(main: Callable[[], int | None], *mistakes: type[Exception]) -> int:
    """Run `main` and give its exit status: 0, 2 after one line for a user's mistake, 130 / 143 when stopped."""
    setup_logging()
    try:
        return main() or 0
    except (UsageError, *mistakes) as error:
        logger.error("error: %s", " ".join(str(error).split()))
        return EXIT_MISTAKE
    except Stopped as stopped:
        logger.warning("stopped by %s; the state so far is saved", stopped)
        return stopped.exit_status
    except KeyboardInterrupt:
        logger.warning("interrupted")
        return 128 + signal.SIGINT
    except OSError as error:  # of the small files (records, tables); those of checkpoints say more
        if error.errno not in NO_ROOM:
            raise
        what = f"{error.filename or 'a file'} ({error.strerror})"
        logger.error("error: cannot read or write %s; what was saved before is untouched", what)
        return EXIT_MISTAKE
    except torch.OutOfMemoryError as error:
        first = str(error).strip().splitlines()[0]
        logger.error("error: %s Use a smaller --batch-size, --crop-size or --micro-batch, or --precision bf16", first)
        return EXIT_MISTAKE
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        reason = " ".join(str(error).split())
        logger.error("error: %s What was saved before is untouched; if memory was short, use fewer --workers", reason)
        return EXIT_MISTAKE


def setup_logging() -> None:
    """One line a message on standard error; only warnings from processes other than the main one."""
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr, force=True)
    logging.captureWarnings(True)


class StopSignal:
    """Remembers SIGINT and SIGTERM while the `with` block runs, so that a step is finished and saved first.

    A second Ctrl-C stops at once.
    """

    def __init__(self):
        self.received: int | None = None

    def __enter__(self) -> "StopSignal":
        self._previous = {s: signal.signal(s, self._receive) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number
        logger.warning("got %s: finishing this step, then saving", signal.Signals(number).name)


def choose_device(gpu: str | None) -> torch.device:
    """The device for `--gpu`: "cpu", a number, or None for the first GPU there is.

    Raises:
        UsageError: for a GPU this machine lacks although it has others, or a word that is neither.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if "LOCAL_RANK" in os.environ and gpu != "cpu" and count:  # torchrun: one GPU a process
        gpu = os.environ["LOCAL_RANK"]
    if gpu is None:
        if count == 0:
            logger.info("no GPU on this machine: using the CPU")
        return torch.device("cuda", 0) if count else torch.device("cpu")
    if gpu == "cpu":
        return torch.device("cpu")
    if not gpu.isdecimal():
        raise UsageError(f"--gpu {gpu}: a number or cpu was wanted")
    if count == 0:
        level = logging.WARNING if os.environ.get("RANK", "0") == "0" else logging.DEBUG  # once, not in each process
        logger.log(level, "warning: GPU %s was asked for and this machine has none: using the CPU", gpu)
        return torch.device("cpu")
    if int(gpu) >= count:
        raise UsageError(f"--gpu {gpu}: this machine has GPU 0..{count - 1}; choose one of these or cpu")
    return torch.device("cuda", int(gpu))


def set_deterministic(seed: int, device: torch.device) -> None:
    """Fix what is random (initial weights) and what is chosen by timing (algorithms) from the seed on.

    The programs draw everything else from generators keyed by seed, epoch and image (`keyed_generator`).
    """
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - libraries may still draw from the legacy generator
    torch.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        # --precision fp32 means float32: TF32 keeps 10 bits of it. Who wants speed asks for bf16.
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False


def keyed_generator(*key: int) -> torch.Generator:
    """A generator that depends on nothing but the numbers given, such as (seed, epoch, image)."""
    state = np.random.SeedSequence(key).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 32 | int(state[1]))


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which networks run with `--precision`."""
    return torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32")


def make_folder(path: str | os.PathLike) -> Path:
    """Make the folder with its parents, and prove that files can be written there before any work starts.

    Raises:
        UsageError: if that cannot be.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UsageError(f"cannot write to the output folder {path} ({error.strerror})") from None
    return path


@contextlib.contextmanager
def sole_writer(lock: Path, world: World) -> Iterator[None]:
    """While this `with` block runs, no other run enters one with the same file, which is there meanwhile.

    The main process holds it, and all enter or none. A process that dies lets go of it, and its workers do not keep
    it: fork hands on locks of flock, not of lockf.

    Raises:
        UsageError: if another run is in there.
    """
    with lock.open("a") if world.is_main else contextlib.nullcontext() as file:
        if not from_main(world.is_main and _locked(file), world):
            raise UsageError(f"another run is writing here ({lock}): let it end, or write elsewhere")
        try:
            yield
        finally:
            if world.is_main:
                lock.unlink(missing_ok=True)


def _locked(file: TextIO) -> bool:
    """Lock it, unless another process has. Where nothing can be locked, that is a warning, and taken as done."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        logger.warning("warning: no locks for %s (%s): see that no other run writes there", file.name, error)
    return True


def write_json(path: Path, obj: dict) -> None:
    """Write JSON, whole or not at all."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(json.dumps(obj, indent=2, sort_keys=True, allow_nan=False) + "\n")
    temporary.replace(path)


def versions() -> dict[str, str]:
    """What the numbers of a run depend on, for its records."""
    import torchvision

    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
    }


def _epoch_of(line: str) -> float:
    """The epoch of a line of stats.jsonl; infinity if it is torn, as a machine that lost power may leave it."""
    try:
        return json.loads(line)["epoch"]
    except (ValueError, KeyError, TypeError):
        return math.inf


class Recorder:
    """The records of a run: config.json, stats.jsonl, TensorBoard, one log line an epoch. Main process only."""

    def __init__(self, folder: Path, about: dict, world: World, first_epoch: int = 0):
        """about: what the run is made of; goes into config.json with the versions it ran on.

        first_epoch: what was recorded of it and later ones, before a stop, is recorded again.
        """
        self.writer = self.stats = None
        if world.is_main:
            write_json(folder / "config.json", {**about, "versions": versions()})
            self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_epoch)
            stats = folder / "stats.jsonl"
            lines = stats.read_text().splitlines(keepends=True) if stats.exists() else []
            kept = stats.with_name(f".{stats.name}.part")
            kept.write_text("".join(line for line in lines if _epoch_of(line) < first_epoch))
            kept.replace(stats)
            self.stats = stats.open("a")

    def epoch(self, epoch: int, values: dict[str, float]) -> None:
        """Record the values of a finished epoch."""
        if self.writer is None:
            return
        finite = {k: v if v is not None and math.isfinite(v) else None for k, v in values.items()}
        self.stats.write(json.dumps({"epoch": epoch, **finite}) + "\n")
        self.stats.flush()
        for name, value in finite.items():
            if value is not None:
                self.writer.add_scalar(name, value, epoch)
        words = (f"{name} {'-' if value is None else f'{value:.4g}'}" for name, value in finite.items())
        logger.info("epoch %d: %s", epoch, "  ".join(words))

    def pictures(self, name: str, images: torch.Tensor, epoch: int) -> None:
        """images: (B, 3, H, W) in [0, 1]."""
        if self.writer is not None and len(images):
            self.writer.add_images(name, images.detach().float().clamp(0, 1).cpu(), epoch)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.stats.close()
