"""All losses of the project: the losses of super-resolution, of the detector and of the auxiliary tasks.

The perceptual loss weights the VGG-19 stages as in pix2pixHD (Wang et al., CVPR 2018).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from models.features import STAGES, VGG19
from models.resynthesis import ResynthesisDetector

STAGE_WEIGHTS = {1: 1 / 32, 2: 1 / 16, 3: 1 / 8, 4: 1 / 4, 5: 1.0}


def perceptual_distance(x_hat: Tensor, x: Tensor, vgg: VGG19, distance: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Compute sum_k w_k distance(VGG_k(x_hat), VGG_k(x)) over the five stages k of VGG-19, in float32.

    Gradients flow through x_hat only.

    Args:
        x_hat, x: (B, 3, H, W) in [0, 1].
    """
    with torch.no_grad():
        maps = vgg(x, STAGES)
    maps_hat = vgg(x_hat, STAGES)
    total = 0
    for k, weight in STAGE_WEIGHTS.items():
        total = total + weight * distance(maps_hat[k].float(), maps[k].float())
    return total


def super_resolution_loss(x_hat: Tensor, x: Tensor, vgg: VGG19 | None, vgg_weight: float) -> tuple[Tensor, Tensor]:
    """Compute the loss of train_sr.py: L1 + vgg_weight * sum_k w_k MSE(VGG_k(x_hat), VGG_k(x)).

    Args:
        x_hat, x: (B, 3, H, W) in [0, 1].
        vgg: VGG-19. None: the loss is the L1 term alone.

    Returns:
        loss, L1 term of the loss: scalars.
    """
    l1 = F.l1_loss(x_hat.float(), x)
    if vgg is None:
        return l1, l1
    return l1 + vgg_weight * perceptual_distance(x_hat, x, vgg, F.mse_loss), l1


def reconstruction_loss(x_hat: Tensor, x: Tensor, vgg: VGG19) -> Tensor:
    """Compute the auxiliary loss per image: L1(x_hat, x) + sum_k w_k L1(VGG_k(x_hat), VGG_k(x)).

    Args:
        x_hat, x: (B, 3, H, W) in [0, 1].

    Returns:
        losses (B,).
    """
    return l1_per_image(x_hat.float(), x) + perceptual_distance(x_hat, x, vgg, l1_per_image)


def l1_per_image(a: Tensor, b: Tensor) -> Tensor:
    """Average |a - b| over channels, height and width: (B, C, H, W) -> (B,)."""
    return (a - b).abs().mean(dim=(1, 2, 3))


def classification_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Compute the weighted sum of the cross-entropies of the images. Returns a scalar.

    Args:
        logits: (B, 2).
        labels: (B,).
        weights: (B,). The sum of the weights over all processes is 1.
    """
    losses = F.cross_entropy(logits, labels, reduction="none")  # (B,)
    return (weights * losses).sum()


def residual_and_reconstruction_loss(
    detector: ResynthesisDetector, vgg: VGG19 | None, x: Tensor, degraded: Tensor | None, real: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the residuals of all images, and the auxiliary loss of the real images, for end-to-end training.

    Args:
        vgg: VGG-19 of the auxiliary loss. None: the auxiliary loss is 0.
        x: (B, 3, H, W) in [0, 1].
        degraded: (B, 3, h, w), low-resolution input of the auxiliary task. None: the auxiliary loss compares the images
            with their re-synthesis from clean input.
        real: (B,) bool, true for the images on which the auxiliary loss is computed.

    Returns:
        residual: (B, C_l, H_l, W_l).
        losses: (B,), the auxiliary loss of each image, 0 where `real` is false.
    """
    x_hat = detector.resynthesize(x)  # (B, 3, H, W)
    residual = detector.residual(x, x_hat)  # (B, C_l, H_l, W_l)
    losses = x.new_zeros(len(x))
    if vgg is None or not real.any():
        return residual, losses
    x_hat_real = x_hat[real] if degraded is None else detector.resynthesizer(degraded[real])  # (R, 3, H, W)
    return residual, losses.masked_scatter(real, reconstruction_loss(x_hat_real, x[real], vgg))
