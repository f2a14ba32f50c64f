"""Random number generators whose numbers depend only on a key, such as (seed, epoch, image)."""

import numpy as np


def seeded_generator(*key: int) -> np.random.Generator:
    """Create a random number generator whose numbers depend only on the key.

    The programs draw all random numbers from these generators. The numbers therefore do not depend on how many workers
    and processes there are, or where a run was stopped and resumed. Only initial weights are drawn from PyTorch's own
    generator, which is seeded once.

    Args:
        key: integers >= 0, such as (seed, epoch, image).
    """
    return np.random.default_rng((len(key), *key))  # the length separates (1, 2) from (1, 2, 0)


# The last number of a key names the purpose of the draws. Two purposes with one (seed, epoch, image) therefore get
# independent random numbers.
PERTURB, CROP, DEGRADE_IMAGE = 1, 2, 5  # purposes of keys that begin with (seed, epoch, image)
DEGRADE_BATCH = 4  # purpose of keys that begin with (seed, epoch, step)
DEGRADE_PATCH = 1  # purpose of keys that begin with (seed, epoch, image, patch)
