"""Statistics of a sample's embeddings that show collapse without labels, and the neighbours they are read from.

Everything is computed in float32 or float64 on the CPU over all M² pairs of the sample: exact, no randomness.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from training.knn import knn_vote

NEIGHBOURS = 10  # of the neighbour cosine and of the overlap
CLUSTERS = (2, 3, 4)  # how many clusters count as few


class Nearest(NamedTuple):
    """The nearest other rows of each row, best first."""

    cosine: Tensor
    """[M, k] float32."""
    rows: Tensor
    """[M, k] int64."""


@dataclass(frozen=True)
class EmbeddingStatistics:
    """How far the embeddings of different pictures lie apart. All are nan where an embedding is not finite."""

    mean_cosine: float
    """Mean cosine over the pairs of different pictures; 1 is collapse to a point."""
    std: float
    """Standard deviation of the unit embeddings' coordinates, averaged over the d coordinates, times sqrt(d): about 1
    where they fill the sphere, 0 for a point (the statistic of SimSiam, Chen & He 2021)."""
    effective_rank: float
    """RankMe (Garrido et al. 2023): exp of the entropy of the normalised singular values."""
    neighbour_cosine: float
    """Mean cosine to the 10 nearest other pictures."""
    neighbour_excess: float
    """(neighbour_cosine − mean_cosine) / standard deviation of the pairwise cosines: how far neighbours stand out of
    the random level."""
    line_share: float
    """Share of the unit embeddings' variance along their first principal axis; 1 is collapse to a line."""
    cluster_share: tuple[float, ...]
    """Share of the variance that 2, 3 and 4 k-means centres explain; 1 is collapse to so few points."""


NOT_FINITE = EmbeddingStatistics(
    math.nan, math.nan, math.nan, math.nan, math.nan, math.nan, (math.nan,) * len(CLUSTERS)
)


def embedding_statistics(x: Tensor) -> EmbeddingStatistics:
    """Statistics of embeddings x [M, D], M ≥ 3."""
    if not bool(torch.isfinite(x).all()):
        return NOT_FINITE
    u = F.normalize(x.double(), dim=1)
    count = len(u)
    similarity = u @ u.T
    off = similarity.sum() - similarity.trace()
    pairs = count * (count - 1)
    mean = float(off / pairs)
    square = float((similarity.square().sum() - similarity.diagonal().square().sum()) / pairs)
    spread = math.sqrt(max(0.0, square - mean**2))
    near = float(nearest(x, NEIGHBOURS).cosine.mean())
    centred = u - u.mean(0)
    total = float(centred.square().sum())
    axes = torch.linalg.svdvals(centred).square()
    # Below 1e-10 the "variance" is rounding: a point, which lies on any line and in any cluster.
    flat = total < 1e-10 * count
    return EmbeddingStatistics(
        mean_cosine=mean,
        std=float(u.std(0, correction=0).mean()) * math.sqrt(u.shape[1]),
        effective_rank=effective_rank(x),
        neighbour_cosine=near,
        neighbour_excess=(near - mean) / spread if spread > 1e-6 else 0.0,
        line_share=1.0 if flat else float(axes[0] / axes.sum()),
        cluster_share=tuple(1.0 if flat else 1.0 - _within(centred, k) / total for k in CLUSTERS),
    )


def mean_cosine(x: Tensor) -> float:
    """Mean cosine between different rows of x [M, D]."""
    x = F.normalize(x.double(), dim=1)
    total = x.sum(0)
    count = len(x)
    return float((total @ total - count) / (count * (count - 1)))


def effective_rank(x: Tensor) -> float:
    """RankMe (Garrido et al. 2023): exp(−Σ p ln p), p the singular values of x [M, D] over their sum."""
    values = torch.linalg.svdvals(x.double())
    p = values / values.sum().clamp_min(1e-12) + 1e-12
    return float((-(p * p.log()).sum()).exp())


def nearest(x: Tensor, k: int) -> Nearest:
    """The k (at most M − 1) nearest other rows of each row of x [M, D], by cosine."""
    x = F.normalize(x.float(), dim=1)
    k = min(k, len(x) - 1)
    cosine, index = [], []
    for low in range(0, len(x), 1024):
        similarity = x[low : low + 1024] @ x.T
        rows = torch.arange(len(similarity))
        similarity[rows, rows + low] = -2.0
        top = similarity.topk(k, dim=1)
        cosine.append(top.values)
        index.append(top.indices)
    return Nearest(torch.cat(cosine), torch.cat(index))


def overlap(a: Tensor, b: Tensor) -> float:
    """Mean share of the neighbours a [M, k] that are also among b [M, k]; k / (M − 1) for unrelated lists."""
    return float((a[:, :, None] == b[:, None, :]).any(2).float().mean())


def knn_right(found: Nearest, labels: Tensor) -> Tensor:
    """Which rows their neighbours vote the right label for (`knn_vote`): bool [M]."""
    return knn_vote(found.cosine, labels[found.rows], int(labels.max()) + 1) == labels


def difference(mine: Tensor, other: Tensor) -> tuple[float, float]:
    """Difference in accuracy of two predictions on the same pictures (bool [M]) and its standard error, in points.

    Paired: the standard error is that of the mean of mine − other per picture.
    """
    delta = mine.double() - other.double()
    return 100 * float(delta.mean()), 100 * float(delta.std(correction=0)) / math.sqrt(len(delta))


def _within(x: Tensor, k: int, rounds: int = 20) -> float:
    """Sum of squared distances of x [M, D] to the k centres of Lloyd's algorithm, started at the farthest points."""
    distance = x.square().sum(1)
    centres = []
    for _ in range(k):
        centres.append(x[int(distance.argmax())])
        distance = torch.minimum(distance, (x - centres[-1]).square().sum(1))
    centre = torch.stack(centres)
    for _ in range(rounds):
        which = torch.cdist(x, centre).argmin(1)
        sums = torch.zeros_like(centre).index_add_(0, which, x)
        sizes = torch.bincount(which, minlength=k).to(x.dtype)[:, None]
        moved = torch.where(sizes > 0, sums / sizes.clamp(min=1), centre)
        if torch.equal(moved, centre):
            break
        centre = moved
    return float(torch.cdist(x, centre).min(1).values.square().sum())
