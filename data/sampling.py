"""Which images make up each batch: a function of seed and epoch, whatever the number of workers."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch.utils.data import Sampler

T = TypeVar("T")


class EpochBatches(Sampler):
    """Batches of one epoch, as lists of (epoch, index): a `batch_sampler` for DataLoader.

    Each global batch is dealt out among the processes: process r gets its items r, r + world_size, ... The
    last, smaller batch is kept. Where it has fewer items than there are processes, those left without one get
    its first,
    since all have to take the step: `shares` tells that it does not count.

    Args:
        size: number of images.
        batch_size: images a step, over all processes.
        seed: a number >= 0; with the epoch, fixes the order if `shuffle`.
        rank, world_size: this process among all.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.size, self.batch_size, self.seed, self.shuffle = size, batch_size, seed, shuffle
        self.rank, self.world_size = rank, world_size
        self.set_epoch(0)

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Choose the epoch and the step of it to begin with (those before it were done before a stop)."""
        self.epoch, self.first_step = epoch, first_step

    @property
    def steps(self) -> int:
        """Steps in a whole epoch."""
        return -(-self.size // self.batch_size)

    def __len__(self) -> int:
        """Steps left in this epoch."""
        return max(0, self.steps - self.first_step)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = self.epoch, self.order()
        for step in range(self.first_step, self.steps):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            own = batch[self.rank :: self.world_size] or batch[:1]
            yield [(epoch, index) for index in own]

    def order(self) -> list[int]:
        """The images in the order of this epoch."""
        if not self.shuffle:
            return list(range(self.size))
        key = np.random.SeedSequence([self.seed, self.epoch]).generate_state(1, np.uint64)
        return torch.randperm(self.size, generator=torch.Generator().manual_seed(int(key[0]))).tolist()

    def shares(self, step: int) -> tuple[int, int]:
        """How many items of step `step` (counted from the beginning of the epoch) are this process's, and of
        all.

        A mean over this process's items, times own / whole, summed over the processes, is the mean over the
        batch.
        """
        whole = max(0, min(self.batch_size, self.size - step * self.batch_size))
        return len(range(self.rank, whole, self.world_size)), whole


def shard(items: Sequence[T], rank: int, world_size: int) -> Sequence[T]:
    """This process's part of the items: a run of them, so that the parts in order of rank are the whole."""
    return items[len(items) * rank // world_size : len(items) * (rank + 1) // world_size]
