"""Aligned random patches of real images, for the training of the re-synthesizer."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from data.images import DataError, SizePolicy, multiple_box, read_rgb, shown, size_problem


class Patches(NamedTuple):
    """Patches of one image or, collated, of a batch."""

    images: Tensor  # uint8 (K, 3, P, P); of a batch (B * K, 3, P, P), those of an image after one another
    keys: list[tuple[int, int, int]]  # of each patch: epoch, index of its image, place among the K
    error: str | None = None  # one line if an image could not be used; the others are here nevertheless


class PatchDataset(Dataset):
    """Random HR patches of `patch_size * scale` pixels that begin at a multiple of `scale`, mirrored and
    turned.

    The image is first centre-cropped to a multiple of the scale, so that a patch is downsampled to the very
    pixels that the whole image would be downsampled to. Horizontal flip, vertical flip and rotation by 90
    degrees have probability 0.5 each (He et al.; the same as in yjn870/RDN-pytorch, MIT). What is drawn
    depends on (seed, epoch, index) alone.

    Args:
        paths: the images.
        patch_size: side of a patch in LR pixels.
        patches_per_image: K, taken from an image once it is decoded.
    """

    def __init__(self, paths: Sequence[str], patch_size: int, scale: int, patches_per_image: int = 1, seed: int = 0):
        self.paths, self.patch_size, self.scale = paths, patch_size, scale
        self.patches_per_image, self.seed = patches_per_image, seed

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: tuple[int, int] | int) -> Patches:
        """The patches of (epoch, index), or of an index in epoch 0. What is wrong is in `error`."""
        epoch, index = key if isinstance(key, tuple) else (0, key)
        side = self.patch_size * self.scale
        try:
            image = read_rgb(self.paths[index])
            problem = size_problem(image.height, image.width, SizePolicy(self.scale, crop_size=side))
            if problem:
                raise DataError(f"{shown(self.paths[index])}: {problem}")
        except DataError as error:  # not raised in a worker: DataLoader would make a traceback of it
            return Patches(torch.empty(0, 3, side, side, dtype=torch.uint8), [], str(error))
        rng = np.random.default_rng([self.seed, epoch, index])
        patches = [random_patch(image, self.patch_size, self.scale, rng) for _ in range(self.patches_per_image)]
        images = torch.from_numpy(np.stack(patches))  # (K, 3, P, P)
        return Patches(images, [(epoch, index, k) for k in range(self.patches_per_image)])


def random_patch(image: Image.Image, patch_size: int, scale: int, rng: np.random.Generator) -> np.ndarray:
    """One aligned patch, flipped and turned at random: uint8 (3, P, P), P = patch_size * scale."""
    top, left, height, width = multiple_box(image.height, image.width, scale)
    side = patch_size * scale
    top += scale * int(rng.integers((height - side) // scale + 1))
    left += scale * int(rng.integers((width - side) // scale + 1))
    flip_horizontal, flip_vertical, turn = rng.random(3) < 0.5
    patch = np.asarray(image.crop((left, top, left + side, top + side)))  # (P, P, 3)
    if flip_horizontal:
        patch = patch[:, ::-1]
    if flip_vertical:
        patch = patch[::-1]
    if turn:
        patch = np.rot90(patch)
    return np.ascontiguousarray(patch.transpose(2, 0, 1))  # (3, P, P)


def collate_patches(samples: Sequence[Patches]) -> Patches:
    """The patches of several images in one batch; the first error if there are any."""
    images = torch.cat([s.images for s in samples])  # (B * K, 3, P, P)
    return Patches(images, [key for s in samples for key in s.keys], next((s.error for s in samples if s.error), None))
