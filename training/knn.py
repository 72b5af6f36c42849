"""Weighted k-nearest-neighbour classification (spec/sop.md section 5), and the label-free baselines beside it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

K = 20
TEMPERATURE = 0.07


def knn_accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, k: int = K, temperature: float = TEMPERATURE,
    leave_one_out: bool = False,
) -> float:  # fmt: skip
    """Share of queries whose k nearest rows vote for the right label with weight exp(cos / temperature).

    bank [N, D], queries [M, D] (normalised here). `leave_one_out`: the queries are the bank, and none votes on itself.
    """
    bank, queries = F.normalize(bank.float(), dim=1), F.normalize(queries.float(), dim=1)
    classes = int(bank_labels.max()) + 1
    right = 0
    for low in range(0, len(queries), 1024):
        similarity = queries[low : low + 1024] @ bank.T
        if leave_one_out:
            rows = torch.arange(len(similarity))
            similarity[rows, rows + low] = -2.0
        top, index = similarity.topk(min(k, len(bank) - int(leave_one_out)), dim=1)
        chosen = knn_vote(top, bank_labels[index], classes, temperature)
        right += int((chosen == labels[low : low + 1024]).sum())
    return right / len(queries)


def knn_vote(cosines: Tensor, labels: Tensor, classes: int, temperature: float = TEMPERATURE) -> Tensor:
    """The class with the largest sum of exp(cos / temperature): cosines and labels [M, k] → classes [M]."""
    weights = (cosines.double() / temperature).exp()  # float64: at cosine 1 the weight is 1.6 million
    votes = torch.zeros(len(cosines), classes, dtype=torch.float64).scatter_add_(1, labels, weights)
    return votes.argmax(1)


def pixel_features(pictures: Tensor, grey: bool, side: int = 32) -> Tensor:
    """Raw pixels as features: uint8 [N, S, S, 3] → [N, D]. With `grey`: luminance, each picture's mean removed and
    scaled to unit deviation."""
    x = pictures.permute(0, 3, 1, 2).float() / 255.0
    if x.shape[-1] > side:
        x = F.interpolate(x, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
    if grey:
        x = (x * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
        x = (x - x.mean((1, 2, 3), keepdim=True)) / (x.std((1, 2, 3), keepdim=True) + 1e-6)
    return x.flatten(1)
