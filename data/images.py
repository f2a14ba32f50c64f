"""The one place that sees 0..255: files -> uint8 (3, H, W) RGB -> float in [0, 1]; and the lists of files.

In this order: which files there are (`find_images`, `folder_items`, ...), what their headers say
(`check_headers`, before any model is built), their pixels (`load_image`), sizes (`fit_size`) and batches
(`ImageDataset`). Whatever is wrong with a file is a `DataError` of one line.
"""

import csv
import logging
import os
import stat
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

logger = logging.getLogger(__name__)

# What Pillow warns of is in our errors where it matters. (Not catch_warnings: threads would share it.)
warnings.filterwarnings("ignore", module=r"PIL\.")

FAKE, REAL = 0, 1  # columns of the logits. Release: real is 1; most of the field calls fake 1.
LABEL_NAMES = ("fake", "real")
LABELS = {"fake": FAKE, "real": REAL, "0": FAKE, "1": REAL}
UNLABELLED = -1  # in Batch.labels

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
# No others: Pillow runs Ghostscript on EPS, for one.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
MAX_PIXELS = 2 * Image.MAX_IMAGE_PIXELS  # 179 million: Pillow's limit against decompression bombs
HEADER_THREADS = 16  # headers wait for the disk or the network, hardly for the processor

# EXIF orientation -> how to turn the picture upright (EXIF 2.3, tag 0x0112)
ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)

# TIFF 6.0 tags
TIFF_WIDTH, TIFF_HEIGHT, TIFF_BITS = 256, 257, 258
TIFF_STRIPS, TIFF_TILES = (273, 279), (324, 325)  # offsets, byte counts


class DataError(ValueError):
    """A file, folder or list that cannot be used: one line: what was got, what was wanted, the way out."""


class Item(NamedTuple):
    """An image to read. label: FAKE, REAL or None; generator: what made it, "" for reals shared by all."""

    path: str
    label: int | None
    generator: str


class SizePolicy(NamedTuple):
    """How images are made alike, in this order: resize, crop, centre-crop to a multiple of `scale`."""

    scale: int = 4
    crop_size: int | None = None  # side of the square that is cut out, pixels
    resize: int | None = None  # length of the shorter side, pixels
    random_crop: bool = False  # the crop: anywhere (training) or the centre (tests)


class Sample(NamedTuple):
    """One item as read: `image` uint8 (3, H, W), or None and `error`, one line."""

    index: int
    path: str
    label: int
    image: Tensor | None
    error: str | None = None


class Batch(NamedTuple):
    """Images of one size. Those that could not be read are in `errors` (index -> one line) only."""

    images: Tensor  # uint8 (B, 3, H, W)
    labels: Tensor  # int64 (B,): FAKE, REAL or UNLABELLED
    indices: list[int]  # which items they are
    errors: dict[int, str]
    mismatch: str | None = None  # one line if the sizes differ; `images` is empty then


class Headers(NamedTuple):
    """What the headers of a list of files say."""

    sizes: list[tuple[int, int] | None]  # (height, width) of each file as it will be seen; None if unreadable
    problems: list[tuple[str, str]]  # (path, reason) of those that cannot be used


def shown(path: str) -> str:
    """The path for a message of one line: quoted and escaped if it holds newlines or the like."""
    return path if path.isprintable() else repr(path)


# --- which files --------------------------------------------------------------------------------------------


def find_images(root: str) -> list[str]:
    """All images in a folder and those below it, sorted by their path relative to it (plain string order).

    Known by suffix, in any case. Hidden files and folders and __MACOSX are left out. Links are followed; a
    folder that can be reached in several ways, or holds a link to its own parent, is read once.

    Raises:
        DataError: if `root` is missing, not a folder, cannot be read or holds no image.
    """
    root = os.fspath(root)
    if not os.path.isdir(root):
        what = "is a file; a folder was wanted" if os.path.exists(root) else "does not exist"
        raise DataError(f"image folder {shown(root)} {what}")
    found, others = [], Counter()
    for folder, names in _walk(root):
        below = os.path.relpath(folder, root)
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            if suffix in IMAGE_SUFFIXES:
                found.append(name if below == "." else os.path.join(below, name))
            else:
                others[suffix or "without suffix"] += 1
    if not found:
        instead = ", ".join(f"{n} {suffix}" for suffix, n in others.most_common(3))
        raise DataError(
            f"no images in folder {shown(root)}: files ending {' '.join(IMAGE_SUFFIXES)} are wanted, and it"
            f" holds {shown(instead) if others else 'no files'}"
        )
    return [os.path.join(root, name) for name in sorted(found)]


def _walk(root: str) -> Iterator[tuple[str, list[str]]]:
    """Each folder below `root`, once, with the names of its files, hidden ones left out."""

    def fail(error: OSError):
        raise DataError(f"image folder {shown(str(error.filename))} cannot be read ({error.strerror})")

    seen = set()
    for folder, folders, names in os.walk(root, onerror=fail, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__MACOSX")
        yield folder, [n for n in names if not n.startswith(".")]


def folder_items(real_roots: Sequence[str], fake_roots: Sequence[str]) -> list[Item]:
    """Images of some folders: the sorted reals, then the sorted fakes, each folder of fakes a generator.

    A generator is named after its folder, with as much of the path as tells it from the others.

    Raises:
        DataError: if there is no folder, one cannot be used (`find_images`), or one lies in another.
    """
    if not real_roots and not fake_roots:
        raise DataError("no image folders: give at least one of real or of generated images")
    _refuse_overlaps([*real_roots, *fake_roots])
    reals = [Item(path, REAL, "") for root in real_roots for path in find_images(root)]
    names = _unique_names(fake_roots)
    return reals + [
        Item(path, FAKE, name) for root, name in zip(fake_roots, names, strict=True) for path in find_images(root)
    ]


def _refuse_overlaps(roots: list[str]) -> None:
    """Raise if one of the folders is or lies in another: its images would count twice."""
    paths = [os.path.join(os.path.realpath(root), "") for root in roots]
    for i, inner in enumerate(paths):
        for j, outer in enumerate(paths):
            if i != j and inner.startswith(outer):
                raise DataError(
                    f"image folder {shown(roots[i])} is or lies in {shown(roots[j])}: its images would count"
                    " twice; give folders that share none"
                )


def _unique_names(roots: Sequence[str]) -> list[str]:
    """The last parts of each path, as few as tell all of them apart."""
    parts = [os.path.abspath(root).split(os.sep) for root in roots]
    for count in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return list(roots)


def tree_items(root: str) -> list[Item]:
    """Images of a tree of folders 0_real and 1_fake: the sorted reals, then the sorted fakes.

    GENERATOR/0_real, GENERATOR/CATEGORY/0_real, or 0_real at the top, which takes the name of `root`. Reals
    carry the name of the generator they are to be compared with.
    Source: the layout of Wang et al., "CNN-generated images are surprisingly easy to spot... for now" (CVPR
    2020).

    Raises:
        DataError: if there are no such folders, or one of them is empty.
    """
    if not os.path.isdir(root):
        raise DataError(f"image tree {shown(root)} {'is a file' if os.path.exists(root) else 'does not exist'}")
    folders = {"0_real": [], "1_fake": []}
    for folder, _ in _walk(root):
        if os.path.basename(folder) in folders:
            folders[os.path.basename(folder)].append(folder)
    if not folders["0_real"] and not folders["1_fake"]:
        raise DataError(
            f"image tree {shown(root)} holds no folder 0_real or 1_fake: GENERATOR/0_real and"
            " GENERATOR/1_fake are wanted; name plain folders with --data-root-pos and --data-root-neg"
        )

    def generator(folder: str) -> str:
        top = os.path.relpath(folder, root).split(os.sep)[0]
        return os.path.basename(os.path.abspath(root)) if top in folders else top

    return [
        Item(path, label, generator(folder))
        for label, name in ((REAL, "0_real"), (FAKE, "1_fake"))
        for folder in sorted(folders[name])
        for path in find_images(folder)
    ]


def csv_items(file: str) -> list[Item]:
    """Images of a table with the columns path, label (real or fake; 1 = real, 0 = fake) and perhaps
    generator.

    Paths are relative to the working folder or, where nothing is there, to the table's own. Other columns are
    ignored.

    Raises:
        DataError: with the line, for anything that is not so.
    """
    items, absent = [], []
    with _text_file(file, "image table") as stream:
        reader = csv.DictReader(stream, strict=True)
        columns = [name.strip().lower() for name in reader.fieldnames or []]
        if not {"path", "label"} <= set(columns):
            raise DataError(
                f"image table {shown(file)}, line 1: a header path,label or path,label,generator was wanted,"
                f" got {','.join(columns)[:100]!r}"
            )
        reader.fieldnames = columns
        for row in reader:
            item, line = (
                _csv_item(row, f"image table {shown(file)}, line {reader.line_num}", file),
                reader.line_num,
            )
            items.append(item)
            if not os.path.exists(item.path):
                absent.append(f"{shown(row['path'].strip())} in line {line}")
    _refuse_absent("image table", file, items, absent)
    return items


def _csv_item(row: dict[str, str | None], where: str, file: str) -> Item:
    path, label = (row["path"] or "").strip(), (row["label"] or "").strip()
    if None in row:  # DictReader's key for what is left over
        raise DataError(f"{where}: more fields than the header has; quote a path that holds a comma")
    if not path:
        raise DataError(f"{where}: there is no path")
    if label.lower() not in LABELS:
        raise DataError(f"{where}: label {label!r}; real or fake was wanted (or 1 for real, 0 for fake)")
    return Item(_resolve(path, file), LABELS[label.lower()], (row.get("generator") or "").strip())


def list_paths(file: str) -> list[str]:
    """The paths in a text file, one a line, relative to the working folder or, where nothing is there, the
    file's.

    Raises:
        DataError: if the file cannot be read or is empty, or some of the paths lead nowhere.
    """
    with _text_file(file, "image list") as stream:
        names = [line.strip() for line in stream if line.strip()]
    paths = [_resolve(name, file) for name in names]
    absent = [shown(name) for name, path in zip(names, paths, strict=True) if not os.path.exists(path)]
    _refuse_absent("image list", file, paths, absent)
    return paths


@contextmanager
def _text_file(file: str, what: str) -> Iterator:
    """The file, open for reading as UTF-8 (with or without a mark); its errors as a DataError."""
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:
            yield stream
    except OSError as error:
        raise DataError(f"{what} {shown(file)} cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, csv.Error) as error:
        reason = "is no UTF-8 text" if isinstance(error, UnicodeDecodeError) else f"cannot be read ({error})"
        raise DataError(f"{what} {shown(file)} {reason}") from None


def _resolve(path: str, file: str) -> str:
    """`path` from the working folder if there is such a file, else from the folder of `file`."""
    beside = os.path.join(os.path.dirname(file), path)  # `path` itself if it is absolute
    return beside if not os.path.exists(path) and os.path.exists(beside) else path


def _refuse_absent(what: str, file: str, entries: list, absent: list[str]) -> None:
    if not entries:
        raise DataError(f"{what} {shown(file)} names no images")
    if absent:
        raise DataError(
            f"{what} {shown(file)}: {len(absent)} of its {len(entries)} files do not exist, the first is"
            f" {absent[0]} (looked for in the working folder and beside the list)"
        )


def labelled_items(
    real_roots: Sequence[str] | None,
    fake_roots: Sequence[str] | None,
    tree: str | None = None,
    csv_file: str | None = None,
) -> list[Item]:
    """The items of whichever of the three ways to name labelled images was used: folders, a tree, or a CSV list.

    Raises:
        DataError: if none or several were, or one of the two classes is missing.
    """
    ways = [bool(real_roots or fake_roots), bool(tree), bool(csv_file)]
    if sum(ways) != 1:
        raise DataError(
            f"{'no images' if not any(ways) else 'images named in more than one way'}: give --data-root-pos REAL and"
            " --data-root-neg GENERATED folders, or --data-root TREE, or --csv FILE"
        )
    if tree:
        return tree_items(tree)
    if csv_file:
        return csv_items(csv_file)
    if not real_roots or not fake_roots:
        lacking = "--data-root-pos (real images)" if not real_roots else "--data-root-neg (generated images)"
        raise DataError(f"one class only: {lacking} is missing")
    return folder_items(real_roots, fake_roots)


def input_items(paths: Sequence[str]) -> list[Item]:
    """Unlabelled images: files of any name, and the images of folders, in the order given.

    Raises:
        DataError: if one does not exist, or a folder holds no images.
    """
    items = []
    for path in paths:
        if not os.path.lexists(path):
            raise DataError(f"input {shown(path)} does not exist")
        items += [Item(p, None, "") for p in (find_images(path) if os.path.isdir(path) else [os.fspath(path)])]
    if not items:
        raise DataError("no input: give at least one image or folder")
    return items


def paths_of(source: str) -> list[str]:
    """The images of a folder (`find_images`) or of a text list (`list_paths`)."""
    return find_images(source) if os.path.isdir(source) else list_paths(source)


# --- pixels -------------------------------------------------------------------------------------------------


def load_image(path: str) -> Tensor:
    """Decode an image file. Returns uint8 (3, H, W) RGB, contiguous. See `read_rgb`."""
    pixels = np.asarray(read_rgb(path))  # (H, W, 3)
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())  # (3, H, W)


def read_rgb(path: str) -> Image.Image:
    """Decode an image file as it is meant to be seen: upright, 8-bit RGB.

    Grey becomes three equal channels; what is transparent shows white; CMYK is converted without colour
    profiles; 16-bit grey becomes the nearest 8-bit (of 16-bit colour, Pillow drops the low byte); floats are
    taken as [0, 1]; of several frames the first counts. Files of more than MAX_PIXELS are refused undecoded.

    Raises:
        DataError: with path and reason, for whatever cannot be read.
    """
    with _image_file(path) as (_, image):
        image.load()
        turn = UPRIGHT.get(_orientation(image))
        rgb = _to_rgb(image)
        return rgb if turn is None else rgb.transpose(turn)


@contextmanager
def _image_file(path: str) -> Iterator[tuple[BinaryIO, Image.Image]]:
    """The open file and the image with its header read; what goes wrong until it is closed is a DataError."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            kind = "folder" if stat.S_ISDIR(status.st_mode) else "device or pipe"
            raise ValueError(f"is a {kind}, not an image file")
        if status.st_size == 0:
            raise ValueError("is empty (0 bytes)")
        with open(path, "rb") as file:
            yield file, Image.open(file, formats=FORMATS)
    except Exception as error:  # decoders of files from anywhere: struct.error, IndexError, MemoryError, ...
        raise DataError(f"{shown(os.fspath(path))}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """Why a file cannot be read, in one line without its name."""
    if isinstance(error, UnidentifiedImageError):
        return f"is no image, or damaged from its first bytes on ({', '.join(FORMATS)} are read)"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be opened ({error.strerror})"
    text = " ".join(str(error).split()) or type(error).__name__
    return text if text.startswith("is ") else f"cannot be decoded ({text})"


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1..8; 1 if there is none. Never decodes, as Pillow's own method does a PNG."""
    try:
        return Image.Image.getexif(image).get(ORIENTATION, 1)
    except Exception:  # a damaged EXIF block says nothing about the pixels
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """A decoded image of any mode as 8-bit RGB."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        return Image.fromarray(_grey_from_int(image)).convert("RGB")
    if image.mode == "F":
        return Image.fromarray(_grey_from_float(image)).convert("RGB")
    if "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _grey_from_int(image: Image.Image) -> np.ndarray:
    """Grey of more than 8 bits: 16, or the 12 some TIFFs have. uint8 (H, W), rounded; 65535 / 257 = 255."""
    white = 4095 if getattr(image, "tag_v2", {}).get(TIFF_BITS) == (12,) else 65535
    values = np.asarray(image).astype(np.int64)  # (H, W)
    if values.min() < 0 or values.max() > white:
        raise ValueError(f"is an image of integers from {values.min()} to {values.max()}; 0 to {white} was wanted")
    return ((values * 255 + white // 2) // white).astype(np.uint8)


def _grey_from_float(image: Image.Image) -> np.ndarray:
    """Grey of floats, which have no agreed range: [0, 1] is taken. uint8 (H, W)."""
    values = np.asarray(image)  # (H, W)
    if not (values.min() >= 0 and values.max() <= 1):  # not a number fails here, too
        raise ValueError(f"is an image of floats from {values.min():g} to {values.max():g}; 0 to 1 was wanted")
    return np.rint(values * 255).astype(np.uint8)


def to_float(images: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [0, 1], of the same shape."""
    return images.to(torch.float32) / 255


# --- sizes --------------------------------------------------------------------------------------------------


def fit_size(image: Tensor, policy: SizePolicy, rng: np.random.Generator | None = None) -> Tensor:
    """Resize the shorter side, crop, and centre-crop to a multiple of the scale, as `policy` says.

    Args:
        image: (3, H, W), uint8 to be resized as torchvision does (bicubic, antialiased, rounded).
        rng: where a random crop is drawn from (row, then column); not used for a crop in the centre.

    Raises:
        DataError: if the image is too small for the crop or the scale.
    """
    problem = size_problem(image.shape[-2], image.shape[-1], policy)
    if problem:
        raise DataError(f"image {problem}")
    if policy.resize is not None:
        image = F.resize(image, [policy.resize], InterpolationMode.BICUBIC, antialias=True)  # (3, H', W')
    if policy.crop_size is not None:
        side, (height, width) = policy.crop_size, image.shape[-2:]
        if policy.random_crop:
            top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
        else:
            top, left = (height - side) // 2, (width - side) // 2
        image = image[:, top : top + side, left : left + side]  # (3, side, side)
    top, left, height, width = multiple_box(image.shape[-2], image.shape[-1], policy.scale)
    return image[:, top : top + height, left : left + width].contiguous()


def multiple_box(height: int, width: int, scale: int) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the centre whose sides are the largest multiples of `scale`."""
    return height % scale // 2, width % scale // 2, height - height % scale, width - width % scale


def size_problem(height: int, width: int, policy: SizePolicy) -> str | None:
    """Why an image of this size cannot be used, to follow its name; None if it can."""
    is_so = f"is {width} x {height} pixels"
    height, width = _resized(height, width, policy)
    if policy.resize is not None:
        is_so += f", {width} x {height} when resized"
    if height * width > MAX_PIXELS:
        return f"{is_so}, more than {MAX_PIXELS} in all: use a smaller --resize, or leave the image out"
    if policy.crop_size is not None and min(height, width) < policy.crop_size:
        wanted = f"smaller than the crop of {policy.crop_size} x {policy.crop_size}"
        return f"{is_so}, {wanted}: use a smaller --crop-size (or --patch-size), or leave the image out"
    if min(height, width, policy.crop_size or height) < policy.scale:
        return f"{is_so}; sides of at least {policy.scale}, the scale, are wanted: leave the image out"
    return None


def _resized(height: int, width: int, policy: SizePolicy) -> tuple[int, int]:
    """Height and width after resizing: the shorter side is `resize`, the longer rounded down."""
    if policy.resize is None:
        return height, width
    longer = int(policy.resize * max(height, width) / min(height, width))
    return (longer, policy.resize) if height >= width else (policy.resize, longer)


def is_trimmed(height: int, width: int, policy: SizePolicy) -> bool:
    """Whether an image of this size, resized and cropped, loses a border to the multiples of the scale."""
    return fitted_size(height, width, policy) != fitted_size(height, width, policy._replace(scale=1))


def fitted_size(height: int, width: int, policy: SizePolicy) -> tuple[int, int]:
    """Height and width that `fit_size` gives an image of this size."""
    height, width = (policy.crop_size,) * 2 if policy.crop_size is not None else _resized(height, width, policy)
    return height - height % policy.scale, width - width % policy.scale


def mixed_sizes(paths: Sequence[str], sizes: Sequence[tuple[int, int]]) -> str | None:
    """One line about the first two images whose sizes (height, width) differ; None if all are alike."""
    for path, size in zip(paths, sizes, strict=True):
        if size != sizes[0]:
            (h0, w0), (h1, w1) = sizes[0], size
            return (
                f"images of different sizes cannot share a batch: {shown(paths[0])} is {w0} x {h0} pixels and"
                f" {shown(path)} {w1} x {h1}; make them alike with --crop-size N (and --resize N), or use"
                " --batch-size 1"
            )
    return None


# --- headers ------------------------------------------------------------------------------------------------


def check_headers(paths: Sequence[str], policy: SizePolicy) -> Headers:
    """Find the images that cannot be used, by their headers and ends alone: some 0.15 milliseconds a file.

    A file that does not look complete is decoded, to be sure. Damage in the middle shows only when a file is
    read.
    """
    with ThreadPoolExecutor(HEADER_THREADS) as pool:
        checked = list(pool.map(lambda path: _check_header(path, policy), paths))
    problems = [(path, reason) for path, (_, reason) in zip(paths, checked, strict=True) if reason]
    return Headers([size for size, _ in checked], problems)


def _check_header(path: str, policy: SizePolicy) -> tuple[tuple[int, int] | None, str | None]:
    """(height, width) and what is wrong, each perhaps None."""
    try:
        with _image_file(path) as (file, image):
            height, width = _upright_size(image)
            complete = _looks_complete(file, image)
        if not complete:
            read_rgb(path)
    except DataError as error:
        return None, str(error).removeprefix(f"{shown(path)}: ")
    return (height, width), size_problem(height, width, policy)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) as `read_rgb` gives it, but for an EXIF block behind the pixels of a PNG."""
    width, height = image.size
    if image.format == "TIFF":  # some versions of Pillow have turned the size already
        width, height = image.tag_v2[TIFF_WIDTH], image.tag_v2[TIFF_HEIGHT]
    return (width, height) if _orientation(image) in SIDEWAYS else (height, width)


def _looks_complete(file: BinaryIO, image: Image.Image) -> bool:
    """Whether the file is as long as it says, or ends as its format does. False if unsure."""
    length = os.fstat(file.fileno()).st_size
    if image.format == "TIFF":
        extents = [(image.tag_v2.get(a, ()), image.tag_v2.get(b, ())) for a, b in (TIFF_STRIPS, TIFF_TILES)]
        ends = [start + count for starts, counts in extents for start, count in zip(starts, counts, strict=False)]
        return bool(ends) and max(ends) <= length
    if image.format in ("WEBP", "BMP"):
        file.seek(0)
        head = file.read(8)  # "RIFF" + the length of what follows, or "BM" + that of the file
        said = int.from_bytes(head[4:] if image.format == "WEBP" else head[2:6], "little")
        return 8 < said <= (length - 8 if image.format == "WEBP" else length)
    ending = {"PNG": b"IEND\xaeB`\x82", "JPEG": b"\xff\xd9", "MPO": b"\xff\xd9"}.get(image.format)
    if ending is None:
        return False
    file.seek(max(0, length - 64))  # a little may follow
    return ending in file.read()


def usable_items(items: Sequence[Item], policy: SizePolicy, skip_bad: bool = False) -> list[Item]:
    """The items whose headers are in order; logs each of the others, and how many will lose a border.

    Raises:
        DataError: if some are not in order and `skip_bad` is false, or none are.
    """
    sizes, problems = check_headers([item.path for item in items], policy)
    for path, reason in problems:
        logger.warning("%s: %s: %s", "left out" if skip_bad else "bad image", shown(path), reason)
    if problems and (not skip_bad or len(problems) == len(items)):
        (path, reason), count = problems[0], f"{len(problems)} of {len(items)}"
        way_out = "mend or remove them" if skip_bad else "mend or remove them, or go on without them by --skip-bad"
        raise DataError(f"{count} images cannot be used: {way_out}; the first is {shown(path)}: {reason}")
    bad = {path for path, _ in problems}
    kept = [(item, size) for item, size in zip(items, sizes, strict=True) if item.path not in bad]
    trimmed = sum(is_trimmed(*size, policy) for _, size in kept)
    if trimmed:
        text = "%d of %d images have sides that are no multiple of %d and are centre-cropped"
        logger.info(text, trimmed, len(kept), policy.scale)
    return [item for item, _ in kept]


def usable_paths(paths: Sequence[str], policy: SizePolicy, skip_bad: bool = False) -> list[str]:
    """`usable_items` for paths without labels."""
    return [item.path for item in usable_items([Item(path, None, "") for path in paths], policy, skip_bad)]


# --- batches ------------------------------------------------------------------------------------------------


class ImageDataset(Dataset):
    """Images of one size policy. What is random in image `index` of `epoch` depends on (seed, epoch, index)
    alone.

    Args:
        items: the images.
        flip: mirror left and right with probability 0.5.
        seed: a number >= 0.
        transform: called as transform(image, path, rng) with the uint8 (3, H, W) image as read; returns
        another.
            Its rng has a key of its own, so that crop and flip are the same with and without it.
    """

    def __init__(
        self,
        items: Sequence[Item],
        policy: SizePolicy,
        flip: bool = False,
        seed: int = 0,
        transform: Callable[[Tensor, str, np.random.Generator], Tensor] | None = None,
    ):
        self.items, self.policy, self.flip, self.seed, self.transform = items, policy, flip, seed, transform

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: tuple[int, int] | int) -> Sample:
        """The item of (epoch, index), or of an index in epoch 0. What is wrong with it is in `error`."""
        epoch, index = key if isinstance(key, tuple) else (0, key)
        item = self.items[index]
        label = UNLABELLED if item.label is None else item.label
        try:
            return Sample(index, item.path, label, self._read(item.path, epoch, index))
        except DataError as error:
            text, name = str(error), shown(item.path)
            return Sample(index, item.path, label, None, text if text.startswith(name) else f"{name}: {text}")

    def _read(self, path: str, epoch: int, index: int) -> Tensor:
        image = load_image(path)  # (3, H, W)
        if self.transform is not None:
            image = self.transform(image, path, np.random.default_rng([self.seed, epoch, index, 1]))
        mirrored, rng = self._draw_mirrored(epoch, index)
        image = fit_size(image, self.policy, rng)
        return image.flip(-1) if mirrored else image

    def mirrored(self, epoch: int, index: int) -> bool:
        """Whether an image is mirrored in an epoch; known without reading it."""
        return self._draw_mirrored(epoch, index)[0]

    def _draw_mirrored(self, epoch: int, index: int) -> tuple[bool, np.random.Generator]:
        rng = np.random.default_rng([self.seed, epoch, index])
        return self.flip and bool(rng.random() < 0.5), rng


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack the images that could be read; say so if their sizes differ."""
    errors = {s.index: s.error for s in samples if s.image is None}
    read = [s for s in samples if s.image is not None]
    mismatch = mixed_sizes([s.path for s in read], [tuple(s.image.shape[-2:]) for s in read])
    images = torch.empty(0, 3, 0, 0, dtype=torch.uint8)
    if read and not mismatch:
        images = torch.stack([s.image for s in read])  # (B, 3, H, W)
    labels = torch.tensor([s.label for s in read], dtype=torch.int64)  # (B,)
    return Batch(images, labels, [s.index for s in read], errors, mismatch)
