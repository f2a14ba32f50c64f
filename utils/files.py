"""Files that are written completely or not at all, and folders that only one run writes to."""

import contextlib
import fcntl
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from utils.console import printable
from utils.distributed import World, broadcast_from_main
from utils.errors import UserError

logger = logging.getLogger(__name__)

TEMPORARY = re.compile(r"\.(?P<name>.+)\.\d+\.tmp")  # the file NAME, while process number \d+ writes it
LOCK_TEXT = b"beyond-the-spectrum lock\n"


@contextlib.contextmanager
def atomic(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces `path` at the end of the `with` block.

    Whatever happens, `path` holds either its old content or the whole new content. A symbolic link stays a link: the
    file that it points to is replaced.
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


def remove_unfinished(folder: Path, names: str = ".+", age: float = 0) -> None:
    """Delete temporary files that a process killed in `atomic` has left.

    Args:
        folder: where to look.
        names: regular expression of the files that the program writes there. Other temporary files are kept.
        age: seconds for which nobody has written to the file.
    """
    for path in folder.glob(".*.tmp"):
        match = TEMPORARY.fullmatch(path.name)
        if match and re.fullmatch(names, match["name"]):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime >= age:
                    path.unlink()


def write_json(path: Path, obj: dict) -> None:
    """Write a JSON file, completely or not at all."""
    text = json.dumps(obj, indent=2, sort_keys=True, allow_nan=False) + "\n"
    with atomic(path) as file:
        file.write(text.encode())


def make_folder(path: str | os.PathLike) -> Path:
    """Make a folder with its parents, and check that files can be written there before any work starts.

    Raises:
        UserError: if the folder cannot be made or written to.
    """
    try:
        os.makedirs(path, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(f"cannot write to the output folder {printable(path)} ({error.strerror})") from None
    return Path(path)


@contextlib.contextmanager
def exclusive_writer(path: Path, world: World) -> Iterator[None]:
    """Hold a lock file while the `with` block runs, so that no second run writes to the same place.

    The main process holds the lock, and all processes enter the block or none. The lock of a process that was killed
    is free at once. Where the file system has no locks, a warning is printed and the block is entered.

    Args:
        path: the lock file. It is deleted at the end.
        world: the processes of this run.

    Raises:
        UserError: if another run holds the lock, or the file is not a lock file of this project.
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
    """Make and lock the file until `stack` is closed. Returns a line that says why this is impossible, or None."""
    busy = f"another run is writing here ({printable(path)}): let it end, or write elsewhere"
    with contextlib.suppress(FileExistsError), path.open("xb") as new:
        new.write(LOCK_TEXT)
    foreign = f"{printable(path)} is not a lock file of this program: move or delete it, or write elsewhere"
    try:
        file = stack.enter_context(path.open("r+b"))
    except FileNotFoundError:  # the other run has ended since
        return busy
    except IsADirectoryError:
        return foreign
    if file.read(len(LOCK_TEXT) + 1) != LOCK_TEXT:
        return foreign
    try:
        # lockf, because worker processes do not inherit its locks. With flock a worker could outlive the run.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return busy
    except OSError as error:
        text = "warning: the file system has no locks for %s (%s): make sure that no other run writes there"
        logger.warning(text, printable(path), error.strerror)
    if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
        return busy  # the other run deleted this file at its end, and a third run may have made a new one
    stack.callback(path.unlink, missing_ok=True)
    return None
