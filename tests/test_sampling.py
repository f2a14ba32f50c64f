"""Batches: each image once an epoch, in an order that nothing but seed and epoch decides."""

import pytest
import torch
from torch.utils.data import DataLoader

from data.sampling import EpochBatches, shard


def indices(batches, epoch=0, first_step=0):
    batches.set_epoch(epoch, first_step)
    listed = list(batches)
    assert len(batches) == len(listed) and all(e == epoch for batch in listed for e, _ in batch)
    return [[i for _, i in batch] for batch in listed]


def test_each_image_once_and_the_last_smaller_batch_is_kept():
    batches = indices(EpochBatches(10, 4, seed=1))
    assert [len(b) for b in batches] == [4, 4, 2]
    assert sorted(sum(batches, [])) == list(range(10))
    assert indices(EpochBatches(5, 2, shuffle=False)) == [[0, 1], [2, 3], [4]]
    assert indices(EpochBatches(0, 2)) == []


def test_order_depends_on_seed_and_epoch_only():
    one = indices(EpochBatches(50, 8, seed=1), epoch=3)
    torch.manual_seed(5)  # the global generator has no part in it
    before = torch.get_rng_state()
    assert indices(EpochBatches(50, 8, seed=1), epoch=3) == one
    assert torch.equal(torch.get_rng_state(), before)
    assert indices(EpochBatches(50, 8, seed=1), epoch=4) != one != indices(EpochBatches(50, 8, seed=2), epoch=3)
    assert sum(indices(EpochBatches(50, 5, seed=1), epoch=3), []) == sum(one, [])  # nor has the batch size


def test_going_on_in_the_middle_of_an_epoch():
    batches = EpochBatches(23, 4, seed=2)
    whole = indices(batches, epoch=1)
    for step in range(7):
        assert indices(batches, epoch=1, first_step=step) == whole[step:]
    assert indices(batches, epoch=2) == indices(EpochBatches(23, 4, seed=2), epoch=2)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [4, 16, 17, 19])
def test_processes_share_each_global_batch(size, world_size):
    whole = indices(EpochBatches(size, 4, seed=3))
    ranks = [EpochBatches(size, 4, 3, True, rank, world_size) for rank in range(world_size)]
    parts = [indices(batches) for batches in ranks]
    for step, batch in enumerate(whole):
        real = []
        for rank, batches in enumerate(ranks):
            own, count = batches.shares(step)
            assert count == len(batch)
            real += parts[rank][step][:own]
            # whoever has none repeats the batch's first, so that every process takes every step
            assert parts[rank][step][own:] == ([] if own else [batch[0]])
            assert parts[rank][step][:own] == batch[rank::world_size]
        assert sorted(real) == sorted(batch)


def test_shares_beyond_the_end():
    assert EpochBatches(5, 2).shares(2) == (1, 1)
    assert EpochBatches(5, 2).shares(3) == (0, 0)


def test_length_of_a_loader_follows_the_epoch():
    batches = EpochBatches(10, 4)
    loader = DataLoader(range(10), batch_sampler=batches, collate_fn=list)
    assert len(loader) == 3
    batches.set_epoch(1, first_step=2)
    assert len(loader) == 1


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_shards_in_order_are_the_whole(world_size):
    items = list(range(5))
    parts = [shard(items, rank, world_size) for rank in range(world_size)]
    assert sum(parts, []) == items
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
