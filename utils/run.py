"""The ground floor, which all rooms stand on: mistakes, starting and stopping, files written whole, random generators, tables."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import TextIOBase
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from utils.distributed import World, from_main
from utils.options import MISTAKE_DELAY, is_main_process

logger = logging.getLogger(__name__)

FAKE, REAL = 0, 1  # labels, and columns of the logits. Release: real is 1; most of the field calls fake 1.
LABEL_NAMES = ("fake", "real")

EXIT_MISTAKE = 2
TEMPORARY = ".tmp"  # what a file being written ends in; its name begins with a dot and the name it will get
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)  # what files may meet with
PEER_IS_GONE = ("closed by peer", "Connection reset", "Connection closed", "NCCL")
LOG_SECONDS = 120  # between two lines of progress where there is no terminal


class UserError(ValueError):
    """What a user can mend: one line with what was got, what was wanted, the way out."""


class Stopped(Exception):
    """The run was asked to stop by a signal and has saved its state."""

    def __init__(self, signal_number: int):
        super().__init__(signal.Signals(signal_number).name)
        self.exit_status = 128 + signal_number


# --- programs: how they start and end -----------------------------------------------------------------------


def run_program(main: Callable[[], int | None]) -> int:
    """Run `main` and give its exit status: 0, 2 after one line for a user's mistake, 130 / 143 when stopped."""
    level = logging.INFO if is_main_process() else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr, force=True)
    logging.captureWarnings(True)
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack the letters of a file's name
    try:
        return main() or 0
    except Stopped as stopped:
        logger.warning("stopped by %s; the state so far is saved", stopped)
        return stopped.exit_status
    except KeyboardInterrupt:
        logger.warning("interrupted")
        return 128 + signal.SIGINT
    except Exception as error:
        text = _mistake(error)
        if text is None:
            raise
        if not is_main_process():
            time.sleep(MISTAKE_DELAY)  # where the main process says the same, this one is ended meanwhile
        logger.error("error: %s", shown(" ".join(text.split())))
        return EXIT_MISTAKE


def _mistake(error: Exception) -> str | None:
    """One line for an error that a user can do something about; None for one of the program's own."""
    text = str(error)
    if isinstance(error, UserError):
        return text
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        what = f"{error.filename or 'a file'} ({error.strerror})"
        return f"cannot read or write {what}; what was saved before is untouched"
    if isinstance(error, torch.OutOfMemoryError):
        return f"{text.splitlines()[0]} Use a smaller --batch-size, --crop-size or --micro-batch, or --precision bf16"
    if isinstance(error, RuntimeError) and text.startswith("DataLoader worker"):
        return f"{text} If memory was short, use fewer --workers"
    if isinstance(error, RuntimeError) and any(words in text for words in PEER_IS_GONE):
        return "another process of this run has ended; it says why"
    return None


class StopSignal:
    """Remembers SIGINT and SIGTERM while the `with` block runs, so that what is being done is finished and saved.

    Only a second Ctrl-C stops at once: SIGTERM comes twice where torchrun hands it on.
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
        if self.received == signal.SIGINT == number:
            raise KeyboardInterrupt
        if self.received is None:
            logger.warning("got %s: finishing this step, then saving", signal.Signals(number).name)
        self.received = self.received or number


class _Log(TextIOBase):
    """What is written here is a line in the log."""

    def write(self, text: str) -> int:
        if line := text.strip():
            logger.info("%s", line)
        return len(text)


def progress(items: Iterable | None, what: str, total: int | None = None, **about) -> tqdm:
    """`items` with a bar on a terminal; elsewhere with a line in the log every LOG_SECONDS.

    For anything but one a step, give `items=None` and call `.update(n)`. about: more for tqdm, such as `unit`.
    """
    if not sys.stderr.isatty():
        about |= {"file": _Log(), "bar_format": "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, {remaining} left"}
        about |= {"miniters": 1, **dict.fromkeys(("delay", "mininterval", "maxinterval"), LOG_SECONDS)}
    return tqdm(items, what, total, leave=False, disable=not is_main_process(), **about)


# --- where and how networks compute -------------------------------------------------------------------------


class Compute(NamedTuple):
    """The device networks run on, and the number format of their arithmetic."""

    device: torch.device
    precision: str

    def __str__(self) -> str:
        return f"{self.precision} on {self.device.type}"

    def input(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) of 0..255 -> float32 in [0, 1], on the device, channels-last."""
        x = images.to(self.device, non_blocking=True).to(torch.float32) / 255
        return x.contiguous(memory_format=torch.channels_last)

    def autocast(self) -> torch.autocast:
        """The context in which networks run."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)


def choose_compute(gpu: str | None, precision: str, deterministic: bool, seed: int | None = None) -> Compute:
    """The device for `--gpu`, and PyTorch set (for the whole process) to what precision, `deterministic` and seed ask for.

    auto: on CUDA TF32, as the release ran (PyTorch's default for convolutions), on a CPU float32. fp32 is float32 to
    the last bit. Unless `deterministic`, cuDNN measures which of its algorithms is the fastest for each shape.
    """
    device = choose_device(gpu)
    if seed is not None:
        torch.manual_seed(seed)
    if precision == "auto":
        precision = "tf32" if device.type == "cuda" else "fp32"
    if precision == "tf32" and device.type == "cpu":
        raise UserError("--precision tf32 is a format of GPUs: use fp32 or bf16 on a CPU")
    if deterministic != torch.are_deterministic_algorithms_enabled():  # a call takes 1.5 s of imports
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS has no reproducible way
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return Compute(device, precision)


def choose_device(gpu: str | None) -> torch.device:
    """The device for `--gpu` ("cpu", a number, or None for the first GPU there is), made CUDA's current one.

    Raises:
        UserError: for a GPU this machine lacks although it has others, or a word that is neither.
    """
    if gpu not in (None, "cpu") and not gpu.isdecimal():
        raise UserError(f"--gpu {gpu}: a number or cpu was wanted")
    available = torch.cuda.device_count() if gpu != "cpu" and torch.cuda.is_available() else 0
    if not available:
        if gpu is None:
            logger.info("no GPU on this machine: using the CPU")
        elif gpu != "cpu" and is_main_process():
            logger.warning("warning: GPU %s was asked for and this machine has none: using the CPU", gpu)
        return torch.device("cpu")
    number = int(os.environ.get("LOCAL_RANK", gpu or 0))  # of several processes each has its own
    if number >= available:
        raise UserError(f"--gpu {number}: this machine has GPU 0..{available - 1}; choose one of these or cpu")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def keyed_generator(*key: int) -> np.random.Generator:
    """A generator that depends on nothing but the numbers given (>= 0), such as (seed, epoch, image).

    All that the programs draw comes from such a one; only initial weights come from torch's own, seeded once.
    """
    return np.random.default_rng((len(key), *key))  # NumPy takes (1, 2) and (1, 2, 0) for the same


# Last numbers of keys: what is drawn for the same seed, epoch and image or step by one has nothing to do with another.
PERTURB, CROP, DEGRADE_BATCH, DEGRADE_IMAGE = 1, 2, 4, 5  # of (seed, epoch, image), but DEGRADE_BATCH: of (.., step)
DEGRADE_PATCH = 1  # of (seed, epoch, image, patch)


# --- files and texts ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A binary file to write to; `path` then holds either its old content or the whole new one, whatever happens."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_torn(folder: Path, age: float = 0) -> None:
    """Delete what a process killed in `atomic` left behind. age: seconds for which nobody has written to it."""
    for path in folder.glob(f".*{TEMPORARY}"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime >= age:
                path.unlink()


def write_json(path: Path, obj: dict) -> None:
    """Write JSON, whole or not at all."""
    with atomic(path) as file:
        file.write((json.dumps(obj, indent=2, sort_keys=True, allow_nan=False) + "\n").encode())


def make_folder(path: str | os.PathLike) -> Path:
    """Make the folder with its parents, and prove that files can be written there before any work starts.

    Raises:
        UserError: if that cannot be.
    """
    try:
        os.makedirs(path, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(f"cannot write to the output folder {shown(path)} ({error.strerror})") from None
    return Path(path)


@contextlib.contextmanager
def sole_writer(lock: Path, world: World) -> Iterator[None]:
    """While this `with` block runs, no other run enters one with the same file, which is there meanwhile.

    The main process holds it, and all enter or none. A process that dies lets go of it, and its workers do not keep
    it: fork hands on locks of flock, not of lockf. Where nothing can be locked, that is a warning, and taken as done.

    Raises:
        UserError: if another run is in there.
    """
    with lock.open("a") if world.is_main else contextlib.nullcontext() as file:
        free = True
        try:
            if world.is_main:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            free = False
        except OSError as error:
            logger.warning("warning: no locks for %s (%s): see that no other run writes there", lock, error)
        if not from_main(free, world):
            raise UserError(f"another run is writing here ({lock}): let it end, or write elsewhere")
        try:
            yield
        finally:
            if world.is_main:
                lock.unlink(missing_ok=True)


def shown(text: str | os.PathLike) -> str:
    """A path or text on one line of any terminal: control characters and lone surrogates as escapes."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in os.fspath(text)
    )


def text_table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Rows of cells as lines with aligned columns: the first `left` flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    form = "  ".join(f"{{:{'<' if i < left else '>'}{width}}}" for i, width in enumerate(widths))
    return "\n".join(form.format(*row).rstrip() for row in rows)


def versions() -> dict[str, str]:
    """What the numbers of a run depend on, for its records."""
    from importlib.metadata import version  # importing torchvision would take seconds

    own = {"python": sys.version.split()[0], "torch": torch.__version__}
    return own | {name: version(name) for name in ("torchvision", "numpy", "pillow")}
