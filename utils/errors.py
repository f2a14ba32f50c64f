"""Errors that a user can correct, and how a program starts and ends."""

import errno
import logging
import signal
import sys
import time
from collections.abc import Callable

import torch

from utils.console import is_main_process, printable
from utils.options import MISTAKE_DELAY
from utils.signals import Stopped

logger = logging.getLogger(__name__)

EXIT_MISTAKE = 2
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)  # what files may meet with
PEER_IS_GONE = ("closed by peer", "Connection reset", "Connection closed", "NCCL")


class UserError(ValueError):
    """What a user can mend: one line with what was got, what was wanted, the way out."""


def run_program(main: Callable[[], int | None]) -> int:
    """Run `main` and give its exit status: 0, 2 after one line for a user's mistake, 130 / 143 when stopped."""
    level = logging.INFO if is_main_process() else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr, force=True)
    logging.captureWarnings(True)
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack the letters of a file's name
    try:
        return main() or 0
    except Stopped as stopped:
        logger.warning("stopped by %s; the state so far is saved", stopped)
        return stopped.exit_status
    except KeyboardInterrupt:
        logger.warning("interrupted")
        return 128 + signal.SIGINT
    except Exception as error:
        text = _mistake(error)
        if text is None:
            raise
        if not is_main_process():
            time.sleep(MISTAKE_DELAY)  # where the main process says the same, this one is ended meanwhile
        logger.error("error: %s", printable(" ".join(text.split())))
        return EXIT_MISTAKE


def _mistake(error: Exception) -> str | None:
    """One line for an error that a user can do something about; None for one of the program's own."""
    text = str(error)
    if isinstance(error, UserError):
        return text
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        what = f"{error.filename or 'a file'} ({error.strerror})"
        return f"cannot read or write {what}; what was saved before is untouched"
    if isinstance(error, torch.OutOfMemoryError):
        return f"{text.splitlines()[0]} Use a smaller --batch-size, --crop-size or --micro-batch, or --precision bf16"
    if isinstance(error, RuntimeError) and text.startswith("DataLoader worker"):
        return f"{text} If memory was short, use fewer --workers"
    if isinstance(error, RuntimeError) and any(words in text for words in PEER_IS_GONE):
        return "another process of this run has ended; it says why"
    return None
