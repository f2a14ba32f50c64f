"""The method of "Beyond the Spectrum" (He, Yu, Keuper and Fritz, IJCAI 2021) on one screen."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.features import VGGStages


def downsample(x: Tensor, scale: int) -> Tensor:
    """The mean of each scale x scale block: (B, C, H, W) -> (B, C, H / scale, W / scale)."""
    return F.avg_pool2d(x, scale)


class Compared(NamedTuple):
    """An image batch and its re-synthesis."""

    x_hat: Tensor  # (B, 3, H, W), about [0, 1]
    residual: Tensor  # (B, C_l, H_l, W_l), float32, >= 0
    maps_hat: dict[int, Tensor]  # VGG-19 features of x_hat by stage: those of the residual and those asked for
    maps: dict[int, Tensor]  # the same of x, without gradients


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
        return self.classify(self.compare(x).residual)

    def compare(self, x: Tensor, stages: Iterable[int] = ()) -> Compared:
        """Re-synthesise x and take the residual. stages: features wanted besides, such as a loss needs."""
        x_lr = downsample(x, self.resynthesizer.scale)  # (B, 3, h, w)
        x_hat = self.resynthesizer(x_lr)  # (B, 3, H, W)
        wanted = {*stages, self.stage} - {0}
        with torch.no_grad():
            maps = self.vgg(x, wanted) if wanted else {}
        maps_hat = self.vgg(x_hat, wanted) if wanted else {}
        phi_hat, phi = (maps_hat[self.stage], maps[self.stage]) if self.stage else (x_hat, x)
        residual = (phi_hat.float() - phi.float()).abs_()  # (B, C_l, H_l, W_l)
        return Compared(x_hat, residual, maps_hat, maps)

    def classify(self, residual: Tensor) -> Tensor:
        """residual (B, C_l, H_l, W_l) -> logits (B, 2), in float32 whatever the precision around it.

        The classifier is a hundredth of the work, and its batch norms on maps of a few values do not bear less.
        """
        with torch.autocast(residual.device.type, enabled=False):
            return self.classifier(residual.float())

    def residual_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C_l, H_l, W_l) of the residual of an image of this size."""
        stride = 2 ** max(self.stage - 1, 0)
        return self.classifier.conv1[0].in_channels, height // stride, width // stride

    def freeze_resynthesizer(self, frozen: bool) -> None:
        """The one switch between `--fixed-sr` and end-to-end training (the release never undoes its freezing)."""
        self.resynthesizer.requires_grad_(not frozen)

    def set_tile(self, side: int) -> None:
        """Work on tiles of side x side pixels of a larger image at a time, without gradients: less memory.

        This changes no result: each part of each network is given all that its tile depends on (`models.tiling`).
        side: rounded down to a multiple of 16; below 512 much is computed twice.
        """
        side -= side % 16
        self.resynthesizer.tile = side // self.resynthesizer.scale
        self.classifier.tile = side
        if self.vgg is not None:
            self.vgg.tile = side // 4
