"""The typed client for asyncio: `Client`, method for method.

async with AsyncClient("localhost:50051") as client:
    neighbors = await client.search("pictures", image=data, top_k=5)
    async for vector in client.embed_many(pictures):
        ...
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Sequence
from typing import Any, Self, TypeVar, Unpack

import grpc

from export.bundle import Embeddings
from service import messages
from service.client import DEFAULT_SERVER, STREAMS, _channel, _serialized
from service.config import ClientTls
from service.messages import (
    Call,
    CallError,
    Calls,
    CollectionInfo,
    EncoderInfo,
    Expected,
    Item,
    Neighbor,
    NewItem,
    ReleaseInfo,
    SearchOptions,
)

T = TypeVar("T")
R = TypeVar("R")


class AsyncClient:
    """Connections to a Likewise server, for one event loop. Every method raises `CallError`, and tries again, as those of
    `Client` do. Cancelling a task cancels its call on the server."""

    def __init__(
        self, server: str = DEFAULT_SERVER, timeout: float = 30.0, max_message_mb: int = 64, *, connections: int = 1,
        key: str | None = None, tls: ClientTls | None = None,
    ) -> None:  # fmt: skip
        """As `Client`; inside a running event loop."""
        self.server = server
        self._timeout = timeout
        self._channels = [_channel(grpc.aio, server, max_message_mb, tls) for _ in range(max(1, connections))]
        self._turn = itertools.count()
        self._metadata = [] if key is None else [("authorization", f"Bearer {key}")]
        self._retries = messages.Retries()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        for channel in self._channels:
            await channel.close()

    async def ready(self) -> bool:
        """Whether the server says that it serves (grpc.health.v1)."""
        return await self._run(messages.ready())

    async def encoder(self, space_id: str = "") -> EncoderInfo:
        """The server's own encoder, or that of a space."""
        return await self._run(messages.encoder(space_id))

    async def encoders(self) -> list[EncoderInfo]:
        """Every encoder that is loaded, the server's own first."""
        return await self._run(messages.encoders())

    async def embed(
        self, images: Sequence[bytes], *, space_id: str = "", collection: str = ""
    ) -> list[Embeddings | CallError]:
        """Unit vectors float32 [D] of encoded pictures, at most 256; a `CallError` in the place of each that failed. By the
        encoder of a space, or of a collection; the server's own where neither is named."""
        return await self._run(messages.embed(images, space_id, collection))

    def embed_many(
        self, images: Iterable[bytes] | AsyncIterable[bytes], *, space_id: str = "", collection: str = ""
    ) -> AsyncIterator[Embeddings | CallError]:
        """The same for any number of pictures, in their order. No more than 200 of them are held at a time."""
        return self._many(images, messages.PICTURES, lambda some: messages.embed_some(some, space_id, collection))

    async def search(self, collection: str, **options: Unpack[SearchOptions]) -> list[Neighbor]:
        """Neighbours of a picture, a vector, a stored item or several examples, best first: see `Client.search`."""
        return await self._run(messages.search(collection, options))

    def search_many(
        self, collection: str, queries: Iterable[SearchOptions] | AsyncIterable[SearchOptions]
    ) -> AsyncIterator[list[Neighbor] | CallError]:
        """Any number of searches, in their order: see `Client.search_many`."""
        return self._many(queries, messages.SEARCHES, lambda some: messages.search_some(collection, some))

    async def upsert(self, collection: str, items: Sequence[NewItem], space_id: str = "") -> list[int | CallError]:
        """Insert or replace at most 256 items; a sequence number each, or a `CallError` in the place of one that failed."""
        return await self._run(messages.upsert(collection, items, space_id))

    def upsert_many(
        self, collection: str, items: Iterable[NewItem] | AsyncIterable[NewItem], space_id: str = ""
    ) -> AsyncIterator[int | CallError]:
        """The same for any number of items, in their order: see `Client.upsert_many`."""
        return self._many(items, messages.ITEMS, lambda some: messages.upsert_some(collection, some, space_id), 1)

    async def delete(self, collection: str, keys: Sequence[str]) -> list[str]:
        """Delete items by key, at most 1000; returns the keys that did not exist."""
        return await self._run(messages.delete(collection, keys))

    async def get(self, collection: str, key: str, *, with_original: bool = False) -> Item:
        """One item; `with_original`: with its picture as it came, where the collection keeps them."""
        return await self._run(messages.get(collection, key, with_original))

    async def items(
        self, collection: str, *, filter: str = "", by_sequence: bool = False, with_vectors: bool = False
    ) -> AsyncIterator[Item]:
        """Every item, by key or by its last write: see `Client.items`."""
        token = ""
        while True:
            page, token = await self._run(messages.page_of(collection, token, filter, by_sequence, with_vectors))
            for item in page:
                yield item
            if not token:
                return

    async def create_collection(
        self, name: str, *, keep_originals: bool = False, thumbnail_pixels: int = 0, space_id: str = ""
    ) -> CollectionInfo:
        """Make an empty collection: see `Client.create_collection`."""
        return await self._run(messages.create_collection(name, keep_originals, thumbnail_pixels, space_id))

    async def collection(self, name: str) -> CollectionInfo:
        """One collection."""
        return await self._run(messages.collection(name))

    async def collections(self) -> list[CollectionInfo]:
        """Every collection, by name."""
        return await self._run(messages.collections())

    async def delete_collection(self, name: str) -> None:
        """Delete a collection, for good."""
        await self._run(messages.delete_collection(name))

    async def compact_collection(self, name: str) -> int:
        """Merge its segments; returns how many were merged. The server goes on when the timeout ends the call."""
        return await self._run(messages.compact_collection(name))

    async def snapshot_collection(self, name: str, snapshot: str) -> int:
        """Have a snapshot taken into a folder of the server; returns the sequence number of the last write in it."""
        return await self._run(messages.snapshot_collection(name, snapshot))

    async def prepare_release(
        self, collection: str, release: str, *, acceptance: Sequence[Expected] = (), min_overlap: float = 0.0
    ) -> ReleaseInfo:
        """Have a release loaded beside a collection, which catches up with it in the background: see `release`."""
        return await self._run(messages.prepare_release(collection, release, acceptance, min_overlap))

    async def release(self, collection: str) -> ReleaseInfo:
        """What a collection is served from, and what stands beside it."""
        return await self._run(messages.release(collection))

    async def switch_release(self, collection: str, release: str, *, leave_out: bool = False) -> ReleaseInfo:
        """Have a prepared release served from now on; `leave_out`: although it cannot hold some items."""
        return await self._run(messages.switch_release(collection, release, leave_out))

    async def roll_back_release(self, collection: str, *, leave_out: bool = False) -> ReleaseInfo:
        """Have served what was served before the last switch, with what was written since."""
        return await self._run(messages.roll_back_release(collection, leave_out))

    async def finish_release(self, collection: str) -> ReleaseInfo:
        """Have unloaded what stands beside a collection."""
        return await self._run(messages.finish_release(collection))

    async def _many(
        self,
        given: Iterable[T] | AsyncIterable[T],
        size: int,
        calls: Callable[[Sequence[T]], Calls[list[R]]],
        streams: int = STREAMS,
    ) -> AsyncIterator[R]:
        """Some at a time, each lot as a stream of its own that is tried again as a whole."""
        waiting: deque[asyncio.Task[list[R]]] = deque()
        try:
            async for some in _lots(given, size):
                waiting.append(asyncio.create_task(self._run(calls(some))))
                if len(waiting) == streams:
                    for each in await waiting.popleft():
                        yield each
            while waiting:
                for each in await waiting.popleft():
                    yield each
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    async def _run(self, calls: Calls[T]) -> T:
        """Make the calls, and give their generator the responses."""
        try:
            call = next(calls)
            while True:
                call = calls.send(await self._call(call))
        except StopIteration as end:
            value: T = end.value
            return value

    async def _call(self, call: Call) -> Any:
        ends = time.monotonic() + self._timeout
        for attempt in itertools.count():
            try:
                response = await self._tried(call, max(0.001, ends - time.monotonic()))
            except grpc.RpcError as e:
                error = messages.refused(self.server, e)
                delay = self._retries.delay(error, attempt, call.repeatable)
                if delay is None or time.monotonic() + delay >= ends:
                    raise error from None
                await asyncio.sleep(delay)
            else:
                self._retries.succeeded()
                return response
        raise AssertionError("unreachable")

    async def _tried(self, call: Call, timeout: float) -> Any:
        channel = self._channels[next(self._turn) % len(self._channels)]
        streamed = isinstance(call.request, list)
        method: Any = (channel.stream_stream if streamed else channel.unary_unary)(
            call.method, request_serializer=_serialized, response_deserializer=call.response.FromString
        )
        if streamed:
            return [each async for each in method(iter(call.request), timeout=timeout, metadata=self._metadata)]
        return await method(call.request, timeout=timeout, metadata=self._metadata)


async def _lots(given: Iterable[T] | AsyncIterable[T], size: int) -> AsyncIterator[list[T]]:
    """So many at a time."""
    some: list[T] = []
    if isinstance(given, AsyncIterable):
        async for each in given:
            some.append(each)
            if len(some) == size:
                yield some
                some = []
    else:
        for each in given:
            some.append(each)
            if len(some) == size:
                yield some
                some = []
    if some:
        yield some
