"""Tests of the classifiers in models.spectrum, and of detectors that use signed residuals."""

import math

import pytest
import torch
from files import expect_user_error
from trainings import make_arguments_of_train_detector, read_checkpoint_content, run_training

from evaluation import load
from models.features import Pixels
from models.rdn import RDN
from models.resynthesis import ResynthesisDetector
from models.spectrum import ChannelPowerClassifier, SpectrumClassifier, pad_by_reflection


@pytest.mark.parametrize("size", [(3, 40, 70), (3, 16, 16), (3, 7, 33), (64, 16, 20), (512, 5, 5), (3, 1, 9)])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", [SpectrumClassifier, ChannelPowerClassifier])
def test_spectrum_classifiers_give_two_logits_for_residuals_of_any_size(size, batch, kind):
    classifier = kind(size[0])
    x = torch.rand(batch, *size)
    assert classifier.train()(x).shape == (batch, 2)
    logits = classifier.eval()(x)
    assert logits.shape == (batch, 2) and logits.isfinite().all()


def test_a_pattern_with_a_period_of_four_pixels_is_a_peak_at_a_quarter_of_the_sampling_rate():
    classifier = SpectrumClassifier(3)
    noise = 0.01 * torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    wave = 0.05 * torch.cos(2 * math.pi / 4 * torch.arange(128.0)).expand(1, 3, 128, 128)
    difference = (
        classifier.compute_spectrum_relative_to_neighbouring_frequencies(noise + wave)
        - classifier.compute_spectrum_relative_to_neighbouring_frequencies(noise)
    )[0]
    row, column = classifier.triangle[:, difference.argmax()].tolist()
    assert (row, column) == (0, 32 // 4)


@pytest.mark.parametrize("change", ["mirrored", "turned", "brighter"])
def test_mirroring_turning_and_brightness_do_not_change_the_spectrum(change):
    classifier = SpectrumClassifier(3)
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    changed = {"mirrored": x.flip(3), "turned": x.rot90(1, (2, 3)), "brighter": x + 0.25}[change]
    torch.testing.assert_close(
        classifier.compute_spectrum_relative_to_neighbouring_frequencies(changed),
        classifier.compute_spectrum_relative_to_neighbouring_frequencies(x),
        rtol=1e-3,
        atol=1e-3,
    )


def test_the_channel_power_classifier_ignores_contrast_and_notices_one_stronger_channel():
    torch.manual_seed(0)
    classifier = ChannelPowerClassifier(8).eval()
    residual = torch.rand(2, 8, 4, 4)
    torch.testing.assert_close(classifier(3 * residual), classifier(residual), rtol=1e-4, atol=1e-4)
    stronger = residual.clone()
    stronger[:, 0] *= 3
    assert (classifier(stronger) - classifier(residual)).abs().min() > 1e-3


def test_pad_by_reflection_extends_a_small_residual_to_the_required_size():
    x = torch.arange(3.0).view(1, 1, 1, 3)
    padded = pad_by_reflection(x, 6)
    assert padded.shape == (1, 1, 6, 6)
    assert padded[0, 0, 0].tolist() == [0, 1, 2, 1, 0, 1]


def test_the_signed_residual_is_the_difference_and_the_absolute_residual_is_its_absolute_value():
    torch.manual_seed(0)
    rdn = RDN(num_features=4, growth_rate=4, num_blocks=1, num_layers=1)
    x = torch.rand(1, 3, 16, 16)
    signed = ResynthesisDetector(rdn, Pixels(), torch.nn.Identity(), signed=True)
    absolute = ResynthesisDetector(rdn, Pixels(), torch.nn.Identity())
    x_hat = signed.resynthesize(x)
    assert torch.equal(signed.residual(x, x_hat), x_hat - x)
    assert torch.equal(absolute.residual(x, x_hat), (x_hat - x).abs())


def test_a_detector_on_signed_residuals_is_trained_resumed_and_loaded(training_files, tmp_path):
    flags = "--fixed-sr --residual signed --arch spectrum --arch-args hidden=4"
    run_training(make_arguments_of_train_detector(training_files, tmp_path, f"{flags} --epochs 1 VALIDATE"))
    run_training(
        make_arguments_of_train_detector(training_files, tmp_path, f"{flags} --epochs 2 VALIDATE --resume auto")
    )
    assert read_checkpoint_content(tmp_path / "last.pth.tar")["config"]["residual"] == "signed"
    detector = load(str(tmp_path / "last.pth.tar"), device="cpu")
    residual = detector.residual(f"{training_files}/real/0.png")[0]
    assert residual.min() < 0 < residual.max()


def test_a_residual_option_that_contradicts_the_checkpoint_is_refused(training_files, tmp_path):
    run_training(make_arguments_of_train_detector(training_files, tmp_path, "--fixed-sr --epochs 1"))
    with expect_user_error("--residual", "signed", "absolute"):
        load(str(tmp_path / "last.pth.tar"), device="cpu", options={"residual": "signed"})


@pytest.mark.parametrize(("arguments", "word"), [({"window": 31}, "even"), ({"neighbourhood": 4}, "odd")])
def test_the_spectrum_classifier_refuses_an_odd_window_and_an_even_neighbourhood(arguments, word):
    with expect_user_error(word):
        SpectrumClassifier(3, **arguments)
