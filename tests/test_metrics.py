"""Metrics against counting by hand and against brute force over all pairs and all thresholds."""

import json

import numpy as np
import pytest

from utils import metrics
from utils.run import FAKE, REAL
from utils.scores import Row, RowWriter, make_rows, read_table


def random_scores(seed, n_real=40, n_fake=30, levels=None):
    """(scores, is_fake) of overlapping classes; levels: round to so few values that ties abound."""
    rng = np.random.default_rng(seed)
    is_fake = np.arange(n_real + n_fake) >= n_real
    scores = rng.normal(size=n_real + n_fake) + is_fake
    if levels:
        scores = np.round(scores * levels) / levels
    order = rng.permutation(len(scores))
    return scores[order], is_fake[order]


def table_of(tmp_path, rows):
    with RowWriter(tmp_path / "t.csv") as writer:
        writer.write(*rows)
    return read_table(tmp_path / "t.csv")


def rows_of(margins, label, generator=""):
    items = [(f"{label}{i}.png", label, generator) for i in range(len(margins))]
    return make_rows(items, np.stack([margins, np.zeros(len(margins))], axis=1))


# ---- brute force ----


def auroc_by_pairs(scores, is_fake):
    difference = scores[is_fake][:, None] - scores[~is_fake][None, :]
    return ((difference > 0) + 0.5 * (difference == 0)).mean()


def points_by_thresholds(scores, is_fake):
    """(threshold, fpr, tpr, precision) of every threshold at a score, from the strictest on."""
    points = []
    for threshold in np.sort(np.unique(scores))[::-1]:
        called = scores >= threshold
        points.append((threshold, called[~is_fake].mean(), called[is_fake].mean(), is_fake[called].mean()))
    return np.array(points)


@pytest.mark.parametrize("levels", [None, 1, 4])
@pytest.mark.parametrize("seed", range(4))
def test_auroc_ap_and_curves_by_brute_force(seed, levels):
    scores, is_fake = random_scores(seed, levels=levels)
    points = points_by_thresholds(scores, is_fake)
    assert metrics.auroc(scores, is_fake) == pytest.approx(auroc_by_pairs(scores, is_fake), abs=1e-12)
    steps = np.diff(points[:, 2], prepend=0)
    assert metrics.average_precision(scores, is_fake) == pytest.approx((steps * points[:, 3]).sum(), abs=1e-12)
    fpr, tpr = metrics.roc_curve(scores, is_fake)
    np.testing.assert_allclose(fpr, [0, *points[:, 1]], atol=1e-12)
    np.testing.assert_allclose(tpr, [0, *points[:, 2]], atol=1e-12)
    precision, recall = metrics.precision_recall_curve(scores, is_fake)
    np.testing.assert_allclose(precision, [1, *points[:, 3]], atol=1e-12)
    np.testing.assert_allclose(recall, [0, *points[:, 2]], atol=1e-12)
    for level in (0.0, 0.01, 0.05, 0.3):
        allowed = points[points[:, 1] <= level, 2]
        assert metrics.tpr_at_fpr(scores, is_fake, level) == pytest.approx(allowed.max(initial=0), abs=1e-12)


def test_large_margins_do_not_saturate():
    scores = np.array([40.0, 41.0, 100.0, 1000.0])  # all of them sigmoid to 1
    is_fake = np.array([False, False, True, True])
    assert metrics.auroc(scores, is_fake) == 1


def test_equal_error_rate_by_hand():
    # one error of four in either class at a threshold of 5
    scores = np.array([1, 2, 3, 6, 4, 7, 8, 9.0])
    is_fake = np.array([False] * 4 + [True] * 4)
    assert metrics.equal_error_rate(scores, is_fake) == pytest.approx(0.25)
    assert metrics.equal_error_rate(-scores, is_fake) == pytest.approx(0.75)
    assert metrics.equal_error_rate(np.arange(8.0), is_fake) == 0
    assert metrics.equal_error_rate(np.zeros(8), is_fake) == pytest.approx(0.5)  # all tied: the diagonal


def test_accuracy_and_the_released_precision_and_recall_by_hand(tmp_path):
    rows = [*rows_of(np.array([-1.0, 1, -1]), REAL), *rows_of(np.array([1.0, -1]), FAKE)]
    m = metrics.measure(table_of(tmp_path, rows), resamples=0)
    wanted = {"accuracy": 3 / 5, "accuracy_real": 2 / 3, "accuracy_fake": 1 / 2}
    wanted |= {"precision_real_positive": 2 / 3, "recall_real_positive": 2 / 3}  # real positive: TP 2, FP 1, FN 1
    assert {name: m[name] for name in wanted} == pytest.approx(wanted)
    everything_fake = metrics.measure(table_of(tmp_path, rows_of(np.ones(5), REAL)), resamples=0)
    assert everything_fake["precision_real_positive"] is None and everything_fake["recall_real_positive"] == 0


def test_confusion_by_hand():
    verdicts = ["real", "fake", "unsure", "fake", "real"]
    assert metrics.confusion(verdicts, np.array([False, False, False, True, True])) == {
        "real": {"real": 1, "fake": 1, "unsure": 1},
        "fake": {"real": 1, "fake": 1, "unsure": 0},
    }


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


def test_one_class_or_nothing_is_none():
    for is_fake in (np.array([], bool), np.array([True, True]), np.array([False])):
        scores = np.zeros(len(is_fake))
        for metric in (
            metrics.auroc, metrics.average_precision, metrics.roc_curve, metrics.precision_recall_curve,
            metrics.equal_error_rate, metrics.bootstrap,
        ):  # fmt: skip
            assert metric(scores, is_fake) is None
        assert metrics.tpr_at_fpr(scores, is_fake, 0.05) is None
    assert metrics.expected_calibration_error(np.array([]), np.array([], bool)) is None
    assert metrics.negative_log_likelihood(np.array([]), np.array([], bool)) is None


# ---- bootstrap ----


@pytest.mark.parametrize("levels", [None, 2])
def test_bootstrap_agrees_with_resampling_images_one_by_one(levels):
    scores, is_fake = random_scores(5, n_real=50, n_fake=25, levels=levels)
    got = metrics.bootstrap(scores, is_fake, n=2000, seed=1)
    rng = np.random.default_rng(2)
    values = {"accuracy": [], "auroc": [], "average_precision": []}
    for _ in range(1000):
        reals = rng.choice(scores[~is_fake], 50)
        fakes = rng.choice(scores[is_fake], 25)
        drawn, label = np.concatenate([reals, fakes]), np.arange(75) >= 50
        points = points_by_thresholds(drawn, label)
        values["accuracy"].append(((drawn >= 0) == label).mean())
        values["auroc"].append(auroc_by_pairs(drawn, label))
        values["average_precision"].append((np.diff(points[:, 2], prepend=0) * points[:, 3]).sum())
    for name, x in values.items():
        np.testing.assert_allclose(got[name], np.percentile(x, [2.5, 97.5]), atol=0.02)


def test_bootstrap_is_right_on_many_scores():
    scores, is_fake = random_scores(7, n_real=50_000, n_fake=50_000)
    first = metrics.bootstrap(scores, is_fake, n=1000, seed=3)
    # Merging scores into quantiles moves nothing one could see.
    # Standard error of AUROC: Hanley and McNeil (1982).
    area = metrics.auroc(scores, is_fake)
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    error = np.sqrt((area * (1 - area) + 49_999 * (q1 - area**2) + 49_999 * (q2 - area**2)) / 2.5e9)
    np.testing.assert_allclose(first["auroc"], [area - 1.96 * error, area + 1.96 * error], atol=5e-4)


def test_bootstrap_is_seeded():
    scores, is_fake = random_scores(8)
    first = metrics.bootstrap(scores, is_fake, n=50, seed=3)
    assert first == metrics.bootstrap(scores, is_fake, n=50, seed=3)
    assert first != metrics.bootstrap(scores, is_fake, n=50, seed=4)


# ---- the summary ----


def test_fakes_meet_their_own_reals_or_the_shared_ones(tmp_path):
    rows = [
        *rows_of(np.array([-1.0, -2]), REAL),
        *rows_of(np.array([-3.0]), REAL, "own"),
        *rows_of(np.array([1.0, 2, 3]), FAKE, "own"),
        *rows_of(np.array([-4.0, 5]), FAKE, "other"),
        Row("broken.png", "fake", "other", error="truncated"),
        *rows_of(np.array([0.0]), None),
    ]
    summary = metrics.summarize(table_of(tmp_path, rows), resamples=50)
    counts = {name: (m["n_real"], m["n_fake"]) for name, m in summary["generators"].items()}
    assert counts == {"own": (1, 3), "other": (2, 2)}
    assert summary["images"] == {"real": 3, "fake": 5, "unlabelled": 1, "errors": 1}
    assert summary["generators"]["own"]["auroc"] == 1
    assert summary["generators"]["other"]["auroc"] == 0.5
    assert summary["mean"]["auroc"] == 0.75
    assert summary["all"]["n_real"] == 3 and summary["all"]["n_fake"] == 5
    assert summary["generators"]["own"]["intervals"] is None  # one real
    assert summary["generators"]["other"]["intervals"]["auroc"] is not None
    json.dumps(summary, allow_nan=False)
    text = metrics.format_table(summary)
    assert "FAKE" in text and "REAL" in text and "called 3 real, 0 fake" in text
    assert [line.split()[0] for line in text.splitlines()[2:7]] == ["generator", "other", "own", "mean", "all"]


@pytest.mark.parametrize("label", [REAL, FAKE])
def test_a_single_class_has_accuracy_and_a_note(tmp_path, label):
    summary = metrics.summarize(table_of(tmp_path, rows_of(np.array([1.0, -1, 2]), label)))
    assert summary["all"]["auroc"] is None and summary["all"]["intervals"] is None
    assert summary["all"]["accuracy"] == pytest.approx(1 / 3 if label == REAL else 2 / 3)
    assert any("not defined" in note for note in summary["notes"])
    assert "-" in metrics.format_table(summary)
    json.dumps(summary, allow_nan=False)


def test_nothing_but_errors_or_unlabelled_is_no_crash(tmp_path):
    rows = [Row("a.png", "fake", "g", error="broken"), *rows_of(np.array([1.0]), None)]
    summary = metrics.summarize(table_of(tmp_path, rows))
    assert summary["generators"] == {} and summary["all"]["accuracy"] is None
    json.dumps(summary, allow_nan=False)
    metrics.format_table(summary)


def test_names_cannot_break_the_terminal(tmp_path):
    table = table_of(tmp_path, rows_of(np.array([1.0, 2]), FAKE, "evil\x1b[31m\nname") + rows_of(-np.ones(3), REAL))
    summary = metrics.summarize(table, resamples=10)
    for text in (metrics.format_table(summary), metrics.perturbation_table({"none": summary})):
        assert "\x1b" not in text and "evil\\x1b[31m\\nname" in text


def test_a_row_of_the_robustness_table_is_a_perturbation(tmp_path):
    reals, fakes = rows_of(np.array([-1.0, 1]), REAL), rows_of(np.array([0.0, 2]), FAKE, "a")
    clean = metrics.summarize(table_of(tmp_path, [*reals, *fakes, *rows_of(np.array([2.0, 3]), FAKE, "b")]), 0)
    blurred = metrics.summarize(table_of(tmp_path, [*reals, *fakes]), resamples=0)
    rows = metrics.perturbation_rows({"none": clean, "blur sigma 2": blurred})
    assert [row[1:] for row in rows] == [
        ["a", "b", "mean", "mean acc"],
        ["75.0", "100.0", "87.5", "75.0"],
        ["75.0", "-", "75.0", "75.0"],
    ]
    assert [row[0] for row in rows[1:]] == ["none", "blur sigma 2"]


def test_stability_is_counted_by_class(tmp_path):
    rows = [*rows_of(np.array([-1.0, 1]), REAL), *rows_of(np.array([0.0]), FAKE)]
    assert metrics.stability_lines(table_of(tmp_path, rows)) == []
    words = ("stable", "unstable", "unstable")
    with RowWriter(tmp_path / "s.csv", stability=True) as writer:
        writer.write(*(row._replace(stability=word) for row, word in zip(rows, words, strict=True)))
    (line,) = metrics.stability_lines(read_table(tmp_path / "s.csv"))
    assert [part in line for part in ("2 of 3 images", "1 of 2 real", "1 of 1 fake")] == [True] * 3


def test_a_new_metric_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(
        metrics.METRICS, "furthest", metrics.Metric("max", "the highest margin", lambda m, p, f: m.max())
    )
    summary = metrics.summarize(table_of(tmp_path, rows_of(np.array([-1.0, 1]), REAL) + rows_of(np.ones(2), FAKE)), 0)
    assert summary["all"]["furthest"] == 1 and summary["mean"]["furthest"] == 1
    assert "max" in metrics.format_table(summary).splitlines()[1].split()
