"""The detector's classifier: a ResNet with a deep stem and two logits.

He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition" (CVPR 2016), on torchvision's ResNet. What
differs from torchvision's is what the released detectors need: the stem of three convolutions with two strides,
stride 2 in layer1, and layer3 and layer4 that do not down-sample. The total stride is 32, as usual.
"""

from collections.abc import Mapping
from fractions import Fraction

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from models.errors import ModelError
from models.tiling import in_tiles

STEM_CHANNELS = 128
STEM_STRIDE, STEM_HALO = 8, 16  # pixels of the residual; the stem sees 11 to each side
TOTAL_STRIDE = 32  # two convolutions and the pooling of the stem, layer1 and layer2, by 2 each, rounded up
ARCHITECTURES = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}

SINGLE_IMAGE = (
    "batch normalisation cannot be trained on a batch of one image this small: choose a --batch-size that leaves no"
    " image alone in the last batch (or a process's share of it), or a larger --crop-size or --resize"
)


class DeepStemResNet(ResNet):
    """residual (B, in_channels, H, W) -> logits (B, 2), columns FAKE, REAL.

    Args:
        arch: a key of ARCHITECTURES.
        in_channels: 3 for the pixel residual, `STAGE_CHANNELS[k]` for that of VGG stage k.
        dilated: dilation 2 and 4 in layer3 and layer4 (the release without `--no_dilation`), else 1.

    Raises:
        ModelError: for an unknown arch, or dilation in resnet18/34, whose blocks have none.
    """

    def __init__(self, arch: str = "resnet50", in_channels: int = 3, dilated: bool = False):
        if arch not in ARCHITECTURES:
            raise ModelError(f"no detector architecture {arch!r}: choose from {', '.join(ARCHITECTURES)}")
        block, layers = ARCHITECTURES[arch]
        if dilated and block is BasicBlock:
            raise ModelError(f"{arch} has no dilated form (torchvision's BasicBlock): pass --no_dilation")
        super().__init__(block, layers, num_classes=2)
        self.conv1 = nn.Sequential(
            nn.Conv2d(in_channels, 64, kernel_size=3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(inplace=True),
            nn.Conv2d(64, 64, kernel_size=3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(inplace=True),
            nn.Conv2d(64, STEM_CHANNELS, kernel_size=3, padding=1, bias=False),
        )
        self.bn1 = nn.BatchNorm2d(STEM_CHANNELS)
        # torchvision's own builder, from a wider stem and with other strides
        self.inplanes, self.dilation = STEM_CHANNELS, 1
        last_stride = 2 if dilated else 1  # `dilate` turns a stride of 2 into a dilation
        self.layer1 = self._make_layer(block, 64, layers[0], stride=2)
        self.layer2 = self._make_layer(block, 128, layers[1], stride=2)
        self.layer3 = self._make_layer(block, 256, layers[2], stride=last_stride, dilate=dilated)
        self.layer4 = self._make_layer(block, 512, layers[3], stride=last_stride, dilate=dilated)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # N(0, sqrt(2 / (k * k * C_out)))
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.tile = 1024  # pixels: side of the tiles of the residual that the stem is run on in evaluation

    def forward(self, x: Tensor) -> Tensor:
        """x: residual (B, in_channels, H, W). Returns logits (B, 2).

        Raises:
            ModelError: in training, for a batch too small to be normalised.
        """
        alone = self.training and len(x) == 1 and not isinstance(self.bn1, nn.SyncBatchNorm)
        if alone and not trains_on_one(*x.shape[-2:]):
            raise ModelError(SINGLE_IMAGE)
        if self.training or torch.is_grad_enabled():  # batch normalisation is trained on whole maps
            x = self._stem(x)
        else:
            x = in_tiles(self._stem, x, side=self.tile, halo=STEM_HALO, scale=Fraction(1, STEM_STRIDE))
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
        return self.fc(self.avgpool(x).flatten(1))

    def _stem(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, 128, H / 8, W / 8), rounded up."""
        return self.maxpool(self.relu(self.bn1(self.conv1(x))))


def trains_on_one(height: int, width: int) -> bool:
    """Whether batch normalisation can be trained on a single residual (C_in, height, width).

    Not where its last maps are of one value each: their variance is 0.
    """
    return max(height, width) > TOTAL_STRIDE


def resnet_config(state_dict: Mapping[str, Tensor], name: str = "the state dict") -> dict:
    """{"arch", "in_channels"} of the classifier these weights belong to (dilation leaves no trace in them).

    Raises:
        ModelError: if these are not the weights of a `DeepStemResNet`.
    """
    stem = state_dict.get("conv1.0.weight")
    if stem is None:
        kind = "torchvision's ResNet" if "conv1.weight" in state_dict else "something else"
        raise ModelError(
            f"{name} holds no detector: no key conv1.0.weight (it looks like {kind}); give a file written by"
            " train_detector.py or a released one"
        )
    blocks = tuple(len({key.split(".")[1] for key in state_dict if key.startswith(f"layer{i}.")}) for i in range(1, 5))
    kind = Bottleneck if "layer1.0.conv3.weight" in state_dict else BasicBlock
    for arch, layout in ARCHITECTURES.items():
        if layout == (kind, blocks):
            return {"arch": arch, "in_channels": stem.shape[1]}
    raise ModelError(f"{name}: no known detector has {blocks} blocks; there are {', '.join(ARCHITECTURES)}")
