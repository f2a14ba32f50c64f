"""Score tables read back exactly what was written, and say what is wrong with what they cannot read."""

import csv

import numpy as np
import pytest
from files import mistake

from evaluation import score_table as scores
from evaluation.score_table import COLUMNS, Row, make_rows, predict, read_record, read_rows, read_table
from utils.console import printable
from utils.labels import FAKE, REAL

HEADER = ",".join(COLUMNS)
NAMES = [
    "plain.png", "with space .png", " leading and trailing ", "a,b;c.png", 'quo"te.png', '"', "new\nline.png",
    "\n", "carriage\rreturn", "\r\n", "=1+1.png", "+a", "-a", "@a", "\ta", "＝a", "'", "''", "'=a", "''=a",
    "'plain", "naïve/é/雪.png", "<script>alert(1)</script>", "\udcff\udcfe.png", "\ufeffmark", "real", ",",
    "C:\\new\\table", "'\r", *(f"{start}cmd|' /C calc'!A0" for start in scores.FORMULA_STARTS),
]  # fmt: skip


def write(path, *rows, **options):
    scores.write_table(path, rows, **options)
    return path


def test_any_name_comes_back_and_none_starts_as_a_formula(tmp_path):
    rows = [Row(name, "fake", name, 1.5, -0.25, 0.75, "fake") for name in NAMES]
    assert list(read_rows(write(tmp_path / "s.csv", *rows))) == rows
    with open(tmp_path / "s.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        lines = list(csv.reader(file))[1:]
    assert len(lines) == len(NAMES) and {len(cells) for cells in lines} == {len(COLUMNS)}
    assert not [cells for cells in lines if any(cells[i].startswith(scores.FORMULA_STARTS) for i in (0, 2))]


def test_float32_logits_come_back_bit_by_bit(tmp_path):
    bits = np.random.default_rng(0).integers(0, 2**32, size=20_000, dtype=np.uint32)
    values = bits.view(np.float32)
    values = values[np.isfinite(values)][:9_000].reshape(-1, 2)
    table = read_table(write(tmp_path / "s.csv", *make_rows([("a.png", REAL, "")] * len(values), values)))
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
    unsure = predict(logits, {"t_real": 0.2 + 1e-9, "t_fake": 0.9 - 1e-9, "source": "val.csv"})[1]
    assert unsure == ["fake", "real", "unsure", "unsure"]
    # p = odds / (1 + odds), temperature 2 takes the square root of the odds: 9 -> 3, 1/4 -> 1/2
    np.testing.assert_allclose(predict(logits[:2], {"temperature": 2.0})[0], [3 / 4, 1 / 3])
    extreme, _ = predict(np.array([[3e38, -3e38], [-3e38, 3e38], [0, 300]], dtype=np.float32))
    np.testing.assert_allclose(extreme, [1, 0, np.exp(-300)], rtol=1e-12)


def test_a_table_has_its_columns_as_arrays(tmp_path):
    items = [("r.png", REAL, ""), ("f.png", FAKE, "gan"), ("u.png", None, "")]
    rows = [row._replace(stability="unstable") for row in make_rows(items, [[0, 2], [3, 1], [0, 0]])]
    rows.append(Row("bad.png", "fake", "gan", error="truncated\nfile"))
    without = write(tmp_path / "without.csv", *rows)
    assert without.read_text().startswith(f"{HEADER}\n") and read_table(without).stability == [""] * 4
    table = read_table(write(tmp_path / "s.csv", *rows, stability=True))
    assert table.stability == ["unstable"] * 3 + [""] and len(table) == 4
    assert table.is_real.tolist() == [True, False, False, False]
    assert table.is_fake.tolist() == [False, True, False, True]
    assert table.generators == ["", "gan", "", "gan"]
    assert table.scored.tolist() == [True, True, True, False]
    assert table.usable.tolist() == [True, True, False, False]
    assert table.margins[:3].tolist() == [-2, 2, 0]
    assert table.errors == ["", "", "", "truncated file"]
    assert table.predictions == ["real", "fake", "fake", ""]
    for part in (table.select(table.is_fake), table.select([1, 3])):
        assert part.paths == ["f.png", "bad.png"] and part.logits[0].tolist() == [3, 1]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_make_an_error_row(bad):
    good, row = make_rows([("a", REAL, ""), ("b", REAL, "")], [[1, 2], [bad, 0]])
    assert not good.error and good.prediction == "real"
    assert row.error and row.prob_fake is None and row.prediction == ""


def test_tables_of_1ed4653_and_of_spreadsheets_load(tmp_path):
    (tmp_path / "s.csv").write_bytes(
        HEADER.encode() + b",stability\n\"a;b.png\",fake,gan,1.25,-3e-08,0.7772998920567225,unsure,,stable\n"
        b"'-a\xff.png,real,,,,,,\"broken, file\",\n\"c\rd\",,\" x\",0.1,0.2,0.47502081252106,real,,\n"
    )  # fmt: skip
    assert list(read_rows(tmp_path / "s.csv")) == [
        Row("a;b.png", "fake", "gan", 1.25, -3e-08, 0.7772998920567225, "unsure", "", "stable"),
        Row("-a\udcff.png", "real", error="broken, file"),
        Row("c\rd", "", " x", 0.1, 0.2, 0.47502081252106, "real"),
    ]
    (tmp_path / "s.csv").write_text(  # another order, one column more, no errors, a byte order mark
        "\ufeffpath,note,prob_fake,label,logit_real,logit_fake,generator,prediction\na.png,hm,0.5,real,1,1,,fake\n\n",
        encoding="utf-8",
    )
    assert list(read_rows(tmp_path / "s.csv")) == [Row("a.png", "real", "", 1.0, 1.0, 0.5, "fake")]


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("", 1, "path"),
        ("path;label\n", 1, "label"),
        (f"{HEADER}\na.png,real,,1,2\n", 2, "5"),
        (f"{HEADER}\na.png,real,,1,2,0.3,real,\nb.png,1,,1,2,0.3,real,\n", 3, "label '1'"),
        (f"{HEADER}\na.png,real,,one,2,0.3,real,\n", 2, "'one'"),
        (f"{HEADER}\na.png,real,,1,nan,0.3,real,\n", 2, "nan"),
        (f"{HEADER}\na.png,real,,1,2,,real,\n", 2, "''"),
        (f"{HEADER}\na.png,real,,1,2,30,real,\n", 2, "30"),
        (f"{HEADER}\na.png,real,,1,2,0.3,1,\n", 2, "prediction '1'"),
        (f"{HEADER}\na.png,real,,1,2,0.3,,\n", 2, "prediction ''"),
        (f"{HEADER},stability\na.png,real,,1,2,0.3,real,,shaky\n", 2, "stability 'shaky'"),
        (f"{HEADER}\n,real,,1,2,0.3,real,\n", 2, "path"),
        (f'{HEADER}\n"a.png,real,,1,2,0.3,real,\n', 2, ""),
    ],
)
def test_errors_name_file_line_and_what_was_got(tmp_path, text, line, said):
    (tmp_path / "s.csv").write_text(text)
    with mistake(f"{tmp_path}/s.csv, line {line}: ", said):
        read_table(tmp_path / "s.csv")


def test_files_that_are_no_tables_are_one_line(tmp_path):
    (tmp_path / "empty.csv").write_text(HEADER + "\n")
    (tmp_path / "binary.csv").write_bytes(bytes(range(256)) * 10)
    for name in ("none.csv", ".", "empty.csv", "binary.csv"):
        with mistake(printable(tmp_path / name)):
            read_table(tmp_path / name)
    assert read_record(tmp_path / "none.csv") == {}
    for broken in ("{", "[1]", "\xff"):
        (tmp_path / "s.json").write_text(broken, encoding="latin-1")
        with mistake("s.json"):
            read_record(tmp_path / "s.csv")
