"""The score table of a run while it is written, by one or several processes that may be killed and started again.

Each process appends its rows to a part of its own, P.csv.N.part. The first line of a part is the job: everything that the
scores depend on besides the content of the image files. A start with another job is refused. A start with the same job skips
the images that a part already has, if their files have the same size and time of modification as then. When every image has a
row, the rows become P.csv, in the order of the list.
"""

import csv
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from data.lists import Item
from evaluation.score_table import (
    COLUMNS,
    Row,
    csv_line,
    label_name,
    read_record,
    read_rows,
    row_cells,
    row_from_cells,
    write_table,
)
from utils.console import printable
from utils.distributed import World, barrier, broadcast_from_main
from utils.errors import UserError
from utils.files import atomic, write_json

logger = logging.getLogger(__name__)

PART_MARK = "# part of a score table by test.py: "
PART_COLUMNS = (*COLUMNS, "size", "mtime_ns")  # the last two: of the image file, in bytes and nanoseconds


def file_stamps(items: Sequence[Item]) -> np.ndarray:
    """Read the size in bytes and the time of modification in ns of each image file: int64 (N, 2), -1 without a file."""
    stamps = np.full((len(items), 2), -1, np.int64)
    for i, item in enumerate(items):
        with suppress(OSError):
            status = os.stat(item.path)
            stamps[i] = status.st_size, status.st_mtime_ns
    return stamps


class ScoreWriter:
    """The rows of one score table that is being written.

    Args:
        table: the path of P.csv.
        items: the images, in the order of the table.
        stamps: `file_stamps` of the images.
        job: everything that the scores depend on besides the content of the image files. It must be ready for JSON.
        world: the processes that write the table.
    """

    def __init__(self, table: Path, items: Sequence[Item], stamps: np.ndarray, job: dict, world: World):
        self.table = table
        self.items = items
        self.stamps = stamps
        self.world = world
        self.job = json.loads(json.dumps(job))  # as it is read back
        self.identity = {"job": self.job, "files": hashlib.sha256(stamps.tobytes()).hexdigest()[:16]}
        self.done = np.zeros(len(items), bool)  # (N,): the images that have a row
        self.indices: dict[str, list[int]] = {}  # where each path is in the list
        for i, item in enumerate(items):
            self.indices.setdefault(os.path.abspath(item.path), []).append(i)

    def open(self, overwrite: bool, required: np.ndarray | None = None) -> bool:
        """Find out which images have a row, and start this process's part.

        Args:
            overwrite: score all images again, whatever there is.
            required: (N,) bool, the images that must be scored again unless they have an error; None: no image. test.py
                gives the images that lack a picture.

        Returns:
            False if the table is finished.

        Raises:
            UserError: if there are parts of another job.
        """
        parts = find_parts(self.table)
        rows = {} if overwrite else self._known_rows(parts)
        for i, row in rows.items():
            must_be_scored_again = required is not None and required[i] and not row.error
            self.done[i] = not must_be_scored_again
        is_finished = not parts and len(rows) == len(self.items) and self.done.all()
        if broadcast_from_main(bool(is_finished), self.world):
            logger.info("%s is finished already (--overwrite scores the images again)", printable(self.table))
            return False
        if rows:
            logger.info("%d of %d images are scored already", self.done.sum(), len(self.items))
        elif self.table.exists():
            logger.info("%s was made with other settings or from other files, and will be replaced", printable(self.table))
        barrier(self.world)  # before any process writes
        if overwrite and self.world.is_main:
            remove_files(parts.values())
        number = max(parts, default=-1) + 1 + self.world.rank
        part = self.table.with_name(f"{self.table.name}.{number}.part")
        with atomic(part) as file:  # a part without its job would be nobody's file
            file.write((PART_MARK + json.dumps(self.job) + "\n" + csv_line(PART_COLUMNS)).encode())
        self.part = part.open("ab")
        if not parts and self.world.is_main:
            self.write(rows)  # a finished table that lacks pictures
        return True

    def missing(self, block: int) -> np.ndarray:
        """Return the indices of the images that this process scores: those without a row in each n-th block of the list.

        block: number of images.
        """
        missing = np.flatnonzero(~self.done)
        return missing[missing // block % self.world.size == self.world.rank]

    def write(self, rows: Mapping[int, Row]) -> None:
        """Append rows, by the index of their image. They are in the file when this returns."""
        lines = []
        for i, row in rows.items():
            path, *cells = row_cells(row)
            size, mtime_ns = self.stamps[i]
            lines.append(csv_line([os.path.abspath(path), *cells, str(size), str(mtime_ns)]))
        self._append("".join(lines))

    def close(self) -> None:
        """Wait for all processes, and write the table from all parts.

        Raises:
            UserError: if an image has no row.
        """
        self.part.close()
        barrier(self.world)
        if not self.world.is_main:
            return
        rows = self._rows_of_parts(find_parts(self.table))
        for i, item in enumerate(self.items):
            if i not in rows:
                raise UserError(f"{printable(item.path)} has no row (was a part deleted?): start again to score it")
        write_table(self.table, (rows[i] for i in range(len(self.items))))

    def write_record(self, record: Mapping) -> None:
        """Write P.json with what is given and the job. The table is finished when there are no parts beside it."""
        write_json(self.table.with_suffix(".json"), {**record, **self.identity})

    def remove_parts(self) -> None:
        """Delete the parts: the table is finished."""
        remove_files(find_parts(self.table).values())

    def _append(self, text: str) -> None:
        """Write text in one piece, so that a killed process leaves all or nothing of a batch."""
        self.part.write(text.encode("utf-8", "surrogateescape"))
        self.part.flush()

    def _known_rows(self, parts: Mapping[int, Path]) -> dict[int, Row]:
        """Read the rows that there are, by the index of their image: of unfinished parts, else of the finished table."""
        if parts:
            for part in parts.values():
                self._require_own_job(part)
            return self._rows_of_parts(parts)
        record = read_record(self.table)
        if not self.table.exists() or any(record.get(key) != value for key, value in self.identity.items()):
            return {}
        rows = enumerate(read_rows(self.table))
        return {i: row._replace(path=self.items[i].path) for i, row in rows}

    def _require_own_job(self, part: Path) -> None:
        """Raise a UserError if a part is of another job."""
        job = job_of_part(part)
        if job is None:
            raise UserError(f"{printable(part)} is no part of a score table: move it, or choose another --save_path")
        differences = sorted(key for key in {*job, *self.job} if job.get(key) != self.job.get(key))
        if differences:
            raise UserError(
                f"{printable(self.table)} is unfinished, and was begun with different settings"
                f" ({', '.join(differences)}): finish it with those settings, choose another --save_path, or delete"
                " its rows with --overwrite"
            )

    def _rows_of_parts(self, parts: Mapping[int, Path]) -> dict[int, Row]:
        """Read the rows of all parts that count, by the index of their image. The first row of an image is taken."""
        rows = {}
        for _, part in sorted(parts.items()):
            for i, row in self._rows_of_part(part):
                rows.setdefault(i, row)
        return rows

    def _rows_of_part(self, part: Path) -> list[tuple[int, Row]]:
        """Read the rows of a part that count, with the index of their image.

        A row counts if its image file has not changed. A row that was torn when the machine lost power does not count,
        because its last cell, the time of modification, is incomplete.
        """
        rows = []
        with part.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, strict=True)
            # csv.Error: the part ends within quotes, or in the zeros of a disk that lost power
            with suppress(csv.Error):
                for cells in reader:
                    if len(cells) == len(PART_COLUMNS):
                        rows.extend(self._current_rows(dict(zip(PART_COLUMNS, cells, strict=True))))
        return rows

    def _current_rows(self, cells: Mapping[str, str]) -> list[tuple[int, Row]]:
        """Convert the cells of a part's row: to nothing, if its image file has changed or is not in the list."""
        rows = []
        for i in self.indices.get(cells["path"], ()):
            size, mtime_ns = self.stamps[i]
            with suppress(ValueError):
                if (cells["size"], cells["mtime_ns"]) == (str(size), str(mtime_ns)):
                    path, label, generator = self.items[i]
                    row = row_from_cells({**cells, "label": label_name(label), "generator": generator})
                    rows.append((i, row._replace(path=path)))
        return rows


def find_parts(table: Path) -> dict[int, Path]:
    """Find the parts of a table, by their numbers."""
    pattern = re.compile(re.escape(table.name) + r"\.(\d+)\.part")
    parts = {}
    for path in table.parent.iterdir() if table.parent.is_dir() else ():
        match = pattern.fullmatch(path.name)
        if match:
            parts[int(match[1])] = path
    return parts


def job_of_part(part: Path) -> dict | None:
    """Read the job of a part; None if the file is no part of a score table."""
    try:
        with part.open(encoding="utf-8") as file:
            first_line = file.readline(2**20)
        return dict(json.loads(first_line.removeprefix(PART_MARK))) if first_line.startswith(PART_MARK) else None
    except (OSError, ValueError, TypeError):
        return None


def remove_files(paths: Iterable[Path]) -> None:
    """Delete files."""
    for path in paths:
        path.unlink()
