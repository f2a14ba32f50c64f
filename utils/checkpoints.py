"""Checkpoint files: written so that nothing is lost, read so that nothing is silent and nothing is executed.

A name that ends in .safetensors makes a bundle of it, for sharing: the same content without any pickle, read and
written by the same two functions. Tensors are named KEY or KEY/NAME; the plain values are one JSON text of its metadata.
"""

import hashlib
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor, nn

from utils.console import printable
from utils.errors import UserError
from utils.files import atomic

SHOWN_KEYS = 3  # number of wrong keys that an error names
BUNDLE = "beyond-the-spectrum bundle, version 1"

# How torch says that a file holds more than it may; its other complaints are about files that are no checkpoints
FORBIDDEN = ("Unsupported global", "unsupported GLOBAL", "unrecognized function", "allowlisted", "Unsupported class")


def save(obj: dict, path: str | os.PathLike) -> None:
    """Write `obj` so that `path` holds either the old file or the whole new one, whatever happens in between.

    Raises:
        UserError: if it cannot be written (disk full, no permission); the old file is then untouched.
    """
    try:
        with atomic(path) as file:
            sink = _Sink(file)
            sink.write(_packed(obj)) if is_bundle(path) else torch.save(obj, sink)
            if sink.error:
                raise sink.error
    except OSError as error:
        said = f"cannot write {printable(path)} ({error.strerror})"
        raise UserError(f"{said}; what was there before is untouched") from error


class _Sink(io.RawIOBase):
    """Writes to a file, and keeps its first error, which torch would hide."""

    def __init__(self, file: BinaryIO):
        self.file, self.error = file, None

    def write(self, data: bytes | memoryview) -> int:
        try:
            if self.error is None:
                self.file.write(data)
        except OSError as error:
            self.error = error
        return len(data)


def load(path: str | os.PathLike) -> dict:
    """Read a checkpoint onto the CPU. Tensors and plain values only: nothing in the file is ever executed.

    Raises:
        UserError: if it is missing, truncated, no checkpoint, or would run code when unpickled.
    """
    path, name = Path(path), printable(path)
    if not path.is_file():
        got = "a folder" if path.is_dir() else "nothing"
        raise UserError(f"no checkpoint at {name} but {got}: train one first, or give the path of an existing file")
    try:
        loaded = _unpacked(path) if is_bundle(path) else torch.load(path, map_location="cpu", weights_only=True)
    except (UserError, PermissionError):
        raise
    except Exception as error:  # torch raises anything from EOFError to UnpicklingError
        if any(words in str(error) for words in FORBIDDEN):
            raise UserError(
                f"{name} refused: it holds more than tensors and plain values, and unpickling such a file runs"
                " whatever code is in it; save its state dicts alone, on a machine you trust it on"
            ) from None
        numbered = path.parent.glob("*[0-9].pth.tar") if path.name.startswith("last.") else ()
        newest = max(numbered, key=lambda p: p.stat().st_mtime, default=None)
        again = f"go on from the newest numbered state with --resume {printable(newest)}" if newest else "make it anew"
        kind = f"{os.path.getsize(path)} bytes; {type(error).__name__}"
        raise UserError(f"cannot read {name} ({kind}): it is truncated or no checkpoint; {again}") from None
    if not isinstance(loaded, Mapping):
        raise UserError(f"{name} holds a {type(loaded).__name__}, a dictionary was wanted")
    return dict(loaded)


class Checkpoint(NamedTuple):
    """What was read from a file, and the file's name for messages."""

    content: Mapping
    name: str


def read_checkpoint(path: str | None) -> Checkpoint | None:
    """The content of a file (`load`); None for no file."""
    return Checkpoint(load(path), str(path)) if path else None


def is_bundle(path: str | os.PathLike) -> bool:
    """Whether a file of this name is one for sharing."""
    return os.fspath(path).endswith(".safetensors")


def _packed(obj: Mapping) -> bytes:
    """The bytes of a bundle: tensors, mappings of tensors, and plain values that JSON has."""
    tensors, values = {}, {}
    for key, value in obj.items():
        if isinstance(value, Tensor):
            tensors[key] = value
        elif isinstance(value, Mapping) and value and all(isinstance(v, Tensor) for v in value.values()):
            tensors |= {f"{key}/{name}": tensor for name, tensor in value.items()}
        else:
            values[key] = value
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    metadata = {"format": BUNDLE, "card": values.pop("card", ""), "content": json.dumps(values, sort_keys=True)}
    return _library().torch.save(tensors, metadata | {"digest": digest(tensors, metadata)})


def _unpacked(path: Path) -> dict:
    """The content of a bundle, as `_packed` got it.

    Raises:
        UserError: if it is of another version, or a bit of it has changed.
    """
    with _library().safe_open(path, "pt") as file:
        metadata, tensors = file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}
    found, written = metadata.get("format"), metadata.pop("digest", None)
    if found != BUNDLE:
        way_out = "write it again with python -m tools.export --bundle"
        raise UserError(f"{printable(path)} is of the format {found}, and this version reads {BUNDLE}: {way_out}")
    if written != digest(tensors, metadata):
        raise UserError(f"{printable(path)} is damaged: its content is not what was written; fetch it again")
    content = {"card": metadata["card"], **json.loads(metadata["content"])}
    for key, tensor in tensors.items():
        outer, _, inner = key.partition("/")
        if inner:
            content.setdefault(outer, {})[inner] = tensor
        else:
            content[outer] = tensor
    return content


def digest(tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> str:
    """The SHA-256 of tensors (names, types, shapes and values) and, before them, of texts."""
    sha = hashlib.sha256(json.dumps(about, sort_keys=True).encode() if about else b"")
    for key, tensor in sorted(tensors.items()):
        tensor = tensor.detach().cpu().contiguous()
        sha.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def _library():
    """safetensors, which only bundles need."""
    try:
        import safetensors.torch
    except ImportError:
        raise UserError("files that end in .safetensors need a package: pip install safetensors") from None
    return safetensors


def fingerprint(weights: nn.Module | Mapping[str, Tensor]) -> str:
    """Return 16 hex digits that identify weights: of the SHA-256 of names, types, shapes and values."""
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    return digest(state)[:16]


def load_weights(module: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Load `state` into `module`: every key must exist in both, with the same shape.

    Raises:
        UserError: naming the keys that are missing, unknown or of another shape. Nothing is loaded then.
    """
    expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    got = {key: tuple(value.shape) for key, value in state.items()}
    missing = [key for key in expected if key not in got]
    unknown = [key for key in got if key not in expected]
    reshaped = [key for key in expected if key in got and got[key] != expected[key]]
    faults = []
    if missing:
        faults.append(f"{len(missing)} missing: {', '.join(missing[:SHOWN_KEYS])}")
    if unknown:
        faults.append(f"{len(unknown)} unknown: {', '.join(unknown[:SHOWN_KEYS])}")
    if reshaped:
        shapes = [f"{key} (expected {expected[key]}, got {got[key]})" for key in reshaped[:SHOWN_KEYS]]
        faults.append(f"{len(reshaped)} of another shape: {', '.join(shapes)}")
    if faults:
        raise UserError(f"{name} does not fit the network of {len(expected)} entries: {'; '.join(faults)}")
    module.load_state_dict(state)
