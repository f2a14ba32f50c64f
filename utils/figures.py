"""Figures of score tables, drawn without pyplot's global state and without a display.

Fake is the positive class. Reals are grey everywhere, each generator keeps its colour and dash in all panels;
the colours are those of Okabe and Ito, which colour-blind readers can tell apart.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from utils import metrics
from utils.scores import ScoreTable

REAL_COLOR = "#767676"
GENERATOR_COLORS = (
    "#D55E00",
    "#0072B2",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
)  # Okabe and Ito, 2008
DASHES = ("-", "--", "-.", ":")  # once the colours are used up
INK, FAINT = "#222222", "#dddddd"
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "text.color": INK,
    "text.usetex": False,
    "text.parse_math": False,  # a generator may be called $x
    "xtick.color": INK,
    "ytick.color": INK,
}
DPI = 160
BINS = (10, 40)  # fewest and most: with few images, many bins show noise
LONGEST_NAME = 28
LONGEST_LEGEND = 6  # entries that fit a panel
MOST_OUTLINES = 4  # histograms that can be told apart in one panel
PICTURE_INCHES = 3.2  # width of each panel of a residual picture
BRIGHTEST = 0.005  # of a residual's pixels

# How a perturbation's strength is drawn: its name on the axis, and whether smaller is harder on the detector.
STRENGTH_AXES = {
    "jpeg": ("quality", True),
    "blur": ("sigma in pixels", False),
    "noise": ("standard deviation, of [0, 1]", False),
    "resize": ("factor, and back", True),
}


def roc_and_histogram(table: ScoreTable, path: str | os.PathLike) -> None:
    """The PNG that test.py writes beside its table: ROC curves, and how the scores of the classes lie."""
    with rc_context(STYLE):
        figure = new_figure(10.5, 4.2, table)
        left, right = figure.subplots(1, 2)
        draw_roc(left, table)
        draw_histogram(right, table)
        save(figure, path)


def roc(table: ScoreTable, path: str | os.PathLike) -> None:
    """ROC curves per generator; the second panel spreads out the few false alarms that matter in practice."""
    with rc_context(STYLE):
        figure = new_figure(10.5, 4.4, table)
        left, right = figure.subplots(1, 2)
        draw_roc(left, table)
        draw_roc(right, table, log=True)
        save(figure, path)


def precision_recall(table: ScoreTable, path: str | os.PathLike) -> None:
    """Precision-recall curves per generator."""
    with rc_context(STYLE):
        figure = new_figure(5.25, 4.4, table)
        draw_precision_recall(figure.subplots(), table)
        save(figure, path)


def histogram(table: ScoreTable, path: str | os.PathLike) -> None:
    """Score histograms: each generator above the reals it is compared with."""
    groups = metrics.generator_rows(table) or {"": table.scored}
    columns = 1 if len(groups) <= 4 else 2
    rows = -(-len(groups) // columns)
    with rc_context(STYLE):
        figure = new_figure(5.25 * columns, 4.4 if rows == 2 else max(0.9 + 1.4 * rows, 3.2))
        panels = figure.subplots(rows, columns, sharex=True, squeeze=False)
        edges = _bin_edges(table.margins[table.scored])
        for i, (panel, (name, selected)) in enumerate(zip(panels.flat, groups.items(), strict=False)):
            _draw_classes(panel, table.select(selected), {name: _line_style(i)}, edges, headroom=1.4)
        for panel in panels.flat[len(groups) :]:
            panel.set_axis_off()
        panels[0, 0].set_title("Scores")
        figure.supxlabel(_MARGIN_LABEL, fontsize=9.5)
        save(figure, path)


def robustness(
    curves: Mapping[str, Mapping[str, Sequence[tuple[float, float, Sequence[float] | None]]]],
    clean: Mapping[str, float | None],
    path: str | os.PathLike,
) -> None:
    """AUROC against the strength of each perturbation, harder to the right.

    Args:
        curves: {perturbation: {generator: [(strength, AUROC, interval or None), ...]}}, strengths rising.
        clean: {generator: AUROC on the untouched images}, drawn as a dotted line where known.
    """
    generators = sorted({name for by_generator in curves.values() for name in by_generator})
    styles = {name: _line_style(i) for i, name in enumerate(generators)}
    columns = min(len(curves), 3)
    rows = -(-len(curves) // columns)
    with rc_context(STYLE):
        figure = new_figure(max(3.6 * columns, 5.2), 3.1 * rows + 0.5)
        panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
        for panel, (perturbation, by_generator) in zip(panels, curves.items(), strict=False):
            _draw_robustness(panel, perturbation, by_generator, clean, styles)
        for panel in panels[len(curves) :]:
            panel.set_axis_off()
        for panel in panels[::columns]:
            panel.set_ylabel("AUROC")
        _legend_below(figure, panels[0])
        save(figure, path)


# ---- panels ----


def draw_roc(axes: Axes, table: ScoreTable, log: bool = False) -> None:
    """ROC of each generator with its AUROC; `log`: the false-positive rate on a logarithmic axis."""
    lowest = 0.5 * min(metrics.FPR_LEVELS.values())  # the logarithmic axis shows these levels at least
    for i, (name, rows) in enumerate(metrics.generator_rows(table).items()):
        scores, is_fake = table.margins[rows], table.is_fake[rows]
        curve = metrics.roc_curve(scores, is_fake)
        if curve is None:
            continue
        fpr, tpr = curve
        label = f"{shorten(name)}  {metrics.auroc(scores, is_fake):.3f}"
        smallest = max(0.5 / int((~is_fake).sum()), 1e-5)  # stands for 0, which no logarithmic axis has
        axes.plot(np.maximum(fpr, smallest) if log else fpr, tpr, label=label, lw=1.8, **_line_style(i))
        lowest = min(lowest, smallest)
    chance = np.geomspace(1e-9, 1, 400)
    axes.plot([0, *chance], [0, *chance], color=REAL_COLOR, lw=0.9, ls=(0, (2, 2)), zorder=1)
    axes.set(ylim=(0, 1.012), ylabel="fakes found (true-positive rate)")
    if log:
        axes.set(xscale="log", xlim=(lowest, 1), title="ROC, logarithmic")
        axes.set_xlabel("reals called fake (false-positive rate, log)")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:g} %"))
        for level in metrics.FPR_LEVELS.values():
            axes.axvline(level, color=INK, lw=0.8, alpha=0.45)
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
            axes.text(level, 0.12, f"{level:.0%}", ha="center", fontsize=8, color=INK, bbox=box, zorder=1.5)
    else:
        axes.set(xlim=(-0.01, 1), title="ROC", xlabel="reals called fake (false-positive rate)")
        _legend(axes, "generator  AUROC", loc="lower right")


def draw_precision_recall(axes: Axes, table: ScoreTable) -> None:
    """Precision-recall of each generator with its average precision; dotted: the precision of guessing."""
    for i, (name, rows) in enumerate(metrics.generator_rows(table).items()):
        scores, is_fake = table.margins[rows], table.is_fake[rows]
        curve = metrics.precision_recall_curve(scores, is_fake)
        if curve is None:
            continue
        precision, recall = curve
        label = f"{shorten(name)}  {metrics.average_precision(scores, is_fake):.3f}"
        axes.step(recall, precision, where="post", label=label, lw=1.8, **_line_style(i))
        axes.axhline(is_fake.mean(), color=_line_style(i)["color"], lw=0.9, ls=":", zorder=1)
    axes.set(xlim=(0, 1.005), ylim=(0, 1.012), title="Precision and recall")
    axes.set(xlabel="fakes found (recall)", ylabel="right when it says fake (precision)")
    _legend(axes, "generator  AP", loc="lower left")


def draw_histogram(axes: Axes, table: ScoreTable) -> None:
    """How the scores of the reals and of each generator's fakes lie, as shares of their images."""
    labelled = table.scored & (table.is_real | table.is_fake)
    table = table.select(labelled if labelled.any() else table.scored)
    styles = {name: _line_style(i) for i, name in enumerate(metrics.generator_rows(table))}
    if len(styles) > MOST_OUTLINES:
        styles = {None: _line_style(0)}
    _draw_classes(axes, table, styles, _bin_edges(table.margins))
    axes.set(title="Scores", xlabel=_MARGIN_LABEL)


_MARGIN_LABEL = "\N{LEFTWARDS ARROW} real     logit(fake) \N{MINUS SIGN} logit(real)     fake \N{RIGHTWARDS ARROW}"


def _draw_classes(
    axes: Axes, table: ScoreTable, styles: Mapping[str, dict], edges: np.ndarray, headroom: float = 1.08
) -> None:
    """Histogram of a table's reals, filled, and over it the fakes of each generator in `styles` as outlines.

    The key None stands for all generators together.
    """
    scores = np.clip(table.margins, edges[0], edges[-1])  # outliers go into the outermost bins
    generators = np.array([name or metrics.UNNAMED for name in table.generators], dtype=object)

    def shares(rows: np.ndarray) -> np.ndarray:
        return np.histogram(scores[rows], edges)[0] / max(rows.sum(), 1)

    neither = ~(table.is_real | table.is_fake)
    for rows, label in ((table.is_real, "real"), (neither, "unlabelled")):
        if rows.any():
            text = f"{label} ({rows.sum():,})"
            axes.stairs(shares(rows), edges, fill=True, color=REAL_COLOR, alpha=0.45, label=text)
    for name, style in styles.items():
        rows = table.is_fake & ((generators == name) | (name is None))
        if rows.any():
            text = f"{'all fakes' if name is None else shorten(name)} ({rows.sum():,})"
            axes.stairs(shares(rows), edges, fill=True, color=style["color"], alpha=0.13)
            axes.stairs(shares(rows), edges, lw=1.6, label=text, color=style["color"], ls=style["ls"])
    axes.axvline(0, color=INK, lw=0.9)
    axes.set(xlim=(edges[0], edges[-1]), ylabel="share of images")
    axes.set_ylim(0, axes.get_ylim()[1] * headroom)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    _legend(axes, None, *(("upper right", 2) if headroom > 1.2 else ("best", 1)))


def _draw_robustness(
    axes: Axes, perturbation: str, by_generator: Mapping, clean: Mapping, styles: Mapping[str, dict]
) -> None:
    label, smaller_is_harder = strength_axis(perturbation)
    for name, points in by_generator.items():
        strengths, values = [p[0] for p in points], [p[1] for p in points]
        axes.plot(
            strengths, values, marker="o", ms=4.5, lw=1.8, clip_on=False, zorder=3, label=shorten(name), **styles[name]
        )  # fmt: skip
        band = [(s, *interval) for s, _, interval in points if interval]
        if len(band) > 1:
            axes.fill_between(*np.transpose(band), color=styles[name]["color"], alpha=0.13, lw=0)
        if clean.get(name) is not None:
            axes.axhline(clean[name], color=styles[name]["color"], lw=1, ls=":")
    axes.axhline(0.5, color=REAL_COLOR, lw=0.9, ls=(0, (2, 2)), zorder=1)
    if smaller_is_harder:
        axes.invert_xaxis()
    lowest = min(p[2][0] if p[2] else p[1] for points in by_generator.values() for p in points)
    axes.set(ylim=(min(axes.get_ylim()[0], 0.45, lowest), 1.01), xlabel=label, title=shorten(perturbation))


def residual_picture(x: np.ndarray, x_hat: np.ndarray, residual: np.ndarray, path: str | os.PathLike) -> None:
    """Image | re-synthesis | residual as a heat map with its scale, as a PNG.

    x, x_hat: (3, H, W), shown clipped to [0, 1]; residual: (H_l, W_l), the mean over its channels. The brightest
    BRIGHTEST of it share one colour, or a few pixels would leave the rest in the dark.
    """
    side = PICTURE_INCHES
    height, gap, title, scale = side * x.shape[1] / x.shape[2], 0.1, 0.3, 0.75  # inches
    size = 3 * side + 2 * gap + scale, height + title

    def place(left: float, bottom: float, width: float, height: float) -> list[float]:
        """Inches as shares of the figure."""
        return [left / size[0], bottom / size[1], width / size[0], height / size[1]]

    with rc_context(STYLE):
        figure = Figure(figsize=size, dpi=DPI, facecolor="white")
        FigureCanvasAgg(figure)
        panels = [figure.add_axes(place(i * (side + gap), 0, side, height)) for i in range(3)]
        for panel, picture, name in zip(panels, (x, x_hat), ("image", "re-synthesis"), strict=False):
            panel.imshow(picture.clip(0, 1).transpose(1, 2, 0), aspect="auto")
            panel.set_title(name)
        top = float(np.quantile(residual, 1 - BRIGHTEST)) or 1.0
        heat = panels[2].imshow(residual, cmap="magma", vmin=0, vmax=top, aspect="auto")
        panels[2].set_title("residual")
        bar = figure.add_axes(place(3 * side + 3 * gap, 0.15, 0.12, height - 0.3))
        figure.colorbar(heat, cax=bar, extend="max")
        for panel in panels:
            panel.set_axis_off()
        save(figure, path)


# ---- pieces ----


def new_figure(width: float, height: float, table: ScoreTable | None = None) -> Figure:
    """An empty figure, inches; higher where a legend of the table's generators goes below it."""
    entries = len(metrics.generator_rows(table)) if table else 0
    if entries > LONGEST_LEGEND:
        height += 0.4 + 0.19 * -(-entries // legend_columns(width))
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08, wspace=0.04)  # inches; else labels touch the edge
    FigureCanvasAgg(figure)
    return figure


def legend_columns(width: float) -> int:
    """How many entries of a legend fit side by side into a figure of so many inches."""
    return max(int(width / 2.6), 1)


def save(figure: Figure, path: str | os.PathLike) -> None:
    """Write the PNG, the same bytes for the same numbers; parent folders are made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", metadata={"Software": None})


def strength_axis(perturbation: str) -> tuple[str, bool]:
    """What the strength of a perturbation is, and whether smaller is harder. "jpeg, sweep" is "jpeg" here."""
    return STRENGTH_AXES.get(perturbation.split(",")[0], ("strength", False))


def shorten(name: str) -> str:
    """A name as it fits a legend."""
    name = metrics.printable(name)
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}\N{HORIZONTAL ELLIPSIS}"


def _line_style(i: int) -> dict:
    """Colour and dash of the i-th generator."""
    return {
        "color": GENERATOR_COLORS[i % len(GENERATOR_COLORS)],
        "ls": DASHES[i // len(GENERATOR_COLORS) % len(DASHES)],
    }


def _bin_edges(scores: np.ndarray) -> np.ndarray:
    """Edges of the histogram bins: what the middle 99 % of the scores cover, zero among the edges."""
    low, high = np.percentile(scores, [0.5, 99.5]) if len(scores) else (-1.0, 1.0)
    low, high = min(low, 0.0), max(high, 0.0)
    bins = np.clip(1.5 * np.sqrt(len(scores)), *BINS)
    width = (high - low) / (bins - 2) or 0.05
    return width * np.arange(np.floor(low / width) - 1, np.ceil(high / width) + 2)


def _legend(axes: Axes, title: str | None, loc: str, columns: int = 1) -> None:
    """A legend in the panel, or below the figure if it is long."""
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) > LONGEST_LEGEND:
        columns = legend_columns(axes.figure.get_figwidth())
        axes.figure.legend(handles, labels, loc="outside lower center", title=title, ncols=columns)
    elif handles:
        axes.legend(loc=loc, title=title, ncols=columns, title_fontsize=8.5, alignment="left").set_zorder(5)
    else:
        text = "needs real and fake images"
        axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=REAL_COLOR)


def _legend_below(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    columns = min(len(handles), legend_columns(figure.get_figwidth()))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
