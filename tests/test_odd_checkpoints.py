"""Tests that a checkpoint with a wrong value never causes a traceback in test.py or train_detector.py."""

import copy

import pytest
import torch
from files import random_rgb_pixels, save_image
from trainings import TINY, make_arguments_of_train_detector, read_checkpoint_content, run_training

import test as tester
import train_detector
from models.rdn import RDN
from utils import options
from utils.errors import run_program

pytestmark = pytest.mark.usefixtures("shrink_resnet18")


@pytest.fixture(scope="module")
def folder_with_detector_and_images(tmp_path_factory, shrink_resnet18):
    """Return a folder with one real image, one fake image, and the checkpoint pixel.pth.tar of a detector."""
    root = tmp_path_factory.mktemp("odd")
    torch.save(RDN(**TINY).state_dict(), root / "rdn.pth")
    for kind in ("real", "fake"):
        (root / kind).mkdir()
        save_image(root / kind / "a.png", random_rgb_pixels(64, 64, len(kind)))
    run_training(make_arguments_of_train_detector(root, root / "out", "--fixed-sr --epochs 1 --batch-size 2"))
    (root / "out/last.pth.tar").rename(root / "pixel.pth.tar")
    return root


def run_program_for_status_and_last_line(main, parser, flags, capfd):
    """Run a program in this process, and return the exit status and the last line on stderr."""
    args = parser().parse_args([*flags.split(), "--gpu", "cpu", "--workers", "0"])
    code = run_program(lambda: main(args))
    return code, (capfd.readouterr().err.splitlines() or [""])[-1]


def run_test_py_with_checkpoint(checkpoint, files, capfd):
    """Score an image by test.py with the given checkpoint, and return the exit status and the last line on stderr."""
    return run_program_for_status_and_last_line(
        tester.main, options.create_test_parser, f"--resume {checkpoint} --input {files}/real/a.png", capfd
    )


def run_train_detector_resuming_checkpoint(checkpoint, files, capfd):
    """Resume a checkpoint with train_detector.py, and return the exit status and the last line on stderr."""
    flags = f"--data-root-pos {files}/real --data-root-neg {files}/fake --fixed-sr --epochs 1 --batch-size 2"
    flags = f"{flags} --vgg-weights random --resume {checkpoint} --output-path {checkpoint.parent}/out"
    return run_program_for_status_and_last_line(train_detector.main, options.create_train_detector_parser, flags, capfd)


ODD = [-1, float("nan"), "x", [1], {"name": 3}, torch.ones(2)]
PLACES = [
    ("config",), ("config", "resynthesizer"), ("config", "resynthesizer", "name"), ("config", "resynthesizer", "scale"),
    ("config", "resynthesizer", "args"), ("config", "features"), ("config", "features", "args"),
    ("config", "classifier"), ("config", "classifier", "args"), ("config", "images"), ("config", "images", "crop_size"),
    ("config", "images", "resize"), ("config", "resynthesizer_fingerprint"), ("config", "vgg"), ("calibration",),
    ("calibration", "temperature"), ("calibration", "t_fake"), ("calibration", "t_real"), ("trained_on",),
    ("state_dict",), ("sr_state_dict",), ("settings",), ("progress",), ("optimizer",),
]  # fmt: skip
CALIBRATION = {"temperature": 2.0, "t_fake": 0.6, "t_real": 0.4, "source": "a list"}


@pytest.mark.parametrize("place", PLACES, ids=".".join)
def test_a_checkpoint_with_a_wrong_value_never_causes_a_traceback(
    folder_with_detector_and_images, tmp_path, capfd, place
):
    """The program either accepts a wrong value in the checkpoint, or ends with one error line and exit status 2."""
    state = read_checkpoint_content(folder_with_detector_and_images / "pixel.pth.tar") | {"calibration": CALIBRATION}
    path = tmp_path / "odd.pth.tar"
    for value in ODD:
        changed = copy.deepcopy(state)
        parent = changed
        for key in place[:-1]:
            parent = parent[key]
        parent[place[-1]] = value
        torch.save(changed, path)
        program = (
            run_train_detector_resuming_checkpoint
            if place[0] in ("settings", "progress", "optimizer")
            else run_test_py_with_checkpoint
        )
        code, line = program(path, folder_with_detector_and_images, capfd)
        assert code == 0 or (code == 2 and line.startswith("error: ")), f"{value!r}: {line}"


@pytest.mark.parametrize("temperature", [-1.0, 0.0, float("nan"), float("inf"), "1", True])
def test_a_calibration_temperature_that_is_not_positive_and_finite_is_refused(
    folder_with_detector_and_images, tmp_path, capfd, temperature
):
    state = read_checkpoint_content(folder_with_detector_and_images / "pixel.pth.tar") | {
        "calibration": {**CALIBRATION, "temperature": temperature}
    }
    torch.save(state, tmp_path / "odd.pth.tar")
    code, line = run_test_py_with_checkpoint(tmp_path / "odd.pth.tar", folder_with_detector_and_images, capfd)
    assert code == 2 and "odd.pth.tar" in line and "temperature" in line
