"""Near duplicates: every pair that is there, once, and the groups that they make."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import service.duplicates
import service.index
from likewise import COMMANDS, main
from service.collection import Collection
from service.duplicates import Group, SelfSearch, groups, pairs
from service.errors import InvalidArgumentError
from service.filter import Filter
from service.policy import IndexPolicy
from service.records import NewRow
from tests.conftest import encode, noise

DIM = 32
LIMIT = 0.895


def clustered(count: int, seed: int, size: int = 4) -> np.ndarray:
    """Unit vectors [count, 32] around count / size centres, in no order, some near others of their cluster."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((max(count // size, 1), DIM))
    rows = centres[rng.integers(0, len(centres), count)] + rng.uniform(0.05, 0.9, (count, 1)) * rng.standard_normal(
        (count, DIM)
    )
    rows = rows.astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def rows_of(numbers: range) -> list[NewRow]:
    return [NewRow(f"k{i:05d}", json.dumps({"i": i, "even": i % 2 == 0}), f"file:///p/{i}") for i in numbers]


def expected(
    items: dict[str, tuple[int, np.ndarray]], limit: float, after: int = 0, keep: Callable[[int], bool] = lambda _: True
) -> dict[tuple[str, str], float]:
    """(newer, older) → score of items {key: (sequence, vector)}, in float64; none may lie on the limit."""
    names = sorted((key for key in items if keep(int(key[1:]))), key=lambda key: items[key][0])
    matrix = np.array([items[key][1] for key in names], np.float64)
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    scores = matrix @ matrix.T
    assert not (np.abs(scores - limit) < 1e-5).any(), "choose another seed: a score lies on the limit"
    newer, older = np.nonzero(np.tril(scores >= limit, -1))
    return {
        (names[i], names[j]): float(scores[i, j])
        for i, j in zip(newer.tolist(), older.tolist(), strict=True)
        if items[names[i]][0] > after
    }


def live(collection: Collection) -> dict[str, tuple[int, np.ndarray]]:
    """{key: (sequence, vector)}"""
    view = collection._view
    rows = [part.segment.row(i) for part in view.parts for i in np.flatnonzero(part.flags()).tolist()]
    rows += [view.fresh.rows[i] for i in view.fresh.positions().tolist()]
    return {row.key: (row.sequence, collection.get(row.key).vector) for row in rows}


def check(found: list[service.duplicates.Pair], truth: dict[tuple[str, str], float]) -> None:
    keys = [(pair.key_a, pair.key_b) for pair in found]
    assert len(set(keys)) == len(keys) and set(keys) == truth.keys()
    assert all(abs(pair.score - truth[pair.key_a, pair.key_b]) < 2e-6 for pair in found)


def components(edges: set[tuple[str, str]]) -> set[frozenset[str]]:
    sets: dict[str, set[str]] = {}
    for a, b in edges:
        both = sets.get(a, {a}) | sets.get(b, {b})
        for key in both:
            sets[key] = both
    return {frozenset(each) for each in sets.values()}


@pytest.fixture(params=["float32", "float16"])
def mixed(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Collection]:
    """Two segments and fresh rows; deleted and replaced rows in each; tiles of odd sizes."""
    monkeypatch.setattr(service.duplicates, "QUERIES", 100)
    monkeypatch.setattr(service.duplicates, "TARGETS", 70)
    monkeypatch.setattr(service.duplicates, "BATCH", 64)
    collection = Collection.create(tmp_path / "c", "lw1-x", DIM, IndexPolicy(vectors=request.param))
    matrix, rows = clustered(1200, 1), rows_of(range(1200))
    collection.add_segment(rows[:500], matrix[:500])
    collection.upsert(rows[500:800], matrix[500:800])
    collection.delete([f"k{i:05d}" for i in range(480, 520)])
    collection.flush()
    collection.upsert(rows[800:], matrix[800:])
    collection.upsert(rows[100:140], matrix[1:41])  # replaced: they are new now
    collection.delete([f"k{i:05d}" for i in (0, 7, 600, 601, 1000, 1001)])
    assert len(collection.segments()) == 2 and collection.fresh_count
    yield collection
    collection.close()


def test_pairs_are_those_of_a_comparison_of_all(mixed: Collection) -> None:
    items = live(mixed)
    truth = expected(items, LIMIT)
    assert len(truth) > 300
    check(list(pairs(mixed, LIMIT)), truth)
    even = Filter.parse("even = true")
    check(list(pairs(mixed, LIMIT, even)), expected(items, LIMIT, keep=lambda i: i % 2 == 0))
    assert not list(pairs(mixed, LIMIT, Filter.parse("i = 3")))


def test_runs_one_after_the_other_find_what_one_run_finds(mixed: Collection) -> None:
    items = live(mixed)
    first = mixed.sequence - 200
    check(list(pairs(mixed, LIMIT, after=first)), expected(items, LIMIT, after=first))
    check(list(pairs(mixed, LIMIT, Filter.parse("even = true"), first)),
          expected(items, LIMIT, first, lambda i: i % 2 == 0))  # fmt: skip
    last = SelfSearch(mixed, LIMIT).sequence
    assert last == max(sequence for sequence, _ in items.values()) and not list(pairs(mixed, LIMIT, after=last))
    one = items["k00300"][1]
    mixed.upsert([NewRow("k90000")], one[None])
    search = SelfSearch(mixed, LIMIT, after=last)
    assert search.asked == 1
    near = {hit.row.key for hit in mixed.within(one, LIMIT)} - {"k90000"}
    assert {(pair.key_a, pair.key_b) for pair in search.pairs()} == {("k90000", key) for key in near}
    (group,) = search.groups()
    assert {member.key for member in group.members} == {"k90000", *near}


def test_groups(mixed: Collection) -> None:
    items = live(mixed)
    truth = expected(items, LIMIT)
    found = list(groups(mixed, LIMIT))
    assert {frozenset(member.key for member in group.members) for group in found} == components(set(truth))
    sizes = [len(group.members) for group in found]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] == 2 and sizes[0] > 3
    for group in found:
        sequences = [items[member.key][0] for member in group.members]
        assert sequences[0] == min(sequences) and group.kept.score == 1
        scores = [items[member.key][1] @ items[group.kept.key][1] for member in group.others]
        assert np.allclose([member.score for member in group.others], scores, atol=2e-6)
        assert [member.score for member in group.others] == sorted((m.score for m in group.others), reverse=True)
        assert group.least == group.others[-1].score
        assert all(m.source_uri == f"file:///p/{int(m.key[1:])}" for m in group.members)


def test_a_view_is_searched_as_it_was(mixed: Collection) -> None:
    truth = expected(live(mixed), LIMIT)
    found = pairs(mixed, LIMIT)
    first = next(found)  # long before the end
    assert (first.key_a, first.key_b) in truth
    mixed.upsert(rows_of(range(2000, 2100)), clustered(100, 1))
    mixed.delete([first.key_a])
    mixed.flush()
    mixed.compact(everything=True)
    check([first, *found], truth)


def test_pairs_stream(mixed: Collection) -> None:
    told: list[tuple[int, int]] = []
    search = SelfSearch(mixed, LIMIT, progress=lambda done, total: told.append((done, total)))
    found = search.pairs()
    next(found)
    assert len(told) <= 2
    rest = sum(1 for _ in found)
    assert rest and len(told) >= 11 and told[-1][0] == told[-1][1] and told == sorted(told)


@pytest.mark.parametrize("index", ["IVF32,Flat", "IVF32,SQ8", "HNSW16"])
def test_approximate_segments(tmp_path: Path, index: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.duplicates, "EXACT_AMONG", 100)
    monkeypatch.setattr(service.index, "EXACT_AMONG", 100)
    monkeypatch.setattr(service.duplicates, "NEIGHBOURS", 8)
    monkeypatch.setattr(service.duplicates, "CANDIDATES", 4096)
    collection = Collection.create(tmp_path / "c", "lw1-x", DIM, IndexPolicy(index=index))
    matrix = clustered(1800, 2, 6)
    matrix[500:560] = matrix[500]  # more than are asked for first
    collection.add_segment(rows_of(range(1800)), matrix)
    collection.delete([f"k{i:05d}" for i in range(0, 300, 3)])
    collection.upsert(rows_of(range(1800, 1900)), clustered(1800, 2, 6)[1000:1100])
    truth = expected(live(collection), LIMIT)
    found = list(pairs(collection, LIMIT))
    keys = {(pair.key_a, pair.key_b) for pair in found}
    assert len(keys) == len(found) and keys <= truth.keys() and len(keys) >= 0.9 * len(truth)
    assert all(abs(pair.score - truth[pair.key_a, pair.key_b]) < 2e-6 for pair in found)
    check(list(SelfSearch(collection, LIMIT, exact=True).pairs()), truth)
    sets = components(set(truth))
    assert sum(frozenset(m.key for m in g.members) in sets for g in groups(collection, LIMIT)) >= 0.9 * len(sets)
    monkeypatch.setattr(service.duplicates, "MOST_NEIGHBOURS", 8)  # the sixty equal ones still hang together
    assert len(next(groups(collection, 0.999)).members) == 60
    collection.close()


def test_a_chain_is_one_group_and_says_so(tmp_path: Path) -> None:
    collection = Collection.create(tmp_path / "c", "lw1-x", DIM)
    angles = np.arange(7) * np.arccos(0.96)
    chain = np.zeros((7, DIM), np.float32)
    chain[:, 0], chain[:, 1] = np.cos(angles), np.sin(angles)
    collection.upsert(rows_of(range(7)), chain)
    (group,) = groups(collection, 0.95)
    assert [member.key for member in group.members] == [f"k{i:05d}" for i in range(7)]
    assert group.least == pytest.approx(np.cos(angles[6]), abs=1e-5) and group.least < 0
    assert sum(1 for _ in pairs(collection, 0.95)) == 6
    collection.close()


def test_equal_vectors_score_one(tmp_path: Path) -> None:
    collection = Collection.create(tmp_path / "c", "lw1-x", DIM)
    twice = clustered(200, 3)
    collection.upsert(rows_of(range(400)), np.concatenate([twice, twice * 3]))
    assert len(list(pairs(collection, 1.0))) == 200
    assert sum(1 for _ in pairs(collection, -1.0)) == 400 * 399 // 2
    assert [len(group.members) for group in groups(collection, -1.0)] == [400]
    collection.close()


def test_forest_joins_as_one_by_one() -> None:
    rng = np.random.default_rng(4)
    for count in (2, 50, 3000):
        a, b = rng.integers(0, count, (2, int(count * 0.6)))
        forest = service.duplicates._Forest(count)
        for low in range(0, len(a), 500):
            forest.join(a[low : low + 500], b[low : low + 500])
        members, roots = forest.groups()
        found = {frozenset(members[roots == root].tolist()) for root in np.unique(roots)}
        edges = {(str(x), str(y)) for x, y in zip(a.tolist(), b.tolist(), strict=True) if x != y}
        assert found == {frozenset(map(int, each)) for each in components(edges)}
        assert all(min(each) in roots for each in found)


def test_empty_and_refused(tmp_path: Path) -> None:
    collection = Collection.create(tmp_path / "c", "lw1-x", DIM)
    assert not list(pairs(collection, 0.5)) and not list(groups(collection, 0.5, after=0))
    assert SelfSearch(collection, 0.5).sequence == 0
    for score in (float("nan"), float("inf"), 1.01, -1.5):
        with pytest.raises(InvalidArgumentError, match="-1 to 1 are possible"):
            pairs(collection, score)
    for after in (-1, 1):
        with pytest.raises(InvalidArgumentError, match="are 0 to 0: give the one"):
            groups(collection, 0.9, after=after)
    collection.close()


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A collection of four pictures three times over, and a lone one."""
    entry = ("service.duplicates_command", "Duplicates", "cpu,serve", "find near duplicates in a collection")
    monkeypatch.setitem(COMMANDS, ("duplicates",), entry)
    collection = Collection.create(tmp_path / "c", "lw1-x", DIM)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    rows, far = [], np.eye(5, DIM, dtype=np.float32)
    for i in range(13):
        path = pictures / f"{i}, “a”.png"
        path.write_bytes(encode(noise(24, 24, i % 4), "PNG"))
        rows.append(NewRow(path.name, json.dumps({"i": i}), path.as_uri()))
    collection.upsert(rows, far[[*range(4), *range(4), *range(4), 4]])
    collection.close()
    return tmp_path / "c"


def run(folder: Path, *more: str) -> int:
    return main(["duplicates", str(folder), *more])


def test_command_to_the_standard_output(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(folder) == 0
    out, err = capfd.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["group"] for row in rows] == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    assert [row["keep"] for row in rows] == [True, False, False] * 4 and {row["score"] for row in rows} == {1.0}
    assert rows[1]["key"] == "4, “a”.png" and rows[1]["source_uri"].startswith("file:///")
    assert "13 items compared" in err and "4 groups of 12 items, of which 8 could go" in err and "--after 13" in err


def test_command_to_files(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    table, sheet = tmp_path / "d.csv", tmp_path / "d.png"
    assert run(folder, "--filter", "i < 8", "--out", str(table), "--sheet", str(sheet)) == 0
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert (
        len(rows) == 8 and rows[2]["key"] == "1, “a”.png" and rows[2]["keep"] == "true" and rows[3]["keep"] == "false"
    )
    with Image.open(sheet) as drawn:
        assert drawn.width > 2 * 144 and drawn.height > 4 * 144
    assert run(folder, "--after", "12", "--out", str(tmp_path / "d.jsonl"), "--sheet", str(tmp_path / "none.png")) == 0
    assert (tmp_path / "d.jsonl").read_text() == "" and not (tmp_path / "none.png").exists()
    out, err = capfd.readouterr()
    assert out == "" and "4 groups are drawn in" in err and "1 new items of 13 compared" in err and "no groups" in err
    assert not list(tmp_path.glob(".*"))


def test_an_interrupted_command_leaves_no_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "d.jsonl"
    out.write_text("of an earlier run")
    real = SelfSearch.groups

    def interrupted(self: SelfSearch) -> Iterator[Group]:
        yield next(real(self))
        assert (tmp_path / ".d.jsonl.tmp").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(SelfSearch, "groups", interrupted)
    assert run(folder, "--out", str(out)) == 130
    assert out.read_text() == "of an earlier run" and not list(tmp_path.glob(".*"))
    capfd.readouterr()
    Collection(folder).close()  # the lock is free


@pytest.mark.parametrize(
    ("more", "code", "sentence"),
    [
        (["--min-score", "nan"], 2, "min-score"),
        (["--min-score", "1.5"], 2, "less than or equal to 1"),
        (["--filter", "i <"], 1, "filter, character 4"),
        (["--after", "14"], 1, "those of 'c' are 0 to 13"),
        (["--out", "x.txt"], 1, "end it in .jsonl or .csv"),
        (["--sheet", "x"], 1, "ends in 'nothing': end it in .png"),
        (["--out", "/nowhere/x.csv"], 1, "there is no folder /nowhere"),
    ],
)
def test_command_refuses(
    folder: Path, more: list[str], code: int, sentence: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, *more) == code
    said = capfd.readouterr().err
    assert sentence in said and "Traceback" not in said


def test_a_served_collection_is_refused(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    collection = Collection(folder)
    assert run(folder) == 1
    collection.close()
    assert "is open for writing by process" in capfd.readouterr().err
