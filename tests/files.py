"""Files for tests, and the mistakes that bad ones have to give."""

from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from utils.errors import UserError


def random_rgb(height=16, width=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def save(path, pixels=None, **options):
    """Write an array (default: random colours) or a Pillow image; return the path as text."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(random_rgb() if pixels is None else pixels)
    image.save(path, **options)
    return str(path)


def touch(root, *names):
    """Make empty files in a folder; return the folder as text."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return str(root)


@contextmanager
def mistake(*words):
    """What is done in here has to raise a UserError: one line that holds these words."""
    with pytest.raises(UserError) as caught:
        yield
    text = str(caught.value)
    assert text.isprintable() and all(word in text for word in words), text
