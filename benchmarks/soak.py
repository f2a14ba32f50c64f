"""Do memory and open files stay flat? Scores 10,000 tiny images by test.py, then trains a tiny detector for 500 steps.

    python -m benchmarks.soak [--small] [--out soak.json]

Both run as a user runs them, in processes of their own, which are watched from here through /proc (Linux). Prints a
table at equal steps of progress and a verdict; --out writes all samples as JSON. Exit status 1 if something grows.

Flat means: after the first fifth (caches fill, workers start), the largest resident memory of the main process and that
of its workers, each, grow by less than MEMORY_BOUND from the second fifth to the last, and open files by fewer than
FILES_BOUND.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from benchmarks.measure import ROOT
from models import RDN, Checkpoint, new_detector
from train_detector import detector_state

MEMORY_BOUND = 32.0  # MiB
FILES_BOUND = 8  # each batch on its way from a worker holds one open for a moment
SIDE = 32  # pixels of the images
BATCH, STEPS_AN_EPOCH = 8, 10
PAUSE = 0.25  # seconds between two looks
SHOWN = 10  # lines of a table
TINY = {"num_features": 4, "growth_rate": 4, "num_blocks": 1, "num_layers": 2}


class Sample(NamedTuple):
    """One look at a program: seconds since its start, images or steps done, resident MiB, open files, workers."""

    seconds: float
    done: int
    memory: float
    worker_memory: float
    files: int
    workers: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="300 images and 40 steps, to see that it works")
    parser.add_argument("--out", metavar="FILE", help="write the samples as JSON")
    args = parser.parse_args()
    images, steps = (300, 40) if args.small else (10_000, 500)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        prepare(folder, images)
        runs = {
            "scoring": watch(scoring(folder), rows_written(folder / ".scores.csv.0-of-1.part"), images),
            "training": watch(training(folder, steps), epochs_recorded(folder / "out" / "stats.jsonl"), steps),
        }
    flat = True
    for name, samples in runs.items():
        grown = growth(samples)
        flat &= is_flat(grown)
        sys.stdout.write("\n".join([f"== {name}", *table(samples), verdict(grown), ""]) + "\n")
    if args.out:
        about = {"torch": torch.__version__, "memory_bound_mib": MEMORY_BOUND, "flat": flat}
        rows = {name: [sample._asdict() for sample in samples] for name, samples in runs.items()}
        Path(args.out).write_text(json.dumps(about | {"samples": rows}, indent=1) + "\n")
    return 0 if flat else 1


def prepare(folder: Path, count: int) -> None:
    """`count` images of noise to score, some of real/ and fake/ to train on, and a tiny detector."""
    rng = np.random.default_rng(0)
    few = BATCH * STEPS_AN_EPOCH // 2
    for name, number in (("all", count), ("real", few), ("fake", few)):
        (folder / name).mkdir()
        for i in range(number):
            pixels = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:05d}.png", compress_level=1)
    torch.manual_seed(0)
    torch.save(RDN(**TINY).state_dict(), folder / "rdn.pth")
    rdn = Checkpoint(torch.load(folder / "rdn.pth"), "rdn.pth")
    detector = new_detector(rdn, {"arch": "resnet18", "stage": 0, "dilated": False}, "random")
    torch.save(detector_state(*detector), folder / "detector.pth.tar")


def scoring(folder: Path) -> list[str]:
    detector = str(folder / "detector.pth.tar")
    return ["test.py", "--resume", detector, "--input", str(folder / "all"), "--save_path", str(folder / "scores")]


def training(folder: Path, steps: int) -> list[str]:
    epochs = str(steps // STEPS_AN_EPOCH)
    return [
        "train_detector.py", "--fixed-sr", "--sr-weights-file", str(folder / "rdn.pth"), "--arch", "resnet18",
        "--no_dilation", "--batch-size", str(BATCH), "--epochs", epochs, "--save-every-epoch", epochs,
        "--data-root-pos", str(folder / "real"), "--data-root-neg", str(folder / "fake"),
        "--output-path", str(folder / "out"),
    ]  # fmt: skip


def watch(command: list[str], done: Callable[[], int], total: int) -> list[Sample]:
    """Samples of the program while it works on its images or steps; what it does before and after is left out."""
    began, samples = time.monotonic(), []
    run = subprocess.Popen(
        [sys.executable, *command, "--gpu", "cpu", "--workers", "2"],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},  # more threads only get in each other's way here
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        while run.poll() is None:
            count = done()
            if 0 < count < total and (sample := look(run.pid, time.monotonic() - began, count)):
                samples.append(sample)
            time.sleep(PAUSE)
    finally:
        run.kill()
        _, errors = run.communicate()
    if run.returncode != 0 or len(samples) < 5:
        raise SystemExit(f"{command[0]} ended with status {run.returncode} after {len(samples)} samples:\n{errors}")
    return samples


def look(pid: int, seconds: float, done: int) -> Sample | None:
    """A sample of the process and its children; None if it has just ended."""
    try:
        children = [
            int(c) for task in Path(f"/proc/{pid}/task").iterdir() for c in (task / "children").read_text().split()
        ]
        files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        workers = [resident(child) for child in children]
        return Sample(round(seconds, 2), done, resident(pid), sum(workers), files, len(workers))
    except OSError:
        return None


def resident(pid: int) -> float:
    """Resident memory in MiB (what is shared with other processes counts in each)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0  # a process that has ended and was not waited for yet


def rows_written(part: Path) -> Callable[[], int]:
    """Counts the images scored so far."""
    return lambda: max(part.read_bytes().count(b"\n") - 1, 0) if part.exists() else 0


def epochs_recorded(stats: Path) -> Callable[[], int]:
    """Counts the steps done so far, at the end of each epoch."""
    return lambda: STEPS_AN_EPOCH * stats.read_text().count("\n") if stats.exists() else 0


def growth(samples: list[Sample]) -> dict[str, float]:
    """Of memory, worker_memory (MiB) and files: the largest value in the last fifth less that in the second."""
    fifth = max(len(samples) // 5, 1)
    early, late = samples[fifth : 2 * fifth], samples[-fifth:]
    return {
        name: max(getattr(s, name) for s in late) - max(getattr(s, name) for s in early)
        for name in ("memory", "worker_memory", "files")
    }


def is_flat(grown: dict[str, float]) -> bool:
    return max(grown["memory"], grown["worker_memory"]) < MEMORY_BOUND and grown["files"] < FILES_BOUND


def table(samples: list[Sample]) -> list[str]:
    """At most SHOWN of the samples, at equal distances, the first and the last among them."""
    chosen = [samples[i] for i in np.linspace(0, len(samples) - 1, min(SHOWN, len(samples))).round().astype(int)]
    lines = [f"{'seconds':>8} {'done':>7} {'MiB':>8} {'workers MiB':>12} {'open files':>11}"]
    return lines + [
        f"{s.seconds:8.1f} {s.done:7d} {s.memory:8.1f} {s.worker_memory:12.1f} {s.files:11d}" for s in chosen
    ]


def verdict(grown: dict[str, float]) -> str:
    word = "flat" if is_flat(grown) else "NOT flat"
    return (
        f"{word}: from the second fifth to the last, memory {grown['memory']:+.1f} MiB, workers"
        f" {grown['worker_memory']:+.1f} MiB (bound: {MEMORY_BOUND:.0f} MiB), open files {grown['files']:+d}"
        f" (bound: {FILES_BOUND})"
    )


if __name__ == "__main__":
    sys.exit(main())
