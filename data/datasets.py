"""Batches: which images in what order, how each is read, and the loader. One kind of batch for all that is trained on.

What is random depends on (seed, epoch, image) alone: not on workers, processes, or where a run was stopped.
"""

import atexit
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from data.images import (
    Header,
    SizePolicy,
    load_image,
    multiple_box,
    read_rgb,
    resize_and_crop,
    size_after,
    size_problem,
)
from data.lists import Item
from utils.compute import Compute
from utils.console import printable
from utils.distributed import World
from utils.errors import UserError
from utils.random_streams import CROP, PERTURB, seeded_generator

UNLABELLED = -1  # in Batch.labels
GRACE = 10  # seconds for which a worker outlives SIGTERM, so that the step being made can be finished and saved
Transform = Callable[[Tensor, np.random.Generator | None], Tensor]  # of uint8 (3, H, W)


class Key(NamedTuple):
    """What a sampler asks a dataset for."""

    epoch: int
    index: int  # of the entry in its dataset
    weight: float = 1.0  # of the entry in the mean over its batch: 1 / batch size; 0 for one that only fills a share


class Sample(NamedTuple):
    """What a dataset gives for a key: K parts of one image, or `error`, one line."""

    key: Key
    item: Item
    x: Tensor | None  # (K, ...): uint8 images or patches, or float residuals
    error: str | None = None


class Batch(NamedTuple):
    """B rows of one shape; the images that could not be read are in `errors` alone."""

    x: Tensor  # uint8 (B, 3, H, W) of 0..255, or residuals (B, C_l, H_l, W_l)
    labels: Tensor  # int64 (B,): FAKE, REAL or UNLABELLED
    weights: Tensor  # float32 (B,): a sum over rows and processes, so weighted, is the mean over the batch
    items: list[Item]  # of each row
    keys: list[tuple[int, int, int]]  # of each row: epoch, index, which of its K parts
    errors: dict[int, str]  # index -> one line


def collate(samples: Sequence[Sample]) -> Batch:
    """One batch of the samples. Those of another shape than the first are errors."""
    errors = {s.key.index: s.error for s in samples if s.error}
    read = [s for s in samples if not s.error]
    for s in [s for s in read if s.x.shape[1:] != read[0].x.shape[1:]]:
        sizes = (f"{printable(t.item.path)} ({t.x.shape[-1]} x {t.x.shape[-2]})" for t in (read[0], s))
        errors[s.key.index] = f"images of different sizes cannot share a batch: {' and '.join(sizes)}"
    parts = [(s, k) for s in read if s.key.index not in errors for k in range(len(s.x))]
    return Batch(
        x=torch.stack([s.x[k] for s, k in parts]) if parts else torch.empty(0, 3, 0, 0, dtype=torch.uint8),
        labels=torch.tensor(
            [UNLABELLED if s.item.label is None else s.item.label for s, _ in parts], dtype=torch.int64
        ),
        weights=torch.tensor([s.key.weight / len(s.x) for s, _ in parts]),
        items=[s.item for s, _ in parts],
        keys=[(s.key.epoch, s.key.index, k) for s, k in parts],
        errors=errors,
    )


def merge_equal_sizes(batches: Iterable[Batch], block: int, pixels: float) -> Iterator[Batch]:
    """Batches of one image each, joined while they follow each other, are of one size and of one block of their list.

    So what an image is computed together with depends neither on the number of processes nor on where a run was
    stopped, and its scores are the same to the last bit.

    Args:
        block: images. pixels: the most in a batch of more than one image.
    """
    waiting: list[Batch] = []
    place = 0  # the block of those that wait
    for batch in batches:
        index = batch.keys[0][1] if batch.keys else next(iter(batch.errors))
        read = [b.x for b in (*waiting, batch) if len(b.x)]
        fits = len(read) < 2 or (read[0].shape == read[-1].shape and len(read) * read[0][0, 0].numel() <= pixels)
        if waiting and not (fits and index // block == place):
            yield concatenate_batches(waiting)
            waiting = []
        place = index // block
        # A tensor from a worker holds an open file for as long as it lives, and many may wait
        waiting.append(batch._replace(x=batch.x.clone(), labels=batch.labels.clone(), weights=batch.weights.clone()))
    if waiting:
        yield concatenate_batches(waiting)


def concatenate_batches(batches: Sequence[Batch]) -> Batch:
    """Batches of one shape as one."""
    x, labels, weights, items, keys, _ = zip(*([b for b in batches if len(b.x)] or batches[:1]), strict=True)
    errors = {index: text for batch in batches for index, text in batch.errors.items()}
    return Batch(torch.cat(x), torch.cat(labels), torch.cat(weights), sum(items, []), sum(keys, []), errors)


class EpochBatches(Sampler):
    """Batches of one epoch, as lists of keys: a `batch_sampler` for DataLoader.

    Each batch is dealt out among the processes: process r gets its entries r, r + size, ... The last, smaller batch is
    kept. Where it has fewer entries than there are processes, those left without one get its first, of weight 0, since
    all have to take the step.

    Args:
        count: number of entries of the dataset.
        batch_size: entries a step, over all processes.
        seed: a number >= 0, which with the epoch fixes the order; None: as listed.
    """

    def __init__(self, count: int, batch_size: int, seed: int | None = None, world: World = World()):  # noqa: B008
        self.count, self.batch_size, self.seed, self.world = count, batch_size, seed, world
        self.steps = -(-count // batch_size)  # of a whole epoch
        self.set_epoch(0)

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Choose the epoch and the step of it to begin with (those before it were done before a stop)."""
        self.epoch, self.first_step = epoch, first_step

    def __len__(self) -> int:
        """Steps left in this epoch."""
        return max(0, self.steps - self.first_step)

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, order = self.epoch, np.arange(self.count)
        if self.seed is not None:
            order = seeded_generator(self.seed, epoch).permutation(self.count)
        for step in range(self.first_step, self.steps):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size].tolist()
            own = batch[self.world.rank :: self.world.size]
            yield [Key(epoch, index, 1 / len(batch)) for index in own] or [Key(epoch, batch[0], 0.0)]

    def smallest_share(self) -> int:
        """The fewest entries any process has in any step."""
        last = self.count - (self.steps - 1) * self.batch_size
        return max(min(self.batch_size, last) // self.world.size, 1)


# --- how each image is read ---------------------------------------------------------------------------------


class ItemDataset(Dataset):
    """Entries made of images, `parts` of each item one after the other. What is wrong with one is in its sample.

    It is not raised: of an error in a worker DataLoader would make a traceback.
    """

    def __init__(self, items: Sequence[Item], parts: int = 1):
        self.items, self.parts = items, parts

    def __len__(self) -> int:
        return len(self.items) * self.parts

    def item(self, index: int) -> Item:
        return self.items[index // self.parts]

    def __getitem__(self, key: Key) -> Sample:
        item = self.item(key.index)
        try:
            return Sample(key, item, self.read(item.path, key))
        except UserError as error:
            name, text = printable(item.path), str(error)
            return Sample(key, item, None, text if text.startswith(name) else f"{name}: {text}")

    def read(self, path: str, key: Key) -> Tensor:
        """(K, ...), or a UserError."""
        raise NotImplementedError


class Draws(NamedTuple):
    """What is drawn in training."""

    seed: int
    crops: int = 0  # fixed crops of each image, all of them used in every epoch; 0: one, anew in each epoch


class ImageDataset(ItemDataset):
    """Images of one size policy: mirrored and cropped at random in training, as they are or the centre in tests.

    Args:
        draws: None: nothing is random.
        transform: called as transform(image, rng) with the uint8 (3, H, W) image as read, before it is fitted.
    """

    def __init__(
        self, items: Sequence[Item], policy: SizePolicy, draws: Draws | None = None, transform: Transform | None = None
    ):
        super().__init__(items, max(draws.crops, 1) if draws else 1)
        self.policy, self.draws, self.transform = policy, draws, transform
        self.headers: Sequence[Header] = ()  # of each item, where they are known

    def read(self, path: str, key: Key) -> Tensor:
        """(1, 3, H, W)."""
        image = load_image(path)  # (3, H, W)
        if self.transform is not None:
            rng = self.draws and seeded_generator(self.draws.seed, key.epoch, key.index, PERTURB)
            image = self.transform(image, rng)
        epoch = key.epoch if self.drawn_anew else 0
        image = resize_and_crop(image, self.policy, self.draws and seeded_generator(self.draws.seed, epoch, key.index, CROP))
        return (image.flip(-1) if self.mirrored(key) else image)[None]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each item as given, where headers are known."""
        return [size_after(*header.size, self.policy) for header in self.headers]

    @property
    def drawn_anew(self) -> bool:
        """Whether an image is cropped elsewhere in each epoch."""
        return self.draws is not None and self.policy.crop_size is not None and not self.draws.crops

    def mirrored(self, key: Key) -> bool:
        """Whether an image is mirrored in an epoch; known without reading it."""
        return self.draws is not None and seeded_generator(self.draws.seed, key.epoch, key.index).random() < 0.5


class PatchDataset(ItemDataset):
    """K random HR patches of each image, `patch_size * scale` pixels, mirrored and turned.

    A patch begins at a multiple of `scale` of the image centre-cropped to a multiple of it, so that it is downsampled
    to the very pixels that the whole image would be downsampled to. Horizontal flip, vertical flip and rotation by 90
    degrees have probability 0.5 each (He et al.; the same as in yjn870/RDN-pytorch, MIT).

    Args:
        patch_size: side of a patch in LR pixels.
        patches_per_image: K, taken from an image once it is decoded.
    """

    def __init__(self, items: Sequence[Item], patch_size: int, scale: int, patches_per_image: int = 1, seed: int = 0):
        super().__init__(items)
        self.patch_size, self.scale = patch_size, scale
        self.patches_per_image, self.seed = patches_per_image, seed

    def read(self, path: str, key: Key) -> Tensor:
        """(K, 3, P, P)."""
        image = read_rgb(path)
        policy = SizePolicy(self.scale, crop_size=self.patch_size * self.scale)
        if problem := size_problem(image.height, image.width, policy):
            raise UserError(problem)
        rng = seeded_generator(self.seed, key.epoch, key.index)
        patches = [random_patch(image, self.patch_size, self.scale, rng) for _ in range(self.patches_per_image)]
        return torch.from_numpy(np.stack(patches))


def random_patch(image: Image.Image, patch_size: int, scale: int, rng: np.random.Generator) -> np.ndarray:
    """One aligned patch, flipped and turned at random: uint8 (3, P, P), P = patch_size * scale."""
    top, left, height, width = multiple_box(image.height, image.width, scale)
    side = patch_size * scale
    top += scale * int(rng.integers((height - side) // scale + 1))
    left += scale * int(rng.integers((width - side) // scale + 1))
    flip_horizontal, flip_vertical, turn = rng.random(3) < 0.5
    patch = np.asarray(image.crop((left, top, left + side, top + side)))  # (P, P, 3)
    patch = patch[:: -1 if flip_vertical else 1, :: -1 if flip_horizontal else 1]
    patch = np.rot90(patch) if turn else patch
    return np.ascontiguousarray(patch.transpose(2, 0, 1))  # (3, P, P)


# --- the loader ---------------------------------------------------------------------------------------------


def make_loader(dataset: Dataset, batches: Sampler | Sequence[list[Key]], workers: int, compute: Compute) -> DataLoader:
    """Read `batches` (lists of keys) of `dataset` a few batches ahead, in `workers` processes.

    At most one for each core: what is read does not depend on their number.
    """
    workers = min(workers, os.cpu_count() or 1)
    if workers:
        atexit.register(_end_workers)
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=compute.device.type == "cuda",
        persistent_workers=workers > 0,
        worker_init_fn=_start_worker,
        multiprocessing_context="fork" if workers else None,
    )


def _start_worker(_: int) -> None:
    """The main process decides when to stop; one thread each, since there are several workers.

    Who stops a program often signals all of its processes. A worker that died of that would take the main process with
    it before its state is saved; one that stayed for ever would keep it from ending (as SIGTERM is to at its end).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))
    signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
    torch.set_num_threads(1)


def _end_workers() -> None:
    """At the end of a program that has failed, whose workers are still there: not after GRACE, but now."""
    for process in multiprocessing.active_children():
        if process.daemon:
            os.kill(process.pid, signal.SIGALRM)
