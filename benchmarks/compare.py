"""How fast is this code, and how much memory does it take, against the same networks written plainly?

    python -m benchmarks.compare [--small] [--rounds 3] [--only scoring memory ...] [--image FILE] [--out FILE]

The plain form (`benchmarks.plain`): whole maps in the default memory order, float32, torch.cat, no_grad; the weights
are the same, and random, since neither time nor memory depends on them. All take their turn in each round; the table has
medians and what they say: plain / ours. One image of 1024 x 1024 pixels where nothing else is said.

    scoring         the whole way from pixels to logits, on the residual in pixels and in relu5_1
    memory          resident memory of the same: at most, and thereof what scoring adds to the networks as loaded
    detector step   of `train_detector.py --fixed-sr --no-cache`: gradients of the classifier (`frozen_step`)
    sr step         of train_sr.py: 12 patches of 24 low-resolution pixels, both losses (`patch_loss`)
    sr loading      per patch: one or 16 patches from an image; the released code filters the whole image three times with
                    15 x 15 kernels for each patch, for which the fastest such filter (a box) stands in here
    cached epoch    two epochs of `train_detector.py --fixed-sr` on two images, float32, without the residual cache and with
                    it: the first computes all residuals, later ones read them (more: benchmarks.cached_epoch)
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor

import train_detector
import train_sr
from benchmarks import cached_epoch
from benchmarks.measure import Times, in_own_process, in_turn, peak_of, report, table
from benchmarks.plain import PlainRDN, PlainVGG, plain_detector
from data.images import FAKE
from data.patches import PatchDataset, Patches, random_patch
from models import RDN, STAGE_CHANNELS, DeepStemResNet, ResynthesisDetector, load_vgg
from models.auxiliary import super_resolution_loss
from models.vgg import STAGES
from utils.distributed import World
from utils.run import autocast
from utils.training import Stepper

CPU = torch.device("cpu")
FORMS = ("plain", "fp32", "bf16")  # the plain networks in float32; ours in float32 and bfloat16
PARTS = ("scoring", "memory", "detector step", "cached epoch", "sr step", "sr loading")
TINY = {"num_features": 8, "growth_rate": 8, "num_blocks": 2, "num_layers": 2}
PATCHES, PATCH, SCALE = 12, 24, 4  # of train_super_resolution_celeba.sh
MANY = 16  # --patches-per-image
VGG_LAMBDA = 0.2


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="tiny networks and images in pixels, to see that it works")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="times that all take turns (3)")
    parser.add_argument("--side", type=int, default=1024, metavar="N", help="of the image, in pixels (1024)")
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 5], metavar="0..5", help="of the residual (0 5)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--image", metavar="FILE", help="for sr loading (default: a made one of 1024 x 1024)")
    parser.add_argument("--out", metavar="FILE", help="write the numbers as JSON")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        sys.stdout.write(json.dumps(scoring_memory(**args.one)) + "\n")
        return 0
    side, rounds, stages = (64, 1, [0]) if args.small else (args.side, args.rounds, args.stages)
    times, peaks = {}, {}
    for stage in stages:
        where = f"relu{stage}_1" if stage else "pixels"
        if "scoring" in args.only:
            scorers = {form: scorer(form, stage, side, args.small) for form in FORMS}
            times[f"scoring, {where}"] = in_turn(scorers, rounds)
        if "detector step" in args.only:
            steps = {form: detector_step(form, stage, side, args.small) for form in FORMS}
            times[f"detector step, {where}"] = in_turn(steps, rounds)
        if "cached epoch" in args.only:
            times |= {f"{name}, {where}": of for name, of in cached_epochs(stage, side, args.small, rounds).items()}
        if "memory" in args.only:
            measure = scoring_memory if args.small else functools.partial(in_own_process, "benchmarks.compare")
            peaks[where] = {form: measure(form=form, stage=stage, side=side, small=args.small) for form in FORMS}
    if "sr step" in args.only:
        times["SR training step"] = in_turn({form: sr_step(form, args.small) for form in FORMS}, rounds)
    if "sr loading" in args.only:
        times["SR loading, a patch"] = sr_loading(args.image, args.small, rounds)
    results = {name: {form: t._asdict() for form, t in of.items()} for name, of in times.items()}
    report(time_table(times) + memory_table(peaks), {"times": results, "memory": peaks}, args.out)
    return 0


def time_table(times: dict[str, dict[str, Times]]) -> str:
    """Seconds of each contestant, and how many times as long the first one takes (in brackets: of processor time)."""
    rows = [["", "", "seconds", "plain / ours", "(cpu)"]]
    for name, of in times.items():
        plain = next(iter(of.values()))
        for form, t in of.items():
            ratios = [f"{plain.seconds / t.seconds:.2f}", f"{plain.cpu_seconds / max(t.cpu_seconds, 1e-9):.2f}"]
            rows.append([name, form, f"{t.seconds:.3g}", *ratios])
    return table(rows) if times else ""


def memory_table(peaks: dict[str, dict[str, dict]]) -> str:
    rows = [["memory of scoring", "", "MiB at most", "added", "ours / plain", "(added)"]]
    for where, of in peaks.items():
        for form, got in of.items():
            if "error" in got or "error" in of["plain"]:
                sys.stderr.write(f"{where}, {form}: {got.get('error', 'nothing to compare it with')}\n")
                continue
            added, plain_added = got["peak"] - got["before"], of["plain"]["peak"] - of["plain"]["before"]
            ratios = [f"{got['peak'] / of['plain']['peak']:.2f}", f"{added / max(plain_added, 1e-9):.2f}"]
            rows.append([where, form, f"{got['peak']:.0f}", f"{added:.0f}", *ratios])
    return "\n" + table(rows) if peaks else ""


def cached_epochs(stage: int, side: int, small: bool, rounds: int) -> dict[str, dict[str, Times]]:
    """The first and the second epoch of the program, in turn without and with the cache."""
    with tempfile.TemporaryDirectory() as folder:
        cached_epoch.prepare(Path(folder), None, 1, side, small)
        runs = cached_epoch.measure(Path(folder), stage, rounds, cached_epoch.program_flags(1, small), [])
    return {
        f"{name} epoch": {
            kind: Times(*(statistics.median(run[epoch][i] for run in runs[kind]) for i in (0, 1))) for kind in runs
        }
        for epoch, name in enumerate(("first", "later"))
    }


@functools.cache
def new_detector(stage: int, small: bool) -> ResynthesisDetector:
    torch.manual_seed(0)
    classifier = DeepStemResNet("resnet18" if small else "resnet50", STAGE_CHANNELS[stage])
    rdn, vgg = RDN(**TINY) if small else RDN(), load_vgg("random")[0]
    return ResynthesisDetector(rdn, classifier, stage, vgg).to(memory_format=torch.channels_last).eval()


def images_for(form: str, side: int, device: torch.device, images: int) -> Tensor:
    """(images, 3, side, side) in the memory order of a form."""
    x = torch.rand(images, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    return x if form == "plain" else x.contiguous(memory_format=torch.channels_last)


def scorer(
    form: str, stage: int, side: int, small: bool, device: torch.device = CPU, images: int = 1
) -> Callable[[], Tensor]:
    """Scores images in one of FORMS."""
    detector = new_detector(stage, small).to(device)
    x = images_for(form, side, device, images)
    if form == "plain":
        plain = plain_detector(detector)
        return torch.no_grad()(lambda: plain(x))

    @torch.inference_mode()
    def score() -> Tensor:
        with autocast(device, form):
            return detector.eval()(x)

    return score


def scoring_memory(form: str, stage: int, side: int, small: bool) -> dict[str, float]:
    run = scorer(form, stage, side, small)
    new_detector.cache_clear()  # the plain form has its own copy
    return peak_of(run)


def detector_step(
    form: str, stage: int, side: int, small: bool, device: torch.device = CPU, images: int = 1
) -> Callable[[], None]:
    """A training step of the classifier, RDN frozen."""
    detector = new_detector(stage, small).to(device)
    detector = plain_detector(detector) if form == "plain" else detector
    detector.freeze_resynthesizer(True)
    sgd = torch.optim.SGD(train_detector.parameter_groups(detector, 1e-6, 1e-4, 0.02), lr=1e-6, momentum=0.9)
    precision = "fp32" if form == "plain" else form
    stepper = Stepper(sgd, device, precision, World(), 0, Path("none"))
    recipe = train_detector.Recipe(device, precision, 0, None)
    x, labels = images_for(form, side, device, images), torch.full((images,), FAKE, device=device)

    def run() -> None:
        detector.train()
        values = train_detector.frozen_step(detector, x, labels, [0], 1 / images, stepper, recipe)
        stepper.step(values, images, [])

    return run


def sr_step(form: str, small: bool, device: torch.device = CPU) -> Callable[[], None]:
    """A training step of RDN on a batch of patches."""
    patch = 4 if small else PATCH
    pixels = torch.randint(0, 256, (PATCHES, 3, patch * SCALE, patch * SCALE), dtype=torch.uint8)
    patches = Patches(pixels, [(0, i, 0) for i in range(PATCHES)])
    rdn, vgg = RDN(**TINY) if small else RDN(), load_vgg("random")[0]
    order = torch.contiguous_format if form == "plain" else torch.channels_last
    for module in (rdn, vgg):
        module.to(device, memory_format=order)
    adam = torch.optim.Adam(rdn.parameters(), lr=1e-4)
    if form == "plain":
        plain_rdn, plain_vgg = PlainRDN(rdn), PlainVGG(vgg)

        def loss_of() -> Tensor:
            x = pixels.to(device).float() / 255
            x_hat = plain_rdn(F.avg_pool2d(x, SCALE))
            with torch.no_grad():
                maps = plain_vgg(x, STAGES)
            return super_resolution_loss(x_hat, x, plain_vgg(x_hat, STAGES), maps, VGG_LAMBDA)[0]
    else:

        def loss_of() -> Tensor:
            return train_sr.patch_loss(rdn, vgg, lambda x_lr, keys: x_lr, VGG_LAMBDA, device, form, patches)[0]

    def run() -> None:
        adam.zero_grad()
        loss_of().backward()
        adam.step()

    return run


def sr_loading(file: str | None, small: bool, rounds: int) -> dict[str, Times]:
    """Per patch: the released way, one patch an image, MANY patches an image."""
    with tempfile.TemporaryDirectory() as folder:
        if file is None:
            file = str(Path(folder) / "image.png")
            side = 128 if small else 1024
            noise = np.random.default_rng(0).integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC).save(file)
        one, many = PatchDataset([file], PATCH, SCALE), PatchDataset([file], PATCH, SCALE, MANY)

        def released() -> None:
            image = Image.open(file).convert("RGB")
            for _ in range(3):
                image.filter(ImageFilter.BoxBlur(7))
            random_patch(image, PATCH, SCALE, np.random.default_rng(0))

        times = in_turn(
            {"released way": released, "1 an image": lambda: one[0], f"{MANY} an image": lambda: many[0]}, 5 * rounds
        )
    last = f"{MANY} an image"
    return times | {last: Times(*(value / MANY for value in times[last]))}


if __name__ == "__main__":
    sys.exit(main())
