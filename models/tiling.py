"""Tiling: run a convolutional network on one tile of a feature map at a time, which takes less memory."""

import math
from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor


def in_tiles(
    function: Callable[..., Tensor],
    *maps: Tensor,
    side: int | tuple[int, int],
    halo: int,
    scale: Fraction | int = 1,
) -> Tensor:
    """Compute function(*maps) tile by tile.

    Each tile is cut out with a halo of `halo` pixels on all sides, and the results for the halo are thrown away. The
    halo ends at the border of the map, where `function` pads as it does on the whole map. The result is exact if
    `function` looks at most `halo` pixels to each side.

    Args:
        function: a stack of "same"-padded convolutions, poolings and per-pixel operations: (B, C, h, w) ... ->
            (B, C', scale * h, scale * w), rounded down or up.
        maps: (B, C, h, w) each, all with one height and width.
        side: side of a tile, or its (height, width), in pixels of `maps`; a multiple of 1 / scale.
        halo: width of the halo in pixels of `maps`; a multiple of 1 / scale.
        scale: height of the result / height of the maps.
    """
    height, width = maps[0].shape[2:]
    tile_height, tile_width = (side, side) if isinstance(side, int) else side
    if height <= tile_height and width <= tile_width:
        return function(*maps)
    result = None
    bottom = right = 0
    for top in range(0, height, tile_height):
        for left in range(0, width, tile_width):
            y0 = max(top - halo, 0)
            x0 = max(left - halo, 0)
            y1 = top + tile_height + halo
            x1 = left + tile_width + halo
            y = function(*[m[:, :, y0:y1, x0:x1] for m in maps])
            if result is None:
                shape = (*y.shape[:2], math.ceil(height * scale), math.ceil(width * scale))
                result = torch.empty(shape, dtype=y.dtype, device=y.device, memory_format=torch.channels_last)
            # Throw away the results for the halo
            y = y[:, :, int((top - y0) * scale) :, int((left - x0) * scale) :]
            y = y[:, :, : int(tile_height * scale), : int(tile_width * scale)]
            row = int(top * scale)
            column = int(left * scale)
            bottom = row + y.shape[2]
            right = column + y.shape[3]
            result[:, :, row:bottom, column:right] = y
    return result[:, :, :bottom, :right]  # cut off the border that a function that rounds sizes down has not filled
