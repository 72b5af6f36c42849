"""A typed client; hides the generated code.

with Client("localhost:50051") as client:
    for neighbor in client.search("pictures", image=Path("query.jpg").read_bytes(), top_k=5):
        print(neighbor.key, neighbor.score)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

import grpc
import numpy as np
from google.protobuf import json_format
from google.protobuf.struct_pb2 import Struct
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from export.bundle import Embeddings
from service.pb import likewise_pb2 as pb
from service.pb import likewise_pb2_grpc as pb_grpc

DEFAULT_SERVER = "localhost:50051"
PAGE = 1000
MAX_NEIGHBORS = 10_000


class CallError(Exception):
    """The server refused a call, or could not be reached. The message is the server's sentence.

    Attributes: `code` (name of the gRPC status, such as NOT_FOUND), `reason` (UPPER_SNAKE, '' where the server did not
    answer), `metadata`, `retry_seconds` (when the server says that trying again may help).
    """

    def __init__(
        self, message: str, code: str, reason: str = "", metadata: Mapping[str, str] | None = None,
        retry_seconds: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.retry_seconds = retry_seconds


class Neighbor(NamedTuple):
    """A similar item."""

    key: str
    score: float
    payload: dict[str, Any]
    source_uri: str
    group: int | None = None
    """Number of its group, from 0, in a grouped search."""
    thumbnail: bytes | None = None
    """JPEG, where it was asked for and there is one."""


class Example(NamedTuple):
    """One of several things to look for: `image` (encoded bytes), `vector` (float32 [D]) or `key` of a stored item."""

    image: bytes | None = None
    vector: Embeddings | Sequence[float] | None = None
    key: str | None = None
    weight: float = 1.0
    """How much it counts; negative for what neighbours should be unlike."""


class Item(NamedTuple):
    """A stored item; `vector` is float32 [D]."""

    key: str
    vector: Embeddings
    payload: dict[str, Any]
    source_uri: str
    sequence: int
    thumbnail: bytes | None = None
    """JPEG, where there is one."""
    original: bytes | None = None
    """The encoded picture as it came, where it was asked for."""


class NewItem(NamedTuple):
    """Something to store: with `image` (encoded bytes) or `vector` (float32 [D])."""

    key: str
    image: bytes | None = None
    vector: Embeddings | Sequence[float] | None = None
    payload: Mapping[str, Any] | None = None
    source_uri: str = ""


class CollectionInfo(NamedTuple):
    """What a collection is."""

    name: str
    space_id: str
    dimensions: int
    item_count: int
    sequence: int
    keep_originals: bool = False
    """Whether pictures that come as bytes are kept."""
    thumbnail_pixels: int = 0
    """Longer side of the thumbnails that are made of such pictures; 0: none."""


class EncoderInfo(NamedTuple):
    """What embeds the pictures."""

    space_id: str
    dimensions: int
    image_size: int
    model: str
    provider: str


class Client:
    """A connection to a Likewise server. Thread-safe. Every method raises `CallError`."""

    def __init__(self, server: str = DEFAULT_SERVER, timeout: float = 30.0, max_message_mb: int = 64) -> None:
        """`timeout` in seconds for each call."""
        self.server = server
        self._timeout = timeout
        size = max_message_mb * 2**20
        options = [("grpc.max_receive_message_length", size), ("grpc.max_send_message_length", size)]
        self._channel = grpc.insecure_channel(server, options)
        self._encoder = pb_grpc.EncoderServiceStub(self._channel)
        self._search = pb_grpc.SearchServiceStub(self._channel)
        self._collections = pb_grpc.CollectionServiceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def ready(self) -> bool:
        """Whether the server says that it serves (grpc.health.v1)."""
        response = self._call(self._health.Check, health_pb2.HealthCheckRequest())
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)

    def encoder(self) -> EncoderInfo:
        """The server's encoder."""
        e = self._call(self._encoder.GetEncoder, pb.GetEncoderRequest()).encoder
        return EncoderInfo(e.space_id, e.dimensions, e.image_size, e.model, e.provider)

    def embed(self, images: Sequence[bytes]) -> list[Embeddings | CallError]:
        """Unit vectors float32 [D] of encoded pictures, at most 256; a `CallError` in the place of each that failed."""
        request = pb.EmbedRequest(images=[pb.Image(content=image) for image in images])
        results = self._call(self._encoder.Embed, request).results
        return [_error(r.error) if r.HasField("error") else np.array(r.embedding.values, np.float32) for r in results]

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
        if sum(given is not None for given in (image, vector, key, examples)) > 1:
            raise CallError(
                "several of image, vector, key and examples were given: give one", "INVALID_ARGUMENT", "BAD_REQUEST"
            )
        limit = PAGE if group_by else MAX_NEIGHBORS
        if top_k > limit:
            raise CallError(
                f"top_k is {top_k}, 1 to {limit} are allowed: ask for fewer", "INVALID_ARGUMENT", "BAD_TOP_K"
            )
        with _as_call_error():
            query = pb.Query(
                image=None if image is None else pb.Image(content=image),
                vector=None if vector is None else _vector(vector, space_id),
            )
            if key is not None:
                query.key = key
            if examples is not None:
                query.examples.SetInParent()
                query.examples.examples.extend(_example(each, space_id) for each in examples)
            request = pb.SearchRequest(
                collection=collection, query=query, top_k=top_k, min_score=min_score, filter=filter, group_by=group_by,
                group_size=group_size if group_by else None,
                expansion=pb.Expansion(neighbors=expand, alpha=alpha) if expand else None,
                with_thumbnails=with_thumbnails,
            )  # fmt: skip
        found: list[Neighbor] = []
        while True:
            request.top_k = min(top_k - len(found), PAGE) if not group_by else top_k
            response = self._call(self._search.Search, request)
            found += [
                Neighbor(
                    n.item.key, n.score, json_format.MessageToDict(n.item.payload), n.item.source_uri,
                    n.group if n.HasField("group") else None, n.item.thumbnail or None,
                )
                for n in response.neighbors
            ]  # fmt: skip
            request.page_token = response.next_page_token
            if not request.page_token or len(found) >= top_k:
                return found

    def upsert(self, collection: str, items: Sequence[NewItem], space_id: str = "") -> list[int | CallError]:
        """Insert or replace at most 256 items; a sequence number each, or a `CallError` in the place of one that failed."""
        with _as_call_error():
            new = [_new_item(item, space_id) for item in items]
            request = pb.UpsertItemsRequest(collection=collection, items=new)
        results = self._call(self._collections.UpsertItems, request).results
        return [_error(r.error) if r.HasField("error") else r.sequence for r in results]

    def delete(self, collection: str, keys: Sequence[str]) -> list[str]:
        """Delete items by key, at most 1000; returns the keys that did not exist."""
        request = pb.DeleteItemsRequest(collection=collection, keys=keys)
        return list(self._call(self._collections.DeleteItems, request).missing_keys)

    def get(self, collection: str, key: str, *, with_original: bool = False) -> Item:
        """One item; `with_original`: with its picture as it came, where the collection keeps them."""
        request = pb.GetItemRequest(collection=collection, key=key, with_original=with_original)
        i = self._call(self._collections.GetItem, request).item
        vector = np.array(i.vector.values, np.float32)
        payload = json_format.MessageToDict(i.payload)
        return Item(i.key, vector, payload, i.source_uri, i.sequence, i.thumbnail or None, i.original or None)

    def create_collection(
        self, name: str, *, keep_originals: bool = False, thumbnail_pixels: int = 0
    ) -> CollectionInfo:
        """Make an empty collection. `keep_originals`: pictures that come as bytes are kept, for `get` and so that another
        encoder can embed them; `thumbnail_pixels`: longer side of thumbnails that are made of them, 32 to 1024."""
        with _as_call_error():
            request = pb.CreateCollectionRequest(
                name=name, keep_originals=keep_originals, thumbnail_pixels=thumbnail_pixels
            )
        return _info(self._call(self._collections.CreateCollection, request).collection)

    def collection(self, name: str) -> CollectionInfo:
        """One collection."""
        return _info(self._call(self._collections.GetCollection, pb.GetCollectionRequest(name=name)).collection)

    def collections(self) -> list[CollectionInfo]:
        """Every collection, by name."""
        found: list[CollectionInfo] = []
        token = ""
        while True:
            page = self._call(self._collections.ListCollections, pb.ListCollectionsRequest(page_token=token))
            found += [_info(c) for c in page.collections]
            token = page.next_page_token
            if not token:
                return found

    def delete_collection(self, name: str) -> None:
        """Delete a collection, for good."""
        self._call(self._collections.DeleteCollection, pb.DeleteCollectionRequest(name=name))

    def _call(self, method: Any, request: Any) -> Any:
        try:
            return method(request, timeout=self._timeout)
        except grpc.RpcError as error:
            e: Any = error  # a call object, which the type does not say
            code = e.code()
            for name, value in e.trailing_metadata() or ():
                if name == "grpc-status-details-bin":
                    status = status_pb2.Status.FromString(value)
                    raise _error(status) from None
            message = e.details() or code.name
            if code == grpc.StatusCode.UNAVAILABLE:
                message = f"no server answers at {self.server} ({message}): start one with `likewise serve`"
            raise CallError(message, code.name) from None


def _error(status: status_pb2.Status) -> CallError:
    code = next(code.name for code in grpc.StatusCode if code.value[0] == status.code)
    reason, metadata, retry = "", {}, None
    for detail in status.details:
        info, delay = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            reason, metadata = info.reason, dict(info.metadata)
        elif detail.Unpack(delay):
            retry = delay.retry_delay.ToTimedelta().total_seconds()
    return CallError(status.message, code, reason, metadata, retry)


@contextmanager
def _as_call_error() -> Iterator[None]:
    """What protobuf refuses to carry is refused as the server would."""
    try:
        yield
    except (TypeError, ValueError, OverflowError) as e:
        raise CallError(f"the request cannot be sent ({e}): check its values", "INVALID_ARGUMENT", "BAD_REQUEST") from e


def _vector(values: Embeddings | Sequence[float], space_id: str) -> pb.Vector:
    return pb.Vector(values=np.asarray(values, np.float32).tolist(), space_id=space_id)


def _example(example: Example, space_id: str) -> pb.Example:
    made = pb.Example(weight=example.weight)
    if example.image is not None:
        made.image.content = example.image
    if example.vector is not None:
        made.vector.CopyFrom(_vector(example.vector, space_id))
    if example.key is not None:
        made.key = example.key
    return made


def _new_item(item: NewItem, space_id: str) -> pb.NewItem:
    payload = Struct()
    payload.update(dict(item.payload or {}))
    return pb.NewItem(
        key=item.key, payload=payload, source_uri=item.source_uri,
        image=None if item.image is None else pb.Image(content=item.image),
        vector=None if item.vector is None else _vector(item.vector, space_id),
    )  # fmt: skip


def _info(c: pb.Collection) -> CollectionInfo:
    return CollectionInfo(
        c.name, c.space_id, c.dimensions, c.item_count, c.sequence, c.keep_originals, c.thumbnail_pixels
    )
