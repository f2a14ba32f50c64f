"""Tests of data.images, which decodes, resizes and crops images, and refuses unusable images."""

import io
import logging
import os
import struct
import time
import zlib

import numpy as np
import pytest
import torch
from files import expect_user_error, random_rgb_pixels, save_image
from PIL import Image

from data.folders import HAS_AVIF
from data.images import (
    Header,
    SizePolicy,
    compute_size_after_resize_and_crop,
    read_and_check_headers,
    read_image_as_tensor,
    require_equal_sizes,
    resize_and_crop,
    select_usable_images,
)
from data.lists import Item
from evaluation.inputs import decode_image_with_pillow
from utils.console import make_printable
from utils.errors import UserError
from utils.labels import REAL

ORIENTATION = 0x0112  # EXIF tag of the orientation


def load_pixels(path):
    """Return the pixels that read_image_as_tensor reads from a file, as a NumPy array (H, W, 3)."""
    image = read_image_as_tensor(path)
    assert image.dtype == torch.uint8 and image.is_contiguous() and image.shape[0] == 3
    return image.permute(1, 2, 0).numpy()


def exif_with_orientation(orientation):
    """Return EXIF data with the given orientation (1 to 8)."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def png_bytes(*chunks):
    """Return the bytes of a PNG file with the given chunks, which are pairs (name, content)."""
    parts = [struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + bytes(4) + b"IEND\xaeB`\x82"


def png_header_chunk(width, height, depth, colour, interlaced=0):
    """Return the name and the content of the IHDR chunk, which is the header of a PNG file."""
    return b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)


def png_pixel_chunk(content):
    """Return the name and the content of the IDAT chunk, which contains the compressed pixels of a PNG file."""
    return b"IDAT", zlib.compress(content)


def encode_image(form, image=None, **options):
    """Return the bytes of an image file in the given format, by default with 64 x 64 random pixels."""
    stream = io.BytesIO()
    if image is None:
        image = Image.fromarray(random_rgb_pixels(64, 64))
    image.save(stream, form, **options)
    return stream.getvalue()


# --- pixels -------------------------------------------------------------------------------------------------

RAMP = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
BITS = np.array([[True, False], [False, True]])
DEEP = np.array([[0, 128, 129, 257, 1000, 32896, 65535]], np.uint16)
DEEP_RESULT = np.array([[0, 0, 1, 1, 4, 128, 255]])[..., None]
BIG_ENDIAN = Image.frombytes("I;16B", (7, 1), DEEP.astype(">u2").tobytes())
FLOATS = np.array([[0.0, 0.25, 1.0]], np.float32)
RED, GREEN, BLUE, WHITE = [255, 0, 0], [0, 255, 0], [0, 0, 255], [255] * 3
PALETTE = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
PALETTE.putpalette(RED + GREEN + BLUE)
ALPHA = np.array([[[200, 100, 50, 255], [200, 100, 50, 0], [200, 100, 50, 51]]], np.uint8)
ALPHA_RESULT = [[[200, 100, 50], WHITE, [244, 224, 214]]]  # RGB values of ALPHA on a white background; 51/255 is 1/5
GREY_ALPHA = Image.fromarray(np.array([[[10, 255], [10, 0]]], np.uint8), "LA")
CYAN = Image.new("CMYK", (8, 8), (255, 0, 0, 0))


@pytest.mark.parametrize(
    "name, image, options, expected, tolerance",
    [
        ("rgb.png", random_rgb_pixels(5, 7), {}, random_rgb_pixels(5, 7), 0),
        ("rgb.bmp", random_rgb_pixels(5, 7), {}, random_rgb_pixels(5, 7), 0),
        ("rgb.tif", random_rgb_pixels(5, 7), {}, random_rgb_pixels(5, 7), 0),
        ("rgb.webp", random_rgb_pixels(5, 7), {"lossless": True}, random_rgb_pixels(5, 7), 0),
        ("jpeg.jfif", np.full((8, 8, 3), 100, np.uint8), {"format": "JPEG"}, np.full((8, 8, 3), 100), 1),
        ("palette.gif", PALETTE, {}, [[RED, GREEN, BLUE]], 0),
        ("grey.png", RAMP, {}, RAMP[..., None], 0),
        ("bits.png", BITS, {}, BITS[..., None] * np.uint8(255), 0),
        ("palette.png", PALETTE, {}, [[RED, GREEN, BLUE]], 0),
        ("one transparent colour.png", PALETTE, {"transparency": 1}, [[RED, WHITE, BLUE]], 0),
        ("transparency table.png", PALETTE, {"transparency": bytes([0, 255, 255])}, [[WHITE, GREEN, BLUE]], 0),
        ("alpha.png", ALPHA, {}, ALPHA_RESULT, 1),
        ("grey and alpha.png", GREY_ALPHA, {}, [[[10] * 3, WHITE]], 1),
        ("cmyk.tif", CYAN, {}, [[[0, 255, 255]]], 2),
        ("cmyk.jpg", CYAN, {}, [[[0, 255, 255]]], 2),
        ("16 bits.png", DEEP, {}, DEEP_RESULT, 0),
        ("16 bits.tif", DEEP, {}, DEEP_RESULT, 0),
        ("32 bits.tif", DEEP.astype(np.int32), {}, DEEP_RESULT, 0),
        ("big endian.tif", BIG_ENDIAN, {}, DEEP_RESULT, 0),
        ("floats.tif", FLOATS, {}, np.array([[0, 64, 255]])[..., None], 0),
    ],
)
def test_images_of_every_colour_mode_are_decoded_to_rgb(tmp_path, name, image, options, expected, tolerance):
    pixels = load_pixels(save_image(tmp_path / name, image, **options))
    assert np.abs(pixels.astype(int) - expected).max() <= tolerance


@pytest.mark.skipif(not HAS_AVIF, reason="this Pillow reads no AVIF")
def test_an_avif_image_is_decoded(tmp_path):
    path = save_image(tmp_path / "a.avif", np.full((16, 16, 3), 100, np.uint8))
    assert np.abs(load_pixels(path).astype(int) - 100).max() <= 2
    assert read_and_check_headers([path], SizePolicy()) == [Header((16, 16))]


def test_a_tiff_image_with_12_bits_is_decoded(tmp_path):
    data = bytes([0xFF, 0xF0, 0x00, 0x80, 0x00, 0x00])  # two rows of two 12-bit pixels: (4095, 0) and (2048, 0)
    tags = [(256, 2), (257, 2), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 2), (279, len(data))]
    directory = b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in tags)
    header = b"II*\0" + struct.pack("<I", 8 + len(data)) + data
    (tmp_path / "a.tif").write_bytes(header + struct.pack("<H", len(tags)) + directory + bytes(4))
    expected = [[[255] * 3, [0] * 3], [[128] * 3, [0] * 3]]
    assert load_pixels(tmp_path / "a.tif").tolist() == expected
    with open(tmp_path / "a.tif", "rb") as file:
        assert decode_image_with_pillow(file).permute(1, 2, 0).tolist() == expected


@pytest.mark.parametrize(
    "chunks, expected",
    [
        (  # a colour image with 16 bits per channel
            [
                png_header_chunk(2, 1, 16, 2),
                png_pixel_chunk(b"\0" + struct.pack(">6H", 0, 257 * 100, 65535, 257 * 7, 257, 0)),
            ],
            [[[0, 100, 255], [7, 1, 0]]],
        ),
        (  # an interlaced PNG of 2 x 2 pixels stores the first pixel, then the second pixel, then the second row
            [png_header_chunk(2, 2, 8, 0, 1), png_pixel_chunk(b"\0\x0a" + b"\0\x14" + b"\0\x1e\x28")],
            [[[10] * 3, [20] * 3], [[30] * 3, [40] * 3]],
        ),
        (  # an image whose EXIF chunk follows the pixel chunk
            [
                png_header_chunk(2, 1, 8, 0),
                png_pixel_chunk(b"\0\x0a\x14"),
                (b"eXIf", exif_with_orientation(6).tobytes()[6:]),
            ],
            [[[10] * 3], [[20] * 3]],
        ),
    ],
)
def test_png_files_that_pillow_cannot_write_are_decoded(tmp_path, chunks, expected):
    (tmp_path / "a.png").write_bytes(png_bytes(*chunks))
    assert load_pixels(tmp_path / "a.png").tolist() == expected


@pytest.mark.parametrize("value", [-0.1, 1.5, np.nan])
def test_an_image_with_float_values_outside_0_to_1_is_refused(tmp_path, value):
    with expect_user_error("b.tif: has values", "expected 0 to 1"):
        read_image_as_tensor(save_image(tmp_path / "b.tif", np.array([[0.0, value]], np.float32)))


@pytest.mark.parametrize("value", [-3, 70000])
def test_an_image_with_integer_values_outside_16_bits_is_refused(tmp_path, value):
    with expect_user_error("b.tif: has values", "expected 0 to 65535"):
        read_image_as_tensor(save_image(tmp_path / "b.tif", np.array([[0, value]], np.int32)))


# If a file contains the pixels STORED[k] and the EXIF orientation k, a viewer shows the pixels of UPRIGHT
UPRIGHT = np.repeat(np.arange(6, dtype=np.uint8).reshape(2, 3, 1) * 40, 3, axis=-1)
STORED = {
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.transpose(1, 0, 2),
    6: np.rot90(UPRIGHT, 1),  # a viewer turns these pixels by 90 degrees clockwise
    7: UPRIGHT[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(UPRIGHT, -1),
}


@pytest.mark.parametrize("suffix, options", [("png", {}), ("webp", {"lossless": True}), ("tif", {}), ("jpg", {})])
@pytest.mark.parametrize("orientation", STORED)
def test_the_exif_orientation_is_applied_to_the_pixels_and_to_the_size_in_the_header(
    tmp_path, orientation, suffix, options
):
    stored = np.kron(STORED[orientation], np.ones((8, 8, 1), np.uint8))  # the upright image has 16 rows and 24 columns
    path = save_image(tmp_path / f"a.{suffix}", stored, exif=exif_with_orientation(orientation), **options)
    centres = load_pixels(path)[4::8, 4::8].astype(int)
    assert np.abs(centres - UPRIGHT).max() <= (3 if suffix == "jpg" else 0)
    assert read_and_check_headers([path], SizePolicy()) == [Header((16, 24), jpeg=suffix == "jpg")]


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_the_exif_orientation_is_applied_to_16_bit_images(tmp_path, name):
    deep = STORED[6][..., 0].astype(np.uint16) * 257
    assert np.array_equal(load_pixels(save_image(tmp_path / name, deep, exif=exif_with_orientation(6))), UPRIGHT)


def test_an_image_with_damaged_exif_is_decoded_without_turning(tmp_path):
    path = save_image(tmp_path / "c.png", random_rgb_pixels(), exif=b"Exif\0\0nonsense")
    assert np.array_equal(load_pixels(path), random_rgb_pixels())
    assert read_and_check_headers([path], SizePolicy()) == [Header((16, 16))]


# --- bad files ----------------------------------------------------------------------------------------------

BAD_FILES = {  # file name -> words in the expected error message
    "text.png": "is not an image",
    "script.png": "is not an image",
    "folder.png": "is a folder",
    "link.png": "No such file",
    "loop.png": "cannot be opened",
    "pipe.png": "device or pipe",
    "bomb.png": "decompression bomb",
    "zero.png": "is empty",
    "new\nline.png": "is empty",
    "grüße.png": "is empty",
}


@pytest.fixture
def folder_of_unreadable_image_files(tmp_path):
    """Return a folder with the unreadable files of BAD_FILES, and with two truncated images in each of six formats."""
    folder = tmp_path / "bad"
    folder.mkdir()
    for form in ("png", "jpeg", "webp", "bmp", "tiff", "gif"):
        data = encode_image(form)
        (folder / f"half.{form}").write_bytes(data[: len(data) // 2])
        (folder / f"start.{form}").write_bytes(data[:6])
    (folder / "text.png").write_text("not an image\n")
    (folder / "script.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")
    (folder / "folder.png").mkdir()
    (folder / "link.png").symlink_to(folder / "nothing")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "bomb.png").write_bytes(png_bytes(png_header_chunk(20000, 20000, 8, 0), (b"IDAT", b"")))  # 400 megapixels
    for name in ("zero.png", "new\nline.png", "grüße.png"):
        (folder / name).touch()
    return folder


@pytest.mark.filterwarnings("ignore")  # data.images hides warnings of Pillow, but pytest would show them
def test_every_unreadable_file_gives_a_one_line_error_and_is_closed(folder_of_unreadable_image_files):
    open_files = len(os.listdir("/dev/fd"))
    names = os.listdir(folder_of_unreadable_image_files)
    assert len(names) == 22
    for name in names:
        path = str(folder_of_unreadable_image_files / name)
        with expect_user_error(make_printable(path) + ": ", BAD_FILES.get(name, "")):
            read_image_as_tensor(path)
    assert len(os.listdir("/dev/fd")) == open_files


@pytest.mark.filterwarnings("ignore")
def test_check_headers_finds_every_unreadable_file_whose_header_is_damaged(tmp_path, folder_of_unreadable_image_files):
    bad = [str(folder_of_unreadable_image_files / name) for name in os.listdir(folder_of_unreadable_image_files)]
    good = [
        save_image(tmp_path / f"good.{s}", random_rgb_pixels(8, 12))
        for s in ("png", "jpg", "webp", "bmp", "tif", "gif")
    ]
    headers = dict(zip([*bad, *good], read_and_check_headers([*bad, *good], SizePolicy()), strict=True))
    for path in bad:
        name, problem = os.path.basename(path), headers[path].problem
        if problem is None:
            assert name.startswith("half.")
        else:
            assert BAD_FILES.get(name, "") in problem and problem.isprintable() and path not in problem
    assert {(headers[path].size, headers[path].problem) for path in good} == {((8, 12), None)}
    assert read_and_check_headers([], SizePolicy()) == []


def encode_images_in_six_formats():
    """Return the bytes of twelve small image files in six formats."""
    rgb, exif = Image.fromarray(random_rgb_pixels()), exif_with_orientation(6)
    deep = Image.fromarray(random_rgb_pixels()[..., 0].astype(np.uint16) * 257)
    return [
        encode_image("png", rgb, exif=exif),
        encode_image("png", rgb.convert("P"), transparency=3),
        encode_image("png", deep, exif=exif),
        encode_image("jpeg", rgb, exif=exif),
        encode_image("jpeg", rgb.convert("CMYK")),
        encode_image("jpeg", rgb, progressive=True),
        encode_image("webp", rgb),
        encode_image("webp", rgb, lossless=True),
        encode_image("bmp", rgb),
        encode_image("tiff", rgb, exif=exif),
        encode_image("tiff", rgb, compression="tiff_lzw"),
        encode_image("gif", rgb, save_all=True, append_images=[rgb.rotate(90)]),
    ]


def damage_random_bytes(data, rng):
    """Change, insert and remove random bytes of an image file, and return the damaged file as bytes."""
    data = np.frombuffer(data, np.uint8).copy()
    positions = rng.integers(len(data) if rng.random() < 0.5 else 64, size=rng.integers(1, 6))
    data[positions] = rng.integers(256, size=len(positions))
    if rng.random() < 0.1:
        data = np.insert(data, len(data) // 2, rng.integers(256, size=20))
    if rng.random() < 0.2:
        data = data[: rng.integers(1, len(data))]
    return data.tobytes()


@pytest.mark.filterwarnings("ignore")
def test_3000_image_files_with_random_damage_give_an_image_or_a_one_line_error(tmp_path):
    rng, slowest, readable, unreadable = np.random.default_rng(0), 0.0, 0, 0
    for form, data in enumerate(encode_images_in_six_formats()):
        paths = [str(tmp_path / f"{form} {i}.png") for i in range(250)]
        for path in paths:
            with open(path, "wb") as file:
                file.write(damage_random_bytes(data, rng))
        for path, header in zip(paths, read_and_check_headers(paths, SizePolicy()), strict=True):
            start = time.monotonic()
            try:
                resize_and_crop(read_image_as_tensor(path), SizePolicy())
                readable += 1
                assert header.problem is None  # read_and_check_headers must not refuse a file that can be decoded
            except UserError as error:
                unreadable += 1
                assert str(error).isprintable()
                assert header.problem is None or header.problem.isprintable()
            slowest = max(slowest, time.monotonic() - start)
    assert min(readable, unreadable) > 500 and slowest < 5


# --- sizes --------------------------------------------------------------------------------------------------


def make_coordinate_image_tensor(height, width):
    """Return an image, uint8 (3, H, W), whose first two channels are the row and the column of each pixel."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([rows, columns, rows * 0]).to(torch.uint8)


def locate_crop(image):
    """Return the row and the column of a crop's top left corner in the image."""
    return image[:2, 0, 0].tolist()


def test_images_are_cropped_in_the_centre_to_multiples_of_the_scale():
    image = resize_and_crop(make_coordinate_image_tensor(11, 16), SizePolicy(scale=4))
    assert image.shape == (3, 8, 16) and locate_crop(image) == [1, 0] and image.is_contiguous()
    assert torch.equal(
        resize_and_crop(make_coordinate_image_tensor(8, 12), SizePolicy(scale=4)), make_coordinate_image_tensor(8, 12)
    )


def test_a_crop_is_in_the_centre_or_at_a_random_position_if_a_generator_is_given():
    image = make_coordinate_image_tensor(20, 30)
    assert locate_crop(resize_and_crop(image, SizePolicy(4, 8))) == [6, 11]
    # The sides of a crop must be multiples of the scale 4, so the crop has 8 x 8 pixels, not 10 x 10
    assert locate_crop(resize_and_crop(image, SizePolicy(4, 10))) == [5 + 1, 10 + 1]
    rng = np.random.default_rng(0)
    corners = [locate_crop(resize_and_crop(image, SizePolicy(4, 8), rng)) for _ in range(400)]
    assert {row for row, _ in corners} == set(range(13))
    assert {column for _, column in corners} == set(range(23))


def test_resizing_keeps_the_aspect_ratio_and_applies_antialiasing():
    policy = SizePolicy(scale=1, resize=20)
    assert resize_and_crop(make_coordinate_image_tensor(40, 70), policy).shape == (3, 20, 35)
    assert resize_and_crop(make_coordinate_image_tensor(10, 15), policy).shape == (3, 20, 30)
    assert torch.equal(
        resize_and_crop(make_coordinate_image_tensor(20, 24), policy), make_coordinate_image_tensor(20, 24)
    )
    # Without antialiasing, all pixels of the resized chequered image would be 0 or 255
    checkers = make_coordinate_image_tensor(60, 60).sum(dim=0) % 2 * 255
    small = resize_and_crop(checkers.to(torch.uint8).expand(3, -1, -1).contiguous(), policy)
    assert small.dtype == torch.uint8 and (small[:, 4:-4, 4:-4].int() - 127).abs().max() <= 2


@pytest.mark.parametrize("policy", [SizePolicy(), SizePolicy(3, None, 37), SizePolicy(4, 30), SizePolicy(4, 32, 40)])
@pytest.mark.parametrize("size", [(64, 64), (65, 127), (201, 50)])
def test_compute_final_size_predicts_the_size_after_resizing_and_cropping(size, policy):
    image = resize_and_crop(torch.zeros(3, *size, dtype=torch.uint8), policy)
    assert compute_size_after_resize_and_crop(*size, policy) == tuple(image.shape[-2:])


@pytest.mark.parametrize(
    "size, policy, words",
    [
        ((1000, 3), SizePolicy(4), ["3 x 1000 pixels", "at least 4"]),
        ((63, 100), SizePolicy(4, 64), ["100 x 63 pixels", "64 x 64", "--crop-size"]),
        ((63, 100), SizePolicy(4, 64, 32), ["100 x 63 pixels", "50 x 32 when resized"]),
        ((12, 12), SizePolicy(4, min_side=16), ["12 x 12 pixels", "at least 16", "--idx-stages"]),
        # With scale 5, the image would be cut to 15 x 15 pixels, which is less than the `min_side` of 16
        ((19, 17), SizePolicy(5, min_side=16), ["17 x 19 pixels", "at least 16"]),
        ((1, 100_000), SizePolicy(4, None, 256), ["25600000 x 256", "more than 178956970", "--resize"]),
    ],
)
def test_images_that_are_too_small_or_too_large_are_refused(size, policy, words):
    with expect_user_error(*words):
        resize_and_crop(torch.zeros(3, *size, dtype=torch.uint8), policy)


def test_images_of_the_smallest_allowed_size_are_accepted():
    assert resize_and_crop(make_coordinate_image_tensor(18, 16), SizePolicy(4, min_side=16)).shape == (3, 16, 16)


def test_images_of_different_sizes_are_refused_for_training_on_whole_images(tmp_path):
    items = [Item(name, REAL, "") for name in ("a.png", "b.png", "c.png")]
    require_equal_sizes(items[:2], [(16, 16), (16, 16)])
    with expect_user_error("a.png has 16 x 16", "c.png has 18 x 16", "--crop-size", "--batch-size 1"):
        require_equal_sizes(items, [(16, 16), (16, 16), (16, 18)])


# --- choosing usable images ---------------------------------------------------------------------------------


@pytest.fixture
def usable_and_unusable_image_items(tmp_path):
    """Return five `Item` objects: for three usable images, for an image that is too small, and for an empty file."""
    sizes = ((16, 16), (17, 16), (16, 18), (2, 16))  # (height, width) in pixels
    paths = [
        save_image(tmp_path / f"{height}x{width}.png", random_rgb_pixels(height, width)) for height, width in sizes
    ]
    (tmp_path / "zero.png").touch()
    return [Item(path, REAL, "") for path in [*paths, str(tmp_path / "zero.png")]]


def test_without_skip_bad_a_list_with_unusable_images_is_refused(usable_and_unusable_image_items):
    with expect_user_error("2 of 5", "--skip-bad", "2x16.png: is 16 x 2"):
        select_usable_images(usable_and_unusable_image_items, SizePolicy(4))


def test_with_skip_bad_unusable_images_are_left_out_and_named(usable_and_unusable_image_items, caplog):
    caplog.set_level(logging.INFO)
    items, headers = select_usable_images(usable_and_unusable_image_items, SizePolicy(4), skip_bad=True)
    assert items == usable_and_unusable_image_items[:3] and headers == [
        Header((16, 16)),
        Header((17, 16)),
        Header((16, 18)),
    ]
    expected = [
        ["left out", usable_and_unusable_image_items[3].path, "16 x 2"],
        ["left out", usable_and_unusable_image_items[4].path, "is empty"],
        ["left out 2 of 5 images, because they cannot be used"],
        ["2 of 3", "not multiples of 4"],
    ]
    assert len(caplog.messages) == len(expected)
    for message, words in zip(caplog.messages, expected, strict=True):
        assert all(word in message for word in words)


def test_with_skip_bad_images_smaller_than_the_stride_of_the_features_are_left_out(usable_and_unusable_image_items):
    items, _ = select_usable_images(usable_and_unusable_image_items[:3], SizePolicy(4, min_side=16), skip_bad=True)
    assert items == usable_and_unusable_image_items[:3]
    with expect_user_error("3 of 3", "at least 32"):
        select_usable_images(usable_and_unusable_image_items[:3], SizePolicy(4, min_side=32), skip_bad=True)


def test_with_skip_bad_a_list_without_usable_images_is_refused(usable_and_unusable_image_items):
    with expect_user_error("2 of 2"):
        select_usable_images(usable_and_unusable_image_items[3:], SizePolicy(4), skip_bad=True)
    assert select_usable_images([], SizePolicy()) == ([], [])


@pytest.mark.parametrize("policy", [SizePolicy(4, crop_size=2), SizePolicy(4, crop_size=10, min_side=16)])
def test_a_crop_size_that_is_too_small_for_the_networks_is_refused_in_one_error(policy, tmp_path):
    with expect_user_error(f"--crop-size {policy.crop_size}", "too small"):
        select_usable_images([Item(str(tmp_path / "missing.png"), None, "")], policy)
