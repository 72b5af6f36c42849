"""A collection: durable, searchable, online (architecture 3.3).

    collection/
        collection.json    CollectionManifest
        records.sqlite     the record of truth and only commit point
        segments/NNNN/     immutable vectors and index
        originals/ab/      pictures that came as bytes, by their digest (`keep_originals`)
        lock               held by the one process that writes

A search is exact over the fresh rows plus FAISS over the segments, on an immutable `View` that writers replace; so
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
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import accumulate, repeat, takewhile
from pathlib import Path
from typing import IO, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa

from export.bundle import Embeddings, RefusalError, make_folder, printable, write_file
from service.errors import DataLossError, InternalError, InvalidArgumentError
from service.fresh import Fresh
from service.index import BLOCK, Stored, blocks, check_factory
from service.originals import Originals, Swept, digest_of, place_of
from service.policy import IndexPolicy
from service.reading import COLLECTION_FORMAT, CollectionManifest, Readable, StoredItem, read_manifest, unit_rows
from service.records import MAX_KEY_BYTES, FileState, Made, NewRow, Reader, Records
from service.segment import (
    Batch,
    Segment,
    StoredRow,
    batch_of,
    batch_of_remains,
    batch_of_table,
    identities,
    joined,
    remains,
    write_segment,
)
from service.view import Part, View

# Fresh rows are searched exactly; beyond this many they are worth a segment.
FRESH_LIMIT = 10_000
# Upserts that wait for each other are committed together, up to about so many rows.
GROUP = 4096
MAX_NESTED = 64
# Segments are merged when so many are of about one size, or when such a share of one's rows is dead; but never to more rows
# than these, so that a merge takes bounded time, memory and disk however large the collection is.
LARGEST = 4_194_304
TIER = 4
DEAD_SHARE = 0.2
# Originals are looked through for those that no item names at most so often.
SWEEP_SECONDS = 3600.0
T = TypeVar("T")


class LostItem(NamedTuple):
    """An item whose vector could not be read any more."""

    key: str
    source_uri: str


@dataclass(eq=False)
class _Write:
    """An upsert on its way to the disk."""

    rows: Sequence[NewRow]
    vectors: Embeddings
    done: bool = False
    sequences: list[int] = field(default_factory=list)
    error: Exception | None = None


class Collection(Readable):
    """One collection, open for writing by this process. Thread-safe."""

    def __init__(self, folder: Path, space_id: str | None = None, recover: bool = False) -> None:
        """Open. Raises `RefusalError` when it is not one, is damaged, locked, or of another space than `space_id`.

        `recover`: make damaged indexes anew, give up the rows of segments whose vectors are damaged or missing, which are
        then in `lost`, and keep the rest.
        """
        self.folder = folder
        self.lost: list[LostItem] = []
        self.made_anew: list[int] = []
        """Segments whose index or columns were damaged, and are made of their vectors and rows again."""
        self.damaged_originals: list[LostItem] = []
        """Items whose original was missing or damaged, and is not kept any more."""
        self.manifest = read_manifest(folder, space_id)
        self.originals = Originals(folder)
        self._buried, self._swept_at = 0, -math.inf  # rows that went since the last sweep, and when it was
        self._write_lock = threading.Lock()
        self._waiting: deque[_Write] = deque()
        self._closed = False
        self._flush_lock = threading.Lock()
        self._merge_lock = threading.RLock()  # taken before the others
        self._stopping = False
        self._view = View((), self._no_rows())
        with ExitStack() as opened:
            self._lock_file = opened.enter_context(_lock(folder))
            self._records = opened.enter_context(closing(Records(folder / "records.sqlite")))
            self._reader = opened.enter_context(closing(Reader(folder / "records.sqlite")))
            if recover:
                self._give_up()
            self._remove_orphans()
            self._view = self._load(self._records, {})
            self._sequence = self._records.counter("sequence")
            opened.pop_all()

    @classmethod
    def create(
        cls, folder: Path, space_id: str, dim: int, policy: IndexPolicy | None = None, *, keep_originals: bool = False,
        thumbnail_pixels: int = 0, follows: str = "",
    ) -> Collection:  # fmt: skip
        """Make an empty collection whose indexes keep to `policy`; for the others see `CollectionManifest`. Raises
        `RefusalError` on a folder that is not empty."""
        # What an interrupted start of ours may have left; collection.json is written last.
        own = (
            "building",
            "lock",
            "sources",
            "unreadable.tsv",
            "records.sqlite",
            "records.sqlite-wal",
            "records.sqlite-shm",
            "records.sqlite-journal",
        )
        if folder.exists() and not folder.is_dir():
            raise RefusalError(f"{folder} is a file: choose another folder")
        if folder.is_dir() and any(p.name not in own and not p.name.endswith(".tmp") for p in folder.iterdir()):
            raise RefusalError(f"{folder} exists and is not a collection: choose another folder")
        policy = policy or IndexPolicy()
        check_factory(policy, dim)
        make_folder(folder)
        records = Records(folder / "records.sqlite", create=True)
        used = records.counter("id")
        records.close()
        if used:
            raise RefusalError(
                f"{folder} holds {used:,} records and no collection.json: restore it from a backup, or choose another folder"
            )
        now = datetime.now(UTC).replace(microsecond=0)
        manifest = CollectionManifest(
            space_id=space_id, dim=dim, created=now, policy=policy, uid=uuid.uuid4().hex, keep_originals=keep_originals,
            thumbnail_pixels=thumbnail_pixels, follows=follows,
        )  # fmt: skip
        write_file(folder / "collection.json", manifest.sealed().model_dump_json(indent=2))
        return cls(folder)

    def get(self, key: str) -> StoredItem:
        """A live item. Raises `NotFoundError`. Writes do not hold it up."""
        found = self._committed(key)
        if found is not None:
            return found
        with self._open():  # a merge was committed, and its segments are being exchanged
            return self._item(key)

    def made(self, keys: Sequence[str]) -> dict[str, Made]:
        """What is known of items beside what a query returns, by key."""
        with self._open():
            return self._records.made(keys)

    def digests(self, keys: Sequence[str]) -> dict[str, tuple[str | None, bool]]:
        """Of those of the items that are there: the digest of their picture, and whether it has a file of its own."""
        with self._open():
            return self._records.digests(keys)

    def files(self) -> dict[str, FileState]:
        """The file behind each key."""
        with self._open():
            return self._records.files()

    # --- writing ------------------------------------------------------------------------------------------------

    def upsert(
        self, rows: Sequence[NewRow], vectors: Embeddings, pictures: Sequence[bytes | None] | None = None
    ) -> list[int]:
        """Insert or replace rows with vectors [N, D]; returns sequence numbers. Durable and visible on return.

        Of rows with the same key the last one counts. `pictures`: the encoded bytes of those that came so; a collection
        that keeps originals keeps them. Raises `InvalidArgumentError`; then nothing was written.
        """
        for i, row in enumerate(rows):
            check_key(row.key, f"items[{i}].key")
            check_payload(row.payload, f"items[{i}].payload")
        if not rows:
            return []
        vectors = self._one_each(rows, vectors, "items.vector")
        if pictures is None or not self.manifest.keep_originals:
            return self._committed_write(_Write(rows, vectors))
        given = zip(rows, pictures, strict=True)
        named = [row if p is None else row._replace(file_sha256=digest_of(p)) for row, p in given]
        with self.originals.kept(picture for picture in pictures if picture is not None):
            return self._committed_write(_Write(named, vectors))

    def _committed_write(self, write: _Write) -> list[int]:
        """Commit it, with others that wait."""
        self._waiting.append(write)
        with self._write_lock:
            if not write.done:  # else a writer before this one has committed it with its own
                self._commit_waiting(write)
        if write.error is not None:
            raise write.error
        return write.sequences

    def _one_each(self, rows: Sequence[NewRow], vectors: Embeddings, path: str) -> Embeddings:
        """A unit vector [N, D] for each row. Raises `InvalidArgumentError`."""
        vectors = unit_rows(vectors, self.dim, path)
        if len(vectors) != len(rows):
            raise InvalidArgumentError(
                f"there are {len(rows):,} rows and {len(vectors):,} vectors: give one for each", "BAD_VECTOR", path
            )
        return vectors

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
            pictures = self._records.thumbnails([item.row.id for item in items])
            rows = [
                row._replace(origin=item.origin, thumbnail=row.thumbnail or pictures.get(item.row.id))
                for (_, row), item in zip(moves, items, strict=True)
            ]
            self._write(rows, np.stack([item.vector for item in items]), [old for old, _ in moves])

    def _commit_waiting(self, mine: _Write) -> None:
        """Commit the writes that wait for the lock together: the disk is waited for once. Under the write lock."""
        writes: list[_Write] = []
        while self._waiting and sum(len(write.rows) for write in writes) < GROUP:
            writes.append(self._waiting.popleft())
        if mine not in writes:  # there were so many
            self._waiting.remove(mine)
            writes.append(mine)
        groups = [writes]
        while groups:
            group = groups.pop()
            try:
                if self._closed:
                    raise self._gone()
                rows = [row for write in group for row in write.rows]
                sequences = self._write(rows, np.concatenate([write.vectors for write in group]), [])
            except Exception as e:
                if len(group) > 1:  # one of them spoils it: each alone
                    groups += [[write] for write in reversed(group)]
                else:
                    group[0].error, group[0].done = e, True
            except BaseException:  # an interrupt of this thread: nothing of what waits was written
                for write in writes:
                    if not write.done:
                        write.error, write.done = self._interrupted(), True
                raise
            else:
                for write in group:
                    write.sequences, sequences = sequences[: len(write.rows)], sequences[len(write.rows) :]
                    write.done = True

    def _interrupted(self) -> InternalError:
        return InternalError(f"the write to {self.name!r} was interrupted before it was stored: send it again")

    def _item(self, key: str) -> StoredItem:
        """A live item, under the write lock. Raises `NotFoundError`."""
        found = self._stored(self._records.live(key), key)
        if found is None:
            raise DataLossError(f"the item {key!r} is in a segment that is not open: restart the server")
        return found

    def _write(self, rows: Sequence[NewRow], vectors: Embeddings, gone: Sequence[str]) -> list[int]:
        """Bury the items `gone`, then insert or replace rows, in one commit. Under the write lock."""
        kept = sorted({row.key: i for i, row in enumerate(rows)}.values())  # of one key the last counts
        new = [rows[i] for i in kept]
        with self._records.transaction():
            first_id = self._records.take("id", len(rows))
            first = self._records.take("sequence", len(rows))
            places = self._records.places([*(row.key for row in new), *gone])
            self._records.bury(self._burials(places, dict(zip((row.key for row in new), kept, strict=True)), first))
            ids, sequences = [first_id + i for i in kept], [first + i for i in kept]
            self._records.insert(new, ids, sequences, None, vectors[kept])
        stored = [
            StoredRow(i, row.key, row.payload, row.source_uri, s) for i, s, row in zip(ids, sequences, new, strict=True)
        ]
        self._publish_writes(
            first + len(rows) - 1, dict(places.values()), stored, vectors[kept], [row.origin for row in new]
        )
        return list(range(first, first + len(rows)))

    @staticmethod
    def _burials(
        places: dict[str, tuple[int, int | None]], new: dict[str, int], first: int
    ) -> Iterator[tuple[int, int]]:
        """(sequence number, id) of rows that go: that of the write which replaces them, or the first."""
        return ((first + new.get(key, 0), row_id) for key, (row_id, _) in places.items())

    def delete(self, keys: Sequence[str]) -> list[str]:
        """Delete items; returns the keys that did not exist. Durable and visible on return."""
        keys = list(dict.fromkeys(keys))
        with self._open():
            places = self._records.places(keys)
            there = [key for key in keys if key in places]
            if there:
                with self._records.transaction():
                    first = self._records.take("sequence", len(there))
                    self._records.bury((first + i, places[key][0]) for i, key in enumerate(there))
                self._publish_writes(first + len(there) - 1, dict(places.values()), [], self._no_vectors(), [])
        return [key for key in keys if key not in places]

    def touch(self, files: Iterable[tuple[str, int]]) -> None:
        """Note new times of change (key, nanoseconds) of files whose bytes are the same: nothing is embedded again."""
        with self._open(), self._records.transaction():
            self._records.touch(files)

    def add_segment(self, rows: Sequence[NewRow], vectors: Embeddings) -> None:
        """Insert or replace many rows at once, as a segment of their own. Durable and visible on return."""
        if not rows:
            return
        vectors = self._one_each(rows, vectors, "vector")

        def batch(ids: range, sequences: range) -> Batch:
            stored = [
                StoredRow(i, row.key, row.payload, row.source_uri, s)
                for i, s, row in zip(ids, sequences, rows, strict=True)
            ]
            return batch_of(stored, vectors, Counter(row.origin for row in rows))

        self._add([row.key for row in rows], lambda: rows, batch)

    def add_table(self, rows: pa.Table, vectors: Stored | Sequence[Stored], origin: str = "client") -> None:
        """As `add_segment`, for very many rows: columns key, payload (JSON) and source_uri, and where they are known the
        other fields of `NewRow`; vectors [N, D], or parts of them in order, which may be memory-mapped: they are read block
        by block, once."""
        if not len(rows):
            return
        parts = [vectors] if isinstance(vectors, np.ndarray) else vectors
        if any(part.ndim != 2 for part in parts) or sum(map(len, parts)) != len(rows):
            shapes = ", ".join(str(part.shape) for part in parts[:3])
            raise InvalidArgumentError(
                f"there are {len(rows):,} rows and vectors of shape {shapes}: give a vector for each row",
                "BAD_VECTOR", "vector",
            )  # fmt: skip

        names = [name for name in NewRow._fields if name in rows.column_names]
        made_by = Counter(rows["origin"].to_pylist()) if "origin" in names else {origin: len(rows)}

        def batch(ids: range, sequences: range) -> Batch:
            matrix = (unit_rows(block, self.dim, "vector") for part in parts for block in blocks(part))
            return batch_of_table(rows, ids, sequences, self.dim, matrix, made_by)

        def new() -> Iterator[NewRow]:
            common = NewRow("", origin=origin)
            for part in rows.to_batches(BLOCK):
                columns = [
                    part[name].to_pylist() if name in names else repeat(getattr(common, name))
                    for name in NewRow._fields
                ]
                yield from map(NewRow._make, zip(*columns, strict=False))

        self._add(rows["key"].to_pylist(), new, batch)

    def _add(
        self, keys: list[str], rows: Callable[[], Iterable[NewRow]], batch: Callable[[range, range], Batch]
    ) -> None:
        """Write a batch as a segment and make it live."""
        for key in keys:
            check_key(key, "key")
        if len(set(keys)) < len(keys):
            twice = next(key for key, count in Counter(keys).items() if count > 1)
            raise InvalidArgumentError(
                f"the key {twice!r} comes more than once: give each item its own", "BAD_KEY", "key"
            )
        with self._merge_lock, self._flush_lock, self._open():
            with self._records.transaction():  # numbers first: they are in the segment's files
                number = self._records.take("segment")
                first_id = self._records.take("id", len(keys))
            # Nobody else takes sequence numbers meanwhile; they are taken with the commit, so that all up to one are there.
            first = self._records.counter("sequence") + 1
            ids, sequences = range(first_id, first_id + len(keys)), range(first, first + len(keys))

            given_up = threading.Event()

            def insert() -> dict[str, tuple[int, int | None]]:
                self._records.take("sequence", len(keys))
                places = self._records.places(keys) if len(self) else {}
                at = {key: i for i, key in enumerate(keys) if key in places} if places else {}
                self._records.bury(self._burials(places, at, first))
                wanted = takewhile(lambda _: not given_up.is_set(), rows())
                self._records.insert(wanted, ids, sequences, number, None)
                return places

            with (
                self._unless_committed(number),
                self._records.transaction(),
                # While the segment is written; the commit comes after both, and so does the rollback.
                _beside(insert, given_up) as inserting,
            ):
                segment = self._segment(number, batch(ids, sequences))
                places = inserting.result()
                self._records.adopt(number)
            # From here on nothing can fail: memory follows the disk.
            dead = dict(places.values())
            self._publish_writes(sequences[-1], dead, [], self._no_vectors(), [], Part(number, segment))

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
            at = fresh.positions()
            rows = [fresh.rows[i] for i in at.tolist()]
            made_by = Counter(fresh.origins[i] for i in at.tolist())
            moved = [row.id for row in rows]
            with self._unless_committed(number):
                segment = self._segment(number, batch_of(rows, fresh.buffer[at], made_by))
            with self._unless_committed(number), self._open():
                with self._records.transaction():
                    self._records.adopt(number, moved)
                # From here on nothing can fail. Rows replaced or deleted meanwhile are dead in the segment.
                now = self._view
                dead = np.flatnonzero(now.fresh.flags[at] == 0).tolist()
                left = [i for i in now.fresh.positions().tolist() if i >= fresh.count]
                part = Part(number, segment)
                self._view = View(
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

    def upgrade(self) -> None:
        """Write everything in the present format, in as few segments as can be."""
        self.keep_to(self.manifest.policy)

    def keep_to(self, policy: IndexPolicy) -> None:
        """Change what the indexes keep to, and build them again, in as few segments as can be and in the present format.
        Raises `RefusalError` on a factory string that cannot be used; then the old policy stays."""
        check_factory(policy, self.dim)
        with self._merge_lock:
            before = self.manifest
            self.manifest = before.model_copy(update={"policy": policy, "format_version": COLLECTION_FORMAT})
            try:
                self.flush()
                self.compact(everything=True, rebuild=True)
            except BaseException:
                self.manifest = before
                raise
            write_file(self.folder / "collection.json", self.manifest.sealed().model_dump_json(indent=2))

    def compact(self, everything: bool = False, rebuild: bool = False) -> int:
        """Merge segments, without their dead rows: `everything` into as few as can be (to `rebuild`, those that stay alone,
        too), or what is worth it. Returns how many were merged.

        Searches, writes and flushes go on meanwhile. Killed at any point, the collection holds the old segments or the new.
        """
        with self._merge_lock:
            parts = self._view.parts
            groups = packed(parts, rebuild) if everything else [worth_merging(parts)]
            return sum(self._merge([part.number for part in group]) for group in groups if group)

    def _merge(self, numbers: Sequence[int]) -> int:
        """Replace segments by one with their living rows; returns how many they were. Under the merge lock: nobody else
        takes segments away."""
        with self._open():
            if self._stopping:
                return 0
            old = [part for part in self._view.parts if part.number in numbers]
            with self._records.transaction():
                number = self._records.take("segment")
            before = self._records.counter("sequence")
            made_by: Counter[str] = Counter()
            for each in numbers:
                made_by.update(self._records.origins(each))
        living = [np.flatnonzero(part.flags()) for part in old]
        segment = None
        if any(map(len, living)):
            segment = self._segment(number, joined([part.segment for part in old], living, made_by))
        with self._unless_committed(number), self._open():
            with self._records.transaction():
                self._records.merge(numbers, None if segment is None else number, before)
            # From here on nothing can fail. Rows replaced or deleted meanwhile are dead in the new segment.
            now = {part.number: part for part in self._view.parts}
            kept = [part for part in self._view.parts if part.number not in numbers]
            if segment is not None:
                merged = Part(number, segment)
                died = [
                    row_id
                    for part in old
                    for row_id in part.segment.ids[part.flags() > now[part.number].flags()].tolist()
                ]
                kept.append(merged.without([segment.position(i) for i in died]) if died else merged)
            self._view = replace(self._view, parts=tuple(kept))
        for gone in numbers:  # readers that still search them have their files mapped
            self._remove(self._segment_folder(gone))
        return len(old)

    def verify(self) -> None:
        """Read everything: checksums of whole files, the records' own structure, and that both hold the same rows. Writes
        wait. Raises `RefusalError` on the first damage."""
        with self._merge_lock, self._open():
            problem = self._records.check()
            if problem is None and (unheld := self._records.unheld()):
                problem = f"items are in segment {unheld[0]:04d}, which is none of the collection's"
            if problem is not None:
                raise RefusalError(
                    f"{self.folder / 'records.sqlite'} is damaged ({problem}): restore the collection from a snapshot"
                )
            for part in self._view.parts:
                part.segment.verify(full=True)
                if not self._records.are_held(part.number, part.segment.identities()):
                    raise self._disagreement(part.segment)
            for digest in self._records.originals():
                if not self.originals.is_sound(digest):
                    raise RefusalError(
                        f"{place_of(self.originals.folder, digest)} is missing or damaged: `likewise index verify "
                        "--recover` lists the items that it was kept for"
                    )

    @property
    def sweep_due(self) -> bool:
        """Whether originals may lie there that no item names: after the opening, and an hour after one went."""
        due = time.monotonic() - self._swept_at > SWEEP_SECONDS
        return due and (self._buried > 0 or self._swept_at < 0) and self.originals.folder.is_dir()

    def sweep(self) -> Swept:
        """Remove the originals that no item names any more. Searches and writes go on meanwhile."""
        self._buried, self._swept_at = 0, time.monotonic()
        return self.originals.sweep(self._kept)

    def _kept(self, prefix: str) -> list[str]:
        """Digests that begin so of the originals of live rows, as of now."""
        with self._reader.moment():
            return self._reader.originals(prefix)

    @property
    def followed(self) -> int:
        """Of a collection that follows another: sequence number of the last of its writes that is in this one."""
        with self._open():
            return self._records.counter("followed")

    def follow(self, sequence: int) -> None:
        """Note that the writes up to one of the collection that this one follows are in it."""
        with self._open(), self._records.transaction():
            self._records.reach("followed", sequence)

    def follow_restored(self, uid: str) -> None:
        """Note that what this collection follows was restored from a snapshot that holds what is in this one: its uid."""
        with self._open():
            self._write_follows(uid)

    def follow_from(self, uid: str, sequence: int) -> None:
        """Follow another collection from here on, whose writes up to `sequence` are in this one."""
        with self._open():
            self._write_follows("")  # a number of one history must never stand beside the uid of another
            with self._records.transaction():
                self._records.reach("followed", sequence)
            self._write_follows(uid)

    def _write_follows(self, uid: str) -> None:
        """Under the write lock."""
        self.manifest = self.manifest.model_copy(update={"follows": uid})
        write_file(self.folder / "collection.json", self.manifest.sealed().model_dump_json(indent=2))

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
        self.originals.close()
        with self._merge_lock, self._flush_lock, self._write_lock:
            self._closed = True
            self._reader.close()
            self._records.close()
            self._lock_file.close()

    @contextmanager
    def _open(self) -> Iterator[None]:
        """The write lock, on a collection that is still open. Raises `NotFoundError` on one deleted meanwhile."""
        with self._write_lock:
            if self._closed:
                raise self._gone()
            yield

    # --- inside -------------------------------------------------------------------------------------------------

    def _no_vectors(self) -> Embeddings:
        return np.zeros((0, self.dim), np.float32)

    def _no_rows(self) -> Fresh:
        return Fresh.of([], self._no_vectors(), [])

    def _segment(self, number: int, batch: Batch) -> Segment:
        """Write a segment; of the memory that the indexes may take it gets its share."""
        allowed, rows = self.manifest.policy.max_memory, len(batch.rows)
        memory = None if allowed is None else allowed * rows / max(rows, len(self))
        return write_segment(self._segment_folder(number), batch, self.manifest.policy, memory)

    def _publish_writes(
        self, sequence: int, dead: dict[int, int | None], rows: list[StoredRow], vectors: Embeddings,
        origins: list[str], new: Part | None = None,
    ) -> None:  # fmt: skip
        """Replace the view after a commit, in one step: rows `dead` (id → segment) go, `rows` or a `new` segment come."""
        self._buried += len(dead)
        view = self._view
        parts = []
        for part in view.parts:
            gone = [part.segment.position(i) for i, segment in dead.items() if segment == part.number]
            parts.append(part.without(gone) if gone else part)
        fresh = view.fresh.without(i for i, segment in dead.items() if segment is None)
        self._view = View(
            (*parts, *([] if new is None else [new])), fresh.extended(rows, vectors, origins) if rows else fresh
        )
        self._sequence = sequence

    def _give_up(self) -> None:
        """Make damaged indexes and columns anew; forget the segments whose rows or vectors cannot be read. What is left of
        their folders goes to damaged/."""
        for number in self._records.segments():
            try:
                self._opened(number, self._records, full=True)
                continue
            except (RefusalError, OSError):  # OSError: bad sectors
                pass
            try:
                self._make_anew(number)
                self.made_anew.append(number)
            except (RefusalError, OSError):
                self._lose(number)
        for number in self._records.unheld():
            self._lose(number)
        for digest in self._records.originals():
            if not self.originals.is_sound(digest):
                self._forget_original(digest)

    def _lose(self, number: int) -> None:
        """Name the items of a segment that cannot be read, and forget it."""
        lost = [LostItem(*row) for row in self._records.alive(number)]
        # First what can be done again: the list, and the folder aside.
        self._list_lost("lost.tsv", lost)
        self._set_aside(number)
        with self._records.transaction():
            self._records.lose(number)
        self.lost += lost

    def _forget_original(self, digest: str) -> None:
        """Name the items whose original is missing or damaged; they stay, and nothing is kept for them. What is left of it
        goes to damaged/."""
        damaged = place_of(self.originals.folder, digest)
        if damaged.exists():
            aside = self.folder / "damaged"
            make_folder(aside)
            damaged.rename(aside / digest)
        with self._records.transaction():  # the list first: what was forgotten is not found again
            without = [LostItem(*row) for row in self._records.forget_original(digest)]
            self._list_lost("lost-originals.tsv", without)
        self.damaged_originals += without

    def _list_lost(self, name: str, items: Sequence[LostItem]) -> None:
        with (self.folder / name).open("a") as file:
            file.write("".join(f"{printable(key)}\t{printable(uri)}\n" for key, uri in items))

    def _make_anew(self, number: int) -> None:
        """Replace a segment by one with the same rows and vectors. Raises `RefusalError` or `OSError` where it cannot be."""
        rows, vectors = remains(self._segment_folder(number))
        ids = rows["id"].to_numpy()
        if not self._records.are_held(number, identities(rows)):
            raise RefusalError(f"{self._segment_folder(number)} holds other rows than the records say")
        dead = [row_id for segment, row_id in self._records.tombstones() if segment == number]
        living = np.flatnonzero(~np.isin(ids, dead))
        with self._records.transaction():
            new = self._records.take("segment")
        if len(living):
            self._segment(new, batch_of_remains(rows, vectors, living, self._records.origins(number)))
        with self._records.transaction():
            self._records.merge([number], new if len(living) else None, self._records.counter("sequence"))
        self._set_aside(number)

    def _set_aside(self, number: int) -> None:
        """Move what is left of a segment to damaged/."""
        if self._segment_folder(number).exists():
            make_folder(self.folder / "damaged")
            aside = self.folder / "damaged" / f"{number:04d}"
            shutil.rmtree(aside, ignore_errors=True)
            self._segment_folder(number).rename(aside)

    def _remove(self, folder: Path) -> None:
        """Remove a segment's folder, which others see whole or not at all."""
        gone = folder.with_name(f".{folder.name}.gone")
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)
        shutil.rmtree(gone)

    def _remove_orphans(self) -> None:
        """Segments that were written but never committed: a kill came between. Raises `RefusalError` where a segment has a
        number that the records have never given: they are older than it."""
        committed, last = set(self._records.segments()), self._records.counter("segment")
        folders = list((self.folder / "segments").glob("*"))
        for folder in folders:
            if folder.name.isdigit() and int(folder.name) > last:
                raise RefusalError(
                    f"{folder} is newer than {self.folder / 'records.sqlite'}, which has lost writes (was it copied without "
                    "records.sqlite-wal?): restore the collection from a snapshot; nothing was removed"
                )
        for folder in folders:
            if not folder.name.isdigit():
                shutil.rmtree(folder)  # half written, or half removed
            elif int(folder.name) not in committed:
                self._remove(folder)


@contextmanager
def _beside(call: Callable[[], T], given_up: threading.Event) -> Iterator[Future[T]]:
    """Run a call in another thread. When this is left, by whatever error, the call was told of it and has ended, however
    often the wait for that is interrupted: rows inserted after a rollback would be committed one by one."""
    pool = ThreadPoolExecutor(1, "insert")
    called = pool.submit(call)
    try:
        yield called
    finally:
        given_up.set()
        while not called.done():  # a thread whose join was interrupted counts as ended (Python 3.11)
            with suppress(KeyboardInterrupt):
                wait([called])
        pool.shutdown(wait=False)


def worth_merging(parts: Sequence[Part]) -> tuple[Part, ...]:
    """The segments to merge now: those with many dead rows, and where four or more are of about one size, these; the
    smallest of them, where all would make too large a segment.

    So each row is written about log₄ N times, and a search visits about 3 log₄ N segments (the size-tiered compaction of
    log-structured stores, O'Neil et al. 1996), and one more per `LARGEST` rows.
    """
    tiers: dict[int, list[Part]] = {}
    for part in parts:
        if part.count <= LARGEST // 2:
            tiers.setdefault(int(math.log(max(part.count, 1), TIER)), []).append(part)
    crowded = next((tiers[size] for size in sorted(tiers) if len(tiers[size]) >= TIER), [])
    dead = [part for part in parts if len(part.segment) - part.count >= DEAD_SHARE * len(part.segment)]
    wanted = sorted({part.number: part for part in [*crowded, *dead]}.values(), key=lambda part: part.count)
    total = list(accumulate(part.count for part in wanted))
    chosen = {part.number for part, rows in zip(wanted, total, strict=True) if rows <= LARGEST or part is wanted[0]}
    return tuple(part for part in parts if part.number in chosen)


def packed(parts: Sequence[Part], rebuild: bool) -> list[list[Part]]:
    """Segments in groups, oldest first, each of which makes one that is not too large; without those that alone would be as
    they are, unless they are to be built again (`rebuild`)."""
    groups: list[list[Part]] = []
    for part in parts:
        if not groups or sum(each.count for each in groups[-1]) + part.count > LARGEST:
            groups.append([])
        groups[-1].append(part)
    return [g for g in groups if rebuild or len(g) > 1 or g[0].count < len(g[0].segment)]


def check_key(key: str, field: str) -> None:
    """Raises `InvalidArgumentError` for keys that cannot be stored."""
    try:
        size = len(key.encode())
    except UnicodeEncodeError:
        raise InvalidArgumentError(f"the key {key!r} is no Unicode text: send UTF-8", "BAD_KEY", field) from None
    if not 1 <= size <= MAX_KEY_BYTES:
        raise InvalidArgumentError(
            f"the key has {size} bytes of UTF-8, 1 to {MAX_KEY_BYTES} are allowed: shorten it", "BAD_KEY", field
        )


def check_payload(payload: str, field: str) -> None:
    """Raises `InvalidArgumentError` for payloads that are no JSON object, or one that cannot be stored."""
    try:
        value = json.loads(payload)
        sound = isinstance(value, dict)
        if not payload.isascii() or "\\" in payload or "N" in payload or "I" in payload:
            # Halves of surrogate pairs, NaN and Infinity are no JSON, though Python reads them.
            json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        if payload.count("{") + payload.count("[") > MAX_NESTED:
            _depth(value, MAX_NESTED)
    except (ValueError, RecursionError):
        sound = False
    if not sound:
        raise InvalidArgumentError(
            f"the payload {payload[:40]!r} is no JSON object, or nested more than {MAX_NESTED} deep: send one",
            "BAD_PAYLOAD", field,
        )  # fmt: skip


def _depth(value: object, left: int) -> None:
    """Raises `ValueError` where a JSON value is nested deeper than that."""
    if not left:
        raise ValueError
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _depth(each, left - 1)


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
