"""What the benchmarks share: taking turns, peak memory in a process of its own, tables."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]


class Times(NamedTuple):
    """Medians, in seconds: on the clock, and of processor time, which other programs on the machine disturb less."""

    seconds: float
    cpu_seconds: float


def in_turn(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, Times]:
    """Time each once in every round, so that whatever else the machine does falls on all of them alike."""
    clock = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            began = time.perf_counter(), time.process_time()
            run()
            clock[name].append((time.perf_counter() - began[0], time.process_time() - began[1]))
    return {name: Times(*map(statistics.median, zip(*times, strict=True))) for name, times in clock.items()}


def memory(field: str) -> float:
    """MiB of this process: "VmRSS" resident now, "VmHWM" the most there has been since `forget_peak` (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak_of(run: Callable[[], object]) -> dict[str, float]:
    """MiB resident before `run` and at most during it, and its seconds. For a process that does nothing else."""
    forget_peak()
    before, began = memory("VmRSS"), time.perf_counter()
    run()
    return {"before": before, "peak": memory("VmHWM"), "seconds": time.perf_counter() - began}


def in_own_process(module: str, **settings) -> dict:
    """What `python -m MODULE --one JSON` writes: one JSON object on its last line. None of what it used stays here."""
    command = [sys.executable, "-m", module, "--one", json.dumps(settings)]
    run = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONWARNINGS": "ignore"}
    )
    if run.returncode != 0:
        reason = run.stderr.strip().splitlines()[-1] if run.stderr.strip() else "no word; out of memory?"
        return {"error": f"ended with status {run.returncode}: {reason}"}
    return json.loads(run.stdout.splitlines()[-1])


def table(rows: list[list[str]]) -> str:
    """Rows of text in columns, the first row above a line, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]]) + "\n"


def report(text: str, results: dict, out: str | None) -> None:
    """The table on screen; with --out all numbers as JSON."""
    sys.stdout.write(text)
    if out:
        about = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
        Path(out).write_text(json.dumps({"about": about, **results}, indent=1) + "\n")
