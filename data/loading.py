"""The DataLoader all programs use: deterministic whatever the number of workers, quiet on Ctrl-C."""

import atexit
import multiprocessing
import os
import signal
from collections.abc import Callable

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

GRACE = 10  # seconds for which a worker outlives SIGTERM, so that the step being made can be finished and saved


def make_loader(
    dataset: Dataset, batches: Sampler, collate: Callable, workers: int, device: torch.device
) -> DataLoader:
    """Read `batches` (lists of (epoch, index)) of `dataset` a few batches ahead, in `workers` processes.

    At most one for each core: what is read does not depend on their number.
    """
    workers = min(workers, os.cpu_count() or 1)
    if workers:
        atexit.register(_end_workers)
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        worker_init_fn=_start_worker,
        multiprocessing_context="fork" if workers else None,
    )


def _start_worker(_: int) -> None:
    """The main process decides when to stop; one thread each, since there are several workers.

    Who stops a program often signals all of its processes. A worker that died of that would take the main process with
    it before its state is saved; one that stayed for ever would keep it from ending (as SIGTERM is to at its end).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))
    signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
    torch.set_num_threads(1)


def _end_workers() -> None:
    """At the end of a program that has failed, whose workers are still there: not after GRACE, but now."""
    for process in multiprocessing.active_children():
        if process.daemon:
            os.kill(process.pid, signal.SIGALRM)
