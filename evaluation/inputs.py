"""Functions that decode images of all types that a detector accepts, and cut images into crops."""

import math
import os
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.images import FORMATS, convert_to_upright_rgb, read_image_as_tensor
from utils.console import make_printable
from utils.errors import UserError, describe_exception

ImageInput = str | os.PathLike | Image.Image | Tensor | np.ndarray | BinaryIO
ACCEPTED = (
    "a path, an open binary file, a PIL image, a NumPy array of uint8 (H, W, 3) or a tensor of uint8 (3, H, W), RGB"
    " from 0 to 255"
)


def is_one_image(images: object) -> bool:
    """Return whether the argument is one image, and not a batch, list or iterator of images."""
    if isinstance(images, Tensor | np.ndarray):
        return images.ndim == 3
    return isinstance(images, str | os.PathLike | Image.Image) or hasattr(images, "read")


def decode_image(image: ImageInput) -> Tensor:
    """Convert an image of any accepted type to an RGB image, uint8 (3, H, W).

    Raises:
        UserError: if the type of the image is not accepted, or if the image cannot be decoded.
    """
    if isinstance(image, str | os.PathLike):
        return read_image_as_tensor(os.fspath(image))
    if isinstance(image, Image.Image) or hasattr(image, "read"):
        return decode_image_with_pillow(image)
    if isinstance(image, Tensor):
        if image.dtype == torch.uint8 and image.ndim == 3 and image.shape[0] == 3:
            return image.cpu()
        raise UserError(f"expected {ACCEPTED}; got a tensor with dtype {image.dtype} and shape {tuple(image.shape)}")
    if isinstance(image, np.ndarray):
        if image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
            return torch.from_numpy(image.transpose(2, 0, 1).copy())
        raise UserError(f"expected {ACCEPTED}; got an array with dtype {image.dtype} and shape {image.shape}")
    raise UserError(f"expected {ACCEPTED}; got {type(image).__name__}")


def decode_image_with_pillow(image: Image.Image | BinaryIO) -> Tensor:
    """Convert a PIL image of any mode, or an open image file, to an upright RGB image, uint8 (3, H, W).

    Raises:
        UserError: if the image cannot be decoded.
    """
    try:
        if isinstance(image, Image.Image):
            opened = image.copy()  # `convert_to_upright_rgb` may change its argument in place
        else:
            opened = Image.open(image, formats=FORMATS)
        pixels = np.array(convert_to_upright_rgb(opened))  # (H, W, 3)
    except Exception as error:  # decoders raise exceptions of any type
        name = getattr(image, "filename", None) or getattr(image, "name", None) or type(image).__name__
        reason = describe_exception(error)
        raise UserError(f"cannot decode the image {make_printable(str(name))} ({make_printable(reason)})") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


# --- crops ---------------------------------------------------------------------------------------------------


def cut_evenly_spread_crops(image: Tensor, side: int, count: int) -> tuple[Tensor, int]:
    """Cut at most `count` square crops, which are evenly spread over an image.

    The ratio rows / columns of the crops is as close as possible to the ratio H / W of the image. If the height or the
    width of the image is less than `side`, each crop spans the whole height or width, and is not square.

    Args:
        image: a tensor (3, H, W).
        side: side length of a crop in pixels.

    Returns:
        The crops (K, 3, h, w), ordered row by row, and the number of crops per row.
    """
    height, width = image.shape[1:]
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    rows = min(divisors, key=lambda n: abs(math.log((n * n / count) / (height / width))))
    tops = compute_crop_start_positions(height, side, rows)
    lefts = compute_crop_start_positions(width, side, count // rows)
    crops = [image[:, top : top + side, left : left + side] for top in tops for left in lefts]
    return torch.stack(crops), len(lefts)


def compute_crop_start_positions(length: int, side: int, count: int) -> list[int]:
    """Compute the positions at which `count` crops of `side` pixels begin along an image side of `length` pixels.

    A single crop is centred, and duplicate positions are removed.
    """
    free = max(length - side, 0)
    if count == 1:
        return [free // 2]
    return sorted({i * free // (count - 1) for i in range(count)})
