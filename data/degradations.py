"""Functions that degrade low-resolution images by noise, JPEG compression, and grey or black pixels.

According to section 3.3 of the paper, auxiliary tasks, in which the re-synthesizer restores degraded images, make the
residual robust to perturbations of the image. Images that are not degraded are float tensors (3, h, w) with values in
[0, 1].

To add an auxiliary task, write a function like `create_denoising_degradation`, and add the function to TASKS.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from data.perturbations import compress_as_jpeg
from utils.errors import UserError, describe_tensor

TASK_PROBABILITY = 0.5  # probability that a batch is degraded before the auxiliary loss is computed
TASK_NOISE_STD = 4 / 255
TASK_GREY_FRACTION = (0.1, 0.25)  # smallest and largest fraction of grey pixels

# If two degradations are requested, a patch stays unchanged with probability (1 - PATCH_PROBABILITY) ** 2 = 0.5.
PATCH_PROBABILITY = 1 - math.sqrt(0.5)
PATCH_NOISE_STD = (0, 10 / 255)
PATCH_JPEG_QUALITY = (25, 74)  # lowest and highest quality, both included
PATCH_FRACTION = (0.05, 0.15)  # smallest and largest fraction of pixels that are turned black or grey

# A function that degrades one image: (image (3, h, w), random generator) -> degraded image (3, h, w)
Degradation = Callable[[Tensor, np.random.Generator], Tensor]


def add_noise_to_float_image(image: Tensor, std: float, rng: np.random.Generator) -> Tensor:
    """Add Gaussian noise with standard deviation `std` to an image (3, h, w) in [0, 1], without clipping."""
    noise = rng.standard_normal(tuple(image.shape), np.float32)
    return image + std * torch.from_numpy(noise).to(image)


def turn_random_pixels_grey(image: Tensor, fraction: float, rng: np.random.Generator) -> Tensor:
    """Set each pixel of an image (3, h, w) to the mean of its three channels with probability `fraction`."""
    mask = draw_random_mask(image, fraction, rng)  # (1, h, w)
    return torch.where(mask, image.mean(dim=0, keepdim=True), image)


def blacken_random_pixels(image: Tensor, fraction: float, rng: np.random.Generator) -> Tensor:
    """Replace each pixel of an image (3, h, w) by black (0) with probability `fraction`."""
    mask = draw_random_mask(image, fraction, rng)  # (1, h, w)
    return torch.where(mask, image.new_zeros(()), image)


def draw_random_mask(image: Tensor, fraction: float, rng: np.random.Generator) -> Tensor:
    """Draw a mask, bool (1, h, w), that is True at each pixel of an image (3, h, w) with probability `fraction`."""
    height, width = image.shape[1:]
    return torch.from_numpy(rng.random((1, height, width)) < fraction).to(image.device)


def compress_float_image_as_jpeg(image: Tensor, quality: int) -> Tensor:
    """Compress an image (3, h, w) as JPEG, and decode the JPEG image to (3, h, w) in [0, 1]."""
    pixels = (image * 255).round().clamp(0, 255).to(torch.uint8)
    return compress_as_jpeg(pixels.cpu(), quality).to(image) / 255


# --- auxiliary tasks of train_detector.py: --mode-sr ----------------------------------------------------------


def create_colorization_degradation(batch_rng: np.random.Generator) -> Degradation:
    """Return a function that turns random pixels of an image grey, for the auxiliary task "colorization".

    The fraction of grey pixels is drawn at random, once for all images of a batch.
    """
    fraction = batch_rng.uniform(*TASK_GREY_FRACTION)
    return lambda image, rng: turn_random_pixels_grey(image, fraction, rng)


def create_denoising_degradation(batch_rng: np.random.Generator) -> Degradation:
    """Return a function that adds Gaussian noise to an image, for the auxiliary task "denoising"."""
    return lambda image, rng: add_noise_to_float_image(image, TASK_NOISE_STD, rng)


# TASKS maps each auxiliary task to a function that takes a random generator and returns a `Degradation`.
TASKS = {"none": None, "colorization": create_colorization_degradation, "denoising": create_denoising_degradation}


def require_known_auxiliary_task(name: str) -> None:
    """Raise a UserError if `name` is not the name of an auxiliary task in TASKS."""
    if name not in TASKS:
        raise UserError(f"--mode-sr must be one of {', '.join(TASKS)}, got {name}")


def sample_degradation_for_batch(task: str, batch_rng: np.random.Generator) -> Degradation | None:
    """Decide at random whether a batch is degraded, and return its degradation, or None for no degradation."""
    create = TASKS[task]
    if create is None or batch_rng.random() >= TASK_PROBABILITY:
        return None
    return create(batch_rng)


def degrade_batch(degradation: Degradation, x_lr: Tensor, rngs: Sequence[np.random.Generator]) -> Tensor:
    """Degrade each image of x_lr (B, 3, h, w), and stack the results to (B, 3, h, w).

    Raises:
        UserError: if the degradation changes the shape or the data type of an image.
    """
    degraded = []
    for image, rng in zip(x_lr, rngs, strict=True):
        result = degradation(image, rng)
        if not torch.is_tensor(result) or result.shape != image.shape or result.dtype != image.dtype:
            raise UserError(
                "the degradation of the auxiliary task in --mode-sr must return a tensor of"
                f" {describe_tensor(image)}, got {describe_tensor(result)}"
            )
        degraded.append(result)
    return torch.stack(degraded)


# --- patches of train_sr.py -----------------------------------------------------------------------------------


def degrade_patch(
    patch: Tensor, rng: np.random.Generator, augment: bool, completion: bool, colorization: bool
) -> Tensor:
    """Degrade a training patch (3, h, w) at random.

    Each degradation that an argument requests is applied with probability PATCH_PROBABILITY.

    Args:
        augment: whether to add noise (PATCH_NOISE_STD), and to compress the patch as JPEG (PATCH_JPEG_QUALITY).
            (Release: the code of the paper's authors computes the JPEG image, but does not use it.)
        completion: whether to turn random pixels black (PATCH_FRACTION).
        colorization: whether to turn random pixels grey (PATCH_FRACTION).
    """
    if augment and rng.random() < PATCH_PROBABILITY:
        patch = add_noise_to_float_image(patch, rng.uniform(*PATCH_NOISE_STD), rng)
    if augment and rng.random() < PATCH_PROBABILITY:
        patch = compress_float_image_as_jpeg(patch, int(rng.integers(*PATCH_JPEG_QUALITY, endpoint=True)))
    if completion and rng.random() < PATCH_PROBABILITY:
        patch = blacken_random_pixels(patch, rng.uniform(*PATCH_FRACTION), rng)
    if colorization and rng.random() < PATCH_PROBABILITY:
        patch = turn_random_pixels_grey(patch, rng.uniform(*PATCH_FRACTION), rng)
    return patch
