"""The RPCs: message → call → message, one short method each."""

from __future__ import annotations

import asyncio
import functools
import json
import sys
import time
import traceback
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import grpc
import numpy as np
from google.protobuf import json_format
from google.protobuf.duration_pb2 import Duration
from google.protobuf.struct_pb2 import Struct

from export.bundle import Embeddings
from export.preprocess import UnreadablePictureError
from service.collection import Collection, check_key
from service.encoder import Encoder
from service.errors import (
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    PreconditionError,
    ServiceError,
    unreadable,
)
from service.index import gently
from service.metrics import Metrics
from service.pb import likewise_pb2 as pb
from service.pb import likewise_pb2_grpc as pb_grpc
from service.pipeline import Embedded, Pipeline, Priority
from service.reading import check_space, unit_rows
from service.records import NewRow
from service.searching import Searcher
from service.segment import StoredRow
from service.store import Store

MAX_ITEMS = 256
MAX_KEYS = 1000

Context = grpc.aio.ServicerContext[Any, Any]
T = TypeVar("T")


@dataclass
class Clock:
    """Times of one request, in seconds."""

    started: float = field(default_factory=time.monotonic)
    decode: float = 0.0
    queue: float = 0.0
    infer: float = 0.0
    search: float = 0.0

    def timings(self) -> pb.Timings:
        """As a message."""
        total = time.monotonic() - self.started
        return pb.Timings(
            total=_duration(total), decode=_duration(self.decode), queue=_duration(self.queue),
            infer=_duration(self.infer), search=_duration(self.search),
        )  # fmt: skip


class Engine:
    """What the services share: the encoder behind its pipeline, the store, and the threads that search and write."""

    def __init__(
        self, encoder: Encoder, pipeline: Pipeline, searcher: Searcher, store: Store, metrics: Metrics
    ) -> None:
        self.encoder, self.pipeline, self.searcher = encoder, pipeline, searcher
        self.store, self.metrics = store, metrics
        self._readers = ThreadPoolExecutor(encoder.runtime.threads, thread_name_prefix="read")
        self._writers = ThreadPoolExecutor(4, thread_name_prefix="write")
        self._upkeep: dict[str, asyncio.Task[Any]] = {}
        self._upkeep_after = 0.0

    async def embed(
        self,
        contents: list[bytes],
        fields: list[str],
        context: Context,
        clock: Clock,
        priority: Priority = Priority.INTERACTIVE,
        thumbnail: int | None = None,
    ) -> list[Embedded | ServiceError]:
        """What became of encoded pictures. Raises `QueueFullError` for all of them."""
        client, deadline = context.peer(), deadline_of(context)
        self.pipeline.admission.enter(client, len(contents))
        try:
            todo = [self.pipeline.submit(c, client, priority, deadline, thumbnail) for c in contents]
            outcomes = await asyncio.gather(*todo, return_exceptions=True)
        finally:
            self.pipeline.admission.leave(client, len(contents))
        return [self._outcome(each, path, clock) for each, path in zip(outcomes, fields, strict=True)]

    def _outcome(self, found: Embedded | BaseException, path: str, clock: Clock) -> Embedded | ServiceError:
        """Counted, and as the API says it."""
        if isinstance(found, Embedded):
            self.metrics.images.labels(outcome="ok").inc()
            clock.decode += found.decode_seconds
            clock.queue, clock.infer = max(clock.queue, found.queue_seconds), max(clock.infer, found.infer_seconds)
            return found
        if isinstance(found, UnreadablePictureError):
            found = unreadable(found, path)
        if not isinstance(found, ServiceError):
            raise found
        self.metrics.images.labels(outcome=found.reason).inc()
        return found

    async def read(self, call: Callable[..., T], *arguments: Any) -> T:
        """Run a blocking call that changes nothing in a thread: never behind a write's fsync."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, call, *arguments)

    async def write(self, call: Callable[..., T], *arguments: Any) -> T:
        """Run a blocking call of the store in a thread; a write that has begun is finished even if its caller leaves."""
        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._writers, call, *arguments))

    def maintain_when_due(self, collection: Collection) -> None:
        """Move fresh rows into a segment, and merge segments, in the background once there are many; one merge at a time."""
        if time.monotonic() < self._upkeep_after:
            return
        for name, due, call in (
            (f"flush of {collection.name}", collection.flush_due, collection.flush),
            ("merge", collection.merge_due, collection.compact),
            ("sweep of originals", collection.sweep_due, collection.sweep),
        ):
            if due and name not in self._upkeep:
                task = asyncio.create_task(self.write(gently, call))
                self._upkeep[name] = task
                task.add_done_callback(functools.partial(self._maintained, name, collection))

    def _maintained(self, name: str, collection: Collection, task: asyncio.Task[Any]) -> None:
        del self._upkeep[name]
        if task.cancelled():
            return
        if task.exception() is None:
            self.maintain_when_due(collection)  # a flush may make a merge due
        else:
            # Rows and segments stay as they were, searchable and durable; a later write tries again.
            self._upkeep_after = time.monotonic() + 60
            _log(f"the {name} failed: {type(task.exception()).__name__}: {task.exception()}")

    def close(self) -> None:
        """Wait for writes, then close the store and the threads."""
        self._upkeep_after = float("inf")
        for collection in self.store.all():
            collection.stop_merging()
        self._writers.shutdown(wait=True)
        self._readers.shutdown(wait=True)
        self.searcher.close()
        self.store.close()
        self.encoder.close()


class EncoderService(pb_grpc.EncoderServiceServicer):
    """likewise.v1.EncoderService."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def Embed(self, request: pb.EmbedRequest, context: Context) -> pb.EmbedResponse:  # noqa: N802
        """See the proto."""
        clock = Clock()
        _count(len(request.images), MAX_ITEMS, "images")
        fields = [f"images[{i}].content" for i in range(len(request.images))]
        found = await self._engine.embed(
            [image.content for image in request.images], fields, context, clock,
            priority_of(request.priority, Priority.INTERACTIVE),
        )  # fmt: skip
        results = [
            pb.EmbedResult(error=each.status())
            if isinstance(each, ServiceError)
            else pb.EmbedResult(embedding=pb.Vector(values=each.vector.tolist()))
            for each in found
        ]
        return pb.EmbedResponse(results=results, space_id=self._engine.encoder.space_id, timings=clock.timings())

    async def GetEncoder(self, request: pb.GetEncoderRequest, context: Context) -> pb.GetEncoderResponse:  # noqa: N802
        """See the proto."""
        encoder = self._engine.encoder
        spec = encoder.bundle.manifest.encoder
        return pb.GetEncoderResponse(
            encoder=pb.Encoder(
                space_id=encoder.space_id, dimensions=encoder.dim, image_size=spec.image_size, model=spec.model,
                provider=encoder.runtime.provider, max_image_bytes=encoder.limits.max_bytes,
                max_image_pixels=encoder.limits.max_pixels,
            )
        )  # fmt: skip


class CollectionService(pb_grpc.CollectionServiceServicer):
    """likewise.v1.CollectionService."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def CreateCollection(self, request: pb.CreateCollectionRequest, context: Context) -> pb.CreateCollectionResponse:  # noqa: N802  # fmt: skip
        """See the proto."""
        create = functools.partial(
            self._engine.store.create, request.name, keep_originals=request.keep_originals,
            thumbnail_pixels=request.thumbnail_pixels,
        )  # fmt: skip
        collection = await self._engine.write(create)
        return pb.CreateCollectionResponse(collection=_collection(collection))

    async def GetCollection(self, request: pb.GetCollectionRequest, context: Context) -> pb.GetCollectionResponse:  # noqa: N802
        """See the proto."""
        collection = self._engine.store.get(request.name)
        return pb.GetCollectionResponse(collection=_collection(collection))

    async def ListCollections(self, request: pb.ListCollectionsRequest, context: Context) -> pb.ListCollectionsResponse:  # noqa: N802  # fmt: skip
        """See the proto."""
        size = request.page_size if request.HasField("page_size") else 100
        if not 1 <= size <= 1000:
            raise InvalidArgumentError(f"page_size is {size}, 1 to 1000 are allowed", field="page_size")
        rest = [c for c in self._engine.store.all() if c.name > request.page_token]
        token = rest[size - 1].name if len(rest) > size else ""
        page = [_collection(c) for c in rest[:size]]
        return pb.ListCollectionsResponse(collections=page, next_page_token=token)

    async def DeleteCollection(self, request: pb.DeleteCollectionRequest, context: Context) -> pb.DeleteCollectionResponse:  # noqa: N802  # fmt: skip
        """See the proto."""
        await self._engine.write(self._engine.store.delete, request.name)
        return pb.DeleteCollectionResponse()

    async def UpsertItems(self, request: pb.UpsertItemsRequest, context: Context) -> pb.UpsertItemsResponse:  # noqa: N802
        """See the proto."""
        clock = Clock()
        engine = self._engine
        collection = engine.store.get(request.collection)
        _count(len(request.items), MAX_ITEMS, "items")
        given = [_given(item, i, collection, engine.encoder.origin) for i, item in enumerate(request.items)]
        pictures = [i for i, each in enumerate(given) if isinstance(each, _Given) and each.vector is None]
        refusal = engine.encoder.mixing_refusal(collection.origins) if pictures else None
        if refusal is not None:
            raise PreconditionError(refusal, reason="VARIANT_MISMATCH")
        if pictures:
            embedded = await engine.embed(
                [request.items[i].image.content for i in pictures],
                [f"items[{i}].image.content" for i in pictures],
                context,
                clock,
                priority_of(request.priority, Priority.BULK),
                collection.manifest.thumbnail_pixels or None,
            )
            for i, found in zip(pictures, embedded, strict=True):
                each = given[i]
                assert isinstance(each, _Given)
                if isinstance(found, ServiceError):
                    given[i] = found
                else:
                    given[i] = _Given(each.row._replace(thumbnail=found.thumbnail), found.vector)
        results = [
            pb.UpsertResult(error=each.status()) if isinstance(each, ServiceError) else pb.UpsertResult()
            for each in given
        ]
        good = [(i, each.row, each.vector) for i, each in enumerate(given) if isinstance(each, _Given)]
        if good:
            vectors = np.stack([vector for _, _, vector in good if vector is not None])
            came = [request.items[i].image.content or None for i, _, _ in good]
            sequences = await engine.write(collection.upsert, [row for _, row, _ in good], vectors, came)
            for (i, _, _), sequence in zip(good, sequences, strict=True):
                results[i].sequence = sequence
            engine.maintain_when_due(collection)
        return pb.UpsertItemsResponse(results=results, space_id=collection.space_id, timings=clock.timings())

    async def DeleteItems(self, request: pb.DeleteItemsRequest, context: Context) -> pb.DeleteItemsResponse:  # noqa: N802
        """See the proto."""
        collection = self._engine.store.get(request.collection)
        _count(len(request.keys), MAX_KEYS, "keys")
        missing = await self._engine.write(collection.delete, list(request.keys))
        self._engine.maintain_when_due(collection)
        deleted = len(set(request.keys)) - len(missing)
        return pb.DeleteItemsResponse(deleted_count=deleted, missing_keys=missing)

    async def GetItem(self, request: pb.GetItemRequest, context: Context) -> pb.GetItemResponse:  # noqa: N802
        """See the proto."""
        collection = self._engine.store.get(request.collection)
        item = await self._engine.read(_item, collection, request.key, request.with_original)
        return pb.GetItemResponse(item=item, space_id=collection.space_id)


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns `ServiceError` into google.rpc.Status, anything else into INTERNAL without its secrets, and counts both."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        """Wrap the unary methods of our own services."""
        handler = await continuation(details)
        if handler is None or not details.method.startswith("/likewise.") or handler.unary_unary is None:
            return handler
        method = details.method.removeprefix("/")
        inner = handler.unary_unary

        async def call(request: Any, context: Context) -> Any:
            start = time.monotonic()
            code, refused = "CANCELLED", None
            self._metrics.in_flight.inc()
            try:
                response = await inner(request, context)
                code = "OK"
            except ServiceError as e:
                code, refused = _code_name(e), e
            except Exception as e:
                code = "INTERNAL"
                refused = InternalError("the server failed on this request; its log has the traceback")
                _log(f"{method} failed with {type(e).__name__}: {e}\n{traceback.format_exc()}")
            finally:  # before the answer leaves: whoever has it finds it counted
                self._metrics.in_flight.dec()
                self._metrics.requests.labels(method=method, code=code).inc()
                self._metrics.request_seconds.labels(method=method).observe(time.monotonic() - start)
            if refused is not None:
                await _abort(context, refused)
            return response

        return grpc.unary_unary_rpc_method_handler(
            call, request_deserializer=handler.request_deserializer, response_serializer=handler.response_serializer
        )


def _log(text: str) -> None:
    print(f"likewise: {text}", file=sys.stderr, flush=True)


async def _abort(context: Context, error: ServiceError) -> None:
    status = error.status()
    code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
    await context.abort(code, status.message, (("grpc-status-details-bin", status.SerializeToString()),))


def _code_name(error: ServiceError) -> str:
    return next(code.name for code in grpc.StatusCode if code.value[0] == error.code)


def vector_of(vector: pb.Vector, collection: Collection, path: str) -> Embeddings:
    """[D], of length 1. Raises `ServiceError` on another space or length."""
    check_space(vector.space_id, collection.space_id)
    row: Embeddings = unit_rows(np.array(vector.values, np.float32), collection.dim, path)[0]
    return row


def item_of(row: StoredRow, thumbnail: bytes | None = None) -> pb.Item:
    """An item as the API gives it, without its vector."""
    payload = _struct(row.payload)
    return pb.Item(
        key=row.key, payload=payload, source_uri=row.source_uri, sequence=row.sequence, thumbnail=thumbnail or b""
    )


def _item(collection: Collection, key: str, with_original: bool) -> pb.Item:
    """An item with all that is known of it: in a thread, as files are read. Raises `ServiceError`."""
    row, vector, _ = collection.get(key)
    item = item_of(row, collection.thumbnails([row.id]).get(row.id))
    item.vector.values.extend(vector.tolist())
    if with_original:
        original = collection.original(row.id)
        if original is None:
            if collection.get(key).row.id != row.id:  # replaced meanwhile
                return _item(collection, key, with_original)
            why = "keeps no originals" if not collection.manifest.keep_originals else "keeps those that came as bytes"
            raise NotFoundError(
                f"there is no original of the item {key!r}: the collection {collection.name!r} {why}", "original", key
            )
        item.original = original
    return item


class _Given(NamedTuple):
    row: NewRow
    vector: Embeddings | None  # None: its picture is to be embedded


def _given(item: pb.NewItem, i: int, collection: Collection, encoder: str) -> _Given | ServiceError:
    """What an item gives to be stored, or why it cannot be. `encoder`: the origin of vectors made from pictures."""
    try:
        check_key(item.key, f"items[{i}].key")
        try:
            payload = _json(item.payload)
        except ValueError as e:
            raise InvalidArgumentError(
                f"the payload cannot be stored ({e}): send finite numbers", "BAD_PAYLOAD", f"items[{i}].payload"
            ) from None
        kind = item.WhichOneof("source")
        if kind is None:
            raise InvalidArgumentError("the item has no source: set image or vector", field=f"items[{i}].source")
        if kind == "image":
            return _Given(NewRow(item.key, payload, item.source_uri, encoder), None)
        vector = vector_of(item.vector, collection, f"items[{i}].vector")
        return _Given(NewRow(item.key, payload, item.source_uri), vector)
    except ServiceError as e:
        return e


def deadline_of(context: Context) -> float | None:
    """When the caller leaves, in seconds of `time.monotonic`."""
    remaining = context.time_remaining()
    return None if remaining is None else time.monotonic() + remaining


def priority_of(asked: pb.Priority.ValueType, otherwise: Priority) -> Priority:
    """What a request asks for."""
    if asked == pb.PRIORITY_UNSPECIFIED:
        return otherwise
    return Priority.BULK if asked == pb.PRIORITY_BULK else Priority.INTERACTIVE


def _count(found: int, limit: int, path: str) -> None:
    if not 1 <= found <= limit:
        raise InvalidArgumentError(
            f"the request has {found} {path}, 1 to {limit} are allowed", "BAD_COUNT", path, count=found, limit=limit
        )


def _collection(collection: Collection) -> pb.Collection:
    message = pb.Collection(
        name=collection.name, space_id=collection.space_id, dimensions=collection.dim, item_count=len(collection),
        sequence=collection.sequence, keep_originals=collection.manifest.keep_originals,
        thumbnail_pixels=collection.manifest.thumbnail_pixels,
    )  # fmt: skip
    message.create_time.FromDatetime(collection.manifest.created)
    return message


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(int(seconds * 1e9))
    return duration


def _struct(payload: str) -> Struct:
    return _kept_struct(payload) if len(payload) <= 4096 else _made_struct(payload)


def _made_struct(payload: str) -> Struct:
    struct = Struct()
    struct.update(json.loads(payload))
    return struct


# The same few small payloads come back again and again; a message copies what it is given.
_kept_struct = functools.lru_cache(4096)(_made_struct)


def _json(struct: Struct) -> str:
    return json.dumps(json_format.MessageToDict(struct))
