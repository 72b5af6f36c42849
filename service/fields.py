"""What is known of pictures beside their bytes: a table of payload fields by key."""

from __future__ import annotations

import json
import math
from datetime import date, datetime, time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from export.bundle import RefusalError
from service.collection import check_payload
from service.errors import ServiceError

Fields = dict[str, dict[str, Any]]


def read_fields(path: Path) -> Fields:
    """Payload fields per key, from CSV, TSV, JSON Lines or Parquet with a column `key`; empty cells are left out. Raises
    `RefusalError`."""
    if not path.is_file():
        raise RefusalError(
            f"{path} does not exist: give a .csv, .tsv, .jsonl or .parquet file with a column called key"
        )
    suffix = path.suffix.lower()
    try:
        if suffix in (".csv", ".tsv"):
            options = pa_csv.ParseOptions(delimiter="\t" if suffix == ".tsv" else ",")
            rows = pa_csv.read_csv(path, parse_options=options).to_pylist()
        elif suffix == ".parquet":
            rows = pq.read_table(path).to_pylist()
        elif suffix in (".jsonl", ".ndjson"):
            rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        else:
            raise RefusalError(f"{path} is no table that is known here: give .csv, .tsv, .jsonl or .parquet")
    except (OSError, ValueError, pa.ArrowException) as e:
        raise RefusalError(f"{path} cannot be read ({str(e).splitlines()[0]}): write it anew") from None
    found: Fields = {}
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get("key"), str):
            raise RefusalError(f"row {number} of {path} has no text in a column called key: give each its key")
        key = row.pop("key")
        if key in found:
            raise RefusalError(f"{path} has the key {key!r} more than once: give each a row of its own")
        found[key] = {name: value for name, value in row.items() if not missing(value)}
        try:
            check_payload(json.dumps(found[key], default=plain, allow_nan=False), "payload")
        except (ServiceError, ValueError, TypeError) as e:
            raise RefusalError(
                f"row {number} of {path} cannot be a payload ({e}): give numbers, text, or lists"
            ) from None
    return found


def missing(value: Any) -> bool:
    """Whether a cell is empty: null, or NaN as pandas writes it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def plain(value: Any) -> str:
    """Dates and times as RFC 3339, for `json.dumps`."""
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    raise TypeError(f"a value of type {type(value).__name__}")
