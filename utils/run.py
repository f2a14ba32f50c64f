"""A training run: the initial checkpoint, the batches, the saved states and the records of the run."""

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
from utils.checkpoints import Checkpoint, read_checkpoint_if_path_is_given
from utils.console import make_printable
from utils.errors import UserError
from utils.optimizers import get_learning_rates
from utils.random_streams import seed_torch_for_step
from utils.run_folder import EVENTS, STATS, RunFolder
from utils.signals import Stopped, StopSignal
from utils.training import NotFinite, Stepper

logger = logging.getLogger(__name__)

# Type of a function that takes the state of a run, and returns numbered checkpoints as a dict {file name: content}
NumberedFiles = Callable[[dict], dict[str, dict]]


# --- where a run starts -------------------------------------------------------------------------------------


def read_starting_checkpoint(
    resume: str | None, init: str | None, states: Sequence[Path]
) -> tuple[Checkpoint | None, Checkpoint | None]:
    """Read the checkpoint that a run starts from.

    Args:
        resume: value of `--resume`: a file, "auto", or None.
        init: value of `--init`: a file with weights, which is used if `resume` gives no file.
        states: paths at which `--resume auto` looks for a saved training state.

    Returns:
        origin: the checkpoint from which the run loads its weights, or None if no file gives initial weights.
        resumed: the checkpoint whose run is continued, or None if a new run begins.

    Raises:
        UserError: if several state files exist for `--resume auto`, or if a file cannot be read.
    """
    if resume == "auto":
        resume = _find_single_state_file(states)
    if resume or init:
        logger.info("loading the checkpoint %s", make_printable(resume or init))
    origin = read_checkpoint_if_path_is_given(resume or init)
    if not resume:
        return origin, None
    if init:
        logger.info(
            "the run starts from %s (--resume), and ignores --init %s", make_printable(resume), make_printable(init)
        )
    if "progress" in origin.content:
        return origin, origin
    logger.info("%s holds weights but no training state: a new run starts from the weights", make_printable(resume))
    return origin, None


def _find_single_state_file(states: Sequence[Path]) -> str | None:
    """Return the only existing file of `states`, or None if no file exists."""
    found = [str(path) for path in states if path.exists()]
    if len(found) > 1:
        runs = ", ".join(map(make_printable, found))
        raise UserError(f"--resume auto found {len(found)} runs ({runs}): choose one of them with --resume FILE")
    if not found:
        logger.info("nothing to resume: a new run starts")
        return None
    logger.info("resuming %s", make_printable(found[0]))
    return found[0]


# --- the run ------------------------------------------------------------------------------------------------


class Run(contextlib.AbstractContextManager):
    """A context manager that saves the states and records of a training run, and stops the run after a signal.

    The state is saved every --save-minutes minutes of training, and when a signal or an error ends the run, unless the
    loss or a gradient is not finite, or the checkpoints of a finished epoch cannot be written. The records are
    config.json, stats.jsonl, TensorBoard files and one log line per epoch.

    Args:
        about: entries of config.json and of every saved state, with the key "settings".
        networks: function that returns the networks' part of the state, such as their weights, and that only the main
            process calls.
    """

    def __init__(self, folder: RunFolder, about: dict, networks: Callable[[], dict], stepper: Stepper, epochs: int):
        self.folder, self.about, self.networks, self.stepper, self.epochs = folder, about, networks, stepper, epochs
        self.world, self.progress, self.settings = stepper.world, stepper.progress, about["settings"]
        self.first_epoch = self.progress.epoch
        self.saved_at = time.monotonic()
        self.epoch_began: float | None = None  # time at which this process began to train the current epoch
        self.first_step = 0  # first step of this process in the current epoch; above 0 if the epoch is resumed
        self.reported: set[str] = set()  # messages about left-out images that this run has logged already
        self.ending_epoch = False  # whether the checkpoints of a finished epoch are being written
        self.stop = StopSignal()
        self.writer = None
        if self.world.is_main:
            from torch.utils.tensorboard import SummaryWriter  # imported here, because the import takes seconds

            already_finished = folder.continued and self.first_epoch >= epochs and folder.last.exists()
            if not already_finished:
                folder.write_config_and_trim_stats(about, self.first_epoch)
            self.writer = SummaryWriter(str(folder.path / EVENTS), purge_step=self.first_epoch + 1)

    def __enter__(self) -> "Run":
        self.stop.__enter__()
        return self

    def __exit__(self, _type: type | None, error: BaseException | None, _traceback) -> None:
        self.stop.__exit__()
        if isinstance(error, NotFinite):
            last = self.folder.last
            saved = make_printable(last) if last.exists() else "none"
            raise UserError(f"{error}; last saved state, from which --resume continues: {saved}") from error
        if isinstance(error, Exception) and not isinstance(error, Stopped):
            if self.progress.total_steps and not self.ending_epoch:
                self.save_state()
            if self.stop.received:  # after a signal, other processes stop too, which can cause `error` in this one
                raise Stopped(self.stop.received) from error
        # If a finished run is resumed into another folder, no epoch is trained, so this folder has no state yet.
        if error is None and (self.folder.replacing or not self.folder.last.exists()):
            self.save_state()
        if error is None and self.writer:
            self.writer.close()
            already = " already" if self.first_epoch >= self.epochs else ""
            folder = make_printable(self.folder.path)
            text = "the training is finished%s: %d epochs are trained; all files are in %s"
            logger.info(text, already, self.progress.epoch, folder)

    # --- saving

    def collect_run_state(self) -> dict:
        """Return the state of the run: everything that is needed to use the networks and to continue the training."""
        networks = self.networks()
        return {**self.about, **networks, **self.stepper.state_dict(), "epoch": self.progress.epoch}

    def save_state(self) -> None:
        """Write the state of the run to last.pth or last.pth.tar."""
        if self.world.is_main:
            self._save_as_last_state(self.collect_run_state())
        self.saved_at = time.monotonic()

    def _save_as_last_state(self, state: dict) -> None:
        self.folder.save_checkpoint(self.folder.last.name, state)
        self.folder.delete_files_of_replaced_run()

    def _save_state_if_due(self, training: bool) -> None:
        """Save the state if it is due by --save-minutes; after SIGINT or SIGTERM, save it and raise `Stopped`.

        In training, all processes stop after the same batch, so that no process waits forever for a stopped process.
        """
        due = training and time.monotonic() - self.saved_at >= self.settings["save_minutes"] * 60
        signal_number = self.stop.received or 0
        if training and self.world.size > 1:
            values = torch.tensor([float(signal_number), float(due)], device=self.stepper.compute.device)
            signal_number, due = distributed.all_reduce_max(values, self.world).tolist()
        if signal_number or due:
            self.save_state()
        if signal_number:
            raise Stopped(int(signal_number))

    # --- batches

    def iterate_batches(
        self, loader: Iterable, description: str, training: bool = False, min_images: int = 1
    ) -> Iterator:
        """Iterate over the batches of a loader, and save the state of the run between batches.

        A batch with fewer than `min_images` images is skipped in validation and in training with a single process. In
        training with several processes, a batch with too few images is replaced by an earlier batch or by repeated
        images, with the weight 0 in the loss, because every process must take part in every optimizer step.

        Args:
            loader: iterable of batches (data.datasets.Batch).
            training: whether the caller takes an optimizer step with each batch.
            min_images: smallest number of images in a yielded batch: 2 if a batch-norm layer gets only one value per
                channel from an image, else 1.

        Raises:
            UserError: if an image cannot be used, and --skip-bad is not given.
            Stopped: if the program has received SIGINT or SIGTERM.
        """
        if training and self.epoch_began is None:
            self.epoch_began, self.first_step = time.monotonic(), self.progress.step
        usable = None  # the last batch with at least `min_images` images
        for batch in console.progress_bar(loader, description):
            self._report_image_errors(batch.errors)
            if training:
                seed_torch_for_step(self.settings["seed"], self.progress.epoch, self.progress.step, self.world.rank)
            if len(batch.x) >= max(min_images, 1):
                usable = batch
                yield batch
            else:
                errors = self._log_images_of_too_small_batch(batch, min_images)
                if training and self.world.size > 1:
                    yield _repeat_images_to_fill_batch(usable or batch, min_images)._replace(errors=errors)
                elif training:
                    self.progress.count_skipped_batch(len(errors))
            self._save_state_if_due(training)

    def _report_image_errors(self, errors: Mapping[int, str]) -> None:
        """Log each image that cannot be used or, without --skip-bad, raise a UserError for the first image."""
        for text in errors.values():
            if text in self.reported:
                continue
            if not self.settings["skip_bad"]:
                raise UserError(f"{text}; repair or remove the image, or leave out such images with --skip-bad")
            self._log_left_out_image(text)

    def _log_images_of_too_small_batch(self, batch, min_images: int) -> dict[int, str]:
        """Log that all images of a batch are left out, and return the reasons by index of the image in the dataset."""
        errors = dict(batch.errors)
        for item, key in zip(batch.items, batch.keys, strict=True):
            size = f"a batch of {len(batch.x)}, and batch norm needs at least {min_images}"
            errors[key.index] = f"{make_printable(item.path)} (the other images of its batch cannot be used: {size})"
            self._log_left_out_image(errors[key.index])
        return errors

    def _log_left_out_image(self, text: str) -> None:
        if text not in self.reported:
            logger.warning("image left out: %s", text)
            self.reported.add(text)

    # --- the end of an epoch

    def end_epoch(self, values: dict[str, float | None], score_name: str, numbered: NumberedFiles | None) -> None:
        """Record a finished epoch, and write its checkpoints.

        The checkpoint best.* is written if the epoch has the best score so far. Whenever best.* or a numbered
        checkpoint is written, the state is also saved as last.*.

        Args:
            values: dict from the name of a quantity, such as "psnr", to its value in the finished epoch. NaN and
                infinite values are written as null to stats.jsonl.
            score_name: key in `values` of the score that selects the best epoch: the epoch with the highest finite
                score. In a run without validation images, `values` does not contain this key.
            numbered: function that takes the state and returns the numbered checkpoints of the epoch, or None for no
                numbered checkpoint.
        """
        self._write_values_of_epoch_to_logs(values)
        progress = self.progress
        progress.start_next_epoch()
        value = values.get(score_name)
        if value is not None and not math.isfinite(value):
            logger.warning(
                "warning: the score %s is not finite (%s) in epoch %d: this epoch is not saved as the best epoch",
                score_name,
                value,
                progress.epoch - 1,
            )
            value = None
        is_best = value is not None and (progress.best is None or value > progress.best)
        if is_best:
            progress.best = value
        if not self.world.is_main or not (is_best or numbered):
            return
        # If the run is killed before last.* is saved, the resumed run writes best.* and the numbered checkpoints again.
        self.ending_epoch = True
        state = self.collect_run_state()
        if is_best:
            self.folder.save_checkpoint(self.folder.best.name, state)
        if numbered:
            for name, content in numbered(state).items():
                self.folder.save_checkpoint(name, content)
                self._delete_older_checkpoints(name)
        self._save_as_last_state(state)
        self.ending_epoch = False
        self.saved_at = time.monotonic()

    def _delete_older_checkpoints(self, name: str) -> None:
        """If --keep-last N is given, keep only the N newest checkpoints whose names equal `name` but for the epoch."""
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
            self.folder.delete_file(path)

    def _write_values_of_epoch_to_logs(self, values: Mapping[str, float | None]) -> None:
        """Write the values of an epoch to stats.jsonl, TensorBoard and the log."""
        minutes = self._estimate_minutes_left()
        self.epoch_began = None
        if self.writer is None:
            return
        if self.folder.replacing or not self.folder.last.exists():
            # With --overwrite, the first call of `save_state` deletes the lines of the replaced run from stats.jsonl.
            # A folder with best.* or numbered checkpoints, but without last.*, could not be resumed.
            self.save_state()
        epoch = self.progress.epoch
        finite = {}
        for name, value in {**values, **get_learning_rates(self.stepper.optimizer)}.items():
            finite[name] = value if value is not None and math.isfinite(value) else None
        with (self.folder.path / STATS).open("a") as file:
            file.write(json.dumps({"epoch": epoch, **finite}) + "\n")
        words = []
        for name, value in finite.items():
            if value is not None:
                self.writer.add_scalar(name, value, epoch + 1)
            words.append(f"{name} {'-' if value is None else f'{value:.4g}'}")
        left = f"  (about {minutes:.0f} min left)" if minutes >= 1 else ""
        logger.info("epoch %d is finished, with the values %s%s", epoch, "  ".join(words), left)

    def _estimate_minutes_left(self) -> float:
        """Estimate how many minutes the remaining epochs take, from the duration of the current epoch.

        The duration is measured from the first training step, because earlier work, such as filling the residual cache,
        is done only once.
        """
        steps = self.progress.step - self.first_step
        if self.epoch_began is None or steps <= 0:
            return 0.0
        minutes = (time.monotonic() - self.epoch_began) / 60
        return minutes * (self.progress.step / steps) * (self.epochs - self.progress.epoch - 1)

    def write_images_to_tensorboard(self, name: str, images: Tensor, finished: int) -> None:
        """Write images (B, 3, H, W) in [0, 1] to TensorBoard.

        Args:
            finished: number of finished epochs.
        """
        if self.writer is not None and len(images):
            self.writer.add_images(name, images.detach().float().clamp(0, 1).cpu(), finished)


def _repeat_images_to_fill_batch(batch, min_images: int):
    """Repeat the images of a batch, with the weight 0 in the loss, until the batch has `min_images` images."""
    if not len(batch.x):
        reason = next(iter(batch.errors.values()))
        raise UserError(
            f"{reason}; without this image, one of the processes has no image to train on: repair the image, or use a"
            " larger --batch-size"
        )
    times = math.ceil(min_images / len(batch.x))
    return batch._replace(
        x=torch.cat([batch.x] * times),
        labels=torch.cat([batch.labels] * times),
        weights=torch.zeros(len(batch.weights) * times),
        items=batch.items * times,
        keys=batch.keys * times,
    )
