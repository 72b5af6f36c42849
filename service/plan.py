"""`likewise index plan`: what a build will take of time, memory and disk, before it."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import Field

from export.bundle import Bundle, RefusalError, list_pictures
from export.preprocess import UnreadablePictureError
from export.shipped import DEFAULT, BundleFolder
from export.sources.picture import Picture
from service.collection import LARGEST
from service.config import Constraints, Embedding
from service.encoder import BUILD_BATCH, Encoder
from service.follower import Follower
from service.index import bytes_of, candidates, gpu_free, lists_for, training_rows
from service.reembed import survey

# Beside vectors and index: keys, payloads and file states in SQLite and in Arrow files, measured on 160-byte rows.
RECORD_BYTES = 600
# In memory while a folder is listed and compared; and of each row while its segment is written. Measured (300,000 pictures;
# 200,000 rows of 120 bytes).
LISTED_BYTES = 600
ROW_BYTES = 500
# Interpreter, libraries, blocks of vectors and the encoder at work, in bytes.
BASE = 500 * 2**20


class IndexPlan(Constraints):
    """Say what a build will take, before it: pictures of a folder, or a number of rows."""

    images: Path | None = None
    """Folder of pictures; some of them are embedded to measure the speed of this machine."""
    bundle: BundleFolder = Field(Path(DEFAULT), validate_default=True)
    """The bundle that embeds them; the default one of likewise where absent."""
    rows: int | None = Field(None, gt=0)
    """Instead of a folder: so many rows, of --dim or of the bundle's dimensions."""
    dim: int | None = Field(None, gt=0)
    """Dimensions of their vectors."""
    collection: Path | None = None
    """Instead of a folder: a collection, in use or not, to be embedded again with --bundle."""
    sample: int = Field(64, ge=8, le=4096)
    """Pictures that are embedded to measure."""
    json_: bool = Field(False, alias="json")
    """Print it as JSON."""

    def cli_cmd(self) -> int:
        """Run the command."""
        found = plan(self)
        if self.json_:
            print(json.dumps(found, indent=2))
        else:
            print("\n".join(f"{name:<26}{_said(name, value)}" for name, value in found.items()))
        return 0


class _Speed(NamedTuple):
    """Of this machine on a sample."""

    pictures: float
    """Embedded per second, decoding included."""
    where: str
    """Variant and provider."""
    unreadable: int
    """Of the sample."""


def plan(asked: IndexPlan) -> dict[str, Any]:
    """Figures by name: counts, seconds, bytes. Raises `RefusalError`."""
    if sum(given is not None for given in (asked.images, asked.rows, asked.collection)) != 1:
        raise RefusalError("give one of --images, --collection and --rows")
    found: dict[str, Any] = {}
    some: list[Picture] = []
    bundle = Bundle.open(asked.bundle)
    if asked.rows is not None:
        count = asked.rows
    elif asked.images is not None:
        unread: list[tuple[str, str]] = []
        pictures = list_pictures(asked.images, unread)
        count, some = len(pictures), _spread(pictures, asked.sample)
        found |= {"pictures": count, "picture_bytes": sum(p.size for p in pictures), "unreadable": len(unread)}
    else:
        assert asked.collection is not None
        some, there, without = _sources(asked.collection, asked.sample)
        count = sum(there.values())
        found |= {"items": count + sum(without.values()), "embeddable": count}
        found |= {f"from_{where}": there[where] for where in ("files", "remote", "originals") if there[where]}
        found |= {f"without_{reason}": number for reason, number in without.items()}
    dim = asked.dim or bundle.dim
    found["dimensions"] = dim
    if some:
        speed = _measured(bundle, some)
        found |= {
            "embedding_with": speed.where, "pictures_per_second": round(speed.pictures, 1),
            "embedding_seconds": round(count / speed.pictures), "unreadable_in_sample": speed.unreadable,
        }  # fmt: skip
    policy = asked.policy()
    factory = candidates(count, dim, policy, policy.max_memory, gpu_free())[0]
    index = bytes_of(factory, count, dim)
    stored = count * dim * (2 if policy.vectors == "float16" else 4)
    found |= {
        "index": factory, "index_bytes": index, "index_seconds": round(_index_seconds(factory, count, dim)),
        "disk_bytes": stored + index + count * RECORD_BYTES,
        "peak_memory_bytes": _peak_memory(factory, count, dim, asked.images is not None),
    }  # fmt: skip
    if policy.max_memory is not None and index > policy.max_memory:
        found["warning"] = "no index that is known here is so small: allow more memory, or store fewer dimensions"
    return found


def _peak_memory(factory: str, count: int, dim: int, listed: bool) -> int:
    """Vectors and finished indexes are mapped from the disk; in memory are the rows and the index of the segment that is
    being written, which has at most `LARGEST` rows, and the list of the pictures."""
    rows = min(count, LARGEST)
    return BASE + bytes_of(factory, rows, dim) + rows * ROW_BYTES + (count * LISTED_BYTES if listed else 0)


def _said(name: str, value: Any) -> str:
    if name.endswith("_bytes"):
        return f"{value / 2**20:,.1f} MiB"
    if name.endswith("_seconds"):
        return f"{value // 3600} h {value % 3600 // 60} min {value % 60} s"
    return f"{value:,}" if isinstance(value, int | float) else str(value)


def _spread(pictures: Sequence[Picture], count: int) -> list[Picture]:
    """As many from everywhere in a list."""
    return [pictures[i] for i in sorted({int(i) for i in np.linspace(0, len(pictures) - 1, min(count, len(pictures)))})]


def _measured(bundle: Bundle, pictures: list[Picture]) -> _Speed:
    """Embed a sample as a build does."""
    encoder = Encoder(bundle, Embedding(bundle=bundle.folder))
    try:
        size = encoder.bundle.manifest.encoder.image_size
        encoder.embed(np.zeros((2, size, size, 3), np.uint8))
        start = time.perf_counter()
        read = [encoder.decoders.submit(encoder.read, picture) for picture in pictures]
        decoded = [r for r in (future.result() for future in read) if not isinstance(r, UnreadablePictureError)]
        for low in range(0, len(decoded), BUILD_BATCH):
            encoder.embed(np.stack([d.pixels for d in decoded[low : low + BUILD_BATCH]]))
        seconds = time.perf_counter() - start
        return _Speed(len(pictures) / seconds, encoder.origin, len(pictures) - len(decoded))
    finally:
        encoder.close()


def _sources(folder: Path, sample: int) -> tuple[list[Picture], Counter[str], dict[str, int]]:
    """Of a collection, that may be in use: some of the pictures that could be embedded again, how many there are by where
    they lie, and how many items have none, by reason."""
    some: list[Picture] = []
    rng, met = random.Random(0), 0

    def meet(picture: Picture) -> None:
        """Each of the pictures met is among those kept with the same chance (reservoir sampling, Vitter 1985)."""
        nonlocal met
        met += 1
        if len(some) < sample:
            some.append(picture)
        elif (at := rng.randrange(met)) < sample:
            some[at] = picture

    with closing(Follower(folder, every=None)) as old:
        found = survey(old, meet=meet)
    return some, found.there, dict(sorted(found.without.items()))


def _index_seconds(factory: str, count: int, dim: int) -> float:
    """Training and adding are products of matrices: as many operations as this machine does in a second, measured."""
    if not factory.startswith("IVF"):
        return count * dim * 4 / 1e9
    block, lists = np.ones((2048, dim), np.float32), lists_for(count)
    columns = np.ones((dim, 1024), np.float32)
    block @ columns
    start = time.perf_counter()
    for _ in range(8):
        block @ columns
    rate = 8 * 2 * 2048 * 1024 * dim / (time.perf_counter() - start)
    training = 10 * 2 * training_rows(lists, count) * lists * dim
    return (training + 2 * count * lists * dim + 2 * min(count, 512) * count * dim) / rate + count * dim * 16 / 1e9
