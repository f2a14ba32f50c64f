"""Example images: scenes like photographs, fakes that show their up-sampling, a folder to be trusted."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from files import mistake
from PIL import Image

from data.images import load_image
from data.lists import find_images, list_paths
from tools import example
from utils.errors import UserError
from utils.random_streams import seeded_generator


def scenes(count: int, size: int = 64, key: int = 0) -> list[np.ndarray]:
    return [example.draw_scene(size, seeded_generator(key, index)) for index in range(count)]


def flags(out, *more: str) -> list[str]:
    toy = ["--size", "64", "--train", "2", "--val", "1", "--test", "1", "--steps", "2", "--workers", "1"]
    return ["--out", str(out), *toy, *more]


def contents(root) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(Path(root).rglob("*.png"))}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A toy folder."""
    out = tmp_path_factory.mktemp("example") / "images"
    assert example.main(flags(out)) == 0
    return out


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
        fakes = [example.imitate(kind, weights, source, seeded_generator(i)) for i, source in enumerate(sources)]
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


def test_images_depend_neither_on_counts_nor_on_workers_and_none_is_made_twice(made, tmp_path):
    out = tmp_path / "empty"
    out.mkdir()
    assert example.main(flags(out, "--train", "3", "--val", "0", "--workers", "2")) == 0
    more, fewer = contents(out), contents(made)
    assert all(more[name] == fewer[name] for name in more if name in fewer)
    assert len(set(more) & set(fewer)) == 9 and len(set(more.values())) == len(more) == 12
    assert len(set(fewer.values())) == 12 and not (out / "val.txt").exists()


def test_no_scene_is_used_twice():
    settings = example.Settings(64, {}, 123, 2)
    draws = [settings.generator(role, i, 0).random() for role in example.ROLES for i in range(2)]
    assert len(set(draws)) == 14


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_call_leaves_nothing(tmp_path, number):
    command = [sys.executable, "-m", "tools.example", *flags(tmp_path / "out", "--steps", "100000")]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[1])
    try:
        while process.poll() is None and not list(tmp_path.glob(".example*/images/test/real")):
            time.sleep(0.1)
        time.sleep(3)  # the autoencoders are being trained
        process.send_signal(number)
        assert process.wait(30) == 128 + number and not list(tmp_path.iterdir())
    finally:
        process.kill()


def test_a_complete_folder_is_left_alone(made):
    times = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    assert example.main(flags(made)) == 0
    assert times == {path: path.stat().st_mtime_ns for path in made.rglob("*")}


def test_a_folder_of_other_settings_or_things_is_refused(made, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    before = contents(made)
    for out, more in ((made, ["--seed", "5"]), (tmp_path, []), (tmp_path / "thesis.tex", [])):
        with mistake("--out"):
            example.main(flags(out, *more))
    assert contents(made) == before and (tmp_path / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("wrong", ["--size 66", "--train 0 --val 0 --test 0"])
def test_mistakes(tmp_path, wrong):
    with mistake("multiple of 4"):
        example.main(flags(tmp_path / "out", *wrong.split()))
    assert not list(tmp_path.iterdir())


@pytest.fixture
def photographs(tmp_path):
    (tmp_path / "photographs").mkdir()
    for index, image in enumerate(scenes(9, size=80, key=7)):
        Image.fromarray(image[: 72 + index]).save(tmp_path / "photographs" / f"{index}.jpg", quality=95)
    return tmp_path / "photographs"


def test_photographs_are_cropped_and_never_shared(photographs, tmp_path):
    out = tmp_path / "out"
    assert example.main(flags(out, "--from", str(photographs))) == 0
    assert len(contents(out)) == 12
    shares = json.loads((out / "settings.json").read_text())["photographs"]
    assert len(shares) == 7 and all(shares.values())
    assert sorted(sum(shares.values(), [])) == sorted(find_images(str(photographs)))
    real = load_image(str(out / "test" / "real" / "00000.png")).numpy()
    source = load_image(shares["test/real"][0]).numpy()
    windows = np.lib.stride_tricks.sliding_window_view(source, (3, 64, 64)).reshape(-1, 3, 64, 64)
    assert (windows == real).all(axis=(1, 2, 3)).any()


def test_too_few_photographs(photographs, tmp_path):
    for index in range(4):
        (photographs / f"{index}.jpg").unlink()
    (photographs / "broken.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="5 readable images.*at least 7"):
        example.main(flags(tmp_path / "out", "--from", str(photographs)))
    assert not (tmp_path / "out").exists()
