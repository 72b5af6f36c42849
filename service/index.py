"""Vectors → nearest neighbours: the only importer of faiss.

An index is chosen from constraints, tuned on its own vectors and then immutable; a search passes its parameters with the
call and never sets them on the index. Quantised indexes find candidates, and the stored vectors decide among them.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import mmap
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import faiss as _faiss
import numpy as np
import numpy.typing as npt
from faiss.contrib.exhaustive_search import knn_ground_truth

from export.bundle import Contract, Embeddings, RefusalError
from service.gpu_index import EXACT_ON_GPU, GpuIndex, gpu_bytes, gpu_of, suits_gpu
from service.policy import IndexPolicy

# The package's stubs give the C++ signatures, not those of its Python layer.
faiss: Any = _faiss

Rows = npt.NDArray[np.int64]
Bitmap = npt.NDArray[np.uint8]
Stored = npt.NDArray[np.float32] | npt.NDArray[np.float16]
"""Vectors as they lie in a file, [N, D]."""

# So few rows are never worth an index, whatever is asked.
ALWAYS_EXACT = 1000
# Below this many rows exact search takes milliseconds, and nothing has to be tuned.
EXACT_UP_TO = 20_000
# Where so few rows may be found, their vectors are compared one by one.
EXACT_AMONG = 5_000
BLOCK = 16_384
# Up to so many rows two kinds of index are built and the faster is kept; above, the second takes too long.
COMPARED_UP_TO = 100_000
_TUNING_QUERIES = 256
_TIMED_QUERIES = 64
_POINTS_PER_LIST = 64
_CONSTRUCTION = 100  # candidates per row while a graph is built; FAISS takes 40, hnswlib 200
# Ten / s neighbours lie in about s^-0.75 times as many lists as ten do. The ten of a share s of the rows: measured at shares
# from 0.5 to 50 %, about s^-0.45 times as many lists hold as many of them; and the codes, which have fewer rows to take for
# nearer ones, need s^0.5 times as many candidates, or ten per neighbour.
_SPREAD = 0.75
_SHARE = 0.45
_FEWER, _LEAST = 0.5, 10
# A four-bit scan passes over so many rows, whether a filter passes them or not, while one stored vector is compared.
_SCANNED = 25
# Of few rows that a filter passes, so many at least are compared: those in the nearest lists.
_SEEN = 1_200
_THREADS = faiss.omp_get_max_threads()
_BATCH = 16
# Below so many dimensions four bits are too few for four values.
_FEW_DIMENSIONS = 256
_local = threading.local()
#: threads that search batches now
_searching: set[int] = set()
T = TypeVar("T")


class Effort(NamedTuple):
    """How hard a search looks."""

    visits: int
    """Lists (IVF) or candidates (HNSW, efSearch) visited per query; 0: every row."""
    rescore: int = 0
    """Candidates per neighbour whose stored vectors decide; 0: the index decides."""


class CurvePoint(Contract):
    """What one effort is worth."""

    visits: int
    """`Effort.visits`"""
    rescore: int
    """`Effort.rescore`"""
    recall_at_10: float
    """Against exact search, over queries that no index holds."""
    ms: float
    """Milliseconds per query in a batch of 256, on the machine that built it."""


class IndexInfo(Contract):
    """How an index was chosen and what it is worth."""

    factory: str
    """FAISS factory string."""
    visits: int = 0
    """`Effort.visits`"""
    rescore: int = 0
    """`Effort.rescore`"""
    recall_at_10: float = 1.0
    """Measured against exact search."""
    latency_ms: float = 0.0
    """Median of one query alone, on the machine that built it."""
    curve: tuple[CurvePoint, ...] = ()
    """Every effort that was measured."""
    why: str = ""
    """Why this one."""
    training_s: float = 0.0
    """Seconds that training took, of every index that was tried."""
    adding_s: float = 0.0
    """Seconds that adding the rows took."""
    tuning_s: float = 0.0
    """Seconds that exact search and tuning took."""

    @property
    def effort(self) -> Effort:
        """How hard to look."""
        return Effort(self.visits, self.rescore)


def gently(call: Callable[[], T]) -> T:
    """Run what builds an index beside searches: in a thread of lower priority, with one thread of FAISS's."""
    with ThreadPoolExecutor(1, "gentle", _be_gentle) as pool:
        return pool.submit(call).result()


def _be_gentle() -> None:
    _local.threads = 1
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 5)  # on Linux, of the thread


def _threads() -> int:
    """FAISS's threads for a call of this thread."""
    return int(getattr(_local, "threads", _THREADS))


@contextlib.contextmanager
def searching() -> Iterator[None]:
    """This thread searches for a while, and shares the cores with the others that do."""
    me = threading.get_ident()
    _searching.add(me)
    try:
        yield
    finally:
        _searching.discard(me)


def _spare_threads(queries: int) -> None:
    """One thread of FAISS's for a few queries, in the calling thread alone: they are over before a second thread has begun,
    and where every core is busy, a region of two threads waits for the slower. So it is where several threads search."""
    faiss.omp_set_num_threads(max(1, _threads() // max(1, len(_searching))) if queries >= _BATCH else 1)


def candidates(
    count: int, dim: int, policy: IndexPolicy, memory: float | None, on_gpu: float | None = None
) -> list[str]:
    """Factory strings for `count` rows of `dim`, in the order to try them: of those that `memory` bytes hold; where none
    fits, the smallest alone. `on_gpu`: bytes free on a GPU; what it can search comes first."""

    def gpu(factory: str) -> bool:
        return on_gpu is not None and suits_gpu(factory) and gpu_bytes(bytes_of(factory, count, dim)) <= on_gpu

    if policy.index == "exact" or (policy.index == "auto" and count < ALWAYS_EXACT):
        return [_flat(policy)]
    if policy.index != "auto":
        named = re.search(r"IVF(\d+)", policy.index)
        least = max(int(named[1]) if named else 0, 256 if "PQ" in policy.index else 0)
        return [_flat(policy) if count < least else policy.index]  # it could not be trained
    few = count <= (EXACT_ON_GPU if gpu(_flat(policy)) else EXACT_UP_TO)
    if few and (memory is None or memory >= bytes_of(_flat(policy), count, dim)):
        return [_flat(policy)]
    lists = lists_for(count)
    ladder = ["HNSW32,SQfp16", f"IVF{lists},SQfp16", f"IVF{lists},SQ8"]
    if count > COMPARED_UP_TO:  # a graph takes ten times as long to build
        ladder[:2] = reversed(ladder[:2])
    if dim % 4 == 0:  # four bits for four values (of few dimensions two), scanned in registers
        small = f"IVF{lists},PQ{dim // 4}x4fsr"
        quick = small if dim >= _FEW_DIMENSIONS else f"IVF{lists},PQ{dim // 2}x4fsr"
        # Where float32 vectors decide among its candidates it is the quickest; where memory is short the smallest.
        ladder = [*([quick] if policy.vectors == "float32" and dim >= 64 else []), *ladder, small]
        ladder = list(dict.fromkeys(ladder))
    ladder.sort(key=lambda each: not gpu(each))
    fitting = [each for each in ladder if memory is None or bytes_of(each, count, dim) <= memory]
    return fitting or [min(ladder, key=lambda each: bytes_of(each, count, dim))]


def lists_for(count: int) -> int:
    """Inverted lists for so many rows: 2 √N up to 1,000, then √N, as finding the list of each row takes longest then; at
    least 16, and at most one per 39 rows, the least that FAISS trains without a warning."""
    return max(1, min(max(16, min(int(2 * count**0.5), max(1000, int(count**0.5)))), count // 39))


def training_rows(lists: int, count: int) -> int:
    """Rows that an index of so many inverted lists is trained on."""
    return min(count, max(_POINTS_PER_LIST * lists, 16_384))


def bytes_of(factory: str, count: int, dim: int) -> int:
    """About how large an index is, in bytes."""
    head, _, code = factory.rpartition(",")
    lists = int("".join(c for c in head.split("_")[0] if c.isdigit()) or 0) if head.startswith("IVF") else 0
    links = 0
    if factory.startswith("HNSW"):
        head, _, code = factory.partition(",")
        links = 2 * 4 * int("".join(c for c in head if c.isdigit()) or 32) + 4
    if code.startswith("SQfp16"):
        row = 2 * dim
    elif code.startswith("SQ8"):
        row = dim
    elif code.startswith("PQ"):
        quantizers, _, bits = code[2:].partition("x")
        row = int(quantizers) * int("".join(itertools.takewhile(str.isdigit, bits)) or 8) // 8
    elif code.startswith("RaBitQ"):
        row = dim // 8 + 8
    else:
        row = 4 * dim
    return count * (row + links + (8 if lists else 0)) + lists * 4 * dim


def build_index(
    vectors: Stored, policy: IndexPolicy | None = None, memory: float | None = None
) -> tuple[Any, IndexInfo]:
    """An inner-product index over unit rows [N, D], and how it was chosen: for a GPU where FAISS sees one, see
    `service.gpu_index`.

    `memory`: bytes that it may take. `vectors` may be memory-mapped: they are read in blocks. Raises `RefusalError` on a
    factory string that FAISS does not know.
    """
    policy = policy or IndexPolicy()
    count, dim = vectors.shape
    tried: list[tuple[Any, IndexInfo]] = []
    queries, tenth = None, None
    took = [0.0, 0.0, 0.0]
    for factory in candidates(count, dim, policy, memory, gpu_free()):
        faiss.omp_set_num_threads(_threads())  # tuning searches with one
        marks = [time.perf_counter()]
        index = _trained(factory, vectors, tried[-1][0] if tried else None)
        marks.append(time.perf_counter())
        for block in blocks(vectors):
            index.add(block)
        marks.append(time.perf_counter())
        if factory in _EXACT:
            why = f"{count:,} rows are compared one by one"
            return index, IndexInfo(factory=factory, why=why, adding_s=round(marks[2] - marks[1], 3))
        if queries is None or tenth is None:
            queries, tenth = _held_out(vectors)
        where = placed(index, factory, bytes_of(factory, count, dim))
        tried.append((index, _tuned(where, factory, vectors, queries, tenth, policy)))
        marks.append(time.perf_counter())
        took = [before + end - start for before, start, end in zip(took, marks[:-1], marks[1:], strict=True)]
        holding = [info for _, info in tried if not _missed(info, policy)]
        if holding and (len(tried) >= 2 or count > COMPARED_UP_TO):
            break
    index, info = min(
        tried,
        key=lambda t: (len(_missed(t[1], policy)), max(policy.min_recall - t[1].recall_at_10, 0), t[1].latency_ms),
    )
    others = [other for _, other in tried if other is not info]
    seconds = dict(zip(("training_s", "adding_s", "tuning_s"), (round(each, 3) for each in took), strict=True))
    return index, info.model_copy(update={"why": _why(info, others, policy, memory, count, dim), **seconds})


def check_factory(policy: IndexPolicy, dim: int) -> None:
    """Raises `RefusalError` where the policy names an index that cannot be used."""
    if policy.index not in ("auto", "exact"):
        _empty(policy.index, dim)


def _missed(info: IndexInfo, policy: IndexPolicy) -> list[str]:
    missed = []
    if info.recall_at_10 < policy.min_recall:
        missed.append(f"recall@10 {policy.min_recall:g}")
    if policy.max_latency_ms is not None and info.latency_ms > policy.max_latency_ms:
        missed.append(f"{policy.max_latency_ms:g} ms")
    return missed


def _why(
    info: IndexInfo, others: list[IndexInfo], policy: IndexPolicy, memory: float | None, count: int, dim: int
) -> str:
    missed = _missed(info, policy)
    goal = f"the fastest that was tried with recall@10 ≥ {policy.min_recall:g}"
    if missed:
        goal = f"the nearest to the constraints; {' and '.join(missed)} not reached"
    size = bytes_of(info.factory, count, dim)
    room = "" if memory is None else f" of {memory / 2**20:,.0f} allowed"
    if memory is not None and size > memory:
        room += " (nothing smaller is known)"
    than = "".join(f"; {each.factory} took {each.latency_ms:.2f} ms for {each.recall_at_10:.3f}" for each in others)
    return (
        f"{goal}: {info.recall_at_10:.3f}, {info.latency_ms:.2f} ms a query, about {size / 2**20:,.0f} MiB{room}{than}"
    )


_EXACT = ("Flat", "SQfp16")


def _flat(policy: IndexPolicy) -> str:
    return "Flat" if policy.vectors == "float32" else "SQfp16"


def blocks(vectors: Stored, size: int = BLOCK) -> Iterator[Embeddings]:
    """Rows in float32, block by block; what was read of a memory-mapped file leaves the memory again."""
    for low in range(0, len(vectors), size):
        yield np.array(vectors[low : low + size], np.float32, order="C")
        mapped = getattr(vectors, "_mmap", None)
        if mapped is not None:
            mapped.madvise(mmap.MADV_DONTNEED)


def _empty(factory: str, dim: int) -> Any:
    try:
        index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as e:
        reason = str(e).rsplit(":", 1)[-1].strip()
        raise RefusalError(
            f"{factory!r} is no FAISS factory string for {dim} dimensions ({reason}): write one such as IVF1024,SQ8 or "
            "HNSW32, or auto"
        ) from None
    if not isinstance(_inner(index), (faiss.IndexFlat, faiss.IndexScalarQuantizer, faiss.IndexIVF, faiss.IndexHNSW)):
        raise RefusalError(
            f"{factory!r} is a {type(index).__name__}, which cannot be searched with filters here: choose one of Flat, SQ…, "
            "IVF…, HNSW… or auto"
        )
    return index


def _trained(factory: str, vectors: Stored, like: Any = None) -> Any:
    """A trained index; with the centroids of an index `like` it, where both have as many lists."""
    count, dim = vectors.shape
    index = _empty(factory, dim)
    if isinstance(index, faiss.IndexHNSW):
        index.hnsw.efConstruction = _CONSTRUCTION
    if not index.is_trained:
        wanted = training_rows(getattr(_inner(index), "nlist", 1), count)
        chosen = np.random.default_rng(0).choice(count, wanted, replace=False)
        rows = np.ascontiguousarray(vectors[np.sort(chosen)], np.float32)
        if is_ivf(index) and index is _inner(index):
            if like is not None and is_ivf(like) and like.nlist == index.nlist:
                index.quantizer.add(like.quantizer.reconstruct_n(0, like.nlist))
            elif index.nlist <= len(rows):
                index.train_q1(len(rows), faiss.swig_ptr(rows), False, index.metric_type)
            faiss.omp_set_num_threads(1)  # the rest is thousands of short steps, each too short for a second thread
        try:
            index.train(rows)
        except RuntimeError as e:
            reason = str(e).rsplit(":", 1)[-1].strip()
            raise RefusalError(
                f"an index {factory!r} cannot be trained on {count:,} rows ({reason}): choose fewer lists, or auto"
            ) from None
        finally:
            faiss.omp_set_num_threads(_threads())
    return index


def _held_out(vectors: Stored) -> tuple[Embeddings, Embeddings]:
    """Queries that no index holds, and the similarity [Q] of the tenth nearest row of each.

    A row of the index as a query would flatter a graph, which it is a node of. So each is moved as far away as its nearest
    neighbour is, in the direction in which two others of its neighbours differ.
    """
    rng = np.random.default_rng(1)
    chosen = np.sort(rng.choice(len(vectors), min(_TUNING_QUERIES, len(vectors)), replace=False))
    rows = np.ascontiguousarray(vectors[chosen], np.float32)
    scores, near = _ground_truth(rows, vectors, min(11, len(vectors)))
    if near.shape[1] < 11:
        return rows, scores[:, -1]
    one, two = (vectors[near[:, at]].astype(np.float32) for at in (2, 3))
    away = one - two
    away -= (away * rows).sum(axis=1, keepdims=True) * rows
    away /= np.maximum(np.linalg.norm(away, axis=1, keepdims=True), 1e-9)
    nearness = np.clip(scores[:, 1:2], 0, 1)
    queries: Embeddings = nearness * rows + np.sqrt(1 - nearness**2) * away
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    return queries, _ground_truth(queries, vectors, 10)[0][:, -1]


def _ground_truth(queries: Embeddings, vectors: Stored, k: int) -> tuple[Embeddings, Rows]:
    nearest: Any = knn_ground_truth  # untyped
    scores, rows = nearest(queries, blocks(vectors), k, metric_type=faiss.METRIC_INNER_PRODUCT)
    return scores, rows


def _tuned(
    index: Any, factory: str, vectors: Stored, queries: Embeddings, tenth: Embeddings, policy: IndexPolicy
) -> IndexInfo:
    """Raise the effort until the recall is reached; where stored vectors decide, for several numbers of candidates."""
    # A little more than is asked: real queries may be harder than those here.
    target = policy.min_recall + 0.2 * (1 - policy.min_recall)
    code = factory.rpartition(",")[2]
    decided = not isinstance(index, faiss.IndexPreTransform) and (code == factory or code in ("Flat", "SQfp16"))
    curve: list[CurvePoint] = []
    for rescore in (0,) if decided else (4, 10, 20, 40):
        reached: list[float] = []
        for visits in _sweep(index, _visits(index, 10 * max(rescore, 1))):
            start = time.perf_counter()
            _, found = search_index(index, queries, 10, Effort(visits, rescore), None, vectors=vectors)
            ms = (time.perf_counter() - start) / len(queries) * 1e3
            reached.append(_recall(vectors, queries, tenth, found))
            curve.append(
                CurvePoint(visits=visits, rescore=rescore, recall_at_10=round(reached[-1], 4), ms=round(ms, 4))
            )
            # Twice the visits for next to nothing: what is missing was lost to the quantiser.
            if reached[-1] >= target or (len(reached) > 4 and reached[-1] - reached[-3] < 0.002):
                break
    holding = [point for point in curve if point.recall_at_10 >= target]
    if not holding:
        holding = [point for point in curve if point.recall_at_10 >= policy.min_recall]
    if (
        holding
    ):  # of those about as fast the one with most candidates: fewer may be too few for harder queries, however many
        # lists are visited
        fastest = min(point.ms for point in holding)
        best = max(holding, key=lambda p: (p.rescore if p.ms <= 1.3 * fastest else -1, -p.ms))
    else:
        best = max(curve, key=lambda p: p.recall_at_10)
    effort = Effort(best.visits, best.rescore)
    times = []
    for query in queries[:_TIMED_QUERIES]:
        start = time.perf_counter()
        search_index(index, query[None], 10, effort, None, vectors=vectors)
        times.append(time.perf_counter() - start)
    return IndexInfo(
        factory=factory, visits=best.visits, rescore=best.rescore, recall_at_10=best.recall_at_10,
        latency_ms=round(float(np.median(times)) * 1e3, 3), curve=tuple(curve),
    )  # fmt: skip


def _visits(index: Any, wanted: int) -> int:
    """The least visits that see four times as many rows as are wanted (IVF), or as many (HNSW)."""
    return -(-4 * wanted * _inner(index).nlist // index.ntotal) if is_ivf(index) else wanted


def _sweep(index: Any, first: int) -> list[int]:
    """Visits from `first` on, each about 1.4 times the one before, up to every list (IVF) or 2,048 candidates (HNSW)."""
    most = _inner(index).nlist if is_ivf(index) else max(first, 2048)
    steps = [min(first, most)]
    while steps[-1] < most:
        steps.append(min(most, max(steps[-1] + 1, int(steps[-1] * 1.415 + 0.5))))
    return steps


def _recall(vectors: Stored, queries: Embeddings, tenth: Embeddings, found: Rows) -> float:
    """The share of the places that rows as near as the `tenth` [Q] of the nearest took: of equal rows any is right."""
    scores = _scores(vectors, queries, np.maximum(found, 0))
    return float(((scores >= tenth[:, None] - 1e-6) & (found >= 0)).mean())


def _inner(index: Any) -> Any:
    """The index behind a rotation (OPQ), that of the CPU."""
    if isinstance(index, GpuIndex):
        return index.cpu
    return faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index


def is_ivf(index: Any) -> bool:
    """Whether it has inverted lists."""
    return isinstance(_inner(index), faiss.IndexIVF)


def search_index(
    index: Any,
    queries: Embeddings,
    k: int,
    effort: Effort,
    live: Bitmap | None,
    live_count: int | None = None,
    vectors: Stored | None = None,
) -> tuple[Embeddings, Rows]:
    """Scores and row numbers [Q, k] of the best rows whose bit in `live` is set; −1 where there are fewer.

    The effort was tuned for ten neighbours among all rows: for a larger k, and where few rows may be found, more is
    visited, until as many rows are found as there are. `vectors` [N, D]: the stored ones, which decide among few rows and
    re-score.
    """
    count = index.ntotal if live_count is None else live_count
    possible = min(k, count)
    if live is not None and vectors is not None and effort.visits and count <= EXACT_AMONG:
        return _padded(*exact_among(vectors, _rows_of(live, index.ntotal), queries, k), k)
    if not effort.visits:
        if vectors is None or not isinstance(index, GpuIndex):
            return _search(index, queries, k, 0, live)
        # A GPU rounds the queries to float16 where the rows are.
        return _rescored(vectors, queries, _search(index, queries, k + 16, 0, live)[1], k)
    share = 1 if live is None else max(count, 1) / index.ntotal
    wanted = k
    if effort.rescore and vectors is not None:
        each = max(min(_LEAST, effort.rescore), math.ceil(effort.rescore * share**_FEWER))
        wanted = min(count, max(k, 10) * each if k <= 100 else max(100 * each, 4 * k))
    most = _inner(index).nlist if is_ivf(index) else index.ntotal
    visits = _widened(index, effort, k, wanted, share)
    while True:
        scores, rows = _search(index, queries, wanted, visits, live)
        missing = (rows[:, possible - 1] < 0) if possible else np.zeros(len(rows), bool)
        if visits == most or not missing.any():
            break
        visits = min(most, 4 * visits)
    if effort.rescore and vectors is not None:
        scores, rows = _rescored(vectors, queries, rows, k)
    if (
        missing.any() and vectors is not None
    ):  # equal vectors may be linked with each other alone, and cut off from the rest
        there = np.arange(index.ntotal) if live is None else _rows_of(live, index.ntotal)
        scores[missing], rows[missing] = _padded(*exact_among(vectors, there, queries[missing], k), k)
    return scores, rows


def _widened(index: Any, effort: Effort, k: int, wanted: int, share: float) -> int:
    """The visits that find k neighbours among a share of the rows, and see of it four times as many rows as are wanted (IVF)
    or as many (HNSW)."""
    if not is_ivf(index):
        return min(int(index.ntotal), int(max(effort.visits, wanted) * share**-_SPREAD))
    lists, total = int(_inner(index).nlist), int(index.ntotal)
    seen = 4 * wanted * lists / total
    visits: float = max(effort.visits, seen) * share**-_SHARE * max(1.0, (k - 1) / 10) ** _SPREAD
    return min(lists, math.ceil(max(visits, seen / share)))


def are_few(index: Any, count: int) -> bool:
    """Whether so many rows, all that may be found, are better named one by one, for `search_rows`, than as a bitmap."""
    return count <= EXACT_AMONG or (isinstance(index, faiss.IndexIVFFastScan) and count * _SCANNED <= index.ntotal)


def lists_of(index: Any) -> npt.NDArray[np.int32]:
    """The inverted list [N] that each row of a four-bit index is in; of other indexes nothing."""
    if not isinstance(index, faiss.IndexIVFFastScan):
        return np.zeros(0, np.int32)
    found = np.zeros(index.ntotal, np.int32)
    for number in range(index.nlist):
        size = index.invlists.list_size(number)
        if size:
            found[faiss.rev_swig_ptr(index.invlists.get_ids(number), size)] = number
    return found


def search_rows(
    index: Any,
    queries: Embeddings,
    k: int,
    effort: Effort,
    rows: Rows,
    vectors: Stored,
    lists: Callable[[], npt.NDArray[np.int32]],
) -> tuple[Embeddings, Rows]:
    """Scores and row numbers [Q, min(k, R)] of the best of few rows [R] by their stored vectors: of those in the lists
    nearest to a query, or of all where that is no more work. `lists`: gives `lists_of` the index."""
    count = len(rows)
    if count <= EXACT_AMONG or not isinstance(index, faiss.IndexIVFFastScan):
        return exact_among(vectors, rows, queries, k)
    visits = _widened(index, effort, k, max(k, _SEEN // 4), count / index.ntotal)
    if 2 * len(queries) * visits >= index.nlist:  # all rows are read once for all queries, and multiplied as a matrix
        return exact_among(vectors, rows, queries, k)
    _spare_threads(len(queries))
    nearest = index.quantizer.search(np.ascontiguousarray(queries, np.float32), visits)[1]
    held = lists()[rows]
    found = []
    for i in range(len(queries)):
        near = np.zeros(index.nlist, bool)
        near[nearest[i]] = True
        some = rows[near[held]]
        found.append(exact_among(vectors, some if len(some) >= min(k, count) else rows, queries[i : i + 1], k))
    return np.concatenate([scores for scores, _ in found]), np.concatenate([names for _, names in found])


def _rows_of(bitmap: Bitmap, count: int) -> Rows:
    return np.flatnonzero(np.unpackbits(bitmap, bitorder="little", count=count))


def exact_among(vectors: Stored, rows: Rows, queries: Embeddings, k: int) -> tuple[Embeddings, Rows]:
    """Scores and row numbers [Q, min(k, R)] of the best of the rows [R], best first."""
    k = min(k, len(rows))
    if len(queries) * len(rows) <= BLOCK:  # one by one from where they lie
        return _best(_scores(vectors, queries, np.broadcast_to(rows, (len(queries), len(rows)))), rows, k)
    best_scores = np.zeros((len(queries), 0), np.float32)
    best_rows = np.zeros((len(queries), 0), np.int64)
    for low in range(0, len(rows), BLOCK):
        part = rows[low : low + BLOCK]
        scores = queries @ np.asarray(vectors[part], np.float32).T
        best_scores = np.concatenate([best_scores, scores], axis=1)
        best_rows = np.concatenate([best_rows, np.broadcast_to(part, scores.shape)], axis=1)
        best_scores, best_rows = _best(best_scores, best_rows, k)
    return best_scores, best_rows


def _scores(vectors: Stored, queries: Embeddings, rows: Rows) -> Embeddings:
    """Similarities [Q, R] of queries [Q, D] with their rows [Q, R]."""
    scores = np.empty(rows.shape, np.float32)
    if vectors.dtype == np.float32 and vectors.flags.c_contiguous:
        rows, queries = np.ascontiguousarray(rows, np.int64), np.ascontiguousarray(queries, np.float32)
        _spare_threads(len(queries))
        at = faiss.swig_ptr
        faiss.fvec_inner_products_by_idx(
            at(scores), at(queries), at(vectors), at(rows), vectors.shape[1], len(queries), rows.shape[1]
        )
    else:
        for i, query in enumerate(queries):
            scores[i] = np.asarray(vectors[rows[i]], np.float32) @ query
    return scores


def _best(scores: Embeddings, rows: Rows, k: int) -> tuple[Embeddings, Rows]:
    """The k best, best first. `rows`: [R] or [Q, R]."""
    if len(scores) == 1:  # of one query: without the cost of general indexing
        each, names = scores[0], rows if rows.ndim == 1 else rows[0]
        if 0 < k < len(each):
            chosen = np.argpartition(each, len(each) - k)[-k:]
            each, names = each[chosen], names[chosen]
        order = np.argsort(-each, kind="stable")[:k]
        return each[order][None], names[order][None]
    if scores.shape[1] > k:
        chosen = np.argpartition(-scores, k - 1, axis=1)[:, :k] if k else np.zeros((len(scores), 0), np.int64)
        scores, rows = np.take_along_axis(scores, chosen, 1), _at(rows, chosen)
    order = np.argsort(-scores, axis=1, kind="stable")
    return np.take_along_axis(scores, order, 1), _at(rows, order)


def _at(rows: Rows, chosen: Rows) -> Rows:
    found: Rows = rows[chosen] if rows.ndim == 1 else np.take_along_axis(rows, chosen, 1)
    return found


def _rescored(vectors: Stored, queries: Embeddings, rows: Rows, k: int) -> tuple[Embeddings, Rows]:
    """The k best of candidate rows [Q, R] by their stored vectors."""
    scores = _scores(vectors, queries, np.maximum(rows, 0))
    scores[rows < 0] = -np.inf
    return _padded(*_best(scores, rows, k), k)


def _padded(scores: Embeddings, rows: Rows, k: int) -> tuple[Embeddings, Rows]:
    if rows.shape[1] == k:
        return scores, rows
    missing = ((0, 0), (0, k - rows.shape[1]))
    return np.pad(scores, missing, constant_values=-np.inf), np.pad(rows, missing, constant_values=-1)


def _search(index: Any, queries: Embeddings, k: int, visits: int, live: Bitmap | None) -> tuple[Embeddings, Rows]:
    if isinstance(index, GpuIndex):
        on_cpu = functools.partial(_search, index.cpu, visits=visits, live=live)
        return index.search(queries, k, visits, live, on_cpu)
    _spare_threads(len(queries))
    kind = "exact" if not visits else "lists" if is_ivf(index) else "graph"
    turned = isinstance(index, faiss.IndexPreTransform)
    if live is None:
        parameters = _parameters(kind, visits, turned)
    else:
        selector = faiss.IDSelectorBitmap(live)  # lives until the search is over
        parameters = _made_parameters(kind, visits, turned, selector)
    scores, rows = index.search(np.ascontiguousarray(queries, np.float32), k, params=parameters)
    return scores, rows


def _made_parameters(kind: str, visits: int, turned: bool, selector: Any) -> Any:
    """Their class must match the index: a graph takes any, and then looks no further than it does by default."""
    if kind == "exact":
        parameters = faiss.SearchParameters(sel=selector)
    elif kind == "lists":
        parameters = faiss.SearchParametersIVF(nprobe=visits, sel=selector)
    else:
        parameters = faiss.SearchParametersHNSW(efSearch=visits, sel=selector)
    return faiss.SearchParametersPreTransform(index_params=parameters) if turned else parameters


@functools.lru_cache(256)
def _parameters(kind: str, visits: int, turned: bool) -> Any:
    """Those without a selector, which any number of searches may share."""
    return _made_parameters(kind, visits, turned, None)


def gpu_free() -> float | None:
    """Bytes that are free on the GPU that indexes may be copied to; None where there is none."""
    gpu = gpu_of(faiss)
    return None if gpu is None else gpu.free()


def placed(index: Any, factory: str, size: int) -> Any:
    """An index of so many bytes, to be searched on a GPU where there is one for its kind."""
    gpu = gpu_of(faiss)
    if gpu is None or not suits_gpu(factory):
        return index
    return GpuIndex(index, size, gpu, lambda visits: _parameters("lists", visits, False))


def write_index(index: Any, path: Path) -> None:
    """Store an index. Raises `OSError` where the disk is full or the file cannot be written."""
    try:
        with path.open("wb") as file:  # FAISS's own writer forgets what fails when it closes the file
            faiss.write_index(index, faiss.PyCallbackIOWriter(file.write, 2**20))
    except OSError as e:
        raise OSError(e.errno, e.strerror, str(path)) from None


def read_index(path: Path, rows: int, dim: int) -> Any:
    """Open an index whose checksum was verified: memory-mapped, so that opening copies nothing. Raises `RefusalError` when
    it is not what its segment says."""
    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as e:
        raise RefusalError(
            f"{path} cannot be read by faiss {faiss.__version__} ({e}): build the collection again"
        ) from e
    if index.ntotal != rows or index.d != dim:
        raise RefusalError(
            f"{path} holds {index.ntotal} vectors of {index.d} dimensions, its segment says {rows} of {dim}: build the "
            "collection again"
        )
    return index
