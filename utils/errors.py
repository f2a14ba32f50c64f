"""Errors that a user can correct, and how a program starts and ends."""

import errno
import logging
import signal
import sys
from collections.abc import Callable

import torch

from utils.console import is_main_process, let_main_process_report, printable
from utils.signals import Stopped

logger = logging.getLogger(__name__)

EXIT_MISTAKE = 2
FILE_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM),  # a full disk, or no permission
    *(errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR),  # a path that cannot be a file
}
PEER_ENDED = ("closed by peer", "Connection reset", "Connection closed", "NCCL")  # texts of torch.distributed


class UserError(ValueError):
    """A mistake that the user can correct. Its text is one line: what was expected, what was found, what to do."""


def run_program(main: Callable[[], int | None]) -> int:
    """Run a program and turn mistakes and signals into log lines.

    Args:
        main: the program; it returns its exit status, or None for 0.

    Returns:
        The exit status: what `main` returns; 2 after one line for a user's mistake; 130 or 143 after a signal.
    """
    level = logging.INFO if is_main_process() else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr, force=True)
    logging.captureWarnings(True)
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may contain letters that the terminal lacks
    try:
        return main() or 0
    except Stopped as stopped:
        logger.warning("stopped by %s; the state so far is saved", stopped)
        return stopped.exit_status
    except KeyboardInterrupt:
        logger.warning("interrupted")
        return 128 + signal.SIGINT
    except Exception as error:
        message = _message_for_user(error)
        if message is None:
            raise
        let_main_process_report()
        logger.error("error: %s", printable(" ".join(message.split())))
        return EXIT_MISTAKE


def _message_for_user(error: Exception) -> str | None:
    """Describe an error that a user can correct in one line. Returns None for an error of the program itself."""
    text = str(error)
    if isinstance(error, UserError):
        return text
    if isinstance(error, OSError) and error.errno in FILE_ERRORS:
        file = f"{error.filename or 'a file'} ({error.strerror})"
        return f"cannot read or write {file}; earlier files are unchanged"
    if isinstance(error, torch.OutOfMemoryError):
        return f"{text.splitlines()[0]} Use a smaller --batch-size, --crop-size or --micro-batch, or --precision bf16"
    if isinstance(error, RuntimeError) and text.startswith("DataLoader worker"):
        return f"{text} If memory was short, use fewer --workers"
    if isinstance(error, RuntimeError) and any(words in text for words in PEER_ENDED):
        return "another process of this run has ended; its own message says why"
    return None
