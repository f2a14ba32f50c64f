"""The trainers: the release's update, what moves and what does not, stops and resumes, several processes."""

import errno
import functools
import itertools
import os
import shutil
import signal
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from processes import finish, kill_in_save, killed_sole_writer, signal_in_step, start, two_ranks
from test_images import encoded, make_bad_files

import train_detector
import train_sr
from data.images import FAKE, IMAGE_SUFFIXES, REAL, DataError, shown
from models import RDN, DeepStemResNet, ResynthesisDetector, downsample, load_vgg
from models.auxiliary import HEADS
from utils.checkpoint import CheckpointError
from utils.distributed import World
from utils.run import StopSignal, UsageError, run_program, sole_writer
from utils.training import Progress, Stepper, prune

CPU = torch.device("cpu")
TINY = {"num_features": 4, "growth_rate": 4, "num_blocks": 1, "num_layers": 2}
SIDE = 64

pytestmark = pytest.mark.usefixtures("small_classifier")


@pytest.fixture(scope="module")
def images(tmp_path_factory, write_real_and_fake):
    return write_real_and_fake(tmp_path_factory.mktemp("images"), 5, SIDE)


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
        state.pop("settings", None)  # holds the folder's name
    assert differences(a, b) == []


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
    """Everything in float64: batch normalisation over toy maps of one value magnifies rounding too much in float32."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.mark.parametrize(("stage", "degraded", "micro_batch"), [(0, True, 1), (2, False, 2)])
def test_micro_batches_make_the_same_update(double_precision, stage, degraded, micro_batch):
    vgg = load_vgg("random")[0].double()
    x = torch.rand(len(LABELS), 3, SIDE // 2, SIDE // 2, dtype=torch.float64)
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
    a, b, c = (one_step(toy_detector(None), recipe, LABELS, y, step)["auxiliary"] for y in (x, other_fake, other_real))
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

EVERY_STEP = ["--save-minutes", "0"]
# program, the file of its last state, flags
TRAINERS = {
    "super-resolution": (train_sr, "x2/last.pth", [
        "--num-epochs", "3", "--augment", "--completion", "--colorization", "--patches-per-image", "2",
        "--eval-file", "REAL", "--lr-decay-epoch", "1", "--num-save", "1", "--keep-last", "1",
    ]),
    "frozen": (train_detector, "last.pth.tar", [
        "--fixed-sr", "--val-root-pos", "REAL", "--val-root-neg", "FAKE", "--augment-perturb",
        "--epochs", "2", "--batch-size", "5", "--crop-size", "56", "--save-every-epoch", "1", "--keep-last", "1",
    ]),
    "end to end": (train_detector, "last.pth.tar", [
        "--mode-sr", "colorization", "--idx-stages", "1", "--micro-batch", "2", "--lr", "1e-6",
        "--epochs", "2", "--batch-size", "5", "--crop-size", "32", "--save-every-epoch", "2",
    ]),
}  # fmt: skip


@pytest.fixture(scope="module")
def trainer(images, rdn_file):
    """(main, arguments of a run into a folder, the file of its last state in it) of one of TRAINERS."""

    def of(name):
        program, last, flags = TRAINERS[name]
        flags = [{"REAL": str(images / "real"), "FAKE": str(images / "fake")}.get(f, f) for f in flags]

        def arguments(out, *more):
            if program is train_sr:
                return sr_arguments(images, out, *flags, *more)
            return detector_arguments(images, rdn_file, out, *flags, *more)

        return program, arguments, last

    return of


@pytest.fixture(scope="module")
def whole_run(trainer, tmp_path_factory):
    """The folder of an uninterrupted run of one of TRAINERS."""

    @functools.cache
    def of(name):
        out = tmp_path_factory.mktemp("whole")
        program, arguments, _ = trainer(name)
        program.main(arguments(out))
        return out

    return of


def assert_goes_on_to_the_same_end(trainer, whole_run, name, out, *more):
    """With --resume auto, a stopped run ends with the files of one never stopped, bit for bit, and no others."""
    program, arguments, last = trainer(name)
    program.main(arguments(out, "--resume", "auto", *more))
    whole = (whole_run(name) / last).parent
    stopped = (out / last).parent
    names = sorted(p.name for p in whole.iterdir() if p.is_file())
    assert sorted(p.name for p in stopped.iterdir() if p.is_file()) == names
    assert (stopped / "stats.jsonl").read_text() == (whole / "stats.jsonl").read_text()
    for file in (n for n in names if ".pth" in n):
        assert_same_run(whole / file, stopped / file)


@pytest.mark.parametrize(
    ("name", "workers", "accident"),
    [
        ("super-resolution", 0, "in a save"), ("super-resolution", 2, "in a step"),
        ("frozen", 0, "in a save"), ("frozen", 2, "in a step"),
        ("end to end", 0, "in a save"), ("end to end", 2, "in a step"),
    ],
)  # fmt: skip
def test_a_killed_run_goes_on_where_it_was(trainer, whole_run, tmp_path, name, workers, accident):
    """SIGKILL to a real process, at a step or in the middle of a save drawn at random; nothing is lost by it."""
    program, arguments, last = trainer(name)
    at = int(np.random.default_rng(zlib.crc32(f"{name} {accident}".encode())).integers(3, 5))
    if (name, accident) == ("frozen", "in a save"):
        at = 5  # the best detector so far, which the last state has to know of only once it is there
    prepare = partial(signal_in_step, at, signal.SIGKILL) if accident == "in a step" else partial(kill_in_save, at)
    out, log = tmp_path / "out", tmp_path / "log"
    how = ["--workers", str(workers), *EVERY_STEP]
    assert finish(start(f"{program.__name__}.py", arguments(out, *how), log, prepare)) == -signal.SIGKILL
    torn = list(out.rglob(".*.tmp"))
    assert len(torn) == (accident == "in a save")
    steps = read(out / last)["progress"]["total_steps"]
    assert steps == at - 1 if accident == "in a step" else 1 <= steps < at, log.read_text()
    assert_goes_on_to_the_same_end(trainer, whole_run, name, out, "--workers", str(workers))


@pytest.mark.parametrize("name", ["super-resolution", "frozen"])
def test_two_runs_do_not_write_into_one_folder(trainer, tmp_path, capfd, name):
    """Nothing is written while another run lives; one that was killed is in nobody's way, even if its worker lives."""
    program, arguments, last = trainer(name)
    folder = (tmp_path / last).parent
    folder.mkdir(exist_ok=True)
    with killed_sole_writer(folder / ".lock") as kill:
        assert run_program(lambda: program.main(arguments(tmp_path))) == 2
        assert f"error: another run is writing here ({folder / '.lock'})" in capfd.readouterr().err
        assert [p.name for p in folder.iterdir()] == [".lock"]
        kill()
        assert run_program(lambda: program.main(arguments(tmp_path))) == 0
    assert (tmp_path / last).exists() and not (folder / ".lock").exists()


def test_a_folder_without_locks_is_written_to_with_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.lockf", refuse)
    with sole_writer(tmp_path / ".lock", World()):
        assert "no locks" in caplog.text and str(tmp_path) in caplog.text


def test_keep_last_keeps_the_best_and_the_last_state_too(whole_run):
    names = {p.name for p in whole_run("frozen").iterdir() if p.is_file()}
    assert names == {"0002.pth.tar", "0002_sr.pth.tar", "best.pth.tar", "last.pth.tar", "config.json", "stats.jsonl"}


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_ends_a_run_in_one_line_and_loses_nothing(trainer, whole_run, tmp_path, monkeypatch, capfd, call):
    program, arguments, last = trainer("super-resolution")
    real, count = getattr(os, call), itertools.count(1)

    def full(*paths):
        if next(count) >= 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        assert run_program(lambda: program.main(arguments(tmp_path, *EVERY_STEP)), CheckpointError) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("error: cannot write") and "No space left on device" in line
    assert read(tmp_path / last)["progress"]["total_steps"] >= 1 and not list(tmp_path.rglob(".*.tmp"))
    assert_goes_on_to_the_same_end(trainer, whole_run, "super-resolution", tmp_path)


def test_a_disk_too_full_for_the_records_is_one_line(trainer, tmp_path, monkeypatch, capfd):
    program, arguments, _ = trainer("super-resolution")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(train_sr.Recorder, "epoch", full)
    assert run_program(lambda: program.main(arguments(tmp_path))) == 2
    assert (
        capfd.readouterr()
        .err.splitlines()[-1]
        .startswith("error: cannot read or write a file (No space left on device)")
    )


@pytest.mark.parametrize(
    ("name", "number", "status"), [("super-resolution", signal.SIGINT, 130), ("frozen", signal.SIGTERM, 143)]
)
def test_a_stopped_run_saves_the_step_it_is_in(trainer, whole_run, tmp_path, name, number, status):
    """Twice, and then it ends as one never stopped; the second time its workers get the signal, too."""
    program, arguments, last = trainer(name)
    for steps, workers in ((2, 0), (1, 2)):
        log = tmp_path / f"log{steps}"
        flags = arguments(tmp_path / "out", "--resume", "auto", "--workers", str(workers))
        run = start(f"{program.__name__}.py", flags, log, partial(signal_in_step, steps, number, workers > 0))
        assert finish(run) == status, log.read_text()
        assert "Traceback" not in log.read_text()
        assert "the state so far is saved" in log.read_text().splitlines()[-1]
    assert read(tmp_path / "out" / last)["progress"]["total_steps"] == 3
    assert_goes_on_to_the_same_end(trainer, whole_run, name, tmp_path / "out")


@pytest.mark.parametrize("name", ["super-resolution", "frozen"])
def test_two_runs_write_the_same_bytes(trainer, whole_run, tmp_path, monkeypatch, name):
    """But for the folder they are told to write into, which is in the settings: here both say `out`."""
    program, arguments, _ = trainer(name)
    files = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        program.main([*arguments("out"), *(["--num-epochs", "1"] if program is train_sr else ["--epochs", "1"])])
        files.append({str(p): p.read_bytes() for p in Path("out").rglob("*.pth*")})
    assert len(files[0]) >= 3 and files[0] == files[1]


def test_the_auxiliary_vgg_of_a_resumed_run_must_be_the_same(images, rdn_file, tmp_path, vgg):
    flags = ["--mode-sr", "denoising", "--epochs", "1"]
    train_detector.main(detector_arguments(images, rdn_file, tmp_path / "out", *flags))
    state = {f"features.{k.removeprefix('features.')}": v + 1e-3 for k, v in vgg.state_dict().items()}
    torch.save(state, tmp_path / "other_vgg.pth")
    more = [*flags, "--resume", "auto", "--epochs", "2", "--vgg-weights", str(tmp_path / "other_vgg.pth")]
    with pytest.raises(ValueError, match="--vgg-weights"):
        train_detector.main(detector_arguments(images, rdn_file, tmp_path / "out", *more))


def test_a_second_interrupt_stops_at_once():
    def main():
        with StopSignal():
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("went on")

    assert run_program(main) == 130


def test_two_processes_train_as_one(images, tmp_path):
    """Started with what torchrun tells its processes, killed, and started again. Five images in batches of four and one:
    the second process has no share of the last one."""
    flags = ["--num-epochs", "2", "--batch-size", "4", "--augment", "--eval-file", str(images / "fake")]
    train_sr.main(sr_arguments(images, tmp_path / "one", *flags))
    gpu = "cpu" if torch.cuda.is_available() else "0"
    arguments = sr_arguments(images, tmp_path / "two", *flags, *EVERY_STEP, "--gpu", gpu, "--resume", "auto")

    def run(log, prepare=None):
        processes = [start("train_sr.py", arguments, log, prepare, **rank) for rank in two_ranks()]
        return [finish(process) for process in processes]

    log = tmp_path / "log"
    assert run(log, partial(signal_in_step, 3, signal.SIGKILL)) == [-signal.SIGKILL] * 2, log.read_text()
    assert read(tmp_path / "two/x2/last.pth")["progress"]["total_steps"] == 2
    assert log.read_text().count("GPU 0 was asked for") == (gpu == "0")  # said once, not by each of them
    assert run(log) == [0, 0], log.read_text()
    one, two = read(tmp_path / "one/x2/last.pth"), read(tmp_path / "two/x2/last.pth")
    assert two["progress"]["total_steps"] == one["progress"]["total_steps"] == 4
    for key, tensor in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][key], tensor, rtol=0, atol=1e-6)
    assert two["progress"]["best"] == pytest.approx(one["progress"]["best"], abs=1e-4)


# --- bad images -------------------------------------------------------------------------------------------------------


@pytest.fixture
def bad_images(images, tmp_path):
    """A folder of good and bad files (and a list of them), and the names of the bad ones."""
    bad = [path for path in make_bad_files(tmp_path / "images") if Path(path).is_symlink() or not Path(path).is_dir()]
    bad = [path for path in bad if path.endswith(IMAGE_SUFFIXES)]
    for file in (images / "real").iterdir():
        shutil.copy(file, tmp_path / "images")
    (tmp_path / "images" / "tiny.png").write_bytes(encoded("png", 1, 1))
    (tmp_path / "images" / "flat.png").write_bytes(encoded("png", 3, 1000))
    return tmp_path / "images", [*bad, *(str(tmp_path / "images" / n) for n in ("tiny.png", "flat.png"))]


def trained_on(folder, arguments):
    """The arguments with another folder of real images to train on."""
    at = next(i for i, word in enumerate(arguments) if word in ("--train-file", "--data-root-pos"))
    return [*arguments[: at + 1], str(folder), *arguments[at + 2 :]]


@pytest.mark.parametrize("name", ["super-resolution", "frozen"])
def test_training_refuses_bad_images_before_it_begins(trainer, bad_images, tmp_path, caplog, name):
    """All of them are listed; --skip-bad goes on with the others."""
    folder, bad = bad_images
    program, arguments, last = trainer(name)
    flags = trained_on(folder, arguments(tmp_path / "out"))
    with pytest.raises(DataError, match=rf"{len(bad)} of \d+ images cannot be used: .*--skip-bad"):
        program.main(flags)
    said = [r.message for r in caplog.records if r.message.startswith("bad image: ")]
    assert sorted(said) == sorted(m for m in said if any(f"bad image: {shown(p)}: " in m for p in bad))
    assert len(said) == len(bad) and not (tmp_path / "out").exists()
    program.main([*flags, "--skip-bad", "--epochs" if name == "frozen" else "--num-epochs", "1"])
    assert (tmp_path / "out" / last).exists()


@pytest.mark.parametrize("workers", ["0", "2"])
def test_damage_that_no_header_shows_is_one_line_when_it_is_met(trainer, images, tmp_path, workers):
    folder = tmp_path / "images"
    shutil.copytree(images / "real", folder)
    damaged = bytearray((folder / "3.png").read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    (folder / "3.png").write_bytes(damaged)
    program, arguments, _ = trainer("frozen")
    flags = trained_on(folder, arguments(tmp_path / "out", "--workers", workers))
    with pytest.raises(DataError, match=rf"^{folder}/3.png: cannot be decoded \(.*\)$"):
        program.main(flags)


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


def test_a_step_left_out_leaves_no_trace(images, rdn_file, tmp_path, monkeypatch):
    """Nor in the batch-norm statistics, which the forward pass of the step has spoilt already."""
    real, count = ResynthesisDetector.classify, itertools.count(1)

    def poisoned(self, residual):
        return real(self, residual * (float("nan") if self.training and next(count) == 2 else 1))

    monkeypatch.setattr(ResynthesisDetector, "classify", poisoned)
    flags = ["--fixed-sr", "--epochs", "2", "--batch-size", "5", "--skip-nonfinite", "1"]
    train_detector.main(detector_arguments(images, rdn_file, tmp_path / "out", *flags))
    state = read(tmp_path / "out" / "last.pth.tar")
    assert state["progress"]["skipped"] == 1 and state["progress"]["total_steps"] == 4
    assert all(v.isfinite().all() for v in state["state_dict"].values())
    assert state["state_dict"]["bn1.num_batches_tracked"] == 3
    count = itertools.count(1)
    with pytest.raises(UsageError, match=r"epoch 0, step 1 .*(real|fake)/\d.png, .*no state is saved"):
        train_detector.main(detector_arguments(images, rdn_file, tmp_path / "other", *flags[:-1], "0"))


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
