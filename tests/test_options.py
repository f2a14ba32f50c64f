"""Tests of the command line parsers of train_sr.py, train_detector.py and test.py."""

import argparse
import re
from pathlib import Path

import pytest

from models.build import OPTION_NAMES
from utils import options
from utils.options import create_test_parser, create_train_detector_parser, create_train_sr_parser
from utils.training import FREE_SETTINGS

ROOT = Path(__file__).parents[1]
PARSERS = {
    "train_sr.py": create_train_sr_parser,
    "train_detector.py": create_train_detector_parser,
    "test.py": create_test_parser,
}

# RELEASED_SR and RELEASED_DETECTOR contain all flags of the programs of the paper's authors.
RELEASED_SR = """--train-file l.txt --eval-file e.txt --outputs-dir o --weights-file w --num-features 8 --growth-rate 8
 --num-blocks 2 --num-layers 2 --scale 3 --patch-size 12 --lr 1e-3 --lr-decay 0.5 --lr-decay-epoch 10 --batch-size 4
 --num-epochs 5 --num-save 2 --num-workers 1 --gpu-id 0 --seed 1 --vgg-lambda 0.1 --augment --completion
 --colorization"""
RELEASED_DETECTOR = """-a resnet18 --arch resnet50 --gpu 0 -b 2 --batch-size 4 -j 1 --workers 2 --lr 1e-3 --momentum 0.8
 --wd 1e-3 --epochs 5 --data-root-pos p --data-root-neg n --input-channel 3 --resume r --sr-weights-file w
 --output-path o --save-every-epoch 3 --seed 4 --no_dilation --sr-scale 4 --sr-num-features 64 --sr-growth-rate 64
 --sr-num-blocks 16 --sr-num-layers 8 --idx-stages 0 --fixed-sr --mode-sr none --lr-sr 0.1 --lw-sr 2"""

# Options that describe the networks. The default of each option is None, so that a checkpoint can set the value.
NETWORK_OPTIONS = {
    "sr_arch", "sr_args", "scale", "num_features", "growth_rate", "num_blocks", "num_layers", "features",
    "feature_args", "stage", "residual", "arch", "arch_args", "in_channels", "dilated",
}  # fmt: skip
SIZE_OPTIONS = {"crop_size", "resize"}


def list_parser_options_without_ignored_flags(program):
    """Return the options of a program, without --help and without the flags that the program accepts but ignores."""
    actions = PARSERS[program]()._actions
    return [a for a in actions if not isinstance(a, argparse._HelpAction) and a.dest != argparse.SUPPRESS]


def error_line_of_parser(program, arguments, capsys):
    """Return the error line for arguments that the parser must refuse with exit status 2."""
    with pytest.raises(SystemExit) as stopped:
        PARSERS[program]().parse_args(arguments)
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    return message


def test_the_flags_of_the_authors_train_sr_set_the_expected_options():
    args = vars(create_train_sr_parser().parse_args(RELEASED_SR.split()))
    expected = {
        "train_file": "l.txt", "eval_file": "e.txt", "outputs_dir": "o", "init": "w", "num_features": 8,
        "growth_rate": 8, "num_blocks": 2, "num_layers": 2, "scale": 3, "patch_size": 12, "lr": 1e-3, "lr_decay": 0.5,
        "lr_decay_epoch": 10, "batch_size": 4, "num_epochs": 5, "num_save": 2, "workers": 1, "gpu": "0", "seed": 1,
        "vgg_lambda": 0.1, "augment": True, "completion": True, "colorization": True,
    }  # fmt: skip
    assert {key: args[key] for key in expected} == expected


def test_the_flags_of_the_authors_train_py_set_the_expected_options_of_train_detector():
    args = vars(create_train_detector_parser().parse_args(RELEASED_DETECTOR.split()))
    expected = {
        "arch": "resnet50", "gpu": "0", "batch_size": 4, "workers": 2, "lr": 1e-3, "momentum": 0.8,
        "weight_decay": 1e-3, "epochs": 5, "real_roots": ["p"], "fake_roots": ["n"], "in_channels": 3, "resume": "r",
        "resynthesizer_file": "w", "output_path": "o", "save_every_epoch": 3, "seed": 4, "dilated": False, "scale": 4,
        "num_features": 64, "growth_rate": 64, "num_blocks": 16, "num_layers": 8, "stage": 0,
        "fixed_resynthesizer": True, "auxiliary": "none", "classifier_rate_factor": 0.1, "auxiliary_weight": 2.0,
    }  # fmt: skip
    assert {key: args[key] for key in expected} == expected


def test_test_py_accepts_the_authors_training_flags_and_says_that_they_have_no_effect(capsys):
    args = create_test_parser().parse_args([*RELEASED_DETECTOR.split(), "--save_path", "out/x"])
    assert (args.save_path, args.stage, args.dilated, args.resynthesizer_file) == ("out/x", 0, False, "w")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines] == [
        "--lr", "--momentum", "--wd", "--epochs", "--output-path", "--save-every-epoch", "--fixed-sr", "--mode-sr",
        "--lr-sr", "--lw-sr",
    ]  # fmt: skip


@pytest.mark.parametrize("program", ["train_detector.py", "test.py"])
def test_each_flag_of_the_authors_without_an_effect_prints_one_line(program, capsys):
    flags = """--dataset a --dataset_type b --start-epoch 1 -p 2 --print-freq 2 -e --evaluate --pretrained
        --world-size -1 --rank -1 --dist-url u --dist-backend nccl --multiprocessing-distributed --carlibration 1
        --defense 0"""
    PARSERS[program]().parse_args(flags.split())
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 15 and all(line.endswith("has no effect here") for line in lines)


def test_the_default_options_equal_the_settings_of_the_paper():
    sr = create_train_sr_parser().parse_args([])
    assert (sr.lr, sr.lr_decay, sr.lr_decay_epoch, sr.batch_size, sr.patch_size) == (1e-4, 0.5, 225, 12, 24)
    assert (sr.num_epochs, sr.num_save, sr.vgg_lambda, sr.seed, sr.patches_per_image) == (750, 15, 0.2, 123, 1)
    assert not (sr.augment or sr.completion or sr.colorization)
    detector = create_train_detector_parser().parse_args([])
    assert (detector.momentum, detector.weight_decay, detector.classifier_rate_factor) == (0.9, 1e-4, 0.02)
    assert (detector.save_every_epoch, detector.auxiliary, detector.fixed_resynthesizer) == (2, "none", False)


@pytest.mark.parametrize("program", ["train_detector.py", "test.py"])
def test_options_that_a_checkpoint_can_set_are_none_by_default(program):
    args = vars(PARSERS[program]().parse_args([]))
    assert {name: args[name] for name in NETWORK_OPTIONS | SIZE_OPTIONS} == dict.fromkeys(
        NETWORK_OPTIONS | SIZE_OPTIONS
    )


@pytest.mark.parametrize("program", PARSERS)
def test_every_option_has_a_help_text_and_is_used(program):
    files = [ROOT / program, *(ROOT / "utils").glob("*.py"), *(ROOT / "evaluation").glob("*.py")]
    source = "".join(file.read_text() for file in files if file.name != "options.py")
    used = {name for pair in re.findall(r"\bargs\.(\w+)|\"(\w+)\"", source) for name in pair}
    for option in list_parser_options_without_ignored_flags(program):
        assert option.help
        assert option.dest in used | NETWORK_OPTIONS | SIZE_OPTIONS, f"{option.dest} is not used"


@pytest.mark.parametrize("program", PARSERS)
def test_the_parser_accepts_any_name_of_a_network(program):
    """The parser does not check the names of networks, because users can add networks to models/build.py."""
    names = ("sr_arch", "features", "arch", "auxiliary")
    flags = [word for option in list_parser_options_without_ignored_flags(program) if option.dest in names
             for word in (option.option_strings[-1], "my-own")]  # fmt: skip
    args = vars(PARSERS[program]().parse_args(flags))
    assert len(flags) >= 2 and list(args.values()).count("my-own") == len(flags) // 2


def test_network_arguments_are_parsed_as_int_float_bool_or_text():
    words = ["--sr-args", "depth=12", "width=0.5", "--sr-args", "bias=true", "norm=false", "mode=a=b", "path=", "x=nan"]
    args = create_train_sr_parser().parse_args(words)
    expected = {"depth": 12, "width": 0.5, "bias": True, "norm": False, "mode": "a=b", "path": "", "x": "nan"}
    assert args.sr_args == expected
    assert [type(value) for value in args.sr_args.values()] == [type(value) for value in expected.values()]


@pytest.mark.parametrize("words", [["depth"], ["=3"], ["a b=3"], ["depth=3", "depth=4"]])
def test_network_arguments_that_are_not_key_value_pairs_with_distinct_keys_are_refused(words, capsys):
    assert "--arch-args" in error_line_of_parser("train_detector.py", ["--arch-args", *words], capsys)


@pytest.mark.parametrize("program", PARSERS)
@pytest.mark.parametrize(
    "wrong", [["--seed", "-1"], ["--batch-size", "0"], ["--workers", "x"], ["--precision", "fp8"], ["--see", "1"]]
)
def test_a_wrong_option_gives_one_error_line_and_exit_status_2(program, wrong, capsys):
    assert wrong[0] in error_line_of_parser(program, wrong, capsys)


def test_a_number_outside_the_limits_of_its_option_is_refused():
    parse = options.create_argparse_number_type(float, 0, 1)
    assert (parse("0"), parse("0.5"), parse("1")) == (0, 0.5, 1)
    for text in ("-0.1", "1.1", "nan", "inf"):
        with pytest.raises(argparse.ArgumentTypeError, match="from 0 to 1"):
            parse(text)
    with pytest.raises(argparse.ArgumentTypeError):
        options.create_argparse_number_type(float)("inf")


@pytest.mark.parametrize(
    "text, parsed", [("jpeg", ("jpeg", None)), ("jpeg=70", ("jpeg", 70.0)), ("noise=0.5", ("noise", 0.5))]
)
def test_the_flag_perturb_is_parsed_as_a_name_with_or_without_a_strength(text, parsed):
    assert create_test_parser().parse_args(["--perturb", text]).perturb == [parsed]


@pytest.mark.parametrize("program", PARSERS)
def test_the_lines_of_the_help_text_have_at_most_120_characters(program):
    text = PARSERS[program]().format_help()
    assert "--seed" in text and max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize(
    ("arguments", "message"),
    [("--batch-size 0", "expected a finite number of at least 1, got 0"), ("--lr nan", "expected a finite number")],
)
def test_the_error_for_an_impossible_number_states_which_numbers_are_allowed(arguments, message, capsys):
    with pytest.raises(SystemExit):
        create_train_detector_parser().parse_args(arguments.split())
    assert message in capsys.readouterr().err


def test_a_resumed_run_may_leave_out_each_option_that_chooses_a_network():
    assert set(OPTION_NAMES) <= FREE_SETTINGS
