"""The encoder of a collection is exchanged while it is read and written: nothing wrong is answered, nothing is lost."""

from __future__ import annotations

import json
import queue
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from likewise import main
from service import releases
from service.client import CallError, Client, Expected, NewItem, ReleaseInfo
from service.collection import Collection
from service.config import Serve
from service.pb import likewise_pb2 as pb
from service.pb import likewise_pb2_grpc as pb_grpc
from service.server import Server
from tests.conftest import encode, noise
from tests.service.running import Running


@pytest.fixture
def place(tmp_path: Path, indexed: Path, bundle: Path, other_bundle: Path) -> Path:
    """A folder with collections, releases (v2: another encoder) and nothing else."""
    shutil.copytree(indexed, tmp_path / "collections")
    shutil.copytree(other_bundle, tmp_path / "releases" / "v2" / "bundle")
    return tmp_path


@contextmanager
def served(place: Path, bundle: Path, **settings: object) -> Iterator[tuple[Running, Client]]:
    running = Running(
        bundle=bundle, collections=place / "collections", **{"releases": place / "releases", **settings}
    )  # fmt: skip
    try:
        with Client(running.address) as client:
            yield running, client
    finally:
        running.stop()


def until(client: Client, name: str, wanted: str = "ready", seconds: float = 60) -> ReleaseInfo:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = client.release(name)
        if found.standby is not None and found.standby.state in (wanted, "failed"):
            return found
        time.sleep(0.05)
    raise AssertionError(client.release(name))


def picture(number: int) -> bytes:
    return encode(noise(16, 16, number))


def refused(call: Callable[[], object]) -> tuple[str, str, str]:
    with pytest.raises(CallError) as caught:
        call()
    return caught.value.code, caught.value.reason, str(caught.value)


def test_a_release_catches_up_is_switched_to_rolled_back_and_finished(
    place: Path, bundle: Path, other_bundle: Path, pictures: Path
) -> None:
    file, other = sorted(p for p in pictures.rglob("*") if p.is_file())[:2]
    key = file.relative_to(pictures).as_posix()
    with served(place, bundle) as (running, client):
        own = client.encoder().space_id
        assert client.release("shapes") == ReleaseInfo("shapes", "", own)
        client.prepare_release("shapes", "v2", acceptance=[Expected(key, image=file.read_bytes(), top_k=3)])
        found = until(client, "shapes").standby
        assert found is not None and found.state == "ready" and found.error is None, found
        assert (found.item_count, found.lag, found.left_out, found.accepted, found.was_live) == (64, 0, {}, True, False)
        assert found.overlap_at_10 is not None and 0 < found.overlap_at_10 < 1
        assert {e.space_id for e in client.encoders()} == {own, found.space_id} and client.release("shapes").live == ""
        before = client.embed([file.read_bytes()], collection="shapes")[0]
        client.delete("shapes", [key])  # follows while it is ready
        after = client.switch_release("shapes", "v2")
        assert (after.live, after.live_space_id) == ("v2", found.space_id) and 0 < after.writes_held < 5
        assert after.standby is not None and (after.standby.state, after.standby.was_live) == ("previous", True)
        assert client.collection("shapes").space_id == found.space_id and client.collection("shapes").item_count == 63
        # Answers are of the other encoder, whoever asks how.
        now = client.embed([file.read_bytes()], collection="shapes")[0]
        assert isinstance(now, np.ndarray) and isinstance(before, np.ndarray) and abs(float(now @ before)) < 0.999
        (best, *_) = client.search("shapes", image=other.read_bytes(), top_k=1)
        assert best.key == other.relative_to(pictures).as_posix() and best.score > 0.999
        assert client.search("shapes", vector=now, space_id=found.space_id)
        code, reason, said = refused(lambda: client.search("shapes", vector=before, space_id=own))
        assert (code, reason) == ("FAILED_PRECONDITION", "MODEL_INDEX_MISMATCH") and found.space_id in said
        assert refused(lambda: client.search("shapes", vector=now))[:2] == ("INVALID_ARGUMENT", "SPACE_UNNAMED")
        (error,) = client.upsert("shapes", [NewItem("x", vector=before)])
        assert isinstance(error, CallError) and error.reason == "SPACE_UNNAMED"
        assert refused(lambda: client.delete_collection("shapes"))[1] == "RELEASE_STANDS_BY"
        assert refused(lambda: client.prepare_release("shapes", "v2"))[1] == "RELEASE_IS_LIVE"
        assert _metrics(running)["likewise_release_info"] == {
            ("shapes", "v2", found.space_id, "live"), ("shapes", "", own, "previous")
        }  # fmt: skip
    # It is served from there after a restart, too, and can still be rolled back.
    with served(place, bundle) as (_, client):
        found_now = client.release("shapes")
        assert (found_now.live, found_now.live_space_id) == ("v2", after.live_space_id)
        assert found_now.standby is not None and found_now.standby.state == "previous"
        assert refused(lambda: client.search("shapes", vector=now))[1] == "SPACE_UNNAMED"
        client.delete("shapes", [best.key])
        back = client.roll_back_release("shapes")
        assert (back.live, back.live_space_id) == ("", own) and client.collection("shapes").item_count == 62
        assert client.search("shapes", image=other.read_bytes(), top_k=1)[0].key != best.key
        again = client.switch_release("shapes", "v2")  # forward again, without a new start
        assert again.live == "v2" and client.collection("shapes").item_count == 62
        done = client.finish_release("shapes")
        assert done.standby is None and [e.space_id for e in client.encoders()] == [own, after.live_space_id]
        assert client.search("shapes", vector=now)  # there is but one space again
        assert refused(lambda: client.roll_back_release("shapes"))[1] == "NOTHING_TO_ROLL_BACK"
        client.delete_collection("shapes")
    assert not (place / "collections" / "shapes").exists() and not (place / "releases" / "v2" / "shapes").exists()
    assert json.loads((place / "collections" / "releases.json").read_text())["collections"] == {}


def _metrics(running: Running) -> dict[str, set[tuple[str, ...]]]:
    from prometheus_client import generate_latest

    text = generate_latest(running.server.engine.metrics.registry).decode()
    labels = ("collection", "release", "space_id", "state")
    return {
        family.name: {tuple(sample.labels[name] for name in labels) for sample in family.samples}
        for family in text_string_to_metric_families(text)
        if family.name == "likewise_release_info"
    }


def test_what_cannot_be_embedded_is_counted_and_refused_unless_it_is_accepted(place: Path, bundle: Path) -> None:
    with served(place, bundle) as (_, client):
        client.create_collection("kept", keep_originals=True)
        client.upsert("kept", [NewItem(f"p{i}", image=picture(i)) for i in range(6)])
        rng = np.random.default_rng(0)
        client.upsert("kept", [NewItem(f"v{i}", vector=rng.standard_normal(64)) for i in range(3)])
        client.prepare_release("kept", "v2")
        found = until(client, "kept").standby
        assert found is not None and (found.item_count, found.left_out) == (6, {"client_vectors": 3})
        code, reason, said = refused(lambda: client.switch_release("kept", "v2"))
        assert (code, reason) == ("FAILED_PRECONDITION", "ITEMS_LEFT_OUT") and "3 items" in said and "'v0'" in said
        assert client.release("kept").live == "" and len(client.search("kept", key="v0")) == 8
        client.upsert("kept", [NewItem("v0", image=picture(20))])  # which makes up for one of them
        assert client.switch_release("kept", "v2", leave_out=True).live == "v2"
        assert {item.key for item in client.items("kept")} == {*(f"p{i}" for i in range(6)), "v0"}
        space = client.release("kept").live_space_id
        client.upsert("kept", [NewItem("p1", vector=rng.standard_normal(64)), NewItem("p2", image=picture(30))], space)
        code, reason, said = refused(lambda: client.roll_back_release("kept"))
        assert (code, reason) == ("FAILED_PRECONDITION", "ITEMS_LEFT_OUT") and "1 items" in said and "'p1'" in said
        assert client.release("kept").live == "v2" and client.get("kept", "p1").key == "p1"
        client.upsert("kept", [NewItem("p1", image=picture(31))])
        assert client.roll_back_release("kept").live == ""
        for key, number in (("p1", 31), ("p2", 30)):
            assert client.search("kept", image=picture(number), top_k=1)[0].key == key
        # Those that were left out lie in the collection of before, and are found again.
        assert {item.key for item in client.items("kept")} == {*(f"p{i}" for i in range(6)), "v0", "v1", "v2"}


def test_what_must_not_be_served_is_refused(
    place: Path, bundle: Path, indexed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(bundle, place / "releases" / "same" / "bundle")
    shutil.copytree(place / "releases" / "v2", place / "releases" / "stranger")
    shutil.copytree(indexed / "shapes", place / "releases" / "stranger" / "shapes")
    with served(place, bundle) as (running, client):
        assert refused(lambda: client.prepare_release("none", "v2"))[1] == "COLLECTION_NOT_FOUND"
        assert refused(lambda: client.prepare_release("shapes", "v3"))[1] == "RELEASE_NOT_FOUND"
        assert refused(lambda: client.prepare_release("shapes", "../v2"))[1] == "RELEASE_NOT_FOUND"
        assert refused(lambda: client.prepare_release("shapes", "v2", min_overlap=2))[1] == "BAD_MIN_OVERLAP"
        assert refused(lambda: client.switch_release("shapes", "v2"))[1] == "RELEASE_NOT_READY"
        assert refused(lambda: client.roll_back_release("shapes"))[1] == "NOTHING_TO_ROLL_BACK"
        for name, said in (("same", "the vectors would be the same"), ("stranger", "MODEL_INDEX_MISMATCH")):
            client.prepare_release("shapes", name)
            found = until(client, "shapes").standby
            assert found is not None and found.state == "failed" and found.error is not None, found
            assert said.replace("the vectors", "its vectors") in str(found.error)
            assert refused(lambda name=name: client.switch_release("shapes", name))[1] == "RELEASE_NOT_READY"
            assert client.finish_release("shapes").standby is None
        monkeypatch.setattr(releases, "free_memory", lambda: 1000)
        client.prepare_release("shapes", "v2")
        found = until(client, "shapes").standby
        assert found is not None and found.error is not None and found.error.reason == "NOT_ENOUGH_MEMORY"
        monkeypatch.undo()
        client.prepare_release("shapes", "v2", min_overlap=1.0, acceptance=[Expected("nothing", of="circle/0000.jpg")])
        found = until(client, "shapes").standby  # a failed one is tried again
        assert found is not None and found.accepted is False and len(found.problems) == 2, found
        _, reason, said = refused(lambda: client.switch_release("shapes", "v2"))
        assert reason == "NOT_ACCEPTED" and "of the neighbours are those" in said and "1 queries did not find" in said
        assert client.finish_release("shapes").standby is None
        assert len(running.server.engine.models) == 1 and client.ready()
        # Its folder is free again.
        Collection(place / "releases" / "v2" / "shapes").close()
    with served(place, bundle, releases=None) as (_, client):
        assert refused(lambda: client.prepare_release("shapes", "v2"))[1] == "NO_RELEASES_FOLDER"


def test_a_server_says_what_it_needs_to_serve_a_release(place: Path, bundle: Path) -> None:
    with served(place, bundle) as (_, client):
        client.prepare_release("shapes", "v2")
        until(client, "shapes")
        client.switch_release("shapes", "v2")
    from export.bundle import RefusalError

    with pytest.raises(RefusalError, match="served from the releases v2: give the folder of releases"):
        Server(Serve(bundle=bundle, collections=place / "collections", threads=1))


def test_rolling_back_needs_the_encoder_of_before(place: Path, bundle: Path, other_bundle: Path) -> None:
    with served(place, bundle) as (_, client):
        client.prepare_release("shapes", "v2")
        until(client, "shapes")
        client.switch_release("shapes", "v2")
    with served(place, other_bundle) as (_, client):
        code, reason, said = refused(lambda: client.roll_back_release("shapes"))
        assert (code, reason) == ("FAILED_PRECONDITION", "RELEASE_REFUSED") and "as --other-bundles" in said
        assert len(client.search("shapes", key=next(client.items("shapes")).key)) == 10
    with served(place, other_bundle, other_bundles=[bundle]) as (_, client):
        assert client.roll_back_release("shapes").live == "" and client.collection("shapes").item_count == 64


def test_finishing_one_release_frees_no_encoder_that_another_is_loading(
    place: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opening, go_on = threading.Event(), threading.Event()
    real = releases._open

    def slow(standby: releases.Standby, folder: Path, *more: Any) -> None:
        if folder.name == "second":
            opening.set()
            assert go_on.wait(30)
        real(standby, folder, *more)

    with served(place, bundle) as (_, client):
        client.create_collection("second", keep_originals=True)
        client.upsert("second", [NewItem("a", image=picture(1))])
        client.prepare_release("shapes", "v2")
        until(client, "shapes")
        monkeypatch.setattr(releases, "_open", slow)
        client.prepare_release("second", "v2")
        assert opening.wait(30)
        client.finish_release("shapes")
        assert len(client.encoders()) == 2
        go_on.set()
        found = until(client, "second").standby
        assert found is not None and found.state == "ready"
        assert client.switch_release("second", "v2").live == "v2"
        assert client.search("second", image=picture(1))[0].key == "a"


def test_the_command_prepares_switches_and_rolls_back(
    place: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with served(place, bundle) as (running, _):
        at = ["--server", running.address]
        assert main(["release", "prepare", "shapes", "v2", *at]) == 0
        said = capsys.readouterr()
        assert "beside it: the release 'v2', ready, 64 items" in said.out and "writes behind" in said.err
        assert main(["release", "switch", "shapes", "v2", *at]) == 0
        assert "served from the release 'v2'" in capsys.readouterr().out
        assert main(["release", "status", "shapes", *at]) == 0
        assert "beside it: the server's own bundle, previous" in capsys.readouterr().out
        assert main(["release", "rollback", "shapes", *at]) == 0
        assert "shapes is served from the server's own bundle" in capsys.readouterr().out
        assert main(["release", "finish", "shapes", *at]) == 0
        assert main(["release", "switch", "shapes", "v2", *at]) == 1
        assert "prepare 'v2' first" in capsys.readouterr().err


def test_a_stream_that_was_silent_goes_on_with_the_encoder_of_now(place: Path, bundle: Path) -> None:
    with served(place, bundle) as (running, client):
        client.create_collection("c", keep_originals=True)
        said: queue.SimpleQueue[pb.StreamUpsertRequest | None] = queue.SimpleQueue()
        with grpc.insecure_channel(running.address) as channel:
            stub = pb_grpc.CollectionServiceStub(channel)
            answers = stub.StreamUpsert(iter(said.get, None))
            for number in range(3):
                item = pb.NewItem(key=f"k{number}", image=pb.Image(content=picture(number)))
                said.put(pb.StreamUpsertRequest(collection="c", items=[item]))
                answer = next(answers)
                assert answer.results[0].sequence and answer.space_id == client.release("c").live_space_id
                if number == 0:
                    client.prepare_release("c", "v2")
                    until(client, "c")
                    client.switch_release("c", "v2")
                elif number == 1:
                    client.roll_back_release("c")
                    client.finish_release("c")  # the encoder that the stream wrote with is gone
            said.put(None)
            assert list(answers) == []
        for number in range(3):
            (found,) = client.search("c", image=picture(number), top_k=1)
            assert (found.key, found.score > 0.999) == (f"k{number}", True)


class Load:
    """Writers and readers of a collection, with a model of what has to be in it."""

    def __init__(self, address: str, name: str, writers: int, seed: int) -> None:
        self.address, self.name = address, name
        self.state: dict[str, int | None] = {}  # key → number of its picture; None: deleted
        self.writes = self.reads = 0
        self.wrong: list[str] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._guarded, args=(self._write, seed + i)) for i in range(writers)]
        self._threads += [threading.Thread(target=self._guarded, args=(self._stream, seed + 100))]
        self._threads += [threading.Thread(target=self._guarded, args=(self._read, seed + 200 + i)) for i in range(2)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()

    def _guarded(self, call: Callable[[Client, random.Random, int], None], seed: int) -> None:
        with Client(self.address) as client:
            while not self._stop.is_set():
                try:
                    call(client, random.Random(seed * 1_000_003 + self.writes + self.reads), seed)
                except Exception as e:
                    self.wrong.append(f"{call.__name__}: {type(e).__name__}: {e}")
                    return

    def _write(self, client: Client, rng: random.Random, seed: int) -> None:
        key = f"w{seed}/{rng.randrange(12)}"  # keys of its own: the model needs no lock
        if rng.random() < 0.2:
            client.delete(self.name, [key])
            self.state[key] = None
        else:
            number = rng.randrange(1000)
            (result,) = client.upsert(self.name, [NewItem(key, image=picture(number), payload={"n": number})])
            assert isinstance(result, int), result
            self.state[key] = number
        self.writes += 1

    def _stream(self, client: Client, rng: random.Random, seed: int) -> None:
        numbers = {f"s{seed}/{rng.randrange(60)}": rng.randrange(1000) for _ in range(20)}
        items = (NewItem(key, image=picture(n), payload={"n": n}) for key, n in numbers.items())
        for key, result in zip(numbers, client.upsert_many(self.name, items), strict=True):
            assert isinstance(result, int), result
            self.state[key] = numbers[key]
            self.writes += 1

    def _read(self, client: Client, rng: random.Random, seed: int) -> None:
        number = rng.randrange(50)
        (found, *_) = client.search(self.name, image=picture(10_000 + number), top_k=1)
        # These are never written: each finds itself, whichever encoder answers.
        assert found.key == f"fixed/{number}" and found.score > 0.999, found
        (other, *_) = client.search(self.name, key=f"fixed/{number}", top_k=1)
        assert other.key != found.key
        self.reads += 1


@pytest.mark.parametrize("rounds", [2, pytest.param(30, marks=pytest.mark.slow)])
def test_switches_and_rollbacks_under_load_answer_nothing_wrong_and_lose_nothing(
    place: Path, bundle: Path, rounds: int
) -> None:
    with served(place, bundle) as (running, client):
        client.create_collection("c", keep_originals=True)
        client.upsert("c", [NewItem(f"fixed/{i}", image=picture(10_000 + i)) for i in range(50)])
        spaces = set()
        with Load(running.address, "c", 3, rounds) as load:
            client.prepare_release("c", "v2")
            found = until(client, "c")
            assert found.standby is not None and found.standby.accepted, found
            for round_ in range(rounds):
                before = load.writes
                done = client.switch_release("c", "v2") if round_ % 2 == 0 else client.roll_back_release("c")
                spaces.add(done.live_space_id)
                assert done.live == ("v2" if round_ % 2 == 0 else "") and not load.wrong, (done, load.wrong)
                end = time.monotonic() + 30
                while load.writes < before + 30 and not load.wrong and time.monotonic() < end:
                    time.sleep(0.02)
        assert not load.wrong and load.writes >= 30 * rounds and load.reads >= 10, (load.wrong, load.writes, load.reads)
        assert len(spaces) == 2
        held = {item.key: item for item in client.items("c", with_vectors=True)}
        expected = {key: number for key, number in load.state.items() if number is not None}
        assert {key for key in held if not key.startswith("fixed/")} == set(expected)
        keys = sorted(expected)
        made = list(client.embed_many((picture(expected[key]) for key in keys), collection="c"))
        for key, vector in zip(keys, made, strict=True):
            assert held[key].payload == {"n": expected[key]}
            assert isinstance(vector, np.ndarray) and float(vector @ held[key].vector) > 0.999, key
        client.finish_release("c")
    assert main(["index", "verify", str(place / ("releases/v2/c" if rounds % 2 else "collections/c"))]) == 0
