"""What a collection's vectors and index are worth without labels: recall against exact search, hubs, duplicates, scores.

Everything here is of a sample of items, each a query; vectors are read in blocks, so memory grows with the sample.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from export.bundle import Contract, Embeddings
from service.collection import Collection
from service.index import BLOCK, Rows
from service.live import Live

NEIGHBOURS = 10
# Scores of the same two vectors differ by less between two orders of summation; float32, as what it is taken from.
TIE = np.float32(1e-6)
HUBS = 8
_CHUNK = 256  # queries compared with a block at a time
_PAIRS = 20_000

Advance = Callable[[float], None]
Task = Callable[[str, int], Advance]
"""Announces work by its name and amount, and says how what is done is told."""


class Estimate(Contract):
    """A mean over queries."""

    mean: float
    """Of the sample."""
    error: float
    """Its standard error: s / √n; of shares that is the binomial one."""
    queries: int
    """How many."""

    @classmethod
    def of(cls, values: Sequence[float] | npt.NDArray[Any]) -> Estimate:
        """Of one value per query, at least one."""
        x = np.asarray(values, np.float64)
        error = float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else 0.0
        return cls(mean=float(x.mean()), error=error, queries=len(x))


class At(Contract):
    """A figure at a rank."""

    k: int
    """The rank."""
    value: Estimate
    """What it is there."""


class IndexRecall(Contract):
    """The index against exact search."""

    k: int
    """Neighbours asked for."""
    recall: Estimate
    """The share of the k answers that score no lower than the k-th of the exact answer."""
    p50_ms: float
    """Median milliseconds of one query alone, rows read and all."""
    p95_ms: float
    """Their 95 % quantile."""


class Occurrences(Contract):
    """How often items are among the ten nearest of others: N_10 (Radovanović et al. 2010)."""

    items: int
    """That may occur."""
    lists: int
    """Of ten neighbours."""
    skewness: float
    """Of N_10, third standardised moment: large where few items are neighbours of many."""
    chance_skewness: float
    """What lists drawn at random would have."""
    anti_hubs: float
    """Share of the items that occur in no list."""
    chance_anti_hubs: float
    """What lists drawn at random would have."""
    most: int
    """Largest N_10."""


class Hub(Contract):
    """An item that is a neighbour of many."""

    key: str
    """The item."""
    occurrences: int
    """In how many of the sample's lists."""


class Hubness(Contract):
    """Hubs, by exact search."""

    within: Occurrences
    """Of the sample among itself: each of its items is asked, and may be found, as the definition has it."""
    collection: Occurrences
    """Of all items, in the sample's lists; with few lists per item chance alone is skewed."""
    hubs: tuple[Hub, ...]
    """The most frequent, in the sample's lists."""
    counts: tuple[int, ...]
    """[n] how many items of the sample have N_10 = n among itself; the last also has those beyond."""


class Duplicates(Contract):
    """Items with a near twin."""

    score: float
    """From which on."""
    share: Estimate
    """Of the sample."""


class Scores(Contract):
    """Histograms over equal bins of −1 … 1."""

    nearest: tuple[int, ...]
    """Score of each sampled item's nearest other."""
    random: tuple[int, ...]
    """Scores of random pairs of the sample."""
    nearest_median: float
    """Of the former."""
    random_median: float
    """Of the latter."""


def drawn(rng: np.random.Generator, flags: npt.NDArray[np.bool_], count: int) -> Rows:
    """Up to `count` of the flagged rows, ascending."""
    there = np.flatnonzero(flags)
    return np.sort(rng.choice(there, min(count, len(there)), replace=False))


def compared(
    blocks: Iterable[tuple[Rows, Embeddings]], queries: Embeddings, own: Rows, advance: Advance = lambda _: None
) -> Iterator[tuple[Rows, slice, Embeddings]]:
    """Block by block, some of the unit queries [Q, D] at a time: numbers of rows [B], which queries, and similarities
    [q, B], −∞ at each query's `own` [Q] row."""
    for rows, vectors in blocks:
        for low in range(0, len(queries), _CHUNK):
            part = slice(low, low + _CHUNK)
            scores: Embeddings = queries[part] @ vectors.T
            at = np.minimum(np.searchsorted(rows, own[part]), len(rows) - 1)
            mine = np.flatnonzero(rows[at] == own[part])
            scores[mine, at[mine]] = -np.inf
            yield rows, part, scores
        advance(len(rows))


def nearest(
    blocks: Iterable[tuple[Rows, Embeddings]], queries: Embeddings, own: Rows, k: int, advance: Advance = lambda _: None
) -> tuple[Embeddings, Rows]:
    """Scores and numbers [Q, k] of the rows most similar to unit queries [Q, D], best first, each query's `own` [Q] left
    out. Exact; −∞ and −1 where there are fewer."""
    scores = np.full((len(queries), k), -np.inf, np.float32)
    found = np.full((len(queries), k), -1, np.int64)
    for rows, part, new in compared(blocks, queries, own, advance):
        both = np.concatenate([scores[part], new], axis=1)
        chosen = np.argpartition(-both, k - 1, axis=1)[:, :k]
        numbers = np.take_along_axis(found[part], np.minimum(chosen, k - 1), 1)
        found[part] = np.where(chosen < k, numbers, rows[np.maximum(chosen - k, 0)])
        scores[part] = np.take_along_axis(both, chosen, 1)
    found[scores == -np.inf] = -1
    order = np.lexsort((found, -scores), axis=1)
    return np.take_along_axis(scores, order, 1), np.take_along_axis(found, order, 1)


def recall(
    collection: Collection,
    live: Live,
    sampled: Rows,
    queries: Embeddings,
    exact: Embeddings,
    k: int,
    task: Task,
) -> IndexRecall:
    """Every query alone, as it is served. Equal scores are equal answers: which of two twins is found says nothing."""
    shares, times = [], []
    advance = task(f"searching, k = {k}", len(sampled))
    for number, query, best in zip(sampled.tolist(), queries, exact, strict=True):
        key = live.row(number).key
        start = time.perf_counter()
        (hits,) = collection.search(query, k, leave_out=[frozenset([key])])
        times.append(time.perf_counter() - start)
        rows = live.locate([hit.row.id for hit in hits])
        again = live.vectors(rows[rows >= 0]) @ query  # an index that compresses gives other scores
        shares.append(float((again >= best[k - 1] - TIE).sum()) / k)
        advance(1)
    p50, p95 = np.quantile(times, (0.5, 0.95)) * 1e3
    return IndexRecall(k=k, recall=Estimate.of(shares), p50_ms=round(float(p50), 3), p95_ms=round(float(p95), 3))


def hubness(live: Live, queries: Embeddings, sampled: Rows, lists: Rows, items: int) -> Hubness:
    """From the sample's ten nearest [S, 10] among all items, and anew among the sample."""
    own = np.arange(len(queries))
    blocks = ((own[low : low + BLOCK], queries[low : low + BLOCK]) for low in range(0, len(queries), BLOCK))
    _, inner = nearest(blocks, queries, own, NEIGHBOURS)
    within = np.bincount(inner.ravel(), minlength=len(queries))
    found, counts = np.unique(lists[lists >= 0], return_counts=True)
    order = np.lexsort((found, -counts))[:HUBS]
    hubs = [Hub(key=live.row(int(found[i])).key, occurrences=int(counts[i])) for i in order]
    return Hubness(
        within=_occurrences(within, len(queries), len(queries)),
        collection=_occurrences(counts, items, len(sampled)),
        hubs=tuple(hubs),
        counts=tuple(np.bincount(np.minimum(within, 60)).tolist()),
    )


def _occurrences(counts: npt.NDArray[Any], items: int, lists: int) -> Occurrences:
    """Of `items` of which those with counts [C] may be all that occur: the others' are 0."""
    x = counts.astype(np.float64)
    mean, zeros = x.sum() / items, items - len(x)
    second = (((x - mean) ** 2).sum() + zeros * mean**2) / items
    third = (((x - mean) ** 3).sum() - zeros * mean**3) / items
    # By chance an item is in each list but its own with the same probability: binomial.
    p, trials = NEIGHBOURS / (items - 1), lists - lists / items
    spread = math.sqrt(trials * p * (1 - p))
    return Occurrences(
        items=items, lists=lists, skewness=float(third / second**1.5) if second > 0 else 0.0,
        chance_skewness=(1 - 2 * p) / spread, anti_hubs=float(zeros + (x == 0).sum()) / items,
        chance_anti_hubs=(1 - p) ** trials, most=int(x.max(initial=0)),
    )  # fmt: skip


def duplicates(top: npt.NDArray[np.float64], levels: Iterable[float]) -> tuple[Duplicates, ...]:
    """From the scores of the sample's nearest others [S]."""
    return tuple(Duplicates(score=level, share=Estimate.of(top >= level - TIE)) for level in levels)


def scores_of(top: npt.NDArray[np.float64], queries: Embeddings, rng: np.random.Generator) -> Scores:
    """Those of the sample's nearest others [S] beside random pairs of the sample [S, D]."""
    pairs = _random_pairs(queries, rng)
    return Scores(
        nearest=_histogram(top), random=_histogram(pairs),
        nearest_median=float(np.median(top)), random_median=float(np.median(pairs)),
    )  # fmt: skip


def _random_pairs(queries: Embeddings, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    a = rng.integers(0, len(queries), _PAIRS)
    b = (a + rng.integers(1, len(queries), _PAIRS)) % len(queries)
    parts = [np.einsum("pd,pd->p", queries[a[low : low + 1000]], queries[b[low : low + 1000]], dtype=np.float64)
             for low in range(0, _PAIRS, 1000)]  # fmt: skip
    return np.concatenate(parts)


def _histogram(scores: npt.NDArray[Any]) -> tuple[int, ...]:
    counts, _ = np.histogram(np.clip(scores, -1, 1), bins=100, range=(-1, 1))
    return tuple(counts.tolist())
