"""Keep some images for validation and calibration, the same ones whenever it is asked.

    python -m data.split --data-root-pos REAL_DIR --data-root-neg GENERATED_DIR [...] --out DIR [--hold-out 0.2]

Writes DIR/train.csv and DIR/held_out.csv (path,label,generator: for --csv and --val-csv), and the reals of either as
train_real.txt and held_out_real.txt (for train_sr.py). Which images are held out depends on their names alone: it does
not change when others are added.
"""

import argparse
import csv
import io
import os
import sys
import zlib
from collections.abc import Sequence

from data.lists import Item, labelled_items
from utils.run import LABEL_NAMES, REAL, UserError, atomic, make_folder, run_program


def is_held_out(item: Item, share: float) -> bool:
    """Whether an image is among the share that is held out: by a checksum of its name."""
    return zlib.crc32(os.path.basename(item.path).encode(errors="surrogateescape")) < share * 2**32


def write_set(items: Sequence[Item], folder: str, name: str) -> None:
    """The table of a set, and the list of its reals."""
    table = io.StringIO(newline="")
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(("path", "label", "generator"))
    rows.writerows((os.path.abspath(i.path), LABEL_NAMES[i.label], i.generator) for i in items)
    reals = "".join(f"{os.path.abspath(i.path)}\n" for i in items if i.label == REAL)
    for file_name, text in ((f"{name}.csv", table.getvalue()), (f"{name}_real.txt", reals)):
        with atomic(os.path.join(folder, file_name)) as file:
            file.write(text.encode(errors="surrogateescape"))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data.split", description="Hold some images out.")
    parser.add_argument("--data-root-pos", nargs="+", required=True, metavar="DIR", help="folders of REAL images")
    parser.add_argument("--data-root-neg", nargs="+", required=True, metavar="DIR", help="folders of GENERATED images")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the lists go")
    parser.add_argument("--hold-out", type=float, default=0.2, metavar="SHARE", help="of the images (default: 0.2)")
    args = parser.parse_args(arguments)
    items = labelled_items(args.data_root_pos, args.data_root_neg)
    out = make_folder(args.out)
    sets = {"train": [i for i in items if not is_held_out(i, args.hold_out)]}
    sets["held_out"] = [i for i in items if is_held_out(i, args.hold_out)]
    for name, chosen in sets.items():
        counts = [sum(i.label == label for i in chosen) for label in range(len(LABEL_NAMES))]
        if not all(counts):
            raise UserError(f"--hold-out {args.hold_out:g} leaves {counts[REAL]} real and {counts[0]} generated images"
                            f" in {name}: some of each are wanted")  # fmt: skip
        write_set(chosen, out, name)
        sys.stdout.write(f"{name}: {counts[REAL]} real, {counts[0]} generated\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
