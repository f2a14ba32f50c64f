"""Tests that compare evaluation.metrics with hand computation, brute force and closed formulas."""

import json

import numpy as np
import pytest

from evaluation import metrics
from evaluation.score_table import Row, make_rows_from_logits, read_table, write_table
from utils.labels import FAKE, REAL


def random_scores(seed, n_real=40, n_fake=30, levels=None):
    """Return random scores of real and fake images, and a bool array that is True for fake images.

    Args:
        levels: the scores are rounded to multiples of 1 / levels, so that many scores are equal.
    """
    rng = np.random.default_rng(seed)
    is_fake = rng.permutation(n_real + n_fake) >= n_real
    scores = rng.normal(size=n_real + n_fake) + is_fake
    if levels:
        scores = np.round(scores * levels) / levels
    return scores, is_fake


def write_and_read_score_table(tmp_path, rows):
    """Write rows into a score table file, and return the score table that `read_table` reads from this file."""
    write_table(tmp_path / "t.csv", rows)
    return read_table(tmp_path / "t.csv")


def make_score_rows(margins, label, generator=""):
    """Return one row of a score table with the given label for each value of logit_fake in `margins`."""
    items = [(f"{label}{i}.png", label, generator) for i in range(len(margins))]
    return make_rows_from_logits(items, [(margin, 0) for margin in margins])


def auroc_by_pairs(scores, is_fake):
    """Compute the AUROC by comparing the score of each fake image with the score of each real image."""
    difference = scores[is_fake][:, None] - scores[~is_fake][None, :]
    return ((difference > 0) + 0.5 * (difference == 0)).mean()


def fpr_tpr_and_precision_by_threshold(scores, is_fake):
    """Compute the false positive rate, the true positive rate and the precision, with each score as a threshold."""
    points = []
    for threshold in np.unique(scores)[::-1]:
        called_fake = scores >= threshold
        points.append((called_fake[~is_fake].mean(), called_fake[is_fake].mean(), is_fake[called_fake].mean()))
    return np.array(points).T


def average_precision_summed_over_thresholds(scores, is_fake):
    """Compute the average precision as the sum over thresholds of precision times true positive rate increase."""
    _, tpr, precision = fpr_tpr_and_precision_by_threshold(scores, is_fake)
    return (np.diff(tpr, prepend=0) * precision).sum()


@pytest.mark.parametrize("levels", [None, 1, 4])
@pytest.mark.parametrize("seed", range(3))
def test_ranking_metrics_equal_brute_force_over_all_pairs_and_thresholds(seed, levels):
    scores, is_fake = random_scores(seed, levels=levels)
    scores *= 100  # a sigmoid would round all scores above 37 to 1, so the metrics must not apply a sigmoid
    fpr, tpr, _ = fpr_tpr_and_precision_by_threshold(scores, is_fake)
    assert metrics.auroc(scores, is_fake) == pytest.approx(auroc_by_pairs(scores, is_fake), abs=1e-12)
    by_thresholds = average_precision_summed_over_thresholds(scores, is_fake)
    assert metrics.average_precision(scores, is_fake) == pytest.approx(by_thresholds, abs=1e-12)
    np.testing.assert_allclose(metrics.roc_curve(scores, is_fake), [[0, *fpr], [0, *tpr]], atol=1e-12)
    for highest_fpr in (0.0, 0.025, 0.05, 0.3):  # for 40 real images, a rate of 0.025 is one false positive
        expected = tpr[fpr <= highest_fpr].max(initial=0)
        assert metrics.tpr_at_fpr(scores, is_fake, highest_fpr) == pytest.approx(expected, abs=1e-12)


def test_the_equal_error_rate_equals_the_value_computed_by_hand():
    # At a threshold of 5, one of four real images and one of four fake images are classified incorrectly
    scores = np.array([1, 2, 3, 6, 4, 7, 8, 9.0])
    is_fake = np.array([False] * 4 + [True] * 4)
    assert metrics.equal_error_rate(scores, is_fake) == pytest.approx(0.25)
    assert metrics.equal_error_rate(-scores, is_fake) == pytest.approx(0.75)
    assert metrics.equal_error_rate(np.arange(8.0), is_fake) == 0
    assert metrics.equal_error_rate(np.zeros(8), is_fake) == pytest.approx(0.5)


def test_accuracy_precision_and_recall_equal_the_values_computed_by_hand(tmp_path):
    measured = metrics.compute_metrics_over_all_rows(
        write_and_read_score_table(tmp_path, make_score_rows([-1, 1, -1], REAL) + make_score_rows([1, -1], FAKE)),
        resamples=0,
    )
    assert measured["accuracy"] == pytest.approx(3 / 5)
    assert measured["accuracy_real"] == pytest.approx(2 / 3)
    assert measured["accuracy_fake"] == pytest.approx(1 / 2)
    # With real as the positive class, there are 2 true positives, 1 false positive, 1 false negative
    assert measured["precision_real_positive"] == pytest.approx(2 / 3)
    assert measured["recall_real_positive"] == pytest.approx(2 / 3)
    assert measured["confusion"] == {
        "real": {"real": 2, "fake": 1, "unsure": 0},
        "fake": {"real": 1, "fake": 1, "unsure": 0},
    }
    all_called_fake = metrics.compute_metrics_over_all_rows(
        write_and_read_score_table(tmp_path, make_score_rows([1, 1], REAL)), resamples=0
    )
    assert all_called_fake["precision_real_positive"] is None
    assert all_called_fake["recall_real_positive"] == 0


def test_calibration_error_and_nll_equal_the_values_computed_by_hand():
    # Four images have P(fake) = 0.1, and one of them is fake. Two images have P(fake) = 0.9, and both are fake.
    prob_fake = np.array([0.1, 0.1, 0.1, 0.1, 0.9, 0.9])
    is_fake = np.array([False, False, False, True, True, True])
    expected = 4 / 6 * abs(0.25 - 0.1) + 2 / 6 * abs(1 - 0.9)
    assert metrics.expected_calibration_error(prob_fake, is_fake) == pytest.approx(expected, abs=1e-12)
    nll = -(3 * np.log(0.9) + np.log(0.1) + 2 * np.log(0.9)) / 6
    assert metrics.negative_log_likelihood(prob_fake, is_fake) == pytest.approx(nll)
    wrong_and_certain = metrics.negative_log_likelihood(np.array([1.0, 0.0]), np.array([False, True]))
    assert 30 < wrong_and_certain < 40  # the NLL is -log(2e-16) = 36, because scikit-learn replaces P = 0 by 2e-16
    assert metrics.expected_calibration_error(np.array([0.0, 1.0]), np.array([False, True])) == 0


@pytest.mark.parametrize("is_fake", [[], [True, True], [False]])
def test_ranking_metrics_of_a_single_class_are_none(is_fake):
    is_fake = np.array(is_fake, bool)
    scores = np.zeros(len(is_fake))
    for metric in (metrics.auroc, metrics.average_precision, metrics.roc_curve, metrics.equal_error_rate):
        assert metric(scores, is_fake) is None
    assert metrics.compute_bootstrap_intervals(scores, is_fake) is None
    assert metrics.tpr_at_fpr(scores, is_fake, 0.05) is None
    for metric in (metrics.expected_calibration_error, metrics.negative_log_likelihood):
        assert (metric(scores, is_fake) is None) == (len(is_fake) == 0)


@pytest.mark.parametrize("levels", [None, 2])
def test_bootstrap_intervals_equal_the_intervals_from_resampling_images_one_by_one(levels):
    scores, is_fake = random_scores(5, n_real=50, n_fake=25, levels=levels)
    intervals = metrics.compute_bootstrap_intervals(scores, is_fake, resamples=2000, seed=1)
    rng = np.random.default_rng(2)
    labels = np.arange(75) >= 50
    values = {"accuracy": [], "auroc": [], "average_precision": []}
    for _ in range(1000):
        drawn = np.concatenate([rng.choice(scores[~is_fake], 50), rng.choice(scores[is_fake], 25)])
        values["accuracy"].append(((drawn >= 0) == labels).mean())
        values["auroc"].append(auroc_by_pairs(drawn, labels))
        values["average_precision"].append(average_precision_summed_over_thresholds(drawn, labels))
    for name, drawn in values.items():
        np.testing.assert_allclose(intervals[name], np.percentile(drawn, [2.5, 97.5]), atol=0.03)


def test_bootstrap_intervals_depend_only_on_scores_and_seed():
    scores, is_fake = random_scores(5)
    intervals = metrics.compute_bootstrap_intervals(scores, is_fake, resamples=50, seed=1)
    assert intervals == metrics.compute_bootstrap_intervals(scores, is_fake, resamples=50, seed=1)
    assert intervals != metrics.compute_bootstrap_intervals(scores, is_fake, resamples=50, seed=2)


def test_the_bootstrap_interval_of_auroc_has_the_width_given_by_hanley_and_mcneil():
    """Hanley and McNeil (Radiology, 1982) give a formula for the standard error of the AUROC."""
    scores, is_fake = random_scores(7, n_real=10_000, n_fake=10_000)
    area = metrics.auroc(scores, is_fake)
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    error = np.sqrt((area * (1 - area) + 9_999 * (q1 - area**2) + 9_999 * (q2 - area**2)) / 1e8)
    interval = metrics.compute_bootstrap_intervals(scores, is_fake, resamples=400, seed=3)["auroc"]
    np.testing.assert_allclose(interval, [area - 1.96 * error, area + 1.96 * error], atol=1e-3)


def test_fakes_are_compared_with_reals_of_their_generator_or_else_with_reals_without_generator(tmp_path):
    rows = [
        *make_score_rows([-1, -2], REAL),
        *make_score_rows([-3], REAL, "own"),
        *make_score_rows([1, 2, 3], FAKE, "own"),
    ]
    rows += make_score_rows([-4, 5], FAKE, "other") + make_score_rows([0], None)
    rows += [Row("broken.png", "fake", "other", error="truncated")]
    summary = metrics.compute_metrics_overall_and_per_generator(
        write_and_read_score_table(tmp_path, rows), resamples=50
    )
    own, other = summary["generators"]["own"], summary["generators"]["other"]
    assert (own["n_real"], own["n_fake"], own["auroc"]) == (1, 3, 1.0)
    assert (other["n_real"], other["n_fake"], other["auroc"]) == (2, 2, 0.5)
    assert own["intervals"] is None  # an interval needs two real and two fake images, and there is only one real image
    assert other["intervals"]["auroc"] is not None
    assert summary["images"] == {"real": 3, "fake": 5, "unlabelled": 1, "errors": 1}
    assert summary["mean"]["auroc"] == 0.75
    json.dumps(summary, allow_nan=False)
    text = metrics.format_metrics(summary)
    assert "FAKE" in text and "REAL" in text and "called 3 real, 0 fake" in text
    assert [line.split()[0] for line in text.splitlines()[2:7]] == ["generator", "other", "own", "mean", "all"]


@pytest.mark.parametrize(("label", "accuracy"), [(REAL, 1 / 3), (FAKE, 2 / 3), (None, None)])
def test_the_summary_of_a_single_class_has_an_accuracy_and_a_note_about_auroc(tmp_path, label, accuracy):
    rows = [Row("a.png", "fake", "g", error="broken"), *make_score_rows([1, -1, 2], label)]
    summary = metrics.compute_metrics_overall_and_per_generator(write_and_read_score_table(tmp_path, rows))
    assert summary["all"]["auroc"] is None and summary["all"]["intervals"] is None
    assert summary["all"]["accuracy"] == (None if accuracy is None else pytest.approx(accuracy))
    assert any("AUROC" in note for note in summary["notes"])
    json.dumps(summary, allow_nan=False)
    assert "AUROC" in metrics.format_metrics(summary)


@pytest.mark.parametrize("value", [None, float("nan"), np.float32("nan")])
def test_an_added_metric_without_a_value_is_undefined(tmp_path, monkeypatch, value):
    monkeypatch.setitem(metrics.METRICS, "undefined", metrics.Metric("und", "never defined", lambda *_: value))
    table = write_and_read_score_table(tmp_path, make_score_rows([1, -1], FAKE))
    assert metrics.compute_metrics_over_all_rows(table)["undefined"] is None


def test_a_metric_added_to_the_dict_of_metrics_appears_in_summaries_and_tables(tmp_path, monkeypatch):
    highest = metrics.Metric("max", "the highest score", lambda s, p, f: s.max())
    monkeypatch.setitem(metrics.METRICS, "highest", highest)
    rows = make_score_rows([-1, 1], REAL) + make_score_rows([0, 2], FAKE, "a") + make_score_rows([2, 3], FAKE, "b")
    summary = metrics.compute_metrics_overall_and_per_generator(write_and_read_score_table(tmp_path, rows), resamples=0)
    assert summary["all"]["highest"] == 3
    assert summary["mean"]["highest"] == 2.5
    assert metrics.make_metric_table({"": summary})[0][-1] == "max"


def test_metric_tables_have_one_row_per_perturbation_and_no_control_characters(tmp_path):
    rows = make_score_rows([-1, 1], REAL) + make_score_rows([0, 2], FAKE, "a")
    blurred = metrics.compute_metrics_overall_and_per_generator(write_and_read_score_table(tmp_path, rows), resamples=0)
    clean = metrics.compute_metrics_overall_and_per_generator(
        write_and_read_score_table(tmp_path, rows + make_score_rows([2, 3], FAKE, "evil\x1b[31m\nname")), resamples=0
    )
    assert metrics.make_table_of_metrics_per_generator({"none": clean, "blur sigma 2": blurred}) == [
        ["AUROC", "a", "evil\\x1b[31m\\nname"],
        ["none", "75.0", "100.0"],
        ["blur sigma 2", "75.0", "-"],
    ]
    assert "\x1b" not in metrics.format_metrics(clean) + metrics.format_perturbation_table({"none": clean})
