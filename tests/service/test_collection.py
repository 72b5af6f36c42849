"""The store against a shadow model, against kills, and against damage."""

from __future__ import annotations

import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from export.bundle import RefusalError
from service.collection import Collection
from service.errors import DiskFullError, InvalidArgumentError, NotFoundError
from service.filter import Filter
from service.follower import Follower
from service.reading import Readable
from service.records import NewRow
from service.segment import Segment

DIM = 8


def unit(count: int, seed: int = 0, dim: int = DIM) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def rows(*keys: str) -> list[NewRow]:
    return [NewRow(key, json.dumps({"k": key}), f"file:///{key}") for key in keys]


@pytest.fixture
def collection(tmp_path: Path):
    c = Collection.create(tmp_path / "things", "lw1-x", DIM)
    yield c
    c.close()


FILTER = Filter.parse('k = ("k3" OR "k7") OR key >= "k9"')


class Shadow(RuleBasedStateMachine):
    """Random writes, flushes and reopenings; after each, the collection agrees with a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self.folder = Path(tempfile.mkdtemp()) / "shadow"
        self.collection = Collection.create(self.folder, "lw1-x", DIM)
        self.truth: dict[str, np.ndarray] = {}
        self.number = 0

    def fresh_vectors(self, count: int) -> np.ndarray:
        self.number += 1
        return unit(count, self.number)

    keys = st.lists(st.sampled_from([f"k{i}" for i in range(12)]), min_size=1, max_size=6)

    @rule(keys=keys)
    def upsert(self, keys: list[str]) -> None:
        vectors = self.fresh_vectors(len(keys))
        self.collection.upsert(rows(*keys), vectors)
        self.truth.update(zip(keys, vectors, strict=True))

    @rule(keys=keys)
    def delete(self, keys: list[str]) -> None:
        missing = self.collection.delete(keys)
        assert set(missing) == set(keys) - self.truth.keys()
        for key in keys:
            self.truth.pop(key, None)

    @rule(keys=keys)
    def add_segment(self, keys: list[str]) -> None:
        keys = sorted(set(keys))
        vectors = self.fresh_vectors(len(keys))
        self.collection.add_segment(rows(*keys), vectors)
        self.truth.update(zip(keys, vectors, strict=True))

    @rule()
    def flush(self) -> None:
        self.collection.flush()

    @rule(everything=st.booleans())
    def compact(self, everything: bool) -> None:
        before = [segment.number for segment in self.collection.segments()]
        merged = self.collection.compact(everything)
        after = [segment.number for segment in self.collection.segments()]
        assert len(set(before) - set(after)) == merged and len(set(after) - set(before)) <= bool(merged)
        if everything:
            assert len(after) <= 1 and all(segment.dead == 0 for segment in self.collection.segments())
        folders = {int(p.name) for p in (self.folder / "segments").glob("*")}
        assert folders == set(after)

    @rule()
    def reopen(self) -> None:
        self.collection.close()
        self.collection = Collection(self.folder, "lw1-x")

    @invariant()
    def agrees(self) -> None:
        assert len(self.collection) == len(self.truth)
        query = unit(1, 999)
        (hits,) = self.collection.search(query, 20)
        expected = sorted(((float(v @ query[0]), k) for k, v in self.truth.items()), key=lambda p: -p[0])
        assert [h.row.key for h in hits] == [k for _, k in expected]
        assert np.allclose([h.score for h in hits], [s for s, _ in expected], atol=1e-5)
        (some,) = self.collection.search(query, 3, filters=FILTER)
        assert [h.row.key for h in some] == [k for _, k in expected if k in ("k3", "k7") or k >= "k9"][:3]

    @precondition(lambda self: self.truth)
    @rule(pick=st.integers(0, 100))
    def get(self, pick: int) -> None:
        key = sorted(self.truth)[pick % len(self.truth)]
        item = self.collection.get(key)
        assert np.array_equal(item.vector, self.truth[key]) and item.row.source_uri == f"file:///{key}"

    def teardown(self) -> None:
        self.collection.close()
        shutil.rmtree(self.folder.parent)


TestShadow = Shadow.TestCase
TestShadow.settings = settings(
    max_examples=25, stateful_step_count=20, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def test_search_sorts_filters_and_leaves_out(collection: Collection) -> None:
    assert collection.search(unit(1), 5) == [[]]  # an empty collection answers with nothing
    vectors = unit(30)
    collection.add_segment(rows(*(f"s{i:02d}" for i in range(20))), vectors[:20])
    collection.upsert(rows(*(f"f{i:02d}" for i in range(10))), vectors[20:])
    two = collection.search(unit(2, 5), 7)
    assert [len(hits) for hits in two] == [7, 7]
    for hits, query in zip(two, unit(2, 5), strict=True):
        scores = [h.score for h in hits]
        assert scores == sorted(scores, reverse=True)
        assert np.allclose(scores, np.sort(vectors @ query)[::-1][:7], atol=1e-5)
    (hits,) = collection.search(vectors[3:4], 3, leave_out=[frozenset({"s03"})])
    assert len(hits) == 3 and "s03" not in {h.row.key for h in hits}
    (hits,) = collection.search(vectors[3:4], 30, min_score=0.5)
    assert all(h.score >= 0.5 for h in hits) and hits[0].row.key == "s03" and hits[0].score <= 1.0


def test_a_bad_batch_writes_nothing(collection: Collection) -> None:
    before = collection.sequence
    bad = [
        (rows("a", "b" * 513), unit(2)),
        (rows("a", ""), unit(2)),
        (rows("a"), unit(1, dim=5)),
        (rows("a"), np.full((1, DIM), np.nan, np.float32)),
        (rows("a"), np.zeros((1, DIM), np.float32)),
    ]
    for new, vectors in bad:
        with pytest.raises(InvalidArgumentError):
            collection.upsert(new, vectors)
    assert len(collection) == 0 and collection.sequence == before
    with pytest.raises(NotFoundError, match="no item with the key 'a'"):
        collection.get("a")


def test_keys_are_any_utf8(collection: Collection) -> None:
    keys = ["a b/ü.jpg", "日本語", "'; DROP TABLE items; --", "\x00\n", "🙂" * 128]
    collection.upsert(rows(*keys), unit(len(keys)))
    collection.flush()
    for key, vector in zip(keys, unit(len(keys)), strict=True):
        assert np.array_equal(collection.get(key).vector, vector)
        assert collection.search(vector[None], 1)[0][0].row.key == key


def test_one_process_writes(collection: Collection) -> None:
    with pytest.raises(RefusalError, match=r"is open for writing by process \d+ on "):
        Collection(collection.folder)


def test_another_bundle_is_refused(collection: Collection) -> None:
    collection.close()
    with pytest.raises(RefusalError, match=r"lw1-x, the bundle makes lw1-y .MODEL_INDEX_MISMATCH"):
        Collection(collection.folder, "lw1-y")
    Collection(collection.folder, "lw1-x").close()


_WRITER = """
import sys, numpy as np
from pathlib import Path
from service.collection import Collection
from service.records import NewRow
c = Collection(Path(sys.argv[1]))
start = len(c)
for i in range(start, start + 100000):
    v = np.random.default_rng(i).normal(size=(1, 8)).astype(np.float32)
    c.upsert([NewRow(f"k{i:06d}")], v)
    print(i, flush=True)
    if i % 40 == 39:
        c.flush()
    if i % 100 == 99:
        c.compact(everything=True)
"""


def test_acknowledged_writes_survive_sigkill(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    Collection.create(folder, "lw1-x", DIM).close()
    for kill_after in (7, 41, 95, 52, 23, 79):
        process = subprocess.Popen([sys.executable, "-c", _WRITER, str(folder)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        acknowledged = [int(process.stdout.readline()) for _ in range(kill_after)]
        process.send_signal(signal.SIGKILL)
        acknowledged += [int(line) for line in process.stdout.read().split()]
        process.wait()
        process.stdout.close()
        with_all = Collection(folder)
        try:
            # At most the one write that was under way is beyond what was acknowledged.
            assert acknowledged[-1] + 1 <= len(with_all) <= acknowledged[-1] + 2
            for i in (0, acknowledged[0], acknowledged[-1]):
                v = np.random.default_rng(i).normal(size=(1, 8)).astype(np.float32)
                assert with_all.search(v, 1)[0][0].row.key == f"k{i:06d}"
            (hits,) = with_all.search(unit(1), len(with_all))
            assert len({h.row.key for h in hits}) == len(hits) == len(with_all)  # nothing half-moved, nothing twice
        finally:
            with_all.close()


_INTERRUPTED = """
import os, signal, sys, threading, time
from pathlib import Path
import numpy as np
import service.collection
from service.collection import Collection
from service.records import NewRow

def slowed():
    if threading.current_thread().name.startswith("insert"):
        time.sleep(0.001)

def written(*_):
    time.sleep(0.3)  # rows are being inserted
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    raise KeyboardInterrupt

service.collection.write_segment = written
c = Collection(Path(sys.argv[1]))
c._records._db.set_progress_handler(slowed, 300)
try:
    c.add_segment([NewRow(f"k{i}") for i in range(5000)], np.ones((5000, 8), np.float32))
except KeyboardInterrupt:
    print("interrupted")
finally:
    c.close()
"""


def test_impatient_interrupts_of_a_segment_leave_nothing_of_it(collection: Collection) -> None:
    """The second comes while the rows are being inserted beside: after the rollback they would be committed one by one."""
    collection.upsert(rows("a"), unit(1))
    collection.close()
    ended = subprocess.run(
        [sys.executable, "-c", _INTERRUPTED, str(collection.folder)], capture_output=True, text=True, timeout=120
    )
    assert (ended.returncode, ended.stdout) == (0, "interrupted\n"), ended.stderr
    again = Collection(collection.folder)
    assert set(again.files()) == {"a"} and len(again) == 1
    again.add_segment(rows("k0", "k1"), unit(2))
    assert again.get("k1").row.sequence == 3
    again.close()


def test_a_segment_that_was_never_committed_is_removed(collection: Collection) -> None:
    collection.add_segment(rows("a", "b"), unit(2))
    with collection._records.transaction():
        assert collection._records.take("segment") == 2  # a kill came after it was written
    shutil.copytree(collection.folder / "segments" / "0001", collection.folder / "segments" / "0002")
    (collection.folder / "segments" / ".0003.tmp").mkdir()
    collection.close()
    again = Collection(collection.folder)
    assert len(again) == 2 and [p.name for p in (collection.folder / "segments").iterdir()] == ["0001"]
    again.close()


@pytest.mark.parametrize("name", ["vectors.npy", "rows.arrow", "index.faiss", "segment.json"])
def test_damage_is_found_on_opening(collection: Collection, name: str) -> None:
    collection.add_segment(rows("a", "b"), unit(2))
    collection.close()
    file = collection.folder / "segments" / "0001" / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(RefusalError, match=r"damaged|checksum|cannot be read"):
        Collection(collection.folder)
    file.unlink()
    with pytest.raises(RefusalError, match="restore the folder from a backup"):
        Collection(collection.folder)


def test_damaged_records_are_found_on_opening(collection: Collection) -> None:
    collection.upsert(rows(*(f"k{i}" for i in range(500))), unit(500))
    collection.close()
    for file in collection.folder.glob("records.sqlite-*"):
        file.unlink()
    path = collection.folder / "records.sqlite"
    data = bytearray(path.read_bytes())
    data[4096 : 4096 + 2000] = b"\xff" * 2000
    path.write_bytes(data)
    with pytest.raises(RefusalError, match=r"records\.sqlite is damaged"):
        Collection(collection.folder)


def test_commits_are_durable(collection: Collection) -> None:
    db = collection._records._db
    assert db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    assert db.execute("PRAGMA synchronous").fetchone()[0] == 2  # FULL


def test_readers_run_while_one_writes(collection: Collection) -> None:
    collection.upsert(rows("anchor"), unit(1, 77))
    problems: list[str] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            (hits,) = collection.search(unit(1, 77), 3)
            if not hits or hits[0].row.key != "anchor":
                problems.append(str(hits))

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for i in range(60):
        collection.upsert(rows(f"k{i % 10}"), unit(1, i))
        if i % 7 == 0:
            collection.delete([f"k{i % 10}"])
        if i % 20 == 0:
            collection.flush()
    stop.set()
    for thread in threads:
        thread.join()
    assert problems == []


def write_meanwhile(collection: Collection, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the next segment is being written, "a" is deleted, "b" replaced and `new` inserted."""
    import service.collection as module

    real = module.write_segment

    def slow(*arguments: object) -> Segment:
        collection.delete(["a"])
        collection.upsert(rows("b", new), unit(2, 9))
        return real(*arguments)

    monkeypatch.setattr(module, "write_segment", slow)


def test_writes_during_a_flush_are_kept(collection: Collection, monkeypatch: pytest.MonkeyPatch) -> None:
    collection.upsert(rows("a", "b", "c"), unit(3))
    write_meanwhile(collection, "d", monkeypatch)
    collection.flush()
    monkeypatch.undo()
    for _ in range(2):
        (hits,) = collection.search(unit(1, 1), 10)
        assert sorted(h.row.key for h in hits) == ["b", "c", "d"] and len(collection) == 3
        assert np.array_equal(collection.get("b").vector, unit(2, 9)[0])
        collection.close()
        collection = Collection(collection.folder)
    collection.close()


def test_writes_during_a_compaction_are_kept(collection: Collection, monkeypatch: pytest.MonkeyPatch) -> None:
    collection.add_segment(rows("a", "b", "c"), unit(3))
    collection.add_segment(rows("d", "e"), unit(2, 5))
    collection.delete(["c"])
    write_meanwhile(collection, "f", monkeypatch)
    assert collection.compact(everything=True) == 2
    monkeypatch.undo()
    for _ in range(2):
        (hits,) = collection.search(unit(1, 1), 10)
        assert sorted(h.row.key for h in hits) == ["b", "d", "e", "f"] and len(collection) == 4
        assert np.array_equal(collection.get("b").vector, unit(2, 9)[0])
        assert np.array_equal(collection.get("e").vector, unit(2, 5)[1])
        assert [p.name for p in (collection.folder / "segments").iterdir()] == ["0003"]
        collection.close()
        collection = Collection(collection.folder)
    collection.close()


def test_origins_follow_their_vectors_through_compaction(collection: Collection) -> None:
    fp32, int8 = "fp32/CPUExecutionProvider", "int8/CPUExecutionProvider"
    collection.add_segment([row._replace(origin=fp32) for row in rows("a", "b")], unit(2))
    collection.add_segment([row._replace(origin=int8) for row in rows("b", "c")], unit(2, 5))
    assert collection.origins == {fp32, int8}
    collection.delete(["a"])
    collection.compact(everything=True)
    assert collection.origins == {int8}  # every vector of fp32 is replaced or deleted


def test_a_search_that_began_before_a_compaction_ends_well(collection: Collection) -> None:
    for i in range(6):
        collection.add_segment(rows(*(f"{i}-{j}" for j in range(40))), unit(40, i))
    stop, failures = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            (hits,) = collection.search(unit(1, 3), 240)
            if len({h.row.key for h in hits}) != 240:
                failures.append(len(hits))

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    try:
        for i in range(6):
            collection.compact(everything=True)
            collection.add_segment(rows(*(f"{i}-{j}" for j in range(40))), unit(40, i))
    finally:
        stop.set()
        for reader in readers:
            reader.join()
    assert not failures


def test_segments_of_one_size_are_merged_and_large_ones_left(collection: Collection) -> None:
    collection.add_segment(rows(*(f"big{i}" for i in range(100))), unit(100))
    for i in range(3):
        collection.add_segment(rows(f"a{i}", f"b{i}"), unit(2, i))
        assert collection.compact() == 0 and not collection.merge_due
    collection.add_segment(rows("a3", "b3"), unit(2, 3))
    assert collection.merge_due and collection.compact() == 4
    assert [segment.rows for segment in collection.segments()] == [100, 8]
    collection.delete([f"big{i}" for i in range(19)])
    assert not collection.merge_due
    collection.delete(["big19"])  # a fifth of them
    assert collection.merge_due
    collection.maintain()
    assert sorted((s.rows, s.dead) for s in collection.segments()) == [(8, 0), (80, 0)] and not collection.merge_due


def test_missing_records_are_refused_and_the_segments_stay(collection: Collection) -> None:
    collection.add_segment(rows("a", "b"), unit(2))
    collection.close()
    for file in collection.folder.glob("records.sqlite*"):
        file.unlink()
    with pytest.raises(RefusalError, match=r"records\.sqlite is missing"):
        Collection(collection.folder)
    assert (collection.folder / "segments" / "0001" / "vectors.npy").is_file()


def test_records_and_segments_must_agree(collection: Collection) -> None:
    collection.add_segment(rows("a", "b"), unit(2))
    collection.close()
    with sqlite3.connect(collection.folder / "records.sqlite") as db:
        db.execute("UPDATE items SET key = 'x' WHERE key = 'a'")  # as a flipped byte would
    db.close()
    with pytest.raises(RefusalError, match="disagree about the rows"):
        Collection(collection.folder)


def test_items_of_no_segment_are_found_and_given_up(collection: Collection) -> None:
    collection.add_segment(rows("a", "b"), unit(2))
    collection.close()
    with sqlite3.connect(collection.folder / "records.sqlite") as db:
        db.execute("INSERT INTO items (id, key, sequence, live, segment, payload, source_uri, origin)"
                   " VALUES (3, 'c', 3, 1, 7, '{}', 'shop:c', '')")  # fmt: skip
    db.close()
    damaged = Collection(collection.folder)
    with pytest.raises(RefusalError, match="items are in segment 0007"):
        damaged.verify()
    damaged.close()
    recovered = Collection(collection.folder, recover=True)
    assert [item.key for item in recovered.lost] == ["c"] and set(recovered.files()) == {"a", "b"}
    recovered.verify()
    recovered.close()


def test_a_changed_manifest_is_found(collection: Collection) -> None:
    collection.close()
    path = collection.folder / "collection.json"
    path.write_text(path.read_text().replace('"dim": 8', '"dim": 9'))
    with pytest.raises(RefusalError, match="does not match its own checksum"):
        Collection(collection.folder)


def test_an_interrupted_creation_can_be_repeated(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    folder.mkdir()
    for name in (".collection.json.tmp", "records.sqlite-wal", "lock"):
        (folder / name).touch()
    Collection.create(folder, "lw1-x", DIM).close()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").touch()
    with pytest.raises(RefusalError, match="exists and is not a collection"):
        Collection.create(tmp_path / "mine", "lw1-x", DIM)


def test_a_failed_flush_changes_nothing_and_leaves_nothing(
    collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    import service.segment as module

    collection.upsert(rows("a", "b"), unit(2))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_index", full)
    with pytest.raises(OSError, match="No space left"):
        collection.flush()
    monkeypatch.undo()
    assert list((collection.folder / "segments").iterdir()) == []
    assert collection.fresh_count == 2 and np.array_equal(collection.get("a").vector, unit(2)[0])
    collection.flush()
    assert collection.fresh_count == 0 and [h.row.key for h in collection.search(unit(1), 5)[0]] == ["a", "b"]


def test_a_full_disk_refuses_the_write_and_keeps_the_rest(collection: Collection) -> None:
    collection.upsert(rows("a"), unit(1))
    db = collection._records._db
    pages = db.execute("PRAGMA page_count").fetchone()[0]
    db.execute(f"PRAGMA max_page_count = {pages + 2}")  # SQLite's own way to run out of space
    with pytest.raises(DiskFullError, match="nothing of this write was stored"):
        collection.upsert(rows(*(f"k{i}" for i in range(500))), unit(500))
    assert len(collection) == 1 and [h.row.key for h in collection.search(unit(1), 5)[0]] == ["a"]
    db.execute("PRAGMA max_page_count = 1000000")
    collection.upsert(rows(*(f"k{i}" for i in range(500))), unit(500))
    assert len(collection) == 501


def test_a_segment_is_synced_before_it_is_committed(collection: Collection, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order that power loss needs: every file, its folder, the rename, the parent folder; the commit last."""
    import os

    import export.bundle as bundle

    events: list[tuple[str, str]] = []
    real_fsync, real_replace = os.fsync, Path.replace

    def fsync(fd: int) -> None:
        events.append(("fsync", str(Path(f"/proc/self/fd/{fd}").readlink())))
        real_fsync(fd)

    def rename(self: Path, target: Path) -> Path:
        events.append(("rename", str(target)))
        return real_replace(self, target)

    monkeypatch.setattr(bundle.os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", rename)
    collection._records._db.set_trace_callback(lambda text: events.append(("sql", text)))
    collection.add_segment(rows("a", "b"), unit(2))
    root = str(collection.folder / "segments")
    renamed = events.index(("rename", f"{root}/0001"))
    synced = [path for kind, path in events[:renamed] if kind == "fsync"]
    for name in ("vectors.npy", "rows.arrow", "index.faiss", "segment.json"):
        assert f"{root}/.0001.tmp/{name}" in synced
    assert f"{root}/.0001.tmp" in synced and str(collection.folder) in synced  # the folder `segments` is new
    assert ("fsync", root) in events[renamed:]
    adopted = next(i for i, (kind, text) in enumerate(events) if kind == "sql" and "INSERT INTO segments" in text)
    assert adopted > events.index(("fsync", root), renamed)
    assert ("sql", "COMMIT") in events[adopted:]


def test_a_closed_collection_refuses_and_loses_nothing(collection: Collection) -> None:
    collection.upsert(rows("a"), unit(1))
    collection.close()
    for call in (
        lambda: collection.upsert(rows("b"), unit(1)),
        lambda: collection.delete(["a"]),
        lambda: collection.get("a"),
        lambda: collection.flush(),
    ):
        with pytest.raises(NotFoundError, match="closed or was deleted"):
            call()
    again = Collection(collection.folder)
    assert len(again) == 1
    again.close()


def test_thumbnails_stay_with_their_items(tmp_path: Path) -> None:
    jpegs = {name: f"jpeg of {name}".encode() for name in "abcde"}
    collection = Collection.create(tmp_path / "c", "lw1-x", DIM)
    collection.add_segment([NewRow(name, thumbnail=jpegs[name]) for name in "abc"], unit(3))
    collection.upsert([NewRow("d", thumbnail=jpegs["d"]), NewRow("without")], unit(2))

    def seen(reader: Readable) -> dict[str, bytes]:
        ids = {reader.get(key).row.id: key for key in ["a", "b", "c", "d", "e", "without"] if key in live}
        return {ids[i]: jpeg for i, jpeg in reader.thumbnails(list(ids)).items()}

    live = {"a", "b", "c", "d", "without"}
    follower = Follower(tmp_path / "c", every=None)
    assert seen(collection) == seen(follower) == {name: jpegs[name] for name in "abcd"}
    first = collection.get("a").row.id
    collection.move([("a", NewRow("e")), ("b", NewRow("b"))])
    collection.upsert([NewRow("c")], unit(1))  # another picture, of which none was sent
    collection.delete(["d"])
    collection.compact(everything=True)
    live = {"b", "c", "e", "without"}
    follower.refresh()
    assert seen(collection) == seen(follower) == {"b": jpegs["b"], "e": jpegs["a"]}
    assert collection.thumbnails([first]) == {}
    follower.close()
    collection.close()
    with pytest.raises(NotFoundError):
        collection.thumbnails([first])


def test_no_merge_makes_a_segment_of_more_rows_than_the_largest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.collection.LARGEST", 100)
    collection = Collection.create(tmp_path / "c", "lw1-x", DIM)
    for number in range(6):
        collection.add_segment([NewRow(f"{number}/{i}") for i in range(30)], unit(30, number))
    collection.maintain()
    sizes = [segment.rows for segment in collection.segments()]
    assert len(collection) == 180 and max(sizes) <= 100 and len(sizes) < 6
    collection.compact(everything=True)
    assert sorted(segment.rows for segment in collection.segments()) == [90, 90]
    numbers = [segment.number for segment in collection.segments()]
    assert collection.compact(everything=True) == 0 and not collection.merge_due
    collection.delete([f"0/{i}" for i in range(30)])
    collection.maintain()
    assert sorted(segment.rows for segment in collection.segments()) == [60, 90]
    collection.upgrade()
    assert not {segment.number for segment in collection.segments()} & set(numbers)
    assert sorted(segment.rows for segment in collection.segments()) == [60, 90]
    assert {hit.row.key[0] for hit in collection.search(unit(1), 150)[0]} == set("12345")
    collection.close()
