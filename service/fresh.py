"""Rows that no segment holds yet: appended in place, seen as they were by whoever looks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from export.bundle import Embeddings
from service.filter import Attributes, Filter
from service.index import Bitmap, Rows
from service.segment import StoredRow, attributes_of

CHUNK = 1024


@dataclass(frozen=True)
class Fresh:
    """One state of the fresh rows.

    Later states share its lists and its buffer and append to them, beyond `count`, where this state never looks; so a write
    copies its own rows and one byte per row, whatever is there. Only the newest state may be extended.
    """

    rows: list[StoredRow]
    origins: list[str]
    """Who made each vector."""
    places: dict[int, int]
    """id → position."""
    buffer: Embeddings
    """[capacity, D]"""
    flags: Bitmap
    """[count], 1 for each live row."""
    live: int
    """How many live."""
    chunks: dict[int, Attributes]
    """What filters look at, per 1,024 rows, made when a filter first comes."""

    @classmethod
    def of(cls, rows: Sequence[StoredRow], vectors: Embeddings, origins: Sequence[str]) -> Fresh:
        """Rows with vectors [N, D]."""
        nothing = cls([], [], {}, np.empty((0, vectors.shape[1]), np.float32), np.zeros(0, np.uint8), 0, {})
        return nothing.extended(rows, vectors, origins)

    @property
    def count(self) -> int:
        """Rows, deleted and replaced ones included."""
        return len(self.flags)

    def extended(self, rows: Sequence[StoredRow], vectors: Embeddings, origins: Sequence[str]) -> Fresh:
        """With more rows."""
        assert len(self.rows) == self.count, "an old state was extended"
        count, more = self.count, len(rows)
        buffer = self.buffer
        if count + more > len(buffer):
            buffer = np.empty((max(2 * (count + more), 256), buffer.shape[1]), np.float32)
            buffer[:count] = self.buffer[:count]
        buffer[count : count + more] = vectors
        self.places.update((row.id, count + i) for i, row in enumerate(rows))
        self.origins.extend(origins)
        self.rows.extend(rows)
        flags = np.concatenate([self.flags, np.ones(more, np.uint8)])
        return replace(self, buffer=buffer, flags=flags, live=self.live + more)

    def without(self, ids: Iterable[int]) -> Fresh:
        """With some rows dead."""
        positions = [self.places[i] for i in ids]
        if not positions:
            return self
        flags = self.flags.copy()
        flags[positions] = 0
        return replace(self, flags=flags, live=int(flags.sum()))

    def made_by(self) -> set[str]:
        """Who made the vectors of the live rows."""
        return {self.origins[at] for at in self.positions().tolist()}

    def key(self, position: int) -> str:
        """The key of the row at a position."""
        return self.rows[position].key

    def positions(self) -> Rows:
        """Where the live rows are, ascending."""
        return np.flatnonzero(self.flags)

    def vectors_at(self, positions: Rows | slice) -> Embeddings:
        """[N, D] at positions, of length 1; uncopied where they are a slice."""
        return self.buffer[positions]

    def among(self, wanted: Filter | None) -> tuple[Bitmap, int]:
        """1 for each live row that a filter passes, [count], and how many they are."""
        if wanted is None:
            return self.flags, self.live
        masks = []
        for low in range(0, self.count, CHUNK):
            rows = self.rows[low : min(low + CHUNK, self.count)]
            known = self.chunks.get(low)
            if known is None or len(known.key) < len(rows):
                known = self.chunks[low] = attributes_of(rows)
            masks.append(wanted.mask(known)[: len(rows)])
        flags = self.flags & np.concatenate(masks) if masks else self.flags
        return flags, int(flags.sum())

    def search(self, queries: Embeddings, k: int, flags: Bitmap, count: int) -> tuple[Embeddings, Rows]:
        """Scores and positions [Q, min(k, count)] of the rows most similar to queries [Q, D] among the `count` ones whose
        flag is set, in no order."""
        similarity: Embeddings = queries @ self.buffer[: self.count].T
        if count < self.count:
            similarity[:, flags == 0] = -np.inf
        k = min(k, count)
        best = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        return np.take_along_axis(similarity, best, 1), best
