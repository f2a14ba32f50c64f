"""Files that are written whole or not at all, and folders that only one run writes to."""

import contextlib
import fcntl
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from utils.console import printable
from utils.distributed import World, broadcast_from_main
from utils.errors import UserError

logger = logging.getLogger(__name__)

TEMPORARY = ".tmp"  # what a file being written ends in; its name begins with a dot and the name it will get


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


def remove_unfinished(folder: Path, age: float = 0) -> None:
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
        raise UserError(f"cannot write to the output folder {printable(path)} ({error.strerror})") from None
    return Path(path)


@contextlib.contextmanager
def exclusive_writer(lock: Path, world: World) -> Iterator[None]:
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
        if not broadcast_from_main(free, world):
            raise UserError(f"another run is writing here ({lock}): let it end, or write elsewhere")
        try:
            yield
        finally:
            if world.is_main:
                lock.unlink(missing_ok=True)
