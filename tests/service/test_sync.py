"""A collection follows a folder: what is new, changed, touched, moved and gone, and nothing more."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import service.build
from export.preprocess import PictureFile, find_pictures
from likewise import main
from service.changes import FileState, compare
from service.collection import Collection
from service.encoder import Encoder
from service.filter import Filter
from service.records import NewRow
from tests.conftest import encode, noise
from tests.service.test_build import command, contents
from tests.shapes import write_shapes


def sync(bundle: Path, images: Path, out: Path, *more: str) -> list[str]:
    return ["index", "sync", *command(bundle, images, out)[2:], *more]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_shapes(tmp_path / "images", 24)


@pytest.fixture
def built(bundle: Path, images: Path, tmp_path: Path) -> Path:
    out = tmp_path / "c"
    assert main(command(bundle, images, out)) == 0
    return out


def test_it_ends_as_a_new_build_would(
    bundle: Path, images: Path, built: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    collection = Collection(built)
    collection.upsert([NewRow("from a client")], np.ones((1, collection.dim), np.float32))
    collection.close()
    (images / "new.png").write_bytes(encode(noise(32, 32, 5), "PNG"))
    (images / "star" / "00003.png").write_bytes(encode(noise(32, 32, 6), "PNG"))  # other bytes
    os.utime(images / "ring" / "00005.png", ns=(1, 1))  # the same bytes
    (tmp_path / "outside.png").write_bytes(encode(noise(32, 32, 8), "PNG"))
    (images / "link.png").symlink_to(tmp_path / "outside.png")
    (images / "deep" / "er").mkdir(parents=True)
    moved = sorted(images.glob("circle/*.png"))[0]
    moved.rename(images / "deep" / "er" / "moved.png")
    gone = sorted(images.glob("cross/*.png"))[0]
    gone.unlink()

    embedded: list[str] = []
    real = Encoder.read
    monkeypatch.setattr(Encoder, "read", lambda encoder, p, *more: embedded.append(p.key) or real(encoder, p, *more))
    assert main(sync(bundle, images, built)) == 0
    said = capfd.readouterr().err
    assert "3 to embed, 1 with a new time only, 1 under a new name; 1 items have no file" in said
    assert sorted(embedded) == ["link.png", "new.png", "star/00003.png"]
    assert main(command(bundle, images, tmp_path / "fresh")) == 0
    found, expected = contents(built), contents(tmp_path / "fresh")
    assert found.pop("from a client") and found.keys() == expected.keys()
    for key, row in expected.items():
        assert np.allclose(np.frombuffer(found[key], np.float32), np.frombuffer(row, np.float32), atol=1e-6), key
    collection = Collection(built)
    item = collection.get("deep/er/moved.png")
    assert item.row.payload == '{"folder": "deep"}' and item.row.source_uri.endswith("deep/er/moved.png")
    assert item.origin.startswith("fp32/")
    collection.close()

    def no_encoder(*_: object) -> None:
        raise AssertionError("nothing is to be embedded")

    monkeypatch.setattr(service.build, "Encoder", no_encoder)
    before = contents(built)
    capfd.readouterr()
    assert main(sync(bundle, images, built)) == 0
    assert "25 pictures: 25 as they were, 0 to embed, 0 with a new time only, 0 under" in capfd.readouterr().err
    assert contents(built) == before


def test_many_deletions_need_a_word(
    bundle: Path, images: Path, built: Path, refused: Callable[..., str], capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(images / "star")
    count = len(find_pictures(images))
    before = contents(built)
    sentence = refused(*sync(bundle, images, built))
    assert f"{24 - count} items have no file" in sentence and "--max-delete 0.1 allows; nothing was done" in sentence
    assert contents(built) == before
    assert main(sync(bundle, images, built, "--max-delete", "1", "--dry-run")) == 0
    said = capfd.readouterr().err
    assert "would delete star/" in said and "nothing was done" in said
    assert contents(built) == before
    assert main(sync(bundle, images, built, "--max-delete", "1")) == 0
    assert contents(built).keys() == {p.key for p in find_pictures(images)}


def test_a_dry_run_makes_no_collection(bundle: Path, images: Path, tmp_path: Path) -> None:
    assert main(sync(bundle, images, tmp_path / "none", "--dry-run")) == 0
    assert not (tmp_path / "none").exists()


def picture(folder: Path, key: str, data: bytes, mtime_ns: int = 5) -> PictureFile:
    path = folder / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return PictureFile(key, path, len(data), mtime_ns)


def state(folder: Path, key: str, data: bytes, mtime_ns: int = 5) -> FileState:
    return FileState(len(data), mtime_ns, hashlib.sha256(data).hexdigest(), (folder / key).as_uri())


def states(folder: Path, **data: bytes) -> dict[str, FileState]:
    return {key.replace("__", "/"): state(folder, key.replace("__", "/"), value) for key, value in data.items()}


CLIENT = FileState(None, None, None)


def test_nothing_below_what_cannot_be_read_is_gone(tmp_path: Path) -> None:
    before = {**states(tmp_path, a__x=b"1", b__x=b"22", bb__x=b"333", alone=b"5"), "by a client": CLIENT}
    found = [picture(tmp_path, "c/x", b"4444")]
    assert compare(before, found, tmp_path, ["b", "alone"]).gone == ["a/x", "bb/x"]


def test_of_equal_bytes_each_is_moved_once(tmp_path: Path) -> None:
    before = states(tmp_path, old__1=b"same", old__2=b"same", old__3=b"else")
    found = [picture(tmp_path, f"new/{i}", b"same") for i in (1, 2, 3)] + [picture(tmp_path, "new/4", b"size")]
    changes = compare(before, found, tmp_path)
    assert [(old, p.key) for old, p in changes.moved] == [("old/1", "new/1"), ("old/2", "new/2")]
    assert [p.key for p in changes.embed] == ["new/3", "new/4"] and changes.gone == ["old/3"]


def test_a_name_that_is_too_long_is_left_to_embedding(tmp_path: Path) -> None:
    key = "/".join(["d" * 200] * 3)
    changes = compare(states(tmp_path, old=b"same"), [picture(tmp_path, key, b"same")], tmp_path)
    assert not changes.moved and [p.key for p in changes.embed] == [key] and changes.gone == ["old"]


def test_what_lay_elsewhere_stays_and_is_not_replaced_unseen(tmp_path: Path) -> None:
    before = states(tmp_path / "other", only_there=b"1", both=b"2", same=b"3")
    here = tmp_path / "here"
    found = [picture(here, "both", b"4"), picture(here, "same", b"3")]
    changes = compare(before, found, here)
    assert changes.gone == [] and changes.replaced == ["both"] and [p.key for p in changes.embed] == ["both"]
    assert [(old, p.key) for old, p in changes.moved] == [("same", "same")]  # it lies here now


def test_what_a_client_wrote_is_left_alone(tmp_path: Path) -> None:
    changes = compare({"a": CLIENT}, [picture(tmp_path, "a", b"1")], tmp_path)
    assert changes.owned == ["a"] and not changes.embed


def test_items_of_before_digests_were_kept_are_embedded_again(tmp_path: Path) -> None:
    before = {key: FileState(4, 1, None, (tmp_path / key).as_uri()) for key in "ab"}
    changes = compare(before, [picture(tmp_path, "a", b"same"), picture(tmp_path, "c", b"same")], tmp_path)
    assert [p.key for p in changes.embed] == ["a", "c"] and changes.gone == ["b"]
    assert compare(before, [picture(tmp_path, "a", b"same", 1)], tmp_path).embed == []


def test_a_file_that_is_no_picture_any_more_loses_its_item(
    bundle: Path, images: Path, built: Path, refused: Callable[..., str], capfd: pytest.CaptureFixture[str]
) -> None:
    (images / "star" / "00003.png").write_bytes(b"no picture")
    assert main(sync(bundle, images, built)) == 0
    assert "star/00003.png" not in contents(built) and len(contents(built)) == 23
    assert "0 written now, 1 skipped, 1 deleted" in capfd.readouterr().err
    for path in sorted(images.glob("ring/*.png")):
        path.write_bytes(b"nor these")
    assert main(sync(bundle, images, built, "--max-delete", "0.05")) == 0
    assert "stay: see --max-delete" in capfd.readouterr().err and len(contents(built)) == 23


def test_a_folder_that_was_emptied_and_one_that_was_renamed(
    bundle: Path, images: Path, built: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    before = contents(built)
    renamed = images.rename(tmp_path / "renamed")
    assert "is not a folder" in refused(*sync(bundle, images, built))
    assert main(sync(bundle, renamed, built)) == 0
    assert contents(built) == before
    collection = Collection(built)
    assert all(state.uri.startswith(renamed.as_uri()) for state in collection.files().values())
    collection.close()
    for path in renamed.rglob("*.png"):
        path.unlink()
    assert "24 items have no file" in refused(*sync(bundle, renamed, built))
    assert main(sync(bundle, renamed, built, "--max-delete", "1")) == 0
    assert contents(built) == {}


def test_a_move_is_one_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collection = Collection.create(tmp_path / "c", "lw1-x", 8)
    vectors = np.eye(8, dtype=np.float32)[:3]
    collection.add_segment([NewRow(key, origin="fp32/x") for key in "abc"], vectors)
    monkeypatch.setattr("service.records.Records.insert", lambda *_: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        collection.move([("a", NewRow("A")), ("b", NewRow("B"))])
    monkeypatch.undo()
    assert set(collection.files()) == set("abc")
    collection.move([("a", NewRow("A")), ("b", NewRow("B")), ("c", NewRow("c", '{"new": 1}'))])
    for _ in range(2):
        assert set(collection.files()) == set("ABc") and collection.get("B").origin == "fp32/x"
        assert np.array_equal(collection.get("A").vector, vectors[0]) and len(collection) == 3
        assert [h.row.key for h in collection.search(vectors[2:], 1)[0]] == ["c"]
        collection.close()
        collection = Collection(tmp_path / "c")
    collection.close()


def test_a_collection_of_before_digests_opens(tmp_path: Path) -> None:
    import sqlite3

    folder = tmp_path / "old"
    collection = Collection.create(folder, "lw1-x", 8)
    collection.upsert([NewRow("k", file_size=1, file_mtime_ns=2)], np.ones((1, 8), np.float32))
    collection.close()
    with sqlite3.connect(folder / "records.sqlite") as db:
        db.execute("DROP INDEX IF EXISTS items_originals")
        db.execute("ALTER TABLE items DROP COLUMN file_sha256")
    db.close()
    collection = Collection(folder)
    assert collection.files() == {"k": FileState(1, 2, None, "")}
    collection.upsert([NewRow("k", file_sha256="f")], np.ones((1, 8), np.float32))
    assert collection.files()["k"].sha256 == "f"
    collection.close()


def test_info_and_compact(bundle: Path, images: Path, built: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (images / "new.png").write_bytes(encode(noise(32, 32, 5), "PNG"))
    (images / "star" / "00003.png").write_bytes(encode(noise(32, 32, 6), "PNG"))
    assert main(sync(bundle, images, built)) == 0
    before = contents(built)
    capfd.readouterr()
    assert main(["index", "info", str(built)]) == 0
    said = capfd.readouterr().out
    assert "25 items of 64 dimensions" in said and "made by fp32/" in said and said.count("Flat") == 2
    assert main(["index", "compact", str(built)]) == 0
    assert "2 segments merged: 25 items" in capfd.readouterr().err
    assert main(["index", "info", str(built), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert [(s["rows"], s["dead"]) for s in found["segments"]] == [(25, 0)] and found["items"] == 25
    assert contents(built) == before
    assert main(["index", "compact", str(built)]) == 0
    assert "nothing to merge" in capfd.readouterr().err


def test_what_is_known_of_pictures_becomes_their_payload(
    bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], refused: Callable[..., str]
) -> None:
    images = write_shapes(tmp_path / "images", 16)
    keys = sorted(str(p.relative_to(images)) for p in images.rglob("*.png"))
    table = tmp_path / "known.csv"

    def follow(verb: str, *more: object) -> None:
        flags = ["--bundle", bundle, "--images", images, "--out", tmp_path / "c", "--threads", 1, *more]
        assert main(["index", verb, *(str(f) for f in flags)]) == 0

    def filtered(text: str) -> set[str]:
        collection = Collection(tmp_path / "c")
        (hits,) = collection.search(np.ones((1, 64), np.float32), 99, filters=Filter.parse(text))
        collection.close()
        return {hit.row.key for hit in hits}

    lines = [f"{key},{i},{'red' if i % 2 else ''},2024-01-{i + 1:02d}" for i, key in enumerate(keys[:10])]
    table.write_text("\n".join(["key,price,colour,day", *lines, "other/picture.png,1,red,2024-01-01"]))
    follow("build", "--payload", table)
    assert filtered("price >= 4 AND colour = red") == {keys[i] for i in (5, 7, 9)}
    assert filtered('day < "2024-01-03" AND folder:*') == set(keys[:2]) and filtered("NOT price:*") == set(keys[10:])
    table.write_text("\n".join(["key,price", *(f"{key},{100 + i}" for i, key in enumerate(keys))]))
    capfd.readouterr()
    follow("sync", "--payload", table)
    assert "16 items that were there have another payload now" in capfd.readouterr().err
    assert filtered("price >= 110") == set(keys[10:]) and filtered("colour:*") == set()
    follow("sync", "--payload", table)
    assert "0 items that were there" in capfd.readouterr().err
    (images / keys[11]).write_bytes(encode(noise(40, 30, 5), "PNG"))
    (images / keys[12]).rename(images / "moved.png")
    follow("sync")  # without a table payloads stay, also of changed and moved files
    assert filtered("price >= 110") == {*keys[10:12], *keys[13:], "moved.png"}
    assert filtered('folder = ""') == {"moved.png"}
    for name, text, sentence in (
        ("a.csv", "name,price\nx,1", "names no column 'key'"),
        ("b.csv", f"key,price\n{keys[0]},1\n{keys[0]},2", "once more"),
        ("c.csv", "key,price\nelsewhere.png,1", "has no row for any picture"),
        ("d.jsonl", "{", "line 1 is not JSON"),
        ("e.txt", "key", "no table that is known here"),
        ("f.parquet", "key", "no Parquet file that can be read"),
    ):
        (tmp_path / name).write_text(text)
        flags = ["--bundle", bundle, "--images", images, "--out", tmp_path / "c", "--payload", tmp_path / name]
        assert sentence in refused("index", "build", *flags)
