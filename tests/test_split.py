"""Tests of tools.split, which divides images into lists of training images and held-out images."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from files import expect_user_error, save_image

from data.lists import list_labelled_images_in_csv, list_labelled_images_in_folders, read_path_list
from tools import split
from utils.labels import REAL

LISTS = ("train.csv", "held_out.csv", "train_real.txt", "held_out_real.txt")


@pytest.fixture
def folder_of_real_and_fake_images(tmp_path):
    """Return a folder with 30 real images, and with 20 fake images of each of two generators."""
    for folder, count in (("real", 30), ("gan", 20), ("diffusion", 20)):
        (tmp_path / folder).mkdir()
        for index in range(count):
            save_image(tmp_path / folder / f"{folder} {index}, a.png")
    return tmp_path


def make_arguments_of_tools_split(images, out, *more):
    """Return a command line for tools.split that names all image folders and an output folder."""
    roots = ["--data-root-pos", images / "real", "--data-root-neg", images / "gan", images / "diffusion"]
    return [str(a) for a in (*roots, "--out", out, *more)]


def read_bytes_of_all_files_in_folder(folder):
    """Return a dict from the name of each file in a folder to the bytes of the file."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_every_image_is_either_in_the_training_list_or_in_the_held_out_list(folder_of_real_and_fake_images, capsys):
    assert (
        split.main(
            make_arguments_of_tools_split(folder_of_real_and_fake_images, folder_of_real_and_fake_images / "lists")
        )
        == 0
    )
    sets = [
        list_labelled_images_in_csv(str(folder_of_real_and_fake_images / "lists" / name))
        for name in ("train.csv", "held_out.csv")
    ]
    expected = list_labelled_images_in_folders(
        [str(folder_of_real_and_fake_images / "real")],
        [str(folder_of_real_and_fake_images / "gan"), str(folder_of_real_and_fake_images / "diffusion")],
    )
    assert sorted(sets[0] + sets[1]) == sorted(expected)
    assert 5 < len(sets[1]) < 25  # by default, 20 % of the 70 images (about 14) are held out
    lines = []
    for items, name in zip(sets, ("train_real.txt", "held_out_real.txt"), strict=True):
        reals = [item.path for item in items if item.label == REAL]
        assert read_path_list(str(folder_of_real_and_fake_images / "lists" / name)) == reals
        lines.append(f"{name.removesuffix('_real.txt')}: {len(reals)} real, {len(items) - len(reals)} fake")
    assert capsys.readouterr().out.splitlines() == lines


def test_adding_images_does_not_move_other_images_between_the_lists(folder_of_real_and_fake_images):
    split.main(make_arguments_of_tools_split(folder_of_real_and_fake_images, folder_of_real_and_fake_images / "lists"))
    before = {
        item.path
        for item in list_labelled_images_in_csv(str(folder_of_real_and_fake_images / "lists" / "held_out.csv"))
    }
    for index in range(30, 60):
        save_image(folder_of_real_and_fake_images / "real" / f"real {index}, a.png")
    split.main(make_arguments_of_tools_split(folder_of_real_and_fake_images, folder_of_real_and_fake_images / "lists"))
    after = {
        item.path
        for item in list_labelled_images_in_csv(str(folder_of_real_and_fake_images / "lists" / "held_out.csv"))
    }
    assert before < after
    assert not before & {
        item.path for item in list_labelled_images_in_csv(str(folder_of_real_and_fake_images / "lists" / "train.csv"))
    }


def test_lists_with_another_held_out_fraction_are_replaced_only_with_overwrite(folder_of_real_and_fake_images):
    out = folder_of_real_and_fake_images / "lists"
    split.main(make_arguments_of_tools_split(folder_of_real_and_fake_images, out, "--hold-out", 0.3))
    before = read_bytes_of_all_files_in_folder(out)
    with expect_user_error("--hold-out 0.3", "--overwrite"):
        split.main(make_arguments_of_tools_split(folder_of_real_and_fake_images, out, "--hold-out", 0.5))
    assert read_bytes_of_all_files_in_folder(out) == before
    assert (
        split.main(make_arguments_of_tools_split(folder_of_real_and_fake_images, out, "--hold-out", 0.5, "--overwrite"))
        == 0
    )
    assert read_bytes_of_all_files_in_folder(out)["held_out.csv"] != before["held_out.csv"]
    assert split.main(make_arguments_of_tools_split(folder_of_real_and_fake_images, out, "--hold-out", 0.5)) == 0


@pytest.mark.parametrize("name", [*LISTS, "split.json"])
def test_a_file_of_the_user_with_the_name_of_a_list_is_refused_and_unchanged(folder_of_real_and_fake_images, name):
    out = folder_of_real_and_fake_images / "lists"
    out.mkdir()
    (out / name).write_bytes(b"my own list\n")
    for more in ((), ("--overwrite",)):
        with expect_user_error(name, "not written by this program"):
            split.main(make_arguments_of_tools_split(folder_of_real_and_fake_images, out, *more))
        assert read_bytes_of_all_files_in_folder(out) == {name: b"my own list\n"}


def test_a_list_that_the_user_has_edited_is_not_replaced(folder_of_real_and_fake_images):
    out = folder_of_real_and_fake_images / "lists"
    split.main(make_arguments_of_tools_split(folder_of_real_and_fake_images, out))
    with (out / "held_out.csv").open("a") as file:
        file.write("more.png,real,\n")
    before = read_bytes_of_all_files_in_folder(out)
    with expect_user_error("held_out.csv"):
        split.main(make_arguments_of_tools_split(folder_of_real_and_fake_images, out, "--overwrite"))
    assert read_bytes_of_all_files_in_folder(out) == before


def test_tools_split_can_be_called_again_after_an_interrupted_call(folder_of_real_and_fake_images, monkeypatch):
    out = folder_of_real_and_fake_images / "lists"
    split.main(make_arguments_of_tools_split(folder_of_real_and_fake_images, out))
    real_atomic, calls = split.open_for_atomic_write, []

    def open_or_interrupt_third_call(path):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(path)
        return real_atomic(path)

    monkeypatch.setattr(split, "open_for_atomic_write", open_or_interrupt_third_call)
    with pytest.raises(KeyboardInterrupt):
        split.main(make_arguments_of_tools_split(folder_of_real_and_fake_images, out, "--hold-out", 0.5, "--overwrite"))
    monkeypatch.undo()
    assert split.main(make_arguments_of_tools_split(folder_of_real_and_fake_images, out, "--hold-out", 0.5)) == 0
    assert 25 < len(list_labelled_images_in_csv(str(out / "held_out.csv"))) < 45


def test_replacing_a_list_that_is_a_symbolic_link_keeps_the_link(folder_of_real_and_fake_images):
    out = folder_of_real_and_fake_images / "lists"
    split.main(make_arguments_of_tools_split(folder_of_real_and_fake_images, out))
    (out / "train.csv").rename(folder_of_real_and_fake_images / "elsewhere.csv")
    (out / "train.csv").symlink_to("../elsewhere.csv")
    split.main(make_arguments_of_tools_split(folder_of_real_and_fake_images, out, "--hold-out", 0.5, "--overwrite"))
    assert (out / "train.csv").is_symlink()
    assert len(list_labelled_images_in_csv(str(folder_of_real_and_fake_images / "elsewhere.csv"))) < 50


def test_lists_with_file_names_that_are_not_utf8_can_be_read(folder_of_real_and_fake_images):
    for index in range(10):
        name = b"\xff\xe9 %d.png" % index
        os.rename(
            folder_of_real_and_fake_images / "real" / f"real {index}, a.png",
            os.path.join(os.fsencode(folder_of_real_and_fake_images / "real"), name),
        )
    split.main(make_arguments_of_tools_split(folder_of_real_and_fake_images, folder_of_real_and_fake_images / "lists"))
    found = []
    for name in ("train_real.txt", "held_out_real.txt"):
        found += read_path_list(str(folder_of_real_and_fake_images / "lists" / name))
    assert sorted(found) == sorted(str(path) for path in (folder_of_real_and_fake_images / "real").iterdir())
    items = []
    for name in ("train.csv", "held_out.csv"):
        items += list_labelled_images_in_csv(str(folder_of_real_and_fake_images / "lists" / name))
    assert len(items) == 70 and all(os.path.exists(item.path) for item in items)


@pytest.mark.parametrize("character", ["\n", "\r"])
def test_a_file_name_with_a_line_break_is_refused_before_a_list_is_written(folder_of_real_and_fake_images, character):
    save_image(folder_of_real_and_fake_images / "real" / f"a{character}b.png")
    with expect_user_error("line break"):
        split.main(
            make_arguments_of_tools_split(folder_of_real_and_fake_images, folder_of_real_and_fake_images / "lists")
        )
    assert not (folder_of_real_and_fake_images / "lists").exists()


def test_tools_split_refuses_a_wrong_fraction_with_exit_status_2(folder_of_real_and_fake_images):
    for more in (["--hold-out", "0"], ["--hold-out", "1.5"], ["--hold-out", "nan"]):
        with pytest.raises(SystemExit) as caught:
            split.main(
                make_arguments_of_tools_split(
                    folder_of_real_and_fake_images, folder_of_real_and_fake_images / "lists", *more
                )
            )
        assert caught.value.code == 2
    command = [
        sys.executable,
        "-m",
        "tools.split",
        *make_arguments_of_tools_split(
            folder_of_real_and_fake_images, folder_of_real_and_fake_images / "lists", "--hold-out", "0.0001"
        ),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 2
    message = "the set held_out (with --hold-out 0.0001) must contain both real and fake images"
    assert message in done.stderr.splitlines()[-1]
    assert not (folder_of_real_and_fake_images / "lists").exists()
