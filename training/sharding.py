"""FSDP2 (torch.distributed.fsdp.fully_shard): the student in shards, for backbones such as ViT-L whose copies fill a GPU.

Weights, gradients and AdamW's two moments of the student are split over the ranks; the teacher, which has neither
gradients nor moments, and the method's memories stay whole on every rank, so that whatever looks at them is the same as
without shards. What leaves a process, a state, is whole too: a run goes on with or without `--shard`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from training.encoder import Student, blocks


def shard(student: Student) -> None:
    """Split a student over all ranks: one group of parameters per block, and one of the rest."""
    for block in blocks(student.backbone):
        fully_shard(block)
    fully_shard(student)


def gathered_parts(student: Student) -> Iterator[list[str]]:
    """Names of the student's parameters, part by part; while a part is out its parameters are ordinary whole tensors, to
    read. Without shards there is one part. Every rank must take part."""
    rest = {name for name, _ in student.named_parameters()}
    for path, module in reversed(list(student.named_modules())):  # blocks before the root, which holds the rest
        if not isinstance(module, FSDPModule):
            continue
        names = [name for name in rest if name.startswith(f"{path}.")] if path else list(rest)
        rest -= set(names)
        module.unshard()
        try:
            yield names
        finally:
            module.reshard()
    if rest:
        yield list(rest)


def require_grad(student: Student, backbone: bool) -> None:
    """Let the backbone learn, or freeze it. FSDP2 keeps a second set of parameters, the gathered ones."""
    student.backbone.requires_grad_(backbone)
    for names in gathered_parts(student):
        for name in names:
            if name.startswith("backbone."):
                student.get_parameter(name).requires_grad_(backbone)


def sync_gradients(student: nn.Module, now: bool) -> None:
    """Whether the next backward pass of a sharded student sums gradients over ranks, or keeps them for a later one."""
    if isinstance(student, FSDPModule):
        student.set_requires_gradient_sync(now)


def local(tensors: list[Tensor]) -> list[Tensor]:
    """This rank's part of each tensor; the tensor itself where it is whole."""
    return [x.to_local() if isinstance(x, DTensor) else x for x in tensors]


def norms(tensors: list[Tensor]) -> Tensor:
    """Euclidean norm [n] of each whole tensor, the same on every rank."""
    found = list(torch._foreach_norm(local(tensors)))
    shards = [i for i, x in enumerate(tensors) if isinstance(x, DTensor)]
    if shards:
        squares = torch.stack([found[i] for i in shards]).square()
        dist.all_reduce(squares)
        for i, norm in zip(shards, squares.sqrt().unbind(), strict=True):
            found[i] = norm
    return torch.stack(found)


def whole(state: Any, keep: bool = True) -> Any:
    """A state with every shard gathered, on the CPU (empty tensors where not to `keep`). Every rank must take part."""
    if isinstance(state, DTensor):
        full = state.full_tensor()
        return full.cpu() if keep else full.new_empty(0)
    if isinstance(state, dict):
        return {key: whole(value, keep) for key, value in state.items()}
    return [whole(value, keep) for value in state] if isinstance(state, list) else state


def load_whole(module: nn.Module, state: dict[str, Tensor]) -> None:
    """`module.load_state_dict` of whole tensors; each rank keeps its shards."""
    own = module.state_dict()
    module.load_state_dict({name: _like(own[name], value) if name in own else value for name, value in state.items()})


def load_whole_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """`optimizer.load_state_dict` of whole moments; each rank keeps its shards."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {
        i: {name: _like(parameters[i], x) if isinstance(x, Tensor) and x.ndim else x for name, x in entry.items()}
        for i, entry in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": moments})


def _like(mine: Tensor, value: Tensor) -> Tensor:
    if not isinstance(mine, DTensor):
        return value
    return distribute_tensor(value.to(mine.device), mine.device_mesh, mine.placements, src_data_rank=None)
