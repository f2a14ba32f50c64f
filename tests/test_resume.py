"""Killed, stopped, failed, resumed: the end is that of a run never stopped, bit for bit, and nothing is lost."""

import errno
import functools
import itertools
import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from files import mistake
from processes import finish, kill_in_save, killed_exclusive_writer, signal_in, start, two_ranks
from trainings import detector_arguments, differences, read, sr_arguments, stats, status, train, without_settings

from data.datasets import EpochBatches
from data.images import load_image
from evaluation import load
from evaluation.metrics import auroc
from utils.run_folder import RECORD_FORMAT

pytestmark = pytest.mark.usefixtures("small_classifier")

EVERY_STEP = ["--save-minutes", "0"]
AUTO = ["--resume", "auto"]
# program, arguments, the file of its last state, flags
TRAINERS = {
    "super-resolution": ("train_sr.py", sr_arguments, "x2/last.pth",
        "--num-epochs 3 --augment --completion --colorization --patches-per-image 2 --eval-file REAL"
        " --lr-decay-epoch 1 --num-save 1 --keep-last 1"),
    "frozen": ("train_detector.py", detector_arguments, "last.pth.tar",
        "--fixed-sr VALIDATE --augment-perturb --epochs 2 --batch-size 5 --crop-size 56 --save-every-epoch 1"
        " --keep-last 1"),
    "cached": ("train_detector.py", detector_arguments, "last.pth.tar",
        "--fixed-sr VALIDATE --epochs 3 --batch-size 5 --crop-size 56 --crops-per-image 2"),
    "end to end": ("train_detector.py", detector_arguments, "last.pth.tar",
        "--mode-sr colorization --idx-stages 1 --micro-batch 2 --lr 1e-6 --epochs 2 --batch-size 5 --crop-size 32"),
}  # fmt: skip


@pytest.fixture(scope="module")
def arguments(files):
    """Those of one of TRAINERS into a folder."""

    def of(name, out, *more):
        _, make, _, flags = TRAINERS[name]
        return [*make(files, out, flags), *more]

    return of


@pytest.fixture(scope="module")
def whole_run(arguments, tmp_path_factory):
    """The folder of an uninterrupted run of one of TRAINERS."""

    @functools.cache
    def of(name):
        out = tmp_path_factory.mktemp("whole")
        train(arguments(name, out))
        return out

    return of


@pytest.fixture
def goes_on(arguments, whole_run):
    """With --resume auto, a stopped run ends with the files of one never stopped, bit for bit, and no others."""

    def check(name, out, *more):
        train(arguments(name, out, *AUTO, *more))
        last = TRAINERS[name][2]
        whole, stopped = (whole_run(name) / last).parent, (out / last).parent
        names = sorted(p.name for p in whole.iterdir() if p.is_file())
        assert sorted(p.name for p in stopped.iterdir() if p.is_file()) == names
        assert (stopped / "stats.jsonl").read_text() == (whole / "stats.jsonl").read_text()
        for file in (n for n in names if ".pth" in n):
            assert differences(without_settings(whole / file), without_settings(stopped / file)) == [], file

    return check


@pytest.mark.parametrize(
    ("name", "workers", "accident"),
    [
        ("super-resolution", 0, partial(kill_in_save, 4)),
        ("super-resolution", 2, partial(signal_in, "epoch", 4, signal.SIGKILL)),
        ("frozen", 0, partial(kill_in_save, 5)),  # the best so far, of which the last state has to know only then
        ("frozen", 2, partial(signal_in, "epoch", 3, signal.SIGKILL)),
        ("cached", 0, partial(signal_in, "residuals", 22, signal.SIGKILL)),
        ("cached", 2, partial(signal_in, "epoch", 6, signal.SIGKILL)),
        ("end to end", 0, partial(kill_in_save, 3)),
        ("end to end", 2, partial(signal_in, "epoch", 4, signal.SIGKILL)),
    ],
)
def test_a_killed_run_goes_on_where_it_was(arguments, goes_on, tmp_path, name, workers, accident):
    """SIGKILL to a real process, in a step, in the middle of a save, or while residuals are computed."""
    out, log, how = tmp_path / "out", tmp_path / "log", ["--workers", str(workers)]
    flags = arguments(name, out, *how, *EVERY_STEP)
    assert finish(start(TRAINERS[name][0], flags, log, accident)) == -signal.SIGKILL, log.read_text()
    assert (out / TRAINERS[name][2]).exists() == (accident.args[0] != "residuals")
    goes_on(name, out, *how)


@pytest.mark.parametrize(
    ("name", "workers", "what", "number"),
    [
        ("super-resolution", 0, "epoch", signal.SIGINT),
        ("super-resolution", 2, "evaluation", signal.SIGTERM),
        ("frozen", 2, "epoch", signal.SIGTERM),
        ("frozen", 0, "validation", signal.SIGTERM),
        ("cached", 2, "residuals", signal.SIGTERM),
    ],
)
def test_a_stopped_run_saves_its_state_at_once(arguments, goes_on, tmp_path, name, workers, what, number):
    """Twice; its workers get the signal, too."""
    out = tmp_path / "out"
    for at in (1, 2):
        log = tmp_path / f"log{at}"
        flags = arguments(name, out, *AUTO, "--workers", str(workers))
        accident = partial(signal_in, what, at, number, all_processes=workers > 0)
        assert finish(start(TRAINERS[name][0], flags, log, accident)) == 128 + number, log.read_text()
        assert "Traceback" not in log.read_text() and "saved" in log.read_text().splitlines()[-1]
        assert (out / TRAINERS[name][2]).exists()
    if what == "epoch":
        assert read(out / TRAINERS[name][2])["progress"]["total_steps"] == 3
    goes_on(name, out)


# --- where a run starts -------------------------------------------------------------------------------------


def test_with_nothing_to_resume_a_run_starts_from_init(files, tmp_path, capfd):
    """As the scripts for fine-tuning have it; where there is something, --init is not asked."""
    first = "--fixed-sr --epochs 1 --lr 0"
    train(detector_arguments(files, tmp_path / "first", first))
    init = f"--mode-sr none --lw-sr 0 --lr 0 --init {tmp_path}/first/last.pth.tar --resume"
    for epochs in (1, 2):
        train([*detector_arguments(files, tmp_path / "second", f"--epochs {epochs} {init}"), "auto"])
    before, after = (read(tmp_path / name / "last.pth.tar") for name in ("first", "second"))
    assert torch.equal(before["state_dict"]["conv1.0.weight"], after["state_dict"]["conv1.0.weight"])
    assert after["progress"]["epoch"] == 2
    numbered = [str(tmp_path / "second/0001.pth.tar")]  # named by the user, beside the --init of a script
    assert status([*detector_arguments(files, tmp_path / "second", f"--epochs 2 {init}"), *numbered], capfd)[0] == 0
    assert status([*detector_arguments(files, tmp_path / "third", f"--epochs 1 {init}"), ""], capfd)[0] == 0


@pytest.mark.parametrize("name", ["super-resolution", "cached"])
def test_an_occupied_folder_is_refused(arguments, whole_run, tmp_path, capfd, name):
    out, last = tmp_path / "out", TRAINERS[name][2]
    shutil.copytree(whole_run(name), out)
    before = {p: p.read_bytes() for p in (out / last).parent.iterdir() if p.is_file()}
    code, line = status(arguments(name, out), capfd)
    assert code == 2 and "--resume auto" in line and "--overwrite" in line
    assert {p: p.read_bytes() for p in before} == before
    code, line = status(arguments(name, out, *AUTO), capfd)
    assert code == 0 and "finished already" in line
    one = ["--num-epochs", "1"] if name == "super-resolution" else ["--epochs", "1"]
    train(arguments(name, out, "--overwrite", *one))
    assert len(stats((out / last).parent)) == 1 and read(out / last)["progress"]["epoch"] == 1
    assert not {"0003.pth.tar", "epoch_2.pth"} & {p.name for p in (out / last).parent.iterdir()}


def test_a_flag_forgotten_on_resume_never_starts_over(files, whole_run, tmp_path, capfd):
    out = tmp_path / "out"
    shutil.copytree(whole_run("cached"), out)
    before = (out / "last.pth.tar").read_bytes()
    for more in (AUTO, [*AUTO, "--overwrite"]):
        code, line = status([*detector_arguments(files, out, "--epochs 3"), *more], capfd)  # no --fixed-sr
        assert code == 2 and "last.pth.tar" in line
    assert (out / "last.pth.tar").read_bytes() == before


def test_a_run_killed_before_its_first_state_begins_anew(files, tmp_path):
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "stats.jsonl").write_text('{"epoch": 0}\n')
    record = {"format": RECORD_FORMAT, "files": ["config.json", "stats.jsonl", "tensorboard"]}
    (tmp_path / "config.json").write_text(json.dumps(record))
    train([*detector_arguments(files, tmp_path, "--fixed-sr --epochs 1"), *AUTO])
    assert len(stats(tmp_path)) == 1


def test_what_config_says_is_what_runs(files, tmp_path, caplog):
    """Decay, momentum and the classifier's rate of a resumed run are those asked for, and so is what is recorded."""
    flags = "--mode-sr none --lw-sr 0 --lr 1e-6"
    train(detector_arguments(files, tmp_path, f"{flags} --epochs 1"))
    now = "--wd 0.5 --momentum 0.3 --lr-sr 0.25 --batch-size 5 --resume auto --epochs 2"
    train(detector_arguments(files, tmp_path, f"{flags} {now}"))
    classifier, rdn = read(tmp_path / "last.pth.tar")["optimizer"]["param_groups"]
    assert (classifier["weight_decay"], rdn["weight_decay"]) == (0.5 / 0.25, 0.5)
    assert classifier["momentum"] == rdn["momentum"] == 0.3
    assert classifier["lr"] == pytest.approx(0.25e-6) and rdn["lr"] == pytest.approx(1e-6)
    said = {r.message.split()[1] for r in caplog.records if "when the run began" in r.message}
    assert said == {"weight_decay", "momentum", "classifier_grad_scale", "epochs", "batch_size"}


def test_changed_images_are_said_with_what_that_does(files, tmp_path, caplog):
    shutil.copytree(files, tmp_path / "files")
    flags = detector_arguments(tmp_path / "files", tmp_path / "out", "--fixed-sr --epochs 2 --save-minutes 0")
    log = tmp_path / "log"
    assert finish(start("train_detector.py", flags, log, partial(signal_in, "epoch", 2, signal.SIGTERM))) == 143
    (tmp_path / "files/fake/0.png").unlink()
    train([*flags, *AUTO])
    (line,) = [r.message for r in caplog.records if "when the run began" in r.message]
    assert "10 images" in line and "9 images" in line and "step 2" in line and "order" in line


def test_best_is_the_best_of_all_epochs(files, tmp_path):
    """Not only of those that are kept. Each epoch validates with a classifier of its own."""
    train(detector_arguments(files, tmp_path / "d", "--fixed-sr VALIDATE --epochs 6 --save-every-epoch 9 --lr 0.1"))
    scores = [line["val_auroc"] for line in stats(tmp_path / "d")]
    state = read(tmp_path / "d/best.pth.tar")
    assert state["progress"]["best"] == max(scores) and state["epoch"] == scores.index(max(scores)) + 1
    train(sr_arguments(files, tmp_path / "s", "--num-epochs 3 --num-save 9 --eval-file REAL --vgg-lambda 0 --lr 0.05"))
    scores = [line["psnr"] for line in stats(tmp_path / "s/x2")]
    assert read(tmp_path / "s/x2/best.pth")["epoch"] == scores.index(max(scores)) + 1


def test_a_damaged_last_state_names_the_newest_numbered_one(files, whole_run, tmp_path, capfd):
    """And a bit that has turned in the weights is no longer silent."""
    out = tmp_path / "out"
    shutil.copytree(whole_run("cached"), out)
    last = out / "last.pth.tar"
    state = read(last)
    state["state_dict"]["fc.weight"].view(torch.int32)[0, 0] ^= 1 << 10
    torch.save(state, tmp_path / "flipped.pth.tar")
    flags = f"--fixed-sr --init {tmp_path}/flipped.pth.tar"
    code, line = status(detector_arguments(files, tmp_path / "x", flags), capfd)
    assert code == 2 and "classifier" in line and "damaged" in line
    last.write_bytes(last.read_bytes()[:1000])
    code, line = status([*detector_arguments(files, out, "--fixed-sr"), *AUTO], capfd)
    assert code == 2 and "--resume" in line and "0003.pth.tar" in line


@pytest.mark.parametrize("name", ["super-resolution", "frozen"])
def test_two_runs_do_not_write_into_one_folder(arguments, tmp_path, capfd, name):
    """Nothing is written while another run lives; one that was killed is in nobody's way, even if its worker lives."""
    folder = (tmp_path / TRAINERS[name][2]).parent
    folder.mkdir(exist_ok=True)
    with killed_exclusive_writer(folder / ".lock") as kill:
        assert status(arguments(name, tmp_path), capfd)[0] == 2
        assert [p.name for p in folder.iterdir()] == [".lock"]
        kill()
        assert status(arguments(name, tmp_path), capfd)[0] == 0
    assert not (folder / ".lock").exists()


# --- what goes wrong on the way -----------------------------------------------------------------------------


def damage(path):
    """A byte of a PNG's pixels, which no header shows. Returns the file's content before."""
    whole = path.read_bytes()
    at = len(whole) // 2
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
    return whole


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("flags", ["--fixed-sr --no-cache", "--fixed-sr", "--mode-sr none --lr 1e-6"])
def test_an_image_that_cannot_be_read_costs_nothing_that_was_done(files, tmp_path, capfd, flags, workers):
    """The state is saved, the image named; mended, the run goes on to the end it would have had."""
    shutil.copytree(files, tmp_path / "files")
    flags = f"{flags} --epochs 2 --batch-size 5 --workers {workers}"
    here = partial(detector_arguments, tmp_path / "files")
    train(here(tmp_path / "whole", flags))
    last = [key.index for batch in EpochBatches(10, 5, seed=123) for key in batch][-1]  # met in the second step
    bad = tmp_path / "files" / ("real" if last < 5 else "fake") / f"{last % 5}.png"
    times, whole = bad.stat(), damage(bad)
    code, line = status(here(tmp_path / "out", f"{flags} --resume auto"), capfd)
    assert code == 2 and str(bad) in line and "--skip-bad" in line
    if "--fixed-sr --epochs" not in flags:  # with a cache, it is found before the first step
        assert read(tmp_path / "out/last.pth.tar")["progress"]["total_steps"] == 1
    train(here(tmp_path / "skip", f"{flags} --skip-bad VALIDATE"))
    told = [r for r in stats(tmp_path / "skip") if r.get("left_out")]
    assert [line["left_out"] for line in told] == [1, 1]
    bad.write_bytes(whole)
    os.utime(bad, ns=(times.st_atime_ns, times.st_mtime_ns))
    train(here(tmp_path / "out", f"{flags} --resume auto"))
    assert differences(*(without_settings(tmp_path / name / "last.pth.tar") for name in ("whole", "out"))) == []


def test_an_image_left_out_is_told_once(files, tmp_path, caplog):
    shutil.copytree(files, tmp_path / "files")
    damage(tmp_path / "files/real/3.png")
    images = tmp_path / "files"
    train(detector_arguments(images, tmp_path / "d", "--fixed-sr --epochs 3 --batch-size 3 --skip-bad"))
    flags = "--num-epochs 2 --eval-file REAL --vgg-lambda 0"
    train(sr_arguments(images, tmp_path / "s", f"{flags} --batch-size 1 --skip-bad"))
    said = [r.message for r in caplog.records if "left out: " in r.message]
    assert len(said) == 2 and all("3.png" in line for line in said)
    with mistake("real/3.png", "--skip-bad"):
        train(sr_arguments(images, tmp_path / "e", flags))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_ends_a_run_in_one_line_and_loses_nothing(arguments, goes_on, tmp_path, monkeypatch, capfd, call):
    where, count = os if call == "fsync" else Path, itertools.count(1)
    real = getattr(where, call)

    def full(*what):
        if next(count) >= 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*what)

    with monkeypatch.context() as patch:
        patch.setattr(where, call, full)
        code, line = status(arguments("super-resolution", tmp_path, *EVERY_STEP), capfd)
    assert code == 2 and "No space left on device" in line
    assert read(tmp_path / "x2/last.pth")["progress"]["total_steps"] >= 1 and not list(tmp_path.rglob(".*.tmp"))
    goes_on("super-resolution", tmp_path)


def test_tensorboard_goes_on_after_a_resume(files, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for epochs in (1, 2):
        flags = f"--num-epochs {epochs} --num-save 1 --vgg-lambda 0 --eval-file REAL"
        train([*sr_arguments(files, tmp_path, flags), *AUTO])
    events = EventAccumulator(str(tmp_path / "x2/tensorboard"), size_guidance={"images": 0}).Reload()
    assert [e.step for e in events.Images("input, re-synthesis, target")] == [1, 2]
    assert [e.step for e in events.Scalars("psnr")] == [1, 2]


def test_pictures_survive_a_resume(files, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = "--mode-sr denoising --lr 1e-6 VALIDATE"
    for epochs in (1, 2):
        train([*detector_arguments(files, tmp_path, f"{flags} --epochs {epochs}"), *AUTO])
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0}).Reload()
    for tag in ("resynthesis/real", "resynthesis/fake_degraded"):
        assert [e.step for e in events.Images(tag)] == [0, 1, 2]
    assert [e.step for e in events.Scalars("val_auroc")] == [1, 2]


# --- several processes --------------------------------------------------------------------------------------


def in_two(program, flags, log, prepare=None):
    processes = [start(program, flags, log, prepare, **rank) for rank in two_ranks()]
    return [finish(process) for process in processes]


def test_two_processes_train_rdn_as_one(files, tmp_path):
    """Killed, and started again. Five images in batches of four and one: the second has no share of the last one."""
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


def test_two_processes_validate_what_they_write(files, tmp_path):
    """Batch normalisation has statistics of each process's share; those written are those validated."""
    flags = detector_arguments(files, tmp_path / "two", "--fixed-sr --epochs 1 --lr 0.1 --no-cache VALIDATE")
    assert in_two("train_detector.py", flags, tmp_path / "log") == [0, 0]
    x = torch.stack([load_image(files / kind / f"{i}.png") for kind in ("fake", "real") for i in range(5)])
    detector, labels = load(tmp_path / "two/last.pth.tar", device="cpu"), torch.arange(10) // 5
    logits = detector.logits(x)
    (line,) = stats(tmp_path / "two")
    assert line["val_auroc"] == pytest.approx(auroc((logits[:, 0] - logits[:, 1]).numpy(), labels.numpy() == 0))
    assert line["val_loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)


@pytest.mark.parametrize("flags", ["--fixed-sr --no-cache", "--mode-sr none --lr 1e-6"])
def test_of_two_processes_one_has_a_share_that_cannot_be_read(files, tmp_path, flags):
    """Batches of two: the image damaged is all that its process has of the second one."""
    shutil.copytree(files, tmp_path / "files")
    second = [key.index for key in [*EpochBatches(10, 2, seed=123)][1]]
    damage(tmp_path / "files" / ("real" if second[1] < 5 else "fake") / f"{second[1] % 5}.png")
    flags = f"{flags} --epochs 1 --batch-size 2 --skip-bad"
    again = detector_arguments(tmp_path / "files", tmp_path / "out", flags)
    assert in_two("train_detector.py", again, log := tmp_path / "log") == [0, 0], log.read_text()
    (line,) = stats(tmp_path / "out")
    assert line["left_out"] == 1 and line["loss"] > 0
    assert read(tmp_path / "out/last.pth.tar")["progress"]["total_steps"] == 5


def test_of_two_processes_both_stop(files, tmp_path):
    flags = detector_arguments(files, tmp_path / "out", "--mode-sr none --epochs 3 --batch-size 5 --lr 1e-6 VALIDATE")
    for what in ("epoch", "validation"):
        log = tmp_path / what
        again = [*flags, *AUTO]
        codes = in_two("train_detector.py", again, log, partial(signal_in, what, 1, signal.SIGTERM))
        assert codes == [143, 143] and "Traceback" not in log.read_text(), log.read_text()
