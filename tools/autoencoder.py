"""TAEF2, a small image autoencoder. Its decoder leaves traces in images, as the decoders of image generators do.

The architecture and the weights are by Ollin Boer Bohan, https://github.com/madebyollin/taesd, commit 5cccb12, MIT
licence. TAEF2 was distilled from the autoencoder of FLUX.2. Download the weight files of the encoder and the decoder
from Bohan's repository, because this project does not contain them.
"""

import torch
from torch import Tensor, nn

from utils import checkpoints

WIDTH = 64  # number of channels of the hidden feature maps
LATENT_CHANNELS = 32
FACTOR = 8  # the encoder divides the height and the width of an image by this factor


class Pool(nn.Sequential):
    """Two 1 x 1 convolutions with a group norm and a ReLU between them, for feature maps x (B, 64, H, W)."""

    def __init__(self) -> None:
        wide = 4 * WIDTH
        super().__init__(
            nn.Conv2d(WIDTH, wide, 1, bias=False),
            nn.GroupNorm(4, wide),
            nn.ReLU(),
            nn.Conv2d(wide, WIDTH, 1, bias=False),
        )


class Block(nn.Module):
    """Three 3 x 3 convolutions with a skip connection, for feature maps x (B, 64, H, W)."""

    def __init__(self, pool: bool = False) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
        )
        self.pool = Pool() if pool else None

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


class SoftClamp(nn.Module):
    """A layer that limits latent values smoothly to the range from -3 to 3."""

    def forward(self, z: Tensor) -> Tensor:
        return 3 * torch.tanh(z / 3)


class Encoder(nn.Sequential):
    """The encoder of TAEF2, which converts images x (B, 3, H, W) in [0, 1] to latent maps z (B, 32, H / 8, W / 8)."""

    def __init__(self) -> None:
        layers = [nn.Conv2d(3, WIDTH, 3, padding=1), Block()]  # (B, 64, H, W)
        for pool in (False, False, True):
            layers.append(nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1, bias=False))  # halves height and width
            layers.extend([Block(pool), Block(pool), Block(pool)])
        layers.append(nn.Conv2d(WIDTH, LATENT_CHANNELS, 3, padding=1))  # (B, 32, H / 8, W / 8)
        super().__init__(*layers)


class Decoder(nn.Sequential):
    """The decoder of TAEF2, which converts latent maps z (B, 32, h, w) to images (B, 3, 8 h, 8 w).

    Pixel values of the decoded images may be slightly outside [0, 1].
    """

    def __init__(self) -> None:
        layers = [SoftClamp(), nn.Conv2d(LATENT_CHANNELS, WIDTH, 3, padding=1), nn.ReLU()]  # (B, 64, h, w)
        for blocks, pool in ((3, True), (3, False), (3, False)):
            layers.extend([Block(pool) for _ in range(blocks)])
            layers.append(nn.Upsample(scale_factor=2))  # nearest-neighbour: doubles height and width
            layers.append(nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False))
        layers.append(Block())
        layers.append(nn.Conv2d(WIDTH, 3, 3, padding=1))  # (B, 3, 8 h, 8 w)
        super().__init__(*layers)


class Autoencoder(nn.Module):
    """The image autoencoder TAEF2 for images (B, 3, H, W) in [0, 1], where H and W are multiples of 8.

    The output has the same shape as the input, and is clamped to [0, 1].
    """

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.decoder = Decoder()

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x)).clamp(0, 1)


def load_autoencoder(encoder_file: str, decoder_file: str) -> Autoencoder:
    """Create the autoencoder TAEF2 in evaluation mode, with float32 weights from `encoder_file` and `decoder_file`.

    Raises:
        UserError: if a file cannot be read or does not contain the weights of TAEF2.
    """
    model = Autoencoder()
    for part, file in ((model.encoder, encoder_file), (model.decoder, decoder_file)):
        checkpoints.load_weights(part, checkpoints.read_checkpoint_content(file), file)
    return model.eval()
