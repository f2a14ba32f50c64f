"""Tests of data.datasets: the order of batches, the positions of patches and crops, and the output of data loaders."""

import math
import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from files import save_image
from trainings import CPU

from data.datasets import (
    Augmentation,
    EpochBatchSampler,
    ImageDataset,
    Key,
    PatchDataset,
    make_loader,
    merge_batches_of_equal_image_size,
)
from data.images import SizePolicy
from data.lists import Item
from data.perturbations import Perturbation, PerturbationSetting
from utils.compute import Compute
from utils.distributed import World
from utils.labels import FAKE, REAL

ON_CPU = Compute(CPU, "fp32")


def list_image_indices_of_batches(batches, epoch=0, first_step=0):
    """Return the batches of an epoch as lists of image indices."""
    batches.set_epoch(epoch, first_step)
    listed = list(batches)
    assert len(batches) == len(listed) and all(key.epoch == epoch for batch in listed for key in batch)
    return [[key.index for key in batch] for batch in listed]


def make_coordinate_image_array(height, width):
    """Return an image, uint8 (H, W, 3), in which the three channels of a pixel are its row, its column and 0."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, 0 * rows], axis=2).astype(np.uint8)


def make_labelled_image_items(*paths, label=REAL):
    """Return one `Item` object (path, label, generator) with the given label per path."""
    return [Item(path, label, "") for path in paths]


def write_random_image(path, height, width, seed=0):
    """Write an image with random pixels, and return the path of the image."""
    return save_image(path, np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


# --- order --------------------------------------------------------------------------------------------------


def test_each_image_occurs_once_in_an_epoch():
    batches = list_image_indices_of_batches(EpochBatchSampler(10, 4, seed=1))
    assert [len(batch) for batch in batches] == [4, 4, 2] and sorted(sum(batches, [])) == list(range(10))
    assert list_image_indices_of_batches(EpochBatchSampler(5, 2)) == [[0, 1], [2, 3], [4]]
    assert list_image_indices_of_batches(EpochBatchSampler(0, 2)) == []


def test_the_order_of_images_depends_only_on_seed_and_epoch():
    one = list_image_indices_of_batches(EpochBatchSampler(50, 8, seed=1), epoch=3)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert list_image_indices_of_batches(EpochBatchSampler(50, 8, seed=1), epoch=3) == one
    assert torch.equal(torch.get_rng_state(), state)
    assert list_image_indices_of_batches(EpochBatchSampler(50, 8, seed=1), epoch=4) != one
    assert list_image_indices_of_batches(EpochBatchSampler(50, 8, seed=2), epoch=3) != one
    assert sum(list_image_indices_of_batches(EpochBatchSampler(50, 5, seed=1), epoch=3), []) == sum(one, [])


def test_an_epoch_resumed_at_any_step_gives_the_remaining_batches():
    batches = EpochBatchSampler(23, 4, seed=2)
    whole = list_image_indices_of_batches(batches, epoch=1)
    for step in range(7):
        assert list_image_indices_of_batches(batches, epoch=1, first_step=step) == whole[step:]


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("count", [4, 16, 17, 19])
def test_several_processes_together_get_each_image_of_a_batch_once(count, size):
    whole = list_image_indices_of_batches(EpochBatchSampler(count, 4, seed=3))
    parts = [list(EpochBatchSampler(count, 4, 3, World(rank, size))) for rank in range(size)]
    smallest = EpochBatchSampler(count, 4, 3, World(0, size)).compute_smallest_batch_size_of_any_process()
    for step, batch in enumerate(whole):
        keys = [key for part in parts for key in part[step]]
        assert sorted(key.index for key in keys if key.weight) == sorted(batch)
        assert sum(key.weight for key in keys) == pytest.approx(1)
        # Each process for which the batch has no image gets the first image of the batch, with weight 0
        ignored = [key.index for key in keys if not key.weight]
        assert ignored == [batch[0]] * max(0, size - len(batch))
        assert all(len(part[step]) >= smallest for part in parts)


# --- patches ------------------------------------------------------------------------------------------------


def locate_patch(patch):
    """Return the position (row, column) of a patch's top left corner in the image, and its orientation (0 to 7)."""
    rows, columns = patch[0].astype(int), patch[1].astype(int)
    top, left, side = rows.min(), columns.min(), rows.shape[0]
    upright = make_coordinate_image_array(256, 256).transpose(2, 0, 1)[:2, top : top + side, left : left + side]
    variants = [np.rot90(flipped, k, (1, 2)) for flipped in (upright, upright[:, :, ::-1]) for k in range(4)]
    (orientation,) = [i for i, variant in enumerate(variants) if np.array_equal(variant, patch[:2])]
    return top, left, orientation


def test_patches_start_at_multiples_of_the_scale_and_have_all_positions_and_orientations(tmp_path):
    path = save_image(
        tmp_path / "a.png", make_coordinate_image_array(19, 26)
    )  # patches lie in the central crop of 16 x 24 pixels, which starts at row 1 and column 1
    sample = PatchDataset(make_labelled_image_items(path), patch_size=2, scale=4, patches_per_image=600)[Key(0, 0)]
    assert sample.x.shape == (600, 3, 8, 8) and sample.x.dtype == torch.uint8 and sample.error is None
    places = [locate_patch(patch) for patch in sample.x.numpy()]
    assert {top for top, _, _ in places} == {1, 5, 9}
    assert {left for _, left, _ in places} == {1, 5, 9, 13, 17}
    counts = np.bincount([orientation for _, _, orientation in places], minlength=8)
    assert counts.min() >= 45 and counts.max() <= 105  # 75 patches are expected per orientation, standard deviation 8


def test_a_downsampled_patch_equals_a_patch_of_the_downsampled_image(tmp_path):
    path = write_random_image(tmp_path / "a.png", 18, 21)
    data = PatchDataset(make_labelled_image_items(path), patch_size=3, scale=3)
    patch = F.avg_pool2d(data[Key(0, 0)].x.float(), 3)[0]  # (3, 3, 3)
    whole = ImageDataset(make_labelled_image_items(path), SizePolicy(3))[Key(0, 0)].x[0].float()
    whole = F.avg_pool2d(whole, 3)  # (3, 6, 7)
    squares = [whole[:, row : row + 3, column : column + 3] for row in range(4) for column in range(5)]
    variants = [torch.rot90(f, k, (1, 2)) for s in squares for f in (s, s.flip(2)) for k in range(4)]
    assert any(torch.allclose(patch, variant) for variant in variants)


def test_a_patch_depends_only_on_seed_epoch_and_index(tmp_path):
    path = write_random_image(tmp_path / "a.png", 64, 64)
    data = PatchDataset(make_labelled_image_items(path, path, path), 4, 4, seed=1)
    patch = data[Key(2, 1)].x
    assert torch.equal(PatchDataset(make_labelled_image_items(path, path), 4, 4, 5, seed=1)[Key(2, 1)].x[:1], patch)
    assert not torch.equal(data[Key(2, 0)].x, patch)
    assert not torch.equal(data[Key(1, 1)].x, patch)
    assert not torch.equal(PatchDataset(make_labelled_image_items(path, path), 4, 4, seed=2)[Key(2, 1)].x, patch)


# --- images -------------------------------------------------------------------------------------------------


def locate_crop(sample):
    """Return the position (row, column) of a crop's top left corner in the image, and whether the crop is mirrored."""
    rows, columns = sample.x[0, 0].int(), sample.x[0, 1].int()
    return rows.min().item(), columns.min().item(), bool(columns[0, 0] > columns[0, -1])


def test_every_epoch_uses_all_fixed_crops_at_unchanged_positions(tmp_path):
    paths = [save_image(tmp_path / f"{i}.png", make_coordinate_image_array(40 + i, 60)) for i in range(3)]
    data = ImageDataset(make_labelled_image_items(*paths), SizePolicy(4, 16), Augmentation(seed=1, crops=4))
    batches = EpochBatchSampler(len(data), 4, seed=1)
    corners = []
    for epoch in range(2):
        batches.set_epoch(epoch)
        keys = [key for batch in batches for key in batch]
        samples = {key.index: data[key] for key in keys}
        assert len(keys) == len(samples) == 12
        assert sorted(sample.item.path for sample in samples.values()) == sorted(paths * 4)
        assert (
            max(len({data.get_image_item_of_dataset_index(key.index).path for key in batch}) for batch in batches) > 1
        )
        corners.append([locate_crop(samples[index]) for index in range(12)])
    positions = [[c[:2] for c in epoch] for epoch in corners]
    assert positions[0] == positions[1] and len(set(positions[0])) > 9
    assert corners[0] != corners[1]  # some crops are mirrored in only one of the two epochs


def test_without_fixed_crops_each_epoch_crops_an_image_at_another_position(tmp_path):
    path = save_image(tmp_path / "a.png", make_coordinate_image_array(80, 90))
    data = ImageDataset(make_labelled_image_items(path), SizePolicy(4, 16), Augmentation(seed=1))
    corners = [locate_crop(data[Key(epoch, 0)]) for epoch in range(40)]
    assert len({c[:2] for c in corners}) > 35
    assert 8 < sum(mirrored for _, _, mirrored in corners) < 32
    assert [data.is_mirrored(Key(epoch, 0)) for epoch in range(40)] == [mirrored for _, _, mirrored in corners]


def test_without_augmentation_an_image_is_cropped_in_the_centre(tmp_path):
    data = ImageDataset(
        make_labelled_image_items(save_image(tmp_path / "a.png", make_coordinate_image_array(80, 90))),
        SizePolicy(4, 16),
    )
    assert {locate_crop(data[Key(epoch, 0)]) for epoch in range(5)} == {(32, 37, False)}


# --- errors of single images --------------------------------------------------------------------------------


def test_only_an_image_that_a_perturbation_cannot_process_gets_an_error(tmp_path):
    # The image has more columns than a JPEG file can have (65,535)
    long = save_image(tmp_path / "long.png", np.zeros((4, 70_000, 3), np.uint8))
    good = save_image(tmp_path / "good.png")
    transform = Perturbation(PerturbationSetting("jpeg", 90.0), "sweep", 0)
    data = ImageDataset(make_labelled_image_items(long, good), SizePolicy(4), transform=transform)
    assert data[Key(0, 0)].error.startswith(f"{long}: cannot be prepared") and data[Key(0, 0)].error.isprintable()
    assert data[Key(0, 1)].error is None


def test_only_an_image_smaller_than_the_stride_of_the_features_gets_an_error(tmp_path):
    paths = [write_random_image(tmp_path / f"{side}.png", side, side) for side in (12, 16)]
    data = ImageDataset(make_labelled_image_items(*paths), SizePolicy(4, min_side=16))
    assert "12.png: the image is 12 x 12 pixels" in data[Key(0, 0)].error
    assert data[Key(0, 1)].x.shape == (1, 3, 16, 16)


def test_a_programming_error_in_a_transform_is_raised(tmp_path):
    data = ImageDataset(
        make_labelled_image_items(save_image(tmp_path / "a.png")), SizePolicy(4), transform=lambda image: image
    )
    with pytest.raises(TypeError):
        data[Key(0, 0)]


# --- loaders ------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset_of_readable_and_unreadable_patches(tmp_path):
    """Return a dataset with two random patches of each of seven images.

    Image 1 is too small, and the file of image 3 is empty.
    """
    paths = [write_random_image(tmp_path / f"{i}.png", 40, 48, seed=i) for i in range(5)]
    paths.insert(1, save_image(tmp_path / "small.png", make_coordinate_image_array(15, 48)))
    paths.insert(3, str(tmp_path / "zero.png"))
    (tmp_path / "zero.png").touch()
    return PatchDataset(make_labelled_image_items(*paths), 4, 4, patches_per_image=2, seed=1)


def test_a_batch_contains_the_readable_images_and_the_errors_of_unreadable_images(
    dataset_of_readable_and_unreadable_patches,
):
    first, _ = make_loader(dataset_of_readable_and_unreadable_patches, EpochBatchSampler(7, 4), 0, ON_CPU)
    assert first.keys == [(0, 0, 0), (0, 0, 1), (0, 2, 0), (0, 2, 1)] and first.x.shape == (4, 3, 16, 16)
    # Each patch has the weight 1 / (4 images x 2 patches), although two of the four images are unreadable
    assert first.weights.tolist() == pytest.approx([1 / 8] * 4)
    assert "small.png: is 48 x 15" in first.errors[1] and "zero.png" in first.errors[3]


@pytest.mark.parametrize("free_bytes", [None, 0, 10**7])
def test_data_loader_workers_give_the_batches_of_the_main_process_with_and_without_shared_memory(
    dataset_of_readable_and_unreadable_patches, monkeypatch, free_bytes
):
    """If no shared memory is free, the worker processes must send batches as NumPy arrays through a pipe."""
    alone = list(make_loader(dataset_of_readable_and_unreadable_patches, EpochBatchSampler(7, 4), 0, ON_CPU))
    if free_bytes is not None:
        usage = namedtuple("usage", "total used free")(10**8, 10**8 - free_bytes, free_bytes)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    helped = list(make_loader(dataset_of_readable_and_unreadable_patches, EpochBatchSampler(7, 4), 2, ON_CPU))
    assert [(b.keys, b.errors) for b in alone] == [(b.keys, b.errors) for b in helped]
    for a, b in zip(alone, helped, strict=True):
        assert torch.equal(a.x, b.x) and torch.equal(a.labels, b.labels) and torch.equal(a.weights, b.weights)
        assert b.x.is_shared() == (free_bytes != 0)


@pytest.fixture
def dataset_of_square_and_unreadable_images(tmp_path):
    """Return a dataset of squares with sides of 8, 8, 8, 16, 16 and 8 pixels, and an unreadable image at index 4."""
    paths = [
        save_image(tmp_path / f"{i}.png", make_coordinate_image_array(side, side))
        for i, side in enumerate([8, 8, 8, 16, 16, 8])
    ]
    paths.insert(4, str(tmp_path))
    return ImageDataset(make_labelled_image_items(*paths, label=FAKE), SizePolicy(4))


def load_and_merge_batches(dataset, keys, **limits):
    """Load images one by one, merge them with merge_batches_of_equal_image_size, and return the merged batches."""
    loader = make_loader(dataset, [[Key(0, index)] for index in keys], 0, ON_CPU)
    return list(merge_batches_of_equal_image_size(loader, **limits))


def test_consecutive_images_of_equal_size_are_merged_into_one_batch(dataset_of_square_and_unreadable_images):
    batches = load_and_merge_batches(dataset_of_square_and_unreadable_images, range(7), block=100, pixels=256)
    assert [[index for _, index, _ in batch.keys] for batch in batches if batch.keys] == [[0, 1, 2], [3], [5], [6]]
    assert all(len(b.x) == len(b.labels) == len(b.weights) == len(b.items) == len(b.keys) for b in batches)
    assert [index for batch in batches for index in batch.errors] == [4]


def test_merged_batches_keep_the_pixel_limit_and_stay_within_blocks_of_consecutive_images(
    dataset_of_square_and_unreadable_images,
):
    assert [
        len(b.keys)
        for b in load_and_merge_batches(dataset_of_square_and_unreadable_images, range(3), block=100, pixels=128)
    ] == [2, 1]
    assert [
        len(b.keys)
        for b in load_and_merge_batches(dataset_of_square_and_unreadable_images, range(3), block=2, pixels=math.inf)
    ] == [2, 1]
    # Images 1 and 2 have equal sizes, but must not be merged, because the blocks of the dataset are (0, 1), (2, 3), ...
    assert [
        len(b.keys)
        for b in load_and_merge_batches(dataset_of_square_and_unreadable_images, range(1, 3), block=2, pixels=math.inf)
    ] == [1, 1]
