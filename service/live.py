"""The rows of a view by number, read block by block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from export.bundle import Embeddings
from service.filter import Filter
from service.index import BLOCK, Rows
from service.segment import StoredRow
from service.view import View


class Live:
    """The rows of a view by number: the segments' one after another, then the fresh ones; dead ones have numbers, too."""

    def __init__(self, view: View) -> None:
        self._parts = view.parts
        self._fresh = view.fresh
        self._stored = [*(part.segment.vectors for part in view.parts), view.fresh.buffer[: view.fresh.count]]
        self.ends: list[int] = np.cumsum([len(vectors) for vectors in self._stored]).tolist()
        """Where the numbers of each segment end, and those of the fresh rows."""
        self.starts = [0, *self.ends[:-1]]
        """Where they start."""

    @property
    def rows(self) -> int:
        """Dead ones included."""
        return self.ends[-1]

    @property
    def dim(self) -> int:
        """Length of the vectors."""
        return int(self._fresh.buffer.shape[1])

    def flags(self, wanted: Filter | None = None) -> npt.NDArray[np.bool_]:
        """bool [rows]: which live, and pass a filter."""
        flags = [*(part.flags(wanted) for part in self._parts), self._fresh.among(wanted)[0]]
        return np.concatenate(flags).view(np.bool_)

    def sequences(self) -> Rows:
        """[rows]: the number of the write that each came with."""
        fresh = np.array([row.sequence for row in self._fresh.rows[: self._fresh.count]], np.int64)
        return np.concatenate([*(part.segment.table["sequence"].to_numpy() for part in self._parts), fresh])

    def blocks(self, flags: npt.NDArray[np.bool_]) -> Iterator[tuple[Rows, Embeddings]]:
        """Numbers [B], ascending, and vectors [B, D] of flagged rows, some thousand at a time, as they are stored."""
        for start, vectors in zip(self.starts, self._stored, strict=True):
            for low in range(0, len(vectors), BLOCK):
                block = vectors[low : low + BLOCK]
                at = np.flatnonzero(flags[start + low : start + low + len(block)])
                if len(at):
                    yield at + (start + low), np.asarray(block[at], np.float32)

    def vectors(self, rows: Rows) -> Embeddings:
        """[R, D] as they are stored."""
        found = np.empty((len(rows), self.dim), np.float32)
        for source, mine, at in self.places(rows):
            found[mine] = self._stored[source][at]
        return found

    def names(self, rows: Rows) -> tuple[list[str], list[str]]:
        """Keys and source URIs."""
        keys, uris = np.empty(len(rows), object), np.empty(len(rows), object)
        for source, mine, at in self.places(rows):
            if source == len(self._parts):
                held = [self._fresh.rows[i] for i in at.tolist()]
                keys[mine], uris[mine] = [row.key for row in held], [row.source_uri for row in held]
            else:
                table = self._parts[source].segment.table.select(["key", "source_uri"]).take(at)
                keys[mine], uris[mine] = table["key"].to_pylist(), table["source_uri"].to_pylist()
        return keys.tolist(), uris.tolist()

    def places(self, rows: Rows) -> Iterator[tuple[int, npt.NDArray[np.bool_], Rows]]:
        """Where rows are: a segment's place in the view (behind them all: the fresh rows), which of the rows are there,
        and their positions in it."""
        sources = np.searchsorted(self.ends, rows, side="right")
        for source in np.unique(sources).tolist():
            mine = sources == source
            yield source, mine, rows[mine] - self.starts[source]

    def row(self, number: int) -> StoredRow:
        """What is stored beside the vector."""
        source = int(np.searchsorted(self.ends, number, side="right"))
        at = number - self.starts[source]
        return self._fresh.rows[at] if source == len(self._parts) else self._parts[source].segment.row(at)

    def locate(self, ids: Sequence[int]) -> Rows:
        """Numbers [I] of rows by id; −1 for those that came after the view."""
        wanted = np.asarray(ids, np.int64)
        found = np.full(len(wanted), -1, np.int64)
        for part, start in zip(self._parts, self.starts, strict=False):
            held = part.segment.ids
            at = np.minimum(np.searchsorted(held, wanted), len(held) - 1)
            found = np.where(held[at] == wanted, start + at, found)
        for i in np.flatnonzero(found < 0).tolist():
            place = self._fresh.places.get(ids[i])
            if place is not None and place < self._fresh.count:
                found[i] = self.starts[-1] + place
        return found

    def payloads(self) -> Iterator[tuple[int, list[str]]]:
        """First number and payloads of some thousand rows, dead ones too."""
        for part, start in zip(self._parts, self.starts, strict=False):
            column = part.segment.table["payload"]
            for low in range(0, len(part.segment), BLOCK):
                yield start + low, column.slice(low, BLOCK).to_pylist()
        rows = self._fresh.rows[: self._fresh.count]
        if rows:
            yield self.starts[-1], [row.payload for row in rows]
