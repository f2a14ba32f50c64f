"""Write a score table while images are scored. If the processes are killed, a new run continues the table.

Each process appends its rows to its own file P.csv.N.part, called a part. The first line of a part is the job:
everything that the scores depend on besides the content of the image files. A run refuses to continue parts of a
different job. A run with the same job skips the images that have a row in a part, unless the size or modification time
of the image file has changed. When every image has a row, the rows are written to P.csv in the order of the list.
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
    cells_from_row,
    format_csv_line,
    label_word,
    read_record,
    read_rows,
    row_from_cells,
    write_table,
)
from utils.console import printable
from utils.distributed import World, barrier, broadcast_from_main
from utils.errors import UserError
from utils.files import write_atomically, write_json

logger = logging.getLogger(__name__)

PART_MARK = "# part of a score table by test.py: "
PART_COLUMNS = (*COLUMNS, "size", "mtime_ns")  # size in bytes and modification time of the image file


def read_file_sizes_and_times(items: Sequence[Item]) -> np.ndarray:
    """Read the size in bytes and the modification time in ns of each image file.

    Returns:
        int64 (N, 2). The values of a file that does not exist are -1.
    """
    stamps = np.full((len(items), 2), -1, np.int64)
    for i, item in enumerate(items):
        with suppress(OSError):
            status = os.stat(item.path)
            stamps[i] = status.st_size, status.st_mtime_ns
    return stamps


class ScoreWriter:
    """A writer of the rows of one score table, which several processes may write together.

    Args:
        table: path of P.csv.
        items: the images, in the order of the table.
        stamps: `read_file_sizes_and_times` of the images.
        job: everything that the scores depend on besides the content of the image files, as a dict for JSON.
        world: the processes that write the table together.
    """

    def __init__(self, table: Path, items: Sequence[Item], stamps: np.ndarray, job: dict, world: World):
        self.table = table
        self.items = items
        self.stamps = stamps
        self.world = world
        self.job = json.loads(json.dumps(job))  # converts tuples to lists, as in a job that is read from a file
        self.identity = {"job": self.job, "files": hashlib.sha256(stamps.tobytes()).hexdigest()[:16]}
        self.done = np.zeros(len(items), bool)  # (N,): whether each image has a row
        self.indices: dict[str, list[int]] = {}  # path -> positions in the list of images
        for i, item in enumerate(items):
            self.indices.setdefault(os.path.abspath(item.path), []).append(i)

    def start_part(self, overwrite: bool, required: np.ndarray | None = None) -> bool:
        """Find the images that have a row already, and start a new part for this process.

        Args:
            overwrite: score all images again, even images that have a row.
            required: (N,) bool, the images that must be scored again unless their row holds an error. test.py passes
                the images whose residual picture is missing. If `required` is None, no image with a row is scored
                again.

        Returns:
            True if there are images to score; False if the table is finished already.

        Raises:
            UserError: if there are parts of a different job.
        """
        parts = find_parts(self.table)
        rows = {} if overwrite else self._read_existing_rows(parts)
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
            text = "%s was made with different settings or from different image files, and will be replaced"
            logger.info(text, printable(self.table))
        barrier(self.world)  # every process has read the existing parts before any process writes
        if overwrite and self.world.is_main:
            delete_files(parts.values())
        number = max(parts, default=-1) + 1 + self.world.rank
        part = self.table.with_name(f"{self.table.name}.{number}.part")
        with write_atomically(part) as file:  # a part without its first line (the job) could not be continued
            file.write((PART_MARK + json.dumps(self.job) + "\n" + format_csv_line(PART_COLUMNS)).encode())
        self.part = part.open("ab")
        if not parts and self.world.is_main:
            self.write_rows(rows)  # keeps the rows of a finished table whose residual pictures are missing
        return True

    def list_unscored_images(self, block: int) -> np.ndarray:
        """Return the indices of the images that this process must score.

        The list of images is divided into blocks. With n processes, process r scores the images without a row in the blocks
        r, r + n, ...

        Args:
            block: number of images per block.
        """
        missing = np.flatnonzero(~self.done)
        return missing[missing // block % self.world.size == self.world.rank]

    def write_rows(self, rows: Mapping[int, Row]) -> None:
        """Append rows, {index of the image: row}, to the part of this process, and flush the file."""
        lines = []
        for i, row in rows.items():
            path, *cells = cells_from_row(row)
            size, mtime_ns = self.stamps[i]
            lines.append(format_csv_line([os.path.abspath(path), *cells, str(size), str(mtime_ns)]))
        self._append_text("".join(lines))

    def finish_table(self) -> None:
        """Close the part of this process, wait for all processes, and write the table from the rows of all parts.

        Raises:
            UserError: if an image has no row.
        """
        self.part.close()
        barrier(self.world)
        if not self.world.is_main:
            return
        rows = self._read_rows_of_parts(find_parts(self.table))
        for i, item in enumerate(self.items):
            if i not in rows:
                raise UserError(
                    f"{printable(item.path)} has no row in the score table (was a .part file of the table deleted?):"
                    " run test.py again"
                )
        write_table(self.table, (rows[i] for i in range(len(self.items))))

    def write_record(self, record: Mapping) -> None:
        """Write the given record and the job to P.json. The table is finished only after `delete_parts`."""
        write_json(self.table.with_suffix(".json"), {**record, **self.identity})

    def delete_parts(self) -> None:
        """Delete the parts of the table. A table without parts is finished."""
        delete_files(find_parts(self.table).values())

    def _append_text(self, text: str) -> None:
        """Append text in a single write, so that a killed process leaves all rows of a batch or no row of the batch."""
        self.part.write(text.encode("utf-8", "surrogateescape"))
        self.part.flush()

    def _read_existing_rows(self, parts: Mapping[int, Path]) -> dict[int, Row]:
        """Read the existing rows from the parts or, without parts, from the finished table: {image index: row}."""
        if parts:
            for part in parts.values():
                self._require_same_job(part)
            return self._read_rows_of_parts(parts)
        record = read_record(self.table)
        if not self.table.exists() or any(record.get(key) != value for key, value in self.identity.items()):
            return {}
        rows = enumerate(read_rows(self.table))
        return {i: row._replace(path=self.items[i].path) for i, row in rows}

    def _require_same_job(self, part: Path) -> None:
        """Raise a UserError if a part belongs to a different job."""
        job = read_job_of_part(part)
        if job is None:
            text = "is not a part of a score table: move the file, or choose another --save_path"
            raise UserError(f"{printable(part)} {text}")
        differences = sorted(key for key in {*job, *self.job} if job.get(key) != self.job.get(key))
        if differences:
            raise UserError(
                f"{printable(self.table)} is unfinished, and was begun with different settings"
                f" ({', '.join(differences)}): finish the table with its old settings, choose another --save_path,"
                " or delete its rows with --overwrite"
            )

    def _read_rows_of_parts(self, parts: Mapping[int, Path]) -> dict[int, Row]:
        """Read the valid rows of all parts, {index of the image: row}. If an image has several rows, the first is used."""
        rows = {}
        for _, part in sorted(parts.items()):
            for i, row in self._read_rows_of_part(part):
                rows.setdefault(i, row)
        return rows

    def _read_rows_of_part(self, part: Path) -> list[tuple[int, Row]]:
        """Read the valid rows of one part, as pairs (index of the image, row).

        A row is valid if its image file has not changed. A row that was cut off by a power failure is not valid,
        because its last cell, the modification time, is incomplete.
        """
        rows = []
        with part.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, strict=True)
            # csv.Error is raised if the end of the part is damaged, for example by a power failure
            with suppress(csv.Error):
                for cells in reader:
                    if len(cells) == len(PART_COLUMNS):
                        rows.extend(self._rows_of_unchanged_image(dict(zip(PART_COLUMNS, cells, strict=True))))
        return rows

    def _rows_of_unchanged_image(self, cells: Mapping[str, str]) -> list[tuple[int, Row]]:
        """Convert the cells of a row in a part to pairs (index of the image, row).

        The list is empty if the image file has changed or is not in the list of images.
        """
        rows = []
        for i in self.indices.get(cells["path"], ()):
            size, mtime_ns = self.stamps[i]
            with suppress(ValueError):
                if (cells["size"], cells["mtime_ns"]) == (str(size), str(mtime_ns)):
                    path, label, generator = self.items[i]
                    row = row_from_cells({**cells, "label": label_word(label), "generator": generator})
                    rows.append((i, row._replace(path=path)))
        return rows


def find_parts(table: Path) -> dict[int, Path]:
    """Find the parts of a score table: {number of the part: path}."""
    pattern = re.compile(re.escape(table.name) + r"\.(\d+)\.part")
    parts = {}
    for path in table.parent.iterdir() if table.parent.is_dir() else ():
        match = pattern.fullmatch(path.name)
        if match:
            parts[int(match[1])] = path
    return parts


def read_job_of_part(part: Path) -> dict | None:
    """Read the job from the first line of a part. Returns None if the file is not a part of a score table."""
    try:
        with part.open(encoding="utf-8") as file:
            first_line = file.readline(2**20)
        return dict(json.loads(first_line.removeprefix(PART_MARK))) if first_line.startswith(PART_MARK) else None
    except (OSError, ValueError, TypeError):
        return None


def delete_files(paths: Iterable[Path]) -> None:
    """Delete files. All files must exist."""
    for path in paths:
        path.unlink()
