"""Tests of the output and the exit status of tools.audit, which searches image sets for leaks."""

import shutil

import pytest
from files import expect_user_error
from PIL import Image

from tools import audit


@pytest.fixture
def image_folders(tmp_path):
    """Return a folder with six PNG images in real/ and six PNG images in fake/."""
    for number, kind in enumerate(("real", "fake")):
        (tmp_path / kind).mkdir()
        for i in range(6):
            Image.new("RGB", (16, 16), (20 * i, 100 * number, 0)).save(tmp_path / kind / f"{i}.png")
    return tmp_path


def make_arguments_of_tools_audit(folders):
    """Return the arguments of tools.audit that name the folder of real images and the folder of fake images."""
    return ["--data-root-pos", str(folders / "real"), "--data-root-neg", str(folders / "fake")]


def test_audit_exits_with_status_0_if_it_finds_no_leak(image_folders, capsys):
    assert audit.main(make_arguments_of_tools_audit(image_folders)) == 0
    assert "leak audit: nothing found" in capsys.readouterr().out


def test_audit_exits_with_status_1_and_says_how_to_remove_a_leak_if_it_finds_one(image_folders, capsys):
    for i in range(6):
        Image.open(image_folders / f"real/{i}.png").save(image_folders / f"real/{i}.jpg")
        (image_folders / f"real/{i}.png").unlink()
    assert audit.main(make_arguments_of_tools_audit(image_folders)) == 1
    output = capsys.readouterr().out
    assert "LEAK: format (train): JPEG in 100% of the real and 0% of the fake images" in output and "way out:" in output


def test_audit_reports_a_validation_image_that_is_also_a_training_image_as_a_leak(image_folders, capsys):
    (image_folders / "validation").mkdir()
    Image.open(image_folders / "real/3.png").save(image_folders / "validation/copy.png")
    assert (
        audit.main([*make_arguments_of_tools_audit(image_folders), "--val-root-pos", str(image_folders / "validation")])
        == 1
    )
    assert "LEAK: exact duplicates in train and validation" in capsys.readouterr().out


def test_audit_reads_the_training_images_of_a_tree_and_the_validation_images_of_a_csv_table(image_folders, capsys):
    tree = image_folders / "tree/gan"
    for part in ("train", "val"):
        for kind, folder in (("real", "0_real"), ("fake", "1_fake")):
            shutil.copytree(image_folders / kind, tree / part / folder)
    arguments = ["--data-root", str(image_folders / "tree")]
    # "val" contains copies of the images in "train", but the audit of the training images leaves out "val"
    assert audit.main(arguments) == 0
    assert "duplicates" not in capsys.readouterr().out
    table = image_folders / "val.csv"
    table.write_text(f"path,label\n{tree}/val/0_real/0.png,real\n{tree}/val/1_fake/0.png,fake\n")
    assert audit.main([*arguments, "--val-csv", str(table)]) == 1
    assert "exact duplicates in train and validation" in capsys.readouterr().out


def test_audit_reports_a_wrong_command_line_in_one_line(image_folders):
    with expect_user_error("no images"):
        audit.main([])
    with expect_user_error("one class"):
        audit.main(make_arguments_of_tools_audit(image_folders)[:2])
    with expect_user_error("more than one way"):
        audit.main(["--csv", "a", "--data-root", "b"])
