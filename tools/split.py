"""Keep some images for validation and calibration, the same ones whenever it is asked.

    python -m tools.split --data-root-pos REAL_DIR --data-root-neg GENERATED_DIR [...] --out DIR [--hold-out 0.2]

Writes DIR/train.csv and DIR/held_out.csv (path,label,generator: for --csv and --val-csv), and the reals of either as
train_real.txt and held_out_real.txt (for train_sr.py). Which images are held out depends on their names alone: it does
not change when others are added.
"""

import csv
import io
import os
import sys
import zlib
from collections.abc import Sequence

from data.lists import Item, labelled_items
from utils import options
from utils.errors import UserError, run_program
from utils.files import atomic, make_folder
from utils.labels import LABEL_NAMES, REAL


def write_set(items: Sequence[Item], folder: str, name: str) -> None:
    """The table of a set, and the list of its reals."""
    table = io.StringIO(newline="")
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(("path", "label", "generator"))
    rows.writerows((os.path.abspath(i.path), LABEL_NAMES[i.label], i.generator) for i in items)
    reals = "".join(f"{os.path.abspath(i.path)}\n" for i in items if i.label == REAL)
    for file_name, text in ((f"{name}_real.txt", reals), (f"{name}.csv", table.getvalue())):
        with atomic(os.path.join(folder, file_name)) as file:
            file.write(text.encode(errors="surrogateescape"))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = options.Parser("python -m tools.split", "Hold some images out.")
    parser.add_argument("--data-root-pos", nargs="+", required=True, metavar="DIR", help="folders of REAL images")
    parser.add_argument("--data-root-neg", nargs="+", required=True, metavar="DIR", help="folders of GENERATED images")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the lists go")
    parser.add_argument("--hold-out", type=float, default=0.2, metavar="SHARE", help="of the images (default: 0.2)")
    args = parser.parse_args(arguments)
    sets = {"held_out": [], "train": []}  # train.csv comes last: where it is, all is
    for item in labelled_items(args.data_root_pos, args.data_root_neg):
        checksum = zlib.crc32(os.path.basename(item.path).encode(errors="surrogateescape"))
        sets["held_out" if checksum < args.hold_out * 2**32 else "train"].append(item)
    out = make_folder(args.out)
    for name, chosen in sets.items():
        reals = sum(item.label == REAL for item in chosen)
        counts = f"{reals} real, {len(chosen) - reals} generated"
        if reals in (0, len(chosen)):
            raise UserError(f"--hold-out {args.hold_out:g}: some of each are wanted in {name}, not {counts}")
        write_set(chosen, out, name)
        sys.stdout.write(f"{name}: {counts}\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
