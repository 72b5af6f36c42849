"""Knowing whether it works, without labels: collapse shows in the embeddings of a fixed sample before it shows elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from training.encoder import Teacher
from training.knn import knn_accuracy, pixel_features
from training.views import Views

SAMPLE = 2000


class Health(NamedTuple):
    """Measurements on the teacher's embeddings of the sample."""

    mean_cosine: float
    """Mean cosine between the [CLS] features of different pictures; 1 is collapse to a point."""
    effective_rank: float
    """RankMe: exp of the entropy of the normalised singular values of the features."""
    head_mean_cosine: float
    """The same cosine on the head's output, which the objective compares."""
    vote_entropy: float
    """H(P_t), nats."""
    mean_vote_entropy: float
    """H(mean P_t), nats; ln P at best."""
    max_entropy: float
    """ln P."""
    leak: float
    """Leaked share of the votes."""
    support_cosine: float
    """Mean cosine of anchors and supports."""
    knn: float
    """Leave-one-out kNN accuracy in %, by the first folder's name; nan without such labels."""


class Monitor:
    """Embeds a fixed sample and says what it sees.

    `pictures` uint8 [M, size, size, 3] are preprocessed as at inference; `labels` [M] or None.
    """

    def __init__(self, pictures: Tensor, labels: Tensor | None, views: Views, device: torch.device) -> None:
        self.pictures = pictures
        self.labels = labels
        self._views = views
        self._device = device

    def features(self, teacher: Teacher) -> tuple[Tensor, Tensor]:
        """[CLS] features [M, C] and head outputs [M, d], float32 on the CPU."""
        features, heads = [], []
        with torch.no_grad():
            for part in self.pictures.split(256):
                cls = teacher.vit.forward_features(self._views.normalise(part.to(self._device)))[:, 0]
                features.append(cls.float().cpu())
                heads.append(teacher.head(cls).float().cpu())
        return torch.cat(features), torch.cat(heads)

    def measure(self, teacher: Teacher, diagnostics: Callable[[Tensor], dict[str, float]]) -> Health:
        """Health of the teacher."""
        features, heads = self.features(teacher)
        votes = diagnostics(heads)
        knn = math.nan
        if self.labels is not None:
            knn = 100 * knn_accuracy(features, self.labels, features, self.labels, leave_one_out=True)
        return Health(
            mean_cosine(features), effective_rank(features), mean_cosine(heads),
            votes["vote_entropy"], votes["mean_vote_entropy"], votes["max_entropy"], votes.get("leak", math.nan),
            votes.get("support_cosine", math.nan), knn,
        )  # fmt: skip

    def baselines(self) -> dict[str, float]:
        """Leave-one-out kNN accuracy in % of raw pixels and of grey, normalised ones; empty without labels."""
        if self.labels is None:
            return {}
        result = {}
        for name, grey in (("raw pixels", False), ("grey, normalised pixels", True)):
            x = pixel_features(self.pictures, grey)
            result[name] = 100 * knn_accuracy(x, self.labels, x, self.labels, leave_one_out=True)
        return result


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


def alarms(history: list[Health], progress: float) -> list[str]:
    """Sentences about the latest measurement; empty while all is well. `progress` is the share of the steps done.

    Embedding statistics decide, after warm-up only: a loss near ln P is no alarm by itself (spec/sop.md section 8).
    """
    now = history[-1]
    found = []
    if not math.isfinite(now.mean_cosine):
        found.append("the embeddings are not finite: lower --lr, or use --precision float32")
        return found
    if progress < 0.15 or len(history) < 2:
        return found
    # The head's outputs are what the objective spreads; features share a large mean in healthy ViTs.
    if now.head_mean_cosine > 0.95:
        found.append(
            f"collapse: the mean cosine between different pictures is {now.head_mean_cosine:.3f}, all embeddings are "
            "nearly one point: raise --koleo-weight (0.1), lower --lr, or start from trained weights with --init"
        )
    elif now.mean_vote_entropy < 0.3 * now.max_entropy:
        found.append(
            f"collapse: the mean vote's entropy is {now.mean_vote_entropy:.2f} of ln P = {now.max_entropy:.2f}, few "
            "prototypes are used: raise --koleo-weight or the batch size"
        )
    if now.effective_rank < 3 and now.effective_rank <= history[-2].effective_rank:
        found.append(
            f"dimensional collapse: the effective rank is {now.effective_rank:.1f} and not rising: raise "
            "--koleo-weight, or lower --lr"
        )
    return found
