"""Tests of data.leaks, which searches a set of real and fake images for leaks.

A leak is a difference between real and fake images that the generator has not caused, for example in the file format.
"""

import os
import shutil

import numpy as np
import pytest
from PIL import Image

from data import leaks
from data.leaks import (
    LEAK,
    SAMPLE,
    WARNING,
    File,
    audit_images,
    compare_attribute_of_real_and_fake,
    list_image_header_attributes,
    run_and_log_quick_leak_audit,
)
from data.lists import Item, list_labelled_images_in_folders, list_labelled_images_in_tree
from utils.labels import FAKE, REAL

COUNT = 20  # images per class


def random_picture(seed, size=(96, 96)):
    """Return a random image that is smooth except for some noise."""
    rng = np.random.default_rng(seed)
    smooth = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    noise = rng.normal(0, 3, (size[1], size[0], 3))
    return Image.fromarray(np.clip(np.asarray(smooth) + noise, 0, 255).astype(np.uint8))


def write_pictures(folder, start, suffix=".png", count=COUNT, sizes=((96, 96),), mode="RGB", **options):
    """Write `count` different images into a folder, under their numbers from `start`, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        image = random_picture(start + i, sizes[i % len(sizes)]).convert(mode)
        image.save(folder / f"{start + i:04}{suffix}", **options)
    return folder


@pytest.fixture
def real_and_fake_paths(tmp_path):
    """Return the paths of two folders that do not exist yet: one for real images and one for fake images."""
    return tmp_path / "real", tmp_path / "fake"


def audit_folders(real, fake, **options):
    """Return the result of `audit_images` for a folder of real images and a folder of fake images."""
    return audit_images(list_labelled_images_in_folders([str(real)], [str(fake)]), **options)


def list_checks_with_findings(result):
    """Return the names of the leak checks that have reported a finding."""
    return [finding.check for finding in result.findings]


LARGE_SIZES = [(900 + 7 * i, 910 + 3 * i) for i in range(COUNT)]  # COUNT different sizes (width, height) in pixels
SMALL_SIZES = [(100 + 3 * i, 101 + 2 * i) for i in range(COUNT)]
LEAKS = {  # leak -> (arguments of `write_pictures` for real images, arguments for fake images, reported attributes)
    "format": ({"suffix": ".jpg"}, {}, ["format"]),
    "quality": ({"suffix": ".jpg", "quality": 95}, {"suffix": ".jpg", "quality": 75}, ["JPEG quality"]),
    "size": ({}, {"sizes": [(104, 96)]}, ["size"]),
    "one size": ({"sizes": SMALL_SIZES}, {"sizes": [(112, 112)]}, ["size"]),
    "sizes": ({"sizes": LARGE_SIZES}, {"sizes": SMALL_SIZES}, ["shorter side"]),
    "colour": ({"mode": "L"}, {}, ["colour mode"]),
}


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", LEAKS)
def test_the_audit_finds_each_kind_of_leak_and_reports_nothing_else(real_and_fake_paths, name, quick):
    real_options, fake_options, attributes = LEAKS[name]
    write_pictures(real_and_fake_paths[0], 0, **real_options)
    write_pictures(real_and_fake_paths[1], 100, **fake_options)
    result = audit_folders(*real_and_fake_paths, quick=quick)
    assert list_checks_with_findings(result) == [f"{attribute} (train)" for attribute in attributes]
    (finding,) = result.findings
    assert finding.severity == LEAK and finding.way_out and "of the real" in finding.message


def test_the_audit_reports_nothing_for_images_without_leaks(real_and_fake_paths):
    write_pictures(real_and_fake_paths[0], 0)
    write_pictures(real_and_fake_paths[1], 100)
    result = audit_folders(*real_and_fake_paths)
    assert result.findings == [] and result.checked == 2 * COUNT
    assert result.files == {"train real": COUNT, "train fake": COUNT}


def test_the_jpeg_quality_is_read_from_the_file(tmp_path):
    for quality in (20, 50, 75, 90, 99):
        Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", quality=quality)
        with Image.open(tmp_path / "a.jpg") as image:
            assert list_image_header_attributes(image)["JPEG quality"] == f"quality {quality}"


def test_a_leak_of_one_of_four_generators_is_found(tmp_path):
    for i, (generator, suffix) in enumerate((("a", ".png"), ("b", ".png"), ("c", ".png"), ("d", ".jpg"))):
        write_pictures(tmp_path / generator / "0_real", 1000 * i, count=COUNT)
        write_pictures(tmp_path / generator / "1_fake", 1000 * i + 500, suffix, count=6)
    (finding,) = audit_images(list_labelled_images_in_tree(str(tmp_path))).findings
    assert finding.check == "format (train, d)" and finding.severity == LEAK


def test_a_leak_in_the_validation_images_is_found(real_and_fake_paths, tmp_path):
    write_pictures(real_and_fake_paths[0], 0)
    write_pictures(real_and_fake_paths[1], 100)
    validation = list_labelled_images_in_folders(
        [str(write_pictures(tmp_path / "a", 200))],
        [str(write_pictures(tmp_path / "b", 300, ".jpg"))],
    )
    result = audit_images(
        list_labelled_images_in_folders([str(real_and_fake_paths[0])], [str(real_and_fake_paths[1])]), validation
    )
    assert list_checks_with_findings(result) == ["format (validation)"]


# --- differences --------------------------------------------------------------------------------------------


def make_file_objects_of_given_sizes(reals, fakes):
    """Return one `File` object for each image size in `reals` and in `fakes`."""
    pairs = [(REAL, value) for value in reals] + [(FAKE, value) for value in fakes]
    return [File(Item("", label, ""), "train", attributes={"size": str(value)}) for label, value in pairs]


def find_severity_of_size_difference(reals, fakes):
    """Return the severity of the size difference between real and fake images, or None without a finding."""
    finding = compare_attribute_of_real_and_fake(make_file_objects_of_given_sizes(reals, fakes), "size", "train")
    return finding and finding.severity


@pytest.mark.parametrize("real, fake, severity", [(85, 15, LEAK), (80, 35, WARNING), (55, 45, None)])
def test_the_size_of_a_difference_between_real_and_fake_files_determines_its_severity(real, fake, severity):
    reals, fakes = ("a" * n + "b" * (100 - n) for n in (real, fake))
    assert find_severity_of_size_difference(reals, fakes) == severity


def test_a_finding_reports_how_often_an_attribute_value_occurs_in_real_and_fake_images():
    finding = compare_attribute_of_real_and_fake(
        make_file_objects_of_given_sizes("aaaaaaaaab", "bbbbbbbbbb"), "size", "train"
    )
    assert finding.message == "a in 90% of the real and 0% of the fake images"


def test_a_difference_is_reported_for_five_files_per_class_and_not_for_three():
    assert find_severity_of_size_difference("aaaaa", "bbbbb") == LEAK
    assert find_severity_of_size_difference("aaa", "bbb") is None
    assert find_severity_of_size_difference("a", "b") is find_severity_of_size_difference("", "aaaaa") is None


@pytest.mark.parametrize("count, values", [(5, 2), (30, 2), (30, 200), (300, 5), (300, 1000)])
def test_random_differences_between_real_and_fake_files_are_not_reported(count, values):
    rng = np.random.default_rng(2)
    findings = [find_severity_of_size_difference(*rng.integers(0, values, (2, count))) for _ in range(40)]
    assert sum(finding is not None for finding in findings) <= 1


# --- duplicates and bad files -------------------------------------------------------------------------------


def test_duplicates_are_found_across_splits_across_classes_and_within_a_class(real_and_fake_paths, tmp_path):
    write_pictures(real_and_fake_paths[0], 0)
    write_pictures(real_and_fake_paths[1], 100)
    validation = write_pictures(tmp_path / "validation", 200, count=4)
    shutil.copy(real_and_fake_paths[0] / "0003.png", validation / "another name.png")
    shutil.copy(real_and_fake_paths[0] / "0005.png", real_and_fake_paths[1] / "real.png")
    shutil.copy(real_and_fake_paths[1] / "0107.png", real_and_fake_paths[1] / "again.png")
    train = list_labelled_images_in_folders([str(real_and_fake_paths[0])], [str(real_and_fake_paths[1])])
    result = audit_images(train, list_labelled_images_in_folders([str(validation)], []))
    found = {f.check: (f.severity, [os.path.basename(path) for path in f.examples]) for f in result.findings}
    assert found == {
        "exact duplicates in train and validation": (LEAK, ["0003.png", "another name.png"]),
        "exact duplicates in real and fake": (LEAK, ["0005.png", "real.png"]),
        "exact duplicates in one class": (WARNING, ["0107.png", "again.png"]),
    }
    assert all("1 images occur in more than one file" in finding.message for finding in result.findings)


def test_different_images_with_equal_file_sizes_are_not_reported_as_duplicates(real_and_fake_paths):
    write_pictures(real_and_fake_paths[0], 0, ".bmp")
    write_pictures(real_and_fake_paths[1], 100, ".bmp")
    assert audit_folders(*real_and_fake_paths).findings == []


def test_unreadable_files_and_named_pipes_are_reported_in_one_warning(real_and_fake_paths):
    write_pictures(real_and_fake_paths[0], 0)
    write_pictures(real_and_fake_paths[1], 100)
    (real_and_fake_paths[0] / "0000.png").write_bytes(b"not an image")
    os.mkfifo(real_and_fake_paths[1] / "pipe.png")
    result = audit_folders(*real_and_fake_paths)
    (finding,) = result.findings
    assert (finding.severity, finding.check) == (WARNING, "unreadable files") and "2, the first:" in finding.message
    assert [os.path.basename(path) for path in finding.examples] == ["0000.png", "pipe.png"]
    assert result.checked == 2 * COUNT - 1


# --- at the start of a training -----------------------------------------------------------------------------


@pytest.mark.parametrize("labelled, leaks", [(True, ["exact duplicates", "format"]), (False, ["exact duplicates"])])
def test_a_quick_audit_logs_one_summary_line_and_one_warning_per_leak(
    real_and_fake_paths, tmp_path, caplog, labelled, leaks
):
    write_pictures(real_and_fake_paths[0], 0, ".jpg")
    write_pictures(real_and_fake_paths[1], 100)
    validation = write_pictures(tmp_path / "validation", 50, ".jpg", count=8)
    shutil.copy(real_and_fake_paths[0] / "0003.jpg", validation / "other.jpg")
    sets = [
        list_labelled_images_in_folders([str(real_and_fake_paths[0])], [str(real_and_fake_paths[1])]),
        list_labelled_images_in_folders([str(validation)], []),
    ]
    if not labelled:
        sets = [[item._replace(label=None) for item in items] for items in sets]
    with caplog.at_level("INFO"):
        run_and_log_quick_leak_audit(*sets)
    assert [record.levelname for record in caplog.records] == ["INFO"] + ["WARNING"] * len(leaks)
    assert all(f"leak audit, LEAK in the check of {leak}" in caplog.text for leak in leaks)
    assert all("\n" not in record.getMessage() for record in caplog.records)


def test_a_quick_audit_of_many_files_reads_a_limited_number_of_headers(real_and_fake_paths):
    (item,) = list_labelled_images_in_folders([str(write_pictures(real_and_fake_paths[0], 0, count=1))], [])
    items = [Item(item.path, REAL, "")] * (2 * SAMPLE + 50)
    assert SAMPLE / 2 < audit_images(items, quick=True).checked <= SAMPLE


def test_files_with_the_same_size_and_beginning_are_duplicates_only_if_they_are_equal(tmp_path):
    beginning = bytes(leaks.HEAD_BYTES)
    files = []
    for name, end in (("a", b"1"), ("b", b"2"), ("c", b"1")):
        (tmp_path / name).write_bytes(beginning + end)
        files.append(File(Item(str(tmp_path / name), REAL, ""), "train", size=len(beginning) + 1))
    (finding,) = leaks.find_duplicate_files(files)
    assert finding.severity == WARNING and finding.examples == [str(tmp_path / "a"), str(tmp_path / "c")]
