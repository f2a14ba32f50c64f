"""Functions for runs with several processes, which torchrun starts.

Gradients are summed by one all-reduce after the backward pass rather than by DistributedDataParallel. Each process
divides its loss by the number of images in the batches of all processes, so that several processes compute the same
update as a single process, even if the processes hold different numbers of images.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from utils.errors import UserError

# A long wait is no error, because a process may wait for hours until a slower process has scored its images
TIMEOUT = timedelta(days=30)
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class World(NamedTuple):
    """The number of this process (`rank`, from 0) and the number of all processes of the run (`size`)."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def read_rank_and_world_size() -> World:
    """Read the environment variables RANK and WORLD_SIZE, which torchrun sets.

    If RANK and WORLD_SIZE are both unset, this process is the only process of the run.

    Raises:
        UserError: if the environment variables of torchrun are incomplete or invalid.
    """
    given = {name: os.environ[name] for name in LAUNCHER_VARIABLES if name in os.environ}
    if "RANK" not in given and "WORLD_SIZE" not in given:
        return World()
    words = " ".join(f"{name}={value}" for name, value in given.items())
    way_out = "start several processes with torchrun, or unset these variables"
    if not given.get("RANK", "").isdecimal() or not given.get("WORLD_SIZE", "").isdecimal():
        raise UserError(f"RANK and WORLD_SIZE must both be set to numbers, got {words}: {way_out}")
    world = World(int(given["RANK"]), int(given["WORLD_SIZE"]))
    if world.rank >= world.size:
        raise UserError(f"RANK must be less than WORLD_SIZE, got {words}: {way_out}")
    if world.size > 1 and len(given) < len(LAUNCHER_VARIABLES):
        raise UserError(
            f"a run with several processes needs the environment variables {', '.join(LAUNCHER_VARIABLES)}, got"
            f" only {words}: {way_out}"
        )
    return world


def read_local_rank() -> int | None:
    """Read LOCAL_RANK, the number of this process on its machine, or return None if LOCAL_RANK is not set.

    Raises:
        UserError: if LOCAL_RANK is not a number.
    """
    text = os.environ.get("LOCAL_RANK")
    if text is None:
        return None
    if not text.isdecimal():
        raise UserError(
            f"LOCAL_RANK must be a number, got {text!r}: start the program with torchrun, which sets LOCAL_RANK"
        )
    return int(text)


@contextmanager
def connect_processes(device_type: str) -> Iterator[World]:
    """Connect all processes of the run while the `with` block runs.

    Args:
        device_type: type of the device on which the processes exchange tensors, "cuda" or "cpu".

    Raises:
        UserError: if the environment variables of torchrun are incomplete or invalid.
    """
    world = read_rank_and_world_size()
    if world.size > 1:
        store, _, _ = next(rendezvous("env://", world.rank, world.size, timeout=TIMEOUT))
        # After a restart, torchrun's store still holds the old keys, so every key starts with the number of restarts
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend = "nccl" if device_type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=world.rank, world_size=world.size)
    try:
        yield world
    finally:
        if world.size > 1:
            dist.destroy_process_group()


def all_reduce_gradients(parameters: Iterable[nn.Parameter], world: World) -> None:
    """Replace each gradient by its sum over all processes, where a missing gradient counts as 0."""
    if world.size == 1:
        return
    parameters = [p for p in parameters if p.requires_grad]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    parts = flat.split([gradient.numel() for gradient in gradients])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter).clone()


def all_reduce_sum(values: Tensor, world: World) -> Tensor:
    """Return the element-wise sum of `values` over all processes."""
    return _all_reduce(values, world, dist.ReduceOp.SUM)


def all_reduce_max(values: Tensor, world: World) -> Tensor:
    """Return the element-wise maximum of `values` over all processes."""
    return _all_reduce(values, world, dist.ReduceOp.MAX)


def _all_reduce(values: Tensor, world: World, operation: dist.ReduceOp) -> Tensor:
    if world.size > 1:
        values = values.clone()
        dist.all_reduce(values, operation)
    return values


def all_gather_rows(rows: Tensor, world: World) -> Tensor:
    """Return, on the CPU, the tensors `rows` of all processes, concatenated along dimension 0 in the order of ranks."""
    gathered = [rows.cpu()] * world.size
    if world.size > 1:
        dist.all_gather_object(gathered, rows.cpu())
    return torch.cat(gathered)


def broadcast_buffers(module: nn.Module, world: World) -> None:
    """Replace the buffers of `module`, such as batch-norm statistics, by the main process's buffers."""
    if world.size > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def broadcast_from_main(value: Any, world: World) -> Any:
    """Return the main process's `value` in every process."""
    values = [value]
    if world.size > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def barrier(world: World) -> None:
    """Wait until every process has called this function."""
    if world.size > 1:
        dist.barrier()
