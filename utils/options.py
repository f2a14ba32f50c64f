"""The options of the programs, each declared once. The defaults are the paper's.

Flags keep the spelling of the released code, so that its users' scripts go on working; `dest` gives them the names
used inside. Options read off a checkpoint (the networks' shapes) default to None: what the file says, and where there
is no file, the paper's.
"""

import argparse
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
CACHE_PRECISIONS = ("fp16", "fp32")
TASKS = ("none", "colorization", "denoising")
PEER_GRACE = 3  # seconds for which a process other than the main one keeps a mistake to itself: all may have found it


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and whose flags are spelled out."""

    def __init__(self, **kwargs):
        formatter = partial(argparse.HelpFormatter, max_help_position=34, width=110)
        super().__init__(allow_abbrev=False, formatter_class=formatter, **kwargs)

    def error(self, message: str):
        if not is_main_process():
            time.sleep(PEER_GRACE)  # the main process says the same, and this one is ended meanwhile
        self.exit(2, f"error: {message}; {self.prog} --help lists the options\n")


def is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


class NoEffect(argparse.Action):
    """A flag that is accepted and does nothing: of the released program, or one that was dropped. One line says so."""

    def __call__(self, parser, namespace, values, option_string=None):
        why = f" ({self.const})" if self.const else ""
        if is_main_process():
            sys.stderr.write(f"{option_string} has no effect here{why}\n")


def number(kind: type, low: float | None = None, high: float | None = None) -> Callable[[str], float]:
    """An argparse type: an int or float within [low, high]."""

    def parse(text: str):
        value = kind(text)
        if (low is not None and not value >= low) or (high is not None and not value <= high):
            limits = [f"{word} {limit}" for word, limit in (("at least", low), ("at most", high)) if limit is not None]
            raise argparse.ArgumentTypeError(f"{text} (wanted: {' and '.join(limits)})")
        if abs(value) == float("inf"):
            raise argparse.ArgumentTypeError(f"{text} (wanted: a finite number)")
        return value

    parse.__name__ = kind.__name__  # argparse names it in its errors
    return parse


def perturbation(text: str) -> tuple[str, float | None]:
    """An argparse type: NAME or NAME=STRENGTH."""
    name, given, strength = text.partition("=")
    if name not in (*PERTURBATIONS, "all"):
        raise argparse.ArgumentTypeError(f"no perturbation {name!r}: {', '.join(PERTURBATIONS)} or all was wanted")
    return name, number(float)(strength) if given else None


count, at_least_one, weight = number(int, 0), number(int, 1), number(float, 0)


class Group:
    """Options of one group of a parser: add("-x --long", "help", type, default, more for argparse)."""

    def __init__(self, title: str, parser: argparse.ArgumentParser | None = None):
        self.parser = parser or argparse.ArgumentParser(add_help=False)
        self.group = self.parser.add_argument_group(title)

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

    def dropped(self, flags: str, why: str = "", takes: int | None = None) -> None:
        """Accept a flag that does nothing. takes: 0 if it has no value."""
        hidden = {"dest": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        self.group.add_argument(*flags.split(), action=NoEffect, const=why, nargs=takes, **hidden)


def run_options() -> argparse.ArgumentParser:
    """How any of the programs runs."""
    run = Group("run", argparse.ArgumentParser(add_help=False, parents=[vgg_options()]))
    run.add("--gpu --gpu-id", "GPU number, or cpu (default: GPU 0 if there is one)", dest="gpu", metavar="N|cpu")
    text = "processes that read images; 0: none but this one"
    run.add("-j --workers --num-workers", text, count, 4, dest="workers")
    run.add("--seed", "fixes everything random", count, 123)
    run.add("--precision", "number format of the networks' arithmetic; weights and residuals stay float32. auto ="
        " tf32 on a GPU, as the release ran, fp32 on a CPU; fp32 is float32 to the last bit on either",
        default="auto", choices=PRECISIONS)  # fmt: skip
    text = "reproducible algorithms on a GPU, which may be slower (a CPU's are; default: the fastest for each shape)"
    run.switch("--deterministic", text)
    return run.parser


def vgg_options() -> argparse.ArgumentParser:
    """Where the features come from."""
    vgg = Group("VGG-19")
    vgg.add("--vgg-weights", "ImageNet weights from torch hub's cache or by download; a fixed-seed stand-in; a"
        " torchvision vgg19 state dict; auto = ImageNet if it can be had, else, in training from scratch, random",
        default="auto", metavar="auto|imagenet|random|FILE")  # fmt: skip
    return vgg.parser


def resynthesizer_options() -> argparse.ArgumentParser:
    """The shape of RDN; not needed where a checkpoint tells it."""
    shape = Group("re-synthesizer (RDN); default: what its checkpoint says, else the paper's")
    for name, text in (
        ("scale", "down- and up-sampling factor, 2, 3 or 4 (paper: 4)"),
        ("num-features", "channels between the blocks, G0 (paper: 64)"),
        ("growth-rate", "channels each layer adds, G (paper: 64)"),
        ("num-blocks", "residual dense blocks, D (paper: 16)"),
        ("num-layers", "layers in each block, C (paper: 8)"),
    ):
        shape.add(f"--sr-{name} --{name}", text, at_least_one, dest=name.replace("-", "_"))
    return shape.parser


def detector_options() -> argparse.ArgumentParser:
    """Which detector: its classifier, the space of its residual, and the files of its weights."""
    detector = Group("detector")
    detector.add("-a --arch", "classifier (default: the checkpoint's, else resnet50)", choices=ARCHITECTURES)
    text = "residual in pixels (0) or VGG-19 relu{1..5}_1 (default: the checkpoint's, else 0)"
    detector.add("--idx-stages", text, number(int, 0, 5), dest="stage", metavar="0..5")
    detector.add("--input-channel", "channels of the residual: 3 for pixels, 64 128 256 512 512 for the stages;"
        " follows from --idx-stages, and is refused where it contradicts it",
        at_least_one, dest="in_channels")  # fmt: skip
    text = "layer3 and layer4 without dilation, as all scripts have it (default: the checkpoint's, else dilated)"
    detector.switch("--no_dilation", text, dest="dilated", action="store_const", const=False)
    detector.add("--sr-weights-file", "weights of RDN: a file of train_sr.py, a released one, or NNNN_sr.pth.tar of"
        " a fine-tuned detector (default: those inside the detector's checkpoint)",
        dest="resynthesizer_file", metavar="FILE")  # fmt: skip
    return detector.parser


def image_options() -> argparse.ArgumentParser:
    """Which labelled images, and how their sizes are made alike."""
    images = Group("images")
    images.add("--data-root-pos", "folders of REAL images", dest="real_roots", nargs="+", metavar="DIR")
    text = "folders of GENERATED images, one a generator"
    images.add("--data-root-neg", text, dest="fake_roots", nargs="+", metavar="DIR")
    text = "a tree instead: GENERATOR/0_real and GENERATOR/1_fake, or nature and ai"
    images.add("--data-root", text, dest="tree", metavar="DIR")
    images.add("--csv", "a list instead: path,label[,generator] with label real or fake", metavar="FILE")
    text = "resize the shorter side to N pixels first (bicubic; in tests by default as in training, 0: not)"
    images.add("--resize", text, count)
    text = "crop N x N pixels: anywhere in training, the centre in tests (by default as in training, 0: not)"
    images.add("--crop-size", text, count)
    return images.parser


def training_options(last: str) -> argparse.ArgumentParser:
    """How both trainers start, go on, and are kept against accidents."""
    safe = Group("keeping a training safe")
    safe.add("--resume", f"go on with the run whose state this is; auto: with the one of {last}, if there is one,"
        f" else from --init; a file without a state, as the released ones are, starts a new run with its weights",
        metavar="FILE|auto")  # fmt: skip
    safe.switch("--overwrite", "delete the run that the output folder holds, and begin anew")
    text = "save the whole state at least every X minutes, within an epoch too"
    safe.add("--save-minutes", text, weight, 15.0)
    text = "keep only the N newest numbered checkpoints; best and last are always kept (default: keep all)"
    safe.add("--keep-last", text, at_least_one)
    safe.switch("--skip-bad", "train without the images that cannot be used, rather than refuse")
    safe.dropped("--skip-nonfinite", "a loss that is not finite always ends the run, its last good state named")
    return safe.parser


def release_options() -> argparse.ArgumentParser:
    """Options of the released train.py and test.py that do nothing here."""
    released = Group("released")
    for flags in ("--dataset", "--dataset_type", "--start-epoch", "-p --print-freq", "--world-size", "--rank",
                  "--dist-url", "--dist-backend", "--carlibration", "--defense"):  # fmt: skip
        released.dropped(flags)
    for flags in ("-e --evaluate", "--pretrained", "--multiprocessing-distributed"):
        released.dropped(flags, takes=0)
    return released.parser


def train_sr_parser() -> Parser:
    parser = Parser(
        prog="train_sr.py",
        description="Train the re-synthesizer: RDN super-resolution on REAL images only.",
        parents=[run_options(), resynthesizer_options(), training_options("--outputs-dir")],
    )
    sr = Group("training", parser)
    sr.add("--train-file", "list of real images, one path a line; or a folder", metavar="FILE")
    sr.add("--eval-file", "list or folder of images to report PSNR and SSIM on", metavar="FILE")
    sr.add("--outputs-dir", "writes DIR/xSCALE/epoch_N.pth, ...", default="output_hr", metavar="DIR")
    sr.add("--weights-file", "start from these weights of RDN", dest="init", metavar="FILE")
    sr.switch("--evaluate", "only evaluate --weights-file on --eval-file")
    sr.add("--patch-size", "side in LR pixels", at_least_one, 24)
    text = "patches taken from each image once it is decoded; the release takes one"
    sr.add("--patches-per-image", text, at_least_one, 1)
    sr.add("--lr", "learning rate of Adam", weight, 1e-4)
    text = "of the rate: as released, or a short warm-up and down to 0 at the end, which suits short trainings"
    sr.add("--schedule", text, choices=("steps", "cosine"), default="steps")
    text = "of new weights: PyTorch's, as released, or such that RDN interpolates at first"
    sr.add("--start", text, choices=("random", "interpolation"), default="random")
    sr.add("--clip-norm", "scale larger gradients down to this norm; not by default", weight)
    sr.add("--lr-decay", "factor on the learning rate every --lr-decay-epoch", number(float, 0, 1), 0.5)
    sr.add("--lr-decay-epoch", "epochs from one decay to the next", at_least_one, 225)
    sr.add("--batch-size", "images a step", at_least_one, 12)
    sr.add("--num-epochs", "passes over the images", at_least_one, 750)
    sr.add("--num-save", "save every N epochs", at_least_one, 15)
    sr.add("--vgg-lambda", "weight of the perceptual loss", weight, 0.2)
    sr.switch("--augment", "degrade patches by noise and JPEG compression")
    sr.switch("--completion", "degrade patches by removing pixels")
    sr.switch("--colorization", "degrade patches by greying pixels")
    return parser


def train_detector_parser() -> Parser:
    parents = [run_options(), image_options(), resynthesizer_options(), detector_options()]
    parser = Parser(
        prog="train_detector.py",
        description="Train the detector on re-synthesis residuals, RDN frozen (--fixed-sr) or end to end.",
        parents=[*parents, training_options("--output-path"), release_options()],
    )
    training = Group("training", parser)
    training.add("--output-path", "where checkpoints and records go", default="output", metavar="DIR")
    training.add("--init", "start a new run with the weights of this detector", metavar="FILE")
    training.add("-b --batch-size", "images a step", at_least_one, 10)
    training.add("--epochs", "passes over the images", at_least_one, 100)
    training.add("--optimizer", "sgd as released", choices=("sgd", "adamw"), default="sgd")
    text = "of the rate: as released, or a short warm-up and down to 0 at the end, which suits short trainings"
    training.add("--schedule", text, choices=("released", "cosine"), default="released")
    training.add("--clip-norm", "scale larger gradients down to this norm; not by default", weight)
    training.add("--lr --learning-rate", "base learning rate", weight, 1e-2)
    training.add("--momentum", "of SGD", number(float, 0, 1), 0.9)
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
    _cost_options(Group("what a training costs", parser))
    return parser


def _cost_options(costs: Group) -> None:
    """Memory and time of train_detector.py."""
    costs.add("--micro-batch", "pass N images at a time through RDN and VGG: less memory, the same update, batch"
        " normalisation included, for one more forward pass where RDN is trained (default: the whole batch)",
        at_least_one)  # fmt: skip
    costs.add("--crops-per-image", "with --crop-size: cut N crops out of each image, the same in every epoch, all of"
        " which are used; their residuals are kept as those of whole images are; 0 = one crop, anew in each epoch",
        count, 0, dest="crops")  # fmt: skip
    costs.switch("--augment-perturb", "blur, crop, compress (JPEG) or add noise to half of the training images, anew"
        " in each epoch, as test.py --perturb-protocol frank2020 does (default: images as they are)")  # fmt: skip
    costs.switch("--no-cache", "compute the residuals anew in each epoch (default: with --fixed-sr, and unless"
        " images are cropped or perturbed anew in each epoch, each is computed once and kept on disk)",
        dest="cache", action="store_false")  # fmt: skip
    text = "where residuals are kept; runs can share it, and it can be deleted after any (OUTPUT_PATH/residual_cache)"
    costs.add("--cache-dir", text, metavar="DIR")
    text = "keep residuals if all of them take at most X GB and the disk has as much; else none are kept"
    costs.add("--cache-gb", text, weight, 50.0)
    text = "number format of residuals kept: half precision, exact to 0.05 %%, or float32 at twice the size"
    costs.add("--cache-precision", text, default="fp16", choices=CACHE_PRECISIONS)


def test_parser() -> Parser:
    parents = [run_options(), image_options(), resynthesizer_options(), detector_options(), release_options()]
    text = "Score images, real or generated. Labelled sets get metrics, --input any file or folder."
    parser = Parser(prog="test.py", description=text, parents=parents)
    test = Group("test", parser)
    test.add("--resume", "the detector's checkpoint", metavar="FILE")
    test.add("--input", "score these images and folders, without labels", nargs="+", metavar="PATH")
    test.add("--save_path --save-path", "writes P.csv, P.npy, P.json and P.png", dest="save_path", metavar="P")
    text = "writes image | re-synthesis | residual of each image as a picture"
    test.add("--save-residuals", text, metavar="DIR")
    text = (
        "perturb the images before they are scored, in each of these ways in turn; of a sweep all strengths or one"
        f" (jpeg=70); all: every one (default: none; names: {', '.join(PERTURBATIONS)})"
    )
    test.add("--perturb", text, perturbation, nargs="+", metavar="NAME[=STRENGTH]")
    text = "fixed strengths (sweep), or random ones as Frank et al. (ICML 2020) describe them"
    test.add("--perturb-protocol", text, default="sweep", choices=PERTURBATION_PROTOCOLS)
    test.switch("--stability", "score each image again after JPEG of quality 90 and after resizing to 0.9 and back"
        " (three times the work), and mark as unstable where that changes the verdict")  # fmt: skip
    text = "images of one size at a time (default: as many as have the pixels of one of 1024 x 1024)"
    test.add("-b --batch-size", text, at_least_one)
    test.switch("--overwrite", "score anew what P.csv or an unfinished run has already")
    test.add("--tile", "work on N x N pixels of a larger image at a time: the smaller, the less memory and the more"
        " time; the logits stay those of the whole image to rounding, each tile being given all its results depend on",
        number(int, 64), 1024)  # fmt: skip
    text = "score N crops of --crop-size spread over a larger image and take the mean (default: the one in its centre)"
    test.add("--crops", text, at_least_one)
    for flags in ("--lr --learning-rate", "--momentum", "--wd --weight-decay", "--epochs", "--output-path",
                  "--save-every-epoch", "--mode-sr", "--lr-sr", "--lw-sr"):  # fmt: skip
        test.dropped(flags)
    test.dropped("--fixed-sr", takes=0)
    return parser


def export_parser() -> Parser:
    parents = [vgg_options(), resynthesizer_options(), detector_options()]
    text = "Write a trained detector as one graph, or as one safe file to share."
    parser = Parser(prog="python -m utils.export", description=text, parents=parents)
    export = Group("export", parser)
    export.add("--resume", "the detector's checkpoint, or a bundle", required=True, metavar="FILE")
    export.add("--out", "write a graph: FILE.onnx, or FILE.pt2 for torch.export.load", Path, metavar="FILE")
    export.add("--check", "is this a graph of the detector, with its numbers?", Path, metavar="FILE")
    export.add("--bundle", "write one file to share: FILE.safetensors", Path, metavar="FILE")
    export.add("--scores", "results of test.py for the bundle's model card", metavar="P.json")
    return parser
