"""What a search sees of a collection: an immutable picture of it, that writers replace.

So readers never wait, nothing that they share is changed, and a search in a replaced view still finds its files mapped.
"""

from __future__ import annotations

import functools
import itertools
import json
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from export.bundle import Embeddings
from service.filter import Filter
from service.fresh import Fresh
from service.index import BLOCK, Bitmap, Rows
from service.segment import Segment, StoredRow, table_of

# Rows that are looked at to find groups, or rows that are equally near.
GROUPED = 10_000
# Rounding of scores: a row and its copy are as near as 1.
TOLERANCE = 2e-6


T = TypeVar("T")


class Hit(NamedTuple):
    """A neighbour."""

    row: StoredRow
    score: float


class Read(Protocol[T]):
    """What is read of the rows that were found."""

    def stored(self, segment: Segment, positions: Sequence[int]) -> list[T]:
        """Of a segment's rows."""

    def fresh(self, rows: Sequence[StoredRow]) -> list[T]:
        """Of rows that no segment holds yet."""


class _Rows:
    """The rows themselves."""

    def stored(self, segment: Segment, positions: Sequence[int]) -> list[StoredRow]:
        return segment.rows(positions)

    def fresh(self, rows: Sequence[StoredRow]) -> list[StoredRow]:
        return list(rows)


@dataclass(frozen=True)
class Part:
    """A segment and which of its rows live (None: all)."""

    number: int
    segment: Segment
    live: Bitmap | None = None
    live_count: int = 0

    @property
    def count(self) -> int:
        """Live rows."""
        return len(self.segment) if self.live is None else self.live_count

    def flags(self, wanted: Filter | None = None) -> Bitmap:
        """1 for each live row that a filter passes, 0 for each other one."""
        bits, *_ = self.among(wanted)
        if bits is None:
            return np.ones(len(self.segment), np.uint8)
        return np.unpackbits(bits, bitorder="little", count=len(self.segment))

    def without(self, positions: Sequence[int]) -> Part:
        """The same with some rows dead."""
        flags = self.flags()
        flags[list(positions)] = 0
        return replace(self, live=np.packbits(flags, bitorder="little"), live_count=int(flags.sum()))

    def among(self, wanted: Filter | None) -> tuple[Bitmap | None, int, Rows | None]:
        """The live rows that a filter passes, as a bitmap (None: every row), how many they are, and where they are few
        their positions."""
        if wanted is None:
            return self.live, self.count, None
        bits, count, rows = self.segment.passing(wanted)
        if self.live is None:
            return bits, count, rows
        if rows is not None:
            rows = rows[(self.live[rows >> 3] >> (rows & 7)) & 1 == 1]
            return bits & self.live, len(rows), rows
        bits = bits & self.live
        return bits, int(np.bitwise_count(bits).sum()), None


# Score, segment (None: among the fresh rows), and position there. A plain tuple: a search makes eleven, and needs few keys.
_Found = tuple[float, Part | None, int]
_score = operator.itemgetter(0)


@dataclass(frozen=True)
class View:
    """What a search sees: never changed once published."""

    parts: tuple[Part, ...]
    fresh: Fresh

    def scan(self) -> Iterator[tuple[pa.Table, Embeddings]]:
        """Every live row, block by block, and vectors [N, D]."""
        for part in self.parts:
            at = np.flatnonzero(part.flags())
            for low in range(0, len(at), BLOCK):
                some = at[low : low + BLOCK]
                yield part.segment.table.take(some), part.segment.vectors_at(some)
        at = self.fresh.positions()
        if len(at):
            yield table_of([self.fresh.rows[i] for i in at.tolist()]), self.fresh.vectors_at(at)

    def search(
        self,
        queries: Embeddings,
        k: int,
        filters: Sequence[Filter | None],
        left_out: Sequence[frozenset[str]],
        min_score: float | None = None,
    ) -> list[list[Hit]]:
        """The k most similar live rows of each unit query [Q, D] that its filter passes, best first; ties by key."""
        found = self.nearest(queries, k, filters, left_out, min_score, _Rows())
        return [list(map(Hit._make, row)) for row in found]

    def nearest(
        self,
        queries: Embeddings,
        k: int,
        filters: Sequence[Filter | None],
        left_out: Sequence[frozenset[str]],
        min_score: float | None,
        read: Read[T],
    ) -> list[list[tuple[T, float]]]:
        """The same with what is read of each row, and its score."""
        alone = len(self.parts) == 1 and not self.fresh.live and self.parts[0].count > k
        if alone and not any(filters) and not any(left_out):
            return self._nearest_of_one(self.parts[0], queries, k, min_score, read)
        return self._with(read, self._nearest(queries, k, filters, left_out, min_score))

    def _nearest_of_one(
        self, part: Part, queries: Embeddings, k: int, min_score: float | None, read: Read[T]
    ) -> list[list[tuple[T, float]]]:
        """`nearest` where there is one segment, and no filter: answers that need no ordering are taken as they come, as
        nearly all are; the others are found once more, and ordered."""
        scores, positions = part.segment.search(queries, k + 1, part.live, part.count)
        apart = _are_apart(scores) & (positions[:, k - 1] >= 0)
        if min_score is not None:
            apart &= scores[:, k - 1] >= min_score - TOLERANCE
        whole = bool(apart.all())
        tops, at = (scores[:, :k], positions[:, :k]) if whole else (scores[apart, :k], positions[apart, :k])
        flat: list[int] = at.ravel().tolist()
        pairs = zip(read.stored(part.segment, flat), tops.clip(-1, 1).ravel().tolist(), strict=True)
        found = [list(itertools.islice(pairs, k)) for _ in tops]
        if whole:
            return found
        others = np.flatnonzero(~apart)
        nothing = [None] * len(others), [frozenset[str]()] * len(others)
        rows = self._nearest(queries[others], k, *nothing, min_score)
        for i, each in zip(others.tolist(), self._with(read, rows), strict=True):
            found.insert(i, each)
        return found

    def groups(
        self,
        query: Embeddings,
        k: int,
        size: int,
        field: Sequence[str],
        wanted: Filter | None,
        left_out: frozenset[str],
        min_score: float | None = None,
    ) -> list[list[Hit]]:
        """The k best groups of rows with one value of a payload field (a path), each with its `size` best rows; rows without
        the field are groups of their own. Groups come by their best row. `query`: [1, D]. At most the 10,000 nearest rows
        are grouped."""
        read = _value_of(field)
        reach = min(4 * k * size, GROUPED)
        while True:
            (found,) = self._nearest(query, reach, [wanted], [left_out], min_score)
            groups: dict[Any, list[Hit]] = {}
            for each in found:
                value = read(self._payload(each))
                name = ("alone", self._key(each)) if value is None else (type(value) is bool, value)
                if name in groups or len(groups) < k:
                    rows = groups.setdefault(name, [])
                    if len(rows) < size:
                        rows.append(self._hit(each))
            full = len(groups) == k and all(len(rows) == size or name[0] == "alone" for name, rows in groups.items())
            if full or len(found) < reach or reach == GROUPED:
                return list(groups.values())
            reach = min(4 * reach, GROUPED)

    def within(
        self, query: Embeddings, min_score: float, wanted: Filter | None = None, left_out: frozenset[str] = frozenset()
    ) -> list[Hit]:
        """Every live row at least so similar to the query [1, D], best first."""
        reach = 64
        while True:
            (found,) = self._nearest(query, reach, [wanted], [left_out], min_score)
            if len(found) < reach:
                return [self._hit(each) for each in found]
            reach *= 4

    def expanded(
        self, queries: Embeddings, neighbours: int, alpha: float, filters: Sequence[Filter | None],
        left_out: Sequence[frozenset[str]],
    ) -> Embeddings:  # fmt: skip
        """Each query [Q, D] plus its nearest neighbours, weighted by similarity to the power of `alpha`: α-query expansion
        (Radenović et al. 2018, section 3.4; α = 0 is the average of Chum et al. 2007)."""
        grown = queries.copy()
        for i, row in enumerate(self._nearest(queries, neighbours, filters, left_out, None)):
            for each in row:
                if each[0] > 0:
                    grown[i] += each[0] ** alpha * self._vector(each)
        scaled: Embeddings = grown / np.linalg.norm(grown, axis=1, keepdims=True)
        return scaled

    def _nearest(
        self,
        queries: Embeddings,
        k: int,
        filters: Sequence[Filter | None],
        left_out: Sequence[frozenset[str]],
        min_score: float | None,
    ) -> list[list[_Found]]:
        found: list[list[_Found]] = [[] for _ in queries]
        tied = np.zeros(len(queries), np.bool_)  # several rows may have one score, to six digits
        places = np.zeros(len(queries), np.int64)
        more = max((len(names) for names in left_out), default=0)
        for wanted, members in _alike(filters):
            asked = queries if len(members) == len(queries) else queries[members]
            for part, search, count in self._searches(wanted):
                scores, positions = _with_ties(search, asked, k + more, count)
                places[members] += 1
                tied[members] = (np.diff(np.sort(scores, axis=1), axis=1) < 2e-6).any(axis=1)
                for i, row_scores, row_positions in zip(members, scores.tolist(), positions.tolist(), strict=True):
                    some: Iterable[_Found] = zip(row_scores, itertools.repeat(part), row_positions)
                    found[i] += [each for each in some if each[2] >= 0] if -1 in row_positions else some
        return [
            self._ranked(row, k, names, min_score, may_tie)
            for row, names, may_tie in zip(found, left_out, (tied | (places > 1)).tolist(), strict=True)
        ]

    def _ranked(
        self, row: list[_Found], k: int, names: frozenset[str], min_score: float | None, may_tie: bool
    ) -> list[_Found]:
        """The k best, without those of some keys."""
        row.sort(key=_score, reverse=True)
        if may_tie and len({round(score, 6) for score, _, _ in row}) < len(row):
            row.sort(key=lambda each: (-round(each[0], 6), self._key(each)))
        if names:
            row = [each for each in row if self._key(each) not in names]
        if min_score is not None:
            row = [each for each in row if each[0] >= min_score - TOLERANCE]
        return row[:k]

    def _searches(
        self, wanted: Filter | None
    ) -> Iterator[tuple[Part | None, Callable[[Embeddings, int], tuple[Embeddings, Rows]], int]]:
        """Where rows that a filter passes are: the segment (None: fresh rows), how to search, and how many rows."""
        for part in self.parts:
            bits, count, rows = part.among(wanted)
            if count:
                search = functools.partial(part.segment.search, live=bits, live_count=count, rows=rows)
                yield part, search, count
        flags, count = self.fresh.among(wanted)
        if count:
            yield None, functools.partial(self.fresh.search, flags=flags, count=count), count

    def _with(self, read: Read[T], found: Sequence[Sequence[_Found]]) -> list[list[tuple[T, float]]]:
        """What is read of each row, and its score."""
        flat = [each for row in found for each in row]
        scores = [max(-1.0, min(1.0, score)) for score, _, _ in flat]
        pairs = zip(self._read(read, flat), scores, strict=True)
        return [list(itertools.islice(pairs, len(row))) for row in found]

    def _read(self, read: Read[T], found: Sequence[_Found]) -> list[T]:
        """Of all of them together."""
        if found and found[0][1] is not None and all(part is found[0][1] for _, part, _ in found):
            return read.stored(found[0][1].segment, [at for _, _, at in found])
        things: dict[tuple[int, int], T] = {}
        for part in {id(part): part for _, part, _ in found}.values():
            at = [position for _, each, position in found if each is part]
            some = read.fresh([self.fresh.rows[i] for i in at]) if part is None else read.stored(part.segment, at)
            things.update(zip(((id(part), i) for i in at), some, strict=True))
        return [things[id(part), at] for _, part, at in found]

    def _hit(self, each: _Found) -> Hit:
        score, part, at = each
        row = self.fresh.rows[at] if part is None else part.segment.row(at)
        return Hit(row, max(-1.0, min(1.0, score)))

    def _key(self, each: _Found) -> str:
        _, part, at = each
        return self.fresh.key(at) if part is None else part.segment.key(at)

    def _payload(self, each: _Found) -> str:
        _, part, at = each
        return self.fresh.rows[at].payload if part is None else part.segment.payload(at)

    def _vector(self, each: _Found) -> Embeddings:
        _, part, at = each
        return self.fresh.buffer[at] if part is None else part.segment.vector(at)


def _alike(filters: Sequence[Filter | None]) -> list[tuple[Filter | None, list[int]]]:
    """Queries with the same filter together."""
    together: dict[str | None, tuple[Filter | None, list[int]]] = {}
    for i, each in enumerate(filters):
        together.setdefault(None if each is None else each.text, (each, []))[1].append(i)
    return list(together.values())


def _with_ties(
    search: Callable[[Embeddings, int], tuple[Embeddings, Rows]], queries: Embeddings, k: int, count: int
) -> tuple[Embeddings, Rows]:
    """The k best of `count` rows, and those as near as the last of them: which of them come is for the key to say."""
    wanted = k + 1
    while True:
        scores, rows = search(queries, wanted)
        if wanted >= min(count, GROUPED) or scores.shape[1] <= k or _are_apart(scores).all():
            return scores, rows
        ordered = -np.sort(-scores, axis=1)
        if (ordered[:, -1] < ordered[:, k - 1] - 1e-6).all():
            return scores, rows
        wanted *= 4


def _are_apart(scores: Embeddings) -> npt.NDArray[np.bool_]:
    """Whether the scores [Q, N] of each query descend, and no two of them may be equal to six digits: [Q]."""
    apart: npt.NDArray[np.bool_] = np.all(scores[:, 1:] < scores[:, :-1] - 2e-6, axis=1)
    return apart


def _value_of(field: Sequence[str]) -> Callable[[str], Any]:
    """Reads a payload field for grouping: None where it is absent, an object or a list."""

    def read(payload: str) -> Any:
        value: Any = json.loads(payload)
        for name in field:
            value = value.get(name) if isinstance(value, dict) else None
        return value if isinstance(value, str | float | int) else None

    return read
