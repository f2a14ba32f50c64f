"""The optimizer steps of a training run in one or several processes, and the counts and sums that a run saves."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from utils import distributed
from utils.checkpoints import Checkpoint, Fields
from utils.compute import Compute
from utils.console import make_printable
from utils.distributed import World, broadcast_buffers
from utils.errors import UserError

logger = logging.getLogger(__name__)

# FREE_SETTINGS lists the settings that cause no warning if they change in a resumed run, such as paths of moved images.
# A changed option on networks causes no warning, because a resumed run takes its networks from the saved state.
FREE_SETTINGS = {
    "save_minutes", "keep_last", "gpu", "workers", "resume", "init", "overwrite", "output_path", "outputs_dir",
    "cache_dir", "cache_gb", "cache", "resynthesizer_file", "deterministic", "train_file", "eval_file", "real_roots",
    "fake_roots", "tree", "csv", "val_real_roots", "val_fake_roots", "val_csv", "sr_arch", "sr_args", "scale",
    "num_features", "growth_rate", "num_blocks", "num_layers", "features", "feature_args", "stage", "residual", "arch",
    "arch_args", "in_channels", "dilated",
}  # fmt: skip
ORDER_SETTINGS = ("batch_size", "images", "seed", "crops")  # settings that determine which images a training step uses
VALIDATION_SETTING = "validation_images"  # name of the setting that holds the digest of the validation images


COUNT = "count"  # key in `Progress.sums` under which the number of images is stored


class NotFinite(UserError):
    """The error that is raised before an optimizer step if the loss or a gradient is not finite."""


@dataclass
class Progress:
    """The counts, the sums and the best score of a training run, which every saved state contains."""

    epoch: int = 0  # number of the current epoch, from 0
    step: int = 0  # number of finished batches of the current epoch
    total_steps: int = 0  # number of optimizer steps since the run began
    sums: dict[str, float] = field(default_factory=dict)  # sum of each recorded scalar over the images of the epoch
    best: float | None = None  # best validation score of all epochs
    left_out: int = 0  # number of images in the current epoch that could not be used

    def record_optimizer_step(self, values: Mapping[str, float], count: float) -> None:
        """Count an optimizer step, and add `count` times each value in `values` to `sums`.

        Args:
            values: means over the `count` images of the step.
        """
        if COUNT in values:
            raise ValueError(f"a recorded value cannot be called {COUNT}")
        self.step += 1
        self.total_steps += 1
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value * count
        self.sums[COUNT] = self.sums.get(COUNT, 0.0) + count

    def count_skipped_batch(self, left_out: int) -> None:
        """Count a batch that was skipped because too few images of the batch could be used.

        Args:
            left_out: number of all images of the skipped batch, including the images that could be used.
        """
        self.step += 1
        self.left_out += left_out

    def compute_mean_values_of_epoch(self) -> dict[str, float]:
        """Return the mean of each recorded scalar over the images of the current epoch.

        If some images of the epoch could not be used, their number is returned under the key "left_out".
        """
        count = self.sums.get(COUNT, 0.0)
        means = {}
        if count:
            means = {name: value / count for name, value in self.sums.items() if name != COUNT}
        if self.left_out:
            means["left_out"] = self.left_out
        return means

    def start_next_epoch(self) -> None:
        """Increase the number of the epoch by 1, and set the counts and sums of the epoch to 0."""
        self.epoch += 1
        self.step = 0
        self.sums = {}
        self.left_out = 0

    def load_state(self, fields: Fields) -> None:
        """Set all attributes to their values in `fields`, the entry "progress" of a saved state.

        Raises:
            UserError: if a value has a wrong type or is out of range.
        """
        self.epoch = fields.get_integer_field("epoch")
        self.step = fields.get_integer_field("step")
        self.total_steps = fields.get_integer_field("total_steps")
        sums = fields.get_nested_fields("sums")
        self.sums = {name: sums.get_number_field(name) for name in sums.values}
        self.best = fields.get_number_field("best", default=None)
        self.left_out = fields.get_integer_field("left_out", default=0)


def compute_constant_learning_rate_factor(epochs: float) -> float:
    """Return 1 as the factor on the base learning rate, which keeps the learning rate constant."""
    return 1.0


# Type of a function that takes a batch, and returns the loss and a dict of other scalars to log, such as the accuracy.
# The loss and the scalars of a batch are the sums of the function's results in all processes that share the batch.
LossOf = Callable[[object], tuple[Tensor, Mapping[str, Tensor]]]


class Stepper:
    """An optimizer with learning-rate schedule, gradient clipping and `Progress`, for one or several processes.

    Args:
        optimizer: PyTorch's optimizer, whose parameter groups have their base learning rates.
        rate_factor: takes the number of finished epochs, such as 2.5, and returns the factor on the base learning
            rates.
        clip_norm: maximum of the total norm of all gradients, or None or 0 for no clipping.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        compute: Compute,
        world: World,
        rate_factor: Callable[[float], float] = compute_constant_learning_rate_factor,
        steps_per_epoch: int = 1,
        clip_norm: float | None = None,
    ):
        self.optimizer, self.compute, self.world = optimizer, compute, world
        self.rate_factor, self.steps_per_epoch, self.clip_norm = rate_factor, steps_per_epoch, clip_norm
        self.progress = Progress()
        # A resumed run uses the learning rate, weight decay and momentum of the options instead of the saved values
        self.configured = []
        for group in optimizer.param_groups:
            self.configured.append({name: value for name, value in group.items() if name != "params"})
        self.scaler = torch.amp.GradScaler(compute.device.type, enabled=compute.precision == "fp16")

    def set_learning_rates(self, factor: float) -> None:
        """Set the learning rate of each parameter group to its base rate times `factor`."""
        for group, configured in zip(self.optimizer.param_groups, self.configured, strict=True):
            group.update(configured)
            group["lr"] = configured["lr"] * factor

    def step(self, loss: Tensor, values: Mapping[str, Tensor], batch) -> None:
        """Compute gradients and take one optimizer step.

        Args:
            loss: a scalar, whose sum over all processes is the loss of the whole batch.
            values: further scalars to record, by name, whose sums over all processes are the values of the whole batch.
            batch: the batch (data.datasets.Batch).

        Raises:
            NotFinite: if the loss is not finite.
            NotFinite: if a gradient is not finite, except in fp16, where GradScaler skips the step.
        """
        self.scaler.scale(loss).backward()
        gradients = self._sum_gradients_over_processes()
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.scaler.is_enabled():
            norm = norm.nan_to_num()  # in fp16, an infinite norm must raise no error, because GradScaler skips the step
        means, count, left_out, norm = self._compute_step_statistics_over_processes(
            {"loss": loss, **values}, batch, norm
        )
        self._require_finite_loss_and_gradients(means["loss"], norm, batch)
        if self.clip_norm and norm > self.clip_norm:
            torch._foreach_mul_(gradients, self.clip_norm / norm)
        self.set_learning_rates(self.rate_factor(self.progress.epoch + self.progress.step / self.steps_per_epoch))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.progress.left_out += int(left_out)
        self.progress.record_optimizer_step(means, count)

    def _sum_gradients_over_processes(self) -> list[Tensor]:
        """Sum the gradients over the processes, divide them by the scale of GradScaler, and return them."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        distributed.all_reduce_gradients(parameters, self.world)
        self.scaler.unscale_(self.optimizer)
        return [p.grad for p in parameters if p.grad is not None]

    def _compute_step_statistics_over_processes(
        self, parts: Mapping[str, Tensor], batch, norm: Tensor
    ) -> tuple[dict[str, float], float, float, float]:
        """Return the means of `parts`, the numbers of images that were used and left out, and `norm` as a float.

        All numbers are copied to the CPU together, so that the CPU waits for the GPU only once per step.
        """
        counts = [batch.weights.sum(), (batch.weights > 0).sum(), torch.tensor(len(batch.errors))]
        scalars = [value.detach().float().to(self.compute.device) for value in (*parts.values(), *counts)]
        sums = distributed.all_reduce_sum(torch.stack(scalars), self.world)
        numbers = torch.cat([sums, norm.to(sums).view(1)]).tolist()
        sums_of_values = numbers[: len(parts)]
        weight, count, left_out, norm_on_cpu = numbers[len(parts) :]
        means = {}
        for name, value in zip(parts, sums_of_values, strict=True):
            # The sum `weight` of the weights in the loss is 1, below 1 if images are left out, or 0 if all are left out
            means[name] = value / (weight or 1)
        return means, count, left_out, norm_on_cpu

    def _require_finite_loss_and_gradients(self, loss: float, norm: float, batch) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        files = ", ".join(sorted({make_printable(item.path) for item in batch.items}))
        raise NotFinite(
            f"the loss or its gradient is not finite at epoch {self.progress.epoch}, step {self.progress.step} (loss"
            f" {loss:.4g}, gradient norm {norm:.4g}); images {files}; use a lower --lr or --precision fp32"
        )

    def state_dict(self) -> dict:
        """Return a dict with the states of the optimizer and of GradScaler, and with the attributes of `Progress`."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": vars(self.progress),
        }

    def load_state(self, resumed: Checkpoint | None, settings: Mapping) -> None:
        """Load the states of optimizer, GradScaler and `Progress` from a saved state, and warn about changed settings.

        Args:
            resumed: the saved state of the run to resume, or None to load nothing.
            settings: the present settings of the program.

        Raises:
            UserError: if the state does not fit the optimizer or holds impossible values.
        """
        if resumed is None:
            return
        content = Fields(resumed.content, resumed.name)
        earlier = content.get_nested_fields("settings")
        # train_sr.py has no setting "optimizer", because it always trains with Adam
        optimizer, present = earlier.get_text_field("optimizer", default=""), settings.get("optimizer", "")
        if optimizer != present:
            raise UserError(
                f"{make_printable(resumed.name)} was trained with --optimizer {optimizer}, not {present}: give"
                f" --optimizer {optimizer}, or start a new run with --init, which loads only the weights"
            )
        self._load_optimizer_state(resumed)
        self.progress.load_state(content.get_nested_fields("progress"))
        # A run that resumes after the last step of an epoch logs the learning rate of this last step
        last_step = max(self.progress.step - 1, 0)
        self.set_learning_rates(self.rate_factor(self.progress.epoch + last_step / self.steps_per_epoch))
        warn_about_changed_settings(earlier.values, settings, self.progress)

    def _load_optimizer_state(self, resumed: Checkpoint) -> None:
        try:
            self.optimizer.load_state_dict(resumed.content["optimizer"])
            for parameter, buffers in self.optimizer.state.items():
                _require_equal_shapes(parameter, buffers)
            if resumed.content["scaler"]:  # the saved scaler is empty if the run was not in fp16
                self.scaler.load_state_dict(resumed.content["scaler"])
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            name = make_printable(resumed.name)
            text = f"the optimizer state in {name} does not fit the networks ({error}): start a new run with --init"
            raise UserError(text) from None


def _require_equal_shapes(parameter: Tensor, buffers: Mapping[str, object]) -> None:
    """Raise ValueError if a buffer of the optimizer is not a scalar and has another shape than its parameter."""
    for name, buffer in buffers.items():
        if isinstance(buffer, Tensor) and buffer.dim() > 0 and buffer.shape != parameter.shape:
            raise ValueError(f"expected {name} of shape {tuple(parameter.shape)}, got {tuple(buffer.shape)}")


def warn_about_changed_settings(earlier: Mapping, present: Mapping, progress: Progress) -> None:
    """Log one warning for each setting outside FREE_SETTINGS that differs between a saved run and its continuation.

    If the validation images have changed, the best score in `progress` is removed.
    """
    for name in sorted(earlier.keys() & (present.keys() - FREE_SETTINGS)):
        if earlier[name] == present[name]:
            continue
        effect = ""
        if name == VALIDATION_SETTING:
            progress.best = None
            effect = ": scores on different images cannot be compared, so the earlier best score is removed"
        elif progress.step and name in ORDER_SETTINGS:
            effect = (
                f": from step {progress.step} of this epoch, images come in another order, some twice or not at all"
            )
        logger.warning(
            "warning: the setting %s was %s when the run began and is %s in the resumed run%s",
            name,
            earlier[name],
            present[name],
            effect,
        )


def train_one_epoch(model: nn.Module, batches: Iterable, loss_of: LossOf, stepper: Stepper) -> None:
    """Train a network for one epoch, with one optimizer step per batch (data.datasets.Batch)."""
    model.train()
    for batch in batches:
        loss, values = loss_of(batch)
        stepper.step(loss, values, batch)
    # All processes validate with the batch-norm statistics of the main process, which the checkpoints contain.
    broadcast_buffers(model, stepper.world)
