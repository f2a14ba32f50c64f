"""Helpers that run small trainings with train_sr.py and train_detector.py, and read the files that they write."""

import json

import torch

import train_detector
import train_sr
from utils.errors import run_program
from utils.options import create_train_detector_parser, create_train_sr_parser

CPU = torch.device("cpu")
TINY = {"num_features": 4, "growth_rate": 4, "num_blocks": 1, "num_layers": 2}
SHAPE = "--num-features 4 --growth-rate 4 --num-blocks 1 --num-layers 2"
SIDE = 64  # width and height of the test images in pixels
COMMON = "--gpu cpu --workers 0 --vgg-weights random --lr 1e-3"
SR = f"{COMMON} --batch-size 2 --patch-size 8 --scale 2 {SHAPE}"
DETECTOR = f"{COMMON} --batch-size 4 --lr-sr 0.5 --arch resnet18 --no_dilation"


def make_arguments_of_train_sr(files, out, flags=""):
    """Return a command line for a small training with train_sr.py, which writes into the subfolder x2 of `out`.

    `flags` may contain the placeholders REAL, FAKE and VALIDATE.
    """
    return [
        "--train-file",
        str(files / "real"),
        "--outputs-dir",
        str(out),
        *SR.split(),
        *split_flags_and_insert_folder_paths(files, flags),
    ]


def make_arguments_of_train_detector(files, out, flags=""):
    """Return a command line for a small training with train_detector.py, which writes into the folder `out`.

    `flags` may contain the placeholders REAL, FAKE and VALIDATE.
    """
    roots = ["--data-root-pos", str(files / "real"), "--data-root-neg", str(files / "fake")]
    resynthesizer = ["--sr-weights-file", str(files / "rdn.pth")]
    return [
        *roots,
        *resynthesizer,
        "--output-path",
        str(out),
        *DETECTOR.split(),
        *split_flags_and_insert_folder_paths(files, flags),
    ]


def split_flags_and_insert_folder_paths(files, flags):
    """Split a string of flags into words, and replace REAL and FAKE by folders, and VALIDATE by validation flags."""
    flags = flags.replace("VALIDATE", "--val-root-pos REAL --val-root-neg FAKE")
    return flags.replace("REAL", str(files / "real")).replace("FAKE", str(files / "fake")).split()


def run_training(arguments):
    """Run train_detector.py or, without --output-path in the arguments, train_sr.py in this process."""
    arguments = [str(argument) for argument in arguments]
    if "--output-path" in arguments:
        train_detector.main(create_train_detector_parser().parse_args(arguments))
    else:
        train_sr.main(create_train_sr_parser().parse_args(arguments))


def run_training_for_status_and_last_line(arguments, capfd):
    """Run a training with the given command line, and return the exit status and the last line on stderr."""
    code = run_program(lambda: run_training(arguments))
    return code, capfd.readouterr().err.splitlines()[-1]


def read_checkpoint_content(path):
    """Return the content of a checkpoint file."""
    return torch.load(path, weights_only=True)


def read_epoch_statistics_of_training(folder):
    """Return the content of the file stats.jsonl in a folder as a list with one dict per epoch."""
    return [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]


def list_differing_checkpoint_entries(a, b, place=""):
    """Return one line of text for each entry in which two nested dicts or lists of tensors differ."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if torch.equal(a, b) else [place]
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{place}: {a.keys() ^ b.keys()}"]
        return [found for key in a for found in list_differing_checkpoint_entries(a[key], b[key], f"{place}.{key}")]
    if isinstance(a, list | tuple):
        pairs = enumerate(zip(a, b, strict=True))
        return [found for i, (p, q) in pairs for found in list_differing_checkpoint_entries(p, q, f"{place}.{i}")]
    return [] if a == b else [f"{place}: {a} != {b}"]


def read_checkpoint_without_settings_entry(path):
    """Return the content of a checkpoint without the entry "settings".

    The entry "settings" contains the name of the output folder, which differs between runs.
    """
    state = read_checkpoint_content(path)
    state.pop("settings", None)  # numbered checkpoints of a re-synthesizer contain no settings
    return state
