"""Tests that the programs give the same results on a GPU as on a CPU; without a GPU, the tests are skipped."""

import numpy as np
import pytest
import torch
from trainings import (
    make_arguments_of_train_detector,
    make_arguments_of_train_sr,
    read_checkpoint_content,
    read_epoch_statistics_of_training,
    run_training,
)

import test as program
from utils.options import create_test_parser

# The tolerance for each precision is large, because random weights amplify rounding errors
LOOSE = {"fp32": 1e-2, "bf16": 0.3, "fp16": 0.3}
ON = {"cpu": "--gpu cpu", "gpu": "--gpu 0"}
MODES = """
--fixed-sr --no-cache
--fixed-sr
--fixed-sr --idx-stages 2
--mode-sr none --idx-stages 1
--mode-sr colorization
--mode-sr colorization --micro-batch 1
--mode-sr denoising --idx-stages 5 --micro-batch 3 --lr 1e-6
"""

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.usefixtures("shrink_resnet18"),
    pytest.mark.parametrize("precision", LOOSE),
]


@pytest.mark.parametrize("mode", MODES.strip().splitlines())
def test_train_detector_on_the_gpu_has_the_loss_of_the_cpu_and_can_be_resumed(
    training_files, tmp_path, mode, precision
):
    flags = {"cpu": f"{mode} {ON['cpu']}", "gpu": f"{mode} {ON['gpu']} --precision {precision}"}
    for name in flags:
        run_training(make_arguments_of_train_detector(training_files, tmp_path / name, f"{flags[name]} --epochs 1"))
    (on_gpu,), (on_cpu,) = (
        read_epoch_statistics_of_training(tmp_path / "gpu"),
        read_epoch_statistics_of_training(tmp_path / "cpu"),
    )
    assert on_gpu["loss"] == pytest.approx(on_cpu["loss"], rel=LOOSE[precision], abs=LOOSE[precision])
    run_training(
        make_arguments_of_train_detector(training_files, tmp_path / "gpu", f"{flags['gpu']} --epochs 2 --resume auto")
    )
    state = read_checkpoint_content(tmp_path / "gpu" / "last.pth.tar")
    assert all(torch.isfinite(p).all() for p in state["state_dict"].values()) and state["progress"]["epoch"] == 2


@pytest.mark.parametrize("more", ["", "--tile 64", "--crops 4 --crop-size 32"])
def test_the_logits_of_test_py_on_the_gpu_equal_the_logits_on_the_cpu(training_files, tmp_path, precision, more):
    run_training(
        make_arguments_of_train_detector(training_files, tmp_path / "run", "--fixed-sr --idx-stages 1 --epochs 1")
    )
    flags = f"--resume {tmp_path}/run/last.pth.tar --input {training_files}/real {training_files}/fake -b 2 --workers 0"
    logits = {}
    for name, how in (("cpu", more.replace("--tile 64", "")), ("gpu", f"{more} --precision {precision}")):
        words = f"{flags} {ON[name]} {how} --save_path {tmp_path}/{name}"
        assert program.main(create_test_parser().parse_args(words.split())) == 0
        logits[name] = np.load(tmp_path / f"{name}.npy")
    scale = max(1, np.abs(logits["cpu"]).max())
    np.testing.assert_allclose(logits["gpu"], logits["cpu"], atol=LOOSE[precision] * scale)


def test_train_sr_on_the_gpu_has_the_loss_of_the_cpu(training_files, tmp_path, precision):
    flags = "--num-epochs 1 --vgg-weights random --augment --completion --colorization"
    for name, how in (("cpu", ON["cpu"]), ("gpu", f"{ON['gpu']} --precision {precision}")):
        run_training(make_arguments_of_train_sr(training_files, tmp_path / name, f"{flags} --eval-file REAL {how}"))
    (on_gpu,), (on_cpu,) = (read_epoch_statistics_of_training(tmp_path / name / "x2") for name in ("gpu", "cpu"))
    assert on_gpu["loss"] == pytest.approx(on_cpu["loss"], rel=LOOSE[precision])
