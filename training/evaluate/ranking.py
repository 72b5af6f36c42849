"""Exact nearest neighbours by cosine: FAISS where it is installed, torch where it is absent, the same answer from both.

The only importer of faiss in this room. Scores of the answer are float64 inner products rounded to float32, so that two
libraries whose float32 sums differ in the last bit agree; equal scores are ordered by their place in the gallery.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from export.bundle import Embeddings

try:
    import faiss as _faiss
except ModuleNotFoundError:  # exact search in torch then
    _faiss = None  # type: ignore[assignment]
faiss: Any = _faiss

Rows = npt.NDArray[np.int64]
Search = Callable[[Embeddings, int], tuple[Embeddings, Rows]]

_MARGIN = 8  # candidates beyond k: they show that nothing left out could have entered
_CHUNK = 512


class Neighbors(NamedTuple):
    """The best gallery rows of each query, best first."""

    scores: Embeddings
    """float32 [Q, k], cosine for unit rows."""
    rows: Rows
    """int64 [Q, k], rows of the gallery."""


def top_k(
    queries: Embeddings, gallery: Embeddings, k: int, own: Rows | None = None,
    searcher: Callable[[Embeddings], Search] | None = None,
) -> Neighbors:  # fmt: skip
    """The k best rows of `gallery` [N, D] for each of `queries` [Q, D] by inner product; ties by gallery order.

    `own` [Q]: a gallery row that is left out of each query's answer (leave-one-out), −1 for none. At most N rows are
    returned, N − 1 with `own`. The shortlist comes from FAISS or torch in float32 and is scored again in float64; a
    query for which float32 cannot exclude a row outside its shortlist is searched in full.
    """
    gallery = np.ascontiguousarray(gallery, np.float32)
    search = (searcher or default_searcher())(gallery)
    left_out = int(own is not None)
    k = min(k, len(gallery) - left_out)
    width = min(len(gallery), k + left_out + _MARGIN)
    scores, rows = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
    # The float32 error of an inner product of unit rows is below D · 2⁻²⁴; twice that, for either of two sums.
    slack = 4 * gallery.shape[1] * 2.0**-24
    for low in range(0, len(queries), _CHUNK):
        part = np.ascontiguousarray(queries[low : low + _CHUNK], np.float32)
        mine = None if own is None else own[low : low + _CHUNK]
        rough, found = search(part, width)
        exact = np.einsum("qd,qkd->qk", part.astype(np.float64), gallery[found].astype(np.float64))
        best, chosen = _ordered(exact.astype(np.float32), found, mine, k)
        if width < len(gallery):
            for q in np.flatnonzero(best[:, -1] - slack <= rough.min(axis=1)):
                everything = (gallery.astype(np.float64) @ part[q].astype(np.float64)).astype(np.float32)[None]
                all_rows = np.arange(len(gallery))[None]
                best[q], chosen[q] = _ordered(everything, all_rows, None if mine is None else mine[q : q + 1], k)
        scores[low : low + _CHUNK], rows[low : low + _CHUNK] = best, chosen
    return Neighbors(scores, rows)


def full_rankings(
    queries: Embeddings, gallery: Embeddings, own: Rows | None = None, chunk: int = 256
) -> Iterator[tuple[int, Neighbors]]:
    """The whole gallery ranked for each query, in chunks: (first query, neighbours). For mAP.

    `own` as in `top_k`. Where it is −1 for some queries only, N rows are returned, and the others' own row is the last,
    with a score of −∞.
    """
    left_out = int(own is not None and bool((own >= 0).all()))
    wide = gallery.astype(np.float64)
    for low in range(0, len(queries), chunk):
        exact = (queries[low : low + chunk].astype(np.float64) @ wide.T).astype(np.float32)
        rows = np.broadcast_to(np.arange(len(gallery)), exact.shape)
        mine = None if own is None else own[low : low + chunk]
        yield low, Neighbors(*_ordered(exact, rows, mine, len(gallery) - left_out))


def _ordered(scores: Embeddings, rows: Rows, own: Rows | None, k: int) -> tuple[Embeddings, Rows]:
    """The k best columns, by score and then by row; `own` last."""
    if own is not None:
        scores = np.where(rows == own[:, None], -np.inf, scores).astype(np.float32)
    order = np.lexsort((rows, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)


def default_searcher() -> Callable[[Embeddings], Search]:
    """FAISS's where it is installed."""
    return torch_searcher if faiss is None else faiss_searcher


def faiss_searcher(gallery: Embeddings) -> Search:
    """`IndexFlatIP`: exact inner products in float32."""
    index = faiss.IndexFlatIP(gallery.shape[1])
    index.add(gallery)
    return lambda queries, k: index.search(queries, k)


def torch_searcher(gallery: Embeddings) -> Search:
    """The same in torch."""
    rows = torch.from_numpy(gallery)

    def search(queries: Embeddings, k: int) -> tuple[Embeddings, Rows]:
        scores, found = (torch.from_numpy(queries) @ rows.T).topk(k, dim=1)
        return scores.numpy(), found.numpy()

    return search
