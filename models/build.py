"""Create re-synthesizers and detectors from command-line options and from checkpoints.

To add a network, write a class and add one line to RESYNTHESIZERS, FEATURES or CLASSIFIERS (docs/extending.md). If
neither the checkpoint nor an option sets a value, the value in the paper is used, except that ResNet-50, ResNet-101 and
ResNet-152 have dilated convolutions, as in the code of the paper's authors.
"""

import inspect
import logging
import math
from collections.abc import Mapping
from functools import partial
from typing import Protocol

from torch import Tensor, nn

from models.checks import (
    check_features,
    check_resynthesizer,
    check_weights_against_recorded_fingerprint,
    require_integer_attributes,
    require_source_and_fingerprint,
)
from models.config import (
    choose_arguments_from_checkpoint_or_option,
    choose_value_from_checkpoint_or_option,
    describe_network,
    read_config,
    read_fingerprint_of_config,
    read_network_settings_of_config,
    read_vgg_source_and_fingerprint,
)
from models.controls import Bicubic, NoResynthesis
from models.creation import create_network, create_torchvision_classifier, refuse_user_values_of_fixed_arguments
from models.features import Pixels, VGG19Stage, find_stages_by_channel_count, get_features_name_and_arguments_of_stage
from models.rdn import RDN
from models.released import (
    convert_no_dilation_to_resnet_arguments,
    extract_state_dict,
    read_rdn_scale_and_arguments,
    read_resnet_name_and_channels,
)
from models.resnet import DeepStemResNet
from models.resynthesis import ResynthesisDetector
from models.spectrum import ChannelPowerClassifier, SpectrumClassifier
from utils.checkpoints import Checkpoint, compute_fingerprint, load_weights
from utils.errors import UserError

logger = logging.getLogger(__name__)


class Resynthesizer(Protocol):
    """A network that enlarges images x_lr (B, 3, h, w) to images x_hat (B, 3, scale * h, scale * w).

    The values of x_lr are in [0, 1]. The values of x_hat may be slightly outside [0, 1].

    A re-synthesizer is created as RESYNTHESIZERS[name](scale=4, **args). docs/extending.md describes optional methods
    of re-synthesizers.
    """

    scale: int

    def __call__(self, x_lr: Tensor) -> Tensor: ...


class Features(Protocol):
    """A network that computes feature maps (B, channels, H / stride, W / stride) of images x (B, 3, H, W).

    A feature network is created as FEATURES[name](**args). The weights of a feature network are never trained. A
    feature network with pretrained weights needs a method `load_pretrained`, like the one of `VGG19Stage`.
    docs/extending.md describes `load_pretrained` and the optional methods of feature networks.
    """

    channels: int
    stride: int

    def __call__(self, x: Tensor) -> Tensor: ...


# A classifier is an nn.Module that computes logits (B, 2) for FAKE and REAL from residuals (B, channels, H_l, W_l).
# A classifier is created as CLASSIFIERS[name](channels, **args).
# A classifier with batch norm should have an attribute `stride`, the stride of its last feature map.
# train_detector.py uses `stride` to refuse batches of one image if batch norm would get only one value per channel.

RESYNTHESIZERS = {"rdn": RDN, "bicubic": Bicubic, "none": NoResynthesis}
FEATURES = {"pixels": Pixels, "vgg19": VGG19Stage}
CLASSIFIERS = {
    "resnet18": partial(DeepStemResNet, arch="resnet18"),
    "resnet34": partial(DeepStemResNet, arch="resnet34"),
    "resnet50": partial(DeepStemResNet, arch="resnet50"),
    "resnet101": partial(DeepStemResNet, arch="resnet101"),
    "resnet152": partial(DeepStemResNet, arch="resnet152"),
    "spectrum": SpectrumClassifier,
    "channel_power": ChannelPowerClassifier,
}
TORCHVISION = "torchvision:"  # prefix of the names of torchvision classifiers, such as torchvision:vit_b_16

PAPER = {"resynthesizer": "rdn", "scale": 4, "stage": 0, "residual": "absolute", "classifier": "resnet50"}
RESIDUALS = ("absolute", "signed")
RDN_OPTIONS = ("num_features", "growth_rate", "num_blocks", "num_layers")  # options that only an RDN has
OPTION_NAMES = (
    *("sr_arch", "sr_args", "scale", *RDN_OPTIONS),
    *("features", "feature_args", "stage"),
    *("residual", "arch", "arch_args", "in_channels", "dilated"),
)


# --- creation by name ---------------------------------------------------------------------------------------


def get_default_arguments(entries: Mapping, name: str) -> dict:
    """Return the default values of the constructor arguments of a network, or {} if `entries` does not contain `name`.

    Checkpoints store the default values, so that a later change of a default value in the source code does not change
    trained networks. Only default values that are finite numbers, texts or bools are returned.
    """
    if name not in entries:  # the name of a torchvision classifier, or a wrong name, which later raises a UserError
        return {}
    parameters = list(inspect.signature(entries[name]).parameters.values())
    fixed = set(getattr(entries[name], "keywords", {}))  # names of the arguments that the program sets
    if entries is RESYNTHESIZERS:
        fixed.add("scale")
    elif entries is CLASSIFIERS:
        fixed.add(parameters[0].name)  # the first parameter of a classifier is `channels`
    defaults = {}
    for parameter in parameters:
        is_plain = type(parameter.default) in (bool, int, str)
        is_finite_float = type(parameter.default) is float and math.isfinite(parameter.default)
        if parameter.name not in fixed and (is_plain or is_finite_float):
            defaults[parameter.name] = parameter.default
    return defaults


def add_default_arguments(entries: Mapping, config: Mapping) -> dict:
    """Return the config of a network, a dict with the keys "name" and "args", with the default arguments added."""
    return {**config, "args": {**get_default_arguments(entries, config["name"]), **config["args"]}}


def create_classifier(name: str, channels: int, arguments: Mapping) -> nn.Module:
    """Create a classifier from its name in CLASSIFIERS, or from "torchvision:NAME" for a torchvision model."""
    if name.startswith(TORCHVISION):
        return create_torchvision_classifier(name.removeprefix(TORCHVISION), channels, arguments)
    if name not in CLASSIFIERS:
        known = ", ".join(CLASSIFIERS)
        raise UserError(
            f"unknown classifier {name!r}: expected one of {known}, {TORCHVISION}NAME, or a name that you have added"
            " (docs/extending.md)"
        )
    return create_network("classifier", CLASSIFIERS, name, channels, **arguments)


# --- the re-synthesizer -------------------------------------------------------------------------------------


def create_resynthesizer(checkpoint: Checkpoint | None, options: Mapping) -> tuple[nn.Module, dict]:
    """Create a re-synthesizer, and return it with its config, a dict with the keys "name", "scale" and "args".

    Args:
        checkpoint: checkpoint with the weights of the re-synthesizer, or None for random weights.
        options: values of the command-line options that OPTION_NAMES lists.
    """
    given_name = options.get("sr_arch")
    given_args = {key: options[key] for key in RDN_OPTIONS if options.get(key) is not None}
    given_args |= options.get("sr_args") or {}
    refuse_user_values_of_fixed_arguments("--sr-args", ["scale"], given_args)
    state = recorded = None
    file = ""
    if checkpoint is not None:
        file = checkpoint.name
        if "sr_state_dict" in checkpoint.content:
            raise UserError(
                f"{file} is a checkpoint of a detector: give a checkpoint of a re-synthesizer, such as last.pth or"
                " 0100_sr.pth.tar"
            )
        state = extract_state_dict(checkpoint.content, file)
        recorded = read_resynthesizer_config(checkpoint, state, given_name)
    found = recorded or {"name": None, "scale": None, "args": None}
    name = choose_value_from_checkpoint_or_option("--sr-arch", given_name, found["name"], PAPER["resynthesizer"], file)
    scale = choose_value_from_checkpoint_or_option(
        "--sr-scale", options.get("scale"), found["scale"], PAPER["scale"], file
    )
    defaults = get_default_arguments(RESYNTHESIZERS, name)
    arguments = choose_arguments_from_checkpoint_or_option("--sr-args", given_args, found["args"], defaults, file)
    model = create_network("re-synthesizer", RESYNTHESIZERS, name, scale=scale, **arguments)
    if checkpoint is None:
        check_resynthesizer(model, name, scale)
    else:
        load_weights(model, state, file)
        check_weights_against_recorded_fingerprint(model, checkpoint.content.get("fingerprint"), "re-synthesizer", file)
    return model, add_default_arguments(RESYNTHESIZERS, {"name": name, "scale": scale, "args": arguments})


def read_resynthesizer_config(
    checkpoint: Checkpoint, state: Mapping[str, Tensor], given_name: str | None
) -> dict | None:
    """Read the config of the re-synthesizer in a checkpoint.

    A checkpoint without a config must contain the weights of an RDN, unless `--sr-arch` names another network.

    Args:
        given_name: value of `--sr-arch`, or None if the option is not given.

    Returns:
        a dict with the keys "name", "scale" and "args", or None if the checkpoint has no config and `--sr-arch` names a
        network other than RDN.
    """
    recorded = read_network_settings_of_config(checkpoint, "resynthesizer")
    if recorded is not None:
        return recorded
    if given_name in (None, "rdn"):
        scale, arguments = read_rdn_scale_and_arguments(state, checkpoint.name)
        return {"name": "rdn", "scale": scale, "args": arguments}
    return None


# --- the detector -------------------------------------------------------------------------------------------


def create_detector(
    resynthesizer_checkpoint: Checkpoint | None, options: Mapping, vgg_source: str
) -> tuple[ResynthesisDetector, dict]:
    """Create a detector with a trained re-synthesizer and a classifier with random weights.

    Args:
        resynthesizer_checkpoint: checkpoint with the weights of the re-synthesizer, or None for `--sr-arch none` and
            `--sr-arch bicubic`, which have no weights.
        options: values of the command-line options that OPTION_NAMES lists.
        vgg_source: value of `--vgg-weights`.

    Returns:
        the detector, and its config.

    Raises:
        UserError: if the re-synthesizer needs weights, but `resynthesizer_checkpoint` is None.
        UserError: if the options contradict each other.
    """
    model, resynthesizer_config = create_resynthesizer(resynthesizer_checkpoint, options)
    if resynthesizer_checkpoint is None and model.state_dict():
        raise UserError(
            f"no weights for the re-synthesizer {resynthesizer_config['name']}: give a checkpoint of train_sr.py with"
            " --sr-weights-file, or choose --sr-arch none or bicubic, which need no weights"
        )
    arch = options.get("arch") or PAPER["classifier"]
    arguments = choose_classifier_arguments_from_options(arch, options, "this new detector")
    config = {
        "resynthesizer": resynthesizer_config,
        "features": create_features_config_from_options(options),
        "residual": options.get("residual") or PAPER["residual"],
        "classifier": {"name": arch, "args": arguments},
    }
    detector, config = assemble_detector(model, config, options, vgg_source, None, "this new detector")
    part = config["features"]
    create = partial(create_network, "feature network", FEATURES, part["name"], **part["args"])
    check_features(detector.features, part["name"], create)
    return detector, config


def load_detector(
    checkpoint: Checkpoint, resynthesizer_checkpoint: Checkpoint | None, options: Mapping, vgg_source: str
) -> tuple[ResynthesisDetector, dict]:
    """Load a trained detector from its checkpoint.

    Args:
        checkpoint: checkpoint of a detector, from train_detector.py or from the paper's authors. A checkpoint by the
            paper's authors does not store whether the ResNet is dilated, so users must give `--no_dilation` if the
            detector was trained with `--no_dilation`.
        resynthesizer_checkpoint: checkpoint with the weights of the re-synthesizer, or None if `checkpoint` contains
            these weights.
        options: values of the command-line options that OPTION_NAMES lists.
        vgg_source: value of `--vgg-weights`.

    Returns:
        the detector, and its config.

    Raises:
        UserError: if an option contradicts the checkpoint.
        UserError: if the weights of a network do not have the fingerprint that the checkpoint contains.
    """
    content, name = checkpoint
    state = extract_state_dict(content, name)
    model, resynthesizer_config = load_resynthesizer_of_detector(checkpoint, resynthesizer_checkpoint, options)
    config = {
        **(content.get("config") or {}),
        "resynthesizer": resynthesizer_config,
        "features": choose_features_config(checkpoint, state, options),
        "residual": choose_residual_kind(checkpoint, options),
        "classifier": choose_classifier_config(checkpoint, state, options),
    }
    trained_with = read_vgg_source_and_fingerprint(checkpoint, "vgg")
    if read_network_settings_of_config(checkpoint, "features") is None:
        # Release: in the detectors of the paper's authors, VGG-19 has torchvision's ImageNet weights.
        trained_with = {"source": "imagenet"}
    detector, config = assemble_detector(model, config, options, vgg_source, trained_with, name)
    load_weights(detector.classifier, state, name)
    check_weights_against_recorded_fingerprint(
        detector.classifier, read_fingerprint_of_config(checkpoint, "classifier_fingerprint"), "classifier", name
    )
    expected = read_fingerprint_of_config(checkpoint, "features_fingerprint")
    if expected not in (None, config["features_fingerprint"]):
        raise UserError(
            f"{name} was trained with other weights of the feature network {config['features']['name']} (fingerprint"
            f" {expected}), but the network now has weights with the fingerprint {config['features_fingerprint']}:"
            " change its class so that it creates the same weights every time, or loads them in a method"
            " load_pretrained (docs/extending.md)"
        )
    expected = read_fingerprint_of_config(checkpoint, "resynthesizer_fingerprint")
    if expected not in (None, config["resynthesizer_fingerprint"]):
        raise UserError(
            f"{name} was trained with a re-synthesizer with the fingerprint {expected}, but the re-synthesizer in"
            f" {resynthesizer_checkpoint.name} has the fingerprint {config['resynthesizer_fingerprint']}: leave"
            f" --sr-weights-file out to use the re-synthesizer in {name}"
        )
    return detector, config


def load_resynthesizer_of_detector(
    checkpoint: Checkpoint, resynthesizer_checkpoint: Checkpoint | None, options: Mapping
) -> tuple[nn.Module, dict]:
    """Create the re-synthesizer of a trained detector, and return it together with its config.

    Args:
        resynthesizer_checkpoint: checkpoint with the weights of the re-synthesizer, or None to use the weights in
            `checkpoint`.
    """
    if resynthesizer_checkpoint is not None:
        return create_resynthesizer(resynthesizer_checkpoint, options)
    content, name = checkpoint
    if "sr_state_dict" not in content:
        raise UserError(
            f"{name} contains no re-synthesizer: give a detector from train_detector.py; with a detector of the paper's"
            " authors, also give its re-synthesizer with --sr-weights-file"
        )
    expected = read_fingerprint_of_config(checkpoint, "resynthesizer_fingerprint")
    inside = {"state_dict": content["sr_state_dict"], "fingerprint": expected, "config": content.get("config")}
    return create_resynthesizer(Checkpoint(inside, name), options)


def choose_features_config(checkpoint: Checkpoint, state: Mapping[str, Tensor], options: Mapping) -> dict:
    """Return the name and the arguments of the feature network with which a detector was trained.

    For a checkpoint by the paper's authors, the features are inferred from the options and from the classifier's number
    of input channels.

    Raises:
        UserError: if the options contradict the checkpoint.
    """
    name = checkpoint.name
    part = read_network_settings_of_config(checkpoint, "features")
    if part is None:
        return infer_features_config_of_authors_checkpoint(state, options, name)
    defaults = get_default_arguments(FEATURES, part["name"])
    trained_with = (part["name"], {**defaults, **part["args"]})
    stage = options.get("stage")
    if stage is not None and get_features_name_and_arguments_of_stage(stage) != trained_with:
        raise UserError(
            f"--idx-stages {stage} contradicts the checkpoint {name}, which was trained with the features"
            f" {describe_network(part)}: leave --idx-stages out, or give a checkpoint that was trained with"
            f" --idx-stages {stage}"
        )
    choose_value_from_checkpoint_or_option("--features", options.get("features"), part["name"], None, name)
    arguments = choose_arguments_from_checkpoint_or_option(
        "--feature-args", options.get("feature_args") or {}, part["args"], defaults, name
    )
    return {"name": part["name"], "args": arguments}


def choose_residual_kind(checkpoint: Checkpoint, options: Mapping) -> str:
    """Return the kind of residual with which a detector was trained: "absolute" or "signed".

    The detectors of the paper's authors were trained with absolute residuals.

    Raises:
        UserError: if `--residual` contradicts the checkpoint.
    """
    recorded = read_config(checkpoint).get_text_field("residual", RESIDUALS, default=PAPER["residual"])
    return choose_value_from_checkpoint_or_option(
        "--residual", options.get("residual"), recorded, None, checkpoint.name
    )


def choose_classifier_config(checkpoint: Checkpoint, state: Mapping[str, Tensor], options: Mapping) -> dict:
    """Return the name and the arguments of the classifier in the checkpoint of a detector.

    For a checkpoint by the paper's authors, the names of the weights show which ResNet the classifier is.

    Raises:
        UserError: if the options contradict the checkpoint.
    """
    name = checkpoint.name
    part = read_network_settings_of_config(checkpoint, "classifier")
    if part is None:
        arch, _ = read_resnet_name_and_channels(state, name)
        choose_value_from_checkpoint_or_option("--arch", options.get("arch"), arch, None, name)
        return {"name": arch, "args": choose_classifier_arguments_from_options(arch, options, name)}
    choose_value_from_checkpoint_or_option("--arch", options.get("arch"), part["name"], None, name)
    if options.get("dilated") is False and part["args"].get("dilated"):
        raise UserError(f"--no_dilation contradicts {name}, whose classifier is dilated: leave --no_dilation out")
    arguments = choose_arguments_from_checkpoint_or_option(
        "--arch-args",
        options.get("arch_args") or {},
        part["args"],
        get_default_arguments(CLASSIFIERS, part["name"]),
        name,
    )
    return {"name": part["name"], "args": arguments}


def choose_classifier_arguments_from_options(arch: str, options: Mapping, name: str) -> dict:
    """Return the arguments of a new classifier, or of a classifier whose checkpoint does not contain the arguments.

    A ResNet-50, ResNet-101 or ResNet-152 is dilated, unless `--no_dilation` or `--arch-args` says otherwise.

    Args:
        name: name of the detector, for the warning that the ResNet is dilated although no option asks for dilation.
    """
    given_args = options.get("arch_args") or {}
    arguments = convert_no_dilation_to_resnet_arguments(arch, options.get("dilated") is False)
    if arguments.get("dilated") and options.get("dilated") is None and "dilated" not in given_args:
        warn_that_resnet_is_dilated(name)
    return {**arguments, **given_args}


def infer_features_config_of_authors_checkpoint(state: Mapping[str, Tensor], options: Mapping, name: str) -> dict:
    """Return the name and the arguments of the features with which the paper's authors trained a detector.

    Without `--features`, the number of input channels of the classifier determines the stage of the features. If two
    stages have the same number of channels, users must choose the stage with `--idx-stages`.
    """
    if options.get("features") is not None or options.get("feature_args"):
        return create_features_config_from_options(options)
    _, channels = read_resnet_name_and_channels(state, name)
    stages = find_stages_by_channel_count(channels)
    stage = options.get("stage")
    if stage is None and len(stages) == 1:
        stage = stages[0]
    if stage not in stages:
        raise UserError(
            f"the classifier in {name} needs --idx-stages to choose features with {channels} channels: expected a stage"
            f" in {stages}, got {stage}; give the stage with which the detector was trained"
        )
    features, arguments = get_features_name_and_arguments_of_stage(stage)
    return {"name": features, "args": arguments}


def create_features_config_from_options(options: Mapping) -> dict:
    """Return a dict with the keys "name" and "args" for the features that the options choose for a new detector."""
    given_args = dict(options.get("feature_args") or {})
    name = options.get("features")
    stage = options.get("stage")
    if name is not None and stage is not None:
        raise UserError(f"--idx-stages {stage} and --features {name} both choose the features: give only one of them")
    if name is None and given_args:
        raise UserError("--feature-args needs the name of the features: give --features NAME")
    if name is not None:
        return {"name": name, "args": given_args}
    name, arguments = get_features_name_and_arguments_of_stage(PAPER["stage"] if stage is None else stage)
    return {"name": name, "args": arguments}


def assemble_detector(
    resynthesizer: nn.Module,
    config: dict,
    options: Mapping,
    vgg_source: str,
    trained_with: Mapping | None,
    name: str,
) -> tuple[ResynthesisDetector, dict]:
    """Create a detector from a re-synthesizer, and from the features and the classifier that `config` describes.

    Args:
        config: names and arguments of re-synthesizer, features and classifier, and the kind of residual.
        vgg_source: value of `--vgg-weights`.
        trained_with: source and fingerprint of the VGG-19 weights with which the detector was trained, or None for a
            new detector.
        name: name of the detector's checkpoint, for error messages.

    Returns:
        the detector, and a copy of `config` with default arguments and with the entries "resynthesizer_fingerprint",
        "vgg" and "features_fingerprint". The entry "features_fingerprint" is None if the feature network has a method
        `load_pretrained`, because `load_pretrained` itself checks the fingerprint of the weights.
    """
    features = create_network("feature network", FEATURES, config["features"]["name"], **config["features"]["args"])
    require_integer_attributes(features, config["features"]["name"])
    in_channels = options.get("in_channels")
    if in_channels not in (None, features.channels):
        chosen = config["features"]["name"]
        raise UserError(
            f"--input-channel must be {features.channels}, the number of channels of the features {chosen}, got"
            f" {in_channels}: correct the number, or leave --input-channel out"
        )
    vgg_record = features_fingerprint = None
    if hasattr(features, "load_pretrained"):
        vgg_record = features.load_pretrained(vgg_source, trained_with, name)
        require_source_and_fingerprint(vgg_record, config["features"]["name"])
    else:
        features_fingerprint = compute_fingerprint(features)
    features.requires_grad_(False).eval()
    classifier = create_classifier(config["classifier"]["name"], features.channels, config["classifier"]["args"])
    if config["residual"] not in RESIDUALS:
        raise UserError(f"--residual must be one of {', '.join(RESIDUALS)}, got {config['residual']}")
    detector = ResynthesisDetector(resynthesizer, features, classifier, signed=config["residual"] == "signed")
    complete = {
        **config,
        "features": add_default_arguments(FEATURES, config["features"]),
        "classifier": add_default_arguments(CLASSIFIERS, config["classifier"]),
        "resynthesizer_fingerprint": compute_fingerprint(resynthesizer),
        "vgg": vgg_record,
        "features_fingerprint": features_fingerprint,
    }
    return detector, complete


def warn_that_resnet_is_dilated(name: str) -> None:
    """Warn that a ResNet is dilated because `--no_dilation` is not given."""
    logger.warning(
        "WARNING: the ResNet of %s is DILATED, because --no_dilation is not given. Dilation changes the scores, and the"
        " paper's authors trained all their detectors without dilation: give --no_dilation to load one of their"
        " detectors, or to train a detector with their settings",
        name,
    )
