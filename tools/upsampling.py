"""Simulate the traces that up-sampling layers of generators leave in images.

Up-sampling leaves periodic traces in images of any content (Zhang, Karaman, Chang: Detecting and simulating artifacts
in GAN fake images, WIFS 2019). ProGAN up-samples by nearest-neighbour interpolation, and StyleGAN by bilinear
interpolation.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("nearest", "bilinear")
FILTER_WEIGHT = (0.05, 0.25)  # range of the outer weights of the random 3-tap filter; the centre weight is 1
NOISE = 0.4  # standard deviation of the noise, as a multiple of the mean of |image - low-pass filtered image|
BINOMIAL = torch.tensor([0.25, 0.5, 0.25])  # weights of a 3-tap low-pass filter
STRONGEST_GAIN = 3.0  # largest factor by which fine detail is amplified


def halve_and_upsample(x: Tensor, kind: str, rng: np.random.Generator) -> Tensor:
    """Reduce images to half their size, up-sample them, add noise, and convolve them with a random filter.

    The images are also sharpened, because a detector could otherwise recognise fake images by blur alone.

    Args:
        x: the images, (B, 3, H, W) in [0, 1]. H and W must be even and at least 4.
        kind: kind of up-sampling, "nearest" or "bilinear".
    Returns:
        The images with the traces of up-sampling, (B, 3, H, W) in [0, 1].
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
    """Convolve each channel of images x (B, 3, H, W) with the three weights `line` along the rows and the columns."""
    kernel = torch.outer(line, line).expand(3, 1, 3, 3)
    padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
    return F.conv2d(padded, kernel, groups=3)
