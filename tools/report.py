"""Make a web page or markdown tables from the score tables of test.py.

    python -m tools.report SCORES.csv [SCORES.csv ...] --out DIR [--residuals DIR]
    python -m tools.report SCORES.csv [SCORES.csv ...] --markdown [METRIC]
    python -m tools.report --study STUDY.csv --table NAME --markdown METRIC [--intervals]
    python -m tools.report --refresh DOCUMENT.md [DOCUMENT.md ...] [--check]

The first command writes DIR/report.html with ROC curves, intervals, robustness curves and the worst mistakes
(tools/report_page.py). The second command prints a markdown table with one row per score table or generator. The third
command prints a markdown table whose rows and columns are listed in a study file (tools/study.py). The fourth command
updates the tables in markdown documents. In a document, the lines that start with "|" directly below the comment

    <!-- made by: python -m tools.report results/faces/*.csv --markdown auroc -->

are replaced by the output of the command in the comment. SCORES.json beside a score table is optional.
"""

import argparse
import glob
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from evaluation import metrics
from tools.report_page import load_tables, write_page
from tools.study import study_rows
from utils import options
from utils.console import format_text_table, printable
from utils.errors import UserError, run_program
from utils.files import write_atomically

PROGRAM = "python -m tools.report"
MADE_BY = re.compile(r"^(<!-- made by: (.+) -->)[ \t]*(?:\n\|.*)*", re.MULTILINE)  # groups: 1 comment, 2 command
COMPARED = ("accuracy", "auroc", "average_precision")  # metrics that have bootstrap intervals
ALL_METRICS = "all"


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    for document in args.refresh or ():
        refresh(document, args.check)
    if args.refresh:
        return 0
    if args.markdown:
        sys.stdout.write(markdown(args) + "\n")
        return 0
    if args.residuals and not os.path.isdir(args.residuals):
        text = "test.py --save-residuals makes this folder"
        raise UserError(f"--residuals {printable(args.residuals)} does not exist; {text}")
    tables = load_tables(args.scores)
    page = write_page(tables, args.out, args.residuals)
    rows = metrics.make_metric_table({table.name: table.summary for table in tables}, COMPARED)
    text = format_text_table(rows, left_columns(tables))
    sys.stdout.write("in %, with 95 % bootstrap intervals; fake is the positive class\n")
    sys.stdout.write(f"{text}\nreport: {printable(page)}\n")
    return 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line, and check that it is one of the four commands of this program."""
    parser = options.Parser(PROGRAM, "Make a web page or markdown tables from score tables.")
    parser.add_argument("scores", nargs="*", metavar="SCORES.csv", help="score tables of test.py")
    parser.add_argument("--study", metavar="STUDY.csv", help="study file, which lists rows and columns of tables")
    parser.add_argument("--table", metavar="NAME", help="with --study: name of a table in the study file")
    text = "with --study: add the bootstrap interval or, with several seeds, the range over the seeds"
    parser.add_argument("--intervals", action="store_true", help=text)
    names = [name for name, metric in metrics.METRICS.items() if metric.is_column]
    output = parser.add_mutually_exclusive_group(required=True)
    output.add_argument("--out", metavar="DIR", help="write the page DIR/report.html")
    text = f"print a markdown table of one metric ({', '.join(names)}); without METRIC: accuracy, AUROC and AP"
    output.add_argument("--markdown", nargs="?", const=ALL_METRICS, metavar="METRIC", help=text)
    text = "markdown documents in which the tables below 'made by' comments are updated"
    output.add_argument("--refresh", nargs="+", metavar="FILE.md", help=text)
    text = "with --refresh: change no document, and fail if a table is not up to date"
    parser.add_argument("--check", action="store_true", help=text)
    text = "with --out: folder of residual pictures, made by test.py --save-residuals"
    parser.add_argument("--residuals", metavar="DIR", help=text)
    args = parser.parse_args(arguments)
    sources = [bool(args.scores), bool(args.study), bool(args.refresh)]
    if sum(sources) != 1 or bool(args.study) != bool(args.table):
        parser.error("expected SCORES.csv, or --study with --table, or --refresh")
    if args.markdown and args.markdown not in (ALL_METRICS, *names):
        parser.error(f"--markdown {args.markdown}: expected one of {', '.join(names)}")
    if args.study and args.markdown in (None, ALL_METRICS):
        parser.error("--study needs --markdown METRIC")
    return args


def left_columns(tables: Sequence) -> int:
    """Return how many columns of `metrics.make_metric_table` hold names. Columns of names are aligned to the left."""
    return 1 if len(tables) == 1 else 2


def markdown(args: argparse.Namespace) -> str:
    """Make the markdown table that the arguments request."""
    left = 1
    if args.study:
        rows = study_rows(args.study, args.table, args.markdown, args.intervals)
    else:
        tables = load_tables(args.scores)
        summaries = {table.name: table.summary for table in tables}
        if args.markdown == ALL_METRICS:
            rows = metrics.make_metric_table(summaries, COMPARED)
            left = left_columns(tables)
        else:
            rows = metrics.make_generator_table(summaries, args.markdown)
    heading, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    line = ["---"] * left + ["--:"] * (len(heading) - left)
    return "\n".join(f"| {' | '.join(row)} |" for row in (heading, line, *body))


def refresh(path: str, check: bool) -> None:
    """Update the tables below "made by" comments in a markdown document.

    Args:
        path: the document.
        check: do not write the document, but raise an error if a table is not up to date.

    Raises:
        UserError: if a table cannot be made, or if `check` is True and a table is not up to date.
    """
    try:
        before = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {printable(path)} ({error})") from None
    after = MADE_BY.sub(updated_table, before)
    if after == before:
        return
    if check:
        raise UserError(f"{printable(path)} has tables that are not up to date: run --refresh without --check")
    with write_atomically(os.path.realpath(path)) as file:
        file.write(after.encode())


def updated_table(match: re.Match) -> str:
    """Make the text that replaces a match of MADE_BY: the comment, followed by the output of its command."""
    comment, command = match[1], match[2]
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UserError(f"cannot run {command!r} ({error})") from None
    program = PROGRAM.split()
    if words[: len(program)] != program:
        raise UserError(f"cannot run {command!r}: expected {PROGRAM} ... --markdown")
    arguments = []
    for word in words[len(program) :]:
        arguments += sorted(glob.glob(word)) or [word]
    try:
        args = parse_arguments(arguments)
    except SystemExit:  # argparse has printed the reason
        raise UserError(f"cannot run {command!r}") from None
    if not args.markdown:
        raise UserError(f"cannot run {command!r}: expected {PROGRAM} ... --markdown")
    return f"{comment}\n{markdown(args)}"


if __name__ == "__main__":
    sys.exit(run_program(main))
