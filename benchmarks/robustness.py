"""How robust are detectors? A table from what `test.py --perturb all` (protocol "sweep") wrote.

    python test.py --resume DETECTOR ... --perturb all --save_path output/before
    python -m benchmarks.robustness output/before output/after [--protocol sweep] [--out FILE]

A row a perturbation, a column a detector; in it the AUROC in % against each generator, fake = positive. The last line
is the widest 95 % interval of any of them.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks.measure import report, table
from data.perturbations import PROTOCOLS, cells


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prefixes", nargs="+", metavar="SAVE_PATH", help="test.py's, one a detector")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="sweep", help="test.py's --perturb-protocol (sweep)")
    parser.add_argument("--out", metavar="FILE", help="write the numbers as JSON")
    args = parser.parse_args(argv)
    labels = [cell.label for cell in cells(args.protocol)]
    try:
        measured = {prefix: {label: generators(prefix, label) for label in labels} for prefix in args.prefixes}
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.stderr.write(f"error: not a sweep by test.py with labelled images: {error}\n")
        return 2
    rows = [["", *(Path(prefix).name for prefix in measured)]]
    rows += [[label, *(in_words(sweep[label]) for sweep in measured.values())] for label in labels]
    names = list(measured[args.prefixes[0]][labels[0]])
    widest = max(
        (high - low) / 2
        for sweep in measured.values()
        for found in sweep.values()
        for low, high in (m["interval"] for m in found.values())
    )
    text = f"AUROC in %: {' / '.join(names)}\n{table(rows)}95 % intervals: at most +-{100 * widest:.1f}\n"
    report(text, {"protocol": args.protocol, "auroc": measured}, args.out)
    return 0


def generators(prefix: str, label: str) -> dict[str, dict]:
    """{generator: {"auroc": 0..1, "interval": [low, high]}} of one perturbation."""
    file = Path(f"{prefix}_{label.replace(' ', '_')}.json")
    found = json.loads(file.read_text(encoding="utf-8"))["metrics"]["generators"]
    if any(m["auroc"] is None for m in found.values()):
        raise ValueError(f"{file}: no AUROC, which takes scored reals and fakes")
    return {name: {"auroc": m["auroc"], "interval": m["intervals"]["auroc"]} for name, m in found.items()}


def in_words(found: dict[str, dict]) -> str:
    return " / ".join(f"{100 * m['auroc']:.1f}" for m in found.values())


if __name__ == "__main__":
    sys.exit(main())
