"""Random numbers that depend only on a key, such as (seed, epoch, image)."""

import numpy as np


def seeded_generator(*key: int) -> np.random.Generator:
    """Make a generator whose numbers depend only on the key.

    The programs draw all random numbers from such generators, so that the number of workers, processes and stops
    changes nothing. Only initial weights come from PyTorch's own generator, which is seeded once.

    Args:
        key: integers >= 0, such as (seed, epoch, image).
    """
    return np.random.default_rng((len(key), *key))  # NumPy alone would take (1, 2) and (1, 2, 0) for the same key


# Last number of a key: draws for different purposes are independent, although seed, epoch and image are the same.
PERTURB, CROP, DEGRADE_IMAGE = 1, 2, 5  # after (seed, epoch, image)
DEGRADE_BATCH = 4  # after (seed, epoch, step)
DEGRADE_PATCH = 1  # after (seed, epoch, image, patch)
