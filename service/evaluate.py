"""`likewise index evaluate`: what a collection is worth on the user's own data.

Without labels: recall of the index against exact search, hubs, duplicates (quality.py); with a bundle, whether edited
pictures find their own item (self_retrieval.py); with another collection, how many neighbours the two share (overlap.py).
With labels in the payload: mAP and Recall@k (labels.py).

Vectors are read in blocks, so memory grows with the sample; beside it a row of the collection costs a few bytes.
"""

from __future__ import annotations

import platform
import sys
import time
from contextlib import ExitStack, closing
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from pydantic_settings import CliPositionalArg
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from export.bundle import Bundle, Contract, Embeddings, RefusalError, write_file
from export.machine import cpu_model, cpu_quota
from export.shipped import BundleFolder
from service import quality
from service.collection import Collection
from service.config import Embedding
from service.encoder import Encoder
from service.errors import InvalidArgumentError
from service.filter import Filter
from service.index import IndexInfo, Rows
from service.labels import LabelFigures, label_figures, path_of, read_labels
from service.live import Live
from service.overlap import Overlap, overlap
from service.quality import NEIGHBOURS, Advance, Duplicates, Hubness, IndexRecall, Scores, drawn, nearest
from service.segment import unit
from service.self_retrieval import SelfRetrieval, self_retrieval
from service.sheet import picture_of

LEAST = 20  # items: below, every item is nearly every item's neighbour
RECALL_AT = (1, 10, 100)
SHEETS, SHEET_WIDTH = 12, 8


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
    bundle: BundleFolder | None = None
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


def evaluate(asked: IndexEvaluate, console: Console) -> Found:
    """Measure a collection. Raises `RefusalError`."""
    start = time.perf_counter()
    if (asked.query_filter or asked.gallery_filter) and not asked.label:
        raise RefusalError("--query-filter and --gallery-filter say what is compared by label: give --label FIELD, too")
    if any(not 0 < score <= 1 for score in asked.duplicates):
        raise RefusalError(f"--duplicates holds {asked.duplicates}, scores above 0 and up to 1 are expected")
    if asked.against is not None and asked.against.resolve() == asked.collection.resolve():
        raise RefusalError(f"--against {asked.against} is the collection itself: give another one")
    path = path_of(asked.label) if asked.label else None
    query_filter = _filter(asked.query_filter, "--query-filter")
    gallery_filter = _filter(asked.gallery_filter, "--gallery-filter")
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

        def task(name: str, total: int) -> Advance:
            number = progress.add_task(name, total=total)
            return lambda done: progress.advance(number, done)

        live = Live(collection.view)
        codes = None if path is None else read_labels(live, path, asked.label)
        flags = live.flags()
        items = int(flags.sum())
        rng = np.random.default_rng(asked.seed)
        sampled = drawn(rng, flags, asked.sample)
        queries = unit(live.vectors(sampled))
        ks = [k for k in RECALL_AT if k < len(collection)]
        scores, rows = nearest(live.blocks(flags), queries, sampled, ks[-1], task("exact search", items))
        recalls = tuple(quality.recall(collection, live, sampled, queries, scores, k, task) for k in ks)
        labels = edited = shared = None
        if codes is not None:
            labels = label_figures(live, codes, asked.label, query_filter, gallery_filter, asked.sample, rng, task)
        if bundle is not None:
            some = drawn(np.random.default_rng(asked.seed), np.ones(len(sampled), np.bool_), asked.pictures)
            embedding = Embedding(
                bundle=bundle.folder, device=asked.device, variant=asked.variant, threads=asked.threads
            )
            with closing(Encoder(bundle, embedding, console.print)) as encoder:
                edited = self_retrieval(collection, live, sampled[some], encoder, asked.seed, asked.images, task)
        if other is not None:
            shared = overlap(collection, other, live, sampled, queries, task)
        top = scores[:, 0].astype(np.float64)
        hubness = quality.hubness(live, queries, sampled, rows[:, :NEIGHBOURS], items)
        evaluation = Evaluation(
            name=collection.name, space_id=collection.space_id, dim=collection.dim, items=len(collection),
            fresh=collection.fresh_count, sequence=collection.sequence, origins=tuple(sorted(collection.origins)),
            segments=tuple(
                SegmentFigures(number=s.number, rows=s.rows, dead=s.dead, index=s.info) for s in collection.segments()
            ),
            sampled=len(sampled), seed=asked.seed, index=recalls, hubness=hubness,
            duplicates=quality.duplicates(top, asked.duplicates), scores=quality.scores_of(top, queries, rng),
            labels=labels, self_retrieval=edited, against=shared,
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


def _filter(text: str, flag: str) -> Filter | None:
    try:
        return Filter.parse(text) if text.strip() else None
    except InvalidArgumentError as e:
        raise RefusalError(f"{flag}: {e}") from None


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


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("likewise", "numpy", "faiss-cpu", "faiss-gpu", "onnxruntime", "onnxruntime-gpu", "Pillow"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
