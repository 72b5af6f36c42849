"""What the clients say and hear: values in, messages over the wire, values out. No input or output happens here.

Each call is a generator that yields a `Call`, is sent its response, and returns a value; so `Client` and `AsyncClient`
differ only in how they wait.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypedDict, TypeVar

import grpc
import numpy as np
from google.protobuf import json_format
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2

from export.bundle import Embeddings
from service.pb import likewise_pb2 as pb

PAGE = 1000
MAX_NEIGHBORS = 10_000
# Pictures, items and searches of one stream, which is tried again as a whole.
PICTURES, ITEMS, SEARCHES = 64, 256, 256
# Tries of one call.
ATTEMPTS = 4

T = TypeVar("T")


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


class StandbyInfo(NamedTuple):
    """A release beside the one that is served."""

    release: str
    """Its name; '' for the server's own bundle."""
    state: str
    """loading, catching_up, ready, failed, or previous: what was served before."""
    space_id: str
    item_count: int
    lag: int
    """Writes of the served collection that it does not hold yet."""
    left_out: dict[str, int]
    """Items that it cannot hold, by reason."""
    accepted: bool | None
    """Whether it passed its acceptance queries; None before they were asked."""
    problems: list[str]
    """What it did not pass."""
    overlap_at_10: float | None
    """Mean share of neighbours in common with the served collection."""
    was_live: bool
    """Whether it was served before."""
    error: CallError | None = None
    """Why it failed."""


class ReleaseInfo(NamedTuple):
    """What a collection is served from, and what stands beside it."""

    collection: str
    live: str
    """The release; '' for the server's own bundle."""
    live_space_id: str
    standby: StandbyInfo | None = None
    writes_held: float = 0.0
    """Seconds that an exchange held writes back."""


class Expected(NamedTuple):
    """An acceptance query of a release: `key` has to be among the `top_k` neighbours of a picture or of a stored item."""

    key: str
    image: bytes | None = None
    of: str | None = None
    """The stored item's key."""
    top_k: int = 10


class SearchOptions(TypedDict, total=False):
    """What to look for, and how: see `Client.search`."""

    image: bytes | None
    vector: Embeddings | Sequence[float] | None
    key: str | None
    examples: Sequence[Example] | None
    top_k: int
    min_score: float | None
    filter: str
    group_by: str
    group_size: int
    expand: int
    alpha: float
    with_thumbnails: bool
    space_id: str


class Call(NamedTuple):
    """One call to be made."""

    method: str
    """Path, such as /likewise.v1.SearchService/Search."""
    request: Any
    """A message, or a list of them for a stream, whose responses come as a list."""
    response: type[Message]
    repeatable: bool = True
    """Whether it may be made again when nobody knows if it was carried out."""


Calls = Generator[Call, Any, T]


@dataclass
class Retries:
    """When to try again: never more than a fifth of the calls, after what a short trouble may take.

    As gRPC's own throttling (gRFC A6): a failure takes from the budget, a success gives back a little.
    """

    budget: float = 10.0
    most: float = 10.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def succeeded(self) -> None:
        """A call was answered."""
        with self.lock:
            self.budget = min(self.most, self.budget + 0.2)

    def delay(self, error: CallError, attempt: int, repeatable: bool) -> float | None:
        """Seconds to wait before the next try; None: do not. What was refused before it began may always be tried again."""
        refused = error.code == "RESOURCE_EXHAUSTED" and error.retry_seconds is not None
        if not (refused or (repeatable and error.code == "UNAVAILABLE")) or attempt + 1 >= ATTEMPTS:
            return None
        with self.lock:
            if self.budget < 1:
                return None
            self.budget -= 1
        least = 0.1 * 2**attempt if error.retry_seconds is None else error.retry_seconds
        return least * random.uniform(1.0, 1.5)  # so that callers who were refused together do not come back together


def ready() -> Calls[bool]:
    """grpc.health.v1."""
    response = yield Call(
        "/grpc.health.v1.Health/Check", health_pb2.HealthCheckRequest(), health_pb2.HealthCheckResponse
    )
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


def encoder(space_id: str) -> Calls[EncoderInfo]:
    """EncoderService.GetEncoder."""
    request = pb.GetEncoderRequest(space_id=space_id)
    response = yield Call(f"{_ENCODER}/GetEncoder", request, pb.GetEncoderResponse)
    return _encoder(response.encoder)


def encoders() -> Calls[list[EncoderInfo]]:
    """EncoderService.ListEncoders."""
    response = yield Call(f"{_ENCODER}/ListEncoders", pb.ListEncodersRequest(), pb.ListEncodersResponse)
    return [_encoder(e) for e in response.encoders]


def embed(images: Sequence[bytes], space_id: str, collection: str) -> Calls[list[Embeddings | CallError]]:
    """EncoderService.Embed."""
    pictures = [pb.Image(content=image) for image in images]
    request = pb.EmbedRequest(images=pictures, space_id=space_id, collection=collection)
    response = yield Call(f"{_ENCODER}/Embed", request, pb.EmbedResponse)
    return [_embedding(result) for result in response.results]


def embed_some(images: Sequence[bytes], space_id: str, collection: str) -> Calls[list[Embeddings | CallError]]:
    """EncoderService.StreamEmbed, in the order of the pictures."""
    requests = [
        pb.StreamEmbedRequest(id=i, image=pb.Image(content=image), space_id=space_id, collection=collection)
        for i, image in enumerate(images)
    ]
    responses = yield Call(f"{_ENCODER}/StreamEmbed", requests, pb.StreamEmbedResponse)
    return [_embedding(each) for each in sorted(responses, key=lambda response: response.id)]


def search(collection: str, options: SearchOptions) -> Calls[list[Neighbor]]:
    """SearchService.Search, page by page."""
    request, top_k = _search_request(collection, options)
    found: list[Neighbor] = []
    while True:
        request.top_k = min(top_k - len(found), PAGE) if not request.group_by else top_k
        response = yield Call(f"{_SEARCH}/Search", request, pb.SearchResponse)
        found += _neighbors(response)
        request.page_token = response.next_page_token
        if not request.page_token or len(found) >= top_k:
            return found


def search_some(collection: str, queries: Sequence[SearchOptions]) -> Calls[list[list[Neighbor] | CallError]]:
    """SearchService.StreamSearch, in the order of the queries."""
    requests = []
    for i, options in enumerate(queries):
        request, top_k = _search_request(collection, options)
        if top_k > PAGE:
            raise CallError(
                f"top_k is {top_k}, 1 to {PAGE} are allowed here: use search", "INVALID_ARGUMENT", "BAD_TOP_K"
            )
        requests.append(pb.StreamSearchRequest(id=i, request=request))
    responses = yield Call(f"{_SEARCH}/StreamSearch", requests, pb.StreamSearchResponse)
    ordered = sorted(responses, key=lambda response: response.id)
    return [_error(r.error) if r.HasField("error") else _neighbors(r.response) for r in ordered]


def upsert(collection: str, items: Sequence[NewItem], space_id: str) -> Calls[list[int | CallError]]:
    """CollectionService.UpsertItems."""
    with _as_call_error():
        new = [_new_item(item, space_id) for item in items]
        request = pb.UpsertItemsRequest(collection=collection, items=new)
    response = yield Call(f"{_COLLECTIONS}/UpsertItems", request, pb.UpsertItemsResponse)
    return [_error(r.error) if r.HasField("error") else r.sequence for r in response.results]


def upsert_some(collection: str, items: Sequence[NewItem], space_id: str) -> Calls[list[int | CallError]]:
    """CollectionService.StreamUpsert."""
    with _as_call_error():
        requests = [pb.StreamUpsertRequest(collection=collection, items=[_new_item(i, space_id)]) for i in items]
    responses = yield Call(f"{_COLLECTIONS}/StreamUpsert", requests, pb.StreamUpsertResponse)
    results = [result for response in responses for result in response.results]
    return [_error(r.error) if r.HasField("error") else r.sequence for r in results]


def delete(collection: str, keys: Sequence[str]) -> Calls[list[str]]:
    """CollectionService.DeleteItems."""
    request = pb.DeleteItemsRequest(collection=collection, keys=keys)
    response = yield Call(f"{_COLLECTIONS}/DeleteItems", request, pb.DeleteItemsResponse)
    return list(response.missing_keys)


def get(collection: str, key: str, with_original: bool) -> Calls[Item]:
    """CollectionService.GetItem."""
    request = pb.GetItemRequest(collection=collection, key=key, with_original=with_original)
    response = yield Call(f"{_COLLECTIONS}/GetItem", request, pb.GetItemResponse)
    return _item(response.item)


def page_of(
    collection: str, token: str, filter: str, by_sequence: bool, with_vectors: bool
) -> Calls[tuple[list[Item], str]]:
    """CollectionService.ListItems: a page, and the token of the next."""
    order = pb.ITEM_ORDER_SEQUENCE if by_sequence else pb.ITEM_ORDER_KEY
    request = pb.ListItemsRequest(
        collection=collection, page_size=PAGE, page_token=token, filter=filter, order=order, with_vectors=with_vectors
    )
    response = yield Call(f"{_COLLECTIONS}/ListItems", request, pb.ListItemsResponse)
    return [_item(item) for item in response.items], response.next_page_token


def create_collection(name: str, keep_originals: bool, thumbnail_pixels: int, space_id: str) -> Calls[CollectionInfo]:
    """CollectionService.CreateCollection."""
    with _as_call_error():
        request = pb.CreateCollectionRequest(
            name=name, keep_originals=keep_originals, thumbnail_pixels=thumbnail_pixels, space_id=space_id
        )
    path = f"{_COLLECTIONS}/CreateCollection"
    response = yield Call(path, request, pb.CreateCollectionResponse, repeatable=False)
    return _info(response.collection)


def collection(name: str) -> Calls[CollectionInfo]:
    """CollectionService.GetCollection."""
    response = yield Call(f"{_COLLECTIONS}/GetCollection", pb.GetCollectionRequest(name=name), pb.GetCollectionResponse)
    return _info(response.collection)


def collections() -> Calls[list[CollectionInfo]]:
    """CollectionService.ListCollections, page by page."""
    found: list[CollectionInfo] = []
    token = ""
    while True:
        request = pb.ListCollectionsRequest(page_token=token)
        page = yield Call(f"{_COLLECTIONS}/ListCollections", request, pb.ListCollectionsResponse)
        found += [_info(c) for c in page.collections]
        token = page.next_page_token
        if not token:
            return found


def delete_collection(name: str) -> Calls[None]:
    """CollectionService.DeleteCollection."""
    path = f"{_COLLECTIONS}/DeleteCollection"
    yield Call(path, pb.DeleteCollectionRequest(name=name), pb.DeleteCollectionResponse, repeatable=False)


def compact_collection(name: str) -> Calls[int]:
    """CollectionService.CompactCollection."""
    request = pb.CompactCollectionRequest(name=name)
    response = yield Call(f"{_COLLECTIONS}/CompactCollection", request, pb.CompactCollectionResponse)
    return int(response.merged_segments)


def snapshot_collection(name: str, snapshot: str) -> Calls[int]:
    """CollectionService.SnapshotCollection."""
    request = pb.SnapshotCollectionRequest(name=name, snapshot=snapshot)
    path = f"{_COLLECTIONS}/SnapshotCollection"
    response = yield Call(path, request, pb.SnapshotCollectionResponse, repeatable=False)
    return int(response.sequence)


def prepare_release(
    collection: str, release: str, acceptance: Sequence[Expected], min_overlap: float
) -> Calls[ReleaseInfo]:
    """ReleaseService.PrepareRelease."""
    request = pb.PrepareReleaseRequest(collection=collection, release=release, min_overlap=min_overlap)
    for each in acceptance:
        query = pb.Query(key=each.of or "") if each.image is None else pb.Query(image=pb.Image(content=each.image))
        request.acceptance.add(query=query, expected_key=each.key, top_k=each.top_k)
    response = yield Call(f"{_RELEASES}/PrepareRelease", request, pb.PrepareReleaseResponse)
    return _release(response)


def release(collection: str) -> Calls[ReleaseInfo]:
    """ReleaseService.GetRelease."""
    request = pb.GetReleaseRequest(collection=collection)
    response = yield Call(f"{_RELEASES}/GetRelease", request, pb.GetReleaseResponse)
    return _release(response)


def switch_release(collection: str, name: str, leave_out: bool) -> Calls[ReleaseInfo]:
    """ReleaseService.SwitchRelease."""
    request = pb.SwitchReleaseRequest(collection=collection, release=name, leave_out=leave_out)
    response = yield Call(f"{_RELEASES}/SwitchRelease", request, pb.SwitchReleaseResponse, repeatable=False)
    return _release(response)


def roll_back_release(collection: str, leave_out: bool) -> Calls[ReleaseInfo]:
    """ReleaseService.RollBackRelease."""
    request = pb.RollBackReleaseRequest(collection=collection, leave_out=leave_out)
    response = yield Call(f"{_RELEASES}/RollBackRelease", request, pb.RollBackReleaseResponse, repeatable=False)
    return _release(response)


def finish_release(collection: str) -> Calls[ReleaseInfo]:
    """ReleaseService.FinishRelease."""
    request = pb.FinishReleaseRequest(collection=collection)
    response = yield Call(f"{_RELEASES}/FinishRelease", request, pb.FinishReleaseResponse)
    return _release(response)


def refused(server: str, error: Any) -> CallError:
    """What a `grpc.RpcError` says."""
    code = error.code()
    for name, value in error.trailing_metadata() or ():
        if name == "grpc-status-details-bin":
            return _error(status_pb2.Status.FromString(value))
    message = error.details() or code.name
    if code == grpc.StatusCode.UNAVAILABLE:
        message = f"no server answers at {server} ({message}): start one with `likewise serve`"
    return CallError(message, code.name)


_ENCODER, _SEARCH, _COLLECTIONS, _RELEASES = (
    f"/likewise.v1.{name}" for name in ("EncoderService", "SearchService", "CollectionService", "ReleaseService")
)


def _encoder(e: pb.Encoder) -> EncoderInfo:
    return EncoderInfo(e.space_id, e.dimensions, e.image_size, e.model, e.provider)


def _release(response: Any) -> ReleaseInfo:
    found, held = response.release, getattr(response, "writes_held", None)
    standby = None
    if found.HasField("standby"):
        s = found.standby
        asked = s.acceptance if s.HasField("acceptance") else None
        standby = StandbyInfo(
            s.release, pb.ReleaseState.Name(s.state).removeprefix("RELEASE_STATE_").lower(), s.space_id, s.item_count, s.lag,
            {each.reason: each.count for each in s.left_out}, None if asked is None else asked.passed,
            [] if asked is None else list(asked.problems),
            asked.overlap_at_10 if asked is not None and asked.HasField("overlap_at_10") else None,
            s.was_live, _error(s.error) if s.HasField("error") else None,
        )  # fmt: skip
    seconds = 0.0 if held is None else held.ToTimedelta().total_seconds()
    return ReleaseInfo(found.collection, found.live, found.live_space_id, standby, seconds)


def _embedding(result: pb.EmbedResult | pb.StreamEmbedResponse) -> Embeddings | CallError:
    return _error(result.error) if result.HasField("error") else np.array(result.embedding.values, np.float32)


def _item(i: pb.Item) -> Item:
    vector = np.array(i.vector.values, np.float32)
    payload = json_format.MessageToDict(i.payload)
    return Item(i.key, vector, payload, i.source_uri, i.sequence, i.thumbnail or None, i.original or None)


def _neighbors(response: pb.SearchResponse) -> list[Neighbor]:
    return [
        Neighbor(
            n.item.key, n.score, json_format.MessageToDict(n.item.payload), n.item.source_uri,
            n.group if n.HasField("group") else None, n.item.thumbnail or None,
        )
        for n in response.neighbors
    ]  # fmt: skip


def _search_request(collection: str, options: SearchOptions) -> tuple[pb.SearchRequest, int]:
    """The request, and how many neighbours in all. Raises `CallError`."""
    image, vector, key = options.get("image"), options.get("vector"), options.get("key")
    examples, space_id = options.get("examples"), options.get("space_id", "")
    if sum(given is not None for given in (image, vector, key, examples)) > 1:
        raise CallError(
            "several of image, vector, key and examples were given: give one", "INVALID_ARGUMENT", "BAD_REQUEST"
        )
    top_k, group_by, expand = options.get("top_k", 10), options.get("group_by", ""), options.get("expand", 0)
    limit = PAGE if group_by else MAX_NEIGHBORS
    if top_k > limit:
        raise CallError(f"top_k is {top_k}, 1 to {limit} are allowed: ask for fewer", "INVALID_ARGUMENT", "BAD_TOP_K")
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
            collection=collection, query=query, top_k=top_k, min_score=options.get("min_score"),
            filter=options.get("filter", ""), group_by=group_by,
            group_size=options.get("group_size", 1) if group_by else None,
            expansion=pb.Expansion(neighbors=expand, alpha=options.get("alpha", 3.0)) if expand else None,
            with_thumbnails=options.get("with_thumbnails", False),
        )  # fmt: skip
    return request, top_k


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
