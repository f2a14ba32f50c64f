"""Lists of image files: from folders, trees of folders, CSV tables and text lists to `Item`s.

No image is opened here. A folder or list that cannot be used is reported as a `UserError`. Every function that searches
folders logs in one line how many files it left out and why.
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

from data.folders import contains, find_images, format_counts, recognise_output
from utils.console import printable
from utils.errors import UserError
from utils.labels import FAKE, REAL

logger = logging.getLogger(__name__)

LABELS = {"real": REAL, "fake": FAKE, "1": REAL, "0": FAKE}  # in CSV tables
# (real, fake) folder names in trees. Sources: Wang et al. (CVPR 2020), "CNN-generated images are surprisingly easy to
# spot... for now"; Zhu et al. (NeurIPS 2023), "GenImage".
LAYOUTS = (("0_real", "1_fake"), ("nature", "ai"))
TRAIN_FOLDERS = ("train", "training")
HELD_OUT_FOLDERS = ("val", "valid", "validation", "test")
FLAGS = ("--data-root-pos", "--data-root-neg")


class Item(NamedTuple):
    """An image file. `generator` is the name of what generated it, or "" for real images that all generators share."""

    path: str
    label: int | None  # FAKE, REAL or None
    generator: str


# --- folders ------------------------------------------------------------------------------------------------


def folder_items(real_roots: Sequence[str], fake_roots: Sequence[str]) -> list[Item]:
    """List the images of folders, which must not contain each other: the sorted reals, then the sorted fakes.

    Each folder of fakes is one generator. It is named after its folder, with as many parent folders as it takes to
    distinguish the generators.
    """
    roots = [*real_roots, *fake_roots]
    if not roots:
        raise UserError("no image folders: give at least one folder of real or of generated images")
    _refuse_overlap(roots)
    items = []
    for root in real_roots:
        items += [Item(path, REAL, "") for path in find_images(root)]
    for root, generator in zip(fake_roots, _generator_names(fake_roots), strict=True):
        items += [Item(path, FAKE, generator) for path in find_images(root)]
    return items


def _refuse_overlap(roots: Sequence[str]) -> None:
    places = [os.path.realpath(root) for root in roots]
    for i, inner in enumerate(places):
        for j, outer in enumerate(places):
            if i != j and contains(outer, inner):
                raise UserError(
                    f"image folder {printable(roots[i])} is or lies in {printable(roots[j])}: its images would count"
                    " twice; give folders that do not contain each other"
                )


def _generator_names(roots: Sequence[str]) -> list[str]:
    """Name folders by the shortest ends of their paths that are all different."""
    parts = [os.path.abspath(root).split(os.sep) for root in roots]
    length = 1
    while len({tuple(p[-length:]) for p in parts}) < len(parts):
        length += 1
    return ["/".join(p[-length:]) for p in parts]


# --- trees --------------------------------------------------------------------------------------------------


def tree_items(root: str, training: bool = False) -> list[Item]:
    """List the images of a tree with class folders named as in LAYOUTS: the reals, then the fakes.

    The class folders may be GENERATOR/0_real, GENERATOR/CATEGORY/0_real, GENERATOR/train/nature, or 0_real at the top,
    where the generator takes the name of `root`. Reals carry the name of the generator that they are compared with.
    If there are several layouts or image sets, one log line says which ones are used.

    Args:
        training: leave out the images in folders named val, validation or test.
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
        items.append(Item(path, label, _tree_generator(folders[:position], root)))
    if not items:
        _refuse_tree(root, left_out)
    if left_out or len(used) > 1:
        text = "image tree %s: using %s; left out: %s"
        logger.info(text, printable(root), format_counts(used), format_counts(left_out) or "none")
    return sorted(items, key=lambda item: item.label == FAKE)  # the sort is stable


def _tree_generator(parents: Sequence[str], root: str) -> str:
    """Name the generator of an image by the folders above its class folder."""
    names = [name for name in parents if name.lower() not in (*TRAIN_FOLDERS, *HELD_OUT_FOLDERS)]
    name = names[0] if names else os.path.basename(os.path.abspath(root))
    return sys.intern(name)  # one string for all images of a generator


def _refuse_tree(root: str, left_out: Counter) -> None:
    raise UserError(
        f"image tree {printable(root)} has no images to use ({format_counts(left_out)}): expected folders"
        " GENERATOR/0_real and GENERATOR/1_fake, or nature and ai; give other folders with --data-root-pos and"
        " --data-root-neg"
    )


# --- tables and lists ---------------------------------------------------------------------------------------


def csv_items(file: str) -> list[Item]:
    """List the images of a CSV table with the columns path, label and optionally generator.

    Labels are real or fake, or 1 for real and 0 for fake. Paths are relative to the working folder or, if there is no
    such file, to the folder of the table. Other columns are ignored.
    """
    what = f"image table {printable(file)}"
    rows = []
    with _open_text(file, what) as stream:
        reader = csv.DictReader(stream, strict=True)
        reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or []]
        if not {"path", "label"} <= set(reader.fieldnames):
            got = printable(",".join(reader.fieldnames)[:100])
            raise UserError(f"{what}, line 1: expected a header path,label or path,label,generator, got {got!r}")
        for row in reader:
            rows.append(_parse_row(row, f"{what}, line {reader.line_num}"))
    if any(label.isdecimal() for _, label, _ in rows):
        text = "%s: labels are read as 1 = real, 0 = fake; if 1 means fake, write the words real and fake instead"
        logger.warning(text, what)
    paths = _find_files([name for name, _, _ in rows], file, what)
    return [Item(path, LABELS[label], generator) for path, (_, label, generator) in zip(paths, rows, strict=True)]


def _parse_row(row: dict, where: str) -> tuple[str, str, str]:
    """Read path, label and generator of one row."""
    path = row["path"] or ""
    label = (row["label"] or "").strip().lower()
    generator = (row.get("generator") or "").strip()
    has_too_many_cells = None in row  # the key under which DictReader stores further cells
    if not path.strip() or label not in LABELS or has_too_many_cells:
        got = printable(", ".join(str(value) for value in row.values())[:100])
        raise UserError(
            f"{where}: expected a path (in quotes if it contains a comma) and a label real or fake"
            f" (or 1 = real, 0 = fake), got {got}"
        )
    return path, sys.intern(label), sys.intern(generator)


def list_paths(file: str) -> list[str]:
    """Read the paths in a text file, one per line. They are found as in `csv_items`."""
    what = f"image list {printable(file)}"
    with _open_text(file, what, newline="\n") as stream:
        lines = [line.removesuffix("\n") for line in stream]
    return _find_files([line for line in lines if line.strip()], file, what)


@contextmanager
def _open_text(file: str, what: str, newline: str = "") -> Iterator[TextIO]:
    """Open a file as UTF-8 text with or without a byte order mark. Bytes that are not UTF-8 are kept, as in paths."""
    try:
        with open(file, encoding="utf-8-sig", errors="surrogateescape", newline=newline) as stream:
            yield stream
    except (OSError, csv.Error) as error:
        raise UserError(f"{what} cannot be read ({getattr(error, 'strerror', error)})") from None


def _find_files(names: Sequence[str], file: str, what: str) -> list[str]:
    """Find the files that a table or list names."""
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
    """Find a file by its name as it is written, or else without spaces around it."""
    for spelling in (name, name.strip()):
        for path in (spelling, os.path.join(folder, spelling)):
            if os.path.exists(path):
                return path
    return None


# --- what the programs call ---------------------------------------------------------------------------------


def paths_of(source: str) -> list[str]:
    """List the images of a folder (`find_images`) or of a text list (`list_paths`)."""
    return find_images(source) if os.path.isdir(source) else list_paths(source)


def labelled_items(
    real_roots: Sequence[str] | None,
    fake_roots: Sequence[str] | None,
    tree: str | None = None,
    csv_file: str | None = None,
    flags: Sequence[str] = FLAGS,
    training: bool = False,
) -> list[Item]:
    """List labelled images, which must be given in one of three ways: folders, a tree, or a CSV table.

    Args:
        flags: the options for real_roots and fake_roots, for error messages.
        training: see `tree_items`.

    Raises:
        UserError: also if a file is listed both as real and as generated.
    """
    ways = [bool(real_roots or fake_roots), bool(tree), bool(csv_file)].count(True)
    if ways != 1:
        got = "images are given in more than one way" if ways else "no images are given"
        raise UserError(
            f"{got}: give {flags[0]} REAL and {flags[1]} GENERATED folders, or --data-root TREE, or --csv FILE"
            " (without labels: test.py --input)"
        )
    if tree:
        items = tree_items(tree, training)
    elif csv_file:
        items = csv_items(csv_file)
    elif real_roots and fake_roots:
        items = folder_items(real_roots, fake_roots)
    else:
        missing = flags[1] if real_roots else flags[0]
        raise UserError(f"expected real and generated images, got one class only: {missing} is missing")
    _refuse_files_in_both_classes(items)
    return items


def _refuse_files_in_both_classes(items: Sequence[Item]) -> None:
    """Raise a UserError if a file is listed as real and as generated, by its own name or by links."""
    first_with = {}  # (device, inode) -> item
    conflicts = []
    for item in items:
        try:
            status = os.stat(item.path)
        except OSError:  # reported when the image is read
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
    """Raise a UserError unless there are real and generated images.

    Args:
        what: the name of the set, such as "training images".
    """
    counts = Counter(item.label for item in items)
    if not counts[REAL] or not counts[FAKE]:
        got = f"{counts[REAL]} real and {counts[FAKE]} generated"
        raise UserError(f"{what} must contain both real and generated images, got {got}")


def input_items(paths: Sequence[str]) -> list[Item]:
    """List images without labels, in the given order: the images of folders, and files with any suffix."""
    found = []
    left_out = Counter()
    for path in map(os.fspath, paths):
        if not os.path.lexists(path):
            raise UserError(f"input {printable(path)} does not exist")
        if os.path.isdir(path):
            found += find_images(path)
        elif reason := recognise_output(path):
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


def list_digest(items: Sequence[Item]) -> str:
    """Describe a list of images by its counts and a hash of paths, labels and generators.

    The digest does not depend on the working folder.
    """
    real_folder = functools.cache(os.path.realpath)
    digest = hashlib.sha256()
    for path, label, generator in items:
        folder, name = os.path.split(path)
        line = f"{real_folder(folder)}/{name}\0{label}\0{generator}\n"
        digest.update(line.encode(errors="surrogateescape"))
    counts = Counter(item.label for item in items)
    return f"{len(items)} images ({counts[REAL]} real, {counts[FAKE]} generated), {digest.hexdigest()[:16]}"


def identities(items: Sequence[Item]) -> np.ndarray:
    """Compute hashes by which trained images are recognised. Returns int64 (N, 2): name and size, content."""
    rows = [(_name_hash(item.path), _content_hash(item.path)) for item in items]
    return np.array(rows, np.int64).reshape(-1, 2)


def count_trained_on(items: Sequence[Item], trained_on: np.ndarray) -> int:
    """Count the images whose `identities` are in trained_on. Only files of the same name and size are opened."""
    names = set(trained_on[:, 0].tolist())
    known = set(map(tuple, trained_on.tolist()))
    candidates = [(_name_hash(item.path), item.path) for item in items]
    return sum(name in names and (name, _content_hash(path)) in known for name, path in candidates)


def _name_hash(path: str) -> int:
    size = os.path.getsize(path) if os.path.isfile(path) else -1
    return _hash(f"{os.path.basename(path)}\0{size}".encode(errors="surrogateescape"))


def _content_hash(path: str) -> int:
    """Hash 64 bytes in the middle of a file."""
    with open(path, "rb") as file:
        file.seek(os.path.getsize(path) // 2)
        return _hash(file.read(64))


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)
