"""Each stabiliser against its definition, and for what it is there to do."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from training.stabilisers import koleo, mean_entropy_gap, sigreg, sinkhorn, variance_hinge


def unit(count: int, dim: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(count, dim, dtype=torch.float64, generator=torch.manual_seed(seed)), dim=1)


def test_koleo_is_the_mean_log_distance_to_the_nearest_other_row() -> None:
    z = unit(7, 4)
    expected = 0.0
    for i in range(7):
        expected -= math.log(min(float((z[i] - z[j]).norm()) for j in range(7) if j != i) + 1e-8)
    assert math.isclose(float(koleo(z)), expected / 7, rel_tol=1e-9)
    assert float(koleo(z[:1])) == 0.0


def test_descending_koleo_spreads_the_rows() -> None:
    z = unit(30, 8).requires_grad_()
    value = koleo(z)
    (gradient,) = torch.autograd.grad(value, z)
    assert koleo(F.normalize(z.detach() - 0.05 * gradient, dim=1)).item() < value.item()


def test_koleo_leaves_near_duplicates_out() -> None:
    z = unit(6, 4)
    twin = F.normalize(z[:1] + 1e-6, dim=1)
    both = torch.cat([z, twin]).requires_grad_()
    groups = torch.tensor([0, 1, 2, 3, 4, 5, 0])
    (with_pair,) = torch.autograd.grad(koleo(both), both)
    (without,) = torch.autograd.grad(koleo(both, groups), both)
    assert with_pair.norm() > 100 * without.norm()
    assert without.isfinite().all()
    assert koleo(both, torch.zeros(7, dtype=torch.long)).item() == 0.0  # one group: nobody has a neighbour


def test_spread_rows_score_better_than_collapsed_ones() -> None:
    spread, line = unit(256, 16), F.normalize(unit(256, 16) * torch.tensor([1.0] + [0.01] * 15), dim=1)
    point = F.normalize(unit(1, 16) + 0.01 * unit(256, 16), dim=1)
    generator = torch.Generator()
    for term in (koleo, variance_hinge, lambda z: sigreg(z, generator.manual_seed(0))):
        assert term(spread) < term(line) and term(spread) < term(point)  # type: ignore[no-untyped-call]
    assert variance_hinge(spread) < 0.05 < 0.8 < variance_hinge(point)


def test_sigreg_of_a_normal_sample_is_small() -> None:
    d = 64
    z = torch.randn(4096, d, dtype=torch.float64, generator=torch.manual_seed(0)) / math.sqrt(d)
    assert sigreg(z, torch.Generator().manual_seed(1)) < 2e-3


def test_mean_entropy_gap() -> None:
    even = torch.eye(8, dtype=torch.float64)
    assert abs(float(mean_entropy_gap(even))) < 1e-9
    assert math.isclose(float(mean_entropy_gap(even[:1].expand(8, 8))), math.log(8), rel_tol=1e-6)


def test_sinkhorn_balances_prototypes() -> None:
    votes = (6 * unit(64, 8)).softmax(1) * torch.linspace(1, 8, 8, dtype=torch.float64)
    votes = votes / votes.sum(1, keepdim=True)
    balanced = sinkhorn(votes, 20)
    assert torch.allclose(balanced.sum(1), torch.ones(64, dtype=torch.float64))
    assert torch.allclose(balanced.mean(0), torch.full((8,), 1 / 8, dtype=torch.float64), atol=1e-3)
    assert (votes.mean(0) - 1 / 8).abs().max() > 0.05
