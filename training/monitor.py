"""Knowing whether it works: measurements on a fixed sample, beside what the same sample's pixels and the untrained network
give. `training/alarms.py` turns them into sentences; docs/monitors.md says what healthy and unhealthy runs measured."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export.bundle import RefusalError
from training.encoder import Teacher, class_features
from training.knn import K, pixel_features
from training.snapshots import patch_similarity
from training.statistics import (
    CLUSTERS,
    NEIGHBOURS,
    EmbeddingStatistics,
    difference,
    effective_rank,
    embedding_statistics,
    knn_right,
    mean_cosine,
    nearest,
    overlap,
)

__all__ = ["SAMPLE", "Health", "Monitor", "effective_rank", "mean_cosine", "read_history"]

SAMPLE = 2000
RAW, GREY, UNTRAINED, INITIAL = "raw pixels", "grey pixels", "untrained network", "initial network"
BASELINES = (RAW, GREY, UNTRAINED, INITIAL)  # a run has three of them: what it started from is one of the last two
_STATISTICS = ("mean_cosine", "std", "effective_rank", "neighbour_cosine", "neighbour_excess", "line_share")


@dataclass(frozen=True)
class Health:
    """One measurement of the teacher."""

    step: int
    """Steps done."""
    features: EmbeddingStatistics
    """Of the backbone's [CLS] features, which are exported."""
    heads: EmbeddingStatistics
    """Of the head's outputs, which the objective compares."""
    initial: EmbeddingStatistics
    """Of the features at step 0."""
    knn: float = math.nan
    """Leave-one-out kNN accuracy in %, k = 20, temperature 0.07; nan without labels."""
    lead: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Per baseline: kNN minus the baseline's kNN and the standard error of the difference, in points; empty without
    labels."""
    overlap: dict[str, float] = field(default_factory=dict)
    """Per baseline: share of the 10 nearest neighbours that the baseline finds too, 0…1."""
    chance: float = 0.0
    """The overlap of unrelated neighbour lists, 10 / (M − 1)."""
    diagnostics: dict[str, float] = field(default_factory=dict)
    """The method's own: vote_entropy, mean_vote_entropy, max_entropy, voter_entropy, voter_max_entropy, leak,
    support_cosine, memory_age, ...; what does not apply is absent."""

    def line(self) -> dict[str, Any]:
        """Flat values for metrics.jsonl; what is nan is left out."""
        values: dict[str, Any] = {"step": self.step, "health": True, "knn": self.knn, "chance_overlap": self.chance}
        for prefix, statistics in (("", self.features), ("head_", self.heads), ("initial_", self.initial)):
            values |= {prefix + name: getattr(statistics, name) for name in _STATISTICS}
            values |= {f"{prefix}cluster_share_{k}": s for k, s in zip(CLUSTERS, statistics.cluster_share, strict=True)}
        for name, (points, error) in self.lead.items():
            values |= {f"knn_over {name}": points, f"knn_over {name} error": error}
        values |= {f"overlap {name}": value for name, value in self.overlap.items()}
        values |= self.diagnostics
        return {k: v for k, v in values.items() if not (isinstance(v, float) and math.isnan(v))}

    @classmethod
    def from_line(cls, values: dict[str, Any]) -> Health:
        """The inverse of `line`."""
        left = {k: v for k, v in values.items() if k not in ("step", "health")}

        def take(name: str) -> float:
            return float(left.pop(name, math.nan))

        def statistics(prefix: str) -> EmbeddingStatistics:
            shares = tuple(take(f"{prefix}cluster_share_{k}") for k in CLUSTERS)
            return EmbeddingStatistics(**{name: take(prefix + name) for name in _STATISTICS}, cluster_share=shares)

        features, heads, initial = statistics(""), statistics("head_"), statistics("initial_")
        lead = {n: (take(f"knn_over {n}"), take(f"knn_over {n} error")) for n in BASELINES if f"knn_over {n}" in left}
        shared = {n: take(f"overlap {n}") for n in BASELINES if f"overlap {n}" in left}
        knn, chance = take("knn"), take("chance_overlap")
        rest = {name: float(value) for name, value in left.items()}
        return cls(int(values["step"]), features, heads, initial, knn, lead, shared, chance, rest)


def read_history(metrics: Path, until: int | None = None) -> list[Health]:
    """The measurements in a run's metrics.jsonl, in order, up to and without step `until`: what `alarms` needs after a
    resume. Lines that a kill cut short are left out."""
    found = []
    for line in metrics.read_text().splitlines() if metrics.is_file() else ():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if "health" in values and (until is None or values["step"] < until):
            found.append(Health.from_line(values))
    return found


class Monitor:
    """Embeds a fixed sample and measures it.

    `pictures` uint8 [M, size, size, 3], preprocessed as at inference; `labels` int64 [M] in 0…classes − 1, or None;
    `normalise` uint8 [B, size, size, 3] → float32 [B, 3, size, size]; `trained`: the network starts from --init weights,
    and is called initial instead of untrained. Raises `RefusalError` for fewer than 3 pictures.

    Call `start` once at step 0, or `load` after a resume; then `measure` as often as wanted.
    """

    def __init__(
        self, pictures: Tensor, labels: Tensor | None, normalise: Callable[[Tensor], Tensor], device: torch.device,
        trained: bool = False,
    ) -> None:  # fmt: skip
        if len(pictures) < 3:
            raise RefusalError(
                f"{len(pictures)} of the sampled pictures can be read, the monitors need at least 3: restore the folder"
            )
        self.pictures = pictures
        self.labels = labels
        self._normalise = normalise
        self._device = device
        self._start = INITIAL if trained else UNTRAINED
        self._neighbours: dict[str, Tensor] = {}
        self._right: dict[str, Tensor] = {}
        self._initial: EmbeddingStatistics | None = None
        self.latest: Tensor | None = None
        """Features [M, C] of the latest measurement, for the neighbour sheets."""

    def features(self, teacher: Teacher) -> tuple[Tensor, Tensor]:
        """[CLS] features [M, C] and head outputs [M, d], float32 on the CPU."""
        features = class_features(teacher.backbone, self.pictures, self._normalise, self._device)
        dtype = next(teacher.head.parameters()).dtype
        with torch.no_grad():
            return features, teacher.head(features.to(self._device, dtype)).float().cpu()

    def maps(self, teacher: Teacher, rows: Tensor) -> Tensor:
        """Patch similarities [len(rows), 2, h, w] of the sample's pictures `rows` (`training.snapshots`)."""
        return patch_similarity(teacher, self._normalise(self.pictures[rows].to(self._device)))

    # --- baselines ----------------------------------------------------------------------------------------------

    def start(self, features: Tensor) -> None:
        """Compute and keep the baselines: raw pixels, grey pixels, and `features` [M, C] of the network at step 0
        (untrained, or what --init gave)."""
        sources = {
            RAW: pixel_features(self.pictures, grey=False),
            GREY: pixel_features(self.pictures, grey=True),
            self._start: features,
        }
        self._initial = embedding_statistics(features)
        for name, x in sources.items():
            found = nearest(torch.nan_to_num(x), K)
            self._neighbours[name] = found.rows[:, :NEIGHBOURS].to(torch.int32)
            if self.labels is not None:
                self._right[name] = knn_right(found, self.labels)

    def baselines(self) -> dict[str, float]:
        """Leave-one-out kNN accuracy in % per baseline; empty without labels. After `start` or `load`."""
        return {name: 100 * float(right.float().mean()) for name, right in self._right.items()}

    def lines(self) -> list[str]:
        """What to print at step 0 of every run: each baseline's kNN, or without labels how far their neighbours agree."""
        if self._right:
            classes = int(self.labels.max()) + 1 if self.labels is not None else 0
            return [f"to beat: kNN {value:4.1f} % from {name} ({classes} folders as labels)"
                    for name, value in self.baselines().items()]  # fmt: skip
        chance = NEIGHBOURS / (len(self.pictures) - 1)
        return [
            f"baseline: {100 * overlap(self._neighbours[self._start], self._neighbours[name]):4.1f} % of the "
            f"{self._start}'s {NEIGHBOURS} nearest neighbours are those of {name} (chance {100 * chance:.1f} %; no labels)"
            for name in (RAW, GREY)
        ]

    def state(self) -> dict[str, Tensor]:
        """The baselines as small tensors, for a file or the checkpoint."""
        if self._initial is None:
            return {}
        statistics = [getattr(self._initial, name) for name in _STATISTICS] + list(self._initial.cluster_share)
        state = {"initial": torch.tensor(statistics, dtype=torch.float64)}
        state |= {f"neighbours/{name}": value for name, value in self._neighbours.items()}
        return state | {f"right/{name}": value.to(torch.uint8) for name, value in self._right.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`. Raises `RefusalError` when it belongs to another sample."""
        rows = {len(value) for name, value in state.items() if name != "initial"}
        if f"neighbours/{self._start}" not in state:
            raise RefusalError(
                f"the stored baselines do not hold the {self._start}: repeat the run's --init flag, or choose another --out"
            )
        labelled = any(name.startswith("right/") for name in state)
        if "initial" not in state or rows != {len(self.pictures)} or labelled != (self.labels is not None):
            found = ", ".join(str(n) for n in sorted(rows)) or "no"
            raise RefusalError(
                f"the stored baselines are of {found} pictures {'with' if labelled else 'without'} labels, the sample has "
                f"{len(self.pictures)} {'with' if self.labels is not None else 'without'}: restore the pictures, or "
                "choose another --out"
            )
        values = state["initial"].tolist()
        shares = tuple(values[len(_STATISTICS) :])
        self._initial = EmbeddingStatistics(**dict(zip(_STATISTICS, values, strict=False)), cluster_share=shares)
        self._neighbours = {name: state[f"neighbours/{name}"] for name in (RAW, GREY, self._start)}
        self._right = {name: state[f"right/{name}"].bool() for name in self._neighbours if labelled}

    # --- measuring ----------------------------------------------------------------------------------------------

    def measure(self, teacher: Teacher, diagnostics: Callable[[Tensor], dict[str, float]], step: int = 0) -> Health:
        """Health of the teacher. `diagnostics` gets the head's outputs [M, d] float32 on the CPU. The first measurement
        without `start` or `load` before it takes this teacher as the network at step 0."""
        features, heads = self.features(teacher)
        self.latest = features
        return self.judge(features, heads, diagnostics(heads), step)

    def judge(self, features: Tensor, heads: Tensor, diagnostics: dict[str, float], step: int = 0) -> Health:
        """Health of given features [M, C] and head outputs [M, d]."""
        if self._initial is None:
            self.start(features)
        assert self._initial is not None
        mine = embedding_statistics(features)
        knn = math.nan
        lead: dict[str, tuple[float, float]] = {}
        shared: dict[str, float] = {}
        if not math.isnan(mine.mean_cosine):
            found = nearest(features, K)
            shared = {
                name: overlap(found.rows[:, :NEIGHBOURS], other.long()) for name, other in self._neighbours.items()
            }
            if self.labels is not None:
                right = knn_right(found, self.labels)
                diagnostics = diagnostics | {"pictures_per_label": len(self.labels) / (int(self.labels.max()) + 1)}
                knn = 100 * float(right.float().mean())
                lead = {name: difference(right, other) for name, other in self._right.items()}
        return Health(
            step, mine, embedding_statistics(heads), self._initial, knn, lead, shared,
            NEIGHBOURS / (len(self.pictures) - 1), diagnostics,
        )  # fmt: skip
