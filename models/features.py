"""Features in which an image and its re-synthesis are compared: the pixels, or one stage of VGG-19.

Stage 0 means the pixels. Stage k = 1..5 means the output of layer relu{k}_1 of VGG-19. Features are never trained.

VGG-19 is from Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition" (ICLR 2015).
The parameters of VGG-19 have torchvision's names, so that torchvision's ImageNet weights can be loaded.
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
from utils.checkpoints import compute_fingerprint, load_checkpoint, load_weights
from utils.console import printable
from utils.errors import UserError

logger = logging.getLogger(__name__)

STAGES = (1, 2, 3, 4, 5)
STAGE_CHANNELS = {1: 64, 2: 128, 3: 256, 4: 512, 5: 512}
STAGE_STRIDES = {1: 1, 2: 2, 3: 4, 4: 8, 5: 16}
STAGE_LAYERS = {1: 1, 2: 6, 3: 11, 4: 20, 5: 29}  # index of relu{k}_1 in torchvision's vgg19().features
CONVOLUTIONS = (2, 2, 4, 4, 1)  # number of 3x3 convolutions in each block of VGG-19, up to relu5_1
BLOCK_CHANNELS = (64, 128, 256, 512, 512)
TILE_CUTS = (10, 19)  # first layers after pool2 and pool3, before which tiles are joined to whole maps

# The file name ends with the first digits of the file's SHA-256
IMAGENET_URL = "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth"
DOWNLOAD_TIMEOUT = 20  # the download is given up after this many seconds without an answer from the server
RANDOM_SEED = 19  # seed of random VGG-19 weights, which is fixed so that all runs use equal weights


class Pixels(nn.Module):
    """Stage 0: the pixels themselves are the features, (B, 3, H, W) -> (B, 3, H, W)."""

    channels = 3
    stride = 1

    def forward(self, x: Tensor) -> Tensor:
        return x


class VGG19Stage(nn.Module):
    """The feature maps of one stage of VGG-19: x (B, 3, H, W) in [0, 1] -> (B, channels, H / stride, W / stride).

    The weights are random until `load_pretrained` is called.

    Args:
        stage: 1 to 5. The features are the output of layer relu{stage}_1.

    Raises:
        UserError: if the stage is not 1 to 5.
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
        """Load the weights of VGG-19. The arguments are explained in `load_vgg`.

        Returns:
            the record {"source", "fingerprint"} of the weights.
        """
        self.vgg, record = load_vgg(source, trained_with, name)
        return record

    def set_tile(self, side: int) -> None:
        """Set the side of the tiles for inference without gradients, in pixels of the image."""
        self.vgg.tile = side // 4


class VGG19(nn.Module):
    """VGG-19 up to layer relu5_1, which returns the feature maps of one or more stages.

    Release: the released code gives VGG-19 RGB images in [0, 1] without normalisation by ImageNet's mean and standard
    deviation. The released detectors were trained on features of images without this normalisation.
    """

    def __init__(self):
        super().__init__()
        layers = []
        in_channels = 3
        for block, (count, channels) in enumerate(zip(CONVOLUTIONS, BLOCK_CHANNELS, strict=True)):
            if block > 0:
                layers.append(nn.MaxPool2d(2))
            for _ in range(count):
                # skip_init leaves the 13 layers uninitialised, because initialising takes longer than loading weights
                layers.append(nn.utils.skip_init(nn.Conv2d, in_channels, channels, kernel_size=3, padding=1))
                layers.append(nn.ReLU(inplace=True))
                in_channels = channels
        self.features = nn.Sequential(*layers)
        self.requires_grad_(False)
        # Side of the tiles for inference without gradients, in pixels of the map that is cut into tiles
        self.tile = 256

    def forward(self, x: Tensor, stages: Iterable[int] = STAGES) -> dict[int, Tensor]:
        """Compute the feature maps of the given stages.

        Args:
            x: (B, 3, H, W) in [0, 1].
            stages: numbers from 1 to 5.

        Returns:
            {k: (B, STAGE_CHANNELS[k], H / 2^(k-1), W / 2^(k-1))} for each k in `stages`.
        """
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
        """Run the layers start to end - 1 on whole maps."""
        return self.features[start:end](x)

    def run_in_tiles(self, start: int, end: int, x: Tensor) -> Tensor:
        """Run the layers start to end - 1 tile by tile, because VGG-19 has the largest maps of the whole detector."""
        cuts = [cut for cut in TILE_CUTS if start < cut < end]
        for first, last in pairwise([start, *cuts, end]):
            layers = self.features[first:last]
            halo, stride = receptive_field(layers)
            x = in_tiles(layers, x, side=self.tile, halo=halo, scale=Fraction(1, stride))
        return x

    def train(self, mode: bool = True) -> "VGG19":
        """Stay in evaluation mode, because VGG-19 is never trained."""
        return super().train(False)


def receptive_field(layers: Iterable[nn.Module]) -> tuple[int, int]:
    """Compute the reach and the total stride of a stack of 3x3 convolutions and 2x2 poolings.

    The reach is the number of pixels to each side on which an output value depends, rounded up to a multiple of the
    stride.
    """
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
    """Return the name in FEATURES and the arguments for which `--idx-stages STAGE` stands."""
    if stage == 0:
        return "pixels", {}
    return "vgg19", {"stage": stage}


def stages_with_channels(channels: int) -> list[int]:
    """Return the stages whose features have `channels` channels."""
    every_stage = {0: Pixels.channels, **STAGE_CHANNELS}
    return [stage for stage, count in every_stage.items() if count == channels]


# --- the weights of VGG-19 ----------------------------------------------------------------------------------


def load_vgg(source: str, trained_with: Mapping | None = None, name: str = "") -> tuple[VGG19, dict]:
    """Create VGG-19 with its weights.

    Args:
        source: value of `--vgg-weights`. "imagenet" takes torchvision's weights from torch hub's cache or downloads
            them. "random" draws fixed-seed random weights. "auto" takes the source in `trained_with`. For a new
            training, "auto" means imagenet or, if the ImageNet weights cannot be downloaded, random. Any other value is
            the path of a torchvision vgg19 state dict with float values. Only entries named `features.*` are needed.
        trained_with: record of the VGG-19 weights in a trained checkpoint. None: a new training begins.
        name: name of the trained checkpoint, for error messages.

    Returns:
        VGG-19, and the record {"source", "fingerprint"} of its weights for checkpoints.

    Raises:
        UserError: if the weights cannot be read, or if they are not the weights that `trained_with` records.
    """
    if source == "auto" and trained_with is not None:
        source = trained_with["source"]
    content, found = _vgg_weights(source)
    shown = f"{printable(found)}, read as torchvision's vgg19,"
    vgg = VGG19()
    state = {key: value.float() for key, value in state_dict_of(content, shown).items() if key in vgg.state_dict()}
    load_weights(vgg, state, shown)
    record = {"source": found, "fingerprint": compute_fingerprint(vgg)}
    if trained_with is None:
        return vgg, record
    expected = trained_with.get("fingerprint")
    if expected is None and record["source"] == "random":
        raise UserError(f"{name} needs ImageNet weights for VGG-19, got random ones: pass --vgg-weights FILE")
    if expected not in (None, record["fingerprint"]):
        raise UserError(
            f"{name} was trained with VGG-19 weights of fingerprint {expected} ({printable(trained_with['source'])}),"
            f" and {printable(record['source'])} has the fingerprint {record['fingerprint']}: give the VGG-19 weights"
            " of this training with --vgg-weights"
        )
    return vgg, record


def _vgg_weights(source: str) -> tuple[Mapping, str]:
    """Read the VGG-19 weights that `source` names.

    Returns:
        a state dict or a checkpoint with a state dict, and the origin of the weights: "imagenet", "random" or the path.
    """
    if source in ("imagenet", "auto"):
        try:
            return load_checkpoint(_imagenet_file()), "imagenet"
        except OSError as error:
            reason = " ".join(str(error).split())
            if source == "imagenet":
                raise UserError(
                    f"no ImageNet weights for VGG-19 in torch hub's cache ({torch.hub.get_dir()}), and they cannot be"
                    f" downloaded ({reason}): copy them into this cache, or pass --vgg-weights FILE"
                ) from None
        logger.warning(
            "WARNING: no ImageNet weights for VGG-19 on this machine, and they cannot be downloaded. This training uses"
            " fixed-seed RANDOM VGG-19 weights instead, unlike the paper. The checkpoints record the random weights."
            " Pass --vgg-weights FILE to use ImageNet weights."
        )
    if source in ("random", "auto"):
        return _random_weights(), "random"
    if not Path(source).is_file():
        raise UserError(f"no VGG-19 weights at {printable(source)}: pass --vgg-weights FILE, imagenet, random or auto")
    return load_checkpoint(source), source


def _random_weights() -> dict[str, Tensor]:
    """Draw random VGG-19 weights as in He et al. (ICCV 2015), which give the maps of all stages a similar scale."""
    generator = torch.Generator().manual_seed(RANDOM_SEED)
    state = VGG19().state_dict()
    for key, tensor in state.items():
        tensor.zero_()
        if key.endswith(".weight"):
            fan_in = tensor[0].numel()
            tensor.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
    return state


def _imagenet_file() -> Path:
    """Return the path of torchvision's VGG-19 weights in torch hub's cache. A missing file is downloaded.

    Raises:
        OSError: if the file is missing and cannot be downloaded.
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
        except RuntimeError as error:  # torch.hub raises it if the hash of the download is wrong
            raise OSError(str(error)) from None
        finally:
            socket.setdefaulttimeout(timeout)
    if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(digest):
        raise UserError(f"{path} is damaged: its SHA-256 must start with {digest}; delete it and try again")
    return path
