"""The file formats of the released code, and how an architecture is read from the shapes of released weights.

Released files carry no names: RDN's weights are a bare state dict or stand under "state_dict"; a detector's file is
{"epoch", "arch", "state_dict", "optimizer"}; keys may begin with DataParallel's "module.".
"""

from collections.abc import Mapping

from torch import Tensor

from models.resnet import BOTTLENECKS, LAYOUTS
from utils.errors import UserError

SHOWN_KEYS = 3  # number of keys that an error names
PREFIX = "module."  # added by DataParallel


def state_dict_of(content: Mapping, name: str) -> dict[str, Tensor]:
    """Return the weights in a checkpoint: bare or under "state_dict", with or without the prefix "module.".

    Args:
        content: of the file.
        name: of the file, for messages.

    Raises:
        UserError: if there are none.
    """
    state = content.get("state_dict", content)
    is_state_dict = isinstance(state, Mapping) and all(isinstance(value, Tensor) for value in state.values())
    if not is_state_dict:
        keys = ", ".join(str(key) for key in list(content)[:SHOWN_KEYS]) or "none"
        raise UserError(f"no weights in {name}: expected a state dict, got the keys {keys}")
    return {key.removeprefix(PREFIX): value for key, value in state.items()}


def rdn_from_weights(state: Mapping[str, Tensor], name: str) -> tuple[int, dict]:
    """Return the scale and the further arguments of the RDN that these weights belong to.

    Raises:
        UserError: if the weights belong to another network.
    """
    try:
        num_features = state["sfe1.weight"].shape[0]
        growth_rate = state["rdbs.0.layers.0.conv.weight"].shape[0]
        shuffled_channels = state["upscale.0.weight"].shape[0]
    except KeyError as error:
        first = next(iter(state), "none")
        raise UserError(
            f"{name} holds no RDN: expected the key {error}, got {len(state)} keys, the first is {first}; give a file"
            " written by train_sr.py or a released one"
        ) from None
    scale = 2
    if shuffled_channels == 9 * num_features:
        scale = 3
    elif "upscale.2.weight" in state:
        scale = 4
    blocks = {key.split(".")[1] for key in state if key.startswith("rdbs.")}
    layers = {key.split(".")[3] for key in state if key.startswith("rdbs.0.layers.")}
    arguments = {
        "num_features": num_features,
        "growth_rate": growth_rate,
        "num_blocks": len(blocks),
        "num_layers": len(layers),
    }
    return scale, arguments


def resnet_from_weights(state: Mapping[str, Tensor], name: str) -> tuple[str, int]:
    """Return the name and the input channels of the ResNet that these weights belong to.

    Dilation leaves no trace in the weights.

    Raises:
        UserError: if the weights belong to another network.
    """
    counts = []
    for stage in range(1, 5):
        blocks = {key.split(".")[1] for key in state if key.startswith(f"layer{stage}.")}
        counts.append(len(blocks))
    bottleneck = "layer1.0.conv3.weight" in state
    if "conv1.0.weight" in state:
        channels = state["conv1.0.weight"].shape[1]
        for arch, layout in LAYOUTS.items():
            if layout == tuple(counts) and (arch in BOTTLENECKS) == bottleneck:
                return arch, channels
    raise UserError(
        f"{name} holds no detector: its first key is {next(iter(state), 'none')}; give a file written by"
        f" train_detector.py or a released one ({', '.join(LAYOUTS)}, each with the deep stem conv1.0)"
    )


def dilation_argument(arch: str, no_dilation: bool | None) -> dict:
    """Return the classifier argument that `--no_dilation` stands for.

    Release: without `--no_dilation` a ResNet of bottlenecks is dilated. ResNet-18 and ResNet-34 have no dilated form.
    """
    if arch not in BOTTLENECKS:
        return {}
    return {"dilated": not no_dilation}
