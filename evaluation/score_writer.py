"""Write a score table while images are scored. If a run is killed, a new run continues the table.

Each process writes its rows to its own partial table: P.csv.0.part, P.csv.1.part and so on for the score table P.csv.
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

PARTIAL_TABLE_MARK = "# part of a score table by test.py: "
# Each process writes its rows to a partial table. The column "index" is the position in the list of images to score
PARTIAL_TABLE_COLUMNS = ("index", *COLUMNS[len(Item._fields) :], "size", "mtime_ns")


def read_file_sizes_and_times(items: Sequence[Item]) -> np.ndarray:
    """Read the size in bytes and the modification time in ns of each image file.

    Returns:
        An int64 array (N, 2) with the columns size and modification time. The row of a missing file is (-1, -1).
    """
    stamps = np.full((len(items), 2), -1, np.int64)
    for i, item in enumerate(items):
        with suppress(OSError):
            status = os.stat(item.path)
            stamps[i] = status.st_size, status.st_mtime_ns
    return stamps


class ScoreWriter:
    """Writes one score table, which several processes can write together, each with its own `ScoreWriter`.

    Args:
        items: the images, in the order of the table.
        stamps: result of `read_file_sizes_and_times` for the images.
        settings: the scoring settings, as a dict that can be written as JSON: everything that the scores depend on
            besides the content of the image files. `settings` must include the result of
            `data.lists.describe_and_hash_image_list`.
    """

    def __init__(self, table: Path, items: Sequence[Item], stamps: np.ndarray, settings: dict, world: World):
        self.table = table
        self.items = items
        self.stamps = stamps
        self.world = world
        self.settings = json.loads(json.dumps(settings))  # tuples become lists, as in settings read from a file
        hash_of_files = hashlib.sha256(stamps.tobytes()).hexdigest()[:16]
        self.identity = {"scoring_settings": self.settings, "files": hash_of_files}
        self.done = np.zeros(len(items), bool)  # (N,): True for the images that need not be scored

    def start_partial_table(self, overwrite: bool, without_picture: np.ndarray | None = None) -> bool:
        """Find the images that must be scored, and create a new partial table for this process.

        If a run is resumed, an image is scored if it has no row, or if its row contains an error.

        Args:
            overwrite: if True, partial tables of earlier runs are deleted, and all images are scored.
            without_picture: mask (N,) bool of the images that are scored even if they have a row, because their
                residual picture must be drawn.

        Returns:
            False if the score table and all residual pictures are finished already, otherwise True.

        Raises:
            UserError: if the scoring settings in a partial table differ from the scoring settings of this run.
            UserError: if the score table does not have one row per image, in the order of the images.
        """
        parts = find_partial_tables(self.table)
        use_rows_of_table = not overwrite and not parts and self._table_has_same_settings()
        if use_rows_of_table:
            self._mark_images_with_rows_as_done(self._read_rows_of_table(), without_picture)
        elif not overwrite:
            self._mark_images_with_rows_as_done(self._read_rows_of_partial_tables(parts), without_picture)
        if broadcast_from_main(bool(use_rows_of_table and self.done.all()), self.world):
            logger.info("%s is finished already; --overwrite scores the images again", make_printable(self.table))
            return False
        if self.done.any():
            logger.info("%d of %d images are scored already", self.done.sum(), len(self.items))
        elif self.table.exists() and not overwrite and not use_rows_of_table:
            text = "%s was made with different settings or from different image files, and will be replaced"
            logger.info(text, make_printable(self.table))
        barrier(self.world)  # wait until every process has read the existing partial tables
        if overwrite and self.world.is_main:
            delete_partial_table_files(parts.values())
        self._open_new_partial_table(max(parts, default=-1) + 1 + self.world.rank)
        # The new score table will be joined from partial tables, so the old table's rows are copied into a partial table
        if use_rows_of_table and self.world.is_main:
            for i, row in self._read_rows_of_table():
                self.write_rows({i: row})
        return True

    def list_unscored_images(self, block: int) -> np.ndarray:
        """Return the indices of the images that this process must score.

        The list of images is divided into blocks of `block` images, and block number b is scored by the process with
        rank b % `world.size`.
        """
        missing = np.flatnonzero(~self.done)
        return missing[missing // block % self.world.size == self.world.rank]

    def write_rows(self, rows: Mapping[int, Row]) -> None:
        """Append rows, {index of the image: row}, to the partial table of this process, and flush the file."""
        lines = []
        for i, row in rows.items():
            cells = cells_from_row(row)[len(Item._fields) :]
            size, mtime_ns = self.stamps[i]
            lines.append(format_csv_line([str(i), *cells, str(size), str(mtime_ns)]))
        self.partial_table.write("".join(lines).encode("utf-8", "surrogateescape"))
        self.partial_table.flush()

    def write_table_from_partial_tables(self) -> None:
        """Close the partial table of this process, wait for all processes, and write the score table.

        Raises:
            UserError: if an image has no row in any partial table.
        """
        self.partial_table.close()
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
        """Write the JSON file that belongs to the score table.

        The JSON file contains the entries of `record`, the scoring settings, and a hash of the sizes and the
        modification times of the image files.
        """
        write_json(self.table.with_suffix(".json"), {**record, **self.identity})

    def delete_partial_tables(self) -> None:
        """Delete the partial tables, so that a later run treats the score table as finished."""
        delete_partial_table_files(find_partial_tables(self.table).values())

    def _mark_images_with_rows_as_done(
        self, known_rows: Iterable[tuple[int, Row]], without_picture: np.ndarray | None
    ) -> None:
        """Set `self.done` to True for each image in `known_rows` that need not be scored again."""
        for i, row in known_rows:
            needs_picture = without_picture is not None and without_picture[i]
            if not row.error and not needs_picture:
                self.done[i] = True

    def _open_new_partial_table(self, number: int) -> None:
        """Create a partial table with `number` in its file name, and open the partial table as `self.partial_table`."""
        path = self.table.with_name(f"{self.table.name}.{number}.part")
        header = PARTIAL_TABLE_MARK + json.dumps(self.settings) + "\n" + format_csv_line(PARTIAL_TABLE_COLUMNS)
        # The atomic write ensures that no partial table with an incomplete header is left behind if the run is killed
        with open_for_atomic_write(path) as file:
            file.write(header.encode())
        self.partial_table = path.open("ab")

    def _table_has_same_settings(self) -> bool:
        """Return whether the score table was made with the scoring settings and the image files of this run."""
        record = read_json_record_of_score_table(self.table)
        return self.table.exists() and all(record.get(key) == value for key, value in self.identity.items())

    def _read_rows_of_table(self) -> Iterator[tuple[int, Row]]:
        """Read the rows of the score table, as pairs (index of the image, row)."""
        for i, (item, row) in enumerate(zip_longest(self.items, read_rows(self.table))):
            if item is None or row is None or not _row_belongs_to_image(row, item):
                raise UserError(
                    f"{make_printable(self.table)} was changed after test.py wrote it: expected one row per image in"
                    " the order of the images; choose another --save_path, or score all images again with --overwrite"
                )
            yield i, row

    def _require_same_scoring_settings(self, part: Path) -> None:
        """Raise a UserError if the scoring settings in a partial table differ from the settings of this run."""
        old, new = read_settings_of_partial_table(part), self.settings
        if old is None:
            raise UserError(
                f"{make_printable(part)} has the name of a partial score table, but other content: move the file,"
                " or choose another --save_path"
            )
        differences = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
        if differences:
            raise UserError(
                f"{make_printable(self.table)} is unfinished, and was begun with different settings"
                f" ({', '.join(differences)}): finish the table with its old settings, choose another --save_path,"
                " or delete its rows with --overwrite"
            )

    def _read_rows_of_partial_tables(self, parts: Mapping[int, Path]) -> Iterator[tuple[int, Row]]:
        """Read the valid rows of all partial tables, as pairs (index of the image, row)."""
        for part in parts.values():
            self._require_same_scoring_settings(part)
        for part in parts.values():
            for _, i, row in self._read_rows_of_partial_table(part):
                yield i, row

    def _find_byte_positions_of_rows(self, parts: Mapping[int, Path]) -> tuple[np.ndarray, np.ndarray]:
        """Choose one row per image from the valid rows of all partial tables, and find the byte position of this row.

        A row with a score replaces only an older row with an error, so that an image keeps its score if it is scored
        again only to draw its residual picture. Only the byte positions of rows are held in memory, because a score
        table may have ten million rows.

        Returns:
            numbers: (N,), the number in the file name of the partial table that holds the chosen row of each image, or
                -1 if the image has no row.
            offsets: (N,), the byte position of the chosen row of each image in its partial table.
        """
        numbers = np.full(len(self.items), -1)
        offsets = np.zeros(len(self.items), np.int64)
        has_error = np.zeros(len(self.items), bool)
        for number, part in sorted(parts.items()):
            for offset, i, row in self._read_rows_of_partial_table(part):
                if numbers[i] < 0 or has_error[i] or row.error:
                    numbers[i] = number
                    offsets[i] = offset
                    has_error[i] = bool(row.error)
        return numbers, offsets

    def _read_rows_at_positions(
        self, parts: Mapping[int, Path], numbers: np.ndarray, offsets: np.ndarray
    ) -> Iterator[Row]:
        """Read the rows of all images from the partial tables, in the order of the list of images."""
        with ExitStack() as stack:
            files = {number: stack.enter_context(part.open("rb")) for number, part in parts.items()}
            for number, offset in zip(numbers.tolist(), offsets.tolist(), strict=True):
                files[number].seek(offset)
                _, row = self._parse_row_of_partial_table(files[number].readline())
                yield row

    def _read_rows_of_partial_table(self, part: Path) -> Iterator[tuple[int, int, Row]]:
        """Read the valid rows of a partial table, as triples (byte position of the row, index of the image, row)."""
        offset = 0
        with part.open("rb") as file:
            for line in file:
                parsed = self._parse_row_of_partial_table(line)
                if parsed is not None:
                    yield offset, *parsed
                offset += len(line)

    def _parse_row_of_partial_table(self, line: bytes) -> tuple[int, Row] | None:
        """Convert a line of a partial table to a pair (index of the image, row). Returns None for an invalid row.

        A row is invalid if its last two cells differ from the size and the modification time of the image file, for
        example because a killed process wrote only the start of the row.
        """
        with suppress(csv.Error, ValueError):
            texts = next(csv.reader([line.decode("utf-8", "surrogateescape")], strict=True))
            cells = dict(zip(PARTIAL_TABLE_COLUMNS, texts, strict=True))
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


def _row_belongs_to_image(row: Row, item: Item) -> bool:
    """Return whether a row of a score table has the file name, the label and the generator of an image.

    Folders are not compared, because one run may use the relative path and another the absolute path of the same file.
    """
    names = [os.path.basename(path) for path in (row.path, item.path)]
    return names[0] == names[1] and row.label == convert_label_to_word(item.label) and row.generator == item.generator


def find_partial_tables(table: Path) -> dict[int, Path]:
    """Find the partial tables of a score table, as a dict {number in the file name: path of the partial table}."""
    pattern = re.compile(re.escape(table.name) + r"\.(\d+)\.part")
    parts = {}
    for path in table.parent.iterdir() if table.parent.is_dir() else ():
        match = pattern.fullmatch(path.name)
        if match:
            parts[int(match[1])] = path
    return parts


def read_settings_of_partial_table(part: Path) -> dict | None:
    """Read the scoring settings from the first line of a file. Returns None if the file is not a partial table."""
    try:
        with part.open(encoding="utf-8") as file:
            first_line = file.readline(2**20)
        if first_line.startswith(PARTIAL_TABLE_MARK):
            return dict(json.loads(first_line.removeprefix(PARTIAL_TABLE_MARK)))
    except (OSError, ValueError, TypeError):
        pass
    return None


def delete_partial_table_files(paths: Iterable[Path]) -> None:
    """Delete the partial tables at `paths`."""
    for path in paths:
        path.unlink()
