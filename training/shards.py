"""Shards of the picture cache: a file of uint8 pixels, and a sealed note that makes it valid."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from export.bundle import RefusalError, printable, publish, sha256_json, write_file
from export.preprocess import Pixels, PreprocessSpec, UnreadablePictureError, preprocess
from export.sources.picture import Picture
from training.duplicates import perceptual_hash

FORMAT = 2  # of the notes; part of each shard's listing
UNREAD_SHARE = 0.1  # of a shard's pictures; when more cannot be read, the disk or the store is at fault
UNREAD_FEW = 4  # so many never stop a build

Verify = Literal["auto", "full", "sampled"]


class Shard(NamedTuple):
    """Consecutive pictures, and where they are kept."""

    pictures: Sequence[Picture]
    spec: PreprocessSpec
    listing: str
    """Digest of the specification and of the pictures' keys, sizes and times of change."""
    pixels: Path
    """uint8 [readable pictures, S, S, 3]."""
    note: Path
    """JSON: `keys` of the readable pictures in the order of the pixels, their `aspects` and `hashes`, how many are
    `plain`; (key, reason) of the `unreadable`, and of the `unread`, which another attempt may read; `checksums`."""

    def in_folder(self, folder: Path) -> Shard:
        """The same below `folder`."""
        return self._replace(pixels=folder / self.pixels.name, note=folder / self.note.name)


def plan_shards(items: Sequence[Picture], spec: PreprocessSpec, rows: int) -> list[Shard]:
    """`items` in shards of `rows` pictures."""
    shards = []
    for number, low in enumerate(range(0, len(items), rows)):
        part = items[low : low + rows]
        listing = sha256_json([FORMAT, spec.sha256(), [(p.key, p.size, p.mtime_ns) for p in part]])
        name = f"pixels-{number:05d}"
        shards.append(Shard(part, spec, listing, Path(f"{name}.npy"), Path(f"{name}.json")))
    return shards


def read_note(shard: Shard) -> dict[str, Any] | None:
    """The note of a shard, None where it is absent, damaged, or of other pictures."""
    try:
        note: dict[str, Any] = json.loads(shard.note.read_bytes())
        body = {name: value for name, value in note.items() if name != "seal"}
    except (OSError, ValueError, AttributeError):
        return None
    return note if note.get("listing") == shard.listing and note.get("seal") == sha256_json(body) else None


def is_whole(shard: Shard, note: dict[str, Any], verify: Verify) -> bool:
    """Whether the pixels are those that the note was written for."""
    try:
        return _checksums(shard.pixels, verify == "full").items() <= note["checksums"].items()
    except OSError:
        return False


class _Result(NamedTuple):
    pixels: Pixels | None
    aspect: float = 0.0
    reason: str = ""
    again: bool = False
    """Whether another attempt may read it."""


def write_shard(shard: Shard, pool: ThreadPoolExecutor) -> dict[str, Any]:
    """Decode the pictures of a shard and write it; returns its note.

    Raises `RefusalError` when more than a tenth of the pictures cannot be read now; nothing is written then.
    """
    return _write(shard, pool.map(lambda picture: _decode(picture, shard.spec), shard.pictures))


def read_again(shard: Shard, note: dict[str, Any], pool: ThreadPoolExecutor) -> dict[str, Any]:
    """Try the `unread` pictures of a whole shard once more; returns its note, a new one where something changed."""
    keys = {key for key, _ in note["unread"]}
    tried = [picture for picture in shard.pictures if picture.key in keys]
    found = {p.key: r for p, r in zip(tried, pool.map(lambda p: _decode(p, shard.spec), tried), strict=True)}
    if all(result.again for result in found.values()):
        return note
    found |= {key: _Result(None, reason=reason) for key, reason in note["unreadable"]}
    if note["keys"]:
        pixels = np.load(shard.pixels, mmap_mode="r")
        kept = zip(note["keys"], pixels, note["aspects"], strict=True)
        found |= {key: _Result(row, aspect) for key, row, aspect in kept}
    return _write(shard, (found[picture.key] for picture in shard.pictures))


def _decode(picture: Picture, spec: PreprocessSpec) -> _Result:
    try:
        data = picture.read()
    except UnreadablePictureError as e:
        gone = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
        return _Result(
            None, reason=str(e), again=isinstance(e.__cause__, OSError) and not isinstance(e.__cause__, gone)
        )
    try:
        prepared = preprocess(data, spec)
    except UnreadablePictureError as e:
        return _Result(None, reason=str(e))
    return _Result(prepared.pixels, prepared.width / prepared.height)


def _write(shard: Shard, results: Iterable[_Result]) -> dict[str, Any]:
    side = shard.spec.size
    pixels = np.empty((len(shard.pictures), side, side, 3), np.uint8)
    note: dict[str, Any] = {"listing": shard.listing, "keys": [], "aspects": [], "unreadable": [], "unread": []}
    for picture, result in zip(shard.pictures, results, strict=True):
        if result.pixels is None:
            note["unread" if result.again else "unreadable"].append((picture.key, result.reason))
        else:
            pixels[len(note["keys"])] = result.pixels
            note["keys"].append(picture.key)
            note["aspects"].append(result.aspect)
    _refuse_many(note["unread"], len(shard.pictures))
    pixels = pixels[: len(note["keys"])]
    hashes, plain = perceptual_hash(pixels)
    note["hashes"], note["plain"] = [row.tobytes().hex() for row in hashes], int(plain.sum())
    shard.note.unlink(missing_ok=True)
    temporary = shard.pixels.with_suffix(".tmp")
    with temporary.open("wb") as file:
        np.save(file, pixels)
    note["checksums"] = _checksums(temporary, full=True)
    publish(temporary, shard.pixels)
    # Through JSON once, so that the seal is of what will be read. The note makes the shard valid.
    note = json.loads(json.dumps(note))
    note["seal"] = sha256_json(note)
    write_file(shard.note, json.dumps(note))
    return note


def _refuse_many(unread: list[tuple[str, str]], pictures: int) -> None:
    if len(unread) > max(UNREAD_FEW, UNREAD_SHARE * pictures):
        key, reason = unread[0]
        raise RefusalError(
            f"{len(unread):,} of {pictures:,} pictures in a row cannot be read, for example {printable(key)}: "
            f"{printable(reason)}; what is decoded is kept: run again when the disk or store answers, or leave them out"
        )


def _checksums(path: Path, full: bool) -> dict[str, str | int]:
    """Size, digest of 64 evenly spaced stretches of 64 KiB, and the digest of every byte where `full`."""
    size, stretch = path.stat().st_size, 2**16
    sampled = hashlib.sha256()
    with path.open("rb") as file:
        for at in np.linspace(0, max(0, size - stretch), 64, dtype=np.int64).tolist():
            file.seek(at)
            sampled.update(file.read(stretch))
        found: dict[str, str | int] = {"bytes": size, "sampled": sampled.hexdigest()}
        if full:
            file.seek(0)
            found["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
