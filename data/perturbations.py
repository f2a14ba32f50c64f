"""What happens to pictures on their way to a detector: blur, crop, JPEG, noise, resize, as pure functions.

Images are uint8 (3, H, W) RGB tensors; every function returns a new one of the same size. Three protocols,
because numbers from one cannot be compared with numbers from another:

    frank2020            Frank et al. (ICML 2020) as the paper describes it
    frank2020-released   the same as their script computes it, oddities included (but for the two below)
    sweep                fixed strengths, applied to every image: for robustness curves

What is drawn for an image depends on its pixels, the protocol, the perturbation and the seed alone, so that
batch size, order, number of workers and the place of the file change nothing. Their script draws without a seed, and
in "combined" gives the i-th image of a folder the i-mod-4th perturbation; here a checksum of the pixels takes the
place of i: as many images get each of the four, but not the same ones.

Source: Frank et al., "Leveraging Frequency Analysis for Deep Fake Image Recognition"; the released form was
read off their `create_perturbed_imagedata.py` (RUB-SysSec/GANDCTAnalysis) and written anew with torchvision
and Pillow.
"""

import io
import math
import zlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from data.images import DataError

NAMES = ("none", "blur", "crop", "jpeg", "noise", "resize", "combined")
PROTOCOLS = ("frank2020", "frank2020-released", "sweep")
FRANK_NAMES = ("blur", "crop", "jpeg", "noise", "combined")

# Frank et al.
PROBABILITY = 0.5
KERNEL_SIZES = (3, 5, 7, 9)
CROP_SHARE = (0.05, 0.2)  # of each side, half of it from either end
JPEG_QUALITY = (10, 75)  # both included
NOISE_VARIANCE = (5.0, 20.0)  # in grey levels squared, on 0..255
COMBINED_ORDER = ("crop", "blur", "noise", "jpeg")  # as a picture meets them: what it is stored as comes last

# Their script: an interpolation constant lands in the place of sigma, a random flag id in that of the
# quality.
RELEASED_SIGMA = 4.0
RELEASED_QUALITY = 95
RELEASED_NOISE_STD = (5.0, 20.0)
RELEASED_ROUND_ROBIN = ("noise", "blur", "jpeg", "crop")

# What a picture meets on its way through a messenger or a web page, and what should leave a verdict as it is.
MILD_QUALITY = 90
MILD_SCALE = 0.9

# The usual sweeps.
SWEEP = {
    "blur": (0.0, 1.0, 2.0, 3.0, 4.0),  # sigma in pixels
    "jpeg": (100.0, 90.0, 80.0, 70.0, 60.0, 50.0, 40.0, 30.0),  # quality
    "noise": (0.05, 0.1, 0.15, 0.2, 0.25),  # standard deviation on 0..1
    "resize": (0.5,),  # scale, and back up
}
STRENGTH_LABELS = {
    "blur": "sigma {:g}",
    "jpeg": "quality {:g}",
    "noise": "std {:g}",
    "resize": "x{:g} and back",
}


class Cell(NamedTuple):
    """A row of the robustness table: a perturbation, and in the sweep its strength."""

    name: str
    strength: float | None = None

    @property
    def label(self) -> str:
        """Such as "jpeg quality 70"."""
        return self.name if self.strength is None else f"{self.name} {STRENGTH_LABELS[self.name].format(self.strength)}"


def cells(protocol: str, name: str = "all") -> list[Cell]:
    """What to run for `--perturb NAME --perturb-protocol PROTOCOL`; "all" begins with the untouched images.

    Raises:
        DataError: if there is no such protocol, or no such perturbation in it.
    """
    if protocol not in PROTOCOLS:
        raise DataError(f"perturbation protocol {protocol!r}: one of {', '.join(PROTOCOLS)} was wanted")
    if name == "none":
        return [Cell("none")]
    strengths = SWEEP if protocol == "sweep" else dict.fromkeys(FRANK_NAMES, (None,))
    if name == "all":
        return [Cell("none"), *(Cell(n, s) for n, values in strengths.items() for s in values)]
    if name not in strengths:
        others = [p for p in PROTOCOLS if p != protocol and name in (SWEEP if p == "sweep" else FRANK_NAMES)]
        way_out = f"; {name} is in {' and '.join(others)}" if others else ""
        raise DataError(
            f"protocol {protocol} has no perturbation {name!r}: it has none, {', '.join(strengths)}{way_out}"
        )
    return [Cell(name, s) for s in strengths[name]]


def perturb(
    image: Tensor,
    name: str,
    protocol: str,
    seed: int,
    strength: float | None = None,
) -> Tensor:
    """The image as `protocol` sees it after the perturbation `name`.

    Args:
        image: uint8 (3, H, W).
        name, protocol: one of `cells(protocol)`. The Frank protocols perturb with probability 0.5 (the
            intended combination: each of its four parts), the sweep always.
        seed: a number >= 0.
        strength: for the sweep only (and needed there): quality 1..100, sigma or std >= 0, scale in (0, 1].
            The random pattern does not depend on it: a sweep scales one noise field up.

    Returns:
        uint8 (3, H, W); the same tensor where nothing was to be done.

    Raises:
        DataError: for a perturbation or strength the protocol has not, or (released crop and combined) an
        image not square.
    """
    cells(protocol, name)  # raises for what the protocol has not
    if name != "none" and (protocol == "sweep") != (strength is not None):
        raise DataError(f"strength {strength} for {name} in protocol {protocol}: the sweep wants one, the others none")
    if name == "none":
        return image
    key = pixel_key(image)
    rng = np.random.default_rng([seed, key, zlib.crc32(f"{protocol}/{name}".encode())])
    if protocol == "sweep":
        return _sweep(image, name, strength, rng)
    if protocol == "frank2020-released":
        return _released(image, name, rng, key)
    if name == "combined":
        chosen = [n for n in COMBINED_ORDER if rng.random() < PROBABILITY]
    else:
        chosen = [name] if rng.random() < PROBABILITY else []
    for n in chosen:
        image = _intended(image, n, rng)
    return image


def mild_variants(image: Tensor) -> dict[str, Tensor]:
    """The image after a mild JPEG compression, and made a tenth smaller and large again. No chance in it.

    image: uint8 (3, H, W). Returns {what was done: uint8 (3, H, W)}.
    """
    done = {Cell("jpeg", MILD_QUALITY): jpeg(image, MILD_QUALITY)}
    done[Cell("resize", MILD_SCALE)] = resize_and_back(image, MILD_SCALE)
    return {cell.label: variant for cell, variant in done.items()}


def augment(image: Tensor, rng: np.random.Generator, p: float = PROBABILITY) -> Tensor:
    """With probability p one of frank2020's blur, crop, JPEG or noise, at random strength: for training.

    Both classes must pass through it alike, or it becomes what they are told apart by.
    """
    if rng.random() >= p:
        return image
    return _intended(image, COMBINED_ORDER[rng.integers(len(COMBINED_ORDER))], rng)


@dataclass(frozen=True)
class PerturbTransform:
    """`perturb` in the form data.images.ImageDataset(transform=...) calls; ignores the path and the rng."""

    name: str
    protocol: str
    seed: int
    strength: float | None = None

    def __post_init__(self):
        cells(self.protocol, self.name)  # a wrong name is a mistake at the start, not in a worker

    def __call__(self, image: Tensor, path: str = "", rng=None) -> Tensor:
        return perturb(image, self.name, self.protocol, self.seed, self.strength)


@dataclass(frozen=True)
class AugmentTransform:
    """`augment` in the form data.images.ImageDataset(transform=...) calls; ignores the path."""

    p: float = PROBABILITY

    def __call__(self, image: Tensor, path: str, rng: np.random.Generator) -> Tensor:
        return augment(image, rng, self.p)


def pixel_key(image: Tensor) -> int:
    """A 32-bit checksum of size and pixels: the identity of an image whatever its file is called."""
    return zlib.crc32(image.contiguous().numpy().tobytes(), zlib.crc32(repr(tuple(image.shape)).encode()))


# --- the perturbations themselves, without chance -----------------------------------------------------------


def blur(image: Tensor, kernel_size: int, sigma: float) -> Tensor:
    """Gaussian blur, border reflected without repeating its pixel (OpenCV's reflect-101), rounded to uint8.

    Rows, then columns: equal to the square kernel and, at sigma 4, many times faster. A kernel larger than
    the image can be reflected is cut to what fits.
    """
    height, width = image.shape[-2:]
    kx, ky = min(kernel_size, 2 * width - 1), min(kernel_size, 2 * height - 1)
    x = image.float()  # (3, H, W)
    x = F.gaussian_blur(x, [kx, 1], [sigma, sigma])
    x = F.gaussian_blur(x, [1, ky], [sigma, sigma])
    return _to_uint8(x) if image.dtype == torch.uint8 else x


def sigma_of_kernel(kernel_size: int) -> float:
    """OpenCV's rule for the sigma that belongs to a kernel size: 3, 5, 7, 9 -> 0.8, 1.1, 1.4, 1.7."""
    return 0.3 * ((kernel_size - 1) * 0.5 - 1) + 0.8


def crop(image: Tensor, share: float) -> Tensor:
    """Cut `share` of height and width, half from either end, and enlarge to the old size (bicubic).

    Without antialiasing, which would change nothing but the bicubic kernel (to a = -0.5 from OpenCV's -0.75).
    """
    height, width = image.shape[-2:]
    top, left = int(height * share * 0.5), int(width * share * 0.5)
    return F.resized_crop(
        image,
        top,
        left,
        height - 2 * top,
        width - 2 * left,
        [height, width],
        InterpolationMode.BICUBIC,
        antialias=False,
    )


def jpeg(image: Tensor, quality: int) -> Tensor:
    """The image after JPEG compression."""
    return _decode(encode_jpeg(image, quality))


def encode_jpeg(image: Tensor, quality: int) -> bytes:
    """A baseline JPEG file with libjpeg's quantisation tables of that quality (1..100), chroma 4:2:0."""
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue()


def add_noise(image: Tensor, std: float, rng: np.random.Generator) -> Tensor:
    """Add Gaussian noise, independent in each pixel and channel; std in grey levels. Rounded and clipped."""
    return _to_uint8(image + std * _normal(image, rng))


def resize_and_back(image: Tensor, scale: float) -> Tensor:
    """Shrink by `scale` (bicubic, antialiased) and enlarge to the old size (bicubic)."""
    size = list(image.shape[-2:])
    small = F.resize(image, [max(1, round(side * scale)) for side in size], InterpolationMode.BICUBIC, antialias=True)
    return F.resize(small, size, InterpolationMode.BICUBIC, antialias=True)


# --- what the protocols draw --------------------------------------------------------------------------------


def _intended(image: Tensor, name: str, rng: np.random.Generator) -> Tensor:
    """One perturbation as the paper describes it, at a random strength."""
    if name == "blur":
        kernel_size = int(rng.choice(KERNEL_SIZES))
        return blur(image, kernel_size, sigma_of_kernel(kernel_size))
    if name == "crop":
        return crop(image, rng.uniform(*CROP_SHARE))
    if name == "jpeg":
        return jpeg(image, int(rng.integers(*JPEG_QUALITY, endpoint=True)))
    return add_noise(image, math.sqrt(rng.uniform(*NOISE_VARIANCE)), rng)


def _released(image: Tensor, name: str, rng: np.random.Generator, key: int) -> Tensor:
    """One perturbation as their script computes it: its oddities are kept on purpose.

    key: the image's own number, which picks one of the four in "combined".
    """
    height, width = image.shape[-2:]
    if name in ("crop", "combined") and height != width:  # theirs swaps the sides and then stops
        raise DataError(
            f"{name} in protocol frank2020-released takes square images, got {width}x{height}: "
            f"crop them square first, or use protocol frank2020"
        )
    if rng.random() >= PROBABILITY:
        return image
    if name == "combined":
        name = RELEASED_ROUND_ROBIN[key % len(RELEASED_ROUND_ROBIN)]
    if name == "blur":
        return blur(image, int(rng.choice(KERNEL_SIZES)), RELEASED_SIGMA)
    if name == "crop":
        return crop(image, rng.uniform(*CROP_SHARE))
    if name == "jpeg":  # RGB written as if it were BGR: luma weighs red as blue and blue as red
        return jpeg(image.flip(0), RELEASED_QUALITY).flip(0)
    # Clipped first, then cut to whole numbers: nothing wraps around, and the mean sinks by half a grey level.
    return (image + rng.uniform(*RELEASED_NOISE_STD) * _normal(image, rng)).clamp(0, 255).to(torch.uint8)


def _sweep(image: Tensor, name: str, strength: float, rng: np.random.Generator) -> Tensor:
    """One perturbation at a fixed strength."""
    wanted = {"blur": (0, 100), "jpeg": (1, 100), "noise": (0, 1), "resize": (1e-3, 1)}[name]
    if not wanted[0] <= strength <= wanted[1]:
        raise DataError(f"{name} of strength {strength:g}: {wanted[0]:g} to {wanted[1]:g} was wanted")
    if name == "jpeg":
        return jpeg(image, round(strength))
    if name == "resize":
        return resize_and_back(image, strength)
    if strength == 0:
        return image
    if name == "blur":
        return blur(image, 2 * math.ceil(4 * strength) + 1, strength)  # 4 sigma to either side
    return add_noise(image, strength * 255, rng)


def _normal(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Standard normal numbers of the image's shape, float64."""
    return torch.from_numpy(rng.standard_normal(tuple(image.shape)))


def _to_uint8(x: Tensor) -> Tensor:
    return x.round().clamp(0, 255).to(torch.uint8)


def _decode(data: bytes) -> Tensor:
    """JPEG bytes -> uint8 (3, H, W)."""
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1).contiguous()
