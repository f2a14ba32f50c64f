"""One page that shows what a detector does on a test: curves, intervals, robustness, and its worst mistakes.

    python -m tools.report SCORES.csv [SCORES.csv ...] --out DIR [--residuals DIR]
    python -m tools.report SCORES.csv [SCORES.csv ...] --markdown [METRIC]
    python -m tools.report --refresh DOCUMENT.md [DOCUMENT.md ...] [--check]

Reads score tables of test.py, and for settings and versions the SCORES.json beside each. Writes DIR/report.html (the
template is report.html here), which holds everything it shows (no scripts, nothing fetched from anywhere), and its
figures as PNG beside it; or prints the metrics, or one of them compactly, as a markdown table.

A table whose SCORES.json has {"perturbation": {"name": "jpeg", "strength": 75}} is of perturbed images: together these
become robustness curves, and the other tables are shown in full.

--refresh makes the tables of documents anew: what stands below a line such as

    <!-- made by: python -m tools.report results/*.csv --markdown auroc -->

up to the next empty line is replaced by what this command prints.
"""

import argparse
import base64
import glob
import io
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np

from data.images import read_rgb
from data.perturbations import PerturbationSetting
from evaluation import figures, metrics
from evaluation.score_table import ScoreTable, read_record, read_table, residual_path
from utils.console import printable, text_table
from utils.errors import UserError, run_program
from utils.files import atomic, make_folder

WORST = 10  # images shown
THUMBNAIL = {"image": 320, "residual": 720}  # pixels, the longer side
COMPARED = ("accuracy", "auroc", "average_precision")  # columns of the comparison: those that have intervals
MADE_BY = re.compile(r"^(<!-- made by: (.+) -->).*(?:\n.*\S.*)*", re.MULTILINE)  # (comment (command)), table
PROGRAM = "python -m tools.report"


class Scores(NamedTuple):
    """A score table with what is known about it."""

    name: str
    path: Path
    table: ScoreTable
    record: dict  # settings, versions, ... of the JSON beside it
    summary: dict

    @property
    def cell(self) -> PerturbationSetting:
        """The perturbation of the images; its name is "none" for unchanged images."""
        p = self.record.get("perturbation")
        p = p if isinstance(p, dict) else {}
        return PerturbationSetting(p.get("name") or "none", p.get("strength"))


def load_tables(csv_files: Sequence[str | os.PathLike], resamples: int = metrics.RESAMPLES) -> list[Scores]:
    """The score tables with their metrics, under names that tell them apart. Raises UserError if one cannot be read."""
    tables = []
    for path, name in zip(map(Path, csv_files), unique_names(csv_files), strict=True):
        table, record = read_table(path), read_record(path)
        settings = record.get("settings")
        seed = settings.get("seed", 0) if isinstance(settings, dict) else 0  # so intervals are those of test.py
        tables.append(Scores(name, path, table, record, metrics.summarize(table, resamples, seed)))
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

    residuals: the folder of test.py --save-residuals. Raises UserError if nothing can be written.
    """
    out = make_folder(out)
    clean = [t for t in tables if t.cell.name == "none"]
    perturbed = sorted((t for t in tables if t.cell.name != "none"), key=by_difficulty)
    curves = robustness_curves(perturbed)
    baseline = {name: m["auroc"] for t in clean[:1] for name, m in t.summary["generators"].items()}
    summaries = {f"{t.cell.label} ({t.name})": t.summary for t in clean + perturbed}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,  # records made elsewhere may lack anything
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,  # what is Markup is escaped already
    )
    page = environment.get_template("report.html").render(
        tables=tables,
        sections=[
            (t, draw_scores(t, out), [card(t, i, residuals) for i in most_wrong(t.table)]) for t in clean or perturbed
        ],
        perturbed=metrics.rows_by_generator(summaries) if perturbed else [],
        curves=draw(figures.robustness, out / "robustness.png", curves, baseline) if curves else None,
        metrics=metrics,
    )
    with atomic(out / "report.html") as file:
        file.write(page.encode())
    return out / "report.html"


def draw_scores(scores: Scores, out: Path) -> str | None:
    """The figure of a table; None where no image has a score."""
    stem = "".join(c if c.isalnum() or c in "-_." else "_" for c in scores.name).lstrip(".") or "table"
    drawn = scores.table.scored.any()
    return draw(figures.roc_and_histogram, out / f"{stem}_scores.png", scores.table) if drawn else None


def draw(figure: Callable, path: Path, *content) -> str:
    """A figure of evaluation.figures, as a data URI."""
    figure(*content, path)
    return data_uri(path.read_bytes(), "image/png")


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
        image = read_rgb(str(path))
    except UserError:
        return ""
    image.thumbnail((side, side))
    image.save(buffer := io.BytesIO(), "JPEG", quality=88)
    return data_uri(buffer.getvalue(), "image/jpeg")


def by_difficulty(scores: Scores) -> tuple:
    """Sorts tables by what was done to the images: nothing first, then by name and strength, the hardest last."""
    name, strength = scores.cell
    return name != "none", name, (-1 if scores.cell.sweep.smaller_is_harder else 1) * (strength or 0)


def robustness_curves(perturbed: Sequence[Scores]) -> dict[str, list[tuple[float, dict]]]:
    """{perturbation: [(strength, {generator: metrics}), ...]}, two points or more, in the order of the tables."""
    curves: dict[str, list] = {}
    for t in perturbed:
        measured = {name: m for name, m in t.summary["generators"].items() if m["auroc"] is not None}
        if t.cell.strength is not None and measured:
            curves.setdefault(t.cell.name, []).append((t.cell.strength, measured))
    return {name: points for name, points in curves.items() if len(points) > 1}


def compact_rows(tables: Sequence[Scores], metric: str) -> list[list[str]]:
    """One metric: a row a table, a column a generator; of perturbed images: a row a perturbation, a column a detector."""
    tables = sorted(tables, key=by_difficulty)
    heading, *rows = metrics.rows_by_generator({t.name: t.summary for t in tables}, metric)
    if tables[-1].cell.name == "none":
        return [heading, *rows]
    places = [(t.cell.label, printable(t.name.removesuffix(f"_{t.cell.file_name}"))) for t in tables]
    cells = {place: " / ".join(row[1:]) for place, row in zip(places, rows, strict=True)}
    if len(cells) < len(tables):
        raise UserError("two score tables are of the same perturbation and detector: give one of them")
    labels, detectors = map(dict.fromkeys, zip(*cells, strict=True))
    rows = [[printable(label), *(cells.get((label, name), "-") for name in detectors)] for label in labels]
    return [[f"{heading[0]} of {' / '.join(heading[1:])}", *detectors], *rows]


def comparison(tables: Sequence[Scores]) -> list[list[str]]:
    return metrics.metric_rows({t.name: t.summary for t in tables}, COMPARED)


def markdown(tables: Sequence[Scores], metric: str) -> str:
    """The metrics, or one of them compactly, as a table of GitHub's markdown."""
    rows = compact_rows(tables, metric) if metric else comparison(tables)
    left = 1 if metric or len(tables) == 1 else 2  # columns flush left
    line = ["---" if i < left else "--:" for i in range(len(rows[0]))]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (cells[0], line, *cells[1:]))


def made_again(match: re.Match) -> str:
    """A "made by" line of a document, and the table that its command prints. match: of MADE_BY."""
    try:
        words = shlex.split(match[2])
        args = argument_parser().parse_args(sum((sorted(glob.glob(word)) or [word] for word in words[3:]), []))
        if words[:3] != PROGRAM.split() or args.markdown is None:
            raise UserError(f"{PROGRAM} FILES.csv --markdown was wanted")
        return f"{match[1]}\n{markdown(load_tables(args.scores), args.markdown)}"
    except (ValueError, SystemExit) as error:  # SystemExit: argparse has said why
        raise UserError(f"cannot do what a table is made by: {match[2]} ({error})") from None


def refresh(path: str, check: bool) -> None:
    """Make the tables of a markdown file anew. Raises UserError if one cannot be, or `check` finds a difference."""
    try:
        before = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {printable(path)} ({error})") from None
    after = MADE_BY.sub(made_again, before)
    if check and after != before:
        raise UserError(f"{printable(path)} differs from what its commands print; --refresh without --check mends it")
    if after != before:
        with atomic(path) as file:
            file.write(after.encode())


def argument_parser() -> argparse.ArgumentParser:
    about, of = "Make a page or a table of some score tables.", [n for n, m in metrics.METRICS.items() if m.column]
    parser = argparse.ArgumentParser(prog=PROGRAM, description=about, allow_abbrev=False)
    parser.add_argument("scores", nargs="*", metavar="SCORES.csv", help="score tables by test.py")
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("--out", metavar="DIR", help="writes DIR/report.html and its figures")
    about = f"prints a markdown table of the metrics instead, or of one of them: {', '.join(of)}"
    add("--markdown", nargs="?", const="", choices=["", *of], metavar="METRIC", help=about)
    add("--refresh", nargs="+", metavar="FILE.md", help="makes the tables below 'made by' comments of these files anew")
    parser.add_argument("--check", action="store_true", help="with --refresh: write nothing, fail if there is a change")
    parser.add_argument("--residuals", metavar="DIR", help="where test.py --save-residuals DIR put its pictures")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    args = (parser := argument_parser()).parse_args(arguments)
    if bool(args.scores) == bool(args.refresh):
        parser.error("wanted: SCORES.csv with --out or --markdown, or --refresh FILE.md")
    if args.residuals and not os.path.isdir(args.residuals):
        raise UserError(f"--residuals {args.residuals}: there is no such folder; test.py --save-residuals makes it")
    for path in args.refresh or ():
        refresh(path, args.check)
    if args.refresh:
        return 0
    tables = load_tables(args.scores)
    if args.markdown is not None:
        sys.stdout.write(markdown(tables, args.markdown) + "\n")
    else:
        page = write_page(tables, args.out, args.residuals)
        head = "in %, with 95% bootstrap intervals; fake is the positive class"
        table = text_table(comparison(tables), 1 + (len(tables) > 1))
        sys.stdout.write(f"{head}\n{table}\nreport: {printable(page)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
