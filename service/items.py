"""likewise.v1.CollectionService: collections, their items, and the care of them that a caller may ask for."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import functools
import hashlib
import itertools
import json
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from google.protobuf import json_format
from google.protobuf.struct_pb2 import Struct

from export.bundle import Embeddings, RefusalError
from service.collection import Collection, check_key
from service.duplicates import Group, SelfSearch
from service.errors import (
    AlreadyExistsError,
    InvalidArgumentError,
    NotFoundError,
    PreconditionError,
    ServiceError,
    UnavailableError,
)
from service.filter import Filter
from service.pb import likewise_pb2 as pb
from service.pb import likewise_pb2_grpc as pb_grpc
from service.pipeline import Priority
from service.reading import Readable
from service.records import NewRow, Record
from service.releases import Releases
from service.segment import attributes_of
from service.served import MovedError, Served
from service.servicer import (
    MAX_ITEMS,
    Clock,
    Context,
    Engine,
    as_refusal,
    check_count,
    item_of,
    priority_of,
    vector_of,
    write_item,
)
from service.snapshot import take
from service.store import NAME, NAME_RULE
from service.streams import Load, Stream

MAX_KEYS = 1000
# Items of a listing that a filter looks at for one page, and at a time.
LOOKED_AT = 20_000
LOOKED_AT_ONCE = 1000
# Groups of duplicates in a response.
GROUPS = 100


class CollectionService(pb_grpc.CollectionServiceServicer):
    """likewise.v1.CollectionService."""

    def __init__(self, engine: Engine, releases: Releases) -> None:
        self._engine, self._releases = engine, releases

    async def CreateCollection(self, request: pb.CreateCollectionRequest, context: Context) -> pb.CreateCollectionResponse:  # noqa: N802  # fmt: skip
        """See the proto."""
        encoder = self._engine.model(request.space_id).encoder
        create = functools.partial(
            self._engine.store.create, request.name, encoder.space_id, encoder.dim,
            keep_originals=request.keep_originals, thumbnail_pixels=request.thumbnail_pixels,
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
        self._releases.check_deletable(request.name)
        await self._engine.write(self._engine.store.delete, request.name)
        return pb.DeleteCollectionResponse()

    async def UpsertItems(self, request: pb.UpsertItemsRequest, context: Context) -> pb.UpsertItemsResponse:  # noqa: N802
        """See the proto."""
        check_count(len(request.items), MAX_ITEMS, "items")
        clock = Clock()
        while True:
            try:
                response = await self._upsert(request, context, clock)
            except MovedError:  # its encoder was exchanged meanwhile: with the other one
                continue
            clock.write(response.timings)
            return response

    async def _upsert(self, request: pb.UpsertItemsRequest, context: Context, clock: Clock) -> pb.UpsertItemsResponse:
        """Raises `MovedError`; then nothing was stored."""
        engine = self._engine
        served = engine.store.served(request.collection)
        collection, model = served.writer, engine.models[served.collection.space_id]
        given = [_given(item, i, served, model.encoder.origin) for i, item in enumerate(request.items)]
        pictures = [i for i, each in enumerate(given) if isinstance(each, _Given) and each.vector is None]
        refusal = model.encoder.mixing_refusal(collection.origins) if pictures else None
        if refusal is not None:
            raise PreconditionError(refusal, reason="VARIANT_MISMATCH")
        if pictures:
            embedded = await engine.embed(
                model,
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
        good = [(i, each) for i, each in enumerate(given) if isinstance(each, _Given)]
        if good:
            came = [request.items[i].image.content or None for i, _ in good]
            sequences = await _stored(engine, served, [each for _, each in good], came)
            for (i, _), sequence in zip(good, sequences, strict=True):
                results[i].sequence = sequence
        return pb.UpsertItemsResponse(results=results, space_id=collection.space_id)

    async def StreamUpsert(self, requests: Any, context: Context) -> None:  # type: ignore[override]  # noqa: N802
        """See the proto."""
        upload = _Upload(self._engine, context)
        with self._engine.streaming(upload.stream):
            try:
                await upload.stream.run(upload.begin, upload.collect)
            finally:
                upload.close()

    async def DeleteItems(self, request: pb.DeleteItemsRequest, context: Context) -> pb.DeleteItemsResponse:  # noqa: N802
        """See the proto."""
        check_count(len(request.keys), MAX_KEYS, "keys")
        while True:
            served = self._engine.store.served(request.collection)
            try:
                missing = await self._engine.write_to(served, served.writer.delete, list(request.keys))
                break
            except MovedError:
                continue
        self._engine.maintain_when_due(served.writer)
        deleted = len(set(request.keys)) - len(missing)
        return pb.DeleteItemsResponse(deleted_count=deleted, missing_keys=missing)

    async def GetItem(self, request: pb.GetItemRequest, context: Context) -> pb.GetItemResponse:  # noqa: N802
        """See the proto."""
        with self._engine.using(request.collection) as served:
            item = await self._engine.read(_item, served.collection, request.key, request.with_original)
            return pb.GetItemResponse(item=item, space_id=served.collection.space_id)

    async def ListItems(self, request: pb.ListItemsRequest, context: Context) -> pb.ListItemsResponse:  # noqa: N802
        """See the proto."""
        with self._engine.using(request.collection) as served:
            return await self._engine.read(_page, served.collection, request)

    async def FindDuplicates(  # type: ignore[override]  # noqa: N802
        self, request: pb.FindDuplicatesRequest, context: Context
    ) -> None:
        """See the proto."""
        with self._engine.using(request.collection) as served:
            await self._find_duplicates(request, served.collection, context)

    async def _find_duplicates(self, request: pb.FindDuplicatesRequest, collection: Readable, context: Context) -> None:
        engine = self._engine
        wanted = Filter.parse(request.filter) if request.filter.strip() else None
        min_score = request.min_score if request.HasField("min_score") else 0.95
        after = request.after if request.HasField("after") else None
        gone = False

        def progress(done: int, total: int) -> None:
            if gone or engine.stopping:
                raise UnavailableError("nobody waits for these duplicates any more, or the server is shutting down")

        try:
            search = await engine.chore(
                functools.partial(SelfSearch, collection, min_score, wanted, after, progress=progress)
            )
            groups = search.groups()
            while True:
                some: list[Group] = await engine.chore(list, itertools.islice(groups, GROUPS))
                response = pb.FindDuplicatesResponse(groups=map(_group, some), sequence=search.sequence)
                await context.write(response)
                if len(some) < GROUPS:
                    return
        finally:
            gone = True

    async def CompactCollection(  # noqa: N802
        self, request: pb.CompactCollectionRequest, context: Context
    ) -> pb.CompactCollectionResponse:
        """See the proto."""
        with self._engine.using(request.name) as served:
            collection = served.writer
            merged = await self._engine.chore(_compacted, collection)
            return pb.CompactCollectionResponse(
                collection=_collection(collection), merged_segments=merged, segments=len(collection.segments())
            )

    async def SnapshotCollection(  # noqa: N802
        self, request: pb.SnapshotCollectionRequest, context: Context
    ) -> pb.SnapshotCollectionResponse:
        """See the proto."""
        with self._engine.using(request.name) as served:
            return await self._snapshot(request, served.collection)

    async def _snapshot(
        self, request: pb.SnapshotCollectionRequest, collection: Readable
    ) -> pb.SnapshotCollectionResponse:
        root = self._engine.snapshots
        if root is None:
            raise PreconditionError(
                "this server has no folder for snapshots: start it with --snapshots FOLDER, or run `likewise index "
                "snapshot` beside it", "NO_SNAPSHOTS_FOLDER",
            )  # fmt: skip
        if not NAME.fullmatch(request.snapshot):
            raise InvalidArgumentError(
                f"{request.snapshot[:80]!r} cannot be a snapshot's name: {NAME_RULE}", "BAD_NAME", "snapshot"
            )
        if (root / request.snapshot).exists():
            raise AlreadyExistsError(
                f"the snapshot {request.snapshot!r} exists already: choose another name", "SNAPSHOT_EXISTS",
                snapshot=request.snapshot,
            )  # fmt: skip
        try:
            taken = await self._engine.chore(take, collection.folder, root / request.snapshot, lambda _: None)
        except RefusalError as e:
            raise PreconditionError(str(e), "SNAPSHOT_REFUSED") from e
        self._engine.metrics.snapshots[collection.uid] = time.time()
        return pb.SnapshotCollectionResponse(snapshot=request.snapshot, sequence=taken.sequence, item_count=taken.items)


def _group(group: Group) -> pb.DuplicateGroup:
    items = [pb.DuplicateItem(key=m.key, source_uri=m.source_uri, score=m.score) for m in group.members]
    return pb.DuplicateGroup(items=items)


def _compacted(collection: Collection) -> int:
    collection.flush()
    return collection.compact(everything=True)


# --- lists ------------------------------------------------------------------------------------------------------------


def _page(collection: Readable, request: pb.ListItemsRequest) -> pb.ListItemsResponse:
    """One page: in a thread, as it is read from the disk. Raises `ServiceError`."""
    size = request.page_size if request.HasField("page_size") else 100
    if not 1 <= size <= 1000:
        raise InvalidArgumentError(f"page_size is {size}, 1 to 1000 are allowed", "BAD_PAGE_SIZE", "page_size")
    if request.order not in pb.ItemOrder.values():
        raise InvalidArgumentError(f"order is {request.order}: set one that the API has", "BAD_ORDER", "order")
    wanted = Filter.parse(request.filter) if request.filter.strip() else None
    by_sequence = request.order == pb.ITEM_ORDER_SEQUENCE
    after = _after(request, by_sequence)
    found: list[Record] = []
    left = LOOKED_AT
    more = True
    while more and left > 0 and len(found) <= size:
        count = size + 1 if wanted is None else LOOKED_AT_ONCE
        some = collection.page(after, count)
        more, left = len(some) == count, left - count
        if some:
            last = some[-1].row
            after = (last.sequence, last.id) if by_sequence else last.key
        if wanted is not None and some:
            mask = wanted.mask(attributes_of([record.row for record in some]))
            some = [record for record, passes in zip(some, mask.tolist(), strict=True) if passes]
        found += some
    if len(found) > size:  # the next page begins with what came too much
        more, found = True, found[:size]
        last = found[-1].row
        after = (last.sequence, last.id) if by_sequence else last.key
    response = pb.ListItemsResponse(space_id=collection.space_id)
    for record in found:
        row, vector = record.row, None
        if request.with_vectors:
            try:
                row, vector, _ = collection.item(record)
            except NotFoundError:  # deleted meanwhile
                continue
        item = response.items.add()
        write_item(item, row)
        if vector is not None:
            item.vector.values.extend(vector.tolist())
    if more:
        response.next_page_token = _token(request, after)
    return response


def _token(request: pb.ListItemsRequest, after: str | tuple[int, int]) -> str:
    return base64.urlsafe_b64encode(json.dumps([_digest(request), after]).encode()).decode()


def _digest(request: pb.ListItemsRequest) -> str:
    """Of what is listed, and how: a token continues nothing else."""
    listed = json.dumps([request.collection, request.filter, request.order == pb.ITEM_ORDER_SEQUENCE])
    return hashlib.sha256(listed.encode()).hexdigest()[:16]


def _after(request: pb.ListItemsRequest, by_sequence: bool) -> str | tuple[int, int]:
    """Where the page begins."""
    if not request.page_token:
        return (-1, -1) if by_sequence else ""
    try:
        match json.loads(base64.urlsafe_b64decode(request.page_token)):
            case [digest, str(key)] if digest == _digest(request) and not by_sequence:
                return key
            case [digest, [int(sequence), int(row_id)]] if digest == _digest(request) and by_sequence:
                return sequence, row_id
    except (binascii.Error, ValueError, RecursionError):
        pass  # no token of ours, as one of another request
    raise InvalidArgumentError(
        "the page token is not of this request: send the one that the page before returned, with the same collection, "
        "filter and order", "BAD_PAGE_TOKEN", "page_token",
    )  # fmt: skip


# --- items ------------------------------------------------------------------------------------------------------------


def _item(collection: Readable, key: str, with_original: bool) -> pb.Item:
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


def _given(item: pb.NewItem, i: int, served: Served, encoder: str) -> _Given | ServiceError:
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
        vector = vector_of(item.vector, served, f"items[{i}].vector")
        return _Given(NewRow(item.key, payload, item.source_uri), vector)
    except ServiceError as e:
        return e


async def _stored(
    engine: Engine, served: Served, given: Sequence[_Given], pictures: Sequence[bytes | None]
) -> list[int]:
    """Write what all have a vector by now; their sequence numbers. Raises `MovedError`; then nothing was stored."""
    vectors = np.stack([each.vector for each in given if each.vector is not None])
    rows = [each.row for each in given]
    sequences = await engine.write_to(served, served.writer.upsert, rows, vectors, pictures)
    engine.maintain_when_due(served.writer)
    return sequences


@dataclass(eq=False)
class _Entry:
    """An item of an upload on its way to the disk."""

    item: pb.NewItem
    place: int
    """Its number in the request that it came in."""
    priority: Priority
    bytes: int
    given: _Given | ServiceError
    work: asyncio.Task[None] | None = None
    """What embeds its picture."""


class _Upload:
    """One StreamUpsert: what can be written goes to the disk together, in the order in which it came."""

    def __init__(self, engine: Engine, context: Context) -> None:
        self._engine, self._context = engine, context
        self.stream = Stream[pb.StreamUpsertRequest, pb.StreamUpsertResponse](context)
        self._served: Served | None = None
        self._entries: deque[_Entry] = deque()

    async def begin(self, request: pb.StreamUpsertRequest) -> Load:
        """Embed its pictures. Raises `ServiceError` on a request that says nothing of any item."""
        served = self._served
        if served is None:
            served = self._engine.store.served(request.collection)
            _ = served.writer  # refuses
            self._served = served
        elif served.has_moved:
            served = self._engine.store.served(served.collection.name)
            self._begin_again(served)
        if request.collection not in ("", served.collection.name):
            raise InvalidArgumentError(
                f"the stream is into {served.collection.name!r}, the request names {request.collection[:80]!r}: open "
                "another stream",
                "BAD_REQUEST", "collection",
            )  # fmt: skip
        check_count(len(request.items), MAX_ITEMS, "items")
        priority = priority_of(request.priority, Priority.BULK)
        entries = [
            _Entry(item, i, priority, item.ByteSize(), _given(item, i, served, self._origin(served)))
            for i, item in enumerate(request.items)
        ]
        self._start(entries, served)
        self._entries += entries
        self.stream.notice()
        return Load(len(entries), sum(entry.bytes for entry in entries))

    def _origin(self, served: Served) -> str:
        return self._engine.models[served.collection.space_id].encoder.origin

    def _start(self, entries: Sequence[_Entry], served: Served) -> None:
        """Embed the pictures among them."""
        todo = [entry for entry in entries if isinstance(entry.given, _Given) and entry.given.vector is None]
        if not todo:
            return
        encoder = self._engine.models[served.collection.space_id].encoder
        refusal = encoder.mixing_refusal(served.collection.origins)
        for entry in todo:
            if refusal is not None:
                entry.given = PreconditionError(refusal, reason="VARIANT_MISMATCH")
                continue
            used = contextlib.ExitStack()
            used.enter_context(served.uses)
            entry.work = asyncio.create_task(self._embed(entry, served))
            entry.work.add_done_callback(functools.partial(self._embedded, used))

    def _embedded(self, used: contextlib.ExitStack, _: object) -> None:
        used.close()
        self.stream.notice()

    async def collect(self) -> tuple[pb.StreamUpsertResponse, Load] | None:
        """Write the oldest items that are embedded by now."""
        done: list[_Entry] = []
        while self._entries and len(done) < MAX_ITEMS:
            if self._entries[0].work is not None and not self._entries[0].work.done():
                break
            done.append(self._entries.popleft())
        served = self._served
        if not done or served is None:
            return None
        response = pb.StreamUpsertResponse(space_id=served.collection.space_id)
        for entry in done:
            result = response.results.add()
            if isinstance(entry.given, ServiceError):
                result.error.CopyFrom(entry.given.status())
        good = [(i, entry, entry.given) for i, entry in enumerate(done) if isinstance(entry.given, _Given)]
        if good:
            came = [entry.item.image.content or None for _, entry, _ in good]
            try:
                sequences = await _stored(self._engine, served, [given for *_, given in good], came)
            except MovedError:  # its encoder was exchanged meanwhile: with the other one, in the same order
                self._entries.extendleft(reversed(done))
                self._begin_again(self._engine.store.served(served.collection.name))
                return None
            except ServiceError as e:  # a full disk, a collection deleted meanwhile: of each of them
                for i, *_ in good:
                    response.results[i].error.CopyFrom(e.status())
            else:
                for (i, *_), sequence in zip(good, sequences, strict=True):
                    response.results[i].sequence = sequence
        return response, Load(len(done), sum(entry.bytes for entry in done))

    def _begin_again(self, served: Served) -> None:
        """What is not written yet goes to the collection that the name stands for now."""
        self._served = served
        for entry in self._entries:
            if entry.work is not None:
                entry.work.cancel()
                entry.work = None
            if isinstance(entry.given, _Given):
                entry.given = _given(entry.item, entry.place, served, self._origin(served))
        self._start(self._entries, served)
        self.stream.notice()

    def close(self) -> None:
        """Nobody waits any more."""
        for entry in self._entries:
            if entry.work is not None:
                entry.work.cancel()

    async def _embed(self, entry: _Entry, served: Served) -> None:
        given = entry.given
        assert isinstance(given, _Given)
        thumbnail = served.collection.manifest.thumbnail_pixels or None
        content, path = entry.item.image.content, f"items[{entry.place}].image.content"
        try:
            (found,) = await self._engine.embed(
                self._engine.models[served.collection.space_id], [content], [path], self._context, Clock(), entry.priority,
                thumbnail, patient=True,
            )  # fmt: skip
        except Exception as e:  # of this item alone
            found = as_refusal("StreamUpsert", e)
        if isinstance(found, ServiceError):
            entry.given = found
        else:
            entry.given = given._replace(row=given.row._replace(thumbnail=found.thumbnail), vector=found.vector)


def _collection(collection: Readable) -> pb.Collection:
    message = pb.Collection(
        name=collection.name, space_id=collection.space_id, dimensions=collection.dim, item_count=len(collection),
        sequence=collection.sequence, keep_originals=collection.manifest.keep_originals,
        thumbnail_pixels=collection.manifest.thumbnail_pixels,
    )  # fmt: skip
    message.create_time.FromDatetime(collection.manifest.created)
    return message


def _json(struct: Struct) -> str:
    return json.dumps(json_format.MessageToDict(struct))
