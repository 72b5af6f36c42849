"""A collection: durable, searchable, online (architecture 3.3).

    collection/
        collection.json    CollectionManifest
        records.sqlite     the record of truth and only commit point
        segments/NNNN/     immutable vectors and index
        lock               held by the one process that writes

A search is exact over the fresh rows plus FAISS over the segments, on an immutable `_View` that writers replace; so
readers never wait, and see every acknowledged write.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import socket
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from export.bundle import Embeddings, RefusalError, Sealed, make_folder, read_contract, write_file
from service.errors import DataLossError, InvalidArgumentError, MismatchError, NotFoundError
from service.fresh import Fresh
from service.index import Bitmap
from service.records import MAX_KEY_BYTES, FileState, NewRow, Records
from service.segment import Segment, StoredRow, joined, table_of, write_segment

COLLECTION_FORMAT = 1
# Fresh rows are searched exactly; beyond this many they are worth a segment.
FRESH_LIMIT = 10_000
# Segments are merged when so many are of about one size, or when such a share of one's rows is dead.
TIER = 4
DEAD_SHARE = 0.2


class CollectionManifest(Sealed):
    """collection.json."""

    format_version: int = COLLECTION_FORMAT
    """Format of the folder."""
    space_id: str
    """Embedding space of the vectors."""
    dim: int
    """Their length."""
    metric: str = "cosine"
    """How they are compared."""
    created: datetime
    """When."""


class Hit(NamedTuple):
    """A neighbour."""

    row: StoredRow
    score: float


class StoredItem(NamedTuple):
    """An item with its vector."""

    row: StoredRow
    vector: Embeddings
    origin: str
    """Who made the vector: variant and provider, or 'client'."""


class SegmentInfo(NamedTuple):
    """What a segment holds, and how it is searched."""

    number: int
    rows: int
    """Deleted and replaced ones included."""
    dead: int
    """These."""
    factory: str
    """FAISS factory string."""
    nprobe: int
    """Lists visited per query (0: exact)."""
    recall_at_10: float
    """Against exact search, when it was built."""


@dataclass(frozen=True)
class _Part:
    """A segment and which of its rows live (None: all)."""

    number: int
    segment: Segment
    live: Bitmap | None = None
    live_count: int = 0

    @property
    def count(self) -> int:
        """Live rows."""
        return len(self.segment) if self.live is None else self.live_count

    def flags(self) -> Bitmap:
        """1 for each live row, 0 for each dead one."""
        if self.live is None:
            return np.ones(len(self.segment), np.uint8)
        return np.unpackbits(self.live, bitorder="little")[: len(self.segment)]

    def without(self, positions: Sequence[int]) -> _Part:
        """The same with some rows dead."""
        flags = self.flags()
        flags[list(positions)] = 0
        return replace(self, live=np.packbits(flags, bitorder="little"), live_count=int(flags.sum()))


@dataclass(frozen=True)
class _View:
    """What a search sees: never changed once published."""

    parts: tuple[_Part, ...]
    fresh: Fresh


class Collection:
    """One collection, open for writing by this process. Thread-safe."""

    def __init__(self, folder: Path, space_id: str | None = None) -> None:
        """Open. Raises `RefusalError` when it is not one, is damaged, locked, or of another space than `space_id`."""
        self.folder = folder
        path = folder / "collection.json"
        if not path.is_file():
            raise RefusalError(
                f"{folder} is not a collection (no collection.json): make one with `likewise index build --bundle BUNDLE "
                f"--images PICTURES --out {folder}`"
            )
        again = "restore the collection from a backup, or build it again"
        self.manifest = read_contract(path, CollectionManifest, COLLECTION_FORMAT, again)
        if space_id is not None and space_id != self.manifest.space_id:
            raise RefusalError(
                f"{folder} holds vectors of space {self.manifest.space_id}, the bundle makes {space_id} "
                "(MODEL_INDEX_MISMATCH): use the bundle that the collection was built with, or build it again with "
                "this one"
            )
        self._lock_file = _lock(folder)
        try:
            if not (folder / "records.sqlite").is_file():
                raise RefusalError(f"{folder / 'records.sqlite'} is missing, so the segments mean nothing: {again}")
            self._records = Records(folder / "records.sqlite")
            self._write_lock = threading.Lock()
            self._closed = False
            self._flush_lock = threading.Lock()
            self._merge_lock = threading.Lock()  # taken before the others
            self._stopping = False
            self._remove_orphans()
            self._view = self._load()
            self._count = self._records.count()
            self._sequence = self._records.counter("sequence")
        except BaseException:
            self._lock_file.close()
            raise

    @classmethod
    def create(cls, folder: Path, space_id: str, dim: int) -> Collection:
        """Make an empty collection. Raises `RefusalError` when the folder exists and is not empty."""
        # What an interrupted start of ours may have left; collection.json is written last.
        own = ("building", "lock", "unreadable.tsv", "records.sqlite", "records.sqlite-wal", "records.sqlite-shm")
        if folder.exists() and not folder.is_dir():
            raise RefusalError(f"{folder} is a file: choose another folder")
        if folder.is_dir() and any(p.name not in own and not p.name.endswith(".tmp") for p in folder.iterdir()):
            raise RefusalError(f"{folder} exists and is not a collection: choose another folder")
        make_folder(folder)
        Records(folder / "records.sqlite").close()
        manifest = CollectionManifest(space_id=space_id, dim=dim, created=datetime.now(UTC).replace(microsecond=0))
        write_file(folder / "collection.json", manifest.sealed().model_dump_json(indent=2))
        return cls(folder)

    @property
    def name(self) -> str:
        """Its folder's name."""
        return self.folder.name

    @property
    def space_id(self) -> str:
        """Embedding space of its vectors."""
        return self.manifest.space_id

    @property
    def dim(self) -> int:
        """Length of its vectors."""
        return self.manifest.dim

    def __len__(self) -> int:
        return self._count

    @property
    def sequence(self) -> int:
        """Sequence number of the last write."""
        return self._sequence

    @property
    def origins(self) -> set[str]:
        """Variants and providers that made its vectors, deleted ones until they are compacted away; those that clients
        brought are not counted."""
        view = self._view
        origins = {*view.fresh.made_by(), *(origin for part in view.parts for origin in part.segment.manifest.origins)}
        return origins - {"client"}

    @property
    def fresh_count(self) -> int:
        """Rows that no segment holds yet."""
        return self._view.fresh.live

    def segments(self) -> list[SegmentInfo]:
        """The live segments, oldest first."""
        return [
            SegmentInfo(p.number, m.rows, m.rows - p.count, m.factory, m.nprobe, m.recall_at_10)
            for p in self._view.parts
            for m in (p.segment.manifest,)
        ]

    # --- reading ------------------------------------------------------------------------------------------------

    def search(
        self, queries: Embeddings, k: int, min_score: float | None = None, leave_out: str | None = None
    ) -> list[list[Hit]]:
        """The k most similar live rows of each query [Q, D], best first; ties by key. Vectors are scaled to length 1."""
        queries = unit_rows(queries, self.dim, "vector")
        view = self._view
        wanted = k + (leave_out is not None)
        found: list[list[tuple[float, str, _Part | None, int]]] = [[] for _ in queries]
        for part in view.parts:
            scores, positions = part.segment.search(queries, wanted, part.live, part.live_count)
            for query, row_scores, row_positions in zip(found, scores.tolist(), positions.tolist(), strict=True):
                query += [
                    (score, part.segment.key(at), part, at)
                    for score, at in zip(row_scores, row_positions, strict=True)
                    if at >= 0
                ]
        if view.fresh.live:
            scores, positions = view.fresh.search(queries, wanted)
            for query, row_scores, row_positions in zip(found, scores.tolist(), positions.tolist(), strict=True):
                query += [
                    (score, view.fresh.rows[at].key, None, at)
                    for score, at in zip(row_scores, row_positions, strict=True)
                ]
        results = []
        for candidates in found:
            candidates.sort(key=lambda c: (-c[0], c[1]))
            hits = [
                Hit(view.fresh.rows[at] if part is None else part.segment.row(at), max(-1.0, min(1.0, score)))
                for score, key, part, at in candidates[:wanted]
                if key != leave_out and (min_score is None or score >= min_score)
            ]
            results.append(hits[:k])
        return results

    def get(self, key: str) -> StoredItem:
        """A live item. Raises `NotFoundError`."""
        with self._open():
            return self._item(key)

    def files(self) -> dict[str, FileState]:
        """The file behind each key."""
        with self._open():
            return self._records.files()

    # --- writing ------------------------------------------------------------------------------------------------

    def upsert(self, rows: Sequence[NewRow], vectors: Embeddings) -> list[int]:
        """Insert or replace rows with vectors [N, D]; returns sequence numbers. Durable and visible on return.

        Of rows with the same key the last one counts. Raises `InvalidArgumentError`; then nothing was written.
        """
        for i, row in enumerate(rows):
            check_key(row.key, f"items[{i}].key")
        if not rows:
            return []
        vectors = unit_rows(vectors, self.dim, "items.vector")
        with self._open():
            return self._write(rows, vectors, [])

    def move(self, moves: Sequence[tuple[str, NewRow]]) -> None:
        """Give items (old key, new row) other keys; vectors and their origins stay. Durable and visible on return.

        Raises `NotFoundError`; then nothing was written.
        """
        for _, row in moves:
            check_key(row.key, "key")
        if not moves:
            return
        with self._open():
            items = [self._item(old) for old, _ in moves]
            rows = [row._replace(origin=item.origin) for (_, row), item in zip(moves, items, strict=True)]
            self._write(rows, np.stack([item.vector for item in items]), [old for old, _ in moves])

    def _item(self, key: str) -> StoredItem:
        record, view = self._records.live(key), self._view
        if record is None:
            raise NotFoundError(f"the collection {self.name!r} has no item with the key {key!r}", "item", key)
        if record.vector is not None:
            return StoredItem(record.row, record.vector, record.origin)
        for part in view.parts:
            if part.number == record.segment:
                vector = np.array(part.segment.vectors[part.segment.position(record.row.id)])
                return StoredItem(record.row, vector, record.origin)
        raise DataLossError(f"the item {key!r} is in segment {record.segment}, which is not open: restart the server")

    def _write(self, rows: Sequence[NewRow], vectors: Embeddings, gone: Sequence[str]) -> list[int]:
        """Bury the items `gone`, then insert or replace rows, in one commit. Under the write lock."""
        with self._records.transaction():
            first_id = self._records.take("id", len(rows))
            first = self._records.take("sequence", len(rows))
            ids, sequences = range(first_id, first_id + len(rows)), range(first, first + len(rows))
            replaced = [self._records.live(key) for key in (*(row.key for row in rows), *gone)]
            for key in gone:
                self._records.bury(key, first)
            for i in range(len(rows)):  # one by one: a key may repeat
                self._records.insert(rows[i : i + 1], ids[i : i + 1], sequences[i : i + 1], None, vectors[i : i + 1])
        last = {row.key: i for i, row in enumerate(rows)}
        stored = {
            i: StoredRow(ids[i], rows[i].key, rows[i].payload, rows[i].source_uri, sequences[i])
            for i in sorted(last.values())
        }
        self._sequence = sequences[-1]
        dead = {record.row.id: record.segment for record in replaced if record is not None}
        self._publish_writes(dead, list(stored.values()), vectors[list(stored)], [rows[i].origin for i in stored])
        return list(sequences)

    def delete(self, keys: Sequence[str]) -> list[str]:
        """Delete items; returns the keys that did not exist. Durable and visible on return."""
        missing, dead = [], {}
        with self._open():
            with self._records.transaction():
                for key in dict.fromkeys(keys):
                    record = self._records.live(key)
                    if record is None:
                        missing.append(key)
                    else:
                        self._records.bury(key, self._records.take("sequence"))
                        dead[record.row.id] = record.segment
                last = self._records.counter("sequence")
            self._sequence = last
            self._publish_writes(dead, [], np.zeros((0, self.dim), np.float32), [])
        return missing

    def touch(self, files: Iterable[tuple[str, int]]) -> None:
        """Note new times of change (key, nanoseconds) of files whose bytes are the same: nothing is embedded again."""
        with self._open(), self._records.transaction():
            self._records.touch(files)

    def add_segment(self, rows: Sequence[NewRow], vectors: Embeddings) -> None:
        """Insert or replace many rows at once, as a segment of their own. Durable and visible on return."""
        for row in rows:
            check_key(row.key, "key")
        vectors = unit_rows(vectors, self.dim, "vector")
        with self._merge_lock, self._flush_lock, self._open():
            with self._records.transaction():  # numbers first: they are in the segment's file
                number = self._records.take("segment")
                first_id = self._records.take("id", len(rows))
                first = self._records.take("sequence", len(rows))
            ids, sequences = range(first_id, first_id + len(rows)), range(first, first + len(rows))
            stored = [
                StoredRow(i, row.key, row.payload, row.source_uri, s)
                for i, s, row in zip(ids, sequences, rows, strict=True)
            ]
            made_by = Counter(row.origin for row in rows)
            segment = write_segment(self._segment_folder(number), table_of(stored), vectors, made_by)
            with self._unless_committed(number), self._records.transaction():
                replaced = [record for row in rows if (record := self._records.live(row.key)) is not None]
                self._records.insert(rows, ids, sequences, number, None)
                self._records.adopt(number)
            # From here on nothing can fail: memory follows the disk.
            self._sequence = sequences[-1]
            self._publish_writes({r.row.id: r.segment for r in replaced}, [], np.zeros((0, self.dim), np.float32), [])
            self._view = replace(self._view, parts=(*self._view.parts, _Part(number, segment)))
            self._count += len(rows)

    def flush(self) -> None:
        """Move the fresh rows into a segment. Searches and writes go on meanwhile."""
        with self._flush_lock:
            with self._open():
                view = self._view
                fresh = view.fresh
                if not fresh.live:  # what was replaced or deleted takes no more room
                    self._view = replace(view, fresh=self._no_rows())
                    return
                with self._records.transaction():
                    number = self._records.take("segment")
            folder = self._segment_folder(number)
            at = fresh.positions()
            rows = [fresh.rows[i] for i in at.tolist()]
            made_by = Counter(fresh.origins[i] for i in at.tolist())
            segment = write_segment(folder, table_of(rows), fresh.buffer[at], made_by)
            moved = [row.id for row in rows]
            with self._unless_committed(number), self._open():
                with self._records.transaction():
                    self._records.adopt(number, moved)
                # From here on nothing can fail. Rows replaced or deleted meanwhile are dead in the segment.
                now = self._view
                dead = np.flatnonzero(now.fresh.flags[at] == 0).tolist()
                left = [i for i in now.fresh.positions().tolist() if i >= fresh.count]
                part = _Part(number, segment)
                self._view = _View(
                    (*now.parts, part.without(dead) if dead else part),
                    Fresh.of(
                        [now.fresh.rows[i] for i in left], now.fresh.buffer[left], [now.fresh.origins[i] for i in left]
                    ),
                )

    @property
    def flush_due(self) -> bool:
        """Whether there are so many fresh rows that they are worth a segment."""
        return self._view.fresh.count >= FRESH_LIMIT

    @property
    def merge_due(self) -> bool:
        """Whether `compact` has something to merge."""
        return bool(worth_merging(self._view.parts))

    def maintain(self) -> None:
        """Move many fresh rows into a segment; merge segments that became many, or hold many dead rows."""
        merged = 1
        while merged:
            if self.flush_due:
                self.flush()
            merged = self.compact()

    def compact(self, everything: bool = False) -> int:
        """Merge segments into one without their dead rows: `everything`, or what is worth it. Returns how many were merged.

        Searches, writes and flushes go on meanwhile. Killed at any point, the collection holds the old segments or the new.
        """
        with self._merge_lock:
            with self._open():
                parts = self._view.parts
                if everything:
                    old = parts if len(parts) > 1 or any(p.count < len(p.segment) for p in parts) else ()
                else:
                    old = worth_merging(parts)
                if not old or self._stopping:
                    return 0
                numbers = [part.number for part in old]
                with self._records.transaction():
                    number = self._records.take("segment")
                before = self._records.counter("sequence")
                made_by: Counter[str] = Counter()
                for each in numbers:
                    made_by.update(self._records.origins(each))
            rows, vectors = joined([part.segment for part in old], [np.flatnonzero(part.flags()) for part in old])
            segment = write_segment(self._segment_folder(number), rows, vectors, made_by) if len(rows) else None
            with self._unless_committed(number), self._open():
                with self._records.transaction():
                    self._records.merge(numbers, None if segment is None else number, before)
                # From here on nothing can fail. Rows replaced or deleted meanwhile are dead in the new segment.
                now = {part.number: part for part in self._view.parts}
                kept = [part for part in self._view.parts if part.number not in numbers]
                if segment is not None:
                    merged = _Part(number, segment)
                    died = [
                        row_id
                        for part in old
                        for row_id in part.segment.ids[part.flags() > now[part.number].flags()].tolist()
                    ]
                    kept.append(merged.without([segment.position(i) for i in died]) if died else merged)
                self._view = replace(self._view, parts=tuple(kept))
            for gone in numbers:  # readers that still search them have their files mapped
                shutil.rmtree(self._segment_folder(gone))
            return len(old)

    def shrink(self) -> None:
        """Give room that is free in records.sqlite back to the disk."""
        with self._open():
            self._records.shrink()

    def stop_merging(self) -> None:
        """Begin no other merge; one that is under way ends."""
        self._stopping = True

    @contextmanager
    def _unless_committed(self, number: int) -> Iterator[None]:
        """Remove a written segment again when its commit fails."""
        try:
            yield
        except BaseException:
            if number not in self._records.segments():
                shutil.rmtree(self._segment_folder(number), ignore_errors=True)
            raise

    def close(self) -> None:
        """Release files and lock; waits for a write or flush that is under way. Later calls are refused."""
        with self._merge_lock, self._flush_lock, self._write_lock:
            self._closed = True
            self._records.close()
            self._lock_file.close()

    @contextmanager
    def _open(self) -> Iterator[None]:
        """The write lock, on a collection that is still open. Raises `NotFoundError` on one deleted meanwhile."""
        with self._write_lock:
            if self._closed:
                raise NotFoundError(f"the collection {self.name!r} is closed or was deleted", "collection", self.name)
            yield

    # --- inside -------------------------------------------------------------------------------------------------

    def _no_rows(self) -> Fresh:
        return Fresh.of([], np.zeros((0, self.dim), np.float32), [])

    def _segment_folder(self, number: int) -> Path:
        return self.folder / "segments" / f"{number:04d}"

    def _publish_writes(
        self, dead: dict[int, int | None], rows: list[StoredRow], vectors: Embeddings, origins: list[str]
    ) -> None:
        """Replace the view after a commit: rows `dead` (id → segment) go, `rows` come."""
        view = self._view
        parts = []
        for part in view.parts:
            gone = [part.segment.position(i) for i, segment in dead.items() if segment == part.number]
            parts.append(part.without(gone) if gone else part)
        fresh = view.fresh.without(i for i, segment in dead.items() if segment is None)
        self._view = _View(tuple(parts), fresh.extended(rows, vectors, origins) if rows else fresh)
        self._count += len(rows) - len(dead)

    def _remove_orphans(self) -> None:
        """Segments that were written but never committed: a kill came between."""
        committed = {f"{number:04d}" for number in self._records.segments()}
        for folder in (self.folder / "segments").glob("*"):
            if folder.name not in committed:
                shutil.rmtree(folder)

    def _load(self) -> _View:
        """The view that the records describe. Raises `RefusalError` where segments and records disagree."""
        dead: dict[int, list[int]] = {}
        for number, row_id in self._records.tombstones():
            dead.setdefault(number, []).append(row_id)
        parts = []
        for number in self._records.segments():
            segment = Segment(self._segment_folder(number))
            if segment.manifest.dim != self.dim or segment.identities() != self._records.held(number):
                raise RefusalError(
                    f"{segment.folder} and {self.folder / 'records.sqlite'} disagree about the rows of the segment: one of "
                    "them is damaged; restore the collection from a backup, or build it again"
                )
            part = _Part(number, segment)
            if number in dead:
                part = part.without(np.searchsorted(segment.ids, dead[number]).tolist())
            parts.append(part)
        fresh = self._records.fresh()
        vectors = [record.vector for record in fresh if record.vector is not None]
        matrix = np.stack(vectors) if vectors else np.zeros((0, self.dim), np.float32)
        rows, origins = [record.row for record in fresh], [record.origin for record in fresh]
        return _View(tuple(parts), Fresh.of(rows, matrix, origins))


def worth_merging(parts: Sequence[_Part]) -> tuple[_Part, ...]:
    """The segments to merge now: those with many dead rows, and where four or more are of about one size, these.

    So each row is written about log₄ N times, and a search visits about 3 log₄ N segments (the size-tiered compaction of
    log-structured stores, O'Neil et al. 1996).
    """
    tiers: dict[int, list[_Part]] = {}
    for part in parts:
        tiers.setdefault(int(math.log(max(part.count, 1), TIER)), []).append(part)
    crowded = next((tiers[size] for size in sorted(tiers) if len(tiers[size]) >= TIER), [])
    chosen = {part.number for part in crowded}
    chosen |= {part.number for part in parts if len(part.segment) - part.count >= DEAD_SHARE * len(part.segment)}
    return tuple(part for part in parts if part.number in chosen)


def check_key(key: str, field: str) -> None:
    """Raises `InvalidArgumentError` for keys that cannot be stored."""
    size = len(key.encode("utf-8", "replace"))
    if not 1 <= size <= MAX_KEY_BYTES:
        raise InvalidArgumentError(
            f"the key has {size} bytes of UTF-8, 1 to {MAX_KEY_BYTES} are allowed: shorten it", "BAD_KEY", field
        )


def check_space(found: str, expected: str) -> None:
    """Raises `MismatchError` when a request names another space; an empty name passes."""
    if found and found != expected:
        raise MismatchError(
            f"the vectors are of space {found}, this server and its collections are of {expected}: embed the pictures "
            "with this server's encoder",
            found,
            expected,
        )


def unit_rows(vectors: Embeddings, dim: int, field: str) -> Embeddings:
    """float32 [N, dim], each row scaled to length 1. Raises `InvalidArgumentError`."""
    vectors = np.ascontiguousarray(np.atleast_2d(vectors), np.float32)
    if vectors.shape[1] != dim:
        raise InvalidArgumentError(
            f"the vector has {vectors.shape[1]} values, the encoder makes {dim}: send an embedding of this server's "
            "encoder",
            "BAD_DIMENSIONS",
            field,
        )
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    if not np.isfinite(lengths).all() or (lengths < 1e-12).any():
        raise InvalidArgumentError(
            "the vector is zero or holds values that are not finite: send an embedding", "BAD_VECTOR", field
        )
    # Rows that are unit already stay bit-identical: what was embedded is what is stored.
    scaled: Embeddings = np.where(np.abs(lengths - 1) < 1e-6, vectors, vectors / lengths).astype(np.float32)
    return scaled


def _lock(folder: Path) -> IO[str]:
    """Take the writer's lock. Raises `RefusalError` that names the owner."""
    file = (folder / "lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        try:
            owner = json.loads(file.read())
            who = f"process {owner['pid']} on {owner['host']} (since {owner['since']})"
        except (ValueError, KeyError):
            who = "another process"
        file.close()
        raise RefusalError(
            f"{folder} is open for writing by {who}: stop it first, or send your writes to that server"
        ) from None
    file.seek(0)
    file.truncate()
    since = datetime.now(UTC).isoformat(timespec="seconds")
    file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}))
    file.flush()
    return file
