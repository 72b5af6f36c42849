"""The vote of the self-organizing prototypes and its cross-entropy, in rows at a time (spec/sop.md 1.5, 1.6).

    q(u) = softmax over all voters of u Dᵀ / τ,    P(u) = q(u) · Y

Y [P(k+1), P] is never built. With a voter's weight w for its own prototype, the rest spread evenly over the others,

    P_j = Σ_{v∈j} q_v a_v + (1 − Σ_v q_v a_v) / P,    a_v = (w_v P − 1) / (P − 1)

which equals own_j + (Σ_i leak_i − leak_j) / (P − 1) of 1.5 and needs one weighted sum. For G = ∂L/∂P_j it gives
∂L/∂(u D_v) = q_v (a_v (G_j − mean G) − c) / τ, where c = Σ_v q_v a_v (G_j − mean G).
The voters are walked slot by slot (first supports, …, anchors), so that every operation runs along contiguous P.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from training.prototypes import Prototypes

FLOOR = 1e-12
"""Votes below it count as it: keeps the logarithm finite."""


def vote(u: Tensor, prototypes: Prototypes, temperature: float, chunk: int | None = None) -> Tensor:
    """P(u) = softmax(u Dᵀ / τ) · Y (1.5): u [..., d] → [..., P]; rows sum to 1.

    Differentiable once in u. The softmax over voters exists for `chunk` rows at a time only, in the backward pass too,
    where it is computed anew. Raises ValueError for fewer than two prototypes, which cannot share a vote.
    """
    flat = u.reshape(-1, u.shape[-1])
    votes: Tensor = _Vote.apply(flat, *_operands(prototypes, flat), temperature, chunk)
    return votes.view(*u.shape[:-1], len(prototypes.D))


def vote_cross_entropy(
    u: Tensor,
    prototypes: Prototypes,
    temperature: float,
    targets: Tensor,
    which: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """−Σ_c T_c log P_c(u) for each row: u [R, d], targets [R, P] → [R]. The same as `cross_entropy(vote(u), targets)`.

    With `which` [R] (int64), row r has targets[which[r]]. As the loss is linear in its target, a row with several
    targets may be given their sum. The gradient of a row's loss depends on that row only and is computed at once, so that
    nothing but it, [R, d], is kept for the backward pass. Differentiable once in u; targets get no gradient.
    """
    wanted = u.requires_grad and torch.is_grad_enabled()
    losses: Tensor = _VoteCrossEntropy.apply(
        u, *_operands(prototypes, u), temperature, targets.detach(), which, chunk, wanted
    )
    return losses


def cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    """−Σ_c P_c(teacher) log P_c(student), [..., P] → [...]."""
    return -(teacher * student.clamp_min(FLOOR).log()).sum(-1)


def _operands(prototypes: Prototypes, u: Tensor) -> tuple[Tensor, Tensor]:
    """Voters [k+1, P, d] and their coefficients a [k+1, P]."""
    D, w = prototypes
    count = len(D)
    if count < 2:
        raise ValueError(f"{count} prototype: a vote needs at least two")
    return D.transpose(0, 1).contiguous().to(u.dtype), ((w.T * count - 1.0) / (count - 1)).to(u.dtype)


class _Ballot:
    """The vote of a few rows at a time, in one reused buffer [k+1, r, P]."""

    def __init__(self, u: Tensor, voters: Tensor, a: Tensor, temperature: float, chunk: int | None) -> None:
        self.voters, self.a, self.temperature = voters, a, temperature
        slots, count, _ = voters.shape
        self.rows = chunk or max(1, (1 << (26 if u.is_cuda else 23)) // (slots * count))
        self.rows = max(1, min(self.rows, len(u)))
        self.buffer = u.new_empty(slots * self.rows * count)

    def cast(self, u: Tensor) -> Tensor:
        """Votes [r, P] of rows u [r, d]; keeps what `pull` needs."""
        slots, count, _ = self.voters.shape
        scaled = u / self.temperature
        e = self.e = self.buffer[: slots * len(u) * count].view(slots, len(u), count)
        for slot, voters in zip(e, self.voters):
            torch.mm(scaled, voters.T, out=slot)
        highest = e.amax(dim=(0, 2))[:, None]
        self.total = torch.zeros_like(highest)
        self.own = torch.zeros_like(e[0])
        for slot, a in zip(e, self.a):
            self.total += slot.sub_(highest).exp_().sum(1, keepdim=True)
            self.own.addcmul_(slot, a)
        spread = ((self.total - self.own.sum(1, keepdim=True)) / count).clamp_min_(0.0)
        return (self.own + spread).div_(self.total)

    def pull(self, gradient: Tensor) -> Tensor:
        """∂L/∂u [r, d] of the rows cast last, given ∂L/∂P [r, P]. Overwrites the ballot."""
        pulled = gradient - gradient.mean(1, keepdim=True)
        offset = -(self.own * pulled).sum(1, keepdim=True) / self.total
        result = None
        for slot, a, voters in zip(self.e, self.a, self.voters):
            slot.mul_(torch.addcmul(offset, pulled, a))
            result = slot @ voters if result is None else result.addmm_(slot, voters)
        assert result is not None
        return result.div_(self.total * self.temperature)


class _Vote(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, voters: Tensor, a: Tensor, temperature: float, chunk: int | None) -> Tensor:
        ctx.save_for_backward(u, voters, a)
        ctx.temperature, ctx.chunk = temperature, chunk
        ballot = _Ballot(u, voters, a, temperature, chunk)
        votes = u.new_empty(len(u), voters.shape[1])
        for low in range(0, len(u), ballot.rows):
            votes[low : low + ballot.rows] = ballot.cast(u[low : low + ballot.rows])
        return votes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        u, voters, a = ctx.saved_tensors
        ballot = _Ballot(u, voters, a, ctx.temperature, ctx.chunk)
        result = torch.empty_like(u)
        for low in range(0, len(u), ballot.rows):
            ballot.cast(u[low : low + ballot.rows])
            result[low : low + ballot.rows] = ballot.pull(gradient[low : low + ballot.rows])
        return result, None, None, None, None


class _VoteCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        voters: Tensor,
        a: Tensor,
        temperature: float,
        targets: Tensor,
        which: Tensor | None,
        chunk: int | None,
        wanted: bool,
    ) -> Tensor:
        ballot = _Ballot(u, voters, a, temperature, chunk)
        losses = u.new_empty(len(u))
        gradient = torch.empty_like(u) if wanted else None
        for low in range(0, len(u), ballot.rows):
            rows = slice(low, low + ballot.rows)
            target = targets[rows] if which is None else targets[which[rows]]
            votes = ballot.cast(u[rows])
            kept = votes.clamp_min(FLOOR)
            losses[rows] = -(target * kept.log()).sum(1)
            if gradient is not None:
                gradient[rows] = ballot.pull((target / kept).neg_().masked_fill_(votes < FLOOR, 0.0))
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (per_row,) = ctx.saved_tensors
        return per_row * gradient[:, None], None, None, None, None, None, None, None
