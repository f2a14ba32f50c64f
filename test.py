"""Score images, real or generated: labelled sets get metrics, `--input` takes any file or folder.

    python test.py --resume DETECTOR --data-root-pos REAL_DIR --data-root-neg GENERATED_DIR --save_path output/mine
    python test.py --resume DETECTOR --input a.png photos/

Scores first, metrics second: P.csv has a row an image (path,label,generator,logit_fake,logit_real,prob_fake,prediction,
error; with --stability one more), P.npy the same logits (N, 2), columns FAKE, REAL. P.json (metrics, settings, versions)
and P.png (ROC, histogram) are made from them. A killed run goes on where it stopped.
"""

import contextlib
import hashlib
import json
import logging
import shutil
import sys
import tempfile
from argparse import Namespace
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.images import (
    LABEL_NAMES,
    Batch,
    DataError,
    ImageDataset,
    Item,
    SizePolicy,
    check_headers,
    collate,
    fitted_size,
    input_items,
    labelled_items,
    mixed_sizes,
    to_float,
)
from data.loading import make_loader
from data.perturbations import MILD_QUALITY, MILD_SCALE, Cell, PerturbTransform, cells, mild_variants
from data.sampling import EpochBatches, shard
from models import Checkpoint, ModelError, ResynthesisDetector, fingerprint, load_detector
from utils import checkpoint as checkpoints
from utils.checkpoint import CheckpointError
from utils.distributed import World, wait_for_all, world_of_processes
from utils.figures import residual_picture, roc_and_histogram
from utils.metrics import format_table, percent, printable, summarize
from utils.options import test_parser
from utils.run import (
    Stopped,
    StopSignal,
    UsageError,
    autocast,
    choose_device,
    make_folder,
    run_program,
    set_deterministic,
    sole_writer,
    versions,
    write_json,
)
from utils.scores import (
    Row,
    RowWriter,
    ScoreError,
    ScoreTable,
    drop_torn_row,
    make_rows,
    predict,
    read_table,
    residual_path,
)

logger = logging.getLogger("test")

EXIT_ERRORS = 1  # some images could not be scored


def main(argv: list[str] | None = None) -> int:
    args = test_parser().parse_args(argv)
    if args.without_effect:
        logger.info("without effect in a test: %s", " ".join(args.without_effect))
    device = choose_device(args.gpu)
    with world_of_processes(device.type) as world, StopSignal() as stop, contextlib.ExitStack() as stack:
        set_deterministic(args.seed, device)

        # Images and the detector: what can be wrong with them is found before anything is written
        items = items_to_test(args)
        perturbations = cells(args.perturb_protocol, args.perturb)
        detector, config, calibration = detector_to_test(args)
        policy = SizePolicy(detector.resynthesizer.scale, args.crop_size, args.resize)
        if args.batch_size > 1:
            refuse_mixed_sizes(items, policy)
        detector.to(device, memory_format=torch.channels_last).eval()
        detector.set_tile(args.tile)
        scorer = Scorer(detector, device, args.precision, calibration, args.save_residuals, args.stability)

        # Where the results go
        if world.size > 1 and not args.save_path:
            raise UsageError("several processes need a place that all of them write to: give --save_path")
        save_path = str(Path(args.save_path or stack.enter_context(tempfile.TemporaryDirectory()) + "/scores"))
        folder = make_folder(Path(save_path).parent)
        stack.enter_context(sole_writer(folder / f".{Path(save_path).name}.lock", world))
        if args.save_residuals:
            make_folder(args.save_residuals)

        # Scores, then what is made of them
        classifier = {"file": args.resume, "classifier": fingerprint(detector.classifier), "calibration": calibration}
        whole = {"settings": vars(args), "detector": classifier | config, "images": digest(items)}
        tables = {}
        for cell in perturbations:
            path = save_path if len(perturbations) == 1 else f"{save_path}_{cell.label.replace(' ', '_')}"
            about = whole | {"perturbation": {**cell._asdict(), "protocol": args.perturb_protocol}}
            images = ImageDataset(items, policy, transform=perturbation(cell, args.perturb_protocol, args.seed))
            score(scorer, images, Path(f"{path}.csv"), about, args.batch_size, args.workers, world, stop)
            if world.is_main:
                tables[cell.label] = results(Path(path), about)
        if not world.is_main:
            return 0
        show(tables, calibration, args.input is not None, args.save_path)
        errors = sum(int((~table.scored).sum()) for table, _ in tables.values())
        return EXIT_ERRORS if errors else 0


def items_to_test(args: Namespace) -> list[Item]:
    """The images of --input, or the labelled ones."""
    labelled = (args.real_roots, args.fake_roots, args.tree, args.csv)
    if not args.input:
        return labelled_items(*labelled)
    if any(labelled):
        raise UsageError("both --input and labelled images: score them in two runs, or leave one out")
    return input_items(args.input)


def detector_to_test(args: Namespace) -> tuple[ResynthesisDetector, dict, dict]:
    """The detector of --resume, its config, and its calibration (empty: none)."""
    if args.resume is None:
        raise UsageError("no detector: give its checkpoint with --resume")
    content = checkpoints.load(args.resume)
    rdn = (
        Checkpoint(checkpoints.load(args.resynthesizer_file), args.resynthesizer_file)
        if args.resynthesizer_file
        else None
    )
    detector, config = load_detector(Checkpoint(content, args.resume), rdn, vars(args), args.vgg_weights)
    calibration = content.get("calibration", {})
    if calibration:
        logger.info(
            "calibrated on %s: temperature %.3g, real up to P(fake) %.3g, fake from %.3g on",
            calibration.get("source", "?"), calibration["temperature"], calibration["t_real"], calibration["t_fake"],
        )  # fmt: skip
    return detector, config, calibration


def perturbation(cell: Cell, protocol: str, seed: int) -> PerturbTransform | None:
    """What is done to each image before it is scored; None: nothing."""
    return None if cell.name == "none" else PerturbTransform(cell.name, protocol, seed, cell.strength)


def refuse_mixed_sizes(items: list[Item], policy: SizePolicy) -> None:
    """Batches need images of one size; better said now than after an hour.

    Raises:
        DataError: naming two files that differ, and the way out.
    """
    sizes, _ = check_headers([item.path for item in items], policy)
    known = [(item.path, fitted_size(*size, policy)) for item, size in zip(items, sizes, strict=True) if size]
    mismatch = mixed_sizes([path for path, _ in known], [size for _, size in known])
    if mismatch:
        raise DataError(mismatch)


class Scorer(NamedTuple):
    """What makes rows of a score table out of images."""

    detector: ResynthesisDetector
    device: torch.device
    precision: str
    calibration: dict  # empty: none
    residual_folder: str | None  # where pictures of the residuals go
    stability: bool  # whether each image is scored again as its mild variants


def score(
    scorer: Scorer,
    images: ImageDataset,
    table: Path,
    about: dict,
    batch_size: int,
    workers: int,
    world: World,
    stop: StopSignal,
) -> None:
    """Write the score table of all images: each process a part, one row an image, in order; then join the parts.

    A part left by a run that was killed is gone on with if it is of the same images, detector and settings.
    """
    own = shard(images.items, world.rank, world.size)
    part = part_of(table, world.rank, world.size)
    done = rows_done(part, about)
    if done:
        logger.info("going on after %d of %d images already scored in %s", done, len(own), part)
    dataset = ImageDataset(own[done:], images.policy, transform=images.transform)
    batches = EpochBatches(len(dataset), batch_size, shuffle=False)
    loader = make_loader(dataset, batches, collate, workers, scorer.device)
    with (
        RowWriter(part, append=done > 0, stability=scorer.stability) as writer,
        tqdm(total=len(own), initial=done, leave=False, disable=None) as bar,
    ):
        for batch, logits in with_logits(scorer, dataset.items, loader):
            rows = batch_rows(scorer, dataset.items, batch, logits)
            writer.write(*rows)
            bar.update(len(rows))
            if stop.received:
                raise Stopped(stop.received)
    wait_for_all(world)
    if world.is_main:
        join_parts(table, world.size)


def with_logits(scorer: Scorer, items: list[Item], batches: Iterable[Batch]) -> Iterator[tuple[Batch, Tensor]]:
    """Each batch and its logits (B, 2), on the CPU.

    A GPU is given the next batch before it is asked for the logits of this one, so that it never waits for rows to be
    written. A CPU would gain nothing, and a run killed on it would lose one more batch.
    """
    ahead = 1 if scorer.device.type == "cuda" else 0
    waiting = deque()
    for batch in batches:
        if batch.mismatch:
            raise DataError(batch.mismatch)
        logits, arrived = torch.empty(0, 2), None
        if batch.indices:
            logits = logits_of(scorer, batch.images, [items[i].path for i in batch.indices], scorer.residual_folder)
        if logits.is_cuda:
            logits = logits.to("cpu", non_blocking=True)
            arrived = torch.cuda.current_stream(scorer.device).record_event()
        waiting.append((batch, logits, arrived))
        if len(waiting) > ahead:
            yield after_arrival(*waiting.popleft())
    for entry in waiting:
        yield after_arrival(*entry)


def after_arrival(batch: Batch, logits: Tensor, arrived: torch.cuda.Event | None) -> tuple[Batch, Tensor]:
    """The batch and its logits, once the copy to the CPU is done."""
    if arrived is not None:
        arrived.synchronize()
    return batch, logits


def batch_rows(scorer: Scorer, items: list[Item], batch: Batch, logits: Tensor) -> list[Row]:
    """The rows of a batch in the order of its images, those that could not be read among them. logits: (B, 2)."""
    labels = {i: "" if items[i].label is None else LABEL_NAMES[items[i].label] for i in (*batch.indices, *batch.errors)}
    rows = {i: Row(items[i].path, labels[i], items[i].generator, error=text) for i, text in batch.errors.items()}
    if batch.indices:
        scored = make_rows(
            [items[i].path for i in batch.indices],
            [labels[i] for i in batch.indices],
            [items[i].generator for i in batch.indices],
            logits.numpy(),
            **verdict_rule(scorer.calibration),
        )
        if scorer.stability:
            scored = with_stability(scorer, scored, batch.images)
        rows |= zip(batch.indices, scored, strict=True)
    for i in sorted(rows):
        if rows[i].error:
            logger.warning("not scored: %s", rows[i].error)
    return [rows[i] for i in sorted(rows)]


@torch.inference_mode()
def logits_of(scorer: Scorer, images: Tensor, names: list[str], residual_folder: str | None = None) -> Tensor:
    """The logits (B, 2), float32; on the way the residuals as pictures, if wanted.

    images: uint8 (B, 3, H, W). names: their paths.
    """
    detector = scorer.detector
    x = to_float(images.to(scorer.device, non_blocking=True))  # (B, 3, H, W)
    x = x.contiguous(memory_format=torch.channels_last)
    with autocast(scorer.device, scorer.precision):
        if residual_folder is None:
            return detector(x)
        x_hat = detector.resynthesize(x)  # (B, 3, H, W)
        residual = detector.difference(detector.phi(x_hat), detector.phi(x))  # (B, C_l, H_l, W_l)
        for name, *pictures in zip(names, x, x_hat, residual, strict=True):
            image, again, difference = (p.float().cpu().numpy() for p in pictures)
            residual_picture(image, again, difference.mean(axis=0), residual_path(residual_folder, name))
        return detector.classify(residual)


def verdict_rule(calibration: dict) -> dict:
    """What `make_rows` and `predict` need to know of a calibration (empty: none, and the larger logit decides)."""
    if not calibration:
        return {}
    return {
        "temperature": calibration["temperature"],
        "thresholds": (calibration["t_real"], calibration["t_fake"]),
    }


def with_stability(scorer: Scorer, rows: list[Row], images: Tensor) -> list[Row]:
    """The rows, each saying whether its verdict is also that on the image's mild variants. images: (B, 3, H, W)."""
    variants = [mild_variants(image) for image in images]
    stable = [True] * len(rows)
    for kind in variants[0]:
        batch = torch.stack([of_image[kind] for of_image in variants])  # (B, 3, H, W)
        logits = logits_of(scorer, batch, [row.path for row in rows]).cpu()
        _, verdicts = predict(logits.numpy(), **verdict_rule(scorer.calibration))
        stable = [s and v == row.prediction for s, v, row in zip(stable, verdicts, rows, strict=True)]
    words = ("stable" if s else "unstable" for s in stable)
    return [row if row.error else row._replace(stability=word) for row, word in zip(rows, words, strict=True)]


def part_of(table: Path, rank: int, size: int) -> Path:
    """The table one process writes while it scores."""
    return table.with_name(f".{table.name}.{rank}-of-{size}.part")


def rows_done(part: Path, about: dict) -> int:
    """How many rows a killed run left in its part, if it was the same run; else the part is begun anew.

    `about` is kept beside the part to tell.
    """
    identity = part.with_name(part.name + ".json")
    settings = {k: v for k, v in about["settings"].items() if k not in ("gpu", "workers", "batch_size")}
    wanted = json.loads(json.dumps({**about, "settings": settings}))
    with contextlib.suppress(OSError, ValueError):
        if part.exists() and json.loads(identity.read_text()) == wanted:
            return drop_torn_row(part)
        logger.info("%s is of another run: beginning anew", part) if part.exists() else None
    write_json(identity, wanted)
    part.unlink(missing_ok=True)
    return 0


def join_parts(table: Path, size: int) -> None:
    """One table out of the processes' parts, which are runs of the images in order of rank.

    The parts stay as they are until the table is whole: a run killed in here joins them once more.
    """
    parts = [part_of(table, rank, size) for rank in range(size)]
    whole = table.with_name(f".{table.name}.whole.part")
    with whole.open("wb") as joined:
        for rank, part in enumerate(parts):
            with part.open("rb") as file:
                if rank > 0:
                    file.readline()  # the header
                shutil.copyfileobj(file, joined)
    whole.replace(table)
    for part in parts:
        part.unlink(missing_ok=True)
        part.with_name(part.name + ".json").unlink(missing_ok=True)


def digest(items: list[Item]) -> str:
    """16 hex digits that name a list of images."""
    state = hashlib.sha256()
    for item in items:
        state.update(f"{item}\n".encode(errors="surrogateescape"))
    return f"{len(items)} images, {state.hexdigest()[:16]}"


def results(path: Path, about: dict) -> tuple[ScoreTable, dict | None]:
    """P.npy, P.json and P.png from P.csv. Returns the table and its metrics (None where no image is labelled)."""
    table = read_table(f"{path}.csv")
    np.save(f"{path}.npy", table.logits)
    labelled = bool((table.scored & (table.is_real | table.is_fake)).any())
    metrics = summarize(table, seed=about["settings"]["seed"]) if labelled else None
    write_json(Path(f"{path}.json"), {**about, "metrics": metrics, "versions": versions()})
    if table.scored.any():
        roc_and_histogram(table, f"{path}.png")
    return table, metrics


def show(
    tables: dict[str, tuple[ScoreTable, dict | None]], calibration: dict, unlabelled: bool, save_path: str | None
) -> None:
    """What is read on the screen: verdicts on single images, the metrics of labelled ones, where the files are."""
    lines = explanation(calibration) if unlabelled else []
    for name, (table, metrics) in tables.items():
        if unlabelled:
            lines += (["", f"== {name}"] if len(tables) > 1 else []) + verdict_lines(table) + stability_lines(table)
        elif metrics and name == next(iter(tables)):  # of the others the last table tells
            lines += ([f"== {name}"] if len(tables) > 1 else []) + [format_table(metrics), *stability_lines(table)]
    if len(tables) > 1 and not unlabelled:
        lines += ["", *perturbation_table({name: metrics for name, (_, metrics) in tables.items() if metrics})]
    if save_path:
        where = f"{save_path}_*" if len(tables) > 1 else save_path
        lines.append(f"scores, logits, metrics, figures: {where}.csv .npy .json .png")
    sys.stdout.write("\n".join(lines) + "\n")


def explanation(calibration: dict) -> list[str]:
    """What P(fake) and the verdict mean, for who sees them for the first time."""
    rule, known = "fake from P(fake) = 0.5 on, else real", "not calibrated (see python -m utils.calibrate)"
    if calibration:
        rule = "fake from P(fake) = {t_fake:.3g} on, real up to {t_real:.3g}, unsure between".format_map(calibration)
        known = f"calibrated on {printable(calibration.get('source', 'another set'))}, for images like those"
    return [f"P(fake): the detector's belief that an image is generated, 0 to 1; {known}", f"verdict: {rule}"]


def verdict_lines(table: ScoreTable) -> list[str]:
    """A line an image: P(fake), the verdict, whether it is stable if that was asked for, the file."""
    asked = any(table.stability)
    lines = ["P(fake)  verdict  " + ("stability  " if asked else "") + "image"]
    for i, path in enumerate(table.paths):
        if table.errors[i]:
            lines.append("      -  error    " + ("-          " if asked else "") + printable(table.errors[i]))
        else:
            word = f"{table.stability[i]:9}  " if asked else ""
            lines.append(f"{table.prob_fake[i]:7.4f}  {table.predictions[i]:7}  {word}{printable(path)}")
    return lines


def stability_lines(table: ScoreTable) -> list[str]:
    """How many verdicts outlive mild changes of the image, if that was asked for: of all, reals and fakes."""
    stability = np.array(table.stability)
    asked = stability != ""
    if not asked.any():
        return []
    groups = {"": asked, " real": asked & table.is_real, " fake": asked & table.is_fake}
    counts = [
        f"{(stability[rows] == 'unstable').sum()} of {rows.sum()}{name} images"
        for name, rows in groups.items()
        if rows.any()
    ]
    return [f"unstable (JPEG of quality {MILD_QUALITY}, or resizing to {MILD_SCALE} and back, changes the verdict): "
            + ", ".join(counts)]  # fmt: skip


def perturbation_table(metrics: dict[str, dict]) -> list[str]:
    """AUROC (%) by perturbation (rows) and generator (columns); mean AUROC and accuracy over the generators."""
    generators = list(next(iter(metrics.values()))["generators"])
    rows = [["", *map(printable, generators), "mean", "mean acc"]]
    for name, summary in metrics.items():
        measured = [*(summary["generators"][g] for g in generators), summary["mean"]]
        rows.append([name, *(percent(m, "auroc") for m in measured), percent(summary["mean"], "accuracy")])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "AUROC in %, fake = positive, in brackets its 95% interval; mean: over the generators; acc: accuracy in %",
        *("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows),
    ]


if __name__ == "__main__":
    sys.exit(run_program(main, DataError, ModelError, CheckpointError, ScoreError))
