"""Toy trainings by both programs, and what they wrote."""

import json

import torch

import train_detector
import train_sr
from utils.errors import run_program
from utils.options import train_detector_parser, train_sr_parser

CPU = torch.device("cpu")
TINY = {"num_features": 4, "growth_rate": 4, "num_blocks": 1, "num_layers": 2}
SIDE = 64
SHAPE = [word for name, n in TINY.items() for word in (f"--{name.replace('_', '-')}", str(n))]
ALWAYS = "--gpu cpu --workers 0 --vgg-weights random --lr 1e-3"
SR = f"{ALWAYS} --batch-size 2 --patch-size 8 --scale 2 {' '.join(SHAPE)}"
DETECTOR = f"{ALWAYS} --batch-size 4 --lr-sr 0.5 --arch resnet18 --no_dilation"


def sr_arguments(files, out, flags=""):
    """For train_sr.py, which writes into OUT/x2."""
    return ["--train-file", str(files / "real"), "--outputs-dir", str(out), *SR.split(), *words(files, flags)]


def detector_arguments(files, out, flags=""):
    roots = ["--data-root-pos", str(files / "real"), "--data-root-neg", str(files / "fake")]
    rdn = ["--sr-weights-file", str(files / "rdn.pth")]
    return [*roots, *rdn, "--output-path", str(out), *DETECTOR.split(), *words(files, flags)]


def words(files, flags):
    """The flags as a list; REAL and FAKE stand for the folders of images, VALIDATE for validation on them."""
    flags = flags.replace("VALIDATE", "--val-root-pos REAL --val-root-neg FAKE")
    return flags.replace("REAL", str(files / "real")).replace("FAKE", str(files / "fake")).split()


def main_of(arguments):
    """The program that such arguments are for, as a function."""
    detector = "--output-path" in arguments
    program, parser = (train_detector, train_detector_parser) if detector else (train_sr, train_sr_parser)
    return lambda: program.main(parser().parse_args([str(a) for a in arguments]))


def train(arguments):
    """In this process; mistakes are raised."""
    main_of(arguments)()


def status(arguments, capfd):
    """(exit status, the last line that is told)."""
    return run_program(main_of(arguments)), capfd.readouterr().err.splitlines()[-1]


def read(path):
    return torch.load(path, weights_only=True)


def stats(folder):
    return [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]


def differences(a, b, where=""):
    """The places at which two nested states differ, bit for bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if torch.equal(a, b) else [where]
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{where}: {a.keys() ^ b.keys()}"]
        return [d for key in a for d in differences(a[key], b[key], f"{where}.{key}")]
    if isinstance(a, list | tuple):
        return [d for i, (p, q) in enumerate(zip(a, b, strict=True)) for d in differences(p, q, f"{where}.{i}")]
    return [] if a == b else [f"{where}: {a} != {b}"]


def without_settings(path):
    """A state but for the settings, in which the folder's name is."""
    return {key: value for key, value in read(path).items() if key != "settings"}
