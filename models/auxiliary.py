"""Auxiliary tasks for the re-synthesizer: how its input is degraded, and the losses it is trained with.

Asking RDN to denoise or to colorize as well as to super-resolve makes the residual robust (section 3.3 of the paper).
train_sr.py degrades patches (`degrade_patch`), train_detector.py whole images: a new task is a function and a line in
TASKS. All inputs are low-resolution images in [0, 1]; what comes out may leave that range by the noise added.
"""

import io
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from models.features import STAGES, perceptual_distance
from models.resynthesis import ResynthesisDetector, downsample

DEGRADE_PROBABILITY = 0.5  # of the auxiliary task on a batch; otherwise its loss is taken on the clean batch
PATCH_PROBABILITY = 1 - math.sqrt(0.5)  # of each degradation of a patch: with two of them on, half of them stay clean
NOISE_STD = 4 / 255  # of the denoising task
GREY_SHARE = (0.1, 0.25)  # of the pixels, in the colorization task
PATCH_NOISE_STD = (0, 10 / 255)
PATCH_QUALITY = (25, 74)  # of JPEG, both included
PATCH_SHARE = (0.05, 0.15)  # of the pixels removed or greyed


def add_noise(image: Tensor, std: float, rng: np.random.Generator) -> Tensor:
    """Gaussian noise of standard deviation `std` (1 = the whole range) on (3, h, w)."""
    return image + std * torch.from_numpy(rng.standard_normal(tuple(image.shape), np.float32)).to(image)


def remove_some(image: Tensor, share: float, rng: np.random.Generator, colour_only: bool = True) -> Tensor:
    """About a `share` of the pixels of (3, h, w) set to the mean of their channels, or to 0."""
    mask = torch.from_numpy(rng.random((1, *image.shape[1:])) < share).to(image.device)  # (1, h, w)
    return torch.where(mask, image.mean(dim=0, keepdim=True) if colour_only else image.new_zeros(()), image)


def compress_jpeg(image: Tensor, quality: int) -> Tensor:
    """(3, h, w) after JPEG compression of that quality, in [0, 1]."""
    pixels = (image * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).cpu().numpy()  # (h, w, 3)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1).to(image) / 255  # (3, h, w)


# --- fine-tuning: the task of --mode-sr ---------------------------------------------------------------------

Degradation = Callable[[Tensor, np.random.Generator], Tensor]  # of one image, by a generator of its own


def colorization(batch_rng: np.random.Generator) -> Degradation:
    """Give colour back to random grey pixels: one share for the batch, drawn here, one mask for each image."""
    share = batch_rng.uniform(*GREY_SHARE)
    return lambda image, rng: remove_some(image, share, rng)


def denoising(batch_rng: np.random.Generator) -> Degradation:
    """Take Gaussian noise off again."""
    return lambda image, rng: add_noise(image, NOISE_STD, rng)


TASKS = {"none": None, "colorization": colorization, "denoising": denoising}  # --mode-sr


def draw_degradation(task: str, batch_rng: np.random.Generator) -> Degradation | None:
    """What this batch's low-resolution images go through; None: nothing, and the loss is taken on the clean ones."""
    drawn = TASKS[task] and batch_rng.random() < DEGRADE_PROBABILITY
    return TASKS[task](batch_rng) if drawn else None


def residual_and_auxiliary_loss(
    detector: ResynthesisDetector, x: Tensor, real: Tensor, degraded: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One pass for both losses of end-to-end training, sharing what they share.

    Args:
        detector: with VGG, whatever its stage.
        x: (B, 3, H, W) in [0, 1].
        real: (B,) bool: only reals enter the auxiliary loss.
        degraded: (B, 3, h, w), low-resolution images; None: the clean ones, whose re-synthesis the residual is made of.

    Returns:
        (residual (B, C_l, H_l, W_l), auxiliary loss of each image (B,): 0 for fakes).
    """
    if not real.any():
        return detector.compare(x).residual, x.new_zeros(len(x))
    again = detector.compare(x, STAGES if detector.stage else ())
    x_hat = again.x_hat[real] if degraded is None else detector.resynthesizer(degraded[real])  # (R, 3, H, W), R reals
    with torch.no_grad():
        maps = {k: m[real] for k, m in again.maps.items()} or detector.vgg(x[real], STAGES)
    maps_hat = {k: m[real] for k, m in again.maps_hat.items()} if degraded is None else {}
    maps_hat = maps_hat or detector.vgg(x_hat, STAGES)

    def l1(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).abs().mean(dim=(1, 2, 3))  # of each image: (R, C, H, W) -> (R,)

    # L1(x_hat, x) + sum_k w_k L1(VGG_k(x_hat), VGG_k(x)) of each real: (R,)
    loss = l1(x_hat.float(), x[real]) + perceptual_distance(maps_hat, maps, l1)
    return again.residual, x.new_zeros(len(x)).masked_scatter(real, loss)


def degrade_batch(degradation: Degradation, x: Tensor, scale: int, rngs: list[np.random.Generator]) -> Tensor:
    """x (B, 3, H, W), down-sampled and degraded, each image by its own generator: (B, 3, h, w)."""
    return torch.stack([degradation(x_lr, rng) for x_lr, rng in zip(downsample(x, scale), rngs, strict=True)])


# --- super-resolution: training patches ---------------------------------------------------------------------


def degrade_patch(
    patch: Tensor, rng: np.random.Generator, augment: bool, completion: bool, colorization: bool
) -> Tensor:
    """Degrade one training patch (3, h, w) in [0, 1] for train_sr.py, each way with PATCH_PROBABILITY.

    augment: noise of std U(0, 10)/255, then JPEG of quality 25..74 (the release computes the JPEG image and drops
    it). completion: U(.05, .15) of the pixels set to 0. colorization: such a share set to their channels' mean.
    """
    if augment and rng.random() < PATCH_PROBABILITY:
        patch = add_noise(patch, rng.uniform(*PATCH_NOISE_STD), rng)
    if augment and rng.random() < PATCH_PROBABILITY:
        patch = compress_jpeg(patch, int(rng.integers(*PATCH_QUALITY, endpoint=True)))
    if completion and rng.random() < PATCH_PROBABILITY:
        patch = remove_some(patch, rng.uniform(*PATCH_SHARE), rng, colour_only=False)
    if colorization and rng.random() < PATCH_PROBABILITY:
        patch = remove_some(patch, rng.uniform(*PATCH_SHARE), rng)
    return patch


def super_resolution_loss(
    x_hat: Tensor, x: Tensor, maps_hat: dict[int, Tensor], maps: dict[int, Tensor], vgg_weight: float
) -> tuple[Tensor, Tensor]:
    """L1 + vgg_weight * sum_k w_k MSE(VGG_k(x_hat), VGG_k(x)): (loss, its L1 part), scalars. Without maps: L1."""
    l1 = F.l1_loss(x_hat, x)
    return (l1 + vgg_weight * perceptual_distance(maps_hat, maps, F.mse_loss) if maps else l1), l1
