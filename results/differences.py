"""Print a markdown table with the AUROC of detectors with RDN minus the AUROC of detectors without RDN.

    python results/differences.py faces             reads the score tables in results/faces/scores
    python results/differences.py real_pictures     reads the score tables in results/real_pictures/scores

The detectors without RDN, called controls, use bicubic interpolation or no re-synthesis. The 95 % interval of a
difference of AUROCs is computed from 1,000 bootstrap resamples, in which the images and the seeds are drawn with
replacement. The interval in a cell with "one seed" does not show how much the difference depends on the seed.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from scipy.stats import rankdata

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))

from evaluation.metrics import select_fakes_and_reals_per_generator  # noqa: E402
from evaluation.score_table import ScoreTable, read_table  # noqa: E402

RESAMPLES = 1000
# SETTINGS[study][setting] names three detectors: with RDN, with bicubic interpolation, and without re-synthesis.
# If a detector was trained again with another seed, its name ends with _seed and a digit, as in pixel_rdn_seed1.
SETTINGS = {
    "faces": {
        "pixel": ("pixel_rdn", "pixel_bicubic", "pixel_none"),
        "stage 4": ("stage4_rdn", "stage4_bicubic", "stage4_none"),
        "stage 5": ("stage5_rdn", "stage5_bicubic", "stage5_none"),
    },
    "real_pictures": {
        "pixel, trained on DALL-E mini": ("pixel_on_dalle_mini", "bicubic_on_dalle_mini", "control_on_dalle_mini"),
        "pixel, trained on Stable Diffusion": (
            "pixel_on_stable_diffusion",
            "bicubic_on_stable_diffusion",
            "control_on_stable_diffusion",
        ),
        "stage 4, trained on DALL-E mini": (
            "stage4_on_dalle_mini",
            "bicubic_stage4_on_dalle_mini",
            "control_stage4_on_dalle_mini",
        ),
        "stage 4, trained on Stable Diffusion": (
            "stage4_on_stable_diffusion",
            "bicubic_stage4_on_stable_diffusion",
            "control_stage4_on_stable_diffusion",
        ),
        "stage 5, trained on DALL-E mini": (
            "stage5_on_dalle_mini",
            "bicubic_stage5_on_dalle_mini",
            "control_stage5_on_dalle_mini",
        ),
        "stage 5, trained on Stable Diffusion": (
            "stage5_on_stable_diffusion",
            "bicubic_stage5_on_stable_diffusion",
            "control_stage5_on_stable_diffusion",
        ),
        "spectrum, trained on DALL-E mini + up-sampled copies": (
            "spectrum_on_dalle_mini_and_upsampled",
            "spectrum_bicubic_on_dalle_mini_and_upsampled",
            "spectrum_control_on_dalle_mini_and_upsampled",
        ),
        "spectrum, trained on Stable Diffusion + up-sampled copies": (
            "spectrum_on_stable_diffusion_and_upsampled",
            "spectrum_bicubic_on_stable_diffusion_and_upsampled",
            "spectrum_control_on_stable_diffusion_and_upsampled",
        ),
        "spectrum, trained on Stable Diffusion + up-sampled copies, faces": (
            "spectrum_on_stable_diffusion_and_upsampled_faces",
            "spectrum_bicubic_on_stable_diffusion_and_upsampled_faces",
            "spectrum_control_on_stable_diffusion_and_upsampled_faces",
        ),
    },
}


def read_tables_of_all_seeds(study: str, detector: str) -> dict[str, ScoreTable]:
    """Read the score tables of a detector in a study into a dict with keys such as "_seed1", or "" without a seed."""
    folder = FOLDER / study / "scores"
    files = [*folder.glob(f"{detector}.csv"), *sorted(folder.glob(f"{detector}_seed?.csv"))]
    return {file.stem.removeprefix(detector): read_table(file) for file in files}


def select_scores_of_images(tables: list[ScoreTable], paths: list[str]) -> np.ndarray:
    """Return the scores (seeds, N), logit for FAKE minus logit for REAL, of the N images with the given paths."""
    scores = []
    for table in tables:
        row_of_path = {path: i for i, path in enumerate(table.paths)}
        scores.append(table.logit_margins[[row_of_path[path] for path in paths]])
    return np.stack(scores)


def mean_auroc_over_seeds(scores: np.ndarray, is_fake: np.ndarray) -> float:
    """Return the mean over seeds of the AUROC of `scores` (seeds, N) for the labels `is_fake` (N,).

    The AUROC is computed from the ranks of the scores (Mann and Whitney, 1947).
    """
    ranks = rankdata(scores, axis=1)  # ranks among the N scores of each seed, (seeds, N); equal scores have equal ranks
    fakes = np.count_nonzero(is_fake)
    reals = len(is_fake) - fakes
    # `wins` is the number of pairs of a fake and a real image in which the fake image has the higher score.
    wins = ranks[:, is_fake].sum(axis=1) - fakes * (fakes + 1) / 2  # (seeds,)
    return float(np.mean(wins / (fakes * reals)))


def compute_auroc_difference_with_interval(
    with_rdn: np.ndarray, with_control: np.ndarray, is_fake: np.ndarray
) -> tuple[float, float, float]:
    """Compute the AUROC of the scores `with_rdn` minus the AUROC of the scores `with_control`.

    Args:
        with_rdn, with_control: scores of the same images by detectors with the same seeds, (seeds, N).
        is_fake: whether each image is fake, (N,) bool.

    Returns:
        The difference, and the lower and the upper end of its 95 % interval.
    """
    rng = np.random.default_rng(0)
    reals = np.flatnonzero(~is_fake)
    fakes = np.flatnonzero(is_fake)
    values = []
    for _ in range(RESAMPLES):
        drawn = np.concatenate([rng.choice(reals, len(reals)), rng.choice(fakes, len(fakes))])
        seeds = rng.integers(len(with_rdn), size=len(with_rdn))
        auroc = mean_auroc_over_seeds(with_rdn[seeds][:, drawn], is_fake[drawn])
        values.append(auroc - mean_auroc_over_seeds(with_control[seeds][:, drawn], is_fake[drawn]))
    low, high = np.percentile(values, [2.5, 97.5])
    return mean_auroc_over_seeds(with_rdn, is_fake) - mean_auroc_over_seeds(with_control, is_fake), low, high


def format_auroc_difference(rdn: dict[str, ScoreTable], control: dict[str, ScoreTable], generator: str) -> str:
    """Format the AUROC with RDN minus the AUROC of a control on fakes of `generator`, in percentage points.

    If the two detectors have no common seed with scores of all test images, return "-".
    """
    first = next(iter(rdn.values()))
    rows = select_fakes_and_reals_per_generator(first)[generator]
    paths = [path for path, used in zip(first.paths, rows, strict=True) if used]
    seeds = []
    for seed in sorted(rdn.keys() & control.keys()):
        if set(paths) <= set(rdn[seed].paths) and set(paths) <= set(control[seed].paths):
            seeds.append(seed)
    if not seeds:
        return "-"
    scores = [select_scores_of_images([tables[seed] for seed in seeds], paths) for tables in (rdn, control)]
    value, low, high = compute_auroc_difference_with_interval(*scores, first.is_fake[rows])
    cell = f"{100 * value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
    return cell if len(seeds) > 1 else f"{cell}, one seed"


def main(study: str) -> None:
    sys.stdout.write("| AUROC, points | test images | RDN - bicubic | RDN - none |\n| --- | --- | --: | --: |\n")
    for setting, detectors in SETTINGS[study].items():
        rdn, bicubic, none = [read_tables_of_all_seeds(study, detector) for detector in detectors]
        for generator in select_fakes_and_reals_per_generator(next(iter(rdn.values()))):
            cells = [format_auroc_difference(rdn, control, generator) for control in (bicubic, none)]
            sys.stdout.write(f"| {setting} | {generator} | {' | '.join(cells)} |\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=list(SETTINGS), help="folder in results/ from which the score tables are read")
    main(parser.parse_args().study)
