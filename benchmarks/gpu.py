"""How fast is this code on a GPU, how much of its matrix rate does RDN reach, how much memory does training take?

    python -m benchmarks.gpu [--gpu N] [--side 1024] [--batches 1 2 4 8] [--rounds 3] [--small] [--out FILE]

Three tables, of networks of full size (random weights), all contestants of a line in turn, medians:

    scoring    images/s, on the residual in pixels and in relu5_1, of the plain networks in float32 and, as the released
               programs ran, with TF32, and of ours in float32 and bfloat16
    RDN        its multiply-adds in bfloat16 (2 FLOP each), against a product of two square matrices in bfloat16
    training   seconds a step as the scripts take it: 12 patches in float32; 6 images of which 3 are real, in bfloat16,
               end to end with --micro-batch 1

All under the programs' settings (deterministic algorithms of cuDNN, no autotuning). GiB are what PyTorch holds of the GPU
at most. What does not fit is shown as "-". `--gpu cpu --small` only shows that it works.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.compare import PATCHES, images_for, new_detector, scorer, sr_step
from benchmarks.compare import detector_step as frozen_step
from benchmarks.measure import in_turn, report, table
from benchmarks.training_memory import end_to_end_step
from data.images import FAKE, REAL
from utils.run import autocast, choose_device, set_deterministic

FORMS = {  # name: form of benchmarks.compare, TF32
    "plain, fp32": ("plain", False),
    "plain, TF32": ("plain", True),
    "fp32": ("fp32", False),
    "bf16": ("bf16", False),
}
SCRIPT_BATCH = 6  # of the fine-tuning scripts


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", metavar="N|cpu", help="GPU number (default: the first), or cpu")
    parser.add_argument("--side", type=int, default=1024, metavar="N", help="of the images, in pixels (1024)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N", help="images (1 2 4 8)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="times that all take turns (3)")
    parser.add_argument("--small", action="store_true", help="tiny networks and images in pixels, to see that it works")
    parser.add_argument("--out", metavar="FILE", help="write the numbers as JSON")
    args = parser.parse_args(argv)
    device = choose_device(args.gpu)
    if device.type == "cpu" and args.gpu != "cpu":
        sys.stderr.write("error: no GPU that PyTorch can use; --gpu cpu --small shows that the benchmark works\n")
        return 2
    set_deterministic(0, device)
    side, stages, batches = (64, [0], [1, 2]) if args.small else (args.side, [0, 5], args.batches)
    results = {
        "scoring": [
            {"stage": stage, "images": images, **measured}
            for stage in stages
            for images in batches
            for measured in scoring(device, stage, side, images, args.rounds, args.small)
        ],
        "rdn": [rdn_rate(device, side, images, args.rounds, args.small) for images in batches],
        "training": training(device, side, args.rounds, args.small),
    }
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    report(f"{name}, images of {side} x {side}\n\n" + in_words(results), {"device": name, **results}, args.out)
    return 0


def in_words(results: dict) -> str:
    """The three tables."""
    rows = [["scoring", "stage", "batch", "images/s", "GiB at most"]]
    for got in results["scoring"]:
        rate = "-" if got["seconds"] is None else f"{got['images'] / got['seconds']:.2f}"
        rows.append([got["name"], str(got["stage"]), str(got["images"]), rate, number(got["gib"])])
    text = table(rows)
    rows = [["RDN, bf16", "TFLOP/s", "of a matrix product's"]]
    for got in results["rdn"]:
        share = "-" if got["rate"] is None else f"{100 * got['rate'] / got['matrix_rate']:.0f} %"
        rows.append([f"batch of {got['images']}", number(got["rate"]), share])
    text += "\n" + table(rows)
    rows = [["training step", "seconds", "GiB at most"]]
    rows += [[got["name"], number(got["seconds"]), number(got["gib"])] for got in results["training"]]
    return text + "\n" + table(rows)


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def scoring(device: torch.device, stage: int, side: int, images: int, rounds: int, small: bool) -> list[dict]:
    """Seconds a batch and GiB of each of FORMS."""

    def contestant(form: str, tf32: bool) -> Callable[[], object]:
        score = scorer(form, stage, side, small, device, images)

        def run() -> None:
            with tf32_allowed(tf32):
                score()

        return run

    measured = timed(device, {name: lambda of=of: contestant(*of) for name, of in FORMS.items()}, rounds)
    new_detector.cache_clear()
    return measured


def rdn_rate(device: torch.device, side: int, images: int, rounds: int, small: bool) -> dict:
    """TFLOP/s of RDN on a batch, and of a matrix product, both in bfloat16."""
    order = 512 if small else 8192
    factors = [torch.randn(order, order, device=device, dtype=torch.bfloat16) for _ in range(2)]
    rdn = new_detector(0, small).to(device).resynthesizer
    x_lr = images_for("bf16", side // rdn.scale, device, images)  # (B, 3, h, w)

    @torch.inference_mode()
    def resynthesize() -> Tensor:
        with autocast(device, "bf16"):
            return rdn(x_lr)

    contestants = {"matrix": lambda: lambda: factors[0] @ factors[1], "rdn": lambda: resynthesize}
    matrix, networks = timed(device, contestants, rounds)
    if networks["seconds"] is None or matrix["seconds"] is None:
        return {"images": images, "rate": None, "matrix_rate": None}
    with FlopCounterMode(display=False) as counter:
        resynthesize()
    rate = counter.get_total_flops() / networks["seconds"] / 1e12
    return {"images": images, "rate": rate, "matrix_rate": 2 * order**3 / matrix["seconds"] / 1e12}


def training(device: torch.device, side: int, rounds: int, small: bool) -> list[dict]:
    """Seconds and GiB of a step of each training script."""

    def end_to_end(stage: int, task: str) -> Callable[[], None]:
        detector = new_detector(stage, small).to(device)
        detector.freeze_resynthesizer(False)
        detector.resynthesizer.checkpoint_blocks = True
        x = images_for("bf16", side, device, SCRIPT_BATCH)
        labels = torch.tensor([REAL, FAKE] * (SCRIPT_BATCH // 2), device=device)
        return end_to_end_step(detector, x, labels, task, "bf16", 1)

    def frozen(stage: int) -> Callable[[], None]:
        return frozen_step("bf16", stage, side, small, device, SCRIPT_BATCH)

    deep = 0 if small else 5
    steps = {
        f"super-resolution, {PATCHES} patches": lambda: sr_step("fp32", small, device),
        "pixels, RDN frozen": lambda: frozen(0),
        "pixels, colorization": lambda: end_to_end(0, "colorization"),
        f"stage {deep}, RDN frozen": lambda: frozen(deep),
        f"stage {deep}, denoising": lambda: end_to_end(deep, "denoising"),
    }
    measured = []
    for name, step in steps.items():
        measured += timed(device, {name: step}, rounds)
        new_detector.cache_clear()
    return measured


def timed(device: torch.device, contestants: dict[str, Callable[[], Callable]], rounds: int) -> list[dict]:
    """Medians in turn of the contestants that fit, built by what is given, and the memory each takes; else None."""
    runs, peaks = {}, {}
    for name, build in contestants.items():
        empty(device)
        with contextlib.suppress(torch.OutOfMemoryError):
            run = finished(device, build())
            run()  # once to load kernels
            run()
            runs[name] = run
            peaks[name] = torch.cuda.max_memory_reserved(device) / 2**30 if device.type == "cuda" else None
    times = in_turn(runs, rounds)
    return [
        {"name": name, "seconds": times[name].seconds if name in times else None, "gib": peaks.get(name)}
        for name in contestants
    ]


def finished(device: torch.device, run: Callable[[], object]) -> Callable[[], None]:
    """`run`, and waiting until the GPU has done it."""

    def wait() -> None:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return wait


def empty(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


@contextlib.contextmanager
def tf32_allowed(allowed: bool) -> Iterator[None]:
    """TF32 in convolutions and matrix products, or not."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


if __name__ == "__main__":
    sys.exit(main())
