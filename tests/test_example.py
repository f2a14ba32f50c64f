"""Example images: scenes like photographs, fakes that show their up-sampling, a folder to be trusted."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import SERVER

from data import example
from data.images import find_images, list_paths, load_image


def scenes(count: int, size: int = 64, key: int = 0) -> list[np.ndarray]:
    return [example.draw_scene(size, np.random.default_rng([key, index])) for index in range(count)]


def make(out, *flags: str) -> int:
    toy = ["--size", "64", "--train", "2", "--val", "1", "--test", "1", "--steps", "2", "--workers", "1"]
    return example.main(["--out", str(out), *toy, *flags])


def contents(root) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(Path(root).rglob("*.png"))}


@pytest.fixture(autouse=True)
def toy_training(monkeypatch):
    monkeypatch.setattr(example, "SOURCES", 3)
    monkeypatch.setattr(example, "BATCH", 4)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A toy folder; tests that change it copy it first."""
    out = tmp_path_factory.mktemp("example") / "images"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example, "SOURCES", 3)
        patch.setattr(example, "BATCH", 4)
        assert make(out) == 0
    return out


@pytest.fixture
def copied(made, tmp_path):
    return shutil.copytree(made, tmp_path / "copy")


# ---- Scenes


def test_scene_is_a_function_of_its_key():
    first, again, other = (example.draw_scene(64, np.random.default_rng([1, index])) for index in (0, 0, 1))
    assert first.shape == (64, 64, 3) and first.dtype == np.uint8
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_radii_follow_the_power_law():
    """Shapes of radius r per area ~ r^-3, once the reach of large shapes beyond the border is divided out."""
    radii = np.concatenate([example.leaf_outlines(128, np.random.default_rng(k))[2] for k in range(40)])
    edges = np.geomspace(6, 50, 9)  # above every scene's smallest radius
    centres = np.sqrt(edges[1:] * edges[:-1])
    weights = 1 / (128 + 2 * radii) ** 2
    density = np.histogram(radii, edges, weights=weights)[0] / np.diff(edges)
    slope = np.polyfit(np.log(centres), np.log(density), 1)[0]
    assert slope == pytest.approx(-3, abs=0.3)


def spectral_slope(power: np.ndarray, low: float, high: float) -> float:
    """Exponent of the radial power spectrum between two frequencies, in cycles per pixel."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(len(power)), np.fft.fftfreq(len(power))))
    edges = np.geomspace(low, high, 7)
    rings = [(frequency >= a) & (frequency < b) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    points = np.log([(frequency[ring].mean(), power[ring].mean()) for ring in rings])
    return float(np.polyfit(*points.T, 1)[0])


def test_power_spectrum_falls_as_in_photographs():
    """f^-2 at the sizes between the largest and the smallest shapes, where the scene is scale-invariant.

    Above, lens and smallest shapes make it steeper, as in photographs: -2.8 for the five of Set5 together and
    -3.0 for three of CelebA-HQ at 256 x 256, measured in the same way and the same band.
    """
    size = 128
    window = np.hanning(size)[:, None] * np.hanning(size)
    greys = [scene.mean(-1) for scene in scenes(24, size)]
    power = sum(np.abs(np.fft.fft2((grey - grey.mean()) / grey.std() * window)) ** 2 for grey in greys)
    assert spectral_slope(power, 0.025, 0.1) == pytest.approx(-2, abs=0.5)
    assert spectral_slope(power, 0.1, 0.25) == pytest.approx(-3, abs=0.5)


def test_scenes_use_the_range_without_clipping_much():
    images = np.stack(scenes(12))
    assert 80 < images.mean() < 150
    assert images.std(axis=(1, 2, 3)).mean() > 25
    assert ((images == 0) | (images == 255)).mean() < 0.1


# ---- Autoencoders


@pytest.fixture(scope="module")
def trained():
    sources = np.stack(scenes(16, key=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example, "BATCH", 6)
        kinds = ("nearest", "bilinear")
        return {kind: example.train_autoencoder(kind, sources, steps=40, seed=0) for kind in kinds}


def mean_spectrum(images) -> np.ndarray:
    """Mean log power of the Laplacian, 64 x 64."""
    total = 0.0
    for image in images:
        grey = image.astype(float).mean(-1)
        detail = 4 * grey - sum(np.roll(grey, shift, axis) for shift in (-1, 1) for axis in (0, 1))
        total = total + np.log(np.abs(np.fft.fft2(detail)) ** 2 + 1)
    return total / len(images)


def test_upsampling_leaves_its_own_spectrum(trained):
    """Each kind differs from the reals, and from the other kind, by more than reals from other reals."""
    sources = scenes(32, key=2)
    spectra = {"real": mean_spectrum(scenes(32, key=3)), "other": mean_spectrum(scenes(32, key=4))}
    for kind, model in trained.items():
        fakes = [example.imitate(model, s, torch.Generator().manual_seed(i)) for i, s in enumerate(sources)]
        spectra[kind] = mean_spectrum(fakes)
    pairs = (("real", "nearest"), ("real", "bilinear"), ("nearest", "bilinear"))
    difference = {(a, b): np.abs(spectra[a] - spectra[b]).mean() for a, b in pairs}
    usual = np.abs(spectra["real"] - spectra["other"]).mean()
    assert min(difference.values()) > 1.5 * usual, (usual, difference)


def test_fake_resembles_its_source(trained):
    for index, source in enumerate(scenes(4, key=5)):
        fake = example.imitate(trained["nearest"], source, torch.Generator().manual_seed(index))
        assert fake.shape == source.shape and fake.dtype == np.uint8
        assert abs(float(fake.mean()) - float(source.mean())) < 12
        assert np.corrcoef(fake.ravel(), source.ravel())[0, 1] > 0.85


@pytest.mark.parametrize("kind", example.KINDS)
def test_training_is_a_function_of_its_arguments(kind):
    sources = np.stack(scenes(3))
    torch.manual_seed(1)
    first = example.train_autoencoder(kind, sources, steps=2, seed=0).state_dict()
    torch.manual_seed(2)
    again = example.train_autoencoder(kind, sources, steps=2, seed=0).state_dict()
    other = example.train_autoencoder(kind, sources, steps=2, seed=1).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["output.weight"], other["output.weight"])


def test_global_generators_are_left_alone():
    before = torch.get_rng_state()
    example.train_autoencoder("nearest", np.stack(scenes(2)), steps=1, seed=0)
    assert torch.equal(before, torch.get_rng_state())


# ---- The folder


def test_layout_lists_and_formats(made):
    for split, count in (("train", 2), ("val", 1), ("test", 1)):
        for folder in ("real", "nearest", "bilinear"):
            paths = find_images(str(made / split / folder))
            assert [Path(p).name for p in paths] == [f"{k:05d}.png" for k in range(count)]
            assert all(load_image(p).shape == (3, 64, 64) for p in paths)
            assert all(Image.open(p).mode == "RGB" for p in paths)
    for split in ("train", "val"):
        listed = [Path(path) for path in list_paths(str(made / f"{split}.txt"))]
        assert listed == sorted((made / split / "real").iterdir())
    readme = (made / "README.txt").read_text()
    assert "CC0" in readme and "seed 123" in readme and "python -m data.example --out" in readme
    assert not list(made.rglob("*.tmp"))


def test_no_scene_is_used_twice(made):
    files = contents(made)
    assert len(files) == len(set(files.values())) == 12
    keys = {(stream, index) for stream in example.STREAMS.values() for index in range(9)}
    assert len(keys) == 9 * 7  # autoencoder, and real and fake of three splits
    settings = example.Settings(64, {"train": 2, "val": 1, "test": 1}, ("nearest",), 123, 2, None)
    sources = [example.source_image(settings, role, 0, 64).tobytes() for role in example.ROLES]
    assert len(set(sources)) == len(example.ROLES)


def test_image_does_not_depend_on_the_counts(made, tmp_path):
    assert make(tmp_path / "more", "--train", "3", "--val", "0", "--test", "0", "--kinds", "bilinear") == 0
    more, fewer = contents(tmp_path / "more"), contents(made)
    assert all(more[name] == fewer[name] for name in more if name in fewer)
    assert len(set(more) & set(fewer)) == 4 and len(more) == 6
    assert not (tmp_path / "more" / "val.txt").exists()


def test_processes_make_the_same_images(made, tmp_path, monkeypatch):
    """Only reals: new processes would train at full size, since they know nothing of the toy constants."""
    monkeypatch.setattr(example, "get_context", lambda _: SERVER)  # not spawned: each would import torch first
    settings = example.Settings(64, {"train": 2, "val": 1, "test": 1}, ("nearest", "bilinear"), 123, 2, None)
    reals = [task for task in example.missing_tasks(settings, str(tmp_path)) if task.folders == ("real",)]
    example.make_images(settings, str(tmp_path), reals, workers=2)
    expected = {name: data for name, data in contents(made).items() if "real" in name}
    assert contents(tmp_path) == expected


def test_complete_folder_is_left_alone(copied, caplog, monkeypatch):
    monkeypatch.setattr(example, "make_images", lambda *_: pytest.fail("nothing was missing"))
    with caplog.at_level(logging.INFO):
        assert make(copied) == 0
    assert "complete already" in caplog.text


def test_interrupted_run_is_completed(made, copied):
    for name in ("train/real/00001.png", "test/bilinear/00000.png", "val.txt"):
        (copied / name).unlink()
    shutil.rmtree(copied / "val" / "nearest")
    trained_at = (copied / "autoencoders" / "nearest.pth").stat().st_mtime_ns
    assert make(copied) == 0
    assert contents(copied) == contents(made)
    assert (copied / "val.txt").exists()
    assert (copied / "autoencoders" / "nearest.pth").stat().st_mtime_ns == trained_at


def test_other_settings_are_refused_unless_forced(copied, caplog):
    before = contents(copied)
    assert make(copied, "--seed", "5") == 2
    assert len(caplog.records) == 1
    assert all(word in caplog.text for word in ("seed", "--force", "--out"))
    assert contents(copied) == before
    (copied / "train" / "real" / "mine.png").write_bytes(b"the user's own")
    assert make(copied, "--seed", "5", "--test", "0", "--force") == 0
    after = contents(copied)
    assert after.pop("train/real/mine.png") == b"the user's own"
    assert json.loads((copied / "settings.json").read_text())["seed"] == 5
    assert len(after) == 9 and not set(after.values()) & set(before.values())


def test_folder_of_something_else_is_refused(tmp_path, caplog):
    (tmp_path / "thesis.tex").write_text("mine")
    assert make(tmp_path, "--force") == 2
    assert "thesis" not in caplog.text and "--out" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    "flags",
    [
        ("--size", "62"),
        ("--size", "32"),
        ("--train", "-1"),
        ("--steps", "0"),
        ("--seed", "-1"),
        ("--workers", "0"),
        ("--train", "0", "--val", "0", "--test", "0"),
        ("--from", "/no/such/folder"),
    ],
)
def test_mistakes_get_one_line(tmp_path, caplog, flags):
    assert make(tmp_path / "out", *flags) == 2
    assert len(caplog.records) == 1 and "\n" not in caplog.text.strip()
    assert not (tmp_path / "out").exists()


# ---- --from


@pytest.fixture
def photographs(tmp_path):
    folder = tmp_path / "photographs"
    folder.mkdir()
    for index, image in enumerate(scenes(9, size=80, key=7)):
        Image.fromarray(image[: 72 + index]).save(folder / f"{index}.jpg", quality=95)
    return folder


def test_photographs_are_cropped_and_never_shared(photographs, tmp_path):
    out = tmp_path / "out"
    assert make(out, "--from", str(photographs)) == 0
    assert len(contents(out)) == 12
    assert all(load_image(path).shape == (3, 64, 64) for path in find_images(str(out)))
    shares = json.loads((out / "settings.json").read_text())["photographs"]
    used = [path for paths in shares.values() for path in paths]
    assert len(shares) == 7 and all(shares.values())
    assert sorted(used) == sorted(find_images(str(photographs)))
    real = load_image(str(out / "test" / "real" / "00000.png")).numpy()
    source = load_image(shares["test/real"][0]).numpy()
    windows = np.lib.stride_tricks.sliding_window_view(source, (3, 64, 64)).reshape(-1, 3, 64, 64)
    assert (windows == real).all(axis=(1, 2, 3)).any()
    assert "photographs" in (out / "README.txt").read_text() and "CC0" not in (out / "README.txt").read_text()


def test_too_few_photographs(photographs, tmp_path, caplog):
    for index in range(4):
        (photographs / f"{index}.jpg").unlink()
    (photographs / "broken.png").write_bytes(b"no image")
    assert make(tmp_path / "out", "--from", str(photographs)) == 2
    last = caplog.records[-1].getMessage()
    assert "5 readable images" in last and "at least 7" in last
    assert not (tmp_path / "out").exists()
