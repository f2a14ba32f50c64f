"""Example images: scenes like photographs, fakes that show their up-sampling, a folder to be trusted."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import example
from data.images import load_image
from data.lists import find_images, list_paths
from utils.run import UserError, keyed_generator


def scenes(count: int, size: int = 64, key: int = 0) -> list[np.ndarray]:
    return [example.draw_scene(size, keyed_generator(key, index)) for index in range(count)]


def make(out, *flags: str) -> int:
    toy = ["--size", "64", "--train", "2", "--val", "1", "--test", "1", "--steps", "2", "--workers", "1"]
    return example.main(["--out", str(out), *toy, *flags])


def contents(root) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(Path(root).rglob("*.png"))}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A toy folder; tests that change it copy it first."""
    out = tmp_path_factory.mktemp("example") / "images"
    assert make(out) == 0
    return out


@pytest.fixture
def copied(made, tmp_path):
    return shutil.copytree(made, tmp_path / "copy")


def spectral_slope(power: np.ndarray, low: float, high: float) -> float:
    """Exponent of the radial power spectrum between two frequencies, in cycles per pixel."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(len(power)), np.fft.fftfreq(len(power))))
    edges = np.geomspace(low, high, 7)
    rings = [(frequency >= a) & (frequency < b) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    points = np.log([(frequency[ring].mean(), power[ring].mean()) for ring in rings])
    return float(np.polyfit(*points.T, 1)[0])


def test_scenes_have_the_spectrum_and_range_of_photographs():
    """f^-2 at the sizes between the largest and the smallest shapes, where the scene is scale-invariant.

    Above, lens and smallest shapes make it steeper, as in photographs: -2.8 for the five of Set5 together and -3.0 for
    three of CelebA-HQ at 256 x 256, measured in the same way and the same band.
    """
    size, images = 128, scenes(24, 128)
    window = np.hanning(size)[:, None] * np.hanning(size)
    greys = [image.mean(-1) for image in images]
    power = sum(np.abs(np.fft.fft2((grey - grey.mean()) / grey.std() * window)) ** 2 for grey in greys)
    assert spectral_slope(power, 0.025, 0.1) == pytest.approx(-2, abs=0.5)
    assert spectral_slope(power, 0.1, 0.25) == pytest.approx(-3, abs=0.5)
    values = np.stack(images)
    assert 80 < values.mean() < 150 and values.std(axis=(1, 2, 3)).mean() > 25
    assert ((values == 0) | (values == 255)).mean() < 0.1


def mean_spectrum(images) -> np.ndarray:
    """Mean log power of the Laplacian, 64 x 64."""
    total = 0.0
    for image in images:
        grey = image.astype(float).mean(-1)
        detail = 4 * grey - sum(np.roll(grey, shift, axis) for shift in (-1, 1) for axis in (0, 1))
        total = total + np.log(np.abs(np.fft.fft2(detail)) ** 2 + 1)
    return total / len(images)


def test_fakes_resemble_their_sources_and_show_their_up_sampling():
    """Each kind differs from the reals, and from the other kind, by more than reals from other reals."""
    training, sources = np.stack(scenes(16, key=1)), scenes(96, key=2)
    spectra = {"real": mean_spectrum(scenes(96, key=3)), "other": mean_spectrum(scenes(96, key=4))}
    for kind in example.KINDS:
        weights = example.train_autoencoder(kind, training, steps=60, seed=0)
        fakes = [example.imitate(kind, weights, source, keyed_generator(i)) for i, source in enumerate(sources)]
        assert np.corrcoef(np.ravel(fakes), np.ravel(sources))[0, 1] > 0.9
        spectra[kind] = mean_spectrum(fakes)
    pairs = (("real", "nearest"), ("real", "bilinear"), ("nearest", "bilinear"))
    usual = np.abs(spectra["real"] - spectra["other"]).mean()
    assert min(np.abs(spectra[a] - spectra[b]).mean() for a, b in pairs) > 1.25 * usual


def test_layout_lists_and_formats(made):
    for split, count in (("train", 2), ("val", 1), ("test", 1)):
        for folder in ("real", "nearest", "bilinear"):
            paths = find_images(str(made / split / folder))
            assert [Path(p).name for p in paths] == [f"{k:05d}.png" for k in range(count)]
            assert all((Image.open(p).mode, Image.open(p).size) == ("RGB", (64, 64)) for p in paths)
    for split in ("train", "val"):
        listed = [Path(path) for path in list_paths(str(made / f"{split}.txt"))]
        assert listed == sorted((made / split / "real").iterdir())
    assert "CC0" in (made / "README.txt").read_text()
    assert json.loads((made / "settings.json").read_text())["seed"] == 123


def test_no_scene_is_used_twice(made):
    assert len(set(contents(made).values())) == 12
    settings = example.Settings(64, {}, [], 123, 2, None)
    sources = [example.source_image(settings, role, i, 64).tobytes() for role in example.ROLES for i in range(2)]
    assert len(set(sources)) == 14


def test_images_depend_neither_on_counts_nor_on_workers(made, tmp_path):
    flags = ["--train", "3", "--val", "0", "--test", "0", "--kinds", "bilinear", "--workers", "2"]
    assert make(tmp_path / "more", *flags) == 0
    more, fewer = contents(tmp_path / "more"), contents(made)
    assert all(more[name] == fewer[name] for name in more if name in fewer)
    assert len(set(more) & set(fewer)) == 4 and len(more) == 6
    assert not (tmp_path / "more" / "val.txt").exists()


def test_an_interrupted_folder_is_completed_and_a_complete_one_left_alone(made, copied):
    for name in ("train/real/00001.png", "test/bilinear/00000.png", "val.txt"):
        (copied / name).unlink()
    shutil.rmtree(copied / "val" / "nearest")
    assert make(copied) == 0
    assert contents(copied) == contents(made) and (copied / "val.txt").exists()
    times = {path: path.stat().st_mtime_ns for path in copied.rglob("*.png")}
    assert make(copied) == 0
    assert times == {path: path.stat().st_mtime_ns for path in copied.rglob("*.png")}


def test_a_folder_of_other_settings_or_things_is_refused(copied, tmp_path):
    before = contents(copied)
    with pytest.raises(UserError, match="seed.*--out"):
        make(copied, "--seed", "5")
    assert contents(copied) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="--out"):
        make(tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


MISTAKES = (
    "--size 62, --size 32, --train -1, --steps 0, --seed -1, --workers 0, --train 0 --val 0 --test 0, --force,"
    " --kinds transposed, --from /no/such/folder"
)


@pytest.mark.parametrize("flags", MISTAKES.split(", "))
def test_mistakes_and_what_was_dropped(tmp_path, flags):
    with pytest.raises(UserError) as caught:
        make(tmp_path / "out", *flags.split())
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.fixture
def photographs(tmp_path):
    (tmp_path / "photographs").mkdir()
    for index, image in enumerate(scenes(9, size=80, key=7)):
        Image.fromarray(image[: 72 + index]).save(tmp_path / "photographs" / f"{index}.jpg", quality=95)
    return tmp_path / "photographs"


def test_photographs_are_cropped_and_never_shared(photographs, tmp_path):
    out = tmp_path / "out"
    assert make(out, "--from", str(photographs)) == 0
    assert len(contents(out)) == 12
    shares = json.loads((out / "settings.json").read_text())["photographs"]
    used = [path for paths in shares.values() for path in paths]
    assert len(shares) == 7 and all(shares.values())
    assert sorted(used) == sorted(find_images(str(photographs)))
    real = load_image(str(out / "test" / "real" / "00000.png")).numpy()
    source = load_image(shares["test/real"][0]).numpy()
    windows = np.lib.stride_tricks.sliding_window_view(source, (3, 64, 64)).reshape(-1, 3, 64, 64)
    assert (windows == real).all(axis=(1, 2, 3)).any()
    assert "CC0" not in (out / "README.txt").read_text()


def test_too_few_photographs(photographs, tmp_path):
    for index in range(4):
        (photographs / f"{index}.jpg").unlink()
    (photographs / "broken.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="5 readable images.*at least 7"):
        make(tmp_path / "out", "--from", str(photographs))
    assert not (tmp_path / "out").exists()
