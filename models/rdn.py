"""RDN, the re-synthesizer: a residual dense network for single-image super-resolution.

Follows Zhang, Tian, Kong, Zhong and Fu, "Residual Dense Network for Image Super-Resolution" (CVPR 2018);
parameter names are those of yjn870/RDN-pytorch (MIT), which the released checkpoints use.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.tiling import in_tiles
from models.winograd import DenseMaps, pays
from utils.errors import UserError

STRIP_BYTES = 2**15  # of one channel: how much is concatenated at a time without gradients, on a CPU
INTERPOLATION = ((1 / 8, 1.0, -1 / 8), (-1 / 8, 1.0, 1 / 8))  # of the left and the right half of a pixel, along a line
TAIL_SIDE, TAIL_HALO = 64, 2  # LR pixels: of the up-sampling, whose maps are the largest; its convolutions reach 1 3/4


def conv(in_channels: int, out_channels: int, side: int = 3) -> nn.Conv2d:
    """A "same"-padded convolution."""
    return nn.Conv2d(in_channels, out_channels, side, padding=side // 2)


class DenseLayer(nn.Module):
    """One layer of a dense block: `growth_rate` new channels of all there are, which come in pieces."""

    def __init__(self, in_channels: int, growth_rate: int):
        super().__init__()
        self.conv = conv(in_channels, growth_rate)

    def forward(self, *pieces: Tensor) -> Tensor:
        return self.conv(torch.cat(pieces, dim=1)).relu_()  # (B, G, h, w)


class ResidualDenseBlock(nn.Module):
    """Dense layers, fused by a 1x1 convolution ("local feature fusion") and added to the block's input."""

    def __init__(self, num_features: int, growth_rate: int, num_layers: int):
        super().__init__()
        widths = [num_features + i * growth_rate for i in range(num_layers + 1)]  # before each layer, and of all
        self.layers = nn.Sequential(*[DenseLayer(width, growth_rate) for width in widths[:-1]])
        # Release: maps to growth_rate, which only works where it equals num_features; the paper's form is this.
        self.lff = conv(widths[-1], num_features, 1)

    def forward(self, x: Tensor, scratch: Tensor | None = None) -> Tensor:
        """(B, G0, h, w) -> (B, G0, h, w). scratch: see `models.winograd.DenseMaps`; None: for direct convolutions."""
        if scratch is not None:
            return self._transformed(x, scratch)
        rows, pieces = x.shape[2], [x]
        if not (torch.is_grad_enabled() or x.is_cuda):  # strips of rows suit a CPU's caches
            rows = max(STRIP_BYTES // x[:, 0, 0].nbytes, 1)
        strip = rows, x.shape[3]
        for layer in self.layers:
            pieces.append(in_tiles(layer, *pieces, side=strip, halo=1))  # (B, G, h, w)
        fused = in_tiles(lambda *strips: self.lff(torch.cat(strips, dim=1)), *pieces, side=strip, halo=0)
        return fused.add_(x)  # (B, G0, h, w)

    def _transformed(self, x: Tensor, scratch: Tensor) -> Tensor:
        """The same by Winograd's convolutions; each layer's maps are fused at once, and kept in transformed form only."""
        maps, piece = DenseMaps(x, len(self.layers), scratch), x
        first, *weights = self.lff.weight.split(x.shape[1], dim=1)  # (G0, G, 1, 1) each
        fused = F.conv2d(x, first, self.lff.bias)
        for layer, weight in zip(self.layers, weights, strict=True):
            piece = maps.convolve(layer.conv, piece).relu_()  # (B, G, h, w)
            fused.add_(F.conv2d(piece, weight))
        return fused.add_(x)  # (B, G0, h, w)


class RDN(nn.Module):
    """Residual dense network: (B, 3, h, w) in [0, 1] -> (B, 3, scale * h, scale * w), not clipped.

    Args:
        scale: up-sampling factor, 2, 3 or 4; others are a UserError.
        num_features: G0, channels between the blocks.
        growth_rate: G, channels each dense layer adds.
        num_blocks: D, residual dense blocks.
        num_layers: C, dense layers in each block.

    The defaults are the paper's: 22,271,107 parameters.
    """

    def __init__(
        self, scale: int = 4, num_features: int = 64, growth_rate: int = 64, num_blocks: int = 16, num_layers: int = 8
    ):
        super().__init__()
        if scale not in (2, 3, 4):
            raise UserError(f"RDN up-samples by 2, 3 or 4, not by {scale}: choose one of these as the scale")
        self.scale = scale
        self.checkpoint_blocks = False  # True: recompute each block in the backward pass instead of keeping it
        self.tile = 256  # LR pixels: side of the tiles the blocks work in without gradients; by Winograd half as high
        g0 = num_features
        self.sfe1 = conv(3, g0)
        self.sfe2 = conv(g0, g0)
        self.rdbs = nn.ModuleList([ResidualDenseBlock(g0, growth_rate, num_layers) for _ in range(num_blocks)])
        self.gff = nn.Sequential(conv(g0 * num_blocks, g0, 1), conv(g0, g0))
        layers = []
        for step in {2: [2], 3: [3], 4: [2, 2]}[scale]:
            layers += [conv(g0, g0 * step**2), nn.PixelShuffle(step)]
        self.upscale = nn.Sequential(*layers)
        self.output = conv(g0, 3)

    def forward(self, x_lr: Tensor) -> Tensor:
        """x_lr: (B, 3, h, w) in [0, 1]. Returns x_hat (B, 3, scale * h, scale * w), float32, about [0, 1]."""
        sfe1 = self.sfe1(x_lr)  # (B, G0, h, w)
        x = self.gff[1](self._fused_blocks(sfe1)).add_(sfe1)  # (B, G0, h, w)
        return in_tiles(partial(self._run, self._upscale), x, side=TAIL_SIDE, halo=TAIL_HALO, scale=self.scale)

    def _fused_blocks(self, sfe1: Tensor) -> Tensor:
        """All blocks' outputs, fused by gff.0: (B, G0, h, w) -> (B, G0, h, w).

        A 1x1 convolution of the concatenated outputs is the sum of one of each; it is kept in float32.
        """
        x, bias = self.sfe2(sfe1), self.gff[0].bias  # (B, G0, h, w), (G0,)
        scratch = x.new_empty(0) if pays(x, self.rdbs[0].layers) else None
        side = self.tile if scratch is None else (self.tile // 2, self.tile)  # transformed maps are larger
        fused = torch.empty_like(x, dtype=bias.dtype).copy_(bias[:, None, None])
        for block, weight in zip(self.rdbs, self.gff[0].weight.split(x.shape[1], dim=1), strict=True):
            if torch.is_grad_enabled():
                x = self._run(block, x)  # (B, G0, h, w)
                fused.add_(F.conv2d(x, weight))
            else:  # each 3x3 convolution reaches one pixel; fused some rows at a time, as they are copied to float32
                x = in_tiles(partial(block, scratch=scratch), x, side=side, halo=len(block.layers))  # (B, G0, h, w)
                for total, rows in zip(fused.split(self.tile, dim=2), x.split(self.tile, dim=2), strict=True):
                    total.add_(F.conv2d(rows, weight))
        return fused

    def _upscale(self, x: Tensor) -> Tensor:
        """(B, G0, h, w) -> (B, 3, scale * h, scale * w)."""
        x = self.upscale(x)  # (B, G0, scale * h, scale * w)
        # The residual is a small difference of two images: its last step stays float32 in any precision.
        with torch.autocast(x.device.type, enabled=False):
            return self.output(x.float())

    def _run(self, part: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """part(x); under `checkpoint_blocks` its maps are not kept for the backward pass."""
        recomputed = self.checkpoint_blocks and torch.is_grad_enabled()
        return checkpoint(part, x, use_reentrant=False) if recomputed else part(x)


@torch.no_grad()
def start_as_interpolation(model: RDN) -> RDN:
    """Weights under which a new RDN of scale 2 or 4 interpolates, so that training begins near bicubic interpolation.

    Features 0..2 carry red, green and blue: sfe1 copies them in, each up-sampling interpolates them, output copies them
    out; the dense blocks, random as ever, add nothing yet (gff.1 is 0). The two taps of INTERPOLATION of each side
    average to their centre, as a pixel of x_lr is the mean of those it stands for. Scale 3, whose up-sampling has other
    places, is a UserError.
    """
    if model.scale == 3:
        raise UserError("--start interpolation is for scales 2 and 4: leave it out for scale 3")
    taps = torch.tensor(INTERPOLATION)  # (2, 3)
    identity = F.pad(torch.ones(1, 1), (1, 1, 1, 1))  # (3, 3)
    for parameter in model.gff[1].parameters():
        nn.init.zeros_(parameter)
    kernels = {model.sfe1: [identity], model.output: [identity]}
    kernels |= {layer: [torch.outer(y, x) for y in taps for x in taps] for layer in model.upscale[::2]}
    for convolution, places in kernels.items():
        rows = 3 * len(places)  # of red, green and blue; pixel-shuffle: each has one for each place
        convolution.weight[:rows], convolution.bias[:rows] = 0, 0
        for channel, of_channel in enumerate(convolution.weight[:rows].split(len(places))):
            of_channel[:, channel] = torch.stack(places)
    return model


def rdn_config(state_dict: Mapping[str, Tensor], name: str = "the state dict") -> dict:
    """The arguments of `RDN` that fit these weights: an architecture is read off a file, not retyped."""
    try:
        num_features = state_dict["sfe1.weight"].shape[0]
        growth_rate = state_dict["rdbs.0.layers.0.conv.weight"].shape[0]
        shuffle = state_dict["upscale.0.weight"].shape[0] // num_features
    except KeyError as error:
        raise UserError(
            f"{name} holds no RDN: no key {error} among its {len(state_dict)}, the first of which is"
            f" {next(iter(state_dict), 'none')}; give a file written by train_sr.py or the released one"
        ) from None
    return {
        "scale": 3 if shuffle == 9 else 4 if "upscale.2.weight" in state_dict else 2,
        "num_features": num_features,
        "growth_rate": growth_rate,
        "num_blocks": len({key.split(".")[1] for key in state_dict if key.startswith("rdbs.")}),
        "num_layers": len({key.split(".")[3] for key in state_dict if key.startswith("rdbs.0.layers.")}),
    }
