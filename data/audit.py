"""What could tell real from generated images apart without looking at what was generated?

    python -m data.audit --data-root-pos REAL_DIR --data-root-neg FAKE_DIR [--val-root-pos DIR ...]

A detector takes the easiest way: if every real image is a JPEG and every generated one a PNG, it learns JPEG.
This looks at headers (codec, JPEG quality, size, colour mode, bit depth, metadata) and at thumbnails (JPEG
traces in lossless files, exact and near duplicates), says in plain words what it found, and how to neutralise
it. The number behind each finding about a header is the balanced accuracy of the best rule on this one
attribute: 0.5 says nothing about the class, 1.0 everything.

Exit status: 0 no leak, 1 a leak, 2 a mistake of the user's.
"""

import argparse
import hashlib
import json
import logging
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, JpegImagePlugin
from tqdm import tqdm

from data.images import (
    FAKE,
    FORMATS,
    REAL,
    DataError,
    Item,
    csv_items,
    folder_items,
    load_image,
    shown,
    tree_items,
)

logger = logging.getLogger(__name__)

LEAK, WARNING, NOTE = SEVERITIES = ("leak", "warning", "note")
NO_LEAK, FOUND_LEAK, MISTAKE, INTERRUPTED = 0, 1, 2, 130  # exit status

# Balanced accuracy beyond chance of a rule on one attribute, from which on it is called so.
THRESHOLDS = {LEAK: 0.75, WARNING: 0.6, NOTE: 0.55}
SHUFFLES = 200  # shuffled labels that show what chance reaches
CHANCE_QUANTILE = 0.99

FEW_IMAGES = 20  # a class: below, chance explains nearly anything
QUICK_LIMIT = 2000  # headers a class and split in the short form
QUICK_LINES = 3  # findings told in the short form
THUMBNAIL_LIMIT = 10_000  # thumbnails a class and split, unless --full
WORKERS = 8  # threads: Pillow and hashlib let go of the interpreter while they work

# Near duplicates: at most so many of 128 bits differ, and so many grey levels on average.
HASH_DISTANCE = 10
THUMBNAIL_DISTANCE = 4.0
HASH_GRID, THUMBNAIL_SIDE = 72, 12  # 72 = 8 * 9: block means give 9 x 8 and 8 x 9 cells
CHUNK = 1 << 20  # bytes of a file read at a time
END_BYTES = 4096  # of a file, by which most of those of the same length are told apart
BLOCK = 256  # images compared with all others at a time: 100 MB at 100,000 images
MAX_PAIRS = 1_000_000

# A step between neighbours at one of eight phases that stands out by so many standard errors, along rows and
# columns: none of 9 faces and 200 crops of them reach 6.2; at JPEG quality 90, 95 % of 512 x 512 and a third
# of 128 x 128 pass 8.
GRID_SCORE = 8.0
GRID_MIN_SIDE = 64

# ITU T.81 Annex K, table K.1: the luminance table libjpeg scales by quality, in rows.
ANNEX_K_LUMINANCE = np.array(
    [
        16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55,
        14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87, 80, 62,
        18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92,
        49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99,
    ]
)  # fmt: skip
SUBSAMPLING = {0: "4:4:4", 1: "4:2:2", 2: "4:2:0"}
METADATA = {
    "exif": "EXIF",
    "icc_profile": "ICC profile",
    "xmp": "XMP",
    "XML:com.adobe.xmp": "XMP",
    "comment": "comment",
    "photoshop": "Photoshop block",
}


class Header(NamedTuple):
    """What a file says of itself. `error` is set, and the rest empty, if it cannot be read."""

    item: Item
    split: str  # "train" or "validation"
    codec: str = ""
    width: int = 0
    height: int = 0
    mode: str = ""
    bits: int = 0
    quality: int | None = None  # of a JPEG, estimated
    subsampling: str | None = None
    metadata: str = ""
    file_bytes: int = 0
    error: str | None = None


class Thumbnail(NamedTuple):
    """What is kept of the pixels. `error` is set if they cannot be decoded."""

    bits: np.ndarray | None = None  # bool (128,): brighter than the left (64) and the upper (64) neighbour
    colours: np.ndarray | None = None  # uint8 (12 * 12 * 3,)
    jpeg_grid: bool | None = None  # None: a JPEG (no question), or too small to tell
    error: str | None = None


class Attribute(NamedTuple):
    """A property of a file that should not depend on its class."""

    name: str
    of: Callable[[Header], object]  # None: the question does not arise for this file
    group: str  # of those that say the same, only the strongest is reported
    shortcut: str
    fix: str
    worst: str = LEAK


REENCODE = (
    "Take both classes through the same last step: for example re-encode all as JPEG of one quality, or take"
    " both from sources never compressed and save as PNG. Converting JPEG to PNG keeps the traces. Where"
    " neither can be: train with --augment-perturb, and report scores under --perturb jpeg."
)
RESIZE = (
    "Get both classes from sources of one size, or cut equal pieces out of the pixels as they are"
    " (--crop-size N). Resizing to one size (--resize N) hides the size, but different factors leave"
    " different traces in the fine detail."
)
SIZE_SHORTCUT = "A detector can tell the sizes, or, once resized to one, what resizing did to the fine detail."
RECODE_COLOUR = "Convert both classes alike before training, from the same kind of source."


def _about(side: int) -> str:
    """The side, rounded to the nearest of ..., 64, 91, 128, 181, 256, ..."""
    return f"about {round(2 ** (round(2 * math.log2(side)) / 2))}"


def _shape(width: int, height: int) -> str:
    return "square" if width == height else "landscape" if width > height else "portrait"


ATTRIBUTES = (
    Attribute(
        "codec",
        lambda h: h.codec,
        "codec",
        "A detector can tell the codecs by their traces: JPEG leaves an 8x8 grid and removes fine detail.",
        REENCODE,
    ),
    Attribute(
        "JPEG quality",
        lambda h: h.quality and f"quality {h.quality}",
        "quality",
        "A detector can tell how strongly an image was compressed: by blocks and by lost detail.",
        REENCODE,
    ),
    Attribute(
        "JPEG chroma subsampling",
        lambda h: h.subsampling,
        "quality",
        "A detector can tell full from halved colour resolution.",
        REENCODE,
    ),
    Attribute("size", lambda h: f"{h.width}x{h.height}", "size", SIZE_SHORTCUT, RESIZE),
    Attribute("shorter side", lambda h: _about(min(h.width, h.height)), "size", SIZE_SHORTCUT, RESIZE),
    Attribute(
        "shape",
        lambda h: _shape(h.width, h.height),
        "size",
        "A detector can tell the shapes, by borders and by what a crop leaves in the picture.",
        RESIZE,
    ),
    Attribute(
        "colour mode",
        lambda h: h.mode,
        "colour",
        "A detector can tell grey, palette or once transparent images from RGB ones at a glance.",
        RECODE_COLOUR,
    ),
    Attribute(
        "bit depth",
        lambda h: f"{h.bits} bit",
        "colour",
        "A detector can tell how finely grey levels were quantised.",
        RECODE_COLOUR,
    ),
    Attribute(
        "metadata",
        lambda h: h.metadata or "none",
        "metadata",
        "A detector never sees metadata, but they show that the classes went through different programs,"
        " whose traces it may see (and colours of another ICC profile it does see).",
        "Find out what else these programs did (sharpening, resizing, colour) and convert alike.",
        WARNING,
    ),
)
GRID = Attribute(
    "JPEG traces in lossless files",
    lambda h: None,
    "codec",
    "Some lossless files were JPEGs before: a detector can tell the 8x8 grid in their pixels.",
    REENCODE,
)


# --- the audit ----------------------------------------------------------------------------------------------


def audit(train: Sequence[Item], validation: Sequence[Item] = (), full: bool = False) -> dict:
    """Look for shortcuts and duplicates in labelled images.

    Args:
        train, validation: images with labels; those without are looked at for duplicates only.
        full: compare the thumbnails of all images, not of THUMBNAIL_LIMIT a class and split.

    Returns:
        JSON-able: "files" (number by split and class), "checked" (how many of what), "attributes" (what each
        alone tells about the class in training, and what chance would), "unreadable" [[path, reason]], and
        "findings", worst first: dicts with "severity" (leak, warning, note), "check", "message", "shortcut",
        "fix", "examples" (paths), and for attributes the numbers of `Separation` and "values".
    """
    headers = read_headers([(item, "train") for item in train] + [(item, "validation") for item in validation])
    good = [h for h in headers if h.error is None]
    chosen = good if full else _spread(good, THUMBNAIL_LIMIT)
    thumbnails = _threads(read_thumbnail, chosen, "thumbnails")
    pairs = list(zip(chosen, thumbnails, strict=True))
    unreadable = [[h.item.path, h.error] for h in headers if h.error]
    unreadable += [[h.item.path, t.error] for h, t in pairs if t.error]
    decoded = [(h, t) for h, t in pairs if not t.error]
    grids = {h.item.path: t.jpeg_grid for h, t in decoded if t.jpeg_grid is not None}
    traces = GRID._replace(of=lambda h: {True: "with an 8x8 grid", False: "without"}.get(grids.get(h.item.path)))
    attributes = (*ATTRIBUTES, traces)
    findings = class_findings(good, attributes)
    findings += duplicate_findings(good, decoded)
    findings += _suffix_findings(good) + _small_findings(good)
    return _result(headers, good, attributes, unreadable, findings, len(decoded), len(chosen) == len(good))


def quick_audit(train: Sequence[Item], validation: Sequence[Item] = (), limit: int = QUICK_LIMIT) -> dict:
    """`audit` from the headers of at most `limit` images a class and split: for the start of a training.

    Of duplicates only exact ones across train and validation are looked for, among the same sample.
    """
    unread = [Header(item, "train") for item in train] + [Header(item, "validation") for item in validation]
    headers = read_headers([(h.item, h.split) for h in _spread(unread, limit)], progress=False)
    good = [h for h in headers if h.error is None]
    unreadable = [[h.item.path, h.error] for h in headers if h.error]
    across = {h.file_bytes for h in good if h.split == "train"} & {
        h.file_bytes for h in good if h.split == "validation"
    }
    groups = exact_duplicates([h for h in good if h.file_bytes in across], progress=False)
    mixed = [group for group in groups if len({h.split for h in group}) > 1]
    findings = class_findings(good) + _relation_findings(mixed, good, "exact")
    return _result(unread, good, ATTRIBUTES, unreadable, findings, 0, False)


def log_quick_audit(train: Sequence[Item], validation: Sequence[Item] = ()) -> None:
    """Say in a few lines of the log what `quick_audit` found worth a warning."""
    result = quick_audit(train, validation)
    worth = [f for f in result["findings"] if f["severity"] != NOTE]
    logger.info(
        "leak audit of %d of %d headers: %s", result["checked"]["headers"], len(train) + len(validation),
        f"{len(worth)} finding{'s' * (len(worth) > 1)}; python -m data.audit tells more" if worth else "nothing found",
    )  # fmt: skip
    for finding in worth[:QUICK_LINES]:
        logger.warning("%s: %s: %s", finding["severity"].upper(), finding["check"], finding["message"])


def _result(
    headers: Sequence[Header],
    good: Sequence[Header],
    attributes: Sequence[Attribute],
    unreadable: list[list[str]],
    findings: list[dict],
    thumbnails: int,
    full: bool,
) -> dict:
    """What `audit` returns."""
    findings = findings + _unreadable_findings(unreadable)
    return {
        "files": _count(headers),
        "checked": {"headers": len(good), "thumbnails": thumbnails, "full": full},
        "attributes": attribute_table(good, attributes),
        "unreadable": unreadable,
        "findings": sorted(findings, key=lambda f: SEVERITIES.index(f["severity"])),
    }


def summary_lines(result: dict) -> list[str]:
    """The result of `audit` or `quick_audit` in plain words, a line of text each."""
    counts = "; ".join(f"{split} {_listed(classes)}" for split, classes in result["files"].items())
    checked = result["checked"]
    looked_at = f"{checked['headers']} headers"
    if checked["thumbnails"]:
        part = "" if checked["full"] else " (a sample; --full looks at all)"
        looked_at += f", {checked['thumbnails']} thumbnails{part}"
    lines = [f"leak audit: {counts}; looked at {looked_at}"]
    for finding in result["findings"]:
        lines.append(f"{finding['severity'].upper()}: {finding['check']}: {finding['message']}")
        for key, title in (("shortcut", "shortcut"), ("fix", "way out")):
            if finding[key]:
                lines.append(f"    {title}: {finding[key]}")
        if finding["examples"]:
            lines.append(f"    such as: {' | '.join(shown(path) for path in finding['examples'])}")
    if result["attributes"]:
        alone = ", ".join(f"{name} {v['balanced_accuracy']:.2f}" for name, v in result["attributes"].items())
        lines.append(f"balanced accuracy of the best rule on one attribute alone (0.50 tells nothing): {alone}")
    found = Counter(f["severity"] for f in result["findings"])
    numbers = {s if found[s] == 1 else f"{s}s": found[s] for s in SEVERITIES if found[s]}
    verdict = _listed(numbers) or "nothing found"
    lines.append(f"leak audit: {verdict}" + ("" if found[LEAK] else " (no leak)" if found else ""))
    return lines


# --- what each file says ------------------------------------------------------------------------------------


def read_headers(files: Sequence[tuple[Item, str]], progress: bool = True) -> list[Header]:
    """The headers of (item, split), in order, without decoding any pixels."""
    return _threads(lambda pair: read_header(*pair), files, "headers" if progress else None)


def read_header(item: Item, split: str = "train") -> Header:
    """What the file says of itself; what is wrong with it in `error`."""
    try:
        size = Path(item.path).stat().st_size
        with Image.open(item.path, formats=FORMATS) as image:
            is_jpeg = isinstance(image, JpegImagePlugin.JpegImageFile)  # among them MPO: several in a file
            return Header(
                item,
                split,
                "JPEG" if is_jpeg else image.format,
                *image.size,
                image.mode,
                _bit_depth(image),
                jpeg_quality(image.quantization[min(image.quantization)]) if is_jpeg else None,
                _subsampling(image) if is_jpeg else None,
                _metadata(image),
                size,
            )
    except Exception as error:  # decoders of files from anywhere: struct.error, IndexError, KeyError, ...
        return Header(item, split, error=" ".join(str(error).split()) or type(error).__name__)


def jpeg_quality(table: Sequence[int]) -> int:
    """The libjpeg quality (1..100) whose luminance table is nearest to this one (64 numbers, in rows).

    Exact for files of libjpeg, Pillow and OpenCV; an equivalent for programs with tables of their own.
    """
    quality = np.arange(1, 101)
    scale = np.where(quality < 50, 5000 // quality, 200 - 2 * quality)  # libjpeg's jpeg_quality_scaling
    tables = np.clip((ANNEX_K_LUMINANCE * scale[:, None] + 50) // 100, 1, 255)  # (100, 64)
    return int(quality[np.abs(tables - np.asarray(table)[:64]).sum(1).argmin()])


def _subsampling(image: JpegImagePlugin.JpegImageFile) -> str | None:
    return None if image.mode == "L" else SUBSAMPLING.get(JpegImagePlugin.get_sampling(image), "other")


def _bit_depth(image: Image.Image) -> int:
    """Bits a channel as stored: Pillow opens 16-bit RGB PNGs as 8-bit."""
    if image.format == "PNG":
        image.fp.seek(24)  # in IHDR, the first chunk
        return image.fp.read(1)[0]
    if image.format == "TIFF":
        return max(image.tag_v2.get(258, (1,)))
    return {"1": 1, "I": 32, "F": 32}.get(image.mode, 16 if image.mode.startswith("I;16") else 8)


def _metadata(image: Image.Image) -> str:
    """What kinds of metadata there are, sorted: "EXIF, ICC profile"; texts of a PNG by their key."""
    kinds = {kind for key, kind in METADATA.items() if image.info.get(key)}
    if image.format == "PNG":  # not image.text, which would decode the pixels
        kinds |= {f"text {k!r}" for k, value in image.info.items() if isinstance(value, str) and k not in METADATA}
    return ", ".join(sorted(kinds))


def read_thumbnail(header: Header) -> Thumbnail:
    """Hash, thumbnail and JPEG traces of an image; a JPEG is decoded at a fraction of its size."""
    path = header.item.path
    try:
        if header.codec == "JPEG":
            with Image.open(path, formats=FORMATS) as image:
                image.draft("RGB", (HASH_GRID, HASH_GRID))
                image, grid = ImageOps.exif_transpose(image).convert("RGB"), None
        else:
            pixels = load_image(path).permute(1, 2, 0).numpy()  # (H, W, 3)
            image = Image.fromarray(pixels)
            grid = has_jpeg_grid(np.asarray(image.convert("L")))
        image = image.resize((HASH_GRID, HASH_GRID), Image.Resampling.BOX)
        small = np.asarray(image, dtype=np.float32)  # (72, 72, 3)
    except Exception as error:
        reason = " ".join(str(error).split()).removeprefix(f"{shown(path)}: ")
        return Thumbnail(error=reason or type(error).__name__)
    grey = small.mean(2)
    across = np.diff(_block_means(grey, 8, 9), axis=1) > 0  # (8, 8)
    down = np.diff(_block_means(grey, 9, 8), axis=0) > 0  # (8, 8)
    colours = np.stack([_block_means(small[..., c], THUMBNAIL_SIDE, THUMBNAIL_SIDE) for c in range(3)])
    return Thumbnail(np.concatenate([across.ravel(), down.ravel()]), np.rint(colours).astype(np.uint8).ravel(), grid)


def _block_means(x: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """(H, W) -> (rows, columns), H and W their multiples."""
    return x.reshape(rows, x.shape[0] // rows, columns, x.shape[1] // columns).mean((1, 3))


def has_jpeg_grid(grey: np.ndarray) -> bool | None:
    """Whether uint8 (H, W) shows the 8x8 blocks of a JPEG it once was; None if it is too small to tell.

    Steps between neighbours, less those beside them, must stand out at one of eight phases, across and down.
    """
    if min(grey.shape) < GRID_MIN_SIDE:
        return None
    return bool(min(_grid_score(grey), _grid_score(grey.T)) > GRID_SCORE)


def _grid_score(grey: np.ndarray) -> float:
    """By how many standard errors the strongest of eight phases of the columns stands out."""
    steps = np.abs(np.diff(grey.astype(np.int16), axis=1)).mean(0)  # (W - 1,)
    excess = steps[1:-1] - (steps[:-2] + steps[2:]) / 2
    periods = excess[: len(excess) // 8 * 8].reshape(-1, 8)  # (W // 8, phase)
    phases, best = periods.mean(0), periods.mean(0).argmax()
    error = periods.std(0).mean() / np.sqrt(len(periods))
    return float((phases[best] - np.delete(phases, best).mean()) / (error + 1e-6))


# --- attributes and classes ---------------------------------------------------------------------------------


class Separation(NamedTuple):
    """How well the best rule on one attribute tells the classes apart."""

    balanced_accuracy: float  # 0.5 .. 1
    chance: float  # what it reaches with shuffled labels, 99 times of 100
    beyond_chance: float  # balanced accuracy on a scale whose 0.5 is what shuffled labels give on average
    uniform: bool  # each class has one value only, and they differ


def separation(real: Sequence, fake: Sequence) -> Separation:
    """Balanced accuracy of the rule "this value -> the class that has more of it", and what chance gives it.

    Half the sum over values of the larger of the two class shares. With few files, or a value of its own for
    each, chance alone goes far above 0.5: labels are shuffled to see how far.
    """
    values = sorted({*real, *fake}, key=repr)
    counts = Counter(real), Counter(fake)
    n_real, n_fake = (np.array([c[v] for v in values]) for c in counts)  # (V,)

    def accuracy(n_real: np.ndarray, n_fake: np.ndarray) -> np.ndarray:
        return (np.maximum(n_real / len(real), n_fake / len(fake)).sum(-1) / 2).round(9)  # 1 is 1

    rng = np.random.default_rng(0)
    both = n_real + n_fake
    shuffled = rng.multivariate_hypergeometric(both, len(real), SHUFFLES, method="marginals")  # (S, V)
    by_chance = accuracy(shuffled, both - shuffled)  # (S,)
    reached, expected = float(accuracy(n_real, n_fake)), float(by_chance.mean())
    beyond = max(0.0, reached - expected) / (1 - expected) if expected < 1 else 0.0
    uniform = len(counts[0]) == len(counts[1]) == 1 and len(values) == 2 and min(len(real), len(fake)) > 1
    chance = float(np.quantile(by_chance, CHANCE_QUANTILE, method="higher"))
    return Separation(reached, chance, 0.5 + beyond / 2, uniform)


def attribute_table(headers: Sequence[Header], attributes: Iterable[Attribute] = ATTRIBUTES) -> dict[str, dict]:
    """The numbers of `Separation` for each attribute alone on the training images, by its name."""
    table = {}
    for attribute in attributes:
        real, fake = _values(attribute, [h for h in headers if h.split == "train"])
        if real and fake:
            result = separation(real, fake)
            table[attribute.name] = _rounded(result)
    return table


def _rounded(result: Separation) -> dict[str, float]:
    return {name: round(getattr(result, name), 4) for name in ("balanced_accuracy", "chance", "beyond_chance")}


def _values(attribute: Attribute, headers: Sequence[Header]) -> tuple[list, list]:
    """What the attribute is for the reals and for the fakes, where it is anything."""
    pairs = [(h.item.label, attribute.of(h)) for h in headers]
    return tuple([v for label, v in pairs if label == wanted and v is not None] for wanted in (REAL, FAKE))


def class_findings(headers: Sequence[Header], attributes: Iterable[Attribute] = ATTRIBUTES) -> list[dict]:
    """What tells the classes apart in each split: over all generators, and of each what the whole hides."""
    attributes, findings = tuple(attributes), []
    for split in sorted({h.split for h in headers}):
        real = [h for h in headers if h.split == split and h.item.label == REAL]
        fake = [h for h in headers if h.split == split and h.item.label == FAKE]
        overall = _group_findings(real, fake, attributes, f" ({split})" if split != "train" else "")
        findings += overall
        generators = sorted({h.item.generator for h in fake})
        known = {f["group"] for f in overall if f["severity"] == LEAK}
        for generator in generators if len(generators) > 1 else []:
            own = [h for h in real if h.item.generator in ("", generator)]
            those = [h for h in fake if h.item.generator == generator]
            where = f" ({generator}{', ' + split if split != 'train' else ''})"
            findings += [
                f
                for f in _group_findings(own, those, attributes, where)
                if f["severity"] == LEAK and f["group"] not in known
            ]
    return findings


def _group_findings(
    real: list[Header], fake: list[Header], attributes: tuple[Attribute, ...], where: str
) -> list[dict]:
    """The strongest finding of each group of attributes."""
    strongest = {}
    for attribute in attributes:
        finding = _attribute_finding(attribute, real, fake, where)
        if finding is None:
            continue
        rank = (SEVERITIES.index(finding["severity"]), -finding["balanced_accuracy"])
        if attribute.group not in strongest or rank < strongest[attribute.group][0]:
            strongest[attribute.group] = rank, finding
    return [finding for _, finding in strongest.values()]


def _attribute_finding(attribute: Attribute, real: list[Header], fake: list[Header], where: str) -> dict | None:
    values = _values(attribute, [*real, *fake])
    if not all(values):
        return None
    result = separation(*values)
    beats_chance = result.balanced_accuracy > result.chance or result.uniform
    levels = [s for s in SEVERITIES if beats_chance and result.beyond_chance >= THRESHOLDS[s]]
    if not levels:
        return None
    severity = max(levels[0], attribute.worst, key=SEVERITIES.index)
    message = (
        f"real: {_shares(values[0])}; fake: {_shares(values[1])}. The best rule on this alone has a balanced"
        f" accuracy of {result.balanced_accuracy:.2f} (chance: up to {result.chance:.2f})"
    )
    if result.uniform:
        message = f"all real images: {values[0][0]}; all fake images: {values[1][0]}. This alone tells them apart"
    return _finding(
        severity,
        attribute.name + where,
        message,
        attribute.shortcut,
        attribute.fix,
        group=attribute.group,
        **_rounded(result),
        values={
            name: {str(v): n for v, n in Counter(vs).most_common(20)}
            for name, vs in zip(("real", "fake"), values, strict=True)
        },
    )


def _shares(values: list) -> str:
    """The three commonest values: "PNG 80 %, JPEG 20 %"."""
    counts = Counter(values)
    top = [f"{value} {100 * n / len(values):.3g} %" for value, n in counts.most_common(3)]
    return ", ".join(top) + (f" and {len(counts) - 3} more" if len(counts) > 3 else "")


# --- duplicates ---------------------------------------------------------------------------------------------


def duplicate_findings(headers: Sequence[Header], decoded: Sequence[tuple[Header, Thumbnail]]) -> list[dict]:
    """Exact copies among all files, near ones among those decoded, by what they mix up."""
    exact = exact_duplicates(headers)
    first_of = {h: group[0] for group in exact for h in group}
    near, complete = [], True
    if decoded:
        groups, complete = near_duplicates([t for _, t in decoded])
        for group in groups:
            members = list(dict.fromkeys(first_of.get(decoded[i][0], decoded[i][0]) for i in group))
            if len(members) > 1:  # more than copies of one file
                near.append(members)
    findings = _relation_findings(exact, headers, "exact")
    findings += _relation_findings(near, [h for h, _ in decoded], "near")
    if not complete:
        text = f"more than {MAX_PAIRS} pairs of images look alike; only these were followed"
        findings.append(_finding(WARNING, "near duplicates", text, "", "Look at the examples above first."))
    return findings


def exact_duplicates(headers: Sequence[Header], progress: bool = True) -> list[list[Header]]:
    """Groups of files with the same bytes. Read are only files of the same length, and wholly only those that end alike."""
    groups = _alike(headers, [h.file_bytes for h in headers])
    for last in (END_BYTES, None):
        suspects = [h for group in groups for h in group]
        checksums = _threads(lambda h, last=last: _sha256(h, last), suspects, "checksums" if progress else None)
        groups = _alike(suspects, checksums)
    return groups


def _alike(headers: Sequence[Header], keys: Sequence) -> list[list[Header]]:
    """Groups of two or more headers with the same key; None is no key."""
    groups = defaultdict(list)
    for header, key in zip(headers, keys, strict=True):
        if key is not None:
            groups[key].append(header)
    return [group for group in groups.values() if len(group) > 1]


def _sha256(header: Header, last: int | None = None) -> bytes | None:
    """Checksum of the file's length and (`last`) bytes; None if it cannot be read (any more)."""
    digest = hashlib.sha256(b"%d" % header.file_bytes)
    try:
        with open(header.item.path, "rb") as file:
            if last is not None:
                file.seek(max(0, header.file_bytes - last))
            while chunk := file.read(CHUNK):
                digest.update(chunk)
    except OSError:
        return None
    return digest.digest()


def near_duplicates(thumbnails: Sequence[Thumbnail]) -> tuple[list[list[int]], bool]:
    """Groups of images (indices) that look alike, each to another of its group; whether all were followed.

    Re-encoded, slightly resized, blurred or recoloured copies are found; mirrored, rotated and cropped ones
    are not. Hashes are compared all with all, as a matrix product of +-1: about a minute at 100,000 images.
    """
    keys = [t.bits.tobytes() + t.colours.tobytes() for t in thumbnails]
    same = defaultdict(list)
    for i, key in enumerate(keys):
        same[key].append(i)
    firsts = [group[0] for group in same.values()]
    signs = np.stack([thumbnails[i].bits for i in firsts]).astype(np.float32) * 2 - 1  # (N, 128)
    colours = np.stack([thumbnails[i].colours for i in firsts])  # (N, 432)
    parent, pairs = list(range(len(firsts))), 0
    for start in range(0, len(firsts), BLOCK):
        product = signs[start : start + BLOCK] @ signs[start:].T  # (BLOCK, N - start): 128 - 2 * distance
        a, b = np.nonzero(np.triu(product >= 128 - 2 * HASH_DISTANCE, 1))
        a, b = a + start, b + start
        pairs += len(a)
        for part in range(0, len(a), 1 << 16):  # bounded memory where very many look alike
            i, j = a[part : part + (1 << 16)], b[part : part + (1 << 16)]
            apart = np.abs(colours[i].astype(np.int16) - colours[j]).mean(1)
            for x, y in zip(i[apart <= THUMBNAIL_DISTANCE], j[apart <= THUMBNAIL_DISTANCE], strict=True):
                parent[_root(parent, x)] = _root(parent, y)
        if pairs > MAX_PAIRS:
            break
    groups = defaultdict(list)
    for i, first in enumerate(firsts):
        groups[_root(parent, i)] += same[keys[first]]
    return [sorted(group) for group in groups.values() if len(group) > 1], pairs <= MAX_PAIRS


def _root(parent: list[int], i: int) -> int:
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = parent[i]
    return i


def _relation_findings(groups: list[list[Header]], headers: Sequence[Header], kind: str) -> list[dict]:
    """Findings about groups of exact or near duplicates: across train and validation, and by class."""
    findings, check = [], f"{kind} duplicates"
    mixed = [g for g in groups if len({h.split for h in g}) > 1]
    if mixed:
        n = sum(h.split == "validation" for g in mixed for h in g)
        total = sum(h.split == "validation" for h in headers)
        findings.append(
            _finding(
                LEAK,
                f"{check} across train and validation",
                f"{n} of {total} validation images are also in training",
                "A detector can have learned these images by heart: the validation score is too good.",
                "Remove them from one of the two; split by source image or person, not by file.",
                _examples(mixed, "split"),
                count=n,
            )
        )
    contrary = [g for g in groups if {FAKE, REAL} <= {h.item.label for h in g}]
    if contrary:
        n = sum(len(g) for g in contrary)
        if kind == "exact":
            severity, what = LEAK, "files are labelled both real and fake"
            why = "Nothing can be learned from these: at least one label is wrong."
        else:
            severity, what = WARNING, "images look like one of the other class"
            why = "Either a label is wrong, or the fakes were made from these reals."
        findings.append(
            _finding(
                severity,
                f"{check} across classes",
                f"{n} {what}",
                why,
                "Remove them or mend the labels. A real image and its edited copy belong on one side.",
                _examples(contrary, "label"),
                count=n,
            )
        )
    for label, name in ((REAL, "real"), (FAKE, "fake")):
        for split in ("train", "validation"):
            findings += _within_class(groups, headers, kind, label, name, split)
    return findings


def _within_class(groups, headers, kind: str, label: int, name: str, split: str) -> list[dict]:
    """The finding, if any, about repeated images in one class of one split."""
    inside = [[h for h in g if h.item.label == label and h.split == split] for g in groups]
    inside = [g for g in inside if len(g) > 1]
    extra = sum(len(g) - 1 for g in inside)
    if not extra:
        return []
    total = sum(h.item.label == label and h.split == split for h in headers)
    severity = WARNING if extra > total * (0.01 if kind == "exact" else 0.05) else NOTE
    examples = [h.item.path for h in max(inside, key=len)[:2]]
    return [
        _finding(
            severity,
            f"{kind} duplicates within {name} ({split})",
            f"{extra} of {total} images repeat another one",
            "They count several times; in a split by file, copies end up on both sides.",
            "Keep one of each.",
            examples,
            count=extra,
        )
    ]


def _examples(groups: list[list[Header]], key: str) -> list[str]:
    """Two paths of the first group, one from either side."""
    side = (lambda h: h.split) if key == "split" else (lambda h: h.item.label)
    first = groups[0][0]
    return [first.item.path, next(h.item.path for h in groups[0] if side(h) != side(first))]


# --- small things -------------------------------------------------------------------------------------------


def _suffix_findings(headers: Sequence[Header]) -> list[dict]:
    """Files that are not what their names say."""
    names = {".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF"}
    suffixes = [(h, Path(h.item.path).suffix.lower()) for h in headers]
    wrong = [h for h, suffix in suffixes if suffix and names.get(suffix, suffix[1:].upper()) != h.codec]
    if not wrong:
        return []
    text = f"{len(wrong)} files are not what their names say: the first is a {wrong[0].codec}"
    return [_finding(NOTE, "suffix", text, "", "Nothing needs doing: the content counts here.", [wrong[0].item.path])]


def _small_findings(headers: Sequence[Header]) -> list[dict]:
    """A word of caution where there are too few images for the absence of a finding to mean much."""
    fewest = min(sum(h.item.label == label and h.split == "train" for h in headers) for label in (REAL, FAKE))
    if not 0 < fewest < FEW_IMAGES:
        return []
    text = f"{fewest} images in the smaller class: only differences without any exception can be found"
    return [_finding(NOTE, "few images", text, "", f"Look at {FEW_IMAGES} a class or more.")]


def _unreadable_findings(unreadable: list[list[str]]) -> list[dict]:
    if not unreadable:
        return []
    text = f"{len(unreadable)} files cannot be read; the first: {unreadable[0][1]}"
    return [_finding(WARNING, "unreadable files", text, "", "Mend or remove them.", [unreadable[0][0]])]


def _finding(
    severity: str, check: str, message: str, shortcut: str, fix: str, examples: Sequence[str] = (), **numbers
) -> dict:
    return {
        "severity": severity,
        "check": check,
        "message": message,
        "shortcut": shortcut,
        "fix": fix,
        "examples": list(examples),
        **numbers,
    }


def _spread(headers: Sequence[Header], limit: int) -> list[Header]:
    """At most `limit` of each split and class, evenly over the list, in its order."""
    groups = defaultdict(list)
    for i, header in enumerate(headers):
        groups[header.split, header.item.label].append(i)
    chosen = [g[k] for g in groups.values() for k in np.linspace(0, len(g) - 1, min(limit, len(g))).astype(int)]
    return [headers[i] for i in sorted(chosen)]


def _count(headers: Sequence[Header]) -> dict[str, dict[str, int]]:
    """Number of files by split and class, as words."""
    counts = defaultdict(dict)
    for (split, label), n in sorted(Counter((h.split, h.item.label) for h in headers).items(), key=str):
        counts[split][{REAL: "real", FAKE: "fake"}.get(label, "unlabelled")] = n
    return dict(counts)


def _listed(numbers: dict[str, int]) -> str:
    return ", ".join(f"{n} {name}" for name, n in numbers.items())


def _threads(function: Callable, values: Sequence, title: str | None) -> list:
    """[function(v) for v in values] in threads, with a progress bar on a terminal if there is a title."""
    with ThreadPoolExecutor(WORKERS) as pool:
        results = pool.map(function, values)
        return list(tqdm(results, title, len(values), leave=False, disable=None if title else True))


# --- command line -------------------------------------------------------------------------------------------


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data.audit",
        description="What could tell real from generated images apart without looking at"
        " what was generated? Exit status: 0 no leak, 1 a leak, 2 a mistake in the call.",
    )
    parser.add_argument(
        "--data-root-pos", dest="real", nargs="+", default=[], metavar="DIR", help="folders of REAL images"
    )
    parser.add_argument(
        "--data-root-neg", dest="fake", nargs="+", default=[], metavar="DIR", help="of GENERATED images"
    )
    parser.add_argument("--data-root", dest="tree", metavar="TREE", help="a tree instead: GENERATOR/0_real, .../1_fake")
    parser.add_argument("--csv", metavar="FILE", help="a list instead: path,label[,generator] with label real or fake")
    parser.add_argument(
        "--val-root-pos", dest="val_real", nargs="+", default=[], metavar="DIR", help="REAL, validation"
    )
    parser.add_argument(
        "--val-root-neg", dest="val_fake", nargs="+", default=[], metavar="DIR", help="GENERATED, validation"
    )
    parser.add_argument("--json", metavar="FILE", help="write the findings there, too")
    text = f"compare the thumbnails of all images, not of {THUMBNAIL_LIMIT} a class (minutes at 100,000 images)"
    parser.add_argument("--full", action="store_true", help=text)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the audit and print what it found. Returns the exit status."""
    args = get_parser().parse_args(arguments)
    try:
        sources = [bool(args.real or args.fake), bool(args.tree), bool(args.csv)]
        if sum(sources) != 1:
            raise DataError("name the images in one way: --data-root-pos with --data-root-neg, --data-root, or --csv")
        if args.tree:
            train = tree_items(args.tree)
        else:
            train = csv_items(args.csv) if args.csv else folder_items(args.real, args.fake)
        validation = folder_items(args.val_real, args.val_fake) if args.val_real or args.val_fake else []
        if args.json and not Path(args.json).absolute().parent.is_dir():
            raise DataError(f"--json {args.json}: there is no such folder; make it first")
        result = audit(train, validation, args.full)
        if args.json:
            Path(args.json).write_text(json.dumps(result, indent=2) + "\n")
    except (DataError, OSError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return MISTAKE
    except KeyboardInterrupt:
        return INTERRUPTED
    sys.stdout.write("\n".join(summary_lines(result)) + "\n")
    return FOUND_LEAK if any(f["severity"] == LEAK for f in result["findings"]) else NO_LEAK


if __name__ == "__main__":
    sys.exit(main())
