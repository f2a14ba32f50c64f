"""Write a score table while images are scored. If the processes are killed, a new run continues the table.

Each process writes its rows to its own file P.csv.N.part, a partial table, which is called a part below. The first line
of a part is the job: everything that the scores depend on besides the content of the image files. A run refuses to
continue parts of a different job. A run with the same job skips the images that have a row in a part, unless the size
or modification time of the image file has changed. When every image has a row, the rows are written to P.csv in the
order of the list.

A row of a part is one line. It names its image by the index in the list of images, which belongs to the job. While
P.csv is written, only the positions of the rows are held in memory, because a list may hold ten million images.
"""

import csv
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from itertools import zip_longest
from pathlib import Path

import numpy as np

from data.lists import Item
from evaluation.score_table import (
    COLUMNS,
    Row,
    cells_from_row,
    convert_label_to_word,
    format_csv_line,
    read_json_record_of_score_table,
    read_rows,
    row_from_cells,
    write_table,
)
from utils.console import make_printable
from utils.distributed import World, barrier, broadcast_from_main
from utils.errors import UserError
from utils.files import open_for_atomic_write, write_json

logger = logging.getLogger(__name__)

PART_MARK = "# part of a score table by test.py: "
# index: position in the list of images. size, mtime_ns: size in bytes and modification time of the image file
PART_COLUMNS = ("index", *COLUMNS[len(Item._fields) :], "size", "mtime_ns")


def read_file_sizes_and_times(items: Sequence[Item]) -> np.ndarray:
    """Read the size in bytes and the modification time in ns of each image file.

    Returns:
        An int64 array (N, 2). The values of a file that does not exist are -1.
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
        stamps: result of `read_file_sizes_and_times` for the images.
        job: everything that the scores depend on besides the content of the image files, as a dict for JSON. It
            must describe the list of images, for example by `describe_and_hash_items`.
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

    def start_partial_table(self, overwrite: bool, without_picture: np.ndarray | None = None) -> bool:
        """Find the images that have a row already, and start a new part for this process.

        Args:
            overwrite: whether all images are scored again, even images that have a row.
            without_picture: mask (N,) bool of the images whose residual picture is missing. They are scored again,
                unless their row holds an error. If None, every image that has a row is skipped.

        Returns:
            True if there are images to score; False if the table is finished already.

        Raises:
            UserError: if there are parts of a different job.
        """
        parts = find_partial_tables(self.table)
        has_table_of_this_job = not overwrite and not parts and self._is_table_of_same_settings()
        if has_table_of_this_job:
            self._mark_images_as_done(self._read_rows_of_table(), without_picture)
        elif not overwrite:
            self._mark_images_as_done(self._read_rows_of_partial_tables(parts), without_picture)
        if broadcast_from_main(bool(has_table_of_this_job and self.done.all()), self.world):
            logger.info("%s is finished already; --overwrite scores the images again", make_printable(self.table))
            return False
        if self.done.any():
            logger.info("%d of %d images are scored already", self.done.sum(), len(self.items))
        elif self.table.exists() and not overwrite and not has_table_of_this_job:
            text = "%s was made with different settings or from different image files, and will be replaced"
            logger.info(text, make_printable(self.table))
        barrier(self.world)  # every process has read the existing parts before any process writes
        if overwrite and self.world.is_main:
            delete_files(parts.values())
        self._open_new_part(max(parts, default=-1) + 1 + self.world.rank)
        if has_table_of_this_job and self.world.is_main:  # P.csv keeps its rows: only pictures are missing
            for i, row in self._read_rows_of_table():
                self.write_rows({i: row})
        return True

    def list_unscored_images(self, block: int) -> np.ndarray:
        """Return the indices of the images that this process must score.

        The list of images is divided into blocks. With n processes, process r scores the images without a row in the
        blocks r, r + n, ...

        Args:
            block: number of images per block.
        """
        missing = np.flatnonzero(~self.done)
        return missing[missing // block % self.world.size == self.world.rank]

    def write_rows(self, rows: Mapping[int, Row]) -> None:
        """Write rows, {index of the image: row}, to the end of this process's part, and flush the file.

        All rows are written at once, so that a killed process leaves all of them or none.
        """
        lines = []
        for i, row in rows.items():
            cells = cells_from_row(row)[len(Item._fields) :]
            size, mtime_ns = self.stamps[i]
            lines.append(format_csv_line([str(i), *cells, str(size), str(mtime_ns)]))
        self.part.write("".join(lines).encode("utf-8", "surrogateescape"))
        self.part.flush()

    def finish_table(self) -> None:
        """Close the part of this process, wait for all processes, and write the table from the rows of all parts.

        Raises:
            UserError: if an image has no row.
        """
        self.part.close()
        barrier(self.world)
        if not self.world.is_main:
            return
        parts = find_partial_tables(self.table)
        numbers, offsets = self._find_byte_positions_of_rows(parts)
        without_row = np.flatnonzero(numbers < 0)
        if len(without_row):
            first = self.items[without_row[0]].path
            raise UserError(
                f"{make_printable(first)} has no row in the score table, perhaps because a .part file of the"
                " table was deleted: run test.py again"
            )
        write_table(self.table, self._read_rows_at_positions(parts, numbers, offsets))

    def write_json_record_of_score_table(self, record: Mapping) -> None:
        """Write the given record and the job to P.json. The table is finished only after `delete_partial_tables`."""
        write_json(self.table.with_suffix(".json"), {**record, **self.identity})

    def delete_partial_tables(self) -> None:
        """Delete the parts of the table. A table without parts is finished."""
        delete_files(find_partial_tables(self.table).values())

    def _mark_images_as_done(self, known_rows: Iterable[tuple[int, Row]], without_picture: np.ndarray | None) -> None:
        """Set `done` for the images that need not be scored again. `start_partial_table` explains `without_picture`."""
        for i, row in known_rows:
            needs_picture = without_picture is not None and without_picture[i] and not row.error
            self.done[i] = not needs_picture

    def _open_new_part(self, number: int) -> None:
        """Create the part with this number, write the job and the names of the columns, and open the part."""
        part = self.table.with_name(f"{self.table.name}.{number}.part")
        # A later run cannot continue a part whose first line, the job, is missing
        with open_for_atomic_write(part) as file:
            file.write((PART_MARK + json.dumps(self.job) + "\n" + format_csv_line(PART_COLUMNS)).encode())
        self.part = part.open("ab")

    def _is_table_of_same_settings(self) -> bool:
        """Return whether P.csv was made with the same job and from the same image files."""
        record = read_json_record_of_score_table(self.table)
        return self.table.exists() and all(record.get(key) == value for key, value in self.identity.items())

    def _read_rows_of_table(self) -> Iterator[tuple[int, Row]]:
        """Read the rows of P.csv, as pairs (index of the image, row).

        Raises:
            UserError: if P.csv does not have one row per image, in the order of the images.
        """
        for i, (item, row) in enumerate(zip_longest(self.items, read_rows(self.table))):
            if item is None or row is None or not _is_row_of_item(row, item):
                raise UserError(
                    f"{make_printable(self.table)} was changed after test.py wrote it: expected one row per image in the"
                    " order of the images; choose another --save_path, or score all images again with --overwrite"
                )
            yield i, row

    def _require_same_scoring_settings(self, part: Path) -> None:
        """Raise a UserError if a part belongs to a different job."""
        job = read_settings_of_partial_table(part)
        if job is None:
            text = "is not a part of a score table: move the file, or choose another --save_path"
            raise UserError(f"{make_printable(part)} {text}")
        differences = sorted(key for key in {*job, *self.job} if job.get(key) != self.job.get(key))
        if differences:
            raise UserError(
                f"{make_printable(self.table)} is unfinished, and was begun with different settings"
                f" ({', '.join(differences)}): finish the table with its old settings, choose another --save_path,"
                " or delete its rows with --overwrite"
            )

    def _read_rows_of_partial_tables(self, parts: Mapping[int, Path]) -> Iterator[tuple[int, Row]]:
        """Read the valid rows of all parts, as pairs (index of the image, row).

        Raises:
            UserError: if a part belongs to a different job.
        """
        for part in parts.values():
            self._require_same_scoring_settings(part)
        for part in parts.values():
            for _, i, row in self._read_rows_of_partial_table(part):
                yield i, row

    def _find_byte_positions_of_rows(self, parts: Mapping[int, Path]) -> tuple[np.ndarray, np.ndarray]:
        """Find the first valid row of each image.

        Returns:
            numbers: for each image, the number of the part that holds its row, or -1 if it has no row.
            offsets: for each image, the position of its row in this part, in bytes.
        """
        numbers = np.full(len(self.items), -1)
        offsets = np.zeros(len(self.items), np.int64)
        for number, part in sorted(parts.items()):
            for offset, i, _ in self._read_rows_of_partial_table(part):
                if numbers[i] < 0:
                    numbers[i] = number
                    offsets[i] = offset
        return numbers, offsets

    def _read_rows_at_positions(
        self, parts: Mapping[int, Path], numbers: np.ndarray, offsets: np.ndarray
    ) -> Iterator[Row]:
        """Read the rows of all images in the order of the list, at positions from `_find_byte_positions_of_rows`."""
        with ExitStack() as stack:
            files = {number: stack.enter_context(part.open("rb")) for number, part in parts.items()}
            for number, offset in zip(numbers.tolist(), offsets.tolist(), strict=True):
                files[number].seek(offset)
                _, row = self._parse_row_of_partial_table(files[number].readline())
                yield row

    def _read_rows_of_partial_table(self, part: Path) -> Iterator[tuple[int, int, Row]]:
        """Read the valid rows of one part, as triples (position of the row in bytes, index of the image, row)."""
        offset = 0
        with part.open("rb") as file:
            for line in file:
                parsed = self._parse_row_of_partial_table(line)
                if parsed is not None:
                    yield offset, *parsed
                offset += len(line)

    def _parse_row_of_partial_table(self, line: bytes) -> tuple[int, Row] | None:
        """Convert a line of a part to the index of its image and the row. Returns None if the row is not valid.

        A row is valid if its image file has not changed. A row that was cut off by a power failure is not valid,
        because its last cell, the modification time, is incomplete.
        """
        with suppress(csv.Error, ValueError):
            texts = next(csv.reader([line.decode("utf-8", "surrogateescape")], strict=True))
            cells = dict(zip(PART_COLUMNS, texts, strict=True))
            i = int(cells["index"])
            if not 0 <= i < len(self.items):
                return None
            size, mtime_ns = self.stamps[i]
            if cells["size"] != str(size) or cells["mtime_ns"] != str(mtime_ns):
                return None
            path, label, generator = self.items[i]
            row = row_from_cells({**cells, "path": path, "label": convert_label_to_word(label), "generator": generator})
            return i, row
        return None


def _is_row_of_item(row: Row, item: Item) -> bool:
    """Return whether a row has the file name, the label and the generator of an image.

    The folders are not compared, because the same file can have a relative and an absolute path.
    """
    names = [os.path.basename(path) for path in (row.path, item.path)]
    return names[0] == names[1] and row.label == convert_label_to_word(item.label) and row.generator == item.generator


def find_partial_tables(table: Path) -> dict[int, Path]:
    """Find the parts of a score table. Returns a dict from the number of each part to its path."""
    pattern = re.compile(re.escape(table.name) + r"\.(\d+)\.part")
    parts = {}
    for path in table.parent.iterdir() if table.parent.is_dir() else ():
        match = pattern.fullmatch(path.name)
        if match:
            parts[int(match[1])] = path
    return parts


def read_settings_of_partial_table(part: Path) -> dict | None:
    """Read the job from the first line of a part. Returns None if the file is not a part of a score table."""
    try:
        with part.open(encoding="utf-8") as file:
            first_line = file.readline(2**20)
        return dict(json.loads(first_line.removeprefix(PART_MARK))) if first_line.startswith(PART_MARK) else None
    except (OSError, ValueError, TypeError):
        return None


def delete_files(paths: Iterable[Path]) -> None:
    """Delete files, all of which must exist."""
    for path in paths:
        path.unlink()
