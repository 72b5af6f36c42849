"""Retrieval and kNN on labelled or instance-grouped sets, from features."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from export.bundle import Embeddings
from training.evaluate.metrics import average_precision
from training.evaluate.ranking import full_rankings, top_k
from training.knn import TEMPERATURE, K, knn_vote

Labels = npt.NDArray[np.int64]
RECALL_AT = (1, 5, 10)


class Retrieval(NamedTuple):
    """What a ranking is worth."""

    mean_average_precision: float
    """Mean over the counted queries of `metrics.average_precision` over the whole gallery."""
    recall_at: dict[int, float]
    """k → share of the counted queries with at least one relevant picture among the first k."""
    counted: npt.NDArray[np.int64]
    """Rows of the queries that have a relevant picture in the gallery; the others are left out."""
    ranks: npt.NDArray[np.int64]
    """Rank, from 0, of the first relevant picture of each counted query."""
    precisions: npt.NDArray[np.float64]
    """Average precision of each counted query."""


def retrieve(
    queries: Embeddings, labels: Labels, gallery: Embeddings, gallery_labels: Labels, own: Labels | None = None
) -> Retrieval:
    """Rank the gallery by cosine for each query; relevant is what has the query's label. Ties by gallery order.

    `own` [Q]: each query's own gallery row, which is neither ranked nor relevant (leave-one-out), −1 for none.
    Raises `ValueError` when no query has a relevant picture.
    """
    precisions, firsts, counted = [], [], []
    for low, found in full_rankings(queries, gallery, own):
        relevant = gallery_labels[found.rows] == labels[low : low + len(found.rows), None]
        relevant &= np.isfinite(found.scores)  # the query's own row
        for q in np.flatnonzero(relevant.any(axis=1)):
            ranks = np.flatnonzero(relevant[q])
            precisions.append(average_precision(ranks, len(ranks)))
            firsts.append(int(ranks[0]))
            counted.append(low + int(q))
    if not counted:
        raise ValueError("no query has a relevant picture in the gallery")
    ranks = np.asarray(firsts)
    recall = {k: float((ranks < k).mean()) for k in RECALL_AT}
    return Retrieval(float(np.mean(precisions)), recall, np.asarray(counted), ranks, np.asarray(precisions))


def knn_top1(
    queries: Embeddings, labels: Labels, bank: Embeddings, bank_labels: Labels, own: Labels | None = None, k: int = K
) -> float:
    """kNN accuracy (spec/sop.md section 5): the k nearest rows of the bank vote with weight exp(cos / 0.07).

    A query whose label the bank lacks counts as wrong. Equal votes go to the smaller label.
    """
    found = top_k(queries, bank, k, own)
    votes = torch.from_numpy(bank_labels[found.rows])
    chosen = knn_vote(torch.from_numpy(found.scores), votes, int(bank_labels.max()) + 1, TEMPERATURE)
    return float((chosen.numpy() == labels).mean())


def unit_rows(features: npt.NDArray[Any]) -> Embeddings:
    """Rows [N, D] scaled to length 1, float32; a zero row stays zero."""
    wide = np.asarray(features, np.float64)
    length = np.linalg.norm(wide, axis=1, keepdims=True)
    return (wide / np.where(length == 0, 1.0, length)).astype(np.float32)
