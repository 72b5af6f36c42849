"""Streams, batches, listings and care of a collection over gRPC."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2

from export.bundle import Embeddings
from likewise import main
from service.pb import likewise_pb2 as pb
from service.pb import likewise_pb2_grpc as pb_grpc
from tests.conftest import encode, noise
from tests.service.running import Running

COUNT = 300


class Stubs:
    """The services of a server, without our client."""

    def __init__(self, running: Running) -> None:
        self.running = running
        self.channel = grpc.insecure_channel(running.address)
        self.encoder = pb_grpc.EncoderServiceStub(self.channel)
        self.search = pb_grpc.SearchServiceStub(self.channel)
        self.collections = pb_grpc.CollectionServiceStub(self.channel)


@pytest.fixture
def stubs(bundle: Path, indexed: Path, tmp_path: Path) -> Iterator[Stubs]:
    folder = shutil.copytree(indexed, tmp_path / "collections")
    running = Running(bundle=bundle, collections=folder, snapshots=tmp_path / "snapshots", queue_limit=16)
    stubs = Stubs(running)
    stubs.collections.CreateCollection(pb.CreateCollectionRequest(name="many"))
    for low in range(0, COUNT, 100):
        items = [new(i) for i in range(low, low + 100)]
        stubs.collections.UpsertItems(pb.UpsertItemsRequest(collection="many", items=items))
    yield stubs
    stubs.channel.close()
    if running._thread.is_alive():
        running.stop()


def vectors() -> Embeddings:
    rows = np.random.default_rng(0).standard_normal((COUNT, 64)).astype(np.float32)
    unit: Embeddings = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


ROWS = vectors()


def vector(i: int) -> pb.Vector:
    return pb.Vector(values=ROWS[i % COUNT].tolist())


def new(i: int, key: str | None = None) -> pb.NewItem:
    item = pb.NewItem(key=key or f"k{i:03d}", vector=vector(i))
    item.payload.update({"i": i})
    return item


def ask(i: int, **fields: Any) -> pb.SearchRequest:
    return pb.SearchRequest(query=pb.Query(vector=vector(i)), **{"collection": "many", "top_k": 3, **fields})


def reason(status: status_pb2.Status) -> str:
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    return str(info.reason)


def refusal(call: Callable[[], Any]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    details = dict(error.trailing_metadata())["grpc-status-details-bin"]
    return error.code(), reason(status_pb2.Status.FromString(details))


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    assert condition()


def nothing_is_left(stubs: Stubs) -> bool:
    engine = stubs.running.server.engine
    idle = not engine._streams and not engine.pipeline.admission._inside and not engine.pipeline._coming
    return idle and engine.metrics.in_flight._value.get() == 0


def test_searches_of_a_stream_are_answered_each_with_its_id(stubs: Stubs, pictures: Path) -> None:
    picture = pb.Query(image=pb.Image(content=(pictures / "star/00003.png").read_bytes()))
    wrong = {
        1000: (ask(0, top_k=5000), "BAD_TOP_K"),
        1001: (ask(0, collection="none"), "COLLECTION_NOT_FOUND"),
        1002: (pb.SearchRequest(collection="many"), "BAD_REQUEST"),
        1003: (ask(0, filter="i << 3"), "BAD_FILTER"),
        1004: (
            pb.SearchRequest(collection="shapes", query=pb.Query(image=pb.Image(content=b"x"))),
            "IMAGE_UNDECODABLE",
        ),
        1005: (pb.SearchRequest(collection="many", query=pb.Query(vector=pb.Vector(values=[1]))), "BAD_DIMENSIONS"),
    }
    right = {i: ask(i) for i in range(700)}
    right[800] = pb.SearchRequest(collection="shapes", query=picture, top_k=1)
    right[801] = pb.SearchRequest(collection="many", query=pb.Query(key="k007"), top_k=2)
    right[802] = ask(5, filter="i >= 100 AND i < 103")
    right[803] = ask(5, group_by="i", top_k=2)

    def requests() -> Iterator[pb.StreamSearchRequest]:
        for number, request in right.items():
            yield pb.StreamSearchRequest(id=number, request=request)
            if number in (3, 500):
                for bad, (request, _) in wrong.items():
                    yield pb.StreamSearchRequest(id=bad if number == 3 else bad + 100, request=request)

    answers = {answer.id: answer for answer in stubs.search.StreamSearch(requests())}
    assert answers.keys() == right.keys() | wrong.keys() | {bad + 100 for bad in wrong}
    for i in range(700):
        assert answers[i].response.neighbors[0].item.key == f"k{i % COUNT:03d}" and answers[i].response.space_id
        assert len(answers[i].response.neighbors) == 3
    for bad, (_, said) in wrong.items():
        assert reason(answers[bad].error) == reason(answers[bad + 100].error) == said
    assert answers[800].response.neighbors[0].item.key == "star/00003.png"
    assert all(n.item.key != "k007" for n in answers[801].response.neighbors)
    assert {n.item.key for n in answers[802].response.neighbors} == {"k100", "k101", "k102"}
    assert [n.group for n in answers[803].response.neighbors] == [0, 1]
    until(lambda: nothing_is_left(stubs))


def test_a_stream_embeds_more_than_the_queue_holds(stubs: Stubs) -> None:
    good = encode(noise(40, 30))
    (expected,) = stubs.encoder.Embed(pb.EmbedRequest(images=[pb.Image(content=good)])).results
    requests = (pb.StreamEmbedRequest(id=i, image=pb.Image(content=b"?" if i % 50 == 7 else good)) for i in range(200))
    answers = {answer.id: answer for answer in stubs.encoder.StreamEmbed(requests)}
    assert sorted(answers) == list(range(200))  # though the queue has room for 16
    for i, answer in answers.items():
        if i % 50 == 7:
            assert reason(answer.error) == "IMAGE_UNDECODABLE"
        else:
            assert np.allclose(answer.embedding.values, expected.embedding.values, atol=1e-5) and answer.space_id
    until(lambda: nothing_is_left(stubs))


def test_a_stream_upserts_in_order_and_acknowledges_each_item(stubs: Stubs) -> None:
    picture = pb.Image(content=encode(noise(40, 30)))
    sent = [
        [new(1, "a"), new(2, "b")],
        [pb.NewItem(key="pic", image=picture), pb.NewItem(key="bad", image=pb.Image(content=b"x"))],
        [pb.NewItem(key=""), pb.NewItem(key="c")],
        *([new(i, f"s{i:03d}")] for i in range(200)),
        [new(9, "a")],  # replaces: the later one counts
    ]

    def requests() -> Iterator[pb.StreamUpsertRequest]:
        for number, items in enumerate(sent):
            yield pb.StreamUpsertRequest(collection="" if number else "many", items=items)

    results = [r for answer in stubs.collections.StreamUpsert(requests()) for r in answer.results]
    assert len(results) == sum(map(len, sent))
    assert [reason(r.error) for r in results if r.HasField("error")] == ["IMAGE_UNDECODABLE", "BAD_KEY", "BAD_REQUEST"]
    sequences = [r.sequence for r in results if not r.HasField("error")]
    assert sequences == sorted(set(sequences))
    stored = stubs.collections.GetItem(pb.GetItemRequest(collection="many", key="a")).item
    assert np.allclose(stored.vector.values, ROWS[9], atol=1e-6) and stored.sequence == sequences[-1]
    assert stubs.collections.GetCollection(pb.GetCollectionRequest(name="many")).collection.item_count == COUNT + 203


def test_acknowledgements_flow_while_the_client_uploads(stubs: Stubs) -> None:
    go_on = threading.Event()

    def requests() -> Iterator[pb.StreamUpsertRequest]:
        yield pb.StreamUpsertRequest(collection="many", items=[new(1, "first")])
        assert go_on.wait(10)  # the first is acknowledged before the second is sent
        yield pb.StreamUpsertRequest(items=[new(2, "second")])

    for count, answer in enumerate(stubs.collections.StreamUpsert(requests()), 1):
        assert answer.results[0].sequence == COUNT + count
        go_on.set()
    assert count == 2


def test_streams_that_say_nothing_of_an_item_end_with_a_status(stubs: Stubs) -> None:
    def upsert(*requests: pb.StreamUpsertRequest) -> Callable[[], Any]:
        return lambda: list(stubs.collections.StreamUpsert(iter(requests)))

    one = pb.StreamUpsertRequest(collection="many", items=[new(1, "kept")])
    code = grpc.StatusCode
    assert refusal(upsert(pb.StreamUpsertRequest(collection="none"))) == (code.NOT_FOUND, "COLLECTION_NOT_FOUND")
    other = pb.StreamUpsertRequest(collection="shapes", items=[new(1)])
    assert refusal(upsert(one, other)) == (code.INVALID_ARGUMENT, "BAD_REQUEST")
    many = pb.StreamUpsertRequest(items=[new(1)] * 257)
    assert refusal(upsert(one, many)) == (code.INVALID_ARGUMENT, "BAD_COUNT")
    assert stubs.collections.GetItem(pb.GetItemRequest(collection="many", key="kept")).item.key == "kept"
    method = "likewise.v1.CollectionService/StreamUpsert"
    requests = stubs.running.server.engine.metrics.requests
    assert requests.labels(method=method, code="INVALID_ARGUMENT")._value.get() == 2
    assert requests.labels(method=method, code="NOT_FOUND")._value.get() == 1


def test_a_stream_is_read_no_further_than_its_window(stubs: Stubs) -> None:
    """The encoder stands still: the server takes so many pictures and no more, however many the client has."""
    pipeline = stubs.running.server.engine.pipeline
    real, gate, sent = pipeline._run, threading.Event(), 0

    def slow(images: Any) -> Any:
        assert gate.wait(20)
        return real(images)

    pipeline._run = slow
    picture = encode(noise(1200, 900), "PNG")  # megabytes: HTTP/2's own window holds none of them

    def requests() -> Iterator[pb.StreamEmbedRequest]:
        nonlocal sent
        for i in range(120):
            sent += 1
            yield pb.StreamEmbedRequest(id=i, image=pb.Image(content=picture))

    call = stubs.encoder.StreamEmbed(requests())
    time.sleep(3)
    held = sent
    gate.set()
    assert held < 80  # 64, and what is on the wire
    assert len(list(call)) == 120


@pytest.mark.parametrize("how", ["cancel", "deadline", "disconnect"])
def test_a_client_that_vanishes_frees_everything(stubs: Stubs, how: str) -> None:
    pipeline = stubs.running.server.engine.pipeline
    real, computed = pipeline._run, []

    def slow(images: Any) -> Any:
        time.sleep(0.2)
        computed.append(len(images))
        return real(images)

    pipeline._run = slow
    picture = encode(noise(40, 30))
    left = threading.Event()
    channel = grpc.insecure_channel(stubs.running.address, [("grpc.use_local_subchannel_pool", 1)])

    def requests(make: Callable[[int], Any]) -> Iterator[Any]:
        for i in range(500):
            yield make(i)
        left.wait(20)  # the stream stays open

    timeout = 1.0 if how == "deadline" else None
    calls = [
        pb_grpc.EncoderServiceStub(channel).StreamEmbed(
            requests(lambda i: pb.StreamEmbedRequest(id=i, image=pb.Image(content=picture))), timeout=timeout
        ),
        pb_grpc.CollectionServiceStub(channel).StreamUpsert(
            requests(
                lambda i: pb.StreamUpsertRequest(
                    collection="many", items=[pb.NewItem(key=f"v{i}", image=pb.Image(content=picture))]
                )
            ),
            timeout=timeout,
        ),
        pb_grpc.SearchServiceStub(channel).StreamSearch(
            requests(lambda i: pb.StreamSearchRequest(id=i, request=ask(i))), timeout=timeout
        ),
    ]
    until(lambda: len(stubs.running.server.engine._streams) == 3)
    time.sleep(0.5)
    if how == "cancel":
        for call in calls:
            call.cancel()
    elif how == "disconnect":
        channel.close()
    until(lambda: nothing_is_left(stubs))
    left.set()
    done = sum(computed)
    time.sleep(0.5)
    assert sum(computed) < done + 20 < 200  # the batch that was under way, and canaries
    channel.close()
    pipeline._run = real
    assert len(stubs.encoder.Embed(pb.EmbedRequest(images=[pb.Image(content=picture)] * 16)).results) == 16


def test_a_stopping_server_answers_what_it_has_read_and_ends_its_streams(stubs: Stubs) -> None:
    left = threading.Event()

    def requests() -> Iterator[pb.StreamSearchRequest]:
        for i in range(20):
            yield pb.StreamSearchRequest(id=i, request=ask(i))
        left.wait(20)

    call = stubs.search.StreamSearch(requests())
    answers = [next(call) for _ in range(20)]
    stopping = threading.Thread(target=stubs.running.stop)
    start = time.monotonic()
    stopping.start()
    assert refusal(lambda: next(call)) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
    assert time.monotonic() - start < 2.5 and len(answers) == 20  # not after the grace of 3 seconds
    left.set()
    stopping.join()


def test_a_batch_of_searches_fails_request_by_request(stubs: Stubs, pictures: Path) -> None:
    requests = [ask(i, collection="") for i in range(300)]
    requests[7] = ask(7, top_k=0)
    requests[8] = ask(8, filter="i = 8 OR i = 9", collection="")
    requests[9] = ask(9, collection="shapes")
    requests[10] = pb.SearchRequest(query=pb.Query(image=pb.Image(content=b"x")))
    requests[11] = pb.SearchRequest(query=pb.Query(key="k011"), top_k=1)
    requests[12] = ask(12, group_by="i", top_k=2)
    requests[13] = ask(13, min_score=0.999)
    reply = stubs.search.BatchSearch(pb.BatchSearchRequest(collection="many", requests=requests))
    assert len(reply.results) == 300 and reply.space_id and reply.timings.search.nanos
    wrong = {i: reason(r.error) for i, r in enumerate(reply.results) if r.HasField("error")}
    assert wrong == {7: "BAD_TOP_K", 9: "BAD_REQUEST", 10: "IMAGE_UNDECODABLE"}
    keys = [[n.item.key for n in r.response.neighbors] for r in reply.results]
    assert keys[8] == ["k008", "k009"] and keys[13] == ["k013"] and len(keys[12]) == 2 and keys[11] != ["k011"]
    for i in (0, 100, 299):
        single = stubs.search.Search(ask(i))
        assert [n.item.key for n in single.neighbors] == keys[i] and single.neighbors[0].item.payload["i"] == i
        assert single.next_page_token == reply.results[i].response.next_page_token
    code = grpc.StatusCode
    for count in (0, 1001):
        batch = pb.BatchSearchRequest(collection="many", requests=[ask(0)] * count)
        assert refusal(lambda: stubs.search.BatchSearch(batch)) == (code.INVALID_ARGUMENT, "BAD_COUNT")  # noqa: B023
    batch = pb.BatchSearchRequest(collection="none", requests=[ask(0)])
    assert refusal(lambda: stubs.search.BatchSearch(batch)) == (code.NOT_FOUND, "COLLECTION_NOT_FOUND")


def listed(stubs: Stubs, between: Callable[[int], None] = lambda _: None, **fields: Any) -> list[str]:
    keys: list[str] = []
    token, pages = "", 0
    while True:
        request = pb.ListItemsRequest(**{"collection": "many", "page_token": token, "page_size": 70, **fields})
        page = stubs.collections.ListItems(request)
        keys += [item.key for item in page.items]
        token = page.next_page_token
        if not token:
            return keys
        between(pages)
        pages += 1


def test_items_are_listed_once_while_others_are_written(stubs: Stubs, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = [f"k{i:03d}" for i in range(COUNT)]
    assert listed(stubs) == listed(stubs, order=pb.ITEM_ORDER_KEY, page_size=COUNT) == everything
    assert listed(stubs, order=pb.ITEM_ORDER_SEQUENCE, page_size=1000) == everything
    some = [f"k{i:03d}" for i in range(COUNT) if i < 40 or i > 280]
    monkeypatch.setattr("service.items.LOOKED_AT", 60)  # pages that are not full, and empty ones
    monkeypatch.setattr("service.items.LOOKED_AT_ONCE", 50)
    for order in (pb.ITEM_ORDER_KEY, pb.ITEM_ORDER_SEQUENCE):
        assert listed(stubs, filter="i < 40 OR i > 280", order=order, page_size=7) == some

    def write(page: int) -> None:
        stubs.collections.UpsertItems(pb.UpsertItemsRequest(collection="many", items=[new(0, f"x{page}"), new(2)]))
        stubs.collections.DeleteItems(pb.DeleteItemsRequest(collection="many", keys=[f"k{299 - page:03d}"]))
        if page == 1:
            stubs.running.server.engine.store.get("many").flush()

    found = listed(stubs, write, order=pb.ITEM_ORDER_KEY)
    kept = set(listed(stubs)) & set(everything)
    assert kept <= set(found) and len(found) == len(set(found))
    found = listed(stubs, write, order=pb.ITEM_ORDER_SEQUENCE)
    assert found.count("k002") >= 1 and found[-1].startswith(("x", "k"))


def test_listed_items_have_their_vectors_and_tokens_their_request(stubs: Stubs) -> None:
    page = stubs.collections.ListItems(pb.ListItemsRequest(collection="many", page_size=5, with_vectors=True))
    assert all(np.allclose(item.vector.values, ROWS[i], atol=1e-6) for i, item in enumerate(page.items))
    assert page.items[3].payload["i"] == 3 and page.space_id
    stubs.running.server.engine.store.get("many").flush()
    same = stubs.collections.ListItems(pb.ListItemsRequest(collection="many", page_size=5, with_vectors=True))
    assert same == page
    plain = stubs.collections.ListItems(pb.ListItemsRequest(collection="many", page_size=5))
    assert not plain.items[0].HasField("vector")
    for wrong, said in (
        ({"page_token": page.next_page_token, "filter": "i < 9"}, "BAD_PAGE_TOKEN"),
        ({"page_token": page.next_page_token, "order": pb.ITEM_ORDER_SEQUENCE}, "BAD_PAGE_TOKEN"),
        ({"page_token": "nonsense"}, "BAD_PAGE_TOKEN"),
        ({"page_size": 0}, "BAD_PAGE_SIZE"),
        ({"page_size": 1001}, "BAD_PAGE_SIZE"),
        ({"filter": "i <"}, "BAD_FILTER"),
        ({"order": 9}, "BAD_ORDER"),
    ):
        request = pb.ListItemsRequest(collection="many", **wrong)
        assert refusal(lambda: stubs.collections.ListItems(request))[1] == said  # noqa: B023


def test_duplicates_are_found_and_later_those_that_came_since(stubs: Stubs) -> None:
    stubs.collections.UpsertItems(pb.UpsertItemsRequest(collection="many", items=[new(3, "copy3"), new(5, "copy5")]))
    request = pb.FindDuplicatesRequest(collection="many", min_score=0.999)
    answers = list(stubs.collections.FindDuplicates(request))
    groups = [[item.key for item in group.items] for answer in answers for group in answer.groups]
    assert sorted(groups) == [["k003", "copy3"], ["k005", "copy5"]] and answers[-1].sequence == COUNT + 2
    request.after = answers[-1].sequence
    (nothing,) = stubs.collections.FindDuplicates(request)
    assert not nothing.groups and nothing.sequence == COUNT + 2
    stubs.collections.UpsertItems(pb.UpsertItemsRequest(collection="many", items=[new(3, "again")]))
    (found,) = stubs.collections.FindDuplicates(request)
    assert [item.key for item in found.groups[0].items][-1] == "again"
    for wrong, said in (
        ({"min_score": 2}, "BAD_SCORE"),
        ({"after": 10**6}, "BAD_SEQUENCE"),
        ({"filter": "<"}, "BAD_FILTER"),
    ):
        bad = pb.FindDuplicatesRequest(collection="many", **wrong)
        assert refusal(lambda: list(stubs.collections.FindDuplicates(bad)))[1] == said  # noqa: B023


def test_compaction_and_snapshots_while_the_server_serves(stubs: Stubs, tmp_path: Path) -> None:
    collection = stubs.running.server.engine.store.get("many")
    collection.flush()
    stubs.collections.UpsertItems(pb.UpsertItemsRequest(collection="many", items=[new(i, f"n{i}") for i in range(20)]))
    done = stubs.collections.CompactCollection(pb.CompactCollectionRequest(name="many"))
    assert (done.merged_segments, done.segments, done.collection.item_count) == (2, 1, COUNT + 20)

    def snapshot(name: str) -> Any:
        return stubs.collections.SnapshotCollection(pb.SnapshotCollectionRequest(name="many", snapshot=name))

    taken = snapshot("monday")
    assert (taken.snapshot, taken.item_count, taken.sequence) == ("monday", COUNT + 20, COUNT + 20)
    said = stubs.running.server.engine.metrics.registry.get_sample_value(
        "likewise_last_snapshot_timestamp_seconds", {"collection": "many"}
    )
    assert said is not None and 0 <= time.time() - said < 60
    assert main(["index", "restore", str(tmp_path / "snapshots" / "monday"), "--out", str(tmp_path / "restored")]) == 0
    assert refusal(lambda: snapshot("monday")) == (grpc.StatusCode.ALREADY_EXISTS, "SNAPSHOT_EXISTS")
    for name in ("", "../up", "A b"):
        assert refusal(lambda: snapshot(name))[1] == "BAD_NAME"  # noqa: B023
    stubs.running.server.engine.snapshots = None
    assert refusal(lambda: snapshot("tuesday")) == (grpc.StatusCode.FAILED_PRECONDITION, "NO_SNAPSHOTS_FOLDER")
