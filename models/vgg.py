"""The VGG-19 features in which residuals and perceptual losses are measured. Frozen, always.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition" (ICLR 2015), with
torchvision's ImageNet weights. The stages and the loss weights are those of pix2pixHD (Wang et al., CVPR 2018).
"""

import hashlib
import math
import socket
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import VGG19_Weights, vgg19

from models.errors import ModelError
from models.tiling import in_tiles

STAGE_CHANNELS = (3, 64, 128, 256, 512, 512)  # of stage 0 (the pixels) and relu1_1 .. relu5_1
STAGE_LAYERS = (-1, 1, 6, 11, 20, 29)  # where each stage ends in torchvision's vgg19().features
STAGE_WEIGHTS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.0)  # of stages 1..5 in the perceptual losses
STAGES = (1, 2, 3, 4, 5)
CUTS = (10, 19)  # layers after pool2 and pool3: where whole maps are made on the way if there are no gradients
RANDOM_SEED = 19  # of the stand-in weights: fixed, so that every run that needs them gets the same ones
DOWNLOAD_TIMEOUT = 20  # seconds without an answer before the download is given up


class VGGStages(nn.Module):
    """VGG-19 up to relu5_1, giving the feature maps of the stages asked for.

    Release: the input is RGB in [0, 1] without ImageNet's mean and standard deviation taken off; the released
    detectors were trained on features computed so.
    """

    def __init__(self):
        super().__init__()
        with torch.device("meta"):  # no time spent on initialising the classifier, which is thrown away
            features = vgg19(weights=None, init_weights=False).features[: STAGE_LAYERS[-1] + 1]
        self.features = features.to_empty(device="cpu")
        self.requires_grad_(False)
        self.tile = 256  # pixels: side of the tiles between cuts, measured in the map each begins with

    def forward(self, x: Tensor, stages: Iterable[int]) -> dict[int, Tensor]:
        """x: (B, 3, H, W) in [0, 1]. Returns {k: (B, STAGE_CHANNELS[k], H / 2^(k-1), W / 2^(k-1))} for k in stages."""
        maps, done = {}, 0
        for k in sorted(stages):
            end = STAGE_LAYERS[k] + 1
            cuts = [] if torch.is_grad_enabled() else [cut for cut in CUTS if done < cut < end]
            for start, stop in pairwise([done, *cuts, end]):
                x = self._run(self.features[start:stop], x)
            maps[k], done = x, end
        return maps

    def _run(self, layers: nn.Sequential, x: Tensor) -> Tensor:
        """Some of the layers; without gradients tile by tile, since the maps within are the largest of all."""
        if torch.is_grad_enabled():
            return layers(x)
        halo, stride = reach(layers)
        return in_tiles(layers, x, side=self.tile, halo=halo, scale=Fraction(1, stride))

    def train(self, mode: bool = True) -> "VGGStages":
        """Stays in evaluation mode: nothing in here is ever trained."""
        return super().train(False)


def reach(layers: Iterable[nn.Module]) -> tuple[int, int]:
    """How far 3x3 convolutions and 2x2 poolings see to each side, rounded up to whole strides; their stride."""
    halo, stride = 0, 1
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            halo += stride
        elif isinstance(layer, nn.MaxPool2d):
            stride *= 2
    return math.ceil(halo / stride) * stride, stride


def perceptual_distance(
    maps: Mapping[int, Tensor],
    target: Mapping[int, Tensor],
    distance: Callable[[Tensor, Tensor], Tensor] = F.mse_loss,
) -> Tensor:
    """sum_k w_k distance(maps[k], target[k]) over the five stages: a scalar, accumulated in float32."""
    return sum(
        weight * distance(maps[k].float(), target[k].float()) for k, weight in zip(STAGES, STAGE_WEIGHTS, strict=True)
    )


def vgg_weights(source: str) -> tuple[dict[str, Tensor], str]:
    """The weights of `VGGStages` and where they came from.

    Args:
        source: "imagenet" (torch hub cache, else downloaded; checked against torchvision's hash), "random" (fixed
            seed), "auto" (imagenet where it can be had, else random) or the path of a torchvision vgg19 state
            dict, of which the `features.*` entries suffice.

    Returns:
        (state dict, "imagenet" | "random" | path). With "auto" the caller warns if it comes out as "random".

    Raises:
        ModelError: if the file or the download is missing, damaged or of another network.
    """
    if source == "random":
        return _random_weights(), "random"
    if source in ("imagenet", "auto"):
        try:
            return _imagenet_weights(), "imagenet"
        except OSError as error:
            if source == "auto":
                return _random_weights(), "random"
            raise ModelError(
                f"no ImageNet weights for VGG-19: not under {_hub_file()} and not to be downloaded"
                f" ({' '.join(str(error).split())}); copy them there or pass --vgg-weights FILE"
            ) from None
    return _file_weights(Path(source)), source


def _random_weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(RANDOM_SEED)
    state = VGGStages().state_dict()
    for key, tensor in state.items():
        if key.endswith(".bias"):
            tensor.zero_()
        else:  # He et al. (ICCV 2015), so that the feature maps of all stages keep the scale of the image
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=generator)
    return state


def _hub_file() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / VGG19_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[1]


def _imagenet_weights() -> dict[str, Tensor]:
    """Raises OSError where they are neither in the cache nor to be downloaded."""
    cached = _hub_file()
    if cached.is_file():
        wanted = cached.stem.rsplit("-", 1)[1]  # torchvision names the file by the start of its SHA-256
        with cached.open("rb") as file:
            got = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else _sha256(file)
        if not got.hexdigest().startswith(wanted):
            raise ModelError(f"{cached} is damaged: its SHA-256 does not start with {wanted}; delete it and try again")
        return _file_weights(cached)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        state = VGG19_Weights.IMAGENET1K_V1.get_state_dict(progress=True, check_hash=True)
    except RuntimeError as error:  # torch's word for a download with the wrong hash
        raise OSError(str(error)) from None
    finally:
        socket.setdefaulttimeout(timeout)
    return _features_only(state, "the downloaded VGG-19 weights")


def _sha256(file):  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest


def _file_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ModelError(f"no VGG-19 weights at {path}: pass --vgg-weights auto, imagenet, random or an existing file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - torch raises anything from EOFError to UnpicklingError
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"cannot read VGG-19 weights from {path} ({reason[:120]}): the file is damaged") from None
    return _features_only(state, str(path))


def _features_only(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    wanted = VGGStages().state_dict()
    for key, tensor in wanted.items():
        got = tuple(state[key].shape) if isinstance(state, Mapping) and key in state else "nothing"
        if got != tuple(tensor.shape):
            raise ModelError(
                f"{name} is no torchvision vgg19 state dict: {key} should be {tuple(tensor.shape)}, got {got}"
            )
    return {key: state[key].float() for key in wanted}
