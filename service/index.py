"""Vectors → nearest neighbours: the only importer of faiss.

An index is immutable once built; a search passes its parameters with the call and never sets them on the index.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import faiss as _faiss
import numpy as np
import numpy.typing as npt

from export.bundle import Embeddings, RefusalError

# The package's stubs give the C++ signatures, not those of its Python layer.
faiss: Any = _faiss

Rows = npt.NDArray[np.int64]
Bitmap = npt.NDArray[np.uint8]

# Below this many rows exact search takes milliseconds, and nothing has to be tuned.
EXACT_UP_TO = 50_000
MIN_RECALL = 0.95
_RECALL_QUERIES = 256


class IndexInfo(NamedTuple):
    """How an index was made and what it is worth."""

    factory: str
    """FAISS factory string."""
    nprobe: int
    """Lists visited per query (0: exact)."""
    recall_at_10: float
    """Against exact search, on a sample of the indexed rows."""


def build_index(vectors: Embeddings, exact_up_to: int = EXACT_UP_TO) -> tuple[Any, IndexInfo]:
    """An inner-product index over unit rows [N, D].

    Exact below `exact_up_to` rows; above, inverted lists with the smallest nprobe whose measured recall@10 is ≥ 0.95.
    """
    count, dim = vectors.shape
    if count <= exact_up_to:
        index = faiss.IndexFlatIP(dim)
        index.add(vectors)
        return index, IndexInfo("Flat", 0, 1.0)
    lists = int(4 * count**0.5)
    factory = f"IVF{lists},Flat"
    index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    rng = np.random.default_rng(0)
    training = vectors[np.sort(rng.choice(count, min(count, 64 * lists), replace=False))]
    index.train(training)
    index.add(vectors)
    queries = vectors[rng.choice(count, _RECALL_QUERIES, replace=False)]
    _, exact = faiss.knn(queries, vectors, 11, metric=faiss.METRIC_INNER_PRODUCT)
    nprobe, recall = 1, 0.0
    while nprobe <= lists:
        _, found = _search(index, queries, 11, nprobe, None)
        # The first of each is the query itself, which every index finds.
        pairs = zip(exact[:, 1:].tolist(), found[:, 1:].tolist(), strict=True)
        recall = float(np.mean([len(set(a) & set(b)) / 10 for a, b in pairs]))
        if recall >= MIN_RECALL:
            break
        nprobe *= 2
    return index, IndexInfo(factory, min(nprobe, lists), recall)


def search_index(
    index: Any, queries: Embeddings, k: int, nprobe: int, live: Bitmap | None, live_count: int | None = None
) -> tuple[Embeddings, Rows]:
    """Scores and row numbers [Q, k] of the best rows whose bit in `live` is set; −1 where there are fewer.

    `nprobe` was tuned for ten neighbours among all rows: for a larger k, and where few of the rows visited live, more
    lists are visited, up to all of them, until as many rows are found as there are.
    """
    if not nprobe:
        return _search(index, queries, k, 0, live)
    possible = min(k, index.ntotal if live_count is None else live_count)
    nprobe = min(index.nlist, max(nprobe, -(-4 * k * index.nlist // index.ntotal)))
    while True:
        scores, rows = _search(index, queries, k, nprobe, live)
        if nprobe == index.nlist or possible == 0 or (rows[:, possible - 1] >= 0).all():
            return scores, rows
        nprobe = min(index.nlist, 4 * nprobe)


def _search(index: Any, queries: Embeddings, k: int, nprobe: int, live: Bitmap | None) -> tuple[Embeddings, Rows]:
    selector = None
    if live is not None:
        selector = faiss.IDSelectorBitmap(live)
    # The parameter class must match the index: Flat ignores a selector in any other class, without an error.
    if nprobe:
        parameters = faiss.SearchParametersIVF(nprobe=nprobe, sel=selector)
    else:
        parameters = faiss.SearchParameters(sel=selector)
    scores, rows = index.search(np.ascontiguousarray(queries, np.float32), k, params=parameters)
    return scores, rows


def write_index(index: Any, path: Path) -> None:
    """Store an index."""
    faiss.write_index(index, str(path))


def read_index(path: Path, rows: int, dim: int) -> Any:
    """Load an index whose checksum was verified. Raises `RefusalError` when it is not what its segment says."""
    try:
        index = faiss.read_index(str(path))
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
