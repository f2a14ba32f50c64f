"""Runs of test.py for tests: tiny detectors, images, and what was written."""

import csv
import os
from pathlib import Path

import numpy as np
import torch
from golden_rule import fill
from PIL import Image

import test as program
from models.features import VGG19
from models.rdn import RDN
from models.resnet import DeepStemResNet
from utils.errors import run_program
from utils.options import test_parser as parser_of_test

GOLDEN = Path(__file__).parent / "golden" / "reference_outputs.npz"
TINY = {"num_features": 8, "growth_rate": 8, "num_blocks": 1, "num_layers": 2}
CONFIG = {
    "resynthesizer": {"name": "rdn", "scale": 4, "args": TINY},
    "features": {"name": "pixels", "args": {}},
    "classifier": {"name": "resnet18", "args": {}},
}
IMAGES = 9  # in a folder by `write_images`


def score(*argv) -> int:
    """Do what `python test.py ARGV` does, in this process. Returns the exit status."""
    try:
        return run_program(lambda: program.main(parser_of_test().parse_args([str(a) for a in argv])))
    except SystemExit as stopped:  # by argparse
        return stopped.code


def mistake(capfd, *argv) -> str:
    """Run test.py, and check that it is refused: exit status 2, nothing on stdout, and one error line, which is returned."""
    capfd.readouterr()
    assert score(*argv) == 2
    out, err = capfd.readouterr()
    *before, line = err.splitlines()
    assert line.startswith("error: ") and out == "", err
    assert "error: " not in "".join(before) and "Traceback" not in err, err
    return line


def arguments(detector, images, path, *more) -> list:
    """Return the arguments of a run without labels, which draws no figure."""
    return ["--gpu", "cpu", "-j", 0, "-b", 2, "--resume", detector, "--input", images, "--save_path", path, *more]


def write_image(path, key: int, size: tuple[int, int] = (32, 32)) -> Path:
    """Write a picture of noise of several scales, (height, width) pixels."""
    rng = np.random.default_rng(key)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize(size[::-1])
    pixels = np.clip(np.asarray(coarse, int) + rng.integers(-30, 31, (*size, 3)), 0, 255).astype(np.uint8)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def write_images(folder: Path) -> Path:
    """Write IMAGES images of two sizes."""
    for key in range(IMAGES):
        write_image(folder / f"{key}.png", key, (32, 32) if key % 4 else (36, 40))
    return folder


def write_detector(path: Path, **content) -> Path:
    """Write a small detector on pixels, whose verdicts differ from image to image. content: further entries."""
    state = {"state_dict": fill(DeepStemResNet(3, "resnet18")).state_dict()}
    state["sr_state_dict"] = fill(RDN(**TINY)).state_dict()
    torch.save({**state, "config": CONFIG, **content}, path)
    return path


def write_release(folder: Path) -> Path:
    """Write released checkpoints, filled as the golden rule says, and the two golden images."""
    rdn = fill(RDN()).state_dict()
    torch.save(rdn, folder / "sr_bare.pth")
    torch.save({"state_dict": {f"module.{k}": v for k, v in rdn.items()}}, folder / "sr_module.pth.tar")
    torch.save(fill(VGG19()).state_dict(), folder / "vgg19.pth")
    for name, channels in (("pixel", 3), ("stage5", 512)):
        content = {"epoch": 100, "arch": "resnet50", "optimizer": {"state": {}, "param_groups": [{"params": [0, 1]}]}}
        content["state_dict"] = fill(DeepStemResNet(channels)).state_dict()
        torch.save(content, folder / f"{name}.pth.tar")
    for name, pixels in zip(("real", "fake"), np.load(GOLDEN)["image"], strict=True):
        (folder / name).mkdir()
        Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / name / "0.png")
    return folder


def rows_of(path) -> list[dict]:
    """Read the rows of a CSV file."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def files_in(folder: Path) -> list[str]:
    """List the names in a folder."""
    return sorted(os.listdir(folder))


def contents(folder: Path) -> dict[str, bytes]:
    """Read all files in a folder and below it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
