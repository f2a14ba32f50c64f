"""List image files as `Item`s from folders, folder trees, CSV tables and text files with one path per line."""

import csv
import hashlib
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TextIO

import numpy as np

from data.folders import describe_picture_written_by_test_py, find_images, folder_contains, format_counts_by_reason
from utils.console import make_printable
from utils.errors import UserError
from utils.files import choose_unique_names
from utils.labels import FAKE, REAL

logger = logging.getLogger(__name__)

LABELS = {"real": REAL, "fake": FAKE, "1": REAL, "0": FAKE}  # text in the column "label" of a CSV table -> label
# Each pair in LAYOUTS contains the folder names of the real and of the fake images in one public data set.
# The data set of "CNN-generated images are surprisingly easy to spot... for now" (CVPR 2020) has the folders
# 0_real and 1_fake. The data set GenImage (NeurIPS 2023) has the folders nature and ai.
LAYOUTS = (("0_real", "1_fake"), ("nature", "ai"))
TRAIN_FOLDERS = ("train", "training")
HELD_OUT_FOLDERS = ("val", "valid", "validation", "test")


class Item(NamedTuple):
    """An image file with its label and its generator name."""

    path: str
    label: int | None  # FAKE, REAL, or None if unknown
    # For a fake image, `generator` is the name of the generator that made the image.
    # If a real image is used only in the metrics of one generator, its `generator` is the name of this generator.
    generator: str  # "" if the image has no generator name


class ImageFlags(NamedTuple):
    """The command-line flags with which a user can give labelled images to a program."""

    real: str = "--data-root-pos"
    fake: str = "--data-root-neg"
    others: str = "--data-root TREE, or --csv FILE"  # text for messages: flags that can replace `real` and `fake`


IMAGE_FLAGS = ImageFlags()


# --- folders ------------------------------------------------------------------------------------------------


def list_labelled_images_in_folders(real_roots: Sequence[str], fake_roots: Sequence[str]) -> list[Item]:
    """List the images of folders: first the real images, then the fake images.

    The generator name of a fake image is the name of its folder in `fake_roots`, with parent folders if two folders
    have the same name, as in "run1/stylegan".

    Raises:
        UserError: if no folder is given, if one folder contains another, or if a folder has no images.
    """
    roots = [*real_roots, *fake_roots]
    if not roots:
        raise UserError("no image folders are given: give at least one folder of real or fake images")
    _refuse_nested_folders(roots)
    items = []
    for root in real_roots:
        items += [Item(path, REAL, "") for path in find_images(root)]
    for root, generator in zip(fake_roots, choose_unique_names(fake_roots), strict=True):
        items += [Item(path, FAKE, generator) for path in find_images(root)]
    return items


def _refuse_nested_folders(roots: Sequence[str]) -> None:
    real_paths = [os.path.realpath(root) for root in roots]
    for i, inner in enumerate(real_paths):
        for j, outer in enumerate(real_paths):
            if i != j and folder_contains(outer, inner):
                raise UserError(
                    f"image folder {make_printable(roots[i])} is the same as or inside {make_printable(roots[j])},"
                    " so its images would be listed twice: give folders that do not contain each other"
                )


# --- trees --------------------------------------------------------------------------------------------------


def list_labelled_images_in_tree(root: str, training: bool = False) -> list[Item]:
    """List the images of a folder tree: first the real images, then the fake images.

    The name of a folder says whether its images are real or fake, for example GENERATOR/0_real,
    GENERATOR/CATEGORY/0_real or GENERATOR/train/nature. Images in other folders are left out. Images in `root`/0_real
    and `root`/1_fake get the name of the folder `root` as the name of their generator.

    Args:
        training: if True, images in folders for validation or test (HELD_OUT_FOLDERS) are left out.

    Raises:
        UserError: if no image can be used.
    """
    items = []
    used, left_out = Counter(), Counter()
    for path in find_images(root):
        folders = path.removeprefix(root).strip(os.sep).split(os.sep)[:-1]
        layout, position = _find_class_folder(folders)
        if layout is None:
            left_out["in no class folder"] += 1
            continue
        held_out = [folder for folder in folders[:position] if folder.lower() in HELD_OUT_FOLDERS]
        if training and held_out:
            left_out[f"in {held_out[0]} (not for training)"] += 1
            continue
        used[" of ".join(["/".join(layout), *held_out])] += 1
        label = REAL if folders[position] == layout[0] else FAKE
        items.append(Item(path, label, _choose_generator_name_in_tree(folders[:position], root)))
    if not items:
        _raise_error_for_tree_without_images(root, left_out)
    if left_out or len(used) > 1:
        text = "image tree %s: using %s; left out: %s"
        logger.info(
            text,
            make_printable(root),
            format_counts_by_reason(used),
            format_counts_by_reason(left_out) or "none",
        )
    return sorted(items, key=lambda item: item.label == FAKE)  # a stable sort keeps the order within each class


def _find_class_folder(folders: Sequence[str]) -> tuple[tuple[str, str] | None, int]:
    """Find the first pair in LAYOUTS that contains one of `folders`.

    Returns:
        the pair in LAYOUTS, and the index in `folders`, or (None, 0) if LAYOUTS contains no name in `folders`.
    """
    for layout in LAYOUTS:
        for position, folder in enumerate(folders):
            if folder in layout:
                return layout, position
    return None, 0


def _choose_generator_name_in_tree(parents: Sequence[str], root: str) -> str:
    """Return the topmost name in `parents` that is not for training, validation or test, or else the name of `root`."""
    names = [name for name in parents if name.lower() not in (*TRAIN_FOLDERS, *HELD_OUT_FOLDERS)]
    name = names[0] if names else os.path.basename(os.path.abspath(root))
    return sys.intern(name)  # all images of one generator share one string in memory


def _raise_error_for_tree_without_images(root: str, left_out: Counter) -> None:
    raise UserError(
        f"image tree {make_printable(root)} has no images that can be used"
        f" ({format_counts_by_reason(left_out)}): expected images in folders GENERATOR/0_real and"
        " GENERATOR/1_fake, or GENERATOR/nature and GENERATOR/ai; if the folders have other names, use --data-root-pos"
        " for real and --data-root-neg for fake images"
    )


# --- tables and lists ---------------------------------------------------------------------------------------


def list_labelled_images_in_csv(file: str) -> list[Item]:
    """List the images of a CSV table with the columns "path" and "label", and optionally "generator".

    A label is "real" or 1 for a real image, and "fake" or 0 for a fake image. A relative path is first searched in the
    working folder, then in the folder of the table.

    Raises:
        UserError: if the table cannot be read, or if an image file does not exist.
    """
    what = f"image table {make_printable(file)}"
    rows = []
    with _open_text_file(file, what) as stream:
        reader = csv.DictReader(stream, strict=True)
        reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or []]
        if not {"path", "label"} <= set(reader.fieldnames):
            got = make_printable(",".join(reader.fieldnames)[:100])
            raise UserError(f"{what}, line 1: expected the columns path,label or path,label,generator, got {got!r}")
        for row in reader:
            rows.append(_parse_table_row(row, f"{what}, line {reader.line_num}"))
    if any(label.isdecimal() for _, label, _ in rows):
        text = "%s: labels are read as 1 = real, 0 = fake; if 1 means fake, write the words real and fake instead"
        logger.warning(text, what)
    paths = _find_listed_image_files([name for name, _, _ in rows], file, what)
    return [Item(path, LABELS[label], generator) for path, (_, label, generator) in zip(paths, rows, strict=True)]


def _parse_table_row(row: dict, where: str) -> tuple[str, str, str]:
    """Read the path, the label and the generator from a row of a CSV table."""
    path = row["path"] or ""
    label = (row["label"] or "").strip().lower()
    generator = (row.get("generator") or "").strip()
    has_too_many_cells = None in row  # csv.DictReader stores surplus cells of a row under the key None
    if not path.strip() or label not in LABELS or has_too_many_cells:
        got = make_printable(", ".join(str(value) for value in row.values())[:100])
        raise UserError(
            f"{where}: expected a path and a label (real or fake, or 1 = real, 0 = fake), got {got}; if a"
            " path contains a comma, put the path in quotes"
        )
    return path, sys.intern(label), sys.intern(generator)


def read_path_list(file: str) -> list[str]:
    """Read image paths from a text file with one path per line.

    A relative path is first searched in the working folder, then in the folder of the text file.
    """
    what = f"image list {make_printable(file)}"
    with _open_text_file(file, what, newline="\n") as stream:
        lines = [line.removesuffix("\n") for line in stream]
    return _find_listed_image_files([line for line in lines if line.strip()], file, what)


@contextmanager
def _open_text_file(file: str, what: str, newline: str = "") -> Iterator[TextIO]:
    """Open a UTF-8 text file with or without a byte order mark.

    Bytes that are not valid UTF-8 cause no error, because paths may contain such bytes.
    """
    try:
        with open(file, encoding="utf-8-sig", errors="surrogateescape", newline=newline) as stream:
            yield stream
    except (OSError, csv.Error) as error:
        reason = getattr(error, "strerror", error)
        raise UserError(f"{what} cannot be read ({reason}): correct the path or the file") from None


def _find_listed_image_files(names: Sequence[str], file: str, what: str) -> list[str]:
    """Return the paths of the files that a CSV table or a text file lists."""
    if not names:
        raise UserError(f"{what} lists no images: expected at least one image path")
    folder = os.path.dirname(file)
    paths = [_find_listed_image_file(name, folder) for name in names]
    if None in paths:
        first = make_printable(names[paths.index(None)][:1000])
        raise UserError(
            f"{what}: {paths.count(None)} of {len(names)} listed files do not exist, for example {first}: give paths"
            " that are absolute, or relative to the working folder or to the folder of the list"
        )
    return paths


def _find_listed_image_file(name: str, folder: str) -> str | None:
    """Return the path of a file in the working folder or in `folder`, or None if the file does not exist."""
    for spelling in (name, name.strip()):
        for path in (spelling, os.path.join(folder, spelling)):
            if os.path.exists(path):
                return path
    return None


# --- lists for the programs ---------------------------------------------------------------------------------


def list_image_paths(source: str) -> list[str]:
    """List the paths of the images in a folder, or the image paths in a text file."""
    return find_images(source) if os.path.isdir(source) else read_path_list(source)


def list_labelled_images(
    real_roots: Sequence[str] | None,
    fake_roots: Sequence[str] | None,
    tree: str | None = None,
    csv_file: str | None = None,
    flags: ImageFlags = IMAGE_FLAGS,
    training: bool = False,
) -> list[Item]:
    """List real and fake images from exactly one source: folders, a folder tree, or a CSV table.

    Args:
        flags: command-line flags with which the user can give images, used in error messages.
        training: whether to leave out images for validation or test in a folder tree.

    Raises:
        UserError: if not exactly one source of real and fake images is given, or if a file is listed both as real and
            as fake.
    """
    sources = [bool(real_roots or fake_roots), bool(tree), bool(csv_file)].count(True)
    if sources != 1:
        got = "images are given in more than one way" if sources else "no images are given"
        raise UserError(
            f"expected one source of images, but {got}: give either {flags.real} (folders of real images) and"
            f" {flags.fake} (folders of fake images), or {flags.others}"
        )
    if tree:
        items = list_labelled_images_in_tree(tree, training)
    elif csv_file:
        items = list_labelled_images_in_csv(csv_file)
    elif real_roots and fake_roots:
        items = list_labelled_images_in_folders(real_roots, fake_roots)
    else:
        missing = flags.fake if real_roots else flags.real
        raise UserError(
            f"{missing} is missing, so that all images are of one class: give real images with {flags.real} and fake"
            f" images with {flags.fake}"
        )
    _refuse_files_in_both_classes(items)
    return items


def _refuse_files_in_both_classes(items: Sequence[Item]) -> None:
    """Raise a UserError if a file is listed both as real and as fake, also through a link."""
    first_with = {}  # (device, inode) of each file -> first item in `items` with this file
    conflicts = []
    for item in items:
        try:
            status = os.stat(item.path)
        except OSError:  # a missing file is reported later, when the image is read
            continue
        first = first_with.setdefault((status.st_dev, status.st_ino), item)
        if first.label != item.label:
            conflicts.append((first.path, item.path))
    if conflicts:
        one, other = (make_printable(path) for path in conflicts[0])
        raise UserError(
            f"{len(conflicts)} files are listed both as real and as fake: for example, {one} and {other} are the same"
            " file; remove the path that has the wrong label"
        )


def require_real_and_fake_images(items: Sequence[Item], what: str) -> None:
    """Raise a UserError if a list of images does not contain both real and fake images.

    Args:
        what: description of the list for the error message, such as "training images".
    """
    counts = Counter(item.label for item in items)
    if not counts[REAL] or not counts[FAKE]:
        got = f"{counts[REAL]} real and {counts[FAKE]} fake"
        raise UserError(f"{what} must contain both real and fake images, got {got}: add images of the missing class")


def list_images_without_labels(paths: Sequence[str]) -> list[Item]:
    """List the images of folders and files, in the order of `paths`, as `Item`s whose label is None.

    Residual pictures and figures that test.py has written are left out. An image that is given twice, by its path and
    by its folder, is listed once.

    Args:
        paths: folders, which are searched for images, and image files with any suffix.

    Raises:
        UserError: if a path does not exist, or if only pictures written by test.py are given.
    """
    found = []
    left_out = Counter()
    for path in map(os.fspath, paths):
        if not os.path.lexists(path):
            raise UserError(f"input {make_printable(path)} does not exist: expected an image file or a folder")
        if os.path.isdir(path):
            found += find_images(path)
        elif reason := describe_picture_written_by_test_py(path):
            left_out[reason] += 1
        else:
            found.append(path)
    if left_out:
        text = f"left out {left_out.total()} pictures that test.py has written: {format_counts_by_reason(left_out)}"
        if not found:
            raise UserError(
                "no images are left: test.py itself has written all given files"
                f" ({format_counts_by_reason(left_out)}); give other images"
            )
        logger.info(text)
    unique = {}
    for path in found:
        unique.setdefault(os.path.abspath(path), path)
    if len(unique) < len(found):
        logger.info("left out %d repeated paths: each image is used once", len(found) - len(unique))
    return [Item(path, None, "") for path in unique.values()]


# --- recognising images -------------------------------------------------------------------------------------


def describe_and_hash_image_list(items: Sequence[Item]) -> str:
    """Return one line of text: the number of images in a list, and one hash of all paths, labels and generators.

    The hash is computed from absolute paths, so that the line does not depend on the working folder.
    """
    folders = {folder: os.path.realpath(folder) for folder in {os.path.dirname(item.path) for item in items}}
    digest = hashlib.sha256()
    for path, label, generator in items:
        folder, name = os.path.split(path)
        digest.update(f"{folders[folder]}/{name}\0{label}\0{generator}\n".encode(errors="surrogateescape"))
    return f"{_describe_numbers_of_images(items)}, {digest.hexdigest()[:16]}"


def describe_and_hash_image_files(items: Sequence[Item], hashes: np.ndarray) -> str:
    """Return one line of text: the number of images in a list, and one hash of all files, labels and generators.

    The hash does not depend on the folders of the files, so that image files may be moved between two runs.

    Args:
        hashes: hashes of the image files, from `hash_image_files`.
    """
    digest = hashlib.sha256(hashes.tobytes())
    for item in items:
        digest.update(f"{item.label}\0{item.generator}\n".encode(errors="surrogateescape"))
    return f"{_describe_numbers_of_images(items)}, {digest.hexdigest()[:16]}"


def _describe_numbers_of_images(items: Sequence[Item]) -> str:
    counts = Counter(item.label for item in items)
    labels = f" ({counts[REAL]} real, {counts[FAKE]} fake)" if counts[None] < len(items) else ""
    return f"{len(items)} images{labels}"


def hash_image_files(items: Sequence[Item]) -> np.ndarray:
    """Compute hashes of training images, for `count_images_trained_on`.

    Returns:
        int64 (N, 2): for each image file, a hash of its name and size, and a hash of 64 bytes in its middle.
    """
    rows = [(_hash_name_and_size(item.path), _hash_middle_of_file(item.path)) for item in items]
    return np.array(rows, np.int64).reshape(-1, 2)


def count_images_trained_on(items: Sequence[Item], trained_on: np.ndarray) -> int:
    """Count how many of the given images a detector was trained on.

    Args:
        trained_on: hashes of the training images, from `hash_image_files`.
    """
    names = set(trained_on[:, 0].tolist())
    known = set(map(tuple, trained_on.tolist()))
    candidates = [(_hash_name_and_size(item.path), item.path) for item in items]
    return sum(name in names and (name, _hash_middle_of_file(path)) in known for name, path in candidates)


def _hash_name_and_size(path: str) -> int:
    size = os.path.getsize(path) if os.path.isfile(path) else -1
    return _hash_to_int64(f"{os.path.basename(path)}\0{size}".encode(errors="surrogateescape"))


def _hash_middle_of_file(path: str) -> int:
    """Compute a hash of 64 bytes in the middle of a file."""
    with open(path, "rb") as file:
        file.seek(os.path.getsize(path) // 2)
        return _hash_to_int64(file.read(64))


def _hash_to_int64(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)
