"""The trainers: the release's update and schedule, what moves and what does not, the losses of a step."""

import functools
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from files import mistake, random_rgb, save
from trainings import CPU, SIDE, TINY, detector_arguments, read, sr_arguments, stats, status, train

import train_detector
import train_sr
from data.datasets import Batch
from evaluation import sources
from models import RDN, STAGES, DeepStemResNet, ResynthesisDetector, downsample, load_vgg
from utils.compute import Compute
from utils.distributed import World
from utils.labels import FAKE, REAL
from utils.training import NotFinite, Progress, Stepper

pytestmark = pytest.mark.usefixtures("small_classifier")

LABELS = [REAL, FAKE, REAL, REAL, FAKE]
WEIGHTS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.0)


@pytest.fixture(scope="module")
def vgg():
    return load_vgg("random")[0]


# --- the update ---------------------------------------------------------------------------------------------


class TwoParts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.resynthesizer, self.classifier = torch.nn.Linear(3, 4).double(), torch.nn.Linear(4, 2).double()

    def gradients(self, x, y):
        loss = F.cross_entropy(self.classifier(self.resynthesizer(x).relu()), y)
        return torch.autograd.grad(loss, list(self.parameters()))


@pytest.mark.parametrize("scale", [0.02, 1e-3])
def test_the_parameter_groups_make_the_released_update(scale):
    torch.manual_seed(0)
    model, (lr, momentum, decay) = TwoParts(), (0.1, 0.9, 1e-2)
    expected = [p.detach().clone() for p in model.parameters()]
    velocity = [torch.zeros_like(p) for p in expected]
    sgd = torch.optim.SGD(train_detector.parameter_groups(model, lr, decay, scale), lr=lr, momentum=momentum)
    for _ in range(6):
        gradients = model.gradients(torch.randn(8, 3, dtype=torch.float64), torch.randint(2, (8,)))
        # The release, in plain tensors: gradients of the classifier times scale, then SGD
        for i, ((name, p), gradient) in enumerate(zip(model.named_parameters(), gradients, strict=True)):
            p.grad = gradient
            velocity[i] = momentum * velocity[i] + decay * expected[i]
            velocity[i] += gradient * scale if name.startswith("classifier") else gradient
            expected[i] = expected[i] - lr * velocity[i]
        sgd.step()
        for got, wanted in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(got.detach(), wanted, rtol=0, atol=1e-6)


def test_a_frozen_resynthesizer_is_not_in_the_parameter_groups():
    model = TwoParts()
    model.resynthesizer.requires_grad_(False)
    (group,) = train_detector.parameter_groups(model, 1e-2, 1e-4, 0.02)
    assert [id(p) for p in group["params"]] == [id(p) for p in model.classifier.parameters()]
    with mistake("--lr-sr"):
        train_detector.parameter_groups(model, 1e-2, 1e-4, 0.0)


def test_the_schedules():
    f = [train_detector.released_rate(5, e) for e in range(5)]  # set after epoch e for e + 1: one epoch late
    angles = [torch.pi / 2 * e / 4 for e in (0, 0, 1, 2, 3)]
    assert f == pytest.approx([0.9999 * torch.cos(torch.tensor(a)).item() + 0.0001 for a in angles])
    assert train_detector.released_rate(1, 0) == 1.0
    steps = Namespace(schedule="steps", lr_decay=0.5, lr_decay_epoch=2)
    assert [train_sr.rate_factor(steps, e) for e in (0, 1.9, 2, 4.5)] == [1, 1, 0.5, 0.25]
    smooth = [train_sr.rate_factor(Namespace(schedule="cosine", num_epochs=100), e) for e in (0, 1.5, 3, 51.5, 100)]
    assert smooth == pytest.approx([0, 0.5, 1, 0.5, 0])


# --- a step of end-to-end training --------------------------------------------------------------------------


def toy_detector(vgg, stage=0):
    torch.manual_seed(0)
    channels = (3, 64, 128, 256, 512, 512)[stage]
    return ResynthesisDetector(RDN(**TINY), DeepStemResNet("resnet18", channels, False), stage, vgg).train()


def toy_batch(labels=LABELS, seed=1, side=SIDE):
    x = torch.randint(0, 256, (len(labels), 3, side, side), generator=torch.Generator().manual_seed(seed))
    keys = [(0, i, 0) for i in range(len(labels))]
    weights = torch.full((len(labels),), 1 / len(labels))
    return Batch(x.to(torch.uint8), torch.tensor(labels), weights, [], keys, {})


def one_step(detector, batch, task="none", micro_batch=None, weight=1.0, step=0):
    """The means of one step, taken by the detector."""
    compute = Compute(CPU, "fp32")
    groups = train_detector.parameter_groups(detector, 0.1, 1e-4, 0.02)
    stepper = Stepper(torch.optim.SGD(groups, momentum=0.9), compute, World())
    stepper.progress.step = step
    auxiliary = sources.Auxiliary(task, weight, 123, micro_batch)
    source = functools.partial(sources.end_to_end_residuals, detector, compute, World(), auxiliary)
    train_detector.train_step(detector, batch, source, stepper)
    return stepper.progress.means()


@functools.cache
def degraded_step(wanted):
    """A step in which the auxiliary task is (not) drawn."""
    vgg = load_vgg("random")[0]
    clean = one_step(toy_detector(vgg), toy_batch(side=32), "none")["auxiliary"]
    for step in range(64):
        if (one_step(toy_detector(vgg), toy_batch(side=32), "denoising", step=step)["auxiliary"] != clean) == wanted:
            return step
    raise AssertionError("never drawn")


def clean_loss(detector, vgg, batch):
    """METHOD.md 4: L1(x_hat, x) + sum_k w_k L1(VGG_k(x_hat), VGG_k(x)) over the reals."""
    x = batch.x[batch.labels == REAL] / 255
    x_hat = detector.resynthesizer(downsample(x, 4))
    maps_hat, maps = vgg(x_hat, STAGES), vgg(x, STAGES)
    features = sum(w * (maps_hat[k] - maps[k]).abs().mean() for k, w in zip(STAGES, WEIGHTS, strict=True))
    return ((x_hat - x).abs().mean() + features).item()


def test_without_a_task_the_loss_is_that_of_the_clean_reals_in_every_step(vgg):
    expected = clean_loss(toy_detector(vgg), vgg, toy_batch())
    losses = [one_step(toy_detector(vgg), toy_batch(), "none", step=step)["auxiliary"] for step in range(4)]
    losses.append(one_step(toy_detector(vgg), toy_batch(), "none", weight=3.0)["auxiliary"] / 3)
    assert losses == pytest.approx([expected] * 5, rel=1e-5)
    off = one_step(toy_detector(None), toy_batch(), "none", weight=0.0)
    assert off["auxiliary"] == 0 and off["loss"] == pytest.approx(off["cross_entropy"])


def test_with_one_real_image_there_is_no_auxiliary_loss(vgg):
    for step in range(4):
        values = one_step(toy_detector(vgg), toy_batch([REAL, FAKE, FAKE, FAKE]), "denoising", step=step)
        assert values["auxiliary"] == 0
    assert one_step(toy_detector(vgg), toy_batch([REAL, REAL, FAKE, FAKE]), "denoising")["auxiliary"] > 0


@pytest.mark.parametrize("degraded", [False, True])
@pytest.mark.parametrize("micro_batch", [None, 2])
def test_only_reals_enter_the_auxiliary_loss(vgg, degraded, micro_batch):
    step, x = degraded_step(degraded), toy_batch().x
    losses = []
    for changed in (None, 1, 2):  # a fake, a real
        y = x.clone()
        if changed:
            y[changed] = 255 - y[changed] // 2
        batch = toy_batch()._replace(x=y)
        losses.append(one_step(toy_detector(vgg), batch, "denoising", micro_batch, step=step)["auxiliary"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and losses[0] != pytest.approx(losses[2], rel=1e-4)


@pytest.mark.parametrize(("stage", "degraded", "micro_batch"), [(0, True, 1), (2, False, 2)])
def test_micro_batches_make_the_same_update(vgg, monkeypatch, stage, degraded, micro_batch):
    """In float64: batch normalisation over toy maps of one value magnifies rounding too much in float32."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    real = Compute.input
    monkeypatch.setattr(Compute, "input", lambda self, images: real(self, images).double())
    step, double = degraded_step(degraded), load_vgg("random")[0].double()
    before = toy_detector(double, stage).double().state_dict()
    states, values = [], []
    for size in (None, micro_batch):
        detector = toy_detector(double, stage).double()
        batch = toy_batch(side=32)
        values.append(one_step(detector, batch._replace(weights=batch.weights.double()), "denoising", size, step=step))
        states.append(detector.state_dict())
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    for key, tensor in states[0].items():
        assert tensor.dtype == torch.int64 or key.startswith("vgg") or not torch.equal(tensor, before[key])
        torch.testing.assert_close(states[1][key], tensor, rtol=1e-6, atol=1e-7, msg=lambda m, key=key: f"{key}: {m}")


def test_the_classifier_runs_in_float32_in_any_precision(vgg):
    """bf16 kernels of the CPU give gradients of inf for strided convolutions to maps of one value."""
    residual = 10 * torch.rand(4, 512, 16, 16, generator=torch.Generator().manual_seed(0))
    gradients = []
    for precision in ("fp32", "bf16"):
        detector = toy_detector(None, 5)
        with Compute(CPU, precision).autocast():
            logits = detector.classify(residual)
        F.cross_entropy(logits, torch.tensor([0, 1, 0, 1])).backward()
        gradients.append([p.grad for p in detector.classifier.parameters()])
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(*gradients, strict=True))


def test_numbers_that_are_not_finite_end_the_run_and_are_not_saved(files, tmp_path, capfd):
    """With the step, its images and the last good state named."""
    flags = detector_arguments(files, tmp_path, "--fixed-sr --epochs 3 --lr 1e38 --save-minutes 0")
    code, line = status(flags, capfd)
    saved = read(tmp_path / "last.pth.tar")
    assert code == 2 and "epoch 0, step" in line and ".png" in line and "last.pth.tar" in line
    assert all(v.isfinite().all() for v in saved["state_dict"].values())
    model = torch.nn.Linear(2, 1)
    stepper = Stepper(torch.optim.SGD(model.parameters(), lr=0.1), Compute(CPU, "fp32"), World())
    before = model.weight.detach().clone()
    with pytest.raises(NotFinite):
        stepper.step(model(torch.ones(1, 2)).sum() * float("nan"), {}, toy_batch([REAL]))
    assert torch.equal(model.weight, before) and stepper.progress.total_steps == 0


def test_means_are_weighted_by_the_number_of_images():
    progress = Progress()
    progress.add({"loss": 1.0}, 3)
    progress.add({"loss": 5.0}, 1)
    assert progress.means() == {"loss": 2.0}
    progress.next_epoch()
    assert (progress.epoch, progress.step, progress.total_steps, progress.means()) == (1, 0, 2, {})


# --- whole runs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "moves"),
    [
        ("--fixed-sr", False),
        ("--fixed-sr --idx-stages 2", False),
        ("--mode-sr none", True),
        ("--mode-sr none --lw-sr 0 --micro-batch 3", True),
        ("--mode-sr colorization", True),
        ("--mode-sr denoising --idx-stages 1", True),
    ],
)
def test_the_resynthesizer_moves_if_and_only_if_asked(files, tmp_path, vgg, flags, moves):
    train(detector_arguments(files, tmp_path / "still", f"{flags} --epochs 1 --lr 0 --wd 0"))
    train(detector_arguments(files, tmp_path / "moved", f"{flags} --epochs 1"))
    before, after = read(files / "rdn.pth"), read(tmp_path / "moved/0001_sr.pth.tar")["state_dict"]
    assert before.keys() == after.keys()
    assert len([key for key in before if not torch.equal(before[key], after[key])]) == (len(before) if moves else 0)
    still, moved = (read(tmp_path / name / "0001.pth.tar") for name in ("still", "moved"))
    assert moved["arch"] == "resnet18" and moved["epoch"] == 1
    learned = {k for k, _ in DeepStemResNet("resnet18").named_parameters()}
    assert [k for k in learned if torch.equal(still["state_dict"][k], moved["state_dict"][k])] == []
    (line,) = stats(tmp_path / "moved")
    assert (line.get("auxiliary", 0) > 0) == (moves and "--lw-sr 0" not in flags)


def test_files_are_written_as_the_release_does(files, tmp_path):
    train(detector_arguments(files, tmp_path / "d", "--fixed-sr --epochs 4 --save-every-epoch 2"))
    names = sorted(p.name for p in (tmp_path / "d").glob("0*"))
    assert names == sorted(f"{n:04d}{kind}.pth.tar" for n in (1, 3, 4) for kind in ("", "_sr"))
    train(sr_arguments(files, tmp_path / "s", "--num-epochs 4 --num-save 2 --vgg-lambda 0"))
    assert sorted(p.name for p in (tmp_path / "s/x2").glob("epoch*")) == ["epoch_1.pth", "epoch_3.pth"]
    assert read(tmp_path / "s/x2/epoch_3.pth").keys() == RDN(scale=2, **TINY).state_dict().keys()


def test_a_tiny_evaluation_image_and_an_rdn_worse_than_bicubic(files, tmp_path, caplog):
    (tmp_path / "images").mkdir()
    save(tmp_path / "images/tiny.png", random_rgb(4, 4))
    train(sr_arguments(files, tmp_path, f"--num-epochs 1 --vgg-lambda 0 --eval-file {tmp_path}/images"))
    assert "bicubic" in caplog.text and "psnr" in stats(tmp_path / "x2")[0]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--val-root-neg FAKE", ["--val-root-pos"]),
        ("--val-root-pos REAL", ["--val-root-neg"]),
        ("--batch-size 1 --crop-size 32", ["batches of 1", "--crop-size"]),
        ("--batch-size 3 --idx-stages 2", ["batches of 3", "--batch-size"]),
        ("--mode-sr denoising", ["--fixed-sr"]),
    ],
)
def test_what_cannot_be_trained_is_refused_before_it_begins(files, tmp_path, flags, words):
    with mistake(*words):
        train(detector_arguments(files, tmp_path / "out", f"--fixed-sr {flags}"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("flags", "warned"), [("--idx-stages 3", True), ("", False)])
def test_maps_of_one_value_are_warned_of(files, tmp_path, caplog, flags, warned):
    train(detector_arguments(files, tmp_path, f"--fixed-sr --epochs 1 --batch-size 5 {flags}"))
    assert ("stride" in caplog.text) == warned


@pytest.mark.parametrize("size", [(32, 32), (32, 33), (1, 1), (64, 8)])
def test_what_can_be_trained_on_one_image_is_known(size):
    """Just where torch can."""
    classifier, x = DeepStemResNet("resnet18"), torch.rand(1, 3, *size)
    try:
        classifier(x)
    except ValueError:
        assert max(size) <= 32
    else:
        assert max(size) > 32
    classifier.eval()(x)
