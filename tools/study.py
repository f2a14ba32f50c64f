"""Make tables that compare the metrics of detectors.

Each line of a study file (CSV) names a cell of a table, and the score table (CSV file of test.py) from which the cell
is computed, for example:

    table,row,column,scores,generators
    main,pixel residual,seen,pixel_on_dalle_mini.csv,dalle_mini
    main,pixel residual,unseen,pixel_on_dalle_mini.csv,stable_diffusion;stylegan2

The entry `scores` is the path of a score table, relative to the folder of the study file. If the entry `generators` is
empty, all generators of the score table are used. A cell shows the mean of a metric over the generators of a line and
over all lines that name the cell, for example one line per random seed.
"""

import csv
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from evaluation import metrics
from evaluation.score_table import read_table
from utils.console import make_printable
from utils.errors import UserError

COLUMNS = ("table", "row", "column", "scores", "generators")


class Entry(NamedTuple):
    """One line of a study file, which assigns a score table to a cell of a table."""

    table: str
    row: str
    column: str
    scores: Path
    generators: tuple[str, ...]  # names of generators; () means all generators of the score table


def read_entries_of_study_file(path: str | os.PathLike) -> list[Entry]:
    """Read a study file.

    Raises:
        UserError: if the file cannot be read, or is not a study file.
    """
    name = make_printable(path)
    entries = []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = csv.DictReader(file, strict=True)
            if tuple(lines.fieldnames or ()) != COLUMNS:
                raise UserError(f"{name} is not a study file: expected the header {','.join(COLUMNS)}")
            for line in lines:
                if None in line or None in line.values() or not all(line[column] for column in COLUMNS[:4]):
                    raise UserError(
                        f"{name}, line {lines.line_num}: expected {len(COLUMNS)} values ({', '.join(COLUMNS)}), of"
                        " which only the last may be empty: correct the line"
                    )
                generators = tuple(filter(None, line["generators"].split(";")))
                scores = Path(path).parent / line["scores"]
                entries.append(Entry(line["table"], line["row"], line["column"], scores, generators))
    except OSError as error:
        raise UserError(f"cannot read the study file {name} ({error.strerror})") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read the study file {name} ({error})") from None
    return entries


def make_metric_table_of_study(path: str, table: str, metric: str, intervals: bool) -> list[list[str]]:
    """Make one table of a study, with numbers in percent.

    Args:
        metric: name of the metric, a key of `metrics.METRICS`.
        intervals: whether to add the range over the lines of the study file that belong to a cell or, for a single line
            with a single generator, the bootstrap interval.
    Returns:
        The rows of the table, each a list of cells, with the heading as the first row.
    Raises:
        UserError: if the study file has no line for `table`, or if a score table cannot be read.
    """
    entries = read_entries_of_study_file(path)
    chosen = [entry for entry in entries if entry.table == table]
    if not chosen:
        names = ", ".join(dict.fromkeys(entry.table for entry in entries))
        raise UserError(f"{make_printable(path)} has no table {table!r}: expected one of {make_printable(names)}")
    row_names = list(dict.fromkeys(entry.row for entry in chosen))
    column_names = list(dict.fromkeys(entry.column for entry in chosen))
    rows = [[metrics.METRICS[metric].label, *map(make_printable, column_names)]]
    for row in row_names:
        cells = []
        for column in column_names:
            same = [entry for entry in chosen if (entry.row, entry.column) == (row, column)]
            cells.append(format_mean_metric_of_cell(same, metric, intervals))
        rows.append([make_printable(row), *cells])
    return rows


def format_mean_metric_of_cell(entries: Sequence[Entry], metric: str, intervals: bool) -> str:
    """Format the mean of a metric over `entries`, the lines of a study file that belong to one cell, in percent.

    Returns "-" if `entries` is empty, or if the metric is not defined for one of the entries.
    """
    values = [compute_mean_metric_over_generators(entry, metric) for entry in entries]
    if not values or None in values:
        return "-"
    text = f"{100 * sum(values) / len(values):.1f}"
    if not intervals:
        return text
    if len(values) > 1:
        return f"{text} ({100 * min(values):.1f} to {100 * max(values):.1f})"
    measured = list(metrics_by_generator(entries[0], intervals=True).values())
    if len(measured) == 1:
        return metrics.format_percent(measured[0], metric)
    return text


def compute_mean_metric_over_generators(entry: Entry, metric: str) -> float | None:
    """Compute the mean of a metric over the generators of one line of a study file.

    Returns:
        The mean in [0, 1], or None if the metric is not defined for one of the generators.
    """
    values = [measured[metric] for measured in metrics_by_generator(entry, intervals=False).values()]
    if not values or None in values:
        return None
    return sum(values) / len(values)


def metrics_by_generator(entry: Entry, intervals: bool) -> dict[str, dict]:
    """Compute metrics for each generator of one line of a study file, as a dict {name of the generator: metrics}.

    Raises:
        UserError: if `entry` names a generator that is not in its score table.
    """
    summary = compute_metrics_of_score_table(entry.scores, intervals)
    names = entry.generators or tuple(summary["generators"])
    for name in names:
        if name not in summary["generators"]:
            known = ", ".join(summary["generators"])
            raise UserError(
                f"{make_printable(entry.scores)} has no generator {name!r}: expected one of {make_printable(known)}"
            )
    return {name: summary["generators"][name] for name in names}


@functools.cache
def compute_metrics_of_score_table(path: Path, intervals: bool) -> dict:
    """Compute all metrics of a score table, with bootstrap intervals, which take long, if `intervals` is True."""
    return metrics.compute_metrics_overall_and_per_generator(read_table(path), metrics.RESAMPLES if intervals else 0)
