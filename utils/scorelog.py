"""The score table while it is written: by several processes, killed, and gone on with.

Each process of each start writes a part, P.csv.K.part, and beside it, in P.csv.K.stamps, three numbers a row: the index
of the image in the list, the size of its file and its time stamp. So a row counts only for the file it was made from.
When every image has one, the rows become P.csv in the order of the list. P.csv.job says what the parts are of: another
detector, setting or list of images never goes on with them.
"""

import heapq
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data.datasets import Key
from data.lists import Item
from utils.distributed import World, from_main, wait_for_all
from utils.run import UserError, shown, write_json
from utils.scores import Row, RowWriter, read_rows, row_of

logger = logging.getLogger(__name__)


class ScoreLog:
    """The rows of one table.

    Args:
        table: where it will be.
        items: the images, in the order of the table.
        job: all that the scores depend on besides the files, ready for JSON.
        stability: whether the table has that column.
    """

    def __init__(self, table: Path, items: Sequence[Item], job: dict, stability: bool, world: World):
        self.table, self.items, self.world, self.stability = table, items, world, stability
        self.job = json.loads(json.dumps(job))
        self.stamps = np.array([stamp(item.path) for item in items], np.int64).reshape(-1, 2)  # (N, 2): size, time
        self.parts: list[Path] = []
        self.done = np.zeros(len(items), bool)

    def identity(self) -> dict:
        """What tells a finished table from one of other images, files, detector or settings."""
        import hashlib

        return {"job": self.job, "files": hashlib.sha256(self.stamps.tobytes()).hexdigest()[:16]}

    def open(self, overwrite: bool) -> bool:
        """Find out what there is. Returns False if the table is finished.

        Raises:
            UserError: if the parts are of another job.
        """
        job_file = self.table.with_name(f"{self.table.name}.job")
        finished = self.table.exists() and _subset(_read_json(self.table.with_suffix(".json")), self.identity())
        self.parts = sorted(self.table.parent.glob(f"{_escaped(self.table.name)}.*.part"))
        before = _read_json(job_file)
        if from_main(finished and not overwrite, self.world):
            logger.info("%s is finished already", shown(self.table))
            return False
        if self.parts and before != self.job and not overwrite:
            changed = [k for k in sorted(before.keys() | self.job.keys()) if before.get(k) != self.job.get(k)]
            raise UserError(
                f"{shown(self.table)} has rows of an unfinished run of another job (it differs in {', '.join(changed)}):"
                " finish that one, choose another --save_path, or begin anew with --overwrite"
            )
        wait_for_all(self.world)  # all have looked before anyone writes
        if overwrite and self.world.is_main:
            for part in self.parts:
                part.unlink()
                part.with_suffix(".stamps").unlink(missing_ok=True)
        self.parts = [] if overwrite else self.parts
        for part in self.parts:
            index = self._valid(part)
            self.done[index[index >= 0]] = True
        if self.done.any():
            logger.info("going on after %d of %d images already scored", self.done.sum(), len(self.items))
        if self.world.is_main:
            write_json(job_file, self.job)
        number = max((int(part.suffixes[-2][1:]) for part in self.parts), default=-1) + 1 + self.world.rank
        own = self.table.with_name(f"{self.table.name}.{number}.part")
        self.writer, self.own_stamps = RowWriter(own, stability=self.stability), own.with_suffix(".stamps").open("wb")
        return True

    def missing(self) -> Sequence[list[Key]]:
        """The keys of the images that lack a row, of which this process takes its share: one in `size`."""
        return _Singles(np.flatnonzero(~self.done)[self.world.rank :: self.world.size])

    def write(self, rows: dict[int, Row]) -> None:
        """Rows by the index of their image, ascending. What this has returned from is in the files."""
        self.writer.write(*rows.values())
        index = np.fromiter(rows, np.int64)
        self.own_stamps.write(np.column_stack([index, self.stamps[index]]).tobytes())
        self.own_stamps.flush()

    def close(self) -> None:
        """Make the table of all parts, once every process is here."""
        self.writer.close()
        self.own_stamps.close()
        wait_for_all(self.world)
        if not self.world.is_main:
            return
        parts = sorted(self.table.parent.glob(f"{_escaped(self.table.name)}.*.part"))
        whole = self.table.with_name(f".{self.table.name}.whole")
        with RowWriter(whole, stability=self.stability) as writer:
            for index, row in heapq.merge(*map(self._rows, parts), key=lambda entry: entry[0]):
                named = row_of(self.items[index])  # the file may have been written otherwise when it was scored
                writer.write(row._replace(path=named.path, label=named.label, generator=named.generator))
        whole.replace(self.table)
        for part in parts:
            part.unlink(missing_ok=True)
            part.with_suffix(".stamps").unlink(missing_ok=True)
        self.table.with_name(f"{self.table.name}.job").unlink(missing_ok=True)

    def _valid(self, part: Path) -> np.ndarray:
        """The index of the image of each row of a part; -1 where the file is another one by now."""
        numbers = np.fromfile(part.with_suffix(".stamps"), np.int64)
        numbers = numbers[: len(numbers) // 3 * 3].reshape(-1, 3)
        index = np.where(numbers[:, 0] < len(self.items), numbers[:, 0], 0)
        return np.where((self.stamps[index] == numbers[:, 1:]).all(axis=1), numbers[:, 0], -1)

    def _rows(self, part: Path) -> Iterator[tuple[int, Row]]:
        """The valid rows of a part, with the index of their image."""
        index = self._valid(part)
        if len(index):
            for i, row in zip(index.tolist(), read_rows(part), strict=False):  # the last may be torn
                if i >= 0:
                    yield i, row


class _Singles(Sequence):
    """A batch sampler of single images, which need not be held in memory."""

    def __init__(self, index: np.ndarray):
        self.index = index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> list[Key]:
        return [Key(0, int(self.index[i]))]


def stamp(path: str) -> tuple[int, int]:
    """(size in bytes, time stamp in ns) of a file; (-1, -1) if there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _read_json(path: Path) -> dict:
    """The object in a file; empty if there is none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _subset(whole: dict, part: dict) -> bool:
    return all(whole.get(name) == value for name, value in part.items())


def _escaped(name: str) -> str:
    """A file's name for `glob`."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
