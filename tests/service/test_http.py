"""HTTP and JSON: what gRPC answers, and refuses, over a port that browsers and curl reach."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import json
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np
import pytest
import yaml
from google.protobuf import json_format
from google.rpc import error_details_pb2 as details

from likewise import main
from service.client import Client
from service.pb import likewise_pb2 as pb
from service.pb import likewise_pb2_grpc as pb_grpc
from service.security import hash_of, new_secret
from service.transcode import METHODS
from tests.conftest import encode, noise
from tests.service.running import Running
from tests.service.test_security import certificates, credentials

__all__ = ["certificates"]  # a fixture
PICTURE = encode(noise(40, 30))
SEARCH, UPSERT = "likewise.v1.SearchService/Search", "likewise.v1.CollectionService/UpsertItems"
CREATE, ENCODER = "likewise.v1.CollectionService/CreateCollection", "likewise.v1.EncoderService/GetEncoder"
RAW = "v1/collections/shapes:search"
JSON, LINES = "application/json", "application/x-ndjson"


class Answer(NamedTuple):
    """Of the server."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.body.splitlines()]

    @property
    def refusal(self) -> tuple[int, str, str]:
        """Status, code and reason."""
        (info,) = [d for d in self.json["details"] if d["type"] == "google.rpc.ErrorInfo"]
        assert info["debug"]["domain"] == "likewise" and self.headers["Content-Type"] == JSON
        return self.status, self.json["code"], info["debug"]["reason"]


def answered(connection: http.client.HTTPConnection) -> Answer:
    response = connection.getresponse()
    return Answer(response.status, response.headers, response.read())


def ask(server: Running, path: str, body: Any = None, kind: str = JSON, verb: str = "POST", **headers: str) -> Answer:
    """A call; `body` is bytes, lines, or what becomes JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server.http_port, timeout=20)
    sent = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    if isinstance(body, list):
        sent = b"\n".join(json.dumps(each).encode() for each in body)
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    with contextlib.closing(connection):
        connection.request(verb, f"/{path}", sent, {"Content-Type": kind, **given} if kind else given)
        return answered(connection)


def image(content: bytes = PICTURE) -> dict[str, str]:
    return {"content": base64.b64encode(content).decode()}


@pytest.fixture(scope="module")
def server(bundle: Path, indexed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server without keys."""
    folder = shutil.copytree(indexed, tmp_path_factory.mktemp("http") / "c")
    running = Running(
        bundle=bundle, collections=folder, http_port=0, max_message_mb=1, http_origins=["https://shop.example"]
    )
    yield running
    running.stop()


SECRETS = {name: new_secret() for name in ("read", "write", "admin", "slow")}


@pytest.fixture(scope="module")
def guarded(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with keys, and a port for admins."""
    folder = tmp_path_factory.mktemp("guarded")
    entries: list[dict[str, Any]] = [
        {"name": n, "hash": hash_of(s), "role": n} for n, s in SECRETS.items() if n != "slow"
    ]
    entries.append({"name": "slow", "hash": hash_of(SECRETS["slow"]), "role": "read", "calls_per_second": 0.5})
    (folder / "keys").write_text(yaml.safe_dump({"keys": entries}))
    running = Running(bundle=bundle, collections=folder / "c", keys=folder / "keys", http_port=0, admin_port=0)
    with grpc.insecure_channel(f"127.0.0.1:{running.server.admin_port}") as channel:
        create = pb.CreateCollectionRequest(name="shapes")
        metadata = (("authorization", f"Bearer admin.{SECRETS['admin']}"),)
        pb_grpc.CollectionServiceStub(channel).CreateCollection(create, metadata=metadata)
    yield running
    running.stop()


def key(name: str) -> str:
    return f"Bearer {name}.{SECRETS[name]}"


# --- calls ------------------------------------------------------------------------------------------------------------


def test_a_search_is_grpcs_in_json(server: Running) -> None:
    request = {"collection": "shapes", "query": {"image": image()}, "topK": 3, "filter": 'folder != "ring"'}
    found = ask(server, SEARCH, request, X_Request_Id="order-66")
    assert (found.status, found.headers["Content-Type"], found.headers["X-Request-Id"]) == (200, JSON, "order-66")
    with grpc.insecure_channel(server.address) as channel:
        reply = pb_grpc.SearchServiceStub(channel).Search(json_format.ParseDict(request, pb.SearchRequest()))
    expected = json_format.MessageToDict(reply)
    assert {**found.json, "timings": None} == {**expected, "timings": None} and len(found.json["neighbors"]) == 3
    snake = {"collection": "shapes", "query": {"image": image()}, "top_k": 3, "min_score": -1}
    assert len(ask(server, SEARCH, snake, f"{JSON}; charset=utf-8").json["neighbors"]) == 3
    assert re.fullmatch("[0-9a-f]{16}", ask(server, SEARCH, snake, X_Request_Id="no good!").headers["X-Request-Id"])


def test_every_method_of_the_proto_is_there(server: Running) -> None:
    assert len(METHODS) == sum(len(s.methods) for s in pb.DESCRIPTOR.services_by_name.values())
    for method in METHODS.values():
        found = ask(server, method.path, b'{"nonsense": 1}', LINES if method.streams_in else JSON)
        assert found.refusal == (400, "invalid_argument", "BAD_JSON"), method.path
        assert "nonsense" in found.json["message"] and method.request.DESCRIPTOR.full_name in found.json["message"]
        empty = ask(server, method.path, {}, LINES if method.streams_in else JSON)
        assert empty.status in (200, 400, 404), (method.path, empty.body)  # whatever of gRPC it uses is there


def test_large_messages_go_both_ways(server: Running) -> None:
    rng = np.random.default_rng(0)
    items = [{"key": f"v{i}", "vector": {"values": rng.normal(size=64).tolist()}} for i in range(200)]
    assert len(ask(server, UPSERT, {"collection": "shapes", "items": items}).json["results"]) == 200
    listed = ask(server, "likewise.v1.CollectionService/ListItems", {
        "collection": "shapes", "pageSize": 500, "withVectors": True, "order": "ITEM_ORDER_SEQUENCE"
    })  # fmt: skip
    assert len(listed.body) > 100_000 and listed.json["items"][-1]["key"] == "v199"
    keys = {"collection": "shapes", "keys": [item["key"] for item in items]}
    assert ask(server, "likewise.v1.CollectionService/DeleteItems", keys).json == {"deletedCount": 200}


def test_buf_speaks_connect_with_it(server: Running) -> None:
    root = Path(__file__).resolve().parents[2]
    command = [
        str(Path(sys.executable).parent / "buf"),
        "curl",
        "--protocol",
        "connect",
        "--schema",
        str(root / "proto"),
    ]
    address = f"http://127.0.0.1:{server.server.http_port}/{SEARCH}"

    def curl(body: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, "-d", body, address], capture_output=True, text=True, check=False, timeout=30)

    done = curl('{"collection": "shapes", "query": {"key": "ring/00005.png"}, "topK": 2}')
    assert len(json.loads(done.stdout)["neighbors"]) == 2, done.stderr
    refused = curl('{"collection": "nope", "query": {"key": "x"}}')
    said = json.loads(refused.stderr)
    assert refused.returncode and said["code"] == "not_found"
    assert [d["debug"]["reason"] for d in said["details"] if d["type"] == "google.rpc.ErrorInfo"] == [
        "COLLECTION_NOT_FOUND"
    ]


def test_errors_have_their_status_and_details(server: Running) -> None:
    good = {"collection": "shapes", "query": {"key": "ring/00005.png"}}
    cases: list[tuple[Callable[[], Answer], int, str, str]] = [
        (lambda: ask(server, SEARCH, {**good, "collection": "nope"}), 404, "not_found", "COLLECTION_NOT_FOUND"),
        (lambda: ask(server, CREATE, {"name": "shapes"}), 409, "already_exists", "COLLECTION_EXISTS"),
        (lambda: ask(server, SEARCH, {**good, "topK": 9999}), 400, "invalid_argument", "BAD_TOP_K"),
        (lambda: ask(server, SEARCH, {**good, "query": {"vector": {"values": [1], "space_id": "lw1-other"}}}),
         400, "failed_precondition", "MODEL_INDEX_MISMATCH"),
        (lambda: ask(server, SEARCH, b'{"topK": '), 400, "invalid_argument", "BAD_JSON"),
        (lambda: ask(server, SEARCH, b""), 400, "invalid_argument", "BAD_JSON"),
        (lambda: ask(server, SEARCH, b"[" * 100_000), 400, "invalid_argument", "BAD_JSON"),
        (lambda: ask(server, SEARCH, b'{"query":' * 50_000), 400, "invalid_argument", "BAD_JSON"),
        (lambda: ask(server, SEARCH, good, "text/plain"), 415, "invalid_argument", "BAD_CONTENT_TYPE"),
        (lambda: ask(server, SEARCH, b"\xff", "application/proto"), 400, "invalid_argument", "BAD_BODY"),
        (lambda: ask(server, SEARCH, good, Content_Encoding="gzip"), 415, "invalid_argument", "BAD_CONTENT_TYPE"),
        (lambda: ask(server, SEARCH, good, Connect_Timeout_Ms="soon"), 400, "invalid_argument", "BAD_REQUEST"),
        (lambda: ask(server, "likewise.v1.SearchService/Guess", {}), 404, "unimplemented", "UNKNOWN_PATH"),
        (lambda: ask(server, "grpc.health.v1.Health/Check", {}), 404, "unimplemented", "UNKNOWN_PATH"),
        (lambda: ask(server, SEARCH, verb="GET"), 405, "unimplemented", "BAD_VERB"),
    ]  # fmt: skip
    for call, *expected in cases:
        assert call().refusal == tuple(expected)
    found = ask(server, SEARCH, {**good, "topK": 9999}).json
    info, bad = details.ErrorInfo(), details.BadRequest()
    for message, detail in zip((info, bad), found["details"], strict=True):
        assert detail["type"] == message.DESCRIPTOR.full_name
        message.ParseFromString(base64.b64decode(detail["value"] + "=="))
    assert info.metadata["limit"] == "1000" and bad.field_violations[0].field == "top_k"
    assert found["message"].startswith("top_k is 9999")


def test_a_fault_of_ours_is_answered_without_its_secrets(
    server: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("a secret")

    monkeypatch.setattr("service.http_server.message_from", broken)
    found = ask(server, ENCODER, {})
    assert found.refusal == (500, "internal", "INTERNAL") and "secret" not in found.body.decode()
    assert any("a secret" in record.message for record in caplog.records)


def test_what_is_too_large_is_refused(server: Running) -> None:
    large = {"collection": "shapes", "query": {"image": image(bytes(2**20))}}
    too_large = (413, "resource_exhausted", "MESSAGE_TOO_LARGE")
    assert ask(server, SEARCH, large).refusal == too_large
    connection = http.client.HTTPConnection("127.0.0.1", server.server.http_port, timeout=20)
    with contextlib.closing(connection):  # of a length that it does not say
        connection.request("POST", f"/{SEARCH}", iter([bytes(2**19)] * 3), {"Content-Type": JSON}, encode_chunked=True)
        assert answered(connection).refusal == too_large
    assert ask(server, RAW, bytes(2**20 + 1), "image/jpeg").refusal == too_large
    assert ask(server, "likewise.v1.SearchService/StreamSearch", bytes(2**20 + 1), LINES).refusal == too_large
    assert ask(server, *form(("image", bytes(2**20 + 1)))).refusal == too_large


def test_a_deadline_frees_the_call(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = server.server.engine.pipeline
    run = pipeline._run
    monkeypatch.setattr(pipeline, "_run", lambda images: (time.sleep(0.5), run(images))[1])
    start = time.monotonic()
    found = ask(server, SEARCH, {"collection": "shapes", "query": {"image": image()}}, Connect_Timeout_Ms="100")
    assert (found.status, found.json["code"]) == (504, "deadline_exceeded") and time.monotonic() - start < 0.45


# --- pictures ---------------------------------------------------------------------------------------------------------


def form(*parts: tuple[str, bytes], path: str = RAW) -> tuple[str, bytes, str]:
    """Path, body and content type."""
    body = b"".join(
        b'--xyz\r\nContent-Disposition: form-data; name="%b"; filename="a"\r\n\r\n%b\r\n' % (name.encode(), content)
        for name, content in parts
    )
    return path, body + b"--xyz--\r\n", "multipart/form-data; boundary=xyz"


def test_a_picture_is_searched_for_as_it_is(server: Running, pictures: Path) -> None:
    data = (pictures / "star/00003.png").read_bytes()
    by_json = ask(server, SEARCH, {"collection": "shapes", "query": {"image": image(data)}, "topK": 2})
    expected = [n["item"]["key"] for n in by_json.json["neighbors"]]
    assert expected[0] == "star/00003.png"
    for found in (
        ask(server, f"{RAW}?top_k=2", data, "image/png"),
        ask(server, f"{RAW}?topK=2", data, "application/octet-stream"),
        ask(server, *form(("image", data), ("top_k", b"2"))),
        ask(server, *form(("top_k", b"2"), ("image", data), path=f"{RAW}?with_thumbnails=true")),
    ):
        assert [n["item"]["key"] for n in found.json["neighbors"]] == expected
    only = ask(server, f"{RAW}?top_k=9&filter=folder%20%3D%20%22ring%22&min_score=-1", data, "image/png").json[
        "neighbors"
    ]
    assert {n["item"]["key"].partition("/")[0] for n in only} == {"ring"}
    for call, *expected in (
        (ask(server, RAW, b"nonsense", "image/png"), 400, "IMAGE_UNDECODABLE"),
        (ask(server, RAW, b"", "image/png"), 400, "IMAGE_EMPTY"),
        (ask(server, "v1/collections/nope:search", data, "image/png"), 404, "COLLECTION_NOT_FOUND"),
        (ask(server, f"{RAW}?top_q=2", data, "image/png"), 400, "BAD_REQUEST"),
        (ask(server, f"{RAW}?top_k=2&top_k=3", data, "image/png"), 400, "BAD_REQUEST"),
        (ask(server, f"{RAW}?top_k=two", data, "image/png"), 400, "BAD_JSON"),
        (ask(server, RAW, data, "application/x-www-form-urlencoded"), 415, "BAD_CONTENT_TYPE"),
        (ask(server, *form(("picture", b"x"))), 400, "BAD_BODY"),
        (ask(server, *form(("image", b"x"), ("image", b"y"))), 400, "BAD_BODY"),
        (ask(server, *form(*[(f"p{i}", b"x") for i in range(40)])), 400, "BAD_BODY"),
        (ask(server, RAW, b"no form", "multipart/form-data; boundary=xyz"), 400, "BAD_BODY"),
        (ask(server, RAW, b"no form", "multipart/form-data"), 400, "BAD_BODY"),
    ):
        assert call.refusal[::2] == tuple(expected), call.body


# --- streams ----------------------------------------------------------------------------------------------------------


def test_streams_are_lines(server: Running) -> None:
    embed = [{"id": i, "image": image() if i else image(b"x")} for i in range(5)]
    found = ask(server, "likewise.v1.EncoderService/StreamEmbed", embed, LINES)
    assert (found.status, found.headers["Content-Type"]) == (200, LINES)
    results = {int(line["result"].get("id", 0)): line["result"] for line in found.lines}
    assert sorted(results) == [0, 1, 2, 3, 4] and len(results[4]["embedding"]["values"]) == 64
    assert results[0]["error"]["details"][0]["reason"] == "IMAGE_UNDECODABLE"
    search = [
        {"id": i, "request": {"collection": "shapes", "query": {"key": "ring/00005.png"}, "topK": 2}} for i in range(9)
    ]
    found = ask(server, "likewise.v1.SearchService/StreamSearch", search, LINES)
    assert all(len(line["result"]["response"]["neighbors"]) == 2 for line in found.lines) and len(found.lines) == 9
    upsert = [{"collection": "shapes", "items": [{"key": f"s{i}", "image": image()}]} for i in range(5)]
    found = ask(server, "likewise.v1.CollectionService/StreamUpsert", upsert, LINES)
    assert len([r for line in found.lines for r in line["result"]["results"]]) == 5
    groups = ask(server, "likewise.v1.CollectionService/FindDuplicates", {"collection": "shapes", "minScore": 0.9999})
    assert groups.headers["Content-Type"] == LINES
    largest = groups.lines[0]["result"]["groups"][0]["items"]
    assert {item["key"] for item in largest} == {f"s{i}" for i in range(5)}
    assert ask(server, "likewise.v1.SearchService/StreamSearch", b"\n\n", LINES)[::2] == (200, b"")


def test_what_is_wrong_with_a_line_comes_last(server: Running) -> None:
    items = json.dumps({"collection": "shapes", "items": [{"key": "w", "image": image()}]}).encode()
    found = ask(server, "likewise.v1.CollectionService/StreamUpsert", items + b"\n\n{oops}\n" + items, LINES)
    result, error = found.lines
    assert found.status == 200 and "sequence" in result["result"]["results"][0]
    assert error["error"]["code"] == "invalid_argument" and error["error"]["message"].startswith("line 3: ")
    other = items.replace(b"shapes", b"nope")
    found = ask(server, "likewise.v1.CollectionService/StreamUpsert", items + b"\n" + other, LINES)
    assert "result" in found.lines[0] and found.lines[-1]["error"]["code"] == "invalid_argument"
    found = ask(server, "likewise.v1.CollectionService/StreamUpsert", other, LINES)  # before any: the status says it
    assert found.refusal == (404, "not_found", "COLLECTION_NOT_FOUND")
    found = ask(server, "likewise.v1.CollectionService/FindDuplicates", {"collection": "nope"})
    assert found.refusal == (404, "not_found", "COLLECTION_NOT_FOUND")
    assert ask(server, "likewise.v1.SearchService/StreamSearch", {}).refusal[0] == 415


def test_answers_come_while_the_stream_goes_on_and_a_caller_that_leaves_frees_it(server: Running) -> None:
    in_flight = lambda: server.server.engine.metrics.in_flight._value.get()  # noqa: E731
    line = (
        json.dumps({"id": 7, "request": {"collection": "shapes", "query": {"key": "ring/00005.png"}}}).encode() + b"\n"
    )
    with socket.create_connection(("127.0.0.1", server.server.http_port), timeout=10) as s, s.makefile("rb") as answers:
        head = f"POST /likewise.v1.SearchService/StreamSearch HTTP/1.1\r\nHost: x\r\nContent-Type: {LINES}\r\n"
        s.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        for _ in range(3):
            s.sendall(b"%x\r\n%b\r\n" % (len(line), line))
            while not (said := answers.readline()).startswith(b'{"result"'):
                assert said
            assert json.loads(said)["result"]["id"] == "7"
        assert in_flight() == 1
    deadline = time.monotonic() + 5
    while in_flight() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert in_flight() == 0


# --- who may ----------------------------------------------------------------------------------------------------------


def test_keys_and_roles_are_grpcs(guarded: Running) -> None:
    query = {"collection": "shapes", "query": {"image": image()}}
    upsert = {"collection": "shapes", "items": [{"key": "k", "image": image()}]}
    nobody = ask(guarded, SEARCH, query)
    assert nobody.refusal == (401, "unauthenticated", "KEY_MISSING") and nobody.headers["WWW-Authenticate"] == "Bearer"
    cases = [
        (SEARCH, query, JSON, "Basic YTpi", 401, "KEY_MISSING"),
        (SEARCH, query, JSON, "Bearer ü.ü", 401, "KEY_MISSING"),
        (SEARCH, query, JSON, f"Bearer read.{SECRETS['admin']}", 401, "KEY_UNKNOWN"),
        (UPSERT, upsert, JSON, key("read"), 403, "ROLE_NEEDED"),
        ("likewise.v1.CollectionService/StreamUpsert", [upsert], LINES, key("read"), 403, "ROLE_NEEDED"),
        (CREATE, {"name": "b"}, JSON, key("write"), 403, "ADMIN_PORT"),
        (CREATE, {"name": "b"}, JSON, key("admin"), 403, "ADMIN_PORT"),
        (RAW, PICTURE, "image/jpeg", "", 401, "KEY_MISSING"),
    ]
    for path, body, kind, authorization, status, reason in cases:
        headers = {"Authorization": authorization.encode().decode("latin-1")} if authorization else {}
        assert ask(guarded, path, body, kind, **headers).refusal[::2] == (status, reason), path
    assert ask(guarded, UPSERT, upsert, Authorization=key("write")).json["results"][0]["sequence"]
    for path, body, kind in ((SEARCH, query, JSON), (RAW, PICTURE, "image/jpeg")):
        found = ask(guarded, path, body, kind, Authorization=key("read"))
        assert [n["item"]["key"] for n in found.json["neighbors"]] == ["k"]
    for path in ("healthz", "readyz", "openapi.json", ""):
        assert ask(guarded, path, verb="GET", kind="").status == 200


def test_who_may_not_call_is_refused_before_the_body(guarded: Running) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", guarded.server.http_port, timeout=5)
    with contextlib.closing(connection):
        connection.putrequest("POST", f"/{SEARCH}")
        connection.putheader("Content-Type", JSON)
        connection.putheader("Content-Length", str(2**20))
        connection.endheaders(b"{")  # and no more
        found = answered(connection)
    assert found.refusal[::2] == (401, "KEY_MISSING") and found.headers["Connection"] == "close"


def test_limits_say_when_to_try_again(guarded: Running) -> None:
    found = [ask(guarded, ENCODER, {}, Authorization=key("slow")) for _ in range(2)]
    assert [f.status for f in found] == [200, 429]
    assert found[1].refusal == (429, "resource_exhausted", "RATE_LIMITED") and found[1].headers["Retry-After"] in "12"
    (retry,) = [d for d in found[1].json["details"] if d["type"] == "google.rpc.RetryInfo"]
    assert 0 < float(retry["debug"]["retryDelay"].rstrip("s")) <= 2


def test_fairness_counts_by_key_or_address_and_nobody_says_another(
    server: Running, guarded: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    for running in (server, guarded):
        admission = running.server.engine.pipeline.admission
        enter = admission.enter
        monkeypatch.setattr(
            admission, "enter", lambda client, n, enter=enter: (seen.append(client), enter(client, n))[1]
        )
    spoofed = {"X_Likewise_Peer": "http:10.0.0.1", "X_Likewise_Client": "boss", "X_Forwarded_For": "10.0.0.1"}
    assert ask(server, RAW, PICTURE, "image/jpeg", **spoofed).status == 200
    assert ask(guarded, RAW, PICTURE, "image/jpeg", Authorization=key("read"), **spoofed).status == 200
    with grpc.insecure_channel(server.address) as channel:
        request = pb.EmbedRequest(images=[pb.Image(content=PICTURE)])
        metadata = tuple((name.lower().replace("_", "-"), value) for name, value in spoofed.items())
        pb_grpc.EncoderServiceStub(channel).Embed(request, metadata=metadata)
    assert seen[:2] == ["http:127.0.0.1", "read"] and seen[2].startswith("ipv4:127.0.0.1:")


def test_pages_of_other_origins_may_not_call(server: Running) -> None:
    request = {"collection": "shapes", "query": {"key": "ring/00005.png"}}
    preflight = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "content-type"}
    port = server.server.http_port
    found = ask(server, SEARCH, verb="OPTIONS", kind="", Origin="https://shop.example", **preflight)
    assert (found.status, found.headers["Access-Control-Allow-Origin"]) == (204, "https://shop.example")
    assert "Content-Type" in found.headers["Access-Control-Allow-Headers"] and found.headers["Vary"] == "Origin"
    found = ask(server, SEARCH, request, Origin="https://shop.example")
    assert (found.status, found.headers["Access-Control-Allow-Origin"]) == (200, "https://shop.example")
    assert "X-Request-Id" in found.headers["Access-Control-Expose-Headers"]
    # One that is refused can be read by the page, too.
    assert ask(server, SEARCH, {}, Origin="https://shop.example").headers["Access-Control-Allow-Origin"]
    for origin in (
        "https://evil.example",
        "null",
        "https://shop.example.evil",
        "http://shop.example",
        "http://127.0.0.1:1",
    ):
        for found in (
            ask(server, SEARCH, verb="OPTIONS", kind="", Origin=origin, **preflight),
            ask(server, SEARCH, request, Origin=origin),
            ask(server, *form(("image", PICTURE)), Origin=origin),  # needs no leave of ours to be sent
        ):
            assert found.refusal == (403, "permission_denied", "ORIGIN_REFUSED")
            assert "Access-Control-Allow-Origin" not in found.headers
    assert ask(server, SEARCH, request, Origin=f"http://127.0.0.1:{port}").status == 200  # the server's own page
    rebound = ask(server, SEARCH, request, Origin=f"http://evil.example:{port}", Host=f"evil.example:{port}")
    assert rebound.refusal[2] == "ORIGIN_REFUSED"


def test_tls_and_client_certificates_are_those_of_grpc(
    bundle: Path, certificates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tls = {name: certificates / f"{file}" for name, file in (("certificate", "server.pem"), ("key", "server.key"))}
    tls["client_ca"] = certificates / "ca.pem"
    running = Running(bundle=bundle, collections=tmp_path / "c", tls=tls, http_port=0)
    seen: list[str] = []
    admission = running.server.engine.pipeline.admission
    enter = admission.enter
    monkeypatch.setattr(admission, "enter", lambda client, n: (seen.append(client), enter(client, n))[1])
    context = ssl.create_default_context(cafile=str(certificates / "ca.pem"))
    try:
        for name, status in (("client", 200), ("stranger", None), ("", None)):
            if name:
                context.load_cert_chain(certificates / f"{name}.pem", certificates / f"{name}.key")
            else:
                context = ssl.create_default_context(cafile=str(certificates / "ca.pem"))
            port = running.server.http_port
            connection = http.client.HTTPSConnection("localhost", port, timeout=5, context=context)
            body = json.dumps({"images": [image()]})
            with contextlib.closing(connection):
                if status is None:
                    with pytest.raises(OSError):
                        connection.request("POST", "/likewise.v1.EncoderService/Embed", body, {"Content-Type": JSON})
                        connection.getresponse()
                else:
                    connection.request("POST", "/likewise.v1.EncoderService/Embed", body, {"Content-Type": JSON})
                    assert connection.getresponse().status == status
        with pytest.raises(OSError):
            ask(running, ENCODER, {})  # not in the clear
        with grpc.secure_channel(
            f"localhost:{running.server.port}", credentials(certificates, client="client")
        ) as channel:
            pb_grpc.EncoderServiceStub(channel).Embed(pb.EmbedRequest(images=[pb.Image(content=PICTURE)]))
        assert seen == ["client", "client"]
    finally:
        running.stop()


# --- health, and stopping ---------------------------------------------------------------------------------------------


def test_a_drain_is_seen_and_finishes_what_is_in_flight(bundle: Path, tmp_path: Path) -> None:
    running = Running(bundle=bundle, collections=tmp_path / "c", http_port=0, drain_seconds=0.5, grace_seconds=5)
    pipeline = running.server.engine.pipeline
    run, begun, go = pipeline._run, threading.Event(), threading.Event()
    slow: list[Answer] = []
    stream = http.client.HTTPConnection("127.0.0.1", running.server.http_port, timeout=20)
    idle = http.client.HTTPConnection("127.0.0.1", running.server.http_port, timeout=20)
    try:
        assert ask(running, "readyz", verb="GET", kind="").status == 200
        stop = threading.Thread(target=running.stop)
        stop.start()
        deadline = time.monotonic() + 5
        while ask(running, "readyz", verb="GET", kind="").status == 200 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert ask(running, "readyz", verb="GET", kind="").status == 503
        assert ask(running, "healthz", verb="GET", kind="").status == 200  # alive: nobody should kill it
        assert ask(running, ENCODER, {}).status == 200
        idle.request("GET", "/healthz")
        assert answered(idle).status == 200
        pipeline._run = lambda images: (begun.set(), go.wait(5), run(images))[2]
        body = {"images": [image()]}
        call = threading.Thread(target=lambda: slow.append(ask(running, "likewise.v1.EncoderService/Embed", body)))
        call.start()
        assert begun.wait(5)
        time.sleep(0.7)  # the drain is over: no new calls
        idle.request("POST", f"/{ENCODER}", b"{}", {"Content-Type": JSON})
        refused = answered(idle)
        assert refused.refusal == (503, "unavailable", "DRAINING")
        assert refused.headers["Retry-After"] == "1" and refused.headers["Connection"] == "close"
        with pytest.raises(OSError):
            ask(running, "healthz", verb="GET", kind="")
        go.set()
        call.join(10)
        assert slow[0].status == 200 and len(slow[0].json["results"]) == 1
    finally:
        go.set()
        stop.join(30)
        stream.close()
        idle.close()


def test_a_stream_and_a_call_that_do_not_end_are_cut_off_with_a_word(bundle: Path, tmp_path: Path) -> None:
    running = Running(bundle=bundle, collections=tmp_path / "c", http_port=0, grace_seconds=0.5)
    go = threading.Event()
    pipeline = running.server.engine.pipeline
    run = pipeline._run
    pipeline._run = lambda images: (go.wait(3), run(images))[1]
    found: list[Answer] = []
    body = {"images": [image()]}
    call = threading.Thread(target=lambda: found.append(ask(running, "likewise.v1.EncoderService/Embed", body)))
    call.start()
    with socket.create_connection(("127.0.0.1", running.server.http_port), timeout=10) as s:
        head = f"POST /likewise.v1.SearchService/StreamSearch HTTP/1.1\r\nHost: x\r\nContent-Type: {LINES}\r\n"
        s.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        time.sleep(0.3)
        stop = threading.Thread(target=running.stop)
        stop.start()
        call.join(10)
        go.set()
        stop.join(20)
        said = b""
        while chunk := s.recv(65536):
            said += chunk
    assert found[0].refusal == (503, "unavailable", "DRAINING")
    assert said.startswith(b"HTTP/1.1 503 ") and b"DRAINING" in said


def test_what_cannot_be_served_is_refused_with_one_sentence(
    bundle: Path, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    serve = ["serve", "--bundle", bundle, "--collections", tmp_path / "c", "--port", 0, "--metrics-port", 0]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "another --http-port" in refused(*serve, "--http-port", taken.getsockname()[1])
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    monkeypatch.delitem(sys.modules, "service.http_server", raising=False)
    monkeypatch.delitem(sys.modules, "service.http_body", raising=False)
    assert "pip install 'likewise[http]'" in refused(*serve, "--http-port", 0)
    assert main([*map(str, serve), "--http-origins", "shop.example"]) == 2
    assert "is no origin" in capfd.readouterr().err
    flags = ["--bundle", "b", "--http-origins", "https://a.example,https://b.example", "--http-origins", "*"]
    assert main(["config", "print", *flags]) == 0
    assert "http-origins = ['https://a.example', 'https://b.example', '*']  (flag)" in capfd.readouterr().out


# --- what describes it ------------------------------------------------------------------------------------------------


def test_the_description_is_valid_and_served(server: Running, guarded: Running) -> None:
    from openapi_spec_validator import OpenAPIV31SpecValidator

    found = ask(server, "openapi.json", verb="GET", kind="")
    OpenAPIV31SpecValidator(found.json).validate()
    assert {f"/{path}" for path in METHODS} <= set(found.json["paths"])
    for path in found.json["paths"].values():
        for operation in path.values():
            assert operation["summary"], operation["operationId"]


def test_the_page_runs_what_it_came_with_and_nothing_else(server: Running) -> None:
    page = ask(server, "", verb="GET", kind="")
    policy = page.headers["Content-Security-Policy"]
    for kind in ("script", "style"):
        (inline,) = re.findall(f"<{kind}>(.*?)</{kind}>", page.body.decode(), re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy and not re.search(r'(src|href)="?(https?:)?//', page.body.decode())


def test_reflection_decides_where_it_is_described(bundle: Path, tmp_path: Path) -> None:
    running = Running(bundle=bundle, collections=tmp_path / "c", http_port=0, reflection="off")
    try:
        for path in ("openapi.json", ""):
            assert ask(running, path, verb="GET", kind="").refusal == (404, "unimplemented", "UNKNOWN_PATH")
        assert ask(running, "readyz", verb="GET", kind="").status == 200
        with Client(running.address) as client:
            assert client.ready()
    finally:
        running.stop()
