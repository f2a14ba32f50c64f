"""Search folders for images, and leave out pictures that test.py has written."""

import logging
import os
from collections import Counter
from collections.abc import Sequence

from PIL import features

from utils.console import make_printable
from utils.errors import UserError

logger = logging.getLogger(__name__)

HAS_AVIF = "avif" in features.modules and features.check("avif")  # True for Pillow >= 11.3 that was built with AVIF
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif")
if HAS_AVIF:
    IMAGE_SUFFIXES += (".avif",)
RESIDUAL_PICTURE_SUFFIX = ".residual.png"  # end of the names of the pictures that test.py --save-residuals writes
MOST_REASONS = 9  # maximum number of reasons that a log line about left-out files contains


def find_images(root: str) -> list[str]:
    """Find all images in a folder and in the folders below it, and sort them by path.

    Images are recognized by their file suffix, in upper or lower case. Hidden files, hidden folders, folders named
    __MACOSX, and pictures written by test.py are left out. A link to a folder is followed, unless the folder contains
    the link.

    Raises:
        UserError: if a folder cannot be read, or if no image is found.
    """
    images = []
    left_out = Counter()  # number of left-out files and folders for each reason
    visited = set()
    pending = [os.fspath(root)]
    while pending:
        for folder, subfolders, names in os.walk(pending.pop(0), onerror=_raise_error_for_unreadable_folder):
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
        found = format_counts_by_reason(left_out) or "no files"
        suffixes = " ".join(IMAGE_SUFFIXES)
        raise UserError(f"no images in folder {make_printable(root)}: expected files ending in {suffixes}, got {found}")
    if left_out:
        text = "image folder %s: found %d images, left out %d other files or folders: %s"
        logger.info(text, make_printable(root), len(images), left_out.total(), format_counts_by_reason(left_out))
    return sorted(images)


def _raise_error_for_unreadable_folder(error: OSError) -> None:
    raise UserError(
        f"image folder {make_printable(str(error.filename))} cannot be read ({error.strerror}): give a readable folder"
    )


def _select_folders_to_search(folder: str, subfolders: Sequence[str], left_out: Counter) -> list[str]:
    """Select the subfolders that `find_images` searches, and count the other subfolders in `left_out`."""
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
    """Return the paths of the images among the files of a folder, and count the other files in `left_out`."""
    images = []
    known = set(names)
    for name in names:
        has_table = f"{os.path.splitext(name)[0]}.csv" in known
        reason = _find_reason_to_leave_out_file(folder, name, has_table)
        if reason is None:
            images.append(os.path.join(folder, name))
        else:
            left_out[reason] += 1
    return images


def _is_link_to_parent_folder(folder: str) -> bool:
    """Return whether `folder` is a link to a folder that contains the link.

    If `find_images` followed a link from a folder of real images to its parent folder, it could list fake images as
    real.
    """
    if not os.path.islink(folder):
        return False
    target = os.path.realpath(folder)
    return folder_contains(target, os.path.realpath(os.path.dirname(folder)))


def folder_contains(outer: str, inner: str) -> bool:
    """Return whether the folder `outer` equals or contains `inner`, for paths without symbolic links."""
    return os.path.join(inner, "").startswith(os.path.join(outer, ""))


def _find_reason_to_leave_out_file(folder: str, name: str, has_table: bool) -> str | None:
    """Return the reason why a file is left out, or None if the file is an image.

    Args:
        has_table: whether the folder contains a CSV file with the stem of `name`, such as a.csv for a.png.
    """
    if name.startswith("."):
        return "hidden"
    if not name.lower().endswith(IMAGE_SUFFIXES):
        return os.path.splitext(name)[1].lower() or "without suffix"
    if has_table or name.endswith(RESIDUAL_PICTURE_SUFFIX):
        return describe_picture_written_by_test_py(os.path.join(folder, name))
    return None


def describe_picture_written_by_test_py(path: str) -> str | None:
    """Describe a file written by test.py: "residual picture", "figure of a score table", or None for any other file."""
    if path.endswith(RESIDUAL_PICTURE_SUFFIX):
        return "residual picture"
    if path.endswith(".png") and _is_score_table(f"{path.removesuffix('.png')}.csv"):
        return "figure of a score table"
    return None


def _is_score_table(path: str) -> bool:
    """Return whether a file is a CSV table with a column "logit_fake"."""
    if not os.path.isfile(path):  # open() may wait forever if the path is a named pipe
        return False
    try:
        with open(path, "rb") as file:
            return b"logit_fake" in file.readline(1000)
    except OSError:
        return False


def format_counts_by_reason(counts: Counter) -> str:
    """Format counts as text, such as "3 .heic, 1 hidden" for the counts {".heic": 3, "hidden": 1}."""
    parts = [f"{number} {make_printable(reason)}" for reason, number in counts.most_common(MOST_REASONS)]
    if len(counts) > MOST_REASONS:
        parts.append("...")
    return ", ".join(parts)
