"""Helpers that run test.py, write tiny detectors and images for test.py, and read the files that test.py writes."""

import csv
import os
from pathlib import Path

import numpy as np
import torch
from golden_rule import load_fixed_pseudo_random_weights
from PIL import Image

import test as program
from models.features import VGG19
from models.rdn import RDN
from models.resnet import DeepStemResNet
from utils.errors import run_program
from utils.options import create_test_parser

GOLDEN = Path(__file__).parent / "golden" / "reference_outputs.npz"
TINY = {"num_features": 8, "growth_rate": 8, "num_blocks": 1, "num_layers": 2}
CONFIG = {
    "resynthesizer": {"name": "rdn", "scale": 4, "args": TINY},
    "features": {"name": "pixels", "args": {}},
    "classifier": {"name": "resnet18", "args": {}},
}
IMAGES = 9  # number of images that `write_noise_images` writes into a folder


def run_test_py(*argv) -> int:
    """Run test.py with the given command line in this process, and return the exit status."""
    try:
        return run_program(lambda: program.main(create_test_parser().parse_args([str(a) for a in argv])))
    except SystemExit as exit_request:  # argparse exits if it cannot parse the command line
        return exit_request.code


def error_line_of_test_py(capfd, *argv) -> str:
    """Require that test.py refuses a command line with exit status 2, and return the only error line of test.py."""
    capfd.readouterr()
    assert run_test_py(*argv) == 2
    out, err = capfd.readouterr()
    *before, line = err.splitlines()
    assert line.startswith("error: ") and out == "", err
    assert "error: " not in "".join(before) and "Traceback" not in err, err
    return line


def make_arguments_of_test_py(detector, images, path, *more) -> list:
    """Return a command line for test.py that scores images without labels."""
    return ["--gpu", "cpu", "-j", 0, "-b", 2, "--resume", detector, "--input", images, "--save_path", path, *more]


def write_noise_image(path, key: int, size: tuple[int, int] = (32, 32)) -> Path:
    """Write a noise image of the given size (height, width) in pixels, and return the path of the image."""
    rng = np.random.default_rng(key)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize(size[::-1])
    pixels = np.clip(np.asarray(coarse, int) + rng.integers(-30, 31, (*size, 3)), 0, 255).astype(np.uint8)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def write_noise_images(folder: Path) -> Path:
    """Write nine noise images of two sizes into a folder. Return the folder."""
    for key in range(IMAGES):
        write_noise_image(folder / f"{key}.png", key, (32, 32) if key % 4 else (36, 40))
    return folder


def write_detector(path: Path, **content) -> Path:
    """Write a checkpoint of a small detector on pixel residuals. `content` replaces or extends the default entries."""
    state = {"state_dict": load_fixed_pseudo_random_weights(DeepStemResNet(3, "resnet18")).state_dict()}
    state["sr_state_dict"] = load_fixed_pseudo_random_weights(RDN(**TINY)).state_dict()
    torch.save({**state, "config": CONFIG, **content}, path)
    return path


def write_images_and_checkpoints_of_the_authors_format(folder: Path) -> Path:
    """Write two images, VGG-19 weights, an RDN and two classifiers in the file formats of the paper's authors."""
    rdn = load_fixed_pseudo_random_weights(RDN()).state_dict()
    torch.save(rdn, folder / "sr_bare.pth")
    torch.save({"state_dict": {f"module.{k}": v for k, v in rdn.items()}}, folder / "sr_module.pth.tar")
    torch.save(load_fixed_pseudo_random_weights(VGG19()).state_dict(), folder / "vgg19.pth")
    for name, channels in (("pixel", 3), ("stage5", 512)):
        content = {"epoch": 100, "arch": "resnet50", "optimizer": {"state": {}, "param_groups": [{"params": [0, 1]}]}}
        content["state_dict"] = load_fixed_pseudo_random_weights(DeepStemResNet(channels)).state_dict()
        torch.save(content, folder / f"{name}.pth.tar")
    for name, pixels in zip(("real", "fake"), np.load(GOLDEN)["image"], strict=True):
        (folder / name).mkdir()
        Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / name / "0.png")
    return folder


def read_csv_rows(path) -> list[dict]:
    """Return the rows of a CSV file as dicts."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def list_sorted_names_in_folder(folder: Path) -> list[str]:
    """Return the sorted names of the files and subfolders in a folder."""
    return sorted(os.listdir(folder))


def read_bytes_of_all_files_in_folder(folder: Path) -> dict[str, bytes]:
    """Return a dict from the relative path of each file below a folder to the bytes of the file."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
