"""Write a web page with the test results of a detector: ROC curves, intervals, robustness and the worst mistakes.

The page is one HTML file that contains all figures and thumbnails. It runs no scripts and loads no other files.
"""

import base64
import io
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import jinja2
import numpy as np

from data.images import read_rgb_image
from data.perturbations import PerturbationSetting
from evaluation import figures, metrics
from evaluation.score_table import ScoreTable, read_record, read_table, residual_path
from utils.console import printable
from utils.errors import UserError
from utils.files import atomic, make_folder

WORST = 10  # number of images shown per score table
THUMBNAIL_SIDES = {"image": 320, "residual": 720}  # length of the longer side in pixels
MARK = '<meta name="generator" content="beyond-the-spectrum report">'  # text in every page of this program


class Scores(NamedTuple):
    """A score table with its metrics and its JSON record."""

    name: str
    path: Path
    table: ScoreTable
    record: dict  # content of the JSON file beside the table: settings, versions, ...; may be empty
    summary: dict  # metrics of the table, from `metrics.summarize`

    @property
    def perturbation(self) -> PerturbationSetting:
        """The perturbation of the images. The name of the perturbation is "none" for unperturbed images."""
        recorded = self.record.get("perturbation")
        if not isinstance(recorded, dict):
            recorded = {}
        return PerturbationSetting(recorded.get("name") or "none", recorded.get("strength"))


def load_tables(files: Sequence[str | os.PathLike], resamples: int = metrics.RESAMPLES) -> list[Scores]:
    """Read score tables and compute their metrics.

    Raises:
        UserError: if a score table cannot be read, or a file is given twice.
    """
    tables = []
    for file, name in zip(files, unique_names(files), strict=True):
        table, record = read_table(file), read_record(file)
        settings = record.get("settings")
        seed = settings.get("seed", 0) if isinstance(settings, dict) else 0  # as in test.py
        tables.append(Scores(name, Path(file), table, record, metrics.summarize(table, resamples, seed)))
    return tables


def unique_names(files: Iterable[str | os.PathLike]) -> list[str]:
    """Name each file by its stem. Parent folders are added to all names until no two names are equal."""
    parts = [Path(os.path.abspath(file)).with_suffix("").parts for file in files]
    longest = max((len(p) for p in parts), default=1)
    for depth in range(1, longest + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError("the same score table is given twice")


def write_page(tables: Sequence[Scores], out: str | os.PathLike, residuals: str | os.PathLike | None = None) -> Path:
    """Write OUT/report.html.

    Args:
        residuals: folder of residual pictures, from `test.py --save-residuals`. None: images are shown instead.
    Returns:
        The path of the page.
    Raises:
        UserError: if the page cannot be written, or a report.html exists that this program did not write.
    """
    page = Path(out, "report.html")
    require_own_page(page)
    make_folder(out)
    clean = [t for t in tables if t.perturbation.name == "none"]
    perturbed = sorted((t for t in tables if t.perturbation.name != "none"), key=difficulty)
    sections = []
    for scores in clean or perturbed:
        worst = [card(scores, row, residuals) for row in most_wrong(scores.table)]
        sections.append((scores, draw_scores(scores), worst))
    summaries = {f"{t.perturbation.label} ({t.name})": t.summary for t in clean + perturbed}
    text = template().render(
        mark=MARK,
        tables=tables,
        sections=sections,
        perturbed=metrics.rows_by_generator(summaries) if perturbed else [],
        curves=draw_robustness(clean, perturbed),
        metrics=metrics,
    )
    with atomic(os.path.realpath(page)) as file:
        file.write(text.encode())
    return page


def require_own_page(page: Path) -> None:
    """Raise a UserError if the page exists and does not contain MARK, which this program writes into its pages."""
    if not os.path.lexists(page):
        return
    try:
        own = MARK in page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        own = False
    if not own:
        raise UserError(f"{printable(page)} was not written by this program: give another --out")


def template() -> jinja2.Template:
    """Load the template report.html. Texts are escaped and made printable. Missing entries of a record stay empty."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,  # Markup is escaped already
    )
    return environment.get_template("report.html")


def draw_scores(scores: Scores) -> str | None:
    """Draw ROC curves and histograms of a score table. Returns a data URI; None if no image has a score."""
    if not scores.table.scored.any():
        return None
    return draw(figures.roc_and_histogram, scores.table)


def draw_robustness(clean: Sequence[Scores], perturbed: Sequence[Scores]) -> str | None:
    """Draw AUROC against the strength of each perturbation. Returns a data URI; None if there is no curve."""
    curves = robustness_curves(perturbed)
    if not curves:
        return None
    baseline = {}
    if clean:
        baseline = {name: measured["auroc"] for name, measured in clean[0].summary["generators"].items()}
    return draw(figures.robustness, curves, baseline)


def draw(figure: Callable, *content) -> str:
    """Call a function of `evaluation.figures` that writes a PNG file. Returns the file as a data URI."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "figure.png")
        figure(*content, path)
        return data_uri(path.read_bytes(), "image/png")


def data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def difficulty(scores: Scores) -> tuple[str, float]:
    """Return the sorting key of a perturbed score table: name of the perturbation, then strength, the hardest last."""
    strength = scores.perturbation.strength or 0
    if scores.perturbation.sweep_entry.smaller_is_harder:
        strength = -strength
    return scores.perturbation.name, strength


def robustness_curves(perturbed: Sequence[Scores]) -> dict[str, list[tuple[float, dict]]]:
    """Collect {perturbation: [(strength, {generator: metrics}), ...]} for perturbations with at least two strengths."""
    curves = {}
    for scores in perturbed:
        generators = scores.summary["generators"]
        measured = {name: values for name, values in generators.items() if values["auroc"] is not None}
        strength = scores.perturbation.strength
        if strength is not None and measured:
            curves.setdefault(scores.perturbation.name, []).append((strength, measured))
    return {name: points for name, points in curves.items() if len(points) > 1}


def most_wrong(table: ScoreTable, count: int = WORST) -> np.ndarray:
    """Find the images with the worst scores: fakes that look real, reals that look fake. Returns row numbers.

    At most `count` row numbers are returned, the worst image first.
    """
    rows = np.flatnonzero(table.usable)
    wrongness = np.where(table.is_fake, -table.margins, table.margins)[rows]
    return rows[np.argsort(-wrongness, kind="stable")[:count]]


def card(scores: Scores, row: int, residuals: str | os.PathLike | None) -> dict:
    """Describe an image for the page: its row number, a thumbnail, and whether the larger logit is right.

    A relative path is looked up in the working folder, then in the folder of the score table.
    """
    table = scores.table
    path = table.paths[row]
    picture, kind = Path(path), "image"
    if not picture.is_file():
        picture = scores.path.parent / path
    if residuals is not None and residual_path(residuals, path).is_file():
        picture, kind = residual_path(residuals, path), "residual"  # shows the image and the residual
    right = (table.margins[row] >= 0) == table.is_fake[row]
    source = thumbnail(picture, THUMBNAIL_SIDES[kind])
    return {"i": row, "kind": kind, "side": "right" if right else "wrong", "source": source}


def thumbnail(path: Path, side: int) -> str:
    """Make a small JPEG image of an image file. Returns a data URI, or "" if the file cannot be read."""
    try:
        image = read_rgb_image(str(path))
    except UserError:
        return ""
    image.thumbnail((side, side))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=88)
    return data_uri(file.getvalue(), "image/jpeg")
