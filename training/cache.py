"""Pictures decoded once and kept shrunk: checksummed shards of uint8 pixels that a killed build finds again.

cache/
    pixels-00000.npy     uint8 [n, S, S, 3], whole pictures squeezed to squares
    pixels-00000.json    what they came from, aspect ratios, perceptual hashes, checksums; makes the shard valid
    groups.npz           near-duplicate groups, for the hashes they were made from
    near-duplicates.tsv  the same for people: group and key, a line per picture that has a near-duplicate
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from export.bundle import DataFingerprint, RefusalError, make_folder, printable, publish, sha256_json, write_file
from export.preprocess import Pixels, Prepared, PreprocessSpec, UnreadablePictureError, preprocess
from training.duplicates import Hashes, difference_hash, near_duplicates

SHARD_BYTES = 2**28
SHARD_PICTURES = 2048
FULL_CHECK_BYTES = 2 * 2**30
LARGEST_GROUP = 0.1  # share of the pictures; a larger group says that the hash cannot tell them apart

Verify = Literal["auto", "full", "sampled"]


class Picture(Protocol):
    """What the cache needs of a source's picture: `PictureFile` and the items of `training/sources.py`."""

    @property
    def key(self) -> str:
        """Unique name, UTF-8."""

    @property
    def size(self) -> int:
        """Bytes of the encoded picture, 0 where unknown."""

    @property
    def mtime_ns(self) -> int:
        """Changes whenever the contents do."""

    @property
    def folder(self) -> str:
        """Label, or ''."""

    def read(self) -> bytes:
        """The encoded picture. Raises `UnreadablePictureError`."""


class PictureCache:
    """The readable pictures of a source as uint8 [N, S, S, 3], whole and squeezed to squares.

    Attributes: `pictures` (in the order of the pixels), `aspects` (width / height of the originals, float32 [N]), `groups`
    (near-duplicate group ids, int64 [N]), `unreadable` (key, reason), `fingerprint`, `notices` (sentences to print).
    """

    def __init__(
        self,
        shards: list[Pixels],
        pictures: list[Picture],
        aspects: Tensor,
        groups: Tensor,
        unreadable: list[tuple[str, str]],
        fingerprint: DataFingerprint,
        notices: list[str],
    ) -> None:
        self._shards = shards
        self.pictures = pictures
        self.aspects = aspects
        self.groups = groups
        self.unreadable = unreadable
        self.fingerprint = fingerprint
        self.notices = notices
        self._resident: Tensor | None = None
        self._starts = np.cumsum([0, *(len(shard) for shard in shards)])

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def bytes(self) -> int:
        """Size of the pixels."""
        return sum(shard.nbytes for shard in self._shards)

    @property
    def labels(self) -> list[str | None]:
        """The label of each picture, None where it has none."""
        return [picture.folder or None for picture in self.pictures]

    @property
    def resident(self) -> bool:
        """Whether the pixels are in memory (`load`)."""
        return self._resident is not None

    def load(self, device: torch.device) -> None:
        """Hold all pixels in the memory of `device`."""
        if not self._shards:
            return
        resident = torch.empty((len(self), *self._shards[0].shape[1:]), dtype=torch.uint8, device=device)
        for shard, low in zip(self._shards, self._starts.tolist(), strict=False):
            resident[low : low + len(shard)] = torch.from_numpy(np.array(shard)).to(device)
        self._resident = resident

    def gather(self, indices: Tensor, device: torch.device) -> Tensor:
        """Pixels of the pictures at `indices` [B]: uint8 [B, S, S, 3] on `device`."""
        if self._resident is not None:
            return self._resident[indices.to(self._resident.device, non_blocking=True)].to(device)
        wanted = indices.numpy()
        out = torch.empty((len(wanted), *self._shards[0].shape[1:]), dtype=torch.uint8)
        rows = out.numpy()
        shard_of = np.searchsorted(self._starts, wanted, side="right") - 1
        for place in np.argsort(wanted).tolist():  # in the order of the disk
            s = shard_of[place]
            rows[place] = self._shards[s][wanted[place] - self._starts[s]]
        return out.to(device, non_blocking=True)


def build_cache(
    folder: Path, items: Sequence[Picture], name: str, size: int, threads: int, progress: Callable[[int], None],
    verify: Verify = "auto",
) -> PictureCache:  # fmt: skip
    """Decode `items` into shards below `folder`, `size` pixels wide and high; shards that are there and whole are kept.

    `name` says where the pictures came from, for the fingerprint. `progress` gets the number of pictures finished by each
    shard. `verify` chooses how kept shards are compared with their checksums: every byte, or samples (auto: every byte
    up to 2 GiB); a shard that fails is decoded again, and `notices` says so.

    Raises `RefusalError` when the disk has no room.
    """
    make_folder(folder)
    spec = PreprocessSpec(size=size, fit="squeeze")
    each = 3 * size * size
    rows = max(64, min(SHARD_PICTURES, SHARD_BYTES // each))
    if verify == "auto":
        verify = "full" if len(items) * each <= FULL_CHECK_BYTES else "sampled"
    shards: list[Pixels] = []
    readable: list[Picture] = []
    unreadable: list[tuple[str, str]] = []
    aspects: list[float] = []
    hashes: list[str] = []
    notices: list[str] = []
    with ThreadPoolExecutor(threads) as pool:
        for number, low in enumerate(range(0, len(items), rows)):
            part = items[low : low + rows]
            listing = sha256_json([spec.sha256(), [(p.key, p.size, p.mtime_ns) for p in part]])
            pixels_file, note_file = folder / f"pixels-{number:05d}.npy", folder / f"pixels-{number:05d}.json"
            note = _read_note(note_file, listing)
            if note is not None and not _whole(pixels_file, note, verify):
                notices.append(f"{pixels_file.name} does not match its checksum: its pictures were decoded again")
                note = None
            if note is None:
                _require_room(folder, (len(items) - low) * each)
                note = _write_shard(part, listing, pixels_file, note_file, spec, pool)
            if note["keys"]:
                shards.append(np.load(pixels_file, mmap_mode="r"))
            unreadable += [(key, reason) for key, reason in note["unreadable"]]
            aspects += note["aspects"]
            hashes += note["hashes"]
            good = set(note["keys"])
            readable += [p for p in part if p.key in good]
            progress(len(part))
    digest = sha256_json([(p.key, p.size) for p in readable])
    # A folder's name may hold bytes that are not UTF-8; what is stored must be text.
    text = name.encode("utf-8", "replace").decode()
    data = DataFingerprint(folder=text, pictures=len(readable), unreadable=len(unreadable), sha256=digest)
    packed = np.frombuffer(bytes.fromhex("".join(hashes)), np.uint64).reshape(-1, 4)
    groups = _groups(folder, packed, readable, threads, notices)
    return PictureCache(
        shards,
        readable,
        torch.tensor(aspects, dtype=torch.float32),
        torch.from_numpy(groups),
        unreadable,
        data,
        notices,
    )


def _require_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise RefusalError(
            f"the picture cache needs {needed / 1e9:.1f} GB more in {folder}, where {free / 1e9:.1f} GB are free: make "
            "room, choose another --out, or a smaller --image-size"
        )


def _read_note(path: Path, listing: str) -> dict[str, Any] | None:
    try:
        note: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    body = {name: value for name, value in note.items() if name != "seal"}
    return note if note.get("listing") == listing and note.get("seal") == sha256_json(body) else None


def _whole(path: Path, note: dict[str, Any], verify: Verify) -> bool:
    try:
        return _checksums(path, verify == "full").items() <= note["checksums"].items()
    except OSError:
        return False


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


def _write_shard(
    part: Sequence[Picture], listing: str, pixels_file: Path, note_file: Path, spec: PreprocessSpec,
    pool: ThreadPoolExecutor,
) -> dict[str, Any]:  # fmt: skip
    def decode(picture: Picture) -> Prepared | str:
        try:
            return preprocess(picture.read(), spec)
        except UnreadablePictureError as e:
            return str(e)

    pixels = np.empty((len(part), spec.size, spec.size, 3), np.uint8)
    note: dict[str, Any] = {"listing": listing, "keys": [], "aspects": [], "unreadable": []}
    for picture, result in zip(part, pool.map(decode, part), strict=True):
        if isinstance(result, str):
            note["unreadable"].append((picture.key, result))
        else:
            pixels[len(note["keys"])] = result.pixels
            note["keys"].append(picture.key)
            note["aspects"].append(result.width / result.height)
    pixels = pixels[: len(note["keys"])]
    note["hashes"] = [row.tobytes().hex() for row in difference_hash(pixels)]
    note_file.unlink(missing_ok=True)
    temporary = pixels_file.with_suffix(".tmp")
    with temporary.open("wb") as file:
        np.save(file, pixels)
    note["checksums"] = _checksums(temporary, full=True)
    publish(temporary, pixels_file)
    # Through JSON once, so that the seal is of what will be read. The note makes the shard valid.
    note = json.loads(json.dumps(note))
    note["seal"] = sha256_json(note)
    write_file(note_file, json.dumps(note))
    return note


def _groups(
    folder: Path, hashes: Hashes, pictures: list[Picture], threads: int, notices: list[str]
) -> npt.NDArray[np.int64]:
    """Near-duplicate groups of the pictures, from `groups.npz` where it was made from these hashes."""
    made_from = hashlib.sha256(hashes.tobytes()).hexdigest()
    path = folder / "groups.npz"
    try:
        with np.load(path) as stored:
            groups: npt.NDArray[np.int64] | None = stored["groups"] if str(stored["made_from"]) == made_from else None
    except (OSError, ValueError, KeyError, EOFError):
        groups = None
    if groups is None:
        groups = near_duplicates(hashes, threads=threads)
        temporary = folder / ".groups.tmp.npz"
        np.savez(temporary, groups=groups, made_from=np.array(made_from))
        publish(temporary, path)
    counts = np.bincount(groups, minlength=len(groups))
    alike = counts[groups] > max(32, LARGEST_GROUP * len(groups))
    if alike.any():
        notices.append(
            f"{int(alike.sum()):,} of {len(groups):,} pictures look alike to the perceptual hash (groups above "
            f"{LARGEST_GROUP:.0%} of the pictures): they are not marked as near-duplicates"
        )
        groups = np.where(alike, np.arange(len(groups)), groups)
        counts = np.bincount(groups, minlength=len(groups))
    marked = np.flatnonzero(counts[groups] > 1)
    lines = [(int(groups[i]), printable(pictures[i].key)) for i in marked.tolist()]
    write_file(folder / "near-duplicates.tsv", "".join(f"{group}\t{key}\n" for group, key in sorted(lines)))
    if len(marked):
        notices.append(
            f"{len(marked):,} of {len(groups):,} pictures have near-duplicates, in {int((counts > 1).sum()):,} groups "
            f"({folder / 'near-duplicates.tsv'})"
        )
    return groups
