"""Stage 2: train the detector on re-synthesis residuals, RDN frozen. Stage 3: fine-tune both end to end.

    python train_detector.py --fixed-sr --sr-weights-file output_hr/x4/best.pth --no_dilation \\
        --data-root-pos REAL_DIR --data-root-neg GENERATED_DIR --output-path output_end2end/mine
    python train_detector.py --mode-sr denoising --init output_end2end/mine/last.pth.tar --lr 1e-6 ...

Writes, into OUTPUT_PATH: NNNN.pth.tar and NNNN_sr.pth.tar (the released formats; NNNN counts epochs from 1),
best.pth.tar (highest AUROC on the validation images), last.pth.tar (the whole state, for --resume), config.json,
stats.jsonl and TensorBoard records.
"""

from utils.checkpoints import read_checkpoint
from utils.options import train_detector_parser

ARGS = train_detector_parser().parse_args() if __name__ == "__main__" else None  # mistakes before PyTorch is imported

import contextlib
import logging
import math
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import models
from data.datasets import Batch, Draws, EpochBatches, ImageDataset, make_loader
from data.images import SizePolicy, load_image, refuse_mixed_sizes, resize_and_crop, usable_items
from data.leaks import log_quick_audit
from data.lists import Item, identities, labelled_items, list_digest
from data.perturbations import augment
from evaluation import detector as scoring
from evaluation import sources
from evaluation.metrics import auroc
from evaluation.sources import ResidualsOf
from models import ResynthesisDetector
from models.auxiliary import TASKS, degrade_batch
from models.resnet import TOTAL_STRIDE
from utils import training
from utils.checkpoints import Checkpoint
from utils.compute import Compute, choose_compute
from utils.distributed import World, all_gather_rows, broadcast_buffers, join_processes
from utils.errors import UserError, run_program
from utils.labels import FAKE, LABEL_NAMES, REAL
from utils.random_streams import seeded_generator
from utils.training import Run, Stepper

logger = logging.getLogger("train_detector")

LAST = "last.pth.tar"
FINAL_RATE = 1e-4  # of the base rate: where the cosine schedule ends
PICTURE_SIDE = 256  # pixels of the pictures in TensorBoard
PICTURE_GAIN = 4  # residuals are faint: shown brighter by this factor


def main(args: Namespace) -> None:
    compute = choose_compute(args.gpu, args.precision, args.deterministic, args.seed)
    with join_processes(compute.device.type) as world, contextlib.ExitStack() as stack:
        # Images are listed before any network is built, networks before any image is read
        items, val_items = labelled_items(args.real_roots, args.fake_roots, args.tree, args.csv), validation_items(args)
        detector, config, resumed = networks(args)
        images, val_images = image_sets(args, detector.resynthesizer.scale, items, val_items)
        config["images"] |= scoring.describe_training_images(images)
        batches = EpochBatches(len(images), args.batch_size, args.seed, world)
        val_batches = EpochBatches(len(val_images), args.batch_size, world=world)
        check_sizes(detector, batches, compute, images, val_images)
        if world.is_main:
            log_quick_audit(images.items, val_images.items)

        # What is trained, how far it is, and what is kept of it
        stepper = make_stepper(args, detector, compute, world, batches.steps)
        output = Path(args.output_path)
        settings = vars(args) | {"precision": compute.precision, "images": list_digest(images.items)}
        stack.enter_context(training.run_folder(output, world, resumed, args.overwrite))
        stepper.load_state(resumed, settings)
        about = {"config": config, "settings": settings}
        state_of_networks = partial(network_state, detector, config, torch.from_numpy(identities(images.items)))
        run = stack.enter_context(Run(output / LAST, about, state_of_networks, stepper, args.epochs))
        progress = stepper.progress
        pictures = partial(record_pictures, detector, compute, args.auxiliary, run, example_images(images))

        # How residuals come: with an RDN that is trained, or from a frozen one, whose residuals are kept if they can be
        frozen = partial(sources.frozen_residuals, detector, compute, args.micro_batch)
        auxiliary = sources.Auxiliary(args.auxiliary, args.auxiliary_weight, args.seed, args.micro_batch)
        trained = partial(sources.end_to_end_residuals, detector, compute, world, auxiliary)
        residuals_of = frozen if args.fixed_resynthesizer else trained
        kept = sources.kept_residuals(args, detector, config, compute, (images, val_images), world)
        loader = make_loader(kept[0] if kept else images, batches, args.workers, compute)
        val_loader = make_loader(kept[1] if kept else val_images, val_batches, args.workers, compute)

        logger.info("%d training images; from epoch %d, step %d on", batches.count, progress.epoch, progress.step)
        if not progress.total_steps:
            pictures(0)
        for epoch in range(progress.epoch, args.epochs):
            for dataset in kept:
                dataset.fill(epoch, frozen, run.batches, args.workers, compute, world)
            batches.set_epoch(epoch, progress.step)
            train_one_epoch(detector, loader, residuals_of, stepper, run)
            values = progress.means()
            if val_items:
                values |= validate(detector, val_loader, frozen, run)
                config["images"]["residual"] = [values[f"val_residual_{end}"] for end in ("least", "most")]
            if not args.fixed_resynthesizer:
                pictures(epoch + 1)
            due = epoch % args.save_every_epoch == 0 or epoch + 1 == args.epochs
            run.end_epoch(values, "val_auroc", numbered_files if due else None)


def validation_items(args: Namespace) -> list[Item]:
    """The images of --val-root-pos and --val-root-neg or of --val-csv, if any."""
    if not (args.val_real_roots or args.val_fake_roots or args.val_csv):
        return []
    flags = ("--val-root-pos", "--val-root-neg")
    return labelled_items(args.val_real_roots, args.val_fake_roots, csv_file=args.val_csv, flags=flags)


def image_sets(
    args: Namespace, scale: int, items: list[Item], val_items: list[Item]
) -> tuple[ImageDataset, ImageDataset]:
    """The images to train and to validate on: those that can be used."""
    if args.crops and not args.crop_size:
        raise UserError(f"--crops-per-image {args.crops} needs their size: give --crop-size N")
    policy, draws = SizePolicy(scale, args.crop_size or None, args.resize or None), Draws(args.seed, args.crops)
    items, headers = usable_items(items, policy, args.skip_bad)
    val_items, val_headers = usable_items(val_items, policy, args.skip_bad)
    images = ImageDataset(items, policy, draws, augment if args.augment_perturb else None)
    val_images = ImageDataset(val_items, policy)
    images.headers, val_images.headers = headers, val_headers
    return images, val_images


def networks(args: Namespace) -> tuple[ResynthesisDetector, dict, Checkpoint | None]:
    """The detector, its config, and the state of the run to be continued (None: this is a new run)."""
    if args.auxiliary != "none" and args.fixed_resynthesizer:
        raise UserError(f"--mode-sr {args.auxiliary} trains RDN and --fixed-sr does not: leave one of them out")
    last = Path(args.output_path) / LAST
    origin, resumed = training.starting_point(args.resume, args.init, [last])
    for name, flag in (("fixed_resynthesizer", "--fixed-sr"), ("auxiliary", "--mode-sr")):
        before = resumed and resumed.content["settings"].get(name)
        if resumed and before != vars(args)[name]:  # other parts or another task: no run to go on with
            was = f"{resumed.name} was trained with {flag} = {before}"
            if Path(resumed.name).resolve().parent == last.resolve().parent:
                raise UserError(f"{was}: give its flags, or --init and another --output-path")
            logger.info("%s: a new run starts from its weights", was)
            resumed = None
    resynthesizer = read_checkpoint(args.resynthesizer_file)
    if resumed and resynthesizer:
        logger.info("RDN comes from %s, not from %s", resumed.name, resynthesizer.name)
        resynthesizer = None
    if origin:
        detector, config = models.load_detector(origin, resynthesizer, vars(args), args.vgg_weights)
    elif resynthesizer:
        detector, config = models.new_detector(resynthesizer, vars(args), args.vgg_weights)
    else:
        raise UserError("no re-synthesizer: give RDN's weights with --sr-weights-file (train_sr.py makes them)")
    residual = (config.get("images") or {}).get("residual") if resumed else None  # until the next validation
    config["images"] = {"crop_size": args.crop_size, "resize": args.resize, "residual": residual}
    detector.freeze_resynthesizer(args.fixed_resynthesizer)
    detector.resynthesizer.checkpoint_blocks = not args.fixed_resynthesizer  # or 12 GB for an image of 1024 x 1024
    if not args.fixed_resynthesizer and args.auxiliary_weight > 0 and detector.vgg is None:
        before = resumed and config.get("auxiliary_vgg")  # a resumed run goes on with the features it began with
        detector.vgg, config["auxiliary_vgg"] = models.load_vgg(args.vgg_weights, before, "the run to be resumed")
    return detector, config, resumed


def check_sizes(
    detector: ResynthesisDetector, batches: EpochBatches, compute: Compute, images: ImageDataset, val: ImageDataset
) -> None:
    """Better said now than in the last step of the first epoch: sizes that do not share a batch, or are too small."""
    if batches.batch_size > 1:
        for dataset in (images, val):
            refuse_mixed_sizes(dataset.items, dataset.sizes)
    height, width = min((detector.residual_shape(*size)[1:] for size in set(images.sizes)), key=max)
    synchronised = batches.world.size > 1 and compute.device.type == "cuda"  # batch normalisation, over the processes
    if batches.smallest_share() == 1 and not synchronised and max(height, width) <= TOTAL_STRIDE:
        count = f"{batches.count} images in batches of {batches.batch_size} over {batches.world.size} process(es)"
        raise UserError(f"{count} leave one alone: {models.SINGLE_IMAGE}")
    if max(height, width) <= TOTAL_STRIDE:
        what = f"residuals are of {width} x {height} values, no more than the classifier's stride of {TOTAL_STRIDE}"
        logger.warning("warning: %s: gradients may be large; larger images or a lower --idx-stages train better", what)


def make_stepper(args: Namespace, detector: ResynthesisDetector, compute: Compute, world: World, steps: int) -> Stepper:
    """The detector on its device, and an optimizer for what of it is trained."""
    detector.to(compute.device, memory_format=torch.channels_last)
    if world.size > 1 and compute.device.type == "cuda":
        detector.classifier = nn.SyncBatchNorm.convert_sync_batchnorm(detector.classifier)
    groups = parameter_groups(detector, args.lr, args.weight_decay, args.classifier_grad_scale)
    if args.optimizer == "adamw":
        for group in groups:
            group["weight_decay"] = args.weight_decay  # which it takes apart from the gradient
        optimizer = torch.optim.AdamW(groups)
    else:
        optimizer = torch.optim.SGD(groups, momentum=args.momentum)
    rate_of = training.cosine if args.schedule == "cosine" else released_rate
    return Stepper(optimizer, compute, world, partial(rate_of, args.epochs), steps, args.clip_norm)


def parameter_groups(detector: ResynthesisDetector, lr: float, weight_decay: float, scale: float) -> list[dict]:
    """The classifier and, if it is trained, RDN, as groups for SGD.

    Release: its `--lr-sr` multiplies the classifier's gradients by `scale` before weight decay and momentum are
    applied. With SGD that is exactly a rate of lr * scale and a weight decay of weight_decay / scale.

    Raises:
        UserError: for a scale of 0, under which the classifier would only decay.
    """
    if scale == 0:
        raise UserError("--lr-sr 0 leaves the classifier untrained: give a factor above 0 (default: 0.02)")
    classifier = list(detector.classifier.parameters())
    rdn = [p for p in detector.resynthesizer.parameters() if p.requires_grad]
    groups = [{"params": classifier, "lr": lr * scale, "weight_decay": weight_decay / scale}]
    return groups + ([{"params": rdn, "lr": lr, "weight_decay": weight_decay}] if rdn else [])


def released_rate(of: int, epochs: float) -> float:
    """f(e) = 0.9999 cos(pi/2 * e / (E - 1)) + 0.0001, the base rate's factor after `epochs` of E = `of`.

    Release: it is set *after* epoch e for the next one, so epochs 0 and 1 both run at f(0) = 1.
    """
    passed = max(int(epochs) - 1, 0) / max(of - 1, 1)
    return (1 - FINAL_RATE) * math.cos(math.pi / 2 * passed) + FINAL_RATE


def network_state(detector: ResynthesisDetector, config: dict, trained_on: Tensor) -> dict:
    """The networks' part of the state, named as in the release where it has it. trained_on: of `identities`."""
    return {
        "arch": config["detector"]["arch"],
        "state_dict": detector.classifier.state_dict(),
        "sr_state_dict": detector.resynthesizer.state_dict(),
        "trained_on": trained_on,
        "config": {
            **config,
            "resynthesizer_fingerprint": models.fingerprint(detector.resynthesizer),
            "classifier_fingerprint": models.fingerprint(detector.classifier),
        },
    }


def numbered_files(state: dict) -> dict[str, dict]:
    """The two files of an epoch, as the release writes them; NNNN counts epochs from 1."""
    epoch = state["progress"]["epoch"]
    return {
        f"{epoch:04d}.pth.tar": {**state, "epoch": epoch},
        f"{epoch:04d}_sr.pth.tar": {
            "state_dict": state["sr_state_dict"],
            "fingerprint": state["config"]["resynthesizer_fingerprint"],
        },
    }


# --- training -----------------------------------------------------------------------------------------------


def train_one_epoch(
    detector: ResynthesisDetector, loader: DataLoader, residuals_of: ResidualsOf, stepper: Stepper, run: Run
) -> None:
    """The rest of this epoch's steps."""
    detector.train()
    for batch in run.batches(loader, f"epoch {stepper.progress.epoch}", training=True):
        train_step(detector, batch, residuals_of, stepper)
    broadcast_buffers(detector.classifier, stepper.world)  # the statistics that are validated and saved: the main process's


def train_step(detector: ResynthesisDetector, batch: Batch, residuals_of: ResidualsOf, stepper: Stepper) -> None:
    """Classify the batch's residuals, and take one step down the gradient of cross-entropy + auxiliary loss."""
    residual, auxiliary = residuals_of(batch, stepper.progress)  # (B, C_l, H_l, W_l), scalar or None
    labels, weights = batch.labels.to(residual.device), batch.weights.to(residual.device)  # (B,) each
    logits = detector.classify(residual)  # (B, 2)
    loss = (weights * F.cross_entropy(logits, labels, reduction="none")).sum()
    values = {"accuracy": (weights * (logits.argmax(dim=1) == labels)).sum()}
    if auxiliary is not None:
        values |= {"cross_entropy": loss, "auxiliary": auxiliary}
        loss = loss + auxiliary
    stepper.step(loss, values, batch)


@torch.inference_mode()
def validate(
    detector: ResynthesisDetector, loader: DataLoader, residuals_of: ResidualsOf, run: Run
) -> dict[str, float | None]:
    """Loss, accuracy and AUROC (fake = positive) on the validation images, and the range of their mean residuals."""
    detector.eval()
    labels, outputs = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, 3)]
    for batch in run.batches(loader, "validation"):
        own, residual = batch.weights > 0, residuals_of(batch)[0]  # (B,): not those that only fill a process's share
        means = residual.mean(dim=(1, 2, 3))[:, None]  # (B, 1)
        outputs.append(torch.cat([detector.classify(residual), means], dim=1).cpu()[own])  # (B, 3)
        labels.append(batch.labels[own])
    labels, outputs = all_gather_rows(torch.cat(labels), run.world), all_gather_rows(torch.cat(outputs), run.world)
    logits, means = outputs[:, :2], outputs[outputs[:, 2].isfinite(), 2].tolist()
    return {
        "val_loss": F.cross_entropy(logits, labels).item(),
        "val_accuracy": (logits.argmax(dim=1) == labels).float().mean().item(),
        "val_auroc": auroc((logits[:, FAKE] - logits[:, REAL]).numpy(), (labels == FAKE).numpy()),
        "val_residual_least": min(means, default=None),
        "val_residual_most": max(means, default=None),
    }


def example_images(images: ImageDataset) -> dict[str, Tensor]:
    """The first readable real and generated image, their central PICTURE_SIDE pixels at most: uint8 (1, 3, H, W)."""
    examples, scale = {}, images.policy.scale
    for item in images.items:
        name = LABEL_NAMES[item.label]
        if name not in examples:
            with contextlib.suppress(UserError):  # the training will say what is wrong with it
                x = resize_and_crop(load_image(item.path), images.policy)  # (3, H, W)
                side = min(PICTURE_SIDE, *x.shape[-2:])
                examples[name] = resize_and_crop(x, SizePolicy(scale, side - side % scale))[None]
    return examples


@torch.no_grad()
def record_pictures(
    detector: ResynthesisDetector,
    compute: Compute,
    task: str,
    run: Run,
    images: dict[str, Tensor],
    finished: int,
) -> None:
    """To TensorBoard, of each image (1, 3, H, W): x | x_hat | pixel difference x 4; degraded x_lr | x_hat of it | the same.

    The same images and the same degradation in every epoch, so that before and after training can be compared.
    """
    scale = detector.resynthesizer.scale
    for name, image in images.items() if run.writer else ():
        x = compute.input(image)
        inputs = {name: models.downsample(x, scale)}  # (1, 3, h, w)
        if TASKS[task]:
            inputs[f"{name}_degraded"] = degrade_batch(TASKS[task](seeded_generator(0)), x, scale, [seeded_generator(1)])
        for what, x_lr in inputs.items():
            with compute.autocast():
                x_hat = detector.compare(x).x_hat if what == name else detector.resynthesizer(x_lr)  # (1, 3, H, W)
            before = x if what == name else F.interpolate(x_lr, scale_factor=scale)
            row = torch.cat([before, x_hat, PICTURE_GAIN * (x_hat - x).abs()], dim=3)  # (1, 3, H, 3 * W)
            run.pictures(f"resynthesis/{what}", row, finished)


if __name__ == "__main__":
    sys.exit(run_program(partial(main, ARGS)))
