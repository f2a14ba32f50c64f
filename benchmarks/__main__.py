"""Compare the time and memory of this project's networks with plain PyTorch implementations of the same networks.

    python -m benchmarks             measures on the CPU
    python -m benchmarks --gpu 0     measures on GPU 0, with several image sizes
    python -m benchmarks --quick     measures toy networks, in a few seconds

Each row of the printed table compares up to three implementations ("forms", see benchmarks/cases.py) of the same
networks. The table shows the fastest measurement of each implementation. "-" means that the implementation was not
measured, or that the measurement failed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.cases import Case, measure_time_and_memory_of_case
from models.build import create_detector
from utils.errors import UserError, run_program

ROOT = Path(__file__).resolve().parents[1]
HEADER = ("what", "precision", "plain s", "channels-last s", "here s", "channels-last / here", "plain GiB", "here GiB")
WIDTHS = (44, 9, 8, 15, 8, 20, 9, 8)
# TFLOP contains the operations of each network's forward pass on an image of 1024 x 1024 pixels, in units of 10^12.
TFLOP = {"rdn": 2.9, "vgg": 0.4, "resnet": 0.06}
START_SECONDS = 5  # estimated time to start a process
ESTIMATE_MATRIX_SIDE = 1024  # side of the square matrices whose product is timed to estimate the benchmark's time
GPU_MATRIX_SIDE = 8192  # side of the square matrices whose product is timed on a GPU, to compare its speed with RDN's
# On images with sides above LARGEST_PLAIN_SIDE pixels, fine-tuning in plain PyTorch needs more than 22 GiB of memory.
LARGEST_PLAIN_SIDE = 512
GPU_SIDES = (256, 512, 1024)  # sides in pixels of the images that are scored when a GPU is measured


def list_benchmark_cases(args: argparse.Namespace) -> list[Case]:
    """Return one `Case`, with a placeholder as `form`, for each row of the printed table."""
    gpu = args.gpu
    if args.quick:
        return [Case("scoring", "here", "fp32", 0, 64, 1, gpu, True)]
    precisions = ["fp32", "bf16"] if gpu == "cpu" else ["fp32", "tf32", "bf16"]
    rows = []
    for stage in args.stages:
        for precision in precisions:
            for side in [args.side] if gpu == "cpu" else GPU_SIDES:
                images = 1 if gpu == "cpu" else 2 * (1024 // side) ** 2
                rows.append(Case("scoring", "here", precision, stage, side, images, gpu, False))
    side = args.side if gpu == "cpu" else 1024
    batches = (2, 4) if gpu == "cpu" else (6, 6)
    for precision in precisions:
        for stage in args.stages:
            rows.append(Case("step, RDN frozen", "here", precision, stage, side, batches[0], gpu, False))
            rows.append(Case("step, fine-tuning", "here", precision, stage, side, batches[1], gpu, False))
        rows.append(Case("step, train_sr.py", "here", precision, 0, 96, 12, gpu, False))
    return rows


def list_network_implementations(case: Case) -> list[str]:
    """List the names of the implementations ("forms", see benchmarks/cases.py) that are measured for a case."""
    if case.kind == "scoring" and case.precision != "bf16":
        return ["plain", "channels-last", "here"]
    if case.kind == "step, fine-tuning" and case.side > LARGEST_PLAIN_SIDE and case.gpu == "cpu":
        return ["here"]
    return ["channels-last", "here"]


def estimate_tflop(case: Case) -> float:
    """Estimate the floating-point operations, in units of 10^12, of one run of the task of a benchmark case."""
    megapixels = case.images * (case.side / 1024) ** 2
    resynthesis = TFLOP["rdn"] + (2 * TFLOP["vgg"] if case.stage else 0)
    if case.kind == "step, fine-tuning":
        # With gradient checkpointing, a training step runs the forward pass twice.
        # The backward pass takes as many operations as two forward passes.
        # The auxiliary loss is computed only for the real images, which are half of the batch.
        auxiliary = (TFLOP["rdn"] + 2 * TFLOP["vgg"]) / 2
        return 4 * megapixels * (resynthesis + auxiliary)
    if case.kind == "step, train_sr.py":
        return 3 * megapixels * (TFLOP["rdn"] + 2 * TFLOP["vgg"])
    if case.kind == "step, RDN frozen":
        return megapixels * (resynthesis + 3 * TFLOP["resnet"])
    return megapixels * (resynthesis + TFLOP["resnet"])


def measure_case_in_new_process(case: Case) -> dict[str, float] | None:
    """Measure a benchmark case (a task and its settings) in a new process. Return None if the process fails."""
    words = [sys.executable, "-m", "benchmarks.cases", json.dumps(case._asdict())]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]
        sys.stderr.write(f"{case.kind}, {case.form}: {reason}\n")
        return None
    return json.loads(result.stdout.splitlines()[-1])


def measure_implementations_of_case(case: Case, rounds: int) -> tuple[str, ...]:
    """Measure the time of one case with each implementation, and return the cells of the case's row in the table.

    Args:
        rounds: number of measurements with each implementation, of which the shortest counts.
    """
    best = {}
    for _ in range(rounds):
        for form in list_network_implementations(case):
            result = measure_case_in_new_process(case._replace(form=form))
            if result and (form not in best or result["seconds"] < best[form]["seconds"]):
                best[form] = result
    cells = [f"{case.kind}, stage {case.stage}, {case.images} x {case.side}^2", case.precision]
    for form in ("plain", "channels-last", "here"):
        cells.append(f"{best[form]['seconds']:.3g}" if form in best else "-")
    ratio = "-"
    if "channels-last" in best and "here" in best:
        ratio = f"{best['channels-last']['seconds'] / best['here']['seconds']:.2f}"
    plain = best.get("plain", best.get("channels-last"))
    cells += [ratio, f"{plain['gib']:.2f}" if plain else "-", f"{best['here']['gib']:.2f}" if "here" in best else "-"]
    return tuple(cells)


def print_table_row(cells: tuple[str, ...]) -> None:
    padded = [cell.ljust(width) for cell, width in zip(cells, WIDTHS, strict=True)]
    sys.stdout.write(f"| {' | '.join(padded)} |\n")
    sys.stdout.flush()


def measure_and_print_rdn_speed(gpu: str) -> None:
    """Print the speed of RDN in bf16, and compare it with the measured speed of a matrix product in bf16."""
    rdn = measure_case_in_new_process(Case("RDN alone", "here", "bf16", 0, 1024, 2, gpu, False))
    product = measure_case_in_new_process(Case("matrix product", "here", "bf16", 0, GPU_MATRIX_SIDE, 1, gpu, False))
    if rdn and product:
        rdn_rate = 2 * TFLOP["rdn"] / rdn["seconds"]
        matrix_rate = 2 * GPU_MATRIX_SIDE**3 / 1e12 / product["seconds"]
        fraction = rdn_rate / matrix_rate
        text = f"{fraction:.2f} times the {matrix_rate:.0f} TFLOP/s of a matrix product"
        sys.stdout.write(f"RDN in bf16: {rdn_rate:.0f} TFLOP/s, {text}\n")


def measure_and_print_startup_times(folder: Path) -> None:
    """Print how long three commands take: importing PyTorch, `test.py --help`, and scoring one image with test.py."""
    options = {"sr_arch": "bicubic", "arch": "resnet18", "dilated": False}
    detector, config = create_detector(None, options, "random")
    content = {"arch": "resnet18", "config": config, "state_dict": detector.classifier.state_dict()}
    torch.save({**content, "sr_state_dict": detector.resynthesizer.state_dict()}, folder / "detector.pth.tar")
    Image.fromarray(np.zeros((256, 256, 3), dtype=np.uint8)).save(folder / "image.png")
    scoring = ["test.py", "--gpu", "cpu", "--resume", f"{folder}/detector.pth.tar", "--input", f"{folder}/image.png"]
    commands = {
        "import torch": ["-c", "import torch"],
        "test.py --help": ["test.py", "--help"],
        "test.py on one image, small detector": scoring,
    }
    for name, words in commands.items():
        started = time.perf_counter()
        subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True)
        sys.stdout.write(f"start: {name}: {time.perf_counter() - started:.1f} s\n")
        sys.stdout.flush()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    text = "height and width in pixels of the images with which the CPU is measured (default: 512)"
    parser.add_argument("--side", type=int, default=512, metavar="N", help=text)
    text = "how often each implementation is measured (default: 2)"
    parser.add_argument("--rounds", type=int, default=2, metavar="N", help=text)
    text = "features of the measured detectors: 0 = pixels, 5 = stage 5 of VGG-19 (default: 0 5)"
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 5], choices=(0, 5), help=text)
    text = "number of the GPU on which to measure, or cpu (default: cpu)"
    parser.add_argument("--gpu", metavar="N|cpu", default="cpu", help=text)
    text = "only measure one row with toy networks, to check that the program works"
    parser.add_argument("--quick", action="store_true", help=text)
    args = parser.parse_args(argv)
    on_gpu = args.gpu != "cpu"
    if on_gpu and not torch.cuda.is_available():
        raise UserError(f"--gpu {args.gpu}: this machine has no GPU that PyTorch can use; give --gpu cpu")
    args.rounds = 1 if args.quick else args.rounds

    # Estimate the time of the whole benchmark from the measured speed of a matrix product
    rows = list_benchmark_cases(args)
    product = measure_time_and_memory_of_case(
        Case("matrix product", "here", "fp32", 0, ESTIMATE_MATRIX_SIDE, 1, args.gpu, False)
    )
    rate = 2 * ESTIMATE_MATRIX_SIDE**3 / 1e12 / product["seconds"]  # TFLOP/s
    runs_per_process = 8 if on_gpu else 1
    seconds = 0.0
    for case in rows:
        if not args.quick:  # with --quick, the benchmark takes only seconds, so its time is not estimated
            seconds += (
                args.rounds
                * len(list_network_implementations(case))
                * (START_SECONDS + runs_per_process * estimate_tflop(case) / rate)
            )
    sys.stdout.write(f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}, {torch.get_num_threads()} threads, ")
    sys.stdout.write(f"load {os.getloadavg()[0]:.1f}; {len(rows)} rows, about {seconds / 60:.0f} minutes\n")

    print_table_row(HEADER)
    sys.stdout.write(f"|{'|'.join('-' * (width + 2) for width in WIDTHS)}|\n")
    failed = False
    for case in rows:
        cells = measure_implementations_of_case(case, args.rounds)
        print_table_row(cells)
        failed = failed or cells[HEADER.index("here s")] == "-"
    if on_gpu:
        measure_and_print_rdn_speed(args.gpu)
    if not args.quick:
        with tempfile.TemporaryDirectory() as folder:
            measure_and_print_startup_times(Path(folder))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run_program(main))
