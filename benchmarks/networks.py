"""The networks by themselves: speed and memory, against the same networks written plainly, on CPU and GPU."""

import json
import shlex
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import forms
from benchmarks.forms import CPU_FORMS, GPU_FORMS, Case
from benchmarks.measure import ROOT, Tables, in_turn, median, program, ratio
from utils.compute import choose_device
from utils.errors import UserError

HEADER = "||seconds|plain / it|plain channels-last / it|matrix product / it|GPU GiB at most".split("|")
VARIANTS = {  # of training_memory: form, images, all maps kept, micro-batch
    "plain": ("plain channels-last fp32", 1, True, None),
    "maps kept": ("ours fp32", 1, True, None),
    "as it is": ("ours fp32", 1, False, None),
    "--precision bf16": ("ours bf16", 1, False, None),
    "bf16, 2 images": ("ours bf16", 2, False, None),
    "bf16, 2 images, --micro-batch 1": ("ours bf16", 2, False, 1),
}


def compare(args: Namespace, _: Path) -> Tables:
    """How fast is this code, and how much memory does it take? Tables "Scoring and steps on a CPU", "Memory of scoring".

    python -m benchmarks compare [--rounds 3] [--side 1024] [--stages 0 5]
    "plain" is what one would write, "plain channels-last" has the two lines everybody adds (memory order and autocast),
    "matrix product" what direct convolution takes at the rate of this machine's product of two large matrices.
    """
    rows, peaks = [HEADER], [["", "", "GiB at most", "it / plain"]]
    for case in cases(args, [64 if args.quick else args.side or 1024], [1], "cpu"):
        rows += scoring(case, CPU_FORMS, args.rounds)
        rows += steps(case, forms.training_step, "--fixed-sr step", CPU_FORMS, args.rounds)
        peaks += memory(case, {form: ("scorer", form, case) for form in CPU_FORMS})
    patches = Case(0, 16 if args.quick else forms.PATCH_SIDE, forms.PATCHES, args.quick)
    rows += steps(patches, forms.sr_step, "train_sr.py step", CPU_FORMS, args.rounds)
    return {"Scoring and steps on a CPU": [row[:-1] for row in rows], "Memory of scoring": peaks}


def training_memory(args: Namespace, _: Path) -> Tables:
    """A step of --mode-sr denoising. Table "Memory of end-to-end training": python -m benchmarks training_memory"""
    rows = [["", "", "GiB at most", "it / plain"]]
    for case in cases(args, [64 if args.quick else args.side or 1024], [1], "cpu"):
        ways = {
            k: (form, case._replace(images=n), "denoising", *way)
            for k, (form, n, *way) in VARIANTS.items()
            if args.only in k
        }
        rows += memory(case, {name: ("training_step", *way) for name, way in ways.items()})
    return {"Memory of end-to-end training": rows}


def gpu(args: Namespace, _: Path) -> Tables:
    """All bars of a GPU, and tests/test_cuda.py. Tables "Scoring on a GPU", "Training on a GPU".

    python -m benchmarks gpu [--gpu N] [--rounds 5] [--side 1024] [--stages 0 5]     (--gpu cpu --quick: a trial)
    "plain tf32" is how the released programs ran (with cuDNN's autotuning). Wanted: bf16 3 and tf32 1.3 times as fast;
    "matrix product / it" at least 0.5 for bf16 on pixels; fine-tuning (6 images, --micro-batch 1) within 24 GB.
    """
    device = choose_device(args.gpu)
    if device.type == "cpu" and args.gpu != "cpu":
        raise UserError("no GPU that PyTorch can use: --gpu cpu --quick shows that the benchmark works")
    sides = [64] if args.quick else [args.side] if args.side else [256, 512, 1024]
    scores, training = [HEADER], [HEADER]
    for case in cases(args, sides, [1, 2] if args.quick else [1, 2, 4, 8, 16], args.gpu):
        scores += scoring(case, GPU_FORMS, args.rounds)
    patches = Case(0, 16 if args.quick else forms.PATCH_SIDE, forms.PATCHES, args.quick, args.gpu)
    training += steps(patches, forms.sr_step, "train_sr.py step", GPU_FORMS, args.rounds)
    for case in cases(args, sides[-1:], [6], args.gpu):
        training += steps(case, forms.training_step, "--fixed-sr step", GPU_FORMS, args.rounds)
        task = "denoising" if case.stage else "colorization"
        step = partial(forms.training_step, task=task, micro_batch=1)
        training += steps(case, step, f"--mode-sr {task} step", GPU_FORMS[3:5], args.rounds)
    if device.type == "cuda":
        subprocess.run([sys.executable, "-m", "pytest", "tests/test_cuda.py"], cwd=ROOT)
    return {"Scoring on a GPU": scores, "Training on a GPU": training}


def cases(args: Namespace, sides: list[int], batches: list[int], device: str | None) -> list[Case]:
    """One of each stage, side and batch."""
    stages = [0] if args.quick else args.stages
    return [Case(s, side, n, args.quick, device) for s in stages for side in sides for n in batches]


def memory(case: Case, contestants: dict[str, tuple]) -> list[list[str]]:
    """Resident memory at most of a process of each (a function of `forms` and what it is given), PyTorch included."""
    rows, plain = [], 0.0
    for name, call in contestants.items():
        try:
            gib = program(f"-m benchmarks.forms {shlex.quote(json.dumps(call))}").gib
            plain = plain or gib
            rows.append([str(case), name, f"{gib:.2f}", f"{gib / plain:.2f}"])
        except UserError as error:  # status -9: killed for want of memory
            sys.stderr.write(f"{error}\n")
            rows.append([str(case), name, "-", "-"])
    return rows


def scoring(case: Case, names: list[str], rounds: int) -> list[list[str]]:
    """Scoring in each form, and the matrix products that direct convolution amounts to."""
    order = 256 if case.quick else 4096 if case.gpu == "cpu" else 8192
    builders = {form: partial(forms.scorer, form, case) for form in names}
    for precision in dict.fromkeys(form.split()[-1] for form in names):
        builders[f"matrix product {precision}"] = partial(forms.matrix_product, precision, order, case)
    plain = forms.prepared("plain fp32", case._replace(gpu="cpu"))[0].to("meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        plain(torch.empty(case.images, 3, case.side, case.side, device="meta"))
    return contest(f"scoring, {case}", case, builders, rounds, counter.get_total_flops() / (2 * order**3))


def steps(case: Case, step: Callable, what: str, names: list[str], rounds: int) -> list[list[str]]:
    """A training step in each form."""
    return contest(f"{what}, {case}", case, {form: partial(step, form, case) for form in names}, rounds)


def contest(what: str, case: Case, builders: dict[str, Callable], rounds: int, products: float = 1) -> list[list[str]]:
    """Seconds, in turn, of what each builder gives, how many times as long the baselines take, GiB of the GPU."""
    device, runs, gib, rows = choose_device(case.gpu), {}, {}, []
    on_gpu = device.type == "cuda"

    def timed(form: str, run: Callable) -> None:
        forms.compute_of(form, case)
        run()
        if on_gpu:
            torch.cuda.synchronize(device)

    for name, build in builders.items():
        with suppress(torch.OutOfMemoryError):
            if on_gpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
            others, run = torch.cuda.memory_reserved(device) if on_gpu else 0, partial(timed, name, build())
            for _ in range(2 * on_gpu):  # so that kernels are chosen and loaded
                run()
            gib[name] = f"{(torch.cuda.max_memory_reserved(device) - others) / 2**30:.1f}" if on_gpu else "-"
            runs[name] = run
    times = in_turn(runs, rounds)
    times = {name: [t * (products if "matrix" in name else 1) for t in ts] for name, ts in times.items()}
    for name in builders:
        precision, seconds = name.split()[-1], times.get(name)
        others = next(iter(builders)), f"plain channels-last {precision}", f"matrix product {precision}"
        rows.append([what, name, median(seconds), *(ratio(times.get(o), seconds) for o in others), gib.get(name, "-")])
    return rows
