"""Networks without parameters that replace the re-synthesizer in control experiments."""

import torch.nn.functional as F
from torch import Tensor, nn


class Bicubic(nn.Module):
    """A re-synthesizer that enlarges images (B, 3, h, w) by the factor `scale` with bicubic interpolation.

    The results (B, 3, scale * h, scale * w) are not clipped to [0, 1].
    """

    def __init__(self, scale: int = 4):
        super().__init__()
        self.scale = scale

    def forward(self, x_lr: Tensor) -> Tensor:
        return F.interpolate(x_lr, scale_factor=self.scale, mode="bicubic")  # (B, 3, H, W)


class NoResynthesis(nn.Module):
    """A substitute for the re-synthesizer that returns black images (B, 3, scale * h, scale * w).

    The re-synthesis x_hat is a black image, so the absolute residual |x_hat - x| of the pixels is the image x itself.
    The VGG-19 features of a black image are not zero, because the convolutions have biases.
    """

    def __init__(self, scale: int = 4):
        super().__init__()
        self.scale = scale

    def forward(self, x_lr: Tensor) -> Tensor:
        batch, channels, height, width = x_lr.shape
        return x_lr.new_zeros(batch, channels, self.scale * height, self.scale * width)  # (B, 3, H, W)
