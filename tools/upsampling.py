"""Simulate the traces of generators: halve images, and up-sample them as the last layers of a generator do.

Up-sampling leaves periodic traces in images of any content (Zhang, Karaman, Chang: Detecting and simulating artifacts
in GAN fake images, WIFS 2019). ProGAN uses `nearest` up-sampling, and StyleGAN uses `bilinear` up-sampling.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("nearest", "bilinear")
FILTER_WEIGHT = (0.05, 0.25)  # range of the two outer weights of the random convolution, whose centre weight is 1
NOISE = 0.4  # standard deviation of the noise after up-sampling, as a fraction of the strength of fine detail
BINOMIAL = torch.tensor([0.25, 0.5, 0.25])  # low-pass filter; fine detail = image - filtered image
STRONGEST_GAIN = 3.0  # upper limit of the factor by which fine detail is amplified


def halve_and_upsample(x: Tensor, kind: str, rng: np.random.Generator) -> Tensor:
    """Halve images, up-sample them, add noise, and convolve them with a random filter.

    Fine detail is then amplified to its strength in `x`, so that a detector cannot recognise fakes by sharpness alone.

    Args:
        x: (B, 3, H, W) in [0, 1], H and W even and at least 4.
        kind: kind of up-sampling, "nearest" or "bilinear".
        rng: random generator for noise and filter.
    Returns:
        (B, 3, H, W) in [0, 1].
    """
    half = F.interpolate(x, scale_factor=0.5, mode="bicubic", antialias=True)  # (B, 3, H / 2, W / 2)
    fake = F.interpolate(half, scale_factor=2, mode=kind)  # (B, 3, H, W)
    strength = (x - convolve_rows_and_columns(x, BINOMIAL)).abs().mean(dim=(1, 2, 3), keepdim=True)  # (B, 1, 1, 1)
    noise = torch.from_numpy(rng.standard_normal(x.shape, dtype=np.float32))
    fake = fake + NOISE * strength * noise
    outer = rng.uniform(*FILTER_WEIGHT)
    fake = convolve_rows_and_columns(fake, torch.tensor([outer, 1.0, outer]) / (1 + 2 * outer))
    detail = fake - convolve_rows_and_columns(fake, BINOMIAL)
    gain = strength / detail.abs().mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-6)
    return (fake + (gain.clamp(1, STRONGEST_GAIN) - 1) * detail).clamp(0, 1)


def convolve_rows_and_columns(x: Tensor, line: Tensor) -> Tensor:
    """Convolve each channel with three weights along the rows, and with the same weights along the columns.

    Args:
        x: (B, 3, H, W).
        line: the three weights.
    Returns:
        (B, 3, H, W).
    """
    kernel = torch.outer(line, line).expand(3, 1, 3, 3)
    padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
    return F.conv2d(padded, kernel, groups=3)
