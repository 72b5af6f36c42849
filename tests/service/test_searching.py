"""Searches of many callers: together through the index, each with its own answer, and none that nobody waits for."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.collection import Collection
from service.errors import ExpiredError, QueueFullError
from service.filter import Filter
from service.metrics import Metrics
from service.records import NewRow
from service.searching import Searcher
from service.view import Hit

DIM = 8


def vectors(count: int) -> np.ndarray:
    rows = np.random.default_rng(0).standard_normal((count, DIM)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture
def collection(tmp_path: Path) -> Iterator[Collection]:
    opened = Collection.create(tmp_path / "c", "lw1-x", DIM)
    opened.add_segment([NewRow(f"k{i}", f'{{"even": {str(i % 2 == 0).lower()}}}') for i in range(100)], vectors(100))
    yield opened
    opened.close()


def keys(hits: list[Hit]) -> list[str]:
    return [hit.row.key for hit in hits]


class Held:
    """Counts the searches of a collection, and holds them until it is told to go on."""

    def __init__(self, collection: Collection, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        self.gate = threading.Event()
        self.fail: Callable[[np.ndarray], bool] = lambda _: False
        real = collection.search

        def search(queries: np.ndarray, *args: Any, **kwargs: Any) -> Any:
            assert self.gate.wait(10)
            self.sizes.append(len(queries))
            if self.fail(queries):
                raise RuntimeError("this query is poison")
            return real(queries, *args, **kwargs)

        monkeypatch.setattr(collection, "search", search)


def run(scenario: Callable[[Searcher], Awaitable[None]], limit: int = 1000) -> None:
    async def whole() -> None:
        searcher = Searcher(1, limit, Metrics())
        await asyncio.wait_for(scenario(searcher), 20)
        await asyncio.get_running_loop().run_in_executor(None, searcher.close)

    asyncio.run(whole())


def test_what_waits_together_is_searched_together_and_answered_apart(
    collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = vectors(100)
    expected = [keys(hits) for hits in collection.search(asked, 5)]
    even = Filter.parse("even = true")
    of_even = [keys(hits) for hits in collection.search(asked, 5, filters=even)]
    held = Held(collection, monkeypatch)

    async def scenario(searcher: Searcher) -> None:
        first = searcher.submit(collection, asked[0], 5, keys)
        await asyncio.sleep(0.05)
        others = [
            searcher.submit(
                collection, asked[i], 3 if i == 50 else 5, keys, wanted=even if i % 3 == 0 else None,
                leave_out=frozenset({f"k{i}"}) if i == 7 else frozenset(),
            )
            for i in range(1, 60)
        ]  # fmt: skip
        held.gate.set()
        assert await first == expected[0]
        for i, found in enumerate(await asyncio.gather(*others), 1):
            right = of_even[i] if i % 3 == 0 else expected[i]
            if i == 7:
                assert "k7" in right and "k7" not in found
            else:
                assert found == right[: 3 if i == 50 else 5]

    run(scenario)
    assert held.sizes == [1, 58, 1]


def test_a_search_that_fails_fails_alone(collection: Collection, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = vectors(6)
    held = Held(collection, monkeypatch)
    held.fail = lambda queries: bool((queries == asked[3]).all(axis=1).any())

    async def scenario(searcher: Searcher) -> None:
        def broken(hits: list[Hit]) -> None:
            raise ValueError("no answer can be made")

        todo = [searcher.submit(collection, asked[i], 5, broken if i == 4 else keys) for i in range(6)]
        held.gate.set()
        found = await asyncio.gather(*todo, return_exceptions=True)
        assert [type(each) for each in found] == [list, list, list, RuntimeError, ValueError, list]

    run(scenario)


def test_nothing_is_searched_that_nobody_waits_for(collection: Collection, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(collection, monkeypatch)

    async def scenario(searcher: Searcher) -> None:
        asked = vectors(4)
        first = searcher.submit(collection, asked[0], 5, keys)
        await asyncio.sleep(0.05)
        late = searcher.submit(collection, asked[1], 5, keys, deadline=time.monotonic() + 0.02)
        left = searcher.submit(collection, asked[2], 5, keys)
        left.cancel()
        kept = searcher.submit(collection, asked[3], 5, keys)
        await asyncio.sleep(0.05)
        held.gate.set()
        with pytest.raises(ExpiredError, match="in the queue"):
            await late
        assert len(await first) == len(await kept) == 5

    run(scenario)
    assert held.sizes == [1, 1]


def test_too_many_waiting_searches_are_refused_at_once(collection: Collection, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(collection, monkeypatch)

    async def scenario(searcher: Searcher) -> None:
        first = searcher.submit(collection, vectors(1)[0], 5, keys)
        await asyncio.sleep(0.05)
        waiting = [searcher.submit(collection, vectors(1)[0], 5, keys) for _ in range(3)]
        with pytest.raises(QueueFullError, match="3 searches are waiting, 3 are allowed") as refused:
            searcher.submit(collection, vectors(1)[0], 5, keys)
        assert refused.value.status().details[1].type_url.endswith("RetryInfo")
        held.gate.set()
        await asyncio.gather(first, *waiting)
        assert len(await searcher.submit(collection, vectors(1)[0], 5, keys)) == 5

    run(scenario, limit=3)
