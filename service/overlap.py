"""How many neighbours two collections share, such as those of an older and a newer encoder."""

from __future__ import annotations

from export.bundle import Contract, Embeddings, RefusalError
from service.collection import Collection
from service.errors import NotFoundError
from service.index import Rows
from service.live import Live
from service.quality import NEIGHBOURS, At, Estimate, Task

_REACH = 4096  # neighbours looked through for such as both collections hold


class Overlap(Contract):
    """Neighbours that two collections have in common, among items that both hold."""

    name: str
    """The other collection."""
    space_id: str
    """Its space."""
    missing: int
    """Of the sample, items that it does not hold."""
    short: int
    """… for which fewer than ten neighbours that both hold were found: left out."""
    overlap_at: tuple[At, ...]
    """Share of the k nearest in common."""


def overlap(
    collection: Collection, other: Collection, live: Live, sampled: Rows, queries: Embeddings, task: Task
) -> Overlap:
    """Each collection is asked with its own vector of the item, through its index. Raises `RefusalError`."""
    held: dict[tuple[int, str], bool] = {}

    def holds(place: Collection, key: str) -> bool:
        if (id(place), key) not in held:
            try:
                place.get(key)
                held[id(place), key] = True
            except NotFoundError:
                held[id(place), key] = False
        return held[id(place), key]

    def neighbours(asked: Collection, query: Embeddings, key: str) -> list[str]:
        beside, reach = (other if asked is collection else collection), 2 * NEIGHBOURS
        while True:
            (hits,) = asked.search(query, reach, leave_out=[frozenset([key])])
            found = [hit.row.key for hit in hits if holds(beside, hit.row.key)]
            if len(found) >= NEIGHBOURS or len(hits) < reach or reach >= _REACH:
                return found[:NEIGHBOURS]
            reach *= 4

    missing, short = 0, 0
    shares: dict[int, list[float]] = {1: [], NEIGHBOURS: []}
    advance = task("comparing neighbours", len(sampled))
    for number, query in zip(sampled.tolist(), queries, strict=True):
        advance(1)
        key = live.row(number).key
        try:
            theirs = other.get(key).vector
        except NotFoundError:
            missing += 1
            continue
        a, b = neighbours(collection, query, key), neighbours(other, theirs, key)
        if min(len(a), len(b)) < NEIGHBOURS:
            short += 1
            continue
        for k, values in shares.items():
            values.append(len(set(a[:k]) & set(b[:k])) / k)
    if not shares[1]:
        raise RefusalError(
            f"{other.folder} holds {len(sampled) - missing:,} of {len(sampled):,} sampled items, and none has "
            f"{NEIGHBOURS} neighbours that both collections hold: give a collection of the same items"
        )
    return Overlap(
        name=other.name, space_id=other.space_id, missing=missing, short=short,
        overlap_at=tuple(At(k=k, value=Estimate.of(values)) for k, values in shares.items()),
    )  # fmt: skip
