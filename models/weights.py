"""State dicts: taken out of a checkpoint, compared with a network, named by a fingerprint."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from models.errors import ModelError

SHOWN_KEYS = 3  # how many wrong keys an error names


def state_dict_of(checkpoint: Mapping, name: str) -> dict[str, Tensor]:
    """The weights in a checkpoint: bare or under "state_dict", with or without DataParallel's "module." prefix.

    Raises:
        ModelError: if there are none.
    """
    state = checkpoint.get("state_dict", checkpoint)
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        keys = ", ".join(map(str, list(checkpoint)[:SHOWN_KEYS])) or "none"
        raise ModelError(f"no weights in {name}: a state dict was wanted, its first keys are {keys}")
    return {key.removeprefix("module."): value for key, value in state.items()}


def load_weights(module: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Load `state` into `module`, every key and every shape.

    Raises:
        ModelError: naming the keys missing, unknown or of another shape, before anything is loaded.
    """
    wanted = module.state_dict()
    shapes = [
        f"{k} is {tuple(state[k].shape)}, wanted {tuple(wanted[k].shape)}"
        for k in wanted
        if k in state and state[k].shape != wanted[k].shape
    ]
    faults = [
        f"{len(keys)} {what}: {', '.join(keys[:SHOWN_KEYS])}{', ...' if len(keys) > SHOWN_KEYS else ''}"
        for what, keys in (
            ("missing", [k for k in wanted if k not in state]),
            ("unknown", [k for k in state if k not in wanted]),
            ("of another shape", shapes),
        )
        if keys
    ]
    if faults:
        raise ModelError(f"{name} does not fit the network ({len(wanted)} entries wanted): {'; '.join(faults)}")
    module.load_state_dict(state)


def fingerprint(module: nn.Module) -> str:
    """16 hex digits that name a network's weights: the SHA-256 of names, types, shapes and values."""
    digest = hashlib.sha256()
    for key, tensor in sorted(module.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
