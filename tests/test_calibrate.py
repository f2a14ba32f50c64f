"""Calibration against brute force: no temperature is better, no threshold keeps the rates and does more."""

import contextlib
import json
import re
import subprocess
import sys
from collections import OrderedDict

import numpy as np
import pytest
import torch
from files import mistake
from torch import nn

from evaluation.calibration import probabilities_and_verdicts
from evaluation.metrics import negative_log_likelihood
from evaluation.score_table import make_rows, read_table, write_table
from tools import calibrate
from utils import checkpoints as checkpoint
from utils.checkpoints import fingerprint
from utils.labels import FAKE, REAL


def scores_csv(path, reals, fakes):
    """A score table with these margins. Logits are the margin and 0."""
    margins = np.concatenate([reals, fakes])
    items = [(f"{i}.png", REAL if i < len(reals) else FAKE, "") for i in range(len(margins))]
    write_table(path, make_rows(items, np.stack([margins, np.zeros_like(margins)], axis=1)))
    return path


def overlapping(seed=0, n_real=300, n_fake=250, sharpness=4.0):
    """Margins whose true log odds are a quarter of them: a detector four times too sure."""
    rng = np.random.default_rng(seed)  # two normals of unit variance at -1 and +1: the log odds at x are 2 x
    return 2 * sharpness * rng.normal(-1, 1, n_real), 2 * sharpness * rng.normal(1, 1, n_fake)


def classifier(weight):
    network = nn.Sequential(OrderedDict(fc=nn.Linear(3, 2)))
    nn.init.constant_(network.fc.weight, weight)
    nn.init.zeros_(network.fc.bias)
    return network


@pytest.fixture
def detector(tmp_path):
    config = {"resynthesizer_fingerprint": "aaaa", "vgg": {"fingerprint": "bbbb"}}
    content = {"epoch": 3, "state_dict": classifier(0.5).state_dict(), "config": config}
    checkpoint.save(content, tmp_path / "detector.pth.tar")
    return tmp_path / "detector.pth.tar"


def test_temperature_is_that_of_the_smallest_nll(tmp_path):
    table = read_table(scores_csv(tmp_path / "s.csv", *overlapping()))
    temperature, warnings = calibrate.fit_temperature(table.margins, table.is_fake)
    grid = np.exp(np.linspace(np.log(0.05), np.log(20), 2001))
    losses = [negative_log_likelihood(probabilities_and_verdicts(table.logits, {"temperature": t})[0], table.is_fake) for t in grid]
    assert temperature == pytest.approx(grid[int(np.argmin(losses))], rel=4e-3)
    assert 3 < temperature < 5.5  # what made it too sure was 4
    assert warnings == []


def test_an_open_or_hopeless_temperature_is_said():
    is_fake = np.array([False, False, True, True])
    assert calibrate.fit_temperature(np.array([-3.0, -1, 2, 4]), is_fake)[0] == 1
    certain = 1e6 * np.array([-3.0, 1, -2, -4])
    with np.errstate(over="raise", invalid="raise"):
        temperature, warnings = calibrate.fit_temperature(certain, is_fake)
    assert temperature == pytest.approx(20, rel=1e-3) and len(warnings) == 1


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
        assert np.sum(prob[~is_fake] >= prob[prob < t_fake].max()) > allowed
        assert np.sum(prob[is_fake] <= prob[prob > t_real].min()) > allowed


def test_thresholds_by_hand():
    prob = np.array([0.1, 0.2, 0.3, 0.8, 0.4, 0.7, 0.9, 0.95])
    is_fake = np.arange(8) >= 4
    assert calibrate.fit_thresholds(prob, is_fake, 0, 0) == pytest.approx((0.35, 0.85))
    assert calibrate.fit_thresholds(prob, is_fake, 0.25, 0) == pytest.approx((0.35, 0.35))  # fake from .35, real to .35
    separated = calibrate.fit_thresholds(np.array([0.1, 0.2, 0.8, 0.9]), np.arange(4) >= 2, 0.01, 0.01)
    assert separated == pytest.approx((0.5, 0.5))  # nothing is unsure
    t_real, t_fake = calibrate.fit_thresholds(np.array([1.0, 0.1, 1.0, 0.9]), np.arange(4) >= 2, 0.0, 0.0)
    assert t_fake > 1 and t_real == pytest.approx(0.5)  # a real at the very top bars the verdict fake


def test_stores_beside_everything_else_and_says_what_changed(tmp_path, detector, capsys):
    table = scores_csv(tmp_path / "val.csv", *overlapping())
    (tmp_path / "val.json").write_text("{}")
    assert calibrate.main([str(table), "--into", str(detector), "--fpr", "0.05", "--fnr", "0.1"]) == 0
    content = checkpoint.load(detector)
    calibration = content.pop("calibration")
    numbers = {"temperature", "t_real", "t_fake", "fpr", "fnr", "n_real", "n_fake"}
    assert set(calibration) == {*numbers, "source"}
    assert calibration["source"] == "val.csv" and calibration["n_real"] == 300 and calibration["fnr"] == 0.1
    assert set(content) == {"epoch", "config", "state_dict"}
    assert torch.equal(content["state_dict"]["fc.weight"], torch.full((2, 3), 0.5))
    said = re.findall(r"(ECE|NLL).* ([\d.]+) before, ([\d.]+) after", capsys.readouterr().out)
    assert [name for name, old, new in said if float(new) < float(old) / 2] == ["ECE", "NLL"]

    scores = read_table(table)
    verdicts = np.array(probabilities_and_verdicts(scores.logits, calibration)[1])
    assert np.sum(verdicts[scores.is_real] == "fake") <= 15  # 5 % of 300
    assert np.sum(verdicts[scores.is_fake] == "real") <= 25  # 10 % of 250
    assert np.sum(verdicts == "unsure") > 0

    before = detector.read_bytes()
    assert calibrate.main([str(table), "--into", str(detector), "--fpr", "0.05", "--fnr", "0.1"]) == 0
    assert detector.read_bytes() == before  # the same again: nothing in it depends on the day


OWN = {"classifier_fingerprint": fingerprint(classifier(0.5)), "resynthesizer_fingerprint": "aaaa", "vgg": {"fingerprint": "bbbb"}}


@pytest.mark.parametrize(
    ("record", "refused"),
    [
        ({"detector": OWN, "perturbation": {"name": "none"}}, None),
        ({"detector": {"classifier_fingerprint": OWN["classifier_fingerprint"]}}, None),  # a released detector: nothing else is known
        ({"detector": {**OWN, "classifier_fingerprint": fingerprint(classifier(0.25))}}, "another detector"),
        ({"detector": {**OWN, "resynthesizer_fingerprint": "cccc"}}, "another detector"),
        ({"detector": {**OWN, "vgg": {"fingerprint": "cccc"}}}, "another detector"),
        ({"detector": OWN, "perturbation": {"name": "jpeg", "strength": 50}}, "jpeg"),
    ],
)
def test_scores_of_another_detector_or_of_perturbed_images_are_refused(tmp_path, detector, record, refused):
    table = scores_csv(tmp_path / "val.csv", *overlapping())
    (tmp_path / "val.json").write_text(json.dumps(record))
    before = detector.read_bytes()
    with mistake(refused) if refused else contextlib.nullcontext():
        calibrate.main([str(table), "--into", str(detector)])
    assert (detector.read_bytes() == before) == bool(refused)


def test_what_is_to_be_known_is_a_warning(tmp_path, detector, caplog, capsys):
    table = scores_csv(tmp_path / "val.csv", *overlapping(n_real=99, n_fake=100))
    assert calibrate.main([str(table), "--into", str(detector), "--fpr", "0.01"]) == 0
    assert [r.levelname for r in caplog.records] == ["WARNING"]  # no record of whose scores these are
    (tmp_path / "val.json").write_text(json.dumps({"trained_on": 7}))
    assert calibrate.main([str(table)]) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(warnings) == 3 and "99 reals" in warnings[0] and "99 reals" in warnings[1]
    assert "trained on 7" in warnings[2]


def test_mistakes_are_one_line_and_status_2(tmp_path, detector):
    one_sided = str(scores_csv(tmp_path / "s.csv", np.array([-1.0, 1]), np.array([])))
    no_detectors = {"rdn.pth": {"sfe1.weight": 0}, "other.pth": {"state_dict": {"sfe1.weight": 0}}}
    for name, content in no_detectors.items():
        checkpoint.save(content, tmp_path / name)
    before = {path: path.read_bytes() for path in tmp_path.glob("*.pth*")}
    command = [sys.executable, "-m", "tools.calibrate", one_sided, "--into", str(detector)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: 2 real and 0 fake")
    for wrong in (["none.csv"], [one_sided, "--fpr=0.5"], [one_sided, "--fpr=-0.1"], ["s", "--fnr=nan"]):
        with mistake(wrong[-1].strip("-").replace("=", " ")):
            calibrate.main([*wrong, "--into", str(detector)])
    for name in no_detectors:
        with mistake(name, "no detector"):
            calibrate.main([one_sided, "--into", str(tmp_path / name)])
    assert before == {path: path.read_bytes() for path in tmp_path.glob("*.pth*")}
