"""test.py as a user runs it: the released networks' logits, the files it writes, killed runs, several processes, mistakes."""

import contextlib
import csv
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_rule import fill
from PIL import Image
from processes import killed_sole_writer, two_ranks
from test_images import make_bad_files

import test as program
from data.images import Batch, Item
from models import RDN, DeepStemResNet, VGGStages
from utils.distributed import World
from utils.run import run_program
from utils.scores import COLUMNS, read_table

GOLDEN = Path(__file__).parent / "golden" / "reference_outputs.npz"
TINY = {"num_features": 8, "growth_rate": 8, "num_blocks": 1, "num_layers": 2}
MISTAKES = (program.DataError, program.ModelError, program.CheckpointError, program.ScoreError)
SAVED = (".csv", ".json", ".npy", ".png")
KILLED_AFTER = 4  # images


def score(*argv) -> int:
    """What `python test.py ARGV` does, in this process; its exit status."""
    try:
        return run_program(lambda: program.main([str(a) for a in argv]), *MISTAKES)
    except SystemExit as stopped:  # argparse
        return stopped.code


def with_prefix(state: dict) -> dict:
    return {f"module.{key}": value for key, value in state.items()}


def released(classifier: torch.nn.Module, prefix: bool = False) -> dict:
    """A detector's checkpoint in the release's format."""
    state = classifier.state_dict()
    return {
        "epoch": 100,
        "arch": "resnet50",
        "state_dict": with_prefix(state) if prefix else state,
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-6, "params": [0, 1]}]},
    }


def write_image(path: Path, key: int, size: int | tuple[int, int] = 32) -> Path:
    """A picture of noise of several scales: `size` pixels, or (height, width)."""
    height, width = (size, size) if isinstance(size, int) else size
    rng = np.random.default_rng(key)
    coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(coarse).resize((width, height)), dtype=np.int64)
    pixels = np.clip(pixels + rng.integers(-30, 31, pixels.shape), 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def rows_of(path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def one_line_mistake(capfd, *argv) -> str:
    """Run, and check that it was refused with exit status 2 and one line. Gives the line."""
    capfd.readouterr()
    assert score(*argv) == 2
    out, err = capfd.readouterr()
    lines = err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and out == "", err
    return lines[0]


@pytest.fixture(autouse=True)
def no_figures(request, monkeypatch):
    """Figures are drawn where a test asks for them: they take more time than the scores."""
    if "figures" not in request.fixturenames:
        monkeypatch.setattr(program, "roc_and_histogram", lambda _, path: Path(path).touch())


@pytest.fixture
def figures():
    """Asked for by tests that want the figures drawn."""


# --- the released networks ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """Released checkpoints, as the golden rule fills them, and the two golden images."""
    folder = tmp_path_factory.mktemp("release")
    rdn = fill(RDN()).state_dict()
    torch.save(rdn, folder / "sr_bare.pth")
    torch.save({"state_dict": with_prefix(rdn)}, folder / "sr_module.pth.tar")
    torch.save(fill(VGGStages()).state_dict(), folder / "vgg19.pth")
    torch.save(released(fill(DeepStemResNet(in_channels=3))), folder / "pixel.pth.tar")
    torch.save(released(fill(DeepStemResNet(in_channels=512)), prefix=True), folder / "stage5.pth.tar")
    for name, pixels in zip(("CelebA", "CelebA_StyleGAN"), np.load(GOLDEN)["image"], strict=True):
        (folder / name).mkdir()
        Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / name / "0.png")
    return folder


def release_flags(folder: Path, stage: int, dilated: bool, rdn: str) -> list:
    """The command of the released test script."""
    return [
        "--gpu", "cpu" if torch.cuda.is_available() else "0",
        "-a", "resnet50", *([] if dilated else ["--no_dilation"]),
        "--sr-scale", 4, "--sr-num-features", 64, "--sr-growth-rate", 64, "--sr-num-blocks", 16, "--sr-num-layers", 8,
        "--idx-stages", stage, "--input-channel", 512 if stage else 3, "--lr", 1e-6, "--lr-sr", 1e-3, "--lw-sr", 1,
        "--epochs", 100, "--momentum", 0.9, "--wd", 1e-4, "--save-every-epoch", 2, "--output-path", "./unused",
        "--fixed-sr", "--mode-sr", "none", "--seed", 1, "-b", 1, "-j", 0,
        "--data-root-pos", folder / "CelebA", "--data-root-neg", folder / "CelebA_StyleGAN",
        "--resume", folder / ("stage5.pth.tar" if stage else "pixel.pth.tar"), "--sr-weights-file", folder / rdn,
        *(["--vgg-weights", folder / "vgg19.pth"] if stage else []),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("key", "stage", "dilated", "rdn"),
    [
        ("logits_pixel_dil0", 0, False, "sr_bare.pth"),
        ("logits_pixel_dil1", 0, True, "sr_module.pth.tar"),
        ("logits_stage5_dil0", 5, False, "sr_module.pth.tar"),
        ("logits_stage5_dil1", 5, True, "sr_bare.pth"),
    ],
)
def test_released_checkpoints_give_the_released_logits(release, tmp_path, key, stage, dilated, rdn):
    path = tmp_path / "not" / "there" / "yet"
    assert score(*release_flags(release, stage, dilated, rdn), "--save_path", path) == 0
    wanted, got = np.load(GOLDEN)[key], np.load(f"{path}.npy")
    assert got.dtype == np.float32 and got.shape == (2, 2)
    difference = np.abs(got - wanted).max()
    sys.stdout.write(f"{key}: largest difference {difference:.2g} of {np.abs(wanted).max():.3g}\n")
    assert difference <= 1e-4
    assert [r["label"] for r in rows_of(f"{path}.csv")] == ["real", "fake"]
    assert sorted(p.name for p in path.parent.iterdir()) == [f"yet{suffix}" for suffix in SAVED]


# --- what is written ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A detector in one file that is fast, and whose verdicts differ from image to image."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.pth.tar"
    content = {
        "state_dict": fill(DeepStemResNet("resnet18", 3)).state_dict(),
        "sr_state_dict": fill(RDN(**TINY)).state_dict(),
        "config": {"detector": {"arch": "resnet18", "stage": 0, "dilated": False}},
    }
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """reals (4), progan (3), stylegan (3) in sub-folders, their names not in the order they were written in."""
    folder = tmp_path_factory.mktemp("sets")
    for key, name in enumerate(
        ["reals/d.png", "reals/a/2.png", "reals/a/10.png", "reals/B.PNG", "progan/3.png", "progan/1.png",
         "progan/2.png", "stylegan/1.png", "stylegan/2.png", "stylegan/0/3.png"]
    ):  # fmt: skip
        write_image(folder / name, key)
    return folder


def flags(tiny, *more) -> list:
    return ["--gpu", "cpu", "-j", 0, "--resume", tiny, *more]


def labelled(tiny, sets, *more) -> list:
    return flags(
        tiny, "--data-root-pos", sets / "reals", "--data-root-neg", sets / "progan", sets / "stylegan", *more
    )  # fmt: skip


def test_the_four_files(tiny, sets, tmp_path, capfd, figures):
    assert score(*labelled(tiny, sets, "--save_path", tmp_path / "p")) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"p{suffix}" for suffix in SAVED]
    rows = rows_of(tmp_path / "p.csv")
    assert tuple(rows[0]) == COLUMNS
    paths = [os.path.relpath(r["path"], sets) for r in rows]
    assert paths == [
        *(f"reals/{n}" for n in sorted(["d.png", "a/2.png", "a/10.png", "B.PNG"])),
        "progan/1.png", "progan/2.png", "progan/3.png", "stylegan/0/3.png", "stylegan/1.png", "stylegan/2.png",
    ]  # fmt: skip
    assert [(r["label"], r["generator"]) for r in rows] == [("real", "")] * 4 + [("fake", "progan")] * 3 + [
        ("fake", "stylegan")
    ] * 3
    logits = np.load(tmp_path / "p.npy")
    assert logits.dtype == np.float32 and logits.shape == (10, 2)
    columns = np.array([[r["logit_fake"], r["logit_real"]] for r in rows], dtype=np.float32)
    assert np.array_equal(logits, columns)
    prob_fake = 1 / (1 + np.exp(logits[:, 1].astype(float) - logits[:, 0]))
    assert np.allclose(prob_fake, [float(r["prob_fake"]) for r in rows])
    assert [r["prediction"] for r in rows] == ["fake" if p >= 0.5 else "real" for p in prob_fake]
    about = json.loads((tmp_path / "p.json").read_text())
    assert {"metrics", "settings", "versions", "detector", "perturbation", "images"} <= about.keys()
    assert {"progan", "stylegan"} <= about["metrics"]["generators"].keys()
    assert about["settings"]["seed"] == 123 and about["versions"]["torch"] == torch.__version__
    with Image.open(tmp_path / "p.png") as picture:
        picture.verify()
    assert "progan" in capfd.readouterr().out


def test_a_tree_and_a_list_give_the_logits_of_the_folders(tiny, sets, tmp_path):
    assert score(*labelled(tiny, sets, "--save_path", tmp_path / "folders")) == 0
    wanted = {os.path.basename(r["path"]) + r["label"]: r for r in rows_of(tmp_path / "folders.csv")}

    for generator in ("progan", "stylegan"):
        shutil.copytree(sets / generator, tmp_path / "tree" / generator / "1_fake")
        shutil.copytree(sets / "reals", tmp_path / "tree" / generator / "0_real")
    assert score(*flags(tiny, "--data-root", tmp_path / "tree", "--save_path", tmp_path / "t")) == 0
    tree = rows_of(tmp_path / "t.csv")
    assert len(tree) == 14 and {r["generator"] for r in tree} == {"progan", "stylegan"}
    reals = [r for r in tree if r["label"] == "real"]
    assert len(reals) == 8
    assert all(r["logit_fake"] == wanted[os.path.basename(r["path"]) + "real"]["logit_fake"] for r in reals)

    lines = [f"{r['path']},{r['label']},{r['generator']}\n" for r in rows_of(tmp_path / "folders.csv")]
    (tmp_path / "list.csv").write_text("path,label,generator\n" + "".join(lines))
    assert score(*flags(tiny, "--csv", tmp_path / "list.csv", "--save_path", tmp_path / "l")) == 0
    assert (tmp_path / "l.csv").read_bytes() == (tmp_path / "folders.csv").read_bytes()


def test_inputs_without_labels(tiny, tmp_path, monkeypatch, capfd):
    """An unreadable file is a row with its error and an exit status, not the end of the others."""
    monkeypatch.chdir(tmp_path)
    for key, name in enumerate(["=cmd.png", "photos/2.png", "photos/1.jpg"]):
        write_image(Path(name), key)
    Path("broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing more")
    inputs = ["=cmd.png", "broken.png", "photos"]
    assert score(*flags(tiny, "--input", *inputs, "--save_path", "out/s", "-b", 2, "--save-residuals", "pictures")) == 1
    out, err = capfd.readouterr()
    rows = rows_of("out/s.csv")
    assert [r["path"] for r in rows] == ["'=cmd.png", "broken.png", "photos/1.jpg", "photos/2.png"]
    assert read_table("out/s.csv").paths[0] == "=cmd.png"
    assert [r["label"] for r in rows] == [""] * 4
    assert [bool(r["error"]) for r in rows] == [False, True, False, False]
    assert rows[1]["logit_fake"] == rows[1]["prob_fake"] == rows[1]["prediction"] == ""
    assert np.isnan(np.load("out/s.npy")).any(axis=1).tolist() == [False, True, False, False]
    assert "not scored: broken.png" in err and "Traceback" not in err
    assert "P(fake)" in out and "photos/2.png" in out and "error" in out
    assert sorted(str(p.relative_to("pictures")) for p in Path("pictures").rglob("*.png")) == [
        "=cmd.png.residual.png", "photos/1.jpg.residual.png", "photos/2.png.residual.png"
    ]  # fmt: skip
    assert json.loads(Path("out/s.json").read_text())["metrics"] is None


@pytest.mark.parametrize("how", [[], ["-b", 4, "-j", 2]])
def test_every_bad_image_is_a_row_with_its_error(tiny, tmp_path, how):
    bad = [path for path in make_bad_files(tmp_path / "bad") if os.path.islink(path) or not os.path.isdir(path)]
    good = str(write_image(tmp_path / "good.png", 0))
    assert score(*flags(tiny, "--input", *bad, good, "--save_path", tmp_path / "s", *how)) == 1
    table = read_table(tmp_path / "s.csv")
    assert table.paths == [*bad, good] and table.scored.tolist() == [False] * len(bad) + [True]
    assert (
        all(text.isprintable() and text for text in table.errors[:-1])
        and len(np.load(tmp_path / "s.npy")) == len(bad) + 1
    )


def test_without_save_path_nothing_is_left_behind(tiny, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    write_image(Path("a.png"), 0)
    assert score(*flags(tiny, "--input", "a.png")) == 0
    assert os.listdir(".") == ["a.png"]
    assert "a.png" in capfd.readouterr().out


def test_a_save_path_with_a_slash_at_its_end(tiny, sets, tmp_path):
    assert score(*labelled(tiny, sets, "--save_path", f"{tmp_path}/new/")) == 0
    assert (tmp_path / "new.csv").exists()


@pytest.mark.parametrize("how", [["-b", 1, "-j", 2], ["-b", 3, "-j", 2], ["-b", 10]])
def test_batches_and_workers_change_nothing(tiny, sets, tmp_path, how):
    assert score(*labelled(tiny, sets, "--save_path", tmp_path / "one")) == 0
    assert score(*labelled(tiny, sets, "--save_path", tmp_path / "two", *how)) == 0
    one, two = (read_table(tmp_path / f"{name}.csv") for name in ("one", "two"))
    assert one.paths == two.paths
    assert np.allclose(one.logits, two.logits, atol=1e-5)


def test_mixed_sizes(tiny, tmp_path, capfd):
    """One by one any size will do; in batches the sizes have to be alike, and --crop-size makes them."""
    for key, (name, size) in enumerate({"a": 32, "b": (40, 34), "c": 32}.items()):
        write_image(tmp_path / "mixed" / f"{name}.png", key, size)
    arguments = flags(tiny, "--input", tmp_path / "mixed", "--save_path", tmp_path / "out" / "p")
    line = one_line_mistake(capfd, *arguments, "-b", 2)
    assert "a.png" in line and "b.png" in line and "--crop-size" in line
    assert not (tmp_path / "out").exists()
    assert score(*arguments, "-b", 1) == 0
    assert score(*arguments, "-b", 2, "--crop-size", 32) == 0
    assert len(rows_of(tmp_path / "out" / "p.csv")) == 3


# --- killed runs, several processes -------------------------------------------------------------------------


def start(*argv, **environment) -> multiprocessing.Process:
    """What `python test.py ARGV` does, in a process of its own."""

    def run():
        os.environ.update(environment)
        os._exit(score(*argv))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


@pytest.fixture(scope="module")
def whole(tiny, sets, tmp_path_factory):
    """The table of an uninterrupted run in one process."""
    path = tmp_path_factory.mktemp("whole") / "p"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "roc_and_histogram", lambda *_: None)
        assert score(*labelled(tiny, sets, "--stability", "--save_path", path)) == 0
    return path.with_suffix(".csv")


def test_a_killed_run_goes_on_where_it_stopped(tiny, sets, whole, tmp_path, monkeypatch, capfd):
    path = tmp_path / "killed"
    part = tmp_path / ".killed.csv.0-of-1.part"
    arguments = labelled(tiny, sets, "--stability", "--save_path", path)
    scored, batch_rows = [], program.batch_rows

    def hanging(scorer, items, batch, logits):
        scored.extend(items[i].path for i in batch.indices)
        if len(scored) > KILLED_AFTER:
            time.sleep(60)
        return batch_rows(scorer, items, batch, logits)

    with monkeypatch.context() as patch:
        patch.setattr(program, "batch_rows", hanging)
        run = start(*arguments)
        while run.is_alive() and not (part.exists() and part.read_bytes().count(b"\n") > KILLED_AFTER):
            time.sleep(0.001)
        run.kill()
        run.join()
    assert run.exitcode == -signal.SIGKILL and not path.with_suffix(".csv").exists()
    part.write_bytes(part.read_bytes()[:-3])  # as a machine that lost power may leave it

    monkeypatch.setattr(
        program,
        "batch_rows",
        lambda s, items, b, x: scored.extend(items[i].path for i in b.indices) or batch_rows(s, items, b, x),
    )
    assert score(*arguments, "-b", 2) == 0
    one, two = read_table(whole), read_table(f"{path}.csv")
    assert f"going on after {KILLED_AFTER - 1} of {len(one)}" in capfd.readouterr().err
    assert scored == one.paths[KILLED_AFTER - 1 :]
    assert one.paths == two.paths and one.predictions == two.predictions and one.stability == two.stability
    assert np.allclose(one.logits, two.logits, atol=1e-5)
    assert not list(tmp_path.glob(".*"))  # no parts are left


def test_two_runs_do_not_write_one_table(tiny, sets, tmp_path, capfd):
    """Another table beside it is no matter."""
    with killed_sole_writer(tmp_path / ".p.lock"):
        assert score(*labelled(tiny, sets, "--save_path", tmp_path / "p")) == 2
        assert "error: another run is writing here" in capfd.readouterr().err
        assert [p.name for p in tmp_path.iterdir()] == [".p.lock"]
        runs = [start(*labelled(tiny, sets, "--save_path", tmp_path / "p"), **rank) for rank in two_ranks()]
        for run in runs:
            run.join(60)
        assert [run.exitcode for run in runs] == [2, 2]  # the second process has no lock, and does not score alone
        assert [p.name for p in tmp_path.iterdir()] == [".p.lock"]
        assert score(*labelled(tiny, sets, "--save_path", tmp_path / "q")) == 0


def test_ctrl_c_keeps_what_is_scored(tiny, sets, tmp_path, monkeypatch, capfd):
    """Exit status 130; the next run scores the rest, and one killed before its parts were joined scores nothing."""
    scored, logits_of = [], program.logits_of

    def interrupted(detector, x, names, *more):
        scored.extend(names)
        if len(scored) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return logits_of(detector, x, names, *more)

    monkeypatch.setattr(program, "logits_of", interrupted)
    arguments = labelled(tiny, sets, "--save_path", tmp_path / "p")
    assert score(*arguments) == 130 and len(scored) == 3
    assert "SIGINT" in capfd.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(program, "join_parts", lambda *_: sys.exit("killed"))
        assert score(*arguments) == "killed"
    assert score(*arguments) == 0
    assert scored == read_table(tmp_path / "p.csv").paths


@pytest.mark.parametrize(("device", "ahead"), [("cpu", 0), ("cuda", 1)])
def test_a_gpu_is_given_the_next_batch_first(monkeypatch, device, ahead):
    """Batches and their logits come in order, one without images among them, each batch `ahead` of its rows."""
    items = [Item(f"{i}.png", None, "") for i in range(4)]
    scorer = program.Scorer(None, torch.device(device), "fp32", {}, None, False)
    numbers = [[0, 1], [], [2], [3]]
    batches = [Batch(torch.zeros(len(n), 3, 4, 4), torch.zeros(len(n)), n, {}) for n in numbers]
    launched, came = [], []

    def logits_of(scorer, images, names, residual_folder):
        launched.append([int(name[0]) for name in names])
        return torch.tensor(launched[-1]).float()[:, None].expand(-1, 2)

    monkeypatch.setattr(program, "logits_of", logits_of)
    for batch, logits in program.with_logits(scorer, items, batches):
        came.append(batch.indices)
        assert logits[:, 0].tolist() == batch.indices
        assert launched == [n for n in numbers[: len(came) + ahead] if n]
    assert came == numbers


def test_a_part_is_not_gone_on_with_once_the_detector_is_calibrated(tiny, sets, tmp_path, monkeypatch, capfd):
    detector = shutil.copy(tiny, tmp_path / "detector.pth.tar")
    arguments = labelled(detector, sets, "--save_path", tmp_path / "p")
    with monkeypatch.context() as patch:
        patch.setattr(program, "join_parts", lambda *_: sys.exit("killed"))
        assert score(*arguments) == "killed"
    assert "temperature" not in capfd.readouterr().err
    calibration = {"temperature": 2.0, "t_real": 0.5, "t_fake": 0.5}
    torch.save({**torch.load(tiny), "calibration": calibration}, detector)
    assert score(*arguments) == 0
    assert "beginning anew" in capfd.readouterr().err
    table = read_table(tmp_path / "p.csv")
    assert np.allclose(table.prob_fake, 1 / (1 + np.exp(-table.margins / 2)))


def test_a_run_killed_while_its_parts_are_joined(tmp_path):
    """Joining is done again from the parts: no row is lost or there twice."""
    table = tmp_path / "p.csv"
    parts = [program.part_of(table, rank, 2) for rank in range(2)]

    def write_parts():
        for rank, part in enumerate(parts):
            part.write_text(f"path\n{rank}.png\n")

    write_parts()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: sys.exit("killed"))
        with pytest.raises(SystemExit):
            program.join_parts(table, 2)
    assert [part.read_text() for part in parts] == ["path\n0.png\n", "path\n1.png\n"]
    program.join_parts(table, 2)
    assert table.read_text() == "path\n0.png\n1.png\n"
    assert [p.name for p in tmp_path.iterdir()] == ["p.csv"]


def test_two_processes_write_the_table_of_one(tiny, sets, whole, tmp_path):
    """Started with what torchrun tells its processes."""
    arguments = labelled(tiny, sets, "--stability", "--save_path", tmp_path / "two")
    runs = [start(*arguments, **rank) for rank in two_ranks()]
    for run in runs:
        run.join(60)
    assert [run.exitcode for run in runs] == [0, 0]
    assert (tmp_path / "two.csv").read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"two{suffix}" for suffix in SAVED]


def test_several_processes_need_a_save_path(tiny, sets, monkeypatch, capfd):
    monkeypatch.setattr(program, "world_of_processes", lambda _: contextlib.nullcontext(World(0, 2)))
    assert "--save_path" in one_line_mistake(capfd, *labelled(tiny, sets))


# --- mistakes -----------------------------------------------------------------------------------------------


def test_mistakes_about_images(tiny, sets, tmp_path, capfd):
    (tmp_path / "empty").mkdir()
    to = ["--save_path", tmp_path / "out" / "p"]
    reals = ["--data-root-pos", sets / "reals"]
    for fake, said in ((tmp_path / "absent", "does not exist"), (tmp_path / "empty", "no image")):
        line = one_line_mistake(capfd, *flags(tiny, *reals, "--data-root-neg", fake, *to))
        assert str(fake) in line and said in line
    assert "--data-root-neg" in one_line_mistake(capfd, *flags(tiny, *reals, *to))
    assert "--data-root-pos" in one_line_mistake(capfd, *flags(tiny, *to))
    assert "--input" in one_line_mistake(capfd, *flags(tiny, "--input", sets / "reals", *reals, *to))
    assert "absent.csv" in one_line_mistake(capfd, *flags(tiny, "--csv", tmp_path / "absent.csv", *to))
    assert "absent.png" in one_line_mistake(capfd, *flags(tiny, "--input", tmp_path / "absent.png", *to))
    assert os.listdir(tmp_path) == ["empty"]


def test_mistakes_about_checkpoints(tiny, release, sets, tmp_path, capfd):
    def mistake(resume, *more) -> str:
        images = ["--data-root-pos", sets / "reals", "--data-root-neg", sets / "progan"]
        return one_line_mistake(
            capfd, "--gpu", "cpu", *images, *(["--resume", resume] if resume else []), "--save_path", out / "p", *more
        )

    out = tmp_path / "out"
    assert "--resume" in mistake(None)
    assert "absent.pth.tar" in mistake(tmp_path / "absent.pth.tar")
    torn = tmp_path / "torn.pth.tar"
    torn.write_bytes(tiny.read_bytes()[: tiny.stat().st_size // 2])
    assert "torn.pth.tar" in mistake(torn) and "truncated" in mistake(torn)
    torn.write_bytes(b"")
    assert "torn.pth.tar" in mistake(torn)
    assert "--sr-weights-file" in mistake(release / "pixel.pth.tar", "--idx-stages", 0)  # holds no RDN
    # the wrong network: RDN for a detector, a detector for RDN, RDN of another shape
    line = mistake(release / "sr_bare.pth")
    assert "sr_bare.pth" in line and ("sfe1" in line or "conv1" in line), line
    line = mistake(release / "pixel.pth.tar", "--idx-stages", 0, "--sr-weights-file", release / "pixel.pth.tar")
    assert "pixel.pth.tar" in line and "sfe1" in line, line
    changed = fill(RDN(**TINY)).state_dict()
    changed["gff.1.weight"] = torch.zeros(8, 8, 1, 1)
    torch.save(changed, tmp_path / "changed.pth")
    line = mistake(tiny, "--sr-weights-file", tmp_path / "changed.pth")
    assert "gff.1.weight" in line and "(8, 8, 1, 1)" in line and "(8, 8, 3, 3)" in line
    assert "num_features" in mistake(tiny, "--sr-num-features", 64)
    assert "--arch" in mistake(tiny, "-a", "resnet50")
    # stage, channels, checkpoint
    line = mistake(tiny, "--input-channel", 512)
    assert "--input-channel" in line and "512" in line and "3" in line
    assert "--idx-stages" in mistake(tiny, "--idx-stages", 5)
    rdn = ["--sr-weights-file", release / "sr_bare.pth"]
    assert "512 channels" in mistake(release / "stage5.pth.tar", *rdn, "--idx-stages", 0)
    assert "--idx-stages" in mistake(release / "stage5.pth.tar", *rdn)  # 4 or 5?
    assert "VGG-19" in mistake(release / "stage5.pth.tar", *rdn, "--idx-stages", 5, "--vgg-weights", "random")
    assert "absent.pth" in mistake(
        release / "stage5.pth.tar", *rdn, "--idx-stages", 5, "--vgg-weights", tmp_path / "absent.pth"
    )
    assert not out.exists()


def test_a_folder_that_cannot_be_written_to(tiny, sets, tmp_path, capfd):
    (tmp_path / "file").write_text("mine")
    images = ["--data-root-pos", sets / "reals", "--data-root-neg", sets / "progan"]
    line = one_line_mistake(capfd, *flags(tiny, *images, "--save_path", tmp_path / "file" / "p"))
    assert str(tmp_path / "file") in line
    residuals = ["--save-residuals", tmp_path / "file"]
    line = one_line_mistake(capfd, *flags(tiny, *images, "--save_path", tmp_path / "p", *residuals))
    assert str(tmp_path / "file") in line
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--gpu", "abc"], "abc"),
        (["--gpu", "-1"], "-1"),
        (["--idx-stages", "6"], "--idx-stages"),
        (["--batch-size", "0"], "--batch-size"),
        (["--arch", "vgg16"], "vgg16"),
        (["--no-such-flag"], "--no-such-flag"),
        (["--resu", "x"], "--resu"),
        (["--perturb", "fog"], "fog"),
    ],
)
def test_mistakes_about_options(capfd, argv, said):
    assert said in one_line_mistake(capfd, *argv)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, a number too high is an error")
def test_without_a_gpu_a_gpu_number_means_the_cpu(tiny, sets, tmp_path, capfd):
    arguments = labelled(tiny, sets, "--save_path", tmp_path / "p")
    arguments[1] = 7
    assert score(*arguments) == 0
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and "GPU 7" in lines[0] and "CPU" in lines[0]


# --- perturbations, calibration -----------------------------------------------------------------------------


def test_all_perturbations(tiny, sets, tmp_path, capfd):
    assert score(*labelled(tiny, sets, "--perturb", "all", "--save_path", tmp_path / "p", "-b", 5)) == 0
    out = capfd.readouterr().out
    cells = program.cells("sweep")
    tables = {cell.label: rows_of(tmp_path / f"p_{cell.label.replace(' ', '_')}.csv") for cell in cells}
    assert len(list(tmp_path.glob("p_*.csv"))) == len(cells) == 20
    assert all(len(rows) == 10 for rows in tables.values())
    logits = {name: [r["logit_fake"] for r in rows] for name, rows in tables.items()}
    assert logits["none"] == logits["blur sigma 0"] != logits["blur sigma 1"] != logits["jpeg quality 30"]
    table = out[out.index("AUROC in %") :]
    assert "progan" in table and "stylegan" in table and all(cell.label in table for cell in cells)
    about = json.loads((tmp_path / "p_jpeg_quality_70.json").read_text())
    assert about["perturbation"] == {"name": "jpeg", "strength": 70.0, "protocol": "sweep"}


@pytest.mark.parametrize("protocol", ["frank2020", "frank2020-released"])
def test_perturbations_depend_on_the_image_alone(tiny, sets, tmp_path, protocol):
    """Not on batch size, workers or how many others there are."""
    how = ["--perturb", "combined", "--perturb-protocol", protocol, "--save_path"]
    assert score(*labelled(tiny, sets, *how, tmp_path / "one")) == 0
    assert score(*labelled(tiny, sets, *how, tmp_path / "two", "-b", 2, "-j", 2)) == 0
    assert score(*flags(tiny, "--input", sets / "stylegan", *how, tmp_path / "few")) == 0
    one, two, few = (read_table(tmp_path / f"{name}.csv") for name in ("one", "two", "few"))
    assert np.allclose(one.logits, two.logits, atol=1e-5)
    assert np.allclose(one.logits[-3:], few.logits, atol=1e-5)


def test_a_stored_calibration_is_used_and_announced(tiny, sets, tmp_path, capfd):
    from utils import calibrate

    detector = shutil.copy(tiny, tmp_path / "mine.pth.tar")
    assert score(*labelled(detector, sets, "--save_path", tmp_path / "before")) == 0
    assert "calibrated" not in capfd.readouterr().err
    assert not calibrate.main([str(tmp_path / "before.csv"), "--into", str(detector)])
    stored = torch.load(detector)["calibration"]
    capfd.readouterr()
    assert score(*labelled(detector, sets, "--save_path", tmp_path / "after")) == 0
    assert f"temperature {stored['temperature']:.3g}" in capfd.readouterr().err
    before, after = (read_table(tmp_path / f"{name}.csv") for name in ("before", "after"))
    assert np.array_equal(before.logits, after.logits)
    margins = before.margins / stored["temperature"]
    assert np.allclose(after.prob_fake, 1 / (1 + np.exp(-margins)))
    assert before.predictions != after.predictions and "unsure" in after.predictions


def test_unstable_is_whose_verdict_a_mild_change_turns(tiny, tmp_path, capfd):
    """The verdicts on files that hold the compressed and the resized images say the same."""
    prob_fake = {}
    for key in range(8):
        with Image.open(write_image(tmp_path / "plain" / f"{key}.png", key)) as image:
            for kind in ("jpeg", "resize"):
                (tmp_path / kind).mkdir(exist_ok=True)
            image.save(tmp_path / "jpeg" / f"{key}.png", "JPEG", quality=90, subsampling="4:2:0")
            small = image.resize((29, 29), Image.Resampling.BICUBIC)  # 0.9 * 32 = 28.8
            small.resize((32, 32), Image.Resampling.BICUBIC).save(tmp_path / "resize" / f"{key}.png")
    for kind in ("plain", "jpeg", "resize"):
        assert score(*flags(tiny, "--input", tmp_path / kind, "--save_path", tmp_path / kind)) == 0
        prob_fake[kind] = read_table(tmp_path / f"{kind}.csv").prob_fake
    most = np.abs(prob_fake["plain"] - prob_fake["jpeg"]).argmax()
    limit = float(prob_fake["plain"][most] + prob_fake["jpeg"][most]) / 2
    verdicts = np.stack(list(prob_fake.values())) >= limit  # (3, 8)
    wanted = np.where((verdicts == verdicts[0]).all(axis=0), "stable", "unstable").tolist()
    assert len(set(wanted)) == 2

    calibration = {"temperature": 1.0, "t_real": limit, "t_fake": limit}
    torch.save({**torch.load(tiny), "calibration": calibration}, tmp_path / "c.pth.tar")
    capfd.readouterr()
    arguments = ["--input", tmp_path / "plain", "--save_path", tmp_path / "s", "--stability", "-b", 3]
    assert score(*flags(tmp_path / "c.pth.tar", *arguments)) == 0
    assert read_table(tmp_path / "s.csv").stability == wanted
    assert tuple(rows_of(tmp_path / "s.csv")[0]) == (*COLUMNS, "stability")
    assert f"{wanted.count('unstable')} of 8 images" in capfd.readouterr().out


def test_stability_of_labelled_images_and_of_files_that_cannot_be_read(tiny, whole, tmp_path, capfd):
    assert set(read_table(whole).stability) <= {"stable", "unstable"}
    write_image(tmp_path / "good.png", 0)
    (tmp_path / "broken.png").write_bytes(b"no image")
    assert score(*flags(tiny, "--input", tmp_path, "--save_path", tmp_path / "p", "-b", 2, "--stability")) == 1
    table = read_table(tmp_path / "p.csv")
    assert table.stability[0] == "" and table.stability[1] in ("stable", "unstable")
    assert "of 1 images" in capfd.readouterr().out


def test_the_screen_says_what_the_verdict_means(tiny, tmp_path, capfd):
    write_image(tmp_path / "a.png", 0)
    assert score(*flags(tiny, "--input", tmp_path / "a.png")) == 0
    out = capfd.readouterr().out
    assert "not calibrated" in out and "fake from P(fake) = 0.5 on, else real" in out
    calibration = {"temperature": 2.0, "t_real": 0.25, "t_fake": 0.75, "source": "val.csv"}
    torch.save({**torch.load(tiny), "calibration": calibration}, tmp_path / "c.pth.tar")
    assert score(*flags(tmp_path / "c.pth.tar", "--input", tmp_path / "a.png")) == 0
    assert "fake from P(fake) = 0.75 on, real up to 0.25, unsure between" in capfd.readouterr().out
