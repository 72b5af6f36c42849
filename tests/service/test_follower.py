"""A follower sees what another process has committed: whole commits, soon, whatever happens to the segments."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from export.bundle import RefusalError
from service.collection import Collection
from service.errors import NotFoundError
from service.filter import Filter
from service.follower import Follower
from service.records import NewRow

DIM = 8

_WRITER = """
import json, sys, numpy as np
from pathlib import Path
from service.collection import Collection
from service.records import NewRow
collection = Collection(Path(sys.argv[1]))
print("ready", flush=True)
for line in sys.stdin:
    turn = int(line)
    keys = [f"k{i}" for i in range(10)]
    vectors = np.random.default_rng(turn).standard_normal((10, 8)).astype(np.float32)
    collection.upsert([NewRow(key, json.dumps({"turn": turn})) for key in keys], vectors)
    if turn % 2 == 0:
        collection.flush()
    if turn % 5 == 0:
        collection.compact(everything=True)
    print(turn, flush=True)
collection.close()
"""


def vectors(count: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Collection.create(tmp_path / "things", "lw1-x", DIM).close()
    return tmp_path / "things"


def test_it_sees_every_commit_of_another_process_whole(folder: Path) -> None:
    """Ten items are replaced in each commit, flushed and merged in between: they are of one turn whenever one looks."""
    writer = subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert writer.stdin is not None and writer.stdout is not None
    assert writer.stdout.readline() == "ready\n"
    follower = Follower(folder, every=None)
    try:
        for turn in range(1, 41):
            writer.stdin.write(f"{turn}\n")
            writer.stdin.flush()
            if turn % 3:  # while it writes
                follower.refresh()
                (hits,) = follower.search(vectors(1), 20)
                turns = {json.loads(hit.row.payload)["turn"] for hit in hits}
                assert len(turns) <= 1 and len(hits) in (0, 10) and len(follower) == len(hits)
                (some,) = follower.search(vectors(1), 20, filters=Filter.parse("turn > 0 AND key != k3"))
                assert len(some) == len(hits) * 9 // 10
            assert writer.stdout.readline() == f"{turn}\n"
            follower.refresh()
            (hits,) = follower.search(vectors(1), 20)
            assert [json.loads(hit.row.payload) for hit in hits] == [{"turn": turn}] * 10
            assert json.loads(follower.get("k7").row.payload) == {"turn": turn}
        assert not follower.refresh()  # nothing new
    finally:
        writer.communicate()
        assert writer.returncode == 0
        follower.close()


def test_it_follows_by_itself_and_soon(folder: Path) -> None:
    collection = Collection(folder)
    follower = Follower(folder, every=0.02)
    lags = []
    for i in range(20):
        sequences = collection.upsert([NewRow(f"k{i}")], vectors(1, i))
        start = time.monotonic()
        while follower.sequence < sequences[0]:
            assert time.monotonic() - start < 10
            time.sleep(0.001)
        lags.append(time.monotonic() - start)
        assert np.allclose(follower.get(f"k{i}").vector, vectors(1, i))
    assert follower.problem is None and len(follower) == 20
    collection.delete(["k3"])
    while len(follower) == 20:
        time.sleep(0.001)
    with pytest.raises(NotFoundError):
        follower.get("k3")
    follower.close()
    with pytest.raises(NotFoundError, match="closed"):
        follower.get("k4")
    collection.close()


def test_a_view_outlives_its_segments(folder: Path) -> None:
    collection = Collection(folder)
    for turn in range(3):
        collection.upsert([NewRow(f"k{turn}{i}") for i in range(5)], vectors(5, turn))
        collection.flush()
    follower = Follower(folder, every=None)
    collection.compact(everything=True)
    collection.delete([f"k0{i}" for i in range(5)])
    (hits,) = follower.search(vectors(1), 20)  # the files of its segments are gone
    assert len(hits) == 15
    assert follower.get("k12").row.key == "k12"  # its segment is new: it looks
    assert not follower.refresh()
    (hits,) = follower.search(vectors(1), 20)
    assert len(hits) == 10 == len(follower)
    follower.close()
    collection.close()


def test_what_cannot_be_followed_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RefusalError, match="is not a collection"):
        Follower(tmp_path)
    with pytest.raises(RefusalError, match="MODEL_INDEX_MISMATCH"):
        Follower(folder, "lw1-other")
    collection = Collection(folder)
    collection.add_segment([NewRow("a")], vectors(1))
    collection.close()
    (folder / "segments" / "0001" / "vectors.npy").unlink()
    with pytest.raises(RefusalError, match=r"vectors\.npy is missing"):
        Follower(folder)


def test_a_folder_that_was_made_anew_is_said_and_never_mixed(folder: Path) -> None:
    follower = Follower(folder, every=0.01)
    shutil.rmtree(folder)
    deadline = time.monotonic() + 10
    while follower.problem is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert "was deleted, or made anew" in str(follower.problem)
    Collection.create(folder, "lw1-x", DIM).close()
    with pytest.raises(RefusalError, match="made anew"):
        follower.refresh()
    follower.close()
