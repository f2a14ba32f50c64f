"""Who takes part: the same weights and images in one of several forms, as functions that take no arguments."""

import json
import sys
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.measure import PAPER, TINY, calm
from benchmarks.plain import plain_detector
from data.datasets import Batch
from data.images import SizePolicy
from data.lists import Item
from evaluation import sources
from evaluation.detector import Detector
from models.auxiliary import draw_degradation
from models.features import STAGE_CHANNELS, load_vgg
from models.rdn import RDN
from models.resnet import DeepStemResNet
from models.resynthesis import ResynthesisDetector
from train_detector import parameter_groups, train_step
from train_sr import patch_loss
from utils.compute import Compute, choose_compute, choose_device
from utils.distributed import World
from utils.random_streams import DEGRADE_BATCH, seeded_generator
from utils.training import Stepper

CPU_FORMS = "plain fp32, plain channels-last fp32, plain channels-last bf16, ours fp32, ours bf16".split(", ")
GPU_FORMS = [form.replace("fp32", "tf32") for form in CPU_FORMS] + ["ours fp32"]
PATCHES, PATCH_SIDE, VGG_LAMBDA = 12, 96, 0.2  # of train_super_resolution_celeba.sh


class Case(NamedTuple):
    """What is computed, and where: stage of the residual, side of the images in pixels; quick: tiny networks."""

    stage: int
    side: int
    images: int = 1
    quick: bool = False
    gpu: str | None = "cpu"

    def __str__(self) -> str:
        return f"stage {self.stage}, {self.images} of {self.side} x {self.side}"


class DefaultOrder(Compute):
    """Images in PyTorch's default memory order."""

    def input(self, images: Tensor) -> Tensor:
        return super().input(images).contiguous()


def compute_of(form: str, case: Case) -> Compute:
    """Sets PyTorch to the precision a form ends in, which on a GPU is a matter of the whole process."""
    precision = form.split()[-1]
    precision = precision.replace("tf32", "fp32") if choose_device(case.gpu).type == "cpu" else precision
    compute = choose_compute(case.gpu, precision, deterministic=False, seed=0)
    return DefaultOrder(*compute) if form.startswith("plain") and "channels-last" not in form else compute


def prepared(form: str, case: Case, vgg: bool = False) -> tuple[ResynthesisDetector, Compute, Batch]:
    """Networks with the same random weights, with features for a second loss if asked for, and noise, half of it real."""
    compute = compute_of(form, case)
    torch.manual_seed(0)
    classifier = DeepStemResNet("resnet18" if case.quick else "resnet50", STAGE_CHANNELS[case.stage])
    calm(classifier.state_dict())
    features = load_vgg("random")[0] if vgg or case.stage else None
    network = ResynthesisDetector(RDN(**(TINY if case.quick else PAPER)), classifier, case.stage, features).eval()
    network = plain_detector(network) if form.startswith("plain") else network
    order = torch.contiguous_format if isinstance(compute, DefaultOrder) else torch.channels_last
    pixels = seeded_generator(0).integers(0, 256, (case.images, 3, case.side, case.side), dtype="uint8")
    labels, weights = torch.arange(1, case.images + 1) % 2, torch.full((case.images,), 1 / case.images)
    keys = [(0, i, 0) for i in range(case.images)]
    batch = Batch(torch.from_numpy(pixels), labels, weights, [Item("noise", None, "")] * case.images, keys, {})
    return network.to(compute.device, memory_format=order), compute, batch


def scorer(form: str, case: Case) -> Callable[[], Tensor]:
    """From pixels to logits (B, 2); ours as test.py does it."""
    network, compute, batch = prepared(form, case)

    @torch.no_grad()
    def plain() -> Tensor:
        with compute.autocast():
            return network(compute.input(batch.x)).float().cpu()

    ours = partial(Detector(network, compute, SizePolicy(), {}, {}, "").logits, batch.x)
    return plain if form.startswith("plain") else ours


def training_step(
    form: str, case: Case, task: str | None = None, keep_all: bool = False, micro_batch: int | None = None
) -> Callable[[], object]:
    """A step of train_detector.py --fixed-sr, or of a task that degrades reals. keep_all: no gradient checkpointing."""
    network, compute, batch = prepared(form, case, vgg=task is not None)
    network.train().freeze_resynthesizer(task is None)
    network.resynthesizer.checkpoint_blocks = not keep_all
    sgd = torch.optim.SGD(parameter_groups(network, 1e-9, 1e-4, 1e-3), momentum=0.9)
    stepper = Stepper(sgd, compute, World())
    residuals_of = partial(sources.frozen_residuals, network, compute, None)
    if task:
        seed = next(s for s in count() if draw_degradation(task, seeded_generator(s, 0, 0, DEGRADE_BATCH)))
        auxiliary = sources.Auxiliary(task, 1.0, seed, micro_batch)
        residuals_of = partial(sources.end_to_end_residuals, network, compute, World(), auxiliary)

    def step() -> None:
        stepper.progress.step = 0  # for which the seed degrades
        # The loss is taken where there are two reals; of a single image as if another process had the second
        with patch.object(sources, "sum_over_processes", lambda reals, _: reals + (case.images < 3)):
            train_step(network, batch, residuals_of, stepper)

    return step


def sr_step(form: str, case: Case) -> Callable[[], object]:
    """A step of train_sr.py on a batch of patches, both losses. case.side: of the patches."""
    network, compute, batch = prepared(form, case, vgg=True)
    adam = torch.optim.Adam(network.resynthesizer.parameters(), lr=1e-6)
    stepper = Stepper(adam, compute, World())
    loss_of = partial(patch_loss, network.resynthesizer, network.vgg, VGG_LAMBDA, lambda x_lr, _: x_lr, compute)
    return lambda: stepper.step(loss_of(batch)[0], {}, batch)


def matrix_product(precision: str, order: int, case: Case) -> Callable[[], object]:
    """A product of two square matrices, 2 * order^3 FLOP: the most that a machine does in practice."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(order, order).to(choose_device(case.gpu), dtype) for _ in range(2))
    return lambda: a @ b


if __name__ == "__main__":
    name, form, case, *more = json.loads(sys.argv[1])
    globals()[name](form, Case(*case), *more)()
