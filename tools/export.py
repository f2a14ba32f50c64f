"""A trained detector for use elsewhere: as one graph, or as one safe file to share.

    python -m tools.export --resume DETECTOR [--sr-weights-file RDN] --out detector.onnx
    python -m tools.export --resume DETECTOR --bundle detector.safetensors [--scores P.json]

A graph is the whole detector, from pixels to P(fake), in ONNX or (.pt2) for torch.export.load. It is written only if it
gives the detector's own numbers; --check asks that of one that is there. A bundle is all that scoring needs, with a model
card; --resume and `evaluation.load` take it. docs/integrations.md says how to use both.
"""

import importlib.util
import io
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jinja2
import numpy as np
import torch
from torch import Tensor, nn

from evaluation.calibration import probabilities_and_verdicts
from evaluation.detector import Detector
from evaluation.loading import load, select_options
from evaluation.metrics import format_table
from evaluation.score_table import read_record
from tools.calibrate import require_same_detector
from utils import checkpoints
from utils.checkpoints import fingerprint
from utils.console import printable
from utils.errors import UserError, run_program
from utils.files import atomic, make_folder
from utils.labels import LABEL_NAMES
from utils.options import export_parser
from utils.random_streams import seeded_generator

logger = logging.getLogger("export")

GRAPH = "beyond-the-spectrum graph, version 1"
FACTS = "facts.json"  # what a .pt2 file has instead of ONNX's metadata
SIZES = ((1, 60, 60), (3, 96, 48), (2, 36, 132))  # batch, height, width of the images it is checked on, for any scale
TOLERANCE = 1e-4  # of P(fake), and of logits, relative where these exceed 1


class Graph(nn.Module):
    """image, uint8 (B, 3, H, W) RGB -> logits (B, 2), columns FAKE, REAL, and P(fake) (B,), float32."""

    def __init__(self, detector: Detector):
        super().__init__()
        self.network, self.temperature = detector.network, detector.calibration.get("temperature", 1.0)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.network(image.to(torch.float32) / 255)  # (B, 2)
        return logits, ((logits[:, 0] - logits[:, 1]) / self.temperature).sigmoid()  # the softmax of two


def graph(detector: Detector, suffix: str) -> bytes:
    """The detector as a graph for any number of images of any size, .onnx or .pt2."""
    for name in ("onnxscript", "onnx_ir", "torch.onnx", "py.warnings"):  # each tells of its every step
        logging.getLogger(name).setLevel(logging.ERROR)
    scale, height, width = detector.policy.scale, torch.export.Dim("height"), torch.export.Dim("width")
    sizes = ({0: torch.export.Dim.AUTO, 2: scale * height, 3: scale * width},)
    example = torch.zeros(2, 3, 32 * scale, 48 * scale, dtype=torch.uint8)
    with torch.enable_grad():  # the networks as they are in training: whole maps, no strips
        program = torch.export.export(Graph(detector).eval(), (example,), dynamic_shapes=sizes)
    if suffix == ".pt2":
        file = io.BytesIO()
        torch.export.save(program.run_decompositions({}), file, extra_files={FACTS: json.dumps(facts(detector))})
        return file.getvalue()
    names = {"input_names": ["image"], "output_names": ["logits", "prob_fake"]}
    names |= {"dynamic_shapes": ({0: "batch", 2: "height", 3: "width"},)}
    onnx = torch.onnx.export(program, **names, opset_version=18, dynamo=True, verbose=False)  # read by all of 2023 on
    onnx.model.metadata_props.update(facts(detector))
    return onnx.model_proto.SerializeToString()


def facts(detector: Detector) -> dict[str, str]:
    """What users of a graph have to know, by name, each value as JSON."""
    about = {"format": GRAPH, "labels": LABEL_NAMES, **detector.policy._asdict(), "detector": public_config(detector)}
    rule = {"temperature": 1.0, "t_real": 0.5, "t_fake": 0.5}
    about |= {name: detector.calibration.get(name, default) for name, default in rule.items()}
    return {name: json.dumps(value, sort_keys=True) for name, value in about.items()}


def public_config(detector: Detector) -> dict:
    """The config, with the fingerprints of all networks and without the folders of this machine."""
    config = {**detector.config, "classifier_fingerprint": fingerprint(detector.network.classifier)}
    config.pop("auxiliary_vgg", None)
    return config | {"vgg": config["vgg"] and {**config["vgg"], "source": Path(config["vgg"]["source"]).name}}


def open_graph(data: bytes) -> tuple[Callable[[Tensor], Sequence[np.ndarray]], Mapping[str, str]]:
    """A function from images to (logits, P(fake)), and the facts."""
    if data.startswith(b"PK"):  # .pt2 is a zip file
        extra = {FACTS: ""}
        module = torch.export.load(io.BytesIO(data), extra_files=extra).module(check_guards=False)
        return lambda image: [output.detach().numpy() for output in module(image)], json.loads(extra[FACTS])
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return lambda image: session.run(None, {"image": image.numpy()}), session.get_modelmeta().custom_metadata_map


def check(path: Path, detector: Detector, data: bytes | None = None) -> None:
    """Hold the graph at `path`, or `data` that is to be written there, against the detector, on images of some sizes.

    Raises:
        UserError: if it is no graph, or one of another version or detector, or its numbers differ.
    """
    rng, name, worst = seeded_generator(0), printable(path), 0.0
    images = [torch.from_numpy(rng.integers(0, 256, (b, 3, h, w), np.uint8)) for b, h, w in SIZES]
    try:
        run, found = open_graph(path.read_bytes() if data is None else data)
        got = [run(x) for x in images]
    except Exception as error:  # each runtime has its own
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{name} is no graph of a detector, or damaged ({reason}): export one") from None
    for fact, wanted in facts(detector).items():
        if found.get(fact) != wanted:
            raise UserError(f"{name} is not of this detector: {fact} is {found.get(fact)}, wanted {wanted}")
    for x, (logits, prob_fake) in zip(images, got, strict=True):
        wanted = detector.logits(x).numpy()  # (B, 2)
        wanted = np.column_stack([wanted, probabilities_and_verdicts(wanted, detector.calibration)[0]])  # (B, 3)
        off = abs(np.column_stack([logits, prob_fake]) - wanted) / np.maximum(abs(wanted), 1)
        worst = np.maximum(worst, off.max())  # NaN stays
    if not worst <= TOLERANCE:
        raise UserError(f"{name} is {worst:.2g} off the detector's numbers, {TOLERANCE:g} was wanted")
    logger.info("%s gives the detector's numbers, to %.2g", name, worst)


def bundle(detector: Detector, found: Mapping, scores: str | None) -> dict:
    """What a bundle holds. found: the content of the checkpoint. scores: the P.json of test.py for the model card.

    VGG-19 is named by its fingerprint only: 50 MB that all detectors share, and others' to give away.

    Raises:
        UserError: if the scores are of another detector, or without labels.
    """
    network, record = detector.network, {}
    content = {name: found[name] for name in ("arch", "epoch", "calibration", "trained_on") if name in found}
    content |= {"config": public_config(detector), "state_dict": network.classifier.state_dict()}
    content |= {"sr_state_dict": network.resynthesizer.state_dict()}
    if scores:
        record = read_record(scores)
        if not record.get("metrics"):
            raise UserError(f"no metrics at {printable(scores)}: give the P.json of test.py on labelled images")
        require_same_detector(content, record, "--resume")
    card = jinja2.Template(Path(__file__).with_name("card.md").read_text(), trim_blocks=True)
    about = {**content, "settings": found.get("settings", {}), "record": record, "format_table": format_table}
    return content | {"card": card.render(about)}


def main(arguments: Sequence[str] | None = None) -> None:
    args = (parser := export_parser()).parse_args(arguments)
    if not (args.out or args.check or args.bundle) or not checkpoints.is_bundle(args.bundle or ".safetensors"):
        parser.error("wanted: --out or --check FILE.onnx or FILE.pt2, or --bundle FILE.safetensors")
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if not importlib.util.find_spec(name)]
    if missing and any(path.suffix != ".pt2" for path in (args.out, args.check) if path):
        raise UserError(f"ONNX needs packages that are not there: pip install {' '.join(missing)}")
    detector = load(args.resume, "cpu", "fp32", args.resynthesizer_file, args.vgg_weights, select_options(vars(args)))
    if args.check:
        check(args.check, detector)
    for path in filter(None, (args.out, args.bundle)):
        make_folder(path.parent)
    if args.out:
        check(args.out, detector, data := graph(detector, args.out.suffix))
        with atomic(args.out) as file:
            file.write(data)
    if args.bundle:
        checkpoints.save(bundle(detector, checkpoints.load(args.resume), args.scores), args.bundle)


if __name__ == "__main__":
    sys.exit(run_program(main))
