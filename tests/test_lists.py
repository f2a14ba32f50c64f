"""Which images are found in folders, trees, tables and text lists, and what is said of those that cannot be used."""

import logging
import os

import pytest
from files import mistake, save, touch

from data import lists as L
from data.lists import Item
from tools import split
from utils.labels import FAKE, REAL


def below(root, items):
    return [(os.path.relpath(item.path, root), item.label, item.generator) for item in items]


def test_images_are_sorted_by_path_and_hidden_ones_left_out(tmp_path):
    wanted = ["B.PNG", "a-b/1.png", "a.jpg", "a/z.TiF", "b.webp", "dir.png/x.JPEG", "é.bmp", "z.tiff"]
    unwanted = [".hidden.png", "._a.jpg", "__MACOSX/a.png", ".git/a.png", "notes.txt", "x.gif", "no_suffix"]
    root = touch(tmp_path / "r", *wanted, *unwanted)
    for given in root, root + "/":
        assert L.find_images(given) == [f"{root}/{name}" for name in sorted(wanted)]


def test_links_are_followed_once(tmp_path):
    root = touch(tmp_path / "r", "a/1.png")
    elsewhere = touch(tmp_path / "elsewhere", "2.png")
    for link, to in ("a/loop", root), ("b", elsewhere), ("c", elsewhere), ("broken.png", tmp_path / "nothing"):
        (tmp_path / "r" / link).symlink_to(to)
    assert L.find_images(root) == [f"{root}/a/1.png", f"{root}/b/2.png", f"{root}/broken.png"]


def test_folders_that_cannot_be_used(tmp_path):
    with mistake("No such file", r"new\nline"):
        L.find_images(str(tmp_path / "new\nline"))
    with mistake("Not a directory"):
        L.find_images(save(tmp_path / "f.png"))
    (tmp_path / "empty").mkdir()
    with mistake("no images", "no files"):
        L.find_images(str(tmp_path / "empty"))
    with mistake(".jpg", "2 .gif", "1 .txt"):
        L.find_images(touch(tmp_path / "q", "a.gif", "b.gif", "c.txt"))


def test_a_folder_that_cannot_be_read_is_no_empty_one(tmp_path, monkeypatch):
    touch(tmp_path, "a.png")
    monkeypatch.chdir(tmp_path)
    for _ in range(17):  # a path of more than 4096 letters, which no system call takes
        os.mkdir("d" * 250)
        os.chdir("d" * 250)
    with mistake("cannot be read", "too long"):
        L.find_images(str(tmp_path))


def test_folder_items(tmp_path):
    real = touch(tmp_path / "real", "2.png", "1.png")
    fakes = [touch(tmp_path / name, "b.png", "a.png") for name in ("StyleGAN", "ProGAN")]
    assert below(tmp_path, L.folder_items([real], fakes)) == [
        ("real/1.png", REAL, ""), ("real/2.png", REAL, ""), ("StyleGAN/a.png", FAKE, "StyleGAN"),
        ("StyleGAN/b.png", FAKE, "StyleGAN"), ("ProGAN/a.png", FAKE, "ProGAN"), ("ProGAN/b.png", FAKE, "ProGAN"),
    ]  # fmt: skip
    assert (FAKE, REAL) == (0, 1)
    roots = [touch(tmp_path / name / "images", "a.png") for name in ("x", "y")]
    assert [item.generator for item in L.folder_items([], [roots[0], roots[1] + "/"])] == ["x/images", "y/images"]


def test_folders_that_share_images_are_refused(tmp_path):
    real, fake = touch(tmp_path / "real", "1.png"), touch(tmp_path / "real/fake", "1.png")
    (tmp_path / "link").symlink_to(real)
    for roots in ([real], [fake]), ([fake], [real]), ([real, real + "/"], []), ([real], [str(tmp_path / "link")]):
        with mistake("lies in", "twice"):
            L.folder_items(*roots)
    beside = touch(tmp_path / "real2", "1.png")  # begins with the same letters
    assert len(L.folder_items([fake], [beside])) == 2
    with mistake("no image folders"):
        L.folder_items([], [])


@pytest.mark.parametrize("real, fake", [("0_real", "1_fake"), ("nature", "ai")])
def test_tree_items(tmp_path, real, fake):
    """The layouts of Wang et al. and of GenImage."""
    names = [f"progan/cat/{real}/1.png", f"progan/cat/{fake}/2.png", f"sd/{real}/3.png", f"sd/{fake}/a/4.png"]
    root = touch(tmp_path / "t", *names, "sd/none.png")
    assert below(root, L.tree_items(root)) == [
        (names[0], REAL, "progan"), (names[2], REAL, "sd"), (names[1], FAKE, "progan"), (names[3], FAKE, "sd"),
    ]  # fmt: skip
    assert {item.generator for item in L.tree_items(f"{root}/sd/")} == {"sd"}  # the folders at the top
    with mistake("0_real", "nature", "--data-root-pos"):
        L.tree_items(touch(tmp_path / "plain", "a.png"))


def test_only_the_uppermost_folder_says_what_is_in_it(tmp_path):
    """A folder nature in a tree of 0_real and 1_fake is a category, and the tree's own name says nothing."""
    names = ["gan/nature/0_real/1.png", "gan/nature/1_fake/2.png", "gan/city/0_real/0_real/3.png"]
    root = touch(tmp_path / "ai", *names, "gan/city/1_fake/nature/4.png")
    assert [label for _, label, _ in below(root, L.tree_items(root))] == [REAL, REAL, FAKE, FAKE]


def test_csv_items(tmp_path, monkeypatch):
    touch(tmp_path, "t/a.png", "t/with, comma.png", "cwd/a.png", "cwd/b.png")
    file = tmp_path / "t/list.csv"
    rows = ["a.png,REAL,,x", '"with, comma.png",fake,gan,', "b.png, Real ,,", f"{tmp_path}/t/a.png,fake,,", ""]
    file.write_bytes("\r\n".join(["\ufeffPath,label,generator,note", *rows]).encode())
    monkeypatch.chdir(tmp_path / "cwd")
    assert L.csv_items(str(file)) == [
        Item("a.png", REAL, ""),  # in the working folder before the table's own
        Item(f"{tmp_path}/t/with, comma.png", FAKE, "gan"),
        Item("b.png", REAL, ""),
        Item(f"{tmp_path}/t/a.png", FAKE, ""),
    ]
    file.write_text("label,path\nreal,b.png\n")
    assert L.csv_items("../t/list.csv") == [Item("b.png", REAL, "")]


@pytest.mark.parametrize("real, fake, lines", [("1", "0", 1), ("real", "fake", 0), ("real", "0", 1)])
def test_how_numbers_are_read_is_said(tmp_path, caplog, real, fake, lines):
    touch(tmp_path, "a.png", "b.png")
    (tmp_path / "list.csv").write_text(f"path,label\na.png,{real}\nb.png,{fake}\n")
    assert [item.label for item in L.csv_items(str(tmp_path / "list.csv"))] == [REAL, FAKE]
    assert len(caplog.messages) == lines and all("1 = real" in text for text in caplog.messages)


@pytest.mark.parametrize(
    "text, words",
    [
        ("", ["line 1", "path,label"]),
        ("a.png,real\n", ["line 1", "path,label", "got"]),
        ("path;label\na.png;real\n", ["line 1", "path,label"]),
        ("path,label\n", ["names no images"]),
        ("path,label\na.png,real\na.png,2\n", ["line 3", "real or fake", "1 = real", "2"]),
        ("path,label\na.png\n", ["line 2", "real or fake"]),
        ("path,label\n,real\n", ["line 2", "a path"]),
        ("path,label\na.png,real,x\n", ["line 2", "comma"]),
        ("path,label\na.png,real\nb.png,real\nc.png,fake\n", ["2 of its 3 files", "b.png"]),
        ('path,label\n"a.png,real\n', ["cannot be read"]),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, text, words):
    touch(tmp_path, "a.png")
    (tmp_path / "list.csv").write_text(text)
    with mistake("list.csv", *words):
        L.csv_items(str(tmp_path / "list.csv"))


@pytest.mark.parametrize("read", [L.csv_items, L.list_paths])
def test_what_is_no_text(tmp_path, read):
    for name, word in (save(tmp_path / "a.png"), "UTF-8"), (str(tmp_path), "directory"), ("missing", "No such file"):
        with mistake("cannot be read", word):
            read(name)


def test_list_paths(tmp_path, monkeypatch):
    touch(tmp_path, "lists/a.png", "cwd/sub/b.png")
    file = tmp_path / "lists/train.txt"
    file.write_bytes(f"a.png\r\n\nsub/b.png\n{tmp_path}/lists/a.png".encode())
    monkeypatch.chdir(tmp_path / "cwd")
    assert L.list_paths(str(file)) == [f"{tmp_path}/lists/a.png", "sub/b.png", f"{tmp_path}/lists/a.png"]
    assert L.paths_of(str(file)) == L.list_paths(str(file)) and L.paths_of("sub") == ["sub/b.png"]
    for text, words in ("a.png\nx.png\ny.png\n", ["2 of its 3 files", "x.png"]), ("\n", ["names no images"]):
        file.write_text(text)
        with mistake(*words):
            L.list_paths(str(file))


def test_labelled_items_are_named_in_one_way_and_of_both_classes(tmp_path):
    root = touch(tmp_path / "t", "0_real/1.png", "1_fake/2.png")
    (tmp_path / "list.csv").write_text("path,label\nt/0_real/1.png,real\n")
    real, fake, table = f"{root}/0_real", f"{root}/1_fake", str(tmp_path / "list.csv")
    assert L.labelled_items([real], [fake]) == L.folder_items([real], [fake])
    assert L.labelled_items(None, None, root) == L.tree_items(root)
    assert L.labelled_items(None, None, None, table) == L.csv_items(table)
    for words, given in (
        (["no images", "--data-root-pos", "--data-root", "--csv", "--input"], [None, None]),
        (["more than one way"], [[real], [fake], root]),
        (["one class", "--data-root-neg is missing"], [[real], None]),
        (["one class", "--val-root-pos is missing"], [[], [fake], None, None, ("--val-root-pos", "--val-root-neg")]),
    ):
        with mistake(*words):
            L.labelled_items(*given)


def test_input_items_say_what_they_leave_out(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    root = touch(tmp_path / "r", "b.png", "a.png")
    file = touch(tmp_path / "q", "odd.name") + "/odd.name"
    assert L.input_items([file, root]) == [Item(p, None, "") for p in (file, f"{root}/a.png", f"{root}/b.png")]
    assert not caplog.messages
    other = touch(tmp_path / "photos", "1.HEIC", "2.heic", "3.gif", "4.jpg")
    touch(tmp_path / "r", "5.avif", "6.heic")
    assert len(L.input_items([root, other])) == 3
    assert len(caplog.messages) == 1
    assert all(word in caplog.text for word in ("3 .heic", "1 .gif", "1 .avif"))
    with mistake("does not exist"):
        L.input_items([str(tmp_path / "x")])


def test_a_split_depends_on_names_alone(tmp_path):
    reals, fakes = (touch(tmp_path / kind, *(f"{kind} {i}.png" for i in range(40))) for kind in ("real", "fake"))
    out, held_out = str(tmp_path / "out"), []
    arguments = ["--data-root-pos", reals, "--data-root-neg", fakes, "--hold-out", "0.3", "--out", out]
    for _ in range(2):
        assert split.main(arguments) == 0
        train, held = (L.csv_items(f"{out}/{name}.csv") for name in ("train", "held_out"))
        assert not set(train) & set(held) and {item.generator for item in train} == {"", "fake"}
        assert L.list_paths(f"{out}/train_real.txt") == [item.path for item in train if item.label == REAL]
        held_out.append(set(held))
        touch(tmp_path / "real", "another.png")
    assert len(train + held) == 81 and held_out[0] == {i for i in held_out[1] if "another" not in i.path}
    with mistake("0 real"):
        split.main([*arguments, "--hold-out", "0"])
