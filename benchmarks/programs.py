"""The programs as a user runs them: whole processes, in turn."""

import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.measure import PAPER, ROOT, SMALL, TINY, in_turn, median, noise, peak, program, ratio, saved, started
from benchmarks.plain import plain_detector
from evaluation.detector import BATCH_PIXELS, load
from models.features import load_vgg
from utils.errors import UserError

FURTHER = 3  # images or epochs beyond the first
Command = Callable[[int, Path], str]  # for so many images or epochs, with its results in a new place
Jobs = dict[str, dict[str, Command]]  # of each job its contestants


def versus(args: Namespace, folder: Path, jobs: Jobs, few: int, many: int) -> list[list[str]]:
    """Programs in turn, on `few` and on `many` images or epochs: what a further one takes is the difference."""
    header = "||start and the first ones, s|a further one, s|first / it|processor time, first / it|GiB at most"
    rows = [header.split("|")]
    for job, contestants in jobs.items():
        runs = {name: [] for name in contestants}
        for i in range(args.rounds):
            for name, command in contestants.items():
                outs = [(n, folder / f"{job}-{name}-{i}-{n}".replace(" ", "")) for n in (few, many)]
                runs[name].append([program(command(n, out), args.old if name == "old" else ROOT) for n, out in outs])
        further = [{k: [(b[i] - a[i]) / (many - few) for a, b in r] for k, r in runs.items()} for i in (0, 1)]
        for name, pairs in runs.items():
            ratios = [ratio(of[next(iter(runs))], of[name]) for of in further]
            first, gib = median([a.seconds for a, _ in pairs]), max(b.gib for _, b in pairs)
            rows.append([job, name, first, median(further[0][name]), *ratios, f"{gib:.2f}"])
    return rows


def scoring(detector: Path, images: Sequence[Path], flags: str) -> Command:
    start = f"test.py --gpu cpu --resume {detector} {flags}"
    return lambda n, out: f"{start} --save_path {out} --input {' '.join(map(str, images[:n]))}"


def training(folder: Path, stage: int, flags: str) -> Command:
    """train_detector.py on the real and the generated image of `prepare`: an epoch is a step of both."""
    start = f"train_detector.py --gpu cpu --data-root-pos {folder}/real --data-root-neg {folder}/fake --no_dilation"
    start += f" --idx-stages {stage} --resume {folder}/stage{stage}.pth.tar --sr-weights-file {folder}/rdn.pth"
    start += f" --vgg-weights {folder}/vgg.pth --workers 1 --batch-size 2 --save-every-epoch 1000 {flags}"
    return lambda n, out: f"{start} --epochs {n} --output-path {out}"


def filled(folder: Path, where: Path, stage: int, flags: str) -> Command:
    """Training with a cache that holds all: an earlier run has mirrored the same images."""
    command = training(folder, stage, f"{flags} --cache-dir {folder}/cache{str(where).replace('/', '_')}")
    program(command(2 + FURTHER, folder / f"filled{len(list(folder.iterdir()))}"), where)
    return command


def prepare(folder: Path, quick: bool, side: int, stages: list[int]) -> None:
    """Images, and weights in the release's formats, which any checkout reads."""
    for name, n in (("real", 1), ("fake", 1), ("images", 1 + FURTHER), ("patches", 12)):
        noise(folder / name, n, side)
    for stage in stages:
        content = torch.load(saved(folder / "whole", *((TINY, "resnet18") if quick else (PAPER, "resnet50")), stage))
        torch.save({name: content[name] for name in ("arch", "state_dict")}, folder / f"stage{stage}.pth.tar")
        torch.save(content["sr_state_dict"], folder / "rdn.pth")
    torch.save(load_vgg("random")[0].state_dict(), folder / "vgg.pth")


def against(args: Namespace, folder: Path) -> dict[str, list]:
    """Does this checkout cost more than another commit's? Table "Against an earlier commit".

    git worktree add ../old 1ed4653; python -m benchmarks against ../old [--rounds 3] [--side 512] [--stages 0 5]
    In turn, float32: test.py on one image and on three more; each training for an epoch (a step of 2, or 12) and three more.
    """
    if not args.old or not (args.old / "test.py").exists():
        raise UserError("no other checkout: give its folder, as in `python -m benchmarks against ../old`")
    stages, jobs = [0] if args.quick else args.stages, {}
    prepare(folder, args.quick, 128 if args.quick else args.side or 512, stages)
    sr = f"train_sr.py --gpu cpu --train-file {folder}/patches --workers 1 --num-save 1000 --vgg-weights {folder}/vgg.pth "
    sr += " ".join(f"--{name.replace('_', '-')} {value}" for name, value in (TINY if args.quick else PAPER).items())
    both = {"train_sr.py": lambda n, out: f"{sr} --precision fp32 --num-epochs {n} --outputs-dir {out}"}
    for stage in stages:
        loaded = f"--no_dilation --idx-stages {stage} --sr-weights-file {folder}/rdn.pth --vgg-weights {folder}/vgg.pth"
        file, images = f"{folder}/stage{stage}.pth.tar", sorted((folder / "images").iterdir())
        both[f"test.py, stage {stage}"] = scoring(file, images, f"{loaded} --precision fp32")
        for flags in ("--fixed-sr --no-cache", "--mode-sr denoising --lr 1e-6 --lr-sr 1e-3"):
            both[f"{flags}, stage {stage}"] = training(folder, stage, f"{flags} --precision fp32")
        if args.only in (job := f"--fixed-sr, all cached, stage {stage}"):
            jobs[job] = {
                k: filled(folder, c, stage, "--fixed-sr --precision fp32")
                for k, c in (("old", args.old), ("new", ROOT))
            }
    jobs |= {job: {"old": command, "new": command} for job, command in both.items() if args.only in job}
    return {"Against an earlier commit": versus(args, folder, jobs, 1, 1 + FURTHER)}


def cached(args: Namespace, folder: Path) -> dict[str, list]:
    """What does the residual cache of `train_detector.py --fixed-sr` save? Table "Residual cache".

    python -m benchmarks cached [--rounds 3] [--side 1024] [--stages 0 5]
    An epoch of two images, and of two crops of each; "filled": all are read. A run saves its first and its last epoch.
    """
    side, stages, jobs = 128 if args.quick else args.side or 1024, [0] if args.quick else args.stages, {}
    prepare(folder, args.quick, side, stages)
    for stage in stages:
        for what, crops in (("whole images", ""), ("2 crops each", f"--crop-size {side // 2} --crops-per-image 2")):
            train = partial(training, folder, stage)
            job = {"without": train(f"--fixed-sr {crops} --no-cache"), "filling": train(f"--fixed-sr {crops}")}
            jobs[f"{what}, stage {stage}"] = job | {"filled": filled(folder, ROOT, stage, f"--fixed-sr {crops}")}
    return {"Residual cache, an epoch": versus(args, folder, jobs, 2, 2 + FURTHER)}


def small(args: Namespace, folder: Path) -> dict[str, list]:
    """How fast are pictures scored, and what does the program itself cost? Tables "Small pictures", "Growth".

    python -m benchmarks small [--count 2000] [--side 256] [--rounds 3] [--precision fp32|bf16]
    Networks of full size, COUNT / 10 pictures: the loop one would write, and test.py. Networks of the quickstart's size,
    COUNT pictures: the networks alone, and test.py: processor time. Growth: --side 512 --count 100, --side 2048 --count 20.
    """
    side, n, tables = *((64, 64) if args.quick else (args.side or 256, args.count or 2000)), {}
    few = min(max(BATCH_PIXELS // side**2, 1), 16)
    images = sorted(noise(folder / "images", n, side).iterdir())
    full = (TINY, "resnet18") if args.quick else (PAPER, "resnet50")
    for shape, other, many in ((full, "plain_loop", max(n // 10, 2 * few)), ((SMALL, "resnet18"), "networks_alone", n)):
        detector = saved(folder / other, *shape)
        own = f"-m benchmarks.programs {other} {detector} {folder}/images {args.precision}"
        job = {other: lambda k, _, own=own: f"{own} {k}"}
        job["test.py"] = scoring(detector, images, f"--precision {args.precision}")
        tables[f"Small pictures, {other}"] = versus(
            args, folder, {f"{side} x {side}, {args.precision}": job}, few, many
        )
    return tables


@torch.inference_mode()
def plain_loop(checkpoint: str, folder: str, precision: str, number: str) -> None:
    """Decode and score one picture after the other, by plain networks."""
    detector = load(checkpoint, "cpu", precision)
    plain = plain_detector(detector.network).to(memory_format=torch.channels_last)
    for file in sorted(Path(folder).iterdir())[: int(number)]:
        x = torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1)[None].float() / 255
        with detector.compute.autocast():
            plain(x.contiguous(memory_format=torch.channels_last)).tolist()


def networks_alone(checkpoint: str, folder: str, precision: str, number: str) -> None:
    """The first picture, decoded once, so many times, in the batches that test.py makes."""
    detector = load(checkpoint, "cpu", precision)
    image = detector.fit(str(min(Path(folder).iterdir())))  # (3, H, W)
    for batch in torch.arange(int(number)).split(max(BATCH_PIXELS // image[0].numel(), 1)):
        detector.logits(image.expand(len(batch), -1, -1, -1).contiguous())


def start(args: Namespace, folder: Path) -> dict[str, list]:
    """How long until a program says something? Table "Start": python -m benchmarks start --rounds 5"""
    detector = saved(folder / "detector", TINY if args.quick else SMALL, "resnet18")
    image = noise(folder / "images", 1, 64 if args.quick else 256)
    commands = ["-c 'import torch'", "test.py --help", "train_detector.py --help", "train_sr.py --help"]
    commands += ["test.py --tile a_mistake", f"test.py --gpu cpu --resume {detector} --input {image}"]
    times = in_turn({c: partial(program, c, status=2 * ("mistake" in c)) for c in commands}, args.rounds)
    rows = [["", "seconds", "beyond import torch"]]
    for name, seconds in times.items():
        rows.append([name[:30], median(seconds), f"{np.median(np.subtract(seconds, times[commands[0]])):+.2f}"])
    return {"Start": rows}


def files(args: Namespace, folder: Path) -> dict[str, list]:
    """Until the first score of very many files. Table "Very many files": python -m benchmarks files --rounds 1"""
    count, few, fewest = (4000 if args.quick else args.count or 200_000), 2000, 0.0  # few: more than a batch
    rows = [["", "files", "seconds to the first row", "MiB", "bytes a file"]]

    def written() -> int:
        return sum(part.read_bytes().count(b"\n") for part in scores.parent.glob("scores.csv.*.part"))

    detector = saved(folder / "detector", TINY, "resnet18")
    originals = sorted(noise(folder / "originals", 8, 128).iterdir())
    os.makedirs(folder / "few"), os.makedirs(folder / "rest")
    for i in range(count):
        os.link(originals[i % 8], folder / ("few" if i < few else "rest") / f"{i:08d}.png")
    for n, images in ((few, [folder / "few"]), (count, [folder / "few", folder / "rest"])) * args.rounds:
        scores = folder / f"{time.monotonic_ns()}" / "scores"
        for what in ("started", "killed and started again"):
            before = written()
            with started(scoring(detector, images, "--workers 2")(len(images), scores)) as run:
                began = time.perf_counter()
                while written() < before + 2 and run.poll() is None:
                    time.sleep(0.01)
                seconds, mib = time.perf_counter() - began, 1024 * peak(run.pid)
            fewest = fewest or mib
            each = f"{(mib - fewest) * 2**20 / (count - few):.0f}" if n == count else ""
            rows.append([what, str(n), f"{seconds:.1f}", f"{mib:.0f}", each])
    return {"Very many files": rows}


def soak(args: Namespace, folder: Path) -> dict[str, list]:
    """Are peaks of memory flat? Table "Endurance": OMP_NUM_THREADS=1 python -m benchmarks soak"""
    images, epochs = (40, 10) if args.quick else (1000, 150)
    prepare(folder, True, 128, [0])
    detector = saved(folder / "detector", TINY, "resnet18")
    score = scoring(detector, sorted(noise(folder / "all", 10 * images, 32).iterdir()), "--workers 2 --batch-size 8")
    rows = [["", "", "GiB at most", "ten times as many", "grown, MiB"]]
    for what, n, command in ("images", images, score), ("steps", epochs, training(folder, 0, "--fixed-sr")):
        few, many = (program(command(k * n, folder / f"{what}{k}")).gib for k in (1, 10))
        rows.append([what, str(n), f"{few:.3f}", f"{many:.3f}", f"{1024 * (many - few):+.1f}"])
    return {"Endurance": rows}


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
