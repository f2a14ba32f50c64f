"""Train the classifier with a frozen re-synthesizer (step 2), or fine-tune both networks end to end (step 3).

    python train_detector.py --fixed-sr --sr-weights-file output_hr/x4/best.pth --no_dilation \\
        --data-root-pos REAL_DIR --data-root-neg GENERATED_DIR --output-path output_end2end/mine
    python train_detector.py --mode-sr denoising --init output_end2end/mine/last.pth.tar --lr 1e-6 ...

The program writes these files into OUTPUT_PATH:

    NNNN.pth.tar, NNNN_sr.pth.tar             detector and re-synthesizer after epoch NNNN, one pair per saved epoch
    best.pth.tar                              the checkpoint with the highest AUROC on the validation images
    last.pth.tar                              the newest checkpoint, from which --resume continues
    config.json, stats.jsonl, tensorboard/    the settings, the loss and metrics of each epoch, and TensorBoard logs
"""

import contextlib
import hashlib
import inspect
import logging
import math
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data.datasets import Augmentation, Batch, EpochBatchSampler, ImageDataset, make_loader
from data.degradations import degrade_batch, require_known_auxiliary_task, sample_degradation_for_batch
from data.images import SizePolicy, require_equal_sizes, select_usable_images
from data.leaks import run_and_log_quick_leak_audit
from data.lists import (
    ImageFlags,
    Item,
    describe_and_hash_image_files,
    hash_image_files,
    list_labelled_images,
    require_real_and_fake_images,
)
from data.perturbations import perturb_at_random
from data.residuals import CacheOptions, ResidualDataset, create_residual_datasets
from evaluation.detector import describe_training_images
from evaluation.training_pictures import read_one_real_and_fake_image, write_resynthesis_pictures
from models.build import TORCHVISION, create_detector, load_detector
from models.config import describe_network
from models.features import VGG19, load_vgg
from models.losses import compute_classification_loss, compute_residuals_and_auxiliary_losses
from models.resynthesis import ResynthesisDetector, downsample
from utils.checkpoints import Checkpoint, Fields, compute_fingerprint, read_checkpoint_if_path_is_given
from utils.compute import Compute, choose_device_and_precision
from utils.distributed import (
    World,
    all_gather_rows,
    all_reduce_sum,
    connect_processes,
)
from utils.errors import UserError, describe_exception, describe_tensor, is_gpu_fault, run_program
from utils.labels import FAKE, REAL
from utils.optimizers import SCHEDULES, create_optimizer
from utils.options import create_train_detector_parser
from utils.random_streams import DEGRADE_BATCH, DEGRADE_IMAGE, seeded_generator
from utils.run import Run, read_starting_checkpoint
from utils.run_folder import open_run_folder
from utils.training import Progress, Stepper, train_one_epoch

logger = logging.getLogger("train_detector")

LAST = "last.pth.tar"


def main(args: Namespace) -> None:
    compute = choose_device_and_precision(args.gpu, args.precision, args.deterministic, args.seed)
    with connect_processes(compute.device.type) as world, contextlib.ExitStack() as stack:
        # 1. List the images (no file is written before step 5)
        require_consistent_options(args.auxiliary, args.fixed_resynthesizer, args.crops, args.crop_size)
        items = list_labelled_images(args.real_roots, args.fake_roots, args.tree, args.csv, training=True)
        val_items = list_validation_images(args.val_real_roots, args.val_fake_roots, args.val_csv)

        # 2. Build the networks
        output = Path(args.output_path)
        detector, config, resumed = build_detector(vars(args), output / LAST)
        detector.set_resynthesizer_frozen(args.fixed_resynthesizer)
        # Without gradient checkpointing, RDN needs 12 GB of memory per training image of 1024 x 1024 pixels.
        detector.resynthesizer.checkpoint_blocks = not args.fixed_resynthesizer
        detector.to(compute.device, memory_format=torch.channels_last)
        vgg = None
        if not args.fixed_resynthesizer:
            vgg = load_vgg_for_auxiliary_loss(config, args.auxiliary_weight, args.vgg_weights, compute)

        # 3. Check the images, and create the datasets
        scale, stride = detector.resynthesizer.scale, detector.features.stride
        policy = SizePolicy(scale, args.crop_size or None, args.resize or None, min_side=stride)
        transform = perturb_at_random if args.augment_perturb else None
        images = create_dataset(items, policy, args.skip_bad, Augmentation(args.seed, args.crops), transform)
        val_images = create_dataset(val_items, policy, args.skip_bad)
        require_real_and_fake_images(images.items, "training images")
        if val_items:
            require_real_and_fake_images(val_images.items, "validation images")
        config["images"] = {"crop_size": args.crop_size, "resize": args.resize, **describe_training_images(images)}
        sampler = EpochBatchSampler(len(images), args.batch_size, args.seed, world)
        val_sampler = EpochBatchSampler(len(val_images), args.batch_size, world=world)
        sizes, val_sizes = images.image_sizes, val_images.image_sizes
        if args.batch_size > 1:
            require_equal_sizes(images.items, sizes)
            require_equal_sizes(val_images.items, val_sizes)
        for size in {sizes[0], *val_sizes[:1]}:
            require_classifier_accepts_residual(detector, config["classifier"]["name"], size, compute)
        min_images = find_smallest_trainable_batch_size(detector, sizes, sampler, compute)
        if world.is_main:
            run_and_log_quick_leak_audit(images.items, val_images.items)

        # 4. Create the optimizer
        if world.size > 1 and compute.device.type == "cuda":
            detector.classifier = nn.SyncBatchNorm.convert_sync_batchnorm(detector.classifier)
        optimizer = create_optimizer(
            args.optimizer, detector, args.lr, args.classifier_rate_factor, args.momentum, args.weight_decay
        )
        schedule = SCHEDULES[args.schedule]
        stepper = Stepper(optimizer, compute, world, partial(schedule, args.epochs), sampler.steps, args.clip_norm)
        progress = stepper.progress

        # 5. Open the output folder, and load the training state of a resumed run
        trained_on = hash_image_files(images.items)
        settings = vars(args) | {"precision": compute.precision}
        settings["images"] = describe_and_hash_image_files(images.items, trained_on)
        settings["validation_images"] = describe_and_hash_image_files(
            val_images.items, hash_image_files(val_images.items)
        )
        run_files = stack.enter_context(open_run_folder(output / LAST, world, resumed, args.overwrite))
        stepper.load_state(resumed, settings)
        state_of_networks = partial(collect_weights_and_config, detector, config, torch.from_numpy(trained_on))
        run = Run(run_files, {"config": config, "settings": settings}, state_of_networks, stepper, args.epochs)
        stack.enter_context(run)

        # 6. Choose the loss, and create the data loaders.
        # With a frozen re-synthesizer, the residuals do not change, so the data loaders can read them from a cache.
        residual_of = partial(residual_without_gradients, detector, compute, args.micro_batch)
        datasets, cached = [images, val_images], []
        if args.fixed_resynthesizer:
            loss_of = partial(loss_with_frozen_resynthesizer, detector, residual_of)
            if args.cache:
                cache = CacheOptions(args.cache_dir or output / "residual_cache", args.cache_precision, args.cache_gb)
                cached = create_cached_datasets(datasets, detector, config, cache, compute, world)
                datasets = cached or datasets
        else:
            task = AuxiliaryTask(args.auxiliary, args.auxiliary_weight, vgg, args.seed, args.micro_batch)
            loss_of = partial(end_to_end_loss, detector, compute, world, task, progress)
        loader = make_loader(datasets[0], sampler, args.workers, compute)
        val_loader = make_loader(datasets[1], val_sampler, args.workers, compute)

        # 7. Train
        pictures = read_one_real_and_fake_image(images)
        text = "%d training images, %d samples per epoch; the training starts at epoch %d, step %d"
        logger.info(text, len(images.items), sampler.count, progress.epoch, progress.step)
        if not progress.total_steps:
            write_resynthesis_pictures(detector, compute, args.auxiliary, run, pictures, 0)
        for epoch in range(progress.epoch, args.epochs):
            for dataset in cached:
                dataset.store_missing_residuals(epoch, residual_of, run.iterate_batches, args.workers, compute, world)
            sampler.set_epoch(epoch, progress.step)
            batches = run.iterate_batches(loader, f"epoch {epoch}", True, min_images)
            train_one_epoch(detector, batches, loss_of, stepper)
            values = progress.compute_mean_values_of_epoch()
            if val_items:
                values |= compute_validation_metrics(
                    detector, run.iterate_batches(val_loader, "validation"), residual_of, world
                )
            if not args.fixed_resynthesizer:
                write_resynthesis_pictures(detector, compute, args.auxiliary, run, pictures, epoch + 1)
            due = epoch % args.save_every_epoch == 0 or epoch + 1 == args.epochs
            run.end_epoch(values, "val_auroc", collect_contents_of_numbered_checkpoints if due else None)


def require_consistent_options(task: str, fixed: bool, crops: int, crop_size: int | None) -> None:
    """Raise a UserError if the options contradict each other."""
    require_known_auxiliary_task(task)
    if task != "none" and fixed:
        raise UserError(f"--mode-sr {task} trains the re-synthesizer and --fixed-sr freezes it: give only one of them")
    if crops and not crop_size:
        raise UserError(f"--crops-per-image {crops} needs the size of the crops: give --crop-size N")


# --- images -------------------------------------------------------------------------------------------------


def list_validation_images(real_roots: list[str] | None, fake_roots: list[str] | None, csv: str | None) -> list[Item]:
    """List the validation images, or return an empty list if no option names validation images."""
    if not (real_roots or fake_roots or csv):
        return []
    flags = ImageFlags("--val-root-pos", "--val-root-neg", "--val-csv FILE")
    return list_labelled_images(real_roots, fake_roots, csv_file=csv, flags=flags)


def create_dataset(
    items: list[Item],
    policy: SizePolicy,
    skip_bad: bool,
    augmentation: Augmentation | None = None,
    transform: Callable | None = None,
) -> ImageDataset:
    """Create a dataset of the images whose files can be read and whose sizes fit `policy`.

    Args:
        skip_bad: whether to leave out images that cannot be used, instead of raising a UserError.
    """
    items, headers = select_usable_images(items, policy, skip_bad)
    return ImageDataset(items, policy, augmentation, transform, headers)


def require_classifier_accepts_residual(
    detector: ResynthesisDetector, name: str, size: tuple[int, int], compute: Compute
) -> None:
    """Classify a residual of zeros, so that a classifier that cannot be used is refused before the training.

    Args:
        size: height and width of a training image, in pixels.

    Raises:
        UserError: if a torchvision classifier refuses residuals of this size. An exception of a classifier that is not
            from torchvision is raised unchanged, because the traceback shows the mistake in the source code.
        UserError: if the classifier does not return logits (B, 2).
    """
    shape = detector.residual_shape(*size)
    detector.eval()
    try:
        with torch.no_grad():
            logits = detector.classify(torch.zeros(1, *shape, device=compute.device))
    except (AssertionError, RuntimeError, ValueError) as error:
        if not name.startswith(TORCHVISION) or isinstance(error, torch.OutOfMemoryError) or is_gpu_fault(error):
            raise
        raise UserError(
            f"{name} cannot classify residuals of shape {shape} ({describe_exception(error)}): use another --crop-size,"
            " --resize or --arch"
        ) from error
    if not torch.is_tensor(logits) or logits.shape != (1, 2):
        raise UserError(f"the classifier {name} must return logits of shape (B, 2), got {describe_tensor(logits)}")


def find_smallest_trainable_batch_size(
    detector: ResynthesisDetector, sizes: Iterable[tuple[int, int]], sampler: EpochBatchSampler, compute: Compute
) -> int:
    """Return the smallest batch size with which the classifier can be trained: 1 or 2.

    Batch norm needs batches of at least two images if the classifier's last feature map has only one value per channel,
    because batch norm can be trained only with at least two values per channel.

    Raises:
        UserError: if batch norm needs two or more images, but a process gets a batch of one image.
    """
    stride = getattr(detector.classifier, "stride", 0)
    shapes = [detector.residual_shape(*size)[1:] for size in set(sizes)]
    height, width = min(shapes, key=max)
    synchronised = sampler.world.size > 1 and compute.device.type == "cuda"
    if max(height, width) > stride or synchronised:
        return 1
    if sampler.compute_smallest_batch_size_of_any_process() == 1:
        raise UserError(
            f"a batch has only one image per process, and the classifier reduces its residual of {width} x {height}"
            " values per channel to one value per channel, which is too few to train batch norm: use larger images"
            " (--crop-size or --resize), or another --batch-size, so that each process gets at least two images per"
            f" batch (got --batch-size {sampler.batch_size}, {sampler.count} samples per epoch, {sampler.world.size}"
            " process(es))"
        )
    logger.warning(
        "warning: the smallest residual has only %d x %d values per channel, and the stride of the classifier is %d, so"
        " the classifier's last batch norm gets only one value per channel and image. This can make the gradients very"
        " large: use larger images, a larger --crop-size, or features with a smaller stride",
        width,
        height,
        stride,
    )
    return 2


# --- networks -----------------------------------------------------------------------------------------------


def build_detector(options: dict, last: Path) -> tuple[ResynthesisDetector, dict, Checkpoint | None]:
    """Load the detector from the checkpoint that --resume or --init names, or create a new detector.

    Args:
        options: the values of all options of train_detector.py, by name (`vars(args)`).
        last: path of last.pth.tar, the checkpoint that `--resume auto` loads.

    Returns:
        the detector, its config, and the checkpoint from which this run resumes, or None if this run is a new run.
    """
    origin, resumed = read_starting_checkpoint(options["resume"], options["init"], [last])
    resumed = choose_state_to_resume(resumed, last, options["fixed_resynthesizer"], options["auxiliary"])
    resynthesizer = read_checkpoint_if_path_is_given(options["resynthesizer_file"])
    if resumed and resynthesizer:
        text = "the resumed run uses the re-synthesizer in %s: %s (--sr-weights-file) is not used"
        logger.info(text, resumed.name, resynthesizer.name)
        resynthesizer = None
    if origin:
        detector, config = load_detector(origin, resynthesizer, options, options["vgg_weights"])
    else:
        detector, config = create_detector(resynthesizer, options, options["vgg_weights"])
    if not options["fixed_resynthesizer"] and not list(detector.resynthesizer.parameters()):
        raise UserError("the re-synthesizer has no parameters to train: pass --fixed-sr")
    log_networks(config)
    if origin and "calibration" in origin.content:
        text = (
            "the calibration in %s fits only the present weights: the checkpoints of this training have no calibration"
        )
        logger.info(text, origin.name)
    if resumed is None:
        # A new run may use other VGG-19 weights for the auxiliary loss than the checkpoint from which it starts.
        config.pop("auxiliary_vgg", None)
    return detector, config, resumed


def log_networks(config: dict) -> None:
    """Log one line with the names and the constructor arguments of the detector's three networks."""
    networks = [describe_network(config[kind]) for kind in ("resynthesizer", "features", "classifier")]
    logger.info("re-synthesizer: %s; feature network: %s; classifier: %s", *networks)


def load_vgg_for_auxiliary_loss(config: dict, weight: float, source: str, compute: Compute) -> VGG19 | None:
    """Load VGG-19 for the auxiliary loss, and record in the config which weights were loaded.

    A detector whose features come from VGG-19 uses the same VGG-19 weights for the auxiliary loss.

    Returns:
        VGG-19, or None if the weight of the auxiliary loss is 0.
    """
    if weight == 0:
        return None
    features_use_vgg = config["features"]["name"] == "vgg19"
    trained_with = config.get("auxiliary_vgg") or (config["vgg"] if features_use_vgg else None)
    vgg, config["auxiliary_vgg"] = load_vgg(source, trained_with, "this detector")
    return vgg.to(compute.device, memory_format=torch.channels_last)


def choose_state_to_resume(resumed: Checkpoint | None, last: Path, fixed: bool, task: str) -> Checkpoint | None:
    """Decide whether this run continues the training that saved the checkpoint `resumed`.

    A training can be continued only with the values of --fixed-sr and --mode-sr with which it began.

    Returns:
        `resumed`, or None if this run starts a new training.

    Raises:
        UserError: if this run would start a new training from a checkpoint in its own output folder.
    """
    if resumed is None:
        return None
    settings = Fields(resumed.content.get("settings"), resumed.name, "settings")
    for name, flag, value in (("fixed_resynthesizer", "--fixed-sr", fixed), ("auxiliary", "--mode-sr", task)):
        before = settings.values.get(name)
        if before != value:
            if Path(resumed.name).resolve().parent == last.resolve().parent:
                raise UserError(
                    f"{resumed.name} was trained with {flag} = {before}, but this run has {flag} = {value}: to continue"
                    f" the training, use {flag} = {before}; to start a new training from the weights, give the file"
                    " with --init instead of --resume, and give another --output-path"
                )
            text = (
                "%s was trained with %s = %s, but this run has %s = %s: a new training starts from the weights in the"
                " checkpoint"
            )
            logger.info(text, resumed.name, flag, before, flag, value)
            return None
    return resumed


# --- losses of a batch --------------------------------------------------------------------------------------


def cross_entropy_and_accuracy(detector: ResynthesisDetector, residual: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Classify the residuals of a batch, and compute the cross-entropy and the accuracy.

    Args:
        residual: the residuals of the batch, (B, C_l, H_l, W_l).

    Returns:
        two scalars, whose sums over all processes are the cross-entropy and the accuracy of the whole batch.
    """
    labels = batch.labels.to(residual.device)  # (B,)
    weights = batch.weights.to(residual.device)  # (B,)
    logits = detector.classify(residual)  # (B, 2)
    correct = logits.argmax(dim=1) == labels  # (B,)
    return compute_classification_loss(logits, labels, weights), (weights * correct).sum()


@torch.no_grad()
def residual_without_gradients(
    detector: ResynthesisDetector, compute: Compute, micro_batch: int | None, batch: Batch
) -> Tensor:
    """Compute the residuals of a batch of images, without gradients.

    Args:
        micro_batch: number of images whose residuals are computed at a time, or None for the whole batch.
        batch: a batch of images, or a batch of cached residuals from a `data.residuals.ResidualDataset`.

    Returns:
        the residuals, float32 (B, C_l, H_l, W_l), on the device of the networks.
    """
    if batch.x.is_floating_point():  # cached residuals are floats, and images are uint8
        residual = batch.x.to(compute.device, non_blocking=True).float()
        return residual.contiguous(memory_format=torch.channels_last)
    x = compute.images_to_float(batch.x)  # (B, 3, H, W)
    parts = []
    with compute.autocast():
        for part in x.split(micro_batch or len(x)):
            parts.append(detector.residual(part, detector.resynthesize(part)))
    return torch.cat(parts)


def loss_with_frozen_resynthesizer(
    detector: ResynthesisDetector, residual_of: Callable[[Batch], Tensor], batch: Batch
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the cross-entropy loss of a batch, for training with a frozen re-synthesizer."""
    loss, accuracy = cross_entropy_and_accuracy(detector, residual_of(batch), batch)
    return loss, {"accuracy": accuracy}


class AuxiliaryTask(NamedTuple):
    """Settings of the auxiliary task, which trains the re-synthesizer to restore real images."""

    name: str  # a key of data.degradations.TASKS
    weight: float  # factor on the auxiliary loss
    vgg: VGG19 | None  # VGG-19 of the auxiliary loss; None if there is no auxiliary loss
    seed: int  # seed of the random degradations
    micro_batch: int | None  # number of images that pass through the networks at a time; None means all images


def end_to_end_loss(
    detector: ResynthesisDetector,
    compute: Compute,
    world: World,
    task: AuxiliaryTask,
    progress: Progress,
    batch: Batch,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss of a batch for end-to-end training: cross-entropy + weight * auxiliary loss.

    The auxiliary loss is computed on the real images, and is 0 if the batch has fewer than two real images.

    Release: for the auxiliary loss, the code of the paper's authors degrades each batch with probability 0.5. With
    `--mode-sr none`, the code of the paper's authors computes the auxiliary loss on undegraded images in every step.
    """
    x = compute.images_to_float(batch.x)  # (B, 3, H, W)
    counted = batch.weights > 0  # (B,); an image with weight 0 repeats an image of another process
    real = batch.labels == REAL  # (B,)
    real_count = int(all_reduce_sum((real & counted).sum().to(compute.device), world))
    used = (real & (real_count > 1)).to(x.device)  # (B,)
    degraded = downsample_and_degrade_images(
        detector.resynthesizer.scale, task, progress, batch, x
    )  # (B, 3, h, w) or None

    with compute.autocast():
        if task.micro_batch is None or task.micro_batch >= len(x):
            residual, auxiliary = compute_residuals_and_auxiliary_losses(detector, task.vgg, x, degraded, used)
        else:
            residual, auxiliary = compute_in_micro_batches(
                task.micro_batch, detector, task.vgg, x, degraded, used
            )  # (B, C_l, H_l, W_l), (B,)
    cross_entropy, accuracy = cross_entropy_and_accuracy(detector, residual, batch)
    auxiliary = task.weight * (auxiliary * counted.to(auxiliary)).sum() / max(real_count, 1)
    values = {"accuracy": accuracy, "cross_entropy": cross_entropy, "auxiliary": auxiliary}
    return cross_entropy + auxiliary, values


def downsample_and_degrade_images(
    scale: int, task: AuxiliaryTask, progress: Progress, batch: Batch, x: Tensor
) -> Tensor | None:
    """Downsample a batch of images, and add random degradations, such as noise, to the low-resolution images.

    The random choices depend only on the seed, the epoch, the training step and the keys of the images.

    Returns:
        the degraded low-resolution batch (B, 3, h, w), or None if the batch is not degraded.
    """
    batch_rng = seeded_generator(task.seed, progress.epoch, progress.step, DEGRADE_BATCH)
    degradation = sample_degradation_for_batch(task.name, batch_rng)
    if degradation is None:
        return None
    rngs = [seeded_generator(task.seed, *key, DEGRADE_IMAGE) for key in batch.keys]
    return degrade_batch(degradation, downsample(x, scale), rngs)


def compute_in_micro_batches(
    micro_batch: int,
    detector: ResynthesisDetector,
    vgg: VGG19 | None,
    x: Tensor,
    degraded: Tensor | None,
    real: Tensor,
) -> tuple[Tensor, Tensor]:
    """Call `compute_residuals_and_auxiliary_losses` on `micro_batch` images at a time, and concatenate the results.

    To save memory, the backward pass computes the activations of each micro-batch again (gradient checkpointing). If
    the re-synthesizer has no batch norm, micro-batches give the same gradients as the whole batch at once.
    """
    residuals, losses = [], []
    for start in range(0, len(x), micro_batch):
        rows = slice(start, start + micro_batch)
        low = None if degraded is None else degraded[rows]
        residual, loss = checkpoint(
            compute_residuals_and_auxiliary_losses, detector, vgg, x[rows], low, real[rows], use_reentrant=False
        )
        residuals.append(residual)
        losses.append(loss)
    return torch.cat(residuals), torch.cat(losses)


# --- the residual cache ------------------------------------------------------------------------------------


def create_cached_datasets(
    datasets: Sequence[ImageDataset],
    detector: ResynthesisDetector,
    config: dict,
    cache: CacheOptions,
    compute: Compute,
    world: World,
) -> list[ResidualDataset]:
    """Create a dataset of cached residuals for each dataset of images, or return [] if residuals cannot be cached."""
    code = [hash_source_code(network) for network in (detector.resynthesizer, detector.features)]
    key = residual_cache_key(config, compute_fingerprint(detector.features), code, datasets[0].policy, compute)
    return create_residual_datasets(datasets, detector.residual_shape, key, cache, world)


def residual_cache_key(
    config: dict, features_fingerprint: str, code: Sequence[str | None], policy: SizePolicy, compute: Compute
) -> dict[str, object]:
    """Return a dict of all settings that change residuals, such as the networks, the crop size and the precision.

    Args:
        code: results of `hash_source_code` for the re-synthesizer and for the feature network.
    """
    return {
        "re-synthesizer": config["resynthesizer"],
        "re-synthesizer weights": config["resynthesizer_fingerprint"],
        "features": config["features"],
        "residual": config["residual"],
        "features weights": features_fingerprint,
        "code": list(code),
        "scale, crop, resize": tuple(policy),
        "arithmetic": str(compute),
    }


def hash_source_code(module: nn.Module) -> str | None:
    """Return a hash of the source code of a network's class, or None if Python cannot find the source code."""
    try:
        source = inspect.getsource(type(module))
    except (OSError, TypeError):  # Python finds no source code for classes of an interactive session
        return None
    return hashlib.sha256(source.encode()).hexdigest()[:16]


# --- validation --------------------------------------------------------------------------------


@torch.inference_mode()
def compute_validation_metrics(
    detector: ResynthesisDetector, batches: Iterable[Batch], residual_of: Callable[[Batch], Tensor], world: World
) -> dict[str, float | None]:
    """Compute the loss, the accuracy and the AUROC (fake images are positive) on the validation images.

    The AUROC is NaN if a logit is not finite.
    """
    from evaluation.metrics import auroc  # imported here, because scikit-learn takes a second to import

    detector.eval()
    labels = [torch.empty(0, dtype=torch.int64)]
    logits = [torch.empty(0, 2)]
    for batch in batches:
        counted = batch.weights > 0  # (B,); an image with weight 0 repeats an image of another process
        logits.append(detector.classify(residual_of(batch)).cpu()[counted])
        labels.append(batch.labels[counted])
    labels = all_gather_rows(torch.cat(labels), world)  # (N,)
    logits = all_gather_rows(torch.cat(logits), world)  # (N, 2)
    margins = logits[:, FAKE] - logits[:, REAL]
    finite = bool(margins.isfinite().all())
    return {
        "val_loss": F.cross_entropy(logits, labels).item(),
        "val_accuracy": (logits.argmax(dim=1) == labels).float().mean().item(),
        "val_auroc": auroc(margins.numpy(), (labels == FAKE).numpy()) if finite else math.nan,
    }


# --- what is saved ------------------------------------------------------------------------------------------


def collect_weights_and_config(detector: ResynthesisDetector, config: dict, trained_on: Tensor) -> dict:
    """Return the weights and the config of the detector as a dict, which is saved in checkpoints.

    The keys "arch" and "state_dict" hold the name and the weights of the classifier, as in the checkpoints of the
    paper's authors.

    Args:
        trained_on: hashes of the training images, from `data.lists.hash_image_files`.
    """
    fingerprints = {
        "resynthesizer_fingerprint": compute_fingerprint(detector.resynthesizer),
        "classifier_fingerprint": compute_fingerprint(detector.classifier),
    }
    return {
        "arch": config["classifier"]["name"],
        "state_dict": detector.classifier.state_dict(),
        "sr_state_dict": detector.resynthesizer.state_dict(),
        "trained_on": trained_on,
        "config": {**config, **fingerprints},
    }


def collect_contents_of_numbered_checkpoints(state: dict) -> dict[str, dict]:
    """Return a dict from file name to content for the two checkpoints of an epoch.

    The file names contain the number of the epoch, counted from 1.

    Release: the file names and the file formats are the same as in the code of the paper's authors.
    """
    epoch = state["progress"]["epoch"]
    config = state["config"]
    resynthesizer = {
        "state_dict": state["sr_state_dict"],
        "fingerprint": config["resynthesizer_fingerprint"],
        "config": {"resynthesizer": config["resynthesizer"]},
    }
    return {f"{epoch:04d}.pth.tar": {**state, "epoch": epoch}, f"{epoch:04d}_sr.pth.tar": resynthesizer}


if __name__ == "__main__":
    sys.exit(run_program(lambda: main(create_train_detector_parser().parse_args())))
