"""Snapshots: a collection as it was at one sequence number, copied while a server writes to it.

    snapshot/
        collection.json, records.sqlite, segments/   a whole collection
        originals/                                   the pictures that its items name, each under its own digest
        snapshot.json                                SnapshotManifest: what each other file must be

A snapshot takes no lock: SQLite gives a consistent copy of the records, and the segments and originals that they name never
change. Where one was merged or swept away in between, it begins again, with the originals that it has.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from export.bundle import RefusalError, Sealed, make_folder, publish, read_contract, write_file
from service.checksums import FileSum, sum_of, verify
from service.collection import Collection
from service.errors import DataLossError
from service.originals import MissingOriginalError, Originals, place_of
from service.reading import COLLECTION_FORMAT, OLDEST_FORMAT, CollectionManifest, Point, uid_of
from service.records import copy_records, originals_in
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
    """What each file must be, by path inside the snapshot; originals are what their names say."""
    originals: int = 0
    """Originals in it."""


def take(collection: Path, out: Path, say: Say) -> SnapshotManifest:
    """Copy a collection, that may be in use, into a new folder. Raises `RefusalError`; then nothing is there."""
    manifest = _manifest_of(collection)
    with _new_folder(out) as temporary:
        temporary.mkdir()
        missing = None
        for _ in range(_ATTEMPTS):
            shutil.rmtree(temporary / "segments", ignore_errors=True)
            (temporary / "records.sqlite").unlink(missing_ok=True)
            items, sequence, segments = copy_records(collection / "records.sqlite", temporary / "records.sqlite")
            try:
                originals = copy_originals(collection, temporary, originals_in(temporary / "records.sqlite"))
                _copy_segments(collection, temporary, segments)
                break
            except (FileNotFoundError, MissingOriginalError) as e:  # a merge or a sweep has removed one
                if str(e) == missing:  # no: it was named again
                    raise RefusalError(f"the snapshot cannot be taken: {e}") from e
                missing = str(e)
            except DataLossError as e:
                raise RefusalError(f"the snapshot cannot be taken: {e}") from e
        else:
            raise RefusalError(
                f"the segments of {collection} change faster than they can be copied: take the snapshot when fewer writes "
                "come, or from a copy of the disk"
            )
        for folder in sorted((temporary / "segments").glob("*")):
            Segment(folder, full=True)  # what was damaged before is not sealed as sound
        shutil.copyfile(collection / "collection.json", temporary / "collection.json")
        kept = temporary / "originals"
        files = {
            str(path.relative_to(temporary)): sum_of(path)
            for path in sorted(temporary.rglob("*"))
            if path.is_file() and kept not in path.parents
        }
        taken = SnapshotManifest(
            collection=collection.resolve().name, space_id=manifest.space_id, sequence=sequence, items=items,
            created=datetime.now(UTC).replace(microsecond=0), files=files, originals=originals,
        )  # fmt: skip
        write_file(temporary / "snapshot.json", taken.sealed().model_dump_json(indent=2))
    size = sum(f.bytes for f in files.values()) + Originals(out).extent().bytes
    say(f"{out} holds {items:,} items, up to write {sequence:,} ({size / 2**20:,.1f} MiB)")
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
        try:
            copy_originals(snapshot, temporary, originals_in(temporary / "records.sqlite"))
        except DataLossError as e:
            raise RefusalError(f"{snapshot} is damaged, take another snapshot: {e}") from e
        copied = _manifest_of(temporary)
        # What is written to it from here on is not what is written to the other.
        point = Point(uid=uid_of(copied), sequence=manifest.sequence)
        own = copied.model_copy(update={"uid": uuid.uuid4().hex, "restored": point})
        write_file(temporary / "collection.json", own.sealed().model_dump_json(indent=2))
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


def copy_originals(collection: Path, target: Path, digests: Sequence[str]) -> int:
    """Copy these pictures from one collection's folder to another's, leave those that are there, and remove others; returns
    how many are there then. Raises `MissingOriginalError` where some are not there any more, after copying the others, and
    `DataLossError` where one is damaged."""
    source, copies = Originals(collection), target / "originals"
    wanted = set(digests)
    for path in copies.glob("??/*"):
        if path.name not in wanted:
            path.unlink()
    missing: MissingOriginalError | None = None
    for digest in digests:
        copy = place_of(copies, digest)
        if copy.is_file():
            continue
        try:
            data = source.read(digest)  # what was damaged before is not sealed as sound
        except MissingOriginalError as e:
            missing = e
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(data)
    if missing is not None:
        raise missing
    return len(digests)


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
