"""Immutable segments of a collection.

segments/0001/
    vectors.npy    float32 [N, D], unit rows, memory-mapped
    rows.arrow     id, key, payload, source_uri, sequence: memory-mapped, so that queries never read SQLite
    index.faiss    nearest neighbours over the rows' positions
    segment.json   counts, checksums, how the index was made, who made the vectors
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from export.bundle import (
    Embeddings,
    RefusalError,
    Sealed,
    make_folder,
    publish,
    read_contract,
    sha256_file,
    write_file,
)
from service.index import Bitmap, Rows, build_index, read_index, search_index, write_index

SEGMENT_FORMAT = 1
_FILES = ("vectors.npy", "rows.arrow", "index.faiss")
_SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("key", pa.string()),
        ("payload", pa.string()),
        ("source_uri", pa.string()),
        ("sequence", pa.int64()),
    ]
)


class SegmentManifest(Sealed):
    """segment.json."""

    format_version: int = SEGMENT_FORMAT
    """Format of the segment folder."""
    rows: int
    """Vectors in it."""
    dim: int
    """Their length."""
    factory: str
    """FAISS factory string of the index."""
    nprobe: int
    """Lists visited per query (0: exact)."""
    recall_at_10: float
    """Measured against exact search."""
    origins: dict[str, int]
    """How many vectors each variant and provider made."""
    sha256: dict[str, str]
    """Checksum per file."""


class StoredRow(NamedTuple):
    """A row as a query returns it."""

    id: int
    key: str
    payload: str
    source_uri: str
    sequence: int


class Segment:
    """An opened segment whose files match their checksums."""

    def __init__(self, folder: Path) -> None:
        """Raises `RefusalError` on missing or damaged files."""
        again = "restore the folder from a backup, or build the collection again"
        path = folder / "segment.json"
        if not path.is_file():
            raise RefusalError(f"{folder} is part of the collection, but {path.name} is missing there: {again}")
        self.manifest = read_contract(path, SegmentManifest, SEGMENT_FORMAT, again)
        for name in _FILES:
            file = folder / name
            found = sha256_file(file) if file.is_file() else "nothing"
            expected = self.manifest.sha256.get(name, "nothing")
            if found != expected:
                raise RefusalError(
                    f"{file} has checksum {found[:12]}…, segment.json says {expected[:12]}…: the file was damaged; {again}"
                )
        self.folder = folder
        self.vectors: Embeddings = np.load(folder / "vectors.npy", mmap_mode="r")
        with pa.memory_map(str(folder / "rows.arrow")) as source:
            self.table = pa.ipc.open_file(source).read_all().combine_chunks()
        self._columns = [self.table[name].combine_chunks() for name in _SCHEMA.names]
        self.ids: Rows = self._columns[0].to_numpy()
        self._index = read_index(folder / "index.faiss", self.manifest.rows, self.manifest.dim)

    def __len__(self) -> int:
        return self.manifest.rows

    def search(self, queries: Embeddings, k: int, live: Bitmap | None, live_count: int) -> tuple[Embeddings, Rows]:
        """Scores and positions [Q, k] among the live rows (all where `live` is None); −1 where there are fewer."""
        count = len(self) if live is None else live_count
        return search_index(self._index, queries, min(k, len(self)), self.manifest.nprobe, live, count)

    def row(self, position: int) -> StoredRow:
        """The row at a position."""
        return StoredRow(*(column[position].as_py() for column in self._columns))

    def identities(self) -> list[tuple[int, str]]:
        """(id, key) of every row, by id."""
        return list(zip(self.ids.tolist(), self._columns[1].to_pylist(), strict=True))

    def key(self, position: int) -> str:
        """Its key alone."""
        key: str = self._columns[1][position].as_py()
        return key

    def position(self, row_id: int) -> int:
        """Where the row with an id is; ids ascend."""
        return int(np.searchsorted(self.ids, row_id))


def table_of(rows: Sequence[StoredRow]) -> pa.Table:
    """Rows as columns."""
    by_column = zip(*rows, strict=True) if rows else ([] for _ in _SCHEMA)
    columns = [pa.array(column, field.type) for column, field in zip(by_column, _SCHEMA, strict=True)]
    return pa.Table.from_arrays(columns, schema=_SCHEMA)


def joined(segments: Sequence[Segment], positions: Sequence[Rows]) -> tuple[pa.Table, Embeddings]:
    """Rows of segments at `positions`, and their vectors [N, D], ascending by id."""
    ids = np.concatenate([segment.ids[at] for segment, at in zip(segments, positions, strict=True)])
    order = np.argsort(ids)
    rows = pa.concat_tables([segment.table.take(at) for segment, at in zip(segments, positions, strict=True)])
    vectors = np.empty((len(ids), segments[0].manifest.dim), np.float32)
    places = np.argsort(order)  # where each row goes
    ends = np.cumsum([len(at) for at in positions])
    for segment, at, end in zip(segments, positions, ends.tolist(), strict=True):
        vectors[places[end - len(at) : end]] = segment.vectors[at]
    return rows.take(order), vectors


def write_segment(folder: Path, rows: pa.Table, vectors: Embeddings, origins: Mapping[str, int]) -> Segment:
    """Write a whole segment durably, and open it: it is there complete, or not at all. `rows` ascend by id; `origins`: how
    many of the vectors [N, D] each variant and provider made."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    make_folder(folder.parent)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        np.save(temporary / "vectors.npy", vectors)
        with pa.OSFile(str(temporary / "rows.arrow"), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
            writer.write_table(rows.combine_chunks())
        index, info = build_index(vectors)
        write_index(index, temporary / "index.faiss")
        del index  # it is read again below
        manifest = SegmentManifest(
            rows=len(rows),
            dim=vectors.shape[1],
            factory=info.factory,
            nprobe=info.nprobe,
            recall_at_10=info.recall_at_10,
            origins=dict(origins),
            sha256={name: sha256_file(temporary / name) for name in _FILES},
        )
        write_file(temporary / "segment.json", manifest.sealed().model_dump_json(indent=2))
        publish(temporary, folder)
        return Segment(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
