"""From options and checkpoints to networks with the right weights, or to one line that says what does not fit.

The rules are the same for training and for testing. What a file says wins; a flag that contradicts it is refused;
what neither says is the paper's. Weights are never made up: RDN and the classifier start from random numbers only
where they are what is to be trained.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from models.errors import ModelError
from models.rdn import RDN, rdn_config
from models.resnet import DeepStemResNet, resnet_config
from models.resynthesis import ResynthesisDetector
from models.vgg import STAGE_CHANNELS, VGGStages, vgg_weights
from models.weights import fingerprint, load_weights, state_dict_of

logger = logging.getLogger(__name__)

PAPER_RESYNTHESIZER = {"scale": 4, "num_features": 64, "growth_rate": 64, "num_blocks": 16, "num_layers": 8}
PAPER_DETECTOR = {"arch": "resnet50", "stage": 0, "dilated": True}
FLAGS = {"stage": "--idx-stages", "arch": "--arch", "in_channels": "--input-channel", "dilated": "--no_dilation"}


class Checkpoint(NamedTuple):
    """What was read from a file, and the file's name for messages."""

    content: Mapping
    name: str


def build_resynthesizer(config: Mapping) -> RDN:
    """The re-synthesizer of config["resynthesizer"] = {scale, num_features, growth_rate, num_blocks, num_layers}."""
    return RDN(**config["resynthesizer"])


def build_detector(config: Mapping) -> ResynthesisDetector:
    """The whole detector, its weights still to be loaded: "resynthesizer" as above, "detector" = {arch, stage, dilated}.

    Raises:
        ModelError: for a stage, architecture or scale there is none of.
    """
    arch, stage, dilated = (config["detector"][key] for key in ("arch", "stage", "dilated"))
    if stage not in range(len(STAGE_CHANNELS)):
        raise ModelError(f"no stage {stage}: it is 0 (pixels) or 1..5 (VGG-19 stages)")
    return ResynthesisDetector(
        resynthesizer=build_resynthesizer(config),
        classifier=DeepStemResNet(arch, STAGE_CHANNELS[stage], dilated),
        stage=stage,
        vgg=VGGStages() if stage > 0 else None,
    )


def resolve(asked: Mapping, found: Mapping, default: Mapping, name: str) -> dict:
    """Each setting of `default`: as the file `name` has it, else as asked for, else the default.

    Raises:
        ModelError: where something else is asked for than the file has.
    """
    for key in found.keys() & asked.keys():
        if asked[key] is not None and asked[key] != found[key]:
            flag = FLAGS.get(key, f"--sr-{key.replace('_', '-')}")
            raise ModelError(
                f"{flag} asks for {key} {asked[key]}, and {name} has {found[key]}: leave the flag out, or give"
                " the checkpoint that belongs to it"
            )
    wanted = {key: value for key, value in asked.items() if value is not None}
    return {key: found.get(key, wanted.get(key, value)) for key, value in default.items()}


def load_resynthesizer(checkpoint: Checkpoint | None, asked: Mapping) -> RDN:
    """RDN with the weights of a checkpoint, its shape read off them; without one, a new RDN to be trained.

    Args:
        checkpoint: bare or under "state_dict", ours or the release's.
        asked: the shape flags (None: not given).
    """
    if checkpoint is None:
        return RDN(**resolve(asked, {}, PAPER_RESYNTHESIZER, ""))
    state = state_dict_of(checkpoint.content, checkpoint.name)
    model = RDN(**resolve(asked, rdn_config(state, checkpoint.name), PAPER_RESYNTHESIZER, checkpoint.name))
    load_weights(model, state, checkpoint.name)
    return model


def load_vgg(source: str, trained_with: Mapping | None = None, name: str = "") -> tuple[VGGStages, dict]:
    """VGG-19, and the record {"source", "fingerprint"} of its weights that goes into checkpoints.

    Args:
        source: `--vgg-weights`, see `vgg_weights`.
        trained_with: the record in the checkpoint `name` these features will be used with; {"source": "imagenet"}
            without a fingerprint for a released one; None in a training from scratch.

    Raises:
        ModelError: if the weights are not the ones the checkpoint was trained with.
    """
    if source == "auto" and trained_with is not None:
        source = trained_with["source"]
        if source not in ("imagenet", "random") and not Path(source).is_file():
            raise ModelError(
                f"{name} was trained with the VGG-19 weights of {source}, which are not there: pass --vgg-weights FILE"
            )
    state, got = vgg_weights(source)
    if source == "auto" and got == "random":
        logger.warning(
            "WARNING: no ImageNet weights for VGG-19 on this machine and none to be downloaded. This training goes on"
            " with fixed-seed RANDOM VGG-19 weights, which is not what the paper does and will be recorded in its"
            " checkpoints; pass --vgg-weights FILE to use real ones."
        )
    vgg = VGGStages()
    load_weights(vgg, state, got)
    record = {"source": got, "fingerprint": fingerprint(vgg)}
    if trained_with is not None:
        wanted = trained_with.get("fingerprint")
        if wanted is None and got == "random":
            raise ModelError(f"{name} needs ImageNet weights for VGG-19, random ones were asked for: pass a FILE")
        if wanted is not None and wanted != record["fingerprint"]:
            raise ModelError(
                f"{name} was trained with the VGG-19 weights {wanted} ({trained_with['source']}), and"
                f" {got} has {record['fingerprint']}: pass --vgg-weights with the ones it was trained with"
            )
    return vgg, record


def new_detector(resynthesizer: Checkpoint, asked: Mapping, vgg_source: str) -> tuple[ResynthesisDetector, dict]:
    """A detector to be trained from scratch on the residuals of a trained RDN, and its config.

    Args:
        asked: the detector flags and RDN's shape flags (None: not given).
    """
    return _assemble({"detector": resolve(asked, {}, PAPER_DETECTOR, "")}, resynthesizer, asked, vgg_source)


def load_detector(
    checkpoint: Checkpoint, resynthesizer: Checkpoint | None, asked: Mapping, vgg_source: str
) -> tuple[ResynthesisDetector, dict]:
    """A trained detector, of ours or of the release, and its config.

    Args:
        checkpoint: {"state_dict", ...}; ours carry "config" and RDN's weights, released ones leave stage, dilation and
            RDN to the flags.
        resynthesizer: RDN's own file; may be None where the detector's carries it.
        asked: the detector flags and RDN's shape flags (None: not given).

    Raises:
        ModelError: if the two files, the VGG weights and the flags do not belong together.
    """
    content, name = checkpoint
    state = state_dict_of(content, name)
    recorded = content.get("config", {})
    found = {**resnet_config(state, name), **recorded.get("detector", {})}
    if "stage" not in found and asked.get("stage") is None:
        found["stage"] = _stage_of(found["in_channels"], name)
    config = {
        "detector": resolve(asked, found, PAPER_DETECTOR, name),
        # Release: its detectors were trained on the features of torchvision's ImageNet weights.
        "vgg": recorded.get("vgg") or {"source": "imagenet"},
    }
    stage = config["detector"]["stage"]
    if STAGE_CHANNELS[stage] != found["in_channels"]:
        raise ModelError(
            f"{name} takes residuals of {found['in_channels']} channels, and stage {stage} has"
            f" {STAGE_CHANNELS[stage]}: give the --idx-stages it was trained with"
        )
    if resynthesizer is None:
        if "sr_state_dict" not in content:
            raise ModelError(f"{name} holds no re-synthesizer: give RDN's weights with --sr-weights-file")
        resynthesizer = Checkpoint(content["sr_state_dict"], name)
    detector, config = _assemble(config, resynthesizer, asked, vgg_source, name)
    load_weights(detector.classifier, state, name)
    wanted = recorded.get("resynthesizer_fingerprint")
    if wanted not in (None, config["resynthesizer_fingerprint"]):
        raise ModelError(
            f"{name} was trained with the RDN {wanted}, and {resynthesizer.name} is"
            f" {config['resynthesizer_fingerprint']}: leave --sr-weights-file out (the detector's file holds its RDN)"
            " or give the one it was trained with"
        )
    return detector, config


def _assemble(
    config: dict, resynthesizer: Checkpoint, asked: Mapping, vgg_source: str, name: str = ""
) -> tuple[ResynthesisDetector, dict]:
    """The detector of config["detector"], RDN and VGG loaded; config with all that is to be known of them."""
    state = state_dict_of(resynthesizer.content, resynthesizer.name)
    shape = resolve(asked, rdn_config(state, resynthesizer.name), PAPER_RESYNTHESIZER, resynthesizer.name)
    stage = config["detector"]["stage"]
    if asked.get("in_channels") not in (None, STAGE_CHANNELS[stage]):
        raise ModelError(
            f"--input-channel {asked['in_channels']} contradicts stage {stage}, whose residual has"
            f" {STAGE_CHANNELS[stage]} channels: leave --input-channel out, it follows from --idx-stages"
        )
    config = {**config, "resynthesizer": shape}
    detector = build_detector(config)
    load_weights(detector.resynthesizer, state, resynthesizer.name)
    config["resynthesizer_fingerprint"] = fingerprint(detector.resynthesizer)
    if stage > 0:
        detector.vgg, config["vgg"] = load_vgg(vgg_source, config.get("vgg"), name)
    else:
        config["vgg"] = None
    return detector, config


def _stage_of(channels: int, name: str) -> int:
    """The stage whose residual has so many channels, where there is only one."""
    stages = [k for k, c in enumerate(STAGE_CHANNELS) if c == channels]
    if len(stages) != 1:
        raise ModelError(f"{name} takes {channels} channels, as stages 4 and 5 have: say which with --idx-stages")
    logger.info("%s takes %d channels: stage %d", name, channels, stages[0])
    return stages[0]
