"""Indexes on a GPU: what the selector does on a CPU, over-fetching does there; and the choice of kinds that it can search.

The tests marked `gpu` need faiss-gpu and a CUDA device. The others search FAISS's own indexes of the CPU without selectors,
which is what a GPU's do.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import service.gpu_index
from service.gpu_index import EXACT_ON_GPU, MOST, Gpu, GpuIndex, gpu_bytes, gpu_of, post_filtered, suits_gpu
from service.index import (
    Effort,
    _search,
    build_index,
    bytes_of,
    candidates,
    exact_among,
    faiss,
    gpu_free,
    placed,
    search_index,
)
from service.policy import IndexPolicy
from tests.service.test_index import DIM, clustered

COUNT = 5000


@functools.cache
def indexes(duplicates: bool) -> tuple[np.ndarray, dict[str, Any]]:
    vectors = clustered(COUNT)
    if duplicates:
        vectors[1000:2500] = vectors[0]
    return vectors, {
        name: build_index(vectors, IndexPolicy(index=name))[0] for name in ("Flat", "IVF40,Flat", "IVF40,SQ8")
    }


def unselected(index: Any, visits: int) -> Any:
    return lambda queries, k: _search(index, queries, k, visits, None)


@settings(max_examples=150, deadline=None)
@given(
    share=st.sampled_from([0.0, 0.0005, 0.01, 0.1, 0.5, 0.95, 1.0]),
    seed=st.integers(0, 10**6),
    k=st.integers(1, 100),
    most=st.sampled_from([100, 500, MOST, 10 * COUNT]),
    duplicates=st.booleans(),
    kind=st.sampled_from([("Flat", 0), ("IVF40,Flat", 7), ("IVF40,SQ8", 40)]),
    together=st.booleans(),
)
def test_what_is_fetched_and_dropped_is_what_a_selector_leaves(
    share: float, seed: int, k: int, most: int, duplicates: bool, kind: tuple[str, int], together: bool
) -> None:
    vectors, built = indexes(duplicates)
    index, visits = built[kind[0]], kind[1]
    rng = np.random.default_rng(seed)
    flags = rng.random(COUNT) < share
    if together:  # all that live are alike, and lie far from most queries
        flags = np.argsort(vectors @ vectors[seed % COUNT])[::-1].argsort() < share * COUNT
    live = np.packbits(flags, bitorder="little")
    queries = np.concatenate([clustered(6, seed), vectors[:2]])
    scores, rows, short = post_filtered(unselected(index, visits), queries, k, live, COUNT, most)
    expected, named = _search(index, queries, k, visits, live)
    assert scores.shape == rows.shape == (8, k) and rows.dtype == np.int64
    assert flags[rows[rows >= 0]].all() and ((rows < 0) == np.isneginf(scores)).all()
    assert all(len(set(row[row >= 0].tolist())) == (row >= 0).sum() for row in rows)
    whole = ~short
    assert np.array_equal(rows[whole] >= 0, named[whole] >= 0)
    there = rows >= 0
    assert np.allclose(scores[whole][there[whole]], expected[whole][there[whole]], atol=1e-6)
    # What came too short is the best of what lives all the same.
    assert np.allclose(scores[short][there[short]], expected[short][there[short]], atol=1e-6)
    if most >= COUNT:
        assert not short.any()


def test_none_live_and_one_live() -> None:
    vectors, built = indexes(False)
    search = unselected(built["Flat"], 0)
    nothing = np.zeros(COUNT // 8, np.uint8)
    scores, rows, short = post_filtered(search, vectors[:3], 10, nothing, COUNT)
    assert (rows == -1).all() and np.isneginf(scores).all() and not short.any()
    one = nothing.copy()
    one[4321 >> 3] = 1 << (4321 & 7)
    _, rows, short = post_filtered(search, vectors[4321:4322], 10, one, COUNT)
    assert rows.tolist() == [[4321] + [-1] * 9] and not short.any()
    far = -vectors[4321:4322]
    _, rows, short = post_filtered(search, far, 10, one, COUNT)
    assert short.all() and (rows == -1).all()  # it is the last of 5,000, and 2,048 may be fetched


class _Here(Gpu):
    """The CPU's index as its own copy: FAISS searches it, without a selector, as on a GPU."""

    def __init__(self) -> None:
        self.lock = threading.RLock()

    def free(self) -> float:
        return float("inf")

    def copy_of(self, index: Any) -> Any:
        return index


@pytest.mark.parametrize(("factory", "visits"), [("Flat", 0), ("IVF40,Flat", 7), ("IVF40,SQ8", 7)])
@pytest.mark.parametrize("live_count", [COUNT, 3000, 300, 20, 1, 0])
@pytest.mark.parametrize("k", [1, 10, 2500])
def test_a_copy_without_selectors_answers_as_the_index_does(factory: str, visits: int, live_count: int, k: int) -> None:
    vectors, built = indexes(True)
    cpu = built[factory]
    index = GpuIndex(cpu, 0, _Here(), lambda visits: faiss.SearchParametersIVF(nprobe=visits))
    flags = np.zeros(COUNT, np.uint8)
    flags[np.random.default_rng(1).choice(COUNT, live_count, replace=False)] = 1
    live = np.packbits(flags, bitorder="little")
    queries = clustered(20, 3)
    effort = Effort(visits, 4 if factory.endswith("SQ8") else 0)
    for bits in (live, None):
        given = (queries, k, effort, bits, live_count if bits is not None else None, vectors)
        scores, rows = search_index(index, *given)
        expected, _ = search_index(cpu, *given)
        assert rows.shape == (20, k) and not index.why_not
        assert ((rows >= 0) == (expected > -2)).all()
        assert np.allclose(scores[rows >= 0], expected[rows >= 0], atol=1e-6)


def test_an_index_that_does_not_fit_stays_where_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    class Full(_Here):
        def free(self) -> float:
            return 300 * 2**20

    vectors, built = indexes(False)
    index = GpuIndex(built["Flat"], 100 * 2**20, Full(), lambda _: None)
    for _ in range(2):
        found = search_index(index, vectors[:5], 10, Effort(0), None)
        assert np.array_equal(found[1][:, 0], np.arange(5))
    assert "381 MiB of GPU memory are needed, 300 are free" in index.why_not
    assert capsys.readouterr().err.count("is searched on the CPU") == 1


def test_what_a_gpu_can_search_is_chosen_first_where_there_is_one() -> None:
    policy, half, million = IndexPolicy(), IndexPolicy(vectors="float16"), 1_000_000
    assert candidates(million, 384, policy, None)[0].endswith("fsr")
    for each in (policy, half):
        assert candidates(million, 384, each, None, 80e9)[:2] == ["IVF1000,SQfp16", "IVF1000,SQ8"]
        assert sorted(candidates(million, 384, each, None, 80e9)) == sorted(candidates(million, 384, each, None))
        assert candidates(million, 384, each, None, 1e6) == candidates(million, 384, each, None)  # nothing fits
        assert candidates(million, 384, each, 100e6, 80e9)[0].endswith("fsr")  # the policy's memory holds, too
    small = gpu_bytes(bytes_of("IVF1000,SQ8", million, 384))
    assert candidates(million, 384, policy, None, small)[0] == "IVF1000,SQ8"
    assert candidates(EXACT_ON_GPU, 384, policy, None, 80e9) == ["Flat"]
    assert candidates(EXACT_ON_GPU, 384, half, None, 80e9) == ["SQfp16"]
    assert candidates(EXACT_ON_GPU + 1, 384, policy, None, 80e9)[0].startswith("IVF")
    assert candidates(million, 384, IndexPolicy(index="HNSW32"), None, 80e9) == ["HNSW32"]
    for factory in ("HNSW32,SQfp16", "IVF100,PQ96x4fsr", "OPQ8,IVF40,PQ8", "SQ8", "IVF40,RaBitQ", "IVF40,PQ8x4"):
        assert not suits_gpu(factory)


def test_without_a_gpu_nothing_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    if getattr(faiss, "get_num_gpus", int)():
        monkeypatch.setattr(service.gpu_index, "_allowed", True)
        assert gpu_of(faiss) is not None and gpu_free() is not None
        service.gpu_index.keep_to_cpu()
    assert gpu_of(faiss) is None and gpu_free() is None
    index = indexes(False)[1]["Flat"]
    assert placed(index, "Flat", 1000) is index


# --- on a GPU -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    if not getattr(faiss, "get_num_gpus", int)():
        pytest.skip("FAISS sees no GPU: pip install 'likewise[gpu]'")
    monkeypatch.setattr(service.gpu_index, "_allowed", True)
    found = gpu_of(faiss)
    assert found is not None
    yield found


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("factory", ["Flat", "SQfp16", "IVF40,Flat", "IVF40,SQfp16", "IVF40,SQ8", "IVF40,PQ16"])
def test_a_gpu_finds_what_the_cpu_finds(gpu: Gpu, factory: str, dtype: str) -> None:
    vectors = clustered(COUNT).astype(dtype)
    cpu, info = build_index(vectors, IndexPolicy(index=factory))
    index = placed(cpu, factory, bytes_of(factory, COUNT, DIM))
    assert isinstance(index, GpuIndex)
    queries = clustered(200, 5)
    for share in (1.0, 0.5, 0.1, 0.003):
        flags = np.random.default_rng(3).random(COUNT) < share
        bits, count = np.packbits(flags, bitorder="little"), int(flags.sum())
        best = exact_among(vectors, np.flatnonzero(flags), queries, 10)
        for k in (10, 100, MOST + 1):
            scores, rows = search_index(index, queries, k, info.effort, None if share == 1 else bits, count, vectors)
            assert not index.why_not and flags[rows[rows >= 0]].all()
            assert ((rows >= 0).sum(axis=1) == min(k, count)).all()
            pairs = zip(best[1].tolist(), rows[:, :10].tolist(), strict=True)
            assert np.mean([len(set(a) & set(b)) / len(a) for a, b in pairs]) >= 0.93
            if not info.visits:
                width = best[0].shape[1]
                assert np.allclose(scores[:, :width], best[0], atol=2e-6 if dtype == "float32" else 1e-3)


@pytest.mark.gpu
def test_threads_share_a_gpu(gpu: Gpu) -> None:
    vectors = clustered(COUNT)
    built = [build_index(vectors, IndexPolicy(index=name)) for name in ("Flat", "IVF40,SQfp16")]
    expected = [search_index(cpu, vectors[:64], 10, info.effort, None, vectors=vectors)[0] for cpu, info in built]
    wrong: list[float] = []

    def ask() -> None:
        for _ in range(30):
            for (cpu, info), best in zip(built, expected, strict=True):
                index = placed(cpu, info.factory, 10**6)  # copied, searched and freed beside the others
                scores, _ = search_index(index, vectors[:64], 10, info.effort, None, vectors=vectors)
                wrong.append(float(np.abs(scores - best).max()))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 480 and max(wrong) < 1e-3


@pytest.mark.gpu
def test_the_free_memory_is_known_and_keeps_a_large_index_away(gpu: Gpu) -> None:
    free = gpu.free()
    assert 2**28 < free < 2**40
    vectors = clustered(COUNT)
    cpu, _ = build_index(vectors)
    index = placed(cpu, "Flat", int(free))
    _, rows = search_index(index, vectors[:5], 10, Effort(0), None, vectors=vectors)
    assert np.array_equal(rows[:, 0], np.arange(5)) and "of GPU memory are needed" in index.why_not
