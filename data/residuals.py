"""The residual cache: residuals stored on disk for training with a frozen re-synthesizer.

With a frozen re-synthesizer the residual of an image never changes, so it is computed once. There is one file for each
image, crop and direction. (A mirrored image has a residual of its own, because networks do not commute with mirroring.)
The files are in a folder whose name depends on every setting that the numbers depend on. Before each epoch, `fill`
computes the residuals that are missing. The epoch then reads residuals only.
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

# Half precision keeps a value v >= 2^-14 to within 2^-11 v (0.05 %), and a smaller one to within 2^-25
STORAGE = {"fp16": torch.float16, "fp32": torch.float32}
ABANDONED_AFTER = 3600  # seconds without a write after which an unfinished file is deleted; other runs may be writing
FORMAT = 2  # increase it if the code computes or stores residuals differently


def cache_folder(folder: Path, settings: Mapping[str, object]) -> Path:
    """Create the folder for the residuals of some settings. Several runs may use it at a time.

    Args:
        folder: the folder of all caches.
        settings: everything that residuals depend on besides the image, by name: fingerprints of weights, ...
    """
    own = {"cache format": FORMAT, "torch": torch.__version__, "Pillow": PIL.__version__, "numpy": np.__version__}
    lines = [f"{name}: {value}\n" for name, value in sorted({**settings, **own}.items())]
    text = "".join(lines)
    folder = folder / hashlib.sha256(text.encode()).hexdigest()[:16]
    folder.mkdir(exist_ok=True)
    (folder / "settings.txt").write_text(text)  # for people
    remove_unfinished(folder, ABANDONED_AFTER)
    return folder


def has_room(folder: Path, sizes: Sequence[int], max_bytes: float) -> bool:
    """Check whether residuals fit into `max_bytes` and onto the disk, and log the result.

    Args:
        folder: of `cache_folder`.
        sizes: size of each residual in bytes.
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
    """The entries of an `ImageDataset` as cached residuals. Images are not decoded.

    Args:
        images: images that are the same in each epoch, except for mirroring.
        folder: of `cache_folder`.
        dtype: a value of STORAGE.
    """

    def __init__(self, images: ImageDataset, folder: Path, dtype: torch.dtype):
        self.images = images
        self.folder = folder
        self.dtype = dtype

    def path(self, key: Key) -> Path:
        """Return the path of a residual. It depends on the image file, its size and time, the crop and the direction.

        Raises:
            OSError: if there is no such image file.
        """
        image = self.images.item(key.index).path
        status = os.stat(image)
        augmentation = self.images.augmentation
        crop = (augmentation.seed, key.index) if augmentation and augmentation.crops else None
        mirrored = bool(self.images.mirrored(key))
        identity = (os.path.realpath(image), status.st_size, status.st_mtime_ns, crop, mirrored)
        digest = hashlib.sha256(repr(identity).encode(errors="surrogateescape")).hexdigest()
        return self.folder / f"{digest[:32]}.npz"

    def holds(self, key: Key) -> bool:
        """Return whether a residual is stored."""
        try:
            return self.path(key).exists()
        except OSError:  # reading the image will report what is wrong with it
            return False

    def write(self, key: Key, residual: Tensor) -> None:
        """Store a residual (C_l, H_l, W_l).

        Raises:
            UserError: if it is not finite, or too large for half precision.
        """
        image = printable(self.images.item(key.index).path)
        if not residual.isfinite().all():
            raise UserError(f"{image}: its residual has values that are not finite (NaN or infinite)")
        stored = residual.to(self.dtype)
        if not stored.isfinite().all():
            raise UserError(f"{image}: its residual is too large for half precision, use --cache-precision fp32")
        with atomic(self.path(key)) as file:  # .npz, because it contains a checksum
            np.savez(file, residual=stored.cpu().contiguous().numpy())

    def __getitem__(self, key: Key) -> Sample:
        item = self.images.item(key.index)
        name = printable(item.path)
        if not self.holds(key):  # `fill` could not read the image: read it again for the error
            error = self.images[key].error
            return Sample(key, item, None, error or f"{name}: has changed since training began: use --resume auto")
        path = self.path(key)
        try:
            residual = torch.from_numpy(np.load(path)["residual"])  # (C_l, H_l, W_l)
        except Exception as error:  # for damaged files, zipfile, zlib and NumPy raise many kinds of errors
            path.unlink(missing_ok=True)
            text = f"its residual {printable(path)} was damaged ({error}) and is deleted; use --resume auto"
            return Sample(key, item, None, f"{name}: {text}")
        return Sample(key, item, residual[None])  # (1, C_l, H_l, W_l)

    def fill(
        self,
        epoch: int,
        residual_of: Callable[[Batch], Tensor],
        readable_batches: Callable[[Iterable[Batch], str], Iterable[Batch]],
        workers: int,
        compute: Compute,
        world: World,
    ) -> None:
        """Compute the residuals that an epoch needs and that are not stored. Each process computes a part of them.

        Images are computed one by one, so that their residuals do not depend on the batch.

        Args:
            residual_of: computes the residual (1, C_l, H_l, W_l) of a batch of one image.
            readable_batches: yields the batches of a loader that could be read. It takes the loader and a description.
        """
        keys = [Key(epoch, index) for index in range(len(self.images))]
        missing = [key for key in keys if not self.holds(key)]
        barrier(world)  # every process lists the missing residuals before any process writes
        own = missing[world.rank :: world.size]
        if own:
            loader = make_loader(self.images, [[key] for key in own], workers, compute)
            for batch in readable_batches(loader, "residuals"):
                key_epoch, index, _ = batch.keys[0]
                self.write(Key(key_epoch, index), residual_of(batch)[0])
        barrier(world)


class CacheOptions(NamedTuple):
    """Where and how residuals are kept."""

    folder: str | Path
    precision: str  # a key of STORAGE
    max_gb: float  # no residuals are kept if all of them take more


def cached_residuals(
    datasets: Sequence[ImageDataset],
    residual_shape: Callable[[int, int], tuple[int, int, int]],
    key: Mapping[str, object],
    options: CacheOptions,
    world: World,
) -> list[ResidualDataset]:
    """Create datasets of cached residuals. Empty if images differ between epochs, or there is no room for all.

    Args:
        residual_shape: (height, width) of an image -> (C_l, H_l, W_l) of its residual.
        key: everything that a residual depends on besides its image.
    """
    for images in datasets:
        if images.crops_change or images.transform:
            logger.info(
                "no residual cache: images are cropped (but see --crops-per-image) or perturbed (--augment-perturb)"
                " differently in each epoch, and so their residuals differ"
            )
            return []
    dtype = STORAGE[options.precision]
    byte_counts = []
    for images in datasets:
        directions = 2 if images.augmentation else 1  # a mirrored image has a residual of its own
        for size in images.sizes:
            values = math.prod(residual_shape(*size))
            byte_counts += [values * dtype.itemsize] * (images.parts * directions)
    folder = cache_folder(make_folder(options.folder), {**key, "storage": options.precision})
    if not broadcast_from_main(has_room(folder, byte_counts, options.max_gb * 1e9), world):
        return []
    return [ResidualDataset(images, folder, dtype) for images in datasets]
