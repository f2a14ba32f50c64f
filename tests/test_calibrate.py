"""Tests of tools.calibrate, which fits the temperature and the thresholds of a detector to a score table."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from files import expect_user_error
from processes import ROOT

from evaluation.calibration import check_calibration, probabilities_and_verdicts
from evaluation.metrics import negative_log_likelihood
from evaluation.score_table import make_rows_from_logits, read_table, write_table
from tools import calibrate
from utils import checkpoints
from utils.labels import FAKE, REAL

IMAGES = {"crop_size": 128, "resize": None}
# SETTINGS are the defaults of test.py for a detector that was trained on crops of 128 x 128 pixels
SETTINGS = {"crop_size": 128, "resize": None, "crops": 9}


def write_score_table(path, reals, fakes):
    """Write a score table with one row per value of logit_fake in `reals` and `fakes`, and return its path."""
    margins = np.concatenate([reals, fakes])
    items = [(f"{i}.png", REAL if i < len(reals) else FAKE, "") for i in range(len(margins))]
    write_table(path, make_rows_from_logits(items, np.stack([margins, np.zeros_like(margins)], axis=1)))
    return path


def draw_overconfident_logit_margins(n_real=300, n_fake=250):
    """Return random margins (logit_fake - logit_real) of real images, and of fake images, by an overconfident detector.

    The margins of a calibrated detector would be four times smaller.
    """
    rng = np.random.default_rng(0)
    return 8 * rng.normal(-1, 1, n_real), 8 * rng.normal(1, 1, n_fake)


def create_equal_last_layer_weights(value):
    """Return the last layer of a classifier, whose weights all have the given value and whose biases are 0."""
    return {"fc.weight": torch.full((2, 3), value), "fc.bias": torch.zeros(2)}


@pytest.fixture
def checkpoint_path(tmp_path):
    """Write a checkpoint with the entries that tools.calibrate reads, and return its path."""
    config = {
        "classifier": {"name": "resnet18", "args": {}},
        "resynthesizer_fingerprint": "aaaa",
        "vgg": {"fingerprint": "bbbb"},
        "images": IMAGES,
    }
    checkpoints.save_checkpoint(
        {"epoch": 3, "state_dict": create_equal_last_layer_weights(0.5), "config": config},
        tmp_path / "detector.pth.tar",
    )
    return tmp_path / "detector.pth.tar"


@pytest.fixture
def score_table_path(tmp_path):
    """Write a score table of an overconfident detector, and return its path."""
    return write_score_table(tmp_path / "val.csv", *draw_overconfident_logit_margins())


# --- fitted numbers


def test_the_fitted_temperature_has_the_smallest_nll_of_2001_candidates(score_table_path):
    table = read_table(score_table_path)
    temperature, warnings = calibrate.fit_temperature(table.logit_margins, table.is_fake)
    candidates = np.exp(np.linspace(np.log(0.05), np.log(20), 2001))
    losses = []
    for candidate in candidates:
        prob_fake, _ = probabilities_and_verdicts(table.logits, {"temperature": candidate})
        losses.append(negative_log_likelihood(prob_fake, table.is_fake))
    assert temperature == pytest.approx(candidates[int(np.argmin(losses))], rel=4e-3)
    assert 3 < temperature < 5.5  # the correct temperature is 4, because the margins are four times too large
    assert warnings == []


def test_fit_temperature_warns_if_the_scores_do_not_determine_the_temperature():
    is_fake = np.array([False, False, True, True])
    temperature, warnings = calibrate.fit_temperature(np.array([-3.0, -1, 2, 4]), is_fake)
    assert temperature == 1 and len(warnings) == 1
    with np.errstate(over="raise", invalid="raise"):
        temperature, warnings = calibrate.fit_temperature(1e6 * np.array([-3.0, 1, -2, -4]), is_fake)
    assert temperature == pytest.approx(20, rel=1e-3) and len(warnings) == 1


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.07, 0.29])
@pytest.mark.parametrize("decimals", [None, 1])  # rounding to one decimal makes many scores equal
def test_fitted_thresholds_keep_both_error_rates_and_leave_as_few_images_unsure_as_possible(rate, decimals):
    rng = np.random.default_rng(3)
    is_fake = np.arange(200) >= 100
    prob = np.concatenate([rng.beta(2, 4, 100), rng.beta(4, 2, 100)])
    if decimals is not None:
        prob = np.round(prob, decimals)
    t_real, t_fake = calibrate.fit_thresholds(prob, is_fake, rate, rate)
    allowed = round(rate * 100)
    assert t_real <= t_fake
    assert np.sum(prob[~is_fake] >= t_fake) <= allowed
    assert np.sum(prob[is_fake] <= t_real) <= allowed
    if t_real < t_fake:
        # With the next lower P(fake) as the threshold t_fake, more than `allowed` real images would be called fake
        assert np.sum(prob[~is_fake] >= prob[prob < t_fake].max()) > allowed
        # With the next higher P(fake) as the threshold t_real, more than `allowed` fake images would be called real
        assert np.sum(prob[is_fake] <= prob[prob > t_real].min()) > allowed


def test_fitted_thresholds_of_small_examples_equal_the_values_computed_by_hand():
    prob = np.array([0.1, 0.2, 0.3, 0.8, 0.4, 0.7, 0.9, 0.95])
    is_fake = np.arange(8) >= 4
    assert calibrate.fit_thresholds(prob, is_fake, 0, 0) == pytest.approx((0.35, 0.85))
    assert calibrate.fit_thresholds(prob, is_fake, 0.25, 0) == pytest.approx((0.35, 0.35))
    separated = calibrate.fit_thresholds(np.array([0.1, 0.2, 0.8, 0.9]), np.arange(4) >= 2, 0.01, 0.01)
    assert separated == pytest.approx((0.5, 0.5))
    certain = np.array([1.0, 0.1, 1.0, 0.9])  # P(fake) of two real images and of two fake images
    t_real, t_fake = calibrate.fit_thresholds(certain, np.arange(4) >= 2, 0.0, 0.0)
    assert t_fake > 1 and t_real == pytest.approx(0.5)
    check_calibration({"temperature": 1.0, "t_real": t_real, "t_fake": t_fake}, "a file")


# --- the stored calibration


def test_calibrate_adds_the_calibration_to_the_checkpoint_and_keeps_all_other_entries(
    score_table_path, checkpoint_path, capsys
):
    (score_table_path.parent / "val.json").write_text(json.dumps({"scoring_settings": SETTINGS}))
    arguments = [str(score_table_path), "--into", str(checkpoint_path), "--fpr", "0.05", "--fnr", "0.1"]
    assert calibrate.main(arguments) == 0
    content = checkpoints.read_checkpoint_content(checkpoint_path)
    calibration = content.pop("calibration")
    assert set(content) == {"epoch", "config", "state_dict"}
    assert torch.equal(content["state_dict"]["fc.weight"], torch.full((2, 3), 0.5))
    numbers = {"temperature", "t_real", "t_fake", "fpr", "fnr", "n_real", "n_fake"}
    assert set(calibration) == {*numbers, "source"}
    assert calibration["source"] == "val.csv" and calibration["n_real"] == 300 and calibration["fnr"] == 0.1

    printed = re.findall(r"(ECE|NLL).* ([\d.]+) before, ([\d.]+) after", capsys.readouterr().out)
    assert [name for name, old, new in printed if float(new) < float(old) / 2] == ["ECE", "NLL"]
    table = read_table(score_table_path)
    verdicts = np.array(probabilities_and_verdicts(table.logits, calibration)[1])
    assert np.sum(verdicts[table.is_real] == "fake") <= 15  # 5 % of the 300 real images
    assert np.sum(verdicts[table.is_fake] == "real") <= 25  # 10 % of the 250 fake images
    assert np.sum(verdicts == "unsure") > 0

    before = checkpoint_path.read_bytes()
    assert calibrate.main(arguments) == 0
    assert checkpoint_path.read_bytes() == before


def test_calibrating_a_symbolic_link_keeps_the_link_and_changes_its_target_file(score_table_path, checkpoint_path):
    link = checkpoint_path.parent / "link.pth.tar"
    link.symlink_to(checkpoint_path.name)
    assert calibrate.main([str(score_table_path), "--into", str(link)]) == 0
    assert link.is_symlink()
    assert "calibration" in checkpoints.read_checkpoint_content(checkpoint_path)


# --- refused score tables and detectors

OWN = {
    "classifier_fingerprint": checkpoints.compute_fingerprint(create_equal_last_layer_weights(0.5)),
    "resynthesizer_fingerprint": "aaaa",
    "vgg": {"fingerprint": "bbbb"},
}
OTHER_WEIGHTS = checkpoints.compute_fingerprint(create_equal_last_layer_weights(0.25))
CASES = {
    "the same detector": ({"detector": OWN, "perturbation": {"name": "none"}, "scoring_settings": SETTINGS}, None),
    "a released detector": ({"detector": {"classifier_fingerprint": OWN["classifier_fingerprint"]}}, None),
    "other weights": ({"detector": {**OWN, "classifier_fingerprint": OTHER_WEIGHTS}}, "another detector"),
    "another RDN": ({"detector": {**OWN, "resynthesizer_fingerprint": "cccc"}}, "another detector"),
    "other VGG weights": ({"detector": {**OWN, "vgg": {"fingerprint": "cccc"}}}, "another detector"),
    "JPEG": ({"detector": OWN, "perturbation": {"name": "jpeg", "strength": 50}}, "jpeg"),
    "one crop": ({"detector": OWN, "scoring_settings": {**SETTINGS, "crops": 1}}, "--crops 1"),
    "another crop size": ({"detector": OWN, "scoring_settings": {**SETTINGS, "crop_size": 64}}, "--crop-size 64"),
    "whole images": (
        {"detector": OWN, "scoring_settings": {**SETTINGS, "crop_size": None, "crops": 1}},
        "--crop-size 0",
    ),
    "resized images": ({"detector": OWN, "scoring_settings": {**SETTINGS, "resize": 256}}, "--resize 256"),
}


@pytest.mark.parametrize("name", CASES)
def test_calibrate_accepts_only_scores_of_the_given_detector_with_its_image_settings(
    score_table_path, checkpoint_path, name
):
    record, refused = CASES[name]
    (score_table_path.parent / "val.json").write_text(json.dumps(record))
    before = checkpoint_path.read_bytes()
    if refused:
        with expect_user_error(refused):
            calibrate.main([str(score_table_path), "--into", str(checkpoint_path)])
        assert checkpoint_path.read_bytes() == before
    else:
        assert calibrate.main([str(score_table_path), "--into", str(checkpoint_path)]) == 0
        assert checkpoint_path.read_bytes() != before


@pytest.mark.parametrize(
    "content", [{"sfe1.weight": torch.zeros(1)}, {"state_dict": {"sfe1.weight": torch.zeros(1)}}, {"epoch": 3}]
)
def test_calibrate_refuses_a_file_without_a_detector_and_does_not_change_it(score_table_path, tmp_path, content):
    path = tmp_path / "other.pth"
    checkpoints.save_checkpoint(content, path)
    before = path.read_bytes()
    with expect_user_error("other.pth"):
        calibrate.main([str(score_table_path), "--into", str(path)])
    assert path.read_bytes() == before


def test_calibrate_warns_of_few_images_and_of_scored_training_images(tmp_path, checkpoint_path, caplog, capsys):
    scores = write_score_table(tmp_path / "val.csv", *draw_overconfident_logit_margins(n_real=99, n_fake=100))
    assert calibrate.main([str(scores), "--into", str(checkpoint_path), "--fpr", "0.01"]) == 0
    assert "no .json file" in caplog.text
    (tmp_path / "val.json").write_text(json.dumps({"trained_on": 7}))
    assert calibrate.main([str(scores)]) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(warnings) == 3
    assert "99 real images" in warnings[0] and "99 real images" in warnings[1] and "trained on 7" in warnings[2]


def test_calibrate_reports_a_wrong_argument_in_one_line_with_exit_status_2(tmp_path, checkpoint_path):
    one_class = str(write_score_table(tmp_path / "s.csv", np.array([-1.0, 1]), np.array([])))
    before = checkpoint_path.read_bytes()
    for arguments, text in (
        ([one_class], "2 real and 0 fake images"),
        (["none.csv"], "none.csv"),
        ([one_class, "--fpr=0.5"], "--fpr must be"),
        ([one_class, "--fpr=-0.1"], "--fpr must be"),
        ([one_class, "--fnr=nan"], "--fnr must be"),
    ):
        command = [sys.executable, "-m", "tools.calibrate", *arguments, "--into", str(checkpoint_path)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 2
        assert text in done.stderr.splitlines()[-1]
    assert checkpoint_path.read_bytes() == before
