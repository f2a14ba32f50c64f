"""What only a GPU can show: the programs on it do what they do on the CPU. Left out where there is none."""

import json

import numpy as np
import pytest
import torch

import test as test_program
import train_detector
import train_sr
from utils.options import test_parser as parser_of_test
from utils.options import train_detector_parser, train_sr_parser

GPU = "0"
SIDE = 128
TINY = {"num_features": 8, "growth_rate": 8, "num_blocks": 2, "num_layers": 2}
LOOSE = {"fp32": 1e-2, "bf16": 0.3, "fp16": 0.3}  # new networks amplify what is rounded

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.usefixtures("small_classifier"),
]


def train(files, out, gpu, *flags):
    """Train a detector; its last record and its last checkpoint."""
    args = train_detector_parser().parse_args(
        [
            "--data-root-pos", str(files / "real"), "--data-root-neg", str(files / "fake"), "--output-path", str(out),
            "--sr-weights-file", str(files / "rdn.pth"), "--arch", "resnet18", "--no_dilation", "--gpu", gpu,
            "--workers", "0", "--vgg-weights", "random", "--batch-size", "4", "--lr", "1e-3", "--lr-sr", "0.5", *flags,
        ]
    )  # fmt: skip
    train_detector.main(args)
    record = json.loads((out / "stats.jsonl").read_text().splitlines()[-1])
    return record, torch.load(out / "last.pth.tar", weights_only=True)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "mode",
    [
        "--fixed-sr --no-cache",
        "--fixed-sr",
        "--fixed-sr --idx-stages 2",
        "--mode-sr none --idx-stages 1",
        "--mode-sr colorization",
        "--mode-sr colorization --micro-batch 1",
        "--mode-sr denoising --idx-stages 5 --micro-batch 3",
    ],
)
def test_training_as_on_the_cpu(files, tmp_path, mode, precision):
    record, _ = train(files, tmp_path / "cpu", "cpu", *mode.split(), "--epochs", "1")
    flags = [*mode.split(), "--precision", precision]
    on_gpu, state = train(files, tmp_path / "gpu", GPU, *flags, "--epochs", "1")
    assert on_gpu["loss"] == pytest.approx(record["loss"], rel=LOOSE[precision], abs=LOOSE[precision])
    assert all(torch.isfinite(p).all() for p in state["state_dict"].values())
    again, resumed = train(files, tmp_path / "gpu", GPU, *flags, "--epochs", "2", "--resume", "auto")
    assert again["epoch"] == 1 and resumed["progress"]["epoch"] == 2


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("tile", [[], ["--tile", "64"]])
def test_scores_as_on_the_cpu(files, tmp_path, precision, tile):
    train(files, tmp_path / "run", "cpu", "--fixed-sr", "--idx-stages", "1", "--epochs", "1")
    flags = ["--resume", tmp_path / "run" / "last.pth.tar", "--data-root-pos", files / "real", "-b", "2"]
    flags += ["--data-root-neg", files / "fake", "--workers", "0"]
    logits = {}
    for gpu, more in (("cpu", []), (GPU, [*tile, "--precision", precision])):
        path = tmp_path / f"scores_{gpu}"
        words = [*map(str, flags), "--gpu", gpu, *more, "--save_path", str(path)]
        assert test_program.main(parser_of_test().parse_args(words)) == 0
        logits[gpu] = np.load(f"{path}.npy")
    scale = max(1, np.abs(logits["cpu"]).max())
    np.testing.assert_allclose(logits[GPU], logits["cpu"], atol=LOOSE[precision] * scale)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_super_resolution_as_on_the_cpu(files, tmp_path, precision):
    losses = {}
    for gpu, more in (("cpu", []), (GPU, ["--precision", precision])):
        out = tmp_path / gpu
        words = f"""--train-file {files}/real --eval-file {files}/real --outputs-dir {out} --num-features 8
            --growth-rate 8 --num-blocks 1 --num-layers 2 --scale 2 --patch-size 8 --batch-size 2 --num-epochs 1
            --workers 0 --vgg-weights random --augment --completion --colorization --gpu {gpu}"""
        train_sr.main(train_sr_parser().parse_args([*words.split(), *more]))
        losses[gpu] = json.loads((out / "x2" / "stats.jsonl").read_text().splitlines()[-1])["loss"]
    assert losses[GPU] == pytest.approx(losses["cpu"], rel=LOOSE[precision])
