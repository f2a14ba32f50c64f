"""Export a trained detector as a graph for other runtimes (ONNX, torch.export), or as one safetensors file.

    python -m tools.export --resume DETECTOR [--sr-weights-file RDN] --out detector.onnx
    python -m tools.export --resume DETECTOR --bundle detector.safetensors [--scores P.json]

A graph is an .onnx file, or a .pt2 file for torch.export.load. A bundle is one .safetensors file with a model card and
the weights of all networks of the detector except VGG-19. docs/integrations.md explains how to use graphs and bundles.
"""

import argparse
import importlib.util
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2

from evaluation.detector import Detector
from evaluation.loading import load, select_settings_that_load_accepts
from evaluation.metrics import format_metrics
from evaluation.score_table import read_json_record_of_score_table
from tools.calibrate import require_scores_computed_by_detector
from tools.graph import MARK, compare_graph_with_detector, describe_detector_without_folders, export_graph
from utils import checkpoints
from utils.console import make_printable
from utils.errors import UserError, run_program
from utils.files import make_folder, open_for_atomic_write, require_new_or_marked_file
from utils.options import Parser, add_detector_options, add_resynthesizer_options, add_vgg_options

logger = logging.getLogger("tools.export")

GRAPH_SUFFIXES = (".onnx", ".pt2")
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
COPIED = ("arch", "epoch", "calibration", "trained_on")  # entries of the checkpoint that a bundle also contains


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    require_onnx_packages(args)
    for path, mark in ((args.out, MARK), (args.bundle, checkpoints.BUNDLE.encode())):
        if path:
            require_new_or_marked_file(path, mark)
    detector = load(
        args.resume,
        "cpu",
        "fp32",
        args.resynthesizer_file,
        args.vgg_weights,
        select_settings_that_load_accepts(vars(args)),
    )
    if args.check:
        compare_graph_with_detector(args.check, detector, read_graph_file(args.check))
    for path in (args.out, args.bundle):
        if path:
            make_folder(path.parent)
    if args.out:
        data = export_graph(detector, args.out.suffix)
        compare_graph_with_detector(args.out, detector, data)
        with open_for_atomic_write(os.path.realpath(args.out)) as file:
            file.write(data)
        if detector.crops > 1:
            text = "the graph scores one crop, but test.py averages over %d crops: see docs/integrations.md"
            logger.info(text, detector.crops)
    if args.bundle:
        content = collect_contents_of_safetensors_bundle(
            detector, checkpoints.read_checkpoint_content(args.resume), args.scores, args.resume
        )
        checkpoints.save_checkpoint(content, os.path.realpath(args.bundle))
        logger.info("the bundle is written to %s", make_printable(args.bundle))
    return 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = create_export_parser()
    args = parser.parse_args(arguments)
    if not (args.out or args.check or args.bundle):
        parser.error("expected at least one of --out FILE, --check FILE and --bundle FILE")
    for flag, path in (("--out", args.out), ("--check", args.check)):
        if path and path.suffix not in GRAPH_SUFFIXES:
            parser.error(f"{flag}: expected a file name that ends in {' or '.join(GRAPH_SUFFIXES)}, got {path}")
    if args.bundle and not checkpoints.is_safetensors_path(args.bundle):
        parser.error(f"--bundle: expected a file name that ends in .safetensors, got {args.bundle}")
    if args.scores and not args.bundle:
        parser.error("--scores needs --bundle FILE.safetensors, because only bundles contain a model card")
    return args


def require_onnx_packages(args: argparse.Namespace) -> None:
    """Raise a UserError if --out or --check names an ONNX file and a Python package for ONNX is missing."""
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    for path in (args.out, args.check):
        if path and path.suffix == ".onnx" and missing:
            raise UserError(f"packages for ONNX files are missing: run pip install {' '.join(missing)}")


def read_graph_file(path: Path) -> bytes:
    """Read the bytes of a graph file. Raises a UserError if the file cannot be read."""
    try:
        if not path.is_file():
            raise FileNotFoundError(0, "no such file")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {make_printable(path)} ({error.strerror})") from None


def collect_contents_of_safetensors_bundle(
    detector: Detector, found: Mapping, scores: str | None, checkpoint_name: str
) -> dict:
    """Collect the weights, the config and the model card that a bundle contains.

    Args:
        found: content of the checkpoint of the detector.
        scores: path of a JSON file of test.py with the metrics for the model card, or None for a card without metrics.
    Raises:
        UserError: if the scores are from a different detector, or from images without labels.
    """
    network = detector.network
    content = {name: found[name] for name in COPIED if name in found}
    content["config"] = describe_detector_without_folders(detector)
    content["state_dict"] = network.classifier.state_dict()
    content["sr_state_dict"] = network.resynthesizer.state_dict()
    record = {}
    if scores:
        if not Path(scores).is_file():
            raise UserError(f"--scores: there is no file {make_printable(scores)}; give a JSON file that test.py wrote")
        record = read_json_record_of_score_table(scores)
        if not record.get("metrics"):
            raise UserError(
                f"{make_printable(scores)} contains no metrics: give a JSON file that test.py wrote for images with"
                " labels"
            )
        require_scores_computed_by_detector(content, record, checkpoint_name)
    template = jinja2.Template(Path(__file__).with_name("card.md").read_text(), trim_blocks=True)
    settings = found.get("settings", {})
    content["card"] = template.render(**content, settings=settings, record=record, format_metrics=format_metrics)
    return content


def create_export_parser() -> Parser:
    """Create the argument parser of tools.export."""
    parser = Parser("python -m tools.export", "Write a trained detector as a graph, or as one safe file to share.")
    add_vgg_options(parser)
    add_resynthesizer_options(parser)
    add_detector_options(parser)
    add = parser.add_argument_group("export").add_argument
    add("--resume", required=True, metavar="FILE",
        help="checkpoint of the detector, or a .safetensors file that --bundle wrote")  # fmt: skip
    add("--out", type=Path, metavar="FILE",
        help="write the detector's computation graph to FILE.onnx, or to FILE.pt2 for torch.export.load")  # fmt: skip
    add("--check", type=Path, metavar="FILE",
        help="check that the graph in FILE computes the same logits as the detector")  # fmt: skip
    add("--bundle", type=Path, metavar="FILE", help="write the detector with a model card to FILE.safetensors")
    add(
        "--scores",
        metavar="P.json",
        help="with --bundle: show the metrics of the file P.json, which test.py wrote, in the model card",
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_program(main))
