"""How the residuals of a batch come: with an RDN that is trained, computed by a frozen one, or read from a cache.

train_detector.py chooses once. Each gives the residuals (B, C_l, H_l, W_l) of a batch, and this process's share of its
auxiliary loss, a scalar (None: there is none).
"""

import logging
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from data.datasets import Batch, ImageDataset
from data.residuals import ResidualCache
from models import ResynthesisDetector
from models.auxiliary import degrade_batch, draw_degradation, residual_and_auxiliary_loss
from utils.distributed import World, from_main, sum_over_processes
from utils.run import REAL, Compute, keyed_generator, make_folder
from utils.training import Progress

logger = logging.getLogger(__name__)

ResidualsOf = Callable[[Batch, Progress], tuple[Tensor, Tensor | None]]


def read_residuals(compute: Compute, batch: Batch, _: Progress | None = None) -> tuple[Tensor, None]:
    """The batch is of residuals already."""
    residual = batch.x.to(compute.device, non_blocking=True).float()  # (B, C_l, H_l, W_l)
    return residual.contiguous(memory_format=torch.channels_last), None


@torch.no_grad()
def frozen_residuals(
    detector: ResynthesisDetector, compute: Compute, micro_batch: int | None, batch: Batch, _: Progress | None = None
) -> tuple[Tensor, None]:
    """Without gradients. micro_batch: images that pass through RDN and VGG at a time; None: all."""
    x = compute.input(batch.x)  # (B, 3, H, W)
    with compute.autocast():
        return torch.cat([detector.compare(part).residual for part in x.split(micro_batch or len(x))]), None


class Auxiliary(NamedTuple):
    """The second loss of end-to-end training."""

    task: str  # of --mode-sr
    weight: float
    seed: int
    micro_batch: int | None  # images that pass through RDN and VGG at a time; None: all


def end_to_end_residuals(
    detector: ResynthesisDetector,
    compute: Compute,
    world: World,
    auxiliary: Auxiliary,
    batch: Batch,
    progress: Progress,
) -> tuple[Tensor, Tensor]:
    """With gradients for RDN, and the loss of its auxiliary task, which is taken if the batch has two reals or more.

    Release: the loss is taken in every step, on degraded images in one half of them, on clean ones in the other; with
    `--mode-sr none` always on clean ones. What is drawn depends on seed and step or image alone. Micro-batches are
    computed once more in the backward pass and make the same update: RDN and VGG hold no batch normalisation.
    """
    x = compute.input(batch.x)  # (B, 3, H, W)
    real, counted = batch.labels == REAL, batch.weights > 0  # (B,) each
    reals = int(sum_over_processes((real & counted).sum().to(compute.device), world))
    wanted = real & (reals > 1 and auxiliary.weight > 0)
    degraded = None
    degradation = draw_degradation(auxiliary.task, keyed_generator(auxiliary.seed, progress.epoch, progress.step, 4))
    if degradation and wanted.any():
        rngs = [keyed_generator(auxiliary.seed, *key, 5) for key in batch.keys]
        degraded = degrade_batch(degradation, x, detector.resynthesizer.scale, rngs)  # (B, 3, h, w)

    def losses(rows: slice) -> tuple[Tensor, Tensor]:
        with compute.autocast():
            low = None if degraded is None else degraded[rows]
            return residual_and_auxiliary_loss(detector, x[rows], wanted[rows].to(x.device), low)

    size = auxiliary.micro_batch or len(x)
    parts = [slice(start, start + size) for start in range(0, len(x), size)]
    results = [losses(p) if len(parts) == 1 else checkpoint(losses, p, use_reentrant=False) for p in parts]
    residual, loss = (torch.cat(tensors) for tensors in zip(*results, strict=True))  # (B, C_l, H_l, W_l), (B,)
    shares = counted.to(loss) * auxiliary.weight / max(reals, 1)  # (B,): of the mean over the reals of all processes
    return residual, (loss * shares).sum()


def residual_cache(
    args: Namespace,
    detector: ResynthesisDetector,
    config: dict,
    compute: Compute,
    datasets: list[ImageDataset],
    world: World = World(),  # noqa: B008
) -> ResidualCache | None:
    """Where residuals of the images are kept, if they are the same in each epoch and there is room for all."""
    if not args.fixed_resynthesizer or not args.cache:
        return None
    if args.augment_perturb or (args.crop_size and not args.crops):
        what = "perturbed (--augment-perturb)" if args.augment_perturb else "cropped (but see --crops-per-image)"
        logger.info("no residual cache: training images are %s anew, so their residuals are new in each epoch", what)
        return None
    about = {
        "resynthesizer": config["resynthesizer_fingerprint"],
        "vgg": config["vgg"] and config["vgg"]["fingerprint"],
        "stage": detector.stage,
        "scale, crop, resize": (detector.resynthesizer.scale, args.crop_size or None, args.resize or None),
        "arithmetic": str(compute),
    }
    folder = make_folder(args.cache_dir or Path(args.output_path) / "residual_cache")
    cache = ResidualCache(folder, about, args.cache_precision)
    both_ways = [size for images in datasets for size in images.sizes * images.parts * (2 if images.draws else 1)]
    shapes = [detector.residual_shape(*size) for size in both_ways]
    return cache if from_main(cache.has_room(shapes, args.cache_gb * 1e9), world) else None
