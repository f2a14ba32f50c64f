"""Functions that write files completely or not at all, and that let only one run write into a folder."""

import contextlib
import fcntl
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from utils.console import make_printable
from utils.distributed import World, broadcast_from_main
from utils.errors import UserError

logger = logging.getLogger(__name__)

# The process with id N writes to the file .NAME.N.tmp, and renames the complete file to NAME
TEMPORARY = re.compile(r"\.(?P<name>.+)\.\d+\.tmp")
LOCK_TEXT = b"beyond-the-spectrum lock\n"


@contextlib.contextmanager
def open_for_atomic_write(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces `path` at the end of the `with` block.

    If the block raises an error or the process is killed, the file at `path` keeps its old content. If `path` is a
    symbolic link, the file to which the link points is replaced.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftover_temporary_files(folder: Path, names: str = ".+", age: float = 0) -> None:
    """Delete the temporary files of `open_for_atomic_write` that a killed process has left in a folder.

    Args:
        names: regular expression for the whole NAME in the name .NAME.N.tmp of a temporary file.
        age: a temporary file is kept if it has changed within this number of seconds.
    """
    for path in folder.glob(".*.tmp"):
        match = TEMPORARY.fullmatch(path.name)
        if match and re.fullmatch(names, match["name"]):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime >= age:
                    path.unlink()


def choose_unique_names(paths: Sequence[str | os.PathLike]) -> list[str]:
    """Return the last N components of each path as its name, such as "run1/stylegan" for N = 2.

    N is the smallest number with which different paths get different names.
    """
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    length = 1
    while len({p[-length:] for p in parts}) < len(set(parts)):
        length += 1
    return ["/".join(p[-length:]) for p in parts]


def write_json(path: Path, obj: dict) -> None:
    """Write a JSON file completely or not at all."""
    text = json.dumps(obj, indent=2, sort_keys=True, allow_nan=False) + "\n"
    with open_for_atomic_write(path) as file:
        file.write(text.encode())


def require_new_or_marked_file(path: Path, mark: bytes) -> None:
    """Raise a UserError if something other than a file that contains the bytes `mark` exists at `path`."""
    if os.path.lexists(path) and not (path.is_file() and mark in path.read_bytes()):
        raise UserError(
            f"{make_printable(path)} was not written by this program, so it is not replaced: give another output path,"
            " or remove the file"
        )


def make_folder(path: str | os.PathLike) -> Path:
    """Create a folder and its parents, and check that files can be written into it.

    Raises:
        UserError: if the folder cannot be created, or if no file can be written into the folder.
    """
    try:
        os.makedirs(path, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(f"cannot write to the output folder {make_printable(path)} ({error.strerror})") from None
    return Path(path)


@contextlib.contextmanager
def hold_lock_file(path: Path, world: World) -> Iterator[None]:
    """Hold a lock file while the `with` block runs, so that a second run cannot write into the folder of the lock file.

    If the file system does not support locks, a warning is logged, and the block runs without a lock.

    Raises:
        UserError: if another run holds the lock, or if the file at `path` is not a lock file of this project.
    """
    with contextlib.ExitStack() as stack:
        refusal = None
        if world.is_main:
            refusal = _take_lock(path, stack)
        refusal = broadcast_from_main(refusal, world)
        if refusal:
            raise UserError(refusal)
        yield


def _take_lock(path: Path, stack: contextlib.ExitStack) -> str | None:
    """Lock a new lock file until `stack` is closed, or return one line that says why the lock cannot be taken."""
    busy = f"another run is writing here ({make_printable(path)}): let it end, or write elsewhere"
    with contextlib.suppress(FileExistsError), path.open("xb") as new:
        new.write(LOCK_TEXT)
    foreign = f"{make_printable(path)} is not a lock file of this program: move or delete it, or write elsewhere"
    try:
        file = stack.enter_context(path.open("r+b"))
    except FileNotFoundError:  # a run that held the lock has ended and deleted the file
        return busy
    except IsADirectoryError:
        return foreign
    content = file.read(len(LOCK_TEXT) + 1)
    if not LOCK_TEXT.startswith(content):  # a killed run may have written only the beginning of LOCK_TEXT
        return foreign
    try:
        # Unlike flock, lockf does not pass the lock on to forked worker processes, which may outlive the run
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return busy
    except OSError as error:
        text = "warning: the file system has no locks for %s (%s): make sure that no other run writes there"
        logger.warning(text, make_printable(path), error.strerror)
    if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
        return busy  # another run has deleted or replaced `path` since this run opened it
    stack.callback(path.unlink, missing_ok=True)
    return None
