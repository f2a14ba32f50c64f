"""Tests of the package utils: exit status, signals, files, terminal text, random numbers and devices."""

import itertools
import logging
import os
import signal
import time

import pytest
import torch
from files import expect_user_error, read_file_contents_by_path

from utils.compute import choose_device, choose_device_and_precision
from utils.console import format_text_table, make_printable, progress_bar
from utils.distributed import World
from utils.errors import UserError, run_program
from utils.files import hold_lock_file, make_folder, open_for_atomic_write, remove_leftover_temporary_files, write_json
from utils.random_streams import seeded_generator
from utils.signals import Stopped, StopSignal
from utils.training import Progress

# --- exit status and signals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (UserError("line break\nand ESC \x1b"), "line break and ESC \\x1b"),
        (OSError(28, "No space left on device", "here"), "here"),
        (PermissionError(13, "Permission denied", "there"), "there"),
        (OSError(36, "File name too long", "xxx"), "File name too long"),
        (IsADirectoryError(21, "Is a directory", "folder"), "folder"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried."), "--batch-size"),
        (RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed."), "--workers"),
        (RuntimeError("CUDA error: an illegal memory access was encountered\nmore"), "the GPU has failed"),
    ],
)
def test_a_user_error_gives_one_error_line_and_exit_status_2(error, words, capfd):
    def raise_error():
        raise error

    assert run_program(raise_error) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0]


def test_a_programming_error_is_raised_by_run_program():
    with pytest.raises(ZeroDivisionError):
        run_program(lambda: 1 / 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_program_stopped_by_a_signal_exits_with_128_plus_the_signal_number(number, capfd):
    def send_signal_and_raise_stopped():
        with StopSignal() as stop:
            os.kill(os.getpid(), number)
            raise Stopped(stop.received)

    assert run_program(send_signal_and_raise_stopped) == 128 + number
    assert "saved" in capfd.readouterr().err.splitlines()[-1]


def test_a_second_ctrl_c_stops_the_program_at_once_and_a_second_sigterm_does_not():
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_sigterm_handler_is_restored_after_the_with_block_of_a_stop_signal():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


# --- files --------------------------------------------------------------------------------------------------


def test_an_atomic_file_is_written_completely_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(KeyError), open_for_atomic_write(path) as file:
        file.write(b"half")
        raise KeyError
    assert read_file_contents_by_path(tmp_path) == {"a.json": b'{\n  "a": 1\n}\n'}


def test_an_atomic_file_has_the_permissions_of_the_umask(tmp_path):
    mask = os.umask(0o027)
    try:
        write_json(tmp_path / "a.json", {})
    finally:
        os.umask(mask)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o640


def test_an_atomic_write_to_a_symbolic_link_keeps_the_link_and_replaces_its_target(tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")
    with open_for_atomic_write(tmp_path / "link") as file:
        file.write(b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "new"


def test_remove_unfinished_files_deletes_only_temporary_files_of_the_given_names(tmp_path):
    kept = {".user.tmp", ".user.12.tmp", ".last.pth.12.partial", ".p.csv.0-of-1.part", "last.pth.12.tmp", "last.pth"}
    for name in (*kept, ".last.pth.12.tmp", ".epoch_3.pth.345.tmp"):
        (tmp_path / name).touch()
    names = r"last\.pth|epoch_\d+\.pth"
    remove_leftover_temporary_files(tmp_path, names, age=60)
    assert len(os.listdir(tmp_path)) == len(kept) + 2
    remove_leftover_temporary_files(tmp_path, names)
    assert set(os.listdir(tmp_path)) == kept


def test_the_error_for_a_folder_that_cannot_be_created_names_the_folder(tmp_path):
    (tmp_path / "file").touch()
    with expect_user_error("cannot write", "below"):
        make_folder(tmp_path / "file" / "below")


@pytest.mark.parametrize("content", [b"pid 12\n", None])
def test_a_file_that_is_not_a_lock_file_is_refused_as_a_lock_and_unchanged(tmp_path, content):
    path = tmp_path / ".lock"
    path.mkdir() if content is None else path.write_bytes(content)
    before = read_file_contents_by_path(tmp_path)
    with expect_user_error(".lock", "not a lock file"), hold_lock_file(path, World()):
        pass
    assert read_file_contents_by_path(tmp_path) == before


@pytest.mark.parametrize("content", [b"", b"beyond"])
def test_a_lock_file_that_a_killed_run_wrote_only_in_part_can_be_locked(tmp_path, content):
    (tmp_path / ".lock").write_bytes(content)
    with hold_lock_file(tmp_path / ".lock", World()):
        pass
    assert not (tmp_path / ".lock").exists()


def test_a_lock_file_exists_only_inside_the_with_block_that_holds_it(tmp_path):
    for _ in range(2):
        with hold_lock_file(tmp_path / ".lock", World()):
            assert (tmp_path / ".lock").exists()
        assert not (tmp_path / ".lock").exists()


# --- text ---------------------------------------------------------------------------------------------------


def test_progress_is_logged_at_intervals_if_there_is_no_terminal(monkeypatch, caplog):
    monkeypatch.setattr("utils.console.LOG_SECONDS", 0.05)
    caplog.set_level(logging.INFO)
    for _ in progress_bar(range(12), "epoch 3"):
        time.sleep(0.02)
    with progress_bar(None, "scoring", total=900, unit="images") as bar:
        time.sleep(0.1)
        bar.update(200)
    assert 2 <= len(caplog.messages) <= 9
    assert "epoch 3: " in caplog.messages[0] and "of 12" in caplog.messages[0]
    assert "scoring: 200 of 900" in caplog.messages[-1]


def test_control_characters_are_escaped_and_text_tables_are_aligned():
    assert make_printable("größe\n\udcff\x1b[0m") == "größe\\n\\udcff\\x1b[0m"
    assert format_text_table([["a", "n"], ["bcd{}", "10"]]) == "a       n\nbcd{}  10"


# --- random streams, device and number format ---------------------------------------------------------------


def test_different_keys_give_different_random_numbers_and_equal_keys_give_equal_numbers():
    draws = {seeded_generator(*key).random() for key in itertools.product(range(3), repeat=3)}
    assert len(draws) == 27
    assert seeded_generator(1, 2).random() == seeded_generator(1, 2).random()
    assert seeded_generator(1, 2).random() != seeded_generator(1, 2, 0).random()


@pytest.fixture
def restore_pytorch_settings():
    """After the test, switch off PyTorch's deterministic algorithms, which the test may have switched on."""
    yield
    choose_device_and_precision("cpu", "auto", deterministic=False, seed=0)


@pytest.mark.usefixtures("restore_pytorch_settings")
@pytest.mark.parametrize("deterministic", [True, False])
def test_choose_device_and_precision_sets_the_deterministic_settings_of_pytorch(deterministic):
    compute = choose_device_and_precision("cpu", "auto", deterministic, seed=1)
    assert str(compute) == "fp32 on cpu" and torch.initial_seed() == 1
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert torch.backends.cudnn.deterministic == deterministic
    assert torch.backends.cudnn.benchmark != deterministic


def test_images_to_float_converts_uint8_images_to_float32_in_channels_last_order():
    x = choose_device_and_precision("cpu", "fp32", False).images_to_float(
        torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    )
    assert x.dtype == torch.float32 and x.max() == 1
    assert x.is_contiguous(memory_format=torch.channels_last)


def test_autocast_computes_matrix_products_in_bfloat16_if_bf16_is_chosen():
    with choose_device_and_precision("cpu", "bf16", False).autocast():
        assert (torch.ones(1, 1) @ torch.ones(1, 1)).dtype == torch.bfloat16


@pytest.mark.parametrize("precision", ["tf32", "float16"])
def test_a_precision_that_the_cpu_does_not_support_is_refused(precision):
    with expect_user_error(precision):
        choose_device_and_precision("cpu", precision, False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_a_gpu_number_means_the_cpu_and_gives_one_warning(caplog):
    for gpu in ("0", 3, None, "cpu", torch.device("cpu")):
        assert choose_device(gpu) == torch.device("cpu")
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2


@pytest.mark.parametrize("name", ["cuda:99", torch.device("cuda", 99), "gpu", "1.5"])
def test_a_device_that_does_not_exist_is_refused_in_one_line(name):
    with expect_user_error("GPU"):
        choose_device(name)


@pytest.mark.parametrize(
    ("gpu", "number"),
    [(None, 1), ("0", 1), ("cuda", 1), (0, 0), ("cuda:0", 0), (torch.device("cuda", 2), 2), (torch.device("cuda"), 1)],
)
def test_a_process_uses_the_gpu_of_its_local_rank_unless_a_gpu_number_is_given(monkeypatch, gpu, number):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device(gpu) == torch.device("cuda", number)
    assert chosen == [number]


@pytest.mark.parametrize("gpu", ["3", 3, "cuda:3", -1])
def test_a_gpu_number_larger_than_the_number_of_gpus_is_refused(monkeypatch, gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with expect_user_error("GPU"):
        choose_device(gpu)


def test_training_progress_refuses_a_value_with_the_reserved_name_count():
    with pytest.raises(ValueError, match="count"):
        Progress().record_optimizer_step({"loss": 1.0, "count": 7.0}, 4)
