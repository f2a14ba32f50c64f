"""Random number generators whose numbers depend only on a key, such as (seed, epoch, image)."""

import numpy as np
import torch


def seeded_generator(*key: int) -> np.random.Generator:
    """Create a random number generator whose numbers depend only on the key.

    For every random choice except initial weights and dropout, the programs create a generator with this function.
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
# PERTURB and DEGRADE_PATCH may both be 1, because keys of different lengths also give independent random numbers.
# If each image has fixed crops, the keys for crops contain 0 instead of the epoch.
# In the keys, `index` is the index of an entry in the dataset.
PERTURB, CROP = 1, 2  # end of the key for perturbing or cropping an image: (seed, epoch, index, PERTURB or CROP)
DEGRADE_IMAGE = 5  # end of the key for the degradation of an image: (seed, epoch, index, 0, DEGRADE_IMAGE)
DEGRADE_BATCH = 4  # end of the key for the choice of a batch's degradation: (seed, epoch, step, DEGRADE_BATCH)
DROPOUT = 6  # end of the key for the dropout in one process: (seed, epoch, step, rank of the process, DROPOUT)
DEGRADE_PATCH = 1  # end of the key for the degradation of a patch: (seed, epoch, index, patch, DEGRADE_PATCH)
