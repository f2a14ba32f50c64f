"""The detector's classifier: a ResNet with a deep stem and two logits.

He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition" (CVPR 2016), with torchvision's names and its
stride on the 3x3 convolution of the bottleneck. What differs from torchvision's is what the released detectors need:
the stem of three convolutions with two strides, stride 2 in layer1, and layer3 and layer4 that do not down-sample. The
total stride is 32, as usual. (Written out, because importing torchvision takes longer than scoring a picture.)
"""

from collections.abc import Mapping
from fractions import Fraction

import torch
from torch import Tensor, nn

from models.tiling import in_tiles
from utils.errors import UserError

STEM_CHANNELS = 128
STEM_STRIDE, STEM_HALO = 8, 16  # pixels of the residual; the stem sees 11 to each side
TOTAL_STRIDE = 32  # by 2 in two convolutions and the pooling of the stem, layer1, layer2, rounded up. Not larger: one
# value a channel in the last maps, on a single one of which batch normalisation cannot be trained

SINGLE_IMAGE = (
    "batch normalisation cannot be trained on a batch of one image this small: choose a --batch-size that leaves no"
    " image alone in the last batch (or a process's share of it), or a larger --crop-size or --resize"
)


def conv(in_channels: int, out_channels: int, side: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    """A "same"-padded convolution without bias, which the batch norm behind it makes needless."""
    padding = side // 2 * dilation
    return nn.Conv2d(in_channels, out_channels, side, stride, padding, dilation, bias=False)


class Block(nn.Module):
    """Convolutions with batch norm, added to their input, which is projected where shapes differ."""

    def add_shortcut(self, in_planes: int, out_planes: int, stride: int) -> None:
        """Last of all, as in torchvision: optimizer states know parameters by their order."""
        self.relu, self.downsample = nn.ReLU(inplace=True), None
        if stride != 1 or in_planes != out_planes:
            self.downsample = nn.Sequential(conv(in_planes, out_planes, 1, stride), nn.BatchNorm2d(out_planes))

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x) + (x if self.downsample is None else self.downsample(x)))


class BasicBlock(Block):
    """Two 3x3 convolutions."""

    expansion = 1

    def __init__(self, in_planes: int, planes: int, stride: int, dilation: int):  # it has no dilated form
        super().__init__()
        self.conv1, self.bn1 = conv(in_planes, planes, 3, stride), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = conv(planes, planes, 3), nn.BatchNorm2d(planes)
        self.add_shortcut(in_planes, planes, stride)

    def body(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))


class Bottleneck(Block):
    """1x1, 3x3, 1x1; the stride is that of the 3x3."""

    expansion = 4

    def __init__(self, in_planes: int, planes: int, stride: int, dilation: int):
        super().__init__()
        self.conv1, self.bn1 = conv(in_planes, planes, 1), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = conv(planes, planes, 3, stride, dilation), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = conv(planes, 4 * planes, 1), nn.BatchNorm2d(4 * planes)
        self.add_shortcut(in_planes, 4 * planes, stride)

    def body(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.bn3(self.conv3(x))


ARCHITECTURES = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}


class DeepStemResNet(nn.Module):
    """residual (B, in_channels, H, W) -> logits (B, 2), columns FAKE, REAL.

    Args:
        arch: a key of ARCHITECTURES.
        in_channels: 3 for the pixel residual, `STAGE_CHANNELS[k]` for that of VGG stage k.
        dilated: dilation 2 and 4 in layer3 and layer4 (the release without `--no_dilation`), else 1. In resnet18 and
            resnet34, whose blocks have none, it is a UserError.
    """

    def __init__(self, arch: str = "resnet50", in_channels: int = 3, dilated: bool = False):
        block, counts = ARCHITECTURES[arch]
        if dilated and block is BasicBlock:
            raise UserError(f"{arch} has no dilated form (as in torchvision): pass --no_dilation")
        super().__init__()
        stem = []
        for channels in (in_channels, 64):
            stem += [conv(channels, 64, 3, stride=2), nn.BatchNorm2d(64), nn.ReLU(inplace=True)]
        self.conv1 = nn.Sequential(*stem, conv(64, STEM_CHANNELS, 3))
        self.bn1 = nn.BatchNorm2d(STEM_CHANNELS)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        # (stride, dilation of the first block, of the others): a stage's first block has the dilation of the stage before
        third, fourth = ((1, 1, 2), (1, 2, 4)) if dilated else ((1, 1, 1), (1, 1, 1))
        channels, planes = STEM_CHANNELS, 64
        for i, (stride, first, others) in enumerate(((2, 1, 1), (2, 1, 1), third, fourth)):
            blocks = [block(channels, planes, stride, first)]
            channels = planes * block.expansion
            blocks += [block(channels, planes, 1, others) for _ in range(counts[i] - 1)]
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
            planes *= 2
        self.fc = nn.Linear(channels, 2)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # N(0, sqrt(2 / (k * k * C_out)))
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.tile = 1024  # pixels: side of the tiles of the residual that the stem is run on in evaluation

    def forward(self, x: Tensor) -> Tensor:
        """x: residual (B, in_channels, H, W). Returns logits (B, 2)."""
        if self.training or torch.is_grad_enabled():  # batch normalisation is trained on whole maps
            x = self._stem(x)  # (B, 128, H / 8, W / 8), rounded up
        else:
            x = in_tiles(self._stem, x, side=self.tile, halo=STEM_HALO, scale=Fraction(1, STEM_STRIDE))
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)  # (B, C, H / 32, W / 32) from layer2 on
        return self.fc(x.mean(dim=(2, 3)))

    def _stem(self, x: Tensor) -> Tensor:
        return self.maxpool(self.relu(self.bn1(self.conv1(x))))


def resnet_config(state_dict: Mapping[str, Tensor], name: str = "the state dict") -> dict:
    """{"arch", "in_channels"} of the classifier these weights belong to (dilation leaves no trace in them)."""
    blocks = tuple(len({key.split(".")[1] for key in state_dict if key.startswith(f"layer{i}.")}) for i in range(1, 5))
    layout = Bottleneck if "layer1.0.conv3.weight" in state_dict else BasicBlock, blocks
    known = [arch for arch in ARCHITECTURES if ARCHITECTURES[arch] == layout]
    if not known or "conv1.0.weight" not in state_dict:
        raise UserError(
            f"{name} holds no detector: its first key is {next(iter(state_dict), 'none')}, its blocks are {blocks}; give"
            f" a file of train_detector.py or a released one ({', '.join(ARCHITECTURES)}, each with the stem conv1.0)"
        )
    return {"arch": known[0], "in_channels": state_dict["conv1.0.weight"].shape[1]}
