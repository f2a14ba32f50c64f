"""A run that was killed, stopped or has failed, and is resumed, ends as if it had never stopped, bit for bit."""

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
from files import damage, mistake, save
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
# name: program, function that makes its arguments, file of the last state, flags
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
    """Return a function that makes the arguments of one of TRAININGS, for an output folder, with further flags."""

    def make(name, out, *flags):
        _, make_arguments, _, own_flags = TRAININGS[name]
        return [*make_arguments(files, out, own_flags), *flags]

    return make


@pytest.fixture(scope="module")
def uninterrupted_run(arguments, tmp_path_factory):
    """Return a function that returns the folder of an uninterrupted run of one of TRAININGS."""

    @functools.cache
    def run(name):
        out = tmp_path_factory.mktemp("uninterrupted")
        train(arguments(name, out))
        return out

    return run


@pytest.fixture
def resume_and_compare(arguments, uninterrupted_run):
    """Return a function that resumes a run, and requires the files of the uninterrupted run, bit for bit."""

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
        ("frozen", 0, partial(kill_in_save, 5)),  # while best.pth.tar is written, before the last state records it
        ("frozen", 2, partial(signal_in, "epoch", 3, signal.SIGKILL)),
        ("cached", 0, partial(signal_in, "residuals", 22, signal.SIGKILL)),
        ("cached", 2, partial(signal_in, "epoch", 6, signal.SIGKILL)),
        ("end to end", 0, partial(kill_in_save, 3)),
        ("end to end", 2, partial(signal_in, "epoch", 4, signal.SIGKILL)),
    ],
)
def test_a_killed_run_resumes_exactly(arguments, resume_and_compare, tmp_path, name, workers, accident):
    """SIGKILL in a step, in the middle of a save, or while residuals are computed."""
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
def test_a_stopped_run_saves_its_state(arguments, resume_and_compare, tmp_path, name, workers, description, number):
    """The run is stopped twice. If it has workers, they get the signal, too."""
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


# --- where a run starts -------------------------------------------------------------------------------------


def test_with_nothing_to_resume_a_run_starts_from_init(files, tmp_path):
    """The fine-tuning scripts pass both flags. Once there is a run to resume, --init has no effect."""
    train(detector_arguments(files, tmp_path / "first", "--fixed-sr --epochs 1 --lr 0"))
    flags = f"--mode-sr none --lw-sr 0 --lr 0 --init {tmp_path}/first/last.pth.tar --resume auto --epochs"
    for epochs in (1, 2):
        train(detector_arguments(files, tmp_path / "second", f"{flags} {epochs}"))
    first, second = (read(tmp_path / name / "last.pth.tar") for name in ("first", "second"))
    assert torch.equal(first["state_dict"]["conv1.0.weight"], second["state_dict"]["conv1.0.weight"])
    assert second["progress"]["epoch"] == 2


def test_a_state_named_by_the_user_is_resumed_although_there_is_an_init(files, tmp_path):
    train(detector_arguments(files, tmp_path / "first", "--fixed-sr --epochs 1"))
    flags = f"--mode-sr none --lw-sr 0 --lr 0 --init {tmp_path}/first/last.pth.tar --epochs"
    train(detector_arguments(files, tmp_path / "second", f"{flags} 1"))
    train(detector_arguments(files, tmp_path / "second", f"{flags} 2 --resume {tmp_path}/second/0001.pth.tar"))
    assert read(tmp_path / "second/last.pth.tar")["progress"]["epoch"] == 2


@pytest.mark.parametrize("name", ["super-resolution", "cached"])
def test_a_finished_run_is_resumed_without_work_and_replaced_with_overwrite(
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
def test_a_flag_that_is_missing_on_resume_never_starts_a_new_run(files, uninterrupted_run, tmp_path, flags):
    """The run was started with --fixed-sr."""
    out = tmp_path / "out"
    shutil.copytree(uninterrupted_run("cached"), out)
    before = (out / "last.pth.tar").read_bytes()
    with mistake("last.pth.tar", "--fixed-sr"):
        train(detector_arguments(files, out, f"--epochs 3 {flags}"))
    assert (out / "last.pth.tar").read_bytes() == before


def test_a_run_that_was_killed_before_its_first_save_starts_again(files, tmp_path):
    (tmp_path / EVENTS).mkdir()
    (tmp_path / STATS).write_text('{"epoch": 0}\n')
    (tmp_path / RECORD).write_text(json.dumps({"format": RECORD_FORMAT, "files": [RECORD, STATS, EVENTS]}))
    train([*detector_arguments(files, tmp_path, "--fixed-sr --epochs 1"), *AUTO])
    assert len(stats(tmp_path)) == 1


def test_a_damaged_last_state_names_the_newest_numbered_one(files, uninterrupted_run, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(uninterrupted_run("cached"), out)
    last = out / "last.pth.tar"
    last.write_bytes(last.read_bytes()[:1000])
    with mistake("truncated", "--resume", "0003.pth.tar"):
        train([*detector_arguments(files, out, "--fixed-sr"), *AUTO])


@pytest.mark.parametrize("name", ["super-resolution", "frozen"])
def test_two_runs_do_not_write_into_one_folder(arguments, tmp_path, capfd, name):
    """Nothing is written while another run is alive. A run that was killed leaves nothing in the way."""
    folder = (tmp_path / TRAININGS[name][2]).parent
    folder.mkdir(exist_ok=True)
    with killed_exclusive_writer(folder / ".lock") as kill:
        code, line = status(arguments(name, tmp_path), capfd)
        assert code == 2 and "another run" in line
        assert [path.name for path in folder.iterdir()] == [".lock"]
        kill()
        assert status(arguments(name, tmp_path), capfd)[0] == 0
    assert not (folder / ".lock").exists()


# --- what has changed since the run began -------------------------------------------------------------------


def changes(caplog):
    """Return the lines on changed settings, by the name of the setting."""
    lines = [record.getMessage() for record in caplog.records if "when the run began" in record.getMessage()]
    return {line.split()[1]: line for line in lines}


def test_a_resumed_run_uses_the_options_that_it_is_given(files, tmp_path, caplog):
    flags = "--mode-sr none --lw-sr 0 --lr 1e-6"
    train(detector_arguments(files, tmp_path, f"{flags} --epochs 1"))
    changed = "--wd 0.5 --momentum 0.3 --lr-sr 0.25 --batch-size 5 --resume auto --epochs 2"
    train(detector_arguments(files, tmp_path, f"{flags} {changed}"))
    classifier, resynthesizer = read(tmp_path / "last.pth.tar")["optimizer"]["param_groups"]
    assert (classifier["weight_decay"], resynthesizer["weight_decay"]) == (0.5 / 0.25, 0.5)
    assert classifier["momentum"] == resynthesizer["momentum"] == 0.3
    assert classifier["lr"] == pytest.approx(0.25e-6) and resynthesizer["lr"] == pytest.approx(1e-6)
    assert changes(caplog).keys() == {"weight_decay", "momentum", "classifier_grad_scale", "epochs", "batch_size"}


def test_changed_training_images_are_reported_with_the_effect_on_their_order(files, tmp_path, caplog):
    shutil.copytree(files, tmp_path / "files")
    flags = detector_arguments(tmp_path / "files", tmp_path / "out", "--fixed-sr --epochs 2")
    log = tmp_path / "log"
    assert finish(start("train_detector.py", flags, log, partial(signal_in, "epoch", 2, signal.SIGTERM))) == 143
    (tmp_path / "files/fake/0.png").unlink()
    train([*flags, *AUTO])
    (line,) = changes(caplog).values()
    assert "10 images" in line and "9 images" in line and "step 2" in line and "order" in line


def validation_lists(folder, files):
    """Write two lists of images for --eval-file: images of one colour, which are easy, and random images."""
    (folder / "easy").mkdir()
    for i in range(3):
        save(folder / f"easy/{i}.png", torch.full((64, 64, 3), 60 * i, dtype=torch.uint8).numpy())
    return {"easy": folder / "easy", "hard": files / "fake"}


def test_changed_evaluation_images_reset_the_best_score(files, tmp_path, caplog):
    """Otherwise no epoch could be better on hard images than the first epoch was on easy ones."""
    lists = validation_lists(tmp_path, files)
    flags = "--vgg-lambda 0 --num-save 1 --resume auto --eval-file"
    train(sr_arguments(files, tmp_path / "out", f"{flags} {lists['easy']} --num-epochs 1"))
    assert read(tmp_path / "out/x2/best.pth")["epoch"] == 1
    train(sr_arguments(files, tmp_path / "out", f"{flags} {lists['hard']} --num-epochs 3"))
    line = changes(caplog)["validation_images"]
    assert "3 images" in line and "5 images" in line and "best score" in line
    assert changes(caplog).keys() == {"validation_images", "num_epochs"}
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
    assert "validation_images" in changes(caplog)
    assert read(tmp_path / "out/best.pth.tar")["epoch"] == 2


# --- the best epoch -----------------------------------------------------------------------------------------


def test_the_best_epoch_is_kept_even_if_it_has_no_numbered_file(files, tmp_path):
    train(detector_arguments(files, tmp_path / "d", "--fixed-sr VALIDATE --epochs 6 --save-every-epoch 9 --lr 0.1"))
    scores = [line["val_auroc"] for line in stats(tmp_path / "d")]
    state = read(tmp_path / "d/best.pth.tar")
    assert state["progress"]["best"] == max(scores)
    assert state["epoch"] == scores.index(max(scores)) + 1
    train(sr_arguments(files, tmp_path / "s", "--num-epochs 3 --num-save 9 --eval-file REAL --vgg-lambda 0 --lr 0.05"))
    scores = [line["psnr"] for line in stats(tmp_path / "s/x2")]
    assert read(tmp_path / "s/x2/best.pth")["epoch"] == scores.index(max(scores)) + 1


def test_one_black_image_does_not_make_the_first_epoch_the_best(files, tmp_path):
    """Its error is 0 in every epoch, and its PSNR would be infinite. The learning rate makes later epochs better."""
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
def test_a_damaged_image_ends_the_run_with_its_state_saved(files, tmp_path, capfd, flags, workers):
    """The image is named. Once it is repaired, the run ends as if nothing had happened."""
    images = Path(shutil.copytree(files, tmp_path / "files"))
    flags = f"{flags} --epochs 2 --batch-size 5 --workers {workers}"
    train(detector_arguments(images, tmp_path / "expected", flags))
    last = [key.index for batch in EpochBatches(10, 5, seed=123) for key in batch][-1]  # read in the second step
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


def test_an_image_that_is_left_out_is_reported_once_and_counted_in_each_epoch(files, tmp_path, caplog):
    images = Path(shutil.copytree(files, tmp_path / "files"))
    damage(images / "real/3.png")
    train(detector_arguments(images, tmp_path / "d", "--fixed-sr --epochs 3 --batch-size 3 --skip-bad VALIDATE"))
    assert [line["left_out"] for line in stats(tmp_path / "d")] == [1, 1, 1]
    flags = "--num-epochs 2 --eval-file REAL --vgg-lambda 0"
    train(sr_arguments(images, tmp_path / "s", f"{flags} --batch-size 1 --skip-bad"))
    lines = [record.getMessage() for record in caplog.records if "left out: " in record.getMessage()]
    assert len(lines) == 2 and all("3.png" in line for line in lines)
    with mistake("real/3.png", "--skip-bad"):
        train(sr_arguments(images, tmp_path / "e", flags))


@pytest.fixture
def batch_of_one(tmp_path, write_real_and_fake, files):
    """Return ten images of 32 x 32 pixels, of which one is damaged, and of the last two read, one stays alone.

    Residuals of this size leave one value per channel, on which batch norm cannot be trained.
    """
    root = tmp_path / "small"
    root.mkdir()
    write_real_and_fake(root, 5, 32)
    shutil.copy(files / "rdn.pth", root)
    order = [key.index for batch in EpochBatches(10, 8, seed=123) for key in batch]
    damage(root / ("real" if order[-1] < 5 else "fake") / f"{order[-1] % 5}.png")
    return root


def test_a_batch_with_one_usable_image_is_left_out_with_one_line(batch_of_one, tmp_path, caplog):
    flags = "--fixed-sr --no-cache --epochs 1 --batch-size 8 --skip-bad"
    train(detector_arguments(batch_of_one, tmp_path / "out", flags))
    assert [line["left_out"] for line in stats(tmp_path / "out")] == [2]
    assert read(tmp_path / "out/last.pth.tar")["progress"]["total_steps"] == 1
    lines = [record.getMessage() for record in caplog.records if "batch norm needs at least 2" in record.getMessage()]
    assert len(lines) == 1


# --- other accidents ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_ends_a_run_in_one_line_and_loses_nothing(
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


def test_the_remaining_time_does_not_count_the_filling_of_the_cache(files, tmp_path):
    """Filling takes 6 s here, and an epoch a fraction of that: the first estimate must be like the second."""
    log, epochs = tmp_path / "log", 1_000_000
    flags = detector_arguments(files, tmp_path / "out", f"--fixed-sr --save-every-epoch 1000000 --epochs {epochs}")
    assert finish(start("train_detector.py", flags, log, slow_cache_and_stop)) == 143
    minutes = [int(text) for text in re.findall(r"about (\d+) min left", log.read_text())]
    seconds_per_epoch = [60 * value / epochs for value in minutes]
    assert len(minutes) >= 2
    assert seconds_per_epoch[0] < 6, log.read_text()


def slow_cache_and_stop():
    slow_down("residuals", 6)
    signal_in("epoch", 9, signal.SIGTERM)


def test_tensorboard_records_each_epoch_once_after_a_resume(files, tmp_path):
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
def test_a_state_with_impossible_values_is_refused_in_one_line(files, uninterrupted_run, tmp_path, key, value, words):
    out = tmp_path / "out"
    shutil.copytree(uninterrupted_run("cached"), out)
    state = read(out / "last.pth.tar")
    state[key] = value
    torch.save(state, out / "last.pth.tar")
    with mistake("last.pth.tar", *words):
        train([*detector_arguments(files, out, "--fixed-sr"), *AUTO])


# --- several processes --------------------------------------------------------------------------------------


def in_two(program, flags, log, prepare=None):
    """Run a program in two processes. Returns their exit statuses."""
    processes = [start(program, flags, log, prepare, **rank) for rank in two_ranks()]
    return [finish(process) for process in processes]


def test_two_processes_train_the_resynthesizer_as_one(files, tmp_path):
    """They are killed and resumed. Five images in batches of four and one: the second process has none of the last."""
    flags = "--num-epochs 2 --batch-size 4 --augment --eval-file FAKE"
    train(sr_arguments(files, tmp_path / "one", flags))
    again = sr_arguments(files, tmp_path / "two", f"{flags} --save-minutes 0 --resume auto --gpu 0")
    log = tmp_path / "log"
    assert in_two("train_sr.py", again, log, partial(signal_in, "epoch", 3, signal.SIGKILL)) == [-signal.SIGKILL] * 2
    assert read(tmp_path / "two/x2/last.pth")["progress"]["total_steps"] == 2, log.read_text()
    assert in_two("train_sr.py", again, log) == [0, 0], log.read_text()
    one, two = (read(tmp_path / name / "x2/last.pth") for name in ("one", "two"))
    for key, tensor in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][key], tensor, rtol=0, atol=1e-6)
    assert two["progress"]["best"] == pytest.approx(one["progress"]["best"], abs=1e-4)


def test_two_processes_validate_the_detector_that_they_save(files, tmp_path):
    """Each process has batch-norm statistics of its own images. Those of the main process are validated and saved."""
    flags = detector_arguments(files, tmp_path / "two", "--fixed-sr --epochs 1 --lr 0.1 --no-cache VALIDATE")
    assert in_two("train_detector.py", flags, tmp_path / "log") == [0, 0]
    x = torch.stack([load_image(files / kind / f"{i}.png") for kind in ("fake", "real") for i in range(5)])
    labels = torch.arange(10) // 5
    logits = load(tmp_path / "two/last.pth.tar", device="cpu").logits(x)
    (line,) = stats(tmp_path / "two")
    assert line["val_auroc"] == pytest.approx(auroc((logits[:, 0] - logits[:, 1]).numpy(), labels.numpy() == 0))
    assert line["val_loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)


@pytest.mark.parametrize("flags", ["--fixed-sr --no-cache", "--mode-sr none --lr 1e-6"])
def test_a_process_without_a_usable_image_takes_the_step_all_the_same(files, tmp_path, flags):
    """Batches of two: the damaged image is all that its process has of the second batch."""
    images = Path(shutil.copytree(files, tmp_path / "files"))
    second = [key.index for key in [*EpochBatches(10, 2, seed=123)][1]]
    damage(images / ("real" if second[1] < 5 else "fake") / f"{second[1] % 5}.png")
    flags = detector_arguments(images, tmp_path / "out", f"{flags} --epochs 1 --batch-size 2 --skip-bad")
    log = tmp_path / "log"
    assert in_two("train_detector.py", flags, log) == [0, 0], log.read_text()
    (line,) = stats(tmp_path / "out")
    assert line["left_out"] == 1 and line["loss"] > 0
    assert read(tmp_path / "out/last.pth.tar")["progress"]["total_steps"] == 5


def test_a_process_with_one_usable_image_takes_the_step_all_the_same(tmp_path, write_real_and_fake, files):
    """Twelve images in batches of four, two for each process. One process has a single image of its first batch."""
    images = tmp_path / "images"
    images.mkdir()
    write_real_and_fake(images, 6, 32)
    shutil.copy(files / "rdn.pth", images)
    first = [key.index for key in [*EpochBatches(12, 4, seed=123)][0]]
    damage(images / ("real" if first[1] < 6 else "fake") / f"{first[1] % 6}.png")
    flags = detector_arguments(images, tmp_path / "out", "--fixed-sr --no-cache --epochs 1 --skip-bad")
    log = tmp_path / "log"
    assert in_two("train_detector.py", flags, log) == [0, 0], log.read_text()
    (line,) = stats(tmp_path / "out")
    assert line["left_out"] == 2
    assert read(tmp_path / "out/last.pth.tar")["progress"]["total_steps"] == 3


def test_two_processes_stop_together(files, tmp_path):
    flags = detector_arguments(files, tmp_path / "out", "--mode-sr none --epochs 3 --batch-size 5 --lr 1e-6 VALIDATE")
    for description in ("epoch", "validation"):
        log = tmp_path / description
        accident = partial(signal_in, description, 1, signal.SIGTERM)
        codes = in_two("train_detector.py", [*flags, *AUTO], log, accident)
        assert codes == [143, 143] and "Traceback" not in log.read_text(), log.read_text()
