"""Divide images into a training set and a held-out set for validation and calibration.

    python -m tools.split --data-root-pos REAL_DIR --data-root-neg GENERATED_DIR [...] --out DIR [--hold-out 0.2]

The program writes the lists DIR/train.csv and DIR/held_out.csv with the columns path,label,generator. For train_sr.py,
the program also writes DIR/train_real.txt and DIR/held_out_real.txt, which list only the real images. A checksum of the
file name decides whether an image is held out, so the image stays in the same set if the program runs again with more
images and the same --hold-out.
"""

import argparse
import csv
import hashlib
import io
import json
import logging
import os
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from data.lists import Item, list_labelled_images, require_real_and_fake_images
from utils import options
from utils.console import make_printable
from utils.errors import UserError, run_program
from utils.files import make_folder, open_for_atomic_write, write_json
from utils.labels import LABEL_NAMES, REAL

logger = logging.getLogger("tools.split")

SETS = ("train", "held_out")
RECORD = "split.json"
FORMAT = "beyond-the-spectrum split, version 1"


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    out = Path(args.out)
    check_that_lists_may_be_replaced(out, args.hold_out, args.overwrite)
    sets = split_by_file_name(list_labelled_images(args.data_root_pos, args.data_root_neg), args.hold_out)
    files = {}
    for name, items in sets.items():
        require_real_and_fake_images(items, f"the set {name} (with --hold-out {args.hold_out:g})")
        files[f"{name}.csv"] = make_csv_table(items)
        files[f"{name}_real.txt"] = make_list_of_real_images(items)
    make_folder(out)
    write_split_lists(out, files, args.hold_out)
    for name, items in sets.items():
        reals = sum(item.label == REAL for item in items)
        sys.stdout.write(f"{name}: {reals} real, {len(items) - reals} fake\n")
    return 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = options.Parser(
        "python -m tools.split", "Divide images into a training set and a held-out set for validation and calibration."
    )
    add = parser.add_argument
    add("--data-root-pos", nargs="+", required=True, metavar="DIR", help="folders of real images")
    add(
        "--data-root-neg",
        nargs="+",
        required=True,
        metavar="DIR",
        help="folders of fake images, one folder per generator",
    )
    add("--out", required=True, metavar="DIR", help="folder into which the lists are written")
    text = "fraction of the images to hold out, between 0 and 1 (default: %(default)s)"
    add("--hold-out", type=float, default=0.2, metavar="X", help=text)
    add("--overwrite", action="store_true", help="replace lists that were made with a different value of --hold-out")
    args = parser.parse_args(arguments)
    if not 0 < args.hold_out < 1:
        parser.error(f"--hold-out must be above 0 and below 1, got {args.hold_out:g}")
    return args


def check_that_lists_may_be_replaced(out: Path, hold_out: float, overwrite: bool) -> None:
    """Raise a UserError if the output folder contains a list that the program did not write, or that somebody edited.

    Args:
        overwrite: whether the program may replace lists that were made with a different value of --hold-out.
    """
    names = [f"{name}{ending}" for name in SETS for ending in (".csv", "_real.txt")]
    present = [name for name in (*names, RECORD) if os.path.lexists(out / name)]
    if not present:
        return
    record = read_split_json(out / RECORD)
    own = record.get("format") == FORMAT
    for name in present:
        if not own or (name != RECORD and hash_file(out / name) not in record["files"].get(name, [])):
            raise UserError(
                f"{make_printable(out / name)} was not written by this program, or was edited: give another --out"
                " folder, or remove the file"
            )
    if record["hold_out"] != hold_out and not overwrite:
        raise UserError(
            f"the lists in {make_printable(out)} were made with --hold-out {record['hold_out']:g}, not --hold-out"
            f" {hold_out:g}: give another --out folder, or add --overwrite to replace the lists"
        )


def read_split_json(path: Path) -> dict:
    """Read split.json. Returns {} if the file cannot be read."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def hash_file(path: Path) -> str:
    """Compute the SHA-256 hash of a file. Returns "" if the file cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


def split_by_file_name(items: Sequence[Item], hold_out: float) -> dict[str, list[Item]]:
    """Divide images into the sets "train" and "held_out" by a checksum of their file names.

    Raises:
        UserError: if a path contains a line break, because a list has one path per line.
    """
    sets = {name: [] for name in SETS}
    for item in items:
        if "\n" in os.path.abspath(item.path) or "\r" in os.path.abspath(item.path):
            raise UserError(f"the path {make_printable(item.path)} contains a line break: rename the file")
        checksum = zlib.crc32(os.fsencode(os.path.basename(item.path)))  # 0 to 2^32 - 1
        name = "held_out" if checksum < hold_out * 2**32 else "train"
        sets[name].append(item)
    return sets


def make_csv_table(items: Sequence[Item]) -> bytes:
    """Make the content of a CSV file that lists images with absolute paths, labels and generators."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("path", "label", "generator"))
    for item in items:
        writer.writerow((os.path.abspath(item.path), LABEL_NAMES[item.label], item.generator))
    return text.getvalue().encode(errors="surrogateescape")  # a path may contain bytes that are not UTF-8


def make_list_of_real_images(items: Sequence[Item]) -> bytes:
    """Make the content of a text file that lists the real images, with one absolute path per line."""
    lines = [os.path.abspath(item.path) + "\n" for item in items if item.label == REAL]
    return "".join(lines).encode(errors="surrogateescape")


def write_split_lists(out: Path, files: Mapping[str, bytes], hold_out: float) -> None:
    """Write the lists, and split.json with their SHA-256 hashes.

    While the program writes the lists, split.json contains the hashes of the old and the new version of each list, so
    that the program recognises both as its own after an interruption.
    """
    old = read_split_json(out / RECORD).get("files", {})
    new = {name: [hashlib.sha256(content).hexdigest()] for name, content in files.items()}
    both = {name: new[name] + old.get(name, []) for name in new}
    record = {"format": FORMAT, "hold_out": hold_out}
    write_json(out / RECORD, {**record, "files": both})
    # held_out.csv is written last, because script/train_folders.sh regards the lists as complete if held_out.csv exists
    for name in sorted(files, reverse=True):
        with open_for_atomic_write(os.path.realpath(out / name)) as file:
            file.write(files[name])
    write_json(out / RECORD, {**record, "files": new})


if __name__ == "__main__":
    sys.exit(run_program(main))
