"""Each perturbation is measured on pictures made so that its strength can be read off the result."""

import io
from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
from files import mistake
from PIL import Image

from data import perturbations as P
from utils.random_streams import seeded_generator

KERNELS = {3: 0.8, 5: 1.1, 7: 1.4, 9: 1.7}  # of Frank et al., with the sigma OpenCV takes for each


def perturb(image, name, protocol, seed, strength=None):
    return P.Perturbation(P.Cell(name, strength), protocol, seed)(image)


def cells(protocol, name="all"):
    return P.select_perturbations(protocol, [(name, None)])


def images(n, height=16, width=16):
    """n different random images, each uint8 (3, height, width)."""
    rng = np.random.default_rng(0)
    return [torch.from_numpy(rng.integers(0, 256, (3, height, width), np.uint8)) for _ in range(n)]


def grey(value, side=128):
    return torch.full((3, side, side), value, dtype=torch.uint8)


def gradient(height=256, width=256):
    """Red is the column and green the row, in 256ths of the side."""
    x = torch.zeros(3, height, width)
    x[0] = torch.arange(width) * 256 / width
    x[1] = torch.arange(height)[:, None] * 256 / height
    return x.round().clamp(0, 255).to(torch.uint8)


def blurred(image, kernel_size, sigma):
    """By NumPy: weights of the Gaussian, border reflected without repeating its pixel. float (3, H, W)."""
    half = kernel_size // 2
    kernel = np.exp(-(np.arange(-half, half + 1) ** 2) / (2 * sigma**2))
    padded = np.pad(image.numpy().astype(float), ((0, 0), (half, half), (half, half)), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (kernel_size, kernel_size), (1, 2))
    return np.einsum("chwij,i,j->chw", windows, kernel, kernel) / kernel.sum() ** 2


def compressed(image, quality):
    """By Pillow, through a file of that quality."""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality, subsampling="4:2:0")
    return np.asarray(Image.open(file)).transpose(2, 0, 1)


def shares_cut(result, channel):
    """Of a gradient: share cut off in all, by its slope, and at either end."""
    line = result[channel].double().mean(channel)  # along the gradient: columns in red, rows in green
    inner = line[16:-16]
    slope = float((inner[-1] - inner[0]) / (len(inner) - 1) * len(line) / 256)
    return 1 - slope, float(line[0]) / 256, 1 - float(line[-1] + 1) / 256


def diagnosis(image, result):
    """Which of Frank's perturbations made `result` of a random image, and how strong it was."""
    if torch.equal(image, result):
        return "none", None
    if (image.double() - result.double()).std() < 6:
        return "noise", None
    for kernel_size, sigma in KERNELS.items():
        if np.abs(blurred(image, kernel_size, sigma) - result.numpy()).max() < 0.51:
            return "blur", kernel_size
    return next((("jpeg", q) for q in range(1, 101) if np.array_equal(compressed(image, q), result)), ("crop", None))


@pytest.mark.parametrize("kernel_size, sigma", [*KERNELS.items(), (9, 4.0), (3, 4.0)])
def test_blur_is_the_gaussian_cut_off_at_the_kernel(kernel_size, sigma):
    image = images(1, 40, 48)[0]
    assert np.abs(P.blur(image, kernel_size, sigma).numpy() - blurred(image, kernel_size, sigma)).max() < 0.501
    assert np.abs(perturb(image, "blur", "sweep", 0, sigma).numpy() - blurred(image, 51, sigma)).max() < 0.51
    assert perturb(images(1, 3, 7)[0], "blur", "sweep", 0, sigma).shape == (3, 3, 7)  # smaller than the kernel


@pytest.mark.parametrize("std", [0.05, 0.1, 0.15, 0.2, 0.25])
def test_sweep_noise_has_its_standard_deviation(std):
    noise = perturb(grey(128), "noise", "sweep", 0, std).double()
    normal = 128 + 255 * std * np.random.default_rng(1).standard_normal(10**6)
    assert noise.std() == pytest.approx(np.clip(normal, 0, 255).std(), rel=0.02)  # the strong ones are clipped
    assert noise.mean() == pytest.approx(128, abs=1)
    weak = perturb(grey(128), "noise", "sweep", 0, 0.05).double()  # a sweep scales one field up
    assert torch.corrcoef(torch.stack([noise.flatten(), weak.flatten()]))[0, 1] > 0.97


@pytest.mark.parametrize("size", [(256, 256), (128, 384)])
@pytest.mark.parametrize("share", [0.05, 0.1, 0.2])
def test_crop_cuts_half_from_each_side_and_keeps_the_size(size, share):
    result = P.crop(gradient(*size), share)
    assert result.shape == (3, *size)
    for channel in (0, 1):
        total, begin, end = shares_cut(result, channel)
        assert total == pytest.approx(share, abs=0.02)
        assert begin == pytest.approx(share / 2, abs=0.01) and end == pytest.approx(share / 2, abs=0.015)


def test_resize_halves_the_bandwidth_and_keeps_the_size():
    waves = [128 + 100 * torch.cos(torch.pi * torch.arange(64) * f).expand(3, 64, 64) for f in (0.9, 0.1)]  # of Nyquist
    fine, coarse = (perturb(w.to(torch.uint8), "resize", "sweep", 0, 0.5).float() for w in waves)
    assert fine[:, 8:-8, 8:-8].std() < 0.1 * waves[0].std()
    assert coarse.std() == pytest.approx(float(waves[1].std()), rel=0.1)
    assert perturb(images(1, 5, 9)[0], "resize", "sweep", 0, 0.5).shape == (3, 5, 9)


def test_jpeg_has_the_quality_it_says_and_mild_variants_are_of_the_sweep():
    image = images(1, 24, 40)[0]
    for cell in cells("sweep", "jpeg"):
        assert np.array_equal(perturb(image, "jpeg", "sweep", 0, cell.strength), compressed(image, int(cell.strength)))
    variants = P.mild_variants(image)
    assert list(variants) == ["jpeg quality 90", "resize x0.9 and back"]
    assert np.array_equal(variants["jpeg quality 90"], compressed(image, 90))
    assert torch.equal(variants["resize x0.9 and back"], perturb(image, "resize", "sweep", 0, 0.9))


def test_frank_perturbs_half_of_the_images_at_its_strengths():
    found = {n: [diagnosis(i, perturb(i, n, "frank2020", 3)) for i in images(300)] for n in ("blur", "jpeg", "noise")}
    for name, diagnoses in found.items():
        counts = Counter(n for n, _ in diagnoses)
        assert set(counts) == {name, "none"} and counts[name] == pytest.approx(150, abs=30)
    assert {k for n, k in found["blur"] if n == "blur"} == set(KERNELS)
    qualities = [q for n, q in found["jpeg"] if n == "jpeg"]
    assert 10 <= min(qualities) < 14 and 71 < max(qualities) <= 75
    assert np.mean(qualities) == pytest.approx(42.5, abs=5)
    noise = [perturb(grey(128, 64), "noise", "frank2020", seed).double() for seed in range(80)]
    variances = [float(r.var()) - 1 / 12 for r in noise if (r != 128).any()]  # rounding adds 1/12
    assert 4.8 < min(variances) < 7 and 18 < max(variances) < 20.6 and 25 < len(variances) < 55
    shares = [shares_cut(perturb(gradient(), "crop", "frank2020", seed), 0)[0] for seed in range(80)]
    shares = [share for share in shares if share > 0.02]
    assert 0.03 < min(shares) < 0.09 and 0.16 < max(shares) < 0.21 and 25 < len(shares) < 55


def test_frank_combines_several_independently():
    untouched = sum(torch.equal(i, perturb(i, "combined", "frank2020", 0)) for i in images(480, 40, 40))
    assert untouched == pytest.approx(480 / 2**4, abs=16)
    pairs = Counter()
    for seed in range(120):
        result = perturb(gradient(128, 128), "combined", "frank2020", seed)
        pairs[shares_cut(result, 0)[0] > 0.035, bool(result[2].float().std() > 0.6)] += 1  # no blue: noise or JPEG
    assert [pairs[key] for key in product([True, False], repeat=2)] == pytest.approx([45, 15, 45, 15], abs=14)


def test_cells():
    assert [c.label for c in cells("frank2020")] == ["none", "blur", "crop", "jpeg", "noise", "combined"]
    sweep = cells("sweep")
    assert Counter(c.name for c in sweep) == {"none": 1, "blur": 4, "jpeg": 8, "noise": 5, "resize": 1}
    assert {c.name for c in sweep} | {c.name for c in cells("frank2020")} == set(P.NAMES)
    assert cells("sweep", "none") == cells("frank2020", "none") == [P.Cell("none", None)]
    jpeg = P.Cell("jpeg", 70.0)
    assert P.select_perturbations("sweep", [("jpeg", 70.0), ("none", None), ("jpeg", 70.0)]) == [jpeg, P.Cell("none")]
    assert (jpeg.label, jpeg.file_name, jpeg.kind.axis) == ("jpeg quality 70", "jpeg_quality_70", "quality")
    assert jpeg.kind.smaller_is_harder and not P.Cell("blur").kind.smaller_is_harder
    assert P.Cell("of another program", 2.0).label == "of another program 2"


@pytest.mark.parametrize(
    "protocol, name, strength, words",
    [
        ("sweep", "smear", None, ["'smear'", "resize"]),
        ("sweep", "crop", None, ["'crop'", "--perturb-protocol"]),
        ("sweep", "jpeg", 71.0, ["jpeg=71", "100, 90"]),
        ("frank2020", "jpeg", 50.0, ["jpeg=50", "not chosen"]),
    ],
)
def test_mistakes(protocol, name, strength, words):
    with mistake(*words):
        P.select_perturbations(protocol, [(name, strength)])


@pytest.mark.parametrize("protocol", ["frank2020", "sweep"])
def test_order_place_and_generators_change_nothing(protocol):
    pictures = images(8, 32, 32)
    for cell in cells(protocol):
        transform = P.Perturbation(cell, protocol, 7)
        forward = [transform(i) for i in pictures]
        backward = [transform(i.clone(), np.random.default_rng()) for i in pictures[::-1]][::-1]
        assert torch.equal(torch.stack(forward), torch.stack(backward))
        assert torch.equal(torch.stack(pictures), torch.stack(images(8, 32, 32)))  # the input is left alone
        changed = [not torch.equal(*pair) for pair in zip(pictures, forward, strict=True)]
        assert all(changed) if protocol == "sweep" and cell.name != "none" else not all(changed)


def test_seed_and_pixels_change_the_draw():
    noise = [perturb(i, "noise", "sweep", seed, 0.1).sub(i) for i in images(2, 32, 32) for seed in (0, 1)]
    assert len({n.numpy().tobytes() for n in noise}) == 4


def test_augment_takes_one_of_four_half_the_time_as_its_generator_says():
    counts = Counter()
    for n, image in enumerate(images(400, 40, 40)):
        result = P.augment(image, seeded_generator(1, n))
        counts[diagnosis(image, result)[0]] += 1
        assert torch.equal(result, P.augment(image, seeded_generator(1, n)))
    assert counts.pop("none") == pytest.approx(200, abs=35)
    assert set(counts) == {"blur", "crop", "jpeg", "noise"} and min(counts.values()) > 25
