"""Whether edited pictures find their own item in a collection."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from export.bundle import Contract, RefusalError
from export.edits import EDITS, editing_side, prepared
from export.preprocess import Pixels, UnreadablePictureError, whole_picture
from service.collection import Collection
from service.encoder import BUILD_BATCH, Encoder
from service.index import Rows
from service.live import Live
from service.quality import NEIGHBOURS, Estimate, Task
from service.sheet import picture_of


class Edited(Contract):
    """One edit."""

    edit: str
    """Its name."""
    recall_at_1: Estimate
    """Share of the edited pictures whose own item comes first."""
    recall_at_10: Estimate
    """… is among the first ten."""


class SelfRetrieval(Contract):
    """Whether edited pictures find their own item through the index."""

    made_by: str
    """Variant and provider."""
    pictures: int
    """That were edited."""
    unreadable: int
    """Of those drawn, moved or damaged since they were indexed, or without a file: left out."""
    edits: tuple[Edited, ...]
    """`unchanged` first: the file as it is."""


def self_retrieval(
    collection: Collection, live: Live, chosen: Rows, encoder: Encoder, seed: int, images: Path | None, task: Task
) -> SelfRetrieval:
    """Of the pictures of `chosen` rows, below `images` or where they were indexed, each edited in every way; the edits
    are drawn from the seed. Raises `RefusalError` where no picture can be read."""
    spec = encoder.bundle.manifest.preprocess
    side = editing_side(spec.size)
    hits: dict[str, list[tuple[bool, bool]]] = {name: [] for name in ("unchanged", *EDITS)}
    waiting: list[tuple[str, str, Pixels]] = []
    pictures = 0

    def search() -> None:
        vectors = encoder.embed(np.stack([pixels for _, _, pixels in waiting]))
        answers = collection.search(vectors, NEIGHBOURS)
        for (name, key, _), answer in zip(waiting, answers, strict=True):
            keys = [hit.row.key for hit in answer]
            hits[name].append((keys[:1] == [key], key in keys))
        waiting.clear()

    advance = task("searching edited pictures", len(chosen))
    for number in chosen.tolist():
        advance(1)
        row = live.row(number)
        data = picture_of(row.source_uri, row.key, images)
        if data is None:
            continue
        try:
            pixels, whole = encoder.decode(data).pixels, whole_picture(data, side)
        except UnreadablePictureError:
            continue
        pictures += 1
        for name in hits:
            if name in EDITS:
                digest = hashlib.sha256(f"index evaluate/{seed}/{name}/{row.key}".encode()).digest()
                rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
                pixels = prepared(EDITS[name](whole, rng), spec)
            waiting.append((name, row.key, pixels))
            if len(waiting) == BUILD_BATCH:
                search()
    if waiting:
        search()
    if not pictures:
        raise RefusalError(
            f"none of {len(chosen):,} sampled items has a picture that can be read on this machine: say where they lie with "
            "--images FOLDER, or leave --bundle out"
        )
    return SelfRetrieval(
        made_by=encoder.origin, pictures=pictures, unreadable=len(chosen) - pictures,
        edits=tuple(
            Edited(
                edit=name, recall_at_1=Estimate.of([first for first, _ in found]),
                recall_at_10=Estimate.of([there for _, there in found]),
            )
            for name, found in hits.items()
        ),
    )  # fmt: skip
