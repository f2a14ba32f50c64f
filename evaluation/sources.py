"""How the residuals of a batch come: with an RDN that is trained, or from a frozen one, perhaps computed before.

train_detector.py chooses once. Each gives the residuals (B, C_l, H_l, W_l) of a batch, and this process's share of its
auxiliary loss, a scalar (None: there is none).
"""

import logging
import math
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from data.datasets import Batch, ImageDataset
from data.residuals import STORAGE, ResidualDataset, cache_folder, has_room
from models import ResynthesisDetector
from models.auxiliary import degrade_batch, draw_degradation, residual_and_auxiliary_loss
from utils.compute import Compute
from utils.distributed import World, all_reduce_sum, broadcast_from_main
from utils.files import make_folder
from utils.labels import REAL
from utils.random_streams import DEGRADE_BATCH, DEGRADE_IMAGE, seeded_generator
from utils.training import Progress

logger = logging.getLogger(__name__)

ResidualsOf = Callable[[Batch, Progress], tuple[Tensor, Tensor | None]]


@torch.no_grad()
def frozen_residuals(
    detector: ResynthesisDetector, compute: Compute, micro_batch: int | None, batch: Batch, _: Progress | None = None
) -> tuple[Tensor, None]:
    """Computed without gradients, or as the batch has them.

    micro_batch: images that pass through RDN and VGG at a time; None: all.
    """
    if batch.x.is_floating_point():  # of a ResidualDataset
        residual = batch.x.to(compute.device, non_blocking=True).float()  # (B, C_l, H_l, W_l)
        return residual.contiguous(memory_format=torch.channels_last), None
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
    reals = int(all_reduce_sum((real & counted).sum().to(compute.device), world))
    wanted = real & (reals > 1 and auxiliary.weight > 0)
    degraded, batch_rng = None, seeded_generator(auxiliary.seed, progress.epoch, progress.step, DEGRADE_BATCH)
    degradation = draw_degradation(auxiliary.task, batch_rng)
    if degradation and wanted.any():
        rngs = [seeded_generator(auxiliary.seed, *key, DEGRADE_IMAGE) for key in batch.keys]
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


def kept_residuals(
    args: Namespace,
    detector: ResynthesisDetector,
    config: dict,
    compute: Compute,
    datasets: Sequence[ImageDataset],
    world: World,
) -> list[ResidualDataset]:
    """The images as residuals kept on disk; none if they change from epoch to epoch, or there is no room for all."""
    if not args.fixed_resynthesizer or not args.cache:
        return []
    if any(images.drawn_anew or images.transform for images in datasets):
        logger.info(
            "no residual cache: images are cropped (but see --crops-per-image) or perturbed (--augment-perturb) anew"
            " in each epoch, and so are their residuals"
        )
        return []
    about = {
        "resynthesizer": config["resynthesizer_fingerprint"],
        "vgg": config["vgg"] and config["vgg"]["fingerprint"],
        "stage": detector.stage,
        "scale, crop, resize": tuple(datasets[0].policy),
        "arithmetic": str(compute),
        "storage": args.cache_precision,
    }
    dtype = STORAGE[args.cache_precision]
    folder = cache_folder(make_folder(args.cache_dir or Path(args.output_path) / "residual_cache"), about)
    both_ways = [size for images in datasets for size in images.sizes * images.parts * (2 if images.draws else 1)]
    bytes_of = [math.prod(detector.residual_shape(*size)) * dtype.itemsize for size in both_ways]
    fits = broadcast_from_main(has_room(folder, bytes_of, args.cache_gb * 1e9), world)
    return [ResidualDataset(images, folder, dtype) for images in datasets] if fits else []
