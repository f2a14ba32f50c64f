"""Random numbers that depend on nothing but a key, such as (seed, epoch, image)."""

import numpy as np


def seeded_generator(*key: int) -> np.random.Generator:
    """A generator that depends on nothing but the numbers given (>= 0), such as (seed, epoch, image).

    All that the programs draw comes from such a one; only initial weights come from torch's own, seeded once.
    """
    return np.random.default_rng((len(key), *key))  # NumPy takes (1, 2) and (1, 2, 0) for the same


# Last numbers of keys: what is drawn for the same seed, epoch and image or step by one has nothing to do with another.
PERTURB, CROP, DEGRADE_BATCH, DEGRADE_IMAGE = 1, 2, 4, 5  # of (seed, epoch, image), but DEGRADE_BATCH: of (.., step)
DEGRADE_PATCH = 1  # of (seed, epoch, image, patch)
