"""The report and its figures: complete, self-contained, and harmless whatever files are called."""

import base64
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from files import mistake
from PIL import Image
from processes import ROOT

from evaluation import figures, metrics
from evaluation.score_table import Row, make_rows, read_table, residual_path, write_table
from tools import report
from utils.labels import FAKE, REAL

EVIL = '"><script>alert(1)</script><img src=x onerror=alert(1)>'
BROKEN = Row(f"{EVIL}.png", "fake", EVIL, error=f"not an image {EVIL}")


def rows(shift=2.0, n=30, generators=("ProGAN", "StyleGAN")):
    """Shared reals and the fakes of some generators."""
    rng = np.random.default_rng(0)
    result = []
    for label, generator, mean in ((REAL, "", -shift), *((FAKE, g, shift) for g in generators)):
        logits = rng.normal(0, 2, size=(n, 2)) + [mean / 2, -mean / 2]
        result += make_rows([(f"{generator or 'real'}/{i:03d}.png", label, generator) for i in range(n)], logits)
    return result


def write(folder, name, table_rows, **record):
    write_table(folder / f"{name}.csv", table_rows, stability=True)
    if record:
        (folder / f"{name}.json").write_text(json.dumps(record))
    return str(folder / f"{name}.csv")


def page_of(tables, out, residuals=None, resamples=0):
    return Page(report.write_page(report.load_tables(tables, resamples), out, residuals))


class Page(HTMLParser):
    """The tags, attributes, text and pictures of a page. All pictures have to be embedded."""

    def __init__(self, path):
        super().__init__()
        self.path, self.source = path, path.read_text(encoding="utf-8")
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(self.source)
        sources = [value.split(",", 1) for tag, name, value in self.attributes if name == "src"]
        assert {head for head, _ in sources} <= {"data:image/png;base64", "data:image/jpeg;base64"}
        self.pictures = [Image.open(io.BytesIO(base64.b64decode(content))) for _, content in sources]

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *a) for a in attributes]

    def handle_data(self, data):
        self.text += data


def test_a_page_with_everything(tmp_path):
    record = {
        "settings": {"stage": 5, "arch": "resnet50", "seed": 3},
        "detector": {"calibration": {"temperature": 2.0, "t_real": 0.25, "t_fake": 0.75}},
        "versions": {"torch": "2.15.0"},
    }
    tables = [write(tmp_path, "clean", [*rows(), BROKEN], **record)]
    for name, strength in (("jpeg", 30), ("jpeg", 90), ("combined", None), ("blur", 3), ("jpeg", 60)):
        perturbation = {"name": name, "strength": strength, "protocol": "sweep"}
        tables.append(write(tmp_path, f"{name}{strength}", rows(1.0), **record, perturbation=perturbation))
    curves = report.robustness_curves(sorted(report.load_tables(tables[1:], 0), key=report.by_difficulty))
    assert {n: [strength for strength, _ in points] for n, points in curves.items()} == {"jpeg": [90, 60, 30]}
    page = page_of(tables, tmp_path / "new" / "out", resamples=50)
    assert page.path == tmp_path / "new" / "out" / "report.html"
    for wanted in (
        "positive class is fake", "ProGAN", "StyleGAN", "mean over generators", "all images", "AUROC", "Robustness",
        "Most wrong", "Not scored", "resnet50", "2.15.0", "clean.csv", "P(fake) = 0.75",
    ):  # fmt: skip
        assert wanted in page.text, wanted
    hardest_last = ("blur sigma 3", "combined", "jpeg quality 90", "jpeg quality 60", "jpeg quality 30")
    at = [page.text.index(label) for label in hardest_last]
    assert at == sorted(at)
    assert {p.name for p in page.path.parent.iterdir()} == {"report.html", "robustness.png", "clean_scores.png"}
    assert len(page.pictures) == 2
    assert page_of(tables, tmp_path / "again", resamples=50).source == page.source  # nothing in it depends on the day


def test_names_are_shown_and_never_run_and_nothing_is_loaded(tmp_path):
    table_rows = [*rows(generators=(f"{EVIL}\x1b[31m\nname",)), BROKEN]
    record = {"settings": {EVIL: EVIL, "nested": {"list": [EVIL]}}, "versions": {EVIL: EVIL}}
    record["perturbation"] = {"name": EVIL, "strength": 1}
    page = page_of([write(tmp_path, "s", table_rows, **record)], tmp_path / "out")
    assert not {"script", "link", "iframe", "object", "form", "base"} & set(page.tags)
    assert not [a for a in page.attributes if a[1].startswith("on") or a[1] in ("href", "srcset", "action")]
    assert EVIL in page.text  # shown as it is
    assert "\x1b" not in page.source and "url(" not in page.source and "@import" not in page.source
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert ("meta", "content", policy) in page.attributes


def test_thumbnails_and_residuals_are_found(tmp_path):
    (tmp_path / "real").mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (900, 600), (200, 10, 10)).save(tmp_path / "real" / f"{name}.png")
    Image.new("L", (64, 64), 100).save(tmp_path / "grey.png")
    residual = residual_path(tmp_path / "residuals", "real/a.png")
    residual.parent.mkdir(parents=True)
    Image.new("RGB", (900, 300), (0, 0, 250)).save(residual)
    (tmp_path / "text.png").write_text("no picture")
    items = [(name, REAL, "") for name in ("real/a.png", "real/b.png", "grey.png", "text.png", "missing.png")]
    table_rows = make_rows(items, [[4, 0], [4, 0], [3, 0], [2, 0], [1, 0]])
    table_rows[1:3] = [table_rows[1]._replace(stability="unstable"), table_rows[2]._replace(stability="stable")]
    page = page_of([write(tmp_path, "s", table_rows)], tmp_path / "out", tmp_path / "residuals")
    printable = [p for p in page.pictures if p.format == "JPEG"]
    assert [p.size for p in printable] == [(720, 240), (320, 213), (64, 64)]  # the first residual shows its image, too
    assert abs(printable[0].getpixel((20, 20))[2] - 250) < 10
    assert page.text.count("not available") == 2
    assert page.text.count("(unstable)") == 1 and "1 of 2 images" in page.text


def test_residual_paths_stay_inside_and_apart(tmp_path):
    images = ["a.png", "a.jpg", "b/a.png", "../a.png", "../../a.png", "/b/c/a.png", "b/../x.png", "..\\a.png"]
    paths = [residual_path(tmp_path, image) for image in images]
    assert len(set(paths)) == len(images)
    assert all(p.resolve().is_relative_to(tmp_path) for p in paths)
    assert paths[0] == tmp_path / "a.png.residual.png"
    assert paths[5] == tmp_path / "b" / "c" / "a.png.residual.png"


def test_the_most_wrong_come_first(tmp_path):
    items = [("a", REAL, ""), ("b", FAKE, ""), ("c", REAL, ""), ("d", FAKE, ""), ("e", None, ""), ("f", REAL, "")]
    logits = [[1, 0], [0, 5], [0, 9], [3, 0], [50, 0], [2, 0]]  # wrong by 1, 5, -9, -3, unlabelled, 2
    table = read_table(write(tmp_path, "s", [*make_rows(items, logits), BROKEN]))
    assert [table.paths[i] for i in report.most_wrong(table)] == ["b", "f", "a", "d", "c"]
    assert len(report.most_wrong(table, 2)) == 2


ODD = {
    "errors": [BROKEN],
    "unlabelled": make_rows([("a", None, "")], [[1, 2]]),
    "one class": make_rows([("a", FAKE, "g"), ("b", FAKE, "h")], [[1, 2], [1, 2]]),
    "one tied pair": make_rows([("a", REAL, ""), ("b", FAKE, "")], [[1, 1], [1, 1]]),
    "many generators": rows(generators=[f"generator {i} $x_{{" for i in range(12)], n=5),
}


@pytest.mark.parametrize("table_rows", ODD.values(), ids=ODD)
def test_odd_tables_make_a_page_and_a_figure(tmp_path, table_rows, recwarn):
    table = write(tmp_path, "s", table_rows, detector="another program's", settings=[1])
    assert page_of([table], tmp_path / "out").tags[:2] == ["html", "head"]
    figures.roc_and_histogram(read_table(table), tmp_path / "deep" / "s.png")
    figures.residual_picture(np.zeros((3, 40, 60)), np.ones((3, 40, 60)), np.zeros((10, 15)), tmp_path / "r.png")
    for path in (tmp_path / "deep" / "s.png", tmp_path / "r.png"):
        with Image.open(path) as image:
            assert image.size[0] > 2 * image.size[1]
    assert not [str(w.message) for w in recwarn]


def test_mistakes_are_said_before_anything_is_written(tmp_path):
    good, broken = (write(tmp_path, name, rows()) for name in ("s", "broken"))
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "file").write_text("")
    out = ["--out", f"{tmp_path}/o"]
    for said, *arguments in (
        ("none.csv", f"{tmp_path}/none.csv", *out),
        ("file", good, "--out", f"{tmp_path}/file"),
        ("--residuals", good, *out, "--residuals", f"{tmp_path}/none"),
        ("broken.json", broken, *out),
        ("twice", good, good, *out),
    ):
        with mistake(said):
            report.main(arguments)
    assert not (tmp_path / "o" / "report.html").exists()


def cells_of(markdown):
    """The rows of a markdown table, the heading first."""
    heading, line, *rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in markdown.splitlines()]
    assert len(line) == len(heading) and set("".join(line)) == set("-:")
    return [heading, *rows]


def test_markdown_tells_the_same_as_the_screen(tmp_path, capsys):
    (tmp_path / "other").mkdir()
    tables = [write(folder, "s", rows(), settings={"seed": 5}) for folder in (tmp_path, tmp_path / "other")]
    done = subprocess.run([sys.executable, "-m", "tools.report", *tables, "--markdown"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cells = cells_of(done.stdout)
    assert report.main([*tables, "--out", str(tmp_path / "o")]) == 0
    screen = [re.split(r"\s{2,}", line) for line in capsys.readouterr().out.splitlines()[1:-1]]
    assert [[c for c in row if c] for row in cells] == screen and len({row[0] for row in cells[1:]}) == 2
    summary = metrics.summarize(read_table(tables[0]), seed=5)  # the intervals that test.py printed
    assert cells[1][5] == metrics.percent(summary["generators"]["ProGAN"], "auroc")


def test_one_metric_is_a_compact_table(tmp_path, capsys):
    tables = [write(tmp_path, "b", rows(generators=("StyleGAN",))), write(tmp_path, "a", rows(1.0))]
    b, a = (t.summary["generators"] for t in report.load_tables(tables))
    only, s, p = (metrics.percent(m, "accuracy") for m in (b["StyleGAN"], a["StyleGAN"], a["ProGAN"]))
    report.main([*tables, "--markdown", "accuracy"])
    assert cells_of(capsys.readouterr().out) == [["acc", "StyleGAN", "ProGAN"], ["b", only, "-"], ["a", s, p]]
    for q in (50, 90):
        perturbation = {"name": "jpeg", "strength": q}
        tables.append(write(tmp_path, f"a_jpeg_quality_{q}", rows(1.0), perturbation=perturbation))
    report.main([*tables, "--markdown", "accuracy"])
    assert cells_of(capsys.readouterr().out) == [
        ["acc of StyleGAN / ProGAN", "b", "a"], ["none", f"{only} / -", f"{s} / {p}"],
        *([f"jpeg quality {q}", "-", f"{s} / {p}"] for q in (90, 50)),
    ]  # fmt: skip


def test_tables_of_documents_are_made_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tables = [write(tmp_path, name, rows()) for name in "ab"]
    document, path = "# Head\n\n<!-- made by: {} -->{}\n\nThe end. <!-- made by: hand -->\n", tmp_path / "d.md"
    command = "python -m tools.report [ab].csv --markdown auroc"
    path.write_text(document.format(command, "\n| old |\n| --- |"))
    with mistake("d.md"):
        report.main(["--refresh", "d.md", "--check"])
    assert "| old |" in path.read_text()
    report.main([*tables, "--markdown", "auroc"])
    made = document.format(command, "\n" + capsys.readouterr().out.rstrip())
    for check in ([], [], ["--check"]):
        assert report.main(["--refresh", "d.md", *check]) == 0 and path.read_text() == made
    for wrong in ("a.csv --out o", "none.csv --markdown", "a.csv --markdown no", "'a.csv"):
        path.write_text(document.format(f"python -m tools.report {wrong}", ""))
        with mistake(wrong):
            report.main(["--refresh", "d.md"])
    path.write_text("<!-- made by: python -m other a.csv --markdown -->")
    with mistake("tools.report"):
        report.main(["--refresh", "d.md"])


def test_tables_of_this_projects_documents_are_what_their_commands_print(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert report.main(["--refresh", "README.md", "docs/results.md", "--check"]) == 0
