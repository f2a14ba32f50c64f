"""The trainers: the release's update, what moves and what does not, stops and resumes, several processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import train_detector
import train_sr
from data.images import FAKE, REAL
from models import RDN, DeepStemResNet, ResynthesisDetector, downsample, load_vgg
from models.auxiliary import HEADS
from utils.distributed import World
from utils.run import Stopped, StopSignal, UsageError, run_program
from utils.training import Progress, StateKeeper, Stepper, prune

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
TINY = {"num_features": 4, "growth_rate": 4, "num_blocks": 1, "num_layers": 2}
SIDE = 64


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Sums in one order, and no waiting for each other on a small machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """real/ and fake/, five images of 64 x 64 each; the fakes are coarser."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for kind, cell in (("real", 1), ("fake", 4)):
        (root / kind).mkdir()
        for i in range(5):
            pixels = rng.integers(0, 256, (SIDE // cell, SIDE // cell, 3), dtype=np.uint8)
            Image.fromarray(pixels.repeat(cell, 0).repeat(cell, 1)).save(root / kind / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def rdn_file(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("rdn") / "rdn.pth"
    torch.save(RDN(**TINY).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def vgg():
    return load_vgg("random")[0]


def sr_arguments(images, out, *more):
    shape = ["--num-features", "4", "--growth-rate", "4", "--num-blocks", "1", "--num-layers", "2", "--scale", "2"]
    return [
        "--train-file", str(images / "real"), "--outputs-dir", str(out), *shape, "--patch-size", "8", "--gpu", "cpu",
        "--workers", "0", "--vgg-weights", "random", "--batch-size", "2", "--lr", "1e-3", *more,
    ]  # fmt: skip


def detector_arguments(images, rdn_file, out, *more):
    return [
        "--data-root-pos", str(images / "real"), "--data-root-neg", str(images / "fake"), "--output-path", str(out),
        "--sr-weights-file", str(rdn_file), "--arch", "resnet18", "--no_dilation", "--gpu", "cpu", "--workers", "0",
        "--vgg-weights", "random", "--batch-size", "4", "--lr", "1e-3", "--lr-sr", "0.5", *more,
    ]  # fmt: skip


def read(path):
    return torch.load(path, weights_only=True)


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


def assert_same_run(a, b):
    a, b = read(a), read(b)
    for state in (a, b):
        state.pop("settings")  # holds the folder's name
    assert differences(a, b) == []


def stop_at(monkeypatch, total_steps):
    """Let the run stop, as by SIGTERM, after so many steps in all."""
    real = StateKeeper.after_step
    count = 0

    def after_step(self, device):
        nonlocal count
        count += 1
        if count == total_steps:
            self.stop.received = signal.SIGTERM
        real(self, device)

    monkeypatch.setattr(StateKeeper, "after_step", after_step)


# --- the update -----------------------------------------------------------------------------------------------------


class TwoParts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.resynthesizer, self.classifier = torch.nn.Linear(3, 4).double(), torch.nn.Linear(4, 2).double()

    def loss(self, x, y):
        return F.cross_entropy(self.classifier(self.resynthesizer(x).relu()), y)


@pytest.mark.parametrize("scale", [0.02, 1e-3])
def test_the_parameter_groups_make_the_released_update(scale):
    torch.manual_seed(0)
    model = TwoParts()
    lr, momentum, decay = 0.1, 0.9, 1e-2
    x, y = torch.randn(6, 8, 3, dtype=torch.float64), torch.randint(2, (6, 8))
    expected = [p.detach().clone() for p in model.parameters()]
    velocity = [torch.zeros_like(p) for p in expected]
    groups = train_detector.parameter_groups(model, lr, decay, scale)
    sgd = torch.optim.SGD(groups, lr=lr, momentum=momentum)
    classifier = {id(p) for p in model.classifier.parameters()}
    in_classifier = [id(p) in classifier for p in model.parameters()]
    for step in range(6):
        sgd.zero_grad()
        model.loss(x[step], y[step]).backward()
        sgd.step()

        # The release, in plain tensors: gradients of the classifier times scale, then SGD
        copy = TwoParts()
        copy.load_state_dict(dict(zip(model.state_dict(), expected, strict=True)))
        gradients = torch.autograd.grad(copy.loss(x[step], y[step]), list(copy.parameters()))
        for i, gradient in enumerate(gradients):
            gradient = gradient * scale if in_classifier[i] else gradient
            velocity[i] = momentum * velocity[i] + gradient + decay * expected[i]
            expected[i] = expected[i] - lr * velocity[i]
        for got, wanted in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(got.detach(), wanted, rtol=0, atol=1e-6)
    assert not torch.allclose(expected[2], TwoParts().classifier.weight)


def test_a_frozen_resynthesizer_is_not_in_the_parameter_groups():
    model = TwoParts()
    model.resynthesizer.requires_grad_(False)
    (group,) = train_detector.parameter_groups(model, 1e-2, 1e-4, 0.02)
    assert [id(p) for p in group["params"]] == [id(p) for p in model.classifier.parameters()]
    assert group["lr"] == pytest.approx(2e-4) and group["weight_decay"] == pytest.approx(5e-3)


def test_a_gradient_scale_of_zero_is_refused():
    with pytest.raises(UsageError, match="--lr-sr"):
        train_detector.parameter_groups(TwoParts(), 1e-2, 1e-4, 0.0)


def test_the_schedule():
    f = [train_detector.rate_factor(e, 5) for e in range(5)]
    assert f[0] == f[1] == 1.0
    # set after epoch e for e + 1: the release's formula one epoch late
    assert f[2] == pytest.approx(0.9999 * np.cos(np.pi / 2 * 1 / 4) + 0.0001)
    assert f[4] == pytest.approx(0.9999 * np.cos(np.pi / 2 * 3 / 4) + 0.0001)
    assert train_detector.rate_factor(0, 1) == 1.0
    assert [train_detector.rate_factor(e, 2) for e in (0, 1)] == [1.0, 1.0]


# --- the steps of end-to-end training ---------------------------------------------------------------------------------


def toy_detector(vgg, stage=0, seed=0):
    torch.manual_seed(seed)
    channels = (3, 64, 128, 256, 512, 512)[stage]
    detector = ResynthesisDetector(RDN(**TINY), DeepStemResNet("resnet18", channels, False), stage, vgg)
    detector.train()
    return detector


def toy_stepper(detector):
    sgd = torch.optim.SGD(train_detector.parameter_groups(detector, 0.1, 1e-4, 0.02), lr=0.1, momentum=0.9)
    return Stepper(sgd, CPU, "fp32", World(), 0, Path("none"))


def toy_recipe(vgg, task="none", micro_batch=None, weight=1.0):
    head = HEADS[task]
    return train_detector.Recipe(CPU, "fp32", 123, micro_batch, vgg, head and head(), weight)


def one_step(detector, recipe, labels, x=None, step=0):
    torch.manual_seed(5)
    x = torch.rand(len(labels), 3, SIDE, SIDE) if x is None else x
    stepper = toy_stepper(detector)
    stepper.progress.step = step
    frozen = not any(p.requires_grad for p in detector.resynthesizer.parameters())
    step_of = train_detector.frozen_step if frozen else train_detector.end_to_end_step
    labels = torch.tensor(labels)
    values = step_of(detector, x, labels, list(range(len(x))), 1 / len(x), stepper, recipe)
    stepper.step(values, len(x), [])
    return {k: v.item() for k, v in values.items()}


LABELS = [REAL, FAKE, REAL, REAL, FAKE]


def degraded_step(wanted):
    """A step in which the auxiliary task is (not) drawn."""
    recipe, detector = toy_recipe(None, "denoising"), toy_detector(None)
    x, real = torch.rand(2, 3, 8, 8), torch.tensor([True, True])
    for step in range(64):
        drawn = train_detector.degraded_reals(detector, x, real, [0, 1], Progress(step=step), recipe)
        if (drawn is not None) == wanted:
            return step
    raise AssertionError("never drawn")


@pytest.fixture
def double_precision(monkeypatch):
    """Everything in float64: batch normalisation over 2 x 2 toy maps magnifies rounding too much in float32."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.mark.parametrize(("stage", "degraded", "micro_batch"), [(0, True, 1), (2, False, 2)])
def test_micro_batches_make_the_same_update(double_precision, stage, degraded, micro_batch):
    vgg = load_vgg("random")[0].double()
    x = torch.rand(len(LABELS), 3, SIDE, SIDE, dtype=torch.float64)
    step = degraded_step(degraded)
    states, values = [], []
    before = toy_detector(vgg, stage).double().state_dict()
    for size in (None, micro_batch):
        detector = toy_detector(vgg, stage).double()
        values.append(one_step(detector, toy_recipe(vgg, "denoising", size), LABELS, x, step))
        states.append(detector.state_dict())
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    for key, tensor in states[0].items():
        assert tensor.dtype == torch.int64 or key.startswith("vgg") or not torch.equal(tensor, before[key])
        torch.testing.assert_close(states[1][key], tensor, rtol=1e-6, atol=1e-7, msg=lambda m, key=key: f"{key}: {m}")


def test_micro_batches_with_a_frozen_resynthesizer(vgg):
    states = []
    for size in (None, 2):
        detector = toy_detector(None)
        detector.freeze_resynthesizer(True)
        one_step(detector, toy_recipe(None, micro_batch=size), LABELS)
        states.append(detector.state_dict())
    for key, tensor in states[0].items():
        torch.testing.assert_close(states[1][key], tensor, rtol=1e-5, atol=1e-5)


def test_with_one_real_image_there_is_no_auxiliary_loss(vgg):
    recipe = toy_recipe(vgg, "denoising")
    for step in range(4):
        assert one_step(toy_detector(None), recipe, [REAL, FAKE, FAKE, FAKE], step=step)["auxiliary"] == 0
    assert one_step(toy_detector(None), recipe, [REAL, REAL, FAKE, FAKE])["auxiliary"] > 0
    assert one_step(toy_detector(None), toy_recipe(vgg, "none"), [REAL, REAL, FAKE, FAKE])["auxiliary"] == 0


@pytest.mark.parametrize("degraded", [False, True])
@pytest.mark.parametrize("micro_batch", [None, 2])
def test_only_reals_enter_the_auxiliary_loss(vgg, degraded, micro_batch):
    recipe, step = toy_recipe(vgg, "denoising", micro_batch), degraded_step(degraded)
    x = torch.rand(len(LABELS), 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    other_fake, other_real = x.clone(), x.clone()
    other_fake[1] = 1 - other_fake[1] ** 2
    other_real[2] = 1 - other_real[2] ** 2
    a, b, c = (
        one_step(toy_detector(None), recipe, LABELS, y, step)["auxiliary"] for y in (x, other_fake, other_real)
    )
    assert a == pytest.approx(b, rel=1e-6)
    assert a != pytest.approx(c, rel=1e-4)


def test_the_auxiliary_loss_is_weighted(vgg):
    one = one_step(toy_detector(None), toy_recipe(vgg, "denoising"), LABELS)
    three = one_step(toy_detector(None), toy_recipe(vgg, "denoising", weight=3.0), LABELS)
    assert three["auxiliary"] == pytest.approx(3 * one["auxiliary"], rel=1e-5)
    assert three["loss"] == pytest.approx(one["cross_entropy"] + 3 * one["auxiliary"], rel=1e-5)


@pytest.mark.parametrize("task", ["denoising", "colorization"])
def test_every_other_batch_is_degraded(task):
    recipe, detector = toy_recipe(None, task), toy_detector(None)
    x, real = torch.rand(3, 3, 16, 16), torch.tensor([True, False, True])
    clean = downsample(x[real], 4)
    drawn = [
        train_detector.degraded_reals(detector, x, real, [7, 8, 9], Progress(step=step), recipe) for step in range(600)
    ]
    some = [d for d in drawn if d is not None]
    assert abs(len(some) / 600 - 0.5) < 0.07  # 3.4 standard deviations
    assert all(d.shape == clean.shape for d in some)
    assert sum(not torch.equal(d, clean) for d in some) > 0.8 * len(some)
    noise_of_image_7 = [d[0] - clean[0] for d in some]
    assert task != "denoising" or all(torch.equal(noise_of_image_7[0], n) for n in noise_of_image_7)  # once an epoch
    other_epoch = next(
        d
        for step in range(64)
        if (d := train_detector.degraded_reals(detector, x, real, [7, 8, 9], Progress(1, step), recipe)) is not None
    )
    assert not torch.equal(other_epoch, some[0])
    again = train_detector.degraded_reals(
        detector, x, real, [7, 8, 9], Progress(step=degraded_step(True), total_steps=99), recipe
    )
    assert torch.equal(again, drawn[degraded_step(True)])


# --- whole runs: what moves ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "moves"),
    [
        (["--fixed-sr"], False),
        (["--fixed-sr", "--idx-stages", "2"], False),
        (["--mode-sr", "none"], True),
        (["--mode-sr", "colorization"], True),
        (["--mode-sr", "denoising", "--idx-stages", "1"], True),
        (["--mode-sr", "none", "--micro-batch", "3"], True),
    ],
)
def test_the_resynthesizer_moves_if_and_only_if_asked(images, rdn_file, tmp_path, monkeypatch, flags, moves):
    seen = {}
    real = train_detector.make_recipe

    def keep(*arguments):
        recipe, detector = real(*arguments), arguments[-1]
        vgg = recipe.vgg
        seen["vgg"] = vgg and (vgg, {k: v.clone() for k, v in vgg.state_dict().items()})
        seen["classifier"] = {k: v.clone() for k, v in detector.classifier.state_dict().items()}
        return recipe

    monkeypatch.setattr(train_detector, "make_recipe", keep)
    train_detector.main(detector_arguments(images, rdn_file, tmp_path, "--epochs", "1", *flags))
    before, after = read(rdn_file), read(tmp_path / "0001_sr.pth.tar")["state_dict"]
    assert before.keys() == after.keys()
    moved = [key for key in before if not torch.equal(before[key], after[key])]
    assert len(moved) == (len(before) if moves else 0)
    detector = read(tmp_path / "0001.pth.tar")
    assert detector["arch"] == "resnet18" and detector["epoch"] == 1
    stuck = [k for k, v in detector["state_dict"].items() if torch.equal(v, seen["classifier"][k])]
    assert stuck == []
    if seen["vgg"]:
        network, weights = seen["vgg"]
        assert differences(network.state_dict(), weights) == []
        assert not any(p.requires_grad or p.grad is not None for p in network.parameters())
    else:
        assert "colorization" not in flags and "--idx-stages" not in flags


def test_an_auxiliary_task_for_a_frozen_resynthesizer_is_refused(images, rdn_file, tmp_path):
    with pytest.raises(UsageError, match="--fixed-sr"):
        train_detector.main(detector_arguments(images, rdn_file, tmp_path, "--fixed-sr", "--mode-sr", "denoising"))


def test_numbered_checkpoints_are_written_as_the_release_does(images, rdn_file, tmp_path):
    more = ["--fixed-sr", "--epochs", "4", "--save-every-epoch", "2"]
    train_detector.main(detector_arguments(images, rdn_file, tmp_path, *more))
    assert sorted(p.name for p in tmp_path.glob("0*")) == sorted(
        f"{n:04d}{kind}.pth.tar" for n in (1, 3, 4) for kind in ("", "_sr")
    )


def test_a_resynthesizer_state_is_no_detector(images, rdn_file, tmp_path):
    """One line, not a KeyError, for the wrong program's last state."""
    train_sr.main(sr_arguments(images, tmp_path / "sr", "--num-epochs", "1", "--vgg-lambda", "0"))
    with pytest.raises(ValueError, match="holds no detector"):
        train_detector.main(
            detector_arguments(images, rdn_file, tmp_path / "d", "--resume", str(tmp_path / "sr/x2/last.pth"))
        )


# --- stopping and resuming --------------------------------------------------------------------------------------------

DETECTOR_RUNS = {
    "frozen": ["--fixed-sr"],
    "colorization": ["--mode-sr", "colorization", "--idx-stages", "1", "--micro-batch", "2", "--lr", "1e-6"],
}


@pytest.mark.parametrize("flags", DETECTOR_RUNS.values(), ids=DETECTOR_RUNS)
def test_a_resumed_detector_is_one_never_stopped(images, rdn_file, tmp_path, monkeypatch, flags):
    """Three epochs of two steps; stopped after step 3, in the middle of the second epoch, and after step 4."""
    validation = ["--val-root-pos", str(images / "real"), "--val-root-neg", str(images / "fake")]
    flags = [*flags, "--epochs", "3", "--batch-size", "5", "--save-every-epoch", "3", "--crop-size", "56", *(validation if "--fixed-sr" in flags else [])]
    train_detector.main(detector_arguments(images, rdn_file, tmp_path / "whole", *flags))
    stopped = detector_arguments(images, rdn_file, tmp_path / "stopped", *flags, "--resume", "auto")
    for steps in (3, 1):
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            stop_at(patch, steps)
            train_detector.main(stopped)
    progress = read(tmp_path / "stopped" / "last.pth.tar")["progress"]
    assert (progress["epoch"], progress["step"], progress["total_steps"]) == (1, 2, 4)
    train_detector.main(stopped)
    assert read(tmp_path / "stopped" / "last.pth.tar")["progress"]["total_steps"] == 6
    assert_same_run(tmp_path / "whole" / "last.pth.tar", tmp_path / "stopped" / "last.pth.tar")
    if "--fixed-sr" in flags:
        assert_same_run(tmp_path / "whole" / "best.pth.tar", tmp_path / "stopped" / "best.pth.tar")


def test_a_resumed_resynthesizer_is_one_never_stopped(images, tmp_path, monkeypatch):
    flags = ["--num-epochs", "3", "--augment", "--completion", "--colorization", "--patches-per-image", "2"]
    flags += ["--eval-file", str(images / "real"), "--lr-decay-epoch", "1", "--num-save", "1"]
    train_sr.main(sr_arguments(images, tmp_path / "whole", *flags))
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, 5)
        train_sr.main(sr_arguments(images, tmp_path / "stopped", *flags))
    train_sr.main(sr_arguments(images, tmp_path / "stopped", *flags, "--resume", "auto"))
    for name in ("last.pth", "best.pth"):
        assert_same_run(tmp_path / "whole" / "x2" / name, tmp_path / "stopped" / "x2" / name)
    epochs = [read(tmp_path / "stopped" / "x2" / f"epoch_{e}.pth") for e in range(3)]
    assert epochs[2].keys() == RDN(scale=2, **TINY).state_dict().keys()
    assert differences(epochs[2], read(tmp_path / "whole" / "x2" / "last.pth")["state_dict"]) == []
    assert differences(epochs[0], epochs[2]) != []


def test_the_auxiliary_vgg_of_a_resumed_run_must_be_the_same(images, rdn_file, tmp_path, vgg):
    flags = ["--mode-sr", "denoising", "--epochs", "1"]
    train_detector.main(detector_arguments(images, rdn_file, tmp_path / "out", *flags))
    state = {f"features.{k.removeprefix('features.')}": v + 1e-3 for k, v in vgg.state_dict().items()}
    torch.save(state, tmp_path / "other_vgg.pth")
    more = [*flags, "--resume", "auto", "--epochs", "2", "--vgg-weights", str(tmp_path / "other_vgg.pth")]
    with pytest.raises(ValueError, match="--vgg-weights"):
        train_detector.main(detector_arguments(images, rdn_file, tmp_path / "out", *more))


def start(program, arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(ROOT / program), *arguments], cwd=ROOT, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def wait_for(process, file):
    """Until `file` is there."""
    for _ in range(600):
        if process.poll() is not None:
            raise AssertionError(f"ended too early: {process.stdout.read()}")
        if file.exists():
            return
        try:
            process.wait(0.05)
        except subprocess.TimeoutExpired:
            continue
    process.kill()
    raise AssertionError(f"{file} was never written: {process.stdout.read()}")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_a_killed_run_goes_on_where_it_was(images, rdn_file, tmp_path, number, status):
    """A real signal to a real process that saves after each step; in the middle of an epoch."""
    flags = ["--fixed-sr", "--epochs", "3", "--save-every-epoch", "3", "--batch-size", "5", "--resume", "auto"]
    flags += ["--save-minutes", "0"]
    out = tmp_path / "out"
    process = start("train_detector.py", detector_arguments(images, rdn_file, out, *flags))
    try:
        wait_for(process, out / "last.pth.tar")
        process.send_signal(number)
        output, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == status, output
    assert "Traceback" not in output
    done = read(out / "last.pth.tar")["progress"]["total_steps"]
    assert 1 <= done < 6
    if number == signal.SIGKILL:
        train_detector.main(detector_arguments(images, rdn_file, out, *flags))
        train_detector.main(detector_arguments(images, rdn_file, tmp_path / "whole", *flags[:-4]))
        assert_same_run(out / "last.pth.tar", tmp_path / "whole" / "last.pth.tar")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_exit_status_tells_the_signal(number, status):
    def main():
        with StopSignal() as stop:
            os.kill(os.getpid(), number)
            raise Stopped(stop.agreed(World(), CPU))

    assert run_program(main) == status


def test_a_second_interrupt_stops_at_once():
    def main():
        with StopSignal():
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("went on")

    assert run_program(main) == 130


def test_two_processes_train_as_one(images, tmp_path):
    """Five images in batches of four and one: the second process has no share of the last one."""
    flags = ["--num-epochs", "2", "--batch-size", "4", "--augment", "--eval-file", str(images / "fake")]
    train_sr.main(sr_arguments(images, tmp_path / "one", *flags))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(ROOT / "train_sr.py")]
    done = subprocess.run(
        [sys.executable, *launcher, *sr_arguments(images, tmp_path / "two", *flags)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, two = read(tmp_path / "one/x2/last.pth"), read(tmp_path / "two/x2/last.pth")
    assert two["progress"]["total_steps"] == one["progress"]["total_steps"] == 4
    for key, tensor in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][key], tensor, rtol=0, atol=1e-6)
    assert two["progress"]["best"] == pytest.approx(one["progress"]["best"], abs=1e-4)


# --- the stepper and the keeper -----------------------------------------------------------------------------------------


def linear_stepper(precision="fp32", skips=0):
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1)
    return model, Stepper(torch.optim.SGD(model.parameters(), lr=0.1), CPU, precision, World(), skips, Path("last.pth"))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_that_is_not_finite_is_left_out_or_ends_the_run(precision):
    model, stepper = linear_stepper(precision, skips=1)
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def step(factor):
        loss = model(torch.ones(1, 2)).sum() * factor
        stepper.backward(loss)
        stepper.step({"loss": loss}, 1, ["a.png"])

    step(float("nan"))
    assert differences(model.state_dict(), before) == []
    step(1.0)
    assert not torch.equal(model.weight, before["weight"])
    assert stepper.progress.step == 2 and np.isfinite(stepper.progress.means()["loss"])
    with pytest.raises(UsageError, match=r"epoch 0, step 2 .*a\.png.*no state is saved"):
        step(float("nan"))


def test_the_rates_are_set_from_those_the_groups_were_built_with():
    _, stepper = linear_stepper()
    for factor in (0.5, 0.25):
        stepper.set_rates(factor)
        assert stepper.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * factor)


def test_means_are_weighted_by_the_number_of_images():
    progress = Progress()
    progress.add({"loss": 1.0}, 3)
    progress.add({"loss": 5.0}, 1)
    assert progress.means() == {"loss": 2.0}
    progress.next_epoch()
    assert (progress.epoch, progress.step, progress.total_steps, progress.means()) == (1, 0, 2, {})


def test_prune_keeps_the_newest(tmp_path):
    for n in (1, 2, 10, 9):
        (tmp_path / f"epoch_{n}.pth").touch()
    prune(tmp_path, "epoch_*.pth", None)
    assert len(list(tmp_path.iterdir())) == 4
    prune(tmp_path, "epoch_*.pth", 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["epoch_10.pth", "epoch_9.pth"]
