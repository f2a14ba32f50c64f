"""Stage 2: train the detector on re-synthesis residuals, RDN frozen. Stage 3: fine-tune both end to end.

    python train_detector.py --fixed-sr --sr-weights-file output_hr/x4/best.pth --no_dilation \\
        --data-root-pos REAL_DIR --data-root-neg GENERATED_DIR --output-path output_end2end/mine
    python train_detector.py --mode-sr denoising --init output_end2end/mine/last.pth.tar --lr 1e-6 ...

Writes, into OUTPUT_PATH: NNNN.pth.tar and NNNN_sr.pth.tar (the released formats; NNNN counts epochs from 1),
best.pth.tar (highest AUROC on the validation images), last.pth.tar (the whole state, for --resume), config.json,
stats.jsonl and TensorBoard records.
"""

from utils.options import train_detector_parser

ARGS = train_detector_parser().parse_args() if __name__ == "__main__" else None  # mistakes before PyTorch is imported

import contextlib
import logging
import math
import sys
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from data.audit import log_quick_audit
from data.datasets import Batch, Draws, EpochBatches, ImageDataset, make_loader
from data.images import SizePolicy, fit_size, load_image, refuse_mixed_sizes, usable_items
from data.lists import Item, identities, labelled_items, list_digest
from data.perturbations import augment
from data.residuals import ResidualDataset
from models import (
    SINGLE_IMAGE,
    ResynthesisDetector,
    downsample,
    fingerprint,
    load_detector,
    load_vgg,
    new_detector,
    read_checkpoint,
    trains_on_one,
)
from models.auxiliary import TASKS, degrade_batch
from models.resnet import TOTAL_STRIDE
from utils.distributed import World, gather_rows, share_buffers, world_of_processes
from utils.metrics import auroc
from utils.run import (
    FAKE,
    LABEL_NAMES,
    REAL,
    Compute,
    StopSignal,
    UserError,
    choose_compute,
    keyed_generator,
    run_program,
)
from utils.sources import (
    Auxiliary,
    ResidualsOf,
    end_to_end_residuals,
    frozen_residuals,
    read_residuals,
    residual_cache,
)
from utils.training import (
    Recorder,
    StateKeeper,
    Stepper,
    refuse_occupied,
    run_folder,
    save_epoch,
    say_changes,
    starting_point,
)

logger = logging.getLogger("train_detector")

LAST = "last.pth.tar"
FINAL_RATE = 1e-4  # of the base rate: where the cosine schedule ends
PICTURE_SIDE = 256  # pixels of the pictures in TensorBoard
PICTURE_GAIN = 4  # residuals are faint: shown brighter by this factor


def main(args: Namespace) -> None:
    compute = choose_compute(args.gpu, args.precision, args.deterministic, args.seed)
    with world_of_processes(compute.device.type) as world, StopSignal() as stop, contextlib.ExitStack() as stack:
        # Images are listed before any network is built, networks before any image is read
        listed = labelled_items(args.real_roots, args.fake_roots, args.tree, args.csv), validation_items(args)
        detector, config, resumed = networks(args)
        policy = SizePolicy(detector.resynthesizer.scale, args.crop_size or None, args.resize or None)
        (items, sizes), (val_items, val_sizes) = (usable_items(found, policy, args.skip_bad) for found in listed)
        draws = Draws(args.seed, args.crops)
        images = ImageDataset(items, policy, draws, augment if args.augment_perturb else None)
        val_images = ImageDataset(val_items, policy)
        batches = EpochBatches(len(images), args.batch_size, args.seed, world)
        check_sizes(detector, batches, compute, [(items, sizes), (val_items, val_sizes)])
        if world.is_main:
            log_quick_audit(items, val_items)

        # What is trained, how far it is, and what is kept of it
        folder = stack.enter_context(run_folder(Path(args.output_path), world, fresh=not resumed))
        stepper = make_stepper(args, detector, compute, world, folder)
        progress = stepper.progress
        config["images"] = {"crop_size": args.crop_size, "resize": args.resize}
        about = {
            "config": config,
            "settings": vars(args) | {"precision": compute.precision, "images": list_digest(items)},
        }
        if resumed:
            stepper.load_state_dict(resumed)
            say_changes(resumed["settings"], about["settings"], progress.step)
        collect = partial(whole_state, detector, stepper, about | {"trained_on": torch.from_numpy(identities(items))})
        keeper = StateKeeper(folder / LAST, collect, stop, args.save_minutes, args.skip_bad, world)
        recorder = Recorder(folder, about, world, progress.epoch, args.epochs)

        # How residuals come: with an RDN that is trained, computed by a frozen one, or read from where they are kept
        frozen = partial(frozen_residuals, detector, compute, args.micro_batch)
        auxiliary = Auxiliary(args.auxiliary, args.auxiliary_weight, args.seed, args.micro_batch)
        trained = partial(end_to_end_residuals, detector, compute, world, auxiliary)
        residuals_of, val_residuals_of = frozen if args.fixed_resynthesizer else trained, frozen
        if cache := residual_cache(args, detector, config, compute, sizes * 2 * images.parts + val_sizes):
            images, val_images = ResidualDataset(images, cache), ResidualDataset(val_images, cache)
            residuals_of = val_residuals_of = partial(read_residuals, compute)
        loader = make_loader(images, batches, args.workers, compute)
        val_batches = EpochBatches(len(val_items), args.batch_size, world=world)
        val_loader = make_loader(val_images, val_batches, args.workers, compute)

        logger.info("%d training images; from epoch %d, step %d on", len(items), progress.epoch, progress.step)
        pictures = partial(record_pictures, detector, compute, args.auxiliary, recorder, example_images(items, policy))
        if progress.total_steps == 0:
            pictures(0)
        for epoch in range(progress.epoch, args.epochs):
            for dataset in (images, val_images) if cache else ():
                dataset.fill(epoch, frozen, keeper.obey, args.workers, compute, world)
            stepper.set_rates(rate_factor(epoch, args.epochs))
            batches.set_epoch(epoch, progress.step)
            train_one_epoch(detector, loader, residuals_of, stepper, keeper)
            values = epoch_values(progress.means()) | {"learning_rate": stepper.optimizer.param_groups[0]["lr"]}
            if val_items:
                values |= validate(detector, val_loader, val_residuals_of, keeper)
            progress.next_epoch()
            due = epoch % args.save_every_epoch == 0 or progress.epoch == args.epochs
            save_epoch(keeper, progress, values.get("val_auroc"), numbered_files if due else None, args.keep_last)
            recorder.epoch(epoch, values)
            if not args.fixed_resynthesizer:
                pictures(progress.epoch)
        recorder.finish(folder)


def validation_items(args: Namespace) -> list[Item]:
    """The images of --val-root-pos and --val-root-neg, if any."""
    if not args.val_real_roots and not args.val_fake_roots:
        return []
    return labelled_items(args.val_real_roots, args.val_fake_roots, flags=("--val-root-pos", "--val-root-neg"))


def networks(args: Namespace) -> tuple[ResynthesisDetector, dict, dict]:
    """The detector, its config, and the state of the run to be continued (empty: this is a new run)."""
    task = args.auxiliary != "none"
    if task and args.fixed_resynthesizer:
        raise UserError(f"--mode-sr {args.auxiliary} trains RDN and --fixed-sr does not: leave one of them out")
    output = Path(args.output_path)
    start, resumed = starting_point(args.resume, args.init, [output / LAST])
    if resumed and not continues(resumed["settings"], args, start.name):
        if Path(start.name).resolve().parent == output.resolve():
            raise UserError(
                f"{start.name} was trained otherwise (see above): give its flags, or --init and another --output-path"
            )
        resumed = {}
    refuse_occupied(output, start.name if resumed else None, args.overwrite)
    resynthesizer = read_checkpoint(args.resynthesizer_file)
    if start is None:
        if resynthesizer is None:
            raise UserError("no re-synthesizer: give RDN's weights with --sr-weights-file (train_sr.py makes them)")
        detector, config = new_detector(resynthesizer, vars(args), args.vgg_weights)
    else:
        if resumed and resynthesizer:
            logger.info("RDN comes from %s, not from %s", start.name, resynthesizer.name)
            resynthesizer = None
        detector, config = load_detector(start, resynthesizer, vars(args), args.vgg_weights)
    detector.freeze_resynthesizer(args.fixed_resynthesizer)
    detector.resynthesizer.checkpoint_blocks = not args.fixed_resynthesizer  # or 12 GB for an image of 1024 x 1024
    if not args.fixed_resynthesizer and args.auxiliary_weight > 0 and detector.vgg is None:
        before = resumed.get("config", {}).get("auxiliary_vgg")  # a resumed run goes on with the features it began with
        detector.vgg, config["auxiliary_vgg"] = load_vgg(args.vgg_weights, before, "the run to be resumed")
    return detector, config, resumed


def continues(settings: dict, args: Namespace, name: str) -> bool:
    """Whether a run can be gone on with: it trained the same parts for the same task."""
    for key, flag in (("fixed_resynthesizer", "--fixed-sr"), ("auxiliary", "--mode-sr")):
        if settings.get(key) != vars(args)[key]:
            logger.info("%s was trained with %s = %s: its run is not gone on with", name, flag, settings.get(key))
            return False
    return True


def check_sizes(
    detector: ResynthesisDetector,
    batches: EpochBatches,
    compute: Compute,
    sets: Sequence[tuple[list[Item], list[tuple[int, int]]]],
) -> None:
    """Better said now than in the last step of the first epoch: sizes that do not share a batch, or are too small.

    sets: training and validation images, and the (height, width) of each as it will be seen.
    """
    if batches.batch_size > 1:
        for items, sizes in sets:
            refuse_mixed_sizes(items, sizes)
    residual = detector.residual_shape(*sets[0][1][0])[1:]  # others may differ only in batches of one
    synchronised = batches.world.size > 1 and compute.device.type == "cuda"  # batch normalisation, over the processes
    if batches.smallest_share() == 1 and not synchronised and not trains_on_one(*residual):
        count = f"{batches.count} images in batches of {batches.batch_size} over {batches.world.size} process(es)"
        raise UserError(f"{count} leave one alone: {SINGLE_IMAGE}")
    if min(residual) <= TOTAL_STRIDE:
        logger.warning(
            "warning: residuals are of %d x %d values, no more than the classifier's stride of %d, so that its last maps"
            " are of one value: gradients may be large; larger images or a lower --idx-stages train better",
            *residual[::-1], TOTAL_STRIDE,
        )  # fmt: skip


def make_stepper(
    args: Namespace, detector: ResynthesisDetector, compute: Compute, world: World, folder: Path
) -> Stepper:
    """The detector on its device, and SGD for what of it is trained."""
    detector.to(compute.device, memory_format=torch.channels_last)
    if world.size > 1 and compute.device.type == "cuda":
        detector.classifier = nn.SyncBatchNorm.convert_sync_batchnorm(detector.classifier)
    groups = parameter_groups(detector, args.lr, args.weight_decay, args.classifier_grad_scale)
    return Stepper(torch.optim.SGD(groups, momentum=args.momentum), compute, world, folder / LAST)


def parameter_groups(detector: ResynthesisDetector, lr: float, weight_decay: float, scale: float) -> list[dict]:
    """The classifier and, if it is trained, RDN, as groups for SGD.

    Release: its `--lr-sr` multiplies the classifier's gradients by `scale` before weight decay and momentum are
    applied. With SGD that is exactly a rate of lr * scale and a weight decay of weight_decay / scale.

    Raises:
        UserError: for a scale of 0, under which the classifier would only decay.
    """
    if scale == 0:
        raise UserError("--lr-sr 0 leaves the classifier untrained: give a factor above 0 (default: 0.02)")
    groups = [
        {"params": list(detector.classifier.parameters()), "lr": lr * scale, "weight_decay": weight_decay / scale}
    ]
    resynthesizer = [p for p in detector.resynthesizer.parameters() if p.requires_grad]
    if resynthesizer:
        groups.append({"params": resynthesizer, "lr": lr, "weight_decay": weight_decay})
    return groups


def rate_factor(epoch: int, epochs: int) -> float:
    """f(e) = 0.9999 cos(pi/2 * e / (E - 1)) + 0.0001, by which the base rate is multiplied.

    Release: it is set *after* epoch e for the next one, so epochs 0 and 1 both run at f(0) = 1.
    """
    passed = max(epoch - 1, 0) / max(epochs - 1, 1)
    return (1 - FINAL_RATE) * math.cos(math.pi / 2 * passed) + FINAL_RATE


def whole_state(detector: ResynthesisDetector, stepper: Stepper, about: dict) -> dict:
    """All that is needed to use the detector, named as in the release where it has it, and to go on with its training."""
    fingerprints = {
        "resynthesizer_fingerprint": fingerprint(detector.resynthesizer),
        "classifier_fingerprint": fingerprint(detector.classifier),
    }
    weights = {
        "arch": about["config"]["detector"]["arch"],
        "state_dict": detector.classifier.state_dict(),
        "sr_state_dict": detector.resynthesizer.state_dict(),
    }
    return weights | about | {"config": about["config"] | fingerprints} | stepper.state_dict()


def numbered_files(state: dict) -> dict[str, dict]:
    """The two files of an epoch, as the release writes them; NNNN counts epochs from 1."""
    epoch = state["progress"]["epoch"]
    return {
        f"{epoch:04d}.pth.tar": {**state, "epoch": epoch},
        f"{epoch:04d}_sr.pth.tar": {"state_dict": state["sr_state_dict"]},
    }


# --- training -----------------------------------------------------------------------------------------------


def train_one_epoch(
    detector: ResynthesisDetector, loader: DataLoader, residuals_of: ResidualsOf, stepper: Stepper, keeper: StateKeeper
) -> None:
    """The rest of this epoch's steps."""
    detector.train()
    for batch in keeper.batches(loader, f"epoch {stepper.progress.epoch}", stepper.progress):
        train_step(detector, batch, residuals_of, stepper)
        keeper.after_step(stepper.compute.device)
    share_buffers(detector.classifier, stepper.world)  # the statistics that are validated and saved: the main process's


def train_step(detector: ResynthesisDetector, batch: Batch, residuals_of: ResidualsOf, stepper: Stepper) -> None:
    """Classify the batch's residuals, and take one step down the gradient of cross-entropy + auxiliary loss."""
    residual, auxiliary = residuals_of(batch, stepper.progress)  # (B, C_l, H_l, W_l), scalar or None
    labels, weights = batch.labels.to(residual.device), batch.weights.to(residual.device)  # (B,) each
    logits = detector.classify(residual)  # (B, 2)
    loss = (weights * F.cross_entropy(logits, labels, reduction="none")).sum()
    values = observed(logits, residual, labels, weights)
    if auxiliary is not None:
        values |= {"cross_entropy": loss, "auxiliary": auxiliary}
        loss = loss + auxiliary
    stepper.step(loss, values, batch)


def observed(logits: Tensor, residual: Tensor, labels: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """This process's shares of what is worth watching: accuracy, and the mean residual of either class."""
    real = (labels == REAL).float()  # (B,)
    energy = residual.detach().mean(dim=(1, 2, 3))  # (B,): the simplest score the method has
    return {
        "accuracy": (weights * (logits.argmax(dim=1) == labels)).sum(),
        "share_real": (weights * real).sum(),
        "energy_real": (weights * energy * real).sum(),
        "energy_fake": (weights * energy * (1 - real)).sum(),
    }


def epoch_values(means: dict[str, float]) -> dict[str, float]:
    """The epoch's means as they are recorded: each class's energy is a mean over that class."""
    means = dict(means)
    share_real = means.pop("share_real", 0.0)
    for name, share in (("energy_real", share_real), ("energy_fake", 1 - share_real)):
        if name in means:
            means[name] = means[name] / share if share else float("nan")
    return means


# --- validation and pictures --------------------------------------------------------------------------------


@torch.inference_mode()
def validate(
    detector: ResynthesisDetector, loader: DataLoader, residuals_of: ResidualsOf, keeper: StateKeeper
) -> dict[str, float]:
    """Loss, accuracy and AUROC (fake = positive) on the validation images."""
    detector.eval()
    logits, labels = [torch.empty(0, 2)], [torch.empty(0, dtype=torch.int64)]
    for batch in keeper.batches(loader, "validation"):
        own = batch.weights > 0  # (B,): not those that only fill a process's share
        logits.append(detector.classify(residuals_of(batch)[0]).cpu()[own])  # (B, 2)
        labels.append(batch.labels[own])
        keeper.obey()
    logits, labels = gather_rows(torch.cat(logits), keeper.world), gather_rows(torch.cat(labels), keeper.world)
    return {
        "val_loss": F.cross_entropy(logits, labels).item(),
        "val_accuracy": (logits.argmax(dim=1) == labels).float().mean().item(),
        "val_auroc": auroc((logits[:, FAKE] - logits[:, REAL]).numpy(), (labels == FAKE).numpy()),
    }


def example_images(items: list[Item], policy: SizePolicy) -> dict[str, Tensor]:
    """The first real and the first generated image, their central PICTURE_SIDE pixels at most: uint8 (1, 3, H, W)."""
    firsts = {item.label: item for item in reversed(items)}  # the last written of each label is the first of the items
    images = {}
    for label, item in firsts.items():
        x = fit_size(load_image(item.path), policy)  # (3, H, W)
        side = min(PICTURE_SIDE, *x.shape[-2:])
        images[LABEL_NAMES[label]] = fit_size(x, SizePolicy(policy.scale, side - side % policy.scale))[None]
    return images


@torch.no_grad()
def record_pictures(
    detector: ResynthesisDetector,
    compute: Compute,
    task: str,
    recorder: Recorder,
    images: dict[str, Tensor],
    finished: int,
) -> None:
    """To TensorBoard, of each image (1, 3, H, W): x | x_hat | residual x 4; degraded x_lr | x_hat of that | residual x 4.

    The same images and the same degradation in every epoch, so that before and after training can be compared.
    """
    if recorder.writer is None:
        return
    scale = detector.resynthesizer.scale
    for name, image in images.items():
        x = compute.input(image)
        inputs = {name: downsample(x, scale)}  # (1, 3, h, w)
        if TASKS[task]:
            inputs[f"{name}_degraded"] = degrade_batch(TASKS[task](keyed_generator(0)), x, scale, [keyed_generator(1)])
        for what, x_lr in inputs.items():
            with compute.autocast():
                x_hat = detector.resynthesizer(x_lr)  # (1, 3, H, W)
            before = F.interpolate(x_lr, scale_factor=scale) if what != name else x
            row = torch.cat([before, x_hat, PICTURE_GAIN * (x_hat - x).abs()], dim=3)  # (1, 3, H, 3 * W)
            recorder.pictures(f"resynthesis/{what}", row, finished)


if __name__ == "__main__":
    sys.exit(run_program(partial(main, ARGS)))
