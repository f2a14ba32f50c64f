"""Lists of images: make `Item`s from folders, trees of folders, CSV tables and text lists.

No image is decoded here. A folder or list that cannot be used raises a `UserError`. Every function that searches a
folder logs one line that says how many files were left out, and why.
"""

import csv
import functools
import hashlib
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TextIO

import numpy as np

from data.folders import find_images, folder_contains, format_counts, recognise_picture_by_test_program
from utils.console import printable
from utils.errors import UserError
from utils.labels import FAKE, REAL

logger = logging.getLogger(__name__)

LABELS = {"real": REAL, "fake": FAKE, "1": REAL, "0": FAKE}  # word in a CSV table -> label
# Names of the folders of (real, fake) images in two published data sets: Wang et al. (CVPR 2020), "CNN-generated images
# are surprisingly easy to spot... for now"; Zhu et al. (NeurIPS 2023), "GenImage".
LAYOUTS = (("0_real", "1_fake"), ("nature", "ai"))
TRAIN_FOLDERS = ("train", "training")
HELD_OUT_FOLDERS = ("val", "valid", "validation", "test")
FLAGS = ("--data-root-pos", "--data-root-neg")


class Item(NamedTuple):
    """An image file with its label and the name of a generator."""

    path: str
    label: int | None  # FAKE, REAL, or None if unknown
    generator: str  # what generated a fake, or what a real is compared with; "" for reals that all generators share


# --- folders ------------------------------------------------------------------------------------------------


def list_folder_items(real_roots: Sequence[str], fake_roots: Sequence[str]) -> list[Item]:
    """List the images of folders: first the sorted reals, then the sorted fakes. No folder may contain another one.

    Each folder of fakes counts as one generator. The generator is named after the folder. If two names would be equal,
    parent folders are added to all names.
    """
    roots = [*real_roots, *fake_roots]
    if not roots:
        raise UserError("no image folders: give at least one folder of real or of generated images")
    _refuse_nested_folders(roots)
    items = []
    for root in real_roots:
        items += [Item(path, REAL, "") for path in find_images(root)]
    for root, generator in zip(fake_roots, _name_generators(fake_roots), strict=True):
        items += [Item(path, FAKE, generator) for path in find_images(root)]
    return items


def _refuse_nested_folders(roots: Sequence[str]) -> None:
    real_paths = [os.path.realpath(root) for root in roots]
    for i, inner in enumerate(real_paths):
        for j, outer in enumerate(real_paths):
            if i != j and folder_contains(outer, inner):
                raise UserError(
                    f"image folder {printable(roots[i])} is or lies in {printable(roots[j])}, so images would count"
                    " twice: give folders that do not contain each other"
                )


def _name_generators(roots: Sequence[str]) -> list[str]:
    """Name each folder by the end of its path, with as few path components as make all names different."""
    parts = [os.path.abspath(root).split(os.sep) for root in roots]
    length = 1
    while len({tuple(p[-length:]) for p in parts}) < len(parts):
        length += 1
    return ["/".join(p[-length:]) for p in parts]


# --- trees --------------------------------------------------------------------------------------------------


def list_tree_items(root: str, training: bool = False) -> list[Item]:
    """List the images of a folder tree whose class folders are named as in LAYOUTS: the reals, then the fakes.

    The class folders may be GENERATOR/0_real, GENERATOR/CATEGORY/0_real or GENERATOR/train/nature. They may also be
    directly in `root`. The generator then gets the name of `root`. Each real gets the name of the generator that it is
    compared with. If the tree holds several layouts or image sets, one log line says which of them are used.

    Args:
        training: leave out images in folders for validation or test (HELD_OUT_FOLDERS).
    """
    items = []
    used, left_out = Counter(), Counter()
    for path in find_images(root):
        folders = path.removeprefix(root).strip(os.sep).split(os.sep)[:-1]
        layout = next((names for names in LAYOUTS if set(names) & set(folders)), None)
        if layout is None:
            left_out["in no class folder"] += 1
            continue
        position = next(i for i, folder in enumerate(folders) if folder in layout)
        held_out = [folder for folder in folders[:position] if folder.lower() in HELD_OUT_FOLDERS]
        if training and held_out:
            left_out[f"in {held_out[0]} (not for training)"] += 1
            continue
        used[" of ".join(["/".join(layout), *held_out])] += 1
        label = REAL if folders[position] == layout[0] else FAKE
        items.append(Item(path, label, _name_generator_in_tree(folders[:position], root)))
    if not items:
        _raise_no_images_in_tree(root, left_out)
    if left_out or len(used) > 1:
        text = "image tree %s: using %s; left out: %s"
        logger.info(text, printable(root), format_counts(used), format_counts(left_out) or "none")
    return sorted(items, key=lambda item: item.label == FAKE)  # a stable sort keeps the order within each class


def _name_generator_in_tree(parents: Sequence[str], root: str) -> str:
    """Name the generator of an image by the topmost folder between `root` and its class folder, else by `root`."""
    names = [name for name in parents if name.lower() not in (*TRAIN_FOLDERS, *HELD_OUT_FOLDERS)]
    name = names[0] if names else os.path.basename(os.path.abspath(root))
    return sys.intern(name)  # all images of a generator share one string in memory


def _raise_no_images_in_tree(root: str, left_out: Counter) -> None:
    raise UserError(
        f"image tree {printable(root)} has no images to use ({format_counts(left_out)}): expected folders"
        " GENERATOR/0_real and GENERATOR/1_fake, or nature and ai; give other folders with --data-root-pos and"
        " --data-root-neg"
    )


# --- tables and lists ---------------------------------------------------------------------------------------


def list_csv_items(file: str) -> list[Item]:
    """List the images of a CSV table with the columns path, label and optionally generator.

    A label is one of the words real and fake, or 1 for real and 0 for fake. A relative path is looked up in the working
    folder, then in the folder of the table. All columns besides path, label and generator are ignored.
    """
    what = f"image table {printable(file)}"
    rows = []
    with _open_text_file(file, what) as stream:
        reader = csv.DictReader(stream, strict=True)
        reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or []]
        if not {"path", "label"} <= set(reader.fieldnames):
            got = printable(",".join(reader.fieldnames)[:100])
            raise UserError(f"{what}, line 1: expected a header path,label or path,label,generator, got {got!r}")
        for row in reader:
            rows.append(_parse_table_row(row, f"{what}, line {reader.line_num}"))
    if any(label.isdecimal() for _, label, _ in rows):
        text = "%s: labels are read as 1 = real, 0 = fake; if 1 means fake, write the words real and fake instead"
        logger.warning(text, what)
    paths = _find_files([name for name, _, _ in rows], file, what)
    return [Item(path, LABELS[label], generator) for path, (_, label, generator) in zip(paths, rows, strict=True)]


def _parse_table_row(row: dict, where: str) -> tuple[str, str, str]:
    """Read path, label and generator from a row of a CSV table. where: file and line, for the error message."""
    path = row["path"] or ""
    label = (row["label"] or "").strip().lower()
    generator = (row.get("generator") or "").strip()
    has_too_many_cells = None in row  # DictReader stores surplus cells under the key None
    if not path.strip() or label not in LABELS or has_too_many_cells:
        got = printable(", ".join(str(value) for value in row.values())[:100])
        raise UserError(
            f"{where}: expected a path (in quotes if it contains a comma) and a label real or fake"
            f" (or 1 = real, 0 = fake), got {got}"
        )
    return path, sys.intern(label), sys.intern(generator)


def read_path_list(file: str) -> list[str]:
    """Read image paths from a text file, one per line. Relative paths are looked up as in `list_csv_items`."""
    what = f"image list {printable(file)}"
    with _open_text_file(file, what, newline="\n") as stream:
        lines = [line.removesuffix("\n") for line in stream]
    return _find_files([line for line in lines if line.strip()], file, what)


@contextmanager
def _open_text_file(file: str, what: str, newline: str = "") -> Iterator[TextIO]:
    """Open a UTF-8 text file, with or without a byte order mark. Bytes that are not UTF-8 are kept, for paths.

    Args:
        what: description of the file, for the error message.
    """
    try:
        with open(file, encoding="utf-8-sig", errors="surrogateescape", newline=newline) as stream:
            yield stream
    except (OSError, csv.Error) as error:
        raise UserError(f"{what} cannot be read ({getattr(error, 'strerror', error)})") from None


def _find_files(names: Sequence[str], file: str, what: str) -> list[str]:
    """Find the files named in a table or text list. Raises a UserError if a file does not exist."""
    if not names:
        raise UserError(f"{what} names no images")
    folder = os.path.dirname(file)
    paths = [_find_file(name, folder) for name in names]
    if None in paths:
        first = printable(names[paths.index(None)][:1000])
        raise UserError(
            f"{what}: {paths.count(None)} of its {len(names)} files do not exist, the first is {first} (looked for in"
            " the working folder and beside the list)"
        )
    return paths


def _find_file(name: str, folder: str) -> str | None:
    """Find a file in the working folder or in `folder`, by its name as written or without surrounding spaces."""
    for spelling in (name, name.strip()):
        for path in (spelling, os.path.join(folder, spelling)):
            if os.path.exists(path):
                return path
    return None


# --- lists for the programs ---------------------------------------------------------------------------------


def list_image_paths(source: str) -> list[str]:
    """List the images of a folder (`find_images`) or of a text list (`read_path_list`)."""
    return find_images(source) if os.path.isdir(source) else read_path_list(source)


def list_labelled_items(
    real_roots: Sequence[str] | None,
    fake_roots: Sequence[str] | None,
    tree: str | None = None,
    csv_file: str | None = None,
    flags: Sequence[str] = FLAGS,
    training: bool = False,
) -> list[Item]:
    """List labelled images. They must be given in exactly one of three ways: folders, a tree, or a CSV table.

    Args:
        flags: names of the command-line options for real_roots and fake_roots, used in error messages.
        training: whether the images are for training, see `list_tree_items`.

    Raises:
        UserError: if no images or several sources are given, a class is missing, or a file is listed in both classes.
    """
    ways = [bool(real_roots or fake_roots), bool(tree), bool(csv_file)].count(True)
    if ways != 1:
        got = "images are given in more than one way" if ways else "no images are given"
        raise UserError(
            f"{got}: give {flags[0]} REAL and {flags[1]} GENERATED folders, or --data-root TREE, or --csv FILE"
            " (without labels: test.py --input)"
        )
    if tree:
        items = list_tree_items(tree, training)
    elif csv_file:
        items = list_csv_items(csv_file)
    elif real_roots and fake_roots:
        items = list_folder_items(real_roots, fake_roots)
    else:
        missing = flags[1] if real_roots else flags[0]
        raise UserError(f"expected real and generated images, got one class only: {missing} is missing")
    _refuse_files_in_both_classes(items)
    return items


def _refuse_files_in_both_classes(items: Sequence[Item]) -> None:
    """Raise a UserError if a file is listed both as real and as generated, possibly under different names (links)."""
    first_with = {}  # (device, inode) of a file -> first item with this file
    conflicts = []
    for item in items:
        try:
            status = os.stat(item.path)
        except OSError:  # a missing file is reported when the image is read
            continue
        first = first_with.setdefault((status.st_dev, status.st_ino), item)
        if first.label != item.label:
            conflicts.append((first.path, item.path))
    if conflicts:
        one, other = (printable(path) for path in conflicts[0])
        raise UserError(
            f"{len(conflicts)} files are listed both as real and as generated, the first is {one} (as generated:"
            f" {other}): remove the link or the row"
        )


def require_both_classes(items: Sequence[Item], what: str) -> None:
    """Raise a UserError unless a list contains both real and generated images.

    Args:
        what: description of the list for the error message, such as "training images".
    """
    counts = Counter(item.label for item in items)
    if not counts[REAL] or not counts[FAKE]:
        got = f"{counts[REAL]} real and {counts[FAKE]} generated"
        raise UserError(f"{what} must contain both real and generated images, got {got}")


def list_unlabelled_items(paths: Sequence[str]) -> list[Item]:
    """List images without labels, in the order of `paths`. Folders are searched. A file may have any suffix."""
    found = []
    left_out = Counter()
    for path in map(os.fspath, paths):
        if not os.path.lexists(path):
            raise UserError(f"input {printable(path)} does not exist")
        if os.path.isdir(path):
            found += find_images(path)
        elif reason := recognise_picture_by_test_program(path):
            left_out[reason] += 1
        else:
            found.append(path)
    if left_out:
        text = f"left out {left_out.total()} pictures that test.py has written: {format_counts(left_out)}"
        if not found:
            raise UserError(f"no images: {text}")
        logger.info(text)
    return [Item(path, None, "") for path in found]


# --- recognising images -------------------------------------------------------------------------------------


def describe_and_hash_items(items: Sequence[Item]) -> str:
    """Describe a list of images in one line: the number of images, and a hash of paths, labels and generators.

    Paths are hashed as absolute paths, so that the text does not depend on the working folder.
    """
    real_folder = functools.cache(os.path.realpath)
    digest = hashlib.sha256()
    for path, label, generator in items:
        folder, name = os.path.split(path)
        line = f"{real_folder(folder)}/{name}\0{label}\0{generator}\n"
        digest.update(line.encode(errors="surrogateescape"))
    counts = Counter(item.label for item in items)
    return f"{len(items)} images ({counts[REAL]} real, {counts[FAKE]} generated), {digest.hexdigest()[:16]}"


def hash_image_files(items: Sequence[Item]) -> np.ndarray:
    """Hash image files, so that training images can be recognised later.

    Returns:
        int64 (N, 2): per image, a hash of the file's name and size, and a hash of its content.
    """
    rows = [(_hash_name_and_size(item.path), _hash_middle_of_file(item.path)) for item in items]
    return np.array(rows, np.int64).reshape(-1, 2)


def count_images_trained_on(items: Sequence[Item], trained_on: np.ndarray) -> int:
    """Count the images that are training images. A file is opened only if a training image has its name and size.

    Args:
        trained_on: `hash_image_files` of the training images.
    """
    names = set(trained_on[:, 0].tolist())
    known = set(map(tuple, trained_on.tolist()))
    candidates = [(_hash_name_and_size(item.path), item.path) for item in items]
    return sum(name in names and (name, _hash_middle_of_file(path)) in known for name, path in candidates)


def _hash_name_and_size(path: str) -> int:
    size = os.path.getsize(path) if os.path.isfile(path) else -1
    return _hash_to_int64(f"{os.path.basename(path)}\0{size}".encode(errors="surrogateescape"))


def _hash_middle_of_file(path: str) -> int:
    """Hash only 64 bytes in the middle of a file, which takes the same time for files of any size."""
    with open(path, "rb") as file:
        file.seek(os.path.getsize(path) // 2)
        return _hash_to_int64(file.read(64))


def _hash_to_int64(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)
