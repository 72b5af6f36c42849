"""What a collection is worth by labels that its payload holds: mAP and Recall@k of an exact ranking."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt

from export.bundle import Contract, Embeddings, RefusalError, printable
from service.filter import Filter, payload_path
from service.index import Rows
from service.live import Live
from service.quality import TIE, At, Estimate, Task, compared, drawn
from service.segment import unit

RECALL_AT = (1, 5, 10)
_RELEVANT = 2**23  # scores of relevant items held at a time


class LabelFigures(Contract):
    """Exact ranking of the gallery for each query, by label."""

    field: str
    """Where the label is."""
    query_filter: str
    """Which items may be queries."""
    gallery_filter: str
    """Which are ranked."""
    candidates: int
    """Labelled items that may be queries; of more than the sample some are drawn."""
    without_relevant: int
    """Of the drawn, those with no other item of their label in the gallery: left out."""
    gallery: int
    """Labelled items that are ranked."""
    unlabelled: int
    """Items without a label, left out everywhere."""
    labels: int
    """Distinct ones in the gallery."""
    mean_average_precision: Estimate
    """Mean over queries of (1/R) Σ i / rank_i over all ranks; an item's own row is left out (docs/evaluation.md)."""
    recall_at: tuple[At, ...]
    """Share of the queries with a relevant item among the first k."""


def path_of(field: str) -> tuple[str, ...]:
    """A payload field as filters name it, as a path. Raises `RefusalError`."""
    path = payload_path(field)
    if path is None:
        raise RefusalError(f"--label {field!r} is no field of the payload: write one such as folder or shop.name")
    return path


def read_labels(live: Live, path: tuple[str, ...], field: str) -> Rows:
    """A number [rows] for each row's label, −1 for none: absent, null, empty, a list or an object. Raises `RefusalError`
    where no live row has one."""
    codes = np.full(live.rows, -1, np.int64)
    known: dict[tuple[bool, Any], int] = {}
    seen: set[str] = set()
    for low, payloads in live.payloads():
        for i, payload in enumerate(payloads, low):
            value: Any = json.loads(payload)
            if len(seen) < 20:
                seen |= value.keys()
            for name in path:
                value = value.get(name) if isinstance(value, dict) else None
            if isinstance(value, str | int | float) and value != "":
                codes[i] = known.setdefault((isinstance(value, bool), value), len(known))  # 1 == True
    if not (codes[live.flags()] >= 0).any():
        there = ", ".join(sorted(seen)[:20]) or "none"
        raise RefusalError(
            f"no item has a label in the payload field {field!r} (a string, number or boolean is one): the payloads' "
            f"fields are {printable(there)}; give one of them"
        )
    return codes


def label_figures(
    live: Live, codes: Rows, field: str, query_filter: Filter | None, gallery_filter: Filter | None, sample: int,
    rng: np.random.Generator, task: Task,
) -> LabelFigures:  # fmt: skip
    """By the numbers [rows] of the rows' labels, for up to `sample` queries. Raises `RefusalError` where none has a
    relevant item."""
    alive, labelled = live.flags(), codes >= 0
    candidates, gallery = (live.flags(wanted) & labelled for wanted in (query_filter, gallery_filter))
    sizes = np.bincount(codes[gallery], minlength=int(codes.max()) + 1)
    queries = drawn(rng, candidates, sample)
    relevant = sizes[codes[queries]] - gallery[queries]  # without the query's own row
    rows = queries[relevant > 0]
    if not len(rows):
        raise RefusalError(
            f"of {int(candidates.sum()):,} labelled queries none has another item of its label among the "
            f"{int(gallery.sum()):,} of the gallery: check --label {field}, --query-filter and --gallery-filter"
        )
    precisions, ranks = _ranked(live, codes, gallery, rows, relevant[relevant > 0], task)
    return LabelFigures(
        field=field, query_filter="" if query_filter is None else query_filter.text,
        gallery_filter="" if gallery_filter is None else gallery_filter.text,
        candidates=int(candidates.sum()), without_relevant=len(queries) - len(rows), gallery=int(gallery.sum()),
        unlabelled=int((alive & ~labelled).sum()), labels=int((sizes > 0).sum()),
        mean_average_precision=Estimate.of(precisions),
        recall_at=tuple(At(k=k, value=Estimate.of(ranks < k)) for k in RECALL_AT),
    )  # fmt: skip


def _ranked(
    live: Live, codes: Rows, gallery: npt.NDArray[np.bool_], rows: Rows, relevant: Rows, task: Task
) -> tuple[npt.NDArray[np.float64], Rows]:
    """Average precision, and rank from 0 of the first relevant item, of the queries `rows` [Q] with `relevant` [Q] items
    each, over the whole gallery.

    The gallery is read twice: for the relevant items' scores, then to count what is above them. Items of equal score, within
    `TIE`, come in together, as in scikit-learn's `average_precision_score`, so a tie is never a gain.
    """
    precisions, ranks = np.empty(len(rows)), np.empty(len(rows), np.int64)
    # Queries that together have as many relevant items as are held at a time.
    starts, held = [0], 0
    for i, count in enumerate(relevant.tolist()):
        if held and held + count > _RELEVANT:
            starts.append(i)
            held = 0
        held += count
    advance = task("ranking by label", 2 * len(starts) * int(gallery.sum()))
    for start, end in zip(starts, [*starts[1:], len(rows)], strict=True):
        own, wanted = rows[start:end], codes[rows[start:end]]
        queries = unit(live.vectors(own))
        scores: list[list[Embeddings]] = [[] for _ in own]
        for numbers, part, similarity in compared(live.blocks(gallery), queries, own, advance):
            same = codes[numbers] == wanted[part, None]
            for q in np.flatnonzero(same.any(axis=1)).tolist():
                found = similarity[q, same[q]]
                scores[part.start + q].append(found[found > -np.inf])  # without the own row
        levels = [np.sort(np.concatenate(parts)) for parts in scores]  # ascending
        above = [np.zeros(len(each), np.int64) for each in levels]
        for numbers, part, similarity in compared(live.blocks(gallery), queries, own, advance):
            similarity[codes[numbers] == wanted[part, None]] = -np.inf
            similarity.sort(axis=1)
            for q, ordered in enumerate(similarity, part.start):
                above[q] += len(ordered) - np.searchsorted(ordered, levels[q] - TIE, side="left")
        for q, (level, others) in enumerate(zip(levels, above, strict=True), start):
            mine = len(level) - np.searchsorted(level, level - TIE, side="left")
            precisions[q] = float((mine / (mine + others)).mean())
            ranks[q] = others[-1]
    return precisions, ranks
