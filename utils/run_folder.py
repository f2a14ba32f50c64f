"""The folder of a training run: which files in it the run has written, and what it may replace or delete."""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from utils import checkpoints
from utils.checkpoints import Checkpoint
from utils.compute import versions
from utils.console import printable
from utils.distributed import World, broadcast_from_main
from utils.errors import UserError
from utils.files import atomic, exclusive_writer, make_folder, remove_unfinished, write_json

RECORD_FORMAT = "beyond-the-spectrum run, version 1"
RECORD, STATS, EVENTS = "config.json", "stats.jsonl", "tensorboard"
# Names of the checkpoints that a trainer writes, by the ending of its last state
CHECKPOINT_NAMES = {
    ".pth.tar": r"(\d+(_sr)?|best|last)\.pth\.tar",  # train_detector.py
    ".pth": r"(epoch_\d+|best|last)\.pth",  # train_sr.py
}


class RunFolder:
    """The folder of a run, with the record of the files that the run has written there (config.json).

    No file is replaced or deleted unless the record names it. The files of an earlier run, which --overwrite replaces,
    are deleted when the first state of the new run is on disk: the new run may have started from them, and may fail.

    Args:
        last: the file of the last state. Its folder is the folder of the run.
    """

    def __init__(self, last: Path):
        self.last, self.path = last, last.parent
        self.best = last.with_name(last.name.replace("last", "best"))
        self.pattern = CHECKPOINT_NAMES[".pth.tar" if last.name.endswith(".pth.tar") else ".pth"]
        self.record: dict = {}
        self.files: set[str] = set()  # names of the files that the record names
        self.continued = False  # whether the run continues the run in the folder
        self.replacing = False  # whether the files of an earlier run are still there, until the first save
        self.replaced: list[Path] = []  # its checkpoints and TensorBoard files

    def open(self, resumed: Checkpoint | None, overwrite: bool) -> str | None:
        """Read the record, and find out whether the run may write here.

        Returns:
            One line that says why the run may not write here, or None.
        """
        self.files = self._recorded_files()
        if resumed is not None:
            state = Path(resumed.name)  # it may be a symbolic link, or be named through one
            self.continued = self.path.resolve() in (state.parent.resolve(), state.resolve().parent)
        if self.continued:
            self.files.add(Path(resumed.name).name)
        for path in sorted(self.path.iterdir()):
            if self._is_run_file(path.name) and path.name not in self.files:
                return (
                    f"{printable(path)} is not recorded as a file of an earlier run, and would be replaced: move it, or"
                    " write elsewhere"
                )
        earlier = [self.path / name for name in sorted(self.files) if re.search(r"\.pth(\.tar)?$", name)]
        earlier = [path for path in earlier if path.exists()]
        if self.continued or not earlier:
            return None
        if not any(self._is_run_file(path.name) for path in earlier):
            return f"{printable(self.path)} holds a run of another program: write elsewhere"
        if not overwrite:
            return (
                f"{printable(self.path)} holds a run already: --resume auto continues it, --overwrite replaces it by a"
                " new run; or write elsewhere"
            )
        self.replacing = True
        self.replaced = earlier
        return None

    def begin(self, about: Mapping, first_epoch: int) -> None:
        """Write the record, and bring the other records to the point at which this run starts."""
        remove_unfinished(self.path, self._recorded_names())
        self.record = {**about, "versions": versions(), "format": RECORD_FORMAT}
        self.files |= {RECORD, STATS, EVENTS}
        self._write_record()
        events = sorted(self.path.glob(f"{EVENTS}/events.out.tfevents.*"))
        if self.continued:
            self._keep_stats(first_epoch)
        elif self.replacing:
            self.replaced += events
        else:
            self._keep_stats(0)
            for path in events:
                path.unlink()

    def _keep_stats(self, epochs: int) -> None:
        """Keep the lines of the first epochs in stats.jsonl."""
        kept = []
        stats = self.path / STATS
        if epochs > 0 and stats.exists():
            for line in stats.read_text().splitlines(keepends=True):
                complete = line.endswith("}\n")  # the last line is incomplete if the machine lost power
                if complete and json.loads(line)["epoch"] < epochs:
                    kept.append(line)
        with atomic(stats) as file:
            file.write("".join(kept).encode())

    def save(self, name: str, content: dict) -> None:
        """Write a checkpoint whose name goes into the record first."""
        if name not in self.files:
            self.files.add(name)
            self._write_record()
        checkpoints.save(content, self.path / name)
        if self.path / name in self.replaced:
            self.replaced.remove(self.path / name)

    def delete_replaced(self) -> None:
        """Delete the files of the earlier run, if there are any, that the new run has not overwritten."""
        if self.replacing:
            self._keep_stats(0)
            for path in self.replaced:
                self.delete(path)
            self.replacing = False

    def delete(self, path: Path) -> None:
        """Delete a checkpoint, and its name from the record."""
        path.unlink(missing_ok=True)
        self.files.discard(path.name)
        self._write_record()

    def _write_record(self) -> None:
        write_json(self.path / RECORD, {**self.record, "files": sorted(self.files)})

    def _recorded_files(self) -> set[str]:
        """Read the names in the record. Without a record of this project, there are none."""
        try:
            record = json.loads((self.path / RECORD).read_text())
            if record["format"] == RECORD_FORMAT:
                return {name for name in record["files"] if self._is_plain_name(name)}
        except (OSError, ValueError, TypeError, KeyError):
            pass
        return set()

    @staticmethod
    def _is_plain_name(name: object) -> bool:
        return isinstance(name, str) and Path(name).name == name

    def _is_run_file(self, name: str) -> bool:
        return name in (RECORD, STATS, EVENTS) or re.fullmatch(self.pattern, name) is not None

    def _recorded_names(self) -> str:
        """Return a regular expression of the names in the record."""
        return "|".join(re.escape(name) for name in sorted(self.files)) or r"(?!)"


@contextlib.contextmanager
def run_folder(last: Path, world: World, resumed: Checkpoint | None, overwrite: bool) -> Iterator[RunFolder]:
    """Make the folder of a run, and keep other runs out of it while the `with` block runs.

    Args:
        last: the file of the last state, in the folder of the run.
        world: the processes of this run.
        resumed: the state from which the run continues; None for a new run.
        overwrite: whether a new run may replace an earlier one.

    Raises:
        UserError: if the folder cannot be written to, another run is writing there, it holds an earlier run that may
            not be replaced, or it holds files that this run would replace but no run has recorded.
    """
    folder = RunFolder(last)
    make_folder(folder.path)
    with exclusive_writer(folder.path / ".lock", world):
        refusal = folder.open(resumed, overwrite) if world.is_main else None
        refusal = broadcast_from_main(refusal, world)
        if refusal:
            raise UserError(refusal)
        yield folder
