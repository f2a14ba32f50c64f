"""Simulated generators: halve pictures and bring them back to their size, as the last layers of a generator do.

Up-sampling leaves periodic traces, whatever the picture shows (Zhang, Karaman, Chang: Detecting and simulating artifacts in
GAN fake images, WIFS 2019). `nearest` is the up-sampling of ProGAN, `bilinear` the up-sampling of StyleGAN.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("nearest", "bilinear")
FILTER_WEIGHT = (0.05, 0.25)  # range of the outer weights of the convolution after up-sampling; its centre weight is 1
NOISE = 0.4  # standard deviation of the noise after up-sampling, as a fraction of the strength of fine detail
BINOMIAL = torch.tensor([0.25, 0.5, 0.25])  # what this filter removes is fine detail
STRONGEST_GAIN = 3.0  # limit of the factor that restores fine detail


def upsample_again(x: Tensor, kind: str, rng: np.random.Generator) -> Tensor:
    """Halve pictures, up-sample them, and convolve them.

    Fine detail is then amplified until it is as strong as before: sharpness alone should not give a fake away.

    Args:
        x: (B, 3, H, W) in [0, 1], H and W even and at least 4.
        kind: "nearest" or "bilinear".
        rng: draws the convolution.
    Returns:
        (B, 3, H, W) in [0, 1].
    """
    half = F.interpolate(x, scale_factor=0.5, mode="bicubic", antialias=True)  # (B, 3, H / 2, W / 2)
    fake = F.interpolate(half, scale_factor=2, mode=kind)  # (B, 3, H, W)
    strength = (x - convolve(x, BINOMIAL)).abs().mean(dim=(1, 2, 3), keepdim=True)  # (B, 1, 1, 1)
    noise = torch.from_numpy(rng.standard_normal(x.shape, dtype=np.float32))
    fake = fake + NOISE * strength * noise
    outer = rng.uniform(*FILTER_WEIGHT)
    fake = convolve(fake, torch.tensor([outer, 1.0, outer]) / (1 + 2 * outer))
    detail = fake - convolve(fake, BINOMIAL)
    gain = strength / detail.abs().mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-6)
    return (fake + (gain.clamp(1, STRONGEST_GAIN) - 1) * detail).clamp(0, 1)


def convolve(x: Tensor, line: Tensor) -> Tensor:
    """Convolve each channel with the same three weights along rows and columns. x: (B, 3, H, W). Returns (B, 3, H, W)."""
    kernel = torch.outer(line, line).expand(3, 1, 3, 3)
    padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
    return F.conv2d(padded, kernel, groups=3)
