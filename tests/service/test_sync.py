"""A collection follows a folder: what is new, changed, touched, moved and gone, and nothing more."""

from __future__ import annotations

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
    (images / "deep" / "er").mkdir(parents=True)
    moved = sorted(images.glob("circle/*.png"))[0]
    moved.rename(images / "deep" / "er" / "moved.png")
    gone = sorted(images.glob("cross/*.png"))[0]
    gone.unlink()

    embedded: list[str] = []
    real = service.build._read
    monkeypatch.setattr(service.build, "_read", lambda encoder, p: embedded.append(p.key) or real(encoder, p))
    assert main(sync(bundle, images, built)) == 0
    said = capfd.readouterr().err
    assert "2 to embed, 1 with a new time only, 1 under a new name; 1 items have no file" in said
    assert sorted(embedded) == ["new.png", "star/00003.png"]
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
    assert "24 pictures: 24 as they were, 0 to embed, 0 with a new time only, 0 under" in capfd.readouterr().err
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


def state(data: bytes, mtime_ns: int = 5) -> FileState:
    import hashlib

    return FileState(len(data), mtime_ns, hashlib.sha256(data).hexdigest())


def test_nothing_below_a_folder_that_cannot_be_listed_is_gone(tmp_path: Path) -> None:
    before = {
        "a/x": state(b"1"),
        "b/x": state(b"22"),
        "bb/x": state(b"333"),
        "by a client": FileState(None, None, None),
    }
    found = [picture(tmp_path, "c/x", b"4444")]
    assert compare(before, found, ["b"]).gone == ["a/x", "bb/x"]


def test_of_equal_bytes_each_is_moved_once(tmp_path: Path) -> None:
    before = {"old/1": state(b"same"), "old/2": state(b"same"), "old/3": state(b"else")}
    found = [picture(tmp_path, f"new/{i}", b"same") for i in (1, 2, 3)] + [picture(tmp_path, "new/4", b"size")]
    changes = compare(before, found, [])
    assert [(old, p.key) for old, p in changes.moved] == [("old/1", "new/1"), ("old/2", "new/2")]
    assert [p.key for p in changes.embed] == ["new/3", "new/4"] and changes.gone == ["old/3"]


def test_items_of_before_digests_were_kept_are_embedded_again(tmp_path: Path) -> None:
    before = {"a": FileState(4, 1, None), "b": FileState(4, 1, None)}
    changes = compare(before, [picture(tmp_path, "a", b"same"), picture(tmp_path, "c", b"same")], [])
    assert [p.key for p in changes.embed] == ["a", "c"] and changes.gone == ["b"]
    assert compare(before, [picture(tmp_path, "a", b"same", 1)], []).embed == []


def test_a_collection_of_before_digests_opens(tmp_path: Path) -> None:
    import sqlite3

    folder = tmp_path / "old"
    collection = Collection.create(folder, "lw1-x", 8)
    collection.upsert([NewRow("k", file_size=1, file_mtime_ns=2)], np.ones((1, 8), np.float32))
    collection.close()
    with sqlite3.connect(folder / "records.sqlite") as db:
        db.execute("ALTER TABLE items DROP COLUMN file_sha256")
    db.close()
    collection = Collection(folder)
    assert collection.files() == {"k": FileState(1, 2, None)}
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
