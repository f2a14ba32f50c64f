"""Stage 1: train the re-synthesizer, RDN super-resolution on REAL images only.

    python train_sr.py --train-file data/celeba_example_train.txt --eval-file data/celeba_example_val.txt

Writes, into OUTPUTS_DIR/xSCALE: epoch_N.pth (a bare state dict, as the released code does), best.pth (highest PSNR
on --eval-file), last.pth (the whole state, for --resume), config.json, stats.jsonl and TensorBoard records.
"""

from utils.options import train_sr_parser

ARGS = train_sr_parser().parse_args() if __name__ == "__main__" else None  # mistakes before PyTorch is imported

import contextlib
import logging
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

import models
from data.datasets import Batch, EpochBatches, ImageDataset, PatchDataset, make_loader
from data.images import SizePolicy, usable_items
from data.leaks import log_quick_audit
from data.lists import Item, list_digest, paths_of
from models import RDN, STAGES, VGGStages
from models.auxiliary import degrade_patch, super_resolution_loss
from models.rdn import start_as_interpolation
from utils import training
from utils.checkpoints import Checkpoint
from utils.compute import Compute, choose_compute
from utils.distributed import World, all_reduce_sum, join_processes
from utils.errors import UserError, run_program
from utils.random_streams import DEGRADE_PATCH, seeded_generator
from utils.training import Run, Stepper

logger = logging.getLogger("train_sr")

LAST = "last.pth"
PICTURES = 4  # patches shown on TensorBoard

# Gives (loss, its L1 part, pictures) of a batch of patches, the losses as this process's shares of the batch's means
LossOf = Callable[[Batch], tuple[Tensor, Tensor, Tensor]]


def main(args: Namespace) -> None:
    compute = choose_compute(args.gpu, args.precision, args.deterministic, args.seed)
    with join_processes(compute.device.type) as world, contextlib.ExitStack() as stack:
        # Images and weights: what can be wrong with them is found before anything is written
        items = [] if args.evaluate else image_items(args.train_file, "--train-file")
        eval_items = image_items(args.eval_file, "--eval-file") if args.eval_file or args.evaluate else []
        states = sorted(Path(args.outputs_dir).glob(f"x{args.scale or '*'}/{LAST}"))
        origin, resumed = training.starting_point(args.resume, args.init, states)
        model = resynthesizer(origin, vars(args), args.start, compute)
        eval_items, _ = usable_items(eval_items, SizePolicy(model.scale), args.skip_bad)
        eval_batches = EpochBatches(len(eval_items), world.size, world=world)  # one image at a time
        eval_images = ImageDataset(eval_items, SizePolicy(model.scale))
        eval_loader = make_loader(eval_images, eval_batches, args.workers, compute)
        if args.evaluate:
            return evaluate_only(model, origin, eval_loader, compute, world)
        items, _ = usable_items(items, SizePolicy(model.scale, args.patch_size * model.scale), args.skip_bad)
        if world.is_main and eval_items:
            log_quick_audit(items, eval_items)
        vgg, vgg_record = features(args.vgg_weights, resumed, compute) if args.vgg_lambda > 0 else (None, None)

        # What is trained, how far it is, and what is kept of it
        batches = EpochBatches(len(items), args.batch_size, args.seed, world)
        adam = torch.optim.Adam(model.parameters(), lr=args.lr)
        stepper = Stepper(adam, compute, world, partial(rate_factor, args), batches.steps, args.clip_norm)
        output = Path(args.outputs_dir) / f"x{model.scale}"
        settings = vars(args) | {"precision": compute.precision, "images": list_digest(items)}
        stack.enter_context(training.run_folder(output, world, resumed, args.overwrite))
        stepper.load_state(resumed, settings)
        config = {"resynthesizer": models.rdn_config(model.state_dict())}
        about = {"config": config, "vgg": vgg_record, "settings": settings}
        run = stack.enter_context(Run(output / LAST, about, partial(network_state, model), stepper, args.num_epochs))
        done = stepper.progress

        # Training, on patches in an order that depends on seed and epoch alone
        patches = PatchDataset(items, args.patch_size, model.scale, args.patches_per_image, args.seed)
        loader = make_loader(patches, batches, args.workers, compute)
        ways = {"augment": args.augment, "completion": args.completion, "colorization": args.colorization}
        loss_of = partial(patch_loss, model, vgg, args.vgg_lambda, partial(degrade_patches, args.seed, ways), compute)
        logger.info("%d training images; from epoch %d, step %d on", len(items), done.epoch, done.step)
        for epoch in range(done.epoch, args.num_epochs):
            batches.set_epoch(epoch, done.step)
            pictures = train_one_epoch(loader, loss_of, stepper, run)
            values, last = done.means(), epoch + 1 == args.num_epochs
            if eval_items:
                values |= evaluate(model, run.batches(eval_loader, "evaluation"), compute, world)
            due = (epoch + 1) % args.num_save == 0 or last
            run.pictures("input, re-synthesis, target", pictures if due else (), epoch + 1)
            run.end_epoch(values, "psnr", numbered_files if due else None)
            warn_if_poor(values if last else {})


def image_items(source: str | None, flag: str) -> list[Item]:
    """The images of a list or folder given by `flag`, without labels."""
    if source is None:
        raise UserError(f"no images: give {flag} a list (one path a line) or a folder of images")
    return [Item(path, None, "") for path in paths_of(source)]


def resynthesizer(origin: Checkpoint | None, shape: dict, how: str, compute: Compute) -> RDN:
    """RDN of a checkpoint or, without one, new, on its device. shape: the flags. how: new weights begin (`--start`)."""
    model = models.load_resynthesizer(origin, shape)
    if origin is None and how == "interpolation":
        start_as_interpolation(model)
    return model.to(compute.device, memory_format=torch.channels_last)


def features(source: str, resumed: Checkpoint | None, compute: Compute) -> tuple[VGGStages, dict]:
    """VGG-19 of `--vgg-weights` for the perceptual loss, and the record of its weights: those the run began with."""
    before = resumed and resumed.content.get("vgg")
    vgg, record = models.load_vgg(source, before, resumed.name if resumed else "")
    return vgg.to(compute.device, memory_format=torch.channels_last), record


def network_state(model: RDN) -> dict:
    """The network's part of the state."""
    return {"state_dict": model.state_dict(), "fingerprint": models.fingerprint(model)}


def numbered_files(state: dict) -> dict[str, dict]:
    """The file of an epoch, as the release writes it: the bare weights. Release: its number counts from 0."""
    return {f"epoch_{state['progress']['epoch'] - 1}.pth": state["state_dict"]}


def rate_factor(args: Namespace, epochs: float) -> float:
    """The rate's factor after so many epochs."""
    if args.schedule == "cosine":
        return training.cosine(args.num_epochs, epochs)
    return args.lr_decay ** (int(epochs) // args.lr_decay_epoch)


def train_one_epoch(loader: DataLoader, loss_of: LossOf, stepper: Stepper, run: Run) -> Tensor:
    """The rest of this epoch's steps. Returns pictures of the last one, (n, 3, H, W) in [0, 1]."""
    pictures = torch.empty(0)
    for batch in run.batches(loader, f"epoch {stepper.progress.epoch}", training=True):
        loss, l1, pictures = loss_of(batch)
        stepper.step(loss, {"l1": l1}, batch)
    return pictures


def patch_loss(
    model: RDN,
    vgg: VGGStages | None,
    vgg_weight: float,
    degrade: Callable[[Tensor, list], Tensor],
    compute: Compute,
    batch: Batch,
) -> tuple[Tensor, Tensor, Tensor]:
    """The `LossOf` a batch of HR patches. vgg: None for L1 alone. degrade: of the LR patches."""
    x = compute.input(batch.x)  # (B, 3, P, P)
    x_lr = degrade(models.downsample(x, model.scale), batch.keys)  # (B, 3, p, p)
    with compute.autocast():
        x_hat = model(x_lr)  # (B, 3, P, P)
        maps_hat = vgg(x_hat, STAGES) if vgg else {}
        with torch.no_grad():
            maps = vgg(x, STAGES) if vgg else {}
    loss, l1 = super_resolution_loss(x_hat, x, maps_hat, maps, vgg_weight)
    share = batch.weights.sum().to(x.device)  # of the whole batch's mean
    shown_lr = F.interpolate(x_lr[:PICTURES], scale_factor=model.scale)  # (n, 3, P, P)
    pictures = torch.cat([shown_lr, x_hat[:PICTURES].detach(), x[:PICTURES]], dim=3)  # (n, 3, P, 3 * P)
    return loss * share, l1 * share, pictures


def degrade_patches(seed: int, ways: dict[str, bool], x_lr: Tensor, keys: list[tuple[int, int, int]]) -> Tensor:
    """Each patch degraded as its key and the seed have it, if in any way at all. x_lr: (B, 3, p, p) in [0, 1]."""
    if not any(ways.values()):
        return x_lr
    rngs = (seeded_generator(seed, *key, DEGRADE_PATCH) for key in keys)
    return torch.stack([degrade_patch(patch, rng, **ways) for patch, rng in zip(x_lr, rngs, strict=True)])


@torch.inference_mode()
def evaluate(model: RDN, batches: Iterable[Batch], compute: Compute, world: World) -> dict[str, float]:
    """Mean PSNR (dB) and SSIM of the re-synthesis of whole images on RGB, beside bicubic interpolation's."""
    sums = torch.zeros(5, device=compute.device, dtype=torch.float64)
    for batch in batches:
        x = compute.input(batch.x)  # (1, 3, H, W)
        x_lr = models.downsample(x, model.scale)  # (1, 3, h, w)
        with compute.autocast():
            x_hat = model(x_lr)  # (1, 3, H, W)
        bicubic = F.interpolate(x_lr, scale_factor=model.scale, mode="bicubic")  # (1, 3, H, W)
        values = torch.tensor([*image_quality(x_hat, x), *image_quality(bicubic, x), 1.0])
        sums += (batch.weights > 0) * values.to(sums)
    *sums, count = all_reduce_sum(sums, world).tolist()
    names = ("psnr", "ssim", "psnr_bicubic", "ssim_bicubic")
    return {name: value / count if count else float("nan") for name, value in zip(names, sums, strict=True)}


def image_quality(y: Tensor, x: Tensor) -> tuple[float, float]:
    """PSNR (dB) and SSIM of y, clipped to [0, 1], against x. Both (1, 3, H, W)."""
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    y = y.float().clamp(0, 1).contiguous()
    psnr = peak_signal_noise_ratio(y, x, data_range=1.0).item()
    kernel = min(11, *((side - 1) // 2 * 2 + 1 for side in x.shape[-2:]))  # the usual window, or what fits
    ssim = structural_similarity_index_measure(y, x, data_range=1.0, gaussian_kernel=kernel == 11, kernel_size=kernel)
    return psnr, ssim.item()


def warn_if_poor(values: dict[str, float]) -> None:
    """Say so if RDN is of no use yet. values: of `evaluate`, if it was evaluated."""
    if values.get("psnr", 0) < values.get("psnr_bicubic", 0):
        logger.warning("warning: RDN brings back less than bicubic interpolation: it needs more training")


def evaluate_only(
    model: RDN, origin: Checkpoint | None, batches: Iterable[Batch], compute: Compute, world: World
) -> None:
    """`--evaluate`: PSNR and SSIM of given weights, on the screen."""
    if origin is None:
        raise UserError("--evaluate needs the weights to evaluate: give them with --weights-file")
    values = evaluate(model, (batch for batch in batches if len(batch.x)), compute, world)
    logger.info("x%d from box-downsampled input, RGB, %s", model.scale, compute)
    logger.info("%s: PSNR %.2f dB, SSIM %.4f", origin.name, values["psnr"], values["ssim"])
    logger.info("bicubic interpolation: PSNR %.2f dB, SSIM %.4f", values["psnr_bicubic"], values["ssim_bicubic"])
    warn_if_poor(values)


if __name__ == "__main__":
    sys.exit(run_program(partial(main, ARGS)))
