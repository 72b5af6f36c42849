"""Neighbours by tile maxima and by rounded first comparisons are those of brute force."""

from __future__ import annotations

import platform

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import training.neighbours
from training.neighbours import TILE, Precision, nearest_rows

# What oneDNN has no int8 product for (processors other than x86) searches in full precision or bfloat16.
HAS_INT8 = platform.machine().lower() in ("x86_64", "amd64") and hasattr(torch.ops.onednn, "qlinear_pointwise")
ROUNDED: list[Precision] = ["int8", "bfloat16"] if HAS_INT8 else ["bfloat16"]
PRECISIONS: list[Precision] = ["full", *ROUNDED]


def unit(count: int, dim: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("pool_size", [TILE * 5, TILE * 5 + 1, TILE * 9 + 15, 20, 400])
@pytest.mark.parametrize("count", [1, 3, 4, 8])
@pytest.mark.parametrize(("block", "precision"), [(1, "full"), (None, None), *((48, p) for p in PRECISIONS)])
@pytest.mark.parametrize("dim", [12, 100])
def test_nearest_rows_are_those_of_brute_force(
    pool_size: int, count: int, block: int | None, precision: Precision | None, dim: int
) -> None:
    bank, queries = unit(500, dim), unit(70, dim, 1)
    pool = torch.randperm(500, generator=seeded(2))[:pool_size]
    similarity, index = nearest_rows(queries, bank, pool, count, block, precision)
    expected = (queries @ bank[pool].T).topk(count, dim=1)
    assert torch.equal(index, pool[expected.indices])
    torch.testing.assert_close(similarity, expected.values)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_nearest_rows_over_several_groups_of_queries(precision: Precision) -> None:
    bank, queries = unit(600, 8), unit(4100, 8, 1)
    similarity, index = nearest_rows(queries, bank, torch.arange(600), 4, precision=precision)
    expected = (queries @ bank.T).topk(4, dim=1)
    torch.testing.assert_close(similarity, expected.values)
    assert (index == expected.indices).all(1).float().mean() > 0.999  # ties within rounding may swap


@pytest.mark.parametrize("precision", PRECISIONS)
def test_nearest_rows_among_many_exact_copies(precision: Precision) -> None:
    """A memory of few distinct rows: ties everywhere, so similarities must agree and no row may come twice."""
    bank = unit(6, 8).repeat(60, 1)
    similarity, index = nearest_rows(unit(40, 8, 1), bank, torch.arange(360), 5, precision=precision)
    expected = (unit(40, 8, 1) @ bank.T).topk(5, dim=1)
    torch.testing.assert_close(similarity, expected.values)
    assert all(len(set(row)) == 5 for row in index.tolist())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_cluster_that_fills_one_tile_is_found_whole(precision: Precision) -> None:
    bank, query = unit(TILE * 40, 16), unit(1, 16, 1)
    bank[TILE * 3 : TILE * 3 + 8] = F.normalize(query + 0.1 * unit(8, 16, 2), dim=1)
    index = nearest_rows(query, bank, torch.arange(len(bank)), 8, precision=precision)[1]
    assert sorted(index[0].tolist()) == list(range(TILE * 3, TILE * 3 + 8))


@pytest.mark.parametrize("precision", ROUNDED)
@pytest.mark.parametrize("spread", [0.003, 0.05, 0.5, 5.0])
def test_rounding_never_decides(precision: Precision, spread: float) -> None:
    """Memories from nearly one point, where rounded similarities tell little, to random ones."""
    point = unit(1, 64, 3)
    bank, queries = (F.normalize(point + spread * unit(n, 64, s), dim=1) for n, s in ((4000, 0), (50, 1)))
    similarity, index = nearest_rows(queries, bank, torch.arange(4000), 8, precision=precision)
    exact = (queries.double() @ bank.double().T).topk(8, dim=1)
    torch.testing.assert_close(similarity.double(), exact.values, rtol=0, atol=5e-7)
    picked = (queries.double() @ bank.double().T).gather(1, index)
    torch.testing.assert_close(picked, exact.values, rtol=0, atol=5e-7)


@pytest.mark.parametrize("precision", ROUNDED)
def test_unsure_queries_are_searched_again_and_only_they(precision: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, Precision | None]] = []
    real = training.neighbours.nearest_rows

    def watch(queries: Tensor, *rest: object, **named: object) -> tuple[Tensor, Tensor]:
        asked.append((len(queries), rest[4]))  # type: ignore[arg-type]
        return real(queries, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(training.neighbours, "nearest_rows", watch)
    bank = unit(4000, 256)
    clear = F.normalize(bank[:20] + 0.03 * unit(20, 256, 1), dim=1)  # one near row each: k = 1 is beyond doubt
    real(clear, bank, torch.arange(4000), 1, precision=precision)
    assert asked == []
    crowd = F.normalize(unit(1, 256, 2) + 0.001 * unit(4000, 256, 4), dim=1)
    real(torch.cat([crowd[:7]]), crowd, torch.arange(4000), 8, precision=precision)
    assert asked == [(7, "full")]


def test_large_searches_on_this_machine_choose_a_shortlist_that_agrees() -> None:
    """The automatic choice at a size where it leaves full precision (where the processor offers less)."""
    bank = unit(8192, 256)
    queries = unit(2048, 256, 1)
    similarity, index = nearest_rows(queries, bank, torch.arange(8192), 8)
    expected = (queries @ bank.T).topk(8, dim=1)
    torch.testing.assert_close(similarity, expected.values, rtol=0, atol=1e-6)
    assert (index == expected.indices).all(1).float().mean() > 0.999
