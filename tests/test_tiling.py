"""Tests that tiles and Winograd convolutions do not change the outputs of the networks."""

from fractions import Fraction

import pytest
import torch

from models.features import STAGES, VGG19, Pixels, VGG19Stage, compute_receptive_radius_and_stride, load_vgg
from models.rdn import RDN
from models.resnet import DeepStemResNet
from models.resynthesis import ResynthesisDetector
from models.tiling import apply_function_in_tiles
from models.winograd import should_use_winograd

TINY = {"num_features": 6, "growth_rate": 4, "num_blocks": 3, "num_layers": 2}


def assert_close(got, expected):
    """Require that `got` differs from `expected` by at most 2e-5 times the largest absolute value in `expected`."""
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.fixture(scope="module")
def random_vgg():
    """Return VGG-19 with random weights."""
    return load_vgg("random")[0]


@pytest.fixture
def tiny_rdn(request):
    """Return a tiny RDN, whose scale is the parameter of the fixture (default: 4)."""
    torch.manual_seed(0)
    return RDN(scale=getattr(request, "param", 4), **TINY)


def toy_detector(rdn, stage, vgg):
    """Return a detector in evaluation mode with random weights and batch-norm statistics."""
    torch.manual_seed(1)
    features = Pixels()
    if stage:
        features = VGG19Stage(stage)
        features.vgg.load_state_dict(vgg.state_dict())
    classifier = DeepStemResNet(features.channels, "resnet18")
    for module in classifier.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return ResynthesisDetector(rdn, features, classifier).eval()


@pytest.mark.parametrize(("tiny_rdn", "side"), [(2, 90), (3, 120), (4, 132)], indirect=["tiny_rdn"])
def test_rdn_in_small_tiles_gives_the_output_of_rdn_on_whole_images(tiny_rdn, side, monkeypatch):
    x_lr = torch.rand(2, 3, side // tiny_rdn.scale, 90 // tiny_rdn.scale)
    expected = tiny_rdn(x_lr).detach()
    tiny_rdn.tile = 9
    monkeypatch.setattr("models.rdn_inference.STRIP_BYTES", 400)
    monkeypatch.setattr("models.rdn_inference.UPSCALE_TILE", 8)
    with torch.inference_mode():
        assert_close(tiny_rdn(x_lr), expected)


def test_tiles_with_a_too_small_halo_give_wrong_values_at_their_borders(tiny_rdn):
    x = torch.rand(1, 6, 40, 40)
    with torch.inference_mode():
        expected = tiny_rdn.rdbs[0](x)
        assert_close(apply_function_in_tiles(tiny_rdn.rdbs[0], x, side=16, halo=2), expected)
        error = (apply_function_in_tiles(tiny_rdn.rdbs[0], x, side=16, halo=1) - expected).abs().max(dim=1).values[0]
    assert error.max() > 1e-3 * expected.abs().max()
    assert error[:15, :15].max() <= 2e-5  # in the first tile of 16 x 16 values, only the last row and column are wrong


@pytest.mark.parametrize("size", [(32, 32), (33, 130), (70, 31)])
def test_rdn_with_winograd_convolutions_gives_the_output_of_direct_convolutions(size, monkeypatch):
    monkeypatch.setattr("models.winograd.TILES", 40)  # a feature map with more than 40 tiles is computed in strips
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    used = []

    def decide_and_record_winograd_use(*arguments):
        used.append(should_use_winograd(*arguments))
        return used[-1]

    monkeypatch.setattr("models.rdn_inference.should_use_winograd", decide_and_record_winograd_use)
    torch.manual_seed(0)
    rdn = RDN(num_features=64, growth_rate=64, num_blocks=2, num_layers=3)
    rdn.tile = 48
    x_lr = torch.rand(2, 3, *size)
    with torch.no_grad():
        got = rdn(x_lr)
        with torch.autocast("cpu", torch.bfloat16):
            rdn(x_lr)
    assert used == [True, False]
    # RDN calls `Tensor.float`, which must keep float64 here, so that RDN computes `expected` in float64
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    expected = rdn.double()(x_lr.double()).detach()
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("tiny_rdn", [2, 3, 4], indirect=True)
def test_rdn_with_gradient_checkpointing_has_the_gradients_of_rdn_without_checkpointing(tiny_rdn):
    x_lr = torch.rand(1, 3, 20, 20)
    calls = []
    tiny_rdn.rdbs[0].register_forward_pre_hook(lambda *_: calls.append(1))

    def rdn_gradients():
        return torch.autograd.grad(tiny_rdn(x_lr).square().mean(), list(tiny_rdn.parameters()))

    expected = rdn_gradients()
    assert len(calls) == 1
    tiny_rdn.checkpoint_blocks = True
    for got, wanted in zip(rdn_gradients(), expected, strict=True):
        assert_close(got, wanted)
    # Without gradient checkpointing, the first dense block is called once, and with gradient checkpointing twice
    assert len(calls) == 3


@pytest.mark.parametrize("size", [(144, 80), (150, 91)])
def test_vgg_in_tiles_gives_the_output_of_vgg_on_the_whole_image(random_vgg, size):
    x = torch.rand(1, 3, *size)
    whole = random_vgg(x, STAGES)
    tiled = VGG19()
    tiled.load_state_dict(random_vgg.state_dict())
    tiled.tile = 16
    with torch.inference_mode():
        together = tiled(x, STAGES)
        for k in STAGES:
            assert_close(tiled(x, [k])[k], whole[k])
            assert_close(together[k], whole[k])


def test_the_receptive_field_of_vgg_rounded_up_to_its_stride_of_16_is_80_pixels(random_vgg):
    assert compute_receptive_radius_and_stride(random_vgg.features) == (80, 16)


@pytest.mark.parametrize("stage", [0, 5])
def test_a_detector_that_computes_in_tiles_gives_the_logits_of_the_whole_image(tiny_rdn, random_vgg, stage):
    detector = toy_detector(tiny_rdn, stage, random_vgg)
    x = torch.rand(1, 3, 148, 132)
    expected = detector(x).detach()  # with gradients enabled, networks do not use tiles
    detector.set_tile_side(79)
    assert (detector.classifier.tile, detector.resynthesizer.tile) == (64, 16)
    with torch.inference_mode():
        assert_close(detector(x), expected)


@pytest.mark.parametrize("ceil_mode", [False, True])
def test_max_pooling_in_tiles_equals_max_pooling_with_output_sizes_rounded_down_or_up(ceil_mode):
    x = torch.rand(1, 2, 21, 13)
    pool = torch.nn.MaxPool2d(2, ceil_mode=ceil_mode)
    assert torch.equal(apply_function_in_tiles(pool, x, side=4, halo=2, scale=Fraction(1, 2)), pool(x))
