"""A typed client; hides the generated code.

with Client("localhost:50051") as client:
    for neighbor in client.search("pictures", image=Path("query.jpg").read_bytes(), top_k=5):
        print(neighbor.key, neighbor.score)
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self, TypeVar

import grpc

from export.bundle import Embeddings, RefusalError
from service import messages
from service.config import ClientTls
from service.messages import (
    Call,
    CallError,
    Calls,
    CollectionInfo,
    EncoderInfo,
    Example,
    Expected,
    Item,
    Neighbor,
    NewItem,
    ReleaseInfo,
    SearchOptions,
)

__all__ = [
    "CallError",
    "Client",
    "CollectionInfo",
    "EncoderInfo",
    "Example",
    "Expected",
    "Item",
    "Neighbor",
    "NewItem",
    "ReleaseInfo",
    "SearchOptions",
]

DEFAULT_SERVER = "localhost:50051"
# Streams of a helper such as `embed_many` that are under way at a time: one is sent while the other is worked on.
STREAMS = 2

T = TypeVar("T")
R = TypeVar("R")


class Client:
    """Connections to a Likewise server. Thread-safe.

    Every method raises `CallError`: the server's refusal, UNAVAILABLE where it cannot be reached, DEADLINE_EXCEEDED where it
    takes too long. What was refused for a while (RetryInfo) and what did not arrive is tried again, up to four times, within
    the timeout and a budget; creating, deleting and taking a snapshot only where the server says that nothing was done.
    """

    def __init__(
        self, server: str = DEFAULT_SERVER, timeout: float = 30.0, max_message_mb: int = 64, *, connections: int = 1,
        key: str | None = None, tls: ClientTls | None = None,
    ) -> None:  # fmt: skip
        """`timeout` in seconds for each call, its tries together. `connections`: TCP connections that calls take in turn.
        `key`: API key, NAME.SECRET. `tls`: how the server is trusted; not encrypted where absent."""
        self.server = server
        self._timeout = timeout
        self._channels = [_channel(grpc, server, max_message_mb, tls) for _ in range(max(1, connections))]
        self._turn = itertools.count()
        self._metadata = [] if key is None else [("authorization", f"Bearer {key}")]
        self._retries = messages.Retries()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        for channel in self._channels:
            channel.close()

    def ready(self) -> bool:
        """Whether the server says that it serves (grpc.health.v1)."""
        return self._run(messages.ready())

    def encoder(self, space_id: str = "") -> EncoderInfo:
        """The server's own encoder, or that of a space."""
        return self._run(messages.encoder(space_id))

    def encoders(self) -> list[EncoderInfo]:
        """Every encoder that is loaded, the server's own first."""
        return self._run(messages.encoders())

    def embed(
        self, images: Sequence[bytes], *, space_id: str = "", collection: str = ""
    ) -> list[Embeddings | CallError]:
        """Unit vectors float32 [D] of encoded pictures, at most 256; a `CallError` in the place of each that failed. By the
        encoder of a space, or of a collection; the server's own where neither is named."""
        return self._run(messages.embed(images, space_id, collection))

    def embed_many(
        self, images: Iterable[bytes], *, space_id: str = "", collection: str = ""
    ) -> Iterator[Embeddings | CallError]:
        """The same for any number of pictures, in their order. No more than 200 of them are held at a time."""
        return self._many(images, messages.PICTURES, lambda some: messages.embed_some(some, space_id, collection))

    def search(
        self, collection: str, *, image: bytes | None = None, vector: Embeddings | Sequence[float] | None = None,
        key: str | None = None, examples: Sequence[Example] | None = None, top_k: int = 10, min_score: float | None = None,
        filter: str = "", group_by: str = "", group_size: int = 1, expand: int = 0, alpha: float = 3.0,
        with_thumbnails: bool = False, space_id: str = "",
    ) -> list[Neighbor]:  # fmt: skip
        """Neighbours of a picture, a vector, a stored item or several examples (give one of them), best first.

        `filter`: AIP-160, such as `color = red AND price < 10`. `group_by`: a payload field; `top_k` then counts groups.
        `expand`: move the query towards so many of its neighbours first. More than 1,000 neighbours come in pages.
        """
        options = SearchOptions(
            image=image, vector=vector, key=key, examples=examples, top_k=top_k, min_score=min_score, filter=filter,
            group_by=group_by, group_size=group_size, expand=expand, alpha=alpha, with_thumbnails=with_thumbnails,
            space_id=space_id,
        )  # fmt: skip
        return self._run(messages.search(collection, options))

    def search_many(self, collection: str, queries: Iterable[SearchOptions]) -> Iterator[list[Neighbor] | CallError]:
        """Any number of searches, such as `({"vector": v, "top_k": 5} for v in vectors)`, in their order; a `CallError` in
        the place of one that failed. `top_k` is at most 1,000."""
        return self._many(queries, messages.SEARCHES, lambda some: messages.search_some(collection, some))

    def upsert(self, collection: str, items: Sequence[NewItem], space_id: str = "") -> list[int | CallError]:
        """Insert or replace at most 256 items; a sequence number each, or a `CallError` in the place of one that failed."""
        return self._run(messages.upsert(collection, items, space_id))

    def upsert_many(self, collection: str, items: Iterable[NewItem], space_id: str = "") -> Iterator[int | CallError]:
        """The same for any number of items, in their order: of one key the last counts. What came back as a number is
        durable."""
        return self._many(items, messages.ITEMS, lambda some: messages.upsert_some(collection, some, space_id), 1)

    def delete(self, collection: str, keys: Sequence[str]) -> list[str]:
        """Delete items by key, at most 1000; returns the keys that did not exist."""
        return self._run(messages.delete(collection, keys))

    def get(self, collection: str, key: str, *, with_original: bool = False) -> Item:
        """One item; `with_original`: with its picture as it came, where the collection keeps them."""
        return self._run(messages.get(collection, key, with_original))

    def items(
        self, collection: str, *, filter: str = "", by_sequence: bool = False, with_vectors: bool = False
    ) -> Iterator[Item]:
        """Every item, by key or by its last write; `vector` is empty unless `with_vectors`. An item that is not written
        meanwhile comes once."""
        token = ""
        while True:
            page, token = self._run(messages.page_of(collection, token, filter, by_sequence, with_vectors))
            yield from page
            if not token:
                return

    def create_collection(
        self, name: str, *, keep_originals: bool = False, thumbnail_pixels: int = 0, space_id: str = ""
    ) -> CollectionInfo:
        """Make an empty collection. `keep_originals`: pictures that come as bytes are kept, for `get` and so that another
        encoder can embed them; `thumbnail_pixels`: longer side of thumbnails that are made of them, 32 to 1024."""
        return self._run(messages.create_collection(name, keep_originals, thumbnail_pixels, space_id))

    def collection(self, name: str) -> CollectionInfo:
        """One collection."""
        return self._run(messages.collection(name))

    def collections(self) -> list[CollectionInfo]:
        """Every collection, by name."""
        return self._run(messages.collections())

    def delete_collection(self, name: str) -> None:
        """Delete a collection, for good."""
        self._run(messages.delete_collection(name))

    def compact_collection(self, name: str) -> int:
        """Merge its segments; returns how many were merged. The server goes on when the timeout ends the call."""
        return self._run(messages.compact_collection(name))

    def snapshot_collection(self, name: str, snapshot: str) -> int:
        """Have a snapshot taken into a folder of the server; returns the sequence number of the last write in it."""
        return self._run(messages.snapshot_collection(name, snapshot))

    def prepare_release(
        self, collection: str, release: str, *, acceptance: Sequence[Expected] = (), min_overlap: float = 0.0
    ) -> ReleaseInfo:
        """Have a release loaded beside a collection, which catches up with it in the background: see `release`."""
        return self._run(messages.prepare_release(collection, release, acceptance, min_overlap))

    def release(self, collection: str) -> ReleaseInfo:
        """What a collection is served from, and what stands beside it."""
        return self._run(messages.release(collection))

    def switch_release(self, collection: str, release: str, *, leave_out: bool = False) -> ReleaseInfo:
        """Have a prepared release served from now on; `leave_out`: although it cannot hold some items."""
        return self._run(messages.switch_release(collection, release, leave_out))

    def roll_back_release(self, collection: str, *, leave_out: bool = False) -> ReleaseInfo:
        """Have served what was served before the last switch, with what was written since."""
        return self._run(messages.roll_back_release(collection, leave_out))

    def finish_release(self, collection: str) -> ReleaseInfo:
        """Have unloaded what stands beside a collection."""
        return self._run(messages.finish_release(collection))

    def _many(
        self, given: Iterable[T], size: int, calls: Callable[[Sequence[T]], Calls[list[R]]], streams: int = STREAMS
    ) -> Iterator[R]:  # fmt: skip
        """Some at a time, each lot as a stream of its own that is tried again as a whole."""
        remaining = iter(given)
        with ThreadPoolExecutor(streams, "stream") as pool:
            waiting: deque[Future[list[R]]] = deque()
            try:
                while some := list(itertools.islice(remaining, size)):
                    waiting.append(pool.submit(lambda some=some: self._run(calls(some))))  # type: ignore[misc]
                    if len(waiting) > streams:
                        yield from waiting.popleft().result()
                while waiting:
                    yield from waiting.popleft().result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _run(self, calls: Calls[T]) -> T:
        """Make the calls, and give their generator the responses."""
        try:
            call = next(calls)
            while True:
                call = calls.send(self._call(call))
        except StopIteration as end:
            value: T = end.value
            return value

    def _call(self, call: Call) -> Any:
        ends = time.monotonic() + self._timeout
        for attempt in itertools.count():
            try:
                response = self._tried(call, max(0.001, ends - time.monotonic()))
            except grpc.RpcError as e:
                error = messages.refused(self.server, e)
                delay = self._retries.delay(error, attempt, call.repeatable)
                if delay is None or time.monotonic() + delay >= ends:
                    raise error from None
                time.sleep(delay)
            else:
                self._retries.succeeded()
                return response
        raise AssertionError("unreachable")

    def _tried(self, call: Call, timeout: float) -> Any:
        channel = self._channels[next(self._turn) % len(self._channels)]
        streamed = isinstance(call.request, list)
        method: Any = (channel.stream_stream if streamed else channel.unary_unary)(
            call.method, request_serializer=_serialized, response_deserializer=call.response.FromString
        )
        if streamed:
            return list(method(iter(call.request), timeout=timeout, metadata=self._metadata))
        return method(call.request, timeout=timeout, metadata=self._metadata)


def _serialized(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return data


def _channel(kind: Any, server: str, max_message_mb: int, tls: ClientTls | None) -> Any:
    """A connection of `grpc` or `grpc.aio`. Raises `RefusalError` where the certificates cannot be read."""
    size = max_message_mb * 2**20
    options = [
        ("grpc.max_receive_message_length", size), ("grpc.max_send_message_length", size),
        ("grpc.use_local_subchannel_pool", 1),  # else several channels share one connection
    ]  # fmt: skip
    if tls is None or not (tls.on or tls.ca is not None or tls.certificate is not None):
        return kind.insecure_channel(server, options)
    try:
        files = [None if file is None else file.read_bytes() for file in (tls.ca, tls.key, tls.certificate)]
    except OSError as e:
        raise RefusalError(f"{e.filename} cannot be read ({e.strerror}): give the PEM files of --tls") from e
    return kind.secure_channel(server, grpc.ssl_channel_credentials(*files), options)
