"""The networks have the weight names, weight shapes and outputs of the released networks.

The expected values in tests/golden/ were computed with the released code.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_rule import fill

from models.features import STAGES, VGG19, Pixels, VGG19Stage
from models.losses import compute_perceptual_distance, compute_reconstruction_loss
from models.rdn import RDN
from models.released import read_rdn_scale_and_arguments, read_resnet_name_and_channels
from models.resnet import DeepStemResNet
from models.resynthesis import ResynthesisDetector, downsample

GOLDEN = Path(__file__).parent / "golden"
TINY = {"num_features": 8, "growth_rate": 8, "num_blocks": 3, "num_layers": 2}


@pytest.fixture(scope="module")
def golden():
    """Return the outputs of the released networks, by name."""
    arrays = np.load(GOLDEN / "reference_outputs.npz")
    return {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}


@pytest.fixture(scope="module")
def x(golden):
    """Return the input images of the released networks, float in [0, 1]."""
    return golden["image"].float() / 255


@pytest.fixture(scope="module")
def rdn():
    """Return a full-size RDN with the weights of the golden rule."""
    return fill(RDN())


@pytest.fixture(scope="module")
def vgg():
    """Return VGG-19 with the weights of the golden rule."""
    return fill(VGG19())


def features_of(stage, vgg):
    """Return pixels for stage 0, and the features of a VGG-19 stage otherwise."""
    if stage == 0:
        return Pixels()
    features = VGG19Stage(stage)
    features.vgg = vgg
    return features


def assert_close(got, expected):
    """Require that the largest error is at most 1e-4 times the largest expected value."""
    assert got.shape == expected.shape
    error = (got.double() - expected.double()).abs().max()
    assert error <= 1e-4 * expected.double().abs().max()


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("rdn", RDN),
        ("resnet50_pixel", lambda: DeepStemResNet(3)),
        ("resnet50_stage5", lambda: DeepStemResNet(512, dilated=True)),
    ],
)
def test_network_weights_have_the_released_names_and_shapes(name, build):
    expected = json.loads((GOLDEN / "state_dict_shapes.json").read_text())[name]
    assert {key: list(value.shape) for key, value in build().state_dict().items()} == expected


def test_rdn_and_the_pixel_residual_have_the_released_values(golden, rdn, x):
    detector = ResynthesisDetector(rdn, Pixels(), torch.nn.Identity())
    with torch.inference_mode():
        x_hat = detector.resynthesize(x)
        residual = detector.residual(x, x_hat)
    assert_close(downsample(x, 4), golden["lr"])
    assert_close(x_hat, golden["rdn"])
    assert_close(residual[:, :, ::2, ::2], golden["pixel_res"])


def test_rdn_with_gradients_has_the_released_output(golden, rdn, x):
    assert_close(rdn(downsample(x, 4)).detach(), golden["rdn"])


def test_rdn_has_22_271_107_parameters_as_in_the_paper(rdn):
    assert sum(p.numel() for p in rdn.parameters()) == 22_271_107


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_a_small_rdn_has_the_released_output_at_each_scale(golden, scale):
    small = fill(RDN(scale=scale, **TINY))
    with torch.inference_mode():
        assert_close(small(golden["tiny_in"]), golden[f"rdn_small_x{scale}"])
    assert read_rdn_scale_and_arguments(small.state_dict(), "file") == (scale, TINY)


def test_vgg_stages_have_the_released_outputs_computed_alone_and_together(golden, vgg, x):
    with torch.inference_mode():
        together = vgg(x, STAGES)
        for k in STAGES:
            alone = vgg(x, [k])[k]
            assert_close(alone[:, ::8], golden[f"vgg_stage{k}"])
            assert torch.equal(together[k], alone)


@pytest.mark.parametrize(
    ("key", "arch", "stage", "dilated"),
    [
        ("logits_pixel_dil0", "resnet50", 0, False),
        ("logits_pixel_dil1", "resnet50", 0, True),
        ("logits_stage5_dil0", "resnet50", 5, False),
        ("logits_stage5_dil1", "resnet50", 5, True),
        ("logits_stage1", "resnet50", 1, False),
        ("logits_stage2", "resnet50", 2, False),
        ("logits_stage3", "resnet50", 3, False),
        ("logits_stage4", "resnet50", 4, False),
        ("logits_pixel_resnet18", "resnet18", 0, False),
        ("logits_pixel_resnet34", "resnet34", 0, False),
        ("logits_pixel_resnet101", "resnet101", 0, False),
    ],
)
def test_detectors_have_the_released_logits(golden, rdn, vgg, x, key, arch, stage, dilated):
    features = features_of(stage, vgg)
    classifier = fill(DeepStemResNet(features.channels, arch, dilated))
    detector = ResynthesisDetector(rdn, features, classifier).eval()
    with torch.inference_mode():
        assert_close(detector(x), golden[key])
    assert read_resnet_name_and_channels(classifier.state_dict(), "file") == (arch, features.channels)


def test_the_losses_have_the_released_values(golden, rdn, vgg, x):
    with torch.inference_mode():
        x_hat = rdn(downsample(x, 4))
        assert_close(compute_perceptual_distance(x_hat, x, vgg, F.mse_loss), golden["vgg_loss_mse"])
        assert_close(compute_reconstruction_loss(x_hat, x, vgg).mean(), golden["aux_loss_l1"])
