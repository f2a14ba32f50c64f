"""The score table while it is written: by several processes, killed, and gone on with.

Each process of each start writes a part, P.csv.K.part, of JSON lines. The first line is the job: all that the scores
depend on besides the files; rows of another detector, setting or list of images are never taken over. Every further
line is a batch, so that all of it counts or, torn, nothing. A row counts only while its image's file has the size and
time stamp it had then. When every image has a row, they become P.csv in the order of the list, and P.json says of what.
"""

import hashlib
import heapq
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path

import numpy as np

from data.lists import Item
from evaluation.score_table import Row, read_record, row_of, write_table
from utils.console import printable
from utils.distributed import World, barrier, broadcast_from_main
from utils.errors import UserError
from utils.files import write_json

logger = logging.getLogger(__name__)


def file_stamps(items: Sequence[Item]) -> np.ndarray:
    """(N, 2) int64: size in bytes and time stamp in ns of each file; -1 if there is none."""
    stamps = np.full((len(items), 2), -1, np.int64)
    for i, item in enumerate(items):
        with suppress(OSError):
            status = os.stat(item.path)
            stamps[i] = status.st_size, status.st_mtime_ns
    return stamps


class ScoreWriter:
    """The rows of one table.

    Args:
        table: where it will be.
        items: the images, in the order of the table. stamps: of their files (`file_stamps`).
        job: all that the scores depend on besides the files, ready for JSON; "stability": whether there is that column.
    """

    def __init__(self, table: Path, items: Sequence[Item], stamps: np.ndarray, job: dict, world: World):
        self.table, self.items, self.stamps, self.world = table, items, stamps, world
        self.job = json.loads(json.dumps(job))
        self.identity = {"job": self.job, "files": hashlib.sha256(stamps.tobytes()).hexdigest()[:16]}
        self.done = np.zeros(len(items), bool)

    def open(self, overwrite: bool) -> bool:
        """Find out what there is. Returns False if the table is finished. Raises UserError if parts are of another job."""
        found = self._parts()
        parts = {} if overwrite else found
        replaced = self.table.exists() and not overwrite and not parts
        finished = replaced and self.identity.items() <= read_record(self.table).items()
        if broadcast_from_main(finished, self.world):
            logger.info("%s is finished already (--overwrite scores anew)", printable(self.table))
            return False
        if replaced:
            logger.info("%s, of another job or of files that have changed, will be replaced", printable(self.table))
        for part in parts.values():
            self._require_own(part)
            self.done[[index for index, _ in self._rows(part)]] = True
        if self.done.any():
            logger.info("going on after %d of %d images already scored", self.done.sum(), len(self.items))
        barrier(self.world)  # all have looked before anyone writes
        if overwrite and self.world.is_main:
            _delete(found)
        number = max(found, default=-1) + 1 + self.world.rank
        self.part = self.table.with_name(f"{self.table.name}.{number}.part").open("w")
        self._write(self.job)
        return True

    def missing(self, block: int) -> np.ndarray:
        """Indices of the images that lack a row. Process r of n scores the blocks r, r + n, ... of `block` images each."""
        missing = np.flatnonzero(~self.done)
        return missing[missing // block % self.world.size == self.world.rank]

    def write(self, rows: Mapping[int, Row]) -> None:
        """Rows by the index of their image, ascending. What this has returned from is in the file."""
        self._write([(int(i), self.stamps[i].tolist(), row[3:]) for i, row in rows.items()])

    def close(self) -> None:
        """Make the table of all parts, once every process is here. Raises UserError if a row is missing (a lost part)."""
        self.part.close()
        barrier(self.world)
        if self.world.is_main:
            write_table(self.table, self._all_rows(), self.job["stability"])

    def finish(self, about: dict) -> None:
        """Write P.json, which says that the table is finished, and delete the parts. Main process only."""
        write_json(self.table.with_suffix(".json"), {**about, **self.identity})
        _delete(self._parts())

    def _write(self, line: dict | list) -> None:
        self.part.write(json.dumps(line) + "\n")
        self.part.flush()

    def _parts(self) -> dict[int, Path]:
        """The parts there are, by their numbers."""
        named = re.compile(re.escape(self.table.name) + r"\.(\d+)\.part")
        found = ((named.fullmatch(path.name), path) for path in self.table.parent.iterdir())
        return {int(match[1]): path for match, path in found if match}

    def _require_own(self, part: Path) -> None:
        """Raises UserError if a part is of another job."""
        job = next(_lines(part), self.job)
        changed = [k for k in sorted(job.keys() | self.job.keys()) if job.get(k) != self.job.get(k)]
        if changed:
            got = f"has rows of an unfinished run of another job (it differs in {', '.join(changed)})"
            way_out = "finish that one, choose another --save_path, or begin anew with --overwrite"
            raise UserError(f"{printable(self.table)} {got}: {way_out}")

    def _rows(self, part: Path) -> Iterator[tuple[int, list]]:
        """Of each row in a part that counts: index of the image, and the row from `logit_fake` on."""
        for batch in islice(_lines(part), 1, None):
            yield from ((i, scores) for i, stamp, scores in batch if stamp == self.stamps[i].tolist())

    def _all_rows(self) -> Iterator[Row]:
        """The rows of the table. Paths, labels and generators are as in this start's list, however they were written."""
        rows = heapq.merge(*map(self._rows, self._parts().values()), key=itemgetter(0))
        once = (next(same) for _, same in groupby(rows, key=itemgetter(0)))
        for expected, item in enumerate(self.items):
            index, scores = next(once, (None, None))
            if index != expected:
                raise UserError(f"{printable(item.path)} has no row (was a part deleted?): start again to score it")
            yield Row(*row_of(item)[:3], *scores)


def _lines(part: Path) -> Iterator[dict | list]:
    """The lines of a part: the job, then the batches. What was torn off at its end (killed, out of power) is left out."""
    with part.open() as file, suppress(ValueError):
        yield from map(json.loads, file)


def _delete(parts: Mapping[int, Path]) -> None:
    for part in parts.values():
        part.unlink()
