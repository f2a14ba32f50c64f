"""Make twins: fake copies of photographs that contain the traces of a generator.

A detector that is trained on photographs and their twins cannot learn to recognise fake images by their content.
Training with twins follows B-Free (Guillaro et al., CVPR 2025), Aligned Forensics (Rajan et al., 2024) and DDA (Chen et
al., 2025).
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, JpegImagePlugin
from torch import Tensor

from data.images import FORMATS
from data.lists import find_images
from models.tiling import apply_function_in_tiles
from tools.autoencoder import FACTOR, Autoencoder
from tools.upsampling import halve_and_upsample
from utils.console import make_printable, progress_bar
from utils.errors import UserError, describe_exception
from utils.random_streams import seeded_generator

logger = logging.getLogger("tools.example")

TILE, MARGIN = 512, 64  # side of a tile without its margin, and width of the margin, in pixels; multiples of FACTOR
ALPHA_MODES = ("RGBA", "RGBa", "LA", "La", "PA")
# Function that computes the fake copy (1, 3, H, W) of an image (1, 3, H, W). H and W must be multiples of FACTOR
Imitate = Callable[[Tensor], Tensor]


def write_fake_copies(photographs: str, out: Path, imitate: Imitate) -> None:
    """Write a fake copy (twin) of each image in the folder `photographs`.

    The twin has the same path in `out` as the image in `photographs`.

    Raises:
        UserError: if not a single twin could be written.
    """
    paths = find_images(photographs)
    left_out = 0
    for path in progress_bar(paths, "twins", len(paths)):
        target = out / os.path.relpath(path, photographs)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_fake_copy(path, target, imitate)
        except Exception as error:  # image decoders raise exceptions of many types
            reason = describe_exception(error)
            logger.warning("cannot make a fake copy (twin) of %s: %s", make_printable(path), make_printable(reason))
            target.unlink(missing_ok=True)
            left_out += 1
    if left_out == len(paths):
        raise UserError(
            f"none of the {len(paths)} images in {make_printable(photographs)} could be turned into a fake copy (twin):"
            " see the warnings above"
        )
    logger.info("wrote fake copies (twins) of %d images, and left out %d images", len(paths) - left_out, left_out)


def write_fake_copy(path: str, target: Path, imitate: Imitate) -> None:
    """Write the fake copy (twin) of one image, with the size and the file format of the image.

    The twin of a JPEG, PNG or WebP image also has the EXIF data and the ICC profile of the image.
    """
    if not os.path.isfile(path):
        raise UserError("expected an image file, got a folder or a special file, such as a device or a pipe")
    with Image.open(path, formats=FORMATS) as image:
        settings = choose_save_options_like_original(image, path)
        if image.mode in ALPHA_MODES or "transparency" in image.info:
            logger.warning("the fake copy (twin) of %s has no alpha channel, unlike the image", make_printable(path))
        if image.mode[0] in "IF":
            raise UserError(
                f"expected an image with 8 bits per channel, got an image of the Pillow mode {image.mode}: convert the"
                " image to 8 bits per channel"
            )
        grey = image.mode == "L"
        pixels = np.asarray(image.convert("RGB"))  # (H, W, 3), as stored in the file, without the EXIF rotation
    x = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 255  # (1, 3, H, W)
    with torch.inference_mode():
        y = pad_image_and_make_fake_copy(x, imitate)
    twin = Image.fromarray((y[0] * 255).round().byte().permute(1, 2, 0).numpy())
    if grey:
        twin = twin.convert("L")
    twin.save(target, **settings)


def choose_save_options_like_original(image: Image.Image, path: str) -> dict:
    """Choose arguments for `Image.save`, so that a fake copy (twin) is compressed like the original image."""
    options = {"format": image.format}
    for name in ("exif", "icc_profile"):
        if image.format in ("JPEG", "MPO", "PNG", "WEBP") and image.info.get(name):
            options[name] = image.info[name]
    if image.format in ("JPEG", "MPO"):  # an MPO file is a JPEG file with several images
        options["format"] = "JPEG"
        options["qtables"] = image.quantization
        if image.mode == "RGB":
            options["subsampling"] = JpegImagePlugin.get_sampling(image)
        options["progressive"] = bool(image.info.get("progressive"))
    elif image.format == "WEBP":
        options["lossless"] = is_lossless_webp(path)
        if not options["lossless"]:
            text = "the quality of the lossy WebP file %s is unknown, so its twin is saved with quality 80"
            logger.warning(text, make_printable(path))
    elif image.format == "TIFF":
        options["compression"] = image.info.get("compression")
    elif image.format == "GIF":
        raise UserError("expected a file format with more than 256 colours, got a GIF file: convert the image to PNG")
    return options


def is_lossless_webp(path: str) -> bool:
    """Check whether a WebP file is lossless. In a lossless file, the first chunk with image data has the type VP8L."""
    with open(path, "rb") as file:
        header = file.read(1 << 16)
    lossless, lossy = header.find(b"VP8L"), header.find(b"VP8 ")
    return lossless >= 0 and (lossy < 0 or lossless < lossy)


def pad_image_and_make_fake_copy(x: Tensor, imitate: Imitate) -> Tensor:
    """Compute the fake copy (twin) of an image whose height and width need not be multiples of FACTOR.

    Args:
        x: the image, (1, 3, H, W) in [0, 1].
    Returns:
        The twin, (1, 3, H, W) in [0, 1].
    """
    height, width = x.shape[2:]
    padding = (0, -width % FACTOR, 0, -height % FACTOR)
    small = min(height, width) < FACTOR
    padded = F.pad(x, padding, mode="replicate" if small else "reflect")
    return imitate(padded)[:, :, :height, :width].clamp(0, 1)


def create_upsampling_function(seed: int) -> Imitate:
    """Create a function that imitates a generator by nearest-neighbour up-sampling, noise and a random filter."""
    rng = seeded_generator(seed)

    def imitate_generator_by_upsampling(x: Tensor) -> Tensor:
        return halve_and_upsample(x, "nearest", rng)

    return imitate_generator_by_upsampling


def create_autoencoder_function(model: Autoencoder) -> Imitate:
    """Create a function that passes an image through an autoencoder, tile by tile.

    Tile borders may be visible in the result, because the group norms of the autoencoder compute the mean and the
    variance of each tile separately.
    """

    def encode_and_decode(x: Tensor) -> Tensor:
        return apply_function_in_tiles(model, x, side=TILE, halo=MARGIN)

    return encode_and_decode
