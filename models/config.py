"""Read the settings of networks from the config of a checkpoint, and compare command-line options with these settings.

An option that contradicts the checkpoint raises a UserError.
"""

from collections.abc import Mapping

from utils.checkpoints import Checkpoint, Fields
from utils.errors import UserError


def read_config(checkpoint: Checkpoint) -> Fields:
    """Return the config of a checkpoint, which is empty for a checkpoint by the paper's authors."""
    return Fields(checkpoint.content.get("config"), checkpoint.name, "config")


def read_network_settings_of_config(checkpoint: Checkpoint, key: str) -> dict | None:
    """Read the settings of the re-synthesizer, feature network or classifier from the config of a checkpoint.

    Args:
        key: "resynthesizer", "features" or "classifier".

    Returns:
        a dict with the keys "name", "args" and "scale", or None if the config has no entry `key`.

    Raises:
        UserError: if the entry `key` of the config is not a dictionary, or contains a value of a wrong type.
    """
    config = read_config(checkpoint)
    if not config.has_value_other_than_none(key):
        return None
    part = config.get_nested_fields(key)
    return {
        "name": part.get_text_field("name"),
        "args": part.get_dict_of_keyword_arguments("args"),
        "scale": part.get_integer_field("scale", 1, default=None),
    }


def describe_network(part: Mapping) -> str:
    """Describe a network by its name and its arguments, such as "vgg19 stage=5".

    Args:
        part: dict with the keys "name" and "args".
    """
    return " ".join([part["name"], *[f"{key}={value}" for key, value in part["args"].items()]])


def read_fingerprint_of_config(checkpoint: Checkpoint, key: str) -> str | None:
    """Return the fingerprint in the entry `key` of a checkpoint's config, or None if the config has no such entry."""
    return read_config(checkpoint).get_text_field(key, default=None)


def read_vgg_source_and_fingerprint(checkpoint: Checkpoint, key: str) -> dict | None:
    """Return the source and the fingerprint of the VGG-19 weights with which a detector was trained.

    Returns:
        a dict with the keys "source" and "fingerprint", or None if the config of the checkpoint has no entry `key`.
    """
    config = read_config(checkpoint)
    if not config.has_value_other_than_none(key):
        return None
    record = config.get_nested_fields(key)
    return {
        "source": record.get_text_field("source"),
        "fingerprint": record.get_text_field("fingerprint", default=None),
    }


def choose_value_from_checkpoint_or_option(
    flag: str, given: object, found: object, default: object, name: str
) -> object:
    """Return the value in the checkpoint if there is one, else the value of the option, else the default value.

    Args:
        given: value of the option, or None if the option is not given.
        found: value in the checkpoint, or None if the checkpoint does not contain the value.
        name: name of the checkpoint for the error message.

    Raises:
        UserError: if the option contradicts the checkpoint.
    """
    if found is None:
        return default if given is None else given
    if given is not None and given != found:
        raise UserError(
            f"{flag} {given} contradicts the checkpoint {name}, which needs the value {found}: leave {flag} out, or"
            f" give a checkpoint that was trained with {flag} {given}"
        )
    return found


def choose_arguments_from_checkpoint_or_option(
    flag: str, given: Mapping, found: Mapping | None, defaults: Mapping, name: str
) -> dict:
    """Return the keyword arguments of a network from the checkpoint, or else from the option.

    Args:
        given: keyword arguments from the option.
        found: keyword arguments from the checkpoint, or None if the checkpoint does not contain keyword arguments.
        defaults: the default values of the network's constructor.
        name: name of the checkpoint for the error message.

    Raises:
        UserError: if the option sets an argument that the network in the checkpoint lacks or has with another value.
    """
    if found is None:
        return dict(given)
    trained_with = {**defaults, **found}
    for key, value in given.items():
        if key in trained_with and trained_with[key] != value:
            raise UserError(
                f"{flag} {key}={value} contradicts the checkpoint {name}, whose network was trained with"
                f" {key}={trained_with[key]}: leave {key}={value} out, or give a checkpoint that was trained with"
                f" {key}={value}"
            )
        if key not in trained_with:
            raise UserError(
                f"{flag} {key}={value} contradicts the checkpoint {name}, whose network was trained without {key}:"
                f" leave {key} out"
            )
    return dict(found)
