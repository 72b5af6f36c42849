"""Acknowledged writes survive power loss; and where one sync is left out, this test finds that they do not.

SIGKILL shows nothing of the kind, for the page cache outlives the process. So a workload is recorded once, system call by
system call (recording.py), and played up to some point into a disk that then loses power (disk.py): half of the points are
right after an acknowledgement, where all that counts should be safe, the others anywhere. What that leaves is opened and
compared with what the workload was told.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from export.bundle import RefusalError
from service.collection import Collection
from service.errors import NotFoundError
from tests.faults.disk import SECTOR, File, Folder, Tree, Write, lose_power
from tests.faults.recording import Recording, record, why_not, write_tree
from tests.faults.workload import DIM, KEYS, NUMBERS, SABOTAGES, SPACE, picture, row, vector

PLACE = "shelf/things"
"""The collection on the disk: two folders are made for it."""
LOSSES = 150
# A sabotage must be found within so many.
PATIENCE = 400

State = dict[str, int]
"""Numbers by key."""


class Loss(NamedTuple):
    """What a power loss left, and what may be in it."""

    name: str
    """Seed and point, to find it again."""
    tree: Tree
    created: bool
    """Whether the collection was acknowledged."""
    possible: list[State]
    """What was acknowledged; the same with the write that was under way."""


def points(recording: Recording, count: int, rng: random.Random) -> list[int]:
    """Where to lose power: half of the points right after acknowledgements, each equally often."""
    said = [marker is not None and "done" in marker.text for _, marker in recording.replay()]
    acknowledged = [i for i, done in enumerate(said) if done]
    rng.shuffle(acknowledged)
    safe = [acknowledged[i % len(acknowledged)] for i in range(count // 2)]
    return safe + rng.choices(range(len(said)), k=count - len(safe))


def losses(recording: Recording, chosen: Sequence[int], seed: int, state: State | None = None) -> Iterator[Loss]:
    """Power losses at points of a recording. `state`: what the collection held before (None: there was none)."""
    created, before, after = state is not None, dict(state or {}), dict(state or {})
    doing = "nothing"
    for i, (disk, marker) in enumerate(recording.replay()):
        if marker is not None and "begin" in marker.text:
            doing, put, gone = marker.text["begin"], marker.text["put"], marker.text["gone"]
            after = {key: n for key, n in {**before, **put}.items() if key not in gone}
        elif marker is not None and "done" in marker.text:
            created, before, doing = True, after, f"{doing}, which is acknowledged"
        for again in range(chosen.count(i)):
            name = f"seed {seed}, call {i}, loss {again}, in {doing}"
            tree = lose_power(disk, random.Random(f"{seed} {i} {again}"))
            yield Loss(name, tree, created, [before] if before == after else [before, after])


def contents(collection: Collection) -> tuple[State, str | None]:
    """What a collection holds by `get`; and in what its other answers differ from that."""
    found: State = {}
    for key in KEYS:
        try:
            item = collection.get(key)
        except NotFoundError:
            continue
        found[key] = json.loads(item.row.payload)["number"]
        if item.row.source_uri != row(key, found[key]).source_uri:
            return found, f"{key} is of {found[key]} by its payload, of {item.row.source_uri} by its place"
        if not np.array_equal(item.vector, vector(found[key])):
            return found, f"{key} has the payload of {found[key]} and another vector"
        if collection.original(item.row.id) != picture(found[key]):
            return found, f"{key} has the payload of {found[key]} and another original"
    if len(collection) != len(found):
        return found, f"it says that it has {len(collection)} items, and has {len(found)}"
    vectors = {key: vector(number) for key, number in found.items()}
    queries = np.array([*vectors.values(), vector(0)])
    for query, hits in zip(queries, collection.search(queries, len(KEYS) + 1), strict=True):
        expected = {key: float(v @ query) for key, v in vectors.items()}
        if len(hits) != len(expected) or {hit.row.key: hit.score for hit in hits} != expected:
            return found, f"a search finds {[(hit.row.key, hit.score) for hit in hits]}, not {expected}"
        if any(json.loads(hit.row.payload)["number"] != found[hit.row.key] for hit in hits):
            return found, "a search finds rows that were replaced"
    return found, None


def problem(loss: Loss, root: Path) -> str | None:
    """What is wrong with what is left; None: nothing."""
    write_tree(root, loss.tree)
    folder = root / PLACE
    try:
        try:
            collection = Collection(folder)
        except RefusalError as e:
            if loss.created or "is not a collection" not in str(e):
                return f"it does not open: {e}"
            collection = Collection.create(folder, SPACE, DIM, keep_originals=True)  # as the message says: make one
        try:
            found, wrong = contents(collection)
            if wrong or found not in loss.possible:
                return wrong or f"it holds {found}, possible were {loss.possible}"
            # It must also go on: write, flush, sweep, and be there after the next opening.
            number = random.Random(loss.name).randrange(NUMBERS)
            collection.upsert([row("k00", number)], vector(number)[None], [picture(number)])
            collection.flush()
            collection.sweep()
            named = {state.sha256 for state in collection.files().values()} - {None}
            if collection.originals.extent().files != len(named):
                return "a sweep leaves other originals than its items name"
            collection.close()
            collection = Collection(folder)
            found_then, wrong = contents(collection)
            if wrong or found_then != {**found, "k00": number}:
                return f"after going on: {wrong or found_then}"
            return None
        finally:
            collection.close()
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    finally:
        shutil.rmtree(root)


def make_recording(folder: Path, seed: int, sabotage: str, before: Tree | None = None) -> Recording:
    """The workload on a new disk, or on one that holds something already. Skips where nothing can be recorded."""
    if (reason := _why_not()) is not None:
        pytest.skip(reason)
    disk, markers = folder / "disk", folder / "markers"
    write_tree(disk, before or {})
    command = [sys.executable, "-m", "tests.faults.workload", str(disk / PLACE), str(markers), str(seed), sabotage]
    recording = record(command, disk, markers)
    shutil.rmtree(disk)
    said = [marker.text for _, marker in recording.replay() if marker is not None]
    assert (said[-1]["left_out"] > 0) == (sabotage in SABOTAGES), said[-1]
    return recording


@cache
def _why_not() -> str | None:
    return why_not()


@pytest.fixture(scope="session")
def memory() -> Iterator[Path]:
    """A folder in memory where there is one: thousands of syncs would wait for the real disk, and prove nothing."""
    place = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=place if os.access(place, os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.fixture
def folder(memory: Path) -> Iterator[Path]:
    """A new one in it."""
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def whole(memory: Path) -> Recording:
    """The workload with all of its syncs."""
    (memory / "whole").mkdir()
    return make_recording(memory / "whole", 1, "none")


def problems(found: Iterable[Loss], folder: Path) -> list[str]:
    """What is wrong after some losses."""
    return [f"{loss.name}: {wrong}" for loss in found if (wrong := problem(loss, folder / "left"))]


def test_the_workload_does_everything(whole: Recording) -> None:
    said = [marker.text for _, marker in whole.replay() if marker is not None]
    done = [(a["begin"], b["done"]) for a, b in itertools.pairwise(said) if "begin" in a]
    kinds = {"create", "upsert", "delete", "flush", "add_segment", "compact", "compact_all", "sweep", "reopen", "close"}
    assert {do for do, _ in done} == kinds
    assert max(merged for do, merged in done if do == "compact") > 1
    assert max(merged for do, merged in done if do == "compact_all") > 1
    assert max(swept for do, swept in done if do == "sweep") > 0


def test_acknowledged_writes_survive_power_loss(whole: Recording, folder: Path) -> None:
    chosen = points(whole, LOSSES, random.Random(0))
    assert problems(losses(whole, chosen, 0), folder) == []


def test_an_interrupted_creation_can_be_repeated(whole: Recording, folder: Path) -> None:
    said = [marker is not None and "done" in marker.text for _, marker in whole.replay()]
    assert problems(losses(whole, [*range(said.index(True) + 1)] * 2, 1), folder) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_so_do_those_of_a_process_that_recovered(whole: Recording, seed: int, folder: Path) -> None:
    """A second loss, on what the first has left: recovery writes as well."""
    chosen = points(whole, 400, random.Random(100 + seed))
    unfinished = [
        loss
        for loss in losses(whole, chosen, 100 + seed)
        if loss.tree.get(f"{PLACE}/records.sqlite-wal") and any("/segments/." in path for path in loss.tree)
    ]
    first = random.Random(seed).choice(unfinished)
    write_tree(folder / "first", first.tree)
    collection = Collection(folder / "first" / PLACE)
    state, wrong = contents(collection)
    collection.close()
    assert wrong is None and state in first.possible
    recording = make_recording(folder, 10 + seed, "none", first.tree)
    opening = range(40)  # its first calls
    chosen = [*opening, *points(recording, LOSSES // 3, random.Random(seed))]
    assert problems(losses(recording, chosen, seed, state), folder) == [], f"after {first.name}"


@pytest.mark.slow
@pytest.mark.parametrize("sabotage", SABOTAGES)
def test_every_sync_is_needed(sabotage: str, folder: Path) -> None:
    recording = make_recording(folder, 1, sabotage)
    created = next(
        i for i, (_, marker) in enumerate(recording.replay()) if marker is not None and "done" in marker.text
    )
    # The first write makes up for one of them (SQLite syncs the folder of its log): some losses go before it.
    chosen = [*points(recording, PATIENCE, random.Random(0)), *[created] * 20]
    tried = losses(recording, chosen, 0)
    assert any(problem(loss, folder / "left") for loss in tried), f"{len(chosen)} losses do not need it"


def test_what_is_not_synced_may_be_lost_and_nothing_else() -> None:
    """The disk itself: each outcome that the model allows is met, and no other."""
    synced, unsynced, renamed, root = File(), File(), File(), Folder()
    a, b, c, d = b"a" * 9, b"b" * 9, b"c" * SECTOR, b"d" * 9
    for file, data in ((synced, a), (unsynced, b), (renamed, c + d)):
        file.change(Write(0, data))
    synced.sync(1)
    root.change({"synced": synced})
    root.change({"unsynced": unsynced})
    root.sync(2)
    root.change({"new": renamed})
    root.change({"new": None, "synced": renamed})
    outcomes: dict[str, set[bytes | None]] = {"synced": set(), "unsynced": set(), "new": set()}
    for seed in range(2000):
        left = lose_power(root, random.Random(seed))
        assert "new" not in left or left["synced"] == a  # a rename is there whole or not at all
        for name, seen in outcomes.items():
            found = left.get(name)
            seen.add(b"noise" if found and set(found) - set(b"\0abcd") else found)
    torn: set[bytes | None] = {b"", c, c + d, bytes(SECTOR) + d, bytes(SECTOR + len(d)), c + bytes(len(d)), b"noise"}
    assert outcomes == {"unsynced": {b"", b, bytes(len(b)), b"noise"}, "synced": {a} | torn, "new": {None} | torn}
