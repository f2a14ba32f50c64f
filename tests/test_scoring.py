"""test.py as a user runs it: the released logits, the files it writes, stopped and killed runs, processes, mistakes."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_rule import fill
from PIL import Image
from processes import finish, killed_exclusive_writer, signal_in_batch, start, two_ranks
from trainings import detector_arguments, read, train

import test as program
from evaluation import load
from evaluation.score_table import COLUMNS, read_table
from models.features import VGG19
from models.rdn import RDN
from models.resnet import DeepStemResNet
from utils.errors import run_program
from utils.options import test_parser as parser_of_test

GOLDEN = Path(__file__).parent / "golden" / "reference_outputs.npz"
TINY = {"num_features": 8, "growth_rate": 8, "num_blocks": 1, "num_layers": 2}
CONFIG = {"detector": {"arch": "resnet18", "stage": 0, "dilated": False}}
IMAGES = 9


def score(*argv) -> int:
    """What `python test.py ARGV` does, in this process; its exit status."""
    try:
        return run_program(partial(program.main, parser_of_test().parse_args([str(a) for a in argv])))
    except SystemExit as stopped:  # argparse
        return stopped.code


def mistake(capfd, *argv) -> str:
    """Run, and check that it was refused with exit status 2, nothing on stdout, and one line of it, which is given."""
    capfd.readouterr()
    assert score(*argv) == 2
    out, err = capfd.readouterr()
    *before, line = err.splitlines()
    assert line.startswith("error: ") and out == "" and "error: " not in "".join(before) and "Traceback" not in err, err
    return line


def write_image(path: Path, key: int, size: tuple[int, int] = (32, 32)) -> Path:
    """A picture of noise of several scales, (height, width) pixels."""
    rng = np.random.default_rng(key)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize(size[::-1])
    pixels = np.clip(np.asarray(coarse, int) + rng.integers(-30, 31, (*size, 3)), 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def rows_of(path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def files_in(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# --- the released networks ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """Released checkpoints, as the golden rule fills them, and the two golden images."""
    folder, rdn = tmp_path_factory.mktemp("release"), fill(RDN()).state_dict()
    torch.save(rdn, folder / "sr_bare.pth")
    torch.save({"state_dict": {f"module.{k}": v for k, v in rdn.items()}}, folder / "sr_module.pth.tar")
    torch.save(fill(VGG19()).state_dict(), folder / "vgg19.pth")
    for name, channels in (("pixel", 3), ("stage5", 512)):
        content = {"epoch": 100, "arch": "resnet50", "optimizer": {"state": {}, "param_groups": [{"params": [0, 1]}]}}
        content["state_dict"] = fill(DeepStemResNet(channels)).state_dict()
        torch.save(content, folder / f"{name}.pth.tar")
    for name, pixels in zip(("real", "fake"), np.load(GOLDEN)["image"], strict=True):
        (folder / name).mkdir()
        Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / name / "0.png")
    return folder


@pytest.mark.parametrize(("classifier", "dilated"), [("pixel", 0), ("pixel", 1), ("stage5", 0)])
def test_released_checkpoints_and_flags_give_the_released_logits(release, tmp_path, capfd, classifier, dilated):
    """All options of the released program are accepted; where dilation is assumed, that is said."""
    stage, rdn = (5 if classifier == "stage5" else 0), ("sr_module.pth.tar" if dilated else "sr_bare.pth")
    released = f"""--gpu cpu -a resnet50 --sr-scale 4 --sr-num-features 64 --sr-growth-rate 64 --sr-num-blocks 16
        --sr-num-layers 8 --idx-stages {stage} --input-channel {512 if stage else 3} --lr 1e-6 --lr-sr 1e-3 --lw-sr 1
        --epochs 100 --momentum 0.9 --wd 1e-4 --save-every-epoch 2 --output-path unused --fixed-sr --mode-sr none
        --seed 1 -b 1 -j 0 --dataset celeba --start-epoch 0 -p 10 --print-freq 10 -e --pretrained --world-size -1
        --rank -1 --dist-url tcp://x --dist-backend nccl --multiprocessing-distributed
        --resume {release}/{classifier}.pth.tar --sr-weights-file {release}/{rdn} --vgg-weights {release}/vgg19.pth
        --data-root-pos {release}/real --data-root-neg {release}/fake --save_path {tmp_path}/not/yet/there.npy"""
    assert score(*released.split(), *([] if dilated else ["--no_dilation"])) == 0
    got = np.load(tmp_path / "not" / "yet" / "there.npy")
    wanted = np.load(GOLDEN)[f"logits_{classifier}_dil{dilated}"]
    assert got.dtype == np.float32 and np.abs(got - wanted).max() <= 1e-4
    err = capfd.readouterr().err
    assert "--dist-url has no effect" in err and ("DILATED" in err) == dilated


# --- what is written ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, small_classifier):
    """A detector in one file that is fast, and whose verdicts differ from image to image."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.pth.tar"
    state = {"state_dict": fill(DeepStemResNet(3, "resnet18")).state_dict()}
    torch.save({**state, "sr_state_dict": fill(RDN(**TINY)).state_dict(), "config": CONFIG}, path)
    return path


def changed(tiny, path: Path, **content) -> Path:
    """The detector with other content in its file."""
    torch.save({**torch.load(tiny), **content}, path)
    return path


@pytest.fixture(scope="module")
def some(tmp_path_factory):
    """A folder of IMAGES images of two sizes, one behind the other."""
    folder = tmp_path_factory.mktemp("some")
    for key in range(IMAGES):
        write_image(folder / f"{key}.png", key, (32, 32) if key % 4 else (36, 40))
    return folder


@pytest.fixture(scope="module")
def whole(tiny, some, tmp_path_factory):
    """The path P of the results of an uninterrupted run in one process, in batches of up to 2."""
    path = tmp_path_factory.mktemp("whole") / "p"
    assert score(*arguments(tiny, some, path)) == 0
    return path


def arguments(tiny, images, path, *more) -> list:
    """Of a run without labels, which draws no figures."""
    return ["--gpu", "cpu", "-j", 0, "-b", 2, "--resume", tiny, "--input", images, "--save_path", path, *more]


def test_the_four_files(tiny, tmp_path, capfd):
    for key, name in enumerate("reals/d reals/a/2 reals/a/10 reals/B progan/3 progan/1 stylegan/0/3".split()):
        write_image(tmp_path / f"{name}.png", key)
    roots = ["--data-root-pos", tmp_path / "reals", "--data-root-neg", tmp_path / "progan", tmp_path / "stylegan"]
    assert score("--gpu", "cpu", "-j", 0, "--resume", tiny, *roots, "--save_path", f"{tmp_path}/out/p/") == 0
    assert files_in(tmp_path / "out") == ["p.csv", "p.json", "p.npy", "p.png"]
    rows = rows_of(tmp_path / "out" / "p.csv")
    names = "reals/B reals/a/10 reals/a/2 reals/d progan/1 progan/3 stylegan/0/3".split()
    kinds = [("real", "")] * 4 + [("fake", "progan")] * 2 + [("fake", "stylegan")]
    wanted = [(str(tmp_path / f"{name}.png"), *kind) for name, kind in zip(names, kinds, strict=True)]
    assert tuple(rows[0]) == COLUMNS and [(r["path"], r["label"], r["generator"]) for r in rows] == wanted
    logits = np.load(tmp_path / "out" / "p.npy")
    assert logits.dtype == np.float32 and logits.shape == (7, 2)
    assert np.array_equal(logits, np.array([[r["logit_fake"], r["logit_real"]] for r in rows], np.float32))
    prob_fake = 1 / (1 + np.exp(logits[:, 1].astype(float) - logits[:, 0]))
    assert np.allclose(prob_fake, [float(r["prob_fake"]) for r in rows])
    assert [r["prediction"] for r in rows] == ["fake" if p >= 0.5 else "real" for p in prob_fake]
    about = json.loads((tmp_path / "out" / "p.json").read_text())
    assert about["settings"]["seed"] == 123 and about["versions"]["torch"] == torch.__version__
    assert {"progan", "stylegan"} <= about["metrics"]["generators"].keys() and about["detector"]["classifier"]
    with Image.open(tmp_path / "out" / "p.png") as picture:
        picture.verify()
    assert "stylegan" in capfd.readouterr().out


def test_inputs_without_labels(tiny, tmp_path, monkeypatch, capfd):
    """What cannot be read is a row with its error and exit status 1, not the end of the others."""
    monkeypatch.chdir(tmp_path)
    for key, name in enumerate(["=cmd.png", "photos/2.png", "photos/1.jpg"]):
        write_image(Path(name), key)
    Path("broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing more")
    write_image(Path("small.png"), 0, (3, 9))
    Path("photos/phone.heic").touch()
    inputs = ["=cmd.png", "broken.png", "small.png", "photos"]
    flags = ["--gpu", "cpu", "-j", 2, "--resume", tiny, "--save-residuals", "pictures"]
    assert score(*flags, "--save_path", "out/s", "--input", *inputs) == 1
    out, err = capfd.readouterr()
    rows = rows_of("out/s.csv")
    assert [r["path"] for r in rows] == ["'=cmd.png", *inputs[1:3], "photos/1.jpg", "photos/2.png"]
    assert [bool(r["error"]) for r in rows] == [False, True, True, False, False] and not any(r["label"] for r in rows)
    assert rows[1]["logit_fake"] == rows[1]["prob_fake"] == rows[1]["prediction"] == ""
    assert np.isnan(np.load("out/s.npy")).any(axis=1).tolist() == [False, True, True, False, False]
    assert "not scored: broken.png" in err and "Traceback" not in err and "1 .heic" in err
    assert "not calibrated" in out and "photos/2.png" in out and "2 could not be read" in out.splitlines()[-1]
    pictures = sorted(str(p.relative_to("pictures")) for p in Path("pictures").rglob("*.png"))
    assert pictures == [f"{name}.residual.png" for name in ("=cmd.png", "photos/1.jpg", "photos/2.png")]
    assert json.loads(Path("out/s.json").read_text())["metrics"] is None


def test_names_on_an_ascii_terminal_and_nothing_left_behind(tiny, tmp_path):
    image = write_image(tmp_path / "größe\n.png", 0)
    flags = ["--gpu", "cpu", "-j", "0", "--resume", str(tiny), "--input", str(image)]
    process = start("test.py", flags, tmp_path / "log", PYTHONIOENCODING="ascii")
    assert finish(process) == 0
    assert "\\n.png" in (tmp_path / "log").read_text() and files_in(tmp_path) == ["größe\n.png", "log"]


def test_sizes_as_in_training(tiny, tmp_path, capfd):
    """They are stored with the detector and used; other ones are said, and 0 is without."""
    write_image(tmp_path / "a.png", 0, (40, 48))
    own = changed(tiny, tmp_path / "own", config={**CONFIG, "images": {"crop_size": 16, "resize": 32}})
    crop = torch.from_numpy(np.array(Image.open(tmp_path / "a.png"))).permute(2, 0, 1).contiguous()
    crop = torch.nn.functional.interpolate(crop[None], (32, 38), mode="bicubic", antialias=True)[:, :, 8:24, 11:27]
    scores = {}
    for name, detector, *flags in (
        ("own", own, "--crops", 1),
        ("asked", tiny, "--crop-size", 16, "--resize", 32),
        ("other", own, "--crop-size", 0, "--resize", 0),
        ("plain", tiny),
    ):
        assert score(*arguments(detector, tmp_path / "a.png", tmp_path / name, *flags)) == 0
        scores[name], err = np.load(tmp_path / f"{name}.npy"), capfd.readouterr().err
        assert ("as in training" in err, "training had" in err) == (name == "own", name == "other"), err
    assert np.array_equal(scores["own"], scores["asked"]) and np.array_equal(scores["other"], scores["plain"])
    assert np.array_equal(scores["own"], load(str(tiny), "cpu").logits(crop).numpy())


@pytest.mark.parametrize(
    ("count", "tops", "lefts"), [(1, [12], [16]), (2, [12], [0, 32]), (4, [0, 24], [0, 32]), (6, [0, 24], [0, 16, 32])]
)
def test_a_large_image_is_the_mean_over_its_crops(tiny, tmp_path, capfd, count, tops, lefts):
    """From the borders in, whatever else is in the batch; one is the centre, as without the option."""
    own = changed(tiny, tmp_path / "own", config={**CONFIG, "images": {"crop_size": 16, "resize": None}})
    for key, size in enumerate([(40, 48), (40, 48), (16, 16), (12, 60)]):
        write_image(tmp_path / "images" / f"{key}.png", key, size)
    smaller = 1 if count == 1 else 0  # than the crop: an error, or scored as it is
    assert score(*arguments(own, tmp_path / "images", tmp_path / "p", "--crops", count)) == smaller
    got, names = np.load(tmp_path / "p.npy"), [str(tmp_path / "images" / f"{key}.png") for key in range(4)]
    x, plain = torch.from_numpy(np.array(Image.open(names[1]))).permute(2, 0, 1)[None], load(str(tiny), "cpu")
    wanted = [plain.logits(x[:, :, top : top + 16, left : left + 16]) for top in tops for left in lefts]
    assert np.allclose(got[1], torch.cat(wanted).mean(dim=0), atol=1e-5)
    assert json.loads((tmp_path / "p.json").read_text())["settings"]["crops"] == count
    if count > 1:
        detector = load(str(own), "cpu", options={"crops": count})
        assert np.array_equal(detector.predict(names), read_table(tmp_path / "p.csv").prob_fake)
        assert np.array_equal(detector.logits(detector.fit(names[1])[None])[0], got[1])
        assert "--crop-size" in mistake(capfd, *arguments(tiny, names[0], tmp_path / "q", "--crops", count))


def test_images_unlike_those_of_the_training_are_told(tiny, files, some, tmp_path, capfd):
    train(detector_arguments(files, tmp_path / "run", "--fixed-sr --epochs 1"))
    known = read(tmp_path / "run" / "last.pth.tar")["config"]["images"]
    assert (known["sides"], known["jpegs"]) == ([64, 64], 0)
    for name, size in (("a.jpg", (64, 64)), ("b.png", (32, 99)), ("c.png", (260, 264)), ("d.png", (31, 64))):
        write_image(tmp_path / "new" / name, 0, size)
    all_jpeg = changed(
        tiny, tmp_path / "jpeg", config={**CONFIG, "images": {"sides": [20, 40], "jpegs": 1.0, "residual": [0, 0]}}
    )
    for detector, images, *told in (
        (tmp_path / "run" / "last.pth.tar", tmp_path / "new", ("2 of 4", "64", "c.png"), ("1 of 4", "JPEG", "a.jpg")),
        (
            all_jpeg,
            some,
            (f"{IMAGES} of {IMAGES}", "no JPEG", "0.png"),
            (f"{IMAGES} of {IMAGES}", "residuals", "0.png"),
        ),
        (tiny, some),  # of an earlier version
    ):
        capfd.readouterr()
        assert score("--gpu", "cpu", "-j", 0, "--resume", detector, "--input", images) == 0
        lines = [line for line in capfd.readouterr().err.splitlines() if "unlike its training images" in line]
        for line, words in zip(lines, told, strict=True):
            assert all(word in line for word in words), line


def test_a_detector_says_that_it_was_trained_on_these_images(tiny, some, tmp_path, capfd):
    from data.lists import identities, input_items

    seen = torch.from_numpy(identities(input_items([str(some)])[:3]))
    detector = changed(tiny, tmp_path / "seen", trained_on=seen)
    shutil.copytree(some, tmp_path / "copies")
    assert score(*arguments(detector, tmp_path / "copies", tmp_path / "p")) == 0
    assert f"3 of these {IMAGES} images" in capfd.readouterr().err
    assert json.loads((tmp_path / "p.json").read_text())["trained_on"] == 3
    table = read_table(tmp_path / "p.csv")
    shutil.copy(some / "4.png", tmp_path / "copies" / "0.png")  # replaced files are scored anew
    table.logits[0] = table.logits[4]
    assert score(*arguments(detector, tmp_path / "copies", tmp_path / "p")) == 0
    assert np.allclose(read_table(tmp_path / "p.csv").logits, table.logits, atol=1e-6)


# --- stopped, killed, gone on with --------------------------------------------------------------------------


def same(path, whole) -> bool:
    return all(Path(f"{path}{end}").read_bytes() == Path(f"{whole}{end}").read_bytes() for end in (".csv", ".npy"))


@pytest.mark.parametrize(("number", "status"), [(9, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_goes_on_where_it_was(tiny, some, whole, tmp_path, capfd, number, status):
    """Bit for bit, also in other folders' words and in two processes. (The batches are of 1, 1, 2, ... images.)"""
    words = [str(a) for a in arguments(tiny, some, tmp_path / "p")]
    process = start("test.py", words, tmp_path / "log", partial(signal_in_batch, 3, number))
    assert finish(process) == status and not (tmp_path / "p.csv").exists()
    part = tmp_path / "p.csv.0.part"
    done = sum(len(json.loads(batch)) for batch in part.read_text().splitlines()[1:])
    part.write_bytes(part.read_bytes()[:-3])  # as a machine that lost power may leave it
    relative = [os.path.relpath(a) if os.path.exists(a) else a for a in words]
    runs = [start("test.py", relative, tmp_path / f"log{rank['RANK']}", **rank) for rank in two_ranks()]
    assert [finish(run) for run in runs] == [0, 0]
    text = (tmp_path / "log0").read_text()
    assert "going on after" in text and f"after {done} of" not in text
    table, wanted = read_table(tmp_path / "p.csv"), read_table(f"{whole}.csv")
    assert np.array_equal(table.logits, wanted.logits) and [*map(os.path.abspath, table.paths)] == wanted.paths
    assert [name for name in files_in(tmp_path) if name.startswith((".", "p"))] == ["p.csv", "p.json", "p.npy"]
    before = os.stat(tmp_path / "p.csv").st_mtime_ns
    assert score(*words) == 0 and "finished already" in capfd.readouterr().err
    assert os.stat(tmp_path / "p.csv").st_mtime_ns == before


# What torchrun starts: in its first start, the second process is killed in its second batch.
DIES_ONCE = """
import os, runpy, sys
sys.path[:0] = {paths}
from processes import SMALL, ARCHITECTURES, signal_in_batch
LAYOUTS.update(SMALL)
if os.environ["TORCHELASTIC_RESTART_COUNT"] + os.environ["RANK"] == "01":
    signal_in_batch(2, 9)
runpy.run_path({program!r}, run_name="__main__")
"""


def test_two_processes_write_the_table_of_one_though_one_of_them_dies(tiny, some, whole, tmp_path):
    root = Path(__file__).parents[1]
    paths = [str(root), str(root / "tests")]
    (tmp_path / "program.py").write_text(DIES_ONCE.format(paths=paths, program=str(root / "test.py")))
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node 2 --max-restarts 1".split()
    words = map(str, [*torchrun, tmp_path / "program.py", *arguments(tiny, some, tmp_path / "p")])
    run = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and "going on after" in run.stderr, run.stderr
    assert same(tmp_path / "p", whole)


def test_rows_of_another_job_are_not_lost(tiny, some, tmp_path, capfd):
    """Neither gone on with nor deleted, unless that is asked for; and two runs do not write one table."""
    words = [str(a) for a in arguments(tiny, some, tmp_path / "p")]
    with killed_exclusive_writer(tmp_path / ".p.lock"):
        assert "another run" in mistake(capfd, *words) and files_in(tmp_path) == [".p.lock"]
        assert score(*arguments(tiny, some, tmp_path / "q")) == 0
    assert finish(start("test.py", words, tmp_path / "log", partial(signal_in_batch, 3, 9))) == -9
    kept = (tmp_path / "p.csv.0.part").read_bytes()
    calibration = {"temperature": 2.0, "t_real": 0.5, "t_fake": 0.5}
    other = changed(tiny, tmp_path / "calibrated", calibration=calibration)
    line = mistake(capfd, *arguments(other, some, tmp_path / "p"))
    assert "--overwrite" in line and "detector" in line
    assert "perturbation" in mistake(capfd, *words, "--perturb", "combined", "--perturb-protocol", "frank2020")
    assert "crop_size, crops" in mistake(capfd, *words, "--crops", 2, "--crop-size", 16)
    assert (tmp_path / "p.csv.0.part").read_bytes() == kept
    assert score(*arguments(other, some, tmp_path / "p", "--overwrite")) == 0
    table = read_table(tmp_path / "p.csv")
    assert np.allclose(table.prob_fake, 1 / (1 + np.exp(-table.margins / 2)))


def test_all_perturbations_and_finished_ones_are_kept(tiny, tmp_path, capfd):
    for key in range(3):
        write_image(tmp_path / f"r/{key}.png", key), write_image(tmp_path / f"f/{key}.png", key + 9)
    roots = f"--data-root-pos {tmp_path}/r --data-root-neg {tmp_path}/f"
    words = f"--gpu cpu -j 0 --resume {tiny} {roots} --perturb all --perturb-protocol frank2020".split()
    words += ["--save_path", f"{tmp_path}/p"]
    assert finish(start("test.py", words, tmp_path / "log", partial(signal_in_batch, 3, 15))) == 143
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob("p_*.csv")}
    assert {path.name for path in finished} == {"p_none.csv", "p_blur.csv"}
    assert score(*words) == 0
    assert finished == {path: path.stat().st_mtime_ns for path in finished}
    names = ["none", "blur", "combined", "crop", "jpeg", "noise"]
    assert sorted(path.name for path in tmp_path.glob("p_*.csv")) == sorted(f"p_{name}.csv" for name in names)
    out = capfd.readouterr().out
    assert all(name in out[out.index("AUROC in %") :] for name in names)
    known = json.loads((tmp_path / "p_jpeg.json").read_text())["perturbation"]
    assert known == {"name": "jpeg", "strength": None, "label": "jpeg", "protocol": "frank2020", "seed": 123}
    logits = {name: np.load(tmp_path / f"p_{name}.npy") for name in names}
    few = [*words[:6], "--input", f"{tmp_path}/f", "--perturb-protocol", "frank2020", "--perturb", "none", "combined"]
    assert score(*few, "-b", 1, "--save_path", tmp_path / "few", "--save-residuals", tmp_path / "pictures") == 0
    assert np.allclose(np.load(tmp_path / "few_combined.npy"), logits["combined"][3:], atol=1e-6)
    assert files_in(tmp_path / "pictures") == ["combined", "none"]


# --- calibration, stability ---------------------------------------------------------------------------------


def test_a_stored_calibration_is_used_and_announced(tiny, some, whole, tmp_path, capfd):
    known = {"temperature": 2.0, "t_real": 0.495, "t_fake": 0.505, "source": "val.csv"}
    detector = changed(tiny, tmp_path / "c.pth.tar", calibration=known)
    assert score(*arguments(detector, some, tmp_path / "p")) == 0
    out = capfd.readouterr().out
    assert "temperature 2)" in out and "fake from P(fake) = 0.505 on, real up to 0.495, unsure between" in out
    before, after = read_table(f"{whole}.csv"), read_table(tmp_path / "p.csv")
    assert np.array_equal(before.logits, after.logits)
    assert np.allclose(after.prob_fake, 1 / (1 + np.exp(-before.margins / 2)))
    wanted = np.where(after.prob_fake >= 0.505, "fake", np.where(after.prob_fake <= 0.495, "real", "unsure")).tolist()
    assert after.predictions == wanted
    assert out.splitlines()[-1].startswith(", ".join(f"{wanted.count(w)} {w}" for w in ("fake", "real", "unsure")))


def test_unstable_is_whose_verdict_a_mild_change_turns(tiny, tmp_path, capfd):
    """The verdicts on files that hold the compressed and the resized images say the same."""
    for key in range(8):
        with Image.open(write_image(tmp_path / "plain" / f"{key}.png", key)) as image:
            for kind in ("jpeg", "resize"):
                (tmp_path / kind).mkdir(exist_ok=True)
            image.save(tmp_path / "jpeg" / f"{key}.png", "JPEG", quality=90, subsampling="4:2:0")
            small = image.resize((29, 29), Image.Resampling.BICUBIC)  # 0.9 * 32 = 28.8
            small.resize((32, 32), Image.Resampling.BICUBIC).save(tmp_path / "resize" / f"{key}.png")
    paths = [[str(tmp_path / kind / f"{key}.png") for key in range(8)] for kind in ("plain", "jpeg", "resize")]
    prob_fake = np.stack([load(str(tiny), "cpu").predict(of_a_kind) for of_a_kind in paths])  # (3, 8)
    most = np.abs(prob_fake[0] - prob_fake[1]).argmax()
    limit = float(prob_fake[:2, most].mean())
    verdicts = prob_fake >= limit
    wanted = np.where((verdicts == verdicts[0]).all(axis=0), "stable", "unstable").tolist()
    assert len(set(wanted)) == 2
    known = {"temperature": 1.0, "t_real": limit, "t_fake": limit}
    detector = changed(tiny, tmp_path / "c.pth.tar", calibration=known)
    (tmp_path / "plain" / "broken.png").write_bytes(b"no image")
    assert score(*arguments(detector, tmp_path / "plain", tmp_path / "s", "--stability")) == 1
    assert read_table(tmp_path / "s.csv").stability == [*wanted, ""]
    assert tuple(rows_of(tmp_path / "s.csv")[0]) == (*COLUMNS, "stability")
    assert f"{wanted.count('unstable')} of 8 images" in capfd.readouterr().out


# --- from Python --------------------------------------------------------------------------------------------


def test_python_gives_the_numbers_of_the_program(tiny, some, tmp_path):
    """To the last bit: paths, PIL images and tensors; a list, in the same batches."""
    detector = load(str(tiny), device="cpu")
    assert score("--gpu", "cpu", "-j", 0, "--resume", tiny, "--input", some, "--save_path", tmp_path / "p") == 0
    table = read_table(tmp_path / "p.csv")
    images = [Image.open(path).convert("RGB") for path in table.paths]
    tensors = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]
    for pictures in (table.paths, images, tensors):
        assert np.array_equal(detector.predict(pictures), table.prob_fake)
        assert detector.verdict(pictures) == table.predictions
    one = table.paths[1]
    residual = detector.residual(one)[0]
    assert residual.shape == (3, 32, 32) and torch.equal(residual, detector.residual(images[1])[0])
    assert detector.predict([]).shape == (0,) and np.allclose(detector.predict(one), table.prob_fake[1:2])
    turned, exif = Image.open(one), Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    assert detector.predict(Image.open(tmp_path / "turned.png")) == detector.predict(str(tmp_path / "turned.png"))
    with pytest.raises(ValueError, match="uint8"):
        detector.predict(torch.rand(3, 32, 32))


def test_torch_hub_and_the_example_of_the_readme(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copy(tiny, "DETECTOR.pth.tar")
    for name in ("a.png", "b.jpg"):
        write_image(Path(name), 1)
    root, found = Path(__file__).parents[1], {}
    example = re.search(r"```python\n(from models import load.*?)```", (root / "README.md").read_text(), re.DOTALL)
    exec(example[1], found)
    assert found["residual"].shape[0] == 3 and capsys.readouterr().out.count("\n") == 2
    detector = torch.hub.load(str(root), "detector", source="local", checkpoint=str(tiny), device="cpu")
    assert detector.verdict("a.png") == load(str(tiny), device="cpu").verdict("a.png")


# --- mistakes -----------------------------------------------------------------------------------------------


def test_mistakes_about_images(tiny, some, tmp_path, capfd):
    (tmp_path / "empty").mkdir()
    start_of = ["--gpu", "cpu", "--resume", tiny, "--save_path", tmp_path / "out" / "p"]
    reals = ["--data-root-pos", some]
    for fake in (tmp_path / "absent", tmp_path / "empty"):
        assert str(fake) in mistake(capfd, *start_of, *reals, "--data-root-neg", fake)
    for words, named in (
        (reals, "--data-root-neg"),
        ([], "--input"),
        ([*reals, "--input", some], "--input"),
        (["--csv", "absent.csv"], "absent.csv"),
        (["--input", "absent.png"], "absent.png"),
        (["--input", some, "--crop-size", "x"], "--crop-size"),
        (["--input", some, "--precision", "tf32"], "tf32"),
        (["--input", some, "--gpu", "one"], "one"),
    ):
        assert named in mistake(capfd, *start_of, *words)
    assert files_in(tmp_path) == ["empty"]
    (tmp_path / "file").write_text("mine")
    for place in ([tmp_path / "file" / "p"], [tmp_path / "p", "--save-residuals", tmp_path / "file"]):
        assert str(tmp_path / "file") in mistake(capfd, *arguments(tiny, some, *place))
    assert files_in(tmp_path) == ["empty", "file"]


def test_mistakes_about_checkpoints(tiny, release, some, tmp_path, capfd):
    def said(resume, *more) -> str:
        named = ["--resume", resume] if resume else []
        return mistake(capfd, "--gpu", "cpu", *named, "--input", some, "--save_path", tmp_path / "out" / "p", *more)

    torn = tmp_path / "torn.pth.tar"
    torn.write_bytes(tiny.read_bytes()[: tiny.stat().st_size // 2])
    damaged = torch.load(tiny)["config"] | {"classifier_fingerprint": "0123456789abcdef"}
    pixel, rdn = release / "pixel.pth.tar", ["--sr-weights-file", release / "sr_bare.pth"]
    stage5 = [release / "stage5.pth.tar", *rdn]
    for words, *named in (
        ([None], "--resume"),
        ([tmp_path / "absent.pth.tar"], "absent.pth.tar"),
        ([torn], "torn.pth.tar", "truncated"),
        ([changed(tiny, tmp_path / "flipped", config=damaged)], "flipped", "damaged"),
        ([pixel, "--idx-stages", 0], "--sr-weights-file"),
        ([pixel, *rdn, "--idx-stages", 5], "--idx-stages"),
        (stage5, "--idx-stages"),  # 4 or 5?
        ([*stage5, "--idx-stages", 5, "--vgg-weights", "random"], "VGG-19"),
        ([*stage5, "--idx-stages", 5, "--vgg-weights", "absent.pth"], "absent.pth"),
    ):
        line = said(*words)
        assert all(word in line for word in named), line
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, a number too high is an error")
def test_without_a_gpu_a_gpu_number_means_the_cpu(tiny, some, tmp_path, capfd):
    assert score(*arguments(tiny, some, tmp_path / "p", "--gpu", 7)) == 0
    line, *_ = capfd.readouterr().err.splitlines()
    assert "GPU 7" in line and "CPU" in line


def test_several_processes_need_a_save_path(tiny, some, tmp_path):
    words = ["--gpu", "cpu", "-j", "0", "--resume", str(tiny), "--input", str(some)]
    runs = [start("test.py", words, tmp_path / rank["RANK"], **rank) for rank in two_ranks()]
    assert 2 in [finish(run) for run in runs] and "--save_path" in (tmp_path / "0").read_text()
