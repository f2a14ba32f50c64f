"""Tests of data.degradations, which degrades images for auxiliary tasks, and patches for train_sr.py."""

import numpy as np
import pytest
import torch
from files import expect_user_error

from data.degradations import (
    TASKS,
    compress_float_image_as_jpeg,
    degrade_batch,
    degrade_patch,
    require_known_auxiliary_task,
    sample_degradation_for_batch,
)

NONE = {"augment": False, "completion": False, "colorization": False}
TRIALS = 800


def make_seeded_numpy_generator(*key):
    """Return a NumPy random generator that is seeded with the integers in `key`."""
    return np.random.default_rng(key)


def random_image(*shape, seed=9):
    """Return a float tensor of the given shape with random pixels in [0.1, 0.9]."""
    values = make_seeded_numpy_generator(seed).random(shape, np.float32)
    return torch.from_numpy(values) * 0.8 + 0.1


def test_the_colorization_task_draws_a_grey_fraction_per_batch_and_a_mask_per_image():
    x = random_image(3, 3, 64, 64)
    grey = x.mean(dim=1, keepdim=True).expand_as(x)
    fractions = []
    for seed in range(60):
        rngs = [make_seeded_numpy_generator(seed, i) for i in range(3)]
        y = degrade_batch(TASKS["colorization"](make_seeded_numpy_generator(seed)), x, rngs)
        changed = (y != x).any(dim=1, keepdim=True).expand_as(x)
        torch.testing.assert_close(y[changed], grey[changed])
        per_image = changed[:, 0].float().mean(dim=(1, 2))
        assert per_image.max() - per_image.min() < 0.05
        assert not torch.equal(changed[0], changed[1])
        fractions.append(per_image.mean().item())
    # The code of the paper's authors draws the fraction of grey pixels from the range 0.1 to 0.25
    assert 0.09 < min(fractions) < 0.125
    assert 0.225 < max(fractions) < 0.26
    assert np.mean(fractions) == pytest.approx(0.175, abs=0.02)


def test_the_denoising_task_adds_gaussian_noise_of_four_grey_levels():
    x = torch.full((2, 3, 64, 64), 0.5)
    noise = (
        degrade_batch(
            TASKS["denoising"](make_seeded_numpy_generator(0)),
            x,
            [make_seeded_numpy_generator(1), make_seeded_numpy_generator(2)],
        )
        - x
    )
    assert noise.std().item() == pytest.approx(4 / 255, rel=0.02)
    assert noise.mean().item() == pytest.approx(0, abs=4e-4)
    beyond_two_std = (noise.abs() > 2 * 4 / 255).float().mean().item()
    # In a normal distribution, 4.55 % of the values are more than two standard deviations away from the mean
    assert beyond_two_std == pytest.approx(0.0455, abs=0.006)
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(noise[0, 0], noise[0, 1])


@pytest.mark.parametrize("task", ["colorization", "denoising"])
def test_the_degradation_of_an_image_does_not_depend_on_the_other_images_of_the_batch(task):
    x = random_image(3, 3, 4, 4)
    whole = degrade_batch(
        TASKS[task](make_seeded_numpy_generator(5)), x, [make_seeded_numpy_generator(i) for i in range(3)]
    )
    alone = degrade_batch(TASKS[task](make_seeded_numpy_generator(5)), x[1:2], [make_seeded_numpy_generator(1)])
    assert torch.equal(alone, whole[1:2])


@pytest.mark.parametrize("task", ["colorization", "denoising"])
def test_an_auxiliary_task_degrades_half_of_the_batches(task):
    drawn = [sample_degradation_for_batch(task, make_seeded_numpy_generator(seed)) is not None for seed in range(600)]
    assert 250 <= sum(drawn) <= 350  # 300 degraded batches are expected, with a standard deviation of 12


def test_the_auxiliary_task_none_degrades_no_batch():
    assert sample_degradation_for_batch("none", make_seeded_numpy_generator(0)) is None


def test_an_unknown_auxiliary_task_is_refused_with_the_names_of_the_known_tasks():
    with expect_user_error("--mode-sr", "colorization", "inpainting"):
        require_known_auxiliary_task("inpainting")


@pytest.mark.parametrize("way", ["completion", "colorization"])
def test_the_degradations_completion_and_colorization_replace_random_pixels_of_some_patches(way):
    patch = random_image(3, 32, 32)
    replaced = torch.zeros_like(patch)
    if way == "colorization":
        replaced = patch.mean(dim=0, keepdim=True).expand_as(patch)
    fractions = []
    for seed in range(TRIALS):
        result = degrade_patch(patch, make_seeded_numpy_generator(seed), **{**NONE, way: True})
        changed = (result != patch).any(dim=0)
        torch.testing.assert_close(result[:, changed], replaced[:, changed])
        if changed.any():
            fractions.append(changed.float().mean().item())
    # The code of the paper's authors degrades a patch with probability 1 - 0.5**0.5 (0.29)
    assert len(fractions) / TRIALS == pytest.approx(1 - 0.5**0.5, abs=0.055)
    # The code of the paper's authors turns a fraction of 0.05 to 0.15 of a patch's pixels black or grey
    assert 0.02 < min(fractions) < 0.065
    assert 0.135 < max(fractions) < 0.19


def test_augmentation_adds_noise_of_up_to_ten_grey_levels_and_compresses_patches_as_jpeg():
    ramp = torch.linspace(0.2, 0.8, 24).expand(3, 24, 24)
    results = [
        degrade_patch(ramp, make_seeded_numpy_generator(seed), **{**NONE, "augment": True}) for seed in range(TRIALS)
    ]
    changed = [result for result in results if not torch.equal(result, ramp)]
    assert len(changed) / TRIALS == pytest.approx(0.5, abs=0.055)
    # Pixel values times 255 are whole numbers after JPEG compression, but not after adding noise
    compressed = [torch.allclose(result * 255, (result * 255).round(), atol=1e-3) for result in changed]
    # 29.3 % of all patches are compressed, which is 58.6 % of the changed patches
    assert 0.5 < np.mean(compressed) < 0.68
    stds = [(y - ramp).std().item() * 255 for y, jpeg in zip(changed, compressed, strict=True) if not jpeg]
    assert min(stds) < 1
    assert 9 < max(stds) < 10.6
    assert np.mean(stds) == pytest.approx(5, abs=1)


def test_jpeg_compression_changes_an_image_more_at_lower_quality():
    image = random_image(3, 32, 32)
    lost = [(compress_float_image_as_jpeg(image, quality) - image).abs().mean() for quality in (95, 60, 25)]
    assert 0 < lost[0] < lost[1] < lost[2] < 0.3


def test_degrade_patch_returns_the_patch_unchanged_if_all_degradations_are_off():
    patch = random_image(3, 8, 8)
    assert torch.equal(degrade_patch(patch, make_seeded_numpy_generator(7), **NONE), patch)
