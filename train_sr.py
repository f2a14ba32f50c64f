"""Stage 1: train the re-synthesizer, RDN super-resolution on REAL images only.

    python train_sr.py --train-file data/celeba_example_train.txt --eval-file data/celeba_example_val.txt

Writes, into OUTPUTS_DIR/xSCALE: epoch_N.pth (a bare state dict, as the released code does), best.pth (highest PSNR
on --eval-file), last.pth (the whole state, for --resume), config.json, stats.jsonl and TensorBoard records.
"""

import contextlib
import logging
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from tqdm import tqdm

from data.audit import log_quick_audit
from data.images import DataError, Item, SizePolicy, fit_size, load_image, paths_of, to_float, usable_paths
from data.loading import make_loader
from data.patches import PatchDataset, Patches, collate_patches
from data.sampling import EpochBatches, shard
from models import (
    RDN,
    STAGES,
    Checkpoint,
    ModelError,
    VGGStages,
    downsample,
    fingerprint,
    load_resynthesizer,
    load_vgg,
    rdn_config,
)
from models.auxiliary import degrade_patch, super_resolution_loss
from utils import checkpoint as checkpoints
from utils.checkpoint import CheckpointError
from utils.distributed import World, sum_over_processes, world_of_processes
from utils.options import train_sr_parser
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

logger = logging.getLogger("train_sr")

LAST = "last.pth"
PICTURES = 4  # patches shown on TensorBoard
CHANGEABLE = SAFETY_OPTIONS | {"gpu", "workers", "resume", "weights_file", "num_epochs", "outputs_dir"}  # when resuming


def main(argv: list[str] | None = None) -> None:
    args = train_sr_parser().parse_args(argv)
    device = choose_device(args.gpu)
    with world_of_processes(device.type) as world, StopSignal() as stop, contextlib.ExitStack() as stack:
        set_deterministic(args.seed, device)

        # Images and weights: what can be wrong with them is found before anything is written
        train_paths = [] if args.evaluate else image_paths(args.train_file, "--train-file")
        eval_paths = image_paths(args.eval_file, "--eval-file") if args.eval_file or args.evaluate else []
        start, resumed = starting_point(args.resume, args.weights_file, Path(args.outputs_dir))
        model = load_resynthesizer(start, vars(args)).to(device, memory_format=torch.channels_last)
        eval_paths = usable_paths(eval_paths, SizePolicy(model.scale), args.skip_bad)
        if args.evaluate:
            evaluate_only(model, start, eval_paths, device, args.precision, world)
            return
        patch_size = args.patch_size * model.scale
        train_paths = usable_paths(train_paths, SizePolicy(model.scale, crop_size=patch_size), args.skip_bad)
        if world.is_main and eval_paths:
            log_quick_audit([Item(p, None, "") for p in train_paths], [Item(p, None, "") for p in eval_paths])
        vgg, vgg_record = None, None
        if args.vgg_lambda > 0:
            vgg, vgg_record = load_vgg(args.vgg_weights, resumed.get("vgg"), args.resume)
            vgg.to(device, memory_format=torch.channels_last)

        # What is trained, how far it is, and what is kept of it
        folder = make_folder(Path(args.outputs_dir) / f"x{model.scale}")
        stack.enter_context(sole_writer(folder / ".lock", world))
        adam = torch.optim.Adam(model.parameters(), lr=args.lr)
        stepper = Stepper(adam, device, args.precision, world, args.skip_nonfinite, folder / LAST)
        if resumed:
            stepper.load_state_dict(resumed)
            warn_about_changes(resumed["settings"], vars(args), CHANGEABLE)
        progress = stepper.progress
        about = {"config": {"resynthesizer": rdn_config(model.state_dict())}, "vgg": vgg_record, "settings": vars(args)}
        recorder = Recorder(folder, about, world, progress.epoch)
        keeper = StateKeeper(
            folder / LAST, lambda: weights_of(model) | stepper.state_dict() | about, stop, args.save_minutes, world
        )

        # Training, on patches in an order that depends on seed and epoch alone
        batches = EpochBatches(len(train_paths), args.batch_size, args.seed, True, world.rank, world.size)
        patches = PatchDataset(train_paths, args.patch_size, model.scale, args.patches_per_image, args.seed)
        loader = make_loader(patches, batches, collate_patches, args.workers, device)
        ways = {"augment": args.augment, "completion": args.completion, "colorization": args.colorization}
        degrade = partial(degrade_patches, seed=args.seed, **ways)
        loss_of = partial(patch_loss, model, vgg, degrade, args.vgg_lambda, device, args.precision)
        logger.info("%d training images; from epoch %d, step %d on", len(train_paths), progress.epoch, progress.step)
        while progress.epoch < args.num_epochs:
            epoch = progress.epoch
            stepper.set_rates(args.lr_decay ** (epoch // args.lr_decay_epoch))
            batches.set_epoch(epoch, progress.step)
            pictures = train_one_epoch(loss_of, loader, batches, stepper, keeper, train_paths)
            values = progress.means() | {"learning_rate": adam.param_groups[0]["lr"]}
            progress.next_epoch()
            if epoch % args.num_save == 0 or progress.epoch == args.num_epochs:
                if eval_paths:
                    values |= evaluate(model, eval_paths, device, args.precision, world)
                save_epoch(model, about, epoch, keeper, progress, args.keep_last, values.get("psnr"))
                recorder.pictures("input, re-synthesis, target", pictures, epoch)
            recorder.epoch(epoch, values)
        recorder.close()
        logger.info("trained to epoch %d; weights in %s", args.num_epochs, folder)


def image_paths(source: str | None, flag: str) -> list[str]:
    """The images of a list or folder given by `flag`."""
    if source is None:
        raise UsageError(f"no images: give {flag} a list (one path a line) or a folder of images")
    return paths_of(source)


def starting_point(resume: str | None, weights_file: str | None, outputs: Path) -> tuple[Checkpoint | None, dict]:
    """The weights to start from, and the state of the run to be continued (empty: a new run).

    Raises:
        UsageError: if the file to resume holds weights but no state.
    """
    if resume == "auto":
        states = sorted(outputs.glob(f"x*/{LAST}"))
        if len(states) > 1:
            raise UsageError(f"--resume auto: {outputs} holds {len(states)} runs; name the state to go on from")
        resume = str(states[0]) if states else None
        logger.info("resuming %s", resume) if resume else logger.info("nothing to resume in %s", outputs)
    name = resume or weights_file
    if name is None:
        return None, {}
    content = checkpoints.load(name)
    if resume and "progress" not in content:
        raise UsageError(f"{resume} holds weights but no training state: start from them with --weights-file instead")
    return Checkpoint(content, name), content if resume else {}


def train_one_epoch(
    loss_of: Callable[[Patches], tuple[Tensor, Tensor, Tensor]],
    loader: DataLoader,
    batches: EpochBatches,
    stepper: Stepper,
    keeper: StateKeeper,
    paths: list[str],
) -> Tensor:
    """The rest of this epoch's steps. Returns pictures of the last one, (n, 3, H, W) in [0, 1]."""
    pictures = torch.empty(0)
    for patches in tqdm(loader, desc=f"epoch {stepper.progress.epoch}", leave=False, disable=None):
        if patches.error:
            raise DataError(patches.error)
        own, whole = batches.shares(stepper.progress.step)
        loss, l1, pictures = loss_of(patches)
        stepper.backward(loss * own / whole)
        files = sorted({paths[index] for _, index, _ in patches.keys})
        stepper.step({"loss": loss * own / whole, "l1": l1 * own / whole}, whole, files)
        keeper.after_step(stepper.device)
    return pictures


def patch_loss(
    model: RDN,
    vgg: VGGStages | None,
    degrade: Callable[[Tensor, list[tuple[int, int, int]]], Tensor],
    vgg_weight: float,
    device: torch.device,
    precision: str,
    patches: Patches,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, its L1 part, pictures) of a batch of HR patches, each a mean over the patches. vgg: None for L1 alone."""
    x = to_float(patches.images.to(device, non_blocking=True))  # (B, 3, P, P)
    x = x.contiguous(memory_format=torch.channels_last)
    x_lr = degrade(downsample(x, model.scale), patches.keys)  # (B, 3, p, p)
    with autocast(device, precision):
        x_hat = model(x_lr)  # (B, 3, P, P)
        maps_hat = vgg(x_hat, STAGES) if vgg else {}
        with torch.no_grad():
            maps = vgg(x, STAGES) if vgg else {}
    loss, l1 = super_resolution_loss(x_hat, x, maps_hat, maps, vgg_weight)
    shown_lr = F.interpolate(x_lr[:PICTURES], scale_factor=model.scale)  # (n, 3, P, P)
    return loss, l1, torch.cat([shown_lr, x_hat[:PICTURES].detach(), x[:PICTURES]], dim=3)


def degrade_patches(x_lr: Tensor, keys: list[tuple[int, int, int]], seed: int, **ways: bool) -> Tensor:
    """Each patch degraded as its key and the seed have it. x_lr: (B, 3, p, p) in [0, 1]."""
    if not any(ways.values()):
        return x_lr
    return torch.stack(
        [degrade_patch(patch, keyed_generator(seed, *key, 1), **ways) for patch, key in zip(x_lr, keys, strict=True)]
    )


@torch.inference_mode()
def evaluate(model: RDN, paths: list[str], device: torch.device, precision: str, world: World) -> dict[str, float]:
    """Mean PSNR (dB) and SSIM of the re-synthesis of whole images on RGB, beside bicubic interpolation's."""
    sums = torch.zeros(4, device=device, dtype=torch.float64)
    for path in tqdm(shard(paths, world.rank, world.size), desc="evaluation", leave=False, disable=None):
        image = fit_size(load_image(path), SizePolicy(model.scale))
        x = to_float(image.to(device))[None]  # (1, 3, H, W)
        x_lr = downsample(x, model.scale)  # (1, 3, h, w)
        with autocast(device, precision):
            x_hat = model(x_lr.contiguous(memory_format=torch.channels_last))  # (1, 3, H, W)
        bicubic = F.interpolate(x_lr, scale_factor=model.scale, mode="bicubic")  # (1, 3, H, W)
        sums += torch.stack([quality for y in (x_hat, bicubic) for quality in image_quality(y, x)])
    means = (sum_over_processes(sums, world) / len(paths)).tolist()
    return dict(zip(("psnr", "ssim", "psnr_bicubic", "ssim_bicubic"), means, strict=True))


def image_quality(y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """PSNR (dB) and SSIM of y, clipped to [0, 1], against x. Both (1, 3, H, W)."""
    y = y.float().clamp(0, 1).contiguous()
    psnr = peak_signal_noise_ratio(y, x, data_range=1.0)
    return psnr.double(), structural_similarity_index_measure(y, x, data_range=1.0).double()


def evaluate_only(
    model: RDN, start: Checkpoint | None, paths: list[str], device: torch.device, precision: str, world: World
) -> None:
    """`--evaluate`: PSNR and SSIM of given weights, on the screen."""
    if start is None:
        raise UsageError("--evaluate needs the weights to evaluate: give them with --weights-file")
    values = evaluate(model, paths, device, precision, world)
    logger.info("%d images, x%d from box-downsampled input, RGB, %s", len(paths), model.scale, precision)
    logger.info("%s: PSNR %.2f dB, SSIM %.4f", start.name, values["psnr"], values["ssim"])
    logger.info("bicubic interpolation: PSNR %.2f dB, SSIM %.4f", values["psnr_bicubic"], values["ssim_bicubic"])


def weights_of(model: RDN) -> dict:
    return {"state_dict": model.state_dict(), "fingerprint": fingerprint(model)}


def save_epoch(
    model: RDN,
    about: dict,
    epoch: int,
    keeper: StateKeeper,
    progress: Progress,
    keep_last: int | None,
    psnr: float | None,
) -> None:
    """Write epoch_N.pth, as the release does a bare state dict, the best weights so far, and the last state."""
    folder = keeper.path.parent
    better = psnr is not None and (progress.best is None or psnr > progress.best)
    if better:
        progress.best = psnr
    if keeper.world.is_main:
        checkpoints.save(model.state_dict(), folder / f"epoch_{epoch}.pth")
        if better:
            checkpoints.save(weights_of(model) | about, folder / "best.pth")
        prune(folder, "epoch_*.pth", keep_last)
    keeper.save()


if __name__ == "__main__":
    sys.exit(run_program(main, DataError, ModelError, CheckpointError))
