"""Image files -> uint8 (3, H, W) RGB of one size, and what their headers say of them before any model is built.

Whatever is wrong with a file is a `UserError` of one line.
"""

import logging
import os
import stat
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from multiprocessing.pool import ThreadPool
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from data.lists import Item
from utils.console import printable, progress
from utils.errors import UserError

logger = logging.getLogger(__name__)

# What Pillow warns of is in our errors where it matters. (Not catch_warnings: threads would share it.)
warnings.filterwarnings("ignore", module=r"PIL\.")

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")  # no others: Pillow runs Ghostscript on EPS, for one
MAX_PIXELS = 2 * Image.MAX_IMAGE_PIXELS  # 179 million: Pillow's limit against decompression bombs
HEADER_THREADS = 16  # headers wait for the disk or the network, hardly for the processor
Tag = ExifTags.Base  # TIFF's tags, too
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations of pictures stored on their side


class SizePolicy(NamedTuple):
    """How images are made alike, in this order: resize, crop, centre-crop to a multiple of `scale`."""

    scale: int = 4
    crop_size: int | None = None  # side of the square that is cut out, pixels
    resize: int | None = None  # length of the shorter side, pixels


class Header(NamedTuple):
    """What the header of a file says."""

    size: tuple[int, int] | None  # (height, width) as it will be seen; None if that cannot be read
    problem: str | None = None  # why the file cannot be used
    jpeg: bool = False


def load_image(path: str) -> Tensor:
    """Decode an image file. Returns uint8 (3, H, W) RGB, contiguous. See `read_rgb`."""
    pixels = np.asarray(read_rgb(path))  # (H, W, 3)
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())  # (3, H, W)


def read_rgb(path: str) -> Image.Image:
    """Decode an image file as it is meant to be seen: upright, 8-bit RGB.

    Grey becomes three equal channels; what is transparent shows white; CMYK is converted without colour profiles;
    16-bit grey becomes the nearest 8-bit (of 16-bit colour, Pillow drops the low byte); floats are taken as [0, 1]; of
    several frames the first counts. Files of more than MAX_PIXELS are refused undecoded.
    """
    with _image_file(path) as image:
        image.load()
        return upright_rgb(image)


def upright_rgb(image: Image.Image) -> Image.Image:
    """A decoded image of any mode, which may be changed, as `read_rgb` gives it."""
    with suppress(Exception):  # a damaged EXIF block says nothing about the pixels
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in "IF":
        return Image.fromarray(_grey(image)).convert("RGB")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or (image.mode != "RGB" and "transparency" in image.info):
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


@contextmanager
def _image_file(path: str) -> Iterator[Image.Image]:
    """The image with its header read; what goes wrong until the file is closed is a UserError."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            kind = "folder" if stat.S_ISDIR(status.st_mode) else "device or pipe"
            raise ValueError(f"is a {kind}, not an image file")
        if status.st_size == 0:
            raise ValueError("is empty (0 bytes)")
        with open(path, "rb") as file:
            yield Image.open(file, formats=FORMATS)
    except Exception as error:  # decoders of files from anywhere: struct.error, IndexError, MemoryError, ...
        reason = printable(" ".join(str(error).split())) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = f"is no image, or damaged from its first bytes on ({', '.join(FORMATS)} are read)"
        elif isinstance(error, OSError) and error.strerror:
            reason = f"cannot be opened ({error.strerror})"
        elif not reason.startswith("is "):
            reason = f"cannot be decoded ({reason})"
        raise UserError(f"{printable(path)}: {reason}") from None


def _grey(image: Image.Image) -> np.ndarray:
    """Grey of floats, or of 16 bits or the 12 some TIFFs have, as uint8 (H, W), rounded; 65535 / 257 = 255."""
    values = np.asarray(image).astype(np.float64)  # (H, W)
    deep = 4095 if getattr(image, "tag_v2", {}).get(Tag.BitsPerSample) == (12,) else 65535
    white = 1 if image.mode == "F" else deep
    if not (values.min() >= 0 and values.max() <= white):  # not a number fails here, too
        raise ValueError(f"is an image of values from {values.min():g} to {values.max():g}; 0 to {white} was wanted")
    return np.rint(values * 255 / white).astype(np.uint8)


def resize_and_crop(image: Tensor, policy: SizePolicy, rng: np.random.Generator | None = None) -> Tensor:
    """Resize the shorter side, crop, and centre-crop to a multiple of the scale, as `policy` says.

    image: uint8 (3, H, W), resized as torchvision does (bicubic, antialiased, rounded). rng: where the place of the crop
    is drawn from (row, then column); None: it is in the centre. Raises a UserError for an image that is too small.
    """
    problem = size_problem(image.shape[-2], image.shape[-1], policy)
    if problem:
        raise UserError(f"image {problem}")
    if policy.resize is not None:
        image = resize_bicubic(image, *_resized(*image.shape[-2:], policy))  # (3, H', W')
    if policy.crop_size is not None:
        side, free = policy.crop_size, [n - policy.crop_size for n in image.shape[-2:]]
        top, left = (n // 2 if rng is None else int(rng.integers(n + 1)) for n in free)
        image = image[:, top : top + side, left : left + side]  # (3, side, side)
    top, left, height, width = multiple_box(image.shape[-2], image.shape[-1], policy.scale)
    return image[:, top : top + height, left : left + width].contiguous()


def resize_bicubic(image: Tensor, height: int, width: int, antialias: bool = True) -> Tensor:
    """Bicubic and rounded, as torchvision does it, which takes two seconds to import. image: uint8 (3, H, W)."""
    if image.shape[-2:] == (height, width):
        return image
    return F.interpolate(image[None], (height, width), mode="bicubic", antialias=antialias)[0]  # (3, height, width)


def multiple_box(height: int, width: int, scale: int) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the centre whose sides are the largest multiples of `scale`."""
    return height % scale // 2, width % scale // 2, height - height % scale, width - width % scale


def size_problem(height: int, width: int, policy: SizePolicy) -> str | None:
    """Why an image of this size cannot be used, to follow its name; None if it can."""
    is_so = f"is {width} x {height} pixels"
    height, width = _resized(height, width, policy)
    if policy.resize is not None:
        is_so += f", {width} x {height} when resized"
    if height * width > MAX_PIXELS:
        return f"{is_so}, more than {MAX_PIXELS} in all: use a smaller --resize, or leave the image out"
    if policy.crop_size is not None and min(height, width) < policy.crop_size:
        wanted = f"smaller than the crop of {policy.crop_size} x {policy.crop_size}"
        return f"{is_so}, {wanted}: use a smaller --crop-size (or --patch-size), or leave the image out"
    if min(height, width, policy.crop_size or height) < policy.scale:
        return f"{is_so}; sides of at least {policy.scale}, the scale, are wanted: leave the image out"
    return None


def _resized(height: int, width: int, policy: SizePolicy) -> tuple[int, int]:
    """Height and width after resizing: the shorter side is `resize`, the longer rounded down."""
    if policy.resize is None:
        return height, width
    longer = int(policy.resize * max(height, width) / min(height, width))
    return (longer, policy.resize) if height >= width else (policy.resize, longer)


@lru_cache(2**16)
def size_after(height: int, width: int, policy: SizePolicy) -> tuple[int, int]:
    """Height and width that `resize_and_crop` gives an image of this size: one object for the many of one size."""
    height, width = (policy.crop_size,) * 2 if policy.crop_size is not None else _resized(height, width, policy)
    return height - height % policy.scale, width - width % policy.scale


def refuse_mixed_sizes(items: Sequence[Item], sizes: Sequence[tuple[int, int]]) -> None:
    """Raise a UserError about the first two images whose fitted sizes (height, width) differ."""
    for item, size in zip(items, sizes, strict=True):
        if size != sizes[0]:
            one, other = (f"{printable(i.path)} is {w} x {h}" for i, (h, w) in ((items[0], sizes[0]), (item, size)))
            way_out = "make them alike with --crop-size N (and --resize N), or use --batch-size 1"
            raise UserError(f"images of different sizes cannot share a batch: {one} pixels and {other}; {way_out}")


def check_headers(paths: Sequence[str], policy: SizePolicy) -> list[Header]:
    """The header of each file, some 0.05 milliseconds each. Damage behind a header shows only when a file is read."""
    once = {}  # header -> itself: one object for the many of one size
    with ThreadPool(HEADER_THREADS) as pool:
        headers = pool.imap(partial(read_header, policy=policy), paths, chunksize=8)
        return [once.setdefault(header, header) for header in progress(headers, "reading headers", len(paths))]


def read_header(path: str, policy: SizePolicy) -> Header:
    """The size of an image, undecoded, and whether it can be used. EXIF behind the pixels of a PNG is not seen."""
    try:
        with _image_file(path) as image:
            (width, height), jpeg = image.size, image.format in ("JPEG", "MPO")
            if image.format == "TIFF":  # some versions of Pillow have turned the size already
                width, height = image.tag_v2[Tag.ImageWidth], image.tag_v2[Tag.ImageLength]
            with suppress(Exception):  # as in `upright_rgb`; and not PngImageFile.getexif, which decodes
                if Image.Image.getexif(image).get(Tag.Orientation) in SIDEWAYS:
                    width, height = height, width
    except UserError as error:
        return Header(None, str(error).removeprefix(f"{printable(path)}: "))
    return Header((height, width), size_problem(height, width, policy), jpeg)


def usable_items(
    items: Sequence[Item], policy: SizePolicy, skip_bad: bool = False
) -> tuple[Sequence[Item], list[Header]]:
    """The items whose headers are in order, and these headers. Logs what is wrong with the others.

    Raises a UserError if there are others and `skip_bad` is false, or nothing else.
    """
    headers = check_headers([item.path for item in items], policy)
    bad = [(printable(item.path), h.problem) for item, h in zip(items, headers, strict=True) if h.problem]
    for path, problem in bad:
        logger.warning("%s: %s: %s", "left out" if skip_bad else "bad image", path, problem)
    if bad and (not skip_bad or len(bad) == len(items)):
        way_out = "mend or remove them" + ("" if skip_bad else ", or go on without them by --skip-bad")
        first = ": ".join(bad[0])
        raise UserError(f"{len(bad)} of {len(items)} images cannot be used: {way_out}; the first is {first}")
    if bad:
        logger.warning("%d of %d images are left out", len(bad), len(items))
        items = [item for item, h in zip(items, headers, strict=True) if not h.problem]
    headers = [h for h in headers if not h.problem]
    whole = policy._replace(scale=1)
    trimmed = sum(
        n
        for size, n in Counter(h.size for h in headers).items()
        if size_after(*size, policy) != size_after(*size, whole)
    )
    if trimmed:
        text = "%d of %d images have sides that are no multiple of %d and are centre-cropped"
        logger.info(text, trimmed, len(items), policy.scale)
    return items, headers
