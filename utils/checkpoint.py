"""Checkpoint files: written so that nothing is lost, read so that nothing is silent and nothing is executed."""

import contextlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

TEMPORARY = ".tmp"  # what a file being written ends in; its name begins with a dot and the name it will get
# How torch says that a file holds more than it may; its other complaints are about files that are no checkpoints
FORBIDDEN = ("Unsupported global", "unsupported GLOBAL", "unrecognized function", "allowlisted", "Unsupported class")


class CheckpointError(ValueError):
    """A user's mistake about a checkpoint: one line with what was got, what was wanted, the way out."""


def save(obj: dict, path: str | os.PathLike) -> None:
    """Write `obj` so that `path` holds either the old file or the whole new one, whatever happens in between.

    Raises:
        CheckpointError: if it cannot be written (disk full, no permission); the old file is then untouched.
    """
    path = Path(path)
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY, delete=False
        ) as file:
            temporary = file.name
            torch.save(obj, file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # a temporary file is private, a checkpoint is not
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"cannot write {path} ({_cause(error)}); what was there before is untouched") from error
    finally:
        if temporary:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)


def remove_torn(folder: Path) -> None:
    """Delete what a process killed in `save` left behind, before another run begins in this folder."""
    for path in folder.glob(f".*.pth*{TEMPORARY}"):
        path.unlink(missing_ok=True)


def load(path: str | os.PathLike) -> dict:
    """Read a checkpoint onto the CPU. Tensors and plain values only: nothing in the file is ever executed.

    Raises:
        CheckpointError: if it is missing, truncated, no checkpoint, or would run code when unpickled.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, a checkpoint file was wanted")
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}: train one first, or give the path of an existing file")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - torch raises anything from EOFError to UnpicklingError
        if any(words in str(error) for words in FORBIDDEN):
            raise CheckpointError(
                f"{path} refused: it holds more than tensors and plain values, and unpickling such a file runs"
                " whatever code is in it; save its state dicts alone, on a machine you trust it on"
            ) from None
        if isinstance(error, PermissionError):
            raise CheckpointError(f"cannot read {path} ({error.strerror})") from None
        raise CheckpointError(
            f"cannot read {path} ({os.path.getsize(path)} bytes; {type(error).__name__}):"
            " it is truncated or no checkpoint; fetch or train it again"
        ) from None
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, a dictionary was wanted")
    return dict(loaded)


def to_cpu(obj):
    """A copy of nested dictionaries, lists and tensors with every tensor on the CPU, row-major."""
    if isinstance(obj, Tensor):
        return obj.detach().to("cpu", memory_format=torch.contiguous_format, copy=True)
    if isinstance(obj, Mapping):
        return {key: to_cpu(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return type(obj)(to_cpu(value) for value in obj)
    return obj


def _cause(error: Exception) -> str:
    """Why writing failed, in one line: where torch only says that it did, what the system said before."""
    cause = error
    while not isinstance(cause, OSError) and cause.__context__:
        cause = cause.__context__
    cause = cause if isinstance(cause, OSError) else error
    return getattr(cause, "strerror", None) or str(cause).strip().splitlines()[0]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable; some file systems have no such thing."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
