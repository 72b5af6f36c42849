"""A score without labels: does an edited picture find its original among all pictures?

The edits are those of export/edits.py, which training never makes. The answer is 1 for a picture that is found first;
the score is the mean over pictures and edits. It ranks encoders on the user's own pictures; it says nothing about
meaning, which only labels know.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from export.bundle import Embeddings, RefusalError
from export.edits import EDITS, Edit, editing_side, prepared
from export.preprocess import Pixels, PreprocessSpec, UnreadablePictureError, preprocess, whole_picture
from training.evaluate.metrics import Interval, bootstrap
from training.evaluate.ranking import top_k
from training.evaluate.retrieval import unit_rows

Embed = Callable[[Pixels], Embeddings]
Picture = bytes | Image.Image

QUERIES = 500
BATCH = 64


class LabelFree(NamedTuple):
    """Self-retrieval of edited pictures by one encoder."""

    recall_at_1: Interval
    """Share of the edited pictures that find their original first; the error is over pictures, by bootstrap."""
    mean_reciprocal_rank: Interval
    """Mean of 1 / rank of the original, rank from 1."""
    by_edit: dict[str, tuple[float, float]]
    """Edit → (recall at 1, mean reciprocal rank)."""
    ranks: npt.NDArray[np.int64]
    """[edits, M] rank of the original, from 0."""
    pictures: npt.NDArray[np.int64]
    """[M] rows of the pictures that were edited, ascending."""
    gallery: int
    """How many pictures were searched."""
    queries_sha256: str
    """Names pictures, their size when edited, edits and seed: two results may be compared when theirs are equal."""
    seed: int
    """Of the edits and the bootstrap."""
    unreadable: int
    """Pictures that could not be read: neither searched nor edited."""


class Comparison(NamedTuple):
    """b minus a on the same queries; the intervals are over pictures, by paired bootstrap."""

    recall_at_1: Interval
    """Difference of recall at 1."""
    mean_reciprocal_rank: Interval
    """Difference of the mean reciprocal rank."""

    @property
    def verdict(self) -> str:
        """better, worse or no difference: whether the 95 % interval of the reciprocal rank's difference excludes 0."""
        if self.mean_reciprocal_rank.low > 0:
            return "better"
        return "worse" if self.mean_reciprocal_rank.high < 0 else "no difference"


def label_free(
    embed: Embed,
    pictures: Sequence[Picture],
    spec: PreprocessSpec,
    seed: int,
    queries: int = QUERIES,
    edits: Mapping[str, Edit] = EDITS,
    gallery: Embeddings | None = None,
    side: int | None = None,
) -> LabelFree:
    """Score one encoder. `embed` takes pixels prepared by `spec`, uint8 [M, S, S, 3], and gives float32 [M, D].

    `pictures` (encoded bytes, or RGB images) are all searched, those that cannot be read left out and counted; up to
    `queries` of them, drawn from the seed, are edited with every edit, their longer side `side` px (`editing_side` of the
    encoder's size where absent). `gallery` [N, D]: features of the unedited pictures where they exist already. The same
    pictures, side, seed and edits give the same queries, whatever the encoder: to compare encoders of several input
    sizes, give one `side`. Raises `RefusalError` for fewer than two readable pictures.
    """
    galleries = None if gallery is None else {"": gallery}
    return label_free_all({"": embed}, pictures, spec, seed, queries, edits, galleries, side=side)[""]


def label_free_all(
    embeds: Mapping[str, Embed],
    pictures: Sequence[Picture],
    spec: PreprocessSpec,
    seed: int,
    queries: int = QUERIES,
    edits: Mapping[str, Edit] = EDITS,
    galleries: Mapping[str, Embeddings] | None = None,
    advance: Callable[[int], None] = lambda count: None,
    side: int | None = None,
) -> dict[str, LabelFree]:
    """`label_free` of several encoders that share a preprocessing; each picture is edited once for all of them."""
    readable = np.arange(len(pictures))  # what gave `galleries` could be read then
    if galleries is None:
        readable, galleries = _galleries(embeds, pictures, spec)
    if len(readable) < 2:
        raise RefusalError(f"{len(readable)} readable pictures, at least 2 are needed to search among: add pictures")
    rng = np.random.default_rng(_seed(seed, "pictures", 0))
    chosen = np.sort(rng.choice(len(readable), min(queries, len(readable)), replace=False))
    side = editing_side(spec.size) if side is None else side
    identity = hashlib.sha256(f"{seed}/{len(readable)}/{side}/{','.join(edits)}".encode())
    edited_rows: list[int] = []
    ranks: dict[str, list[npt.NDArray[np.int64]]] = {name: [np.empty((len(edits), 0), np.int64)] for name in embeds}
    for low in range(0, len(chosen), BATCH):
        part = chosen[low : low + BATCH]
        places, originals = [], []
        for place in part:
            row = int(readable[place])
            try:
                data = _encoded(pictures[row])
                originals.append(whole_picture(data, side))
            except UnreadablePictureError:  # gone since its feature was made
                continue
            identity.update(f"{row}/{hashlib.sha256(data).hexdigest()}".encode())
            places.append(place)
        advance(len(part))
        if not places:
            continue
        rows = readable[places]
        edited_rows += rows.tolist()
        found = {name: np.empty((len(edits), len(places)), np.int64) for name in embeds}
        for number, (edit_name, edit) in enumerate(edits.items()):
            edited = []
            for row, original in zip(rows, originals, strict=True):
                changed = edit(original, np.random.default_rng(_seed(seed, edit_name, int(row))))
                edited.append(prepared(changed, spec))
            pixels = np.stack(edited)
            for name, embed in embeds.items():
                found[name][number] = _ranks(unit_rows(embed(pixels)), galleries[name], np.asarray(places))
        for name in embeds:
            ranks[name].append(found[name])
    if not edited_rows:
        raise RefusalError(f"none of the {len(chosen)} pictures to edit can be read any more: run it again")
    unreadable = len(pictures) - len(readable) + len(chosen) - len(edited_rows)
    digest, queried = identity.hexdigest(), np.asarray(edited_rows)
    return {
        name: _summary(np.concatenate(parts, 1), list(edits), queried, len(readable), digest, seed, unreadable)
        for name, parts in ranks.items()
    }


def compare(a: LabelFree, b: LabelFree) -> Comparison:
    """How much better b is than a, paired by picture. Raises `ValueError` unless both answered the same queries."""
    if a.queries_sha256 != b.queries_sha256:
        raise ValueError(
            "the two scores were measured on different pictures, sizes, edits or seeds: measure both alike"
        )
    hits = (b.ranks == 0).mean(0) - (a.ranks == 0).mean(0)  # per picture, over its edits
    reciprocal = (1 / (b.ranks + 1)).mean(0) - (1 / (a.ranks + 1)).mean(0)
    return Comparison(bootstrap(hits, a.seed), bootstrap(reciprocal, a.seed))


def neighbor_agreement(a: Embeddings, b: Embeddings, k: int = 10) -> float:
    """Share of each picture's k nearest others that two encoders have in common, averaged: unit rows [N, D], [N, E].

    1 is the same neighbours; independent encoders agree by k / (N − 1).
    """
    own = np.arange(len(a))
    first, second = top_k(a, a, k, own).rows, top_k(b, b, k, own).rows
    common = (first[:, :, None] == second[:, None, :]).any(2).sum(1)
    return float((common / first.shape[1]).mean())


def _ranks(queries: Embeddings, gallery: Embeddings, own: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """How many gallery rows are at least as near as the original: a tie counts against the encoder, or a collapsed one
    would look perfect. Cosines within 1e-6 are ties."""
    cosines = queries.astype(np.float64) @ gallery.astype(np.float64).T
    mine = cosines[np.arange(len(own)), own]
    found: npt.NDArray[np.int64] = (cosines >= mine[:, None] - 1e-6).sum(1) - 1
    return found


def _galleries(
    embeds: Mapping[str, Embed], pictures: Sequence[Picture], spec: PreprocessSpec
) -> tuple[npt.NDArray[np.int64], dict[str, Embeddings]]:
    """Which pictures can be read, ascending, and their unit rows by each encoder."""
    readable: list[int] = []
    rows: dict[str, list[Embeddings]] = {name: [] for name in embeds}
    for low in range(0, len(pictures), BATCH):
        pixels = []
        for i in range(low, min(low + BATCH, len(pictures))):
            try:
                pixels.append(preprocess(_encoded(pictures[i]), spec).pixels)
            except UnreadablePictureError:  # the caller is told how many
                continue
            readable.append(i)
        if pixels:
            for name, embed in embeds.items():
                rows[name].append(embed(np.stack(pixels)))
    made = {name: unit_rows(np.concatenate(parts)) for name, parts in rows.items() if parts}
    return np.asarray(readable, np.int64), made


def _summary(
    ranks: npt.NDArray[np.int64], edits: list[str], chosen: npt.NDArray[np.int64], gallery: int, digest: str, seed: int,
    unreadable: int,
) -> LabelFree:  # fmt: skip
    hits, reciprocal = (ranks == 0).astype(np.float64), 1 / (ranks + 1)
    by_edit = {name: (float(hits[e].mean()), float(reciprocal[e].mean())) for e, name in enumerate(edits)}
    overall = bootstrap(hits.mean(0), seed), bootstrap(reciprocal.mean(0), seed)
    return LabelFree(*overall, by_edit, ranks, chosen, gallery, digest, seed, unreadable)


def _encoded(picture: Picture) -> bytes:
    """A file's bytes; images are written without loss."""
    if isinstance(picture, bytes):
        return picture
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "BMP")
    return buffer.getvalue()


def _seed(seed: int, purpose: str, number: int) -> int:
    digest = hashlib.sha256(f"label-free/{seed}/{purpose}/{number}".encode()).digest()
    return int.from_bytes(digest[:8], "big")
