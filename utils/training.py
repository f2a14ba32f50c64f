"""The bookkeeping of a training: how far it is, one optimizer step over all processes, and the learning rate."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from utils import distributed
from utils.checkpoints import Checkpoint, Fields
from utils.compute import Compute
from utils.console import printable
from utils.distributed import World
from utils.errors import UserError

logger = logging.getLogger(__name__)

# Settings on which no number depends, or whose effect another setting records: a resumed run may change them silently.
FREE_SETTINGS = {
    "save_minutes", "keep_last", "gpu", "workers", "resume", "init", "overwrite", "output_path", "outputs_dir",
    "cache_dir", "cache_gb", "cache", "resynthesizer_file", "deterministic", "train_file", "eval_file", "real_roots",
    "fake_roots", "tree", "csv", "val_real_roots", "val_fake_roots", "val_csv",
}  # fmt: skip
ORDER_SETTINGS = ("batch_size", "images", "seed", "crops")  # the order of the images depends on these settings
VALIDATION_SETTING = "validation_images"  # digest of the validation images
WARM_UP = 0.03  # fraction of a training with the cosine schedule


class NotFinite(UserError):
    """A loss or a gradient is not finite. The networks still hold the weights of the step before."""


@dataclass
class Progress:
    """How far a training is. It is saved in every state, so that a run resumes at the exact step."""

    epoch: int = 0  # the epoch being trained, counted from 0
    step: int = 0  # batches of this epoch that are done
    total_steps: int = 0  # optimizer steps since the run began
    sums: dict[str, float] = field(default_factory=dict)  # this epoch's values, each weighted by its number of images
    best: float | None = None  # the best validation score so far
    left_out: int = 0  # images of this epoch that could not be used

    def add(self, values: Mapping[str, float], count: float) -> None:
        """Count one more step, whose `values` are means over `count` images."""
        self.step += 1
        self.total_steps += 1
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value * count
        self.sums["count"] = self.sums.get("count", 0.0) + count

    def skip_step(self, left_out: int) -> None:
        """Count a batch without an optimizer step, because none of its images could be used."""
        self.step += 1
        self.left_out += left_out

    def means(self) -> dict[str, float]:
        """Return this epoch's values so far, averaged over its images, and the number of images left out, if any."""
        count = self.sums.get("count", 0.0)
        means = {}
        if count:
            means = {name: value / count for name, value in self.sums.items() if name != "count"}
        if self.left_out:
            means["left_out"] = self.left_out
        return means

    def next_epoch(self) -> None:
        """Begin the next epoch."""
        self.epoch += 1
        self.step = 0
        self.sums = {}
        self.left_out = 0

    def load_state(self, fields: Fields) -> None:
        """Continue from the progress in a state.

        Raises:
            UserError: if a value has another type or is out of range.
        """
        self.epoch = fields.integer("epoch")
        self.step = fields.integer("step")
        self.total_steps = fields.integer("total_steps")
        sums = fields.fields("sums")
        self.sums = {name: sums.number(name) for name in sums.values}
        self.best = fields.number("best", default=None)
        self.left_out = fields.integer("left_out", default=0)


def cosine(epochs_total: int, epochs: float) -> float:
    """Compute the factor on the learning rate after `epochs` of `epochs_total` epochs: a warm-up, then a cosine to 0."""
    done = epochs / epochs_total
    if done < WARM_UP:
        return done / WARM_UP
    return 0.5 + 0.5 * math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP))


def constant_rate(epochs: float) -> float:
    """Return 1: the factor of a learning rate that stays the same."""
    return 1.0


class Stepper:
    """The optimizer of a training. It steps over all processes at once and checks that the numbers are finite.

    Args:
        optimizer: with the base learning rate in each parameter group.
        compute: the device and number format of the networks.
        world: the processes of this run.
        rate_factor: gives the factor on the learning rates after a number of epochs, which may be fractional.
        steps_per_epoch: number of steps in an epoch.
        clip_norm: gradients whose norm is larger are scaled down to this norm; None or 0: no clipping.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        compute: Compute,
        world: World,
        rate_factor: Callable[[float], float] = constant_rate,
        steps_per_epoch: int = 1,
        clip_norm: float | None = None,
    ):
        self.optimizer, self.compute, self.world = optimizer, compute, world
        self.rate_factor, self.steps_per_epoch, self.clip_norm = rate_factor, steps_per_epoch, clip_norm
        self.progress = Progress()
        # What the options ask for. A resumed run uses these values, whatever its state says.
        self.configured = []
        for group in optimizer.param_groups:
            self.configured.append({name: value for name, value in group.items() if name != "params"})
        self.scaler = torch.amp.GradScaler(compute.device.type, enabled=compute.precision == "fp16")

    def set_rates(self, factor: float) -> None:
        """Set the learning rate of each parameter group to its base rate times `factor`."""
        for group, configured in zip(self.optimizer.param_groups, self.configured, strict=True):
            group.update(configured)
            group["lr"] = configured["lr"] * factor

    def step(self, loss: Tensor, values: Mapping[str, Tensor], batch) -> None:
        """Compute gradients and take one optimizer step.

        Args:
            loss: scalar. This process's part of the loss, so that the sum over the processes is the batch's mean.
            values: scalars to record, parts of means like the loss.
            batch: the batch (data.datasets.Batch), for its weights, errors and file names.

        Raises:
            NotFinite: if the loss or a gradient is not finite. No weight is changed then.
        """
        self.scaler.scale(loss).backward()
        gradients = self._sum_gradients()
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.scaler.is_enabled():
            norm = norm.nan_to_num()  # fp16: the scaler itself skips steps that overflow, and lowers its scale
        means, count, left_out, norm = self._reduce({"loss": loss, **values}, batch, norm)
        self._require_finite(means["loss"], norm, batch)
        if self.clip_norm and norm > self.clip_norm:
            torch._foreach_mul_(gradients, self.clip_norm / norm)
        self.set_rates(self.rate_factor(self.progress.epoch + self.progress.step / self.steps_per_epoch))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.progress.left_out += int(left_out)
        self.progress.add(means, count)

    def _sum_gradients(self) -> list[Tensor]:
        """Sum the gradients over the processes, and undo the scaling of the loss. Returns the gradients."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        distributed.all_reduce_gradients(parameters, self.world)
        self.scaler.unscale_(self.optimizer)
        return [p.grad for p in parameters if p.grad is not None]

    def _reduce(self, parts: Mapping[str, Tensor], batch, norm: Tensor) -> tuple[dict[str, float], float, float, float]:
        """Sum over the processes, with a single wait for the GPU.

        Returns:
            The means of `parts` over the images in use, the number of these images, the number of images left out,
            and the norm of the gradients.
        """
        counts = [batch.weights.sum(), (batch.weights > 0).sum(), torch.tensor(len(batch.errors))]
        scalars = [value.detach().float().to(self.compute.device) for value in (*parts.values(), *counts)]
        sums = distributed.all_reduce_sum(torch.stack(scalars), self.world)
        *sums, weight, count, left_out, norm = torch.cat([sums, norm.to(sums).view(1)]).tolist()  # waits for the GPU
        means = {}
        for name, value in zip(parts, sums, strict=True):
            means[name] = value / (weight or 1)  # the weights add up to 1 unless images were left out
        return means, count, left_out, norm

    def _require_finite(self, loss: float, norm: float, batch) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        files = ", ".join(sorted({printable(item.path) for item in batch.items}))
        raise NotFinite(
            f"the loss or its gradient is not finite at epoch {self.progress.epoch}, step {self.progress.step} (loss"
            f" {loss:.4g}, gradient norm {norm:.4g}); images {files}; use a lower --lr or --precision fp32"
        )

    def state_dict(self) -> dict:
        """Return the state of optimizer and scaler, and the progress."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": vars(self.progress),
        }

    def load_state(self, resumed: Checkpoint | None, settings: Mapping) -> None:
        """Continue from the state of a run, if there is one, and print a line for each setting that has changed.

        Learning rates, weight decay and momentum come from the present options. If the validation images have
        changed, the best score so far is forgotten.

        Args:
            resumed: the state; None for a new run.
            settings: the present settings.

        Raises:
            UserError: if the state does not fit the optimizer or holds impossible values.
        """
        if resumed is None:
            return
        content = Fields(resumed.content, resumed.name)
        earlier = content.fields("settings")
        optimizer, present = earlier.text("optimizer", default="sgd"), settings.get("optimizer", "sgd")
        if optimizer != present:
            raise UserError(
                f"{printable(resumed.name)} was trained with --optimizer {optimizer}, not {present}: give --optimizer"
                f" {optimizer}, or start a new run from its weights with --init"
            )
        self._load_optimizer(resumed)
        self.set_rates(1.0)
        self.progress.load_state(content.fields("progress"))
        report_changes(earlier.values, settings, self.progress)

    def _load_optimizer(self, resumed: Checkpoint) -> None:
        try:
            self.optimizer.load_state_dict(resumed.content["optimizer"])
            for parameter, buffers in self.optimizer.state.items():
                _require_shapes(parameter, buffers)
            if resumed.content["scaler"]:  # empty if the run began in another precision
                self.scaler.load_state_dict(resumed.content["scaler"])
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            name = printable(resumed.name)
            raise UserError(f"{name}: its optimizer state does not fit the networks ({error}); use --init") from None


def _require_shapes(parameter: Tensor, buffers: Mapping[str, object]) -> None:
    """Raise ValueError if an optimizer's buffer has another shape than its parameter."""
    for name, buffer in buffers.items():
        if isinstance(buffer, Tensor) and buffer.dim() > 0 and buffer.shape != parameter.shape:
            raise ValueError(f"expected {name} of shape {tuple(parameter.shape)}, got {tuple(buffer.shape)}")


def report_changes(earlier: Mapping, present: Mapping, progress: Progress) -> None:
    """Print one line for each setting that has changed since the run began, with its effect on the run.

    If the validation images have changed, the best score in `progress` is removed.
    """
    for name in sorted(earlier.keys() & present.keys() - FREE_SETTINGS):
        if earlier[name] == present[name]:
            continue
        effect = ""
        if name == VALIDATION_SETTING:
            progress.best = None
            effect = ": scores on different images cannot be compared, so the best score starts again"
        elif progress.step and name in ORDER_SETTINGS:
            effect = (
                f": from step {progress.step} of this epoch, images come in another order, some twice or not at all"
            )
        logger.warning(
            "warning: %s was %s when the run began and is %s now%s", name, earlier[name], present[name], effect
        )
