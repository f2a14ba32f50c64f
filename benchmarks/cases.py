"""Make one measurement in its own process: python -m benchmarks.cases JSON, where JSON holds the fields of `Case`.

Three implementations (forms) of the same networks are compared. "plain" follows the figures of the papers: whole
feature maps, torch.cat, and PyTorch's default memory format. "channels-last" is the plain form with channels-last
memory format, and with autocast for bf16. "here" is the code that the programs of this checkout run.
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
from data.datasets import Batch
from data.lists import Item
from models.build import CLASSIFIERS
from models.features import Pixels, VGG19Stage, load_vgg
from models.rdn import RDN
from models.resynthesis import ResynthesisDetector
from train_detector import AuxiliaryTask, end_to_end_loss, frozen_loss, frozen_residual, parameter_groups
from utils.compute import Compute, choose_compute
from utils.distributed import World
from utils.training import Stepper

TASKS = {0: "colorization", 5: "denoising"}  # feature stage -> auxiliary task, as in the two fine-tuning scripts
VGG_LAMBDA = 0.2  # weight of the perceptual loss, as in train_super_resolution_celeba.sh
GPU_WARM_UPS = 3  # runs that are not timed, because cuDNN chooses its algorithms in the first runs
GPU_RUNS = 5  # runs that are timed


class Case(NamedTuple):
    """The settings of one measurement."""

    kind: str  # what is measured, a key of KINDS
    form: str  # implementation: plain, channels-last or here
    precision: str  # fp32, tf32 or bf16
    stage: int  # feature stage: 0 = pixels, 5 = stage 5 of VGG-19
    side: int  # height and width of the images in pixels
    images: int  # number of images
    gpu: str  # number of the GPU, or "cpu"
    quick: bool  # whether to use toy networks


class PlainRDN(nn.Module):
    """RDN as drawn in figure 2 of Zhang et al. (CVPR 2018). The parameters are shared with an `RDN` of this code."""

    def __init__(self, rdn: RDN):
        super().__init__()
        self.rdn = rdn
        self.scale = rdn.scale

    def forward(self, x_lr: Tensor) -> Tensor:
        """Enlarge images: (B, 3, h, w) -> (B, 3, scale * h, scale * w)."""
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


def build(case: Case) -> tuple[ResynthesisDetector, Compute]:
    """Create a detector with random weights. The seed is fixed, so that all forms have equal weights."""
    compute = choose_compute(case.gpu, case.precision, deterministic=False, seed=0)
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


def noise_batch(case: Case) -> Batch:
    """Create a batch of noise images. Every second image is labelled real."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (case.images, 3, case.side, case.side), dtype=np.uint8)
    labels = torch.arange(case.images) % 2
    weights = torch.full((case.images,), 1 / case.images)
    items = [Item("noise", None, "")] * case.images
    keys = [(0, i, 0) for i in range(case.images)]
    return Batch(torch.from_numpy(pixels), labels, weights, items, keys, {})


# --- kinds of measurements: each function takes a case, and returns a function without arguments to be timed ------


def scoring(case: Case) -> Callable[[], Tensor]:
    """Prepare scoring a batch: from uint8 images (B, 3, H, W) to logits (B, 2)."""
    detector, compute = build(case)
    x = noise_batch(case).x

    @torch.inference_mode()
    def run() -> Tensor:
        images = compute.input(x)
        if case.form == "plain":
            images = images.contiguous()
        with compute.autocast():
            return detector(images).float().cpu()

    return run


def frozen_step(case: Case) -> Callable[[], object]:
    """Prepare a training step of train_detector.py --fixed-sr without cached residuals."""
    detector, compute = build(case)
    detector.train().freeze_resynthesizer(True)
    stepper = Stepper(torch.optim.SGD(parameter_groups(detector, 1e-6, 1e-4, 0.02), momentum=0.9), compute, World())
    residual_of = partial(frozen_residual, detector, compute, None)
    batch = noise_batch(case)

    def run() -> None:
        loss, values = frozen_loss(detector, residual_of, batch)
        stepper.step(loss, values, batch)

    return run


def fine_tuning_step(case: Case) -> Callable[[], object]:
    """Prepare a training step of train_detector.py with an auxiliary task and --micro-batch 1."""
    detector, compute = build(case)
    detector.train().freeze_resynthesizer(False)
    detector.resynthesizer.checkpoint_blocks = True
    vgg = load_vgg("random")[0].to(compute.device, memory_format=torch.channels_last)
    task = AuxiliaryTask(TASKS[case.stage], 1.0, vgg, 0, 1)
    stepper = Stepper(torch.optim.SGD(parameter_groups(detector, 1e-6, 1e-4, 0.02), momentum=0.9), compute, World())
    batch = noise_batch(case)

    def run() -> None:
        loss, values = end_to_end_loss(detector, compute, World(), task, stepper.progress, batch)
        stepper.step(loss, values, batch)

    return run


def sr_step(case: Case) -> Callable[[], object]:
    """Prepare a training step of train_sr.py on patches, with the perceptual loss."""
    detector, compute = build(case)
    model = detector.resynthesizer.train()
    vgg = load_vgg("random")[0].to(compute.device, memory_format=torch.channels_last)
    degradations = train_sr.PatchDegradations(0, False, False, False)
    stepper = Stepper(torch.optim.Adam(model.parameters(), lr=1e-6), compute, World())
    batch = noise_batch(case)

    def run() -> None:
        loss, l1, _ = train_sr.patch_loss(model, vgg, VGG_LAMBDA, degradations, compute, batch)
        stepper.step(loss, {"l1": l1}, batch)

    return run


def rdn_alone(case: Case) -> Callable[[], Tensor]:
    """Prepare a forward pass of RDN without gradients."""
    detector, compute = build(case)
    x_lr = torch.rand(case.images, 3, case.side // 4, case.side // 4, device=compute.device)
    x_lr = x_lr.contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def run() -> Tensor:
        with compute.autocast():
            return detector.resynthesizer(x_lr)

    return run


def matrix_product(case: Case) -> Callable[[], Tensor]:
    """Prepare a product of two square matrices with `side` rows, which takes 2 * side^3 operations."""
    compute = choose_compute(case.gpu, case.precision, deterministic=False, seed=0)
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    a = torch.randn(case.side, case.side, device=compute.device, dtype=dtype)
    return lambda: a @ a


KINDS = {
    "scoring": scoring,
    "step, RDN frozen": frozen_step,
    "step, fine-tuning": fine_tuning_step,
    "step, train_sr.py": sr_step,
    "RDN alone": rdn_alone,
    "matrix product": matrix_product,
}


# --- measuring ----------------------------------------------------------------------------------------------


def measure(case: Case) -> dict[str, float]:
    """Measure a case in this process. Returns the time of one run ("seconds") and the peak memory ("gib").

    The peak memory is the reserved GPU memory, or on the CPU the resident memory of this process.
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
    gib = torch.cuda.max_memory_reserved() / 2**30 if on_gpu else peak_memory()
    return {"seconds": statistics.median(times), "gib": gib}


def peak_memory() -> float:
    """Return the peak resident memory of this process in GiB. It includes the code of PyTorch."""
    status = Path("/proc/self/status")
    if status.exists():
        words = status.read_text().split()
        return int(words[words.index("VmHWM:") + 1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # macOS gives bytes


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(Case(**json.loads(sys.argv[1])))) + "\n")
