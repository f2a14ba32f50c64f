"""Run a convolutional network on one tile of a feature map at a time, to save memory."""

import math
from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor


def apply_function_in_tiles(
    function: Callable[..., Tensor],
    *maps: Tensor,
    side: int | tuple[int, int],
    halo: int,
    scale: Fraction | int = 1,
) -> Tensor:
    """Compute function(*maps) on one tile of the feature maps at a time.

    At the border of the feature map, a tile has no halo, because `function` pads its input at the border. The result
    equals function(*maps) if each output value depends only on input pixels that are at most `halo` pixels away.

    Args:
        function: a sequence of convolutions with "same" padding, poolings and per-pixel operations, which computes a
            result (B, C', scale * h, scale * w) from `maps`, with height and width rounded down or up.
        maps: one or more feature maps (B, C, h, w) of equal height and width.
        side: side length of a square tile, or (height, width) of a tile, in pixels of `maps`. The products of
            `scale` with both sides of a tile must be integers.
        halo: width in pixels of the margin around each tile. `scale * halo` must be an integer.
        scale: factor by which `function` changes the height and the width of `maps`.
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
            y = y[:, :, int((top - y0) * scale) :, int((left - x0) * scale) :]
            y = y[:, :, : int(tile_height * scale), : int(tile_width * scale)]
            row = int(top * scale)
            column = int(left * scale)
            bottom = row + y.shape[2]
            right = column + y.shape[3]
            result[:, :, row:bottom, column:right] = y
    # If `function` rounds the size of its output down, the last row or column of `result` has no values and is removed.
    return result[:, :, :bottom, :right]
