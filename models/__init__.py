"""The networks: `resynthesis.py` is the method; `build.py` the one place that knows all parts."""

from models.build import (
    Checkpoint,
    build_detector,
    build_resynthesizer,
    load_detector,
    load_resynthesizer,
    load_vgg,
    new_detector,
)
from models.errors import ModelError
from models.rdn import RDN, rdn_config
from models.resnet import SINGLE_IMAGE, DeepStemResNet, resnet_config, trains_on_one
from models.resynthesis import ResynthesisDetector, downsample, residual_energy
from models.vgg import STAGE_CHANNELS, STAGES, VGGStages
from models.weights import fingerprint, load_weights, state_dict_of

__all__ = [
    "RDN",
    "SINGLE_IMAGE",
    "STAGES",
    "STAGE_CHANNELS",
    "Checkpoint",
    "DeepStemResNet",
    "ModelError",
    "ResynthesisDetector",
    "VGGStages",
    "build_detector",
    "build_resynthesizer",
    "downsample",
    "fingerprint",
    "load_detector",
    "load_resynthesizer",
    "load_vgg",
    "load_weights",
    "new_detector",
    "rdn_config",
    "residual_energy",
    "resnet_config",
    "state_dict_of",
    "trains_on_one",
]
