"""Compute metrics and their bootstrap intervals from the scores of images, and format the metrics as tables.

FAKE IS THE POSITIVE CLASS: an image with a higher score is more likely to be generated. Exception: for
precision_real_positive and recall_real_positive, REAL is the positive class, as in the release. The value of an
undefined metric is None, because JSON has no NaN.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from sklearn.metrics import average_precision_score, log_loss, roc_auc_score
from sklearn.metrics import roc_curve as sklearn_roc_curve

from evaluation.score_table import PREDICTIONS, ScoreTable
from utils.console import format_text_table, make_printable
from utils.random_streams import seeded_generator

ECE_BINS = 15  # number of bins of P(fake), as in Guo et al. (ICML 2017)
RESAMPLES = 1000
CONFIDENCE = 0.95
FEW_REALS = 100  # smallest number of real images for which an FPR of at most 1 % allows a false positive
UNNAMED = "(unnamed)"
RELEASE = "as in the code of the paper's authors (positive class: REAL)"


# --- metrics. scores: (N,), higher = more likely fake. prob_fake: (N,) in [0, 1]. is_fake: (N,) bool ------------


def auroc(scores: np.ndarray, is_fake: np.ndarray) -> float | None:
    """Compute the area under the ROC curve: the probability that a fake image scores higher than a real image."""
    return float(roc_auc_score(is_fake, scores)) if has_real_and_fake_images(is_fake) else None


def average_precision(scores: np.ndarray, is_fake: np.ndarray) -> float | None:
    """Compute the average precision: the mean precision over all thresholds, weighted by the increase in recall."""
    return float(average_precision_score(is_fake, scores)) if has_real_and_fake_images(is_fake) else None


def roc_curve(scores: np.ndarray, is_fake: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Compute the ROC curve.

    Returns:
        The false-positive rates (K,) and the true-positive rates (K,) at K points of the curve, or None if there is no
        real image or no fake image.
    """
    if not has_real_and_fake_images(is_fake):
        return None
    fpr, tpr, _ = sklearn_roc_curve(is_fake, scores, drop_intermediate=False)
    return fpr, tpr


def equal_error_rate(scores: np.ndarray, is_fake: np.ndarray) -> float | None:
    """Compute the equal error rate: the error rate at the threshold where reals and fakes have equal error rates."""
    if not has_real_and_fake_images(is_fake):
        return None
    fpr, tpr = roc_curve(scores, is_fake)
    false_negative_rate = 1 - tpr
    return float(np.interp(0, fpr - false_negative_rate, fpr))  # FPR at the point where FPR = FNR


def tpr_at_fpr(scores: np.ndarray, is_fake: np.ndarray, highest_fpr: float) -> float | None:
    """Compute the highest true-positive rate for which the false-positive rate is at most `highest_fpr`."""
    if not has_real_and_fake_images(is_fake):
        return None
    fpr, tpr = roc_curve(scores, is_fake)
    return float(tpr[fpr <= highest_fpr].max())


def expected_calibration_error(prob_fake: np.ndarray, is_fake: np.ndarray) -> float | None:
    """Compute the expected calibration error over 15 bins of P(fake).

    The result is the mean of |fraction of fakes - mean P(fake)| over the bins, weighted by the number of images in each
    bin.
    """
    if len(prob_fake) == 0:
        return None
    bins = np.minimum((prob_fake * ECE_BINS).astype(int), ECE_BINS - 1)
    fakes_minus_expected = np.bincount(bins, weights=is_fake - prob_fake)  # number of fakes - sum of P(fake), per bin
    return float(np.abs(fakes_minus_expected).sum() / len(prob_fake))


def negative_log_likelihood(prob_fake: np.ndarray, is_fake: np.ndarray) -> float | None:
    """Compute the mean of -log P(true class), in nats. A detector that always answers P(fake) = 0.5 gets 0.693."""
    return float(log_loss(is_fake, prob_fake, labels=[False, True])) if len(prob_fake) else None


def fraction_of_true(values: np.ndarray) -> float | None:
    """Compute the fraction of images for which `values`, bool (N,), is True. Returns None if there are no images."""
    return float(np.mean(values)) if len(values) else None


def has_real_and_fake_images(is_fake: np.ndarray) -> bool:
    """Return whether `is_fake` (N,) contains at least one real image and at least one fake image."""
    return bool(is_fake.any() and not is_fake.all())


class Metric(NamedTuple):
    """A number that is computed from a score table, such as AUROC.

    The function `compute` returns None or NaN if the metric is not defined, for example without fake images.
    """

    label: str
    description: str
    compute: Callable[[np.ndarray, np.ndarray, np.ndarray], float | None]  # (scores, prob_fake, is_fake), each (N,)
    is_column: bool = True  # whether tables show the metric as a column, in %; other metrics are shown below the tables


METRICS = {  # arguments of the lambda functions: s = logit_fake - logit_real, p = prob_fake, f = is_fake
    "accuracy": Metric("acc", "the larger logit decides", lambda s, p, f: fraction_of_true((s >= 0) == f)),
    "accuracy_real": Metric(
        "acc real", "fraction of the reals called real", lambda s, p, f: fraction_of_true(s[~f] < 0)
    ),
    "accuracy_fake": Metric(
        "acc fake", "fraction of the fakes called fake", lambda s, p, f: fraction_of_true(s[f] >= 0)
    ),
    "auroc": Metric("AUROC", "area under the ROC curve; 50 is guessing", lambda s, p, f: auroc(s, f)),
    "average_precision": Metric("AP", "average precision", lambda s, p, f: average_precision(s, f)),
    "eer": Metric("EER", "equal error rate", lambda s, p, f: equal_error_rate(s, f)),
    "tpr_at_1_fpr": Metric("TPR@1%FPR", "fakes found at 1 % false alarms", lambda s, p, f: tpr_at_fpr(s, f, 0.01)),
    "tpr_at_5_fpr": Metric("TPR@5%FPR", "fakes found at 5 % false alarms", lambda s, p, f: tpr_at_fpr(s, f, 0.05)),
    "ece": Metric("ECE", "calibration of P(fake)", lambda s, p, f: expected_calibration_error(p, f), False),
    "nll": Metric("NLL", "calibration of P(fake)", lambda s, p, f: negative_log_likelihood(p, f), False),
    "precision_real_positive": Metric("precision", RELEASE, lambda s, p, f: fraction_of_true(~f[s < 0]), False),
    "recall_real_positive": Metric("recall", RELEASE, lambda s, p, f: fraction_of_true(s[~f] < 0), False),
}


def compute_bootstrap_intervals(
    scores: np.ndarray, is_fake: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, list[float]] | None:
    """Estimate 95 % intervals of metrics by the bootstrap.

    A resample consists of as many real and as many fake images as were given, drawn with replacement.

    Args:
        scores: (N,), the margin logit_fake - logit_real of each image. An image is called fake if its margin is >= 0.
        is_fake: (N,) bool.

    Returns:
        The intervals {"accuracy": [low, high], "auroc": [low, high], "average_precision": [low, high]}, or None if a
        class has fewer than two images.
    """
    order = np.argsort(-scores, kind="stable")
    scores, is_fake = scores[order], is_fake[order]
    reals, fakes = np.flatnonzero(~is_fake), np.flatnonzero(is_fake)
    if min(len(reals), len(fakes)) < 2:
        return None
    thresholds = np.flatnonzero(np.diff(scores, append=-np.inf))  # (K,), index of the last image of each distinct score
    is_right = (scores >= 0) == is_fake
    rng = seeded_generator(seed, len(reals), len(fakes))
    values = {"accuracy": [], "auroc": [], "average_precision": []}
    for _ in range(resamples):
        drawn_reals = np.bincount(rng.choice(reals, len(reals)), minlength=len(scores))  # (N,), draw count per image
        drawn_fakes = np.bincount(rng.choice(fakes, len(fakes)), minlength=len(scores))  # (N,)
        false_positives = np.cumsum(drawn_reals)[thresholds]  # (K,), number of false positives at each threshold
        true_positives = np.cumsum(drawn_fakes)[thresholds]  # (K,)
        fpr = np.append(0, false_positives / len(reals))
        tpr = np.append(0, true_positives / len(fakes))
        precision = true_positives / np.maximum(true_positives + false_positives, 1)
        values["accuracy"].append((drawn_reals + drawn_fakes)[is_right].sum() / len(scores))
        values["auroc"].append((np.diff(fpr) * (tpr[1:] + tpr[:-1])).sum() / 2)  # sklearn's auc takes 10 times as long
        values["average_precision"].append((precision * np.diff(tpr)).sum())
    outside = 100 * (1 - CONFIDENCE) / 2  # 2.5 % of the resamples lie below the interval, and 2.5 % above
    return {name: np.percentile(drawn, [outside, 100 - outside]).tolist() for name, drawn in values.items()}


def count_verdicts_by_class(predictions: Sequence[str], is_fake: np.ndarray) -> dict[str, dict[str, int]]:
    """Count images by true class and verdict: {"real": {"real": n, "fake": n, "unsure": n}, "fake": {...}}."""
    predictions = np.asarray(predictions, dtype=str)
    counts = {}
    for truth, rows in (("real", ~is_fake), ("fake", is_fake)):
        counts[truth] = {verdict: int(np.sum(predictions[rows] == verdict)) for verdict in PREDICTIONS}
    return counts


# --- the summary of a score table -----------------------------------------------------------------------------


def compute_metrics_overall_and_per_generator(table: ScoreTable, resamples: int = RESAMPLES, seed: int = 0) -> dict:
    """Compute all reported metrics and counts of a labelled score table, as a dict that can be written as JSON.

    Args:
        resamples: number of bootstrap resamples; 0 means that no intervals are computed.

    Returns:
        A dict whose entries include "all" (the metrics of all images with a label and a score), "generators" (a dict
        {name: metrics}), "mean" (the means over the generators), "images" (numbers of images) and "notes" (warnings).
    """
    all_images = compute_metrics_over_all_rows(table.select_rows(table.has_label_and_score), resamples, seed)
    generators = {}
    for name, rows in select_fakes_and_reals_per_generator(table).items():
        generators[name] = compute_metrics_over_all_rows(table.select_rows(rows), resamples, seed)
    return {
        "positive_class": "fake",
        "confidence": CONFIDENCE,
        "resamples": resamples,
        "images": {
            "real": all_images["n_real"],
            "fake": all_images["n_fake"],
            "unlabelled": int((table.has_score & ~table.has_label_and_score).sum()),
            "errors": int((~table.has_score).sum()),
        },
        "all": all_images,
        "generators": generators,
        "mean": average_metrics_over_generators(generators),
        "notes": list_undefined_or_unreliable_metrics({"all images": all_images, **generators}),
    }


def compute_metrics_over_all_rows(table: ScoreTable, resamples: int = RESAMPLES, seed: int = 0) -> dict:
    """Compute all metrics of a score table in which every row has a label and a score."""
    values = {}
    for name, metric in METRICS.items():
        value = metric.compute(table.logit_margins, table.prob_fake, table.is_fake)
        values[name] = None if value is None or math.isnan(value) else float(value)
    return {
        "n_real": int(table.is_real.sum()),
        "n_fake": int(table.is_fake.sum()),
        **values,
        "confusion": count_verdicts_by_class(table.predictions, table.is_fake),
        "intervals": compute_bootstrap_intervals(table.logit_margins, table.is_fake, resamples, seed)
        if resamples
        else None,
    }


def average_metrics_over_generators(generators: Mapping[str, Mapping]) -> dict[str, float | None]:
    """Compute the mean of each metric over the generators whose AUROC is defined."""
    complete = [measured for measured in generators.values() if measured["auroc"] is not None]
    means = {}
    for name in METRICS:
        values = [measured[name] for measured in complete if measured[name] is not None]
        means[name] = float(np.mean(values)) if values else None
    return means


def list_undefined_or_unreliable_metrics(groups: Mapping[str, Mapping]) -> list[str]:
    """Return warnings about undefined metrics, and about metrics that are computed from few real images.

    Args:
        groups: a dict {name of a generator or "all images": dict of metrics}.
    """
    lines, few = [], []
    for name, measured in groups.items():
        counts = f"{measured['n_real']} real and {measured['n_fake']} fake images"
        if measured["auroc"] is None:
            lines.append(f"{name}: {counts}, so AUROC, AP, EER and TPR are not defined")
        elif measured["n_real"] < FEW_REALS:
            few.append(f"{name} ({measured['n_real']})")
    if few:
        names = ", ".join(few)
        lines.append(f"with fewer than {FEW_REALS} real images, TPR at 1 % FPR allows no false positive: {names}")
    return lines


def select_fakes_and_reals_per_generator(table: ScoreTable) -> dict[str, np.ndarray]:
    """Select the rows of each generator: the fakes of the generator, and the real images for comparison.

    The real images for comparison have the name of the generator in their column "generator", or an empty column
    "generator" if no real image has the name of the generator.

    Returns:
        A dict from the name of each generator to a mask (N,) bool of its rows, sorted by name.
    """
    generators = np.asarray(table.generators, dtype=object)
    fakes = table.has_label_and_score & table.is_fake
    reals = table.has_label_and_score & table.is_real
    named = fakes | (reals & (generators != ""))
    groups = {}
    for name in sorted(set(generators[named])):
        has_name = generators == name
        own_reals = reals & has_name
        compared_with = own_reals if own_reals.any() else reals & (generators == "")
        groups[name or UNNAMED] = (fakes & has_name) | compared_with
    return groups


# --- tables for people: lists of rows of cells, with the heading first ----------------------------------------


def format_percent(measured: Mapping, name: str) -> str:
    """Format a metric and its bootstrap interval in %, such as "97.1 [93.0, 99.2]".

    Args:
        measured: a dict of metrics by name, with their bootstrap intervals under the key "intervals".
    """
    if measured[name] is None:
        return "-"
    text = f"{100 * measured[name]:.1f}"
    intervals = measured.get("intervals") or {}
    if name in intervals:
        low, high = intervals[name]
        text += f" [{100 * low:.1f}, {100 * high:.1f}]"
    return text


def make_metric_table(summaries: Mapping[str, dict], columns: Sequence[str] = ()) -> list[list[str]]:
    """Make a table with one row per generator, one row for the mean over generators and one row for all images.

    Args:
        summaries: a dict {name of a score table: result of `compute_metrics_overall_and_per_generator`}.
        columns: names of metrics (default: all metrics whose `is_column` is True).
    """
    columns = columns or [name for name, metric in METRICS.items() if metric.is_column]
    heading = ["generator", "real", "fake", *(METRICS[name].label for name in columns)]
    several = len(summaries) > 1
    rows = [["scores", *heading] if several else heading]
    for table_name, summary in summaries.items():
        for group, measured in select_groups_shown_in_metric_table(summary).items():
            counts = [f"{measured[name]:,}" if name in measured else "" for name in ("n_real", "n_fake")]
            row = [make_printable(group), *counts, *(format_percent(measured, name) for name in columns)]
            rows.append([make_printable(table_name), *row] if several else row)
    return rows


def select_groups_shown_in_metric_table(summary: Mapping) -> dict[str, Mapping]:
    """Return the rows that `make_metric_table` shows for `summary`, as a dict {name of the row: metrics in the row}."""
    groups = dict(summary["generators"])
    if len(groups) > 1:
        groups["mean over generators"] = summary["mean"]
    only_group = next(iter(groups.values())) if len(groups) == 1 else None
    repeats_only_group = only_group is not None and only_group["confusion"] == summary["all"]["confusion"]
    if not repeats_only_group:
        groups["all images"] = summary["all"]
    return groups


def make_table_of_metrics_per_generator(summaries: Mapping[str, dict], metric: str = "auroc") -> list[list[str]]:
    """Make a table of one metric, with one row per score table and one column per generator."""
    generators = list(dict.fromkeys(name for summary in summaries.values() for name in summary["generators"]))
    rows = [[METRICS[metric].label, *(make_printable(name) for name in generators)]]
    for table_name, summary in summaries.items():
        row = [make_printable(table_name)]
        for name in generators:
            measured = summary["generators"].get(name)
            row.append(format_percent(measured, metric) if measured else "-")
        rows.append(row)
    return rows


def format_metrics(summary: Mapping) -> str:
    """Format the result of `compute_metrics_overall_and_per_generator` as text for the terminal."""
    lines = ["positive class: FAKE; acc: the larger logit decides; numbers except counts are in %"]
    if summary["resamples"]:
        lines.append(f"in brackets: {summary['confidence']:.0%} bootstrap interval, {summary['resamples']} resamples")
    lines.append(format_text_table(make_metric_table({"": summary})))
    return "\n".join(lines + list_results_missing_from_metric_table(summary))


def list_results_missing_from_metric_table(summary: Mapping) -> list[str]:
    """List the results that are not in the table of metrics, such as the number of images per verdict."""
    measured = summary["all"]
    lines = []
    for truth, counts in measured["confusion"].items():
        shown = [f"{n} {verdict}" for verdict, n in counts.items() if n or verdict != "unsure"]
        lines.append(f"truly {truth}: called {', '.join(shown)}")
    plain = {}
    for name, metric in METRICS.items():
        if not metric.is_column:
            value = "-" if measured[name] is None else f"{measured[name]:.4f}"
            plain.setdefault(metric.description, []).append(f"{metric.label} {value}")
    for description, numbers in plain.items():
        lines.append(f"{description}: {', '.join(numbers)}")
    if summary["images"]["errors"]:
        errors = summary["images"]["errors"]
        lines.append(f"errors: {errors} images have no score; the column error of the score table gives the reason")
    for note in summary["notes"]:
        lines.append(f"note: {make_printable(note)}")
    return lines


def format_perturbation_table(summaries: Mapping[str, dict]) -> str:
    """Format a table of AUROC per perturbation for the terminal.

    Args:
        summaries: {perturbation: result of `compute_metrics_overall_and_per_generator`}.
    """
    heading = "AUROC in %, positive class: FAKE, in brackets its 95% interval"
    return f"{heading}\n{format_text_table(make_table_of_metrics_per_generator(summaries))}"
