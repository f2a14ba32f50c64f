"""Decode image files to uint8 (3, H, W) RGB, resize and crop images, and check the headers of image files."""

import logging
import os
import stat
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from multiprocessing.pool import ThreadPool
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from data.folders import HAS_AVIF
from data.lists import Item
from utils.console import make_printable, progress_bar
from utils.errors import UserError, describe_exception

logger = logging.getLogger(__name__)

# Pillow's warnings are hidden, because this module raises a UserError for each image that cannot be used.
# The warning filter is set for the whole program, because warnings.catch_warnings must not be used in threads.
warnings.filterwarnings("ignore", module=r"PIL\.")

# EPS is not allowed, because an EPS file is a PostScript program, which Pillow would run with Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")  # image formats that may be decoded
if HAS_AVIF:
    FORMATS += ("AVIF",)
MAX_PIXELS = 178_956_970  # largest number of pixels that Pillow decodes by default: 2 * Image.MAX_IMAGE_PIXELS
HEADER_THREADS = 16  # number of threads that read headers; these threads mostly wait for the disk
Tag = ExifTags.Base  # numbers of the tags in EXIF data and TIFF files
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height


class SizePolicy(NamedTuple):
    """Settings of resizing and cropping, applied in the order `resize`, `crop_size`, `scale`."""

    scale: int = 4  # factor by which the re-synthesizer enlarges images; image sides are cut to multiples of `scale`
    crop_size: int | None = None  # side of the square crop in pixels, or None for no crop
    resize: int | None = None  # length of the shorter side after resizing, in pixels, or None for no resizing
    min_side: int = 1  # smallest image side, in pixels, for which residuals can be computed


class Header(NamedTuple):
    """Properties of an image that were read from the header of its file."""

    size: tuple[int, int] | None  # (height, width) of the upright image, or None if the header cannot be read
    problem: str | None = None  # reason why the image cannot be used, or None if the image can be used
    jpeg: bool = False  # whether the file is a JPEG file


# --- decoding -----------------------------------------------------------------------------------------------


def read_image_as_tensor(path: str) -> Tensor:
    """Decode an image file with `read_image_as_pillow_rgb` to a contiguous uint8 tensor (3, H, W)."""
    pixels = np.asarray(read_image_as_pillow_rgb(path))  # (H, W, 3)
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())  # (3, H, W)


def read_image_as_pillow_rgb(path: str) -> Image.Image:
    """Decode an image file as an upright 8-bit RGB image.

    Transparent pixels are blended with white. CMYK images are converted without colour profiles. Of 16-bit colour
    values, Pillow keeps only the high byte. Float images must have values in [0, 1]. Only the first frame of an
    animation is read.

    Raises:
        UserError: if the image cannot be decoded, or has more than MAX_PIXELS pixels.
    """
    with open_image(path) as image:
        image.load()
        return convert_to_upright_rgb(image)


def convert_to_upright_rgb(image: Image.Image) -> Image.Image:
    """Convert a decoded image to an upright 8-bit RGB image.

    The conversion may change `image` in place.
    """
    with suppress(Exception):  # an image with damaged EXIF data can still be used
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_convert_grey_to_uint8(image)).convert("RGB")
    has_alpha = image.mode in ("LA", "La", "PA", "RGBA", "RGBa")
    if has_alpha or (image.mode != "RGB" and "transparency" in image.info):
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _convert_grey_to_uint8(image: Image.Image) -> np.ndarray:
    """Convert a float or integer grey image to uint8 (H, W) by scaling white to 255 and rounding.

    White is 1 in float images, 4095 in 12-bit TIFF files, and 65535 in 16-bit and 32-bit integer images.
    """
    values = np.asarray(image).astype(np.float64)  # (H, W)
    is_12_bit = getattr(image, "tag_v2", {}).get(Tag.BitsPerSample) == (12,)
    if image.mode == "F":
        white = 1
    else:
        white = 4095 if is_12_bit else 65535
    in_range = values.min() >= 0 and values.max() <= white  # False for NaN
    if not in_range:
        raise ValueError(f"has values from {values.min():g} to {values.max():g}, expected 0 to {white}")
    return np.rint(values * 255 / white).astype(np.uint8)


@contextmanager
def open_image(path: str) -> Iterator[Image.Image]:
    """Open an image file and read its header.

    Raises:
        UserError: if the file cannot be opened, or if the `with open_image(...)` block raises an exception.
    """
    try:
        _check_regular_file(path)
        with open(path, "rb") as file:
            yield Image.open(file, formats=FORMATS)
    except Exception as error:  # Pillow raises many kinds of exceptions for damaged files
        raise UserError(f"{make_printable(path)}: {_describe_read_error(error)}") from None


def _check_regular_file(path: str) -> None:
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise ValueError("is a folder, not an image file")
    if not stat.S_ISREG(status.st_mode):  # open() may wait forever if the path is a named pipe
        raise ValueError("is a device or pipe, not an image file")
    if status.st_size == 0:
        raise ValueError("is empty (0 bytes)")


def _describe_read_error(error: Exception) -> str:
    """Describe in one line why reading an image file raised the exception `error`."""
    text = make_printable(describe_exception(error))
    if isinstance(error, UnidentifiedImageError):
        return f"is not an image, or its first bytes are damaged (expected {', '.join(FORMATS)})"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be opened ({error.strerror})"
    if text.startswith(("is ", "has ")):
        return text
    return f"cannot be decoded ({text})"


# --- sizes --------------------------------------------------------------------------------------------------


def resize_and_crop(image: Tensor, policy: SizePolicy, rng: np.random.Generator | None = None) -> Tensor:
    """Resize and crop an image, uint8 (3, H, W), according to a `SizePolicy`.

    Args:
        rng: random generator for the position of the crop, or None for a centre crop.

    Raises:
        UserError: if the image is too small for the crop or the networks, or has more than MAX_PIXELS pixels after
            resizing.
    """
    height, width = image.shape[-2:]
    problem = describe_size_problem(height, width, policy)
    if problem:
        raise UserError(f"the image {problem}")
    if policy.resize is not None:
        image = resize_bicubic(image, *_compute_size_after_resize(height, width, policy))  # (3, H', W')
    if policy.crop_size is not None:
        image = _crop_square(image, policy.crop_size, rng)  # (3, crop_size, crop_size)
    top, left, height, width = compute_centre_crop_box(image.shape[-2], image.shape[-1], policy.scale)
    return image[:, top : top + height, left : left + width].contiguous()


def _crop_square(image: Tensor, side: int, rng: np.random.Generator | None) -> Tensor:
    free_rows, free_columns = image.shape[-2] - side, image.shape[-1] - side
    if rng is None:
        top, left = free_rows // 2, free_columns // 2
    else:
        top, left = int(rng.integers(free_rows + 1)), int(rng.integers(free_columns + 1))
    return image[:, top : top + side, left : left + side]


def resize_bicubic(image: Tensor, height: int, width: int, antialias: bool = True) -> Tensor:
    """Resize an image, uint8 (3, H, W), to `height` x `width` pixels by bicubic interpolation."""
    if image.shape[-2:] == (height, width):
        return image
    return F.interpolate(image[None], (height, width), mode="bicubic", antialias=antialias)[0]


def compute_centre_crop_box(height: int, width: int, scale: int) -> tuple[int, int, int, int]:
    """Compute (top, left, height, width) of the largest centred box whose sides are multiples of `scale`."""
    return height % scale // 2, width % scale // 2, height - height % scale, width - width % scale


def require_large_enough_crops(policy: SizePolicy) -> None:
    """Raise a UserError if `policy.crop_size` is too small for the networks."""
    if policy.crop_size is None:
        return
    smallest = max(policy.scale, policy.min_side)
    if policy.crop_size - policy.crop_size % policy.scale < smallest:
        raise UserError(
            f"--crop-size {policy.crop_size} is too small: give a multiple of {policy.scale}, at least {smallest}"
        )


def describe_size_problem(height: int, width: int, policy: SizePolicy) -> str | None:
    """Return why images with `height` x `width` pixels cannot be used, or None if they can be used.

    The returned text starts with "is" and the size of the image, such as "is 5 x 5 pixels: ...".
    `describe_size_problem` does not check whether `policy.crop_size` is too small.
    """
    text = f"is {width} x {height} pixels"
    height, width = _compute_size_after_resize(height, width, policy)
    if policy.resize is not None:
        text += f", {width} x {height} when resized"
    if height * width > MAX_PIXELS:
        return f"{text}, more than {MAX_PIXELS} in total: use a smaller --resize, or leave the image out"
    if policy.crop_size is not None and min(height, width) < policy.crop_size:
        return (
            f"{text}, smaller than the crop of {policy.crop_size} x {policy.crop_size}: use a smaller --crop-size"
            " (or --patch-size), or leave the image out"
        )
    if policy.crop_size is not None:
        return None  # the image can be used, because the crop fits into it
    side = min(height, width)
    if side < policy.scale:
        return f"{text}: both sides must be at least {policy.scale} pixels (the scale); leave the image out"
    if side - side % policy.scale < policy.min_side:
        return (
            f"{text}: the features need sides of at least {policy.min_side} (multiples of {policy.scale} are used);"
            " leave the image out, or use a lower --idx-stages"
        )
    return None


def _compute_size_after_resize(height: int, width: int, policy: SizePolicy) -> tuple[int, int]:
    """Compute the (height, width) of an image after resizing its shorter side to `policy.resize`."""
    if policy.resize is None:
        return height, width
    longer = int(policy.resize * max(height, width) / min(height, width))
    return (longer, policy.resize) if height >= width else (policy.resize, longer)


@lru_cache(2**16)
def compute_size_after_resize_and_crop(height: int, width: int, policy: SizePolicy) -> tuple[int, int]:
    """Compute the (height, width) of an image after `resize_and_crop`.

    Results are cached, so that images of equal size share one tuple in memory.
    """
    if policy.crop_size is not None:
        height, width = policy.crop_size, policy.crop_size
    else:
        height, width = _compute_size_after_resize(height, width, policy)
    return height - height % policy.scale, width - width % policy.scale


def require_equal_sizes(items: Sequence[Item], sizes: Sequence[tuple[int, int]]) -> None:
    """Raise a UserError if not all images have the same (height, width)."""
    for item, size in zip(items, sizes, strict=True):
        if size != sizes[0]:
            (height, width), (other_height, other_width) = sizes[0], size
            raise UserError(
                f"images of different sizes cannot be in one batch: {make_printable(items[0].path)} has {width} x"
                f" {height} pixels and {make_printable(item.path)} has {other_width} x {other_height}; cut crops of"
                " one size with --crop-size N, or use --batch-size 1"
            )


# --- headers ------------------------------------------------------------------------------------------------


def read_and_check_headers(paths: Sequence[str], policy: SizePolicy) -> list[Header]:
    """Read and check the headers of image files, without decoding pixels."""
    shared = {}  # each distinct `Header`, so that images with equal headers share one `Header` object
    headers = []
    with ThreadPool(HEADER_THREADS) as pool:
        results = pool.imap(lambda path: read_header(path, policy), paths, chunksize=8)
        for header in progress_bar(results, "reading headers", len(paths)):
            headers.append(shared.setdefault(header, header))
    return headers


def read_header(path: str, policy: SizePolicy) -> Header:
    """Read the size of an image from the header of its file, and check that the image can be used.

    EXIF data after the pixels of a PNG file are not read, because reading them would decode the pixels.
    """
    try:
        with open_image(path) as image:
            width, height = image.size
            is_jpeg = image.format in ("JPEG", "MPO")
            # If a TIFF image is sideways, some Pillow versions have already swapped width and height in `image.size`.
            if image.format == "TIFF":
                width, height = image.tag_v2[Tag.ImageWidth], image.tag_v2[Tag.ImageLength]
            with suppress(Exception):  # an image with damaged EXIF data can still be used
                exif = Image.Image.getexif(image)  # PngImageFile.getexif would decode the image
                if exif.get(Tag.Orientation) in SIDEWAYS:
                    width, height = height, width
    except UserError as error:
        return Header(None, str(error).removeprefix(f"{make_printable(path)}: "))
    return Header((height, width), describe_size_problem(height, width, policy), is_jpeg)


def select_usable_images(
    items: Sequence[Item], policy: SizePolicy, skip_bad: bool = False
) -> tuple[Sequence[Item], list[Header]]:
    """Select the images that can be used according to their headers.

    Args:
        skip_bad: whether to leave out images that cannot be used, instead of raising a UserError.

    Raises:
        UserError: if an image cannot be used and `skip_bad` is False, or if no image can be used.
    """
    require_large_enough_crops(policy)
    headers = read_and_check_headers([item.path for item in items], policy)
    good_items, good_headers, problems = [], [], []
    for item, header in zip(items, headers, strict=True):
        if header.problem is None:
            good_items.append(item)
            good_headers.append(header)
        else:
            problems.append(f"{make_printable(item.path)}: {header.problem}")
    for problem in problems:
        logger.warning("image left out: %s" if skip_bad else "image cannot be used: %s", problem)
    if problems and not (skip_bad and good_items):
        way_out = "repair or remove these images" + ("" if skip_bad else ", or leave them out with --skip-bad")
        raise UserError(
            f"{len(problems)} of {len(items)} images cannot be used: {way_out}; the first problem: {problems[0]}"
        )
    if problems:
        logger.warning("left out %d of %d images, because they cannot be used", len(problems), len(items))
    _log_centre_crops(good_headers, policy)
    return good_items, good_headers


def _log_centre_crops(headers: Sequence[Header], policy: SizePolicy) -> None:
    uncropped = policy._replace(scale=1)
    cropped = sum(
        compute_size_after_resize_and_crop(*h.size, policy) != compute_size_after_resize_and_crop(*h.size, uncropped)
        for h in headers
    )
    if cropped:
        text = "the sides of %d of %d images are not multiples of %d: these images are centre-cropped"
        logger.info(text, cropped, len(headers), policy.scale)
