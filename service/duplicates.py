"""Near duplicates: the collection searched for itself by radius, pair by pair or as groups.

Rows are numbered by age, and each is compared with the older ones. So a pair is found once, by its newer row; a run with
`after` finds what the writes since then brought, and the runs together find what one run over everything finds.

Exact segments and fresh rows are compared tile by tile with matrix products. Approximate segments are asked for the 64
nearest of each row, and for more where all of these are near enough; their stored vectors decide. Beside the index this
takes about 40 bytes per row, whatever is found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from export.bundle import Embeddings
from service.errors import InvalidArgumentError
from service.filter import Filter
from service.fresh import Fresh
from service.index import EXACT_AMONG, Bitmap, Rows
from service.live import Live
from service.reading import Readable
from service.segment import Segment
from service.view import TOLERANCE

# Rows that search at a time, and rows that they are compared with at a time: 8 MiB of scores.
QUERIES = 1024
TARGETS = 2048
# Neighbours that an approximate segment is asked for first, then four times as many, and so on.
NEIGHBOURS = 64
# Grouping asks for no more: rows that have so many near ones are joined to these, and these to others.
MOST_NEIGHBOURS = 1024
# Candidates in one answer of an approximate segment: 16 MiB of scores and row numbers each.
CANDIDATES = 2**21
# Rows whose keys and vectors are read at a time.
BATCH = 4096
# Vectors are of length 1 up to 1e-6, in float32: equal ones may score 0.999998.
# An index that decides by itself may miss a score by so much; the stored vectors are asked about those near the limit.
MARGIN = 0.01
# One comparison through inverted lists takes as long as so many in a matrix product.
_INDEX_COST = 8

Progress = Callable[[int, int], None]
"""Called with the work done and the whole work."""


class Pair(NamedTuple):
    """Two items that resemble each other."""

    key_a: str
    """The newer one."""
    key_b: str
    """The older one."""
    score: float


class Member(NamedTuple):
    """An item of a group."""

    key: str
    source_uri: str
    score: float
    """Similarity to the oldest item of the group."""


class Group(NamedTuple):
    """Items that are connected by pairs, two or more: the oldest, then the others, the most similar to it first.

    A is near B and B near C makes one group of the three, however far A is from C (single linkage): see `least`.
    """

    members: list[Member]

    @property
    def kept(self) -> Member:
        """The oldest, by the last write of each: the one to keep."""
        return self.members[0]

    @property
    def others(self) -> list[Member]:
        """Those that could go."""
        return self.members[1:]

    @property
    def least(self) -> float:
        """The smallest similarity to the oldest; far below the limit, the group is a chain."""
        return self.members[-1].score


def pairs(
    collection: Readable, min_score: float, wanted: Filter | None = None, after: int | None = None
) -> Iterator[Pair]:
    """Each pair of live items that pass a filter and are at least so similar, once, in no order, as they are found.

    `after`: only pairs with an item written after that sequence number. Exact in exact segments and in fresh rows; in
    approximate segments those that a search finds. Sees the collection as it is at the call; writes go on meanwhile.
    Raises `InvalidArgumentError` on a score outside −1 to 1 and on a sequence number that was never given.
    """
    return SelfSearch(collection, min_score, wanted, after).pairs()


def groups(
    collection: Readable, min_score: float, wanted: Filter | None = None, after: int | None = None
) -> Iterator[Group]:
    """The groups that `pairs` connect: the largest first, of one size that with the oldest item first.

    All pairs are sought before the first group comes. With `after`, groups hold the items written since and what these
    resemble, not what that resembles in turn.
    """
    return SelfSearch(collection, min_score, wanted, after).groups()


class _Found(NamedTuple):
    """Pairs of rows [P], by their numbers."""

    newer: Rows
    older: Rows
    scores: Embeddings


@dataclass(frozen=True)
class _Source:
    """The live rows of a segment, or the fresh ones, that pass the filter, by age."""

    holder: Segment | Fresh
    at: Rows
    """Where they are, ascending."""
    bits: Bitmap | None
    """Which they are, for a search in a segment (None: all)."""
    numbers: Rows
    """Their numbers among all rows, ascending."""
    exact: bool
    """Whether they are compared one by one."""

    def vectors(self, low: int, high: int) -> Embeddings:
        """Those of some of its rows in order [high − low, D], float32 of length 1."""
        at = self.at[low:high]
        first, last = int(at[0]), int(at[-1])
        return self.holder.vectors_at(slice(first, last + 1) if last - first + 1 == len(at) else at)

    @property
    def cost(self) -> float:
        """Of comparing one row with all of these, in comparisons of a matrix product."""
        if self.exact or isinstance(self.holder, Fresh):
            return len(self.at)
        visited = self.holder.info.visits * math.sqrt(len(self.at)) / 2 + NEIGHBOURS
        return min(len(self.at), visited) * _INDEX_COST


class SelfSearch:
    """A search of a collection for itself, as the collection is when this is made."""

    def __init__(
        self,
        collection: Readable,
        min_score: float,
        wanted: Filter | None = None,
        after: int | None = None,
        exact: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """`exact`: compare one by one in approximate segments, too. Raises `InvalidArgumentError`, as `pairs`."""
        if not (math.isfinite(min_score) and -1 <= min_score <= 1):
            raise InvalidArgumentError(
                f"the smallest score is {min_score:g}, -1 to 1 are possible: give one such as 0.95",
                "BAD_SCORE",
                "min_score",
            )
        if after is not None and not 0 <= after <= collection.sequence:
            raise InvalidArgumentError(
                f"the sequence number is {after}, those of {collection.name!r} are 0 to {collection.sequence}: give the one "
                "that the last run on this collection ended with",
                "BAD_SEQUENCE",
                "after",
            )
        self._limit = min_score - TOLERANCE
        self._progress = progress
        view = collection.view
        self._live = live = Live(view)
        flags, sequences = live.flags(wanted), live.sequences()
        self.sequence = int(sequences.max(initial=0))
        """That of the last write that is seen: `after` of the next run."""
        places = np.flatnonzero(flags)
        # Ids and sequence numbers ascend together, within a segment and over all.
        ages = sequences[places]
        order = np.argsort(ages, kind="stable")
        numbers = np.empty_like(order)
        numbers[order] = np.arange(len(order))
        self._order: Rows = places[order]  # the places in `live`, by age
        self._first = 0 if after is None else int((ages <= after).sum())
        self._sources = []
        holders: list[Segment | Fresh] = [*(part.segment for part in view.parts), view.fresh]
        for holder, start, end in zip(holders, live.starts, live.ends, strict=True):
            low, high = np.searchsorted(places, (start, end)).tolist()
            few = isinstance(holder, Fresh) or not holder.info.visits or high - low <= EXACT_AMONG
            bits = None if high - low == end - start else np.packbits(flags[start:end], bitorder="little")
            source = _Source(holder, places[low:high] - start, bits, numbers[low:high], exact or few)
            self._sources.append(source)

    def __len__(self) -> int:
        """Items that are looked among."""
        return len(self._order)

    @property
    def asked(self) -> int:
        """Items that are compared with the older ones: all, or those written after."""
        return len(self) - self._first

    def pairs(self) -> Iterator[Pair]:
        """As the function `pairs`."""
        for found in self._found(None):
            for low in range(0, len(found.scores), BATCH):
                newer, older, scores = (column[low : low + BATCH] for column in found)
                keys, _ = self._names(np.concatenate([newer, older]))
                yield from map(Pair, keys, keys[len(newer) :], scores.tolist())

    def groups(self) -> Iterator[Group]:
        """As the function `groups`."""
        forest = _Forest(len(self))
        for found in self._found(MOST_NEIGHBOURS):
            forest.join(found.newer, found.older)
        members, kept = forest.groups()
        starts = np.flatnonzero(np.diff(kept, prepend=-1))
        ends = np.append(starts[1:], len(members))
        i = 0
        while i < len(starts):
            j = max(i + 1, int(np.searchsorted(ends, starts[i] + BATCH, "right")))
            yield from self._groups(members[starts[i] : ends[j - 1]], kept[starts[i] : ends[j - 1]])
            i = j

    def _groups(self, members: Rows, kept: Rows) -> Iterator[Group]:
        """Groups as rows [N] and the oldest row of the group of each [N]."""
        scores = np.empty(len(members), np.float32)
        for low in range(0, len(members), BATCH):
            some = slice(low, low + BATCH)
            products = np.einsum("nd,nd->n", self._vectors(members[some]), self._vectors(kept[some]))
            scores[some] = np.clip(products, -1, 1)
        scores[members == kept] = 1
        starts = np.flatnonzero(np.diff(kept, prepend=-1))
        group = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(members))))
        order = np.lexsort((members, -scores, members != kept, group))
        keys, uris = self._names(members[order])
        rows = list(map(Member, keys, uris, scores[order].tolist()))
        for low, high in zip(starts.tolist(), [*starts[1:].tolist(), len(rows)], strict=True):
            yield Group(rows[low:high])

    # --- pairs of numbers -----------------------------------------------------------------------------------------

    def _found(self, most: int | None) -> Iterator[_Found]:
        """Pairs: each once; or where approximate segments are asked for at `most` so many neighbours, once or twice."""
        done, total = 0.0, sum(cost for source in self._sources for *_, cost in self._blocks(source))
        for source in self._sources:
            for low, high, cost in self._blocks(source):
                queries, numbers = source.vectors(low, high), source.numbers[low:high]
                for other in self._sources:
                    if other.exact:
                        yield from self._by_tiles(other, queries, numbers)
                    elif len(other.at) and other.numbers[0] < numbers[-1]:
                        yield from self._by_index(other, queries, numbers, most)
                done += cost
                if self._progress is not None:
                    self._progress(int(done), int(total))

    def _blocks(self, source: _Source) -> Iterator[tuple[int, int, float]]:
        """Rows that search, from and to, and what that costs."""
        for low in range(int(np.searchsorted(source.numbers, self._first)), len(source.at), QUERIES):
            high = min(low + QUERIES, len(source.at))
            cost = 0.0
            for other in self._sources:
                older = int(np.searchsorted(other.numbers, source.numbers[high - 1]))
                if older:
                    cost += older if other.exact else other.cost
            yield low, high, cost * (high - low)

    def _by_tiles(self, other: _Source, queries: Embeddings, numbers: Rows) -> Iterator[_Found]:
        """Older rows near queries [Q, D], each compared."""
        older = int(np.searchsorted(other.numbers, numbers[-1]))
        for low in range(0, older, TARGETS):
            high = min(low + TARGETS, older)
            theirs = other.numbers[low:high]
            scores = queries @ other.vectors(low, high).T
            near = scores >= self._limit
            if theirs[-1] >= numbers[0]:
                near &= theirs < numbers[:, None]
            i, j = np.nonzero(near)
            if len(i):
                yield _Found(numbers[i], theirs[j], np.clip(scores[i, j], -1, 1))

    def _by_index(self, other: _Source, queries: Embeddings, numbers: Rows, most: int | None) -> Iterator[_Found]:
        """Older rows (with `most`, newer ones, too) near queries [Q, D], as an index finds them."""
        assert isinstance(other.holder, Segment)
        segment, count = other.holder, len(other.at)
        rescore = segment.info.rescore
        lowest = self._limit - (0 if rescore else MARGIN)
        left, k = np.arange(len(queries)), NEIGHBOURS
        while len(left):
            k = min(k, count)
            last = k == count or (most is not None and k >= most)
            step = max(1, CANDIDATES // (k * max(rescore, 1)))
            unfinished = []
            for low in range(0, len(left), step):
                mine = left[low : low + step]
                scores, at = segment.search(queries[mine], k, other.bits, count)
                near = (at >= 0) & (scores >= lowest)
                if not last:
                    full = near.all(axis=1)
                    unfinished.append(mine[full])
                    near[full] = False
                i, j = np.nonzero(near)
                for some in range(0, len(i), BATCH):
                    asked, places = mine[i[some : some + BATCH]], at[i[some : some + BATCH], j[some : some + BATCH]]
                    yield from self._decided(other, queries, numbers, asked, places, most is not None)
            left = np.concatenate(unfinished) if unfinished else left[:0]
            k *= 4

    def _decided(
        self, other: _Source, queries: Embeddings, numbers: Rows, asked: Rows, at: Rows, both: bool
    ) -> Iterator[_Found]:
        """Of candidates (query, position) [N] those whose stored vectors are near enough, and that are older."""
        mine, theirs = numbers[asked], other.numbers[np.searchsorted(other.at, at)]
        right = mine != theirs if both else theirs < mine
        asked, at, mine, theirs = asked[right], at[right], mine[right], theirs[right]
        if len(at):
            scores = np.einsum("nd,nd->n", queries[asked], other.holder.vectors_at(at))
            near = scores >= self._limit
            if near.any():
                newer, older = np.maximum(mine, theirs), np.minimum(mine, theirs)
                yield _Found(newer[near], older[near], np.clip(scores[near], -1, 1))

    # --- rows by their numbers ------------------------------------------------------------------------------------

    def _vectors(self, numbers: Rows) -> Embeddings:
        """[N, D], of length 1."""
        vectors = np.empty((len(numbers), self._live.dim), np.float32)
        for source, mine, at in self._live.places(self._order[numbers]):
            vectors[mine] = self._sources[source].holder.vectors_at(at)
        return vectors

    def _names(self, numbers: Rows) -> tuple[list[str], list[str]]:
        """Keys and source URIs."""
        return self._live.names(self._order[numbers])


class _Forest:
    """Union-find over numbers 0 to N − 1, for many pairs at a time; the root of a set is its smallest number."""

    def __init__(self, count: int) -> None:
        self._parents: Rows = np.arange(count)

    def join(self, a: Rows, b: Rows) -> None:
        """Unite the sets of pairs [P]."""
        while True:
            a, b = self._roots(a), self._roots(b)
            apart = a != b
            if not apart.any():
                return
            a, b = a[apart], b[apart]
            # Of several smaller roots that one larger one meets, the smallest is taken; the others follow in the next turn.
            np.minimum.at(self._parents, np.maximum(a, b), np.minimum(a, b))

    def groups(self) -> tuple[Rows, Rows]:
        """The members of all sets of two or more, and the root of each: larger sets first, then by root."""
        while True:
            parents = self._parents[self._parents]
            if np.array_equal(parents, self._parents):
                break
            self._parents = parents
        sizes = np.bincount(parents, minlength=1)
        members = np.flatnonzero(sizes[parents] > 1) if len(parents) else parents
        roots = parents[members]
        order = np.lexsort((members, roots, -sizes[roots]))
        return members[order], roots[order]

    def _roots(self, numbers: Rows) -> Rows:
        """Of each; ways to them are shortened."""
        roots = self._parents[numbers]
        while True:
            above = self._parents[roots]
            if np.array_equal(above, roots):
                break
            roots = above
        self._parents[numbers] = roots
        return roots
