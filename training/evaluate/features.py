"""Pictures → features, in shards that are kept: an interrupted or repeated evaluation continues from them.

    OUT/features/{extractor}-{shard}.npz     rows, which pictures could be read, and both digests in full

A shard is found by what it was made of (extractor, preprocessing, pictures), never by a name alone.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from export.bundle import Embeddings, RefusalError, make_folder, sha256_json, write_file
from export.preprocess import PictureFile, Pixels, PreprocessSpec, UnreadablePictureError, preprocess, whole_picture
from training.evaluate.pictures import PictureSet, digest

SHARD = 1024
FORMAT = "features/1"  # a change to any extractor's code is a new one


class Extractor(NamedTuple):
    """A function from pixels to unit rows, and what names it."""

    name: str
    """As it is printed."""
    digest: str
    """Changes whenever the function's result may."""
    spec: PreprocessSpec
    """How its pictures are prepared."""
    embed: Callable[[Pixels], Embeddings]
    """uint8 [M, S, S, 3] → float32 [M, D], unit rows."""
    whole: bool = False
    """Give it the whole picture [1, H, W, 3], aspect kept, longer side `spec.size`, one at a time."""


class Features(NamedTuple):
    """Features of the readable pictures of a set."""

    kept: npt.NDArray[np.int64]
    """Rows of the set that were readable, ascending."""
    rows: dict[str, Embeddings]
    """Extractor's name → [len(kept), D]."""


def extract(
    pictures: PictureSet,
    extractors: list[Extractor],
    cache: Path | None,
    unreadable: list[tuple[str, str]],
    batch: int = 64,
    advance: Callable[[int], None] = lambda count: None,
) -> Features:
    """Features of every readable picture by every extractor; each picture is decoded once per preprocessing.

    `cache`: folder of the shards, None to keep nothing. Raises `RefusalError` when no picture is readable, or when a
    feature is not finite.
    """
    kept: list[npt.NDArray[np.int64]] = []
    rows: dict[str, list[Embeddings]] = {e.name: [] for e in extractors}
    for low in range(0, len(pictures.pictures), SHARD):
        part = pictures.pictures[low : low + SHARD]
        found = [_load(cache, e, part) for e in extractors]
        missing = [e for e, stored in zip(extractors, found, strict=True) if stored is None]
        made = _make(part, missing, batch, unreadable) if missing else {}
        for e in missing:
            _store(cache, e, part, made[e.name])
        shards = [made[e.name] if stored is None else stored for e, stored in zip(extractors, found, strict=True)]
        # Readable for one preprocessing may be unreadable for another only in theory; what all can read counts.
        common = shards[0][0]
        for own, _ in shards[1:]:
            common = np.intersect1d(common, own)
        kept.append(common + low)
        for e, (own, values) in zip(extractors, shards, strict=True):
            rows[e.name].append(values[np.isin(own, common)])
        if not missing:
            unreadable += [(part[i].key, "unreadable when its features were made")
                           for i in np.setdiff1d(np.arange(len(part)), common)]  # fmt: skip
        advance(len(part))
    everything = np.concatenate(kept)
    if not len(everything):
        raise RefusalError(
            f"none of the {len(pictures.pictures)} pictures in {pictures.folder} can be read, for example "
            f"{unreadable[-1][0]}: {unreadable[-1][1]}"
        )
    return Features(everything, {name: np.concatenate([p for p in parts if len(p)]) for name, parts in rows.items()})


Shard = tuple[npt.NDArray[np.int64], Embeddings]


def _make(
    part: list[PictureFile], extractors: list[Extractor], batch: int, unreadable: list[tuple[str, str]]
) -> dict[str, Shard]:
    kinds = list(dict.fromkeys((e.spec, e.whole) for e in extractors))
    result: dict[str, Shard] = {}
    for spec, whole in kinds:
        mine = [e for e in extractors if (e.spec, e.whole) == (spec, whole)]
        readable: list[int] = []
        rows: dict[str, list[Embeddings]] = {e.name: [] for e in mine}
        for low in range(0, len(part), batch):
            pixels = []
            for i in range(low, min(low + batch, len(part))):
                try:
                    data = part[i].read()
                    image = np.array(whole_picture(data, spec.size)) if whole else preprocess(data, spec).pixels
                    pixels.append(image)
                    readable.append(i)
                except UnreadablePictureError as e:
                    if (spec, whole) == kinds[0]:
                        unreadable.append((part[i].key, str(e)))
            for extractor in mine if pixels else ():
                if whole:
                    values = np.concatenate([extractor.embed(image[None]) for image in pixels])
                else:
                    values = extractor.embed(np.stack(pixels))
                if not np.isfinite(values).all():
                    raise RefusalError(
                        f"{extractor.name} gives features that are not finite, for example on {part[low].key} or one of "
                        "the pictures after it: its weights are damaged, take another checkpoint"
                    )
                rows[extractor.name].append(values)
        for extractor in mine:
            parts = rows[extractor.name]
            values = np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)
            result[extractor.name] = np.asarray(readable, np.int64), values
    return result


def _identity(extractor: Extractor, part: list[PictureFile]) -> tuple[str, str]:
    made_by = sha256_json([FORMAT, extractor.digest, extractor.spec.sha256(), extractor.whole])
    return made_by, digest(part)


def _path(cache: Path, identity: tuple[str, str]) -> Path:
    return cache / f"{identity[0][:16]}-{identity[1][:16]}.npz"


def _load(cache: Path | None, extractor: Extractor, part: list[PictureFile]) -> Shard | None:
    """The stored shard, None where there is none, where it is damaged, or where it belongs to other inputs."""
    if cache is None:
        return None
    identity = _identity(extractor, part)
    path = _path(cache, identity)
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file, np.load(file) as stored:  # closed even where it is damaged
            if (str(stored["made_by"]), str(stored["pictures"])) != identity:
                return None
            return stored["kept"], stored["rows"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _store(cache: Path | None, extractor: Extractor, part: list[PictureFile], shard: Shard) -> None:
    if cache is None:
        return
    made_by, pictures = _identity(extractor, part)
    buffer = io.BytesIO()
    fields: dict[str, Any] = {"kept": shard[0], "rows": shard[1], "made_by": made_by, "pictures": pictures}
    np.savez(buffer, **fields)
    make_folder(cache)
    write_file(_path(cache, (made_by, pictures)), buffer.getvalue())
