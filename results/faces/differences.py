"""Print the AUROC with RDN minus the AUROC with each control network, as a markdown table.

    python results/faces/differences.py [--cells pixel stage4 ...]

Both AUROCs are computed on the same test images. The score tables are results/faces/scores/CELL_NETWORK_seedN.csv. CELL
is one setting of the study, such as "stage5". Each difference is the mean over the seeds. The 95 % interval is computed
from 1,000 bootstrap resamples of the images. Each resample has the same images for all seeds and for both networks.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_auc_score

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parents[1]))

from evaluation.metrics import select_fakes_and_reals_per_generator  # noqa: E402
from evaluation.score_table import read_table  # noqa: E402

NETWORKS = ("rdn", "bicubic", "none")  # re-synthesizers; "bicubic" and "none" are controls
RESAMPLES = 1000


def read_scores_of_study_setting(cell: str) -> tuple[dict[str, np.ndarray], np.ndarray, dict[str, np.ndarray]]:
    """Read the score tables of one setting (cell) of the study, for all networks and seeds.

    Returns:
        The scores of each network, {network: (seeds, N)}; whether each image is fake, (N,) bool; and the images of each
        generator, {generator: (N,) bool}. The images of a generator are its fake images and all real images.
    """
    scores = {}
    for network in NETWORKS:
        files = sorted((FOLDER / "scores").glob(f"{cell}_{network}_seed?.csv"))
        tables = [read_table(file) for file in files]
        if not tables:
            raise SystemExit(f"found no score table {cell}_{network}_seedN.csv: run results/faces/run.sh")
        if any(table.paths != tables[0].paths for table in tables):
            raise SystemExit(
                f"expected the same images in all score tables {cell}_{network}_seedN.csv, got different images"
            )
        scores[network] = np.stack([table.logit_margins for table in tables])
    return scores, tables[0].is_fake, select_fakes_and_reals_per_generator(tables[0])


def mean_auroc_over_seeds(scores: np.ndarray, is_fake: np.ndarray) -> float:
    """Compute the AUROC of each seed, and return the mean. scores: (seeds, N). is_fake: (N,) bool."""
    return float(np.mean([roc_auc_score(is_fake, row) for row in scores]))


def compare_auroc(scores: dict[str, np.ndarray], control: str, is_fake: np.ndarray) -> tuple[float, float, float]:
    """Compute the AUROC with RDN minus the AUROC with a control network.

    Returns:
        The difference, and the lower and the upper end of its 95 % interval.
    """
    rng = np.random.default_rng(0)
    reals = np.flatnonzero(~is_fake)
    fakes = np.flatnonzero(is_fake)
    values = []
    for _ in range(RESAMPLES):
        drawn = np.concatenate([rng.choice(reals, len(reals)), rng.choice(fakes, len(fakes))])
        with_rdn = mean_auroc_over_seeds(scores["rdn"][:, drawn], is_fake[drawn])
        with_control = mean_auroc_over_seeds(scores[control][:, drawn], is_fake[drawn])
        values.append(with_rdn - with_control)
    low, high = np.percentile(values, [2.5, 97.5])
    return mean_auroc_over_seeds(scores["rdn"], is_fake) - mean_auroc_over_seeds(scores[control], is_fake), low, high


def main(cells: Sequence[str]) -> None:
    sys.stdout.write("| AUROC, points | test images | RDN - bicubic | RDN - none |\n| --- | --- | --: | --: |\n")
    for cell in cells:
        scores, is_fake, generators = read_scores_of_study_setting(cell)
        for generator, rows in generators.items():
            subset = {network: values[:, rows] for network, values in scores.items()}
            cells_of_row = []
            for control in ("bicubic", "none"):
                value, low, high = compare_auroc(subset, control, is_fake[rows])
                cells_of_row.append(f"{100 * value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]")
            sys.stdout.write(f"| {cell} | {generator} | {' | '.join(cells_of_row)} |\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cells", nargs="+", default=["pixel"], help="settings (cells) of results/faces/run.sh (default: pixel)"
    )
    main(parser.parse_args().cells)
