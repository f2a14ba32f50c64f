"""Search image files for leaks.

A leak is a property of image files, such as the format, by which a detector can tell real from fake images without
looking at their content. The command `python -m tools.audit` prints the leaks and the duplicate files that this module
finds.
"""

import hashlib
import logging
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from multiprocessing.pool import ThreadPool
from typing import NamedTuple

from PIL import Image, JpegImagePlugin

from data.images import open_image
from data.lists import Item
from utils.console import make_printable, progress_bar
from utils.errors import UserError
from utils.labels import FAKE, REAL

logger = logging.getLogger(__name__)

LEAK, WARNING = "leak", "warning"
SEVERITIES = (LEAK, WARNING)
# An attribute value, such as the format PNG, is a leak if its fractions among real and among fake images differ by at least
# LEAK_DIFFERENCE, and a warning if they differ by at least WARNING_DIFFERENCE.
LEAK_DIFFERENCE, WARNING_DIFFERENCE = 0.5, 0.2
SAMPLE = 2000  # maximum number of images of one class and one split that `audit_images` reads if `quick` is True
THREADS = 8
HEAD_BYTES = 2**16  # number of first bytes that `find_duplicate_files` compares before it reads whole files
CLASSES = {REAL: "real", FAKE: "fake", None: "unlabelled"}
QUALITY_50 = 3688  # sum of the 64 luminance quantization values of libjpeg at quality 50 (ITU T.81, Annex K)
WAYS_OUT = {  # for each attribute, advice on how to remove the difference between real and fake images
    "format": "compress both classes as JPEG with the same quality, or use images that were never compressed",
    "JPEG quality": "compress both classes as JPEG with the same quality, or train with --augment-perturb",
    "size": "use images of one size, or crops of one size (--crop-size N); --resize N leaves traces of the old size",
    "shorter side": "use images of one size; after cropping or resizing, fine detail still shows the old size",
    "colour mode": "convert the images of both classes to the same colour mode",
}


class File(NamedTuple):
    """An image file, and the attributes that were read from its header."""

    item: Item
    split: str  # "train" or "validation"
    size: int = 0  # length of the file in bytes
    attributes: dict[str, str] = {}  # attributes of the image file, for example {"format": "PNG", "colour mode": "RGB"}
    error: str | None = None  # reason why the file cannot be read


class Finding(NamedTuple):
    """A problem that the leak audit has found."""

    severity: str  # LEAK if the problem can make scores meaningless, WARNING if the problem can make scores doubtful
    check: str  # name of the check, such as "format (train)" or "exact duplicates in one class"
    message: str
    way_out: str  # advice on what the user can do
    examples: list[str]  # paths of up to two files to which the finding applies


class Audit(NamedTuple):
    """The result of a leak audit."""

    files: dict[str, int]  # split and class, such as "train real" -> number of files
    checked: int  # number of files whose headers were read
    findings: list[Finding]  # first leaks, then warnings


def audit_images(train: Sequence[Item], validation: Sequence[Item] = (), quick: bool = False) -> Audit:
    """Search image files for leaks and duplicates.

    Args:
        quick: whether to read at most SAMPLE images of each class in `train` and in `validation`.
    """
    counts, selected = {}, []
    for split, items in (("train", train), ("validation", validation)):
        for label, name in CLASSES.items():
            group = [(item, split) for item in items if item.label == label]
            if group:
                counts[f"{split} {name}"] = len(group)
                step = math.ceil(len(group) / SAMPLE) if quick else 1
                selected += group[::step]
    with ThreadPool(THREADS) as pool:
        results = pool.imap(lambda pair: read_attributes_of_image_file(*pair), selected, chunksize=8)
        files = list(progress_bar(results, "leak audit", len(selected)))
    readable = [file for file in files if file.error is None]
    unreadable = [file for file in files if file.error is not None]
    findings = find_attributes_that_separate_classes(readable) + find_duplicate_files(readable)
    if unreadable:
        text = f"{len(unreadable)}, the first: {unreadable[0].error}"
        examples = [file.item.path for file in unreadable[:2]]
        findings.append(Finding(WARNING, "unreadable files", text, "repair or remove the unreadable files", examples))
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    return Audit(counts, len(readable), findings)


def run_and_log_quick_leak_audit(train_items: Sequence[Item], val_items: Sequence[Item] = ()) -> None:
    """Run a quick audit at the start of training, and log its result in a few lines."""
    result = audit_images(train_items, val_items, quick=True)
    summary = f"{len(result.findings)} finding(s), see python -m tools.audit" if result.findings else "no leaks found"
    count = len(train_items) + len(val_items)
    logger.info("leak audit read %d of %d image files, result: %s", result.checked, count, summary)
    for finding in result.findings[:3]:
        logger.warning(
            "leak audit, %(severity)s in the check of %(check)s: %(message)s",
            {"severity": finding.severity.upper(), "check": finding.check, "message": finding.message},
        )


def read_attributes_of_image_file(item: Item, split: str) -> File:
    """Read the attributes in the header of an image file."""
    try:
        with open_image(item.path) as image:
            return File(item, split, os.path.getsize(item.path), list_image_header_attributes(image))
    except UserError as error:
        return File(item, split, error=str(error))


def list_image_header_attributes(image: Image.Image) -> dict[str, str]:
    """List attributes of an image that a detector could learn: format, size, colour mode and JPEG quality."""
    width, height = image.size
    half_octaves = round(2 * math.log2(min(width, height)))
    attributes = {
        "format": image.format,
        "size": f"{width} x {height}",
        "shorter side": f"about {2 ** (half_octaves / 2):.0f}",  # length in pixels, rounded to a power of sqrt(2)
        "colour mode": image.mode,
    }
    if isinstance(image, JpegImagePlugin.JpegImageFile):  # includes MPO files, which contain several JPEG images
        luminance_table = image.quantization[min(image.quantization)]
        scale = sum(luminance_table) / QUALITY_50
        # If libjpeg saved the image with a quality setting from 20 to 99, `quality` rounds to this setting.
        quality = 50 / scale if scale > 1 else 100 - 50 * scale
        attributes["format"] = "JPEG"
        attributes["JPEG quality"] = f"quality {quality:.0f}"
    return attributes


def find_attributes_that_separate_classes(files: Sequence[File]) -> list[Finding]:
    """Find attributes whose values differ between real and fake images.

    Training and validation images are searched separately. The fake images of each single generator are compared with
    the real images only in attributes in which the fake images of all generators together do not differ.
    """
    findings = []
    for split in ("train", "validation"):
        in_split = [file for file in files if file.split == split]
        generators = sorted({file.item.generator for file in in_split if file.item.label == FAKE})
        for attribute in WAYS_OUT:
            overall = compare_attribute_of_real_and_fake(in_split, attribute, split)
            findings.append(overall)
            if overall is None and len(generators) > 1:
                for generator in generators:
                    compared = [file for file in in_split if file.item.generator in (generator, "")]  # "" means all
                    findings.append(compare_attribute_of_real_and_fake(compared, attribute, f"{split}, {generator}"))
    return [finding for finding in findings if finding is not None]


def compare_attribute_of_real_and_fake(files: Sequence[File], attribute: str, where: str) -> Finding | None:
    """Return a finding if one value of an attribute is much more frequent in one class than in the other class.

    Args:
        where: description of `files` for the finding, such as "train".
    """
    reals = [f.attributes[attribute] for f in files if f.item.label == REAL and attribute in f.attributes]
    fakes = [f.attributes[attribute] for f in files if f.item.label == FAKE and attribute in f.attributes]
    if not reals or not fakes:
        return None
    real_counts, fake_counts = Counter(reals), Counter(fakes)
    differences = {v: real_counts[v] / len(reals) - fake_counts[v] / len(fakes) for v in real_counts | fake_counts}
    value = max(differences, key=lambda v: abs(differences[v]))
    difference = abs(differences[value])
    # By chance alone, the fractions of real and of fake images with one value rarely differ by more than `three_sigma`.
    three_sigma = 1.5 * math.sqrt(1 / len(reals) + 1 / len(fakes))
    if difference < max(WARNING_DIFFERENCE, three_sigma):
        return None
    severity = LEAK if difference >= LEAK_DIFFERENCE else WARNING
    real, fake = real_counts[value] / len(reals), fake_counts[value] / len(fakes)
    message = f"{value} in {real:.0%} of the real and {fake:.0%} of the fake images"
    return Finding(severity, f"{attribute} ({where})", message, WAYS_OUT[attribute], [])


def find_duplicate_files(files: Sequence[File]) -> list[Finding]:
    """Find files with identical content.

    A file is read to the end only if another file of equal length has the same first HEAD_BYTES bytes.
    """
    copies = []
    for same_size in group_files_with_equal_key(files, lambda file: file.size):
        for same_head in group_files_with_equal_key(same_size, lambda file: hash_beginning_of_file(file, HEAD_BYTES)):
            copies += group_files_with_equal_key(same_head, lambda file: hash_beginning_of_file(file, None))
    across_splits, across_classes, within = [], [], []
    for group in copies:
        if len({file.split for file in group}) > 1:
            across_splits.append(group)
        if len({file.item.label for file in group}) > 1:
            across_classes.append(group)
        if len({(file.split, file.item.label) for file in group}) == 1:
            within.append(group)
    findings = []
    for severity, sets, groups, way_out in (
        (LEAK, "train and validation", across_splits, "remove the duplicates from one of the two sets"),
        (LEAK, "real and fake", across_classes, "one label is wrong: correct it, or remove the duplicates"),
        (WARNING, "one class", within, "keep one copy per image, because a random split may put copies into both sets"),
    ):
        if groups:
            examples = [file.item.path for file in groups[0]][:2]
            text = f"{len(groups)} images occur in more than one file"
            findings.append(Finding(severity, f"exact duplicates in {sets}", text, way_out, examples))
    return findings


def group_files_with_equal_key(files: Sequence[File], key: Callable[[File], object]) -> list[list[File]]:
    """Group files for which `key` returns equal values, and return the groups of at least two files."""
    groups = defaultdict(list)
    for file in files:
        groups[key(file)].append(file)
    return [group for group in groups.values() if len(group) > 1]


def hash_beginning_of_file(file: File, count: int | None) -> bytes:
    """Return a hash of the first `count` bytes of a file, or of the whole file if `count` is None.

    Raises:
        UserError: if the file can no longer be read.
    """
    try:
        with open(file.item.path, "rb") as opened:
            return hashlib.sha256(opened.read(count)).digest()
    except OSError as error:
        raise UserError(f"{make_printable(file.item.path)} cannot be read ({error.strerror})") from None
