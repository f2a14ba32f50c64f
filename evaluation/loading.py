"""Load a trained detector from a checkpoint, and check the checkpoint and the user's options."""

import logging
import os
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from data.images import SizePolicy, require_large_enough_crops
from evaluation.calibration import check_calibration
from evaluation.detector import Detector
from models.build import OPTION_NAMES, load_detector
from models.resynthesis import ResynthesisDetector
from utils.checkpoints import Fields, read_checkpoint_if_path_is_given
from utils.compute import Compute, choose_device_and_precision
from utils.console import make_printable
from utils.errors import UserError
from utils.options import PRECISIONS

logger = logging.getLogger(__name__)

DEFAULT_CROPS = 9  # number of crops per image, for a detector that was trained on crops (see docs/results.md)
IMAGE_OPTIONS = ("crop_size", "resize", "crops")
# The value of "no_dilation" is the opposite of the value of "dilated"
ALIASES = {"idx_stages": "stage", "no_dilation": "dilated"}  # name of a flag of test.py -> name of the option of `load`


class ImageSettings(NamedTuple):
    """How images are resized and cropped before they are scored."""

    crop_size: int | None  # side length of a crop in pixels; None if images are not cropped
    resize: int | None  # length of the shorter side after resizing, in pixels; None if images are not resized
    crops: int  # number of crops per image, over which the logits are averaged; 1 means a crop in the centre


def load(
    checkpoint: str | os.PathLike,
    device: str | int | torch.device | None = None,
    precision: str = "auto",
    resynthesizer: str | os.PathLike | None = None,
    vgg_weights: str = "auto",
    options: Mapping | None = None,
) -> Detector:
    """Load a detector from a checkpoint of train_detector.py or a checkpoint of the paper's authors.

    Args:
        device: a name for `torch.device`, such as "cpu" or "cuda:1", or the number of a GPU; None means the first GPU
            or, on a machine without a GPU, the CPU.
        precision: "auto" (tf32 on a GPU, fp32 on a CPU), "fp32", "tf32", "bf16" or "fp16".
        resynthesizer: path of the checkpoint of the re-synthesizer, which is needed only if `checkpoint` is a
            checkpoint of the paper's authors.
        vgg_weights: weights of VGG-19: "auto", "imagenet", "random" or the path of a file.
        options: settings that the checkpoints of the paper's authors do not store, as a dict {name: value} with names
            from `models.build.OPTION_NAMES`. "idx_stages" is another name for "stage", and "no_dilation" means the
            opposite of "dilated". The options "crop_size", "resize" (0 disables resizing) and "crops" override the
            settings used in training.

    Raises:
        UserError: if an argument is invalid or a file cannot be read.
        UserError: if the weights of the re-synthesizer, VGG-19 or the classifier differ from those used in training.
    """
    for name, path in (("checkpoint", checkpoint), ("vgg_weights", vgg_weights)):
        if not isinstance(path, str | os.PathLike):
            raise UserError(f"{name} must be a path, got {path!r}")
    if precision not in PRECISIONS:
        raise UserError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}")
    compute = choose_device_and_precision(convert_gpu_number_to_device_name(device), precision, deterministic=None)
    options = check_load_options({} if options is None else options)
    return detector_from_checkpoint(compute, checkpoint, resynthesizer, str(vgg_weights), options)


def detector_from_checkpoint(
    compute: Compute,
    checkpoint: str | os.PathLike,
    resynthesizer: str | os.PathLike | None,
    vgg_weights: str,
    options: Mapping,
) -> Detector:
    """Load a detector as `load` does, and move its network to `compute.device`."""
    source = read_checkpoint_if_path_is_given(checkpoint)
    network, config = load_detector(source, read_checkpoint_if_path_is_given(resynthesizer), options, vgg_weights)
    network.to(compute.device, memory_format=torch.channels_last).eval()
    trained = check_image_settings_in_config(config, source.name)
    settings = choose_resize_and_crop_settings(trained, options)
    log_resize_and_crop_settings(settings, trained, options)
    return Detector(
        network=network,
        compute=compute,
        policy=create_resize_and_crop_policy(network, settings),
        calibration=check_calibration(source.content.get("calibration"), source.name),
        config=config,
        trained_on=check_training_image_hashes(source.content.get("trained_on"), source.name),
        crops=settings.crops,
    )


def create_resize_and_crop_policy(network: ResynthesisDetector, settings: ImageSettings) -> SizePolicy:
    """Create the rule by which a detector resizes and crops images.

    Raises:
        UserError: if crops are too small for the network.
    """
    policy = SizePolicy(
        network.resynthesizer.scale, settings.crop_size, settings.resize, min_side=network.features.stride
    )
    require_large_enough_crops(policy)
    return policy


def convert_gpu_number_to_device_name(device: str | int | torch.device | None) -> str | torch.device | None:
    """Convert the number of a GPU to a device name, such as "cuda:1".

    On a machine without a GPU, `choose_device_and_precision` uses the CPU for a number, but raises a UserError for a
    device name such as "cuda:1".
    """
    is_number = isinstance(device, int) or (isinstance(device, str) and device.isdecimal())
    return f"cuda:{device}" if is_number else device


def select_settings_that_load_accepts(settings: Mapping) -> dict:
    """Select the entries of `settings` that `load` accepts in its argument `options`."""
    return {name: settings[name] for name in (*OPTION_NAMES, *IMAGE_OPTIONS) if name in settings}


def check_load_options(options: Mapping) -> dict:
    """Check the argument `options` of `load`, and replace "idx_stages" by "stage" and "no_dilation" by "dilated".

    Raises:
        UserError: if an option is unknown or its value is impossible.
    """
    known = (*OPTION_NAMES, *IMAGE_OPTIONS)
    if not isinstance(options, Mapping):
        raise UserError(f"options must be a dictionary with keys among {', '.join(known)}, got {options!r}")
    checked = {}
    for name, value in options.items():
        if name == "no_dilation":
            if not isinstance(value, bool):
                raise UserError(f"option no_dilation must be True or False, got {value!r}")
            value = not value
        target = ALIASES.get(name, name)
        if target not in known:
            raise UserError(f"unknown option {name!r}: expected one of {', '.join((*known, *ALIASES))}")
        if target in checked:
            raise UserError(f"option {target!r} is given twice, once under another name: give only {target!r}")
        checked[target] = value
    for name in IMAGE_OPTIONS:
        value = checked.get(name)
        if value is not None and not is_integer_at_least(value, lowest=1 if name == "crops" else 0):
            expected = "at least 1 (number of crops)" if name == "crops" else "at least 0 (number of pixels)"
            raise UserError(f"option {name} must be an integer of {expected}, got {value!r}")
    return checked


def is_integer_at_least(value: object, lowest: int) -> bool:
    """Return whether a value is an int, is not a bool, and is at least `lowest`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= lowest


def check_image_settings_in_config(config: Mapping, name: str) -> Mapping:
    """Check and return the entry "images" of a checkpoint's config, or return an empty dict without this entry.

    Raises:
        UserError: if the entry "images" contains an invalid value.
    """
    images = Fields(config.get("images"), name, "config.images")
    for key in ("crop_size", "resize"):
        images.get_integer_field(key, default=None)
    if images.has_value_other_than_none("sides"):
        sides = images.values["sides"]
        is_pair = isinstance(sides, list | tuple) and len(sides) == 2
        if not (is_pair and all(is_integer_at_least(side, lowest=1) for side in sides)):
            raise UserError(
                f"{make_printable(name)} is damaged: config.images.sides must be two positive integers, got {sides!r};"
                " use an undamaged copy"
            )
        images.get_number_field("jpegs", 0, 1)
    return images.values


def check_training_image_hashes(trained_on: object, name: str) -> Tensor | None:
    """Check that the hashes of the training images in a checkpoint are an int64 tensor (N, 2) or None.

    Raises:
        UserError: if `trained_on` is neither None nor an int64 tensor (N, 2).
    """
    is_table = isinstance(trained_on, Tensor) and trained_on.ndim == 2 and trained_on.shape[1] == 2
    if trained_on is None or (is_table and trained_on.dtype == torch.int64):
        return trained_on
    raise UserError(
        f"{make_printable(name)} is damaged: trained_on must be an int64 tensor (N, 2); use an undamaged copy"
    )


def choose_resize_and_crop_settings(trained: Mapping, options: Mapping) -> ImageSettings:
    """Choose how images are resized and cropped.

    If the user does not choose "crop_size" or "resize", the value from training is used.

    Args:
        trained: the values of "crop_size" and "resize" used in training, as far as the checkpoint stores them.
        options: the values of "crop_size", "resize" (0 disables resizing) and "crops", as far as the user chose them.

    Raises:
        UserError: if several crops are requested, but no crop size is known.
    """
    chosen = {}
    for name in ("crop_size", "resize"):
        value = trained.get(name) if options.get(name) is None else options[name]
        chosen[name] = value or None
    crops = options.get("crops")
    if crops is None:
        crops_as_in_training = chosen["crop_size"] is not None and options.get("crop_size") is None
        crops = DEFAULT_CROPS if crops_as_in_training else 1
    if crops > 1 and chosen["crop_size"] is None:
        raise UserError(f"--crops {crops} needs a crop size: give --crop-size N, where N is a number of pixels")
    return ImageSettings(chosen["crop_size"], chosen["resize"], crops)


def log_resize_and_crop_settings(settings: ImageSettings, trained: Mapping, options: Mapping) -> None:
    """Log the settings that are taken from training and the number of crops, and warn if other settings are chosen."""
    for name in ("crop_size", "resize"):
        flag = f"--{name.replace('_', '-')}"
        used = getattr(settings, name)
        in_training = trained.get(name) or None
        if options.get(name) is None and in_training:
            text = "the option %s is set to %d pixels, as in training; give %s 0 to disable the option"
            logger.info(text, flag, in_training, flag)
        elif trained and used != in_training:
            text = "warning: %s is %d, and training had %s: the scores may be less accurate"
            logger.warning(text, flag, used or 0, in_training or "none")
    if settings.crops > 1:
        text = "the logits of an image larger than a crop are the mean over %d crops; --crops N changes the number"
        logger.info(text, settings.crops)
