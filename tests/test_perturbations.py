"""Each perturbation is measured on pictures made so that its strength can be read off the result."""

import io
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from data import perturbations as P
from data.images import DataError, ImageDataset, Item, SizePolicy

# Table K.1 of the JPEG standard, the luminance table libjpeg scales by quality, in rows.
ANNEX_K_LUMINANCE = [
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55,
    14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87, 80, 62,
    18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92,
    49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99,
]  # fmt: skip


def images(n, height=16, width=16, seed=0):
    """n different random images, each uint8 (3, height, width)."""
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.integers(0, 256, (3, height, width), np.uint8)) for _ in range(n)]


def grey(value, side=128):
    return torch.full((3, side, side), value, dtype=torch.uint8)


def changed(image, result):
    return not torch.equal(image, result)


def jpeg_quality(data):
    """The quality libjpeg's rule gives a file's luminance table."""
    table = Image.open(io.BytesIO(data)).quantization[0]
    for quality in range(1, 101):
        scale = 5000 // quality if quality < 50 else 200 - 2 * quality
        if [min(max((v * scale + 50) // 100, 1), 255) for v in ANNEX_K_LUMINANCE] == table:
            return quality
    raise AssertionError(f"not a table of libjpeg's: {table}")


@pytest.fixture
def written(monkeypatch):
    """The JPEG files that perturb writes on its way."""
    files = []
    encode = P.encode_jpeg
    monkeypatch.setattr(P, "encode_jpeg", lambda *args: files.append(encode(*args)) or files[-1])
    return files


# --- JPEG ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quality", [1, 10, 30, 49, 50, 75, 95, 100])
def test_jpeg_quality_reads_back_from_the_quantisation_table(quality):
    assert jpeg_quality(P.encode_jpeg(images(1)[0], quality)) == quality


def test_sweep_jpeg_has_the_quality_it_says(written):
    image = images(1, 24, 40)[0]
    for cell in P.cells("sweep", "jpeg"):
        result = P.perturb(image, cell.name, "sweep", 0, cell.strength)
        assert result.shape == image.shape and result.dtype == torch.uint8
    assert [jpeg_quality(data) for data in written] == [100, 90, 80, 70, 60, 50, 40, 30]


def test_intended_jpeg_draws_quality_10_to_75(written):
    for image in images(600):
        P.perturb(image, "jpeg", "frank2020", 1)
    qualities = [jpeg_quality(data) for data in written]
    assert (min(qualities), max(qualities)) == (10, 75)
    assert np.mean(qualities) == pytest.approx(42.5, abs=4)


def test_released_jpeg_is_quality_95_with_red_and_blue_swapped(written):
    red = torch.zeros(3, 16, 16, dtype=torch.uint8)
    red[0, ::2] = 255
    red[0, 0, :8] = torch.arange(8)
    for seed in range(20):
        result = P.perturb(red, "jpeg", "frank2020-released", seed)
        if changed(red, result):
            break
    assert {jpeg_quality(data) for data in written} == {95}
    stored = np.array(Image.open(io.BytesIO(written[-1])).convert("RGB"), dtype=float).mean((0, 1))
    assert stored[2] > 5 * stored[0]  # in the file, red lies where blue should be ...
    assert result[0].float().mean() > 5 * result[2].float().mean()  # ... and comes back as red


# --- blur ---------------------------------------------------------------------------------------------------


def spread(line):
    """Standard deviation of the positions, weighted by the values, and their sum."""
    x = torch.arange(len(line), dtype=torch.float64)
    weight = line.double()
    mean = (weight * x).sum() / weight.sum()
    return float(((weight * (x - mean) ** 2).sum() / weight.sum()).sqrt()), float(weight.sum())


def impulse(side=65):
    x = torch.zeros(3, side, side)
    x[:, side // 2, side // 2] = 1
    return x


@pytest.mark.parametrize("sigma", [1.0, 2.0, 3.0, 4.0])
def test_sweep_blur_spreads_an_edge_by_its_sigma(sigma):
    edge = torch.zeros(3, 64, 128, dtype=torch.uint8)
    edge[:, :, 64:] = 255
    across = P.perturb(edge, "blur", "sweep", 0, sigma)[0, 32].double().diff()  # the line spread function
    down = P.perturb(edge.mT.contiguous(), "blur", "sweep", 0, sigma)[0, :, 32].double().diff()
    assert spread(across) == pytest.approx((sigma, 255), rel=0.02)
    assert spread(down) == pytest.approx((sigma, 255), rel=0.02)


@pytest.mark.parametrize("kernel_size, sigma", [(3, 0.8), (5, 1.1), (7, 1.4), (9, 1.7), (9, 4.0), (3, 4.0)])
def test_blur_is_the_gaussian_cut_off_at_the_kernel(kernel_size, sigma):
    assert sigma == 4.0 or P.sigma_of_kernel(kernel_size) == pytest.approx(sigma)
    x = np.arange(kernel_size) - kernel_size // 2
    kernel = np.exp(-(x**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    result = P.blur(impulse(), kernel_size, sigma)  # (3, 65, 65)
    half = kernel_size // 2
    patch = result[1, 32 - half : 33 + half, 32 - half : 33 + half].numpy()
    np.testing.assert_allclose(patch, np.outer(kernel, kernel), atol=1e-6)
    assert result.sum() == pytest.approx(3, rel=1e-5)


def test_blur_reflects_without_repeating_the_border():
    line = torch.zeros(3, 5, 5)
    line[:, :, 1] = 1.0
    one_sided = P.blur(line, 3, 1.0)[0, 2]
    kernel = np.exp(-0.5) / (1 + 2 * np.exp(-0.5))
    assert one_sided[0] == pytest.approx(2 * kernel, rel=1e-5)  # column 1 counts from both sides of column 0


def test_frank_blur_draws_its_four_kernels(monkeypatch):
    drawn = Counter()
    monkeypatch.setattr(P, "blur", lambda image, k, sigma: drawn.update([(k, round(sigma, 3))]) or image)
    for image in images(200):
        P.perturb(image, "blur", "frank2020", 0)
    assert set(drawn) == {(3, 0.8), (5, 1.1), (7, 1.4), (9, 1.7)}
    drawn.clear()
    for image in images(200):
        P.perturb(image, "blur", "frank2020-released", 0)
    assert set(drawn) == {(3, 4.0), (5, 4.0), (7, 4.0), (9, 4.0)}


def test_blur_of_an_image_smaller_than_the_kernel():
    image = images(1, 3, 7)[0]
    assert P.perturb(image, "blur", "sweep", 0, 4.0).shape == image.shape


# --- noise --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("std", [0.05, 0.1, 0.15, 0.2, 0.25])
def test_sweep_noise_has_its_standard_deviation(std):
    result = P.perturb(grey(128), "noise", "sweep", 0, std).double()
    normal = 128 + 255 * std * np.random.default_rng(1).standard_normal(10**6)
    assert result.std() == pytest.approx(np.clip(normal, 0, 255).std(), rel=0.02)  # the strong ones are clipped
    assert result.mean() == pytest.approx(128, abs=1)
    if std <= 0.1:
        assert result.std() == pytest.approx(255 * std, rel=0.02)


def test_sweep_noise_scales_one_field_up():
    weak, strong = (P.perturb(grey(128), "noise", "sweep", 0, std).double() - 128 for std in (0.05, 0.1))
    assert torch.corrcoef(torch.stack([weak.flatten(), strong.flatten()]))[0, 1] > 0.99


def noises(protocol, value=128, n=80):
    results = [P.perturb(grey(value, 64), "noise", protocol, seed).double() for seed in range(n)]
    return [r for r in results if (r != value).any()]


def test_intended_noise_draws_the_variance():
    variances = [float(r.var()) - 1 / 12 for r in noises("frank2020")]  # rounding adds 1/12
    assert 4.8 < min(variances) < 7 and 18 < max(variances) < 20.6
    assert np.mean([r.mean() for r in noises("frank2020")]) == pytest.approx(128, abs=0.05)


def test_released_noise_draws_the_standard_deviation_and_cuts_to_whole_numbers():
    results = noises("frank2020-released")
    stds = [float(r.std()) for r in results]
    assert 4.9 < min(stds) < 7 and 18 < max(stds) < 20.5
    assert np.mean([r.mean() for r in results]) == pytest.approx(127.5, abs=0.1)
    assert min(r.min() for r in noises("frank2020-released", 255)) > 120  # clipped: white never wraps to black


# --- crop, resize -------------------------------------------------------------------------------------------


def coordinates(height=256, width=256):
    """Red is the column and green the row, in 256ths of the side."""
    x = torch.zeros(3, height, width)
    x[0] = torch.arange(width) * 256 / width
    x[1] = torch.arange(height)[:, None] * 256 / height
    return x.round().clamp(0, 255).to(torch.uint8)


def measured_share(result, channel):
    """Share cut off, from the slope of the coordinate, and the shares cut off at the two ends."""
    line = result[channel].double().mean(channel)  # along the coordinate: columns in red, rows in green
    inner = line[16:-16]
    slope = float((inner[-1] - inner[0]) / (len(inner) - 1) * len(line) / 256)
    return 1 - slope, float(line[0]) / 256, 1 - float(line[-1] + 1) / 256


@pytest.mark.parametrize("size", [(256, 256), (128, 384)])
@pytest.mark.parametrize("share", [0.05, 0.1, 0.2])
def test_crop_cuts_half_from_each_side_and_keeps_the_size(size, share):
    result = P.crop(coordinates(*size), share)
    assert result.shape == (3, *size)
    for channel in (0, 1):
        total, begin, end = measured_share(result, channel)
        assert total == pytest.approx(share, abs=0.02)
        assert begin == pytest.approx(share / 2, abs=0.01) and end == pytest.approx(share / 2, abs=0.015)


@pytest.mark.parametrize("protocol", ["frank2020", "frank2020-released"])
def test_crop_share_is_between_5_and_20_percent(protocol):
    image = coordinates()
    results = [P.perturb(image, "crop", protocol, seed) for seed in range(60)]
    shares = [measured_share(r, 0)[0] for r in results if changed(image, r)]
    assert 0.03 < min(shares) < 0.09 and 0.16 < max(shares) < 0.21


def test_released_crop_refuses_what_is_not_square():
    for name in ("crop", "combined"):
        with pytest.raises(DataError, match="square images, got 24x16.*frank2020"):
            P.perturb(images(1, 16, 24)[0], name, "frank2020-released", 0)


def test_resize_halves_the_bandwidth_and_keeps_the_size():
    x = torch.arange(64)
    fine = (128 + 100 * torch.cos(torch.pi * x * 0.9)).to(torch.uint8).expand(3, 64, 64).contiguous()  # near Nyquist
    coarse = (128 + 100 * torch.cos(torch.pi * x * 0.1)).to(torch.uint8).expand(3, 64, 64).contiguous()
    after = [P.perturb(image, "resize", "sweep", 0, 0.5) for image in (fine, coarse)]
    assert after[0].shape == fine.shape
    assert after[0][:, 8:-8, 8:-8].float().std() < 0.1 * fine.float().std()
    assert after[1].float().std() == pytest.approx(float(coarse.float().std()), rel=0.1)
    assert P.perturb(images(1, 5, 9)[0], "resize", "sweep", 0, 0.5).shape == (3, 5, 9)


# --- protocols ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["frank2020", "frank2020-released"])
@pytest.mark.parametrize("name", ["blur", "crop", "jpeg", "noise"])
def test_half_of_the_images_are_perturbed(protocol, name):
    share = np.mean([changed(i, P.perturb(i, name, protocol, 3)) for i in images(400, 48, 48)])
    assert share == pytest.approx(0.5, abs=0.08)


def test_intended_combination_is_several_at_once(monkeypatch):
    sets = Counter()
    for image in images(320):
        done = []
        monkeypatch.setattr(P, "_intended", lambda image, name, rng, done=done: done.append(name) or image)
        P.perturb(image, "combined", "frank2020", 0)
        assert done == [n for n in P.COMBINED_ORDER if n in done]  # always in the same order, JPEG last
        sets[tuple(done)] += 1
    assert len(sets) == 16 and max(sets.values()) < 45  # every subset, about 20 times


def test_released_combination_is_one_of_four_by_the_pixels(monkeypatch):
    """A round robin over the images' own keys: whatever the order, the seed and the number of images."""
    pictures, taken = images(200, 8, 8), []
    monkeypatch.setattr(P, "add_noise", None)  # theirs is another noise
    for name in ("blur", "crop", "jpeg"):
        monkeypatch.setattr(P, name, lambda image, *_, name=name: taken.append(name) or image)
    chosen = {}
    for seed in range(12):
        for i, image in enumerate(pictures):
            taken.clear()
            result = P.perturb(image, "combined", "frank2020-released", seed)
            if taken or changed(image, result):
                chosen.setdefault(i, set()).add(taken[0] if taken else "noise")
    assert len(chosen) == 200 and all(len(names) == 1 for names in chosen.values())  # p = 0.5 never missed 12 times
    wanted = {i: P.RELEASED_ROUND_ROBIN[P.pixel_key(image) % 4] for i, image in enumerate(pictures)}
    assert {i: names.pop() for i, names in chosen.items()} == wanted
    assert min(Counter(wanted.values()).values()) > 30


def test_cells():
    assert [c.label for c in P.cells("frank2020")] == ["none", "blur", "crop", "jpeg", "noise", "combined"]
    sweep = P.cells("sweep")
    assert len(sweep) == 1 + 5 + 8 + 5 + 1 and sweep[0].name == "none"
    assert "jpeg quality 30" in [c.label for c in sweep]
    assert {c.name for c in sweep} | {c.name for c in P.cells("frank2020")} == set(P.NAMES)
    assert P.cells("sweep", "none") == [P.Cell("none", None)]
    image = images(1)[0]
    for protocol in P.PROTOCOLS:
        for name, strength in P.cells(protocol):
            result = P.perturb(image, name, protocol, 0, strength)
            assert result.shape == image.shape and result.dtype == torch.uint8


@pytest.mark.parametrize(
    "name, protocol, strength, words",
    [
        ("smear", "sweep", None, "no perturbation 'smear'"),
        ("crop", "sweep", None, "crop is in frank2020 and frank2020-released"),
        ("resize", "frank2020", None, "resize is in sweep"),
        ("jpeg", "frank", None, "one of frank2020"),
        ("jpeg", "sweep", None, "strength"),
        ("jpeg", "frank2020", 50, "strength"),
        ("jpeg", "sweep", 0, "1 to 100"),
        ("resize", "sweep", 2, "0.001 to 1"),
    ],
)
def test_mistakes_are_told_in_one_line(name, protocol, strength, words):
    with pytest.raises(DataError, match=words) as caught:
        P.perturb(images(1)[0], name, protocol, 0, strength)
    assert "\n" not in str(caught.value)


# --- the result depends on the file, the protocol and the seed alone ----------------------------------------


class Pictures(Dataset):
    def __init__(self, pictures, transform):
        self.pictures, self.transform = pictures, transform

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, index):
        return self.transform(self.pictures[index], f"{index}.png", np.random.default_rng())


ALL_CELLS = [(p, *c) for p in P.PROTOCOLS for c in P.cells(p) if c.strength in (None, 50.0, 0.1, 2.0, 0.5)]


@pytest.mark.parametrize("protocol, name, strength", ALL_CELLS)
def test_order_and_place_change_nothing(protocol, name, strength):
    pictures = images(12)
    forward = [P.perturb(i, name, protocol, 7, strength) for i in pictures]
    backward = [P.perturb(i.clone(), name, protocol, 7, strength) for i in reversed(pictures)]
    assert all(torch.equal(a, b) for a, b in zip(forward, reversed(backward), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(pictures, images(12), strict=True))  # the input is left alone


def test_workers_batches_and_threads_change_nothing():
    pictures = images(9, 32, 32)
    transform = pickle.loads(pickle.dumps(P.PerturbTransform("combined", "frank2020", 5)))
    one = list(DataLoader(Pictures(pictures, transform), batch_size=None))
    two = torch.cat(list(DataLoader(Pictures(pictures, transform), batch_size=4, num_workers=2)))
    assert torch.equal(torch.stack([torch.as_tensor(i) for i in one]), two)
    assert any(changed(a, b) for a, b in zip(pictures, one, strict=True))


def test_seed_protocol_and_pixels_change_the_draw():
    image, other = images(2, 32, 32)
    results = {
        P.perturb(i, "noise", "sweep", seed, 0.1).sub(i).numpy().tobytes() for i in (image, other) for seed in (0, 1)
    }
    assert len(results) == 4
    flips = [[changed(i, P.perturb(i, "jpeg", p, 0)) for i in images(64)] for p in P.PROTOCOLS[:2]]
    assert flips[0] != flips[1]
    assert P.pixel_key(grey(1, 4)) != P.pixel_key(grey(1, 4).reshape(3, 2, 8))


# --- training augmentation ----------------------------------------------------------------------------------


def test_augment_is_a_function_of_the_rng(monkeypatch):
    image = images(1, 32, 32)[0]
    transform = pickle.loads(pickle.dumps(P.AugmentTransform()))
    a, b = (transform(image, "x.png", np.random.default_rng([1, 2, 3])) for _ in range(2))
    assert torch.equal(a, b)
    drawn = Counter()
    monkeypatch.setattr(P, "_intended", lambda image, name, rng: drawn.update([name]) or image)
    rng = np.random.default_rng(0)
    for _ in range(400):
        P.augment(image, rng)
    assert sum(drawn.values()) == pytest.approx(200, abs=35)
    assert set(drawn) == {"blur", "crop", "jpeg", "noise"} and min(drawn.values()) > 25
    assert P.augment(image, rng, p=0) is image


def test_augmented_training_images_depend_on_seed_epoch_and_index_alone(tmp_path):
    """Half of them are perturbed, others in each epoch; crop and flip are those of a training without it."""
    items = []
    for i, image in enumerate(images(24, 16, 16)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
        items.append(Item(str(tmp_path / f"{i}.png"), i % 2, ""))
    policy = SizePolicy(4, crop_size=12, random_crop=True)

    def epoch(n, seed=3, perturb=True, order=1):
        transform = P.AugmentTransform() if perturb else None
        dataset = ImageDataset(items, policy, flip=True, seed=seed, transform=transform)
        return [dataset[n, i].image for i in range(24)[::order]][::order]

    plain = epoch(0, perturb=False)
    perturbed = [[changed(a, b) for a, b in zip(epoch(n, perturb=False), epoch(n), strict=True)] for n in range(4)]
    assert all(torch.equal(a, b) for a, b in zip(epoch(0), epoch(0, order=-1), strict=True))
    assert np.mean(perturbed) == pytest.approx(0.5, abs=0.15) and perturbed[0] != perturbed[1]
    assert any(changed(a, b) for a, b in zip(epoch(0), epoch(0, seed=4), strict=True))
    assert all(torch.equal(plain[i], epoch(0)[i]) for i in range(24) if not perturbed[0][i])


def test_transform_refuses_a_wrong_name_at_once():
    with pytest.raises(DataError):
        P.PerturbTransform("blurr", "frank2020", 0)
