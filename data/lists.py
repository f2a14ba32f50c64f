"""Which images there are: folders, trees of folders, tables and text lists -> `Item`s. None is opened here.

Whatever is wrong with a folder or list is a `UserError`. An image costs its path and about 100 bytes.
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
from itertools import count, permutations
from typing import NamedTuple, TextIO

import numpy as np

from utils.console import printable
from utils.errors import UserError
from utils.labels import FAKE, REAL

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
LABELS = {"real": REAL, "fake": FAKE, "1": REAL, "0": FAKE}  # of a table
# (real, fake) folders of a tree. Sources: Wang et al. (CVPR 2020), "CNN-generated images are surprisingly easy to
# spot... for now"; Zhu et al. (NeurIPS 2023), "GenImage".
LAYOUTS = (("0_real", "1_fake"), ("nature", "ai"))
FLAGS = ("--data-root-pos", "--data-root-neg")
Roots = Sequence[str] | None


class Item(NamedTuple):
    """An image to read. label: FAKE, REAL or None; generator: what made it, "" for reals shared by all."""

    path: str
    label: int | None
    generator: str


def find_images(root: str, others: Counter | None = None) -> list[str]:
    """All images in a folder and those below it, known by suffix in any case, sorted by path (plain string order).

    Hidden files and folders and __MACOSX are left out. Links are followed; a folder that can be reached in several
    ways, or holds a link to its own parent, is read once. others: gets the number of other files of each suffix.
    """

    def fail(error: OSError):
        raise UserError(f"image folder {printable(str(error.filename))} cannot be read ({error.strerror})")

    found, left_out, seen = [], Counter(), set()
    for folder, folders, names in os.walk(os.fspath(root), onerror=fail, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(f for f in folders if f[0] != "." and f != "__MACOSX")
        for name in names:
            if name.lower().endswith(IMAGE_SUFFIXES) and name[0] != ".":
                found.append(os.path.join(folder, name))
            elif name[0] != ".":
                left_out[os.path.splitext(name)[1].lower() or "without suffix"] += 1
    if not found:
        wanted, got = " ".join(IMAGE_SUFFIXES), _counted(left_out) or "no files"
        raise UserError(f"no images in folder {printable(root)}: files ending {wanted} are wanted, and it holds {got}")
    if others is not None:
        others.update(left_out)
    return sorted(found)


def _counted(others: Counter) -> str:
    """Such as "3 .heic, 1 .gif"."""
    return ", ".join(f"{n} {printable(suffix)}" for suffix, n in others.most_common(9)) + ", ..." * (len(others) > 9)


def folder_items(real_roots: Sequence[str], fake_roots: Sequence[str]) -> list[Item]:
    """Images of some folders that share none: the sorted reals, then the sorted fakes.

    Each folder of fakes is a generator, named after it with as much of its path as tells it from the others.
    """
    roots = [*real_roots, *fake_roots]
    if not roots:
        raise UserError("no image folders: give at least one of real or of generated images")
    places = {root: os.path.join(os.path.realpath(root), "") for root in roots}
    for inner, outer in permutations(roots, 2):
        if places[inner].startswith(places[outer]):
            way_out = "its images would count twice; give folders that share none"
            raise UserError(f"image folder {printable(inner)} is or lies in {printable(outer)}: {way_out}")
    parts = [os.path.abspath(root).split(os.sep) for root in fake_roots]
    n = next(n for n in count(1) if len({tuple(p[-n:]) for p in parts}) == len(parts))
    sources = [(root, REAL, "") for root in real_roots]
    sources += [(root, FAKE, "/".join(p[-n:])) for root, p in zip(fake_roots, parts, strict=True)]
    return [Item(path, label, name) for root, label, name in sources for path in find_images(root)]


def tree_items(root: str) -> list[Item]:
    """Images of a tree of folders 0_real and 1_fake, or else nature and ai: the sorted reals, then the sorted fakes.

    GENERATOR/0_real, GENERATOR/CATEGORY/0_real, or 0_real at the top, which takes the name of `root`. Reals carry the
    name of the generator they are to be compared with.
    """
    paths, at_top = find_images(root), os.path.basename(os.path.abspath(root))
    for names in LAYOUTS:
        items = []
        for path in paths:
            folders = path.removeprefix(root).strip(os.sep).split(os.sep)[:-1]
            if name := next((f for f in folders if f in names), None):
                generator = at_top if folders[0] == name else folders[0]
                items.append(Item(path, REAL if name == names[0] else FAKE, sys.intern(generator)))
        if items:
            return sorted(items, key=lambda item: item.label == FAKE)  # and otherwise in the order they are in
    wanted = "GENERATOR/0_real and GENERATOR/1_fake (or nature and ai) are wanted"
    way_out = "name plain folders with --data-root-pos and --data-root-neg"
    raise UserError(f"image tree {printable(root)} has no images in folders 0_real or 1_fake: {wanted}; {way_out}")


def csv_items(file: str) -> list[Item]:
    """Images of a table with the columns path, label (real or fake; 1 = real, 0 = fake) and perhaps generator.

    Paths are relative to the working folder or, where nothing is there, to the table's own. Other columns are ignored.
    """
    what, rows = f"image table {printable(file)}", []
    with _text_file(file, what) as stream:
        reader = csv.DictReader(stream, strict=True)
        reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or []]
        if not {"path", "label"} <= set(reader.fieldnames):
            got = printable(",".join(reader.fieldnames)[:100])
            raise UserError(f"{what}, line 1: a header path,label or path,label,generator was wanted, got {got!r}")
        for row in reader:
            name, label, generator = ((row.get(column) or "").strip() for column in ("path", "label", "generator"))
            if not name or label.lower() not in LABELS or None in row:  # None: DictReader's key for what is left over
                wanted = "a path (in quotes, if it holds a comma) and a label real or fake (or 1 = real, 0 = fake)"
                got = printable(", ".join(str(value) for value in row.values())[:100])
                raise UserError(f"{what}, line {reader.line_num}: {wanted} were wanted, got {got}")
            rows.append((name, sys.intern(label.lower()), sys.intern(generator)))
    paths = _located([name for name, _, _ in rows], file, what)
    if any(label.isdecimal() for _, label, _ in rows):
        text = "%s: numbers are read as 1 = real, 0 = fake; if 1 is to mean fake, write the words real and fake"
        logger.warning(text, what)
    return [Item(path, LABELS[label], generator) for path, (_, label, generator) in zip(paths, rows, strict=True)]


def list_paths(file: str) -> list[str]:
    """The paths in a text file, one a line, relative to the working folder or, where nothing is there, the file's."""
    what = f"image list {printable(file)}"
    with _text_file(file, what) as stream:
        return _located([line.strip() for line in stream if line.strip()], file, what)


@contextmanager
def _text_file(file: str, what: str) -> Iterator[TextIO]:
    """The file, open for reading as UTF-8 (with or without a mark)."""
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:
            yield stream
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = "no UTF-8 text" if isinstance(error, UnicodeDecodeError) else getattr(error, "strerror", error)
        raise UserError(f"{what} cannot be read ({reason})") from None


def _located(names: Sequence[str], file: str, what: str) -> list[str]:
    """Each name as a path from the working folder or, where nothing is there, from the folder of `file`."""
    folder = os.path.dirname(file)
    paths = [next(filter(os.path.exists, (name, os.path.join(folder, name))), None) for name in names]
    if not names:
        raise UserError(f"{what} names no images")
    if None in paths:
        text = f"{paths.count(None)} of its {len(names)} files do not exist, the first is"
        where = "looked for in the working folder and beside the list"
        raise UserError(f"{what}: {text} {printable(names[paths.index(None)])} ({where})")
    return paths


def paths_of(source: str) -> list[str]:
    """The images of a folder (`find_images`) or of a text list (`list_paths`)."""
    return find_images(source) if os.path.isdir(source) else list_paths(source)


def labelled_items(
    real_roots: Roots, fake_roots: Roots, tree: str | None = None, csv_file: str | None = None, flags: Sequence = FLAGS
) -> list[Item]:
    """The items of whichever of the three ways to name labelled images was used: folders, a tree, or a CSV list.

    flags: what the user calls real_roots and fake_roots, of which both are wanted or none.
    """
    ways = sum(map(bool, (real_roots or fake_roots, tree, csv_file)))
    if ways != 1:
        got = "images named in more than one way" if ways else "no images"
        wanted = f"{flags[0]} REAL and {flags[1]} GENERATED folders, or --data-root TREE, or --csv FILE"
        raise UserError(f"{got}: give {wanted} (without labels: test.py --input)")
    if tree:
        return tree_items(tree)
    if csv_file:
        return csv_items(csv_file)
    if not real_roots or not fake_roots:
        missing = flags[1] if real_roots else flags[0]
        raise UserError(f"one class only: {missing} is missing; real and generated images are wanted")
    return folder_items(real_roots, fake_roots)


def input_items(paths: Sequence[str]) -> list[Item]:
    """Unlabelled images: files of any name, and the images of folders, in the order given."""
    items, others = [], Counter()
    for path in paths:
        if not os.path.lexists(path):
            raise UserError(f"input {printable(path)} does not exist")
        found = find_images(path, others) if os.path.isdir(path) else [os.fspath(path)]
        items += [Item(p, None, "") for p in found]
    if others:
        text = "left out of the folders: %s (read are %s, and any file named itself)"
        logger.warning(text, _counted(others), " ".join(IMAGE_SUFFIXES))
    return items


def list_digest(items: Sequence[Item]) -> str:
    """What tells one list of images from another, whatever folder it was written from: count, and a hash of places."""
    place = functools.cache(os.path.realpath)
    digest = hashlib.sha256()
    for path, label, generator in items:
        folder, name = os.path.split(path)
        digest.update(f"{place(folder)}/{name}\0{label}\0{generator}\n".encode(errors="surrogateescape"))
    fakes, reals = (sum(item.label == label for item in items) for label in (FAKE, REAL))
    return f"{len(items)} images ({reals} real, {fakes} generated), {digest.hexdigest()[:16]}"


def identities(items: Sequence[Item]) -> np.ndarray:
    """By what images that were trained on are known again, (N, 2) int64: name and size; some bytes in the middle."""
    return np.array([(_name_and_size(item.path), _middle(item.path)) for item in items], np.int64).reshape(-1, 2)


def count_trained_on(items: Sequence[Item], seen: np.ndarray) -> int:
    """How many of the images are among those of which `seen` has the `identities`; few files are opened for it."""
    names, known = set(seen[:, 0].tolist()), set(map(tuple, seen.tolist()))
    merge_equal_sizes = ((name, item.path) for item in items if (name := _name_and_size(item.path)) in names)
    return sum((name, _middle(path)) in known for name, path in merge_equal_sizes)


def _name_and_size(path: str) -> int:
    try:
        size = os.stat(path).st_size
    except OSError:
        size = -1
    return _number(f"{os.path.basename(path)}\0{size}".encode(errors="surrogateescape"))


def _middle(path: str) -> int:
    with open(path, "rb") as file:
        file.seek(os.fstat(file.fileno()).st_size // 2)
        return _number(file.read(64))


def _number(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)
