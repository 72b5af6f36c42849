"""Copy detection: which picture of a gallery was edited into the query, and is there one at all?"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from export.bundle import Embeddings, RefusalError
from export.preprocess import PictureFile
from training.evaluate.metrics import (
    Curve,
    average_precision,
    micro_average_precision,
    precision_recall,
    recall_at_precision,
)
from training.evaluate.ranking import full_rankings, top_k

PRECISION = 0.9
# Above this many pairs only each query's 100 best candidates enter the micro-AP; the output says so.
MAX_PAIRS = 50_000_000
CANDIDATES = 100


class CopyTask(NamedTuple):
    """Who must find whom."""

    queries: list[int]
    """Rows of the pictures that are queries, negatives included."""
    gallery: list[int]
    """Rows that are searched."""
    originals: list[list[int]]
    """Per query: places in `gallery` that it was made from; empty for a negative."""
    transforms: list[str]
    """Per query: what was done to it, '' where unknown."""
    lost: int = 0
    """Queries that are called so, but whose original the gallery lacks by its name: they count as negatives."""


class CopyDetection(NamedTuple):
    """What the scores of all queries together are worth."""

    micro_ap: float
    """Over all (query, candidate) pairs: `metrics.micro_average_precision`."""
    micro_ap_best: float
    """The same over each query's best candidate alone."""
    recall_at_precision_90: float
    """Recall of the best candidates at the lowest threshold with precision ≥ 0.9."""
    recall_at_1: float
    """Share of the queries with an original that rank one first."""
    mean_average_precision: float
    """Mean AP of the queries with an original."""
    by_transform: dict[str, float]
    """Recall at 1 per transform."""
    curve: Curve
    """Precision and recall of the best candidates, for the plot."""
    candidates: int
    """Candidates per query that entered `micro_ap`."""


_ROLE = re.compile(r"^(gallery|query|queries|q|neg|negatives?)(?:[:\-](.+))?$")


def roles(pictures: list[PictureFile]) -> CopyTask | None:
    """Read a copy-detection layout, None where the folder has none.

    Either folders `gallery/`, `queries/` or `q:TRANSFORM/` (`q-TRANSFORM/`), `negatives/` or `neg:TRANSFORM/`, where a
    query's original is the gallery picture with the same stem; or files `gallery-…`, `q-TRANSFORM-…`, `neg-TRANSFORM-…`
    with one folder per original.
    """
    found = [_role(p.key) for p in pictures]
    if not any(r and r[0] == "gallery" for r in found) or not any(r and r[0] == "query" for r in found):
        return None
    if any(r is None for r in found):
        return None
    known = [r for r in found if r is not None]
    gallery = [i for i, r in enumerate(known) if r[0] == "gallery"]
    queries = [i for i, r in enumerate(known) if r[0] != "gallery"]
    at: dict[str, list[int]] = {}
    for place, i in enumerate(gallery):
        at.setdefault(known[i][2], []).append(place)
    originals = [at.get(known[i][2], []) if known[i][0] == "query" else [] for i in queries]
    lost = sum(known[i][0] == "query" and not found for i, found in zip(queries, originals, strict=True))
    return CopyTask(queries, gallery, originals, [known[i][1] for i in queries], lost)


def _role(key: str) -> tuple[str, str, str] | None:
    """(gallery, query or negative; transform; what identifies the original) of a key, None where it says nothing."""
    path = PurePosixPath(key)
    if len(path.parts) < 2:
        return None
    match = _ROLE.match(path.parts[0])
    if match:
        return _kind(match[1]), match[2] or "", path.stem
    match = re.match(r"^(gallery|q|query|neg)-(?:(.+)-)?[^-]+$", path.stem)
    if match:
        return _kind(match[1]), match[2] or "", path.parts[0]
    return None


def _kind(word: str) -> str:
    return "gallery" if word == "gallery" else "query" if word.startswith("q") else "negative"


def from_pairs(queries: list[PictureFile], gallery: list[PictureFile], pairs: dict[str, list[str]]) -> CopyTask:
    """`--pairs`: queries → their originals, each by its key, or by its file name where no other picture has that name.

    Rows of `gallery` follow those of `queries`. A query that the list lacks is a negative; an original that is named
    twice counts once. Raises `RefusalError` for a query or an original that is not there.
    """
    place, known = _by_name(gallery), _by_name(queries)
    originals: list[list[int]] = [[] for _ in queries]
    strange = [name for name in pairs if name not in known]
    if strange:
        raise RefusalError(
            f"{len(strange)} of the {len(pairs)} queries that --pairs names are not among the {len(queries)} pictures, for "
            f"example {strange[0]}: expected paths relative to the folder of the queries, such as {queries[0].key}, or "
            "file names that only one of them has"
        )
    for query, named in pairs.items():
        lost = [name for name in named if name not in place]
        if lost:
            raise RefusalError(
                f"--pairs names {lost[0]} as the original of {query}, but the gallery of {len(gallery)} pictures lacks it: "
                "give its path relative to the gallery folder"
            )
        mine = originals[known[query]]
        mine += dict.fromkeys(place[name] for name in named if place[name] not in mine)
    return _task(queries, gallery, originals)


def _by_name(pictures: list[PictureFile]) -> dict[str, int]:
    """Place of each picture by its key, and by its file name where that is unique."""
    file_names = [PurePosixPath(p.key).name for p in pictures]
    counts = Counter(file_names)
    names = {name: i for i, name in enumerate(file_names) if counts[name] == 1}
    return names | {p.key: i for i, p in enumerate(pictures)}


def by_stem(queries: list[PictureFile], gallery: list[PictureFile]) -> CopyTask:
    """A query's original is the gallery picture with the same file name but for its suffix."""
    at: dict[str, list[int]] = {}
    for i, picture in enumerate(gallery):
        at.setdefault(PurePosixPath(picture.key).stem, []).append(i)
    task = _task(queries, gallery, [at.get(PurePosixPath(p.key).stem, []) for p in queries])
    return task._replace(lost=sum(not found for found in task.originals))


def _task(queries: list[PictureFile], gallery: list[PictureFile], originals: list[list[int]]) -> CopyTask:
    if not any(originals):
        raise RefusalError(
            f"none of the {len(queries)} queries has an original in the gallery of {len(gallery)} pictures: expected the "
            "same file names in both, or a list --pairs FILE with columns query and original"
        )
    rows = range(len(queries), len(queries) + len(gallery))
    transforms = [p.folder.removeprefix("q:").removeprefix("q-") for p in queries]
    return CopyTask(list(range(len(queries))), list(rows), originals, transforms)


def detect(queries: Embeddings, gallery: Embeddings, task: CopyTask) -> CopyDetection:
    """Score unit rows, queries [Q, D] and gallery [N, D] in the order of `task`.

    Recall counts against the queries' originals: (query, original) pairs for `micro_ap`, queries with an original for the
    best candidates. Raises `ValueError` when no query has one.
    """
    owned = np.zeros((len(queries), len(gallery)), bool) if len(queries) * len(gallery) <= MAX_PAIRS else None
    width = len(gallery) if owned is not None else min(CANDIDATES, len(gallery))
    scores, correct = np.empty((len(queries), width), np.float32), np.zeros((len(queries), width), bool)
    precisions: list[float] = []
    wanted = [np.asarray(places, np.int64) for places in task.originals]
    if owned is not None:
        for low, found in full_rankings(queries, gallery):
            scores[low : low + len(found.rows)] = found.scores
            for q, row in enumerate(found.rows):
                correct[low + q] = np.isin(row, wanted[low + q])
    else:
        found = top_k(queries, gallery, width)
        scores = found.scores
        for q, row in enumerate(found.rows):
            correct[q] = np.isin(row, wanted[q])
    has = np.asarray([len(w) > 0 for w in wanted])
    for q in np.flatnonzero(has).tolist():
        precisions.append(average_precision(np.flatnonzero(correct[q]), len(wanted[q])))
    pairs, positives = int(sum(len(w) for w in wanted)), int(has.sum())
    best, first = scores[:, 0], correct[:, 0]
    by_transform = {
        name: float(np.mean(first[rows]))
        for name in sorted(set(task.transforms))
        if len(rows := _with(task.transforms, name, has))
    }
    return CopyDetection(
        micro_ap=micro_average_precision(scores.ravel(), correct.ravel(), pairs),
        micro_ap_best=micro_average_precision(best, first, positives),
        recall_at_precision_90=recall_at_precision(best, first, positives, PRECISION),
        recall_at_1=float(first[has].mean()),
        mean_average_precision=float(np.mean(precisions)),
        by_transform=by_transform,
        curve=precision_recall(best, first, positives),
        candidates=width,
    )


def _with(transforms: list[str], name: str, has: npt.NDArray[np.bool_]) -> npt.NDArray[Any]:
    return np.flatnonzero(np.asarray([t == name for t in transforms]) & has)
