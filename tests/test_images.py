"""Files made by hand, with the pixels or the error each of them has to give."""

import io
import logging
import os
import struct
import time
import zlib

import numpy as np
import pytest
import torch
from files import mistake, random_rgb, save
from PIL import Image

from data import images as I
from data.images import SizePolicy, check_headers, load_image, resize_and_crop
from data.lists import Item
from utils.console import printable
from utils.errors import UserError
from utils.labels import REAL

ORIENTATION = 0x0112  # EXIF 2.3


def loaded(path):
    """load_image as (H, W, 3) numpy, after checks that hold for every image."""
    image = load_image(path)
    assert image.dtype == torch.uint8 and image.is_contiguous() and image.shape[0] == 3
    return image.permute(1, 2, 0).numpy()


def oriented(orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def png(*chunks):
    """PNG bytes of (name, content) chunks."""
    parts = [struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + bytes(4) + b"IEND\xaeB`\x82"


def png_header(width, height, depth, colour, interlaced=0):
    return b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)


def idat(content):
    return b"IDAT", zlib.compress(content)


RAMP = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
BITS = np.array([[True, False], [False, True]])
DEEP = np.array([[0, 128, 129, 257, 1000, 32896, 65535]], np.uint16)
DEEP_SEEN = np.array([[0, 0, 1, 1, 4, 128, 255]])[..., None]
BIG_ENDIAN = Image.frombytes("I;16B", (7, 1), DEEP.astype(">u2").tobytes())
FLOATS = np.array([[0.0, 0.25, 1.0]], np.float32)
RED, GREEN, BLUE, WHITE = [255, 0, 0], [0, 255, 0], [0, 0, 255], [255] * 3
PALETTE = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
PALETTE.putpalette(RED + GREEN + BLUE)
ALPHA = np.array([[[200, 100, 50, 255], [200, 100, 50, 0], [200, 100, 50, 51]]], np.uint8)
ALPHA_SEEN = [[[200, 100, 50], WHITE, [244, 224, 214]]]  # 51 / 255 = 1 / 5 of the way from white
GREY_ALPHA = Image.fromarray(np.array([[[10, 255], [10, 0]]], np.uint8), "LA")
CYAN = Image.new("CMYK", (8, 8), (255, 0, 0, 0))


@pytest.mark.parametrize(
    "name, pixels, options, seen",
    [
        *((f"rgb.{suffix}", random_rgb(5, 7), {}, random_rgb(5, 7)) for suffix in ("png", "bmp", "tif")),
        ("rgb.webp", random_rgb(5, 7), {"lossless": True}, random_rgb(5, 7)),
        ("grey.png", RAMP, {}, RAMP[..., None]),
        ("bits.png", BITS, {}, BITS[..., None] * np.uint8(255)),
        ("palette.png", PALETTE, {}, [[RED, GREEN, BLUE]]),
        ("one transparent.png", PALETTE, {"transparency": 1}, [[RED, WHITE, BLUE]]),
        ("table.png", PALETTE, {"transparency": bytes([0, 255, 255])}, [[WHITE, GREEN, BLUE]]),
        ("alpha.png", ALPHA, {}, ALPHA_SEEN),
        ("grey alpha.png", GREY_ALPHA, {}, [[[10] * 3, WHITE]]),
        ("cmyk.tif", CYAN, {}, [[[0, 255, 255]]]),
        ("cmyk.jpg", CYAN, {}, [[[0, 255, 255]]]),
        ("16 bits.png", DEEP, {}, DEEP_SEEN),
        ("16 bits.tif", DEEP, {}, DEEP_SEEN),
        ("32 bits.tif", DEEP.astype(np.int32), {}, DEEP_SEEN),
        ("big endian.tif", BIG_ENDIAN, {}, DEEP_SEEN),
        ("floats.tif", FLOATS, {}, np.array([[0, 64, 255]])[..., None]),
    ],
)
def test_what_is_stored_is_seen(tmp_path, name, pixels, options, seen):
    tolerance = 1 if "alpha" in name else 2 if "cmyk" in name else 0
    assert np.abs(loaded(save(tmp_path / name, pixels, **options)).astype(int) - seen).max() <= tolerance


def test_what_pillow_does_not_write(tmp_path):
    """12-bit TIFF; 16-bit colour and interlaced PNG; a PNG whose EXIF comes behind its pixels."""
    data = bytes([0xFF, 0xF0, 0x00, 0x80, 0x00, 0x00])  # rows of two 12-bit pixels: 4095, 0 | 2048, 0
    tags = [(256, 2), (257, 2), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 2), (279, len(data))]
    directory = b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in tags)
    header = b"II*\0" + struct.pack("<I", 8 + len(data)) + data
    deep = b"\0" + struct.pack(">6H", 0, 257 * 100, 65535, 257 * 7, 257, 0)
    passes = b"\0\x0a" + b"\0\x14" + b"\0\x1e\x28"  # Adam7: the first pixel; the other of its row; the second row
    exif = b"eXIf", oriented(6).tobytes()[6:]
    for content, seen in (
        (header + struct.pack("<H", len(tags)) + directory + bytes(4), [[[255] * 3, [0] * 3], [[128] * 3, [0] * 3]]),
        (png(png_header(2, 1, 16, 2), idat(deep)), [[[0, 100, 255], [7, 1, 0]]]),
        (png(png_header(2, 2, 8, 0, 1), idat(passes)), [[[10] * 3, [20] * 3], [[30] * 3, [40] * 3]]),
        (png(png_header(2, 1, 8, 0), idat(b"\0\x0a\x14"), exif), [[[10] * 3], [[20] * 3]]),
    ):
        (tmp_path / "a.png").write_bytes(content)
        assert loaded(str(tmp_path / "a.png")).tolist() == seen


def test_floats_beyond_0_to_1_and_integers_beyond_16_bits_are_refused(tmp_path):
    bad = [np.array([[0.0, x]], np.float32) for x in (-0.1, 1.5, np.nan)] + [np.array([[-3, 9]]), np.array([[70000]])]
    for pixels in bad:
        path = save(tmp_path / "b.tif", pixels if pixels.dtype == np.float32 else pixels.astype(np.int32))
        with mistake("was wanted", f"{pixels.min():g} to {pixels.max():g}"):
            load_image(path)


@pytest.mark.parametrize("suffix", ["png", "gif", "webp", "tif"])
def test_first_frame_of_several(tmp_path, suffix):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if suffix == "webp" else {}
    path = save(tmp_path / f"a.{suffix}", frames[0], save_all=True, append_images=frames[1:], **options)
    assert Image.open(path).n_frames == 2
    assert loaded(path).tolist() == [[[255, 0, 0]] * 4] * 4
    assert check_headers([path], SizePolicy()) == [I.Header((4, 4))]


# What the viewer is to see, and how that is stored for each EXIF orientation.
SEEN = np.repeat(np.arange(6, dtype=np.uint8).reshape(2, 3, 1) * 40, 3, axis=-1)
STORED = {
    1: SEEN, 2: SEEN[:, ::-1], 3: SEEN[::-1, ::-1], 4: SEEN[::-1], 5: SEEN.transpose(1, 0, 2),
    6: np.rot90(SEEN, 1),  # shown after a quarter turn clockwise
    7: SEEN[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(SEEN, -1),
}  # fmt: skip


@pytest.mark.parametrize("suffix", ["png", "webp", "tif", "jpg"])
@pytest.mark.parametrize("orientation", STORED)
def test_orientation_is_applied_to_pixels_and_headers(tmp_path, orientation, suffix):
    big = np.kron(STORED[orientation], np.ones((8, 8, 1), np.uint8))  # 16 x 24 pixels, seen upright
    options = {"lossless": True} if suffix == "webp" else {"quality": 95} if suffix == "jpg" else {}
    path = save(tmp_path / f"a.{suffix}", big, exif=oriented(orientation), **options)
    assert np.abs(loaded(path)[4::8, 4::8].astype(int) - SEEN).max() <= (3 if suffix == "jpg" else 0)
    assert check_headers([path], SizePolicy()) == [I.Header((16, 24), jpeg=suffix == "jpg")]


def test_exif_of_16_bits_and_damaged(tmp_path):
    deep = STORED[6][..., 0].astype(np.uint16) * 257
    for name in ("a.png", "a.tif"):
        assert np.array_equal(loaded(save(tmp_path / name, deep, exif=oriented(6))), SEEN), name
    path = save(tmp_path / "c.png", random_rgb(), exif=b"Exif\0\0nonsense")
    assert np.array_equal(loaded(path), random_rgb())
    assert check_headers([path], SizePolicy()) == [I.Header((16, 16))]


def encoded(form, pixels=None, **options):
    stream = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(random_rgb(64, 64))
    image.save(stream, form, **options)
    return stream.getvalue()


@pytest.fixture
def bad(tmp_path):
    """{path: a part of the reason} of files of all kinds that cannot be read."""
    folder = tmp_path / "bad"
    folder.mkdir()
    for form in ("png", "jpeg", "webp", "bmp", "tiff", "gif"):
        data = encoded(form)
        (folder / f"half.{form}").write_bytes(data[: len(data) // 2])
        (folder / f"start.{form}").write_bytes(data[:6])
    (folder / "text.png").write_text("not an image\n")
    (folder / "script.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")
    (folder / "folder.png").mkdir()
    (folder / "link.png").symlink_to(folder / "nothing")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "bomb.png").write_bytes(png(png_header(20000, 20000, 8, 0), (b"IDAT", b"")))  # 400 megapixels
    for name in ("zero.png", "new\nline.png", "grüße.png"):
        (folder / name).touch()
    known = {
        "text.png": "is no image", "script.png": "is no image", "folder.png": "is a folder", "link.png": "No such file",
        "loop.png": "cannot be opened", "pipe.png": "device or pipe", "bomb.png": "decompression bomb",
        "zero.png": "is empty", "new\nline.png": "is empty", "grüße.png": "is empty",
    }  # fmt: skip
    return {str(folder / name): known.get(name, "") for name in os.listdir(folder)}


@pytest.mark.filterwarnings("ignore")  # pytest shows what data.images silences
def test_every_bad_file_is_found_by_reading_and_no_file_stays_open(tmp_path, bad):
    """By its header, too, unless the damage is behind that."""
    assert len(bad) == 22
    good = [save(tmp_path / f"good.{s}", random_rgb(8, 12)) for s in ("png", "jpg", "webp", "bmp", "tif", "gif")]
    opened = len(os.listdir("/dev/fd"))
    for path, part in bad.items():
        with mistake(printable(path) + ": ", part):
            load_image(path)
    headers = dict(zip(bad, check_headers([*bad, *good], SizePolicy()), strict=False))
    assert len(os.listdir("/dev/fd")) == opened
    problems = {path: h.problem for path, h in headers.items() if h.problem}
    assert {os.path.basename(path).split(".")[0] for path in set(bad) - set(problems)} <= {"half"}
    assert all(bad[path] in text and text.isprintable() and path not in text for path, text in problems.items())
    assert {(h.size, h.problem) for h in check_headers(good, SizePolicy())} == {((8, 12), None)} and check_headers(
        [], SizePolicy()
    ) == []


def encodings():
    """The bytes of a small picture in each format, and in the forms of it that take other ways through the code."""
    rgb, exif = Image.fromarray(random_rgb()), oriented(6)
    deep = Image.fromarray(random_rgb()[..., 0].astype(np.uint16) * 257)
    yield from (encoded("png", rgb, exif=exif), encoded("png", rgb.convert("P"), transparency=3))
    yield from (encoded("png", deep, exif=exif), encoded("jpeg", rgb, exif=exif), encoded("jpeg", rgb.convert("CMYK")))
    yield from (encoded("jpeg", rgb, progressive=True), encoded("webp", rgb), encoded("webp", rgb, lossless=True))
    yield from (encoded("bmp", rgb), encoded("tiff", rgb, exif=exif), encoded("tiff", rgb, compression="tiff_lzw"))
    yield encoded("gif", rgb, save_all=True, append_images=[rgb.rotate(90)])


def mutated(data, rng):
    """A few bytes changed, half the time among the first 64; sometimes bytes put in, or the end cut off."""
    data = np.frombuffer(data, np.uint8).copy()
    positions = rng.integers(len(data) if rng.random() < 0.5 else 64, size=rng.integers(1, 6))
    data[positions] = rng.integers(256, size=len(positions))
    if rng.random() < 0.1:
        data = np.insert(data, len(data) // 2, rng.integers(256, size=20))
    return data[: rng.integers(1, len(data)) if rng.random() < 0.2 else None].tobytes()


@pytest.mark.filterwarnings("ignore")
def test_mutated_files_give_an_image_or_one_line(tmp_path):
    """3000 of them: no crash, no file that takes for ever, none refused by its header that can be read."""
    rng, outcomes, slowest = np.random.default_rng(0), {True: 0, False: 0}, 0.0
    for form, data in enumerate(encodings()):
        paths = [str(tmp_path / f"{form} {i}.png") for i in range(250)]
        for path in paths:
            with open(path, "wb") as file:
                file.write(mutated(data, rng))
        headers = zip(paths, check_headers(paths, SizePolicy()), strict=True)
        refused = {path: header.problem for path, header in headers if header.problem}
        for path in paths:
            began, error = time.monotonic(), None
            try:
                resize_and_crop(load_image(path), SizePolicy())
            except UserError as caught:
                error = str(caught)
            slowest = max(slowest, time.monotonic() - began)
            outcomes[error is None] += 1
            assert error is None or error.isprintable()
            assert path not in refused or (error and refused[path].isprintable())
    assert min(outcomes.values()) > 500 and slowest < 5


def coordinates(height, width):
    """An image whose first two channels are the row and column of each pixel."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([rows, columns, rows * 0]).to(torch.uint8)


def corner(image):
    return image[:2, 0, 0].tolist()


def test_crop_in_the_centre_and_at_random_to_multiples_of_the_scale():
    image = resize_and_crop(coordinates(11, 16), SizePolicy(scale=4))
    assert image.shape == (3, 8, 16) and corner(image) == [1, 0] and image.is_contiguous()
    assert torch.equal(resize_and_crop(coordinates(8, 12), SizePolicy(scale=4)), coordinates(8, 12))
    image = coordinates(20, 30)
    assert corner(resize_and_crop(image, SizePolicy(4, 8))) == [6, 11]
    assert corner(resize_and_crop(image, SizePolicy(4, 10))) == [5 + 1, 10 + 1]  # 10 x 10, then its centre 8 x 8
    rng = np.random.default_rng(0)
    corners = [corner(resize_and_crop(image, SizePolicy(4, 8), rng)) for _ in range(400)]
    assert {r for r, _ in corners} == set(range(13)) and {c for _, c in corners} == set(range(23))


def test_resize_keeps_the_aspect_and_antialiases():
    policy = SizePolicy(scale=1, resize=20)
    assert resize_and_crop(coordinates(40, 70), policy).shape == (3, 20, 35)
    assert resize_and_crop(coordinates(10, 15), policy).shape == (3, 20, 30)
    checkers = (coordinates(80, 80)[0] + coordinates(80, 80)[1]) % 2 * 255  # without antialiasing all 0 or 255
    small = resize_and_crop(checkers.expand(3, -1, -1).contiguous(), policy)
    assert small.dtype == torch.uint8 and (small[:, 4:-4, 4:-4].int() - 127).abs().max() <= 2
    assert torch.equal(resize_and_crop(coordinates(20, 24), policy), coordinates(20, 24))


@pytest.mark.parametrize("policy", [SizePolicy(), SizePolicy(3, None, 37), SizePolicy(4, 30), SizePolicy(4, 32, 40)])
@pytest.mark.parametrize("size", [(64, 64), (65, 127), (201, 50)])
def test_sizes_are_foretold(size, policy):
    image = resize_and_crop(torch.zeros(3, *size, dtype=torch.uint8), policy)
    assert I.size_after(*size, policy) == tuple(image.shape[-2:])


@pytest.mark.parametrize(
    "size, policy, words",
    [
        ((1000, 3), SizePolicy(4), ["3 x 1000 pixels", "at least 4"]),
        ((63, 100), SizePolicy(4, 64), ["100 x 63 pixels", "64 x 64", "--crop-size"]),
        ((63, 100), SizePolicy(4, 64, 32), ["100 x 63 pixels", "50 x 32 when resized"]),
        ((63, 100), SizePolicy(4, 3), ["at least 4"]),
        ((1, 100_000), SizePolicy(4, None, 256), ["25600000 x 256", "more than 178956970", "--resize"]),
    ],
)
def test_sizes_that_cannot_be_used(size, policy, words):
    with mistake(*words):
        resize_and_crop(torch.zeros(3, *size, dtype=torch.uint8), policy)


@pytest.fixture
def items(tmp_path):
    """Of 16 x 16, 17 x 16, 16 x 18 pixels (height x width), one that is too small and one that is empty."""
    sizes = ((16, 16), (17, 16), (16, 18), (2, 16))
    paths = [save(tmp_path / f"{h}x{w}.png", random_rgb(h, w)) for h, w in sizes] + [str(tmp_path / "zero.png")]
    (tmp_path / "zero.png").touch()
    return [Item(path, REAL, "") for path in paths]


def test_usable_items(items, caplog):
    caplog.set_level(logging.INFO)
    sizes = [(16, 16), (17, 16), (16, 18)]
    with mistake("2 of 5", "--skip-bad", "2x16.png: is 16 x 2"):
        I.usable_items(items, SizePolicy(4))
    caplog.clear()
    assert I.usable_items(items, SizePolicy(4), skip_bad=True) == (items[:3], [I.Header(s) for s in sizes])
    for words in (items[3].path, "16 x 2"), (items[4].path, "is empty"), ("2 of 5",), ("2 of 3", "multiple of 4"):
        assert any(all(word in message for word in words) for message in caplog.messages), words
    with mistake("2 of 2"):
        I.usable_items(items[3:], SizePolicy(4), skip_bad=True)
    assert I.usable_items([], SizePolicy()) == ([], [])
    I.refuse_mixed_sizes(items[:2], [sizes[0]] * 2)
    with mistake(f"{items[0].path} is 16 x 16", f"{items[2].path} is 18 x 16", "--crop-size", "--batch-size 1"):
        I.refuse_mixed_sizes(items[:3], [sizes[0], sizes[0], sizes[2]])
