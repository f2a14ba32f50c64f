"""The networks once more, as plainly as the papers put them: our own are compared with them, for speed and for numbers."""

import copy
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.features import STAGE_LAYERS, VGG19
from models.rdn import RDN
from models.resynthesis import ResynthesisDetector


class PlainRDN(nn.Module):
    """Zhang et al. (CVPR 2018), figure 2, on the parameters of an `RDN`."""

    def __init__(self, rdn: RDN):
        super().__init__()
        self.net, self.scale = rdn, rdn.scale

    def forward(self, x_lr: Tensor) -> Tensor:
        """(B, 3, h, w) -> (B, 3, scale * h, scale * w)."""
        net = self.net
        sfe1 = net.sfe1(x_lr)  # (B, G0, h, w)
        x, outputs = net.sfe2(sfe1), []
        for block in net.rdbs:
            dense = x
            for layer in block.layers:
                dense = torch.cat([dense, F.relu(layer.conv(dense))], dim=1)
            x = x + block.lff(dense)
            outputs.append(x)
        x = net.gff(torch.cat(outputs, dim=1)) + sfe1  # (B, G0, h, w)
        return net.output(net.upscale(x))  # (B, 3, scale * h, scale * w)


class PlainVGG(nn.Module):
    """torchvision's vgg19().features, layer by layer, on the parameters of a `VGG19`."""

    def __init__(self, vgg: VGG19):
        super().__init__()
        self.net = vgg

    def forward(self, x: Tensor, stages: Iterable[int]) -> dict[int, Tensor]:
        """{k: feature map of stage k}."""
        maps = {}
        for i, layer in enumerate(self.net.features[: STAGE_LAYERS[max(stages)] + 1]):
            x = F.relu(x) if isinstance(layer, nn.ReLU) else layer(x)
            maps |= {k: x for k in stages if i == STAGE_LAYERS[k]}
        return maps


class PlainDetector(ResynthesisDetector):
    """downsample -> RDN -> |difference| -> classifier, each step on whole images."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> logits (B, 2)."""
        x_hat = self.resynthesizer(F.avg_pool2d(x, self.resynthesizer.scale))  # (B, 3, H, W)
        if self.stage > 0:
            x_hat, x = (self.vgg(image, [self.stage])[self.stage] for image in (x_hat, x))
        return self.classifier((x_hat - x).abs())


def plain_detector(detector: ResynthesisDetector) -> PlainDetector:
    """The plain form of a detector: the same weights, in float32 and the default memory order."""
    copied = copy.deepcopy(detector).float().to(memory_format=torch.contiguous_format)
    vgg = copied.vgg and PlainVGG(copied.vgg)
    return PlainDetector(PlainRDN(copied.resynthesizer), copied.classifier, copied.stage, vgg).eval()
