"""Tests of ScoreWriter, which appends rows to part files and joins the part files into a score table."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from files import expect_user_error, write_empty_files

from data.lists import Item
from evaluation.score_table import Row, make_rows_from_logits, read_table
from evaluation.score_writer import ScoreWriter, read_file_sizes_and_times
from utils.distributed import World

COUNT = 7
SETTINGS = {"seed": 1}


@pytest.fixture
def labelled_image_list(tmp_path):
    """Write seven empty image files, and return one `Item` object (path, label, generator) per file."""
    write_empty_files(tmp_path, *(f"images/{i}.png" for i in range(COUNT)))
    return [Item(str(tmp_path / "images" / f"{i}.png"), i % 2, "g") for i in range(COUNT)]


def make_score_rows_by_image_index(items, indices, add=0.0):
    """Return a dict from image index to score table row, whose logit_fake is the image index plus `add`."""
    rows = make_rows_from_logits([items[i] for i in indices], [[i + add, 0] for i in indices])
    return dict(zip(indices, rows, strict=True))


def make_unopened_score_writer(folder, items, settings=SETTINGS, world=World()) -> ScoreWriter:  # noqa: B008
    """Return a ScoreWriter for the score table p.csv that has not created its part file yet."""
    return ScoreWriter(folder / "p.csv", items, read_file_sizes_and_times(items), settings, world)


def make_opened_score_writer(folder, items, settings=SETTINGS) -> ScoreWriter:
    """Return a ScoreWriter for the score table p.csv that has already created its part file."""
    writer = make_unopened_score_writer(folder, items, settings)
    assert writer.start_partial_table(overwrite=False)
    return writer


def write_score_table_and_json_and_delete_partial_tables(writer: ScoreWriter) -> None:
    """Join all part files into the score table p.csv, write p.json, and remove the part files."""
    writer.write_table_from_partial_tables()
    writer.write_json_record_of_score_table({"metrics": None})
    writer.delete_partial_tables()


def read_logit_fake_column(folder) -> list[float]:
    """Return the column logit_fake of the score table p.csv."""
    return read_table(folder / "p.csv").logits[:, 0].tolist()


def test_rows_of_three_successive_score_writers_are_joined_into_one_score_table(tmp_path, labelled_image_list):
    write_empty_files(tmp_path, "p.csv.x.csv.0.part", "q.csv.0.part")  # part files of other score tables
    first = make_opened_score_writer(tmp_path, labelled_image_list)
    assert first.list_unscored_images(1).tolist() == list(range(COUNT))
    first.write_rows(make_score_rows_by_image_index(labelled_image_list, [0, 3]))
    second = make_opened_score_writer(tmp_path, labelled_image_list)
    assert second.list_unscored_images(1).tolist() == [1, 2, 4, 5, 6]
    second.write_rows(make_score_rows_by_image_index(labelled_image_list, [1, 2]))
    second.write_rows(make_score_rows_by_image_index(labelled_image_list, [4]))
    third = make_opened_score_writer(tmp_path, labelled_image_list)
    third.write_rows(make_score_rows_by_image_index(labelled_image_list, [5, 6]))
    third.write_table_from_partial_tables()
    assert read_logit_fake_column(tmp_path) == list(range(COUNT))
    # `write_table_from_partial_tables` keeps the part files, so a new ScoreWriter can join the part files again
    make_opened_score_writer(tmp_path, labelled_image_list).write_table_from_partial_tables()
    write_score_table_and_json_and_delete_partial_tables(third)
    files = sorted(path.name for path in tmp_path.iterdir() if path.is_file())
    assert files == ["p.csv", "p.csv.x.csv.0.part", "p.json", "q.csv.0.part"]


def test_a_finished_score_table_is_kept_without_overwrite_and_made_again_with_overwrite(tmp_path, labelled_image_list):
    writer = make_opened_score_writer(tmp_path, labelled_image_list)
    writer.write_rows(make_score_rows_by_image_index(labelled_image_list, range(COUNT)))
    write_score_table_and_json_and_delete_partial_tables(writer)
    assert not make_unopened_score_writer(tmp_path, labelled_image_list).start_partial_table(overwrite=False)
    again = make_unopened_score_writer(tmp_path, labelled_image_list)
    assert again.start_partial_table(overwrite=True)
    assert len(again.list_unscored_images(1)) == COUNT
    other_job = make_unopened_score_writer(tmp_path, labelled_image_list, {"seed": 2})
    shutil.rmtree(tmp_path / "images")
    assert make_unopened_score_writer(tmp_path, labelled_image_list).identity != again.identity
    assert other_job.identity != again.identity


def test_images_that_lack_a_score_or_a_required_residual_picture_are_scored_again(tmp_path, labelled_image_list):
    writer = make_opened_score_writer(tmp_path, labelled_image_list)
    writer.write_rows(
        make_score_rows_by_image_index(labelled_image_list, range(COUNT - 1))
        | {COUNT - 1: Row(labelled_image_list[-1].path, error="unreadable")}
    )
    write_score_table_and_json_and_delete_partial_tables(writer)
    lacks_picture = np.isin(np.arange(COUNT), [2, 5])
    again = make_unopened_score_writer(tmp_path, labelled_image_list)
    assert again.start_partial_table(overwrite=False, without_picture=lacks_picture)
    missing = [2, 5, COUNT - 1]
    assert again.list_unscored_images(1).tolist() == missing
    again.write_rows(make_score_rows_by_image_index(labelled_image_list, missing))
    write_score_table_and_json_and_delete_partial_tables(again)
    assert not any(read_table(tmp_path / "p.csv").errors)
    assert not make_unopened_score_writer(tmp_path, labelled_image_list).start_partial_table(overwrite=False)


@pytest.mark.parametrize("lost", [1, 2, 30, 10_000])
def test_images_with_incomplete_or_missing_score_table_rows_are_scored_again(tmp_path, labelled_image_list, lost):
    writer = make_opened_score_writer(tmp_path, labelled_image_list)
    writer.write_rows(make_score_rows_by_image_index(labelled_image_list, [0, 1]))
    writer.write_rows(make_score_rows_by_image_index(labelled_image_list, [2, 3]))
    part = tmp_path / "p.csv.0.part"
    content = part.read_bytes()
    if lost == 10_000:
        lost = len(content) - content.index(b"\n") - 1  # number of bytes after the first line
    # A power failure can cut off the end of a file, and leave a zero byte there, as in the case `lost` = 30
    part.write_bytes(content[:-lost] + b"\0" * (lost == 30))
    again = make_opened_score_writer(tmp_path, labelled_image_list)
    missing = again.list_unscored_images(1).tolist()
    assert missing == {1: [4, 5, 6], 2: [3, 4, 5, 6], 30: [3, 4, 5, 6]}.get(lost, list(range(COUNT)))
    again.write_rows(make_score_rows_by_image_index(labelled_image_list, missing))
    again.write_table_from_partial_tables()
    assert read_logit_fake_column(tmp_path) == list(range(COUNT))


def test_images_that_have_changed_are_scored_again(tmp_path, labelled_image_list):
    writer = make_opened_score_writer(tmp_path, labelled_image_list)
    writer.write_rows(make_score_rows_by_image_index(labelled_image_list, range(COUNT)))
    Path(labelled_image_list[2].path).write_bytes(b"other")
    Path(labelled_image_list[5].path).unlink()
    again = make_opened_score_writer(tmp_path, labelled_image_list)
    assert again.list_unscored_images(1).tolist() == [2, 5]
    again.write_rows(make_score_rows_by_image_index(labelled_image_list, [2], add=0.5))
    with expect_user_error("5.png has no row"):
        again.write_table_from_partial_tables()
    last = make_opened_score_writer(tmp_path, labelled_image_list)
    last.write_rows(make_score_rows_by_image_index(labelled_image_list, [5], add=0.5))
    last.write_table_from_partial_tables()
    assert read_logit_fake_column(tmp_path) == [0, 1, 2.5, 3, 4, 5.5, 6]


def test_partial_tables_of_a_run_with_other_settings_are_refused_and_kept(tmp_path, labelled_image_list):
    make_opened_score_writer(tmp_path, labelled_image_list, {"seed": 1, "crops": 9}).write_rows(
        make_score_rows_by_image_index(labelled_image_list, [0])
    )
    before = (tmp_path / "p.csv.0.part").read_bytes()
    other = {"seed": 2, "crops": 9}
    with expect_user_error("seed", "--overwrite"):
        make_unopened_score_writer(tmp_path, labelled_image_list, other).start_partial_table(overwrite=False)
    assert (tmp_path / "p.csv.0.part").read_bytes() == before
    writer = make_unopened_score_writer(tmp_path, labelled_image_list, other)
    assert writer.start_partial_table(overwrite=True)
    assert len(writer.list_unscored_images(1)) == COUNT
    assert [path.name for path in tmp_path.glob("p.csv.*")] == ["p.csv.1.part"]


def test_a_file_of_the_user_with_the_name_of_a_partial_table_is_refused_and_kept(tmp_path, labelled_image_list):
    (tmp_path / "p.csv.0.part").write_text("mine")
    with expect_user_error("p.csv.0.part"):
        make_unopened_score_writer(tmp_path, labelled_image_list).start_partial_table(overwrite=False)
    assert (tmp_path / "p.csv.0.part").read_text() == "mine"


def test_two_processes_score_alternate_blocks_of_the_image_list(tmp_path, labelled_image_list):
    writers = [make_unopened_score_writer(tmp_path, labelled_image_list, world=World(rank, 2)) for rank in range(2)]
    assert [writer.list_unscored_images(2).tolist() for writer in writers] == [[0, 1, 4, 5], [2, 3, 6]]
    writers[1].done[2] = True
    assert writers[1].list_unscored_images(2).tolist() == [3, 6]


def test_an_image_that_is_listed_twice_has_two_rows(tmp_path, labelled_image_list):
    labelled_image_list = [*labelled_image_list, labelled_image_list[0]._replace(label=None, generator="other")]
    writer = make_opened_score_writer(tmp_path, labelled_image_list)
    writer.write_rows(make_score_rows_by_image_index(labelled_image_list, range(len(labelled_image_list))))
    writer.write_table_from_partial_tables()
    generators = read_table(tmp_path / "p.csv").generators
    assert read_logit_fake_column(tmp_path) == list(range(len(labelled_image_list)))
    assert (generators[0], generators[-1]) == ("g", "other")


@pytest.mark.parametrize("change", ["deleted", "exchanged"])
def test_a_finished_score_table_whose_rows_were_changed_is_refused(tmp_path, labelled_image_list, change):
    writer = make_opened_score_writer(tmp_path, labelled_image_list)
    writer.write_rows(make_score_rows_by_image_index(labelled_image_list, range(COUNT)))
    write_score_table_and_json_and_delete_partial_tables(writer)
    heading, first, second, *others = (tmp_path / "p.csv").read_text().splitlines(keepends=True)
    rows = [second, first, *others] if change == "exchanged" else [first, *others]
    (tmp_path / "p.csv").write_text("".join([heading, *rows]))
    with expect_user_error("p.csv", "changed", "--overwrite"):
        make_unopened_score_writer(tmp_path, labelled_image_list).start_partial_table(overwrite=False)
