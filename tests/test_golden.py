"""Parity with the released networks: names, shapes and outputs (tests/golden/, made with the released code)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_rule import fill

from models import RDN, DeepStemResNet, ResynthesisDetector, VGGStages, downsample, rdn_config, resnet_config
from models.auxiliary import residual_and_auxiliary_loss, super_resolution_loss
from models.features import STAGE_CHANNELS, STAGES

GOLDEN = Path(__file__).parent / "golden"
TINY = {"num_features": 8, "growth_rate": 8, "num_blocks": 3, "num_layers": 2}


@pytest.fixture(scope="module")
def golden():
    return {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(GOLDEN / "reference_outputs.npz").items()}


@pytest.fixture(scope="module")
def x(golden):
    return golden["image"].float() / 255


@pytest.fixture(scope="module")
def networks():
    """RDN and VGG-19."""
    return fill(RDN()), fill(VGGStages())


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Within 1e-4 of the largest value wanted."""
    assert got.shape == wanted.shape
    assert (got.double() - wanted.double()).abs().max() <= 1e-4 * wanted.double().abs().max()


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("rdn", RDN),
        ("resnet50_pixel", lambda: DeepStemResNet(in_channels=3)),
        ("resnet50_stage5", lambda: DeepStemResNet(in_channels=512, dilated=True)),
    ],
)
def test_state_dict_names_and_shapes(name, build):
    wanted = json.loads((GOLDEN / "state_dict_shapes.json").read_text())[name]
    assert {k: list(v.shape) for k, v in build().state_dict().items()} == wanted


def test_rdn(golden, networks, x):
    detector = ResynthesisDetector(networks[0], torch.nn.Identity(), 0, None)
    with torch.inference_mode():
        compared = detector.compare(x)
    close(downsample(x, 4), golden["lr"])
    close(compared.x_hat, golden["rdn"])
    close(compared.residual[:, :, ::2, ::2], golden["pixel_res"])
    assert sum(p.numel() for p in networks[0].parameters()) == 22_271_107  # the paper's


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_small_rdn_of_each_scale(golden, scale):
    small = fill(RDN(scale=scale, **TINY))
    with torch.inference_mode():
        close(small(golden["tiny_in"]), golden[f"rdn_small_x{scale}"])
    assert rdn_config(small.state_dict()) == {"scale": scale, **TINY}


def test_vgg_stages_one_by_one_and_together(golden, networks, x):
    vgg = networks[1]
    with torch.inference_mode():
        together = vgg(x, STAGES)
        for k in STAGES:
            alone = vgg(x, [k])[k]
            close(alone[:, ::8], golden[f"vgg_stage{k}"])
            assert torch.equal(together[k], alone)


@pytest.mark.parametrize(
    ("key", "arch", "stage", "dilated"),
    [
        ("logits_pixel_dil0", "resnet50", 0, False),
        ("logits_pixel_dil1", "resnet50", 0, True),
        ("logits_stage5_dil0", "resnet50", 5, False),
        ("logits_stage5_dil1", "resnet50", 5, True),
        *[(f"logits_stage{k}", "resnet50", k, False) for k in (1, 2, 3, 4)],
        *[(f"logits_pixel_resnet{depth}", f"resnet{depth}", 0, False) for depth in (18, 34, 101)],
    ],
)
def test_logits(golden, networks, x, key, arch, stage, dilated):
    classifier = fill(DeepStemResNet(arch, STAGE_CHANNELS[stage], dilated))
    detector = ResynthesisDetector(networks[0], classifier, stage, networks[1]).eval()
    with torch.inference_mode():
        close(detector(x), golden[key])
    assert resnet_config(classifier.state_dict()) == {"arch": arch, "in_channels": STAGE_CHANNELS[stage]}


def test_perceptual_losses(golden, networks, x):
    detector, all_real = ResynthesisDetector(networks[0], None, 0, networks[1]), torch.ones(len(x), dtype=torch.bool)
    with torch.inference_mode():
        x_hat, _, maps_hat, maps = detector.compare(x, STAGES)
        loss, l1 = super_resolution_loss(x_hat, x, maps_hat, maps, vgg_weight=0.2)
        close((loss - l1) / 0.2, golden["vgg_loss_mse"])
        close(residual_and_auxiliary_loss(detector, x, all_real, None)[1].mean(), golden["aux_loss_l1"])
