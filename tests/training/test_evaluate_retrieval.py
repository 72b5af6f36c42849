"""Retrieval, kNN and linear probe from features."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from training.evaluate.linear import LEARNING_RATES, linear_probe
from training.evaluate.retrieval import knn_top1, retrieve, unit_rows
from training.knn import knn_accuracy, knn_vote


def angles(*degrees: float) -> np.ndarray:  # type: ignore[type-arg]
    a = np.radians(degrees)
    return np.stack([np.cos(a), np.sin(a)], 1).astype(np.float32)


def test_map_and_recall_by_hand() -> None:
    gallery, labels = angles(10, 20, 30, 40), np.array([1, 0, 1, 0])
    # From 0°: ranks 0, 1, 2, 3 → label 1 at 0 and 2; from 45°: order 40, 30, 20, 10 → label 1 at 1 and 3.
    found = retrieve(angles(0, 45, 5), np.array([1, 1, 7]), gallery, labels)
    assert found.counted.tolist() == [0, 1]  # nothing is relevant for label 7
    first, second = (1 + 2 / 3) / 2, (1 / 2 + 2 / 4) / 2
    assert found.mean_average_precision == pytest.approx((first + second) / 2)
    assert found.recall_at == {1: 0.5, 5: 1.0, 10: 1.0}
    assert found.ranks.tolist() == [0, 1]


def test_leave_one_out_retrieval_ignores_the_query_itself() -> None:
    x, y = angles(0, 1, 50, 52), np.array([0, 1, 0, 1])
    found = retrieve(x, y, x, y, own=np.arange(4))
    assert found.recall_at[1] == 0.0 and len(found.counted) == 4
    with pytest.raises(ValueError, match="no query has a relevant"):
        retrieve(x, np.arange(4), x, np.arange(4), own=np.arange(4))


def test_queries_of_which_only_some_are_in_the_gallery() -> None:
    gallery, labels = angles(0, 10, 20, 30), np.array([1, 0, 0, 1])
    # The first query is row 0 itself: 10, 20, 30 are left, relevant at 2. The second is not there: relevant at 0 and 3.
    own = np.array([0, -1])
    found = retrieve(angles(0, -1), np.array([1, 1]), gallery, labels, own)
    assert found.mean_average_precision == pytest.approx((1 / 3 + (1 + 2 / 4) / 2) / 2)
    assert found.ranks.tolist() == [2, 0]
    # Without the own row nothing of label 1 is near.
    assert knn_top1(angles(0), np.array([1]), gallery, labels, np.array([0]), k=1) == 0.0


def test_knn_agrees_with_a_plain_loop_and_with_training() -> None:
    rng = np.random.default_rng(0)
    bank, queries = unit_rows(rng.normal(size=(120, 6))), unit_rows(rng.normal(size=(50, 6)))
    labels, wanted = rng.integers(0, 4, 120), rng.integers(0, 4, 50)
    right = 0
    for query, label in zip(queries.astype(float), wanted, strict=True):
        cosines = bank.astype(float) @ query
        votes = np.zeros(4)
        for i in np.argsort(-cosines)[:20]:
            votes[labels[i]] += np.exp(cosines[i] / 0.07)
        right += int(votes.argmax() == label)
    assert knn_top1(queries, wanted, bank, labels) == right / 50
    tensors = (torch.from_numpy(a) for a in (bank, labels, queries, wanted))
    assert knn_accuracy(*tensors) == pytest.approx(right / 50)
    # Leave-one-out, and a label that the bank lacks, which is never right.
    own = np.arange(120)
    all_t = torch.from_numpy(bank), torch.from_numpy(labels)
    assert knn_top1(bank, labels, bank, labels, own) == pytest.approx(knn_accuracy(*all_t, *all_t, leave_one_out=True))
    assert knn_top1(queries, np.full(50, 9), bank, labels) == 0.0


def test_a_near_neighbour_outvotes_two_far_ones() -> None:
    cosines = torch.tensor([[0.9, 0.8, 0.8]])
    assert knn_vote(cosines, torch.tensor([[1, 0, 0]]), 2).item() == 1  # e^(0.1/0.07) = 4.2 > 2
    assert knn_vote(cosines, torch.tensor([[1, 0, 0]]), 2, temperature=1.0).item() == 0


def test_linear_probe_separates_what_is_linear_and_repeats_itself() -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, 10))
    labels = np.tile(np.arange(3), 60)
    # Features with very different scales, as raw [CLS] features have: standardisation matters.
    x = ((centres[labels] + 0.3 * rng.normal(size=(180, 10))) * 10.0 ** rng.integers(-3, 3, 10)).astype(np.float32)
    found = linear_probe(x[:120], labels[:120], x[120:], labels[120:], seed=0)
    assert found.top1 > 0.97
    assert set(found.held_out_top1) == set(LEARNING_RATES) and found.learning_rate in LEARNING_RATES
    assert max(found.held_out_top1.values()) == found.held_out_top1[found.learning_rate]
    assert found == linear_probe(x[:120], labels[:120], x[120:], labels[120:], seed=0)
    # Labels without a relation to the features stay at chance: the queries are not looked at.
    shuffled = linear_probe(x[:120], rng.permutation(labels[:120]), x[120:], labels[120:], seed=0)
    assert shuffled.top1 < 0.7


def test_linear_probe_works_with_one_picture_per_class() -> None:
    x = np.eye(4, dtype=np.float32)
    found = linear_probe(x, np.arange(4), x, np.arange(4), seed=0)
    assert found.top1 == 1.0 and found.held_out_top1 == {}
