"""Tests of data.folders, which lists the images in a folder and logs one line about all other files."""

import logging
import os

import pytest
from files import expect_user_error, save_image, write_empty_files

from data.folders import HAS_AVIF, find_images
from data.lists import Item, list_images_without_labels

SCORE_TABLE = "path,label,generator,logit_fake,logit_real,prob_fake,prediction,error\n"


@pytest.fixture(autouse=True)
def capture_info_log_messages(caplog):
    """Let the fixture caplog record log messages of level INFO and above."""
    caplog.set_level(logging.INFO)


def paths_relative_to_folder(root, paths):
    """Convert paths to paths relative to the folder `root`."""
    return [os.path.relpath(path, root) for path in paths]


def test_images_are_found_by_suffix_and_sorted_by_path(tmp_path):
    names = [
        "B.PNG", "a-b/1.png", "a.jpg", "a/z.TiF", "b.webp", "c.jfif", "d.gif", "dir.png/x.JPEG", "é.bmp", "z.tiff"
    ]  # fmt: skip
    root = write_empty_files(tmp_path / "r", *names)
    for spelling in (root, root + "/"):
        assert find_images(spelling) == [f"{root}/{name}" for name in sorted(names)]


def test_avif_images_are_found_if_pillow_can_read_avif(tmp_path):
    root = write_empty_files(tmp_path / "r", "a.avif", "b.png")
    assert paths_relative_to_folder(root, find_images(root)) == (["a.avif", "b.png"] if HAS_AVIF else ["b.png"])


def test_one_log_line_says_how_many_files_are_left_out_and_why(tmp_path, caplog):
    others = ["1.HEIC", "2.heic", "no_suffix", ".hidden.png", "._a.jpg", "__MACOSX/a.png", ".git/a.png"]
    root = write_empty_files(tmp_path / "r", "a.png", "sub/b.png", "sub/notes.txt", *others)
    assert paths_relative_to_folder(root, find_images(root)) == ["a.png", "sub/b.png"]
    (message,) = caplog.messages
    words = ["found 2 images", "left out 8 other", "2 .heic", "1 .txt", "1 without suffix", "4 hidden"]
    assert all(word in message for word in words)


def test_nothing_is_logged_if_every_file_of_a_folder_is_an_image(tmp_path, caplog):
    find_images(write_empty_files(tmp_path / "r", "a.png"))
    assert not caplog.messages


# --- links --------------------------------------------------------------------------------------------------


def test_two_links_to_one_folder_are_followed_once(tmp_path, caplog):
    root = write_empty_files(tmp_path / "r", "a/1.png")
    elsewhere = write_empty_files(tmp_path / "elsewhere", "2.png")
    (tmp_path / "r/b").symlink_to(elsewhere)
    (tmp_path / "r/c").symlink_to(elsewhere)
    (tmp_path / "r/broken.png").symlink_to(tmp_path / "nothing")
    assert paths_relative_to_folder(root, find_images(root)) == ["a/1.png", "b/2.png", "broken.png"]
    assert "1 repeated folder" in caplog.text


@pytest.mark.parametrize("place, target", [("up", ".."), ("a/loop", ".."), ("a/b/up", "../../.."), ("self", ".")])
def test_a_link_to_a_folder_that_contains_it_is_not_followed(tmp_path, caplog, place, target):
    root = write_empty_files(tmp_path / "real", "1.png", "a/b/2.png")
    write_empty_files(tmp_path / "fake", "3.png")
    (tmp_path / "real" / place).symlink_to(target)
    (tmp_path / "link").symlink_to(root)
    assert paths_relative_to_folder(root, find_images(root)) == ["1.png", "a/b/2.png"]
    assert paths_relative_to_folder(tmp_path / "link", find_images(str(tmp_path / "link"))) == ["1.png", "a/b/2.png"]
    assert all("1 link to a folder that contains it" in message for message in caplog.messages)


def test_a_link_to_a_parent_folder_is_not_followed_inside_a_linked_folder(tmp_path):
    root = write_empty_files(tmp_path / "r", "1.png")
    write_empty_files(tmp_path / "storage", "part/2.png", "other/3.png")
    (tmp_path / "r/part").symlink_to(tmp_path / "storage/part")
    (tmp_path / "storage/part/up").symlink_to("..")
    assert paths_relative_to_folder(root, find_images(root)) == ["1.png", "part/2.png"]


# --- pictures that test.py writes -----------------------------------------------------------------------------


@pytest.fixture
def folder_with_outputs_of_test_py(tmp_path):
    """Return a folder with two images and with outputs of test.py: score table, figure and residual picture."""
    root = write_empty_files(
        tmp_path / "r", "cat.png", "photo.png", "scores.png", "scores.json", "sub/cat.png.residual.png"
    )
    (tmp_path / "r/scores.csv").write_text(SCORE_TABLE)
    # photo.png has the name of photo.csv, but is no figure of test.py, because photo.csv is not a score table
    (tmp_path / "r/photo.csv").write_text("x,y\n1,2\n")
    return root


def test_figures_and_residual_pictures_of_test_py_are_left_out_of_a_folder(folder_with_outputs_of_test_py, caplog):
    assert paths_relative_to_folder(folder_with_outputs_of_test_py, find_images(folder_with_outputs_of_test_py)) == [
        "cat.png",
        "photo.png",
    ]
    for words in ("1 figure of a score table", "1 residual picture"):
        assert words in caplog.text


def test_images_whose_names_resemble_outputs_of_test_py_are_kept(tmp_path):
    names = ["scores.png", "residual.png", "alone.png"]
    root = write_empty_files(tmp_path / "r", *names)
    os.mkfifo(tmp_path / "r/scores.csv")  # find_images must not open a named pipe, because opening a pipe blocks
    assert paths_relative_to_folder(root, find_images(root)) == sorted(names)


def test_figures_and_residual_pictures_of_test_py_are_left_out_of_a_list_of_files(
    folder_with_outputs_of_test_py, caplog
):
    paths = [
        f"{folder_with_outputs_of_test_py}/{name}" for name in ("cat.png", "scores.png", "sub/cat.png.residual.png")
    ]
    assert list_images_without_labels(paths) == [Item(paths[0], None, "")]
    assert "left out 2 pictures" in caplog.text
    with expect_user_error("no images", "1 figure of a score table"):
        list_images_without_labels(paths[1:2])


# --- folders that cannot be used ----------------------------------------------------------------------------


def test_missing_folders_and_folders_without_images_are_refused_in_one_line(tmp_path):
    with expect_user_error("No such file", r"new\nline"):
        find_images(str(tmp_path / "new\nline"))
    with expect_user_error("Not a directory"):
        find_images(save_image(tmp_path / "f.png"))
    (tmp_path / "empty").mkdir()
    with expect_user_error("no images", "no files"):
        find_images(str(tmp_path / "empty"))
    with expect_user_error("no images", ".jpg", "2 .heic", "1 .txt"):
        find_images(write_empty_files(tmp_path / "q", "a.heic", "b.heic", "c.txt"))


def test_a_subfolder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    write_empty_files(tmp_path, "a.png")
    monkeypatch.chdir(tmp_path)
    for _ in range(17):  # the path becomes longer than 4096 characters, which is too long for system calls
        os.mkdir("d" * 250)
        os.chdir("d" * 250)
    with expect_user_error("cannot be read", "too long"):
        find_images(str(tmp_path))
