"""The VGG-19 features in which residuals and perceptual losses are measured. Frozen, always.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition" (ICLR 2015), with
torchvision's names and ImageNet weights. The stages and the loss weights are those of pix2pixHD (Wang et al., CVPR
2018).
"""

import math
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.tiling import in_tiles

STAGE_CHANNELS = (3, 64, 128, 256, 512, 512)  # of stage 0 (the pixels) and relu1_1 .. relu5_1
STAGE_LAYERS = (-1, 1, 6, 11, 20, 29)  # where each stage ends in torchvision's vgg19().features
STAGE_WEIGHTS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.0)  # of stages 1..5 in the perceptual losses
STAGES = (1, 2, 3, 4, 5)
CONVOLUTIONS = (2, 2, 4, 4, 1)  # of 3x3 in each block of one resolution, up to relu5_1
CUTS = (10, 19)  # layers after pool2 and pool3: where whole maps are made on the way if there are no gradients


class VGGStages(nn.Module):
    """VGG-19 up to relu5_1, giving the feature maps of the stages asked for.

    Release: the input is RGB in [0, 1] without ImageNet's mean and standard deviation taken off; the released
    detectors were trained on features computed so.
    """

    def __init__(self):
        super().__init__()
        layers, channels = [], STAGE_CHANNELS[0]
        for count, width in zip(CONVOLUTIONS, STAGE_CHANNELS[1:], strict=True):
            layers += [nn.MaxPool2d(2)] if layers else []
            for _ in range(count):
                convolution = nn.utils.skip_init(nn.Conv2d, channels, width, kernel_size=3, padding=1)
                layers += [convolution, nn.ReLU(inplace=True)]
                channels = width
        self.features = nn.Sequential(*layers)
        self.requires_grad_(False)
        self.tile = 256  # pixels: side of the tiles between cuts, measured in the map each begins with

    def forward(self, x: Tensor, stages: Iterable[int]) -> dict[int, Tensor]:
        """x: (B, 3, H, W) in [0, 1]. Returns {k: (B, STAGE_CHANNELS[k], H / 2^(k-1), W / 2^(k-1))} for k in stages."""
        maps, done, tiled = {}, 0, not torch.is_grad_enabled()
        for k in sorted(stages):
            end = STAGE_LAYERS[k] + 1
            for start, stop in pairwise([done, *(cut for cut in CUTS if tiled and done < cut < end), end]):
                layers = self.features[start:stop]
                halo, stride = reach(layers)
                # The maps within are the largest of all: they are made tile by tile
                x = in_tiles(layers, x, side=self.tile, halo=halo, scale=Fraction(1, stride)) if tiled else layers(x)
            maps[k], done = x, end
        return maps

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
    """sum_k w_k distance(maps[k], target[k]) over the five stages, accumulated in float32."""
    return sum(
        weight * distance(maps[k].float(), target[k].float()) for k, weight in zip(STAGES, STAGE_WEIGHTS, strict=True)
    )
