"""The benchmarks: `python -m benchmarks --list` says what there is, and which table of docs/performance.md each makes."""

import argparse
import inspect
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.networks import compare, gpu, training_memory
from benchmarks.programs import against, cached, files, small, soak, start
from utils.errors import run_program

BENCHMARKS = (compare, gpu, training_memory, cached, small, start, files, soak, against)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("name", nargs="?", choices=[b.__name__ for b in BENCHMARKS])
    add("old", nargs="?", metavar="OLD_CHECKOUT", type=Path, help="for `against`: another commit's checkout")
    add("--list", action="store_true", help="say what there is")
    add("--quick", action="store_true", help="toy sizes: to see that it works, in seconds")
    add("--rounds", type=int, default=3, metavar="N", help="times that all take turns; ratios are of each round (3)")
    add("--side", type=int, metavar="N", help="of the images, in pixels (default: see --list)")
    add("--stages", type=int, nargs="+", default=[0, 5], metavar="0..5", help="of the residual (0 5)")
    add("--count", type=int, metavar="N", help="images or files (default: see --list)")
    add("--precision", default="fp32", choices=("fp32", "bf16"), help="of `small` (fp32)")
    add("--only", default="", metavar="TEXT", help="of `against` and `training_memory`: rows whose names hold it")
    add("--gpu", metavar="N|cpu", help="of `gpu` (default: the first)")
    add("--out", metavar="FILE", help="write the tables as JSON, too")
    args = parser.parse_args(argv)
    chosen = next((b for b in BENCHMARKS if b.__name__ == args.name), None)
    if args.list or not chosen:
        sys.stdout.write("\n\n".join(f"{b.__name__}: {inspect.getdoc(b)}" for b in BENCHMARKS) + "\n")
        return 0
    args.rounds = 1 if args.quick else args.rounds
    processor = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    about = f"{time.strftime('%Y-%m-%d')}, {processor.split(': ')[-1]}, {torch.get_num_threads()} threads, torch"
    about += f" {torch.__version__}, load before {os.getloadavg()[0]:.1f}"  # above 0.3 the machine is not quiet
    with tempfile.TemporaryDirectory() as folder:
        tables = chosen(args, Path(folder))
    sys.stdout.write(f"{about}\n")
    for title, rows in tables.items():
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["".join(f"| {c.ljust(w)} " for c, w in zip(row, widths, strict=True)) + "|" for row in rows]
        lines.insert(1, "".join(f"|{'-' * (width + 2)}" for width in widths) + "|")  # Markdown
        sys.stdout.write("\n".join([f"\n**{title}**\n", *lines]) + "\n")
    if args.out:
        Path(args.out).write_text(json.dumps({"machine": about, "tables": tables}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
