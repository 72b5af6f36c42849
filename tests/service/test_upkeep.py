"""Snapshots, verification, recovery, and embeddings from and for elsewhere."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from export.bundle import RefusalError
from likewise import main
from service.collection import Collection
from service.config import bytes_in
from service.filter import Filter
from service.records import NewRow
from service.snapshot import restore, take

DIM = 8


def vectors(count: int, seed: int = 0) -> np.ndarray:
    """Unit vectors [count, 8]."""
    rows = np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A collection of two segments and fresh rows: k00…k29, of which k03 and k23 are deleted."""
    collection = Collection.create(tmp_path / "things", "lw1-x", DIM)
    rows = [NewRow(f"k{i:02d}", json.dumps({"i": i}), f"file:///{i}") for i in range(30)]
    collection.add_segment(rows[:10], vectors(30)[:10])
    collection.add_segment(rows[10:20], vectors(30)[10:20])
    collection.upsert(rows[20:], vectors(30)[20:])
    collection.delete(["k03", "k23"])
    collection.close()
    return tmp_path / "things"


def contents(folder: Path) -> dict[str, tuple[str, bytes]]:
    """Key → payload and vector."""
    collection = Collection(folder)
    found = {
        row["key"]: (row["payload"], vector.tobytes())
        for rows, block in collection.scan()
        for row, vector in zip(rows.to_pylist(), block, strict=True)
    }
    assert len(found) == len(collection)
    collection.close()
    return found


def flip(path: Path, at: int = -5) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_snapshot_is_restored(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["index", "snapshot", str(folder), "--out", str(tmp_path / "s")]) == 0
    assert main(["index", "restore", str(tmp_path / "s"), "--out", str(tmp_path / "again")]) == 0
    assert "28 items" in capsys.readouterr().err
    assert contents(tmp_path / "again") == contents(folder) and len(contents(folder)) == 28
    for command in ("snapshot", "restore"):  # neither writes over anything
        source = folder if command == "snapshot" else tmp_path / "s"
        assert main(["index", command, str(source), "--out", str(folder)]) == 1
        assert "exists already" in capsys.readouterr().err


def test_a_snapshot_under_writes_is_the_collection_at_its_sequence_number(tmp_path: Path) -> None:
    """A writer upserts, deletes, flushes and merges; each snapshot agrees with a model of the writes up to its number."""
    collection = Collection.create(tmp_path / "busy", "lw1-x", DIM)
    log: list[tuple[int, str, bytes | None]] = []  # sequence number, key, vector (None: deleted)
    stop = threading.Event()

    def write() -> None:
        rng = np.random.default_rng(3)
        turn = 0
        while not stop.is_set():
            turn += 1
            keys = [f"k{i}" for i in sorted(set(rng.integers(0, 60, 4).tolist()))]
            matrix = vectors(len(keys), turn)
            sequences = collection.upsert([NewRow(key) for key in keys], matrix)
            log.extend((s, key, row.tobytes()) for s, key, row in zip(sequences, keys, matrix, strict=True))
            if turn % 3 == 0:
                before = collection.sequence
                missing = collection.delete([f"k{turn % 60}"])
                if not missing:
                    log.append((before + 1, f"k{turn % 60}", None))
            if turn % 5 == 0:
                collection.flush()
            if turn % 11 == 0:
                collection.compact()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        taken = []
        for number in range(6):
            while not log or log[-1][0] < (taken[-1].sequence + 20 if taken else 20):
                assert writer.is_alive()
            taken.append(take(tmp_path / "busy", tmp_path / f"s{number}", lambda _: None))
    finally:
        stop.set()
        writer.join()
        collection.close()
    assert sorted({m.sequence for m in taken}) == [m.sequence for m in taken]
    for number, manifest in enumerate(taken):
        restore(tmp_path / f"s{number}", tmp_path / f"r{number}", lambda _: None)
        model: dict[str, bytes] = {}
        for sequence, key, row in log:
            if sequence <= manifest.sequence:
                model.update({key: row}) if row is not None else model.pop(key, None)
        assert {key: row for key, (_, row) in contents(tmp_path / f"r{number}").items()} == model
        assert manifest.items == len(model)


@pytest.mark.parametrize("name", ["records.sqlite", "collection.json", "segments/0001/vectors.npy", "snapshot.json"])
def test_a_damaged_snapshot_is_refused_and_leaves_nothing(folder: Path, tmp_path: Path, name: str) -> None:
    take(folder, tmp_path / "s", lambda _: None)
    flip(tmp_path / "s" / name)
    with pytest.raises(RefusalError, match=r"checksum|cannot be read|damaged|bytes"):
        restore(tmp_path / "s", tmp_path / "again", lambda _: None)
    assert not list(tmp_path.glob("*again*"))
    (tmp_path / "s" / name).unlink()
    with pytest.raises(RefusalError, match=r"is missing|is not a snapshot"):
        restore(tmp_path / "s", tmp_path / "again", lambda _: None)


def test_what_can_be_loaded_is_kept_and_what_cannot_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(folder)
    flip(folder / "segments" / "0002" / "vectors.npy")
    assert main(["index", "verify", str(folder)]) == 1
    assert "the file was damaged" in capsys.readouterr().err
    assert main(["index", "verify", str(folder), "--recover"]) == 0
    assert "10 items were given up" in capsys.readouterr().err
    lost = [line.split("\t")[0] for line in (folder / "lost.tsv").read_text().splitlines()]
    assert lost == [f"k{i}" for i in range(10, 20)]
    assert contents(folder) == {key: value for key, value in before.items() if key not in lost}
    assert (folder / "damaged" / "0002" / "vectors.npy").is_file()
    shutil.rmtree(folder / "segments" / "0001")
    assert main(["index", "verify", str(folder), "--recover"]) == 0
    assert contents(folder) == {k: v for k, v in before.items() if k >= "k20"}
    collection = Collection(folder)  # what was lost can be written again
    collection.upsert([NewRow("k10")], vectors(1))
    assert collection.get("k10").row.key == "k10" and len(collection) == 10
    collection.close()
    assert main(["index", "verify", str(folder)]) == 0


def test_large_files_are_read_in_part_on_opening_and_whole_by_verify(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import service.checksums as module

    monkeypatch.setattr(module, "CHUNK", 64)  # vectors.npy has several chunks
    collection = Collection.create(tmp_path / "large", "lw1-x", DIM)
    collection.add_segment([NewRow(f"k{i}") for i in range(200)], vectors(200))
    collection.close()
    flip(tmp_path / "large" / "segments" / "0001" / "vectors.npy", at=3000)
    refusals = 0
    for _ in range(40):
        try:
            Collection(tmp_path / "large").close()
        except RefusalError:
            refusals += 1
    assert refusals < 40  # four of a hundred chunks are read
    with pytest.raises(RefusalError, match="at byte 2,944"):
        collection = Collection(tmp_path / "large")
        try:
            collection.verify()
        finally:
            collection.close()


def test_what_is_exported_can_be_added(folder: Path, tmp_path: Path) -> None:
    assert main(["index", "export", str(folder), "--out", str(tmp_path / "e")]) == 0
    about = json.loads((tmp_path / "e" / "export.json").read_text())
    assert (about["space_id"], about["items"], about["dim"]) == ("lw1-x", 28, DIM)
    files = ["--vectors", str(tmp_path / "e/vectors.npy"), "--rows", str(tmp_path / "e/rows.parquet")]
    assert main(["index", "add", str(tmp_path / "copy"), *files, "--space-id", "lw1-x"]) == 0
    assert contents(tmp_path / "copy") == contents(folder)
    assert main(["index", "add", str(tmp_path / "copy"), *files]) == 0  # again: nothing comes twice
    assert contents(tmp_path / "copy") == contents(folder)


def test_columns_become_payloads_and_folders_are_taken_in_order(tmp_path: Path) -> None:
    matrix = (3 * vectors(300)).astype(np.float16)  # any length
    for i, (low, high) in enumerate([(0, 100), (100, 220), (220, 300)]):
        n = [0, 2, 10][i]  # numbers in their order, not as text
        for name in ("v", "r"):
            (tmp_path / name).mkdir(exist_ok=True)
        np.save(tmp_path / "v" / f"img_emb_{n}.npy", matrix[low:high])
        rows = {
            "key": [f"k{j:03d}" for j in range(low, high)],
            "price": [float(j) if j % 2 else None for j in range(low, high)],
            "day": pa.array(list(range(low, high)), pa.date32()),
            "payload": [json.dumps({"shop": f"s{j % 3}"}) for j in range(low, high)],
        }
        pq.write_table(pa.table(rows), tmp_path / "r" / f"metadata_{n}.parquet")
    arguments = [
        "--vectors",
        str(tmp_path / "v"),
        "--rows",
        str(tmp_path / "r"),
        "--space-id",
        "s",
        "--stored",
        "float16",
    ]
    assert main(["index", "add", str(tmp_path / "c"), *arguments]) == 0
    collection = Collection(tmp_path / "c")
    assert len(collection) == 300 and collection.manifest.policy.vectors == "float16"
    item = collection.get("k101")
    assert json.loads(item.row.payload) == {"shop": "s2", "price": 101.0, "day": "1970-04-12"}
    assert np.allclose(item.vector, vectors(300)[101], atol=2e-3)
    (hits,) = collection.search(
        vectors(1), 300, filters=Filter.parse('price > 250 AND shop = s1 AND day < "1970-10-20"')
    )
    assert {h.row.key for h in hits} == {f"k{j}" for j in range(251, 292, 2) if j % 3 == 1}
    collection.close()


def test_embeddings_that_cannot_be_added_are_refused_and_change_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, rows = tmp_path / "good.npy", tmp_path / "rows.parquet"
    np.save(good, vectors(4))
    pq.write_table(pa.table({"key": list("abcd")}), rows)

    def refused(sentence: str, vectors: Path = good, rows: Path = rows, *more: str) -> None:
        arguments = ["index", "add", str(tmp_path / "c"), "--vectors", str(vectors), "--rows", str(rows), *more]
        assert main(arguments) == 1
        assert sentence in capsys.readouterr().err

    refused("is not a collection yet")
    name = ("--space-id", "s")
    refused("does not exist", tmp_path / "none.npy", rows, *name)
    np.save(tmp_path / "int.npy", np.ones((4, 8), np.int64))
    refused("expected floats of shape [N, D]", tmp_path / "int.npy", rows, *name)
    np.save(tmp_path / "object.npy", np.array([{}], object), allow_pickle=True)
    refused("cannot be read as .npy", tmp_path / "object.npy", rows, *name)
    np.save(tmp_path / "three.npy", vectors(3))
    refused("4 rows: give one row per vector", tmp_path / "three.npy", rows, *name)
    (tmp_path / "text.parquet").write_text("key")
    refused("cannot be read as Parquet", good, tmp_path / "text.parquet", *name)
    for columns, sentence in (
        ({"name": list("abcd")}, "expected one called key"),
        ({"key": [1, 2, 3, 4]}, "expected strings"),
        ({"key": ["a", "b", "c", None]}, "1 rows without a key"),
        ({"key": list("abca")}, "comes more than once"),
        ({"key": list("abcd"), "payload": ["{}", "{}", "[]", "{}"]}, "no JSON object"),
        ({"key": list("abcd"), "x": [float("inf"), 1, 2, 3]}, "no JSON object"),
        ({"key": ["a", "b", "c", "d" * 600]}, "1 to 512 are allowed"),
    ):
        pq.write_table(pa.table(columns), tmp_path / "bad.parquet")
        refused(sentence, good, tmp_path / "bad.parquet", *name)
    zero = vectors(4)
    zero[2] = 0
    np.save(tmp_path / "zero.npy", zero)
    refused("zero or holds values that are not finite", tmp_path / "zero.npy", rows, *name)
    assert contents(tmp_path / "c") == {}
    assert main(["index", "add", str(tmp_path / "c"), "--vectors", str(good), "--rows", str(rows)]) == 0
    refused("lw1-other", good, rows, "--space-id", "lw1-other")
    refused("keeps to other constraints", good, rows, "--index", "HNSW16")
    np.save(tmp_path / "wide.npy", np.ones((4, 9), np.float32))
    refused("9 dimensions", tmp_path / "wide.npy", rows)
    assert len(contents(tmp_path / "c")) == 4


def test_sizes_are_read() -> None:
    for text, expected in (("800M", 800 * 2**20), ("4G", 2**32), ("1.5GiB", 3 * 2**29), ("512", 512), ("2kb", 2048)):
        assert bytes_in(text) == expected
    for text in ("", "0", "0.5", "four", "4X", "-1G"):
        with pytest.raises(ValueError, match="is no size"):
            bytes_in(text)


@pytest.mark.parametrize("damage", ["emptied", "without its log", "snapshot of none"])
def test_records_that_are_older_than_the_segments_are_refused_and_nothing_is_removed(
    folder: Path, tmp_path: Path, damage: str
) -> None:
    if damage == "emptied":
        (folder / "records.sqlite").write_bytes(b"")
    elif damage == "without its log":
        older = (folder / "records.sqlite").read_bytes()
        collection = Collection(folder)
        collection.flush()
        collection.close()
        (folder / "records.sqlite").write_bytes(older)
    else:
        (folder / "records.sqlite").unlink()
        with pytest.raises(RefusalError, match="cannot be copied"):
            take(folder, tmp_path / "s", lambda _: None)
        assert not (folder / "records.sqlite").exists()
    before = sorted(path.name for path in (folder / "segments").iterdir())
    for recover in (False, True):
        with pytest.raises(RefusalError, match=r"holds no records|is newer than|records\.sqlite is missing"):
            Collection(folder, recover=recover)
    assert sorted(path.name for path in (folder / "segments").iterdir()) == before


def test_a_snapshot_of_damaged_segments_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(folder / "segments" / "0001" / "vectors.npy")
    with pytest.raises(RefusalError, match="the file was damaged"):
        take(folder, tmp_path / "s", lambda _: None)
    assert not list(tmp_path.glob("*s")) or not (tmp_path / "s").exists()


def test_a_snapshot_that_names_files_elsewhere_is_refused(folder: Path, tmp_path: Path) -> None:
    manifest = take(folder, tmp_path / "s", lambda _: None)
    files = {"../escaped": next(iter(manifest.files.values())), **manifest.files}
    forged = manifest.model_copy(update={"files": files}).sealed()
    (tmp_path / "s" / "snapshot.json").write_text(forged.model_dump_json())
    with pytest.raises(RefusalError, match="names a file outside"):
        restore(tmp_path / "s", tmp_path / "again", lambda _: None)


def test_records_without_a_manifest_are_not_taken_over(folder: Path) -> None:
    shutil.rmtree(folder / "segments")
    (folder / "collection.json").unlink()
    with pytest.raises(RefusalError, match="records and no collection"):
        Collection.create(folder, "lw1-other", DIM)


def test_constraints_of_another_kind_are_refused_not_ignored(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder, tmp_path / "two")
    assert main(["index", "merge", str(tmp_path / "two"), "--out", str(folder), "--stored", "float16"]) == 1
    assert "keeps to other constraints" in capsys.readouterr().err
    for wrong in (["--max-memory", "0.5"], ["--max-latency", "inf"], ["--index", "IVFF1024"]):
        assert main(["index", "compact", str(folder), *wrong]) != 0
    assert len(contents(folder)) == 28


@pytest.mark.parametrize("name", ["index.faiss", "payload.arrow"])
def test_what_follows_from_vectors_and_rows_is_made_anew(
    folder: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(folder)
    for number in ("0001", "0002"):
        flip(folder / "segments" / number / name)
    assert main(["index", "verify", str(folder), "--recover"]) == 0
    assert "of 0001, 0002 were damaged, and made anew" in capsys.readouterr().err
    assert contents(folder) == before and not (folder / "lost.tsv").exists()
    collection = Collection(folder)
    assert [(s.rows, s.dead) for s in collection.segments()] == [(9, 0), (10, 0)]
    (hits,) = collection.search(vectors(1), 5, filters=Filter.parse("i >= 10 AND i < 12"))
    assert {h.row.key for h in hits} == {"k10", "k11"}
    collection.close()
