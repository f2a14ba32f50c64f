"""Errors that a user can correct, and the function that runs a program and reports its errors."""

import errno
import logging
import signal
import sys
from collections.abc import Callable

import torch

from utils.console import is_main_process, make_printable, wait_while_main_process_prints_error
from utils.signals import Stopped

logger = logging.getLogger(__name__)

EXIT_MISTAKE = 2
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}  # a full disk, an exceeded quota, or a read-only file system
FILE_ERRORS = {
    *(*DISK_ERRORS, errno.EACCES, errno.EPERM),  # an error of the disk, or a missing permission
    *(errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR),  # a path at which no file can be written
}
# If another process of the run has ended, the error of torch.distributed contains one of the texts in PEER_ENDED
PEER_ENDED = ("closed by peer", "Connection reset", "Connection closed", "NCCL")


class UserError(ValueError):
    """An error that the user can correct."""


def is_machine_fault(error: Exception) -> bool:
    """Return whether an exception shows a fault of the machine, such as a full disk or a GPU that has failed."""
    return is_gpu_fault(error) or (isinstance(error, OSError) and error.errno in DISK_ERRORS)


def is_gpu_fault(error: Exception) -> bool:
    """Return whether an exception shows that the GPU has failed."""
    return isinstance(error, RuntimeError) and str(error).startswith("CUDA error")


def describe_exception(error: Exception) -> str:
    """Return the message of an exception as one line, or the name of its class if the message is empty."""
    return " ".join(str(error).split()) or type(error).__name__


def describe_tensor(value: object) -> str:
    """Describe the type and the shape of a tensor, or only the type of any other value, for an error message."""
    if torch.is_tensor(value):
        return f"type {value.dtype} and shape {tuple(value.shape)}"
    return f"type {type(value).__name__}"


def run_program(main: Callable[[], int | None]) -> int:
    """Run a program, and report a user's mistake or a signal by one log line instead of a traceback.

    Returns:
        the exit status of `main`, where None means 0; or 2 after a user's mistake, 130 after SIGINT, 143 after SIGTERM.
    """
    level = logging.INFO if is_main_process() else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr, force=True)
    logging.captureWarnings(True)
    sys.stdout.reconfigure(errors="backslashreplace")  # the terminal may be unable to show some letters of file names
    try:
        return main() or 0
    except Stopped as stopped:
        text = (
            "the program was stopped by %s; the progress in its output files is saved: to continue, start it again (%s)"
        )
        logger.warning(text, stopped, "training with --resume auto, test.py with the same --save_path")
        return stopped.exit_status
    except KeyboardInterrupt:
        logger.warning("the program was interrupted")
        return 128 + signal.SIGINT
    except Exception as error:
        message = _describe_error_for_user(error)
        if message is None:
            raise
        wait_while_main_process_prints_error()
        logger.error("error: %s", make_printable(" ".join(message.split())))
        return EXIT_MISTAKE


def _describe_error_for_user(error: Exception) -> str | None:
    """Return a message if the user can correct `error`, and None if `error` is a bug in the program."""
    text = str(error)
    if isinstance(error, UserError):
        return text
    if isinstance(error, OSError) and error.errno in FILE_ERRORS:
        file = f"{error.filename or 'a file'} ({error.strerror})"
        return f"cannot read or write {file}; earlier files are unchanged"
    if isinstance(error, torch.OutOfMemoryError):
        return f"{text.splitlines()[0]} Use a smaller --batch-size, --crop-size or --micro-batch, or --precision bf16"
    if is_gpu_fault(error):
        return f"the GPU has failed ({text.splitlines()[0]}): start the program again"
    if isinstance(error, RuntimeError) and text.startswith("DataLoader worker"):
        return f"{text} If memory was short, use fewer --workers"
    if isinstance(error, RuntimeError) and any(words in text for words in PEER_ENDED):
        return f"another process of this run has ended or cannot be reached; its message says why ({text})"
    return None
