"""Tests of the residual cache, which stores the residuals of images in files during a training."""

import os
import shutil
import time

import numpy as np
import pytest
import torch
from files import expect_user_error
from PIL import Image
from trainings import (
    CPU,
    TINY,
    make_arguments_of_train_detector,
    read_checkpoint_without_settings_entry,
    read_epoch_statistics_of_training,
    run_training,
)

from data.datasets import Augmentation, ImageDataset, Key
from data.images import Header, SizePolicy
from data.lists import Item
from data.residuals import (
    STORAGE,
    CacheOptions,
    ResidualDataset,
    create_cache_folder,
    create_residual_datasets,
    residuals_fit_in_cache,
)
from models.features import Pixels
from models.rdn import RDN
from models.resnet import DeepStemResNet
from models.resynthesis import ResynthesisDetector
from train_detector import residual_cache_key, residual_without_gradients
from utils.compute import Compute
from utils.distributed import World
from utils.labels import FAKE

pytestmark = pytest.mark.usefixtures("shrink_resnet18")

ON_CPU = Compute(CPU, "fp32")
FIRST = Key(0, 0)
WHOLE_IMAGES = SizePolicy(4)


def image_dataset(*paths, augmentation=None, policy=SizePolicy(4), transform=None):  # noqa: B008
    """Return a dataset of images of 64 x 64 pixels with the label fake."""
    headers = [Header((64, 64)) for _ in paths]
    return ImageDataset([Item(str(path), FAKE, "") for path in paths], policy, augmentation, transform, headers)


def residual_dataset(folder, *paths, storage="fp16", **options):
    """Return a dataset that stores residuals of images as files in a folder, and reads these files."""
    return ResidualDataset(image_dataset(*paths, **options), folder, STORAGE[storage])


def tiny_detector():
    """Return a small detector with random weights."""
    torch.manual_seed(0)
    return ResynthesisDetector(RDN(**TINY).eval(), Pixels(), DeepStemResNet(3, "resnet18")).eval()


def cached_file_names(folder):
    """Return the sorted names of all files in the cache folder."""
    return sorted(path.name for path in folder.glob("*/*.npz"))


# --- storing and reading ------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["fp16", "fp32"])
def test_residuals_read_from_the_cache_have_the_documented_precision(training_files, tmp_path, storage):
    values = torch.logspace(-12, 4.8, 10_000, dtype=torch.float64).float().reshape(1, 100, 100)
    residual_dataset(tmp_path, training_files / "real/0.png", storage=storage).store_residual(FIRST, values)
    sample = residual_dataset(tmp_path, training_files / "real/0.png", storage=storage)[FIRST]
    assert sample.error is None and sample.x.shape == (1, 1, 100, 100)
    error = (sample.x[0].float() - values).abs()
    is_normal = values >= 2**-14
    if storage == "fp32":
        assert error.max() == 0
    assert (error / values)[is_normal].max() <= 2**-11
    assert error[~is_normal].max() <= 2**-25


def test_a_file_that_another_training_renames_meanwhile_does_not_stop_the_run(tmp_path):
    (tmp_path / "0.npz").write_bytes(bytes(10))
    # The broken link stands for a file that another training has just renamed: its size cannot be read
    (tmp_path / ".0.npz.123.tmp").symlink_to("absent")
    assert residuals_fit_in_cache(tmp_path, [100], 1000)


@pytest.mark.parametrize("value, words", [(70_000.0, "--cache-precision fp32"), (float("nan"), "not finite")])
def test_a_residual_that_cannot_be_stored_is_refused_with_the_reason(training_files, tmp_path, value, words):
    with expect_user_error("0.png", words):
        residual_dataset(tmp_path, training_files / "real/0.png").store_residual(FIRST, torch.full((1, 2, 2), value))
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_of_the_cache_is_never_used(training_files, tmp_path):
    dataset = residual_dataset(tmp_path, training_files / "real/0.png")
    dataset.store_residual(FIRST, torch.rand(3, 5, 7))
    path, expected = dataset.compute_residual_file_path(FIRST), dataset[FIRST].x
    whole = path.read_bytes()
    damaged = [b"", whole[:40], whole[:-1], bytes(len(whole))]
    for position in range(0, len(whole), 7):
        flipped = bytes([whole[position] ^ 16])
        damaged.append(whole[:position] + flipped + whole[position + 1 :])
    for content in damaged:
        path.write_bytes(content)
        sample = dataset[FIRST]
        if sample.error is None:  # only a time stamp in the .npz file is damaged, and the residual is intact
            assert torch.equal(sample.x, expected)
        else:
            assert "damaged" in sample.error and not path.exists()


# --- one file per image, crop, direction and setting --------------------------------------------------------


def test_the_cache_has_one_file_for_each_crop_and_each_mirroring_of_an_image(training_files, tmp_path):
    path = shutil.copy(training_files / "real/0.png", tmp_path)
    plain = residual_dataset(tmp_path, path)
    augmented = residual_dataset(tmp_path, path, augmentation=Augmentation(1))
    keys = [Key(epoch, 0) for epoch in range(50)]
    upright = next(key for key in keys if not augmented.images.is_mirrored(key))
    mirrored = next(key for key in keys if augmented.images.is_mirrored(key))
    assert (
        plain.compute_residual_file_path(FIRST)
        == augmented.compute_residual_file_path(upright)
        != augmented.compute_residual_file_path(mirrored)
    )
    crops = residual_dataset(tmp_path, path, augmentation=Augmentation(1, crops=3), policy=SizePolicy(4, 16))
    names = {crops.compute_residual_file_path(Key(epoch, index)) for epoch in range(50) for index in range(3)}
    assert (
        len(names | {plain.compute_residual_file_path(FIRST), augmented.compute_residual_file_path(mirrored)})
        == 2 * 3 + 2
    )


def test_an_image_that_has_changed_gets_a_new_file_in_the_cache(training_files, tmp_path):
    path = shutil.copy(training_files / "real/0.png", tmp_path)
    dataset = residual_dataset(tmp_path, path)
    before = dataset.compute_residual_file_path(FIRST)
    os.utime(path, ns=(1, 1))
    assert dataset.compute_residual_file_path(FIRST) != before


CONFIG = {
    "resynthesizer": {"name": "rdn", "scale": 4, "args": {}},
    "resynthesizer_fingerprint": "a",
    "features": {"name": "vgg19", "args": {"stage": 5}},
    "residual": "absolute",
}


def create_residual_cache_folder(
    root, policy=WHOLE_IMAGES, precision="fp32", features_fingerprint="b", code=(), **changed_config
):
    """Create the folder for the cached residuals of a detector, and return the path of the folder."""
    config = {**CONFIG, **changed_config}
    key = residual_cache_key(config, features_fingerprint, code, policy, Compute(CPU, precision))
    return create_cache_folder(root, key)


@pytest.mark.parametrize(
    "change",
    [
        {"resynthesizer_fingerprint": "c"},
        {"resynthesizer": {"name": "bicubic", "scale": 4, "args": {}}},
        {"features": {"name": "vgg19", "args": {"stage": 4}}},
        {"residual": "signed"},
        {"features_fingerprint": "c"},
        {"code": ("d",)},
        {"policy": SizePolicy(4, resize=32)},
        {"policy": SizePolicy(4, crop_size=32)},
        {"precision": "bf16"},
    ],
)
def test_changing_a_setting_of_the_residual_changes_the_folder_of_the_cache(tmp_path, change):
    assert (
        create_residual_cache_folder(tmp_path)
        == create_residual_cache_folder(tmp_path)
        != create_residual_cache_folder(tmp_path, **change)
    )


@pytest.mark.parametrize("module", ["torch", "PIL", "numpy"])
def test_changing_the_version_of_a_library_changes_the_folder_of_the_cache(tmp_path, monkeypatch, module):
    before = create_residual_cache_folder(tmp_path)
    monkeypatch.setattr(f"{module}.__version__", "0")
    assert create_residual_cache_folder(tmp_path) != before


def test_opening_the_cache_deletes_only_old_temporary_files(tmp_path):
    folder = create_residual_cache_folder(tmp_path)
    for name, age in ((".a.npz.1.tmp", 7200), (".b.npz.2.tmp", 60)):
        (folder / name).touch()
        os.utime(folder / name, (time.time() - age, time.time() - age))
    create_residual_cache_folder(tmp_path)
    assert sorted(os.listdir(folder)) == [".b.npz.2.tmp", "settings.txt"]


# --- which images are cached, and filling the cache ---------------------------------------------------------


def create_datasets_of_cached_residuals(folder, images, max_gb=1.0):
    """Return a list with one dataset of cached residuals, or [] if the residuals of `images` cannot be cached."""
    options = CacheOptions(folder, "fp16", max_gb)
    key = residual_cache_key(CONFIG, "b", (), images.policy, ON_CPU)
    return create_residual_datasets([images], tiny_detector().residual_shape, key, options, World())


def test_images_with_random_crops_and_images_beyond_the_size_limit_are_not_cached(training_files, tmp_path):
    path = training_files / "real/0.png"
    assert len(create_datasets_of_cached_residuals(tmp_path, image_dataset(path))) == 1
    assert create_datasets_of_cached_residuals(tmp_path, image_dataset(path), max_gb=0) == []
    assert create_datasets_of_cached_residuals(tmp_path, image_dataset(path, transform=str)) == []
    changing = image_dataset(path, augmentation=Augmentation(1), policy=SizePolicy(4, 32))
    assert create_datasets_of_cached_residuals(tmp_path, changing) == []
    fixed = image_dataset(path, augmentation=Augmentation(1, crops=2), policy=SizePolicy(4, 32))
    assert len(create_datasets_of_cached_residuals(tmp_path, fixed)) == 1


def test_each_cached_residual_is_computed_once_and_equals_the_residual_of_the_detector(training_files, tmp_path):
    paths = sorted((training_files / "real").iterdir())
    options = {"augmentation": Augmentation(1, crops=2), "policy": SizePolicy(4, 16), "storage": "fp32"}
    dataset = residual_dataset(tmp_path, *paths, **options)
    detector, computed = tiny_detector(), []

    def collect_image_keys_and_compute_residuals(batch):
        computed.extend(batch.keys)
        return residual_without_gradients(detector, ON_CPU, None, batch)

    for _ in range(2):
        dataset.store_missing_residuals(
            0, collect_image_keys_and_compute_residuals, lambda loader, _: loader, 0, ON_CPU, World()
        )
        assert len(computed) == len(set(computed)) == len(list(tmp_path.iterdir())) == 10
    for index in range(10):
        x = dataset.images[Key(0, index)].x / 255
        with torch.no_grad():
            expected = detector.residual(x, detector.resynthesize(x))
        torch.testing.assert_close(dataset[Key(0, index)].x, expected, rtol=0, atol=1e-6)


# --- in train_detector.py -----------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", ["--idx-stages 2", "--crop-size 40 --crops-per-image 2"])
def test_a_training_with_the_cache_has_the_losses_of_a_training_without_the_cache(training_files, tmp_path, flags):
    """With --micro-batch 1, rounding errors are as in the cache, whose residuals are computed one at a time."""
    flags = f"--fixed-sr --epochs 2 VALIDATE {flags}"
    run_training(
        make_arguments_of_train_detector(training_files, tmp_path / "without", f"{flags} --no-cache --micro-batch 1")
    )
    run_training(make_arguments_of_train_detector(training_files, tmp_path / "with", f"{flags} --cache-precision fp32"))
    assert not (tmp_path / "without/residual_cache").exists() and cached_file_names(tmp_path / "with/residual_cache")
    assert read_epoch_statistics_of_training(tmp_path / "with") == read_epoch_statistics_of_training(
        tmp_path / "without"
    )


def test_a_cache_in_half_precision_changes_the_loss_by_at_most_3_percent(training_files, tmp_path):
    # All ten images form one batch, because batch norm on a batch of two images would amplify rounding errors.
    flags = "--fixed-sr --epochs 1 --batch-size 10"
    run_training(make_arguments_of_train_detector(training_files, tmp_path / "full", f"{flags} --cache-precision fp32"))
    run_training(
        make_arguments_of_train_detector(
            training_files, tmp_path / "half", f"{flags} --cache-dir {tmp_path}/half_cache"
        )
    )
    assert cached_file_names(tmp_path / "half_cache") and not (tmp_path / "half/residual_cache").exists()
    assert read_epoch_statistics_of_training(tmp_path / "half")[0]["loss"] == pytest.approx(
        read_epoch_statistics_of_training(tmp_path / "full")[0]["loss"], rel=3e-2
    )


def test_a_training_with_a_filled_cache_decodes_no_images(training_files, tmp_path, monkeypatch):
    flags = "--fixed-sr --epochs 2 VALIDATE --crop-size 40 --crops-per-image 2 --cache-dir"
    run_training([*make_arguments_of_train_detector(training_files, tmp_path / "a", flags), tmp_path / "cache"])
    before = cached_file_names(tmp_path / "cache")
    monkeypatch.setattr("data.datasets.read_image_as_tensor", None)
    run_training([*make_arguments_of_train_detector(training_files, tmp_path / "b", flags), tmp_path / "cache"])
    assert cached_file_names(tmp_path / "cache") == before
    one, two = (read_checkpoint_without_settings_entry(tmp_path / name / "last.pth.tar") for name in "ab")
    assert all(torch.equal(value, two["state_dict"][name]) for name, value in one["state_dict"].items())


def test_training_refuses_images_of_different_sizes_but_caches_residuals_of_their_crops(training_files, tmp_path):
    mixed = shutil.copytree(training_files, tmp_path / "files")
    Image.fromarray(np.zeros((72, 100, 3), np.uint8)).save(mixed / "real/9.png")
    with expect_user_error("9.png", "100 x 72", "--crop-size"):
        run_training(make_arguments_of_train_detector(mixed, tmp_path / "out", "--fixed-sr"))
    with expect_user_error("9.png", "100 x 72", "--crop-size"):
        flags = f"--fixed-sr --val-root-pos {mixed}/real --val-root-neg FAKE"
        run_training(make_arguments_of_train_detector(training_files, tmp_path / "out", flags))
    assert not (tmp_path / "out").exists()
    run_training(
        make_arguments_of_train_detector(
            mixed, tmp_path / "out", "--fixed-sr --epochs 2 --crop-size 48 --crops-per-image 2"
        )
    )
    assert 22 <= len(cached_file_names(tmp_path / "out/residual_cache")) <= 44
    with expect_user_error("--crop-size"):
        run_training(
            make_arguments_of_train_detector(training_files, tmp_path / "none", "--fixed-sr --crops-per-image 2")
        )
