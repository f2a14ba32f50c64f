"""The auxiliary tasks: how inputs are degraded, and that sharing work between the losses changes neither."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from trainings import TINY

from models import RDN, STAGES, DeepStemResNet, ResynthesisDetector, downsample, load_vgg
from models import auxiliary as tasks
from models.auxiliary import TASKS, degrade_batch, degrade_patch, draw_degradation, residual_and_auxiliary_loss

NONE = {"augment": False, "completion": False, "colorization": False}


def rng(*key):
    return np.random.default_rng(key)


def picture(*shape, seed=9):
    return torch.from_numpy(rng(seed).random(shape, np.float32)) * 0.8 + 0.1


@pytest.fixture(scope="module")
def vgg():
    return load_vgg("random")[0]


def test_colorization_greys_a_share_of_the_pixels():
    x, shares = picture(3, 3, 64, 64), []
    grey = x.mean(dim=1, keepdim=True).expand_as(x)
    for seed in range(60):
        y = degrade_batch(TASKS["colorization"](rng(seed)), x, 1, [rng(seed, i) for i in range(3)])
        changed = (y != x).any(dim=1, keepdim=True).expand_as(x)
        torch.testing.assert_close(y[changed], grey[changed])
        share = changed[:, 0].float().mean(dim=(1, 2))
        assert share.max() - share.min() < 0.05  # one density for the batch: within 4 standard deviations of a draw
        assert not torch.equal(changed[0], changed[1])  # and a mask for each image
        shares.append(share.mean().item())
    assert 0.09 < min(shares) < 0.125 and 0.225 < max(shares) < 0.26 and abs(sum(shares) / 60 - 0.175) < 0.02


def test_denoising_adds_gaussian_noise_of_four_grey_levels():
    x = torch.full((2, 3, 64, 64), 0.5)
    noise = degrade_batch(TASKS["denoising"](rng(0)), x, 1, [rng(1), rng(2)]) - x
    assert noise.std().item() == pytest.approx(4 / 255, rel=0.02) and abs(noise.mean().item()) < 4e-4
    assert (noise.abs() > 2 * 4 / 255).float().mean().item() == pytest.approx(0.0455, abs=0.006)
    assert not torch.equal(noise[0], noise[1]) and not torch.equal(noise[0, 0], noise[0, 1])


@pytest.mark.parametrize("task", ["colorization", "denoising"])
def test_every_other_batch_is_degraded_each_image_by_its_own_generator(task):
    x = picture(3, 3, 16, 16)
    whole = degrade_batch(TASKS[task](rng(5)), x, 4, [rng(i) for i in range(3)])
    alone = degrade_batch(TASKS[task](rng(5)), x[1:2], 4, [rng(1)])
    assert whole.shape == (3, 3, 4, 4) and torch.equal(alone, whole[1:2])
    assert 250 <= sum(draw_degradation(task, rng(seed)) is not None for seed in range(600)) <= 350  # 300 +- 4 * 12
    assert draw_degradation("none", rng(0)) is None


@pytest.mark.parametrize("way", ["completion", "colorization"])
def test_a_share_of_some_patches_is_removed(way):
    patch = picture(3, 32, 32)
    wanted = torch.zeros_like(patch) if way == "completion" else patch.mean(dim=0, keepdim=True).expand_as(patch)
    shares = []
    for seed in range(800):
        result = degrade_patch(patch, rng(seed), **NONE | {way: True})
        changed = (result != patch).any(dim=0)
        torch.testing.assert_close(result[:, changed], wanted[:, changed])
        shares += [changed.float().mean().item()] * bool(changed.any())
    assert len(shares) / 800 == pytest.approx(1 - 0.5**0.5, abs=0.055)  # the released probability
    assert 0.02 < min(shares) < 0.065 and 0.135 < max(shares) < 0.19


def test_augmentation_is_noise_of_up_to_ten_grey_levels_and_real_jpeg():
    """Told apart by what they leave: JPEG whole grey levels, noise alone none."""
    ramp = torch.linspace(0.2, 0.8, 24).expand(3, 24, 24)
    results = [degrade_patch(ramp, rng(seed), **NONE | {"augment": True}) for seed in range(800)]
    assert torch.equal(degrade_patch(ramp, rng(7), **NONE), ramp)
    results = [r for r in results if not torch.equal(r, ramp)]
    assert len(results) / 800 == pytest.approx(0.5, abs=0.055)  # each with 1 - sqrt(1/2): one in two escapes both
    whole = [torch.allclose(r * 255, (r * 255).round(), atol=1e-3) for r in results]
    stds = [(r - ramp).std().item() * 255 for r, jpeg in zip(results, whole, strict=True) if not jpeg]
    assert 0.5 < sum(whole) / len(whole) < 0.68  # (p^2 + p (1 - p)) / (1 - (1 - p)^2) = 0.586 with p = 1 - sqrt(1/2)
    assert min(stds) < 1 and 9 < max(stds) < 10.6 and abs(sum(stds) / len(stds) - 5) < 1
    lost = [(tasks.compress_jpeg(picture(3, 32, 32), q) - picture(3, 32, 32)).abs().mean() for q in (95, 60, 25)]
    assert 0 < lost[0] < lost[1] < lost[2] < 0.3


# --- one pass for both losses -------------------------------------------------------------------------------


def toy(vgg, stage):
    torch.manual_seed(0)
    classifier = DeepStemResNet("resnet18", (3, 64, 128, 256, 512, 512)[stage], False)
    return ResynthesisDetector(RDN(**TINY), classifier, stage, vgg)


def unshared(detector, x, real, degraded):
    """Both losses computed for themselves, as they are written in the paper: the auxiliary one of each real."""
    residual = detector.compare(x).residual
    x_hat = detector.resynthesizer(downsample(x[real], 4) if degraded is None else degraded[real])
    maps_hat, maps = detector.vgg(x_hat, STAGES), detector.vgg(x[real], STAGES)
    loss = F.l1_loss(x_hat, x[real], reduction="none").flatten(1).mean(1)
    for k, weight in zip(STAGES, (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.0), strict=True):
        loss = loss + weight * (maps_hat[k] - maps[k]).abs().flatten(1).mean(1)
    return residual, torch.zeros(len(x)).index_put((real,), loss)


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("clean", [True, False])
def test_sharing_changes_neither_loss_nor_gradient(vgg, stage, clean):
    detector = toy(vgg, stage)
    x, real = picture(3, 3, 32, 32, seed=1), torch.tensor([True, False, True])
    degraded = None if clean else downsample(x, 4) + 0.1 * picture(3, 3, 8, 8, seed=2)
    gradients, results = [], []
    for losses in (residual_and_auxiliary_loss, unshared):
        residual, loss = losses(detector, x, real, degraded)
        gradients.append(torch.autograd.grad(loss.sum() + (residual**2).mean(), [*detector.resynthesizer.parameters()]))
        results.append((residual, loss))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    for a, b in zip(*gradients, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * b.abs().max().item())


@pytest.mark.parametrize(("stage", "features_if_degraded"), [(0, 2), (2, 3)])
def test_nothing_is_computed_twice(stage, features_if_degraded):
    """A clean batch is re-synthesised once; features are taken once of the images and once of each re-synthesis."""
    detector, passes = toy(load_vgg("random")[0], stage), []
    for name, network in (("rdn", detector.resynthesizer), ("vgg", detector.vgg)):
        network.register_forward_hook(lambda *_, name=name: passes.append(name))
    x, real = picture(2, 3, 32, 32), torch.tensor([True, True])
    residual_and_auxiliary_loss(detector, x, real, None)
    assert sorted(passes) == ["rdn", "vgg", "vgg"]
    passes.clear()
    residual_and_auxiliary_loss(detector, x, real, downsample(x, 4))
    assert sorted(passes) == ["rdn"] * 2 + ["vgg"] * features_if_degraded


def test_without_reals_no_features_are_needed():
    """Pixels, end to end, --lw-sr 0: there is no VGG."""
    detector, x = toy(None, 0), picture(2, 3, 32, 32)
    residual, loss = residual_and_auxiliary_loss(detector, x, torch.tensor([False, False]), None)
    torch.testing.assert_close(residual, detector.compare(x).residual)
    assert loss.tolist() == [0, 0] and residual.requires_grad
