"""Lists of pictures: CSV, TSV, JSONL or Parquet with a column `path` (or `uri`) and, where known, `label`."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from typing import Any

from export.bundle import RefusalError

LIST_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
_PATHS = ("path", "uri")


def read_list(name: str, data: bytes) -> Iterator[tuple[int, str, str | None]]:
    """(line, path, label) of each row; the label is None where the list has no such column, '' where the cell is empty.

    Lines count from 1 as an editor shows them; rows of Parquet count from 1. Raises `RefusalError` naming the line.
    """
    suffix = name.lower().rpartition(".")[2]
    rows: Iterable[tuple[int, dict[str, Any]]]
    if suffix == "parquet":
        rows = _parquet(name, data)
    else:
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as e:
            line = data[: e.start].count(b"\n") + 1
            raise RefusalError(f"{name} line {line} is not UTF-8: save the list as UTF-8") from None
        rows = _json_lines(name, text) if suffix in ("jsonl", "ndjson") else _csv(name, text, suffix)
    for line, row in rows:
        column = next((c for c in _PATHS if c in row), None)
        if column is None:
            found = ", ".join(map(repr, row)) or "none"
            raise RefusalError(f"{name} line {line} has no column 'path' or 'uri' (found: {found}): name it so")
        path, label = row[column], row.get("label")
        if not isinstance(path, str) or not path:
            raise RefusalError(
                f"{name} line {line} has {path!r} as its {column}, a text was expected: correct that line"
            )
        yield line, path, None if "label" not in row else "" if label is None else str(label)


def _csv(name: str, text: str, suffix: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if suffix == "tsv" else ",", strict=True)
    header: list[str] | None = None
    try:
        for cells in reader:
            if not cells:
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                if not set(_PATHS) & set(header):
                    found = ", ".join(map(repr, header))
                    raise RefusalError(
                        f"{name} line {reader.line_num} names no column 'path' or 'uri' (found: {found}): the first "
                        "line must name the columns"
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


def _parquet(name: str, data: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError:
        raise RefusalError(f"{name} needs the package pyarrow: pip install pyarrow, or give a CSV list") from None
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        columns = [column for column in file.schema_arrow.names if column in (*_PATHS, "label")]
        if not set(_PATHS) & set(columns):
            found = ", ".join(map(repr, file.schema_arrow.names))
            raise RefusalError(f"{name} has no column 'path' or 'uri' (found: {found}): name it so")
        line = 0
        for batch in file.iter_batches(columns=columns):
            for row in batch.to_pylist():
                line += 1
                yield line, row
    except (pa.ArrowException, OSError) as e:
        raise RefusalError(f"{name} is no Parquet file that can be read ({e}): write it again") from None
