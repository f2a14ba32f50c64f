"""The features in which image and re-synthesis are compared: pixels, or a stage of VGG-19. Never trained.

Only this file knows what a stage is: stage 0 is the pixels, stage k = 1..5 is relu{k}_1 of VGG-19.

VGG-19 is by Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition" (ICLR
2015), with torchvision's parameter names and ImageNet weights.
"""

import hashlib
import logging
import math
import socket
from collections.abc import Iterable, Mapping
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from models.released import state_dict_of
from models.tiling import in_tiles
from utils.checkpoints import fingerprint, load, load_weights
from utils.console import printable
from utils.errors import UserError

logger = logging.getLogger(__name__)

STAGES = (1, 2, 3, 4, 5)
STAGE_CHANNELS = {1: 64, 2: 128, 3: 256, 4: 512, 5: 512}
STAGE_STRIDES = {1: 1, 2: 2, 3: 4, 4: 8, 5: 16}
STAGE_LAYERS = {1: 1, 2: 6, 3: 11, 4: 20, 5: 29}  # index of relu{k}_1 in torchvision's vgg19().features
CONVOLUTIONS = (2, 2, 4, 4, 1)  # number of 3x3 convolutions at each resolution, up to relu5_1
BLOCK_CHANNELS = (64, 128, 256, 512, 512)
TILE_CUTS = (10, 19)  # layers after pool2 and pool3: where tiles are put together again

IMAGENET_URL = "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth"  # the name ends with its SHA-256
DOWNLOAD_TIMEOUT = 20  # seconds without an answer
RANDOM_SEED = 19  # seed of the stand-in weights: fixed, so that every run uses the same ones


class Pixels(nn.Module):
    """The pixels themselves: (B, 3, H, W) -> (B, 3, H, W). Stage 0."""

    channels = 3
    stride = 1

    def forward(self, x: Tensor) -> Tensor:
        return x


class VGG19Stage(nn.Module):
    """The feature maps of one stage of VGG-19: x (B, 3, H, W) in [0, 1] -> (B, channels, H / stride, W / stride).

    The weights are random until `load_pretrained` is called.

    Args:
        stage: 1..5, for relu{stage}_1.

    Raises:
        UserError: for another stage.
    """

    def __init__(self, stage: int = 5):
        super().__init__()
        if stage not in STAGES:
            raise UserError(f"the stage of VGG-19 must be one of 1..5, got {stage}")
        self.stage = stage
        self.channels = STAGE_CHANNELS[stage]
        self.stride = STAGE_STRIDES[stage]
        self.vgg = VGG19()

    def forward(self, x: Tensor) -> Tensor:
        return self.vgg(x, [self.stage])[self.stage]  # (B, C_l, H_l, W_l)

    def load_pretrained(self, source: str, trained_with: Mapping | None, name: str) -> dict:
        """Load the weights of VGG-19. Returns their record. See `load_vgg` for the arguments."""
        self.vgg, record = load_vgg(source, trained_with, name)
        return record

    def set_tile(self, side: int) -> None:
        """Set the side of the tiles that are computed at a time without gradients, in pixels of the image."""
        self.vgg.tile = side // 4


class VGG19(nn.Module):
    """VGG-19 up to relu5_1: images -> the feature maps of any of its stages.

    Release: the input is RGB in [0, 1] without ImageNet's mean and standard deviation. The released detectors were
    trained on features computed in this way.
    """

    def __init__(self):
        super().__init__()
        layers = []
        in_channels = 3
        for block, (count, channels) in enumerate(zip(CONVOLUTIONS, BLOCK_CHANNELS, strict=True)):
            if block > 0:
                layers.append(nn.MaxPool2d(2))
            for _ in range(count):
                # skip_init: initialising 13 layers that are overwritten takes longer than loading them
                layers.append(nn.utils.skip_init(nn.Conv2d, in_channels, channels, kernel_size=3, padding=1))
                layers.append(nn.ReLU(inplace=True))
                in_channels = channels
        self.features = nn.Sequential(*layers)
        self.requires_grad_(False)
        self.tile = 256  # side of the tiles without gradients, in pixels of the map that a part of the network begins with

    def forward(self, x: Tensor, stages: Iterable[int] = STAGES) -> dict[int, Tensor]:
        """x: (B, 3, H, W) in [0, 1]. Returns {k: (B, STAGE_CHANNELS[k], H / 2^(k-1), W / 2^(k-1))} for k in stages."""
        run_part = self.run_whole if torch.is_grad_enabled() else self.run_in_tiles
        maps = {}
        start = 0
        for k in sorted(stages):
            end = STAGE_LAYERS[k] + 1
            x = run_part(start, end, x)
            maps[k] = x
            start = end
        return maps

    def run_whole(self, start: int, end: int, x: Tensor) -> Tensor:
        """Run layers start..end-1 on whole maps."""
        return self.features[start:end](x)

    def run_in_tiles(self, start: int, end: int, x: Tensor) -> Tensor:
        """Run layers start..end-1 tile by tile: the maps between them are the largest of the whole detector."""
        cuts = [cut for cut in TILE_CUTS if start < cut < end]
        for first, last in pairwise([start, *cuts, end]):
            layers = self.features[first:last]
            halo, stride = receptive_field(layers)
            x = in_tiles(layers, x, side=self.tile, halo=halo, scale=Fraction(1, stride))
        return x

    def train(self, mode: bool = True) -> "VGG19":
        """Stay in evaluation mode: nothing in here is ever trained."""
        return super().train(False)


def receptive_field(layers: Iterable[nn.Module]) -> tuple[int, int]:
    """Return how far 3x3 convolutions and 2x2 poolings see to each side, rounded up to whole strides, and their stride."""
    reach = 0
    stride = 1
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            reach += stride
        elif isinstance(layer, nn.MaxPool2d):
            stride *= 2
    return math.ceil(reach / stride) * stride, stride


# --- the released flag --idx-stages -------------------------------------------------------------------------


def features_of_stage(stage: int) -> tuple[str, dict]:
    """Return the entry of FEATURES, and its arguments, that `--idx-stages STAGE` stands for."""
    if stage == 0:
        return "pixels", {}
    return "vgg19", {"stage": stage}


def stages_with_channels(channels: int) -> list[int]:
    """Return the stages whose features have this many channels."""
    every_stage = {0: Pixels.channels, **STAGE_CHANNELS}
    return [stage for stage, count in every_stage.items() if count == channels]


# --- the weights of VGG-19 ----------------------------------------------------------------------------------


def load_vgg(source: str, trained_with: Mapping | None = None, name: str = "") -> tuple[VGG19, dict]:
    """Create VGG-19 with its weights.

    Args:
        source: `--vgg-weights`. "imagenet": from torch hub's cache, else downloaded. "random": the stand-in weights.
            "auto": the weights of `trained_with` if given, else imagenet where possible, else random. Else the path
            of a torchvision vgg19 state dict of any float type; its `features.*` entries are enough.
        trained_with: the record in the checkpoint that these features will be used with. None: training from scratch.
        name: the name of that checkpoint, for messages.

    Returns:
        the network, and the record {"source", "fingerprint"} that goes into checkpoints.

    Raises:
        UserError: if the weights cannot be read, or differ from `trained_with`.
    """
    if source == "auto" and trained_with is not None:
        source = trained_with["source"]
    content, found = _vgg_weights(source)
    shown = f"{printable(found)}, read as torchvision's vgg19,"
    vgg = VGG19()
    state = {key: value.float() for key, value in state_dict_of(content, shown).items() if key in vgg.state_dict()}
    load_weights(vgg, state, shown)
    record = {"source": found, "fingerprint": fingerprint(vgg)}
    if trained_with is None:
        return vgg, record
    expected = trained_with.get("fingerprint")
    if expected is None and record["source"] == "random":
        raise UserError(f"{name} needs ImageNet weights for VGG-19, got random ones: pass --vgg-weights FILE")
    if expected not in (None, record["fingerprint"]):
        raise UserError(
            f"{name} was trained with the VGG-19 weights {expected} ({printable(trained_with['source'])}), and"
            f" {printable(record['source'])} has {record['fingerprint']}: pass --vgg-weights with the ones it was"
            " trained with"
        )
    return vgg, record


def _vgg_weights(source: str) -> tuple[Mapping, str]:
    """Return a state dict or a checkpoint that holds one, and where it is from: "imagenet", "random" or the path."""
    if source in ("imagenet", "auto"):
        try:
            return load(_imagenet_file()), "imagenet"
        except OSError as error:
            reason = " ".join(str(error).split())
            if source == "imagenet":
                raise UserError(
                    f"no ImageNet weights for VGG-19 in torch hub's cache ({torch.hub.get_dir()}), and they cannot be"
                    f" downloaded ({reason}): copy them there, or pass --vgg-weights FILE"
                ) from None
        logger.warning(
            "WARNING: no ImageNet weights for VGG-19 on this machine, and they cannot be downloaded. This training uses"
            " fixed-seed RANDOM VGG-19 weights instead. The paper does not, and the checkpoints will record it. Pass"
            " --vgg-weights FILE to use real ones."
        )
    if source in ("random", "auto"):
        return _random_weights(), "random"
    if not Path(source).is_file():
        raise UserError(f"no VGG-19 weights at {printable(source)}: pass --vgg-weights FILE, imagenet, random or auto")
    return load(source), source


def _random_weights() -> dict[str, Tensor]:
    """Draw weights after He et al. (ICCV 2015), so that the maps of all stages keep the scale of the image."""
    generator = torch.Generator().manual_seed(RANDOM_SEED)
    state = VGG19().state_dict()
    for key, tensor in state.items():
        tensor.zero_()
        if key.endswith(".weight"):
            fan_in = tensor[0].numel()
            tensor.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
    return state


def _imagenet_file() -> Path:
    """Return torchvision's file in torch hub's cache; download it if it is not there.

    Raises:
        OSError: if it can be neither found nor downloaded.
        UserError: if the file is damaged.
    """
    path = Path(torch.hub.get_dir(), "checkpoints", Path(IMAGENET_URL).name)
    digest = path.stem.partition("-")[2]
    if not path.is_file():
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(IMAGENET_URL, str(path), hash_prefix=digest)
        except RuntimeError as error:  # raised by torch for a download with another hash
            raise OSError(str(error)) from None
        finally:
            socket.setdefaulttimeout(timeout)
    if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(digest):
        raise UserError(f"{path} is damaged: its SHA-256 must start with {digest}; delete it and try again")
    return path
