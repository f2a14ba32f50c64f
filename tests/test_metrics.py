"""Metrics against counting by hand and against brute force over all pairs and all thresholds."""

import json

import numpy as np
import pytest

from evaluation import metrics
from evaluation.score_table import Row, make_rows, read_table, write_table
from utils.labels import FAKE, REAL


def random_scores(seed, n_real=40, n_fake=30, levels=None):
    """(scores, is_fake) of overlapping classes; levels: round to so few values that ties abound."""
    rng = np.random.default_rng(seed)
    is_fake = rng.permutation(n_real + n_fake) >= n_real
    scores = rng.normal(size=n_real + n_fake) + is_fake
    return (np.round(scores * levels) / levels if levels else scores), is_fake


def table_of(tmp_path, rows):
    write_table(tmp_path / "t.csv", rows, stability=True)
    return read_table(tmp_path / "t.csv")


def rows_of(margins, label, generator=""):
    items = [(f"{label}{i}.png", label, generator) for i in range(len(margins))]
    return make_rows(items, [(margin, 0) for margin in margins])


def auroc_by_pairs(scores, is_fake):
    difference = scores[is_fake][:, None] - scores[~is_fake][None, :]
    return ((difference > 0) + 0.5 * (difference == 0)).mean()


def points_by_thresholds(scores, is_fake):
    """fpr, tpr and precision at every threshold that is a score, from the strictest on."""
    calls = [scores >= threshold for threshold in np.unique(scores)[::-1]]
    return np.array([(called[~is_fake].mean(), called[is_fake].mean(), is_fake[called].mean()) for called in calls]).T


def ap_by_thresholds(scores, is_fake):
    _, tpr, precision = points_by_thresholds(scores, is_fake)
    return (np.diff(tpr, prepend=0) * precision).sum()


@pytest.mark.parametrize("levels", [None, 1, 4])
@pytest.mark.parametrize("seed", range(4))
def test_auroc_ap_and_curves_by_brute_force(seed, levels):
    scores, is_fake = random_scores(seed, levels=levels)
    scores *= 100  # a sigmoid would make ties of most of them
    fpr, tpr, _ = points_by_thresholds(scores, is_fake)
    assert metrics.auroc(scores, is_fake) == pytest.approx(auroc_by_pairs(scores, is_fake), abs=1e-12)
    assert metrics.average_precision(scores, is_fake) == pytest.approx(ap_by_thresholds(scores, is_fake), abs=1e-12)
    np.testing.assert_allclose(metrics.roc_curve(scores, is_fake), [[0, *fpr], [0, *tpr]], atol=1e-12)
    for level in (0.0, 0.01, 0.05, 0.3):
        wanted = tpr[fpr <= level].max(initial=0)
        assert metrics.tpr_at_fpr(scores, is_fake, level) == pytest.approx(wanted, abs=1e-12)


def test_equal_error_rate_by_hand():
    # one error of four in either class at a threshold of 5
    scores = np.array([1, 2, 3, 6, 4, 7, 8, 9.0])
    is_fake = np.array([False] * 4 + [True] * 4)
    assert metrics.equal_error_rate(scores, is_fake) == pytest.approx(0.25)
    assert metrics.equal_error_rate(-scores, is_fake) == pytest.approx(0.75)
    assert metrics.equal_error_rate(np.arange(8.0), is_fake) == 0
    assert metrics.equal_error_rate(np.zeros(8), is_fake) == pytest.approx(0.5)  # all tied: the diagonal


def test_accuracy_and_the_released_precision_and_recall_by_hand(tmp_path):
    m = metrics.measure(table_of(tmp_path, rows_of([-1, 1, -1], REAL) + rows_of([1, -1], FAKE)), resamples=0)
    wanted = {"accuracy": 3 / 5, "accuracy_real": 2 / 3, "accuracy_fake": 1 / 2}
    wanted |= {"precision_real_positive": 2 / 3, "recall_real_positive": 2 / 3}  # real positive: TP 2, FP 1, FN 1
    assert {name: m[name] for name in wanted} == pytest.approx(wanted)
    assert m["confusion"] == {"real": {"real": 2, "fake": 1, "unsure": 0}, "fake": {"real": 1, "fake": 1, "unsure": 0}}
    everything_fake = metrics.measure(table_of(tmp_path, rows_of([1, 1], REAL)), resamples=0)
    assert everything_fake["precision_real_positive"] is None and everything_fake["recall_real_positive"] == 0


def test_calibration_by_hand():
    prob = np.array([0.1, 0.1, 0.1, 0.1, 0.9, 0.9])  # bins: 4 images at .1 of which .25 fake; 2 at .9, both fake
    is_fake = np.array([False, False, False, True, True, True])
    expected = 4 / 6 * abs(0.25 - 0.1) + 2 / 6 * abs(1 - 0.9)
    assert metrics.expected_calibration_error(prob, is_fake) == pytest.approx(expected, abs=1e-12)
    nll = -(3 * np.log(0.9) + np.log(0.1) + 2 * np.log(0.9)) / 6
    assert metrics.negative_log_likelihood(prob, is_fake) == pytest.approx(nll)
    certain = metrics.negative_log_likelihood(np.array([1.0, 0.0]), np.array([False, True]))
    assert 36 < certain < 37  # wrong and certain: bounded
    assert metrics.expected_calibration_error(np.array([0.0, 1.0]), np.array([False, True])) == 0


@pytest.mark.parametrize("is_fake", [[], [True, True], [False]])
def test_one_class_or_nothing_is_none(is_fake):
    is_fake, scores = np.array(is_fake, bool), np.zeros(len(is_fake))
    for name in ("auroc", "average_precision", "roc_curve", "equal_error_rate", "bootstrap"):
        assert getattr(metrics, name)(scores, is_fake) is None
    assert metrics.tpr_at_fpr(scores, is_fake, 0.05) is None
    for metric in (metrics.expected_calibration_error, metrics.negative_log_likelihood):
        assert (metric(scores, is_fake) is None) == (len(is_fake) == 0)


@pytest.mark.parametrize("levels", [None, 2])
def test_bootstrap_agrees_with_resampling_images_one_by_one(levels):
    scores, is_fake = random_scores(5, n_real=50, n_fake=25, levels=levels)
    got = metrics.bootstrap(scores, is_fake, n=2000, seed=1)
    rng = np.random.default_rng(2)
    label = np.arange(75) >= 50
    values = {"accuracy": [], "auroc": [], "average_precision": []}
    for _ in range(1000):
        drawn = np.concatenate([rng.choice(scores[~is_fake], 50), rng.choice(scores[is_fake], 25)])
        values["accuracy"].append(((drawn >= 0) == label).mean())
        values["auroc"].append(auroc_by_pairs(drawn, label))
        values["average_precision"].append(ap_by_thresholds(drawn, label))
    for name, x in values.items():
        np.testing.assert_allclose(got[name], np.percentile(x, [2.5, 97.5]), atol=0.02)
    assert got == metrics.bootstrap(scores, is_fake, n=2000, seed=1)
    assert got != metrics.bootstrap(scores, is_fake, n=2000, seed=2)


def test_bootstrap_is_right_on_many_scores():
    scores, is_fake = random_scores(7, n_real=50_000, n_fake=50_000)
    area = metrics.auroc(scores, is_fake)  # its standard error: Hanley and McNeil (1982)
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    error = np.sqrt((area * (1 - area) + 49_999 * (q1 - area**2) + 49_999 * (q2 - area**2)) / 2.5e9)
    got = metrics.bootstrap(scores, is_fake, n=1000, seed=3)["auroc"]
    np.testing.assert_allclose(got, [area - 1.96 * error, area + 1.96 * error], atol=5e-4)


def test_fakes_meet_their_own_reals_or_the_shared_ones(tmp_path):
    rows = [*rows_of([-1, -2], REAL), *rows_of([-3], REAL, "own"), *rows_of([1, 2, 3], FAKE, "own")]
    rows += rows_of([-4, 5], FAKE, "other") + rows_of([0], None)
    rows += [Row("broken.png", "fake", "other", error="truncated")]
    summary = metrics.summarize(table_of(tmp_path, rows), resamples=50)
    own, other = summary["generators"]["own"], summary["generators"]["other"]
    assert [(m["n_real"], m["n_fake"], m["auroc"]) for m in (own, other)] == [(1, 3, 1.0), (2, 2, 0.5)]
    assert summary["images"] == {"real": 3, "fake": 5, "unlabelled": 1, "errors": 1}
    assert summary["mean"]["auroc"] == 0.75
    assert own["intervals"] is None and other["intervals"]["auroc"] is not None  # own: one real
    json.dumps(summary, allow_nan=False)
    text = metrics.format_table(summary)
    assert "FAKE" in text and "REAL" in text and "called 3 real, 0 fake" in text
    assert [line.split()[0] for line in text.splitlines()[2:7]] == ["generator", "other", "own", "mean", "all"]


@pytest.mark.parametrize(("label", "right"), [(REAL, 1 / 3), (FAKE, 2 / 3), (None, None)])
def test_a_single_class_has_accuracy_and_a_note(tmp_path, label, right):
    rows = [Row("a.png", "fake", "g", error="broken"), *rows_of([1, -1, 2], label)]
    summary = metrics.summarize(table_of(tmp_path, rows))
    assert summary["all"]["auroc"] is None and summary["all"]["intervals"] is None
    assert summary["all"]["accuracy"] == (None if right is None else pytest.approx(right))
    assert any("AUROC" in note for note in summary["notes"])
    json.dumps(summary, allow_nan=False)
    assert "AUROC" in metrics.format_table(summary)


def test_tables_for_people(tmp_path, monkeypatch):
    evil = "evil\x1b[31m\nname"
    rows = rows_of([-1, 1], REAL) + rows_of([0, 2], FAKE, "a")
    assert metrics.stability_lines(table_of(tmp_path, rows)) == []
    words = ("stable", "unstable", "unstable", "stable")
    told = [row._replace(stability=word) for row, word in zip(rows, words, strict=True)]
    (line,) = metrics.stability_lines(table_of(tmp_path, told))
    assert "2 of 4 images" in line and "1 of 2 real" in line and "1 of 2 fake" in line
    furthest = metrics.Metric("max", "the highest margin", lambda m, p, f: m.max())
    monkeypatch.setitem(metrics.METRICS, "furthest", furthest)  # a new metric is one entry
    blurred = metrics.summarize(table_of(tmp_path, rows), resamples=0)
    clean = metrics.summarize(table_of(tmp_path, rows + rows_of([2, 3], FAKE, evil)), resamples=0)
    assert clean["all"]["furthest"] == 3 and clean["mean"]["furthest"] == 2.5
    assert metrics.metric_rows({"": clean})[0][-1] == "max"
    assert metrics.rows_by_generator({"none": clean, "blur sigma 2": blurred}) == [
        ["AUROC", "a", "evil\\x1b[31m\\nname"], ["none", "75.0", "100.0"], ["blur sigma 2", "75.0", "-"]
    ]  # fmt: skip
    assert "\x1b" not in metrics.format_table(clean) + metrics.perturbation_table({"none": clean})
