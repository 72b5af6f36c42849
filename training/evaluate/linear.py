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
    `LEARNING_RATES` on a fifth of each class held out of the bank, each after a quarter of the epochs; then the whole
    bank trains with it.
    """
    rng = np.random.default_rng(seed)
    held_out = _stratified(bank_labels, rng)
    classes = int(max(bank_labels.max(), labels.max())) + 1
    epochs = int(np.clip(2_000_000 / len(bank), 10, 100))
    part, rest = bank[~held_out], bank[held_out]
    rates = LEARNING_RATES
    scores = {}
    if len(rest):
        weights = _train(part, bank_labels[~held_out], rates, classes, -(-epochs // 4), rng)
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
    matrix: Tensor  # D R·C, the classes of one learning rate after those of another
    bias: Tensor  # R·C
    classes: int


def _train(
    features: Embeddings, labels: Labels, rates: tuple[float, ...], classes: int, epochs: int, rng: np.random.Generator
) -> _Weights:
    """One classifier per learning rate, side by side, on the same batches."""
    x, y = torch.from_numpy(np.ascontiguousarray(features, np.float32)), torch.from_numpy(labels)
    mean, deviation = x.mean(0), x.std(0, correction=0).clamp_min(1e-6)
    x = (x - mean) / deviation
    matrix, bias = torch.zeros(x.shape[1], len(rates) * classes), torch.zeros(len(rates) * classes)
    speeds = [torch.zeros_like(matrix), torch.zeros_like(bias)]
    rate = torch.tensor(rates).repeat_interleave(classes)
    per_epoch = -(-len(x) // BATCH)
    for epoch in range(epochs):
        order = torch.from_numpy(rng.permutation(len(x)))
        for step in range(per_epoch):
            rows = order[step * BATCH : (step + 1) * BATCH]
            progress = (epoch * per_epoch + step) / (epochs * per_epoch)
            now = rate * (0.5 * (1 + math.cos(math.pi * progress)))
            # ∂CE/∂logits = softmax − one-hot, averaged over the batch.
            some = x[rows]
            error = torch.addmm(bias, some, matrix).view(len(rows), len(rates), classes).softmax(-1)
            error[torch.arange(len(rows)), :, y[rows]] -= 1.0
            error = error.view(len(rows), -1) / len(rows)
            for value, gradient, speed in ((matrix, some.T @ error, speeds[0]), (bias, error.sum(0), speeds[1])):
                speed.mul_(0.9).add_(gradient)
                value.sub_(now * speed)
    return _Weights(mean, deviation, matrix, bias, classes)


def _accuracy(weights: _Weights, which: int, features: Embeddings, labels: Labels) -> float:
    x = (torch.from_numpy(features) - weights.mean) / weights.deviation
    columns = slice(which * weights.classes, (which + 1) * weights.classes)
    chosen = (x @ weights.matrix[:, columns] + weights.bias[columns]).argmax(-1).numpy()
    return float((chosen == labels).mean())
