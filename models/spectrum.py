"""Small classifiers for training on a few hundred images, on which a ResNet overfits.

`SpectrumClassifier` is made for pixel residuals, and `ChannelPowerClassifier` for residuals of VGG-19 features. The
spectrum of a residual is averaged over overlapping windows by Welch's method (IEEE Transactions on Audio and
Electroacoustics, 1967).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.errors import UserError

# SMALLEST_POWER is added to each power, so that the logarithm is finite.
# SMALLEST_POWER is far below the power of the noise that rounding to 8 bits adds to an image in [0, 1].
SMALLEST_POWER = 1e-7

# SMALLEST_DISTANCE is added to the distance d in `SpectrumClassifier`, typically about 1, so that log(d) is finite.
SMALLEST_DISTANCE = 1e-4


class SpectrumClassifier(nn.Module):
    """A classifier that computes logits (B, 2) for FAKE and REAL from the spectrum of residuals (B, channels, H, W).

    The log power of the residual is averaged over all channels, the mirror image and rotations by 90 degrees. Then the
    mean log power of the neighbouring frequencies is subtracted from the log power of each frequency. The differences
    of log powers show the peaks and edges that up-sampling causes in a spectrum.

    A linear layer is applied to the standardized differences. The mean square of its outputs is called d: the distance
    of the image from real images. A network with one hidden layer computes two logits. Then w * log(d) is added to the
    logit for FAKE, and subtracted from the logit for REAL. The weight w is learned. So a large distance d raises the
    logit for FAKE, also for images of generators that are unseen in training.

    Use this classifier with `--residual signed`, because `--residual absolute` replaces each residual by its absolute
    value, which has another spectrum.

    Args:
        channels: not used, because the log spectra of all channels are averaged.
        window: side length of the windows in pixels, an even number.
        neighbourhood: side of the square of frequencies around each frequency, an odd number.
        hidden: number of units of the hidden layer, and number of dimensions in which the distance is computed.
        dropout: probability of dropout at the inputs of both terms and after the hidden layer.
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
        if window < 2 or window % 2:
            raise UserError(f"the window of the spectrum classifier must be an even number of pixels, got {window}")
        if neighbourhood < 1 or neighbourhood % 2 == 0:
            raise UserError(
                "the side length of the neighbourhood in the spectrum classifier must be an odd number of frequencies,"
                f" at least 1, got {neighbourhood}"
            )
        self.window = window
        self.neighbourhood = neighbourhood
        taper = torch.hann_window(window, periodic=False)
        taper = torch.outer(taper, taper) / taper.square().sum()
        self.register_buffer("taper", taper, persistent=False)  # two-dimensional Hann window, (window, window)
        half = window // 2 + 1  # number of the frequencies 0, 1, ..., window / 2
        # Only the upper triangle of the spectrum is used, because the averaged spectrum is a symmetric matrix
        self.register_buffer("triangle", torch.triu_indices(half, half), persistent=False)  # (2, count)
        count = self.triangle.shape[1]
        self.standardise = Standardise(count)
        self.layers = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(count, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, 2)
        )
        self.projection = nn.Sequential(nn.Dropout(dropout), nn.Linear(count, hidden))
        self.distance_weight = nn.Parameter(torch.ones(1))

    def forward(self, residual: Tensor) -> Tensor:
        """Compute the logits (B, 2) of residuals (B, channels, H, W)."""
        values = self.compute_spectrum_relative_to_neighbouring_frequencies(residual)  # (B, half * (half + 1) / 2)
        values = self.standardise(values)  # (B, half * (half + 1) / 2)
        distance = self.projection(values).square().mean(dim=1, keepdim=True)  # (B, 1)
        log_distance = self.distance_weight * (distance + SMALLEST_DISTANCE).log()
        return self.layers(values) + torch.cat([log_distance, -log_distance], dim=1)

    def compute_spectrum_relative_to_neighbouring_frequencies(self, x: Tensor) -> Tensor:
        """Compute the log power of each frequency of residuals x (B, C, H, W) minus the mean of its neighbours.

        Returns:
            the differences of log powers in the upper triangle of the spectrum, (B, half * (half + 1) / 2), where
            half = window / 2 + 1.
        """
        n = self.window
        half = n // 2 + 1
        x = pad_by_reflection(x, n)  # (B, C, H, W), H and W at least n
        windows = x.unfold(2, n, n // 2).unfold(3, n, n // 2)  # (B, C, rows, columns, n, n)
        windows = windows - windows.mean(dim=(-2, -1), keepdim=True)
        power = torch.fft.rfft2(windows * self.taper).abs().square()  # (B, C, rows, columns, n, half)
        power = power.mean(dim=(2, 3))  # (B, C, n, half)
        log_power = (power + SMALLEST_POWER).log().mean(dim=1)  # (B, n, half)
        # Mirroring an image swaps the rows f and -f of its spectrum
        mirrored = log_power.flip(1).roll(1, dims=1)
        log_power = (log_power + mirrored)[:, :half] / 2  # (B, half, half)
        # Average the spectrum with its transpose, which is the spectrum of the image rotated by 90 degrees
        log_power = (log_power + log_power.transpose(1, 2)) / 2
        return (log_power - self.average_neighbouring_frequencies(log_power))[:, self.triangle[0], self.triangle[1]]

    def average_neighbouring_frequencies(self, spectrum: Tensor) -> Tensor:
        """Compute the mean over the neighbourhood of each frequency in spectra (B, window / 2 + 1, window / 2 + 1)."""
        reach = self.neighbourhood // 2
        padded = F.pad(spectrum[:, None], (reach, reach, reach, reach), mode="reflect")
        return F.avg_pool2d(padded, self.neighbourhood, stride=1)[:, 0]


class ChannelPowerClassifier(nn.Module):
    """A linear classifier that computes logits (B, 2) for FAKE and REAL from the mean square of each residual channel.

    The classifier computes the logarithm of each mean square, and subtracts the mean of the logarithms over all
    channels, so that the contrast of the image does not change the logits.

    Args:
        dropout: probability of dropout before the linear layer.
    """

    def __init__(self, channels: int, dropout: float = 0.5):
        super().__init__()
        self.standardise = Standardise(channels)
        self.layers = nn.Sequential(nn.Dropout(dropout), nn.Linear(channels, 2))

    def forward(self, residual: Tensor) -> Tensor:
        """Compute the logits (B, 2) of residuals (B, channels, H, W)."""
        power = residual.square().mean(dim=(2, 3))  # (B, channels)
        log_power = (power + SMALLEST_POWER).log()
        log_power = log_power - log_power.mean(dim=1, keepdim=True)
        return self.layers(self.standardise(log_power))


class Standardise(nn.BatchNorm1d):
    """A batch norm without trainable weight and bias, for inputs (B, count) with `count` values per image.

    A training batch with a single image is normalized by the running mean and variance, as in evaluation.
    """

    def __init__(self, count: int):
        super().__init__(count, affine=False)

    def forward(self, values: Tensor) -> Tensor:
        if self.training and len(values) > 1:
            return super().forward(values)
        return F.batch_norm(values, self.running_mean, self.running_var)


def pad_by_reflection(x: Tensor, side: int) -> Tensor:
    """Extend residuals (B, C, H, W) by reflection at the bottom and right until both sides are at least `side`."""
    while min(x.shape[2:]) < side:
        missing_rows = max(side - x.shape[2], 0)
        missing_columns = max(side - x.shape[3], 0)
        bottom = min(missing_rows, x.shape[2] - 1)  # F.pad can reflect at most x.shape[2] - 1 rows at a time
        right = min(missing_columns, x.shape[3] - 1)
        if bottom == right == 0:
            # A single row or column cannot be reflected, so it is repeated
            return F.pad(x, (0, missing_columns, 0, missing_rows), mode="replicate")
        x = F.pad(x, (0, right, 0, bottom), mode="reflect")
    return x
