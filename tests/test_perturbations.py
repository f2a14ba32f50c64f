"""Tests of data.perturbations, many of which measure the strength of a perturbation in the perturbed image."""

import io
from collections import Counter

import numpy as np
import pytest
import torch
from files import expect_user_error
from PIL import Image

from data import perturbations
from data.perturbations import (
    Perturbation,
    PerturbationSetting,
    list_perturbation_settings,
    perturb_at_random,
    select_perturbations,
)
from utils.random_streams import seeded_generator

FRANK_KERNELS = {3: 0.8, 5: 1.1, 7: 1.4, 9: 1.7}  # blur of Frank et al.: kernel size -> standard deviation (pixels)


def perturb_image(image, name, protocol, seed, strength=None):
    """Apply a perturbation of the protocol `protocol` ("frank2020" or "sweep") to an image."""
    return Perturbation(PerturbationSetting(name, strength), protocol, seed)(image)


def random_images(count, height=16, width=16):
    """Return `count` different random images, each uint8 (3, height, width)."""
    rng = np.random.default_rng(0)
    return [torch.from_numpy(rng.integers(0, 256, (3, height, width), np.uint8)) for _ in range(count)]


def grey_image(side=128):
    """Return a square image whose pixel values are all 128."""
    return torch.full((3, side, side), 128, dtype=torch.uint8)


def image_with_red_and_green_ramps(height=256, width=256):
    """Return an image with a horizontal ramp from 0 to 255 in red and a vertical ramp from 0 to 255 in green."""
    x = torch.zeros(3, height, width)
    x[0] = torch.arange(width) * 256 / width
    x[1] = torch.arange(height)[:, None] * 256 / height
    return x.round().clamp(0, 255).to(torch.uint8)


def blur_with_numpy(image, kernel_size, sigma):
    """Blur an image, padded by reflection, with a two-dimensional Gaussian kernel, and return float (3, H, W)."""
    radius = kernel_size // 2
    kernel = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    kernel /= kernel.sum()
    padded = np.pad(image.numpy().astype(float), ((0, 0), (radius, radius), (radius, radius)), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (kernel_size, kernel_size), (1, 2))
    return np.einsum("chwij,i,j->chw", windows, kernel, kernel)


def compress_and_decode_jpeg_with_pillow(image, quality):
    """Compress an image as JPEG with Pillow, and return the decoded image."""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality, subsampling="4:2:0")
    return np.asarray(Image.open(file)).transpose(2, 0, 1)


def measure_fractions_cropped_at_borders(result, channel):
    """Measure how much of the width (channel 0) or height (1) of `image_with_red_and_green_ramps` was cropped away.

    Returns the cropped fractions of the width or height: in total, at the left or top, and at the right or bottom.
    """
    line = result[channel].double().mean(channel)
    inner = line[16:-16]
    slope = float((inner[-1] - inner[0]) / (len(inner) - 1) * len(line) / 256)
    return 1 - slope, float(line[0]) / 256, 1 - float(line[-1] + 1) / 256


def recognise_perturbation(image, result):
    """Return name and strength of the perturbation of Frank et al. that has changed a random image into `result`."""
    if torch.equal(image, result):
        return "none", None
    if (image.double() - result.double()).std() < 6:
        return "noise", None
    for kernel_size, sigma in FRANK_KERNELS.items():
        if np.abs(blur_with_numpy(image, kernel_size, sigma) - result.numpy()).max() < 0.51:
            return "blur", kernel_size
    for quality in range(1, 101):
        if np.array_equal(compress_and_decode_jpeg_with_pillow(image, quality), result):
            return "jpeg", quality
    return "crop", None


# --- each perturbation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel_size, sigma", [*FRANK_KERNELS.items(), (9, 4.0), (3, 4.0)])
def test_blur_equals_a_gaussian_in_two_dimensions(kernel_size, sigma):
    (image,) = random_images(1, 40, 48)
    result = perturbations.blur_image(image, kernel_size, sigma).numpy()
    assert np.abs(result - blur_with_numpy(image, kernel_size, sigma)).max() < 0.501
    swept = perturb_image(image, "blur", "sweep", 0, sigma).numpy()
    assert np.abs(swept - blur_with_numpy(image, 51, sigma)).max() < 0.51


def test_images_smaller_than_the_kernel_can_be_blurred():
    for height, width in ((3, 7), (1, 1)):
        assert perturb_image(random_images(1, height, width)[0], "blur", "sweep", 0, 4.0).shape == (3, height, width)


@pytest.mark.parametrize("std", [0.05, 0.1, 0.15, 0.2, 0.25])
def test_noise_of_the_sweep_protocol_has_the_given_standard_deviation(std):
    noisy = perturb_image(grey_image(), "noise", "sweep", 0, std).double()
    expected = 128 + 255 * std * np.random.default_rng(1).standard_normal(10**6)
    # The perturbation clips pixel values to 0 to 255, so the expected values are also clipped
    assert noisy.std() == pytest.approx(np.clip(expected, 0, 255).std(), rel=0.02)
    assert noisy.mean() == pytest.approx(128, abs=1)


def test_noise_of_different_strengths_is_one_pattern_with_different_amplitudes():
    weak, strong = (perturb_image(grey_image(), "noise", "sweep", 0, std).double() for std in (0.05, 0.2))
    assert torch.corrcoef(torch.stack([weak.flatten(), strong.flatten()]))[0, 1] > 0.97


@pytest.mark.parametrize("size", [(256, 256), (128, 384)])
@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.2])
def test_crop_cuts_half_of_the_fraction_at_each_border_and_keeps_the_image_size(size, fraction):
    result = perturbations.crop_and_enlarge(image_with_red_and_green_ramps(*size), fraction)
    assert result.shape == (3, *size)
    for channel in (0, 1):
        total, begin, end = measure_fractions_cropped_at_borders(result, channel)
        assert total == pytest.approx(fraction, abs=0.02)
        assert begin == pytest.approx(fraction / 2, abs=0.01)
        assert end == pytest.approx(fraction / 2, abs=0.015)


def test_resize_removes_fine_detail_and_keeps_the_image_size():
    columns = torch.arange(64)
    fine, coarse = (
        (128 + 100 * torch.cos(torch.pi * columns * frequency)).expand(3, 64, 64).to(torch.uint8)
        for frequency in (0.9, 0.1)  # frequencies as fractions of the Nyquist frequency
    )
    fine_result, coarse_result = (perturb_image(x, "resize", "sweep", 0, 0.5).float() for x in (fine, coarse))
    assert fine_result[:, 8:-8, 8:-8].std() < 0.1 * fine.float().std()
    assert coarse_result.std() == pytest.approx(float(coarse.float().std()), rel=0.1)
    assert perturb_image(random_images(1, 5, 9)[0], "resize", "sweep", 0, 0.5).shape == (3, 5, 9)


def test_jpeg_compression_of_the_sweep_protocol_has_the_given_quality():
    (image,) = random_images(1, 24, 40)
    for _, quality in select_perturbations("sweep", [("jpeg", None)]):
        assert np.array_equal(
            perturb_image(image, "jpeg", "sweep", 0, quality), compress_and_decode_jpeg_with_pillow(image, int(quality))
        )


# --- the protocol of Frank et al. ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["blur", "jpeg", "noise"])
def test_the_frank2020_protocol_perturbs_half_of_the_images(name):
    recognised = [
        recognise_perturbation(image, perturb_image(image, name, "frank2020", 3)) for image in random_images(300)
    ]
    counts = Counter(n for n, _ in recognised)
    assert set(counts) == {name, "none"}
    assert counts[name] == pytest.approx(150, abs=30)
    strengths = [strength for n, strength in recognised if n == name]
    if name == "blur":
        assert set(strengths) == set(FRANK_KERNELS)
    if name == "jpeg":
        assert 10 <= min(strengths) < 14 and 71 < max(strengths) <= 75
        assert np.mean(strengths) == pytest.approx(42.5, abs=5)


def test_noise_of_the_frank2020_protocol_has_a_variance_from_5_to_20():
    results = [perturb_image(grey_image(64), "noise", "frank2020", seed).double() for seed in range(80)]
    variances = [float(r.var()) - 1 / 12 for r in results if (r != 128).any()]  # rounding adds a variance of 1/12
    assert 25 < len(variances) < 55
    assert 4.8 < min(variances) < 7 and 18 < max(variances) < 20.6


def test_crop_of_the_frank2020_protocol_cuts_5_to_20_percent_of_the_image():
    results = [perturb_image(image_with_red_and_green_ramps(), "crop", "frank2020", seed) for seed in range(80)]
    fractions = [measure_fractions_cropped_at_borders(result, 0)[0] for result in results]
    fractions = [fraction for fraction in fractions if fraction > 0.02]
    assert 25 < len(fractions) < 55
    assert 0.03 < min(fractions) < 0.09 and 0.16 < max(fractions) < 0.21


def test_the_frank2020_perturbation_combined_applies_each_perturbation_independently_at_random():
    untouched = sum(torch.equal(i, perturb_image(i, "combined", "frank2020", 0)) for i in random_images(480, 40, 40))
    assert untouched == pytest.approx(480 / 2**4, abs=16)
    counts = Counter()
    for seed in range(120):
        result = perturb_image(image_with_red_and_green_ramps(128, 128), "combined", "frank2020", seed)
        is_cropped = measure_fractions_cropped_at_borders(result, 0)[0] > 0.035
        has_noise_or_jpeg = bool(result[2].float().std() > 0.6)  # the blue channel is 0 before the perturbation
        counts[is_cropped, has_noise_or_jpeg] += 1
    assert counts[True, True] == pytest.approx(45, abs=14) and counts[False, True] == pytest.approx(45, abs=14)
    assert counts[True, False] == pytest.approx(15, abs=14) and counts[False, False] == pytest.approx(15, abs=14)


def test_perturb_at_random_applies_one_of_four_perturbations_to_half_of_the_images():
    counts = Counter()
    for n, image in enumerate(random_images(400, 40, 40)):
        result = perturb_at_random(image, seeded_generator(1, n))
        counts[recognise_perturbation(image, result)[0]] += 1
        assert torch.equal(result, perturb_at_random(image, seeded_generator(1, n)))
    assert counts.pop("none") == pytest.approx(200, abs=35)
    assert set(counts) == {"blur", "crop", "jpeg", "noise"} and min(counts.values()) > 25


# --- choosing perturbations ---------------------------------------------------------------------------------


def test_each_protocol_has_the_documented_perturbations():
    assert [s.label for s in list_perturbation_settings("frank2020")] == [
        "none",
        "blur",
        "crop",
        "jpeg",
        "noise",
        "combined",
    ]
    counts = Counter(s.name for s in list_perturbation_settings("sweep"))
    assert counts.items() >= {"none": 1, "blur": 4, "jpeg": 8, "noise": 5, "resize": 1}.items()
    for protocol in ("frank2020", "sweep"):
        assert select_perturbations(protocol, [("all", None)]) == list_perturbation_settings(protocol)


def test_perturbations_are_selected_in_the_requested_order_without_repetition():
    requested = [("jpeg", 70.0), ("none", None), ("jpeg", 70.0)]
    assert select_perturbations("sweep", requested) == [("jpeg", 70.0), ("none", None)]


def test_a_perturbation_setting_has_a_label_and_a_file_name():
    setting = PerturbationSetting("jpeg", 70.0)
    assert setting.label == "jpeg quality 70" and setting.file_name == "jpeg_quality_70"
    assert setting.sweep.axis == "quality" and setting.sweep.smaller_is_harder
    assert PerturbationSetting("from another program", 2.0).label == "from another program 2"


@pytest.mark.parametrize(
    "protocol, name, strength, words",
    [
        ("sweep", "smear", None, ["'smear'", "resize"]),
        ("sweep", "crop", None, ["'crop'", "--perturb-protocol"]),
        ("sweep", "jpeg", 71.0, ["jpeg=71", "100, 90"]),
        ("frank2020", "jpeg", 50.0, ["jpeg=50", "no strength"]),
    ],
)
def test_an_unknown_perturbation_or_strength_is_refused(protocol, name, strength, words):
    with expect_user_error(*words):
        select_perturbations(protocol, [(name, strength)])


def test_a_perturbation_added_to_the_dict_of_perturbations_can_be_selected(monkeypatch):
    invert = perturbations.Sweep(lambda image, strength, rng: 255 - image, (1.0,))
    monkeypatch.setitem(perturbations.SWEEP, "invert", invert)
    (setting,) = select_perturbations("sweep", [("invert", None)])
    (image,) = random_images(1)
    assert torch.equal(Perturbation(setting, "sweep", 0)(image), 255 - image)


# --- reproducibility ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["frank2020", "sweep"])
def test_perturbed_images_do_not_depend_on_the_order_of_images_or_on_other_random_numbers(protocol):
    images = random_images(8, 32, 32)
    for setting in list_perturbation_settings(protocol):
        transform = Perturbation(setting, protocol, 7)
        forward = [transform(image) for image in images]
        backward = [transform(image.clone(), np.random.default_rng()) for image in reversed(images)]
        assert torch.equal(torch.stack(forward), torch.stack(backward[::-1]))
        assert torch.equal(torch.stack(images), torch.stack(random_images(8, 32, 32)))  # the input images are unchanged
        is_changed = [not torch.equal(a, b) for a, b in zip(images, forward, strict=True)]
        if protocol == "sweep" and setting.name != "none":
            assert all(is_changed)
        else:
            assert not all(is_changed)


def test_perturbed_images_depend_on_the_seed_and_on_the_pixels():
    noise = [perturb_image(i, "noise", "sweep", seed, 0.1).sub(i) for i in random_images(2, 32, 32) for seed in (0, 1)]
    assert len({n.numpy().tobytes() for n in noise}) == 4
