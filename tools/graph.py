"""Export a detector as one graph from pixels to P(fake), in ONNX or in the format of torch.export.

The input of the graph is a batch of images as the network gets them: whole images, or crops if the detector was trained
on crops. The graph does not resize, crop, average over crops or apply thresholds. Its metadata hold the settings for
these steps.
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
from utils.checkpoints import compute_fingerprint
from utils.console import printable
from utils.errors import UserError
from utils.labels import LABEL_NAMES
from utils.random_streams import seeded_generator

logger = logging.getLogger("tools.export")

FORMAT = "beyond-the-spectrum graph, version 2"
MARK = b"beyond-the-spectrum graph"  # text in every graph of this program, of any version
FACTS = "facts.json"  # name of the metadata in a .pt2 file
SMALLEST_EXAMPLE = 96  # side of the example image in pixels, unless the detector was trained on crops
TOLERANCE = 1e-4  # for differences of P(fake) and logits; relative for values above 1
# PyTorch 2.6 cannot convert batch norms to ONNX with onnxscript 0.7
TORCH_CONVERTS_BATCH_NORM = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 7)
UNCALIBRATED = {"temperature": 1.0, "t_real": 0.5, "t_fake": 0.5}


class Graph(nn.Module):
    """A detector as one module.

    image, uint8 (B, 3, H, W) RGB -> logits (B, 2), columns FAKE, REAL, and P(fake) (B,), both float32.
    """

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
        return logits, margin.sigmoid()  # equals softmax over two classes


class PlainBatchNorm(nn.Module):
    """A batch norm with fixed statistics, as one multiplication and one addition. x: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, norm: nn.BatchNorm2d):
        super().__init__()
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()  # (C,)
        shift = norm.bias - norm.running_mean * scale
        self.register_buffer("scale", scale.detach()[:, None, None])
        self.register_buffer("shift", shift.detach()[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


def with_plain_batch_norms(network: nn.Module) -> nn.Module:
    """Copy a network, and replace each batch norm by a module that every version of PyTorch converts to ONNX."""
    network = copy.deepcopy(network)
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.BatchNorm2d) and module.affine and module.track_running_stats:
            network.set_submodule(name, PlainBatchNorm(module))
    return network


def make_graph(detector: Detector, suffix: str) -> bytes:
    """Export a detector as a graph.

    Args:
        suffix: format of the graph, ".onnx" or ".pt2".
    Returns:
        The content of the file.
    Raises:
        UserError: if the network cannot be exported.
    """
    warnings.filterwarnings("ignore", "No complete tensor found", module="torch.export")
    for name in ("onnxscript", "onnx_ir", "torch.onnx", "py.warnings"):
        logging.getLogger(name).setLevel(logging.ERROR)  # these loggers report every step
    program, is_dynamic = export_program(detector)
    facts = facts_of(detector)
    if suffix == ".pt2":
        file = io.BytesIO()
        torch.export.save(program.run_decompositions({}), file, extra_files={FACTS: json.dumps(facts)})
        return file.getvalue()
    axes = {0: "batch", 2: "height", 3: "width"} if is_dynamic else {0: "batch"}
    return onnx_of(program, axes, facts)


def onnx_of(program: torch.export.ExportedProgram, axes: Mapping[int, str], facts: Mapping[str, str]) -> bytes:
    """Convert an exported program to ONNX.

    Args:
        axes: dimensions of the input that may have any size, {dimension: name}.
        facts: metadata of the graph.
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
            opset_version=18,  # all runtimes since 2023 read this version of ONNX
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
    """Export the network for images of any size. If that fails, export it for images of the size of one crop.

    Returns:
        The exported program, and whether it accepts images of any size.
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
            with torch.enable_grad():  # with gradients enabled, networks compute whole maps instead of tiles
                program = torch.export.export(Graph(detector).eval(), (example,), dynamic_shapes=(shapes,))
            return program, len(shapes) > 1
        except Exception as error:  # torch.export raises errors of many kinds
            reason = str(error).strip().partition("\n")[0]
    raise UserError(f"PyTorch {torch.__version__} cannot export this detector ({reason})")


def example_sizes(detector: Detector) -> list[tuple[int, int, int]]:
    """Choose sizes of images to check a graph with, (batch, height, width). The first size is the size of one crop.

    Height and width are multiples of the scale of the re-synthesizer.
    """
    scale = detector.policy.scale
    side = detector.policy.crop_size or max(SMALLEST_EXAMPLE, 4 * detector.network.features.stride)
    side -= side % scale
    return [(1, side, side), (3, side + 2 * scale, side), (2, side, side + 7 * scale)]


def facts_of(detector: Detector) -> dict[str, str]:
    """Collect the metadata of a graph, {name: value as JSON}: sizes, crops, thresholds and the config."""
    facts = {"format": FORMAT, "labels": LABEL_NAMES, "crops": detector.crops}
    facts.update(detector.policy._asdict())
    for name, default in UNCALIBRATED.items():
        facts[name] = detector.calibration.get(name, default)
    facts["detector"] = public_config(detector)
    return {name: json.dumps(value, sort_keys=True) for name, value in facts.items()}


def public_config(detector: Detector) -> dict:
    """Copy the config of a detector. Fingerprints of all networks are added; names of local folders are removed."""
    config = dict(detector.config)
    config["classifier_fingerprint"] = compute_fingerprint(detector.network.classifier)
    if config.get("vgg"):
        config["vgg"] = {**config["vgg"], "source": Path(config["vgg"]["source"]).name}
    return config


# --- checking ---


def open_graph(data: bytes) -> tuple[Callable[[Tensor], Sequence[np.ndarray]], Mapping[str, str]]:
    """Load a graph from the content of its file. Returns a function images -> (logits, P(fake)), and the metadata."""
    if data.startswith(b"PK"):  # a .pt2 file is a zip file
        extra = {FACTS: ""}
        module = runnable(torch.export.load(io.BytesIO(data), extra_files=extra))
        return lambda image: [output.detach().numpy() for output in module(image)], json.loads(extra[FACTS])
    import onnxruntime  # imported here, because .pt2 files do not need it

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return lambda image: session.run(None, {"image": image.numpy()}), session.get_modelmeta().custom_metadata_map


def runnable(program: torch.export.ExportedProgram) -> nn.Module:
    """Make a module from an exported program.

    Newer versions of PyTorch check that input sizes match the example input. This check is turned off.
    """
    if "check_guards" in inspect.signature(program.module).parameters:
        return program.module(check_guards=False)
    return program.module()


def check_graph(path: Path, detector: Detector, data: bytes) -> None:
    """Compare the outputs of a graph and of the detector on random images.

    The first image has the size of one crop. The graph is also checked on images of two more sizes, if it accepts them.

    Args:
        path: path of the graph file, for messages.
        data: content of the graph file.
    Raises:
        UserError: if `data` is not a graph, belongs to a different detector, or gives different logits or P(fake).
    """
    name = printable(path)
    rng = seeded_generator(0)
    images = []
    for batch, height, width in example_sizes(detector):
        images.append(torch.from_numpy(rng.integers(0, 256, (batch, 3, height, width), np.uint8)))
    try:
        run, found = open_graph(data)
        results = [run(images[0])]
    except Exception as error:  # each runtime raises exceptions of its own types
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{name} is not a graph of a detector, or is damaged ({reason}): export it again") from None
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
    if not difference <= TOLERANCE:  # also true for NaN
        raise UserError(
            f"{name} differs from the detector's numbers by {difference:.2g}, expected at most {TOLERANCE:g}"
        )
    logger.info(
        "%s gives the detector's numbers for one crop or image; the largest difference is %.2g", name, difference
    )


def difference_from(detector: Detector, image: Tensor, result: Sequence[np.ndarray]) -> float:
    """Compute the largest difference between outputs of a graph and of the detector; relative for values above 1.

    Args:
        image: uint8 (B, 3, H, W).
        result: logits (B, 2) and P(fake) (B,) of the graph.
    """
    logits, prob_fake = result
    with torch.inference_mode():
        expected = detector.network(image.to(torch.float32) / 255).numpy()  # (B, 2), without crops
    expected_prob, _ = probabilities_and_verdicts(expected, detector.calibration)
    expected = np.column_stack([expected, expected_prob])  # (B, 3)
    found = np.column_stack([logits, prob_fake])
    return float(np.max(np.abs(found - expected) / np.maximum(np.abs(expected), 1)))
