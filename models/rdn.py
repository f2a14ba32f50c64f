"""RDN, the residual dense network for super-resolution, which is the re-synthesizer of the paper.

RDN is from Zhang, Tian, Kong, Zhong and Fu, "Residual Dense Network for Image Super-Resolution" (CVPR 2018). The
parameters have the same names as in yjn870/RDN-pytorch (MIT licence), because the checkpoints of the paper's authors
use these names.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models import rdn_inference
from utils.errors import UserError

LARGEST_COUNT = 1024  # largest number of channels, blocks or layers that RDN accepts
SHUFFLES = {2: (2,), 3: (3,), 4: (2, 2)}  # for each scale, the enlargement factors of the up-sampling steps
# Interpolation in one dimension replaces each old pixel by a left and a right new pixel.
# INTERPOLATION contains, for the left and the right new pixel, the weights of the left, the old and the right pixel.
# The mean of the left and the right new pixel equals the old pixel that they replace.
INTERPOLATION = ((1 / 8, 1.0, -1 / 8), (-1 / 8, 1.0, 1 / 8))


def create_conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    """Create a 3x3 convolution whose output has the same height and width as its input."""
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)


def create_conv1x1(in_channels: int, out_channels: int) -> nn.Conv2d:
    """Create a 1x1 convolution."""
    return nn.Conv2d(in_channels, out_channels, kernel_size=1)


class DenseLayer(nn.Module):
    """A dense layer, which consists of a 3x3 convolution and a ReLU."""

    def __init__(self, in_channels: int, growth_rate: int):
        super().__init__()
        self.conv = create_conv3x3(in_channels, growth_rate)

    def forward(self, *maps: Tensor) -> Tensor:
        """Concatenate `maps`, and compute G feature maps (B, G, h, w) from them.

        Args:
            maps: the input (B, G0, h, w) of the dense block, and the output (B, G, h, w) of each earlier dense layer of
                the block.
        """
        return self.conv(torch.cat(maps, dim=1)).relu_()


class ResidualDenseBlock(nn.Module):
    """A residual dense block (RDB): C dense layers, then local feature fusion, then local residual learning."""

    def __init__(self, num_features: int, growth_rate: int, num_layers: int):
        super().__init__()
        layers = [DenseLayer(num_features + i * growth_rate, growth_rate) for i in range(num_layers)]
        self.layers = nn.Sequential(*layers)
        # Release: in the code of the paper's authors, lff (local feature fusion) has growth_rate output channels.
        # In the code of the paper's authors, the forward pass of RDN fails if growth_rate differs from num_features.
        self.lff = create_conv1x1(num_features + num_layers * growth_rate, num_features)

    def forward(self, x: Tensor) -> Tensor:
        """Run the dense layers on x (B, G0, h, w), fuse their feature maps, and add x to the result."""
        maps = [x]
        for layer in self.layers:
            maps.append(layer(*maps))  # (B, G, h, w)
        return self.fuse_maps(*maps) + x

    def fuse_maps(self, *maps: Tensor) -> Tensor:
        """Concatenate `maps`, and reduce them to G0 channels with a 1x1 convolution (local feature fusion)."""
        return self.lff(torch.cat(maps, dim=1))


class RDN(nn.Module):
    """A residual dense network, which enlarges images (B, 3, h, w) to (B, 3, scale * h, scale * w).

    Args:
        scale: up-sampling factor: 2, 3 or 4.
        num_features: G0, number of input and output channels of each residual dense block.
        growth_rate: G, number of output channels of each dense layer.
        num_blocks: D, number of residual dense blocks.
        num_layers: C, number of dense layers in each block.

    With the default arguments, which are the settings of the paper, RDN has 22,271,107 parameters.

    Raises:
        UserError: if `scale` is not 2, 3 or 4, or if another argument is not an integer from 1 to 1024.
    """

    def __init__(
        self, scale: int = 4, num_features: int = 64, growth_rate: int = 64, num_blocks: int = 16, num_layers: int = 8
    ):
        super().__init__()
        if scale not in tuple(SHUFFLES):
            raise UserError(f"the scale of RDN must be 2, 3 or 4, got {scale}")
        for count in (num_features, growth_rate, num_blocks, num_layers):
            if type(count) is not int or not 1 <= count <= LARGEST_COUNT:
                raise UserError(
                    "num_features, growth_rate, num_blocks and num_layers of RDN must be integers from 1 to"
                    f" {LARGEST_COUNT}, got {num_features}, {growth_rate}, {num_blocks} and {num_layers}"
                )
        self.scale = scale
        # If checkpoint_blocks is True, training uses gradient checkpointing, which takes less memory but more time
        self.checkpoint_blocks = False
        self.tile = 256  # side of a tile in low-resolution pixels; RDN uses tiles only if gradients are disabled
        self.sfe1 = create_conv3x3(3, num_features)
        self.sfe2 = create_conv3x3(num_features, num_features)
        blocks = [ResidualDenseBlock(num_features, growth_rate, num_layers) for _ in range(num_blocks)]
        self.rdbs = nn.ModuleList(blocks)
        self.gff = nn.Sequential(
            create_conv1x1(num_features * num_blocks, num_features), create_conv3x3(num_features, num_features)
        )
        upscale = []
        for factor in SHUFFLES[scale]:
            upscale += [create_conv3x3(num_features, num_features * factor**2), nn.PixelShuffle(factor)]
        self.upscale = nn.Sequential(*upscale)
        self.output = create_conv3x3(num_features, 3)

    def forward(self, x_lr: Tensor) -> Tensor:
        """Enlarge images x_lr (B, 3, h, w) in [0, 1] by the factor `scale`.

        Returns:
            x_hat: enlarged images, float32 (B, 3, scale * h, scale * w), not clipped to [0, 1].
        """
        if not torch.is_grad_enabled():
            return rdn_inference.run_rdn(self, x_lr)
        sfe1 = self.sfe1(x_lr)  # (B, G0, h, w)
        x = self.sfe2(sfe1)  # (B, G0, h, w)
        block_outputs = []
        for block in self.rdbs:
            x = self.call_with_optional_gradient_checkpointing(block, x)  # (B, G0, h, w)
            block_outputs.append(x)
        x = (
            self.call_with_optional_gradient_checkpointing(self.fuse_block_outputs, *block_outputs) + sfe1
        )  # (B, G0, h, w)
        return self.call_with_optional_gradient_checkpointing(self.upsample_to_image, x)  # (B, 3, scale * h, scale * w)

    def fuse_block_outputs(self, *block_outputs: Tensor) -> Tensor:
        """Reduce the concatenated outputs of all blocks to G0 channels by two convolutions (global feature fusion)."""
        return self.gff(torch.cat(block_outputs, dim=1))

    def upsample_to_image(self, x: Tensor) -> Tensor:
        """Enlarge the fused feature maps x (B, G0, h, w) to float32 images (B, 3, scale * h, scale * w)."""
        x = self.upscale(x)  # (B, G0, scale * h, scale * w)
        # Rounding errors of bf16 would be large compared with a residual, which is a small difference of two images.
        with torch.autocast(x.device.type, enabled=False):
            return self.output(x.float())

    def call_with_optional_gradient_checkpointing(self, part, *inputs: Tensor) -> Tensor:
        """Return part(*inputs), computed with gradient checkpointing if `checkpoint_blocks` is True."""
        if self.checkpoint_blocks:
            return checkpoint(part, *inputs, use_reentrant=False)
        return part(*inputs)

    def set_tile_side(self, side: int) -> None:
        """Set the side length of the tiles in which RDN processes images when gradients are disabled.

        Args:
            side: side of a tile in pixels of the high-resolution image.
        """
        self.tile = max(side // self.scale, 1)

    @torch.no_grad()
    def initialize_as_interpolation(self) -> None:
        """Set the weights so that the output of an untrained RDN is similar to bicubic interpolation of the input.

        The weights of the dense blocks stay random. The weights and biases of gff[1], the last convolution of the
        global feature fusion, are set to zero, so that the dense blocks do not change the output before training.

        Raises:
            UserError: if `num_features` is less than 3, or if `scale` is 3.
        """
        if self.sfe1.out_channels < 3:
            raise UserError(f"--start interpolation needs --num-features of at least 3, got {self.sfe1.out_channels}")
        if self.scale == 3:
            raise UserError("--start interpolation is defined for scales 2 and 4: use --start random for scale 3")
        nn.init.zeros_(self.gff[1].weight)
        nn.init.zeros_(self.gff[1].bias)
        identity = F.pad(torch.ones(1, 1), (1, 1, 1, 1))  # (3, 3)
        set_convolution_to_filter_colours_separately(self.sfe1, [identity])
        set_convolution_to_filter_colours_separately(self.output, [identity])
        taps = torch.tensor(INTERPOLATION)  # (2, 3)
        quarters = [torch.outer(vertical, horizontal) for vertical in taps for horizontal in taps]  # 4 x (3, 3)
        for layer in self.upscale:
            if isinstance(layer, nn.Conv2d):
                set_convolution_to_filter_colours_separately(layer, quarters)


def set_convolution_to_filter_colours_separately(layer: nn.Conv2d, kernels: list[Tensor]) -> None:
    """Set the weights of a convolution so that it applies each of the 3x3 kernels to red, green and blue separately.

    The convolution of input channel c (0 = red, 1 = green, 2 = blue) with kernels[k] gives output channel
    len(kernels) * c + k, because nn.PixelShuffle expects the output channels of one colour next to each other.
    """
    count = len(kernels)
    layer.weight[: 3 * count] = 0
    layer.bias[: 3 * count] = 0
    for colour in range(3):
        for k, kernel in enumerate(kernels):
            layer.weight[colour * count + k, colour] = kernel
