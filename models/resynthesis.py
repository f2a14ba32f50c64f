"""The method of "Beyond the Spectrum" (He, Yu, Keuper and Fritz, IJCAI 2021) on one screen."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.vgg import VGGStages


def downsample(x: Tensor, scale: int) -> Tensor:
    """The mean of each scale x scale block: (B, C, H, W) -> (B, C, H / scale, W / scale)."""
    return F.avg_pool2d(x, scale)


class ResynthesisDetector(nn.Module):
    """Tell real from generated images by what re-synthesis fails to bring back.

        x_lr     = downsample(x)                  throw the fine detail away
        x_hat    = resynthesizer(x_lr)            put it back, as learned from real images only
        residual = |phi_l(x_hat) - phi_l(x)|      l = 0: the pixels; l = 1..5: VGG-19 relu{l}_1
        logits   = classifier(residual)           columns FAKE, REAL

    Args:
        resynthesizer: RDN, (B, 3, h, w) -> (B, 3, scale * h, scale * w), with an attribute `scale`.
        classifier: ResNet, (B, C_l, H_l, W_l) -> (B, 2).
        stage: l.
        vgg: the features phi; may be None for stage 0.
    """

    def __init__(self, resynthesizer: nn.Module, classifier: nn.Module, stage: int, vgg: VGGStages | None):
        super().__init__()
        self.resynthesizer = resynthesizer
        self.classifier = classifier
        self.stage = stage
        self.vgg = vgg

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 3, H, W) in [0, 1], H and W multiples of the scale. Returns logits (B, 2)."""
        return self.classify(self.residual(x))

    def residual(self, x: Tensor) -> Tensor:
        """What re-synthesis could not bring back: (B, C_l, H / 2^(l-1), W / 2^(l-1)), float32, >= 0."""
        x_hat = self.resynthesize(x)  # (B, 3, H, W)
        return self.difference(self.phi(x_hat), self.phi(x))

    def resynthesize(self, x: Tensor) -> Tensor:
        """x_hat (B, 3, H, W) from the down-sampled x alone."""
        return self.resynthesizer(downsample(x, self.resynthesizer.scale))

    def phi(self, x: Tensor) -> Tensor:
        """The space residuals are taken in: x itself, or its VGG-19 features of the stage."""
        return x if self.stage == 0 else self.vgg(x, [self.stage])[self.stage]

    def residual_size(self, height: int, width: int) -> tuple[int, int]:
        """(H_l, W_l) of the residual of an image of this size."""
        stride = 2 ** max(self.stage - 1, 0)
        return height // stride, width // stride

    @staticmethod
    def difference(a: Tensor, b: Tensor) -> Tensor:
        """|a - b|, in float32 whatever the precision of the features."""
        return (a.float() - b.float()).abs_()

    def classify(self, residual: Tensor) -> Tensor:
        """residual -> logits (B, 2), float32."""
        return self.classifier(residual).float()

    def freeze_resynthesizer(self, frozen: bool) -> None:
        """The one switch between `--fixed-sr` and end-to-end training (the release never undoes its freezing)."""
        self.resynthesizer.requires_grad_(not frozen)

    def set_tile(self, side: int) -> None:
        """Work on tiles of side x side pixels of a larger image at a time, without gradients: less memory.

        This changes no result: each part of each network is given all that its tile depends on (`models.tiling`).
        side: rounded down to a multiple of 16; below 256 much is computed twice.
        """
        side -= side % 16
        self.resynthesizer.tile = side // self.resynthesizer.scale
        self.classifier.tile = side
        if self.vgg is not None:
            self.vgg.tile = side // 4


@torch.no_grad()
def residual_energy(residual: Tensor) -> Tensor:
    """Mean residual of each image, (B,): the simplest score the method has."""
    return residual.mean(dim=(1, 2, 3))
