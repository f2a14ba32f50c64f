"""The ResNet that classifies residuals as real or fake.

ResNet is from He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition" (CVPR 2016). The ResNet of
the paper's authors differs from torchvision's ResNet in its stem, which has three convolutions, and in the strides of
layer1 (2), layer3 (1) and layer4 (1).
"""

from fractions import Fraction

import torch
from torch import Tensor, nn

from models.tiling import apply_function_in_tiles
from utils.errors import UserError

STEM_CHANNELS = 128
# STEM_STRIDE is the total stride of the stem, which consists of the layers before layer1.
# STEM_HALO is the width in pixels of the margin of the stem's tiles.
# STEM_HALO must be at least 11, because an output value of the stem depends on input pixels up to 11 pixels away.
STEM_STRIDE, STEM_HALO = 8, 16

LAYOUTS = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
}
BOTTLENECKS = ("resnet50", "resnet101", "resnet152")  # ResNets that consist of `Bottleneck` blocks


def create_convolution(in_channels: int, out_channels: int, side: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    """Create a side x side convolution that divides height and width by `stride`, and rounds the results up.

    The convolution has no bias, because a batch norm follows it.
    """
    padding = side // 2 * dilation
    return nn.Conv2d(in_channels, out_channels, side, stride, padding, dilation, bias=False)


class Block(nn.Module):
    """A residual block: the output is relu(compute_residual_branch(x) + x).

    If x and the output have different shapes, the sum contains a 1x1 convolution of x instead of x.
    """

    expansion: int

    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None

    def add_input_projection(self, in_planes: int, out_planes: int, stride: int) -> None:
        """Create the 1x1 convolution of the input, if the input and the output of the block have different shapes.

        `__init__` must call `add_input_projection` last, so that the parameters have the same order as in saved
        optimizer states.
        """
        if stride != 1 or in_planes != out_planes:
            projection = create_convolution(in_planes, out_planes, 1, stride)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(out_planes))

    def compute_residual_branch(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(self.compute_residual_branch(x) + shortcut)


class BasicBlock(Block):
    """A residual block of ResNet-18 or ResNet-34, with two 3x3 convolutions.

    The constructor ignores `dilation`, because a ResNet-18 or ResNet-34 is never dilated.
    """

    expansion = 1

    def __init__(self, in_planes: int, planes: int, stride: int, dilation: int):
        super().__init__()
        self.conv1 = create_convolution(in_planes, planes, 3, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = create_convolution(planes, planes, 3)
        self.bn2 = nn.BatchNorm2d(planes)
        self.add_input_projection(in_planes, planes, stride)

    def compute_residual_branch(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(x))


class Bottleneck(Block):
    """A residual block of ResNet-50, ResNet-101 or ResNet-152, with a 1x1, a 3x3 and a 1x1 convolution."""

    expansion = 4

    def __init__(self, in_planes: int, planes: int, stride: int, dilation: int):
        super().__init__()
        self.conv1 = create_convolution(in_planes, planes, 1)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = create_convolution(planes, planes, 3, stride, dilation)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = create_convolution(planes, self.expansion * planes, 1)
        self.bn3 = nn.BatchNorm2d(self.expansion * planes)
        self.add_input_projection(in_planes, self.expansion * planes, stride)

    def compute_residual_branch(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.bn3(self.conv3(x))


class DeepStemResNet(nn.Module):
    """A ResNet that computes logits (B, 2) for FAKE and REAL from residuals (B, channels, H, W).

    Args:
        arch: name of the ResNet, one of the names in LAYOUTS.
        dilated: whether layer3 has dilation 2 and layer4 has dilation 4. Release: the code of the paper's authors
            dilates a ResNet-50, ResNet-101 or ResNet-152 unless `--no_dilation` is given.

    Raises:
        UserError: if `dilated` is True for a ResNet-18 or ResNet-34.
    """

    # train_detector.py uses `stride` to refuse batches of one image if batch norm would get one value per channel.
    stride = 32  # height of the residual divided by the height of the last feature map

    def __init__(self, channels: int, arch: str = "resnet50", dilated: bool = False):
        super().__init__()
        if dilated and arch not in BOTTLENECKS:
            raise UserError(
                f"{arch} cannot be dilated: pass --no_dilation, or choose another --arch ({', '.join(BOTTLENECKS)})"
            )
        block = Bottleneck if arch in BOTTLENECKS else BasicBlock
        self.conv1 = nn.Sequential(
            create_convolution(channels, 64, 3, stride=2),
            nn.BatchNorm2d(64),
            nn.ReLU(inplace=True),
            create_convolution(64, 64, 3, stride=2),
            nn.BatchNorm2d(64),
            nn.ReLU(inplace=True),
            create_convolution(64, STEM_CHANNELS, 3),
        )
        self.bn1 = nn.BatchNorm2d(STEM_CHANNELS)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        depths = LAYOUTS[arch]
        # As in torchvision, the first block of a dilated layer has the dilation of the previous layer
        third, fourth = ((1, 2), (2, 4)) if dilated else ((1, 1), (1, 1))
        self.in_planes = STEM_CHANNELS
        self.layer1 = self.create_residual_blocks(block, 64, depths[0], stride=2)
        self.layer2 = self.create_residual_blocks(block, 128, depths[1], stride=2)
        self.layer3 = self.create_residual_blocks(block, 256, depths[2], dilations=third)
        self.layer4 = self.create_residual_blocks(block, 512, depths[3], dilations=fourth)
        self.fc = nn.Linear(self.in_planes, 2)
        self.tile = 1024  # side of the stem's tiles, in pixels of the residual
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def create_residual_blocks(
        self, block: type[Block], planes: int, depth: int, stride: int = 1, dilations: tuple[int, int] = (1, 1)
    ) -> nn.Sequential:
        """Create a sequence of `depth` residual blocks.

        Args:
            planes: number of channels of the 3x3 convolutions.
            stride: stride of the first block.
            dilations: dilation of the first block, and dilation of all later blocks.
        """
        first, others = dilations
        blocks = [block(self.in_planes, planes, stride, first)]
        self.in_planes = planes * block.expansion
        for _ in range(depth - 1):
            blocks.append(block(self.in_planes, planes, 1, others))
        return nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits (B, 2) of residuals x (B, channels, H, W)."""
        if torch.is_grad_enabled() or self.training:
            x = self.run_stem(x)  # (B, 128, H / 8, W / 8), rounded up
        else:
            x = apply_function_in_tiles(
                self.run_stem, x, side=self.tile, halo=STEM_HALO, scale=Fraction(1, STEM_STRIDE)
            )
        x = self.layer1(x)  # (B, C1, H / 16, W / 16)
        x = self.layer2(x)  # (B, C2, H / 32, W / 32)
        x = self.layer3(x)  # (B, C3, H / 32, W / 32)
        x = self.layer4(x)  # (B, C4, H / 32, W / 32)
        x = x.mean(dim=(2, 3))  # (B, C4)
        return self.fc(x)

    def run_stem(self, x: Tensor) -> Tensor:
        """Run the stem, which divides height and width by 8, on residuals x (B, channels, H, W)."""
        return self.maxpool(self.relu(self.bn1(self.conv1(x))))

    def set_tile_side(self, side: int) -> None:
        """Set the side length of the tiles in which the stem processes residuals when gradients are disabled.

        In training mode, the stem does not use tiles.

        Args:
            side: side of a tile in pixels of the residual.
        """
        self.tile = side
