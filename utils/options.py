"""The options of the three programs, each declared once. The defaults are the paper's.

Flags keep the spelling of the released code, so that its users' scripts go on working; `dest` gives them the names
used inside. Options read off a checkpoint (the networks' shapes) default to None: what the file says, and where there
is no file, the paper's.
"""

import argparse
import sys
from collections.abc import Callable

PRECISIONS = ("auto", "fp32", "tf32", "bf16", "fp16")
ARCHITECTURES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
PERTURBATIONS = ("none", "blur", "crop", "jpeg", "noise", "resize", "combined")
PERTURBATION_PROTOCOLS = ("frank2020", "sweep")
CACHE_PRECISIONS = ("fp16", "fp32")
TASKS = ("none", "colorization", "denoising")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and whose flags are spelled out."""

    def __init__(self, **kwargs):
        super().__init__(
            allow_abbrev=False,
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=110),
            **kwargs,
        )

    def error(self, message: str):
        self.exit(2, f"error: {message}; {self.prog} --help lists the options\n")


class NoEffect(argparse.Action):
    """A flag that is accepted and does nothing: of the released program, or one that was dropped. One line says so."""

    def __call__(self, parser, namespace, values, option_string=None):
        why = f" ({self.const})" if self.const else ""
        sys.stderr.write(f"{option_string} has no effect here{why}\n")


def number(kind: type, low: float | None = None, high: float | None = None) -> Callable[[str], float]:
    """An argparse type: an int or float within [low, high]."""

    def parse(text: str):
        value = kind(text)
        if (low is not None and not value >= low) or (high is not None and not value <= high):
            limits = " and ".join(
                f"{word} {limit}" for word, limit in (("at least", low), ("at most", high)) if limit is not None
            )
            raise argparse.ArgumentTypeError(f"{text} (wanted: {limits})")
        return value

    parse.__name__ = kind.__name__  # argparse names it in its errors
    return parse


def run_options() -> argparse.ArgumentParser:
    """How any of the programs runs."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("run")
    group.add_argument(
        "--gpu", "--gpu-id", dest="gpu", metavar="N|cpu", help="GPU number, or cpu (default: GPU 0 if there is one)"
    )
    group.add_argument(
        "-j", "--workers", "--num-workers", dest="workers", type=number(int, 0), default=4, metavar="N",
        help="processes that read images (default: 4; 0: none but this one)",
    )  # fmt: skip
    group.add_argument(
        "--seed", type=number(int, 0), default=123, metavar="N", help="fixes everything random (default: 123)"
    )
    group.add_argument(
        "--precision", choices=PRECISIONS, default="auto",
        help="number format of the networks' arithmetic; weights and residuals stay float32 (default: auto = tf32 on a"
        " GPU, as the release ran, fp32 on a CPU; fp32 is float32 to the last bit on either)",
    )  # fmt: skip
    group.add_argument(
        "--deterministic", action="store_true",
        help="reproducible algorithms on a GPU, which may be slower (a CPU's are; default: the fastest for each shape)",
    )  # fmt: skip
    group.add_argument(
        "--vgg-weights", default="auto", metavar="auto|imagenet|random|FILE",
        help="VGG-19: ImageNet weights from torch hub's cache or by download; a fixed-seed stand-in; a torchvision"
        " vgg19 state dict (default: auto = ImageNet if it can be had, else, in training from scratch, random)",
    )  # fmt: skip
    return parser


def resynthesizer_options() -> argparse.ArgumentParser:
    """The shape of RDN; not needed where a checkpoint tells it."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("re-synthesizer (RDN); default: what its checkpoint says, else the paper's")
    for name, text in (
        ("scale", "down- and up-sampling factor, 2, 3 or 4 (paper: 4)"),
        ("num-features", "channels between the blocks, G0 (paper: 64)"),
        ("growth-rate", "channels each layer adds, G (paper: 64)"),
        ("num-blocks", "residual dense blocks, D (paper: 16)"),
        ("num-layers", "layers in each block, C (paper: 8)"),
    ):
        group.add_argument(
            f"--sr-{name}", f"--{name}", dest=name.replace("-", "_"), type=number(int, 1), metavar="N", help=text
        )
    return parser


def detector_options() -> argparse.ArgumentParser:
    """Which detector: its classifier, the space of its residual, and the files of its weights."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("detector")
    group.add_argument(
        "-a", "--arch", choices=ARCHITECTURES, help="classifier (default: the checkpoint's, else resnet50)"
    )
    group.add_argument(
        "--idx-stages", dest="stage", type=number(int, 0, 5), metavar="0..5",
        help="residual in pixels (0) or VGG-19 relu{1..5}_1 (default: the checkpoint's, else 0)",
    )  # fmt: skip
    group.add_argument(
        "--input-channel", dest="in_channels", type=number(int, 1), metavar="N",
        help="channels of the residual: 3 for pixels, 64 128 256 512 512 for the stages; follows from --idx-stages,"
        " and is refused where it contradicts it",
    )  # fmt: skip
    group.add_argument(
        "--no_dilation", dest="dilated", action="store_const", const=False,
        help="layer3 and layer4 without dilation, as all scripts have it (default: the checkpoint's, else dilated)",
    )  # fmt: skip
    group.add_argument(
        "--sr-weights-file", dest="resynthesizer_file", metavar="FILE",
        help="weights of RDN: a file of train_sr.py, a released one, or NNNN_sr.pth.tar of a fine-tuned detector"
        " (default: those inside the detector's checkpoint)",
    )  # fmt: skip
    return parser


def image_options() -> argparse.ArgumentParser:
    """Which labelled images, and how their sizes are made alike."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("images")
    group.add_argument("--data-root-pos", dest="real_roots", nargs="+", metavar="DIR", help="folders of REAL images")
    group.add_argument(
        "--data-root-neg", dest="fake_roots", nargs="+", metavar="DIR",
        help="folders of GENERATED images, one a generator",
    )  # fmt: skip
    group.add_argument(
        "--data-root", dest="tree", metavar="DIR", help="a tree instead: GENERATOR/0_real, GENERATOR/1_fake"
    )
    group.add_argument("--csv", metavar="FILE", help="a list instead: path,label[,generator] with label real or fake")
    group.add_argument(
        "--resize", type=number(int, 0), metavar="N",
        help="resize the shorter side to N pixels first (bicubic; in tests by default as in training, 0: not)",
    )  # fmt: skip
    group.add_argument(
        "--crop-size", type=number(int, 0), metavar="N",
        help="crop N x N pixels: anywhere in training, the centre in tests (by default as in training, 0: not)",
    )  # fmt: skip
    return parser


def training_options(last: str) -> argparse.ArgumentParser:
    """How both trainers start, go on, and are kept against accidents."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("keeping a training safe")
    group.add_argument(
        "--resume", metavar="FILE|auto",
        help=f"go on with the run whose state this is; auto: with the one of {last}, if there is one, else from --init;"
        " a file without a state, as the released ones are, starts a new run with its weights",
    )  # fmt: skip
    group.add_argument(
        "--overwrite", action="store_true", help="delete the run that the output folder holds, and begin anew"
    )
    group.add_argument(
        "--save-minutes", type=number(float, 0), default=15.0, metavar="M",
        help="save the whole state at least every M minutes, within an epoch too (15)",
    )  # fmt: skip
    group.add_argument(
        "--keep-last", type=number(int, 1), metavar="N",
        help="keep only the N newest numbered checkpoints; best and last are always kept (default: keep all)",
    )  # fmt: skip
    group.add_argument(
        "--skip-bad", action="store_true", help="train without the images that cannot be used, rather than refuse"
    )
    dropped(group, "--skip-nonfinite", "a loss that is not finite always ends the run, its last good state named")
    return parser


def dropped(group: argparse._ArgumentGroup, flag: str, why: str = "", takes: int | None = None) -> None:
    """Accept a flag that does nothing. takes: 0 if it has no value."""
    names = flag.split()
    group.add_argument(*names, action=NoEffect, const=why, nargs=takes, dest=argparse.SUPPRESS, help=argparse.SUPPRESS)


def release_options() -> argparse.ArgumentParser:
    """Options of the released train.py and test.py that do nothing here."""
    parser = argparse.ArgumentParser(add_help=False)
    for flag in ("--dataset", "--dataset_type", "--start-epoch", "-p --print-freq", "--world-size", "--rank",
                 "--dist-url", "--dist-backend", "--carlibration", "--defense"):  # fmt: skip
        dropped(parser, flag)
    for flag in ("-e --evaluate", "--pretrained", "--multiprocessing-distributed"):
        dropped(parser, flag, takes=0)
    return parser


def train_sr_parser() -> Parser:
    parser = Parser(
        prog="train_sr.py",
        description="Train the re-synthesizer: RDN super-resolution on REAL images only.",
        parents=[run_options(), resynthesizer_options(), training_options("--outputs-dir")],
    )
    group = parser.add_argument_group("training")
    group.add_argument("--train-file", metavar="FILE", help="list of real images, one path a line; or a folder")
    group.add_argument("--eval-file", metavar="FILE", help="list or folder of images to report PSNR and SSIM on")
    group.add_argument("--outputs-dir", default="output_hr", metavar="DIR", help="writes DIR/xSCALE/epoch_N.pth, ...")
    group.add_argument("--weights-file", dest="init", metavar="FILE", help="start from these weights of RDN")
    group.add_argument("--evaluate", action="store_true", help="only evaluate --weights-file on --eval-file")
    group.add_argument("--patch-size", type=number(int, 1), default=24, metavar="N", help="side in LR pixels (24)")
    group.add_argument(
        "--patches-per-image", type=number(int, 1), default=1, metavar="K",
        help="patches taken from each image once it is decoded (default: 1, as in the release)",
    )  # fmt: skip
    group.add_argument("--lr", type=number(float, 0), default=1e-4, metavar="RATE", help="of Adam (1e-4)")
    group.add_argument(
        "--schedule", choices=("steps", "cosine"), default="steps",
        help="of the rate: steps = --lr-decay every --lr-decay-epoch epochs, as released; cosine = a short warm-up, then"
        " down to 0 at the end, which suits short trainings",
    )  # fmt: skip
    group.add_argument(
        "--start", choices=("random", "interpolation"), default="random",
        help="of new weights: PyTorch's, as released, or such that RDN interpolates at first (default: random)",
    )  # fmt: skip
    group.add_argument(
        "--clip-norm",
        type=number(float, 0),
        metavar="N",
        help="scale larger gradients down to this norm (default: not)",
    )
    group.add_argument("--lr-decay", type=number(float, 0, 1), default=0.5, metavar="F", help="factor (0.5) ...")
    group.add_argument(
        "--lr-decay-epoch", type=number(int, 1), default=225, metavar="N", help="... on the rate every N epochs (225)"
    )
    group.add_argument("--batch-size", type=number(int, 1), default=12, metavar="N", help="images a step (12)")
    group.add_argument("--num-epochs", type=number(int, 1), default=750, metavar="N", help="(750)")
    group.add_argument("--num-save", type=number(int, 1), default=15, metavar="N", help="save every N epochs (15)")
    group.add_argument(
        "--vgg-lambda", type=number(float, 0), default=0.2, metavar="W", help="weight of the perceptual loss (0.2)"
    )
    group.add_argument("--augment", action="store_true", help="degrade patches by noise and JPEG compression")
    group.add_argument("--completion", action="store_true", help="degrade patches by removing pixels")
    group.add_argument("--colorization", action="store_true", help="degrade patches by greying pixels")
    return parser


def train_detector_parser() -> Parser:
    parser = Parser(
        prog="train_detector.py",
        description="Train the detector on re-synthesis residuals, RDN frozen (--fixed-sr) or end to end.",
        parents=[
            run_options(), image_options(), resynthesizer_options(), detector_options(),
            training_options("--output-path"), release_options(),
        ],
    )  # fmt: skip
    group = parser.add_argument_group("training")
    group.add_argument("--output-path", default="output", metavar="DIR", help="where checkpoints and records go")
    group.add_argument("--init", metavar="FILE", help="start a new run with the weights of this detector")
    group.add_argument("-b", "--batch-size", type=number(int, 1), default=10, metavar="N", help="images a step (10)")
    group.add_argument(
        "--micro-batch", type=number(int, 1), metavar="N",
        help="pass N images at a time through RDN and VGG: less memory, the same update, batch normalisation included,"
        " for one more forward pass where RDN is trained (default: the whole batch)",
    )  # fmt: skip
    group.add_argument("--epochs", type=number(int, 1), default=100, metavar="N", help="(100)")
    group.add_argument(
        "--lr", "--learning-rate", type=number(float, 0), default=1e-2, metavar="RATE", help="base rate of SGD (1e-2)"
    )
    group.add_argument("--momentum", type=number(float, 0, 1), default=0.9, metavar="M", help="of SGD (0.9)")
    group.add_argument(
        "--wd", "--weight-decay", dest="weight_decay", type=number(float, 0), default=1e-4, metavar="W", help="(1e-4)"
    )
    group.add_argument(
        "--lr-sr", dest="classifier_grad_scale", type=number(float, 0), default=0.02, metavar="S",
        help="scales the CLASSIFIER's gradients, despite the flag's name: it learns at lr * S, RDN at lr (0.02)",
    )  # fmt: skip
    group.add_argument("--fixed-sr", dest="fixed_resynthesizer", action="store_true", help="RDN is not trained")
    group.add_argument(
        "--crops-per-image", dest="crops", type=number(int, 0), default=0, metavar="K",
        help="with --crop-size: cut K crops out of each image, the same in every epoch, all of which are used; their"
        " residuals are kept as those of whole images are (default: 0 = one crop, anew in each epoch)",
    )  # fmt: skip
    group.add_argument(
        "--augment-perturb", action="store_true",
        help="blur, crop, compress (JPEG) or add noise to half of the training images, anew in each epoch, as"
        " test.py --perturb-protocol frank2020 does (default: images as they are)",
    )  # fmt: skip
    group.add_argument(
        "--mode-sr", dest="auxiliary", choices=TASKS, default="none", help="auxiliary task RDN is fine-tuned with"
    )
    group.add_argument(
        "--lw-sr", dest="auxiliary_weight", type=number(float, 0), default=1.0, metavar="W",
        help="weight of the auxiliary loss, which end-to-end training has with --mode-sr none, too (1; 0: without)",
    )  # fmt: skip
    group.add_argument(
        "--save-every-epoch", type=number(int, 1), default=2, metavar="N", help="keep a checkpoint every N epochs (2)"
    )
    group.add_argument(
        "--no-cache", dest="cache", action="store_false",
        help="compute the residuals anew in each epoch (default: with --fixed-sr, and unless images are cropped or"
        " perturbed anew in each epoch, each is computed once and kept on disk)",
    )  # fmt: skip
    group.add_argument(
        "--cache-dir", metavar="DIR",
        help="where residuals are kept; runs can share it, and it can be deleted after any (OUTPUT_PATH/residual_cache)",
    )  # fmt: skip
    group.add_argument(
        "--cache-gb", type=number(float, 0), default=50.0, metavar="G",
        help="keep residuals if all of them take at most G GB and the disk has as much; else none are kept (50)",
    )  # fmt: skip
    group.add_argument(
        "--cache-precision", choices=CACHE_PRECISIONS, default="fp16",
        help="number format of residuals kept: half precision, exact to 0.05 %%, or float32 at twice the size (fp16)",
    )  # fmt: skip
    group.add_argument(
        "--val-root-pos", dest="val_real_roots", nargs="+", metavar="DIR", help="REAL images to validate on"
    )
    group.add_argument(
        "--val-root-neg", dest="val_fake_roots", nargs="+", metavar="DIR", help="GENERATED images to validate on"
    )
    dropped(parser, "--save_path")
    return parser


def test_parser() -> Parser:
    parser = Parser(
        prog="test.py",
        description="Score images, real or generated. Labelled sets get metrics, --input any file or folder.",
        parents=[
            run_options(), image_options(), resynthesizer_options(), detector_options(), release_options(),
        ],
    )  # fmt: skip
    group = parser.add_argument_group("test")
    group.add_argument("--resume", metavar="FILE", help="the detector's checkpoint")
    group.add_argument("--input", nargs="+", metavar="PATH", help="score these images and folders, without labels")
    group.add_argument(
        "--save_path", "--save-path", dest="save_path", metavar="P", help="writes P.csv, P.npy, P.json and P.png"
    )
    group.add_argument(
        "--save-residuals", metavar="DIR", help="writes image | re-synthesis | residual of each image as a picture"
    )
    group.add_argument(
        "--perturb", choices=(*PERTURBATIONS, "all"), default="none", help="perturb the images before they are scored"
    )
    group.add_argument(
        "--perturb-protocol", choices=PERTURBATION_PROTOCOLS, default="sweep",
        help="fixed strengths (sweep), or Frank et al. (ICML 2020) as described or as their script computes it",
    )  # fmt: skip
    group.add_argument(
        "--stability", action="store_true",
        help="score each image again after JPEG of quality 90 and after resizing to 0.9 and back (three times the"
        " work), and mark as unstable where that changes the verdict",
    )  # fmt: skip
    group.add_argument(
        "-b", "--batch-size", type=number(int, 1), metavar="N",
        help="images of one size at a time (default: as many as have the pixels of one of 1024 x 1024)",
    )  # fmt: skip
    group.add_argument(
        "--overwrite", action="store_true", help="score anew what P.csv or an unfinished run has already"
    )
    group.add_argument(
        "--tile", type=number(int, 64), default=1024, metavar="N",
        help="work on N x N pixels of a larger image at a time: the smaller, the less memory and the more time; the"
        " logits stay those of the whole image to rounding, each tile being given all its results depend on (1024)",
    )  # fmt: skip
    for flag in ("--lr --learning-rate", "--momentum", "--wd --weight-decay", "--epochs", "--output-path",
                 "--save-every-epoch", "--mode-sr", "--lr-sr", "--lw-sr"):  # fmt: skip
        dropped(parser, flag)
    dropped(parser, "--fixed-sr", takes=0)
    return parser
