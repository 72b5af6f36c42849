"""Numbers from rankings: average precision in its two definitions, micro-AP, recall at a precision.

Every definition stands in its docstring, because retrieval papers use the same name for different ones.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[Any]
Flags = npt.NDArray[np.bool_]
Ranks = npt.NDArray[np.int64]


def average_precision(ranks: Ranks, positives: int) -> float:
    """AP of one ranking: (1 / positives) · Σ_i i / (r_i + 1), r_i the rank (from 0) of the i-th relevant item found.

    The definition of TREC, and of `sklearn.metrics.average_precision_score` where no scores are tied (that groups ties,
    a ranking has none). `positives` counts relevant items that were not found too. Raises `ValueError` for none.
    """
    _require(positives)
    ranks = np.sort(np.asarray(ranks))
    return float((np.arange(1, len(ranks) + 1) / (ranks + 1)).sum() / positives)


def trapezoid_average_precision(ranks: Ranks, positives: int) -> float:
    """AP of one ranking by the trapezoid rule, as the revisited Oxford and Paris protocol computes it.

    (1 / positives) · Σ_i ½·(p_i⁻ + p_i), where p_i = i / (r_i + 1) is the precision with the i-th relevant item (rank
    r_i from 0) and p_i⁻ = (i − 1) / r_i the one just before it, 1 at rank 0. Radenović et al. 2018, "Revisiting Oxford
    and Paris"; spec/sop.md section 5. Never above `average_precision` on the same ranks. Raises `ValueError`.
    """
    _require(positives)
    ranks = np.sort(np.asarray(ranks))
    found = np.arange(len(ranks))
    before = np.where(ranks == 0, 1.0, found / np.maximum(ranks, 1))
    return float((0.5 * (before + (found + 1) / (ranks + 1))).sum() / positives)


def micro_average_precision(scores: Scores, correct: Flags, positives: int) -> float:
    """AP over all (query, candidate) pairs of all queries together: Σ_n (R_n − R_{n−1}) · P_n over distinct scores.

    scores [P], correct [P]; `positives` is the number of correct pairs that exist, found or not. Pairs of equal score
    pass a threshold together, so the order within them does not matter. DISC21 (Douze et al. 2021) ranks this way.
    """
    recall, precision = precision_recall(scores, correct, positives)
    return float((np.diff(recall, prepend=0.0) * precision).sum())


def recall_at_precision(scores: Scores, correct: Flags, positives: int, precision: float = 0.9) -> float:
    """The largest recall at any threshold whose precision is at least `precision`; 0 where there is none."""
    recalls, precisions = precision_recall(scores, correct, positives)
    return float(recalls[precisions >= precision].max(initial=0.0))


class Curve(NamedTuple):
    """Precision against recall, one point per distinct score, from the highest score down."""

    recall: npt.NDArray[np.float64]
    """[T]"""
    precision: npt.NDArray[np.float64]
    """[T]"""


def precision_recall(scores: Scores, correct: Flags, positives: int) -> Curve:
    """The curve behind `micro_average_precision`. Raises `ValueError` without positives."""
    _require(positives)
    order = np.argsort(-scores, kind="stable")
    ranked, hits = scores[order], np.cumsum(correct[order], dtype=np.float64)
    last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True)) if len(ranked) else np.zeros(0, np.int64)
    return Curve(hits[last] / positives, hits[last] / (last + 1))


class Interval(NamedTuple):
    """A mean and how well it is known."""

    mean: float
    """Of the sample."""
    standard_error: float
    """Standard deviation of the bootstrap means."""
    low: float
    """2.5 % quantile of the bootstrap means."""
    high: float
    """97.5 % quantile."""


def bootstrap(values: npt.NDArray[Any], seed: int, draws: int = 2000) -> Interval:
    """Mean of `values` [M] with its bootstrap error: M rows are drawn with replacement, `draws` times."""
    rng = np.random.default_rng(seed)
    values = np.asarray(values, np.float64)
    weights = rng.multinomial(len(values), np.full(len(values), 1 / len(values)), size=draws) / len(values)
    means = weights @ values
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(float(values.mean()), float(means.std()), float(low), float(high))


def _require(positives: int) -> None:
    if positives < 1:
        raise ValueError("a query without a relevant item has no average precision: leave it out and say how many")
