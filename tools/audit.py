"""Search image sets for leaks: properties besides the image content that separate real from fake images.

    python -m tools.audit --data-root-pos REAL_DIR --data-root-neg FAKE_DIR [--val-root-pos DIR ...] [--val-csv FILE]

The exit status is 0 if no leak was found, 1 if a leak was found, and 2 if the arguments are wrong.
"""

import sys
from collections import Counter
from collections.abc import Sequence

from data.leaks import LEAK, SEVERITIES, Audit, audit_images
from data.lists import list_labelled_images, list_labelled_images_in_csv, list_labelled_images_in_folders
from utils import options
from utils.console import make_printable
from utils.errors import run_program


def format_audit_result(result: Audit) -> str:
    """Format the findings of a leak audit as lines of text for the terminal."""
    lines = ["leak audit of " + ", ".join(f"{number} {group}" for group, number in result.files.items())]
    for finding in result.findings:
        lines.append(f"{finding.severity.upper()}: {finding.check}: {finding.message}")
        lines.append(f"    way out: {finding.way_out}")
        lines += [f"    for example: {make_printable(path)}" for path in finding.examples]
    counts = Counter(finding.severity for finding in result.findings)
    numbers = [f"{severity}s: {counts[severity]}" for severity in SEVERITIES if counts[severity]]
    lines.append("leak audit: " + (", ".join(numbers) or "nothing found"))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the leak audit of the images that the command line names, and print the findings."""
    parser = options.Parser("python -m tools.audit", __doc__.split("\n\n")[0])
    folders = {"nargs": "+", "default": [], "metavar": "DIR"}
    parser.add_argument("--data-root-pos", **folders, help="folders of real images for training")
    parser.add_argument("--data-root-neg", **folders, help="folders of fake images for training")
    parser.add_argument("--val-root-pos", **folders, help="folders of real images for validation")
    parser.add_argument("--val-root-neg", **folders, help="folders of fake images for validation")
    parser.add_argument(
        "--data-root",
        dest="tree",
        metavar="TREE",
        help="folder of images for training, with one subfolder per generator: TREE/GENERATOR/0_real and"
        " TREE/GENERATOR/1_fake; folders for validation or test are left out",
    )
    parser.add_argument(
        "--csv",
        metavar="FILE",
        help="CSV file of images for training, with the columns path,label[,generator]; a label is real or fake",
    )
    parser.add_argument("--val-csv", metavar="FILE", help="CSV file of images for validation, in the format of --csv")
    args = parser.parse_args(arguments)
    train = list_labelled_images(args.data_root_pos, args.data_root_neg, args.tree, args.csv, training=True)
    validation = []
    if args.val_csv:
        validation += list_labelled_images_in_csv(args.val_csv)
    if args.val_root_pos or args.val_root_neg:
        validation += list_labelled_images_in_folders(args.val_root_pos, args.val_root_neg)
    result = audit_images(train, validation)
    sys.stdout.write(format_audit_result(result) + "\n")
    return int(any(finding.severity == LEAK for finding in result.findings))


if __name__ == "__main__":
    sys.exit(run_program(main))
