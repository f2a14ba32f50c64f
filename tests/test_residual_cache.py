"""The residual cache: never a stale or damaged entry, never in the way of the training, and the same numbers."""

import errno
import functools
import json
import logging
import multiprocessing
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from processes import finish, signal_in_step, start

import train_detector
from data import images as images_module
from data import residual_cache
from data.images import FAKE, ImageDataset, Item, SizePolicy
from data.residual_cache import CachedImages, ResidualCache, collate_cached
from models import RDN, DeepStemResNet, ResynthesisDetector, vgg
from utils.distributed import World
from utils.options import CACHE_PRECISIONS, train_detector_parser

CPU = torch.device("cpu")
TINY = {"num_features": 4, "growth_rate": 4, "num_blocks": 1, "num_layers": 2}
SIDE = 64
ENTRY, SIZE = "ab/abcd", (8, 12)
GIGABYTE = 10**9


@pytest.fixture(scope="module", autouse=True)
def one_thread(small_classifier):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def images(tmp_path_factory, write_real_and_fake):
    return write_real_and_fake(tmp_path_factory.mktemp("images"), 3, SIDE)


@pytest.fixture(scope="module")
def rdn_file(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("rdn") / "rdn.pth"
    torch.save(RDN(**TINY).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def arguments(images, rdn_file):
    """The arguments of a training into a folder."""

    def of(out, *more):
        return [
            "--data-root-pos", str(images / "real"), "--data-root-neg", str(images / "fake"), "--output-path", str(out),
            "--sr-weights-file", str(rdn_file), "--arch", "resnet18", "--no_dilation", "--gpu", "cpu", "--workers", "0",
            "--vgg-weights", "random", "--batch-size", "4", "--lr", "1e-3", "--lr-sr", "0.5", "--fixed-sr",
            "--epochs", "3", "--save-every-epoch", "9", *more,
        ]  # fmt: skip

    return of


def open_cache(folder, storage="fp16", max_bytes=GIGABYTE, **about):
    return ResidualCache(folder, {"network": "a"} | about, storage, max_bytes)


def some_residual(seed=0, zeros=0.5, shape=(3, 5, 7)):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator) * (torch.rand(shape, generator=generator) >= zeros)


def kept(cache, residual=None, entry=ENTRY):
    """What `keep` gives back, once it is written."""
    given = cache.keep(entry, some_residual() if residual is None else residual, SIZE)
    cache.flush()
    return given


def entries_in(folder):
    return [path for path in folder.glob("*/??/*") if path.is_file()]


def bytes_in(folder):
    return sum(path.stat().st_size for path in entries_in(folder))


# --- what is read is what was kept --------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", CACHE_PRECISIONS)
@pytest.mark.parametrize("zeros", [0.0, 0.5, 1.1])
def test_what_is_read_is_what_was_given_back(tmp_path, storage, zeros):
    cache, residual = open_cache(tmp_path, storage), some_residual(zeros=zeros)
    given = kept(cache, residual)
    stored = open_cache(tmp_path, storage).read(ENTRY)
    assert torch.equal(stored.residual.float(), given) and given.dtype == torch.float32 and stored.size == SIZE
    assert torch.equal(given, residual) or storage == "fp16"
    torch.testing.assert_close(given, residual, rtol=2**-11, atol=2**-25)


def test_half_precision_is_as_exact_as_is_said(tmp_path):
    values = torch.logspace(-12, 4.8, 10_000, dtype=torch.float64).float().reshape(1, 100, 100)
    error, normal = (kept(open_cache(tmp_path), values) - values).abs(), values >= 2**-14
    assert (error / values)[normal].max() <= 2**-11
    assert error[~normal].max() <= 2**-25


def test_half_precision_changes_logits_little(tmp_path):
    torch.manual_seed(0)
    classifier, residual = DeepStemResNet("resnet18", 3, False).eval(), some_residual(shape=(3, SIDE, SIDE))
    with torch.inference_mode():
        exact, given = classifier(residual[None]), classifier(kept(open_cache(tmp_path), residual)[None])
    torch.testing.assert_close(given, exact, rtol=0, atol=2**-11 * exact.abs().max().item())


@pytest.mark.parametrize("value", [70_000.0, float("nan")])
def test_what_half_precision_cannot_hold_is_left_as_it_is(tmp_path, value):
    cache, residual = open_cache(tmp_path), torch.full((1, 2, 2), value)
    torch.testing.assert_close(kept(cache, residual), residual, rtol=0, atol=0, equal_nan=True)
    assert cache.read(ENTRY) is None


# --- never a stale entry ------------------------------------------------------------------------------------------


def program_cache(folder, flags=(), stage=0, rdn="a", vgg_weights="b", size=None):
    """The cache the program opens."""
    always = ["--fixed-sr", "--data-root-pos", "a", "--cache-dir", str(folder)]
    args = train_detector_parser().parse_args([*always, *flags])
    detector = ResynthesisDetector(RDN(**TINY), DeepStemResNet("resnet18", 3, False), stage, None)
    config = {"resynthesizer_fingerprint": rdn, "vgg": {"fingerprint": vgg_weights}}
    policy = SizePolicy(4, args.crop_size, size)
    return train_detector.residual_cache(args, detector, config, [], [], policy, CPU, World(rank=1))


@pytest.mark.parametrize(
    "change",
    [
        {"stage": 5}, {"rdn": "c"}, {"vgg_weights": "c"}, {"size": 32}, {"flags": ["--precision", "bf16"]},
        {"flags": ["--cache-precision", "fp32"]}, {},
    ],
)  # fmt: skip
def test_another_setting_finds_nothing(tmp_path, change):
    kept(program_cache(tmp_path))
    assert (program_cache(tmp_path, **change).read(ENTRY) is None) == bool(change)


def test_another_version_finds_nothing(tmp_path, monkeypatch):
    kept(open_cache(tmp_path))
    monkeypatch.setattr(residual_cache.PIL, "__version__", "0")
    assert open_cache(tmp_path).read(ENTRY) is None


def test_an_entry_is_of_one_content_and_direction(tmp_path):
    cache, path = open_cache(tmp_path), tmp_path / "a.png"
    path.write_bytes(b"one")
    names = [cache.entry(str(path), False), cache.entry(str(path), True)]
    status = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # size and time as before
    names += [cache.entry(str(path), False), cache.entry(str(path), True)]
    assert len(set(names)) == 4
    path.write_bytes(b"one")
    assert cache.entry(str(path), True) == names[1]
    assert cache.entry(str(tmp_path / "none.png"), False) is None


def test_an_image_replaced_while_it_is_read_is_not_kept(tmp_path, images, monkeypatch):
    path = shutil.copy(images / "real/0.png", tmp_path)
    dataset = CachedImages(ImageDataset([Item(path, FAKE, "")], SizePolicy()), open_cache(tmp_path))
    assert dataset[0, 0].entry is not None
    real = images_module.load_image
    monkeypatch.setattr(images_module, "load_image", lambda p: real(shutil.copy(images / "real/1.png", p)))
    assert dataset[0, 0].sample.image is not None and dataset[0, 0].entry is not None
    shutil.copy(images / "real/0.png", path)
    assert dataset[0, 0].entry is None


@pytest.mark.parametrize("flags", [["--crop-size", "32"], ["--augment-perturb"], ["--no-cache"]])
def test_images_that_change_have_no_cache(tmp_path, flags):
    assert program_cache(tmp_path, flags) is None
    policy = SizePolicy(4, 32, random_crop=True)
    with pytest.raises(ValueError, match="change"):
        CachedImages(ImageDataset([], policy), open_cache(tmp_path))


@pytest.mark.parametrize("zeros", [0.0, 0.5])
def test_a_damaged_file_is_not_read_but_written_again(tmp_path, zeros):
    cache, residual = open_cache(tmp_path), some_residual(zeros=zeros)
    wanted = kept(cache, residual)
    path = cache.home / ENTRY
    whole = path.read_bytes()
    for length in (0, 1, 40, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert cache.read(ENTRY) is None
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        assert cache.read(ENTRY) is None
    path.write_bytes(bytes(len(whole)))
    assert cache.read(ENTRY) is None
    (cache.home / "ab/other").write_bytes(whole)
    assert cache.read("ab/other") is None
    assert torch.equal(kept(cache, residual), wanted) and path.read_bytes() == whole


# --- several processes, no more than is allowed -------------------------------------------------------------------


def write_many(folder, names, max_bytes, kill_at=None):
    cache = open_cache(folder, max_bytes=max_bytes)
    real = os.replace
    for i, name in enumerate(names):
        if i == kill_at:
            residual_cache.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        kept(cache, some_residual(i), f"ab/{name}")
    os.replace = real


def in_processes(*calls):
    processes = [multiprocessing.get_context("fork").Process(target=write_many, args=call) for call in calls]
    for process in processes:
        process.start()
    return [finish(process) for process in processes]


def test_several_processes_share_a_cache(tmp_path):
    names = list(range(40))
    assert in_processes((tmp_path, names, GIGABYTE), (tmp_path, names[::-1], GIGABYTE)) == [0, 0]
    cache = open_cache(tmp_path)
    assert all(cache.read(f"ab/{name}") for name in names)
    assert int((tmp_path / "usage").read_text()) == bytes_in(tmp_path)


def test_several_processes_keep_within_the_bound(tmp_path):
    bound = 3000
    assert in_processes((tmp_path, range(40), bound), (tmp_path, range(40, 80), bound)) == [0, 0]
    assert bound - 300 < bytes_in(tmp_path) <= bound


def test_a_process_killed_while_it_writes_is_in_nobodys_way(tmp_path):
    assert in_processes((tmp_path, range(4), GIGABYTE, 2)) == [-signal.SIGKILL]
    cache = open_cache(tmp_path)
    assert [cache.read(f"ab/{name}") is not None for name in range(4)] == [True, True, False, False]
    kept(cache, entry="ab/2")
    assert cache.read("ab/2") and not list(tmp_path.rglob(".incoming"))


def test_the_cache_leaves_as_much_free_as_it_takes(tmp_path, monkeypatch):
    disk = 5000
    monkeypatch.setattr(
        residual_cache.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(disk, 0, disk - bytes_in(folder))
    )
    cache = open_cache(tmp_path)
    for i in range(40):
        kept(cache, some_residual(i), f"ab/{i}")
    assert disk / 2 - 300 < bytes_in(tmp_path) <= disk / 2


def test_the_plan_says_what_is_needed_and_what_fits(tmp_path):
    assert "2 residuals (fp16) take up to 4.0 GB (0.0 MB there already)" in open_cache(tmp_path).plan([10**9] * 2)
    assert "at most 1.0 GB" in open_cache(tmp_path).plan([10**9] * 2)
    assert "at least 25% fit" in open_cache(tmp_path).plan([10**9] * 2)
    small = open_cache(tmp_path).plan([10**6] * 2)
    assert "computed again" not in small and "of other settings" not in small
    kept(open_cache(tmp_path))
    assert "of other settings" in open_cache(tmp_path, stage=5).plan([10**6] * 2)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_full_disk_is_one_warning(tmp_path, monkeypatch, caplog, number):
    cache, real = open_cache(tmp_path), open
    wanted = kept(cache)

    def full(path, *arguments, **keywords):
        if path == tmp_path / ".incoming":
            raise OSError(number, os.strerror(number))
        return real(path, *arguments, **keywords)

    monkeypatch.setattr(residual_cache, "open", full, raising=False)
    for i in range(3):
        assert torch.equal(kept(cache, entry=f"ab/{i}"), wanted)
    assert [r.levelname for r in caplog.records] == ["WARNING"] and os.strerror(number) in caplog.text
    assert cache.read(ENTRY) and cache.read("ab/0") is None


# --- in the program -----------------------------------------------------------------------------------------------


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "stats.jsonl").read_text().splitlines()]


def outcome(out):
    state = torch.load(out / "last.pth.tar", weights_only=True)
    return state["progress"], [v.numpy().tobytes() for v in state["state_dict"].values()]


@pytest.fixture(scope="module")
def whole_run(arguments, tmp_path_factory):
    """The folder of an uninterrupted run with the cache."""
    out = tmp_path_factory.mktemp("whole")
    train_detector.main(arguments(out))
    return out


@pytest.fixture
def computed(monkeypatch):
    """One element for each image whose residual is computed."""
    real, calls = ResynthesisDetector.residual, []

    def residual(self, x):
        calls.extend(x)
        return real(self, x)

    monkeypatch.setattr(ResynthesisDetector, "residual", residual)
    return calls


def test_losses_are_those_without_a_cache(arguments, tmp_path, computed, monkeypatch):
    """Bit for bit from float32 storage, if without a cache each residual is computed alone, too."""
    monkeypatch.setattr(vgg, "_random_weights", functools.cache(vgg._random_weights))
    flags = ["--idx-stages", "2", "--epochs", "2", "--cache-precision", "fp32"]
    train_detector.main(arguments(tmp_path / "without", *flags, "--no-cache", "--micro-batch", "1"))
    assert len(computed) == 6 * 2 and not (tmp_path / "without/residual_cache").exists()
    computed.clear()
    train_detector.main(arguments(tmp_path / "with", *flags))
    assert 6 < len(computed) == len(entries_in(tmp_path / "with/residual_cache")) < 12  # either way round, once
    assert losses(tmp_path / "with") == losses(tmp_path / "without")


def test_half_precision_changes_losses_little(arguments, whole_run, tmp_path):
    """In the first epoch: a new classifier in training magnifies any difference, from step to step."""
    train_detector.main(arguments(tmp_path, "--no-cache", "--epochs", "1"))
    assert losses(whole_run)[0] == pytest.approx(losses(tmp_path)[0], rel=5e-3)


def test_a_cached_run_reads_no_pixels(arguments, whole_run, tmp_path, computed, monkeypatch):
    monkeypatch.setattr(images_module, "read_rgb", None)
    monkeypatch.setattr(train_detector, "example_images", lambda *_: {})
    monkeypatch.setattr(train_detector, "log_quick_audit", lambda *_: None)
    train_detector.main(arguments(tmp_path, "--cache-dir", str(whole_run / "residual_cache")))
    assert computed == [] and outcome(tmp_path) == outcome(whole_run) and not (tmp_path / "residual_cache").exists()


def test_what_does_not_fit_changes_no_number(arguments, whole_run, tmp_path, computed, caplog):
    caplog.set_level(logging.INFO)
    size = bytes_in(whole_run / "residual_cache")
    train_detector.main(arguments(tmp_path, "--cache-gb", str(size / 2 / 1e9)))
    assert len(entries_in(whole_run / "residual_cache")) < len(computed) < 18
    assert outcome(tmp_path) == outcome(whole_run)
    assert bytes_in(tmp_path / "residual_cache") <= size / 2
    assert len([r for r in caplog.records if "residual cache" in r.message and "computed again" in r.message]) == 1


def test_a_full_disk_does_not_end_the_training(arguments, whole_run, tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(residual_cache, "_write_usage", full)
    train_detector.main(arguments(tmp_path))
    assert outcome(tmp_path) == outcome(whole_run)
    assert len([r for r in caplog.records if "residual cache" in r.message and r.levelname == "WARNING"]) == 1


def test_validation_is_cached_too(arguments, images, tmp_path, computed):
    roots = ["--val-root-pos", str(images / "real"), "--val-root-neg", str(images / "fake")]
    train_detector.main(arguments(tmp_path, *roots, "--epochs", "1"))
    assert 6 <= len(computed) <= 12  # of these 6 images, those that training saw as they are are not computed again
    stats = json.loads((tmp_path / "stats.jsonl").read_text())
    train_detector.main(arguments(tmp_path / "b", *roots, "--epochs", "1", "--no-cache"))
    wanted = json.loads((tmp_path / "b/stats.jsonl").read_text())
    assert stats["val_loss"] == pytest.approx(wanted["val_loss"], rel=1e-2)


def test_a_killed_run_goes_on_with_its_residuals_or_without(arguments, whole_run, tmp_path):
    """SIGKILL in the second epoch; bit for bit the end of a run never stopped, though the cache be lost."""
    out, log = tmp_path / "out", tmp_path / "log"
    flags = arguments(out, "--save-minutes", "0", "--workers", "2")
    assert finish(start("train_detector.py", flags, log, partial(signal_in_step, 3, signal.SIGKILL))) == -signal.SIGKILL
    shutil.copytree(out, tmp_path / "lost", ignore=shutil.ignore_patterns("residual_cache"))
    for folder, there in (("out", True), ("lost", False)):
        assert bool(entries_in(tmp_path / folder / "residual_cache")) == there
        train_detector.main(arguments(tmp_path / folder, "--resume", "auto"))
        assert outcome(tmp_path / folder) == outcome(whole_run), log.read_text()


def test_images_of_different_sizes_are_told_from_residuals_too(tmp_path, images):
    Image.new("RGB", (SIDE, SIDE + 8)).save(tmp_path / "other.png")
    cache = open_cache(tmp_path)
    items = [Item(str(images / "real/0.png"), FAKE, ""), Item(str(tmp_path / "other.png"), FAKE, "")]
    dataset = CachedImages(ImageDataset(items, SizePolicy()), cache)
    for _ in range(2):
        batch = collate_cached([dataset[0, 0], dataset[0, 1]])
        assert "different sizes" in batch.mismatch and "other.png 64 x 72" in batch.mismatch
        cache.keep(dataset[0, 0].entry, some_residual(), (SIDE, SIDE))
        cache.flush()
    assert collate_cached([dataset[0, 0]]).is_read == [True]


def test_an_unreadable_image_is_an_error_as_ever(tmp_path):
    Path(tmp_path / "a.png").write_text("none")
    dataset = CachedImages(ImageDataset([Item(str(tmp_path / "a.png"), FAKE, "")], SizePolicy()), open_cache(tmp_path))
    batch = collate_cached([dataset[0, 0]])
    assert "a.png" in batch.errors[0] and batch.indices == []
