"""Alarms: sentences about a run's measurements, each with advice. Thresholds come from measured runs (docs/monitors.md)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from training.knn import K
from training.monitor import GREY, INITIAL, RAW, UNTRAINED, Health
from training.statistics import CLUSTERS, EmbeddingStatistics

Kind = Literal[
    "not-finite", "point", "line", "clusters", "dimensional-collapse", "uniform-vote", "few-prototypes", "shortcut"
]

WARM_UP = 0.15  # of the steps; a healthy run's rank and spread dip here
SHORTCUT_AFTER = 1 / 3  # of the steps
POINT = 0.95  # mean cosine of the head's outputs
CLOSER = 0.1  # 1 − mean cosine of the features, of its value at step 0
LINE = 0.9  # share of the variance on one axis
CLUSTERED = 0.95  # share of the variance that at most 4 centres explain
LOW_RANK = 0.35  # of the network's effective rank at step 0, or ...
LOWEST_RANK = 3.0
UNIFORM = 0.97  # of the largest entropy
FEW = 0.3  # of the largest entropy
SAME_NEIGHBOURS = {RAW: 0.35, GREY: 0.35, UNTRAINED: 0.7}  # overlap@10 over chance, without labels, ...
UNTRAINED_AFTER = 0.5  # ... the last from this share of the steps on: a short healthy run leaves its start slowly


@dataclass(frozen=True)
class Alarm:
    """What is wrong, and what to do."""

    kind: Kind
    sentence: str
    advice: str

    def __str__(self) -> str:
        return f"{self.sentence}: {self.advice}"


_SPREAD = "raise --koleo-weight (0.1 holds on small sets), lower --lr, or start from trained weights with --init"


def alarms(history: list[Health], progress: float) -> list[Alarm]:
    """What the latest measurement is alarming about; empty while all is well.

    `history` in order of steps, `progress` the share of the steps done at its end. After warm-up only, and nothing fires
    that is recovering: a healthy run dips early. A loss or vote near ln P is no alarm by itself (spec/sop.md section 8).
    """
    now = history[-1]
    if math.isnan(now.features.mean_cosine) or math.isnan(now.heads.mean_cosine):
        return [Alarm("not-finite", "the embeddings are not finite", "lower --lr, or use --precision float32")]
    if progress < WARM_UP or len(history) < 2:
        return []
    found = _collapse(history)
    found += _votes(history)
    if progress >= SHORTCUT_AFTER and not found:  # a collapsed run has no neighbours to compare
        found += _shortcut(now, progress)
    return found


def _collapse(history: list[Health]) -> list[Alarm]:
    """The most specific form of collapse, at most one."""
    now, before = history[-1], history[-2]
    heads = now.heads
    # Features share a large mean in healthy ViTs: only what is far closer together than at step 0 counts.
    closer = max(POINT, 1 - CLOSER * (1 - now.initial.mean_cosine))
    for name, mean, limit, mean_before in (
        ("head's outputs", heads.mean_cosine, POINT, before.heads.mean_cosine),
        ("features", now.features.mean_cosine, closer, before.features.mean_cosine),
    ):
        if mean > limit and not _recovering(1 - mean, 1 - mean_before):
            text = f"collapse to a point: the mean cosine between different pictures is {mean:.3f} in the {name}"
            return [Alarm("point", text, _SPREAD)]
    for name, mine, last in (
        ("head's outputs", heads, before.heads),
        ("features", now.features, before.features),
    ):  # fmt: skip
        kind = _shape(mine)
        if kind is None or _recovering(_shape_left(mine), _shape_left(last)):
            continue
        few = next((k for k, share in zip(CLUSTERS, mine.cluster_share, strict=True) if share > CLUSTERED), 0)
        what = "a line" if kind == "line" else f"{few} clusters"
        share = 100 * (mine.line_share if kind == "line" else mine.cluster_share[CLUSTERS.index(few)])
        text = f"collapse to {what}: {share:.0f} % of the variance of the {name} is there"
        return [Alarm(kind, text, _SPREAD)]
    rank, first = now.features.effective_rank, now.initial.effective_rank
    low = rank < LOWEST_RANK or rank < LOW_RANK * first
    stuck = rank < LOWEST_RANK and not _recovering(rank, before.features.effective_rank)
    if low and (stuck or _falling(history, lambda h: h.features.effective_rank)):
        how = "not rising" if stuck else "still falling"
        text = f"dimensional collapse: the features' effective rank is {rank:.1f} ({first:.1f} at step 0) and {how}"
        return [Alarm("dimensional-collapse", text, _SPREAD)]
    return []


def _shape(statistics: EmbeddingStatistics) -> Literal["line", "clusters"] | None:
    if statistics.cluster_share[0] > CLUSTERED:
        return "clusters"  # two points lie on a line, too
    if statistics.line_share > LINE:
        return "line"
    return "clusters" if max(statistics.cluster_share) > CLUSTERED else None


def _shape_left(statistics: EmbeddingStatistics) -> float:
    """Share of the variance that neither a line nor few clusters explain."""
    return 1 - max(statistics.line_share, *statistics.cluster_share)


def _votes(history: list[Health]) -> list[Alarm]:
    now = history[-1]
    d = now.diagnostics
    voters, most = d.get("voter_entropy", math.nan), d.get("voter_max_entropy", math.nan)
    if math.isnan(voters):  # methods without voters: their vote is over prototypes directly
        voters, most = d.get("vote_entropy", math.nan), d.get("max_entropy", math.nan)
    crowded = now.heads.mean_cosine > 0.8 or now.heads.effective_rank < LOWEST_RANK
    if (
        voters > UNIFORM * most
        and crowded
        and not _recovering(1 - now.heads.mean_cosine, 1 - history[-2].heads.mean_cosine)
    ):
        text = (
            f"the votes are uniform (entropy {voters:.2f} of {most:.2f}) and the head's outputs lie close together (mean "
            f"cosine {now.heads.mean_cosine:.2f}, effective rank {now.heads.effective_rank:.1f}): prototypes do not differ"
        )
        return [Alarm("uniform-vote", text, _SPREAD)]
    mean, most = d.get("mean_vote_entropy", math.nan), d.get("max_entropy", math.nan)
    if mean < FEW * most:
        text = f"few prototypes are used: the mean vote's entropy is {mean:.2f} of {most:.2f}, as if about "
        text += f"{math.exp(mean):.0f} of {math.exp(most):.0f} were in use"
        return [Alarm("few-prototypes", text, "raise --koleo-weight or --batch-size, or lower --lr")]
    return []


def _shortcut(now: Health, progress: float) -> list[Alarm]:
    """Features that add nothing to pixels or to the untrained network. With labels kNN decides, otherwise overlap. What
    --init gave is no baseline here: the verdict at the end compares with it."""
    views = "choose --views that change what pictures share by accident (see docs/data.md), or train longer"
    # With fewer pictures per label than neighbours that vote, most votes are wrong however good the features are.
    if now.lead and now.diagnostics.get("pictures_per_label", math.inf) >= K:
        beaten = [
            f"{_named(name)} ({now.knn - points:.1f} %, difference {points:+.1f} ± {error:.1f})"
            for name, (points, error) in now.lead.items()
            if name != INITIAL and points <= error
        ]
        if beaten:
            text = f"shortcut: the features' kNN of {now.knn:.1f} % is no better than that of {' and of '.join(beaten)}"
            return [Alarm("shortcut", text, views)]
        return []
    over_chance = {name: (share - now.chance) / (1 - now.chance) for name, share in now.overlap.items()}
    same = [
        f"{100 * share:.0f} % those of {_named(name)}"
        for name, share in now.overlap.items()
        if over_chance[name] > SAME_NEIGHBOURS.get(name, 1.0) and (name != UNTRAINED or progress >= UNTRAINED_AFTER)
    ]
    if same:
        text = (
            f"shortcut: of the features' 10 nearest neighbours {' and '.join(same)} (chance {100 * now.chance:.1f} %)"
        )
        return [Alarm("shortcut", f"{text}, so that training adds little", views)]
    return []


def _named(baseline: str) -> str:
    return f"the {baseline}" if baseline == UNTRAINED else baseline


def _recovering(now: float, before: float) -> bool:
    """Whether what should be large has risen by a tenth since the measurement before, and is more than noise."""
    return now > 1.1 * before and now > 0.01


def _falling(history: list[Health], good: Callable[[Health], float]) -> bool:
    """Whether `good` falls: below the measurement before, and below the one before that where there is one."""
    values = [good(h) for h in history[-3:]]
    return all(b < a for a, b in itertools.pairwise(values))
