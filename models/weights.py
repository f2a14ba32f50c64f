"""All weights come through here: taken out of files, compared with the network, named by a fingerprint."""

import hashlib
import logging
import socket
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from models.vgg import VGGStages
from utils import checkpoint
from utils.run import UserError, shown

logger = logging.getLogger(__name__)

SHOWN_KEYS = 3  # how many wrong keys an error names
IMAGENET_FILE = "vgg19-dcbb9e9d.pth"  # torchvision's name for it; behind the dash the start of its SHA-256
RANDOM_SEED = 19  # of the stand-in weights: fixed, so that every run that needs them gets the same ones
DOWNLOAD_TIMEOUT = 20  # seconds without an answer before the download is given up


def state_dict_of(content: Mapping, name: str) -> dict[str, Tensor]:
    """The weights in a checkpoint: bare or under "state_dict", with or without DataParallel's "module." prefix.

    Raises:
        UserError: if there are none.
    """
    state = content.get("state_dict", content)
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        keys = ", ".join(map(str, list(content)[:SHOWN_KEYS])) or "none"
        raise UserError(f"no weights in {name}: a state dict was wanted, its first keys are {keys}")
    return {key.removeprefix("module."): value for key, value in state.items()}


def load_weights(module: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Load `state` into `module`, every key and every shape.

    Raises:
        UserError: naming the keys missing, unknown or of another shape, before anything is loaded.
    """
    wanted, got = ({k: tuple(v.shape) for k, v in s.items()} for s in (module.state_dict(), state))
    faults = {
        "missing": [k for k in wanted if k not in got],
        "unknown": [k for k in got if k not in wanted],
        "of another shape": [f"{k} is {got[k]}, wanted {s}" for k, s in wanted.items() if got.get(k, s) != s],
    }
    said = [f"{len(keys)} {what}: {', '.join(keys[:SHOWN_KEYS])}" for what, keys in faults.items() if keys]
    if said:
        raise UserError(f"{name} does not fit the network ({len(wanted)} entries wanted): {'; '.join(said)}")
    module.load_state_dict(state)


def fingerprint(weights: nn.Module | Mapping[str, Tensor]) -> str:
    """16 hex digits that name a network's weights: the SHA-256 of names, types, shapes and values."""
    return checkpoint.digest(weights.state_dict() if isinstance(weights, nn.Module) else weights)[:16]


# --- VGG-19 -------------------------------------------------------------------------------------------------


def load_vgg(source: str, trained_with: Mapping | None = None, name: str = "") -> tuple[VGGStages, dict]:
    """VGG-19, and the record {"source", "fingerprint"} of its weights that goes into checkpoints.

    Args:
        source: `--vgg-weights`: "imagenet" (torch hub's cache, else downloaded; checked against its hash), "random"
            (fixed seed), "auto" (imagenet where it can be had, else random) or the path of a torchvision vgg19 state
            dict of any float type, of which the `features.*` entries suffice.
        trained_with: the record in the checkpoint `name` these features will be used with; {"source": "imagenet"}
            without a fingerprint for a released one; None in a training from scratch.

    Raises:
        UserError: if the file or the download is missing, damaged or of another network, or the weights are not the
            ones the checkpoint was trained with.
    """
    if source == "auto" and trained_with is not None:
        source = trained_with["source"]
        if source not in ("imagenet", "random") and not Path(source).is_file():
            raise UserError(
                f"{name} was trained with the VGG-19 weights of {source}, which are not there: pass --vgg-weights FILE"
            )
    state, got = _vgg_state(source)
    if source == "auto" and got == "random":
        logger.warning(
            "WARNING: no ImageNet weights for VGG-19 on this machine and none to be downloaded. This training goes on"
            " with fixed-seed RANDOM VGG-19 weights, which is not what the paper does and will be recorded in its"
            " checkpoints; pass --vgg-weights FILE to use real ones."
        )
    vgg = VGGStages()
    load_weights(vgg, state, got)
    record = {"source": got, "fingerprint": fingerprint(vgg)}
    wanted = (trained_with or {}).get("fingerprint")
    if trained_with is not None and wanted is None and got == "random":
        raise UserError(f"{name} needs ImageNet weights for VGG-19, random ones were asked for: pass a FILE")
    if wanted not in (None, record["fingerprint"]):
        raise UserError(
            f"{name} was trained with the VGG-19 weights {wanted} ({trained_with['source']}), and"
            f" {got} has {record['fingerprint']}: pass --vgg-weights with the ones it was trained with"
        )
    return vgg, record


def _vgg_state(source: str) -> tuple[dict[str, Tensor], str]:
    """(state dict, "imagenet" | "random" | path)."""
    if source in ("imagenet", "auto"):
        try:
            return _imagenet_state(), "imagenet"
        except OSError as error:
            if source == "imagenet":
                raise UserError(
                    f"no ImageNet weights for VGG-19: not under {_hub_file()} and not to be downloaded"
                    f" ({' '.join(str(error).split())}); copy them there or pass --vgg-weights FILE"
                ) from None
    if source in ("random", "auto"):
        return _random_state(), "random"
    if not Path(source).is_file():
        raise UserError(
            f"no VGG-19 weights at {shown(source)}: pass --vgg-weights auto, imagenet, random or an existing file"
        )
    return _features_only(checkpoint.load(source), shown(source)), source


def _random_state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(RANDOM_SEED)
    state = VGGStages().state_dict()
    for key, tensor in state.items():
        if key.endswith(".bias"):
            tensor.zero_()
        else:  # He et al. (ICCV 2015), so that the feature maps of all stages keep the scale of the image
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=generator)
    return state


def _hub_file() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / IMAGENET_FILE


def _imagenet_state() -> dict[str, Tensor]:
    """Raises OSError where they are neither in the cache nor to be downloaded."""
    cached = _hub_file()
    if not cached.is_file():
        from torchvision.models import VGG19_Weights

        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
        try:
            state = VGG19_Weights.IMAGENET1K_V1.get_state_dict(progress=True, check_hash=True)
        except RuntimeError as error:  # torch's word for a download with the wrong hash
            raise OSError(str(error)) from None
        finally:
            socket.setdefaulttimeout(timeout)
        return _features_only(state, "the downloaded VGG-19 weights")
    digest, wanted = hashlib.sha256(), cached.stem.rsplit("-", 1)[1]
    with cached.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if not digest.hexdigest().startswith(wanted):
        raise UserError(f"{cached} is damaged: its SHA-256 does not start with {wanted}; delete it and try again")
    return _features_only(checkpoint.load(cached), str(cached))


def _features_only(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    wanted = VGGStages().state_dict()
    for key, tensor in wanted.items():
        got = tuple(state[key].shape) if isinstance(state.get(key), Tensor) else "nothing"
        if got != tuple(tensor.shape):
            raise UserError(
                f"{name} is no torchvision vgg19 state dict: {key} should be {tuple(tensor.shape)}, got {got}"
            )
    return {key: state[key].float() for key in wanted}
