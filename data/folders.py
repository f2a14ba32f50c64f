"""Search of folders for images.

Files that are not images, and pictures that test.py has written, are left out. One log line per folder
says how many files were left out and why.
"""

import logging
import os
from collections import Counter
from collections.abc import Sequence, Set

from PIL import features

from utils.console import printable
from utils.errors import UserError

logger = logging.getLogger(__name__)

HAS_AVIF = "avif" in features.modules and features.check("avif")  # Pillow >= 11.3, unless built without it
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif")
if HAS_AVIF:
    IMAGE_SUFFIXES += (".avif",)
MOST_REASONS = 9  # shown in one line


def find_images(root: str) -> list[str]:
    """Find all images in a folder and in the folders below it, and sort them by path.

    Images are recognised by their suffix, in upper or lower case. Hidden files and folders, __MACOSX, and pictures
    written by test.py are left out. Links to folders are followed, except links to a folder that contains the link. A
    folder that can be reached in several ways is read once, if possible without a link.
    """
    images = []
    left_out = Counter()  # reason -> number of files and folders
    visited = set()
    pending = [os.fspath(root)]  # the root, then links to folders
    while pending:
        for folder, subfolders, names in os.walk(pending.pop(0), onerror=_refuse_folder):
            status = os.stat(folder)
            identity = (status.st_dev, status.st_ino)
            if identity in visited:
                left_out["repeated folder"] += 1
                subfolders.clear()
                continue
            visited.add(identity)
            subfolders[:] = _folders_to_visit(folder, subfolders, left_out)
            paths = [os.path.join(folder, name) for name in subfolders]
            pending += [path for path in paths if os.path.islink(path)]
            images += _images_of_folder(folder, names, left_out)
    if not images:
        found = format_counts(left_out) or "no files"
        suffixes = " ".join(IMAGE_SUFFIXES)
        raise UserError(f"no images in folder {printable(root)}: expected files ending in {suffixes}, got {found}")
    if left_out:
        text = "image folder %s: found %d images, left out %d other files or folders: %s"
        logger.info(text, printable(root), len(images), left_out.total(), format_counts(left_out))
    return sorted(images)


def _refuse_folder(error: OSError) -> None:
    raise UserError(f"image folder {printable(str(error.filename))} cannot be read ({error.strerror})")


def _folders_to_visit(folder: str, subfolders: Sequence[str], left_out: Counter) -> list[str]:
    """Select the subfolders that `find_images` searches, and count the others."""
    selected = []
    for name in sorted(subfolders):
        if name.startswith(".") or name == "__MACOSX":
            left_out["hidden"] += 1
        elif _leads_upwards(os.path.join(folder, name)):
            left_out["link to a folder that contains it"] += 1
        else:
            selected.append(name)
    return selected


def _images_of_folder(folder: str, names: Sequence[str], left_out: Counter) -> list[str]:
    """Select the images among the files of a folder, and count the other files."""
    images = []
    all_names = set(names)
    for name in names:
        reason = _reason_to_leave_out(folder, name, all_names)
        if reason is None:
            images.append(os.path.join(folder, name))
        else:
            left_out[reason] += 1
    return images


def _leads_upwards(folder: str) -> bool:
    """Check whether a folder is a link to a folder that contains the link. Otherwise `real/up -> ..` adds the fakes."""
    if not os.path.islink(folder):
        return False
    target = os.path.realpath(folder)
    return contains(target, os.path.realpath(os.path.dirname(folder)))


def contains(outer: str, inner: str) -> bool:
    """Check whether a folder is, or contains, another one. Both are real paths."""
    return os.path.join(inner, "").startswith(os.path.join(outer, ""))


def _reason_to_leave_out(folder: str, name: str, names: Set[str]) -> str | None:
    """Say why a file is not one of the images of a folder, whose files are `names`. Returns None if it is."""
    if name.startswith("."):
        return "hidden"
    if not name.lower().endswith(IMAGE_SUFFIXES):
        return os.path.splitext(name)[1].lower() or "without suffix"
    return _recognise_output(folder, name, names)


def _recognise_output(folder: str, name: str, names: Set[str]) -> str | None:
    """Recognise a picture that test.py has written. Returns None for other pictures."""
    if name.endswith(".residual.png"):
        return "residual picture"
    table = f"{name.removesuffix('.png')}.csv"
    if name.endswith(".png") and table in names and _is_score_table(os.path.join(folder, table)):
        return "figure of a score table"
    return None


def _is_score_table(path: str) -> bool:
    """Check whether a file is a CSV table with a column of logits."""
    if not os.path.isfile(path):  # opening a named pipe would block
        return False
    try:
        with open(path, "rb") as file:
            return b"logit_fake" in file.readline(1000)
    except OSError:
        return False


def format_counts(counts: Counter) -> str:
    """Format counts such as "3 .heic, 1 hidden"."""
    parts = [f"{number} {printable(reason)}" for reason, number in counts.most_common(MOST_REASONS)]
    if len(counts) > MOST_REASONS:
        parts.append("...")
    return ", ".join(parts)


def recognise_output(path: str) -> str | None:
    """Recognise a picture that test.py has written. A pattern such as *.png may have matched it."""
    folder, name = os.path.split(path)
    return _recognise_output(folder, name, {f"{name.removesuffix('.png')}.csv"})
