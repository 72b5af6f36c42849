"""Drawing prototypes: who may support whom, and how much a supporter's vote weighs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from training.prototypes import draw_many, draw_prototypes, random_level
from training.sop import vote


def unit(count: int, dim: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows_of(vectors: Tensor, bank: Tensor) -> Tensor:
    """Indices in the bank of vectors [..., d] that are copies of its rows."""
    return (vectors @ bank.T).argmax(-1)


def test_prototypes_are_stored_voter_by_voter() -> None:
    D = draw_prototypes(unit(400, 16), 40, 5, seeded(3)).D
    assert D.shape == (40, 6, 16) and D.transpose(0, 1).is_contiguous()


def test_halved_anchors_bar_twice_as_many_rows_from_supporting() -> None:
    bank = unit(300, 16)
    plain = draw_prototypes(bank, 40, 5, seeded(3))
    halved = draw_prototypes(bank, 40, 5, seeded(3), halved_anchors=True)
    assert torch.equal(plain.D[:, -1], halved.D[:, -1])
    sampled = torch.randperm(300, generator=seeded(3))[:80]
    assert not torch.isin(rows_of(halved.D[:, :-1], bank), sampled).any()
    assert torch.isin(rows_of(plain.D[:, :-1], bank), sampled[40:]).any()
    assert (halved.w <= plain.w).all() and (halved.w < plain.w).any()
    alone = [draw_prototypes(bank, 40, 0, seeded(3), halved_anchors=halve) for halve in (False, True)]
    assert torch.equal(alone[0].D, alone[1].D)  # the released code halves only where there is support


def test_several_draws_are_single_draws_in_a_row() -> None:
    bank, generator = unit(300, 16), seeded(5)
    many = draw_many(bank, 3, 20, 4, seeded(5), support_weight="rescaled", halved_anchors=True)
    for drawn in many:
        single = draw_prototypes(bank, 20, 4, generator, support_weight="rescaled", halved_anchors=True)
        assert torch.equal(drawn.D, single.D) and torch.equal(drawn.w, single.w)
    assert not torch.equal(many[0].D, many[1].D)


def test_random_level_is_the_mean_over_all_pairs() -> None:
    bank = F.normalize(unit(50, 6) + 0.5, dim=1).double()
    similarity = bank @ bank.T
    pairs = similarity.masked_select(~torch.eye(50, dtype=torch.bool))
    assert random_level(bank).item() == pytest.approx(pairs.mean().item(), rel=1e-9)
    assert random_level(bank).item() > 0.3


def test_support_weights() -> None:
    bank = F.normalize(unit(300, 6) + 0.3, dim=1)
    cosine = draw_prototypes(bank, 40, 5, seeded(3)).w
    rescaled = draw_prototypes(bank, 40, 5, seeded(3), support_weight="rescaled").w
    constant = draw_prototypes(bank, 40, 5, seeded(3), support_weight="constant").w
    level = random_level(bank)
    torch.testing.assert_close(rescaled[:, :-1], ((cosine[:, :-1] - level) / (1 - level)).clamp(0, 1))
    assert torch.equal(constant[:, :-1], torch.ones(40, 5))
    for w in (cosine, rescaled, constant):
        torch.testing.assert_close(w[:, -1], torch.full((40,), 0.9))  # the anchor's own weight stays 1 − ε


@pytest.mark.parametrize("kind", ["cosine", "rescaled", "constant"])
def test_weights_stay_in_range_where_cosines_do_not(kind: str) -> None:
    """Opposite rows (negative cosines) and one single point (the random level is 1)."""
    opposite = torch.cat([unit(1, 4), -unit(1, 4)]).repeat(20, 1)
    point = unit(1, 4).repeat(40, 1)
    for bank in (opposite, point):
        drawn = draw_prototypes(bank, 18, 4, seeded(0), support_weight=kind)  # type: ignore[arg-type]
        assert drawn.w.min() >= 0 and drawn.w.max() <= 1
        p = vote(unit(5, 4, 1), drawn, 0.1)
        torch.testing.assert_close(p.sum(1), torch.ones(5))
        assert (p >= 0).all()


@pytest.mark.parametrize(("anchors", "support", "halved"), [(97, 4, False), (101, 0, False), (50, 1, True)])
def test_a_memory_that_is_too_small_is_refused(anchors: int, support: int, halved: bool) -> None:
    with pytest.raises(ValueError, match="exceed a memory of 100 rows"):
        draw_prototypes(unit(100, 4), anchors, support, seeded(0), halved_anchors=halved)
