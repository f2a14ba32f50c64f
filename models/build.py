"""Creation of networks from command-line options and from checkpoints.

A detector has three parts: re-synthesizer, features and classifier. Three dicts in this file list the classes that
can be chosen for each part. To add a network, write a class and add one line to a dict (docs/extending.md). The name
and the arguments of each part are stored in config.json and in every checkpoint.

Training and testing choose the parts by one rule. What a checkpoint records is used. An option that contradicts the
checkpoint is an error. What neither checkpoint nor options say is as in the paper. Only parts that are going to be
trained start from random weights.
"""

import inspect
import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

from torch import Tensor, nn

from models.controls import Bicubic, NoResynthesis
from models.features import Pixels, VGG19Stage, features_of_stage, stages_with_channels
from models.rdn import RDN
from models.released import dilation_argument, rdn_from_weights, resnet_from_weights, state_dict_of
from models.resnet import DeepStemResNet
from models.resynthesis import ResynthesisDetector
from models.spectrum import ChannelPowerClassifier, SpectrumClassifier
from utils.checkpoints import Checkpoint, Fields, compute_fingerprint, load_weights
from utils.errors import UserError

logger = logging.getLogger(__name__)


class Resynthesizer(Protocol):
    """The interface of a re-synthesizer, an nn.Module: x_lr (B, 3, h, w) -> x_hat (B, 3, scale * h, scale * w).

    The values of x_lr are in [0, 1]. The values of x_hat may exceed [0, 1] a little.

    A re-synthesizer is created as RESYNTHESIZERS[name](scale=4, **args). The methods `set_tile(side)` and
    `initialize_as_interpolation()` are optional.
    """

    scale: int

    def __call__(self, x_lr: Tensor) -> Tensor: ...


class Features(Protocol):
    """The interface of features, an nn.Module: x (B, 3, H, W) -> (B, channels, H / stride, W / stride).

    Features are created as FEATURES[name](**args), and their parameters are never trained. Features with pretrained
    weights define `load_pretrained(source, trained_with, name)` as `VGG19Stage` does. The method `set_tile(side)` is
    optional.
    """

    channels: int
    stride: int

    def __call__(self, x: Tensor) -> Tensor: ...


# A classifier is any nn.Module: residual (B, channels, H_l, W_l) -> logits (B, 2), columns FAKE, REAL. It is created as
# CLASSIFIERS[name](channels, **args). If the classifier has an attribute `stride`, then train_detector.py warns of
# residuals that are not larger than this stride.

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
TORCHVISION = "torchvision:"  # --arch torchvision:NAME chooses the classifier NAME of torchvision.models

PAPER = {"resynthesizer": "rdn", "scale": 4, "stage": 0, "residual": "absolute", "classifier": "resnet50"}
RESIDUALS = ("absolute", "signed")
RDN_OPTIONS = ("num_features", "growth_rate", "num_blocks", "num_layers")  # released flags for arguments of RDN
OPTION_NAMES = (
    *("sr_arch", "sr_args", "scale", *RDN_OPTIONS),
    *("features", "feature_args", "stage"),
    *("residual", "arch", "arch_args", "in_channels", "dilated"),
)


# --- creation by name ---------------------------------------------------------------------------------------


def create(kind: str, entries: Mapping, name: str, /, *required, **arguments) -> nn.Module:
    """Create a network by its name in RESYNTHESIZERS, FEATURES or CLASSIFIERS.

    Args:
        kind: word for the network in error messages, such as "classifier".
        entries: the dict that holds the name.
        name: key of `entries`.
        required: positional arguments of the network.
        arguments: keyword arguments of the network, from options or from a checkpoint.

    Raises:
        UserError: if the name is not in the dict, or if the network does not accept the arguments.
    """
    if name not in entries:
        raise UserError(f"no {kind} is called {name!r}: expected one of {', '.join(entries)}")
    entry = entries[name]
    try:
        inspect.signature(entry).bind(*required, **arguments)
    except TypeError as error:
        raise UserError(f"{kind} {name}: {error}; {name} takes {inspect.signature(entry)}") from None
    return construct(f"{kind} {name}", entry, *required, **arguments)


def construct(what: str, entry: Callable[..., nn.Module], /, *required, **arguments) -> nn.Module:
    """Call the constructor of a network, and turn its exceptions into a UserError.

    The constructor is the first to check values from options and checkpoints, and each constructor raises exceptions of
    its own for wrong values.

    Args:
        what: the network, for the error message.
    """
    try:
        return entry(*required, **arguments)
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{what} cannot be created with {arguments}: {reason}") from None


def create_classifier(name: str, channels: int, arguments: Mapping) -> nn.Module:
    """Create a classifier by its name in CLASSIFIERS, or by a name "torchvision:NAME" from torchvision.models."""
    if name.startswith(TORCHVISION):
        return create_torchvision_classifier(name.removeprefix(TORCHVISION), channels, arguments)
    if name not in CLASSIFIERS:
        known = ", ".join(CLASSIFIERS)
        raise UserError(f"no classifier is called {name!r}: expected one of {known} or {TORCHVISION}NAME")
    return create("classifier", CLASSIFIERS, name, channels, **arguments)


def create_torchvision_classifier(name: str, channels: int, arguments: Mapping) -> nn.Module:
    """Create a classifier of torchvision.models with random weights, 2 outputs and `channels` input channels.

    The first convolution is replaced by a convolution with `channels` input channels.
    """
    import torchvision  # imported here, because the import takes longer than scoring an image

    if name not in torchvision.models.list_models(module=torchvision.models):
        raise UserError(f"torchvision.models has no classifier called {name!r}")
    entry = partial(torchvision.models.get_model, name, weights=None, num_classes=2)
    model = construct(f"torchvision's {name}", entry, **arguments)
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            owner, _, attribute = path.rpartition(".")
            setattr(model.get_submodule(owner), attribute, with_input_channels(module, channels))
            return model
    raise UserError(f"torchvision's {name} has no convolution that could read the residual")


def with_input_channels(convolution: nn.Conv2d, channels: int) -> nn.Conv2d:
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


# --- options and records of checkpoints ---------------------------------------------------------------------


def config_of(source: Checkpoint) -> Fields:
    """Return the values of a checkpoint's config, which are checked when they are read. Released files have none."""
    return Fields(source.content.get("config"), source.name, "config")


def part_of_config(source: Checkpoint, key: str) -> dict | None:
    """Return the record of one part of the detector in the config of a checkpoint.

    Args:
        key: "resynthesizer", "features" or "classifier".

    Returns:
        {"name", "args", "scale"}, or None if the config has no such record.

    Raises:
        UserError: if the record is not a dictionary, or if one of its values has a wrong type.
    """
    config = config_of(source)
    if not config.has_value(key):
        return None
    part = config.get_fields(key)
    return {
        "name": part.get_text("name"),
        "args": part.get_arguments("args"),
        "scale": part.get_integer("scale", 1, default=None),
    }


def fingerprint_of_config(source: Checkpoint, key: str) -> str | None:
    """Return the fingerprint under `key` in the config of a checkpoint, or None if there is none."""
    return config_of(source).get_text(key, default=None)


def vgg_of_config(source: Checkpoint, key: str) -> dict | None:
    """Return the record {"source", "fingerprint"} of VGG-19 weights in the config of a checkpoint, or None."""
    config = config_of(source)
    if not config.has_value(key):
        return None
    record = config.get_fields(key)
    return {"source": record.get_text("source"), "fingerprint": record.get_text("fingerprint", default=None)}


def choose(flag: str, given: object, found: object, default: object, name: str) -> object:
    """Return the first value that is not None: from the checkpoint, from the option, or the default.

    Args:
        flag: the option, for the error message.
        given: value of the option, or None.
        found: value in the checkpoint, or None.
        default: value to use if the other two are None.
        name: name of the checkpoint, for the error message.

    Raises:
        UserError: if the option and the checkpoint have different values.
    """
    if found is None:
        return default if given is None else given
    if given is not None and given != found:
        raise UserError(
            f"{flag} {given} contradicts the checkpoint {name}, which has {found}: leave {flag} out, or give a"
            f" checkpoint that was trained with {flag} {given}"
        )
    return found


def choose_arguments(flag: str, given: Mapping, found: Mapping | None, name: str) -> dict:
    """Return the keyword arguments of a network: from the checkpoint or, if `found` is None, from the option.

    Raises:
        UserError: if the option gives an argument that the checkpoint lacks or has with a different value.
    """
    if found is None:
        return dict(given)
    for key, value in given.items():
        if key in found and found[key] != value:
            raise UserError(
                f"{flag} {key}={value} contradicts the checkpoint {name}, which has {key}={found[key]}: leave"
                f" {key}={value} out, or give a checkpoint that was trained with {key}={value}"
            )
        if key not in found:
            raise UserError(f"{flag} {key}={value}: {name} was trained without {key}: leave {key} out")
    return dict(found)


# --- the re-synthesizer -------------------------------------------------------------------------------------


def resynthesizer_and_config(source: Checkpoint | None, options: Mapping) -> tuple[nn.Module, dict]:
    """Create a re-synthesizer and its config.

    Args:
        source: checkpoint with the weights. None: the weights are random.
        options: values of the options in OPTION_NAMES.

    Returns:
        the re-synthesizer, and its config {"name", "scale", "args"}.
    """
    given_name = options.get("sr_arch")
    given_args = {key: options[key] for key in RDN_OPTIONS if options.get(key) is not None}
    given_args |= options.get("sr_args") or {}
    state = recorded = None
    file = ""
    if source is not None:
        file = source.name
        state = state_dict_of(source.content, file)
        recorded = recorded_resynthesizer(source, state, given_name)
    found = recorded or {"name": None, "scale": None, "args": None}
    name = choose("--sr-arch", given_name, found["name"], PAPER["resynthesizer"], file)
    scale = choose("--sr-scale", options.get("scale"), found["scale"], PAPER["scale"], file)
    arguments = choose_arguments("--sr-args", given_args, found["args"], file)
    model = create("re-synthesizer", RESYNTHESIZERS, name, scale=scale, **arguments)
    if source is not None:
        load_weights(model, state, file)
        check_fingerprint(model, source.content.get("fingerprint"), "re-synthesizer", file)
    return model, {"name": name, "scale": scale, "args": arguments}


def recorded_resynthesizer(source: Checkpoint, state: Mapping[str, Tensor], given_name: str | None) -> dict | None:
    """Return the config {"name", "scale", "args"} of the re-synthesizer in a checkpoint.

    A checkpoint without a config is taken for an RDN, unless --sr-arch names a different network. The arguments of RDN
    are read from the shapes of the weights.

    Returns:
        the config, or None if the options must name the network.
    """
    recorded = part_of_config(source, "resynthesizer")
    if recorded is not None:
        return recorded
    if given_name in (None, "rdn"):
        scale, arguments = rdn_from_weights(state, source.name)
        return {"name": "rdn", "scale": scale, "args": arguments}
    return None


# --- the detector -------------------------------------------------------------------------------------------


def new_detector(
    resynthesizer: Checkpoint | None, options: Mapping, vgg_source: str
) -> tuple[ResynthesisDetector, dict]:
    """Create a detector with a trained re-synthesizer and a classifier with random weights.

    Args:
        resynthesizer: checkpoint with the weights of the re-synthesizer. None: the re-synthesizer must be one without
            weights, such as `--sr-arch none` or `--sr-arch bicubic`.
        options: values of the options in OPTION_NAMES.
        vgg_source: value of `--vgg-weights`.

    Returns:
        the detector, and its config.

    Raises:
        UserError: if `resynthesizer` is None for a network with weights, or if the options contradict each other.
    """
    model, resynthesizer_config = resynthesizer_and_config(resynthesizer, options)
    if resynthesizer is None and model.state_dict():
        raise UserError(
            f"no weights for the re-synthesizer {resynthesizer_config['name']}: give a file of weights from train_sr.py"
            " with --sr-weights-file, or choose --sr-arch none or bicubic, which need no weights"
        )
    arch = options.get("arch") or PAPER["classifier"]
    arguments = dilation_argument(arch, options.get("dilated") is False)
    if arguments.get("dilated") and options.get("dilated") is None and not options.get("arch_args"):
        warn_of_dilation("this new detector")
    arguments |= options.get("arch_args") or {}
    config = {
        "resynthesizer": resynthesizer_config,
        "features": features_from_options(options),
        "residual": options.get("residual") or PAPER["residual"],
        "classifier": {"name": arch, "args": arguments},
    }
    return assemble(model, config, options, vgg_source, None, "this new detector")


def load_detector(
    source: Checkpoint, resynthesizer: Checkpoint | None, options: Mapping, vgg_source: str
) -> tuple[ResynthesisDetector, dict]:
    """Load a trained detector.

    Args:
        source: checkpoint written by train_detector.py, or released checkpoint of a detector. A released checkpoint
            does not record stage, dilation and re-synthesizer, so that the options must name them.
        resynthesizer: checkpoint with the weights of the re-synthesizer. None: `source` holds these weights.
        options: values of the options in OPTION_NAMES.
        vgg_source: value of `--vgg-weights`.

    Returns:
        the detector, and its config.

    Raises:
        UserError: if the checkpoints, the VGG-19 weights and the options do not belong together.
    """
    content, name = source
    state = state_dict_of(content, name)
    model, resynthesizer_config = detector_resynthesizer(source, resynthesizer, options)
    config = {
        **(content.get("config") or {}),
        "resynthesizer": resynthesizer_config,
        "features": chosen_features(source, state, options),
        "residual": chosen_residual(source, options),
        "classifier": chosen_classifier(source, state, options),
    }
    trained_with = vgg_of_config(source, "vgg")
    if part_of_config(source, "features") is None:
        # Release: the released detectors were trained on VGG-19 features with torchvision's ImageNet weights
        trained_with = {"source": "imagenet"}
    detector, config = assemble(model, config, options, vgg_source, trained_with, name)
    load_weights(detector.classifier, state, name)
    check_fingerprint(detector.classifier, fingerprint_of_config(source, "classifier_fingerprint"), "classifier", name)
    expected = fingerprint_of_config(source, "resynthesizer_fingerprint")
    if expected not in (None, config["resynthesizer_fingerprint"]):
        raise UserError(
            f"{name} was trained with re-synthesizer weights of fingerprint {expected}, and {resynthesizer.name} has"
            f" the fingerprint {config['resynthesizer_fingerprint']}: give the re-synthesizer of this training with"
            " --sr-weights-file, or leave --sr-weights-file out if the detector's checkpoint holds the re-synthesizer"
        )
    return detector, config


def detector_resynthesizer(
    source: Checkpoint, resynthesizer: Checkpoint | None, options: Mapping
) -> tuple[nn.Module, dict]:
    """Create the re-synthesizer of a trained detector, and its config.

    Args:
        source: checkpoint of the detector.
        resynthesizer: checkpoint with the weights of the re-synthesizer. None: the weights inside `source` are used.
    """
    if resynthesizer is not None:
        return resynthesizer_and_config(resynthesizer, options)
    content, name = source
    if "sr_state_dict" not in content:
        raise UserError(f"{name} holds no re-synthesizer: give its weights with --sr-weights-file")
    expected = fingerprint_of_config(source, "resynthesizer_fingerprint")
    inside = {"state_dict": content["sr_state_dict"], "fingerprint": expected, "config": content.get("config")}
    return resynthesizer_and_config(Checkpoint(inside, name), options)


def chosen_features(source: Checkpoint, state: Mapping[str, Tensor], options: Mapping) -> dict:
    """Return {"name", "args"} of the features with which a detector was trained.

    Released checkpoints do not record the features. In this case, the features follow from the options and from the
    number of input channels of the classifier.

    Raises:
        UserError: if the options contradict the checkpoint.
    """
    name = source.name
    part = part_of_config(source, "features")
    if part is None:
        return released_features(state, options, name)
    stage = options.get("stage")
    if stage is not None and features_of_stage(stage) != (part["name"], part["args"]):
        has = " ".join([part["name"], *[f"{key}={value}" for key, value in part["args"].items()]])
        raise UserError(
            f"--idx-stages {stage} contradicts the checkpoint {name}, which has the features {has}: leave --idx-stages"
            f" out, or give a checkpoint that was trained with --idx-stages {stage}"
        )
    choose("--features", options.get("features"), part["name"], None, name)
    arguments = choose_arguments("--feature-args", options.get("feature_args") or {}, part["args"], name)
    return {"name": part["name"], "args": arguments}


def chosen_residual(source: Checkpoint, options: Mapping) -> str:
    """Return the kind of residual with which a detector was trained: "absolute" or "signed".

    Released detectors use absolute residuals.

    Raises:
        UserError: if `--residual` contradicts the checkpoint.
    """
    recorded = config_of(source).get_text("residual", RESIDUALS, default=PAPER["residual"])
    return choose("--residual", options.get("residual"), recorded, None, source.name)


def chosen_classifier(source: Checkpoint, state: Mapping[str, Tensor], options: Mapping) -> dict:
    """Return {"name", "args"} of the classifier in a detector's checkpoint.

    A released checkpoint does not record the classifier. Its ResNet is recognised by the shapes of the weights.

    Raises:
        UserError: if the options contradict the checkpoint.
    """
    name = source.name
    part = part_of_config(source, "classifier")
    given_args = dict(options.get("arch_args") or {})
    if part is None:
        arch, _ = resnet_from_weights(state, name)
        choose("--arch", options.get("arch"), arch, None, name)
        arguments = dilation_argument(arch, options.get("dilated") is False)
        if arguments.get("dilated") and options.get("dilated") is None:
            warn_of_dilation(name)
        return {"name": arch, "args": arguments | given_args}
    choose("--arch", options.get("arch"), part["name"], None, name)
    if options.get("dilated") is False and part["args"].get("dilated"):
        raise UserError(f"--no_dilation contradicts {name}, whose classifier is dilated: leave --no_dilation out")
    return {"name": part["name"], "args": choose_arguments("--arch-args", given_args, part["args"], name)}


def released_features(state: Mapping[str, Tensor], options: Mapping, name: str) -> dict:
    """Return {"name", "args"} of the features with which a released detector was trained.

    The features follow from the number of input channels of the classifier. If two stages have this number of channels,
    --idx-stages decides between them.
    """
    if options.get("features") is not None:
        return {"name": options["features"], "args": dict(options.get("feature_args") or {})}
    _, channels = resnet_from_weights(state, name)
    stages = stages_with_channels(channels)
    stage = options.get("stage")
    if stage is None and len(stages) == 1:
        stage = stages[0]
    if stage not in stages:
        raise UserError(
            f"the classifier in {name} takes residuals of {channels} channels, and the features of stages {stages} have"
            " this number: give the stage with which the detector was trained, by --idx-stages"
        )
    features, arguments = features_of_stage(stage)
    return {"name": features, "args": arguments}


def features_from_options(options: Mapping) -> dict:
    """Return {"name", "args"} of the features of a new detector, which --features or --idx-stages names."""
    given_args = dict(options.get("feature_args") or {})
    name = options.get("features")
    stage = options.get("stage")
    if name is not None and stage is not None:
        raise UserError(f"--idx-stages {stage} and --features {name} both choose the features: give only one of them")
    if name is not None:
        return {"name": name, "args": given_args}
    name, arguments = features_of_stage(PAPER["stage"] if stage is None else stage)
    return {"name": name, "args": arguments | given_args}


def assemble(
    resynthesizer: nn.Module,
    config: dict,
    options: Mapping,
    vgg_source: str,
    trained_with: Mapping | None,
    name: str,
) -> tuple[ResynthesisDetector, dict]:
    """Create a detector from a re-synthesizer and the config of the detector's parts.

    Args:
        resynthesizer: the re-synthesizer, with its weights.
        config: names and arguments of re-synthesizer, features and classifier, and the kind of residual.
        options: values of the options in OPTION_NAMES.
        vgg_source: value of `--vgg-weights`.
        trained_with: record of the VGG-19 weights with which the detector was trained. None: the detector is new.
        name: name of the detector's checkpoint, for error messages.

    Returns:
        the detector, and `config` with the fingerprint of the re-synthesizer and the record of the VGG-19 weights.
    """
    features = create("features", FEATURES, config["features"]["name"], **config["features"]["args"])
    in_channels = options.get("in_channels")
    if in_channels not in (None, features.channels):
        chosen = config["features"]["name"]
        raise UserError(f"--input-channel must be {features.channels} for the features {chosen}, got {in_channels}")
    vgg_record = None
    if hasattr(features, "load_pretrained"):
        vgg_record = features.load_pretrained(vgg_source, trained_with, name)
    features.requires_grad_(False)
    classifier = create_classifier(config["classifier"]["name"], features.channels, config["classifier"]["args"])
    if config["residual"] not in RESIDUALS:
        raise UserError(f"--residual must be one of {', '.join(RESIDUALS)}, got {config['residual']}")
    detector = ResynthesisDetector(resynthesizer, features, classifier, signed=config["residual"] == "signed")
    complete = {**config, "resynthesizer_fingerprint": compute_fingerprint(resynthesizer), "vgg": vgg_record}
    return detector, complete


def warn_of_dilation(name: str) -> None:
    """Warn that a ResNet is dilated by default. The weights do not show whether it was trained with dilation."""
    logger.warning(
        "WARNING: the ResNet of %s is DILATED, because --no_dilation is not given. All released scripts use"
        " --no_dilation, all released weights were trained with it, and a dilated ResNet gives different scores",
        name,
    )


def check_fingerprint(module: nn.Module, recorded: object, what: str, name: str) -> None:
    """Compare the weights of a network with the fingerprint in its checkpoint.

    Args:
        recorded: the fingerprint in the checkpoint. None: there is nothing to compare.
        what: word for the network in the error message, such as "classifier".
        name: name of the checkpoint, for the error message.

    Raises:
        UserError: if the fingerprints differ, because the weights have changed since they were saved.
    """
    if recorded not in (None, compute_fingerprint(module)):
        raise UserError(f"{name} is damaged: the weights of the {what} have changed since they were saved")
