"""One page that shows what a detector does on a test: curves, intervals, robustness, and its worst mistakes.

    python -m utils.report SCORES.csv [SCORES.csv ...] --out DIR [--residuals DIR]

Reads score tables of test.py, and for settings and versions the SCORES.json beside each. Writes
DIR/report.html, which holds everything it shows (no scripts, nothing fetched from anywhere), and its figures as
PNG beside it.

A table whose SCORES.json has {"perturbation": {"name": "jpeg", "strength": 75}} is of perturbed images:
together these become robustness curves, and the other tables are shown in full. Residual pictures are looked for
where `utils.scores.residual_path` says test.py puts them.

Exit status: 0 done, 2 a mistake of the user's.
"""

import argparse
import base64
import html
import io
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from utils import figures, metrics
from utils.metrics import printable
from utils.scores import ScoreError, ScoreTable, read_table, residual_path

MISTAKE = 2  # exit status
WORST = 10  # images shown
MOST_ERRORS = 50  # listed
THUMBNAIL = {"image": 320, "residual": 720}  # pixels, the longer side
CSS_PIXELS_PER_INCH = 96
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")  # no others: Pillow runs Ghostscript on EPS, for one

COLUMNS = (
    ("n_real", "real", "images"),
    ("n_fake", "fake", "images"),
    ("auroc", "AUROC", "area under the ROC curve; 50 is guessing"),
    ("average_precision", "AP", "average precision, fake positive"),
    ("accuracy", "accuracy", "the larger logit decides"),
    ("accuracy_real", "acc. on reals", "share of the reals called real"),
    ("accuracy_fake", "acc. on fakes", "share of the fakes called fake"),
    ("eer", "EER", "equal error rate"),
    ("tpr_at_1_fpr", "TPR@1%FPR", "fakes found while 1 % of the reals are called fake"),
    ("tpr_at_5_fpr", "TPR@5%FPR", "fakes found while 5 % of the reals are called fake"),
)
ROC_CAPTION = "ROC per generator; right: the same, false-positive rate on a logarithmic axis. Dashed: guessing."
PR_CAPTION = "Precision and recall per generator. Dotted: the precision of guessing."
HISTOGRAM_CAPTION = (
    "Scores of each generator's fakes, over the reals they are compared with (grey)."
    " Right of the line the larger logit says fake."
)


class ReportError(ValueError):
    """A report that cannot be made: one line with what was got, what was wanted, the way out."""


class Perturbation(NamedTuple):
    """What was done to the images of a table; strength None: it varies from image to image."""

    name: str
    strength: float | None
    protocol: str = ""

    @property
    def label(self) -> str:
        return self.name if self.strength is None else f"{self.name} {self.strength:g}"


class Scores(NamedTuple):
    """A score table with what is known about it."""

    name: str
    path: Path
    table: ScoreTable
    about: dict  # settings, versions, ... of the JSON beside it
    summary: dict

    @property
    def perturbation(self) -> Perturbation | None:
        """None for untouched images."""
        p = self.about.get("perturbation")
        if not isinstance(p, dict) or p.get("name") in (None, "none"):
            return None
        strength = p.get("strength")
        number = isinstance(strength, int | float) and not isinstance(strength, bool)
        return Perturbation(str(p["name"]), float(strength) if number else None, str(p.get("protocol") or ""))


def write_report(
    csv_files: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    residuals: str | os.PathLike | None = None,
    resamples: int = metrics.RESAMPLES,
    seed: int = 0,
) -> Path:
    """Make the report of some score tables. Returns the path of the page.

    Raises:
        ScoreError, ReportError: for a table or JSON that cannot be read, a folder that cannot be written.
    """
    return write_page(load_tables(csv_files, resamples, seed), out, residuals)


def load_tables(csv_files: Sequence[str | os.PathLike], resamples: int, seed: int) -> list[Scores]:
    """The score tables with their metrics, under names that tell them apart."""
    names = unique_names(csv_files)
    return [load_scores(Path(f), name, resamples, seed) for f, name in zip(csv_files, names, strict=True)]


def write_page(tables: Sequence[Scores], out: str | os.PathLike, residuals: str | os.PathLike | None) -> Path:
    """Write the page and its figures. Returns the path of the page.

    Raises:
        ReportError: if they cannot be written.
    """
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        clean = [t for t in tables if t.perturbation is None]
        perturbed = [t for t in tables if t.perturbation is not None]
        body = [_head(tables)]
        body += [_section(t, out, residuals, single=len(clean or perturbed) == 1) for t in clean or perturbed]
        if perturbed:
            body.insert(1 + len(clean), _robustness_section(clean, perturbed, out))
        body.append(_records(tables))
        page = out / "report.html"
        page.write_text(_page("".join(body)), encoding="utf-8")
    except OSError as error:
        raise ReportError(f"cannot write to {out} ({error.strerror})") from None
    return page


def load_scores(path: Path, name: str, resamples: int, seed: int) -> Scores:
    """Read a score table and the JSON beside it, if there is one, and compute its metrics."""
    table = read_table(path)
    beside, about = path.with_suffix(".json"), {}
    if beside.is_file():
        try:
            about = json.loads(beside.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ReportError(f"cannot read {beside} ({error}); delete it to go on without it") from None
    if not isinstance(about, dict):
        raise ReportError(f"{beside} holds a {type(about).__name__}, the object that test.py writes was wanted")
    said = about.get("settings", {}).get("seed") if isinstance(about.get("settings"), dict) else None
    seed = said if isinstance(said, int) and said >= 0 else seed  # the intervals that test.py printed
    return Scores(name, path, table, about, metrics.summarize(table, resamples, seed))


def unique_names(files: Iterable[str | os.PathLike]) -> list[str]:
    """A name for each table: the file's stem, with as many parent folders as it takes to tell them apart."""
    parts = [Path(os.path.abspath(f)).with_suffix("").parts for f in files]
    for depth in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    raise ReportError("the same score table was given twice")


def most_wrong(table: ScoreTable, count: int = WORST) -> np.ndarray:
    """Rows of the images whose score lies furthest on the wrong side, worst first. (<= count,) int."""
    wrongness = np.where(table.is_fake, -table.margins, table.margins)
    wrongness[~(table.scored & (table.is_real | table.is_fake))] = np.nan
    order = np.argsort(-wrongness, kind="stable")  # NaN last
    return order[: min(count, int(np.isfinite(wrongness).sum()))]


def is_right(table: ScoreTable, i: int) -> bool:
    """Whether the larger logit of row i is that of its label."""
    fake, real = table.logits[i]
    return bool((fake >= real) == table.is_fake[i])


# ---- sections ----


def _head(tables: Sequence[Scores]) -> str:
    """Title, and how to read the page."""
    images = sum(len(t.table) for t in tables)
    count = f"{len(tables)} score table{'s' * (len(tables) > 1)}, {images:,} rows"
    interval = (
        f"{metrics.CONFIDENCE:.0%} bootstrap intervals ({tables[0].summary['resamples']:,} resamples of the images,"
        " within each class)"
    )
    return f"""<header><h1>Real or generated?</h1>
<p class="lead">Detection by re-synthesis: report on {count}.</p>
<p>The <b>positive class is fake</b>: a true positive is a generated image called fake, a false
positive a real image called fake. Numbers are percentages unless they are counts. Brackets are {_text(interval)}.
A generator&rsquo;s fakes are compared with its own reals where it has any, else with the reals that all
generators share.</p></header>"""


def _section(scores: Scores, out: Path, residuals: str | os.PathLike | None, single: bool) -> str:
    """Everything about one table: metrics, curves, histograms, worst images, errors."""
    title = "Results" if single else f"Results: {_text(scores.name)}"
    if scores.perturbation:
        title += f" <small>({_text(scores.perturbation.label)})</small>"
    parts = [f"<section><h2>{title}</h2>", _metrics_table(scores.summary), _verdicts(scores)]
    parts += [_curves(scores, out), _worst_images(scores, residuals), _errors(scores.table), "</section>"]
    return "\n".join(parts)


def _curves(scores: Scores, out: Path) -> str:
    """ROC, precision-recall and score histograms, as far as the table has what they need."""
    drawn = []
    if any(m["auroc"] is not None for m in scores.summary["generators"].values()):
        drawn += [(figures.roc, "roc", ROC_CAPTION), (figures.precision_recall, "pr", PR_CAPTION)]
    if scores.table.scored.any():
        drawn.append((figures.histogram, "scores", HISTOGRAM_CAPTION))
    parts = []
    for draw, kind, caption in drawn:
        path = out / f"{file_stem(scores.name)}_{kind}.png"
        draw(scores.table, path)
        parts.append(_figure(path, caption))
    return f'<div class="figures">{"".join(parts)}</div>'


def _metrics_table(summary: Mapping) -> str:
    """A row a generator, their mean, and all images."""
    rows = list(summary["generators"].items())
    total = {} if len(rows) == 1 else {"all images": summary["all"]}
    mean = {"mean over generators": summary["mean"]} if len(rows) > 1 else {}
    head = "".join(f'<th title="{_text(hint)}">{_text(label)}</th>' for _, label, hint in COLUMNS)
    lines = [f"<tr><th>generator</th>{head}</tr>"]
    for name, m, kind in [(n, m, "") for n, m in rows] + [(n, m, "sum") for n, m in [*mean.items(), *total.items()]]:
        cells = "".join(f"<td>{_value(m, key)}</td>" for key, _, _ in COLUMNS)
        lines.append(f'<tr class="{kind}"><th>{_text(name)}</th>{cells}</tr>')
    notes = "".join(f"<li>{_text(note)}</li>" for note in summary["notes"])
    return _scrolling("metrics", lines) + (f'<ul class="notes">{notes}</ul>' if notes else "")


def _value(m: Mapping, key: str) -> str:
    """One cell: a count, a percentage with its interval, or a dash."""
    if key.startswith("n_"):
        return f"{m[key]:,}" if key in m else ""
    if m[key] is None:
        return "&ndash;"
    interval = (m.get("intervals") or {}).get(key)
    bounds = f"<small>[{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]</small>" if interval else ""
    return f"{100 * m[key]:.1f}{bounds}"


def _verdicts(scores: Scores) -> str:
    """Confusion matrix, calibration, stability, and the numbers as the released program counts them."""
    m, stability = scores.summary["all"], [word for word in scores.table.stability if word]
    if m["accuracy"] is None:
        return "<p>No labelled images with a score: there is nothing to measure.</p>"
    verdicts = [v for v in metrics.PREDICTIONS if v != "unsure" or any(row[v] for row in m["confusion"].values())]
    lines = ["<tr><th></th>" + "".join(f"<th>called {v}</th>" for v in verdicts) + "</tr>"]
    for truth, counts in m["confusion"].items():
        cells = "".join(f'<td class="{"right" if v == truth else ""}">{counts[v]:,}</td>' for v in verdicts)
        lines.append(f"<tr><th>truly {truth}</th>{cells}</tr>")
    precision, recall = (
        "&ndash;" if m[key] is None else f"{100 * m[key]:.1f}"
        for key in ("precision_real_positive", "recall_real_positive")
    )
    unstable = f"{stability.count('unstable'):,} of {len(stability):,} verdicts" if stability else ""
    unstable = unstable and f"<dt>Turned by a mild change of the image (--stability)</dt><dd>{unstable}</dd>"
    return f"""<div class="aside">{_scrolling("confusion", lines)}
<dl><dt>Verdict</dt><dd>{_rule(scores.about)}</dd>
<dt>Calibration of P(fake), all images</dt><dd>ECE {m["ece"]:.4f}, NLL {m["nll"]:.4f}</dd>
<dt>As the released program counts (positive class: real)</dt>
<dd>precision {precision}, recall {recall}</dd>{unstable}</dl></div>"""


def _rule(about: dict) -> str:
    """From which P(fake) on an image is called what, in HTML."""
    detector = about.get("detector")
    calibration = detector.get("calibration") if isinstance(detector, dict) else None
    try:
        return (
            "fake from P(fake) = {t_fake:.3g} on, real up to {t_real:.3g}, unsure between (calibrated,"
            " temperature {temperature:.3g})"
        ).format_map(calibration)
    except (KeyError, TypeError, ValueError):  # none, or a table made elsewhere
        return "fake from P(fake) = 0.5 on, else real (not calibrated)" if calibration == {} else "rule not known"


def _worst_images(scores: Scores, residuals: str | os.PathLike | None) -> str:
    """The images whose scores are furthest on the wrong side, as thumbnails."""
    rows = most_wrong(scores.table)
    if not len(rows):
        return ""
    cards = [_card(scores, int(i), residuals) for i in rows]
    wrong = sum(not is_right(scores.table, i) for i in rows)
    about = f"The {len(cards)} images whose scores lie furthest towards the wrong side; {wrong} of them are wrong."
    return f'<h3>Most wrong</h3><p>{about}</p><div class="cards">{"".join(cards)}</div>'


def _card(scores: Scores, i: int, residuals: str | os.PathLike | None) -> str:
    table = scores.table
    path, truth, prob = table.paths[i], "fake" if table.is_fake[i] else "real", float(table.prob_fake[i])
    picture, kind = found_image(path, scores.path.parent), "image"
    if residuals is not None and residual_path(residuals, path).is_file():
        picture, kind = residual_path(residuals, path), "residual"  # shows the image, too
    generator = f" ({_text(table.generators[i])})" if table.generators[i] else ""
    side = "right" if is_right(table, i) else "wrong"
    unstable = " (unstable)" if table.stability[i] == "unstable" else ""
    return f"""<figure class="card {side} {kind}">{_thumbnail(picture, kind)}
<figcaption><b>{truth}</b>{generator}, called <b>{_text(table.predictions[i])}</b>{unstable}
<span class="bar"><i style="width:{100 * prob:.1f}%"></i></span>P(fake) {prob:.4g}
<code>{_text(path)}</code></figcaption></figure>"""


def found_image(path: str, beside: Path) -> Path:
    """A table's path as it stands, or from the table's own folder, whichever is there."""
    return Path(path) if os.path.isfile(path) else beside / path


def _thumbnail(path: Path, what: str) -> str:
    """An <img> with a small JPEG of the file; a box with the reason where there is none."""
    side = THUMBNAIL[what]
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.draft("RGB", (side, side))  # JPEG: decode no more than needed
            image = ImageOps.exif_transpose(image).convert("RGB")
            image.thumbnail((side, side))
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=88)
    except (OSError, ValueError, SyntaxError, MemoryError, Image.DecompressionBombError):
        return f'<div class="missing">{what}<br>not available</div>'
    return f'<img alt="{what}" src="{_data_uri(buffer.getvalue(), "image/jpeg")}">'


def _errors(table: ScoreTable) -> str:
    rows = np.flatnonzero(~table.scored)
    if not len(rows):
        return ""
    lines = [f"<tr><td><code>{_text(table.paths[i])}</code></td><td>{_text(table.errors[i])}</td></tr>" for i in rows]
    more = f"<p>and {len(lines) - MOST_ERRORS:,} more</p>" if len(lines) > MOST_ERRORS else ""
    return (
        f"<h3>Not scored</h3><p>{len(lines):,} files could not be scored and are in none of the numbers.</p>"
        + _scrolling("errors", lines[:MOST_ERRORS])
        + more
    )


def _robustness_section(clean: Sequence[Scores], perturbed: Sequence[Scores], out: Path) -> str:
    """AUROC under each perturbation: curves where strengths vary, and a table of everything."""
    parts = ["<section><h2>Robustness</h2>"]
    curves = robustness_curves(perturbed)
    if curves:
        baseline = {name: m["auroc"] for t in clean[:1] for name, m in t.summary["generators"].items()}
        figures.robustness(curves, baseline, out / "robustness.png")
        caption = "AUROC under perturbation, harder to the right; bands are 95 % intervals, grey dashes guessing"
        caption += "; dotted: the untouched images." if baseline else "."
        parts.append(_figure(out / "robustness.png", caption))
    names = sorted({name for t in [*clean, *perturbed] for name in t.summary["generators"]})
    mean = ["mean"] if len(names) > 1 else []
    lines = ["<tr><th>AUROC</th>" + "".join(f"<th>{_text(n)}</th>" for n in [*names, *mean]) + "</tr>"]
    for t in [*clean, *sorted(perturbed, key=by_difficulty)]:
        p = t.perturbation
        label = _text(t.name if p is None and len(clean) > 1 else "untouched" if p is None else p.label)
        protocol = f" <small>{_text(p.protocol)}</small>" if p and p.protocol else ""
        of = t.summary["generators"]
        cells = [f"<td>{_value(of[name], 'auroc') if name in of else ''}</td>" for name in names]
        cells += [f"<td>{_value(t.summary['mean'], 'auroc')}</td>" for _ in mean]
        lines.append(f'<tr class="{"sum" if p is None else ""}"><th>{label}{protocol}</th>{"".join(cells)}</tr>')
    return "\n".join([*parts, _scrolling("metrics compact", lines), "</section>"])


def by_difficulty(scores: Scores) -> tuple:
    """Sorts perturbed tables by name, protocol and strength, the hardest last."""
    name, strength, protocol = scores.perturbation
    sign = -1 if figures.strength_axis(name)[1] else 1
    return name, protocol, strength is not None, sign * (strength or 0)


def robustness_curves(perturbed: Sequence[Scores]) -> dict[str, dict[str, list]]:
    """{perturbation: {generator: [(strength, AUROC, interval or None), ...]}}, strengths rising.

    Protocols do not mix: where several have the same perturbation, each is a curve of its own.
    """
    protocols = {}
    for t in perturbed:
        protocols.setdefault(t.perturbation.name, set()).add(t.perturbation.protocol)
    curves: dict[str, dict[str, list]] = {}
    for t in perturbed:
        name, strength, protocol = t.perturbation
        if strength is None:
            continue
        title = f"{name}, {protocol or 'no protocol'}" if len(protocols[name]) > 1 else name
        for generator, m in t.summary["generators"].items():
            if m["auroc"] is not None:
                interval = (m["intervals"] or {}).get("auroc")
                curves.setdefault(title, {}).setdefault(generator, []).append((strength, m["auroc"], interval))
    for by_generator in curves.values():
        for points in by_generator.values():
            points.sort(key=lambda point: point[0])
    return {name: c for name, c in curves.items() if any(len(points) > 1 for points in c.values())}


def _records(tables: Sequence[Scores]) -> str:
    """Settings and versions behind the numbers; those that all tables share once."""
    parts = ["<section><h2>Settings and versions</h2>"]
    records = {
        t.name: {
            **flat(t.about.get("settings")),
            **flat({"detector": t.about.get("detector")}),
            **flat(t.about.get("versions")),
        }
        for t in tables
    }
    shared = {
        key: value
        for key, value in next(iter(records.values())).items()
        if all(key in r and r[key] == value for r in records.values())
    }
    if shared:
        parts.append(_definitions("All tables" if len(tables) > 1 else "", shared))
    groups: dict[str, dict[str, str]] = {}  # tables of one run have all settings in common
    for t in tables:
        own = {key: value for key, value in records[t.name].items() if key not in shared}
        same = next((names for names, others in groups.items() if others == own), None)
        groups[t.name if same is None else f"{same}, {t.name}"] = own if same is None else groups.pop(same)
    parts += [_definitions(names if len(tables) > 1 else "", own) for names, own in groups.items() if own]
    parts.append(_definitions("Score tables", {t.name: str(t.path) for t in tables}))
    if not any(records.values()):
        parts.append("<p>There is no SCORES.json beside the score tables, so settings and versions are not known.</p>")
    return "\n".join([*parts, "</section>"])


def flat(values: object, prefix: str = "") -> dict[str, str]:
    """Nested settings as one level of texts: {"a": {"b": 1}} becomes {"a.b": "1"}; what is empty is left out."""
    if not isinstance(values, dict):
        return {}
    texts = {}
    for key, value in values.items():
        if isinstance(value, dict):
            texts |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            texts[f"{prefix}{key}"] = ", ".join(map(str, value))
        elif value is not None:
            texts[f"{prefix}{key}"] = str(value)
    return {key: text for key, text in texts.items() if text}


# ---- pieces of HTML ----


def _text(text: str) -> str:
    """Any text as HTML that shows it and does nothing else."""
    return html.escape(printable(text), quote=True)


def file_stem(name: str) -> str:
    """A table's name as the beginning of a file name."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name).lstrip(".") or "table"


def _definitions(title: str, values: Mapping[str, str]) -> str:
    rows = [f"<tr><th>{_text(key)}</th><td>{_text(value)}</td></tr>" for key, value in values.items()]
    return (f"<h3>{_text(title)}</h3>" if title else "") + _scrolling("settings", rows)


def _scrolling(kind: str, lines: Sequence[str]) -> str:
    """A table in a box of its own, so that a narrow screen scrolls the table and not the page."""
    return f'<div class="scroll"><table class="{kind}">{"".join(lines)}</table></div>'


def _figure(path: Path, caption: str) -> str:
    """A figure of this report at the size it was drawn for."""
    with Image.open(path) as image:
        width = round(image.width / figures.DPI * CSS_PIXELS_PER_INCH)
    source = _data_uri(path.read_bytes(), "image/png")
    text = _text(caption)
    return f'<figure><img alt="{text}" width="{width}" src="{source}"><figcaption>{text}</figcaption></figure>'


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


STYLE = """
:root { --ink: #222; --soft: #666; --line: #ddd; --wrong: #b3401a; --right: #00734f; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 2.5rem 1.5rem 4rem; color: var(--ink); background: #fff;
  font: 16px/1.55 "Charter", "Bitstream Charter", "Iowan Old Style", Georgia, "DejaVu Serif", serif; }
h1, h2, h3, table, figcaption, dl, .notes { 
  font-family: system-ui, "Segoe UI", Helvetica, Arial, "DejaVu Sans", sans-serif; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0; letter-spacing: -.01em; }
h2 { font-size: 1.3rem; margin: 3rem 0 1rem; padding-top: .8rem; border-top: 2px solid var(--ink);
  overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 2rem 0 .4rem; overflow-wrap: anywhere; }
p { max-width: 46rem; margin: .5rem 0 1rem; }
.lead { font-size: 1.15rem; color: var(--soft); }
small { color: var(--soft); font-weight: normal; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums lining-nums; }
th, td { padding: .4rem .6rem; text-align: right; vertical-align: top; }
tr > :first-child { text-align: left; padding-left: 0; }
.metrics { width: 100%; border-bottom: 1.5px solid var(--ink); border-top: 1.5px solid var(--ink); }
.metrics tr:first-child th { border-bottom: 1px solid var(--ink); white-space: nowrap; }
.metrics td small { display: block; font-size: .72rem; white-space: nowrap; }
.compact td small { display: inline; margin-left: .5rem; }
.compact td, .compact tr:not(:first-child) th { padding-top: .22rem; padding-bottom: .22rem; }
.metrics tr:not(:first-child) th { font-weight: 600; min-width: 8.5rem; max-width: 18rem;
  overflow-wrap: anywhere; }
.metrics tr.sum { background: #f6f6f4; }
.metrics tr.sum > :first-child { padding-left: .4rem; }
.confusion td, .confusion th { border: 1px solid var(--line); padding: .4rem .8rem; }
.confusion tr > :first-child { padding-left: .8rem; }
.confusion th { font-weight: 500; color: var(--soft); }
.confusion .right { font-weight: 700; }
.settings th { font-weight: 500; color: var(--soft); white-space: nowrap; }
.settings td, .errors td { text-align: left; overflow-wrap: anywhere; }
.settings tr, .errors tr { border-bottom: 1px solid var(--line); }
.aside { display: flex; flex-wrap: wrap; gap: .5rem 3rem; align-items: center; }
dl { font-size: .84rem; margin: 0; } dt { color: var(--soft); } dd { margin: 0 0 .6rem; }
.notes { font-size: .82rem; color: var(--soft); padding-left: 1.1rem; }
figure { margin: 1.5rem 0; } figure > img { max-width: 100%; height: auto; display: block; }
figcaption { font-size: .8rem; color: var(--soft); margin-top: .4rem; }
.figures { display: flex; flex-wrap: wrap; gap: 0 1rem; align-items: start; }
.figures > figure { min-width: 0; max-width: 100%; }
.figures figcaption { contain: inline-size; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: 1.2rem; }
.card { margin: 0; border-top: 3px solid var(--wrong); padding-top: .5rem; min-width: 0; }
.card.right { border-color: var(--right); }
.card figcaption b { color: var(--ink); }
.card img, .missing { width: 100%; aspect-ratio: 1; object-fit: contain; background: #f3f3f1; display: block; }
.card.residual img { aspect-ratio: auto; }
.cards:has(.residual) { grid-template-columns: repeat(auto-fill, minmax(21rem, 1fr)); }
.missing { display: flex; align-items: center; justify-content: center; text-align: center; color: #999;
  font: .75rem/1.4 system-ui, "DejaVu Sans", sans-serif; }
.bar { display: block; height: 4px; background: var(--line); margin: .45rem 0 .2rem; }
.bar i { display: block; height: 100%; background: #d55e00; }
code { display: block; font: .72rem/1.4 ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere;
  margin-top: .2rem; }
@media print {
  body { max-width: none; padding: 0; font-size: 11pt; }
  figure, .card, tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
}
"""

CONTENT_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def _page(body: str) -> str:
    """The whole document. Its content policy lets it load and run nothing, whatever a file name says."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{CONTENT_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Real or generated? Detection report</title><style>{STYLE}</style></head>
<body>{body}</body></html>
"""


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m utils.report", description="Make one page of some score tables.", allow_abbrev=False
    )
    parser.add_argument("scores", nargs="+", metavar="SCORES.csv", help="score tables by test.py")
    parser.add_argument("--out", required=True, metavar="DIR", help="writes DIR/report.html and its figures")
    parser.add_argument("--residuals", metavar="DIR", help="where test.py --save-residuals DIR put its pictures")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the report. Returns the exit status."""
    args = get_parser().parse_args(arguments)
    try:
        if args.residuals and not os.path.isdir(args.residuals):
            raise ReportError(
                f"--residuals {args.residuals}: there is no such folder; test.py --save-residuals makes it"
            )
        tables = load_tables(args.scores, metrics.RESAMPLES, seed=0)
        page = write_page(tables, args.out, args.residuals)
    except (ScoreError, ReportError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return MISTAKE
    sys.stdout.write(f"{metrics.format_comparison({t.name: t.summary for t in tables})}\nreport: {page}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
