"""Score images with a trained detector. For labelled images (real or fake), test.py also computes metrics.

    python test.py --resume DETECTOR --data-root-pos REAL_DIR --data-root-neg GENERATED_DIR --save_path output/mine
    python test.py --resume DETECTOR --input a.png photos/

With the option --save_path P, test.py writes these files:

    P.csv     the scores, one row per image
    P.npy     the logits of the images, float32 (N, 2), with the columns FAKE and REAL
    P.json    metrics, settings, and the versions of Python and of packages
    P.png     ROC curves and histograms of the scores, if the images are labelled

If a run with --save_path is killed, repeat its command without --overwrite to score the remaining images.
"""

import contextlib
import logging
import math
import re
import sys
import tempfile
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from data.datasets import Batch, ImageDataset, Key, make_loader, merge_batches_of_equal_image_size
from data.images import compute_size_after_resize_and_crop, read_header
from data.lists import (
    ImageFlags,
    Item,
    count_images_trained_on,
    describe_and_hash_image_list,
    list_images_without_labels,
    list_labelled_images,
)
from data.perturbations import Perturbation, PerturbationSetting, select_perturbations
from evaluation.detector import BATCH_PIXELS, Detector, images_per_batch
from evaluation.loading import detector_from_checkpoint, select_settings_that_load_accepts
from evaluation.outputs import (
    ResidualPictures,
    device_and_inode,
    path_without_suffix,
    refuse_to_replace_files_of_other_programs,
)
from evaluation.score_table import Row, ScoreTable, make_error_row, make_rows_from_logits, read_table
from evaluation.score_writer import ScoreWriter, read_file_sizes_and_times
from utils.compute import choose_device_and_precision, package_versions
from utils.console import format_text_table, make_printable, progress_bar
from utils.distributed import connect_processes
from utils.errors import UserError, is_machine_fault, run_program
from utils.files import hold_lock_file, make_folder, open_for_atomic_write, remove_leftover_temporary_files
from utils.options import create_test_parser
from utils.signals import Stopped, StopSignal

logger = logging.getLogger("test")

EXIT_ERRORS = 1  # exit status if some images could not be scored
LONGEST_REASON = 300  # maximum number of characters of an exception's text in an error message
HEADERS = 32  # maximum number of image headers that are read to choose the number of images per batch


def main(args: Namespace) -> int:
    compute = choose_device_and_precision(args.gpu, args.precision, args.deterministic, args.seed)
    with connect_processes(compute.device.type) as world, StopSignal() as stop, contextlib.ExitStack() as stack:
        # 1. Find the images and load the detector (no file is written before step 2)
        if not args.resume:
            raise UserError("no detector is given: give the checkpoint of a detector with --resume")
        if world.size > 1 and not args.save_path:
            raise UserError("several processes need a common output path: give --save_path")
        items = list_images_to_score(args.input, (args.real_roots, args.fake_roots, args.tree, args.csv))
        perturbations = select_perturbations(args.perturb_protocol, args.perturb or [("none", None)])
        options = select_settings_that_load_accepts(vars(args))
        detector = detector_from_checkpoint(compute, args.resume, args.resynthesizer_file, args.vgg_weights, options)
        detector.network.set_tile_side(args.tile)
        trained_on = count_training_images_among_scored_images(items, detector) if world.is_main else 0

        # 2. Choose the output files
        save_path = args.save_path or stack.enter_context(tempfile.TemporaryDirectory()) + "/scores"
        base = path_without_suffix(save_path)
        places = choose_output_paths(base, args.save_residuals, perturbations, items)
        inputs = [args.resume, args.resynthesizer_file, args.vgg_weights, args.csv, *(item.path for item in items)]
        read_files = {device_and_inode(path) for path in inputs if path} - {None}
        for place in places.values():
            refuse_to_replace_files_of_other_programs(place.base, place.pictures.paths, read_files)
        for folder in filter(None, (base.parent, args.save_residuals)):
            make_folder(folder)
        stack.enter_context(hold_lock_file(base.with_name(f".{base.name}.lock"), world))
        if world.is_main:
            for place in places.values():
                own_files = re.escape(place.base.name) + r"\.(csv(\.\d+\.part)?|npy|json|png)"
                remove_leftover_temporary_files(base.parent, own_files)

        # 3. For each perturbation, score all images
        stamps = read_file_sizes_and_times(items)
        common_settings = describe_scoring_settings(detector, items)
        results = {}
        for perturbation, (base_of_table, pictures) in places.items():
            transform = None
            if perturbation.name != "none":
                transform = Perturbation(perturbation, args.perturb_protocol, args.seed)
            description = describe_perturbation(perturbation, args.perturb_protocol, args.seed)
            scoring_settings = {**common_settings, "perturbation": description}
            pictures.store_hash_of_scoring_settings(scoring_settings)
            writer = ScoreWriter(Path(f"{base_of_table}.csv"), items, stamps, scoring_settings, world)
            if writer.start_partial_table(args.overwrite, pictures.find_images_without_current_picture()):
                images = ImageDataset(items, detector.resize_and_crop_policy_for_reading, transform=transform)
                batches = read_unscored_batches(images, detector, writer, args.batch_size, args.workers)
                score_images(detector, batches, writer, pictures, stop)
                writer.write_table_from_partial_tables()

            # 4. Write the .npy, .json and .png files from the scores in the .csv file
            if world.is_main:
                record = {"settings": {**vars(args), "precision": compute.precision}, "perturbation": description}
                record["detector"] = {"file": args.resume, **detector.describe_model()}
                record["trained_on"] = trained_on
                results[perturbation.label] = write_result_files(base_of_table, writer, record, args.seed)
        if not world.is_main:
            return 0

        # 5. Print the verdicts or the metrics
        sys.stdout.write("\n".join(format_verdicts_or_metrics(results, detector.calibration, bool(args.input))) + "\n")
        if args.input:
            for line in detector.describe_differences_from_training_images([item.path for item in items]):
                logger.warning("warning: %s", line)
        if args.save_path:
            log_written_files(base, results)
        if args.save_residuals:
            logger.info("the residual pictures are in %s", make_printable(args.save_residuals))
        is_complete = all(table.has_score.all() for table, _ in results.values())
        return 0 if is_complete else EXIT_ERRORS


# --- before the first score -----------------------------------------------------------------------------------


def list_images_to_score(inputs: list[str] | None, labelled: tuple) -> list[Item]:
    """List the images to score: the unlabelled images of --input, or the labelled images of folders or a CSV file.

    Args:
        labelled: the values of --data-root-pos, --data-root-neg, --data-root and --csv, each None if not given.
    """
    if inputs and any(labelled):
        raise UserError(
            "--input cannot be combined with labelled images: score the images of --input in one run of test.py, and"
            " the labelled images in another run"
        )
    if inputs:
        return list_images_without_labels(inputs)
    others = "--data-root TREE, or --csv FILE; for images without labels, give --input PATH"
    return list_labelled_images(*labelled, flags=ImageFlags(others=others))


def count_training_images_among_scored_images(items: list[Item], detector: Detector) -> int:
    """Count the images to score that are training images of the detector, and warn if there are any.

    Returns 0 if the checkpoint does not list its training images.
    """
    if detector.trained_on is None:
        return 0
    count = count_images_trained_on(items, detector.trained_on.numpy())
    if count:
        logger.warning(
            "warning: %d of the %d images to score are probably training images of the detector, because a training"
            " image has the same file name, file size and middle 64 bytes. The scores of training images do not show"
            " how well the detector works on new images: leave training images out",
            count,
            len(items),
        )
    return count


class OutputPaths(NamedTuple):
    """The paths of the files that test.py writes for one perturbation, such as JPEG compression."""

    base: Path  # the path P of the output files P.csv, P.npy, P.json and P.png
    pictures: ResidualPictures


def choose_output_paths(
    base: Path, residual_folder: str | None, perturbations: list[PerturbationSetting], items: list[Item]
) -> dict[PerturbationSetting, OutputPaths]:
    """Choose the output paths for each perturbation.

    With several perturbations, each output path contains the name of its perturbation.
    """
    if len(perturbations) == 1:
        return {perturbations[0]: OutputPaths(base, ResidualPictures(residual_folder, items))}
    places = {}
    for perturbation in perturbations:
        own_base = base.with_name(f"{base.name}_{perturbation.file_name}")
        own_folder = Path(residual_folder, perturbation.file_name) if residual_folder else None
        places[perturbation] = OutputPaths(own_base, ResidualPictures(own_folder, items))
    return places


def describe_perturbation(perturbation: PerturbationSetting, protocol: str, seed: int) -> dict:
    """Return the dict that describes a perturbation in the output files of test.py."""
    description = {"name": perturbation.name, "strength": perturbation.strength, "label": perturbation.label}
    if perturbation.name != "none":
        description.update(protocol=protocol, seed=seed)
    return description


def describe_scoring_settings(detector: Detector, items: list[Item]) -> dict:
    """Return a dict of everything that the scores depend on, except the perturbation and the content of image files."""
    identity = detector.describe_model()
    vgg = identity.get("vgg")
    # The entry "vgg" keeps only the fingerprint of the VGG-19 weights, because their path does not affect the scores.
    identity["vgg"] = vgg and vgg["fingerprint"]
    return {
        "detector": identity,
        "crop_size": detector.policy.crop_size,
        "resize": detector.policy.resize,
        "crops": detector.crops,
        "precision": detector.compute.precision,
        "images": describe_and_hash_image_list(items),
    }


# --- scores ---------------------------------------------------------------------------------------------------


def read_unscored_batches(
    images: ImageDataset, detector: Detector, writer: ScoreWriter, batch_size: int | None, workers: int
) -> Iterator[Batch]:
    """Read the images that must still be scored, and yield batches of images of equal size.

    Args:
        batch_size: maximum number of images per batch, or None to limit the pixels of a batch to BATCH_PIXELS.
    """
    if batch_size:
        block, pixels = batch_size, math.inf
    else:
        block, pixels = estimate_images_per_batch(images), BATCH_PIXELS
    missing = writer.list_unscored_images(block)
    loader = make_loader(images, OneImageBatches(missing), workers if len(missing) > 1 else 0, detector.compute)
    with progress_bar(None, "scoring", total=len(missing), unit="images") as bar:
        for batch in merge_batches_of_equal_image_size(loader, block, pixels):
            yield batch
            bar.update(len(batch.items) + len(batch.errors))


def estimate_images_per_batch(images: ImageDataset) -> int:
    """Read the sizes of up to HEADERS images, and estimate how many images of the dataset fit into a batch."""
    step = math.ceil(len(images.items) / HEADERS)
    counts = []
    for item in images.items[::step]:
        size = read_header(item.path, images.policy).size
        if size is not None:
            counts.append(images_per_batch(*compute_size_after_resize_and_crop(*size, images.policy)))
    return sorted(counts)[len(counts) // 2] if counts else 1


class OneImageBatches(Sequence):
    """A sequence of lists that each contain the `Key` of one image, as argument `batches` of `make_loader`.

    A `Key` is created in `__getitem__`, because a list of millions of `Key`s would take much memory.

    Args:
        indices: dataset indices (N,) of the images.
    """

    def __init__(self, indices: np.ndarray):
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> list[Key]:
        return [Key(0, int(self.indices[number]))]


def score_images(
    detector: Detector, batches: Iterable[Batch], writer: ScoreWriter, pictures: ResidualPictures, stop: StopSignal
) -> None:
    """Score each image in the batches, and write one row per image to the score table.

    Raises:
        Stopped: after the current batch, if the program has received a signal to stop.
    """
    logged_errors = set()
    for batch in batches:
        rows = {index: make_error_row(writer.items[index], problem) for index, problem in batch.errors.items()}
        if len(batch.x):
            rows.update(score_batch(detector, batch, pictures, logged_errors))
        writer.write_rows(dict(sorted(rows.items())))
        for row in rows.values():
            if row.error:
                logger.warning("image not scored: %s", row.error)
        if stop.received:
            raise Stopped(stop.received)


def score_batch(
    detector: Detector, batch: Batch, pictures: ResidualPictures, logged_errors: set[str]
) -> dict[int, Row]:
    """Score a batch of images, and return a dict from the index of each image to its row of the score table.

    If scoring a batch fails, the images of the batch are scored one by one, so that one bad image does not end the run.

    Args:
        logged_errors: descriptions of the errors whose traceback has been logged, to which a new error is added.
    """
    indices = [key.index for key in batch.keys]
    if not pictures.paths:
        try:
            logits = detector.logits(batch.x)  # (B, 2)
            return dict(
                zip(indices, make_rows_from_logits(batch.items, logits.numpy(), detector.calibration), strict=True)
            )
        except Exception as error:
            if is_machine_fault(error):
                raise  # a fault of the machine, such as a failed GPU, affects all images
            reason = describe_error(error)
            text = "a batch of %d images cannot be scored (%s): its images are scored one by one"
            logger.warning(text, len(batch.x), reason, exc_info=reason not in logged_errors)
            logged_errors.add(reason)
    rows = {}
    for i, item, image in zip(indices, batch.items, batch.x, strict=True):
        rows[i] = score_one_image(detector, item, image, pictures, i)
    return rows


def score_one_image(detector: Detector, item: Item, image: Tensor, pictures: ResidualPictures, index: int) -> Row:
    """Score one image, and with the option --save-residuals also draw a picture of the image's residual.

    Args:
        image: uint8 (3, H, W).

    Returns:
        the row of the image in the score table, with an error message if the image cannot be scored or drawn.

    Raises:
        Exception: if the machine has a fault, such as a full disk or a failed GPU.
    """
    doing = "be scored"
    try:
        examination = detector.compute_resynthesis_residual_and_logits(image)
        doing = "be drawn"
        if pictures.paths:
            pictures.draw_residual_picture_of_image(index, examination)
    except Exception as error:
        if is_machine_fault(error):
            raise
        return make_error_row(item, f"{make_printable(item.path)}: cannot {doing} ({describe_error(error)})")
    return make_rows_from_logits([item], examination.logits.numpy(), detector.calibration)[0]


def describe_error(error: Exception) -> str:
    """Describe an exception by its type and the beginning of its message, in one line."""
    message = " ".join(str(error).split())[:LONGEST_REASON]
    return f"{type(error).__name__}: {message}"


# --- results --------------------------------------------------------------------------------------------------


def write_result_files(base: Path, writer: ScoreWriter, record: dict, seed: int) -> tuple[ScoreTable, dict | None]:
    """Write the .npy, .json and .png files from the scores in the .csv file, and delete the temporary .part files.

    Args:
        record: entries that are written to the .json file, together with the metrics and the version numbers.
        seed: random seed of the bootstrap for the metrics.

    Returns:
        the score table and its metrics. The metrics are None if no image has both a label and a score.
    """
    table = read_table(f"{base}.csv")
    with open_for_atomic_write(f"{base}.npy") as file:
        np.save(file, table.logits)
    metrics = None
    if table.has_label_and_score.any():
        from evaluation.metrics import (
            compute_metrics_overall_and_per_generator,  # imported here, because scikit-learn takes a second to import
        )

        metrics = compute_metrics_overall_and_per_generator(table, seed=seed)
    writer.write_json_record_of_score_table({**record, "metrics": metrics, "versions": package_versions()})
    figure = Path(f"{base}.png")
    if metrics:
        # imported here, because Matplotlib takes a second to import
        from evaluation.figures import draw_roc_and_histograms

        draw_roc_and_histograms(table, figure)
    else:
        # An older .png file is deleted, because it shows the scores of an earlier run.
        figure.unlink(missing_ok=True)
    writer.delete_partial_tables()
    return table, metrics


def format_verdicts_or_metrics(
    results: dict[str, tuple[ScoreTable, dict | None]], calibration: Mapping, is_unlabelled: bool
) -> list[str]:
    """Format the results as lines to print: the verdicts of unlabelled images, or the metrics of labelled images."""
    lines = explain_verdicts(calibration)
    if is_unlabelled:
        for label, (table, _) in results.items():
            if len(results) > 1:
                lines += ["", f"== {label}"]
            lines += format_verdict_table_and_counts(table)
        return lines
    # imported here, because scikit-learn takes a second to import
    from evaluation.metrics import format_metrics, format_perturbation_table

    summaries = {label: metrics for label, (_, metrics) in results.items() if metrics}
    # All metrics are printed for the first perturbation, and only the AUROC for the other perturbations.
    if summaries:
        label, metrics = next(iter(summaries.items()))
        if len(results) > 1:
            lines += ["", f"== {label}"]
        lines.append(format_metrics(metrics))
    if len(results) > 1:
        lines += ["", format_perturbation_table(summaries)]
    return lines


def explain_verdicts(calibration: Mapping) -> list[str]:
    """Explain in two lines of text what P(fake) and the verdicts mean."""
    if calibration:
        source = make_printable(str(calibration.get("source", "another set")))
        meaning = f"calibrated on {source} (temperature {calibration['temperature']:.3g}), valid for similar images"
        thresholds = f"from P(fake) = {calibration['t_fake']:.3g} on, real up to {calibration['t_real']:.3g}"
        rule = f"fake {thresholds}, unsure between"
    else:
        meaning = "not calibrated (see python -m tools.calibrate)"
        rule = "fake from P(fake) = 0.5 on, else real"
    return [f"P(fake): the detector's belief that an image is generated, 0 to 1; {meaning}", f"verdict: {rule}"]


def format_verdict_table_and_counts(table: ScoreTable) -> list[str]:
    """Make a table with the probability P(fake), the verdict and the file of each image, and count the verdicts."""
    rows = [["P(fake)", "verdict", "image"]]
    for i, path in enumerate(table.paths):
        if table.errors[i]:
            rows.append(["-", "error", make_printable(table.errors[i])])
        else:
            rows.append([f"{table.prob_fake[i]:.4f}", table.predictions[i], make_printable(path)])
    counts = Counter(table.predictions)
    verdicts = ", ".join(f"{counts[verdict]} {verdict}" for verdict in ("fake", "real", "unsure"))
    return [format_text_table(rows, left=3), f"{verdicts}, {counts['']} could not be scored"]


def log_written_files(base: Path, results: dict[str, tuple[ScoreTable, dict | None]]) -> None:
    """Log the names of the output files."""
    several = "_*" if len(results) > 1 else ""
    figure = ", .png" if any(metrics for _, metrics in results.values()) else ""
    logger.info("test.py has written the files %s.* (.csv, .npy, .json%s)", make_printable(f"{base}{several}"), figure)


if __name__ == "__main__":
    sys.exit(run_program(lambda: main(create_test_parser().parse_args())))
