"""Numbers from scores: pure functions of arrays, the summary of a score table, and its tables for people.

FAKE IS THE POSITIVE CLASS throughout: a higher score means more likely generated, a false positive is a real image
called fake. The one exception is what the released program prints (`..._real_positive`). A number that is not defined
(one class only, say) is None, never NaN, so that it can be told apart and written as JSON.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from evaluation.score_table import PREDICTIONS, ScoreTable
from utils.console import printable, text_table
from utils.random_streams import seeded_generator

ECE_BINS = 15  # as Guo et al. (ICML 2017)
SMALLEST_PROBABILITY = 2.0**-53  # what float64 resolves next to 1: bounds the NLL of one image to 36.7

RESAMPLES = 1000
CONFIDENCE = 0.95
MAX_DISTINCT_SCORES = 5000  # bootstrap: more are merged into as many quantiles
UNNAMED = "(unnamed)"
RELEASE = "as the released program counts (positive class: REAL)"


# --- one number or curve from (scores, is_fake): (N,), the higher the more likely fake; (N,) bool ---


def auroc(scores: np.ndarray, is_fake: np.ndarray) -> float | None:
    """Area under the ROC curve = P(score of a fake > score of a real), ties counting half."""
    return float(_auroc(*counts_at_scores(scores, is_fake))) if both_classes(is_fake) else None


def average_precision(scores: np.ndarray, is_fake: np.ndarray) -> float | None:
    """Area under the precision-recall curve as a step function: sum of precision times the step in recall."""
    return float(_average_precision(*counts_at_scores(scores, is_fake))) if both_classes(is_fake) else None


def roc_curve(scores: np.ndarray, is_fake: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """(fpr, tpr), each (K,), rising from (0, 0) to (1, 1): one point a distinct score."""
    if not both_classes(is_fake):
        return None
    return tuple(np.cumsum(np.append(0, counts)) / counts.sum() for counts in counts_at_scores(scores, is_fake))


def equal_error_rate(scores: np.ndarray, is_fake: np.ndarray) -> float | None:
    """Where the share of reals called fake equals that of fakes called real (linear between ROC points)."""
    if not both_classes(is_fake):
        return None
    fpr, tpr = roc_curve(scores, is_fake)
    return float(np.interp(0, fpr + tpr - 1, fpr))  # the difference rises from -1 at (0, 0) to 1 at (1, 1)


def tpr_at_fpr(scores: np.ndarray, is_fake: np.ndarray, level: float) -> float | None:
    """The largest share of fakes found at any threshold that calls at most `level` of the reals fake."""
    if not both_classes(is_fake):
        return None
    fpr, tpr = roc_curve(scores, is_fake)
    return float(tpr[fpr <= level].max())


def expected_calibration_error(prob_fake: np.ndarray, is_fake: np.ndarray) -> float | None:
    """Mean |share of fakes - mean P(fake)| over 15 equal bins of P(fake), weighted by their images."""
    bins = np.minimum(prob_fake * ECE_BINS, ECE_BINS - 1).astype(np.intp)
    return float(np.abs(np.bincount(bins, weights=is_fake - prob_fake)).sum() / len(bins)) if len(bins) else None


def negative_log_likelihood(prob_fake: np.ndarray, is_fake: np.ndarray) -> float | None:
    """Mean -log P(true class), in nats. Chance is 0.693."""
    prob_true = np.where(is_fake, prob_fake, 1 - prob_fake)
    return _mean(-np.log(np.maximum(prob_true, SMALLEST_PROBABILITY)))


def confusion(predictions: Sequence[str], is_fake: np.ndarray) -> dict[str, dict[str, int]]:
    """Counts by truth and verdict: {"real": {"real": n, "fake": n, "unsure": n}, "fake": {...}}."""
    predictions = np.asarray(predictions, dtype=str)
    return {
        truth: {verdict: int(np.sum(predictions[rows] == verdict)) for verdict in PREDICTIONS}
        for truth, rows in (("real", ~is_fake), ("fake", is_fake))
    }


def both_classes(is_fake: np.ndarray) -> bool:
    return bool(is_fake.any() and not is_fake.all())


def counts_at_scores(scores: np.ndarray, is_fake: np.ndarray, most: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Number of reals and of fakes at each distinct score, from the highest down, each (D,).

    most: where there are more scores than that, they are merged into as many quantiles.
    """
    _, group, sizes = np.unique(-scores, return_inverse=True, return_counts=True)
    if most and len(sizes) > most:
        middle = np.cumsum(sizes) - sizes / 2
        group = np.unique((middle / len(scores) * most).astype(np.intp), return_inverse=True)[1][group]
    size = int(group.max()) + 1
    return np.bincount(group[~is_fake], minlength=size), np.bincount(group[is_fake], minlength=size)


def _auroc(reals: np.ndarray, fakes: np.ndarray) -> np.ndarray:
    """AUROC of counts (..., D) from the highest score down: pairs won, and half the ties."""
    fakes_above = np.cumsum(fakes, axis=-1) - fakes / 2
    return (fakes_above * reals).sum(axis=-1) / (reals.sum(axis=-1) * fakes.sum(axis=-1))


def _average_precision(reals: np.ndarray, fakes: np.ndarray) -> np.ndarray:
    """AP of counts (..., D) from the highest score down."""
    true, false = np.cumsum(fakes, axis=-1), np.cumsum(reals, axis=-1)
    return (true / np.maximum(true + false, 1) * fakes).sum(axis=-1) / fakes.sum(axis=-1)


def _mean(values: np.ndarray) -> float | None:
    return float(np.mean(values)) if len(values) else None


def bootstrap(
    scores: np.ndarray, is_fake: np.ndarray, n: int = RESAMPLES, seed: int = 0
) -> dict[str, list[float]] | None:
    """95 % percentile intervals of accuracy, AUROC and AP over `n` resamples of each class's images.

    A resample only says how often each image is taken. So the scores are sorted once, the counts of all resamples are
    drawn at the distinct scores (a multinomial a class, the same distribution as drawing images), and the metrics are
    sums over a matrix (resamples, distinct scores).

    Args:
        scores: (N,), the higher the more likely fake; fake is predicted from 0 on (a margin of logits).
    Returns:
        {"accuracy": [low, high], "auroc": ..., "average_precision": ...}; None without two images a class.
    """
    n_fake = int(is_fake.sum())
    n_real = len(is_fake) - n_fake
    if min(n_fake, n_real) < 2:
        return None
    reals, fakes = counts_at_scores(scores, is_fake, MAX_DISTINCT_SCORES)
    rng = seeded_generator(seed, n_real, n_fake)
    right = (scores >= 0) == is_fake  # in each class, the number of right answers is binomial
    accurate = sum(rng.binomial(rows.sum(), right[rows].mean(), size=n) for rows in (is_fake, ~is_fake))
    values = {"accuracy": [accurate / len(right)], "auroc": [], "average_precision": []}
    for start in range(0, n, 100):  # bounds the memory to 100 x D counts
        size = min(100, n - start)
        drawn = rng.multinomial(n_real, reals / n_real, size=size), rng.multinomial(n_fake, fakes / n_fake, size=size)
        values["auroc"].append(_auroc(*drawn))
        values["average_precision"].append(_average_precision(*drawn))
    ends = 50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)
    return {name: np.percentile(np.hstack(x), ends).tolist() for name, x in values.items()}


# --- the summary of a table ---


class Metric(NamedTuple):
    """A number of a score table. The summary and every table of metrics are made of METRICS."""

    label: str
    hint: str
    of: Callable[[np.ndarray, np.ndarray, np.ndarray], float | None]  # margins, P(fake), is_fake; each (N,)
    column: bool = True  # of the tables, in %; else a plain number below them


METRICS = {
    "accuracy": Metric("acc", "the larger logit decides", lambda m, p, f: _mean((m >= 0) == f)),
    "accuracy_real": Metric("acc real", "share of the reals called real", lambda m, p, f: _mean(m[~f] < 0)),
    "accuracy_fake": Metric("acc fake", "share of the fakes called fake", lambda m, p, f: _mean(m[f] >= 0)),
    "auroc": Metric("AUROC", "area under the ROC curve; 50 is guessing", lambda m, p, f: auroc(m, f)),
    "average_precision": Metric("AP", "average precision", lambda m, p, f: average_precision(m, f)),
    "eer": Metric("EER", "equal error rate", lambda m, p, f: equal_error_rate(m, f)),
    "tpr_at_1_fpr": Metric("TPR@1%FPR", "fakes found at 1 % false alarms", lambda m, p, f: tpr_at_fpr(m, f, 0.01)),
    "tpr_at_5_fpr": Metric("TPR@5%FPR", "fakes found at 5 % false alarms", lambda m, p, f: tpr_at_fpr(m, f, 0.05)),
    "ece": Metric("ECE", "calibration of P(fake)", lambda m, p, f: expected_calibration_error(p, f), False),
    "nll": Metric("NLL", "calibration of P(fake)", lambda m, p, f: negative_log_likelihood(p, f), False),
    "precision_real_positive": Metric("precision", RELEASE, lambda m, p, f: _mean(~f[m < 0]), False),
    "recall_real_positive": Metric("recall", RELEASE, lambda m, p, f: _mean(m[~f] < 0), False),
}


def summarize(table: ScoreTable, resamples: int = RESAMPLES, seed: int = 0) -> dict:
    """Everything that is reported about a labelled score table, ready for JSON.

    Args:
        resamples: of the bootstrap; 0: no intervals.
    Returns:
        {"positive_class": "fake", "images": counts, "all": metrics, "generators": {name: metrics},
        "mean": {metric: mean over the generators with both classes}, "notes": [what is not defined or not to be
        trusted, a line each]}
    """
    everything = measure(table.select(table.usable), resamples, seed)
    generators = {name: measure(table.select(r), resamples, seed) for name, r in generator_rows(table).items()}
    complete = [m for m in generators.values() if m["auroc"] is not None]
    return {
        "positive_class": "fake",
        "confidence": CONFIDENCE,
        "resamples": resamples,
        "images": {
            "real": everything["n_real"],
            "fake": everything["n_fake"],
            "unlabelled": int((table.scored & ~table.usable).sum()),
            "errors": int((~table.scored).sum()),
        },
        "all": everything,
        "generators": generators,
        "mean": {name: _mean([m[name] for m in complete if m[name] is not None]) for name in METRICS},
        "notes": _notes([("all images", everything), *generators.items()]),
    }


def _notes(measured: Sequence[tuple[str, dict]]) -> list[str]:
    notes = [
        f"{name}: {m['n_real']} real and {m['n_fake']} fake images, so AUROC, AP, EER and TPR are not defined"
        for name, m in measured
        if m["auroc"] is None
    ]
    few = ", ".join(f"{name} ({m['n_real']})" for name, m in measured if m["auroc"] is not None and m["n_real"] < 100)
    return notes + [f"with fewer than 100 reals TPR at 1 % FPR allows no false alarm: {few}"] * bool(few)


def generator_rows(table: ScoreTable) -> dict[str, np.ndarray]:
    """For each generator, (N,) bool: its fakes, and its own reals if it has any, else those that name no generator."""
    generators = np.asarray(table.generators, dtype=object)
    fakes, reals = table.usable & table.is_fake, table.usable & table.is_real
    groups = {}
    for name in sorted(set(generators[fakes | (reals & (generators != ""))])):
        own = generators == name
        groups[name or UNNAMED] = (fakes & own) | (reals & (own if (reals & own).any() else generators == ""))
    return groups


def measure(table: ScoreTable, resamples: int = RESAMPLES, seed: int = 0) -> dict:
    """All metrics of a table whose rows are all labelled and scored."""
    columns = table.margins, table.prob_fake, table.is_fake
    return {
        "n_real": int(table.is_real.sum()),
        "n_fake": int(table.is_fake.sum()),
        **{name: metric.of(*columns) for name, metric in METRICS.items()},
        "confusion": confusion(table.predictions, table.is_fake),
        "intervals": bootstrap(table.margins, table.is_fake, resamples, seed) if resamples else None,
    }


# --- tables for people: rows of cells, the heading first ---


def percent(m: Mapping, name: str) -> str:
    """A metric of `measure` with its interval, in %: "97.1 [93.0, 99.2]"."""
    low, high = (m.get("intervals") or {}).get(name, (None, None))
    value = "-" if m[name] is None else f"{100 * m[name]:.1f}"
    return value if low is None else f"{value} [{100 * low:.1f}, {100 * high:.1f}]"


def metric_rows(summaries: Mapping[str, dict], columns: Sequence[str] = ()) -> list[list[str]]:
    """A row a generator, their mean, and all images where that is not the same again; several tables by their names."""
    columns = columns or [name for name, metric in METRICS.items() if metric.column]
    rows = [["scores", "generator", "real", "fake", *(METRICS[name].label for name in columns)]]
    for table, summary in summaries.items():
        groups = dict(summary["generators"])
        if len(groups) > 1:
            groups["mean over generators"] = summary["mean"]
        if len(groups) != 1 or [*groups.values()][0]["confusion"] != summary["all"]["confusion"]:
            groups["all images"] = summary["all"]
        for group, m in groups.items():
            counts = (f"{m[name]:,}" if name in m else "" for name in ("n_real", "n_fake"))
            rows.append([printable(table), printable(group), *counts, *(percent(m, name) for name in columns)])
    return rows if len(summaries) > 1 else [row[1:] for row in rows]


def rows_by_generator(summaries: Mapping[str, dict], metric: str = "auroc") -> list[list[str]]:
    """One metric: a row a summary, by its name; a column a generator, those of all in order of first appearance."""
    generators = dict.fromkeys(name for summary in summaries.values() for name in summary["generators"])
    rows = [[METRICS[metric].label, *map(printable, generators)]]
    for label, summary in summaries.items():
        measured = (summary["generators"].get(name, {metric: None}) for name in generators)
        rows.append([printable(label), *(percent(m, metric) for m in measured)])
    return rows


def format_table(summary: dict) -> str:
    """The summary for the terminal: `metric_rows`, and below what is no column of them."""
    lines = ["positive class: FAKE; acc: the larger logit decides; numbers but counts in %"]
    if summary["resamples"]:
        lines.append(f"in brackets: {summary['confidence']:.0%} bootstrap interval, {summary['resamples']} resamples")
    return "\n".join([*lines, text_table(metric_rows({"": summary})), *details(summary)])


def details(summary: dict) -> list[str]:
    """What is no column of a table, a line each: verdicts, plain numbers, images without a score, notes."""
    m, plain = summary["all"], {}
    lines = [
        f"truly {truth}: called " + ", ".join(f"{n} {word}" for word, n in verdicts.items() if n or word != "unsure")
        for truth, verdicts in m["confusion"].items()
    ]
    for name, metric in METRICS.items():
        if not metric.column:
            value = "-" if m[name] is None else f"{m[name]:.4f}"
            plain.setdefault(metric.hint, []).append(f"{metric.label} {value}")
    lines += [f"{hint}: {', '.join(numbers)}" for hint, numbers in plain.items()]
    if summary["images"]["errors"]:
        lines.append(f"errors: {summary['images']['errors']} images have no score, see the table's error column")
    return lines + [f"note: {printable(note)}" for note in summary["notes"]]


def perturbation_table(summaries: Mapping[str, dict]) -> str:
    """Summaries of one set of images by perturbation, for the terminal."""
    head = "AUROC in %, fake = positive, in brackets its 95% interval"
    return f"{head}\n{text_table(rows_by_generator(summaries))}"


def stability_lines(table: ScoreTable) -> list[str]:
    """How many verdicts outlive mild changes of the image, if that was asked for: of all, reals and fakes."""
    words = np.array(table.stability)
    groups = {"": words != "", " real": table.is_real & (words != ""), " fake": table.is_fake & (words != "")}
    counts = [f"{np.sum(words[r] == 'unstable')} of {r.sum()}{name} images" for name, r in groups.items() if r.any()]
    return [f"unstable (mild JPEG or resizing changes the verdict): {', '.join(counts)}"] if counts else []
