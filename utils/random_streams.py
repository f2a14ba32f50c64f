"""Random number generators whose numbers depend only on a key, such as (seed, epoch, image)."""

import numpy as np
import torch


def seeded_generator(*key: int) -> np.random.Generator:
    """Create a random number generator whose numbers depend only on the key.

    The programs draw all random numbers except initial weights and dropout from generators of this function. The
    numbers therefore do not depend on the numbers of workers and processes, or on where a run was stopped and resumed.
    Initial weights and dropout use PyTorch's own generator.

    Args:
        key: integers >= 0, such as (seed, epoch, image).
    """
    return np.random.default_rng((len(key), *key))  # without the length, (1, 2) and (1, 2, 0) would give equal numbers


def seed_torch_for_step(seed: int, epoch: int, step: int, rank: int) -> None:
    """Seed PyTorch's generator, from which dropout draws, for one training step of one process.

    A resumed run therefore uses the same dropout in each step as an uninterrupted run.
    """
    rng = seeded_generator(seed, epoch, step, rank, DROPOUT)
    torch.manual_seed(int(rng.integers(2**63)))


# Each constant is the last number of some keys, and stands for one use of random numbers.
# Keys that differ only in this constant give independent random numbers.
PERTURB, CROP = 1, 2  # perturb or crop an image; the key is (seed, epoch, dataset entry, PERTURB or CROP)
DEGRADE_IMAGE = 5  # degrade one image of a batch; the key is (seed, epoch, dataset entry, crop, DEGRADE_IMAGE)
DEGRADE_BATCH = 4  # choose the degradation of a batch; the key is (seed, epoch, step, DEGRADE_BATCH)
DROPOUT = 6  # seed PyTorch's generator; the key is (seed, epoch, step, rank of the process, DROPOUT)
DEGRADE_PATCH = 1  # degrade one training patch; the key is (seed, epoch, image, patch, DEGRADE_PATCH)
