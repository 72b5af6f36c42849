"""A server that follows another one of the same machine: what that writes is seen, and nothing is written here."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from prometheus_client import generate_latest

from service.client import CallError, Client, NewItem
from tests.conftest import encode, noise
from tests.service.running import Running


class Pair(NamedTuple):
    """Clients of both, and the one that follows."""

    writer: Client
    reader: Client
    follower: Running


@pytest.fixture
def pair(tmp_path: Path, indexed: Path, bundle: Path, other_bundle: Path) -> Iterator[Pair]:
    shutil.copytree(indexed, tmp_path / "collections")
    shutil.copytree(other_bundle, tmp_path / "releases" / "v2" / "bundle")
    settings: dict[str, Any] = {
        "bundle": bundle, "collections": tmp_path / "collections", "releases": tmp_path / "releases",
    }  # fmt: skip
    first, second = Running(**settings), Running(**settings, follow=True)
    try:
        with Client(first.address) as writer, Client(second.address) as reader:
            yield Pair(writer, reader, second)
    finally:
        second.stop()
        first.stop()


def soon(call: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if call():
            return
        time.sleep(0.02)
    raise AssertionError("not in time")


def picture(number: int) -> bytes:
    return encode(noise(16, 16, number))


def names(client: Client) -> list[str]:
    return [collection.name for collection in client.collections()]


def test_it_sees_writes_collections_and_deletions(pair: Pair) -> None:
    assert pair.reader.collection("shapes").item_count == 64 and pair.reader.ready()
    pair.writer.upsert("shapes", [NewItem("new", image=picture(1), payload={"a": 1})])
    soon(lambda: pair.reader.collection("shapes").item_count == 65)
    assert pair.reader.get("shapes", "new").payload == {"a": 1}
    assert pair.reader.search("shapes", image=picture(1), top_k=1, filter="a = 1")[0].key == "new"
    pair.writer.delete("shapes", ["new"])
    soon(lambda: pair.reader.collection("shapes").item_count == 64)
    pair.writer.create_collection("more")
    pair.writer.upsert("more", [NewItem("x", image=picture(2))])
    soon(lambda: "more" in names(pair.reader) and pair.reader.collection("more").item_count == 1)
    pair.writer.compact_collection("shapes")
    assert len(pair.reader.search("shapes", image=picture(3), top_k=64)) == 64
    pair.writer.delete_collection("more")
    soon(lambda: names(pair.reader) == ["shapes"])
    # Deleted and made again at once, it is the new one.
    pair.writer.create_collection("more")
    soon(lambda: "more" in names(pair.reader))
    pair.writer.delete_collection("more")
    pair.writer.create_collection("more")
    pair.writer.upsert("more", [NewItem("y", image=picture(2)), NewItem("z", image=picture(4))])
    soon(lambda: pair.reader.collection("more").item_count == 2)
    assert pair.reader.ready()
    metrics = generate_latest(pair.follower.server.engine.metrics.registry).decode()
    (lag,) = [
        line for line in metrics.splitlines() if line.startswith('likewise_follower_lag_seconds{collection="more"')
    ]
    assert 0 <= float(lag.split()[-1]) < 10


def test_what_writes_is_refused(pair: Pair) -> None:
    item = NewItem("new", image=picture(1))
    for call in (
        lambda: pair.reader.upsert("shapes", [item]), lambda: list(pair.reader.upsert_many("shapes", [item])),
        lambda: pair.reader.delete("shapes", ["x"]), lambda: pair.reader.create_collection("a"),
        lambda: pair.reader.delete_collection("shapes"), lambda: pair.reader.compact_collection("shapes"),
        lambda: pair.reader.prepare_release("shapes", "v2"), lambda: pair.reader.switch_release("shapes", "v2"),
        lambda: pair.reader.roll_back_release("shapes"), lambda: pair.reader.finish_release("shapes"),
    ):  # fmt: skip
        with pytest.raises(CallError) as caught:
            call()
        assert (caught.value.code, caught.value.reason) == ("FAILED_PRECONDITION", "READ_ONLY")
    assert pair.reader.collection("shapes").item_count == 64


def test_it_follows_a_release_without_a_failed_call(pair: Pair) -> None:
    stop, failed, done = threading.Event(), [], [0]

    def read() -> None:
        with Client(pair.reader.server) as client:
            while not stop.is_set():
                try:
                    assert len(client.search("shapes", image=picture(5), top_k=3)) == 3
                    done[0] += 1
                except (CallError, AssertionError) as e:
                    failed.append(repr(e))

    thread = threading.Thread(target=read)
    thread.start()
    try:
        pair.writer.prepare_release("shapes", "v2")
        soon(lambda: pair.writer.release("shapes").standby.state == "ready", 60)  # type: ignore[union-attr]
        space = pair.writer.switch_release("shapes", "v2").live_space_id
        soon(lambda: pair.reader.collection("shapes").space_id == space, 30)
        assert pair.reader.release("shapes").live == "v2"
        pair.writer.upsert("shapes", [NewItem("new", image=picture(1))])
        soon(lambda: pair.reader.search("shapes", image=picture(1), top_k=1)[0].key == "new")
        pair.writer.roll_back_release("shapes", leave_out=True)
        soon(lambda: pair.reader.collection("shapes").space_id != space, 30)
        pair.writer.finish_release("shapes")
        soon(lambda: len(pair.reader.encoders()) == 1)
    finally:
        stop.set()
        thread.join(30)
    assert not failed and done[0] > 20
