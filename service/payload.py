"""Payloads → typed Arrow columns, so that a filter reads no JSON.

A column holds the values that one field has of one kind; rows without are null. It is named by the JSON array of the kind
and the field's path: `["string","color"]`, `["number","camera","iso"]`.

    number     float64
    string     dictionary<int32, large_string>
    bool       bool
    numbers    list<float64>         the numbers of a list; null where it has none
    strings    list<large_string>    its strings
    bools      list<bool>            its true and false
    present    bool, true            an object, or a list of which the columns above hold nothing
    rows       null                  of the empty path: the table's length, whatever its fields

So a field is there, with a value other than null, where any of its columns is valid. Lists and objects inside lists are
not searched.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain, compress, islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Path = tuple[str, ...]

# Columns of a table: the fields that most rows have. A field has all of its columns or none.
MAX_FIELDS = 512
# Of more distinct fields than this, those first seen later are left out.
_MAX_TRACKED = 32 * MAX_FIELDS
_LEFT_OUT = {b"likewise.left_out": b"true"}

TYPES = {
    "number": pa.float64(),
    "string": pa.dictionary(pa.int32(), pa.large_string()),
    "bool": pa.bool_(),
    "numbers": pa.list_(pa.float64()),
    "strings": pa.list_(pa.large_string()),
    "bools": pa.list_(pa.bool_()),
    "present": pa.bool_(),
    "rows": pa.null(),
}
# Rows that are read before their values are sorted by kind: so few that the garbage collector hardly looks at them.
_BATCH = 256
_SCALARS: dict[type, str] = {float: "number", str: "string", bool: "bool"}
_LISTS: dict[type, str] = {float: "numbers", str: "strings", bool: "bools"}
# How values wait, as array and NumPy name it.
_CODES = {"number": "d", "string": "i", "bool": "b", "numbers": "d", "strings": "i", "bools": "b", "present": "b"}


class Fields:
    """The fields of a table that `columns_of` or `merged` made."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table
        self._schema = table.schema
        #: some fields have no columns, though rows have them
        self.left_out: bool = (self._schema.metadata or {}).items() >= _LEFT_OUT.items()

    def columns(self, path: Path) -> dict[str, pa.ChunkedArray]:
        """Kind → column of a field."""
        places = ((kind, self._schema.get_field_index(_name(path, kind))) for kind in TYPES)
        return {kind: self._table.column(place) for kind, place in places if place >= 0}

    def known(self, path: Path) -> bool:
        """Whether the columns say which rows have the field: where not, only the payloads do."""
        if not self.left_out or self.columns(path):
            return True
        outer = (self.columns(path[:length]) for length in range(1, len(path)))
        return any(kinds and "present" not in kinds for kinds in outer)


def columns_of(payloads: Iterable[str], only: Collection[Path] | None = None) -> pa.Table:
    """Columns of payloads, which are JSON objects with finite numbers: one row each.

    At most `MAX_FIELDS` columns, or every one of the fields `only`.
    """
    root = _Field()
    if only is not None:
        for path in only:
            field = root
            for name in path:
                field = field.fields.setdefault(name, _Field())
    reader = _Reader(root, 0 if only is not None else _MAX_TRACKED)
    decode = json.JSONDecoder(parse_int=float).decode
    rows = 0
    remaining = iter(payloads)
    while batch := list(map(decode, islice(remaining, _BATCH))):
        reader.add(rows, batch)
        rows += len(batch)
    fields = {path: field for path, field in root.walk() if only is None or path in only}
    counts = {path: field.counts() for path, field in fields.items()}
    kept = _most_frequent(counts) if only is None else counts
    left_out = only is None and (reader.left_out or len(kept) < len(counts))
    columns = {(path, kind): fields[path].column(kind, rows) for path in kept for kind in counts[path]}
    return _table(columns, rows, left_out)


def merged(tables: Sequence[pa.Table]) -> pa.Table:
    """Rows of tables one after another; each column is one chunk, and its dictionary holds only what rows have.

    A field that one of the tables left out is left out.
    """
    tables = [table for table in tables if len(table)]
    views = [Fields(table) for table in tables]
    counts: dict[Path, Counter[str]] = defaultdict(Counter)
    for table in tables:
        for name, column in zip(table.column_names, table.columns, strict=True):
            kind, *path = json.loads(name)
            if valid := len(column) - column.null_count:
                counts[tuple(path)][kind] += valid
    whole = {path: kinds for path, kinds in counts.items() if all(view.known(path) for view in views)}
    kept = _most_frequent(whole)
    columns = {}
    for path in kept:
        parts = [view.columns(path) for view in views]
        for kind in counts[path]:
            chunks: list[pa.Array] = []
            for table, part in zip(tables, parts, strict=True):
                chunks += part[kind].chunks if kind in part else [pa.nulls(len(table), TYPES[kind])]
            columns[path, kind] = _one_chunk(pa.chunked_array(chunks, TYPES[kind]))
    left_out = any(view.left_out for view in views) or len(kept) < len(counts)
    return _table(columns, sum(map(len, tables)), left_out)


class _Field:
    """Values of a field by kind: the rows that have one, and the values."""

    __slots__ = ("fields", "lengths", "rows", "values", "waiting", "waiting_rows", "words")

    def __init__(self) -> None:
        self.rows: dict[str, array[int]] = {kind: array("i") for kind in _CODES}
        self.values: dict[str, array[Any]] = {kind: array(code) for kind, code in _CODES.items()}
        # A string is held by its code: the order in which it came.
        self.words: dict[str, dict[str, int]] = {"string": {}, "strings": {}}
        self.lengths: dict[str, array[int]] = {kind: array("i") for kind in _LISTS.values()}
        self.fields: dict[str, _Field] = {}
        # Rows and values that are not sorted by kind yet.
        self.waiting_rows: list[int] = []
        self.waiting: list[Any] = []

    def walk(self, path: Path = ()) -> Iterable[tuple[Path, _Field]]:
        """Every field inside, with its path."""
        for name, field in self.fields.items():
            yield (*path, name), field
            yield from field.walk((*path, name))

    def append(self, kind: str, values: Sequence[Any]) -> None:
        """Add values of a kind."""
        if kind in self.words:
            words = self.words[kind]
            for word in dict.fromkeys(values):
                words.setdefault(word, len(words))
            values = list(map(words.__getitem__, values))
        self.values[kind].extend(values)

    def counts(self) -> dict[str, int]:
        """Kind → how many rows have it."""
        return {kind: len(rows) for kind, rows in self.rows.items() if rows}

    def column(self, kind: str, length: int) -> pa.Array:
        """The column of a kind."""
        rows = np.frombuffer(self.rows[kind], np.int32)
        missing = np.ones(length, np.bool_)
        missing[rows] = False
        mask = pa.array(missing)
        if kind == "present":
            return pa.array(~missing, mask=missing)
        values = np.frombuffer(self.values[kind], _CODES[kind])
        if kind in self.lengths:
            offsets = np.zeros(length + 1, np.int32)
            offsets[rows + 1] = np.frombuffer(self.lengths[kind], np.int32)
            elements = self._words(kind).take(pa.array(values)) if kind == "strings" else _array(kind, values)
            return pa.ListArray.from_arrays(pa.array(np.cumsum(offsets, dtype=np.int32)), elements, mask=mask)
        column = np.zeros(length, values.dtype)
        column[rows] = values
        if kind == "string":
            return pa.DictionaryArray.from_arrays(pa.array(column, mask=missing), self._words(kind))
        return _array(kind, column, missing)

    def _words(self, kind: str) -> pa.Array:
        return pa.array(list(self.words[kind]), pa.large_string())


class _Reader:
    """Sorts the values of payloads by field and kind, a batch of rows at a time."""

    def __init__(self, root: _Field, room: int) -> None:
        self.left_out = False
        self._root = root
        self._room = room

    def add(self, first: int, payloads: Sequence[Mapping[str, Any]]) -> None:
        """Append payloads of the rows from `first` on."""
        self._objects(range(first, first + len(payloads)), payloads, self._root.fields)

    def _objects(self, rows: Sequence[int], objects: Sequence[Mapping[str, Any]], fields: dict[str, _Field]) -> None:
        for row, values in zip(rows, objects, strict=True):
            for name, value in values.items():
                field = fields.get(name)
                if field is None:
                    if value is None:
                        continue
                    if not self._room:
                        self.left_out = True
                        continue
                    self._room -= 1
                    field = fields[name] = _Field()
                field.waiting_rows.append(row)
                field.waiting.append(value)
        for field in fields.values():
            if field.waiting:
                self._sort(field)

    def _sort(self, field: _Field) -> None:
        """Put away what waits."""
        waiting_rows, field.waiting_rows = field.waiting_rows, []
        waiting, field.waiting = field.waiting, []
        found = set(map(type, waiting))
        for kind in found:
            rows, values = waiting_rows, waiting
            if len(found) > 1:
                rows = [row for row, value in zip(rows, values, strict=True) if type(value) is kind]
                values = [value for value in values if type(value) is kind]
            if kind is dict:
                field.rows["present"].extend(rows)
                self._objects(rows, values, field.fields)
            elif kind is list:
                _sort_lists(field, rows, values)
            elif kind in _SCALARS:
                field.rows[_SCALARS[kind]].extend(rows)
                field.append(_SCALARS[kind], values)


def _sort_lists(field: _Field, rows: Sequence[int], lists: Sequence[Sequence[Any]]) -> None:
    found = set(map(type, chain.from_iterable(lists)))
    empty = set(rows)
    for scalar, kind in _LISTS.items():
        if scalar not in found:
            continue
        chosen = lists
        if len(found) > 1:
            chosen = [[value for value in values if type(value) is scalar] for values in lists]
        having = list(compress(rows, chosen))
        empty.difference_update(having)
        field.rows[kind].extend(having)
        field.lengths[kind].extend(filter(None, map(len, chosen)))
        field.append(kind, list(chain.from_iterable(chosen)))
    field.rows["present"].extend(sorted(empty))


def _array(kind: str, values: npt.NDArray[Any], missing: npt.NDArray[np.bool_] | None = None) -> pa.Array:
    if kind in ("bool", "bools"):
        return pa.array(values.astype(np.bool_), mask=missing)
    return pa.array(values + 0.0, mask=missing)  # −0 becomes 0: Arrow's is_in tells them apart


def _most_frequent(counts: Mapping[Path, Mapping[str, int]]) -> list[Path]:
    """Fields whose columns, all of each, are at most `MAX_FIELDS`: those that most rows have first."""
    room = MAX_FIELDS
    kept = []
    for path in sorted(counts, key=lambda path: (-sum(counts[path].values()), path)):
        if 0 < len(counts[path]) <= room:
            room -= len(counts[path])
            kept.append(path)
    return kept


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    whole = column.unify_dictionaries().combine_chunks()
    if not pa.types.is_dictionary(whole.type):
        return whole
    used = np.zeros(len(whole.dictionary), np.bool_)
    used[whole.indices.drop_null().to_numpy()] = True
    if used.all():
        return whole
    places = pa.array(np.cumsum(used, dtype=np.int32) - np.int32(1))
    return pa.DictionaryArray.from_arrays(places.take(whole.indices), whole.dictionary.filter(pa.array(used)))


def _table(columns: Mapping[tuple[Path, str], pa.Array], rows: int, left_out: bool) -> pa.Table:
    names = {_name(path, kind): column for (path, kind), column in sorted(columns.items(), key=lambda item: item[0])}
    table = pa.table({_name((), "rows"): pa.nulls(rows), **names})
    return table.replace_schema_metadata(_LEFT_OUT if left_out else None)


def _name(path: Path, kind: str) -> str:
    return json.dumps([kind, *path], ensure_ascii=False, separators=(",", ":"))
