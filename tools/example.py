"""Example images, so that a fresh clone has something to run on; or generated twins of your own photographs.

    python -m tools.example --out data/example --size 128 --train 128 --val 32 --test 64
    python -m tools.example --from PHOTOGRAPHS --out TWINS [--autoencoder ENCODER.pth DECODER.pth]

The first form writes OUT/{train,val,test}/{real,nearest,bilinear}/00000.png, the lists train.txt and val.txt of the real
images for train_sr.py, settings.json and README.txt. Real images are random scenes of overlapping shapes (tools/scenes.py).
Fake images are other scenes, halved and up-sampled again (tools/upsampling.py). No generator made them: numbers measured on
them say that the programs work, and nothing about images from the internet. Licence of the images: CC0 1.0.

The second form writes a twin of each image below PHOTOGRAPHS, at the same relative path (tools/twins.py).

The output folder appears when all of its images are made.
"""

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tools import twins
from tools.autoencoder import load_autoencoder
from tools.scenes import draw_scene
from tools.upsampling import KINDS, upsample_again
from utils import options
from utils.console import printable, progress
from utils.errors import UserError, run_program
from utils.files import make_folder, write_json
from utils.random_streams import seeded_generator

logger = logging.getLogger("tools.example")

SPLITS = ("train", "val", "test")
LABELS = ("real", "fake")
FORMAT = 3  # raise it when the same settings no longer give the same images
SMALLEST_SIDE = 32


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    if "\n" in args.out or "\r" in args.out:
        raise UserError(f"--out {printable(args.out)} contains a line break, which lists cannot hold")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that unfinished folders are deleted
    out = Path(os.path.realpath(args.out))  # a symbolic link stays one: its folder is written
    if args.photographs:
        require_nothing_at(out, args.out)
        make_twins(args.photographs, out, args.autoencoder, args.seed)
        return 0
    settings = {"format": FORMAT, "size": args.size, "seed": args.seed}
    settings["counts"] = {"train": args.train, "val": args.val, "test": args.test}
    if read_settings(out) == settings:
        logger.info("%s holds these images already", printable(args.out))
        return 0
    require_nothing_at(out, args.out)
    logger.info("making images of %d x %d pixels in %s", args.size, args.size, printable(args.out))
    with unfinished_folder(out) as folder:
        make_images(settings, folder)
        write_lists(settings["counts"], folder, os.path.abspath(args.out))
        (folder / "README.txt").write_text(__doc__)
        write_json(folder / "settings.json", settings)
    return 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = options.Parser("python -m tools.example", "Make example images, or generated twins of photographs.")
    add = parser.add_argument
    add("--out", default="data/example", metavar="DIR", help="folder to make (default: %(default)s)")
    add("--size", type=int, default=256, metavar="N", help="side of the images in pixels, even (default: %(default)s)")
    for split, count in zip(SPLITS, (128, 32, 64), strict=True):
        add(f"--{split}", type=int, default=count, metavar="N", help="images per class (default: %(default)s)")
    add("--seed", type=int, default=123, metavar="N", help="fixes everything random (default: %(default)s)")
    add("--from", dest="photographs", metavar="DIR", help="write a twin of each image below this folder instead")
    text = "with --from: pass the images through TAEF2, about 1 GB of memory (default: simulated up-sampling)"
    add("--autoencoder", nargs=2, metavar=("ENCODER", "DECODER"), help=text)
    args = parser.parse_args(arguments)
    counts = [args.train, args.val, args.test]
    if args.size < SMALLEST_SIDE or args.size % 2:
        parser.error(f"--size must be an even number of at least {SMALLEST_SIDE}, got {args.size}")
    if min(counts) < 0 or not any(counts) or args.seed < 0:
        parser.error("--train, --val, --test and --seed must not be negative, and there must be some images")
    if args.autoencoder and not args.photographs:
        parser.error("--autoencoder needs --from DIR")
    return args


def read_settings(out: Path) -> dict | None:
    """Read the settings that an earlier call left in the folder; None if there are none."""
    try:
        return json.loads((out / "settings.json").read_text())
    except (OSError, ValueError):
        return None


def require_nothing_at(out: Path, name: str) -> None:
    """Raise UserError if the output folder holds anything, or is a file."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if os.path.lexists(out):
        what = "other files or images of other settings" if out.is_dir() else "a file"
        raise UserError(f"--out {printable(name)} is or holds {what}: give another folder, or remove this one")


@contextmanager
def unfinished_folder(out: Path) -> Iterator[Path]:
    """Give a temporary folder, which becomes `out` at the end, or is deleted if an error or a signal ends the block."""
    with TemporaryDirectory(prefix=".example", dir=make_folder(out.parent)) as temporary:
        folder = Path(temporary, "images")
        folder.mkdir()
        yield folder
        folder.replace(out)


def make_images(settings: dict, out: Path) -> None:
    """Write OUT/SPLIT/CLASS/INDEX.png for all splits. Image i does not depend on how many images there are."""
    jobs = []
    for split, count in settings["counts"].items():
        for label in LABELS:
            jobs += [(split, label, index) for index in range(count)]
        if count:
            for folder in ("real", *KINDS):
                (out / split / folder).mkdir(parents=True)
    for split, label, index in progress(jobs, "images", len(jobs)):
        key = (settings["seed"], SPLITS.index(split), LABELS.index(label), index)  # no scene is used twice
        rng = seeded_generator(*key)
        scene = draw_scene(settings["size"], rng)  # (H, W, 3)
        images = {"real": scene}
        if label == "fake":
            x = torch.from_numpy(scene).permute(2, 0, 1)[None] / 255  # (1, 3, H, W)
            images = {kind: to_pixels(upsample_again(x, kind, rng)) for kind in KINDS}
        for folder, pixels in images.items():
            Image.fromarray(pixels).save(out / split / folder / f"{index:05d}.png", compress_level=1)


def to_pixels(x: Tensor) -> np.ndarray:
    """Round one picture to 8 bits. x: (1, 3, H, W) in [0, 1]. Returns uint8 (H, W, 3)."""
    return (x[0] * 255).round().byte().permute(1, 2, 0).numpy()


def write_lists(counts: dict[str, int], folder: Path, listed: str) -> None:
    """Write the lists of real images for train_sr.py, with the paths that the images will have below `listed`."""
    for split in ("train", "val"):
        if counts[split]:
            paths = [f"{listed}/{split}/real/{index:05d}.png\n" for index in range(counts[split])]
            (folder / f"{split}.txt").write_bytes(
                "".join(paths).encode(errors="surrogateescape")
            )  # names may be any bytes


def make_twins(photographs: str, out: Path, autoencoder: Sequence[str] | None, seed: int) -> None:
    """Write a twin of each image below `photographs`. Raises UserError if there is none to make."""
    imitate = twins.up_sampling(seed)
    if autoencoder:
        imitate = twins.autoencoding(load_autoencoder(*autoencoder))
    with unfinished_folder(out) as folder:
        twins.write_twins(photographs, folder, imitate)


if __name__ == "__main__":
    sys.exit(run_program(main))
