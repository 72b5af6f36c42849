"""Checksums of large files, chunk by chunk: a file of many gigabytes can be verified in part, and in parallel."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from export.bundle import Contract, RefusalError

CHUNK = 16 * 2**20
# Of a larger file an opening reads its first and last chunk and so many others; `likewise index verify` reads all.
SAMPLED = 2


class FileSum(Contract):
    """What a file must be."""

    bytes: int
    """Its length."""
    chunks: list[str]
    """SHA-256 of each 16 MiB, hexadecimal."""


def sum_of(path: Path) -> FileSum:
    """The checksums of a file."""
    size = path.stat().st_size
    return FileSum(bytes=size, chunks=_digests(path, range(-(-size // CHUNK))))


def verify(path: Path, expected: FileSum, what_to_do: str, full: bool = False) -> None:
    """Compare a file with its checksums: every chunk (`full`), or at most four. Raises `RefusalError`."""
    size = path.stat().st_size if path.is_file() else None
    if size != expected.bytes:
        found = "is missing" if size is None else f"has {size:,} bytes"
        raise RefusalError(f"{path} {found}, segment.json says {expected.bytes:,}: the file was damaged; {what_to_do}")
    count = len(expected.chunks)
    chosen = list(range(count))
    if not full and count > SAMPLED + 2:
        inner = np.random.default_rng().choice(count - 2, SAMPLED, replace=False) + 1
        chosen = [0, *sorted(inner.tolist()), count - 1]
    for number, found in zip(chosen, _digests(path, chosen), strict=True):
        if found != expected.chunks[number]:
            raise RefusalError(
                f"{path} has checksum {found[:12]}… at byte {number * CHUNK:,}, segment.json says "
                f"{expected.chunks[number][:12]}…: the file was damaged; {what_to_do}"
            )


def _digests(path: Path, chunks: range | list[int]) -> list[str]:
    with path.open("rb") as file:
        descriptor = file.fileno()

        def digest(number: int) -> str:
            return hashlib.sha256(os.pread(descriptor, CHUNK, number * CHUNK)).hexdigest()

        if len(chunks) < 2:
            return [digest(number) for number in chunks]
        with ThreadPoolExecutor(min(len(chunks), os.cpu_count() or 1)) as pool:
            return list(pool.map(digest, chunks))
