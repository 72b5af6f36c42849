"""The alarms on injected embeddings. Real runs that trip them: benchmarks/alarms.py."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.alarms import run
from tests.shapes import SHAPES, draw_shape
from training.alarms import Alarm, alarms
from training.knn import pixel_features
from training.monitor import Health, Monitor

COUNT = 160


def normal(dim: int, seed: int, rows: int = COUNT) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))


def labels() -> Tensor:
    return torch.arange(COUNT) % 8


def learned(seed: int = 0, noise: float = 0.8) -> Tensor:
    """Embeddings of 48 dimensions in which the classes show."""
    return 4 * F.one_hot(labels(), 48).float() + noise * normal(48, seed)


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    rng = np.random.default_rng(0)
    return torch.from_numpy(np.stack([np.asarray(draw_shape(SHAPES[i % 8], rng)) for i in range(COUNT)]))


@pytest.fixture(scope="module")
def watch(pixels: Tensor) -> Monitor:
    found = Monitor(pixels, labels(), lambda x: x.float(), torch.device("cpu"))
    found.start(normal(48, 9) + 1)
    return found


@pytest.fixture(scope="module")
def blind(pixels: Tensor) -> Monitor:
    """The same without labels."""
    found = Monitor(pixels, None, lambda x: x.float(), torch.device("cpu"))
    found.start(normal(48, 9) + 1)
    return found


@pytest.fixture(scope="module")
def healthy(watch: Monitor) -> Health:
    return watch.judge(learned(), normal(32, 1), {"vote_entropy": 2.0, "mean_vote_entropy": 4.0, "max_entropy": 4.16})


def kinds(found: list[Alarm]) -> list[str]:
    return [alarm.kind for alarm in found]


def test_health_is_silent(healthy: Health) -> None:
    assert alarms([healthy], 0.0) == alarms([healthy, healthy], 0.5) == alarms([healthy] * 11, 1.0) == []


POINT = torch.ones(COUNT, 32) + 0.01 * normal(32, 2)
LINE = normal(32, 3, 1) + normal(1, 4) * normal(32, 5, 1) + 0.05 * normal(32, 6)
TWO = normal(32, 7, 2)[torch.arange(COUNT) % 2] + 0.02 * normal(32, 8)
FOUR = normal(32, 7, 4)[torch.arange(COUNT) % 4] + 0.02 * normal(32, 8)


@pytest.mark.parametrize(
    ("broken", "kind", "words"),
    [
        (POINT, "point", "mean cosine"),
        (LINE, "line", "a line"),
        (TWO, "clusters", "2 clusters"),
        (FOUR, "clusters", "4 clusters"),
    ],
)
@pytest.mark.parametrize("where", ["both", "features", "heads"])
def test_injected_collapse_is_named(
    watch: Monitor, healthy: Health, broken: Tensor, kind: str, words: str, where: str
) -> None:
    features = learned() if where == "heads" else broken
    heads = normal(32, 1) if where == "features" else broken
    collapsed = watch.judge(features, heads, {})
    for history in ([healthy, collapsed], [healthy, collapsed, collapsed]):
        found = alarms(history, 0.5)
        assert kinds(found)[0] == kind and words in found[0].sentence and "--koleo-weight" in found[0].advice
    assert alarms([healthy, collapsed], 0.1) == []  # not during warm-up


def test_features_that_share_a_large_mean_are_no_point(pixels: Tensor) -> None:
    """ViTs do from the start (cosine 0.96–0.99 untrained, spec/sop.md section 8)."""
    watch = Monitor(pixels, labels(), lambda x: x.float(), torch.device("cpu"))
    watch.start(normal(48, 9) + 8)
    health = watch.judge(learned() + 10, normal(32, 1), {})
    assert health.features.mean_cosine > 0.97
    assert alarms([health, health], 0.5) == []


def test_what_recovers_is_no_collapse(watch: Monitor, healthy: Health) -> None:
    """A healthy run may still be coming out of its early dip after warm-up."""
    deep = watch.judge(learned(), torch.ones(COUNT, 32) + 0.12 * normal(32, 2), {})
    better = watch.judge(learned(), torch.ones(COUNT, 32) + 0.2 * normal(32, 2), {})
    assert 0.95 < better.heads.mean_cosine < deep.heads.mean_cosine < 0.99
    assert alarms([healthy, deep, better], 0.2) == []
    assert kinds(alarms([healthy, better, deep], 0.3)) == ["point"]


def test_a_low_rank_alarms_only_while_it_falls(watch: Monitor, healthy: Health) -> None:
    def with_rank(rank: float) -> Health:
        return replace(healthy, features=replace(healthy.features, effective_rank=rank))

    first = healthy.initial.effective_rank
    assert first > 30
    low = 0.3 * first
    assert kinds(alarms([with_rank(first), with_rank(low), with_rank(0.9 * low)], 0.4)) == ["dimensional-collapse"]
    assert alarms([with_rank(first), with_rank(0.9 * low), with_rank(low)], 0.4) == []  # rising again
    assert alarms([with_rank(first), with_rank(0.7 * first), with_rank(0.6 * first)], 0.4) == []  # falling, not low
    assert alarms([with_rank(first), with_rank(low)], 0.1) == []


def test_a_uniform_vote_alone_is_no_alarm(watch: Monitor, healthy: Health) -> None:
    uniform = {"vote_entropy": 4.15, "mean_vote_entropy": 4.158, "max_entropy": 4.16, "voter_max_entropy": 5.77}
    leaky = {**uniform, "voter_entropy": 3.0}  # the votes leak, the voters are told apart
    flat = {**uniform, "voter_entropy": 5.76}
    assert alarms([healthy, replace(healthy, diagnostics=leaky)], 0.5) == []
    assert alarms([healthy, replace(healthy, diagnostics=flat)], 0.5) == []  # the embeddings are spread
    crowded = watch.judge(learned(), torch.ones(COUNT, 32) + 0.3 * normal(32, 2), flat)
    assert 0.8 < crowded.heads.mean_cosine < 0.95
    found = alarms([healthy, crowded, crowded], 0.5)
    assert kinds(found) == ["uniform-vote"] and "5.76 of 5.77" in found[0].sentence
    assert alarms([healthy, crowded, replace(crowded, diagnostics=leaky)], 0.5) == []


def test_few_prototypes(healthy: Health) -> None:
    few = replace(healthy, diagnostics={"mean_vote_entropy": 0.7, "max_entropy": 4.16})
    found = alarms([healthy, few], 0.5)
    assert kinds(found) == ["few-prototypes"] and "about 2 of 64" in found[0].sentence


def test_what_is_not_finite_is_said_at_once(watch: Monitor, healthy: Health) -> None:
    for features, heads in ((normal(48, 1) * math.nan, normal(32, 1)), (normal(48, 1), normal(32, 1) * math.inf)):
        assert kinds(alarms([watch.judge(features, heads, {})], 0.0)) == ["not-finite"]


def test_features_that_are_pixels_trip_the_shortcut_alarm_with_labels(watch: Monitor, pixels: Tensor) -> None:
    copied = watch.judge(pixel_features(pixels, grey=False), normal(32, 1), {})
    assert copied.lead["raw pixels"] == (0, 0)
    found = alarms([copied, copied], 0.4)
    assert kinds(found) == ["shortcut"] and "raw pixels" in found[0].sentence and "--views" in found[0].advice
    assert alarms([copied, copied], 0.3) == []  # before a third of the steps
    assert kinds(alarms([copied, copied], 1.0)) == ["shortcut"]


def test_an_encoder_that_stays_untrained_trips_the_shortcut_alarm_with_labels(watch: Monitor) -> None:
    untrained = watch.judge(normal(48, 9) + 1, normal(32, 1), {})
    found = alarms([untrained, untrained], 0.5)
    assert kinds(found) == ["shortcut"] and "untrained network" in found[0].sentence


def test_a_lead_within_its_standard_error_is_none(healthy: Health) -> None:
    def leads_by(points: float) -> Health:
        return replace(healthy, lead={**healthy.lead, "grey pixels": (points, 1.2)})

    assert alarms([healthy, leads_by(3.0)], 0.5) == []
    assert kinds(alarms([healthy, leads_by(1.0)], 0.5)) == ["shortcut"]


def test_few_pictures_per_label_decide_nothing(healthy: Health) -> None:
    def behind(pictures_per_label: float) -> Health:
        lead = {**healthy.lead, "grey pixels": (-5.0, 1.2)}
        return replace(healthy, lead=lead, diagnostics={"pictures_per_label": pictures_per_label})

    assert kinds(alarms([healthy, behind(21.0)], 0.5)) == ["shortcut"]
    assert alarms([healthy, behind(12.0)], 0.5) == []  # k = 20 neighbours vote


def test_shortcut_without_labels_goes_by_neighbours(blind: Monitor, pixels: Tensor) -> None:
    health = blind.judge(learned(), normal(32, 1), {})
    assert health.lead == {} and alarms([health, health], 0.5) == []
    copied = blind.judge(pixel_features(pixels, grey=False), normal(32, 1), {})
    found = alarms([copied, copied], 0.5)
    assert kinds(found) == ["shortcut"] and "100 % those of raw pixels" in found[0].sentence
    same = blind.judge(normal(48, 9) + 1 + 0.01 * normal(48, 10), normal(32, 1), {})
    assert kinds(alarms([same, same], 0.5)) == ["shortcut"]
    assert alarms([copied, copied], 0.2) == []
    # Among few pictures many neighbours are shared by chance.
    few = replace(health, overlap={"raw pixels": 0.45}, chance=10 / 31)
    assert alarms([few, few], 0.5) == []
    assert kinds(alarms([replace(few, chance=0.005)] * 2, 0.5)) == ["shortcut"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["healthy", "shortcut", "collapse", "unlabelled"])
def test_runs_that_fail_are_told_from_a_run_that_works(name: str, tmp_path: Path) -> None:
    """Real trainings, about 40 CPU seconds each."""
    (tmp_path / "pictures").mkdir()
    history, found = run(tmp_path, name, steps=150, seed=0, threads=1)
    said = {alarm["kind"] for alarm in found}
    last = history[-1]
    if name == "healthy":
        assert said == set() and min(points for points, _ in last.lead.values()) > 10
    elif name == "collapse":
        assert said & {"point", "line", "clusters", "dimensional-collapse"} and last.heads.mean_cosine > 0.95
    else:
        assert said == {"shortcut"} and bool(last.lead) == (name == "shortcut")
