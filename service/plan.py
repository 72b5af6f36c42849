"""`likewise index plan`: what a build will take of time, memory and disk, before it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlparse

import numpy as np
from pydantic import Field

from export.bundle import Bundle, RefusalError, list_pictures
from export.preprocess import UnreadablePictureError
from service.collection import Collection
from service.config import Constraints, Embedding
from service.encoder import BUILD_BATCH, Encoder
from service.index import bytes_of, candidates, lists_for, training_rows

# Beside vectors and index: keys, payloads and file states in SQLite and in Arrow files, measured on 160-byte rows.
RECORD_BYTES = 600
# Interpreter, libraries, blocks of vectors and the encoder at work, in bytes.
BASE = 500 * 2**20


class IndexPlan(Constraints):
    """Say what a build will take, before it: pictures of a folder, or a number of rows."""

    images: Path | None = None
    """Folder of pictures; some of them are embedded to measure the speed of this machine."""
    bundle: Path | None = None
    """The bundle that embeds them."""
    rows: int | None = Field(None, gt=0)
    """Instead of a folder: so many rows, with --dim."""
    dim: int | None = Field(None, gt=0)
    """Dimensions of their vectors."""
    collection: Path | None = None
    """Instead of a folder: an existing collection, to be embedded again with --bundle."""
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
        raise RefusalError("give one of --images, --collection, and --rows with --dim")
    found: dict[str, Any] = {}
    bundle = None if asked.bundle is None else Bundle.open(asked.bundle)
    if asked.rows is None and bundle is None:
        raise RefusalError("pictures are embedded by a bundle: pass --bundle")
    if asked.rows is not None:
        if asked.dim is None and bundle is None:
            raise RefusalError("the size of an index follows from its dimensions: pass --dim or --bundle")
        count = asked.rows
    elif asked.images is not None:
        unread: list[tuple[str, str]] = []
        pictures = list_pictures(asked.images, unread)
        count = len(pictures)
        found |= {"pictures": count, "picture_bytes": sum(p.size for p in pictures), "unreadable": len(unread)}
    else:
        assert asked.collection is not None
        count, missing = _sources(asked.collection)
        found |= {"items": count, "without_source": missing}
    dim = asked.dim or (bundle.dim if bundle is not None else 0)
    found["dimensions"] = dim
    if asked.images is not None:
        assert asked.bundle is not None
        speed = _measured(asked, _spread(pictures, asked.sample))
        found |= {
            "embedding_with": speed.where, "pictures_per_second": round(speed.pictures, 1),
            "embedding_seconds": round(count / speed.pictures), "unreadable_in_sample": speed.unreadable,
        }  # fmt: skip
    policy = asked.policy()
    factory = candidates(count, dim, policy, policy.max_memory)[0]
    index = bytes_of(factory, count, dim)
    stored = count * dim * (2 if policy.vectors == "float16" else 4)
    found |= {
        "index": factory, "index_bytes": index, "index_seconds": round(_index_seconds(factory, count, dim)),
        "disk_bytes": stored + index + count * RECORD_BYTES, "peak_memory_bytes": BASE + index,
    }  # fmt: skip
    if policy.max_memory is not None and index > policy.max_memory:
        found["warning"] = "no index that is known here is so small: allow more memory, or store fewer dimensions"
    return found


def _said(name: str, value: Any) -> str:
    if name.endswith("_bytes"):
        return f"{value / 2**20:,.1f} MiB"
    if name.endswith("_seconds"):
        return f"{value // 3600} h {value % 3600 // 60} min {value % 60} s"
    return f"{value:,}" if isinstance(value, int | float) else str(value)


def _spread(pictures: list[Any], count: int) -> list[Any]:
    """As many from everywhere in a list."""
    return [pictures[i] for i in sorted({int(i) for i in np.linspace(0, len(pictures) - 1, min(count, len(pictures)))})]


def _measured(asked: IndexPlan, pictures: list[Any]) -> _Speed:
    """Embed a sample as a build does."""
    encoder = Encoder(Bundle.open(asked.bundle or Path()), Embedding.model_validate({"bundle": asked.bundle}))
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


def _sources(folder: Path) -> tuple[int, int]:
    """Items of a collection, and how many of them have no file any more that could be embedded again."""
    collection = Collection(folder)
    try:
        missing = 0
        for rows, _ in collection.scan():
            for uri in rows["source_uri"].to_pylist():
                parsed = urlparse(uri)
                missing += not (parsed.scheme == "file" and Path(unquote(parsed.path)).is_file())
        return len(collection), missing
    finally:
        collection.close()


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
