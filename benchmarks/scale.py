"""Many rows on one machine: added as precomputed vectors from the command line, then searched, with the memory of both.

python -m benchmarks.scale --out FOLDER [--rows 10000000] [--dim 128]

Rows are clustered: 1,000 × √(rows / 1 M) centres, normal noise as long as a centre is; queries are drawn alike and are no
rows. Takes about 16 GB of disk and half an hour at ten million rows. Run again, it continues with the files that are there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from faiss.contrib.exhaustive_search import knn_ground_truth
from rich.console import Console
from rich.table import Table

from benchmarks.record import finish
from export.bundle import Embeddings, publish
from service.filter import Filter
from service.follower import Follower

PART = 1_000_000
QUERIES = 500


def drawn(count: int, dim: int, total: int, seed: int) -> Embeddings:
    """Unit rows [count, dim] around the centres of a collection of `total` rows."""
    centres = np.random.default_rng(0).normal(size=(max(10, int(total**0.5)), dim)).astype(np.float32)
    rng = np.random.default_rng(seed)
    rows = centres[rng.integers(0, len(centres), count)]
    rows += rng.standard_normal((count, dim), np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    found: Embeddings = rows
    return found


def prepare(folder: Path, rows: int, dim: int) -> None:
    """vectors/NN.npy in float16 and rows/NN.parquet, which `likewise index add` takes."""
    for name in ("vectors", "rows"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number, low in enumerate(range(0, rows, PART)):
        vectors, table = folder / "vectors" / f"{number}.npy", folder / "rows" / f"{number}.parquet"
        count = min(PART, rows - low)
        if not vectors.is_file():
            temporary = vectors.with_suffix(".tmp")
            with temporary.open("wb") as file:
                np.save(file, drawn(count, dim, rows, number + 1).astype(np.float16))
            publish(temporary, vectors)
        if not table.is_file():
            keys = pa.array([f"pictures/{i:09d}.jpg" for i in range(low, low + count)])
            shelf = pa.array(np.arange(low, low + count) % 100)
            temporary = table.with_suffix(".tmp")
            pq.write_table(pa.table({"key": keys, "shelf": shelf}), temporary)
            publish(temporary, table)


def watched(command: list[str]) -> dict[str, float]:
    """Run a command: its seconds, and the most memory it had, in GiB, with and without pages of files."""
    start = time.perf_counter()
    most = {"VmHWM": 0, "RssAnon": 0}
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            try:
                for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                    name = line.partition(":")[0]
                    if name in most:
                        most[name] = max(most[name], int(line.split()[1]))
            except FileNotFoundError:
                break
            time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    gib = {name: kib / 2**20 for name, kib in most.items()}
    return {"seconds": time.perf_counter() - start, "peak": gib["VmHWM"], "peak_own": gib["RssAnon"]}


def searched(folder: Path, queries: Embeddings) -> dict[str, Any]:
    """Opening, single queries, a batch, filters: in this process, which does nothing else."""
    start = time.perf_counter()
    collection = Follower(folder, every=None)
    found: dict[str, Any] = {"opening": time.perf_counter() - start, "items": len(collection)}
    found["segments"] = [f"{s.rows:,} {s.info.factory} {s.info.visits} {s.info.rescore}" for s in collection.segments()]
    collection.search(queries, 10)
    for name, wanted in (
        ("all", None),
        ("1 %", Filter.parse("shelf = 7")),
        ("10 %", Filter.parse("shelf < 10")),
        ("50 %", Filter.parse("shelf < 50")),
    ):
        hits, times = [], []
        for query in queries:
            begun = time.perf_counter()
            hits.append(collection.search(query[None], 10, filters=wanted)[0])
            times.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        collection.search(queries, 10, filters=wanted)
        found[name] = {
            "p50": 1e3 * float(np.median(times)),
            "p99": 1e3 * float(np.percentile(times[10:], 99)),
            "batch": len(queries) / (time.perf_counter() - begun),
            "keys": [[int(hit.row.key[9:18]) for hit in row] for row in hits],
        }
    collection.close()
    return found


def truth(folder: Path, queries: Embeddings, keep: Any) -> list[list[int]]:
    """The ten nearest rows by exact search, of those whose number `keep` passes."""
    numbers: list[np.ndarray] = []

    def blocks() -> Any:
        low = 0
        for number in range(len(list((folder / "vectors").glob("*.npy")))):
            part = np.load(folder / "vectors" / f"{number}.npy", mmap_mode="r")
            for at in range(0, len(part), 65_536):
                block = np.asarray(part[at : at + 65_536], np.float32)
                names = np.arange(low + at, low + at + len(block))
                chosen = keep(names)
                numbers.append(names[chosen])
                yield block[chosen] / np.linalg.norm(block[chosen], axis=1, keepdims=True)
            low += len(part)

    _, rows = knn_ground_truth(queries, blocks(), 10, metric_type=0)
    found: list[list[int]] = np.concatenate(numbers)[rows].tolist()
    return found


def overlap(found: list[list[int]], right: list[list[int]]) -> float:
    """Recall@10."""
    return float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, right, strict=True)]))


def measure(folder: Path, rows: int, dim: int) -> dict[str, Any]:
    """Everything, by name."""
    prepare(folder, rows, dim)
    collection = folder / "collection"
    figures: dict[str, Any] = {}
    if not (folder / "added.json").is_file():
        command = [sys.executable, "-m", "likewise", "index", "add", str(collection), "--space-id", "lw1-scale"]
        added = watched([*command, "--vectors", str(folder / "vectors"), "--rows", str(folder / "rows")])
        (folder / "added.json").write_text(json.dumps(added))
    figures["adding"] = json.loads((folder / "added.json").read_text())
    queries = drawn(QUERIES, dim, rows, 10**6)
    with tempfile.TemporaryDirectory() as scratch:
        np.save(Path(scratch) / "queries.npy", queries)
        answer = Path(scratch) / "found.json"
        code = (
            "import json, sys, numpy as np; from pathlib import Path; from benchmarks.scale import searched; "
            "Path(sys.argv[3]).write_text(json.dumps(searched(Path(sys.argv[1]), np.load(sys.argv[2]))))"
        )
        arguments = [str(collection), str(Path(scratch) / "queries.npy"), str(answer)]
        figures["searching"] = watched([sys.executable, "-c", code, *arguments])
        found = json.loads(answer.read_text())
    for name, keep in (
        ("all", lambda n: n >= 0),
        ("1 %", lambda n: n % 100 == 7),
        ("10 %", lambda n: n % 100 < 10),
        ("50 %", lambda n: n % 100 < 50),
    ):
        found[name]["recall"] = overlap(found[name].pop("keys"), truth(folder, queries, keep))
    size = {p.name: p.stat().st_size / 2**30 for p in sorted(collection.glob("*.sqlite"))}
    for path in collection.glob("segments/*/*"):
        size[path.name] = size.get(path.name, 0.0) + path.stat().st_size / 2**30
    return {**figures, **found, "disk": size}


def main() -> None:
    """Print a table and the goals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--quick", action="store_true", help="100,000 rows in a temporary folder")
    args = parser.parse_args()
    if args.quick:
        with tempfile.TemporaryDirectory() as scratch:
            figures = measure(Path(scratch), 100_000, args.dim)
    elif args.out is None:
        parser.error("--out is needed: a folder on a disk with room")
    else:
        figures = measure(args.out, args.rows, args.dim)
    table = Table(title=f"{figures['items']:,} rows of {args.dim} dimensions")
    for column in ("", "recall@10", "p50 ms", "p99 ms", "queries/s in a batch"):
        table.add_column(column, justify="right")
    for name in ("all", "1 %", "10 %", "50 %"):
        each = figures[name]
        table.add_row(
            name, f"{each['recall']:.3f}", f"{each['p50']:.2f}", f"{each['p99']:.2f}", f"{each['batch']:,.0f}"
        )
    Console(width=120).print(table)
    print("\n".join(figures["segments"]))
    for name in ("adding", "searching"):
        each = figures[name]
        print(f"{name}: {each['seconds']:,.0f} s, peak {each['peak']:.2f} GiB, own {each['peak_own']:.2f} GiB")
    print(f"opened in {figures['opening']:.2f} s; on the disk, GiB:", figures["disk"])
    goals = [
        ("recall_at_10", figures["all"]["recall"], 0.95),
        ("recall_at_10_of_1_percent", figures["1 %"]["recall"], 0.95),
        ("recall_at_10_of_10_percent", figures["10 %"]["recall"], 0.95),
        ("recall_at_10_of_50_percent", figures["50 %"]["recall"], 0.95),
        ("gib_left_of_24_while_adding", 24 - figures["adding"]["peak"], 0.0),
        ("gib_left_of_24_while_searching", 24 - figures["searching"]["peak"], 0.0),
    ]
    finish("scale", figures, goals, 0, args.quick)


if __name__ == "__main__":
    main()
