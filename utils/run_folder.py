"""The output folder of a training run, and the list of the files in it that the programs may replace or delete."""

import contextlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from utils import checkpoints
from utils.checkpoints import Checkpoint
from utils.compute import package_versions
from utils.console import make_printable
from utils.distributed import World, broadcast_from_main
from utils.errors import UserError
from utils.files import hold_lock_file, make_folder, open_for_atomic_write, remove_leftover_temporary_files, write_json

logger = logging.getLogger(__name__)

RECORD_FORMAT = "beyond-the-spectrum run, version 1"
RECORD, STATS, EVENTS = "config.json", "stats.jsonl", "tensorboard"
# CHECKPOINT_NAMES maps the file ending of checkpoints to a regular expression for their names.
CHECKPOINT_NAMES = {
    ".pth.tar": r"(\d+(_sr)?|best|last)\.pth\.tar",  # names of the checkpoints that train_detector.py writes
    ".pth": r"(epoch_\d+|best|last)\.pth",  # names of the checkpoints that train_sr.py writes
}


class RunFolder:
    """The output folder of a run, in which config.json lists the files that the run has written.

    A file is replaced or deleted only if config.json lists the file. With --overwrite, the files of an earlier run are
    kept until the new run has saved a state, because the new run may start from the weights in an earlier checkpoint.

    Args:
        last: path of the last state, last.pth or last.pth.tar, in the output folder.
    """

    def __init__(self, last: Path):
        self.last, self.path = last, last.parent
        self.best = last.with_name(last.name.replace("last", "best"))
        self.pattern = CHECKPOINT_NAMES[".pth.tar" if last.name.endswith(".pth.tar") else ".pth"]
        self.record: dict = {}
        self.files: set[str] = set()  # names of the files that config.json lists
        self.continued = False  # whether this run continues an earlier run in the same folder
        self.older = False  # whether this run continues from an older checkpoint than the last state in the folder
        self.replacing = False  # whether an earlier run's files must be deleted after this run has saved a state
        self.replaced: list[Path] = []  # checkpoints and TensorBoard files of an earlier run that must be deleted

    def prepare_for_run(self, resumed: Checkpoint | None, overwrite: bool) -> str | None:
        """Read config.json, and determine whether the run is new, continues an earlier run, or replaces an earlier run.

        Args:
            resumed: the state from which the run continues, or None for a new run.

        Returns:
            None, or one line that says why the run must not write into the folder.
        """
        self.files = self._read_written_file_names_from_config()
        if resumed is not None:
            state = Path(resumed.name)  # this path may be a symbolic link or contain a symbolic link
            self.continued = self.path.resolve() in (state.parent.resolve(), state.resolve().parent)
        if self.continued:
            name = Path(resumed.name).name
            self.files.add(name)
            if overwrite:
                logger.info(
                    "--overwrite is not used, because --resume continues the run in %s", make_printable(self.path)
                )
            self.older = self.last.exists() and state.resolve() != self.last.resolve()
        for path in sorted(self.path.iterdir()):
            if self._is_output_file_of_run(path.name) and path.name not in self.files:
                return (
                    f"{make_printable(path)} is not recorded as a file of an earlier run, and would be replaced: move"
                    " the file, or write elsewhere"
                )
        earlier = [self.path / name for name in sorted(self.files) if re.search(r"\.pth(\.tar)?$", name)]
        earlier = [path for path in earlier if path.exists()]
        if self.continued or not earlier:
            return None
        if not any(self._is_output_file_of_run(path.name) for path in earlier):
            return f"{make_printable(self.path)} holds a run of another program: write elsewhere"
        if not overwrite:
            return (
                f"{make_printable(self.path)} holds a run already: --resume auto continues it, --overwrite replaces it"
                " by a new run; or write elsewhere"
            )
        self.replacing = True
        self.replaced = earlier
        return None

    def write_config_and_trim_stats(self, about: Mapping, first_epoch: int) -> None:
        """Write config.json, and delete from stats.jsonl the lines of the epochs that this run trains again.

        If the run replaces an earlier run, the lines of the earlier run are deleted later, by
        `delete_files_of_replaced_run`.
        """
        remove_leftover_temporary_files(self.path, self._regex_of_written_file_names())
        self.record = {**about, "versions": package_versions(), "format": RECORD_FORMAT}
        self.files |= {RECORD, STATS, EVENTS}
        self._write_config_json()
        events = sorted(self.path.glob(f"{EVENTS}/events.out.tfevents.*"))
        if self.continued:
            self._keep_stats_of_first_epochs(first_epoch)
        elif self.replacing:
            self.replaced += events
        else:
            self._keep_stats_of_first_epochs(0)
            for path in events:
                path.unlink()

    def _keep_stats_of_first_epochs(self, epochs: int) -> None:
        """Keep the lines of the first `epochs` epochs in stats.jsonl, and delete all later lines."""
        kept, later = [], 0
        stats = self.path / STATS
        if epochs > 0 and stats.exists():
            for line in stats.read_text().splitlines(keepends=True):
                complete = line.endswith("}\n")  # the last line may be incomplete after a power failure
                if complete and json.loads(line)["epoch"] < epochs:
                    kept.append(line)
                elif complete:
                    later += 1
        if later and self.older:
            text = "warning: the run goes back to epoch %d, trains %d later epochs again and replaces their checkpoints"
            logger.warning(text, epochs, later)
        with open_for_atomic_write(stats) as file:
            file.write("".join(kept).encode())

    def save_checkpoint(self, name: str, content: dict) -> None:
        """Add the name of a checkpoint to config.json, and then write the checkpoint.

        If the run is killed while it writes the checkpoint, config.json already lists the name of the checkpoint.
        """
        if name not in self.files:
            self.files.add(name)
            self._write_config_json()
        checkpoints.save_checkpoint(content, self.path / name)
        if self.path / name in self.replaced:
            self.replaced.remove(self.path / name)

    def delete_files_of_replaced_run(self) -> None:
        """Delete the files of the run that --overwrite replaces, except files that the new run has overwritten."""
        if self.replacing:
            self._keep_stats_of_first_epochs(0)
            for path in self.replaced:
                self.delete_file(path)
            self.replacing = False

    def delete_file(self, path: Path) -> None:
        """Delete a file of a run, and remove the name of the file from config.json."""
        path.unlink(missing_ok=True)
        self.files.discard(path.name)
        self._write_config_json()

    def _write_config_json(self) -> None:
        write_json(self.path / RECORD, {**self.record, "files": sorted(self.files)})

    def _read_written_file_names_from_config(self) -> set[str]:
        """Read from config.json which files earlier runs have written."""
        try:
            record = json.loads((self.path / RECORD).read_text())
            if record["format"] == RECORD_FORMAT:
                return {name for name in record["files"] if self._is_name_without_folder(name)}
        except (OSError, ValueError, TypeError, KeyError):
            pass
        return set()

    @staticmethod
    def _is_name_without_folder(name: object) -> bool:
        return isinstance(name, str) and Path(name).name == name

    def _is_output_file_of_run(self, name: str) -> bool:
        return name in (RECORD, STATS, EVENTS) or re.fullmatch(self.pattern, name) is not None

    def _regex_of_written_file_names(self) -> str:
        """Return a regular expression that matches the names of the files that config.json lists."""
        return "|".join(re.escape(name) for name in sorted(self.files)) or r"(?!)"


@contextlib.contextmanager
def open_run_folder(last: Path, world: World, resumed: Checkpoint | None, overwrite: bool) -> Iterator[RunFolder]:
    """Create the output folder of a run, and keep other runs out of the folder while the `with` block runs.

    Args:
        last: path of the last state, last.pth or last.pth.tar, in the output folder.
        resumed: the state from which the run continues, or None for a new run.
        overwrite: whether a new run may replace an earlier run.

    Raises:
        UserError: if no file can be written into the folder, or if another run is writing into the folder.
        UserError: if the folder holds an earlier run that this run neither continues nor may replace.
        UserError: if this run would replace a file that config.json does not list.
    """
    folder = RunFolder(last)
    make_folder(folder.path)
    with hold_lock_file(folder.path / ".lock", world):
        refusal = folder.prepare_for_run(resumed, overwrite) if world.is_main else None
        refusal = broadcast_from_main(refusal, world)
        if refusal:
            raise UserError(refusal)
        yield folder
