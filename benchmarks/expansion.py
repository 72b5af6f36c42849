"""What is alpha query expansion worth on one's own collection? mAP and Recall@1 with labels, with and without it.

    python -m benchmarks.expansion --collection FOLDER --label FIELD [--queries 1000] [--name NAME]

Every query is an item, left out of its own answers; it is moved towards its n nearest neighbours, weighted by similarity to
the power of alpha (Radenović et al. 2018), and ranked exactly against all others. Relevant is what has the same label. Gains
are paired, with their standard error beside them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from benchmarks.record import cpu_name, finish
from export.bundle import Embeddings
from service.collection import Collection

SETTINGS = [(1, 0.0), (3, 0.0), (3, 3.0), (5, 3.0), (10, 3.0), (10, 6.0), (30, 3.0), (30, 6.0)]


def scores(
    queries: Embeddings, own: np.ndarray, vectors: Embeddings, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Average precision and precision at 1 of each query, whose own row is left out."""
    precision, first = np.empty(len(queries)), np.empty(len(queries))
    for i, query in enumerate(queries):
        similarity = vectors @ query
        similarity[own[i]] = -np.inf
        order = np.argsort(-similarity, kind="stable")[: len(vectors) - 1]
        relevant = labels[order] == labels[own[i]]
        ranks = np.flatnonzero(relevant) + 1
        precision[i] = (np.arange(1, len(ranks) + 1) / ranks).mean()
        first[i] = relevant[0]
    return precision, first


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--collection", type=Path, required=True)
    parser.add_argument("--label", required=True, help="payload field")
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="expansion", help="of the file in benchmarks/results")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    collection = Collection(args.collection)
    rows, parts = [], []
    for table, block in collection.scan():
        rows += [
            (key, json.loads(payload))
            for key, payload in zip(*(table[n].to_pylist() for n in ("key", "payload")), strict=True)
        ]
        parts.append(block)
    vectors = np.concatenate(parts)
    names, labels = np.unique([str(payload[args.label]) for _, payload in rows], return_inverse=True)
    counted = np.flatnonzero(np.bincount(labels)[labels] > 1)
    own = np.sort(
        np.random.default_rng(args.seed).choice(
            counted, min(100 if args.quick else args.queries, len(counted)), replace=False
        )
    )
    queries = vectors[own]
    left_out = [frozenset({rows[i][0]}) for i in own.tolist()]
    plain, plain_first = scores(queries, own, vectors, labels)
    print(f"{cpu_name()}; {len(vectors):,} items, {len(names)} labels, {len(own):,} queries")
    print(f"{'n':>4}{'alpha':>7}{'mAP %':>10}{'gain':>9}{'±':>7}{'R@1 %':>9}{'gain':>9}{'±':>7}")
    print(f"{0:>4}{'':>7}{100 * plain.mean():>10.2f}{'':>16}{100 * plain_first.mean():>9.2f}")
    figures: dict[str, float] = {
        "mAP": 100 * plain.mean(),
        "R@1": 100 * plain_first.mean(),
        "items": len(vectors),
        "queries": len(own),
    }
    best = 0.0
    for n, alpha in SETTINGS:
        moved = collection.expand(queries, n, alpha, leave_out=left_out)
        precision, first = scores(moved, own, vectors, labels)
        line = []
        for name, after, before in (("mAP", precision, plain), ("R@1", first, plain_first)):
            gain = 100 * (after - before)
            error = gain.std() / len(gain) ** 0.5
            figures |= {
                f"{name} n {n} alpha {alpha:g}": 100 * after.mean(),
                f"{name} gain n {n} alpha {alpha:g}": gain.mean(),
            }
            line.append(f"{100 * after.mean():>{10 if name == 'mAP' else 9}.2f}{gain.mean():>+9.2f}{error:>7.2f}")
        best = max(best, float(figures[f"mAP gain n {n} alpha {alpha:g}"]))
        print(f"{n:>4}{alpha:>7g}{''.join(line)}", flush=True)
    collection.close()
    finish(
        args.name,
        {name: float(value) for name, value in figures.items()},
        [("best gain in mAP, points", best, 0.0)],
        args.seed,
        args.quick,
    )


if __name__ == "__main__":
    main()
