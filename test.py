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
import sys
import tempfile
from argparse import Namespace
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.datasets import Batch, ImageDataset, alike, make_loader
from data.lists import Item, count_known, input_items, labelled_items, list_digest
from data.perturbations import Perturbation, cells, mild_variants
from models import read_checkpoint
from utils.distributed import world_of_processes
from utils.run import (
    Stopped,
    StopSignal,
    UserError,
    atomic,
    choose_compute,
    make_folder,
    progress,
    run_program,
    shown,
    sole_writer,
    text_table,
    versions,
    write_json,
)
from utils.scorelog import ScoreLog
from utils.scores import Row, ScoreTable, make_rows, predict, read_table, residual_path, row_of
from utils.scoring import BATCH_PIXELS, Detector, assemble

logger = logging.getLogger("test")

EXIT_ERRORS = 1  # some images could not be scored
# Of these options no score depends.
FREE = ("gpu", "workers", "batch_size", "save_path", "save_residuals", "tile", "overwrite", "input", "real_roots",
        "fake_roots", "tree", "csv", "resume", "resynthesizer_file", "perturb", "vgg_weights")  # fmt: skip


def main(args: Namespace) -> int:
    compute = choose_compute(args.gpu, args.precision, args.deterministic, args.seed)
    with world_of_processes(compute.device.type) as world, StopSignal() as stop, contextlib.ExitStack() as stack:
        # Images and the detector: what can be wrong with them is found before anything is written
        items = items_to_test(args)
        perturbations = cells(args.perturb_protocol, args.perturb)
        detector, trained_on = detector_to_test(args, items, compute)
        detector.network.set_tile(args.tile)

        # Where the results go
        if world.size > 1 and not args.save_path:
            raise UserError("several processes need a place that all of them write to: give --save_path")
        save_path = (args.save_path or stack.enter_context(tempfile.TemporaryDirectory()) + "/scores").removesuffix(
            ".npy"
        )
        folder = make_folder(Path(save_path).parent)
        stack.enter_context(sole_writer(folder / f".{Path(save_path).name}.lock", world))

        # Scores, then what is made of them
        settings = vars(args) | {"precision": compute.precision}
        about = {
            "settings": settings,
            "detector": {"file": args.resume, **detector.identity()},
            "trained_on": trained_on,
        }
        job = {name: value for name, value in settings.items() if name not in FREE}
        job |= {"detector": detector.identity(), "images": list_digest(items)}
        tables = {}
        for cell in perturbations:
            path = save_path if len(perturbations) == 1 else f"{save_path}_{cell.file_name}"
            what = {"perturbation": {"name": cell.name, "strength": cell.strength, "label": cell.label,
                                     "protocol": args.perturb_protocol}}  # fmt: skip
            log = ScoreLog(Path(f"{path}.csv"), items, job | what, args.stability, world)
            if log.open(args.overwrite):
                transform = None if cell.name == "none" else Perturbation(cell, args.perturb_protocol, args.seed)
                images = ImageDataset(items, detector.policy, transform=transform)
                score(detector, images, log, args, stop)
                log.close()
            if world.is_main:
                tables[cell.label] = results(Path(path), about | what | log.identity(), args.seed)
        if not world.is_main:
            return 0
        show(tables, detector, args)
        errors = sum(int((~table.scored).sum()) for table, _ in tables.values())
        return EXIT_ERRORS if errors else 0


def items_to_test(args: Namespace) -> list[Item]:
    """The images of --input, or the labelled ones."""
    labelled = (args.real_roots, args.fake_roots, args.tree, args.csv)
    if not args.input:
        return labelled_items(*labelled)
    if any(labelled):
        raise UserError("both --input and labelled images: score them in two runs, or leave one out")
    return input_items(args.input)


def detector_to_test(args: Namespace, items: list[Item], compute) -> tuple[Detector, int]:
    """The detector of --resume, and how many of the images it was trained on."""
    if not args.resume:
        raise UserError("no detector: give its checkpoint with --resume")
    source = read_checkpoint(args.resume)
    rdn = read_checkpoint(args.resynthesizer_file)
    detector = assemble(source, rdn, compute, args.vgg_weights, vars(args))
    if detector.calibration:
        known = {"source": "?", **detector.calibration}
        text = "calibrated on {source}: temperature {temperature:.3g}, real up to P(fake) {t_real:.3g}, fake from {t_fake:.3g} on"
        logger.info("%s", text.format_map(known))
    seen = source.content.get("trained_on")
    trained_on = 0 if seen is None else count_known(items, seen.numpy())
    if trained_on:
        logger.warning("warning: %d of %d images have the name and size of images that it was trained on: their scores"
                       " say nothing of new ones", trained_on, len(items))  # fmt: skip
    return detector, trained_on


def score(detector: Detector, images: ImageDataset, log: ScoreLog, args: Namespace, stop: StopSignal) -> None:
    """Write a row of the score table for each image that lacks one; of several processes each takes a part."""
    keys = log.missing()
    workers = args.workers if len(keys) > 1 else 0
    loader = make_loader(images, keys, workers, detector.compute)
    with progress(None, "scoring", total=len(keys), unit="images") as bar:
        for batch in alike(loader, args.batch_size, BATCH_PIXELS):
            rows = batch_rows(detector, images.items, batch, args)
            log.write(rows)
            bar.update(len(rows))
            if stop.received:
                raise Stopped(stop.received)


def batch_rows(detector: Detector, items: list[Item], batch: Batch, args: Namespace) -> dict[int, Row]:
    """The rows of a batch by the index of their image, those that could not be read among them."""
    rows = {i: row_of(items[i], error=text) for i, text in batch.errors.items()}
    if len(batch.x):
        logits = score_images(detector, batch, args.save_residuals)  # (B, 2)
        scored = make_rows(batch.items, logits.numpy(), detector.calibration)
        if args.stability:
            scored = with_stability(detector, scored, batch.x)
        rows |= {key[1]: row for key, row in zip(batch.keys, scored, strict=True)}
    for row in rows.values():
        if row.error:
            logger.warning("not scored: %s", row.error)
    return dict(sorted(rows.items()))


def score_images(detector: Detector, batch: Batch, residual_folder: str | None) -> Tensor:
    """The logits (B, 2) of a batch of images; on the way its residuals as pictures, if wanted."""
    compared = detector.compare(batch.x)
    if residual_folder:
        from utils.figures import residual_picture

        x = detector.compute.input(batch.x)  # (B, 3, H, W)
        for item, *pictures in zip(batch.items, x, compared.x_hat, compared.residual, strict=True):
            image, again, difference = (p.float().cpu().numpy() for p in pictures)
            residual_picture(image, again, difference.mean(axis=0), residual_path(residual_folder, item.path))
    return detector.classify(compared.residual)


def with_stability(detector: Detector, rows: list[Row], images: Tensor) -> list[Row]:
    """The rows, each saying whether its verdict is also that on the image's mild variants. images: (B, 3, H, W)."""
    variants = [mild_variants(image) for image in images]
    stable = [True] * len(rows)
    for kind in variants[0]:
        logits = detector.logits(torch.stack([of_image[kind] for of_image in variants]))  # (B, 2)
        _, verdicts = predict(logits.numpy(), detector.calibration)
        stable = [s and v == row.prediction for s, v, row in zip(stable, verdicts, rows, strict=True)]
    words = ("stable" if s else "unstable" for s in stable)
    return [row if row.error else row._replace(stability=word) for row, word in zip(rows, words, strict=True)]


# --- results ------------------------------------------------------------------------------------------------


def results(path: Path, about: dict, seed: int) -> tuple[ScoreTable, dict | None]:
    """P.npy, P.json and P.png from P.csv. Returns the table and its metrics (None where no image is labelled)."""
    from utils.metrics import summarize

    table = read_table(f"{path}.csv")
    with atomic(f"{path}.npy") as file:
        np.save(file, table.logits)
    labelled = bool((table.scored & (table.is_real | table.is_fake)).any())
    metrics = summarize(table, seed=seed) if labelled else None
    write_json(Path(f"{path}.json"), {**about, "metrics": metrics, "versions": versions()})
    if labelled:
        from utils.figures import roc_and_histogram

        roc_and_histogram(table, f"{path}.png")
    return table, metrics


def show(tables: dict[str, tuple[ScoreTable, dict | None]], detector: Detector, args: Namespace) -> None:
    """What is read on the screen: verdicts on single images, the metrics of labelled ones, where the files are."""
    from utils.metrics import format_table, perturbation_table, stability_lines

    lines = explanation(detector.calibration) if args.input else []
    for name, (table, metrics) in tables.items():
        title = ["", f"== {name}"] if len(tables) > 1 else []
        if args.input:
            lines += [*title, *verdict_lines(table), *stability_lines(table)]
        elif metrics and name == next(iter(tables)):  # of the others the last table tells
            lines += [*title, format_table(metrics), *stability_lines(table)]
    if len(tables) > 1 and not args.input:
        lines += ["", perturbation_table({name: metrics for name, (_, metrics) in tables.items() if metrics})]
    if args.save_path:
        where = f"{args.save_path}_*" if len(tables) > 1 else args.save_path
        lines.append(f"scores, logits, metrics, figures: {where}.csv .npy .json .png")
    sys.stdout.write("\n".join(lines) + "\n")


def explanation(calibration: dict) -> list[str]:
    """What P(fake) and the verdict mean, for who sees them for the first time."""
    rule, known = "fake from P(fake) = 0.5 on, else real", "not calibrated (see python -m utils.calibrate)"
    if calibration:
        rule = "fake from P(fake) = {t_fake:.3g} on, real up to {t_real:.3g}, unsure between".format_map(calibration)
        known = f"calibrated on {shown(calibration.get('source', 'another set'))}, for images like those"
    return [f"P(fake): the detector's belief that an image is generated, 0 to 1; {known}", f"verdict: {rule}"]


def verdict_lines(table: ScoreTable) -> list[str]:
    """A line an image: P(fake), the verdict, whether it is stable if that was asked for, the file; then the counts."""
    asked = any(table.stability)
    rows = [["P(fake)", "verdict", *(["stability"] if asked else []), "image"]]
    for i, path in enumerate(table.paths):
        word = [table.stability[i] or "-"] if asked else []
        score = ["-", "error", *word, shown(table.errors[i])] if table.errors[i] else \
            [f"{table.prob_fake[i]:.4f}", table.predictions[i], *word, shown(path)]  # fmt: skip
        rows.append(score)
    counts = Counter(table.predictions)
    ending = ", ".join(f"{counts[word]} {word}" for word in ("fake", "real", "unsure"))
    return [text_table(rows, left=len(rows[0])), f"{ending}, {counts['']} could not be read"]


if __name__ == "__main__":
    sys.exit(run_program(partial(main, ARGS)))
