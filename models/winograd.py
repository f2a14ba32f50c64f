"""3x3 convolutions of a CPU by Winograd's minimal filtering F(4x4, 3x3): a quarter of the products of the direct form.

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (CVPR 2016). A tile of 6 x 6 values d and a kernel g
of 3 x 3 give 4 x 4 values of the result, OUTPUT [(KERNEL g) * (INPUT d)], with the tiles and the kernel as vectors.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IN, OUT, PLACES = 6, 4, 36  # sides of the tiles read and written; products of a tile
POINTS = (0.0, 0.5**0.5, -(0.5**0.5), 2**0.5, -(2**0.5))  # and infinity: rounding errors are small (measured)
TILES = 256  # at a time, so that what is made of them stays in a CPU's caches
FEWEST, FEWEST_CHANNELS = 64, 64  # tiles of an image and channels, below which the transforms cost more than they save


def transforms() -> tuple[Tensor, Tensor, Tensor]:
    """INPUT (36, 36), KERNEL (36, 9), OUTPUT (16, 36), made by Cook and Toom's method from POINTS."""
    powers = torch.tensor(POINTS, dtype=torch.float64)[:, None] ** torch.arange(IN)  # (5, 6)
    at_infinity = torch.eye(IN, dtype=torch.float64)
    of_input = torch.cat([powers, at_infinity[-1:]]).inverse().T  # (6, 6)
    of_kernel = torch.cat([powers[:, :3], at_infinity[2:3, :3]])  # (6, 3)
    of_output = torch.cat([powers[:, :OUT], at_infinity[OUT - 1 : OUT, :OUT]]).T  # (4, 6)
    return tuple(torch.kron(m, m).float() for m in (of_input, of_kernel, of_output))


INPUT, KERNEL, OUTPUT = transforms()


def pays(x: Tensor, layers: nn.Sequential) -> bool:
    """Whether a dense block's layers convolve maps like x (B, C, h, w) by Winograd's filtering.

    In float32 on an x86 CPU, without gradients; if the maps are large enough and the layers give as many as they get.
    """
    return (
        not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling())
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and torch.backends.cpu.get_cpu_capability().startswith("AVX")
        and x.shape[1] == layers[0].conv.out_channels >= FEWEST_CHANNELS
        and math.prod(x.shape[2:]) >= FEWEST * OUT**2
    )


class DenseMaps:
    """The maps of a dense block, each transformed once for all the layers that read it.

    Args:
        like: (B, C, h, w), of the shape of each piece.
        pieces: how many there will be.
        scratch: one-dimensional, float32, of any size: what it holds is lost. To keep it saves the time of getting memory.
    """

    def __init__(self, like: Tensor, pieces: int, scratch: Tensor):
        batch, self.channels, self.height, self.width = like.shape
        self.rows, self.columns = math.ceil(self.height / OUT), math.ceil(self.width / OUT)  # of tiles
        self.strip = max(TILES // self.columns, 1)  # rows of tiles
        shape = (batch, self.rows, self.columns * pieces * PLACES * self.channels)
        strips = self._strips(scratch.resize_(math.prod(shape)).view(shape))
        self.maps = [strip.view(pieces, -1, PLACES * self.channels) for strip in strips]
        self.pieces = 0

    def convolve(self, convolution: nn.Conv2d, piece: Tensor) -> Tensor:
        """The "same"-padded convolution of all pieces up to this new one: (B, C, h, w) -> (B, O, h, w)."""
        self.pieces += 1
        width = convolution.out_channels
        weight = KERNEL @ convolution.weight.permute(2, 3, 0, 1).reshape(9, -1)  # (36, O * pieces * C)
        weight = weight.view(PLACES * width, self.pieces, 1, self.channels).permute(0, 3, 1, 2)  # (36 O, C, pieces, 1)
        result = piece.new_empty(len(piece), self.rows, OUT, self.columns, OUT, width)
        for tiles, maps, target in zip(self._tiles(piece), self.maps, self._strips(result), strict=True):
            torch.bmm(INPUT.expand(len(tiles), -1, -1), tiles, out=maps[self.pieces - 1].view_as(tiles))
            # One product for each of the 36 places is a convolution in 36 groups; its kernel runs over the pieces
            x = maps[: self.pieces] if self.pieces > 1 else maps[0].view(-1, self.columns, maps.shape[2])
            products = F.conv2d(x.permute(2, 0, 1)[None], weight, groups=PLACES)  # (1, 36 O, ...), of all tiles
            y = OUTPUT @ products.permute(0, 2, 3, 1).reshape(-1, PLACES, width)  # (tiles, 16, O)
            target.copy_(y.view(-1, self.columns, OUT, OUT, width).transpose(1, 2))
        y = result.view(len(piece), self.rows * OUT, self.columns * OUT, width).add_(convolution.bias)
        return y.permute(0, 3, 1, 2)[:, :, : self.height, : self.width]  # (B, O, h, w)

    def _strips(self, images: Tensor) -> list[Tensor]:
        """Of images in rows of tiles (B, rows, ...) the strips, (strip, ...) each, image after image."""
        return [strip for image in images for strip in image.split(self.strip)]

    def _tiles(self, piece: Tensor) -> Iterator[Tensor]:
        """Of each strip the tiles, which overlap by two: (tiles, 36, C)."""
        right, bottom = self.columns * OUT - self.width, self.rows * OUT - self.height
        x = F.pad(piece.permute(0, 2, 3, 1), (0, 0, 1, 1 + right, 1, 1 + bottom))  # (B, H, W, C)
        grid = x.unfold(1, IN, OUT).unfold(2, IN, OUT).permute(0, 1, 2, 4, 5, 3)  # (B, rows, columns, 6, 6, C)
        for strip in self._strips(grid):
            yield strip.reshape(-1, PLACES, self.channels)
