"""The options: all flags of the released programs are accepted, each is read, mistakes are one line at once."""

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data import perturbations
from models import auxiliary
from models.resnet import ARCHITECTURES
from utils import options
from utils.options import test_parser as parser_of_test
from utils.options import train_detector_parser, train_sr_parser

ROOT = Path(__file__).parents[1]
PROGRAMS = {"train_sr.py": train_sr_parser, "train_detector.py": train_detector_parser, "test.py": parser_of_test}

RELEASED_SR = """--train-file l.txt --eval-file e.txt --outputs-dir o --weights-file w --num-features 8 --growth-rate 8
 --num-blocks 2 --num-layers 2 --scale 3 --patch-size 12 --lr 1e-3 --lr-decay 0.5 --lr-decay-epoch 10 --batch-size 4
 --num-epochs 5 --num-save 2 --num-workers 1 --gpu-id 0 --seed 1 --vgg-lambda 0.1 --augment --completion --colorization"""
RELEASED_DETECTOR = """-a resnet18 --arch resnet50 --gpu 0 -b 2 --batch-size 4 -j 1 --workers 2 --lr 1e-3 --momentum 0.8
 --wd 1e-3 --epochs 5 --data-root-pos p --data-root-neg n --input-channel 3 --resume r --sr-weights-file w
 --output-path o --save-every-epoch 3 --seed 4 --no_dilation --sr-scale 4 --sr-num-features 64 --sr-growth-rate 64
 --sr-num-blocks 16 --sr-num-layers 8 --idx-stages 0 --fixed-sr --mode-sr none --lr-sr 0.1 --lw-sr 2"""

# What a checkpoint may say reaches models/build.py and utils/scoring.py as vars(args)
BY_NAME = {
    "arch", "stage", "in_channels", "dilated", "scale", "num_features", "growth_rate", "num_blocks", "num_layers",
    "crop_size", "crops", "resize",
}  # fmt: skip


def actions(parser):
    return [a for a in parser._actions if not isinstance(a, argparse._HelpAction) and a.dest != argparse.SUPPRESS]


def test_the_released_flags_of_train_sr():
    args = vars(train_sr_parser().parse_args(RELEASED_SR.split()))
    wanted = {
        "train_file": "l.txt", "eval_file": "e.txt", "outputs_dir": "o", "init": "w", "num_features": 8,
        "growth_rate": 8, "num_blocks": 2, "num_layers": 2, "scale": 3, "patch_size": 12, "lr": 1e-3, "lr_decay": 0.5,
        "lr_decay_epoch": 10, "batch_size": 4, "num_epochs": 5, "num_save": 2, "workers": 1, "gpu": "0", "seed": 1,
        "vgg_lambda": 0.1, "augment": True, "completion": True, "colorization": True,
    }  # fmt: skip
    assert {key: args[key] for key in wanted} == wanted


def test_the_released_flags_of_train_detector():
    args = vars(train_detector_parser().parse_args(RELEASED_DETECTOR.split()))
    wanted = {
        "arch": "resnet50", "gpu": "0", "batch_size": 4, "workers": 2, "lr": 1e-3, "momentum": 0.8,
        "weight_decay": 1e-3, "epochs": 5, "real_roots": ["p"], "fake_roots": ["n"], "in_channels": 3, "resume": "r",
        "resynthesizer_file": "w", "output_path": "o", "save_every_epoch": 3, "seed": 4, "dilated": False, "scale": 4,
        "num_features": 64, "growth_rate": 64, "num_blocks": 16, "num_layers": 8, "stage": 0,
        "fixed_resynthesizer": True, "auxiliary": "none", "classifier_grad_scale": 0.1, "auxiliary_weight": 2.0,
    }  # fmt: skip
    assert {key: args[key] for key in wanted} == wanted


def test_the_released_flags_of_test(capsys):
    args = parser_of_test().parse_args([*RELEASED_DETECTOR.split(), "--save_path", "out/x"])
    assert (args.save_path, args.stage, args.dilated, args.resynthesizer_file) == ("out/x", 0, False, "w")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines] == [
        "--lr", "--momentum", "--wd", "--epochs", "--output-path", "--save-every-epoch", "--fixed-sr", "--mode-sr",
        "--lr-sr", "--lw-sr",
    ]  # fmt: skip


@pytest.mark.parametrize("program", ["train_detector.py", "test.py"])
def test_released_and_dropped_flags_without_an_effect_are_one_line_each(program, capsys):
    flags = """--dataset a --dataset_type b --start-epoch 1 -p 2 --print-freq 2 -e --evaluate --pretrained
        --world-size -1 --rank -1 --dist-url u --dist-backend nccl --multiprocessing-distributed --carlibration 1
        --defense 0"""
    PROGRAMS[program]().parse_args(flags.split())
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 15 and all("no effect" in line for line in lines)


def test_the_defaults_are_the_papers():
    sr = train_sr_parser().parse_args([])
    assert (sr.lr, sr.lr_decay, sr.lr_decay_epoch, sr.batch_size, sr.patch_size) == (1e-4, 0.5, 225, 12, 24)
    assert (sr.num_epochs, sr.num_save, sr.vgg_lambda, sr.seed, sr.patches_per_image) == (750, 15, 0.2, 123, 1)
    assert not (sr.augment or sr.completion or sr.colorization)
    detector = train_detector_parser().parse_args([])
    assert (detector.momentum, detector.weight_decay, detector.classifier_grad_scale) == (0.9, 1e-4, 0.02)
    assert (detector.save_every_epoch, detector.auxiliary, detector.fixed_resynthesizer) == (2, "none", False)
    assert all(
        getattr(detector, name) is None for name in BY_NAME - {"crops"}
    )  # what a checkpoint says is not overruled


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_option_is_read_and_explained(program):
    source = "".join((ROOT / name).read_text() for name in (program, "utils/sources.py", "utils/training.py"))
    read = {name for names in re.findall(r"\bargs\.(\w+)|\bself\.settings\[\"(\w+)", source) for name in names}
    assert "vars(args)" in source
    options = actions(PROGRAMS[program]())
    assert {option.dest for option in options} - read - BY_NAME == set() and all(option.help for option in options)


def test_words_that_stand_here_are_those_used_elsewhere():
    assert options.PERTURBATIONS == perturbations.NAMES
    assert tuple(options.ARCHITECTURES) == tuple(ARCHITECTURES)
    assert options.TASKS == tuple(auxiliary.TASKS)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(
    "wrong", [["--seed", "-1"], ["--batch-size", "0"], ["--workers", "x"], ["--precision", "fp8"], ["--see", "1"]]
)
def test_a_wrong_option_is_one_line_and_status_2(program, wrong, capsys):
    with pytest.raises(SystemExit) as stopped:
        PROGRAMS[program]().parse_args(wrong)
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1 and wrong[0] in message


def test_help_and_mistakes_come_before_pytorch():
    """Half a second is the bar; a program that waits for PyTorch takes two."""
    for program, flags, status in ((p, f, s) for p in PROGRAMS for f, s in (("--help", 0), ("--no-such-flag", 2))):
        began = time.monotonic()
        code = f"import runpy, sys; sys.argv = [{program!r}, {flags!r}]; sys.modules['torch'] = sys.modules['numpy'] = None"
        run = [sys.executable, "-c", f"{code}; runpy.run_path({program!r}, run_name='__main__')"]
        assert subprocess.run(run, cwd=ROOT, capture_output=True).returncode == status
        assert time.monotonic() - began < 1.5  # this machine may be busy


def test_numbers_have_limits():
    parse = options.number(float, 0, 1)
    assert parse("0.5") == 0.5 and parse("0") == 0 and parse("1") == 1
    for text in ("-0.1", "1.1", "nan"):
        with pytest.raises(argparse.ArgumentTypeError, match="from 0 to 1"):
            parse(text)
