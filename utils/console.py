"""Functions for output to terminals and logs: printable names, tables and progress bars."""

import logging
import math
import os
import sys
import time
from collections.abc import Iterable, Sequence
from io import TextIOBase

from tqdm import tqdm

logger = logging.getLogger(__name__)

LOG_SECONDS = 120  # seconds between two progress lines in a log
MISTAKE_DELAY = 10  # seconds that other processes wait before they print an error, so that the main process is first


def is_main_process() -> bool:
    """Return whether this process has rank 0 or is the only process of its run."""
    return os.environ.get("RANK", "0") == "0" or "WORLD_SIZE" not in os.environ


def wait_while_main_process_prints_error() -> None:
    """Wait MISTAKE_DELAY seconds in every process except the main process, before the caller prints an error.

    While the other processes wait, the main process usually prints the same error and exits, and torchrun then ends the
    other processes.
    """
    if not is_main_process():
        time.sleep(MISTAKE_DELAY)


class _LogFile(TextIOBase):
    """A file object that passes each line from tqdm to the logger."""

    def write(self, text: str) -> int:
        line = text.strip()
        if line:
            logger.info("%s", line)
        return len(text)


def progress_bar(items: Iterable | None, description: str, total: int | None = None, unit: str = "it") -> tqdm:
    """Show the progress of a loop: as a bar in a terminal, and otherwise as a log line every LOG_SECONDS seconds.

    Args:
        items: the items of the loop, or None if the caller reports progress by `.update(n)`.
        total: number of items, which is required if `items` has no length.
    """
    options = {"total": total, "unit": unit, "leave": False, "disable": not is_main_process()}
    if not sys.stderr.isatty():
        options["file"] = _LogFile()
        options["bar_format"] = "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, {remaining} left"
        options["miniters"] = 1
        options["delay"] = options["mininterval"] = options["maxinterval"] = LOG_SECONDS
    return tqdm(items, description, **options)


def make_printable(text: str | os.PathLike) -> str:
    """Escape control characters and lone surrogates in a path or text, so that the result is one printable line."""
    characters = []
    for character in os.fspath(text):
        if not character.isprintable():
            character = character.encode("unicode_escape", "surrogatepass").decode()
        characters.append(character)
    return "".join(characters)


def format_text_table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Format rows of cells as lines, with the first `left` columns aligned to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = []
        for index, (cell, width) in enumerate(zip(row, widths, strict=True)):
            cells.append(cell.ljust(width) if index < left else cell.rjust(width))
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def describe_allowed_numbers(low: float, high: float) -> str:
    """Return the words for a range of numbers in an error message, such as " of at least 1" or " from 0 to 5"."""
    if math.isinf(low) and math.isinf(high):
        return ""
    if math.isinf(high):
        return f" of at least {low}"
    if math.isinf(low):
        return f" of at most {high}"
    return f" from {low} to {high}"
