"""Patches of images that carry their own coordinates, so that each patch tells where it comes from."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader

from data.patches import PatchDataset, collate_patches
from data.sampling import EpochBatches


def coordinates(height, width):
    """(3, H, W): row, column, 0."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, 0 * rows]).astype(np.uint8)


@pytest.fixture
def save(tmp_path):
    def write(name, pixels):
        Image.fromarray(pixels.transpose(1, 2, 0)).save(tmp_path / name)
        return str(tmp_path / name)

    return write


def placed(patch):
    """(top, left, which of the 8 orientations) of a patch of `coordinates`; fails if it is none."""
    rows, columns = patch[0].astype(int), patch[1].astype(int)
    top, left, side = rows.min(), columns.min(), rows.shape[0]
    upright = coordinates(256, 256)[:2, top : top + side, left : left + side]
    turned = [np.rot90(flipped, k, (1, 2)) for flipped in (upright, upright[:, :, ::-1]) for k in range(4)]
    (orientation,) = [i for i, candidate in enumerate(turned) if np.array_equal(candidate, patch[:2])]
    return top, left, orientation


def test_patches_are_aligned_squares_in_all_places_and_orientations(save):
    path = save("a.png", coordinates(19, 26))  # centre-cropped to 16 x 24: from row 1, column 1
    data = PatchDataset([path], patch_size=2, scale=4, patches_per_image=600)
    images, keys, error = data[0]
    assert images.shape == (600, 3, 8, 8) and images.dtype == torch.uint8 and images.is_contiguous()
    assert keys == [(0, 0, k) for k in range(600)] and error is None
    places = [placed(patch) for patch in images.numpy()]
    assert {t for t, _, _ in places} == {1, 5, 9} and {c for _, c, _ in places} == {1, 5, 9, 13, 17}
    counts = np.bincount([o for _, _, o in places], minlength=8)
    assert counts.min() >= 45 and counts.max() <= 105  # 600 / 8 = 75 +- 3.7 sigma


def test_downsampling_a_patch_is_taking_a_patch_of_the_downsampled_image(save):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 18, 21), np.uint8)
    patch = PatchDataset([save("a.png", pixels)], patch_size=3, scale=3)[0].images.float()
    whole = F.avg_pool2d(torch.from_numpy(pixels[:, :, :]).float()[None, :, :18, :21], 3)[0]  # (3, 6, 7)
    small = F.avg_pool2d(patch, 3)[0]  # (3, 3, 3)
    squares = [whole[:, r : r + 3, c : c + 3] for r in range(4) for c in range(5)]
    turned = [torch.rot90(f, k, (1, 2)) for s in squares for f in (s, s.flip(2)) for k in range(4)]
    assert any(torch.allclose(small, candidate) for candidate in turned)


def test_patch_depends_on_seed_epoch_and_index_alone(save):
    path = save("a.png", np.random.default_rng(0).integers(0, 256, (3, 64, 64), np.uint8))
    data = PatchDataset([path] * 3, 4, 4, seed=1)
    one = data[2, 1].images
    assert torch.equal(PatchDataset([path] * 3, 4, 4, seed=1)[2, 1].images, one)
    assert torch.equal(PatchDataset([path] * 3, 4, 4, 5, seed=1)[2, 1].images[:1], one)
    for other in (data[2, 0], data[1, 1], PatchDataset([path] * 3, 4, 4, seed=2)[2, 1]):
        assert not torch.equal(other.images, one)
    assert torch.equal(data[0, 2].images, data[2].images)  # an index alone: epoch 0


def test_image_of_exactly_one_patch(save):
    pixels = coordinates(8, 8)
    assert placed(PatchDataset([save("a.png", pixels)], 2, 4)[0].images[0].numpy())[:2] == (0, 0)


def test_errors_are_one_line_and_raised_by_nobody_in_a_worker(save, tmp_path):
    small, good = save("small.png", coordinates(95, 200)), save("good.png", coordinates(96, 96))
    (tmp_path / "zero.png").touch()
    data = PatchDataset([str(tmp_path / "zero.png"), good, small], 24, 4)
    told = "is 200 x 95 pixels, smaller than the crop of 96 x 96: use a smaller"
    assert data[2].error.startswith(f"{small}: {told}") and data[2].images.shape == (0, 3, 96, 96)
    loader = DataLoader(data, batch_sampler=EpochBatches(3, 3, 0, False), collate_fn=collate_patches, num_workers=1)
    (batch,) = loader
    assert batch.error == f"{tmp_path}/zero.png: is empty (0 bytes)"
    assert batch.images.shape == (1, 3, 96, 96) and batch.keys == [(0, 1, 0)]


def test_workers_change_nothing(save):
    rng = np.random.default_rng(0)
    paths = [save(f"{i}.png", rng.integers(0, 256, (3, 40, 48), np.uint8)) for i in range(5)]
    data = PatchDataset(paths, 4, 4, patches_per_image=2, seed=1)

    def epoch(workers):
        batches = EpochBatches(5, 2, seed=1)
        batches.set_epoch(3)
        return list(DataLoader(data, batch_sampler=batches, collate_fn=collate_patches, num_workers=workers))

    alone, helped = epoch(0), epoch(2)
    assert [b.images.shape[0] for b in alone] == [4, 4, 2]
    assert [b.keys for b in alone] == [b.keys for b in helped] and alone[0].keys[0][::2] == (3, 0)
    assert all(torch.equal(a.images, b.images) for a, b in zip(alone, helped, strict=True))
