"""A trained detector of generated images.

    from evaluation import load
    detector = load("output_end2end/mine/best.pth.tar")
    detector.predict(["a.jpg", "b.png"])     # P(fake), numpy (2,)

P(fake) is the probability that an image is generated.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.datasets import ImageDataset
from data.images import SizePolicy, read_and_check_headers, resize_and_crop
from evaluation.calibration import probabilities_and_verdicts
from evaluation.inputs import ACCEPTED, ImageInput, cut_evenly_spread_crops, decode_image, is_one_image
from models.resynthesis import ResynthesisDetector
from utils.checkpoints import compute_fingerprint
from utils.compute import Compute
from utils.console import make_printable
from utils.errors import UserError

BATCH_PIXELS = 1024 * 1024  # maximum number of pixels in a batch; a larger image is a batch of its own


class Examination(NamedTuple):
    """The logits of one image, and the tensors from which a detector computes the logits.

    All tensors are float32 on the CPU.
    """

    x: Tensor  # the K crops of the image, (K, 3, h, w) in [0, 1]
    x_hat: Tensor  # the re-synthesized crops, (K, 3, h, w), with values mostly in [0, 1]
    residual: Tensor  # the residuals of the crops, (K, C_l, h_l, w_l)
    logits: Tensor  # (2,), the logits of FAKE and REAL, averaged over the crops
    columns: int  # number of crops in each row of crops


@dataclass(frozen=True)
class Detector:
    """A trained network with all settings that its scores depend on.

    `predict`, `verdict` and `residual` take one image or several images.
    """

    network: ResynthesisDetector
    compute: Compute
    policy: SizePolicy
    calibration: Mapping  # see `probabilities_and_verdicts`; empty if the detector is not calibrated
    config: Mapping  # architecture of the network, and hashes of its weights
    # Hashes of the training images (`data.lists.hash_image_files`), or None if the checkpoint stores no hashes
    trained_on: Tensor | None
    crops: int = 1  # number of crops per image; the logits are averaged over the crops

    def predict(self, images: Iterable[ImageInput] | ImageInput) -> np.ndarray:
        """Compute the probability P(fake) of each image, float64 (N,)."""
        prob_fake, _ = probabilities_and_verdicts(self._compute_logits_of_image_inputs(images), self.calibration)
        return prob_fake

    def verdict(self, images: Iterable[ImageInput] | ImageInput) -> list[str]:
        """Decide whether each image is "real" or "fake". A calibrated detector can also answer "unsure"."""
        _, verdicts = probabilities_and_verdicts(self._compute_logits_of_image_inputs(images), self.calibration)
        return verdicts

    def residual(self, images: Iterable[ImageInput] | ImageInput) -> list[Tensor]:
        """Compute the residual of each image, float32 (C_l, H_l, W_l), on the CPU.

        A residual is the absolute difference between the features of an image and the features of its re-synthesis, or,
        if `network.signed` is True, the features of the re-synthesis minus the features of the image. If `crops` is
        greater than 1, the residual still covers the whole image.
        """
        residuals = []
        for batch in self._group_images_into_batches(images):
            _, _, residual = self.compute_resynthesis_and_residual(batch)
            residuals.extend(residual.cpu())
        return residuals

    # --- for batches of prepared images ---

    @torch.inference_mode()
    def logits(self, images: Tensor) -> Tensor:
        """Compute the logits of images.

        Args:
            images: uint8 (B, 3, H, W), a batch of images returned by `decode_resize_and_crop_image`.

        Returns:
            The logits, float32 (B, 2), on the CPU, with the columns FAKE and REAL.
        """
        if self.crops > 1:
            return torch.stack([self._mean_logits(image) for image in images])  # (B, 2)
        return self._logits_of_whole_images(images)

    def _logits_of_whole_images(self, images: Tensor) -> Tensor:
        x = self.compute.images_to_float(images)  # (B, 3, H, W) in [0, 1]
        with self.compute.autocast():
            return self.network(x).float().cpu()  # (B, 2)

    def _mean_logits(self, image: Tensor) -> Tensor:
        """Cut an image, uint8 (3, H, W), into crops, and return the mean (2,) of the logits of the crops."""
        crops, _ = self.cut_crops(image)  # (K, 3, h, w)
        batches = crops.split(images_per_batch(*crops.shape[2:]))
        logits = [self._logits_of_whole_images(batch) for batch in batches]
        return torch.cat(logits).mean(dim=0)  # (2,)

    @torch.inference_mode()
    def compute_resynthesis_and_residual(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Re-synthesize images and compute the residual.

        Args:
            images: uint8 (B, 3, H, W).

        Returns:
            The images (B, 3, H, W) in [0, 1], the re-synthesized images (B, 3, H, W) and the residuals
            (B, C_l, H_l, W_l), on the detector's device.
        """
        x = self.compute.images_to_float(images)  # (B, 3, H, W)
        with self.compute.autocast():
            x_hat = self.network.resynthesize(x)  # (B, 3, H, W)
            return x, x_hat, self.network.residual(x, x_hat)

    @torch.inference_mode()
    def compute_resynthesis_residual_and_logits(self, image: Tensor) -> Examination:
        """Score one image, uint8 (3, H, W), and return its re-synthesis and residual together with the logits."""
        crops, columns = self.cut_crops(image) if self.crops > 1 else (image[None], 1)  # (K, 3, h, w)
        parts = []
        for batch in crops.split(images_per_batch(*crops.shape[2:])):
            x, x_hat, residual = self.compute_resynthesis_and_residual(batch)
            logits = self.network.classify(residual)  # (k, 2)
            parts.append([tensor.float().cpu() for tensor in (x, x_hat, residual, logits)])
        x, x_hat, residual, logits = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return Examination(x, x_hat, residual, logits.mean(dim=0), columns)

    def cut_crops(self, image: Tensor) -> tuple[Tensor, int]:
        """Return K crops (K, 3, h, w) of an image (3, H, W), ordered row by row, and the number of crops per row."""
        return cut_evenly_spread_crops(image, self.crop_side, self.crops)

    @property
    def crop_side(self) -> int:
        """Return the side length of a crop in pixels, which is a multiple of the super-resolution scale."""
        return self.policy.crop_size - self.policy.crop_size % self.policy.scale

    # --- preparing images ---

    @property
    def resize_and_crop_policy_for_reading(self) -> SizePolicy:
        """Return the rule by which images are resized and, if `crops` is 1, cropped when they are read."""
        return self.policy if self.crops == 1 else self.policy._replace(crop_size=None)

    def decode_resize_and_crop_image(self, image: ImageInput) -> Tensor:
        """Decode, resize and crop an image for the network. Returns a tensor, uint8 (3, H, W).

        Raises:
            UserError: if the type of the image is not accepted, or if the image cannot be decoded or is too small.
        """
        return resize_and_crop(decode_image(image), self.resize_and_crop_policy_for_reading)

    def _compute_logits_of_image_inputs(self, images: Iterable[ImageInput] | ImageInput) -> np.ndarray:
        """Compute the logits, float32 (N, 2), of one image or several images of any accepted type."""
        logits = [self.logits(batch) for batch in self._group_images_into_batches(images)]
        return torch.cat([torch.empty(0, 2), *logits]).numpy()

    def _group_images_into_batches(self, images: Iterable[ImageInput] | ImageInput) -> Iterator[Tensor]:
        """Decode, resize and crop images, and merge consecutive images of equal size into batches (B, 3, H, W)."""
        if is_one_image(images):
            images = [images]
        elif not isinstance(images, Iterable):
            raise UserError(f"expected images, each {ACCEPTED}; got {type(images).__name__}")
        waiting = []  # consecutive images of equal size for the next batch, uint8 (3, H, W)
        for image in map(self.decode_resize_and_crop_image, images):
            if waiting and (image.shape != waiting[0].shape or len(waiting) == images_per_batch(*waiting[0].shape[1:])):
                yield torch.stack(waiting)  # (B, 3, H, W)
                waiting = []
            waiting.append(image)
        if waiting:
            yield torch.stack(waiting)  # (B, 3, H, W)

    # --- what the scores depend on ---

    def describe_model(self) -> dict:
        """Return a copy of `config`, to which the calibration and a hash of the classifier's weights are added."""
        return {
            **self.config,
            "classifier_fingerprint": compute_fingerprint(self.network.classifier),
            "calibration": dict(self.calibration),
        }

    def describe_differences_from_training_images(self, paths: Sequence[str]) -> list[str]:
        """Compare image files with the training images, and list the differences in size and file format.

        Returns an empty list if the checkpoint does not describe its training images.
        """
        known = self.config.get("images") or {}
        if "sides" not in known:
            return []
        headers = read_and_check_headers(paths, self.resize_and_crop_policy_for_reading)
        smallest, largest = known["sides"]
        other_sizes, jpegs, other_formats = [], [], []
        for path, header in zip(paths, headers, strict=True):
            if header.size is None:
                continue
            side = min(header.size)
            if not self.policy.resize and not smallest / 2 <= side <= 4 * largest:
                other_sizes.append(path)
            if header.jpeg:
                jpegs.append(path)
            else:
                other_formats.append(path)
        groups = {f"have a shorter side far from the {smallest} to {largest} pixels seen in training": other_sizes}
        if known["jpegs"] == 0:
            groups["are JPEG files, and no training image was one"] = jpegs
        if known["jpegs"] == 1:
            groups["are no JPEG files, and all training images were JPEG files"] = other_formats
        lines = []
        for difference, group in groups.items():
            if group:
                count = f"{len(group)} of {len(paths)} {difference} (first: {make_printable(group[0])})"
                lines.append(f"unlike the training images: {count}. The verdicts for such images may be wrong")
        return lines


def describe_training_images(images: ImageDataset) -> dict:
    """Describe the sizes and the file formats of the training images, in a dict that is stored in the checkpoint.

    Returns:
        A dict with the entries "sides" (the minimum and the maximum, in pixels, of the images' shorter sides) and
        "jpegs" (the fraction of JPEG files). If training perturbs images, "jpegs" is instead set to 0.5, because JPEG
        compression is one of the perturbations.
    """
    sides = [min(header.size) for header in images.headers]
    jpegs = float(np.mean([header.jpeg for header in images.headers]))
    return {"sides": [min(sides), max(sides)], "jpegs": 0.5 if images.transform else jpegs}


# --- batches --------------------------------------------------------------------------------


def images_per_batch(height: int, width: int) -> int:
    """Compute how many images (3, height, width) fit into a batch of at most BATCH_PIXELS pixels."""
    return max(1, BATCH_PIXELS // max(1, height * width))
