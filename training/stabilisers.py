"""Terms and transformations that keep embeddings from collapsing (spec/sop.md section 8).

The published SOP has none of them. Each one here couples the pictures of a batch, so each works on the rows of all
ranks: W ranks of B pictures give what one rank of W·B pictures gives.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from training.device import send
from training.distributed import all_mean, gather_rows

_FAR = -2.0  # below every cosine


def koleo(z: Tensor, groups: Tensor | None = None) -> Tensor:
    """Kozachenko–Leonenko term over unit rows [B, d] of one view: −mean ln(‖z_i − nearest other‖ + 1e-8) (section 8).

    Rows of one group (`groups` int64 [B]: near-duplicates) are no neighbours of each other: their tiny distances would
    carry most of the gradient.
    """
    if groups is not None:
        groups = gather_rows(groups)
    z = gather_rows(z)
    if len(z) < 2:
        return z.sum() * 0.0
    with torch.no_grad():
        similarity = z @ z.T
        similarity.fill_diagonal_(_FAR)
        if groups is not None:
            similarity.masked_fill_(groups[:, None] == groups[None, :], _FAR)
        best, nearest = similarity.max(1)
    distance = torch.linalg.vector_norm(z - z[nearest], dim=1)
    counted = best > _FAR  # a row whose whole batch is one group has no neighbour
    return -((distance + 1e-8).log() * counted).sum() / counted.sum().clamp(min=1)


def variance_hinge(z: Tensor) -> Tensor:
    """VICReg's variance term (Bardes et al. 2022, eq. 1) on unit rows [B, d]: mean_j max(0, 1 − √d · std_j)."""
    z = gather_rows(z)
    std = (z.var(0) + 1e-6).sqrt() * math.sqrt(z.shape[1])
    return (1.0 - std).clamp(min=0.0).mean()


def sigreg(z: Tensor, generator: torch.Generator, slices: int = 256) -> Tensor:
    """SIGReg (Balestriero & LeCun 2025): how far random one-dimensional projections of √d·z, unit rows z [B, d], are
    from a standard normal, by the Epps–Pulley statistic ∫ |φ(t) − e^{−t²/2}|² e^{−t²/2} dt, mean over `slices`."""
    z = gather_rows(z)
    directions = send(torch.randn(z.shape[1], slices, generator=generator, dtype=torch.float32), z.device).to(z.dtype)
    x = math.sqrt(z.shape[1]) * z @ (directions / directions.norm(dim=0))
    t = torch.linspace(-5.0, 5.0, 17, dtype=z.dtype, device=z.device)
    normal = (-0.5 * t * t).exp()
    angle = x[..., None] * t  # [B, slices, 17]
    gap = (angle.cos().mean(0) - normal) ** 2 + angle.sin().mean(0) ** 2
    return torch.trapezoid(gap * normal, t, dim=-1).mean()


def mean_entropy_gap(votes: Tensor) -> Tensor:
    """ln P − H(mean vote) of votes [M, P]: 0 when all prototypes are used alike (MSN's ME-MAX term)."""
    mean = all_mean(votes.mean(0))
    return math.log(votes.shape[1]) + (mean * mean.clamp_min(1e-12).log()).sum()


@torch.no_grad()
def sinkhorn(votes: Tensor, iterations: int = 3) -> Tensor:
    """Votes [M, P] rescaled so that prototypes share the batch alike, rows summing to 1 (Sinkhorn–Knopp, as SwAV)."""
    q = votes.clamp_min(1e-12)
    for _ in range(iterations):
        q = q / (all_mean(q.mean(0)) * q.shape[1])
        q = q / q.sum(1, keepdim=True)
    return q
