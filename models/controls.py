"""Controls for experiments: re-synthesis that learns nothing, and no re-synthesis at all.

A detector on `bicubic` shows what *learned* re-synthesis adds. A detector on `none` shows what *any* re-synthesis adds.
Neither has parameters, so neither needs a weights file.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class Bicubic(nn.Module):
    """Bicubic up-sampling: x_lr (B, 3, h, w) in [0, 1] -> x_hat (B, 3, scale * h, scale * w), not clipped."""

    def __init__(self, scale: int = 4):
        super().__init__()
        self.scale = scale

    def forward(self, x_lr: Tensor) -> Tensor:
        return F.interpolate(x_lr, scale_factor=self.scale, mode="bicubic")  # (B, 3, H, W)


class NoResynthesis(nn.Module):
    """x_lr (B, 3, h, w) -> zeros (B, 3, scale * h, scale * w).

    The residual in pixels is then the image itself. In VGG-19 features it is the distance between the image and
    a black image, whose features differ from zero because of the biases.
    """

    def __init__(self, scale: int = 4):
        super().__init__()
        self.scale = scale

    def forward(self, x_lr: Tensor) -> Tensor:
        batch, channels, height, width = x_lr.shape
        return x_lr.new_zeros(batch, channels, self.scale * height, self.scale * width)  # (B, 3, H, W)
