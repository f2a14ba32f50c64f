"""Winograd's algorithm F(4x4, 3x3) for 3x3 convolutions on a CPU.

The algorithm is described by Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (CVPR 2016). The 16
output values of a tile are OUTPUT @ ((KERNEL @ kernel) * (INPUT @ tile)), where `kernel` is a vector of 9 values, and
`tile` is a vector of 36 values.

Shapes in this file use the letters B (images), C (channels per map), O (output channels) and n (tiles).
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TILE_IN = 6  # side length of an input tile
TILE_OUT = 4  # side length of an output tile
PRODUCTS = TILE_IN**2
# Winograd's algorithm interpolates polynomials at the five points in POINTS and at infinity.
# With the values in POINTS, the largest measured rounding error is 2e-6 of the largest output value.
POINTS = (0.0, 0.5**0.5, -(0.5**0.5), 2**0.5, -(2**0.5))
TILES = 256  # number of tiles computed at a time, chosen so that the tiles fit into the caches of a CPU
# With fewer tiles than MIN_TILES or fewer channels than MIN_CHANNELS, a direct convolution is faster
MIN_TILES = 64
MIN_CHANNELS = 64


def compute_transform_matrices() -> tuple[Tensor, Tensor, Tensor]:
    """Compute the matrices INPUT (36, 36), KERNEL (36, 9) and OUTPUT (16, 36) by the Cook-Toom method."""
    exponents = torch.arange(TILE_IN)
    powers = torch.tensor(POINTS, dtype=torch.float64)[:, None] ** exponents  # (5, 6)
    infinity = torch.eye(TILE_IN, dtype=torch.float64)
    # Winograd's algorithm in one dimension has the matrices input_1d, kernel_1d and output_1d.
    # The value of a polynomial at infinity is defined as the coefficient of the highest power.
    input_1d = torch.cat([powers, infinity[-1:]]).inverse().T  # (6, 6)
    kernel_1d = torch.cat([powers[:, :3], infinity[2:3, :3]])  # (6, 3)
    output_1d = torch.cat([powers[:, :TILE_OUT], infinity[TILE_OUT - 1 : TILE_OUT, :TILE_OUT]]).T  # (4, 6)
    return tuple(torch.kron(matrix, matrix).float() for matrix in (input_1d, kernel_1d, output_1d))


INPUT, KERNEL, OUTPUT = compute_transform_matrices()


def should_use_winograd(x: Tensor, layers: nn.Sequential) -> bool:
    """Return whether to use Winograd's algorithm for the layers of a dense block with the input x (B, C, h, w).

    Winograd's algorithm is used only for inference in float32 on an x86 CPU with AVX. Each layer must have as many
    output channels as x has channels.
    """
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return False
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return False
    channels, height, width = x.shape[1:]
    if channels < MIN_CHANNELS or channels != layers[0].conv.out_channels:
        return False
    return height * width >= MIN_TILES * TILE_OUT**2


class DenseMaps:
    """A store that transforms the feature maps of a dense block for Winograd's algorithm, and keeps the results.

    Each feature map is transformed only once, although several layers read it.

    Args:
        like: any tensor with the shape (B, C, h, w) of the feature maps.
        count: number of feature maps that the store can hold.
        scratch: one-dimensional float32 tensor of any size, which is resized and overwritten with the transformed
            feature maps.
    """

    def __init__(self, like: Tensor, count: int, scratch: Tensor):
        batch, self.channels, self.height, self.width = like.shape
        self.rows = math.ceil(self.height / TILE_OUT)  # number of rows of tiles
        self.columns = math.ceil(self.width / TILE_OUT)
        self.strip_rows = max(TILES // self.columns, 1)  # number of rows of tiles that are computed at a time
        shape = (batch, self.rows, self.columns * count * PRODUCTS * self.channels)
        memory = scratch.resize_(math.prod(shape)).view(shape)
        self.transformed = []  # for each strip of n tiles, the transformed feature maps (count, n, 36 * C)
        for strip in self.split_images_into_strips(memory):
            self.transformed.append(strip.view(count, -1, PRODUCTS * self.channels))
        self.added = 0  # number of feature maps that were appended so far

    def append_map_and_convolve_all_maps(self, convolution: nn.Conv2d, x: Tensor) -> Tensor:
        """Store the feature map x (B, C, h, w), and apply `convolution` to the concatenation of all stored maps.

        Returns:
            the output of the convolution with "same" padding, (B, O, h, w).
        """
        self.added += 1
        weight = self.transform_kernel(convolution)  # (36 * O, C, maps, 1)
        out_channels = convolution.out_channels
        result = x.new_empty(len(x), self.rows, TILE_OUT, self.columns, TILE_OUT, out_channels)
        for tiles, maps, target in zip(
            self.cut_maps_into_overlapping_tiles(x),
            self.transformed,
            self.split_images_into_strips(result),
            strict=True,
        ):
            torch.bmm(INPUT.expand(len(tiles), -1, -1), tiles, out=maps[self.added - 1].view_as(tiles))
            # The grouped convolution multiplies tiles by kernels, and sums the products over maps and channels
            values = maps[: self.added]  # (number of stored feature maps, number of tiles, 36 * C)
            if self.added == 1:
                # For a single feature map, conv2d is faster if the tiles form rows and columns instead of one long row
                values = maps[0].view(-1, self.columns, maps.shape[2])
            # The shape of `products` is (1, 36 * O, rows, columns) for one stored feature map, else (1, 36 * O, 1, n).
            products = F.conv2d(values.permute(2, 0, 1)[None], weight, groups=PRODUCTS)
            products = products.permute(0, 2, 3, 1).reshape(-1, PRODUCTS, out_channels)  # (n, 36, O)
            y = OUTPUT @ products  # (n, 16, O)
            y = y.view(-1, self.columns, TILE_OUT, TILE_OUT, out_channels)  # (rows, columns, 4, 4, O)
            target.copy_(y.transpose(1, 2))
        y = result.view(len(x), self.rows * TILE_OUT, self.columns * TILE_OUT, out_channels)  # (B, H, W, O)
        y = y.add_(convolution.bias).permute(0, 3, 1, 2)  # (B, O, H, W)
        return y[:, :, : self.height, : self.width]

    def transform_kernel(self, convolution: nn.Conv2d) -> Tensor:
        """Transform the weight (O, maps * C, 3, 3) of a convolution that reads `maps` feature maps of C channels each.

        Returns:
            the transformed weight, (36 * O, C, maps, 1).
        """
        weight = convolution.weight.permute(2, 3, 0, 1).reshape(9, -1)  # (9, number of 3x3 kernels)
        weight = KERNEL @ weight  # (36, number of 3x3 kernels)
        weight = weight.view(PRODUCTS * convolution.out_channels, self.added, 1, self.channels)
        return weight.permute(0, 3, 1, 2)

    def split_images_into_strips(self, images: Tensor) -> list[Tensor]:
        """Split images (B, rows of tiles, ...) into strips of at most `strip_rows` rows of tiles."""
        parts = []
        for image in images:
            parts.extend(image.split(self.strip_rows))
        return parts

    def cut_maps_into_overlapping_tiles(self, x: Tensor) -> Iterator[Tensor]:
        """Cut feature maps x (B, C, h, w) into tiles of 6 x 6 pixels that overlap by 2 pixels.

        Yields:
            for each strip, a tensor (n, 36, C) with the 36 pixels of each of its n tiles.
        """
        right = self.columns * TILE_OUT - self.width
        bottom = self.rows * TILE_OUT - self.height
        x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1 + right, 1, 1 + bottom))  # (B, H, W, C)
        grid = x.unfold(1, TILE_IN, TILE_OUT).unfold(2, TILE_IN, TILE_OUT)  # (B, rows, columns, C, 6, 6)
        grid = grid.permute(0, 1, 2, 4, 5, 3)  # (B, rows, columns, 6, 6, C)
        for strip in self.split_images_into_strips(grid):
            yield strip.reshape(-1, PRODUCTS, self.channels)
