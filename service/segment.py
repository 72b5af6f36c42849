"""Immutable segments of a collection.

segments/0001/
    vectors.npy    float32 or float16 [N, D], unit rows
    rows.arrow     id, key, payload, source_uri, sequence
    payload.arrow  typed columns of the payload's fields, for filters
    index.faiss    nearest neighbours over the rows' positions
    segment.json   counts, checksums, how the index was chosen and what it is worth, who made the vectors

All are memory-mapped: opening copies nothing, and a query never reads SQLite.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
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
from service.checksums import FileSum, sum_of, verify
from service.filter import Attributes, Filter
from service.index import (
    BLOCK,
    Bitmap,
    IndexInfo,
    Rows,
    Stored,
    are_few,
    build_index,
    lists_of,
    placed,
    read_index,
    search_index,
    search_rows,
    write_index,
)
from service.payload import columns_of, merged
from service.policy import IndexPolicy

SEGMENT_FORMAT = 2
# Bitmaps of the last filters, N / 8 bytes each.
FILTERS_KEPT = 32
_AGAIN = "restore the folder from a backup, or build the collection again"
_SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("key", pa.large_string()),
        ("payload", pa.large_string()),
        ("source_uri", pa.large_string()),
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
    index: IndexInfo
    """How it is searched."""
    origins: dict[str, int]
    """How many vectors each variant and provider made."""
    files: dict[str, FileSum]
    """What each file must be."""


class _Manifest1(Sealed):
    """segment.json of format 1: no typed columns, and one checksum per file."""

    format_version: int
    rows: int
    dim: int
    factory: str
    nprobe: int
    recall_at_10: float
    origins: dict[str, int]
    sha256: dict[str, str]


class _Strings:
    """A column of strings, read one by one: an Arrow scalar for each would take longer than the search."""

    def __init__(self, column: pa.Array) -> None:
        _, offsets, data = column.buffers()
        self._offsets = memoryview(offsets or b"\0" * 8).cast("q" if pa.types.is_large_string(column.type) else "i")
        self._first = column.offset
        self._data = memoryview(data or b"")
        self._bounds = np.asarray(self._offsets)

    def __getitem__(self, at: int) -> str:
        at += self._first
        return str(self._data[self._offsets[at] : self._offsets[at + 1]], "utf-8")

    def take(self, at: Rows) -> list[str]:
        """Many at once."""
        data, lows = self._data, at + self._first
        lows, highs = self._bounds[lows].tolist(), self._bounds[lows + 1].tolist()
        return [str(data[low:high], "utf-8") for low, high in zip(lows, highs, strict=True)]


class StoredRow(NamedTuple):
    """A row as a query returns it."""

    id: int
    key: str
    payload: str
    source_uri: str
    sequence: int


class Segment:
    """An opened segment whose files match their checksums."""

    def __init__(self, folder: Path, full: bool = False) -> None:
        """Verify (large files in part, or in `full`) and open. Raises `RefusalError` on missing or damaged files."""
        path = folder / "segment.json"
        if not path.is_file():
            raise RefusalError(f"{folder} is part of the collection, but {path.name} is missing there: {_AGAIN}")
        self.folder = folder
        self.manifest, self._whole = _read_manifest(path)
        self.verify(full)
        self.vectors: Stored = np.load(folder / "vectors.npy", mmap_mode="r")
        self.table = _mapped(folder / "rows.arrow")
        self._columns = [self.table[name].chunk(0) if len(self) else pa.array([], self.table[name].type)
                         for name in _SCHEMA.names]  # fmt: skip
        self.ids: Rows = self._columns[0].to_numpy()
        self._sequences: Rows = self._columns[4].to_numpy()
        self._strings = [_Strings(column) for column in self._columns[1:4]]
        self.info = self.manifest.index
        self._passing = functools.lru_cache(FILTERS_KEPT)(self._evaluated)
        path = folder / "index.faiss"
        index = read_index(path, self.manifest.rows, self.manifest.dim)
        self._index = placed(index, self.info.factory, path.stat().st_size)

    def __len__(self) -> int:
        return self.manifest.rows

    def verify(self, full: bool) -> None:
        """Compare the files with their checksums. Raises `RefusalError`."""
        for name, expected in self.manifest.files.items():
            verify(self.folder / name, expected, _AGAIN, full)
        for name, digest in self._whole.items():
            file = self.folder / name
            found = sha256_file(file) if file.is_file() else "nothing"
            if found != digest:
                raise RefusalError(
                    f"{file} has checksum {found[:12]}…, segment.json says {digest[:12]}…: the file was damaged; {_AGAIN}"
                )

    def search(
        self, queries: Embeddings, k: int, live: Bitmap | None, live_count: int, rows: Rows | None = None
    ) -> tuple[Embeddings, Rows]:
        """Scores and positions [Q, k] among the live rows (all where `live` is None); −1 where there are fewer. `rows`:
        their positions, where they are few and known."""
        count = len(self) if live is None else live_count
        if rows is not None:
            return search_rows(self._index, queries, k, self.info.effort, rows, self.vectors, lambda: self._lists)
        return search_index(self._index, queries, min(k, len(self)), self.info.effort, live, count, self.vectors)

    def row(self, position: int) -> StoredRow:
        """The row at a position."""
        keys, payloads, uris = self._strings
        return StoredRow(
            int(self.ids[position]), keys[position], payloads[position], uris[position], int(self._sequences[position])
        )

    def rows(self, positions: Sequence[int]) -> list[StoredRow]:
        """The rows at positions: several times as fast as one by one."""
        at = np.array(positions, np.int64)
        strings = (column.take(at) for column in self._strings)
        return list(
            map(StoredRow._make, zip(self.ids[at].tolist(), *strings, self._sequences[at].tolist(), strict=True))
        )

    def vector(self, position: int) -> Embeddings:
        """[D], of length 1."""
        row: Embeddings = self.vectors_at(np.array([position]))[0]
        return row

    def vectors_at(self, positions: Rows | slice) -> Embeddings:
        """[N, D] at positions: as they were written, uncopied where they are a slice, or of length 1 again where they are
        stored in float16."""
        rows: Embeddings = np.asarray(self.vectors[positions], np.float32)
        return rows if self.vectors.dtype == np.float32 else unit(rows)

    @cached_property
    def _lists(self) -> npt.NDArray[np.int32]:
        return lists_of(self._index)

    @cached_property
    def attributes(self) -> Attributes:
        """What filters look at."""
        path = self.folder / "payload.arrow"
        columns = _mapped(path) if path.is_file() else columns_of(self._columns[2].to_pylist())
        return Attributes(self._columns[1], self._columns[3], self._columns[4], self._columns[2], columns)

    def passing(self, wanted: Filter) -> tuple[Bitmap, int, Rows | None]:
        """The rows, dead ones too, that a filter passes, as a bitmap, how many they are, and where they are few their
        positions. The last filters' are kept."""
        return self._passing(wanted)

    def _evaluated(self, wanted: Filter) -> tuple[Bitmap, int, Rows | None]:
        mask = wanted.mask(self.attributes)
        count = int(np.count_nonzero(mask))
        few = np.flatnonzero(mask) if self.info.visits and are_few(self._index, count) else None
        return np.packbits(mask, bitorder="little"), count, few

    def identities(self) -> Iterator[list[tuple[int, str]]]:
        """(id, key) of every row, by id, block by block."""
        return identities(self.table)

    def payload(self, position: int) -> str:
        """Its payload alone, JSON."""
        return self._strings[1][position]

    def key(self, position: int) -> str:
        """Its key alone."""
        return self._strings[0][position]

    def position(self, row_id: int) -> int:
        """Where the row with an id is; ids ascend."""
        return int(np.searchsorted(self.ids, row_id))


def identities(rows: pa.Table) -> Iterator[list[tuple[int, str]]]:
    """(id, key) of each row, block by block."""
    for low in range(0, len(rows), BLOCK):
        some = rows.slice(low, BLOCK)
        yield list(zip(some["id"].to_pylist(), some["key"].to_pylist(), strict=True))


def unit(vector: Embeddings) -> Embeddings:
    """Of length 1 again after a rounding, [..., D]."""
    scaled: Embeddings = vector / np.linalg.norm(vector, axis=-1, keepdims=True)
    return scaled


def _read_manifest(path: Path) -> tuple[SegmentManifest, dict[str, str]]:
    """segment.json of any format, and the checksums of whole files that format 1 has instead of those per chunk."""
    try:
        old = json.loads(path.read_bytes())["format_version"] == 1
    except (OSError, ValueError, TypeError, KeyError):
        old = False  # said below
    if not old:
        return read_contract(path, SegmentManifest, SEGMENT_FORMAT, _AGAIN), {}
    found = read_contract(path, _Manifest1, 1, _AGAIN)
    info = IndexInfo(factory=found.factory, visits=found.nprobe, recall_at_10=found.recall_at_10)
    manifest = SegmentManifest(
        format_version=1, rows=found.rows, dim=found.dim, index=info, origins=found.origins, files={}
    )
    return manifest, found.sha256


def remains(folder: Path) -> tuple[pa.Table, Stored]:
    """Rows and vectors of a segment whose index or columns are damaged, which can be made anew from them. Raises
    `RefusalError` or `OSError` where these two are damaged, too."""
    manifest, whole = _read_manifest(folder / "segment.json")
    for name in ("rows.arrow", "vectors.npy"):
        path = folder / name
        if name in manifest.files:
            verify(path, manifest.files[name], _AGAIN, full=True)
        elif not path.is_file() or sha256_file(path) != whole[name]:
            raise RefusalError(f"{path} was damaged; {_AGAIN}")
    return _mapped(folder / "rows.arrow").cast(_SCHEMA), np.load(folder / "vectors.npy", mmap_mode="r")


def _mapped(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as source:
        table = pa.ipc.open_file(source).read_all()
    return table.combine_chunks() if any(column.num_chunks > 1 for column in table.columns) else table


class Batch(NamedTuple):
    """Rows to be written as a segment, ascending by id."""

    rows: pa.Table
    """id, key, payload, source_uri, sequence."""
    payload: pa.Table
    """Typed columns of the payload."""
    dim: int
    """Length of the vectors."""
    blocks: Iterable[npt.NDArray[Any]]
    """Vectors, block by block."""
    origins: Mapping[str, int]
    """How many of the vectors each variant and provider made."""


def batch_of(rows: Sequence[StoredRow], vectors: Embeddings, origins: Mapping[str, int]) -> Batch:
    """Rows with vectors [N, D]."""
    slices = (vectors[low : low + BLOCK] for low in range(0, len(vectors), BLOCK))
    return Batch(table_of(rows), columns_of([row.payload for row in rows]), vectors.shape[1], slices, origins)


def batch_of_table(
    rows: pa.Table,
    ids: range,
    sequences: range,
    dim: int,
    matrix: Iterable[npt.NDArray[Any]],
    origins: Mapping[str, int],
) -> Batch:
    """Rows that are columns already: key, payload, source_uri."""
    columns = [
        pa.array(np.arange(ids.start, ids.stop)),
        *(rows[name].cast(pa.large_string()) for name in ("key", "payload", "source_uri")),
        pa.array(np.arange(sequences.start, sequences.stop)),
    ]
    table = pa.Table.from_arrays(columns, schema=_SCHEMA)
    return Batch(table, columns_of(table["payload"].to_pylist()), dim, matrix, origins)


def batch_of_remains(rows: pa.Table, vectors: Stored, living: Rows, origins: Mapping[str, int]) -> Batch:
    """What lives of `remains`."""
    kept = rows.take(living)
    parts = (vectors[living[low : low + BLOCK]] for low in range(0, len(living), BLOCK))
    return Batch(kept, columns_of(kept["payload"].to_pylist()), vectors.shape[1], parts, origins)


def table_of(rows: Sequence[StoredRow]) -> pa.Table:
    """Rows as columns."""
    by_column = zip(*rows, strict=True) if rows else ([] for _ in _SCHEMA)
    columns = [pa.array(column, field.type) for column, field in zip(by_column, _SCHEMA, strict=True)]
    return pa.Table.from_arrays(columns, schema=_SCHEMA)


def attributes_of(rows: Sequence[StoredRow]) -> Attributes:
    """What filters look at, of rows that no segment holds yet."""
    batch = table_of(rows)
    key, payload, uri, sequence = (
        batch[name].combine_chunks() for name in ("key", "payload", "source_uri", "sequence")
    )
    return Attributes(key, uri, sequence, payload, columns_of([row.payload for row in rows]))


def joined(segments: Sequence[Segment], positions: Sequence[Rows], origins: Mapping[str, int]) -> Batch:
    """Rows of segments at `positions`: vectors are copied block by block."""
    ids = np.concatenate([segment.ids[at] for segment, at in zip(segments, positions, strict=True)])
    order = np.argsort(ids)
    rows = pa.concat_tables(
        [segment.table.take(at).cast(_SCHEMA) for segment, at in zip(segments, positions, strict=True)]
    )
    payload = merged([s.attributes.columns.take(at) for s, at in zip(segments, positions, strict=True)])
    sources = np.repeat(np.arange(len(segments)), [len(at) for at in positions])[order]
    places = np.concatenate(list(positions))[order]
    dim = segments[0].manifest.dim
    same = len({segment.vectors.dtype for segment in segments}) == 1

    def blocks() -> Iterator[npt.NDArray[Any]]:
        for low in range(0, len(ids), BLOCK):
            source, place = sources[low : low + BLOCK], places[low : low + BLOCK]
            block = np.empty((len(source), dim), segments[0].vectors.dtype if same else np.float32)
            for number in np.unique(source).tolist():
                mine = source == number
                block[mine] = segments[number].vectors[place[mine]]
            yield block

    return Batch(rows.take(order), payload.take(order), dim, blocks(), origins)


def write_segment(folder: Path, batch: Batch, policy: IndexPolicy, memory: float | None = None) -> Segment:
    """Write a whole segment durably, and open it: it is there complete, or not at all. `memory`: bytes of its index."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    make_folder(folder.parent)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        _write_vectors(temporary / "vectors.npy", batch, np.dtype(policy.vectors))
        for name, table in (("rows.arrow", batch.rows), ("payload.arrow", batch.payload)):
            with pa.OSFile(str(temporary / name), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table.combine_chunks())
        index, info = build_index(np.load(temporary / "vectors.npy", mmap_mode="r"), policy, memory)
        write_index(index, temporary / "index.faiss")
        del index  # it is opened below
        manifest = SegmentManifest(
            rows=len(batch.rows),
            dim=batch.dim,
            index=info,
            origins=dict(batch.origins),
            files={path.name: sum_of(path) for path in sorted(temporary.iterdir())},
        )
        write_file(temporary / "segment.json", manifest.sealed().model_dump_json(indent=2))
        publish(temporary, folder)
        return Segment(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_vectors(path: Path, batch: Batch, dtype: np.dtype[Any]) -> None:
    header = {"descr": dtype.str, "fortran_order": False, "shape": (len(batch.rows), batch.dim)}
    with path.open("wb") as file:
        np.lib.format.write_array_header_2_0(file, header)
        for block in batch.blocks:
            file.write(np.ascontiguousarray(block, dtype).data)
