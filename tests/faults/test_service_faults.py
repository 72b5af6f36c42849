"""A server and the world: clients that hang, vanish or send nonsense, decoders and devices that die, power that goes."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from benchmarks.kill_server import KilledServer
from service.client import CallError, Client, NewItem
from service.errors import InvalidArgumentError, NotFoundError, QueueFullError, ServiceError
from service.metrics import Metrics
from service.pace import Pace
from service.pb import likewise_pb2 as pb
from service.pb import likewise_pb2_grpc as pb_grpc
from service.pipeline import FairQueue, Job, Pipeline, Priority
from tests.conftest import encode, noise
from tests.faults.messages import Hail
from tests.service.running import Running
from tests.service.test_server import refusal

PICTURE = encode(noise(40, 30))
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = struct.pack(">I", 0)[1:] + b"\x04\x00" + struct.pack(">I", 0)
ACK = b"\x00\x00\x00\x04\x01\x00\x00\x00\x00"
# HEADERS that do not end them (no END_HEADERS): the rest never comes.
HALF_HEADERS = b"\x00\x00\x05\x01\x00\x00\x00\x00\x01\x83\x86\x44\x0a\x2f"
# DATA that announces 1,000 bytes and brings ten, after whole headers of a call.
STREAM_HEADERS = (
    b"\x83\x86\x04\x2c/likewise.v1.SearchService/Search".replace(
        b"\x2c", bytes([len("/likewise.v1.SearchService/Search")])
    )
    + b"\x41\x01x\x5f\x10application/grpc\x40\x02te\x08trailers"
)
HALF_BODY = (
    struct.pack(">I", len(STREAM_HEADERS))[1:] + b"\x01\x04" + struct.pack(">I", 1) + STREAM_HEADERS
    + struct.pack(">I", 1005)[1:] + b"\x00\x01" + struct.pack(">I", 1) + b"\x00" + struct.pack(">I", 1000) + b"x" * 10
)  # fmt: skip


@pytest.fixture
def running(bundle: Path, indexed: Path, tmp_path: Path) -> Iterator[Running]:
    """A server that is impatient with connections."""
    server = Running(
        bundle=bundle, collections=shutil.copytree(indexed, tmp_path / "collections"), snapshots=tmp_path / "snapshots",
        max_message_mb=1,
        connections={"handshake_seconds": 1, "keepalive_seconds": 1, "keepalive_timeout_seconds": 1, "most": 1500},
    )  # fmt: skip
    yield server
    server.stop()


@pytest.fixture
def client(running: Running) -> Iterator[Client]:
    with Client(running.address, timeout=20) as client:
        yield client


def files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def until(condition: Callable[[], bool], seconds: float = 15) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    assert condition()


def connected(running: Running, sent: bytes) -> socket.socket:
    host, port = running.address.split(":")
    found = socket.create_connection((host, int(port)), timeout=10)
    found.sendall(sent)
    return found


def is_closed(connection: socket.socket) -> bool:
    """By the server."""
    connection.settimeout(0.01)
    try:
        while connection.recv(65536):
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


# --- clients that hang ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        PREFACE[:10],
        PREFACE,
        PREFACE + SETTINGS + HALF_HEADERS,
        PREFACE + SETTINGS + HALF_BODY,
        PREFACE + SETTINGS + ACK,
    ],
    ids=["nothing", "half a preface", "no settings", "half a header", "half a body", "no ping"],
)
def test_clients_that_say_half_of_something_are_closed_and_harm_nobody(
    running: Running, client: Client, sent: bytes
) -> None:
    client.embed([PICTURE])
    before = files()
    slow = [connected(running, sent) for _ in range(200)]
    start = time.monotonic()
    assert isinstance(client.embed([PICTURE])[0], np.ndarray)
    assert len(client.search("shapes", vector=np.eye(64)[0])) == 10 and time.monotonic() - start < 5
    until(lambda: all(map(is_closed, slow)))
    for connection in slow:
        connection.close()
    until(lambda: files() <= before + 10)
    assert client.ready() and running.server.engine.metrics.in_flight._value.get() == 0


def test_a_thousand_connections_at_one_time(running: Running) -> None:
    """Each with a call of its own; beyond `connections.most` a connection is closed, and the others stay."""
    vector = np.eye(64, dtype=np.float32)[0]
    request = pb.SearchRequest(collection="shapes", query=pb.Query(vector=pb.Vector(values=vector.tolist())), top_k=1)

    async def everybody() -> int:
        options = [("grpc.use_local_subchannel_pool", 1)]
        channels = [grpc.aio.insecure_channel(running.address, options) for _ in range(1000)]
        try:
            stubs = [pb_grpc.SearchServiceStub(channel) for channel in channels]
            for _ in range(2):
                answers = await asyncio.gather(*(stub.Search(request, timeout=60) for stub in stubs))
                assert all(len(answer.neighbors) == 1 for answer in answers)
            return len(answers)
        finally:
            await asyncio.gather(*(channel.close() for channel in channels))

    before = files()
    assert asyncio.run(everybody()) == 1000
    until(lambda: files() <= before + 10)


def test_connections_beyond_the_most_are_closed_at_once(bundle: Path, tmp_path: Path) -> None:
    running = Running(bundle=bundle, collections=tmp_path / "c", connections={"most": 20})
    try:
        with Client(running.address) as client:
            client.embed([PICTURE])
            many = [connected(running, b"") for _ in range(60)]
            until(lambda: sum(map(is_closed, many)) >= 40)
            assert len(client.embed([PICTURE])) == 1
            for connection in many:
                connection.close()
            until(lambda: client.ready())
    finally:
        running.stop()


def test_messages_that_are_too_large_are_refused_and_the_server_lives(running: Running, client: Client) -> None:
    large = pb.EmbedRequest(images=[pb.Image(content=b"x" * (2 * 2**20))])
    with grpc.insecure_channel(running.address) as channel:
        for _ in range(5):
            with pytest.raises(grpc.RpcError) as caught:
                pb_grpc.EncoderServiceStub(channel).Embed(large, timeout=20)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        stream = pb_grpc.EncoderServiceStub(channel).StreamEmbed(
            iter([pb.StreamEmbedRequest(id=1, image=large.images[0])]), timeout=20
        )
        with pytest.raises(grpc.RpcError) as caught:
            list(stream)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert len(client.embed([PICTURE])) == 1


# --- clients that send nonsense ---------------------------------------------------------------------------------------


def test_whatever_comes_is_answered_as_the_api_says(running: Running, client: Client) -> None:
    client.create_collection("many")
    rows = np.random.default_rng(0).standard_normal((100, 64))
    client.upsert("many", [NewItem(f"k{i:03d}", vector=row, payload={"i": i}) for i, row in enumerate(rows)])
    with grpc.insecure_channel(running.address) as channel:
        hail = Hail(channel, seed=3, dimensions=64)
        for _ in range(300):
            hail.call()
    assert hail.wrong == [] and len(hail.outcomes) > 40
    until(client.ready)
    assert len(client.search("many", vector=rows[0])) == 10
    assert running.server.engine.metrics.in_flight._value.get() == 0


def test_bytes_that_are_no_message_are_the_callers_fault(running: Running) -> None:
    from google.rpc import error_details_pb2, status_pb2

    with grpc.insecure_channel(running.address) as channel:
        service = "/likewise.v1.SearchService"
        calls: tuple[Callable[[], Any], ...] = (
            lambda: channel.unary_unary(f"{service}/Search")(b"\xff\xff", timeout=10),
            lambda: channel.unary_unary(f"{service}/Search")(b"\x0a\x01\xff", timeout=10),  # a name that is no UTF-8
            lambda: list(channel.stream_stream(f"{service}/StreamSearch")(iter([b"\xff\xff"]), timeout=10)),
            lambda: list(
                channel.unary_stream("/likewise.v1.CollectionService/FindDuplicates")(b"\xff\xff", timeout=10)
            ),
        )
        for call in calls:
            with pytest.raises(grpc.RpcError) as caught:
                call()
            error: Any = caught.value
            details = status_pb2.Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
            info = error_details_pb2.ErrorInfo()
            assert details.details[0].Unpack(info)
            assert (error.code(), info.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "BAD_REQUEST")


@pytest.mark.parametrize("text", ["x" * 70_000, "\U0001f600" * 20_000, "\x01" * 70_000])
def test_a_refusal_fits_what_clients_accept_however_long_the_request(running: Running, text: str) -> None:
    """Trailing metadata of more than 8 KiB reach no client: it would see a broken stream."""
    with Client(running.address) as client:
        for call in (
            lambda: client.collection(text),
            lambda: client.get("shapes", text),
            lambda: client.search("shapes", vector=np.eye(64)[0], filter=f'"{text}'),
            lambda: client.search("shapes", vector=np.eye(64)[0], group_by=text),
            lambda: client.create_collection(text),
        ):
            assert refusal(call).code in ("NOT_FOUND", "INVALID_ARGUMENT")
    for error in (NotFoundError(text, "item", text), InvalidArgumentError(text, "BAD_REQUEST", "field", value=text)):
        status = error.status()
        percent = sum(1 if 32 <= b < 127 else 3 for b in status.message.encode())
        assert percent + len(status.SerializeToString()) * 4 / 3 < 8000
    assert ServiceError("short").status().message == "short"


# --- clients that vanish ----------------------------------------------------------------------------------------------

_VANISHING = """
import sys, grpc, numpy as np
from service.pb import likewise_pb2 as pb, likewise_pb2_grpc as pb_grpc
kind, address, picture = sys.argv[1], sys.argv[2], bytes.fromhex(sys.argv[3])
channel = grpc.insecure_channel(address)
vector = pb.Vector(values=np.eye(64, dtype=np.float32)[0].tolist())
def upserts():
    for i in range(10**6):
        yield pb.StreamUpsertRequest(collection="shapes", items=[pb.NewItem(key=f"v{i}", vector=vector)])
def embeds():
    for i in range(10**6):
        yield pb.StreamEmbedRequest(id=i, image=pb.Image(content=picture))
def searches():
    for i in range(10**6):
        query = pb.Query(vector=vector) if i % 2 else pb.Query(image=pb.Image(content=picture))
        yield pb.StreamSearchRequest(id=i, request=pb.SearchRequest(collection="shapes", query=query))
if kind == "upsert":
    for answer in pb_grpc.CollectionServiceStub(channel).StreamUpsert(upserts()):
        print(len(answer.results), flush=True)
elif kind == "embed":
    for answer in pb_grpc.EncoderServiceStub(channel).StreamEmbed(embeds()):
        print(1, flush=True)
else:
    for answer in pb_grpc.SearchServiceStub(channel).StreamSearch(searches()):
        print(1, flush=True)
"""


@pytest.mark.parametrize("kind", ["upsert", "embed", "search"])
def test_a_client_that_is_killed_in_a_stream_leaves_nothing_but_its_writes(
    running: Running, client: Client, kind: str
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _VANISHING, kind, running.address, PICTURE.hex()], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    told = 0
    for line in process.stdout:
        told += int(line)
        if told > 100:
            break
    process.kill()
    told += sum(int(line) for line in process.stdout.read().splitlines()[:-1])  # the last may be cut
    process.wait()
    process.stdout.close()
    engine = running.server.engine
    until(lambda: not engine._streams and not engine.pipeline.admission.inside and not engine.pipeline._coming)
    until(lambda: engine.metrics.in_flight._value.get() == 0)
    if kind == "upsert":
        assert {f"v{i}" for i in range(told)} <= engine.store.get("shapes").files().keys()
    assert isinstance(client.embed([PICTURE])[0], np.ndarray)


# --- decoders and devices that die ------------------------------------------------------------------------------------


def test_a_decoding_process_that_is_killed_under_load_costs_one_picture(bundle: Path, tmp_path: Path) -> None:
    running = Running(bundle=bundle, collections=tmp_path / "c", decoders="processes", threads=2)
    try:
        outcomes: list[Any] = []
        stop = threading.Event()

        def hammer() -> None:
            with Client(running.address, timeout=60) as client:
                while not stop.is_set():
                    outcomes.extend(client.embed([PICTURE] * 4))

        with ThreadPoolExecutor(3) as pool:
            working = [pool.submit(hammer) for _ in range(3)]
            kills = 0
            try:
                while kills < 2:
                    time.sleep(0.3)
                    decoder: Any = next(iter(running.server.engine.models.values()))._decoder
                    worker = decoder._idle.get()  # one of two; the other works on
                    decoder._idle.put(worker)
                    os.kill(worker._process.pid, signal.SIGKILL)
                    kills += 1
                    before = len(outcomes)
                    until(lambda: len(outcomes) > before + 40, 60)  # noqa: B023
            finally:
                stop.set()
            for each in working:
                each.result()
        failed = [each for each in outcomes if isinstance(each, CallError)]
        assert len(failed) <= kills and all(each.reason == "IMAGE_UNDECODABLE" for each in failed)
        with Client(running.address) as client:
            assert client.ready()
    finally:
        running.stop()


@pytest.mark.parametrize("how", ["raises", "nan", "nonsense"])
def test_callers_are_told_that_the_encoder_is_ill_until_it_is_well(
    bundle: Path, indexed: Path, tmp_path: Path, how: str
) -> None:
    running = Running(bundle=bundle, collections=shutil.copytree(indexed, tmp_path / "c"), check_seconds=1.0)
    pipeline = running.server.engine.pipeline
    real, gate = pipeline._run, threading.Event()

    def ill(images: np.ndarray) -> np.ndarray:
        if gate.is_set():
            return real(images)
        if how == "raises":
            raise RuntimeError("device lost")
        rows = real(images)
        return np.full_like(rows, np.nan) if how == "nan" else -rows

    try:
        with Client(running.address, timeout=0.9) as client, grpc.insecure_channel(running.address) as channel:
            assert client.ready() and len(client.embed([PICTURE])) == 1
            pipeline._run = ill
            if how == "nonsense":  # nothing fails: the next check finds out
                until(lambda: not client.ready())
            (result,) = client.embed([PICTURE])
            assert isinstance(result, CallError)
            assert (result.code, result.reason, result.retry_seconds) == ("UNAVAILABLE", "ENCODER_UNHEALTHY", 1.0)
            until(lambda: not client.ready(), 0.9)  # at once, not at the next check
            (result,) = client.upsert("shapes", [NewItem("a", image=PICTURE)])
            assert isinstance(result, CallError) and result.reason == "ENCODER_UNHEALTHY"
            stub = pb_grpc.EncoderServiceStub(channel)
            (answer,) = stub.StreamEmbed(iter([pb.StreamEmbedRequest(id=7, image=pb.Image(content=PICTURE))]))
            assert (answer.id, answer.error.code) == (7, grpc.StatusCode.UNAVAILABLE.value[0])
            assert len(client.search("shapes", vector=np.eye(64)[0])) == 10  # what needs no encoder goes on
            gate.set()
            until(client.ready)
            assert isinstance(client.embed([PICTURE])[0], np.ndarray)
    finally:
        gate.set()
        running.stop()


def test_an_ill_encoder_that_no_collection_needs_leaves_the_server_ready(
    bundle: Path, other_bundle: Path, indexed: Path, tmp_path: Path
) -> None:
    collections = shutil.copytree(indexed, tmp_path / "c")
    running = Running(bundle=bundle, other_bundles=[other_bundle], collections=collections, check_seconds=1.0)
    own, other = running.server.engine.models.values()
    real, gate = other.pipeline._run, threading.Event()

    def ill(images: np.ndarray) -> np.ndarray:
        if not gate.is_set():
            raise RuntimeError("device lost")
        return real(images)

    try:
        with Client(running.address, timeout=0.9) as client:
            other.pipeline._run = ill
            (result,) = client.embed([PICTURE], space_id=other.space_id)
            assert isinstance(result, CallError) and result.reason == "ENCODER_UNHEALTHY"
            time.sleep(1.5)
            assert client.ready() and isinstance(client.embed([PICTURE])[0], np.ndarray) and own.pipeline.sound
            gate.set()
            until(lambda: isinstance(client.embed([PICTURE], space_id=other.space_id)[0], np.ndarray))
    finally:
        gate.set()
        running.stop()


def test_an_encoder_that_fails_once_is_not_ill() -> None:
    """One batch of several fails, the canary passes: each picture is tried again."""
    calls: list[int] = []

    def run(pixels: np.ndarray) -> np.ndarray:
        calls.append(len(pixels))
        if len(calls) == 1:
            raise MemoryError
        return np.ones((len(pixels), 4), np.float32)

    async def scenario() -> None:
        async def decode(content: bytes, thumbnail: int | None) -> Any:
            raise AssertionError

        pipeline = Pipeline(decode, 1, run, 4, 0.05, 10, Metrics())
        pipeline.watch(np.zeros((2, 2, 3), np.uint8), lambda vector: bool(vector.sum() == 4))
        pipeline.start()
        found = await asyncio.gather(*(pipeline.embed(np.zeros((2, 2, 3), np.uint8)) for _ in range(3)))
        assert len(found) == 3 and pipeline.sound and not pipeline.doubted.is_set()
        await pipeline.stop()

    asyncio.run(scenario())
    assert calls == [3, 1, 1, 1, 1]


# --- more than can be done --------------------------------------------------------------------------------------------


def test_what_would_come_too_late_is_refused_at_once(bundle: Path, tmp_path: Path) -> None:
    """The encoder takes 50 ms a picture: of 60 that come at once with a second to live, those that make it are taken, the
    others hear so at once, and none expires in the queue."""
    running = Running(bundle=bundle, collections=tmp_path / "c", max_batch=2, check_seconds=30)
    pipeline = running.server.engine.pipeline
    real = pipeline._run

    def slow(images: np.ndarray) -> np.ndarray:
        time.sleep(0.05 * len(images))
        return real(images)

    pipeline._run = slow
    request = pb.EmbedRequest(images=[pb.Image(content=PICTURE)])

    async def hail() -> list[tuple[str, float]]:
        async with grpc.aio.insecure_channel(running.address) as channel:
            stub = pb_grpc.EncoderServiceStub(channel)
            patient = [asyncio.ensure_future(stub.Embed(request, timeout=60)) for _ in range(16)]
            await asyncio.sleep(0.5)  # its pace is known by now

            async def one() -> tuple[str, float]:
                start = time.monotonic()
                try:
                    await stub.Embed(request, timeout=1.2)
                except grpc.aio.AioRpcError as e:
                    return e.code().name, time.monotonic() - start
                return "OK", time.monotonic() - start

            found = await asyncio.gather(*(one() for _ in range(60)))
            await asyncio.gather(*patient)
            return found

    try:
        outcomes = asyncio.run(hail())
    finally:
        running.stop()
    refused = [seconds for name, seconds in outcomes if name == "RESOURCE_EXHAUSTED"]
    assert len(refused) > 30 and max(refused) < 0.8
    assert [name for name, _ in outcomes].count("OK") >= 3
    assert [name for name, _ in outcomes].count("DEADLINE_EXCEEDED") <= 2


def test_a_pace_is_known_while_a_queue_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    pace = Pace()
    pace.took(1, 0)
    assert pace.seconds(100, 1) == 0  # nothing waited: how fast it can be is not known
    pace.took(1, 50)
    for _ in range(10):
        clock[0] += 0.2
        pace.took(4, 50)
    assert pace.seconds(10, 1) == pytest.approx(0.55) and pace.seconds(10, 32) == pytest.approx(1.0)
    clock[0] += 30  # one batch that takes long
    assert pace.seconds(10, 1) == pytest.approx(0.55)
    pace.took(4, 0)
    clock[0] += 2  # idle for a while: forgotten
    assert pace.seconds(10, 1) == 0


def test_those_ahead_are_counted_as_turns_are_taken() -> None:
    queue = FairQueue()
    jobs = [("a", 0)] * 10 + [("b", 0)] * 2 + [("a", 1)] * 5
    for client, priority in jobs:
        queue.put(Job(client, Priority(priority), None, done=None))  # type: ignore[arg-type]
    assert queue.ahead("new", Priority.INTERACTIVE) == 2  # one of each
    assert queue.ahead("a", Priority.INTERACTIVE) == 12 and queue.ahead("b", Priority.INTERACTIVE) == 5
    assert queue.ahead("new", Priority.BULK) == 13


def test_a_search_that_would_come_too_late_is_refused_at_once(running: Running) -> None:
    """A collection of which a search takes 5 ms, alone or with others."""
    collection = running.server.engine.store.get("shapes")
    real = collection.search

    def slow(queries: np.ndarray, *given: Any, **named: Any) -> Any:
        time.sleep(0.005 * len(queries))
        return real(queries, *given, **named)

    collection.search = slow  # type: ignore[method-assign]
    searcher, vector = running.server.engine.searcher, np.eye(64, dtype=np.float32)[0]

    async def hail() -> tuple[list[Any], list[BaseException]]:
        patient = [searcher.submit(collection, vector, 3, len) for _ in range(400)]
        await asyncio.sleep(0.9)  # two batches of 64 are done: their pace is known
        found: list[Any] = []
        for _ in range(20):
            try:
                found.append(searcher.submit(collection, vector, 3, len, deadline=time.monotonic() + 0.2))
            except QueueFullError as e:
                found.append(e)
        return found, await asyncio.gather(*patient, return_exceptions=True)

    found, patient = asyncio.run_coroutine_threadsafe(hail(), running.loop).result(30)
    assert all(isinstance(each, QueueFullError) and (each.retry_seconds or 0) > 0 for each in found)
    assert patient == [3] * 400


# --- power that goes --------------------------------------------------------------------------------------------------


def test_a_server_that_is_killed_under_writes_has_what_it_acknowledged(bundle: Path, tmp_path: Path) -> None:
    assert KilledServer(bundle, tmp_path, seed=1).run(3) == []


@pytest.mark.slow
def test_a_server_that_is_killed_many_times_has_what_it_acknowledged(bundle: Path, tmp_path: Path) -> None:
    assert KilledServer(bundle, tmp_path, seed=2).run(40) == []
