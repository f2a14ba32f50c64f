"""Pictures for TensorBoard that show how end-to-end training changes the re-synthesis."""

import torch
import torch.nn.functional as F
from torch import Tensor

from data.datasets import ImageDataset
from data.degradations import TASKS, degrade_batch
from data.images import SizePolicy, read_image_as_tensor, resize_and_crop
from models.resynthesis import ResynthesisDetector, downsample
from utils.compute import Compute
from utils.errors import UserError
from utils.labels import LABEL_NAMES
from utils.random_streams import seeded_generator
from utils.run import Run

PICTURE_SIDE = 256  # maximum height and width, in pixels, of each image in a picture
PICTURE_GAIN = 4  # factor that brightens the difference between an image and its re-synthesis


def read_one_real_and_fake_image(images: ImageDataset) -> dict[str, Tensor]:
    """Read the first readable real image and the first readable fake image, and crop both to small squares.

    Returns:
        A dict with the two images, uint8 (1, 3, H, W), under the keys "real" and "fake".
    """
    examples = {}
    scale = images.policy.scale
    for item in images.items:
        label = LABEL_NAMES[item.label]
        if label in examples:
            continue
        try:
            x = resize_and_crop(read_image_as_tensor(item.path), images.policy)  # (3, H, W)
        except UserError:
            continue  # try the next image; the training loop will report the unreadable image
        side = min(PICTURE_SIDE, *x.shape[-2:])
        examples[label] = resize_and_crop(x, SizePolicy(scale, side - side % scale))[None]
        if len(examples) == len(LABEL_NAMES):
            break
    return examples


@torch.no_grad()
def write_resynthesis_pictures(
    detector: ResynthesisDetector,
    compute: Compute,
    task: str,
    run: Run,
    images: dict[str, Tensor],
    epochs_done: int,
) -> None:
    """Write pictures to TensorBoard that show an image, its re-synthesis and their difference side by side.

    With an auxiliary task, a second picture per image shows the degraded low-resolution image and its re-synthesis.
    Images and degradation are the same in every epoch, so that pictures of different epochs can be compared.

    If pictures are written, the detector is left in evaluation mode.
    """
    if run.writer is None:
        return
    detector.eval()
    scale = detector.resynthesizer.scale
    for name, image in images.items():
        x = compute.images_to_float(image)  # (1, 3, H, W)
        x_lr = downsample(x, scale)  # (1, 3, h, w)
        with compute.autocast():
            x_hat = detector.resynthesizer(x_lr)  # (1, 3, H, W)
        run.write_images_to_tensorboard(
            f"resynthesis/{name}", join_images_and_brightened_difference(x, x_hat, x), epochs_done
        )
        if TASKS[task] is None:
            continue
        degradation = TASKS[task](seeded_generator(0))
        degraded = degrade_batch(degradation, x_lr, [seeded_generator(1)])  # (1, 3, h, w)
        with compute.autocast():
            x_hat = detector.resynthesizer(degraded)  # (1, 3, H, W)
        enlarged = F.interpolate(degraded, scale_factor=scale)  # (1, 3, H, W)
        run.write_images_to_tensorboard(
            f"resynthesis/{name}_degraded", join_images_and_brightened_difference(enlarged, x_hat, x), epochs_done
        )


def join_images_and_brightened_difference(before: Tensor, x_hat: Tensor, x: Tensor) -> Tensor:
    """Join an image `before`, its re-synthesis `x_hat` and the brightened difference |x_hat - x| side by side.

    Args:
        before: the original image x or its degraded copy, (1, 3, H, W).
        x_hat: the re-synthesis of `before`, (1, 3, H, W).
        x: the original image, (1, 3, H, W).

    Returns:
        One picture (1, 3, H, 3 * W).
    """
    difference = PICTURE_GAIN * (x_hat - x).abs()
    return torch.cat([before, x_hat, difference], dim=3)
