"""Tests of tools.example, which makes example images, and fake copies (twins) of photographs."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from files import expect_user_error, save_image
from PIL import Image, JpegImagePlugin

from data.images import read_image_as_tensor
from data.lists import read_path_list
from tools import example, twins
from tools.autoencoder import Autoencoder, load_autoencoder
from tools.scenes import draw_scene
from tools.upsampling import KINDS, halve_and_upsample
from utils.random_streams import seeded_generator

SMALL = ["--size", "32", "--train", "2", "--val", "1", "--test", "1"]


def make_arguments_of_tools_example(out, *more):
    """Return arguments with which tools.example makes a few images of 32 x 32 pixels."""
    return ["--out", str(out), *SMALL, *map(str, more)]


def read_bytes_of_all_files_in_folder(root):
    """Return a dict from the relative path of each file below a folder to the bytes of the file."""
    return {str(path.relative_to(root)): path.read_bytes() for path in Path(root).rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def example_image_folder(tmp_path_factory):
    """Return a folder of example images made by tools.example."""
    out = tmp_path_factory.mktemp("example") / "images"
    assert example.main(make_arguments_of_tools_example(out)) == 0
    return out


# --- example images


def test_the_power_of_drawn_scenes_falls_with_frequency_as_in_photographs():
    """In photographs, the spectral power at a frequency f is proportional to f^-k, with k from 2 to 3."""
    size, total = 128, 0
    window = np.outer(np.hanning(size), np.hanning(size))
    for seed in range(12):
        grey = draw_scene(size, seeded_generator(seed)).mean(axis=-1)
        total = total + np.abs(np.fft.fft2((grey - grey.mean()) * window)) ** 2
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size)))
    band = (frequency > 0.03) & (frequency < 0.2)
    slope = np.polyfit(np.log(frequency[band]), np.log(total[band]), 1)[0]
    assert -3.5 < slope < -1.5


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_upsampling_leaves_a_pattern_with_a_period_of_two_pixels(kind):
    """In an up-sampled image, differences between neighbouring columns depend on whether the column is even or odd."""
    x = torch.stack([torch.from_numpy(draw_scene(64, seeded_generator(i))) for i in range(8)]).permute(0, 3, 1, 2) / 255

    def difference_of_even_and_odd_columns(images):
        curvature = (images[..., 2:] - 2 * images[..., 1:-1] + images[..., :-2]).abs().mean(dim=(0, 1, 2))
        steps = (images[..., 1:] - images[..., :-1]).abs().mean(dim=(0, 1, 2))
        ratios = [values[0::2].mean() / values[1::2].mean() for values in (curvature, steps[:-1])]
        return max(abs(float(ratio) - 1) for ratio in ratios)

    fake = halve_and_upsample(x, kind, seeded_generator(0))
    assert fake.shape == x.shape and 0 <= fake.min() and fake.max() <= 1
    assert np.corrcoef(fake.flatten(), x.flatten())[0, 1] > 0.9
    assert difference_of_even_and_odd_columns(fake) > 2 * difference_of_even_and_odd_columns(x)


def test_the_folder_of_example_images_has_the_documented_files(example_image_folder):
    names = [name for name in read_bytes_of_all_files_in_folder(example_image_folder) if name.endswith(".png")]
    expected = []
    for split, count in (("train", 2), ("val", 1), ("test", 1)):
        for folder in ("real", "nearest", "bilinear"):
            expected += [f"{split}/{folder}/{index:05d}.png" for index in range(count)]
    assert sorted(names) == sorted(expected)
    for name in names:
        with Image.open(example_image_folder / name) as image:
            assert (image.mode, image.size) == ("RGB", (32, 32))
    for split in ("train", "val"):
        assert [Path(p) for p in read_path_list(str(example_image_folder / f"{split}.txt"))] == sorted(
            (example_image_folder / split / "real").iterdir()
        )
    assert "CC0" in (example_image_folder / "README.txt").read_text()
    assert json.loads((example_image_folder / "settings.json").read_text())["seed"] == 123


def test_example_images_are_unique_and_do_not_depend_on_the_number_of_images(example_image_folder, tmp_path):
    assert example.main(make_arguments_of_tools_example(tmp_path / "more", "--train", 3, "--val", 0)) == 0
    few, more = (
        read_bytes_of_all_files_in_folder(example_image_folder),
        read_bytes_of_all_files_in_folder(tmp_path / "more"),
    )
    common = [name for name in few if name in more and name.endswith(".png")]
    assert len(common) == 9
    assert all(few[name] == more[name] for name in common)
    images = [content for name, content in few.items() if name.endswith(".png")]
    assert len(set(images)) == len(images)
    assert not (tmp_path / "more" / "val.txt").exists()


def test_another_seed_gives_different_example_images(example_image_folder, tmp_path):
    assert example.main(make_arguments_of_tools_example(tmp_path / "other", "--seed", 5)) == 0
    assert not set(read_bytes_of_all_files_in_folder(example_image_folder).values()) & {
        v for k, v in read_bytes_of_all_files_in_folder(tmp_path / "other").items() if k.endswith("png")
    }


def test_a_second_call_of_tools_example_does_not_change_a_complete_folder(example_image_folder):
    times = {path: path.stat().st_mtime_ns for path in example_image_folder.rglob("*")}
    assert example.main(make_arguments_of_tools_example(example_image_folder)) == 0
    assert times == {path: path.stat().st_mtime_ns for path in example_image_folder.rglob("*")}


def test_an_output_folder_with_files_of_the_user_is_refused_and_unchanged(example_image_folder, tmp_path):
    foreign = {"thesis.tex": b"mine", "settings.json": b"not JSON", "train.txt": b"mine"}
    for name, content in foreign.items():
        (tmp_path / name).write_bytes(content)
    before = read_bytes_of_all_files_in_folder(example_image_folder)
    for out, more in (
        (example_image_folder, ["--seed", 5]),
        (tmp_path, []),
        (tmp_path / "thesis.tex", []),
        (tmp_path, ["--from", example_image_folder]),
    ):
        with expect_user_error("--out"):
            example.main(make_arguments_of_tools_example(out, *more))
    assert read_bytes_of_all_files_in_folder(example_image_folder) == before
    assert read_bytes_of_all_files_in_folder(tmp_path) == foreign


def test_image_lists_can_be_read_if_the_folder_name_is_not_utf8(tmp_path):
    out = os.path.join(os.fsencode(tmp_path), b"\xff \xe9")
    example.main(make_arguments_of_tools_example(os.fsdecode(out)))
    assert len(read_path_list(os.fsdecode(os.path.join(out, b"train.txt")))) == 2
    with expect_user_error("line break"):
        example.main(make_arguments_of_tools_example(tmp_path / "a\nb"))


def test_an_output_folder_that_is_a_symbolic_link_remains_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    assert example.main(make_arguments_of_tools_example(tmp_path / "link")) == 0
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "settings.json").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_call_of_tools_example_that_a_signal_stops_leaves_no_files(tmp_path, number):
    command = [
        sys.executable,
        "-m",
        "tools.example",
        *make_arguments_of_tools_example(tmp_path / "out", "--train", 100000),
    ]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[1], stderr=subprocess.DEVNULL)
    try:
        deadline = time.time() + 60
        while not list(tmp_path.glob(".example*/images/train/real/*.png")):
            assert process.poll() is None and time.time() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(60) == 128 + number
    finally:
        process.kill()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "wrong", ["--size 33", "--size 8", "--train 0 --val 0 --test 0", "--seed -1", "--autoencoder a b"]
)
def test_tools_example_reports_a_wrong_argument_in_one_line(tmp_path, wrong, capsys):
    with pytest.raises(SystemExit) as caught:
        example.main(make_arguments_of_tools_example(tmp_path / "out", *wrong.split()))
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())


# --- the autoencoder


def test_the_autoencoder_has_the_weight_names_and_shapes_of_taef2():
    torch.manual_seed(0)
    model = Autoencoder().eval()
    encoder, decoder = model.encoder.state_dict(), model.decoder.state_dict()
    assert sum(tensor.numel() for tensor in encoder.values()) == 1338528
    assert sum(tensor.numel() for tensor in decoder.values()) == 1338499
    for name, shape in (
        ("0.weight", (64, 3, 3, 3)), ("1.conv.4.bias", (64,)), ("2.weight", (64, 64, 3, 3)),
        ("13.pool.0.weight", (256, 64, 1, 1)), ("13.pool.1.weight", (256,)), ("14.weight", (32, 64, 3, 3)),
    ):  # fmt: skip
        assert encoder[name].shape == shape
    for name, shape in (
        ("1.weight", (64, 32, 3, 3)), ("3.pool.3.weight", (64, 256, 1, 1)), ("17.weight", (64, 64, 3, 3)),
        ("18.conv.0.weight", (64, 64, 3, 3)), ("19.weight", (3, 64, 3, 3)),
    ):  # fmt: skip
        assert decoder[name].shape == shape
    assert "2.bias" not in encoder and "7.bias" not in decoder
    x = torch.rand(2, 3, 16, 24)
    with torch.inference_mode():
        assert model.encoder(x).shape == (2, 32, 2, 3)
        y = model(x)
    assert y.shape == x.shape and 0 <= y.min() and y.max() <= 1


def write_autoencoder_weights(folder):
    """Write random weights of an autoencoder to encoder.pth and decoder.pth, and return both paths."""
    torch.manual_seed(0)
    model = Autoencoder()
    for name in ("encoder", "decoder"):
        torch.save({k: v.half() for k, v in getattr(model, name).state_dict().items()}, folder / f"{name}.pth")
    return str(folder / "encoder.pth"), str(folder / "decoder.pth")


def test_autoencoder_weights_that_do_not_fit_are_refused_in_one_line(tmp_path):
    encoder, decoder = write_autoencoder_weights(tmp_path)
    load_autoencoder(encoder, decoder)
    with expect_user_error("encoder.pth", "does not fit"):
        load_autoencoder(decoder.replace("decoder", "encoder"), encoder)


def test_the_tiles_of_the_autoencoder_cover_the_image_without_gaps():
    class Identity(torch.nn.Module):
        def forward(self, x):
            assert x.shape[2] <= twins.TILE + 2 * twins.MARGIN and x.shape[3] <= twins.TILE + 2 * twins.MARGIN
            return x

    x = torch.rand(1, 3, twins.TILE + 8, 2 * twins.TILE + 16)
    assert torch.equal(twins.create_autoencoder_function(Identity())(x), x)


# --- fake copies of photographs


@pytest.fixture
def photograph_folder(tmp_path):
    """Return a folder of simulated photographs in several file formats and sizes."""
    folder = tmp_path / "photographs"
    (folder / "below").mkdir(parents=True)
    scene = Image.fromarray(draw_scene(64, seeded_generator(1)))
    turned = Image.Exif()
    turned[0x0112] = 6  # EXIF orientation 6: turn the image by 90 degrees clockwise for display
    save_image(folder / "a.jpg", scene.crop((0, 0, 61, 45)), quality=83, subsampling="4:2:2", exif=turned)
    save_image(folder / "grey.jpeg", scene.convert("L"), quality=60)
    save_image(folder / "below" / "a.png", scene.crop((0, 0, 33, 64)))
    save_image(folder / "below" / "b.webp", scene, lossless=True)
    save_image(folder / "tiny.png", scene.crop((0, 0, 5, 5)))
    return folder


@pytest.mark.parametrize("trained", [False, True])
def test_fake_copies_have_the_format_and_size_of_their_originals(photograph_folder, tmp_path, trained):
    out = tmp_path / "twins"
    more = ["--autoencoder", *write_autoencoder_weights(tmp_path)] if trained else []
    before = read_bytes_of_all_files_in_folder(photograph_folder)
    assert example.main(["--from", str(photograph_folder), "--out", str(out), *more]) == 0
    assert read_bytes_of_all_files_in_folder(photograph_folder) == before
    assert read_bytes_of_all_files_in_folder(out).keys() == before.keys()
    for name in before:
        with Image.open(photograph_folder / name) as original, Image.open(out / name) as twin:
            assert (twin.format, twin.size, twin.mode) == (original.format, original.size, original.mode)
            assert twin.info.get("exif") == original.info.get("exif")
            assert getattr(twin, "quantization", None) == getattr(original, "quantization", None)
            if original.format == "JPEG":
                assert JpegImagePlugin.get_sampling(twin) == JpegImagePlugin.get_sampling(original)
        assert read_image_as_tensor(str(out / name)).shape == read_image_as_tensor(str(photograph_folder / name)).shape
    assert b"VP8L" in (out / "below" / "b.webp").read_bytes()[:64]


def test_fake_copies_made_by_upsampling_resemble_their_originals(photograph_folder, tmp_path):
    out = tmp_path / "twins"
    example.main(["--from", str(photograph_folder), "--out", str(out)])
    for name in ("a.jpg", "below/a.png", "below/b.webp"):
        difference = (
            read_image_as_tensor(str(out / name)).double()
            - read_image_as_tensor(str(photograph_folder / name)).double()
        )
        psnr = -10 * torch.log10((difference / 255).square().mean())
        assert 18 < psnr < 40


def test_tools_example_reports_photographs_of_which_it_makes_no_fake_copy(photograph_folder, tmp_path, caplog):
    (photograph_folder / "broken.png").write_bytes(b"not an image")
    os.mkfifo(photograph_folder / "pipe.png")
    alpha = Image.new("RGBA", (16, 16), (10, 20, 30, 40))
    save_image(photograph_folder / "alpha.png", alpha)
    with caplog.at_level("INFO"):
        assert example.main(["--from", str(photograph_folder), "--out", str(tmp_path / "twins")]) == 0
    twins_by_name = read_bytes_of_all_files_in_folder(tmp_path / "twins")
    assert "alpha.png" in twins_by_name and "broken.png" not in twins_by_name and "pipe.png" not in twins_by_name
    assert Image.open(io.BytesIO(twins_by_name["alpha.png"])).mode == "RGB"
    for words in ("broken.png", "alpha.png has no alpha channel"):
        assert words in caplog.text


def test_making_fake_copies_of_a_folder_without_readable_images_is_refused(tmp_path):
    (tmp_path / "photographs").mkdir()
    (tmp_path / "photographs" / "a.png").write_bytes(b"not an image")
    with expect_user_error("none of the 1 images"):
        example.main(["--from", str(tmp_path / "photographs"), "--out", str(tmp_path / "twins")])
    assert not (tmp_path / "twins").exists()
