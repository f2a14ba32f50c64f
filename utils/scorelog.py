"""The score table while it is written: by several processes, killed, and gone on with.

Each process of each start writes a part, P.csv.K.part, and beside it, in P.csv.K.stamps, four numbers a row: the index
of the image in the list, size and time stamp of its file, and where the row ends in the part. So a row counts if all of
it is there, and for the file it was made from. When every image has one, they become P.csv in the order of the list.
What the parts are of is in P.csv.job, what a finished table is of in P.json: another detector, setting or list of
images never goes on with them.
"""

import hashlib
import heapq
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np

from data.lists import Item
from utils.distributed import World, from_main, wait_for_all
from utils.run import UserError, shown, write_json
from utils.scores import Row, RowWriter, read_rows, row_of

logger = logging.getLogger(__name__)


def file_stamps(items: Sequence[Item]) -> np.ndarray:
    """(N, 2) int64: size in bytes and time stamp in ns of each file; -1 if there is none."""
    stamps = np.full((len(items), 2), -1, np.int64)
    for i, item in enumerate(items):
        with suppress(OSError):
            status = os.stat(item.path)
            stamps[i] = status.st_size, status.st_mtime_ns
    return stamps


class ScoreLog:
    """The rows of one table.

    Args:
        table: where it will be.
        items: the images, in the order of the table. stamps: of their files (`file_stamps`).
        job: all that the scores depend on besides the files, ready for JSON; "stability": whether there is that column.
    """

    def __init__(self, table: Path, items: Sequence[Item], stamps: np.ndarray, job: dict, world: World):
        self.table, self.items, self.stamps, self.world = table, items, stamps, world
        self.job, self.job_file = json.loads(json.dumps(job)), table.with_name(f"{table.name}.job")
        self.identity = {"job": self.job, "files": hashlib.sha256(stamps.tobytes()).hexdigest()[:16]}
        self.done = np.zeros(len(items), bool)

    def open(self, overwrite: bool) -> bool:
        """Find out what there is. Returns False if the table is finished.

        Raises:
            UserError: if the parts are of another job.
        """
        parts, before = {} if overwrite else self._parts(), _read_json(self.job_file)
        finished = self.identity.items() <= _read_json(self.table.with_suffix(".json")).items() and not parts
        if from_main(finished and self.table.exists() and not overwrite, self.world):
            logger.info("%s is finished already (--overwrite scores anew)", shown(self.table))
            return False
        if self.table.exists() and not overwrite and not parts:
            logger.info("%s, of another job or of files that have changed, will be replaced", shown(self.table))
        if parts and before != self.job:
            changed = [k for k in sorted(before.keys() | self.job.keys()) if before.get(k) != self.job.get(k)]
            way_out = "finish that one, choose another --save_path, or begin anew with --overwrite"
            got = f"has rows of an unfinished run of another job (it differs in {', '.join(changed)})"
            raise UserError(f"{shown(self.table)} {got}: {way_out}")
        for part in parts.values():
            index = self._valid(part)
            self.done[index[index >= 0]] = True
        if self.done.any():
            logger.info("going on after %d of %d images already scored", self.done.sum(), len(self.items))
        wait_for_all(self.world)  # all have looked before anyone writes
        if self.world.is_main:
            self._delete_parts() if overwrite else None
            write_json(self.job_file, self.job)
        wait_for_all(self.world)
        self.part = self.table.with_name(f"{self.table.name}.{max(parts, default=-1) + 1 + self.world.rank}.part")
        self.writer = RowWriter(self.part, stability=self.job["stability"])
        self.stamp_file = self.part.with_suffix(".stamps").open("wb")
        return True

    def missing(self, block: int) -> np.ndarray:
        """Indices of the images that lack a row. Process r of n scores the blocks r, r + n, ... of `block` images each."""
        missing = np.flatnonzero(~self.done)
        return missing[missing // block % self.world.size == self.world.rank]

    def write(self, rows: Mapping[int, Row]) -> None:
        """Rows by the index of their image, ascending. What this has returned from is in the files."""
        self.writer.write(*rows.values())
        index, end = np.fromiter(rows, np.int64), os.stat(self.part).st_size
        self.stamp_file.write(np.column_stack([index, self.stamps[index], np.full_like(index, end)]).tobytes())
        self.stamp_file.flush()

    def close(self) -> None:
        """Make the table of all parts, once every process is here. Raises UserError if rows are missing (a lost part)."""
        self.writer.close()
        self.stamp_file.close()
        wait_for_all(self.world)
        if not self.world.is_main:
            return
        whole, missing = self.table.with_name(f".{self.table.name}.whole"), len(self.items)
        rows = heapq.merge(*map(self._rows, self._parts().values()), key=itemgetter(0))
        with RowWriter(whole, stability=self.job["stability"]) as writer:
            for index, same in groupby(rows, key=itemgetter(0)):
                # Named as in this start's list: the file may have been written otherwise when it was scored
                writer.write(Row(*row_of(self.items[index])[:3], *next(same)[1][3:]))
                missing -= 1
        if missing:
            raise UserError(f"{missing} images have no row (was a part deleted?): start again to score them")
        whole.replace(self.table)

    def finish(self, about: dict) -> None:
        """Write P.json, which says that the table is finished, and delete the parts. Main process only."""
        write_json(self.table.with_suffix(".json"), {**about, **self.identity})
        self._delete_parts()

    def _parts(self) -> dict[int, Path]:
        """The parts there are, by their numbers."""
        named = re.compile(re.escape(self.table.name) + r"\.(\d+)\.part")
        found = ((named.fullmatch(path.name), path) for path in self.table.parent.iterdir())
        return {int(match[1]): path for match, path in found if match}

    def _delete_parts(self) -> None:
        for part in self._parts().values():
            part.unlink()
            part.with_suffix(".stamps").unlink(missing_ok=True)
        self.job_file.unlink(missing_ok=True)

    def _valid(self, part: Path) -> np.ndarray:
        """The index of the image of each row that is in a part; -1 where the file is another one by now."""
        stamps, numbers = part.with_suffix(".stamps"), np.empty(0, np.int64)
        if stamps.exists():
            numbers = np.fromfile(stamps, np.int64)
        numbers = numbers[: len(numbers) // 4 * 4].reshape(-1, 4)
        numbers = numbers[numbers[:, 3] <= os.stat(part).st_size]
        return np.where((self.stamps[numbers[:, 0]] == numbers[:, 1:3]).all(axis=1), numbers[:, 0], -1)

    def _rows(self, part: Path) -> Iterator[tuple[int, Row]]:
        """The valid rows of a part, with the index of their image."""
        index = self._valid(part).tolist()
        return ((i, row) for i, row in zip(index, read_rows(part) if index else (), strict=False) if i >= 0)


def _read_json(path: Path) -> dict:
    """The object in a file; empty if there is none."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}
