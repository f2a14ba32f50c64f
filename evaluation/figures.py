"""Draw figures of scores, metrics and residuals as PNG files.

The colours of the generators are from Okabe and Ito (2008), so that colour-blind readers can distinguish the
generators.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from data.perturbations import PerturbationSetting
from evaluation import metrics
from evaluation.score_table import SOFTWARE, ScoreTable
from utils.console import make_printable
from utils.files import open_for_atomic_write

REAL_COLOR = "#767676"
COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":")  # line styles: the first for generators 1 to 7, the second for generators 8 to 14, ...
INK = "#222222"
STYLE = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "text.color": INK,
    "text.parse_math": False,  # a "$" in the name of a generator does not start a formula
    "xtick.color": INK,
    "ytick.color": INK,
}
DPI = 160
FEWEST_BINS, MOST_BINS = 10, 40  # smallest and largest number of bins of a histogram
LONGEST_NAME = 28  # maximum number of characters of a name in a legend
LONGEST_LEGEND = 6  # maximum number of entries of a legend inside a panel; longer legends go below the panels
LEGEND_ENTRY_WIDTH = 2.6  # width in inches of an entry in a legend below the panels
MOST_HISTOGRAMS = 4  # maximum number of histograms of fakes; with more generators, one histogram shows all fakes
LEFTMOST_FPR = 0.005  # left end of the logarithmic FPR axis; the end is further left with more than 100 real images
CHANCE_STYLE = {"color": REAL_COLOR, "lw": 0.9, "ls": (0, (2, 2)), "zorder": 1}
MARGIN_LABEL = "\N{LEFTWARDS ARROW} real     logit(fake) \N{MINUS SIGN} logit(real)     fake \N{RIGHTWARDS ARROW}"
HIGHEST_PICTURE = 34  # maximum height in inches of the panels that `draw_residual_picture` draws
BRIGHTEST = 0.005  # fraction of a residual's values that share the brightest colour: outliers would darken the picture


def draw_roc_and_histograms(table: ScoreTable, path: str | os.PathLike) -> None:
    """Draw three panels: ROC curves, ROC curves with a logarithmic FPR axis, and histograms of the scores."""
    with write_png_figure(path, size=(13, 4.2), shape=(1, 3)) as (left, middle, right):
        draw_roc(left, table)
        draw_roc(middle, table, is_logarithmic=True)
        draw_histograms(right, table)


def draw_auroc_by_perturbation_strength(
    curves: Mapping[str, Sequence[tuple[float, Mapping]]], clean: Mapping[str, float | None], path: str | os.PathLike
) -> None:
    """Draw AUROC against the strength of a perturbation, in one panel per perturbation.

    In each panel, the strength that changes images most is at the right end of the axis.

    Args:
        curves: a dict {name of a perturbation: pairs (strength, {name of a generator: metrics}) sorted by strength}.
        clean: AUROC of each generator on unperturbed images, drawn as a dotted line, or None if unknown.
    """
    generators = sorted({name for points in curves.values() for _, measured in points for name in measured})
    columns = min(len(curves), 3)
    rows = -(-len(curves) // columns)
    width, height = max(3.6 * columns, 5.2), 3.1 * rows + 0.5
    with write_png_figure(path, size=(width, height), shape=(rows, columns)) as panels:
        for panel, (perturbation, points) in zip(panels, curves.items(), strict=False):
            for i, name in enumerate(generators):
                own = [(strength, measured[name]) for strength, measured in points if name in measured]
                draw_robustness_curve(panel, own, name, choose_generator_line_style(i))
                if clean.get(name) is not None:
                    panel.axhline(clean[name], color=choose_generator_line_style(i)["color"], lw=1, ls=":")
            sweep = PerturbationSetting(perturbation).sweep
            panel.axhline(0.5, **CHANCE_STYLE)
            panel.set(title=shorten_name_for_legend(perturbation), xlabel=sweep.axis, ylabel="AUROC", ylim=(None, 1.01))
            panel.xaxis.set_inverted(sweep.smaller_is_harder)
        for panel in panels[len(curves) :]:
            panel.set_axis_off()
        draw_legend_below(panels[0], None)


def draw_residual_picture(
    x: np.ndarray,
    x_hat: np.ndarray,
    residual: np.ndarray,
    path: str | os.PathLike,
    title: str = "image",
    description: str = "",
) -> None:
    """Draw an image, its re-synthesis and the residual side by side, with a colour scale for the residual.

    Args:
        x: the image (3, H, W); values outside [0, 1] are clipped.
        x_hat: the re-synthesis (3, H, W); values outside [0, 1] are clipped.
        residual: (H_l, W_l), the absolute value of the residual, averaged over its channels.
        title: title of the first panel.
        description: text that is stored in the PNG file.
    """
    picture_height = min(3.4 * x.shape[1] / x.shape[2], HIGHEST_PICTURE)  # inches
    height = picture_height + 0.4  # inches: 0.3 for the title, 0.1 for the lower margin
    grid = {"left": 0, "right": 0.95, "bottom": 0.1 / height, "top": 1 - 0.3 / height, "wspace": 0.04}
    grid["width_ratios"] = (1, 1, 1, 0.04)
    with write_png_figure(path, (11, height), (1, 4), grid, description) as panels:
        brightest = float(np.quantile(residual, 1 - BRIGHTEST)) or 1.0
        panels[0].imshow(x.clip(0, 1).transpose(1, 2, 0), aspect="auto")
        panels[1].imshow(x_hat.clip(0, 1).transpose(1, 2, 0), aspect="auto")
        heat_map = panels[2].imshow(residual, cmap="magma", vmin=0, vmax=brightest, aspect="auto")
        panels[0].figure.colorbar(heat_map, cax=panels[3], extend="max")
        for panel, name in zip(panels[:3], (title, "re-synthesis", "residual"), strict=True):
            panel.set_title(name)
            panel.set_axis_off()


# --- panels ---------------------------------------------------------------------------------------------------


def draw_roc(axes: Axes, table: ScoreTable, is_logarithmic: bool = False) -> None:
    """Draw the ROC curve of each generator, with its AUROC in the legend."""
    left_end = LEFTMOST_FPR
    for i, (name, rows) in enumerate(metrics.select_fakes_and_reals_per_generator(table).items()):
        scores, is_fake = table.logit_margins[rows], table.is_fake[rows]
        if metrics.has_real_and_fake_images(is_fake):
            fpr, tpr = metrics.roc_curve(scores, is_fake)
            if is_logarithmic:
                # A logarithmic axis has no 0, so an FPR of 0 is drawn at half the smallest positive FPR
                smallest = max(0.5 / np.sum(~is_fake), 1e-5)
                fpr = np.maximum(fpr, smallest)
                left_end = min(left_end, smallest)
            label = f"{shorten_name_for_legend(name)}  {metrics.auroc(scores, is_fake):.3f}"
            axes.plot(fpr, tpr, label=label, lw=1.8, **choose_generator_line_style(i))
    chance = np.geomspace(1e-9, 1, 400)
    axes.plot(chance, chance, **CHANCE_STYLE)
    axes.set(ylim=(0, 1.012), ylabel="fakes found (true-positive rate)")
    axes.set_xlabel("reals called fake (false-positive rate)")
    if is_logarithmic:
        axes.set(xscale="log", xlim=(left_end, 1), title="ROC, logarithmic")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:g} %"))
    else:
        axes.set(xlim=(-0.01, 1), title="ROC")
        draw_legend(axes, "generator  AUROC", "lower right")


def draw_histograms(axes: Axes, table: ScoreTable) -> None:
    """Draw a histogram of the scores of real images, and a histogram for each generator's fakes."""
    table = table.select_rows(table.has_label_and_score if table.has_label_and_score.any() else table.has_score)
    edges = histogram_bin_edges(table.logit_margins)
    # The first and the last bin also count the scores that lie outside all bins
    scores = np.clip(table.logit_margins, edges[0], edges[-1])
    for name, rows, look in select_images_of_each_histogram(table):
        if rows.any():
            fractions = np.histogram(scores[rows], edges)[0] / rows.sum()
            axes.stairs(fractions, edges, fill=True, lw=1.6, label=f"{name} ({rows.sum():,})", **look)
    axes.axvline(0, color=INK, lw=0.9)
    axes.set(xlim=(edges[0], edges[-1]), ylabel="fraction of images", title="Scores", xlabel=MARGIN_LABEL)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    draw_legend(axes, None, "best")


def select_images_of_each_histogram(table: ScoreTable) -> list[tuple[str, np.ndarray, dict]]:
    """Select the images of each histogram: real images, unlabelled images, and the fakes of each generator.

    Returns:
        For each histogram, its name, a mask (N,) bool of its images, and its style as arguments for `Axes.stairs`.
    """
    grey = {"fc": (REAL_COLOR, 0.45), "ec": "none"}
    groups = [("real", table.is_real, grey), ("unlabelled", ~(table.is_real | table.is_fake), grey)]
    generators = np.array([name or metrics.UNNAMED for name in table.generators], dtype=object)
    fakes = {name: table.is_fake & (generators == name) for name in metrics.select_fakes_and_reals_per_generator(table)}
    if len(fakes) > MOST_HISTOGRAMS:
        fakes = {"all fakes": table.is_fake}
    for i, (name, rows) in enumerate(fakes.items()):
        style = choose_generator_line_style(i)
        look = {"fc": (style["color"], 0.13), "ec": style["color"], "ls": style["ls"]}
        groups.append((shorten_name_for_legend(name), rows, look))
    return groups


def draw_robustness_curve(
    axes: Axes, points: Sequence[tuple[float, Mapping]], generator: str, style: Mapping[str, str]
) -> None:
    """Draw the AUROC of one generator, with its bootstrap intervals if known, against a perturbation's strength."""
    strengths = [strength for strength, _ in points]
    values = [measured["auroc"] for _, measured in points]
    axes.plot(
        strengths, values, marker="o", ms=4.5, lw=1.8, label=shorten_name_for_legend(generator), clip_on=False, **style
    )
    intervals = [measured["intervals"]["auroc"] for _, measured in points if measured["intervals"]]
    if points and len(intervals) == len(points):
        low, high = np.transpose(intervals)
        axes.fill_between(strengths, low, high, color=style["color"], alpha=0.13, lw=0)


# --- parts of figures -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def write_png_figure(
    path: str | os.PathLike,
    size: tuple[float, float],
    shape: tuple[int, int],
    grid: Mapping | None = None,
    description: str = "",
) -> Iterator[np.ndarray]:
    """Yield the panels of a new figure as an array. When the `with` block ends, the figure is written to a PNG file.

    Args:
        size: width and height of the figure in inches.
        shape: number of rows and columns of panels.
        grid: arguments for `matplotlib.gridspec.GridSpec` that place the panels, or None if matplotlib chooses their
            places, which takes 0.6 s.
        description: text that is stored in the PNG file.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=size, dpi=DPI, layout="constrained" if grid is None else None)
        yield figure.subplots(*shape, squeeze=False, gridspec_kw=grid).ravel()
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        texts = {"Software": SOFTWARE, "Description": description}
        with open_for_atomic_write(path) as file:
            figure.savefig(file, format="png", metadata=texts, bbox_inches="tight" if grid is None else None)


def shorten_name_for_legend(name: str) -> str:
    """Shorten a name for a legend to at most LONGEST_NAME characters."""
    name = make_printable(name)
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}\N{HORIZONTAL ELLIPSIS}"


def choose_generator_line_style(i: int) -> dict[str, str]:
    """Return the colour and dashes of the i-th generator."""
    return {"color": COLORS[i % len(COLORS)], "ls": DASHES[i // len(COLORS) % len(DASHES)]}


def histogram_bin_edges(scores: np.ndarray) -> np.ndarray:
    """Choose the edges of histogram bins that cover the middle 99 % of the scores.

    One edge is at zero, so that no bin holds both negative and positive scores.
    """
    low, high = np.percentile(scores, [0.5, 99.5]) if len(scores) else (-1.0, 1.0)
    low, high = min(low, 0.0), max(high, 0.0)
    count = np.clip(1.5 * np.sqrt(len(scores)), FEWEST_BINS, MOST_BINS)
    width = (high - low) / (count - 2) or 0.05
    return width * np.arange(np.floor(low / width) - 1, np.ceil(high / width) + 2)


def draw_legend(axes: Axes, title: str | None, place: str) -> None:
    """Draw the legend of a panel: inside the panel, or below all panels if the legend is long."""
    entries = len(axes.get_legend_handles_labels()[0])
    if entries > LONGEST_LEGEND:
        draw_legend_below(axes, title)
    elif entries:
        axes.legend(loc=place, title=title, title_fontsize=8.5, alignment="left").set_zorder(5)
    else:
        centre = {"transform": axes.transAxes, "ha": "center", "va": "center"}
        axes.text(0.5, 0.5, "needs real and fake images", color=REAL_COLOR, **centre)


def draw_legend_below(axes: Axes, title: str | None) -> None:
    """Draw the legend of a panel below all panels."""
    handles, labels = axes.get_legend_handles_labels()
    columns = min(len(handles), int(axes.figure.get_figwidth() / LEGEND_ENTRY_WIDTH))
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0)}
    axes.figure.legend(handles, labels, title=title, ncols=columns, **place)
