"""What happens to pictures on their way to a detector: blur, crop, JPEG, noise, resize, as pure functions.

Images are uint8 (3, H, W) RGB tensors; every function returns a new one of the same size. Two protocols, because
numbers from one cannot be compared with numbers from the other:

    frank2020   Frank et al., "Leveraging Frequency Analysis for Deep Fake Image Recognition" (ICML 2020), as the paper
                describes it: half of the images are perturbed, at random strengths
    sweep       fixed strengths, applied to every image: for robustness curves

What is drawn for an image depends on its pixels, the protocol, the perturbation and the seed alone, so that batch size,
order, number of workers and the place of the file change nothing.
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

from data.images import resized
from utils.errors import UserError
from utils.random_streams import seeded_generator

# Frank et al.
PROBABILITY = 0.5
KERNELS = ((3, 0.8), (5, 1.1), (7, 1.4), (9, 1.7))  # size, and the sigma that OpenCV takes for it, in pixels
CROP_SHARE = (0.05, 0.2)  # of each side, half of it from either end
JPEG_QUALITY = (10, 75)  # both included
NOISE_VARIANCE = (5.0, 20.0)  # in grey levels squared, on 0..255


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


# At a random strength, in the order in which "combined" applies them: what a picture is stored as comes last
FRANK2020 = {
    "crop": lambda image, rng: crop(image, rng.uniform(*CROP_SHARE)),
    "blur": lambda image, rng: blur(image, *KERNELS[rng.integers(len(KERNELS))]),
    "noise": lambda image, rng: add_noise(image, math.sqrt(rng.uniform(*NOISE_VARIANCE)), rng),
    "jpeg": lambda image, rng: jpeg(image, int(rng.integers(*JPEG_QUALITY, endpoint=True))),
}


class Kind(NamedTuple):
    """A perturbation of the sweep, and how it is told."""

    apply: Callable[[Tensor, float, np.random.Generator], Tensor] | None = None  # at a given strength
    strengths: tuple[float, ...] = ()
    label: str = "{:g}"  # of a strength
    axis: str = "strength"  # what a strength is, for a figure
    smaller_is_harder: bool = False  # of strengths, for a detector


# fmt: off
SWEEP = {
    "blur": Kind(lambda image, sigma, _: blur(image, 2 * math.ceil(4 * sigma) + 1, sigma),  # 4 sigma to either side
                 (1.0, 2.0, 3.0, 4.0), "sigma {:g}", "sigma in pixels"),
    "jpeg": Kind(lambda image, quality, _: jpeg(image, round(quality)),
                 (100.0, 90.0, 80.0, 70.0, 60.0, 50.0, 40.0, 30.0), "quality {:g}", "quality", True),
    "noise": Kind(lambda image, std, rng: add_noise(image, std * 255, rng),
                  (0.05, 0.1, 0.15, 0.2, 0.25), "std {:g}", "standard deviation, of [0, 1]"),
    "resize": Kind(lambda image, scale, _: resize_and_back(image, scale),
                   (0.5,), "x{:g} and back", "factor, and back", True),
}
# fmt: on
NAMES = ("none", *sorted(FRANK2020 | SWEEP), "combined")


class Cell(NamedTuple):
    """A row of the robustness table: a perturbation, and in the sweep its strength."""

    name: str
    strength: float | None = None

    @property
    def kind(self) -> Kind:
        return SWEEP.get(self.name, Kind())

    @property
    def label(self) -> str:
        """Such as "jpeg quality 70"."""
        return self.name if self.strength is None else f"{self.name} {self.kind.label.format(self.strength)}"

    @property
    def file_name(self) -> str:
        """The label as the end of a file's name."""
        return self.label.replace(" ", "_")


# What should leave a verdict as it is: a picture meets it on its way through a messenger or a web page.
MILD = (Cell("jpeg", 90), Cell("resize", 0.9))


def select_perturbations(protocol: str, wanted: Sequence[tuple[str, float | None]]) -> list[Cell]:
    """What to run for --perturb NAME[=STRENGTH] ... in a protocol, each once; "all" begins with the untouched images.

    Raises:
        UserError: if a perturbation or its strength is not in the protocol.
    """
    if protocol == "sweep":
        known = [Cell(name, strength) for name, kind in SWEEP.items() for strength in kind.strengths]
    else:
        known = [Cell(name) for name in (*sorted(FRANK2020), "combined")]
    known, chosen = [Cell("none"), *known], []
    for name, strength in wanted:
        named = [cell for cell in known if name in (cell.name, "all")]
        if not named:
            has = ", ".join(dict.fromkeys(cell.name for cell in known))
            raise UserError(f"no perturbation {name!r} with --perturb-protocol {protocol}: it has {has}")
        found = [cell for cell in named if strength in (cell.strength, None)]
        if not found:
            strengths = ", ".join(f"{cell.strength:g}" for cell in named if cell.strength is not None)
            raise UserError(f"--perturb {name}={strength:g}: its strengths are {strengths or 'not chosen'}")
        chosen += found
    return list(dict.fromkeys(chosen))


class Perturbation(NamedTuple):
    """What `protocol` does to images under one of its perturbations: a transform of data.datasets.

    frank2020 perturbs with probability 0.5 ("combined": each of its parts), the sweep always, at the cell's strength. The
    random pattern does not depend on the strength: a sweep scales one noise field up.
    """

    cell: Cell
    protocol: str
    seed: int

    def __call__(self, image: Tensor, _: object = None) -> Tensor:
        """image: uint8 (3, H, W). Returns the same shape, perhaps the same tensor."""
        name, strength = self.cell
        if name == "none":
            return image
        pixels = zlib.crc32(image.contiguous().numpy(), zlib.crc32(repr(tuple(image.shape)).encode()))
        rng = seeded_generator(self.seed, pixels, zlib.crc32(f"{self.protocol}/{name}".encode()))
        if self.protocol == "sweep":
            return self.cell.kind.apply(image, strength, rng)
        names = FRANK2020 if name == "combined" else [name]
        for n in [n for n in names if rng.random() < PROBABILITY]:
            image = FRANK2020[n](image, rng)
        return image


def augment(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Half the time one of frank2020's crop, blur, noise or JPEG, at random strength: a transform for training.

    Both classes must pass through it alike, or it becomes what they are told apart by.
    """
    if rng.random() >= PROBABILITY:
        return image
    return list(FRANK2020.values())[rng.integers(len(FRANK2020))](image, rng)


def mild_variants(image: Tensor) -> dict[str, Tensor]:
    """The image after a mild JPEG compression, and made a tenth smaller and large again. No chance in it.

    image: uint8 (3, H, W). Returns {what was done: uint8 (3, H, W)}.
    """
    return {cell.label: cell.kind.apply(image, cell.strength, None) for cell in MILD}
