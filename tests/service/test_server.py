"""The server over a real connection, with our client and with one that we did not write."""

from __future__ import annotations

import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image

from likewise import main
from service.client import CallError, Client, NewItem
from service.collection import Collection
from service.errors import InternalError
from service.pb import likewise_pb2 as pb
from service.pb import likewise_pb2_grpc as pb_grpc
from service.sheet import picture_of
from tests.conftest import encode, noise
from tests.service.running import Running, address_of


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture
def running(bundle: Path, indexed: Path, tmp_path: Path) -> Iterator[Running]:
    """A server on a copy of it."""
    server = Running(bundle=bundle, collections=shutil.copytree(indexed, tmp_path / "collections"))
    yield server
    server.stop()


@pytest.fixture
def client(running: Running) -> Iterator[Client]:
    with Client(running.address, timeout=20) as client:
        yield client


def refusal(call: Callable[[], Any]) -> CallError:
    with pytest.raises(CallError) as caught:
        call()
    return caught.value


def test_a_stored_picture_finds_itself(client: Client, pictures: Path) -> None:
    data = (pictures / "star/00003.png").read_bytes()
    found = client.search("shapes", image=data, top_k=5)
    assert len(found) == 5 and found[0].key == "star/00003.png" and found[0].score > 0.9999
    assert found[0].payload == {"folder": "star"} and found[0].source_uri.endswith("/star/00003.png")
    assert [n.score for n in found] == sorted((n.score for n in found), reverse=True)
    (vector,) = client.embed([data])
    assert isinstance(vector, np.ndarray) and vector.shape == (64,)
    assert [n.key for n in client.search("shapes", vector=vector, top_k=5)] == [n.key for n in found]
    by_key = client.search("shapes", key="star/00003.png", top_k=4)
    assert [n.key for n in by_key] == [n.key for n in found[1:]]
    assert all(n.score >= found[2].score for n in client.search("shapes", image=data, min_score=found[2].score))
    assert np.allclose(client.get("shapes", "star/00003.png").vector, vector, atol=1e-6)


def test_writes_are_seen_by_the_next_search(client: Client) -> None:
    picture = encode(noise(40, 30, 9))
    (sequence,) = client.upsert("shapes", [NewItem("new/ü 1.jpg", image=picture, payload={"price": 3, "tags": ["a"]})])
    assert isinstance(sequence, int)
    (best,) = client.search("shapes", image=picture, top_k=1)
    assert best.key == "new/ü 1.jpg" and best.payload == {"price": 3.0, "tags": ["a"]}
    other = client.get("shapes", "star/00003.png").vector
    client.upsert("shapes", [NewItem("new/ü 1.jpg", vector=2 * other)])  # replaces, and is scaled
    assert np.allclose(client.get("shapes", "new/ü 1.jpg").vector, other, atol=1e-6)
    assert client.collection("shapes").item_count == 65
    assert client.delete("shapes", ["new/ü 1.jpg", "never"]) == ["never"]
    assert all(n.key != "new/ü 1.jpg" for n in client.search("shapes", vector=other, top_k=64))
    assert refusal(lambda: client.get("shapes", "new/ü 1.jpg")).reason == "ITEM_NOT_FOUND"


def test_vectors_of_a_variant_that_finds_other_neighbours_are_refused(
    running: Running, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture, vector = encode(noise(40, 30, 9)), client.get("shapes", "star/00003.png").vector
    monkeypatch.setattr(running.server.engine.encoder.runtime, "variant", "int8")
    error = refusal(lambda: client.upsert("shapes", [NewItem("a", image=picture)]))
    assert (error.code, error.reason) == ("FAILED_PRECONDITION", "VARIANT_MISMATCH")
    assert "the collection holds vectors of fp32/CPUExecutionProvider, this encoder is int8/" in str(error)
    assert isinstance(client.upsert("shapes", [NewItem("b", vector=vector)])[0], int)  # a client's own vector


def test_one_bad_picture_fails_alone(client: Client) -> None:
    good = encode(noise(40, 30))
    results = client.embed([good, b"", b"text", encode(noise(1, 1), "PNG"), good[:300], good])
    reasons = [r.reason if isinstance(r, CallError) else "ok" for r in results]
    assert reasons == ["ok", "IMAGE_EMPTY", "IMAGE_UNDECODABLE", "IMAGE_TOO_SMALL", "IMAGE_UNDECODABLE", "ok"]
    assert np.array_equal(results[0], results[5])
    items = [NewItem("a", image=good), NewItem("b", image=b"x"), NewItem("", image=good), NewItem("c")]
    outcomes = client.upsert("shapes", [*items, NewItem("d", vector=[1.0])])
    assert isinstance(outcomes[0], int)
    assert [o.reason for o in outcomes[1:]] == ["IMAGE_UNDECODABLE", "BAD_KEY", "BAD_REQUEST", "BAD_DIMENSIONS"]
    assert client.collection("shapes").item_count == 65


def test_refusals_say_code_reason_and_sentence(client: Client) -> None:
    picture = encode(noise(40, 30))
    cases = [
        (lambda: client.search("nope", image=picture), "NOT_FOUND", "COLLECTION_NOT_FOUND", "known: shapes"),
        (lambda: client.search("shapes", image=b"x"), "INVALID_ARGUMENT", "IMAGE_UNDECODABLE", "not a picture"),
        (lambda: client.search("shapes", key="x"), "NOT_FOUND", "ITEM_NOT_FOUND", "'x'"),
        (lambda: client.search("shapes", vector=[1, 2]), "INVALID_ARGUMENT", "BAD_DIMENSIONS", "2 values"),
        (lambda: client.search("shapes", vector=np.zeros(64)), "INVALID_ARGUMENT", "BAD_VECTOR", "zero"),
        (lambda: client.search("shapes", vector=np.full(64, np.nan)), "INVALID_ARGUMENT", "BAD_VECTOR", "finite"),
        (lambda: client.search("shapes"), "INVALID_ARGUMENT", "BAD_REQUEST", "query is missing"),
        (lambda: client.search("shapes", image=picture, top_k=-1), "INVALID_ARGUMENT", "BAD_TOP_K", "1 to 1000"),
        (lambda: client.search("shapes", image=picture, top_k=10001), "INVALID_ARGUMENT", "BAD_TOP_K", "1 to 10000"),
        (
            lambda: client.search("shapes", vector=np.ones(64), space_id="lw1-other"),
            "FAILED_PRECONDITION",
            "MODEL_INDEX_MISMATCH",
            "lw1-other",
        ),
        (lambda: client.embed([]), "INVALID_ARGUMENT", "BAD_COUNT", "0 images"),
        (lambda: client.embed([b""] * 257), "INVALID_ARGUMENT", "BAD_COUNT", "257 images"),
        (lambda: client.create_collection("No Good"), "INVALID_ARGUMENT", "BAD_NAME", "a-z"),
        (lambda: client.create_collection("../up"), "INVALID_ARGUMENT", "BAD_NAME", "a-z"),
        (lambda: client.create_collection("shapes"), "ALREADY_EXISTS", "COLLECTION_EXISTS", "exists already"),
        (lambda: client.delete_collection("nope"), "NOT_FOUND", "COLLECTION_NOT_FOUND", "nope"),
    ]  # fmt: skip
    for call, code, reason, words in cases:
        error = refusal(call)
        assert (error.code, error.reason) == (code, reason) and words in str(error)
    assert client.ready()


def test_collections_come_and_go(client: Client) -> None:
    picture = encode(noise(40, 30))
    for name in ("b", "a"):
        assert client.create_collection(name).item_count == 0
    assert [c.name for c in client.collections()] == ["a", "b", "shapes"]
    assert client.search("a", image=picture) == []  # an empty collection is ready
    client.upsert("a", [NewItem("x", image=picture)])
    client.delete_collection("a")
    assert [c.name for c in client.collections()] == ["b", "shapes"]
    assert client.create_collection("a").item_count == 0


def test_listing_pages(client: Client, running: Running) -> None:
    for i in range(4):
        client.create_collection(f"c{i}")
    with grpc.insecure_channel(running.address) as channel:
        stub = pb_grpc.CollectionServiceStub(channel)
        names, token = [], ""
        while True:
            page = stub.ListCollections(pb.ListCollectionsRequest(page_size=2, page_token=token))
            names.append([c.name for c in page.collections])
            token = page.next_page_token
            if not token:
                break
    assert names == [["c0", "c1"], ["c2", "c3"], ["shapes"]]


def test_replies_carry_space_and_timings(running: Running) -> None:
    with grpc.insecure_channel(running.address) as channel:
        query = pb.Query(image=pb.Image(content=encode(noise(40, 30))))
        request = pb.SearchRequest(collection="shapes", query=query)
        reply = pb_grpc.SearchServiceStub(channel).Search(request)
    assert reply.space_id.startswith("lw1-") and len(reply.neighbors) == 10
    times = [getattr(reply.timings, name).ToNanoseconds() for name in ("decode", "infer", "search", "total")]
    assert all(t > 0 for t in times) and times[-1] >= max(times[:-1])


def test_errors_carry_their_details(running: Running) -> None:
    from google.rpc import error_details_pb2 as details
    from grpc_status import rpc_status

    with grpc.insecure_channel(running.address) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            pb_grpc.SearchServiceStub(channel).Search(pb.SearchRequest(collection="shapes", top_k=9999))
        status = rpc_status.from_call(caught.value)
        info, bad = details.ErrorInfo(), details.BadRequest()
        assert status.details[0].Unpack(info) and status.details[1].Unpack(bad)
        assert (info.domain, info.reason, info.metadata["limit"]) == ("likewise", "BAD_TOP_K", "1000")
        assert bad.field_violations[0].field == "top_k"
        request = pb.EmbedRequest(images=[pb.Image(content=b"?")])
        error = pb_grpc.EncoderServiceStub(channel).Embed(request).results[0].error
        assert error.code == 3 and error.details[1].Unpack(bad)
        assert bad.field_violations[0].field == "images[0].content"


def test_pictures_of_many_requests_share_batches(running: Running, client: Client) -> None:
    picture = encode(noise(40, 30))
    reference = client.embed([picture])[0]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: client.embed([picture])[0], range(64)))
    assert all(np.allclose(a, reference, atol=1e-5) for a in answers)
    samples = {s.name: s.value for m in running.server.engine.metrics.batch_size.collect() for s in m.samples}
    assert samples["likewise_batch_size_sum"] > samples["likewise_batch_size_count"]


def test_a_full_queue_refuses_at_once_and_says_when_to_retry(bundle: Path, tmp_path: Path) -> None:
    running = Running(bundle=bundle, collections=tmp_path / "c", queue_limit=4)
    try:
        with Client(running.address) as client:
            error = refusal(lambda: client.embed([b"x"] * 5))
            assert (error.code, error.reason, error.metadata["limit"]) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL", "4")
            assert error.retry_seconds == 0.5
            assert len(client.embed([encode(noise(9, 9))] * 4)) == 4  # and recovers
    finally:
        running.stop()


def test_a_poisonous_picture_fails_alone_and_the_server_stays(running: Running, client: Client) -> None:
    engine = running.server.engine
    real = engine.encoder.runtime.embed
    poison = np.full((32, 32, 3), 255, np.uint8)

    def fragile(images: np.ndarray) -> np.ndarray:
        if any((image == poison).all() for image in images):
            raise RuntimeError("the kernel choked")
        return real(images)

    engine.pipeline._run = fragile
    good, bad = encode(noise(40, 30)), encode(Image.new("RGB", (32, 32), (255, 255, 255)), "PNG")
    results = client.embed([good, bad, good])
    assert isinstance(results[1], CallError) and results[1].code == "INTERNAL" and "choked" in str(results[1])
    assert isinstance(results[0], np.ndarray) and isinstance(results[2], np.ndarray)
    assert client.ready()


def test_readiness_follows_the_canary(running: Running, client: Client) -> None:
    batcher = running.server.engine.pipeline
    real = batcher._run

    def wait_until(ready: bool) -> None:
        deadline = time.monotonic() + 10
        while client.ready() != ready and time.monotonic() < deadline:
            time.sleep(0.05)
        assert client.ready() == ready

    wait_until(True)
    batcher._run = lambda images: -real(images)  # a device that computes nonsense
    wait_until(False)

    def broken(images: np.ndarray) -> np.ndarray:
        raise InternalError("device lost")

    batcher._run = broken
    time.sleep(0.5)
    wait_until(False)
    batcher._run = real
    wait_until(True)
    collection = running.server.engine.store.get("shapes")
    search = collection.search
    for bad in (lambda *_: [[]], lambda *_: [][0]):  # a query without its answer, and one that fails
        collection.search = bad
        wait_until(False)
        collection.search = search
        wait_until(True)


def test_a_deadline_over_the_wire_frees_the_encoder(running: Running) -> None:
    batcher = running.server.engine.pipeline
    real, computed = batcher._run, []

    def slow(images: np.ndarray) -> np.ndarray:
        time.sleep(0.4)
        computed.append(len(images))
        return real(images)

    batcher._run = slow
    picture = encode(noise(40, 30))
    with (
        Client(running.address, timeout=20) as patient,
        Client(running.address, timeout=0.2) as hasty,
        ThreadPoolExecutor(2) as pool,
    ):
        first = pool.submit(patient.embed, [picture])
        time.sleep(0.1)
        error = refusal(lambda: hasty.embed([picture] * 7))
        assert error.code == "DEADLINE_EXCEEDED"
        assert len(first.result()) == 1
        time.sleep(0.6)
    assert 7 not in computed and 8 not in computed


def test_deleting_under_load_refuses_cleanly(running: Running, client: Client) -> None:
    """Create, write, search, list and delete one collection from many threads: only NOT_FOUND and its kin come back."""
    accepted = {"COLLECTION_NOT_FOUND", "COLLECTION_EXISTS"}
    problems: list[str] = []
    vector = np.eye(64)[0]
    stop = time.monotonic() + 1.5

    def hammer(call: Callable[[], object]) -> None:
        while time.monotonic() < stop:
            try:
                call()
            except CallError as e:
                if e.reason not in accepted or call == client.collections:  # listing never fails for another's end
                    problems.append(f"{e.code} {e.reason} {e}")

    calls = [
        lambda: client.create_collection("busy"),
        lambda: client.delete_collection("busy"),
        lambda: client.upsert("busy", [NewItem("a", vector=vector)]),
        lambda: client.search("busy", vector=vector),
        client.collections,
    ]
    with ThreadPoolExecutor(len(calls)) as pool:
        list(pool.map(hammer, calls))
    assert problems == [] and client.ready()
    assert client.collection("shapes").item_count == 64


def test_payloads_that_cannot_be_stored_fail_alone(client: Client) -> None:
    vector = np.eye(64)[0]
    items = [NewItem("good", vector=vector), NewItem("bad", vector=vector, payload={"x": float("nan")})]
    results = client.upsert("shapes", items)
    assert isinstance(results[0], int) and isinstance(results[1], CallError) and results[1].reason == "BAD_PAYLOAD"
    nested = {"tags": ["a", {"b": None}], "n": 2.5, "yes": True}
    client.upsert("shapes", [NewItem("nested", vector=vector, payload=nested)])
    assert client.get("shapes", "nested").payload == nested
    for call in (
        lambda: client.upsert("shapes", [NewItem("x", vector=vector, payload={"x": object()})]),
        lambda: client.search("shapes", vector=vector, top_k=2**40),
        lambda: client.search("shapes", vector=vector, key="nested"),
    ):
        assert refusal(call).code == "INVALID_ARGUMENT"
    assert refusal(lambda: client.search("shapes", vector=vector, min_score=float("nan"))).reason == "BAD_MIN_SCORE"
    assert refusal(lambda: client.search("shapes", vector=vector, top_k=0)).reason == "BAD_TOP_K"


def test_metrics_pass_promtool(bundle: Path, indexed: Path, tmp_path: Path) -> None:
    port = free_port()
    running = Running(bundle=bundle, collections=shutil.copytree(indexed, tmp_path / "c"), metrics_port=port)
    try:
        with Client(running.address) as client:
            client.search("shapes", image=encode(noise(40, 30)))
            client.embed([b"x"])
            refusal(lambda: client.get("shapes", "nope"))
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
    finally:
        running.stop()
    for line in (
        'likewise_requests_total{code="OK",method="likewise.v1.SearchService/Search"} 1.0',
        'likewise_requests_total{code="NOT_FOUND",method="likewise.v1.CollectionService/GetItem"} 1.0',
        'likewise_images_total{outcome="IMAGE_UNDECODABLE"} 1.0',
        'likewise_collection_items{collection="shapes"} 64.0',
        "likewise_ready 1.0",
        "likewise_queue_depth 0.0",
    ):
        assert line in text.splitlines(), line
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian package prometheus); the names were not linted")
    checked = subprocess.run(["promtool", "check", "metrics"], input=text, text=True, capture_output=True, check=False)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def test_a_single_collection_is_served_as_it_is(bundle: Path, indexed: Path, tmp_path: Path) -> None:
    running = Running(bundle=bundle, collections=shutil.copytree(indexed / "shapes", tmp_path / "only"))
    try:
        with Client(running.address) as client:
            assert [c.name for c in client.collections()] == ["only"]
            for call in (lambda: client.create_collection("x"), lambda: client.delete_collection("only")):
                assert refusal(call).reason == "COLLECTIONS_FIXED"
    finally:
        running.stop()


def test_many_fresh_rows_move_into_a_segment(running: Running, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.collection.FRESH_LIMIT", 50)
    vectors = np.random.default_rng(0).normal(size=(60, 64)).astype(np.float32)
    client.upsert("shapes", [NewItem(f"v{i}", vector=v) for i, v in enumerate(vectors)])
    collection = running.server.engine.store.get("shapes")
    deadline = time.monotonic() + 10
    while collection.fresh_count and time.monotonic() < deadline:
        time.sleep(0.02)
    assert collection.fresh_count == 0 and len(collection) == 124
    assert client.search("shapes", vector=vectors[7], top_k=1)[0].key == "v7"


# --- as a process -----------------------------------------------------------------------------------------------------


def start(*arguments: object) -> tuple[subprocess.Popen[str], str]:
    """`likewise serve`, and where it listens."""
    process = subprocess.Popen(
        [sys.executable, "-m", "likewise", "serve", *map(str, arguments)], stderr=subprocess.PIPE, text=True
    )
    return process, address_of(process)


def test_sigterm_finishes_and_keeps_every_write(bundle: Path, indexed: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(indexed, tmp_path / "c")
    process, address = start("--bundle", bundle, "--collections", folder, "--port", 0, "--metrics-port", 0)
    acknowledged: list[str] = []
    with Client(address) as client:
        assert main(["healthcheck", "--server", address]) == 0
        for i in range(20):
            client.upsert("shapes", [NewItem(f"k{i}", vector=np.eye(64)[i])])
            acknowledged.append(f"k{i}")
        process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert process.stderr is not None
    assert process.stderr.read().splitlines()[-2:] == ["draining", "stopped"]
    process.stderr.close()
    collection = Collection(folder / "shapes")
    assert {f"k{i}" for i in range(20)} <= collection.files().keys() and len(collection) == 84
    collection.close()
    assert main(["healthcheck", "--server", address, "--timeout", "2"]) == 1


def test_many_collections_are_served_where_a_shell_allows_few_files(
    bundle: Path, indexed: Path, tmp_path: Path
) -> None:
    for number in range(30):
        shutil.copytree(indexed / "shapes", tmp_path / "c" / f"c{number}")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, before[1]))  # the child's; this process has its files open
    try:
        process, address = start("--bundle", bundle, "--collections", tmp_path / "c", "--port", 0, "--metrics-port", 0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    with Client(address) as client:
        found = [client.search(c.name, vector=np.eye(64)[0], top_k=1) for c in client.collections()]
        assert len(found) == 30 and all(len(neighbors) == 1 for neighbors in found)
    process.terminate()
    assert process.wait(20) == 0
    assert process.stderr is not None
    process.stderr.close()


def test_sigkill_under_writes_keeps_what_was_acknowledged(bundle: Path, tmp_path: Path) -> None:
    process, address = start("--bundle", bundle, "--collections", tmp_path / "c", "--port", 0, "--metrics-port", 0)
    acknowledged = []
    with Client(address, timeout=5) as client:
        client.create_collection("k")
        threading.Timer(0.5, process.kill).start()
        for i in range(100_000):
            try:
                client.upsert("k", [NewItem(f"k{i}", vector=np.eye(64)[i % 64])])
            except CallError as e:
                assert e.code == "UNAVAILABLE"
                break
            acknowledged.append(f"k{i}")
    process.wait(10)
    assert process.stderr is not None
    process.stderr.close()
    collection = Collection(tmp_path / "c" / "k")
    assert set(acknowledged) <= collection.files().keys() and len(acknowledged) > 5
    assert len(collection) <= len(acknowledged) + 1
    collection.close()


def test_starting_is_refused_with_one_sentence(
    bundle: Path, other_bundle: Path, indexed: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    serve = ["serve", "--bundle", bundle, "--metrics-port", 0]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert "another --port" in refused(*serve, "--collections", tmp_path / "c", "--port", port)
        flags = ["--collections", tmp_path / "c", "--port", 0, "--metrics-port", port]
        assert "another --metrics-port" in refused("serve", "--bundle", bundle, *flags)
    mismatch = refused("serve", "--bundle", other_bundle, "--collections", indexed, "--port", 0)
    assert "MODEL_INDEX_MISMATCH" in mismatch
    assert "is not a bundle" in refused("serve", "--bundle", tmp_path, "--collections", indexed)
    damaged = shutil.copytree(bundle, tmp_path / "damaged")
    data = bytearray((damaged / "model.onnx").read_bytes())
    data[100] ^= 1
    (damaged / "model.onnx").write_bytes(data)
    assert "model.onnx has checksum" in refused("serve", "--bundle", damaged, "--collections", indexed)
    file = tmp_path / "file"
    file.write_text("x")
    assert "cannot be used for collections" in refused(*serve, "--collections", file)
    odd = shutil.copytree(indexed, tmp_path / "odd")
    (odd / "shapes").rename(odd / "My Shapes")
    assert "rename it" in refused(*serve, "--collections", odd)


def test_query_prints_a_table_and_draws_a_sheet(
    running: Running, pictures: Path, tmp_path: Path, refused: Callable[..., str], capfd: pytest.CaptureFixture[str]
) -> None:
    picture, sheet = pictures / "star/00003.png", tmp_path / "sheets" / "one.png"
    flags = ["--server", running.address, "--top-k", "5"]
    assert main(["query", str(picture), *flags, "--out", str(sheet)]) == 0
    table = capfd.readouterr().out
    assert table.splitlines()[1].split()[:3] == ["1", "star/00003.png", "1.000"]
    with Image.open(sheet) as drawn:
        assert drawn.width > 6 * 144 and len(drawn.convert("L").getcolors(256) or range(257)) > 20
    (tmp_path / "text.jpg").write_text("hello")
    assert "text.jpg: the bytes are not a picture" in refused("query", tmp_path / "text.jpg", *flags)
    assert "cannot be read" in refused("query", tmp_path / "none.jpg", *flags)
    assert "no collection 'zoo'" in refused("query", picture, *flags, "--collection", "zoo")
    for uri in ("file:///%00", "file://[", "file:///dev/zero", "https://example.org/a.jpg", "file:///nowhere.jpg"):
        assert picture_of(uri, "../../etc/passwd", tmp_path) is None
    assert picture_of("", "star/00003.png", pictures) == picture.read_bytes()
    with Client(running.address) as client:  # markup, control characters
        client.upsert("shapes", [NewItem("x [/b] y \x1b[31m", vector=client.get("shapes", "star/00003.png").vector)])
    assert main(["query", str(picture), *flags]) == 0
    assert "x [/b] y \ufffd[31m" in capfd.readouterr().out
    assert "ending in .png or .jpg" in refused("query", picture, *flags, "--out", tmp_path / "sheet.xyz")
    nobody = f"127.0.0.1:{free_port()}"
    assert "start one with `likewise serve`" in refused("query", picture, "--server", nobody)
    with Client(running.address) as client:
        client.create_collection("second")
    assert "choose one with --collection" in refused("query", picture, *flags)
