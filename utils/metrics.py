"""Numbers from scores: pure functions of arrays, and the summary of a score table.

FAKE IS THE POSITIVE CLASS throughout: a higher score means more likely generated, a false positive is a real
image called fake. The one exception is what the released program prints (`release_precision_recall`: positive
= real). A number that is not defined (one class only, say) is None, never NaN, so that it can be told apart
and written as JSON.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torchmetrics.functional import classification

from utils.scores import PREDICTIONS, ScoreTable

ECE_BINS = 15  # as Guo et al. (ICML 2017)
FPR_LEVELS = {"tpr_at_1_fpr": 0.01, "tpr_at_5_fpr": 0.05}
SMALLEST_PROBABILITY = 2.0**-53  # what float64 resolves next to 1: bounds the NLL of one image to 36.7

RESAMPLES = 1000
CONFIDENCE = 0.95
MAX_DISTINCT_SCORES = 5000  # bootstrap: more are merged into as many quantiles
UNNAMED = "(unnamed)"

AVERAGED = (
    "accuracy", "accuracy_real", "accuracy_fake", "auroc", "average_precision", "eer", *FPR_LEVELS,
    "ece", "nll",
)  # fmt: skip


# ---- one number or curve from (scores, is_fake) ----


def accuracy(predicted_fake: np.ndarray, is_fake: np.ndarray) -> dict[str, float | None]:
    """Share of right answers: on all images, on the reals, on the fakes. Both arguments: (N,) bool."""
    right = predicted_fake == is_fake
    return {
        "accuracy": _mean(right),
        "accuracy_real": _mean(right[~is_fake]),
        "accuracy_fake": _mean(right[is_fake]),
    }


def release_precision_recall(predicted_fake: np.ndarray, is_fake: np.ndarray) -> dict[str, float | None]:
    """Precision and recall with REAL as the positive class, as the released test.py prints them."""
    return {
        "precision_real_positive": _mean(~is_fake[~predicted_fake]),
        "recall_real_positive": _mean(~predicted_fake[~is_fake]),
    }


def confusion(predictions: Sequence[str], is_fake: np.ndarray) -> dict[str, dict[str, int]]:
    """Counts by truth and verdict: {"real": {"real": n, "fake": n, "unsure": n}, "fake": {...}}."""
    predictions = np.asarray(predictions, dtype=str)
    return {
        truth: {verdict: int(np.sum(predictions[rows] == verdict)) for verdict in PREDICTIONS}
        for truth, rows in (("real", ~is_fake), ("fake", is_fake))
    }


def auroc(scores: np.ndarray, is_fake: np.ndarray) -> float | None:
    """Area under the ROC curve = P(score of a fake > score of a real), ties counting half."""
    if not both_classes(is_fake):
        return None
    return float(classification.binary_auroc(*_ranked(scores, is_fake)))


def average_precision(scores: np.ndarray, is_fake: np.ndarray) -> float | None:
    """Area under the precision-recall curve as a step function: sum of precision times the step in recall."""
    if not both_classes(is_fake):
        return None
    return float(classification.binary_average_precision(*_ranked(scores, is_fake)))


def roc_curve(scores: np.ndarray, is_fake: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """(fpr, tpr), each (K,), rising from (0, 0) to (1, 1): one point a distinct score."""
    if not both_classes(is_fake):
        return None
    fpr, tpr, _ = classification.binary_roc(*_ranked(scores, is_fake))
    return fpr.double().numpy(), tpr.double().numpy()


def precision_recall_curve(scores: np.ndarray, is_fake: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """(precision, recall), each (K,), recall falling from 1 to 0: one point a distinct score, and (1, 0)."""
    if not both_classes(is_fake):
        return None
    precision, recall, _ = classification.binary_precision_recall_curve(*_ranked(scores, is_fake))
    return precision.double().numpy(), recall.double().numpy()


def equal_error_rate(scores: np.ndarray, is_fake: np.ndarray) -> float | None:
    """Where the share of reals called fake equals that of fakes called real (linear between ROC points)."""
    curve = roc_curve(scores, is_fake)
    if curve is None:
        return None
    fpr, tpr = curve
    excess = fpr - (1 - tpr)  # from -1 at (0, 0) to +1 at (1, 1), never falling
    i = int(np.argmax(excess >= 0))
    share = -excess[i - 1] / (excess[i] - excess[i - 1])  # excess[0] is -1, so i >= 1
    return float(fpr[i - 1] + share * (fpr[i] - fpr[i - 1]))


def tpr_at_fpr(scores: np.ndarray, is_fake: np.ndarray, level: float) -> float | None:
    """The largest share of fakes found at any threshold that calls at most `level` of the reals fake."""
    curve = roc_curve(scores, is_fake)
    if curve is None:
        return None
    fpr, tpr = curve
    return float(tpr[fpr <= level + 1e-7].max())  # torchmetrics divides in float32


def expected_calibration_error(prob_fake: np.ndarray, is_fake: np.ndarray) -> float | None:
    """Mean |share of fakes - mean P(fake)| over 15 equal bins of P(fake), weighted by their images."""
    if len(is_fake) == 0:
        return None
    prob, target = (
        torch.from_numpy(np.asarray(prob_fake, np.float64)),
        torch.from_numpy(is_fake.astype(np.int64)),
    )
    return float(classification.binary_calibration_error(prob, target, n_bins=ECE_BINS, norm="l1"))


def negative_log_likelihood(prob_fake: np.ndarray, is_fake: np.ndarray) -> float | None:
    """Mean -log P(true class), in nats. Chance is 0.693."""
    if len(is_fake) == 0:
        return None
    prob_true = np.where(is_fake, prob_fake, 1 - np.asarray(prob_fake, np.float64))
    return float(-np.log(np.maximum(prob_true, SMALLEST_PROBABILITY)).mean())


def both_classes(is_fake: np.ndarray) -> bool:
    return bool(is_fake.any() and not is_fake.all())


# ---- bootstrap ----


def bootstrap(
    scores: np.ndarray, is_fake: np.ndarray, n: int = RESAMPLES, seed: int = 0
) -> dict[str, list[float]] | None:
    """95 % percentile intervals of accuracy, AUROC and AP over `n` resamples of each class's images.

    A resample only says how often each image is taken. So the scores are sorted once, the counts of all
    resamples are drawn at the distinct scores (a multinomial a class, the same distribution as drawing
    images), and the metrics are sums over a matrix (resamples, distinct scores). More than
    MAX_DISTINCT_SCORES distinct scores are merged into as many quantiles, which keeps ten million images as
    quick as five thousand.

    Args:
        scores: (N,), the higher the more likely fake; fake is predicted from 0 on (a margin of logits).
        is_fake: (N,) bool.
    Returns:
        {"accuracy": [low, high], "auroc": ..., "average_precision": ...}; None without two images a class.
    """
    n_fake = int(is_fake.sum())
    n_real = len(is_fake) - n_fake
    if min(n_fake, n_real) < 2:
        return None
    reals, fakes = _counts_at_distinct_scores(scores, is_fake)  # each (D,), from the highest score down
    rng = np.random.default_rng([seed, n_real, n_fake])
    values = {"accuracy": _resampled_accuracy(rng, scores, is_fake, n), "auroc": [], "average_precision": []}
    for start in range(0, n, 100):  # bounds the memory to 100 x D counts
        size = min(100, n - start)
        real_counts = rng.multinomial(n_real, reals / n_real, size=size)  # (size, D)
        fake_counts = rng.multinomial(n_fake, fakes / n_fake, size=size)  # (size, D)
        values["auroc"].append(_auroc_of_counts(real_counts, fake_counts))
        values["average_precision"].append(_average_precision_of_counts(real_counts, fake_counts))
    ends = 50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)
    return {name: np.percentile(np.hstack(x), ends).tolist() for name, x in values.items()}


def _counts_at_distinct_scores(scores: np.ndarray, is_fake: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number of reals and of fakes at each distinct score (or quantile), from the highest down."""
    _, group, sizes = np.unique(-scores, return_inverse=True, return_counts=True)
    if len(sizes) > MAX_DISTINCT_SCORES:
        middle = np.cumsum(sizes) - sizes / 2
        quantile = (middle / len(scores) * MAX_DISTINCT_SCORES).astype(np.intp)
        group = np.unique(quantile, return_inverse=True)[1][group]
    size = int(group.max()) + 1
    return np.bincount(group[~is_fake], minlength=size), np.bincount(group[is_fake], minlength=size)


def _resampled_accuracy(rng: np.random.Generator, scores: np.ndarray, is_fake: np.ndarray, n: int) -> np.ndarray:
    """Accuracy of n resamples: the number of right answers in each class is binomial."""
    right = (scores >= 0) == is_fake
    classes = (right[is_fake], right[~is_fake])
    return sum(rng.binomial(len(c), c.mean(), size=n) for c in classes) / len(right)


def _auroc_of_counts(reals: np.ndarray, fakes: np.ndarray) -> np.ndarray:
    """AUROC of each row of counts (B, D), from the highest score down: pairs won, and half the ties."""
    fakes_above = np.cumsum(fakes, axis=1) - fakes / 2
    return (fakes_above * reals).sum(axis=1) / (reals.sum(axis=1) * fakes.sum(axis=1))


def _average_precision_of_counts(reals: np.ndarray, fakes: np.ndarray) -> np.ndarray:
    """AP of each row of counts (B, D), from the highest score down."""
    true, false = np.cumsum(fakes, axis=1), np.cumsum(reals, axis=1)
    precision = true / np.maximum(true + false, 1)
    return (precision * fakes).sum(axis=1) / fakes.sum(axis=1)


# ---- the summary of a table ----


def summarize(table: ScoreTable, resamples: int = RESAMPLES, seed: int = 0) -> dict:
    """Everything that is reported about a labelled score table, ready for JSON.

    Each generator's fakes are compared with its own reals if it has any, else with the reals that name no
    generator.

    Args:
        resamples: of the bootstrap; 0: no intervals.
    Returns:
        {"positive_class": "fake", "images": counts, "all": metrics, "generators": {name: metrics},
        "mean": {metric: mean over the generators}, "notes": [one line for each number that is not defined]}
    """
    labelled = table.scored & (table.is_real | table.is_fake)
    groups = generator_rows(table)
    summary = {
        "positive_class": "fake",
        "confidence": CONFIDENCE,
        "resamples": resamples,
        "images": {
            "real": int((labelled & table.is_real).sum()),
            "fake": int((labelled & table.is_fake).sum()),
            "unlabelled": int((table.scored & ~labelled).sum()),
            "errors": int((~table.scored).sum()),
        },
        "all": measure(table.select(labelled), resamples, seed),
        "generators": {name: measure(table.select(rows), resamples, seed) for name, rows in groups.items()},
    }
    summary["mean"] = mean_over_generators(summary["generators"])
    summary["notes"] = _notes(summary)
    return summary


def generator_rows(table: ScoreTable) -> dict[str, np.ndarray]:
    """For each generator, (N,) bool: the rows of its fakes and of the reals they are compared with."""
    usable = table.scored & (table.is_real | table.is_fake)
    generators = np.asarray(table.generators, dtype=object)
    shared_reals = usable & table.is_real & (generators == "")
    groups = {}
    for name in sorted(set(generators[usable & (table.is_fake | (generators != ""))])):
        own = usable & (generators == name)
        own_reals = own & table.is_real
        groups[name or UNNAMED] = (own & table.is_fake) | (own_reals if own_reals.any() else shared_reals)
    return groups


def measure(table: ScoreTable, resamples: int = RESAMPLES, seed: int = 0) -> dict:
    """All metrics of a table whose rows are all labelled and scored. Accuracy: the larger logit decides."""
    is_fake, scores = table.is_fake, table.margins
    predicted_fake = scores >= 0
    return {
        "n_real": int((~is_fake).sum()),
        "n_fake": int(is_fake.sum()),
        **accuracy(predicted_fake, is_fake),
        **release_precision_recall(predicted_fake, is_fake),
        "auroc": auroc(scores, is_fake),
        "average_precision": average_precision(scores, is_fake),
        "eer": equal_error_rate(scores, is_fake),
        **{name: tpr_at_fpr(scores, is_fake, level) for name, level in FPR_LEVELS.items()},
        "ece": expected_calibration_error(table.prob_fake, is_fake),
        "nll": negative_log_likelihood(table.prob_fake, is_fake),
        "confusion": confusion(table.predictions, is_fake),
        "intervals": bootstrap(scores, is_fake, resamples, seed) if resamples else None,
    }


def mean_over_generators(generators: dict[str, dict]) -> dict[str, float | None]:
    """The plain mean of each metric over the generators that have both classes; None without any."""
    complete = [m for m in generators.values() if m["n_real"] and m["n_fake"]]
    return {name: _mean([m[name] for m in complete]) for name in AVERAGED}


def _notes(summary: dict) -> list[str]:
    """Which numbers are not defined or not to be trusted, and why, a line each."""
    measured = {"all images": summary["all"], **summary["generators"]}
    if len(summary["generators"]) == 1:
        del measured["all images"]  # the same again
    notes, few = [], []
    for name, m in measured.items():
        lacking = [kind for kind in ("real", "fake") if m[f"n_{kind}"] == 0]
        if lacking:
            notes.append(f"{name}: no {' and no '.join(lacking)} images, so AUROC, AP, EER and TPR are not defined")
        elif m["n_real"] < 1 / min(FPR_LEVELS.values()):
            few.append(f"{name} ({m['n_real']})")
        if summary["resamples"] and not lacking and m["intervals"] is None:
            notes.append(f"{name}: one image in a class is too few for intervals")
    if few:
        notes.append(f"fewer than 100 reals, so TPR at 1 % FPR allows no false alarm at all: {', '.join(few)}")
    return notes


def format_table(summary: dict) -> str:
    """The summary as text for the terminal: a row a generator, their mean, all images, the confusion matrix."""
    rows = [(name, m) for name, m in summary["generators"].items()]
    if len(rows) > 1:
        rows.append(("mean over generators", summary["mean"]))
    if len(rows) != 1 or rows[0][1]["n_real"] + rows[0][1]["n_fake"] != sum(
        summary["images"][kind] for kind in ("real", "fake")
    ):
        rows.append(("all images", summary["all"]))
    head = ("generator", "real", "fake", "acc", "acc real", "acc fake", "AUROC", "AP", "EER",
            "TPR@1%FPR", "TPR@5%FPR")  # fmt: skip
    cells = [head, *(_cells(name, m) for name, m in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = ["positive class: FAKE; accuracy: the larger logit decides; numbers but counts in %"]
    if any(m.get("intervals") for _, m in rows):
        lines.append(f"in brackets: {summary['confidence']:.0%} bootstrap interval, {summary['resamples']} resamples")
    lines += ["  ".join([r[0].ljust(widths[0]), *map(str.rjust, r[1:], widths[1:])]).rstrip() for r in cells]
    return "\n".join([*lines, *_footer(summary)])


def format_comparison(summaries: dict[str, dict]) -> str:
    """Several summaries, by their tables' names, as text for the terminal: a row a table and generator."""
    cells = [("scores", "generator", "real", "fake", "accuracy", "AUROC", "AP")]
    for name, summary in summaries.items():
        for generator, m in summary["generators"].items():
            counts = (str(m["n_real"]), str(m["n_fake"]))
            values = (percent(m, metric) for metric in ("accuracy", "auroc", "average_precision"))
            cells.append((printable(name), printable(generator), *counts, *values))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rows = ["  ".join([*map(str.ljust, r[:2], widths), *map(str.rjust, r[2:], widths[2:])]) for r in cells]
    return "\n".join(["in %, with 95% bootstrap intervals; fake is the positive class", *rows])


def percent(m: dict, metric: str) -> str:
    """A metric of `measure` with its interval, in %: "97.1 [93.0, 99.2]"."""
    interval = (m.get("intervals") or {}).get(metric)
    value = "-" if m[metric] is None else f"{100 * m[metric]:.1f}"
    return value if interval is None else f"{value} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def _cells(name: str, m: dict) -> tuple[str, ...]:
    columns = ("accuracy", "accuracy_real", "accuracy_fake", "auroc", "average_precision", "eer", *FPR_LEVELS)
    counts = [str(m[key]) if key in m else "" for key in ("n_real", "n_fake")]
    return (printable(name), *counts, *(percent(m, column) for column in columns))


def _footer(summary: dict) -> list[str]:
    """What does not fit the table: verdicts, the release's precision and recall, errors, notes."""
    m, lines = summary["all"], []
    for truth, verdicts in m["confusion"].items():
        counts = ", ".join(f"{n} {verdict}" for verdict, n in verdicts.items() if n or verdict != "unsure")
        lines.append(f"truly {truth}: called {counts}")
    precision, recall = ("-" if m[k] is None else f"{100 * m[k]:.1f}" for k in
                         ("precision_real_positive", "recall_real_positive"))  # fmt: skip
    lines.append(f"as the released program counts (positive class: REAL): precision {precision}, recall {recall}")
    if m["ece"] is not None:
        lines.append(f"calibration of P(fake): ECE {m['ece']:.4f}, NLL {m['nll']:.4f}")
    if summary["images"]["errors"]:
        lines.append(f"errors: {summary['images']['errors']} images have no score, see the table's error column")
    return [*lines, *(f"note: {printable(note)}" for note in summary["notes"])]


def printable(text: str) -> str:
    """A text on one line of any terminal: control characters and lone surrogates as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


# ---- small helpers ----


def _ranked(scores: np.ndarray, is_fake: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores as ranks in [0, 1] (ties equal) and targets, for torchmetrics.

    It would put scores beyond [0, 1] through a sigmoid, which makes ties of large ones.
    """
    rank = np.unique(scores, return_inverse=True)[1]
    return torch.from_numpy(rank / max(rank.max(), 1)), torch.from_numpy(is_fake.astype(np.int64))


def _mean(values: Sequence[float] | np.ndarray) -> float | None:
    """The mean; None if there is nothing to average, or not finite."""
    mean = float(np.mean(values)) if len(values) else math.nan
    return mean if math.isfinite(mean) else None
