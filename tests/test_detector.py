"""Tests of the Python function `load`, and of the methods `predict`, `verdict` and `residual` of a detector."""

import io
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from files import expect_user_error
from PIL import Image
from scorings import (
    CONFIG,
    run_test_py,
    write_detector,
    write_images_and_checkpoints_of_the_authors_format,
    write_noise_image,
)

from evaluation import load
from evaluation.inputs import compute_crop_start_positions, cut_evenly_spread_crops
from evaluation.loading import choose_resize_and_crop_settings, convert_gpu_number_to_device_name
from evaluation.score_table import read_table
from utils.compute import choose_device

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def detector(detector_file):
    """Return a small detector on the CPU."""
    return load(str(detector_file), device="cpu")


# --- images ---------------------------------------------------------------------------------------------------


def test_predict_and_verdict_give_bit_for_bit_the_results_of_test_py(detector, detector_file, image_folder, tmp_path):
    assert (
        run_test_py(
            "--gpu", "cpu", "-j", 0, "--resume", detector_file, "--input", image_folder, "--save_path", tmp_path / "p"
        )
        == 0
    )
    table = read_table(tmp_path / "p.csv")
    images = [Image.open(path).convert("RGB") for path in table.paths]
    arrays = [np.asarray(image) for image in images]
    tensors = [torch.from_numpy(array.copy()).permute(2, 0, 1) for array in arrays]
    files = [io.BytesIO(Path(path).read_bytes()) for path in table.paths]
    for given in (table.paths, [Path(path) for path in table.paths], images, arrays, tensors, files):
        assert np.array_equal(detector.predict(given), table.prob_fake)
    assert detector.verdict(iter(table.paths)) == table.predictions


def test_predict_accepts_a_single_image_of_any_kind_without_a_list(detector, image_folder):
    path = image_folder / "1.png"
    array = np.asarray(Image.open(path))
    expected = detector.predict([str(path)])
    assert expected.shape == (1,)
    with open(path, "rb") as file:
        for image in (str(path), path, array, torch.from_numpy(array.copy()).permute(2, 0, 1), Image.open(path), file):
            assert np.array_equal(detector.predict(image), expected)


def test_residual_returns_the_absolute_difference_between_an_image_and_its_resynthesis(detector, image_folder):
    path = str(image_folder / "1.png")
    (residual,) = detector.residual(path)
    assert residual.shape == (3, 32, 32) and residual.dtype == torch.float32
    x, x_hat, _ = detector.compute_resynthesis_and_residual(detector.decode_resize_and_crop_image(path)[None])
    assert torch.equal(residual, (x_hat - x).abs()[0])


def test_predict_verdict_and_residual_of_an_empty_list_are_empty(detector):
    assert detector.predict([]).shape == (0,)
    assert detector.verdict([]) == [] and detector.residual([]) == []


def test_a_pil_image_with_an_exif_orientation_is_turned_upright(detector, image_folder, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # EXIF orientation 6: turn the image by 90 degrees clockwise for display
    Image.open(image_folder / "0.png").save(tmp_path / "turned.png", exif=exif)
    path = str(tmp_path / "turned.png")
    with open(path, "rb") as file:
        assert detector.predict([path]) == detector.predict(Image.open(path)) == detector.predict(file)


@pytest.mark.parametrize(
    "image",
    [
        None, 3, 2.5, object(), b"bytes", [None], [3], torch.rand(3, 32, 32), np.zeros((32, 32, 3)),
        np.zeros((3, 32, 32), np.uint8), np.zeros((32, 32), np.uint8), torch.zeros(1, 32, 32, dtype=torch.uint8),
        torch.zeros(32, 32, dtype=torch.uint8), io.BytesIO(b"no image"), io.StringIO("no image"),
    ],
)  # fmt: skip
def test_predict_verdict_and_residual_refuse_an_argument_that_is_not_an_image(detector, image):
    for method in (detector.predict, detector.verdict, detector.residual):
        with expect_user_error("a path" if not hasattr(image, "read") else "cannot decode"):
            method(image)


def test_a_truncated_image_is_refused_in_one_line_as_a_path_a_file_and_a_pil_image(detector, image_folder, tmp_path):
    path = tmp_path / "half.png"
    path.write_bytes((image_folder / "0.png").read_bytes()[:2000])
    with open(path, "rb") as file:
        for image in (path, file, Image.open(path)):
            with expect_user_error("half.png"):
                detector.predict(image)


def test_a_missing_image_and_a_too_small_image_are_refused_in_one_line(detector, tmp_path):
    with expect_user_error("absent.png"):
        detector.predict("absent.png")
    with expect_user_error("3 x 9"):
        detector.predict(write_noise_image(tmp_path / "a.png", 0, (9, 3)))


# --- crops ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "side", "count", "starts"),
    [
        (40, 16, 1, [12]), (40, 16, 2, [0, 24]), (40, 16, 3, [0, 12, 24]), (16, 16, 3, [0]), (10, 16, 1, [0]),
        (18, 16, 4, [0, 1, 2]),
    ],
)  # fmt: skip
def test_crop_starts_are_evenly_spaced_from_border_to_border(length, side, count, starts):
    assert compute_crop_start_positions(length, side, count) == starts


@pytest.mark.parametrize(("height", "width", "rows", "columns"), [(64, 64, 3, 3), (32, 600, 1, 9), (600, 32, 9, 1)])
def test_the_numbers_of_rows_and_columns_of_crops_follow_the_shape_of_the_image(height, width, rows, columns):
    image = torch.arange(height * width).reshape(1, height, width).expand(3, -1, -1)
    crops, per_row = cut_evenly_spread_crops(image, 32, 9)
    assert per_row == columns and len(crops) == rows * columns
    assert crops.shape[1:] == (3, 32, 32)
    assert torch.equal(crops[0], image[:, :32, :32]) and torch.equal(crops[-1], image[:, -32:, -32:])


# --- load -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), None])
def test_load_accepts_the_cpu_as_a_string_a_torch_device_and_none(detector_file, device):
    if device is None and torch.cuda.is_available():
        pytest.skip("None means the GPU here")
    assert load(str(detector_file), device=device).compute.device == torch.device("cpu")


@pytest.mark.parametrize(
    "device", ["cuda", "cuda:0", "cuda:7", 0, "0", 7, torch.device("cuda"), torch.device("cuda", 1)]
)
def test_load_refuses_a_gpu_in_one_line_on_a_machine_without_a_gpu(detector_file, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with expect_user_error("no GPU"):
        load(str(detector_file), device=device)


def test_choose_device_finds_a_gpu_by_its_number_and_refuses_missing_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    for device in ("cuda", "cuda:0", 0, "0", torch.device("cuda"), torch.device("cuda:0")):
        assert choose_device(convert_gpu_number_to_device_name(device)) == torch.device("cuda:0")
    assert (
        choose_device(convert_gpu_number_to_device_name("cuda:1"))
        == choose_device(convert_gpu_number_to_device_name(1))
        == torch.device("cuda:1")
    )
    with expect_user_error("GPUs 0 to 1"):
        choose_device(convert_gpu_number_to_device_name(2))


@pytest.mark.parametrize("device", ["gpu", "", "cuda:x", -1, 1.5, ["cpu"], True])
def test_load_refuses_a_value_that_does_not_name_a_device_in_one_line(detector_file, device):
    with expect_user_error("expected"):
        load(str(detector_file), device=device)


@pytest.mark.parametrize("precision", ["float16", "half", "", None, 16])
def test_load_refuses_an_unknown_precision_in_one_line(detector_file, precision):
    with expect_user_error("fp32", "bf16", "precision"):
        load(str(detector_file), device="cpu", precision=precision)


@pytest.mark.parametrize("name", ["no_dilated", "stages", "Crops", "crop-size", "dilation"])
def test_load_refuses_an_unknown_option_and_names_the_known_options(detector_file, name):
    with expect_user_error(name, "stage", "dilated", "crop_size", "no_dilation"):
        load(str(detector_file), device="cpu", options={name: 1})


@pytest.mark.parametrize(
    "options", [{"crops": 0}, {"crops": "many"}, {"crop_size": -1}, {"resize": 1.5}, {"no_dilation": 1}]
)
def test_load_refuses_an_option_with_an_impossible_value_in_one_line(detector_file, options):
    with expect_user_error(*options):
        load(str(detector_file), device="cpu", options=options)


@pytest.mark.parametrize(
    "arguments", [{"checkpoint": None}, {"vgg_weights": None}, {"options": ["stage"]}, {"options": 5}]
)
def test_load_refuses_an_argument_of_a_wrong_type_in_one_line(detector_file, arguments):
    with expect_user_error(*arguments, "must be"):
        load(**{"checkpoint": str(detector_file), "device": "cpu", **arguments})


def test_load_accepts_flag_names_of_test_py_as_option_names(tmp_path):
    """`load` accepts `idx_stages` in place of `stage`, and `no_dilation=True` in place of `dilated=False`."""
    folder = write_images_and_checkpoints_of_the_authors_format(tmp_path)
    files = {"checkpoint": str(folder / "pixel.pth.tar"), "resynthesizer": str(folder / "sr_bare.pth"), "device": "cpu"}
    image = str(folder / "real" / "0.png")
    plain = load(**files, options={"dilated": False, "stage": 0}).predict(image)
    assert load(**files, options={"no_dilation": True, "idx_stages": 0}).predict(image) == plain
    assert load(**files, options={"no_dilation": False}).predict(image) == load(**files).predict(image) != plain
    with expect_user_error("twice"):
        load(**files, options={"no_dilation": True, "dilated": True})


def test_image_settings_are_taken_from_the_training_unless_an_option_overrides_them():
    trained = {"crop_size": 128, "resize": None}
    assert choose_resize_and_crop_settings(trained, {}) == (128, None, 9)
    assert choose_resize_and_crop_settings(trained, {"crop_size": 64}) == (64, None, 1)
    assert choose_resize_and_crop_settings(trained, {"crop_size": 64, "crops": 4}) == (64, None, 4)
    assert choose_resize_and_crop_settings(trained, {"crop_size": 0}) == (None, None, 1)
    assert choose_resize_and_crop_settings({}, {"resize": 256}) == (None, 256, 1)
    with expect_user_error("--crop-size"):
        choose_resize_and_crop_settings({}, {"crops": 4})


def test_the_python_example_of_the_readme_runs_and_torch_hub_loads_the_detector(
    detector_file, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("output_end2end/mine").mkdir(parents=True)
    shutil.copy(detector_file, "output_end2end/mine/last.pth.tar")
    for name in ("a.png", "b.jpg"):
        write_noise_image(name, 1)
    example = re.search(r"```python\n(from evaluation import load.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    found = {}
    exec(example[1], found)
    assert found["residual"].shape[0] == 3
    assert capsys.readouterr().out.count("\n") == 2
    detector = torch.hub.load(str(ROOT), "detector", source="local", checkpoint=str(detector_file), device="cpu")
    assert detector.verdict("a.png") == load(str(detector_file), device="cpu").verdict("a.png")


def test_the_identity_of_a_detector_changes_with_its_calibration_and_not_with_its_file_name(
    detector, tmp_path, shrink_resnet18
):
    assert len(detector.describe_model()["classifier_fingerprint"]) == 16
    calibrated = write_detector(tmp_path / "c", calibration={"temperature": 2.0, "t_real": 0.5, "t_fake": 0.5})
    assert load(str(calibrated), "cpu").describe_model() != detector.describe_model()
    assert load(str(write_detector(tmp_path / "d", config=CONFIG)), "cpu").describe_model() == detector.describe_model()


def test_loading_a_detector_does_not_change_the_reproducibility_settings_of_pytorch(detector_file, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    torch.use_deterministic_algorithms(True)
    try:
        load(str(detector_file), device="cpu")
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark and torch.backends.cudnn.allow_tf32
    finally:
        torch.use_deterministic_algorithms(False)
