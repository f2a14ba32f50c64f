"""The report and its figures: complete, self-contained, and harmless whatever files are called."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from utils import figures, metrics, report
from utils.scores import Row, RowWriter, make_rows, read_table, residual_path, write_rows

EVIL = '"><script>alert(1)</script><img src=x onerror=alert(1)>'
BROKEN = Row(f"{EVIL}.png", "fake", EVIL, error=f"not an image {EVIL}")


def rows(shift=2.0, n=30, generators=("ProGAN", "StyleGAN"), seed=0):
    """Shared reals and the fakes of some generators."""
    rng = np.random.default_rng(seed)
    result = []
    for label, generator, mean in (("real", "", -shift), *(("fake", g, shift) for g in generators)):
        logits = rng.normal(0, 2, size=(n, 2)) + [mean / 2, -mean / 2]
        paths = [f"{generator or 'real'}/{i:03d}.png" for i in range(n)]
        result += make_rows(paths, [label] * n, [generator] * n, logits)
    return result


def write(folder, name, table_rows, **about):
    write_rows(folder / f"{name}.csv", table_rows)
    if about:
        (folder / f"{name}.json").write_text(json.dumps(about))
    return str(folder / f"{name}.csv")


class Page(HTMLParser):
    """The tags, attributes and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *a) for a in attributes]

    def handle_data(self, data):
        self.text.append(data)


def page_of(path):
    return Page(path.read_text(encoding="utf-8"))


def pictures(page):
    """The decoded pictures of a page; fails if one is not embedded."""
    sources = [value for tag, name, value in page.attributes if name == "src"]
    assert all(re.match("data:image/(png|jpeg);base64,", s) for s in sources)
    return [Image.open(io.BytesIO(base64.b64decode(s.split(",", 1)[1]))) for s in sources]


def test_a_page_with_everything(tmp_path):
    about = {"settings": {"stage": 5, "arch": "resnet50"}, "versions": {"torch": "2.15.0"}}
    tables = [write(tmp_path, "clean", [*rows(), BROKEN], **about)]
    for i, quality in enumerate((90, 60, 30)):
        perturbation = {"name": "jpeg", "strength": quality, "protocol": "sweep"}
        tables.append(
            write(tmp_path, f"jpeg{quality}", rows(1.5 - 0.5 * i), **about, perturbation=perturbation)
        )  # fmt: skip
    path = report.write_report(tables, tmp_path / "new" / "out", resamples=50)
    assert path == tmp_path / "new" / "out" / "report.html"
    page = page_of(path)
    text = " ".join(page.text)
    for wanted in (
        "positive class is fake", "ProGAN", "StyleGAN", "mean over generators", "all images", "AUROC",
        "Robustness", "jpeg 60", "untouched", "Most wrong", "Not scored", "resnet50", "2.15.0", "clean.csv",
    ):  # fmt: skip
        assert wanted in text, wanted
    names = {p.name for p in path.parent.iterdir()}
    assert names == {"report.html", "clean_roc.png", "clean_pr.png", "clean_scores.png", "robustness.png"}
    assert len(pictures(page)) == 4


def test_names_are_shown_and_never_run(tmp_path):
    name = f"{EVIL}\x1b[31m\nname"
    table_rows = [*rows(generators=(name,)), BROKEN]
    table = write(tmp_path, "s", table_rows, settings={EVIL: EVIL, "nested": {"list": [EVIL]}}, versions={EVIL: EVIL})
    path = report.write_report([table], tmp_path / "out", resamples=10)
    page = page_of(path)
    assert "script" not in page.tags
    assert not [a for a in page.attributes if a[1].startswith("on")]
    assert EVIL in " ".join(page.text)  # shown as it is
    assert "\x1b" not in path.read_text(encoding="utf-8")


def test_the_page_loads_nothing(tmp_path):
    path = report.write_report([write(tmp_path, "s", rows())], tmp_path / "out", resamples=0)
    page = page_of(path)
    assert not {"script", "link", "iframe", "object", "form", "base"} & set(page.tags)
    assert not [a for a in page.attributes if a[1] in ("href", "srcset", "action")]
    assert "url(" not in report.STYLE and "@import" not in report.STYLE
    assert (
        "meta",
        "content",
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'",
    ) in page.attributes
    pictures(page)


def test_the_same_tables_give_the_same_page(tmp_path):
    table = write(tmp_path, "s", rows())
    first, second = (report.write_report([table], tmp_path / d, resamples=50) for d in "ab")
    for one in first.parent.iterdir():
        assert one.read_bytes() == (second.parent / one.name).read_bytes(), one.name


def test_thumbnails_and_residuals_are_found(tmp_path):
    (tmp_path / "real").mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (900, 600), (200, 10, 10)).save(tmp_path / "real" / f"{name}.png")
    Image.new("L", (64, 64), 100).save(tmp_path / "grey.png")
    residual = residual_path(tmp_path / "residuals", "real/a.png")
    residual.parent.mkdir(parents=True)
    Image.new("RGB", (900, 300), (0, 0, 250)).save(residual)
    (tmp_path / "text.png").write_text("no picture")
    names = ["real/a.png", "real/b.png", "grey.png", "text.png", "missing.png"]
    table_rows = make_rows(names, ["real"] * 5, [""] * 5, [[4, 0], [4, 0], [3, 0], [2, 0], [1, 0]])
    table_rows[1:3] = [table_rows[1]._replace(stability="unstable"), table_rows[2]._replace(stability="stable")]
    with RowWriter(tmp_path / "s.csv", stability=True) as writer:
        writer.write(*table_rows)
    path = report.write_report([tmp_path / "s.csv"], tmp_path / "out", tmp_path / "residuals", 0)
    shown = [p for p in pictures(page_of(path)) if p.format == "JPEG"]
    assert [p.size for p in shown] == [(720, 240), (320, 213), (64, 64)]  # the first residual shows its image, too
    assert abs(shown[0].getpixel((20, 20))[2] - 250) < 10
    text = path.read_text(encoding="utf-8")
    assert text.count("not available") == 2
    assert text.count("(unstable)") == 1 and "1 of 2 verdicts" in text


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"detector": {"calibration": {}}}, "fake from P(fake) = 0.5 on, else real (not calibrated)"),
        (
            {"detector": {"calibration": {"temperature": 2.0, "t_real": 0.25, "t_fake": 0.75}}},
            "fake from P(fake) = 0.75 on, real up to 0.25, unsure between (calibrated, temperature 2)",
        ),
        ({"detector": "another program's"}, "rule not known"),
    ],
)
def test_the_rule_behind_the_verdicts_is_told(tmp_path, about, said):
    path = report.write_report([write(tmp_path, "s", rows(n=3), **about)], tmp_path / "out", resamples=0)
    assert said in path.read_text(encoding="utf-8")


def test_residual_paths_stay_inside_and_apart(tmp_path):
    images = ["a.png", "a.jpg", "b/a.png", "../a.png", "../../a.png", "/b/c/a.png", "b/../x.png", "..\\a.png"]
    paths = [residual_path(tmp_path, image) for image in images]
    assert len(set(paths)) == len(images)
    assert all(p.resolve().is_relative_to(tmp_path) for p in paths)
    assert paths[0] == tmp_path / "a.png.residual.png"
    assert paths[5] == tmp_path / "b" / "c" / "a.png.residual.png"


def test_the_most_wrong_come_first(tmp_path):
    labels = ["real", "fake", "real", "fake", "", "real"]
    logits = [[1, 0], [0, 5], [0, 9], [3, 0], [50, 0], [2, 0]]  # wrong by 1, 5, -9, -3, unlabelled, 2
    table = read_table(write(tmp_path, "s", [*make_rows("abcdef", labels, [""] * 6, logits), BROKEN]))
    assert [table.paths[i] for i in report.most_wrong(table)] == ["b", "f", "a", "d", "c"]
    assert len(report.most_wrong(table, 2)) == 2


def test_robustness_curves_are_sorted_and_keep_protocols_apart(tmp_path):
    made = []
    for i, (name, strength, protocol) in enumerate(
        [
            ("blur", 2, "sweep"),
            ("blur", 0.5, "sweep"),
            ("blur", None, "frank2020"),
            ("jpeg", 50, ""),
            ("x", True, ""),
        ]
    ):
        about = {"perturbation": {"name": name, "strength": strength, "protocol": protocol}}
        path = write(tmp_path, f"t{i}", rows(generators=("g",)), **about)
        made.append(report.load_scores(tmp_path / f"t{i}.csv", path, 10, 0))
    curves = report.robustness_curves(made)
    assert list(curves) == ["blur, sweep"]  # a curve has two points or more
    assert [point[0] for point in curves["blur, sweep"]["g"]] == [0.5, 2]
    assert made[4].perturbation.strength is None


@pytest.mark.parametrize(
    "table_rows",
    [
        [BROKEN],
        make_rows(["a"], [""], [""], [[1, 2]]),
        make_rows(["a", "b"], ["fake", "fake"], ["g", "h"], [[1, 2], [1, 2]]),
        make_rows(["a", "b"], ["real", "fake"], ["", ""], [[1, 1], [1, 1]]),
        rows(generators=[f"generator {i} $x_{{" for i in range(12)], n=5),
    ],
    ids=["errors", "unlabelled", "one class", "one tied pair", "many generators"],
)
def test_odd_tables_make_a_page_and_a_figure(tmp_path, table_rows, recwarn):
    table = write(tmp_path, "s", table_rows)
    report.write_report([table], tmp_path / "out", resamples=20)
    figures.roc_and_histogram(read_table(table), tmp_path / "deep" / "s.png")
    with Image.open(tmp_path / "deep" / "s.png") as image:
        assert image.size[0] > 1000
    assert not [str(w.message) for w in recwarn]


def test_tables_of_the_same_name_are_told_apart(tmp_path):
    assert report.unique_names(["x/a.csv", "y/a.csv"]) == ["x/a", "y/a"]
    assert report.unique_names(["x/a.csv", "x/b.csv"]) == ["a", "b"]
    with pytest.raises(report.ReportError, match="twice"):
        report.unique_names(["a.csv", "./a.csv"])


def test_mistakes_are_one_line_and_status_2(tmp_path, capsys):
    good = write(tmp_path, "s", rows())
    (tmp_path / "file").write_text("")
    broken = write(tmp_path, "broken", rows())
    (tmp_path / "broken.json").write_text("{")
    for arguments, said in (
        ([str(tmp_path / "none.csv"), "--out", str(tmp_path / "o")], "cannot read the score table"),
        ([good, "--out", str(tmp_path / "file")], "cannot write to"),
        ([good, "--out", str(tmp_path / "o"), "--residuals", str(tmp_path / "none")], "no such folder"),
        ([broken, "--out", str(tmp_path / "o")], "broken.json"),
        ([good, good, "--out", str(tmp_path / "o")], "twice"),
    ):
        assert report.main(arguments) == 2
        error = capsys.readouterr().err
        assert said in error and error.startswith("error: ") and len(error.splitlines()) == 1
    assert report.main([good, "--out", str(tmp_path / "o")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == f"report: {tmp_path / 'o' / 'report.html'}"
    assert [line.split()[:4] for line in said[2:-1]] == [["s", "ProGAN", "30", "30"], ["s", "StyleGAN", "30", "30"]]


def test_the_intervals_are_those_that_test_py_printed(tmp_path):
    path = write(tmp_path, "s", rows(), settings={"seed": 123})
    (scores,) = report.load_tables([path], resamples=50, seed=0)
    assert scores.summary == metrics.summarize(read_table(path), 50, seed=123)
    assert scores.summary != metrics.summarize(read_table(path), 50, seed=0)
