"""Inference with RDN, in less memory than `models.rdn` and, on a CPU, in less time.

`infer` is the entry point of this module. Inference differs from RDN in training in three ways, which change the result
by rounding errors only:

- RDN runs on tiles of the image. Each tile is cut out with all pixels on which its result depends.
- The output of each dense block is added to the fused maps at once, so that the outputs of earlier blocks can be freed.
- On a CPU, dense layers run on a few rows at a time, which fit the caches, or use Winograd's convolution.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.tiling import in_tiles
from models.winograd import DenseMaps, is_faster

STRIP_BYTES = 2**15  # size of one channel of a strip, chosen to fit a CPU's caches
# Side and halo of the tiles for up-sampling, in low-resolution pixels. Up-sampling looks at 1.75 pixels to each side.
UPSCALE_TILE, UPSCALE_HALO = 64, 2


def infer(model: nn.Module, x_lr: Tensor) -> Tensor:
    """Run RDN on low-resolution images without gradients.

    Args:
        model: a `models.rdn.RDN`.
        x_lr: (B, 3, h, w) in [0, 1].

    Returns:
        x_hat: (B, 3, scale * h, scale * w), float32, about [0, 1].
    """
    sfe1 = model.sfe1(x_lr)  # (B, G0, h, w)
    x = fuse_blocks(model, model.sfe2(sfe1))  # (B, G0, h, w)
    x = model.gff[1](x).add_(sfe1)  # (B, G0, h, w)
    return in_tiles(model.upsample, x, side=UPSCALE_TILE, halo=UPSCALE_HALO, scale=model.scale)


def fuse_blocks(model: nn.Module, x: Tensor) -> Tensor:
    """Run all dense blocks, and the 1x1 convolution that fuses their outputs: (B, G0, h, w) -> (B, G0, h, w).

    A 1x1 convolution of the concatenated outputs equals a sum of 1x1 convolutions, one per block. The sum is computed
    in float32.
    """
    fusion = model.gff[0]
    weights = fusion.weight.split(x.shape[1], dim=1)  # one (G0, G0, 1, 1) per block
    tile = (model.tile, model.tile)
    run_block = dense_block_in_strips
    if is_faster(x, model.rdbs[0].layers):
        run_block = partial(dense_block_by_winograd, scratch=x.new_empty(0))
        tile = (model.tile // 2, model.tile)  # Winograd's transformed maps take more memory
    fused = torch.empty_like(x, dtype=fusion.bias.dtype)
    fused.copy_(fusion.bias[:, None, None])
    for block, weight in zip(model.rdbs, weights, strict=True):
        # Each layer of the block is a 3x3 convolution, which widens the receptive field by one pixel on each side
        x = in_tiles(partial(run_block, block), x, side=tile, halo=len(block.layers))  # (B, G0, h, w)
        for fused_rows, rows in zip(fused.split(model.tile, dim=2), x.split(model.tile, dim=2), strict=True):
            fused_rows.add_(F.conv2d(rows, weight))
    return fused


def dense_block_in_strips(block: nn.Module, x: Tensor) -> Tensor:
    """Run a residual dense block: (B, G0, h, w) -> (B, G0, h, w). On a CPU, each layer runs on a few rows at a time."""
    rows = x.shape[2]
    if x.device.type == "cpu":
        row_bytes = x[:, 0, 0].nbytes
        rows = max(STRIP_BYTES // row_bytes, 1)
    strip = (rows, x.shape[3])
    maps = [x]
    for layer in block.layers:
        maps.append(in_tiles(layer, *maps, side=strip, halo=1))  # (B, G, h, w)
    fused = in_tiles(block.fuse, *maps, side=strip, halo=0)  # (B, G0, h, w)
    return fused.add_(x)


def dense_block_by_winograd(block: nn.Module, x: Tensor, scratch: Tensor) -> Tensor:
    """Run a residual dense block by Winograd's convolution: (B, G0, h, w) -> (B, G0, h, w).

    Args:
        scratch: memory that all calls share, so that it is allocated once. See `models.winograd.DenseMaps`.
    """
    transformed = DenseMaps(x, len(block.layers), scratch)
    first_weight, *weights = block.lff.weight.split(x.shape[1], dim=1)  # (G0, G, 1, 1) each
    fused = F.conv2d(x, first_weight, block.lff.bias)  # (B, G0, h, w)
    maps = x
    for layer, weight in zip(block.layers, weights, strict=True):
        maps = transformed.convolve(layer.conv, maps).relu_()  # (B, G, h, w)
        fused.add_(F.conv2d(maps, weight))
    return fused.add_(x)
