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

from models import Checkpoint, read_checkpoint
from utils import checkpoint
from utils.distributed import World, max_over_processes, sum_gradients, sum_over_processes
from utils.run import (
    Compute,
    Stopped,
    StopSignal,
    UserError,
    atomic,
    make_folder,
    progress,
    remove_torn,
    shown,
    sole_writer,
    versions,
    write_json,
)

logger = logging.getLogger(__name__)

# Of these options no number depends: a resumed run may have others without a word.
FREE = {"save_minutes", "keep_last", "gpu", "workers", "resume", "init", "overwrite", "output_path", "cache_dir",
        "cache_gb", "cache", "resynthesizer_file", "without_effect", "deterministic"}  # fmt: skip


WARM_UP = 0.03  # of a training under the cosine schedule


@dataclass
class Progress:
    """How far a training has come; saved with every checkpoint, so that resuming is exact to the step."""

    epoch: int = 0  # the epoch being trained, 0-based
    step: int = 0  # optimiser steps done in it
    total_steps: int = 0
    sums: dict[str, float] = field(default_factory=dict)  # of this epoch's values, weighted by their counts
    best: float | None = None  # the best validation score so far
    left_out: int = 0  # images that could not be read

    def add(self, values: Mapping[str, float], count: float) -> None:
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


# --- where a run starts -------------------------------------------------------------------------------------


def starting_point(resume: str | None, init: str | None, states: Sequence[Path]) -> tuple[Checkpoint | None, dict]:
    """The file to start from (None: from scratch), and the state of the run to be continued (empty: a new run).

    Args:
        resume: a file or "auto". init: a file of weights. states: the last states that "auto" would find.
    """
    if resume == "auto":
        found = [str(path) for path in states if path.exists()]
        if len(found) > 1:
            raise UserError(f"--resume auto: there are {len(found)} runs; name the state to go on from")
        resume = found[0] if found else None
        start = f"starting from {shown(init)}" if init else "starting anew"
        logger.info("%s", f"resuming {shown(resume)}" if resume else f"nothing to resume: {start}")
    elif resume and init:
        raise UserError("--resume FILE continues a run and --init FILE starts one: give one of them")
    start = read_checkpoint(resume or init)
    if not resume:
        return start, {}
    if "progress" not in start.content:
        logger.info("%s holds weights but no training state: a new run starts from them", start.name)
        return start, {}
    return start, start.content


def refuse_occupied(folder: Path, resumed: str | None, overwrite: bool) -> None:
    """Raise UserError if `folder` holds another run than the one of the state `resumed`, and is not to be overwritten."""
    same = resumed is not None and Path(resumed).resolve().parent == folder.resolve()
    if run_files(folder) and not same and not overwrite:
        raise UserError(
            f"{shown(folder)} holds a run already: --resume auto goes on with it, --overwrite deletes its checkpoints"
            " and records to begin anew; or write elsewhere"
        )


def run_files(folder: Path) -> list[Path]:
    """What a training has written into a folder."""
    numbered = r"(\d+(_sr)?|best|last)\.pth\.tar|(epoch_\d+|best|last)\.pth|stats\.jsonl|tensorboard"
    return [path for path in folder.glob("*") if re.fullmatch(numbered, path.name)] if folder.is_dir() else []


@contextlib.contextmanager
def run_folder(folder: Path, world: World, fresh: bool) -> Iterator[Path]:
    """The folder of a run, made and held against other runs; of a `fresh` one, what was there before is deleted.

    Raises:
        UserError: if it cannot be written to, or another run is in there.
    """
    make_folder(folder)
    with sole_writer(folder / ".lock", world):
        if fresh and world.is_main:
            for path in run_files(folder):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield folder


def say_changes(before: Mapping, now: Mapping, step: int) -> None:
    """One line for each setting or image set that a resumed run does not share with the run it continues."""
    for name in sorted(before.keys() & now.keys() - FREE):
        if before[name] != now[name]:
            effect = ""
            if step and name in ("batch_size", "images", "seed"):
                effect = (
                    f": from step {step} of this epoch on the images come in another order, some twice or not at all"
                )
            logger.warning(
                "warning: %s was %s when the run began and is %s now%s", name, before[name], now[name], effect
            )


# --- steps --------------------------------------------------------------------------------------------------


class Stepper:
    """One optimizer step after the other, over all processes, with the numbers checked.

    Args:
        last_state: the file named when numbers are no longer finite.
        clip_norm: larger gradients are scaled down to this norm; None: not.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        compute: Compute,
        world: World,
        last_state: Path,
        clip_norm: float | None = None,
    ):
        self.optimizer, self.compute, self.world, self.last_state = optimizer, compute, world, last_state
        self.clip_norm = clip_norm
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
            UserError: if loss or gradients are not finite.
        """
        self.scaler.scale(loss).backward()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        sum_gradients(parameters, self.world)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.scaler.is_enabled():
            norm = norm.nan_to_num()  # the scaler leaves out the steps that overflow in fp16, and scales less
        shares = [loss, *values.values(), (batch.weights > 0).sum()]
        shares = torch.stack([value.detach().float().to(self.compute.device) for value in shares])
        means = sum_over_processes(shares, self.world)
        loss, *means, count, norm = torch.cat([means, norm.to(means).view(1)]).tolist()  # at once: a GPU is waited for
        if not (math.isfinite(loss) and math.isfinite(norm)):
            where = (
                f"epoch {self.progress.epoch}, step {self.progress.step} (loss {loss:.4g}, gradient norm {norm:.4g})"
            )
            saved = f"the last good state is {self.last_state}" if self.last_state.exists() else "no state is saved yet"
            files = ", ".join(sorted({shown(item.path) for item in batch.items}))
            raise UserError(
                f"numbers are no longer finite at {where}; images {files}; {saved}. Lower --lr or use --precision fp32"
            )
        if self.clip_norm and norm > self.clip_norm:
            torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], self.clip_norm / norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.progress.add({"loss": loss, **dict(zip(values, means, strict=True))}, count)

    def state_dict(self) -> dict:
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": vars(self.progress),
        }

    def load_state_dict(self, state: Mapping) -> None:
        """Go on from a state; rates, decay and momentum are those asked for now."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.set_rates(1.0)
        if state["scaler"]:  # empty if the run began in another precision
            self.scaler.load_state_dict(state["scaler"])
        known = vars(self.progress)
        known.update({name: value for name, value in state["progress"].items() if name in known})


def cosine(done: float) -> float:
    """A factor of the rate for a training of which the share `done` is done: a linear warm-up, then down to 0."""
    if done < WARM_UP:
        return done / WARM_UP
    return 0.5 + 0.5 * math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP))


# --- what is kept -------------------------------------------------------------------------------------------


class StateKeeper:
    """Saves the whole state of a training when it is time: at its intervals, every few minutes, when stopped or failing.

    Args:
        path: the file of the last state.
        collect: gives the state; of the main process alone.
        stop: the signals received.
        minutes: the longest time between two savings.
        skip_bad: go on without images that cannot be read, rather than end the run.
    """

    def __init__(
        self, path: Path, collect: Callable[[], dict], stop: StopSignal, minutes: float, skip_bad: bool, world: World
    ):
        self.path, self.collect, self.stop, self.skip_bad, self.world = path, collect, stop, skip_bad, world
        self.interval = minutes * 60
        if world.is_main:
            remove_torn(path.parent)
        self.saved_at = time.monotonic()

    def save(self) -> None:
        if self.world.is_main:
            checkpoint.save(self.collect(), self.path)
        self.saved_at = time.monotonic()

    def after_step(self, device: torch.device) -> None:
        """Save if it is time; raise `Stopped` after saving if a signal has come to any of the processes."""
        stopping, due = float(self.stop.received or 0), float(time.monotonic() - self.saved_at >= self.interval)
        if self.world.size > 1:  # what one process has to do all do, so that none waits for another for ever
            wanted = torch.tensor([stopping, due], device=device)
            stopping, due = max_over_processes(wanted, self.world).tolist()
        if stopping or due:
            self.save()
        if stopping:
            raise Stopped(int(stopping))

    def obey(self) -> None:
        """Raise `Stopped` after saving if a signal has come to this process: between steps."""
        if self.stop.received:
            self.save()
            raise Stopped(self.stop.received)

    def batches(self, loader: Iterable, what: str, done: Progress | None = None) -> Iterator:
        """The batches of a loader. What cannot be read ends the run, its state saved, or is left out and counted."""
        iterator = iter(progress(loader, what))
        while True:
            try:
                batch = next(iterator)
                texts = [f"left out: {text}" if self.skip_bad else text for text in batch.errors.values()]
                if texts and (not self.skip_bad or not len(batch.x)):
                    way_out = "" if self.skip_bad else "; mend or remove it, or go on without such images by --skip-bad"
                    raise UserError(texts[0] + way_out)
            except StopIteration:
                return
            except Exception:
                self.save()
                raise
            for text in texts:
                logger.warning("%s", text)
            if done:
                done.left_out += len(texts)
            yield batch


def save_epoch(
    keeper: StateKeeper,
    done: Progress,
    score: float | None,
    numbered: Callable[[dict], dict[str, dict]] | None,
    keep_last: int | None,
) -> None:
    """What is written when an epoch is finished: its numbered files if it has some, the best so far, the last state.

    Args:
        score: the higher the better; None: not validated.
        numbered: from the state, the content of the epoch's files by name; None: this epoch is not to be kept.
        keep_last: how many numbered files of a kind are kept; None: all.
    """
    better = score is not None and (done.best is None or score > done.best)
    if better:
        done.best = score
    if not keeper.world.is_main or not (better or numbered):
        return
    state, folder = keeper.collect(), keeper.path.parent
    if better:
        checkpoint.save({**state, "epoch": done.epoch}, folder / keeper.path.name.replace("last", "best"))
    for name, content in (numbered(state) if numbered else {}).items():
        checkpoint.save(content, folder / name)
        like = re.compile(re.sub(r"\d+", r"\\d+", re.escape(name)))
        same = sorted((int(re.search(r"\d+", p.name)[0]), p) for p in folder.iterdir() if like.fullmatch(p.name))
        for _, path in same[:-keep_last] if keep_last else ():
            path.unlink()
    if numbered:
        keeper.save()  # last of all: a run killed before has yet to do this, one killed after has all of it


class Recorder:
    """The records of a run: config.json, stats.jsonl, TensorBoard, one log line an epoch. Main process only.

    TensorBoard counts finished epochs: what is recorded before the first is at 0.
    """

    def __init__(self, folder: Path, about: dict, world: World, first_epoch: int, epochs: int):
        """about: what the run is made of; goes into config.json with the versions it ran on.

        first_epoch: what was recorded of it and later ones, before a stop, is recorded again.
        """
        self.writer, self.first_epoch, self.epochs, self.started = None, first_epoch, epochs, time.monotonic()
        if not world.is_main:
            return
        from torch.utils.tensorboard import SummaryWriter  # takes as long to import as PyTorch

        write_json(folder / "config.json", {**about, "versions": versions()})
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_epoch + 1)
        self.path = folder / "stats.jsonl"
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        with atomic(self.path) as file:
            file.write("".join(line for line in lines if _epoch_of(line) < first_epoch).encode())

    def epoch(self, epoch: int, values: Mapping[str, float | None]) -> None:
        """Record the values of a finished epoch."""
        if self.writer is None:
            return
        finite = {k: v if v is not None and math.isfinite(v) else None for k, v in values.items()}
        with self.path.open("a") as file:
            file.write(json.dumps({"epoch": epoch, **finite}) + "\n")
        for name, value in finite.items():
            if value is not None:
                self.writer.add_scalar(name, value, epoch + 1)
        words = "  ".join(f"{name} {'-' if value is None else f'{value:.4g}'}" for name, value in finite.items())
        passed, left = epoch + 1 - self.first_epoch, self.epochs - epoch - 1
        minutes = (time.monotonic() - self.started) / passed * left / 60
        logger.info("epoch %d: %s%s", epoch, words, f"  (about {minutes:.0f} min left)" if minutes >= 1 else "")

    def pictures(self, name: str, images: Tensor, finished: int) -> None:
        """images: (B, 3, H, W) in [0, 1]. finished: how many epochs are."""
        if self.writer is not None and len(images):
            self.writer.add_images(name, images.detach().float().clamp(0, 1).cpu(), finished)

    def finish(self, folder: Path) -> None:
        """Close the records, and say that the run is finished."""
        if self.writer is not None:
            self.writer.close()
            already = " already" if self.first_epoch >= self.epochs else ""
            logger.info("finished%s: %d epochs are trained; all is in %s", already, self.epochs, shown(folder))


def _epoch_of(line: str) -> float:
    """The epoch of a line of stats.jsonl; infinity if it is torn, as a machine that lost power may leave it."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return json.loads(line)["epoch"]
    return math.inf
