"""A training run: where it starts, its batches, states and records, and the signals that it obeys."""

import contextlib
import json
import logging
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from utils import console, distributed
from utils.checkpoints import Checkpoint, read_checkpoint
from utils.console import printable
from utils.errors import UserError
from utils.run_folder import EVENTS, STATS, RunFolder
from utils.signals import Stopped, StopSignal
from utils.training import NotFinite, Stepper

logger = logging.getLogger(__name__)

# Given the state at the end of an epoch, makes the contents of the epoch's numbered files, by name
NumberedFiles = Callable[[dict], dict[str, dict]]


# --- where a run starts -------------------------------------------------------------------------------------


def starting_point(
    resume: str | None, init: str | None, states: Sequence[Path]
) -> tuple[Checkpoint | None, Checkpoint | None]:
    """Read the checkpoint that a run starts from.

    Args:
        resume: `--resume`: a file, "auto", or None.
        init: `--init`: a file with weights, which is used if there is no run to resume.
        states: files that "auto" looks for.

    Returns:
        The checkpoint whose weights are used (None: new weights), and the checkpoint whose run is continued (None: a
        new run). The second is either the first or None.

    Raises:
        UserError: if "auto" finds several states, or a file cannot be read.
    """
    if resume == "auto":
        resume = _find_state(states)
    if resume or init:
        logger.info("starting from %s", printable(resume or init))
    origin = read_checkpoint(resume or init)
    if not resume:
        return origin, None
    if "progress" in origin.content:
        return origin, origin
    logger.info("%s holds weights but no training state: a new run starts from them", printable(resume))
    return origin, None


def _find_state(states: Sequence[Path]) -> str | None:
    """Find the one file of `states` that exists."""
    found = [str(path) for path in states if path.exists()]
    if len(found) > 1:
        raise UserError(f"--resume auto found {len(found)} runs ({', '.join(map(printable, found))}): name one of them")
    if not found:
        logger.info("nothing to resume: a new run")
        return None
    logger.info("resuming %s", printable(found[0]))
    return found[0]


# --- the run ------------------------------------------------------------------------------------------------


class Run(contextlib.AbstractContextManager):
    """A training under way, with its last state on disk, its records and the signals that it obeys between steps.

    The state is saved every --save-minutes, at the end of an epoch that is the best so far or has numbered files, when
    a signal stops the run, and when an error ends it. At the end of any other epoch, nothing is saved. The records are
    config.json, stats.jsonl, TensorBoard files (whose steps count finished epochs) and one log line per epoch.

    Args:
        folder: the folder of the run, from `run_folder`.
        about: what the run consists of, such as "config"; "settings" must be among it. It goes into config.json and
            into every state.
        networks: makes the networks' part of the state. Only the main process calls it.
        stepper: the optimizer of the training.
        epochs: number of epochs, at the end.
    """

    def __init__(self, folder: RunFolder, about: dict, networks: Callable[[], dict], stepper: Stepper, epochs: int):
        self.folder, self.about, self.networks, self.stepper, self.epochs = folder, about, networks, stepper, epochs
        self.world, self.progress, self.settings = stepper.world, stepper.progress, about["settings"]
        self.first_epoch = self.progress.epoch
        self.saved_at = time.monotonic()
        self.epoch_began: float | None = None  # when the first step of this epoch began, and which step it was
        self.first_step = 0
        self.reported: set[str] = set()  # texts on images left out, each of which is printed once
        self.stop = StopSignal()
        self.writer = None
        if self.world.is_main:
            from torch.utils.tensorboard import SummaryWriter  # takes as long to import as PyTorch

            folder.begin(about, self.first_epoch)
            self.writer = SummaryWriter(str(folder.path / EVENTS), purge_step=self.first_epoch + 1)

    def __enter__(self) -> "Run":
        self.stop.__enter__()
        return self

    def __exit__(self, _type: type | None, error: BaseException | None, _traceback) -> None:
        self.stop.__exit__()
        if isinstance(error, NotFinite):
            last = self.folder.last
            saved = f"the last good state is {printable(last)}" if last.exists() else "no state is saved yet"
            raise UserError(f"{error}; {saved}") from error
        if isinstance(error, Exception) and not isinstance(error, Stopped):
            if self.progress.total_steps:
                self.save()
            if self.stop.received:  # another process has stopped already, and this one fails without it
                raise Stopped(self.stop.received) from error
        if error is None and self.writer:
            self.writer.close()
            already = " already" if self.first_epoch >= self.epochs else ""
            folder = printable(self.folder.path)
            logger.info("finished%s: %d epochs are trained; all files are in %s", already, self.epochs, folder)

    # --- saving

    def state(self) -> dict:
        """Collect all that is needed to use the networks and to continue their training.

        Its "epoch" is the number of finished epochs.
        """
        networks = self.networks()
        return {**self.about, **networks, **self.stepper.state_dict(), "epoch": self.progress.epoch}

    def save(self) -> None:
        """Save the state now."""
        if self.world.is_main:
            self._save_last(self.state())
        self.saved_at = time.monotonic()

    def _save_last(self, state: dict) -> None:
        self.folder.save(self.folder.last.name, state)
        self.folder.delete_replaced()

    def _save_if_due(self, training: bool) -> None:
        """Save the state if it is time or a signal was received, and stop after a signal.

        While training, all processes do this at the same batch, so that none waits for another forever.
        """
        due = training and time.monotonic() - self.saved_at >= self.settings["save_minutes"] * 60
        signal_number = self.stop.received or 0
        if training and self.world.size > 1:
            values = torch.tensor([float(signal_number), float(due)], device=self.stepper.compute.device)
            signal_number, due = distributed.all_reduce_max(values, self.world).tolist()
        if signal_number or due:
            self.save()
        if signal_number:
            raise Stopped(int(signal_number))

    # --- batches

    def batches(self, loader: Iterable, description: str, training: bool = False, min_images: int = 1) -> Iterator:
        """Iterate over batches, and obey signals after each one.

        An image that cannot be used is an error or, with --skip-bad, left out with one line.

        Args:
            loader: gives batches (data.datasets.Batch).
            description: what is done with them, for the progress bar.
            training: whether the caller takes an optimizer step with each batch. Then the state is saved when it is
                time. With several processes, each process takes every step. A process whose batch is too small repeats
                an earlier batch with weight 0.
            min_images: number of images that this process needs in a batch. Batch norm needs 2 to be trained where the
                classifier's last feature map has one value per channel. The images of a smaller batch are left out.

        Yields:
            The batches that hold at least `min_images` images.
        """
        if training and self.epoch_began is None:
            self.epoch_began, self.first_step = time.monotonic(), self.progress.step
        usable = None  # the last batch with enough images
        for batch in console.progress(loader, description):
            self._report_errors(batch.errors)
            if len(batch.x) >= max(min_images, 1):
                usable = batch
                yield batch
            else:
                errors = self._leave_out_small_batch(batch, min_images)
                if training and self.world.size > 1:
                    yield _fill(usable or batch, min_images)._replace(errors=errors)
                elif training:
                    self.progress.skip_step(len(errors))
            self._save_if_due(training)

    def _report_errors(self, errors: Mapping[int, str]) -> None:
        """Print each new text on an image that cannot be used, or raise it without --skip-bad."""
        for text in errors.values():
            if text in self.reported:
                continue
            if not self.settings["skip_bad"]:
                raise UserError(f"{text}; repair or remove it, or leave out such images with --skip-bad")
            self._report(text)

    def _leave_out_small_batch(self, batch, min_images: int) -> dict[int, str]:
        """Print one line for each image of a batch that is too small. Returns the errors of all its images."""
        errors = dict(batch.errors)
        for item, key in zip(batch.items, batch.keys, strict=True):
            size = f"a batch of {len(batch.x)}, and batch norm needs at least {min_images}"
            errors[key[1]] = f"{printable(item.path)} (the other images of its batch cannot be used: {size})"
            self._report(errors[key[1]])
        return errors

    def _report(self, text: str) -> None:
        if text not in self.reported:
            logger.warning("left out: %s", text)
            self.reported.add(text)

    # --- the end of an epoch

    def end_epoch(self, values: dict[str, float | None], score: str, numbered: NumberedFiles | None) -> None:
        """Record a finished epoch, and write what is due: the best state so far, the numbered files, the last state.

        Args:
            values: values to record, by name. None and non-finite values are recorded as missing.
            score: name of the value by which epochs are compared, where higher is better. Without validation it is
                not among the values. A score that is not finite is never the best.
            numbered: makes the numbered files of the epoch; None: this epoch has none.
        """
        self._record(values)
        progress = self.progress
        progress.next_epoch()
        value = values.get(score)
        if value is not None and not math.isfinite(value):
            logger.warning(
                "warning: %s is %s in epoch %d, which therefore cannot be the best", score, value, progress.epoch - 1
            )
            value = None
        is_best = value is not None and (progress.best is None or value > progress.best)
        if is_best:
            progress.best = value
        if not self.world.is_main or not (is_best or numbered):
            return
        state = self.state()
        if is_best:
            self.folder.save(self.folder.best.name, state)
        if numbered:
            for name, content in numbered(state).items():
                self.folder.save(name, content)
                self._delete_older(name)
        self._save_last(state)  # after the others: whatever a kill interrupts is written again by the resumed run
        self.saved_at = time.monotonic()

    def _delete_older(self, name: str) -> None:
        """Delete numbered files of the kind of `name`, but for the --keep-last newest."""
        keep = self.settings["keep_last"]
        if not keep:
            return
        pattern = re.compile(re.sub(r"\d+", r"(\\d+)", re.escape(name), count=1))
        found = []
        for path in self.folder.path.iterdir():
            match = pattern.fullmatch(path.name)
            if match and path.name in self.folder.files:
                found.append((int(match[1]), path))
        for _, path in sorted(found)[:-keep]:
            self.folder.delete(path)

    def _record(self, values: Mapping[str, float | None]) -> None:
        """Write the values of an epoch to stats.jsonl, TensorBoard and the log."""
        minutes = self._minutes_left()
        self.epoch_began = None
        if self.writer is None:
            return
        if self.folder.replacing:
            self.save()  # the records of the earlier run go with its checkpoints, and before the first own record
        epoch = self.progress.epoch
        finite = {}
        for name, value in {**values, "learning_rate": self.stepper.optimizer.param_groups[0]["lr"]}.items():
            finite[name] = value if value is not None and math.isfinite(value) else None
        with (self.folder.path / STATS).open("a") as file:
            file.write(json.dumps({"epoch": epoch, **finite}) + "\n")
        words = []
        for name, value in finite.items():
            if value is not None:
                self.writer.add_scalar(name, value, epoch + 1)
            words.append(f"{name} {'-' if value is None else f'{value:.4g}'}")
        left = f"  (about {minutes:.0f} min left)" if minutes >= 1 else ""
        logger.info("epoch %d: %s%s", epoch, "  ".join(words), left)

    def _minutes_left(self) -> float:
        """Estimate the minutes that the remaining epochs take, if each is like this one.

        The time counts from the first training step, so that work that is done once, such as filling the residual
        cache, is left out. The part of a resumed epoch is scaled up to a whole one.
        """
        steps = self.progress.step - self.first_step
        if self.epoch_began is None or steps <= 0:
            return 0.0
        minutes = (time.monotonic() - self.epoch_began) / 60
        return minutes * (self.progress.step / steps) * (self.epochs - self.progress.epoch - 1)

    def pictures(self, name: str, images: Tensor, finished: int) -> None:
        """Write images (B, 3, H, W) in [0, 1] to TensorBoard. finished: number of finished epochs."""
        if self.writer is not None and len(images):
            self.writer.add_images(name, images.detach().float().clamp(0, 1).cpu(), finished)


def _fill(batch, min_images: int):
    """Repeat the rows of a batch until it has `min_images`, with weight 0: a batch that changes no gradient.

    Raises:
        UserError: if the batch has no rows.
    """
    if not len(batch.x):
        reason = next(iter(batch.errors.values()))
        raise UserError(f"{reason}; and this process has read no other image with which to take the step")
    times = math.ceil(min_images / len(batch.x))
    return batch._replace(
        x=torch.cat([batch.x] * times),
        labels=torch.cat([batch.labels] * times),
        weights=torch.zeros(len(batch.weights) * times),
        items=batch.items * times,
        keys=batch.keys * times,
    )
