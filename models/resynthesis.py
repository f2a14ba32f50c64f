"""The detector of the paper "Beyond the Spectrum" (He, Yu, Keuper and Fritz, IJCAI 2021)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def downsample(x: Tensor, scale: int) -> Tensor:
    """Average each scale x scale block of pixels: (B, C, H, W) -> (B, C, H / scale, W / scale)."""
    return F.avg_pool2d(x, scale)


class ResynthesisDetector(nn.Module):
    """A detector that tells real from generated images by the residual between an image and its re-synthesis.

        x_lr     = downsample(x)                remove the fine detail of the image
        x_hat    = resynthesizer(x_lr)          restore the fine detail, as learned from real images only
        residual = |phi(x_hat) - phi(x)|        compare features phi, by default the pixels
                                                (with `signed`: phi(x_hat) - phi(x))
        logits   = classifier(residual)         logits with the columns FAKE, REAL

    `models/build.py` lists the networks that can be chosen for each part. docs/extending.md shows how to add a network.

    Args:
        resynthesizer: (B, 3, h, w) -> (B, 3, scale * h, scale * w), with an attribute `scale`.
        features: (B, 3, H, W) -> (B, channels, H / stride, W / stride), with attributes `channels` and `stride`.
        classifier: (B, channels, H / stride, W / stride) -> (B, 2).
        signed: keep the sign of the residual. The paper uses the absolute value of the residual.
    """

    def __init__(self, resynthesizer: nn.Module, features: nn.Module, classifier: nn.Module, signed: bool = False):
        super().__init__()
        self.resynthesizer = resynthesizer
        self.features = features
        self.classifier = classifier
        self.signed = signed

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits (B, 2) of images x (B, 3, H, W) in [0, 1]. H and W must be multiples of the scale."""
        x_hat = self.resynthesize(x)  # (B, 3, H, W)
        residual = self.residual(x, x_hat)  # (B, C_l, H_l, W_l)
        return self.classify(residual)  # (B, 2)

    def resynthesize(self, x: Tensor) -> Tensor:
        """Down-sample images x (B, 3, H, W) in [0, 1] and restore them. Returns x_hat (B, 3, H, W), about [0, 1]."""
        x_lr = downsample(x, self.resynthesizer.scale)  # (B, 3, h, w)
        return self.resynthesizer(x_lr)  # (B, 3, H, W)

    def residual(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """Subtract the features of x (B, 3, H, W) from the features of x_hat. Returns (B, C_l, H_l, W_l), float32."""
        phi = self.features(x)  # (B, C_l, H_l, W_l)
        phi_hat = self.features(x_hat)  # (B, C_l, H_l, W_l)
        difference = phi_hat.float() - phi.float()
        return difference if self.signed else difference.abs()

    def classify(self, residual: Tensor) -> Tensor:
        """Classify residuals (B, C_l, H_l, W_l). Returns logits (B, 2).

        The classifier computes in float32 under autocast, because its batch norms work on maps of a few values. This
        costs little time, because the classifier does only a hundredth of the detector's computations.
        """
        with torch.autocast(residual.device.type, enabled=False):
            return self.classifier(residual.float())

    def residual_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return the shape (C_l, H_l, W_l) of the residual of an image of height x width pixels."""
        stride = self.features.stride
        return self.features.channels, height // stride, width // stride

    def freeze_resynthesizer(self, frozen: bool) -> None:
        """Choose between a frozen re-synthesizer (`--fixed-sr`) and end-to-end training.

        Release: the released code freezes the re-synthesizer even in end-to-end training. In this project, end-to-end
        training changes the weights of the re-synthesizer.
        """
        self.resynthesizer.requires_grad_(not frozen)

    def set_tile(self, side: int) -> None:
        """Set the side of the tiles in which inference without gradients processes an image.

        Smaller tiles take less memory and give equal results up to rounding. Parts of the detector without a method
        `set_tile` process whole images.

        Args:
            side: pixels of the image, rounded down to a multiple of 16. Tiles overlap, so that sides below 512 pixels
                cost much time.
        """
        side -= side % 16
        for part in (self.resynthesizer, self.features, self.classifier):
            if hasattr(part, "set_tile"):
                part.set_tile(side)
