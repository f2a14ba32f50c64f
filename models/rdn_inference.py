"""Run RDN without gradients, in less memory and, on a CPU, in less time than the forward pass of training.

`run_rdn` and the forward pass of training compute equal images except for rounding errors.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.tiling import apply_function_in_tiles
from models.winograd import DenseMaps, should_use_winograd

# STRIP_BYTES is the size in bytes of one channel of a strip of rows, chosen so that a strip fits into a CPU's caches.
STRIP_BYTES = 2**15
# UPSCALE_TILE and UPSCALE_HALO are the side and the margin of the tiles in up-sampling, in low-resolution pixels.
# UPSCALE_HALO must be at least 1.75, because an up-sampled pixel depends on input pixels up to 1.75 pixels away.
UPSCALE_TILE, UPSCALE_HALO = 64, 2


def run_rdn(model: nn.Module, x_lr: Tensor) -> Tensor:
    """Enlarge images x_lr (B, 3, h, w) in [0, 1] with a `models.rdn.RDN`, without computing gradients.

    Returns:
        x_hat: enlarged images, float32 (B, 3, scale * h, scale * w), not clipped to [0, 1].
    """
    sfe1 = model.sfe1(x_lr)  # (B, G0, h, w)
    x = run_and_fuse_blocks(model, model.sfe2(sfe1))  # (B, G0, h, w)
    x = model.gff[1](x).add_(sfe1)  # (B, G0, h, w)
    return apply_function_in_tiles(model.upsample_to_image, x, side=UPSCALE_TILE, halo=UPSCALE_HALO, scale=model.scale)


def run_and_fuse_blocks(model: nn.Module, x: Tensor) -> Tensor:
    """Run the dense blocks one after another, starting with x (B, G0, h, w), and fuse the outputs of all blocks.

    The fusion is computed as a sum of 1x1 convolutions, because summing takes less memory than a convolution of the
    concatenated outputs. Even under autocast, the fused feature maps have the data type of RDN's parameters (float32).
    """
    fusion = model.gff[0]
    weights = fusion.weight.split(x.shape[1], dim=1)  # one weight (G0, G0, 1, 1) per block
    tile = (model.tile, model.tile)
    run_block = run_dense_block_in_strips
    if should_use_winograd(x, model.rdbs[0].layers):
        run_block = partial(run_dense_block_by_winograd, scratch=x.new_empty(0))
        # Winograd's algorithm takes more memory than a direct convolution, so the height of RDN's tiles is halved here.
        tile = (model.tile // 2, model.tile)
    fused = torch.empty_like(x, dtype=fusion.bias.dtype)
    fused.copy_(fusion.bias[:, None, None])
    for block, weight in zip(model.rdbs, weights, strict=True):
        # The halo (margin) of a tile needs one pixel for each dense layer, because a dense layer is a 3x3 convolution.
        x = apply_function_in_tiles(partial(run_block, block), x, side=tile, halo=len(block.layers))  # (B, G0, h, w)
        for fused_rows, rows in zip(fused.split(model.tile, dim=2), x.split(model.tile, dim=2), strict=True):
            fused_rows.add_(F.conv2d(rows, weight))
    return fused


def run_dense_block_in_strips(block: nn.Module, x: Tensor) -> Tensor:
    """Run a residual dense block on x (B, G0, h, w), on a CPU on a few rows at a time."""
    rows = x.shape[2]
    if x.device.type == "cpu":
        row_bytes = x[:, 0, 0].nbytes
        rows = max(STRIP_BYTES // row_bytes, 1)
    strip = (rows, x.shape[3])
    maps = [x]
    for layer in block.layers:
        maps.append(apply_function_in_tiles(layer, *maps, side=strip, halo=1))  # (B, G, h, w)
    fused = apply_function_in_tiles(block.fuse_maps, *maps, side=strip, halo=0)  # (B, G0, h, w)
    return fused.add_(x)


def run_dense_block_by_winograd(block: nn.Module, x: Tensor, scratch: Tensor) -> Tensor:
    """Run a residual dense block on x (B, G0, h, w) with Winograd's algorithm.

    Args:
        scratch: one-dimensional float32 tensor for intermediate results, which each call resizes and overwrites.
    """
    transformed = DenseMaps(x, len(block.layers), scratch)
    # block.lff.weight has equal parts for x and for the output of each dense layer, because `should_use_winograd`
    # requires that growth_rate equals num_features.
    first_weight, *weights = block.lff.weight.split(x.shape[1], dim=1)
    fused = F.conv2d(x, first_weight, block.lff.bias)  # (B, G0, h, w)
    maps = x
    for layer, weight in zip(block.layers, weights, strict=True):
        maps = transformed.append_map_and_convolve_all_maps(layer.conv, maps).relu_()  # (B, G, h, w)
        fused.add_(F.conv2d(maps, weight))
    return fused.add_(x)
