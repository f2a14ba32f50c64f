"""All weights come through here: taken out of files, compared with the network, named by a fingerprint."""

import hashlib
import logging
import socket
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from models.features import VGGStages
from utils import checkpoints
from utils.console import printable
from utils.errors import UserError

logger = logging.getLogger(__name__)

SHOWN_KEYS = 3  # how many wrong keys an error names
IMAGENET_URL = "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth"  # behind the dash: of its SHA-256
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
    if said := [f"{len(keys)} {what}: {', '.join(keys[:SHOWN_KEYS])}" for what, keys in faults.items() if keys]:
        raise UserError(f"{name} does not fit the network ({len(wanted)} entries wanted): {'; '.join(said)}")
    module.load_state_dict(state)


def fingerprint(weights: nn.Module | Mapping[str, Tensor]) -> str:
    """16 hex digits that name a network's weights: the SHA-256 of names, types, shapes and values."""
    return checkpoints.digest(weights.state_dict() if isinstance(weights, nn.Module) else weights)[:16]


# --- VGG-19 -------------------------------------------------------------------------------------------------


def load_vgg(source: str, trained_with: Mapping | None = None, name: str = "") -> tuple[VGGStages, dict]:
    """VGG-19, and the record {"source", "fingerprint"} of its weights that goes into checkpoints.

    Args:
        source: `--vgg-weights`: "imagenet" (torch hub's cache, else downloaded; checked against its hash), "random"
            (fixed seed), "auto" (imagenet where it can be had, else random) or the path of a torchvision vgg19 state
            dict of any float type, of which the `features.*` entries suffice.
        trained_with: the record in the checkpoint `name` these features will be used with, which are refused if they
            are others; of a released one {"source": "imagenet"}; None in a training from scratch.
    """
    if source == "auto" and trained_with is not None:
        source = trained_with["source"]
    vgg, (content, got) = VGGStages(), _vgg_content(source)
    named = f"{got}, taken for torchvision's vgg19,"
    features = {k: v.float() for k, v in state_dict_of(content, named).items() if k in vgg.state_dict()}
    load_weights(vgg, features, named)
    record = {"source": got, "fingerprint": fingerprint(vgg)}
    wanted = (trained_with or record).get("fingerprint")
    if wanted is None and got == "random":
        raise UserError(f"{name} needs ImageNet weights for VGG-19, random ones were asked for: pass a FILE")
    if wanted not in (None, record["fingerprint"]):
        raise UserError(
            f"{name} was trained with the VGG-19 weights {wanted} ({trained_with['source']}), and"
            f" {got} has {record['fingerprint']}: pass --vgg-weights with the ones it was trained with"
        )
    return vgg, record


def _vgg_content(source: str) -> tuple[Mapping, str]:
    """(a state dict or what holds it, "imagenet" | "random" | path)."""
    if source in ("imagenet", "auto"):
        try:
            return checkpoints.load(_imagenet_file()), "imagenet"
        except OSError as error:
            if source == "imagenet":
                raise UserError(
                    f"no ImageNet weights for VGG-19 in torch hub's cache ({torch.hub.get_dir()}), nor to be downloaded"
                    f" ({' '.join(str(error).split())}): copy them there, or pass --vgg-weights FILE"
                ) from None
        logger.warning(
            "WARNING: no ImageNet weights for VGG-19 on this machine and none to be downloaded. This training goes on"
            " with fixed-seed RANDOM VGG-19 weights, which is not what the paper does and will be recorded in its"
            " checkpoints; pass --vgg-weights FILE to use real ones."
        )
    if source in ("random", "auto"):
        return _random_state(), "random"
    if not Path(source).is_file():
        raise UserError(f"no VGG-19 weights at {printable(source)}: pass --vgg-weights FILE, imagenet, random or auto")
    return checkpoints.load(source), source


def _random_state() -> dict[str, Tensor]:
    """He et al. (ICCV 2015), so that the feature maps of all stages keep the scale of the image; biases are 0."""
    generator, state = torch.Generator().manual_seed(RANDOM_SEED), VGGStages().state_dict()
    for key, tensor in state.items():
        tensor.zero_()
        if key.endswith(".weight"):
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=generator)
    return state


def _imagenet_file() -> Path:
    """In torch hub's cache, where torchvision has it, too. Raises OSError if it is not there nor to be downloaded."""
    cached = Path(torch.hub.get_dir(), "checkpoints", Path(IMAGENET_URL).name)
    digest = cached.stem.partition("-")[2]
    if not cached.is_file():
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(IMAGENET_URL, str(cached), hash_prefix=digest)
        except RuntimeError as error:  # torch's word for a download with the wrong hash
            raise OSError(str(error)) from None
        finally:
            socket.setdefaulttimeout(timeout)
    if not hashlib.sha256(cached.read_bytes()).hexdigest().startswith(digest):
        raise UserError(f"{cached} is damaged: its SHA-256 does not start with {digest}; delete it and try again")
    return cached
