"""Score tables: a CSV row an image, written by test.py, read by all that computes numbers from scores.

Columns: path, label (real, fake or empty), generator (empty for reals that all generators share), logit_fake,
logit_real, prob_fake, prediction (real, fake or unsure), error (one line; the numbers are then empty). Where it was
asked for, a last column `stability`: whether the verdict outlives what pictures go through in everyday use.
UTF-8, commas, one header line. Reading a table gives exactly what was written, whatever the file names:

- numbers carry as many digits as it takes to read them back bit by bit;
- names with commas, quotes or line breaks are quoted, bytes that are not UTF-8 pass through;
- a text that a spreadsheet would take for a formula gets an apostrophe in front, which reading takes away.
"""

import csv
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from sys import intern
from typing import BinaryIO, NamedTuple

import numpy as np

COLUMNS = (
    "path", "label", "generator", "logit_fake", "logit_real", "prob_fake", "prediction", "error",
)  # fmt: skip
STABILITY = "stability"  # a further column, written and read where it was asked for
LABELS = ("real", "fake", "")  # empty: unlabelled
PREDICTIONS = ("real", "fake", "unsure")
STABILITIES = ("stable", "unstable", "")  # empty: not asked for, or not scored

# What makes a spreadsheet read a cell as a formula (OWASP, "CSV Injection"); and the apostrophe against it.
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
GUARD = "'"
GUARDED_STARTS = (*FORMULA_STARTS, GUARD)

ENCODING = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}


class ScoreError(ValueError):
    """A score table that cannot be used: one line with file, line, what was got and what was wanted."""


class Row(NamedTuple):
    """One image of a score table. Where there is an error, the numbers are None and the prediction empty."""

    path: str
    label: str = ""
    generator: str = ""
    logit_fake: float | None = None
    logit_real: float | None = None
    prob_fake: float | None = None
    prediction: str = ""
    error: str = ""
    stability: str = ""


@dataclass(frozen=True)
class ScoreTable:
    """The columns of a score table of N images, in file order.

    is_real, is_fake: (N,) bool; an unlabelled image is neither. logits: (N, 2) float32, columns fake, real.
    prob_fake: (N,) float64 in [0, 1]. Rows with an error have NaN logits and prob_fake, and prediction "".
    stability: STABILITIES; all "" if the table has no such column.
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
        logits = self.logits.astype(np.float64)
        return logits[:, 0] - logits[:, 1]

    @property
    def scored(self) -> np.ndarray:
        """(N,) bool: the rows without an error."""
        return ~np.isnan(self.prob_fake)

    def select(self, rows: np.ndarray) -> "ScoreTable":
        """The table of some rows. rows: (N,) bool, or integer positions."""
        rows = np.flatnonzero(rows) if np.asarray(rows).dtype == bool else np.asarray(rows, dtype=np.intp)
        columns = (getattr(self, field.name) for field in fields(self))
        return ScoreTable(*(c[rows] if isinstance(c, np.ndarray) else [c[i] for i in rows] for c in columns))


def predict(
    logits: np.ndarray, temperature: float = 1.0, thresholds: tuple[float, float] | None = None
) -> tuple[np.ndarray, list[str]]:
    """P(fake) and the verdict on each image.

    Args:
        logits: (N, 2), columns fake, real.
        temperature: the logits are divided by it (Guo et al., ICML 2017).
        thresholds: (t_real, t_fake) of utils.calibrate: fake from t_fake on, real up to t_real, else unsure.
            None: the larger logit decides (fake if they are equal).
    Returns:
        prob_fake: (N,) float64 in [0, 1]; predictions: N times real, fake or unsure.
    """
    logits = np.asarray(logits, dtype=np.float64).reshape(-1, 2)
    prob_fake = sigmoid((logits[:, 0] - logits[:, 1]) / temperature)  # softmax over two classes
    t_real, t_fake = (0.5, 0.5) if thresholds is None else thresholds
    predictions = np.where(prob_fake >= t_fake, "fake", np.where(prob_fake <= t_real, "real", "unsure"))
    return prob_fake, predictions.tolist()


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) without overflow, float64."""
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0, e) / (1.0 + e)


def make_rows(
    paths: Sequence[str],
    labels: Sequence[str],
    generators: Sequence[str],
    logits: np.ndarray,
    temperature: float = 1.0,
    thresholds: tuple[float, float] | None = None,
) -> list[Row]:
    """The rows of N images from their logits (N, 2). Logits that are not finite make a row with an error."""
    logits = np.asarray(logits, dtype=np.float32).reshape(-1, 2)
    finite = np.isfinite(logits).all(axis=1)
    prob_fake, predictions = predict(np.where(finite[:, None], logits, 0), temperature, thresholds)
    rows = []
    for i, (path, label, generator) in enumerate(zip(paths, labels, generators, strict=True)):
        if finite[i]:
            scores = (*logits[i].tolist(), float(prob_fake[i]), predictions[i], "")
        else:
            scores = (None, None, None, "", f"the network's logits are not finite: {logits[i].tolist()}")
        rows.append(Row(path, label, generator, *scores))
    return rows


class RowWriter:
    """Writes a score table row by row; what `write` has returned from is in the file.

    append=True goes on with an existing table (one that a killed run left, say: see `drop_torn_row`);
    stability=True: with that column, which an existing table has to have then.

    Raises:
        ScoreError: if the file cannot be opened.
    """

    def __init__(self, path: str | os.PathLike, append: bool = False, stability: bool = False):
        self._columns = (*COLUMNS, STABILITY) if stability else COLUMNS
        try:
            if append and os.path.exists(path):
                drop_torn_row(path)
            self._file = open(path, "a" if append else "w", **ENCODING)
        except OSError as error:
            raise ScoreError(f"cannot write the score table {path} ({error.strerror})") from None
        if self._file.tell() == 0:
            self._file.write(",".join(self._columns) + "\n")
            self._file.flush()

    def write(self, *rows: Row) -> None:
        self._file.write("".join(_line(row, STABILITY in self._columns) for row in rows))
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "RowWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def write_rows(path: str | os.PathLike, rows: Iterable[Row]) -> None:
    """Write a whole score table; `rows` may be a generator of any length."""
    with RowWriter(path) as writer:
        for row in rows:
            writer.write(row)


def drop_torn_row(path: str | os.PathLike) -> int:
    """Cut off what a killed writer left of an unfinished last row. Returns the number of whole rows."""
    with open(path, "r+b") as file:
        records, end = _whole_records(file)
        file.truncate(end)
    return max(records - 1, 0)  # the first is the header


def read_rows(path: str | os.PathLike) -> Iterator[Row]:
    """The rows of a score table one by one, in constant memory.

    Columns may come in any order, further ones are ignored, and those for errors and stability may be missing.

    Raises:
        ScoreError: if the file cannot be read or is no score table; names file, line and what was wanted.
    """
    try:
        with open(path, **ENCODING) as file:
            lines = csv.reader(file, strict=True)
            try:
                header = [name.strip().lstrip("\ufeff") for name in next(lines, [])]  # Excel starts with a mark
                where = _column_positions(path, header)
                for cells in lines:
                    if cells:  # csv gives [] for an empty line
                        yield _row(cells, where, len(header))
            except (csv.Error, ValueError) as error:
                if isinstance(error, ScoreError):
                    raise
                raise ScoreError(f"{path}, line {lines.line_num}: {error}") from None
    except OSError as error:
        raise ScoreError(f"cannot read the score table {path} ({error.strerror})") from None


def read_table(path: str | os.PathLike) -> ScoreTable:
    """Read a whole score table.

    Raises:
        ScoreError: see `read_rows`; also if the table has no rows.
    """
    paths, generators, predictions, errors, stability = [], [], [], [], []
    labels, numbers = array("b"), array("d")
    for row in read_rows(path):
        paths.append(row.path)
        labels.append(LABELS.index(row.label))
        generators.append(intern(row.generator))  # few different ones: 10 million rows share them
        numbers.extend((np.nan,) * 3 if row.error else (row.logit_fake, row.logit_real, row.prob_fake))
        predictions.append(intern(row.prediction))
        errors.append(row.error)
        stability.append(intern(row.stability))
    if not paths:
        raise ScoreError(f"{path} has no rows below its header: score some images with test.py first")
    label = np.frombuffer(labels, dtype=np.int8)  # (N,)
    columns = np.frombuffer(numbers, dtype=np.float64).reshape(-1, 3)  # (N, 3)
    return ScoreTable(
        paths=paths,
        is_real=label == LABELS.index("real"),
        is_fake=label == LABELS.index("fake"),
        generators=generators,
        logits=columns[:, :2].astype(np.float32),  # (N, 2)
        prob_fake=columns[:, 2].copy(),
        predictions=predictions,
        errors=errors,
        stability=stability,
    )


def _line(row: Row, stability: bool) -> str:
    """One record, numbers in the shortest form that reads back to the same float32 or float64."""
    logits = ["" if x is None else str(np.float32(x)) for x in (row.logit_fake, row.logit_real)]
    prob = "" if row.prob_fake is None else repr(float(row.prob_fake))
    error = " ".join(row.error.split())  # one line
    text = [_cell(x) for x in (row.path, row.label, row.generator)]
    further = [row.stability] if stability else []
    return ",".join([*text, *logits, prob, row.prediction, _cell(error), *further]) + "\n"


def _cell(text: str) -> str:
    """A text as a CSV cell: safe in a spreadsheet, quoted where needed.

    (csv.writer leaves a lone carriage return unquoted, at which its own reader then breaks the line.)
    """
    if text.startswith(GUARDED_STARTS):
        text = GUARD + text
    if any(c in text for c in ',";\r\n') or text != text.strip():
        text = '"' + text.replace('"', '""') + '"'
    return text


def _unguarded(text: str) -> str:
    """Take away the apostrophe that `_cell` put in front."""
    return text[1:] if text.startswith(GUARD) and text[1:].startswith(GUARDED_STARTS) else text


def _column_positions(path: str | os.PathLike, header: list[str]) -> dict[str, int]:
    missing = [name for name in COLUMNS if name not in header and name != "error"]
    if missing:
        got = ",".join(header)
        got = f"{got[:80]!r}..." if len(got) > 80 else repr(got)
        raise ScoreError(
            f"{path}, line 1: no column {', '.join(missing)} in {got}; a score table of test.py was wanted,"
            f" with the columns {','.join(COLUMNS)}"
        )
    return {name: header.index(name) for name in (*COLUMNS, STABILITY) if name in header}


def _row(cells: list[str], where: dict[str, int], width: int) -> Row:
    """One record as a Row. Raises ValueError with what was got and wanted."""
    if len(cells) != width:
        raise ValueError(f"{len(cells)} cells, {width} were wanted as in the header")
    values = {name: cells[i] for name, i in where.items()}
    path, generator, error = (_unguarded(values.get(name, "")) for name in ("path", "generator", "error"))
    if not path:
        raise ValueError("an empty path")
    if values["label"] not in LABELS:
        raise ValueError(f"label {values['label']!r}, real, fake or nothing was wanted")
    if error:
        return Row(path, values["label"], generator, error=error)
    logit_fake, logit_real, prob_fake = (
        _number(name, values[name]) for name in ("logit_fake", "logit_real", "prob_fake")
    )
    if not 0 <= prob_fake <= 1:
        raise ValueError(f"prob_fake {values['prob_fake']}, a number from 0 to 1 was wanted")
    if values["prediction"] not in PREDICTIONS:
        raise ValueError(f"prediction {values['prediction']!r}, {', '.join(PREDICTIONS)} was wanted")
    stability = values.get(STABILITY, "")
    if stability not in STABILITIES:
        raise ValueError(f"stability {stability!r}, stable, unstable or nothing was wanted")
    return Row(
        path, values["label"], generator, logit_fake, logit_real, prob_fake, values["prediction"], stability=stability
    )


def _number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = np.nan
    if not np.isfinite(value):
        raise ValueError(f"{name} {text!r}, a finite number was wanted (or a text in the error column)")
    return value


def _whole_records(file: BinaryIO) -> tuple[int, int]:
    """How many records are whole, and where the last ends (bytes). In a whole one, quotes come in pairs."""
    records = end = position = 0
    quoted = False
    for line in file:
        position += len(line)
        quoted ^= line.count(b'"') % 2 == 1
        if line.endswith(b"\n") and not quoted:
            records, end = records + 1, position
    return records, end


def residual_path(folder: str | os.PathLike, image: str) -> Path:
    """Where the residual picture of an image is: folder/the image's path.residual.png.

    The suffix stays, so that a.png and a.jpg have a picture each; the path loses its root, and "__" stands
    for "..", so that all of them are inside the folder.
    """
    parts = Path(os.path.splitdrive(os.path.normpath(image))[1]).parts
    inside = ["__" if part == os.pardir else part for part in parts if part.strip("\\/")]
    return Path(folder, *inside[:-1], f"{inside[-1]}.residual.png")
