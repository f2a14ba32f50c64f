"""Check that networks keep the rules of the extension protocols (docs/extending.md), and that weights are undamaged."""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from utils.checkpoints import compute_fingerprint
from utils.errors import UserError

CHECKED_SIDE = 128  # approximate side length, in pixels, of the test image in `check_features`
CHECKED_LOW_SIDE = 32  # side length, in pixels, of the low-resolution test image in `check_resynthesizer`


@torch.no_grad()
def check_resynthesizer(model: nn.Module, name: str, scale: int) -> None:
    """Raise a UserError if a re-synthesizer does not enlarge a black test image by the factor `scale`."""
    if getattr(model, "scale", None) != scale:
        raise UserError(f"the re-synthesizer {name} must have the attribute scale = {scale}: set it in __init__")
    model.eval()
    x_hat = model(torch.zeros(1, 3, CHECKED_LOW_SIDE, CHECKED_LOW_SIDE))
    model.train()
    side = scale * CHECKED_LOW_SIDE
    if tuple(x_hat.shape) != (1, 3, side, side):
        raise UserError(
            f"the re-synthesizer {name} must enlarge images of {CHECKED_LOW_SIDE} x {CHECKED_LOW_SIDE} pixels to the"
            f" shape {(1, 3, side, side)}, got {tuple(x_hat.shape)}"
        )


@torch.no_grad()
def check_features(features: nn.Module, name: str, create: Callable[[], nn.Module]) -> None:
    """Raise a UserError if a feature network does not keep the rules in docs/extending.md.

    Args:
        create: function that creates the feature network again.

    Raises:
        UserError: if the shape of the feature maps does not match the attributes `channels` and `stride`.
        UserError: if the feature network modifies its input in place, or gets different weights when created again.
    """
    side = max(CHECKED_SIDE // features.stride, 1)  # height and width of the feature maps
    x = torch.rand(1, 3, side * features.stride, side * features.stride, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    maps = features(x)
    if not torch.equal(x, before):
        raise UserError(f"the feature network {name} modifies its input in place: clone the input in `forward`")
    if not hasattr(features, "load_pretrained") and compute_fingerprint(create()) != compute_fingerprint(features):
        raise UserError(
            f"the weights of the feature network {name} differ each time the network is created: set fixed weights in"
            " its __init__"
        )
    expected = (1, features.channels, side, side)
    if tuple(maps.shape) != expected:
        raise UserError(
            f"the feature network {name} returns feature maps of shape {tuple(maps.shape)} for an image of"
            f" {side * features.stride} x {side * features.stride} pixels, but its attributes channels ="
            f" {features.channels} and stride = {features.stride} require the shape {expected}: correct the attributes"
            " or the network"
        )


def require_integer_attributes(features: nn.Module, name: str) -> None:
    """Raise a UserError if the attribute `channels` or `stride` of a feature network is not an integer."""
    for attribute in ("channels", "stride"):
        if not isinstance(getattr(features, attribute, None), int):
            raise UserError(f"the feature network {name} must have an integer attribute {attribute}")


def require_source_and_fingerprint(record: object, name: str) -> None:
    """Raise a UserError if the method `load_pretrained` of a feature network has returned an unsuitable `record`."""
    if not isinstance(record, Mapping) or not {"source", "fingerprint"} <= record.keys():
        raise UserError(
            f"the method load_pretrained of the feature network {name} must return a dict with the keys source and"
            f" fingerprint, got {record!r}"
        )


def check_weights_against_recorded_fingerprint(module: nn.Module, recorded: object, what: str, name: str) -> None:
    """Raise a UserError if the weights of a network do not have the fingerprint that its checkpoint contains.

    Args:
        recorded: fingerprint in the checkpoint, or None if the checkpoint contains no fingerprint.
        what: kind of the network for the error message, such as "classifier".
        name: name of the checkpoint for the error message.
    """
    if recorded not in (None, compute_fingerprint(module)):
        raise UserError(
            f"{name} is damaged: the weights of the {what} have changed since the file was saved; use an undamaged copy"
            " of the file"
        )
