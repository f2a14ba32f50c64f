"""Write a web page that shows the test results of a detector.

The page is one HTML file that contains all figures and thumbnails.
"""

import base64
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import jinja2
import numpy as np

from data.images import read_image_as_pillow_rgb
from data.perturbations import PerturbationSetting
from evaluation import figures, metrics
from evaluation.score_table import ScoreTable, path_of_residual_picture, read_json_record_of_score_table, read_table
from utils.console import make_printable
from utils.errors import UserError
from utils.files import choose_unique_names, make_folder, open_for_atomic_write, require_new_or_marked_file

WORST = 10  # number of images with the most wrong P(fake) that the page shows for each score table
THUMBNAIL_SIDES = {"image": 320, "residual": 720}  # kind of picture -> longest allowed thumbnail side in pixels
MARK = '<meta name="generator" content="beyond-the-spectrum report">'  # text that every page of this program contains


class Scores(NamedTuple):
    """The content of a score table and of the JSON file beside it, and the metrics of the score table."""

    name: str
    path: Path
    table: ScoreTable
    record: dict  # content of the JSON file that test.py wrote beside the score table; {} if there is no file
    summary: dict  # metrics of the score table, from `metrics.compute_metrics_overall_and_per_generator`

    @property
    def perturbation(self) -> PerturbationSetting:
        """The perturbation of the scored images, or the perturbation "none" if the images were not perturbed."""
        recorded = self.record.get("perturbation")
        if not isinstance(recorded, dict):
            recorded = {}
        return PerturbationSetting(recorded.get("name") or "none", recorded.get("strength"))

    @property
    def detector_fingerprints(self) -> str:
        """The weight hashes of the classifier and the re-synthesizer as one text, or "" if no detector was recorded."""
        recorded = self.record.get("detector")
        if not isinstance(recorded, dict):
            return ""
        return f"{recorded.get('classifier_fingerprint')} {recorded.get('resynthesizer_fingerprint')}"


def load_score_tables(files: Sequence[str | os.PathLike], resamples: int = metrics.RESAMPLES) -> list[Scores]:
    """Read score tables and compute their metrics.

    Raises:
        UserError: if a score table cannot be read, or if `files` contains the same path twice.
    """
    tables = []
    for file, name in zip(files, choose_names_of_score_tables(files), strict=True):
        table, record = read_table(file), read_json_record_of_score_table(file)
        settings = record.get("settings")
        seed = settings.get("seed", 0) if isinstance(settings, dict) else 0  # as in test.py
        tables.append(
            Scores(
                name,
                Path(file),
                table,
                record,
                metrics.compute_metrics_overall_and_per_generator(table, resamples, seed),
            )
        )
    return tables


def choose_names_of_score_tables(files: Sequence[str | os.PathLike]) -> list[str]:
    """Name each score table by the fewest last parts of its path that make all names different, such as "run1/scores".

    Raises:
        UserError: if `files` contains the same path twice.
    """
    names = choose_unique_names([Path(os.path.abspath(file)).with_suffix("") for file in files])
    for file, name in zip(files, names, strict=True):
        if names.count(name) > 1:
            raise UserError(f"{make_printable(file)} is given twice: give each score table once")
    return names


def write_report_page(
    tables: Sequence[Scores], out: str | os.PathLike, residuals: str | os.PathLike | None = None
) -> Path:
    """Write the web page OUT/report.html, and return its path.

    Args:
        residuals: folder into which `test.py --save-residuals` drew residuals, or None for a page without residuals.
    Raises:
        UserError: if the page cannot be written, or report.html exists and was not written by this program.
    """
    page = Path(out, "report.html")
    require_new_or_marked_file(page, MARK.encode())
    make_folder(out)
    clean = [t for t in tables if t.perturbation.name == "none"]
    perturbed = sorted((t for t in tables if t.perturbation.name != "none"), key=perturbation_sorting_key)
    sections = []
    for scores in clean or perturbed:
        worst = [describe_image(scores, row, residuals) for row in find_most_wrongly_scored_images(scores.table)]
        sections.append((scores, draw_roc_and_histogram(scores), worst))
    summaries = {f"{t.perturbation.label} ({t.name})": t.summary for t in clean + perturbed}
    text = load_page_template().render(
        mark=MARK,
        tables=tables,
        sections=sections,
        perturbed=metrics.make_table_of_metrics_per_generator(summaries) if perturbed else [],
        curves=[draw_robustness_curves(own) for own in group_score_tables_by_detector(clean + perturbed)],
        metrics=metrics,
    )
    with open_for_atomic_write(os.path.realpath(page)) as file:
        file.write(text.encode())
    return page


def load_page_template() -> jinja2.Template:
    """Load the jinja2 template report.html.

    If an entry is missing in the JSON file of a score table, the page shows nothing in its place.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Plain strings may contain control characters, which `make_printable` escapes.
        # Strings of the type markupsafe.Markup are finished HTML, and must stay unchanged.
        finalize=lambda value: make_printable(value) if type(value) is str else value,
    )
    return environment.get_template("report.html")


def draw_roc_and_histogram(scores: Scores) -> str | None:
    """Draw ROC curves and histograms for one score table. Returns a PNG data URI, or None if no image has a score."""
    if not scores.table.has_score.any():
        return None
    return draw_figure_as_data_uri(figures.draw_roc_and_histograms, scores.table)


def group_score_tables_by_detector(tables: Sequence[Scores]) -> list[list[Scores]]:
    """Group score tables that were computed with the same detector."""
    groups = {}
    for scores in tables:
        groups.setdefault(scores.detector_fingerprints, []).append(scores)
    return list(groups.values())


def draw_robustness_curves(tables: Sequence[Scores]) -> str | None:
    """Draw the AUROC of one detector as a function of the strength of each perturbation.

    Returns:
        A PNG data URI, or None if no perturbation was tested at two or more strengths.
    """
    curves = collect_robustness_curves([t for t in tables if t.perturbation.name != "none"])
    if not curves:
        return None
    clean = [t for t in tables if t.perturbation.name == "none"]
    baseline = {}
    if clean:
        baseline = {name: measured["auroc"] for name, measured in clean[0].summary["generators"].items()}
    return draw_figure_as_data_uri(figures.draw_auroc_by_perturbation_strength, curves, baseline)


def draw_figure_as_data_uri(figure: Callable, *content) -> str:
    """Draw a figure, and return the PNG file as a data URI.

    Args:
        figure: function of `evaluation.figures` whose last argument is the path of the PNG file to write.
    """
    with TemporaryDirectory() as folder:
        path = Path(folder, "figure.png")
        figure(*content, path)
        return encode_bytes_as_data_uri(path.read_bytes(), "image/png")


def encode_bytes_as_data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def perturbation_sorting_key(scores: Scores) -> tuple[str, float]:
    """Return a key that sorts score tables by the name of their perturbation and its strength, weakest first."""
    strength = scores.perturbation.strength or 0
    if scores.perturbation.sweep.smaller_is_harder:
        strength = -strength
    return scores.perturbation.name, strength


def collect_robustness_curves(perturbed: Sequence[Scores]) -> dict[str, list[tuple[float, dict]]]:
    """Collect the metrics of each perturbation that was tested at two or more strengths.

    Returns:
        For each perturbation, a list of pairs (strength, {generator: metrics}).
    """
    curves = {}
    for scores in perturbed:
        generators = scores.summary["generators"]
        measured = {name: values for name, values in generators.items() if values["auroc"] is not None}
        strength = scores.perturbation.strength
        if strength is not None and measured:
            curves.setdefault(scores.perturbation.name, []).append((strength, measured))
    return {name: points for name, points in curves.items() if len(points) > 1}


def find_most_wrongly_scored_images(table: ScoreTable, count: int = WORST) -> np.ndarray:
    """Find the images with the most wrong P(fake): fake images with low P(fake), and real images with high P(fake).

    Returns:
        At most `count` row numbers of the score table, sorted from the most to the least wrong P(fake).
    """
    rows = np.flatnonzero(table.has_label_and_score)
    wrongness = np.where(table.is_fake, -table.logit_margins, table.logit_margins)[rows]
    return rows[np.argsort(-wrongness, kind="stable")[:count]]


def describe_image(scores: Scores, row: int, residuals: str | os.PathLike | None) -> dict:
    """Collect the row number and the thumbnail of an image, and whether the detector classified it correctly.

    If the path of an image is relative, the function looks for the image in the working folder first, and then in the
    folder of the score table.
    """
    table = scores.table
    path = table.paths[row]
    picture, kind = Path(path), "image"
    if not picture.is_file():
        picture = scores.path.parent / path
    if residuals is not None and path_of_residual_picture(residuals, path).is_file():
        # A picture from `test.py --save-residuals` contains the image, so the page needs no thumbnail of the image file
        picture, kind = path_of_residual_picture(residuals, path), "residual"
    correct = (table.logit_margins[row] >= 0) == table.is_fake[row]
    source = make_thumbnail(picture, THUMBNAIL_SIDES[kind])
    return {"i": row, "kind": kind, "outcome": "correct" if correct else "wrong", "source": source}


def make_thumbnail(path: Path, side: int) -> str:
    """Make a small JPEG copy of an image file. Returns a data URI, or "" if the file cannot be read."""
    try:
        image = read_image_as_pillow_rgb(str(path))
    except UserError:
        return ""
    image.thumbnail((side, side))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=88)
    return encode_bytes_as_data_uri(file.getvalue(), "image/jpeg")
