"""The table while it is written: parts of several processes and starts, torn, of replaced files, joined."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from files import mistake, touch

from data.lists import Item
from evaluation.score_table import make_rows, read_table
from evaluation.score_writer import ScoreWriter, file_stamps
from utils.distributed import World

N = 7


@pytest.fixture
def items(tmp_path):
    touch(tmp_path, *(f"images/{i}.png" for i in range(N)))
    return [Item(str(tmp_path / "images" / f"{i}.png"), i % 2, "g") for i in range(N)]


def rows(items, indices, add=0.0):
    """Rows whose logits tell the image, and a number that was added."""
    return dict(zip(indices, make_rows([items[i] for i in indices], [[i + add, 0] for i in indices]), strict=True))


def opened(folder: Path, items, **job) -> ScoreWriter:
    log = ScoreWriter(folder / "p.csv", items, file_stamps(items), {"stability": False, **job}, World())
    assert log.open(overwrite=False)
    return log


def test_starts_one_after_the_other_make_one_table(tmp_path, items):
    touch(tmp_path, "p.csv.x.csv.0.part", "q.csv.0.part")  # of other tables
    first = opened(tmp_path, items)
    assert first.missing(1).tolist() == list(range(N))
    first.write(rows(items, [0, 3]))
    second = opened(tmp_path, items)
    assert second.missing(1).tolist() == [1, 2, 4, 5, 6]
    second.write(rows(items, [1, 2]))
    second.write(rows(items, [4]))
    third = opened(tmp_path, items)
    third.write(rows(items, [5, 6]))
    third.close()
    assert read_table(tmp_path / "p.csv").logits[:, 0].tolist() == list(range(N))
    opened(tmp_path, items).close()  # killed before it was said to be finished: nothing is lost
    third.finish({"metrics": None})
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == [
        "p.csv", "p.csv.x.csv.0.part", "p.json", "q.csv.0.part"
    ]  # fmt: skip
    assert not ScoreWriter(tmp_path / "p.csv", items, file_stamps(items), first.job, World()).open(overwrite=False)


@pytest.mark.parametrize("lost", [1, 2, 30, 10_000])
def test_what_is_torn_does_not_count(tmp_path, items, lost):
    log = opened(tmp_path, items)
    log.write(rows(items, [0, 1]))
    log.write(rows(items, [2, 3]))  # all of a batch, or nothing of it
    part = tmp_path / "p.csv.0.part"
    part.write_bytes(part.read_bytes()[:-lost] + b"\0" * (lost == 30))  # a machine that lost power may leave zeros
    again = opened(tmp_path, items)
    missing = again.missing(1).tolist()
    assert missing == {1: [4, 5, 6], 10_000: [*range(N)]}.get(lost, [2, 3, 4, 5, 6])
    again.write(rows(items, missing))
    again.close()
    assert read_table(tmp_path / "p.csv").logits[:, 0].tolist() == list(range(N))


def test_rows_are_of_the_files_they_were_made_from(tmp_path, items):
    log = opened(tmp_path, items)
    log.write(rows(items, range(N)))
    before = file_stamps(items)
    Path(items[2].path).write_bytes(b"other")
    Path(items[5].path).unlink()
    assert np.flatnonzero((file_stamps(items) != before).any(axis=1)).tolist() == [2, 5]
    again = opened(tmp_path, items)
    assert again.missing(1).tolist() == [2, 5]
    again.write(rows(items, [2], add=0.5))
    with mistake("5.png has no row"):
        again.close()
    last = opened(tmp_path, items)
    last.write(rows(items, [5], add=0.5))
    last.close()
    assert read_table(tmp_path / "p.csv").logits[:, 0].tolist() == [0, 1, 2.5, 3, 4, 5.5, 6]


def test_parts_of_another_job(tmp_path, items):
    opened(tmp_path, items, seed=1).write(rows(items, [0]))
    with mistake("seed", "--overwrite"):
        opened(tmp_path, items, seed=2)
    other = ScoreWriter(tmp_path / "p.csv", items, file_stamps(items), {"stability": False, "seed": 2}, World())
    assert other.open(overwrite=True) and len(other.missing(1)) == N
    assert [path.name for path in tmp_path.glob("p.csv.*")] == ["p.csv.1.part"]


def test_shares_are_blocks_of_the_list(tmp_path, items):
    logs = [ScoreWriter(tmp_path / "p.csv", items, file_stamps(items), {}, World(rank, 2)) for rank in range(2)]
    assert [log.missing(2).tolist() for log in logs] == [[0, 1, 4, 5], [2, 3, 6]]
    logs[1].done[2] = True
    assert logs[1].missing(2).tolist() == [3, 6]
    shutil.rmtree(tmp_path / "images")
    assert (file_stamps(items) == -1).all()
