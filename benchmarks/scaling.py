"""How do time and memory of scoring grow with the size of an image, and with the number of images?

    python -m benchmarks.scaling [--small] [--sides 256 512 1024 2048] [--counts 10 100 1000 10000]
                                 [--stage 0] [--precision fp32] [--out FILE]

Both through test.py as a user runs it, in a process of its own: one image of noise of each size by networks of full size
(random weights: neither time nor memory depends on them), then folders of so many tiny images by tiny networks, which
shows what the program itself costs for each. Seconds are those of the whole program; the last column is what a further
pixel, or image, takes: the differences between a row and the one before.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.measure import ROOT, report, table
from models import RDN, Checkpoint, new_detector
from train_detector import detector_state

TINY = {"num_features": 4, "growth_rate": 4, "num_blocks": 1, "num_layers": 2}
TINY_SIDE = 32  # pixels
KIB_A_GIB = 2**20


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--small", action="store_true", help="tiny networks, small images and counts, to see that it works"
    )
    parser.add_argument("--sides", type=int, nargs="*", default=[256, 512, 1024, 2048], metavar="N", help="in pixels")
    parser.add_argument("--counts", type=int, nargs="*", default=[10, 100, 1000, 10_000], metavar="N", help="of images")
    parser.add_argument("--stage", type=int, default=0, metavar="0..5", help="of the residual (0)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="(fp32)")
    parser.add_argument("--tile", type=int, metavar="N", help="as test.py's")
    parser.add_argument("--out", metavar="FILE", help="write the numbers as JSON")
    args = parser.parse_args(argv)
    sides, counts = ([32, 64], [2, 4]) if args.small else (args.sides, args.counts)
    flags = ["--precision", args.precision, *(["--tile", str(args.tile)] if args.tile else [])]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        tiny = save_detector(folder / "tiny.pth.tar", TINY, "resnet18", 0)
        full = tiny if args.small else save_detector(folder / "full.pth.tar", {}, "resnet50", args.stage)
        by_side = {side: score(full, noise(folder / f"side{side}", 1, side), flags) for side in sides}
        by_count = {n: score(tiny, noise(folder / f"count{n}", n, TINY_SIDE), flags) for n in counts}
    rows = [["one image of", "seconds", "GiB at most", "seconds a further megapixel"]]
    rows += lines(by_side, lambda side: f"{side} x {side}", lambda side: side**2 / 1e6)
    text = f"stage {args.stage}, {args.precision}\n" + table(rows)
    rows = [[f"images of {TINY_SIDE} x {TINY_SIDE}", "seconds", "GiB at most", "ms a further image"]]
    rows += lines(by_count, lambda count: f"{count}", lambda count: count / 1e3)
    report(f"{text}\n{table(rows)}", {"settings": vars(args), "by_side": by_side, "by_count": by_count}, args.out)
    return 0


def lines(measured: dict[int, dict[str, float]], name, size) -> list[list[str]]:
    """Rows of a table; `size` is what the growth is related to."""
    rows, before = [], None
    for n, got in measured.items():
        further = ""
        if before is not None:
            further = f"{(got['seconds'] - measured[before]['seconds']) / (size(n) - size(before)):.2f}"
        rows.append([name(n), f"{got['seconds']:.1f}", f"{got['memory']:.2f}", further])
        before = n
    return rows


def save_detector(path: Path, shape: dict, arch: str, stage: int) -> Path:
    """A detector with random weights, as train_detector.py would write it."""
    torch.manual_seed(0)
    rdn = Checkpoint(RDN(**shape).state_dict(), "new")
    torch.save(detector_state(*new_detector(rdn, {"arch": arch, "stage": stage, "dilated": False}, "random")), path)
    return path


def noise(folder: Path, count: int, side: int) -> Path:
    """A folder of images of noise."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:05d}.png", compress_level=1)
    return folder


def score(detector: Path, images: Path, flags: list[str]) -> dict[str, float]:
    """Seconds, and GiB resident at most in the main process, of test.py on a folder of images."""
    began = time.perf_counter()
    command = [sys.executable, "test.py", "--gpu", "cpu", "--workers", "1", "--resume", str(detector), *flags]
    command += ["--input", str(images), "--save_path", str(images.parent / "scores" / images.name)]
    with (images.parent / f"{images.name}.log").open("w+b") as log:
        run = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        _, status, usage = os.wait4(run.pid, 0)
        run.returncode = os.waitstatus_to_exitcode(status)  # or Popen would wait for it again
        if run.returncode:
            log.seek(0)
            raise SystemExit(f"test.py ended with status {run.returncode}: {log.read().decode()}")
    return {"seconds": time.perf_counter() - began, "memory": usage.ru_maxrss / KIB_A_GIB}


if __name__ == "__main__":
    sys.exit(main())
