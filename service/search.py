"""likewise.v1.SearchService: what is looked for, among which items, and how far."""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from export.bundle import Embeddings
from service.collection import Collection
from service.errors import InvalidArgumentError, ServiceError
from service.filter import Filter, payload_path
from service.pb import likewise_pb2 as pb
from service.pb import likewise_pb2_grpc as pb_grpc
from service.pipeline import Priority
from service.servicer import Clock, Context, Engine, deadline_of, item_of, priority_of, vector_of
from service.view import Hit

MAX_TOP_K = 1000
MAX_DEPTH = 10_000
MAX_EXAMPLES = 64


class _Ask(NamedTuple):
    """A request that was found to be sound."""

    top_k: int
    min_score: float | None
    wanted: Filter | None
    group_size: int
    neighbours: int
    alpha: float
    offset: int
    group_by: tuple[str, ...]


class SearchService(pb_grpc.SearchServiceServicer):
    """likewise.v1.SearchService."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def Search(self, request: pb.SearchRequest, context: Context) -> pb.SearchResponse:  # noqa: N802
        """See the proto."""
        clock = Clock()
        engine = self._engine
        collection = engine.store.get(request.collection)
        ask = _ask(request)
        query, keys = await self._query(request, collection, context, clock)
        start = time.monotonic()
        response: pb.SearchResponse
        if ask.group_by or ask.neighbours:
            response = await engine.read(_answer, collection, query, keys, ask, request)
            engine.metrics.search_seconds.observe(time.monotonic() - start)
        else:
            response = await engine.searcher.submit(
                collection, query, ask.offset + ask.top_k, functools.partial(_page, collection, ask, request),
                ask.min_score, ask.wanted, keys, deadline_of(context),
            )  # fmt: skip
        clock.search = time.monotonic() - start
        response.timings.CopyFrom(clock.timings())
        return response

    async def _query(
        self, request: pb.SearchRequest, collection: Collection, context: Context, clock: Clock
    ) -> tuple[Embeddings, frozenset[str]]:
        """The vector [D] to look for, and the keys that are not to be found."""
        query = request.query
        priority = priority_of(request.priority, Priority.INTERACTIVE)
        if query.WhichOneof("kind") == "examples":
            examples = list(query.examples.examples)
            if not 1 <= len(examples) <= MAX_EXAMPLES:
                raise InvalidArgumentError(
                    f"the query has {len(examples)} examples, 1 to {MAX_EXAMPLES} are allowed",
                    "BAD_COUNT",
                    "query.examples",
                )
            weights = [each.weight if each.HasField("weight") else 1.0 for each in examples]
            path = "query.examples.examples[{}]"
            vectors, keys = await self._vectors(examples, path, collection, context, clock, priority)
            scale = max(map(abs, weights))
            mixed = np.asarray(weights, np.float64) / scale @ vectors if 0 < scale < math.inf else vectors[0] * math.nan
            if not np.linalg.norm(mixed) > 1e-6:
                raise InvalidArgumentError(
                    "the examples cancel each other out, or a weight is not finite: give other weights", "BAD_WEIGHTS",
                    "query.examples",
                )  # fmt: skip
            return (mixed / np.linalg.norm(mixed)).astype(np.float32), keys
        vectors, keys = await self._vectors([query], "query", collection, context, clock, priority)
        return vectors[0], keys

    async def _vectors(
        self,
        given: Sequence[pb.Query | pb.Example],
        path: str,
        collection: Collection,
        context: Context,
        clock: Clock,
        priority: Priority,
    ) -> tuple[Embeddings, frozenset[str]]:
        """Vectors [N, D] of what is given, and the keys among it. The pictures are embedded together."""
        rows: dict[int, Embeddings] = {}
        pictures = [i for i, each in enumerate(given) if each.WhichOneof("kind") == "image"]
        if pictures:
            contents = [given[i].image.content for i in pictures]
            fields = [f"{path.format(i)}.image.content" for i in pictures]
            embedded = await self._engine.embed(contents, fields, context, clock, priority)
            for i, found in zip(pictures, embedded, strict=True):
                if isinstance(found, ServiceError):
                    raise found
                rows[i] = found.vector
        keys = set()
        for i, each in enumerate(given):
            kind = each.WhichOneof("kind")
            if kind == "vector":
                rows[i] = vector_of(each.vector, collection, f"{path.format(i)}.vector")
            elif kind == "key":
                rows[i] = (await self._engine.read(collection.get, each.key)).vector
                keys.add(each.key)
            elif kind is None:
                raise InvalidArgumentError(
                    f"{path.format(i)} is missing: set image, vector or key", field=path.format(i)
                )
        return np.stack([rows[i] for i in range(len(given))]), frozenset(keys)


def _answer(
    collection: Collection, query: Embeddings, keys: frozenset[str], ask: _Ask, request: pb.SearchRequest
) -> pb.SearchResponse:
    """Search, and make the response: in a thread, as many items take their time."""
    rows = query[None]
    if ask.neighbours:
        rows = collection.expand(rows, ask.neighbours, ask.alpha, filters=[ask.wanted], leave_out=[keys])
    response = pb.SearchResponse(space_id=collection.space_id)
    if ask.group_by:
        groups = collection.search_groups(
            rows[0], ask.top_k, ask.group_by, ask.group_size, wanted=ask.wanted, leave_out=keys, min_score=ask.min_score
        )
        pictures = _thumbnails(collection, [hit for hits in groups for hit in hits], request)
        for number, hits in enumerate(groups):
            response.neighbors.extend(
                pb.Neighbor(item=item_of(h.row, pictures.get(h.row.id)), score=h.score, group=number) for h in hits
            )
        return response
    (hits,) = collection.search(rows, ask.offset + ask.top_k, ask.min_score, filters=ask.wanted, leave_out=[keys])
    return _page(collection, ask, request, hits)


def _page(collection: Collection, ask: _Ask, request: pb.SearchRequest, hits: list[Hit]) -> pb.SearchResponse:
    """The response from the neighbours up to the page's end."""
    response = pb.SearchResponse(space_id=collection.space_id)
    end = ask.offset + ask.top_k
    pictures = _thumbnails(collection, hits[ask.offset :], request)
    response.neighbors.extend(
        pb.Neighbor(item=item_of(h.row, pictures.get(h.row.id)), score=h.score) for h in hits[ask.offset :]
    )
    if len(hits) == end and end < MAX_DEPTH:
        response.next_page_token = _token(request, end)
    return response


def _thumbnails(collection: Collection, hits: Sequence[Hit], request: pb.SearchRequest) -> dict[int, bytes]:
    """By id, where the request asks for them."""
    return collection.thumbnails([hit.row.id for hit in hits]) if request.with_thumbnails else {}


def _ask(request: pb.SearchRequest) -> _Ask:
    """Raises `InvalidArgumentError` on what is out of range."""
    top_k = _within("top_k", request.top_k if request.HasField("top_k") else 10, MAX_TOP_K)
    min_score = request.min_score if request.HasField("min_score") else None
    if min_score is not None and not math.isfinite(min_score):
        raise InvalidArgumentError("min_score is not a finite number", "BAD_MIN_SCORE", "min_score")
    group_size = _within("group_size", request.group_size if request.HasField("group_size") else 1, 100)
    neighbours, alpha = 0, 3.0
    if request.HasField("expansion"):
        neighbours = _within("expansion.neighbors", request.expansion.neighbors, 100)
        alpha = request.expansion.alpha if request.expansion.HasField("alpha") else alpha
        if not 0 <= alpha <= 100:
            raise InvalidArgumentError(
                f"expansion.alpha is {alpha:g}, 0 to 100 are allowed", "BAD_ALPHA", "expansion.alpha"
            )
    offset = _offset(request)
    wanted = Filter.parse(request.filter) if request.filter.strip() else None
    group_by = payload_path(request.group_by) if request.group_by else ()
    if group_by is None:
        raise InvalidArgumentError(
            f"group_by {request.group_by[:60]!r} is no field of the payload: write one such as product or shop.name",
            "BAD_GROUP_BY", "group_by",
        )  # fmt: skip
    if group_by and top_k * group_size > MAX_DEPTH:
        raise InvalidArgumentError(
            f"{top_k} groups of {group_size} were asked for, {MAX_DEPTH:,} items are allowed",
            "BAD_GROUP_SIZE",
            "group_size",
        )
    return _Ask(min(top_k, MAX_DEPTH - offset), min_score, wanted, group_size, neighbours, alpha, offset, group_by)


def _within(name: str, found: int, limit: int) -> int:
    if not 1 <= found <= limit:
        raise InvalidArgumentError(
            f"{name} is {found}, 1 to {limit} are allowed", f"BAD_{name.rpartition('.')[2].upper()}", name,
            found=found, limit=limit,
        )  # fmt: skip
    return found


def _token(request: pb.SearchRequest, offset: int) -> str:
    """Where the next page begins, bound to the request that it continues."""
    return base64.urlsafe_b64encode(f"{offset}:{_digest(request)}".encode()).decode()


def _digest(request: pb.SearchRequest) -> str:
    bare = pb.SearchRequest()
    bare.CopyFrom(request)
    bare.ClearField("page_token")
    bare.ClearField("top_k")  # a page may be larger than the one before
    return hashlib.sha256(bare.SerializeToString(deterministic=True)).hexdigest()[:16]


def _offset(request: pb.SearchRequest) -> int:
    """Neighbours before this page."""
    if not request.page_token:
        return 0
    try:
        offset, _, digest = base64.urlsafe_b64decode(request.page_token).decode().partition(":")
        found = int(offset)
    except (binascii.Error, ValueError):
        found, digest = -1, ""
    if request.group_by or not 0 < found < MAX_DEPTH or digest != _digest(request):
        raise InvalidArgumentError(
            "the page token is not of this request: send the one that the page before returned, with the same request",
            "BAD_PAGE_TOKEN", "page_token",
        )  # fmt: skip
    return found
