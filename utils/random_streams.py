"""Random number generators whose numbers depend only on a key, such as (seed, epoch, image)."""

import numpy as np
import torch


def seeded_generator(*key: int) -> np.random.Generator:
    """Create a random number generator whose numbers depend only on the key.

    Equal keys give equal random numbers for any number of workers and processes, and in a resumed run.

    Args:
        key: integers >= 0, such as (seed, epoch, image).
    """
    return np.random.default_rng((len(key), *key))  # without the length, (1, 2) and (1, 2, 0) would give equal numbers


def seed_torch_for_step(seed: int, epoch: int, step: int, rank: int) -> None:
    """Seed PyTorch's generator, from which dropout draws, for one training step of one process."""
    rng = seeded_generator(seed, epoch, step, rank, DROPOUT)
    torch.manual_seed(int(rng.integers(2**63)))


# Each constant is the last element of the keys for one kind of random choice, such as dropout.
# PERTURB and DEGRADE_PATCH may both be 1, because keys of different lengths give independent random numbers.
# If an image gets the same crops in every epoch, the keys that end with CROP contain 0 instead of the epoch.
# In the keys, `part` is the number of a patch in its image, or 0 if the image is not cut into patches.
PERTURB, CROP = 1, 2  # last argument of seeded_generator(seed, epoch, index, ...) for perturbing or cropping an image
DEGRADE_IMAGE = 5  # last argument of seeded_generator(seed, epoch, index, part, ...) for degrading an image
DEGRADE_BATCH = 4  # last argument of seeded_generator(seed, epoch, step, ...) for choosing a batch's degradation
DROPOUT = 6  # last argument of seeded_generator(seed, epoch, step, rank, ...) for the dropout in one process
DEGRADE_PATCH = 1  # last argument of seeded_generator(seed, epoch, index, part, ...) for degrading a patch
