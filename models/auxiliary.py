"""Auxiliary tasks for the re-synthesizer: how its input is degraded, and the losses it is trained with.

Asking RDN to denoise or to colorize as well as to super-resolve makes the residual robust (section 3.3 of the paper).
One copy for both users: train_sr.py degrades patches (`degrade_patch`), train_detector.py whole batches (the heads).
A new task is a class with a `degrade` and a line in HEADS.

All inputs are low-resolution images in [0, 1]; what comes out may leave that range by the noise added.
"""

import io
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from models.resynthesis import ResynthesisDetector
from models.vgg import STAGES, VGGStages, perceptual_distance

VGG_LOSS_WEIGHT = 0.2  # of the perceptual term in the super-resolution loss (--vgg-lambda)
DEGRADE_PROBABILITY = 0.5  # of the auxiliary task on a batch; otherwise its loss is taken on the clean batch
PATCH_PROBABILITY = 1 - math.sqrt(0.5)  # of each degradation of a training patch: two of them miss every other patch


def uniform(low: float, high: float, generator: torch.Generator) -> float:
    """One draw from U(low, high)."""
    return low + (high - low) * torch.rand((), generator=generator).item()


def add_noise(image: Tensor, std: float, generator: torch.Generator) -> Tensor:
    """Gaussian noise of standard deviation `std` (1 = the whole range) on (3, h, w)."""
    return image + std * torch.randn(image.shape, generator=generator).to(image)


def random_mask(image: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """True at about a share `density` of the pixels of (3, h, w): a (1, h, w) mask."""
    return (torch.rand((1, *image.shape[1:]), generator=generator) < density).to(image.device)


def remove_colour(image: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """A share `density` of the pixels of (3, h, w) set to the mean of their channels."""
    return torch.where(random_mask(image, density, generator), image.mean(dim=0, keepdim=True), image)


def remove_pixels(image: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """A share `density` of the pixels of (3, h, w) set to 0."""
    return image.masked_fill(random_mask(image, density, generator), 0.0)


def compress_jpeg(image: Tensor, quality: int) -> Tensor:
    """(3, h, w) after JPEG compression of that quality, in [0, 1]."""
    pixels = (image * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).cpu().numpy()  # (h, w, 3)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    compressed = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)  # (3, h, w)
    return compressed.to(image) / 255


class ColorizationHead:
    """Give colour back to random grey pixels: one density for the batch, one mask for each image."""

    DENSITY = (0.1, 0.25)

    def degrade(self, x_lr: Tensor, batch_rng: torch.Generator, image_rngs: list[torch.Generator]) -> Tensor:
        """x_lr: (B, 3, h, w). One generator for what the batch shares, one an image for the rest."""
        density = uniform(*self.DENSITY, batch_rng)
        return torch.stack([remove_colour(image, density, rng) for image, rng in zip(x_lr, image_rngs, strict=True)])


class DenoisingHead:
    """Take Gaussian noise of standard deviation 4/255 off again."""

    STD = 4 / 255

    def degrade(self, x_lr: Tensor, batch_rng: torch.Generator, image_rngs: list[torch.Generator]) -> Tensor:
        """x_lr: (B, 3, h, w). One generator an image; the batch shares nothing."""
        return torch.stack([add_noise(image, self.STD, rng) for image, rng in zip(x_lr, image_rngs, strict=True)])


HEADS = {"none": None, "colorization": ColorizationHead, "denoising": DenoisingHead}  # --mode-sr


def degrade_patch(
    patch: Tensor, generator: torch.Generator, augment: bool, completion: bool, colorization: bool
) -> Tensor:
    """Degrade one training patch (3, h, w) in [0, 1] for train_sr.py, each way with PATCH_PROBABILITY.

    augment: noise of std U(0, 10)/255, then JPEG of quality 25..74 (the release computes the JPEG image and drops
    it). completion: U(.05, .15) of the pixels set to 0. colorization: such a share set to their channels' mean.
    """

    def chosen() -> bool:
        return uniform(0, 1, generator) < PATCH_PROBABILITY

    if augment and chosen():
        patch = add_noise(patch, uniform(0, 10, generator) / 255, generator)
    if augment and chosen():
        patch = compress_jpeg(patch, int(torch.randint(25, 75, (), generator=generator)))
    if completion and chosen():
        patch = remove_pixels(patch, uniform(0.05, 0.15, generator), generator)
    if colorization and chosen():
        patch = remove_colour(patch, uniform(0.05, 0.15, generator), generator)
    return patch


def super_resolution_loss(
    x_hat: Tensor, x: Tensor, maps_hat: dict[int, Tensor], maps: dict[int, Tensor], vgg_weight: float
) -> tuple[Tensor, Tensor]:
    """L1 + vgg_weight * sum_k w_k MSE(VGG_k(x_hat), VGG_k(x)): (loss, its L1 part), scalars."""
    l1 = F.l1_loss(x_hat, x)
    if vgg_weight == 0:
        return l1, l1
    return l1 + vgg_weight * perceptual_distance(maps_hat, maps, F.mse_loss), l1


def auxiliary_loss(x_hat: Tensor, x: Tensor, maps_hat: dict[int, Tensor], maps: dict[int, Tensor]) -> Tensor:
    """L1(x_hat, x) + sum_k w_k L1(VGG_k(x_hat), VGG_k(x)), a scalar: the loss of the auxiliary tasks."""
    return F.l1_loss(x_hat, x) + perceptual_distance(maps_hat, maps, F.l1_loss)


def residual_and_auxiliary_loss(
    detector: ResynthesisDetector,
    vgg: VGGStages | None,
    x: Tensor,
    real: Tensor,
    auxiliary: bool,
    degraded: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One pass for both losses of end-to-end training, sharing what they share.

    Args:
        vgg: the features of the auxiliary loss, and the detector's own; may be None where neither is asked for.
        x: (B, 3, H, W) in [0, 1].
        real: (B,) bool, which of them are real: only these enter the auxiliary loss.
        auxiliary: whether that loss is wanted, for at least one real image.
        degraded: (R, 3, h, w) the degraded low-resolution reals, or None to take the loss on the clean ones,
            whose re-synthesis is then the one the residual is made of.

    Returns:
        (residual (B, C_l, H_l, W_l), auxiliary loss of the R reals, a scalar: 0 without).
    """
    stage = detector.stage
    shared = auxiliary and stage > 0  # the features that make the residual serve the loss as well
    x_hat = detector.resynthesize(x)  # (B, 3, H, W)
    if stage > 0:
        with torch.no_grad():
            maps = vgg(x, STAGES if shared else [stage])
        maps_hat = vgg(x_hat, STAGES if shared and degraded is None else [stage])
        residual = detector.difference(maps_hat[stage], maps[stage])  # (B, C_l, H_l, W_l)
    else:
        residual = detector.difference(x_hat, x)  # (B, 3, H, W)
    if not auxiliary:
        return residual, residual.new_zeros(())

    target = x[real]  # (R, 3, H, W)
    with torch.no_grad():
        target_maps = {k: maps[k][real] for k in STAGES} if shared else vgg(target, STAGES)
    if degraded is not None:
        brought_back = detector.resynthesizer(degraded)  # (R, 3, H, W)
        maps_back = vgg(brought_back, STAGES)
    else:
        brought_back = x_hat[real]  # (R, 3, H, W)
        maps_back = {k: maps_hat[k][real] for k in STAGES} if shared else vgg(brought_back, STAGES)
    return residual, auxiliary_loss(brought_back, target, maps_back, target_maps)
