"""Files made by hand, with the pixels or the error each of them has to give."""

import io
import logging
import os
import struct
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from data import images as I
from data.images import FAKE, REAL, DataError, ImageDataset, Item, SizePolicy
from data.sampling import EpochBatches


def random_rgb(height=16, width=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def save(path, pixels=None, **options):
    """Write an array (default: random colours) or a Pillow image; return the path as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(random_rgb() if pixels is None else pixels)
    image.save(path, **options)
    return str(path)


def loaded(path):
    """load_image as (H, W, 3) numpy, after checks that hold for every image."""
    image = I.load_image(path)
    assert image.dtype == torch.uint8 and image.is_contiguous() and image.shape[0] == 3
    return image.permute(1, 2, 0).numpy()


def reason(function, *args):
    """The message of a DataError, which is one line."""
    with pytest.raises(DataError) as caught:
        function(*args)
    assert "\n" not in str(caught.value) and str(caught.value).isprintable()
    return str(caught.value)


# --- modes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp"])
def test_rgb_is_read_exactly(tmp_path, suffix):
    pixels = random_rgb(5, 7)
    path = save(tmp_path / f"a.{suffix}", pixels, **({"lossless": True} if suffix == "webp" else {}))
    assert np.array_equal(loaded(path), pixels)
    assert np.array_equal(loaded(path), np.asarray(Image.open(path).convert("RGB")))


def test_jpeg_equals_pillow(tmp_path):
    path = save(tmp_path / "a.jpg", random_rgb(33, 18), quality=80)
    assert np.array_equal(loaded(path), np.asarray(Image.open(path).convert("RGB")))


def test_grey_and_bilevel(tmp_path):
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    assert np.array_equal(loaded(save(tmp_path / "l.png", grey)), np.stack([grey] * 3, -1))
    bits = np.array([[True, False], [False, True]])
    expected = np.stack([bits * np.uint8(255)] * 3, -1)
    assert np.array_equal(loaded(save(tmp_path / "1.png", Image.fromarray(bits))), expected)


def test_transparent_pixels_show_white(tmp_path):
    rgba = np.array([[[200, 100, 50, 255], [200, 100, 50, 0], [200, 100, 50, 51]]], np.uint8)
    expected = [[200, 100, 50], [255, 255, 255], [244, 224, 214]]  # 51 / 255 = 1 / 5 of the way from white
    assert np.abs(loaded(save(tmp_path / "rgba.png", rgba))[0].astype(int) - expected).max() <= 1
    grey_alpha = Image.fromarray(np.array([[[10, 255], [10, 0]]], np.uint8), "LA")
    assert loaded(save(tmp_path / "la.png", grey_alpha)).tolist() == [[[10] * 3, [255] * 3]]


def test_palette_with_and_without_transparency(tmp_path):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    assert loaded(save(tmp_path / "p.png", image)).tolist() == [[[255, 0, 0], [0, 255, 0], [0, 0, 255]]]
    path = save(tmp_path / "index.png", image, transparency=1)
    assert loaded(path).tolist() == [[[255, 0, 0], [255, 255, 255], [0, 0, 255]]]
    path = save(tmp_path / "table.png", image, transparency=bytes([0, 255, 255]))
    assert loaded(path).tolist() == [[[255, 255, 255], [0, 255, 0], [0, 0, 255]]]


def test_cmyk(tmp_path):
    image = Image.new("CMYK", (8, 8), (255, 0, 0, 0))  # full cyan
    for name in ("a.tif", "a.jpg"):
        assert np.abs(loaded(save(tmp_path / name, image)).astype(int) - [0, 255, 255]).max() <= 2


def test_16_bit_grey_is_scaled_not_clipped(tmp_path):
    values = np.array([[0, 128, 129, 257, 1000, 32896, 65535]], np.uint16)
    expected = np.rint(values / 257).astype(np.uint8)
    for name in ("a.png", "a.tif"):
        assert np.array_equal(loaded(save(tmp_path / name, values))[..., 0], expected), name
    assert np.array_equal(loaded(save(tmp_path / "i.tif", values.astype(np.int32)))[0, :, 2], expected[0])
    big_endian = Image.frombytes("I;16B", (7, 1), values.astype(">u2").tobytes())
    assert np.array_equal(loaded(save(tmp_path / "b.tif", big_endian))[..., 0], expected)


def test_integers_beyond_16_bits_are_refused(tmp_path):
    assert "0 to 65535 was wanted" in reason(I.load_image, save(tmp_path / "a.tif", np.array([[70000]], np.int32)))
    assert "integers from -3 to 9" in reason(I.load_image, save(tmp_path / "b.tif", np.array([[-3, 9]], np.int32)))


def test_12_bit_grey(tmp_path):
    data = bytes([0xFF, 0xF0, 0x00, 0x80, 0x00, 0x00])  # rows of two 12-bit pixels: 4095, 0 | 2048, 0
    tags = [(256, 2), (257, 2), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 2), (279, len(data))]
    directory = b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in tags)
    header = b"II*\0" + struct.pack("<I", 8 + len(data)) + data
    path = tmp_path / "a.tif"
    path.write_bytes(header + struct.pack("<H", len(tags)) + directory + bytes(4))
    assert loaded(str(path))[..., 1].tolist() == [[255, 0], [128, 0]]


def png(chunks):
    """PNG bytes of (name, content) chunks."""
    parts = [struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_16_bit_colour(tmp_path):
    row = b"\0" + struct.pack(">6H", 0, 257 * 100, 65535, 257 * 7, 257, 0)
    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    path = tmp_path / "a.png"
    path.write_bytes(png([(b"IHDR", header), (b"IDAT", zlib.compress(row)), (b"IEND", b"")]))
    assert loaded(str(path)).tolist() == [[[0, 100, 255], [7, 1, 0]]]


def test_interlaced(tmp_path):
    """Adam7 of 2 x 2 pixels: pass 1 has the first, pass 6 the other of its row, pass 7 the second row."""
    header = struct.pack(">IIBBBBB", 2, 2, 8, 0, 0, 0, 1)
    passes = b"\0\x0a" + b"\0\x14" + b"\0\x1e\x28"
    path = tmp_path / "a.png"
    path.write_bytes(png([(b"IHDR", header), (b"IDAT", zlib.compress(passes)), (b"IEND", b"")]))
    assert loaded(str(path))[..., 0].tolist() == [[10, 20], [30, 40]]


def test_float_tiff_only_in_0_to_1(tmp_path):
    path = save(tmp_path / "a.tif", np.array([[0.0, 0.25, 1.0]], np.float32))
    assert loaded(path)[0, :, 0].tolist() == [0, 64, 255]
    for i, bad in enumerate((-0.1, 1.5, np.nan)):
        path = save(tmp_path / f"{i}.tif", np.array([[0.0, bad]], np.float32))
        assert "0 to 1 was wanted" in reason(I.load_image, path)


@pytest.mark.parametrize("suffix", ["png", "gif", "webp", "tif"])
def test_first_frame_of_several(tmp_path, suffix):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if suffix == "webp" else {}
    path = save(tmp_path / f"a.{suffix}", frames[0], save_all=True, append_images=frames[1:], **options)
    assert Image.open(path).n_frames == 2
    assert loaded(path).tolist() == [[[255, 0, 0]] * 4] * 4
    assert not I.check_headers([path], SizePolicy()).problems


# What the viewer is to see, and how that is stored for each EXIF orientation (EXIF 2.3, tag 0x0112).
SEEN = np.repeat(np.arange(6, dtype=np.uint8).reshape(2, 3, 1) * 40, 3, axis=-1)
STORED = {
    1: SEEN,
    2: SEEN[:, ::-1],
    3: SEEN[::-1, ::-1],
    4: SEEN[::-1],
    5: SEEN.transpose(1, 0, 2),
    6: np.rot90(SEEN, 1),  # shown after a quarter turn clockwise
    7: SEEN[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(SEEN, -1),
}


@pytest.mark.parametrize("suffix", ["png", "webp", "tif", "jpg"])
@pytest.mark.parametrize("orientation", STORED)
def test_orientation_is_applied_to_pixels_and_headers(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[I.ORIENTATION] = orientation
    big = np.kron(STORED[orientation], np.ones((8, 8, 1), np.uint8))  # 16 x 24 pixels, seen upright
    options = {"lossless": True} if suffix == "webp" else {"quality": 95} if suffix == "jpg" else {}
    path = save(tmp_path / f"a.{suffix}", big, exif=exif, **options)
    assert np.abs(loaded(path)[4::8, 4::8].astype(int) - SEEN).max() <= (3 if suffix == "jpg" else 0)
    headers = I.check_headers([path], SizePolicy())
    assert headers.sizes == [(16, 24)] and not headers.problems


def test_exif_behind_the_pixels_of_a_png_counts(tmp_path):
    exif = Image.Exif()
    exif[I.ORIENTATION] = 6
    row = b"\0\x0a\x14"
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 8, 0, 0, 0, 0)), (b"IDAT", zlib.compress(row))]
    path = tmp_path / "a.png"
    path.write_bytes(png([*chunks, (b"eXIf", exif.tobytes()[6:]), (b"IEND", b"")]))
    assert loaded(str(path))[..., 0].tolist() == [[10], [20]]


def test_damaged_exif_does_not_lose_the_image(tmp_path):
    pixels = random_rgb()
    path = save(tmp_path / "a.png", pixels, exif=b"Exif\0\0nonsense")
    assert np.array_equal(loaded(path), pixels)


def test_to_float():
    x = I.to_float(torch.tensor([0, 51, 255], dtype=torch.uint8))
    assert x.dtype == torch.float32 and torch.equal(x, torch.tensor([0.0, 0.2, 1.0]))


# --- bad files ----------------------------------------------------------------------------------------------


def encoded(form, height=64, width=64):
    stream = io.BytesIO()
    Image.fromarray(random_rgb(height, width)).save(stream, form)
    return stream.getvalue()


def make_bad_files(folder):
    """name -> a part of the reason."""
    folder.mkdir(parents=True, exist_ok=True)
    for form in ("png", "jpeg", "webp", "bmp", "tiff", "gif"):
        data = encoded(form)
        (folder / f"half.{form}").write_bytes(data[: len(data) // 2])
        (folder / f"start.{form}").write_bytes(data[:6])
    (folder / "zero.png").write_bytes(b"")
    (folder / "text.png").write_text("not an image\n")
    (folder / "script.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")
    (folder / "folder.png").mkdir()
    (folder / "link.png").symlink_to(folder / "nothing")
    os.mkfifo(folder / "pipe.png")
    side = 20000  # 400 megapixels in 60 bytes
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    (folder / "bomb.png").write_bytes(png([(b"IHDR", header), (b"IDAT", b""), (b"IEND", b"")]))
    (folder / "new\nline.png").write_bytes(b"")
    (folder / "grüße.png").write_bytes(b"")
    known = {
        "zero.png": "is empty",
        "text.png": "is no image",
        "script.png": "is no image",
        "folder.png": "is a folder",
        "link.png": "No such file",
        "pipe.png": "device or pipe",
        "bomb.png": "decompression bomb",
        "new\nline.png": "is empty",
        "grüße.png": "is empty",
    }
    return {str(folder / name): known.get(name, "") for name in os.listdir(folder)}


def test_every_bad_file_gives_one_line(tmp_path):
    bad = make_bad_files(tmp_path / "bad")
    assert len(bad) == 21
    with warnings.catch_warnings(record=True):
        for path, part in bad.items():
            message = reason(I.load_image, path)
            assert part in message and message.startswith(I.shown(path) + ": "), message
    assert str(tmp_path) + "/bad/grüße.png: " in reason(I.load_image, str(tmp_path / "bad" / "grüße.png"))
    assert r"new\nline.png': " in reason(I.load_image, str(tmp_path / "bad" / "new\nline.png"))


def test_headers_find_every_bad_file_and_no_good_one(tmp_path):
    bad = make_bad_files(tmp_path / "bad")
    good = [save(tmp_path / f"good.{s}", random_rgb(8, 12)) for s in ("png", "jpg", "webp", "bmp", "tif", "gif")]
    with_tail = tmp_path / "tail.png"
    with_tail.write_bytes(encoded("png") + b"appended by a camera " * 10)
    headers = I.check_headers([*bad, *good, str(with_tail)], SizePolicy())
    assert [p for p, _ in headers.problems] == list(bad)
    for path, text in headers.problems:
        assert bad[path] in text and "\n" not in text and not text.startswith(str(tmp_path))
    assert headers.sizes == [None] * len(bad) + [(8, 12)] * 6 + [(64, 64)]


def test_unreadable_permissions(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png")
    os.chmod(path, 0)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    if os.access(path, os.R_OK):  # as root, for whom permissions are no obstacle
        monkeypatch.setattr("builtins.open", refuse)
    assert "cannot be opened (Permission denied)" in reason(I.load_image, path)


def test_no_file_stays_open(tmp_path):
    paths = [*make_bad_files(tmp_path / "bad"), *(save(tmp_path / f"{i}.png") for i in range(20))]
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    I.check_headers(paths, SizePolicy())
    for path in paths:
        try:
            I.load_image(path)
        except DataError:
            pass
    assert not before or len(os.listdir("/proc/self/fd")) == before


def encodings():
    """The bytes of a small picture in each format, and in the forms of it that take other ways through the code."""
    exif = Image.Exif()
    exif[I.ORIENTATION] = 6
    rgb = Image.fromarray(random_rgb())
    forms = {
        "png": (rgb, {"exif": exif}), "png palette": (rgb.convert("P"), {"transparency": 3}),
        "png deep": (Image.fromarray(random_rgb()[..., 0].astype(np.uint16) * 257), {}),
        "jpeg": (rgb, {"exif": exif}), "jpeg progressive": (rgb, {"progressive": True}),
        "jpeg cmyk": (rgb.convert("CMYK"), {}), "webp": (rgb, {}), "webp lossless": (rgb, {"lossless": True}),
        "bmp": (rgb, {}), "tiff": (rgb, {}), "tiff packed": (rgb, {"compression": "tiff_lzw"}),
        "gif animated": (rgb, {"save_all": True, "append_images": [rgb.rotate(90)]}),
    }  # fmt: skip
    for name, (image, options) in forms.items():
        stream = io.BytesIO()
        image.save(stream, name.split()[0], **options)
        yield stream.getvalue()


def mutated(data, rng):
    """A few bytes changed, half the time among the first 64; sometimes bytes put in, or the end cut off."""
    data = np.frombuffer(data, np.uint8).copy()
    positions = rng.integers(len(data) if rng.random() < 0.5 else 64, size=rng.integers(1, 6))
    data[positions] = rng.integers(256, size=len(positions))
    if rng.random() < 0.1:
        data = np.insert(data, len(data) // 2, rng.integers(256, size=20))
    return data[: rng.integers(1, len(data)) if rng.random() < 0.2 else None].tobytes()


@pytest.mark.filterwarnings("ignore")  # pytest shows what data.images silences
def test_mutated_files_give_an_image_or_one_line(tmp_path):
    """3000 of them: no crash, no file that takes for ever, none left out in silence, none refused that can be read."""
    rng, outcomes, slowest = np.random.default_rng(0), {True: 0, False: 0}, 0.0
    for form, data in enumerate(encodings()):
        paths = [str(tmp_path / f"{form} {i}.png") for i in range(250)]
        for path in paths:
            Path(path).write_bytes(mutated(data, rng))
        refused = dict(I.check_headers(paths, SizePolicy()).problems)
        dataset = ImageDataset([Item(path, REAL, "") for path in paths], SizePolicy())
        for i, path in enumerate(paths):
            began = time.monotonic()
            sample = dataset[i]
            slowest = max(slowest, time.monotonic() - began)
            outcomes[sample.image is not None] += 1
            assert (sample.image is None) == (sample.error is not None)
            assert sample.error is None or sample.error.isprintable()
            assert path not in refused or (sample.error and refused[path].isprintable())
    assert min(outcomes.values()) > 500 and slowest < 5


# --- which files --------------------------------------------------------------------------------------------


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return str(root)


def test_find_images_sorted_any_case_hidden_left_out(tmp_path):
    wanted = ["B.PNG", "a.jpg", "a/z.TiF", "b.webp", "dir.png/x.JPEG", "é.bmp", "z.tiff"]
    unwanted = [".hidden.png", "._a.jpg", "__MACOSX/a.png", ".git/a.png", "notes.txt", "x.gif", "no_suffix"]
    root = touch(tmp_path / "r", *wanted, *unwanted)
    assert I.find_images(root) == [os.path.join(root, name) for name in sorted(wanted)]


def test_find_images_follows_links_once(tmp_path):
    root = touch(tmp_path / "r", "a/1.png")
    touch(tmp_path / "elsewhere", "2.png")
    (tmp_path / "r" / "a" / "loop").symlink_to(tmp_path / "r")
    (tmp_path / "r" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "r" / "broken.png").symlink_to(tmp_path / "nothing")
    assert I.find_images(root) == [f"{root}/a/1.png", f"{root}/b/2.png", f"{root}/broken.png"]


def test_find_images_errors(tmp_path):
    assert "does not exist" in reason(I.find_images, str(tmp_path / "x"))
    file = save(tmp_path / "f.png")
    assert "is a file; a folder was wanted" in reason(I.find_images, file)
    (tmp_path / "r").mkdir()
    assert "holds no files" in reason(I.find_images, str(tmp_path / "r"))
    message = reason(I.find_images, touch(tmp_path / "q", "a.gif", "b.gif", "c.txt"))
    assert ".jpg" in message and "2 .gif, 1 .txt" in message
    assert "does not exist" in reason(I.find_images, str(tmp_path / "new\nline"))


def test_unreadable_folder_is_an_error(tmp_path, monkeypatch):
    root, scandir = touch(tmp_path / "r", "a.png", "b/c.png"), os.scandir

    def refuse(path):
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert "/r/b cannot be read (Permission denied)" in reason(I.find_images, root)


def test_folder_items(tmp_path):
    real = touch(tmp_path / "real", "2.png", "1.png")
    fakes = [touch(tmp_path / name, "b.png", "a.png") for name in ("ProGAN", "StyleGAN")]
    assert I.folder_items([real], fakes) == [
        Item(f"{real}/1.png", REAL, ""),
        Item(f"{real}/2.png", REAL, ""),
        *(Item(f"{tmp_path}/{name}/{n}.png", FAKE, name) for name in ("ProGAN", "StyleGAN") for n in "ab"),
    ]
    assert (FAKE, REAL) == (0, 1) and I.LABEL_NAMES[REAL] == "real"


def test_generators_of_the_same_name_are_told_apart(tmp_path):
    roots = [touch(tmp_path / name / "images", "a.png") for name in ("x", "y")]
    assert [i.generator for i in I.folder_items([], [roots[0], roots[1] + "/"])] == ["x/images", "y/images"]


def test_folder_items_errors(tmp_path):
    real, fake = touch(tmp_path / "real", "1.png"), touch(tmp_path / "real" / "fake", "1.png")
    assert "lies in" in reason(I.folder_items, [real], [fake])
    assert "lies in" in reason(I.folder_items, [fake], [real])
    assert "lies in" in reason(I.folder_items, [real, real + "/"], [])
    assert "no image folders" in reason(I.folder_items, [], [])
    (tmp_path / "empty").mkdir()
    assert "no images in folder" in reason(I.folder_items, [fake], [str(tmp_path / "empty")])
    touch(tmp_path / "real2", "1.png")  # begins with the same letters, lies beside
    assert len(I.folder_items([fake], [str(tmp_path / "real2")])) == 2


def test_tree_items(tmp_path):
    names = [
        "progan/cat/0_real/1.png",
        "progan/cat/1_fake/2.png",
        "stylegan/0_real/3.png",
        "stylegan/1_fake/4.png",
    ]
    root = touch(tmp_path / "t", *names)
    items = I.tree_items(root)
    assert [(os.path.relpath(i.path, root), i.label, i.generator) for i in items] == [
        ("progan/cat/0_real/1.png", REAL, "progan"),
        ("stylegan/0_real/3.png", REAL, "stylegan"),
        ("progan/cat/1_fake/2.png", FAKE, "progan"),
        ("stylegan/1_fake/4.png", FAKE, "stylegan"),
    ]
    assert [i.generator for i in I.tree_items(str(tmp_path / "t" / "stylegan"))] == ["stylegan", "stylegan"]


def test_tree_items_errors(tmp_path):
    assert "does not exist" in reason(I.tree_items, str(tmp_path / "x"))
    assert "no folder 0_real or 1_fake" in reason(I.tree_items, touch(tmp_path / "t", "a.png"))
    (tmp_path / "t" / "0_real").mkdir()
    assert "no images in folder" in reason(I.tree_items, str(tmp_path / "t"))


def test_csv_items(tmp_path, monkeypatch):
    touch(tmp_path, "t/a.png", "t/with, comma.png", "cwd/a.png", "cwd/b.png")
    file = tmp_path / "t" / "list.csv"
    rows = ["a.png,REAL,,x", '"with, comma.png",0,gan,', "b.png,1,,", f"{tmp_path}/t/a.png,fake,,", ""]
    file.write_bytes("\r\n".join(["\ufeffPath,label,generator,note", *rows]).encode())
    monkeypatch.chdir(tmp_path / "cwd")
    assert I.csv_items(str(file)) == [
        Item("a.png", REAL, ""),
        Item(f"{tmp_path}/t/with, comma.png", FAKE, "gan"),
        Item("b.png", REAL, ""),
        Item(f"{tmp_path}/t/a.png", FAKE, ""),
    ]
    file.write_text("label,path\nreal,b.png\n")
    assert I.csv_items(str(file)) == [Item("b.png", REAL, "")]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "line 1: a header path,label"),
        ("a.png,real\n", "line 1: a header path,label"),
        ("path;label\na.png;real\n", "line 1: a header path,label"),
        ("path,label\n", "names no images"),
        (
            "path,label\na.png,real\na.png,2\n",
            "line 3: label '2'; real or fake was wanted (or 1 for real, 0 for fake)",
        ),
        ("path,label\na.png\n", "line 2: label ''"),
        ("path,label\n,real\n", "line 2: there is no path"),
        ("path,label\na.png,real,x\n", "line 2: more fields"),
        (
            "path,label\na.png,real\nb.png,real\nc.png,fake\n",
            "2 of its 3 files do not exist, the first is b.png in line 3 ",
        ),
        ('path,label\n"a.png,real\n', "cannot be read"),
    ],
)
def test_csv_errors(tmp_path, text, part):
    touch(tmp_path, "a.png")
    (tmp_path / "list.csv").write_text(text)
    message = reason(I.csv_items, str(tmp_path / "list.csv"))
    assert part in message and "list.csv" in message


def test_csv_and_list_that_are_no_text(tmp_path):
    image = save(tmp_path / "a.png")
    for read in (I.csv_items, I.list_paths):
        assert "is no UTF-8 text" in reason(read, image)
        assert "Is a directory" in reason(read, str(tmp_path))
        assert "No such file" in reason(read, str(tmp_path / "x"))


def test_list_paths(tmp_path, monkeypatch):
    touch(tmp_path, "lists/a.png", "cwd/sub/b.png")
    file = tmp_path / "lists" / "train.txt"
    file.write_bytes(f"a.png\r\n\nsub/b.png\n{tmp_path}/lists/a.png".encode())
    monkeypatch.chdir(tmp_path / "cwd")
    assert I.list_paths(str(file)) == [f"{tmp_path}/lists/a.png", "sub/b.png", f"{tmp_path}/lists/a.png"]
    assert I.paths_of(str(file)) == I.list_paths(str(file)) and I.paths_of("sub") == ["sub/b.png"]
    file.write_text("a.png\nx.png\ny.png\n")
    assert "2 of its 3 files do not exist, the first is x.png" in reason(I.list_paths, str(file))
    file.write_text("\n")
    assert "names no images" in reason(I.list_paths, str(file))


def test_input_items(tmp_path):
    root = touch(tmp_path / "r", "b.png", "a.png")
    file = touch(tmp_path / "r", "odd.name") + "/odd.name"
    assert I.input_items([file, root]) == [Item(p, None, "") for p in (file, f"{root}/a.png", f"{root}/b.png")]
    assert "does not exist" in reason(I.input_items, [str(tmp_path / "x")])
    assert "no input" in reason(I.input_items, [])


# --- sizes --------------------------------------------------------------------------------------------------


def coordinates(height, width):
    """An image whose first two channels are the row and column of each pixel."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([rows, columns, rows * 0]).to(torch.uint8)


def corner(image):
    return image[:2, 0, 0].tolist()


def test_sides_become_multiples_of_the_scale():
    image = I.fit_size(coordinates(11, 16), SizePolicy(scale=4))
    assert image.shape == (3, 8, 16) and corner(image) == [1, 0] and image.is_contiguous()
    whole = coordinates(8, 12)
    assert torch.equal(I.fit_size(whole, SizePolicy(scale=4)), whole)


def test_crop_in_the_centre_and_at_random():
    policy = SizePolicy(scale=4, crop_size=8)
    image = coordinates(20, 30)
    assert corner(I.fit_size(image, policy)) == [6, 11]
    assert corner(I.fit_size(image, policy._replace(crop_size=10))) == [
        5 + 1,
        10 + 1,
    ]  # 10 x 10, then its centre 8 x 8
    rng = np.random.default_rng(0)
    corners = [corner(I.fit_size(image, policy._replace(random_crop=True), rng)) for _ in range(400)]
    assert {r for r, _ in corners} == set(range(13)) and {c for _, c in corners} == set(range(23))


def test_resize_keeps_the_aspect_and_antialiases():
    policy = SizePolicy(scale=1, resize=20)
    assert I.fit_size(coordinates(40, 70), policy).shape == (3, 20, 35)
    assert I.fit_size(coordinates(10, 15), policy).shape == (3, 20, 30)
    checkers = (coordinates(80, 80)[0] + coordinates(80, 80)[1]) % 2 * 255  # without antialiasing all 0 or 255
    small = I.fit_size(checkers.expand(3, -1, -1).contiguous(), policy)
    assert small.dtype == torch.uint8 and (small[:, 4:-4, 4:-4].int() - 127).abs().max() <= 2
    same = coordinates(20, 24)
    assert torch.equal(I.fit_size(same, policy), same)


@pytest.mark.parametrize("policy", [SizePolicy(), SizePolicy(3, None, 37), SizePolicy(4, 30), SizePolicy(4, 32, 40)])
@pytest.mark.parametrize("size", [(64, 64), (65, 127), (201, 50)])
def test_sizes_are_foretold(size, policy):
    image = I.fit_size(torch.zeros(3, *size, dtype=torch.uint8), policy)
    assert I.fitted_size(*size, policy) == tuple(image.shape[-2:])
    whole = I.fit_size(torch.zeros(3, *size, dtype=torch.uint8), policy._replace(scale=1))
    assert I.is_trimmed(*size, policy) == (whole.shape != image.shape)


@pytest.mark.parametrize(
    ("size", "policy", "part"),
    [
        ((1, 1), SizePolicy(4), "is 1 x 1 pixels; sides of at least 4"),
        ((1000, 3), SizePolicy(4), "is 3 x 1000 pixels; sides of at least 4"),
        (
            (63, 100),
            SizePolicy(4, 64),
            "is 100 x 63 pixels, smaller than the crop of 64 x 64: use a smaller --crop-size",
        ),
        ((63, 100), SizePolicy(4, 64, 32), "is 100 x 63 pixels, 50 x 32 when resized, smaller than the crop"),
        ((63, 100), SizePolicy(4, 3), "sides of at least 4"),
        ((1, 100_000), SizePolicy(4, None, 256), "25600000 x 256 when resized, more than 178956970 in all"),
    ],
)
def test_too_small(size, policy, part):
    assert part in I.size_problem(*size, policy)
    assert part in reason(I.fit_size, torch.zeros(3, *size, dtype=torch.uint8), policy)


def test_headers_report_small_images(tmp_path):
    paths = [save(tmp_path / f"{h}x{w}.png", random_rgb(h, w)) for h, w in ((1, 1), (16, 16), (1000, 3))]
    headers = I.check_headers(paths, SizePolicy(4))
    assert headers.sizes == [(1, 1), (16, 16), (1000, 3)]
    problems = [(path, text.split(";")[0]) for path, text in headers.problems]
    assert problems == [(paths[0], "is 1 x 1 pixels"), (paths[2], "is 3 x 1000 pixels")]
    assert I.check_headers([], SizePolicy()) == ([], [])


def test_usable_items(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    sizes = ((16, 16), (17, 16), (16, 18), (2, 16))
    items = [Item(save(tmp_path / f"{h}x{w}.png", random_rgb(h, w)), REAL, "") for h, w in sizes]
    message = reason(I.usable_items, items, SizePolicy(4))
    assert message.startswith("1 of 4 images cannot be used") and "--skip-bad" in message and "2x16.png" in message
    caplog.clear()
    assert I.usable_items(items, SizePolicy(4), skip_bad=True) == items[:3]
    assert [r.message for r in caplog.records][0].startswith(f"left out: {items[3].path}: is 16 x 2 pixels")
    assert caplog.records[1].message == "2 of 3 images have sides that are no multiple of 4 and are centre-cropped"
    assert "1 of 1 images cannot be used" in reason(I.usable_items, items[3:], SizePolicy(4), True)
    assert I.usable_paths([i.path for i in items[:3]], SizePolicy(4)) == [i.path for i in items[:3]]
    assert I.usable_items([], SizePolicy()) == []


# --- batches ------------------------------------------------------------------------------------------------


@pytest.fixture
def items(tmp_path):
    return [Item(save(tmp_path / f"{i}.png", random_rgb(24, 28, i)), i % 2, "") for i in range(6)]


def test_dataset_reads_labels_and_pixels(items):
    data = ImageDataset(items, SizePolicy(4))
    assert len(data) == 6
    sample = data[3]
    assert sample[:3] == (3, items[3].path, REAL) and sample.error is None
    assert torch.equal(sample.image, torch.from_numpy(random_rgb(24, 28, 3)).permute(2, 0, 1))
    assert ImageDataset([items[0]._replace(label=None)], SizePolicy())[0].label == I.UNLABELLED


def test_flip_is_horizontal_in_half_the_cases(items):
    data, plain = (
        ImageDataset(items, SizePolicy(4), flip=True, seed=1),
        ImageDataset(items, SizePolicy(4))[0].image,
    )
    flipped = 0
    for epoch in range(200):
        image = data[epoch, 0].image
        assert torch.equal(image, plain) or torch.equal(image, plain.flip(-1))
        flipped += torch.equal(image, plain.flip(-1))
    assert 75 <= flipped <= 125  # 100 +- 3.5 sigma


def test_random_crop_depends_on_seed_epoch_and_index_alone(tmp_path):
    path = str(tmp_path / "a.png")
    Image.fromarray(coordinates(40, 40).permute(1, 2, 0).numpy()).save(path)
    same = [Item(path, REAL, "")] * 3

    def crops(seed, epoch):
        data = ImageDataset(same, SizePolicy(4, 8, None, True), flip=True, seed=seed)
        return [data[epoch, i].image.tolist() for i in range(3)]

    first = crops(0, 0)
    assert first == crops(0, 0) and first[0] != first[1]
    assert first != crops(1, 0) and first != crops(0, 1)
    assert (
        ImageDataset(same, SizePolicy(4, 8, None, True), flip=True)[0].image.tolist() == first[0]
    )  # an index: epoch 0


def test_transform_comes_before_the_size_and_has_its_own_rng(items):
    seen = []

    def invert(image, path, rng):
        seen.append((tuple(image.shape), path, rng.random()))
        return 255 - image

    policy = SizePolicy(4, 8, None, True)
    plain = ImageDataset(items, policy, flip=True, seed=5)[2, 1].image
    for _ in range(2):
        inverted = ImageDataset(items, policy, flip=True, seed=5, transform=invert)[2, 1].image
        assert torch.equal(255 - inverted, plain)
    assert seen[0] == seen[1] and seen[0][:2] == ((3, 24, 28), items[1].path)


def test_dataset_never_raises(items, tmp_path):
    bad = make_bad_files(tmp_path / "bad")
    data = ImageDataset([Item(p, FAKE, "") for p in bad] + items[:2], SizePolicy(4, 25))
    samples = [data[i] for i in range(len(data))]
    for sample in samples:
        assert (
            sample.image is None and sample.error.startswith(I.shown(sample.path) + ": ") and sample.error.isprintable()
        )
    assert "28 x 24 pixels, smaller than the crop" in samples[-1].error
    batch = I.collate(samples)
    assert batch.images.shape == (0, 3, 0, 0) and batch.labels.tolist() == [] and batch.mismatch is None
    assert batch.errors == {s.index: s.error for s in samples}


def test_collate(items, tmp_path):
    zero = tmp_path / "zero.png"
    zero.touch()
    data = ImageDataset([*items[:2], Item(str(zero), REAL, ""), items[2]], SizePolicy(4))
    batch = I.collate([data[i] for i in range(4)])
    assert batch.images.shape == (3, 3, 24, 28) and batch.images.dtype == torch.uint8
    assert batch.labels.tolist() == [0, 1, 0] and batch.labels.dtype == torch.int64
    assert batch.indices == [0, 1, 3] and list(batch.errors) == [2] and batch.mismatch is None


def test_mixed_sizes_are_told(items, tmp_path):
    other = Item(save(tmp_path / "other.png", random_rgb(16, 20)), REAL, "")
    data = ImageDataset([items[0], other], SizePolicy(4))
    batch = I.collate([data[0], data[1]])
    assert len(batch.images) == 0
    for part in (f"{items[0].path} is 28 x 24", f"{other.path} 20 x 16", "--crop-size", "--batch-size 1"):
        assert part in batch.mismatch
    cropped = ImageDataset([items[0], other], SizePolicy(4, 16))
    assert I.collate([cropped[0], cropped[1]]).images.shape == (2, 3, 16, 16)


def test_workers_change_nothing(items, tmp_path):
    (tmp_path / "zero.png").touch()
    data = ImageDataset([*items, Item(str(tmp_path / "zero.png"), FAKE, "")], SizePolicy(4, 8, None, True), True, 3)

    def epoch(workers):
        batches = EpochBatches(len(data), 3, seed=3)
        batches.set_epoch(2)
        return list(DataLoader(data, batch_sampler=batches, collate_fn=I.collate, num_workers=workers))

    for a, b in zip(epoch(0), epoch(2), strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and a[2:] == b[2:]
