"""Command-line options of train_sr.py, train_detector.py and test.py, each declared once.

A flag that also exists in the code of the paper's authors has the same spelling here, so that their scripts keep
working. An option on the architecture of a network is None if it is not given, because the programs then use the value
in the checkpoint or in the paper.
"""

import argparse
import math
import sys
from collections.abc import Callable

from utils.console import describe_allowed_numbers, is_main_process, wait_while_main_process_prints_error

PRECISIONS = ("auto", "fp32", "tf32", "bf16", "fp16")

# --- parser and types ---------------------------------------------------------------------------------------


class HelpFormatter(argparse.HelpFormatter):
    """A help formatter with wider columns than argparse's default."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=110)


class Parser(argparse.ArgumentParser):
    """An argument parser that prints errors as one line and does not accept abbreviated flags."""

    def __init__(self, prog: str, description: str):
        super().__init__(prog=prog, description=description, allow_abbrev=False, formatter_class=HelpFormatter)

    def error(self, message: str):
        wait_while_main_process_prints_error()
        self.exit(2, f"error: {message}; {self.prog} --help lists the options\n")


class NoEffect(argparse.Action):
    """An argparse action that only prints that the flag has no effect."""

    def __init__(self, option_strings: list[str], dest: str, nargs: int | None = None):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=nargs, help=argparse.SUPPRESS)

    def __call__(self, parser, namespace, values, option_string=None):
        if is_main_process():
            sys.stderr.write(f"{option_string} has no effect here\n")


class KeyValues(argparse.Action):
    """An argparse action that makes a dict of numbers, bools and texts from values KEY=VALUE."""

    def __call__(self, parser, namespace, values, option_string=None):
        collected = dict(getattr(namespace, self.dest) or {})
        for text in values:
            key, equals, value = text.partition("=")
            if not equals or not key.isidentifier():
                parser.error(f"argument {option_string}: expected KEY=VALUE, got {text!r}")
            if key in collected:
                parser.error(f"argument {option_string}: {key} is given twice")
            collected[key] = parse_number_bool_or_text(value)
        setattr(namespace, self.dest, collected)


def parse_number_bool_or_text(text: str) -> int | float | bool | str:
    """Convert a text to an int, a finite float or a bool if possible, and otherwise return the text unchanged."""
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        if math.isfinite(value):
            return value
    return text


def create_argparse_number_type(kind: type, low: float = -math.inf, high: float = math.inf) -> Callable[[str], float]:
    """Create an argparse type for finite numbers of the type `kind` (int or float) from `low` to `high`."""

    def parse_number(text: str):
        value = kind(text)
        if not low <= value <= high or math.isinf(value):
            raise argparse.ArgumentTypeError(
                f"expected a finite number{describe_allowed_numbers(low, high)}, got {text}"
            )
        return value

    parse_number.__name__ = kind.__name__  # argparse uses this name in the error message "invalid int value"
    return parse_number


def parse_perturbation(text: str) -> tuple[str, float | None]:
    """Convert the text NAME or NAME=STRENGTH to the name and the strength of a perturbation.

    A text without =STRENGTH gives the strength None.
    """
    name, equals, strength = text.partition("=")
    return name, create_argparse_number_type(float)(strength) if equals else None


integer_from_0 = create_argparse_number_type(int, 0)
integer_from_1 = create_argparse_number_type(int, 1)
float_from_0 = create_argparse_number_type(float, 0)
fraction = create_argparse_number_type(float, 0, 1)


def add_accepted_but_ignored_flags(group: argparse._ArgumentGroup, *flags: str, nargs: int | None = None) -> None:
    """Add flags that are accepted but have no effect.

    Args:
        flags: for each flag, one text with all its spellings, such as "-p --print-freq".
        nargs: 0 for flags without a value, and None for flags with one value.
    """
    for spellings in flags:
        group.add_argument(*spellings.split(), action=NoEffect, nargs=nargs)


# --- options of several programs ----------------------------------------------------------------------------


def add_vgg_and_compute_options(parser: Parser) -> None:
    """Add options on VGG-19 weights, device, workers, precision and random numbers."""
    add_vgg_options(parser)
    add = parser.add_argument_group("run").add_argument
    add("--gpu", "--gpu-id", dest="gpu", metavar="N|cpu",
        help="number of a GPU, or cpu (default: 0, or cpu on a machine without a GPU)")  # fmt: skip
    add("-j", "--workers", "--num-workers", dest="workers", type=integer_from_0, default=4, metavar="N",
        help="number of worker processes that read images; 0: no worker processes (default: %(default)s)")  # fmt: skip
    add("--seed", type=integer_from_0, default=123, metavar="N",
        help="seed of all random numbers (default: %(default)s)")  # fmt: skip
    add("--precision", choices=PRECISIONS, default="auto",
        help="number format in which networks compute; auto = tf32 on a GPU (as in the code of the paper's authors),"
        " fp32 on a CPU")  # fmt: skip
    add("--deterministic", action="store_true",
        help="use reproducible algorithms on a GPU, which may be slower (default: the fastest algorithms)")  # fmt: skip


def add_vgg_options(parser: Parser) -> None:
    """Add the option for the source of the VGG-19 weights."""
    add = parser.add_argument_group("VGG-19").add_argument
    add("--vgg-weights", default="auto", metavar="auto|imagenet|random|FILE",
        help="weights of VGG-19. imagenet: ImageNet weights from torch hub's cache or by download. random: random"
        " weights from a fixed seed. FILE: a state dict of torchvision's vgg19. auto: the VGG-19 weights that were used"
        " when the loaded network was trained. In a new training, auto means imagenet, or random if the download fails"
        " (default: %(default)s)")  # fmt: skip


def add_resynthesizer_options(parser: Parser) -> None:
    """Add options for the architecture of the re-synthesizer."""
    group = parser.add_argument_group("re-synthesizer (default: as in its checkpoint, else the paper's RDN)")
    add = group.add_argument
    add("--sr-arch", metavar="NAME",
        help="super-resolution network: rdn, bicubic (interpolation), none (no re-synthesis), or a name that you have"
        " added to models.build.RESYNTHESIZERS. Use bicubic and none for control experiments (default:"
        " rdn)")  # fmt: skip
    add("--sr-args", action=KeyValues, nargs="+", metavar="KEY=VALUE",
        help="arguments of the super-resolution network that --sr-arch chooses")  # fmt: skip
    add("--sr-scale", "--scale", dest="scale", type=integer_from_1, metavar="N",
        help="factor by which images are reduced and enlarged; 2, 3 or 4 for RDN (paper: 4)")  # fmt: skip
    for name, text in (
        ("num-features", "RDN: channels between the blocks, G0 (paper: 64)"),
        ("growth-rate", "RDN: channels that each layer of a block adds, G (paper: 64)"),
        ("num-blocks", "RDN: residual dense blocks, D (paper: 16)"),
        ("num-layers", "RDN: layers in each block, C (paper: 8)"),
    ):
        add(f"--sr-{name}", f"--{name}", dest=name.replace("-", "_"), type=integer_from_1, metavar="N", help=text)


def add_detector_options(parser: Parser) -> None:
    """Add options for a detector: its features, residual, classifier, and file of re-synthesizer weights."""
    add = parser.add_argument_group("detector").add_argument
    add("--features", metavar="NAME",
        help="features from which the residual is computed: pixels, vgg19, or a name that you have added to"
        " models.build.FEATURES (default: the value in the checkpoint if there is one, otherwise pixels)")  # fmt: skip
    add("--feature-args", action=KeyValues, nargs="+", metavar="KEY=VALUE",
        help="arguments of the feature network that --features chooses, such as stage=3 for vgg19")  # fmt: skip
    add("--idx-stages", dest="stage", type=create_argparse_number_type(int, 0, 5), metavar="0..5",
        help="features from which the residual is computed, chosen by a number instead of --features: 0 = pixels; N"
        " from 1 to 5 = output of VGG-19's layer reluN_1")  # fmt: skip
    add("--residual", choices=("absolute", "signed"),
        help="signed = features of the re-synthesis minus features of the image; absolute = the absolute value of this"
        " difference, as in the paper (default: the value in the checkpoint if there is one, otherwise"
        " absolute)")  # fmt: skip
    add("-a", "--arch", metavar="NAME",
        help="classifier. resnet18, resnet34, resnet50, resnet101, resnet152: ResNets as in the code of the"
        " paper's authors. spectrum, channel_power: small classifiers for few training images. spectrum is meant for"
        " --residual signed, and channel_power for --features vgg19. torchvision:NAME: a classifier of torchvision."
        " You can add names to models.build.CLASSIFIERS (default: the value in the checkpoint if there is one,"
        " otherwise resnet50)")  # fmt: skip
    add("--arch-args", action=KeyValues, nargs="+", metavar="KEY=VALUE",
        help="arguments with which the classifier of --arch is created, such as hidden=4 for spectrum")  # fmt: skip
    add("--input-channel", dest="in_channels", type=integer_from_1, metavar="N",
        help="expected number of channels of the residual, such as 3 for pixels. The program stops with an error if the"
        " residual has another number of channels (default: any number of channels is accepted)")  # fmt: skip
    add("--no_dilation", dest="dilated", action="store_const", const=False,
        help="build layer3 and layer4 of the ResNet without dilated convolutions. All scripts of the paper's authors"
        " give this flag (default: the setting in the checkpoint if there is one, otherwise dilated"
        " convolutions)")  # fmt: skip
    add("--sr-weights-file", dest="resynthesizer_file", metavar="FILE",
        help="weights of the re-synthesizer: a checkpoint of train_sr.py, a checkpoint NNNN_sr.pth.tar of"
        " train_detector.py, or a file of weights from the paper's authors (default: the weights in the detector's"
        " checkpoint). A new detector needs this option, unless --sr-arch is none or bicubic")  # fmt: skip


def add_image_options(parser: Parser) -> None:
    """Add options that name labelled images, and options that resize and crop images."""
    add = parser.add_argument_group("images").add_argument
    add("--data-root-pos", dest="real_roots", nargs="+", metavar="DIR", help="folders of REAL images")
    add("--data-root-neg", dest="fake_roots", nargs="+", metavar="DIR",
        help="folders of FAKE images, one folder per generator")  # fmt: skip
    add("--data-root", dest="tree", metavar="DIR",
        help="instead of --data-root-pos and --data-root-neg: a folder with one folder GENERATOR per generator. Real"
        " images are in GENERATOR/0_real or GENERATOR/nature, and fake images in GENERATOR/1_fake or GENERATOR/ai."
        " Other folders may lie in between, as in GENERATOR/train/nature")  # fmt: skip
    add("--csv", metavar="FILE",
        help="instead of folders: a CSV file with the columns path,label[,generator]; a label is real or fake")  # fmt: skip
    add("--resize", type=integer_from_0, metavar="N",
        help="resize the shorter side of each image to N pixels; 0: do not resize (default of train_detector.py: 0;"
        " default of test.py: the value with which the detector was trained)")  # fmt: skip
    add("--crop-size", type=integer_from_0, metavar="N",
        help="crop each image to N x N pixels; 0: do not crop. Training images are cropped at random places. The option"
        " --crops of test.py sets the number of crops per image (default of train_detector.py: 0; default of test.py:"
        " the value with which the detector was trained)")  # fmt: skip


def add_training_options(parser: Parser, batch_size: int, lr: float, schedule: str, output: str) -> None:
    """Add options of both trainers, train_sr.py and train_detector.py.

    Args:
        schedule: name of the learning-rate schedule in the code of the paper's authors.
        output: flag of the output folder, such as "--output-path", for the help texts of --resume and --overwrite.
    """
    add = parser.add_argument_group("optimizer").add_argument
    add("-b", "--batch-size", type=integer_from_1, default=batch_size, metavar="N",
        help="number of images per training step, in all processes together (default: %(default)s)")  # fmt: skip
    add("--lr", "--learning-rate", type=float_from_0, default=lr, metavar="X",
        help="base learning rate (default: %(default)s)")  # fmt: skip
    add("--schedule", choices=(schedule, "cosine"), default=schedule,
        help=f"learning-rate schedule: {schedule} = as in the code of the paper's authors; cosine = a short"
        " warm-up, then a decrease to 0 along a cosine. Use cosine if there are few epochs (default:"
        " %(default)s)")  # fmt: skip
    add("--clip-norm", type=float_from_0, metavar="X",
        help="if the total norm of all gradients is above X, scale it down to X (default: gradients are not"
        " scaled)")  # fmt: skip
    group = parser.add_argument_group("checkpoints")
    add = group.add_argument
    add("--resume", metavar="FILE|auto",
        help=f"FILE: continue the run that has saved its state in FILE. auto: continue the run in {output}, or start a"
        f" new run if {output} holds no run. A FILE that holds only weights, such as a checkpoint of the paper's"
        " authors, starts a new run with these weights")  # fmt: skip
    add("--overwrite", action="store_true",
        help=f"start a new run in {output}, and delete the checkpoints and logged values of the earlier run in this"
        " folder")  # fmt: skip
    add("--save-minutes", type=float_from_0, default=15.0, metavar="X",
        help="save the training state every X minutes, even within an epoch (default: %(default)s)")  # fmt: skip
    add("--keep-last", type=integer_from_1, metavar="N",
        help="keep only the N newest numbered checkpoints (default: all)")  # fmt: skip
    add("--skip-bad", action="store_true",
        help="leave out images that cannot be used, such as damaged files (default: stop with an error)")  # fmt: skip


def add_ignored_options_of_authors(parser: Parser) -> None:
    """Add flags of train.py and test.py of the paper's authors that are accepted but have no effect."""
    group = parser.add_argument_group("released")
    add_accepted_but_ignored_flags(
        group, "--dataset", "--dataset_type", "--start-epoch", "-p --print-freq", "--world-size", "--rank",
        "--dist-url", "--dist-backend", "--carlibration", "--defense"
    )  # fmt: skip
    add_accepted_but_ignored_flags(group, "-e --evaluate", "--pretrained", "--multiprocessing-distributed", nargs=0)


# --- the programs -------------------------------------------------------------------------------------------


def create_train_sr_parser() -> Parser:
    """Create the argument parser of train_sr.py."""
    parser = Parser("train_sr.py", "Train the re-synthesizer: super-resolution on REAL images only.")
    add_vgg_and_compute_options(parser)
    add_resynthesizer_options(parser)
    add_training_options(parser, batch_size=12, lr=1e-4, schedule="steps", output="--outputs-dir")
    add = parser.add_argument_group("training").add_argument
    add("--train-file", metavar="FILE",
        help="text file with one path of a real training image per line, or a folder of real images")  # fmt: skip
    add("--eval-file", metavar="FILE",
        help="text file with one image path per line, or a folder of images; PSNR and SSIM are computed on these images"
        " after each epoch")  # fmt: skip
    add("--evaluate", action="store_true",
        help="do not train; compute PSNR and SSIM on the images of --eval-file, with the weights of"
        " --weights-file")  # fmt: skip
    add("--outputs-dir", default="output_hr", metavar="DIR",
        help="output folder; with --scale 4, the files are written into DIR/x4 (default: %(default)s)")  # fmt: skip
    add("--weights-file", dest="init", metavar="FILE",
        help="weights of a re-synthesizer: the initial weights of a new run, or the weights for"
        " --evaluate")  # fmt: skip
    add("--patch-size", type=integer_from_1, default=24, metavar="N",
        help="side length of a training patch in low-resolution pixels (default: %(default)s)")  # fmt: skip
    add("--patches-per-image", type=integer_from_1, default=1, metavar="N",
        help="number of patches from each image per epoch; 1 in the code of the paper's authors (default:"
        " %(default)s)")  # fmt: skip
    add("--start", choices=("random", "interpolation"), default="random",
        help="initial weights of a new network: random = PyTorch's default, as in the code of the paper's authors;"
        " interpolation = weights with which RDN enlarges images almost like bicubic interpolation (default:"
        " %(default)s)")  # fmt: skip
    add("--lr-decay", type=fraction, default=0.5, metavar="X",
        help="multiply the learning rate by X every --lr-decay-epoch epochs; X is between 0 and 1 (default:"
        " %(default)s)")  # fmt: skip
    add("--lr-decay-epoch", type=integer_from_1, default=225, metavar="N",
        help="number of epochs between two multiplications by --lr-decay (default: %(default)s)")  # fmt: skip
    add("--num-epochs", type=integer_from_1, default=750, metavar="N", help="number of epochs (default: %(default)s)")
    add("--num-save", type=integer_from_1, default=15, metavar="N",
        help="write a numbered checkpoint every N epochs (default: %(default)s)")  # fmt: skip
    add("--vgg-lambda", type=float_from_0, default=0.2, metavar="X",
        help="weight of the perceptual loss; 0 disables it (default: %(default)s)")  # fmt: skip
    add("--augment", action="store_true",
        help="add noise, JPEG compression or both to randomly chosen low-resolution training patches")  # fmt: skip
    add("--completion", action="store_true",
        help="turn 5 to 15 %% of the pixels black in randomly chosen low-resolution training patches")  # fmt: skip
    add("--colorization", action="store_true",
        help="turn 5 to 15 %% of the pixels grey in randomly chosen low-resolution training patches")  # fmt: skip
    return parser


def create_train_detector_parser() -> Parser:
    """Create the argument parser of train_detector.py."""
    text = "Train the detector on re-synthesis residuals: classifier only (--fixed-sr), or end to end."
    parser = Parser("train_detector.py", text)
    add_vgg_and_compute_options(parser)
    add_image_options(parser)
    add_resynthesizer_options(parser)
    add_detector_options(parser)
    add_training_options(parser, batch_size=10, lr=1e-2, schedule="released", output="--output-path")
    add_ignored_options_of_authors(parser)
    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--output-path", default="output", metavar="DIR", help="output folder (default: %(default)s)")
    add("--init", metavar="FILE", help="start a new run from the weights of the detector in FILE")
    add("--epochs", type=integer_from_1, default=100, metavar="N", help="number of epochs (default: %(default)s)")
    add("--optimizer", choices=("sgd", "adamw"), default="sgd",
        help="optimizer; the code of the paper's authors uses sgd (default: %(default)s)")  # fmt: skip
    add("--momentum", type=fraction, default=0.9, metavar="X", help="momentum of SGD (default: %(default)s)")
    add("--wd", "--weight-decay", dest="weight_decay", type=float_from_0, default=1e-4, metavar="X",
        help="weight decay (default: %(default)s)")  # fmt: skip
    add("--lr-sr", dest="classifier_rate_factor", type=float_from_0, default=0.02, metavar="X",
        help="set the learning rate of the CLASSIFIER to --lr times X, despite the name of the flag. The re-synthesizer"
        " learns at the rate --lr. X must be above 0 (default: %(default)s)")  # fmt: skip
    add("--fixed-sr", dest="fixed_resynthesizer", action="store_true", help="do not train the re-synthesizer")
    add("--mode-sr", dest="auxiliary", default="none", metavar="NAME",
        help="auxiliary task on which the re-synthesizer is fine-tuned: colorization, denoising, none, or a name that"
        " you have added to data.degradations.TASKS. With none, the re-synthesizer's inputs are not degraded"
        " (default: %(default)s)")  # fmt: skip
    add("--lw-sr", dest="auxiliary_weight", type=float_from_0, default=1.0, metavar="X",
        help="weight of the auxiliary loss, which is the re-synthesizer's error on real images. The value 0 or the flag"
        " --fixed-sr disables the auxiliary loss (default: %(default)s)")  # fmt: skip
    add("--save-every-epoch", type=integer_from_1, default=2, metavar="N",
        help="write a numbered checkpoint every N epochs (default: %(default)s)")  # fmt: skip
    add("--val-root-pos", dest="val_real_roots", nargs="+", metavar="DIR", help="folders of REAL validation images")
    add("--val-root-neg", dest="val_fake_roots", nargs="+", metavar="DIR",
        help="folders of FAKE validation images")  # fmt: skip
    add("--val-csv", metavar="FILE",
        help="instead of folders: a CSV file of validation images; the columns are the same as for --csv")  # fmt: skip
    add_accepted_but_ignored_flags(group, "--save_path")
    _add_memory_and_time_options(parser)
    return parser


def _add_memory_and_time_options(parser: Parser) -> None:
    """Add options of train_detector.py that affect memory and time."""
    add = parser.add_argument_group("memory and time").add_argument
    add("--micro-batch", type=integer_from_1, metavar="N",
        help="pass N images at a time through the re-synthesizer and the feature network, to save memory. The"
        " gradients are the same for every N, unless the re-synthesizer has batch norm. With N set and without --fixed-sr,"
        " each training step runs both networks forward twice (default: the whole batch)")  # fmt: skip
    add("--crops-per-image", dest="crops", type=integer_from_0, default=0, metavar="N",
        help="with --crop-size: train on N fixed crops of each image; 0 = train on one new random crop of each image per"
        " epoch (default: %(default)s)")  # fmt: skip
    add("--augment-perturb", action="store_true",
        help="in each epoch, perturb a random half of the training images by blur, crop, JPEG compression or noise, as in"
        " test.py --perturb-protocol frank2020")  # fmt: skip
    add("--no-cache", dest="cache", action="store_false",
        help="compute residuals again in each epoch. By default, training with --fixed-sr stores residuals on disk,"
        " unless random crops or --augment-perturb change the images in each epoch")  # fmt: skip
    add("--cache-dir", metavar="DIR",
        help="folder of stored residuals, which several runs may share (default:"
        " OUTPUT_PATH/residual_cache)")  # fmt: skip
    add("--cache-gb", type=float_from_0, default=50.0, metavar="X",
        help="store residuals only if they take at most X GB and the disk has enough space (default:"
        " %(default)s)")  # fmt: skip
    add("--cache-precision", choices=("fp16", "fp32"), default="fp16",
        help="number format of the stored residuals; fp16 is exact to 0.05 %%, and fp32 takes twice the space (default:"
        " %(default)s)")  # fmt: skip


def create_test_parser() -> Parser:
    """Create the argument parser of test.py."""
    parser = Parser("test.py", "Score images: labelled images with metrics, or any files and folders (--input).")
    add_vgg_and_compute_options(parser)
    add_image_options(parser)
    add_resynthesizer_options(parser)
    add_detector_options(parser)
    add_ignored_options_of_authors(parser)
    group = parser.add_argument_group("test")
    add = group.add_argument
    add("--resume", metavar="FILE", help="checkpoint of the detector")
    add("--input", nargs="+", metavar="PATH", help="image files or folders of images that are scored without labels")
    add("--save_path", "--save-path", dest="save_path", metavar="P",
        help="write P.csv (scores), P.npy (logits), P.json (metrics) and P.png (figure); P is a path without file"
        " ending")  # fmt: skip
    add("--save-residuals", metavar="DIR",
        help="for each image, write a picture of the image, its re-synthesis and the residual into DIR")  # fmt: skip
    add("--perturb", type=parse_perturbation, nargs="+", metavar="NAME[=STRENGTH]",
        help="perturb the images before scoring. With --perturb-protocol sweep, NAME is blur, jpeg, noise, resize, or a"
        " name that you have added to data.perturbations.SWEEP. With --perturb-protocol frank2020, NAME is blur, crop,"
        " jpeg, noise, or combined (these four, each with probability 0.5). NAME can also be none (unchanged images) or"
        " all (every NAME in turn). Several NAMEs give several scores per image. NAME=STRENGTH selects one strength of"
        " --perturb-protocol sweep, as in jpeg=70. NAME without STRENGTH selects all strengths (default:"
        " none)")  # fmt: skip
    add("--perturb-protocol", choices=("sweep", "frank2020"), default="sweep",
        help="how --perturb perturbs images. sweep: each image at fixed strengths. frank2020: each image with"
        " probability 0.5, at a random strength, as in Frank et al., ICML 2020 (default: %(default)s)")  # fmt: skip
    add("-b", "--batch-size", type=integer_from_1, metavar="N",
        help="largest number of images per batch (default: as many images as fit into 1024 x 1024 pixels in"
        " total)")  # fmt: skip
    add("--overwrite", action="store_true",
        help="score all images again, even if the files of --save_path already hold scores")  # fmt: skip
    add("--tile", type=create_argparse_number_type(int, 64), default=1024, metavar="N",
        help="let the networks process each image in tiles of at most N x N pixels; N is at least 64. A smaller N takes"
        " less memory and more time. Tiles change the logits by rounding errors only (default:"
        " %(default)s)")  # fmt: skip
    add("--crops", type=integer_from_1, metavar="N",
        help="score N crops that are spread over the image, and average their logits. --crop-size sets the size of the"
        " crops. 1: one crop in the centre (default: 9 if the crop size comes from the checkpoint, else"
        " 1)")  # fmt: skip
    add_accepted_but_ignored_flags(
        group, "--lr --learning-rate", "--momentum", "--wd --weight-decay", "--epochs", "--output-path",
        "--save-every-epoch", "--mode-sr", "--lr-sr", "--lw-sr"
    )  # fmt: skip
    add_accepted_but_ignored_flags(group, "--fixed-sr", nargs=0)
    return parser
