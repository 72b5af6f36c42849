"""Several processes as one: what the loss needs beyond DistributedDataParallel. One process is the ordinary case.

Rows are gathered in rank order, so that W ranks of B rows are one batch of W·B rows. A term that is computed from
gathered rows is the same on every rank; its gradient with respect to a rank's own rows is multiplied by W here, since
the gradients of all ranks are averaged afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number."""
    return dist.get_rank() if world_size() > 1 else 0


def gather_rows(x: Tensor) -> Tensor:
    """Rows [B, …] of every rank as [W·B, …], rank order; the gradient reaches this rank's rows (times W)."""
    if world_size() == 1:
        return x
    gathered: Tensor = _Gather.apply(x)
    return gathered


def all_mean(x: Tensor) -> Tensor:
    """Mean of x over ranks; the gradient is that of this rank's share (times W)."""
    return gather_rows(x[None]).mean(0) if world_size() > 1 else x


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> Tensor:
        return gradients[0].chunk(world_size())[rank()] * world_size()


def average_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Average the gradients of parameters that DistributedDataParallel does not hold."""
    if world_size() == 1:
        return
    for parameter in parameters:
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= world_size()


def agree(*mine: float) -> list[float]:
    """The largest of each number over ranks: what one process saw (a signal, a clock) becomes everyone's decision."""
    if world_size() == 1:
        return list(mine)
    numbers = torch.tensor(mine, dtype=torch.float64, device=_device())
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return [float(x) for x in numbers]


def mean_over_ranks(numbers: Tensor) -> Tensor:
    """Mean of small numbers over ranks, without gradient."""
    if world_size() == 1:
        return numbers
    total = numbers.to(_device(), copy=True)
    dist.all_reduce(total)
    return total / world_size()


@contextmanager
def processes(backend: str) -> Iterator[None]:
    """The process group that torchrun or its like describe. A process that dies fails the others within the hour."""
    dist.init_process_group(backend, timeout=timedelta(hours=1))
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def first_rank_first() -> Iterator[None]:
    """The first process runs the block alone, then the others, however long it takes: it prepares what they find. Where
    it fails the others leave quietly (SystemExit): its sentence is the one to read."""
    if world_size() == 1:
        yield
        return
    patient: Any = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    failed = torch.ones(1)
    if rank() > 0:
        dist.broadcast(failed, 0, patient)
        if failed.item():
            raise SystemExit(1)
    try:
        yield
        failed.zero_()
    finally:
        if rank() == 0:
            dist.broadcast(failed, 0, patient)


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
