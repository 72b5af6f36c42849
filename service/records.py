"""records.sqlite: the record of truth of a collection, and its only commit point.

A write is acknowledged after its transaction; with WAL and synchronous=FULL it then survives kill -9 and power loss.
A row that was replaced or deleted stays as a tombstone (live = 0) with the sequence number of that write.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from export.bundle import Embeddings, RefusalError
from service.errors import DiskFullError
from service.segment import StoredRow

_TABLES = """
CREATE TABLE IF NOT EXISTS items (
    id INTEGER PRIMARY KEY,
    key TEXT NOT NULL,
    sequence INTEGER NOT NULL,
    live INTEGER NOT NULL,
    segment INTEGER,              -- NULL: fresh, its vector is here
    vector BLOB,                  -- float32
    payload TEXT NOT NULL,        -- JSON object
    source_uri TEXT NOT NULL,
    origin TEXT NOT NULL,         -- who made the vector: variant and provider, or 'client'
    file_size INTEGER,            -- of items that came from a file
    file_mtime_ns INTEGER,
    file_sha256 TEXT
) STRICT;
CREATE UNIQUE INDEX IF NOT EXISTS items_live_key ON items (key) WHERE live = 1;
CREATE INDEX IF NOT EXISTS items_sequence ON items (sequence);
CREATE INDEX IF NOT EXISTS items_segment ON items (segment);
CREATE INDEX IF NOT EXISTS items_dead ON items (segment, id) WHERE live = 0 AND segment IS NOT NULL;
CREATE INDEX IF NOT EXISTS items_fresh ON items (id) WHERE live = 1 AND segment IS NULL;
CREATE TABLE IF NOT EXISTS segments (number INTEGER PRIMARY KEY) STRICT;
CREATE TABLE IF NOT EXISTS thumbnails (id INTEGER PRIMARY KEY, jpeg BLOB NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT;
INSERT OR IGNORE INTO counters VALUES ('sequence', 0), ('id', 0), ('segment', 0), ('followed', 0);
"""
# After file_sha256 is there, which collections of before files were followed lack.
_ORIGINALS = """
CREATE INDEX IF NOT EXISTS items_originals ON items (file_sha256)
    WHERE live = 1 AND file_size IS NULL AND file_sha256 IS NOT NULL
"""


MAX_KEY_BYTES = 512
# Larger files are checked by `likewise index verify` alone: reading them whole would make every start slow.
CHECKED_UP_TO = 64 * 2**20
# Rows that are inserted at a time.
_INSERTED = 4096
_RESTORE = "restore the collection from a backup, or build it again"


class NewRow(NamedTuple):
    """A row to be written."""

    key: str
    payload: str = "{}"
    source_uri: str = ""
    origin: str = "client"
    file_size: int | None = None
    file_mtime_ns: int | None = None
    file_sha256: str | None = None
    """Of the encoded picture. Where there is no file (`file_size` is None) these bytes are among the originals."""
    thumbnail: bytes | None = None
    """JPEG."""


class FileState(NamedTuple):
    """The file behind an item when it was embedded; all absent where it came from a client."""

    size: int | None
    """Bytes."""
    mtime_ns: int | None
    """Time of last change, in nanoseconds since 1970."""
    sha256: str | None
    """Of its bytes, hexadecimal; None for items of older versions."""
    uri: str = ""
    """Where it lay."""


class Made(NamedTuple):
    """What is known of an item beside what a query returns: fields of `NewRow`."""

    origin: str
    file_size: int | None
    file_mtime_ns: int | None
    file_sha256: str | None
    thumbnail: bytes | None


class Written(NamedTuple):
    """A live row without its vector: what an encoder needs to embed it again, and what stays then."""

    id: int
    sequence: int
    row: NewRow
    """Without its thumbnail."""

    @property
    def is_kept(self) -> bool:
        """Whether its picture is among the originals."""
        return self.row.file_size is None and self.row.file_sha256 is not None


class Writes(NamedTuple):
    """Writes of a collection, in their order."""

    live: list[Written]
    """Rows that were written and are there still, by sequence number."""
    gone: list[str]
    """Keys whose row was deleted, or replaced by a write that is not among these."""
    upto: int
    """Sequence number of the last one: there are no others before it."""
    last: int
    """Sequence number of the collection's last write."""


class Record(NamedTuple):
    """A live row as SQLite knows it."""

    row: StoredRow
    segment: int | None
    vector: Embeddings | None
    origin: str


class Reads:
    """What is read through one connection; not thread-safe, its owner serialises."""

    _db: sqlite3.Connection

    def counter(self, name: str) -> int:
        """A counter's value."""
        return int(self._db.execute("SELECT value FROM counters WHERE name = ?", (name,)).fetchone()[0])

    def live(self, key: str) -> Record | None:
        """The live row of a key."""
        return _live(self._db, key)

    def fresh(self) -> list[Record]:
        """Live rows that are in no segment yet, by id."""
        rows = self._db.execute(
            "SELECT id, key, payload, source_uri, sequence, segment, vector, origin FROM items "
            "WHERE live = 1 AND segment IS NULL ORDER BY id"
        )
        return [_record(row) for row in rows]

    def tombstones(self) -> list[tuple[int, int]]:
        """(segment, id) of dead rows that a segment still holds."""
        return self._db.execute("SELECT segment, id FROM items WHERE live = 0 AND segment IS NOT NULL").fetchall()

    def extent(self, segment: int) -> tuple[int, int, int]:
        """Rows that a segment holds, dead ones too: how many, the sum of their ids, and the largest."""
        found = self._db.execute(
            "SELECT count(*), coalesce(sum(id), 0), coalesce(max(id), 0) FROM items WHERE segment = ?", (segment,)
        ).fetchone()
        return found[0], found[1], found[2]

    def are_held(self, segment: int, rows: Iterable[list[tuple[int, str]]]) -> bool:
        """Whether a segment holds these rows and no others, dead ones too: (id, key) by id, block by block."""
        held = self._db.execute("SELECT id, key FROM items WHERE segment = ? ORDER BY id", (segment,))
        return all(held.fetchmany(len(some)) == some for some in rows) and held.fetchone() is None

    def segments(self) -> list[int]:
        """Numbers of the live segments."""
        return [number for (number,) in self._db.execute("SELECT number FROM segments ORDER BY number")]

    def unheld(self) -> list[int]:
        """Numbers of segments that live rows name and the records do not: none, where nothing is damaged."""
        asked = (
            "SELECT DISTINCT segment FROM items WHERE live = 1 AND segment IS NOT NULL "
            "AND segment NOT IN (SELECT number FROM segments)"
        )
        return [number for (number,) in self._db.execute(asked)]

    def count(self) -> int:
        """Live rows."""
        return int(self._db.execute("SELECT count(*) FROM items WHERE live = 1").fetchone()[0])

    def files(self) -> dict[str, FileState]:
        """The file behind each live key."""
        rows = self._db.execute(
            "SELECT key, file_size, file_mtime_ns, file_sha256, source_uri FROM items WHERE live = 1"
        )
        return {key: FileState(*state) for key, *state in rows}

    def thumbnails(self, ids: Sequence[int]) -> dict[int, bytes]:
        """The thumbnails, JPEG, of live rows by id; rows without one are absent."""
        found: dict[int, bytes] = {}
        for low in range(0, len(ids), 1000):
            some = ids[low : low + 1000]
            asked = f"SELECT id, jpeg FROM thumbnails WHERE id IN ({','.join('?' * len(some))})"  # noqa: S608
            found.update(self._db.execute(asked, list(some)))
        return found

    def originals(self, prefix: str = "") -> list[str]:
        """Digests of the pictures that came as bytes and were kept, of live rows, that begin so; ascending."""
        asked = (
            "SELECT DISTINCT file_sha256 FROM items WHERE live = 1 AND file_size IS NULL AND file_sha256 >= ? "
            "AND file_sha256 < ? ORDER BY file_sha256"
        )
        return [digest for (digest,) in self._db.execute(asked, (prefix, f"{prefix}g"))]  # g comes after hexadecimal

    def writes(self, after: int, count: int) -> Writes:
        """About `count` writes after a sequence number; what has one number comes together. Raises `RefusalError`."""
        if not _has_digests(self._db):
            raise RefusalError(
                "the records are of before files were followed: write them in today's format with `likewise index upgrade`"
            )
        asked = "SELECT max(sequence) FROM (SELECT sequence FROM items WHERE sequence > ? ORDER BY sequence LIMIT ?)"
        (upto,) = self._db.execute(asked, (after, count)).fetchone()
        last = self.counter("sequence")
        if upto is None:
            return Writes([], [], last, last)
        columns = "id, sequence, key, payload, source_uri, origin, file_size, file_mtime_ns, file_sha256"
        asked = f"SELECT {columns} FROM items WHERE live = 1 AND sequence > ? AND sequence <= ? ORDER BY sequence, id"  # noqa: S608
        live = [Written(i, s, NewRow(*what)) for i, s, *what in self._db.execute(asked, (after, upto))]
        there = {written.row.key for written in live}
        asked = "SELECT DISTINCT key FROM items WHERE live = 0 AND sequence > ? AND sequence <= ? ORDER BY key"
        gone = [key for (key,) in self._db.execute(asked, (after, upto)) if key not in there]
        (more,) = self._db.execute("SELECT EXISTS (SELECT 1 FROM items WHERE sequence > ?)", (upto,)).fetchone()
        return Writes(live, gone, upto if more else last, last)

    def page(self, after: str | tuple[int, int], count: int) -> list[Record]:
        """Live rows after a key, by key; or after a (sequence number, id), by these."""
        values: tuple[str | int, ...]
        if isinstance(after, str):
            where, order, values = "key > ?", "key", (after,)
        else:
            where, order, values = "sequence >= ? AND (sequence > ? OR id > ?)", "sequence, id", (after[0], *after)
        columns = "id, key, payload, source_uri, sequence, segment, vector, origin"
        asked = f"SELECT {columns} FROM items WHERE live = 1 AND {where} ORDER BY {order} LIMIT ?"  # noqa: S608
        return [_record(row) for row in self._db.execute(asked, (*values, count))]

    def kept_as(self, row_id: int) -> str | None:
        """The digest of a live row's original; None where there is no such row, or nothing is kept of it."""
        asked = "SELECT file_sha256 FROM items WHERE id = ? AND live = 1 AND file_size IS NULL"
        found = self._db.execute(asked, (row_id,)).fetchone()
        return None if found is None else found[0]

    def origins(self, segment: int) -> dict[str, int]:
        """How many live rows of a segment each variant and provider made."""
        counted = "SELECT origin, count(*) FROM items WHERE segment = ? AND live = 1 GROUP BY origin"
        return dict(self._db.execute(counted, (segment,)).fetchall())


class Records(Reads):
    """One connection; not thread-safe, its owner serialises."""

    def __init__(self, path: Path, create: bool = False) -> None:
        """Open, or make what is not there (`create`). Raises `RefusalError` when the file is damaged or empty."""
        self._path = path
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
        except sqlite3.OperationalError as e:
            raise RefusalError(f"{path} cannot be opened ({e}): check its permissions and the free space") from e
        try:
            if not create and not self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'items'").fetchone():
                self._db.close()
                raise RefusalError(f"{path} holds no records: {_RESTORE}; nothing was removed")
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(_TABLES)
            if not _has_digests(self._db):
                self._db.execute("ALTER TABLE items ADD COLUMN file_sha256 TEXT")  # of before files were followed
            self._db.execute(_ORIGINALS)
            small = path.stat().st_size <= CHECKED_UP_TO
            problem = self._db.execute("PRAGMA quick_check(1)").fetchone()[0] if small else "ok"
        except sqlite3.DatabaseError as e:
            self._db.close()
            if e.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                raise RefusalError(f"{path} is damaged ({e}): {_RESTORE}") from e
            raise RefusalError(
                f"{path} cannot be used ({e}); nothing in it was changed: check its permissions and the free space"
            ) from e
        if problem != "ok":
            self._db.close()
            raise RefusalError(f"{path} is damaged ({problem}): {_RESTORE}")

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit on leaving, roll back on any error."""
        try:
            self._db.execute("BEGIN IMMEDIATE")
            yield
            self._db.execute("COMMIT")
        except BaseException as e:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            if isinstance(e, sqlite3.OperationalError) and e.sqlite_errorcode & 0xFF == sqlite3.SQLITE_FULL:
                raise DiskFullError(
                    f"the disk of {self._path.parent.name!r} is full; nothing of this write was stored: free space"
                ) from e
            raise

    def take(self, counter: str, count: int = 1) -> int:
        """Advance a counter and return the first of the `count` numbers taken. Inside a transaction."""
        (last,) = self._db.execute(
            "UPDATE counters SET value = value + ? WHERE name = ? RETURNING value", (count, counter)
        ).fetchone()
        return int(last) - count + 1

    def insert(
        self, rows: Iterable[NewRow], ids: Sequence[int], sequences: Sequence[int], segment: int | None,
        vectors: Embeddings | None,
    ) -> None:  # fmt: skip
        """Insert live rows, whose keys no live row has. Inside a transaction."""
        blobs = repeat(None) if vectors is None else map(bytes, np.ascontiguousarray(vectors, np.float32))
        thumbnails: list[tuple[int, bytes]] = []

        def values() -> Iterator[tuple[Any, ...]]:
            for i, s, row, blob in zip(ids, sequences, rows, blobs, strict=False):
                if row.thumbnail is not None:
                    thumbnails.append((i, row.thumbnail))
                yield i, row.key, s, segment, blob, *row[1:7]

        remaining = values()
        while some := list(islice(remaining, _INSERTED)):
            self._db.executemany(
                "INSERT INTO items (id, key, sequence, live, segment, vector, payload, source_uri, origin, "
                "file_size, file_mtime_ns, file_sha256) VALUES (?, ?, ?, 1, ?, ?, ?, ?, ?, ?, ?, ?)",
                some,
            )
            self._db.executemany("INSERT INTO thumbnails VALUES (?, ?)", thumbnails)
            thumbnails.clear()

    def places(self, keys: Sequence[str]) -> dict[str, tuple[int, int | None]]:
        """Id and segment of the live rows that have one of the keys."""
        found = {}
        for low in range(0, len(keys), 1000):
            some = keys[low : low + 1000]
            asked = f"SELECT key, id, segment FROM items WHERE live = 1 AND key IN ({','.join('?' * len(some))})"  # noqa: S608
            rows = self._db.execute(asked, some)
            found.update({key: (row_id, segment) for key, row_id, segment in rows})
        return found

    def bury(self, rows: Iterable[tuple[int, int]]) -> None:
        """Turn live rows (sequence number of the write, id) into tombstones. Inside a transaction."""
        rows = list(rows)
        self._db.executemany(
            "UPDATE items SET live = 0, sequence = ?, vector = NULL, payload = '{}' WHERE id = ?", rows
        )
        self._db.executemany("DELETE FROM thumbnails WHERE id = ?", ((row_id,) for _, row_id in rows))

    def adopt(self, segment: int, ids: Sequence[int] | None = None) -> None:
        """Make a written segment live; fresh rows `ids`, dead ones too, move into it. Inside a transaction."""
        self._db.execute("INSERT INTO segments VALUES (?)", (segment,))
        if ids is not None:
            self._db.executemany(
                "UPDATE items SET segment = ?, vector = NULL WHERE id = ?", [(segment, i) for i in ids]
            )

    def merge(self, old: Sequence[int], new: int | None, before: int) -> None:
        """Replace segments `old` by `new`, which holds what lived at sequence number `before` (none where nothing did).
        Inside a transaction."""
        gone = [(number,) for number in old]
        buried = "UPDATE items SET segment = NULL WHERE segment = ? AND live = 0 AND sequence <= ?"
        self._db.executemany(buried, [(number, before) for number in old])
        self._db.executemany("DELETE FROM segments WHERE number = ?", gone)
        if new is not None:
            self._db.execute("INSERT INTO segments VALUES (?)", (new,))
            self._db.executemany("UPDATE items SET segment = ? WHERE segment = ?", [(new, number) for number in old])

    def alive(self, segment: int) -> list[tuple[str, str]]:
        """(key, source URI) of the live rows of a segment."""
        asked = "SELECT key, source_uri FROM items WHERE segment = ? AND live = 1 ORDER BY key"
        return self._db.execute(asked, (segment,)).fetchall()

    def lose(self, segment: int) -> list[tuple[str, str]]:
        """Bury the live rows of a segment that cannot be read, and forget it: (key, source URI) of each. Inside a
        transaction."""
        lost = self.alive(segment)
        if lost:
            self._db.execute(
                "DELETE FROM thumbnails WHERE id IN (SELECT id FROM items WHERE segment = ? AND live = 1)", (segment,)
            )
            self._db.execute(
                "UPDATE items SET live = 0, sequence = ?, payload = '{}' WHERE segment = ? AND live = 1",
                (self.take("sequence"), segment),
            )
        self._db.execute("UPDATE items SET segment = NULL WHERE segment = ?", (segment,))
        self._db.execute("DELETE FROM segments WHERE number = ?", (segment,))
        return lost

    def shrink(self) -> None:
        """Write everything into the main file, and give room that is free in it back."""
        self._db.execute("VACUUM")
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def check(self) -> str | None:
        """What is wrong with the file, None where nothing is."""
        found: str = self._db.execute("PRAGMA integrity_check(1)").fetchone()[0]
        return None if found == "ok" else found

    def made(self, keys: Sequence[str]) -> dict[str, Made]:
        """What is known of the live rows with one of the keys beside what a query returns."""
        found = {}
        for low in range(0, len(keys), 1000):
            some = keys[low : low + 1000]
            marks = ",".join("?" * len(some))
            columns = "key, origin, file_size, file_mtime_ns, file_sha256, jpeg"
            asked = f"SELECT {columns} FROM items LEFT JOIN thumbnails USING (id) WHERE live = 1 AND key IN ({marks})"  # noqa: S608
            found.update({key: Made(*what) for key, *what in self._db.execute(asked, some)})
        return found

    def reach(self, counter: str, value: int) -> None:
        """Give a counter a value. Inside a transaction."""
        self._db.execute("UPDATE counters SET value = ? WHERE name = ?", (value, counter))

    def forget_original(self, digest: str) -> list[tuple[str, str]]:
        """Note that a picture is kept no more: (key, source URI) of the live rows that named it. Inside a transaction."""
        named = "live = 1 AND file_size IS NULL AND file_sha256 = ?"
        rows = self._db.execute(f"SELECT key, source_uri FROM items WHERE {named} ORDER BY key", (digest,)).fetchall()  # noqa: S608
        self._db.execute(f"UPDATE items SET file_sha256 = NULL WHERE {named}", (digest,))  # noqa: S608
        return rows

    def digests(self, keys: Sequence[str]) -> dict[str, tuple[str | None, bool]]:
        """Of the live rows with one of the keys: the digest of their picture, and whether it has a file of its own."""
        found = {}
        for low in range(0, len(keys), 1000):
            some = keys[low : low + 1000]
            marks = ",".join("?" * len(some))
            asked = f"SELECT key, file_sha256, file_size FROM items WHERE live = 1 AND key IN ({marks})"  # noqa: S608
            found.update({key: (digest, size is not None) for key, digest, size in self._db.execute(asked, some)})
        return found

    def touch(self, files: Iterable[tuple[str, int]]) -> None:
        """New times of change (key, nanoseconds) of files whose bytes are the same. Inside a transaction."""
        rows = [(mtime, key) for key, mtime in files]
        self._db.executemany("UPDATE items SET file_mtime_ns = ? WHERE key = ? AND live = 1", rows)

    def close(self) -> None:
        """Close the connection."""
        self._db.close()


class ClosedError(Exception):
    """The collection was closed meanwhile."""


class Reader(Reads):
    """A second connection, that reads what was committed while this or another process writes."""

    def __init__(self, path: Path) -> None:
        """Open a file that `Records` has made. Raises `RefusalError`."""
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
            self._db.execute("PRAGMA query_only=1")
            self.counter("sequence")
        except sqlite3.Error as e:
            raise RefusalError(f"{path} cannot be read ({e}): check the file and its permissions") from e
        self._lock = threading.Lock()
        self._closed = False

    @contextlib.contextmanager
    def moment(self) -> Iterator[None]:
        """What is read inside belongs to one moment; one thread at a time. Raises `ClosedError`."""
        with self._lock:
            if self._closed:
                raise ClosedError
            self._db.execute("BEGIN")
            try:
                yield
            finally:
                if self._db.in_transaction:
                    self._db.execute("COMMIT")

    def one(self, key: str) -> Record | None:
        """The live row of a key. Thread-safe. Raises `ClosedError`."""
        with self._lock:
            if self._closed:
                raise ClosedError
            return self.live(key)

    def pictured(self, ids: Sequence[int]) -> dict[int, bytes]:
        """`thumbnails`. Thread-safe. Raises `ClosedError`."""
        with self._lock:
            if self._closed:
                raise ClosedError
            try:
                return self.thumbnails(ids)
            except sqlite3.OperationalError:
                if self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'thumbnails'").fetchone():
                    raise
                return {}  # no writer has opened it since there are any

    def version(self) -> int:
        """Changes whenever another connection has committed. Thread-safe. Raises `ClosedError`."""
        with self._lock:
            if self._closed:
                raise ClosedError
            return int(self._db.execute("PRAGMA data_version").fetchone()[0])

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            self._closed = True
            self._db.close()


def _has_digests(db: sqlite3.Connection) -> bool:
    return "file_sha256" in {name for _, name, *_ in db.execute("PRAGMA table_info(items)")}


def sqlite_version() -> tuple[int, ...]:
    """Of the library that Python was built with."""
    return sqlite3.sqlite_version_info


def _live(db: sqlite3.Connection, key: str) -> Record | None:
    found = db.execute(
        "SELECT id, key, payload, source_uri, sequence, segment, vector, origin FROM items WHERE key = ? AND live = 1",
        (key,),
    ).fetchone()
    return _record(found) if found else None


def _record(found: tuple[int, str, str, str, int, int | None, bytes | None, str]) -> Record:
    vector = None if found[6] is None else np.frombuffer(found[6], np.float32)
    return Record(StoredRow(*found[:5]), found[5], vector, found[7])


def originals_in(records: Path) -> list[str]:
    """Digests of the originals that the live rows of a file of records name, that nobody writes to; ascending."""
    with contextlib.closing(sqlite3.connect(f"{records.resolve().as_uri()}?mode=ro", uri=True)) as db:
        if not _has_digests(db):
            return []
        asked = (
            "SELECT DISTINCT file_sha256 FROM items WHERE live = 1 AND file_size IS NULL AND file_sha256 IS NOT NULL"
        )
        return sorted(digest for (digest,) in db.execute(asked))


def copy_records(source: Path, target: Path) -> tuple[int, int, list[int]]:
    """A consistent copy of the records: live items, last sequence number, and the segments that it names."""
    try:
        with contextlib.closing(
            sqlite3.connect(f"{source.resolve().as_uri()}?mode=ro", uri=True, isolation_level=None, timeout=30)
        ) as db:
            db.execute("VACUUM INTO ?", (str(target),))
        with contextlib.closing(sqlite3.connect(target)) as copied:
            (items,) = copied.execute("SELECT count(*) FROM items WHERE live = 1").fetchone()
            (sequence,) = copied.execute("SELECT value FROM counters WHERE name = 'sequence'").fetchone()
            numbers = [number for (number,) in copied.execute("SELECT number FROM segments ORDER BY number")]
    except sqlite3.Error as e:
        raise RefusalError(f"{source} cannot be copied ({e}): check the file and the free space") from e
    return items, sequence, numbers
