"""Small classifiers for training on few images.

A ResNet memorises a few hundred training images. The classifiers in this file first reduce a residual to few numbers.

`SpectrumClassifier` is for pixel residuals, and compares the power of each frequency with neighbouring frequencies.
Averaging a spectrum over overlapping windows is Welch's method (IEEE Transactions on Audio and Electroacoustics, 1967).

`ChannelPowerClassifier` is for residuals of VGG-19 features, and uses the power of each channel. The channel powers
separate real from generated images better than the spectrum of VGG-19 features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# This power is added before each logarithm. It is far below the noise power of rounding an image in [0, 1] to 8 bits.
SMALLEST_POWER = 1e-7

# This value is added before the logarithm of a distance, which is about 1 for an average training image.
SMALLEST_DISTANCE = 1e-4


class SpectrumClassifier(nn.Module):
    """A classifier on the power spectrum: residual (B, channels, H, W) -> logits (B, 2), columns FAKE, REAL.

    The power spectrum is averaged over overlapping windows, channels, mirror images and quarter turns. Then each log
    power is reduced by the mean log power of neighbouring frequencies. The differences show the peaks and edges that
    up-sampling leaves in a spectrum. The differences depend little on brightness, sharpness and image content.

    Each logit is the sum of two parts. A network with one hidden layer finds the traces of the generators in the training
    images. The other part is the log distance from a learned centre. Training moves real images towards the centre, so
    an image that is unlike real images counts as fake, even if its generator was not among the training images.

    Use this classifier with `--residual signed`, because the absolute value mixes the frequencies. Images may have any
    size.

    Args:
        channels: number of channels of the residual. The log spectra of the channels are averaged.
        window: side of the windows in pixels, an even number. Windows overlap by half their side.
        neighbourhood: side of the square of neighbouring frequencies, an odd number.
        hidden: number of units of the hidden layer, and number of dimensions in which the distance is measured.
        dropout: probability of dropout, which is applied to the inputs of both parts and after the hidden layer.
    """

    def __init__(
        self,
        channels: int,
        window: int = 32,
        neighbourhood: int = 5,
        hidden: int = 32,
        dropout: float = 0.5,
    ):
        super().__init__()
        self.window = window
        self.neighbourhood = neighbourhood
        taper = torch.hann_window(window, periodic=False)
        taper = torch.outer(taper, taper) / taper.square().sum()
        self.register_buffer("taper", taper, persistent=False)  # (window, window)
        half = window // 2 + 1  # frequencies 0 .. n / 2
        # After averaging over quarter turns, the spectrum is a symmetric matrix: its upper triangle is enough
        self.register_buffer("triangle", torch.triu_indices(half, half), persistent=False)  # (2, half * (half + 1) / 2)
        count = self.triangle.shape[1]
        self.standardise = Standardise(count)
        self.layers = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(count, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, 2)
        )
        self.projection = nn.Sequential(nn.Dropout(dropout), nn.Linear(count, hidden))
        self.distance_weight = nn.Parameter(torch.ones(1))

    def forward(self, residual: Tensor) -> Tensor:
        """Classify residuals (B, channels, H, W). Returns logits (B, 2)."""
        values = self.standardise(self.spectrum(residual))  # (B, half * (half + 1) / 2)
        distance = self.projection(values).square().mean(dim=1, keepdim=True)  # (B, 1)
        log_distance = self.distance_weight * (distance + SMALLEST_DISTANCE).log()
        return self.layers(values) + torch.cat([log_distance, -log_distance], dim=1)

    def spectrum(self, x: Tensor) -> Tensor:
        """Compute the log power of each frequency minus the mean log power of its neighbours.

        Args:
            x: (B, C, H, W).

        Returns:
            (B, half * (half + 1) / 2), where half is the number of frequencies 0 .. window / 2.
        """
        n = self.window
        half = n // 2 + 1
        x = pad_to(x, n)  # (B, C, H, W), H and W at least n
        windows = x.unfold(2, n, n // 2).unfold(3, n, n // 2)  # (B, C, rows, columns, n, n)
        windows = windows - windows.mean(dim=(-2, -1), keepdim=True)
        power = torch.fft.rfft2(windows * self.taper).abs().square()  # (B, C, rows, columns, n, half)
        power = power.mean(dim=(2, 3))  # (B, C, n, half)
        log_power = (power + SMALLEST_POWER).log().mean(dim=1)  # (B, n, half)
        # Average over mirror images: mirroring an image exchanges the rows f and -f of its spectrum
        mirrored = log_power.flip(1).roll(1, dims=1)
        log_power = (log_power + mirrored)[:, :half] / 2  # (B, half, half)
        # Average over quarter turns
        log_power = (log_power + log_power.transpose(1, 2)) / 2
        return (log_power - self.local_mean(log_power))[:, self.triangle[0], self.triangle[1]]

    def local_mean(self, spectrum: Tensor) -> Tensor:
        """Average each frequency with its neighbours, mirrored at the borders: (B, half, half) -> (B, half, half)."""
        reach = self.neighbourhood // 2
        padded = F.pad(spectrum[:, None], (reach, reach, reach, reach), mode="reflect")
        return F.avg_pool2d(padded, self.neighbourhood, stride=1)[:, 0]


class ChannelPowerClassifier(nn.Module):
    """A linear classifier on channel powers: residual (B, channels, H, W) -> logits (B, 2), columns FAKE, REAL.

    The power of a channel is the mean of its squared values. From each log power, the mean log power of all channels is
    subtracted, so that the contrast of the image has no effect.

    Args:
        channels: number of channels of the residual.
        dropout: probability of dropout before the linear layer.
    """

    def __init__(self, channels: int, dropout: float = 0.5):
        super().__init__()
        self.standardise = Standardise(channels)
        self.layers = nn.Sequential(nn.Dropout(dropout), nn.Linear(channels, 2))

    def forward(self, residual: Tensor) -> Tensor:
        """Classify residuals (B, channels, H, W). Returns logits (B, 2)."""
        power = residual.square().mean(dim=(2, 3))  # (B, channels)
        log_power = (power + SMALLEST_POWER).log()
        log_power = log_power - log_power.mean(dim=1, keepdim=True)
        return self.layers(self.standardise(log_power))


class Standardise(nn.BatchNorm1d):
    """Batch norm without trained parameters: (B, count) -> (B, count).

    A training batch of one image is normalised by the running statistics, as in evaluation.
    """

    def __init__(self, count: int):
        super().__init__(count, affine=False)

    def forward(self, values: Tensor) -> Tensor:
        if self.training and len(values) > 1:
            return super().forward(values)
        return F.batch_norm(values, self.running_mean, self.running_var)


def pad_to(x: Tensor, side: int) -> Tensor:
    """Reflect maps (B, C, H, W) at their borders until height and width are at least `side`."""
    while min(x.shape[2:]) < side:
        missing_rows = max(side - x.shape[2], 0)
        missing_columns = max(side - x.shape[3], 0)
        bottom = min(missing_rows, x.shape[2] - 1)  # reflection can add at most H - 1 rows at a time
        right = min(missing_columns, x.shape[3] - 1)
        if bottom == right == 0:
            # A single row or column cannot be reflected
            return F.pad(x, (0, missing_columns, 0, missing_rows), mode="replicate")
        x = F.pad(x, (0, right, 0, bottom), mode="reflect")
    return x
