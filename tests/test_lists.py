"""Tests of data.lists, which lists images from folders, folder trees, CSV tables and text files."""

import csv
import logging
import os
import shutil

import pytest
from files import expect_user_error, random_rgb_pixels, save_image, write_empty_files

from data.lists import (
    ImageFlags,
    Item,
    count_images_trained_on,
    describe_and_hash_image_files,
    describe_and_hash_image_list,
    hash_image_files,
    list_image_paths,
    list_images_without_labels,
    list_labelled_images,
    list_labelled_images_in_csv,
    list_labelled_images_in_folders,
    list_labelled_images_in_tree,
    read_path_list,
    require_real_and_fake_images,
)
from train_detector import list_validation_images
from utils.labels import FAKE, REAL


def list_relative_path_label_and_generator(root, items):
    """Convert each `Item` object to a tuple (path relative to `root`, label, generator)."""
    return [(os.path.relpath(item.path, root), item.label, item.generator) for item in items]


# --- folders ------------------------------------------------------------------------------------------------


def test_real_images_are_listed_before_fakes_and_each_fake_folder_is_one_generator(tmp_path):
    real = write_empty_files(tmp_path / "real", "2.png", "1.png")
    fakes = [write_empty_files(tmp_path / name, "b.png", "a.png") for name in ("StyleGAN", "ProGAN")]
    assert list_relative_path_label_and_generator(tmp_path, list_labelled_images_in_folders([real], fakes)) == [
        ("real/1.png", REAL, ""),
        ("real/2.png", REAL, ""),
        ("StyleGAN/a.png", FAKE, "StyleGAN"),
        ("StyleGAN/b.png", FAKE, "StyleGAN"),
        ("ProGAN/a.png", FAKE, "ProGAN"),
        ("ProGAN/b.png", FAKE, "ProGAN"),
    ]
    assert (FAKE, REAL) == (0, 1)


def test_generators_with_equal_folder_names_are_named_by_their_parent_folders(tmp_path):
    roots = [write_empty_files(tmp_path / name / "images", "a.png") for name in ("x", "y")]
    assert [item.generator for item in list_labelled_images_in_folders([], [roots[0], roots[1] + "/"])] == [
        "x/images",
        "y/images",
    ]


def test_an_image_folder_inside_another_image_folder_is_refused(tmp_path):
    real, fake = write_empty_files(tmp_path / "real", "1.png"), write_empty_files(tmp_path / "real/fake", "1.png")
    (tmp_path / "link").symlink_to(real)
    for roots in ([real], [fake]), ([fake], [real]), ([real, real + "/"], []), ([real], [str(tmp_path / "link")]):
        with expect_user_error("inside", "twice"):
            list_labelled_images_in_folders(*roots)
    with expect_user_error("no image folders"):
        list_labelled_images_in_folders([], [])


def test_the_folders_real_and_real2_are_accepted_together(tmp_path):
    one, other = write_empty_files(tmp_path / "real", "1.png"), write_empty_files(tmp_path / "real2", "1.png")
    assert len(list_labelled_images_in_folders([one], [other])) == 2


# --- trees --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("real, fake", [("0_real", "1_fake"), ("nature", "ai")])
def test_trees_in_the_layouts_of_wang_et_al_and_of_genimage_are_listed(tmp_path, real, fake):
    names = [f"progan/cat/{real}/1.png", f"progan/cat/{fake}/2.png", f"sd/{real}/3.png", f"sd/{fake}/a/4.png"]
    root = write_empty_files(tmp_path / "t", *names)
    assert list_relative_path_label_and_generator(root, list_labelled_images_in_tree(root)) == [
        (names[0], REAL, "progan"),
        (names[2], REAL, "sd"),
        (names[1], FAKE, "progan"),
        (names[3], FAKE, "sd"),
    ]
    assert {item.generator for item in list_labelled_images_in_tree(f"{root}/sd/")} == {"sd"}


def test_a_folder_tree_may_mix_class_folder_layouts_and_the_log_names_them(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    names = ["a/0_real/1.png", "a/1_fake/2.png", "b/nature/3.png", "b/ai/4.png", "b/ai/5.png", "readme/6.png"]
    root = write_empty_files(tmp_path / "t", *names)
    items = list_labelled_images_in_tree(root)
    assert {path for path, _, _ in list_relative_path_label_and_generator(root, items)} == set(names[:5])
    assert [item.label for item in items] == [REAL, REAL, FAKE, FAKE, FAKE]
    for words in ("2 0_real/1_fake", "3 nature/ai", "1 in no class folder"):
        assert words in caplog.messages[-1]


def test_training_uses_only_images_in_the_train_folders_of_a_genimage_tree(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    train = [f"sd/train/{kind}/{i}.png" for kind in ("nature", "ai") for i in range(2)]
    val = [f"sd/val/{kind}/9.png" for kind in ("nature", "ai")]
    root = write_empty_files(tmp_path / "t", *train, *val)
    items = list_labelled_images_in_tree(root, training=True)
    assert {path for path, _, _ in list_relative_path_label_and_generator(root, items)} == set(train)
    assert {item.generator for item in items} == {"sd"}
    assert "2 in val (not for training)" in caplog.text
    assert len(list_labelled_images_in_tree(root)) == 6 and "nature/ai of val" in caplog.messages[-1]
    # Training leaves out a folder val inside a tree, but uses the images in val if val is the root of the tree
    assert len(list_labelled_images_in_tree(f"{root}/sd/val", training=True)) == 2
    shutil.rmtree(tmp_path / "t/sd/train")
    with expect_user_error("no images that can be used", "2 in val"):
        list_labelled_images_in_tree(root, training=True)


def test_folder_names_below_a_class_folder_do_not_change_the_class(tmp_path):
    """Images in a folder "nature" are real, unless their path also contains a folder "1_fake"."""
    names = ["gan/nature/0_real/1.png", "gan/nature/1_fake/2.png", "gan/city/0_real/val/3.png"]
    root = write_empty_files(tmp_path / "ai", *names, "gan/city/1_fake/nature/4.png")
    assert [item.label for item in list_labelled_images_in_tree(root, training=True)] == [REAL, REAL, FAKE, FAKE]


def test_a_tree_without_class_folders_is_refused(tmp_path):
    with expect_user_error("0_real", "nature", "--data-root-pos", "1 in no class folder"):
        list_labelled_images_in_tree(write_empty_files(tmp_path / "plain", "a.png"))


# --- tables -------------------------------------------------------------------------------------------------


def test_csv_tables_with_any_column_order_and_relative_paths_are_read(tmp_path, monkeypatch):
    write_empty_files(tmp_path, "t/a.png", "t/with, comma.png", "cwd/a.png", "cwd/b.png")
    file = tmp_path / "t/list.csv"
    rows = ["a.png,REAL,,x", '"with, comma.png",fake,gan,', "b.png, Real ,,", f"{tmp_path}/t/a.png,fake,,", ""]
    file.write_bytes("\r\n".join(["\ufeffPath,label,generator,note", *rows]).encode())
    monkeypatch.chdir(tmp_path / "cwd")
    assert list_labelled_images_in_csv(str(file)) == [
        Item("a.png", REAL, ""),  # a.png in the working folder has priority over a.png in the folder of the table
        Item(f"{tmp_path}/t/with, comma.png", FAKE, "gan"),
        Item("b.png", REAL, ""),
        Item(f"{tmp_path}/t/a.png", FAKE, ""),
    ]
    file.write_text("label,path\nreal,b.png\n")
    assert list_labelled_images_in_csv("../t/list.csv") == [Item("b.png", REAL, "")]


@pytest.mark.parametrize("real, fake, lines", [("1", "0", 1), ("real", "fake", 0), ("real", "0", 1)])
def test_numeric_labels_in_a_csv_table_give_one_warning_that_1_means_real(tmp_path, caplog, real, fake, lines):
    write_empty_files(tmp_path, "a.png", "b.png")
    (tmp_path / "list.csv").write_text(f"path,label\na.png,{real}\nb.png,{fake}\n")
    assert [item.label for item in list_labelled_images_in_csv(str(tmp_path / "list.csv"))] == [REAL, FAKE]
    assert len(caplog.messages) == lines and all("1 = real" in text for text in caplog.messages)


@pytest.mark.parametrize(
    "text, words",
    [
        ("", ["line 1", "path,label"]),
        ("a.png,real\n", ["line 1", "path,label", "got"]),
        ("path;label\na.png;real\n", ["line 1", "path,label"]),
        ("path,label\n", ["lists no images"]),
        ("path,label\na.png,real\na.png,2\n", ["line 3", "real or fake", "1 = real", "2"]),
        ("path,label\na.png\n", ["line 2", "real or fake"]),
        ("path,label\n,real\n", ["line 2", "a path"]),
        ("path,label\na.png,real,x\n", ["line 2", "comma"]),
        ("path,label\na.png,real\nb.png,real\nc.png,fake\n", ["2 of 3 listed files", "b.png"]),
        ('path,label\n"a.png,real\n', ["cannot be read"]),
    ],
)
def test_an_invalid_csv_table_of_labelled_images_is_refused_with_the_reason(tmp_path, text, words):
    write_empty_files(tmp_path, "a.png")
    (tmp_path / "list.csv").write_text(text)
    with expect_user_error("list.csv", *words):
        list_labelled_images_in_csv(str(tmp_path / "list.csv"))


@pytest.mark.parametrize("read", [list_labelled_images_in_csv, read_path_list])
def test_a_folder_a_missing_file_and_an_image_are_refused_as_image_lists(tmp_path, read):
    with expect_user_error("directory"):
        read(str(tmp_path))
    with expect_user_error("No such file"):
        read("missing")
    with expect_user_error("a.png"):
        read(save_image(tmp_path / "a.png"))


# --- text lists ---------------------------------------------------------------------------------------------


def test_text_files_that_list_relative_and_absolute_image_paths_are_read(tmp_path, monkeypatch):
    write_empty_files(tmp_path, "lists/a.png", "cwd/sub/b.png")
    file = tmp_path / "lists/train.txt"
    file.write_bytes(f"a.png\r\n\nsub/b.png \n{tmp_path}/lists/a.png".encode())
    monkeypatch.chdir(tmp_path / "cwd")
    assert read_path_list(str(file)) == [f"{tmp_path}/lists/a.png", "sub/b.png", f"{tmp_path}/lists/a.png"]
    assert list_image_paths(str(file)) == read_path_list(str(file)) and list_image_paths("sub") == ["sub/b.png"]


@pytest.mark.parametrize(
    "text, words", [("a.png\nx.png\ny.png\n", ["2 of 3 listed files", "x.png"]), ("\n", ["lists no images"])]
)
def test_a_text_file_that_lists_missing_files_or_no_paths_is_refused(tmp_path, text, words):
    write_empty_files(tmp_path, "a.png")
    (tmp_path / "list.txt").write_text(text)
    with expect_user_error("list.txt", *words):
        read_path_list(str(tmp_path / "list.txt"))


ODD_NAMES = [b"caf\xe9.png", b" space .png ", "\u2028é.png".encode(), b'quote".png', b"carriage\rreturn.png"]


@pytest.mark.parametrize("name", [*ODD_NAMES, b"new\nline.png", b"end\n"])
def test_a_csv_table_can_contain_any_file_name(tmp_path, name):
    (tmp_path / os.fsdecode(name)).touch()
    path = os.path.join(tmp_path, os.fsdecode(name))
    with open(tmp_path / "list.csv", "w", newline="", errors="surrogateescape") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("path", "label"), (path, "real")])
    assert list_labelled_images_in_csv(str(tmp_path / "list.csv")) == [Item(path, REAL, "")]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_text_file_can_list_any_file_name_without_newlines(tmp_path, name):
    (tmp_path / os.fsdecode(name)).touch()
    path = os.path.join(tmp_path, os.fsdecode(name))
    (tmp_path / "list.txt").write_bytes(os.fsencode(path) + b"\n")
    assert read_path_list(str(tmp_path / "list.txt")) == [path]


# --- lists of labelled and unlabelled images ----------------------------------------------------------------


def test_labelled_images_must_be_given_as_folders_or_a_tree_or_a_table(tmp_path):
    root = write_empty_files(tmp_path / "t", "0_real/1.png", "1_fake/2.png")
    (tmp_path / "list.csv").write_text("path,label\nt/0_real/1.png,real\n")
    real, fake, table = f"{root}/0_real", f"{root}/1_fake", str(tmp_path / "list.csv")
    assert list_labelled_images([real], [fake]) == list_labelled_images_in_folders([real], [fake])
    assert list_labelled_images(None, None, root) == list_labelled_images_in_tree(root)
    assert list_labelled_images(None, None, None, table) == list_labelled_images_in_csv(table)
    with expect_user_error("no images", "--data-root-pos", "--data-root", "--csv"):
        list_labelled_images(None, None)
    with expect_user_error("more than one way"):
        list_labelled_images([real], [fake], root)
    with expect_user_error("one class", "with --data-root-neg"):
        list_labelled_images([real], None)
    with expect_user_error("one class", "with --val-root-pos"):
        list_labelled_images([], [fake], flags=ImageFlags("--val-root-pos", "--val-root-neg"))


@pytest.mark.parametrize("link", ["real/2.png", "real/more"])
def test_an_image_file_listed_as_real_and_as_fake_is_refused(tmp_path, link):
    real, fake = write_empty_files(tmp_path / "real", "1.png"), write_empty_files(tmp_path / "fake", "2.png")
    (tmp_path / link).symlink_to(f"{fake}/2.png" if link.endswith(".png") else fake)
    with expect_user_error("1 files are listed both as real and as fake", link, "fake/2.png"):
        list_labelled_images([real], [fake])


def test_a_csv_table_that_labels_one_file_as_real_and_as_fake_is_refused(tmp_path):
    write_empty_files(tmp_path, "a.png", "b.png")
    (tmp_path / "list.csv").write_text("path,label\na.png,real\nb.png,fake\n./a.png,fake\n")
    with expect_user_error("1 files are listed both as real and as fake", "a.png"):
        list_labelled_images(None, None, None, str(tmp_path / "list.csv"))


def test_a_link_to_the_parent_folder_adds_no_images(tmp_path):
    real, fake = write_empty_files(tmp_path / "real", "1.png"), write_empty_files(tmp_path / "fake", "2.png")
    (tmp_path / "real/up").symlink_to("..")
    assert list_relative_path_label_and_generator(tmp_path, list_labelled_images([real], [fake])) == [
        ("real/1.png", REAL, ""),
        ("fake/2.png", FAKE, "fake"),
    ]


@pytest.mark.parametrize("target", ["..", "../1_fake", "../../other/1_fake"])
def test_a_link_inside_a_tree_does_not_change_the_class_of_an_image(tmp_path, target):
    names = ["gan/0_real/1.png", "gan/1_fake/2.png", "other/1_fake/3.png"]
    root = write_empty_files(tmp_path / "t", *names)
    (tmp_path / "t/gan/0_real/link").symlink_to(target)
    labels = {
        path: label
        for path, label, _ in list_relative_path_label_and_generator(root, list_labelled_images_in_tree(root))
    }
    assert labels == {names[0]: REAL, names[1]: FAKE, names[2]: FAKE}


@pytest.mark.parametrize("labels", [[REAL, REAL], [FAKE], []])
def test_a_list_with_images_of_one_class_is_refused(labels):
    counts = f"{labels.count(REAL)} real and {labels.count(FAKE)} fake"
    with expect_user_error("validation images must contain both", counts):
        require_real_and_fake_images([Item("a.png", label, "") for label in labels], "validation images")
    require_real_and_fake_images([Item("a.png", REAL, ""), Item("b.png", FAKE, "")], "validation images")


def test_input_paths_may_be_folders_or_files_with_any_suffix(tmp_path, caplog):
    root = write_empty_files(tmp_path / "r", "b.png", "a.png")
    file = write_empty_files(tmp_path / "q", "odd.name") + "/odd.name"
    assert list_images_without_labels([file, root]) == [
        Item(p, None, "") for p in (file, f"{root}/a.png", f"{root}/b.png")
    ]
    assert not caplog.messages
    with expect_user_error("does not exist"):
        list_images_without_labels([str(tmp_path / "x")])


def test_an_input_image_that_is_given_twice_is_listed_once_at_its_first_position(tmp_path, caplog):
    root = write_empty_files(tmp_path / "r", "a.png", "b.png")
    with caplog.at_level("INFO"):
        items = list_images_without_labels([f"{root}/b.png", root, f"{root}/../r/a.png"])
    assert [item.path for item in items] == [f"{root}/b.png", f"{root}/a.png"]
    assert caplog.messages == ["left out 2 repeated paths: each image is used once"]


# --- recognising images -------------------------------------------------------------------------------------


def test_the_digest_of_a_list_depends_on_files_labels_and_order_but_not_on_the_working_folder(tmp_path, monkeypatch):
    write_empty_files(tmp_path, "a.png", "b.png")
    one, two = Item(f"{tmp_path}/a.png", REAL, ""), Item(f"{tmp_path}/b.png", FAKE, "gan")
    digest = describe_and_hash_image_list([one, two])
    assert digest.startswith("2 images (1 real, 1 fake), ")
    monkeypatch.chdir(tmp_path)
    assert describe_and_hash_image_list([one._replace(path="a.png"), two]) == digest
    for other in ([two, one], [one], [one._replace(label=FAKE), two], [one, two._replace(generator="x")]):
        assert describe_and_hash_image_list(other) != digest


def describe_files(*paths):
    """Describe image files by `describe_and_hash_image_files`, with the first as real and all others as fake."""
    items = [Item(str(path), FAKE if i else REAL, "") for i, path in enumerate(paths)]
    return describe_and_hash_image_files(items, hash_image_files(items))


def test_the_digest_of_image_files_stays_the_same_if_they_are_moved_and_changes_with_their_content(tmp_path):
    for place, content in (("job1", b"123"), ("job2", b"123"), ("job3", b"124")):
        (tmp_path / place).mkdir()
        for name, data in (("a.png", content), ("b.png", b"5678")):
            (tmp_path / place / name).write_bytes(data)
    first, moved, changed = (describe_files(*sorted((tmp_path / f"job{i}").iterdir())) for i in (1, 2, 3))
    assert first == moved and first.startswith("2 images (1 real, 1 fake), ")
    assert changed != first
    assert describe_files(tmp_path / "job1/b.png", tmp_path / "job1/a.png") != first


def test_the_digest_of_images_without_labels_contains_no_numbers_of_real_and_fake_images(tmp_path):
    root = write_empty_files(tmp_path, "a.png")
    assert describe_and_hash_image_list([Item(f"{root}/a.png", None, "")]).startswith("1 images, ")


def test_training_images_are_recognised_by_name_size_and_content(tmp_path):
    items = [Item(save_image(tmp_path / f"{i}.bmp"), REAL, "") for i in range(3)]
    trained_on = hash_image_files(items[:2])
    assert trained_on.shape == (2, 2) and count_images_trained_on(items, trained_on) == 2
    (tmp_path / "copy").mkdir()
    copy = shutil.copy(items[0].path, tmp_path / "copy")
    changed = save_image(tmp_path / "copy/1.bmp", random_rgb_pixels(seed=1))
    assert count_images_trained_on([Item(copy, REAL, ""), Item(changed, REAL, "")], trained_on) == 1
    os.mkfifo(tmp_path / "pipe.bmp")
    missing = [Item(str(tmp_path / name), REAL, "") for name in ("pipe.bmp", "missing.bmp")]
    assert count_images_trained_on(missing, trained_on) == 0


def test_the_error_without_validation_images_names_the_flags_of_validation():
    with expect_user_error("--val-root-pos", "--val-root-neg", "--val-csv"):
        list_validation_images(["real"], None, "table.csv")
