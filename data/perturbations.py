"""Perturbations of images: blur, cropping, JPEG compression, noise and resizing.

Images are uint8 (3, H, W) RGB tensors, and every perturbation returns an image of the same size as its input.

In the protocol frank2020, a perturbation changes an image with probability 0.5, at a random strength, as in Frank et
al., "Leveraging Frequency Analysis for Deep Fake Image Recognition" (ICML 2020). In the protocol sweep, a perturbation
changes every image at a fixed strength. Metrics of one protocol cannot be compared with metrics of the other protocol.

To add a perturbation, write a function that perturbs an image, and add the function to SWEEP or FRANK2020.
"""

import io
import math
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from data.images import resize_bicubic
from utils.errors import UserError, describe_tensor
from utils.random_streams import seeded_generator

# Constants of the protocol frank2020, from Frank et al.
PROBABILITY = 0.5
BLUR_KERNELS = ((3, 0.8), (5, 1.1), (7, 1.4), (9, 1.7))  # (size, sigma) in pixels; OpenCV derives sigma from the size
CROP_FRACTION = (0.05, 0.2)  # smallest and largest fraction of the height and width that is cut off
JPEG_QUALITY = (10, 75)  # lowest and highest quality, both included
NOISE_VARIANCE = (5.0, 20.0)  # smallest and largest variance, for pixel values in 0..255


def blur_image(image: Tensor, kernel_size: int, sigma: float) -> Tensor:
    """Blur an image with a Gaussian kernel, and round the result to uint8.

    The border is reflected without repeating the outermost pixel (BORDER_REFLECT_101 in OpenCV). Along an axis of n
    pixels, the radius of the kernel is at most n - 1.
    """
    x = image.float()  # (3, H, W)
    for _ in range(2):
        radius = min(kernel_size // 2, x.shape[-1] - 1)
        offsets = torch.arange(-radius, radius + 1)
        kernel = torch.softmax(-(offsets**2) / (2 * sigma**2), dim=0)  # Gaussian weights (2 * radius + 1,) with sum 1
        padded = F.pad(x[:, None], (radius, radius, 0, 0), mode="reflect")
        x = F.conv2d(padded, kernel.view(1, 1, 1, -1))[:, 0]
        x = x.transpose(1, 2)  # (3, W, H) after the first pass of the loop, (3, H, W) after the second pass
    return _round_to_uint8(x)


def crop_and_enlarge(image: Tensor, fraction: float) -> Tensor:
    """Crop the centre of an image, and enlarge the crop to the size of the image.

    The crop is enlarged by bicubic interpolation without antialiasing, because PyTorch then uses the bicubic kernel of
    OpenCV.

    Args:
        fraction: fraction of the height and of the width that is cut off, in equal parts at both ends.
    """
    height, width = image.shape[-2:]
    top = int(height * fraction * 0.5)
    left = int(width * fraction * 0.5)
    inner = image[:, top : height - top, left : width - left]
    return resize_bicubic(inner, height, width, antialias=False)


def compress_as_jpeg(image: Tensor, quality: int) -> Tensor:
    """Compress an image as baseline 4:2:0 JPEG with libjpeg's `quality` (1 to 100), and decode the JPEG image."""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality, subsampling="4:2:0")
    decoded = np.array(Image.open(file))  # (H, W, 3)
    return torch.from_numpy(decoded).permute(2, 0, 1).contiguous()  # (3, H, W)


def add_noise(image: Tensor, std: float, rng: np.random.Generator) -> Tensor:
    """Add independent Gaussian noise to each pixel and channel of an image, then round and clip to 0..255.

    Args:
        std: standard deviation of the noise, for pixel values in 0..255.
    """
    noise = torch.from_numpy(rng.standard_normal(tuple(image.shape)))
    return _round_to_uint8(image + std * noise)


def shrink_and_enlarge(image: Tensor, factor: float) -> Tensor:
    """Shrink both sides of an image by a factor in (0, 1], and enlarge it to its original size (bicubic)."""
    height, width = image.shape[-2:]
    small = resize_bicubic(image, max(1, round(height * factor)), max(1, round(width * factor)))
    return resize_bicubic(small, height, width)


def _round_to_uint8(x: Tensor) -> Tensor:
    return x.round().clamp(0, 255).to(torch.uint8)


# --- frank2020: random strengths ----------------------------------------------------------------------------


def crop_by_random_amount(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Cut a random fraction (CROP_FRACTION) off the sides of an image, and enlarge the rest to the original size."""
    return crop_and_enlarge(image, rng.uniform(*CROP_FRACTION))


def blur_by_random_amount(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Blur an image with a Gaussian kernel that is drawn at random from BLUR_KERNELS."""
    kernel_size, sigma = BLUR_KERNELS[rng.integers(len(BLUR_KERNELS))]
    return blur_image(image, kernel_size, sigma)


def add_random_amount_of_noise(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Add Gaussian noise with a random variance (NOISE_VARIANCE) to an image."""
    return add_noise(image, math.sqrt(rng.uniform(*NOISE_VARIANCE)), rng)


def compress_with_random_quality(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Compress an image as JPEG with a random quality (JPEG_QUALITY)."""
    return compress_as_jpeg(image, int(rng.integers(*JPEG_QUALITY, endpoint=True)))


# The setting "combined" applies perturbations in the order of FRANK2020.
# JPEG is last, because an image is usually compressed when it is saved.
FRANK2020 = {
    "crop": crop_by_random_amount,
    "blur": blur_by_random_amount,
    "noise": add_random_amount_of_noise,
    "jpeg": compress_with_random_quality,
}


# --- sweep: fixed strengths ---------------------------------------------------------------------------------


def blur_at_strength(image: Tensor, sigma: float, _: np.random.Generator) -> Tensor:
    """Blur an image with a Gaussian kernel whose standard deviation is `sigma` pixels."""
    return blur_image(image, 2 * math.ceil(4 * sigma) + 1, sigma)


def compress_at_strength(image: Tensor, quality: float, _: np.random.Generator) -> Tensor:
    """Compress an image as JPEG with a quality from 1 to 100."""
    return compress_as_jpeg(image, round(quality))


def add_noise_at_strength(image: Tensor, std: float, rng: np.random.Generator) -> Tensor:
    """Add Gaussian noise with standard deviation `std`, for pixel values in [0, 1], to an image."""
    return add_noise(image, std * 255, rng)


def shrink_and_enlarge_at_strength(image: Tensor, factor: float, _: np.random.Generator) -> Tensor:
    """Shrink an image by a factor in (0, 1], and enlarge it to its original size."""
    return shrink_and_enlarge(image, factor)


class Sweep(NamedTuple):
    """One perturbation of the protocol "sweep", and the strengths at which it is applied."""

    # `apply` is called as apply(image, strength, random generator), and returns the perturbed image.
    apply: Callable[[Tensor, float, np.random.Generator], Tensor] | None = None
    strengths: tuple[float, ...] = ()
    label: str = "{:g}"  # format of a strength in tables
    axis: str = "strength"  # label of the strength axis in figures
    smaller_is_harder: bool = False  # whether a smaller strength changes the image more


SWEEP = {
    "blur": Sweep(blur_at_strength, (1.0, 2.0, 3.0, 4.0), "sigma {:g}", "sigma in pixels"),
    "jpeg": Sweep(
        compress_at_strength, (100.0, 90.0, 80.0, 70.0, 60.0, 50.0, 40.0, 30.0), "quality {:g}", "quality", True
    ),
    "noise": Sweep(
        add_noise_at_strength, (0.05, 0.1, 0.15, 0.2, 0.25), "std {:g}", "standard deviation, pixels in [0, 1]"
    ),
    "resize": Sweep(shrink_and_enlarge_at_strength, (0.5,), "x{:g} and back", "factor, and back", True),
}


# --- choosing and applying ----------------------------------------------------------------------------------


class PerturbationSetting(NamedTuple):
    """The name of a perturbation, and in the protocol sweep also its strength."""

    name: str
    strength: float | None = None  # None if the name is "none" or the protocol is frank2020

    @property
    def sweep(self) -> Sweep:
        """The value of SWEEP for the key `name`, or `Sweep()` if SWEEP does not contain `name`."""
        return SWEEP.get(self.name, Sweep())

    @property
    def label(self) -> str:
        """The name and the strength as text for tables, such as "jpeg quality 70"."""
        if self.strength is None:
            return self.name
        return f"{self.name} {self.sweep.label.format(self.strength)}"

    @property
    def file_name(self) -> str:
        """The name and the strength as text for file names, such as "jpeg_quality_70"."""
        return self.label.replace(" ", "_")


def list_perturbation_settings(protocol: str) -> list[PerturbationSetting]:
    """List all perturbation settings of a protocol, of which the first is "none"."""
    settings = [PerturbationSetting("none")]
    if protocol == "frank2020":
        settings += [PerturbationSetting(name) for name in sorted(FRANK2020)]
        settings.append(PerturbationSetting("combined"))
    else:
        for name, sweep in SWEEP.items():
            settings += [PerturbationSetting(name, strength) for strength in sweep.strengths]
    return settings


def select_perturbations(protocol: str, requested: Sequence[tuple[str, float | None]]) -> list[PerturbationSetting]:
    """List the perturbation settings that the option `--perturb NAME[=STRENGTH] ...` requests.

    Args:
        requested: pairs (name, strength); the strength None selects all strengths of a perturbation, and the name "all"
            selects every perturbation.

    Returns:
        the settings in the requested order, without duplicates.

    Raises:
        UserError: if a requested name or strength is not in the protocol.
    """
    available = list_perturbation_settings(protocol)
    selected = []
    for name, strength in requested:
        same_name = [s for s in available if name == "all" or s.name == name]
        if not same_name:
            names = ", ".join(dict.fromkeys(s.name for s in available))
            raise UserError(
                f"--perturb {name!r} does not exist with --perturb-protocol {protocol}: expected one of {names} or all"
            )
        found = [s for s in same_name if strength is None or s.strength == strength]
        if not found:
            strengths = ", ".join(f"{s.strength:g}" for s in same_name if s.strength is not None)
            expected = f"expected one of {strengths}" if strengths else "this perturbation takes no strength"
            raise UserError(
                f"--perturb {name}={strength:g} does not exist with --perturb-protocol {protocol}: {expected}"
            )
        selected += found
    return list(dict.fromkeys(selected))


class Perturbation(NamedTuple):
    """A transform for `ImageDataset` that applies one perturbation setting to images.

    The setting "combined" applies each perturbation of FRANK2020 with probability 0.5. The random numbers for an image
    depend only on the pixels of the image, the protocol, the name of the perturbation and the seed.
    """

    setting: PerturbationSetting
    protocol: str
    seed: int

    def __call__(self, image: Tensor, _: object = None) -> Tensor:
        """Perturb an image, uint8 (3, H, W).

        Returns:
            a new tensor, or `image` itself if the image is not perturbed.

        Raises:
            TypeError: if a function in SWEEP or FRANK2020 does not return a tensor of the type and shape of `image`.
        """
        name, strength = self.setting
        if name == "none":
            return image
        rng = self._create_random_generator(image)
        if self.protocol == "sweep":
            perturbed = self.setting.sweep.apply(image, strength, rng)
            return _require_image_of_equal_shape(perturbed, image, name)
        names = list(FRANK2020) if name == "combined" else [name]
        chosen = [n for n in names if rng.random() < PROBABILITY]
        for n in chosen:
            image = _require_image_of_equal_shape(FRANK2020[n](image, rng), image, n)
        return image

    def _create_random_generator(self, image: Tensor) -> np.random.Generator:
        shape = repr(tuple(image.shape)).encode()
        image_hash = zlib.crc32(image.contiguous().numpy(), zlib.crc32(shape))
        setting_hash = zlib.crc32(f"{self.protocol}/{self.setting.name}".encode())
        return seeded_generator(self.seed, image_hash, setting_hash)


def _require_image_of_equal_shape(perturbed: Tensor, image: Tensor, name: str) -> Tensor:
    """Return `perturbed`, or raise a TypeError if its type or shape differs from `image`."""
    if not torch.is_tensor(perturbed) or perturbed.dtype != image.dtype or perturbed.shape != image.shape:
        raise TypeError(
            f"the perturbation {name} must return a tensor of {describe_tensor(image)}, got"
            f" {describe_tensor(perturbed)}"
        )
    return perturbed


def perturb_at_random(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Apply a random perturbation of FRANK2020 to a training image with probability 0.5.

    Training must perturb both real and fake images, because otherwise the detector would learn to recognize perturbed
    images instead of fake images.
    """
    if rng.random() >= PROBABILITY:
        return image
    name = list(FRANK2020)[rng.integers(len(FRANK2020))]
    return _require_image_of_equal_shape(FRANK2020[name](image, rng), image, name)
