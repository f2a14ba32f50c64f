"""A trained detector ready for use: from files, PIL images or tensors to P(fake), verdicts and residuals.

    from models import load
    detector = load("output_end2end/mine/best.pth.tar")
    detector.predict(["a.jpg", "b.png"])     # P(fake), numpy (2,)

test.py scores with the same object, so that the numbers are the same.
"""

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.datasets import Key, Sample, alike, collate
from data.images import SizePolicy, fit_size, load_image, upright_rgb
from data.lists import Item
from models import ResynthesisDetector, fingerprint, load_detector, read_checkpoint
from models.resynthesis import Compared
from utils.run import Compute, UserError, choose_compute
from utils.scores import predict

logger = logging.getLogger(__name__)

BATCH_PIXELS = 1024 * 1024  # images are scored together while they have no more pixels than this
UNNAMED = Item("a picture", None, "")
Picture = str | os.PathLike | Image.Image | Tensor  # a path, a PIL image, or uint8 (3, H, W) RGB of 0..255


def images_at_once(height: int, width: int) -> int:
    """How many images are scored together where the first of a list has this size."""
    return max(1, BATCH_PIXELS // max(1, height * width))


class Detector(NamedTuple):
    """RDN, features and classifier, and all that belongs to them."""

    network: ResynthesisDetector
    compute: Compute
    policy: SizePolicy
    calibration: Mapping  # temperature, t_real, t_fake, ...; empty: none
    config: Mapping  # how the networks are built, and the fingerprints of their weights
    seen: Tensor | None  # `data.lists.identities` of the images it was trained on

    @torch.inference_mode()
    def compare(self, images: Tensor) -> Compared:
        """images: uint8 (B, 3, H, W) of the sizes `fit` gives. Returns their re-synthesis and residuals."""
        with self.compute.autocast():
            return self.network.compare(self.compute.input(images))

    @torch.inference_mode()
    def classify(self, residual: Tensor) -> Tensor:
        """residual (B, C_l, H_l, W_l) -> logits (B, 2), columns FAKE, REAL, float32 on the CPU."""
        return self.network.classify(residual).cpu()

    def logits(self, images: Tensor) -> Tensor:
        """images: uint8 (B, 3, H, W) of the sizes `fit` gives. Returns (B, 2), columns FAKE, REAL, on the CPU."""
        return self.classify(self.compare(images).residual)

    def fit(self, picture: Picture) -> Tensor:
        """A picture as the networks get it: uint8 (3, H, W), resized and cropped as in training.

        Raises:
            UserError: if it cannot be read, or is too small.
        """
        if isinstance(picture, Image.Image):
            picture = torch.from_numpy(np.array(upright_rgb(picture.copy()))).permute(2, 0, 1)  # (3, H, W)
        elif not isinstance(picture, Tensor):
            picture = load_image(picture)  # (3, H, W)
        if picture.dtype != torch.uint8 or picture.dim() != 3 or len(picture) != 3:
            raise UserError(f"a picture of {picture.dtype} {tuple(picture.shape)}: uint8 (3, H, W) was wanted")
        return fit_size(picture, self.policy)

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
        single = isinstance(pictures, str | os.PathLike | Image.Image) or (
            isinstance(pictures, Tensor) and pictures.dim() == 3
        )
        fitted = map(self.fit, [pictures] if single else pictures)
        first = next(fitted, None)
        if first is not None:
            samples = (Sample(Key(0, i), UNNAMED, x[None]) for i, x in enumerate(chain([first], fitted)))
            ones = (collate([sample]) for sample in samples)
            yield from (batch.x for batch in alike(ones, images_at_once(*first.shape[1:]), BATCH_PIXELS))

    def identity(self) -> dict:
        """What the detector's scores depend on: the fingerprints of its weights, how it is built, its calibration."""
        own = {"classifier": fingerprint(self.network.classifier), "calibration": dict(self.calibration)}
        return {**self.config, **own}


def load(
    checkpoint: str,
    device: str | None = None,
    precision: str = "auto",
    resynthesizer: str | None = None,
    vgg_weights: str = "auto",
    options: Mapping | None = None,
) -> Detector:
    """A detector from its checkpoint, of ours or of the release.

    Args:
        device: "cpu", the number of a GPU, or None for the first GPU there is.
        precision: "auto" (TF32 on a GPU, float32 on a CPU), "fp32", "tf32", "bf16" or "fp16".
        resynthesizer: RDN's own file, where the checkpoint does not hold it (the released ones).
        vgg_weights: as `--vgg-weights`.
        options: what a released checkpoint leaves open, named as in test.py: stage, dilated, ...; resize, crop_size
            (0: none) other than in training.

    Raises:
        UserError: if something is missing, damaged, or does not belong together.
    """
    compute = choose_compute(device, precision, deterministic=False)
    return load_on(compute, checkpoint, resynthesizer, vgg_weights, options or {})


def load_on(
    compute: Compute, checkpoint: str, resynthesizer: str | None, vgg_weights: str, options: Mapping
) -> Detector:
    """`load`, where the device is chosen. options: also those of test.py that are None where nothing was asked for."""
    source = read_checkpoint(checkpoint)
    network, config = load_detector(source, read_checkpoint(resynthesizer), options, vgg_weights)
    network.to(compute.device, memory_format=torch.channels_last).eval()
    policy = SizePolicy(network.resynthesizer.scale, **sizes_to_use(config.get("images") or {}, options))
    content = source.content
    return Detector(network, compute, policy, content.get("calibration") or {}, config, content.get("trained_on"))


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
