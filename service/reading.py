"""What can be read of a collection: its manifest, its view, and the queries that a writer and a follower answer alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa

from export.bundle import Contract, Embeddings, RefusalError, Sealed, read_contract, sha256_json
from service.errors import InvalidArgumentError, MismatchError, NotFoundError
from service.filter import Filter, payload_path
from service.fresh import Fresh
from service.index import IndexInfo
from service.originals import MissingOriginalError, Originals
from service.policy import IndexPolicy
from service.records import ClosedError, Reader, Reads, Record, Writes
from service.segment import Segment, StoredRow
from service.view import Hit, Part, Read, View

T = TypeVar("T")

COLLECTION_FORMAT = 2
OLDEST_FORMAT = 1
# Keys of larger segments are compared with the records by `verify` alone; their ids' count, sum and maximum always.
COMPARED_UP_TO = 20_000
AGAIN = "restore the collection from a backup, or build it again"


class Point(Contract):
    """A collection as it was after one of its writes."""

    uid: str
    """Which collection."""
    sequence: int
    """Sequence number of the write."""


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
    policy: IndexPolicy = IndexPolicy()
    """What its indexes keep to (from format 2 on)."""
    uid: str = ""
    """Names its history of writes; '' in older collections, see `Readable.uid`."""
    keep_originals: bool = False
    """Whether pictures that come as bytes are kept, so that another encoder can embed them."""
    thumbnail_pixels: int = 0
    """Longer side of the thumbnails that are made of pictures which come as bytes; 0: none."""
    follows: str = ""
    """The collection that this one holds the pictures of, in another space: its uid; '' for none."""
    restored: Point | None = None
    """What a snapshot held that this collection was restored from."""


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
    info: IndexInfo
    """How it is searched, what that is worth, and why."""
    bytes: int
    """On the disk."""


def read_manifest(folder: Path, space_id: str | None) -> CollectionManifest:
    """collection.json. Raises `RefusalError` where there is none, it is damaged, or of another space than `space_id`."""
    path = folder / "collection.json"
    if not path.is_file():
        raise RefusalError(
            f"{folder} is not a collection (no collection.json): make one with `likewise index build --bundle BUNDLE "
            f"--images PICTURES --out {folder}`"
        )
    manifest = read_contract(path, CollectionManifest, COLLECTION_FORMAT, AGAIN, OLDEST_FORMAT)
    if space_id is not None and space_id != manifest.space_id:
        raise RefusalError(
            f"{folder} holds vectors of space {manifest.space_id}, the bundle makes {space_id} "
            "(MODEL_INDEX_MISMATCH): name the bundle that the collection was built with (--bundle), or build it again "
            "with this one"
        )
    if not (folder / "records.sqlite").is_file():
        raise RefusalError(f"{folder / 'records.sqlite'} is missing, so the segments mean nothing: {AGAIN}")
    return manifest


def uid_of(manifest: CollectionManifest) -> str:
    """The collection's uid; of older ones, which have none, one that follows from what stays as it is."""
    return manifest.uid or sha256_json([manifest.space_id, manifest.dim, manifest.created.isoformat()])[:32]


class Readable(ABC):
    """A collection as those see it who do not write."""

    folder: Path
    manifest: CollectionManifest
    originals: Originals
    _view: View
    _sequence: int
    _reader: Reader

    @property
    def name(self) -> str:
        """Its folder's name."""
        return self.folder.name

    @property
    def uid(self) -> str:
        """Names its history of writes: two collections with one uid are copies of each other."""
        return uid_of(self.manifest)

    @property
    def space_id(self) -> str:
        """Embedding space of its vectors."""
        return self.manifest.space_id

    @property
    def dim(self) -> int:
        """Length of its vectors."""
        return self.manifest.dim

    def __len__(self) -> int:
        return self._view.fresh.live + sum(part.count for part in self._view.parts)

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
            SegmentInfo(p.number, len(p.segment), len(p.segment) - p.count, p.segment.info, _bytes(p.segment.folder))
            for p in self._view.parts
        ]

    @property
    def view(self) -> View:
        """What a search sees now: never changed."""
        return self._view

    def search(
        self,
        queries: Embeddings,
        k: int,
        min_score: float | None = None,
        *,
        filters: Filter | Sequence[Filter | None] | None = None,
        leave_out: Sequence[frozenset[str]] | None = None,
    ) -> list[list[Hit]]:
        """The k most similar live rows of each query [Q, D], best first; ties by key. Vectors are scaled to length 1.

        `filters`: one for all, or one per query. `leave_out`: keys per query that are not to be found.
        """
        queries = unit_rows(queries, self.dim, "vector")
        each = [filters] * len(queries) if filters is None or isinstance(filters, Filter) else filters
        return self._view.search(queries, k, each, leave_out or [frozenset()] * len(queries), min_score)

    def nearest(
        self,
        queries: Embeddings,
        k: int,
        min_score: float | None,
        filters: Sequence[Filter | None],
        leave_out: Sequence[frozenset[str]],
        read: Read[T],
    ) -> list[list[tuple[T, float]]]:
        """The same of queries [Q, D] that are known to have length 1, with what is read of each row in place of the row."""
        return self._view.nearest(queries, k, filters, leave_out, min_score, read)

    def search_groups(
        self,
        query: Embeddings,
        k: int,
        field: str | Sequence[str],
        size: int = 1,
        *,
        wanted: Filter | None = None,
        leave_out: frozenset[str] = frozenset(),
        min_score: float | None = None,
    ) -> list[list[Hit]]:
        """The k best groups of rows that share the value of a payload field (named as in filters, or a path), each with its
        `size` best rows, for a query [D]. At most the 10,000 nearest rows are grouped."""
        rows = unit_rows(query, self.dim, "vector")
        path = payload_path(field) if isinstance(field, str) else field
        if not path:
            raise InvalidArgumentError(
                f"{field!r} is no field of the payload: write one such as product", "BAD_GROUP_BY", "group_by"
            )
        return self._view.groups(rows, k, size, path, wanted, leave_out, min_score)

    def within(self, query: Embeddings, min_score: float, wanted: Filter | None = None) -> list[Hit]:
        """Every live row at least so similar to a query [D], best first; from approximate indexes those that they find."""
        return self._view.within(unit_rows(query, self.dim, "vector"), min_score, wanted)

    def expand(
        self,
        queries: Embeddings,
        neighbours: int,
        alpha: float = 3.0,
        *,
        filters: Sequence[Filter | None] | None = None,
        leave_out: Sequence[frozenset[str]] | None = None,
    ) -> Embeddings:
        """Queries [Q, D] moved towards their nearest neighbours: α-query expansion (Radenović et al. 2018)."""
        queries = unit_rows(queries, self.dim, "vector")
        filters, leave_out = filters or [None] * len(queries), leave_out or [frozenset()] * len(queries)
        return self._view.expanded(queries, neighbours, alpha, filters, leave_out)

    def thumbnails(self, ids: Sequence[int]) -> dict[int, bytes]:
        """The thumbnails, JPEG, of live rows by id; rows without one are absent."""
        try:
            return self._reader.pictured(ids)
        except ClosedError:
            raise self._gone() from None

    def original(self, row_id: int) -> bytes | None:
        """The encoded picture that a live row was made of, where it came as bytes and was kept; else None. Raises
        `DataLossError` where it is missing or damaged."""
        digest = self._kept_as(row_id)
        if digest is None:
            return None
        try:
            return self.originals.read(digest)
        except MissingOriginalError:
            if self._kept_as(row_id) is None:
                return None  # replaced or deleted meanwhile
            raise

    def _kept_as(self, row_id: int) -> str | None:
        try:
            with self._reader.moment():
                return self._reader.kept_as(row_id)
        except ClosedError:
            raise self._gone() from None

    def latest(self) -> int:
        """Sequence number of the last write, committed up to now, whatever the view has seen."""
        try:
            with self._reader.moment():
                return self._reader.counter("sequence")
        except ClosedError:
            raise self._gone() from None

    def writes(self, after: int, count: int) -> Writes:
        """About `count` writes after a sequence number, as of one moment, whatever the view has seen. Raises
        `RefusalError` on records of before files were followed, which no writer has opened since."""
        try:
            with self._reader.moment():
                return self._reader.writes(after, count)
        except ClosedError:
            raise self._gone() from None

    def page(self, after: str | tuple[int, int], count: int) -> list[Record]:
        """Live rows after a key, by key; or after a (sequence number, id), by these: as of one moment, whatever the view has
        seen."""
        try:
            with self._reader.moment():
                return self._reader.page(after, count)
        except ClosedError:
            raise self._gone() from None

    def scan(self) -> Iterator[tuple[pa.Table, Embeddings]]:
        """Every live item, block by block, as of now: id, key, payload, source_uri and sequence, and vectors [N, D]."""
        return self._view.scan()

    @abstractmethod
    def get(self, key: str) -> StoredItem:
        """A live item. Raises `NotFoundError`."""

    def item(self, record: Record) -> StoredItem:
        """A row that `page` gave, with its vector; or what its key has become. Raises `NotFoundError`."""
        return self._stored(record, record.row.key) or self.get(record.row.key)

    @abstractmethod
    def close(self) -> None:
        """Release files; later calls are refused."""

    def written_at(self, key: str) -> int | None:
        """Sequence number of the write that a live item comes from, as of its last commit; None where there is no item."""
        try:
            record = self._reader.one(key)
        except ClosedError:
            raise self._gone() from None
        return None if record is None else record.row.sequence

    def _committed(self, key: str) -> StoredItem | None:
        """An item as its last commit left it; None where the view does not hold its segment. Raises `NotFoundError`."""
        try:
            return self._stored(self._reader.one(key), key)
        except ClosedError:
            raise self._gone() from None

    def _stored(self, record: Record | None, key: str) -> StoredItem | None:
        """An item with its vector; None where the view does not hold its segment. Raises `NotFoundError`."""
        if record is None:
            raise NotFoundError(f"the collection {self.name!r} has no item with the key {key!r}", "item", key)
        if record.vector is not None:
            return StoredItem(record.row, record.vector, record.origin)
        for part in self._view.parts:
            if part.number == record.segment:
                return StoredItem(record.row, part.segment.vector(part.segment.position(record.row.id)), record.origin)
        return None

    def _gone(self) -> NotFoundError:
        return NotFoundError(f"the collection {self.name!r} is closed or was deleted", "collection", self.name)

    def _segment_folder(self, number: int) -> Path:
        return self.folder / "segments" / f"{number:04d}"

    def _opened(self, number: int, records: Reads, full: bool = False) -> Segment:
        """Raises `RefusalError` where it is damaged, or holds other rows than the records say."""
        segment = Segment(self._segment_folder(number), full)
        ids = segment.ids
        extent = (len(ids), int(ids.sum()), int(ids[-1]) if len(ids) else 0)
        same = segment.manifest.dim == self.dim and extent == records.extent(number)
        if same and (full or len(ids) <= COMPARED_UP_TO):
            same = records.are_held(number, segment.identities())
        if not same:
            raise self._disagreement(segment)
        return segment

    def _disagreement(self, segment: Segment) -> RefusalError:
        return RefusalError(
            f"{segment.folder} and {self.folder / 'records.sqlite'} disagree about the rows of the segment: one of them is "
            "damaged; restore the collection from a backup, or build it again"
        )

    def _load(self, records: Reads, known: Mapping[int, Segment]) -> View:
        """The view that the records describe; segments that are `known` are not opened again. Raises `RefusalError` where
        segments and records disagree."""
        dead: dict[int, list[int]] = {}
        for number, row_id in records.tombstones():
            dead.setdefault(number, []).append(row_id)
        parts = []
        for number in records.segments():
            segment = known.get(number) or self._opened(number, records)
            part = Part(number, segment)
            if number in dead:
                part = part.without(np.searchsorted(segment.ids, dead[number]).tolist())
            parts.append(part)
        fresh = records.fresh()
        vectors = [record.vector for record in fresh if record.vector is not None]
        matrix = np.stack(vectors) if vectors else np.zeros((0, self.dim), np.float32)
        rows, origins = [record.row for record in fresh], [record.origin for record in fresh]
        return View(tuple(parts), Fresh.of(rows, matrix, origins))


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


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
    squares = np.einsum("ij,ij->i", vectors, vectors)
    # Rows that are unit already stay bit-identical: what was embedded is what is stored.
    odd = np.flatnonzero(~(np.abs(squares - 1) < 1e-5))
    if not len(odd):
        return vectors
    lengths = np.linalg.norm(vectors[odd].astype(np.float64), axis=1, keepdims=True)
    if not np.isfinite(lengths).all() or (lengths < 1e-12).any():
        raise InvalidArgumentError(
            "the vector is zero or holds values that are not finite: send an embedding", "BAD_VECTOR", field
        )
    scaled: Embeddings = vectors.copy()
    scaled[odd] = vectors[odd] / lengths
    return scaled
