"""The SOP objective, equation by equation (Silva et al., ICML 2025; numbers of spec/sop.md).

Symbols are the paper's: P self-organizing prototypes of k + 1 voters each, D their embeddings [P, k+1, d],
w the weight with which a voter votes for its own prototype [P, k+1], τ the temperature, V views per picture.
Everything here is float32 (float64 in tests); call it outside autocast. The prototypes are drawn in
`training/prototypes.py`, the vote is cast in `training/vote.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from training.prototypes import Prototypes, draw_many, draw_prototypes
from training.vote import cross_entropy, vote, vote_cross_entropy

__all__ = [
    "Prototypes", "VoteStatistics", "cross_entropy", "draw_many", "draw_prototypes", "image_loss", "image_loss_given",
    "patch_loss", "vote", "vote_cross_entropy", "vote_statistics",
]  # fmt: skip


def image_loss(
    zs: Tensor, zt: Tensor, views: int, prototypes: Prototypes, student_temperature: float, teacher_temperature: float
) -> Tensor:
    """L_CLS (1.6): zs [V·B, d] and zt [2·B, d], crop-major; mean over the 2V − 2 pairs of different views."""
    with torch.no_grad():
        targets = vote(zt, prototypes, teacher_temperature)
    return image_loss_given(targets, zs, views, prototypes, student_temperature)


def image_loss_given(targets: Tensor, zs: Tensor, views: int, prototypes: Prototypes, temperature: float) -> Tensor:
    """L_CLS with the teacher's votes [2·B, P] at hand, as they are or balanced.

    Cross-entropy is linear in its target: a student crop has one, the other global view's vote or, for a local crop, the
    sum of both.
    """
    first, second = targets.chunk(2)
    sums = torch.cat([second, first, first + second]) if views > 2 else torch.cat([second, first])
    B = len(first)
    row = torch.arange(len(zs), device=zs.device)
    losses = vote_cross_entropy(zs, prototypes, temperature, sums, (row // B).clamp_max(2) * B + row % B)
    return losses.sum() / ((2 * views - 2) * B)


def patch_loss(
    zs: Tensor, zt: Tensor, mask: Tensor, prototypes: Prototypes, student_temperature: float, teacher_temperature: float,
    index: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """L_patch (1.7): zs, zt [M, d] at the masked tokens of mask [2·B, L], row-major.

    Each crop is averaged over its own masked tokens; crops without any count with 0. `index` [M]: the masked positions in
    the flattened mask, where the caller knows them (a GPU would have to wait for their number).
    """
    if len(zs) == 0:
        return zs.sum() * 0.0
    with torch.no_grad():
        targets = vote(zt, prototypes, teacher_temperature)
    losses = vote_cross_entropy(zs, prototypes, student_temperature, targets)
    crop = mask.nonzero(as_tuple=True)[0] if index is None else index // mask.shape[1]
    per_crop = mask.sum(1).clamp(min=1).to(losses.dtype)
    return (losses / per_crop[crop]).sum() / len(mask)


class VoteStatistics(NamedTuple):
    """How decided a batch of votes is."""

    entropy: float
    """Mean entropy of the votes, in nats; ln P when every vote is uniform."""
    entropy_of_mean: float
    """Entropy of the mean vote; ln P when all prototypes are used alike."""
    leak: float
    """Share of the vote mass that spreads over other prototypes because voters' weights are below 1."""
    support_cosine: float
    """Mean cosine between anchors and their support; nan without support."""
    voter_entropy: float
    """Mean entropy of the softmax over all voters, in nats; ln P(k+1) when it is uniform."""


@torch.no_grad()
def vote_statistics(u: Tensor, prototypes: Prototypes, temperature: float) -> VoteStatistics:
    """Statistics of the votes of u [B, d]."""
    D, w = prototypes
    p = vote(u, prototypes, temperature)
    mean = p.mean(0)
    voters = D.flatten(0, 1)
    leak, voter_entropy = [], []
    for part in u.split(128):
        log_q = (part @ voters.T / temperature).log_softmax(-1)
        q = log_q.exp()
        leak.append(q @ (1.0 - w.flatten()))
        voter_entropy.append(-(q * log_q).sum(-1))
    cosine = D[:, :-1] @ D[:, -1, :, None]
    return VoteStatistics(
        float(cross_entropy(p, p).mean()),
        float(cross_entropy(mean, mean)),
        float(torch.cat(leak).mean()),
        float(cosine.mean()) if w.shape[1] > 1 else float("nan"),
        float(torch.cat(voter_entropy).mean()),
    )
