"""The networks: `resynthesis.py` is the method; `build.py` the one place that knows all parts."""

from models.build import load_detector, load_resynthesizer, new_detector
from models.features import STAGE_CHANNELS, STAGES, VGGStages
from models.rdn import RDN, rdn_config
from models.resnet import SINGLE_IMAGE, DeepStemResNet, resnet_config
from models.resynthesis import ResynthesisDetector, downsample
from models.weights import fingerprint, load_vgg, load_weights, state_dict_of

