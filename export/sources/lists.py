"""Tables of what is known of pictures: CSV, TSV, JSON Lines or Parquet. A list of pictures has a column `path` (or `uri`)
and, where known, `label`; its other columns are fields."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from datetime import date, datetime, time
from typing import Any, NamedTuple

from export.bundle import RefusalError

LIST_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
_PATHS = ("path", "uri")
_CODE = re.compile(r"[+-]?0\d")  # as of products and places: its zeros matter
_Rows = Iterable[tuple[int, dict[str, Any]]]


class Listed(NamedTuple):
    """A row of a list."""

    line: int
    """From 1, as an editor shows it; rows of Parquet count from 1, too."""
    path: str
    label: str | None
    """None where the list has no such column, '' where the cell is empty."""
    fields: str
    """The other columns as a JSON object, without empty cells; '' where there are none, or they were not asked for."""


def read_list(name: str, data: bytes, with_fields: bool = False) -> Iterator[Listed]:
    """The rows of a list. Raises `RefusalError` naming the line."""
    for line, row in read_table(name, data, _PATHS, ("label",), with_fields):
        column = next(c for c in _PATHS if c in row)
        path, label = row[column], row.get("label")
        if not isinstance(path, str) or not path:
            raise RefusalError(
                f"{name} line {line} has {path!r} as its {column}, a text was expected: correct that line"
            )
        given = None if "label" not in row else "" if label is None else str(label)
        others = {key: value for key, value in row.items() if key not in (column, "label")}
        yield Listed(line, path, given, as_json(others, name, line) if others and with_fields else "")


def as_json(fields: dict[str, Any], name: str, line: int) -> str:
    """Fields as a JSON object, empty ones left out. Raises `RefusalError` where JSON has nothing for a value."""
    try:
        there = {key: value for key, value in fields.items() if not missing(value)}
        return json.dumps(there, default=plain, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as e:
        raise RefusalError(
            f"{name} line {line} cannot become a payload ({e}): give numbers, text, dates, or lists of these"
        ) from None


def missing(value: Any) -> bool:
    """Whether a cell is empty: null, or NaN as pandas writes it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def plain(value: Any) -> str:
    """Dates and times as RFC 3339, for `json.dumps`."""
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    raise TypeError(f"a value of type {type(value).__name__}")


def read_table(
    name: str, data: bytes, needed: Sequence[str], as_text: Sequence[str] = (), with_others: bool = True
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, row) of a table whose rows have one of the `needed` columns. Raises `RefusalError` naming the line.

    `with_others`: columns beside `needed` and `as_text`, too. In CSV they become numbers, booleans and times where each of
    their cells is one (with leading zeros it is text), and None where a cell is empty.
    """
    suffix = name.lower().rpartition(".")[2]
    rows: _Rows
    if suffix == "parquet":
        rows = _parquet(name, data, needed, None if with_others else (*needed, *as_text))
    else:
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as e:
            line = data[: e.start].count(b"\n") + 1
            raise RefusalError(f"{name} line {line} is not UTF-8: save the list as UTF-8") from None
        if suffix in ("jsonl", "ndjson"):
            rows = _json_lines(name, text)
        else:
            rows = _csv(name, text, "\t" if suffix == "tsv" else ",", needed)
            if with_others:
                rows = _typed(name, rows, (*needed, *as_text))
    for line, row in rows:
        if not set(needed) & row.keys():
            raise RefusalError(f"{name} line {line} has no column {_or(needed)} (found: {_named(row)}): name it so")
        yield line, row


def _or(names: Sequence[str]) -> str:
    return " or ".join(map(repr, names))


def _named(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"


def _csv(name: str, text: str, comma: str, needed: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=comma, strict=True)
    header: list[str] | None = None
    try:
        for cells in reader:
            if not cells:
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                if not set(needed) & set(header):
                    raise RefusalError(
                        f"{name} line {reader.line_num} names no column {_or(needed)} (found: {_named(header)}): the "
                        "first line must name the columns"
                    )
                continue
            if len(cells) != len(header):
                raise RefusalError(
                    f"{name} line {reader.line_num} has {len(cells)} cells, the first line names {len(header)} columns: "
                    "correct that line"
                )
            yield reader.line_num, dict(zip(header, cells, strict=True))
    except csv.Error as e:
        raise RefusalError(f"{name} line {reader.line_num} is damaged ({e}): correct that line") from None


def _typed(name: str, rows: _Rows, as_text: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of CSV, in which every column but those of `as_text` has the type of its cells."""
    arrow, csv_of, _ = _arrow(name)
    kept = list(rows)
    names = [column for column in (kept[0][1] if kept else ()) if column and column not in as_text]
    if not names:
        yield from ((line, {column: row[column] for column in row if column}) for line, row in kept)
        return
    codes = [column for column in names if any(_CODE.match(row[column]) for _, row in kept)]
    buffer = io.StringIO()
    csv.writer(buffer, quoting=csv.QUOTE_ALL).writerows([row[column] for column in names] for _, row in kept)
    data = buffer.getvalue().encode()
    table = csv_of.read_csv(
        io.BytesIO(data),
        csv_of.ReadOptions(column_names=names, block_size=len(data) + 1),  # one block: types follow from every cell
        csv_of.ParseOptions(newlines_in_values=True),
        csv_of.ConvertOptions(column_types=dict.fromkeys(codes, arrow.string())),
    )
    low = 0
    for batch in table.to_batches():
        for (line, row), typed in zip(kept[low : low + len(batch)], batch.to_pylist(), strict=True):
            own = {column: row[column] for column in as_text if column in row}
            yield line, {**own, **{column: None if value == "" else value for column, value in typed.items()}}
        low += len(batch)


def _json_lines(name: str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except ValueError as e:
            raise RefusalError(f"{name} line {line} is not JSON ({e}): correct that line") from None
        if not isinstance(row, dict):
            raise RefusalError(f'{name} line {line} is no object such as {{"path": "a.jpg"}}: correct that line')
        yield line, row


def _parquet(
    name: str, data: bytes, needed: Sequence[str], columns: Sequence[str] | None
) -> Iterator[tuple[int, dict[str, Any]]]:
    pa, _, pq = _arrow(name)
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        found = file.schema_arrow.names
        if not set(needed) & set(found):
            raise RefusalError(f"{name} has no column {_or(needed)} (found: {_named(found)}): name it so")
        line = 0
        for batch in file.iter_batches(columns=[c for c in found if columns is None or c in columns]):
            for row in batch.to_pylist():
                line += 1
                yield line, row
    except (pa.ArrowException, OSError) as e:
        reason = str(e).splitlines()[0]
        raise RefusalError(f"{name} is no Parquet file that can be read ({reason}): write it again") from None


def _arrow(name: str) -> tuple[Any, Any, Any]:
    """pyarrow, pyarrow.csv and pyarrow.parquet."""
    try:
        import pyarrow as pa
        import pyarrow.csv as pa_csv
        import pyarrow.parquet as pq
    except ModuleNotFoundError:
        raise RefusalError(f"{name} needs the package pyarrow: pip install pyarrow, or give a CSV list") from None
    return pa, pa_csv, pq
