"""Names to classes, options to networks, checkpoints to networks.

Three dicts list the parts that there are. To add one, write a class and add a line here, or add an entry before `main`
runs: see docs/extending.md. The name and the arguments of each part are stored in config.json and in every checkpoint.

One rule holds for training and for testing: what a file says is used; an option that contradicts it is refused; what
neither says is the paper's. Only parts that are to be trained start from random weights.
"""

import inspect
import logging
from collections.abc import Mapping
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
from utils.checkpoints import Checkpoint, Fields, fingerprint, load_weights
from utils.errors import UserError

logger = logging.getLogger(__name__)


class Resynthesizer(Protocol):
    """An nn.Module: x_lr (B, 3, h, w) in [0, 1] -> x_hat (B, 3, scale * h, scale * w).

    It is created as RESYNTHESIZERS[name](scale=4, **args). `set_tile(side)` and `initialize_as_interpolation()` are
    optional.
    """

    scale: int

    def __call__(self, x_lr: Tensor) -> Tensor: ...


class Features(Protocol):
    """An nn.Module without trained parameters: x (B, 3, H, W) -> (B, channels, H / stride, W / stride).

    It is created as FEATURES[name](**args). Features with pretrained weights define `load_pretrained(source,
    trained_with, name)` as `VGG19Stage` does. `set_tile(side)` is optional.
    """

    channels: int
    stride: int

    def __call__(self, x: Tensor) -> Tensor: ...


# A classifier is any nn.Module: residual (B, channels, H_l, W_l) -> logits (B, 2), columns FAKE, REAL. It is created as
# CLASSIFIERS[name](channels, **args). With an attribute `stride`, a warning is given for residuals that are no larger.

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
TORCHVISION = "torchvision:"  # "torchvision:NAME" is any classifier of torchvision.models

PAPER = {"resynthesizer": "rdn", "scale": 4, "stage": 0, "residual": "absolute", "classifier": "resnet50"}
RESIDUALS = ("absolute", "signed")
RDN_OPTIONS = ("num_features", "growth_rate", "num_blocks", "num_layers")  # released flags, as further arguments
OPTION_NAMES = (
    *("sr_arch", "sr_args", "scale", *RDN_OPTIONS),
    *("features", "feature_args", "stage"),
    *("residual", "arch", "arch_args", "in_channels", "dilated"),
)


# --- one part by its name -----------------------------------------------------------------------------------


def create(kind: str, entries: Mapping, name: str, /, *required, **arguments) -> nn.Module:
    """Create a part from its entry in one of the dicts.

    Args:
        kind: what it is, for messages.

    Raises:
        UserError: for a name that is not in the dict, or arguments that the part does not take.
    """
    if name not in entries:
        raise UserError(f"no {kind} is called {name!r}: expected one of {', '.join(entries)}")
    entry = entries[name]
    try:
        inspect.signature(entry).bind(*required, **arguments)
    except TypeError as error:
        raise UserError(f"{kind} {name}: {error}; it takes {inspect.signature(entry)}") from None
    try:
        return entry(*required, **arguments)
    except UserError:
        raise
    except Exception as error:  # values of options and files reach the constructor unchecked
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{kind} {name} cannot be created with {arguments}: {reason}") from None


def create_classifier(name: str, channels: int, arguments: Mapping) -> nn.Module:
    """Create a classifier of CLASSIFIERS or, by the name "torchvision:NAME", one of torchvision.models."""
    if name.startswith(TORCHVISION):
        return create_torchvision_classifier(name.removeprefix(TORCHVISION), channels, arguments)
    if name not in CLASSIFIERS:
        known = ", ".join(CLASSIFIERS)
        raise UserError(f"no classifier is called {name!r}: expected one of {known} or {TORCHVISION}NAME")
    return create("classifier", CLASSIFIERS, name, channels, **arguments)


def create_torchvision_classifier(name: str, channels: int, arguments: Mapping) -> nn.Module:
    """Create a classifier of torchvision.models with 2 outputs and `channels` input channels, without weights.

    Its first convolution is replaced by one with that many input channels.
    """
    import torchvision  # here, because importing it takes longer than scoring an image

    if name not in torchvision.models.list_models(module=torchvision.models):
        raise UserError(f"torchvision.models has no classifier called {name!r}")
    try:
        model = torchvision.models.get_model(name, weights=None, num_classes=2, **arguments)
    except Exception as error:  # each of torchvision's classifiers checks its arguments in its own way
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"torchvision's {name} cannot be created with {dict(arguments)}: {reason}") from None
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            owner, _, attribute = path.rpartition(".")
            setattr(model.get_submodule(owner), attribute, with_input_channels(module, channels))
            return model
    raise UserError(f"torchvision's {name} has no convolution that could read the residual")


def with_input_channels(convolution: nn.Conv2d, channels: int) -> nn.Conv2d:
    """Create a convolution like this one, but for its number of input channels."""
    return nn.Conv2d(
        channels,
        convolution.out_channels,
        convolution.kernel_size,
        convolution.stride,
        convolution.padding,
        convolution.dilation,
        bias=convolution.bias is not None,
    )


# --- what options and files say -----------------------------------------------------------------------------


def part_of_config(source: Checkpoint, key: str) -> dict | None:
    """Return {"name", "args", "scale"} of a part as a checkpoint's config records it. None: it records nothing.

    Raises:
        UserError: if the record has another form.
    """
    config = Fields(source.content.get("config"), source.name, "config")
    if not config.has(key):
        return None
    part = config.fields(key)
    return {"name": part.text("name"), "args": part.arguments("args"), "scale": part.integer("scale", 1, default=None)}


def fingerprint_of_config(source: Checkpoint, key: str) -> str | None:
    """Return a fingerprint that a checkpoint's config records. None: it records none."""
    return Fields(source.content.get("config"), source.name, "config").text(key, default=None)


def vgg_of_config(source: Checkpoint, key: str) -> dict | None:
    """Return the record {"source", "fingerprint"} of VGG-19's weights in a checkpoint's config. None: there is none."""
    config = Fields(source.content.get("config"), source.name, "config")
    if not config.has(key):
        return None
    record = config.fields(key)
    return {"source": record.text("source"), "fingerprint": record.text("fingerprint", default=None)}


def choose(flag: str, given: object, found: object, default: object, name: str) -> object:
    """Return what a file says, else what was given, else the default.

    Raises:
        UserError: if something else was given than the file says.
    """
    if found is None:
        return default if given is None else given
    if given is not None and given != found:
        raise UserError(
            f"{flag} {given} contradicts {name}, which has {found}: leave the flag out, or give the checkpoint that"
            " belongs to it"
        )
    return found


def choose_arguments(flag: str, given: Mapping, found: Mapping | None, name: str) -> dict:
    """Return the further arguments of a part: the arguments in the file, else the given ones. See `choose`."""
    if found is None:
        return dict(given)
    for key, value in given.items():
        if key in found and found[key] != value:
            raise UserError(
                f"{flag} {key}={value} contradicts {name}, which has {key}={found[key]}: leave it out, or give the"
                " checkpoint that belongs to it"
            )
        if key not in found:
            raise UserError(f"{flag} {key}={value}: {name} was made without it")
    return dict(found)


# --- the re-synthesizer -------------------------------------------------------------------------------------


def load_resynthesizer(source: Checkpoint | None, options: Mapping) -> nn.Module:
    """Create a re-synthesizer: with the weights of a checkpoint or, without one, to be trained.

    Args:
        source: a file of train_sr.py or a released one.
        options: see OPTION_NAMES.
    """
    model, _ = resynthesizer_and_config(source, options)
    return model


def resynthesizer_and_config(source: Checkpoint | None, options: Mapping) -> tuple[nn.Module, dict]:
    """Create a re-synthesizer. Returns it with its config {"name", "scale", "args"}."""
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
    """Return {"name", "scale", "args"} as a file records it. None: it records nothing, and the options decide.

    Bare weights are taken for an RDN, whose arguments are read from their shapes, unless --sr-arch names another one.
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
    """Create a detector that is to be trained, on the residuals of a trained re-synthesizer.

    Args:
        resynthesizer: its file. None for a re-synthesizer without weights, as `--sr-arch none` and `bicubic`.
        options: see OPTION_NAMES.
        vgg_source: `--vgg-weights`.

    Returns:
        the detector, and its config.

    Raises:
        UserError: if no file is given for a re-synthesizer that has weights, or options contradict each other.
    """
    model, resynthesizer_config = resynthesizer_and_config(resynthesizer, options)
    if resynthesizer is None and model.state_dict():
        raise UserError(
            f"no weights for the re-synthesizer {resynthesizer_config['name']}: give them with --sr-weights-file"
            " (train_sr.py makes them), or choose --sr-arch none or bicubic, which have none"
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
    """Load a trained detector: a file of train_detector.py, or a released one.

    Args:
        source: the detector's file. Released ones leave stage, dilation and re-synthesizer to the options.
        resynthesizer: the re-synthesizer's own file. None if the detector's file holds it.
        options: see OPTION_NAMES.
        vgg_source: `--vgg-weights`.

    Returns:
        the detector, and its config.

    Raises:
        UserError: if the files, the VGG weights and the options do not belong together.
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
        trained_with = {"source": "imagenet"}  # Release: trained on the features of torchvision's ImageNet weights
    detector, config = assemble(model, config, options, vgg_source, trained_with, name)
    load_weights(detector.classifier, state, name)
    check_fingerprint(detector.classifier, fingerprint_of_config(source, "classifier_fingerprint"), "classifier", name)
    expected = fingerprint_of_config(source, "resynthesizer_fingerprint")
    if expected not in (None, config["resynthesizer_fingerprint"]):
        raise UserError(
            f"{name} was trained with the re-synthesizer {expected}, and {resynthesizer.name} is"
            f" {config['resynthesizer_fingerprint']}: leave --sr-weights-file out (the detector's file holds its own) or"
            " give the one it was trained with"
        )
    return detector, config


def detector_resynthesizer(
    source: Checkpoint, resynthesizer: Checkpoint | None, options: Mapping
) -> tuple[nn.Module, dict]:
    """Create a trained detector's re-synthesizer: from its own file if given, else from the detector's."""
    if resynthesizer is not None:
        return resynthesizer_and_config(resynthesizer, options)
    content, name = source
    if "sr_state_dict" not in content:
        raise UserError(f"{name} holds no re-synthesizer: give its weights with --sr-weights-file")
    expected = fingerprint_of_config(source, "resynthesizer_fingerprint")
    inside = {"state_dict": content["sr_state_dict"], "fingerprint": expected, "config": content.get("config")}
    return resynthesizer_and_config(Checkpoint(inside, name), options)


def chosen_features(source: Checkpoint, state: Mapping[str, Tensor], options: Mapping) -> dict:
    """Return {"name", "args"} of a trained detector's features: as recorded, which options must not contradict.

    Released files record nothing: their features follow from the options and the channels of the classifier.
    """
    name = source.name
    part = part_of_config(source, "features")
    if part is None:
        return released_features(state, options, name)
    stage = options.get("stage")
    if stage is not None and features_of_stage(stage) != (part["name"], part["args"]):
        has = " ".join([part["name"], *[f"{key}={value}" for key, value in part["args"].items()]])
        raise UserError(
            f"--idx-stages {stage} contradicts {name}, which has the features {has}: leave the flag out, or give the"
            " checkpoint that belongs to it"
        )
    choose("--features", options.get("features"), part["name"], None, name)
    arguments = choose_arguments("--feature-args", options.get("feature_args") or {}, part["args"], name)
    return {"name": part["name"], "args": arguments}


def chosen_residual(source: Checkpoint, options: Mapping) -> str:
    """Return "absolute" or "signed": as a config records it, which options must not contradict. Released: absolute."""
    recorded = Fields(source.content.get("config"), source.name, "config").text("residual", RESIDUALS, default=None)
    if part_of_config(source, "features") is None:
        recorded = recorded or PAPER["residual"]
    return choose("--residual", options.get("residual"), recorded, PAPER["residual"], source.name)


def chosen_classifier(source: Checkpoint, state: Mapping[str, Tensor], options: Mapping) -> dict:
    """Return {"name", "args"} of a trained classifier: as recorded or, of a released file, read from its weights."""
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
        raise UserError(f"--no_dilation contradicts {name}, whose classifier is dilated: leave the flag out")
    return {"name": part["name"], "args": choose_arguments("--arch-args", given_args, part["args"], name)}


def released_features(state: Mapping[str, Tensor], options: Mapping, name: str) -> dict:
    """Return {"name", "args"} of the features that a released detector was trained on."""
    if options.get("features") is not None:
        return {"name": options["features"], "args": dict(options.get("feature_args") or {})}
    _, channels = resnet_from_weights(state, name)
    stages = stages_with_channels(channels)
    stage = options.get("stage")
    if stage is None and len(stages) == 1:
        stage = stages[0]
    if stage not in stages:
        raise UserError(
            f"{name} takes residuals of {channels} channels, which stages {stages} have: give the --idx-stages it was"
            " trained with"
        )
    features, arguments = features_of_stage(stage)
    return {"name": features, "args": arguments}


def features_from_options(options: Mapping) -> dict:
    """Return {"name", "args"} of the features of a new detector: --features, else what --idx-stages stands for."""
    given_args = dict(options.get("feature_args") or {})
    name = options.get("features")
    stage = options.get("stage")
    if name is not None and stage is not None:
        raise UserError(f"--idx-stages {stage} and --features {name} both name the features: give one of them")
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
    """Put a detector together from its re-synthesizer and the config of its parts. Returns it with the whole config."""
    features = create("features", FEATURES, config["features"]["name"], **config["features"]["args"])
    in_channels = options.get("in_channels")
    if in_channels not in (None, features.channels):
        raise UserError(f"--input-channel must be {features.channels} for these features, got {in_channels}")
    vgg_record = None
    if hasattr(features, "load_pretrained"):
        vgg_record = features.load_pretrained(vgg_source, trained_with, name)
    features.requires_grad_(False)
    classifier = create_classifier(config["classifier"]["name"], features.channels, config["classifier"]["args"])
    if config["residual"] not in RESIDUALS:
        raise UserError(f"--residual must be one of {', '.join(RESIDUALS)}, got {config['residual']}")
    detector = ResynthesisDetector(resynthesizer, features, classifier, signed=config["residual"] == "signed")
    complete = {**config, "resynthesizer_fingerprint": fingerprint(resynthesizer), "vgg": vgg_record}
    return detector, complete


def warn_of_dilation(name: str) -> None:
    """Warn that a ResNet is dilated although nobody asked for it: dilation leaves no trace in the weights."""
    logger.warning(
        "WARNING: %s is DILATED, as in the release without --no_dilation. All released scripts and weights are made with"
        " --no_dilation, and scores differ without it",
        name,
    )


def check_fingerprint(module: nn.Module, recorded: object, what: str, name: str) -> None:
    """Compare weights with the fingerprint that was saved with them.

    Raises:
        UserError: if they differ, because the file has changed since.
    """
    if recorded not in (None, fingerprint(module)):
        raise UserError(f"{name} is damaged: the weights of its {what} differ from those that were saved")
