"""Text for terminals and logs: printable names, tables, progress bars; and which process of a run may print."""

import logging
import os
import sys
import time
from collections.abc import Iterable, Sequence
from io import TextIOBase

from tqdm import tqdm

logger = logging.getLogger(__name__)

LOG_SECONDS = 120  # time between two progress lines in the log of a run without a terminal
MISTAKE_DELAY = 10  # seconds; processes may start this far apart on a busy machine


def is_main_process() -> bool:
    """Return whether this process is the only one, or the first of several that torchrun has started."""
    return os.environ.get("RANK", "0") == "0" or "WORLD_SIZE" not in os.environ


def let_main_process_report() -> None:
    """Wait, in any other process, long enough for the main process to report the same error and end the run.

    All processes find a user's mistake. The launcher ends the others once the first has failed, so that the error is
    printed once. An error that only one process finds is printed after the delay.
    """
    if not is_main_process():
        time.sleep(MISTAKE_DELAY)


class _LogFile(TextIOBase):
    """A text file whose lines go to the log."""

    def write(self, text: str) -> int:
        line = text.strip()
        if line:
            logger.info("%s", line)
        return len(text)


def progress(items: Iterable | None, description: str, total: int | None = None, unit: str = "it") -> tqdm:
    """Wrap `items` in a progress bar or, without a terminal, in a log line every LOG_SECONDS.

    Args:
        items: what to iterate over; None to call `.update(n)` on the returned bar instead.
        description: text in front of the numbers.
        total: number of items, where `items` does not tell it.
        unit: name of one item.
    """
    options = {"total": total, "unit": unit, "leave": False, "disable": not is_main_process()}
    if not sys.stderr.isatty():
        options["file"] = _LogFile()
        options["bar_format"] = "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, {remaining} left"
        options["miniters"] = 1
        options["delay"] = options["mininterval"] = options["maxinterval"] = LOG_SECONDS
    return tqdm(items, description, **options)


def printable(text: str | os.PathLike) -> str:
    """Escape control characters and lone surrogates, so that a path or text prints as one line on any terminal."""
    characters = []
    for character in os.fspath(text):
        if not character.isprintable():
            character = character.encode("unicode_escape", "surrogatepass").decode()
        characters.append(character)
    return "".join(characters)


def text_table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Format rows of cells as lines with aligned columns. The first `left` columns are left-aligned."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = []
        for index, (cell, width) in enumerate(zip(row, widths, strict=True)):
            cells.append(cell.ljust(width) if index < left else cell.rjust(width))
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
