"""Random number generators whose numbers depend only on a key, such as (seed, epoch, image)."""

import numpy as np
import torch


def seeded_generator(*key: int) -> np.random.Generator:
    """Create a random number generator whose numbers depend only on the key.

    The programs use a generator of `seeded_generator` for every random choice except initial weights and dropout.
    Equal keys give equal random numbers for any number of workers and processes. A resumed run therefore draws the same
    random numbers as an uninterrupted run. Initial weights and dropout use PyTorch's own generator.

    Args:
        key: integers >= 0, such as (seed, epoch, image).
    """
    return np.random.default_rng((len(key), *key))  # without the length, (1, 2) and (1, 2, 0) would give equal numbers


def seed_torch_for_step(seed: int, epoch: int, step: int, rank: int) -> None:
    """Seed PyTorch's generator, from which dropout draws, for one training step of one process.

    With this seed, a resumed run uses the same dropout in each step as an uninterrupted run.
    """
    rng = seeded_generator(seed, epoch, step, rank, DROPOUT)
    torch.manual_seed(int(rng.integers(2**63)))


# Each constant is the last element of the keys for one kind of random choice, such as dropout.
# Keys that end with different constants give independent random numbers.
# If each image has fixed crops, the keys for crops contain 0 instead of the epoch.
PERTURB, CROP = 1, 2  # perturb or crop an image; the key is (seed, epoch, index in the dataset, PERTURB or CROP)
DEGRADE_IMAGE = 5  # degrade image i of a batch; the key is (seed, *batch.keys[i], DEGRADE_IMAGE)
DEGRADE_BATCH = 4  # choose the degradation of a batch; the key is (seed, epoch, step, DEGRADE_BATCH)
DROPOUT = 6  # seed PyTorch's generator; the key is (seed, epoch, step, rank of the process, DROPOUT)
DEGRADE_PATCH = 1  # degrade one training patch; the key is (seed, epoch, image, patch, DEGRADE_PATCH)
