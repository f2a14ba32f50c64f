"""Measure the time and memory of one benchmark case (a task and its settings).

    python -m benchmarks.cases JSON

The argument JSON is a JSON object with the fields of `Case`. The form "plain" of the networks runs RDN and
VGG-19 on whole images instead of tiles. The form "channels-last" equals the form "plain", but uses the channels-last
memory format. The form "here" is the code that the programs of this project run.
"""

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train_sr
from data.datasets import Batch, RowKey
from data.lists import Item
from models.build import CLASSIFIERS
from models.features import Pixels, VGG19Stage, load_vgg
from models.rdn import RDN
from models.resynthesis import ResynthesisDetector
from train_detector import (
    AuxiliaryTask,
    end_to_end_loss,
    loss_with_frozen_resynthesizer,
    residual_without_gradients,
)
from utils.compute import Compute, choose_device_and_precision
from utils.distributed import World
from utils.optimizers import create_optimizer
from utils.training import Stepper

TASKS = {0: "colorization", 5: "denoising"}  # auxiliary task for each feature stage, as in the scripts in script/
VGG_LAMBDA = 0.2  # weight of the perceptual loss, as in train_super_resolution_celeba.sh
GPU_WARM_UPS = 3  # number of untimed runs, in which cuDNN chooses its algorithms
GPU_RUNS = 5  # number of timed runs


class Case(NamedTuple):
    """The task and the settings of one measurement."""

    kind: str  # name of the task to measure, one of the keys of the dict KINDS
    form: str  # implementation of the networks: "plain", "channels-last", or "here" (the code of this project)
    precision: str  # fp32, tf32 or bf16
    stage: int  # feature stage: 0 = pixels, 5 = stage 5 of VGG-19
    side: int  # height and width of the images in pixels
    images: int  # number of images in the batch
    gpu: str  # number of the GPU, or "cpu"
    quick: bool  # whether to use toy networks


class PlainRDN(nn.Module):
    """A plain PyTorch implementation of RDN (CVPR 2018, figure 2), which uses the layers of the given `rdn`."""

    def __init__(self, rdn: RDN):
        super().__init__()
        self.rdn = rdn
        self.scale = rdn.scale

    def forward(self, x_lr: Tensor) -> Tensor:
        """Enlarge images x_lr (B, 3, h, w) to (B, 3, scale * h, scale * w)."""
        sfe1 = self.rdn.sfe1(x_lr)  # (B, G0, h, w)
        x = self.rdn.sfe2(sfe1)  # (B, G0, h, w)
        block_outputs = []
        for block in self.rdn.rdbs:
            maps = x
            for layer in block.layers:
                maps = torch.cat([maps, F.relu(layer.conv(maps))], dim=1)
            x = x + block.lff(maps)  # (B, G0, h, w)
            block_outputs.append(x)
        x = self.rdn.gff(torch.cat(block_outputs, dim=1)) + sfe1  # (B, G0, h, w)
        return self.rdn.output(self.rdn.upscale(x))  # (B, 3, scale * h, scale * w)


# --- networks and images ------------------------------------------------------------------------------------


def build_detector(case: Case) -> tuple[ResynthesisDetector, Compute]:
    """Create a detector with random weights, which are the same in every call."""
    compute = choose_device_and_precision(case.gpu, case.precision, deterministic=False, seed=0)
    torch.manual_seed(0)
    rdn = RDN(num_features=8, growth_rate=8, num_blocks=2, num_layers=2) if case.quick else RDN()
    features = Pixels()
    if case.stage > 0:
        features = VGG19Stage(case.stage)
        features.load_pretrained("random", None, "")
    classifier = CLASSIFIERS["resnet18" if case.quick else "resnet50"](features.channels)
    resynthesizer = rdn
    if case.form != "here":
        resynthesizer = PlainRDN(rdn)
        if case.stage > 0:
            features.vgg.run_layers_in_tiles = features.vgg.run_layers_on_whole_maps
    detector = ResynthesisDetector(resynthesizer, features, classifier).eval()
    order = torch.contiguous_format if case.form == "plain" else torch.channels_last
    return detector.to(compute.device, memory_format=order), compute


def make_noise_batch(case: Case) -> Batch:
    """Create a batch of noise images, whose labels alternate between FAKE and REAL."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (case.images, 3, case.side, case.side), dtype=np.uint8)
    labels = torch.arange(case.images) % 2
    weights = torch.full((case.images,), 1 / case.images)
    items = [Item("noise", None, "")] * case.images
    keys = [RowKey(0, i, 0) for i in range(case.images)]
    return Batch(torch.from_numpy(pixels), labels, weights, items, keys, {})


# --- tasks to measure: each function returns a function without arguments, whose run is timed ---------------------


def prepare_scoring(case: Case) -> Callable[[], Tensor]:
    """Return a function that computes the logits (B, 2) of a batch of B noise images."""
    detector, compute = build_detector(case)
    x = make_noise_batch(case).x

    @torch.inference_mode()
    def score_batch() -> Tensor:
        images = compute.images_to_float(x)
        if case.form == "plain":
            images = images.contiguous()
        with compute.autocast():
            return detector(images).float().cpu()

    return score_batch


def prepare_classifier_training_step(case: Case) -> Callable[[], object]:
    """Return a function that runs a training step of the classifier with a frozen RDN, without a cache of residuals."""
    detector, compute = build_detector(case)
    detector.train().set_resynthesizer_frozen(True)
    stepper = Stepper(create_optimizer("sgd", detector, 1e-6, 0.02, 0.9, 1e-4), compute, World())
    residual_of = partial(residual_without_gradients, detector, compute, None)
    batch = make_noise_batch(case)

    def run_classifier_training_step() -> None:
        loss, values = loss_with_frozen_resynthesizer(detector, residual_of, batch)
        stepper.step(loss, values, batch)

    return run_classifier_training_step


def prepare_fine_tuning_step(case: Case) -> Callable[[], object]:
    """Return a function that runs a training step of the classifier and the re-synthesizer, with an auxiliary task."""
    detector, compute = build_detector(case)
    detector.train().set_resynthesizer_frozen(False)
    detector.resynthesizer.checkpoint_blocks = True
    vgg = load_vgg("random")[0].to(compute.device, memory_format=torch.channels_last)
    task = AuxiliaryTask(TASKS[case.stage], 1.0, vgg, 0, 1)
    stepper = Stepper(create_optimizer("sgd", detector, 1e-6, 0.02, 0.9, 1e-4), compute, World())
    batch = make_noise_batch(case)

    def run_fine_tuning_step() -> None:
        loss, values = end_to_end_loss(detector, compute, World(), task, stepper.progress, batch)
        stepper.step(loss, values, batch)

    return run_fine_tuning_step


def prepare_rdn_training_step(case: Case) -> Callable[[], object]:
    """Return a function that runs a training step of train_sr.py on patches, with the perceptual loss."""
    detector, compute = build_detector(case)
    model = detector.resynthesizer.train()
    vgg = load_vgg("random")[0].to(compute.device, memory_format=torch.channels_last)
    degradations = train_sr.PatchDegradations(0, False, False, False)
    stepper = Stepper(torch.optim.Adam(model.parameters(), lr=1e-6), compute, World())
    batch = make_noise_batch(case)

    def run_rdn_training_step() -> None:
        loss, values = train_sr.compute_patch_loss(model, vgg, VGG_LAMBDA, degradations, compute, batch)
        stepper.step(loss, values, batch)

    return run_rdn_training_step


def prepare_rdn_forward(case: Case) -> Callable[[], Tensor]:
    """Return a function that runs a forward pass of RDN without gradients."""
    detector, compute = build_detector(case)
    x_lr = torch.rand(case.images, 3, case.side // 4, case.side // 4, device=compute.device)
    x_lr = x_lr.contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def run_rdn_forward_pass() -> Tensor:
        with compute.autocast():
            return detector.resynthesizer(x_lr)

    return run_rdn_forward_pass


def prepare_matrix_product(case: Case) -> Callable[[], Tensor]:
    """Return a function that multiplies two matrices of side x side values, with 2 * side^3 operations."""
    compute = choose_device_and_precision(case.gpu, case.precision, deterministic=False, seed=0)
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    a = torch.randn(case.side, case.side, device=compute.device, dtype=dtype)
    return lambda: a @ a


KINDS = {
    "scoring": prepare_scoring,
    "step, RDN frozen": prepare_classifier_training_step,
    "step, fine-tuning": prepare_fine_tuning_step,
    "step, train_sr.py": prepare_rdn_training_step,
    "RDN alone": prepare_rdn_forward,
    "matrix product": prepare_matrix_product,
}


# --- measuring ----------------------------------------------------------------------------------------------


def measure_time_and_memory_of_case(case: Case) -> dict[str, float]:
    """Run a benchmark case (a task and its settings), and measure its time and memory.

    Returns:
        A dict with the entries "seconds", the median time of the timed runs, and "gib", the peak memory in GiB (on a
        GPU, PyTorch's reserved memory; on a CPU, the process's resident memory).
    """
    run = KINDS[case.kind](case)
    on_gpu = case.gpu != "cpu"
    times = []
    for i in range(GPU_WARM_UPS + GPU_RUNS if on_gpu else 1):
        started = time.perf_counter()
        run()
        if on_gpu:
            torch.cuda.synchronize()
        if not on_gpu or i >= GPU_WARM_UPS:
            times.append(time.perf_counter() - started)
    gib = torch.cuda.max_memory_reserved() / 2**30 if on_gpu else peak_memory_gib()
    return {"seconds": statistics.median(times), "gib": gib}


def peak_memory_gib() -> float:
    """Return the peak resident memory of this process in GiB, including the PyTorch library."""
    status = Path("/proc/self/status")
    if status.exists():
        words = status.read_text().split()
        return int(words[words.index("VmHWM:") + 1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # on macOS, the unit of ru_maxrss is bytes


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure_time_and_memory_of_case(Case(**json.loads(sys.argv[1])))) + "\n")
