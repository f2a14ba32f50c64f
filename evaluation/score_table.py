"""Read and write score tables, which are CSV files with one row per image, written by test.py.

The columns are path,label,generator,logit_fake,logit_real,prob_fake,prediction,error. File names that are not valid
UTF-8 are preserved.
"""

import csv
import io
import json
import math
import os
import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.folders import RESIDUAL_PICTURE_SUFFIX
from data.lists import Item
from evaluation.calibration import probabilities_and_verdicts
from utils.console import make_printable
from utils.errors import UserError
from utils.files import open_for_atomic_write
from utils.labels import LABEL_NAMES

csv.field_size_limit(2**24)  # maximum number of characters in a cell; Python's default is 131,072


class Row(NamedTuple):
    """The row of one image in a score table. A row with an error has no numbers and no prediction."""

    path: str
    label: str = ""  # real, fake, or empty if the image has no label
    generator: str = ""  # name of the generator that made a fake image, or whose fakes a real image is compared with
    logit_fake: float | None = None
    logit_real: float | None = None
    prob_fake: float | None = None  # in [0, 1]
    prediction: str = ""  # real, fake or unsure
    error: str = ""  # one line that says why the image could not be scored


SOFTWARE = "Beyond the Spectrum"  # value of the entry "Software" in the headers of this project's PNG files
COLUMNS = Row._fields
OPTIONAL_COLUMNS = ("error",)  # a table made by a different program may lack this column
NUMBERS = ("logit_fake", "logit_real", "prob_fake")
LABELS = ("real", "fake", "")
PREDICTIONS = ("real", "fake", "unsure")


@dataclass(frozen=True)
class ScoreTable:
    """The columns of a score table of N images.

    In rows with an error, the logits and prob_fake are NaN.
    """

    paths: list[str]
    is_real: np.ndarray  # (N,) bool
    is_fake: np.ndarray  # (N,) bool; False for real images and for images without a label
    generators: list[str]
    logits: np.ndarray  # (N, 2) float32, columns FAKE, REAL
    prob_fake: np.ndarray  # (N,) float64
    predictions: list[str]
    errors: list[str]

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def logit_margins(self) -> np.ndarray:
        """Compute the margins logit_fake - logit_real, float64 (N,).

        Metrics rank images by margin, because floating-point rounding makes prob_fake equal to 1 for all large margins.
        """
        logits = self.logits.astype(np.float64)
        return logits[:, 0] - logits[:, 1]

    @property
    def has_score(self) -> np.ndarray:
        """Return a mask (N,) bool of the rows that have a score and no error."""
        return ~np.isnan(self.prob_fake)

    @property
    def has_label_and_score(self) -> np.ndarray:
        """Return a mask (N,) bool of the rows with a label and a score, from which metrics are computed."""
        return self.has_score & (self.is_real | self.is_fake)

    def select_rows(self, rows: np.ndarray) -> "ScoreTable":
        """Make a score table of selected rows, which are given as a mask (N,) bool or as integer positions."""
        rows = np.arange(len(self))[rows]
        selected = {}
        for name, column in vars(self).items():
            selected[name] = column[rows] if isinstance(column, np.ndarray) else [column[i] for i in rows]
        return ScoreTable(**selected)


# --- rows -----------------------------------------------------------------------------------------------------


def make_error_row(item: Item, error: str) -> Row:
    """Make the row of an image that could not be scored, with the reason `error` as one line."""
    path, label, generator = item
    return Row(path, convert_label_to_word(label), generator, error=" ".join(error.split()))


def make_rows_from_logits(items: Sequence[Item], logits: np.ndarray, calibration: Mapping | None = None) -> list[Row]:
    """Convert the logits of N images to rows. The row of an image whose logits are not finite holds an error message.

    Args:
        logits: (N, 2), with the columns FAKE and REAL.
        calibration: see `probabilities_and_verdicts`.
    """
    logits = np.asarray(logits, dtype=np.float32).reshape(-1, 2)
    finite = np.isfinite(logits).all(axis=1)
    prob_fake, verdicts = probabilities_and_verdicts(np.where(finite[:, None], logits, 0), calibration)
    rows = []
    for i, (path, label, generator) in enumerate(items):
        logit_fake, logit_real = logits[i].tolist()
        if finite[i]:
            numbers = logit_fake, logit_real, float(prob_fake[i])
            rows.append(Row(path, convert_label_to_word(label), generator, *numbers, verdicts[i]))
        else:
            problem = f"{make_printable(path)}: the logits are not finite: {logit_fake}, {logit_real}"
            rows.append(make_error_row(items[i], problem))
    return rows


def convert_label_to_word(label: int | None) -> str:
    """Convert the label FAKE, REAL or None to a word for a score table: "fake", "real" or ""."""
    return "" if label is None else LABEL_NAMES[label]


def cells_from_row(row: Row) -> list[str]:
    """Convert a row to the cells of a CSV file. A number gets the fewest digits that preserve its value."""
    logits = ["" if value is None else str(np.float32(value)) for value in (row.logit_fake, row.logit_real)]
    prob_fake = "" if row.prob_fake is None else repr(float(row.prob_fake))
    return [row.path, row.label, row.generator, *logits, prob_fake, row.prediction, row.error]


def row_from_cells(cells: Mapping[str, str]) -> Row:
    """Convert the cells of a CSV line, as a dict {column: text}, to a row.

    Raises:
        ValueError: if a cell has an impossible value.
    """
    path, error = cells["path"], cells["error"]
    # Millions of rows contain the same few words, and `sys.intern` keeps a single copy of each word in memory
    label, generator, prediction = (sys.intern(cells[name]) for name in ("label", "generator", "prediction"))
    if not path:
        raise ValueError("the path is empty")
    if label not in LABELS:
        raise ValueError(f"expected the label real, fake or nothing, got {label!r}")
    if error:
        return Row(path, label, generator, error=error)
    if prediction not in PREDICTIONS:
        raise ValueError(f"expected the prediction {', '.join(PREDICTIONS)}, got {prediction!r}")
    logit_fake, logit_real, prob_fake = (float(cells[name]) for name in NUMBERS)
    if not (math.isfinite(logit_fake) and math.isfinite(logit_real) and 0 <= prob_fake <= 1):
        got = f"{cells['logit_fake']}, {cells['logit_real']} and {cells['prob_fake']}"
        raise ValueError(f"expected two finite logits and prob_fake between 0 and 1, got {got}")
    return Row(path, label, generator, logit_fake, logit_real, prob_fake, prediction)


# --- files ----------------------------------------------------------------------------------------------------


def format_csv_line(cells: Sequence[str]) -> str:
    """Format the cells of one row as text that ends in a line break."""
    text = io.StringIO(newline="")
    # In Python versions older than 3.13, QUOTE_MINIMAL does not quote "\r", and csv.reader would end the line there
    quoting = csv.QUOTE_ALL if any("\r" in cell for cell in cells) else csv.QUOTE_MINIMAL
    csv.writer(text, lineterminator="\n", quoting=quoting).writerow(cells)
    return text.getvalue()


def write_table(path: str | os.PathLike, rows: Iterable[Row]) -> None:
    """Write a score table to a temporary file, which then replaces the file at `path`."""
    with open_for_atomic_write(path) as file:
        file.write(format_csv_line(COLUMNS).encode())
        for row in rows:
            file.write(format_csv_line(cells_from_row(row)).encode("utf-8", "surrogateescape"))


def read_rows(path: str | os.PathLike) -> Iterator[Row]:
    """Yield the rows of a score table.

    The columns may be in any order, and unknown columns are ignored.

    Raises:
        UserError: if the file cannot be read or a row is wrong.
    """
    line = 1
    try:  # the encoding utf-8-sig skips the byte order mark that Excel writes at the start of a file
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, [])]
            missing = [name for name in COLUMNS if name not in header and name not in OPTIONAL_COLUMNS]
            if missing:
                raise ValueError(f"expected the columns {','.join(COLUMNS)}, but {','.join(missing)} is missing")
            line = reader.line_num + 1
            for cells in reader:
                if len(cells) not in (0, len(header)):
                    raise ValueError(f"expected {len(header)} cells as in the header, got {len(cells)}")
                if cells:  # csv.reader returns [] for an empty line
                    by_column = {"error": "", **dict(zip(header, cells, strict=True))}
                    yield row_from_cells(by_column)
                line = reader.line_num + 1
    except OSError as error:
        text = f"cannot read the score table {make_printable(path)} ({error.strerror})"
        raise UserError(f"{text}: check the path and the permissions of the file") from None
    except (csv.Error, ValueError) as error:
        raise UserError(f"{make_printable(path)}, line {line}: {error}") from None


def read_table(path: str | os.PathLike) -> ScoreTable:
    """Read a whole score table.

    Raises:
        UserError: if a row cannot be read (see `read_rows`), or the table has no rows.
    """
    paths, labels, generators, predictions, errors = [], [], [], [], []
    numbers = array("d")  # needs 8 bytes per number; a list would need 32 bytes per number
    for row in read_rows(path):
        paths.append(row.path)
        labels.append(row.label)
        generators.append(row.generator)
        predictions.append(row.prediction)
        errors.append(row.error)
        numbers.extend(3 * [math.nan] if row.error else [row.logit_fake, row.logit_real, row.prob_fake])
    if not paths:
        raise UserError(f"{make_printable(path)} has no rows below its header: score some images with test.py first")
    values = np.array(numbers).reshape(-1, 3)
    return ScoreTable(
        paths=paths,
        is_real=np.array([label == "real" for label in labels]),
        is_fake=np.array([label == "fake" for label in labels]),
        generators=generators,
        logits=values[:, :2].astype(np.float32),
        prob_fake=values[:, 2].copy(),
        predictions=predictions,
        errors=errors,
    )


def read_json_record_of_score_table(path: str | os.PathLike) -> dict:
    """Read the file P.json beside a score table P.csv, or return an empty dict if P.json does not exist.

    Raises:
        UserError: if P.json cannot be read.
    """
    record_path = Path(path).with_suffix(".json")
    if not record_path.exists():
        return {}
    try:
        return dict(json.loads(record_path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        text = f"cannot read {make_printable(record_path)} ({error})"
        raise UserError(f"{text}: repair the file, or delete it to continue without it") from None


def path_of_residual_picture(folder: str | os.PathLike, image: str) -> Path:
    """Return the path of the residual picture of an image: folder/IMAGE.residual.png.

    IMAGE is the path of the image without the root "/", and with "__" instead of each "..", so that every picture is
    inside `folder`.
    """
    path = os.path.splitdrive(os.path.normpath(image))[1]
    parts = []
    for part in Path(path).parts:
        if part == os.pardir:
            parts.append("__")
        elif part.strip("\\/"):  # is false for the root "/"
            parts.append(part)
    return Path(folder, *parts[:-1], f"{parts[-1]}{RESIDUAL_PICTURE_SUFFIX}")
