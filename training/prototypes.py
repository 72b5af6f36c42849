"""Drawing the self-organizing prototypes of a step: random anchors of the memory and their nearest other rows
(Silva et al., ICML 2025; spec/sop.md 1.4)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from training.device import send
from training.neighbours import nearest_rows

SupportWeight = Literal["cosine", "rescaled", "constant"]


class Prototypes(NamedTuple):
    """The self-organizing prototypes of one step."""

    D: Tensor
    """[P, k+1, d], unit rows: k support embeddings, nearest first, then the anchor. Stored voter-major: the view
    [k+1, P, d] is contiguous."""
    w: Tensor
    """[P, k+1] in 0…1: the share of its vote that a voter gives to its own prototype."""


@torch.no_grad()
def draw_prototypes(
    bank: Tensor,
    anchors: int,
    support: int,
    generator: torch.Generator,
    smoothing: float = 0.1,
    block: int | None = None,
    *,
    halved_anchors: bool = False,
    support_weight: SupportWeight = "cosine",
) -> Prototypes:
    """Draw P anchors from the memory [N, d] (unit rows) and gather each one's k nearest other rows (1.4).

    Anchors are drawn without replacement and never support one another. `generator` lives on the CPU so that all ranks
    draw alike. `block` rows of the memory are compared at a time (see `nearest_rows`).
    `halved_anchors` repeats the released code (2.2 #1): 2P anchors are sampled and a random half of them is kept, but
    none of the 2P supports. The kept ones are those that the same generator draws without it.
    `support_weight`: "cosine" (the paper), "rescaled" (0 at the memory's random level, 1 at the anchor itself; see
    `random_level`) or "constant" (1: no vote leaks). The anchor's own weight is always 1 − `smoothing`.
    Raises ValueError where the memory is too small.
    """
    size, sampled = len(bank), anchors * (2 if halved_anchors and support else 1)
    if sampled + support > size:
        raise ValueError(f"{sampled} anchors with {support} support embeddings exceed a memory of {size} rows")
    order = send(torch.randperm(size, generator=generator), bank.device)
    chosen = order[:anchors]
    A = bank[chosen]
    anchor_weight = bank.new_full((anchors, 1), 1.0 - smoothing)
    if support == 0:
        return Prototypes(A[:, None], anchor_weight)
    pool = order[sampled:].sort().values
    cosine, which = nearest_rows(A, bank, pool, support, block)
    voters = torch.cat([bank[which.T], A[None]])  # [k+1, P, d]
    weight = _support_weight(cosine, bank, support_weight)
    return Prototypes(voters.transpose(0, 1), torch.cat([weight, anchor_weight], 1))


def draw_many(
    bank: Tensor,
    tasks: int,
    anchors: int,
    support: int,
    generator: torch.Generator,
    smoothing: float = 0.1,
    *,
    halved_anchors: bool = False,
    support_weight: SupportWeight = "cosine",
) -> list[Prototypes]:
    """T independent sets (1.6: their losses are averaged), exactly as T calls of `draw_prototypes` in a row.

    Anchors of one set may support another. One common pass would save no arithmetic, only memory traffic, and would
    have to bar the anchors of all sets from all pools; so each set has its own.
    """
    return [
        draw_prototypes(
            bank, anchors, support, generator, smoothing, halved_anchors=halved_anchors, support_weight=support_weight
        )
        for _ in range(tasks)
    ]


def random_level(bank: Tensor) -> Tensor:
    """Mean cosine over all pairs of different rows of the memory [N, d]: (‖Σ x‖² − Σ ‖x‖²) / (N (N − 1)), a scalar."""
    size = len(bank)
    return (bank.sum(0).square().sum() - bank.square().sum()) / (size * (size - 1))


def _support_weight(cosine: Tensor, bank: Tensor, kind: SupportWeight) -> Tensor:
    if kind == "constant":
        return torch.ones_like(cosine)
    if kind == "rescaled":
        level = random_level(bank)
        cosine = (cosine - level) / (1.0 - level).clamp_min(1e-6)
    return cosine.clamp(0.0, 1.0)
