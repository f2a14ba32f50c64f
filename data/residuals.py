"""Store residuals on disk for training with a frozen re-synthesizer.

A frozen re-synthesizer computes the same residual of an image in every epoch, so each residual is computed only once.
Residuals of mirrored images are stored too, because convolution kernels are not symmetric.
"""

import contextlib
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
from utils.console import make_printable
from utils.distributed import World, barrier, broadcast_from_main
from utils.errors import UserError
from utils.files import make_folder, open_for_atomic_write, remove_leftover_temporary_files

logger = logging.getLogger(__name__)

# STORAGE maps each value of --cache-precision to a data type.
# Rounding to float16 changes an absolute value above 2^-14 by at most 0.05 % (2^-11).
STORAGE = {"fp16": torch.float16, "fp32": torch.float32}
ABANDONED_AFTER = 3600  # age in seconds at which a partly written cache file counts as abandoned and is deleted
FORMAT = 2  # version of the cache files; increase FORMAT if residuals are computed or stored in another way


def create_cache_folder(folder: Path, settings: Mapping[str, object]) -> Path:
    """Create the cache folder for residuals that are computed with the given settings, and return its path.

    Args:
        folder: the parent folder of all cache folders.
        settings: names and values of everything on which residuals depend, such as networks and image sizes.
    """
    versions = {"cache format": FORMAT, "torch": torch.__version__, "Pillow": PIL.__version__, "numpy": np.__version__}
    lines = [f"{name}: {value}\n" for name, value in sorted({**settings, **versions}.items())]
    text = "".join(lines)
    folder = folder / hashlib.sha256(text.encode()).hexdigest()[:16]
    folder.mkdir(exist_ok=True)
    (folder / "settings.txt").write_text(text)  # shows users the settings; programs do not read this file
    remove_leftover_temporary_files(folder, age=ABANDONED_AFTER)
    return folder


def residuals_fit_in_cache(folder: Path, sizes: Sequence[int], max_bytes: float) -> bool:
    """Return whether the residuals fit into the cache and onto the disk, and log the result.

    Args:
        sizes: size in bytes of each residual that training needs.
        max_bytes: largest allowed sum of `sizes`.
    """
    needed = sum(sizes)
    stored = 0
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):  # another run may rename or delete cache files at this moment
            stored += entry.stat().st_size
    fits = needed <= max_bytes and needed - stored <= shutil.disk_usage(folder).free
    if fits:
        result = "you may delete this folder when no training is running"
    else:
        result = "no residuals are stored, because this is more than --cache-gb or the free disk space"
    logger.info(
        "residual cache %s: up to %d residuals (also of mirrored images) take %.2f GB (%.2f GB are stored already); %s",
        make_printable(folder.parent),
        len(sizes),
        needed / 1e9,
        stored / 1e9,
        result,
    )
    return fits


class ResidualDataset(Dataset):
    """A dataset that reads the residual of each entry of an `ImageDataset` from the cache, without decoding images.

    Args:
        images: a dataset whose crops are the same in every epoch, apart from random mirroring.
        dtype: data type of the stored residuals: torch.float16 or torch.float32.
    """

    def __init__(self, images: ImageDataset, folder: Path, dtype: torch.dtype):
        self.images = images
        self.folder = folder
        self.dtype = dtype

    def compute_residual_file_path(self, key: Key) -> Path:
        """Compute the path of the file that stores the residual of a dataset entry.

        The path depends on the image file (path, size, modification time), on the crop and on the mirroring.

        Raises:
            OSError: if the image file does not exist.
        """
        image = self.images.get_image_item_of_dataset_index(key.index).path
        status = os.stat(image)
        augmentation = self.images.augmentation
        crop = (augmentation.seed, key.index) if augmentation and augmentation.crops else None
        mirrored = bool(self.images.is_mirrored(key))
        identity = (os.path.realpath(image), status.st_size, status.st_mtime_ns, crop, mirrored)
        digest = hashlib.sha256(repr(identity).encode(errors="surrogateescape")).hexdigest()
        return self.folder / f"{digest[:32]}.npz"

    def is_residual_stored(self, key: Key) -> bool:
        """Return whether the residual of a dataset entry is in the cache."""
        try:
            return self.compute_residual_file_path(key).exists()
        except OSError:  # a missing image file is reported later, when the image is read
            return False

    def store_residual(self, key: Key, residual: Tensor) -> None:
        """Store the residual (C_l, H_l, W_l) of a dataset entry in the cache.

        Raises:
            UserError: if the residual has a value that is not finite or is too large for `dtype`.
        """
        image = make_printable(self.images.get_image_item_of_dataset_index(key.index).path)
        if not residual.isfinite().all():
            raise UserError(
                f"{image}: the residual has values that are not finite (NaN or infinity); try --precision fp32"
            )
        stored = residual.to(self.dtype)
        if not stored.isfinite().all():
            raise UserError(f"{image}: the residual has values too large for float16: use --cache-precision fp32")
        # .npz files contain a checksum, unlike .npy files
        with open_for_atomic_write(self.compute_residual_file_path(key)) as file:
            np.savez(file, residual=stored.cpu().contiguous().numpy())

    def __getitem__(self, key: Key) -> Sample:
        item = self.images.get_image_item_of_dataset_index(key.index)
        name = make_printable(item.path)
        if not self.is_residual_stored(key):
            error = self.images[key].error
            lost = f"{name}: its residual is not in the cache {make_printable(self.folder)} any more"
            reason = "because the image file or the cache was changed during training"
            return Sample(key, item, None, error or f"{lost}, {reason}; start again with --resume auto")
        path = self.compute_residual_file_path(key)
        try:
            residual = torch.from_numpy(np.load(path)["residual"])  # (C_l, H_l, W_l)
        except Exception as error:  # zipfile, zlib and NumPy raise many kinds of exceptions for damaged files
            path.unlink(missing_ok=True)
            text = f"deleted the damaged residual {make_printable(path)} ({error}); start again with --resume auto"
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
        """Compute and store all residuals that an epoch needs, except those that are in the cache already.

        Residuals are computed for one image at a time, so that they do not depend on other images in a batch.

        Args:
            residual_of: function that computes the residual (1, C_l, H_l, W_l) of a batch of one image.
            readable_batches: function that takes a loader and the text of a progress bar, and yields the batches of
                the loader without images that cannot be read.
        """
        keys = [Key(epoch, index) for index in range(len(self.images))]
        missing = [key for key in keys if not self.is_residual_stored(key)]
        barrier(world)  # no process may store residuals until all processes have computed the same `missing`
        own_keys = missing[world.rank :: world.size]
        if own_keys:
            loader = make_loader(self.images, [[key] for key in own_keys], workers, compute)
            for batch in readable_batches(loader, "residuals"):
                row = batch.keys[0]
                self.store_residual(Key(row.epoch, row.index), residual_of(batch)[0])
        barrier(world)


class CacheOptions(NamedTuple):
    """The command-line options of the residual cache."""

    folder: str | Path  # parent folder of all cache folders
    precision: str  # data type of the stored residuals: "fp16" or "fp32"
    max_gb: float  # maximum total size of all residuals in GB; no residual is stored if the total is larger


def create_residual_datasets(
    datasets: Sequence[ImageDataset],
    residual_shape: Callable[[int, int], tuple[int, int, int]],
    key: Mapping[str, object],
    options: CacheOptions,
    world: World,
) -> list[ResidualDataset]:
    """Create a dataset of cached residuals for each dataset of images.

    Args:
        residual_shape: function that computes the shape (C_l, H_l, W_l) of a residual from the height and the width of
            an image.
        key: names and values of all settings that change residuals.

    Returns:
        one `ResidualDataset` for each dataset, or an empty list if the images change in each epoch or the residuals do
        not fit into the cache.
    """
    for images in datasets:
        if images.crops_change_each_epoch or images.transform:
            logger.info(
                "residuals are not cached, because the images change in each epoch; to cache residuals, leave out"
                " --augment-perturb, and use --crop-size only with --crops-per-image"
            )
            return []
    dtype = STORAGE[options.precision]
    byte_counts = []
    for images in datasets:
        directions = 2 if images.augmentation else 1  # residuals per crop: augmentation also needs the mirrored crop
        for size in images.image_sizes:
            values = math.prod(residual_shape(*size))
            byte_counts += [values * dtype.itemsize] * (images.entries_per_image * directions)
    folder = create_cache_folder(make_folder(options.folder), {**key, "storage": options.precision})
    if not broadcast_from_main(residuals_fit_in_cache(folder, byte_counts, options.max_gb * 1e9), world):
        return []
    return [ResidualDataset(images, folder, dtype) for images in datasets]
