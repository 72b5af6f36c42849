"""`likewise index build`: a folder of pictures → a collection, resumable shard by shard.

Unit of work: a shard of pictures → its vectors and a note that makes them valid, each written whole. When all shards
are there they become one segment in one commit. Killed at any point, the same command continues; run again later, it
adds what is new or changed.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import Future
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
from export.preprocess import PictureFile, UnreadablePictureError
from service.collection import MAX_KEY_BYTES, Collection
from service.config import IndexBuild
from service.encoder import BUILD_BATCH, Decoded, Encoder
from service.records import NewRow
from service.store import NAME, NAME_RULE

SHARD = 512


def build(asked: IndexBuild) -> None:
    """Build or update a collection. Raises `RefusalError`."""
    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    unlisted: list[tuple[str, str]] = []
    found = list_pictures(asked.images, unlisted)
    if not NAME.fullmatch(asked.out.name):
        raise RefusalError(f"{asked.out.name!r} cannot be a collection's name: {NAME_RULE}; choose another --out")
    bundle = Bundle.open(asked.bundle)
    if (asked.out / "collection.json").is_file():
        collection = Collection(asked.out, bundle.space_id)
    else:
        collection = Collection.create(asked.out, bundle.space_id, bundle.dim)
    try:
        _fill(collection, asked, bundle, found, unlisted, console)
    finally:
        collection.close()


def _fill(
    collection: Collection,
    asked: IndexBuild,
    bundle: Bundle,
    found: list[PictureFile],
    unlisted: list[tuple[str, str]],
    console: Console,
) -> None:
    before = collection.files()
    todo = [p for p in found if before.get(p.key) != (p.size, p.mtime_ns)]
    gone = len(before.keys() - {p.key for p in found})
    if gone:
        console.print(f"{gone} items have no file in {asked.images} (any more); they stay in the collection")
    work = asked.out / "building"
    work.mkdir(exist_ok=True)
    encoder = Encoder(bundle, asked, console.print)
    refusal = encoder.mixing_refusal(collection.origins) if todo else None
    if refusal is not None:
        encoder.close()
        raise RefusalError(refusal)
    console.print(
        f"{len(found):,} pictures, {len(todo):,} to embed, with {bundle.space_id}, {encoder.runtime.variant} on "
        f"{encoder.runtime.provider} ({encoder.runtime.provider_reason})"
    )
    parts = [todo[low : low + SHARD] for low in range(0, len(todo), SHARD)]
    columns = (TextColumn("embedding"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as progress:
            task = progress.add_task("", total=len(todo))
            notes = []
            for number, part in enumerate(parts):
                notes.append(_shard(work, number, part, encoder))
                progress.advance(task, len(part))
    finally:
        encoder.close()
    unreadable = [*unlisted, *((key, reason) for note in notes for key, reason in note["unreadable"])]
    write_unreadable(asked.out / "unreadable.tsv", unreadable)
    rows = [
        NewRow(row["key"], row["payload"], row["uri"], encoder.origin, row["size"], row["mtime_ns"])
        for note in notes
        for row in note["rows"]
    ]
    if rows:
        vectors = np.concatenate([np.load(work / f"{i:06d}.npy") for i, note in enumerate(notes) if note["rows"]])
        console.print(f"writing a segment of {len(rows):,} vectors of {bundle.dim} dimensions")
        collection.add_segment(rows, vectors)
        if collection.needs_care:
            console.print("merging segments")
            collection.maintain()
    shutil.rmtree(work)
    for key, reason in unreadable[:5]:
        console.print(f"skipped {printable(key)}: {reason}")
    if len(unreadable) > 5:
        console.print(f"… and {len(unreadable) - 5} more: see {asked.out / 'unreadable.tsv'}")
    animated = sum(note["animated"] for note in notes)
    if animated:
        console.print(f"{animated} pictures are animated: their first frame was used")
    console.print(
        f"done: {asked.out} holds {len(collection):,} items ({len(rows):,} written now, {len(unreadable)} skipped)   "
        f"next: likewise serve --bundle {asked.bundle} --collections {asked.out}"
    )


def _shard(work: Path, number: int, part: Sequence[PictureFile], encoder: Encoder) -> dict[str, Any]:
    """Embed one shard, or take it as an earlier start left it; returns its note."""
    vectors_file, note_file = work / f"{number:06d}.npy", work / f"{number:06d}.json"
    listing = sha256_json([encoder.space_id, encoder.origin, [(p.key, p.size, p.mtime_ns) for p in part]])
    try:
        note: dict[str, Any] = json.loads(note_file.read_bytes())
        if note["listing"] == listing and note["sha256"] == sha256_file(vectors_file):
            return note
    except (OSError, ValueError, KeyError):
        pass  # absent or of another listing: made now
    rows, unreadable, pixels, animated = [], [], [], 0
    futures: list[Future[Decoded | UnreadablePictureError]] = [
        encoder.decoders.submit(_read, encoder, picture) for picture in part
    ]
    vectors: list[Embeddings] = []
    for picture, future in zip(part, futures, strict=True):
        result = future.result()
        if isinstance(result, UnreadablePictureError):
            unreadable.append((picture.key, str(result)))
            continue
        animated += result.animated
        rows.append(
            {
                "key": picture.key, "size": picture.size, "mtime_ns": picture.mtime_ns,
                "uri": picture.path.resolve().as_uri(), "payload": json.dumps({"folder": picture.folder}),
            }
        )  # fmt: skip
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
        "listing": listing, "sha256": sha256_file(vectors_file), "rows": rows, "unreadable": unreadable,
        "animated": animated,
    }  # fmt: skip
    write_file(note_file, json.dumps(note))
    return note


def _read(encoder: Encoder, picture: PictureFile) -> Decoded | UnreadablePictureError:
    if len(picture.key.encode("utf-8", "replace")) > MAX_KEY_BYTES:
        return UnreadablePictureError(
            "IMAGE_UNDECODABLE", f"its path has more than {MAX_KEY_BYTES} bytes: shorten folder or file names"
        )
    return encoder.read(picture)
