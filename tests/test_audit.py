"""Tests of the program tools.audit: the report that it prints, and its exit status."""

import pytest
from files import user_error
from PIL import Image

from tools import audit


@pytest.fixture
def folders(tmp_path):
    """Return a folder with six PNG images in real/ and six in fake/. All twelve images have different colours."""
    for number, kind in enumerate(("real", "fake")):
        (tmp_path / kind).mkdir()
        for i in range(6):
            Image.new("RGB", (16, 16), (20 * i, 100 * number, 0)).save(tmp_path / kind / f"{i}.png")
    return tmp_path


def arguments(folders):
    """Return arguments for tools.audit with the folders of real and of fake images."""
    return ["--data-root-pos", str(folders / "real"), "--data-root-neg", str(folders / "fake")]


def test_audit_exits_with_status_0_if_it_finds_no_leak(folders, capsys):
    assert audit.main(arguments(folders)) == 0
    assert "leak audit: nothing found" in capsys.readouterr().out


def test_audit_exits_with_status_1_and_prints_a_way_out_if_it_finds_a_leak(folders, capsys):
    for i in range(6):
        Image.open(folders / f"real/{i}.png").save(folders / f"real/{i}.jpg")
        (folders / f"real/{i}.png").unlink()
    assert audit.main(arguments(folders)) == 1
    output = capsys.readouterr().out
    assert "LEAK: format (train): JPEG in 100% of the real and 0% of the fake images" in output and "way out:" in output


def test_audit_reports_a_validation_image_that_is_also_a_training_image_as_a_leak(folders, capsys):
    (folders / "validation").mkdir()
    Image.open(folders / "real/3.png").save(folders / "validation/copy.png")
    assert audit.main([*arguments(folders), "--val-root-pos", str(folders / "validation")]) == 1
    assert "LEAK: exact duplicates in train and validation" in capsys.readouterr().out


def test_audit_reports_a_wrong_command_line_in_one_line(folders):
    with user_error("no images"):
        audit.main([])
    with user_error("one class"):
        audit.main(arguments(folders)[:2])
    with user_error("more than one way"):
        audit.main(["--csv", "a", "--data-root", "b"])
