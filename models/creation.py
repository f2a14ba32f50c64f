"""Create networks by name, with an error message in one line if a name or an argument is wrong."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial

from torch import nn

from utils.errors import UserError, describe_exception

WITH_AUXILIARY_OUTPUTS = ("googlenet", "inception_v3")  # torchvision classifiers that also return auxiliary logits
TORCHVISION_STRIDE = 32  # stride of the last feature map of most torchvision classifiers


def create_network(kind: str, entries: Mapping, name: str, /, *required, **arguments) -> nn.Module:
    """Create a network by its name in RESYNTHESIZERS, FEATURES or CLASSIFIERS.

    Args:
        kind: kind of network for error messages, such as "classifier".

    Raises:
        UserError: if `entries` does not contain `name`, or if the network does not accept the arguments.
    """
    if name not in entries:
        raise UserError(
            f"unknown {kind} {name!r}: expected one of {', '.join(entries)}, or a name that you have added"
            " (docs/extending.md)"
        )
    entry = entries[name]
    refuse_user_values_of_fixed_arguments(f"{kind} {name}", getattr(entry, "keywords", {}), arguments)
    try:
        inspect.signature(entry).bind(*required, **arguments)
    except TypeError as error:
        raise UserError(
            f"the arguments of the {kind} {name} are wrong ({error}): expected arguments that fit the signature"
            f" {inspect.signature(entry)}"
        ) from None
    return construct_network_or_raise_user_error(f"{kind} {name}", entry, *required, **arguments)


def refuse_user_values_of_fixed_arguments(what: str, fixed: Iterable[str], arguments: Mapping) -> None:
    """Raise a UserError if `arguments` contains an argument in `fixed`, which users cannot choose."""
    refused = sorted(set(fixed) & arguments.keys())
    if refused:
        raise UserError(
            f"{what}: the argument {refused[0]} cannot be chosen, because the program sets it: remove {refused[0]}"
            " from the given arguments"
        )


def construct_network_or_raise_user_error(
    what: str, entry: Callable[..., nn.Module], /, *required, **arguments
) -> nn.Module:
    """Call the constructor of a network, and raise a UserError if the constructor does not accept the arguments.

    A NameError or AttributeError is raised unchanged, because such an error shows a mistake in the source code of the
    network. If `arguments` contains only the scale, every exception is raised unchanged, because no wrong argument has
    caused the exception.

    Args:
        what: name of the network for the error message, such as "classifier resnet50".
    """
    try:
        return entry(*required, **arguments)
    except (UserError, NameError, AttributeError):
        raise
    except Exception as error:
        if not arguments.keys() - {"scale"}:
            raise
        reason = f"{type(error).__name__}: {describe_exception(error)}"
        raise UserError(f"{what} cannot be created with the arguments {arguments}: {reason}") from None


def create_torchvision_classifier(name: str, channels: int, arguments: Mapping) -> nn.Module:
    """Create a classifier of torchvision.models with random weights, 2 outputs and `channels` input channels."""
    import torchvision  # imported here, because the import takes longer than scoring an image

    if name not in torchvision.models.list_models(module=torchvision.models):
        raise UserError(
            f"torchvision.models has no classifier called {name!r}: expected one of the names that"
            " torchvision.models.list_models(module=torchvision.models) returns"
        )
    fixed = {"weights": None, "num_classes": 2}
    if name in WITH_AUXILIARY_OUTPUTS:
        fixed["aux_logits"] = False
    refuse_user_values_of_fixed_arguments(f"torchvision's {name}", fixed, arguments)
    entry = partial(torchvision.models.get_model, name, **fixed)
    model = construct_network_or_raise_user_error(f"torchvision's {name}", entry, **arguments)
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        model.stride = TORCHVISION_STRIDE
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            owner, _, attribute = path.rpartition(".")
            setattr(
                model.get_submodule(owner), attribute, recreate_convolution_with_other_input_channels(module, channels)
            )
            return model
    raise UserError(
        f"torchvision's {name} has no convolution that could take the residual as input: choose another classifier"
        " with --arch"
    )


def recreate_convolution_with_other_input_channels(convolution: nn.Conv2d, channels: int) -> nn.Conv2d:
    """Create a convolution with the settings of `convolution`, but with `channels` input channels."""
    return nn.Conv2d(
        channels,
        convolution.out_channels,
        convolution.kernel_size,
        convolution.stride,
        convolution.padding,
        convolution.dilation,
        bias=convolution.bias is not None,
    )
