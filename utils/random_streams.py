"""Random number generators whose numbers depend only on a key, such as (seed, epoch, image)."""

import numpy as np


def seeded_generator(*key: int) -> np.random.Generator:
    """Create a random number generator whose numbers depend only on the key.

    The programs draw all random numbers except initial weights from generators of this function. The numbers therefore
    do not depend on the numbers of workers and processes, or on where a run was stopped and resumed. Initial weights
    are drawn from PyTorch's own generator, which is seeded once.

    Args:
        key: integers >= 0, such as (seed, epoch, image).
    """
    return np.random.default_rng((len(key), *key))  # without the length, (1, 2) and (1, 2, 0) would give equal numbers


# Each constant is the last number of some keys, and stands for one use of random numbers.
# Keys that differ only in this constant give independent random numbers.
PERTURB, CROP = 1, 2  # perturb or crop an image; the key is (seed, epoch, dataset entry, PERTURB or CROP)
DEGRADE_IMAGE = 5  # degrade one image of a batch; the key is (seed, epoch, dataset entry, crop, DEGRADE_IMAGE)
DEGRADE_BATCH = 4  # choose the degradation of a batch; the key is (seed, epoch, step, DEGRADE_BATCH)
DEGRADE_PATCH = 1  # degrade one training patch; the key is (seed, epoch, image, patch, DEGRADE_PATCH)
