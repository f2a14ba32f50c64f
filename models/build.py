"""From options and checkpoints to networks with the right weights, or to one line that says what does not fit.

The rules are the same for training and for testing. What a file says wins; a flag that contradicts it is refused;
what neither says is the paper's. Weights are never made up: RDN and the classifier start from random numbers only
where they are what is to be trained.
"""

import logging
from collections.abc import Mapping

from models.features import STAGE_CHANNELS
from models.rdn import RDN, rdn_config
from models.resnet import DeepStemResNet, resnet_config
from models.resynthesis import ResynthesisDetector
from models.weights import fingerprint, load_vgg, load_weights, state_dict_of
from utils.checkpoints import Checkpoint
from utils.errors import UserError

logger = logging.getLogger(__name__)

PAPER_RESYNTHESIZER = {"scale": 4, "num_features": 64, "growth_rate": 64, "num_blocks": 16, "num_layers": 8}
PAPER_DETECTOR = {"arch": "resnet50", "stage": 0, "dilated": True}
FLAGS = {"stage": "--idx-stages", "arch": "--arch", "in_channels": "--input-channel", "dilated": "--no_dilation"}


def resolve(asked: Mapping, found: Mapping, default: Mapping, name: str) -> dict:
    """Each setting of `default`: as the file `name` has it, else as asked for, else the default.

    Raises:
        UserError: where something else is asked for than the file has.
    """
    for key in found.keys() & asked.keys():
        if asked[key] is not None and asked[key] != found[key]:
            flag = FLAGS.get(key, f"--sr-{key.replace('_', '-')}")
            raise UserError(
                f"{flag} {asked[key]} was given, and {name} has {found[key]} as its {key}: leave the flag out, or give"
                " the checkpoint that belongs to it"
            )
    wanted = {key: value for key, value in asked.items() if value is not None}
    return {key: found.get(key, wanted.get(key, value)) for key, value in default.items()}


def load_resynthesizer(source: Checkpoint | None, asked: Mapping) -> RDN:
    """RDN with the weights of a checkpoint, its shape read off them; without one, a new RDN to be trained.

    source: bare or under "state_dict", ours or the release's. asked: the shape flags (None: not given).
    """
    if source is None:
        return RDN(**resolve(asked, {}, PAPER_RESYNTHESIZER, ""))
    state = state_dict_of(source.content, source.name)
    model = RDN(**resolve(asked, rdn_config(state, source.name), PAPER_RESYNTHESIZER, source.name))
    load_weights(model, state, source.name)
    _check_fingerprint(model, source.content.get("fingerprint"), "RDN", source.name)
    return model


def new_detector(resynthesizer: Checkpoint, asked: Mapping, vgg_source: str) -> tuple[ResynthesisDetector, dict]:
    """A detector to be trained from scratch on the residuals of a trained RDN, and its config. asked: as below."""
    settings = resolve(asked, {}, PAPER_DETECTOR, "")
    resolve(asked, {"in_channels": STAGE_CHANNELS[settings["stage"]]}, {}, f"stage {settings['stage']}")
    return _assemble({"detector": settings}, resynthesizer, asked, vgg_source, "this new detector")


def load_detector(
    source: Checkpoint, resynthesizer: Checkpoint | None, asked: Mapping, vgg_source: str
) -> tuple[ResynthesisDetector, dict]:
    """A trained detector, of ours or of the release, and its config.

    Args:
        source: {"state_dict", ...}; ours carry "config" and RDN's weights, released ones leave stage, dilation and
            RDN to the flags.
        resynthesizer: RDN's own file; may be None where the detector's carries it.
        asked: the detector flags and RDN's shape flags (None: not given).

    Raises:
        UserError: if the two files, the VGG weights and the flags do not belong together.
    """
    content, name = source
    state, recorded = state_dict_of(content, name), content.get("config", {})
    found = {**resnet_config(state, name), **recorded.get("detector", {})}
    stages = [k for k, channels in enumerate(STAGE_CHANNELS) if channels == found["in_channels"]]
    settings = resolve(asked, found, PAPER_DETECTOR | {"stage": stages[0] if len(stages) == 1 else None}, name)
    if settings["stage"] not in stages:
        what = f"{found['in_channels']} channels, which stages {stages} have"
        raise UserError(f"{name} takes residuals of {what}: give the --idx-stages it was trained with")
    wanted = recorded.get("resynthesizer_fingerprint")
    if resynthesizer is None:
        if "sr_state_dict" not in content:
            raise UserError(f"{name} holds no re-synthesizer: give RDN's weights with --sr-weights-file")
        resynthesizer = Checkpoint({"state_dict": content["sr_state_dict"], "fingerprint": wanted}, name)
    # Release: its detectors were trained on the features of torchvision's ImageNet weights.
    known = {**recorded, "detector": settings, "vgg": recorded.get("vgg") or {"source": "imagenet"}}
    detector, config = _assemble(known, resynthesizer, asked, vgg_source, name)
    load_weights(detector.classifier, state, name)
    _check_fingerprint(detector.classifier, recorded.get("classifier_fingerprint"), "classifier", name)
    if wanted not in (None, config["resynthesizer_fingerprint"]):
        raise UserError(
            f"{name} was trained with the RDN {wanted}, and {resynthesizer.name} is"
            f" {config['resynthesizer_fingerprint']}: leave --sr-weights-file out (the detector's file holds its RDN)"
            " or give the one it was trained with"
        )
    return detector, config


def _assemble(
    config: dict, resynthesizer: Checkpoint, asked: Mapping, vgg_source: str, name: str
) -> tuple[ResynthesisDetector, dict]:
    """The detector of config["detector"], RDN and VGG loaded; config with all that is to be known of them."""
    arch, stage, dilated = (config["detector"][key] for key in ("arch", "stage", "dilated"))
    if dilated and asked.get("dilated") is None and "resynthesizer_fingerprint" not in config:
        # Dilation leaves no trace in the weights and changes every score: where nobody has asked for it, it is said
        logger.warning(
            "WARNING: %s is taken as DILATED, as in the release without --no_dilation; all released scripts and"
            " weights are of --no_dilation, without which their scores are others",
            name,
        )
    rdn = load_resynthesizer(resynthesizer, asked)
    vgg, record = load_vgg(vgg_source, config.get("vgg"), name) if stage > 0 else (None, None)
    known = {"resynthesizer": rdn_config(rdn.state_dict()), "resynthesizer_fingerprint": fingerprint(rdn)}
    detector = ResynthesisDetector(rdn, DeepStemResNet(arch, STAGE_CHANNELS[stage], dilated), stage, vgg)
    return detector, config | known | {"vgg": record}


def _check_fingerprint(module: RDN | DeepStemResNet, recorded: str | None, what: str, name: str) -> None:
    """Raise UserError if weights are not those that were saved: a bit of the file has changed since."""
    if recorded not in (None, fingerprint(module)):
        raise UserError(f"{name} is damaged: the weights of its {what} are not those that were saved; fetch it again")
