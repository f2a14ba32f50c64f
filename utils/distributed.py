"""More than one process, by utils.launch or torchrun: who am I, and the few collective operations training needs.

Gradients are summed by one all-reduce after the backward pass rather than by DistributedDataParallel: each process
divides its loss by the *global* batch, so that uneven shares, micro-batches and the auxiliary pass are exact.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous


class World(NamedTuple):
    """This process among all: `rank` of `size`."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@contextmanager
def join_processes(device_type: str) -> Iterator[World]:
    """Join the processes that were started together (RANK, WORLD_SIZE), or be the only one."""
    world = World(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    if world.size > 1:
        # Who started a process that dies ends the others, so a long wait is no error: shares of a test end hours apart.
        wait = timedelta(days=30)
        store, *_ = next(rendezvous("env://", world.rank, world.size, timeout=wait))
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)  # not of dead processes
        backend = "nccl" if device_type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=wait, store=store, rank=world.rank, world_size=world.size)
    try:
        yield world
    finally:
        if world.size > 1:
            dist.destroy_process_group()


def all_reduce_gradients(parameters: Iterable[nn.Parameter], world: World) -> None:
    """Add every process's gradients up, in place, in one collective call."""
    if world.size == 1:
        return
    parameters = [p for p in parameters if p.requires_grad]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat)
    for parameter, gradient in zip(parameters, flat.split([g.numel() for g in gradients]), strict=True):
        parameter.grad = gradient.view_as(parameter).clone()


def all_reduce_sum(values: Tensor, world: World, operation: dist.ReduceOp = dist.ReduceOp.SUM) -> Tensor:
    """Element-wise sum, or another reduction, over the processes (a new tensor)."""
    if world.size > 1:
        values = values.clone()
        dist.all_reduce(values, operation)
    return values


def all_reduce_max(values: Tensor, world: World) -> Tensor:
    """Element-wise maximum over the processes (a new tensor)."""
    return all_reduce_sum(values, world, dist.ReduceOp.MAX)


def all_gather_rows(rows: Tensor, world: World) -> Tensor:
    """The rows of all processes, rank after rank, on the CPU of each."""
    gathered = [rows.cpu()] * world.size
    if world.size > 1:
        dist.all_gather_object(gathered, rows.cpu())
    return torch.cat(gathered)


def broadcast_buffers(module: nn.Module, world: World) -> None:
    """Give every process the main one's buffers (batch-norm statistics)."""
    for buffer in module.buffers() if world.size > 1 else ():
        dist.broadcast(buffer, src=0)


def broadcast_from_main(value: bool, world: World) -> bool:
    """The main process's value, in every process."""
    values = [value]
    if world.size > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def barrier(world: World) -> None:
    if world.size > 1:
        dist.barrier()
