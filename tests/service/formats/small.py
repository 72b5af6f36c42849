"""A tiny collection of every format: N.tar.gz, made by the code that wrote it.

    python -m tests.service.formats.small N

packs the one that the present code writes. Never pack again what a release has written.
"""

from __future__ import annotations

import json
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np

from export.bundle import Embeddings
from service.collection import Collection
from service.records import NewRow

HERE = Path(__file__).parent
DIM = 8


def vectors() -> Embeddings:
    """[40, 8]"""
    rows = np.random.default_rng(1).standard_normal((40, DIM)).astype(np.float32)
    unit: Embeddings = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def new_row(i: int) -> NewRow:
    """Item i."""
    payload = {"number": i, "colour": ["red", "green"][i % 2], "tags": ["a", f"t{i % 3}"], "box": {"wide": i > 20}}
    return NewRow(
        f"folder/{i:02d}.jpg", json.dumps(payload), f"file:///pictures/{i:02d}.jpg", "fp32/CPU", 100 + i, i, "0"
    )


def live() -> dict[str, int]:
    """Key → number of what lives in it."""
    return {new_row(i).key: i for i in range(38) if i not in (3, 13, 31)} | {new_row(5).key: 39}


def make(folder: Path) -> None:
    """Segments of 10 and 20 rows with deleted rows and one replaced, and fresh rows with one deleted."""
    rows, matrix = [new_row(i) for i in range(40)], vectors()
    collection = Collection.create(folder, "sp_0123456789abcdef", DIM)
    collection.upsert(rows[:10], matrix[:10])
    collection.flush()
    collection.add_segment(rows[10:30], matrix[10:30])
    collection.upsert(rows[30:38], matrix[30:38])
    collection.upsert([rows[39]._replace(key=rows[5].key)], matrix[39:])
    collection.delete([rows[i].key for i in (3, 13, 31)])
    collection.close()


def unpack(version: int, folder: Path) -> Path:
    """Lay the collection of a format below a folder."""
    with tarfile.open(HERE / f"{version}.tar.gz") as tar:
        tar.extractall(folder, filter="data")
    return folder / "small"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "small"
        make(made)
        with tarfile.open(HERE / f"{int(sys.argv[1])}.tar.gz", "w:gz") as packed:
            packed.add(made, "small")
