"""Calibration against brute force: no temperature is better, no threshold keeps the rates and does more."""

import math

import numpy as np
import pytest
import torch

from utils import calibrate, checkpoint
from utils.metrics import negative_log_likelihood
from utils.scores import make_rows, predict, read_table, write_rows


def scores_csv(path, reals, fakes):
    """A score table with these margins. Logits are the margin and 0."""
    margins = np.concatenate([reals, fakes])
    labels = ["real"] * len(reals) + ["fake"] * len(fakes)
    logits = np.stack([margins, np.zeros_like(margins)], axis=1)
    names = [f"{i}.png" for i in range(len(margins))]
    write_rows(path, make_rows(names, labels, [""] * len(names), logits))
    return path


def overlapping(seed=0, n_real=300, n_fake=250, sharpness=4.0):
    """Margins whose true log odds are a quarter of them: a detector four times too sure."""
    rng = np.random.default_rng(seed)
    # two normals of unit variance at -1 and +1: the log odds at x are 2 x (for equal priors)
    return 2 * sharpness * rng.normal(-1, 1, n_real), 2 * sharpness * rng.normal(1, 1, n_fake)


@pytest.fixture
def detector(tmp_path):
    path = tmp_path / "detector.pth.tar"
    content = {
        "epoch": 3,
        "arch": "resnet18",
        "state_dict": {"fc.weight": torch.arange(4.0)},
        "optimizer": {"lr": 0.1},
    }
    checkpoint.save(content, path)
    return path


def test_temperature_is_that_of_the_smallest_nll(tmp_path):
    table = read_table(scores_csv(tmp_path / "s.csv", *overlapping()))
    temperature, warnings = calibrate.fit_temperature(table.margins, table.is_fake)
    grid = np.exp(np.linspace(np.log(0.05), np.log(20), 2001))
    losses = [negative_log_likelihood(predict(table.logits, t)[0], table.is_fake) for t in grid]
    assert temperature == pytest.approx(grid[int(np.argmin(losses))], rel=4e-3)
    assert 3 < temperature < 5.5  # what made it too sure was 4
    assert warnings == []


def test_an_open_or_hopeless_temperature_is_said():
    is_fake = np.array([False, False, True, True])
    assert calibrate.fit_temperature(np.array([-3.0, -1, 2, 4]), is_fake)[0] == 1
    assert "stays 1" in calibrate.fit_temperature(np.array([-3.0, -1, 2, 4]), is_fake)[1][0]
    hopeless, warnings = calibrate.fit_temperature(np.array([3.0, 1, -2, -4]), is_fake)
    assert hopeless == pytest.approx(20, rel=1e-3) and "no better than guessing" in warnings[0]


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.07, 0.29])
@pytest.mark.parametrize("rounding", [None, 1])  # 1: one decimal, so that many scores are equal
def test_thresholds_keep_the_rates_and_leave_few_unsure(rate, rounding):
    rng = np.random.default_rng(3)
    is_fake = np.arange(200) >= 100
    prob = np.concatenate([rng.beta(2, 4, 100), rng.beta(4, 2, 100)])
    prob = prob if rounding is None else np.round(prob, rounding)
    t_real, t_fake = calibrate.fit_thresholds(prob, is_fake, rate, rate)
    assert t_real <= t_fake
    allowed = int(round(rate * 100))
    assert np.sum(prob[~is_fake] >= t_fake) <= allowed
    assert np.sum(prob[is_fake] <= t_real) <= allowed
    if t_real < t_fake:  # then the next lower (higher) score would break a rate
        lower = prob[prob < t_fake].max()
        assert np.sum(prob[~is_fake] >= lower) > allowed
        higher = prob[prob > t_real].min()
        assert np.sum(prob[is_fake] <= higher) > allowed


def test_thresholds_by_hand():
    prob = np.array([0.1, 0.2, 0.3, 0.8, 0.4, 0.7, 0.9, 0.95])
    is_fake = np.arange(8) >= 4
    assert calibrate.fit_thresholds(prob, is_fake, 0, 0) == pytest.approx((0.35, 0.85))
    assert calibrate.fit_thresholds(prob, is_fake, 0.25, 0) == pytest.approx((0.35, 0.35))  # fake from .35, real to .35


def test_well_separated_classes_leave_nothing_unsure():
    prob = np.array([0.1, 0.2, 0.8, 0.9])
    is_fake = np.array([False, False, True, True])
    assert calibrate.fit_thresholds(prob, is_fake, 0.01, 0.01) == pytest.approx((0.5, 0.5))
    _, verdicts = predict(np.log([[0.2, 0.8], [0.8, 0.2]]), 1.0, (0.5, 0.5))
    assert verdicts == ["real", "fake"]


def test_a_real_at_the_very_top_bars_the_verdict_fake():
    prob = np.array([1.0, 0.1, 1.0, 0.9])
    is_fake = np.array([False, False, True, True])
    thresholds = calibrate.fit_thresholds(prob, is_fake, 0.0, 0.0)
    assert thresholds.t_fake > 1 and thresholds.t_real == pytest.approx(0.5)


def test_stores_beside_everything_else_and_says_what_changed(tmp_path, detector, capsys):
    table = scores_csv(tmp_path / "val.csv", *overlapping())
    assert calibrate.main([str(table), "--into", str(detector), "--fpr", "0.05", "--fnr", "0.1"]) == 0
    content = checkpoint.load(detector)
    calibration = content.pop("calibration")
    assert set(calibration) == {
        "temperature", "t_real", "t_fake", "fpr", "fnr", "n_real", "n_fake", "source",
    }  # fmt: skip
    assert calibration["source"] == "val.csv" and calibration["n_real"] == 300 and calibration["fnr"] == 0.1
    assert set(content) == {"epoch", "arch", "state_dict", "optimizer"}
    assert torch.equal(content["state_dict"]["fc.weight"], torch.arange(4.0))
    said = capsys.readouterr().out
    (ece,) = (line.split()[1:] for line in said.splitlines() if line.split()[0] == "ECE")
    (nll,) = (line.split()[1:] for line in said.splitlines() if line.split()[0] == "NLL")
    assert float(ece[1]) < float(ece[0]) / 2 and float(nll[1]) < float(nll[0])
    assert "stored in" in said

    scores = read_table(table)
    thresholds = (calibration["t_real"], calibration["t_fake"])
    verdicts = np.array(predict(scores.logits, calibration["temperature"], thresholds)[1])
    assert np.sum(verdicts[scores.is_real] == "fake") <= 15  # 5 % of 300
    assert np.sum(verdicts[scores.is_fake] == "real") <= 25  # 10 % of 250
    assert np.sum(verdicts == "unsure") > 0

    before = detector.read_bytes()
    assert calibrate.main([str(table), "--into", str(detector), "--fpr", "0.05", "0.1"]) == 0
    assert detector.read_bytes() == before  # the same again: nothing in it depends on the day


def test_without_a_detector_it_only_shows(tmp_path, capsys):
    assert calibrate.main([str(scores_csv(tmp_path / "s.csv", *overlapping()))]) == 0
    assert "temperature" in capsys.readouterr().out


def test_too_few_images_for_the_rate_is_a_warning(tmp_path, capsys):
    table = scores_csv(tmp_path / "s.csv", *overlapping(n_real=99, n_fake=100))
    assert calibrate.main([str(table), "--fpr", "0.01"]) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1 and "100 reals or more" in warnings[0] and "there are 99" in warnings[0]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"sfe1.weight": torch.zeros(1)}, "holds no detector"),
        ({"state_dict": {"sfe1.weight": torch.zeros(1)}}, "holds no detector"),
        (None, "no checkpoint at"),
    ],
)
def test_other_files_are_left_alone(tmp_path, capsys, content, said):
    path = tmp_path / "other.pth"
    if content is not None:
        checkpoint.save(content, path)
    before = path.read_bytes() if content is not None else None
    assert calibrate.main([str(scores_csv(tmp_path / "s.csv", *overlapping())), "--into", str(path)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("error: ") and len(error.splitlines()) == 1
    assert not path.exists() if before is None else path.read_bytes() == before


def test_unlabelled_or_one_sided_tables_are_refused(tmp_path, capsys, detector):
    before = detector.read_bytes()
    one_sided = scores_csv(tmp_path / "s.csv", np.array([-1.0, 1]), np.array([]))
    assert calibrate.main([str(one_sided), "--into", str(detector)]) == 2
    assert "2 real and 0 fake" in capsys.readouterr().err
    assert calibrate.main([str(tmp_path / "none.csv"), "--into", str(detector)]) == 2
    assert detector.read_bytes() == before


@pytest.mark.parametrize("rate", ["0.5", "-0.1", "nan", "many"])
def test_rates_that_make_no_sense_are_refused(rate):
    with pytest.raises(SystemExit) as stopped:
        calibrate.main(["s.csv", f"--fpr={rate}"])
    assert stopped.value.code == 2


def test_ten_thousand_certain_logits_do_not_overflow():
    rng = np.random.default_rng(0)
    is_fake = rng.random(10_000) < 0.5
    margins = 1e6 * (np.where(is_fake, 1.0, -1.0) + rng.normal(size=10_000))
    with np.errstate(over="raise", invalid="raise"):
        temperature, warnings = calibrate.fit_temperature(margins, is_fake)
    assert math.isfinite(temperature) and warnings
