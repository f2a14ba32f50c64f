"""The leak audit finds each leak in a set made to have it, and nothing in a clean one."""

import io
import shutil

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from data import leaks as A
from data.lists import Item, folder_items
from tools import audit as audit_program
from utils.errors import UserError
from utils.labels import FAKE, REAL

N = 20  # images a class


def picture(seed, size=(96, 96)):
    """A soft random picture with some grain; another seed looks quite different."""
    rng = np.random.default_rng(seed)
    soft = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    grain = rng.normal(0, 3, (size[1], size[0], 3))
    return Image.fromarray(np.clip(np.asarray(soft) + grain, 0, 255).astype(np.uint8))


def fill(folder, start, suffix=".png", n=N, size=(96, 96), change=lambda image, i: image, **options):
    """n different pictures in a folder, numbered from `start` on. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(start, start + n):
        change(picture(i, size), i).save(folder / f"{i:04}{suffix}", **options)
    return folder


@pytest.fixture
def roots(tmp_path):
    """Two folders yet to be made."""
    return tmp_path / "real", tmp_path / "fake"


def audited(real, fake, **options):
    return A.audit(folder_items([str(real)], [str(fake)]), **options)


def run(roots, *arguments):
    return audit_program.main([str(a) for a in ("--data-root-pos", roots[0], "--data-root-neg", roots[1], *arguments)])


def was_jpeg(image, i):
    """A piece of a JPEG."""
    image.save(file := io.BytesIO(), "JPEG", quality=50)
    return Image.open(file).crop((3, 3, 200, 200))


EXIF, PROMPT = Image.Exif(), PngInfo()
EXIF[0x0131] = "a camera"
PROMPT.add_text("parameters", "a cat, steps: 20")
LEAKS = {  # options of `fill` for the reals and the fakes
    "codec": ({"suffix": ".jpg"}, {}),
    "JPEG quality": ({"suffix": ".jpg", "quality": 95}, {"suffix": ".jpg", "quality": 75}),
    "JPEG chroma subsampling": ({"suffix": ".jpg", "subsampling": "4:4:4"}, {"suffix": ".jpg"}),
    "size": ({}, {"size": (128, 96)}),
    "shape": (
        {"change": lambda image, i: image.resize((70 + i, 90 + 2 * i))},
        {"change": lambda image, i: image.resize((i - 30, i - 30))},
    ),
    "colour mode": ({"change": lambda image, i: image.convert("L")}, {}),
    "metadata": ({"exif": EXIF}, {"pnginfo": PROMPT}),
    "JPEG traces in lossless files": ({"size": (256, 256), "change": was_jpeg}, {"size": (197, 197)}),
}


@pytest.mark.parametrize("attribute", LEAKS)
def test_each_leak_is_found_and_the_only_one(roots, attribute, capsys):
    for root, start, options in zip(roots, (0, 100), LEAKS[attribute], strict=True):
        fill(root, start, **options)
    result = audited(*roots)
    (finding,) = result["findings"]
    assert finding["check"] == attribute and finding["shortcut"] and finding["way out"]
    assert finding["severity"] == ("warning" if attribute == "metadata" else "leak")
    assert finding["balanced_accuracy"] > 0.9
    in_header = attribute != "JPEG traces in lossless files"
    assert bool(audited(*roots, quick=True)["findings"]) == in_header
    assert run(roots) == (attribute != "metadata")
    assert finding["message"] in capsys.readouterr().out


def test_a_clean_set_has_no_findings(roots):
    """Nor has one of up-sampled fakes, though they, too, show a grid."""
    fill(roots[0], 0)
    fill(roots[1], 100, size=(48, 48), change=lambda image, i: image.resize((96, 96), Image.Resampling.NEAREST))
    result = audited(*roots)
    assert result["findings"] == [] and result["checked"] == 2 * N
    assert run(roots) == 0


def test_jpeg_quality_as_stored(tmp_path):
    for quality in (20, 50, 75, 90, 99):
        Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", quality=quality)
        with Image.open(tmp_path / "a.jpg") as image:
            assert A.attributes_of(image)["JPEG quality"] == f"quality {quality}"


@pytest.mark.parametrize("real, fake, severity", [(17, 3, "leak"), (15, 5, "warning"), (10, 10, None)])
def test_partial_differences_are_graded(roots, real, fake, severity):
    for root, count, start in zip(roots, (real, fake), (0, 100), strict=True):
        fill(root, start, ".jpg", n=count, quality=90), fill(root, start + 50, n=N - count)
    findings = audited(*roots)["findings"]
    assert [(f["check"], f["severity"]) for f in findings] == [("codec", severity)] * bool(severity)
    for finding in findings:
        assert finding["balanced_accuracy"] == pytest.approx((real + N - fake) / (2 * N), abs=1e-4)


def separated(real, fake):
    """What one attribute with these values comes to."""
    pairs = [(REAL, value) for value in real] + [(FAKE, value) for value in fake]
    files = [A.File(Item("", label, ""), ("train", ""), attributes={"size": str(value)}) for label, value in pairs]
    return A.separation(files, "size")


def test_chance_is_known():
    pattern = separated("a" * 30, "b" * 30)
    assert pattern["balanced_accuracy"] == 1 and pattern["chance"] < 0.75 and pattern["severity"] == "leak"
    assert separated("aaa", "bbb")["severity"] == "leak"  # all of one class so: enough
    assert separated("a", "b")["severity"] is None  # one file each is no pattern
    unique = separated(range(50), range(50, 100))
    assert unique["balanced_accuracy"] == unique["chance"] == 1 and unique["severity"] is None  # says nothing
    rng = np.random.default_rng(2)
    for n, kinds in ((30, 2), (30, 200), (300, 5), (300, 1000)):
        alarms = [separated(*rng.integers(0, kinds, (2, n)))["severity"] for _ in range(40)]
        assert "leak" not in alarms and alarms.count("warning") <= 1


def test_a_leak_of_one_generator_hidden_by_the_others(tmp_path, capsys):
    for generator, suffix, n in (("a", ".png", N), ("b", ".png", N), ("c", ".jpg", 8)):
        start = ord(generator) * 1000
        fill(tmp_path / generator / "0_real", start, n=n)
        fill(tmp_path / generator / "1_fake", start + 500, suffix, n=n)
    assert audit_program.main(["--data-root", str(tmp_path)]) == 1
    text = capsys.readouterr().out
    assert "LEAK: codec (c)" in text and "(a)" not in text


def test_exact_duplicates(roots, tmp_path):
    fill(roots[0], 0), fill(roots[1], 100)
    val = fill(tmp_path / "val", 200, n=4)
    shutil.copy(roots[0] / "0003.png", val / "another name.png")
    shutil.copy(roots[0] / "0005.png", roots[1] / "real.png")
    shutil.copy(roots[1] / "0107.png", roots[1] / "again.png")
    train, validation = folder_items([str(roots[0])], [str(roots[1])]), folder_items([str(val)], [])
    result = A.audit(train, validation)
    names = {f["check"]: ([p.rsplit("/", 1)[1] for p in f["examples"]], f["count"]) for f in result["findings"]}
    assert names == {
        "exact duplicates across train and validation": (["0003.png", "another name.png"], 1),
        "exact duplicates across classes": (["0005.png", "real.png"], 1),
        "exact duplicates within a class": (["0107.png", "again.png"], 1),
    }
    assert [f["severity"] for f in result["findings"]] == ["leak", "leak", "warning"]
    assert run(roots, "--val-root-pos", val) == 1


def test_files_of_one_length_that_end_alike_are_no_duplicates(roots):
    def ends_alike(image, i):
        image.paste(0, (0, 0, 96, 60))  # BMP files begin with the last row
        return image

    fill(roots[0], 0, ".bmp", change=ends_alike), fill(roots[1], 100, ".bmp", change=ends_alike)
    assert audited(*roots)["findings"] == []


def test_a_training_begins_with_a_few_lines(roots, tmp_path, caplog):
    """With classes, or without any, as the re-synthesizer is trained; at most so many headers of each are read."""
    fill(roots[0], 0, ".jpg"), fill(roots[1], 100)
    val = fill(tmp_path / "val", 50, ".jpg", n=8)
    shutil.copy(roots[0] / "0003.jpg", val / "other.jpg")
    train, validation = folder_items([str(roots[0])], [str(roots[1])]), folder_items([str(val)], [])
    for unlabelled, checks in ((False, ["codec", "exact"]), (True, ["exact"])):
        sets = [[item._replace(label=None) if unlabelled else item for item in items] for items in (train, validation)]
        caplog.clear()
        with caplog.at_level("INFO"):
            A.log_quick_audit(*sets)
        assert [record.levelname for record in caplog.records] == ["INFO"] + ["WARNING"] * len(checks)
        assert all(f"LEAK: {check}" in caplog.text for check in checks)
        assert all("\n" not in record.getMessage() for record in caplog.records)
    many = [Item(train[0].path, REAL, "")] * (A.SAMPLE + 50)
    assert A.audit(many, quick=True)["checked"] == A.SAMPLE


def test_files_that_cannot_be_read(roots):
    fill(roots[0], 0), fill(roots[1], 100)
    (roots[0] / "0000.png").write_bytes(b"not an image")
    whole = (roots[1] / "0100.png").read_bytes()
    (roots[1] / "0100.png").write_bytes(whole[: len(whole) // 2])
    (finding,) = audited(*roots)["findings"]
    assert finding["severity"] == "warning"
    assert [path.rsplit("/", 1)[1] for path in finding["examples"]] == ["0000.png", "0100.png"]


def test_mistakes(roots):
    fill(roots[0], 0, n=1)
    for arguments in ([], ["--data-root-pos", str(roots[0])], ["--csv", "a", "--data-root", "b"]):
        with pytest.raises(UserError):
            audit_program.main(arguments)
