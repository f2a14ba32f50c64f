"""Read the settings of networks from the config of a checkpoint, and compare command-line options with these settings.

If the checkpoint stores a setting, the stored value is used. An option that contradicts the checkpoint raises a
UserError.
"""

from collections.abc import Mapping

from utils.checkpoints import Checkpoint, Fields
from utils.errors import UserError


def read_config(checkpoint: Checkpoint) -> Fields:
    """Return the config of a checkpoint as a `Fields` object, whose get methods check the types of values.

    The `Fields` object of a checkpoint by the paper's authors is empty, because their checkpoints have no config.
    """
    return Fields(checkpoint.content.get("config"), checkpoint.name, "config")


def read_network_settings_of_config(checkpoint: Checkpoint, key: str) -> dict | None:
    """Read the settings of the re-synthesizer, feature network or classifier from the config of a checkpoint.

    Args:
        key: which settings to read: "resynthesizer", "features" or "classifier".

    Returns:
        a dict with the keys "name", "args" and "scale", or None if the config has no entry `key`. The value of "scale"
        is None if the entry contains no scale.

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


def read_fingerprint_of_config(checkpoint: Checkpoint, key: str) -> str | None:
    """Read the fingerprint of a network's weights from the config of a checkpoint.

    Args:
        key: entry of the config that contains the fingerprint, such as "classifier_fingerprint".

    Returns:
        the fingerprint, or None if the config has no entry `key`.
    """
    return read_config(checkpoint).get_text_field(key, default=None)


def read_vgg_source_and_fingerprint(checkpoint: Checkpoint, key: str) -> dict | None:
    """Return the source and the fingerprint of the VGG-19 weights with which a detector was trained.

    Args:
        key: entry of the config that describes the VGG-19 weights, such as "vgg".

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
        flag: name of the option for the error message, such as "--sr-scale".
        given: value of the option, or None if the option is not given.
        found: value in the checkpoint, or None if the checkpoint does not contain the value.
        default: value to use if `given` and `found` are None.
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
    """Choose the keyword arguments of a network. The checkpoint has priority over the option.

    Args:
        flag: name of the option for the error message, such as "--arch-args".
        given: keyword arguments from the option.
        found: keyword arguments from the checkpoint, or None if the checkpoint does not contain them.
        defaults: the default values of the network's constructor. The network in the checkpoint was created with the
            arguments in `found`, and with the default values of all other arguments.
        name: name of the checkpoint for the error message.

    Raises:
        UserError: if the option sets an argument that the network in the checkpoint does not have.
        UserError: if the option and the network in the checkpoint have different values of the same argument.
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
