"""A trained detector ready for use: from files, PIL images or tensors to P(fake), verdicts and residuals.

    from evaluation import load
    detector = load("output_end2end/mine/best.pth.tar")
    detector.predict(["a.jpg", "b.png"])     # P(fake), numpy (2,)

test.py scores with the same object, so that the numbers are the same.
"""

import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, product
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.datasets import ImageDataset, Key, Sample, collate, merge_equal_sizes
from data.images import SizePolicy, check_headers, load_image, resize_and_crop, upright_rgb
from data.lists import Item
from evaluation.score_table import predict
from models.build import load_detector
from models.resynthesis import ResynthesisDetector
from utils.checkpoints import fingerprint, read_checkpoint
from utils.compute import Compute, choose_compute
from utils.console import printable
from utils.errors import UserError

logger = logging.getLogger(__name__)

CROPS = 9  # of an image, where the detector was trained on crops: docs/results.md compares 1, 4, 9 and whole images
BATCH_PIXELS = 1024 * 1024  # images are scored together while they have no more pixels than this
Picture = str | os.PathLike | Image.Image | Tensor  # a path, a PIL image, or uint8 (3, H, W) RGB of 0..255


def images_at_once(height: int, width: int) -> int:
    """How many images of this size are scored together, the first of a list having it."""
    return max(1, BATCH_PIXELS // max(1, height * width))


class Compared(NamedTuple):
    """Images and their re-synthesis."""

    x_hat: Tensor  # (B, 3, H, W), about [0, 1]
    residual: Tensor  # (B, C_l, H_l, W_l), float32, not negative


class Detector(NamedTuple):
    """RDN, features and classifier, and all that belongs to them."""

    network: ResynthesisDetector
    compute: Compute
    policy: SizePolicy
    calibration: Mapping  # temperature, t_real, t_fake, ...; empty: none
    config: Mapping  # how the networks are built, and the fingerprints of their weights
    seen: Tensor | None  # `data.lists.identities` of the images it was trained on
    crops: int = 1  # of `policy.crop_size`, over which the logits of an image are averaged; 1: the one in its centre

    @property
    def fitting(self) -> SizePolicy:
        """How images are made ready: as `policy` says, but whole where several crops are taken of them."""
        return self.policy if self.crops == 1 else self.policy._replace(crop_size=None)

    @torch.inference_mode()
    def compare(self, images: Tensor) -> Compared:
        """images: uint8 (B, 3, H, W) of the sizes `fit` gives. Returns their re-synthesis and residuals."""
        x = self.compute.input(images)  # (B, 3, H, W)
        with self.compute.autocast():
            x_hat = self.network.resynthesize(x)
            return Compared(x_hat, self.network.residual(x, x_hat))

    @torch.inference_mode()
    def score(self, images: Tensor, compared: Compared | None = None) -> tuple[Tensor, Tensor]:
        """The logits of images, and their mean residuals; of several crops their means, computed image by image.

        images: uint8 (B, 3, H, W) of the sizes `fit` gives. compared: if they are already.
        Returns (B, 2), columns FAKE, REAL, and (B,), float32 on the CPU.
        """
        if self.crops == 1:
            residual = (compared or self.compare(images)).residual  # (B, C_l, H_l, W_l)
            return self.network.classify(residual).cpu(), residual.mean(dim=(1, 2, 3)).cpu()
        side, whole = self.policy.crop_size - self.policy.crop_size % self.policy.scale, self._replace(crops=1)
        logits, means = [], []
        for image in images:
            parts = crops_of(image, side, self.crops)  # (K, 3, side, side)
            few = [whole.score(part) for part in parts.split(images_at_once(*parts.shape[2:]))]
            of_crops, means_of_crops = (torch.cat(p) for p in zip(*few, strict=True))  # (K, 2), (K,)
            logits.append(of_crops.mean(dim=0)), means.append(means_of_crops.mean())
        return torch.stack(logits), torch.stack(means)

    def logits(self, images: Tensor) -> Tensor:
        """(B, 2), see `score`."""
        return self.score(images)[0]

    def fit(self, picture: Picture) -> Tensor:
        """A picture as the networks get it: uint8 (3, H, W), resized and cropped as in training, or a UserError."""
        if isinstance(picture, Image.Image):
            picture = torch.from_numpy(np.array(upright_rgb(picture.copy()))).permute(2, 0, 1)  # (3, H, W)
        elif not isinstance(picture, Tensor):
            picture = load_image(picture)  # (3, H, W)
        if picture.dtype != torch.uint8 or picture.dim() != 3 or len(picture) != 3:
            raise UserError(f"a picture of {picture.dtype} {tuple(picture.shape)}: uint8 (3, H, W) was wanted")
        return resize_and_crop(picture, self.fitting)

    def predict(self, pictures: Iterable[Picture] | Picture) -> np.ndarray:
        """P(fake) of each picture, float64 (N,) in [0, 1], calibrated if the detector is."""
        return self._scores(pictures)[0]

    def verdict(self, pictures: Iterable[Picture] | Picture) -> list[str]:
        """real, fake or (where thresholds are fitted) unsure, for each picture."""
        return self._scores(pictures)[1]

    def residual(self, pictures: Iterable[Picture] | Picture) -> list[Tensor]:
        """What re-synthesis could not bring back of each picture: float32 (C_l, H_l, W_l), on the CPU."""
        return [residual for x in self._batches(pictures) for residual in self.compare(x).residual.cpu()]

    def _scores(self, pictures: Iterable[Picture] | Picture) -> tuple[np.ndarray, list[str]]:
        logits = [self.logits(x) for x in self._batches(pictures)]
        return predict(torch.cat(logits or [torch.empty(0, 2)]).numpy(), self.calibration)

    def _batches(self, pictures: Iterable[Picture] | Picture) -> Iterator[Tensor]:
        """The pictures in the batches (B, 3, H, W) that test.py would make of them."""
        single = getattr(pictures, "ndim", None) == 3 or isinstance(pictures, str | os.PathLike | Image.Image)
        fitted = map(self.fit, [pictures] if single else pictures)
        first = next(fitted, None)
        if first is not None:
            unnamed = Item("a picture", None, "")
            ones = (collate([Sample(Key(0, i), unnamed, x[None])]) for i, x in enumerate(chain([first], fitted)))
            yield from (batch.x for batch in merge_equal_sizes(ones, images_at_once(*first.shape[1:]), BATCH_PIXELS))

    def identity(self) -> dict:
        """What the detector's scores depend on: the fingerprints of its weights, how it is built, its calibration."""
        own = {"classifier": fingerprint(self.network.classifier), "calibration": dict(self.calibration)}
        return {**self.config, **own}

    @property
    def known_residuals(self) -> tuple[float, float]:
        """The range of the mean residuals of the images it was validated on; without bounds if that is not known."""
        least, most = (self.config.get("images") or {}).get("residual") or (None, None)
        return (0.0, math.inf) if most is None else (least, most)

    def unlike(self, paths: Sequence[str], far: Sequence[str]) -> list[str]:
        """A line for each way in which image files are unlike all that it was fitted on, where that is known.

        far: those whose mean residuals are not within `known_residuals`.
        """
        known = self.config.get("images") or {}
        if "sides" not in known:  # trained by an earlier version
            return []
        (low, high), jpegs = known["sides"], known["jpegs"]
        seen = {p: h for p, h in zip(paths, check_headers(paths, self.fitting), strict=True) if h.size}
        other_sizes = [p for p, h in seen.items() if not (self.policy.resize or low / 2 <= min(h.size) <= 4 * high)]
        ways = {
            f"have shorter sides far from its {low} to {high} pixels": other_sizes,
            "are JPEG, of which it saw none": [p for p, h in seen.items() if jpegs == 0 and h.jpeg],
            "are no JPEG, and it saw nothing else": [p for p, h in seen.items() if jpegs == 1 and not h.jpeg],
            "have mean residuals outside its {:.3g} to {:.3g}".format(*self.known_residuals): far,
        }
        text = "unlike its training images: {} of {} {} (first: {}): take these verdicts with care"
        return [text.format(len(odd), len(paths), way, printable(odd[0])) for way, odd in ways.items() if odd]


def describe_training_images(images: ImageDataset) -> dict:
    """What `Detector.unlike` has to know of training images: the range of their shorter sides; the share that is JPEG."""
    sides = [min(header.size) for header in images.headers]
    jpegs = 0.5 if images.transform else float(np.mean([header.jpeg for header in images.headers]))
    return {"sides": [min(sides), max(sides)], "jpegs": jpegs}  # perturbed: some are compressed


def crops_of(image: Tensor, side: int, count: int) -> Tensor:
    """(K, 3, side, side): `count` squares of an image (3, H, W), evenly spread from its borders in, the same ones once.

    They are in as many rows and columns as suits its shape. Where a side of the image is smaller, all of it is taken.
    """
    height, width = image.shape[1:]
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    rows = min(divisors, key=lambda n: abs(math.log(n * n * width / (count * height))))
    corners = product(_places(height - side, rows), _places(width - side, count // rows))
    return torch.stack([image[:, top : top + side, left : left + side] for top, left in corners])


def _places(free: int, count: int) -> list[int]:
    """Where `count` parts of a line begin that has `free` pixels more than one; one is in the centre."""
    free = max(free, 0)
    return sorted({i * free // (count - 1) for i in range(count)}) if count > 1 else [free // 2]


def load(
    checkpoint: str,
    device: str | Compute | None = None,
    precision: str = "auto",
    resynthesizer: str | None = None,
    vgg_weights: str = "auto",
    options: Mapping | None = None,
) -> Detector:
    """A detector from its checkpoint, of ours or of the release.

    Args:
        device: "cpu", the number of a GPU, or None for the first GPU there is; test.py gives what it has chosen.
        precision: "auto" (TF32 on a GPU, float32 on a CPU), "fp32", "tf32", "bf16" or "fp16".
        resynthesizer: RDN's own file, where the checkpoint does not hold it (the released ones).
        vgg_weights: as `--vgg-weights`.
        options: what a released checkpoint leaves open, named as in test.py: stage, dilated, ...; resize, crop_size
            (0: none) other than in training; crops. What does not belong together is a UserError.
    """
    compute = device if isinstance(device, Compute) else choose_compute(device, precision, deterministic=False)
    source = read_checkpoint(checkpoint)
    options = options or {}
    network, config = load_detector(source, read_checkpoint(resynthesizer), options, vgg_weights)
    network.to(compute.device, memory_format=torch.channels_last).eval()
    policy = SizePolicy(network.resynthesizer.scale, **sizes_to_use(config.get("images") or {}, options))
    as_in_training = policy.crop_size and options.get("crop_size") is None
    crops, content = options.get("crops") or (CROPS if as_in_training else 1), source.content
    if crops > 1 and not policy.crop_size:
        raise UserError(f"--crops {crops} needs their size: give --crop-size N (the detector was trained without)")
    if crops > 1:
        logger.info("a larger image gets the mean over %d crops (--crops N)", crops)
    calibration = content.get("calibration") or {}
    return Detector(network, compute, policy, calibration, config, content.get("trained_on"), crops)


def sizes_to_use(trained: Mapping, options: Mapping) -> dict[str, int | None]:
    """crop_size and resize: as asked for (0: none), else as in training. One line says so where they are used."""
    used = {}
    for name in ("crop_size", "resize"):
        asked, before, flag = options.get(name), trained.get(name) or None, f"--{name.replace('_', '-')}"
        used[name] = before if asked is None else asked or None
        if asked is None and before:
            logger.info("%s %d, as in training (%s 0: without)", flag, before, flag)
        elif trained and used[name] != before:
            logger.warning("warning: %s %s, and training had %s: scores may mean less", flag, asked, before or "none")
    return used
