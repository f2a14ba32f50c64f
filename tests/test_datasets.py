"""Batches: each entry once an epoch, in an order that nothing but seed and epoch decides; patches and crops of images
that carry their own coordinates, so that each tells where it comes from."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from files import save
from trainings import CPU

from data.datasets import Draws, EpochBatches, ImageDataset, Key, PatchDataset, make_loader, merge_equal_sizes
from data.images import SizePolicy
from data.lists import Item
from utils.compute import Compute
from utils.distributed import World
from utils.labels import FAKE, REAL

ON_CPU = Compute(CPU, "fp32")


def indices(batches, epoch=0, first_step=0):
    batches.set_epoch(epoch, first_step)
    listed = list(batches)
    assert len(batches) == len(listed) and all(key.epoch == epoch for batch in listed for key in batch)
    return [[key.index for key in batch] for batch in listed]


def coordinates(height, width):
    """(H, W, 3): row, column, 0."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, 0 * rows], axis=2).astype(np.uint8)


def items(*paths, label=REAL):
    return [Item(path, label, "") for path in paths]


# --- order --------------------------------------------------------------------------------------------------


def test_each_entry_once_in_an_order_of_seed_and_epoch_alone():
    batches = indices(EpochBatches(10, 4, seed=1))
    assert [len(b) for b in batches] == [4, 4, 2] and sorted(sum(batches, [])) == list(range(10))
    assert indices(EpochBatches(5, 2)) == [[0, 1], [2, 3], [4]] and indices(EpochBatches(0, 2)) == []
    one = indices(EpochBatches(50, 8, seed=1), epoch=3)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert indices(EpochBatches(50, 8, seed=1), epoch=3) == one and torch.equal(torch.get_rng_state(), before)
    assert indices(EpochBatches(50, 8, seed=1), epoch=4) != one != indices(EpochBatches(50, 8, seed=2), epoch=3)
    assert sum(indices(EpochBatches(50, 5, seed=1), epoch=3), []) == sum(one, [])  # nor does the batch size matter
    batches = EpochBatches(23, 4, seed=2)  # which goes on in the middle of an epoch
    whole = indices(batches, epoch=1)
    assert all(indices(batches, epoch=1, first_step=step) == whole[step:] for step in range(7))


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("count", [4, 16, 17, 19])
def test_processes_share_each_global_batch(count, size):
    whole = indices(EpochBatches(count, 4, seed=3))
    shares = [list(EpochBatches(count, 4, 3, World(rank, size))) for rank in range(size)]
    for step, batch in enumerate(whole):
        keys = [key for share in shares for key in share[step]]
        assert sorted(key.index for key in keys if key.weight) == sorted(batch)
        assert sum(key.weight for key in keys) == pytest.approx(1)
        fillers = [key.index for key in keys if not key.weight]  # so that every process takes every step
        assert fillers == [batch[0]] * max(0, size - len(batch))
        least = min(len([key for key in share[step] if key.weight] or [0]) for share in shares)
        assert EpochBatches(count, 4, 3, World(0, size)).smallest_share() <= least


# --- patches ------------------------------------------------------------------------------------------------


def placed(patch):
    """(top, left, which of the 8 orientations) of a patch of `coordinates`; fails if it is none."""
    rows, columns = patch[0].astype(int), patch[1].astype(int)
    top, left, side = rows.min(), columns.min(), rows.shape[0]
    upright = coordinates(256, 256).transpose(2, 0, 1)[:2, top : top + side, left : left + side]
    turned = [np.rot90(flipped, k, (1, 2)) for flipped in (upright, upright[:, :, ::-1]) for k in range(4)]
    (orientation,) = [i for i, candidate in enumerate(turned) if np.array_equal(candidate, patch[:2])]
    return top, left, orientation


def test_patches_are_aligned_squares_in_all_places_and_orientations(tmp_path):
    path = save(tmp_path / "a.png", coordinates(19, 26))  # centre-cropped to 16 x 24: from row 1, column 1
    sample = PatchDataset(items(path), patch_size=2, scale=4, patches_per_image=600)[Key(0, 0)]
    assert sample.x.shape == (600, 3, 8, 8) and sample.x.dtype == torch.uint8 and sample.error is None
    places = [placed(patch) for patch in sample.x.numpy()]
    assert {t for t, _, _ in places} == {1, 5, 9} and {c for _, c, _ in places} == {1, 5, 9, 13, 17}
    counts = np.bincount([o for _, _, o in places], minlength=8)
    assert counts.min() >= 45 and counts.max() <= 105  # 600 / 8 = 75 +- 3.7 sigma


def test_downsampling_a_patch_is_taking_a_patch_of_the_downsampled_image(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (18, 21, 3), np.uint8)
    patch = PatchDataset(items(save(tmp_path / "a.png", pixels)), 3, 3)[Key(0, 0)].x.float()
    whole = F.avg_pool2d(torch.from_numpy(pixels).permute(2, 0, 1).float(), 3)  # (3, 6, 7)
    squares = [whole[:, r : r + 3, c : c + 3] for r in range(4) for c in range(5)]
    turned = [torch.rot90(f, k, (1, 2)) for s in squares for f in (s, s.flip(2)) for k in range(4)]
    assert any(torch.allclose(F.avg_pool2d(patch, 3)[0], candidate) for candidate in turned)


def test_a_patch_depends_on_seed_epoch_and_index_alone(tmp_path):
    path = save(tmp_path / "a.png", np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    data = PatchDataset(items(path, path, path), 4, 4, seed=1)
    one = data[Key(2, 1)].x
    assert torch.equal(PatchDataset(items(path, path), 4, 4, 5, seed=1)[Key(2, 1)].x[:1], one)
    for other in (data[Key(2, 0)], data[Key(1, 1)], PatchDataset(items(path, path), 4, 4, seed=2)[Key(2, 1)]):
        assert not torch.equal(other.x, one)


def test_workers_change_nothing_and_errors_are_one_line_that_nobody_raises(tmp_path):
    rng = np.random.default_rng(0)
    paths = [save(tmp_path / f"{i}.png", rng.integers(0, 256, (40, 48, 3), np.uint8)) for i in range(5)]
    paths.insert(1, save(tmp_path / "small.png", coordinates(15, 48)))
    paths.insert(3, str(tmp_path / "zero.png"))
    (tmp_path / "zero.png").touch()
    data = PatchDataset(items(*paths), 4, 4, patches_per_image=2, seed=1)
    alone, helped = (list(make_loader(data, EpochBatches(7, 4), workers, ON_CPU)) for workers in (0, 2))
    assert [(b.keys, b.errors) for b in alone] == [(b.keys, b.errors) for b in helped]
    assert all(torch.equal(a.x, b.x) for a, b in zip(alone, helped, strict=True))
    assert alone[0].keys == [(0, i, k) for i in (0, 2) for k in range(2)] and alone[0].x.shape == (4, 3, 16, 16)
    assert alone[0].weights.tolist() == pytest.approx([1 / 8] * 4)  # of four images, of which two are missing
    assert "small.png: is 48 x 15" in alone[0].errors[1] and "zero.png" in alone[0].errors[3]


# --- images -------------------------------------------------------------------------------------------------


def corner(sample):
    """(top, left, mirrored) of a crop of `coordinates`."""
    rows, columns = sample.x[0, 0].int(), sample.x[0, 1].int()
    return rows.min().item(), columns.min().item(), bool(columns[0, 0] > columns[0, -1])


def test_all_crops_of_an_image_are_used_in_every_epoch_and_stay_what_they_are(tmp_path):
    paths = [save(tmp_path / f"{i}.png", coordinates(40 + i, 60)) for i in range(3)]
    data = ImageDataset(items(*paths), SizePolicy(4, 16), Draws(seed=1, crops=4))
    batches = EpochBatches(len(data), 4, seed=1)
    seen = []
    for epoch in range(2):
        batches.set_epoch(epoch)
        listed = [key for batch in batches for key in batch]
        samples = {key.index: data[key] for key in listed}
        assert len(listed) == len(samples) == 12
        assert sorted(s.item.path for s in samples.values()) == sorted(paths * 4)
        assert max(len({data.item(k.index).path for k in batch}) for batch in batches) > 1  # batches mix images
        seen.append({index: corner(sample) for index, sample in samples.items()})
    assert [{i: c[:2] for i, c in epoch.items()} for epoch in seen][0] == {i: c[:2] for i, c in seen[1].items()}
    assert len({c[:2] for c in seen[0].values()}) > 9  # places of their own
    assert any(seen[0][i][2] != seen[1][i][2] for i in range(12))  # but for mirroring


def test_one_crop_anew_in_each_epoch_unless_they_are_fixed(tmp_path):
    path = save(tmp_path / "a.png", coordinates(80, 90))
    data = ImageDataset(items(path), SizePolicy(4, 16), Draws(seed=1))
    places = [corner(data[Key(epoch, 0)]) for epoch in range(40)]
    assert len({p[:2] for p in places}) > 35 and 8 < sum(p[2] for p in places) < 32
    assert [data.mirrored(Key(epoch, 0)) for epoch in range(40)] == [p[2] for p in places]
    centre = ImageDataset(items(path), SizePolicy(4, 16))
    assert {corner(centre[Key(epoch, 0)]) for epoch in range(5)} == {(32, 37, False)}


def test_single_images_are_joined_while_they_are_alike(tmp_path):
    sides = [8, 8, 8, 16, 0, 16, 8]
    paths = [save(tmp_path / f"{i}.png", coordinates(n, n)) if n else str(tmp_path) for i, n in enumerate(sides)]
    data = ImageDataset(items(*paths, label=FAKE), SizePolicy(4))
    keys = [[Key(0, i)] for i in range(len(paths))]
    got = list(merge_equal_sizes(make_loader(data, keys, 0, ON_CPU), block=100, pixels=256))
    assert [[key[1] for key in b.keys] for b in got if b.keys] == [[0, 1, 2], [3], [5], [6]]
    assert all(len(b.x) == len(b.labels) == len(b.items) == len(b.keys) for b in got)
    assert [index for b in got for index in b.errors] == [4]

    def counts(first, **limits):
        return [len(b.keys) for b in merge_equal_sizes(make_loader(data, keys[first:3], 0, ON_CPU), **limits)]

    assert counts(0, block=100, pixels=128) == [2, 1] and counts(0, block=2, pixels=math.inf) == [2, 1]
    assert counts(1, block=2, pixels=math.inf) == [1, 1]  # blocks are those of the list, wherever a run goes on
