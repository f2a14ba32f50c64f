"""The options of the programs, each declared once. The defaults are the paper's. Nothing slow is imported here.

Flags keep the spelling of the released code, so that its users' scripts go on working; `dest` gives them the names
used inside. Options read off a checkpoint (the networks' shapes) default to None: what the file says, and where there
is no file, the paper's.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

PRECISIONS = ("auto", "fp32", "tf32", "bf16", "fp16")
ARCHITECTURES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
PERTURBATIONS = ("none", "blur", "crop", "jpeg", "noise", "resize", "combined")
PERTURBATION_PROTOCOLS = ("frank2020", "sweep")
TASKS = ("none", "colorization", "denoising")
MISTAKE_DELAY = 3  # seconds after which a process other than the main one tells a mistake: all may have found it


def is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and whose flags are spelled out."""

    def __init__(self, prog: str, description: str):
        formatter = partial(argparse.HelpFormatter, max_help_position=34, width=110)
        super().__init__(prog=prog, description=description, allow_abbrev=False, formatter_class=formatter)

    def error(self, message: str):
        if not is_main_process():
            time.sleep(MISTAKE_DELAY)  # the main process says the same, and this one is ended meanwhile
        self.exit(2, f"error: {message}; {self.prog} --help lists the options\n")


class NoEffect(argparse.Action):
    """A flag that is accepted and does nothing: of the released program, or one that was dropped. One line says so."""

    def __call__(self, parser, namespace, values, option_string=None):
        if is_main_process():
            sys.stderr.write(f"{option_string} has no effect here\n")


class Group:
    """Options of one group of a parser: add("-x --long", "help", type, default, more for argparse)."""

    def __init__(self, parser: Parser, title: str):
        self.group = parser.add_argument_group(title)

    def add(self, flags: str, text: str, kind: Callable | None = None, default=None, **more) -> None:
        """The default, if there is one, is shown behind the text."""
        if default is not None:
            more["default"], text = default, f"{text} (default: {default})"
        if kind is not None:
            more = {"type": kind, "metavar": "X" if kind.__name__ == "float" else "N", **more}
        self.group.add_argument(*flags.split(), help=text, **more)

    def switch(self, flags: str, text: str, **more) -> None:
        """An option without a value, off by default."""
        self.group.add_argument(*flags.split(), help=text, **{"action": "store_true", **more})

    def dropped(self, flags: str, takes: int | None = None) -> None:
        """Accept a flag that does nothing. takes: 0 if it has no value."""
        hidden = {"dest": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        self.group.add_argument(*flags.split(), action=NoEffect, nargs=takes, **hidden)


def number(kind: type, low: float = -math.inf, high: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a finite int or float from `low` to `high`."""

    def parse(text: str):
        value = kind(text)
        if not low <= value <= high or math.isinf(value):
            raise argparse.ArgumentTypeError(f"{text} (wanted: a number from {low} to {high})")
        return value

    parse.__name__ = kind.__name__  # argparse names it in its errors
    return parse


def perturbation(text: str) -> tuple[str, float | None]:
    """An argparse type: NAME or NAME=STRENGTH."""
    name, given, strength = text.partition("=")
    if name not in (*PERTURBATIONS, "all"):
        raise argparse.ArgumentTypeError(f"no perturbation {name!r}: {', '.join(PERTURBATIONS)} or all was wanted")
    return name, number(float)(strength) if given else None


count, at_least_one, weight, share = number(int, 0), number(int, 1), number(float, 0), number(float, 0, 1)


# --- options that programs share ----------------------------------------------------------------------------


def run_options(parser: Parser) -> None:
    """How any of the programs runs."""
    vgg_options(parser)
    run = Group(parser, "run")
    run.add("--gpu --gpu-id", "GPU number, or cpu (default: GPU 0 if there is one)", dest="gpu", metavar="N|cpu")
    run.add("-j --workers --num-workers", "processes that read images; 0: only this one", count, 4, dest="workers")
    run.add("--seed", "fixes everything random", count, 123)
    text = "number format of the networks' arithmetic; auto = tf32 on a GPU, as the release ran, and fp32 on a CPU"
    run.add("--precision", text, default="auto", choices=PRECISIONS)
    run.switch("--deterministic", "reproducible, perhaps slower algorithms on a GPU (default: the fastest it has)")


def vgg_options(parser: Parser) -> None:
    """Where the features come from."""
    Group(parser, "VGG-19").add("--vgg-weights", "ImageNet weights from torch hub's cache or by download; a"
        " fixed-seed stand-in; a torchvision vgg19 state dict; auto = ImageNet if it can be had, else, in training"
        " from scratch, random", default="auto", metavar="auto|imagenet|random|FILE")  # fmt: skip


def resynthesizer_options(parser: Parser) -> None:
    """The shape of RDN; not needed where a checkpoint tells it."""
    shape = Group(parser, "re-synthesizer (RDN); default: what its checkpoint says, else the paper's")
    for name, text in (
        ("scale", "down- and up-sampling factor, 2, 3 or 4 (paper: 4)"),
        ("num-features", "channels between the blocks, G0 (paper: 64)"),
        ("growth-rate", "channels each layer adds, G (paper: 64)"),
        ("num-blocks", "residual dense blocks, D (paper: 16)"),
        ("num-layers", "layers in each block, C (paper: 8)"),
    ):
        shape.add(f"--sr-{name} --{name}", text, at_least_one, dest=name.replace("-", "_"))


def detector_options(parser: Parser) -> None:
    """Which detector: its classifier, the space of its residual, and the files of its weights."""
    detector = Group(parser, "detector")
    detector.add("-a --arch", "classifier (default: the checkpoint's, else resnet50)", choices=ARCHITECTURES)
    text = "residual in pixels (0) or VGG-19 relu{1..5}_1 (default: the checkpoint's, else 0)"
    detector.add("--idx-stages", text, number(int, 0, 5), dest="stage", metavar="0..5")
    detector.add("--input-channel", "channels of the residual, as --idx-stages has", at_least_one, dest="in_channels")
    text = "layer3 and layer4 without dilation, as all scripts have it (default: the checkpoint's, else dilated)"
    detector.switch("--no_dilation", text, dest="dilated", action="store_const", const=False)
    detector.add("--sr-weights-file", "weights of RDN: a file of train_sr.py, a released one, or NNNN_sr.pth.tar of"
        " a fine-tuned detector (default: those inside the detector's checkpoint)",
        dest="resynthesizer_file", metavar="FILE")  # fmt: skip


def image_options(parser: Parser) -> None:
    """Which labelled images, and how their sizes are made alike."""
    images, folders = Group(parser, "images"), {"nargs": "+", "metavar": "DIR"}
    images.add("--data-root-pos", "folders of REAL images", dest="real_roots", **folders)
    images.add("--data-root-neg", "folders of GENERATED images, one a generator", dest="fake_roots", **folders)
    images.add("--data-root", "a tree instead: GENERATOR/0_real, /1_fake, or nature, ai", dest="tree", metavar="DIR")
    images.add("--csv", "a list instead: path,label[,generator] with label real or fake", metavar="FILE")
    images.add("--resize", "resize the shorter side to N pixels (in tests by default as in training; 0: not)", count)
    text = "crop N x N pixels: anywhere in training, the centre in tests (by default as in training; 0: not)"
    images.add("--crop-size", text, count)


def training_options(parser: Parser, batch_size: int, lr: float, schedule: str, last: str) -> None:
    """What both trainers do in a step, and how they start, go on, and are kept against accidents."""
    step = Group(parser, "optimizer")
    step.add("-b --batch-size", "images a step", at_least_one, batch_size)
    step.add("--lr --learning-rate", "base learning rate", weight, lr)
    text = "of the rate: as released, or a short warm-up and down to 0 at the end, which suits short trainings"
    step.add("--schedule", text, choices=(schedule, "cosine"), default=schedule)
    step.add("--clip-norm", "scale larger gradients down to this norm; not by default", weight)
    safe = Group(parser, "keeping a training safe")
    safe.add("--resume", f"go on with the run whose state this is; auto: with the one of {last}, if there is one,"
        f" else from --init; a file without a state, as the released ones are, starts a new run with its weights",
        metavar="FILE|auto")  # fmt: skip
    safe.switch("--overwrite", "delete the run that the output folder holds, and begin anew")
    safe.add("--save-minutes", "save the whole state at least every X minutes, within an epoch too", weight, 15.0)
    safe.add("--keep-last", "of the numbered checkpoints keep the N newest (default: all)", at_least_one)
    safe.switch("--skip-bad", "train without the images that cannot be used, rather than refuse")
    safe.dropped("--skip-nonfinite")


def release_options(parser: Parser) -> None:
    """Options of the released train.py and test.py that do nothing here."""
    released = Group(parser, "released")
    for flags in ("--dataset", "--dataset_type", "--start-epoch", "-p --print-freq", "--world-size", "--rank",
                  "--dist-url", "--dist-backend", "--carlibration", "--defense"):  # fmt: skip
        released.dropped(flags)
    for flags in ("-e --evaluate", "--pretrained", "--multiprocessing-distributed"):
        released.dropped(flags, takes=0)


# --- the programs -------------------------------------------------------------------------------------------


def train_sr_parser() -> Parser:
    parser = Parser("train_sr.py", "Train the re-synthesizer: RDN super-resolution on REAL images only.")
    run_options(parser)
    resynthesizer_options(parser)
    training_options(parser, batch_size=12, lr=1e-4, schedule="steps", last="--outputs-dir")
    sr = Group(parser, "training")
    sr.add("--train-file", "list of real images, one path a line; or a folder", metavar="FILE")
    sr.add("--eval-file", "list or folder of images to report PSNR and SSIM on", metavar="FILE")
    sr.switch("--evaluate", "only evaluate --weights-file on --eval-file")
    sr.add("--outputs-dir", "writes DIR/xSCALE/epoch_N.pth, ...", default="output_hr", metavar="DIR")
    sr.add("--weights-file", "start from these weights of RDN", dest="init", metavar="FILE")
    sr.add("--patch-size", "side in LR pixels", at_least_one, 24)
    sr.add("--patches-per-image", "patches taken from an image once it is decoded; the release: 1", at_least_one, 1)
    text = "of new weights: PyTorch's, as released, or such that RDN interpolates at first"
    sr.add("--start", text, choices=("random", "interpolation"), default="random")
    sr.add("--lr-decay", "factor on the learning rate every --lr-decay-epoch", share, 0.5)
    sr.add("--lr-decay-epoch", "epochs from one decay to the next", at_least_one, 225)
    sr.add("--num-epochs", "passes over the images", at_least_one, 750)
    sr.add("--num-save", "save every N epochs", at_least_one, 15)
    sr.add("--vgg-lambda", "weight of the perceptual loss", weight, 0.2)
    sr.switch("--augment", "degrade patches by noise and JPEG compression")
    sr.switch("--completion", "degrade patches by removing pixels")
    sr.switch("--colorization", "degrade patches by greying pixels")
    return parser


def train_detector_parser() -> Parser:
    text = "Train the detector on re-synthesis residuals, RDN frozen (--fixed-sr) or end to end."
    parser = Parser("train_detector.py", text)
    for options in (run_options, image_options, resynthesizer_options, detector_options):
        options(parser)
    training_options(parser, batch_size=10, lr=1e-2, schedule="released", last="--output-path")
    release_options(parser)
    training = Group(parser, "training")
    training.add("--output-path", "where checkpoints and records go", default="output", metavar="DIR")
    training.add("--init", "start a new run with the weights of this detector", metavar="FILE")
    training.add("--epochs", "passes over the images", at_least_one, 100)
    training.add("--optimizer", "sgd as released", choices=("sgd", "adamw"), default="sgd")
    training.add("--momentum", "of SGD", share, 0.9)
    training.add("--wd --weight-decay", "weight decay", weight, 1e-4, dest="weight_decay")
    text = "scales the CLASSIFIER's gradients, despite the flag's name: it learns at lr * X, RDN at lr"
    training.add("--lr-sr", text, weight, 0.02, dest="classifier_grad_scale")
    training.switch("--fixed-sr", "RDN is not trained", dest="fixed_resynthesizer")
    training.add("--mode-sr", "task RDN is fine-tuned with", default="none", dest="auxiliary", choices=TASKS)
    text = "weight of the auxiliary loss, which end-to-end training has with --mode-sr none, too; 0: without"
    training.add("--lw-sr", text, weight, 1.0, dest="auxiliary_weight")
    training.add("--save-every-epoch", "keep a checkpoint every N epochs", at_least_one, 2)
    training.add("--val-root-pos", "REAL images to validate on", dest="val_real_roots", nargs="+", metavar="DIR")
    training.add("--val-root-neg", "GENERATED images to validate on", dest="val_fake_roots", nargs="+", metavar="DIR")
    training.add("--val-csv", "a list instead, as --csv", metavar="FILE")
    training.dropped("--save_path")
    _cost_options(Group(parser, "what a training costs"))
    return parser


def _cost_options(costs: Group) -> None:
    """Memory and time of train_detector.py."""
    costs.add("--micro-batch", "pass N images at a time through RDN and VGG: less memory, the same update, batch"
        " normalisation included, for one more forward pass where RDN is trained (default: the whole batch)",
        at_least_one)  # fmt: skip
    text = "with --crop-size: use N crops of each image, the same in every epoch; 0 = one, anew in each epoch"
    costs.add("--crops-per-image", text, count, 0, dest="crops")
    costs.switch("--augment-perturb", "blur, crop, compress (JPEG) or add noise to half of the training images, anew"
        " in each epoch, as test.py --perturb-protocol frank2020 does (default: images as they are)")  # fmt: skip
    costs.switch("--no-cache", "compute the residuals anew in each epoch (default: with --fixed-sr, and unless"
        " images are cropped or perturbed anew in each epoch, each is computed once and kept on disk)",
        dest="cache", action="store_false")  # fmt: skip
    costs.add("--cache-dir", "folder of residuals, for any run (default: OUTPUT_PATH/residual_cache)", metavar="DIR")
    costs.add("--cache-gb", "keep residuals only if all take at most X GB and the disk has room", weight, 50.0)
    text = "number format of residuals kept: half precision, exact to 0.05 %%, or float32 at twice the size"
    costs.add("--cache-precision", text, default="fp16", choices=("fp16", "fp32"))


def test_parser() -> Parser:
    parser = Parser("test.py", "Score images: labelled sets with metrics, or any file or folder (--input).")
    for options in (run_options, image_options, resynthesizer_options, detector_options, release_options):
        options(parser)
    test = Group(parser, "test")
    test.add("--resume", "the detector's checkpoint", metavar="FILE")
    test.add("--input", "score these images and folders, without labels", nargs="+", metavar="PATH")
    test.add("--save_path --save-path", "writes P.csv, P.npy, P.json and P.png", dest="save_path", metavar="P")
    test.add("--save-residuals", "writes image | re-synthesis | residual of each image as a picture", metavar="DIR")
    test.add("--perturb", "perturb the images before they are scored, in each of these ways in turn; of a sweep all"
        f" strengths or one (jpeg=70); all: every one (default: none; names: {', '.join(PERTURBATIONS)})",
        perturbation, nargs="+", metavar="NAME[=STRENGTH]")  # fmt: skip
    text = "fixed strengths (sweep), or random ones as Frank et al. (ICML 2020) describe them"
    test.add("--perturb-protocol", text, default="sweep", choices=PERTURBATION_PROTOCOLS)
    test.switch("--stability", "score each image again after JPEG of quality 90 and after resizing to 0.9 and back"
        " (three times the work), and mark as unstable where that changes the verdict")  # fmt: skip
    test.add("-b --batch-size", "images at a time (default: as many as have 1024 x 1024 pixels)", at_least_one)
    test.switch("--overwrite", "score anew what P.csv or an unfinished run has already")
    test.add("--tile", "work on N x N pixels of a larger image at a time: the smaller, the less memory and the more"
        " time; the logits stay those of the whole image to rounding, each tile being given all its results depend on",
        number(int, 64), 1024)  # fmt: skip
    text = "score N crops of --crop-size spread over a larger image and take the mean (default: 9 if the detector was"
    text += " trained on crops and no other size is asked for, else 1, the one in its centre)"
    test.add("--crops", text, at_least_one)
    for flags in ("--lr --learning-rate", "--momentum", "--wd --weight-decay", "--epochs", "--output-path",
                  "--save-every-epoch", "--mode-sr", "--lr-sr", "--lw-sr"):  # fmt: skip
        test.dropped(flags)
    test.dropped("--fixed-sr", takes=0)
    return parser


def export_parser() -> Parser:
    parser = Parser("python -m tools.export", "Write a trained detector as one graph, or as one safe file to share.")
    for options in (vgg_options, resynthesizer_options, detector_options):
        options(parser)
    export = Group(parser, "export")
    export.add("--resume", "the detector's checkpoint, or a bundle", required=True, metavar="FILE")
    export.add("--out", "write a graph: FILE.onnx, or FILE.pt2 for torch.export.load", Path, metavar="FILE")
    export.add("--check", "is this a graph of the detector, with its numbers?", Path, metavar="FILE")
    export.add("--bundle", "write one file to share: FILE.safetensors", Path, metavar="FILE")
    export.add("--scores", "results of test.py for the bundle's model card", metavar="P.json")
    return parser
