"""Tests of the files that test.py reads, writes, keeps and replaces."""

import errno
import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_rule import load_fixed_pseudo_random_weights
from PIL import Image
from processes import patch_test_py_to_send_signal_before_batch, start_program, wait_for_exit
from scorings import (
    CONFIG,
    error_line_of_test_py,
    list_sorted_names_in_folder,
    make_arguments_of_test_py,
    read_bytes_of_all_files_in_folder,
    read_csv_rows,
    run_test_py,
    write_detector,
    write_noise_image,
)

from evaluation import load
from evaluation.outputs import ResidualPictures
from evaluation.score_table import read_table
from models.features import VGG19
from models.rdn import RDN
from models.resnet import DeepStemResNet


@pytest.fixture(scope="module")
def flags_to_load_vgg_stage5_detector(tmp_path_factory, shrink_resnet18):
    """Write three files of weights: for RDN, for VGG-19, and for a classifier that reads residuals of stage 5.

    Returns the flags with which test.py loads the three files as a detector.
    """
    folder = tmp_path_factory.mktemp("stage5")
    torch.save(load_fixed_pseudo_random_weights(VGG19()).state_dict(), folder / "vgg19.pth")
    torch.save(
        load_fixed_pseudo_random_weights(RDN(num_features=8, growth_rate=8, num_blocks=1, num_layers=2)).state_dict(),
        folder / "rdn.pth",
    )
    torch.save(
        {"state_dict": load_fixed_pseudo_random_weights(DeepStemResNet(512, "resnet18")).state_dict()},
        folder / "detector.pth",
    )
    files = ["--resume", folder / "detector.pth", "--sr-weights-file", folder / "rdn.pth"]
    return [*files, "--vgg-weights", folder / "vgg19.pth", "--idx-stages", 5, "--no_dilation"]


# --- files that test.py has not written are neither replaced nor deleted --------------------------------------


def write_user_files_at_output_paths(folder: Path) -> None:
    """Write files with the names of the outputs of `test.py --save_path p`, but with other content."""
    write_noise_image(folder / "p.png", 0)
    (folder / "p.csv").write_text("path,label\np.png,real\n")
    (folder / "p.json").write_text('{"epochs": 3}')
    np.save(folder / "p.npy", np.zeros((3, 2), np.float32))
    (folder / "p.csv.0.part").write_text("half of a novel")


@pytest.mark.parametrize("name", ["p.png", "p.csv", "p.json", "p.npy", "p.csv.0.part"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_of_the_user_at_the_save_path_is_refused_and_unchanged(
    detector_file, image_folder, tmp_path, capfd, name, overwrite
):
    write_user_files_at_output_paths(tmp_path)
    for path in tmp_path.iterdir():
        if path.name != name:
            path.unlink()
    before = read_bytes_of_all_files_in_folder(tmp_path)
    line = error_line_of_test_py(
        capfd,
        *make_arguments_of_test_py(
            detector_file, image_folder, tmp_path / "p", *(["--overwrite"] if overwrite else [])
        ),
    )
    assert name in line
    assert read_bytes_of_all_files_in_folder(tmp_path) == before


def test_an_input_image_with_the_file_name_of_the_figure_is_refused_and_unchanged(detector_file, tmp_path, capfd):
    cat = write_noise_image(tmp_path / "cat.png", 0)
    before = read_bytes_of_all_files_in_folder(tmp_path)
    assert "cat.png" in error_line_of_test_py(capfd, *make_arguments_of_test_py(detector_file, cat, tmp_path / "cat"))
    assert read_bytes_of_all_files_in_folder(tmp_path) == before


def test_test_py_does_not_replace_the_csv_list_of_its_images(detector_file, tmp_path, capfd):
    write_noise_image(tmp_path / "r.png", 0), write_noise_image(tmp_path / "f.png", 1)
    (tmp_path / "data.csv").write_text("path,label\nr.png,real\nf.png,fake\n")
    words = ["--gpu", "cpu", "-j", 0, "--resume", detector_file, "--csv", tmp_path / "data.csv", "--save_path"]
    before = read_bytes_of_all_files_in_folder(tmp_path)
    assert "data.csv" in error_line_of_test_py(capfd, *words, tmp_path / "data")
    assert read_bytes_of_all_files_in_folder(tmp_path) == before
    assert run_test_py(*words, tmp_path / "p") == 0
    before = read_bytes_of_all_files_in_folder(tmp_path)
    again = [tmp_path / "p.csv" if word == tmp_path / "data.csv" else word for word in words]
    assert "p.csv" in error_line_of_test_py(capfd, *again, tmp_path / "p")
    assert read_bytes_of_all_files_in_folder(tmp_path) == before


def test_test_py_does_not_replace_the_checkpoint_of_the_detector(tmp_path, image_folder, shrink_resnet18, capfd):
    detector = write_detector(tmp_path / "p.csv")
    before = read_bytes_of_all_files_in_folder(tmp_path)
    assert "p.csv" in error_line_of_test_py(capfd, *make_arguments_of_test_py(detector, image_folder, tmp_path / "p"))
    assert read_bytes_of_all_files_in_folder(tmp_path) == before


def test_a_file_of_the_user_at_the_path_of_a_residual_picture_is_refused_and_unchanged(
    detector_file, image_folder, tmp_path, capfd, monkeypatch
):
    monkeypatch.chdir(image_folder)
    write_noise_image(tmp_path / "pictures" / "3.png.residual.png", 0)
    before = read_bytes_of_all_files_in_folder(tmp_path)
    line = error_line_of_test_py(
        capfd,
        *make_arguments_of_test_py(
            detector_file, ".", tmp_path / "out" / "p", "--save-residuals", tmp_path / "pictures"
        ),
    )
    assert "3.png.residual.png" in line
    assert read_bytes_of_all_files_in_folder(tmp_path) == before


def test_a_user_file_at_the_output_path_of_a_later_perturbation_is_refused_before_scoring(
    detector_file, image_folder, tmp_path, capfd
):
    (tmp_path / "p_blur_sigma_2.csv").write_text("mine")
    words = make_arguments_of_test_py(detector_file, image_folder, tmp_path / "p", "--perturb", "none", "blur=2")
    assert "p_blur_sigma_2.csv" in error_line_of_test_py(capfd, *words)
    assert list_sorted_names_in_folder(tmp_path) == ["p_blur_sigma_2.csv"]


def test_a_killed_run_of_test_py_that_has_not_written_its_json_file_is_resumed(detector_file, image_folder, tmp_path):
    words = [str(a) for a in make_arguments_of_test_py(detector_file, image_folder, tmp_path / "p")]
    assert (
        wait_for_exit(
            start_program("test.py", words, tmp_path / "log", partial(patch_test_py_to_send_signal_before_batch, 3, 9))
        )
        == -9
    )
    np.save(tmp_path / "p.npy", np.zeros((3, 2), np.float32))
    assert run_test_py(*words) == 0
    assert np.load(tmp_path / "p.npy").shape == (9, 2)


@pytest.mark.parametrize("save_path", [".", "..", "/", "out/..", ".npy", "./", "x" * 300])
def test_a_save_path_without_a_usable_file_name_is_refused_in_one_line(
    detector_file, image_folder, tmp_path, monkeypatch, capfd, save_path
):
    monkeypatch.chdir(tmp_path)
    error_line_of_test_py(capfd, *make_arguments_of_test_py(detector_file, image_folder, save_path))
    assert list_sorted_names_in_folder(tmp_path) == []


def test_an_output_folder_that_is_a_file_is_refused_in_one_line(detector_file, image_folder, tmp_path, capfd):
    (tmp_path / "file").write_text("mine")
    for place in ([tmp_path / "file" / "p"], [tmp_path / "p", "--save-residuals", tmp_path / "file"]):
        assert str(tmp_path / "file") in error_line_of_test_py(
            capfd, *make_arguments_of_test_py(detector_file, image_folder, *place)
        )
    assert read_bytes_of_all_files_in_folder(tmp_path) == {"file": b"mine"}


# --- outputs are not counted as images ------------------------------------------------------------------------


def test_results_written_into_the_scored_folders_are_not_scored(detector_file, tmp_path):
    for key in range(3):
        write_noise_image(tmp_path / f"r/{key}.png", key), write_noise_image(tmp_path / f"f/{key}.png", key + 9)
    roots = ["--data-root-pos", tmp_path / "r", "--data-root-neg", tmp_path / "f"]
    words = [
        "--gpu",
        "cpu",
        "-j",
        0,
        "--resume",
        detector_file,
        *roots,
        "--save-residuals",
        tmp_path / "r" / "residuals",
    ]
    for _ in range(2):
        assert run_test_py(*words, "--save_path", tmp_path / "f" / "p", "--overwrite") == 0
        assert len(read_csv_rows(tmp_path / "f" / "p.csv")) == 6
    assert (tmp_path / "f" / "p.png").exists()
    assert len(list((tmp_path / "r" / "residuals").rglob("*.residual.png"))) == 6


def test_residual_pictures_in_the_scored_working_folder_are_not_scored(detector_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_noise_image("a.png", 0)
    for _ in range(2):
        assert (
            run_test_py(
                *make_arguments_of_test_py(detector_file, ".", "p", "--save-residuals", "residuals", "--overwrite")
            )
            == 0
        )
        assert len(read_csv_rows("p.csv")) == 1


# --- an unusable image becomes an error row and does not end the run ------------------------------------------


def test_unreadable_images_become_rows_with_an_error(detector_file, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    write_noise_image("good.png", 0), write_noise_image("small.png", 0, (3, 9))
    Path("broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing more")
    assert (
        run_test_py(
            *make_arguments_of_test_py(detector_file, "good.png", "s")[:-3],
            "good.png",
            "broken.png",
            "small.png",
            "--save_path",
            "s",
        )
        == 1
    )
    out, err = capfd.readouterr()
    rows = read_csv_rows("s.csv")
    assert [bool(row["error"]) for row in rows] == [False, True, True]
    assert rows[1]["logit_fake"] == rows[1]["prob_fake"] == rows[1]["prediction"] == ""
    assert np.isnan(np.load("s.npy")).any(axis=1).tolist() == [False, True, True]
    assert "not scored: broken.png" in err and "Traceback" not in err
    assert "2 could not be scored" in out


def test_an_image_smaller_than_the_stride_of_the_features_becomes_a_row_with_an_error(
    flags_to_load_vgg_stage5_detector, tmp_path, capfd
):
    for name, size in (("a.png", (32, 32)), ("b.png", (12, 12)), ("c.png", (32, 32)), ("d.png", (64, 12))):
        write_noise_image(tmp_path / "images" / name, 0, size)
    words = [
        "--gpu",
        "cpu",
        "-j",
        0,
        *flags_to_load_vgg_stage5_detector,
        "--input",
        tmp_path / "images",
        "--save_path",
        tmp_path / "p",
    ]
    for _ in range(2):  # the second call reads the finished score table of the first call
        assert run_test_py(*words) == 1
        errors = [row["error"] for row in read_csv_rows(tmp_path / "p.csv")]
        assert [bool(error) for error in errors] == [False, True, False, True]
        assert "12 x 12" in errors[1] and "16" in errors[1]
        assert "Traceback" not in capfd.readouterr().err


def test_crops_smaller_than_the_stride_of_the_features_are_refused_in_one_line(
    flags_to_load_vgg_stage5_detector, tmp_path, capfd
):
    write_noise_image(tmp_path / "a.png", 0, (64, 64))
    words = [
        "--gpu",
        "cpu",
        "-j",
        0,
        *flags_to_load_vgg_stage5_detector,
        "--input",
        tmp_path / "a.png",
        "--save_path",
        tmp_path / "p",
    ]
    for crops in (1, 4):
        assert "--crop-size 12" in error_line_of_test_py(capfd, *words, "--crop-size", 12, "--crops", crops)
    assert list_sorted_names_in_folder(tmp_path) == ["a.png"]


def test_an_image_whose_residual_picture_cannot_be_written_becomes_a_row_with_an_error(
    detector_file, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    # The file name of the third residual picture would have 262 characters, but at most 255 are possible
    for name in ("a.png", "b.png", "x" * 245 + ".png"):
        write_noise_image(f"images/{name}", 0)
    assert run_test_py(*make_arguments_of_test_py(detector_file, "images", "p", "--save-residuals", "pictures")) == 1
    assert [bool(row["error"]) for row in read_csv_rows("p.csv")] == [False, False, True]
    assert list_sorted_names_in_folder(tmp_path / "pictures" / "images") == ["a.png.residual.png", "b.png.residual.png"]


def test_a_full_disk_stops_the_program_instead_of_giving_a_row_with_an_error(
    detector_file, image_folder, tmp_path, monkeypatch
):
    def raise_error_of_full_disk(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ResidualPictures, "draw_residual_picture_of_image", raise_error_of_full_disk)
    words = make_arguments_of_test_py(detector_file, image_folder, tmp_path / "p", "--save-residuals", tmp_path / "r")
    assert run_test_py(*words) == 2
    assert not (tmp_path / "p.csv").exists()
    monkeypatch.undo()
    assert run_test_py(*words) == 0


def test_an_image_on_which_a_perturbation_fails_becomes_a_row_with_an_error(detector_file, tmp_path):
    write_noise_image(tmp_path / "images" / "a.png", 0)
    write_noise_image(tmp_path / "images" / "b.png", 1, (4, 4))  # this image is smaller than the blur kernel
    words = make_arguments_of_test_py(detector_file, tmp_path / "images", tmp_path / "p", "--perturb", "blur=4")
    status = run_test_py(*words)
    errors = [bool(row["error"]) for row in read_csv_rows(tmp_path / "p.csv")]
    assert errors in ([False, True], [False, False])
    assert status == any(errors)


def test_if_the_network_fails_on_one_image_of_a_batch_only_its_row_has_an_error(
    detector_file, image_folder, tmp_path, monkeypatch
):
    network = type(load(str(detector_file), "cpu").network)
    forward, resynthesize = network.forward, network.resynthesize
    images = [np.asarray(Image.open(image_folder / f"{key}.png")) for key in range(9)]
    bad = torch.from_numpy(images[2].transpose(2, 0, 1).copy()) / 255  # (3, 32, 32)

    def raise_if_batch_contains_chosen_image(method, self, x):
        if any(image.shape == bad.shape and torch.equal(image, bad) for image in x):
            raise RuntimeError("no such kernel")
        return method(self, x)

    monkeypatch.setattr(network, "forward", lambda self, x: raise_if_batch_contains_chosen_image(forward, self, x))
    monkeypatch.setattr(
        network, "resynthesize", lambda self, x: raise_if_batch_contains_chosen_image(resynthesize, self, x)
    )
    assert run_test_py(*make_arguments_of_test_py(detector_file, image_folder, tmp_path / "p")) == 1
    errors = [row["error"] for row in read_csv_rows(tmp_path / "p.csv")]
    assert [bool(error) for error in errors] == [key == 2 for key in range(9)]
    assert "2.png" in errors[2] and "no such kernel" in errors[2]


# --- residual pictures ----------------------------------------------------------------------------------------


def test_residual_pictures_can_be_drawn_after_the_score_table_is_finished(
    detector_file, image_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(image_folder)
    words = make_arguments_of_test_py(detector_file, ".", tmp_path / "p")
    assert run_test_py(*words) == 0
    logits = np.load(tmp_path / "p.npy")
    pictures = tmp_path / "pictures"
    words += ["--save-residuals", pictures]
    assert run_test_py(*words) == 0
    assert list_sorted_names_in_folder(pictures) == [f"{key}.png.residual.png" for key in range(9)]
    assert np.array_equal(np.load(tmp_path / "p.npy"), logits)
    (pictures / "4.png.residual.png").unlink()
    others = {path: path.stat().st_mtime_ns for path in pictures.iterdir()}
    assert run_test_py(*words) == 0
    assert len(list_sorted_names_in_folder(pictures)) == 9
    assert others == {path: path.stat().st_mtime_ns for path in others}


def test_residual_pictures_are_drawn_again_if_the_image_size_has_changed(
    detector_file, image_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(image_folder)
    words = make_arguments_of_test_py(detector_file, "3.png", tmp_path / "p", "--save-residuals", tmp_path / "pictures")
    assert run_test_py(*words) == 0
    picture = tmp_path / "pictures" / "3.png.residual.png"
    before = picture.read_bytes()
    assert run_test_py(*words, "--resize", 64) == 0
    assert picture.read_bytes() != before


@pytest.mark.parametrize(("count", "rows", "columns"), [(1, 1, 1), (4, 2, 2), (9, 3, 3)])
def test_residual_pictures_show_the_crops_that_were_scored(tmp_path, shrink_resnet18, count, rows, columns):
    crops_of_16 = {**CONFIG, "images": {"crop_size": 16, "resize": None}}
    detector = load(str(write_detector(tmp_path / "d", config=crops_of_16)), "cpu", options={"crops": count})
    image = write_noise_image(tmp_path / "a.png", 3, (48, 52))
    prepared = detector.decode_resize_and_crop_image(image)
    examination = detector.compute_resynthesis_residual_and_logits(prepared)
    assert examination.x.shape == (count, 3, 16, 16)
    assert examination.columns == columns
    assert torch.allclose(examination.logits, detector.logits(prepared[None])[0], atol=1e-5)
    words = make_arguments_of_test_py(
        tmp_path / "d", image, tmp_path / "p", "--crops", count, "--save-residuals", tmp_path / "pictures"
    )
    assert run_test_py(*words) == 0
    (picture,) = (tmp_path / "pictures").rglob("*.residual.png")
    with Image.open(picture) as opened:
        width, height = opened.size
    # At 160 dots per inch, each image is 3.4 inches wide, and title and margin are together 0.4 inches high
    expected = 160 * (3.4 * (16 * rows) / (16 * columns) + 0.4)
    assert abs(height - expected) <= 2
    assert width == 11 * 160


# --- settings -------------------------------------------------------------------------------------------------


def test_test_py_refuses_a_rank_without_a_world_size_in_one_line(detector_file, image_folder, tmp_path):
    words = [str(a) for a in make_arguments_of_test_py(detector_file, image_folder, tmp_path / "p")]
    for incomplete in ({"RANK": "1"}, {"WORLD_SIZE": "2"}):
        process = start_program("test.py", words, tmp_path / "log", **incomplete)
        assert wait_for_exit(process) == 2
        lines = (tmp_path / "log").read_text().splitlines()
        assert "RANK" in lines[-1] and "WORLD_SIZE" in lines[-1]
    assert not (tmp_path / "p.csv").exists()


def test_the_json_file_contains_crop_size_number_of_crops_and_resizing(detector_file, image_folder, tmp_path):
    assert (
        run_test_py(
            *make_arguments_of_test_py(
                detector_file, image_folder, tmp_path / "p", "--crop-size", 16, "--crops", 2, "--resize", 32
            )
        )
        == 0
    )
    used = json.loads((tmp_path / "p.json").read_text())["scoring_settings"]
    assert (used["crop_size"], used["crops"], used["resize"]) == (16, 2, 32)
    assert read_table(tmp_path / "p.csv").has_score.all()
    assert os.path.exists(tmp_path / "p.npy")
