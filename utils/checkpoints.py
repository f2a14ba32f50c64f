"""Functions that write and read checkpoints, which are files that hold a dictionary of tensors and plain values.

Reading a checkpoint executes no code from the file. In a bundle, which is a checkpoint whose name ends in .safetensors,
the tensor content["a"] has the name "a", and the tensor content["a"]["b"] has the name "a/b".
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from utils.console import describe_allowed_numbers, make_printable
from utils.errors import UserError
from utils.files import open_for_atomic_write

SHOWN_KEYS = 3  # largest number of wrong keys that an error message names
BUNDLE = "beyond-the-spectrum bundle, version 1"
FINGERPRINT_DIGITS = 16

# If a file holds more than tensors and plain values, PyTorch's error message contains one of the texts in FORBIDDEN
FORBIDDEN = ("Unsupported global", "unsupported GLOBAL", "unrecognized function", "allowlisted", "Unsupported class")


class Checkpoint(NamedTuple):
    """The content of a checkpoint file, together with the name of the file for error messages."""

    content: Mapping
    name: str


def read_checkpoint_if_path_is_given(path: str | os.PathLike | None) -> Checkpoint | None:
    """Read a checkpoint, or return None if `path` is None or empty."""
    if not path:
        return None
    return Checkpoint(read_checkpoint_content(path), str(path))


# --- writing and reading ------------------------------------------------------------------------------------


def save_checkpoint(content: dict, path: str | os.PathLike) -> None:
    """Write a checkpoint completely or not at all.

    Raises:
        UserError: if the file cannot be written.
    """
    try:
        with open_for_atomic_write(path) as file:
            if is_safetensors_path(path):
                file.write(_convert_to_safetensors_bytes(content))
            else:
                torch.save(content, file)
    except (OSError, RuntimeError) as error:
        # After a failed write, torch.save may raise a RuntimeError. Its __context__ is then the OSError of the write.
        write_error = error if isinstance(error, OSError) else error.__context__
        if not isinstance(write_error, OSError):
            raise
        text = f"cannot write {make_printable(path)} ({write_error.strerror}); the earlier file is unchanged"
        raise UserError(text) from error


def read_checkpoint_content(path: str | os.PathLike) -> dict:
    """Read the content of a checkpoint onto the CPU.

    Raises:
        UserError: if the file is missing or truncated, is not a checkpoint, or would run code when it is unpickled.
    """
    path, name = Path(path), make_printable(path)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise UserError(f"expected a checkpoint at {name}, found {found}: train a network first, or give another path")
    try:
        content = (
            _read_safetensors_file(path)
            if is_safetensors_path(path)
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except (UserError, PermissionError):
        raise
    except Exception as error:  # torch.load raises many types of exceptions, from EOFError to UnpicklingError
        raise UserError(_reason_for_failed_load(path, error)) from None
    if not isinstance(content, Mapping):
        raise UserError(
            f"{name} is not a checkpoint: expected a dictionary in the file, got {_describe_value(content)}; give"
            " another file"
        )
    return dict(content)


def _reason_for_failed_load(path: Path, error: Exception) -> str:
    """Describe in one line why a checkpoint could not be read, and what the user can do."""
    name = make_printable(path)
    if any(words in str(error) for words in FORBIDDEN):
        return (
            f"{name} refused: the file holds more than tensors and plain values, and unpickling such a file runs"
            " whatever code is in it; if you trust the file, save its state dicts alone and use the new file"
        )
    way_out = "download or make it again"
    if path.name.startswith("last."):
        numbered = sorted(path.parent.glob("*[0-9].pth.tar"), key=lambda file: file.stat().st_mtime)
        if numbered:
            way_out = f"continue from the newest numbered state with --resume {make_printable(numbered[-1])}"
    found = f"{os.path.getsize(path)} bytes; {type(error).__name__}"
    return f"cannot read {name} ({found}): the file is truncated or no checkpoint; {way_out}"


# --- weights ------------------------------------------------------------------------------------------------


def compute_fingerprint(weights: nn.Module | Mapping[str, Tensor]) -> str:
    """Return the first 16 hex digits of the SHA-256 of the names, types, shapes and values of `weights`."""
    if isinstance(weights, nn.Module):
        weights = weights.state_dict()
    return compute_sha256(weights)[:FINGERPRINT_DIGITS]


def load_weights(module: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Load a state dict into a module with the same keys and tensor shapes.

    Raises:
        UserError: if keys are missing or unknown, or if shapes differ.
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
        raise UserError(
            f"{name} does not fit the network, which has {len(expected)} tensors ({'; '.join(faults)}): give a"
            " checkpoint of this network"
        )
    module.load_state_dict(state)


def compute_sha256(tensors: Mapping[str, Tensor], texts: Mapping[str, str] | None = None) -> str:
    """Return the SHA-256 of `texts` and of the names, types, shapes and values of `tensors`, as hex digits."""
    sha = hashlib.sha256()
    if texts:
        sha.update(json.dumps(texts, sort_keys=True).encode())
    for key, tensor in sorted(tensors.items()):
        tensor = tensor.detach().cpu().contiguous()
        sha.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


# --- plain values -------------------------------------------------------------------------------------------

_REQUIRED = object()


class Fields:
    """A wrapper of a dictionary of plain values from a checkpoint.

    If a value has a wrong type or is outside its range, the get methods raise a UserError that names the file and the
    key. If a value is missing or None, a get method with a parameter `default` returns `default`, or raises a UserError
    if the caller passes no `default`.

    Args:
        path: keys that lead to `values` in the file, for error messages, such as "config.images".

    Raises:
        UserError: if `values` is neither a mapping nor None.
    """

    def __init__(self, values: object, file: str, path: str = ""):
        self.file, self.path = file, path
        if values is None:
            values = {}
        if not isinstance(values, Mapping):
            raise UserError(
                f"{make_printable(file)}: {path or 'the content'} must be a dictionary, got {_describe_value(values)}"
            )
        self.values = values

    def has_value_other_than_none(self, key: str) -> bool:
        """Return whether `key` has a value other than None."""
        return self.values.get(key) is not None

    def get_integer_field(self, key: str, low: int = 0, high: float = math.inf, default: object = _REQUIRED) -> int:
        """Return the integer under `key`, which must be from `low` to `high`."""
        if not self.has_value_other_than_none(key):
            return self._get_default_of_missing_field(key, default)
        value = self.values[key]
        if not (_is_integer(value) and low <= value <= high):
            raise self._create_invalid_field_error(key, f"an integer{describe_allowed_numbers(low, high)}")
        return value

    def get_number_field(
        self, key: str, low: float = -math.inf, high: float = math.inf, default: object = _REQUIRED
    ) -> float:
        """Return the finite number under `key`, which must be from `low` to `high`."""
        if not self.has_value_other_than_none(key):
            return self._get_default_of_missing_field(key, default)
        value = self.values[key]
        is_number = _is_integer(value) or isinstance(value, float)
        if not (is_number and math.isfinite(value) and low <= value <= high):
            raise self._create_invalid_field_error(key, f"a finite number{describe_allowed_numbers(low, high)}")
        return value

    def get_positive_number_field(self, key: str, default: object = _REQUIRED) -> float:
        """Return the finite number under `key`, which must be above 0."""
        value = self.get_number_field(key, 0, default=default)
        if self.has_value_other_than_none(key) and value == 0:
            raise self._create_invalid_field_error(key, "a finite number above 0")
        return value

    def get_text_field(self, key: str, choices: Sequence[str] = (), default: object = _REQUIRED) -> str:
        """Return the text under `key`, which must be in `choices` if `choices` is not empty."""
        if not self.has_value_other_than_none(key):
            return self._get_default_of_missing_field(key, default)
        value = self.values[key]
        if not isinstance(value, str):
            raise self._create_invalid_field_error(key, "a text")
        if choices and value not in choices:
            raise self._create_invalid_field_error(key, f"one of {', '.join(choices)}")
        return value

    def get_nested_fields(self, key: str) -> "Fields":
        """Return the dictionary under `key`, or an empty dictionary if the value of `key` is missing or None."""
        return Fields(self.values.get(key), self.file, self._dotted_key(key))

    def get_dict_of_keyword_arguments(self, key: str) -> dict[str, object]:
        """Return the dictionary under `key`, whose keys must be valid names of keyword arguments."""
        values = self.get_nested_fields(key).values
        for name in values:
            if not isinstance(name, str) or not name.isidentifier():
                raise self._create_invalid_field_error(key, "a dictionary whose keys are Python identifiers")
        return dict(values)

    def _get_default_of_missing_field(self, key: str, default: object) -> object:
        """Return `default`, or raise a UserError if the caller has passed no default."""
        if default is _REQUIRED:
            raise UserError(
                f"{make_printable(self.file)}: the value {self._dotted_key(key)} is missing: give a complete checkpoint"
            )
        return default

    def _dotted_key(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def _create_invalid_field_error(self, key: str, rule: str) -> UserError:
        return UserError(
            f"{make_printable(self.file)}: {self._dotted_key(key)} must be {rule}, got"
            f" {_describe_value(self.values[key])}"
        )


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _describe_value(value: object) -> str:
    """Describe a value in a few words, for an error message."""
    if isinstance(value, bool | int | float | str) or value is None:
        return make_printable(repr(value)[:60])
    return f"a {type(value).__name__}"


# --- bundles ------------------------------------------------------------------------------------------------


def is_safetensors_path(path: str | os.PathLike) -> bool:
    """Return whether `path` ends in .safetensors, which means that the file is a bundle."""
    return os.fspath(path).endswith(".safetensors")


def _convert_to_safetensors_bytes(content: Mapping) -> bytes:
    """Convert the content of a checkpoint to the bytes of a bundle (a .safetensors file)."""
    tensors, values = {}, {}
    for key, value in content.items():
        if isinstance(value, Tensor):
            tensors[key] = value
        elif isinstance(value, Mapping) and value and all(isinstance(v, Tensor) for v in value.values()):
            for name, tensor in value.items():
                tensors[f"{key}/{name}"] = tensor
        else:
            values[key] = value
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    metadata = {"format": BUNDLE, "card": values.pop("card", ""), "content": json.dumps(values, sort_keys=True)}
    metadata["digest"] = compute_sha256(tensors, metadata)
    return _import_safetensors().torch.save(tensors, metadata)


def _read_safetensors_file(path: Path) -> dict:
    """Read a bundle (a .safetensors file), and convert it back to the content of a checkpoint."""
    with _import_safetensors().safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    name = make_printable(path)
    written_digest = metadata.pop("digest", None)
    if metadata.get("format") != BUNDLE:
        found = make_printable(str(metadata.get("format")))
        raise UserError(
            f"{name}: expected the format {BUNDLE}, got {found}; write the file again with python -m tools.export"
        )
    if written_digest != compute_sha256(tensors, metadata):
        raise UserError(
            f"{name} is damaged: its content has changed since the file was written; use an undamaged copy of the file"
        )
    content = {"card": metadata["card"], **json.loads(metadata["content"])}
    for key, tensor in tensors.items():
        outer, _, inner = key.partition("/")
        if inner:
            content.setdefault(outer, {})[inner] = tensor
        else:
            content[outer] = tensor
    return content


def _import_safetensors():
    """Import and return the package safetensors, which only bundles need."""
    try:
        import safetensors.torch
    except ImportError:
        text = "reading or writing a .safetensors file needs the package safetensors: run pip install safetensors"
        raise UserError(text) from None
    return safetensors
