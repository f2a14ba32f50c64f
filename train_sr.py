"""Step 1: train the re-synthesizer, a super-resolution network (by default RDN), on REAL images only.

    python train_sr.py --train-file data/celeba_example_train.txt --eval-file data/celeba_example_val.txt

The program writes these files into OUTPUTS_DIR/xSCALE:

    epoch_N.pth                               the weights after epoch N, as a state dict
    best.pth                                  the checkpoint with the highest PSNR on --eval-file
    last.pth                                  the newest checkpoint, from which --resume continues
    config.json, stats.jsonl, tensorboard/    the settings, the loss and metrics of each epoch, and TensorBoard logs
"""

import contextlib
import logging
import math
import sys
from argparse import Namespace
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.datasets import Batch, EpochBatchSampler, ImageDataset, Key, PatchDataset, RowKey, make_loader
from data.degradations import degrade_patch
from data.images import SizePolicy, select_usable_images
from data.leaks import run_and_log_quick_leak_audit
from data.lists import Item, describe_and_hash_image_files, hash_image_files, list_image_paths
from models.build import create_resynthesizer
from models.features import VGG19, load_vgg
from models.losses import compute_super_resolution_loss
from models.resynthesis import downsample
from utils.checkpoints import Checkpoint, compute_fingerprint
from utils.compute import Compute, choose_device_and_precision
from utils.distributed import World, all_reduce_sum, connect_processes
from utils.errors import UserError, run_program
from utils.optimizers import compute_cosine_learning_rate_factor, compute_step_learning_rate_factor
from utils.options import create_train_sr_parser
from utils.random_streams import DEGRADE_PATCH, seeded_generator
from utils.run import Run, read_starting_checkpoint
from utils.run_folder import open_run_folder
from utils.training import Stepper, train_one_epoch

logger = logging.getLogger("train_sr")

LAST = "last.pth"
SHOWN_IMAGES = 4  # number of training images whose patches are shown in TensorBoard
SMALLEST_MSE = 1 / (12 * 255**2)  # mean squared error that rounding pixels to 8 bits causes


def main(args: Namespace) -> None:
    compute = choose_device_and_precision(args.gpu, args.precision, args.deterministic, args.seed)
    with connect_processes(compute.device.type) as world, contextlib.ExitStack() as stack:
        # 1. Build the network (no file is written before step 4)
        states = sorted(Path(args.outputs_dir).glob(f"x{args.scale or '*'}/{LAST}"))
        origin, resumed = read_starting_checkpoint(args.resume, args.init, states)
        model, config = create_resynthesizer(origin, vars(args))
        if origin is None:
            set_initial_weights(model, args.start)
        elif resumed is None and args.start != "random":
            logger.info("--start %s is not used, because %s gives the initial weights", args.start, origin.name)
        model.to(compute.device, memory_format=torch.channels_last)

        # 2. List and check the images
        eval_images = create_evaluation_dataset(args.eval_file, model.scale, args.skip_bad)
        eval_sampler = EpochBatchSampler(len(eval_images), world.size, world=world)  # one image per process and step
        eval_loader = make_loader(eval_images, eval_sampler, args.workers, compute)
        if args.evaluate:
            return evaluate_and_log_psnr_and_ssim(model, origin, eval_loader, args.skip_bad, compute, world)
        items = list_unlabelled_images(args.train_file, "--train-file")
        items, _ = select_usable_images(items, SizePolicy(model.scale, args.patch_size * model.scale), args.skip_bad)
        if world.is_main and eval_images.items:
            run_and_log_quick_leak_audit(items, eval_images.items)

        # 3. Create the optimizer
        parameters = list(model.parameters())
        if not parameters:
            raise UserError(
                f"the re-synthesizer {config['name']} has no parameters to train: choose another one with --sr-arch"
            )
        sampler = EpochBatchSampler(len(items), args.batch_size, args.seed, world)
        if args.schedule == "cosine":
            rate_factor = partial(compute_cosine_learning_rate_factor, args.num_epochs)
        else:
            rate_factor = partial(compute_step_learning_rate_factor, args.lr_decay, args.lr_decay_epoch)
        optimizer = torch.optim.Adam(parameters, lr=args.lr)
        stepper = Stepper(optimizer, compute, world, rate_factor, sampler.steps, args.clip_norm)
        progress = stepper.progress

        # 4. Open the output folder, and load the training state of a resumed run
        output = Path(args.outputs_dir) / f"x{model.scale}"
        vgg, vgg_record = load_perceptual_vgg(args.vgg_lambda, args.vgg_weights, resumed, compute)
        settings = vars(args) | {"precision": compute.precision}
        settings["images"] = describe_and_hash_image_files(items, hash_image_files(items))
        settings["validation_images"] = describe_and_hash_image_files(
            eval_images.items, hash_image_files(eval_images.items)
        )
        run_files = stack.enter_context(open_run_folder(output / LAST, world, resumed, args.overwrite))
        stepper.load_state(resumed, settings)
        about = {"config": {"resynthesizer": config}, "vgg": vgg_record, "settings": settings}
        run = Run(run_files, about, partial(collect_weights_and_fingerprint, model), stepper, args.num_epochs)
        stack.enter_context(run)

        # 5. Train on patches
        patches = PatchDataset(items, args.patch_size, model.scale, args.patches_per_image, args.seed)
        loader = make_loader(patches, sampler, args.workers, compute)
        degradations = PatchDegradations(args.seed, args.augment, args.completion, args.colorization)
        loss_of = partial(compute_patch_loss, model, vgg, args.vgg_lambda, degradations, compute)
        text = "%d training images; the training starts at epoch %d, step %d"
        logger.info(text, len(items), progress.epoch, progress.step)
        for epoch in range(progress.epoch, args.num_epochs):
            sampler.set_epoch(epoch, progress.step)
            batches = run.iterate_batches(loader, f"epoch {epoch}", training=True)
            train_one_epoch(model, batches, loss_of, stepper)
            values = progress.compute_mean_values_of_epoch()
            if eval_images.items:
                values |= compute_mean_psnr_and_ssim(
                    model, run.iterate_batches(eval_loader, "evaluation"), compute, world
                )
            is_last = epoch + 1 == args.num_epochs
            due = is_last or (epoch + 1) % args.num_save == 0
            if due:
                write_patch_pictures(model, patches, degradations, compute, run, epoch + 1)
            run.end_epoch(values, "psnr", collect_contents_of_numbered_checkpoints if due else None)
            if is_last:
                warn_if_psnr_is_below_bicubic(values)


# --- network and images -------------------------------------------------------------------------------------


def set_initial_weights(model: nn.Module, start: str) -> None:
    """Set the initial weights of a new network.

    Args:
        start: "random" keeps PyTorch's random weights, and "interpolation" calls `model.initialize_as_interpolation`.
    """
    if start == "random":
        return
    if not hasattr(model, "initialize_as_interpolation"):
        raise UserError(f"--start {start} is not possible for {type(model).__name__}: use --start random")
    model.initialize_as_interpolation()


def list_unlabelled_images(source: str | None, flag: str) -> list[Item]:
    """List the images of a list file or a folder as `Item`s without labels.

    Args:
        flag: the command-line option that sets `source`, for error messages.
    """
    if source is None:
        raise UserError(f"{flag} is missing: give a text file with one image path per line, or a folder of images")
    return [Item(path, None, "") for path in list_image_paths(source)]


def create_evaluation_dataset(source: str | None, scale: int, skip_bad: bool) -> ImageDataset:
    """Create a dataset of the images in --eval-file that can be read and have at least `scale` pixels per side.

    If --eval-file is not given, the dataset is empty.
    """
    items = list_unlabelled_images(source, "--eval-file") if source else []
    items, _ = select_usable_images(items, SizePolicy(scale), skip_bad)
    return ImageDataset(items, SizePolicy(scale))


def load_perceptual_vgg(
    weight: float, source: str, resumed: Checkpoint | None, compute: Compute
) -> tuple[VGG19 | None, dict | None]:
    """Load VGG-19 for the perceptual loss. A resumed run uses the VGG-19 weights with which it began.

    Returns:
        VGG-19 and the dict that describes its weights, or (None, None) if the weight of the perceptual loss is 0.
    """
    if weight == 0:
        return None, None
    trained_with = resumed.content.get("vgg") if resumed else None
    vgg, record = load_vgg(source, trained_with, resumed.name if resumed else "")
    return vgg.to(compute.device, memory_format=torch.channels_last), record


# --- training -----------------------------------------------------------------------------------------------


class PatchDegradations(NamedTuple):
    """The settings of the random degradations of low-resolution training patches."""

    seed: int
    augment: bool  # whether patches get noise and JPEG compression
    completion: bool  # whether random pixels are turned black
    colorization: bool  # whether random pixels are turned grey

    def degrade_patches(self, x_lr: Tensor, keys: list[RowKey]) -> Tensor:
        """Degrade each patch of x_lr (B, 3, p, p) at random, depending only on `keys` and `self.seed`.

        Args:
            keys: for each patch, the epoch, the index of the image, and the index of the patch in the image.
        """
        if not (self.augment or self.completion or self.colorization):
            return x_lr
        patches = []
        for patch, key in zip(x_lr, keys, strict=True):
            rng = seeded_generator(self.seed, *key, DEGRADE_PATCH)
            patches.append(degrade_patch(patch, rng, self.augment, self.completion, self.colorization))
        return torch.stack(patches)


def compute_patch_loss(
    model: nn.Module,
    vgg: VGG19 | None,
    vgg_weight: float,
    degradations: PatchDegradations,
    compute: Compute,
    batch: Batch,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss of a batch of high-resolution patches.

    Returns:
        the loss and the dict {"l1": L1 term of the loss}, two scalars to be summed over all processes.
    """
    x = compute.images_to_float(batch.x)  # (B, 3, P, P)
    x_lr = degradations.degrade_patches(downsample(x, model.scale), batch.keys)  # (B, 3, p, p)
    with compute.autocast():
        x_hat = model(x_lr)  # (B, 3, P, P)
        loss, l1 = compute_super_resolution_loss(x_hat, x, vgg, vgg_weight)
    part = batch.weights.sum().to(x.device)  # this process's share of the batch, from 0 to 1
    return loss * part, {"l1": l1 * part}


@torch.no_grad()
def write_patch_pictures(
    model: nn.Module,
    patches: PatchDataset,
    degradations: PatchDegradations,
    compute: Compute,
    run: Run,
    epochs_done: int,
) -> None:
    """Write pictures of the first training patches to TensorBoard.

    The patches and their degradations are the same in every epoch, so that pictures of different epochs can be
    compared. After drawing, the network stays in evaluation mode.
    """
    if run.writer is None:
        return
    model.eval()
    keys = [Key(0, index) for index in range(min(SHOWN_IMAGES, len(patches)))]
    (batch,) = make_loader(patches, [keys], 0, compute)
    if not len(batch.x):
        return  # none of the images to show can be read, and the training loop has already logged the reason
    x = compute.images_to_float(batch.x)  # (B, 3, P, P)
    x_lr = degradations.degrade_patches(downsample(x, model.scale), batch.keys)  # (B, 3, p, p)
    with compute.autocast():
        x_hat = model(x_lr)  # (B, 3, P, P)
    enlarged = F.interpolate(x_lr, scale_factor=model.scale)  # (B, 3, P, P)
    pictures = torch.cat([enlarged, x_hat, x], dim=3)  # (B, 3, P, 3 * P)
    run.write_images_to_tensorboard("input, re-synthesis, target", pictures, epochs_done)


# --- evaluation ---------------------------------------------------------------------------------------------


@torch.inference_mode()
def compute_mean_psnr_and_ssim(
    model: nn.Module, batches: Iterable[Batch], compute: Compute, world: World
) -> dict[str, float]:
    """Compute the mean PSNR (dB) and SSIM of enlarged RGB images, for the network and for bicubic interpolation."""
    model.eval()
    sums = torch.zeros(5, device=compute.device, dtype=torch.float64)
    for batch in batches:
        if not batch.weights.any():
            continue  # an image with weight 0 repeats an image that another process evaluates
        x = compute.images_to_float(batch.x)  # (1, 3, H, W)
        x_lr = downsample(x, model.scale)  # (1, 3, h, w)
        with compute.autocast():
            x_hat = model(x_lr)  # (1, 3, H, W)
        bicubic = F.interpolate(x_lr, scale_factor=model.scale, mode="bicubic")  # (1, 3, H, W)
        values = [*compute_psnr_and_ssim_of_one_image(x_hat, x), *compute_psnr_and_ssim_of_one_image(bicubic, x), 1.0]
        sums += torch.tensor(values, dtype=sums.dtype, device=sums.device)
    *totals, count = all_reduce_sum(sums, world).tolist()
    names = ("psnr", "ssim", "psnr_bicubic", "ssim_bicubic")
    return {name: total / count if count else float("nan") for name, total in zip(names, totals, strict=True)}


def compute_psnr_and_ssim_of_one_image(y: Tensor, x: Tensor) -> tuple[float, float]:
    """Compute the PSNR (dB) and the SSIM of an enlarged image y, compared with the original image x.

    The PSNR is at most 58.9 dB, because SMALLEST_MSE replaces smaller mean squared errors.

    Args:
        y: the enlarged image, (1, 3, H, W), which is clipped to [0, 1].
        x: the original image, (1, 3, H, W) in [0, 1].
    """
    # imported here, because TorchMetrics takes two seconds to import
    from torchmetrics.functional.image import structural_similarity_index_measure

    y = y.float().clamp(0, 1).contiguous()
    mse = F.mse_loss(y, x).clamp(min=SMALLEST_MSE)
    psnr = -10 * torch.log10(mse)
    # If the image is smaller than the Gaussian window of 11 x 11 pixels, SSIM uses a smaller, uniform window.
    smallest_side = min(x.shape[-2:])
    window = min(11, (smallest_side - 1) // 2 * 2 + 1)
    ssim = structural_similarity_index_measure(y, x, data_range=1.0, gaussian_kernel=window == 11, kernel_size=window)
    return psnr.item(), ssim.item()


def warn_if_psnr_is_below_bicubic(values: dict[str, float]) -> None:
    """Warn if `values` contains a PSNR of the network that is lower than the PSNR of bicubic interpolation."""
    if values.get("psnr", 0) < values.get("psnr_bicubic", 0):
        logger.warning("warning: the network has a lower PSNR than bicubic interpolation: train the network longer")


def evaluate_and_log_psnr_and_ssim(
    model: nn.Module,
    origin: Checkpoint | None,
    batches: Iterable[Batch],
    skip_bad: bool,
    compute: Compute,
    world: World,
) -> None:
    """Log the PSNR and SSIM of a network on the images in `batches`, for the option --evaluate.

    Args:
        origin: checkpoint from which the weights of the network were loaded, or None if no weights were loaded.

    Raises:
        UserError: if no weights were loaded, or if there are no images.
        UserError: if an image cannot be read and `skip_bad` is False.
    """
    if origin is None:
        raise UserError("--evaluate needs weights: give a file of weights with --weights-file")
    values = compute_mean_psnr_and_ssim(model, skip_or_refuse_unreadable_images(batches, skip_bad), compute, world)
    if math.isnan(values["psnr"]):
        raise UserError("--evaluate needs images: give a list or folder of images with --eval-file")
    text = "x%d super-resolution of RGB images that were reduced by averaging blocks of pixels, %s"
    logger.info(text, model.scale, compute)
    logger.info("%s: PSNR %.2f dB, SSIM %.4f", origin.name, values["psnr"], values["ssim"])
    logger.info("bicubic interpolation: PSNR %.2f dB, SSIM %.4f", values["psnr_bicubic"], values["ssim_bicubic"])
    warn_if_psnr_is_below_bicubic(values)


def skip_or_refuse_unreadable_images(batches: Iterable[Batch], skip_bad: bool) -> Iterable[Batch]:
    """Yield the batches, except batches in which no image could be read.

    Raises:
        UserError: if an image cannot be read and `skip_bad` is False.
    """
    for batch in batches:
        for error in batch.errors.values():
            if not skip_bad:
                raise UserError(f"{error}; repair or remove the image, or pass --skip-bad")
            logger.warning("image left out: %s", error)
        if len(batch.x):
            yield batch


# --- what is saved ------------------------------------------------------------------------------------------


def collect_weights_and_fingerprint(model: nn.Module) -> dict:
    """Return the weights of the network and their fingerprint as a dict, which is saved in last.pth and best.pth."""
    return {"state_dict": model.state_dict(), "fingerprint": compute_fingerprint(model)}


def collect_contents_of_numbered_checkpoints(state: dict) -> dict[str, dict]:
    """Return the dict {"epoch_N.pth": the network's state dict}, where N is the finished epoch, counted from 0.

    Release: the file name and the file format are the same as in the code of the paper's authors.
    """
    epoch = state["progress"]["epoch"] - 1
    return {f"epoch_{epoch}.pth": state["state_dict"]}


if __name__ == "__main__":
    sys.exit(run_program(lambda: main(create_train_sr_parser().parse_args())))
