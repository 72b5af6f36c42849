"""The indexes: what every factory that may be chosen keeps to."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from export.bundle import RefusalError
from service.index import (
    EXACT_AMONG,
    IndexInfo,
    are_few,
    build_index,
    bytes_of,
    candidates,
    exact_among,
    lists_for,
    lists_of,
    read_index,
    search_index,
    search_rows,
    write_index,
)
from service.policy import IndexPolicy

COUNT, DIM = 2000, 32
FACTORIES = [
    "Flat", "SQfp16", "IVF40,Flat", "IVF40,SQfp16", "IVF40,SQ8", "IVF40,PQ8x4fsr", "IVF40,RaBitQ",
    "IVF40,RaBitQfs", "HNSW16", "HNSW16,SQ8",
]  # fmt: skip


def clustered(count: int, seed: int = 0) -> np.ndarray:
    """Unit vectors [count, 32] around 100 centres."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(7).standard_normal((100, DIM))
    rows = centres[rng.integers(0, 100, count)] + 0.5 * rng.standard_normal((count, DIM))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("factory", [*FACTORIES, pytest.param("OPQ8,IVF40,PQ8x4fs", marks=pytest.mark.slow)])
def test_every_factory_finds_keeps_to_its_recall_and_never_returns_what_is_masked(
    factory: str, dtype: type, tmp_path: Path
) -> None:
    vectors = clustered(COUNT).astype(dtype)
    built, info = build_index(vectors, IndexPolicy(index=factory, min_recall=0.95))
    write_index(built, tmp_path / "i")
    index = read_index(tmp_path / "i", COUNT, DIM)
    assert info.recall_at_10 >= 0.95, info
    queries = clustered(50, 5)
    exact = np.argsort(-(queries @ vectors.astype(np.float32).T), axis=1)
    scores, found = search_index(index, queries, 10, info.effort, None, vectors=vectors)
    hits = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact[:, :10].tolist(), found.tolist(), strict=True)])
    assert hits >= 0.85 and (np.diff(scores, axis=1) <= 0).all()
    _, first = search_index(index, queries, 1, info.effort, None, vectors=vectors)
    assert np.mean(first[:, 0] == exact[:, 0]) >= 0.9

    for share in (0.9, 0.5, 0.1, 0.003):
        flags = np.random.default_rng(3).random(COUNT) < share
        bits, allowed = np.packbits(flags, bitorder="little"), np.flatnonzero(flags)
        for among in (vectors, None):  # without the stored vectors few rows are searched through the index, too
            if among is None and info.rescore:
                continue
            _, rows = search_index(index, queries, 10, info.effort, bits, len(allowed), among)
            assert rows.shape == (50, 10) and flags[rows[rows >= 0]].all()
            assert ((rows >= 0).sum(axis=1) == min(10, len(allowed))).all()
        best = exact_among(vectors, allowed, queries, 10)[1]
        _, rows = search_index(index, queries, 10, info.effort, bits, len(allowed), vectors)
        pairs = zip(best.tolist(), rows.tolist(), strict=True)
        assert np.mean([len(set(a) & set(b)) / len(a) for a, b in pairs]) >= 0.99


@pytest.mark.parametrize("live", [COUNT, 300, 12, 3, 0])
@pytest.mark.parametrize("k", [1, 10, 500, 1000])
@pytest.mark.parametrize("factory", ["IVF40,SQfp16", "IVF40,PQ8x4fsr", "HNSW16"])
def test_as_many_rows_come_as_there_are(factory: str, live: int, k: int) -> None:
    vectors = clustered(COUNT)
    index, info = build_index(vectors, IndexPolicy(index=factory))
    flags = np.zeros(COUNT, np.uint8)
    flags[np.random.default_rng(0).choice(COUNT, live, replace=False)] = 1
    bitmap = np.packbits(flags, bitorder="little")
    scores, found = search_index(index, clustered(5, 9), k, info.effort, bitmap, live)
    assert scores.shape == found.shape == (5, k)
    assert ((found >= 0).sum(axis=1) == min(k, live)).all()
    assert flags[found[found >= 0]].all()


def test_the_choice_follows_the_constraints() -> None:
    auto = IndexPolicy()
    million = 1_000_000
    assert candidates(1000, 384, auto, None) == ["Flat"]
    assert candidates(1000, 384, IndexPolicy(vectors="float16"), None) == ["SQfp16"]
    assert candidates(million, 384, IndexPolicy(index="exact"), None) == ["Flat"]
    assert candidates(million, 384, IndexPolicy(index="HNSW32"), 10.0) == ["HNSW32"]
    for policy in (auto, IndexPolicy(vectors="float16")):
        ladder = candidates(million, 384, policy, None)
        sizes = {factory: bytes_of(factory, million, 384) for factory in ladder}
        assert len(ladder) >= 3
        for allowed in (*sizes.values(), *(size - 1 for size in sizes.values())):
            fitting = [factory for factory in ladder if sizes[factory] <= allowed]
            assert candidates(million, 384, policy, allowed) == (fitting or [min(sizes, key=sizes.__getitem__)])
    assert candidates(1000, 384, auto, 10_000)[0].startswith("IVF")  # exact search would not fit
    assert (lists_for(1), lists_for(200_000), lists_for(million), lists_for(4 * million)) == (1, 894, 1000, 2000)


@pytest.mark.parametrize(
    "factory", ["Flat", "SQfp16", "IVF20,Flat", "IVF20,SQfp16", "IVF20,SQ8", "IVF20,PQ8x4fsr", "HNSW16"]
)
def test_sizes_are_known_beforehand(factory: str, tmp_path: Path) -> None:
    index, _ = build_index(clustered(20_000), IndexPolicy(index=factory))
    write_index(index, tmp_path / "i")
    assert 0.8 < bytes_of(factory, 20_000, DIM) / (tmp_path / "i").stat().st_size < 1.25


def test_the_curve_and_the_reason_are_kept() -> None:
    vectors = clustered(5000)
    _, info = build_index(vectors, IndexPolicy(index="IVF64,SQ8", min_recall=0.9))
    chosen = [p for p in info.curve if (p.visits, p.rescore) == (info.visits, info.rescore)]
    assert len(info.curve) >= 3 and [p.recall_at_10 for p in chosen] == [info.recall_at_10]
    assert info.recall_at_10 >= 0.9 and "recall@10 ≥ 0.9" in info.why and "MiB" in info.why
    _, strict = build_index(vectors, IndexPolicy(index="IVF64,SQ8", max_latency_ms=1e-6))
    assert "1e-06 ms not reached" in strict.why
    _, exact = build_index(vectors)
    assert (exact.factory, exact.visits, exact.recall_at_10) == ("Flat", 0, 1.0)


@pytest.mark.parametrize("factory", ["nonsense", "PCA8,Flat,x", "LSH", "NSG16"])
def test_factories_that_cannot_be_used_are_refused(factory: str) -> None:
    with pytest.raises(RefusalError, match=r"factory string|cannot be searched with filters"):
        build_index(clustered(200), IndexPolicy(index=factory))


def test_more_neighbours_are_found_as_surely_as_ten() -> None:
    rng = np.random.default_rng(4)
    centres = rng.standard_normal((150, DIM))
    rows = centres[rng.integers(0, 150, 6000)] + 0.3 * rng.standard_normal((6000, DIM))
    vectors = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    for factory in ("IVF140,SQfp16", "IVF140,PQ8x4fsr", "HNSW16"):
        index, info = build_index(vectors, IndexPolicy(index=factory))
        queries = vectors[::200]
        exact = np.argsort(-(queries @ vectors.T), axis=1)
        for k in (10, 100, 300, 1000):
            _, found = search_index(index, queries, k, info.effort, None, vectors=vectors)
            pairs = zip(exact[:, :k].tolist(), found.tolist(), strict=True)
            assert np.mean([len(set(a) & set(b)) / k for a, b in pairs]) >= 0.9, (factory, k)


@pytest.mark.parametrize("factory", ["HNSW16,SQfp16", "IVF64,SQfp16", "IVF64,PQ8x4fsr"])
def test_equal_vectors_are_all_found_and_hide_nothing(factory: str) -> None:
    vectors = clustered(3000)
    vectors[500:] = vectors[0]
    index, info = build_index(vectors, IndexPolicy(index=factory))
    _, found = search_index(index, vectors[:1], 3000, info.effort, None, vectors=vectors)
    assert sorted(found[0].tolist()) == list(range(3000))
    assert info.recall_at_10 > 0.9  # of equal rows any is right


@pytest.mark.parametrize("count", [1, 2, 15, 100, 300])
@pytest.mark.parametrize(
    "policy", [IndexPolicy(max_memory=100), IndexPolicy(index="IVF1024,SQ8"), IndexPolicy(index="IVF4,PQ8x4")]
)
def test_small_segments_are_searched_whatever_was_asked(count: int, policy: IndexPolicy) -> None:
    vectors = clustered(count)
    index, info = build_index(vectors, policy, 100.0 if policy.max_memory else None)
    _, found = search_index(index, vectors, 1, info.effort, None, vectors=vectors)
    assert (found[:, 0] == np.arange(count)).mean() > 0.9


@functools.cache
def large() -> tuple[np.ndarray, Any, IndexInfo]:
    """200,000 rows of which a few, yet more than are always compared one by one, may be searched."""
    vectors = clustered(200_000, 2)
    return vectors, *build_index(vectors, IndexPolicy(index="IVF400,PQ8x4fsr"))


def test_every_row_is_in_the_list_that_is_nearest_to_it() -> None:
    vectors, index, _ = large()
    lists = lists_of(index)
    nearest = index.quantizer.search(vectors, 1)[1][:, 0]
    assert np.array_equal(lists, nearest)
    assert len(lists_of(build_index(vectors[:2000], IndexPolicy(index="HNSW16"))[0])) == 0


@pytest.mark.parametrize("count", [1, EXACT_AMONG, EXACT_AMONG + 1, 8000])
@pytest.mark.parametrize("asked", [1, 3, 40])
@pytest.mark.parametrize("k", [1, 10, 300])
def test_of_few_rows_those_in_the_nearest_lists_are_compared(count: int, asked: int, k: int) -> None:
    vectors, index, info = large()
    assert are_few(index, count) and not are_few(index, 20_000)
    rows = np.sort(np.random.default_rng(4).choice(len(vectors), count, replace=False))
    queries = clustered(asked, 8)
    scores, found = search_rows(
        index,
        queries,
        k,
        info.effort,
        rows,
        vectors,
        lambda: lists_of(index),
    )
    best, exact = exact_among(vectors, rows, queries, k)
    assert scores.shape == found.shape == (asked, min(k, count))
    assert np.isin(found, rows).all() and (np.diff(scores, axis=1) <= 0).all()
    assert np.allclose(scores, np.einsum("qkd,qd->qk", vectors[found], queries), atol=1e-5)
    if count <= EXACT_AMONG:
        assert np.allclose(scores, best, atol=1e-6)
    pairs = zip(exact.tolist(), found.tolist(), strict=True)
    assert np.mean([len(set(a) & set(b)) / len(a) for a, b in pairs]) >= 0.95


def test_few_rows_that_lie_far_from_a_query_are_all_found() -> None:
    vectors, index, info = large()
    query = clustered(1, 8)
    rows = np.sort(np.argsort(vectors @ query[0])[:6000])
    _, found = search_rows(index, query, 6000, info.effort, rows, vectors, lambda: lists_of(index))
    assert sorted(found[0].tolist()) == rows.tolist()
    _, found = search_rows(index, query, 10, info.effort, rows, vectors, lambda: lists_of(index))
    assert len(set(found[0].tolist())) == 10


@pytest.mark.parametrize("share", [0.05, 0.1, 0.3, 0.7])
def test_filters_lose_no_recall(share: float) -> None:
    vectors, index, info = large()
    queries = clustered(200, 8)

    def recall(bits: np.ndarray | None, rows: np.ndarray) -> float:
        best = exact_among(vectors, rows, queries, 10)[1]
        found = search_index(index, queries, 10, info.effort, bits, len(rows), vectors)[1]
        return float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(best.tolist(), found.tolist(), strict=True)]))

    flags = np.random.default_rng(6).random(len(vectors)) < share
    whole = recall(None, np.arange(len(vectors)))
    assert recall(np.packbits(flags, bitorder="little"), np.flatnonzero(flags)) >= min(whole, 0.97) - 0.01


@pytest.mark.parametrize("count", [10, 3000])  # 10: lost only when the file is closed
@pytest.mark.parametrize("factory", ["Flat", "HNSW16"])
def test_an_index_on_a_full_disk_is_an_error_of_the_disk(count: int, factory: str, tmp_path: Path) -> None:
    path = tmp_path / "index.faiss"
    path.symlink_to("/dev/full")
    index, _ = build_index(clustered(count), IndexPolicy(index=factory))
    with pytest.raises(OSError, match=r"No space left on device: .*index\.faiss"):
        write_index(index, path)
    with pytest.raises(FileNotFoundError):
        write_index(index, tmp_path / "no" / "index.faiss")


def test_a_disk_that_is_full_when_the_index_is_written_is_one_sentence(tmp_path: Path) -> None:
    count = 3000
    np.save(tmp_path / "vectors.npy", clustered(count))
    pq.write_table(pa.table({"key": [f"{i:06d}" for i in range(count)]}), tmp_path / "rows.parquet")
    # The vectors are 384 KB, the graph is 1.2 MB.
    limited = (
        "import resource, sys; from likewise import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (900_000, 900_000)); sys.exit(main(sys.argv[1:]))"
    )
    command = [
        sys.executable, "-c", limited, "index", "add", str(tmp_path / "c"), "--vectors", str(tmp_path / "vectors.npy"),
        "--rows", str(tmp_path / "rows.parquet"), "--space-id", "x", "--index", "HNSW64",
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 1, run.stderr
    said = [line for line in run.stderr.splitlines() if line.startswith("likewise:")]
    assert len(said) == 1 and "index.faiss: File too large" in said[0] and "Traceback" not in run.stderr
    assert not list((tmp_path / "c" / "segments").iterdir())
