"""Tests of interrupted and resumed trainings, which must write the same files as an uninterrupted training."""

import errno
import functools
import itertools
import json
import os
import re
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from files import cut_file_in_half, expect_user_error, save_image
from processes import (
    hold_lock_in_process,
    make_environments_of_two_torchrun_processes,
    patch_checkpoint_saving_to_kill_program,
    patch_progress_bar_to_send_signal,
    patch_progress_bar_to_sleep_first,
    start_program,
    wait_for_exit,
)
from trainings import (
    list_differing_checkpoint_entries,
    make_arguments_of_train_detector,
    make_arguments_of_train_sr,
    read_checkpoint_content,
    read_checkpoint_without_settings_entry,
    read_epoch_statistics_of_training,
    run_training,
    run_training_for_status_and_last_line,
)

from data.datasets import EpochBatchSampler
from data.images import read_image_as_tensor
from evaluation import load
from evaluation.metrics import auroc
from utils.run_folder import EVENTS, RECORD, RECORD_FORMAT, STATS, RunFolder

pytestmark = pytest.mark.usefixtures("shrink_resnet18")

SAVE_EVERY_STEP = ["--save-minutes", "0"]
AUTO = ["--resume", "auto"]
# name of the training -> (program, function that returns its flags, file of its last checkpoint, further flags)
TRAININGS = {
    "super-resolution": (
        "train_sr.py",
        make_arguments_of_train_sr,
        "x2/last.pth",
        "--num-epochs 3 --augment --completion --colorization --patches-per-image 2 --eval-file REAL"
        " --lr-decay-epoch 1 --num-save 1 --keep-last 1",
    ),
    "frozen": (
        "train_detector.py",
        make_arguments_of_train_detector,
        "last.pth.tar",
        "--fixed-sr VALIDATE --augment-perturb --epochs 2 --batch-size 5 --crop-size 56 --save-every-epoch 1"
        " --schedule cosine"
        " --keep-last 1",
    ),
    "cached": (
        "train_detector.py",
        make_arguments_of_train_detector,
        "last.pth.tar",
        "--fixed-sr VALIDATE --arch spectrum --epochs 3 --batch-size 5 --crop-size 56 --crops-per-image 2",
    ),
    "end to end": (
        "train_detector.py",
        make_arguments_of_train_detector,
        "last.pth.tar",
        "--mode-sr colorization --idx-stages 1 --micro-batch 2 --lr 1e-6 --epochs 2 --batch-size 5 --crop-size 32",
    ),
}


@pytest.fixture(scope="module")
def make_training_arguments(training_files):
    """Return a function that makes the command line of a training in TRAININGS."""

    def make_training_command_line_by_name(name, out, *flags):
        _, make_arguments, _, own_flags = TRAININGS[name]
        return [*make_arguments(training_files, out, own_flags), *flags]

    return make_training_command_line_by_name


@pytest.fixture(scope="module")
def run_training_without_interruption(make_training_arguments, tmp_path_factory):
    """Return a function that runs a training without interruption, and returns the training's output folder."""

    @functools.cache
    def run_training_or_return_cached_folder(name):
        out = tmp_path_factory.mktemp("uninterrupted")
        run_training(make_training_arguments(name, out))
        return out

    return run_training_or_return_cached_folder


@pytest.fixture
def resume_and_require_equal_results(make_training_arguments, run_training_without_interruption):
    """Return a function that resumes a training, and requires the files of an uninterrupted training."""

    def resume_and_require_equal_files(name, out, *flags):
        run_training(make_training_arguments(name, out, *AUTO, *flags))
        last = TRAININGS[name][2]
        expected, resumed = (run_training_without_interruption(name) / last).parent, (out / last).parent
        names = sorted(path.name for path in expected.iterdir() if path.is_file())
        assert sorted(path.name for path in resumed.iterdir() if path.is_file()) == names
        assert (resumed / STATS).read_text() == (expected / STATS).read_text()
        for checkpoint in [name for name in names if ".pth" in name]:
            found = list_differing_checkpoint_entries(
                read_checkpoint_without_settings_entry(expected / checkpoint),
                read_checkpoint_without_settings_entry(resumed / checkpoint),
            )
            assert found == [], checkpoint

    return resume_and_require_equal_files


# --- killed and stopped -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "workers", "accident"),
    [
        ("super-resolution", 0, partial(patch_checkpoint_saving_to_kill_program, 4)),
        ("super-resolution", 2, partial(patch_progress_bar_to_send_signal, "epoch", 4, signal.SIGKILL)),
        ("frozen", 0, partial(patch_checkpoint_saving_to_kill_program, 5)),  # the fifth saved file is best.pth.tar
        ("frozen", 2, partial(patch_progress_bar_to_send_signal, "epoch", 3, signal.SIGKILL)),
        ("cached", 0, partial(patch_progress_bar_to_send_signal, "residuals", 22, signal.SIGKILL)),
        ("cached", 2, partial(patch_progress_bar_to_send_signal, "epoch", 6, signal.SIGKILL)),
        ("end to end", 0, partial(patch_checkpoint_saving_to_kill_program, 3)),
        ("end to end", 2, partial(patch_progress_bar_to_send_signal, "epoch", 4, signal.SIGKILL)),
    ],
)
def test_a_killed_training_that_is_resumed_gives_the_files_of_an_uninterrupted_training(
    make_training_arguments, resume_and_require_equal_results, tmp_path, name, workers, accident
):
    program, _, last, _ = TRAININGS[name]
    out, log, flags = tmp_path / "out", tmp_path / "log", ["--workers", str(workers)]
    process = start_program(program, make_training_arguments(name, out, *flags, *SAVE_EVERY_STEP), log, accident)
    assert wait_for_exit(process) == -signal.SIGKILL, log.read_text()
    has_state = accident.args[0] != "residuals"
    assert (out / last).exists() == has_state
    resume_and_require_equal_results(name, out, *flags)


@pytest.mark.parametrize("number", [2, 3])
def test_a_training_killed_while_it_saves_the_checkpoints_of_its_first_epoch_can_be_resumed(
    make_training_arguments, resume_and_require_equal_results, tmp_path, number
):
    """train_detector.py has saved last.pth.tar, and is killed while it writes best.pth.tar or 0001.pth.tar."""
    out, log = tmp_path / "out", tmp_path / "log"
    kill = partial(patch_checkpoint_saving_to_kill_program, number)
    process = start_program("train_detector.py", make_training_arguments("frozen", out), log, kill)
    assert wait_for_exit(process) == -signal.SIGKILL, log.read_text()
    resume_and_require_equal_results("frozen", out)


@pytest.mark.parametrize(
    ("name", "workers", "description", "number"),
    [
        ("super-resolution", 0, "epoch", signal.SIGINT),
        ("super-resolution", 2, "evaluation", signal.SIGTERM),
        ("frozen", 2, "epoch", signal.SIGTERM),
        ("frozen", 0, "validation", signal.SIGTERM),
        ("cached", 2, "residuals", signal.SIGTERM),
    ],
)
def test_a_training_stopped_by_a_signal_saves_its_state_and_can_be_resumed(
    make_training_arguments, resume_and_require_equal_results, tmp_path, name, workers, description, number
):
    """The training is stopped by a signal, resumed, stopped again, and resumed again."""
    program, _, last, _ = TRAININGS[name]
    out = tmp_path / "out"
    for at in (1, 2):
        log = tmp_path / f"log{at}"
        flags = make_training_arguments(name, out, *AUTO, "--workers", str(workers))
        accident = partial(patch_progress_bar_to_send_signal, description, at, number, all_processes=workers > 0)
        assert wait_for_exit(start_program(program, flags, log, accident)) == 128 + number, log.read_text()
        assert "Traceback" not in log.read_text()
        assert "saved" in log.read_text().splitlines()[-1]
        assert (out / last).exists()
    if description == "epoch":
        state = read_checkpoint_content(out / last)
        assert state["progress"]["total_steps"] == 3
        assert state["epoch"] == state["progress"]["epoch"]
    resume_and_require_equal_results(name, out)


# --- the state from which a run starts ----------------------------------------------------------------------


def test_the_flag_resume_auto_uses_the_init_checkpoint_only_if_no_run_exists(training_files, tmp_path):
    run_training(make_arguments_of_train_detector(training_files, tmp_path / "first", "--fixed-sr --epochs 1 --lr 0"))
    flags = f"--mode-sr none --lw-sr 0 --lr 0 --init {tmp_path}/first/last.pth.tar --resume auto --epochs"
    for epochs in (1, 2):
        run_training(make_arguments_of_train_detector(training_files, tmp_path / "second", f"{flags} {epochs}"))
    first, second = (read_checkpoint_content(tmp_path / name / "last.pth.tar") for name in ("first", "second"))
    assert torch.equal(first["state_dict"]["conv1.0.weight"], second["state_dict"]["conv1.0.weight"])
    assert second["progress"]["epoch"] == 2


def test_the_flag_resume_with_a_checkpoint_has_priority_over_the_flag_init(training_files, tmp_path):
    run_training(make_arguments_of_train_detector(training_files, tmp_path / "first", "--fixed-sr --epochs 1"))
    flags = f"--mode-sr none --lw-sr 0 --lr 0 --init {tmp_path}/first/last.pth.tar --epochs"
    run_training(make_arguments_of_train_detector(training_files, tmp_path / "second", f"{flags} 1"))
    run_training(
        make_arguments_of_train_detector(
            training_files, tmp_path / "second", f"{flags} 2 --resume {tmp_path}/second/0001.pth.tar"
        )
    )
    assert read_checkpoint_content(tmp_path / "second/last.pth.tar")["progress"]["epoch"] == 2


def test_resuming_a_calibrated_detector_reports_that_its_calibration_is_not_kept(training_files, tmp_path, caplog):
    run_training(make_arguments_of_train_detector(training_files, tmp_path, "--fixed-sr --epochs 1"))
    last = tmp_path / "last.pth.tar"
    calibration = {"temperature": 2.0, "t_real": 0.4, "t_fake": 0.6}
    torch.save({**read_checkpoint_content(last), "calibration": calibration}, last)
    caplog.set_level("INFO")
    run_training(make_arguments_of_train_detector(training_files, tmp_path, "--fixed-sr --epochs 2 --resume auto"))
    assert f"the calibration in {last} fits only the present weights" in caplog.text
    assert "calibration" not in read_checkpoint_content(last)


def test_resuming_an_older_checkpoint_of_the_same_folder_gives_a_warning_and_an_unused_overwrite_a_line(
    training_files, tmp_path, caplog
):
    flags = "--fixed-sr --save-every-epoch 1 --epochs 2"
    run_training(make_arguments_of_train_detector(training_files, tmp_path, flags))
    caplog.set_level("INFO")
    again = f"{flags} --overwrite --resume {tmp_path}/0001.pth.tar"
    run_training(make_arguments_of_train_detector(training_files, tmp_path, again))
    assert "--overwrite is not used" in caplog.text
    assert "goes back to epoch 1, trains 1 later epochs again" in caplog.text
    caplog.clear()
    run_training(
        make_arguments_of_train_detector(training_files, tmp_path, f"{flags} --resume {tmp_path}/0002.pth.tar")
    )
    assert "goes back" not in caplog.text


@pytest.mark.parametrize("name", ["super-resolution", "cached"])
def test_a_finished_training_is_kept_on_resume_and_replaced_with_overwrite(
    make_training_arguments, run_training_without_interruption, tmp_path, capfd, name
):
    out, last = tmp_path / "out", TRAININGS[name][2]
    shutil.copytree(run_training_without_interruption(name), out)
    config = (out / last).with_name("config.json")
    before = [path.read_bytes() for path in (out / last, config)]
    flag = "--num-epochs" if name == "super-resolution" else "--epochs"
    arguments = make_training_arguments(name, out, *AUTO, "--save-minutes", "5", flag, "1")
    code, line = run_training_for_status_and_last_line(arguments, capfd)
    epochs = read_checkpoint_content(out / last)["progress"]["epoch"]
    assert code == 0 and f"finished already: {epochs} epochs are trained" in line
    assert [path.read_bytes() for path in (out / last, config)] == before
    run_training(make_training_arguments(name, tmp_path / "other", "--resume", str(out / last)))
    assert (tmp_path / "other" / last).with_name("config.json").exists()
    assert read_checkpoint_content(tmp_path / "other" / last)["progress"]["epoch"] == epochs
    run_training(make_training_arguments(name, tmp_path / "third", flag, "1"))
    again = ("--resume", str(out / last), "--overwrite")
    run_training(make_training_arguments(name, tmp_path / "third", *again))  # replaces the run in the folder "third"
    assert read_checkpoint_content(tmp_path / "third" / last)["progress"]["epoch"] == epochs
    run_training(make_training_arguments(name, out, "--overwrite", flag, "1"))
    assert len(read_epoch_statistics_of_training((out / last).parent)) == 1
    assert read_checkpoint_content(out / last)["progress"]["epoch"] == 1
    assert not {"0003.pth.tar", "epoch_2.pth"} & {path.name for path in (out / last).parent.iterdir()}


@pytest.mark.parametrize("flags", ["--resume auto", "--resume auto --overwrite"])
def test_resuming_a_training_without_its_flag_fixed_sr_is_refused(
    training_files, run_training_without_interruption, tmp_path, flags
):
    out = tmp_path / "out"
    shutil.copytree(run_training_without_interruption("cached"), out)
    before = (out / "last.pth.tar").read_bytes()
    with expect_user_error("last.pth.tar", "--fixed-sr"):
        run_training(make_arguments_of_train_detector(training_files, out, f"--epochs 3 {flags}"))
    assert (out / "last.pth.tar").read_bytes() == before


def test_a_training_killed_before_its_first_save_starts_from_the_beginning(training_files, tmp_path):
    (tmp_path / EVENTS).mkdir()
    (tmp_path / STATS).write_text('{"epoch": 0}\n')
    (tmp_path / RECORD).write_text(json.dumps({"format": RECORD_FORMAT, "files": [RECORD, STATS, EVENTS]}))
    run_training([*make_arguments_of_train_detector(training_files, tmp_path, "--fixed-sr --epochs 1"), *AUTO])
    assert len(read_epoch_statistics_of_training(tmp_path)) == 1


def test_the_error_for_a_truncated_last_checkpoint_names_the_newest_numbered_checkpoint(
    training_files, run_training_without_interruption, tmp_path
):
    out = tmp_path / "out"
    shutil.copytree(run_training_without_interruption("cached"), out)
    last = out / "last.pth.tar"
    last.write_bytes(last.read_bytes()[:1000])
    with expect_user_error("truncated", "--resume", "0003.pth.tar"):
        run_training([*make_arguments_of_train_detector(training_files, out, "--fixed-sr"), *AUTO])


@pytest.mark.parametrize("name", ["super-resolution", "frozen"])
def test_a_second_training_in_the_output_folder_of_a_running_training_is_refused(
    make_training_arguments, tmp_path, capfd, name
):
    """After the running training is killed, a new training can use the output folder."""
    folder = (tmp_path / TRAININGS[name][2]).parent
    folder.mkdir(exist_ok=True)
    with hold_lock_in_process(folder / ".lock") as kill:
        code, line = run_training_for_status_and_last_line(make_training_arguments(name, tmp_path), capfd)
        assert code == 2 and "another run" in line
        assert [path.name for path in folder.iterdir()] == [".lock"]
        kill()
        assert run_training_for_status_and_last_line(make_training_arguments(name, tmp_path), capfd)[0] == 0
    assert not (folder / ".lock").exists()


# --- options and images that have changed since the run began -----------------------------------------------


def map_changed_settings_to_log_lines(caplog):
    """Return a dict from setting name, such as "epochs", to the log line that reports a change of the setting."""
    lines = [record.getMessage() for record in caplog.records if "when the run began" in record.getMessage()]
    return {line.split()[3]: line for line in lines}


def test_a_resumed_training_uses_changed_options_and_reports_them(training_files, tmp_path, caplog):
    flags = "--mode-sr none --lw-sr 0 --lr 1e-6"
    run_training(make_arguments_of_train_detector(training_files, tmp_path, f"{flags} --epochs 1"))
    changed = "--wd 0.5 --momentum 0.3 --lr-sr 0.25 --batch-size 5 --resume auto --epochs 2"
    run_training(make_arguments_of_train_detector(training_files, tmp_path, f"{flags} {changed}"))
    classifier, resynthesizer = read_checkpoint_content(tmp_path / "last.pth.tar")["optimizer"]["param_groups"]
    assert (classifier["weight_decay"], resynthesizer["weight_decay"]) == (0.5 / 0.25, 0.5)
    assert classifier["momentum"] == resynthesizer["momentum"] == 0.3
    assert classifier["lr"] == pytest.approx(0.25e-6) and resynthesizer["lr"] == pytest.approx(1e-6)
    assert map_changed_settings_to_log_lines(caplog).keys() == {
        "weight_decay",
        "momentum",
        "classifier_rate_factor",
        "epochs",
        "batch_size",
    }


def test_a_resumed_training_reports_that_changed_images_are_read_in_another_order(training_files, tmp_path, caplog):
    shutil.copytree(training_files, tmp_path / "files")
    flags = make_arguments_of_train_detector(tmp_path / "files", tmp_path / "out", "--fixed-sr --epochs 2")
    log = tmp_path / "log"
    assert (
        wait_for_exit(
            start_program(
                "train_detector.py", flags, log, partial(patch_progress_bar_to_send_signal, "epoch", 2, signal.SIGTERM)
            )
        )
        == 143
    )
    (tmp_path / "files/fake/0.png").unlink()
    run_training([*flags, *AUTO])
    (line,) = map_changed_settings_to_log_lines(caplog).values()
    assert "10 images" in line and "9 images" in line and "step 2" in line and "order" in line


def validation_folders(folder, files):
    """Return a dict with a folder of evenly grey images ("easy") and of randomly coloured images ("hard")."""
    (folder / "easy").mkdir()
    for i in range(3):
        save_image(folder / f"easy/{i}.png", torch.full((64, 64, 3), 60 * i, dtype=torch.uint8).numpy())
    return {"easy": folder / "easy", "hard": files / "fake"}


def test_changed_evaluation_images_of_train_sr_reset_the_best_score(training_files, tmp_path, caplog):
    """train_sr.py must forget the best score on easy images, which no later epoch can reach on hard images."""
    lists = validation_folders(tmp_path, training_files)
    flags = "--vgg-lambda 0 --num-save 1 --resume auto --eval-file"
    run_training(
        make_arguments_of_train_sr(training_files, tmp_path / "out", f"{flags} {lists['easy']} --num-epochs 1")
    )
    assert read_checkpoint_content(tmp_path / "out/x2/best.pth")["epoch"] == 1
    run_training(
        make_arguments_of_train_sr(training_files, tmp_path / "out", f"{flags} {lists['hard']} --num-epochs 3")
    )
    line = map_changed_settings_to_log_lines(caplog)["validation_images"]
    assert "3 images" in line and "5 images" in line and "best score" in line
    assert map_changed_settings_to_log_lines(caplog).keys() == {"validation_images", "num_epochs"}
    scores = {record["epoch"]: record["psnr"] for record in read_epoch_statistics_of_training(tmp_path / "out/x2")}
    assert scores[0] > max(scores[1], scores[2]) + 3
    state = read_checkpoint_content(tmp_path / "out/x2/best.pth")
    assert state["epoch"] > 1 and state["progress"]["best"] == max(scores[1], scores[2])


def test_changed_validation_images_of_a_detector_reset_the_best_score(training_files, tmp_path, caplog):
    flags = "--fixed-sr --lr 0 --save-every-epoch 1"
    run_training(make_arguments_of_train_detector(training_files, tmp_path / "out", f"{flags} --epochs 1 VALIDATE"))
    (tmp_path / "one").mkdir()
    shutil.copy(training_files / "real/0.png", tmp_path / "one")
    changed = f"--epochs 2 --val-root-pos {tmp_path}/one --val-root-neg FAKE --resume auto"
    run_training(make_arguments_of_train_detector(training_files, tmp_path / "out", f"{flags} {changed}"))
    assert "validation_images" in map_changed_settings_to_log_lines(caplog)
    assert read_checkpoint_content(tmp_path / "out/best.pth.tar")["epoch"] == 2


# --- the best epoch -----------------------------------------------------------------------------------------


def test_the_weights_of_the_best_epoch_are_kept_if_no_numbered_file_is_written_for_it(training_files, tmp_path):
    run_training(
        make_arguments_of_train_detector(
            training_files, tmp_path / "d", "--fixed-sr VALIDATE --epochs 6 --save-every-epoch 9 --lr 0.1"
        )
    )
    scores = [line["val_auroc"] for line in read_epoch_statistics_of_training(tmp_path / "d")]
    state = read_checkpoint_content(tmp_path / "d/best.pth.tar")
    assert state["progress"]["best"] == max(scores)
    assert state["epoch"] == scores.index(max(scores)) + 1
    run_training(
        make_arguments_of_train_sr(
            training_files, tmp_path / "s", "--num-epochs 3 --num-save 9 --eval-file REAL --vgg-lambda 0 --lr 0.05"
        )
    )
    scores = [line["psnr"] for line in read_epoch_statistics_of_training(tmp_path / "s/x2")]
    assert read_checkpoint_content(tmp_path / "s/x2/best.pth")["epoch"] == scores.index(max(scores)) + 1


def test_a_black_evaluation_image_does_not_make_the_first_epoch_the_best(training_files, tmp_path):
    """A network can enlarge a black image exactly, so train_sr.py must replace an infinite PSNR by a finite value."""
    images = Path(shutil.copytree(training_files / "real", tmp_path / "real"))
    save_image(images / "black.png", torch.zeros(64, 64, 3, dtype=torch.uint8).numpy())
    flags = f"--num-epochs 4 --eval-file {images} --vgg-lambda 0 --num-save 1"
    run_training(make_arguments_of_train_sr(training_files, tmp_path / "out", flags))
    scores = [line["psnr"] for line in read_epoch_statistics_of_training(tmp_path / "out/x2")]
    assert None not in scores and scores.index(max(scores)) > 0
    assert read_checkpoint_content(tmp_path / "out/x2/best.pth")["epoch"] == scores.index(max(scores)) + 1


# --- images that cannot be used -----------------------------------------------------------------------------


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("flags", ["--fixed-sr --no-cache", "--fixed-sr", "--mode-sr none --lr 1e-6"])
def test_training_on_a_damaged_image_ends_with_one_error_line_and_can_be_resumed(
    training_files, tmp_path, capfd, flags, workers
):
    """After the image is repaired, the resumed training must write the last checkpoint of an undisturbed training."""
    images = Path(shutil.copytree(training_files, tmp_path / "files"))
    flags = f"{flags} --epochs 2 --batch-size 5 --workers {workers}"
    run_training(make_arguments_of_train_detector(images, tmp_path / "expected", flags))
    # `last` is the index of the last image in the second training step
    last = [key.index for batch in EpochBatchSampler(10, 5, seed=123) for key in batch][-1]
    path = images / ("real" if last < 5 else "fake") / f"{last % 5}.png"
    times, content = path.stat(), cut_file_in_half(path)
    code, line = run_training_for_status_and_last_line(
        make_arguments_of_train_detector(images, tmp_path / "out", f"{flags} --resume auto"), capfd
    )
    assert code == 2 and str(path) in line and "--skip-bad" in line
    if "--no-cache" in flags or "--mode-sr" in flags:  # without a residual cache, training fails in its second step
        assert read_checkpoint_content(tmp_path / "out/last.pth.tar")["progress"]["total_steps"] == 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    run_training(make_arguments_of_train_detector(images, tmp_path / "out", f"{flags} --resume auto"))
    expected, resumed = (
        read_checkpoint_without_settings_entry(tmp_path / name / "last.pth.tar") for name in ("expected", "out")
    )
    assert list_differing_checkpoint_entries(expected, resumed) == []


def test_a_damaged_image_left_out_by_skip_bad_is_reported_once_and_counted_in_each_epoch(
    training_files, tmp_path, caplog
):
    images = Path(shutil.copytree(training_files, tmp_path / "files"))
    cut_file_in_half(images / "real/3.png")
    run_training(
        make_arguments_of_train_detector(
            images, tmp_path / "d", "--fixed-sr --epochs 3 --batch-size 3 --skip-bad VALIDATE"
        )
    )
    assert [line["left_out"] for line in read_epoch_statistics_of_training(tmp_path / "d")] == [1, 1, 1]
    flags = "--num-epochs 2 --eval-file REAL --vgg-lambda 0"
    run_training(make_arguments_of_train_sr(images, tmp_path / "s", f"{flags} --batch-size 1 --skip-bad"))
    lines = [record.getMessage() for record in caplog.records if "left out: " in record.getMessage()]
    assert len(lines) == 2 and all("3.png" in line for line in lines)
    with expect_user_error("real/3.png", "--skip-bad"):
        run_training(make_arguments_of_train_sr(images, tmp_path / "e", flags))


@pytest.fixture
def folder_with_damaged_last_batch_image(tmp_path, write_real_and_fake_images, training_files):
    """Return a folder with ten images of 32 x 32 pixels, of which one of the two in the last batch is damaged.

    In training mode, batch norm fails if a batch consists of a single image and the feature maps have 1 x 1 pixels.
    """
    root = tmp_path / "small"
    root.mkdir()
    write_real_and_fake_images(root, 5, 32)
    shutil.copy(training_files / "rdn.pth", root)
    order = [key.index for batch in EpochBatchSampler(10, 8, seed=123) for key in batch]
    cut_file_in_half(root / ("real" if order[-1] < 5 else "fake") / f"{order[-1] % 5}.png")
    return root


def test_a_batch_with_one_usable_image_is_left_out_and_reported_in_one_line(
    folder_with_damaged_last_batch_image, tmp_path, caplog
):
    flags = "--fixed-sr --no-cache --epochs 1 --batch-size 8 --skip-bad"
    run_training(make_arguments_of_train_detector(folder_with_damaged_last_batch_image, tmp_path / "out", flags))
    assert [line["left_out"] for line in read_epoch_statistics_of_training(tmp_path / "out")] == [2]
    assert read_checkpoint_content(tmp_path / "out/last.pth.tar")["progress"]["total_steps"] == 1
    lines = [record.getMessage() for record in caplog.records if "batch norm needs at least 2" in record.getMessage()]
    assert len(lines) == 1


# --- full disk, time estimate, TensorBoard and wrong states -------------------------------------------------


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_training_on_a_full_disk_ends_with_one_error_line_and_can_be_resumed(
    make_training_arguments, resume_and_require_equal_results, tmp_path, monkeypatch, capfd, call
):
    module, count = os if call == "fsync" else Path, itertools.count(1)
    original = getattr(module, call)

    def raise_disk_full_from_tenth_call(*values):
        if next(count) >= 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*values)

    with monkeypatch.context() as patch:
        patch.setattr(module, call, raise_disk_full_from_tenth_call)
        code, line = run_training_for_status_and_last_line(
            make_training_arguments("super-resolution", tmp_path, *SAVE_EVERY_STEP), capfd
        )
    assert code == 2 and "No space left on device" in line
    assert read_checkpoint_content(tmp_path / "x2/last.pth")["progress"]["total_steps"] >= 1
    assert not list(tmp_path.rglob(".*.tmp"))
    resume_and_require_equal_results("super-resolution", tmp_path)


def test_the_estimate_of_the_remaining_time_does_not_include_filling_the_cache(training_files, tmp_path):
    """The estimate must not include the 12 s of sleep before the training fills the residual cache."""
    log, epochs = tmp_path / "log", 1_000_000
    flags = make_arguments_of_train_detector(
        training_files, tmp_path / "out", f"--fixed-sr --save-every-epoch 1000000 --epochs {epochs}"
    )
    assert (
        wait_for_exit(start_program("train_detector.py", flags, log, delay_cache_filling_and_schedule_sigterm)) == 143
    )
    minutes = [int(text) for text in re.findall(r"about (\d+) min left", log.read_text())]
    seconds_per_epoch = [60 * value / epochs for value in minutes]
    assert len(minutes) >= 2
    assert seconds_per_epoch[0] < 6 + max(seconds_per_epoch[1:]), log.read_text()


def delay_cache_filling_and_schedule_sigterm():
    """Make a training sleep for 12 s before it fills the residual cache, and stop the training by SIGTERM in step 9."""
    patch_progress_bar_to_sleep_first("residuals", 12)
    patch_progress_bar_to_send_signal("epoch", 9, signal.SIGTERM)


def test_tensorboard_shows_each_epoch_of_a_resumed_training_once(training_files, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = "--mode-sr denoising --lr 1e-6 VALIDATE"
    for epochs in (1, 2):
        run_training([*make_arguments_of_train_detector(training_files, tmp_path, f"{flags} --epochs {epochs}"), *AUTO])
    events = EventAccumulator(str(tmp_path / EVENTS), size_guidance={"images": 0}).Reload()
    for tag in ("resynthesis/real", "resynthesis/fake_degraded"):
        assert [event.step for event in events.Images(tag)] == [0, 1, 2]
    assert [event.step for event in events.Scalars("val_auroc")] == [1, 2]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("optimizer", {"state": {}, "param_groups": []}, ["optimizer"]),
        ("optimizer", 3, ["optimizer"]),
        ("progress", {"epoch": -1, "step": 0, "total_steps": 0}, ["progress.epoch", "-1"]),
        ("progress", {"epoch": 0, "step": "x", "total_steps": 0}, ["progress.step", "'x'"]),
        ("progress", {"epoch": 0, "step": 0, "total_steps": 0, "best": float("inf")}, ["progress.best", "inf"]),
        ("progress", None, ["progress.epoch", "missing"]),
    ],
)
def test_resuming_a_checkpoint_with_an_impossible_value_is_refused_in_one_line(
    training_files, run_training_without_interruption, tmp_path, key, value, words
):
    out = tmp_path / "out"
    shutil.copytree(run_training_without_interruption("cached"), out)
    state = read_checkpoint_content(out / "last.pth.tar")
    state[key] = value
    torch.save(state, out / "last.pth.tar")
    with expect_user_error("last.pth.tar", *words):
        run_training([*make_arguments_of_train_detector(training_files, out, "--fixed-sr --arch spectrum"), *AUTO])


# --- several processes --------------------------------------------------------------------------------------


def run_program_in_two_processes(program, flags, log, prepare=None):
    """Run a program in two processes as torchrun does. Return the exit statuses of the two processes."""
    processes = [
        start_program(program, flags, log, prepare, **rank) for rank in make_environments_of_two_torchrun_processes()
    ]
    return [wait_for_exit(process) for process in processes]


def test_two_processes_train_the_resynthesizer_to_the_weights_of_one_process(training_files, tmp_path):
    """The last batch has only one of the five images, so the second process gets no image of this batch."""
    flags = "--num-epochs 2 --batch-size 4 --augment --eval-file FAKE"
    run_training(make_arguments_of_train_sr(training_files, tmp_path / "one", flags))
    again = make_arguments_of_train_sr(
        training_files, tmp_path / "two", f"{flags} --save-minutes 0 --resume auto --gpu 0"
    )
    log = tmp_path / "log"
    assert (
        run_program_in_two_processes(
            "train_sr.py", again, log, partial(patch_progress_bar_to_send_signal, "epoch", 3, signal.SIGKILL)
        )
        == [-signal.SIGKILL] * 2
    )
    assert read_checkpoint_content(tmp_path / "two/x2/last.pth")["progress"]["total_steps"] == 2, log.read_text()
    assert run_program_in_two_processes("train_sr.py", again, log) == [0, 0], log.read_text()
    one, two = (read_checkpoint_content(tmp_path / name / "x2/last.pth") for name in ("one", "two"))
    for key, tensor in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][key], tensor, rtol=0, atol=1e-6)
    assert two["progress"]["best"] == pytest.approx(one["progress"]["best"], abs=1e-4)


def test_the_validation_scores_of_two_processes_equal_the_scores_of_the_saved_detector(training_files, tmp_path):
    """In validation, all processes must use the batch-norm statistics of the main process."""
    flags = make_arguments_of_train_detector(
        training_files, tmp_path / "two", "--fixed-sr --epochs 1 --lr 0.1 --no-cache VALIDATE"
    )
    assert run_program_in_two_processes("train_detector.py", flags, tmp_path / "log") == [0, 0]
    x = torch.stack(
        [read_image_as_tensor(training_files / kind / f"{i}.png") for kind in ("fake", "real") for i in range(5)]
    )
    labels = torch.arange(10) // 5
    logits = load(tmp_path / "two/last.pth.tar", device="cpu").logits(x)
    (line,) = read_epoch_statistics_of_training(tmp_path / "two")
    assert line["val_auroc"] == pytest.approx(auroc((logits[:, 0] - logits[:, 1]).numpy(), labels.numpy() == 0))
    assert line["val_loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)


@pytest.mark.parametrize("flags", ["--fixed-sr --no-cache", "--mode-sr none --lr 1e-6"])
def test_a_process_without_a_usable_image_takes_part_in_the_training_step(training_files, tmp_path, flags):
    """In the second step, the only image of one process is damaged."""
    images = Path(shutil.copytree(training_files, tmp_path / "files"))
    second = [key.index for key in [*EpochBatchSampler(10, 2, seed=123)][1]]
    cut_file_in_half(images / ("real" if second[1] < 5 else "fake") / f"{second[1] % 5}.png")
    flags = make_arguments_of_train_detector(images, tmp_path / "out", f"{flags} --epochs 1 --batch-size 2 --skip-bad")
    log = tmp_path / "log"
    assert run_program_in_two_processes("train_detector.py", flags, log) == [0, 0], log.read_text()
    (line,) = read_epoch_statistics_of_training(tmp_path / "out")
    assert line["left_out"] == 1 and line["loss"] > 0
    assert read_checkpoint_content(tmp_path / "out/last.pth.tar")["progress"]["total_steps"] == 5


def test_a_process_with_one_usable_image_takes_part_in_the_training_step(
    tmp_path, write_real_and_fake_images, training_files
):
    """In the first step, one of the two images of one process is damaged."""
    images = tmp_path / "images"
    images.mkdir()
    write_real_and_fake_images(images, 6, 32)
    shutil.copy(training_files / "rdn.pth", images)
    first = [key.index for key in [*EpochBatchSampler(12, 4, seed=123)][0]]
    cut_file_in_half(images / ("real" if first[1] < 6 else "fake") / f"{first[1] % 6}.png")
    flags = make_arguments_of_train_detector(images, tmp_path / "out", "--fixed-sr --no-cache --epochs 1 --skip-bad")
    log = tmp_path / "log"
    assert run_program_in_two_processes("train_detector.py", flags, log) == [0, 0], log.read_text()
    (line,) = read_epoch_statistics_of_training(tmp_path / "out")
    assert line["left_out"] == 2
    assert read_checkpoint_content(tmp_path / "out/last.pth.tar")["progress"]["total_steps"] == 3


def test_both_processes_of_a_training_stop_on_sigterm_without_a_traceback(training_files, tmp_path):
    flags = make_arguments_of_train_detector(
        training_files, tmp_path / "out", "--mode-sr none --epochs 3 --batch-size 5 --lr 1e-6 VALIDATE"
    )
    for description in ("epoch", "validation"):
        log = tmp_path / description
        accident = partial(patch_progress_bar_to_send_signal, description, 1, signal.SIGTERM)
        codes = run_program_in_two_processes("train_detector.py", [*flags, *AUTO], log, accident)
        assert codes == [143, 143] and "Traceback" not in log.read_text(), log.read_text()


def test_a_run_whose_best_checkpoint_cannot_be_written_writes_it_when_resumed(training_files, tmp_path, monkeypatch):
    flags = "--fixed-sr --epochs 1 VALIDATE"
    run_training(make_arguments_of_train_detector(training_files, tmp_path / "whole", flags))
    save_checkpoint = RunFolder.save_checkpoint

    def raise_disk_full_for_best_checkpoint(self, name, content):
        if name.startswith("best"):
            raise OSError(28, "No space left on device", name)
        save_checkpoint(self, name, content)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_checkpoint", raise_disk_full_for_best_checkpoint)
        with pytest.raises(OSError, match="No space"):
            run_training(make_arguments_of_train_detector(training_files, tmp_path / "stopped", flags))
    assert not (tmp_path / "stopped/best.pth.tar").exists()
    run_training(make_arguments_of_train_detector(training_files, tmp_path / "stopped", f"{flags} --resume auto"))
    for name in ("best.pth.tar", "last.pth.tar"):
        states = [read_checkpoint_without_settings_entry(tmp_path / run / name) for run in ("whole", "stopped")]
        assert not list_differing_checkpoint_entries(*states)
