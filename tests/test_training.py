"""Tests of train_detector.py and train_sr.py: weight updates, schedules, losses, and written files."""

import math
from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from files import expect_user_error, random_rgb_pixels, save_image
from trainings import (
    CPU,
    SIDE,
    TINY,
    make_arguments_of_train_detector,
    make_arguments_of_train_sr,
    read_checkpoint_content,
    read_epoch_statistics_of_training,
    run_training,
    run_training_for_status_and_last_line,
)

import train_detector
from data.datasets import Batch
from evaluation.training_pictures import write_resynthesis_pictures
from models.features import STAGES, Pixels, VGG19Stage, load_vgg
from models.losses import compute_residuals_and_auxiliary_losses
from models.rdn import RDN
from models.resnet import DeepStemResNet
from models.resynthesis import ResynthesisDetector, downsample
from utils import optimizers
from utils.compute import Compute
from utils.distributed import World
from utils.labels import FAKE, REAL
from utils.training import NotFinite, Progress, Stepper

pytestmark = pytest.mark.usefixtures("shrink_resnet18")

LABELS = [REAL, FAKE, REAL, REAL, FAKE]
STAGE_WEIGHTS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.0)


@pytest.fixture(scope="module")
def random_vgg():
    """Return VGG-19 with random weights."""
    return load_vgg("random")[0]


# --- the update ---------------------------------------------------------------------------------------------


class LinearFloat64Detector(torch.nn.Module):
    """A float64 detector that consists of a linear re-synthesizer and a linear classifier."""

    def __init__(self):
        super().__init__()
        self.resynthesizer = torch.nn.Linear(3, 4).double()
        self.classifier = torch.nn.Linear(4, 2).double()

    def compute_gradients_of_cross_entropy(self, x, y):
        loss = F.cross_entropy(self.classifier(self.resynthesizer(x).relu()), y)
        return torch.autograd.grad(loss, list(self.parameters()))


@pytest.mark.parametrize("scale", [0.02, 1e-3])
def test_the_sgd_optimizer_makes_the_updates_of_the_authors_code(scale):
    torch.manual_seed(0)
    model = LinearFloat64Detector()
    lr, momentum, decay = 0.1, 0.9, 1e-2
    expected = [p.detach().clone() for p in model.parameters()]
    velocity = [torch.zeros_like(p) for p in expected]
    sgd = optimizers.create_optimizer("sgd", model, lr, scale, momentum, decay)
    for _ in range(6):
        gradients = model.compute_gradients_of_cross_entropy(
            torch.randn(8, 3, dtype=torch.float64), torch.randint(2, (8,))
        )
        # The code of the paper's authors multiplies the gradients of the classifier by --lr-sr (here `scale`)
        for i, ((name, p), gradient) in enumerate(zip(model.named_parameters(), gradients, strict=True)):
            p.grad = gradient
            velocity[i] = momentum * velocity[i] + decay * expected[i]
            velocity[i] += gradient * scale if name.startswith("classifier") else gradient
            expected[i] = expected[i] - lr * velocity[i]
        sgd.step()
        for got, wanted in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(got.detach(), wanted, rtol=0, atol=1e-6)


def test_the_optimizer_does_not_contain_a_frozen_resynthesizer():
    model = LinearFloat64Detector()
    model.resynthesizer.requires_grad_(False)
    (group,) = optimizers.create_optimizer("sgd", model, 1e-2, 0.02, 0.9, 1e-4).param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in model.classifier.parameters()]


def test_a_learning_rate_factor_of_zero_for_the_classifier_is_refused():
    with expect_user_error("--lr-sr"):
        optimizers.create_optimizer("sgd", LinearFloat64Detector(), 1e-2, 0.0, 0.9, 1e-4)


def test_adamw_uses_the_given_weight_decay_for_all_parameters():
    optimizer = optimizers.create_optimizer("adamw", LinearFloat64Detector(), 1e-2, 0.02, 0.9, 1e-4)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-4, 1e-4]
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([2e-4, 1e-2])


def test_the_authors_cosine_schedule_uses_the_full_learning_rate_in_epochs_0_and_1():
    factors = [optimizers.compute_authors_learning_rate_factor(5, epoch) for epoch in range(5)]
    angles = torch.pi / 2 * torch.tensor([0, 0, 1, 2, 3]) / 4
    assert factors == pytest.approx((0.9999 * angles.cos() + 0.0001).tolist())
    assert optimizers.compute_authors_learning_rate_factor(1, 0) == 1.0


def test_the_schedules_of_train_sr_give_the_expected_learning_rates():
    steps = partial(optimizers.compute_step_learning_rate_factor, 0.5, 2)
    assert [steps(epochs) for epochs in (0, 1.9, 2, 4.5)] == [1, 1, 0.5, 0.25]
    cosine = partial(optimizers.compute_cosine_learning_rate_factor, 100)
    assert [cosine(epochs) for epochs in (0, 1.5, 3, 51.5, 100)] == pytest.approx([0, 0.5, 1, 0.5, 0])


# --- validation and pictures --------------------------------------------------------------------------------


class InfiniteLogits(torch.nn.Module):
    """A detector whose logits are infinite."""

    def classify(self, residual):
        return torch.full((len(residual), 2), torch.inf)


def test_the_validation_auroc_of_infinite_logits_is_nan():
    labels = torch.tensor([REAL, FAKE])
    batch = Batch(torch.zeros(2, 3, 8, 8), labels, torch.ones(2), [], [], {})
    values = train_detector.compute_validation_metrics(InfiniteLogits(), [batch], lambda batch: batch.x, World())
    assert math.isnan(values["val_auroc"])


class NormalizedEnlargement(torch.nn.Module):
    """A re-synthesizer with batch norm."""

    scale = 4

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(3)

    def forward(self, x_lr):
        return F.interpolate(self.norm(x_lr), scale_factor=4)


def test_pictures_for_tensorboard_do_not_change_the_statistics_of_batch_norm():
    detector = toy_detector()
    detector.resynthesizer = NormalizedEnlargement().train()
    before = detector.resynthesizer.norm.running_mean.clone()
    names = []
    run = SimpleNamespace(writer="", write_images_to_tensorboard=lambda name, *more: names.append(name))
    images = {"real": torch.full((1, 3, 16, 16), 255, dtype=torch.uint8)}
    write_resynthesis_pictures(detector, Compute(CPU, "fp32"), "denoising", run, images, 0)
    assert names == ["resynthesis/real", "resynthesis/real_degraded"]
    assert torch.equal(detector.resynthesizer.norm.running_mean, before)


# --- the losses of end-to-end training ----------------------------------------------------------------------


def toy_detector(stage=0):
    """Return a small detector with random weights, in training mode."""
    torch.manual_seed(0)
    features = Pixels()
    if stage:
        features = VGG19Stage(stage)
        features.load_pretrained("random", None, "")
    classifier = DeepStemResNet(features.channels, "resnet18")
    return ResynthesisDetector(RDN(**TINY), features, classifier).train()


def toy_batch(labels=LABELS, seed=1, side=SIDE):
    """Return a batch of random images with the given labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (len(labels), 3, side, side), generator=generator).to(torch.uint8)
    keys = [(0, i, 0) for i in range(len(labels))]
    weights = torch.full((len(labels),), 1 / len(labels))
    return Batch(x, torch.tensor(labels), weights, [], keys, {})


def take_one_training_step(detector, batch, vgg, task="none", micro_batch=None, weight=1.0, step=0):
    """Take one training step on a batch, and return a dict from the name of each recorded loss to its value."""
    compute = Compute(CPU, "fp32")
    optimizer = optimizers.create_optimizer("sgd", detector, 0.1, 0.02, 0.9, 1e-4)
    stepper = Stepper(optimizer, compute, World())
    stepper.progress.step = step
    auxiliary = train_detector.AuxiliaryTask(task, weight, vgg, 123, micro_batch)
    loss_of = partial(train_detector.end_to_end_loss, detector, compute, World(), auxiliary, stepper.progress)
    train_detector.train_one_epoch(detector, [batch], loss_of, stepper)
    return stepper.progress.compute_mean_values_of_epoch()


@cache
def find_step_with_or_without_degradation(degraded):
    """Return the first training step in which the task "denoising" adds noise, or no noise if not `degraded`."""
    vgg = load_vgg("random")[0]
    batch = toy_batch(side=32)
    clean = take_one_training_step(toy_detector(), batch, vgg, "none")["auxiliary"]
    for step in range(64):
        loss = take_one_training_step(toy_detector(), batch, vgg, "denoising", step=step)["auxiliary"]
        if (loss != clean) == degraded:
            return step
    raise AssertionError("never drawn")


def reconstruction_loss_by_hand(x_hat, x, vgg):
    """Compute the sum of the L1 loss of the pixels and the weighted L1 losses of the VGG-19 feature maps."""
    maps_hat, maps = vgg(x_hat, STAGES), vgg(x, STAGES)
    loss = (x_hat - x).abs().mean()
    for k, weight in zip(STAGES, STAGE_WEIGHTS, strict=True):
        loss = loss + weight * (maps_hat[k] - maps[k]).abs().mean()
    return loss


@pytest.mark.parametrize("degraded", [False, True])
@pytest.mark.parametrize("stage", [0, 2])
def test_residual_and_auxiliary_loss_equal_the_formulas_of_the_paper(random_vgg, stage, degraded):
    detector = toy_detector(stage)
    x = torch.rand(3, 3, 32, 32)
    real = torch.tensor([True, False, True])
    low = downsample(x, 4) + 0.1 * torch.rand(3, 3, 8, 8) if degraded else None
    residual, loss = compute_residuals_and_auxiliary_losses(detector, random_vgg, x, low, real)
    x_hat = detector.resynthesizer(downsample(x, 4))
    expected_residual = (detector.features(x_hat) - detector.features(x)).abs()
    torch.testing.assert_close(residual, expected_residual)
    used = detector.resynthesizer(low[real]) if degraded else x_hat[real]
    torch.testing.assert_close(loss[real].mean(), reconstruction_loss_by_hand(used, x[real], random_vgg))
    assert loss[1] == 0


def test_without_an_auxiliary_task_the_auxiliary_loss_is_the_reconstruction_loss_of_clean_reals(random_vgg):
    batch = toy_batch()
    x = batch.x[batch.labels == REAL] / 255
    expected = reconstruction_loss_by_hand(toy_detector().resynthesizer(downsample(x, 4)), x, random_vgg).item()
    losses = [
        take_one_training_step(toy_detector(), batch, random_vgg, "none", step=step)["auxiliary"] for step in range(4)
    ]
    losses.append(take_one_training_step(toy_detector(), batch, random_vgg, "none", weight=3.0)["auxiliary"] / 3)
    assert losses == pytest.approx([expected] * 5, rel=1e-5)


def test_without_vgg_weights_the_auxiliary_loss_is_0():
    values = take_one_training_step(toy_detector(), toy_batch(), None, "none", weight=0.0)
    assert values["auxiliary"] == 0
    assert values["loss"] == pytest.approx(values["cross_entropy"])


def test_a_batch_with_one_real_image_has_an_auxiliary_loss_of_0(random_vgg):
    for step in range(4):
        values = take_one_training_step(
            toy_detector(), toy_batch([REAL, FAKE, FAKE, FAKE]), random_vgg, "denoising", step=step
        )
        assert values["auxiliary"] == 0
    assert (
        take_one_training_step(toy_detector(), toy_batch([REAL, REAL, FAKE, FAKE]), random_vgg, "denoising")[
            "auxiliary"
        ]
        > 0
    )


@pytest.mark.parametrize("degraded", [False, True])
@pytest.mark.parametrize("micro_batch", [None, 2])
def test_the_auxiliary_loss_depends_on_real_images_and_not_on_fakes(random_vgg, degraded, micro_batch):
    step = find_step_with_or_without_degradation(degraded)
    losses = {}
    for changed in ("nothing", "a fake", "a real"):
        batch = toy_batch()
        index = {"nothing": None, "a fake": 1, "a real": 2}[changed]
        if index is not None:
            batch.x[index] = 255 - batch.x[index] // 2
        losses[changed] = take_one_training_step(
            toy_detector(), batch, random_vgg, "denoising", micro_batch, step=step
        )["auxiliary"]
    assert losses["a fake"] == pytest.approx(losses["nothing"], rel=1e-6)
    assert losses["a real"] != pytest.approx(losses["nothing"], rel=1e-4)


@pytest.mark.parametrize(("stage", "degraded", "micro_batch"), [(0, True, 1), (2, False, 2)])
def test_a_training_step_in_micro_batches_gives_the_weights_of_a_step_on_the_whole_batch(
    monkeypatch, stage, degraded, micro_batch
):
    """Batch norm of feature maps with very few pixels amplifies rounding errors, so the test computes in float64."""
    step = find_step_with_or_without_degradation(degraded)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    original = Compute.images_to_float
    monkeypatch.setattr(Compute, "images_to_float", lambda self, images: original(self, images).double())
    vgg = load_vgg("random")[0].double()
    before = toy_detector(stage).double().state_dict()
    states, values = [], []
    for size in (None, micro_batch):
        detector = toy_detector(stage).double()
        batch = toy_batch(side=32)
        batch = batch._replace(weights=batch.weights.double())
        values.append(take_one_training_step(detector, batch, vgg, "denoising", size, step=step))
        states.append(detector.state_dict())
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    for key, tensor in states[0].items():
        if tensor.dtype != torch.int64 and not key.startswith("features"):
            assert not torch.equal(tensor, before[key])
        torch.testing.assert_close(states[1][key], tensor, rtol=1e-6, atol=1e-7)


def test_the_classifier_computes_in_float32_even_if_the_precision_is_bf16():
    """On a CPU, bfloat16 gradients of a strided convolution with an output of 1 x 1 pixel can be infinite."""
    residual = 10 * torch.rand(4, 512, 16, 16, generator=torch.Generator().manual_seed(0))
    gradients = []
    for precision in ("fp32", "bf16"):
        detector = toy_detector(5)
        with Compute(CPU, precision).autocast():
            logits = detector.classify(residual)
        F.cross_entropy(logits, torch.tensor([0, 1, 0, 1])).backward()
        gradients.append([p.grad for p in detector.classifier.parameters()])
    for in_fp32, in_bf16 in zip(*gradients, strict=True):
        assert in_bf16.isfinite().all()
        assert torch.equal(in_fp32, in_bf16)


def test_a_training_whose_loss_is_not_finite_ends_and_keeps_a_finite_checkpoint(training_files, tmp_path, capfd):
    flags = make_arguments_of_train_detector(
        training_files, tmp_path, "--fixed-sr --epochs 3 --lr 1e38 --save-minutes 0"
    )
    code, line = run_training_for_status_and_last_line(flags, capfd)
    saved = read_checkpoint_content(tmp_path / "last.pth.tar")
    assert code == 2
    for word in ("epoch 0, step", ".png", "last.pth.tar"):
        assert word in line
    assert all(value.isfinite().all() for value in saved["state_dict"].values())


def test_a_step_whose_loss_is_not_finite_does_not_change_the_weights():
    model = torch.nn.Linear(2, 1)
    stepper = Stepper(torch.optim.SGD(model.parameters(), lr=0.1), Compute(CPU, "fp32"), World())
    before = model.weight.detach().clone()
    with pytest.raises(NotFinite):
        stepper.step(model(torch.ones(1, 2)).sum() * float("nan"), {}, toy_batch([REAL]))
    assert torch.equal(model.weight, before)
    assert stepper.progress.total_steps == 0


def test_mean_losses_are_weighted_by_the_number_of_images():
    progress = Progress()
    progress.record_optimizer_step({"loss": 1.0}, 3)
    progress.record_optimizer_step({"loss": 5.0}, 1)
    assert progress.compute_mean_values_of_epoch() == {"loss": 2.0}
    progress.start_next_epoch()
    assert (progress.epoch, progress.step, progress.total_steps, progress.compute_mean_values_of_epoch()) == (
        1,
        0,
        2,
        {},
    )


# --- complete trainings -------------------------------------------------------------------------------------


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
def test_the_resynthesizer_is_trained_if_and_only_if_fixed_sr_is_not_given(training_files, tmp_path, flags, moves):
    run_training(
        make_arguments_of_train_detector(training_files, tmp_path / "still", f"{flags} --epochs 1 --lr 0 --wd 0")
    )
    run_training(make_arguments_of_train_detector(training_files, tmp_path / "moved", f"{flags} --epochs 1"))
    before = read_checkpoint_content(training_files / "rdn.pth")
    after = read_checkpoint_content(tmp_path / "moved/0001_sr.pth.tar")["state_dict"]
    assert before.keys() == after.keys()
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert len(changed) == (len(before) if moves else 0)
    still = read_checkpoint_content(tmp_path / "still/0001.pth.tar")["state_dict"]
    moved = read_checkpoint_content(tmp_path / "moved/0001.pth.tar")["state_dict"]
    learned = [name for name, _ in DeepStemResNet(3, "resnet18").named_parameters()]
    assert [name for name in learned if torch.equal(still[name], moved[name])] == []
    (line,) = read_epoch_statistics_of_training(tmp_path / "moved")
    assert (line.get("auxiliary", 0) > 0) == (moves and "--lw-sr 0" not in flags)


def test_numbered_checkpoints_are_written_after_the_same_epochs_as_in_the_authors_code(training_files, tmp_path):
    run_training(
        make_arguments_of_train_detector(training_files, tmp_path / "d", "--fixed-sr --epochs 4 --save-every-epoch 2")
    )
    names = sorted(path.name for path in (tmp_path / "d").glob("0*"))
    assert names == sorted(f"{n:04d}{kind}.pth.tar" for n in (1, 3, 4) for kind in ("", "_sr"))
    written = read_checkpoint_content(tmp_path / "d/0001.pth.tar")
    assert (written["arch"], written["epoch"]) == ("resnet18", 1)
    run_training(
        make_arguments_of_train_sr(training_files, tmp_path / "s", "--num-epochs 4 --num-save 2 --vgg-lambda 0")
    )
    assert sorted(path.name for path in (tmp_path / "s/x2").glob("epoch*")) == ["epoch_1.pth", "epoch_3.pth"]
    assert read_checkpoint_content(tmp_path / "s/x2/epoch_3.pth").keys() == RDN(scale=2, **TINY).state_dict().keys()


def test_a_tiny_evaluation_image_gets_a_psnr_and_a_psnr_below_bicubic_gives_a_warning(training_files, tmp_path, caplog):
    (tmp_path / "images").mkdir()
    save_image(tmp_path / "images/tiny.png", random_rgb_pixels(4, 4))
    run_training(
        make_arguments_of_train_sr(
            training_files, tmp_path, f"--num-epochs 1 --vgg-lambda 0 --eval-file {tmp_path}/images"
        )
    )
    assert "bicubic" in caplog.text
    assert "psnr" in read_epoch_statistics_of_training(tmp_path / "x2")[0]


def test_a_black_evaluation_image_does_not_decide_which_epoch_is_best(training_files, tmp_path):
    """A network can enlarge a black image exactly, so train_sr.py must replace an infinite PSNR by a finite value."""
    images = tmp_path / "images"
    images.mkdir()
    save_image(images / "black.png", random_rgb_pixels(32, 32) * 0)
    save_image(images / "other.png", random_rgb_pixels(32, 32))
    run_training(
        make_arguments_of_train_sr(
            training_files, tmp_path, f"--num-epochs 3 --lr 1e-3 --vgg-lambda 0 --eval-file {images}"
        )
    )
    values = [line["psnr"] for line in read_epoch_statistics_of_training(tmp_path / "x2")]
    assert all(0 < value < 60 for value in values)
    assert read_checkpoint_content(tmp_path / "x2/best.pth")["epoch"] == 1 + values.index(max(values))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--val-root-neg FAKE", ["--val-root-pos"]),
        ("--val-root-pos REAL", ["--val-root-neg"]),
        ("--batch-size 1 --crop-size 32", ["a batch has only one image", "--crop-size"]),
        ("--batch-size 3 --idx-stages 2", ["a batch has only one image", "--batch-size 3"]),
        ("--mode-sr denoising", ["--fixed-sr"]),
        ("--mode-sr inpainting", ["--mode-sr", "colorization"]),
        ("--crops-per-image 2", ["--crop-size"]),
        ("--arch resnet19", ["resnet19", "resnet50"]),
        ("--features edges", ["edges", "vgg19"]),
        ("--sr-arch edsr", ["edsr", "bicubic"]),
        ("--arch-args depth=3", ["resnet18", "depth"]),
    ],
)
def test_options_with_which_training_is_impossible_are_refused_before_training_begins(
    training_files, tmp_path, flags, words
):
    with expect_user_error(*words):
        run_training(make_arguments_of_train_detector(training_files, tmp_path / "out", f"--fixed-sr {flags}"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("flags", "warned"), [("--idx-stages 3", True), ("", False)])
def test_residuals_no_larger_than_the_stride_of_the_classifier_give_a_warning(
    training_files, tmp_path, caplog, flags, warned
):
    run_training(
        make_arguments_of_train_detector(training_files, tmp_path, f"--fixed-sr --epochs 1 --batch-size 5 {flags}")
    )
    assert ("stride" in caplog.text) == warned


@pytest.mark.parametrize("size", [(32, 32), (32, 33), (1, 1), (64, 8)])
def test_batch_norm_can_be_trained_on_one_residual_only_if_it_is_larger_than_the_stride(size):
    classifier = DeepStemResNet(3, "resnet18")
    try:
        classifier(torch.rand(1, 3, *size))
        possible = True
    except ValueError:
        possible = False
    assert possible == (max(size) > classifier.stride)


def test_end_to_end_training_logs_the_learning_rates_of_the_classifier_and_the_resynthesizer(training_files, tmp_path):
    flags = "--mode-sr none --lw-sr 0 --epochs 1 --lr 1e-4 --lr-sr 3"
    run_training(make_arguments_of_train_detector(training_files, tmp_path, flags))
    (values,) = read_epoch_statistics_of_training(tmp_path)
    assert values["learning_rate"] == pytest.approx(3e-4)
    assert values["resynthesizer_learning_rate"] == pytest.approx(1e-4)
