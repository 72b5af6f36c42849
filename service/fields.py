"""What is known of pictures beside their bytes: a table of payload fields by key."""

from __future__ import annotations

from pathlib import Path

from export.bundle import RefusalError
from export.sources.lists import LIST_SUFFIXES, as_json, read_table
from service.collection import check_payload
from service.errors import ServiceError

Fields = dict[str, str]
"""A JSON object per key."""


def read_fields(path: Path) -> Fields:
    """Payload fields per key, from CSV, TSV, JSON Lines or Parquet with a column `key`; empty cells are left out. Raises
    `RefusalError`."""
    if not path.is_file():
        raise RefusalError(
            f"{path} does not exist: give a .csv, .tsv, .jsonl or .parquet file with a column called key"
        )
    if path.suffix.lower() not in LIST_SUFFIXES:
        raise RefusalError(f"{path} is no table that is known here: give .csv, .tsv, .jsonl or .parquet")
    try:
        data = path.read_bytes()
    except OSError as e:
        raise RefusalError(f"{path} cannot be read ({e.strerror}): check its permissions") from None
    found: Fields = {}
    for line, row in read_table(str(path), data, ("key",)):
        key = row.pop("key")
        if not isinstance(key, str):
            raise RefusalError(f"{path} line {line} has {key!r} in the column key: give each row the key of a picture")
        if key in found:
            raise RefusalError(f"{path} line {line} has the key {key!r} once more: give each a row of its own")
        found[key] = as_json(row, str(path), line)
        check_fields(found[key], f"{path} line {line}")
    return found


def check_fields(fields: str, place: str) -> None:
    """Raises `RefusalError` where a JSON object cannot be stored as a payload."""
    try:
        check_payload(fields, "payload")
    except ServiceError as e:
        raise RefusalError(f"{place} cannot be a payload ({e}): give numbers, text, or lists") from None
