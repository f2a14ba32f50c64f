"""Networks tile by tile, strip by strip and block by block give what they give on whole images."""

from fractions import Fraction

import pytest
import torch

from benchmarks.plain import plain_detector
from models import RDN, STAGE_CHANNELS, DeepStemResNet, ResynthesisDetector, VGGStages, load_vgg
from models.features import STAGES, reach
from models.tiling import in_tiles
from models.winograd import pays

TINY = {"num_features": 6, "growth_rate": 4, "num_blocks": 3, "num_layers": 2}


def close(got, wanted):
    """Within 2e-5 of the largest value wanted: the same sums in another order."""
    assert got.shape == wanted.shape
    assert (got - wanted).abs().max() <= 2e-5 * wanted.abs().max()


@pytest.fixture(scope="module")
def vgg():
    return load_vgg("random")[0]


@pytest.fixture
def rdn(request):
    torch.manual_seed(0)
    return RDN(scale=getattr(request, "param", 4), **TINY)


def toy_detector(rdn, stage, vgg):
    torch.manual_seed(1)
    classifier = DeepStemResNet("resnet18", STAGE_CHANNELS[stage])
    for module in classifier.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return ResynthesisDetector(rdn, classifier, stage, vgg if stage else None).eval()


@pytest.mark.parametrize(("rdn", "side"), [(2, 90), (3, 120), (4, 132)], indirect=["rdn"])
def test_the_re_synthesizer_in_small_tiles_is_the_one_with_gradients(rdn, side, monkeypatch):
    x_lr = torch.rand(2, 3, side // rdn.scale, 90 // rdn.scale)
    wanted = rdn(x_lr)  # dense blocks and their concatenation whole, as they are trained
    rdn.tile = 9
    monkeypatch.setattr("models.rdn.STRIP_BYTES", 400)
    monkeypatch.setattr("models.rdn.TAIL_SIDE", 8)
    with torch.inference_mode():
        close(rdn(x_lr), wanted.detach())


def test_tiles_without_a_sufficient_halo_show(rdn):
    x = torch.rand(1, 6, 40, 40)
    with torch.inference_mode():
        wanted = rdn.rdbs[0](x)
        close(in_tiles(rdn.rdbs[0], x, side=16, halo=2), wanted)
        error = (in_tiles(rdn.rdbs[0], x, side=16, halo=1) - wanted).abs().max(dim=1).values[0]
    assert error.max() > 1e-3 * wanted.abs().max()
    assert error[:15, :15].max() <= 2e-5  # a seam, and only there


@pytest.mark.parametrize("size", [(32, 32), (33, 130), (70, 31)])
def test_winograd_convolutions_are_the_direct_ones(size, monkeypatch):
    monkeypatch.setattr("models.winograd.TILES", 40)  # strips, of which the last is smaller
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    torch.manual_seed(0)
    rdn = RDN(num_features=64, growth_rate=64, num_blocks=2, num_layers=3)
    x_lr, taken, rdn.tile = torch.rand(2, 3, *size), [], 48
    monkeypatch.setattr("models.rdn.pays", lambda *given: taken.append(pays(*given)) or taken[-1])
    with torch.no_grad():
        got = rdn(x_lr)
        with torch.autocast("cpu", torch.bfloat16):
            rdn(x_lr)
    rdn(x_lr)
    assert taken == [True, False, False]
    wanted = plain_detector(toy_detector(rdn, 0, None)).resynthesizer.double()(x_lr.double())
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("rdn", [2, 3, 4], indirect=True)
def test_gradients_through_the_tiles_of_the_up_sampling_and_through_recomputed_blocks(rdn, monkeypatch):
    x_lr, calls = torch.rand(1, 3, 20, 20), []
    rdn.rdbs[0].register_forward_pre_hook(lambda *_: calls.append(1))

    def gradients():
        return torch.autograd.grad(rdn(x_lr).square().mean(), list(rdn.parameters()))

    wanted = gradients()
    monkeypatch.setattr("models.rdn.TAIL_SIDE", 8)
    for rdn.checkpoint_blocks in (False, True):
        for got, expected in zip(gradients(), wanted, strict=True):
            close(got, expected)
    assert len(calls) == 4  # a block once, and once more in the backward pass


@pytest.mark.parametrize("size", [(144, 80), (150, 91)])
def test_vgg_in_tiles(vgg, size):
    x = torch.rand(1, 3, *size)
    whole = vgg(x, STAGES)
    tiled = VGGStages()
    tiled.load_state_dict(vgg.state_dict())
    tiled.tile = 16
    with torch.inference_mode():
        together = tiled(x, STAGES)
        for k in STAGES:
            close(tiled(x, [k])[k], whole[k])
            close(together[k], whole[k])
    assert reach(vgg.features) == (80, 16)  # up to relu5_1: 70 pixels, in whole strides


@pytest.mark.parametrize("stage", [0, 5])
def test_a_detector_in_tiles(rdn, vgg, stage):
    detector = toy_detector(rdn, stage, vgg)
    x = torch.rand(1, 3, 148, 132)
    with torch.inference_mode():
        wanted = plain_detector(detector)(x)
        close(detector(x), wanted)
        detector.set_tile(79)
        assert (detector.classifier.tile, detector.resynthesizer.tile) == (64, 16)
        close(detector(x), wanted)


def test_results_rounded_up_and_down():
    x = torch.rand(1, 2, 21, 13)
    for ceil_mode in (False, True):
        pool = torch.nn.MaxPool2d(2, ceil_mode=ceil_mode)
        assert torch.equal(in_tiles(pool, x, side=4, halo=2, scale=Fraction(1, 2)), pool(x))
