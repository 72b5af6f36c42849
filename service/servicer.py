"""What the services share, and likewise.v1.EncoderService: message → call → message, one short method per RPC."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import time
import traceback
from collections.abc import Awaitable, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import grpc
import numpy as np
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.protobuf.struct_pb2 import Struct

from export.bundle import Embeddings
from export.preprocess import UnreadablePictureError
from service.call import client_of
from service.collection import Collection
from service.encoder import Encoder
from service.errors import InternalError, InvalidArgumentError, MismatchError, ServiceError, unreadable
from service.index import gently
from service.logs import LOG
from service.metrics import Metrics
from service.model import Model
from service.pb import likewise_pb2 as pb
from service.pb import likewise_pb2_grpc as pb_grpc
from service.pipeline import Embedded, Pipeline, Priority
from service.reading import check_space, unit_rows
from service.searching import Searcher
from service.segment import StoredRow
from service.served import Served
from service.store import Store
from service.streams import Load, Stream, Unordered

MAX_ITEMS = 256
# Pictures of a StreamEmbed that are worked on at a time.
PICTURES = 64

Context = grpc.aio.ServicerContext[Any, Any]
_CODES = {code.value[0]: code for code in grpc.StatusCode}
T = TypeVar("T")


@dataclass
class Clock:
    """Times of one request, in seconds."""

    started: float = field(default_factory=time.monotonic)
    decode: float = 0.0
    queue: float = 0.0
    infer: float = 0.0
    search: float = 0.0

    def write(self, timings: pb.Timings) -> None:
        """Into a response; what took no time is left out."""
        write_seconds(timings.total, time.monotonic() - self.started)
        for name in ("decode", "queue", "infer", "search"):
            seconds = getattr(self, name)
            if seconds:
                write_seconds(getattr(timings, name), seconds)


class Engine:
    """What the services share: the encoders behind their pipelines, the store, and the threads that search and write.

    Attributes: `models`, by space; the first is the server's own.
    """

    def __init__(
        self,
        models: dict[str, Model],
        searcher: Searcher,
        store: Store,
        metrics: Metrics,
        snapshots: Path | None = None,
    ) -> None:
        """`snapshots`: where clients may have them taken."""
        self.models, self.searcher = models, searcher
        self._asked_for = frozenset(models)  # spaces that stay loaded whatever is served
        self.store, self.metrics = store, metrics
        self._readers = ThreadPoolExecutor(self.encoder.runtime.threads, thread_name_prefix="read")
        self._writers = ThreadPoolExecutor(4, thread_name_prefix="write")
        self._chores = ThreadPoolExecutor(1, thread_name_prefix="chore")
        self._lookers = ThreadPoolExecutor(2, thread_name_prefix="look")
        self.snapshots = snapshots
        self.stopping = False
        self._upkeep: dict[str, asyncio.Task[Any]] = {}
        self._upkeep_after = 0.0
        self._streams: set[Stream[Any, Any]] = set()
        self._draining = False

    @property
    def encoder(self) -> Encoder:
        """The server's own."""
        return next(iter(self.models.values())).encoder

    @property
    def pipeline(self) -> Pipeline:
        """That of the server's own encoder."""
        return next(iter(self.models.values())).pipeline

    def model(self, space_id: str, collection: str = "") -> Model:
        """That of a space, or else of a collection, or else the server's own. Raises `MismatchError` where they are of two
        spaces, or none is of that space."""
        expected = self.store.get(collection).space_id if collection else space_id or next(iter(self.models))
        found = self.models.get(expected)
        if found is None or (space_id and space_id != expected):
            known = (
                f"the collection {collection!r} is of {expected}"
                if collection
                else f"known are {', '.join(self.models)}"
            )
            raise MismatchError(
                f"{space_id or expected} is asked for, {known}: name a space of ListEncoders", space_id or expected,
                expected if collection else next(iter(self.models)),
            )  # fmt: skip
        return found

    async def free_models(self, standing_by: Iterable[str] = ()) -> None:
        """Free the encoders whose space neither is served, nor stands by, nor was asked for at the start."""
        used = {collection.space_id for collection in self.store.all()} | self._asked_for | set(standing_by)
        for model in [self.models.pop(space) for space in set(self.models) - used]:
            await model.stop()

    def using(self, name: str) -> Served:
        """What a name stands for; inside `with` it stays open. Raises `NotFoundError`."""
        return self.store.served(name)

    async def embed(
        self,
        model: Model,
        contents: list[bytes],
        fields: list[str],
        context: Context,
        clock: Clock,
        priority: Priority = Priority.INTERACTIVE,
        thumbnail: int | None = None,
        patient: bool = False,
    ) -> list[Embedded | ServiceError]:
        """What became of encoded pictures. Raises `QueueFullError` for all of them, or waits where it is `patient`."""
        client, deadline = client_of(context), deadline_of(context)
        admission = model.pipeline.admission
        with model.uses:
            if patient:
                await admission.enter_patiently(client, len(contents))
            else:
                model.pipeline.enter(client, len(contents), priority, deadline)
            try:
                todo = [model.pipeline.submit(c, client, priority, deadline, thumbnail) for c in contents]
                outcomes = await asyncio.gather(*todo, return_exceptions=True)
            finally:
                admission.leave(client, len(contents))
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

    async def look(self, call: Callable[..., T], *arguments: Any) -> T:
        """Run what keeps up with another process in a thread of its own."""
        return await asyncio.get_running_loop().run_in_executor(self._lookers, call, *arguments)

    async def write(self, call: Callable[..., T], *arguments: Any) -> T:
        """Run a blocking call of the store in a thread; a write that has begun is finished even if its caller leaves."""
        return await _whole(asyncio.get_running_loop().run_in_executor(self._writers, call, *arguments))

    async def write_to(self, served: Served, call: Callable[..., T], *arguments: Any) -> T:
        """`write` to a collection that a name stands for. Raises `MovedError` where it no longer does: nothing was done."""
        await served.writable()
        with contextlib.ExitStack() as inside:
            inside.enter_context(served.uses)
            inside.enter_context(served.writes)
            work = asyncio.get_running_loop().run_in_executor(self._writers, call, *arguments)
            left = inside.pop_all()
        work.add_done_callback(lambda _: left.close())  # not before, even if the caller leaves
        return await _whole(work)

    async def chore(self, call: Callable[..., T], *arguments: Any) -> T:
        """Run a call that takes long, gently, after those before it; it is finished even if its caller leaves."""
        work = functools.partial(gently, functools.partial(call, *arguments))
        return await _whole(asyncio.get_running_loop().run_in_executor(self._chores, work))

    @contextlib.contextmanager
    def streaming(self, stream: Stream[Any, Any]) -> Iterator[None]:
        """A stream that is told when the server drains."""
        self._streams.add(stream)
        if self._draining:
            stream.drain()
        try:
            yield
        finally:
            self._streams.discard(stream)

    def drain(self) -> None:
        """Streams read no more, answer what they have read, and end: they would hold a stop up for ever."""
        self._draining = True
        for stream in self._streams:
            stream.drain()

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
        self.stopping = True
        for collection in self.store.all():
            if isinstance(collection, Collection):
                collection.stop_merging()
        self._chores.shutdown(wait=True, cancel_futures=True)
        self._writers.shutdown(wait=True)
        self._readers.shutdown(wait=True)
        self._lookers.shutdown(wait=True)
        self.searcher.close()
        self.store.close()
        for model in self.models.values():
            model.close()


async def _whole(work: asyncio.Future[T]) -> T:
    """Its result; if the caller leaves it is finished all the same, and nobody hears of its failure."""
    work.add_done_callback(lambda done: done.cancelled() or done.exception())
    return await asyncio.shield(work)


class EncoderService(pb_grpc.EncoderServiceServicer):
    """likewise.v1.EncoderService."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def Embed(self, request: pb.EmbedRequest, context: Context) -> pb.EmbedResponse:  # noqa: N802
        """See the proto."""
        clock = Clock()
        check_count(len(request.images), MAX_ITEMS, "images")
        model = self._engine.model(request.space_id, request.collection)
        fields = [f"images[{i}].content" for i in range(len(request.images))]
        found = await self._engine.embed(
            model, [image.content for image in request.images], fields, context, clock,
            priority_of(request.priority, Priority.INTERACTIVE),
        )  # fmt: skip
        results = [
            pb.EmbedResult(error=each.status())
            if isinstance(each, ServiceError)
            else pb.EmbedResult(embedding=pb.Vector(values=each.vector.tolist()))
            for each in found
        ]
        response = pb.EmbedResponse(results=results, space_id=model.space_id)
        clock.write(response.timings)
        return response

    async def StreamEmbed(self, requests: Any, context: Context) -> None:  # type: ignore[override]  # noqa: N802
        """See the proto."""
        engine = self._engine
        stream = Stream[pb.StreamEmbedRequest, pb.StreamEmbedResponse](context, PICTURES)
        answers = Unordered(stream.notice, self._failed)

        async def begin(request: pb.StreamEmbedRequest) -> Load:
            load = Load(1, len(request.image.content))
            answers.work(request.id, asyncio.create_task(self._embedded(request, context)), load)
            return load

        with engine.streaming(stream):
            try:
                await stream.run(begin, answers.collect)
            finally:
                answers.close()

    async def _embedded(self, request: pb.StreamEmbedRequest, context: Context) -> pb.StreamEmbedResponse:
        model = self._engine.model(request.space_id, request.collection)
        (found,) = await self._engine.embed(
            model, [request.image.content], ["image.content"], context, Clock(),
            priority_of(request.priority, Priority.BULK), patient=True,
        )  # fmt: skip
        if isinstance(found, ServiceError):
            return self._failed(request.id, found)
        response = pb.StreamEmbedResponse(id=request.id, space_id=model.space_id)
        response.embedding.values.extend(found.vector.tolist())
        return response

    def _failed(self, number: int, error: BaseException) -> pb.StreamEmbedResponse:
        return pb.StreamEmbedResponse(id=number, error=as_refusal("StreamEmbed", error).status())

    async def GetEncoder(self, request: pb.GetEncoderRequest, context: Context) -> pb.GetEncoderResponse:  # noqa: N802
        """See the proto."""
        return pb.GetEncoderResponse(encoder=_encoder(self._engine.model(request.space_id).encoder))

    async def ListEncoders(self, request: pb.ListEncodersRequest, context: Context) -> pb.ListEncodersResponse:  # noqa: N802
        """See the proto."""
        return pb.ListEncodersResponse(encoders=[_encoder(model.encoder) for model in self._engine.models.values()])


def _encoder(encoder: Encoder) -> pb.Encoder:
    spec = encoder.bundle.manifest.encoder
    return pb.Encoder(
        space_id=encoder.space_id, dimensions=encoder.dim, image_size=spec.image_size, model=spec.model,
        provider=encoder.runtime.provider, max_image_bytes=encoder.limits.max_bytes,
        max_image_pixels=encoder.limits.max_pixels,
    )  # fmt: skip


def watched(
    method: str, inner: Callable[[Any, Context], Awaitable[Any]], metrics: Metrics
) -> Callable[[Any, Context], Awaitable[Any]]:
    """A method that turns `ServiceError` into google.rpc.Status, anything else into INTERNAL without its secrets, and counts
    both."""
    seconds = metrics.request_seconds.labels(method=method)
    fine = metrics.requests.labels(method=method, code="OK")

    async def call(request: Any, context: Context) -> Any:
        start = time.monotonic()
        code, refused, response = "CANCELLED", None, None
        metrics.in_flight.inc()
        try:
            if isinstance(request, ServiceError):
                raise request
            response = await inner(request, context)
            code = "OK"
        except Exception as e:
            if not context.done():  # else the caller has left, and whatever was being written to it failed
                refused = as_refusal(method, e)
                code = code_name(refused)
        finally:  # before the answer leaves: whoever has it finds it counted
            metrics.in_flight.dec()
            (fine if code == "OK" else metrics.requests.labels(method=method, code=code)).inc()
            seconds.observe(time.monotonic() - start)
        if refused is not None:
            await abort(context, refused)
        return response

    return call


def lenient(parse: Callable[[bytes], Any], streaming: bool) -> Callable[[bytes], Any]:
    """gRPC answers UNKNOWN where parsing a request fails: a refusal of ours instead, as the request, or raised where a
    stream is read."""

    def parsed(message: bytes) -> Any:
        try:
            return parse(message)
        except DecodeError:
            refusal = InvalidArgumentError(
                "the message cannot be parsed: send one that is encoded as likewise.proto says, with text in UTF-8"
            )
            if streaming:
                raise refusal from None
            return refusal

    return parsed


def as_refusal(method: str, error: BaseException) -> ServiceError:
    """An error as the API says it; a fault of ours goes to the log, without its secrets to the caller."""
    if isinstance(error, ServiceError):
        return error
    trace = "".join(traceback.format_exception(error))
    _log(f"{method} failed with {type(error).__name__}: {error}\n{trace}")
    return InternalError("the server failed on this request; its log has the traceback")


def _log(text: str) -> None:
    LOG.error("%s", text, extra={"event": "failure"})


async def abort(context: Context, error: ServiceError) -> None:
    """End a call with the API's status."""
    status = error.status()
    details = ("grpc-status-details-bin", status.SerializeToString())
    await context.abort(_CODES[status.code], status.message, (*context.trailing_metadata(), details))


def code_name(error: ServiceError) -> str:
    """Of its gRPC status, such as NOT_FOUND."""
    return _CODES[error.code].name


def vector_of(vector: pb.Vector, served: Served, path: str) -> Embeddings:
    """[D], of length 1. Raises `ServiceError` on another space or length."""
    collection = served.collection
    check_space(vector.space_id, collection.space_id)
    served.check_space(vector.space_id, path)
    row: Embeddings = np.array(vector.values, np.float32)
    with np.errstate(over="ignore"):  # such a row is no unit, and `unit_rows` refuses or scales it
        if len(row) == collection.dim and abs(float(row @ row) - 1) < 1e-5:
            return row  # as most are; `unit_rows` takes ten times as long
    unit: Embeddings = unit_rows(row, collection.dim, path)[0]
    return unit


def item_of(row: StoredRow, thumbnail: bytes | None = None) -> pb.Item:
    """An item as the API gives it, without its vector."""
    item = pb.Item()
    write_item(item, row, thumbnail)
    return item


def write_item(item: pb.Item, row: StoredRow, thumbnail: bytes | None = None) -> None:
    """The same into a message that is part of another: setting its fields one by one is the fastest way."""
    item.key = row.key
    item.payload.CopyFrom(_struct(row.payload))
    item.sequence = row.sequence
    if row.source_uri:
        item.source_uri = row.source_uri
    if thumbnail:
        item.thumbnail = thumbnail


def deadline_of(context: Context) -> float | None:
    """When the caller leaves, in seconds of `time.monotonic`."""
    remaining = context.time_remaining()
    return None if remaining is None else time.monotonic() + remaining


def priority_of(asked: pb.Priority.ValueType, otherwise: Priority) -> Priority:
    """What a request asks for."""
    if asked == pb.PRIORITY_UNSPECIFIED:
        return otherwise
    return Priority.BULK if asked == pb.PRIORITY_BULK else Priority.INTERACTIVE


def check_count(found: int, limit: int, path: str) -> None:
    if not 1 <= found <= limit:
        raise InvalidArgumentError(
            f"the request has {found} {path}, 1 to {limit} are allowed", "BAD_COUNT", path, count=found, limit=limit
        )


def write_seconds(duration: Duration, seconds: float) -> None:
    """A time into a message."""
    whole = int(seconds)
    duration.nanos = int((seconds - whole) * 1e9)
    if whole:
        duration.seconds = whole


def _struct(payload: str) -> Struct:
    return _kept_struct(payload) if len(payload) <= 4096 else _made_struct(payload)


def _made_struct(payload: str) -> Struct:
    struct = Struct()
    struct.update(json.loads(payload))
    return struct


# The same few small payloads come back again and again; a message copies what it is given.
_kept_struct = functools.lru_cache(4096)(_made_struct)
