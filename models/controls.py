"""Control networks for experiments, which take the place of the re-synthesizer and have no parameters.

Comparing RDN with `bicubic` (bicubic interpolation) shows what *learned* re-synthesis contributes to detection.
Comparing RDN with `none` (a black image) shows what re-synthesis contributes at all.
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
    """A control without re-synthesis, which returns a black image: x_lr (B, 3, h, w) -> (B, 3, scale * h, scale * w).

    With a black image as re-synthesis, the residual in pixels is the image itself. The residual in VGG-19 features is
    the distance between the features of the image and the features of a black image, which the biases make non-zero.
    """

    def __init__(self, scale: int = 4):
        super().__init__()
        self.scale = scale

    def forward(self, x_lr: Tensor) -> Tensor:
        batch, channels, height, width = x_lr.shape
        return x_lr.new_zeros(batch, channels, self.scale * height, self.scale * width)  # (B, 3, H, W)
