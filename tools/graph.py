"""Export a detector as one graph, in ONNX or in the format of torch.export.

The graph does not resize or crop images, does not average over crops, and does not apply thresholds. The metadata of
the graph contain the settings with which images must be resized and cropped, and the thresholds.
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

from evaluation.calibration import UNCALIBRATED, probabilities_and_verdicts
from evaluation.detector import Detector
from utils.checkpoints import compute_fingerprint
from utils.console import make_printable
from utils.errors import UserError
from utils.labels import LABEL_NAMES
from utils.random_streams import seeded_generator

logger = logging.getLogger("tools.export")

FORMAT = "beyond-the-spectrum graph, version 2"
MARK = b"beyond-the-spectrum graph"  # bytes that each graph file of this program contains
FACTS = "facts.json"  # name of the metadata file inside a .pt2 file
SMALLEST_EXAMPLE = 96  # minimum height and width of example images in pixels, for detectors trained on whole images
TOLERANCE = 1e-4  # largest allowed |g - d| / max(1, |d|), where g and d are outputs of the graph and the detector
# With onnxscript 0.7, PyTorch 2.6 cannot convert batch norms to ONNX
TORCH_CONVERTS_BATCH_NORM = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 7)


class Graph(nn.Module):
    """A module that computes the logits and the P(fake) of a detector from pixels.

    The input is a batch of RGB images, uint8 (B, 3, H, W). The outputs are the logits, float32 (B, 2) with the columns
    FAKE and REAL, and P(fake), float32 (B,).
    """

    def __init__(self, detector: Detector):
        super().__init__()
        self.network = detector.network
        if not TORCH_CONVERTS_BATCH_NORM:
            self.network = copy_network_with_plain_batch_norms(self.network)
        self.temperature = detector.calibration.get("temperature", 1.0)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        x = image.to(torch.float32) / 255  # (B, 3, H, W) in [0, 1]
        logits = self.network(x)  # (B, 2)
        margin = (logits[:, 0] - logits[:, 1]) / self.temperature  # (B,)
        return logits, margin.sigmoid()  # P(fake), which equals softmax(logits / temperature)[:, 0]


class PlainBatchNorm(nn.Module):
    """A batch norm in evaluation mode, computed as x * scale + shift for feature maps x (B, C, H, W)."""

    def __init__(self, norm: nn.BatchNorm2d):
        super().__init__()
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()  # (C,)
        shift = norm.bias - norm.running_mean * scale
        self.register_buffer("scale", scale.detach()[:, None, None])
        self.register_buffer("shift", shift.detach()[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


def copy_network_with_plain_batch_norms(network: nn.Module) -> nn.Module:
    """Copy a network, and replace each batch norm in the copy by a `PlainBatchNorm`."""
    network = copy.deepcopy(network)
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.BatchNorm2d) and module.affine and module.track_running_stats:
            network.set_submodule(name, PlainBatchNorm(module))
    return network


def export_graph(detector: Detector, suffix: str) -> bytes:
    """Export a detector as the bytes of a graph file.

    Args:
        suffix: format of the graph, ".onnx" or ".pt2".
    Raises:
        UserError: if the network cannot be exported.
    """
    warnings.filterwarnings("ignore", "No complete tensor found", module="torch.export")
    for name in ("onnxscript", "onnx_ir", "torch.onnx", "py.warnings"):
        logging.getLogger(name).setLevel(logging.ERROR)  # hide messages about the steps of the export
    program, is_dynamic = export_program(detector)
    facts = collect_graph_metadata(detector)
    if suffix == ".pt2":
        file = io.BytesIO()
        torch.export.save(program.run_decompositions({}), file, extra_files={FACTS: json.dumps(facts)})
        return file.getvalue()
    axes = {0: "batch", 2: "height", 3: "width"} if is_dynamic else {0: "batch"}
    return convert_to_onnx(program, axes, facts)


def convert_to_onnx(program: torch.export.ExportedProgram, axes: Mapping[int, str], facts: Mapping[str, str]) -> bytes:
    """Convert an `ExportedProgram` of torch.export to the bytes of an ONNX file.

    Args:
        axes: names of the input dimensions that may have any size, {dimension: name}, such as {0: "batch"}.
        facts: metadata to store in the graph.
    Raises:
        UserError: if this version of PyTorch cannot convert an operation of the network.
    """
    try:
        onnx = torch.onnx.export(
            program,
            input_names=["image"],
            output_names=["logits", "prob_fake"],
            opset_version=18,  # version of the ONNX operators; ONNX Runtime 1.14 and later versions support opset 18
            dynamo=True,
            verbose=False,
        )
    except Exception as error:  # torch.onnx.export raises exceptions of many types
        reason = get_first_line_of_message(error.__cause__ or error)
        raise UserError(
            f"PyTorch {torch.__version__} cannot convert this detector to ONNX ({reason}): use --out FILE.pt2"
        ) from None
    onnx.model.metadata_props.update(facts)
    proto = onnx.model_proto
    input_shape = proto.graph.input[0].type.tensor_type.shape
    for dimension, name in axes.items():
        input_shape.dim[dimension].dim_param = name
    for output in proto.graph.output:
        output.type.tensor_type.shape.dim[0].dim_param = axes[0]
    return proto.SerializeToString()


def export_program(detector: Detector) -> tuple[torch.export.ExportedProgram, bool]:
    """Export the network of a detector for images of any size.

    If torch.export fails for a detector that was trained on crops, the network is exported only for the crop size.

    Returns:
        The exported program, and whether it accepts images of any size.
    """
    scale = detector.policy.scale
    _, height, width = choose_image_sizes_for_comparison(detector)[0]
    any_batch = {0: torch.export.Dim.AUTO}
    any_size = {2: scale * torch.export.Dim("height"), 3: scale * torch.export.Dim("width")}
    # The example image is not square: from a square image, torch.export may conclude that height = width always
    program, reason = try_to_export_network(detector, height, width + 16 * scale, any_batch | any_size)
    if program is not None:
        return program, True
    if detector.policy.crop_size:
        program, reason = try_to_export_network(detector, height, width, any_batch)
        if program is not None:
            return program, False
    raise UserError(
        f"PyTorch {torch.__version__} cannot export this detector as a graph ({reason}): try another version of"
        " PyTorch, or write a bundle with --bundle FILE.safetensors"
    )


def try_to_export_network(
    detector: Detector, height: int, width: int, dynamic_shape: Mapping[int, object]
) -> tuple[torch.export.ExportedProgram | None, str]:
    """Try to export the network of a detector.

    Args:
        height, width: size of the example image.
        dynamic_shape: which dimensions of the input may vary, in the format of `dynamic_shapes` of torch.export.export.

    Returns:
        The exported program and "", or None and an error message if the export failed.
    """
    example = torch.zeros(2, 3, height, width, dtype=torch.uint8)
    try:
        # With gradients disabled, the networks would work in tiles, so the graph would accept fewer image sizes
        with torch.enable_grad():
            return torch.export.export(Graph(detector).eval(), (example,), dynamic_shapes=(dynamic_shape,)), ""
    except Exception as error:  # torch.export raises exceptions of many types
        return None, get_first_line_of_message(error)


def choose_image_sizes_for_comparison(detector: Detector) -> list[tuple[int, int, int]]:
    """Choose the sizes (batch, height, width) of three image batches for comparing a graph with the detector.

    All heights and widths are multiples of the super-resolution scale. If the detector was trained on crops, the images
    of the first batch have the crop size, rounded down to a multiple of the super-resolution scale.
    """
    scale = detector.policy.scale
    side = detector.policy.crop_size or max(SMALLEST_EXAMPLE, 4 * detector.network.features.stride)
    side -= side % scale
    return [(1, side, side), (3, side + 2 * scale, side), (2, side, side + 7 * scale)]


def collect_graph_metadata(detector: Detector) -> dict[str, str]:
    """Collect the metadata of a graph, such as the crop size and the thresholds, as {name: value in JSON format}."""
    facts = {"format": FORMAT, "labels": LABEL_NAMES, "crops": detector.crops}
    facts.update(detector.policy._asdict())
    for name, default in UNCALIBRATED.items():
        facts[name] = detector.calibration.get(name, default)
    config = describe_detector_without_folders(detector)
    # The metadata identify VGG-19 weights by their hash, because files of different names can contain equal weights
    for part in ("vgg", "auxiliary_vgg"):
        if config.get(part):
            config[part] = {"fingerprint": config[part].get("fingerprint")}
    facts["detector"] = config
    return {name: json.dumps(value, sort_keys=True) for name, value in facts.items()}


def describe_detector_without_folders(detector: Detector) -> dict:
    """Copy the config of a detector, remove the folder from paths of VGG-19 weights, and add the classifier's hash."""
    config = dict(detector.config)
    config["classifier_fingerprint"] = compute_fingerprint(detector.network.classifier)
    for part in ("vgg", "auxiliary_vgg"):
        if config.get(part):
            config[part] = {**config[part], "source": Path(config[part]["source"]).name}
    return config


def get_first_line_of_message(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


# --- checking ---


def load_graph(data: bytes) -> tuple[Callable[[Tensor], Sequence[np.ndarray]], Mapping[str, str]]:
    """Load a graph from the bytes of its file.

    Returns:
        A function that computes (logits, P(fake)) from images, and the metadata of the graph.
    """
    if data.startswith(b"PK"):  # a .pt2 file is a zip file
        extra = {FACTS: ""}
        module = create_module_without_size_checks(torch.export.load(io.BytesIO(data), extra_files=extra))
        return lambda image: [output.detach().numpy() for output in module(image)], json.loads(extra[FACTS])
    import onnxruntime  # imported here, because .pt2 files do not need it

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return lambda image: session.run(None, {"image": image.numpy()}), session.get_modelmeta().custom_metadata_map


def create_module_without_size_checks(program: torch.export.ExportedProgram) -> nn.Module:
    """Create a module that runs an exported program without guards, which are checks of the input size.

    In PyTorch 2.9 and later versions, the module of an exported program contains guards unless `check_guards` is False.
    """
    if "check_guards" in inspect.signature(program.module).parameters:
        return program.module(check_guards=False)
    return program.module()


def compare_graph_with_detector(path: Path, detector: Detector, data: bytes) -> None:
    """Check that a graph and a detector give the same logits and P(fake) on random images of three sizes.

    Raises:
        UserError: if `data` is not the graph of `detector`, or if their outputs differ by more than TOLERANCE.
    """
    name = make_printable(path)
    rng = seeded_generator(0)
    images = []
    for batch, height, width in choose_image_sizes_for_comparison(detector):
        images.append(torch.from_numpy(rng.integers(0, 256, (batch, 3, height, width), np.uint8)))
    try:
        run, found = load_graph(data)
        results = [run(images[0])]
    except Exception as error:  # each runtime raises exceptions of its own types
        reason = get_first_line_of_message(error)
        raise UserError(
            f"{name} is damaged or is not the graph of a detector ({reason}): export the graph again"
        ) from None
    for fact, expected in collect_graph_metadata(detector).items():
        if found.get(fact) != expected:
            raise UserError(
                f"{name} is not the graph of this detector: expected {fact} = {expected}, got {found.get(fact)};"
                " export the graph again"
            )
    for image in images[1:]:
        try:
            results.append(run(image))
        except Exception as error:
            # The graph of a detector that was trained on whole images must accept images of any size
            if not detector.policy.crop_size:
                reason = get_first_line_of_message(error)
                size = f"{image.shape[3]} x {image.shape[2]} pixels"
                raise UserError(
                    f"the graph {name} must accept images of any size, but cannot process images of {size} ({reason}):"
                    " export the graph again with another version of PyTorch"
                ) from None
            logger.info("the graph %s accepts only images of %d x %d pixels", name, *images[0].shape[2:])
            break
    difference = max(
        compute_largest_difference_from_detector(detector, x, result)
        for x, result in zip(images, results, strict=False)
    )
    if not difference <= TOLERANCE:  # unlike `difference > TOLERANCE`, this is also true for NaN
        raise UserError(
            f"the graph {name} and the detector give different outputs: expected a difference of at most {TOLERANCE:g},"
            f" relative to max(1, |output|), got {difference:.2g}; export the graph again with another version of"
            " PyTorch"
        )
    logger.info(
        "the graph %s and the detector give the same outputs: the largest difference, relative to max(1, |output|), is"
        " %.2g",
        name,
        difference,
    )


def compute_largest_difference_from_detector(detector: Detector, image: Tensor, result: Sequence[np.ndarray]) -> float:
    """Compute the largest difference between the outputs of a graph and of the detector.

    Each difference is divided by max(1, |d|), where d is the output of the detector.

    Args:
        image: batch of images, uint8 (B, 3, H, W).
        result: outputs of the graph, logits (B, 2) and P(fake) (B,).
    """
    logits, prob_fake = result
    with torch.inference_mode():
        expected = detector.network(image.to(torch.float32) / 255).numpy()  # (B, 2), without crops
    expected_prob, _ = probabilities_and_verdicts(expected, detector.calibration)
    expected = np.column_stack([expected, expected_prob])  # (B, 3)
    found = np.column_stack([logits, prob_fake])
    return float(np.max(np.abs(found - expected) / np.maximum(np.abs(expected), 1)))
