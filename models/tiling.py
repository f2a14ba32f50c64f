"""Convolutional networks on a part of a map at a time: the same numbers in less memory."""

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
    """function(*maps), computed tile by tile. Exact if `halo` covers all that a pixel of the result depends on.

    Each tile is cut out with `halo` more pixels on all sides (none beyond the border of the map, where `function` pads
    as it does on the whole), and what was computed for those is thrown away.

    Args:
        function: a stack of "same"-padded convolutions, poolings and per-pixel operations: (B, C, h, w) ... ->
            (B, C', scale * h, scale * w), rounded down or up.
        maps: (B, C, h, w) each, of one size.
        side: of a tile, or its (height, width); a multiple of 1 / scale, as the halo.
    """
    (height, width), (tile_h, tile_w) = maps[0].shape[2:], (side, side) if isinstance(side, int) else side
    if torch.compiler.is_exporting() or (height <= tile_h and width <= tile_w):  # a graph has no loop over its size
        return function(*maps)
    result, bottom, right = None, 0, 0
    for top in range(0, height, tile_h):
        for left in range(0, width, tile_w):
            y0, x0 = max(top - halo, 0), max(left - halo, 0)
            y = function(*(m[:, :, y0 : top + tile_h + halo, x0 : left + tile_w + halo] for m in maps))
            if result is None:
                shape = (*y.shape[:2], *(math.ceil(size * scale) for size in (height, width)))
                result = torch.empty(shape, dtype=y.dtype, device=y.device, memory_format=torch.channels_last)
            y = y[:, :, int((top - y0) * scale) :, int((left - x0) * scale) :]
            y = y[:, :, : int(tile_h * scale), : int(tile_w * scale)]
            row, column = int(top * scale), int(left * scale)
            bottom, right = row + y.shape[2], column + y.shape[3]
            result[:, :, row:bottom, column:right] = y
    return result[:, :, :bottom, :right]
