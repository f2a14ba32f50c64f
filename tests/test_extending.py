"""Tests of networks, perturbations, metrics and auxiliary tasks that users add, as docs/extending.md shows."""

import math
import re
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from files import expect_user_error
from processes import ROOT
from torch import nn
from trainings import make_arguments_of_train_detector, read_checkpoint_content, run_training

from data import degradations, perturbations
from data.degradations import degrade_batch
from data.perturbations import SWEEP, Perturbation, PerturbationSetting, Sweep
from evaluation import load, metrics
from models import build
from models.released import extract_state_dict
from models.resynthesis import ResynthesisDetector
from train_detector import hash_source_code

DOCUMENT = (ROOT / "docs/extending.md").read_text()
BASE = "--gpu cpu --workers 0 --vgg-weights random"


def load_example_module(name):
    """Run the code block of docs/extending.md that begins with "# models/NAME.py", and return it as a module."""
    for code in re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL):
        if code.startswith(f"# models/{name}.py"):
            module = types.ModuleType(name)
            exec(code, module.__dict__)
            return module
    raise AssertionError(f"docs/extending.md has no example models/{name}.py")


@pytest.fixture
def add_documented_networks(monkeypatch):
    """Add the three example networks in docs/extending.md to the dicts of networks in models/build.py."""
    monkeypatch.setitem(build.RESYNTHESIZERS, "small_sr", load_example_module("small_sr").SmallSR)
    monkeypatch.setitem(build.FEATURES, "gradients", load_example_module("gradients").Gradients)
    monkeypatch.setitem(build.CLASSIFIERS, "small_cnn", load_example_module("small_cnn").SmallCNN)


def train_documented_super_resolution_network(files, out):
    """Train SmallSR, the example re-synthesizer in docs/extending.md, and return the path of its weights."""
    flags = f"{BASE} --sr-arch small_sr --sr-args width=5 --num-epochs 1 --patch-size 8 --batch-size 4 --vgg-lambda 0"
    run_training(["--train-file", f"{files}/real", "--outputs-dir", str(out), *flags.split()])
    return out / "x4/last.pth"


def make_train_detector_arguments_without_resynthesizer(files, out, flags):
    """Return a command line for train_detector.py that names no re-synthesizer, unless `flags` names one."""
    roots = ["--data-root-pos", f"{files}/real", "--data-root-neg", f"{files}/fake", "--output-path", str(out)]
    return [*roots, *f"{BASE} --lr 1e-3 --lr-sr 1 --batch-size 4".split(), *flags.split()]


PARTS = "--features gradients --feature-args gain=2 --arch small_cnn --arch-args width=6"


def test_a_detector_of_the_three_documented_networks_is_trained_resumed_loaded_and_fine_tuned(
    training_files, tmp_path, add_documented_networks
):
    weights = train_documented_super_resolution_network(training_files, tmp_path / "sr")
    out = tmp_path / "detector"
    run_training(
        make_train_detector_arguments_without_resynthesizer(
            training_files, out, f"{PARTS} --fixed-sr --sr-weights-file {weights} --epochs 1"
        )
    )
    run_training(
        make_train_detector_arguments_without_resynthesizer(
            training_files, out, f"{PARTS} --fixed-sr --epochs 2 --resume auto"
        )
    )
    state = read_checkpoint_content(out / "last.pth.tar")
    assert state["progress"]["epoch"] == 2
    config = state["config"]
    assert config["resynthesizer"] == {"name": "small_sr", "scale": 4, "args": {"width": 5}}
    assert config["features"] == {"name": "gradients", "args": {"gain": 2}}
    assert config["classifier"] == {"name": "small_cnn", "args": {"width": 6}}

    detector = load(str(out / "last.pth.tar"), device="cpu")
    assert detector.network.features.gain == 2
    assert detector.residual(f"{training_files}/real/0.png")[0].shape == (6, 64, 64)
    assert np.isfinite(detector.predict([f"{training_files}/real/0.png", f"{training_files}/fake/0.png"])).all()

    tuned = tmp_path / "tuned"
    run_training(
        make_train_detector_arguments_without_resynthesizer(
            training_files, tuned, f"--mode-sr denoising --init {out}/last.pth.tar --epochs 1"
        )
    )
    before = state["sr_state_dict"]
    after = read_checkpoint_content(tuned / "last.pth.tar")["sr_state_dict"]
    assert not any(torch.equal(before[key], after[key]) for key in before)


def test_network_arguments_that_contradict_a_checkpoint_are_refused(training_files, tmp_path, add_documented_networks):
    weights = train_documented_super_resolution_network(training_files, tmp_path / "sr")
    with expect_user_error("--sr-args", "width=7", "width=5"):
        flags = f"--fixed-sr --sr-weights-file {weights} --sr-args width=7 --arch small_cnn --epochs 1"
        run_training(make_train_detector_arguments_without_resynthesizer(training_files, tmp_path / "detector", flags))
    with expect_user_error("--sr-arch", "rdn", "small_sr"):
        flags = f"--fixed-sr --sr-weights-file {weights} --sr-arch rdn --arch small_cnn --epochs 1"
        run_training(make_train_detector_arguments_without_resynthesizer(training_files, tmp_path / "detector", flags))


def test_a_checkpoint_whose_features_are_not_in_the_dict_of_features_is_refused_by_name(
    training_files, tmp_path, add_documented_networks, monkeypatch
):
    run_training(
        make_train_detector_arguments_without_resynthesizer(
            training_files, tmp_path, f"--fixed-sr --sr-arch none {PARTS} --epochs 1"
        )
    )
    monkeypatch.delitem(build.FEATURES, "gradients")
    with expect_user_error("gradients", "pixels"):
        load(str(tmp_path / "last.pth.tar"), device="cpu")


class ConstantFeatures(torch.nn.Sequential):
    """A feature network whose weights all equal the class attribute VALUE."""

    channels, stride = 4, 1
    VALUE = 0.5

    def __init__(self):
        super().__init__(torch.nn.Conv2d(3, self.channels, 3, padding=1, bias=False))
        torch.nn.init.constant_(self[0].weight, self.VALUE)


def test_features_that_get_other_weights_when_a_detector_is_loaded_are_refused(training_files, tmp_path, monkeypatch):
    monkeypatch.setitem(build.FEATURES, "constant", ConstantFeatures)
    flags = "--fixed-sr --sr-arch none --features constant --arch resnet18 --epochs 1"
    run_training(make_train_detector_arguments_without_resynthesizer(training_files, tmp_path, flags))
    monkeypatch.setattr(ConstantFeatures, "VALUE", 0.25)
    with expect_user_error("other weights of the feature network constant"):
        load(str(tmp_path / "last.pth.tar"), device="cpu")


@pytest.mark.parametrize("control", ["bicubic", "none"])
def test_the_resynthesizers_bicubic_and_none_need_no_weights_and_give_the_expected_residual(
    training_files, tmp_path, add_documented_networks, control
):
    run_training(
        make_train_detector_arguments_without_resynthesizer(
            training_files, tmp_path, f"--fixed-sr --sr-arch {control} --arch small_cnn --epochs 1"
        )
    )
    detector = load(str(tmp_path / "last.pth.tar"), device="cpu")
    x = torch.rand(1, 3, 16, 16)
    x_hat = detector.network.resynthesize(x)
    residual = detector.network.residual(x, x_hat)
    if control == "none":
        assert torch.equal(residual, x)
    else:
        low = torch.nn.functional.avg_pool2d(x, 4)
        expected = torch.nn.functional.interpolate(low, scale_factor=4, mode="bicubic")
        torch.testing.assert_close(x_hat, expected)


def test_training_a_resynthesizer_without_parameters_is_refused(training_files, tmp_path):
    with expect_user_error("--fixed-sr", "no parameters"):
        run_training(
            make_train_detector_arguments_without_resynthesizer(
                training_files, tmp_path, "--sr-arch bicubic --arch resnet18 --epochs 1"
            )
        )
    with expect_user_error("bicubic", "no parameters"):
        flags = f"--train-file {training_files}/real --outputs-dir {tmp_path} {BASE} --sr-arch bicubic --num-epochs 1"
        run_training([*flags.split(), "--patch-size", "8"])


def test_training_with_an_rdn_but_without_its_weights_file_is_refused(training_files, tmp_path):
    with expect_user_error("--sr-weights-file", "rdn"):
        run_training(
            make_train_detector_arguments_without_resynthesizer(
                training_files, tmp_path, "--fixed-sr --arch resnet18 --epochs 1"
            )
        )


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "vit_b_16"])
def test_a_torchvision_classifier_reads_the_channels_of_the_residual(name):
    more = {"image_size": 32} if name.startswith("vit") else {}
    classifier = build.create_classifier(f"torchvision:{name}", 6, more).eval()
    assert classifier(torch.rand(2, 6, 32, 32)).shape == (2, 2)


def test_a_torchvision_classifier_is_trained_and_loaded(training_files, tmp_path):
    flags = "--fixed-sr --arch torchvision:mobilenet_v3_small --epochs 1"
    run_training(make_arguments_of_train_detector(training_files, tmp_path, flags))
    detector = load(str(tmp_path / "last.pth.tar"), device="cpu")
    assert np.isfinite(detector.predict([f"{training_files}/real/0.png"])).all()


def test_a_torchvision_classifier_that_refuses_the_size_of_the_residual_is_refused_before_the_training(
    training_files, tmp_path
):
    flags = "--fixed-sr --arch torchvision:vit_b_16 --arch-args image_size=224"
    with expect_user_error("torchvision:vit_b_16", "cannot classify residuals", "224"):
        run_training(make_arguments_of_train_detector(training_files, tmp_path / "out", flags))
    assert not (tmp_path / "out").exists()


class ThreeLogits(torch.nn.Module):
    """A classifier that returns three logits instead of two."""

    def __init__(self, channels):
        super().__init__()
        self.linear = torch.nn.Linear(channels, 3)

    def forward(self, residual):
        return self.linear(residual.mean(dim=(2, 3)))


def test_a_classifier_that_does_not_return_two_logits_is_refused(training_files, tmp_path, monkeypatch):
    monkeypatch.setitem(build.CLASSIFIERS, "three", ThreeLogits)
    with expect_user_error("three", "(B, 2)", "(1, 3)"):
        run_training(make_arguments_of_train_detector(training_files, tmp_path, "--fixed-sr --arch three"))


def test_an_unknown_torchvision_classifier_is_refused():
    with expect_user_error("resnet19"):
        build.create_classifier("torchvision:resnet19", 3, {})


def test_the_documented_script_that_adds_a_classifier_is_valid_python():
    code = re.search(r"```python\n(# my_train.py.*?)```", DOCUMENT, re.DOTALL)[1]
    compile(code, "my_train.py", "exec")
    assert "CLASSIFIERS" in code


def test_the_documented_dicts_and_linked_files_of_the_extension_guide_exist():
    for dictionary, name in (
        (perturbations.SWEEP, "jpeg"),
        (metrics.METRICS, "auroc"),
        (degradations.TASKS, "denoising"),
    ):
        assert name in dictionary
    for path in re.findall(r"\]\(\.\./([^)]+)\)", DOCUMENT):
        assert Path(ROOT, path).exists()


def test_the_documented_example_perturbation_metric_and_auxiliary_task_work(monkeypatch):
    code = re.search(r"```python\n(# image: uint8.*?)```", DOCUMENT, re.DOTALL)[1]
    names = {"torch": torch, "SWEEP": {}, "METRICS": {}, "TASKS": {}}
    exec(code, {**names, "Sweep": perturbations.Sweep, "Metric": metrics.Metric})
    rng = np.random.default_rng(0)
    image = torch.arange(48, dtype=torch.uint8).view(3, 4, 4)
    darker = names["SWEEP"]["gamma"].apply(image, 1.2, rng)
    assert darker.dtype == torch.uint8 and (darker <= image).all() and darker.shape == image.shape
    called_fake = names["METRICS"]["called_fake"].compute(np.array([1.0, -1.0]), np.array([0.7, 0.3]), None)
    assert called_fake == 0.5
    darken = names["TASKS"]["brightening"](rng)
    assert (darken(torch.ones(3, 2, 2), rng) < 1).all()


class NormalizedEnlargement(nn.Module):
    """A re-synthesizer with batch norm and dropout."""

    scale = 2

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Upsample(scale_factor=2))

    def forward(self, x_lr):
        return self.layers(x_lr)


class NormalizedPixels(nn.Module):
    """A feature network that applies batch norm to pixels."""

    channels, stride = 3, 1

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(x)


def test_a_frozen_resynthesizer_and_the_features_stay_in_evaluation_mode():
    detector = ResynthesisDetector(NormalizedEnlargement(), NormalizedPixels(), nn.BatchNorm2d(3))
    detector.set_resynthesizer_frozen(True)
    detector.train()
    assert detector.classifier.training and not detector.resynthesizer.training and not detector.features.training
    before = {name: buffer.clone() for name, buffer in detector.named_buffers()}
    x = torch.rand(2, 3, 8, 8)
    residuals = [detector.residual(x, detector.resynthesize(x)) for _ in range(2)]
    assert torch.equal(*residuals)
    assert all(torch.equal(before[name], buffer) for name, buffer in detector.named_buffers())
    detector.set_resynthesizer_frozen(False)
    assert detector.resynthesizer.layers[0].training and not detector.features.norm.training


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--sr-arch bicubic --sr-args scale=2", ("--sr-args", "scale")),
        ("--sr-arch none --arch resnet50 --arch-args arch=resnet18", ("resnet50", "arch")),
        ("--sr-arch none --arch torchvision:resnet18 --arch-args num_classes=5", ("resnet18", "num_classes")),
        ("--sr-arch none --idx-stages 3 --feature-args stage=2", ("--feature-args", "--features")),
    ],
)
def test_network_arguments_that_another_option_already_sets_are_refused(training_files, tmp_path, flags, words):
    with expect_user_error(*words):
        run_training(
            make_train_detector_arguments_without_resynthesizer(
                training_files, tmp_path, f"--fixed-sr --epochs 1 {flags}"
            )
        )


class FeaturesWithRandomWeights(NormalizedPixels):
    """A feature network whose convolution has different random weights in each instance of the class."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 3, kernel_size=1)


class FeaturesThatChangeTheirInput(NormalizedPixels):
    """A feature network that multiplies its input by 2 in place."""

    def forward(self, x):
        return x.mul_(2)


class FeaturesWithoutStride(NormalizedPixels):
    """A feature network whose attribute `stride` is None instead of an integer."""

    stride = None


class FeaturesWithoutRecord(NormalizedPixels):
    """A feature network whose method `load_pretrained` returns None instead of a dict."""

    def load_pretrained(self, source, trained_with, name):
        """Return None, and load no weights."""


@pytest.mark.parametrize(
    ("features", "words"),
    [
        (FeaturesWithRandomWeights, "differ each time"),
        (FeaturesThatChangeTheirInput, "modifies its input"),
        (FeaturesWithoutStride, "attribute stride"),
        (FeaturesWithoutRecord, "load_pretrained"),
    ],
)
def test_features_that_do_not_keep_the_documented_rules_are_refused(
    training_files, tmp_path, monkeypatch, features, words
):
    monkeypatch.setitem(build.FEATURES, "wrong", features)
    flags = "--sr-arch none --fixed-sr --features wrong --arch resnet18"
    with expect_user_error("wrong", words):
        run_training(make_train_detector_arguments_without_resynthesizer(training_files, tmp_path / "out", flags))


class NearestEnlargement(nn.Module):
    """A re-synthesizer that enlarges images by `factor`, whatever value its attribute `scale` has."""

    def __init__(self, scale, factor=4):
        super().__init__()
        self.scale = scale
        self.layer = nn.Upsample(scale_factor=factor)

    def forward(self, x_lr):
        return self.layer(x_lr)


class EnlargementWithoutScale(NearestEnlargement):
    """A re-synthesizer without the attribute `scale`."""

    def __init__(self, scale):
        super().__init__(scale)
        del self.scale


class EnlargementByTwo(NearestEnlargement):
    """A re-synthesizer that enlarges images by 2, although its attribute `scale` is 4."""

    def __init__(self, scale):
        super().__init__(scale, factor=2)


@pytest.mark.parametrize(
    ("network", "words"), [(EnlargementWithoutScale, "attribute scale = 4"), (EnlargementByTwo, "(1, 3, 64, 64)")]
)
def test_a_new_resynthesizer_without_scale_or_with_a_wrong_output_size_is_refused(
    training_files, tmp_path, monkeypatch, network, words
):
    monkeypatch.setitem(build.RESYNTHESIZERS, "wrong", network)
    flags = f"--train-file {training_files}/real --outputs-dir {tmp_path}/out --sr-arch wrong {BASE}"
    with expect_user_error("wrong", words):
        run_training(flags.split())
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_stores_the_default_values_of_arguments_that_were_not_given(
    training_files, tmp_path, add_documented_networks
):
    flags = "--sr-arch none --fixed-sr --epochs 1 --features gradients --arch small_cnn"
    run_training(make_train_detector_arguments_without_resynthesizer(training_files, tmp_path, flags))
    config = read_checkpoint_content(tmp_path / "last.pth.tar")["config"]
    assert config["features"] == {"name": "gradients", "args": {"gain": 1.0}}
    assert config["classifier"] == {"name": "small_cnn", "args": {"width": 32}}


class WrongStride(NormalizedPixels):
    """A feature network whose attribute `stride` is 2, although its feature maps are as large as the image."""

    stride = 2


def test_features_with_a_wrong_stride_are_refused(training_files, tmp_path, monkeypatch):
    monkeypatch.setitem(build.FEATURES, "wrong", WrongStride)
    flags = "--fixed-sr --sr-arch none --features wrong --arch resnet18 --epochs 1"
    with expect_user_error("feature network wrong", "stride = 2", "(1, 3, 64, 64)", "(1, 3, 128, 128)"):
        run_training(make_train_detector_arguments_without_resynthesizer(training_files, tmp_path, flags))


@pytest.mark.parametrize("wrong", [lambda image, *_: image / 255, lambda image, *_: image[:, ::2]])
def test_an_added_perturbation_that_returns_another_type_or_shape_is_refused(monkeypatch, wrong):
    monkeypatch.setitem(SWEEP, "wrong", Sweep(wrong, (1.0,)))
    perturbation = Perturbation(PerturbationSetting("wrong", 1.0), "sweep", seed=0)
    with pytest.raises(TypeError, match=r"perturbation wrong .* torch.uint8 and shape \(3, 8, 8\)"):
        perturbation(torch.zeros(3, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("degrade", "got"),
    [
        (lambda image, rng: image[:, ::2], "(3, 4, 8)"),
        (lambda image, rng: image.double(), "float64"),
        (lambda image, rng: image.numpy(), "ndarray"),
    ],
)
def test_an_added_auxiliary_task_that_returns_another_shape_or_type_is_refused(degrade, got):
    with expect_user_error("auxiliary task", "(3, 8, 8)", got):
        degrade_batch(degrade, torch.zeros(1, 3, 8, 8), [None])


class ClassifierWithDefaultChannels(ThreeLogits):
    """A classifier whose argument for the number of channels has a default value."""

    def __init__(self, in_channels=3, width=4, ratio=math.inf):
        super().__init__(in_channels)
        self.linear = torch.nn.Linear(in_channels, 2)


def test_the_channels_of_a_classifier_and_infinite_numbers_are_not_stored_as_default_arguments(
    training_files, tmp_path, monkeypatch
):
    monkeypatch.setitem(build.CLASSIFIERS, "mine", ClassifierWithDefaultChannels)
    run_training(make_arguments_of_train_detector(training_files, tmp_path, "--fixed-sr --epochs 1 --arch mine"))
    config = read_checkpoint_content(tmp_path / "last.pth.tar")["config"]
    assert config["classifier"] == {"name": "mine", "args": {"width": 4}}


def test_an_added_perturbation_for_training_that_returns_another_type_is_refused(monkeypatch):
    monkeypatch.setattr(perturbations, "FRANK2020", {"wrong": lambda image, rng: image / 2})
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    with pytest.raises(TypeError, match="perturbation wrong .*torch.float32"):
        for seed in range(20):  # 20 attempts, because each perturbs the image only with probability 0.5
            perturbations.perturb_at_random(image, np.random.default_rng(seed))


def test_torchvision_classifiers_with_auxiliary_outputs_return_only_logits():
    classifier = build.create_classifier("torchvision:googlenet", 6, {"init_weights": False})
    assert classifier(torch.rand(2, 6, 64, 64)).shape == (2, 2)


def test_the_prefix_of_data_parallel_is_removed_only_if_all_weights_have_it():
    weight = torch.zeros(1)
    assert extract_state_dict({"module.a": weight, "module.b": weight}, "f").keys() == {"a", "b"}
    assert extract_state_dict({"module.a": weight, "b": weight}, "f").keys() == {"module.a", "b"}


def test_the_residual_cache_depends_on_the_source_code_of_a_network():
    assert hash_source_code(NormalizedPixels()) != hash_source_code(NormalizedEnlargement())
    # Python cannot find the source code of a class that `exec` has defined, so `hash_source_code` returns None
    assert hash_source_code(load_example_module("gradients").Gradients()) is None
