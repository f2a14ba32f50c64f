"""Make a web page or markdown tables from the score tables of test.py.

    python -m tools.report SCORES.csv [SCORES.csv ...] --out DIR [--residuals DIR]
    python -m tools.report SCORES.csv [SCORES.csv ...] --markdown [METRIC]
    python -m tools.report --study STUDY.csv --table NAME --markdown METRIC [--intervals]
    python -m tools.report --refresh DOCUMENT.md [DOCUMENT.md ...] [--check]

With --refresh, the program updates the tables in markdown documents. A comment directly above each table contains the
command that makes the table:

    <!-- made by: python -m tools.report results/faces/*.csv --markdown auroc -->
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
from tools.report_page import load_score_tables, write_report_page
from tools.study import make_metric_table_of_study
from utils import options
from utils.console import format_text_table, make_printable
from utils.errors import UserError, run_program
from utils.files import open_for_atomic_write

PROGRAM = "python -m tools.report"
# Each match is a comment (group 1) that contains a command (group 2), and the table below the comment
MADE_BY = re.compile(r"^(<!-- made by: (.+) -->)[ \t]*(?:\n\|.*)*", re.MULTILINE)
COMPARED = ("accuracy", "auroc", "average_precision")  # columns of a table if the user names no metric
ALL_METRICS = "all"


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    for document in args.refresh or ():
        update_tables_of_document(document, args.check)
    if args.refresh:
        return 0
    if args.markdown:
        sys.stdout.write(make_markdown_table(args) + "\n")
        return 0
    if args.residuals and not os.path.isdir(args.residuals):
        raise UserError(
            f"--residuals: {make_printable(args.residuals)} is not a folder; give the folder that test.py"
            " --save-residuals wrote"
        )
    tables = load_score_tables(args.scores)
    page = write_report_page(tables, args.out, args.residuals)
    rows = metrics.make_metric_table({table.name: table.summary for table in tables}, COMPARED)
    text = format_text_table(rows, count_name_columns_of_metric_table(tables))
    sys.stdout.write("numbers are in %, with 95 % bootstrap intervals; fake is the positive class\n")
    sys.stdout.write(f"{text}\nreport: {make_printable(page)}\n")
    return 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line, and exit with an error if the options do not fit together."""
    parser = options.Parser(PROGRAM, "Make a web page or markdown tables from score tables.")
    parser.add_argument("scores", nargs="*", metavar="SCORES.csv", help="score tables that test.py wrote")
    parser.add_argument(
        "--study",
        metavar="STUDY.csv",
        help="CSV file that lists the score tables for each cell of a results table (format: see tools/study.py)",
    )
    text = "with --study: name of the table to make, one of the names in the column 'table' of STUDY.csv"
    parser.add_argument("--table", metavar="NAME", help=text)
    text = "with --study: add bootstrap intervals, or the range over the seeds if there are several seeds"
    parser.add_argument("--intervals", action="store_true", help=text)
    names = [name for name, metric in metrics.METRICS.items() if metric.is_column]
    output = parser.add_mutually_exclusive_group(required=True)
    output.add_argument("--out", metavar="DIR", help="write the web page DIR/report.html")
    text = f"print a markdown table of METRIC ({', '.join(names)}; default: accuracy, AUROC and AP)"
    output.add_argument("--markdown", nargs="?", const=ALL_METRICS, metavar="METRIC", help=text)
    text = "markdown documents in which the tables below 'made by' comments are updated"
    output.add_argument("--refresh", nargs="+", metavar="FILE.md", help=text)
    text = "with --refresh: change no document, but exit with an error if a table is not up to date"
    parser.add_argument("--check", action="store_true", help=text)
    text = "with --out: folder that test.py --save-residuals wrote; the page shows its pictures of residuals"
    parser.add_argument("--residuals", metavar="DIR", help=text)
    args = parser.parse_args(arguments)
    sources = [bool(args.scores), bool(args.study), bool(args.refresh)]
    if sum(sources) != 1 or bool(args.study) != bool(args.table):
        parser.error("give either score tables, or --study STUDY.csv with --table NAME, or --refresh FILE.md")
    if args.markdown and args.markdown not in (ALL_METRICS, *names):
        parser.error(f"--markdown: expected one of {', '.join(names)}, got {args.markdown}")
    if args.intervals and not args.study:
        parser.error("--intervals needs --study STUDY.csv")
    if args.check and not args.refresh:
        parser.error("--check needs --refresh FILE.md")
    if args.residuals and not args.out:
        parser.error("--residuals needs --out DIR")
    if args.study and args.markdown in (None, ALL_METRICS):
        parser.error("--study needs --markdown METRIC: name the metric that the table shows")
    return args


def count_name_columns_of_metric_table(tables: Sequence) -> int:
    """Return how many columns in a table from `metrics.make_metric_table` contain names instead of numbers."""
    return 1 if len(tables) == 1 else 2


def make_markdown_table(args: argparse.Namespace) -> str:
    """Make the markdown table that the command line requests."""
    left = 1
    if args.study:
        rows = make_metric_table_of_study(args.study, args.table, args.markdown, args.intervals)
    else:
        tables = load_score_tables(args.scores)
        summaries = {table.name: table.summary for table in tables}
        if args.markdown == ALL_METRICS:
            rows = metrics.make_metric_table(summaries, COMPARED)
            left = count_name_columns_of_metric_table(tables)
        else:
            rows = metrics.make_table_of_metrics_per_generator(summaries, args.markdown)
    heading, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    line = ["---"] * left + ["--:"] * (len(heading) - left)
    return "\n".join(f"| {' | '.join(row)} |" for row in (heading, line, *body))


def update_tables_of_document(path: str, check: bool) -> None:
    """Update each table in a markdown document that has its command in a comment above it.

    Args:
        check: whether to only check that the tables are up to date, without changing the document.

    Raises:
        UserError: if a table cannot be made, or if `check` is True and a table is not up to date.
    """
    try:
        before = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {make_printable(path)} ({error})") from None
    after = MADE_BY.sub(make_table_with_command_in_comment, before)
    if after == before:
        return
    if check:
        raise UserError(
            f"{make_printable(path)} has tables that are not up to date: run tools.report --refresh without --check"
        )
    with open_for_atomic_write(os.path.realpath(path)) as file:
        file.write(after.encode())


def make_table_with_command_in_comment(match: re.Match) -> str:
    """Run the command in a comment of a markdown document, and return the comment with the new table below it."""
    comment, command = match[1], match[2]
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UserError(
            f"cannot run the command {command!r} in the comment above a table ({error}): correct the command"
        ) from None
    program = PROGRAM.split()
    if words[: len(program)] != program:
        raise UserError(f"the command {command!r} in the comment above a table must start with {PROGRAM!r}: correct it")
    arguments = []
    for word in words[len(program) :]:
        arguments += sorted(glob.glob(word)) or [word]
    try:
        args = parse_arguments(arguments)
    except SystemExit:  # argparse has already printed an error message
        raise UserError(
            f"cannot run the command {command!r} in the comment above a table: correct the command, see the error above"
        ) from None
    if not args.markdown:
        raise UserError(f"the command {command!r} in the comment above a table prints no table: add --markdown to it")
    return f"{comment}\n{make_markdown_table(args)}"


if __name__ == "__main__":
    sys.exit(run_program(main))
