"""Answers of serialised pieces say what the rows say, whatever is kept of them."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.collection import Collection
from service.metrics import Metrics
from service.pb import likewise_pb2 as pb
from service.records import NewRow
from service.searching import Searcher
from service.servicer import write_item
from service.view import Hit
from service.wire import Items, neighbors

DIM, COUNT = 16, 400


def vectors(seed: int, count: int) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def stored(name: str, count: int) -> list[NewRow]:
    long = "x" * 10_000  # too large to be kept
    return [
        NewRow(
            f"{name}{i}ä", f'{{"i": {i}, "text": "{long if i % 50 == 0 else "x" * (i % 200)}"}}', f"file:{i}" * (i % 2)
        )
        for i in range(count)
    ]


@pytest.fixture(params=["one segment", "deletions", "equal rows", "several parts"])
def collection(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Collection]:
    opened = Collection.create(tmp_path / "c", "lw1-x", DIM)
    rows = vectors(0, COUNT)
    if request.param == "equal rows":
        rows[100:130] = rows[7]
        rows[200:202] = rows[8]
    opened.add_segment(stored("a", COUNT), rows)
    if request.param == "deletions":
        opened.delete([f"a{i}ä" for i in range(0, COUNT, 3)])
    if request.param == "several parts":
        opened.add_segment(stored("b", 50), vectors(1, 50))
        opened.upsert(stored("c", 20), vectors(2, 20))
    yield opened
    opened.close()


def built(hits: Sequence[Hit]) -> pb.SearchResponse:
    response = pb.SearchResponse()
    for row, score in hits:
        neighbor = response.neighbors.add(score=score)
        write_item(neighbor.item, row)
    return response


@pytest.mark.parametrize("limit", [0, 2**20])
def test_pieces_are_the_rows(collection: Collection, limit: int) -> None:
    items = Items(limit)
    asked = np.concatenate([vectors(0, 9), vectors(3, 6)])
    for k in (1, 10, 1000):
        for min_score in (None, 0.3):
            for some in (asked, asked[7:8], asked[:0]):
                nothing: list[Any] = [None] * len(some), [frozenset()] * len(some)  # type: ignore[assignment]
                found = collection.nearest(some, k, min_score, *nothing, items)
                expected = collection.search(some, k, min_score)
                assert len(found) == len(expected) == len(some)
                for pieces, hits in zip(found, expected, strict=True):
                    assert pb.SearchResponse.FromString(neighbors(pieces)) == built(hits)


def test_of_equal_rows_the_first_keys_come_first(tmp_path: Path) -> None:
    collection = Collection.create(tmp_path / "c", "lw1-x", DIM)
    rows = vectors(0, COUNT)
    rows[100:130] = rows[7]
    collection.add_segment(stored("a", COUNT), rows)
    same = sorted(f"a{i}ä" for i in (7, *range(100, 130)))
    found = collection.nearest(rows[6:9], 10, None, [None] * 3, [frozenset()] * 3, Items())
    answers = [pb.SearchResponse.FromString(neighbors(pieces)) for pieces in found]
    assert [n.item.key for n in answers[1].neighbors] == same[:10]
    assert answers[0].neighbors[0].item.key == "a6ä" and answers[2].neighbors[0].item.key == "a8ä"
    collection.close()


def test_short_searches_that_arrive_one_by_one_go_through_the_index_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection = Collection.create(tmp_path / "c", "lw1-x", DIM)
    rows = vectors(0, COUNT)
    collection.add_segment(stored("a", COUNT), rows)
    sizes: list[int] = []
    real = collection.nearest

    def nearest(queries: np.ndarray, *arguments: Any) -> Any:
        sizes.append(len(queries))
        return real(queries, *arguments)

    monkeypatch.setattr(collection, "nearest", nearest)

    async def scenario() -> None:
        searcher, items = Searcher(1, 100, Metrics()), Items()
        submit = functools.partial(searcher.submit, collection, k=3, answer=len, blocks=False, read=items)
        while collection not in searcher._seconds:  # the first goes to a thread
            assert await submit(query=rows[0]) == 3
        sizes.clear()
        waiting = []
        for i in range(5):
            waiting.append(submit(query=rows[i]))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert await asyncio.gather(*waiting) == [3] * 5
        assert sum(sizes) == 5 and len(sizes) < 5, sizes
        assert await asyncio.wait_for(submit(query=rows[9]), 5) == 3  # alone it does not wait for others
        searcher.close()

    asyncio.run(scenario())
    collection.close()
