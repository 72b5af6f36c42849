"""A process that writes to a collection and says so: before each call what it will change, after it that it is done.

    python -m tests.faults.workload FOLDER MARKERS SEED SABOTAGE

Makes the collection FOLDER, or opens the one there. Every row is a number: its payload, its place, its vector and its
original follow from it, so that nothing but numbers is compared. SQLite moves its log into the main file at 30 pages instead
of 1000: a few dozen writes then see several checkpoints and a log that begins anew. SABOTAGE takes one of our syncs away.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import sqlite3
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np

from service.collection import Collection
from service.originals import digest_of
from service.records import NewRow

DIM = 8
SPACE = "lw1-x"
KEYS = [f"k{i:02d}" for i in range(40)]
CHECKPOINT_PAGES = 30
PICTURES = 12

# Four coordinates of ±½: of length 1, and exact in any type of float that a segment may use.
_PLACES = list(itertools.combinations(range(DIM), 4))
_SIGNS = list(itertools.product((0.5, -0.5), repeat=4))
NUMBERS = len(_PLACES) * len(_SIGNS)


def vector(number: int) -> np.ndarray:
    """The vector of a row: no two have the same."""
    found = np.zeros(DIM, np.float32)
    found[list(_PLACES[number // len(_SIGNS)])] = _SIGNS[number % len(_SIGNS)]
    return found


def picture(number: int) -> bytes | None:
    """What a row was made of: some have the same, some came as a vector."""
    return b"picture %d" % (number % PICTURES) if number % PICTURES else None


def row(key: str, number: int) -> NewRow:
    """The rest of a row."""
    original = picture(number)
    digest = None if original is None else digest_of(original)
    return NewRow(key, json.dumps({"number": number}), f"file:///{number}", file_sha256=digest)


class Step(NamedTuple):
    """One call of the workload."""

    do: str
    put: dict[str, int]
    """Numbers by key."""
    gone: list[str]


def steps(seed: int) -> list[Step]:
    """About 60 calls of every kind; among them what a server does most."""
    rng = random.Random(seed)
    numbers = iter(rng.sample(range(NUMBERS), NUMBERS))

    def some(least: int, most: int) -> dict[str, int]:
        return {key: next(numbers) for key in rng.sample(KEYS, rng.randint(least, most))}

    def one() -> Step:
        (do,) = rng.choices(
            ["upsert", "delete", "flush", "add_segment", "compact", "compact_all", "sweep", "reopen"],
            [27, 8, 8, 4, 5, 3, 5, 3],
        )
        put = some(1, 5) if do == "upsert" else some(1, 6) if do == "add_segment" else {}
        return Step(do, put, rng.sample(KEYS, rng.randint(1, 3)) if do == "delete" else [])

    nothing: tuple[dict[str, int], list[str]] = ({}, [])
    start = [Step("upsert", some(3, 5), []), Step("flush", *nothing), Step("add_segment", some(3, 6), [])]
    end = [
        Step("upsert", some(2, 4), []),
        Step("flush", *nothing),
        Step("delete", {}, rng.sample(KEYS, 3)),
        Step("compact_all", *nothing),
        Step("sweep", *nothing),
        Step("upsert", some(1, 3), []),
        Step("close", *nothing),
    ]
    return [*start, *(one() for _ in range(50)), *end]


# Which fsync of export.bundle is left out: of a folder (or of a file), its path below the disk, and for the collection's own
# folder whether it holds segments already: one sync is for the name of the manifest, one for that of `segments`.
FSYNCS = {
    "segment-files": (False, r".*/segments/.*", None),
    "segment-names": (True, r".*/segments/\.\d+\.tmp", None),
    "segment-folder": (True, r".*/segments", None),
    "manifest-file": (False, r".*/\.collection\.json\.tmp", None),
    "manifest-name": (True, r"shelf/things", False),
    "segments-folder": (True, r"shelf/things", True),
    "collection-folder": (True, r"shelf", None),
    "parent-folder": (True, r"\.", None),
    "original-file": (False, r".*/originals/.*", None),
    "original-name": (True, r".*/originals/..", None),
    "originals-folder": (True, r".*/originals", None),
}
PRAGMAS = {"synchronous-normal": "NORMAL", "synchronous-off": "OFF"}
SABOTAGES = (*PRAGMAS, *FSYNCS)


@contextmanager
def sabotage(name: str, disk: Path) -> Iterator[list[str]]:
    """Leave a sync out; yields what was left out. SQLite checkpoints early, whatever the name."""
    left_out: list[str] = []
    real_fsync, real_connect = os.fsync, sqlite3.connect

    def fsync(fd: int) -> None:
        path = os.path.relpath(os.readlink(f"/proc/self/fd/{fd}"), disk)  # noqa: PTH115
        of_folder, pattern, with_segments = FSYNCS[name]
        chosen = stat.S_ISDIR(os.fstat(fd).st_mode) == of_folder and re.fullmatch(pattern, path) is not None
        if chosen and with_segments in (None, (disk / path / "segments").exists()):
            left_out.append(path)
        else:
            real_fsync(fd)

    class Connection(sqlite3.Connection):
        def execute(self, sql: str, *arguments: Any) -> sqlite3.Cursor:
            if name in PRAGMAS and re.search(r"pragma\s+synchronous", sql, re.IGNORECASE):
                left_out.append(sql)
                sql = f"PRAGMA synchronous={PRAGMAS[name]}"
            return super().execute(sql, *arguments)

    def connect(*arguments: Any, **named: Any) -> sqlite3.Connection:
        db = real_connect(*arguments, factory=Connection, **named)
        db.execute(f"PRAGMA wal_autocheckpoint={CHECKPOINT_PAGES}")
        return db

    patched_fsync = fsync if name in FSYNCS else real_fsync
    with patch.object(sqlite3, "connect", connect), patch.object(os, "fsync", patched_fsync):
        yield left_out


def apply(collection: Collection, step: Step) -> int:
    """Do it; how many segments were merged, or originals swept."""
    rows = [row(key, number) for key, number in step.put.items()]
    vectors = np.array([vector(number) for number in step.put.values()], np.float32)
    pictures = [picture(number) for number in step.put.values()]
    if step.do == "upsert":
        collection.upsert(rows, vectors, pictures)
    elif step.do == "add_segment":
        with collection.originals.kept(each for each in pictures if each is not None):
            collection.add_segment(rows, vectors)
    elif step.do == "sweep":
        return collection.sweep().files
    elif step.do == "delete":
        collection.delete(step.gone)
    elif step.do == "flush":
        collection.flush()
    elif step.do == "compact":
        return collection.compact()
    elif step.do == "compact_all":
        return collection.compact(everything=True)
    else:
        assert step.do in ("close", "reopen"), step.do
        collection.close()
    return 0


def main(folder: Path, markers: Path, seed: int, name: str) -> None:
    """Run all steps."""
    with markers.open("wb", buffering=0) as said, sabotage(name, folder.parent.parent) as left_out:

        def say(**what: object) -> None:
            said.write(json.dumps(what).encode())  # one system call

        there = (folder / "collection.json").exists()
        say(begin="open" if there else "create", put={}, gone=[])
        collection = Collection(folder) if there else Collection.create(folder, SPACE, DIM, keep_originals=True)
        say(done=0)
        for step in steps(seed):
            say(begin=step.do, put=step.put, gone=step.gone)
            merged = apply(collection, step)
            if step.do == "reopen":
                collection = Collection(folder)
            say(done=merged)
        say(left_out=len(left_out))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
