"""The networks: `resynthesis.py` is the method; `build.py` the one place that knows all parts."""

from models.build import Checkpoint, load_detector, load_resynthesizer, new_detector, read_checkpoint
from models.rdn import RDN, rdn_config
from models.resnet import SINGLE_IMAGE, DeepStemResNet, resnet_config
from models.resynthesis import ResynthesisDetector, downsample
from models.vgg import STAGE_CHANNELS, STAGES, VGGStages
from models.weights import fingerprint, load_vgg, load_weights, state_dict_of


def load(checkpoint: str, *arguments, **options):
    """A trained detector ready for use: see `utils.scoring.load`."""
    from utils.scoring import load as load_detector_for_use  # which stands on `data`, as the networks do not

    return load_detector_for_use(checkpoint, *arguments, **options)
