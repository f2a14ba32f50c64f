"""A training that is killed, stopped or fails, and is then resumed, gives the files of an uninterrupted training."""

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
from files import damage, save, user_error
from processes import finish, kill_in_save, killed_exclusive_writer, signal_in, slow_down, start, two_ranks
from trainings import detector_arguments, differences, read, sr_arguments, stats, status, train, without_settings

from data.datasets import EpochBatches
from data.images import load_image
from evaluation import load
from evaluation.metrics import auroc
from utils.run_folder import EVENTS, RECORD, RECORD_FORMAT, STATS

pytestmark = pytest.mark.usefixtures("small_classifier")

SAVE_EVERY_STEP = ["--save-minutes", "0"]
AUTO = ["--resume", "auto"]
# name of the training: (program, function that returns its arguments, file name of its last state, flags)
TRAININGS = {
    "super-resolution": (
        "train_sr.py",
        sr_arguments,
        "x2/last.pth",
        "--num-epochs 3 --augment --completion --colorization --patches-per-image 2 --eval-file REAL"
        " --lr-decay-epoch 1 --num-save 1 --keep-last 1",
    ),
    "frozen": (
        "train_detector.py",
        detector_arguments,
        "last.pth.tar",
        "--fixed-sr VALIDATE --augment-perturb --epochs 2 --batch-size 5 --crop-size 56 --save-every-epoch 1"
        " --keep-last 1",
    ),
    "cached": (
        "train_detector.py",
        detector_arguments,
        "last.pth.tar",
        "--fixed-sr VALIDATE --epochs 3 --batch-size 5 --crop-size 56 --crops-per-image 2",
    ),
    "end to end": (
        "train_detector.py",
        detector_arguments,
        "last.pth.tar",
        "--mode-sr colorization --idx-stages 1 --micro-batch 2 --lr 1e-6 --epochs 2 --batch-size 5 --crop-size 32",
    ),
}


@pytest.fixture(scope="module")
def arguments(files):
    """Return a function that returns the command line of one of TRAININGS for an output folder and more flags."""

    def make(name, out, *flags):
        _, make_arguments, _, own_flags = TRAININGS[name]
        return [*make_arguments(files, out, own_flags), *flags]

    return make


@pytest.fixture(scope="module")
def uninterrupted_run(arguments, tmp_path_factory):
    """Return a function that runs one of TRAININGS without interruption and returns the output folder."""

    @functools.cache
    def run(name):
        out = tmp_path_factory.mktemp("uninterrupted")
        train(arguments(name, out))
        return out

    return run


@pytest.fixture
def resume_and_compare(arguments, uninterrupted_run):
    """Return a function that resumes a run, and requires bit for bit the files of the uninterrupted run."""

    def check(name, out, *flags):
        train(arguments(name, out, *AUTO, *flags))
        last = TRAININGS[name][2]
        expected, resumed = (uninterrupted_run(name) / last).parent, (out / last).parent
        names = sorted(path.name for path in expected.iterdir() if path.is_file())
        assert sorted(path.name for path in resumed.iterdir() if path.is_file()) == names
        assert (resumed / STATS).read_text() == (expected / STATS).read_text()
        for checkpoint in [name for name in names if ".pth" in name]:
            found = differences(without_settings(expected / checkpoint), without_settings(resumed / checkpoint))
            assert found == [], checkpoint

    return check


# --- killed and stopped -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "workers", "accident"),
    [
        ("super-resolution", 0, partial(kill_in_save, 4)),
        ("super-resolution", 2, partial(signal_in, "epoch", 4, signal.SIGKILL)),
        ("frozen", 0, partial(kill_in_save, 5)),  # save number 5 writes best.pth.tar
        ("frozen", 2, partial(signal_in, "epoch", 3, signal.SIGKILL)),
        ("cached", 0, partial(signal_in, "residuals", 22, signal.SIGKILL)),
        ("cached", 2, partial(signal_in, "epoch", 6, signal.SIGKILL)),
        ("end to end", 0, partial(kill_in_save, 3)),
        ("end to end", 2, partial(signal_in, "epoch", 4, signal.SIGKILL)),
    ],
)
def test_a_killed_training_that_is_resumed_gives_the_files_of_an_uninterrupted_training(
    arguments, resume_and_compare, tmp_path, name, workers, accident
):
    """The run is killed by SIGKILL in a training step, during a save, or while residuals are computed."""
    program, _, last, _ = TRAININGS[name]
    out, log, flags = tmp_path / "out", tmp_path / "log", ["--workers", str(workers)]
    process = start(program, arguments(name, out, *flags, *SAVE_EVERY_STEP), log, accident)
    assert finish(process) == -signal.SIGKILL, log.read_text()
    has_state = accident.args[0] != "residuals"
    assert (out / last).exists() == has_state
    resume_and_compare(name, out, *flags)


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
    arguments, resume_and_compare, tmp_path, name, workers, description, number
):
    """The run is stopped twice. Worker processes also get the signal."""
    program, _, last, _ = TRAININGS[name]
    out = tmp_path / "out"
    for at in (1, 2):
        log = tmp_path / f"log{at}"
        flags = arguments(name, out, *AUTO, "--workers", str(workers))
        accident = partial(signal_in, description, at, number, all_processes=workers > 0)
        assert finish(start(program, flags, log, accident)) == 128 + number, log.read_text()
        assert "Traceback" not in log.read_text()
        assert "saved" in log.read_text().splitlines()[-1]
        assert (out / last).exists()
    if description == "epoch":
        state = read(out / last)
        assert state["progress"]["total_steps"] == 3
        assert state["epoch"] == state["progress"]["epoch"]
    resume_and_compare(name, out)


# --- the state from which a run starts ----------------------------------------------------------------------


def test_a_training_with_resume_auto_and_init_starts_from_init_if_there_is_no_run_to_resume(files, tmp_path):
    """The fine-tuning scripts pass --init and --resume auto. If there is a run to resume, --init has no effect."""
    train(detector_arguments(files, tmp_path / "first", "--fixed-sr --epochs 1 --lr 0"))
    flags = f"--mode-sr none --lw-sr 0 --lr 0 --init {tmp_path}/first/last.pth.tar --resume auto --epochs"
    for epochs in (1, 2):
        train(detector_arguments(files, tmp_path / "second", f"{flags} {epochs}"))
    first, second = (read(tmp_path / name / "last.pth.tar") for name in ("first", "second"))
    assert torch.equal(first["state_dict"]["conv1.0.weight"], second["state_dict"]["conv1.0.weight"])
    assert second["progress"]["epoch"] == 2


def test_a_training_with_resume_file_and_init_resumes_the_file(files, tmp_path):
    train(detector_arguments(files, tmp_path / "first", "--fixed-sr --epochs 1"))
    flags = f"--mode-sr none --lw-sr 0 --lr 0 --init {tmp_path}/first/last.pth.tar --epochs"
    train(detector_arguments(files, tmp_path / "second", f"{flags} 1"))
    train(detector_arguments(files, tmp_path / "second", f"{flags} 2 --resume {tmp_path}/second/0001.pth.tar"))
    assert read(tmp_path / "second/last.pth.tar")["progress"]["epoch"] == 2


@pytest.mark.parametrize("name", ["super-resolution", "cached"])
def test_a_finished_training_is_kept_on_resume_and_replaced_with_overwrite(
    arguments, uninterrupted_run, tmp_path, capfd, name
):
    out, last = tmp_path / "out", TRAININGS[name][2]
    shutil.copytree(uninterrupted_run(name), out)
    before = (out / last).read_bytes()
    code, line = status(arguments(name, out, *AUTO), capfd)
    assert code == 0 and "finished already" in line
    assert (out / last).read_bytes() == before
    flag = "--num-epochs" if name == "super-resolution" else "--epochs"
    train(arguments(name, out, "--overwrite", flag, "1"))
    assert len(stats((out / last).parent)) == 1
    assert read(out / last)["progress"]["epoch"] == 1
    assert not {"0003.pth.tar", "epoch_2.pth"} & {path.name for path in (out / last).parent.iterdir()}


@pytest.mark.parametrize("flags", ["--resume auto", "--resume auto --overwrite"])
def test_resuming_a_training_without_its_flag_fixed_sr_is_refused(files, uninterrupted_run, tmp_path, flags):
    """The run was started with --fixed-sr and is resumed without --fixed-sr."""
    out = tmp_path / "out"
    shutil.copytree(uninterrupted_run("cached"), out)
    before = (out / "last.pth.tar").read_bytes()
    with user_error("last.pth.tar", "--fixed-sr"):
        train(detector_arguments(files, out, f"--epochs 3 {flags}"))
    assert (out / "last.pth.tar").read_bytes() == before


def test_a_training_killed_before_its_first_save_starts_from_the_beginning(files, tmp_path):
    (tmp_path / EVENTS).mkdir()
    (tmp_path / STATS).write_text('{"epoch": 0}\n')
    (tmp_path / RECORD).write_text(json.dumps({"format": RECORD_FORMAT, "files": [RECORD, STATS, EVENTS]}))
    train([*detector_arguments(files, tmp_path, "--fixed-sr --epochs 1"), *AUTO])
    assert len(stats(tmp_path)) == 1


def test_the_error_for_a_truncated_last_state_names_the_newest_numbered_state(files, uninterrupted_run, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(uninterrupted_run("cached"), out)
    last = out / "last.pth.tar"
    last.write_bytes(last.read_bytes()[:1000])
    with user_error("truncated", "--resume", "0003.pth.tar"):
        train([*detector_arguments(files, out, "--fixed-sr"), *AUTO])


@pytest.mark.parametrize("name", ["super-resolution", "frozen"])
def test_a_second_training_in_the_output_folder_of_a_running_training_is_refused(arguments, tmp_path, capfd, name):
    """While another run holds the lock file, nothing is written. The lock of a killed run does not block a new run."""
    folder = (tmp_path / TRAININGS[name][2]).parent
    folder.mkdir(exist_ok=True)
    with killed_exclusive_writer(folder / ".lock") as kill:
        code, line = status(arguments(name, tmp_path), capfd)
        assert code == 2 and "another run" in line
        assert [path.name for path in folder.iterdir()] == [".lock"]
        kill()
        assert status(arguments(name, tmp_path), capfd)[0] == 0
    assert not (folder / ".lock").exists()


# --- options and images that have changed since the run began -----------------------------------------------


def changed_setting_lines(caplog):
    """Return a dict from the name of each changed setting to the log line about it."""
    lines = [record.getMessage() for record in caplog.records if "when the run began" in record.getMessage()]
    return {line.split()[3]: line for line in lines}


def test_a_resumed_training_uses_changed_options_and_reports_them(files, tmp_path, caplog):
    flags = "--mode-sr none --lw-sr 0 --lr 1e-6"
    train(detector_arguments(files, tmp_path, f"{flags} --epochs 1"))
    changed = "--wd 0.5 --momentum 0.3 --lr-sr 0.25 --batch-size 5 --resume auto --epochs 2"
    train(detector_arguments(files, tmp_path, f"{flags} {changed}"))
    classifier, resynthesizer = read(tmp_path / "last.pth.tar")["optimizer"]["param_groups"]
    assert (classifier["weight_decay"], resynthesizer["weight_decay"]) == (0.5 / 0.25, 0.5)
    assert classifier["momentum"] == resynthesizer["momentum"] == 0.3
    assert classifier["lr"] == pytest.approx(0.25e-6) and resynthesizer["lr"] == pytest.approx(1e-6)
    assert changed_setting_lines(caplog).keys() == {
        "weight_decay",
        "momentum",
        "classifier_grad_scale",
        "epochs",
        "batch_size",
    }


def test_a_resumed_training_reports_that_changed_images_are_read_in_another_order(files, tmp_path, caplog):
    shutil.copytree(files, tmp_path / "files")
    flags = detector_arguments(tmp_path / "files", tmp_path / "out", "--fixed-sr --epochs 2")
    log = tmp_path / "log"
    assert finish(start("train_detector.py", flags, log, partial(signal_in, "epoch", 2, signal.SIGTERM))) == 143
    (tmp_path / "files/fake/0.png").unlink()
    train([*flags, *AUTO])
    (line,) = changed_setting_lines(caplog).values()
    assert "10 images" in line and "9 images" in line and "step 2" in line and "order" in line


def validation_lists(folder, files):
    """Return two folders for --eval-file: "easy" with images of one colour, and "hard" with random images."""
    (folder / "easy").mkdir()
    for i in range(3):
        save(folder / f"easy/{i}.png", torch.full((64, 64, 3), 60 * i, dtype=torch.uint8).numpy())
    return {"easy": folder / "easy", "hard": files / "fake"}


def test_changed_evaluation_images_of_train_sr_reset_the_best_score(files, tmp_path, caplog):
    """Without a reset, no epoch on hard images could exceed the score of the first epoch on easy images."""
    lists = validation_lists(tmp_path, files)
    flags = "--vgg-lambda 0 --num-save 1 --resume auto --eval-file"
    train(sr_arguments(files, tmp_path / "out", f"{flags} {lists['easy']} --num-epochs 1"))
    assert read(tmp_path / "out/x2/best.pth")["epoch"] == 1
    train(sr_arguments(files, tmp_path / "out", f"{flags} {lists['hard']} --num-epochs 3"))
    line = changed_setting_lines(caplog)["validation_images"]
    assert "3 images" in line and "5 images" in line and "best score" in line
    assert changed_setting_lines(caplog).keys() == {"validation_images", "num_epochs"}
    scores = {record["epoch"]: record["psnr"] for record in stats(tmp_path / "out/x2")}
    assert scores[0] > max(scores[1], scores[2]) + 3
    state = read(tmp_path / "out/x2/best.pth")
    assert state["epoch"] > 1 and state["progress"]["best"] == max(scores[1], scores[2])


def test_changed_validation_images_of_a_detector_reset_the_best_score(files, tmp_path, caplog):
    flags = "--fixed-sr --lr 0 --save-every-epoch 1"
    train(detector_arguments(files, tmp_path / "out", f"{flags} --epochs 1 VALIDATE"))
    (tmp_path / "one").mkdir()
    shutil.copy(files / "real/0.png", tmp_path / "one")
    changed = f"--epochs 2 --val-root-pos {tmp_path}/one --val-root-neg FAKE --resume auto"
    train(detector_arguments(files, tmp_path / "out", f"{flags} {changed}"))
    assert "validation_images" in changed_setting_lines(caplog)
    assert read(tmp_path / "out/best.pth.tar")["epoch"] == 2


# --- the best epoch -----------------------------------------------------------------------------------------


def test_the_weights_of_the_best_epoch_are_kept_if_no_numbered_file_is_written_for_it(files, tmp_path):
    train(detector_arguments(files, tmp_path / "d", "--fixed-sr VALIDATE --epochs 6 --save-every-epoch 9 --lr 0.1"))
    scores = [line["val_auroc"] for line in stats(tmp_path / "d")]
    state = read(tmp_path / "d/best.pth.tar")
    assert state["progress"]["best"] == max(scores)
    assert state["epoch"] == scores.index(max(scores)) + 1
    train(sr_arguments(files, tmp_path / "s", "--num-epochs 3 --num-save 9 --eval-file REAL --vgg-lambda 0 --lr 0.05"))
    scores = [line["psnr"] for line in stats(tmp_path / "s/x2")]
    assert read(tmp_path / "s/x2/best.pth")["epoch"] == scores.index(max(scores)) + 1


def test_a_black_evaluation_image_does_not_make_the_first_epoch_the_best(files, tmp_path):
    """The error of the black image is 0 in every epoch, so an unlimited PSNR would be infinite.

    With the learning rate of this test, a later epoch is the best.
    """
    images = Path(shutil.copytree(files / "real", tmp_path / "real"))
    save(images / "black.png", torch.zeros(64, 64, 3, dtype=torch.uint8).numpy())
    flags = f"--num-epochs 4 --eval-file {images} --vgg-lambda 0 --num-save 1"
    train(sr_arguments(files, tmp_path / "out", flags))
    scores = [line["psnr"] for line in stats(tmp_path / "out/x2")]
    assert None not in scores and scores.index(max(scores)) > 0
    assert read(tmp_path / "out/x2/best.pth")["epoch"] == scores.index(max(scores)) + 1


# --- images that cannot be used -----------------------------------------------------------------------------


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("flags", ["--fixed-sr --no-cache", "--fixed-sr", "--mode-sr none --lr 1e-6"])
def test_a_training_that_reads_a_damaged_image_ends_with_one_line_and_a_saved_state(
    files, tmp_path, capfd, flags, workers
):
    """The error names the image. After the image is repaired, the resumed run gives the state of an undisturbed run."""
    images = Path(shutil.copytree(files, tmp_path / "files"))
    flags = f"{flags} --epochs 2 --batch-size 5 --workers {workers}"
    train(detector_arguments(images, tmp_path / "expected", flags))
    last = [key.index for batch in EpochBatches(10, 5, seed=123) for key in batch][-1]  # an image of the second step
    path = images / ("real" if last < 5 else "fake") / f"{last % 5}.png"
    times, content = path.stat(), damage(path)
    code, line = status(detector_arguments(images, tmp_path / "out", f"{flags} --resume auto"), capfd)
    assert code == 2 and str(path) in line and "--skip-bad" in line
    if "--no-cache" in flags or "--mode-sr" in flags:  # with a cache, the damage is found before the first step
        assert read(tmp_path / "out/last.pth.tar")["progress"]["total_steps"] == 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    train(detector_arguments(images, tmp_path / "out", f"{flags} --resume auto"))
    expected, resumed = (without_settings(tmp_path / name / "last.pth.tar") for name in ("expected", "out"))
    assert differences(expected, resumed) == []


def test_a_damaged_image_left_out_by_skip_bad_is_reported_once_and_counted_in_each_epoch(files, tmp_path, caplog):
    images = Path(shutil.copytree(files, tmp_path / "files"))
    damage(images / "real/3.png")
    train(detector_arguments(images, tmp_path / "d", "--fixed-sr --epochs 3 --batch-size 3 --skip-bad VALIDATE"))
    assert [line["left_out"] for line in stats(tmp_path / "d")] == [1, 1, 1]
    flags = "--num-epochs 2 --eval-file REAL --vgg-lambda 0"
    train(sr_arguments(images, tmp_path / "s", f"{flags} --batch-size 1 --skip-bad"))
    lines = [record.getMessage() for record in caplog.records if "left out: " in record.getMessage()]
    assert len(lines) == 2 and all("3.png" in line for line in lines)
    with user_error("real/3.png", "--skip-bad"):
        train(sr_arguments(images, tmp_path / "e", flags))


@pytest.fixture
def batch_of_one(tmp_path, write_real_and_fake, files):
    """Return ten images of 32 x 32 pixels. In the last batch of two images, one image is damaged.

    Residuals of 32 x 32 pixels become one value per channel, so batch norm cannot be trained on one image.
    """
    root = tmp_path / "small"
    root.mkdir()
    write_real_and_fake(root, 5, 32)
    shutil.copy(files / "rdn.pth", root)
    order = [key.index for batch in EpochBatches(10, 8, seed=123) for key in batch]
    damage(root / ("real" if order[-1] < 5 else "fake") / f"{order[-1] % 5}.png")
    return root


def test_a_batch_with_one_usable_image_is_left_out_and_reported_in_one_line(batch_of_one, tmp_path, caplog):
    flags = "--fixed-sr --no-cache --epochs 1 --batch-size 8 --skip-bad"
    train(detector_arguments(batch_of_one, tmp_path / "out", flags))
    assert [line["left_out"] for line in stats(tmp_path / "out")] == [2]
    assert read(tmp_path / "out/last.pth.tar")["progress"]["total_steps"] == 1
    lines = [record.getMessage() for record in caplog.records if "batch norm needs at least 2" in record.getMessage()]
    assert len(lines) == 1


# --- full disk, time estimate, TensorBoard and wrong states -------------------------------------------------


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_training_on_a_full_disk_ends_with_one_line_and_can_be_resumed(
    arguments, resume_and_compare, tmp_path, monkeypatch, capfd, call
):
    module, count = os if call == "fsync" else Path, itertools.count(1)
    original = getattr(module, call)

    def fail_later(*values):
        if next(count) >= 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*values)

    with monkeypatch.context() as patch:
        patch.setattr(module, call, fail_later)
        code, line = status(arguments("super-resolution", tmp_path, *SAVE_EVERY_STEP), capfd)
    assert code == 2 and "No space left on device" in line
    assert read(tmp_path / "x2/last.pth")["progress"]["total_steps"] >= 1
    assert not list(tmp_path.rglob(".*.tmp"))
    resume_and_compare("super-resolution", tmp_path)


def test_the_estimate_of_the_remaining_time_does_not_include_filling_the_cache(files, tmp_path):
    """Filling the cache takes 12 s more than an epoch. The first estimate must not include these 12 s."""
    log, epochs = tmp_path / "log", 1_000_000
    flags = detector_arguments(files, tmp_path / "out", f"--fixed-sr --save-every-epoch 1000000 --epochs {epochs}")
    assert finish(start("train_detector.py", flags, log, slow_cache_and_stop)) == 143
    minutes = [int(text) for text in re.findall(r"about (\d+) min left", log.read_text())]
    seconds_per_epoch = [60 * value / epochs for value in minutes]
    assert len(minutes) >= 2
    assert seconds_per_epoch[0] < 6 + max(seconds_per_epoch[1:]), log.read_text()


def slow_cache_and_stop():
    """Make filling the cache 12 s slower, and send SIGTERM in step 9."""
    slow_down("residuals", 12)
    signal_in("epoch", 9, signal.SIGTERM)


def test_tensorboard_shows_each_epoch_of_a_resumed_training_once(files, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = "--mode-sr denoising --lr 1e-6 VALIDATE"
    for epochs in (1, 2):
        train([*detector_arguments(files, tmp_path, f"{flags} --epochs {epochs}"), *AUTO])
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
def test_resuming_a_state_with_an_impossible_value_is_refused_in_one_line(
    files, uninterrupted_run, tmp_path, key, value, words
):
    out = tmp_path / "out"
    shutil.copytree(uninterrupted_run("cached"), out)
    state = read(out / "last.pth.tar")
    state[key] = value
    torch.save(state, out / "last.pth.tar")
    with user_error("last.pth.tar", *words):
        train([*detector_arguments(files, out, "--fixed-sr"), *AUTO])


# --- several processes --------------------------------------------------------------------------------------


def run_in_two_processes(program, flags, log, prepare=None):
    """Run a program in two processes. Returns the two exit statuses."""
    processes = [start(program, flags, log, prepare, **rank) for rank in two_ranks()]
    return [finish(process) for process in processes]


def test_two_processes_train_the_resynthesizer_to_the_weights_of_one_process(files, tmp_path):
    """The two processes are killed and resumed.

    Five images form batches of four and one, so the second process gets no image of the last batch.
    """
    flags = "--num-epochs 2 --batch-size 4 --augment --eval-file FAKE"
    train(sr_arguments(files, tmp_path / "one", flags))
    again = sr_arguments(files, tmp_path / "two", f"{flags} --save-minutes 0 --resume auto --gpu 0")
    log = tmp_path / "log"
    assert (
        run_in_two_processes("train_sr.py", again, log, partial(signal_in, "epoch", 3, signal.SIGKILL))
        == [-signal.SIGKILL] * 2
    )
    assert read(tmp_path / "two/x2/last.pth")["progress"]["total_steps"] == 2, log.read_text()
    assert run_in_two_processes("train_sr.py", again, log) == [0, 0], log.read_text()
    one, two = (read(tmp_path / name / "x2/last.pth") for name in ("one", "two"))
    for key, tensor in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][key], tensor, rtol=0, atol=1e-6)
    assert two["progress"]["best"] == pytest.approx(one["progress"]["best"], abs=1e-4)


def test_the_validation_scores_of_two_processes_are_those_of_the_saved_detector(files, tmp_path):
    """Batch-norm statistics differ between processes. The statistics of the main process are validated and saved."""
    flags = detector_arguments(files, tmp_path / "two", "--fixed-sr --epochs 1 --lr 0.1 --no-cache VALIDATE")
    assert run_in_two_processes("train_detector.py", flags, tmp_path / "log") == [0, 0]
    x = torch.stack([load_image(files / kind / f"{i}.png") for kind in ("fake", "real") for i in range(5)])
    labels = torch.arange(10) // 5
    logits = load(tmp_path / "two/last.pth.tar", device="cpu").logits(x)
    (line,) = stats(tmp_path / "two")
    assert line["val_auroc"] == pytest.approx(auroc((logits[:, 0] - logits[:, 1]).numpy(), labels.numpy() == 0))
    assert line["val_loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)


@pytest.mark.parametrize("flags", ["--fixed-sr --no-cache", "--mode-sr none --lr 1e-6"])
def test_a_process_without_a_usable_image_takes_part_in_the_training_step(files, tmp_path, flags):
    """In batches of two, each process gets one image. One process gets only the damaged image in the second step."""
    images = Path(shutil.copytree(files, tmp_path / "files"))
    second = [key.index for key in [*EpochBatches(10, 2, seed=123)][1]]
    damage(images / ("real" if second[1] < 5 else "fake") / f"{second[1] % 5}.png")
    flags = detector_arguments(images, tmp_path / "out", f"{flags} --epochs 1 --batch-size 2 --skip-bad")
    log = tmp_path / "log"
    assert run_in_two_processes("train_detector.py", flags, log) == [0, 0], log.read_text()
    (line,) = stats(tmp_path / "out")
    assert line["left_out"] == 1 and line["loss"] > 0
    assert read(tmp_path / "out/last.pth.tar")["progress"]["total_steps"] == 5


def test_a_process_with_one_usable_image_takes_part_in_the_training_step(tmp_path, write_real_and_fake, files):
    """In batches of four, each process gets two images. One process has one usable image in the first step."""
    images = tmp_path / "images"
    images.mkdir()
    write_real_and_fake(images, 6, 32)
    shutil.copy(files / "rdn.pth", images)
    first = [key.index for key in [*EpochBatches(12, 4, seed=123)][0]]
    damage(images / ("real" if first[1] < 6 else "fake") / f"{first[1] % 6}.png")
    flags = detector_arguments(images, tmp_path / "out", "--fixed-sr --no-cache --epochs 1 --skip-bad")
    log = tmp_path / "log"
    assert run_in_two_processes("train_detector.py", flags, log) == [0, 0], log.read_text()
    (line,) = stats(tmp_path / "out")
    assert line["left_out"] == 2
    assert read(tmp_path / "out/last.pth.tar")["progress"]["total_steps"] == 3


def test_both_processes_of_a_training_stop_on_sigterm_without_a_traceback(files, tmp_path):
    flags = detector_arguments(files, tmp_path / "out", "--mode-sr none --epochs 3 --batch-size 5 --lr 1e-6 VALIDATE")
    for description in ("epoch", "validation"):
        log = tmp_path / description
        accident = partial(signal_in, description, 1, signal.SIGTERM)
        codes = run_in_two_processes("train_detector.py", [*flags, *AUTO], log, accident)
        assert codes == [143, 143] and "Traceback" not in log.read_text(), log.read_text()
