"""Both clients against a real server: the same surface, retries within a budget, streams of any length, and `upsert`."""

from __future__ import annotations

import asyncio
import inspect
import shutil
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from likewise import main
from service.async_client import AsyncClient
from service.client import CallError, Client, NewItem
from service.errors import QueueFullError, UnavailableError
from service.messages import ATTEMPTS, Retries
from tests.conftest import encode, noise
from tests.service.running import Running


@pytest.fixture
def running(bundle: Path, indexed: Path, tmp_path: Path) -> Iterator[Running]:
    folder = shutil.copytree(indexed, tmp_path / "collections")
    server = Running(bundle=bundle, collections=folder, snapshots=tmp_path / "snapshots")
    yield server
    server.stop()


@pytest.fixture
def client(running: Running) -> Iterator[Client]:
    with Client(running.address, timeout=20, connections=2) as client:
        yield client


VECTORS = np.random.default_rng(0).standard_normal((700, 64)).astype(np.float32)


def items(count: int) -> Iterator[NewItem]:
    for i in range(count):
        yield NewItem(f"v{i:03d}", vector=VECTORS[i], payload={"i": i})


def test_both_clients_have_the_same_surface() -> None:
    def public(kind: type) -> dict[str, list[str]]:
        methods = {n: list(inspect.signature(m).parameters) for n, m in vars(kind).items() if not n.startswith("_")}
        methods.pop("search")  # keywords here, a typed dictionary of them there
        return methods

    assert public(Client) == public(AsyncClient)
    assert all(inspect.getdoc(getattr(kind, name)) for kind in (Client, AsyncClient) for name in public(Client))


def test_any_number_of_pictures_items_and_searches(client: Client) -> None:
    good = encode(noise(40, 30))
    (expected,) = client.embed([good])
    found = list(client.embed_many(b"x" if i == 70 else good for i in range(150)))
    assert isinstance(found[70], CallError) and found[70].reason == "IMAGE_UNDECODABLE"
    assert all(np.allclose(each, expected, atol=1e-5) for i, each in enumerate(found) if i != 70)
    written = list(client.upsert_many("shapes", [*items(700), NewItem("", vector=VECTORS[0]), *items(3)]))
    assert isinstance(written[700], CallError) and written[700].reason == "BAD_KEY"
    sequences = [each for each in written if isinstance(each, int)]
    assert len(sequences) == 703 and sequences == sorted(sequences)
    assert client.get("shapes", "v001").sequence == sequences[-2]  # the later one counts
    queries: list[Any] = [{"vector": v, "top_k": 1} for v in VECTORS]
    queries[300] = {"vector": VECTORS[0], "filter": "i <"}
    answers = list(client.search_many("shapes", queries))
    assert isinstance(answers[300], CallError) and answers[300].reason == "BAD_FILTER"
    assert all(a[0].key == f"v{i:03d}" for i, a in enumerate(answers) if not isinstance(a, CallError))
    keys = [item.key for item in client.items("shapes", filter="i >= 690")]
    assert keys == [f"v{i}" for i in range(690, 700)]
    assert len(list(client.items("shapes", by_sequence=True))) == 764
    assert client.compact_collection("shapes") == 2 and client.snapshot_collection("shapes", "one") == 64 + 704 - 1
    with pytest.raises(ZeroDivisionError):  # what the caller's own iterator raises
        list(client.upsert_many("shapes", (NewItem(str(1 // (5 - i)), vector=VECTORS[i]) for i in range(9))))
    with pytest.raises(CallError) as caught:
        list(client.upsert_many("none", items(3)))
    assert caught.value.reason == "COLLECTION_NOT_FOUND"


def test_the_async_client_does_the_same(running: Running) -> None:
    async def pictures() -> AsyncIterator[bytes]:
        for _ in range(70):
            yield encode(noise(40, 30))

    async def scenario() -> None:
        async with AsyncClient(running.address, timeout=20, connections=2) as client:
            assert await client.ready() and (await client.encoder()).dimensions == 64
            vectors = [v async for v in client.embed_many(pictures())]
            assert len(vectors) == 70 and np.allclose(vectors[0], vectors[-1], atol=1e-5)
            (await client.create_collection("new")).item_count  # noqa: B018
            written = [each async for each in client.upsert_many("new", items(300))]
            assert written == list(range(1, 301))
            found = [f async for f in client.search_many("new", ({"vector": v, "top_k": 2} for v in VECTORS[:300]))]
            assert [f[0].key for f in found if not isinstance(f, CallError)] == [f"v{i:03d}" for i in range(300)]
            assert (await client.search("new", vector=VECTORS[5], top_k=1))[0].payload == {"i": 5}
            assert [i.key async for i in client.items("new", filter="i < 2")] == ["v000", "v001"]
            assert (await client.get("new", "v001")).payload == {"i": 1}
            assert await client.delete("new", ["v001", "nope"]) == ["nope"]
            assert [c.name for c in await client.collections()] == ["new", "shapes"]
            calls = [client.search("new", vector=v) for v in VECTORS[:50]]
            assert len(await asyncio.gather(*calls)) == 50
            with pytest.raises(CallError) as caught:
                await client.search("none", vector=VECTORS[0])
            assert caught.value.reason == "COLLECTION_NOT_FOUND"
            await client.delete_collection("new")

    asyncio.run(asyncio.wait_for(scenario(), 60))


def failing(running: Running, monkeypatch: pytest.MonkeyPatch, errors: list[Exception]) -> list[float]:
    """The next calls that look for a collection fail with these; when they came."""
    store = running.server.engine.store
    real: Callable[[str], Any] = store.served
    seen: list[float] = []

    def get(name: str) -> Any:
        seen.append(time.monotonic())
        if errors:
            raise errors.pop(0)
        return real(name)

    monkeypatch.setattr(store, "served", get)
    return seen


def test_what_is_refused_for_a_while_is_tried_again_then(
    running: Running, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = failing(running, monkeypatch, [QueueFullError("full", 0.3), UnavailableError("draining")])
    assert client.collection("shapes").item_count == 64
    assert len(seen) == 3 and seen[1] - seen[0] >= 0.3 and seen[2] - seen[1] >= 1.0
    seen = failing(running, monkeypatch, [QueueFullError("full", 0.05) for _ in range(9)])
    with pytest.raises(CallError) as caught:
        client.search("shapes", vector=VECTORS[0])
    assert caught.value.reason == "QUEUE_FULL" and len(seen) == ATTEMPTS
    seen = failing(running, monkeypatch, [UnavailableError("draining")])
    hasty = Client(running.address, timeout=0.5)
    with pytest.raises(CallError) as caught:
        hasty.collection("shapes")
    assert caught.value.reason == "DRAINING" and len(seen) == 1  # the wait is longer than the timeout
    hasty.close()


def test_retries_have_a_budget_and_spare_what_cannot_be_repeated() -> None:
    full, gone = CallError("", "RESOURCE_EXHAUSTED", "QUEUE_FULL", retry_seconds=0.5), CallError("", "UNAVAILABLE")
    retries = Retries()
    assert 0.5 <= (retries.delay(full, 0, False) or 0) <= 0.75
    assert retries.delay(gone, 0, False) is None and retries.delay(CallError("", "NOT_FOUND"), 0, True) is None
    assert retries.delay(CallError("", "RESOURCE_EXHAUSTED", "DISK_FULL"), 0, True) is None
    delays = [retries.delay(gone, 0, True) for _ in range(30)]
    assert sum(delay is not None for delay in delays) == 9
    for _ in range(5):
        retries.succeeded()
    assert retries.delay(gone, 0, True) is not None and retries.delay(gone, 0, True) is None


def test_upsert_sends_a_folder_and_continues(
    running: Running, pictures: Path, tmp_path: Path, refused: Callable[..., str], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(pictures, tmp_path / "pictures")
    (folder / "star" / "broken.png").write_bytes(b"hello")
    flags = ["--server", running.address, "--collection", "sent", "--create"]
    assert main(["upsert", str(folder / "star"), *flags]) == 0
    said = capfd.readouterr().err
    assert "left out: broken.png: " in said and "8 pictures stored in 'sent', 0 were there already, 1 could not" in said
    assert main(["upsert", str(folder / "star"), *flags]) == 0
    assert "0 pictures stored in 'sent', 8 were there already" in capfd.readouterr().err
    assert main(["upsert", str(folder / "star"), *flags, "--again"]) == 0
    assert "8 pictures stored" in capfd.readouterr().err
    with Client(running.address) as client:
        assert client.collection("sent").item_count == 8
        (best,) = client.search("sent", image=(folder / "star" / "00003.png").read_bytes(), top_k=1)
        assert best.key == "00003.png" and best.source_uri.endswith("/star/00003.png") and best.score > 0.9999
    assert "choose one with --collection" in refused("upsert", folder, "--server", running.address)
    assert "no collection 'none'" in refused("upsert", folder, "--server", running.address, "--collection", "none")
