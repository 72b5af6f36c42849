"""Revisited Oxford and Paris (Radenović et al. 2018): easy, medium and hard, junk left out of the ranking.

The ground truth is a JSON object: `imlist` and `qimlist`, names of gallery and query pictures, and `gnd`, per query
`easy`, `hard` and `junk`, lists of gallery positions (and `bbx`, unused: queries are not cropped, spec/sop.md section 5).
The public files are Python pickles, which run code when opened; docs/evaluation.md has the line that converts them.
"""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path, PurePosixPath
from typing import Annotated, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from export.bundle import Embeddings, RefusalError
from export.preprocess import PictureFile
from training.evaluate.metrics import trapezoid_average_precision
from training.evaluate.ranking import full_rankings

PRECISION_AT = (1, 5, 10)
Positions = list[Annotated[int, Field(ge=0)]]
Ranks = npt.NDArray[np.int64]


class QueryTruth(BaseModel):
    """What one query should find: positions in the gallery."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    easy: Positions
    hard: Positions
    junk: Positions


class GroundTruth(BaseModel):
    """The whole file."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    imlist: list[str]
    qimlist: list[str]
    gnd: list[QueryTruth]


class Protocol(NamedTuple):
    """Which lists count as relevant and which are left out."""

    relevant: tuple[str, ...]
    junk: tuple[str, ...]


PROTOCOLS = {
    "easy": Protocol(("easy",), ("junk", "hard")),
    "medium": Protocol(("easy", "hard"), ("junk",)),
    "hard": Protocol(("hard",), ("junk", "easy")),
}


class Revisited(NamedTuple):
    """One protocol's figures."""

    mean_average_precision: float
    """Mean over the counted queries of `metrics.trapezoid_average_precision`, junk removed."""
    mean_precision_at: dict[int, float]
    """k → mean precision among the first min(k, rank of the last relevant picture), as the protocol defines mP@k."""
    counted: int
    """Queries with a relevant picture under the protocol; the others are left out."""


def read_ground_truth(path: Path) -> GroundTruth:
    """Read and check the file. Raises `RefusalError`."""
    form = "expected JSON with imlist, qimlist and gnd, a list of {easy, hard, junk} per query (docs/evaluation.md)"
    if path.suffix.lower() in (".pkl", ".pickle"):
        raise RefusalError(
            f"{path} is a pickle, which can run any code when opened, so it is not: convert it to JSON once, where you "
            "trust it (docs/evaluation.md has the line)"
        )
    try:
        truth = GroundTruth.model_validate(json.loads(path.read_bytes()))
    except ValidationError as e:
        first = e.errors()[0]
        raise RefusalError(f"{path}: {'.'.join(str(p) for p in first['loc'])}: {first['msg']}: {form}") from None
    except (OSError, ValueError) as e:
        raise RefusalError(f"{path} cannot be read ({e}): {form}") from None
    if len(truth.gnd) != len(truth.qimlist):
        raise RefusalError(f"{path} has {len(truth.qimlist)} queries and {len(truth.gnd)} entries in gnd: {form}")
    for name, query in zip(truth.qimlist, truth.gnd, strict=True):
        lists = {part: set(getattr(query, part)) for part in ("easy", "hard", "junk")}
        for a, b in (("easy", "hard"), ("easy", "junk"), ("hard", "junk")):
            if both := lists[a] & lists[b]:
                raise RefusalError(f"{path}: query {name} has position {min(both)} in both {a} and {b}: {form}")
        highest = max([*query.easy, *query.hard, *query.junk], default=-1)
        if highest >= len(truth.imlist):
            raise RefusalError(
                f"{path}: query {name} names position {highest}, but imlist has {len(truth.imlist)} pictures: {form}"
            )
    return truth


def find_named(names: list[str], pictures: list[PictureFile], folder: Path) -> list[PictureFile]:
    """The picture of each name, with or without suffix, anywhere below the folder.

    Raises `RefusalError` for a name that no picture has, and for one that several have; a path names one picture.
    """
    by_path: dict[str, PictureFile] = {}
    by_name: dict[str, list[PictureFile]] = {}
    for picture in pictures:
        by_path[picture.key] = picture
        path = PurePosixPath(picture.key)
        for name in dict.fromkeys((path.name, path.stem, str(path.with_suffix("")))):
            by_name.setdefault(name, []).append(picture)
    names = [unicodedata.normalize("NFC", name) for name in names]
    lost = [name for name in names if name not in by_path and name not in by_name]
    if lost:
        raise RefusalError(
            f"{folder} lacks {len(lost)} of the {len(names)} pictures that the ground truth names, for example {lost[0]}: "
            "give the folder that holds the data set's pictures"
        )
    several = next((name for name in names if name not in by_path and len(by_name[name]) > 1), None)
    if several is not None:
        first, second, *_ = by_name[several]
        raise RefusalError(
            f"the ground truth names {several}, which {len(by_name[several])} pictures in {folder} are called, for example "
            f"{first.key} and {second.key}: give a folder that holds the data set's pictures alone"
        )
    return [by_path[name] if name in by_path else by_name[name][0] for name in names]


def revisited(queries: Embeddings, gallery: Embeddings, truth: GroundTruth) -> dict[str, Revisited]:
    """Rank the gallery [N, D] for the queries [Q, D], both unit rows in the ground truth's order, under each protocol.

    A protocol under which no query has a relevant picture is left out.
    """
    order = np.concatenate([found.rows for _, found in full_rankings(queries, gallery)])
    return score_rankings(order, truth)


def score_rankings(order: Ranks, truth: GroundTruth) -> dict[str, Revisited]:
    """The protocols' figures of rankings [Q, N] of gallery positions, best first."""
    result = {}
    for name, protocol in PROTOCOLS.items():
        precisions, at = [], []
        for ranking, query in zip(order, truth.gnd, strict=True):
            relevant = [i for part in protocol.relevant for i in getattr(query, part)]
            if not relevant:
                continue
            junk = [i for part in protocol.junk for i in getattr(query, part)]
            kept = ranking[~np.isin(ranking, junk)]
            ranks = np.flatnonzero(np.isin(kept, relevant))
            precisions.append(trapezoid_average_precision(ranks, len(ranks)))
            at.append([float((ranks < min(k, ranks[-1] + 1)).sum() / min(k, ranks[-1] + 1)) for k in PRECISION_AT])
        if precisions:
            means = np.mean(at, axis=0).tolist()
            precision_at = dict(zip(PRECISION_AT, means, strict=True))
            result[name] = Revisited(float(np.mean(precisions)), precision_at, len(precisions))
    return result
