"""RDN, the residual dense network for super-resolution, which the paper uses as its re-synthesizer.

RDN is from Zhang, Tian, Kong, Zhong and Fu, "Residual Dense Network for Image Super-Resolution" (CVPR 2018). The
comments use the symbols of this article. The parameters are named as in yjn870/RDN-pytorch (MIT licence), because the
released checkpoints use these names.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models import rdn_inference
from utils.errors import UserError

LARGEST_COUNT = 1024  # largest number of channels, blocks or layers that RDN accepts
SHUFFLES = {2: (2,), 3: (3,), 4: (2, 2)}  # scale -> factors of the up-sampling steps
# Interpolation kernels for the left and the right half of a pixel, as weights of three neighbouring pixels. The two
# interpolated values average to the pixel itself, because down-sampling computes each pixel of x_lr as such an average.
INTERPOLATION = ((1 / 8, 1.0, -1 / 8), (-1 / 8, 1.0, 1 / 8))


def conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    """Create a 3x3 convolution that keeps height and width."""
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)


def conv1x1(in_channels: int, out_channels: int) -> nn.Conv2d:
    """Create a 1x1 convolution."""
    return nn.Conv2d(in_channels, out_channels, kernel_size=1)


class DenseLayer(nn.Module):
    """A dense layer: a 3x3 convolution and ReLU that read the maps of all earlier layers and add G new maps."""

    def __init__(self, in_channels: int, growth_rate: int):
        super().__init__()
        self.conv = conv3x3(in_channels, growth_rate)

    def forward(self, *maps: Tensor) -> Tensor:
        """Compute G new maps (B, G, h, w) from the maps of all earlier layers, (B, C_i, h, w) each."""
        return self.conv(torch.cat(maps, dim=1)).relu_()


class ResidualDenseBlock(nn.Module):
    """A residual dense block (RDB): C dense layers, then local feature fusion, then local residual learning."""

    def __init__(self, num_features: int, growth_rate: int, num_layers: int):
        super().__init__()
        layers = [DenseLayer(num_features + i * growth_rate, growth_rate) for i in range(num_layers)]
        self.layers = nn.Sequential(*layers)
        # Release: the released code gives this convolution growth_rate outputs, which fails unless growth_rate equals
        # num_features. In this project, the convolution has num_features outputs, as in the RDN article.
        self.lff = conv1x1(num_features + num_layers * growth_rate, num_features)

    def forward(self, x: Tensor) -> Tensor:
        """Run the dense layers, fuse their maps and add the input: (B, G0, h, w) -> (B, G0, h, w)."""
        maps = [x]
        for layer in self.layers:
            maps.append(layer(*maps))  # (B, G, h, w)
        return self.fuse(*maps) + x

    def fuse(self, *maps: Tensor) -> Tensor:
        """Fuse the input and the maps of all layers of the block (local feature fusion). Returns (B, G0, h, w)."""
        return self.lff(torch.cat(maps, dim=1))


class RDN(nn.Module):
    """A residual dense network: x_lr (B, 3, h, w) in [0, 1] -> x_hat (B, 3, scale * h, scale * w), not clipped.

    Args:
        scale: up-sampling factor: 2, 3 or 4.
        num_features: G0, number of channels between the blocks.
        growth_rate: G, number of channels that each dense layer adds.
        num_blocks: D, number of residual dense blocks.
        num_layers: C, number of dense layers in each block.

    With the default arguments, which are the paper's, RDN has 22,271,107 parameters.

    Raises:
        UserError: if the scale is not 2, 3 or 4, or if a number of channels, blocks or layers is not 1 to 1024.
    """

    def __init__(
        self, scale: int = 4, num_features: int = 64, growth_rate: int = 64, num_blocks: int = 16, num_layers: int = 8
    ):
        super().__init__()
        if scale not in tuple(SHUFFLES):
            raise UserError(f"the scale of RDN must be 2, 3 or 4, got {scale}")
        for count in (num_features, growth_rate, num_blocks, num_layers):
            if type(count) is not int or not 1 <= count <= LARGEST_COUNT:
                raise UserError(f"features, growth, blocks and layers of RDN must be 1 to {LARGEST_COUNT}, got {count}")
        self.scale = scale
        # True saves memory in training: the backward pass computes the maps of each block again instead of keeping them
        self.checkpoint_blocks = False
        self.tile = 256  # side of the tiles for inference without gradients, in low-resolution pixels
        self.sfe1 = conv3x3(3, num_features)
        self.sfe2 = conv3x3(num_features, num_features)
        blocks = [ResidualDenseBlock(num_features, growth_rate, num_layers) for _ in range(num_blocks)]
        self.rdbs = nn.ModuleList(blocks)
        self.gff = nn.Sequential(conv1x1(num_features * num_blocks, num_features), conv3x3(num_features, num_features))
        upscale = []
        for factor in SHUFFLES[scale]:
            upscale += [conv3x3(num_features, num_features * factor**2), nn.PixelShuffle(factor)]
        self.upscale = nn.Sequential(*upscale)
        self.output = conv3x3(num_features, 3)

    def forward(self, x_lr: Tensor) -> Tensor:
        """Enlarge x_lr (B, 3, h, w) in [0, 1]. Returns x_hat (B, 3, scale * h, scale * w), float32, about [0, 1]."""
        if not torch.is_grad_enabled():
            return rdn_inference.infer(self, x_lr)  # faster than the code below, and equal up to rounding
        # Shallow feature extraction
        sfe1 = self.sfe1(x_lr)  # F_-1: (B, G0, h, w)
        x = self.sfe2(sfe1)  # F_0: (B, G0, h, w)
        # Residual dense blocks
        block_outputs = []
        for block in self.rdbs:
            x = self.run(block, x)  # F_d: (B, G0, h, w)
            block_outputs.append(x)
        # Dense feature fusion: global feature fusion, then global residual learning
        x = self.run(self.fuse, *block_outputs) + sfe1  # F_DF: (B, G0, h, w)
        # Up-sampling
        return self.run(self.upsample, x)  # (B, 3, scale * h, scale * w)

    def fuse(self, *block_outputs: Tensor) -> Tensor:
        """Fuse the outputs of all blocks (global feature fusion). Returns F_GF (B, G0, h, w)."""
        return self.gff(torch.cat(block_outputs, dim=1))

    def upsample(self, x: Tensor) -> Tensor:
        """Up-sample the fused maps x (B, G0, h, w) to an image (B, 3, scale * h, scale * w), float32."""
        x = self.upscale(x)  # (B, G0, scale * h, scale * w)
        # The last layer computes in float32 under autocast, because the residual is a small difference of two images
        with torch.autocast(x.device.type, enabled=False):
            return self.output(x.float())

    def run(self, part, *inputs: Tensor) -> Tensor:
        """Run a part of the network. With `checkpoint_blocks`, the backward pass computes the part again."""
        if self.checkpoint_blocks:
            return checkpoint(part, *inputs, use_reentrant=False)
        return part(*inputs)

    def set_tile(self, side: int) -> None:
        """Set the side of the tiles for inference without gradients, in pixels of the high-resolution image."""
        self.tile = max(side // self.scale, 1)

    @torch.no_grad()
    def initialize_as_interpolation(self) -> None:
        """Set the weights so that the network interpolates, and training starts close to bicubic interpolation.

        Channels 0, 1 and 2 carry red, green and blue. The layer sfe1 copies the colours into these channels, each
        up-sampling step interpolates them, and the output layer copies them out. The dense blocks keep their random
        weights. The blocks have no effect at first, because the last layer of the global feature fusion is zero.

        Raises:
            UserError: if the scale is 3, because INTERPOLATION is a kernel for up-sampling by 2.
        """
        if self.scale == 3:
            raise UserError("--start interpolation is defined for scales 2 and 4: use --start random for scale 3")
        nn.init.zeros_(self.gff[1].weight)
        nn.init.zeros_(self.gff[1].bias)
        identity = F.pad(torch.ones(1, 1), (1, 1, 1, 1))  # (3, 3)
        set_colour_kernels(self.sfe1, [identity])
        set_colour_kernels(self.output, [identity])
        taps = torch.tensor(INTERPOLATION)  # (2, 3)
        quarters = [torch.outer(vertical, horizontal) for vertical in taps for horizontal in taps]  # 4 x (3, 3)
        for layer in self.upscale:
            if isinstance(layer, nn.Conv2d):
                set_colour_kernels(layer, quarters)


def set_colour_kernels(layer: nn.Conv2d, kernels: list[Tensor]) -> None:
    """Make the first 3 * len(kernels) output channels of a layer depend on the input channels 0, 1 and 2 alone.

    Output channel len(kernels) * c + k is input channel c convolved with kernels[k], which is (3, 3). nn.PixelShuffle
    expects the channels in this order.
    """
    count = len(kernels)
    layer.weight[: 3 * count] = 0
    layer.bias[: 3 * count] = 0
    for colour in range(3):
        for k, kernel in enumerate(kernels):
            layer.weight[colour * count + k, colour] = kernel
