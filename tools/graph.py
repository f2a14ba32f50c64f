"""A detector as one graph, from pixels to P(fake), in ONNX or in the format of torch.export.

The graph covers one image as the network gets it: whole, or one crop for a detector that was trained on crops. What comes
before and after it (resizing, cropping, the mean over crops, the thresholds) is described by its metadata.
"""

import copy
import inspect
import io
import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from evaluation.calibration import probabilities_and_verdicts
from evaluation.detector import Detector
from utils.checkpoints import fingerprint
from utils.console import printable
from utils.errors import UserError
from utils.labels import LABEL_NAMES
from utils.random_streams import seeded_generator

logger = logging.getLogger("tools.export")

FORMAT = "beyond-the-spectrum graph, version 2"
MARK = b"beyond-the-spectrum graph"  # in every version: tells this program's graphs from other files
FACTS = "facts.json"  # where a .pt2 file stores what ONNX calls metadata
SMALLEST_EXAMPLE = 96  # pixels, unless the detector was trained on smaller crops
TOLERANCE = 1e-4  # of P(fake), and of logits: relative if they exceed 1
TORCH_CONVERTS_BATCH_NORM = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 7)  # 2.6 fails with onnxscript 0.7
UNCALIBRATED = {"temperature": 1.0, "t_real": 0.5, "t_fake": 0.5}


class Graph(nn.Module):
    """image, uint8 (B, 3, H, W) RGB -> logits (B, 2), columns FAKE, REAL, and P(fake) (B,), float32."""

    def __init__(self, detector: Detector):
        super().__init__()
        self.network = detector.network
        if not TORCH_CONVERTS_BATCH_NORM:
            self.network = with_plain_batch_norms(self.network)
        self.temperature = detector.calibration.get("temperature", 1.0)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        x = image.to(torch.float32) / 255  # (B, 3, H, W) in [0, 1]
        logits = self.network(x)  # (B, 2)
        margin = (logits[:, 0] - logits[:, 1]) / self.temperature  # (B,)
        return logits, margin.sigmoid()  # the softmax of two logits


class PlainBatchNorm(nn.Module):
    """A batch norm with fixed statistics, as one multiplication and one addition. x: (B, C, H, W) -> same shape."""

    def __init__(self, norm: nn.BatchNorm2d):
        super().__init__()
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()  # (C,)
        shift = norm.bias - norm.running_mean * scale
        self.register_buffer("scale", scale.detach()[:, None, None])
        self.register_buffer("shift", shift.detach()[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


def with_plain_batch_norms(network: nn.Module) -> nn.Module:
    """Copy a network, with its batch norms in a form that every version of PyTorch converts to ONNX."""
    network = copy.deepcopy(network)
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.BatchNorm2d) and module.affine and module.track_running_stats:
            network.set_submodule(name, PlainBatchNorm(module))
    return network


def make_graph(detector: Detector, suffix: str) -> bytes:
    """Export a detector.

    Args:
        suffix: ".onnx" or ".pt2".
    Returns:
        The content of the file.
    Raises:
        UserError: if the network cannot be exported.
    """
    warnings.filterwarnings("ignore", "No complete tensor found", module="torch.export")
    for name in ("onnxscript", "onnx_ir", "torch.onnx", "py.warnings"):
        logging.getLogger(name).setLevel(logging.ERROR)  # they report every step
    program, is_dynamic = export_program(detector)
    facts = facts_of(detector)
    if suffix == ".pt2":
        file = io.BytesIO()
        torch.export.save(program.run_decompositions({}), file, extra_files={FACTS: json.dumps(facts)})
        return file.getvalue()
    axes = {0: "batch", 2: "height", 3: "width"} if is_dynamic else {0: "batch"}
    return onnx_of(program, axes, facts)


def onnx_of(program: torch.export.ExportedProgram, axes: Mapping[int, str], facts: Mapping[str, str]) -> bytes:
    """Convert a program to ONNX.

    Args:
        axes: names of the image's dimensions that are free.
        facts: metadata.
    Returns:
        The content of the file.
    Raises:
        UserError: if this version of PyTorch cannot convert an operation of the network.
    """
    try:
        onnx = torch.onnx.export(
            program,
            input_names=["image"],
            output_names=["logits", "prob_fake"],
            dynamic_shapes=(axes,),
            opset_version=18,  # read by all runtimes since 2023
            dynamo=True,
            verbose=False,
        )
    except Exception as error:  # the converter raises errors of many kinds
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise UserError(
            f"PyTorch {torch.__version__} cannot convert this detector to ONNX ({reason}): use .pt2"
        ) from None
    onnx.model.metadata_props.update(facts)
    return onnx.model_proto.SerializeToString()


def export_program(detector: Detector) -> tuple[torch.export.ExportedProgram, bool]:
    """Export the network for images of any size or, if it allows only one, for crops of its size.

    Returns:
        The program, and whether height and width are free.
    """
    scale = detector.policy.scale
    _, height, width = example_sizes(detector)[0]
    sizes = {0: torch.export.Dim.AUTO}
    free = {2: scale * torch.export.Dim("height"), 3: scale * torch.export.Dim("width")}
    choices = [({**sizes, **free}, height, width + 16 * scale)]
    if detector.policy.crop_size:
        choices.append((sizes, height, width))
    reason = ""
    for shapes, rows, columns in choices:
        example = torch.zeros(2, 3, rows, columns, dtype=torch.uint8)
        try:
            with torch.enable_grad():  # networks in their plain form: whole maps, no tiles
                program = torch.export.export(Graph(detector).eval(), (example,), dynamic_shapes=(shapes,))
            return program, len(shapes) > 1
        except Exception as error:  # torch.export raises errors of many kinds
            reason = str(error).strip().partition("\n")[0]
    raise UserError(f"PyTorch {torch.__version__} cannot export this detector ({reason})")


def example_sizes(detector: Detector) -> list[tuple[int, int, int]]:
    """Choose sizes to check a graph with: (batch, height, width), multiples of the scale. The first is a crop."""
    scale = detector.policy.scale
    side = detector.policy.crop_size or max(SMALLEST_EXAMPLE, 4 * detector.network.features.stride)
    side -= side % scale
    return [(1, side, side), (3, side + 2 * scale, side), (2, side, side + 7 * scale)]


def facts_of(detector: Detector) -> dict[str, str]:
    """Collect what users of a graph must know, by name. Each value is JSON."""
    facts = {"format": FORMAT, "labels": LABEL_NAMES, "crops": detector.crops}
    facts.update(detector.policy._asdict())
    for name, default in UNCALIBRATED.items():
        facts[name] = detector.calibration.get(name, default)
    facts["detector"] = public_config(detector)
    return {name: json.dumps(value, sort_keys=True) for name, value in facts.items()}


def public_config(detector: Detector) -> dict:
    """Copy the config, with the fingerprints of all networks and without folders of this machine."""
    config = dict(detector.config)
    config["classifier_fingerprint"] = fingerprint(detector.network.classifier)
    if config.get("vgg"):
        config["vgg"] = {**config["vgg"], "source": Path(config["vgg"]["source"]).name}
    return config


# --- checking ---


def open_graph(data: bytes) -> tuple[Callable[[Tensor], Sequence[np.ndarray]], Mapping[str, str]]:
    """Open the content of a graph file. Returns a function from images to (logits, P(fake)), and the facts."""
    if data.startswith(b"PK"):  # a .pt2 file is a zip file
        extra = {FACTS: ""}
        module = runnable(torch.export.load(io.BytesIO(data), extra_files=extra))
        return lambda image: [output.detach().numpy() for output in module(image)], json.loads(extra[FACTS])
    import onnxruntime  # here, because .pt2 files do not need it

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return lambda image: session.run(None, {"image": image.numpy()}), session.get_modelmeta().custom_metadata_map


def runnable(program: torch.export.ExportedProgram) -> nn.Module:
    """Make a module of a program. Newer versions of PyTorch compare sizes with the example's, which is left out."""
    if "check_guards" in inspect.signature(program.module).parameters:
        return program.module(check_guards=False)
    return program.module()


def check_graph(path: Path, detector: Detector, data: bytes) -> None:
    """Compare a graph with the detector, on random images of one crop's size and, if it accepts them, of others.

    Args:
        path: of the file, for messages.
        data: its content.
    Raises:
        UserError: if it is no graph, or belongs to another version or detector, or its numbers differ.
    """
    name = printable(path)
    rng = seeded_generator(0)
    images = []
    for batch, height, width in example_sizes(detector):
        images.append(torch.from_numpy(rng.integers(0, 256, (batch, 3, height, width), np.uint8)))
    try:
        run, found = open_graph(data)
        results = [run(images[0])]
    except Exception as error:  # each runtime raises errors of its own
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{name} is no graph of a detector, or it is damaged ({reason}): export it again") from None
    for fact, expected in facts_of(detector).items():
        if found.get(fact) != expected:
            raise UserError(f"{name} is not from this detector: {fact} is {found.get(fact)}, expected {expected}")
    for image in images[1:]:
        try:
            results.append(run(image))
        except Exception:
            logger.info("%s accepts only images of %d x %d pixels", name, *images[0].shape[2:])
            break
    difference = max(difference_from(detector, x, result) for x, result in zip(images, results, strict=False))
    if not difference <= TOLERANCE:  # NaN is refused, too
        raise UserError(
            f"{name} differs from the detector's numbers by {difference:.2g}, expected at most {TOLERANCE:g}"
        )
    logger.info(
        "%s gives the detector's numbers for one crop or image; the largest difference is %.2g", name, difference
    )


def difference_from(detector: Detector, image: Tensor, result: Sequence[np.ndarray]) -> float:
    """Compute the largest difference of logits and P(fake) from the detector's; relative where these exceed 1."""
    logits, prob_fake = result
    with torch.inference_mode():
        expected = detector.network(image.to(torch.float32) / 255).numpy()  # (B, 2), as one crop
    expected_prob, _ = probabilities_and_verdicts(expected, detector.calibration)
    expected = np.column_stack([expected, expected_prob])  # (B, 3)
    found = np.column_stack([logits, prob_fake])
    return float(np.max(np.abs(found - expected) / np.maximum(np.abs(expected), 1)))
