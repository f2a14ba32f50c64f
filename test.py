"""Score images, real or generated: labelled sets get metrics, `--input` takes any file or folder.

    python test.py --resume DETECTOR --data-root-pos REAL_DIR --data-root-neg GENERATED_DIR --save_path output/mine
    python test.py --resume DETECTOR --input a.png photos/

Scores first, metrics second: P.csv has a row an image (path,label,generator,logit_fake,logit_real,prob_fake,prediction,
error; with --stability one more), P.npy the same logits (N, 2), columns FAKE, REAL. P.json (metrics, settings, versions)
and P.png (ROC, histogram) are made from them. A killed run goes on where it stopped.
"""

from utils.options import test_parser

ARGS = test_parser().parse_args() if __name__ == "__main__" else None  # mistakes before PyTorch is imported

import contextlib
import logging
import math
import sys
import tempfile
from argparse import Namespace
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch

from data.datasets import Batch, ImageDataset, Key, make_loader, merge_equal_sizes
from data.images import read_header, size_after
from data.lists import Item, count_trained_on, input_items, labelled_items, list_digest
from data.perturbations import Perturbation, mild_variants, select_perturbations
from evaluation.detector import BATCH_PIXELS, Detector, images_at_once, load
from evaluation.score_table import Row, ScoreTable, make_rows, predict, read_table, residual_path, row_of
from evaluation.score_writer import ScoreWriter, file_stamps
from utils.compute import choose_compute, versions
from utils.console import printable, progress, text_table
from utils.distributed import all_gather_rows, join_processes
from utils.errors import UserError, run_program
from utils.files import atomic, exclusive_writer, make_folder
from utils.signals import Stopped, StopSignal

logger = logging.getLogger("test")

EXIT_ERRORS = 1  # some images could not be scored


def main(args: Namespace) -> int:
    compute = choose_compute(args.gpu, args.precision, args.deterministic, args.seed)
    with join_processes(compute.device.type) as world, StopSignal() as stop, contextlib.ExitStack() as stack:
        # Images and the detector: what can be wrong with them is found before anything is written
        if not args.resume:
            raise UserError("no detector: give its checkpoint with --resume")
        items = items_to_test(args)
        cells = select_perturbations(args.perturb_protocol, args.perturb or [("none", None)])
        detector = load(args.resume, compute, args.precision, args.resynthesizer_file, args.vgg_weights, vars(args))
        detector.network.set_tile(args.tile)
        seen = 0 if detector.seen is None else count_trained_on(items, detector.seen.numpy())
        if seen:
            text = "warning: it was trained on %d of these %d images, by name and size: scores say nothing of new ones"
            logger.warning(text, seen, len(items))

        # Where the results go
        if world.size > 1 and not args.save_path:
            raise UserError("several processes need a place that all of them write to: give --save_path")
        save_path = (args.save_path or stack.enter_context(tempfile.TemporaryDirectory()) + "/scores").rstrip("/")
        save_path = Path(save_path.removesuffix(".npy"))
        for folder in filter(None, (save_path.parent, args.save_residuals)):
            make_folder(folder)
        stack.enter_context(exclusive_writer(save_path.with_name(f".{save_path.name}.lock"), world))

        # Scores, then what is made of them
        about = {"settings": vars(args) | {"precision": compute.precision}, "trained_on": seen}
        about["detector"] = {"file": args.resume, **detector.identity()}
        job, stamps, tables, far = job_of(detector, items, False), file_stamps(items), {}, []
        for cell in cells:
            path, residuals = save_path, args.save_residuals
            if len(cells) > 1:
                path = save_path.with_name(f"{save_path.name}_{cell.file_name}")
                residuals = residuals and Path(residuals, cell.file_name)
            what, transform = {"name": cell.name, "strength": cell.strength, "label": cell.label}, None
            if cell.name != "none":
                what |= {"protocol": args.perturb_protocol, "seed": args.seed}
                transform = Perturbation(cell, args.perturb_protocol, args.seed)
            log = ScoreWriter(Path(f"{path}.csv"), items, stamps, job | {"perturbation": what}, world)
            if log.open(args.overwrite):
                images = ImageDataset(items, detector.fitting, transform=transform)
                unlike = score(detector, images, log, args, residuals, stop)
                far = far if transform else all_gather_rows(torch.tensor(unlike, dtype=torch.int64), world).tolist()
                log.close()
            if world.is_main:
                table, metrics = tables[cell.label] = results(path, args.seed)
                log.finish({**about, "perturbation": what, "metrics": metrics, "versions": versions()})
        if not world.is_main:
            return 0
        show(tables, detector.calibration, bool(args.input))
        for line in detector.unlike([item.path for item in items], [items[i].path for i in far]) if args.input else ():
            logger.warning("warning: %s", line)
        if args.save_path:
            figures = ",png" if any(metrics for _, metrics in tables.values()) else ""
            logger.info("written: %s%s.{csv,npy,json%s}", printable(save_path), "_*" if len(tables) > 1 else "", figures)
        return EXIT_ERRORS if any(not table.scored.all() for table, _ in tables.values()) else 0


def items_to_test(args: Namespace) -> list[Item]:
    """The images of --input, or the labelled ones."""
    labelled = (args.real_roots, args.fake_roots, args.tree, args.csv)
    if args.input and any(labelled):
        raise UserError("both --input and labelled images: score them in two runs, or leave one out")
    return input_items(args.input) if args.input else labelled_items(*labelled)


def job_of(detector: Detector, items: list[Item], stability: bool) -> dict:
    """All that a table depends on besides the content of the files, however they are named or dealt out."""
    known = detector.identity()
    known["vgg"] = known["vgg"] and known["vgg"]["fingerprint"]  # wherever the file is
    sizes = {"crop_size": detector.policy.crop_size, "resize": detector.policy.resize}
    sizes |= {"crops": detector.crops} if detector.crops > 1 else {}  # earlier versions had no more than one
    how = {"precision": detector.compute.precision, "stability": stability, "images": list_digest(items)}
    return {"detector": known, **sizes, **how}


def score(
    detector: Detector, images: ImageDataset, log: ScoreWriter, args: Namespace, residuals: Path | None, stop: StopSignal
) -> list[int]:
    """Write a row of the score table for each image that lacks one; of several processes each takes a part.

    Returns which of them have mean residuals unlike those of all images that the detector was validated on.
    """
    first = read_header(images.items[0].path, images.policy).size or (1024, 1024)
    block, pixels = images_at_once(*size_after(*first, images.policy)), BATCH_PIXELS
    if args.batch_size:
        block, pixels = args.batch_size, math.inf
    missing, far, (least, most) = log.missing(block), [], detector.known_residuals
    singles = ([Key(0, int(index))] for index in missing)
    loader = make_loader(images, singles, args.workers if len(missing) > 1 else 0, detector.compute)
    with progress(None, "scoring", total=len(missing), unit="images") as bar:
        for batch in merge_equal_sizes(loader, block, pixels):
            rows = {i: row_of(images.items[i], error=text) for i, text in batch.errors.items()}
            if len(batch.x):
                scored, means = batch_rows(detector, batch, residuals, False)
                rows |= {index: row for (_, index, _), row in zip(batch.keys, scored, strict=True)}
                far += [key[1] for key, m in zip(batch.keys, means, strict=True) if m < least or m > most]
            log.write(dict(sorted(rows.items())))
            for row in rows.values():
                if row.error:
                    logger.warning("not scored: %s", row.error)
            bar.update(len(rows))
            if stop.received:
                raise Stopped(stop.received)
    return far


def batch_rows(
    detector: Detector, batch: Batch, residuals: Path | None, stability: bool
) -> tuple[list[Row], list[float]]:
    """The rows of a batch of images, and their mean residuals; on the way its residuals as pictures, if wanted.

    stability: each row says whether its verdict is also that on the image's mild variants.
    """
    compared = detector.compare(batch.x) if residuals else None
    if residuals:
        from evaluation.figures import residual_picture

        x = detector.compute.input(batch.x)  # (B, 3, H, W)
        for item, *pictures in zip(batch.items, x, compared.x_hat, compared.residual, strict=True):
            image, again, difference = (p.float().cpu().numpy() for p in pictures)
            residual_picture(image, again, difference.mean(axis=0), residual_path(residuals, item.path))
    logits, means = detector.score(batch.x, compared)
    rows, means = make_rows(batch.items, logits.numpy(), detector.calibration), means.tolist()
    if not stability:
        return rows, means
    stable = np.ones(len(rows), bool)
    for of_a_kind in zip(*(mild_variants(image).values() for image in batch.x), strict=True):
        _, verdicts = predict(detector.logits(torch.stack(of_a_kind)).numpy(), detector.calibration)
        stable &= np.array(verdicts) == [row.prediction for row in rows]
    words = np.where(stable, "stable", "unstable").tolist()
    told = (row if row.error else row._replace(stability=word) for row, word in zip(rows, words, strict=True))
    return list(told), means


# --- results ------------------------------------------------------------------------------------------------


def results(path: Path, seed: int) -> tuple[ScoreTable, dict | None]:
    """P.npy and P.png from P.csv. Returns the table and its metrics (None where no image is labelled)."""
    table = read_table(f"{path}.csv")
    with atomic(f"{path}.npy") as file:
        np.save(file, table.logits)
    if not table.usable.any():
        Path(f"{path}.png").unlink(missing_ok=True)  # of an earlier table
        return table, None
    from evaluation.figures import roc_and_histogram
    from evaluation.metrics import summarize

    roc_and_histogram(table, f"{path}.png")
    return table, summarize(table, seed=seed)


def show(tables: dict[str, tuple[ScoreTable, dict | None]], calibration: Mapping, unlabelled: bool) -> None:
    """What is read on the screen: verdicts on single images, or the metrics of labelled ones."""
    from evaluation.metrics import format_table, perturbation_table, stability_lines

    several, lines = len(tables) > 1, explanation(calibration)
    for name, (table, metrics) in tables.items() if unlabelled else [*tables.items()][:1]:
        lines += ["", f"== {name}"] if several else []
        lines += verdict_lines(table) if unlabelled else [format_table(metrics)] if metrics else []
        lines += stability_lines(table)
    if several and not unlabelled:
        lines += ["", perturbation_table({name: metrics for name, (_, metrics) in tables.items() if metrics})]
    sys.stdout.write("\n".join(lines) + "\n")


def explanation(calibration: Mapping) -> list[str]:
    """What P(fake) and the verdict mean, for who sees them for the first time."""
    rule, known = "fake from P(fake) = 0.5 on, else real", "not calibrated (see python -m tools.calibrate)"
    if calibration:
        rule = "fake from P(fake) = {t_fake:.3g} on, real up to {t_real:.3g}, unsure between".format_map(calibration)
        known = "calibrated on {source} (temperature {temperature:.3g}), for images like those"
        known = printable(known.format_map({"source": "another set", **calibration}))
    return [f"P(fake): the detector's belief that an image is generated, 0 to 1; {known}", f"verdict: {rule}"]


def verdict_lines(table: ScoreTable) -> list[str]:
    """A line an image: P(fake), the verdict, whether it is stable if that was asked for, the file; then the counts."""
    rows = [["P(fake)", "verdict", "image"]]
    columns = (table.prob_fake, table.predictions, table.stability, table.paths, table.errors)
    for prob_fake, verdict, stability, path, error in zip(*columns, strict=True):
        row = [f"{prob_fake:.4f}", f"{verdict} {stability}".strip(), printable(path)]
        rows.append(["-", "error", printable(error)] if error else row)
    counts = Counter(table.predictions)
    ending = ", ".join(f"{counts[word]} {word}" for word in ("fake", "real", "unsure"))
    return [text_table(rows, left=len(rows[0])), f"{ending}, {counts['']} could not be read"]


if __name__ == "__main__":
    sys.exit(run_program(partial(main, ARGS)))
