"""Metrics against hand-computed values, and against scikit-learn where definitions coincide."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, precision_recall_curve

from training.evaluate.metrics import (
    average_precision,
    bootstrap,
    micro_average_precision,
    precision_recall,
    recall_at_precision,
    trapezoid_average_precision,
)


def test_average_precision_by_hand() -> None:
    # Relevant at ranks 0, 2 and 5 of a ranking, one more never found: (1/1 + 2/3 + 3/6) / 4.
    assert average_precision(np.array([5, 0, 2]), 4) == pytest.approx((1 + 2 / 3 + 1 / 2) / 4, abs=1e-15)
    # Trapezoids: (1 + 1)/2, (1/2 + 2/3)/2, (2/5 + 3/6)/2.
    expected = (1 + (1 / 2 + 2 / 3) / 2 + (2 / 5 + 3 / 6) / 2) / 4
    assert trapezoid_average_precision(np.array([0, 2, 5]), 4) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("seed", range(5))
def test_average_precision_agrees_with_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    relevant = rng.random(200) < 0.1
    scores = rng.permutation(200).astype(float)  # distinct: scikit-learn groups ties
    ranks = np.flatnonzero(relevant[np.argsort(-scores)])
    theirs = average_precision_score(relevant, scores)
    assert average_precision(ranks, len(ranks)) == pytest.approx(theirs, abs=1e-12)
    # The trapezoid rule differs: it takes the mean of the precision before and at each relevant item.
    assert trapezoid_average_precision(ranks, len(ranks)) < theirs


def test_both_definitions_are_1_for_a_perfect_ranking_and_refuse_nothing_relevant() -> None:
    assert average_precision(np.arange(7), 7) == trapezoid_average_precision(np.arange(7), 7) == pytest.approx(1.0)
    for ap in (average_precision, trapezoid_average_precision):
        with pytest.raises(ValueError, match="leave it out"):
            ap(np.array([], np.int64), 0)


@pytest.mark.parametrize("levels", [7, 100_000])
def test_micro_ap_agrees_with_scikit_learn_ties_included(levels: int) -> None:
    rng = np.random.default_rng(levels)
    scores = rng.integers(0, levels, 500) / levels
    correct = rng.random(500) < scores
    assert micro_average_precision(scores, correct, int(correct.sum())) == pytest.approx(
        average_precision_score(correct, scores), abs=1e-12
    )
    precision, recall, _ = precision_recall_curve(correct, scores)
    ours = precision_recall(scores, correct, int(correct.sum()))
    np.testing.assert_allclose(ours.recall[::-1], recall[:-1], atol=1e-12)
    np.testing.assert_allclose(ours.precision[::-1], precision[:-1], atol=1e-12)


def test_micro_ap_counts_what_was_never_a_candidate() -> None:
    # Two of three positives are among the pairs: 0.9 right, 0.8 wrong, 0.7 right → (1/3)·1 + (1/3)·(2/3).
    scores, correct = np.array([0.7, 0.9, 0.8]), np.array([True, True, False])
    assert micro_average_precision(scores, correct, 3) == pytest.approx(1 / 3 + 2 / 9, abs=1e-15)
    assert recall_at_precision(scores, correct, 3, 0.9) == pytest.approx(1 / 3)
    assert recall_at_precision(scores, correct, 3, 0.6) == pytest.approx(2 / 3)
    assert recall_at_precision(np.array([0.9, 0.1]), np.array([False, True]), 1, 0.9) == 0.0


def test_bootstrap_error_is_that_of_a_mean() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    found = bootstrap(values, seed=1, draws=4000)
    assert found.mean == pytest.approx(values.mean())
    assert found.standard_error == pytest.approx(values.std() / 20, rel=0.05)
    assert found.low < found.mean < found.high
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.08)
    assert found == bootstrap(values, seed=1, draws=4000) != bootstrap(values, seed=2, draws=4000)
