"""Text for terminals and logs: printable names, tables, progress bars."""

import logging
import os
import sys
from collections.abc import Iterable, Sequence
from io import TextIOBase

from tqdm import tqdm

logger = logging.getLogger(__name__)

LOG_SECONDS = 120  # between two lines of progress where there is no terminal


def is_main_process() -> bool:
    """Tell whether this process is the only one, or the first of several (environment variable RANK)."""
    return os.environ.get("RANK", "0") == "0"


class _Log(TextIOBase):
    """What is written here is a line in the log."""

    def write(self, text: str) -> int:
        if line := text.strip():
            logger.info("%s", line)
        return len(text)


def progress(items: Iterable | None, what: str, total: int | None = None, **about) -> tqdm:
    """`items` with a bar on a terminal; elsewhere with a line in the log every LOG_SECONDS.

    For anything but one a step, give `items=None` and call `.update(n)`. about: more for tqdm, such as `unit`.
    """
    if not sys.stderr.isatty():
        about |= {"file": _Log(), "bar_format": "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, {remaining} left"}
        about |= {"miniters": 1, **dict.fromkeys(("delay", "mininterval", "maxinterval"), LOG_SECONDS)}
    return tqdm(items, what, total, leave=False, disable=not is_main_process(), **about)


def printable(text: str | os.PathLike) -> str:
    """A path or text on one line of any terminal: control characters and lone surrogates as escapes."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in os.fspath(text)
    )


def text_table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Rows of cells as lines with aligned columns: the first `left` flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    form = "  ".join(f"{{:{'<' if i < left else '>'}{width}}}" for i, width in enumerate(widths))
    return "\n".join(form.format(*row).rstrip() for row in rows)
