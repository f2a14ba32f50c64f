"""Score tables read back exactly what was written, and say what is wrong with what they cannot read."""

import csv

import numpy as np
import pytest

from utils.scores import (
    COLUMNS,
    FORMULA_STARTS,
    Row,
    RowWriter,
    ScoreError,
    drop_torn_row,
    make_rows,
    predict,
    read_rows,
    read_table,
    write_rows,
)

HEADER = ",".join(COLUMNS)
NAMES = [
    "plain.png", "with space .png", " leading and trailing ", "a,b;c.png", 'quo"te.png', '"', "new\nline.png",
    "\n", "carriage\rreturn", "\r\n", "=1+1.png", "+a", "-a", "@a", "\ta", "＝a", "'", "''", "'=a", "''=a",
    "'plain", "naïve/é/雪.png", "<script>alert(1)</script>", "\udcff\udcfe.png", "\ufeffmark", "real", ",",
    "C:\\new\\table",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_any_file_name_comes_back(tmp_path, name):
    row = Row(name, "fake", name, 1.5, -0.25, 0.75, "fake")
    write_rows(tmp_path / "s.csv", [row, row])
    assert list(read_rows(tmp_path / "s.csv")) == [row, row]


def test_tables_with_and_without_stability(tmp_path):
    rows = make_rows(["a.png", "b.png"], ["real", ""], ["", ""], [[0, 2], [3, 1]])
    rows = [*(row._replace(stability="unstable") for row in rows), Row("c.png", error="torn")]
    with RowWriter(tmp_path / "s.csv", stability=True) as writer:
        writer.write(*rows[:1])
    with RowWriter(tmp_path / "s.csv", append=True, stability=True) as writer:
        writer.write(*rows[1:])
    assert (tmp_path / "s.csv").read_text().startswith(f"{HEADER},stability\n")
    assert list(read_rows(tmp_path / "s.csv")) == rows
    table = read_table(tmp_path / "s.csv")
    assert table.stability == ["unstable", "unstable", ""] and table.select([2, 0]).stability == ["", "unstable"]
    write_rows(tmp_path / "without.csv", rows)
    assert (tmp_path / "without.csv").read_text().startswith(f"{HEADER}\n")
    assert read_table(tmp_path / "without.csv").stability == ["", "", ""]
    (tmp_path / "s.csv").write_text(f"{HEADER},stability\na.png,,,1,2,0.3,real,,shaky\n")
    with pytest.raises(ScoreError, match="stability 'shaky'"):
        read_table(tmp_path / "s.csv")


@pytest.mark.parametrize("start", FORMULA_STARTS)
def test_no_cell_starts_as_a_formula(tmp_path, start):
    write_rows(tmp_path / "s.csv", [Row(f"{start}cmd|' /C calc'!A0", "real", f"{start}x", error=f"{start}oops")])
    with open(tmp_path / "s.csv", newline="", encoding="utf-8") as file:
        cells = list(csv.reader(file))[1]
    assert not any(cell.startswith(FORMULA_STARTS) for cell in cells), cells
    assert len(cells) == len(COLUMNS)


def test_float32_logits_come_back_bit_by_bit(tmp_path):
    bits = np.random.default_rng(0).integers(0, 2**32, size=20_000, dtype=np.uint32)
    values = bits.view(np.float32)
    values = values[np.isfinite(values)][:9_000].reshape(-1, 2)
    rows = make_rows([f"{i}.png" for i in range(len(values))], ["real"] * len(values), [""] * len(values), values)
    write_rows(tmp_path / "s.csv", rows)
    table = read_table(tmp_path / "s.csv")
    assert table.logits.dtype == np.float32
    np.testing.assert_array_equal(table.logits.view(np.uint32), values.view(np.uint32))
    prob_fake, predictions = predict(values)
    np.testing.assert_array_equal(table.prob_fake, prob_fake)  # float64, exactly
    assert table.predictions == predictions


def test_probabilities_and_verdicts():
    logits = np.log([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5], [0.4, 0.6]])
    prob_fake, predictions = predict(logits)
    np.testing.assert_allclose(prob_fake, [0.9, 0.2, 0.5, 0.4])
    assert predictions == ["fake", "real", "fake", "real"]
    assert predict(logits, thresholds=(0.2 + 1e-9, 0.9 - 1e-9))[1] == ["fake", "real", "unsure", "unsure"]
    # p = odds / (1 + odds), temperature 2 takes the square root of the odds: 9 -> 3, 1/4 -> 1/2
    np.testing.assert_allclose(predict(logits[:2], temperature=2.0)[0], [3 / 4, 1 / 3])
    extreme, _ = predict(np.array([[3e38, -3e38], [-3e38, 3e38]], dtype=np.float32))
    np.testing.assert_array_equal(extreme, [1, 0])


def test_a_table_has_its_columns_as_arrays(tmp_path):
    rows = make_rows(["r.png", "f.png", "u.png"], ["real", "fake", ""], ["", "gan", ""], [[0, 2], [3, 1], [0, 0]])
    write_rows(tmp_path / "s.csv", [*rows, Row("bad.png", "fake", "gan", error="truncated\nfile")])
    table = read_table(tmp_path / "s.csv")
    assert len(table) == 4
    assert table.is_real.tolist() == [True, False, False, False]
    assert table.is_fake.tolist() == [False, True, False, True]
    assert table.generators == ["", "gan", "", "gan"]
    assert table.scored.tolist() == [True, True, True, False]
    assert table.margins[:3].tolist() == [-2, 2, 0]
    assert table.errors == ["", "", "", "truncated file"]
    assert table.predictions == ["real", "fake", "fake", ""]
    part = table.select(table.is_fake)
    assert part.paths == ["f.png", "bad.png"] and part.logits[0].tolist() == [3, 1]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_make_an_error_row(bad):
    good, row = make_rows(["a", "b"], ["real", "real"], ["", ""], [[1, 2], [bad, 0]])
    assert not good.error and good.prediction == "real"
    assert "not finite" in row.error and row.prob_fake is None and row.prediction == ""


def test_what_write_returned_from_is_in_the_file(tmp_path):
    path = tmp_path / "s.csv"
    writer = RowWriter(path)
    for n in range(1, 4):
        writer.write(Row(f"{n}.png", "real", "", 0.0, 1.0, 0.25, "real"))
        assert len(read_table(path)) == n
    writer.close()


def test_a_killed_run_goes_on_where_it_stopped(tmp_path):
    rows = [Row(f"{n}\n.png", "real", "", 0.0, 1.0, 0.25, "real") for n in range(3)]
    write_rows(tmp_path / "whole.csv", rows)
    whole = (tmp_path / "whole.csv").read_bytes()
    for length in range(len(whole) + 1):  # killed after any byte
        path = tmp_path / "torn.csv"
        path.write_bytes(whole[:length])
        done = drop_torn_row(path)
        assert whole.startswith(path.read_bytes())
        with RowWriter(path, append=True) as writer:
            writer.write(*rows[done:])
        assert path.read_bytes() == whole


def test_append_starts_a_table_that_is_not_there(tmp_path):
    with RowWriter(tmp_path / "new.csv", append=True) as writer:
        writer.write(Row("a", error="x"))
    assert (tmp_path / "new.csv").read_text() == f"{HEADER}\na,,,,,,,x\n"


def test_a_file_that_cannot_be_written_is_one_line(tmp_path):
    for append in (False, True):
        with pytest.raises(ScoreError, match="cannot write the score table"):
            RowWriter(tmp_path, append=append)


def test_other_orders_more_columns_and_a_byte_order_mark_are_fine(tmp_path):
    (tmp_path / "s.csv").write_text(
        "\ufeffpath,note,prob_fake,label,logit_real,logit_fake,generator,prediction\na.png,hm,0.5,real,1,1,,fake\n\n",
        encoding="utf-8",
    )
    assert list(read_rows(tmp_path / "s.csv")) == [Row("a.png", "real", "", 1.0, 1.0, 0.5, "fake")]


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("", 1, "no column path"),
        ("path;label\n", 1, "no column path, label"),
        (f"{HEADER}\na.png,real,,1,2\n", 2, "5 cells, 8 were wanted"),
        (f"{HEADER}\na.png,real,,1,2,0.3,real,\nb.png,1,,1,2,0.3,real,\n", 3, "label '1'"),
        (f"{HEADER}\na.png,real,,one,2,0.3,real,\n", 2, "logit_fake 'one'"),
        (f"{HEADER}\na.png,real,,1,nan,0.3,real,\n", 2, "logit_real 'nan'"),
        (f"{HEADER}\na.png,real,,1,2,,real,\n", 2, "prob_fake ''"),
        (f"{HEADER}\na.png,real,,1,2,30,real,\n", 2, "prob_fake 30"),
        (f"{HEADER}\na.png,real,,1,2,0.3,1,\n", 2, "prediction '1'"),
        (f"{HEADER}\n,real,,1,2,0.3,real,\n", 2, "an empty path"),
        (f'{HEADER}\n"a.png,real,,1,2,0.3,real,\n', 2, "unexpected end of data"),
    ],
)
def test_errors_name_file_line_and_reason(tmp_path, text, line, said):
    path = tmp_path / "s.csv"
    path.write_text(text)
    with pytest.raises(ScoreError) as caught:
        read_table(path)
    message = str(caught.value)
    assert message.startswith(f"{path}, line {line}: ") and said in message and "\n" not in message


def test_a_missing_an_empty_and_a_binary_file_are_one_line(tmp_path):
    with pytest.raises(ScoreError, match="cannot read the score table .*No such file"):
        read_table(tmp_path / "none.csv")
    with pytest.raises(ScoreError, match="cannot read the score table"):
        read_table(tmp_path)
    (tmp_path / "empty.csv").write_text(HEADER + "\n")
    with pytest.raises(ScoreError, match="no rows"):
        read_table(tmp_path / "empty.csv")
    (tmp_path / "binary.csv").write_bytes(bytes(range(256)) * 10)
    with pytest.raises(ScoreError) as caught:
        read_table(tmp_path / "binary.csv")
    assert len(str(caught.value).splitlines()) == 1
