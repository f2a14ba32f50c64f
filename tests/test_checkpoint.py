"""Checkpoint files: whole or not at all, read without running anything, and told apart by their contents."""

import errno
import os
import pickle
import resource
import stat

import pytest
import torch

import test
import train_sr
from models import RDN, ModelError, fingerprint, load_weights, state_dict_of
from utils import checkpoint as checkpoints
from utils.checkpoint import CheckpointError

TINY = {"num_features": 4, "growth_rate": 4, "num_blocks": 1, "num_layers": 2}


def one_line(error):
    text = str(error.value)
    assert "\n" not in text.strip() and len(text) < 400
    return text


def test_what_is_saved_is_loaded(tmp_path):
    state = {"state_dict": {"a": torch.arange(3.0)}, "progress": {"epoch": 3, "best": None, "sums": {"loss": 0.5}}}
    checkpoints.save(state, tmp_path / "last.pth")
    loaded = checkpoints.load(tmp_path / "last.pth")
    assert loaded["progress"] == state["progress"]
    assert torch.equal(loaded["state_dict"]["a"], state["state_dict"]["a"])
    assert [p.name for p in tmp_path.iterdir()] == ["last.pth"]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "last.pth").stat().st_mode) == 0o666 & ~mask  # not private, as a temporary file is


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 64 vs 0")])
def test_a_failing_save_leaves_the_old_file(tmp_path, monkeypatch, failure):
    path = tmp_path / "last.pth"
    checkpoints.save({"a": torch.zeros(2)}, path)
    before = path.read_bytes()

    def fail(obj, file):
        file.write(b"half a checkpoint")
        raise failure

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(CheckpointError, match="cannot write .*last.pth.*untouched") as error:
        checkpoints.save({"a": torch.ones(2)}, path)
    one_line(error)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["last.pth"]


def test_a_disk_that_fills_up_while_it_is_written(tmp_path):
    """The kernel itself refuses, in the middle of the file."""
    path = tmp_path / "last.pth"
    checkpoints.save({"a": torch.zeros(2)}, path)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(CheckpointError, match="cannot write .*last.pth .*File too large.*untouched") as error:
            checkpoints.save({"a": torch.ones(10_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    one_line(error)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["last.pth"]


@pytest.mark.parametrize("call", ["fsync", "replace", "chmod"])
def test_a_save_that_fails_at_its_end(tmp_path, monkeypatch, call):
    path = tmp_path / "last.pth"
    checkpoints.save({"a": torch.zeros(2)}, path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(CheckpointError, match="cannot write .*last.pth .*No space left on device") as error:
        checkpoints.save({"a": torch.ones(2)}, path)
    one_line(error)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["last.pth"]


def test_only_torn_checkpoints_are_removed(tmp_path):
    kept = ["last.pth", ".p.csv.0-of-1.part", ".config.json.part", ".hidden.tmp"]
    for name in [*kept, ".last.pth.tar.abc.tmp", ".epoch_3.pth.x_y.tmp"]:
        (tmp_path / name).touch()
    checkpoints.remove_torn(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(kept)


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "last.pth"
    checkpoints.save({"a": torch.zeros(2)}, path)

    def interrupt(obj, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save({"a": torch.ones(2)}, path)
    assert torch.equal(checkpoints.load(path)["a"], torch.zeros(2))
    assert [p.name for p in tmp_path.iterdir()] == ["last.pth"]


def test_a_save_into_no_folder_is_one_line(tmp_path):
    with pytest.raises(CheckpointError, match="cannot write"):
        checkpoints.save({"a": torch.zeros(2)}, tmp_path / "nowhere" / "last.pth")


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_file_that_would_run_code_is_refused(tmp_path, writer):
    path, target = tmp_path / "evil.pth.tar", tmp_path / "ran"
    content = {"state_dict": {"a": torch.zeros(1)}, "x": Malicious(target)}
    if writer == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match="evil.pth.tar") as error:
        checkpoints.load(path)
    if writer == "torch":
        assert "refused" in one_line(error)
    one_line(error)
    assert not target.exists()
    torch.load(path, weights_only=False) if writer == "torch" else pickle.loads(path.read_bytes())
    assert target.exists()  # it would have run


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_file_is_said_to_be_one(tmp_path, share, legacy):
    path = tmp_path / "last.pth"
    torch.save({"state_dict": RDN(**TINY).state_dict()}, path, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError, match="truncated or no checkpoint") as error:
        checkpoints.load(path)
    assert f"{path.stat().st_size} bytes" in one_line(error)


def test_other_things_than_checkpoints(tmp_path):
    (tmp_path / "list.pth").write_text("data/a.png\ndata/b.png\n")
    torch.save([torch.zeros(1)], tmp_path / "tensors.pth")
    for path, words in (
        (tmp_path, "is a folder"),
        (tmp_path / "absent.pth", "no checkpoint at"),
        (tmp_path / "list.pth", "truncated or no checkpoint"),
        (tmp_path / "tensors.pth", "holds a list, a dictionary was wanted"),
    ):
        with pytest.raises(CheckpointError, match=words) as error:
            checkpoints.load(path)
        one_line(error)


def test_a_detector_that_would_run_code_is_refused_by_the_programs(tmp_path):
    """Not only by `load`."""
    torch.save({"state_dict": Malicious(tmp_path / "ran")}, tmp_path / "evil.pth.tar")
    for program, flags in (
        (test, ["--input", __file__, "--resume"]),
        (test, ["--input", __file__, "--resume", str(tmp_path / "evil.pth.tar"), "--sr-weights-file"]),
        (train_sr, ["--train-file", str(tmp_path / "list.txt"), "--weights-file"]),
    ):
        (tmp_path / "list.txt").write_text(__file__)
        with pytest.raises(CheckpointError, match="evil.pth.tar refused: it holds more than tensors"):
            program.main([*flags, str(tmp_path / "evil.pth.tar"), "--gpu", "cpu"])
    assert not (tmp_path / "ran").exists()


def test_a_file_that_may_not_be_read_is_not_said_to_be_damaged(tmp_path, monkeypatch):
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pth")

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(torch, "load", refuse)  # what permissions forbid, root may do
    with pytest.raises(CheckpointError, match=r"^cannot read .*a.pth \(Permission denied\)$"):
        checkpoints.load(tmp_path / "a.pth")


def test_the_old_format_of_torch_is_read(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "old.pth.tar", _use_new_zipfile_serialization=False)
    assert torch.equal(checkpoints.load(tmp_path / "old.pth.tar")["a"], torch.ones(2))


def test_to_cpu_copies():
    state = {"a": [torch.ones(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)], "b": (1, "x")}
    copy = checkpoints.to_cpu(state)
    state["a"][0].zero_()
    assert copy["a"][0].sum() == 96 and copy["a"][0].is_contiguous() and copy["b"] == (1, "x")


# --- state dicts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapped", [False, True])
def test_weights_are_found_in_any_wrapping(prefix, wrapped):
    torch.manual_seed(0)
    source, target = RDN(**TINY), RDN(**TINY)
    state = {prefix + key: value for key, value in source.state_dict().items()}
    load_weights(target, state_dict_of({"state_dict": state, "epoch": 3} if wrapped else state, "file"), "file")
    assert fingerprint(target) == fingerprint(source)


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, {"state_dict": {}}, {"state_dict": [1]}, {"a": 1, "b": 2}])
def test_a_dictionary_without_weights_is_refused(content):
    with pytest.raises(ModelError, match="no weights in some.pth"):
        state_dict_of(content, "some.pth")


def test_misfits_are_named_and_nothing_is_loaded():
    torch.manual_seed(0)
    model = RDN(**TINY)
    before = fingerprint(model)
    state = {key: torch.zeros_like(value) for key, value in model.state_dict().items()}
    del state["sfe1.weight"]
    state["classifier.fc"] = torch.zeros(1)
    state["sfe2.weight"] = torch.zeros(5, 4, 3, 3)
    with pytest.raises(ModelError) as error:
        load_weights(model, state, "some.pth")
    text = one_line(error)
    assert "some.pth" in text
    assert "1 missing: sfe1.weight" in text
    assert "1 unknown: classifier.fc" in text
    assert "sfe2.weight is (5, 4, 3, 3), wanted (4, 4, 3, 3)" in text
    assert fingerprint(model) == before


def test_many_misfits_stay_one_short_line():
    with pytest.raises(ModelError, match=r"\d+ missing: .*, \.\.\.") as error:
        load_weights(RDN(**TINY), {"a": torch.zeros(1)}, "some.pth")
    one_line(error)


def test_a_fingerprint_is_of_names_shapes_and_values():
    torch.manual_seed(0)
    model = RDN(**TINY)
    before = fingerprint(model)
    assert len(before) == 16 and int(before, 16) >= 0
    assert fingerprint(model.to(memory_format=torch.channels_last)) == before
    with torch.no_grad():
        model.output.bias[0] += 1e-7
    assert fingerprint(model) != before
    assert fingerprint(torch.nn.Linear(2, 3)) != fingerprint(torch.nn.Linear(3, 2))
