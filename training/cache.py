"""Pictures decoded once and kept shrunk: shards of uint8 pixels that a killed run finds again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from export.bundle import DataFingerprint, make_folder, publish, sha256_json, write_file
from export.preprocess import PictureFile, Pixels, PreprocessSpec, UnreadablePictureError, preprocess

SHARD = 2048


class PictureCache:
    """The readable pictures of a folder as uint8 [N, S, S, 3].

    Attributes: `pictures` (in the order of the pixels), `unreadable` (key, reason), `fingerprint`.
    """

    def __init__(
        self,
        shards: list[Pixels],
        pictures: list[PictureFile],
        unreadable: list[tuple[str, str]],
        fingerprint: DataFingerprint,
    ) -> None:
        self._shards = shards
        self.pictures = pictures
        self.unreadable = unreadable
        self.fingerprint = fingerprint
        self._resident: Tensor | None = None
        self._starts = np.cumsum([0, *(len(shard) for shard in shards)])

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def bytes(self) -> int:
        """Size of the pixels."""
        return sum(shard.nbytes for shard in self._shards)

    def load(self, device: torch.device) -> None:
        """Hold all pixels in the memory of `device`."""
        self._resident = torch.from_numpy(np.concatenate(self._shards)).to(device)

    def gather(self, indices: Tensor, device: torch.device) -> Tensor:
        """uint8 [B, S, S, 3] on `device`."""
        if self._resident is not None:
            return self._resident[indices.to(self._resident.device)].to(device)
        which = np.searchsorted(self._starts, indices.numpy(), side="right") - 1
        rows = [self._shards[s][i - self._starts[s]] for s, i in zip(which, indices.tolist(), strict=True)]
        return torch.from_numpy(np.stack(rows)).to(device, non_blocking=True)


def build_cache(
    folder: Path, pictures: list[PictureFile], root: Path, spec: PreprocessSpec, threads: int,
    progress: Callable[[int], None],
) -> PictureCache:  # fmt: skip
    """Decode `pictures` into shards below `folder`; shards that are there and still fit are kept.

    `progress` is called with the number of pictures finished by each shard.
    """
    make_folder(folder)
    shards: list[Pixels] = []
    readable: list[PictureFile] = []
    unreadable: list[tuple[str, str]] = []
    with ThreadPoolExecutor(threads) as pool:
        for number, low in enumerate(range(0, len(pictures), SHARD)):
            part = pictures[low : low + SHARD]
            listing = sha256_json([spec.sha256(), [(p.key, p.size, p.mtime_ns) for p in part]])
            pixels_file, note_file = folder / f"pixels-{number:05d}.npy", folder / f"pixels-{number:05d}.json"
            note = _read_note(note_file, listing)
            if note is None or not pixels_file.is_file():
                note = _write_shard(part, listing, pixels_file, note_file, spec, pool)
            if note["keys"]:
                shards.append(np.load(pixels_file, mmap_mode="r"))
            unreadable += [(key, reason) for key, reason in note["unreadable"]]
            good = set(note["keys"])
            readable += [p for p in part if p.key in good]
            progress(len(part))
    digest = sha256_json([(p.key, p.size) for p in readable])
    # A folder's name may hold bytes that are not UTF-8; what is stored must be text.
    name = os.fsencode(root.resolve()).decode("utf-8", "replace")
    data = DataFingerprint(folder=name, pictures=len(readable), unreadable=len(unreadable), sha256=digest)
    return PictureCache(shards, readable, unreadable, data)


def _read_note(path: Path, listing: str) -> dict[str, list] | None:  # type: ignore[type-arg]
    try:
        note = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return note if note.get("listing") == listing else None


def _write_shard(
    part: list[PictureFile], listing: str, pixels_file: Path, note_file: Path, spec: PreprocessSpec,
    pool: ThreadPoolExecutor,
) -> dict[str, list]:  # type: ignore[type-arg]  # fmt: skip
    def decode(picture: PictureFile) -> Pixels | str:
        try:
            return preprocess(picture.read(), spec).pixels
        except UnreadablePictureError as e:
            return str(e)

    rows: list[Pixels] = []
    note: dict[str, list] = {"keys": [], "unreadable": []}  # type: ignore[type-arg]
    for picture, result in zip(part, pool.map(decode, part), strict=True):
        if isinstance(result, str):
            note["unreadable"].append((picture.key, result))
        else:
            rows.append(result)
            note["keys"].append(picture.key)
    temporary = pixels_file.with_suffix(".tmp")
    with temporary.open("wb") as file:
        np.save(file, np.stack(rows) if rows else np.zeros((0, spec.size, spec.size, 3), np.uint8))
    publish(temporary, pixels_file)
    write_file(note_file, json.dumps({"listing": listing, **note}))  # the note makes the shard valid
    return note
