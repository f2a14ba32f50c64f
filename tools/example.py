"""Make example images for trying out the programs, or generated twins of your own photographs.

    python -m tools.example --out data/example --size 128 --train 128 --val 32 --test 64
    python -m tools.example --from PHOTOGRAPHS --out TWINS [--autoencoder ENCODER.pth DECODER.pth]

The first command writes OUT/{train,val,test}/{real,nearest,bilinear}/00000.png, settings.json, README.txt, and the
lists of real images train.txt and val.txt for train_sr.py. Real images are random scenes of overlapping shapes
(tools/scenes.py). Fake images are different scenes that are halved and up-sampled again (tools/upsampling.py). No
generator made these images. Metrics on them show that the programs work, but say nothing about images from the
internet. Licence of the images: CC0 1.0.

The second command writes a generated twin of each image below PHOTOGRAPHS. The twin gets the same relative path below
OUT (tools/twins.py).

The output folder appears only when all of its images are made.
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
from utils.console import printable, progress_bar
from utils.errors import UserError, run_program
from utils.files import make_folder, write_json
from utils.random_streams import seeded_generator

logger = logging.getLogger("tools.example")

SPLITS = ("train", "val", "test")
LABELS = ("real", "fake")
FORMAT = 3  # version of the images: increase it when the same settings give different images
SMALLEST_SIDE = 32  # pixels


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    if "\n" in args.out or "\r" in args.out:
        raise UserError(f"--out {printable(args.out)} contains a line break, which lists cannot hold")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # ends `with` blocks
    out = Path(os.path.realpath(args.out))  # if --out is a symbolic link, write to its target
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
    add("--out", default="data/example", metavar="DIR", help="output folder (default: %(default)s)")
    add("--size", type=int, default=256, metavar="N", help="side of the images in pixels, even (default: %(default)s)")
    for split, count in zip(SPLITS, (128, 32, 64), strict=True):
        add(f"--{split}", type=int, default=count, metavar="N", help=f"{split} images per class (default: %(default)s)")
    add("--seed", type=int, default=123, metavar="N", help="random seed (default: %(default)s)")
    add("--from", dest="photographs", metavar="DIR", help="make a generated twin of each image in this folder")
    text = "with --from: weight files of TAEF2, which makes the twins in about 1 GB (default: simulated up-sampling)"
    add("--autoencoder", nargs=2, metavar=("ENCODER", "DECODER"), help=text)
    args = parser.parse_args(arguments)
    counts = [args.train, args.val, args.test]
    if args.size < SMALLEST_SIDE or args.size % 2:
        parser.error(f"--size must be an even number of at least {SMALLEST_SIDE}, got {args.size}")
    if min(counts) < 0 or not any(counts) or args.seed < 0:
        parser.error("--train, --val, --test and --seed must not be negative, and at least one image is needed")
    if args.autoencoder and not args.photographs:
        parser.error("--autoencoder needs --from DIR")
    return args


def read_settings(out: Path) -> dict | None:
    """Read settings.json of an earlier call in the output folder. Returns None if it cannot be read."""
    try:
        return json.loads((out / "settings.json").read_text())
    except (OSError, ValueError):
        return None


def require_nothing_at(out: Path, name: str) -> None:
    """Raise a UserError if the output folder is a file or is not empty."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if os.path.lexists(out):
        what = "other files or images made with other settings" if out.is_dir() else "a file"
        raise UserError(f"--out {printable(name)} is or holds {what}: give another folder, or remove {printable(name)}")


@contextmanager
def unfinished_folder(out: Path) -> Iterator[Path]:
    """Create a temporary folder for a `with` block. The folder is renamed to `out` when the block ends.

    If an exception or a signal ends the block, the folder is deleted.
    """
    with TemporaryDirectory(prefix=".example", dir=make_folder(out.parent)) as temporary:
        folder = Path(temporary, "images")
        folder.mkdir()
        yield folder
        folder.replace(out)


def make_images(settings: dict, out: Path) -> None:
    """Write OUT/SPLIT/CLASS/INDEX.png for all splits. The image at INDEX does not depend on the number of images."""
    jobs = []
    for split, count in settings["counts"].items():
        for label in LABELS:
            jobs += [(split, label, index) for index in range(count)]
        if count:
            for folder in ("real", *KINDS):
                (out / split / folder).mkdir(parents=True)
    for split, label, index in progress_bar(jobs, "images", len(jobs)):
        key = (settings["seed"], SPLITS.index(split), LABELS.index(label), index)  # a different scene per image
        rng = seeded_generator(*key)
        scene = draw_scene(settings["size"], rng)  # (H, W, 3)
        images = {"real": scene}
        if label == "fake":
            x = torch.from_numpy(scene).permute(2, 0, 1)[None] / 255  # (1, 3, H, W)
            images = {kind: to_pixels(upsample_again(x, kind, rng)) for kind in KINDS}
        for folder, pixels in images.items():
            Image.fromarray(pixels).save(out / split / folder / f"{index:05d}.png", compress_level=1)


def to_pixels(x: Tensor) -> np.ndarray:
    """Round an image, (1, 3, H, W) in [0, 1], to 8 bits. Returns uint8 (H, W, 3)."""
    return (x[0] * 255).round().byte().permute(1, 2, 0).numpy()


def write_lists(counts: dict[str, int], folder: Path, listed: str) -> None:
    """Write train.txt and val.txt, the lists of real images for train_sr.py.

    Args:
        folder: temporary folder to write the lists to.
        listed: final output folder, which the listed paths begin with.
    """
    for split in ("train", "val"):
        if counts[split]:
            paths = [f"{listed}/{split}/real/{index:05d}.png\n" for index in range(counts[split])]
            content = "".join(paths).encode(errors="surrogateescape")  # a path may contain bytes that are not UTF-8
            (folder / f"{split}.txt").write_bytes(content)


def make_twins(photographs: str, out: Path, autoencoder: Sequence[str] | None, seed: int) -> None:
    """Write a generated twin of each image below `photographs`. Raises a UserError if no twin could be made."""
    imitate = twins.up_sampling(seed)
    if autoencoder:
        imitate = twins.autoencoding(load_autoencoder(*autoencoder))
    with unfinished_folder(out) as folder:
        twins.write_twins(photographs, folder, imitate)


if __name__ == "__main__":
    sys.exit(run_program(main))
