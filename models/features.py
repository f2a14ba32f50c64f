"""Features by which an image and its re-synthesis are compared: the pixels, or the feature maps of VGG-19.

The features of stage k = 1..5 are the output of layer relu{k}_1 of VGG-19.

VGG-19 is from Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition" (ICLR 2015).
The parameters of VGG-19 have the same names as in torchvision, so that torchvision's ImageNet weights can be loaded.
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

from models.released import extract_state_dict
from models.tiling import apply_function_in_tiles
from utils.checkpoints import compute_fingerprint, load_weights, read_checkpoint_content
from utils.console import make_printable
from utils.errors import UserError, describe_exception

logger = logging.getLogger(__name__)

STAGES = (1, 2, 3, 4, 5)
STAGE_CHANNELS = {1: 64, 2: 128, 3: 256, 4: 512, 5: 512}
STAGE_STRIDES = {1: 1, 2: 2, 3: 4, 4: 8, 5: 16}
STAGE_LAYERS = {1: 1, 2: 6, 3: 11, 4: 20, 5: 29}  # index of layer relu{k}_1 in torchvision's vgg19().features
CONVOLUTIONS = (2, 2, 4, 4, 1)  # number of 3x3 convolutions in each block of VGG-19, up to relu5_1
BLOCK_CHANNELS = (64, 128, 256, 512, 512)
# TILE_CUTS contains the indices of the layers (after pool2 and pool3) before which feature maps are cut into new tiles.
TILE_CUTS = (10, 19)

# The digits dcbb9e9d in the name of the VGG-19 file are the first 8 hexadecimal digits of the file's SHA-256
IMAGENET_URL = "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth"
DOWNLOAD_TIMEOUT = 20  # number of seconds without an answer of the server after which the download is stopped
RANDOM_SEED = 19  # seed of the random VGG-19 weights, fixed so that all runs use the same weights


class Pixels(nn.Module):
    """A network that returns its input x (B, 3, H, W), because the features of stage 0 are the pixels."""

    channels = 3
    stride = 1

    def forward(self, x: Tensor) -> Tensor:
        return x


class VGG19Stage(nn.Module):
    """A network that computes the feature maps (B, channels, H / stride, W / stride) of one stage of VGG-19.

    The network reads images (B, 3, H, W) in [0, 1]. The weights of the network are uninitialized until
    `load_pretrained` is called.

    Raises:
        UserError: if `stage` is not 1, 2, 3, 4 or 5.
    """

    def __init__(self, stage: int = 5):
        super().__init__()
        if stage not in STAGES:
            raise UserError(f"the stage of VGG-19 must be 1, 2, 3, 4 or 5, got {stage}")
        self.stage = stage
        self.channels = STAGE_CHANNELS[stage]
        self.stride = STAGE_STRIDES[stage]
        self.vgg = VGG19()

    def forward(self, x: Tensor) -> Tensor:
        return self.vgg(x, [self.stage])[self.stage]  # (B, C_l, H_l, W_l)

    def load_pretrained(self, source: str, trained_with: Mapping | None, name: str) -> dict:
        """Load the weights of VGG-19. For the arguments, see `load_vgg`.

        Returns:
            a dict with the source and the fingerprint of the weights.
        """
        self.vgg, record = load_vgg(source, trained_with, name)
        return record

    def set_tile_side(self, side: int) -> None:
        """Set the side length of the tiles in which VGG-19 processes images when gradients are disabled.

        Args:
            side: side of the detector's tiles in pixels of the image, four times the side of VGG-19's tiles.
        """
        self.vgg.tile = side // 4


class VGG19(nn.Module):
    """A VGG-19 without the layers after relu5_1, which returns the feature maps of one or more stages.

    Release: the code of the paper's authors does not normalize images by ImageNet's mean and standard deviation before
    VGG-19. `VGG19` does not normalize images, because the paper's authors trained their detectors without
    normalization.
    """

    def __init__(self):
        super().__init__()
        layers = []
        in_channels = 3
        for block, (count, channels) in enumerate(zip(CONVOLUTIONS, BLOCK_CHANNELS, strict=True)):
            if block > 0:
                layers.append(nn.MaxPool2d(2))
            for _ in range(count):
                # To save time, skip_init does not initialize the weights, which are loaded or drawn after construction
                layers.append(nn.utils.skip_init(nn.Conv2d, in_channels, channels, kernel_size=3, padding=1))
                layers.append(nn.ReLU(inplace=True))
                in_channels = channels
        self.features = nn.Sequential(*layers)
        self.requires_grad_(False)
        self.tile = 256  # side of a tile in pixels, the same for the image and for all feature maps

    def forward(self, x: Tensor, stages: Iterable[int] = STAGES) -> dict[int, Tensor]:
        """Compute the feature maps of the given stages (1 to 5) of VGG-19.

        Args:
            x: images (B, 3, H, W) in [0, 1].

        Returns:
            a dict from each number k in `stages` to the feature maps (B, STAGE_CHANNELS[k], H / 2^(k-1), W / 2^(k-1)).
        """
        run_part = self.run_layers_on_whole_maps if torch.is_grad_enabled() else self.run_layers_in_tiles
        maps = {}
        start = 0
        for k in sorted(stages):
            end = STAGE_LAYERS[k] + 1
            x = run_part(start, end, x)
            maps[k] = x
            start = end
        return maps

    def run_layers_on_whole_maps(self, start: int, end: int, x: Tensor) -> Tensor:
        """Run the layers with the indices `start` to `end - 1` of VGG-19 on whole feature maps."""
        return self.features[start:end](x)

    def run_layers_in_tiles(self, start: int, end: int, x: Tensor) -> Tensor:
        """Run the layers `start` to `end - 1` of VGG-19 on one tile of the feature maps at a time, to save memory."""
        cuts = [cut for cut in TILE_CUTS if start < cut < end]
        for first, last in pairwise([start, *cuts, end]):
            layers = self.features[first:last]
            halo, stride = compute_receptive_radius_and_stride(layers)
            x = apply_function_in_tiles(layers, x, side=self.tile, halo=halo, scale=Fraction(1, stride))
        return x

    def train(self, mode: bool = True) -> "VGG19":
        """Keep VGG-19 in evaluation mode, and ignore `mode`, because VGG-19 is never trained."""
        return super().train(False)


def compute_receptive_radius_and_stride(layers: Iterable[nn.Module]) -> tuple[int, int]:
    """Compute the receptive radius and the total stride of a sequence of 3x3 convolutions and 2x2 poolings.

    The receptive radius is the largest distance between a tile of the input and an input pixel on which the output for
    the tile depends. The returned radius is rounded up to a multiple of the total stride.

    Returns:
        the receptive radius and the total stride, in pixels of the input.
    """
    reach = 0
    stride = 1
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            reach += stride
        elif isinstance(layer, nn.MaxPool2d):
            stride *= 2
    return math.ceil(reach / stride) * stride, stride


# --- the option --idx-stages --------------------------------------------------------------------------------


def get_features_name_and_arguments_of_stage(stage: int) -> tuple[str, dict]:
    """Return the name and the constructor arguments of the network that computes the features of a stage (0 to 5)."""
    if stage == 0:
        return "pixels", {}
    return "vgg19", {"stage": stage}


def find_stages_by_channel_count(channels: int) -> list[int]:
    """Return the numbers of the stages (0 to 5) whose features have `channels` channels."""
    every_stage = {0: Pixels.channels, **STAGE_CHANNELS}
    return [stage for stage, count in every_stage.items() if count == channels]


# --- the weights of VGG-19 ----------------------------------------------------------------------------------


def load_vgg(source: str, trained_with: Mapping | None = None, name: str = "") -> tuple[VGG19, dict]:
    """Create VGG-19, and load its weights.

    Args:
        source: value of `--vgg-weights`: "imagenet", "random", "auto", or the path of a state dict of torchvision's
            vgg19. "imagenet" loads torchvision's ImageNet weights from the cache of torch hub, or downloads them.
            "random" draws random weights with a fixed seed. "auto" uses the source in `trained_with`. If
            `trained_with` is None, "auto" means "imagenet", or "random" if the ImageNet weights cannot be downloaded.
        trained_with: dict with the "source" and the "fingerprint" of the VGG-19 weights that must be loaded, or None if
            any weights may be loaded. If the fingerprint is None or missing, any weights except "random" may be loaded.
        name: name of the checkpoint for error messages.

    Returns:
        VGG-19, and a dict with the source and the fingerprint of its weights.

    Raises:
        UserError: if the weights cannot be read, or if they differ from the weights in `trained_with`.
    """
    if source == "auto" and trained_with is not None:
        source = trained_with["source"]
    content, found = _read_vgg_weights(source)
    shown = f"{make_printable(found)}, read as torchvision's vgg19,"
    vgg = VGG19()
    state = {key: value.float() for key, value in extract_state_dict(content, shown).items() if key in vgg.state_dict()}
    load_weights(vgg, state, shown)
    record = {"source": found, "fingerprint": compute_fingerprint(vgg)}
    if trained_with is None:
        return vgg, record
    expected = trained_with.get("fingerprint")
    if expected is None and record["source"] == "random":
        raise UserError(
            f"{name} was trained with ImageNet weights for VGG-19, but --vgg-weights is random: pass --vgg-weights"
            " imagenet, or the path of a file of ImageNet weights"
        )
    if expected not in (None, record["fingerprint"]):
        raise UserError(
            f"{name} was trained with other VGG-19 weights: expected {make_printable(trained_with['source'])} with the"
            f" fingerprint {expected}, got {make_printable(record['source'])} with the fingerprint"
            f" {record['fingerprint']}; pass the expected weights with --vgg-weights"
        )
    return vgg, record


def _read_vgg_weights(source: str) -> tuple[Mapping, str]:
    """Read or draw the VGG-19 weights that `source` names ("imagenet", "random", "auto" or a path).

    Returns:
        a state dict, or a checkpoint that contains one, and its source: "imagenet", "random" or a path.
    """
    if source in ("imagenet", "auto"):
        try:
            return read_checkpoint_content(_find_or_download_imagenet_weights()), "imagenet"
        except OSError as error:
            reason = describe_exception(error)
            if source == "imagenet":
                raise UserError(
                    "the ImageNet weights for VGG-19 are not in torch hub's cache and cannot be downloaded"
                    f" ({reason}): copy the file {Path(IMAGENET_URL).name} into the folder"
                    f" {Path(torch.hub.get_dir(), 'checkpoints')}, or pass --vgg-weights FILE"
                ) from None
        logger.warning(
            "WARNING: the ImageNet weights for VGG-19 are not on this machine and cannot be downloaded. This training"
            " uses RANDOM VGG-19 weights, unlike the paper. To use ImageNet weights, pass --vgg-weights FILE."
        )
    if source in ("random", "auto"):
        return _draw_random_vgg_weights(), "random"
    if not Path(source).is_file():
        raise UserError(
            f"no file {make_printable(source)} for --vgg-weights: expected an existing file, imagenet, random or auto"
        )
    return read_checkpoint_content(source), source


def _draw_random_vgg_weights() -> dict[str, Tensor]:
    """Draw random VGG-19 weights as in He et al. (ICCV 2015)."""
    generator = torch.Generator().manual_seed(RANDOM_SEED)
    state = VGG19().state_dict()
    for key, tensor in state.items():
        tensor.zero_()
        if key.endswith(".weight"):
            fan_in = tensor[0].numel()
            tensor.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
    return state


def _find_or_download_imagenet_weights() -> Path:
    """Return the path of torchvision's VGG-19 weights in torch hub's cache, and download the file if it is missing."""
    path = Path(torch.hub.get_dir(), "checkpoints", Path(IMAGENET_URL).name)
    digest = path.stem.partition("-")[2]
    if not path.is_file():
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(IMAGENET_URL, str(path), hash_prefix=digest)
        except RuntimeError as error:  # torch.hub raises a RuntimeError if the hash of the downloaded file is wrong
            raise OSError(str(error)) from None
        finally:
            socket.setdefaulttimeout(timeout)
    if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(digest):
        raise UserError(
            f"{path} is damaged, because its SHA-256 does not start with {digest}: delete the file and try again"
        )
    return path
