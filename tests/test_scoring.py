"""Tests of test.py: logits, output files, interrupted runs, several processes, and wrong arguments."""

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import (
    hold_lock_in_process,
    make_environments_of_two_torchrun_processes,
    patch_test_py_to_send_signal_before_batch,
    start_program,
    wait_for_exit,
)
from scorings import (
    CONFIG,
    GOLDEN,
    IMAGES,
    error_line_of_test_py,
    list_sorted_names_in_folder,
    make_arguments_of_test_py,
    read_csv_rows,
    run_test_py,
    write_detector,
    write_images_and_checkpoints_of_the_authors_format,
    write_noise_image,
)
from trainings import make_arguments_of_train_detector, read_checkpoint_content, run_training

from data.lists import hash_image_files, list_images_without_labels
from evaluation import load
from evaluation.score_table import COLUMNS, read_table


@pytest.fixture(scope="module")
def authors_checkpoint_folder(tmp_path_factory):
    """Return a folder with two images, VGG-19 weights, and checkpoints in the formats of the paper's authors."""
    return write_images_and_checkpoints_of_the_authors_format(tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="module")
def path_of_uninterrupted_scores(detector_file, image_folder, tmp_path_factory):
    """Score nine images in one process without interruption, and return the value of --save_path."""
    path = tmp_path_factory.mktemp("whole") / "p"
    assert run_test_py(*make_arguments_of_test_py(detector_file, image_folder, path)) == 0
    return path


# --- the released networks ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("classifier", "dilated"), [("pixel", 0), ("pixel", 1), ("stage5", 0)])
def test_checkpoints_and_flags_of_the_authors_format_give_the_logits_of_the_authors_code(
    authors_checkpoint_folder, tmp_path, capfd, classifier, dilated
):
    stage = 5 if classifier == "stage5" else 0
    rdn = "sr_module.pth.tar" if dilated else "sr_bare.pth"
    released = f"""--gpu cpu -a resnet50 --sr-scale 4 --sr-num-features 64 --sr-growth-rate 64 --sr-num-blocks 16
        --sr-num-layers 8 --idx-stages {stage} --input-channel {512 if stage else 3} --lr 1e-6 --lr-sr 1e-3 --lw-sr 1
        --epochs 100 --momentum 0.9 --wd 1e-4 --save-every-epoch 2 --output-path unused --fixed-sr --mode-sr none
        --seed 1 -b 1 -j 0 --dataset celeba --start-epoch 0 -p 10 --print-freq 10 -e --pretrained --world-size -1
        --rank -1 --dist-url tcp://x --dist-backend nccl --multiprocessing-distributed
        --resume {authors_checkpoint_folder}/{classifier}.pth.tar --sr-weights-file {authors_checkpoint_folder}/{rdn}
        --vgg-weights {authors_checkpoint_folder}/vgg19.pth
        --data-root-pos {authors_checkpoint_folder}/real --data-root-neg {authors_checkpoint_folder}/fake --save_path {tmp_path}/not/yet/there.npy"""
    assert run_test_py(*released.split(), *([] if dilated else ["--no_dilation"])) == 0
    logits = np.load(tmp_path / "not" / "yet" / "there.npy")
    expected = np.load(GOLDEN)[f"logits_{classifier}_dil{dilated}"]
    assert logits.dtype == np.float32
    assert np.abs(logits - expected).max() <= 1e-4
    err = capfd.readouterr().err
    assert "--dist-url has no effect" in err
    assert ("DILATED" in err) == dilated


# --- files that test.py writes --------------------------------------------------------------------------------


def test_scoring_labelled_images_writes_a_csv_a_json_an_npy_and_a_png_file(detector_file, tmp_path, capfd):
    for key, name in enumerate("reals/d reals/a/2 reals/a/10 reals/B progan/3 progan/1 stylegan/0/3".split()):
        write_noise_image(tmp_path / f"{name}.png", key)
    roots = ["--data-root-pos", tmp_path / "reals", "--data-root-neg", tmp_path / "progan", tmp_path / "stylegan"]
    assert (
        run_test_py("--gpu", "cpu", "-j", 0, "--resume", detector_file, *roots, "--save_path", f"{tmp_path}/out/p/")
        == 0
    )
    assert list_sorted_names_in_folder(tmp_path / "out") == ["p.csv", "p.json", "p.npy", "p.png"]
    rows = read_csv_rows(tmp_path / "out" / "p.csv")
    assert tuple(rows[0]) == COLUMNS
    names = "reals/B reals/a/10 reals/a/2 reals/d progan/1 progan/3 stylegan/0/3".split()
    assert [row["path"] for row in rows] == [str(tmp_path / f"{name}.png") for name in names]
    assert [row["label"] for row in rows] == ["real"] * 4 + ["fake"] * 3
    assert [row["generator"] for row in rows] == [""] * 4 + ["progan"] * 2 + ["stylegan"]
    logits = np.load(tmp_path / "out" / "p.npy")
    assert logits.dtype == np.float32 and logits.shape == (7, 2)
    assert np.array_equal(logits, np.array([[row["logit_fake"], row["logit_real"]] for row in rows], np.float32))
    prob_fake = 1 / (1 + np.exp(logits[:, 1].astype(float) - logits[:, 0]))
    assert np.allclose(prob_fake, [float(row["prob_fake"]) for row in rows])
    assert [row["prediction"] for row in rows] == ["fake" if p >= 0.5 else "real" for p in prob_fake]
    record = json.loads((tmp_path / "out" / "p.json").read_text())
    assert record["settings"]["seed"] == 123
    assert record["versions"]["torch"] == torch.__version__
    assert {"progan", "stylegan"} <= record["metrics"]["generators"].keys()
    assert record["detector"]["classifier_fingerprint"]
    with Image.open(tmp_path / "out" / "p.png") as picture:
        picture.verify()
    assert "stylegan" in capfd.readouterr().out


def test_scoring_unlabelled_images_prints_a_table_and_writes_no_figure(detector_file, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for key, name in enumerate(["=cmd.png", "photos/2.png", "photos/1.jpg"]):
        write_noise_image(name, key)
    assert (
        run_test_py(
            "--gpu", "cpu", "-j", 2, "--resume", detector_file, "--save_path", "s", "--input", "=cmd.png", "photos"
        )
        == 0
    )
    out = capfd.readouterr().out
    rows = read_csv_rows("s.csv")
    assert [row["path"] for row in rows] == ["=cmd.png", "photos/1.jpg", "photos/2.png"]
    assert not any(row["label"] for row in rows)
    assert "not calibrated" in out and "photos/2.png" in out
    assert json.loads(Path("s.json").read_text())["metrics"] is None
    assert not Path("s.png").exists()


def test_test_py_writes_no_files_without_a_save_path(detector_file, tmp_path):
    image = write_noise_image(tmp_path / "größe\n.png", 0)
    flags = ["--gpu", "cpu", "-j", "0", "--resume", str(detector_file), "--input", str(image)]
    process = start_program("test.py", flags, tmp_path / "log", PYTHONIOENCODING="ascii")
    assert wait_for_exit(process) == 0
    assert "\\n.png" in (tmp_path / "log").read_text()
    assert list_sorted_names_in_folder(tmp_path) == ["größe\n.png", "log"]


def test_a_new_run_of_test_py_replaces_the_results_of_an_earlier_run(detector_file, image_folder, tmp_path):
    write_noise_image(tmp_path / "r/0.png", 1), write_noise_image(tmp_path / "f/0.png", 2)
    labelled = ["--data-root-pos", tmp_path / "r", "--data-root-neg", tmp_path / "f"]
    start_of = ["--gpu", "cpu", "-j", 0, "--resume", detector_file, "--save_path", tmp_path / "out" / "p"]
    assert run_test_py(*start_of, *labelled) == 0
    assert list_sorted_names_in_folder(tmp_path / "out") == ["p.csv", "p.json", "p.npy", "p.png"]
    assert run_test_py(*start_of, "--input", image_folder) == 0
    assert list_sorted_names_in_folder(tmp_path / "out") == ["p.csv", "p.json", "p.npy"]
    assert run_test_py(*start_of, *labelled) == 0
    assert len(read_csv_rows(tmp_path / "out" / "p.csv")) == 2


# --- sizes and crops ------------------------------------------------------------------------------------------


def test_images_are_resized_and_cropped_as_in_training_unless_flags_set_other_sizes(detector_file, tmp_path, capfd):
    write_noise_image(tmp_path / "a.png", 0, (40, 48))
    own = write_detector(tmp_path / "own", config={**CONFIG, "images": {"crop_size": 16, "resize": 32}})
    scores = {}
    for name, detector, *flags in (
        ("own", own, "--crops", 1),
        ("given", detector_file, "--crop-size", 16, "--resize", 32),
        ("other", own, "--crop-size", 0, "--resize", 0),
        ("plain", detector_file),
    ):
        assert run_test_py(*make_arguments_of_test_py(detector, tmp_path / "a.png", tmp_path / name, *flags)) == 0
        scores[name], err = np.load(tmp_path / f"{name}.npy"), capfd.readouterr().err
        assert ("as in training" in err) == (name == "own"), err
        assert ("training had" in err) == (name == "other"), err
    assert np.array_equal(scores["own"], scores["given"])
    assert np.array_equal(scores["other"], scores["plain"])
    image = torch.from_numpy(np.array(Image.open(tmp_path / "a.png"))).permute(2, 0, 1).contiguous()  # (3, 40, 48)
    resized = torch.nn.functional.interpolate(image[None], (32, 38), mode="bicubic", antialias=True)
    crop = resized[:, :, 8:24, 11:27]
    assert np.array_equal(scores["own"], load(str(detector_file), "cpu").logits(crop).numpy())


@pytest.mark.parametrize(
    ("count", "tops", "lefts"), [(1, [12], [16]), (2, [12], [0, 32]), (4, [0, 24], [0, 32]), (6, [0, 24], [0, 16, 32])]
)
def test_the_score_of_a_large_image_is_the_mean_over_its_crops(detector_file, tmp_path, capfd, count, tops, lefts):
    own = write_detector(tmp_path / "own", config={**CONFIG, "images": {"crop_size": 16, "resize": None}})
    names = [str(tmp_path / "images" / f"{key}.png") for key in range(4)]
    for key, size in enumerate([(40, 48), (40, 48), (16, 16), (12, 60)]):
        write_noise_image(names[key], key, size)
    # With --crops 1, test.py cannot score the fourth image, because its height of 12 pixels is below the crop size 16
    status = 1 if count == 1 else 0
    assert run_test_py(*make_arguments_of_test_py(own, tmp_path / "images", tmp_path / "p", "--crops", count)) == status
    logits = np.load(tmp_path / "p.npy")
    x = torch.from_numpy(np.array(Image.open(names[1]))).permute(2, 0, 1)[None]  # (1, 3, 40, 48)
    plain = load(str(detector_file), "cpu")
    expected = [plain.logits(x[:, :, top : top + 16, left : left + 16]) for top in tops for left in lefts]
    assert np.allclose(logits[1], torch.cat(expected).mean(dim=0), atol=1e-5)
    used = json.loads((tmp_path / "p.json").read_text())["scoring_settings"]
    assert (used["crops"], used["crop_size"], used["resize"]) == (count, 16, None)
    if count > 1:
        detector = load(str(own), "cpu", options={"crops": count})
        assert np.array_equal(detector.predict(names), read_table(tmp_path / "p.csv").prob_fake)
        assert np.array_equal(detector.logits(detector.decode_resize_and_crop_image(names[1])[None])[0], logits[1])
        assert "--crop-size" in error_line_of_test_py(
            capfd, *make_arguments_of_test_py(detector_file, names[0], tmp_path / "q", "--crops", count)
        )


# --- warnings about images ------------------------------------------------------------------------------------


def test_images_whose_size_or_format_differs_from_the_training_images_are_reported(
    detector_file, training_files, image_folder, tmp_path, capfd
):
    run_training(make_arguments_of_train_detector(training_files, tmp_path / "run", "--fixed-sr --epochs 1"))
    trained = tmp_path / "run" / "last.pth.tar"
    known = read_checkpoint_content(trained)["config"]["images"]
    assert (known["sides"], known["jpegs"]) == ([64, 64], 0)
    for name, size in (("a.jpg", (64, 64)), ("b.png", (32, 99)), ("c.png", (260, 264)), ("d.png", (31, 64))):
        write_noise_image(tmp_path / "new" / name, 0, size)
    all_jpeg = write_detector(tmp_path / "jpeg", config={**CONFIG, "images": {"sides": [20, 40], "jpegs": 1.0}})
    for detector, images, *expected in (
        (trained, tmp_path / "new", ("2 of 4", "64", "c.png"), ("1 of 4", "JPEG", "a.jpg")),
        (all_jpeg, image_folder, (f"{IMAGES} of {IMAGES}", "JPEG", "0.png")),
        # A detector without data about its training images cannot warn about images that differ from them
        (detector_file, image_folder),
    ):
        capfd.readouterr()
        assert run_test_py("--gpu", "cpu", "-j", 0, "--resume", detector, "--input", images) == 0
        lines = [line for line in capfd.readouterr().err.splitlines() if "unlike the training images" in line]
        assert len(lines) == len(expected)
        for line, words in zip(lines, expected, strict=True):
            assert all(word in line for word in words), line


def test_scored_images_that_are_training_images_are_counted(image_folder, tmp_path, shrink_resnet18, capfd):
    trained_on = torch.from_numpy(hash_image_files(list_images_without_labels([str(image_folder)])[:3]))
    detector = write_detector(tmp_path / "d", trained_on=trained_on)
    shutil.copytree(image_folder, tmp_path / "copies")
    assert run_test_py(*make_arguments_of_test_py(detector, tmp_path / "copies", tmp_path / "p")) == 0
    assert f"3 of the {IMAGES} images" in capfd.readouterr().err
    assert json.loads((tmp_path / "p.json").read_text())["trained_on"] == 3


# --- runs that are stopped or killed, and started again -------------------------------------------------------


def two_runs_wrote_equal_csv_and_npy_files(path, uninterrupted_results) -> bool:
    """Return whether the CSV files and the NPY files at two save paths are equal byte by byte."""
    return all(
        Path(f"{path}{end}").read_bytes() == Path(f"{uninterrupted_results}{end}").read_bytes()
        for end in (".csv", ".npy")
    )


@pytest.mark.parametrize(("number", "status"), [(9, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_of_test_py_is_finished_by_two_processes_with_the_expected_table(
    detector_file, image_folder, path_of_uninterrupted_scores, tmp_path, capfd, number, status
):
    words = [str(a) for a in make_arguments_of_test_py(detector_file, image_folder, tmp_path / "p")]
    process = start_program(
        "test.py", words, tmp_path / "log", partial(patch_test_py_to_send_signal_before_batch, 3, number)
    )
    assert wait_for_exit(process) == status
    assert not (tmp_path / "p.csv").exists()
    part = tmp_path / "p.csv.0.part"
    done = len(part.read_text().splitlines()) - 2  # the first two lines are the settings and the header
    assert done >= 2
    part.write_bytes(part.read_bytes()[:-3])  # a power failure may cut off the end of a file
    relative = [os.path.relpath(a) if os.path.exists(a) else a for a in words]
    runs = [
        start_program("test.py", relative, tmp_path / f"log{rank['RANK']}", **rank)
        for rank in make_environments_of_two_torchrun_processes()
    ]
    assert [wait_for_exit(run) for run in runs] == [0, 0]
    assert f"{done - 1} of {IMAGES} images are scored already" in (tmp_path / "log0").read_text()
    table, expected = read_table(tmp_path / "p.csv"), read_table(f"{path_of_uninterrupted_scores}.csv")
    assert np.allclose(table.logits, expected.logits, atol=1e-6)
    assert [os.path.abspath(path) for path in table.paths] == expected.paths
    assert [name for name in list_sorted_names_in_folder(tmp_path) if name.startswith((".", "p"))] == [
        "p.csv",
        "p.json",
        "p.npy",
    ]
    before = os.stat(tmp_path / "p.csv").st_mtime_ns
    assert run_test_py(*words) == 0
    assert "finished already" in capfd.readouterr().err
    assert os.stat(tmp_path / "p.csv").st_mtime_ns == before


def test_a_killed_run_of_test_py_that_is_resumed_writes_the_table_of_an_uninterrupted_run(
    detector_file, image_folder, path_of_uninterrupted_scores, tmp_path
):
    words = [str(a) for a in make_arguments_of_test_py(detector_file, image_folder, tmp_path / "p")]
    assert (
        wait_for_exit(
            start_program("test.py", words, tmp_path / "log", partial(patch_test_py_to_send_signal_before_batch, 3, 9))
        )
        == -9
    )
    assert run_test_py(*words) == 0
    assert two_runs_wrote_equal_csv_and_npy_files(tmp_path / "p", path_of_uninterrupted_scores)


def test_an_image_that_was_replaced_is_scored_again(detector_file, image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "copies")
    assert run_test_py(*make_arguments_of_test_py(detector_file, tmp_path / "copies", tmp_path / "p")) == 0
    expected = read_table(tmp_path / "p.csv").logits.copy()
    shutil.copy(image_folder / "4.png", tmp_path / "copies" / "0.png")
    expected[0] = expected[4]
    assert run_test_py(*make_arguments_of_test_py(detector_file, tmp_path / "copies", tmp_path / "p")) == 0
    assert np.allclose(read_table(tmp_path / "p.csv").logits, expected, atol=1e-6)


# At the first start by torchrun, the process with rank 1 kills itself in its second batch
DIES_ONCE = """
import os, runpy, sys
sys.path[:0] = {paths}
from processes import LAYOUTS, SMALL, patch_test_py_to_send_signal_before_batch
LAYOUTS.update(SMALL)
if os.environ["TORCHELASTIC_RESTART_COUNT"] + os.environ["RANK"] == "01":
    patch_test_py_to_send_signal_before_batch(2, 9)
runpy.run_path({program!r}, run_name="__main__")
"""


def test_two_processes_of_which_one_is_killed_and_restarted_write_the_table_of_one_process(
    detector_file, image_folder, path_of_uninterrupted_scores, tmp_path
):
    root = Path(__file__).parents[1]
    paths = [str(root), str(root / "tests")]
    (tmp_path / "program.py").write_text(DIES_ONCE.format(paths=paths, program=str(root / "test.py")))
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node 2 --max-restarts 1".split()
    words = map(
        str,
        [*torchrun, tmp_path / "program.py", *make_arguments_of_test_py(detector_file, image_folder, tmp_path / "p")],
    )
    run = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "images are scored already" in run.stderr
    assert two_runs_wrote_equal_csv_and_npy_files(tmp_path / "p", path_of_uninterrupted_scores)


def test_an_unfinished_score_table_of_another_detector_or_setting_is_refused_and_kept(
    detector_file, image_folder, tmp_path, capfd
):
    words = [str(a) for a in make_arguments_of_test_py(detector_file, image_folder, tmp_path / "p")]
    assert (
        wait_for_exit(
            start_program("test.py", words, tmp_path / "log", partial(patch_test_py_to_send_signal_before_batch, 3, 9))
        )
        == -9
    )
    kept = (tmp_path / "p.csv.0.part").read_bytes()
    other = write_detector(tmp_path / "d", calibration={"temperature": 2.0, "t_real": 0.5, "t_fake": 0.5})
    line = error_line_of_test_py(capfd, *make_arguments_of_test_py(other, image_folder, tmp_path / "p"))
    assert "--overwrite" in line and "detector" in line
    assert "perturbation" in error_line_of_test_py(
        capfd, *words, "--perturb", "combined", "--perturb-protocol", "frank2020"
    )
    assert "crop_size, crops" in error_line_of_test_py(capfd, *words, "--crops", 2, "--crop-size", 16)
    assert (tmp_path / "p.csv.0.part").read_bytes() == kept
    assert run_test_py(*make_arguments_of_test_py(other, image_folder, tmp_path / "p", "--overwrite")) == 0
    table = read_table(tmp_path / "p.csv")
    assert np.allclose(table.prob_fake, 1 / (1 + np.exp(-table.logit_margins / 2)))


def test_a_second_run_with_the_save_path_of_a_running_run_is_refused(detector_file, image_folder, tmp_path, capfd):
    with hold_lock_in_process(tmp_path / ".p.lock"):
        assert "another run" in error_line_of_test_py(
            capfd, *make_arguments_of_test_py(detector_file, image_folder, tmp_path / "p")
        )
        assert list_sorted_names_in_folder(tmp_path) == [".p.lock"]
        assert run_test_py(*make_arguments_of_test_py(detector_file, image_folder, tmp_path / "q")) == 0


def test_test_py_in_two_processes_without_a_save_path_is_refused(detector_file, image_folder, tmp_path):
    words = ["--gpu", "cpu", "-j", "0", "--resume", str(detector_file), "--input", str(image_folder)]
    runs = [
        start_program("test.py", words, tmp_path / rank["RANK"], **rank)
        for rank in make_environments_of_two_torchrun_processes()
    ]
    assert 2 in [wait_for_exit(run) for run in runs]
    assert "--save_path" in (tmp_path / "0").read_text()


# --- perturbations and calibration ----------------------------------------------------------------------------


def test_each_perturbation_gets_a_score_table_and_a_restart_keeps_finished_tables(detector_file, tmp_path, capfd):
    for key in range(3):
        write_noise_image(tmp_path / f"r/{key}.png", key), write_noise_image(tmp_path / f"f/{key}.png", key + 9)
    roots = f"--data-root-pos {tmp_path}/r --data-root-neg {tmp_path}/f"
    words = f"--gpu cpu -j 0 --resume {detector_file} {roots} --perturb all --perturb-protocol frank2020".split()
    words += ["--save_path", f"{tmp_path}/p"]
    assert (
        wait_for_exit(
            start_program("test.py", words, tmp_path / "log", partial(patch_test_py_to_send_signal_before_batch, 3, 15))
        )
        == 143
    )
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob("p_*.csv")}
    assert {path.name for path in finished} == {"p_none.csv", "p_blur.csv"}
    assert run_test_py(*words) == 0
    assert finished == {path: path.stat().st_mtime_ns for path in finished}
    names = ["none", "blur", "combined", "crop", "jpeg", "noise"]
    assert sorted(path.name for path in tmp_path.glob("p_*.csv")) == sorted(f"p_{name}.csv" for name in names)
    out = capfd.readouterr().out
    assert all(name in out[out.index("AUROC in %") :] for name in names)
    perturbation = json.loads((tmp_path / "p_jpeg.json").read_text())["perturbation"]
    assert perturbation == {"name": "jpeg", "strength": None, "label": "jpeg", "protocol": "frank2020", "seed": 123}
    logits = {name: np.load(tmp_path / f"p_{name}.npy") for name in names}
    few = [*words[:6], "--input", f"{tmp_path}/f", "--perturb-protocol", "frank2020", "--perturb", "none", "combined"]
    assert run_test_py(*few, "-b", 1, "--save_path", tmp_path / "few", "--save-residuals", tmp_path / "pictures") == 0
    assert np.allclose(np.load(tmp_path / "few_combined.npy"), logits["combined"][3:], atol=1e-6)
    assert list_sorted_names_in_folder(tmp_path / "pictures") == ["combined", "none"]


def test_test_py_applies_the_calibration_of_a_checkpoint_and_prints_its_thresholds(
    image_folder, path_of_uninterrupted_scores, tmp_path, shrink_resnet18, capfd
):
    calibration = {"temperature": 2.0, "t_real": 0.495, "t_fake": 0.505, "source": "val.csv"}
    detector = write_detector(tmp_path / "d", calibration=calibration)
    assert run_test_py(*make_arguments_of_test_py(detector, image_folder, tmp_path / "p")) == 0
    out = capfd.readouterr().out
    assert "temperature 2)" in out
    assert "fake from P(fake) = 0.505 on, real up to 0.495, unsure between" in out
    before, after = read_table(f"{path_of_uninterrupted_scores}.csv"), read_table(tmp_path / "p.csv")
    assert np.array_equal(before.logits, after.logits)
    assert np.allclose(after.prob_fake, 1 / (1 + np.exp(-before.logit_margins / 2)))
    not_fake = np.where(after.prob_fake <= 0.495, "real", "unsure")
    expected = np.where(after.prob_fake >= 0.505, "fake", not_fake).tolist()
    assert after.predictions == expected
    counts = ", ".join(f"{expected.count(verdict)} {verdict}" for verdict in ("fake", "real", "unsure"))
    assert out.splitlines()[-1].startswith(counts)


# --- wrong arguments and checkpoints --------------------------------------------------------------------------


def test_missing_images_and_wrong_flag_values_are_refused_in_one_line(detector_file, image_folder, tmp_path, capfd):
    (tmp_path / "empty").mkdir()
    start_of = ["--gpu", "cpu", "--resume", detector_file, "--save_path", tmp_path / "out" / "p"]
    reals = ["--data-root-pos", image_folder]
    for fake in (tmp_path / "absent", tmp_path / "empty"):
        assert str(fake) in error_line_of_test_py(capfd, *start_of, *reals, "--data-root-neg", fake)
    for words, named in (
        (reals, "--data-root-neg"),
        ([], "--input"),
        ([*reals, "--input", image_folder], "--input"),
        (["--csv", "absent.csv"], "absent.csv"),
        (["--input", "absent.png"], "absent.png"),
        (["--input", image_folder, "--crop-size", "x"], "--crop-size"),
        (["--input", image_folder, "--precision", "tf32"], "tf32"),
        (["--input", image_folder, "--gpu", "one"], "one"),
        (["--input", image_folder, "--perturb", "smudge"], "smudge"),
    ):
        assert named in error_line_of_test_py(capfd, *start_of, *words)
    assert list_sorted_names_in_folder(tmp_path) == ["empty"]


def test_unusable_checkpoints_and_flags_that_do_not_fit_them_are_refused(
    detector_file, authors_checkpoint_folder, image_folder, tmp_path, capfd
):
    torn = tmp_path / "torn.pth.tar"
    torn.write_bytes(detector_file.read_bytes()[: detector_file.stat().st_size // 2])
    flipped = write_detector(tmp_path / "flipped", config={**CONFIG, "classifier_fingerprint": "0123456789abcdef"})
    pixel, rdn = (
        authors_checkpoint_folder / "pixel.pth.tar",
        ["--sr-weights-file", authors_checkpoint_folder / "sr_bare.pth"],
    )
    stage5 = [authors_checkpoint_folder / "stage5.pth.tar", *rdn]
    for words, *named in (
        ([], "--resume"),
        ([tmp_path / "absent.pth.tar"], "absent.pth.tar"),
        ([torn], "torn.pth.tar", "truncated"),
        ([flipped], "flipped", "damaged"),
        ([pixel, "--idx-stages", 0], "--sr-weights-file"),
        ([pixel, *rdn, "--idx-stages", 5], "--idx-stages"),
        (stage5, "--idx-stages"),  # the weights fit both stage 4 and stage 5, so the flag is required
        ([*stage5, "--idx-stages", 5, "--vgg-weights", "random"], "VGG-19"),
        ([*stage5, "--idx-stages", 5, "--vgg-weights", "absent.pth"], "absent.pth"),
    ):
        resume = ["--resume", *words] if words else []
        line = error_line_of_test_py(
            capfd, "--gpu", "cpu", "--input", image_folder, "--save_path", tmp_path / "out" / "p", *resume
        )
        assert all(word in line for word in named), line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ({"calibration": {"temperature": -1.0, "t_real": 0.5, "t_fake": 0.5}}, "temperature"),
        ({"calibration": "warm"}, "calibration"),
        ({"trained_on": [1, 2]}, "trained_on"),
        ({"config": {**CONFIG, "images": {"crop_size": "big"}}}, "crop_size"),
        ({"config": {**CONFIG, "images": {"crop_size": -16}}}, "crop_size"),
        ({"config": {**CONFIG, "images": {"resize": 0.5}}}, "resize"),
        ({"config": {**CONFIG, "images": {"sides": [1], "jpegs": 0}}}, "sides"),
        ({"config": {**CONFIG, "images": {"sides": [1, 2], "jpegs": "some"}}}, "jpegs"),
        ({"config": {**CONFIG, "images": [16]}}, "images"),
        ({"config": {**CONFIG, "classifier": "resnet18"}}, "classifier"),
        ({"config": {**CONFIG, "features": {"name": 3}}}, "features"),
        ({"config": [CONFIG]}, "config"),
    ],
)
def test_a_checkpoint_with_a_value_of_a_wrong_type_or_range_is_refused_in_one_line(
    image_folder, tmp_path, shrink_resnet18, capfd, content, word
):
    detector = write_detector(tmp_path / "odd.pth.tar", **content)
    assert word in error_line_of_test_py(capfd, *make_arguments_of_test_py(detector, image_folder, tmp_path / "p"))
    assert list_sorted_names_in_folder(tmp_path) == ["odd.pth.tar"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, a number too high is an error")
def test_test_py_uses_the_cpu_for_a_gpu_number_on_a_machine_without_a_gpu(detector_file, image_folder, tmp_path, capfd):
    assert run_test_py(*make_arguments_of_test_py(detector_file, image_folder, tmp_path / "p", "--gpu", 7)) == 0
    lines = [line for line in capfd.readouterr().err.splitlines() if "GPU 7" in line]
    assert len(lines) == 1 and "CPU" in lines[0]
