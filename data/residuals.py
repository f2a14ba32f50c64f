"""The residual cache: residuals stored on disk for training with a frozen re-synthesizer.

With a frozen re-synthesizer, the residual of an image is the same in every epoch. It is therefore computed once and
stored. There is one file per image, crop and direction (mirrored or not). A mirrored image needs its own residual,
because networks do not commute with mirroring. The name of the cache folder is a hash of every setting that changes
residuals. Before each epoch, `ResidualDataset.store_missing_residuals` computes the missing residuals. The epoch then reads no images.
"""

import hashlib
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.datasets import Batch, ImageDataset, Key, Sample, make_loader
from utils.compute import Compute
from utils.console import printable
from utils.distributed import World, barrier, broadcast_from_main
from utils.errors import UserError
from utils.files import atomic, make_folder, remove_unfinished

logger = logging.getLogger(__name__)

# Rounding to half precision changes a value v >= 2^-14 by at most 2^-11 v (0.05 %), a smaller value by at most 2^-25
STORAGE = {"fp16": torch.float16, "fp32": torch.float32}
ABANDONED_AFTER = 3600  # delete unfinished files only after this many seconds, because another run may be writing them
FORMAT = 2  # version of the cache files: increase it if residuals are computed or stored differently


def create_cache_folder(folder: Path, settings: Mapping[str, object]) -> Path:
    """Create the cache folder for residuals with the given settings. Several runs may use the folder at the same time.

    Args:
        folder: the parent folder of all residual caches.
        settings: everything that changes residuals besides the image, by name, such as fingerprints of weights.
    """
    versions = {"cache format": FORMAT, "torch": torch.__version__, "Pillow": PIL.__version__, "numpy": np.__version__}
    lines = [f"{name}: {value}\n" for name, value in sorted({**settings, **versions}.items())]
    text = "".join(lines)
    folder = folder / hashlib.sha256(text.encode()).hexdigest()[:16]
    folder.mkdir(exist_ok=True)
    (folder / "settings.txt").write_text(text)  # for human readers; no program reads it
    remove_unfinished(folder, ABANDONED_AFTER)
    return folder


def residuals_fit_in_cache(folder: Path, sizes: Sequence[int], max_bytes: float) -> bool:
    """Check whether residuals fit into `max_bytes` and onto the disk, and log the result.

    Args:
        folder: the cache folder, from `create_cache_folder`.
        sizes: size in bytes of each residual that training needs.
    """
    needed = sum(sizes)
    stored = sum(entry.stat().st_size for entry in os.scandir(folder))
    fits = needed <= max_bytes and needed - stored <= shutil.disk_usage(folder).free
    if fits:
        result = "the folder can be deleted after any run"
    else:
        result = "this is more than --cache-gb or the free disk space, so no residuals are stored"
    text = "residual cache %s: up to %d residuals take %.2f GB (%.2f GB are stored already); %s"
    logger.info(text, printable(folder.parent), len(sizes), needed / 1e9, stored / 1e9, result)
    return fits


class ResidualDataset(Dataset):
    """A dataset that reads the residual of each entry of an `ImageDataset` from the cache. Images are not decoded.

    Args:
        images: dataset of the images whose residuals are kept. Except for mirroring, the images must be the same in
            every epoch.
        folder: the cache folder, from `create_cache_folder`.
        dtype: type of the stored numbers, a value of STORAGE.
    """

    def __init__(self, images: ImageDataset, folder: Path, dtype: torch.dtype):
        self.images = images
        self.folder = folder
        self.dtype = dtype

    def compute_path(self, key: Key) -> Path:
        """Compute the path of the file in which the residual for a key is stored.

        The path depends on the image file (path, size, modification time), the crop and whether the image is mirrored.

        Raises:
            OSError: if the image file does not exist.
        """
        image = self.images.get_item(key.index).path
        status = os.stat(image)
        augmentation = self.images.augmentation
        crop = (augmentation.seed, key.index) if augmentation and augmentation.crops else None
        mirrored = bool(self.images.is_mirrored(key))
        identity = (os.path.realpath(image), status.st_size, status.st_mtime_ns, crop, mirrored)
        digest = hashlib.sha256(repr(identity).encode(errors="surrogateescape")).hexdigest()
        return self.folder / f"{digest[:32]}.npz"

    def has_residual(self, key: Key) -> bool:
        """Return whether the residual for a key is in the cache."""
        try:
            return self.compute_path(key).exists()
        except OSError:  # the image file does not exist, which is reported when the image is read
            return False

    def store_residual(self, key: Key, residual: Tensor) -> None:
        """Store the residual (C_l, H_l, W_l) for a key.

        Raises:
            UserError: if the residual has values that are not finite, or too large for half precision.
        """
        image = printable(self.images.get_item(key.index).path)
        if not residual.isfinite().all():
            raise UserError(f"{image}: the residual has values that are not finite (NaN or infinite)")
        stored = residual.to(self.dtype)
        if not stored.isfinite().all():
            raise UserError(f"{image}: the residual is too large for half precision, use --cache-precision fp32")
        with atomic(self.compute_path(key)) as file:  # .npz and not .npy, because .npz files contain a checksum
            np.savez(file, residual=stored.cpu().contiguous().numpy())

    def __getitem__(self, key: Key) -> Sample:
        item = self.images.get_item(key.index)
        name = printable(item.path)
        if not self.has_residual(key):
            # `store_missing_residuals` could not read the image: read the image again to get the error message
            error = self.images[key].error
            return Sample(key, item, None, error or f"{name}: the file has changed during training: use --resume auto")
        path = self.compute_path(key)
        try:
            residual = torch.from_numpy(np.load(path)["residual"])  # (C_l, H_l, W_l)
        except Exception as error:  # for damaged files, zipfile, zlib and NumPy raise many kinds of errors
            path.unlink(missing_ok=True)
            text = f"the cached residual {printable(path)} was damaged ({error}) and is deleted; use --resume auto"
            return Sample(key, item, None, f"{name}: {text}")
        return Sample(key, item, residual[None])  # (1, C_l, H_l, W_l)

    def store_missing_residuals(
        self,
        epoch: int,
        residual_of: Callable[[Batch], Tensor],
        readable_batches: Callable[[Iterable[Batch], str], Iterable[Batch]],
        workers: int,
        compute: Compute,
        world: World,
    ) -> None:
        """Compute and store the residuals that an epoch needs and that are missing. The work is divided over processes.

        The network gets one image at a time, so that a residual does not depend on the other images in a batch.

        Args:
            residual_of: function that computes the residual (1, C_l, H_l, W_l) of a batch of one image.
            readable_batches: function of a loader and a description. It yields the batches whose image could be read.
        """
        keys = [Key(epoch, index) for index in range(len(self.images))]
        missing = [key for key in keys if not self.has_residual(key)]
        barrier(world)  # every process lists the missing residuals before any process writes
        own_keys = missing[world.rank :: world.size]
        if own_keys:
            loader = make_loader(self.images, [[key] for key in own_keys], workers, compute)
            for batch in readable_batches(loader, "residuals"):
                key_epoch, index, _ = batch.keys[0]
                self.store_residual(Key(key_epoch, index), residual_of(batch)[0])
        barrier(world)


class CacheOptions(NamedTuple):
    """Options of the residual cache."""

    folder: str | Path  # parent folder of all residual caches
    precision: str  # a key of STORAGE
    max_gb: float  # limit in GB; if the residuals of all images take more, none are stored


def create_residual_datasets(
    datasets: Sequence[ImageDataset],
    residual_shape: Callable[[int, int], tuple[int, int, int]],
    key: Mapping[str, object],
    options: CacheOptions,
    world: World,
) -> list[ResidualDataset]:
    """Create a dataset of cached residuals for each dataset of images.

    Args:
        residual_shape: function that maps (height, width) of an image to the shape (C_l, H_l, W_l) of its residual.
        key: everything that changes a residual besides its image, by name.

    Returns:
        One dataset per dataset of images; none if images differ between epochs or the residuals take too much space.
    """
    for images in datasets:
        if images.crops_change_each_epoch or images.transform:
            logger.info(
                "no residual cache: in each epoch, images are cropped at new places (but see --crops-per-image) or"
                " perturbed differently (--augment-perturb), so their residuals change"
            )
            return []
    dtype = STORAGE[options.precision]
    byte_counts = []
    for images in datasets:
        directions = 2 if images.augmentation else 1  # the image and its mirror image have different residuals
        for size in images.image_sizes:
            values = math.prod(residual_shape(*size))
            byte_counts += [values * dtype.itemsize] * (images.parts * directions)
    folder = create_cache_folder(make_folder(options.folder), {**key, "storage": options.precision})
    if not broadcast_from_main(residuals_fit_in_cache(folder, byte_counts, options.max_gb * 1e9), world):
        return []
    return [ResidualDataset(images, folder, dtype) for images in datasets]
