"""Random number generators whose numbers depend only on a key, such as (seed, epoch, image)."""

import numpy as np


def seeded_generator(*key: int) -> np.random.Generator:
    """Create a random number generator whose numbers depend only on the key.

    The programs draw all random numbers except initial weights from such generators. The numbers therefore do not
    depend on the numbers of workers and processes, or on where a run was stopped and resumed. Initial weights are drawn
    from PyTorch's own generator, which is seeded once.

    Args:
        key: integers >= 0, such as (seed, epoch, image).
    """
    return np.random.default_rng((len(key), *key))  # without the length, (1, 2) and (1, 2, 0) would give equal numbers


# The last number of a key says what the random numbers are used for.
# Different uses therefore get independent random numbers for the same (seed, epoch, image).
PERTURB, CROP = 1, 2  # in keys (seed, epoch, dataset entry, PERTURB) and (seed, epoch, dataset entry, CROP)
DEGRADE_IMAGE = 5  # in keys (seed, epoch, dataset entry, 0, DEGRADE_IMAGE)
DEGRADE_BATCH = 4  # in keys (seed, epoch, step, DEGRADE_BATCH)
DEGRADE_PATCH = 1  # in keys (seed, epoch, image, patch, DEGRADE_PATCH)
