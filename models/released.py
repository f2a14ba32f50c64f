"""Read checkpoints by the paper's authors, and find the architecture of a network from the shapes of its weights.

The checkpoints by the paper's authors do not store the arguments of networks. The checkpoint of a detector by the
paper's authors is a dictionary with the keys "epoch", "arch", "state_dict" and "optimizer".
"""

from collections.abc import Mapping

from torch import Tensor

from models.resnet import BOTTLENECKS, LAYOUTS
from utils.errors import UserError

SHOWN_KEYS = 3  # maximum number of keys of a checkpoint that an error message lists
PREFIX = "module."  # prefix of the keys in a state dict if the network was wrapped in DataParallel


def extract_state_dict(content: Mapping, name: str) -> dict[str, Tensor]:
    """Return the state dict in a checkpoint, without the prefix "module." if all keys begin with this prefix.

    Args:
        content: the state dict itself, or a dictionary with the state dict under the key "state_dict".

    Raises:
        UserError: if the checkpoint contains no state dict.
    """
    state = content.get("state_dict", content)
    is_state_dict = isinstance(state, Mapping) and all(isinstance(value, Tensor) for value in state.values())
    if not is_state_dict:
        keys = ", ".join(str(key) for key in list(content)[:SHOWN_KEYS]) or "none"
        raise UserError(
            f"{name} contains no weights: expected a state dict, got a dictionary with the keys {keys}; give a file"
            " that contains the weights of a network"
        )
    if not all(key.startswith(PREFIX) for key in state):
        return dict(state)
    return {key.removeprefix(PREFIX): value for key, value in state.items()}


def read_rdn_scale_and_arguments(state: Mapping[str, Tensor], name: str) -> tuple[int, dict]:
    """Read the scale and the other arguments of an RDN from the names and shapes of its weights.

    Raises:
        UserError: if the state dict does not contain the weights of an RDN.
    """
    try:
        num_features = state["sfe1.weight"].shape[0]
        growth_rate = state["rdbs.0.layers.0.conv.weight"].shape[0]
        shuffled_channels = state["upscale.0.weight"].shape[0]
    except KeyError as error:
        first = next(iter(state), "none")
        raise UserError(
            f"{name} contains no RDN: its state dict has no key {error} (its first key is {first}); give a checkpoint"
            " of an RDN from train_sr.py or from the paper's authors; if the network is not an RDN, give its name with"
            " --sr-arch"
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


def read_resnet_name_and_channels(state: Mapping[str, Tensor], name: str) -> tuple[str, int]:
    """Read the architecture of a ResNet, such as "resnet50", and its number of input channels from its state dict.

    The weights do not show whether the ResNet is dilated.

    Raises:
        UserError: if the state dict does not contain the weights of a `models.resnet.DeepStemResNet`.
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
    found = f"a state dict whose first key is {next(iter(state))}" if state else "an empty state dict"
    raise UserError(
        f"{name} contains no detector: expected the weights of a ResNet ({', '.join(LAYOUTS)}) with the key"
        f" conv1.0.weight, got {found}; give a checkpoint of a detector from train_detector.py or from the paper's"
        " authors"
    )


def convert_no_dilation_to_resnet_arguments(arch: str, no_dilation: bool | None) -> dict:
    """Convert the option `--no_dilation` to the keyword argument {"dilated": True or False} of a ResNet.

    The result is {} for a ResNet-18 or ResNet-34, which cannot be dilated. Release: the code of the paper's authors
    dilates a ResNet-50, ResNet-101 or ResNet-152 unless `--no_dilation` is given.
    """
    if arch not in BOTTLENECKS:
        return {}
    return {"dilated": not no_dilation}
