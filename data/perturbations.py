"""What happens to pictures on their way to a detector: blur, crop, JPEG, noise, resize, as pure functions.

Images are uint8 (3, H, W) RGB tensors; every function returns a new one of the same size. Two protocols, because
numbers from one cannot be compared with numbers from the other:

    frank2020   Frank et al., "Leveraging Frequency Analysis for Deep Fake Image Recognition" (ICML 2020), as the paper
                describes it: half of the images are perturbed, at random strengths
    sweep       fixed strengths, applied to every image: for robustness curves

A perturbation is an entry of PERTURBATIONS: all that names, draws, labels or plots it is read there. What is drawn for
an image depends on its pixels, the protocol, the perturbation and the seed alone, so that batch size, order, number of
workers and the place of the file change nothing.
"""

import io
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from data.images import resized
from utils.options import PERTURBATION_PROTOCOLS as PROTOCOLS
from utils.run import UserError, keyed_generator

# Frank et al.
PROBABILITY = 0.5
KERNELS = ((3, 0.8), (5, 1.1), (7, 1.4), (9, 1.7))  # size, and the sigma that OpenCV takes for it, in pixels
CROP_SHARE = (0.05, 0.2)  # of each side, half of it from either end
JPEG_QUALITY = (10, 75)  # both included
NOISE_VARIANCE = (5.0, 20.0)  # in grey levels squared, on 0..255

# What a picture meets on its way through a messenger or a web page, and what should leave a verdict as it is.
MILD_QUALITY = 90
MILD_SCALE = 0.9


def blur(image: Tensor, kernel_size: int, sigma: float) -> Tensor:
    """Gaussian blur, border reflected without repeating its pixel (OpenCV's reflect-101), rounded.

    Rows, then columns: equal to the square kernel and, at sigma 4, many times faster. A kernel larger than the image can
    be reflected is cut to what fits.
    """
    x = image.float()  # (3, H, W)
    for _ in range(2):
        reach = min(kernel_size // 2, x.shape[-1] - 1)
        weights = torch.softmax(-(torch.arange(-reach, reach + 1) ** 2) / (2 * sigma**2), dim=0)
        x = F.conv2d(F.pad(x[:, None], (reach, reach, 0, 0), mode="reflect"), weights.view(1, 1, 1, -1))[:, 0]
        x = x.transpose(1, 2)  # (3, W, H), and then back
    return _to_uint8(x)


def crop(image: Tensor, share: float) -> Tensor:
    """Cut `share` of height and width, half from either end, and enlarge to the old size (bicubic).

    Without antialiasing, which would change nothing but the bicubic kernel (to a = -0.5 from OpenCV's -0.75).
    """
    height, width = image.shape[-2:]
    top, left = int(height * share * 0.5), int(width * share * 0.5)
    return resized(image[:, top : height - top, left : width - left], height, width, antialias=False)


def jpeg(image: Tensor, quality: int) -> Tensor:
    """The image after baseline JPEG with libjpeg's quantisation tables of that quality (1..100), chroma 4:2:0."""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality, subsampling="4:2:0")
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1).contiguous()  # (3, H, W)


def add_noise(image: Tensor, std: float, rng: np.random.Generator) -> Tensor:
    """Add Gaussian noise, independent in each pixel and channel; std in grey levels. Rounded and clipped."""
    return _to_uint8(image + std * torch.from_numpy(rng.standard_normal(tuple(image.shape))))


def resize_and_back(image: Tensor, scale: float) -> Tensor:
    """Shrink by `scale` (bicubic, antialiased) and enlarge to the old size (bicubic)."""
    height, width = image.shape[-2:]
    small = resized(image, *(max(1, round(side * scale)) for side in (height, width)))
    return resized(small, height, width)


def _to_uint8(x: Tensor) -> Tensor:
    return x.round().clamp(0, 255).to(torch.uint8)


class Kind(NamedTuple):
    """A perturbation: what the protocols do, and how it is told. A protocol without it has None."""

    frank2020: Callable[[Tensor, np.random.Generator], Tensor] | None = None  # at a random strength
    sweep: Callable[[Tensor, float, np.random.Generator], Tensor] | None = None  # at a given strength
    strengths: tuple[float, ...] = ()  # of the sweep
    label: str = "{:g}"  # of a strength
    axis: str = "strength"  # what a strength is, for a figure
    smaller_is_harder: bool = False  # of strengths, for a detector


# In the order in which a picture meets them: what it is stored as comes last. A new one with a `frank2020` takes part in
# "combined" and in `augment`.
PERTURBATIONS = {
    "crop": Kind(lambda image, rng: crop(image, rng.uniform(*CROP_SHARE))),
    "blur": Kind(
        lambda image, rng: blur(image, *KERNELS[rng.integers(len(KERNELS))]),
        lambda image, sigma, _: blur(image, 2 * math.ceil(4 * sigma) + 1, sigma),  # 4 sigma to either side
        strengths=(1.0, 2.0, 3.0, 4.0),
        label="sigma {:g}",
        axis="sigma in pixels",
    ),
    "noise": Kind(
        lambda image, rng: add_noise(image, math.sqrt(rng.uniform(*NOISE_VARIANCE)), rng),
        lambda image, std, rng: add_noise(image, std * 255, rng),
        strengths=(0.05, 0.1, 0.15, 0.2, 0.25),
        label="std {:g}",
        axis="standard deviation, of [0, 1]",
    ),
    "jpeg": Kind(
        lambda image, rng: jpeg(image, int(rng.integers(*JPEG_QUALITY, endpoint=True))),
        lambda image, quality, _: jpeg(image, round(quality)),
        strengths=(100.0, 90.0, 80.0, 70.0, 60.0, 50.0, 40.0, 30.0),
        label="quality {:g}",
        axis="quality",
        smaller_is_harder=True,
    ),
    "resize": Kind(
        None,
        lambda image, scale, _: resize_and_back(image, scale),
        strengths=(0.5,),
        label="x{:g} and back",
        axis="factor, and back",
        smaller_is_harder=True,
    ),
}
FRANK_NAMES = tuple(name for name, kind in PERTURBATIONS.items() if kind.frank2020)
NAMES = ("none", *sorted(PERTURBATIONS), "combined")


class Cell(NamedTuple):
    """A row of the robustness table: a perturbation, and in the sweep its strength."""

    name: str
    strength: float | None = None

    @property
    def kind(self) -> Kind:
        return PERTURBATIONS.get(self.name, Kind())

    @property
    def label(self) -> str:
        """Such as "jpeg quality 70"."""
        return self.name if self.strength is None else f"{self.name} {self.kind.label.format(self.strength)}"

    @property
    def file_name(self) -> str:
        """The label as the end of a file's name."""
        return self.label.replace(" ", "_")


def cells(protocol: str, name: str = "all") -> list[Cell]:
    """What to run for `--perturb NAME --perturb-protocol PROTOCOL`; "all" begins with the untouched images.

    Raises:
        UserError: if there is no such protocol, or no such perturbation in it.
    """
    if protocol not in PROTOCOLS:
        raise UserError(f"perturbation protocol {protocol!r}: one of {', '.join(PROTOCOLS)} was wanted")
    if protocol == "sweep":
        known = {n: [Cell(n, s) for s in kind.strengths] for n, kind in sorted(PERTURBATIONS.items()) if kind.sweep}
    else:
        known = {n: [Cell(n)] for n in (*sorted(FRANK_NAMES), "combined")}
    known = {"none": [Cell("none")]} | known
    if name not in (*known, "all"):
        raise UserError(f"no perturbation {name!r} with --perturb-protocol {protocol}: it has {', '.join(known)}")
    return sum(known.values(), []) if name == "all" else known[name]


def chosen_cells(protocol: str, wanted: Sequence[tuple[str, float | None]]) -> list[Cell]:
    """What to run for --perturb NAME[=STRENGTH] ..., each once.

    Raises:
        UserError: if a perturbation or its strength is not in the protocol.
    """
    chosen = []
    for name, strength in wanted:
        found = [c for c in cells(protocol, name) if strength is None or c.strength == strength]
        if not found:
            strengths = ", ".join(f"{c.strength:g}" for c in cells(protocol, name) if c.strength is not None)
            raise UserError(f"--perturb {name}={strength:g}: its strengths are {strengths or 'not chosen'}")
        chosen += found
    return list(dict.fromkeys(chosen))


def perturb(image: Tensor, name: str, protocol: str, seed: int, strength: float | None = None) -> Tensor:
    """The uint8 (3, H, W) image as `protocol` sees it after the perturbation `name`, perhaps the same tensor.

    frank2020 perturbs with probability 0.5 ("combined": each of its parts), the sweep always, at a strength that it alone
    takes, in the unit of its Kind. The random pattern does not depend on the strength: a sweep scales one noise field up.

    Raises:
        UserError: for a perturbation or strength the protocol has not.
    """
    kind = cells(protocol, name)[0].kind  # raises for what the protocol has not
    if name == "none":
        return image
    if (protocol == "sweep") != (strength is not None):
        raise UserError(f"strength {strength} for {name} in protocol {protocol}: the sweep wants one, the others none")
    rng = keyed_generator(seed, pixel_key(image), zlib.crc32(f"{protocol}/{name}".encode()))
    if protocol == "sweep":
        return kind.sweep(image, strength, rng)
    names = FRANK_NAMES if name == "combined" else [name]
    for n in [n for n in names if rng.random() < PROBABILITY]:
        image = PERTURBATIONS[n].frank2020(image, rng)
    return image


@dataclass(frozen=True)
class Perturbation:
    """`perturb` as a transform of data.datasets; needs no generator of theirs."""

    cell: Cell
    protocol: str
    seed: int

    def __call__(self, image: Tensor, rng: np.random.Generator | None = None) -> Tensor:
        return perturb(image, self.cell.name, self.protocol, self.seed, self.cell.strength)


def augment(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Half the time one of frank2020's crop, blur, noise or JPEG, at random strength: a transform for training.

    Both classes must pass through it alike, or it becomes what they are told apart by.
    """
    if rng.random() >= PROBABILITY:
        return image
    return PERTURBATIONS[FRANK_NAMES[rng.integers(len(FRANK_NAMES))]].frank2020(image, rng)


def mild_variants(image: Tensor) -> dict[str, Tensor]:
    """The image after a mild JPEG compression, and made a tenth smaller and large again. No chance in it.

    image: uint8 (3, H, W). Returns {what was done: uint8 (3, H, W)}.
    """
    mild = (Cell("jpeg", MILD_QUALITY), Cell("resize", MILD_SCALE))
    return {cell.label: cell.kind.sweep(image, cell.strength, None) for cell in mild}


def pixel_key(image: Tensor) -> int:
    """A 32-bit checksum of size and pixels: the identity of an image whatever its file is called."""
    return zlib.crc32(image.contiguous().numpy().tobytes(), zlib.crc32(repr(tuple(image.shape)).encode()))
