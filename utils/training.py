"""What both trainers share: where a run starts, how far it is, one step of its optimizer, what is saved and recorded."""

import contextlib
import json
import logging
import math
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from utils import checkpoints, console, distributed
from utils.checkpoints import Checkpoint, read_checkpoint
from utils.compute import Compute, versions
from utils.console import printable
from utils.distributed import World
from utils.errors import UserError
from utils.files import atomic, exclusive_writer, make_folder, remove_unfinished, write_json
from utils.signals import Stopped, StopSignal

logger = logging.getLogger(__name__)

# Of these options no number depends: a resumed run may have others without a word.
FREE = {"save_minutes", "keep_last", "gpu", "workers", "resume", "init", "overwrite", "output_path", "cache_dir",
        "cache_gb", "cache", "resynthesizer_file", "deterministic"}  # fmt: skip
CHECKPOINT_NAMES = r"(\d+(_sr)?|best|last)\.pth\.tar|(epoch_\d+|best|last)\.pth"
RECORD_NAMES = ("stats.jsonl", "tensorboard")
WARM_UP = 0.03  # of a training under the cosine schedule


class NotFinite(UserError):
    """Numbers are no longer finite: what has come of them is not worth saving."""


@dataclass
class Progress:
    """How far a training has come; saved with every checkpoint, so that resuming is exact to the step."""

    epoch: int = 0  # the epoch being trained, 0-based
    step: int = 0  # optimiser steps done in it
    total_steps: int = 0
    sums: dict[str, float] = field(default_factory=dict)  # of this epoch's values, weighted by their counts
    best: float | None = None  # the best validation score so far
    left_out: int = 0  # images of this epoch that could not be read

    def add(self, values: Mapping[str, float], count: float) -> None:
        """One more step, whose `values` are means over `count` images."""
        self.step += 1
        self.total_steps += 1
        for name, value in [*values.items(), ("count", 1.0)]:
            self.sums[name] = self.sums.get(name, 0.0) + value * count

    def means(self) -> dict[str, float]:
        """The epoch's values so far, averaged over its images; how many were left out, if any."""
        count = self.sums.get("count", 0.0)
        means = {k: v / count for k, v in self.sums.items() if k != "count"} if count else {}
        return means | ({"left_out": self.left_out} if self.left_out else {})

    def next_epoch(self) -> None:
        self.epoch, self.step, self.sums, self.left_out = self.epoch + 1, 0, {}, 0


# --- where a run starts -------------------------------------------------------------------------------------


def starting_point(
    resume: str | None, init: str | None, states: Sequence[Path]
) -> tuple[Checkpoint | None, Checkpoint | None]:
    """The file whose weights are taken (None: new ones), and the same if its run is continued (None: a new run).

    Args:
        resume: a file or "auto". init: weights for where there is nothing to resume. states: what "auto" would find.
    """
    if resume == "auto":
        found = [str(path) for path in states if path.exists()]
        if len(found) > 1:
            raise UserError(f"--resume auto: there are {len(found)} runs; name the state to go on from")
        resume = found[0] if found else None
        logger.info("%s", f"resuming {printable(resume)}" if resume else "nothing to resume: a new run")
    if init or resume:
        logger.info("starting from %s", printable(resume or init))
    origin = read_checkpoint(resume or init)
    if not resume or "progress" in origin.content:
        return origin, origin if resume else None
    logger.info("%s holds weights but no training state: a new run starts from them", printable(resume))
    return origin, None


@contextlib.contextmanager
def run_folder(folder: Path, world: World, resumed: Checkpoint | None, overwrite: bool) -> Iterator[None]:
    """Make the folder of a run, and hold it against other runs while this `with` block runs.

    Args:
        resumed: the state that the run goes on from; None: a new run, before which old records are deleted.

    Raises:
        UserError: if it cannot be written to, another run is in there, or it holds the checkpoints of another run and
            is not to be overwritten.
    """
    make_folder(folder)
    with exclusive_writer(folder / ".lock", world):
        if resumed is None or Path(resumed.name).resolve().parent != folder.resolve():
            old = [path for path in folder.iterdir() if re.fullmatch(CHECKPOINT_NAMES, path.name)]
            if old and not overwrite:
                raise UserError(
                    f"{printable(folder)} holds a run already: --resume auto goes on with it, --overwrite deletes its"
                    " checkpoints and records to begin anew; or write elsewhere"
                )
            for path in [*old, *(folder / name for name in RECORD_NAMES)] if world.is_main else ():
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        if world.is_main:
            remove_unfinished(folder)
        yield


# --- steps --------------------------------------------------------------------------------------------------


class Stepper:
    """One optimizer step after the other, over all processes, with the numbers checked.

    Args:
        rate_of: the factor of the learning rates after so many epochs, fractions included; by default always 1.
        steps: in an epoch.
        clip_norm: larger gradients are scaled down to this norm; None: not.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        compute: Compute,
        world: World,
        rate_of: Callable[[float], float] = lambda epochs: 1.0,
        steps: int = 1,
        clip_norm: float | None = None,
    ):
        self.optimizer, self.compute, self.world = optimizer, compute, world
        self.rate_of, self.steps, self.clip_norm = rate_of, steps, clip_norm
        self.progress = Progress()
        # What the options ask for; a resumed run keeps to it, whatever the state says of them.
        self.asked = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        self.scaler = torch.amp.GradScaler(compute.device.type, enabled=compute.precision == "fp16")

    def set_rates(self, factor: float) -> None:
        """Every group's learning rate: the one it was built with, times `factor`."""
        for group, asked in zip(self.optimizer.param_groups, self.asked, strict=True):
            group.update(asked | {"lr": asked["lr"] * factor})

    def step(self, loss: Tensor, values: Mapping[str, Tensor], batch) -> None:
        """Take the step. `loss` and `values` are this process's shares of the batch's means.

        Raises:
            NotFinite: if loss or gradients are not; nothing is changed then.
        """
        self.scaler.scale(loss).backward()
        gradients = self._summed_gradients()
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.scaler.is_enabled():
            norm = norm.nan_to_num()  # the scaler leaves out the steps that overflow in fp16, and scales less
        means, count, left_out, norm = self._means({"loss": loss, **values}, batch, norm)
        if not (math.isfinite(means["loss"]) and math.isfinite(norm)):
            files = ", ".join(sorted({printable(item.path) for item in batch.items}))
            raise NotFinite(
                f"numbers are no longer finite at epoch {self.progress.epoch}, step {self.progress.step} (loss"
                f" {means['loss']:.4g}, gradient norm {norm:.4g}); images {files}; lower --lr or use --precision fp32"
            )
        if self.clip_norm and norm > self.clip_norm:
            torch._foreach_mul_(gradients, self.clip_norm / norm)
        self.set_rates(self.rate_of(self.progress.epoch + self.progress.step / self.steps))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.progress.left_out += int(left_out)
        self.progress.add(means, count)

    def _summed_gradients(self) -> list[Tensor]:
        """The gradients of all processes together, as they are of the loss before it was scaled."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        distributed.all_reduce_gradients(parameters, self.world)
        self.scaler.unscale_(self.optimizer)
        return [p.grad for p in parameters if p.grad is not None]

    def _means(
        self, shares: Mapping[str, Tensor], batch, norm: Tensor
    ) -> tuple[dict[str, float], float, float, float]:
        """Means over the images that all processes could read, their count, that of the others, and the norm."""
        counts = [batch.weights.sum(), (batch.weights > 0).sum(), torch.tensor(len(batch.errors))]
        sums = torch.stack([v.detach().float().to(self.compute.device) for v in (*shares.values(), *counts)])
        sums = distributed.all_reduce_sum(sums, self.world)
        *sums, weight, count, left_out, norm = torch.cat([sums, norm.to(sums).view(1)]).tolist()  # a GPU is waited for
        return dict(zip(shares, (value / (weight or 1) for value in sums), strict=True)), count, left_out, norm

    def state_dict(self) -> dict:
        parts = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        return parts | {"progress": vars(self.progress)}

    def load_state(self, resumed: Checkpoint | None, settings: Mapping) -> None:
        """Go on from a state, if any; rates, decay and momentum are those asked for now. Says what else has changed."""
        if resumed is None:
            return
        state, before = resumed.content, resumed.content["settings"]
        if (optimizer := before.get("optimizer", "sgd")) != settings.get("optimizer", "sgd"):
            way_out = "give that, or start anew from it by --init"
            raise UserError(f"{resumed.name} was trained with --optimizer {optimizer}: {way_out}")
        self.optimizer.load_state_dict(state["optimizer"])
        self.set_rates(1.0)
        if state["scaler"]:  # empty if the run began in another precision
            self.scaler.load_state_dict(state["scaler"])
        vars(self.progress).update({k: v for k, v in state["progress"].items() if k in vars(self.progress)})
        for name in sorted(before.keys() & settings.keys() - FREE):
            if before[name] != settings[name]:
                change, effect = f"{name} was {before[name]} when the run began and is {settings[name]} now", ""
                if self.progress.step and name in ("batch_size", "images", "seed", "crops"):
                    effect = f": from step {self.progress.step} of this epoch on images come in another order, some"
                    effect += " twice or not at all"
                logger.warning("warning: %s%s", change, effect)


def cosine(of: int, epochs: float) -> float:
    """Factor on the learning rate after `epochs` of `of` epochs: a linear warm-up, then down to 0."""
    done = epochs / of
    if done < WARM_UP:
        return done / WARM_UP
    return 0.5 + 0.5 * math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP))


# --- what is kept -------------------------------------------------------------------------------------------


class Run(contextlib.AbstractContextManager):
    """A training under way: its last state on disk, its records, and the signals it gets, obeyed between steps.

    The state, that of the last step done, is saved at intervals, after each epoch, when stopped and when something
    fails. Records are config.json, stats.jsonl, TensorBoard, which counts finished epochs, and one log line an epoch.

    Args:
        path: the file of the last state, in the folder of the run.
        about: what the run is made of, its "settings" among it; goes into config.json and every state.
        networks: gives the networks' part of the state; of the main process alone.
        stepper: whose training it is.
        epochs: in all.
    """

    def __init__(self, path: Path, about: dict, networks: Callable[[], dict], stepper: Stepper, epochs: int):
        self.path, self.about, self.networks, self.stepper, self.epochs = path, about, networks, stepper, epochs
        self.world, self.progress, self.settings = stepper.world, stepper.progress, about["settings"]
        self.first_epoch, self.began = self.progress.epoch, time.monotonic()
        self.saved_at, self.told, self.stop, self.writer = self.began, set(), StopSignal(), None
        if self.world.is_main:
            from torch.utils.tensorboard import SummaryWriter  # takes as long to import as PyTorch

            write_json(path.with_name("config.json"), {**about, "versions": versions()})
            self.writer = SummaryWriter(str(path.with_name("tensorboard")), purge_step=self.first_epoch + 1)
            self.stats = path.with_name("stats.jsonl")
            lines = self.stats.read_text().splitlines(keepends=True) if self.stats.exists() else []
            whole = [line for line in lines if line.endswith("}\n")]  # the last is torn if the machine lost power
            with atomic(self.stats) as file:  # what was recorded of later epochs is recorded again
                file.write("".join(line for line in whole if json.loads(line)["epoch"] < self.first_epoch).encode())

    def __enter__(self) -> "Run":
        self.stop.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _) -> None:
        self.stop.__exit__()
        if isinstance(error, NotFinite):
            saved = f"the last good state is {printable(self.path)}" if self.path.exists() else "no state is saved yet"
            raise UserError(f"{error}; {saved}") from error
        if isinstance(error, Exception) and not isinstance(error, Stopped):
            if self.progress.total_steps:
                self.save()
            if self.stop.received:  # another process has obeyed already, and is missed
                raise Stopped(self.stop.received) from error
        if error is None and self.writer:
            self.writer.close()
            already = " already" if self.first_epoch >= self.epochs else ""
            folder = printable(self.path.parent)
            logger.info("finished%s: %d epochs are trained; all is in %s", already, self.epochs, folder)

    def state(self) -> dict:
        """All that is needed to use the networks and to go on with their training."""
        return self.about | self.networks() | self.stepper.state_dict()

    def save(self, state: dict | None = None) -> None:
        """Save the state now. state: where it has just been collected."""
        if self.world.is_main:
            checkpoints.save(state or self.state(), self.path)
        self.saved_at = time.monotonic()

    def batches(self, loader: Iterable, what: str, training: bool = False, min_images: int = 1) -> Iterator:
        """The batches of a loader that hold an image, which `what` is done with. After each a signal is obeyed.

        An image that cannot be read is an error or, with --skip-bad, left out with one line.
        training: a step is taken with each, after which the state is saved if it is time, or any process got a signal.
        """
        before = None
        for batch in console.progress(loader, what):
            for text in (text for text in batch.errors.values() if text not in self.told):
                if not self.settings["skip_bad"]:
                    raise UserError(f"{text}; mend or remove it, or go on without such images by --skip-bad")
                logger.warning("left out: %s", text)
                self.told.add(text)
            if len(batch.x) >= min_images:
                before = batch
                yield batch
            elif training and self.world.size > 1:  # all have to take the step: with the batch before, of weight 0
                if before is None:
                    raise UserError(
                        f"{next(iter(batch.errors.values()))}; and no other image is in its process's batch"
                    )
                yield before._replace(weights=torch.zeros_like(before.weights), errors=batch.errors)
            elif training:
                self.progress.step += 1
                self.progress.left_out += len(batch.errors)
            self._save_if_due(training)

    def _save_if_due(self, training: bool) -> None:
        due = float(training and time.monotonic() - self.saved_at >= self.settings["save_minutes"] * 60)
        stopping = float(self.stop.received or 0)
        if training and self.world.size > 1:  # what one process has to do all do, so that none waits for ever
            wanted = torch.tensor([stopping, due], device=self.stepper.compute.device)
            stopping, due = distributed.all_reduce_max(wanted, self.world).tolist()
        if stopping or due:
            self.save()
        if stopping:
            raise Stopped(int(stopping))

    def end_epoch(
        self, values: dict[str, float | None], score: str, numbered: Callable[[dict], dict[str, dict]] | None
    ) -> None:
        """Record a finished epoch, and write what is due: the best so far, its numbered files, last of all the state.

        Args:
            values: worth recording. score: the name of that by which epochs are compared, the higher the better; it
                is not among them if the run does not validate.
            numbered: from the state, the content of the epoch's files by name; None: this epoch is not to be kept.
        """
        self._record(values)
        done, got = self.progress, values.get(score)
        done.next_epoch()
        better = got is not None and (done.best is None or got > done.best)
        done.best = got if better else done.best
        if not self.world.is_main or not (better or numbered):
            return
        state = self.state()
        files = numbered(state) if numbered else {}
        best = {self.path.name.replace("last", "best"): {**state, "epoch": done.epoch}} if better else {}
        for name, content in (best | files).items():
            checkpoints.save(content, self.path.with_name(name))
        for name in files if self.settings["keep_last"] else ():
            like = re.compile(re.sub(r"\d+", r"(\\d+)", re.escape(name), count=1))
            same = sorted((int(m[1]), p) for p in self.path.parent.iterdir() if (m := like.fullmatch(p.name)))
            for _, path in same[: -self.settings["keep_last"]]:
                path.unlink()
        self.save(state)

    def _record(self, values: dict[str, float | None]) -> None:
        if self.writer is None:
            return
        epoch, rate = self.progress.epoch, self.stepper.optimizer.param_groups[0]["lr"]
        values = values | {"learning_rate": rate}
        finite = {k: v if v is not None and math.isfinite(v) else None for k, v in values.items()}
        with self.stats.open("a") as file:
            file.write(json.dumps({"epoch": epoch, **finite}) + "\n")
        for name, value in finite.items():
            if value is not None:
                self.writer.add_scalar(name, value, epoch + 1)
        words = "  ".join(f"{name} {'-' if value is None else f'{value:.4g}'}" for name, value in finite.items())
        minutes = (time.monotonic() - self.began) / 60 * (self.epochs - epoch - 1)  # if all are like this one
        self.began = time.monotonic()
        logger.info("epoch %d: %s%s", epoch, words, f"  (about {minutes:.0f} min left)" if minutes >= 1 else "")

    def pictures(self, name: str, images: Tensor, finished: int) -> None:
        """To TensorBoard. images: (B, 3, H, W) in [0, 1]. finished: how many epochs are."""
        if self.writer is not None and len(images):
            self.writer.add_images(name, images.detach().float().clamp(0, 1).cpu(), finished)
