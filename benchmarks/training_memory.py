"""How much memory does end-to-end training need for one full-size image, and what does each measure save?

    python -m benchmarks.training_memory [--small] [--side 1024] [--stages 0 5] [--only NAME ...] [--out FILE]

Takes one step of train_detector.py's own (`end_to_end_step`: forward and backward of the classification loss and of the
auxiliary loss of a degraded image, then SGD) on networks of full size, each variant in a process of its own, and prints
the resident memory before and at most. The variants add one measure after the other to the plain networks; the last
three show that a batch of two costs twice as much and that micro-batches of one take that back. The first two
need more than 22 GiB at 1024 x 1024: --side 512 takes a quarter of everything. What the program does by itself is
"+ channels-last", and with --precision bf16 the one below. Lines appear on stderr as they are measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

import train_detector
from benchmarks.measure import in_own_process, peak_of, report, table
from benchmarks.plain import PlainRDN, PlainVGG
from data.images import REAL
from models import RDN, STAGE_CHANNELS, DeepStemResNet, ResynthesisDetector, load_vgg
from models.auxiliary import HEADS
from utils.distributed import World
from utils.training import Stepper

MIB_A_GIB = 1024
VARIANTS = {  # name: plain networks, gradient checkpointing, channels-last order, precision, images, micro-batch
    "plain": (True, False, False, "fp32", 1, None),
    "one by one: strips, sums in place": (False, False, False, "fp32", 1, None),
    "+ gradient checkpointing": (False, True, False, "fp32", 1, None),
    "+ channels-last": (False, True, True, "fp32", 1, None),
    "+ bf16": (False, True, True, "bf16", 1, None),
    "all, 2 images": (False, True, True, "bf16", 2, None),
    "all, 2 images, micro-batch 1": (False, True, True, "bf16", 2, 1),
    "fp32, 2 images, micro-batch 1": (False, True, True, "fp32", 2, 1),
}
TINY = {"num_features": 8, "growth_rate": 8, "num_blocks": 2, "num_layers": 2}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--small", action="store_true", help="tiny networks, residual in 64 x 64 pixels, to see that it works"
    )
    parser.add_argument("--side", type=int, default=1024, metavar="N", help="of the image, in pixels (1024)")
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 5], metavar="0..5", help="of the residual (0 5)")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME", help="variants")
    parser.add_argument("--out", metavar="FILE", help="write the numbers as JSON")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        sys.stdout.write(json.dumps(measure(**args.one)) + "\n")
        return 0
    side, stages = (64, [0]) if args.small else (args.side, args.stages)
    run = measure if args.small else lambda **settings: in_own_process("benchmarks.training_memory", **settings)
    rows, results = [["", "stage", "GiB before", "GiB at most", "seconds"]], {"side": side, "runs": []}
    for stage in stages:
        for name in args.only:
            got = run(name=name, stage=stage, side=side, small=args.small)
            results["runs"].append({"name": name, "stage": stage, **got})
            rows.append([name, str(stage), *(["-"] * 3 if "error" in got else in_words(got))])
            sys.stderr.write(
                f"{name}, stage {stage}: {got.get('error') or 'GiB before, at most, s: ' + ' '.join(rows[-1][2:])}\n"
            )
    report(f"end-to-end step on {side} x {side} pixels\n" + table(rows), results, args.out)
    return 0


def in_words(got: dict[str, float]) -> list[str]:
    return [f"{got['before'] / MIB_A_GIB:.2f}", f"{got['peak'] / MIB_A_GIB:.2f}", f"{got['seconds']:.1f}"]


def measure(name: str, stage: int, side: int, small: bool = False) -> dict[str, float]:
    """Memory of one step of a variant."""
    plain, checkpointing, channels_last, precision, images, micro_batch = VARIANTS[name]
    order = torch.channels_last if channels_last else torch.contiguous_format
    torch.manual_seed(0)
    rdn, vgg = RDN(**TINY) if small else RDN(), load_vgg("random")[0]
    rdn.checkpoint_blocks = checkpointing
    classifier = DeepStemResNet("resnet18" if small else "resnet50", STAGE_CHANNELS[stage])
    if plain:
        rdn, vgg = PlainRDN(rdn), PlainVGG(vgg)
    detector = ResynthesisDetector(rdn, classifier, stage, vgg).to(memory_format=order)
    x = torch.rand(images, 3, side, side).contiguous(memory_format=order)
    return peak_of(end_to_end_step(detector, x, torch.full((images,), REAL), "denoising", precision, micro_batch))


def end_to_end_step(
    detector: ResynthesisDetector, x: Tensor, labels: Tensor, task: str, precision: str, micro_batch: int | None
) -> Callable[[], None]:
    """A step on x (B, 3, H, W) and labels (B,) with the auxiliary loss of degraded reals, at whatever numbers."""
    detector.train()
    groups = train_detector.parameter_groups(detector, 1e-6, 1e-4, 1e-3)
    sgd = torch.optim.SGD(groups, lr=1e-6, momentum=0.9)
    # New networks on noise may have gradients without bounds: such a step is left out, at the same cost
    stepper = Stepper(sgd, x.device, precision, World(), sys.maxsize, Path("none"))
    recipe = train_detector.Recipe(x.device, precision, 0, micro_batch, detector.vgg, HEADS[task](), 1.0)
    indices, weight = list(range(len(x))), 1 / len(x)

    def step() -> None:
        # The loss needs a second real image (here as if another process had it), and degrades them every other time
        with patch.multiple(train_detector, sum_over_processes=lambda count, world: count + 1, uniform=lambda *_: 0.0):
            values = train_detector.end_to_end_step(detector, x, labels, indices, weight, stepper, recipe)
        stepper.step(values, len(x), [])

    return step


if __name__ == "__main__":
    sys.exit(main())
