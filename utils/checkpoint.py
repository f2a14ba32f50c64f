"""Checkpoint files: written so that nothing is lost, read so that nothing is silent and nothing is executed."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from utils.run import UserError, atomic, shown

# How torch says that a file holds more than it may; its other complaints are about files that are no checkpoints
FORBIDDEN = ("Unsupported global", "unsupported GLOBAL", "unrecognized function", "allowlisted", "Unsupported class")


def save(obj: dict, path: str | os.PathLike) -> None:
    """Write `obj` so that `path` holds either the old file or the whole new one, whatever happens in between.

    Raises:
        UserError: if it cannot be written (disk full, no permission); the old file is then untouched.
    """
    try:
        with atomic(path) as file:
            torch.save(obj, file)
    except (OSError, RuntimeError) as error:
        cause = error  # where torch only says that it failed, what the system said before
        while not isinstance(cause, OSError) and cause.__context__:
            cause = cause.__context__
        reason = getattr(cause, "strerror", None) or str(error).strip().splitlines()[0]
        raise UserError(f"cannot write {shown(path)} ({reason}); what was there before is untouched") from error


def load(path: str | os.PathLike) -> dict:
    """Read a checkpoint onto the CPU. Tensors and plain values only: nothing in the file is ever executed.

    Raises:
        UserError: if it is missing, truncated, no checkpoint, or would run code when unpickled.
    """
    path = Path(path)
    name = shown(path)
    if path.is_dir():
        raise UserError(f"{name} is a folder, a checkpoint file was wanted")
    if not path.is_file():
        raise UserError(f"no checkpoint at {name}: train one first, or give the path of an existing file")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise UserError(f"cannot read {name} ({error.strerror})") from None
    except Exception as error:  # torch raises anything from EOFError to UnpicklingError
        if any(words in str(error) for words in FORBIDDEN):
            raise UserError(
                f"{name} refused: it holds more than tensors and plain values, and unpickling such a file runs"
                " whatever code is in it; save its state dicts alone, on a machine you trust it on"
            ) from None
        kind = f"{os.path.getsize(path)} bytes; {type(error).__name__}"
        raise UserError(f"cannot read {name} ({kind}): it is truncated or no checkpoint; {_way_out(path)}") from None
    if not isinstance(loaded, Mapping):
        raise UserError(f"{name} holds a {type(loaded).__name__}, a dictionary was wanted")
    return dict(loaded)


def _way_out(path: Path) -> str:
    """For a damaged state: the newest numbered one beside it that a training can go on from."""
    states = [p for p in path.parent.glob("*.pth.tar") if re.fullmatch(r"\d+\.pth\.tar", p.name) and p != path]
    if path.name.startswith("last.") and states:
        return (
            f"go on from the newest numbered state with --resume {shown(max(states, key=lambda p: int(p.name[:-8])))}"
        )
    return "fetch or train it again"
