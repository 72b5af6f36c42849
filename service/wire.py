"""Neighbours as they go over the wire.

A serialised message is the concatenation of its fields, so a list of neighbours is made of pieces: each row's item, which
is the same in every answer and kept, and its score. Building ten of them field by field takes longer than finding them.
"""

from __future__ import annotations

import struct
import threading
import weakref
from collections.abc import Iterable, Sequence

from service.pb import likewise_pb2 as pb
from service.segment import Segment, StoredRow
from service.servicer import write_item

# Bytes of pieces that are kept, and what each takes beside its own.
KEPT_BYTES = 64 * 2**20
_EACH = 100
# Larger ones are made anew each time.
_LARGEST = 8192
_score = struct.Struct("<f").pack


class Items:
    """What rows are on the wire: a `Neighbor` of a `SearchResponse`, up to its score. Used from many threads."""

    def __init__(self, limit: int = KEPT_BYTES) -> None:
        """`limit`: bytes to keep."""
        self._limit = limit
        self._lock = threading.Lock()
        self._known: weakref.WeakKeyDictionary[Segment, dict[int, bytes]] = weakref.WeakKeyDictionary()
        self._bytes = 0

    def stored(self, segment: Segment, positions: Sequence[int]) -> list[bytes]:
        """Of a segment's rows, which never change."""
        known = self._known.get(segment)
        if known is None:
            with self._lock:
                known = self._known.setdefault(segment, {})
        found = list(map(known.get, positions))
        if all(found):
            return found  # type: ignore[return-value]
        missing = list({at for at, piece in zip(positions, found, strict=True) if piece is None})
        made = dict(zip(missing, self.fresh(segment.rows(missing)), strict=True))
        self._keep(known, {at: piece for at, piece in made.items() if len(piece) <= _LARGEST})
        return [piece or made[at] for at, piece in zip(positions, found, strict=True)]

    def fresh(self, rows: Iterable[StoredRow]) -> list[bytes]:
        """Of rows that no segment holds yet."""
        return [_piece(row) for row in rows]

    def _keep(self, known: dict[int, bytes], made: dict[int, bytes]) -> None:
        """Once there is no room all of them go: the few that come again and again are soon back."""
        with self._lock:
            self._bytes += sum(map(len, made.values())) + _EACH * len(made)
            if self._bytes > self._limit:
                for each in self._known.values():
                    each.clear()
                self._bytes = 0
            known.update(made)


def neighbors(found: Iterable[tuple[bytes, float]]) -> bytes:
    """A `SearchResponse` of pieces with their scores."""
    return b"".join([piece + _score(score) for piece, score in found])


def _piece(row: StoredRow) -> bytes:
    item = pb.Item()
    write_item(item, row)
    body = item.SerializeToString()
    head = b"\x0a" + _varint(len(body))  # Neighbor.item = 1
    size = len(head) + len(body) + 5
    return b"\x0a" + _varint(size) + head + body + b"\x15"  # SearchResponse.neighbors = 1; Neighbor.score = 2, fixed32


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)
