"""What does the residual cache of `train_detector.py --fixed-sr` save? Times epochs without it, filling it, and from it.

    python -m benchmarks.cached_epoch [--small] [--data-root-pos DIR --data-root-neg DIR] [--out cached_epoch.json]

Trains by the program itself for two epochs that mirror the same images, with --no-cache and with the cache, in turn, and
times the epochs' steps: with the cache the first epoch computes all residuals, the second reads them all. Networks are of
full size, RDN's weights random: the time does not depend on them. Prints a table, and how far the losses differ: in half
precision by what a new classifier in training, batches of two normalised, makes of any noise of 2^-11.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

import train_detector
from data.images import FAKE, ImageDataset, Item, SizePolicy
from models import RDN

EPOCHS = 2
KINDS = ("without", "with cache")
SMALL = {"num_features": 16, "growth_rate": 16, "num_blocks": 4, "num_layers": 4}
SMALL_SIDE = 128


class Epoch(NamedTuple):
    """Seconds on the clock and of processor time, and the loss."""

    seconds: float
    cpu_seconds: float
    loss: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="one round, small networks, noise: to see that it works")
    parser.add_argument("--data-root-pos", default="data/CelebA", metavar="DIR", help="real images (data/CelebA)")
    parser.add_argument("--data-root-neg", default="data/CelebA_ProGAN", metavar="DIR", help="(data/CelebA_ProGAN)")
    parser.add_argument("--images", type=int, default=1, metavar="N", help="of each class (1)")
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 5], metavar="0..5", help="(0 5)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="times that the two take turns (3)")
    parser.add_argument("--cache-precision", choices=("fp16", "fp32"), default="fp16", help="(fp16)")
    parser.add_argument(
        "--alone", action="store_true",
        help="without a cache, too, compute each residual alone (--micro-batch 1): with --cache-precision fp32 the losses"
        " are then the same, bit for bit",
    )  # fmt: skip
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the networks (fp32)")
    parser.add_argument("--out", metavar="FILE", help="write all times as JSON")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        roots = None if args.small else {"real": Path(args.data_root_pos), "fake": Path(args.data_root_neg)}
        prepare(folder, roots, args.images, SMALL_SIDE, args.small)
        flags = ["--precision", args.precision, "--cache-precision", args.cache_precision]
        flags += program_flags(args.images, args.small)
        rounds, without = 1 if args.small else args.rounds, ["--micro-batch", "1"] if args.alone else []
        stages = {stage: measure(folder, stage, rounds, flags, without) for stage in args.stages}
    sys.stdout.write("\n".join(table(stages)) + "\n")
    if args.out:
        about = vars(args) | {"torch": torch.__version__, "threads": torch.get_num_threads()}
        runs = {s: {k: [[e._asdict() for e in r] for r in runs[k]] for k in KINDS} for s, runs in stages.items()}
        Path(args.out).write_text(json.dumps(about | {"runs": runs}, indent=1) + "\n")
    return 0


def program_flags(count: int, small: bool) -> list[str]:
    """The classifier, and a seed by which both epochs mirror the same of `count` images of either class."""
    return ["--arch", "resnet18" if small else "resnet50", "--seed", str(repeating_seed(2 * count))]


def prepare(folder: Path, roots: dict[str, Path] | None, count: int, side: int, small: bool) -> None:
    """`count` images of either class, the first of the folders given or noise of a side, and an RDN."""
    rng = np.random.default_rng(0)
    for name in ("real", "fake"):
        (folder / name).mkdir()
        files = sorted(p for p in roots[name].iterdir() if p.suffix == ".png")[:count] if roots else []
        for path in files:
            (folder / name / path.name).symlink_to(path.resolve())
        for i in range(count if not roots else 0):
            pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    torch.manual_seed(0)
    torch.save(RDN(**(SMALL if small else {})).state_dict(), folder / "rdn.pth")


def repeating_seed(count: int) -> int:
    """A seed by which both epochs mirror the same images."""
    items = [Item("", FAKE, "")] * count
    for seed in itertools.count():
        images = ImageDataset(items, SizePolicy(), flip=True, seed=seed)
        first, second = ([images.mirrored(epoch, i) for i in range(count)] for epoch in range(EPOCHS))
        if first == second:
            return seed


def measure(
    folder: Path, stage: int, rounds: int, flags: list[str], without: list[str]
) -> dict[str, list[list[Epoch]]]:
    """`rounds` runs of each kind, in turn. without: more flags for the run without a cache."""
    runs = {kind: [] for kind in KINDS}
    for i in range(rounds):
        for kind in KINDS:
            more = ["--no-cache", *without] if kind == "without" else []
            run = train(folder, folder / f"stage{stage}_{i}_{kind}", ["--idx-stages", str(stage), *flags, *more])
            logging.info("stage %d, %s: %s", stage, kind, run)
            runs[kind].append(run)
    return runs


def train(folder: Path, out: Path, flags: list[str]) -> list[Epoch]:
    """Train by `train_detector.main`, and time the steps of each epoch."""
    real, times = train_detector.train_one_epoch, []

    def timed(*arguments):
        start = time.perf_counter(), time.process_time()
        real(*arguments)
        times.append((time.perf_counter() - start[0], time.process_time() - start[1]))

    train_detector.train_one_epoch = timed
    try:
        train_detector.main([
            "--fixed-sr", "--no_dilation", "--sr-weights-file", str(folder / "rdn.pth"), "--vgg-weights", "random",
            "--data-root-pos", str(folder / "real"), "--data-root-neg", str(folder / "fake"), "--gpu", "cpu",
            "--workers", "0", "--batch-size", "2", "--epochs", str(EPOCHS), "--output-path", str(out), *flags,
        ])  # fmt: skip
    finally:
        train_detector.train_one_epoch = real
    lines = (out / "stats.jsonl").read_text().splitlines()
    return [Epoch(*seconds, json.loads(line)["loss"]) for seconds, line in zip(times, lines, strict=True)]


def table(stages: dict[int, dict[str, list[list[Epoch]]]]) -> list[str]:
    """For each stage: medians of the seconds and of the ratios within each round, and the largest difference of losses."""
    lines = [
        f"{'stage':>5} {'epoch':>22} {'without':>9} {'with':>9} {'faster':>8} {'by cpu time':>12} {'loss differs by':>16}"
    ]
    for stage, runs in stages.items():
        for epoch, name in enumerate(("first: all computed", "second: all cached")):
            pairs = [(a[epoch], b[epoch]) for a, b in zip(*runs.values(), strict=True)]
            before, after = (statistics.median(pair[i].seconds for pair in pairs) for i in (0, 1))
            faster = statistics.median(a.seconds / b.seconds for a, b in pairs)
            cpu_faster = statistics.median(a.cpu_seconds / b.cpu_seconds for a, b in pairs)
            differs = max(abs(a.loss - b.loss) / abs(a.loss) for a, b in pairs)
            lines.append(
                f"{stage:5d} {name:>22} {before:7.2f} s {after:7.2f} s {faster:8.2f} {cpu_faster:12.2f} {differs:16.1e}"
            )
    return lines


if __name__ == "__main__":
    sys.exit(main())
