"""Pictures decoded once and kept shrunk: checksummed shards of uint8 pixels that a killed build finds again.

cache/
    96px-1f3b09ac/           size, and the digest of what was listed: other pictures or another size never overwrite it
        pixels-00000.npy     uint8 [n, S, S, 3], whole pictures squeezed to squares
        pixels-00000.json    what they came from, aspect ratios, perceptual hashes, checksums; makes the shard valid
        groups.npz           near-duplicate groups, for the hashes they were made from
        near-duplicates.tsv  the same for people: group and key, a line per picture that has a near-duplicate
"""

from __future__ import annotations

import hashlib
import shutil
import zipfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from export.bundle import DataFingerprint, RefusalError, make_folder, printable, publish, sha256_json, write_file
from export.preprocess import Pixels, PreprocessSpec
from export.sources.picture import Picture
from training.device import send
from training.duplicates import Hashes, near_duplicates
from training.shards import Verify, is_whole, plan_shards, read_again, read_note, write_shard

SHARD_BYTES = 2**28
SHARD_PICTURES = 2048
FULL_CHECK_BYTES = 2 * 2**30
LARGEST_GROUP = 0.1  # share of the pictures; a larger group says that the hash cannot tell them apart


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
            return self._resident[send(indices, self._resident.device)].to(device)
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
    verify: Verify = "auto", retry: bool = True,
) -> PictureCache:  # fmt: skip
    """Decode `items` into shards, `size` pixels wide and high; shards that are there and whole are kept.

    They lie in a folder of their own below `folder`, named by the size and by a digest of `items`; `notices` says when
    others lie beside it. `name` says where the pictures came from, for the fingerprint. `progress` gets the number of
    pictures finished by each shard. `verify` chooses how kept shards are compared with their checksums: every byte, or
    samples (auto: every byte up to 2 GiB); a shard that fails is decoded again, and `notices` says so. `retry` reads
    again what could not be read before (`EIO`, `EACCES`, connections); without it the pictures of a cache stay the same.

    Raises `RefusalError` when the disk has no room, or a tenth of a shard's pictures cannot be read.
    """
    spec = PreprocessSpec(size=size, fit="squeeze")
    each = 3 * size * size
    shards = plan_shards(items, spec, max(64, min(SHARD_PICTURES, SHARD_BYTES // each)))
    own = folder / f"{size}px-{sha256_json([shard.listing for shard in shards])[:8]}"
    make_folder(own)
    shards = [shard.in_folder(own) for shard in shards]
    if verify == "auto":
        verify = "full" if len(items) * each <= FULL_CHECK_BYTES else "sampled"
    pixels: list[Pixels] = []
    readable: list[Picture] = []
    unreadable: list[tuple[str, str]] = []
    aspects: list[float] = []
    hashes: list[str] = []
    plain = 0
    notices: list[str] = []
    notes = [read_note(shard) for shard in shards]
    absent = sum(len(shard.pictures) for shard, note in zip(shards, notes, strict=True) if note is None)
    with ThreadPoolExecutor(threads) as pool:
        for shard, note in zip(shards, notes, strict=True):
            if note is not None and not is_whole(shard, note, verify):
                notices.append(f"{shard.pixels.name} does not match its checksum: its pictures were decoded again")
                note = None
                absent += len(shard.pictures)
            if note is None:
                _require_room(own, absent * each)
                note = write_shard(shard, pool)
                absent -= len(shard.pictures)
            elif note["unread"] and retry:
                note = read_again(shard, note, pool)
            if note["keys"]:
                pixels.append(np.load(shard.pixels, mmap_mode="r"))
            unreadable += [(key, reason) for key, reason in note["unreadable"] + note["unread"]]
            aspects += note["aspects"]
            hashes += note["hashes"]
            plain += note["plain"]
            good = set(note["keys"])
            readable += [p for p in shard.pictures if p.key in good]
            progress(len(shard.pictures))
    digest = sha256_json([(p.key, p.size) for p in readable])
    # A folder's name may hold bytes that are not UTF-8; what is stored must be text.
    text = name.encode("utf-8", "replace").decode()
    data = DataFingerprint(folder=text, pictures=len(readable), unreadable=len(unreadable), sha256=digest)
    packed = np.frombuffer(bytes.fromhex("".join(hashes)), np.uint64).reshape(-1, 4)
    groups = _groups(own, packed, readable, threads, notices)
    if plain:
        notices.append(
            f"{plain:,} of {len(readable):,} pictures have too little structure for the perceptual hash: among them, only "
            "those with equal pixels are marked as near-duplicates"
        )
    count, held = _others(own)
    if count:
        notices.append(
            f"{folder} also holds {held / 1e9:.1f} GB of {count} other cache(s), made of other pictures or at another "
            f"size: delete what no run needs (this one is {own.name})"
        )
    return PictureCache(
        pixels,
        readable,
        torch.tensor(aspects, dtype=torch.float32),
        torch.from_numpy(groups),
        unreadable,
        data,
        notices,
    )


def _require_room(own: Path, needed: int) -> None:
    free = shutil.disk_usage(own).free
    if needed > free:
        count, held = _others(own)
        older = f" (other caches beside it hold {held / 1e9:.1f} GB)" if count else ""
        raise RefusalError(
            f"the picture cache needs {needed / 1e9:.1f} GB more in {own}, where {free / 1e9:.1f} GB are free{older}: "
            "make room, choose another --out, or a smaller --image-size"
        )


def _others(own: Path) -> tuple[int, int]:
    """How many other caches lie beside this one, and their bytes."""
    others = [path for path in own.parent.glob("*px-*") if path != own and path.is_dir()]
    sizes = [sum(file.stat().st_size for file in path.iterdir()) for path in others]
    return len([size for size in sizes if size]), sum(sizes)


def _groups(
    folder: Path, hashes: Hashes, pictures: list[Picture], threads: int, notices: list[str]
) -> npt.NDArray[np.int64]:
    """Near-duplicate groups of the pictures, from `groups.npz` where it was made from these hashes.

    What is there is not written again: several processes open a finished cache at the same time.
    """
    made_from = hashlib.sha256(hashes.tobytes()).hexdigest()
    path, listed = folder / "groups.npz", folder / "near-duplicates.tsv"
    groups = _stored_groups(path, made_from)
    fresh = groups is None
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
    if fresh or not listed.is_file():
        lines = sorted((int(groups[i]), printable(pictures[i].key)) for i in marked.tolist())
        write_file(listed, "".join(f"{group}\t{key}\n" for group, key in lines))
    if len(marked):
        notices.append(
            f"{len(marked):,} of {len(groups):,} pictures have near-duplicates, in {int((counts > 1).sum()):,} groups "
            f"({listed})"
        )
    return groups


def _stored_groups(path: Path, made_from: str) -> npt.NDArray[np.int64] | None:
    try:
        with path.open("rb") as file, np.load(file) as stored:  # np.load alone leaves a damaged file open
            groups: npt.NDArray[np.int64] = stored["groups"]
            return groups if str(stored["made_from"]) == made_from else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None  # absent or damaged: made again
