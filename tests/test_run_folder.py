"""Tests of the output folder of a training.

A training replaces and deletes only files that its record, the file config.json in the output folder, names.
"""

import errno
import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from files import cut_file_in_half, expect_user_error, read_file_contents_by_path
from processes import (
    patch_checkpoint_saving_to_kill_program,
    patch_progress_bar_to_send_signal,
    start_program,
    wait_for_exit,
)
from trainings import (
    make_arguments_of_train_detector,
    make_arguments_of_train_sr,
    read_checkpoint_content,
    read_epoch_statistics_of_training,
    run_training,
)

from models.rdn import RDN
from utils import checkpoints
from utils.errors import UserError
from utils.run_folder import EVENTS, RECORD, RECORD_FORMAT, STATS

pytestmark = pytest.mark.usefixtures("shrink_resnet18")

FLAGS = "--fixed-sr --epochs 1 --no-cache"


@pytest.fixture(scope="module")
def finished_run_folder(training_files, tmp_path_factory, shrink_resnet18):
    """Return the output folder of a finished training of one epoch with train_detector.py."""
    folder = tmp_path_factory.mktemp("trained")
    run_training(make_arguments_of_train_detector(training_files, folder, f"{FLAGS} VALIDATE"))
    assert {"best.pth.tar", "last.pth.tar", "0001.pth.tar", "0001_sr.pth.tar"} <= set(os.listdir(folder))
    return folder


@pytest.fixture
def copied_run_folder(finished_run_folder, tmp_path):
    """Return a copy of the output folder of a finished training."""
    return Path(shutil.copytree(finished_run_folder, tmp_path / "out"))


# --- files that no training has written ---------------------------------------------------------------------


def write_user_files_unrelated_to_training(folder):
    """Write files into a folder, under names that a training never uses."""
    folder.mkdir(exist_ok=True)
    (folder / ".notes.tmp").write_text("mine")
    (folder / ".notes.12.tmp").write_text("mine, too")
    (folder / "epoch_1.txt").write_text("one")
    (folder / "runs").mkdir()
    (folder / "runs/events.out.tfevents.1").write_bytes(b"events")


FOREIGN = [
    "config.json",
    "stats.jsonl",
    "tensorboard",
    "last.pth.tar",
    "best.pth.tar",
    "0007.pth.tar",
    "0007_sr.pth.tar",
]


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("flags", ["", "--overwrite", "--resume auto"])
def test_train_detector_refuses_and_keeps_an_output_file_that_config_json_does_not_list(
    training_files, tmp_path, monkeypatch, name, flags
):
    if name == "last.pth.tar" and "auto" in flags:
        pytest.skip("this is the file to resume")
    write_user_files_unrelated_to_training(tmp_path)
    if name == "tensorboard":
        (tmp_path / name).mkdir()
        (tmp_path / name / "events.out.tfevents.1").write_bytes(b"events")
    else:
        (tmp_path / name).write_text("{}")
    before = read_file_contents_by_path(tmp_path)
    monkeypatch.chdir(tmp_path)
    with expect_user_error(name, "not recorded"):
        run_training(make_arguments_of_train_detector(training_files, ".", f"{FLAGS} {flags}"))
    assert read_file_contents_by_path(tmp_path) == before


@pytest.mark.parametrize("name", ["epoch_2.pth", "best.pth", "config.json", "stats.jsonl"])
def test_train_sr_refuses_and_keeps_an_output_file_that_config_json_does_not_list(training_files, tmp_path, name):
    write_user_files_unrelated_to_training(tmp_path / "x2")
    torch.save(RDN(2).state_dict(), tmp_path / "x2" / name)
    before = read_file_contents_by_path(tmp_path)
    with expect_user_error(name, "not recorded"):
        run_training(make_arguments_of_train_sr(training_files, tmp_path, "--num-epochs 1 --vgg-lambda 0 --overwrite"))
    assert read_file_contents_by_path(tmp_path) == before


@pytest.mark.parametrize("record", ["{}", "[]", "not JSON", '{"format": "another", "files": ["stats.jsonl"]}'])
def test_an_output_folder_whose_config_json_has_another_format_is_refused_and_unchanged(
    training_files, tmp_path, record
):
    (tmp_path / RECORD).write_text(record)
    (tmp_path / STATS).write_text("1\n")
    before = read_file_contents_by_path(tmp_path)
    with expect_user_error(RECORD, "not recorded"):
        run_training(make_arguments_of_train_detector(training_files, tmp_path, f"{FLAGS} --overwrite"))
    assert read_file_contents_by_path(tmp_path) == before


def test_a_training_does_not_change_other_files_of_the_user_in_its_output_folder(training_files, tmp_path):
    write_user_files_unrelated_to_training(tmp_path)
    before = read_file_contents_by_path(tmp_path)
    for flags in ("", "--overwrite", "--resume auto --epochs 2"):
        run_training(make_arguments_of_train_detector(training_files, tmp_path, f"{FLAGS} {flags}"))
        after = read_file_contents_by_path(tmp_path)
        assert {name: after.get(name) for name in before} == before


def test_a_resumed_run_does_not_replace_a_file_of_the_user(training_files, copied_run_folder):
    """A file of the user is named 0003.pth.tar, like the checkpoint of the third epoch of the training."""
    (copied_run_folder / "0003.pth.tar").write_text("mine")
    before = read_file_contents_by_path(copied_run_folder)
    with expect_user_error("0003.pth.tar", "not recorded"):
        run_training(
            make_arguments_of_train_detector(
                training_files, copied_run_folder, "--fixed-sr --epochs 3 --no-cache --resume auto"
            )
        )
    assert read_file_contents_by_path(copied_run_folder) == before


def test_train_detector_does_not_replace_a_run_of_train_sr(training_files, tmp_path):
    run_training(make_arguments_of_train_sr(training_files, tmp_path, "--num-epochs 1 --vgg-lambda 0"))
    before = read_file_contents_by_path(tmp_path)
    with expect_user_error("another program"):
        run_training(make_arguments_of_train_detector(training_files, tmp_path / "x2", f"{FLAGS} --overwrite"))
    assert read_file_contents_by_path(tmp_path) == before


def test_config_json_lists_every_file_that_a_training_has_written(training_files, tmp_path):
    run_training(
        make_arguments_of_train_detector(
            training_files, tmp_path, "--fixed-sr --epochs 3 --save-every-epoch 1 --keep-last 1 VALIDATE"
        )
    )
    record = json.loads((tmp_path / RECORD).read_text())
    assert record["format"] == RECORD_FORMAT and record["settings"]["epochs"] == 3
    assert {*record["files"]} == {*os.listdir(tmp_path)} - {"residual_cache"}
    assert {"0003.pth.tar", EVENTS} < {*record["files"]}


# --- files of an earlier run in the output folder -----------------------------------------------------------


def copy_folder_and_damage_real_images(files, tmp_path):
    """Copy a folder of training images, and damage all real images in the copy. Return the path of the copy."""
    images = Path(shutil.copytree(files, tmp_path / "images"))
    for path in (images / "real").iterdir():
        cut_file_in_half(path)
    return images


@pytest.mark.parametrize("accident", ["unreadable image", "infinite loss", "kill -9", "full disk"])
@pytest.mark.parametrize("init", ["best.pth.tar", "0001.pth.tar"])
def test_files_of_an_earlier_run_are_kept_until_the_new_run_saves_a_checkpoint(
    training_files, copied_run_folder, tmp_path, monkeypatch, accident, init
):
    """The new training starts from a checkpoint of the earlier run, and fails before it has written a checkpoint."""
    before = {name: data for name, data in read_file_contents_by_path(copied_run_folder).items() if name != RECORD}
    arguments = make_arguments_of_train_detector(
        training_files,
        copied_run_folder,
        f"--fixed-sr --epochs 1 --no-cache --overwrite --init {copied_run_folder / init}",
    )
    if accident == "kill -9":
        log = tmp_path / "log"
        process = start_program(
            "train_detector.py", arguments, log, partial(patch_progress_bar_to_send_signal, "epoch", 1, signal.SIGKILL)
        )
        assert wait_for_exit(process) == -signal.SIGKILL, log.read_text()
    elif accident == "infinite loss":
        with expect_user_error("not finite"):
            run_training([*arguments, "--lr", "1e30", "--epochs", "9"])
    elif accident == "unreadable image":
        arguments = make_arguments_of_train_detector(
            copy_folder_and_damage_real_images(training_files, tmp_path),
            copied_run_folder,
            f"{FLAGS} --overwrite --init {copied_run_folder / init}",
        )
        with expect_user_error("--skip-bad"):
            run_training(arguments)
    else:
        with monkeypatch.context() as patch, pytest.raises(UserError, match="No space"):
            patch.setattr(checkpoints, "open_for_atomic_write", raise_disk_full)
            run_training(arguments)
    after = read_file_contents_by_path(copied_run_folder)
    assert {name: after.get(name) for name in before} == before
    run_training(
        make_arguments_of_train_detector(
            training_files,
            copied_run_folder,
            f"--fixed-sr --epochs 1 --no-cache --overwrite --init {copied_run_folder / init}",
        )
    )
    assert read_checkpoint_content(copied_run_folder / "last.pth.tar")["progress"]["epoch"] == 1
    assert (
        "val_auroc" not in read_epoch_statistics_of_training(copied_run_folder)[0]
    )  # a training without validation images writes no val_auroc into stats.jsonl
    assert not set(before) & {name for name in read_file_contents_by_path(copied_run_folder) if "tfevents" in name}


def test_train_sr_keeps_its_initial_weights_file_until_it_has_saved_a_checkpoint(training_files, tmp_path):
    """train_sr.py starts from best.pth of an earlier training, and fails because all training images are damaged."""
    out, flags = tmp_path / "out", "--vgg-lambda 0 --eval-file REAL --num-epochs"
    run_training(make_arguments_of_train_sr(training_files, out, f"{flags} 2"))
    before = {name: data for name, data in read_file_contents_by_path(out / "x2").items() if name.endswith(".pth")}
    assert {"best.pth", "last.pth", "epoch_1.pth"} <= before.keys()
    again = f"{flags} 1 --overwrite --weights-file {out}/x2/best.pth"
    with expect_user_error("--skip-bad"):
        run_training(
            make_arguments_of_train_sr(copy_folder_and_damage_real_images(training_files, tmp_path), out, again)
        )
    after = read_file_contents_by_path(out / "x2")
    assert {name: after.get(name) for name in before} == before
    run_training(make_arguments_of_train_sr(training_files, out, again))
    assert read_checkpoint_content(out / "x2/last.pth")["epoch"] == 1 and not (out / "x2/epoch_1.pth").exists()


def raise_disk_full(path):
    """Raise the OSError of a full disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_files_of_an_earlier_run_are_deleted_once_the_new_run_saves_a_checkpoint(
    training_files, copied_run_folder, tmp_path
):
    """With --overwrite, a new training is killed while it writes its second checkpoint."""
    arguments = make_arguments_of_train_detector(
        training_files, copied_run_folder, "--fixed-sr --epochs 2 --no-cache --overwrite --save-minutes 0"
    )
    log = tmp_path / "log"
    assert (
        wait_for_exit(
            start_program("train_detector.py", arguments, log, partial(patch_checkpoint_saving_to_kill_program, 2))
        )
        == -signal.SIGKILL
    )
    states = {name for name in os.listdir(copied_run_folder) if name.endswith(".pth.tar") and not name.startswith(".")}
    assert states == {"last.pth.tar"}
    assert read_checkpoint_content(copied_run_folder / "last.pth.tar")["progress"]["total_steps"] == 1
    assert read_epoch_statistics_of_training(copied_run_folder) == []


def test_a_checkpoint_of_the_authors_in_the_output_folder_is_never_deleted(training_files, copied_run_folder, tmp_path):
    released = {
        key: value
        for key, value in read_checkpoint_content(copied_run_folder / "0001.pth.tar").items()
        if key in ("arch", "state_dict")
    }
    folder = tmp_path / "downloaded"
    folder.mkdir()
    torch.save(released, folder / "0020.pth.tar")
    shutil.copy(copied_run_folder / "0001_sr.pth.tar", folder / "0020_sr.pth.tar")
    before = read_file_contents_by_path(folder)
    weights = f"--init {folder}/0020.pth.tar --sr-weights-file {folder}/0020_sr.pth.tar"
    for flags in ("", "--overwrite", f"--overwrite {weights}", f"{weights} --resume auto"):
        with expect_user_error("0020", "not recorded"):
            run_training(make_arguments_of_train_detector(training_files, folder, f"{FLAGS} {flags}"))
        assert read_file_contents_by_path(folder) == before


def test_an_output_folder_with_a_run_is_refused_without_resume_or_overwrite(training_files, copied_run_folder):
    before = read_file_contents_by_path(copied_run_folder)
    with expect_user_error("holds a run already", "--resume auto", "--overwrite"):
        run_training(make_arguments_of_train_detector(training_files, copied_run_folder, FLAGS))
    assert read_file_contents_by_path(copied_run_folder) == before


def test_resuming_a_run_whose_last_checkpoint_is_a_symbolic_link_keeps_the_link(
    training_files, copied_run_folder, tmp_path
):
    (copied_run_folder / "last.pth.tar").rename(tmp_path / "elsewhere.pth.tar")
    (copied_run_folder / "last.pth.tar").symlink_to(tmp_path / "elsewhere.pth.tar")
    run_training(
        make_arguments_of_train_detector(
            training_files, copied_run_folder, "--fixed-sr --epochs 2 --no-cache --resume auto VALIDATE"
        )
    )
    assert read_checkpoint_content(copied_run_folder / "last.pth.tar")["progress"]["epoch"] == 2
    assert (copied_run_folder / "last.pth.tar").is_symlink()
