"""Who may call what: certificates, keys, roles, limits; over real connections."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from google.rpc import error_details_pb2 as details
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from likewise import main
from service.errors import RateLimitedError
from service.interceptor import METHODS
from service.metrics import Metrics
from service.pb import likewise_pb2 as pb
from service.pb import likewise_pb2_grpc as pb_grpc
from service.security import ROLES, Bucket, Guard, Role, hash_of, new_secret, read_keys, role_for
from tests.conftest import encode, noise
from tests.service.running import Running

PICTURE = encode(noise(40, 30))
SECRETS = {role.value: new_secret() for role in Role} | {"slow": new_secret(), "few": new_secret(), "old": new_secret()}
PASSWORD = "correct horse battery"


def bearer(name: str, secret: str | None = None) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {name}.{SECRETS[name] if secret is None else secret}"),)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """One key per role, one with a password, and some that are limited."""
    entries: list[dict[str, Any]] = [
        {"name": role.value, "hash": hash_of(SECRETS[role.value]), "role": role.value} for role in Role
    ]
    entries += [
        {"name": "person", "hash": hash_of(PASSWORD, "scrypt"), "role": "read"},
        {
            "name": "slow",
            "hash": hash_of(SECRETS["slow"]),
            "role": "write",
            "calls_per_second": 5,
            "pictures_per_second": 4,
        },
        {"name": "few", "hash": hash_of(SECRETS["few"]), "role": "read", "pictures_per_day": 3},
        {"name": "old", "hash": hash_of(SECRETS["old"]), "role": "admin", "expires": "2020-01-01"},
    ]
    path = tmp_path / "keys.yaml"
    path.write_text(yaml.safe_dump({"keys": entries}))
    return path


@pytest.fixture
def guarded(bundle: Path, keys: Path, tmp_path: Path) -> Iterator[Running]:
    running = Running(bundle=bundle, collections=tmp_path / "c", keys=keys)
    yield running
    running.stop()


@pytest.fixture
def channel(guarded: Running) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(guarded.address) as channel:
        yield channel


def refusal(call: Callable[[], Any]) -> tuple[str, str, float | None]:
    """Code, reason, and when to try again."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    status = rpc_status.from_call(caught.value)
    assert status is not None, caught.value
    info, retry = details.ErrorInfo(), details.RetryInfo()
    assert status.details[0].Unpack(info) and info.domain == "likewise"
    again = [d for d in status.details if d.Unpack(retry)]
    return caught.value.code().name, info.reason, retry.retry_delay.ToTimedelta().total_seconds() if again else None


def test_every_method_has_a_role_and_an_unknown_one_needs_admin() -> None:
    names = {method.partition("/")[2] for method in METHODS}
    assert set(ROLES) <= names
    releases = {method.name for method in pb.DESCRIPTOR.services_by_name["ReleaseService"].methods}
    changes = {"CreateCollection", "DeleteCollection", "CompactCollection", "SnapshotCollection"}
    assert names - set(ROLES) == changes | releases
    assert role_for("likewise.v1.ReleaseService/SwitchRelease") is Role.ADMIN
    assert Role.ADMIN.allows(Role.READ) and not Role.READ.allows(Role.WRITE)


def test_roles_decide_what_a_key_may_do(channel: grpc.Channel) -> None:
    collections, encoder = pb_grpc.CollectionServiceStub(channel), pb_grpc.EncoderServiceStub(channel)
    search = pb_grpc.SearchServiceStub(channel)
    collections.CreateCollection(pb.CreateCollectionRequest(name="a"), metadata=bearer("admin"))
    item = pb.NewItem(key="k", image=pb.Image(content=PICTURE))
    query = pb.Query(image=pb.Image(content=PICTURE))
    upsert = pb.UpsertItemsRequest(collection="a", items=[item])

    def create(name: str) -> Callable[[], Any]:
        return lambda: collections.CreateCollection(pb.CreateCollectionRequest(name="b"), metadata=bearer(name))

    assert refusal(lambda: collections.UpsertItems(upsert, metadata=bearer("read")))[:2] == (
        "PERMISSION_DENIED",
        "ROLE_NEEDED",
    )
    assert refusal(create("read"))[1] == refusal(create("write"))[1] == "ROLE_NEEDED"
    assert collections.UpsertItems(upsert, metadata=bearer("write")).results[0].sequence
    for name in ("read", "write", "admin"):
        assert encoder.Embed(pb.EmbedRequest(images=[pb.Image(content=PICTURE)]), metadata=bearer(name)).results
        found = search.Search(pb.SearchRequest(collection="a", query=query), metadata=bearer(name))
        assert [n.item.key for n in found.neighbors] == ["k"]


def test_who_shows_no_key_or_a_wrong_one_is_unauthenticated_and_health_is_open(channel: grpc.Channel) -> None:
    encoder = pb_grpc.EncoderServiceStub(channel)
    stream = iter([pb.StreamEmbedRequest(id=1, image=pb.Image(content=PICTURE))])
    request = pb.GetEncoderRequest()
    for metadata, reason in (
        ((), "KEY_MISSING"),
        ((("authorization", "Basic YTpi"),), "KEY_MISSING"),
        ((("authorization", "Bearer admin"),), "KEY_MISSING"),
        (bearer("admin", "wrong"), "KEY_UNKNOWN"),
        ((("authorization", f"Bearer nobody.{SECRETS['admin']}"),), "KEY_UNKNOWN"),
        ((("authorization", f"Bearer read.{SECRETS['admin']}"),), "KEY_UNKNOWN"),
        (bearer("old"), "KEY_EXPIRED"),
    ):
        assert refusal(lambda m=metadata: encoder.GetEncoder(request, metadata=m)) == ("UNAUTHENTICATED", reason, None)
    assert refusal(lambda: list(encoder.StreamEmbed(stream)))[:2] == ("UNAUTHENTICATED", "KEY_MISSING")
    checked = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
    assert checked.status == health_pb2.HealthCheckResponse.SERVING


def test_a_message_without_a_key_is_refused_before_it_is_read(guarded: Running) -> None:
    with grpc.insecure_channel(guarded.address, [("grpc.max_send_message_length", -1)]) as channel:
        request = pb.EmbedRequest(images=[pb.Image(content=bytes(100 * 2**20))])  # over the limit, had it been read
        assert refusal(lambda: pb_grpc.EncoderServiceStub(channel).Embed(request))[1] == "KEY_MISSING"


def test_reflection_asks_for_a_key(guarded: Running) -> None:
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

    with grpc.insecure_channel(guarded.address) as channel, pytest.raises(grpc.RpcError) as caught:
        list(ProtoReflectionDescriptorDatabase(channel).get_services())
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_a_password_is_hashed_with_scrypt_once(channel: grpc.Channel, guarded: Running) -> None:
    encoder = pb_grpc.EncoderServiceStub(channel)
    for secret, right in ((PASSWORD, True), ("wrong", False), (PASSWORD, True)):
        call = lambda s=secret: encoder.GetEncoder(pb.GetEncoderRequest(), metadata=bearer("person", s))  # noqa: E731
        if right:
            assert call().encoder.space_id
        else:
            assert refusal(call)[1] == "KEY_UNKNOWN"
    assert len(guarded.server._guard._let_in) == 1
    with ThreadPoolExecutor(16) as pool:  # who guesses is held off, and nobody else
        guesses = list(
            pool.map(
                lambda i: refusal(
                    lambda: encoder.GetEncoder(pb.GetEncoderRequest(), metadata=bearer("person", f"no{i}"))
                )[1],
                range(32),
            )
        )
        assert set(guesses) <= {"KEY_UNKNOWN", "QUEUE_FULL"}
    assert encoder.GetEncoder(pb.GetEncoderRequest(), metadata=bearer("person", PASSWORD)).encoder.space_id


def test_a_keys_calls_and_pictures_are_limited(channel: grpc.Channel) -> None:
    encoder = pb_grpc.EncoderServiceStub(channel)

    def embed(name: str, count: int) -> Any:
        request = pb.EmbedRequest(images=[pb.Image(content=PICTURE)] * count)
        return encoder.Embed(request, metadata=bearer(name))

    assert len(embed("slow", 4).results) == 4  # a second's worth at once
    code, reason, retry = refusal(lambda: embed("slow", 1))
    assert (code, reason) == ("RESOURCE_EXHAUSTED", "RATE_LIMITED") and retry is not None and 0 < retry <= 0.3
    time.sleep(retry + 0.05)
    assert len(embed("slow", 1).results) == 1
    reasons = []
    for _ in range(8):
        try:
            encoder.GetEncoder(pb.GetEncoderRequest(), metadata=bearer("slow"))
        except grpc.RpcError as e:
            reasons.append(e.code().name)
    assert reasons and set(reasons) == {"RESOURCE_EXHAUSTED"}
    assert len(embed("few", 2).results) == 2
    code, reason, retry = refusal(lambda: embed("few", 2))
    assert (code, reason) == ("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED") and retry is not None and retry <= 86400
    assert len(embed("few", 1).results) == 1  # what is left
    assert len(embed("read", 20).results) == 20  # others are not limited


def test_a_stream_is_slowed_down_to_its_keys_limits(channel: grpc.Channel) -> None:
    encoder = pb_grpc.EncoderServiceStub(channel)
    requests = [pb.StreamEmbedRequest(id=i, image=pb.Image(content=PICTURE)) for i in range(9)]
    start = time.monotonic()
    answers = list(encoder.StreamEmbed(iter(requests), metadata=bearer("slow"), timeout=30))
    assert len(answers) == 9 and not any(a.HasField("error") for a in answers)
    assert time.monotonic() - start > 0.9  # 4 at once, then 4 a second


def test_the_keys_name_is_who_fairness_counts_for(guarded: Running, channel: grpc.Channel) -> None:
    seen: list[str] = []
    admission = guarded.server.engine.pipeline.admission
    enter = admission.enter
    admission.enter = lambda client, count: (seen.append(client), enter(client, count))[1]  # type: ignore[method-assign,func-returns-value]
    request = pb.EmbedRequest(images=[pb.Image(content=PICTURE)])
    pb_grpc.EncoderServiceStub(channel).Embed(request, metadata=bearer("read"))
    assert seen == ["read"]


def test_keys_are_read_again_and_one_that_is_gone_is_refused(
    guarded: Running, channel: grpc.Channel, keys: Path
) -> None:
    encoder = pb_grpc.EncoderServiceStub(channel)
    kept = [k for k in yaml.safe_load(keys.read_text())["keys"] if k["name"] != "read"]
    keys.write_text("{[")
    guarded.server.reload()  # says so, and changes nothing
    assert encoder.GetEncoder(pb.GetEncoderRequest(), metadata=bearer("read")).encoder.space_id
    keys.write_text(json.dumps({"keys": kept}))
    guarded.server.reload()
    assert refusal(lambda: encoder.GetEncoder(pb.GetEncoderRequest(), metadata=bearer("read")))[1] == "KEY_UNKNOWN"
    assert encoder.GetEncoder(pb.GetEncoderRequest(), metadata=bearer("write")).encoder.space_id


def test_admin_methods_have_a_port_of_their_own(bundle: Path, keys: Path, tmp_path: Path) -> None:
    running = Running(bundle=bundle, collections=tmp_path / "c", keys=keys, admin_port=0, reflection="admin")
    try:
        with (
            grpc.insecure_channel(running.address) as everybody,
            grpc.insecure_channel(f"127.0.0.1:{running.server.admin_port}") as admin,
        ):
            create = pb.CreateCollectionRequest(name="a")
            called = lambda c, **k: pb_grpc.CollectionServiceStub(c).CreateCollection(create, **k)  # noqa: E731
            denied = refusal(lambda: called(everybody, metadata=bearer("admin")))
            assert denied == ("PERMISSION_DENIED", "ADMIN_PORT", None)
            assert refusal(lambda: called(admin))[1] == "KEY_MISSING"
            assert refusal(lambda: called(admin, metadata=bearer("write")))[1] == "ROLE_NEEDED"
            assert called(admin, metadata=bearer("admin")).collection.name == "a"
            listed = pb_grpc.CollectionServiceStub(everybody).ListCollections(
                pb.ListCollectionsRequest(), metadata=bearer("read")
            )
            assert [c.name for c in listed.collections] == ["a"]
    finally:
        running.stop()


# --- certificates -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, and certificates of it for a server and a client; and a client's of another one."""
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    for authority in ("ca", "other"):
        new = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
        openssl(*new, "-keyout", f"{authority}.key", "-out", f"{authority}.pem", "-subj", f"/CN=test {authority}")
    for name, authority in (("server", "ca"), ("client", "ca"), ("stranger", "other")):
        new = ["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", f"/CN={name}"]
        openssl(*new, "-keyout", f"{name}.key", "-out", f"{name}.csr")
        (folder / "san").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
        sign = [
            "x509",
            "-req",
            "-in",
            f"{name}.csr",
            "-CA",
            f"{authority}.pem",
            "-CAkey",
            f"{authority}.key",
            "-days",
            "2",
        ]
        openssl(*sign, "-CAcreateserial", "-extfile", "san", "-out", f"{name}.pem")
    return folder


def credentials(folder: Path, ca: str = "ca", client: str = "") -> grpc.ChannelCredentials:
    read = [(folder / f"{client}.{kind}").read_bytes() if client else None for kind in ("key", "pem")]
    return grpc.ssl_channel_credentials((folder / f"{ca}.pem").read_bytes(), *read)


def test_tls_and_client_certificates(bundle: Path, certificates: Path, tmp_path: Path) -> None:
    tls = {"certificate": certificates / "server.pem", "key": certificates / "server.key"}
    request = pb.GetEncoderRequest()

    def ask(address: str, given: grpc.ChannelCredentials | None) -> str:
        where = address.replace("127.0.0.1", "localhost")
        opened = grpc.insecure_channel(where) if given is None else grpc.secure_channel(where, given)
        with opened as channel:
            try:
                return pb_grpc.EncoderServiceStub(channel).GetEncoder(request, timeout=5).encoder.space_id[:4]
            except grpc.RpcError as e:
                return str(e.code().name)

    running = Running(bundle=bundle, collections=tmp_path / "c", tls=tls)
    try:
        assert ask(running.address, credentials(certificates)) == "lw1-"
        assert ask(running.address, credentials(certificates, "other")) == "UNAVAILABLE"  # no authority that it trusts
        assert ask(running.address, None) == "UNAVAILABLE"
    finally:
        running.stop()
    running = Running(bundle=bundle, collections=tmp_path / "c", tls=tls | {"client_ca": certificates / "ca.pem"})
    try:
        assert ask(running.address, credentials(certificates, client="client")) == "lw1-"
        assert ask(running.address, credentials(certificates)) == "UNAVAILABLE"
        assert ask(running.address, credentials(certificates, client="stranger")) == "UNAVAILABLE"
        flags = [
            "--server",
            running.address.replace("127.0.0.1", "localhost"),
            "--tls.ca",
            str(certificates / "ca.pem"),
        ]
        mine = ["--tls.certificate", str(certificates / "client.pem"), "--tls.key", str(certificates / "client.key")]
        assert main(["healthcheck", *flags, *mine]) == 0
    finally:
        running.stop()


def test_bad_certificates_and_keys_are_refused_with_one_sentence(
    bundle: Path, certificates: Path, tmp_path: Path, refused: Callable[..., str], capfd: pytest.CaptureFixture[str]
) -> None:
    serve = ["serve", "--bundle", bundle, "--collections", tmp_path / "c", "--port", 0, "--metrics-port", 0]
    pair = ["--tls.certificate", certificates / "server.pem", "--tls.key"]
    assert "do not go together" in refused(*serve, *pair, certificates / "client.key")
    assert "cannot be read" in refused(*serve, *pair, certificates / "none.key")
    assert main([*map(str, serve), "--tls.certificate", "x.pem"]) == 2
    assert "a certificate needs its key" in capfd.readouterr().err
    assert main([*map(str, serve), "--reflection", "admin"]) == 2
    for text, words in (
        ("keys: 3", "keys"),
        ("keys:\n- {name: a, hash: 'secret'}", "a hash is sha256:HEX"),
        ("keys:\n- {name: A B, hash: 'sha256:" + "0" * 64 + "'}", "name"),
        ("keys:\n- {name: a, hash: 'sha256:" + "0" * 64 + "', rule: x}", "rule"),
        ("keys: [", "not YAML"),
    ):
        file = tmp_path / "keys"
        file.write_text(text)
        sentence = refused(*serve, "--keys", file)
        assert words in sentence and "secret" not in sentence.replace("keys new", "")
    file.write_text("keys:\n" + 2 * f"- {{name: a, hash: '{hash_of('x')}'}}\n")
    assert "two keys have the name 'a'" in refused(*serve, "--keys", file)
    file.chmod(0o666)
    file.write_text("keys: []")
    assert "chmod o-w" in refused(*serve, "--keys", file)


# --- keys -------------------------------------------------------------------------------------------------------------


def test_a_new_key_is_shown_once_and_its_line_is_enough(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["keys", "new", "shop", "--role", "write", "--pictures-per-second", "50"]) == 0
    out = capfd.readouterr()
    shown = next(line.strip() for line in out.err.splitlines() if line.strip().startswith("shop."))
    assert shown.partition(".")[2] not in out.out
    file = tmp_path / "keys.yaml"
    file.write_text(f"keys:\n{out.out}")
    key = read_keys(file)["shop"]
    assert (key.role, key.pictures_per_second) == (Role.WRITE, 50)
    assert key.hash == hash_of(shown.partition(".")[2])
    assert main(["keys", "new", "Not A Name"]) == 2
    script = "from likewise import main; raise SystemExit(main(['keys', 'new', 'ann', '--ask']))"
    asked = subprocess.run(
        [sys.executable, "-c", script], input=f"{PASSWORD}\n", capture_output=True, text=True, check=True
    )
    assert PASSWORD not in asked.stdout + asked.stderr and "scrypt:" in asked.stdout


def test_a_bucket_gives_its_rate_and_pays_off_what_was_more(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("service.security.time.monotonic", lambda: now[0])
    bucket = Bucket(10)
    assert bucket.take(10) == 0 and bucket.take(1) == pytest.approx(0.1)
    now[0] += 1
    assert bucket.take(40) == 0  # full, so it goes, on credit
    assert bucket.take(1) == pytest.approx(3.1)
    now[0] += 3.11
    assert bucket.take(1) == 0
    taken = 0
    for _ in range(1000):
        now[0] += 0.01
        taken += bucket.take(1) == 0
    assert 99 <= taken <= 101


def test_limits_hold_for_each_key_alone(keys: Path) -> None:
    guard = Guard(keys, Metrics())
    guard.charge_pictures("slow", 4)
    with pytest.raises(RateLimitedError):
        guard.charge_pictures("slow", 1)
    for client in ("read", "ipv4:127.0.0.1:5", "slower"):
        guard.charge_pictures(client, 1000)
