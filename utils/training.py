"""What both trainers share: how far a training is, when its state is saved, and one step of its optimizer."""

import logging
import math
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from utils import checkpoint
from utils.distributed import World, max_over_processes, sum_gradients, sum_over_processes
from utils.run import Stopped, StopSignal, UsageError

logger = logging.getLogger(__name__)

SAFETY_OPTIONS = {"save_minutes", "keep_last", "skip_nonfinite"}  # may differ in a run's continuation: no number does


@dataclass
class Progress:
    """How far a training has come; saved with every checkpoint, so that resuming is exact to the step."""

    epoch: int = 0  # the epoch being trained, 0-based
    step: int = 0  # optimiser steps done in it
    total_steps: int = 0
    sums: dict[str, float] = field(default_factory=dict)  # of this epoch's values, weighted by their counts
    best: float | None = None  # the best validation score so far
    skipped: int = 0  # steps left out because their numbers were not finite

    def add(self, values: dict[str, float], count: int) -> None:
        """One more step, whose `values` are means over `count` images."""
        self.step += 1
        self.total_steps += 1
        for name, value in [*values.items(), ("count", 1.0)]:
            self.sums[name] = self.sums.get(name, 0.0) + value * count

    def means(self) -> dict[str, float]:
        """The epoch's values so far, averaged over its images."""
        count = self.sums.get("count", 0.0)
        return {k: v / count for k, v in self.sums.items() if k != "count"} if count else {}

    def next_epoch(self) -> None:
        self.epoch, self.step, self.sums = self.epoch + 1, 0, {}


class StateKeeper:
    """Saves the whole state of a training when it is time: at its intervals, every few minutes, and when stopped.

    Args:
        path: the file of the last state.
        collect: gives the state; called in every process, written by the main one.
        stop: the signals received.
        minutes: the longest time between two savings.
    """

    def __init__(self, path: Path, collect: Callable[[], dict], stop: StopSignal, minutes: float, world: World):
        self.path, self.collect, self.stop, self.world = path, collect, stop, world
        self.interval = minutes * 60
        if world.is_main:
            checkpoint.remove_torn(path.parent)
        self.saved_at = time.monotonic()

    def save(self, state: dict | None = None) -> None:
        """Save the state now, or the one `collect` has just given."""
        state = state or self.collect()
        if self.world.is_main:
            checkpoint.save(state, self.path)
        self.saved_at = time.monotonic()

    def after_step(self, device: torch.device) -> None:
        """Save if it is time; raise `Stopped` after saving if a signal has come."""
        stopping, due = float(self.stop.received or 0), float(time.monotonic() - self.saved_at >= self.interval)
        if self.world.size > 1:  # what one process has to do all do, so that none waits for another for ever
            wanted = torch.tensor([stopping, due], device=device)
            stopping, due = max_over_processes(wanted, self.world).tolist()
        if stopping or due:
            self.save()
        if stopping:
            raise Stopped(int(stopping))


def prune(folder: Path, pattern: str, keep: int | None) -> None:
    """Delete all but the `keep` newest numbered checkpoints (the numbers sort as text)."""
    if keep is not None:
        for path in sorted(folder.glob(pattern), key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)])[:-keep]:
            path.unlink()


class Stepper:
    """One optimizer step after the other, over all processes, with the numbers checked.

    Args:
        skip_nonfinite: how many steps with a loss or gradient that is not finite may be left out.
        last_state: the file named when there are more.
        buffers: what the forward pass of a step changes besides (batch-norm statistics): put back as they were where
            the step is left out.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        precision: str,
        world: World,
        skip_nonfinite: int,
        last_state: Path,
        buffers: Iterable[Tensor] = (),
    ):
        self.optimizer, self.device, self.world = optimizer, device, world
        self.progress = Progress()
        self.base_rates = [group["lr"] for group in optimizer.param_groups]
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.skip_nonfinite, self.last_state = skip_nonfinite, last_state
        self.buffers = list(buffers) if skip_nonfinite else []  # a run that skips none ends, and saves nothing
        self.good_buffers = [buffer.clone() for buffer in self.buffers]

    def set_rates(self, factor: float) -> None:
        """Every group's learning rate: the one it was built with, times `factor`."""
        for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * factor

    def backward(self, loss: Tensor, *inner: tuple[Tensor, Tensor]) -> None:
        """Add the gradients of a share of the batch's loss, and of tensors whose gradients are known (and scaled)."""
        total = self.scaler.scale(loss)
        for tensor, gradient in inner:
            total = total + (tensor * gradient).sum()
        total.backward()

    def step(self, values: dict[str, Tensor], count: int, files: list[str]) -> None:
        """Take the step. `values` (the first of which is the loss) are this process's shares of the batch's means,
        `count` the images in the whole batch, `files` those of this process, named if the numbers are not finite.

        Raises:
            UsageError: if they are not and no more steps may be left out.
        """
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        sum_gradients(parameters, self.world)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.scaler.is_enabled():
            norm = norm.nan_to_num()  # the scaler leaves out the steps that overflow in fp16, and scales less
        shares = torch.stack([value.detach().float().to(self.device) for value in values.values()])
        means = sum_over_processes(shares, self.world)
        *means, norm = torch.cat([means, norm.to(means).view(1)]).tolist()  # at once: a GPU is waited for
        means = dict(zip(values, means, strict=True))
        if self._finite(next(iter(means.values())), norm, files):
            self.scaler.step(self.optimizer)
            self.progress.add(means, count)
            source, target = self.buffers, self.good_buffers
        else:
            self.progress.add({}, 0)
            source, target = self.good_buffers, self.buffers
        for new, old in zip(source, target, strict=True):
            old.copy_(new)
        self.scaler.update()  # after a step left out too: it ends what `unscale_` began
        self.optimizer.zero_grad()

    def _finite(self, loss: float, norm: float, files: list[str]) -> bool:
        if math.isfinite(loss) and math.isfinite(norm):
            return True
        where = f"epoch {self.progress.epoch}, step {self.progress.step} (loss {loss:.4g}, gradient norm {norm:.4g})"
        if self.progress.skipped >= self.skip_nonfinite:
            saved = f"the last good state is {self.last_state}" if self.last_state.exists() else "no state is saved yet"
            raise UsageError(
                f"numbers are no longer finite at {where}; images {', '.join(files)}; {saved}. Lower --lr, use"
                " --precision fp32, or leave such steps out with --skip-nonfinite N"
            )
        self.progress.skipped += 1
        logger.warning("warning: step left out at %s; images %s", where, ", ".join(files))
        return False

    def state_dict(self) -> dict:
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": vars(self.progress),
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from a state; the rates are those asked for now."""
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty if the run began in another precision
            self.scaler.load_state_dict(state["scaler"])
        vars(self.progress).update(state["progress"])


def warn_about_changes(before: dict, now: dict, ignored: Iterable[str] = ()) -> None:
    """One line for each setting that a resumed run does not share with the run it continues."""
    for name in sorted(before.keys() & now.keys() - set(ignored)):
        if before[name] != now[name]:
            logger.warning("warning: %s was %s when the run began and is %s now", name, before[name], now[name])
