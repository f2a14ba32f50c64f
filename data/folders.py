"""Search folders for images.

Files that are not images are left out, and so are pictures written by test.py. One log line per searched folder says
how many files were left out, and why.
"""

import logging
import os
from collections import Counter
from collections.abc import Sequence, Set

from PIL import features

from utils.console import printable
from utils.errors import UserError

logger = logging.getLogger(__name__)

HAS_AVIF = "avif" in features.modules and features.check("avif")  # Pillow >= 11.3, unless it was built without AVIF
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif")
if HAS_AVIF:
    IMAGE_SUFFIXES += (".avif",)
MOST_REASONS = 9  # maximum number of reasons listed in one log line


def find_images(root: str) -> list[str]:
    """Find all images in a folder and in the folders below it, and sort them by path.

    Images are recognised by their file suffix, in upper or lower case. Hidden files and folders, __MACOSX, and pictures
    written by test.py are left out. A link to a folder is followed, unless that folder contains the link. A folder that
    can be reached on several paths is read once, if possible on a path without links.
    """
    images = []
    left_out = Counter()  # reason -> number of files and folders
    visited = set()
    pending = [os.fspath(root)]  # folders to search: the root, later also links to folders
    while pending:
        for folder, subfolders, names in os.walk(pending.pop(0), onerror=_raise_unreadable_folder):
            status = os.stat(folder)
            identity = (status.st_dev, status.st_ino)
            if identity in visited:
                left_out["repeated folder"] += 1
                subfolders.clear()
                continue
            visited.add(identity)
            subfolders[:] = _select_folders_to_search(folder, subfolders, left_out)
            paths = [os.path.join(folder, name) for name in subfolders]
            pending += [path for path in paths if os.path.islink(path)]
            images += _select_images_of_folder(folder, names, left_out)
    if not images:
        found = format_counts(left_out) or "no files"
        suffixes = " ".join(IMAGE_SUFFIXES)
        raise UserError(f"no images in folder {printable(root)}: expected files ending in {suffixes}, got {found}")
    if left_out:
        text = "image folder %s: found %d images, left out %d other files or folders: %s"
        logger.info(text, printable(root), len(images), left_out.total(), format_counts(left_out))
    return sorted(images)


def _raise_unreadable_folder(error: OSError) -> None:
    raise UserError(f"image folder {printable(str(error.filename))} cannot be read ({error.strerror})")


def _select_folders_to_search(folder: str, subfolders: Sequence[str], left_out: Counter) -> list[str]:
    """Select the subfolders that `find_images` searches. Count the subfolders that are left out in `left_out`."""
    selected = []
    for name in sorted(subfolders):
        if name.startswith(".") or name == "__MACOSX":
            left_out["hidden"] += 1
        elif _is_link_to_parent_folder(os.path.join(folder, name)):
            left_out["link to a folder that contains it"] += 1
        else:
            selected.append(name)
    return selected


def _select_images_of_folder(folder: str, names: Sequence[str], left_out: Counter) -> list[str]:
    """Select the images among the files of a folder. Count the files that are left out in `left_out`."""
    images = []
    all_names = set(names)
    for name in names:
        reason = _reason_to_leave_out(folder, name, all_names)
        if reason is None:
            images.append(os.path.join(folder, name))
        else:
            left_out[reason] += 1
    return images


def _is_link_to_parent_folder(folder: str) -> bool:
    """Check whether a folder is a link to a folder that contains the link.

    Following the link `real/up -> ..`, for example, would add the generated images to the real images.
    """
    if not os.path.islink(folder):
        return False
    target = os.path.realpath(folder)
    return folder_contains(target, os.path.realpath(os.path.dirname(folder)))


def folder_contains(outer: str, inner: str) -> bool:
    """Check whether the folder `outer` is or contains the folder `inner`. Both must be paths without links."""
    return os.path.join(inner, "").startswith(os.path.join(outer, ""))


def _reason_to_leave_out(folder: str, name: str, names: Set[str]) -> str | None:
    """Say why a file of a folder is not an image. Returns None for an image. names: all files of the folder."""
    if name.startswith("."):
        return "hidden"
    if not name.lower().endswith(IMAGE_SUFFIXES):
        return os.path.splitext(name)[1].lower() or "without suffix"
    return _recognise_picture_by_test_program(folder, name, names)


def _recognise_picture_by_test_program(folder: str, name: str, names: Set[str]) -> str | None:
    """Recognise a picture written by test.py. Returns the kind of picture; None for any other image."""
    if name.endswith(".residual.png"):
        return "residual picture"
    table = f"{name.removesuffix('.png')}.csv"
    if name.endswith(".png") and table in names and _is_score_table(os.path.join(folder, table)):
        return "figure of a score table"
    return None


def _is_score_table(path: str) -> bool:
    """Check whether a file is a CSV table with a column "logit_fake"."""
    if not os.path.isfile(path):  # opening a named pipe would block
        return False
    try:
        with open(path, "rb") as file:
            return b"logit_fake" in file.readline(1000)
    except OSError:
        return False


def format_counts(counts: Counter) -> str:
    """Format counts as text, such as "3 .heic, 1 hidden"."""
    parts = [f"{number} {printable(reason)}" for reason, number in counts.most_common(MOST_REASONS)]
    if len(counts) > MOST_REASONS:
        parts.append("...")
    return ", ".join(parts)


def recognise_picture_by_test_program(path: str) -> str | None:
    """Recognise a picture written by test.py, which a pattern such as *.png also matches.

    Returns:
        The kind of picture, such as "residual picture"; None for any other image.
    """
    folder, name = os.path.split(path)
    return _recognise_picture_by_test_program(folder, name, {f"{name.removesuffix('.png')}.csv"})
