"""likewise.v1.SearchService: what is looked for, among which items, and how far."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import functools
import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from export.bundle import Embeddings
from service.errors import ExpiredError, InvalidArgumentError, QueueFullError, ServiceError
from service.filter import Filter, payload_path
from service.index import searching
from service.pb import likewise_pb2 as pb
from service.pb import likewise_pb2_grpc as pb_grpc
from service.pipeline import Priority
from service.reading import Readable
from service.served import Served
from service.servicer import (
    Clock,
    Context,
    Engine,
    as_refusal,
    check_count,
    deadline_of,
    priority_of,
    vector_of,
    write_item,
)
from service.streams import Load, Stream, Unordered
from service.view import Hit
from service.wire import Items, neighbors

MAX_TOP_K = 1000
MAX_DEPTH = 10_000
MAX_EXAMPLES = 64
MAX_REQUESTS = 1000
# Requests of a batch that go through the index together.
PART = 256
_NONE: frozenset[str] = frozenset()


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
        self._items = Items()

    async def Search(self, request: pb.SearchRequest, context: Context) -> pb.SearchResponse:  # noqa: N802
        """See the proto."""
        clock = Clock()
        with self._engine.using(request.collection) as served:
            ask = _ask(request)
            if _is_plain(request, ask):
                query, keys = vector_of(request.query.vector, served, "query.vector"), _NONE
            else:
                priority = priority_of(request.priority, Priority.INTERACTIVE)
                query, keys = await self._query(request, served, context, clock, priority)
            start = time.monotonic()
            response = await self._answered(request, served.collection, ask, query, keys, context)
        clock.search = time.monotonic() - start
        clock.write(response.timings)
        return response

    async def BatchSearch(self, request: pb.BatchSearchRequest, context: Context) -> pb.BatchSearchResponse:  # noqa: N802
        """See the proto."""
        with self._engine.using(request.collection) as served:
            return await self._batch(request, served, context)

    async def _batch(self, request: pb.BatchSearchRequest, served: Served, context: Context) -> pb.BatchSearchResponse:
        clock = Clock()
        engine, collection = self._engine, served.collection
        check_count(len(request.requests), MAX_REQUESTS, "requests")
        response = pb.BatchSearchResponse(space_id=collection.space_id)
        batch = _Batch(collection, [response.results.add() for _ in request.requests], self._items)
        others = []
        for i, each in enumerate(request.requests):
            try:
                if each.collection not in ("", collection.name):
                    raise InvalidArgumentError(
                        f"the batch is of {collection.name!r}, this request names {each.collection[:80]!r}: leave it out",
                        field="collection",
                    )
                each.collection = collection.name  # so that a page token goes on in Search
                ask = _ask(each)
                if _is_plain(each, ask):
                    vector = vector_of(each.query.vector, served, "query.vector")
                    batch.plain.append(_Plain(i, each, ask, vector))
                    continue
            except ServiceError as e:
                batch.results[i].error.CopyFrom(e.status())
                continue
            priority = priority_of(each.priority, priority_of(request.priority, Priority.BULK))
            others.append(asyncio.create_task(self._one_of(batch, served, i, each, ask, context, clock, priority)))
        start = time.monotonic()
        try:
            if batch.plain:
                await engine.read(batch.search, deadline_of(context))
                engine.metrics.search_seconds.observe(time.monotonic() - start)
            await asyncio.gather(*others)
        finally:
            for task in others:
                task.cancel()
        clock.search = time.monotonic() - start
        clock.write(response.timings)
        return response

    async def _one_of(
        self,
        batch: _Batch,
        served: Served,
        i: int,
        request: pb.SearchRequest,
        ask: _Ask,
        context: Context,
        clock: Clock,
        priority: Priority,
    ) -> None:
        """A request of a batch that needs more than the index."""
        try:
            query, keys = await self._query(request, served, context, clock, priority, patient=True)
            response = await self._answered(request, batch.collection, ask, query, keys, context, patient=True)
            batch.results[i].response.CopyFrom(response)
        except Exception as e:  # of this one alone
            batch.results[i].error.CopyFrom(as_refusal("BatchSearch", e).status())

    async def StreamSearch(self, requests: Any, context: Context) -> None:  # type: ignore[override]  # noqa: N802
        """See the proto."""
        engine = self._engine
        stream = Stream[pb.StreamSearchRequest, pb.StreamSearchResponse](context)
        answers = Unordered(stream.notice, _failed)

        async def begin(message: pb.StreamSearchRequest) -> Load:
            request, number = message.request, message.id
            load = Load(1, message.ByteSize())
            try:
                with contextlib.ExitStack() as used:
                    served = used.enter_context(engine.using(request.collection))
                    collection, ask = served.collection, _ask(request)
                    if _is_plain(request, ask):
                        query = vector_of(request.query.vector, served, "request.query.vector")
                        page = functools.partial(_stream_page, collection, ask, request, number)
                        work = await self._submitted(request, collection, ask, query, _NONE, context, page)
                    else:
                        work = asyncio.create_task(self._streamed(message, served, ask, context))
                    answered = used.pop_all()
            except ServiceError as e:
                answers.put(_failed(number, e), load)
                return load
            work.add_done_callback(lambda _: answered.close())
            answers.work(number, work, load)
            return load

        with engine.streaming(stream):
            try:
                await stream.run(begin, answers.collect)
            finally:
                answers.close()

    async def _streamed(
        self, message: pb.StreamSearchRequest, served: Served, ask: _Ask, context: Context
    ) -> pb.StreamSearchResponse:
        """The response to a request of a stream that needs more than the index."""
        request, clock = message.request, Clock()
        priority = priority_of(request.priority, Priority.BULK)
        query, keys = await self._query(request, served, context, clock, priority, patient=True)
        start = time.monotonic()
        response = await self._answered(request, served.collection, ask, query, keys, context, patient=True)
        clock.search = time.monotonic() - start
        clock.write(response.timings)
        return pb.StreamSearchResponse(id=message.id, response=response)

    async def _answered(
        self, request: pb.SearchRequest, collection: Readable, ask: _Ask, query: Embeddings, keys: frozenset[str],
        context: Context, patient: bool = False,
    ) -> pb.SearchResponse:  # fmt: skip
        """The neighbours of a query [D], as a response without timings."""
        if ask.group_by or ask.neighbours:
            start = time.monotonic()
            response = await self._engine.read(_answer, collection, query, keys, ask, request)
            self._engine.metrics.search_seconds.observe(time.monotonic() - start)
            return response
        page = functools.partial(_page, collection, ask, request)
        found: pb.SearchResponse = await (
            await self._submitted(request, collection, ask, query, keys, context, page, patient)
        )
        return found

    async def _submitted(
        self, request: pb.SearchRequest, collection: Readable, ask: _Ask, query: Embeddings, keys: frozenset[str],
        context: Context, page: Callable[[list[Any]], Any], patient: bool = True,
    ) -> asyncio.Future[Any]:  # fmt: skip
        """The search, as it waits for its turn; `page` makes its answer. Raises `QueueFullError`, or waits for room where it
        is `patient`."""
        while True:
            try:
                return self._engine.searcher.submit(
                    collection, query, ask.offset + ask.top_k, page, ask.min_score, ask.wanted, keys,
                    deadline_of(context), request.with_thumbnails, None if request.with_thumbnails else self._items,
                )  # fmt: skip
            except QueueFullError as e:
                if not patient:
                    raise
                await asyncio.sleep(e.retry_seconds or 0)

    async def _query(
        self, request: pb.SearchRequest, served: Served, context: Context, clock: Clock, priority: Priority,
        patient: bool = False,
    ) -> tuple[Embeddings, frozenset[str]]:  # fmt: skip
        """The vector [D] to look for, and the keys that are not to be found."""
        query = request.query
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
            vectors, keys = await self._vectors(examples, path, served, context, clock, priority, patient)
            scale = max(map(abs, weights))
            mixed = np.asarray(weights, np.float64) / scale @ vectors if 0 < scale < math.inf else vectors[0] * math.nan
            if not np.linalg.norm(mixed) > 1e-6:
                raise InvalidArgumentError(
                    "the examples cancel each other out, or a weight is not finite: give other weights", "BAD_WEIGHTS",
                    "query.examples",
                )  # fmt: skip
            return (mixed / np.linalg.norm(mixed)).astype(np.float32), keys
        vectors, keys = await self._vectors([query], "query", served, context, clock, priority, patient)
        return vectors[0], keys

    async def _vectors(
        self,
        given: Sequence[pb.Query | pb.Example],
        path: str,
        served: Served,
        context: Context,
        clock: Clock,
        priority: Priority,
        patient: bool,
    ) -> tuple[Embeddings, frozenset[str]]:
        """Vectors [N, D] of what is given, and the keys among it. The pictures are embedded together."""
        rows: dict[int, Embeddings] = {}
        pictures = [i for i, each in enumerate(given) if each.WhichOneof("kind") == "image"]
        if pictures:
            contents = [given[i].image.content for i in pictures]
            fields = [f"{path.format(i)}.image.content" for i in pictures]
            model = self._engine.models[served.collection.space_id]
            embedded = await self._engine.embed(model, contents, fields, context, clock, priority, patient=patient)
            for i, found in zip(pictures, embedded, strict=True):
                if isinstance(found, ServiceError):
                    raise found
                rows[i] = found.vector
        keys = set()
        for i, each in enumerate(given):
            kind = each.WhichOneof("kind")
            if kind == "vector":
                rows[i] = vector_of(each.vector, served, f"{path.format(i)}.vector")
            elif kind == "key":
                rows[i] = (await self._engine.read(served.collection.get, each.key)).vector
                keys.add(each.key)
            elif kind is None:
                raise InvalidArgumentError(
                    f"{path.format(i)} is missing: set image, vector or key", field=path.format(i)
                )
        return np.stack([rows[i] for i in range(len(given))]), frozenset(keys)


def _answer(
    collection: Readable, query: Embeddings, keys: frozenset[str], ask: _Ask, request: pb.SearchRequest
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
            _write_hits(response, hits, pictures, number)
        return response
    (hits,) = collection.search(rows, ask.offset + ask.top_k, ask.min_score, filters=ask.wanted, leave_out=[keys])
    return _page(collection, ask, request, hits)


def _page(
    collection: Readable, ask: _Ask, request: pb.SearchRequest, found: list[Hit] | list[tuple[bytes, float]]
) -> pb.SearchResponse:
    """The response from the neighbours up to the page's end: hits, where thumbnails are asked for, or serialised items."""
    response = pb.SearchResponse()
    _write_page(response, collection, ask, request, found)
    return response


def _stream_page(
    collection: Readable,
    ask: _Ask,
    request: pb.SearchRequest,
    number: int,
    found: list[Hit] | list[tuple[bytes, float]],
) -> pb.StreamSearchResponse:
    """The same as a response of a stream."""
    response = pb.StreamSearchResponse(id=number)
    _write_page(response.response, collection, ask, request, found)
    return response


def _write_page(
    response: pb.SearchResponse,
    collection: Readable,
    ask: _Ask,
    request: pb.SearchRequest,
    found: list[Any],
) -> None:
    shown = found[ask.offset :] if ask.offset else found
    if request.with_thumbnails or (shown and isinstance(shown[0], Hit)):
        _write_hits(response, shown, _thumbnails(collection, shown, request))
    else:
        response.MergeFromString(neighbors(shown))
    response.space_id = collection.space_id
    end = ask.offset + ask.top_k
    if len(found) == end and end < MAX_DEPTH:
        response.next_page_token = _token(request, end)


def _write_hits(
    response: pb.SearchResponse, hits: Sequence[Hit], pictures: Mapping[int, bytes], group: int | None = None
) -> None:
    add = response.neighbors.add
    for row, score in hits:
        neighbor = add()
        neighbor.score = score
        write_item(neighbor.item, row, pictures.get(row.id))
        if group is not None:
            neighbor.group = group


def _failed(number: int, error: BaseException) -> pb.StreamSearchResponse:
    return pb.StreamSearchResponse(id=number, error=as_refusal("StreamSearch", error).status())


def _is_plain(request: pb.SearchRequest, ask: _Ask) -> bool:
    """Whether the index alone can answer it."""
    return not ask.group_by and not ask.neighbours and request.query.WhichOneof("kind") == "vector"


class _Plain(NamedTuple):
    """A request of a batch that the index alone can answer."""

    number: int
    request: pb.SearchRequest
    ask: _Ask
    vector: Embeddings


@dataclass
class _Batch:
    """A batch on its way to its results."""

    collection: Readable
    results: list[pb.BatchSearchResult]
    items: Items
    plain: list[_Plain] = field(default_factory=list)

    def search(self, deadline: float | None) -> None:
        """Answer the plain requests, in a thread: those alike go through the index together."""
        with searching():
            self._search(deadline)

    def _search(self, deadline: float | None) -> None:
        alike: dict[tuple[int, float | None, bool], list[_Plain]] = {}
        for each in self.plain:
            ask = each.ask
            alike.setdefault((ask.offset + ask.top_k, ask.min_score, each.request.with_thumbnails), []).append(each)
        for (k, min_score, pictured), some in alike.items():
            for low in range(0, len(some), PART):
                part = some[low : low + PART]
                if deadline is not None and time.monotonic() >= deadline:
                    raise ExpiredError("the deadline passed before the whole batch was searched: allow more time")
                try:
                    vectors = np.stack([each.vector for each in part])
                    filters = [each.ask.wanted for each in part]
                    found: Any
                    if pictured:
                        found = self.collection.search(vectors, k, min_score, filters=filters)
                    else:
                        nothing = [_NONE] * len(part)
                        found = self.collection.nearest(vectors, k, min_score, filters, nothing, self.items)
                    for each, near in zip(part, found, strict=True):
                        response = self.results[each.number].response
                        _write_page(response, self.collection, each.ask, each.request, near)
                except Exception as e:  # what all of them have in common
                    for each in part:
                        self.results[each.number].error.CopyFrom(as_refusal("BatchSearch", e).status())


def _thumbnails(collection: Readable, hits: Sequence[Hit], request: pb.SearchRequest) -> dict[int, bytes]:
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
    size = request.top_k if request.HasField("top_k") else None
    token = request.page_token
    request.ClearField("page_token")
    request.ClearField("top_k")  # a page may be larger than the one before
    digest = hashlib.sha256(request.SerializeToString(deterministic=True)).hexdigest()[:16]
    if size is not None:
        request.top_k = size
    if token:
        request.page_token = token
    return digest


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
