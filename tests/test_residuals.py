"""Residuals kept on disk: never a stale or damaged one, and the numbers of a training without them."""

import os
import shutil

import numpy as np
import pytest
import torch
from files import mistake
from PIL import Image
from trainings import CPU, TINY, detector_arguments, stats, train, without_settings

from data.datasets import Draws, ImageDataset, Key
from data.images import Header, SizePolicy
from data.lists import Item
from data.residuals import STORAGE, ResidualDataset
from evaluation.sources import frozen_residuals, kept_residuals
from models.rdn import RDN
from models.resnet import DeepStemResNet
from models.resynthesis import ResynthesisDetector
from utils.compute import Compute
from utils.distributed import World
from utils.labels import FAKE
from utils.options import train_detector_parser

pytestmark = pytest.mark.usefixtures("small_classifier")

ON_CPU = Compute(CPU, "fp32")
FIRST = Key(0, 0)


def names_in(folder):
    return sorted(p.name for p in folder.glob("*/*.npz"))


def residuals_of(folder, *paths, draws=None, size=None, storage="fp16"):
    """A data set of images, as residuals kept in the folder."""
    images = ImageDataset([Item(str(p), FAKE, "") for p in paths], SizePolicy(4, size), draws)
    return ResidualDataset(images, folder, STORAGE[storage])


@pytest.mark.parametrize("storage", ["fp16", "fp32"])
def test_what_is_read_is_what_was_kept(files, tmp_path, storage):
    values = torch.logspace(-12, 4.8, 10_000, dtype=torch.float64).float().reshape(1, 100, 100)
    residuals_of(tmp_path, files / "real/0.png", storage=storage).write(FIRST, values)
    sample = residuals_of(tmp_path, files / "real/0.png", storage=storage)[FIRST]
    error = (sample.x[0].float() - values).abs()
    assert sample.error is None and sample.x.shape == (1, 1, 100, 100)
    normal = values >= 2**-14
    assert error.max() == 0 if storage == "fp32" else (error / values)[normal].max() <= 2**-11
    assert error[~normal].max() <= 2**-25


@pytest.mark.parametrize("value", [70_000.0, float("nan")])
def test_what_half_precision_cannot_hold_is_said(files, tmp_path, value):
    with mistake("--cache-precision fp32"):
        residuals_of(tmp_path, files / "real/0.png").write(FIRST, torch.full((1, 2, 2), value))
    assert not list(tmp_path.iterdir())


def kept_by_program(folder, image, flags="", rdn="a", vgg="b", stage=0, precision="fp32"):
    """What the program keeps of one image."""
    args = train_detector_parser().parse_args(f"--fixed-sr --cache-dir {folder} {flags}".split())
    policy, draws = SizePolicy(4, args.crop_size, args.resize), Draws(1, args.crops)
    images = ImageDataset([Item(str(image), FAKE, "")], policy, draws, str if args.augment_perturb else None)
    images.headers = [Header((64, 64))]
    detector = ResynthesisDetector(RDN(**TINY), DeepStemResNet(3, "resnet18"), stage, None)
    config = {"resynthesizer_fingerprint": rdn, "vgg": {"fingerprint": vgg}}
    return kept_residuals(args, detector, config, Compute(CPU, precision), [images], World())


@pytest.mark.parametrize(
    "change",
    [
        {"stage": 5}, {"rdn": "c"}, {"vgg": "c"}, {"precision": "bf16"}, {"flags": "--resize 32"},
        {"flags": "--crop-size 32 --crops-per-image 2"}, {"flags": "--cache-precision fp32"}, {"torch": "0"}, {},
    ],
)  # fmt: skip
def test_another_setting_finds_nothing(files, tmp_path, monkeypatch, change):
    image, changed = files / "real/0.png", dict(change)
    (kept,) = kept_by_program(tmp_path, image)
    kept.write(FIRST, torch.rand(3, 5, 7))
    if changed.pop("torch", None):
        monkeypatch.setattr(torch, "__version__", "0")
    (kept,) = kept_by_program(tmp_path, image, **changed)
    assert kept.holds(FIRST) == (not change)


def test_a_residual_is_of_one_file_crop_and_direction(files, tmp_path):
    path = shutil.copy(files / "real/0.png", tmp_path)
    plain, drawn = residuals_of(tmp_path, path), residuals_of(tmp_path, path, draws=Draws(1))
    upright, *_, mirrored = sorted((Key(epoch, 0) for epoch in range(50)), key=drawn.images.mirrored)
    assert plain.path(FIRST) == drawn.path(upright)
    crops = residuals_of(tmp_path, path, draws=Draws(1, crops=3), size=16)
    names = {plain.path(FIRST), drawn.path(mirrored)}
    names |= {crops.path(Key(epoch, index)) for epoch in range(50) for index in range(3)}
    assert len(names) == 2 + 2 * 3
    shutil.copy(files / "real/1.png", path)
    os.utime(path, ns=(1, 1))
    assert plain.path(FIRST) not in names


@pytest.mark.parametrize("flags", ["--crop-size 32", "--augment-perturb", "--no-cache", "--cache-gb 0"])
def test_what_changes_or_does_not_fit_is_not_kept(files, tmp_path, flags):
    assert kept_by_program(tmp_path, files / "real/0.png", flags) == []


def test_a_damaged_file_is_never_read(files, tmp_path):
    dataset = residuals_of(tmp_path, files / "real/0.png")
    dataset.write(FIRST, torch.rand(3, 5, 7))
    path = dataset.path(FIRST)
    whole, wanted = path.read_bytes(), dataset[FIRST].x
    turned = [whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :] for at in range(0, len(whole), 7)]
    for content in (b"", whole[:40], whole[:-1], bytes(len(whole)), *turned):
        path.write_bytes(content)
        sample = dataset[FIRST]
        if sample.error:
            assert "damaged" in sample.error and not path.exists()
        else:  # a bit of the archive that nothing depends on, such as its time
            assert torch.equal(sample.x, wanted)


def test_each_is_computed_once(files, tmp_path):
    torch.manual_seed(0)
    detector = ResynthesisDetector(RDN(**TINY).eval(), DeepStemResNet(3, "resnet18"), 0, None)
    paths = sorted((files / "real").iterdir())
    dataset = residuals_of(tmp_path, *paths, draws=Draws(1, crops=2), size=16, storage="fp32")
    computed = []

    def residual_of(batch):
        computed.extend(batch.keys)
        return frozen_residuals(detector, ON_CPU, None, batch)

    for _ in range(2):
        dataset.fill(0, residual_of, lambda loader, _: loader, 0, ON_CPU, World())
        assert len(computed) == len(set(computed)) == len(list(tmp_path.iterdir())) == 10
    for index in range(10):
        x = dataset.images[Key(0, index)].x / 255
        torch.testing.assert_close(dataset[Key(0, index)].x, detector.compare(x).residual, rtol=0, atol=1e-6)


# --- in the program -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", ["--idx-stages 2", "--crop-size 40 --crops-per-image 2"])
def test_numbers_are_those_without_a_cache(files, tmp_path, flags):
    """Bit for bit from float32 storage, if without a cache each residual is computed alone, too."""
    flags = f"--fixed-sr --epochs 2 VALIDATE {flags}"
    train(detector_arguments(files, tmp_path / "without", f"{flags} --no-cache --micro-batch 1"))
    train(detector_arguments(files, tmp_path / "with", f"{flags} --cache-precision fp32"))
    # One batch: on the last two images of batches of four an untrained network makes 20 % of the 0.05 % of half precision
    train(detector_arguments(files, tmp_path / "full", f"{flags} --batch-size 10 --cache-precision fp32"))
    train(detector_arguments(files, tmp_path / "half", f"{flags} --batch-size 10 --cache-dir {tmp_path}/half_cache"))
    assert not (tmp_path / "without/residual_cache").exists() and names_in(tmp_path / "with/residual_cache")
    assert stats(tmp_path / "with") == stats(tmp_path / "without")
    half, full = stats(tmp_path / "half")[0], stats(tmp_path / "full")[0]
    assert half["loss"] == pytest.approx(full["loss"], rel=3e-2)
    assert half["val_residual_most"] == pytest.approx(full["val_residual_most"], rel=1e-3)
    assert names_in(tmp_path / "half_cache") and not (tmp_path / "half/residual_cache").exists()


def test_a_cached_epoch_decodes_nothing(files, tmp_path, monkeypatch):
    """Another run shares the residuals, and can do without pixels."""
    flags = "--fixed-sr --epochs 2 VALIDATE --crop-size 40 --crops-per-image 2 --cache-dir"
    train([*detector_arguments(files, tmp_path / "a", flags), tmp_path / "cache"])
    before = names_in(tmp_path / "cache")
    monkeypatch.setattr("data.datasets.load_image", None)
    train([*detector_arguments(files, tmp_path / "b", flags), tmp_path / "cache"])
    assert names_in(tmp_path / "cache") == before
    one, two = (without_settings(tmp_path / name / "last.pth.tar") for name in "ab")
    assert all(torch.equal(v, two["state_dict"][k]) for k, v in one["state_dict"].items())


def test_crops_let_images_of_mixed_sizes_be_trained_on_and_kept(files, tmp_path):
    shutil.copytree(files, tmp_path / "files")
    pixels = np.random.default_rng(0).integers(0, 256, (72, 100, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "files/real/9.png")
    mixed = tmp_path / "files"
    for part in ("--data", "--val"):
        flags = "--fixed-sr" if part == "--data" else f"--fixed-sr --val-root-pos {mixed}/real --val-root-neg FAKE"
        with mistake("9.png", "100 x 72", "--crop-size"):
            train(detector_arguments(mixed if part == "--data" else files, tmp_path / "out", flags))
    assert not (tmp_path / "out").exists()
    train(detector_arguments(mixed, tmp_path / "out", "--fixed-sr --epochs 2 --crop-size 48 --crops-per-image 2"))
    assert 22 <= len(names_in(tmp_path / "out/residual_cache")) <= 44
    with mistake("--crop-size"):
        train(detector_arguments(files, tmp_path / "none", "--fixed-sr --crops-per-image 2"))
