"""The auxiliary tasks: how inputs are degraded, and that sharing work between the losses changes neither."""

import pytest
import torch
import torch.nn.functional as F

from models import RDN, DeepStemResNet, ResynthesisDetector, downsample, load_vgg
from models import auxiliary as tasks
from models.auxiliary import ColorizationHead, DenoisingHead, auxiliary_loss, degrade_patch, residual_and_auxiliary_loss
from models.vgg import STAGES

TINY = {"num_features": 4, "growth_rate": 4, "num_blocks": 2, "num_layers": 2}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def vgg():
    return load_vgg("random")[0]


def toy(vgg, stage):
    torch.manual_seed(0)
    classifier = DeepStemResNet("resnet18", (3, 64, 128, 256, 512, 512)[stage], False)
    return ResynthesisDetector(RDN(**TINY), classifier, stage, vgg if stage else None)


def test_colorization_greys_a_share_of_the_pixels():
    x = torch.rand(3, 3, 64, 64, generator=rng(9))
    grey = x.mean(dim=1, keepdim=True).expand_as(x)
    shares = []
    for seed in range(60):
        y = ColorizationHead().degrade(x, rng(seed), [rng(1000 + 3 * seed + i) for i in range(3)])
        changed = (y != x).any(dim=1)  # (B, H, W)
        torch.testing.assert_close(y[changed[:, None].expand_as(x)], grey[changed[:, None].expand_as(x)])
        share = changed.float().mean(dim=(1, 2))
        assert share.max() - share.min() < 0.05  # one density for the batch: within 4 standard deviations of a draw
        assert not torch.equal(changed[0], changed[1])  # and a mask for each image
        shares.append(share.mean().item())
    assert 0.09 < min(shares) < 0.125 and 0.225 < max(shares) < 0.26
    assert abs(sum(shares) / 60 - 0.175) < 0.02


def test_denoising_adds_gaussian_noise_of_four_grey_levels():
    x = torch.full((2, 3, 64, 64), 0.5)
    noise = DenoisingHead().degrade(x, rng(), [rng(1), rng(2)]) - x
    assert noise.std().item() == pytest.approx(4 / 255, rel=0.02)
    assert abs(noise.mean().item()) < 4e-4
    assert (noise.abs() > 2 * 4 / 255).float().mean().item() == pytest.approx(0.0455, abs=0.006)
    assert not torch.equal(noise[0], noise[1]) and not torch.equal(noise[0, 0], noise[0, 1])


@pytest.mark.parametrize("head", [ColorizationHead(), DenoisingHead()])
def test_what_happens_to_an_image_depends_on_its_own_generator(head):
    x = torch.rand(3, 3, 16, 16, generator=rng(9))
    whole = head.degrade(x, rng(5), [rng(i) for i in range(3)])
    torch.testing.assert_close(head.degrade(x[1:2], rng(5), [rng(1)]), whole[1:2], rtol=0, atol=0)
    assert torch.equal(head.degrade(x, rng(5), [rng(i) for i in range(3)]), whole)


@pytest.mark.parametrize("way", ["augment", "completion", "colorization"])
def test_patches_are_degraded_with_the_released_probability(way):
    ways = dict.fromkeys(("augment", "completion", "colorization"), False) | {way: True}
    patch = torch.rand(3, 16, 16, generator=rng(9)) * 0.8 + 0.1
    results = [degrade_patch(patch, rng(seed), **ways) for seed in range(800)]
    changed = sum(not torch.equal(r, patch) for r in results) / 800
    # augment is noise and JPEG, each with p = 1 - sqrt(1/2): one patch in two escapes both
    assert changed == pytest.approx(0.5 if way == "augment" else 1 - 0.5**0.5, abs=0.055)
    assert all(torch.equal(degrade_patch(patch, rng(seed), **ways), results[seed]) for seed in range(5))


def test_patches_are_left_alone_unless_asked():
    patch = torch.rand(3, 16, 16)
    assert all(torch.equal(degrade_patch(patch, rng(s), False, False, False), patch) for s in range(10))


@pytest.mark.parametrize("way", ["completion", "colorization"])
def test_a_share_of_the_patch_is_removed(monkeypatch, way):
    monkeypatch.setattr(tasks, "PATCH_PROBABILITY", 1.0)
    patch = torch.rand(3, 64, 64, generator=rng(9)) * 0.8 + 0.1
    ways = dict.fromkeys(("augment", "completion", "colorization"), False) | {way: True}
    shares = []
    for seed in range(80):
        result = degrade_patch(patch, rng(seed), **ways)
        changed = (result != patch).any(dim=0)
        wanted = torch.zeros_like(patch) if way == "completion" else patch.mean(dim=0, keepdim=True).expand_as(patch)
        torch.testing.assert_close(result[:, changed], wanted[:, changed])
        shares.append(changed.float().mean().item())
    assert 0.04 < min(shares) < 0.065 and 0.135 < max(shares) < 0.165


def test_jpeg_compression_is_really_applied(monkeypatch):
    """Of the quality drawn from 25..74, to the image with the noise on it."""
    seen = []
    real = tasks.compress_jpeg
    monkeypatch.setattr(tasks, "PATCH_PROBABILITY", 1.0)
    monkeypatch.setattr(
        tasks, "compress_jpeg", lambda image, quality: seen.append((quality, image)) or real(image, quality)
    )
    ramp = torch.linspace(0, 1, 24).expand(3, 24, 24)
    stds = []
    for seed in range(300):
        result = degrade_patch(ramp, rng(seed), True, False, False)
        quality, noisy = seen[-1]
        stds.append((noisy - ramp).std().item() * 255)
        assert torch.equal(result, real(noisy, quality))
        assert not torch.allclose(result, noisy, atol=1e-3)
        assert torch.allclose(result * 255, (result * 255).round(), atol=1e-3)
    qualities = {quality for quality, _ in seen}
    assert min(qualities) == 25 and max(qualities) == 74 and len(qualities) == 50
    assert min(stds) < 0.5 and 9 < max(stds) < 10.5 and abs(sum(stds) / 300 - 5) < 0.5


def test_a_lower_jpeg_quality_loses_more():
    image = torch.rand(3, 32, 32, generator=rng())
    lost = [(tasks.compress_jpeg(image, quality) - image).abs().mean().item() for quality in (95, 60, 25)]
    assert 0 < lost[0] < lost[1] < lost[2] < 0.3


# --- one pass for both losses -------------------------------------------------------------------------------------------


def unshared(detector, vgg, x, real, degraded):
    """Both losses computed for themselves, as they are written in the paper."""
    residual = detector.residual(x)
    x_lr = downsample(x[real], 4) if degraded is None else degraded
    x_hat = detector.resynthesizer(x_lr)
    maps_hat, maps = vgg(x_hat, STAGES), vgg(x[real], STAGES)
    loss = F.l1_loss(x_hat, x[real])
    for k, weight in zip(STAGES, (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.0), strict=True):
        loss = loss + weight * (maps_hat[k] - maps[k]).abs().mean()
    return residual, loss


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("clean", [True, False])
def test_sharing_changes_neither_loss_nor_gradient(vgg, stage, clean):
    detector = toy(vgg, stage)
    x, real = torch.rand(3, 3, 32, 32, generator=rng(1)), torch.tensor([True, False, True])
    degraded = None if clean else downsample(x[real], 4) + 0.1 * torch.rand(2, 3, 8, 8, generator=rng(2))
    gradients = []
    results = []
    for compute in (
        lambda: residual_and_auxiliary_loss(detector, vgg, x, real, True, degraded),
        lambda: unshared(detector, vgg, x, real, degraded),
    ):
        detector.zero_grad()
        residual, loss = compute()
        (loss + (residual**2).mean()).backward()
        gradients.append([p.grad.clone() for p in detector.resynthesizer.parameters()])
        results.append((residual.detach(), loss.detach()))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-6)
    for a, b in zip(*gradients, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * b.abs().max().item())


@pytest.mark.parametrize(("stage", "features_if_degraded"), [(0, 2), (2, 3)])
def test_nothing_is_computed_twice(vgg, stage, features_if_degraded):
    """A clean batch is re-synthesised once; features are taken once of the images and once of each re-synthesis."""
    detector = toy(vgg, stage)
    passes = []
    hooks = [
        net.register_forward_hook(lambda *_, name=name: passes.append(name))
        for name, net in (("rdn", detector.resynthesizer), ("vgg", vgg))
    ]
    x, real = torch.rand(2, 3, 32, 32), torch.tensor([True, True])
    try:
        residual_and_auxiliary_loss(detector, vgg, x, real, True, None)
        assert (passes.count("rdn"), passes.count("vgg")) == (1, 2)
        passes.clear()
        residual_and_auxiliary_loss(detector, vgg, x, real, True, downsample(x, 4))
        assert (passes.count("rdn"), passes.count("vgg")) == (2, features_if_degraded)
    finally:
        for hook in hooks:
            hook.remove()


def test_without_auxiliary_loss_no_features_are_needed():
    """Pixels, end to end, --mode-sr none: there is no VGG."""
    detector = toy(None, 0)
    x = torch.rand(2, 3, 32, 32)
    residual, loss = residual_and_auxiliary_loss(detector, None, x, torch.tensor([True, False]), False, None)
    torch.testing.assert_close(residual, detector.residual(x))
    assert loss == 0 and residual.requires_grad


def test_the_auxiliary_loss_of_a_perfect_resynthesis_is_zero(vgg):
    x = torch.rand(2, 3, 32, 32)
    maps = vgg(x, STAGES)
    assert auxiliary_loss(x, x, maps, maps) == 0


@pytest.mark.parametrize("scale", [2, 3])
def test_gradient_checkpointing_gives_equal_gradients(monkeypatch, scale):
    import models.rdn

    used = []
    real = models.rdn.checkpoint
    monkeypatch.setattr(models.rdn, "checkpoint", lambda *a, **k: used.append(1) or real(*a, **k))
    torch.manual_seed(0)
    model = RDN(scale=scale, **TINY)
    x = torch.rand(2, 3, 8, 8)
    gradients = []
    for recompute in (False, True):
        model.zero_grad()
        model.checkpoint_blocks = recompute
        (model(x) ** 2).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert len(used) >= 2  # each block
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)
