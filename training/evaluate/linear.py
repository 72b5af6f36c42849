"""The linear probe: logistic regression on frozen features, its learning rate chosen on a held-out part of the training
set, never on the queries."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from export.bundle import Embeddings

LEARNING_RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
BATCH = 256
HELD_OUT = 0.2
Labels = npt.NDArray[np.int64]


class LinearProbe(NamedTuple):
    """Its result."""

    top1: float
    """Accuracy on the queries."""
    learning_rate: float
    """The one chosen."""
    held_out_top1: dict[float, float]
    """Learning rate → accuracy on the held-out part."""
    epochs: int
    """Passes over the training set."""


def linear_probe(bank: Embeddings, bank_labels: Labels, queries: Embeddings, labels: Labels, seed: int) -> LinearProbe:
    """Train on `bank` [N, D], test on `queries` [M, D].

    Features are standardised with the training part's mean and deviation. SGD with momentum 0.9, batches of 256 and a
    cosine to zero; 100 epochs, fewer above 20,000 pictures (at least 10). The learning rate is the best of
    `LEARNING_RATES` on a fifth of each class held out of the bank; then the whole bank trains with it.
    """
    rng = np.random.default_rng(seed)
    held_out = _stratified(bank_labels, rng)
    classes = int(max(bank_labels.max(), labels.max())) + 1
    epochs = int(np.clip(2_000_000 / len(bank), 10, 100))
    part, rest = bank[~held_out], bank[held_out]
    rates = LEARNING_RATES
    scores = {}
    if len(rest):
        weights = _train(part, bank_labels[~held_out], rates, classes, epochs, rng)
        right = [_accuracy(weights, i, rest, bank_labels[held_out]) for i in range(len(rates))]
        scores = dict(zip(rates, right, strict=True))
        best = rates[int(np.argmax(right))]
    else:  # one picture per class: nothing to hold out
        best = 0.03
    final = _train(bank, bank_labels, (best,), classes, epochs, rng)
    return LinearProbe(_accuracy(final, 0, queries, labels), best, scores, epochs)


def _stratified(labels: Labels, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """A fifth of each class; nothing of a class with one picture."""
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        count = max(1, round(HELD_OUT * len(rows))) if len(rows) > 1 else 0
        chosen[rows[:count]] = True
    return chosen


class _Weights(NamedTuple):
    mean: Tensor  # D
    deviation: Tensor  # D
    matrix: Tensor  # R D C, one per learning rate
    bias: Tensor  # R 1 C


def _train(
    features: Embeddings, labels: Labels, rates: tuple[float, ...], classes: int, epochs: int, rng: np.random.Generator
) -> _Weights:
    """One classifier per learning rate, side by side, on the same batches."""
    x, y = torch.from_numpy(np.ascontiguousarray(features, np.float32)), torch.from_numpy(labels)
    mean, deviation = x.mean(0), x.std(0, correction=0).clamp_min(1e-6)
    x = (x - mean) / deviation
    matrix, bias = torch.zeros(len(rates), x.shape[1], classes), torch.zeros(len(rates), 1, classes)
    speeds = [torch.zeros_like(matrix), torch.zeros_like(bias)]
    rate = torch.tensor(rates).view(-1, 1, 1)
    per_epoch = -(-len(x) // BATCH)
    for epoch in range(epochs):
        order = torch.from_numpy(rng.permutation(len(x)))
        for step in range(per_epoch):
            rows = order[step * BATCH : (step + 1) * BATCH]
            progress = (epoch * per_epoch + step) / (epochs * per_epoch)
            now = rate * (0.5 * (1 + math.cos(math.pi * progress)))
            # ∂CE/∂logits = softmax − one-hot, averaged over the batch.
            error = (x[rows] @ matrix + bias).softmax(-1)  # R B C
            error[:, torch.arange(len(rows)), y[rows]] -= 1.0
            error /= len(rows)
            for value, gradient, speed in (
                (matrix, x[rows].T @ error, speeds[0]),
                (bias, error.sum(1, keepdim=True), speeds[1]),
            ):
                speed.mul_(0.9).add_(gradient)
                value.sub_(now * speed)
    return _Weights(mean, deviation, matrix, bias)


def _accuracy(weights: _Weights, which: int, features: Embeddings, labels: Labels) -> float:
    x = (torch.from_numpy(features) - weights.mean) / weights.deviation
    chosen = (x @ weights.matrix[which] + weights.bias[which]).argmax(-1).numpy()
    return float((chosen == labels).mean())
