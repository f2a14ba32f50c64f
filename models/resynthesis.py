"""The detector of the paper "Beyond the Spectrum" (He, Yu, Keuper and Fritz, IJCAI 2021)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def downsample(x: Tensor, scale: int) -> Tensor:
    """Replace each block of scale x scale pixels of images x (B, C, H, W) by its mean."""
    return F.avg_pool2d(x, scale)


class ResynthesisDetector(nn.Module):
    """A detector that decides from the residual between an image and its re-synthesis whether the image is generated.

        x_lr     = downsample(x)                remove the fine detail of the image
        x_hat    = resynthesizer(x_lr)          restore the fine detail, as learned from real images only
        residual = |phi(x_hat) - phi(x)|        compare the features phi, by default the pixels
                                                (if `signed` is True: phi(x_hat) - phi(x))
        logits   = classifier(residual)         logits with the columns FAKE, REAL

    docs/extending.md shows how to add a network.

    Args:
        resynthesizer: network that enlarges images (B, 3, h, w) by the factor in its attribute `scale`.
        features: network that computes feature maps (B, channels, H / stride, W / stride) of images (B, 3, H, W). The
            feature network must have the attributes `channels` and `stride`.
        classifier: network that computes logits (B, 2) from residuals (B, channels, H / stride, W / stride).
        signed: whether the residual keeps its sign, unlike in the paper.
    """

    def __init__(self, resynthesizer: nn.Module, features: nn.Module, classifier: nn.Module, signed: bool = False):
        super().__init__()
        self.resynthesizer = resynthesizer
        self.features = features
        self.classifier = classifier
        self.signed = signed
        self.resynthesizer_is_frozen = False

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits (B, 2) of images x (B, 3, H, W) in [0, 1].

        H and W must be multiples of the scale of the re-synthesizer.
        """
        x_hat = self.resynthesize(x)  # (B, 3, H, W)
        residual = self.residual(x, x_hat)  # (B, C_l, H_l, W_l)
        return self.classify(residual)  # (B, 2)

    def resynthesize(self, x: Tensor) -> Tensor:
        """Down-sample images x (B, 3, H, W) in [0, 1], and enlarge them with the re-synthesizer.

        Returns:
            x_hat: re-synthesized images (B, 3, H, W), not clipped to [0, 1].
        """
        x_lr = downsample(x, self.resynthesizer.scale)  # (B, 3, h, w)
        return self.resynthesizer(x_lr)  # (B, 3, H, W)

    def residual(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """Compute the residual of images x (B, 3, H, W) and their re-synthesis x_hat (B, 3, H, W).

        Returns:
            the residual, float32 (B, C_l, H_l, W_l).
        """
        phi = self.features(x)  # (B, C_l, H_l, W_l)
        phi_hat = self.features(x_hat)  # (B, C_l, H_l, W_l)
        difference = phi_hat.float() - phi.float()
        return difference if self.signed else difference.abs()

    def classify(self, residual: Tensor) -> Tensor:
        """Compute the logits (B, 2) of residuals (B, C_l, H_l, W_l).

        The classifier computes in float32 also under autocast, because gradients of its convolutions were infinite in
        bf16 for small residuals on a CPU.
        """
        with torch.autocast(residual.device.type, enabled=False):
            return self.classifier(residual.float())

    def residual_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return the shape (C_l, H_l, W_l) of the residual of an image with `height` x `width` pixels."""
        stride = self.features.stride
        return self.features.channels, height // stride, width // stride

    def set_resynthesizer_frozen(self, frozen: bool) -> None:
        """Freeze the weights of the re-synthesizer, or make them trainable if `frozen` is False.

        Release: the code of the paper's authors freezes the re-synthesizer also in end-to-end training.
        """
        self.resynthesizer_is_frozen = frozen
        self.resynthesizer.requires_grad_(not frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> "ResynthesisDetector":
        """Put the classifier and an unfrozen re-synthesizer in training mode, or in evaluation mode if `mode` is False.

        The feature network and a frozen re-synthesizer always stay in evaluation mode.
        """
        super().train(mode)
        self.features.eval()
        if self.resynthesizer_is_frozen:
            self.resynthesizer.eval()
        return self

    def set_tile_side(self, side: int) -> None:
        """Set the side length of the tiles in which the detector processes images when gradients are disabled.

        Smaller tiles take less memory, and give the same results except for rounding errors.

        Args:
            side: side of a tile in pixels of the image, rounded down to a multiple of 16, but at least 16. Sides below
                512 pixels take much more time, because tiles overlap.
        """
        side = max(side - side % 16, 16)
        for part in (self.resynthesizer, self.features, self.classifier):
            if hasattr(part, "set_tile_side"):
                part.set_tile_side(side)
