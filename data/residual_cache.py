"""Residuals kept on disk: with RDN frozen, the residual of an image never changes, so it is computed once.

There is a file for each image and direction (a mirrored image has a residual of its own: RDN does not commute with
mirroring), named by the SHA-256 of the image's file, in a folder named by all else that the numbers depend on: weights,
stage, sizes, arithmetic, versions. A changed image, network or setting finds nothing there.

Any number of processes and runs may share one cache. Files appear whole, by renaming, and are checked when they are
read. Who writes holds a lock, which the system takes back from a process that dies.
"""

import fcntl
import hashlib
import logging
import os
import shutil
import struct
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import PIL
import torch
import torchvision
from torch import Tensor
from torch.utils.data import Dataset

from data.images import ImageDataset, Sample, mixed_sizes

logger = logging.getLogger(__name__)

FORMAT = "residual 1"  # of the files, and of how the networks round: another one has other folders
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
# Checksum of all that follows; name and settings; shape of the residual; height and width of its image; packed or not
HEADER = struct.Struct("<I32s3I2II")
PACK_BELOW = 0.9  # share of values that are not zero: below it, zeros are worth leaving out
USAGE, INCOMING = "usage", ".incoming"  # the bytes in the cache, as text, and the lock; the file being written
USAGE_DIGITS = 20
PENDING = 8  # residuals that may wait to be written


class Stored(NamedTuple):
    """A residual (C_l, H_l, W_l) as stored, and the height and width of its image."""

    residual: Tensor
    size: tuple[int, int]


class ResidualCache:
    """The residuals of one setting, in a folder that may hold those of others.

    Args:
        folder: of the cache; exists.
        about: all that a residual depends on but its image, as names and values: fingerprints of the weights, ...
        storage: "fp16" or "fp32". In half precision a value v >= 2^-14 is kept to within 2^-11 v (0.05 %), and a
            smaller one to within 2^-25, that is 1 / 130000 of a grey level.
        max_bytes: the largest size of the folder. It is never larger than what it leaves free on the disk, either.
    """

    def __init__(self, folder: Path, about: Mapping[str, object], storage: str, max_bytes: int):
        versions = {"torch": torch.__version__, "torchvision": torchvision.__version__, "Pillow": PIL.__version__}
        self.about = {"format": FORMAT, "storage": storage, **about, **versions}
        text = "".join(f"{name}: {value}\n" for name, value in sorted(self.about.items()))
        self.settings = hashlib.sha256(text.encode()).hexdigest()
        self.folder, self.home = folder, folder / self.settings[:16]
        self.dtype, self.max_bytes = DTYPES[storage], max_bytes
        self.storing = True  # until the folder is full, or cannot be written to
        self.own = self.others = 0  # bytes there at the start, under the settings of this run and under others
        self._writer: ThreadPoolExecutor | None = None
        self._pending: deque[Future] = deque()
        try:
            self.home.mkdir(exist_ok=True)
            (self.home / "settings.txt").write_text(text)  # for people
            with self._locked() as usage:
                self.own, self.others = self._sizes()
                _write_usage(usage, self.own + self.others)
        except OSError as error:
            self._give_up(error)

    def plan(self, values: Sequence[int]) -> str:
        """One line: the room that residuals of so many values each take, and whether there is as much."""
        needed = sum(HEADER.size + count * self.dtype.itemsize for count in values)
        limit = self._limit(self.own + self.others)
        room = max(0, limit - self.others)
        text = (
            f"residual cache {self.folder}: {len(values)} residuals ({self.about['storage']}) take up to"
            f" {gigabytes(needed)} ({gigabytes(self.own)} there already); room for {gigabytes(room)} (at most"
            f" {gigabytes(self.max_bytes)}, --cache-gb, and no more than is left free on the disk)"
        )
        if self.others:
            text += f", with {gigabytes(self.others)} of other settings that may be deleted"
        if needed > room:
            text += f": at least {room / needed:.0%} fit, the rest is computed again in each epoch"
        return text

    # --- reading: in any process -----------------------------------------------------------------------------

    def entry(self, path: str, mirrored: bool) -> str | None:
        """The name under which the residual of this image is kept, by its content; None if it cannot be read."""
        try:
            with open(path, "rb") as file:
                digest = hashlib.sha256(file.read()).hexdigest()
        except OSError:
            return None
        return f"{digest[:2]}/{digest}{'-mirrored' if mirrored else ''}"

    def read(self, entry: str) -> Stored | None:
        """What is kept under this name; None if there is nothing, or a file that is not whole."""
        try:
            with open(self.home / entry, "rb") as file:
                raw = bytearray(os.fstat(file.fileno()).st_size)
                if file.readinto(raw) != len(raw) or len(raw) < HEADER.size:
                    return None
        except OSError:
            return None
        checksum, digest, *shape, height, width, packed = HEADER.unpack_from(raw)
        if digest != self._digest(entry) or checksum != zlib.crc32(memoryview(raw)[4:]):
            return None
        dtype = np.float16 if self.dtype == torch.float16 else np.float32
        return Stored(torch.from_numpy(_decode(raw, shape, dtype, bool(packed))), (height, width))

    # --- writing: in the main process, beside its work -------------------------------------------------------

    def keep(self, entry: str | None, residual: Tensor, size: tuple[int, int]) -> Tensor:
        """Have a residual (C_l, H_l, W_l) written, if there is room, and give it back as it would be read (float32).

        Whether it was written makes no difference to the numbers: so a run that is continued, with the residuals it
        wrote before, goes on as if it had never been stopped.
        """
        stored = residual.to(self.dtype)
        if not stored.isfinite().all():
            return residual.float()  # too large for half precision: never stored, always as computed
        if entry is not None and self.storing:
            self._writer = self._writer or ThreadPoolExecutor(1, thread_name_prefix="residual-cache")
            while len(self._pending) >= PENDING:
                self._pending.popleft().result()
            self._pending.append(self._writer.submit(self._write, entry, stored.cpu().contiguous().numpy(), size))
        return stored.float()

    def flush(self) -> None:
        """Wait until all that was given to `keep` is written."""
        while self._pending:
            self._pending.popleft().result()

    def _write(self, entry: str, values: np.ndarray, size: tuple[int, int]) -> None:
        if not self.storing:
            return
        path, incoming = self.home / entry, self.folder / INCOMING
        content = _encode(values, size, self._digest(entry))
        try:
            path.parent.mkdir(exist_ok=True)
            with self._locked() as usage:
                used = _read_usage(usage, self._sizes) - _size(path)  # it is there if damaged, or another was faster
                total = used + sum(part.nbytes for part in content)
                if total > self._limit(used):
                    self.storing = False
                    return
                with open(incoming, "wb") as file:
                    for part in content:
                        file.write(part)
                os.replace(incoming, path)
                _write_usage(usage, total)
        except OSError as error:
            with suppress(OSError):
                incoming.unlink(missing_ok=True)
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        if self.storing:
            self.storing = False
            text = "warning: cannot write to the residual cache %s (%s): what it lacks is computed again in each epoch"
            logger.warning(text, self.folder, error.strerror or error)

    def _digest(self, entry: str) -> bytes:
        return hashlib.sha256(f"{self.settings} {entry}".encode()).digest()

    def _limit(self, used: int) -> int:
        """The bytes the cache may have when it has `used`."""
        return min(self.max_bytes, (used + shutil.disk_usage(self.folder).free) // 2)

    def _sizes(self) -> tuple[int, int]:
        """Bytes of the residuals kept under the settings of this run, and under all others."""
        own = others = 0
        for home in self.folder.iterdir():
            size = sum(_size(path) for path in home.glob("??/*"))
            own, others = (own + size, others) if home == self.home else (own, others + size)
        return own, others

    @contextmanager
    def _locked(self) -> Iterator[BinaryIO]:
        """The file of the usage, while no other process or thread writes."""
        with open(os.open(self.folder / USAGE, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _read_usage(file: BinaryIO, count: Callable[[], tuple[int, int]]) -> int:
    """The bytes in the cache: as noted, or counted if the note is not whole."""
    file.seek(0)
    text = file.read(USAGE_DIGITS)
    return int(text) if len(text) == USAGE_DIGITS and text.isdigit() else sum(count())


def _write_usage(file: BinaryIO, total: int) -> None:
    file.seek(0)
    file.write(f"{total:0{USAGE_DIGITS}}".encode())


def _encode(values: np.ndarray, size: tuple[int, int], digest: bytes) -> list[memoryview]:
    """The parts of a file. values: (C_l, H_l, W_l); size: height and width of the image."""
    flat = values.reshape(-1)
    used = flat != 0
    packed = bool(used.mean() < PACK_BELOW)
    parts = [np.packbits(used), flat[used]] if packed else [flat]
    payload = [memoryview(part).cast("B") for part in parts if part.size]
    header = bytearray(HEADER.pack(0, digest, *values.shape, *size, packed))
    checksum = zlib.crc32(memoryview(header)[4:])
    for part in payload:
        checksum = zlib.crc32(part, checksum)
    struct.pack_into("<I", header, 0, checksum)
    return [memoryview(header), *payload]


def _decode(raw: bytearray, shape: Sequence[int], dtype: type, packed: bool) -> np.ndarray:
    """The residual (C_l, H_l, W_l) in a file."""
    if not packed:
        return np.frombuffer(raw, dtype, offset=HEADER.size).reshape(shape)
    count = int(np.prod(shape))
    bits = -(-count // 8)
    used = np.unpackbits(np.frombuffer(raw, np.uint8, bits, HEADER.size), count=count).view(bool)
    values = np.zeros(count, dtype)
    values[used] = np.frombuffer(raw, dtype, offset=HEADER.size + bits)
    return values.reshape(shape)


def gigabytes(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


# --- batches ----------------------------------------------------------------------------------------------------


class CachedSample(NamedTuple):
    """An item: its residual, or where there is none, its image in `sample` and the name to keep its residual under."""

    sample: Sample
    entry: str | None
    stored: Stored | None = None


class CachedBatch(NamedTuple):
    """As `data.images.Batch`, but for the items whose residual could be read: they have no image."""

    images: Tensor  # uint8 (M, 3, H, W), of the M items that lack their residual
    labels: Tensor  # int64 (B,): FAKE or REAL
    indices: list[int]  # which items they are
    errors: dict[int, str]
    mismatch: str | None  # one line if the sizes differ; `images` and `residuals` are empty then
    residuals: Tensor  # (B - M, C_l, H_l, W_l), as stored
    is_read: list[bool]  # of each of the B items: whether its residual is in `residuals`
    entries: list[str | None]  # names to keep the M residuals under


class CachedImages(Dataset):
    """The items of `images`, as residuals where the cache has them: then no image is decoded.

    Raises:
        ValueError: if the images differ from epoch to epoch by more than being mirrored.
    """

    def __init__(self, images: ImageDataset, cache: ResidualCache):
        if images.transform is not None or (images.policy.random_crop and images.policy.crop_size is not None):
            raise ValueError("images that change from epoch to epoch were given: the residuals of these change, too")
        self.images, self.cache = images, cache

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> CachedSample:
        item, mirrored = self.images.items[key[1]], self.images.mirrored(*key)
        entry = self.cache.entry(item.path, mirrored)
        stored = entry and self.cache.read(entry)
        if stored:
            return CachedSample(Sample(key[1], item.path, item.label, None), entry, stored)
        sample = self.images[key]
        unchanged = entry == self.cache.entry(item.path, mirrored)  # since its content was looked at
        return CachedSample(sample, entry if unchanged else None)


def collate_cached(samples: Sequence[CachedSample]) -> CachedBatch:
    """Stack the residuals that were read, and the images of the others."""
    errors = {s.sample.index: s.sample.error for s in samples if s.sample.error}
    good = [s for s in samples if not s.sample.error]
    read, missing = [s for s in good if s.stored], [s for s in good if not s.stored]
    sizes = [s.stored.size if s.stored else tuple(s.sample.image.shape[-2:]) for s in good]
    mismatch = mixed_sizes([s.sample.path for s in good], sizes)
    images, residuals = torch.empty(0, 3, 0, 0, dtype=torch.uint8), torch.empty(0, 0, 0, 0)
    if missing and not mismatch:
        images = torch.stack([s.sample.image for s in missing])  # (M, 3, H, W)
    if read and not mismatch:
        residuals = torch.stack([s.stored.residual for s in read])  # (B - M, C_l, H_l, W_l)
    labels = torch.tensor([s.sample.label for s in good], dtype=torch.int64)  # (B,)
    indices, is_read = [s.sample.index for s in good], [s.stored is not None for s in good]
    return CachedBatch(images, labels, indices, errors, mismatch, residuals, is_read, [s.entry for s in missing])
