"""Searches over gRPC: filters, groups, examples, expansion and pages."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.bundle import Embeddings
from service.client import CallError, Client, Example, NewItem
from service.messages import Call
from service.pb import likewise_pb2 as pb
from tests.service.running import Running

COUNT = 300


@pytest.fixture(scope="module")
def client(bundle: Path, indexed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A server with the shapes, and a collection of 300 vectors with payloads."""
    running = Running(bundle=bundle, collections=shutil.copytree(indexed, tmp_path_factory.mktemp("c") / "c"))
    with Client(running.address, timeout=20) as client:
        client.create_collection("many")
        for low in range(0, COUNT, 100):
            items = [
                NewItem(f"k{i:03d}", vector=vectors()[i], payload={"i": i, "product": f"p{i % 40}"})
                for i in range(low, low + 100)
            ]
            client.upsert("many", items)
        yield client
    running.stop()


def vectors() -> Embeddings:
    """[300, 64]"""
    rows = np.random.default_rng(0).standard_normal((COUNT, 64)).astype(np.float32)
    unit: Embeddings = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def nearest(query: Any) -> list[int]:
    return np.argsort(-(vectors() @ query)).tolist()


def keys(found: list[Any]) -> list[int]:
    return [int(n.key[1:]) for n in found]


QUERY = np.random.default_rng(9).standard_normal(64).astype(np.float32)


def test_filters(client: Client) -> None:
    found = client.search(
        "many", vector=QUERY, top_k=20, filter='i < 100 AND NOT product = (p1 OR "p2") AND key != k003'
    )
    assert keys(found) == [i for i in nearest(QUERY) if i < 100 and i % 40 not in (1, 2) and i != 3][:20]
    assert client.search("shapes", key="star/00003.png", filter="folder = circle", top_k=3)[0].payload == {
        "folder": "circle"
    }
    assert client.search("many", vector=QUERY, filter="i > 1000") == []
    with pytest.raises(CallError, match="expected") as caught:
        client.search("many", vector=QUERY, filter="i << 3")
    assert (caught.value.code, caught.value.reason) == ("INVALID_ARGUMENT", "BAD_FILTER")


def test_one_result_per_product(client: Client) -> None:
    found = client.search("many", vector=QUERY, top_k=12, group_by="product")
    assert [n.group for n in found] == list(range(12))
    first: dict[int, int] = {}
    for i in nearest(QUERY):
        first.setdefault(i % 40, i)
    assert keys(found) == list(first.values())[:12]
    found = client.search("many", vector=QUERY, top_k=2, group_by="product", group_size=3)
    assert [n.group for n in found] == [0, 0, 0, 1, 1, 1]


def test_more_like_these_and_less_like_those(client: Client, pictures: Path) -> None:
    mixed = vectors()[5] + 2 * vectors()[8] - 0.5 * vectors()[9]
    examples = [Example(key="k005"), Example(vector=vectors()[8], weight=2), Example(key="k009", weight=-0.5)]
    expected = [i for i in nearest(mixed) if i not in (5, 9)]  # stored examples are left out, a vector is not stored
    assert keys(client.search("many", examples=examples, top_k=9)) == expected[:9]
    picture = (pictures / "star/00003.png").read_bytes()
    (best,) = client.search("shapes", examples=[Example(image=picture), Example(image=picture, weight=0.1)], top_k=1)
    assert best.key == "star/00003.png" and best.score > 0.9999
    for wrong, reason in (
        ([], "BAD_COUNT"),
        ([Example(key="k005")] * 65, "BAD_COUNT"),
        ([Example()], "BAD_REQUEST"),
        ([Example(key="nope")], "ITEM_NOT_FOUND"),
        ([Example(key="k005"), Example(key="k005", weight=-1)], "BAD_WEIGHTS"),
        ([Example(key="k005", weight=float("nan"))], "BAD_WEIGHTS"),
        ([Example(image=b"x")], "IMAGE_UNDECODABLE"),
    ):
        with pytest.raises(CallError) as caught:
            client.search("many", examples=wrong)
        assert caught.value.reason == reason, caught.value


def test_expansion_moves_the_query(client: Client) -> None:
    near = nearest(QUERY)[:5]
    unit = QUERY / np.linalg.norm(QUERY)
    grown = unit + sum((vectors()[i] @ unit) ** 2 * vectors()[i] for i in near)
    assert keys(client.search("many", vector=QUERY, expand=5, alpha=2, top_k=30)) == nearest(grown)[:30]
    for wrong in ({"expand": 101}, {"expand": 3, "alpha": -1}):
        with pytest.raises(CallError) as caught:
            client.search("many", vector=QUERY, **wrong)  # type: ignore[arg-type]
        assert caught.value.code == "INVALID_ARGUMENT"


def test_pages_continue_and_are_bound_to_their_request(client: Client) -> None:
    request = pb.SearchRequest(collection="many", query=pb.Query(vector=pb.Vector(values=QUERY.tolist())), top_k=70)
    pages: list[int] = []
    tokens = []
    while True:
        response = client._call(Call("/likewise.v1.SearchService/Search", request, pb.SearchResponse))
        pages += [int(n.item.key[1:]) for n in response.neighbors]
        if not response.next_page_token:
            break
        tokens.append(response.next_page_token)
        request.page_token = response.next_page_token
    assert pages == nearest(QUERY) and len(tokens) == 4
    request.page_token = tokens[0]
    for change in (
        {"filter": "i < 5"},
        {"group_by": "product"},
        {"page_token": "nonsense"},
        {"page_token": tokens[0][:-4]},
    ):
        changed = pb.SearchRequest()
        changed.CopyFrom(request)
        for name, value in change.items():
            setattr(changed, name, value)
        with pytest.raises(CallError) as caught:
            client._call(Call("/likewise.v1.SearchService/Search", changed, pb.SearchResponse))
        assert caught.value.reason == "BAD_PAGE_TOKEN"


def test_more_than_a_page_comes_in_pages(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    import service.messages

    monkeypatch.setattr(service.messages, "PAGE", 40)
    assert keys(client.search("many", vector=QUERY, top_k=250)) == nearest(QUERY)[:250]
    assert keys(client.search("many", vector=QUERY, top_k=9999)) == nearest(QUERY)
