"""Figures of score tables, drawn without pyplot's global state and without a display.

Fake is the positive class. Reals are grey everywhere, each generator keeps its colour and dash in all panels; the
colours are those of Okabe and Ito (2008), which colour-blind readers can tell apart.
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

from evaluation import metrics
from evaluation.score_table import ScoreTable
from utils.console import printable
from utils.files import atomic

REAL_COLOR = "#767676"
COLORS = "#D55E00 #0072B2 #009E73 #CC79A7 #E69F00 #56B4E9 #000000".split()
DASHES = ("-", "--", "-.", ":")  # once the colours are used up
INK = "#222222"
STYLE = {
    "font.size": 9.5,
    **{"axes.titlesize": 10.5, "axes.titleweight": "bold", "axes.titlelocation": "left"},
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **{"axes.grid": True, "axes.axisbelow": True, "grid.color": "#dddddd", "grid.linewidth": 0.6},
    "legend.fontsize": 8.5,
    "text.parse_math": False,  # a generator may be called $x
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color"), INK),
}
DPI = 160
BINS = (10, 40)  # fewest and most: with few images, many bins show noise
LONGEST_NAME = 28
LONGEST_LEGEND = 6  # entries that fit a panel
LEGEND_ENTRY = 2.6  # inches
MOST_OUTLINES = 4  # histograms that can be told apart in one panel
REALS = {"fc": (REAL_COLOR, 0.45), "ec": "none"}  # and images without a label
CHANCE = {"color": REAL_COLOR, "lw": 0.9, "ls": (0, (2, 2)), "zorder": 1}
MARGIN_LABEL = "\N{LEFTWARDS ARROW} real     logit(fake) \N{MINUS SIGN} logit(real)     fake \N{RIGHTWARDS ARROW}"
BRIGHTEST = 0.005  # of a residual's pixels


def roc_and_histogram(table: ScoreTable, path: str | os.PathLike) -> None:
    """How well a table's scores tell fakes from reals: ROC of each generator, and how the scores of the classes lie.

    The second panel spreads out the few false alarms that matter in practice.
    """
    with sheet(path, 13, 4.2, columns=3) as (left, middle, right):
        draw_roc(left, table)
        draw_roc(middle, table, log=True)
        draw_histogram(right, table)


def robustness(
    curves: Mapping[str, Sequence[tuple[float, Mapping]]], clean: Mapping[str, float | None], path: str | os.PathLike
) -> None:
    """AUROC against the strength of each perturbation, harder to the right.

    Args:
        curves: {perturbation: [(strength, {generator: metrics}), ...]}, in order of strength.
        clean: {generator: AUROC on the untouched images}, drawn as a dotted line where known.
    """
    from data.perturbations import PerturbationSetting  # here, because it takes seconds and most figures need none

    generators = sorted({name for points in curves.values() for _, measured in points for name in measured})
    columns = min(len(curves), 3)
    rows = -(-len(curves) // columns)
    with sheet(path, max(3.6 * columns, 5.2), 3.1 * rows + 0.5, rows, columns) as panels:
        for panel in panels[len(curves) :]:
            panel.set_axis_off()
        for panel, (perturbation, points) in zip(panels, curves.items(), strict=False):
            kind = PerturbationSetting(perturbation).sweep
            for i, name in enumerate(generators):
                style, known = line_style(i), [(x, measured[name]) for x, measured in points if name in measured]
                strengths, values = [x for x, _ in known], [m["auroc"] for _, m in known]
                panel.plot(strengths, values, marker="o", ms=4.5, lw=1.8, label=shorten(name), clip_on=False, **style)
                if known and all(m["intervals"] for _, m in known):
                    low, high = np.transpose([m["intervals"]["auroc"] for _, m in known])
                    panel.fill_between(strengths, low, high, color=style["color"], alpha=0.13, lw=0)
                if clean.get(name) is not None:
                    panel.axhline(clean[name], color=style["color"], lw=1, ls=":")
            panel.axhline(0.5, **CHANCE)
            panel.set(title=shorten(perturbation), xlabel=kind.axis, ylabel="AUROC", ylim=(None, 1.01))
            panel.xaxis.set_inverted(kind.smaller_is_harder)
        _legend(panels[0], None, below=True)


def residual_picture(x: np.ndarray, x_hat: np.ndarray, residual: np.ndarray, path: str | os.PathLike) -> None:
    """Image | re-synthesis | residual as a heat map with its scale, as a PNG.

    x, x_hat: (3, H, W), shown clipped to [0, 1]; residual: (H_l, W_l), the mean over its channels. The brightest
    BRIGHTEST of it share one colour, or a few pixels would leave the rest in the dark.
    """
    height = 3.4 * x.shape[1] / x.shape[2] + 0.4  # inches, 0.3 of it the title
    grid = {"left": 0, "right": 0.95, "bottom": 0.1 / height, "top": 1 - 0.3 / height, "wspace": 0.04}
    with sheet(path, 11, height, columns=4, width_ratios=(1, 1, 1, 0.04), **grid) as panels:
        top = float(np.quantile(residual, 1 - BRIGHTEST)) or 1.0
        for panel, picture in zip(panels, (x, x_hat), strict=False):
            panel.imshow(picture.clip(0, 1).transpose(1, 2, 0), aspect="auto")
        heat = panels[2].imshow(residual, cmap="magma", vmin=0, vmax=top, aspect="auto")
        panels[0].figure.colorbar(heat, cax=panels[3], extend="max")
        for panel, name in zip(panels, ("image", "re-synthesis", "residual"), strict=False):
            panel.set_title(name)
            panel.set_axis_off()


# --- panels ---


def draw_roc(axes: Axes, table: ScoreTable, log: bool = False) -> None:
    """ROC of each generator with its AUROC; `log`: the false-positive rate on a logarithmic axis."""
    lowest = 0.005  # the logarithmic axis begins there or below
    for i, (name, rows) in enumerate(metrics.generator_rows(table).items()):
        scores, is_fake = table.margins[rows], table.is_fake[rows]
        if metrics.both_classes(is_fake):
            fpr, tpr = metrics.roc_curve(scores, is_fake)
            smallest = max(0.5 / (~is_fake).sum(), 1e-5)  # stands for 0, which no logarithmic axis has
            label = f"{shorten(name)}  {metrics.auroc(scores, is_fake):.3f}"
            axes.plot(np.maximum(fpr, log * smallest), tpr, label=label, lw=1.8, **line_style(i))
            lowest = min(lowest, smallest)
    chance = np.geomspace(1e-9, 1, 400)
    axes.plot(chance, chance, **CHANCE)
    axes.set(xlim=(-0.01, 1), ylim=(0, 1.012), title="ROC", ylabel="fakes found (true-positive rate)")
    axes.set_xlabel("reals called fake (false-positive rate)")
    if log:
        axes.set(xscale="log", xlim=(lowest, 1), title="ROC, logarithmic")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:g} %"))
    else:
        _legend(axes, "generator  AUROC", loc="lower right")


def draw_histogram(axes: Axes, table: ScoreTable) -> None:
    """The scores of the reals, filled, and over them those of each generator's fakes, as shares of their images."""
    table = table.select(table.usable if table.usable.any() else table.scored)
    edges = _bin_edges(table.margins)
    scores = np.clip(table.margins, edges[0], edges[-1])  # outliers go into the outermost bins
    generators = np.array([name or metrics.UNNAMED for name in table.generators], dtype=object)
    fakes = {name: table.is_fake & (generators == name) for name in metrics.generator_rows(table)}
    if len(fakes) > MOST_OUTLINES:
        fakes = {"all fakes": table.is_fake}
    groups = [("real", table.is_real, None), ("unlabelled", ~(table.is_real | table.is_fake), None)]
    groups += [(shorten(name), rows, line_style(i)) for i, (name, rows) in enumerate(fakes.items())]
    for name, rows, style in groups:
        look = {"fc": (style["color"], 0.13), "ec": style["color"], "ls": style["ls"]} if style else REALS
        if rows.any():
            shares = np.histogram(scores[rows], edges)[0] / rows.sum()
            axes.stairs(shares, edges, fill=True, lw=1.6, label=f"{name} ({rows.sum():,})", **look)
    axes.axvline(0, color=INK, lw=0.9)
    axes.set(xlim=(edges[0], edges[-1]), ylabel="share of images", title="Scores", xlabel=MARGIN_LABEL)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    _legend(axes, None)


# --- pieces ---


@contextlib.contextmanager
def sheet(
    path: str | os.PathLike, width: float, height: float, rows: int = 1, columns: int = 1, **grid
) -> Iterator[np.ndarray]:
    """The panels (rows * columns,) of an empty figure, inches, which becomes a PNG when the `with` block ends.

    grid: exact places, such as left=0; without, labels and what stands below find their own room (which takes 0.6 s).
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), dpi=DPI, layout=None if grid else "constrained")
        yield figure.subplots(rows, columns, squeeze=False, gridspec_kw=grid).ravel()
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as file:
            size = None if grid else "tight"
            figure.savefig(file, format="png", metadata={"Software": None}, bbox_inches=size)


def shorten(name: str) -> str:
    """A name as it fits a legend."""
    name = printable(name)
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}\N{HORIZONTAL ELLIPSIS}"


def line_style(i: int) -> dict:
    """Colour and dash of the i-th generator."""
    return {"color": COLORS[i % len(COLORS)], "ls": DASHES[i // len(COLORS) % len(DASHES)]}


def _bin_edges(scores: np.ndarray) -> np.ndarray:
    """Edges of the histogram bins: what the middle 99 % of the scores cover, zero among the edges."""
    low, high = np.percentile(scores, [0.5, 99.5]) if len(scores) else (-1.0, 1.0)
    low, high = min(low, 0.0), max(high, 0.0)
    width = (high - low) / (np.clip(1.5 * np.sqrt(len(scores)), *BINS) - 2) or 0.05
    return width * np.arange(np.floor(low / width) - 1, np.ceil(high / width) + 2)


def _legend(axes: Axes, title: str | None, loc: str = "best", below: bool = False) -> None:
    """A legend in the panel, or below the figure if it is long."""
    handles, labels = axes.get_legend_handles_labels()
    if below or len(handles) > LONGEST_LEGEND:
        columns = min(len(handles), int(axes.figure.get_figwidth() / LEGEND_ENTRY))
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "ncols": columns}  # the sheet grows by it
        axes.figure.legend(handles, labels, title=title, **below)
    elif handles:
        axes.legend(loc=loc, title=title, title_fontsize=8.5, alignment="left").set_zorder(5)
    else:
        place = {"transform": axes.transAxes, "ha": "center", "va": "center"}
        axes.text(0.5, 0.5, "needs real and fake images", color=REAL_COLOR, **place)
