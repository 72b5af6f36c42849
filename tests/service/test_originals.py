"""Pictures that came as bytes are kept as they came, once, as long as an item names them; thumbnails are made of them."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from export.bundle import RefusalError
from likewise import main
from service.client import CallError, Client, NewItem
from service.collection import Collection
from service.errors import DataLossError, DiskFullError, NotFoundError
from service.originals import Originals, place_of
from service.records import NewRow
from service.snapshot import restore, take
from tests.conftest import encode, noise
from tests.service.running import Running

DIM = 8


def vectors(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def files(folder: Path) -> set[str]:
    """Names of everything in a collection's originals."""
    return {path.name for path in (folder / "originals").glob("*/*")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A collection that keeps originals, with three items: two of the same bytes, one without."""
    collection = Collection.create(tmp_path / "things", "lw1-x", DIM, keep_originals=True)
    collection.upsert([NewRow("a"), NewRow("b"), NewRow("c")], vectors(3), [b"one", b"one", None])
    collection.close()
    return tmp_path / "things"


def original(collection: Collection, key: str) -> bytes | None:
    return collection.original(collection.get(key).row.id)


def test_equal_bytes_are_kept_once_and_as_long_as_an_item_names_them(folder: Path) -> None:
    assert files(folder) == {digest(b"one")}
    collection = Collection(folder)
    assert [original(collection, key) for key in "abc"] == [b"one", b"one", None]
    state = collection.files()["a"]
    assert state.size is None and state.sha256 == digest(b"one")  # of a client, not of a file
    assert collection.sweep() == (0, 0)
    collection.upsert([NewRow("a")], vectors(1), [b"two"])
    collection.delete(["b"])
    assert files(folder) == {digest(b"one"), digest(b"two")}
    assert collection.sweep() == (1, 3)
    assert files(folder) == {digest(b"two")} and original(collection, "a") == b"two"
    collection.upsert([NewRow("a")], vectors(1))  # a vector: nothing is kept of it
    assert original(collection, "a") is None
    collection.flush()
    assert collection.sweep().files == 1
    collection.verify()
    collection.close()
    with pytest.raises(NotFoundError, match="closed"):
        collection.upsert([NewRow("a")], vectors(1), [b"three"])
    assert not files(folder)


def test_a_collection_that_keeps_none_keeps_none(tmp_path: Path) -> None:
    collection = Collection.create(tmp_path / "things", "lw1-x", DIM)
    collection.upsert([NewRow("a")], vectors(1), [b"one"])
    assert original(collection, "a") is None and not (tmp_path / "things" / "originals").exists()
    assert not collection.sweep_due
    collection.close()


def test_a_sweep_takes_nothing_that_a_write_is_about_to_name(folder: Path) -> None:
    """Four writers of bytes that come and go, and sweeps all the time: every item has its original at the end."""
    collection = Collection(folder)
    stop = threading.Event()
    failed: list[BaseException] = []

    def write(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(60):
                keys = [f"k{seed}{rng.randrange(5)}" for _ in range(3)]
                given = [b"%d" % rng.randrange(12) for _ in keys]
                if rng.random() < 0.3:
                    collection.delete(keys)
                else:
                    collection.upsert([NewRow(key) for key in keys], vectors(3), given)
        except BaseException as e:
            failed.append(e)

    def sweep() -> None:
        while not stop.is_set():
            collection.sweep()

    writers = [threading.Thread(target=write, args=(seed,)) for seed in range(4)]
    sweeper = threading.Thread(target=sweep)
    for thread in (*writers, sweeper):
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    sweeper.join()
    assert not failed
    collection.verify()
    collection.sweep()
    named = {state.sha256 for state in collection.files().values()} - {None}
    assert files(folder) == named
    collection.close()


def test_a_full_disk_refuses_the_write_and_leaves_nothing_half(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collection = Collection(folder)
    calls: list[Path] = []

    def full(path: Path) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("service.originals.sync_file", full)
    with pytest.raises(DiskFullError, match="nothing of this write was stored"):
        collection.upsert([NewRow("d"), NewRow("e")], vectors(2), [b"two", b"three"])
    monkeypatch.undo()
    assert set(collection.files()) == {"a", "b", "c"} and not [name for name in files(folder) if name.startswith(".")]
    assert collection.sweep().files == 1  # the first of them was written
    collection.upsert([NewRow("d"), NewRow("e")], vectors(2), [b"two", b"three"])
    assert original(collection, "e") == b"three"
    collection.close()


def test_a_sweep_asks_again_before_it_removes_anything(tmp_path: Path) -> None:
    """An orphan is named by a write that begins and ends after the sweep has asked for the names."""
    originals, committed = Originals(tmp_path), set[str]()
    with originals.kept([b"one", b"two"]):
        pass

    def named(prefix: str) -> list[str]:
        found = [name for name in committed if name.startswith(prefix)]
        if prefix == digest(b"one")[:2]:
            with originals.kept([b"one"]):
                committed.add(digest(b"one"))
        return found

    assert originals.sweep(named) == (1, 3)
    assert originals.read(digest(b"one")) == b"one"


_KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from service.collection import Collection
from service.records import NewRow, Records
collection = Collection(Path(sys.argv[1]))
def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)
Records.transaction = killed
collection.upsert([NewRow("late")], np.ones((1, 8), np.float32), [b"late"])
"""


def test_a_kill_between_original_and_commit_leaves_an_orphan_that_the_sweep_removes(folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _KILLED, str(folder)], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert files(folder) == {digest(b"one"), digest(b"late")}
    half = place_of(folder / "originals", digest(b"half"))
    half.parent.mkdir(exist_ok=True)
    half.with_name(f".{half.name}.1.tmp").write_bytes(b"ha")
    collection = Collection(folder)
    assert len(collection) == 3 and collection.sweep_due
    collection.verify()
    assert collection.sweep() == (2, 6)
    assert files(folder) == {digest(b"one")} and not collection.sweep_due
    collection.close()


def test_snapshots_hold_what_their_items_name_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    collection = Collection(folder)
    collection.upsert([NewRow("d")], vectors(1), [b"two"])
    collection.delete(["d"])
    manifest = take(folder, tmp_path / "s", lambda _: None)
    assert manifest.originals == 1 and files(tmp_path / "s") == {digest(b"one")}
    assert place_of(tmp_path / "s/originals", digest(b"one")).stat().st_nlink == 1
    uid = collection.uid
    collection.close()
    restore(tmp_path / "s", tmp_path / "again", lambda _: None)
    restored = Collection(tmp_path / "again")
    assert original(restored, "a") == b"one" and restored.manifest.keep_originals
    assert restored.uid != uid and restored.manifest.restored is not None
    assert restored.manifest.restored.model_dump() == {"uid": uid, "sequence": manifest.sequence}
    restored.close()
    place_of(tmp_path / "s/originals", digest(b"one")).write_bytes(b"eno")
    with pytest.raises(RefusalError, match=r"take another snapshot: .* was damaged"):
        restore(tmp_path / "s", tmp_path / "third", lambda _: None)
    place_of(tmp_path / "s/originals", digest(b"one")).unlink()
    with pytest.raises(RefusalError, match=r"take another snapshot: .* is missing"):
        restore(tmp_path / "s", tmp_path / "third", lambda _: None)
    assert not (tmp_path / "third").exists()


def test_a_snapshot_while_originals_come_and_go(folder: Path, tmp_path: Path) -> None:
    collection = Collection(folder)
    stop = threading.Event()

    def churn() -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            collection.upsert([NewRow(f"k{i}") for i in range(8)], vectors(8), [b"%d %d" % (turn, i) for i in range(8)])
            collection.sweep()

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for i in range(5):
            take(folder, tmp_path / f"s{i}", lambda _: None)
    finally:
        stop.set()
        thread.join()
        collection.close()
    for i in range(5):
        restore(tmp_path / f"s{i}", tmp_path / f"r{i}", lambda _: None)
        restored = Collection(tmp_path / f"r{i}")
        there = {original(restored, f"k{j}") for j in range(8) if f"k{j}" in restored.files()}
        assert len({(data or b"").split()[0] for data in there}) <= 1  # of one turn
        restored.close()


def test_a_damaged_original_is_found_and_named(
    folder: Path, tmp_path: Path, refused: Callable[..., str], capfd: pytest.CaptureFixture[str]
) -> None:
    collection = Collection(folder)
    collection.upsert([NewRow("d", source_uri="shop:4")], vectors(1), [b"two"])
    collection.close()
    place_of(folder / "originals", digest(b"one")).write_bytes(b"eno")
    place_of(folder / "originals", digest(b"two")).unlink()
    assert "is missing or damaged" in refused("index", "verify", folder)
    with pytest.raises(RefusalError, match="was damaged"):
        take(folder, tmp_path / "s", lambda _: None)
    collection = Collection(folder)
    with pytest.raises(DataLossError, match="another digest"):
        original(collection, "a")
    with pytest.raises(DataLossError, match="is missing"):
        original(collection, "d")
    collection.close()
    assert main(["index", "verify", str(folder), "--recover"]) == 0
    assert "the originals of 3 items were missing or damaged" in capfd.readouterr().err
    assert set((folder / "lost-originals.tsv").read_text().splitlines()) == {"a\t", "b\t", "d\tshop:4"}
    assert main(["index", "verify", str(folder)]) == 0
    collection = Collection(folder)
    assert len(collection) == 4 and original(collection, "a") is None
    collection.upsert([NewRow("a")], vectors(1), [b"one"])  # sent again
    assert original(collection, "a") == b"one"
    collection.close()


def test_damage_is_listed_before_it_is_forgotten(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place_of(folder / "originals", digest(b"one")).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Collection, "_list_lost", lambda *_: 1 / 0)  # a kill comes
        with pytest.raises(ZeroDivisionError):
            Collection(folder, recover=True)
    collection = Collection(folder, recover=True)
    assert [item.key for item in collection.damaged_originals] == ["a", "b"]
    assert (folder / "lost-originals.tsv").read_text() == "a\t\nb\t\n"
    collection.close()


def test_closing_does_not_wait_for_a_whole_sweep(folder: Path) -> None:
    originals = Originals(folder)
    with originals.kept([b"%d" % i for i in range(20)]):
        pass
    subfolders = len(list((folder / "originals").iterdir()))
    closing = threading.Thread(target=originals.close)
    asked: list[str] = []

    def named(prefix: str) -> list[str]:
        asked.append(prefix)
        if len(asked) == 1:
            closing.start()
            while not originals._closed:
                time.sleep(0.01)
        return [path.name for path in (folder / "originals").glob(f"{prefix[:2]}/*")]

    originals.sweep(named)
    closing.join()
    assert len(asked) == 1 < subfolders


def test_a_merge_holds_few_thumbnails_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Collection.create(tmp_path / "small", "lw1-x", DIM)
    for i in range(4):
        source.upsert([NewRow(f"k{i}", thumbnail=bytes(1000))], vectors(1, i))
        source.flush()
    source.close()
    monkeypatch.setattr("service.merge.GROUP_BYTES", 2000)
    added: list[int] = []
    add_table = Collection.add_table

    def counted(self: Collection, rows: pa.Table, *more: Any) -> None:
        added.append(len(rows))
        add_table(self, rows, *more)

    monkeypatch.setattr(Collection, "add_table", counted)
    assert main(["index", "merge", str(tmp_path / "small"), "--out", str(tmp_path / "whole")]) == 0
    assert added == [2, 2]
    whole = Collection(tmp_path / "whole")
    ids = [whole.get(f"k{i}").row.id for i in range(4)]
    assert whole.thumbnails(ids) == dict.fromkeys(ids, bytes(1000)) and len(whole.segments()) == 1
    whole.close()


def test_a_merge_carries_originals_over_and_compaction_removes_what_is_gone(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Collection.create(tmp_path / "plain", "lw1-x", DIM).close()
    assert main(["index", "merge", str(tmp_path / "plain"), str(folder), "--out", str(tmp_path / "whole")]) == 0
    whole = Collection(tmp_path / "whole")
    assert whole.manifest.keep_originals and [original(whole, key) for key in "abc"] == [b"one", b"one", None]
    whole.delete(["a", "b"])
    whole.close()
    capfd.readouterr()
    assert main(["index", "info", str(tmp_path / "whole")]) == 0
    assert "originals  1 pictures that came as bytes" in capfd.readouterr().out
    assert main(["index", "info", str(tmp_path / "whole"), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["keep_originals"] and found["originals"] == {"files": 1, "bytes": 3}
    assert main(["index", "compact", str(tmp_path / "whole")]) == 0
    assert "1 originals of items that are gone removed" in capfd.readouterr().err
    assert not files(tmp_path / "whole")


def test_the_uid_of_a_collection_of_before_there_were_any_is_stable(folder: Path) -> None:
    collection = Collection(folder)
    assert len(collection.uid) == 32
    old = collection.manifest.model_copy(update={"uid": ""}).sealed()
    collection.close()
    (folder / "collection.json").write_text(old.model_dump_json())
    collection = Collection(folder)
    before = collection.uid
    collection.upgrade()
    assert len(before) == 32 and collection.uid == before
    collection.close()


# --- over the API -----------------------------------------------------------------------------------------------


@pytest.fixture
def client(bundle: Path, tmp_path: Path) -> Iterator[Client]:
    server = Running(bundle=bundle, collections=tmp_path / "collections")
    with Client(server.address, timeout=20) as client:
        yield client
    server.stop()


def sides(thumbnail: bytes | None) -> tuple[int, int]:
    assert thumbnail is not None
    with Image.open(io.BytesIO(thumbnail)) as image:
        assert image.format == "JPEG"
        return image.size


def test_originals_and_thumbnails_of_a_server(client: Client, tmp_path: Path) -> None:
    info = client.create_collection("shop", keep_originals=True, thumbnail_pixels=32)
    assert info.keep_originals and info.thumbnail_pixels == 32
    assert client.collection("shop") == info and client.collections() == [info]
    turned = noise(60, 30)
    exif = turned.getexif()
    exif[0x0112] = 6  # lies on its side
    data = {"wide": encode(noise(80, 40), "PNG"), "tall": encode(turned, exif=exif)}
    vector = np.ones(64, np.float32)
    results = client.upsert(
        "shop", [*(NewItem(key, image=image) for key, image in data.items()), NewItem("v", vector=vector),
                 NewItem("bad", image=b"x")]
    )  # fmt: skip
    assert [isinstance(result, int) for result in results] == [True, True, True, False]
    item = client.get("shop", "wide", with_original=True)
    assert item.original == data["wide"] and sides(item.thumbnail) == (32, 16)
    small = encode(noise(20, 10), "PNG")
    client.upsert("shop", [NewItem("small", image=small)])
    assert sides(client.get("shop", "small").thumbnail) == (20, 10)  # never larger than the picture
    item = client.get("shop", "tall")
    assert item.original is None and sides(item.thumbnail) == (16, 32)
    assert client.get("shop", "v").thumbnail is None
    with pytest.raises(CallError, match="no original of the item 'v'") as caught:
        client.get("shop", "v", with_original=True)
    assert (caught.value.code, caught.value.reason) == ("NOT_FOUND", "ORIGINAL_NOT_FOUND")
    for options in ({}, {"group_by": "nothing"}):
        found = {n.key: n.thumbnail for n in client.search("shop", vector=vector, with_thumbnails=True, **options)}
        assert sides(found["wide"]) == (32, 16) and sides(found["tall"]) == (16, 32) and found["v"] is None
    assert all(n.thumbnail is None for n in client.search("shop", vector=vector))
    kept = tmp_path / "collections/shop/originals"
    place_of(kept, digest(data["wide"])).write_bytes(b"?")
    with pytest.raises(CallError) as caught:
        client.get("shop", "wide", with_original=True)
    assert (caught.value.code, caught.value.reason) == ("DATA_LOSS", "ORIGINAL_CHECKSUM")
    client.delete_collection("shop")
    assert not kept.exists()


def test_the_server_sweeps_now_and_then(client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client.create_collection("shop", keep_originals=True)
    folder = tmp_path / "collections" / "shop"
    pictures = [encode(noise(9, 9, seed)) for seed in range(3)]
    client.upsert("shop", [NewItem(f"k{i}", image=picture) for i, picture in enumerate(pictures)])
    client.delete("shop", ["k0"])  # less than an hour after the first sweep
    assert files(folder) == {digest(picture) for picture in pictures}
    monkeypatch.setattr("service.collection.SWEEP_SECONDS", 0)
    client.delete("shop", ["k1"])
    deadline = time.monotonic() + 10
    while len(files(folder)) > 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert files(folder) == {digest(pictures[2])}


def test_without_these_settings_nothing_is_kept(client: Client, tmp_path: Path) -> None:
    info = client.create_collection("plain")
    assert not info.keep_originals and info.thumbnail_pixels == 0
    client.upsert("plain", [NewItem("a", image=encode(noise(40, 30)))])
    assert client.get("plain", "a").thumbnail is None
    with pytest.raises(CallError, match="keeps no originals"):
        client.get("plain", "a", with_original=True)
    for wrong in (-1, 31, 1025):
        with pytest.raises(CallError, match="32 to 1024 are allowed") as caught:
            client.create_collection("wrong", thumbnail_pixels=wrong)
        assert caught.value.reason == "BAD_THUMBNAIL_PIXELS"


def test_sheets_show_thumbnails_where_the_pictures_are_not_here(client: Client, tmp_path: Path) -> None:
    client.create_collection("shop", thumbnail_pixels=64)
    red, query = Image.new("RGB", (64, 64), (250, 0, 0)), tmp_path / "query.png"
    query.write_bytes(encode(noise(40, 30), "PNG"))
    client.upsert("shop", [NewItem("red", image=encode(red, "PNG"), source_uri="file:///nowhere/red.png")])
    out = tmp_path / "sheet.png"
    assert main(["query", str(query), "--server", client.server, "--out", str(out)]) == 0
    with Image.open(out) as sheet:
        r, g, b = sheet.convert("RGB").getpixel((sheet.width - 60, 60))
    assert r > 200 and max(g, b) < 60
