"""What can be asked of a collection beside the nearest neighbours of a vector."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from service.collection import Collection
from service.errors import InvalidArgumentError, NotFoundError
from service.filter import Filter
from service.records import NewRow

DIM = 16
COUNT = 400


def vectors(count: int = COUNT, seed: int = 0) -> np.ndarray:
    """Unit vectors [count, 16]."""
    rows = np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def payload(i: int) -> dict[str, object]:
    """Items 0, 7, 14, … have no product."""
    return {"i": i, **({"product": f"p{i % 50}"} if i % 7 else {}), "shop": {"city": ["Ulm", "Bonn"][i % 2]}}


@pytest.fixture(params=["fresh", "segment", "both"])
def collection(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Collection]:
    c = Collection.create(tmp_path / "things", "lw1-x", DIM)
    rows, matrix = [NewRow(f"k{i:03d}", json.dumps(payload(i))) for i in range(COUNT)], vectors()
    half = {"fresh": 0, "segment": COUNT, "both": COUNT // 2}[request.param]
    c.upsert(rows[:half], matrix[:half])
    c.flush()
    c.upsert(rows[half:], matrix[half:])
    yield c
    c.close()


def expected(query: np.ndarray, keep: list[int]) -> list[str]:
    scores = vectors() @ query
    return [f"k{i:03d}" for i in sorted(keep, key=lambda i: -scores[i])]


def test_each_query_of_a_batch_has_its_own_filter(collection: Collection) -> None:
    queries = vectors(4, 9)
    texts = ["shop.city = Ulm", None, "i < 30", "shop.city = Ulm"]
    found = collection.search(queries, 25, filters=[Filter.parse(t) if t else None for t in texts])
    kept = [range(0, COUNT, 2), range(COUNT), range(30), range(0, COUNT, 2)]
    for query, hits, keep in zip(queries, found, kept, strict=True):
        assert [h.row.key for h in hits] == expected(query, list(keep))[:25]


def test_a_filter_sees_what_was_written_since_it_was_first_used(collection: Collection) -> None:
    query, wanted = vectors(1, 9), Filter.parse("i >= 398")
    assert {h.row.key for h in collection.search(query, 9, filters=wanted)[0]} == {"k398", "k399"}
    collection.delete(["k399"])
    collection.upsert([NewRow("k398", '{"i": 1}'), NewRow("new", '{"i": 1000}'), NewRow("none", "{}")], vectors(3, 5))
    assert [h.row.key for h in collection.search(query, 9, filters=wanted)[0]] == ["new"]
    collection.flush()
    assert [h.row.key for h in collection.search(query, 9, filters=wanted)[0]] == ["new"]


def test_groups(collection: Collection) -> None:
    (query,) = vectors(1, 9)
    order = expected(query, list(range(COUNT)))
    by_group: dict[object, list[str]] = {}
    for key in order:
        i = int(key[1:])
        by_group.setdefault(payload(i).get("product", i), []).append(key)
    for k, size in ((5, 1), (60, 3), (500, 2)):
        groups = collection.search_groups(query, k, "product", size)
        found = [[hit.row.key for hit in group] for group in groups]
        assert found == [keys[:size] for keys in by_group.values()][:k]
    (one, two) = collection.search_groups(query, 5, "shop.city", 3)
    assert {json.loads(hit.row.payload)["shop"]["city"] for hit in one} != {
        json.loads(two[0].row.payload)["shop"]["city"]
    }
    wanted = Filter.parse("i < 60")
    assert len(collection.search_groups(query, 100, "product", wanted=wanted)) == 9 + len(
        {i % 50 for i in range(60) if i % 7}
    )


def test_everything_within_a_score(collection: Collection) -> None:
    (query,) = vectors(1, 9)
    scores = vectors() @ query
    for least in (0.9, 0.3, 0.0, -1.0):
        hits = collection.within(query, least)
        assert [h.row.key for h in hits] == expected(query, np.flatnonzero(scores >= least).tolist())
    assert all(json.loads(h.row.payload)["i"] < 9 for h in collection.within(query, -1, Filter.parse("i < 9")))


def test_alpha_query_expansion_is_the_weighted_sum(collection: Collection) -> None:
    (query,) = vectors(1, 9)
    order = expected(query, list(range(COUNT)))[:6]
    rows = vectors()[[int(key[1:]) for key in order if key != order[0]]]
    grown = query + ((rows @ query)[:, None] ** 3 * rows).sum(axis=0)
    found = collection.expand(query[None], 5, 3.0, leave_out=[frozenset({order[0]})])
    assert np.allclose(found[0], grown / np.linalg.norm(grown), atol=1e-5)


def test_single_writes_of_many_threads_are_committed_together(tmp_path: Path) -> None:
    collection = Collection.create(tmp_path / "c", "lw1-x", DIM)
    rows, commits = vectors(320), 0
    transaction = collection._records.transaction

    def counted():  # type: ignore[no-untyped-def]
        nonlocal commits
        commits += 1
        return transaction()

    collection._records.transaction = counted  # type: ignore[method-assign]
    got: dict[int, list[int]] = {}
    ready = threading.Barrier(16)

    def write(first: int) -> None:
        ready.wait()
        for i in range(first, first + 20):
            got[i] = collection.upsert([NewRow(f"w{i}")], rows[i : i + 1])
            assert collection.get(f"w{i}").row.sequence == got[i][0]  # read your writes

    collection._write_lock.acquire()  # so that all come while one writes
    threads = [threading.Thread(target=write, args=(20 * n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    while len(collection._waiting) < 16:
        pass
    collection._write_lock.release()
    for thread in threads:
        thread.join()
    assert sorted(s for (s,) in got.values()) == list(range(1, 321)) and len(collection) == 320
    assert commits <= 320 - 15  # the first sixteen in one
    collection.close()
    again = Collection(tmp_path / "c")
    assert all(np.array_equal(again.get(f"w{i}").vector, rows[i]) for i in range(320))
    again.close()


def test_a_write_that_fails_fails_alone(collection: Collection) -> None:
    before = collection.sequence
    for row, reason in (
        (NewRow(""), "BAD_KEY"),
        (NewRow("x", "[1]"), "BAD_PAYLOAD"),
        (NewRow("x", "{"), "BAD_PAYLOAD"),
    ):
        with pytest.raises(InvalidArgumentError) as caught:
            collection.upsert([NewRow("good"), row], vectors(2, 3))
        assert caught.value.reason == reason
    with pytest.raises(InvalidArgumentError, match="more than once"):
        collection.add_segment([NewRow("a"), NewRow("a")], vectors(2))
    assert collection.sequence == before
    with pytest.raises(NotFoundError):
        collection.get("good")


def test_equal_vectors_come_by_key_and_in_pages(tmp_path: Path) -> None:
    collection = Collection.create(tmp_path / "c", "lw1-x", DIM)
    rows = [NewRow(f"k{i:03d}") for i in np.random.default_rng(0).permutation(200).tolist()]
    same = np.repeat(vectors(1), 200, axis=0)
    collection.upsert(rows[:120], same[:120])
    collection.flush()
    collection.upsert(rows[120:], same[120:])
    for k in (1, 10, 70, 200):
        (hits,) = collection.search(vectors(1), k, min_score=1.0)
        assert [hit.row.key for hit in hits] == [f"k{i:03d}" for i in range(k)]
    collection.close()


def test_an_interrupt_acknowledges_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two writes wait; the one that commits both is interrupted: the other is told so."""
    collection = Collection.create(tmp_path / "c", "lw1-x", DIM)
    write = collection._write
    monkeypatch.setattr(collection, "_write", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    outcomes: list[object] = []

    def upsert(key: str) -> None:
        try:
            outcomes.append(collection.upsert([NewRow(key)], vectors(1)))
        except BaseException as e:
            outcomes.append(type(e).__name__)

    _wait_together(collection, [threading.Thread(target=upsert, args=(key,)) for key in "ab"])
    assert sorted(map(str, outcomes)) == ["InternalError", "KeyboardInterrupt"] and len(collection) == 0
    monkeypatch.setattr(collection, "_write", write)
    assert collection.upsert([NewRow("c")], vectors(1)) == [1]
    collection.close()


def _wait_together(collection: Collection, writers: list[threading.Thread]) -> None:
    """Run threads of which each upserts once, so that all of them wait for the write lock at one time."""
    with collection._write_lock:
        for thread in writers:
            thread.start()
        while len(collection._waiting) < len(writers):
            pass
    for thread in writers:
        thread.join()


def test_a_write_that_fails_does_not_take_others_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collection = Collection.create(tmp_path / "c", "lw1-x", DIM)
    write = collection._write

    def failing(rows, matrix, gone):  # type: ignore[no-untyped-def]
        if any(row.key == "bad" for row in rows):
            raise RuntimeError("cannot be stored")
        return write(rows, matrix, gone)

    monkeypatch.setattr(collection, "_write", failing)
    outcomes: dict[str, object] = {}

    def upsert(key: str, seed: int) -> None:
        try:
            outcomes[key] = collection.upsert([NewRow(key)], vectors(1, seed))
        except RuntimeError as e:
            outcomes[key] = str(e)

    _wait_together(
        collection, [threading.Thread(target=upsert, args=(key, i)) for i, key in enumerate(["a", "bad", "b"])]
    )
    assert outcomes["bad"] == "cannot be stored"
    for key, seed in (("a", 0), ("b", 2)):
        assert np.array_equal(collection.get(key).vector, vectors(1, seed)[0])
    with pytest.raises(InvalidArgumentError, match="give one for each"):
        collection.upsert([NewRow("c")], vectors(2))
    for payload in ('{"a": "\\ud800"}', '{"a": NaN}', '{"a": ' * 200 + "1" + "}" * 200):
        with pytest.raises(InvalidArgumentError) as caught:
            collection.upsert([NewRow("c", payload)], vectors(1))
        assert caught.value.reason == "BAD_PAYLOAD"
    with pytest.raises(InvalidArgumentError, match="no Unicode text"):
        collection.upsert([NewRow("\ud800")], vectors(1))
    collection.flush()
    collection.close()


def test_groups_are_named_as_in_filters(collection: Collection) -> None:
    (query,) = vectors(1, 9)
    plain = collection.search_groups(query, 5, "shop.city")
    assert [h[0].row for h in collection.search_groups(query, 5, "payload.shop.city")] == [h[0].row for h in plain]
    for wrong in ("key", "a..b", "a b", ""):
        with pytest.raises(InvalidArgumentError, match="no field of the payload"):
            collection.search_groups(query, 5, wrong)
