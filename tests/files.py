"""Helpers that write image files, damage image files, read folders, and check error messages."""

from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from utils.errors import UserError


def random_rgb_pixels(height=16, width=16, seed=0):
    """Return an RGB image with random pixels, uint8 (height, width, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def save_image(path, pixels=None, **options):
    """Write an array, a Pillow image or random pixels to an image file, and return the path of the file as text."""
    if pixels is None:
        pixels = random_rgb_pixels()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return str(path)


def write_empty_files(root, *names):
    """Make empty files with the given names in a folder, and return the path of the folder as text."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return str(root)


def cut_file_in_half(path):
    """Truncate an image file to its first half, and return the original bytes of the whole file."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return content


def read_file_contents_by_path(folder):
    """Return a dict of all files and subfolders in a folder: relative path -> bytes, or None for a subfolder."""
    found = {}
    for path in folder.rglob("*"):
        found[path.relative_to(folder).as_posix()] = path.read_bytes() if path.is_file() else None
    return found


@contextmanager
def expect_user_error(*words):
    """Expect the `with` block to raise a UserError whose message is one line and contains all the given words."""
    with pytest.raises(UserError) as caught:
        yield
    text = str(caught.value)
    assert text.isprintable()
    assert [word for word in words if word not in text] == [], text
