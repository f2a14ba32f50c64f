"""Losses for training super-resolution networks and detectors.

The weights of the VGG-19 stages in the perceptual distance are taken from pix2pixHD (Wang et al., CVPR 2018).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from models.features import STAGES, VGG19
from models.resynthesis import ResynthesisDetector

STAGE_WEIGHTS = {1: 1 / 32, 2: 1 / 16, 3: 1 / 8, 4: 1 / 4, 5: 1.0}


def compute_perceptual_distance(
    x_hat: Tensor, x: Tensor, vgg: VGG19, distance: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Compute the perceptual distance of two images, a weighted sum of the distances of their VGG-19 feature maps.

    Gradients are computed for x_hat, but not for x.

    Args:
        x_hat, x: images (B, 3, H, W) in [0, 1].
        distance: function that computes the distance of two tensors of feature maps (B, C, h, w), as a scalar or as
            one value per image, (B,).
    """
    with torch.no_grad():
        maps = vgg(x, STAGES)
    maps_hat = vgg(x_hat, STAGES)
    total = 0
    for k, weight in STAGE_WEIGHTS.items():
        total = total + weight * distance(maps_hat[k].float(), maps[k].float())
    return total


def compute_super_resolution_loss(
    x_hat: Tensor, x: Tensor, vgg: VGG19 | None, vgg_weight: float
) -> tuple[Tensor, Tensor]:
    """Compute the loss of train_sr.py: the L1 loss plus `vgg_weight` times the perceptual distance.

    Args:
        x_hat, x: images (B, 3, H, W) in [0, 1].
        vgg: VGG-19, or None to compute the L1 term only.

    Returns:
        the loss and its L1 term, two scalars.
    """
    l1 = F.l1_loss(x_hat.float(), x)
    if vgg is None:
        return l1, l1
    return l1 + vgg_weight * compute_perceptual_distance(x_hat, x, vgg, F.mse_loss), l1


def compute_reconstruction_loss(x_hat: Tensor, x: Tensor, vgg: VGG19) -> Tensor:
    """Compute the auxiliary loss of each image, (B,): the L1 loss of the pixels plus the perceptual distance.

    Args:
        x_hat, x: images (B, 3, H, W) in [0, 1].
    """
    return compute_l1_per_image(x_hat.float(), x) + compute_perceptual_distance(x_hat, x, vgg, compute_l1_per_image)


def compute_l1_per_image(a: Tensor, b: Tensor) -> Tensor:
    """Compute the mean of |a - b| over channels, height and width for each image in a and b (B, C, H, W)."""
    return (a - b).abs().mean(dim=(1, 2, 3))


def compute_classification_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Compute the sum of the cross-entropies of logits (B, 2) and labels (B,), multiplied by `weights` (B,)."""
    losses = F.cross_entropy(logits, labels, reduction="none")  # (B,)
    return (weights * losses).sum()


def compute_residuals_and_auxiliary_losses(
    detector: ResynthesisDetector, vgg: VGG19 | None, x: Tensor, degraded: Tensor | None, real: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the residuals of all images, and the auxiliary loss of the real images, for end-to-end training.

    Args:
        vgg: VGG-19 with which the auxiliary loss is computed, or None to return 0 as the auxiliary loss.
        x: images (B, 3, H, W) in [0, 1].
        degraded: low-resolution images (B, 3, h, w) with noise or grey pixels, or None. The auxiliary loss compares `x`
            with the re-synthesis of `degraded`, or with the re-synthesis of `x` if `degraded` is None.
        real: bool (B,), True for the images on which the auxiliary loss is computed.

    Returns:
        residual: residuals of all images, (B, C_l, H_l, W_l).
        losses: auxiliary loss of each image, (B,), which is 0 where `real` is False.
    """
    x_hat = detector.resynthesize(x)  # (B, 3, H, W)
    residual = detector.residual(x, x_hat)  # (B, C_l, H_l, W_l)
    losses = x.new_zeros(len(x))
    if vgg is None or not real.any():
        return residual, losses
    x_hat_real = x_hat[real] if degraded is None else detector.resynthesizer(degraded[real])  # (R, 3, H, W)
    return residual, losses.masked_scatter(real, compute_reconstruction_loss(x_hat_real, x[real], vgg))
