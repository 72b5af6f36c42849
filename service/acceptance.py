"""Acceptance queries: whether a collection, and the encoder that made it, answer as they should before they are served."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from export.bundle import Embeddings
from export.preprocess import DecodeLimits, UnreadablePictureError
from export.sources.picture import SourcePicture
from service.collection import Collection
from service.encoder import Encoder
from service.errors import NotFoundError
from service.live import Live
from service.reembed import has_changed, source_of

# Stored items that are looked for, and those of them whose picture is embedded again.
SAMPLE, PICTURES = 64, 8
# The least share of them that has to be found first, and the least similarity of a picture to what is stored of it: what
# another variant or provider may change.
FOUND, SIMILAR = 0.9, 0.98
NEIGHBOURS = 10


class Asked(NamedTuple):
    """A query with the key that has to be among its `top_k` best neighbours: a picture, or the key of a stored item."""

    expected: str
    top_k: int
    picture: bytes | None = None
    key: str = ""


@dataclass
class Acceptance:
    """How a collection has answered."""

    self_queries: int = 0
    """Stored items that were looked for by their own vector."""
    self_found: int = 0
    """Those that were found first."""
    pictures: int = 0
    """Stored pictures that were embedded again."""
    min_picture_score: float | None = None
    """The smallest similarity of such a picture to what is stored of it."""
    overlap_at_10: float | None = None
    """Mean share of neighbours in common with the collection that is served."""
    ranks: list[int] = field(default_factory=list)
    """Of the keys that were expected, from 1; 0 where one was not found."""
    problems: list[str] = field(default_factory=list)
    """What was not passed."""

    @property
    def passed(self) -> bool:
        """Whether it may be served."""
        return not self.problems


def accept(
    new: Collection, encoder: Encoder, old: Collection, asked: Sequence[Asked], min_overlap: float = 0.0
) -> Acceptance:
    """Ask a collection beside the one that is served. `min_overlap`: the least `overlap_at_10`."""
    found = Acceptance()
    live = Live(new.view)
    rows = np.flatnonzero(live.flags())
    if len(rows):
        chosen = np.sort(np.random.default_rng(0).choice(rows, min(SAMPLE, len(rows)), replace=False))
        keys, vectors = live.names(chosen)[0], live.vectors(chosen)
        _look_for(found, new, old, keys, vectors)
        _embed_again(found, new, encoder, keys)
    for each in asked:
        found.ranks.append(_rank(new, encoder, each))
    _judge(found, asked, min_overlap)
    return found


def _look_for(found: Acceptance, new: Collection, old: Collection, keys: Sequence[str], vectors: Embeddings) -> None:
    overlaps = []
    answers = new.search(vectors, NEIGHBOURS + 1)
    for key, hits in zip(keys, answers, strict=True):
        found.self_queries += 1
        # An item as similar to it as it is itself may come before it.
        found.self_found += key in [hit.row.key for hit in hits if hit.score >= hits[0].score - 1e-3]
        try:
            before = old.get(key).vector
        except NotFoundError:  # deleted meanwhile
            continue
        theirs = _others(key, [hit.row.key for hit in old.search(before[None], NEIGHBOURS + 1)[0]])
        mine = _others(key, [hit.row.key for hit in hits])
        if theirs:
            overlaps.append(len(set(mine) & set(theirs)) / len(theirs))
    if overlaps:
        found.overlap_at_10 = float(np.mean(overlaps))


def _others(key: str, keys: Sequence[str]) -> list[str]:
    return [each for each in keys if each != key][:NEIGHBOURS]


def _embed_again(found: Acceptance, new: Collection, encoder: Encoder, keys: Sequence[str]) -> None:
    for key in keys:
        if found.pictures == PICTURES:
            return
        try:
            item = new.get(key)
            written = [each for each in new.writes(item.row.sequence - 1, 1).live if each.row.key == key]
            picture = source_of(written[0], new.originals) if written else ""
            if isinstance(picture, str):
                continue
            if isinstance(picture, SourcePicture) and has_changed(written[0].row, picture):
                continue
            pixels = encoder.decode(picture.read(DecodeLimits())).pixels
        except (NotFoundError, UnreadablePictureError):  # gone since; what was stored of it stays
            continue
        score = float(encoder.embed(pixels[None])[0] @ item.vector)
        found.pictures += 1
        found.min_picture_score = score if found.min_picture_score is None else min(score, found.min_picture_score)


def _rank(new: Collection, encoder: Encoder, asked: Asked) -> int:
    try:
        if asked.picture is None:
            query = new.get(asked.key).vector
        else:
            query = encoder.embed(encoder.decode(asked.picture).pixels[None])[0]
    except (NotFoundError, UnreadablePictureError):
        return 0
    left_out = frozenset({asked.key} - {asked.expected})
    (hits,) = new.search(query[None], asked.top_k, leave_out=[left_out])
    return next((rank for rank, hit in enumerate(hits, 1) if hit.row.key == asked.expected), 0)


def _judge(found: Acceptance, asked: Sequence[Asked], min_overlap: float) -> None:
    if found.self_found < FOUND * found.self_queries:
        found.problems.append(
            f"{found.self_found} of {found.self_queries} stored items were found by their own vector, {FOUND:.0%} are "
            "expected: verify the collection"
        )
    if found.min_picture_score is not None and not found.min_picture_score >= SIMILAR:
        found.problems.append(
            f"a stored picture embedded again has similarity {found.min_picture_score:.3f} to what is stored of it, "
            f"{SIMILAR} is expected: the vectors are not this encoder's, or the picture has changed"
        )
    if found.overlap_at_10 is not None and found.overlap_at_10 < min_overlap:
        found.problems.append(
            f"{found.overlap_at_10:.0%} of the neighbours are those of the served collection, {min_overlap:.0%} are expected"
        )
    missed = [f"{each.expected!r}" for each, rank in zip(asked, found.ranks, strict=True) if not rank]
    if missed:
        found.problems.append(f"{len(missed)} queries did not find what they expect, such as {missed[0]}")
