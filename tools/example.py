"""Make example images, or make fake copies of photographs.

    python -m tools.example --out data/example --size 128 --train 128 --val 32 --test 64
    python -m tools.example --from PHOTO_DIR --out OUT [--autoencoder ENCODER.pth DECODER.pth]

Without --from, the program writes the images OUT/{train,val,test}/{real,nearest,bilinear}/00000.png and so on. Real
images are random drawings of overlapping shapes (tools/scenes.py). The folders nearest and bilinear contain fake
images: different random drawings, reduced to half their size and then up-sampled to the full size
(tools/upsampling.py). High accuracy on example images shows that training and testing work, but says nothing about
images from the internet. Licence of the images: CC0 1.0.

With --from, the program writes a fake copy (twin) of each image in the folder PHOTO_DIR and in its subfolders. To make
a twin, the program reduces and up-samples the image or, with --autoencoder, passes it through an autoencoder.
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
from tools.upsampling import KINDS, halve_and_upsample
from utils import options
from utils.console import make_printable, progress_bar
from utils.errors import UserError, run_program
from utils.files import make_folder, write_json
from utils.random_streams import seeded_generator

logger = logging.getLogger("tools.example")

SPLITS = ("train", "val", "test")
LABELS = ("real", "fake")
FORMAT = 3  # version of the example images, to be increased with each code change that changes their pixels
SMALLEST_SIDE = 32  # pixels


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    if "\n" in args.out or "\r" in args.out:
        raise UserError(
            f"--out {make_printable(args.out)} contains a line break: give a folder name without line breaks"
        )
    # On SIGTERM, raise SystemExit, so that `temporary_output_folder` deletes the temporary folder
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    out = Path(os.path.realpath(args.out))
    if args.photographs:
        require_missing_or_empty_folder(out, args.out)
        write_fake_copies_of_folder(args.photographs, out, args.autoencoder, args.seed)
        return 0
    settings = {"format": FORMAT, "size": args.size, "seed": args.seed}
    settings["counts"] = {"train": args.train, "val": args.val, "test": args.test}
    if read_settings_of_existing_images(out) == settings:
        logger.info(
            "%s already contains the requested example images, so the program writes none", make_printable(args.out)
        )
        return 0
    require_missing_or_empty_folder(out, args.out)
    logger.info("making example images of %d x %d pixels in %s", args.size, args.size, make_printable(args.out))
    with temporary_output_folder(out) as folder:
        write_example_images(settings, folder)
        write_lists_of_real_images(settings["counts"], folder, os.path.abspath(args.out))
        (folder / "README.txt").write_text(__doc__)
        write_json(folder / "settings.json", settings)
    return 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = options.Parser("python -m tools.example", "Make example images, or add generator traces to photographs.")
    add = parser.add_argument
    add("--out", default="data/example", metavar="DIR", help="output folder (default: %(default)s)")
    text = "height and width of the images in pixels, an even number (default: %(default)s)"
    add("--size", type=int, default=256, metavar="N", help=text)
    for split, count in zip(SPLITS, (128, 32, 64), strict=True):
        text = f"number of {split} images in each folder (default: %(default)s)"
        add(f"--{split}", type=int, default=count, metavar="N", help=text)
    add("--seed", type=int, default=123, metavar="N", help="random seed (default: %(default)s)")
    add(
        "--from",
        dest="photographs",
        metavar="DIR",
        help="instead of example images, write a fake copy (twin) of each image in DIR and its subfolders",
    )
    text = "with --from: weight files of the autoencoder TAEF2, which adds the traces (default: simulated up-sampling)"
    add("--autoencoder", nargs=2, metavar=("ENCODER", "DECODER"), help=text)
    args = parser.parse_args(arguments)
    counts = [args.train, args.val, args.test]
    if args.size < SMALLEST_SIDE or args.size % 2:
        parser.error(f"--size must be an even number of at least {SMALLEST_SIDE}, got {args.size}")
    if min(counts) < 0 or not any(counts) or args.seed < 0:
        parser.error(
            "--seed, --train, --val and --test must be at least 0, and at least one of --train, --val and --test must"
            " be above 0"
        )
    if args.autoencoder and not args.photographs:
        parser.error("--autoencoder needs photographs: give their folder with --from DIR")
    return args


def read_settings_of_existing_images(out: Path) -> dict | None:
    """Read the settings of existing example images from settings.json. Returns None if the file cannot be read."""
    try:
        return json.loads((out / "settings.json").read_text())
    except (OSError, ValueError):
        return None


def require_missing_or_empty_folder(out: Path, name: str) -> None:
    """Raise a UserError if `out` is a file or a non-empty folder."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if os.path.lexists(out):
        what = "a folder with other files or with images of other settings" if out.is_dir() else "a file"
        raise UserError(
            f"--out must be a new or empty folder, but {make_printable(name)} is {what}: give another folder, or remove"
            f" {make_printable(name)}"
        )


@contextmanager
def temporary_output_folder(out: Path) -> Iterator[Path]:
    """Create a temporary folder for a `with` block, and rename the folder to `out` when the block ends.

    If the block ends with an exception, the temporary folder is deleted.
    """
    with TemporaryDirectory(prefix=".example", dir=make_folder(out.parent)) as temporary:
        folder = Path(temporary, "images")
        folder.mkdir()
        yield folder
        folder.replace(out)


def write_example_images(settings: dict, out: Path) -> None:
    """Write the example images OUT/SPLIT/FOLDER/INDEX.png, where FOLDER is "real", "nearest" or "bilinear".

    The pixels of an image do not depend on how many images are requested.
    """
    jobs = []
    for split, count in settings["counts"].items():
        for label in LABELS:
            jobs += [(split, label, index) for index in range(count)]
        if count:
            for folder in ("real", *KINDS):
                (out / split / folder).mkdir(parents=True)
    for split, label, index in progress_bar(jobs, "images", len(jobs)):
        key = (settings["seed"], SPLITS.index(split), LABELS.index(label), index)
        rng = seeded_generator(*key)
        scene = draw_scene(settings["size"], rng)  # (H, W, 3)
        images = {"real": scene}
        if label == "fake":
            x = torch.from_numpy(scene).permute(2, 0, 1)[None] / 255  # (1, 3, H, W)
            images = {kind: convert_to_uint8(halve_and_upsample(x, kind, rng)) for kind in KINDS}
        for folder, pixels in images.items():
            Image.fromarray(pixels).save(out / split / folder / f"{index:05d}.png", compress_level=1)


def convert_to_uint8(x: Tensor) -> np.ndarray:
    """Convert an image tensor (1, 3, H, W) in [0, 1] to a uint8 array (H, W, 3)."""
    return (x[0] * 255).round().byte().permute(1, 2, 0).numpy()


def write_lists_of_real_images(counts: dict[str, int], folder: Path, listed: str) -> None:
    """Write the lists train.txt and val.txt, which name the real images for train_sr.py.

    Args:
        listed: absolute path of the output folder, with which the paths in the lists begin.
    """
    for split in ("train", "val"):
        if counts[split]:
            paths = [f"{listed}/{split}/real/{index:05d}.png\n" for index in range(counts[split])]
            content = "".join(paths).encode(errors="surrogateescape")  # a path may contain bytes that are not UTF-8
            (folder / f"{split}.txt").write_bytes(content)


def write_fake_copies_of_folder(photographs: str, out: Path, autoencoder: Sequence[str] | None, seed: int) -> None:
    """Write a fake copy (twin) of each image in the folder `photographs`.

    Raises:
        UserError: if no fake copy could be made.
    """
    imitate = twins.create_upsampling_function(seed)
    if autoencoder:
        imitate = twins.create_autoencoder_function(load_autoencoder(*autoencoder))
    with temporary_output_folder(out) as folder:
        twins.write_fake_copies(photographs, folder, imitate)


if __name__ == "__main__":
    sys.exit(run_program(main))
