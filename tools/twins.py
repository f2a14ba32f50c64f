"""Make generated twins of photographs. A twin has the content, format and size of its photograph, and generator traces.

If a detector is trained on photographs and their twins, the content of the images does not separate the classes. The
method follows B-Free (Guillaro et al., CVPR 2025), Aligned Forensics (Rajan et al., 2024) and DDA (Chen et al., 2025).
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
from models.tiling import compute_in_tiles
from tools.autoencoder import FACTOR, Autoencoder
from tools.upsampling import upsample_again
from utils.console import printable, progress
from utils.errors import UserError
from utils.random_streams import seeded_generator

logger = logging.getLogger("tools.example")

TILE, MARGIN = 512, 64  # side and overlap of the tiles in which large images are computed; pixels, multiples of FACTOR
ALPHA_MODES = ("RGBA", "RGBa", "LA", "La", "PA")
Imitate = Callable[[Tensor], Tensor]  # image -> twin, both (1, 3, H, W) in [0, 1], with sides multiples of FACTOR


def write_twins(photographs: str, out: Path, imitate: Imitate) -> None:
    """Write the twin OUT/PATH of each image PHOTOGRAPHS/PATH. An image without a twin is reported and left out.

    Args:
        imitate: function that makes the twin of an image.

    Raises:
        UserError: if no twin could be made.
    """
    paths = find_images(photographs)
    left_out = 0
    for path in progress(paths, "twins", len(paths)):
        target = out / os.path.relpath(path, photographs)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_twin(path, target, imitate)
        except Exception as error:  # decoders raise exceptions of any type
            reason = " ".join(str(error).split()) or type(error).__name__
            logger.warning("no twin of %s: %s", printable(path), printable(reason))
            target.unlink(missing_ok=True)
            left_out += 1
    if left_out == len(paths):
        raise UserError(f"none of the {len(paths)} images in {printable(photographs)} has a twin")
    logger.info("%d twins written, %d images left out", len(paths) - left_out, left_out)


def write_twin(path: str, target: Path, imitate: Imitate) -> None:
    """Write the twin of one image, with the format, size, compression, EXIF data and colour profile of the image."""
    if not os.path.isfile(path):
        raise UserError("it is not a file")
    with Image.open(path, formats=FORMATS) as image:
        settings = saving_options(image, path)
        if image.mode in ALPHA_MODES or "transparency" in image.info:
            logger.warning("%s: the twin has no alpha channel", printable(path))
        if image.mode[0] in "IF":
            raise UserError(f"images of 8 bits per channel are expected, got mode {image.mode}")
        grey = image.mode == "L"
        pixels = np.asarray(image.convert("RGB"))  # (H, W, 3), not rotated by EXIF
    x = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 255  # (1, 3, H, W)
    with torch.inference_mode():
        y = imitate_padded(x, imitate)
    twin = Image.fromarray((y[0] * 255).round().byte().permute(1, 2, 0).numpy())
    if grey:
        twin = twin.convert("L")
    twin.save(target, **settings)


def saving_options(image: Image.Image, path: str) -> dict:
    """Choose the arguments of `Image.save` so that the twin is stored like the original image."""
    options = {"format": image.format}
    for name in ("exif", "icc_profile"):
        if image.format in ("JPEG", "MPO", "PNG", "WEBP") and image.info.get(name):
            options[name] = image.info[name]
    if image.format in ("JPEG", "MPO"):  # MPO: a JPEG file with several images; the twin has one
        options["format"] = "JPEG"
        options["qtables"] = image.quantization
        if image.mode == "RGB":
            options["subsampling"] = JpegImagePlugin.get_sampling(image)
        options["progressive"] = bool(image.info.get("progressive"))
    elif image.format == "WEBP":
        options["lossless"] = is_lossless_webp(path)
        if not options["lossless"]:
            text = "%s: the quality of a lossy WebP file is unknown, so the twin has quality 80"
            logger.warning(text, printable(path))
    elif image.format == "TIFF":
        options["compression"] = image.info.get("compression")
    elif image.format == "GIF":
        raise UserError("GIF files have too few colours for a twin")
    return options


def is_lossless_webp(path: str) -> bool:
    """Check whether a WebP file is lossless, which means that the first image chunk is of type VP8L."""
    with open(path, "rb") as file:
        header = file.read(1 << 16)
    lossless, lossy = header.find(b"VP8L"), header.find(b"VP8 ")
    return lossless >= 0 and (lossy < 0 or lossless < lossy)


def imitate_padded(x: Tensor, imitate: Imitate) -> Tensor:
    """Make the twin of an image of any size: pad its sides by reflection to multiples of FACTOR, and crop the twin.

    Args:
        x: (1, 3, H, W) in [0, 1].
        imitate: function that makes the twin of a padded image.
    Returns:
        (1, 3, H, W) in [0, 1].
    """
    height, width = x.shape[2:]
    padding = (0, -width % FACTOR, 0, -height % FACTOR)
    small = min(height, width) < FACTOR
    padded = F.pad(x, padding, mode="replicate" if small else "reflect")
    return imitate(padded)[:, :, :height, :width].clamp(0, 1)


def up_sampling(seed: int) -> Imitate:
    """Make a function that simulates a generator: nearest-neighbour up-sampling and a random convolution.

    Args:
        seed: random seed of the convolutions.
    """
    rng = seeded_generator(seed)

    def imitate(x: Tensor) -> Tensor:
        return upsample_again(x, "nearest", rng)

    return imitate


def autoencoding(model: Autoencoder) -> Imitate:
    """Make a function that passes an image through the autoencoder. Large images are computed in overlapping tiles.

    Tiles do not match exactly at their borders, because the group norms of the autoencoder are computed per tile.
    """

    def imitate(x: Tensor) -> Tensor:
        return compute_in_tiles(model, x, side=TILE, halo=MARGIN)

    return imitate
