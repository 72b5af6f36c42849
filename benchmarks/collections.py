"""How fast is a collection at writing, opening, following a folder, and searching while it merges segments?

    python -m benchmarks.collections --out FOLDER [--rows 200000] [--files 100000]
    python -m benchmarks.collections --out FOLDER --quick

Vectors: clustered unit rows of 384 dimensions (a thousand centres, noise of the same length). Ceilings, in the same run:
SQLite alone (WAL, synchronous=FULL) committing rows of the same size, and a walk over the folder that reads each file's
size and time. A search is one query of ten neighbours, keys and payload included.
"""

from __future__ import annotations

import argparse
import shutil
import sqlite3
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.record import cpu_name, finish
from export.bundle import Bundle, Embeddings, list_pictures
from likewise import main as likewise
from service.collection import Collection
from service.index import gently
from service.policy import IndexPolicy
from service.records import NewRow
from tests.shapes import write_shapes

DIM = 384
BATCH = 256
CALLERS = 16


def clustered(count: int, seed: int, dim: int = DIM) -> Embeddings:
    """Unit rows [count, dim] around a thousand centres."""
    centres = np.random.default_rng(1).normal(size=(1000, dim)).astype(np.float32)
    rng = np.random.default_rng(seed)
    rows = centres[rng.integers(0, 1000, count)] + rng.normal(size=(count, dim)).astype(np.float32)
    found: Embeddings = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return found


def seconds(call: Callable[[], object]) -> float:
    """Wall time of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def named(first: int, count: int) -> list[NewRow]:
    """Rows with keys and a payload."""
    return [
        NewRow(f"item/{i:08d}", '{"folder": "item"}', f"file:///pictures/{i}.jpg") for i in range(first, first + count)
    ]


def raw_sqlite(path: Path, vectors: Embeddings, batch: int) -> float:
    """Rows a second that SQLite alone commits."""
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=FULL")
    db.execute("CREATE TABLE items (id INTEGER PRIMARY KEY, key TEXT, vector BLOB)")
    start = time.perf_counter()
    for low in range(0, len(vectors), batch):
        db.execute("BEGIN IMMEDIATE")
        part = vectors[low : low + batch]
        rows = [(low + i, f"item/{low + i:08d}", row.tobytes()) for i, row in enumerate(part)]
        db.executemany("INSERT INTO items VALUES (?, ?, ?)", rows)
        db.execute("COMMIT")
    taken = time.perf_counter() - start
    db.close()
    return len(vectors) / taken


def latencies(collection: Collection, queries: Embeddings, stop: Callable[[int], bool]) -> list[float]:
    """Milliseconds of single searches, one after the other, until `stop(number)`."""
    found: list[float] = []
    while not stop(len(found)):
        query = queries[len(found) % len(queries)][None]
        found.append(1000 * seconds(lambda query=query: collection.search(query, 10)))
    return found


def writes(out: Path, rows: int) -> dict[str, float]:
    """Upserts, a segment of many rows, opening, and searches beside a merger."""
    collection = Collection.create(out / "written", "lw1-benchmark", DIM)
    vectors = clustered(max(rows, 100 * BATCH), 0)
    few, many = 80 * BATCH, vectors[:rows]
    found = {}
    taken = seconds(lambda: [collection.upsert(named(i, BATCH), vectors[i : i + BATCH]) for i in range(0, few, BATCH)])
    found["upserts of 256, rows/s"] = few / taken
    found["of SQLite alone"] = found["upserts of 256, rows/s"] / raw_sqlite(out / "raw.sqlite", vectors[:few], BATCH)
    taken = seconds(lambda: [collection.upsert(named(few + i, 1), vectors[few + i][None]) for i in range(400)])
    found["upserts of one, rows/s"] = 400 / taken
    found["flush, seconds"] = seconds(collection.flush)
    with ThreadPoolExecutor(CALLERS) as pool:
        taken = seconds(
            lambda: list(pool.map(lambda i: collection.upsert(named(few + i, 1), vectors[few + i][None]), range(4000)))
        )
    found[f"upserts of one by {CALLERS} callers, rows/s"] = 4000 / taken
    table = pa.table(
        dict(
            zip(
                ("key", "payload", "source_uri"),
                zip(*(row[:3] for row in named(10**6, rows)), strict=True),
                strict=True,
            )
        )
    )
    found["precomputed vectors with an index, seconds"] = seconds(lambda: collection.add_table(table, many))
    exact = Collection.create(out / "exact", "lw1-benchmark", DIM, IndexPolicy(index="exact"))
    found["precomputed vectors without training, rows/s"] = rows / seconds(lambda: exact.add_table(table, many))
    exact.close()
    collection.close()
    start = time.perf_counter()
    collection = Collection(out / "written")
    found["opening, seconds"] = time.perf_counter() - start
    queries = clustered(200, 7)
    idle = latencies(collection, queries, lambda n: n >= 400)
    merger = threading.Thread(target=lambda: gently(lambda: collection.compact(everything=True)))
    start = time.perf_counter()
    merger.start()
    busy = latencies(collection, queries, lambda n: not merger.is_alive() and n >= 20)
    merger.join()
    found["merging all segments, seconds"] = time.perf_counter() - start
    for name, times in (("idle", idle), ("while merging", busy)):
        found[f"search {name}, p50 ms"] = statistics.median(times)
        found[f"search {name}, p99 ms"] = float(np.percentile(times, 99))
    collection.close()
    return found


def following(out: Path, files: int) -> dict[str, float]:
    """`likewise index sync` of unchanged files, as a process of its own, beside a walk over them."""
    shapes, images = out / "shapes", out / "images"
    write_shapes(shapes, 64)
    tiny = ["--encoder", "vit_nano", "--image-size", "32", "--patch-size", "8", "--steps", "0", "--threads", "1"]
    assert likewise(["train", str(shapes), "--out", str(out / "run"), *tiny]) == 0
    assert likewise(["export", str(out / "run"), "--out", str(out / "bundle")]) == 0
    for i in range(files):
        folder = images / f"{i // 1000:04d}"
        if i % 1000 == 0:
            folder.mkdir(parents=True)
        (folder / f"{i:08d}.jpg").write_bytes(b"picture %d" % i)
    pictures = list_pictures(images, [])
    bundle = Bundle.open(out / "bundle")
    collection = Collection.create(out / "followed", bundle.space_id, bundle.dim)
    rows = [NewRow(p.key, "{}", p.path.as_uri(), "client", p.size, p.mtime_ns, "0" * 64) for p in pictures]
    collection.add_segment(rows, clustered(files, 3, bundle.dim))
    collection.close()
    asked = ["--bundle", str(out / "bundle"), "--images", str(images), "--out", str(out / "followed")]
    command = [sys.executable, "-m", "likewise", "index", "sync", *asked]
    times = [seconds(lambda: subprocess.run(command, check=True, capture_output=True)) for _ in range(3)]
    walk = [seconds(lambda: [(p, p.stat().st_size) for p in images.rglob("*")]) for _ in range(3)]
    return {
        "sync of unchanged files, seconds": statistics.median(times),
        "walk alone, seconds": statistics.median(walk),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder for everything; emptied first")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.rows, args.files = 5_000, 2_000
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    found = {**writes(args.out, args.rows), **following(args.out, args.files)}
    print(f"\n{cpu_name()}; {args.rows:,} rows of {DIM}, {args.files:,} files")
    for name, value in found.items():
        print(f"  {name:<42}{value:>14,.2f}")
    slower = found["search while merging, p99 ms"] / found["search idle, p99 ms"]
    goals = [
        ("upserts_of_256_rows_per_second", found["upserts of 256, rows/s"], 20_000.0),
        ("upserts_of_one_rows_per_second", found[f"upserts of one by {CALLERS} callers, rows/s"], 2_000.0),
        ("precomputed_rows_per_second", found["precomputed vectors without training, rows/s"], 50_000.0),
        ("files_per_second_of_an_idle_sync", args.files / found["sync of unchanged files, seconds"], 20_000.0),
        ("idle_over_merging_search_p99", 1 / slower, 0.5),
    ]
    finish("collections", {"table": found, "rows": args.rows, "files": args.files}, goals, 0, args.quick)


if __name__ == "__main__":
    main()
