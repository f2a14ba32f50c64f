"""Toy trainings by both programs, and what they have written."""

import json

import torch

import train_detector
import train_sr
from utils.errors import run_program
from utils.options import train_detector_parser, train_sr_parser

CPU = torch.device("cpu")
TINY = {"num_features": 4, "growth_rate": 4, "num_blocks": 1, "num_layers": 2}
SHAPE = "--num-features 4 --growth-rate 4 --num-blocks 1 --num-layers 2"
SIDE = 64  # pixels
COMMON = "--gpu cpu --workers 0 --vgg-weights random --lr 1e-3"
SR = f"{COMMON} --batch-size 2 --patch-size 8 --scale 2 {SHAPE}"
DETECTOR = f"{COMMON} --batch-size 4 --lr-sr 0.5 --arch resnet18 --no_dilation"


def sr_arguments(files, out, flags=""):
    """Return arguments for train_sr.py, which writes into OUT/x2. flags: see `words`."""
    return ["--train-file", str(files / "real"), "--outputs-dir", str(out), *SR.split(), *words(files, flags)]


def detector_arguments(files, out, flags=""):
    """Return arguments for train_detector.py, which writes into OUT. flags: see `words`."""
    roots = ["--data-root-pos", str(files / "real"), "--data-root-neg", str(files / "fake")]
    resynthesizer = ["--sr-weights-file", str(files / "rdn.pth")]
    return [*roots, *resynthesizer, "--output-path", str(out), *DETECTOR.split(), *words(files, flags)]


def words(files, flags):
    """Split flags into words. REAL and FAKE become the folders of images, VALIDATE the flags to validate on them."""
    flags = flags.replace("VALIDATE", "--val-root-pos REAL --val-root-neg FAKE")
    return flags.replace("REAL", str(files / "real")).replace("FAKE", str(files / "fake")).split()


def train(arguments):
    """Run the program that the arguments are for, in this process. Mistakes are raised."""
    arguments = [str(argument) for argument in arguments]
    if "--output-path" in arguments:
        train_detector.main(train_detector_parser().parse_args(arguments))
    else:
        train_sr.main(train_sr_parser().parse_args(arguments))


def status(arguments, capfd):
    """Run the program that the arguments are for. Return its exit status and the last line that it prints."""
    code = run_program(lambda: train(arguments))
    return code, capfd.readouterr().err.splitlines()[-1]


def read(path):
    """Read a checkpoint."""
    return torch.load(path, weights_only=True)


def stats(folder):
    """Read stats.jsonl: one dict per epoch."""
    return [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]


def differences(a, b, place=""):
    """Return the places at which two nested states differ in any bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if torch.equal(a, b) else [place]
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{place}: {a.keys() ^ b.keys()}"]
        return [found for key in a for found in differences(a[key], b[key], f"{place}.{key}")]
    if isinstance(a, list | tuple):
        pairs = enumerate(zip(a, b, strict=True))
        return [found for i, (p, q) in pairs for found in differences(p, q, f"{place}.{i}")]
    return [] if a == b else [f"{place}: {a} != {b}"]


def without_settings(path):
    """Read a state without its settings, which hold the name of the output folder."""
    state = read(path)
    state.pop("settings", None)  # numbered files of a re-synthesizer have none
    return state
