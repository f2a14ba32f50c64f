"""Tests of writing and reading score tables, which are CSV files with one row per image."""

import csv

import numpy as np
import pytest
from files import expect_user_error

from evaluation.calibration import check_calibration, probabilities_and_verdicts
from evaluation.score_table import (
    COLUMNS,
    Row,
    make_rows_from_logits,
    path_of_residual_picture,
    read_json_record_of_score_table,
    read_rows,
    read_table,
    write_table,
)
from utils.labels import FAKE, REAL

HEADER = ",".join(COLUMNS)
NAMES = [
    "plain.png", "with space .png", " leading and trailing ", "a,b;c.png", 'quo"te.png', '"', "new\nline.png", "\n",
    "carriage\rreturn", "\r\n", "=1+1.png", "@a", "'quoted'", "naïve/é/雪.png", "\udcff\udcfe.png", "\ufeffmark",
    "real", ",", "C:\\new\\table", "x" * 200_000,
]  # fmt: skip


def test_a_score_table_has_the_documented_columns():
    assert HEADER == "path,label,generator,logit_fake,logit_real,prob_fake,prediction,error"


def test_a_score_table_keeps_any_file_name_unchanged(tmp_path):
    rows = [Row(name, "fake", name, 1.5, -0.25, 0.75, "fake") for name in NAMES]
    write_table(tmp_path / "s.csv", rows)
    assert list(read_rows(tmp_path / "s.csv")) == rows
    with open(tmp_path / "s.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        assert [cells[0] for cells in csv.reader(file)] == ["path", *NAMES]


def test_a_score_table_keeps_float32_logits_bit_for_bit(tmp_path):
    bits = np.random.default_rng(0).integers(0, 2**32, size=4000, dtype=np.uint32)
    logits = bits.view(np.float32)
    logits = logits[np.isfinite(logits)][:3000].reshape(-1, 2)
    write_table(tmp_path / "s.csv", make_rows_from_logits([("a.png", REAL, "")] * len(logits), logits))
    table = read_table(tmp_path / "s.csv")
    assert table.logits.dtype == np.float32
    np.testing.assert_array_equal(table.logits.view(np.uint32), logits.view(np.uint32))
    prob_fake, verdicts = probabilities_and_verdicts(logits)
    np.testing.assert_array_equal(table.prob_fake, prob_fake)
    assert table.predictions == verdicts


def test_the_probability_is_the_softmax_and_the_verdict_follows_the_larger_logit():
    logits = np.log([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5], [0.4, 0.6]])
    prob_fake, verdicts = probabilities_and_verdicts(logits)
    np.testing.assert_allclose(prob_fake, [0.9, 0.2, 0.5, 0.4])
    assert verdicts == ["fake", "real", "fake", "real"]
    extreme, _ = probabilities_and_verdicts(np.array([[3e38, -3e38], [-3e38, 3e38], [0, 300]], np.float32))
    np.testing.assert_allclose(extreme, [1, 0, np.exp(-300)], rtol=1e-12)


def test_a_calibration_divides_the_logits_by_the_temperature_and_adds_the_verdict_unsure():
    logits = np.log([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5], [0.4, 0.6]])
    calibration = {"temperature": 1.0, "t_real": 0.2 + 1e-9, "t_fake": 0.9 - 1e-9, "source": "val.csv"}
    assert probabilities_and_verdicts(logits, calibration)[1] == ["fake", "real", "unsure", "unsure"]
    # A temperature of 2 halves the log odds, so the odds 9 : 1 become 3 : 1, and the odds 1 : 4 become 1 : 2
    prob_fake, _ = probabilities_and_verdicts(logits[:2], {"temperature": 2.0})
    np.testing.assert_allclose(prob_fake, [3 / 4, 1 / 3])


@pytest.mark.parametrize(
    "damage",
    [
        {"temperature": -1.0}, {"temperature": 0}, {"temperature": float("nan")}, {"temperature": float("inf")},
        {"temperature": "warm"}, {"temperature": None}, {"t_fake": 1.5}, {"t_real": -0.1}, {"t_real": 0.9},
        {"t_real": []},
    ],
)  # fmt: skip
def test_a_calibration_with_an_impossible_value_is_refused(damage):
    valid = {"temperature": 1.5, "t_real": 0.4, "t_fake": 0.6, "source": "val.csv"}
    assert check_calibration(valid, "d.pth") == valid
    assert check_calibration(None, "d.pth") == {}
    with expect_user_error("d.pth", "calibration"):
        check_calibration({**valid, **damage}, "d.pth")
    with expect_user_error("d.pth", "calibration"):
        check_calibration({"temperature": 1.0}, "d.pth")
    with expect_user_error("d.pth", "calibration"):
        check_calibration([1.0, 0.4, 0.6], "d.pth")


def test_read_table_returns_the_columns_of_a_score_table_as_arrays(tmp_path):
    items = [("r.png", REAL, ""), ("f.png", FAKE, "gan"), ("u.png", None, "")]
    rows = make_rows_from_logits(items, [[0, 2], [3, 1], [0, 0]])
    rows.append(Row("bad.png", "fake", "gan", error="truncated file"))
    write_table(tmp_path / "s.csv", rows)
    table = read_table(tmp_path / "s.csv")
    assert len(table) == 4
    assert table.is_real.tolist() == [True, False, False, False]
    assert table.is_fake.tolist() == [False, True, False, True]
    assert table.generators == ["", "gan", "", "gan"]
    assert table.has_score.tolist() == [True, True, True, False]
    assert table.has_label_and_score.tolist() == [True, True, False, False]
    assert table.logit_margins[:3].tolist() == [-2, 2, 0]
    assert table.predictions == ["real", "fake", "fake", ""]
    assert table.errors == ["", "", "", "truncated file"]
    for part in (table.select_rows(table.is_fake), table.select_rows([1, 3])):
        assert part.paths == ["f.png", "bad.png"]
        assert part.logits[0].tolist() == [3, 1]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_make_an_error_row(bad):
    good, row = make_rows_from_logits([("a", REAL, ""), ("b", REAL, "")], [[1, 2], [bad, 0]])
    assert good.prediction == "real" and not good.error
    assert (
        "not finite" in row.error and row.error.startswith(row.path) and row.prob_fake is None and row.prediction == ""
    )


def test_the_columns_of_a_score_table_may_have_any_order_and_unknown_columns_are_ignored(tmp_path):
    (tmp_path / "s.csv").write_text(
        "\ufeffpath,note,prob_fake,label,logit_real,logit_fake,generator,prediction\na.png,hm,0.5,real,1,1,,fake\n\n",
        encoding="utf-8",
    )
    assert list(read_rows(tmp_path / "s.csv")) == [Row("a.png", "real", "", 1.0, 1.0, 0.5, "fake")]


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("", 1, "path"),
        ("path;label\n", 1, "label"),
        (f"{HEADER}\na.png,real,,1,2\n", 2, "5"),
        (f"{HEADER}\na.png,real,,1,2,0.3,real,\n\nb.png,1,,1,2,0.3,real,\n", 4, "'1'"),
        (f"{HEADER}\na.png,real,,one,2,0.3,real,\n", 2, "'one'"),
        (f"{HEADER}\na.png,real,,1,nan,0.3,real,\n", 2, "nan"),
        (f"{HEADER}\na.png,real,,1,2,,real,\n", 2, "''"),
        (f"{HEADER}\na.png,real,,1,2,30,real,\n", 2, "30"),
        (f"{HEADER}\na.png,real,,1,2,0.3,1,\n", 2, "prediction"),
        (f"{HEADER}\na.png,real,,1,2,0.3,,\n", 2, "prediction"),
        (f"{HEADER}\n,real,,1,2,0.3,real,\n", 2, "path"),
        (f'{HEADER}\n"a.png,real,,1,2,0.3,real,\n\n', 2, ""),
    ],
)
def test_the_error_for_a_wrong_score_table_names_the_file_the_line_and_the_wrong_value(tmp_path, text, line, reason):
    (tmp_path / "s.csv").write_text(text)
    with expect_user_error(f"{tmp_path}/s.csv, line {line}: ", reason):
        read_table(tmp_path / "s.csv")


@pytest.mark.parametrize("name", ["absent.csv", ".", "empty.csv", "binary.csv"])
def test_a_file_that_is_not_a_score_table_is_refused_in_one_line(tmp_path, name):
    (tmp_path / "empty.csv").write_text(HEADER + "\n")
    (tmp_path / "binary.csv").write_bytes(bytes(range(256)) * 10)
    with expect_user_error(str(tmp_path / name)):
        read_table(tmp_path / name)


def test_a_missing_json_file_is_read_as_an_empty_dict_and_a_broken_one_is_refused(tmp_path):
    assert read_json_record_of_score_table(tmp_path / "s.csv") == {}
    for broken in ("{", "[1]", "\xff"):
        (tmp_path / "s.json").write_text(broken, encoding="latin-1")
        with expect_user_error("s.json"):
            read_json_record_of_score_table(tmp_path / "s.csv")


@pytest.mark.parametrize(
    ("image", "picture"),
    [("a/b.png", "a/b.png"), ("/a/b.jpg", "a/b.jpg"), ("../../a/./b.png", "__/__/a/b.png"), ("a/../b.png", "b.png")],
)
def test_the_path_of_a_residual_picture_is_inside_the_given_folder(image, picture):
    assert str(path_of_residual_picture("out", image)) == f"out/{picture}.residual.png"
