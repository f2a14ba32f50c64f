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
from utils.compute import Compute
from utils.console import printable
from utils.distributed import World, barrier
from utils.errors import UserError
from utils.files import atomic, remove_unfinished

logger = logging.getLogger(__name__)

# In half precision a value v >= 2^-14 is kept to within 2^-11 v (0.05 %), and a smaller one to within 2^-25, that is
# 1 / 130000 of a grey level
STORAGE = {"fp16": torch.float16, "fp32": torch.float32}
TORN_AFTER = 3600  # seconds without a write: other runs may be writing here


def cache_folder(folder: Path, about: Mapping[str, object]) -> Path:
    """A folder below `folder`, made if it is not there, for the residuals of one setting; any number of runs may share it.

    about: all that a residual depends on but its image, as names and values: fingerprints of the weights, ...
    """
    about = {**about, "torch": torch.__version__, "Pillow": PIL.__version__}
    text = "".join(f"{name}: {value}\n" for name, value in sorted(about.items()))
    folder /= hashlib.sha256(text.encode()).hexdigest()[:16]
    folder.mkdir(exist_ok=True)
    (folder / "settings.txt").write_text(text)  # for people
    remove_unfinished(folder, age=TORN_AFTER)
    return folder


def has_room(folder: Path, sizes: Sequence[int], max_bytes: float) -> bool:
    """Whether residuals of these sizes in bytes fit into `max_bytes` and onto the disk; says so."""
    needed, own = sum(sizes), sum(entry.stat().st_size for entry in os.scandir(folder))
    fits = needed <= max_bytes and needed - own <= shutil.disk_usage(folder).free
    verdict = "it can be deleted after any run" if fits else "more than --cache-gb or the disk has: none are kept"
    text = "residual cache %s: up to %d residuals take %.2f GB (%.2f GB there already); %s"
    logger.info(text, printable(folder.parent), len(sizes), needed / 1e9, own / 1e9, verdict)
    return fits


class ResidualDataset(Dataset):
    """The entries of `images`, as residuals: none is decoded.

    Args:
        images: those that are the same in each epoch but for being mirrored.
        folder: where the residuals are kept, a `cache_folder`.
        dtype: of STORAGE.
    """

    def __init__(self, images: ImageDataset, folder: Path, dtype: torch.dtype):
        self.images, self.folder, self.dtype = images, folder, dtype

    def path(self, key: Key) -> Path:
        """Where the residual of an image is kept: named by its file, the file's size and time, crop and direction.

        Raises:
            OSError: if there is no such file.
        """
        name, draws = self.images.item(key.index).path, self.images.draws
        status = os.stat(name)
        crop = (draws.seed, key.index) if draws and draws.crops else None
        identity = (os.path.realpath(name), status.st_size, status.st_mtime_ns, crop, bool(self.images.mirrored(key)))
        return self.folder / f"{hashlib.sha256(repr(identity).encode(errors='surrogateescape')).hexdigest()[:32]}.npz"

    def holds(self, key: Key) -> bool:
        try:
            return self.path(key).exists()
        except OSError:  # reading the image will say what is wrong with it
            return False

    def write(self, key: Key, residual: Tensor) -> None:
        """Keep a residual (C_l, H_l, W_l)."""
        stored = residual.to(self.dtype)
        if not stored.isfinite().all():
            raise UserError("a residual is too large for half precision: use --cache-precision fp32")
        with atomic(self.path(key)) as file:  # a .npz, because it carries a checksum
            np.savez(file, residual=stored.cpu().contiguous().numpy())

    def __getitem__(self, key: Key) -> Sample:
        item = self.images.item(key.index)
        if not self.holds(key):  # `fill` could not read the image, which says why once more
            changed = f"{printable(item.path)} has changed since training began: --resume auto goes on"
            return Sample(key, item, None, self.images[key].error or changed)
        path = self.path(key)
        try:
            return Sample(key, item, torch.from_numpy(np.load(path)["residual"])[None])  # (1, C_l, H_l, W_l)
        except Exception as error:  # damaged: zipfile, zlib and numpy raise many kinds
            path.unlink(missing_ok=True)
            reason = f"its residual {printable(path)} is damaged and was deleted ({error}): --resume auto makes it anew"
            return Sample(key, item, None, f"{printable(item.path)}: {reason}")

    def fill(
        self,
        epoch: int,
        residual_of: Callable[[Batch], Tensor],
        watched: Callable[[Iterable[Batch], str], Iterable[Batch]],
        workers: int,
        compute: Compute,
        world: World,
    ) -> None:
        """Compute what the epoch lacks, each process a part, each image alone: so it is the same whoever asks for it.

        residual_of: a batch of one image -> its residual (1, C_l, H_l, W_l). watched: batches, those that
        could be read, with what is to be done between them.
        """
        keys = [key for index in range(len(self.images)) if not self.holds(key := Key(epoch, index))]
        barrier(world)  # all have looked before anyone writes
        if own := keys[world.rank :: world.size]:
            for batch in watched(make_loader(self.images, [[key] for key in own], workers, compute), "residuals"):
                self.write(Key(*batch.keys[0][:2]), residual_of(batch)[0])
        barrier(world)
