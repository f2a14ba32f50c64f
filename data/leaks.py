"""Audit of image files for leaks: what separates real from generated images besides their content.

A detector learns the easiest rule. If every real image is a JPEG and every generated image is a PNG, it learns to
recognise JPEG. The audit reads file headers and searches for duplicates. `python -m tools.audit` prints the result.
"""

import hashlib
import logging
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, JpegImagePlugin

from data.images import open_image
from data.lists import Item
from utils.console import progress
from utils.errors import UserError
from utils.labels import FAKE, REAL

logger = logging.getLogger(__name__)

LEAK, WARNING = SEVERITIES = ("leak", "warning")
LEAK_ACCURACY, WARNING_ACCURACY = 0.75, 0.6  # balanced accuracy from which on a rule is reported
SIGNIFICANCE = 3.0  # standard deviations above chance that a rule must have
SAMPLE = 2000  # images per class and split in the quick audit
THREADS = 8
CLASSES = {REAL: "real", FAKE: "fake", None: "unlabelled"}
QUALITY_50 = 3688  # sum of the luminance table in ITU T.81 Annex K, which libjpeg scales by the quality

REENCODE = (
    "pass both classes through the same last step: compress all images as JPEG of one quality, or take both from sources"
    " that were never compressed; otherwise train with --augment-perturb"
)
RESIZE = (
    "use sources of one size, or cut out pieces of equal size without resizing (--crop-size N); --resize N hides the"
    " size, but different factors leave different traces in fine detail"
)
WAYS_OUT = {  # attribute -> how to make the classes alike
    "format": REENCODE,
    "JPEG quality": REENCODE,
    "size": RESIZE,
    "shorter side": RESIZE,
    "colour mode": "convert both classes alike, from the same kind of source",
}


class File(NamedTuple):
    """An image file with its attributes, or with an error of one line."""

    item: Item
    split: str  # train or validation
    bytes: int = 0
    attributes: dict[str, str] = {}
    error: str | None = None


class Finding(NamedTuple):
    """Something that makes the scores of a detector meaningless (LEAK) or doubtful (WARNING)."""

    severity: str
    check: str
    message: str
    way_out: str
    examples: list[str]  # paths


class Audit(NamedTuple):
    """The result of an audit."""

    files: dict[str, int]  # "train real" and so on -> number of files
    checked: int  # number of files that were read
    findings: list[Finding]  # leaks first


def audit(train: Sequence[Item], validation: Sequence[Item] = (), quick: bool = False) -> Audit:
    """Search for leaks and duplicates.

    Args:
        quick: read at most SAMPLE headers per class and split.
    """
    counts, selected = {}, []
    for split, items in (("train", train), ("validation", validation)):
        for label, name in CLASSES.items():
            group = [(item, split) for item in items if item.label == label]
            if group:
                counts[f"{split} {name}"] = len(group)
            step = math.ceil(len(group) / SAMPLE) if quick and group else 1
            selected += group[::step]
    with ThreadPool(THREADS) as pool:
        results = pool.imap(lambda pair: examine(*pair), selected, chunksize=8)
        files = list(progress(results, "leak audit", len(selected)))
    readable = [file for file in files if file.error is None]
    findings = class_findings(readable) + duplicate_findings(readable)
    errors = [file.error for file in files if file.error is not None]
    if errors:
        text = f"{len(errors)}, the first: {errors[0]}"
        examples = [file.item.path for file in files if file.error is not None][:2]
        findings.append(Finding(WARNING, "unreadable files", text, "repair or remove them", examples))
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    return Audit(counts, len(readable), findings)


def log_quick_audit(train_items: Sequence[Item], val_items: Sequence[Item] = ()) -> None:
    """Log the result of a quick audit in a few lines, at the start of a training."""
    result = audit(train_items, val_items, quick=True)
    summary = "nothing found"
    if result.findings:
        summary = f"{len(result.findings)} finding(s), see python -m tools.audit"
    logger.info("leak audit of %d of %d headers: %s", result.checked, len(train_items) + len(val_items), summary)
    for finding in result.findings[:3]:
        logger.warning("%s: %s: %s", finding.severity.upper(), finding.check, finding.message)


# --- attributes of one file ---------------------------------------------------------------------------------


def examine(item: Item, split: str) -> File:
    """Read the header of a file."""
    try:
        with open_image(item.path) as image:
            attributes = attributes_of(image)
        return File(item, split, os.path.getsize(item.path), attributes)
    except (UserError, OSError) as error:
        return File(item, split, error=str(error))


def attributes_of(image: Image.Image) -> dict[str, str]:
    """Describe the header of an image file."""
    width, height = image.size
    half_octaves = round(2 * math.log2(min(width, height)))
    attributes = {
        "format": image.format,
        "size": f"{width} x {height}",
        "shorter side": f"about {2 ** (half_octaves / 2):.0f}",  # 64, 91, 128, 181, ...
        "colour mode": image.mode,
    }
    if isinstance(image, JpegImagePlugin.JpegImageFile):  # includes MPO: several JPEGs in one file
        table = image.quantization[min(image.quantization)]  # the luminance table
        scale = sum(table) / QUALITY_50
        quality = 50 / scale if scale > 1 else 100 - 50 * scale  # exact for libjpeg's settings 20..99
        attributes["format"] = "JPEG"
        attributes["JPEG quality"] = f"{quality:.0f}"
    return attributes


# --- what separates the classes -----------------------------------------------------------------------------


def class_findings(files: Sequence[File]) -> list[Finding]:
    """Find attributes that separate the classes of a split, over all generators or for one of them."""
    findings = []
    for split in dict.fromkeys(file.split for file in files):
        own = [file for file in files if file.split == split]
        generators = sorted({file.item.generator for file in own if file.item.label == FAKE})
        for attribute in WAYS_OUT:
            overall = attribute_finding(own, attribute, split)
            if overall:
                findings.append(overall)
            elif len(generators) > 1:
                for generator in generators:
                    some = [file for file in own if belongs_to(file.item, generator)]
                    findings.append(attribute_finding(some, attribute, f"{split}, {generator}"))
    return [finding for finding in findings if finding]


def belongs_to(item: Item, generator: str) -> bool:
    """Return whether an image is a fake of a generator, or a real image that it is compared with."""
    return item.generator == generator or (item.label == REAL and item.generator == "")


def attribute_finding(files: Sequence[File], attribute: str, where: str) -> Finding | None:
    """Report an attribute if it separates the classes."""
    reals = [f.attributes[attribute] for f in files if f.item.label == REAL and attribute in f.attributes]
    fakes = [f.attributes[attribute] for f in files if f.item.label == FAKE and attribute in f.attributes]
    accuracy = rule_accuracy(reals, fakes)
    if accuracy < WARNING_ACCURACY:
        return None
    message = (
        f"real: {most_common(reals)}; fake: {most_common(fakes)}; the best rule on this alone has a balanced accuracy of"
        f" {accuracy:.2f}"
    )
    severity = LEAK if accuracy >= LEAK_ACCURACY else WARNING
    return Finding(severity, f"{attribute} ({where})", message, WAYS_OUT[attribute], [])


def most_common(values: Sequence[str]) -> str:
    """Format the most frequent values, such as "PNG 90 %, JPEG 10 %"."""
    parts = [f"{value} {100 * n / len(values):.3g} %" for value, n in Counter(values).most_common(3)]
    return ", ".join(parts)


def rule_accuracy(reals: Sequence[str], fakes: Sequence[str]) -> float:
    """Estimate how well a rule on one attribute separates the classes.

    The rule assigns each value to the class that has it more often. It is made from every second image and applied to
    the other images, and the other way round. Values that it does not know are treated like those that it saw once.

    Returns:
        The balanced accuracy, or 0.5 (chance) if it is not significantly above chance.
    """
    if min(len(reals), len(fakes)) < 2:
        return 0.5
    correct = {REAL: [], FAKE: []}
    for half in (0, 1):
        preference = preferences(reals[half::2], fakes[half::2])
        correct[REAL] += [0.5 + preference(value) / 2 for value in reals[1 - half :: 2]]
        correct[FAKE] += [0.5 - preference(value) / 2 for value in fakes[1 - half :: 2]]
    accuracy = float(np.mean([np.mean(values) for values in correct.values()]))
    chance_std = math.sqrt(1 / len(reals) + 1 / len(fakes)) / 4
    return accuracy if accuracy > 0.5 + SIGNIFICANCE * chance_std else 0.5


def preferences(reals: Sequence[str], fakes: Sequence[str]) -> Callable[[str], int]:
    """Return a function from a value to 1 (real images have it more often), -1 (fake images do) or 0."""
    real_counts, fake_counts = Counter(reals), Counter(fakes)
    real_once = list(real_counts.values()).count(1)
    fake_once = list(fake_counts.values()).count(1)

    def preference(value: str) -> int:
        real, fake = real_counts[value], fake_counts[value]
        if not real and not fake:
            real, fake = real_once, fake_once
        return int(np.sign(real / len(reals) - fake / len(fakes)))

    return preference


# --- duplicates ---------------------------------------------------------------------------------------------


def duplicate_findings(files: Sequence[File]) -> list[Finding]:
    """Find files with equal content. Only files of equal size are read."""
    by_size, by_content = defaultdict(list), defaultdict(list)
    for file in files:
        by_size[file.bytes].append(file)
    for group in by_size.values():
        for file in group if len(group) > 1 else []:
            by_content[hashlib.sha256(Path(file.item.path).read_bytes()).digest()].append(file)
    copies = [group for group in by_content.values() if len(group) > 1]
    across_splits = [group for group in copies if len({file.split for file in group}) > 1]
    across_classes = [group for group in copies if len({file.item.label for file in group}) > 1]
    within = [group for group in copies if group not in across_splits and group not in across_classes]
    checks = (
        (LEAK, "train and validation", across_splits, "remove them from one of the two sets"),
        (LEAK, "real and generated", across_classes, "at least one label is wrong: correct or remove them"),
        (WARNING, "one class", within, "keep one of each, or a split puts copies on both sides"),
    )
    findings = []
    for severity, sets, groups, way_out in checks:
        if groups:
            examples = [file.item.path for file in groups[0]][:2]
            text = f"{len(groups)} images occur more than once"
            findings.append(Finding(severity, f"exact duplicates in {sets}", text, way_out, examples))
    return findings
