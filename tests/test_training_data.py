"""Tests of the image sets that train_detector.py and train_sr.py use, and of the image sets that they refuse."""

import os
import shutil

import pytest
import torch
from files import expect_user_error, random_rgb_pixels, save_image
from trainings import (
    make_arguments_of_train_detector,
    make_arguments_of_train_sr,
    read_epoch_statistics_of_training,
    run_training,
)

pytestmark = pytest.mark.usefixtures("shrink_resnet18")

FLAGS = "--fixed-sr --epochs 1 --no-cache"


@pytest.fixture(autouse=True)
def capture_info_log_messages(caplog):
    """Let the fixture caplog record log messages of level INFO and above."""
    caplog.set_level("INFO")


def make_training_arguments_without_image_folders(files, out, flags):
    """Return a command line for train_detector.py that lacks the flags --data-root-pos and --data-root-neg."""
    arguments = make_arguments_of_train_detector(files, out, f"{FLAGS} {flags}")
    for flag in ("--data-root-pos", "--data-root-neg"):
        position = arguments.index(flag)
        del arguments[position : position + 2]
    return arguments


def write_csv_table(path, files, labels):
    """Write a CSV table of images with the given labels, "real" or "fake", and return the path of the table."""
    counts = {"real": 0, "fake": 0}
    lines = ["path,label"]
    for label in labels:
        lines.append(f"{files}/{label}/{counts[label]}.png,{label}")
        counts[label] += 1
    path.write_text("\n".join(lines) + "\n")
    return path


# --- image sets with one class ------------------------------------------------------------------------------


def test_image_sets_are_refused_if_skip_bad_leaves_out_all_images_of_a_class(training_files, tmp_path):
    mixed = shutil.copytree(training_files, tmp_path / "files")
    for path in (mixed / "fake").iterdir():
        save_image(path, random_rgb_pixels(32, 32))
    flags = f"{FLAGS} --crop-size 48 --skip-bad"
    with expect_user_error("training images must contain both", "5 real and 0 fake"):
        run_training(make_arguments_of_train_detector(mixed, tmp_path / "out", flags))
    with expect_user_error("validation images must contain both", "5 real and 0 fake"):
        run_training(
            make_arguments_of_train_detector(
                training_files, tmp_path / "out", f"{flags} --val-root-pos REAL --val-root-neg {mixed}/fake"
            )
        )
    assert not (tmp_path / "out").exists()


def test_csv_tables_with_images_of_one_class_are_refused(training_files, tmp_path):
    both = write_csv_table(tmp_path / "both.csv", training_files, ["real", "real", "fake", "fake"])
    fakes = write_csv_table(tmp_path / "fakes.csv", training_files, ["fake", "fake", "fake"])
    with expect_user_error("training images must contain both", "0 real and 3 fake"):
        run_training(make_training_arguments_without_image_folders(training_files, tmp_path / "out", f"--csv {fakes}"))
    with expect_user_error("validation images must contain both", "0 real and 3 fake"):
        run_training(
            make_training_arguments_without_image_folders(
                training_files, tmp_path / "out", f"--csv {both} --val-csv {fakes}"
            )
        )


def test_a_tree_with_images_of_one_class_is_refused(training_files, tmp_path):
    shutil.copytree(training_files / "fake", tmp_path / "tree/gan/1_fake")
    with expect_user_error("training images must contain both", "0 real and 5 fake"):
        run_training(
            make_training_arguments_without_image_folders(
                training_files, tmp_path / "out", f"--data-root {tmp_path}/tree"
            )
        )


# --- which images are used ----------------------------------------------------------------------------------


def test_training_on_a_genimage_tree_does_not_use_its_validation_images(training_files, tmp_path, caplog):
    for split in ("train", "val"):
        shutil.copytree(training_files / "real", tmp_path / f"tree/sd/{split}/nature")
        shutil.copytree(training_files / "fake", tmp_path / f"tree/sd/{split}/ai")
    run_training(
        make_training_arguments_without_image_folders(training_files, tmp_path / "out", f"--data-root {tmp_path}/tree")
    )
    state = torch.load(tmp_path / "out/last.pth.tar", weights_only=True)
    assert state["settings"]["images"].startswith("10 images (5 real, 5 fake)")
    assert "10 in val (not for training)" in caplog.text


def test_a_link_to_the_parent_folder_does_not_change_the_training(training_files, tmp_path, caplog):
    linked = shutil.copytree(training_files, tmp_path / "files")
    (linked / "real/up").symlink_to("..")
    run_training(make_arguments_of_train_detector(training_files, tmp_path / "plain", FLAGS))
    run_training(make_arguments_of_train_detector(linked, tmp_path / "linked", FLAGS))
    assert read_epoch_statistics_of_training(tmp_path / "plain") == read_epoch_statistics_of_training(
        tmp_path / "linked"
    )
    assert "1 link to a folder that contains it" in caplog.text


def test_a_training_logs_in_one_line_how_many_files_of_a_folder_are_not_used(training_files, tmp_path, caplog):
    mixed = shutil.copytree(training_files, tmp_path / "files")
    shutil.copy(training_files / "real/0.png", mixed / "real/photo.heic")
    save_image(mixed / "real/photo.jfif", random_rgb_pixels(64, 64), format="JPEG")
    run_training(make_arguments_of_train_sr(mixed, tmp_path / "out", "--num-epochs 1"))
    lines = [message for message in caplog.messages if "left out" in message]
    assert len(lines) == 1 and "found 6 images" in lines[0] and "1 .heic" in lines[0]


@pytest.mark.parametrize("name", [b"caf\xe9.png", b"new\nline.png", b" space.png"])
def test_images_with_unusual_file_names_can_be_trained_on_from_folders_and_tables(training_files, tmp_path, name):
    mixed = shutil.copytree(training_files, tmp_path / "files")
    os.rename(mixed / "real/0.png", os.path.join(os.fsencode(mixed / "real"), name))
    run_training(make_arguments_of_train_detector(mixed, tmp_path / "folders", FLAGS))
    paths = sorted((mixed / "real").iterdir()) + sorted((mixed / "fake").iterdir())
    rows = [f'"{path}",{path.parent.name}\n' for path in paths]
    with open(tmp_path / "list.csv", "w", errors="surrogateescape", newline="") as file:
        file.writelines(["path,label\n", *rows])
    run_training(
        make_training_arguments_without_image_folders(training_files, tmp_path / "table", f"--csv {tmp_path}/list.csv")
    )
    losses = [read_epoch_statistics_of_training(tmp_path / out)[0]["loss"] for out in ("folders", "table")]
    assert losses[0] == losses[1]
