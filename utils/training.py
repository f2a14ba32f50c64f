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

from data.datasets import Batch
from models import Checkpoint, read_checkpoint
from utils import checkpoint, distributed, run
from utils.distributed import World
from utils.run import Compute, Stopped, UserError, shown

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
    """The file to start from (None: from scratch), and the same if it is a run to be continued (None: a new run).

    Args:
        resume: a file or "auto". init: weights for where there is nothing to resume. states: what "auto" would find.
    """
    if resume == "auto":
        found = [str(path) for path in states if path.exists()]
        if len(found) > 1:
            raise UserError(f"--resume auto: there are {len(found)} runs; name the state to go on from")
        resume = found[0] if found else None
        logger.info("%s", f"resuming {shown(resume)}" if resume else "nothing to resume: a new run")
    if init or resume:
        logger.info("starting from %s", shown(resume or init))
    start = read_checkpoint(resume or init)
    if resume and "progress" not in start.content:
        logger.info("%s holds weights but no training state: a new run starts from them", shown(resume))
    return start, start if resume and "progress" in start.content else None


@contextlib.contextmanager
def run_folder(folder: Path, world: World, resumed: Checkpoint | None, overwrite: bool) -> Iterator[Path]:
    """The folder of a run, made and held against other runs while this `with` block runs.

    Args:
        resumed: the state that the run goes on from; None: a new run, before which old records are deleted.

    Raises:
        UserError: if it cannot be written to, another run is in there, or it holds the checkpoints of another run and
            is not to be overwritten.
    """
    run.make_folder(folder)
    with run.sole_writer(folder / ".lock", world):
        if resumed is None or Path(resumed.name).resolve().parent != folder.resolve():
            old = [path for path in folder.iterdir() if re.fullmatch(CHECKPOINT_NAMES, path.name)]
            if old and not overwrite:
                raise UserError(
                    f"{shown(folder)} holds a run already: --resume auto goes on with it, --overwrite deletes its"
                    " checkpoints and records to begin anew; or write elsewhere"
                )
            for path in [*old, *(folder / name for name in RECORD_NAMES)] if world.is_main else ():
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        if world.is_main:
            run.remove_torn(folder)
        yield folder


def say_changes(before: Mapping, now: Mapping, step: int) -> None:
    """One line for each setting or image set that a resumed run does not share with the run it continues."""
    for name in sorted(before.keys() & now.keys() - FREE):
        if before[name] != now[name]:
            order = step and name in ("batch_size", "images", "seed", "crops")
            effect = f": from step {step} of this epoch on images come in another order, some twice or not at all"
            change = f"{name} was {before[name]} when the run began and is {now[name]} now"
            logger.warning("warning: %s%s", change, effect if order else "")


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

    def step(self, loss: Tensor, values: Mapping[str, Tensor], batch: Batch) -> None:
        """Take the step. `loss` and `values` are this process's shares of the batch's means.

        Raises:
            NotFinite: if loss or gradients are not; nothing is changed then.
        """
        self.scaler.scale(loss).backward()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        distributed.sum_gradients(parameters, self.world)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.scaler.is_enabled():
            norm = norm.nan_to_num()  # the scaler leaves out the steps that overflow in fp16, and scales less
        counts = [batch.weights.sum(), (batch.weights > 0).sum(), torch.tensor(len(batch.errors))]
        shares = torch.stack([v.detach().float().to(self.compute.device) for v in (loss, *values.values(), *counts)])
        sums = distributed.sum_over_processes(shares, self.world)
        *sums, weight, count, left_out, norm = torch.cat([sums, norm.to(sums).view(1)]).tolist()  # a GPU is waited for
        means = [value / (weight or 1) for value in sums]  # of the images that could be read
        if not (math.isfinite(sums[0]) and math.isfinite(norm)):
            where = f"epoch {self.progress.epoch}, step {self.progress.step}"
            files = ", ".join(sorted({shown(item.path) for item in batch.items}))
            raise NotFinite(
                f"numbers are no longer finite at {where} (loss {sums[0]:.4g}, gradient norm {norm:.4g}); images {files};"
                " lower --lr or use --precision fp32"
            )
        if self.clip_norm and norm > self.clip_norm:
            torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], self.clip_norm / norm)
        self.set_rates(self.rate_of(self.progress.epoch + self.progress.step / self.steps))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.progress.left_out += int(left_out)
        self.progress.add(dict(zip(("loss", *values), means, strict=True)), count)

    def state_dict(self) -> dict:
        parts = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        return parts | {"progress": vars(self.progress)}

    def go_on_from(self, run: Checkpoint | None, settings: Mapping) -> None:
        """Go on from a state, if any; rates, decay and momentum are those asked for now. Says what else has changed."""
        if run is None:
            return
        state, known = run.content, vars(self.progress)
        before, now = (s.get("optimizer", "sgd") for s in (state["settings"], settings))
        if before != now:
            raise UserError(
                f"{run.name} was trained with --optimizer {before}: give that, or start anew from it by --init"
            )
        self.optimizer.load_state_dict(state["optimizer"])
        self.set_rates(1.0)
        if state["scaler"]:  # empty if the run began in another precision
            self.scaler.load_state_dict(state["scaler"])
        known.update({name: value for name, value in state["progress"].items() if name in known})
        say_changes(state["settings"], settings, self.progress.step)


def cosine(of: int, epochs: float) -> float:
    """Factor on the learning rate after `epochs` of `of` epochs: a linear warm-up, then down to 0."""
    done = epochs / of
    if done < WARM_UP:
        return done / WARM_UP
    return 0.5 + 0.5 * math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP))


# --- what is kept -------------------------------------------------------------------------------------------


def readable(batches: Iterable[Batch], skip_bad: bool, told: set[str] | None = None) -> Iterator[Batch]:
    """The batches. What cannot be read in one is an error or, if `skip_bad`, left out with one line (then in `told`)."""
    told = set() if told is None else told
    for batch in batches:
        for text in batch.errors.values():
            if not skip_bad:
                raise UserError(f"{text}; mend or remove it, or go on without such images by --skip-bad")
            if text not in told:
                logger.warning("left out: %s", text)
                told.add(text)
        yield batch


class StateKeeper(contextlib.AbstractContextManager):
    """Saves the whole state of a training when it is time: at its intervals, every few minutes, when stopped or failing.

    It is that of the last step done. While this `with` block runs, signals are obeyed between steps.

    Args:
        path: the file of the last state.
        collect: gives the state; of the main process alone.
        stepper: whose training it is.
        minutes: the longest time between two savings.
        skip_bad: go on without images that cannot be read, rather than end the run.
    """

    def __init__(self, path: Path, collect: Callable[[], dict], stepper: Stepper, minutes: float, skip_bad: bool):
        self.path, self.collect, self.skip_bad = path, collect, skip_bad
        self.world, self.device, self.progress = stepper.world, stepper.compute.device, stepper.progress
        self.interval, self.saved_at, self.told = minutes * 60, time.monotonic(), set()
        self.stop = run.StopSignal()

    def __enter__(self) -> "StateKeeper":
        self.stop.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _) -> None:
        self.stop.__exit__()
        if isinstance(error, NotFinite):
            saved = f"the last good state is {shown(self.path)}" if self.path.exists() else "no state is saved yet"
            raise UserError(f"{error}; {saved}") from error
        if isinstance(error, Exception) and not isinstance(error, Stopped):
            if self.progress.total_steps:
                self.save()
            if self.stop.received:  # another process has obeyed already, and is missed
                raise Stopped(self.stop.received) from error

    def save(self, state: dict | None = None) -> None:
        """Save the state now. state: if `collect` has just given it."""
        if self.world.is_main:
            checkpoint.save(state or self.collect(), self.path)
        self.saved_at = time.monotonic()

    def batches(self, loader: Iterable[Batch], what: str, training: bool = False) -> Iterator[Batch]:
        """The batches of a loader that hold an image, which `what` is done with. After each a signal is obeyed.

        training: a step is taken with each, after which the state is saved if it is time, or any process got a signal.
        """
        for batch in readable(run.progress(loader, what), self.skip_bad, self.told):
            if len(batch.x):
                yield batch
            elif training and self.world.size > 1:  # all have to take the step
                raise UserError(f"{next(iter(batch.errors.values()))}; and no other image is in its process's batch")
            elif training:
                self.progress.step += 1
                self.progress.left_out += len(batch.errors)
            self._save_if_due(training)

    def _save_if_due(self, training: bool) -> None:
        due = float(training and time.monotonic() - self.saved_at >= self.interval)
        stopping = float(self.stop.received or 0)
        if training and self.world.size > 1:  # what one process has to do all do, so that none waits for ever
            wanted = torch.tensor([stopping, due], device=self.device)
            stopping, due = distributed.max_over_processes(wanted, self.world).tolist()
        if stopping or due:
            self.save()
        if stopping:
            raise Stopped(int(stopping))

    def end_epoch(
        self, score: float | None, numbered: Callable[[dict], dict[str, dict]] | None, keep_last: int | None
    ) -> None:
        """Write what is due when an epoch is finished: the best so far, its numbered files, last of all the state.

        Args:
            score: the higher the better; None: not validated.
            numbered: from the state, the content of the epoch's files by name; None: this epoch is not to be kept.
            keep_last: how many numbered files of a kind are kept; None: all.
        """
        done, folder = self.progress, self.path.parent
        done.next_epoch()
        better = score is not None and (done.best is None or score > done.best)
        done.best = score if better else done.best
        if not self.world.is_main or not (better or numbered):
            return
        state = self.collect()
        files = numbered(state) if numbered else {}
        best = {self.path.name.replace("last", "best"): {**state, "epoch": done.epoch}} if better else {}
        for name, content in (best | files).items():
            checkpoint.save(content, folder / name)
        for name in files if keep_last else ():
            like = re.compile(re.sub(r"\d+", r"(\\d+)", re.escape(name), count=1))
            same = sorted((int(m[1]), path) for path in folder.iterdir() if (m := like.fullmatch(path.name)))
            for _, path in same[:-keep_last]:
                path.unlink()
        self.save(state)


class Recorder:
    """The records of a run: config.json, stats.jsonl, TensorBoard, one log line an epoch. Main process only.

    TensorBoard counts finished epochs: what is recorded before the first is at 0.

    Args:
        about: what the run is made of; goes into config.json with the versions it ran on.
        first_epoch: what was recorded of it and later ones, before a stop, is recorded again.
    """

    def __init__(self, folder: Path, about: dict, world: World, first_epoch: int, epochs: int):
        self.folder, self.first_epoch, self.epochs, self.started = folder, first_epoch, epochs, time.monotonic()
        self.writer = None
        if world.is_main:
            from torch.utils.tensorboard import SummaryWriter  # takes as long to import as PyTorch

            run.write_json(folder / "config.json", {**about, "versions": run.versions()})
            self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_epoch + 1)
            stats = folder / "stats.jsonl"
            lines = stats.read_text().splitlines(keepends=True) if stats.exists() else []
            with run.atomic(stats) as file:
                file.write("".join(line for line in lines if _epoch_of(line) < first_epoch).encode())

    def epoch(self, epoch: int, values: Mapping[str, float | None]) -> None:
        """Record the values of a finished epoch."""
        if self.writer is None:
            return
        finite = {k: v if v is not None and math.isfinite(v) else None for k, v in values.items()}
        with (self.folder / "stats.jsonl").open("a") as file:
            file.write(json.dumps({"epoch": epoch, **finite}) + "\n")
        for name, value in finite.items():
            if value is not None:
                self.writer.add_scalar(name, value, epoch + 1)
        words = "  ".join(f"{name} {'-' if value is None else f'{value:.4g}'}" for name, value in finite.items())
        done, left = epoch + 1 - self.first_epoch, self.epochs - epoch - 1
        minutes = (time.monotonic() - self.started) / 60 / done * left
        logger.info("epoch %d: %s%s", epoch, words, f"  (about {minutes:.0f} min left)" if minutes >= 1 else "")

    def pictures(self, name: str, images: Tensor, finished: int) -> None:
        """images: (B, 3, H, W) in [0, 1]. finished: how many epochs are."""
        if self.writer is not None and len(images):
            self.writer.add_images(name, images.detach().float().clamp(0, 1).cpu(), finished)

    def finish(self) -> None:
        """Close the records, and say that the run is finished."""
        if self.writer is not None:
            self.writer.close()
            already = " already" if self.first_epoch >= self.epochs else ""
            logger.info("finished%s: %d epochs are trained; all is in %s", already, self.epochs, shown(self.folder))


def _epoch_of(line: str) -> float:
    """The epoch of a line of stats.jsonl; infinity if it is torn, as a machine that lost power may leave it."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return json.loads(line)["epoch"]
    return math.inf
