"""Stage 2: train the detector on re-synthesis residuals, RDN frozen. Stage 3: fine-tune both end to end.

    python train_detector.py --fixed-sr --sr-weights-file output_hr/x4/best.pth --no_dilation \\
        --data-root-pos REAL_DIR --data-root-neg GENERATED_DIR --output-path output_end2end/mine
    python train_detector.py --mode-sr denoising --init output_end2end/mine/last.pth.tar --lr 1e-6 ...

Writes, into OUTPUT_PATH: NNNN.pth.tar and NNNN_sr.pth.tar (the released formats; NNNN counts epochs from 1),
best.pth.tar (highest AUROC on the validation images), last.pth.tar (the whole state, for --resume), config.json,
stats.jsonl and TensorBoard records.
"""

import contextlib
import logging
import math
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import center_crop
from tqdm import tqdm

from data.audit import log_quick_audit
from data.images import (
    FAKE,
    LABEL_NAMES,
    REAL,
    Batch,
    DataError,
    ImageDataset,
    Item,
    SizePolicy,
    check_headers,
    collate,
    fit_size,
    fitted_size,
    labelled_items,
    load_image,
    to_float,
    usable_items,
)
from data.loading import make_loader
from data.perturbations import AugmentTransform
from data.residual_cache import CachedBatch, CachedImages, ResidualCache, collate_cached
from data.sampling import EpochBatches, shard
from models import (
    SINGLE_IMAGE,
    STAGE_CHANNELS,
    Checkpoint,
    ModelError,
    ResynthesisDetector,
    VGGStages,
    downsample,
    fingerprint,
    load_detector,
    load_vgg,
    new_detector,
    residual_energy,
    trains_on_one,
)
from models.auxiliary import (
    DEGRADE_PROBABILITY,
    HEADS,
    ColorizationHead,
    DenoisingHead,
    residual_and_auxiliary_loss,
    uniform,
)
from utils import checkpoint as checkpoints
from utils.checkpoint import CheckpointError
from utils.distributed import World, gather_rows, share_buffers, sum_over_processes, world_of_processes
from utils.metrics import auroc
from utils.options import train_detector_parser
from utils.run import (
    Recorder,
    StopSignal,
    UsageError,
    autocast,
    choose_device,
    keyed_generator,
    make_folder,
    run_program,
    set_deterministic,
    sole_writer,
)
from utils.training import SAFETY_OPTIONS, Progress, StateKeeper, Stepper, prune, warn_about_changes

logger = logging.getLogger("train_detector")

LAST = "last.pth.tar"
CACHE_FOLDER = "residual_cache"  # in the output folder
CHANGEABLE = SAFETY_OPTIONS | {  # when resuming
    "gpu", "workers", "resume", "init", "output_path", "resynthesizer_file", "cache_dir", "cache_gb",
}  # fmt: skip
FINAL_RATE = 1e-4  # of the base rate: where the cosine schedule ends
PICTURE_SIDE = 256  # pixels of the pictures in TensorBoard
PICTURE_GAIN = 4  # residuals are faint: shown brighter by this factor


def main(argv: list[str] | None = None) -> None:
    args = train_detector_parser().parse_args(argv)
    device = choose_device(args.gpu)
    with world_of_processes(device.type) as world, StopSignal() as stop, contextlib.ExitStack() as stack:
        set_deterministic(args.seed, device)

        # Images are listed before any network is built, networks before any image is read
        items = labelled_items(args.real_roots, args.fake_roots, args.tree, args.csv)
        val_items = labelled_items(args.val_real_roots, args.val_fake_roots) if args.val_real_roots else []
        detector, config, resumed = networks(args)
        detector.freeze_resynthesizer(args.fixed_resynthesizer)
        detector.resynthesizer.checkpoint_blocks = not args.fixed_resynthesizer  # or 12 GB for an image of 1024 x 1024
        recipe = make_recipe(args, device, config, resumed, detector)
        policy = SizePolicy(detector.resynthesizer.scale, args.crop_size, args.resize)
        items = usable_items(items, policy, args.skip_bad)
        val_items = usable_items(val_items, policy, args.skip_bad)
        batches = EpochBatches(len(items), args.batch_size, args.seed, True, world.rank, world.size)
        synchronised = world.size > 1 and device.type == "cuda"  # batch normalisation, over the processes
        if not synchronised:
            refuse_lone_images(detector, items, policy, batches)
        if world.is_main:
            log_quick_audit(items, val_items)

        # What is trained, how far it is, and what is kept of it
        folder = make_folder(args.output_path)
        stack.enter_context(sole_writer(folder / ".lock", world))
        detector.to(device, memory_format=torch.channels_last)
        if synchronised:
            detector.classifier = nn.SyncBatchNorm.convert_sync_batchnorm(detector.classifier)
        groups = parameter_groups(detector, args.lr, args.weight_decay, args.classifier_grad_scale)
        sgd = torch.optim.SGD(groups, lr=args.lr, momentum=args.momentum)
        buffers = detector.classifier.buffers()
        stepper = Stepper(sgd, device, args.precision, world, args.skip_nonfinite, folder / LAST, buffers)
        if resumed:
            stepper.load_state_dict(resumed)
            warn_about_changes(resumed["settings"], vars(args), CHANGEABLE)
        progress = stepper.progress
        recorder = Recorder(folder, {"config": config, "settings": vars(args)}, world, progress.epoch)

        def state() -> dict:
            share_buffers(detector.classifier, world)
            return detector_state(detector, config) | stepper.state_dict() | {"settings": vars(args)}

        keeper = StateKeeper(folder / LAST, state, stop, args.save_minutes, world)

        # Training, over images in an order that depends on seed and epoch alone
        perturb = AugmentTransform() if args.augment_perturb else None
        images = ImageDataset(items, policy._replace(random_crop=True), flip=True, seed=args.seed, transform=perturb)
        cache = residual_cache(args, detector, config, items, val_items, policy, device, world)
        recipe = recipe._replace(cache=cache)
        loader = image_loader(images, batches, cache, args.workers, device)
        val_loader = validation_loader(val_items, policy, args.batch_size, cache, args.workers, device, world)
        logger.info("%d training images; from epoch %d, step %d on", len(items), progress.epoch, progress.step)
        shown = example_images(items, policy)
        if progress.total_steps == 0:
            record_pictures(detector, shown, recipe, recorder, 0)
        while progress.epoch < args.epochs:
            epoch = progress.epoch
            stepper.set_rates(rate_factor(epoch, args.epochs))
            batches.set_epoch(epoch, progress.step)
            train_one_epoch(detector, loader, batches, stepper, keeper, recipe, [item.path for item in items])
            values = epoch_values(progress.means()) | {"learning_rate": sgd.param_groups[0]["lr"]}
            if val_items:
                values |= validate(detector, val_loader, recipe, world)
            progress.next_epoch()
            if epoch % args.save_every_epoch == 0 or progress.epoch == args.epochs:
                save_epoch(keeper, progress, args.keep_last, values.get("val_auroc"))
            recorder.epoch(epoch, values)
            if not args.fixed_resynthesizer:
                record_pictures(detector, shown, recipe, recorder, progress.epoch)
        recorder.close()


def networks(args: Namespace) -> tuple[ResynthesisDetector, dict, dict]:
    """The detector, its config, and the state of the run to be continued (empty: this is a new run)."""
    asked = vars(args)
    rdn_file = args.resynthesizer_file
    resynthesizer = Checkpoint(checkpoints.load(rdn_file), rdn_file) if rdn_file else None
    last = Path(args.output_path) / LAST
    if args.resume not in (None, "auto") and args.init:
        raise UsageError("--resume FILE continues a run and --init FILE starts one: give one of them")
    name = args.resume
    if args.resume == "auto":
        name = str(last) if last.exists() else None
        logger.info("resuming %s", name) if name else logger.info("nothing to resume in %s", args.output_path)
    if name is None and args.init is None:
        if resynthesizer is None:
            raise UsageError("no re-synthesizer: give RDN's weights with --sr-weights-file (train_sr.py makes them)")
        return *new_detector(resynthesizer, asked, args.vgg_weights), {}
    start = Checkpoint(checkpoints.load(name or args.init), name or args.init)
    resumed = start.content if name and continues(start, args) else {}
    if resumed and resynthesizer:
        logger.info("RDN comes from %s, where it is as far as the run is, not from %s", name, rdn_file)
        resynthesizer = None
    return *load_detector(start, resynthesizer, asked, args.vgg_weights), resumed


def continues(start: Checkpoint, args: Namespace) -> bool:
    """Whether a checkpoint's run can be gone on with: it has a state, and trained the same parts for the same task."""
    if "progress" not in start.content:
        logger.info("%s holds weights but no training state: a new run starts from them", start.name)
        return False
    settings = start.content["settings"]
    for name in ("fixed_resynthesizer", "auxiliary"):
        if settings.get(name) != vars(args)[name]:
            before = settings.get(name)
            logger.info("%s was trained with %s = %s: a new run starts from its weights", start.name, name, before)
            return False
    return True


def make_recipe(
    args: Namespace, device: torch.device, config: dict, resumed: dict, detector: ResynthesisDetector
) -> "Recipe":
    """How a step is made; loads VGG-19 where the auxiliary loss needs it and the residual does not (into `config`)."""
    head = HEADS[args.auxiliary]
    if head is not None and args.fixed_resynthesizer:
        raise UsageError(f"--mode-sr {args.auxiliary} trains RDN and --fixed-sr does not: leave one of them out")
    vgg = detector.vgg
    if head is not None and vgg is None:
        before = resumed.get("config", {}).get("auxiliary_vgg")  # a resumed run goes on with the features it began with
        vgg, config["auxiliary_vgg"] = load_vgg(args.vgg_weights, before, "the run to be resumed")
    return Recipe(
        device,
        args.precision,
        args.seed,
        args.micro_batch,
        vgg and vgg.to(device, memory_format=torch.channels_last),
        head and head(),
        args.auxiliary_weight,
    )


def residual_cache(
    args: Namespace,
    detector: ResynthesisDetector,
    config: dict,
    items: list[Item],
    val_items: list[Item],
    policy: SizePolicy,
    device: torch.device,
    world: World,
) -> ResidualCache | None:
    """Where residuals are kept, if they are the same in each epoch; the main process says how much room they take."""
    if not args.fixed_resynthesizer or not args.cache:
        return None
    if args.crop_size is not None or args.augment_perturb:
        what = "perturbed anew (--augment-perturb)" if args.augment_perturb else "cropped anywhere (--crop-size)"
        logger.info("no residual cache: training images are %s, so their residuals are new in each epoch", what)
        return None
    about = {
        "resynthesizer": config["resynthesizer_fingerprint"],
        "vgg": config["vgg"] and config["vgg"]["fingerprint"],
        "stage": detector.stage,
        "scale, resize": (policy.scale, policy.resize),
        "arithmetic": f"{args.precision} on {device.type}",
    }
    folder = make_folder(args.cache_dir or Path(args.output_path) / CACHE_FOLDER)
    cache = ResidualCache(folder, about, args.cache_precision, int(args.cache_gb * 1e9))
    if world.is_main:
        sizes = check_headers([item.path for item in items + val_items], policy).sizes
        shapes = [detector.residual_size(*fitted_size(*size, policy)) for size in sizes if size]
        values = [STAGE_CHANNELS[detector.stage] * height * width for height, width in shapes]
        logger.info("%s", cache.plan(values + values[: len(items)]))  # training images either way round
    return cache


def detector_state(detector: ResynthesisDetector, config: dict) -> dict:
    """All that is needed to use the detector: classifier (as the release names it), RDN, and what belongs to them."""
    fingerprints = {"resynthesizer_fingerprint": fingerprint(detector.resynthesizer)}
    return {
        "arch": config["detector"]["arch"],
        "state_dict": detector.classifier.state_dict(),
        "sr_state_dict": detector.resynthesizer.state_dict(),
        "config": config | fingerprints,
    }


def save_epoch(keeper: StateKeeper, progress: Progress, keep_last: int | None, score: float | None) -> None:
    """Write the numbered checkpoints of a finished epoch, the last state, and the best one so far."""
    folder = keeper.path.parent
    better = score is not None and (progress.best is None or score > progress.best)
    if better:
        progress.best = score
    state = keeper.collect()
    if keeper.world.is_main:
        checkpoints.save({**state, "epoch": progress.epoch}, folder / f"{progress.epoch:04d}.pth.tar")
        checkpoints.save({"state_dict": state["sr_state_dict"]}, folder / f"{progress.epoch:04d}_sr.pth.tar")
        if better:
            checkpoints.save({**state, "epoch": progress.epoch}, folder / "best.pth.tar")
        prune(folder, "[0-9]*[0-9].pth.tar", keep_last)
        prune(folder, "[0-9]*_sr.pth.tar", keep_last)
    keeper.save(state)  # last of all: a run killed before has yet to do this, one killed after has all of it


def refuse_lone_images(
    detector: ResynthesisDetector, items: list[Item], policy: SizePolicy, batches: EpochBatches
) -> None:
    """Better said now than in the last step of the first epoch (where the classifier would say it).

    Raises:
        UsageError: if a batch, or a process's share of it, is one image too small to be normalised alone.
    """
    lone = min(batches.shares(step)[1] for step in (0, batches.steps - 1)) < 2 * batches.world_size
    size = check_headers([items[0].path], policy).sizes[0]  # others may differ only in batches of one
    if lone and size and not trains_on_one(*detector.residual_size(*fitted_size(*size, policy))):
        sizes = f"{len(items)} images in batches of {batches.batch_size} over {batches.world_size} process(es)"
        raise UsageError(f"{sizes} leave one alone: {SINGLE_IMAGE}")


def rate_factor(epoch: int, epochs: int) -> float:
    """f(e) = 0.9999 cos(pi/2 * e / (E - 1)) + 0.0001, by which the base rate is multiplied.

    Release: it is set *after* epoch e for the next one, so epochs 0 and 1 both run at f(0) = 1.
    """
    passed = max(epoch - 1, 0) / max(epochs - 1, 1)
    return (1 - FINAL_RATE) * math.cos(math.pi / 2 * passed) + FINAL_RATE


def parameter_groups(detector: ResynthesisDetector, lr: float, weight_decay: float, scale: float) -> list[dict]:
    """The classifier and, if it is trained, RDN, as groups for SGD.

    Release: its `--lr-sr` multiplies the classifier's gradients by `scale` before weight decay and momentum are
    applied. With SGD that is exactly a rate of lr * scale and a weight decay of weight_decay / scale.

    Raises:
        UsageError: for a scale of 0, under which the classifier would only decay.
    """
    if scale == 0:
        raise UsageError("--lr-sr 0 leaves the classifier untrained: give a factor above 0 (default: 0.02)")
    groups = [
        {"params": list(detector.classifier.parameters()), "lr": lr * scale, "weight_decay": weight_decay / scale}
    ]
    resynthesizer = [p for p in detector.resynthesizer.parameters() if p.requires_grad]
    if resynthesizer:
        groups.append({"params": resynthesizer, "lr": lr, "weight_decay": weight_decay})
    return groups


class Recipe(NamedTuple):
    """What a training step needs to know besides the networks and the batch."""

    device: torch.device
    precision: str
    seed: int
    micro_batch: int | None  # images that pass through RDN and VGG at a time; None: all
    vgg: VGGStages | None = None  # of the auxiliary loss
    head: ColorizationHead | DenoisingHead | None = None  # None: no auxiliary loss
    auxiliary_weight: float = 0.0
    cache: ResidualCache | None = None  # of the residuals of a frozen RDN


def train_one_epoch(
    detector: ResynthesisDetector,
    loader: DataLoader,
    batches: EpochBatches,
    stepper: Stepper,
    keeper: StateKeeper,
    recipe: Recipe,
    paths: list[str],
) -> None:
    """The rest of this epoch's steps."""
    detector.train()
    end_to_end = any(p.requires_grad for p in detector.resynthesizer.parameters())
    train_step = end_to_end_step if end_to_end else frozen_step
    for batch in tqdm(loader, desc=f"epoch {stepper.progress.epoch}", leave=False, disable=None):
        own, whole = batches.shares(stepper.progress.step)
        batch, labels = usable(batch), batch.labels.to(recipe.device, non_blocking=True)
        weight = own / len(labels) / whole  # of each image: 0 for one that only keeps a process without a share busy
        if isinstance(batch, CachedBatch):
            residual = cached_residuals(detector, batch, recipe)  # (B, C_l, H_l, W_l)
            values = classifier_step(detector, residual, labels, weight, stepper, recipe)
        else:
            x = to_float(batch.images.to(recipe.device, non_blocking=True))  # (B, 3, H, W)
            x = x.contiguous(memory_format=torch.channels_last)
            values = train_step(detector, x, labels, batch.indices, weight, stepper, recipe)
        stepper.step(values, whole, [paths[i] for i in batch.indices])
        keeper.after_step(recipe.device)
    if recipe.cache:
        recipe.cache.flush()


def frozen_step(
    detector: ResynthesisDetector,
    x: Tensor,
    labels: Tensor,
    indices: list[int],
    weight: float,
    stepper: Stepper,
    recipe: Recipe,
) -> dict[str, Tensor]:
    """Gradients of the classifier alone. x: (B, 3, H, W), labels: (B,). Returns shares of the batch's means."""
    with torch.no_grad(), autocast(recipe.device, recipe.precision):
        residual = torch.cat([detector.residual(chunk) for chunk in x.split(recipe.micro_batch or len(x))])
    return classifier_step(detector, residual, labels, weight, stepper, recipe)


@torch.no_grad()
def cached_residuals(detector: ResynthesisDetector, batch: CachedBatch, recipe: Recipe) -> Tensor:
    """The residuals of a batch (B, C_l, H_l, W_l): as read, or computed now and kept.

    Each is computed alone, whatever else is in the batch: so it is the same in every batch, epoch and process.
    """
    read, computed = list(batch.residuals.to(recipe.device, non_blocking=True).float()), []
    for image, entry in zip(batch.images.to(recipe.device, non_blocking=True), batch.entries, strict=True):
        x = to_float(image[None]).contiguous(memory_format=torch.channels_last)  # (1, 3, H, W)
        with autocast(recipe.device, recipe.precision):
            residual = detector.residual(x)[0]  # (C_l, H_l, W_l)
        computed.append(recipe.cache.keep(entry, residual, tuple(image.shape[-2:])))
    residual = torch.stack([(read if is_read else computed).pop(0) for is_read in batch.is_read])
    return residual.contiguous(memory_format=torch.channels_last)


def classifier_step(
    detector: ResynthesisDetector, residual: Tensor, labels: Tensor, weight: float, stepper: Stepper, recipe: Recipe
) -> dict[str, Tensor]:
    """Gradients of the classifier. residual: (B, C_l, H_l, W_l), labels: (B,). Returns shares of the batch's means."""
    with autocast(recipe.device, recipe.precision):
        logits = detector.classify(residual)  # (B, 2)
    loss = weight * F.cross_entropy(logits, labels, reduction="sum")
    stepper.backward(loss)
    return {"loss": loss, **observed(logits, residual, labels, weight)}


def end_to_end_step(
    detector: ResynthesisDetector,
    x: Tensor,
    labels: Tensor,
    indices: list[int],
    weight: float,
    stepper: Stepper,
    recipe: Recipe,
) -> dict[str, Tensor]:
    """Gradients of classifier and RDN from both losses. x: (B, 3, H, W), labels: (B,).

    With micro-batches the update is the same, batch normalisation included: the classifier sees the residuals of the
    whole batch, whose gradients are then handed on to RDN chunk by chunk (for one more forward pass through RDN).
    """
    real = labels == REAL  # (B,)
    reals = int(sum_over_processes(real.sum() * (weight > 0), stepper.world))
    auxiliary = recipe.head is not None and reals > 1
    degraded = degraded_reals(detector, x, real, indices, stepper.progress, recipe) if auxiliary else None
    chunks = list(split_batch(x, real, degraded, recipe.micro_batch or len(x)))

    def forward(chunk: Chunk) -> tuple[Tensor, Tensor]:
        """The chunk's residual, and its share of the batch's auxiliary loss."""
        wanted = auxiliary and bool(chunk.real.any())
        with autocast(recipe.device, recipe.precision):
            residual, loss = residual_and_auxiliary_loss(
                detector, recipe.vgg, chunk.x, chunk.real, wanted, chunk.degraded
            )
        return residual, loss * (chunk.real.sum() * (weight > 0) / max(reals, 1)) * recipe.auxiliary_weight

    def classify(residual: Tensor) -> tuple[Tensor, Tensor]:
        with autocast(recipe.device, recipe.precision):
            logits = detector.classify(residual)  # (B, 2)
        return weight * F.cross_entropy(logits, labels, reduction="sum"), logits

    if len(chunks) == 1:
        residual, auxiliary_sum = forward(chunks[0])
        loss, logits = classify(residual)
        stepper.backward(loss + auxiliary_sum)
    else:
        with torch.no_grad(), autocast(recipe.device, recipe.precision):
            residual = torch.cat([detector.residual(chunk.x) for chunk in chunks])
        loss, logits = classify(residual.requires_grad_())
        stepper.backward(loss)
        auxiliary_sum = torch.zeros_like(loss)
        for chunk, gradient in zip(chunks, residual.grad.split([len(c.x) for c in chunks]), strict=True):
            chunk_residual, chunk_loss = forward(chunk)
            stepper.backward(chunk_loss, (chunk_residual, gradient))
            auxiliary_sum = auxiliary_sum + chunk_loss.detach()
    values = {"loss": loss + auxiliary_sum, "cross_entropy": loss, "auxiliary": auxiliary_sum}
    return values | observed(logits, residual, labels, weight)


class Chunk(NamedTuple):
    """A part of a batch: its images, which are real, and the degraded low-resolution reals among them, if any."""

    x: Tensor
    real: Tensor
    degraded: Tensor | None


def split_batch(x: Tensor, real: Tensor, degraded: Tensor | None, size: int) -> Iterator[Chunk]:
    """Chunks of `size` images. x: (B, 3, H, W), real: (B,), degraded: (R, 3, h, w) of the R reals, in order."""
    for x_part, real_part in zip(x.split(size), real.split(size), strict=True):
        count = int(real_part.sum())
        if degraded is None:
            yield Chunk(x_part, real_part, None)
        else:
            yield Chunk(x_part, real_part, degraded[:count])
            degraded = degraded[count:]


def degraded_reals(
    detector: ResynthesisDetector, x: Tensor, real: Tensor, indices: list[int], progress: Progress, recipe: Recipe
) -> Tensor | None:
    """With probability 1/2 the reals of the batch, down-sampled and degraded (R, 3, h, w); else None.

    What is drawn depends on the seed, the epoch and the step or the image: not on processes, micro-batches, resuming.
    """
    step_rng = keyed_generator(recipe.seed, progress.epoch, progress.step)
    if uniform(0, 1, step_rng) >= DEGRADE_PROBABILITY:
        return None
    reals = [index for index, is_real in zip(indices, real.tolist(), strict=True) if is_real]
    image_rngs = [keyed_generator(recipe.seed, progress.epoch, index, 1) for index in reals]
    x_lr = downsample(x[real], detector.resynthesizer.scale)  # (R, 3, h, w)
    return recipe.head.degrade(x_lr, step_rng, image_rngs) if reals else None


def observed(logits: Tensor, residual: Tensor, labels: Tensor, weight: float) -> dict[str, Tensor]:
    """This process's shares of what is worth watching: accuracy, and the residual energy of either class."""
    real = (labels == REAL).float()
    energy = residual_energy(residual)  # (B,)
    return {
        "accuracy": weight * (logits.argmax(dim=1) == labels).sum(),
        "share_real": weight * real.sum(),
        "energy_real": weight * (energy * real).sum(),
        "energy_fake": weight * (energy * (1 - real)).sum(),
    }


def epoch_values(means: dict[str, float]) -> dict[str, float]:
    """The epoch's means as they are recorded: each class's energy is a mean over that class."""
    means = dict(means)
    share_real = means.pop("share_real", 0.0)
    for name, share in (("energy_real", share_real), ("energy_fake", 1 - share_real)):
        if name in means:
            means[name] = means[name] / share if share else float("nan")
    return means


def example_images(items: list[Item], policy: SizePolicy) -> dict[str, Tensor]:
    """The first real and the first generated image, their central PICTURE_SIDE pixels at most: (1, 3, H, W) each."""
    firsts = {item.label: item for item in reversed(items)}  # the last written of each label is the first of the items
    images = {}
    for label, item in firsts.items():
        x = to_float(fit_size(load_image(item.path), policy))  # (3, H, W)
        side = min(PICTURE_SIDE, *x.shape[-2:])
        images[LABEL_NAMES[label]] = center_crop(x, side - side % policy.scale)[None]
    return images


@torch.no_grad()
def record_pictures(
    detector: ResynthesisDetector, images: dict[str, Tensor], recipe: Recipe, recorder: Recorder, epoch: int
) -> None:
    """To TensorBoard, of each image (1, 3, H, W): x | x_hat | residual x 4; degraded x_lr | x_hat of that | residual x 4.

    The same images and the same degradation in every epoch, so that before and after training can be compared.
    """
    if recorder.writer is None:
        return
    scale = detector.resynthesizer.scale
    for name, x in images.items():
        x = x.to(recipe.device)
        inputs = {name: downsample(x, scale)}  # (1, 3, h, w)
        if recipe.head is not None:
            rngs = [keyed_generator(recipe.seed), keyed_generator(recipe.seed, 1)]
            inputs[f"{name}_degraded"] = recipe.head.degrade(inputs[name], rngs[0], rngs[1:])
        for what, x_lr in inputs.items():
            with autocast(recipe.device, recipe.precision):
                x_hat = detector.resynthesizer(x_lr)  # (1, 3, H, W)
            before = F.interpolate(x_lr, scale_factor=scale) if what != name else x
            row = [before, x_hat, PICTURE_GAIN * detector.difference(x_hat, x)]
            recorder.pictures(f"resynthesis/{what}", torch.cat(row, dim=3), epoch)  # (1, 3, H, 3 * W)


def image_loader(
    images: ImageDataset, batches: EpochBatches, cache: ResidualCache | None, workers: int, device: torch.device
) -> DataLoader:
    """Batches of images or, where there is a cache that has them, of their residuals."""
    if cache is None:
        return make_loader(images, batches, collate, workers, device)
    return make_loader(CachedImages(images, cache), batches, collate_cached, workers, device)


def validation_loader(
    items: list[Item],
    policy: SizePolicy,
    batch_size: int,
    cache: ResidualCache | None,
    workers: int,
    device: torch.device,
    world: World,
) -> DataLoader:
    """This process's part of the validation images, each once, cropped at the centre."""
    own = shard(items, world.rank, world.size)
    batches = EpochBatches(len(own), batch_size, shuffle=False)
    return image_loader(ImageDataset(own, policy), batches, cache, workers, device)


@torch.inference_mode()
def validate(detector: ResynthesisDetector, loader: DataLoader, recipe: Recipe, world: World) -> dict[str, float]:
    """Loss, accuracy and AUROC (fake = positive) on the validation images."""
    detector.eval()
    logits, labels = [torch.empty(0, 2, device=recipe.device)], [torch.empty(0, dtype=torch.int64)]
    for batch in loader:
        if isinstance(usable(batch), CachedBatch):
            residual = cached_residuals(detector, batch, recipe)  # (B, C_l, H_l, W_l)
            with autocast(recipe.device, recipe.precision):
                logits.append(detector.classify(residual))  # (B, 2)
        else:
            x = to_float(batch.images.to(recipe.device, non_blocking=True))  # (B, 3, H, W)
            x = x.contiguous(memory_format=torch.channels_last)
            with autocast(recipe.device, recipe.precision):
                logits.append(detector(x))  # (B, 2)
        labels.append(batch.labels)
    if recipe.cache:
        recipe.cache.flush()
    logits, labels = gather_rows(torch.cat(logits).cpu(), world), gather_rows(torch.cat(labels), world)
    return {
        "val_loss": F.cross_entropy(logits, labels).item(),
        "val_accuracy": (logits.argmax(dim=1) == labels).float().mean().item(),
        "val_auroc": auroc((logits[:, FAKE] - logits[:, REAL]).numpy(), (labels == FAKE).numpy()),
    }


def usable(batch: Batch | CachedBatch) -> Batch | CachedBatch:
    """The batch, if all of its images could be read and are of one size.

    Raises:
        DataError: if not.
    """
    if batch.errors or batch.mismatch:
        raise DataError(batch.mismatch or next(iter(batch.errors.values())))
    return batch


if __name__ == "__main__":
    sys.exit(run_program(main, DataError, ModelError, CheckpointError))
