"""What could tell real from generated images apart without looking at what was generated?

    python -m tools.audit --data-root-pos REAL_DIR --data-root-neg FAKE_DIR [--val-root-pos DIR ...]

Exit status: 0 no leak, 1 a leak, 2 a mistake in the call.
"""

import sys
from collections import Counter
from collections.abc import Sequence

from data.leaks import LEAK, SEVERITIES, audit
from data.lists import folder_items, labelled_items
from utils import options
from utils.console import printable
from utils.errors import run_program


def report(result: dict) -> str:
    """The result of `audit` in plain words."""
    lines = ["leak audit of " + ", ".join(f"{n} {group}" for group, n in result["files"].items())]
    for found in result["findings"]:
        lines.append(f"{found['severity'].upper()}: {found['check']}: {found['message']}")
        lines += [f"    {key}: {found[key]}" for key in ("shortcut", "way out") if found[key]]
        lines += [f"    such as: {printable(path)}" for path in found["examples"]]
    found = Counter(f["severity"] for f in result["findings"])
    verdict = ", ".join(f"{found[s]} {s}{'s' * (found[s] > 1)}" for s in SEVERITIES if found[s]) or "nothing found"
    return "\n".join([*lines, f"leak audit: {verdict}" + " (no leak)" * (not found[LEAK])])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the audit and print what it found. Returns the exit status."""
    parser = options.Parser("python -m data.leaks", __doc__.split("\n\n")[0])
    folders = {"nargs": "+", "default": [], "metavar": "DIR"}
    parser.add_argument("--data-root-pos", **folders, help="folders of REAL images")
    parser.add_argument("--data-root-neg", **folders, help="folders of GENERATED images")
    parser.add_argument("--val-root-pos", **folders, help="folders of REAL images for validation")
    parser.add_argument("--val-root-neg", **folders, help="folders of GENERATED images for validation")
    parser.add_argument("--data-root", dest="tree", metavar="TREE", help="a tree instead: GENERATOR/0_real, .../1_fake")
    parser.add_argument("--csv", metavar="FILE", help="a list instead: path,label[,generator] with label real or fake")
    args = parser.parse_args(argv)
    train = labelled_items(args.data_root_pos, args.data_root_neg, args.tree, args.csv)
    folders = args.val_root_pos, args.val_root_neg
    result = audit(train, folder_items(*folders) if any(folders) else ())
    sys.stdout.write(report(result) + "\n")
    return int(any(f["severity"] == LEAK for f in result["findings"]))


if __name__ == "__main__":
    sys.exit(run_program(main))
