"""Tests of ScoreWriter, which appends rows to part files and joins the part files into a score table.

A program that is started again keeps the rows of earlier starts.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
from files import touch, user_error

from data.lists import Item
from evaluation.score_table import Row, make_rows, read_table
from evaluation.score_writer import ScoreWriter, read_file_sizes_and_times
from utils.distributed import World

COUNT = 7
JOB = {"seed": 1}


@pytest.fixture
def items(tmp_path):
    """Write COUNT empty image files. Returns their items."""
    touch(tmp_path, *(f"images/{i}.png" for i in range(COUNT)))
    return [Item(str(tmp_path / "images" / f"{i}.png"), i % 2, "g") for i in range(COUNT)]


def rows_of(items, indices, add=0.0):
    """Return a dict from image index to a row whose logit_fake is the index plus `add`."""
    rows = make_rows([items[i] for i in indices], [[i + add, 0] for i in indices])
    return dict(zip(indices, rows, strict=True))


def new_writer(folder, items, job=JOB, world=World()) -> ScoreWriter:  # noqa: B008
    """Return a ScoreWriter for the table p.csv that is not opened yet."""
    return ScoreWriter(folder / "p.csv", items, read_file_sizes_and_times(items), job, world)


def open_writer(folder, items, job=JOB) -> ScoreWriter:
    """Return an opened ScoreWriter for the table p.csv."""
    writer = new_writer(folder, items, job)
    assert writer.start_part(overwrite=False)
    return writer


def finish(writer: ScoreWriter) -> None:
    """Join all part files into the score table, write the record, and remove the part files."""
    writer.finish_table()
    writer.write_record({"metrics": None})
    writer.delete_parts()


def logits_in(folder) -> list[float]:
    """Return the column logit_fake of the table p.csv."""
    return read_table(folder / "p.csv").logits[:, 0].tolist()


def test_rows_written_in_three_starts_are_joined_into_one_table(tmp_path, items):
    touch(tmp_path, "p.csv.x.csv.0.part", "q.csv.0.part")  # part files of other tables
    first = open_writer(tmp_path, items)
    assert first.list_unscored_images(1).tolist() == list(range(COUNT))
    first.write_rows(rows_of(items, [0, 3]))
    second = open_writer(tmp_path, items)
    assert second.list_unscored_images(1).tolist() == [1, 2, 4, 5, 6]
    second.write_rows(rows_of(items, [1, 2]))
    second.write_rows(rows_of(items, [4]))
    third = open_writer(tmp_path, items)
    third.write_rows(rows_of(items, [5, 6]))
    third.finish_table()
    assert logits_in(tmp_path) == list(range(COUNT))
    open_writer(tmp_path, items).finish_table()  # the table is kept if a program is killed before it writes P.json
    finish(third)
    files = sorted(path.name for path in tmp_path.iterdir() if path.is_file())
    assert files == ["p.csv", "p.csv.x.csv.0.part", "p.json", "q.csv.0.part"]


def test_a_finished_table_is_kept_without_overwrite_and_scored_again_with_overwrite(tmp_path, items):
    writer = open_writer(tmp_path, items)
    writer.write_rows(rows_of(items, range(COUNT)))
    finish(writer)
    assert not new_writer(tmp_path, items).start_part(overwrite=False)
    again = new_writer(tmp_path, items)
    assert again.start_part(overwrite=True)
    assert len(again.list_unscored_images(1)) == COUNT
    other_job = new_writer(tmp_path, items, {"seed": 2})
    shutil.rmtree(tmp_path / "images")
    assert new_writer(tmp_path, items).identity != again.identity
    assert other_job.identity != again.identity


def test_scored_images_without_a_required_picture_are_scored_again(tmp_path, items):
    writer = open_writer(tmp_path, items)
    writer.write_rows(rows_of(items, range(COUNT - 1)) | {COUNT - 1: Row(items[-1].path, error="unreadable")})
    finish(writer)
    lacks_picture = np.isin(np.arange(COUNT), [2, 5, COUNT - 1])
    again = new_writer(tmp_path, items)
    assert again.start_part(overwrite=False, required=lacks_picture)
    assert again.list_unscored_images(1).tolist() == [2, 5]  # the unreadable last image cannot get a picture
    again.write_rows(rows_of(items, [2, 5]))
    finish(again)
    assert not new_writer(tmp_path, items).start_part(overwrite=False)


@pytest.mark.parametrize("lost", [1, 2, 30, 10_000])
def test_images_whose_rows_are_incomplete_are_scored_again(tmp_path, items, lost):
    writer = open_writer(tmp_path, items)
    writer.write_rows(rows_of(items, [0, 1]))
    writer.write_rows(rows_of(items, [2, 3]))
    part = tmp_path / "p.csv.0.part"
    content = part.read_bytes()
    if lost == 10_000:
        lost = len(content) - content.index(b"\n") - 1  # remove everything after the first line
    part.write_bytes(content[:-lost] + b"\0" * (lost == 30))  # a power failure may leave zeros in a file
    again = open_writer(tmp_path, items)
    missing = again.list_unscored_images(1).tolist()
    assert missing == {1: [4, 5, 6], 2: [3, 4, 5, 6], 30: [3, 4, 5, 6]}.get(lost, list(range(COUNT)))
    again.write_rows(rows_of(items, missing))
    again.finish_table()
    assert logits_in(tmp_path) == list(range(COUNT))


def test_images_that_have_changed_are_scored_again(tmp_path, items):
    writer = open_writer(tmp_path, items)
    writer.write_rows(rows_of(items, range(COUNT)))
    Path(items[2].path).write_bytes(b"other")
    Path(items[5].path).unlink()
    again = open_writer(tmp_path, items)
    assert again.list_unscored_images(1).tolist() == [2, 5]
    again.write_rows(rows_of(items, [2], add=0.5))
    with user_error("5.png has no row"):
        again.finish_table()
    last = open_writer(tmp_path, items)
    last.write_rows(rows_of(items, [5], add=0.5))
    last.finish_table()
    assert logits_in(tmp_path) == [0, 1, 2.5, 3, 4, 5.5, 6]


def test_part_files_of_a_run_with_other_settings_are_refused_and_kept(tmp_path, items):
    open_writer(tmp_path, items, {"seed": 1, "crops": 9}).write_rows(rows_of(items, [0]))
    before = (tmp_path / "p.csv.0.part").read_bytes()
    other = {"seed": 2, "crops": 9}
    with user_error("seed", "--overwrite"):
        new_writer(tmp_path, items, other).start_part(overwrite=False)
    assert (tmp_path / "p.csv.0.part").read_bytes() == before
    writer = new_writer(tmp_path, items, other)
    assert writer.start_part(overwrite=True)
    assert len(writer.list_unscored_images(1)) == COUNT
    assert [path.name for path in tmp_path.glob("p.csv.*")] == ["p.csv.1.part"]


def test_a_file_of_the_user_with_the_name_of_a_part_file_is_refused_and_kept(tmp_path, items):
    (tmp_path / "p.csv.0.part").write_text("mine")
    with user_error("p.csv.0.part"):
        new_writer(tmp_path, items).start_part(overwrite=False)
    assert (tmp_path / "p.csv.0.part").read_text() == "mine"


def test_two_processes_score_alternate_blocks_of_the_image_list(tmp_path, items):
    writers = [new_writer(tmp_path, items, world=World(rank, 2)) for rank in range(2)]
    assert [writer.list_unscored_images(2).tolist() for writer in writers] == [[0, 1, 4, 5], [2, 3, 6]]
    writers[1].done[2] = True
    assert writers[1].list_unscored_images(2).tolist() == [3, 6]


def test_an_image_that_is_listed_twice_has_two_rows(tmp_path, items):
    items = [*items, items[0]._replace(label=None, generator="other")]
    writer = open_writer(tmp_path, items)
    writer.write_rows(rows_of(items, range(len(items) - 1)))
    writer.finish_table()
    table = read_table(tmp_path / "p.csv")
    assert table.logits[-1].tolist() == table.logits[0].tolist()
    assert (table.generators[0], table.generators[-1]) == ("g", "other")
