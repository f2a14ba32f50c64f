"""Datasets, batches and data loaders.

For each `Key` that an `EpochBatchSampler` yields, a dataset returns a `Sample`, and `collate_samples` combines samples
into a `Batch`. The random choices for a dataset entry depend only on the seed, the epoch and the index of the entry, so
that a resumed run makes the same random choices as an uninterrupted run.
"""

import atexit
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from data.images import (
    Header,
    SizePolicy,
    compute_centre_crop_box,
    compute_size_after_resize_and_crop,
    describe_size_problem,
    read_image_as_pillow_rgb,
    read_image_as_tensor,
    resize_and_crop,
)
from data.lists import Item
from utils.compute import Compute
from utils.console import make_printable
from utils.distributed import World
from utils.errors import UserError, describe_exception
from utils.random_streams import CROP, PERTURB, seeded_generator

UNLABELLED = -1  # value in Batch.labels for an image whose label is unknown
GRACE = 10  # seconds for which a worker runs after SIGTERM, so that the main process can finish and save its step
SHARED_MEMORY = "/dev/shm"  # folder of the shared memory that PyTorch workers use to send tensors on Linux
PREFETCHED = 2  # number of batches that each worker loads in advance (prefetch_factor)
Transform = Callable[[Tensor, np.random.Generator | None], Tensor]  # (image, generator) -> image, both uint8 (3, H, W)


class Key(NamedTuple):
    """A `Key` tells a dataset which entry to read, and for which epoch."""

    epoch: int
    index: int  # index of the entry in the dataset
    weight: float = 1.0  # weight of the entry in the loss; 0 for a duplicate that `EpochBatchSampler` adds


class RowKey(NamedTuple):
    """A `RowKey` says from which dataset entry a row of a batch was read, and for which epoch."""

    epoch: int
    index: int  # index of the entry in the dataset
    part: int  # index of the row in `Sample.x`, such as the index of a patch


class Sample(NamedTuple):
    """The result of reading one dataset entry: K tensors made from one image, or an error message."""

    key: Key
    item: Item
    x: Tensor | None  # (K, ...): K patches, or one image or residual (K = 1); None if the image cannot be used
    error: str | None = None  # one-line message that says why the image cannot be used


class Batch(NamedTuple):
    """A batch of B images, patches or residuals of equal shape.

    The tensors `x`, `labels` and `weights` have no row for an image that could not be used.
    """

    x: Tensor  # B images or patches, uint8 (B, 3, H, W), or B residuals, float (B, channels, height, width)
    labels: Tensor  # int64 (B,): FAKE, REAL or UNLABELLED
    weights: Tensor  # float32 (B,): factor by which the loss of each row is multiplied
    items: list[Item]  # for each row of x: path, label and generator name of its image
    keys: list[RowKey]  # one `RowKey` for each row of x
    errors: dict[int, str]  # dataset index of each image that could not be used -> one-line error message


# --- batches ------------------------------------------------------------------------------------------------


def collate_samples(samples: Sequence[Sample]) -> Batch:
    """Combine samples into a batch.

    If a sample has tensors of another shape than the first readable sample, the batch contains an error message instead
    of these tensors.
    """
    errors = {}
    rows, labels, weights, items, keys = [], [], [], [], []
    first = None  # the first readable sample
    for sample in samples:
        epoch, index, weight = sample.key
        if sample.error:
            errors[index] = sample.error
            continue
        first = first or sample
        if sample.x.shape[1:] != first.x.shape[1:]:
            errors[index] = _describe_unequal_image_sizes(first, sample)
            continue
        for part, row in enumerate(sample.x):
            rows.append(row)
            labels.append(UNLABELLED if sample.item.label is None else sample.item.label)
            weights.append(weight / len(sample.x))
            items.append(sample.item)
            keys.append(RowKey(epoch, index, part))
    x = torch.stack(rows) if rows else torch.empty(0, 3, 0, 0, dtype=torch.uint8)
    return Batch(x, torch.tensor(labels, dtype=torch.int64), torch.tensor(weights), items, keys, errors)


def _describe_unequal_image_sizes(first: Sample, other: Sample) -> str:
    names = [f"{make_printable(s.item.path)} ({s.x.shape[-1]} x {s.x.shape[-2]})" for s in (first, other)]
    return f"images of different sizes cannot be in one batch: {names[0]} and {names[1]}"


def merge_batches_of_equal_image_size(batches: Iterable[Batch], block: int, pixels: float) -> Iterator[Batch]:
    """Merge consecutive one-image batches if their images have equal size.

    Only images in the same block of the dataset are merged, so that batches do not depend on the number of processes.
    The last bits of the scores of an image can depend on the size of its batch.

    Args:
        block: number of consecutive images in a block.
        pixels: maximum number of pixels in a merged batch.
    """
    waiting = []
    for batch in batches:
        if waiting and not _can_merge_batch(waiting, batch, block, pixels):
            yield concatenate_batches(waiting)
            waiting = []
        # Copy the tensors, because each tensor from a worker keeps a file open until the tensor is deleted
        copies = {name: getattr(batch, name).clone() for name in ("x", "labels", "weights")}
        waiting.append(batch._replace(**copies))
    if waiting:
        yield concatenate_batches(waiting)


def _can_merge_batch(waiting: Sequence[Batch], batch: Batch, block: int, pixels: float) -> bool:
    """Return whether `batch` can be merged with `waiting`, a list of batches that will become one batch."""
    if _get_first_dataset_index_of_batch(batch) // block != _get_first_dataset_index_of_batch(waiting[-1]) // block:
        return False
    images = [b.x for b in (*waiting, batch) if len(b.x)]
    if len(images) < 2:
        return True
    height, width = images[0].shape[-2:]
    return images[0].shape == images[-1].shape and len(images) * height * width <= pixels


def _get_first_dataset_index_of_batch(batch: Batch) -> int:
    """Return the dataset index of the first readable image in a batch, or else of the first unreadable image."""
    if batch.keys:
        return batch.keys[0].index
    return next(iter(batch.errors))


def concatenate_batches(batches: Sequence[Batch]) -> Batch:
    """Concatenate batches of images of equal size.

    A batch in which no image could be read contributes only its error messages.
    """
    readable = [batch for batch in batches if len(batch.x)] or batches[:1]
    items, keys, errors = [], [], {}
    for batch in readable:
        items += batch.items
        keys += batch.keys
    for batch in batches:
        errors.update(batch.errors)
    return Batch(
        x=torch.cat([batch.x for batch in readable]),
        labels=torch.cat([batch.labels for batch in readable]),
        weights=torch.cat([batch.weights for batch in readable]),
        items=items,
        keys=keys,
        errors=errors,
    )


class EpochBatchSampler(Sampler):
    """A `batch_sampler` for DataLoader that yields a list of `Key`s for each batch of one epoch.

    In a run with n processes, the process of rank r gets the entries `batch[r::n]` of each batch. If a batch has fewer
    entries than there are processes, each process without an entry gets the first entry of the batch with weight 0,
    because all processes must take the same number of steps.

    Args:
        count: number of entries in the dataset.
        batch_size: number of entries per step, summed over all processes.
        seed: random seed for shuffling the entries in each epoch, or None to keep the order of the dataset.
    """

    def __init__(self, count: int, batch_size: int, seed: int | None = None, world: World = World()):  # noqa: B008
        self.count = count
        self.batch_size = batch_size
        self.seed = seed
        self.world = world
        self.steps = -(-count // batch_size)  # number of batches per epoch: count / batch_size, rounded up
        self.set_epoch(0)

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Set the epoch for which the sampler yields batches.

        Args:
            first_step: number of steps of the epoch that a resumed run skips.
        """
        self.epoch = epoch
        self.first_step = first_step

    def __len__(self) -> int:
        """Return the number of steps left in the epoch."""
        return max(0, self.steps - self.first_step)

    def __iter__(self) -> Iterator[list[Key]]:
        order = np.arange(self.count)
        if self.seed is not None:
            order = seeded_generator(self.seed, self.epoch).permutation(self.count)
        for step in range(self.first_step, self.steps):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size].tolist()
            own_entries = batch[self.world.rank :: self.world.size]
            if own_entries:
                yield [Key(self.epoch, index, 1 / len(batch)) for index in own_entries]
            else:
                yield [Key(self.epoch, batch[0], 0.0)]

    def compute_smallest_batch_size_of_any_process(self) -> int:
        """Return the smallest number of entries that any process gets in any step of an epoch."""
        last = self.count - (self.steps - 1) * self.batch_size
        return max(min(self.batch_size, last) // self.world.size, 1)


# --- datasets -----------------------------------------------------------------------------------------------


class ItemDataset(Dataset):
    """A dataset that has `entries_per_image` entries for each image.

    For an image that cannot be read, the dataset returns a `Sample` with an error message, because an exception in a
    worker would end the program with a traceback.
    """

    def __init__(self, items: Sequence[Item], entries_per_image: int = 1):
        self.items = items
        self.entries_per_image = entries_per_image

    def __len__(self) -> int:
        return len(self.items) * self.entries_per_image

    def get_image_item_of_dataset_index(self, index: int) -> Item:
        """Return the image file from which the dataset entry with the given index is made."""
        return self.items[index // self.entries_per_image]

    def __getitem__(self, key: Key) -> Sample:
        item = self.get_image_item_of_dataset_index(key.index)
        name = make_printable(item.path)
        try:
            return Sample(key, item, self.read_sample_tensors(item.path, key))
        except UserError as error:
            text = str(error)
        except (OSError, ValueError, RuntimeError, MemoryError) as error:  # raised by Pillow, NumPy or PyTorch
            text = f"cannot be prepared ({type(error).__name__}: {make_printable(describe_exception(error))})"
        return Sample(key, item, None, text if text.startswith(name) else f"{name}: {text}")

    def read_sample_tensors(self, path: str, key: Key) -> Tensor:
        """Read an image file, make K tensors of equal shape from it, and stack them into one tensor (K, ...).

        Subclasses must implement this method.

        Raises:
            UserError: if the image cannot be decoded or has an unsuitable size.
        """
        raise NotImplementedError


class Augmentation(NamedTuple):
    """Settings of the random mirroring and cropping of training images."""

    seed: int
    crops: int = 0  # number of fixed crops per image, or 0 for one crop at a new random position in each epoch


class ImageDataset(ItemDataset):
    """A dataset of images, which are resized and cropped according to a `SizePolicy`.

    Args:
        augmentation: settings of random mirroring and cropping, or None for centre crops without mirroring.
        transform: function that changes an image before resizing and cropping; without `augmentation`, `transform`
            gets None instead of a random generator.
        headers: the header of each image, or an empty sequence if the headers were not read.
    """

    def __init__(
        self,
        items: Sequence[Item],
        policy: SizePolicy,
        augmentation: Augmentation | None = None,
        transform: Transform | None = None,
        headers: Sequence[Header] = (),
    ):
        super().__init__(items, entries_per_image=max(augmentation.crops, 1) if augmentation else 1)
        self.policy = policy
        self.augmentation = augmentation
        self.transform = transform
        self.headers = headers

    def read_sample_tensors(self, path: str, key: Key) -> Tensor:
        """Read an image, apply `self.transform`, resize, crop and mirror it, and return it as uint8 (1, 3, H, W)."""
        image = read_image_as_tensor(path)  # (3, H, W)
        if self.transform is not None:
            image = self.transform(image, self._create_random_generator(key.epoch, key.index, PERTURB))
        crop_epoch = key.epoch if self.crops_change_each_epoch else 0
        image = resize_and_crop(image, self.policy, self._create_random_generator(crop_epoch, key.index, CROP))
        if self.is_mirrored(key):
            image = image.flip(-1)
        return image[None]

    def _create_random_generator(self, *key: int) -> np.random.Generator | None:
        if self.augmentation is None:
            return None
        return seeded_generator(self.augmentation.seed, *key)

    @property
    def image_sizes(self) -> list[tuple[int, int]]:
        """The (height, width) of each image after resizing and cropping; empty if the headers were not read."""
        return [compute_size_after_resize_and_crop(*header.size, self.policy) for header in self.headers]

    @property
    def crops_change_each_epoch(self) -> bool:
        """True if the images are cropped at new random positions in each epoch."""
        return self.augmentation is not None and self.policy.crop_size is not None and not self.augmentation.crops

    def is_mirrored(self, key: Key) -> bool:
        """Return whether augmentation flips the image that `key` names from left to right."""
        rng = self._create_random_generator(key.epoch, key.index)
        return rng is not None and rng.random() < 0.5


class PatchDataset(ItemDataset):
    """A dataset that cuts K random patches from each high-resolution image.

    A patch is flipped horizontally, flipped vertically and rotated by 90 degrees, each with probability 0.5, as in
    yjn870/RDN-pytorch (MIT licence).

    Args:
        patch_size: side of a patch in low-resolution pixels.
    """

    def __init__(self, items: Sequence[Item], patch_size: int, scale: int, patches_per_image: int = 1, seed: int = 0):
        super().__init__(items)
        self.patch_size = patch_size
        self.scale = scale
        self.patches_per_image = patches_per_image
        self.seed = seed

    def read_sample_tensors(self, path: str, key: Key) -> Tensor:
        """Read an image and cut out K random patches, uint8 (K, 3, P, P) with P = patch_size * scale."""
        image = read_image_as_pillow_rgb(path)
        policy = SizePolicy(self.scale, crop_size=self.patch_size * self.scale)
        problem = describe_size_problem(image.height, image.width, policy)
        if problem:
            raise UserError(problem)
        rng = seeded_generator(self.seed, key.epoch, key.index)
        patches = [cut_random_patch(image, self.patch_size, self.scale, rng) for _ in range(self.patches_per_image)]
        return torch.from_numpy(np.stack(patches))


def cut_random_patch(image: Image.Image, patch_size: int, scale: int, rng: np.random.Generator) -> np.ndarray:
    """Cut a random patch out of an image, then flip and rotate the patch at random.

    In the largest centred box whose sides are multiples of `scale`, the row and the column of the patch's top left
    pixel are multiples of `scale`.

    Returns:
        the patch, uint8 (3, P, P) with P = patch_size * scale.
    """
    top, left, height, width = compute_centre_crop_box(image.height, image.width, scale)
    side = patch_size * scale
    top += scale * int(rng.integers((height - side) // scale + 1))
    left += scale * int(rng.integers((width - side) // scale + 1))
    flip_horizontal, flip_vertical, rotate = rng.random(3) < 0.5
    patch = np.asarray(image.crop((left, top, left + side, top + side)))  # (P, P, 3)
    if flip_vertical:
        patch = patch[::-1]
    if flip_horizontal:
        patch = patch[:, ::-1]
    if rotate:
        patch = np.rot90(patch)
    return np.ascontiguousarray(patch.transpose(2, 0, 1))  # (3, P, P)


# --- the loader ---------------------------------------------------------------------------------------------


class BatchLoader(DataLoader):
    """A DataLoader that yields `Batch`es of tensors, even if a worker sends a batch as NumPy arrays."""

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            if isinstance(batch.x, np.ndarray):
                batch = _apply_to_batch_tensors(batch, torch.from_numpy)
            yield batch


def make_loader(dataset: Dataset, batches: Sampler | Sequence[list[Key]], workers: int, compute: Compute) -> DataLoader:
    """Create a DataLoader that reads the given batches of a dataset.

    Args:
        workers: number of processes that read images, at most one per CPU core, or 0 to read images in the main
            process.
    """
    workers = min(workers, os.cpu_count() or 1)
    if workers:
        atexit.register(_end_loader_workers_at_exit)
    return BatchLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=_collate_for_main_process,
        num_workers=workers,
        prefetch_factor=PREFETCHED if workers else None,
        pin_memory=compute.device.type == "cuda",
        persistent_workers=workers > 0,
        worker_init_fn=_set_worker_signal_handlers_and_threads,
        multiprocessing_context="fork" if workers else None,
    )


def _collate_for_main_process(samples: Sequence[Sample]) -> Batch:
    """Combine samples into a batch that a worker can send to the main process.

    Batches that may not fit into shared memory, of which a Docker container has only 64 MB by default, are converted to
    NumPy arrays and sent through a pipe. If tensors did not fit into shared memory, the main process would wait forever
    for the batch.
    """
    batch = collate_samples(samples)
    worker = get_worker_info()
    if worker is None or _batches_fit_in_shared_memory(batch.x.nbytes, worker.num_workers):
        return batch
    return _apply_to_batch_tensors(batch, Tensor.numpy)


def _batches_fit_in_shared_memory(size: int, workers: int) -> bool:
    """Return whether shared memory has space for all batches, of `size` bytes each, that the workers may store."""
    try:
        free = shutil.disk_usage(SHARED_MEMORY).free
    except OSError:  # the folder /dev/shm does not exist
        return False
    return free > workers * (PREFETCHED + 1) * (size + 2**20)


def _apply_to_batch_tensors(batch: Batch, function: Callable) -> Batch:
    """Call `function` on each of the tensors `x`, `labels` and `weights` of a batch, and return the new batch."""
    return batch._replace(x=function(batch.x), labels=function(batch.labels), weights=function(batch.weights))


def _set_worker_signal_handlers_and_threads(_: int) -> None:
    """Set the signal handlers and the number of threads of a worker process.

    If a signal ended a worker at once, the DataLoader would raise an exception in the main process before the main
    process could save the state of the run. A worker must not ignore SIGTERM, because `multiprocessing` ends its
    workers with SIGTERM.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))
    signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
    torch.set_num_threads(1)


def _end_loader_workers_at_exit() -> None:
    """End all running workers at once with SIGALRM, because SIGTERM would end them only after GRACE seconds."""
    for process in multiprocessing.active_children():
        if process.daemon:
            os.kill(process.pid, signal.SIGALRM)
