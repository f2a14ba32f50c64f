"""Score tables: a CSV row an image, written by test.py, read by all that computes numbers from scores.

Columns: those of `Row`; `stability` only where it was asked for. UTF-8, commas, one header line. Reading a table gives
exactly what was written, whatever the file names: numbers carry as many digits as it takes to read them back bit by
bit; names with commas, quotes or line breaks are quoted, bytes that are not UTF-8 pass through; a text that a
spreadsheet would take for a formula gets an apostrophe in front, which reading takes away.
"""

import csv
import io
import json
import math
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from sys import intern
from typing import NamedTuple

import numpy as np

from utils.console import printable
from utils.errors import UserError
from utils.files import atomic
from utils.labels import LABEL_NAMES

FORMULA_STARTS = tuple("=+-@\t\r\n＝＋－＠")  # what a spreadsheet takes for a formula (OWASP, "CSV Injection")
GUARD = "'"
GUARDED_STARTS = (*FORMULA_STARTS, GUARD)


class Row(NamedTuple):
    """One image of a score table. Where there is an error, the numbers are None and the prediction empty."""

    path: str
    label: str = ""  # real, fake; empty: unlabelled
    generator: str = ""  # empty for reals that all generators share
    logit_fake: float | None = None
    logit_real: float | None = None
    prob_fake: float | None = None  # in [0, 1]
    prediction: str = ""  # real, fake, unsure
    error: str = ""  # one line
    stability: str = ""  # stable, unstable: whether the verdict outlives what pictures go through in everyday use


COLUMNS = Row._fields[:-1]
NUMBERS = ("logit_fake", "logit_real", "prob_fake")
PREDICTIONS = ("real", "fake", "unsure")
WORDS = {"label": ("real", "fake", ""), "prediction": (*PREDICTIONS, ""), "stability": ("stable", "unstable", "")}


@dataclass(frozen=True)
class ScoreTable:
    """The columns of a score table of N images, in file order.

    is_real, is_fake: (N,) bool; an unlabelled image is neither. logits: (N, 2) float32, columns fake, real.
    prob_fake: (N,) float64. Rows with an error have NaN logits and prob_fake.
    """

    paths: list[str]
    is_real: np.ndarray
    is_fake: np.ndarray
    generators: list[str]
    logits: np.ndarray
    prob_fake: np.ndarray
    predictions: list[str]
    errors: list[str]
    stability: list[str]

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def margins(self) -> np.ndarray:
        """(N,) float64, logit_fake - logit_real: ranks images as prob_fake does, and never saturates."""
        return np.subtract(*self.logits.T, dtype=np.float64)

    @property
    def scored(self) -> np.ndarray:
        """(N,) bool: the rows without an error."""
        return ~np.isnan(self.prob_fake)

    @property
    def usable(self) -> np.ndarray:
        """(N,) bool: the rows that metrics are made of, scored and labelled."""
        return self.scored & (self.is_real | self.is_fake)

    def select(self, rows: np.ndarray) -> "ScoreTable":
        """The table of some rows. rows: (N,) bool, or integer positions."""
        rows = np.arange(len(self))[rows]
        columns = vars(self).values()
        return ScoreTable(*(c[rows] if isinstance(c, np.ndarray) else [c[i] for i in rows] for c in columns))


def predict(logits: np.ndarray, calibration: Mapping | None = None) -> tuple[np.ndarray, list[str]]:
    """P(fake) and the verdict on each image: prob_fake (N,) float64 in [0, 1]; N times real, fake or unsure.

    Args:
        logits: (N, 2), columns fake, real.
        calibration: of tools.calibrate: the logits are divided by "temperature"; fake from P(fake) = "t_fake" on,
            real up to "t_real", else unsure. Without: 1, and the larger logit decides (fake if they are equal).
    """
    rule = {"temperature": 1.0, "t_real": 0.5, "t_fake": 0.5, **(calibration or {})}
    fake, real = np.asarray(logits, dtype=np.float64).reshape(-1, 2).T
    prob_fake = sigmoid((fake - real) / rule["temperature"])  # softmax over two classes
    verdicts = np.where(prob_fake >= rule["t_fake"], "fake", np.where(prob_fake <= rule["t_real"], "real", "unsure"))
    return prob_fake, verdicts.tolist()


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) without overflow."""
    return np.exp(-np.logaddexp(0, -x))


def row_of(item: tuple[str, int | None, str], *scores: float | str, error: str = "") -> Row:
    """The row of an image (path, label, generator), label FAKE, REAL or None. scores: logits, P(fake), prediction."""
    path, label, generator = item
    return Row(path, "" if label is None else LABEL_NAMES[label], generator, *scores, error=error)


def make_rows(items: Sequence[tuple], logits: np.ndarray, calibration: Mapping | None = None) -> list[Row]:
    """The rows of N images (see `row_of`) from their logits (N, 2). Logits that are not finite make an error.

    calibration: see `predict`.
    """
    logits = np.asarray(logits, dtype=np.float32).reshape(-1, 2)
    prob_fake, predictions = predict(np.where(np.isfinite(logits), logits, 0), calibration)
    return [
        row_of(item, *map(float, pair), float(p), prediction)
        if np.isfinite(pair).all()
        else row_of(item, error=f"the network's logits are not finite: {pair.tolist()}")
        for item, pair, p, prediction in zip(items, logits, prob_fake, predictions, strict=True)
    ]


def write_table(path: str | os.PathLike, rows: Iterable[Row], stability: bool = False) -> None:
    """Write a score table, whole or not at all. stability: whether it has that column."""
    columns = Row._fields if stability else COLUMNS
    with atomic(path) as file:
        text = io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="")
        text.write(",".join(columns) + "\n")
        for row in rows:
            cells = _cells(row)[: len(columns)]
            lone = any("\r" in cell for cell in cells)  # Python < 3.13 leaves it bare, and its reader breaks the line
            quoting = csv.QUOTE_ALL if lone else csv.QUOTE_MINIMAL
            csv.writer(text, lineterminator="\n", quoting=quoting).writerow(cells)
        text.detach()  # flushes; `atomic` closes the file


def _cells(row: Row) -> list[str]:
    """A record: texts safe in a spreadsheet, numbers in the shortest form that reads back to the same value."""
    texts = row.path, row.generator, " ".join(row.error.split())
    path, generator, error = (GUARD + text if text.startswith(GUARDED_STARTS) else text for text in texts)
    logits = ["" if x is None else str(np.float32(x)) for x in (row.logit_fake, row.logit_real)]
    prob = "" if row.prob_fake is None else repr(float(row.prob_fake))
    return [path, row.label, generator, *logits, prob, row.prediction, error, row.stability]


def read_rows(path: str | os.PathLike) -> Iterator[Row]:
    """The rows of a score table one by one, in constant memory.

    Columns may come in any order, further ones are ignored, and those for errors and stability may be missing. Raises
    UserError with file, line and what was wanted.
    """
    try:  # utf-8-sig: Excel begins a file with a mark
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            lines = csv.reader(file, strict=True)
            header = [name.strip() for name in next(lines, [])]
            missing = [name for name in COLUMNS if name not in header and name != "error"]
            if missing:
                raise ValueError(f"no column {', '.join(missing)}; a table of test.py has {','.join(COLUMNS)}")
            empty = dict.fromkeys(Row._fields, "")
            for cells in filter(None, lines):  # csv gives [] for an empty line
                if len(cells) != len(header):
                    raise ValueError(f"{len(cells)} cells, {len(header)} were wanted as in the header")
                yield _row(empty | dict(zip(header, cells, strict=True)))
    except OSError as error:
        raise UserError(f"cannot read the score table {printable(path)} ({error.strerror})") from None
    except (csv.Error, ValueError) as error:
        raise UserError(f"{printable(path)}, line {max(lines.line_num, 1)}: {error}") from None


def _row(cells: Mapping[str, str]) -> Row:
    """One record as a Row. Raises ValueError with what was got and wanted."""
    texts = cells["path"], cells["generator"], cells["error"]
    path, generator, error = (
        text[1:] if text.startswith(GUARD) and text[1:].startswith(GUARDED_STARTS) else text for text in texts
    )
    if not path:
        raise ValueError("an empty path")
    for name, words in WORDS.items():
        if cells[name] not in words or (name == "prediction" and not cells[name] and not error):
            raise ValueError(f"{name} {cells[name]!r}, one of {', '.join(filter(None, words))} was wanted")
    label, prediction, stability = (intern(cells[name]) for name in WORDS)
    if error:
        return Row(path, label, generator, error=error)
    numbers = [float(cells[name]) for name in NUMBERS]
    if not (all(map(math.isfinite, numbers)) and 0 <= numbers[2] <= 1):
        raise ValueError(f"{', '.join(NUMBERS)} {numbers}: finite numbers were wanted, the last from 0 to 1")
    return Row(path, label, intern(generator), *numbers, prediction, stability=stability)


def read_table(path: str | os.PathLike) -> ScoreTable:
    """Read a whole score table. Raises UserError as `read_rows`, and if there are no rows."""
    columns = Row(*(array("d") if name in NUMBERS else [] for name in Row._fields))  # ten million rows fit so
    for row in read_rows(path):
        for column, value in zip(columns, row, strict=True):
            column.append(math.nan if value is None else value)
    if not columns.path:
        raise UserError(f"{printable(path)} has no rows below its header: score some images with test.py first")
    labels = np.array(columns.label)
    return ScoreTable(
        paths=columns.path,
        is_real=labels == "real",
        is_fake=labels == "fake",
        generators=columns.generator,
        logits=np.stack([columns.logit_fake, columns.logit_real], axis=1).astype(np.float32),  # (N, 2)
        prob_fake=np.array(columns.prob_fake),
        predictions=columns.prediction,
        errors=columns.error,
        stability=columns.stability,
    )


def read_record(path: str | os.PathLike) -> dict:
    """The P.json that test.py writes beside a table P.csv: settings, detector, metrics, ...; {} where there is none.

    Raises UserError if it cannot be read.
    """
    beside = Path(path).with_suffix(".json")
    try:
        return dict(json.loads(beside.read_text(encoding="utf-8"))) if beside.exists() else {}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot read {printable(beside)} ({error}); delete it to go on without it") from None


def residual_path(folder: str | os.PathLike, image: str) -> Path:
    """Where the residual picture of an image is: folder/the image's path.residual.png.

    The suffix stays, so that a.png and a.jpg have a picture each; the path loses its root, and "__" stands
    for "..", so that all of them are inside the folder.
    """
    parts = Path(os.path.splitdrive(os.path.normpath(image))[1]).parts
    inside = ["__" if part == os.pardir else part for part in parts if part.strip("\\/")]
    return Path(folder, *inside[:-1], f"{inside[-1]}.residual.png")
