"""What could tell real from generated images apart without looking at what was generated?

    python -m data.leaks --data-root-pos REAL_DIR --data-root-neg FAKE_DIR [--val-root-pos DIR ...]

A detector takes the easiest way: if every real image is a JPEG and every generated one a PNG, it learns JPEG. This
looks at headers, at JPEG traces in the pixels of lossless files, and for files that occur twice. It says in plain words
what it found, and the way out. Exit status: 0 no leak, 1 a leak, 2 a mistake in the call.
"""

import hashlib
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, JpegImagePlugin
from tqdm.contrib.concurrent import thread_map

from data.images import FORMATS, read_rgb
from data.lists import Item
from utils.labels import FAKE, REAL
from utils.random_streams import seeded_generator

logger = logging.getLogger(__name__)

CLASSES = {REAL: "real", FAKE: "fake", None: "unlabelled"}
LEAK, WARNING, NOTE = SEVERITIES = ("leak", "warning", "note")
THRESHOLDS = {LEAK: 0.75, WARNING: 0.6, NOTE: 0.55}  # balanced accuracy beyond chance from which on a rule is called so
SHUFFLES, CHANCE_QUANTILE = 200, 0.99  # of the labels: what chance reaches
SAMPLE = 2000  # a class and split: headers of the quick audit, pixels of the whole one
in_threads = partial(thread_map, max_workers=8, desc="audit", leave=False, disable=None)  # a bar on terminals only
END_BYTES = 4096  # of a file: they and its length tell most files apart
SUBSAMPLING = ("4:4:4", "4:2:2", "4:2:0", "other")  # by the number in Pillow: -1 is another
METADATA = ("exif", "icc_profile", "xmp", "comment", "photoshop")  # of what Pillow tells about a file
QUALITY_50 = 3688  # sum of the luminance table of ITU T.81 Annex K, which libjpeg scales by quality
# How far steps between neighbours stand out at one of 8 phases, in rows and columns: none of 420 crops of pictures, 448
# up-sampled examples reaches 2.7; at JPEG quality 90, 92 % of 512 x 512 pixels and 25 % of 128 x 128 pass 4.
GRID_SCORE, GRID_MIN_SIDE = 4.0, 64
TRACES = "JPEG traces in lossless files"
TOLD = """real: {real}; fake: {fake}. The best rule on this alone has a balanced accuracy of {balanced_accuracy:.2f} \
(chance: up to {chance:.2f})"""
REENCODE = """Take both classes through the same last step: re-encode all as JPEG of one quality, or take both from \
sources never compressed (a PNG keeps the traces of a JPEG). Where neither can be: train with --augment-perturb."""
RESIZE = """Get sources of one size, or cut equal pieces out of the pixels as they are (--crop-size N). Resizing to \
one size (--resize N) hides the size, but different factors leave different traces in the fine detail."""
# Kind of finding -> severity at worst, what a detector can make of it, the way out, attributes. Attributes of one kind
# say the same: the one that says most is told.
# fmt: off
KINDS = {
    "compression": (LEAK, "Compression shows in the pixels: JPEG leaves an 8x8 grid and removes fine detail.", REENCODE,
                    ["codec", TRACES, "JPEG quality", "JPEG chroma subsampling"]),
    "size": (LEAK, "The size itself shows, or what resizing and cropping did to detail and borders.", RESIZE,
             ["size", "shorter side", "shape"]),
    "colour": (LEAK, "Grey and palette images can be told from others at a glance.",
               "Convert both classes alike, from the same kind of source.", ["colour mode"]),
    "metadata": (WARNING, "Unseen by a detector, but the classes went through programs that may have left traces.",
                 "Find out what else these did (sharpening, resizing, colour) and convert alike.", ["metadata"]),
    "splits": (LEAK, "A detector can know these images by heart: the validation score is too good.",
               "Remove them from one of the two; split by source image or person, not by file.", []),
    "classes": (LEAK, "Nothing can be learned: at least one label is wrong.", "Remove them or mend the labels.", []),
    "copies": (WARNING, "They count several times; a split by file puts them on both sides.", "Keep one of each.", []),
    "unreadable": (WARNING, "", "Mend or remove them.", []),
}
# fmt: on


class File(NamedTuple):
    """What a file says of itself; `error` is set, and the rest empty, if it cannot be read."""

    item: Item
    group: tuple[str, str]  # "train" or "validation", and the class
    end: bytes = b""  # checksum of its length and last bytes
    attributes: dict[str, str] = {}
    error: str | None = None


def audit(train: Sequence[Item], validation: Sequence[Item] = (), quick: bool = False) -> dict:
    """Look for shortcuts and duplicates in images; quick: in headers, of at most SAMPLE a class and split.

    Returns "files" (number by split and class), "checked" (how many could be read), "findings" (worst first).
    """
    splits = {"train": train, "validation": validation}
    every = [File(item, (split, CLASSES[item.label])) for split, items in splits.items() for item in items]
    groups = grouped(every, [f.group for f in every])
    some = [g[k] for g in groups.values() for k in np.linspace(0, len(g) - 1, min(SAMPLE, len(g))).astype(int)]
    decoded = set() if quick else set(map(id, some))
    files = in_threads(lambda f: examine(f, id(f) in decoded), some if quick else every)
    good, bad = [f for f in files if not f.error], [f for f in files if f.error]
    findings = class_findings(good) + duplicate_findings(good)
    if bad:
        findings.append(finding("unreadable", "unreadable files", f"{len(bad)}; the first: {bad[0].error}", bad[:2]))
    return {
        "files": {" ".join(group): len(those) for group, those in groups.items()},
        "checked": len(good),
        "findings": sorted(findings, key=lambda f: SEVERITIES.index(f["severity"])),
    }


def finding(kind: str, check: str, message: str, files: Sequence[File] = (), severity: str = LEAK, **numbers) -> dict:
    worst, shortcut, way_out, _ = KINDS[kind]
    told = {"kind": kind, "severity": max(severity, worst, key=SEVERITIES.index), "check": check, "message": message}
    return told | {"shortcut": shortcut, "way out": way_out, "examples": [f.item.path for f in files], **numbers}


def log_quick_audit(train_items: Sequence[Item], val_items: Sequence[Item] = ()) -> None:
    """Say in a few lines of the log what the quick audit found worth a warning: for the start of a training."""
    result = audit(train_items, val_items, quick=True)
    worth = [f for f in result["findings"] if f["severity"] != NOTE]
    summary = f"{len(worth)} finding(s); python -m data.leaks tells more" if worth else "nothing found"
    logger.info("leak audit of %d of %d headers: %s", result["checked"], len(train_items) + len(val_items), summary)
    for found in worth[:3]:
        logger.warning("%s: %s: %s", found["severity"].upper(), found["check"], found["message"])


def grouped(files: Sequence[File], keys: Sequence) -> dict[object, list[File]]:
    groups = defaultdict(list)
    for file, key in zip(files, keys, strict=True):
        groups[key].append(file)
    return groups


def examine(file: File, decode: bool) -> File:
    """With its attributes, or what is wrong with it; decode: look into the pixels, too, unless it is a JPEG."""
    try:
        with open(file.item.path, "rb") as stream, Image.open(stream, formats=FORMATS) as image:
            said = attributes_of(image)
            start = stream.seek(max(0, stream.seek(0, 2) - END_BYTES))
            end = hashlib.sha256(b"%d " % start + stream.read()).digest()
        if decode and said["codec"] != "JPEG":
            grey = np.asarray(read_rgb(file.item.path).convert("L"), dtype=np.int16)  # (H, W)
            if min(grey.shape) >= GRID_MIN_SIDE:
                said[TRACES] = "8x8 grid" if min(grid_score(grey), grid_score(grey.T)) > GRID_SCORE else "no grid"
        return file._replace(attributes=said, end=end)
    except Exception as error:  # decoders of files from anywhere: struct.error, IndexError, KeyError, ...
        return file._replace(error=" ".join(str(error).split()) or type(error).__name__)


def attributes_of(image: Image.Image) -> dict[str, str]:
    """What the header says, in words."""
    width, height = image.size
    is_png = image.format == "PNG"
    known = [key for key, about in image.info.items() if key in METADATA or is_png and isinstance(about, str)]
    said = {
        "codec": image.format,
        "size": f"{width}x{height}",
        "shorter side": f"about {2 ** (round(2 * math.log2(min(width, height))) / 2):.0f}",  # 64, 91, 128, 181, ...
        "shape": "square" if width == height else "landscape" if width > height else "portrait",
        "colour mode": image.mode,
        "metadata": ", ".join(sorted(known)) or "none",
    }
    if isinstance(image, JpegImagePlugin.JpegImageFile):  # among them MPO: several in a file
        scale = sum(image.quantization[min(image.quantization)]) / QUALITY_50
        quality = 50 / scale if scale > 1 else 100 - 50 * scale  # libjpeg's rule the other way round: exact for 20..99
        said |= {"codec": "JPEG", "JPEG quality": f"quality {quality:.0f}"}
        if image.mode != "L":
            said["JPEG chroma subsampling"] = SUBSAMPLING[JpegImagePlugin.get_sampling(image)]
    return said


def grid_score(grey: np.ndarray) -> float:
    """By how many standard errors steps between columns of (H, W) exceed those at all other phases, not their mean.

    Up-sampling by two, which is no JPEG, raises every second phase.
    """
    steps = np.abs(np.diff(grey, axis=1)).mean(0)  # (W - 1,)
    excess = steps[1:-1] - (steps[:-2] + steps[2:]) / 2  # over those beside them
    periods = excess[: len(excess) // 8 * 8].reshape(-1, 8)  # (W // 8, phase)
    *_, second, best = np.sort(periods.mean(0))
    return float((best - second) / (periods.std(0).mean() / np.sqrt(len(periods)) + 1e-6))


def separation(files: Sequence[File], name: str) -> dict:
    """How well the best rule on one attribute tells the classes apart; {} where a class has no values of it.

    The rule: this value -> the class that has more of it; its balanced accuracy: half the sum over values of the larger
    class share. With few files or many values chance alone goes far above 0.5: labels are shuffled to see how far.
    """
    have = [f for f in files if name in f.attributes]
    counts = [Counter(f.attributes[name] for f in have if f.item.label == label) for label in (REAL, FAKE)]
    n_real, n_fake = counts[0].total(), counts[1].total()
    if not n_real or not n_fake:
        return {}
    kinds = sorted(counts[0] | counts[1])
    both = np.array([counts[0][v] + counts[1][v] for v in kinds])  # (V,)
    shuffled = seeded_generator(0).multivariate_hypergeometric(both, n_real, SHUFFLES, method="marginals")  # (S, V)
    real = np.vstack([[counts[0][v] for v in kinds], shuffled])  # (1 + S, V)
    reached, *by_chance = (np.maximum(real / n_real, (both - real) / n_fake).sum(1) / 2).round(9).tolist()  # 1 is 1
    expected, chance = np.mean(by_chance), float(np.quantile(by_chance, CHANCE_QUANTILE, method="higher"))
    beyond = 0.5 + (reached - expected) / (1 - expected) / 2 if expected < 1 else 0.5  # 0.5: no better than chance
    top = [", ".join(f"{v} {100 * n / c.total():.3g} %" for v, n in c.most_common(3)) for c in counts]
    numbers = {"balanced_accuracy": round(reached, 4), "chance": round(chance, 4), "real": top[0], "fake": top[1]}
    tells = reached > chance or reached == 1 and len(kinds) == 2 and min(n_real, n_fake) > 1
    return numbers | {"severity": next((s for s in SEVERITIES if tells and beyond >= THRESHOLDS[s]), None)}


def class_findings(files: Sequence[File]) -> list[dict]:
    """What tells the classes apart in each split: over all generators, and leaks of each that the whole hides."""
    findings = []
    for split, those in grouped(files, [f.group[0] for f in files]).items():
        where = f" ({split})" * (split != "train")
        overall = attribute_findings(those, where)
        known = {f["kind"] for f in overall if f["severity"] == LEAK}
        findings += overall
        generators = sorted({f.item.generator for f in those if f.item.label == FAKE})
        for generator in generators * (len(generators) > 1):
            own = [f for f in those if f.item[1:] in ((FAKE, generator), (REAL, generator), (REAL, ""))]
            found = attribute_findings(own, f" ({generator}){where}")
            findings += [f for f in found if f["severity"] == LEAK and f["kind"] not in known]
    return findings


def attribute_findings(files: Sequence[File], where: str) -> list[dict]:
    """The strongest finding of each kind."""
    findings = []
    for kind, (*_, attributes) in KINDS.items():
        found = [(name, result) for name in attributes if (result := separation(files, name)).get("severity")]
        if found:
            name, best = min(found, key=lambda f: (SEVERITIES.index(f[1]["severity"]), -f[1]["balanced_accuracy"]))
            findings.append(finding(kind, name + where, TOLD.format(**best), **best))
    return findings


def duplicate_findings(files: Sequence[File]) -> list[dict]:
    """What files with the same bytes mix up. Read are only those that end alike."""
    suspects = [f for group in grouped(files, [f.end for f in files]).values() if len(group) > 1 for f in group]
    sums = in_threads(lambda f: hashlib.sha256(Path(f.item.path).read_bytes()).digest(), suspects)
    copies = [group for group in grouped(suspects, sums).values() if len(group) > 1]
    findings = []
    for side, kind, between, text in (
        (0, "splits", "train and validation", "images occur in both"),
        (1, "classes", "classes", "files are labelled both real and fake"),
    ):
        if mixed := [sides for group in copies if len(sides := {f.group[side]: f for f in group}) > 1]:
            told = f"exact duplicates across {between}", f"{len(mixed)} {text}", list(mixed[0].values())
            findings.append(finding(kind, *told, count=len(mixed)))
    repeated = [[f for f in group if f.group == g] for group in copies for g in dict.fromkeys(f.group for f in group)]
    if extra := sum(map(len, repeated)) - len(repeated):
        severity = WARNING if extra > len(files) / 100 else NOTE
        told = f"{extra} of {len(files)} images repeat another one of their class", max(repeated, key=len)[:2]
        findings.append(finding("copies", "exact duplicates within a class", *told, severity, count=extra))
    return findings
