"""The vote in chunks of rows against the closed form of the specification (1.5) under plain autograd."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from training.prototypes import Prototypes
from training.vote import FLOOR, cross_entropy, vote, vote_cross_entropy


def unit(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=g, dtype=dtype), dim=-1)


def some_prototypes(P: int = 10, k: int = 3, d: int = 8, dtype: torch.dtype = torch.float64) -> Prototypes:
    w = torch.rand(P, k + 1, generator=torch.Generator().manual_seed(7), dtype=dtype)
    w[:, -1] = 0.9
    return Prototypes(unit(P, k + 1, d, seed=1, dtype=dtype), w)


def plain_vote(u: Tensor, prototypes: Prototypes, temperature: float) -> Tensor:
    """own_j + (Σ_i leak_i − leak_j) / (P − 1), as printed in 1.5."""
    D, w = prototypes
    q = (u @ D.flatten(0, 1).T / temperature).softmax(-1).unflatten(-1, w.shape)
    own, leak = (q * w).sum(-1), (q * (1 - w)).sum(-1)
    return own + (leak.sum(-1, keepdim=True) - leak) / (len(w) - 1)


def some_targets(R: int, P: int = 10) -> Tensor:
    return torch.rand(R, P, generator=torch.Generator().manual_seed(5), dtype=torch.float64).softmax(-1)


@pytest.mark.parametrize("k", [0, 1, 4])
@pytest.mark.parametrize("temperature", [0.04, 0.1, 1.0])
def test_vote_and_gradient_equal_the_printed_closed_form(k: int, temperature: float) -> None:
    drawn = some_prototypes(k=k)
    a, b = unit(23, 8, seed=2).requires_grad_(), unit(23, 8, seed=2).requires_grad_()
    ours, plain = vote(a, drawn, temperature, chunk=5), plain_vote(b, drawn, temperature)
    torch.testing.assert_close(ours, plain, rtol=1e-11, atol=1e-14)
    upstream = torch.randn(23, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours.backward(upstream)
    plain.backward(upstream)
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("k", [0, 3])
def test_both_functions_pass_gradcheck(k: int) -> None:
    drawn, targets = some_prototypes(P=5, k=k, d=4), some_targets(6, 5)
    u = unit(6, 4, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda u: vote(u, drawn, 0.2, chunk=4), u)
    assert torch.autograd.gradcheck(lambda u: vote_cross_entropy(u, drawn, 0.2, targets, chunk=4), u)


@pytest.mark.parametrize("chunk", [1, 7, 23, 100, None])
def test_cross_entropy_in_chunks_equals_the_two_steps(chunk: int | None) -> None:
    drawn, targets = some_prototypes(), some_targets(23)
    a, b = unit(23, 8, seed=2).requires_grad_(), unit(23, 8, seed=2).requires_grad_()
    fused, steps = vote_cross_entropy(a, drawn, 0.1, targets, chunk=chunk), -(targets * plain_vote(b, drawn, 0.1).log())
    torch.testing.assert_close(fused, steps.sum(-1), rtol=1e-12, atol=1e-12)
    weights = torch.linspace(-1, 2, 23, dtype=torch.float64)  # any use of the rows' losses, not only their sum
    (fused * weights).sum().backward()
    (steps.sum(-1) * weights).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)


def test_targets_may_be_shared_and_summed() -> None:
    drawn, targets = some_prototypes(), some_targets(4)
    u, which = unit(9, 8, seed=2), torch.tensor([3, 0, 0, 1, 2, 2, 3, 1, 0])
    shared = vote_cross_entropy(u, drawn, 0.1, targets, which, chunk=4)
    torch.testing.assert_close(shared, vote_cross_entropy(u, drawn, 0.1, targets[which]))
    both = vote_cross_entropy(u[:2], drawn, 0.1, targets[:2] + targets[2:])
    one, other = (vote_cross_entropy(u[:2], drawn, 0.1, part) for part in (targets[:2], targets[2:]))
    torch.testing.assert_close(both, one + other)


def test_nothing_of_the_size_of_the_softmax_is_kept_for_the_backward_pass() -> None:
    drawn, targets = some_prototypes(P=50, k=4), some_targets(200, 50)
    u = unit(200, 8, seed=2).requires_grad_()
    for call in (lambda: vote_cross_entropy(u, drawn, 0.1, targets), lambda: vote(u, drawn, 0.1)):
        kept: list[int] = []

        def pack(x: Tensor, kept: list[int] = kept) -> Tensor:
            kept.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            call()
        assert kept and max(kept) <= max(u.numel(), drawn.D.numel())


def test_float32_follows_float64() -> None:
    drawn, targets = some_prototypes(P=200, k=4, d=32), some_targets(50, 200)
    single = Prototypes(drawn.D.float(), drawn.w.float())
    u = unit(50, 32, seed=2).requires_grad_()
    v = u.detach().float().requires_grad_()
    exact, rounded = vote_cross_entropy(u, drawn, 0.04, targets), vote_cross_entropy(v, single, 0.04, targets.float())
    exact.sum().backward()
    rounded.sum().backward()
    assert (exact - rounded).abs().max() < 1e-5 * exact.max()
    assert (u.grad - v.grad).abs().max() < 1e-5 * u.grad.abs().max()


def test_votes_that_vanish_stay_finite() -> None:
    """Without leaks (w = 1) and at a low temperature a student can give a prototype a vote of exactly 0."""
    D = torch.eye(8)[:, None]
    drawn = Prototypes(D, torch.ones(8, 1))
    u = D[:1, 0].clone().requires_grad_()
    target = torch.zeros(1, 8)
    target[0, 5] = 1.0
    p = vote(u, drawn, 0.005)
    assert p[0, 5] < FLOOR and p.min() >= 0
    loss = vote_cross_entropy(u, drawn, 0.005, target)
    assert loss.item() == pytest.approx(-math.log(FLOOR), rel=1e-5)
    loss.sum().backward()
    assert torch.equal(u.grad, torch.zeros_like(u))  # as with clamp_min: below the floor nothing pulls
    assert cross_entropy(p, target).isfinite().all()


def test_leading_shapes_and_modes() -> None:
    drawn = some_prototypes()
    u = unit(3, 4, 8, seed=2)
    assert vote(u, drawn, 0.1).shape == (3, 4, 10) and vote(u[0, 0], drawn, 0.1).shape == (10,)
    assert torch.equal(vote(u, drawn, 0.1)[1, 2], vote(u[1], drawn, 0.1)[2])
    assert vote(u[:0], drawn, 0.1).shape == (0, 4, 10)
    wanting = unit(5, 8, seed=4).requires_grad_()
    with torch.no_grad():
        assert not vote_cross_entropy(wanting, drawn, 0.1, some_targets(5)).requires_grad


def test_a_second_derivative_is_refused() -> None:
    drawn, u = some_prototypes(), unit(5, 8, seed=2).requires_grad_()
    (first,) = torch.autograd.grad(vote_cross_entropy(u, drawn, 0.1, some_targets(5)).sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        first.sum().backward()


def test_one_prototype_cannot_vote() -> None:
    with pytest.raises(ValueError, match="1 prototype: a vote needs at least two"):
        vote(unit(3, 8, seed=2), some_prototypes(P=1), 0.1)
