"""The method of "Beyond the Spectrum" (He, Yu, Keuper and Fritz, IJCAI 2021) on one screen."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def downsample(x: Tensor, scale: int) -> Tensor:
    """Average each scale x scale block of pixels: (B, C, H, W) -> (B, C, H / scale, W / scale)."""
    return F.avg_pool2d(x, scale)


class ResynthesisDetector(nn.Module):
    """A detector that tells real from generated images by what re-synthesis fails to bring back.

        x_lr     = downsample(x)                throw the fine detail away
        x_hat    = resynthesizer(x_lr)          put it back, as learned from real images only
        residual = |phi(x_hat) - phi(x)|        phi: the features, by default the pixels themselves
                                                `signed`: phi(x_hat) - phi(x)
        logits   = classifier(residual)         columns FAKE, REAL

    The three parts are protocols. `models/build.py` lists the parts that there are, docs/extending.md adds new ones.

    Args:
        resynthesizer: (B, 3, h, w) -> (B, 3, scale * h, scale * w), with an attribute `scale`.
        features: (B, 3, H, W) -> (B, channels, H / stride, W / stride), with attributes `channels` and `stride`.
        classifier: (B, channels, H / stride, W / stride) -> (B, 2).
        signed: keep the sign of the residual. The paper takes the absolute value.
    """

    def __init__(self, resynthesizer: nn.Module, features: nn.Module, classifier: nn.Module, signed: bool = False):
        super().__init__()
        self.resynthesizer = resynthesizer
        self.features = features
        self.classifier = classifier
        self.signed = signed

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 3, H, W) in [0, 1], H and W multiples of the scale. Returns logits (B, 2)."""
        x_hat = self.resynthesize(x)  # (B, 3, H, W)
        residual = self.residual(x, x_hat)  # (B, C_l, H_l, W_l)
        return self.classify(residual)  # (B, 2)

    def resynthesize(self, x: Tensor) -> Tensor:
        """x: (B, 3, H, W) in [0, 1]. Returns x_hat (B, 3, H, W), about [0, 1]."""
        x_lr = downsample(x, self.resynthesizer.scale)  # (B, 3, h, w)
        return self.resynthesizer(x_lr)  # (B, 3, H, W)

    def residual(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """Compare features. x, x_hat: (B, 3, H, W). Returns (B, C_l, H_l, W_l), float32."""
        phi = self.features(x)  # (B, C_l, H_l, W_l)
        phi_hat = self.features(x_hat)  # (B, C_l, H_l, W_l)
        difference = phi_hat.float() - phi.float()
        return difference if self.signed else difference.abs()

    def classify(self, residual: Tensor) -> Tensor:
        """residual: (B, C_l, H_l, W_l). Returns logits (B, 2), computed in float32 in any precision.

        The classifier is a hundredth of the work, and its batch norms on maps of a few values need the precision.
        """
        with torch.autocast(residual.device.type, enabled=False):
            return self.classifier(residual.float())

    def residual_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return (C_l, H_l, W_l) of the residual of an image of this size."""
        stride = self.features.stride
        return self.features.channels, height // stride, width // stride

    def freeze_resynthesizer(self, frozen: bool) -> None:
        """Choose between a frozen re-synthesizer (`--fixed-sr`) and end-to-end training.

        Release: the re-synthesizer is built frozen and never unfrozen, so end-to-end training does not train it.
        """
        self.resynthesizer.requires_grad_(not frozen)

    def set_tile(self, side: int) -> None:
        """Compute at most side x side pixels of an image at a time, without gradients: less memory, the same result.

        side: pixels, rounded down to a multiple of 16. Below 512 much is computed twice. Parts without a method
        `set_tile` compute whole images.
        """
        side -= side % 16
        for part in (self.resynthesizer, self.features, self.classifier):
            if hasattr(part, "set_tile"):
                part.set_tile(side)
