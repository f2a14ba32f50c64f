"""How far apart are two score tables of the same images? For two precisions, devices, tile sizes or versions.

    python test.py --resume DETECTOR ... --save_path output/fp32
    python test.py --resume DETECTOR ... --save_path output/bf16 --precision bf16
    python -m benchmarks.agreement output/fp32.csv output/bf16.csv

Exit status: 0 done, 2 if the tables cannot be compared.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np

from utils.metrics import auroc
from utils.scores import ScoreError, ScoreTable, read_table


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs=2, metavar="SCORES.csv", help="of the same images, in the same order")
    args = parser.parse_args(argv)
    try:
        found = compare(*(read_table(name) for name in args.tables))
    except ScoreError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write("".join(f"{name}: {value:.4g}\n" for name, value in found.items()))
    return 0


def compare(a: ScoreTable, b: ScoreTable) -> dict[str, float]:
    """What two tables say of the images that both have scored.

    Raises:
        ScoreError: if they list other images, or none was scored by both.
    """
    if a.paths != b.paths:
        raise ScoreError(f"tables of {len(a)} and {len(b)} images, which are not the same ones in the same order")
    both = a.scored & b.scored
    if not both.any():
        raise ScoreError(f"none of the {len(a)} images was scored in both tables")
    a, b = a.select(both), b.select(both)
    apart = np.abs(a.logits.astype(np.float64) - b.logits)  # (N, 2)
    flipped = sum(mine != other for mine, other in zip(a.predictions, b.predictions, strict=True))
    found = {
        "images": len(a),
        "scored in one table only": int((~both).sum()),
        "logits differ at most by": apart.max(),
        "on average by": apart.mean(),
        "spread of logit_fake - logit_real (standard deviation)": a.margins.std(),
        "verdicts that differ": flipped,
    }
    labelled = a.is_real | a.is_fake
    if a.is_real.any() and a.is_fake.any():
        for name, table in (("first", a), ("second", b)):
            found[f"AUROC of the {name} in %"] = 100 * auroc(table.margins[labelled], table.is_fake[labelled])
    return found


if __name__ == "__main__":
    sys.exit(main())
