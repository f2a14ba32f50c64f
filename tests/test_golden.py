"""Tests that the networks have the weight names, weight shapes and outputs of the networks of the paper's authors.

The expected values in the folder tests/golden/ were computed with the code that the authors of the paper published.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_rule import load_fixed_pseudo_random_weights

from models.features import STAGES, VGG19, Pixels, VGG19Stage
from models.losses import compute_perceptual_distance, compute_reconstruction_loss
from models.rdn import RDN
from models.released import read_rdn_scale_and_arguments, read_resnet_name_and_channels
from models.resnet import DeepStemResNet
from models.resynthesis import ResynthesisDetector, downsample

GOLDEN = Path(__file__).parent / "golden"
TINY = {"num_features": 8, "growth_rate": 8, "num_blocks": 3, "num_layers": 2}


@pytest.fixture(scope="module")
def outputs_of_the_authors_code():
    """Return a dict from the name of an array in reference_outputs.npz to the array as a tensor."""
    arrays = np.load(GOLDEN / "reference_outputs.npz")
    return {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}


@pytest.fixture(scope="module")
def input_images(outputs_of_the_authors_code):
    """Return the images for which the expected outputs were computed, float with values in [0, 1]."""
    return outputs_of_the_authors_code["image"].float() / 255


@pytest.fixture(scope="module")
def rdn_with_reference_weights():
    """Return a full-size RDN with the weights that `make_fixed_weight_from_parameter_name` makes."""
    return load_fixed_pseudo_random_weights(RDN())


@pytest.fixture(scope="module")
def vgg_with_reference_weights():
    """Return VGG-19 with the weights that `make_fixed_weight_from_parameter_name` makes."""
    return load_fixed_pseudo_random_weights(VGG19())


def create_pixel_or_vgg_feature_module(stage, vgg):
    """Return the feature network of a stage: `Pixels` for stage 0, and `VGG19Stage` for stages 1 to 5."""
    if stage == 0:
        return Pixels()
    features = VGG19Stage(stage)
    features.vgg = vgg
    return features


def assert_close(got, expected):
    """Require that `got` differs from `expected` by at most 1e-4 times the largest absolute value in `expected`."""
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
def test_network_weights_have_the_names_and_shapes_of_the_authors_code(name, build):
    expected = json.loads((GOLDEN / "state_dict_shapes.json").read_text())[name]
    assert {key: list(value.shape) for key, value in build().state_dict().items()} == expected


def test_rdn_and_the_pixel_residual_have_the_values_of_the_authors_code(
    outputs_of_the_authors_code, rdn_with_reference_weights, input_images
):
    detector = ResynthesisDetector(rdn_with_reference_weights, Pixels(), torch.nn.Identity())
    with torch.inference_mode():
        x_hat = detector.resynthesize(input_images)
        residual = detector.residual(input_images, x_hat)
    assert_close(downsample(input_images, 4), outputs_of_the_authors_code["lr"])
    assert_close(x_hat, outputs_of_the_authors_code["rdn"])
    assert_close(residual[:, :, ::2, ::2], outputs_of_the_authors_code["pixel_res"])


def test_rdn_with_gradients_has_the_output_of_the_authors_code(
    outputs_of_the_authors_code, rdn_with_reference_weights, input_images
):
    assert_close(rdn_with_reference_weights(downsample(input_images, 4)).detach(), outputs_of_the_authors_code["rdn"])


def test_rdn_has_22_271_107_parameters_as_in_the_paper(rdn_with_reference_weights):
    assert sum(p.numel() for p in rdn_with_reference_weights.parameters()) == 22_271_107


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_a_small_rdn_has_the_output_of_the_authors_code_at_each_scale(outputs_of_the_authors_code, scale):
    small = load_fixed_pseudo_random_weights(RDN(scale=scale, **TINY))
    with torch.inference_mode():
        assert_close(small(outputs_of_the_authors_code["tiny_in"]), outputs_of_the_authors_code[f"rdn_small_x{scale}"])
    assert read_rdn_scale_and_arguments(small.state_dict(), "file") == (scale, TINY)


def test_vgg_stages_computed_alone_or_together_give_the_outputs_of_the_authors_code(
    outputs_of_the_authors_code, vgg_with_reference_weights, input_images
):
    with torch.inference_mode():
        together = vgg_with_reference_weights(input_images, STAGES)
        for k in STAGES:
            alone = vgg_with_reference_weights(input_images, [k])[k]
            assert_close(alone[:, ::8], outputs_of_the_authors_code[f"vgg_stage{k}"])
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
def test_detectors_have_the_logits_of_the_authors_code(
    outputs_of_the_authors_code,
    rdn_with_reference_weights,
    vgg_with_reference_weights,
    input_images,
    key,
    arch,
    stage,
    dilated,
):
    features = create_pixel_or_vgg_feature_module(stage, vgg_with_reference_weights)
    classifier = load_fixed_pseudo_random_weights(DeepStemResNet(features.channels, arch, dilated))
    detector = ResynthesisDetector(rdn_with_reference_weights, features, classifier).eval()
    with torch.inference_mode():
        assert_close(detector(input_images), outputs_of_the_authors_code[key])
    assert read_resnet_name_and_channels(classifier.state_dict(), "file") == (arch, features.channels)


def test_the_losses_have_the_values_of_the_authors_code(
    outputs_of_the_authors_code, rdn_with_reference_weights, vgg_with_reference_weights, input_images
):
    with torch.inference_mode():
        x_hat = rdn_with_reference_weights(downsample(input_images, 4))
        assert_close(
            compute_perceptual_distance(x_hat, input_images, vgg_with_reference_weights, F.mse_loss),
            outputs_of_the_authors_code["vgg_loss_mse"],
        )
        assert_close(
            compute_reconstruction_loss(x_hat, input_images, vgg_with_reference_weights).mean(),
            outputs_of_the_authors_code["aux_loss_l1"],
        )
