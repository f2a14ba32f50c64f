"""One page that shows what a detector does on a test: curves, intervals, robustness, and its worst mistakes.

    python -m utils.report SCORES.csv [SCORES.csv ...] --out DIR [--residuals DIR]
    python -m utils.report SCORES.csv [SCORES.csv ...] --markdown

Reads score tables of test.py, and for settings and versions the SCORES.json beside each. Writes DIR/report.html (the
template is report.html here), which holds everything it shows (no scripts, nothing fetched from anywhere), and its
figures as PNG beside it; or prints the metrics as a markdown table.

A table whose SCORES.json has {"perturbation": {"name": "jpeg", "strength": 75}} is of perturbed images: together these
become robustness curves, and the other tables are shown in full.
"""

import argparse
import base64
import io
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
from PIL import Image, ImageOps

from data.images import FORMATS
from data.perturbations import Cell
from utils import figures, metrics
from utils.run import UserError, atomic, make_folder, run_program, shown, text_table
from utils.scores import ScoreTable, read_record, read_table, residual_path

WORST = 10  # images shown
THUMBNAIL = {"image": 320, "residual": 720}  # pixels, the longer side
CSS_PIXELS_PER_INCH = 96
COMPARED = ("accuracy", "auroc", "average_precision")  # columns of the comparison: those that have intervals


class Scores(NamedTuple):
    """A score table with what is known about it."""

    name: str
    path: Path
    table: ScoreTable
    record: dict  # settings, versions, ... of the JSON beside it
    summary: dict

    @property
    def cell(self) -> Cell:
        """What was done to the images; Cell("none"): nothing."""
        p = self.record.get("perturbation")
        p = p if isinstance(p, dict) else {}
        return Cell(p.get("name") or "none", p.get("strength"))


def load_tables(csv_files: Sequence[str | os.PathLike], resamples: int = metrics.RESAMPLES) -> list[Scores]:
    """The score tables with their metrics, under names that tell them apart.

    Raises:
        UserError: for a table or JSON that cannot be read.
    """
    tables = []
    for path, name in zip(map(Path, csv_files), unique_names(csv_files), strict=True):
        table, record = read_table(path), read_record(path)
        settings = record.get("settings")
        seed = settings.get("seed") if isinstance(settings, dict) else None  # of the intervals that test.py printed
        summary = metrics.summarize(table, resamples, seed if isinstance(seed, int) and seed >= 0 else 0)
        tables.append(Scores(name, path, table, record, summary))
    return tables


def unique_names(files: Iterable[str | os.PathLike]) -> list[str]:
    """A name for each table: the file's stem, with as many parent folders as it takes to tell them apart."""
    parts = [Path(os.path.abspath(f)).with_suffix("").parts for f in files]
    for depth in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError("the same score table was given twice")


def write_page(tables: Sequence[Scores], out: str | os.PathLike, residuals: str | os.PathLike | None = None) -> Path:
    """Write the page and its figures. Returns the path of the page.

    residuals: the folder of test.py --save-residuals.

    Raises:
        UserError: if they cannot be written.
    """
    out = make_folder(out)
    clean = [t for t in tables if t.cell.name == "none"]
    perturbed = sorted((t for t in tables if t.cell.name != "none"), key=by_difficulty)
    curves = robustness_curves(perturbed)
    baseline = {name: m["auroc"] for t in clean[:1] for name, m in t.summary["generators"].items()}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,  # records made elsewhere may lack anything
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: shown(value) if type(value) is str else value,  # what is Markup is escaped already
    )
    page = environment.get_template("report.html").render(
        tables=tables,
        sections=[
            (t, draw_all(t, out), [card(t, i, residuals) for i in most_wrong(t.table)]) for t in clean or perturbed
        ],
        perturbed=metrics.perturbation_rows(labelled([*clean, *perturbed])) if perturbed else [],
        curves=draw(figures.robustness, out / "robustness.png", curves, baseline) if curves else None,
        records=records(tables),
        metrics=metrics,
    )
    with atomic(out / "report.html") as file:
        file.write(page.encode())
    return out / "report.html"


def draw_all(scores: Scores, out: Path) -> dict[str, dict]:
    """The figures of a table, as far as it has what they need."""
    stem = "".join(c if c.isalnum() or c in "-_." else "_" for c in scores.name).lstrip(".") or "table"
    both = any(m["auroc"] is not None for m in scores.summary["generators"].values())
    kinds = [figures.roc, figures.precision_recall] * both + [figures.histogram] * bool(scores.table.scored.any())
    return {f.__name__: draw(f, out / f"{stem}_{f.__name__}.png", scores.table) for f in kinds}


def draw(figure: Callable, path: Path, *content) -> dict:
    """A figure of utils.figures, for the page at the size it was drawn for."""
    figure(*content, path)
    with Image.open(path) as image:
        width = round(image.width / figures.DPI * CSS_PIXELS_PER_INCH)
    return {"source": data_uri(path.read_bytes(), "image/png"), "width": width}


def data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def most_wrong(table: ScoreTable, count: int = WORST) -> np.ndarray:
    """Rows of the images whose score lies furthest on the wrong side, worst first. (<= count,) int."""
    rows = np.flatnonzero(table.usable)
    wrongness = np.where(table.is_fake, -table.margins, table.margins)[rows]
    return rows[np.argsort(-wrongness, kind="stable")[:count]]


def card(scores: Scores, i: int, residuals: str | os.PathLike | None) -> dict:
    """An image with its verdict. Its path is looked for as it stands, and from the table's own folder."""
    table = scores.table
    path = table.paths[i]
    picture, kind = Path(path) if os.path.isfile(path) else scores.path.parent / path, "image"
    if residuals is not None and residual_path(residuals, path).is_file():
        picture, kind = residual_path(residuals, path), "residual"  # shows the image, too
    right = (table.margins[i] >= 0) == table.is_fake[i]
    return {"i": i, "kind": kind, "side": "right" if right else "wrong", "source": thumbnail(picture, THUMBNAIL[kind])}


def thumbnail(path: Path, side: int) -> str:
    """A small JPEG of the file as a data URI; empty where there is none."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.draft("RGB", (side, side))  # JPEG: decode no more than needed
            image = ImageOps.exif_transpose(image).convert("RGB")
            image.thumbnail((side, side))
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=88)
    except (OSError, ValueError, SyntaxError, MemoryError, Image.DecompressionBombError):
        return ""
    return data_uri(buffer.getvalue(), "image/jpeg")


def by_difficulty(scores: Scores) -> tuple:
    """Sorts perturbed tables by name and strength, the hardest last."""
    name, strength = scores.cell
    return name, (-1 if scores.cell.kind.smaller_is_harder else 1) * (strength or 0)


def labelled(tables: Sequence[Scores]) -> dict[str, dict]:
    """The tables' summaries by what was done to the images; where that is the same, the table's name is behind it."""
    labels = [t.cell.label for t in tables]
    names = (
        label if labels.count(label) == 1 else f"{label}, {t.name}" for label, t in zip(labels, tables, strict=True)
    )
    return {name: t.summary for name, t in zip(names, tables, strict=True)}


def robustness_curves(perturbed: Sequence[Scores]) -> dict[str, dict[str, list]]:
    """{perturbation: {generator: [(strength, AUROC, interval or None), ...]}}, two points or more, the hardest last."""
    curves: dict[str, dict[str, list]] = {}
    for t in perturbed:
        name, strength = t.cell
        for generator, m in t.summary["generators"].items():
            if strength is not None and m["auroc"] is not None:
                point = strength, m["auroc"], (m["intervals"] or {}).get("auroc")
                curves.setdefault(name, {}).setdefault(generator, []).append(point)
    return {name: of for name, of in curves.items() if max(map(len, of.values())) > 1}


def records(tables: Sequence[Scores]) -> list[tuple[str, Mapping]]:
    """What is known of how the numbers were made: (names of tables, settings) for each run."""
    runs: list[tuple[list[str], dict]] = []
    for t in tables:
        known = {key: t.record.get(key) for key in ("settings", "detector", "versions")}
        known = {key: value for key, value in known.items() if isinstance(value, dict)}
        same = next((names for names, record in runs if record == known), None)
        runs.append(([t.name], known)) if same is None else same.append(t.name)
    return [(", ".join(names), record) for names, record in runs]


def markdown(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Rows of cells as a table of GitHub's markdown: the heading first, `left` columns flush left."""
    line = ["---" if i < left else "--:" for i in range(len(rows[0]))]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (cells[0], line, *cells[1:]))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m utils.report", description="Make one page of some score tables.", allow_abbrev=False
    )
    parser.add_argument("scores", nargs="+", metavar="SCORES.csv", help="score tables by test.py")
    output = parser.add_mutually_exclusive_group(required=True)
    output.add_argument("--out", metavar="DIR", help="writes DIR/report.html and its figures")
    output.add_argument("--markdown", action="store_true", help="prints a markdown table of the metrics instead")
    parser.add_argument("--residuals", metavar="DIR", help="where test.py --save-residuals DIR put its pictures")
    args = parser.parse_args(arguments)
    if args.residuals and not os.path.isdir(args.residuals):
        raise UserError(f"--residuals {args.residuals}: there is no such folder; test.py --save-residuals makes it")
    tables = load_tables(args.scores)
    rows, left = metrics.metric_rows({t.name: t.summary for t in tables}, COMPARED), 1 + (len(tables) > 1)
    if args.markdown:
        sys.stdout.write(markdown(rows, left) + "\n")
    else:
        page = write_page(tables, args.out, args.residuals)
        head = "in %, with 95% bootstrap intervals; fake is the positive class"
        sys.stdout.write(f"{head}\n{text_table(rows, left)}\nreport: {shown(page)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
