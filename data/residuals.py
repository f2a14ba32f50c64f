"""Residuals kept on disk: with RDN frozen, the residual of an image never changes, so it is computed once.

One file for each image, crop and direction (a mirrored image has a residual of its own: RDN does not commute with
mirroring), in a folder named by all that the numbers depend on: weights, stage, sizes, arithmetic, versions. Before an
epoch what it lacks is computed (`fill`); it then reads residuals only. All of them are kept, or none.
"""

import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import PIL
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.datasets import Batch, ImageDataset, Key, Sample, make_loader
from utils.distributed import World, wait_for_all
from utils.run import Compute, UserError, atomic, remove_torn, shown

logger = logging.getLogger(__name__)

TORN_AFTER = 3600  # seconds without a write: other runs may be writing here


class ResidualCache:
    """The residuals of one setting, in a folder that may hold those of others; any number of runs may share it.

    Args:
        folder: of the cache; exists.
        about: all that a residual depends on but its image, as names and values: fingerprints of the weights, ...
        storage: "fp16" or "fp32". In half precision a value v >= 2^-14 is kept to within 2^-11 v (0.05 %), and a
            smaller one to within 2^-25, that is 1 / 130000 of a grey level.
    """

    def __init__(self, folder: Path, about: Mapping[str, object], storage: str):
        about = {**about, "storage": storage, "torch": torch.__version__, "Pillow": PIL.__version__}
        text = "".join(f"{name}: {value}\n" for name, value in sorted(about.items()))
        self.folder, self.dtype = folder, torch.float16 if storage == "fp16" else torch.float32
        self.home = folder / hashlib.sha256(text.encode()).hexdigest()[:16]
        self.home.mkdir(exist_ok=True)
        (self.home / "settings.txt").write_text(text)  # for people
        remove_torn(self.home, TORN_AFTER)

    def has_room(self, shapes: Sequence[tuple[int, int, int]], max_bytes: float) -> bool:
        """Whether residuals of these shapes (C_l, H_l, W_l) fit into `max_bytes` and onto the disk; says so."""
        needed = sum(c * h * w for c, h, w in shapes) * self.dtype.itemsize
        own = sum(entry.stat().st_size for entry in os.scandir(self.home))
        fits = needed <= max_bytes and needed - own <= shutil.disk_usage(self.home).free
        verdict = "it can be deleted after any run" if fits else "more than --cache-gb or the disk has: none are kept"
        logger.info(
            "residual cache %s: up to %d residuals take %.2f GB (%.2f GB there already); %s",
            shown(self.folder), len(shapes), needed / 1e9, own / 1e9, verdict,
        )  # fmt: skip
        return fits

    def path(self, images: ImageDataset, key: Key) -> Path:
        """Where the residual of an image is kept: named by its file, the file's size and time, crop and direction.

        Raises:
            OSError: if there is no such file.
        """
        name = images.item(key.index).path
        status = os.stat(name)
        crop = (images.draws.seed, key.index) if images.draws and images.draws.crops else None
        identity = (os.path.realpath(name), status.st_size, status.st_mtime_ns, crop, bool(images.mirrored(key)))
        return self.home / f"{hashlib.sha256(repr(identity).encode(errors='surrogateescape')).hexdigest()[:32]}.npz"

    def holds(self, images: ImageDataset, key: Key) -> bool:
        try:
            return self.path(images, key).exists()
        except OSError:  # reading the image will say what is wrong with it
            return False

    def write(self, path: Path, residual: Tensor) -> None:
        """Keep a residual (C_l, H_l, W_l)."""
        stored = residual.to(self.dtype)
        if not stored.isfinite().all():
            raise UserError("a residual is too large for half precision: use --cache-precision fp32")
        with atomic(path) as file:  # a .npz, because it carries a checksum
            np.savez(file, residual=stored.cpu().contiguous().numpy())


class ResidualDataset(Dataset):
    """The entries of `images`, as residuals: none is decoded. From epoch to epoch they are mirrored, nothing else."""

    def __init__(self, images: ImageDataset, cache: ResidualCache):
        self.images, self.cache = images, cache

    def __getitem__(self, key: Key) -> Sample:
        item = self.images.item(key.index)
        if not self.cache.holds(self.images, key):  # `fill` could not read the image, which says why once more
            changed = f"{shown(item.path)} has changed since training began: --resume auto goes on"
            return Sample(key, item, None, self.images[key].error or changed)
        path = self.cache.path(self.images, key)
        try:
            return Sample(key, item, torch.from_numpy(np.load(path)["residual"])[None])  # (1, C_l, H_l, W_l)
        except Exception as error:  # damaged: zipfile, zlib and numpy raise many kinds
            path.unlink(missing_ok=True)
            reason = f"its residual {shown(path)} is damaged and was deleted ({error}): --resume auto makes it anew"
            return Sample(key, item, None, f"{shown(item.path)}: {reason}")

    def fill(
        self,
        epoch: int,
        residual_of: Callable[[Batch], tuple[Tensor, None]],
        watched: Callable[[Iterable[Batch], str], Iterable[Batch]],
        workers: int,
        compute: Compute,
        world: World,
    ) -> None:
        """Compute what the epoch lacks, each process a part, each image alone: so it is the same whoever asks for it.

        residual_of: a batch of one image -> its residual (1, C_l, H_l, W_l), and nothing. watched: batches, those that
        could be read, with what is to be done between them.
        """
        keys = [Key(epoch, index) for index in range(len(self.images))]
        keys = [key for key in keys if not self.cache.holds(self.images, key)]
        wait_for_all(world)  # all have looked before anyone writes
        if own := keys[world.rank :: world.size]:
            for batch in watched(make_loader(self.images, [[key] for key in own], workers, compute), "residuals"):
                path = self.cache.path(self.images, Key(*batch.keys[0][:2]))
                self.cache.write(path, residual_of(batch)[0][0])
        wait_for_all(world)
