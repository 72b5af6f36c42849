"""`likewise index build` and `sync`: a folder of pictures → a collection, resumable shard by shard.

Unit of work: a shard of pictures → its vectors and a note that makes them valid, each written whole. When all shards
are there they become one segment in one commit. Killed at any point, the same command continues; run again later, it
adds what is new or changed.
"""

from __future__ import annotations

import json
import shutil
import sys
import zlib
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from export.bundle import (
    Bundle,
    Embeddings,
    RefusalError,
    list_pictures,
    printable,
    publish,
    sha256_file,
    sha256_json,
    write_file,
    write_unreadable,
)
from export.preprocess import PictureFile, UnreadablePictureError, find_pictures
from service.changes import Changes, compare
from service.collection import Collection
from service.config import IndexBuild, IndexSync
from service.encoder import BUILD_BATCH, Decoded, Encoder
from service.fields import Fields, plain, read_fields
from service.records import MAX_KEY_BYTES, FileState, NewRow
from service.store import NAME, NAME_RULE

SHARD = 512
Decoding = deque[Future[Decoded | UnreadablePictureError]]
NOTE = 3  # format of a shard's note


def build(asked: IndexBuild) -> None:
    """Build a collection, or add what is new or changed. Raises `RefusalError`."""
    _follow(asked, None)


def sync(asked: IndexSync) -> None:
    """Make a collection follow a folder, deletions included. Raises `RefusalError`."""
    _follow(asked, asked)


def _follow(asked: IndexBuild, following: IndexSync | None) -> None:
    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    unread: list[tuple[str, str]] = []
    there = (asked.out / "collection.json").is_file()
    if following is not None and there and asked.images.is_dir():
        found = find_pictures(asked.images, unread)  # none at all is an answer, too
    else:
        found = list_pictures(asked.images, unread)
    if asked.shard is not None:
        if following is not None:
            raise RefusalError(
                "a shard cannot follow a folder, of which it holds a part: sync without --shard, or build"
            )
        number, shards = map(int, asked.shard.split("/"))
        if number > shards:
            raise RefusalError(f"there is no shard {number} of {shards}: write i/n, with i from 1 to n")
        found = [picture for picture in found if zlib.crc32(picture.key.encode()) % shards == number - 1]
    if not NAME.fullmatch(asked.out.name):
        raise RefusalError(f"{asked.out.name!r} cannot be a collection's name: {NAME_RULE}; choose another --out")
    fields = {} if asked.payload is None else read_fields(asked.payload)
    if asked.payload is not None and not any(picture.key in fields for picture in found):
        raise RefusalError(
            f"{asked.payload} has no row for any picture of {asked.images}: its keys must be paths below the folder, such "
            f"as {found[0].key if found else 'shelf/1.jpg'}"
        )
    bundle = Bundle.open(asked.bundle)
    dry = following is not None and following.dry_run
    if there:
        collection = Collection(asked.out, bundle.space_id)
        try:
            asked.check(collection.manifest.policy, asked.out)
        except RefusalError:
            collection.close()
            raise
    elif dry:
        console.print(f"{len(found):,} pictures to embed into a new collection; nothing was done (--dry-run)")
        return
    else:
        collection = Collection.create(asked.out, bundle.space_id, bundle.dim, asked.policy())
    try:
        before = collection.files()
        changes = compare(before, found, asked.images, [key for key, _ in unread])
        if following is None:  # nothing goes, so what was renamed is there twice
            renamed = [p for old, p in changes.moved if old != p.key]
            changes = changes._replace(
                embed=sorted([*changes.embed, *renamed]), moved=[(old, p) for old, p in changes.moved if old == p.key]
            )
        allowed = None if following is None else following.max_delete * sum(s.size is not None for s in before.values())
        _announce(changes, len(found), asked, following is not None, console)
        if following is not None and allowed is not None and len(changes.gone) + len(changes.replaced) > allowed:
            raise RefusalError(
                f"{len(changes.gone):,} items have no file in {asked.images} (any more), and {len(changes.replaced):,} of "
                f"files elsewhere would be replaced, of {len(before):,}: more than --max-delete "
                f"{following.max_delete:g} allows; nothing was done. Check that the folder is the right one and is mounted, "
                "or pass --max-delete 1"
            )
        if dry:
            _say(changes, console)
            return
        if asked.payload is None:  # new bytes or a new name: what was known of the picture stays
            again = [(p.key, p) for p in changes.embed if p.key in before] + changes.moved
            fields = {p.key: _known(collection.get(old).row.payload) for old, p in again}
        # What comes before what goes: interrupted in between, nothing is missing.
        written, unreadable, undecodable = _fill(collection, asked, bundle, changes.embed, fields, unread, console)
        collection.touch((p.key, p.mtime_ns) for p in changes.touched)
        for low in range(0, len(changes.moved), SHARD):
            part = changes.moved[low : low + SHARD]
            collection.move([(old, _row({**_about(p), "sha256": before[old].sha256}, fields)) for old, p in part])
        if asked.payload is not None:
            described = _describe(collection, found, before, fields)
            console.print(f"{described:,} items that were there have another payload now")
        deleted = 0
        if allowed is not None:
            broken = [key for key in undecodable if key in before]  # their new bytes are no picture
            if len(changes.gone) + len(changes.replaced) + len(broken) > allowed:
                console.print(f"{len(broken):,} items whose file is no picture any more stay: see --max-delete")
                broken = []
            collection.delete([*changes.gone, *broken])
            deleted = len(changes.gone) + len(broken)
        if collection.flush_due or collection.merge_due:
            console.print("merging segments")
            collection.maintain()
        console.print(
            f"done: {asked.out} holds {len(collection):,} items ({written:,} written now, {unreadable} skipped"
            f"{f', {deleted:,} deleted' if following is not None else ''})   "
            f"next: likewise serve --bundle {asked.bundle} --collections {asked.out}"
        )
    finally:
        collection.close()


def _announce(changes: Changes, found: int, asked: IndexBuild, deletes: bool, console: Console) -> None:
    """What was found, in one line, and what is left alone."""
    unchanged = found - sum(len(part) for part in (changes.embed, changes.touched, changes.moved, changes.owned))
    gone = f"; {len(changes.gone):,} items have no file in {asked.images} (any more)" if changes.gone else ""
    console.print(
        f"{found:,} pictures: {unchanged:,} as they were, {len(changes.embed):,} to embed, {len(changes.touched):,} with a "
        f"new time only, {len(changes.moved):,} under a new name{gone}{' and stay' if gone and not deletes else ''}"
    )
    if changes.owned:
        console.print(f"{len(changes.owned):,} files are left alone, a client wrote their item: {changes.owned[0]}, …")


def _say(changes: Changes, console: Console) -> None:
    """What would be done."""
    renamed = [f"{old} → {picture.key}" for old, picture in changes.moved]
    for what, keys in (("embed", [p.key for p in changes.embed]), ("rename", renamed), ("delete", changes.gone)):
        for key in keys[:20]:
            console.print(f"would {what} {printable(key)}")
        if len(keys) > 20:
            console.print(f"would {what} {len(keys) - 20:,} more")
    console.print("nothing was done (--dry-run)")


def _fill(
    collection: Collection,
    asked: IndexBuild,
    bundle: Bundle,
    todo: list[PictureFile],
    fields: Fields,
    unlisted: list[tuple[str, str]],
    console: Console,
) -> tuple[int, int, list[str]]:
    """Embed pictures into a segment of their own: how many were written, how many skipped, and the keys of those whose
    bytes were read and are no picture."""
    work = asked.out / "building"
    if not todo:
        shutil.rmtree(work, ignore_errors=True)  # of a build whose pictures are gone
        write_unreadable(asked.out / "unreadable.tsv", unlisted)
        return 0, len(unlisted), []
    work.mkdir(exist_ok=True)
    encoder = Encoder(bundle, asked, console.print)
    refusal = encoder.mixing_refusal(collection.origins)
    if refusal is not None:
        encoder.close()
        raise RefusalError(refusal)
    console.print(
        f"embedding with {bundle.space_id}, {encoder.runtime.variant} on {encoder.runtime.provider} "
        f"({encoder.runtime.provider_reason})"
    )
    parts = [todo[low : low + SHARD] for low in range(0, len(todo), SHARD)]
    columns = (TextColumn("embedding"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as progress:
            task = progress.add_task("", total=len(todo))
            kept = [_noted(work, number, part, encoder) for number, part in enumerate(parts)]
            left = [number for number, note in enumerate(kept) if note is None]
            progress.advance(task, sum(len(part) for part, note in zip(parts, kept, strict=True) if note is not None))
            ahead = _decoding(parts[left[0]] if left else [], encoder)
            for number, following in zip_longest(left, left[1:]):
                # The next shard is decoded while this one is embedded.
                decoding, ahead = ahead, _decoding([] if following is None else parts[following], encoder)
                kept[number] = _shard(work, number, parts[number], encoder, decoding)
                progress.advance(task, len(parts[number]))
    finally:
        encoder.close()
    notes = [note for note in kept if note is not None]  # all of them
    unreadable = [*unlisted, *((key, reason) for note in notes for key, reason, _ in note["unreadable"])]
    undecodable = [key for note in notes for key, _, was_read in note["unreadable"] if was_read]
    write_unreadable(asked.out / "unreadable.tsv", unreadable)
    rows = [_row(row, fields, encoder.origin) for note in notes for row in note["rows"]]
    if rows:
        vectors = np.concatenate([np.load(work / f"{i:06d}.npy") for i, note in enumerate(notes) if note["rows"]])
        console.print(f"writing a segment of {len(rows):,} vectors of {bundle.dim} dimensions")
        collection.add_segment(rows, vectors)
    shutil.rmtree(work)
    for key, reason in unreadable[:5]:
        console.print(f"skipped {printable(key)}: {reason}")
    if len(unreadable) > 5:
        console.print(f"… and {len(unreadable) - 5} more: see {asked.out / 'unreadable.tsv'}")
    animated = sum(note["animated"] for note in notes)
    if animated:
        console.print(f"{animated} pictures are animated: their first frame was used")
    return len(rows), len(unreadable), undecodable


def _files(work: Path, number: int) -> tuple[Path, Path]:
    """A shard's vectors, and its note."""
    return work / f"{number:06d}.npy", work / f"{number:06d}.json"


def _listing(part: Sequence[PictureFile], encoder: Encoder) -> str:
    """What a shard is made of."""
    return sha256_json([NOTE, encoder.space_id, encoder.origin, [(p.key, p.size, p.mtime_ns) for p in part]])


def _noted(work: Path, number: int, part: Sequence[PictureFile], encoder: Encoder) -> dict[str, Any] | None:
    """The note of a shard as an earlier start left it; None where it is absent or of another listing."""
    vectors_file, note_file = _files(work, number)
    try:
        note: dict[str, Any] = json.loads(note_file.read_bytes())
        if note["listing"] == _listing(part, encoder) and note["sha256"] == sha256_file(vectors_file):
            return note
    except (OSError, ValueError, KeyError):
        pass
    return None


def _decoding(part: Sequence[PictureFile], encoder: Encoder) -> Decoding:
    return deque(encoder.decoders.submit(_read, encoder, picture) for picture in part)


def _shard(
    work: Path, number: int, part: Sequence[PictureFile], encoder: Encoder,
    decoding: Decoding,
) -> dict[str, Any]:  # fmt: skip
    """Embed one shard; returns its note."""
    vectors_file, note_file = _files(work, number)
    rows, unreadable, pixels, animated = [], [], [], 0
    vectors: list[Embeddings] = []
    for picture in part:
        result = decoding.popleft().result()  # pixels go as soon as they are embedded
        if isinstance(result, UnreadablePictureError):
            unreadable.append((picture.key, str(result), not isinstance(result.__cause__, OSError)))
            continue
        animated += result.animated
        rows.append({**_about(picture), "sha256": result.sha256})
        pixels.append(result.pixels)
        if len(pixels) == BUILD_BATCH:
            vectors.append(encoder.embed(np.stack(pixels)))
            pixels = []
    if pixels:
        vectors.append(encoder.embed(np.stack(pixels)))
    temporary = vectors_file.with_suffix(".tmp")
    with temporary.open("wb") as file:
        np.save(file, np.concatenate(vectors) if vectors else np.zeros((0, encoder.dim), np.float32))
    publish(temporary, vectors_file)
    note = {
        "listing": _listing(part, encoder), "sha256": sha256_file(vectors_file), "rows": rows, "unreadable": unreadable,
        "animated": animated,
    }  # fmt: skip
    write_file(note_file, json.dumps(note))
    return note


def _about(picture: PictureFile) -> dict[str, Any]:
    """What a row says of its file, beside the digest."""
    place = picture.path.parent.resolve() / picture.path.name  # of a link: where it lies, not where it leads
    return {
        "key": picture.key, "size": picture.size, "mtime_ns": picture.mtime_ns, "uri": place.as_uri(),
        "payload": json.dumps({"folder": picture.folder}),
    }  # fmt: skip


def _known(payload: str) -> dict[str, Any]:
    """A payload without what follows from the file."""
    fields: dict[str, Any] = json.loads(payload)
    fields.pop("folder", None)
    return fields


def _describe(
    collection: Collection, found: Sequence[PictureFile], before: Mapping[str, FileState], fields: Fields
) -> int:
    """Give items that were there the payload that they have now, without embedding them again; returns how many."""
    pictures = {p.key: p for p in found if p.key in before and before[p.key].size is not None}
    stored = {
        key: payload
        for rows, _ in collection.scan()
        for key, payload in zip(rows["key"].to_pylist(), rows["payload"].to_pylist(), strict=True)
        if key in pictures
    }
    files = collection.files()
    rows = [_row({**_about(pictures[key]), "sha256": files[key].sha256}, fields) for key in stored]
    other = [row for row in rows if json.loads(row.payload) != json.loads(stored[row.key])]
    for low in range(0, len(other), SHARD):
        collection.move([(row.key, row) for row in other[low : low + SHARD]])
    return len(other)


def _row(about: dict[str, Any], fields: Fields, origin: str = "") -> NewRow:
    payload = about["payload"]
    if about["key"] in fields:
        payload = json.dumps({**json.loads(payload), **fields[about["key"]]}, default=plain)
    return NewRow(about["key"], payload, about["uri"], origin, about["size"], about["mtime_ns"], about["sha256"])


def _read(encoder: Encoder, picture: PictureFile) -> Decoded | UnreadablePictureError:
    if len(picture.key.encode("utf-8", "replace")) > MAX_KEY_BYTES:
        return UnreadablePictureError(
            "IMAGE_UNDECODABLE", f"its path has more than {MAX_KEY_BYTES} bytes: shorten folder or file names"
        )
    return encoder.read(picture)
