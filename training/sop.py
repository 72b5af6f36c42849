"""The SOP objective, equation by equation (Silva et al., ICML 2025; numbers of spec/sop.md).

Symbols are the paper's: P self-organizing prototypes of k + 1 voters each, D their embeddings [P, k+1, d],
w the weight with which a voter votes for its own prototype [P, k+1], τ the temperature, V views per picture.
Everything here is float32 (float64 in tests); call it outside autocast.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Prototypes(NamedTuple):
    """The self-organizing prototypes of one step."""

    D: Tensor
    """[P, k+1, d], unit rows: k support embeddings, then the anchor."""
    w: Tensor
    """[P, k+1] in 0…1."""


@torch.no_grad()
def draw_prototypes(
    bank: Tensor, anchors: int, support: int, generator: torch.Generator, smoothing: float = 0.1, block: int = 16384
) -> Prototypes:
    """Draw P anchors from the memory [N, d] and gather each one's k nearest other rows (1.4).

    Anchors are drawn without replacement and never support one another. The running top-k over blocks of the memory
    keeps the similarity matrix at [P, block]. `generator` lives on the CPU so that all ranks draw alike.
    """
    size = len(bank)
    if (anchors + max(support, 1) > size and support > 0) or anchors > size:
        raise ValueError(f"{anchors} anchors with {support} support embeddings exceed a memory of {size} rows")
    chosen = torch.randperm(size, generator=generator)[:anchors].to(bank.device)
    A = bank[chosen]
    anchor_weight = bank.new_full((anchors, 1), 1.0 - smoothing)
    if support == 0:
        return Prototypes(A[:, None], anchor_weight)
    barred = torch.zeros(size, dtype=torch.bool, device=bank.device)
    barred[chosen] = True
    best = A.new_full((anchors, support), -2.0)
    which = torch.zeros((anchors, support), dtype=torch.long, device=bank.device)
    for low in range(0, size, block):
        similarity = (A @ bank[low : low + block].T).masked_fill_(barred[low : low + block], -2.0)
        top, index = similarity.topk(min(support, similarity.shape[1]), dim=1)
        best, keep = torch.cat([best, top], 1).topk(support, dim=1)
        which = torch.cat([which, index + low], 1).gather(1, keep)
    return Prototypes(torch.cat([bank[which], A[:, None]], 1), torch.cat([best.clamp(0.0, 1.0), anchor_weight], 1))


def vote(u: Tensor, prototypes: Prototypes, temperature: float) -> Tensor:
    """P(u) = softmax(u Dᵀ / τ) · Y (1.5), in the closed form that never builds Y. u [..., d] → [..., P], rows sum to 1.

    own_j = Σ_{v∈j} q_v w_v,  leak_j = Σ_{v∈j} q_v (1 − w_v),  P_j = own_j + (Σ_i leak_i − leak_j) / (P − 1)
    """
    D, w = prototypes
    count, voters, dim = D.shape
    q = (u @ D.reshape(count * voters, dim).T / temperature).softmax(-1).unflatten(-1, (count, voters))
    own = (q * w).sum(-1)
    leak = (q * (1.0 - w)).sum(-1)
    return own + (leak.sum(-1, keepdim=True) - leak) / (count - 1)


def cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    """−Σ_c P_c(teacher) log P_c(student), [..., P] → [...]."""
    return -(teacher * student.clamp_min(1e-12).log()).sum(-1)


def image_loss(
    zs: Tensor, zt: Tensor, views: int, prototypes: Prototypes, student_temperature: float, teacher_temperature: float
) -> Tensor:
    """L_CLS (1.6): zs [V·B, d] and zt [2·B, d], crop-major; mean over the 2V − 2 pairs of different views."""
    ps = vote(zs, prototypes, student_temperature).chunk(views)
    with torch.no_grad():
        pt = vote(zt, prototypes, teacher_temperature).chunk(2)
    pairs = [cross_entropy(ps[i], pt[j]).mean() for i in range(views) for j in range(2) if i != j]
    return torch.stack(pairs).mean()


def patch_loss(
    zs: Tensor, zt: Tensor, mask: Tensor, prototypes: Prototypes, student_temperature: float, teacher_temperature: float
) -> Tensor:
    """L_patch (1.7): zs, zt [M, d] at the masked tokens of mask [2·B, L], row-major.

    Each crop is averaged over its own masked tokens; crops without any count with 0.
    """
    if len(zs) == 0:
        return zs.sum() * 0.0
    ps = vote(zs, prototypes, student_temperature)
    with torch.no_grad():
        pt = vote(zt, prototypes, teacher_temperature)
    crop = mask.nonzero(as_tuple=True)[0]
    per_crop = mask.sum(1).clamp(min=1).to(ps.dtype)
    return (cross_entropy(ps, pt) / per_crop[crop]).sum() / len(mask)


def koleo(z: Tensor) -> Tensor:
    """Kozachenko–Leonenko term over unit rows [B, d] of one view: −mean ln(‖z_i − nearest other‖ + 1e-8) (section 8)."""
    if len(z) < 2:
        return z.sum() * 0.0
    with torch.no_grad():
        similarity = z @ z.T
        similarity.fill_diagonal_(-2.0)
        nearest = similarity.argmax(1)
    return -(torch.linalg.vector_norm(z - z[nearest], dim=1) + 1e-8).log().mean()


class VoteStatistics(NamedTuple):
    """How decided a batch of votes is."""

    entropy: float
    """Mean entropy of the votes, in nats; ln P when every vote is uniform."""
    entropy_of_mean: float
    """Entropy of the mean vote; ln P when all prototypes are used alike."""
    leak: float
    """Share of the vote mass that spreads over other prototypes because support cosines are below 1."""
    support_cosine: float
    """Mean cosine between anchors and their support; nan without support."""


@torch.no_grad()
def vote_statistics(u: Tensor, prototypes: Prototypes, temperature: float) -> VoteStatistics:
    """Statistics of the votes of u [B, d]."""
    D, w = prototypes
    p = vote(u, prototypes, temperature)
    q = (u @ D.flatten(0, 1).T / temperature).softmax(-1)
    mean = p.mean(0)
    return VoteStatistics(
        float(cross_entropy(p, p).mean()),
        float(cross_entropy(mean, mean)),
        float((q * (1.0 - w.flatten())).sum(-1).mean()),
        float(w[:, :-1].mean()) if w.shape[1] > 1 else float("nan"),
    )
