"""The measurements: statistics of embeddings, baselines, and what a resume rebuilds."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from export.bundle import RefusalError
from likewise import main
from tests.conftest import TINY
from tests.shapes import SHAPES, draw_shape
from training.knn import knn_accuracy
from training.monitor import BASELINES, Health, Monitor, read_history
from training.statistics import (
    difference,
    effective_rank,
    embedding_statistics,
    knn_right,
    mean_cosine,
    nearest,
    overlap,
)


def normal(rows: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))


def sample(count: int = 64) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(0)
    drawn = [np.asarray(draw_shape(SHAPES[i % 8], rng)) for i in range(count)]
    return torch.from_numpy(np.stack(drawn)), torch.arange(count) % 8


def monitor(labelled: bool = True, count: int = 64) -> Monitor:
    pictures, labels = sample(count)
    return Monitor(pictures, labels if labelled else None, lambda x: x.permute(0, 3, 1, 2) / 255, torch.device("cpu"))


def test_statistics_equal_their_definitions() -> None:
    x = normal(40, 16) + 0.5
    found = embedding_statistics(x)
    u = F.normalize(x.double(), dim=1)
    pairs = (u @ u.T)[~torch.eye(40, dtype=torch.bool)].view(40, 39)
    assert found.mean_cosine == pytest.approx(float(pairs.mean()))
    assert found.mean_cosine == pytest.approx(mean_cosine(x))
    assert found.std == pytest.approx(float(u.std(0, correction=0).mean()) * 4)
    assert found.effective_rank == pytest.approx(effective_rank(x))
    near = float(pairs.topk(10, dim=1).values.mean())
    assert found.neighbour_cosine == pytest.approx(near, abs=1e-5)
    excess = (near - float(pairs.mean())) / float(pairs.std(correction=0))
    assert found.neighbour_excess == pytest.approx(excess, abs=1e-4)
    variances = torch.linalg.eigvalsh((u - u.mean(0)).T @ (u - u.mean(0)))
    assert found.line_share == pytest.approx(float(variances[-1] / variances.sum()))


def test_embeddings_that_fill_the_sphere_and_those_that_do_not() -> None:
    full = embedding_statistics(normal(400, 32))
    assert abs(full.mean_cosine) < 0.02 and full.std == pytest.approx(1, abs=0.02) and full.effective_rank > 28
    assert full.line_share < 0.1 and max(full.cluster_share) < 0.3
    point = embedding_statistics(torch.ones(400, 32) + 1e-4 * normal(400, 32))
    assert point.mean_cosine > 0.999 and point.std < 0.01
    exact = embedding_statistics(torch.ones(400, 32))
    assert exact.mean_cosine == pytest.approx(1) and exact.line_share == 1 and exact.cluster_share == (1, 1, 1)
    line = embedding_statistics(normal(1, 32) + normal(400, 1, 1) * normal(1, 32, 2) + 1e-2 * normal(400, 32, 3))
    assert line.line_share > 0.9 and line.effective_rank < 4
    centres = normal(3, 32)
    clusters = embedding_statistics(centres[torch.arange(400) % 3] + 0.02 * normal(400, 32, 1))
    assert clusters.cluster_share[0] < 0.95 < clusters.cluster_share[1]  # three, not two


def test_what_is_not_finite_is_nan() -> None:
    x = normal(40, 8)
    x[3, 2] = math.nan
    assert math.isnan(embedding_statistics(x).mean_cosine)
    watch = monitor()
    watch.start(normal(64, 8))
    health = watch.judge(torch.full((64, 8), math.nan), normal(64, 8), {}, 5)
    assert math.isnan(health.knn) and health.overlap == {} and "knn" not in health.line()


def test_neighbours_leave_the_picture_itself_out_and_knn_is_the_protocols() -> None:
    x, labels = normal(60, 8) + 2 * F.one_hot(torch.arange(60) % 4, 8), torch.arange(60) % 4
    found = nearest(x, 20)
    assert not bool((found.rows == torch.arange(60)[:, None]).any())
    expected = knn_accuracy(x, labels, x, labels, leave_one_out=True)
    assert float(knn_right(found, labels).float().mean()) == pytest.approx(expected)
    assert 0.3 < expected < 1


def test_overlap_and_paired_difference() -> None:
    a, b = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[2, 1], [4, 9]])
    assert overlap(a, b) == 0.75
    points, error = difference(torch.tensor([True] * 60 + [False] * 40), torch.tensor([True] * 50 + [False] * 50))
    assert points == pytest.approx(10) and error == pytest.approx(3.0)  # sqrt(0.1 · 0.9 / 100)


def test_baselines_are_measured_once_and_survive_a_resume() -> None:
    watch = monitor()
    untrained = normal(64, 8)
    watch.start(untrained)
    assert tuple(watch.baselines()) == BASELINES[:3]
    assert [line for line in watch.lines() if "to beat: kNN" in line] == watch.lines() and len(watch.lines()) == 3
    again = monitor()
    again.load(watch.state())
    features, heads = normal(64, 8, 1), normal(64, 8, 2)
    assert again.judge(features, heads, {}, 7) == watch.judge(features, heads, {}, 7)
    assert watch.judge(untrained, heads, {}).overlap["untrained network"] == 1.0
    assert watch.judge(untrained, heads, {}).lead["untrained network"] == (0, 0)


def test_without_labels_there_are_neighbours_but_no_knn() -> None:
    watch = monitor(labelled=False)
    watch.start(normal(64, 8))
    health = watch.judge(normal(64, 8, 1), normal(64, 8, 2), {})
    assert math.isnan(health.knn) and health.lead == {} and watch.baselines() == {}
    assert health.chance == pytest.approx(10 / 63)
    assert health.overlap["raw pixels"] == pytest.approx(health.chance, abs=0.08)  # unrelated features
    assert all("no labels" in line for line in watch.lines())


def test_baselines_of_another_sample_are_refused() -> None:
    watch = monitor()
    watch.start(normal(64, 8))
    with pytest.raises(RefusalError, match="64 pictures with labels, the sample has 64 without"):
        monitor(labelled=False).load(watch.state())
    with pytest.raises(RefusalError, match="the sample has 48 with"):
        monitor(count=48).load(watch.state())
    with pytest.raises(RefusalError, match="at least 3"):
        monitor(count=2)


def test_a_measurement_survives_its_line() -> None:
    watch = monitor()
    health = watch.judge(normal(64, 8, 1), normal(64, 8, 2), {"leak": 0.25, "memory_age": 3.0}, 40)
    assert Health.from_line(json.loads(json.dumps(health.line()))) == health


def test_a_run_prints_the_baselines_and_a_resume_continues_its_history(
    pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = [
        "train",
        str(pictures),
        "--out",
        str(tmp_path / "run"),
        "--resume",
        "--steps",
        "4",
        "--momentum",
        "0",
        *TINY,
    ]
    assert main(flags) == 0
    first = capfd.readouterr().err
    assert first.count("to beat: kNN") == 3
    history = read_history(tmp_path / "run" / "metrics.jsonl")
    assert [h.step for h in history] == [0, 1, 2, 3, 4]
    assert history[0].overlap["untrained network"] == 1.0 and history[-1].overlap["untrained network"] < 1.0
    assert main(flags) == 0  # nothing left to do: the last measurement is made again, against the same baselines
    again = capfd.readouterr().err
    assert [s for s in again.splitlines() if "to beat" in s] == [s for s in first.splitlines() if "to beat" in s]
    assert read_history(tmp_path / "run" / "metrics.jsonl") == history
    assert read_history(tmp_path / "run" / "metrics.jsonl", until=3) == history[:3]
