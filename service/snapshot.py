"""Snapshots: a collection as it was at one sequence number, copied while a server writes to it.

    snapshot/
        collection.json, records.sqlite, segments/   a whole collection
        snapshot.json                                SnapshotManifest: what each file must be

A snapshot takes no lock: SQLite gives a consistent copy of the records, and the segments that they name never change. Where
one was merged away in between, it begins again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from export.bundle import RefusalError, Sealed, make_folder, publish, read_contract, write_file
from service.checksums import FileSum, sum_of, verify
from service.collection import Collection
from service.reading import COLLECTION_FORMAT, OLDEST_FORMAT, CollectionManifest
from service.records import copy_records
from service.segment import Segment
from service.store import NAME, NAME_RULE

SNAPSHOT_FORMAT = 1
_ATTEMPTS = 20
Say = Callable[[str], None]


class SnapshotManifest(Sealed):
    """snapshot.json."""

    format_version: int = SNAPSHOT_FORMAT
    """Format of this file."""
    collection: str
    """Name of the collection."""
    space_id: str
    """Embedding space of its vectors."""
    sequence: int
    """Sequence number of the last write in it."""
    items: int
    """Items in it."""
    created: datetime
    """When."""
    files: dict[str, FileSum]
    """What each file must be, by path inside the snapshot."""


def take(collection: Path, out: Path, say: Say) -> SnapshotManifest:
    """Copy a collection, that may be in use, into a new folder. Raises `RefusalError`; then nothing is there."""
    manifest = _manifest_of(collection)
    with _new_folder(out) as temporary:
        for _ in range(_ATTEMPTS):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            items, sequence, segments = copy_records(collection / "records.sqlite", temporary / "records.sqlite")
            try:
                _copy_segments(collection, temporary, segments)
                break
            except FileNotFoundError:
                continue  # a merge has removed one
        else:
            raise RefusalError(
                f"the segments of {collection} change faster than they can be copied: take the snapshot when fewer writes "
                "come, or from a copy of the disk"
            )
        for folder in sorted((temporary / "segments").glob("*")):
            Segment(folder, full=True)  # what was damaged before is not sealed as sound
        shutil.copyfile(collection / "collection.json", temporary / "collection.json")
        files = {
            str(path.relative_to(temporary)): sum_of(path) for path in sorted(temporary.rglob("*")) if path.is_file()
        }
        taken = SnapshotManifest(
            collection=collection.resolve().name, space_id=manifest.space_id, sequence=sequence, items=items,
            created=datetime.now(UTC).replace(microsecond=0), files=files,
        )  # fmt: skip
        write_file(temporary / "snapshot.json", taken.sealed().model_dump_json(indent=2))
    say(
        f"{out} holds {items:,} items, up to write {sequence:,} ({sum(f.bytes for f in files.values()) / 2**20:,.1f} MiB)"
    )
    return taken


def restore(snapshot: Path, out: Path, say: Say) -> None:
    """Verify a snapshot and copy it into a new collection folder. Raises `RefusalError`; then nothing is there."""
    if not NAME.fullmatch(out.name):
        raise RefusalError(f"{out.name!r} cannot be a collection's name: {NAME_RULE}; choose another --out")
    path = snapshot / "snapshot.json"
    if not path.is_file():
        raise RefusalError(f"{snapshot} is not a snapshot (no snapshot.json): take one with `likewise index snapshot`")
    manifest = read_contract(path, SnapshotManifest, SNAPSHOT_FORMAT, "take another snapshot")
    with _new_folder(out) as temporary:
        temporary.mkdir()
        for name, expected in manifest.files.items():
            if not (temporary / name).resolve().is_relative_to(temporary.resolve()):
                raise RefusalError(f"{path} names a file outside of it ({name}): take another snapshot")
            verify(snapshot / name, expected, "take another snapshot", full=True)
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(snapshot / name, temporary / name)
            verify(temporary / name, expected, "try again: the disk did not keep what was written to it", full=True)
        opened = Collection(temporary)
        try:
            opened.verify()
            if (len(opened), opened.sequence) != (manifest.items, manifest.sequence):
                raise RefusalError(
                    f"{snapshot} holds {len(opened):,} items up to write {opened.sequence:,}, its snapshot.json says "
                    f"{manifest.items:,} up to {manifest.sequence:,}: take another snapshot"
                )
        finally:
            opened.close()
    say(f"{out} holds {manifest.items:,} items of {manifest.collection!r}, up to write {manifest.sequence:,}")


def _manifest_of(collection: Path) -> CollectionManifest:
    path = collection / "collection.json"
    if not path.is_file():
        raise RefusalError(f"{collection} is not a collection (no collection.json): give the folder of one")
    return read_contract(path, CollectionManifest, COLLECTION_FORMAT, "take it from a backup", OLDEST_FORMAT)


@contextlib.contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder that becomes `out` on leaving, durably; nothing is left after an error."""
    if out.exists():
        raise RefusalError(f"{out} exists already: choose another folder")
    make_folder(out.parent.resolve())
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        yield temporary
        publish(temporary, out)
    except OSError as e:
        at = e.filename or out
        raise RefusalError(f"{at} cannot be copied ({e.strerror}): check its permissions and the free space") from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _copy_segments(collection: Path, target: Path, numbers: list[int]) -> None:
    """Open every file first: what a merge removes stays readable. Raises `FileNotFoundError` where one is gone before."""
    with contextlib.ExitStack() as opened:
        files: list[tuple[BinaryIO, Path]] = []
        for number in numbers:
            folder = collection / "segments" / f"{number:04d}"
            for path in sorted(folder.iterdir()):  # others see it whole or not at all
                files.append((opened.enter_context(path.open("rb")), target / "segments" / folder.name / path.name))
        for source, copy in files:
            copy.parent.mkdir(parents=True, exist_ok=True)
            with copy.open("wb") as file:
                left = os.fstat(source.fileno()).st_size
                while left and (done := os.sendfile(file.fileno(), source.fileno(), None, left)):
                    left -= done
