"""How fast, at equal recall, is the index that `auto` chooses: beside hnswlib, usearch, FAISS HNSW, and FAISS itself?

    pip install hnswlib usearch
    python -m benchmarks.nearest --out FOLDER [--rows 1000000] [--vectors ROWS.npy --queries QUERIES.npy]
    python -m benchmarks.nearest --out FOLDER --quick

Vectors: unit rows of 384 dimensions around 2,000 centres whose spread per axis falls as 1/√j, rotated, so that no list holds
all of a query's neighbours; or a file of real embeddings. Queries are held out. Each system is tuned until recall@10 over
the queries reaches the target; batches of 1,000 run on every core, single queries on one. The last part searches a
collection, keys and payloads included, with filters that pass 1, 10 and 50 % of the rows.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np
import pyarrow as pa

from benchmarks.record import cpu_name, finish
from export.bundle import Embeddings
from service.collection import Collection
from service.filter import Filter
from service.index import Effort, build_index, search_index
from service.policy import IndexPolicy

DIM = 384
THREADS = len(os.sched_getaffinity(0))
EFFORTS = sorted({round(16 * 1.12**step) for step in range(36)})  # 16 to 846, for every graph
Search = Callable[[Embeddings, int, int], Any]  # queries, effort, threads → rows [Q, 10]


class System(NamedTuple):
    """Something that finds neighbours."""

    name: str
    build_seconds: float
    search: Search
    efforts: list[int]


def clustered(count: int, seed: int) -> Embeddings:
    """Unit rows [count, 384]."""
    rng = np.random.default_rng(1)
    spread = (np.arange(1, DIM + 1) ** -0.5).astype(np.float32)
    centres = rng.standard_normal((2000, DIM)).astype(np.float32) * spread
    turn = np.linalg.qr(rng.standard_normal((DIM, DIM)))[0].astype(np.float32)
    rng = np.random.default_rng(seed)
    rows = np.empty((count, DIM), np.float32)
    for low in range(0, count, 50_000):
        part = rows[low : low + 50_000]
        noise = rng.standard_normal(part.shape).astype(np.float32) * spread
        part[:] = (centres[rng.integers(0, 2000, len(part))] + 0.76 * noise) @ turn
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return rows


def ours(vectors: Embeddings, target: float) -> tuple[System, Any]:
    start = time.perf_counter()
    index, info = build_index(vectors, IndexPolicy(min_recall=target))
    taken = time.perf_counter() - start

    def search(queries: Embeddings, effort: int, threads: int) -> Any:
        return search_index(index, queries, 10, Effort(effort, info.rescore), None, vectors=vectors)[1]

    efforts = sorted({max(1, round(info.visits * 1.12**step)) for step in range(-16, 24)})
    return System(f"likewise auto {target:g}: {info.factory}, rescore {info.rescore}", taken, search, efforts), info


def faiss_hnsw(vectors: Embeddings) -> System:
    index = faiss.IndexHNSWFlat(DIM, 32, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = 200
    faiss.omp_set_num_threads(THREADS)
    start = time.perf_counter()
    index.add(vectors)
    taken = time.perf_counter() - start

    def search(queries: Embeddings, effort: int, threads: int) -> Any:
        faiss.omp_set_num_threads(threads)
        return index.search(queries, 10, params=faiss.SearchParametersHNSW(efSearch=effort))[1]

    return System("FAISS HNSW32, efConstruction 200", taken, search, EFFORTS)


def hnswlib_(vectors: Embeddings) -> System:
    import hnswlib

    index = hnswlib.Index("ip", DIM)
    index.init_index(len(vectors), M=32, ef_construction=200)
    start = time.perf_counter()
    index.add_items(vectors, num_threads=THREADS)
    taken = time.perf_counter() - start

    def search(queries: Embeddings, effort: int, threads: int) -> Any:
        index.set_ef(effort)
        return index.knn_query(queries, 10, num_threads=threads)[0].astype(np.int64)

    return System("hnswlib M 32, ef_construction 200", taken, search, EFFORTS)


def usearch_(vectors: Embeddings) -> System:
    from usearch.index import Index

    index = Index(ndim=DIM, metric="ip")
    start = time.perf_counter()
    index.add(np.arange(len(vectors)), vectors, threads=THREADS)
    taken = time.perf_counter() - start

    def search(queries: Embeddings, effort: int, threads: int) -> Any:
        index.expansion_search = effort
        found = index.search(queries, 10, threads=threads).keys
        return np.asarray(found).reshape(len(queries), -1).astype(np.int64)

    return System("usearch, its defaults", taken, search, EFFORTS)


def recall(found: Any, exact: Any) -> float:
    """Mean share of the ten nearest."""
    return float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.tolist(), exact.tolist(), strict=True)]))


def tuned(system: System, queries: Embeddings, exact: Any, target: float) -> tuple[int, float]:
    """The least effort that reaches the target, and what it reaches."""
    for effort in system.efforts:
        reached = recall(system.search(queries, effort, THREADS), exact)
        if reached >= target:
            break
    return effort, reached


def rates(systems: list[tuple[System, int]], queries: Embeddings, rounds: int) -> list[tuple[float, float]]:
    """Queries a second in batches, and the median milliseconds of one: systems in turns, medians over rounds."""
    batch: list[list[float]] = [[] for _ in systems]
    single: list[list[float]] = [[] for _ in systems]
    for _ in range(rounds):
        for i, (system, effort) in enumerate(systems):
            start = time.perf_counter()
            system.search(queries, effort, THREADS)
            batch[i].append(len(queries) / (time.perf_counter() - start))
            times = []
            for query in queries[:200]:
                start = time.perf_counter()
                system.search(query[None], effort, 1)
                times.append(time.perf_counter() - start)
            single[i].append(1000 * statistics.median(times))
    return [(statistics.median(b), statistics.median(s)) for b, s in zip(batch, single, strict=True)]


def race(vectors: Embeddings, queries: Embeddings, exact: Any, peers: list[str], rounds: int) -> dict[str, Any]:
    makers = {"faiss": faiss_hnsw, "hnswlib": hnswlib_, "usearch": usearch_}
    made = []
    for name in peers:
        try:
            made.append(makers[name](vectors))
        except ImportError:
            print(f"{name} is not installed: pip install {name}")
            continue
        print(f"built {made[-1].name}: {made[-1].build_seconds:.1f} s", flush=True)
    figures: dict[str, Any] = {}
    for target in (0.95, 0.99):
        mine, info = ours(vectors, target)
        print(f"built {mine.name}: {mine.build_seconds:.1f} s, {info.why}", flush=True)
        own = recall(mine.search(queries, info.visits, THREADS), exact)
        print(f"  {target:g}  as it tuned itself: effort {info.visits}, recall {own:.3f}", flush=True)
        entered = [
            (mine, *tuned(mine, queries, exact, target)),
            *((peer, *tuned(peer, queries, exact, target)) for peer in made),
        ]
        for (system, effort, reached), (batch, single) in zip(
            entered, rates([(s, e) for s, e, _ in entered], queries, rounds), strict=True
        ):
            print(
                f"  {target:g}  {system.name:<52} effort {effort:>4}  recall {reached:.3f}  {batch:>9,.0f} queries/s  "
                f"p50 {single:.3f} ms  built in {system.build_seconds:.1f} s",
                flush=True,
            )
            figures[f"{target:g} {system.name}"] = {
                "effort": effort, "recall": reached, "queries_per_s": batch, "p50_ms": single,
                "build_s": system.build_seconds, "ours": system is mine, "recall as it tuned itself": own,
            }  # fmt: skip
    return figures


def filtered(out: Path, vectors: Embeddings, queries: Embeddings) -> dict[str, float]:
    """A collection of the vectors: adding, opening, and searches with and without filters beside FAISS alone."""
    shutil.rmtree(out / "collection", ignore_errors=True)
    collection = Collection.create(out / "collection", "benchmark", DIM)
    count = len(vectors)
    lot = np.random.default_rng(5).permutation(count)
    payloads = [json.dumps({"lot": int(i), "shop": f"s{i % 50}"}) for i in lot]
    rows = pa.table(
        {"key": [f"item/{i:08d}.jpg" for i in range(count)], "payload": payloads, "source_uri": [""] * count}
    )
    start = time.perf_counter()
    collection.add_table(rows, vectors)
    found = {"add_table, seconds, training and tuning included": time.perf_counter() - start}
    del rows, payloads
    collection.close()
    start = time.perf_counter()
    collection = Collection(out / "collection")
    found["opening, seconds"] = time.perf_counter() - start
    (part,) = collection.view.parts
    info = part.segment.info
    stored, index = part.segment.vectors, part.segment._index

    def raw(query: Embeddings) -> Any:
        return search_index(index, query, 10, info.effort, None, vectors=stored)

    def p50(call: Callable[[Embeddings], Any]) -> float:
        times = []
        for query in queries[:300]:
            start = time.perf_counter()
            call(query[None])
            times.append(time.perf_counter() - start)
        return 1000 * statistics.median(times)

    pairs = [(p50(raw), p50(lambda q: collection.search(q, 10))) for _ in range(5)]
    found["one query of FAISS alone, p50 ms"] = statistics.median(a for a, _ in pairs)
    found["one query of the collection, p50 ms"] = unfiltered = statistics.median(b for _, b in pairs)
    found["collection over FAISS alone"] = statistics.median(b / a for a, b in pairs)
    for share in (0.01, 0.1, 0.5):
        wanted = Filter.parse(f"lot < {int(share * count)}")
        start = time.perf_counter()
        collection.search(queries[:1], 10, filters=wanted)
        first = 1000 * (time.perf_counter() - start)
        ms = statistics.median(p50(functools.partial(collection.search, k=10, filters=wanted)) for _ in range(3))
        kept = np.flatnonzero(lot < int(share * count))
        exact = kept[np.argsort(-(queries[:300] @ vectors[kept].T), axis=1)[:, :10]]
        hits = collection.search(queries[:300], 10, filters=wanted)
        got = np.array([[int(h.row.key[5:13]) for h in row] for row in hits])
        name = f"filter that passes {share:.0%}"
        found |= {
            f"{name}, first time ms": first, f"{name}, p50 ms": ms, f"{name}, recall@10": recall(got, exact),
            f"{name}, over unfiltered": ms / unfiltered,
        }  # fmt: skip
    collection.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, help="scratch folder")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--vectors", type=Path, help="unit rows, .npy float32 [N, 384]")
    parser.add_argument("--queries", type=Path, help="held-out queries, .npy float32 [Q, 384]")
    parser.add_argument("--peers", default="hnswlib,usearch,faiss", help="which, by comma; none for none")
    parser.add_argument("--name", help="of the file in benchmarks/results")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    rows = 20_001 if args.quick else args.rows
    args.out.mkdir(parents=True, exist_ok=True)
    if args.vectors:
        vectors, queries = np.load(args.vectors)[:rows], np.load(args.queries)[:1000]
        name = "nearest_pictures"
    else:
        vectors, queries = clustered(rows, 0), clustered(1000, 99)
        name = "nearest"
    print(f"{cpu_name()}, {THREADS} threads; {len(vectors):,} × {DIM}, {len(queries)} held-out queries", flush=True)
    _, exact = faiss.knn(queries, vectors, 10, metric=faiss.METRIC_INNER_PRODUCT)
    peers = [] if args.peers == "none" else args.peers.split(",")
    figures = race(vectors, queries, exact, peers, 1 if args.quick else args.rounds)
    goals: list[tuple[str, float, float]] = []
    for target in ("0.95", "0.99"):
        entered = {key: f for key, f in figures.items() if key.startswith(target)}
        mine = next(f for f in entered.values() if f["ours"])
        # A peer that does not reach the target is not in the race.
        rivals = [f for f in entered.values() if not f["ours"] and f["recall"] >= float(target)]
        goals.append(
            (f"recall of auto at {target}, as it tuned itself", mine["recall as it tuned itself"], float(target) - 0.01)
        )
        if rivals:
            best = {name: [r[name] for r in rivals] for name in ("queries_per_s", "p50_ms", "build_s")}
            goals += [
                (
                    f"batch queries/s over the best peer's at {target}",
                    mine["queries_per_s"] / max(best["queries_per_s"]),
                    1,
                ),
                (f"best peer's p50 over ours at {target}", min(best["p50_ms"]) / mine["p50_ms"], 1),
                (f"fastest peer's build over ours at {target}", min(best["build_s"]) / mine["build_s"], 1),
            ]
    searched = filtered(args.out, vectors, queries)
    width = max(map(len, searched))
    for figure, value in searched.items():
        print(f"{figure:<{width}}  {value:.3f}")
    goals += [
        ("FAISS alone over the collection, p50", 1 / searched["collection over FAISS alone"], 1 / 1.3),
        ("2 s over opening", 2 / searched["opening, seconds"], 1),
    ]
    for share in ("1%", "10%", "50%"):
        goals += [
            (f"recall@10 with a filter that passes {share}", searched[f"filter that passes {share}, recall@10"], 0.95),
            (f"2 x unfiltered p50 over that with {share}", 2 / searched[f"filter that passes {share}, over unfiltered"], 1),
        ]  # fmt: skip
    finish(args.name or name, {**figures, **searched, "rows": len(vectors)}, goals, 0, args.quick)


if __name__ == "__main__":
    main()
