"""Tests of tools.report, which writes HTML pages and Markdown tables from score tables."""

import base64
import io
import json
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from files import expect_user_error
from PIL import Image
from processes import ROOT

from evaluation import metrics
from evaluation.score_table import Row, make_rows_from_logits, path_of_residual_picture, read_table, write_table
from tools import report, report_page
from utils.labels import FAKE, REAL

EVIL = '"><script>alert(1)</script><img src=x onerror=alert(1)>'
BROKEN = Row(f"{EVIL}.png", "fake", EVIL, error=f"not an image {EVIL}")


def make_score_rows(shift=2.0, n=30, generators=("ProGAN", "StyleGAN")):
    """Return rows of a score table with n real images, and n fake images of each generator.

    The mean of logit_fake - logit_real is -`shift` for real images and `shift` for fake images.
    """
    rng = np.random.default_rng(0)
    result = []
    for label, generator, mean in [(REAL, "", -shift)] + [(FAKE, name, shift) for name in generators]:
        logits = rng.normal(0, 2, size=(n, 2)) + [mean / 2, -mean / 2]
        items = [(f"{generator or 'real'}/{i:03d}.png", label, generator) for i in range(n)]
        result += make_rows_from_logits(items, logits)
    return result


def write_score_table(folder, name, table_rows, **record):
    """Write a score table NAME.csv, and NAME.json if `record` has entries, and return the path of the table."""
    folder.mkdir(parents=True, exist_ok=True)
    write_table(folder / f"{name}.csv", table_rows)
    if record:
        (folder / f"{name}.json").write_text(json.dumps(record))
    return str(folder / f"{name}.csv")


class Page(HTMLParser):
    """A parsed HTML page, with lists of its tags, attributes and pictures, and with its text.

    The page must contain all pictures as PNG or JPEG data URLs.
    """

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags, self.attributes, self.text, self.pictures = [], [], "", []
        self.feed(self.source)
        for _, name, value in self.attributes:
            if name == "src":
                head, content = value.split(",", 1)
                assert head in ("data:image/png;base64", "data:image/jpeg;base64")
                self.pictures.append(Image.open(io.BytesIO(base64.b64decode(content))))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attributes]

    def handle_data(self, data):
        self.text += data


def write_and_parse_page(tables, out, residuals=None, resamples=0):
    """Write an HTML report page about score tables, and return the parsed page."""
    return Page(report_page.write_report_page(report_page.load_score_tables(tables, resamples), out, residuals))


# --- the page


def test_the_report_page_shows_metrics_robustness_misclassified_images_and_settings(tmp_path):
    record = {
        "settings": {"stage": 5, "arch": "resnet50", "seed": 3},
        "detector": {"calibration": {"temperature": 2.0, "t_real": 0.25, "t_fake": 0.75}},
        "versions": {"torch": "2.15.0"},
    }
    tables = [write_score_table(tmp_path, "clean", [*make_score_rows(), BROKEN], **record)]
    for name, strength in (("jpeg", 30), ("jpeg", 90), ("blur", 3), ("jpeg", 60)):
        perturbation = {"name": name, "strength": strength}
        tables.append(
            write_score_table(tmp_path, f"{name}{strength}", make_score_rows(1.0), **record, perturbation=perturbation)
        )
    page = write_and_parse_page(tables, tmp_path / "new" / "out", resamples=20)
    for text in (
        "positive class is fake", "ProGAN", "StyleGAN", "mean over generators", "all images", "AUROC", "Robustness",
        "Most wrong", "Not scored", "resnet50", "2.15.0", "clean.csv", "P(fake) is at least 0.75",
    ):  # fmt: skip
        assert text in page.text, text
    places = [page.text.index(f"jpeg quality {quality}") for quality in (90, 60, 30)]
    assert places == sorted(places)  # the page lists the perturbations from weak (JPEG quality 90) to strong (30)
    assert [path.name for path in (tmp_path / "new" / "out").iterdir()] == ["report.html"]
    assert len(page.pictures) == 2  # one figure of scores and one figure of robustness
    assert write_and_parse_page(tables, tmp_path / "again", resamples=20).source == page.source


def test_the_report_page_names_the_score_table_to_which_the_thresholds_were_fitted(tmp_path):
    rule = {"temperature": 2.0, "t_real": 0.25, "t_fake": 0.75, "source": "validation.csv"}
    table = write_score_table(tmp_path, "clean", make_score_rows(), detector={"calibration": rule})
    assert "fitted to a score table called validation.csv" in write_and_parse_page([table], tmp_path / "out").text


def test_the_report_page_shows_html_in_names_as_text_and_loads_nothing_from_the_internet(tmp_path):
    table_rows = [*make_score_rows(generators=(f"{EVIL}\x1b[31m\nname",)), BROKEN]
    record = {"settings": {EVIL: EVIL, "nested": {"list": [EVIL]}}, "versions": {EVIL: EVIL}}
    record["perturbation"] = {"name": EVIL, "strength": 1}
    page = write_and_parse_page([write_score_table(tmp_path, "s", table_rows, **record)], tmp_path / "out")
    assert not {"script", "link", "iframe", "object", "form", "base"} & set(page.tags)
    for _, name, _ in page.attributes:
        assert not name.startswith("on") and name not in ("href", "srcset", "action")
    assert EVIL in page.text
    assert "\x1b" not in page.source and "url(" not in page.source and "@import" not in page.source
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert ("meta", "content", policy) in page.attributes


def test_the_report_page_shows_residual_pictures_and_images_in_the_folder_of_the_score_table(tmp_path):
    (tmp_path / "real").mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (900, 600), (200, 10, 10)).save(tmp_path / "real" / f"{name}.png")
    residual = path_of_residual_picture(tmp_path / "residuals", "real/a.png")
    residual.parent.mkdir(parents=True)
    Image.new("RGB", (900, 300), (0, 0, 250)).save(residual)
    (tmp_path / "text.png").write_text("no picture")
    items = [(name, REAL, "") for name in ("real/a.png", "real/b.png", "text.png", "missing.png")]
    table = write_score_table(tmp_path, "s", make_rows_from_logits(items, [[4, 0], [3, 0], [2, 0], [1, 0]]))
    page = write_and_parse_page([table], tmp_path / "out", tmp_path / "residuals")
    cards = [picture.size for picture in page.pictures if picture.format == "JPEG"]
    assert cards == [(720, 240), (320, 213)]
    assert page.text.count("not available") == 2


def test_the_report_lists_images_with_the_largest_errors_first(tmp_path):
    items = [("a", REAL, ""), ("b", FAKE, ""), ("c", REAL, ""), ("d", FAKE, ""), ("e", None, ""), ("f", REAL, "")]
    # The error of an image is the logit of the wrong class minus the logit of the correct class
    # The errors of images a, b, c, d and f are 1, 5, -9, -3 and 2, and image e has no error, because it has no label
    logits = [[1, 0], [0, 5], [0, 9], [3, 0], [50, 0], [2, 0]]
    table = read_table(write_score_table(tmp_path, "s", [*make_rows_from_logits(items, logits), BROKEN]))
    assert [table.paths[i] for i in report_page.find_most_wrongly_scored_images(table)] == ["b", "f", "a", "d", "c"]
    assert len(report_page.find_most_wrongly_scored_images(table, 2)) == 2


ODD_TABLES = {
    "only errors": [BROKEN],
    "no labels": make_rows_from_logits([("a", None, "")], [[1, 2]]),
    "one class": make_rows_from_logits([("a", FAKE, "g"), ("b", FAKE, "h")], [[1, 2], [1, 2]]),
    "one tied pair": make_rows_from_logits([("a", REAL, ""), ("b", FAKE, "")], [[1, 1], [1, 1]]),
    "many generators": make_score_rows(generators=[f"generator {i} $x_{{" for i in range(12)], n=5),
}


@pytest.mark.parametrize("name", ODD_TABLES)
def test_a_report_page_is_written_for_a_score_table_with_unusual_content(tmp_path, name):
    table = write_score_table(tmp_path, "s", ODD_TABLES[name], detector="from another program", settings=[1])
    assert write_and_parse_page([table], tmp_path / "out").tags[:2] == ["html", "head"]


def test_the_report_page_replaces_an_earlier_report_page_and_no_other_file(tmp_path):
    table = write_score_table(tmp_path, "s", make_score_rows())
    out = tmp_path / "out"
    out.mkdir()
    foreign = {"report.html": b"<html>my thesis</html>", "s_scores.png": b"mine", "robustness.png": b"mine"}
    for name, content in foreign.items():
        (out / name).write_bytes(content)
    with expect_user_error("report.html was not written by this program"):
        report.main([table, "--out", str(out)])
    (out / "report.html").unlink()
    for _ in range(2):
        assert report.main([table, "--out", str(out)]) == 0
    foreign.pop("report.html")
    assert {name: (out / name).read_bytes() for name in foreign} == foreign


def test_tools_report_refuses_wrong_arguments_before_it_writes_a_page(tmp_path):
    good, broken = (
        write_score_table(tmp_path, "s", make_score_rows()),
        write_score_table(tmp_path, "broken", make_score_rows()),
    )
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "file").write_text("")
    out = ["--out", f"{tmp_path}/o"]
    for text, *arguments in (
        ("none.csv", f"{tmp_path}/none.csv", *out),
        ("file", good, "--out", f"{tmp_path}/file"),
        ("--residuals", good, *out, "--residuals", f"{tmp_path}/none"),
        ("broken.json", broken, *out),
        ("s.csv is given twice", good, good, *out),
    ):
        with expect_user_error(text):
            report.main(arguments)
    assert not (tmp_path / "o" / "report.html").exists()


# --- markdown


def split_markdown_table_into_cells(markdown):
    """Split a Markdown table into a list of rows of cells, beginning with the heading."""
    heading, line, *body = [[cell.strip() for cell in row.strip("|").split("|")] for row in markdown.splitlines()]
    assert len(line) == len(heading) and set("".join(line)) == set("-:")
    return [heading, *body]


def test_the_markdown_table_shows_metrics_with_intervals(tmp_path):
    table = write_score_table(tmp_path, "s", make_score_rows(), settings={"seed": 5})
    command = [sys.executable, "-m", "tools.report", table, "--markdown"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    heading, first, *_ = split_markdown_table_into_cells(done.stdout)
    measured = metrics.compute_metrics_overall_and_per_generator(read_table(table), seed=5)["generators"]["ProGAN"]
    assert first[heading.index("AUROC")] == metrics.format_percent(measured, "auroc")
    assert first[0] == "ProGAN"


def test_the_markdown_table_of_one_metric_has_one_row_per_score_table_and_one_column_per_generator(tmp_path, capsys):
    tables = [
        write_score_table(tmp_path, "b", make_score_rows(generators=("StyleGAN",))),
        write_score_table(tmp_path, "a", make_score_rows(1.0)),
    ]
    b, a = (table.summary["generators"] for table in report_page.load_score_tables(tables))
    report.main([*tables, "--markdown", "accuracy"])
    assert split_markdown_table_into_cells(capsys.readouterr().out) == [
        ["acc", "StyleGAN", "ProGAN"],
        ["b", metrics.format_percent(b["StyleGAN"], "accuracy"), "-"],
        ["a", metrics.format_percent(a["StyleGAN"], "accuracy"), metrics.format_percent(a["ProGAN"], "accuracy")],
    ]


# --- study files

HEADER = "table,row,column,scores,generators\n"


def mean_auroc_over_generators_in_percent(table, *generators):
    """Compute the mean AUROC over generators, in percent, from a score table, without tools.study."""
    measured = metrics.compute_metrics_overall_and_per_generator(read_table(table), 0)["generators"]
    values = [measured[name]["auroc"] for name in generators or measured]
    return 100 * sum(values) / len(values)


@pytest.fixture
def path_of_study_csv_file(tmp_path):
    """Return the path of a study file with two results tables, "main" and "other"."""
    for name, shift in (("one", 0.5), ("two", 1.0), ("control", 0.0)):
        write_score_table(tmp_path / "scores", name, make_score_rows(shift))
    lines = [
        "main,residual | pixels,seen,scores/one.csv,ProGAN",
        "main,residual | pixels,seen,scores/two.csv,ProGAN",
        "main,residual | pixels,both,scores/one.csv,",
        "main,control,seen,scores/control.csv,ProGAN",
        "other,a,b,scores/one.csv,StyleGAN;ProGAN",
    ]
    path = tmp_path / "tables.csv"
    path.write_text(HEADER + "\n".join(lines) + "\n")
    return path


def test_the_table_of_a_study_shows_means_over_seeds(path_of_study_csv_file, capsys):
    one, two, control = (
        str(path_of_study_csv_file.parent / "scores" / f"{name}.csv") for name in ("one", "two", "control")
    )
    seen = (
        mean_auroc_over_generators_in_percent(one, "ProGAN") + mean_auroc_over_generators_in_percent(two, "ProGAN")
    ) / 2
    report.main(["--study", str(path_of_study_csv_file), "--table", "main", "--markdown", "auroc"])
    assert capsys.readouterr().out.splitlines() == [
        "| AUROC | seen | both |",
        "| --- | --: | --: |",
        f"| residual \\| pixels | {seen:.1f} | {mean_auroc_over_generators_in_percent(one):.1f} |",
        f"| control | {mean_auroc_over_generators_in_percent(control, 'ProGAN'):.1f} | - |",
    ]


def test_the_intervals_of_a_study_are_ranges_over_seeds_or_bootstrap_intervals(path_of_study_csv_file, capsys):
    one, two, control = (
        str(path_of_study_csv_file.parent / "scores" / f"{name}.csv") for name in ("one", "two", "control")
    )
    values = [
        mean_auroc_over_generators_in_percent(one, "ProGAN"),
        mean_auroc_over_generators_in_percent(two, "ProGAN"),
    ]
    report.main(["--study", str(path_of_study_csv_file), "--table", "main", "--markdown", "auroc", "--intervals"])
    _, first, second = split_markdown_table_into_cells(capsys.readouterr().out.replace("\\|", ""))
    assert first[1] == f"{sum(values) / 2:.1f} ({min(values):.1f} to {max(values):.1f})"
    assert first[2] == f"{mean_auroc_over_generators_in_percent(one):.1f}"
    assert second[1] == metrics.format_percent(
        metrics.compute_metrics_overall_and_per_generator(read_table(control))["generators"]["ProGAN"], "auroc"
    )


def test_a_cell_of_a_study_is_empty_if_one_of_its_seeds_has_no_real_images(path_of_study_csv_file, capsys):
    folder = path_of_study_csv_file.parent / "scores"
    write_score_table(folder, "fakes", [row for row in make_score_rows() if row.label == "fake"])
    lines = ["main,a,b,scores/fakes.csv,ProGAN", "main,a,b,scores/one.csv,ProGAN"]
    path_of_study_csv_file.write_text(HEADER + "\n".join(lines) + "\n")
    report.main(["--study", str(path_of_study_csv_file), "--table", "main", "--markdown", "auroc"])
    _, row = split_markdown_table_into_cells(capsys.readouterr().out)
    assert row == ["a", "-"]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("row,table,column,scores,generators\n", "expected the header"),
        (HEADER + "main,a,b\n", "line 2"),
        (HEADER + "main,,b,scores/one.csv,\n", "line 2"),
        (HEADER + "other,a,b,scores/one.csv,\n", "no table 'main': expected one of other"),
        (HEADER + "main,a,b,scores/one.csv,BigGAN\n", "no generator 'BigGAN'"),
        (HEADER + "main,a,b,scores/none.csv,\n", "none.csv"),
    ],
)
def test_an_invalid_csv_file_of_a_study_is_refused_with_the_reason(path_of_study_csv_file, content, text):
    path_of_study_csv_file.write_text(content)
    with expect_user_error(text):
        report.main(["--study", str(path_of_study_csv_file), "--table", "main", "--markdown", "auroc"])


# --- documents


def test_tools_report_with_refresh_updates_the_tables_of_a_document(path_of_study_csv_file, monkeypatch, capsys):
    monkeypatch.chdir(path_of_study_csv_file.parent)
    command = "python -m tools.report --study tables.csv --table main --markdown auroc"
    document = "# Head\n\n<!-- made by: {} -->{}\nText below the table stays.\n"
    path = path_of_study_csv_file.parent / "d.md"
    path.write_text(document.format(command, "\n| old |\n| --- |"))
    (path_of_study_csv_file.parent / "link.md").symlink_to("d.md")
    with expect_user_error("link.md has tables that are not up to date"):
        report.main(["--refresh", "link.md", "--check"])
    assert "| old |" in path.read_text()
    report.main(command.split()[3:])
    expected = document.format(command, "\n" + capsys.readouterr().out.rstrip())
    for check in ([], ["--check"]):
        assert report.main(["--refresh", "link.md", *check]) == 0
        assert path.read_text() == expected
    assert (path_of_study_csv_file.parent / "link.md").is_symlink()


@pytest.mark.parametrize(
    "command",
    [
        "python -m tools.report scores/one.csv --out o",
        "python -m tools.report none.csv --markdown",
        "python -m tools.report scores/one.csv --markdown no_metric",
        "python -m tools.report 'scores/one.csv",
        "python -m tools.audit scores/one.csv --markdown",
    ],
)
def test_tools_report_with_refresh_refuses_a_document_whose_command_makes_no_table(
    path_of_study_csv_file, monkeypatch, command
):
    monkeypatch.chdir(path_of_study_csv_file.parent)
    document = path_of_study_csv_file.parent / "d.md"
    document.write_text(f"<!-- made by: {command} -->\n| old |\n")
    with expect_user_error():
        report.main(["--refresh", "d.md"])
    assert document.read_text() == f"<!-- made by: {command} -->\n| old |\n"
    assert not (path_of_study_csv_file.parent / "o").exists()


@pytest.mark.parametrize(
    "arguments",
    ["", "s.csv", "--markdown auroc", "s.csv --study t.csv --table a --markdown auroc", "--study t.csv --out o"],
)
def test_tools_report_refuses_incomplete_and_contradictory_command_lines(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        report.main(arguments.split())
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_robustness_curves_are_drawn_separately_for_each_detector(tmp_path):
    files = []
    for detector, shift in (("a", 2.0), ("b", 0.5)):
        for strength in (1.0, 2.0):
            record = {
                "perturbation": {"name": "blur", "strength": strength},
                "detector": {"classifier_fingerprint": detector},
            }
            files.append(write_score_table(tmp_path, f"{detector}{strength:g}", make_score_rows(shift), **record))
    groups = report_page.group_score_tables_by_detector(report_page.load_score_tables(files, resamples=0))
    curves = [report_page.collect_robustness_curves(group)["blur"] for group in groups]
    assert [[strength for strength, _ in points] for points in curves] == [[1.0, 2.0], [1.0, 2.0]]


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ("--out D --intervals", "--study"),
        ("--out D --check", "--refresh"),
        ("--markdown auroc --residuals R", "--out"),
    ],
)
def test_flags_that_need_another_flag_are_refused_without_it(flags, word, capsys):
    with pytest.raises(SystemExit) as stopped:
        report.main(["SCORES.csv", *flags.split()])
    assert stopped.value.code == 2 and f"needs {word}" in capsys.readouterr().err
