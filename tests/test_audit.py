"""The leak audit finds each leak in a set made to have it, and nothing in a clean one."""

import io
import json
import shutil
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from data import audit as A
from data.images import FAKE, REAL, Item

N = 20  # images a class


def picture(seed, size=(96, 96), mode="RGB"):
    """A soft random picture with some grain; another seed looks quite different."""
    rng = np.random.default_rng(seed)
    soft = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    grain = rng.normal(0, 3, (size[1], size[0], 3))
    return Image.fromarray(np.clip(np.asarray(soft) + grain, 0, 255).astype(np.uint8)).convert(mode)


def jpeg_then(image, quality):
    """The image after JPEG compression."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


def fill(folder, start, suffix=".png", n=N, change=lambda image, i: image, size=(96, 96), **options):
    """n different pictures in a folder, numbered from `start` on."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(start, start + n):
        change(picture(i, size), i).save(folder / f"{i:04}{suffix}", **options)
    return folder


@pytest.fixture
def roots(tmp_path):
    """Two folders yet to be made."""
    return tmp_path / "real", tmp_path / "fake"


def items(root, label, generator=""):
    return [Item(str(p), label, generator) for p in sorted(root.rglob("*")) if p.is_file()]


def audited(real, fake, **options):
    return A.audit(items(real, REAL) + items(fake, FAKE, "g"), **options)


def found(result, check):
    """The findings whose check begins so, one or none."""
    matches = [f for f in result["findings"] if f["check"].startswith(check)]
    assert len(matches) <= 1
    return matches[0] if matches else None


def run(*arguments):
    return A.main([str(a) for a in arguments])


# --- nothing to find ----------------------------------------------------------------------------------------


def test_a_clean_set_has_no_findings(roots, capsys):
    fill(roots[0], 0), fill(roots[1], 100)
    result = audited(*roots)
    assert result["findings"] == [] and result["unreadable"] == []
    assert result["files"] == {"train": {"fake": N, "real": N}}
    assert result["checked"] == {"headers": 2 * N, "thumbnails": 2 * N, "full": True}
    assert {v["balanced_accuracy"] for v in result["attributes"].values()} == {0.5}
    assert run("--data-root-pos", roots[0], "--data-root-neg", roots[1]) == 0
    assert "nothing found" in capsys.readouterr().out


def test_what_varies_alike_in_both_classes_is_no_leak(roots):
    rng = np.random.default_rng(0)
    for root, start in zip(roots, (0, 100), strict=True):
        root.mkdir()
        for i in range(start, start + N):
            size = tuple(int(s) for s in rng.integers(64, 96, 2))  # nearly every size occurs once
            suffix, options = (".png", {}) if rng.random() < 0.5 else (".jpg", {"quality": int(rng.integers(60, 95))})
            picture(i, size).save(root / f"{i}{suffix}", **options)
    assert [f for f in audited(*roots)["findings"] if f["severity"] != "note"] == []


# --- attributes ---------------------------------------------------------------------------------------------


def test_codec(roots, capsys):
    fill(roots[0], 0, ".jpg", quality=90), fill(roots[1], 100)
    finding = found(audited(*roots), "codec")
    assert finding["severity"] == "leak" and finding["balanced_accuracy"] == 1.0
    assert finding["message"].startswith("all real images: JPEG; all fake images: PNG.")
    assert finding["values"] == {"real": {"JPEG": N}, "fake": {"PNG": N}}
    assert run("--data-root-pos", roots[0], "--data-root-neg", roots[1]) == 1
    text = capsys.readouterr().out
    assert "LEAK: codec" in text and "8x8 grid" in text and "re-encode" in text and "leak audit: 1 leak" in text


def test_jpeg_quality(roots):
    fill(roots[0], 0, ".jpg", quality=95), fill(roots[1], 100, ".jpg", quality=75)
    result = audited(*roots)
    assert found(result, "JPEG quality")["message"].startswith(
        "all real images: quality 95; all fake images: quality 75."
    )
    assert found(result, "codec") is None


def test_jpeg_quality_is_estimated_exactly_for_libjpeg():
    for quality in range(1, 101):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8)).save(buffer, "JPEG", quality=quality)
        assert A.jpeg_quality(Image.open(io.BytesIO(buffer.getvalue())).quantization[0]) == quality


def test_jpeg_quality_of_a_foreign_table_is_the_nearest():
    table = 2 * A.ANNEX_K_LUMINANCE  # quality 25
    assert A.jpeg_quality(table + np.resize([1, -1, 0], 64)) == 25


def test_chroma_subsampling(roots):
    fill(roots[0], 0, ".jpg", quality=90, subsampling="4:4:4"), fill(roots[1], 100, ".jpg", quality=90)
    finding = found(audited(*roots), "JPEG chroma subsampling")
    assert finding["severity"] == "leak" and finding["values"]["real"] == {"4:4:4": N}


def test_size(roots):
    fill(roots[0], 0, size=(96, 96)), fill(roots[1], 100, size=(128, 96))
    result = audited(*roots)
    assert found(result, "size")["severity"] == "leak"
    assert found(result, "shape") is found(result, "shorter side") is None  # the same thing, told once


def test_size_where_every_real_has_its_own(roots):
    fill(roots[0], 0, change=lambda image, i: image.resize((70 + i, 90 + i))), fill(roots[1], 100)
    finding = found(audited(*roots), "size") or found(audited(*roots), "shape")
    assert finding["severity"] == "leak" and finding["balanced_accuracy"] == 1.0


def test_colour_mode(roots):
    fill(roots[0], 0, change=lambda image, i: image.convert("L")), fill(roots[1], 100)
    assert found(audited(*roots), "colour mode")["severity"] == "leak"


def png_16_bit(path, seed):
    """A 16-bit RGB PNG, which Pillow reads and cannot write."""
    pixels = np.asarray(picture(seed)).astype(">u2") * 257  # (H, W, 3)
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def test_bit_depth(roots):
    roots[0].mkdir()
    for i in range(N):
        png_16_bit(roots[0] / f"{i}.png", i)
    fill(roots[1], 100)
    result = audited(*roots)
    assert found(result, "bit depth")["values"] == {"real": {"16 bit": N}, "fake": {"8 bit": N}}
    assert found(result, "bit depth")["severity"] == "leak" and not result["unreadable"]


def test_metadata_is_a_warning(roots):
    exif = Image.Exif()
    exif[0x0131] = "a camera"
    text = PngInfo()
    text.add_text("parameters", "a cat, steps: 20")
    fill(roots[0], 0, exif=exif), fill(roots[1], 100, pnginfo=text)
    result = audited(*roots)
    assert found(result, "metadata")["severity"] == "warning"
    assert found(result, "metadata")["values"] == {"real": {"EXIF": N}, "fake": {"text 'parameters'": N}}
    assert run("--data-root-pos", roots[0], "--data-root-neg", roots[1]) == 0


def test_jpeg_traces_in_lossless_files(roots):
    (
        fill(roots[0], 0, size=(160, 160), change=lambda image, i: jpeg_then(image, 60)),
        fill(roots[1], 100, size=(160, 160)),
    )
    result = audited(*roots)
    assert found(result, "JPEG traces")["severity"] == "leak"
    assert found(A.quick_audit(items(roots[0], REAL) + items(roots[1], FAKE)), "JPEG traces") is None  # headers only


@pytest.mark.parametrize("offset", [0, 3])
def test_jpeg_grid_is_found_wherever_a_crop_put_it(offset):
    grey = np.asarray(jpeg_then(picture(0, (256, 256)), 60).convert("L"))
    assert A.has_jpeg_grid(grey[offset:, 2 * offset :]) is True
    assert A.has_jpeg_grid(np.asarray(picture(0, (256, 256), "L"))) is False
    assert A.has_jpeg_grid(grey[:32]) is None


@pytest.mark.parametrize("real, fake, severity", [(17, 3, "leak"), (15, 5, "warning"), (10, 10, None)])
def test_partial_differences_are_graded(roots, real, fake, severity):
    for root, n_jpeg, start in zip(roots, (real, fake), (0, 100), strict=True):
        fill(root, start, ".jpg", n=n_jpeg, quality=90), fill(root, start + 50, n=N - n_jpeg)
    finding = found(audited(*roots), "codec")
    assert (finding and finding["severity"]) == severity
    if finding:
        assert finding["balanced_accuracy"] == pytest.approx((real + N - fake) / (2 * N), abs=1e-4)


def test_separation_knows_what_chance_does():
    a_pattern = A.separation("a" * 30, "b" * 30)
    assert a_pattern.balanced_accuracy == a_pattern.beyond_chance == 1.0 and a_pattern.chance < 0.75
    assert A.separation("aaa", "bbb")[:2] == (1.0, 1.0) and A.separation("aaa", "bbb").uniform
    everyone_its_own = A.separation(range(50), range(50, 100))
    assert everyone_its_own == (1.0, 1.0, 0.5, False)  # perfect, and says nothing
    rng = np.random.default_rng(1)
    same = A.separation(list(rng.integers(0, 5, 500)), list(rng.integers(0, 5, 500)))
    assert same.balanced_accuracy <= same.chance < 0.58
    assert A.separation(["x"], ["y"]).uniform is False  # one file each is no pattern


def test_sets_drawn_alike_rarely_raise_an_alarm():
    rng = np.random.default_rng(2)
    for n, kinds in ((30, 2), (30, 200), (300, 5), (300, 1000)):
        results = [A.separation(*rng.integers(0, kinds, (2, n)).tolist()) for _ in range(40)]
        alarms = [r.beyond_chance for r in results if r.balanced_accuracy > r.chance]
        assert sum(b >= 0.6 for b in alarms) <= 1 and not any(b >= 0.75 for b in alarms)


def test_few_images_are_told(roots):
    fill(roots[0], 0, n=3), fill(roots[1], 100, n=3)
    assert found(audited(*roots), "few images")["severity"] == "note"


def test_a_leak_of_one_generator_hidden_by_the_others(tmp_path, capsys):
    for generator, suffix, n in (("a", ".png", N), ("b", ".png", N), ("c", ".jpg", 8)):
        start = ord(generator) * 1000
        (
            fill(tmp_path / generator / "0_real", start, n=n),
            fill(tmp_path / generator / "1_fake", start + 500, suffix, n=n),
        )
    assert run("--data-root", tmp_path) == 1
    text = capsys.readouterr().out
    assert "LEAK: codec (c): all real images: PNG; all fake images: JPEG." in text and "LEAK: codec (a)" not in text


# --- duplicates ---------------------------------------------------------------------------------------------


def test_exact_duplicates_across_train_and_validation(roots, tmp_path, capsys):
    fill(roots[0], 0), fill(roots[1], 100)
    val = fill(tmp_path / "val", 200, n=4)
    shutil.copy(roots[0] / "0003.png", val / "another name.png")
    result = A.audit(items(roots[0], REAL) + items(roots[1], FAKE), items(val, REAL))
    finding = found(result, "exact duplicates across train and validation")
    assert finding["severity"] == "leak" and finding["count"] == 1
    assert finding["message"] == "1 of 5 validation images are also in training"
    assert [p.rsplit("/", 1)[1] for p in finding["examples"]] == ["0003.png", "another name.png"]
    assert found(result, "near duplicates") is None  # told once
    assert run("--data-root-pos", roots[0], "--data-root-neg", roots[1], "--val-root-pos", val) == 1
    assert "another name.png" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, is_found",
    [
        (lambda image: jpeg_then(image, 60), True),
        (lambda image: image.resize((64, 64), Image.Resampling.LANCZOS), True),
        (lambda image: image.convert("RGBA"), True),
        (lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), False),
    ],
)
def test_near_duplicates_across_train_and_validation(roots, tmp_path, change, is_found):
    fill(roots[0], 0), fill(roots[1], 100)
    val = fill(tmp_path / "val", 200, n=3)
    change(picture(3)).save(val / "copy.png")
    result = A.audit(items(roots[0], REAL) + items(roots[1], FAKE), items(val, REAL))
    finding = found(result, "near duplicates across train and validation")
    assert (finding is not None) == is_found
    if is_found:
        assert finding["severity"] == "leak" and finding["examples"][1].endswith("copy.png")


def test_near_duplicates_are_found_in_a_draft_of_a_large_jpeg(roots):
    fill(roots[0], 0, ".jpg", n=4, size=(800, 600)), fill(roots[1], 100, ".jpg", n=3, size=(800, 600))
    picture(102, (800, 600)).resize((400, 300)).save(roots[1] / "small.png")
    finding = found(audited(*roots), "near duplicates within fake")
    assert sorted(p.rsplit("/", 1)[1] for p in finding["examples"]) == ["0102.jpg", "small.png"]


def test_duplicates_across_classes(roots):
    fill(roots[0], 0), fill(roots[1], 100)
    shutil.copy(roots[0] / "0003.png", roots[1])
    jpeg_then(picture(5), 80).save(roots[1] / "made from 5.png")
    result = audited(*roots)
    assert found(result, "exact duplicates across classes")["severity"] == "leak"
    assert found(result, "near duplicates across classes")["severity"] == "warning"  # an edited real is a proper fake
    assert found(result, "near duplicates across classes")["count"] == 2


def test_duplicates_within_a_class(roots):
    fill(roots[0], 0), fill(roots[1], 100)
    for i in range(3):
        shutil.copy(roots[0] / "0003.png", roots[0] / f"copy {i}.png")
    jpeg_then(picture(105), 80).save(roots[1] / "again.png")
    result = audited(*roots)
    exact, near = (
        found(result, "exact duplicates within real (train)"),
        found(result, "near duplicates within fake (train)"),
    )
    assert exact["severity"] == "warning" and exact["message"] == f"3 of {N + 3} images repeat another one"
    assert near["severity"] == "note" and near["count"] == 1
    assert found(result, "exact duplicates across") is found(result, "near duplicates across") is None


def test_near_duplicates_come_in_groups():
    thumbnails = [A.Thumbnail(np.zeros(128, bool), np.full(432, 100, np.uint8)) for _ in range(5)]
    far = thumbnails[0]._replace(bits=np.arange(128) < 64)
    chain = [
        thumbnails[0]._replace(bits=np.arange(128) < n, colours=np.full(432, 150, np.uint8)) for n in (0, 8, 16, 40)
    ]
    groups, complete = A.near_duplicates([*thumbnails, far, *chain])
    assert complete and groups == [[0, 1, 2, 3, 4], [6, 7, 8]]  # 9 and the colour of `chain` are too far


def test_near_duplicates_in_several_blocks(monkeypatch):
    rng = np.random.default_rng(0)
    bits, colours = rng.random((60, 128)) < 0.5, rng.integers(0, 256, (60, 432), np.uint8)
    bits[50], colours[50] = bits[3], colours[3]
    bits[50, :5] ^= True
    thumbnails = [A.Thumbnail(b, c) for b, c in zip(bits, colours, strict=True)]
    monkeypatch.setattr(A, "BLOCK", 7)
    assert A.near_duplicates(thumbnails) == ([[3, 50]], True)


def test_a_flood_of_near_duplicates_is_cut_and_told(monkeypatch):
    bits = np.zeros(128, bool)
    thumbnails = [A.Thumbnail(bits, np.full(432, 100 + i % 3, np.uint8) + (np.arange(432) == i)) for i in range(30)]
    monkeypatch.setattr(A, "MAX_PAIRS", 100)
    assert A.near_duplicates(thumbnails)[1] is False


def test_sampled_thumbnails_are_told(roots, monkeypatch):
    fill(roots[0], 0, n=6), fill(roots[1], 100, n=6)
    monkeypatch.setattr(A, "THUMBNAIL_LIMIT", 4)
    result = audited(*roots)
    assert result["checked"] == {"headers": 12, "thumbnails": 8, "full": False}
    assert "--full" in A.summary_lines(result)[0]
    assert audited(*roots, full=True)["checked"]["thumbnails"] == 12


# --- the short form, files that are not in order, the command line ------------------------------------------


def test_quick_audit_reads_headers_of_a_sample_only(roots, monkeypatch):
    fill(roots[0], 0, ".jpg"), fill(roots[1], 100)
    monkeypatch.setattr(A, "read_thumbnail", None)
    monkeypatch.setattr(A, "_sha256", None)
    result = A.quick_audit(items(roots[0], REAL) + items(roots[1], FAKE), limit=8)
    assert result["checked"]["headers"] == 16 and result["files"]["train"] == {"fake": N, "real": N}
    assert found(result, "codec")["severity"] == "leak"
    assert all("\n" not in line for line in A.summary_lines(result))


def test_quick_audit_finds_training_images_in_the_validation_set(roots, tmp_path, caplog):
    """Classes or none (for the re-synthesizer); of files of one length, only those that end alike are read wholly."""
    fill(roots[0], 0, ".bmp"), fill(tmp_path / "val", 50, ".bmp", n=8)
    shutil.copy(roots[0] / "0003.bmp", tmp_path / "val" / "other.bmp")
    for label in (REAL, None):
        result = A.quick_audit(items(roots[0], label), items(tmp_path / "val", label))
        assert [(f["severity"], f["check"]) for f in result["findings"]] == [
            ("leak", "exact duplicates across train and validation")
        ]
        assert result["findings"][0]["message"].startswith("1 of 9 validation images")
        with caplog.at_level("INFO"):
            A.log_quick_audit(items(roots[0], label), items(tmp_path / "val", label))
        assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
        assert f"{N + 9} of {N + 9} headers: 1 finding" in caplog.text and "LEAK: exact duplicates" in caplog.text
        caplog.clear()


def test_quick_audit_says_in_a_line_that_nothing_was_found(roots, caplog):
    fill(roots[0], 0), fill(roots[1], 100)
    with caplog.at_level("INFO"):
        A.log_quick_audit(items(roots[0], REAL) + items(roots[1], FAKE))
    assert [r.getMessage() for r in caplog.records] == [f"leak audit of {2 * N} of {2 * N} headers: nothing found"]


def test_quick_audit_of_one_class(roots):
    fill(roots[0], 0, n=3)
    assert A.quick_audit(items(roots[0], REAL))["findings"] == []


def test_broken_and_misnamed_files(roots):
    fill(roots[0], 0), fill(roots[1], 100)
    (roots[0] / "0000.png").write_bytes(b"not an image")
    whole = (roots[1] / "0100.png").read_bytes()
    (roots[1] / "0100.png").write_bytes(whole[: len(whole) // 2])
    (roots[0] / "0001.png").rename(roots[0] / "0001.jpg")
    result = audited(*roots)
    assert sorted(path.rsplit("/", 1)[1] for path, _ in result["unreadable"]) == ["0000.png", "0100.png"]
    assert found(result, "unreadable files")["severity"] == "warning"
    assert found(result, "suffix")["examples"][0].endswith("0001.jpg")


def test_json_holds_the_findings(roots, tmp_path, capsys):
    fill(roots[0], 0, ".jpg", n=3), fill(roots[1], 100, n=3)
    assert run("--data-root-pos", roots[0], "--data-root-neg", roots[1], "--json", tmp_path / "a.json") == 1
    result = json.loads((tmp_path / "a.json").read_text())
    assert result == audited(*roots) and result["findings"][0]["severity"] == "leak"


def test_mistakes_are_one_line_and_status_2(roots, tmp_path, capsys):
    fill(roots[0], 0, n=1)
    for arguments in (
        [],
        ["--data-root-pos", tmp_path / "absent"],
        ["--data-root-pos", roots[0], "--data-root", tmp_path],
        ["--data-root-pos", roots[0], "--json", tmp_path / "absent" / "a.json"],
    ):
        assert run(*arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
