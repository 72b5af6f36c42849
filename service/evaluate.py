"""`likewise index evaluate`: what a collection is worth on the user's own data.

Without labels: recall of the index against exact search, hubs, duplicates; with a bundle, whether edited pictures find
their own item; with another collection, how many neighbours the two share. With labels in the payload: mAP and Recall@k.

Vectors are read in blocks, so memory grows with the sample; beside it a row of the collection costs a few bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from pydantic import BaseModel, ConfigDict, Field
from pydantic_settings import CliPositionalArg
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from export.bundle import Bundle, Contract, Embeddings, RefusalError, printable, write_file
from export.machine import cpu_model, cpu_quota
from export.preprocess import DecodeLimits, Pixels, PreprocessSpec, UnreadablePictureError, preprocess
from service.collection import Collection
from service.config import Embedding
from service.encoder import BUILD_BATCH, Encoder
from service.errors import InvalidArgumentError, NotFoundError
from service.filter import Filter, Restriction
from service.index import IndexInfo, Rows
from service.segment import StoredRow, unit
from service.sheet import picture_of
from service.view import View

LEAST = 20  # items: below, every item is nearly every item's neighbour
RECALL_AT = (1, 10, 100)
LABEL_RECALL_AT = (1, 5, 10)
NEIGHBOURS = 10
# Scores of the same two vectors differ by less between two orders of summation; float32, as what it is taken from.
TIE = np.float32(1e-6)
SHEETS, SHEET_WIDTH, HUBS = 12, 8, 8
_BLOCK = 16_384  # rows read at a time
_CHUNK = 256  # queries compared with them at a time
_RELEVANT = 2**23  # scores of relevant items held at a time
_PAIRS = 20_000
_REACH = 4096  # neighbours looked through for such as both collections hold

Advance = Callable[[float], None]


class IndexEvaluate(BaseModel):
    """Measure a collection on its own items: recall of its index against exact search, latency, hubs, duplicates; with
    --label mAP and Recall@k, with --bundle whether edited pictures find their item, with --against shared neighbours."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    collection: CliPositionalArg[Path]
    """The collection folder."""
    label: str = ""
    """A payload field, such as folder: relevant are the other items with the same value."""
    query_filter: str = ""
    """With --label: only items for which it holds are queries, such as 'split = test' (see docs/collections.md)."""
    gallery_filter: str = ""
    """With --label: only items for which it holds are ranked."""
    bundle: Path | None = None
    """The bundle that the collection was built with: edited pictures are searched with it."""
    against: Path | None = None
    """Another collection with the same keys, such as one of an older encoder."""
    sample: int = Field(1000, ge=LEAST, le=100_000)
    """Items that are queries, drawn at random; all of them where there are no more."""
    pictures: int = Field(200, ge=1, le=100_000)
    """With --bundle: how many of these are edited, each in every way."""
    duplicates: tuple[float, ...] = (0.95, 0.98)
    """An item whose nearest other scores at least so much counts as a duplicate."""
    seed: int = Field(0, ge=0)
    """Of the sample and the edits."""
    images: Path | None = None
    """Where the pictures lie on this machine, if not where they were indexed."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """With --bundle: where to embed."""
    variant: Literal["auto", "fp32", "fp16", "int8"] = "auto"
    """With --bundle: which of its graphs."""
    threads: int | None = Field(None, ge=1)
    """With --bundle: CPU threads; the process's quota where absent."""
    out: Path | None = None
    """Write a report with sheets of neighbours here (.html, one file)."""
    json_: Path | None = Field(None, alias="json")
    """Write every figure here."""

    def cli_cmd(self) -> int:
        """Run the command."""
        from service.report import table_of, write_report

        for path in (self.out, self.json_):
            if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
                raise RefusalError(f"{path} cannot be written: give a file in a folder that exists")
        console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
        found = evaluate(self, console)
        Console(highlight=False, markup=False, emoji=False).print(table_of(found.evaluation))
        if self.json_ is not None:
            write_file(self.json_, found.evaluation.model_dump_json(indent=2) + "\n")
            console.print(f"figures in {self.json_}")
        if self.out is not None:
            write_report(self.out, found)
            console.print(f"report in {self.out}")
        return 0


# --- what is found ----------------------------------------------------------------------------------------------


class Estimate(Contract):
    """A mean over queries."""

    mean: float
    """Of the sample."""
    error: float
    """Its standard error: s / √n; of shares that is the binomial one."""
    queries: int
    """How many."""

    @classmethod
    def of(cls, values: Sequence[float] | npt.NDArray[Any]) -> Estimate:
        """Of one value per query, at least one."""
        x = np.asarray(values, np.float64)
        error = float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else 0.0
        return cls(mean=float(x.mean()), error=error, queries=len(x))


class At(Contract):
    """A figure at a rank."""

    k: int
    """The rank."""
    value: Estimate
    """What it is there."""


class IndexRecall(Contract):
    """The index against exact search."""

    k: int
    """Neighbours asked for."""
    recall: Estimate
    """The share of the k answers that score no lower than the k-th of the exact answer."""
    p50_ms: float
    """Median milliseconds of one query alone, rows read and all."""
    p95_ms: float
    """Their 95 % quantile."""


class Occurrences(Contract):
    """How often items are among the ten nearest of others: N_10 (Radovanović et al. 2010)."""

    items: int
    """That may occur."""
    lists: int
    """Of ten neighbours."""
    skewness: float
    """Of N_10, third standardised moment: large where few items are neighbours of many."""
    chance_skewness: float
    """What lists drawn at random would have."""
    anti_hubs: float
    """Share of the items that occur in no list."""
    chance_anti_hubs: float
    """What lists drawn at random would have."""
    most: int
    """Largest N_10."""


class Hub(Contract):
    """An item that is a neighbour of many."""

    key: str
    """The item."""
    occurrences: int
    """In how many of the sample's lists."""


class Hubness(Contract):
    """Hubs, by exact search."""

    within: Occurrences
    """Of the sample among itself: each of its items is asked, and may be found, as the definition has it."""
    collection: Occurrences
    """Of all items, in the sample's lists; with few lists per item chance alone is skewed."""
    hubs: tuple[Hub, ...]
    """The most frequent, in the sample's lists."""
    counts: tuple[int, ...]
    """[n] how many items of the sample have N_10 = n among itself; the last also has those beyond."""


class Duplicates(Contract):
    """Items with a near twin."""

    score: float
    """From which on."""
    share: Estimate
    """Of the sample."""


class Scores(Contract):
    """Histograms over equal bins of −1 … 1."""

    nearest: tuple[int, ...]
    """Score of each sampled item's nearest other."""
    random: tuple[int, ...]
    """Scores of random pairs of the sample."""
    nearest_median: float
    """Of the former."""
    random_median: float
    """Of the latter."""


class LabelFigures(Contract):
    """Exact ranking of the gallery for each query, by label."""

    field: str
    """Where the label is."""
    query_filter: str
    """Which items may be queries."""
    gallery_filter: str
    """Which are ranked."""
    candidates: int
    """Labelled items that may be queries; of more than the sample some are drawn."""
    without_relevant: int
    """Of the drawn, those with no other item of their label in the gallery: left out."""
    gallery: int
    """Labelled items that are ranked."""
    unlabelled: int
    """Items without a label, left out everywhere."""
    labels: int
    """Distinct ones in the gallery."""
    mean_average_precision: Estimate
    """Mean over queries of (1/R) Σ i / rank_i over all ranks; an item's own row is left out (docs/evaluation.md)."""
    recall_at: tuple[At, ...]
    """Share of the queries with a relevant item among the first k."""


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


class Overlap(Contract):
    """Neighbours that two collections have in common, among items that both hold."""

    name: str
    """The other collection."""
    space_id: str
    """Its space."""
    missing: int
    """Of the sample, items that it does not hold."""
    short: int
    """… for which fewer than ten neighbours that both hold were found: left out."""
    overlap_at: tuple[At, ...]
    """Share of the k nearest in common."""


class SegmentFigures(Contract):
    """A segment as it was built."""

    number: int
    """Which."""
    rows: int
    """Deleted ones included."""
    dead: int
    """These."""
    index: IndexInfo
    """How it is searched, and its curve."""


class Evaluation(Contract):
    """Everything that was found."""

    format_version: int = 1
    """Of this."""
    name: str
    """The collection."""
    space_id: str
    """Its space."""
    dim: int
    """Length of its vectors."""
    items: int
    """Live ones."""
    fresh: int
    """Of these, in no segment yet."""
    sequence: int
    """Number of the last write."""
    origins: tuple[str, ...]
    """Who made the vectors."""
    segments: tuple[SegmentFigures, ...]
    """Oldest first."""
    sampled: int
    """Items that were queries."""
    seed: int
    """They were drawn with."""
    index: tuple[IndexRecall, ...]
    """At each k."""
    hubness: Hubness
    """Hubs."""
    duplicates: tuple[Duplicates, ...]
    """At each score."""
    scores: Scores
    """Nearest neighbours beside random pairs."""
    labels: LabelFigures | None = None
    """With --label."""
    self_retrieval: SelfRetrieval | None = None
    """With --bundle."""
    against: Overlap | None = None
    """With --against."""
    seconds: float
    """It took."""
    machine: str
    """Processor and cores."""
    versions: dict[str, str]
    """Of what computed it."""


class Shown(NamedTuple):
    """An item on a sheet."""

    key: str
    score: float | None
    """None for a query."""
    agrees: bool | None
    """Whether its label is the query's; None where either has none."""
    picture: bytes | None
    """The encoded file, None where it is not on this machine."""


class Sheet(NamedTuple):
    """A query and what the index answers."""

    query: Shown
    neighbours: list[Shown]


class Found(NamedTuple):
    """An evaluation, and pictures for the report."""

    evaluation: Evaluation
    sheets: list[Sheet]
    hubs: list[Shown]


# --- the live rows ----------------------------------------------------------------------------------------------


class Live:
    """The rows of a view by number: the segments' one after another, then the fresh ones; dead ones have numbers, too."""

    def __init__(self, view: View) -> None:
        self._view = view
        counts = [len(part.segment) for part in view.parts]
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._fresh = int(self._starts[-1])
        self.rows = self._fresh + view.fresh.count
        """Dead ones included."""

    def flags(self, wanted: Filter | None = None) -> npt.NDArray[np.bool_]:
        """bool [rows]: which live, and pass a filter."""
        flags = np.zeros(self.rows, np.bool_)
        for part, start in zip(self._view.parts, self._starts.tolist(), strict=False):
            bits, _ = part.among(wanted)
            end = start + len(part.segment)
            flags[start:end] = True if bits is None else np.unpackbits(bits, bitorder="little")[: end - start] != 0
        flags[self._fresh :] = self._view.fresh.among(wanted)[0] != 0
        return flags

    def blocks(self, flags: npt.NDArray[np.bool_]) -> Iterator[tuple[Rows, Embeddings]]:
        """Numbers [B], ascending, and vectors [B, D] of flagged rows, some thousand at a time."""
        parts = zip(self._starts.tolist(), (part.segment.vectors for part in self._view.parts), strict=False)
        for start, vectors in (*parts, (self._fresh, self._view.fresh.buffer[: self._view.fresh.count])):
            for low in range(0, len(vectors), _BLOCK):
                at = np.flatnonzero(flags[start + low : start + min(low + _BLOCK, len(vectors))])
                if len(at):
                    yield at + (start + low), np.asarray(vectors[low : low + _BLOCK][at], np.float32)

    def vectors(self, rows: Rows) -> Embeddings:
        """[R, D] as they are stored."""
        found = np.empty((len(rows), self._view.fresh.buffer.shape[1]), np.float32)
        sources = self._sources(rows)
        for source in np.unique(sources).tolist():
            mine = sources == source
            at = rows[mine] - self._starts[source]
            held = (
                self._view.fresh.buffer if source == len(self._view.parts) else self._view.parts[source].segment.vectors
            )
            found[mine] = held[at]
        return found

    def row(self, number: int) -> StoredRow:
        """What is stored beside the vector."""
        source = int(self._sources(np.asarray([number]))[0])
        at = number - int(self._starts[source])
        return (
            self._view.fresh.rows[at] if source == len(self._view.parts) else self._view.parts[source].segment.row(at)
        )

    def locate(self, ids: Sequence[int]) -> Rows:
        """Numbers [I] of rows by id; −1 for those that came after the view."""
        wanted = np.asarray(ids, np.int64)
        found = np.full(len(wanted), -1, np.int64)
        for part, start in zip(self._view.parts, self._starts.tolist(), strict=False):
            held = part.segment.ids
            at = np.minimum(np.searchsorted(held, wanted), len(held) - 1)
            found = np.where(held[at] == wanted, start + at, found)
        for i in np.flatnonzero(found < 0).tolist():
            place = self._view.fresh.places.get(ids[i])
            if place is not None and place < self._view.fresh.count:
                found[i] = self._fresh + place
        return found

    def payloads(self) -> Iterator[tuple[int, list[str]]]:
        """First number and payloads of some thousand rows, dead ones too."""
        for part, start in zip(self._view.parts, self._starts.tolist(), strict=False):
            column = part.segment.table["payload"]
            for low in range(0, len(part.segment), _BLOCK):
                yield start + low, column.slice(low, _BLOCK).to_pylist()
        rows = self._view.fresh.rows[: self._view.fresh.count]
        if rows:
            yield self._fresh, [row.payload for row in rows]

    def _sources(self, rows: Rows) -> Rows:
        """Which segment each is in; their count for fresh ones."""
        return np.asarray(np.searchsorted(self._starts, rows, side="right") - 1, np.int64)


def nearest(
    blocks: Iterable[tuple[Rows, Embeddings]], queries: Embeddings, own: Rows, k: int, advance: Advance = lambda _: None
) -> tuple[Embeddings, Rows]:
    """Scores and numbers [Q, k] of the rows most similar to unit queries [Q, D], best first, each query's `own` [Q] left
    out. Exact; −∞ and −1 where there are fewer."""
    scores = np.full((len(queries), k), -np.inf, np.float32)
    found = np.full((len(queries), k), -1, np.int64)
    for rows, vectors in blocks:
        for low in range(0, len(queries), _CHUNK):
            part = slice(low, low + _CHUNK)
            new = _similarity(queries[part], rows, vectors, own[part])
            both = np.concatenate([scores[part], new], axis=1)
            chosen = np.argpartition(-both, k - 1, axis=1)[:, :k]
            numbers = np.take_along_axis(found[part], np.minimum(chosen, k - 1), 1)
            found[part] = np.where(chosen < k, numbers, rows[np.maximum(chosen - k, 0)])
            scores[part] = np.take_along_axis(both, chosen, 1)
        advance(len(rows))
    found[scores == -np.inf] = -1
    order = np.lexsort((found, -scores), axis=1)
    return np.take_along_axis(scores, order, 1), np.take_along_axis(found, order, 1)


def _similarity(queries: Embeddings, rows: Rows, vectors: Embeddings, own: Rows) -> Embeddings:
    """[Q, B]; −∞ at each query's own row."""
    scores: Embeddings = queries @ vectors.T
    at = np.minimum(np.searchsorted(rows, own), len(rows) - 1)
    mine = np.flatnonzero(rows[at] == own)
    scores[mine, at[mine]] = -np.inf
    return scores


# --- measuring --------------------------------------------------------------------------------------------------


def evaluate(asked: IndexEvaluate, console: Console) -> Found:
    """Measure a collection. Raises `RefusalError`."""
    start = time.perf_counter()
    if (asked.query_filter or asked.gallery_filter) and not asked.label:
        raise RefusalError("--query-filter and --gallery-filter say what is compared by label: give --label FIELD, too")
    if any(not 0 < score <= 1 for score in asked.duplicates):
        raise RefusalError(f"--duplicates holds {asked.duplicates}, scores above 0 and up to 1 are expected")
    if asked.against is not None and asked.against.resolve() == asked.collection.resolve():
        raise RefusalError(f"--against {asked.against} is the collection itself: give another one")
    label = None if not asked.label else _path(asked.label)
    filters = [_filter(text, flag) for text, flag in (
        (asked.query_filter, "--query-filter"), (asked.gallery_filter, "--gallery-filter"))]  # fmt: skip
    bundle = None if asked.bundle is None else Bundle.open(asked.bundle)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with ExitStack() as stack:
        space = None if bundle is None else bundle.space_id
        collection = stack.enter_context(closing(Collection(asked.collection, space)))
        other = None if asked.against is None else stack.enter_context(closing(Collection(asked.against)))
        if len(collection) < LEAST:
            raise RefusalError(
                f"{asked.collection} holds {len(collection)} items, at least {LEAST} are needed: add pictures"
            )
        progress = stack.enter_context(Progress(*columns, console=console, disable=not sys.stderr.isatty()))
        live = Live(collection.view)
        codes = None if label is None else _labels(live, label, asked.label)
        flags = live.flags()
        rng = np.random.default_rng(asked.seed)
        sampled = _drawn(rng, flags, asked.sample)
        queries = unit(live.vectors(sampled))
        ks = [k for k in RECALL_AT if k < len(collection)]
        task = _task(progress, "exact search", int(flags.sum()))
        scores, rows = nearest(live.blocks(flags), queries, sampled, ks[-1], task)
        recalls = [_recall(collection, live, sampled, queries, scores, k, progress) for k in ks]
        labels = None
        if codes is not None:
            labels = _label_figures(asked, live, codes, (filters[0], filters[1]), rng, progress)
        self_retrieval = overlap = None
        if bundle is not None:
            encoder = Encoder(bundle, _embedding(asked, bundle), console.print)
            try:
                self_retrieval = _self_retrieval(asked, collection, live, sampled, encoder, progress)
            finally:
                encoder.close()
        if other is not None:
            overlap = _overlap(collection, other, live, sampled, queries, progress)
        top = scores[:, 0].astype(np.float64)
        pairs = _random_pairs(queries, rng)
        hubness = _hubness(live, queries, sampled, rows[:, :NEIGHBOURS], int(flags.sum()))
        evaluation = Evaluation(
            name=collection.name, space_id=collection.space_id, dim=collection.dim, items=len(collection),
            fresh=collection.fresh_count, sequence=collection.sequence, origins=tuple(sorted(collection.origins)),
            segments=tuple(
                SegmentFigures(number=s.number, rows=s.rows, dead=s.dead, index=s.info) for s in collection.segments()
            ),
            sampled=len(sampled), seed=asked.seed, index=tuple(recalls), hubness=hubness,
            duplicates=tuple(
                Duplicates(score=score, share=Estimate.of(top >= score - TIE)) for score in asked.duplicates
            ),
            scores=Scores(
                nearest=_histogram(top), random=_histogram(pairs),
                nearest_median=float(np.median(top)), random_median=float(np.median(pairs)),
            ),
            labels=labels, self_retrieval=self_retrieval, against=overlap,
            seconds=round(time.perf_counter() - start, 1), machine=f"{cpu_model()}, {cpu_quota()} cores",
            versions=_versions(),
        )  # fmt: skip
        if asked.out is None:
            return Found(evaluation, [], [])
        chosen = np.sort(rng.permutation(len(sampled))[:SHEETS])
        sheets = [_sheet(asked, collection, live, int(sampled[i]), queries[i], codes) for i in chosen]
        hubs = []
        for hub in hubness.hubs:
            row = collection.get(hub.key).row
            hubs.append(Shown(hub.key, None, None, picture_of(row.source_uri, row.key, asked.images)))
        return Found(evaluation, sheets, hubs)


def _recall(
    collection: Collection,
    live: Live,
    sampled: Rows,
    queries: Embeddings,
    exact: Embeddings,
    k: int,
    progress: Progress,
) -> IndexRecall:
    """Every query alone, as it is served. Equal scores are equal answers: which of two twins is found says nothing."""
    shares, times = [], []
    advance = _task(progress, f"searching, k = {k}", len(sampled))
    for number, query, best in zip(sampled.tolist(), queries, exact, strict=True):
        key = live.row(number).key
        start = time.perf_counter()
        (hits,) = collection.search(query, k, leave_out=[frozenset([key])])
        times.append(time.perf_counter() - start)
        rows = live.locate([hit.row.id for hit in hits])
        again = live.vectors(rows[rows >= 0]) @ query  # an index that compresses gives other scores
        shares.append(float((again >= best[k - 1] - TIE).sum()) / k)
        advance(1)
    p50, p95 = np.quantile(times, (0.5, 0.95)) * 1e3
    return IndexRecall(k=k, recall=Estimate.of(shares), p50_ms=round(float(p50), 3), p95_ms=round(float(p95), 3))


def _hubness(live: Live, queries: Embeddings, sampled: Rows, lists: Rows, items: int) -> Hubness:
    """From the sample's ten nearest [S, 10] among all items, and anew among the sample."""
    own = np.arange(len(queries))
    blocks = ((own[low : low + _BLOCK], queries[low : low + _BLOCK]) for low in range(0, len(queries), _BLOCK))
    _, inner = nearest(blocks, queries, own, NEIGHBOURS)
    within = np.bincount(inner.ravel(), minlength=len(queries))
    found, counts = np.unique(lists[lists >= 0], return_counts=True)
    order = np.lexsort((found, -counts))[:HUBS]
    hubs = [Hub(key=live.row(int(found[i])).key, occurrences=int(counts[i])) for i in order]
    return Hubness(
        within=_occurrences(within, len(queries), len(queries)),
        collection=_occurrences(counts, items, len(sampled)),
        hubs=tuple(hubs),
        counts=tuple(np.bincount(np.minimum(within, 60)).tolist()),
    )


def _occurrences(counts: npt.NDArray[Any], items: int, lists: int) -> Occurrences:
    """Of `items` of which those with counts [C] may be all that occur: the others' are 0."""
    x = counts.astype(np.float64)
    mean, zeros = x.sum() / items, items - len(x)
    second = (((x - mean) ** 2).sum() + zeros * mean**2) / items
    third = (((x - mean) ** 3).sum() - zeros * mean**3) / items
    # By chance an item is in each list but its own with the same probability: binomial.
    p, trials = NEIGHBOURS / (items - 1), lists - lists / items
    spread = math.sqrt(trials * p * (1 - p))
    return Occurrences(
        items=items, lists=lists, skewness=float(third / second**1.5) if second > 0 else 0.0,
        chance_skewness=(1 - 2 * p) / spread, anti_hubs=float(zeros + (x == 0).sum()) / items,
        chance_anti_hubs=(1 - p) ** trials, most=int(x.max(initial=0)),
    )  # fmt: skip


def _random_pairs(queries: Embeddings, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    a = rng.integers(0, len(queries), _PAIRS)
    b = (a + rng.integers(1, len(queries), _PAIRS)) % len(queries)
    parts = [np.einsum("pd,pd->p", queries[a[low : low + 1000]], queries[b[low : low + 1000]], dtype=np.float64)
             for low in range(0, _PAIRS, 1000)]  # fmt: skip
    return np.concatenate(parts)


def _histogram(scores: npt.NDArray[Any]) -> tuple[int, ...]:
    counts, _ = np.histogram(np.clip(scores, -1, 1), bins=100, range=(-1, 1))
    return tuple(counts.tolist())


# --- by label ---------------------------------------------------------------------------------------------------


def _path(field: str) -> tuple[str, ...]:
    """A payload field as filters name it, as a path. Raises `RefusalError`."""
    try:
        root = Filter.parse(f"{field}:*").root
    except InvalidArgumentError:
        root = None
    if not isinstance(root, Restriction) or root.values or root.member[0] != "payload" or len(root.member) < 2:
        raise RefusalError(f"--label {field!r} is no field of the payload: write one such as folder or shop.name")
    return root.member[1:]


def _filter(text: str, flag: str) -> Filter | None:
    try:
        return Filter.parse(text) if text.strip() else None
    except InvalidArgumentError as e:
        raise RefusalError(f"{flag}: {e}") from None


def _labels(live: Live, path: tuple[str, ...], field: str) -> Rows:
    """A number [rows] for each row's label, −1 for none: absent, null, empty, a list or an object. Raises `RefusalError`
    where no live row has one."""
    codes = np.full(live.rows, -1, np.int64)
    known: dict[tuple[bool, Any], int] = {}
    seen: set[str] = set()
    for low, payloads in live.payloads():
        for i, payload in enumerate(payloads, low):
            value: Any = json.loads(payload)
            if len(seen) < 20:
                seen |= value.keys()
            for name in path:
                value = value.get(name) if isinstance(value, dict) else None
            if isinstance(value, str | int | float) and value != "":
                codes[i] = known.setdefault((isinstance(value, bool), value), len(known))  # 1 == True
    if not (codes[live.flags()] >= 0).any():
        there = ", ".join(sorted(seen)[:20]) or "none"
        raise RefusalError(
            f"no item has a label in the payload field {field!r} (a string, number or boolean is one): the payloads' "
            f"fields are {printable(there)}; give one of them"
        )
    return codes


def _label_figures(
    asked: IndexEvaluate, live: Live, codes: Rows, filters: tuple[Filter | None, Filter | None],
    rng: np.random.Generator, progress: Progress,
) -> LabelFigures:  # fmt: skip
    """Raises `RefusalError` where no query has a relevant item."""
    alive, labelled = live.flags(), codes >= 0
    candidates, gallery = (live.flags(wanted) & labelled for wanted in filters)
    sizes = np.bincount(codes[gallery], minlength=int(codes.max()) + 1)
    drawn = _drawn(rng, candidates, asked.sample)
    relevant = sizes[codes[drawn]] - gallery[drawn]  # without the query's own row
    rows = drawn[relevant > 0]
    if not len(rows):
        raise RefusalError(
            f"of {int(candidates.sum()):,} labelled queries none has another item of its label among the "
            f"{int(gallery.sum()):,} of the gallery: check --label {asked.label}, --query-filter and --gallery-filter"
        )
    precisions, ranks = _ranked(live, codes, gallery, rows, relevant[relevant > 0], progress)
    return LabelFigures(
        field=asked.label, query_filter="" if filters[0] is None else filters[0].text,
        gallery_filter="" if filters[1] is None else filters[1].text,
        candidates=int(candidates.sum()), without_relevant=len(drawn) - len(rows), gallery=int(gallery.sum()),
        unlabelled=int((alive & ~labelled).sum()), labels=int((sizes > 0).sum()),
        mean_average_precision=Estimate.of(precisions),
        recall_at=tuple(At(k=k, value=Estimate.of(ranks < k)) for k in LABEL_RECALL_AT),
    )  # fmt: skip


def _ranked(
    live: Live, codes: Rows, gallery: npt.NDArray[np.bool_], rows: Rows, relevant: Rows, progress: Progress
) -> tuple[npt.NDArray[np.float64], Rows]:
    """Average precision, and rank from 0 of the first relevant item, of the queries `rows` [Q] with `relevant` [Q] items
    each, over the whole gallery.

    The gallery is read twice: for the relevant items' scores, then to count what is above them. Items of equal score, within
    `TIE`, come in together, as in scikit-learn's `average_precision_score`, so a tie is never a gain.
    """
    precisions, ranks = np.empty(len(rows)), np.empty(len(rows), np.int64)
    # Queries that together have as many relevant items as are held at a time.
    starts, held = [0], 0
    for i, count in enumerate(relevant.tolist()):
        if held and held + count > _RELEVANT:
            starts.append(i)
            held = 0
        held += count
    advance = _task(progress, "ranking by label", 2 * len(starts) * int(gallery.sum()))
    for start, end in zip(starts, [*starts[1:], len(rows)], strict=True):
        own, wanted = rows[start:end], codes[rows[start:end]]
        queries = unit(live.vectors(own))
        scores: list[list[Embeddings]] = [[] for _ in own]
        for low, similarity, same in _compared(live, codes, gallery, own, queries, wanted, advance):
            for q in np.flatnonzero(same.any(axis=1)).tolist():
                found = similarity[q, same[q]]
                scores[low + q].append(found[found > -np.inf])  # without the own row
        levels = [np.sort(np.concatenate(parts)) for parts in scores]  # ascending
        above = [np.zeros(len(each), np.int64) for each in levels]
        for low, similarity, same in _compared(live, codes, gallery, own, queries, wanted, advance):
            similarity[same] = -np.inf
            similarity.sort(axis=1)
            for q, ordered in enumerate(similarity, low):
                above[q] += len(ordered) - np.searchsorted(ordered, levels[q] - TIE, side="left")
        for q, (level, others) in enumerate(zip(levels, above, strict=True), start):
            mine = len(level) - np.searchsorted(level, level - TIE, side="left")
            precisions[q] = float((mine / (mine + others)).mean())
            ranks[q] = others[-1]
    return precisions, ranks


def _compared(
    live: Live,
    codes: Rows,
    gallery: npt.NDArray[np.bool_],
    own: Rows,
    queries: Embeddings,
    wanted: Rows,
    advance: Advance,
) -> Iterator[tuple[int, Embeddings, npt.NDArray[np.bool_]]]:
    """Block by block: the first query, similarities [Q, B], −∞ at the own row, and whether the labels agree [Q, B]."""
    for numbers, vectors in live.blocks(gallery):
        found = codes[numbers]
        for low in range(0, len(queries), _CHUNK):
            part = slice(low, low + _CHUNK)
            yield low, _similarity(queries[part], numbers, vectors, own[part]), found == wanted[part, None]
        advance(len(numbers))


# --- against another collection ---------------------------------------------------------------------------------


def _overlap(
    collection: Collection, other: Collection, live: Live, sampled: Rows, queries: Embeddings, progress: Progress
) -> Overlap:
    """Each collection is asked with its own vector of the item, through its index. Raises `RefusalError`."""
    held: dict[tuple[int, str], bool] = {}

    def holds(place: Collection, key: str) -> bool:
        if (id(place), key) not in held:
            try:
                place.get(key)
                held[id(place), key] = True
            except NotFoundError:
                held[id(place), key] = False
        return held[id(place), key]

    def neighbours(asked: Collection, query: Embeddings, key: str) -> list[str]:
        beside, reach = (other if asked is collection else collection), 2 * NEIGHBOURS
        while True:
            (hits,) = asked.search(query, reach, leave_out=[frozenset([key])])
            found = [hit.row.key for hit in hits if holds(beside, hit.row.key)]
            if len(found) >= NEIGHBOURS or len(hits) < reach or reach >= _REACH:
                return found[:NEIGHBOURS]
            reach *= 4

    missing, short = 0, 0
    shares: dict[int, list[float]] = {1: [], NEIGHBOURS: []}
    advance = _task(progress, "comparing neighbours", len(sampled))
    for number, query in zip(sampled.tolist(), queries, strict=True):
        advance(1)
        key = live.row(number).key
        try:
            theirs = other.get(key).vector
        except NotFoundError:
            missing += 1
            continue
        a, b = neighbours(collection, query, key), neighbours(other, theirs, key)
        if min(len(a), len(b)) < NEIGHBOURS:
            short += 1
            continue
        for k, values in shares.items():
            values.append(len(set(a[:k]) & set(b[:k])) / k)
    if not shares[1]:
        raise RefusalError(
            f"{other.folder} holds {len(sampled) - missing:,} of {len(sampled):,} sampled items, and none has "
            f"{NEIGHBOURS} neighbours that both collections hold: give a collection of the same items"
        )
    return Overlap(
        name=other.name, space_id=other.space_id, missing=missing, short=short,
        overlap_at=tuple(At(k=k, value=Estimate.of(values)) for k, values in shares.items()),
    )  # fmt: skip


# --- edited pictures --------------------------------------------------------------------------------------------


def _embedding(asked: IndexEvaluate, bundle: Bundle) -> Embedding:
    return Embedding(bundle=bundle.folder, device=asked.device, variant=asked.variant, threads=asked.threads)


def _self_retrieval(
    asked: IndexEvaluate, collection: Collection, live: Live, sampled: Rows, encoder: Encoder, progress: Progress
) -> SelfRetrieval:
    """Raises `RefusalError` where no picture can be read."""
    drawn = _drawn(np.random.default_rng(asked.seed), np.ones(len(sampled), np.bool_), asked.pictures)
    spec = encoder.bundle.manifest.preprocess
    # Edited at twice the encoder's size, so that the edit is not undone by its resampling (docs/evaluation.md).
    side = int(np.clip(2 * spec.size, 64, max(512, spec.size)))
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

    advance = _task(progress, "searching edited pictures", len(drawn))
    for number in sampled[drawn].tolist():
        advance(1)
        row = live.row(number)
        data = picture_of(row.source_uri, row.key, asked.images)
        try:
            original = None if data is None else (encoder.decode(data).pixels, _whole(data, side))
        except UnreadablePictureError:
            original = None
        if original is None:
            continue
        pictures += 1
        waiting.append(("unchanged", row.key, original[0]))
        for name, edit in EDITS.items():
            digest = hashlib.sha256(f"index evaluate/{asked.seed}/{name}/{row.key}".encode()).digest()
            edited = edit(original[1], np.random.default_rng(int.from_bytes(digest[:8], "big")))
            pixels = preprocess(_encoded(edited), spec, DecodeLimits(min_side=1)).pixels  # a panorama's half is thin
            waiting.append((name, row.key, pixels))
            if len(waiting) == BUILD_BATCH:
                search()
    if waiting:
        search()
    if not pictures:
        raise RefusalError(
            f"none of {len(drawn):,} sampled items has a picture that can be read on this machine: say where they lie with "
            "--images FOLDER, or leave --bundle out"
        )
    return SelfRetrieval(
        made_by=encoder.origin, pictures=pictures, unreadable=len(drawn) - pictures,
        edits=tuple(
            Edited(
                edit=name, recall_at_1=Estimate.of([first for first, _ in found]),
                recall_at_10=Estimate.of([there for _, there in found]),
            )
            for name, found in hits.items()
        ),
    )  # fmt: skip


def _whole(data: bytes, side: int) -> Image.Image:
    """The whole picture, its longer side `side` px. Raises `UnreadablePictureError`."""
    done = preprocess(data, PreprocessSpec(size=side, fit="pad"))
    scale = side / max(done.width, done.height)
    width, height = (min(side, max(1, round(length * scale))) for length in (done.width, done.height))
    left, top = (side - width) // 2, (side - height) // 2
    return Image.fromarray(done.pixels[top : top + height, left : left + width])


def _encoded(image: Image.Image, kind: str = "BMP", **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# Edits that training never makes, as those of `likewise evaluate` (training/evaluate/edits.py, which this room may not
# import), of the same strengths.

Edit = Callable[[Image.Image, np.random.Generator], Image.Image]


def _jpeg(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Half the size, then JPEG at quality 15 to 30."""
    small = image.resize((max(8, image.width // 2), max(8, image.height // 2)), Image.Resampling.BICUBIC)
    return Image.open(io.BytesIO(_encoded(small, "JPEG", quality=int(rng.integers(15, 31))))).convert("RGB")


def _shear(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Sheared by 15 to 25 degrees; grey outside."""
    t = math.tan(math.radians(rng.uniform(15, 25))) * rng.choice((-1.0, 1.0))
    matrix = (1.0, t, -t * image.height / 2, 0.0, 1.0, 0.0)
    grey = (128, 128, 128)
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=grey)


def _overlay(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A bar over a fifth of the height and a disc as a logo."""
    image = image.copy()
    w, h = image.size
    pen = ImageDraw.Draw(image)
    bar, disc = (tuple(int(v) for v in rng.integers(0, 256, 3)) for _ in range(2))
    top = rng.uniform(0, 0.75) * h
    pen.rectangle((0, top, w, top + 0.22 * h), fill=bar)
    r = 0.16 * min(w, h)
    x, y = rng.uniform(r, w - r), rng.uniform(r, h - r)
    pen.ellipse((x - r, y - r, x + r, y + r), fill=disc)
    return image


def _paste(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Shrunk to 45–60 % and pasted somewhere on a patchy background of random colours."""
    w, h = image.size
    canvas = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((w, h), Image.Resampling.BICUBIC)
    scale = rng.uniform(0.45, 0.6)
    small = image.resize((max(1, round(w * scale)), max(1, round(h * scale))), Image.Resampling.BICUBIC)
    canvas.paste(small, (int(rng.uniform(0, w - small.width)), int(rng.uniform(0, h - small.height))))
    return canvas


def _gamma(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A gamma of 0.35 to 0.5, or one over that."""
    power = rng.uniform(0.35, 0.5) ** rng.choice((-1.0, 1.0))
    return image.point([*np.rint(255 * (np.arange(256) / 255) ** power).astype(np.uint8).tolist()] * 3)


def _posterize(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Two bits per channel, thresholds shifted at random."""
    values = np.asarray(image).astype(np.int64) + rng.integers(-24, 25, 3)
    return Image.fromarray((np.clip(values, 0, 255) // 64 * 85).astype(np.uint8))


def _mosaic(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Square cells, 10 to 16 along the longer side."""
    scale = rng.integers(10, 17) / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BOX).resize(image.size, Image.Resampling.NEAREST)


EDITS: dict[str, Edit] = {
    "jpeg": _jpeg, "shear": _shear, "overlay": _overlay, "paste": _paste, "gamma": _gamma, "posterize": _posterize,
    "mosaic": _mosaic,
}  # fmt: skip
"""Name → edit. Each takes an RGB picture and a generator, and leaves the picture as it is."""


# --- sheets -----------------------------------------------------------------------------------------------------


def _sheet(
    asked: IndexEvaluate, collection: Collection, live: Live, number: int, query: Embeddings, codes: Rows | None
) -> Sheet:
    row = live.row(number)
    (hits,) = collection.search(query, SHEET_WIDTH, leave_out=[frozenset([row.key])])
    agree: list[bool | None] = [None] * len(hits)
    if codes is not None and codes[number] >= 0:
        found = codes[live.locate([hit.row.id for hit in hits])]
        agree = [bool(code == codes[number]) if code >= 0 else None for code in found.tolist()]
    return Sheet(
        Shown(row.key, None, None, picture_of(row.source_uri, row.key, asked.images)),
        [
            Shown(hit.row.key, hit.score, same, picture_of(hit.row.source_uri, hit.row.key, asked.images))
            for hit, same in zip(hits, agree, strict=True)
        ],
    )


def _drawn(rng: np.random.Generator, flags: npt.NDArray[np.bool_], count: int) -> Rows:
    """Up to `count` of the flagged rows, ascending."""
    there = np.flatnonzero(flags)
    return np.sort(rng.choice(there, min(count, len(there)), replace=False))


def _task(progress: Progress, name: str, total: int) -> Advance:
    task = progress.add_task(name, total=total)
    return lambda done: progress.advance(task, done)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("likewise", "numpy", "faiss-cpu", "faiss-gpu", "onnxruntime", "onnxruntime-gpu", "Pillow"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
