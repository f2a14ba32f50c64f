"""Classifiers for few images. A ResNet memorises a few hundred images; these reduce a residual to few numbers first.

`SpectrumClassifier` is for pixel residuals: the power spectrum, each frequency against its neighbours. Averaging over
overlapping windows is Welch's method (IEEE Transactions on Audio and Electroacoustics, 1967). `ChannelPowerClassifier` is
for residuals of VGG-19 features, whose channels tell more than their spectrum.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALLEST_POWER = 1e-7  # far below what rounding an image in [0, 1] to 8 bits leaves


class SpectrumClassifier(nn.Module):
    """residual (B, channels, H, W) -> logits (B, 2), columns FAKE, REAL, for images of any size.

    The power spectrum is averaged over overlapping windows, the channels, mirror images and quarter turns. From the
    logarithm of each frequency the mean of its neighbourhood is subtracted. This keeps peaks and edges of the spectrum,
    which up-sampling leaves, and discards brightness, sharpness and most of the content.

    Use it with `--residual signed`: the absolute value mixes the frequencies.

    Args:
        channels: of the residual. Their log spectra are averaged.
        window: side of the windows in pixels, even. They overlap by half.
        neighbourhood: side of the neighbourhood in the spectrum, odd.
        hidden: number of units of the hidden layer.
        dropout: probability, before the hidden layer and after it.
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
        self.register_buffer("taper", taper, persistent=False)  # (n, n)
        half = window // 2 + 1  # frequencies 0 .. n / 2
        # The spectrum is symmetric, so that half of it, its upper triangle, is used
        self.register_buffer("triangle", torch.triu_indices(half, half), persistent=False)  # (2, half * (half + 1) / 2)
        count = self.triangle.shape[1]
        self.standardise = Standardise(count)
        self.layers = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(count, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, 2)
        )

    def forward(self, residual: Tensor) -> Tensor:
        """residual: (B, channels, H, W). Returns logits (B, 2)."""
        values = self.spectrum(residual)  # (B, half * (half + 1) / 2)
        return self.layers(self.standardise(values))

    def spectrum(self, x: Tensor) -> Tensor:
        """Compute the log power of each frequency against its neighbourhood: (B, C, H, W) -> (B, half * (half + 1) / 2)."""
        n = self.window
        half = n // 2 + 1
        x = pad_to(x, n)  # (B, C, H, W), H and W at least n
        windows = x.unfold(2, n, n // 2).unfold(3, n, n // 2)  # (B, C, rows, columns, n, n)
        windows = windows - windows.mean(dim=(-2, -1), keepdim=True)
        power = torch.fft.rfft2(windows * self.taper).abs().square()  # (B, C, rows, columns, n, half)
        power = power.mean(dim=(2, 3))  # (B, C, n, half)
        log_power = (power + SMALLEST_POWER).log().mean(dim=1)  # (B, n, half)
        # Average over mirror images: row -f takes the place of row f
        mirrored = log_power.flip(1).roll(1, dims=1)
        log_power = (log_power + mirrored)[:, :half] / 2  # (B, half, half)
        # Average over quarter turns
        log_power = (log_power + log_power.transpose(1, 2)) / 2
        return (log_power - self.local_mean(log_power))[:, self.triangle[0], self.triangle[1]]

    def local_mean(self, spectrum: Tensor) -> Tensor:
        """Average over the neighbourhood of each frequency, mirrored at the borders: (B, half, half) -> the same."""
        reach = self.neighbourhood // 2
        padded = F.pad(spectrum[:, None], (reach, reach, reach, reach), mode="reflect")
        return F.avg_pool2d(padded, self.neighbourhood, stride=1)[:, 0]


class ChannelPowerClassifier(nn.Module):
    """residual (B, channels, H, W) -> logits (B, 2), columns FAKE, REAL: linear in the log power of each channel.

    The mean over the channels is subtracted, so that the contrast of the image does not count.

    Args:
        channels: of the residual.
        dropout: probability, before the linear layer.
    """

    def __init__(self, channels: int, dropout: float = 0.5):
        super().__init__()
        self.standardise = Standardise(channels)
        self.layers = nn.Sequential(nn.Dropout(dropout), nn.Linear(channels, 2))

    def forward(self, residual: Tensor) -> Tensor:
        """residual: (B, channels, H, W). Returns logits (B, 2)."""
        power = residual.square().mean(dim=(2, 3))  # (B, channels)
        log_power = (power + SMALLEST_POWER).log()
        log_power = log_power - log_power.mean(dim=1, keepdim=True)
        return self.layers(self.standardise(log_power))


class Standardise(nn.BatchNorm1d):
    """Batch norm without parameters: (B, count) -> (B, count). A batch of one image uses the running statistics."""

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
        bottom = min(missing_rows, x.shape[2] - 1)  # reflecting adds at most one value less than there are
        right = min(missing_columns, x.shape[3] - 1)
        if bottom == right == 0:
            return F.pad(x, (0, missing_columns, 0, missing_rows), mode="replicate")  # a side of a single value
        x = F.pad(x, (0, right, 0, bottom), mode="reflect")
    return x
