"""Building from globs, lists, tar shards and URLs; groups of shards; thumbnails."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from rich.console import Console

import service.build
import service.embedding
from export.bundle import Bundle
from export.preprocess import DEFAULT_LIMITS, DecodeLimits, find_pictures
from export.sources.picture import picture_at
from likewise import main
from service.collection import Collection
from service.config import Embedding, IndexBuild
from service.embedding import AHEAD, Embedder, Shard, _Fetched, _Line
from service.encoder import Encoder
from service.filter import Filter
from tests.conftest import encode, noise
from tests.export.test_sources import add
from tests.service.test_build import command, contents
from tests.shapes import write_shapes


def build(bundle: Path, specs: Sequence[object], out: Path, *more: object) -> int:
    named = [flag for spec in specs for flag in ("--images", str(spec))]
    return main(
        ["index", "build", "--bundle", str(bundle), *named, "--out", str(out), "--threads", "1", *map(str, more)]
    )


@contextmanager
def opened(folder: Path) -> Iterator[Collection]:
    with closing(Collection(folder)) as collection:
        yield collection


def payloads(folder: Path) -> dict[str, dict[str, Any]]:
    with opened(folder) as collection:
        return {key: json.loads(collection.get(key).row.payload) for key in collection.files()}


def thumbnails(folder: Path) -> dict[str, Image.Image]:
    with opened(folder) as collection:
        ids = {collection.get(key).row.id: key for key in collection.files()}
        found = collection.thumbnails(list(ids))
        assert all(jpeg[:3] == b"\xff\xd8\xff" for jpeg in found.values())
        return {ids[i]: Image.open(io.BytesIO(jpeg)) for i, jpeg in found.items()}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_shapes(tmp_path / "images", 24)


@pytest.fixture
def shards(images: Path, tmp_path: Path) -> list[Path]:
    """The same pictures in two tars, the first three with labels."""
    paths = [tmp_path / "tars" / f"shard-{i:04d}.tar" for i in range(2)]
    paths[0].parent.mkdir()
    pictures = find_pictures(images)
    for path, part in zip(paths, (pictures[:12], pictures[12:]), strict=True):
        with tarfile.open(path, "w") as archive:
            for i, picture in enumerate(part):
                add(archive, picture.key, picture.read())
                if i < 3:
                    add(archive, f"{picture.key.rpartition('.')[0]}.cls", b"marked\n")
    return paths


def test_every_source_gives_the_same_vectors(
    bundle: Path, images: Path, shards: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert build(bundle, [images], tmp_path / "folder") == 0
    keys = [picture.key for picture in find_pictures(images)]
    (images / "list.tsv").write_text("path\n" + "\n".join(keys))
    sources = {
        "glob": ([f"{images}/*/*.png"], ""),
        "list": ([images / "list.tsv"], ""),
        "shards": ([shards[0].parent / "shard-{0000..0001}.tar"], "shard-000{}/"),
        "url": ([images.as_uri()], ""),
    }
    expected = contents(tmp_path / "folder")
    for name, (specs, prefix) in sources.items():
        for said in ("24 to embed", "24 as they were, 0 to embed"):
            capfd.readouterr()
            assert build(bundle, specs, tmp_path / name) == 0
            assert said in capfd.readouterr().err
        found = contents(tmp_path / name)
        assert found == {(prefix.format(i // 12) + key): expected[key] for i, key in enumerate(keys)}, name
        with opened(tmp_path / name) as collection:
            for key, state in collection.files().items():  # each is found again by its URI
                assert state.size == len(picture_at(state.uri, key).read())
    assert (tmp_path / "shards" / "sources").is_dir()  # what the tars hold is known until they change


def test_several_sources_are_given_one_by_one_or_with_commas(
    bundle: Path, images: Path, shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = images.rename(tmp_path / "a,b,c")
    assert build(bundle, [f"{odd}/star", shards[0], f"{odd}/ring/*.png"], tmp_path / "one") == 0
    assert build(bundle, [f"{odd}/star,{shards[0]},{odd}/ring"], tmp_path / "two") == 0
    keys = contents(tmp_path / "one").keys()
    assert (
        len(keys) == 12 + len([*odd.glob("star/*"), *odd.glob("ring/*")]) and contents(tmp_path / "two").keys() == keys
    )
    assert any(key.startswith("star/") for key in keys) and any(key.startswith("shard-0000/") for key in keys)
    for given, expected in (
        (odd, [str(odd)]), (f"{odd},x", [str(odd), "x"]), ("x,y", ["x", "y"]), (["x,y"], ["x,y"]), ("x,", ["x"]),
        (f"{odd}/*/*.png,x", [f"{odd}/*/*.png", "x"]), (f"{odd}/*.a,{odd}/*.b", [f"{odd}/*.a", f"{odd}/*.b"]),
        ("[ab]*.jpg", ["[ab]*.jpg"]), ("s-{0..2}.tar", ["s-{0..2}.tar"]),
    ):  # fmt: skip
        assert IndexBuild(bundle=bundle, images=given, out=tmp_path / "c").images == expected  # type: ignore[arg-type]
    (tmp_path / "c.yaml").write_text(json.dumps({"images": ["x,y"], "out": str(tmp_path / "c"), "bundle": str(bundle)}))
    monkeypatch.setenv("LIKEWISE_CONFIG_FILE", str(tmp_path / "c.yaml"))
    assert main(["index", "build"]) == 1  # and not two sources


def test_columns_of_a_list_become_fields_and_follow_it(
    bundle: Path, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    keys = [picture.key for picture in find_pictures(images)]
    listed = images / "list.csv"

    def write(price: int) -> None:
        rows = [f"{key},{i % 2 or ''},{price + i},2024-01-{i + 1:02d}" for i, key in enumerate(keys)]
        listed.write_text("\n".join(["path,label,price,day", *rows]))

    write(100)
    assert build(bundle, [listed], tmp_path / "c") == 0
    first = payloads(tmp_path / "c")
    assert first[keys[1]] == {"folder": keys[1].split("/")[0], "label": "1", "price": 101, "day": "2024-01-02"}
    assert "label" not in first[keys[2]]
    with opened(tmp_path / "c") as collection:
        (hits,) = collection.search(
            np.ones((1, 64), np.float32), 99, filters=Filter.parse('price > 120 AND label = "1"')
        )
        assert {hit.row.key for hit in hits} == {keys[21], keys[23]}
    assert main(["index", "evaluate", str(tmp_path / "c"), "--label", "label"]) == 0
    before = contents(tmp_path / "c")
    write(200)
    (images / keys[3]).write_bytes(encode(noise(32, 32, 5), "PNG"))
    capfd.readouterr()
    assert build(bundle, [listed], tmp_path / "c") == 0
    assert "23 items that were there have another payload now" in capfd.readouterr().err
    assert {key: payload["price"] for key, payload in payloads(tmp_path / "c").items()} == {
        key: 200 + i for i, key in enumerate(keys)
    }
    after = contents(tmp_path / "c")
    assert {key for key in keys if after[key] != before[key]} == {keys[3]}
    (tmp_path / "t.csv").write_text(f"key,price,code\n{keys[0]},7,007\n")
    assert build(bundle, [listed], tmp_path / "c", "--payload", tmp_path / "t.csv") == 0
    found = payloads(tmp_path / "c")  # a table has the last word
    assert (found[keys[0]]["price"], found[keys[0]]["code"], found[keys[1]]["price"]) == (7, "007", 201)


def test_new_fields_of_a_picture_that_cannot_be_read_leave_it_to_the_next_build(
    bundle: Path, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first, second = (picture.path for picture in find_pictures(images)[:2])
    key = find_pictures(images)[0].key
    (images / "list.csv").write_text(f"path,color\n{key},red\n")
    assert build(bundle, [images / "list.csv"], tmp_path / "c") == 0
    with opened(tmp_path / "c") as collection:
        before = collection.files()[key]
    first.write_bytes(second.read_bytes()[:40])  # half copied
    for color in ("blue", "green"):
        (images / "list.csv").write_text(f"path,color\n{key},{color}\n")
        capfd.readouterr()
        assert build(bundle, [images / "list.csv"], tmp_path / "c") == 0
        assert "1 to embed" in capfd.readouterr().err
        assert key in (tmp_path / "c" / "unreadable.tsv").read_text()
        assert payloads(tmp_path / "c")[key]["color"] == color
        with opened(tmp_path / "c") as collection:
            assert collection.files()[key] == before  # of the bytes that its vector was made of


def test_many_new_fields_do_not_wait_in_memory(
    bundle: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [picture.key for picture in find_pictures(images)]

    def write(color: str) -> None:
        (images / "list.csv").write_text("path,color\n" + "".join(f"{key},{color}\n" for key in keys))

    monkeypatch.setattr("service.collection.FRESH_LIMIT", 8)
    monkeypatch.setattr("service.build._MOVED", 4)
    waiting: list[int] = []
    move = Collection.move

    def counted(self: Collection, moves: Sequence[Any]) -> None:
        move(self, moves)
        waiting.append(self.fresh_count)

    monkeypatch.setattr(Collection, "move", counted)
    write("red")
    assert build(bundle, [images / "list.csv"], tmp_path / "c") == 0
    write("blue")
    assert build(bundle, [images / "list.csv"], tmp_path / "c") == 0
    assert len(waiting) == 6 and max(waiting) == 8
    assert {payload["color"] for payload in payloads(tmp_path / "c").values()} == {"blue"}


def test_tars_are_compared_by_time_and_bytes(
    bundle: Path, shards: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "c"
    spec = shards[0].parent / "*.tar"
    assert build(bundle, [spec], out) == 0
    found = payloads(out)
    marked = [key for key, payload in found.items() if payload.get("label") == "marked"]
    assert len(marked) == 6 and all(payload["folder"] == key.split("/")[1] for key, payload in found.items())
    before = contents(out)
    os.utime(shards[0], ns=(5, 5))
    capfd.readouterr()
    assert build(bundle, [spec], out) == 0
    assert "12 as they were, 0 to embed, 12 with a new time only, 0 at a new place" in capfd.readouterr().err
    with tarfile.open(shards[1]) as archive:
        members = [(m.name, archive.extractfile(m).read()) for m in archive.getmembers()]  # type: ignore[union-attr]
    with tarfile.open(shards[1], "w") as archive:  # one replaced, one gone, one new, and all elsewhere
        add(archive, "new.png", encode(noise(40, 30, 3), "PNG"))
        pictures = [name for name, _ in members if name.endswith(".png")]
        for name, data in members:
            if name != pictures[4]:
                add(archive, name, encode(noise(9, 9), "PNG") if name == pictures[5] else data)
    assert build(bundle, [spec], out) == 0
    said = capfd.readouterr().err
    assert "12 as they were, 2 to embed, 0 with a new time only, 10 at a new place" in said
    after = contents(out)
    assert after.keys() == before.keys() | {"shard-0001/new.png"}
    assert {key for key in before if after[key] != before[key]} == {f"shard-0001/{pictures[5]}"}
    with opened(out) as collection:
        for key, state in collection.files().items():
            if not key.endswith(pictures[4]):
                picture = picture_at(state.uri, key)
                assert len(picture.read()) == state.size and picture.mtime_ns == state.mtime_ns, key


def test_remote_pictures_are_read_once_and_embedded_again_when_their_version_changes(
    bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec = pytest.importorskip("fsspec", reason="fsspec comes with torch")
    files = fsspec.filesystem("memory")
    for i in range(4):
        files.pipe(f"/built/{'ab'[i % 2]}/{i}.jpg", encode(noise(24, 12, i)))
    files.pipe("/built/list.csv", b"uri,n\na/0.jpg,1\na/gone.jpg,2\n")
    out = tmp_path / "c"
    assert build(bundle, ["memory://built/*/*.jpg"], out) == 0
    assert contents(out).keys() == {"a/0.jpg", "a/2.jpg", "b/1.jpg", "b/3.jpg"}
    files.pipe("/built/a/2.jpg", encode(noise(24, 12, 9)))
    read: list[str] = []
    real = type(files).cat_file
    monkeypatch.setattr(
        type(files), "cat_file", lambda self, path, *a, **k: read.append(path) or real(self, path, *a, **k)
    )
    capfd.readouterr()
    assert build(bundle, ["memory://built/*/*.jpg"], out) == 0
    assert "3 as they were, 1 to embed" in capfd.readouterr().err and read == ["/built/a/2.jpg"]
    assert build(bundle, ["memory://built/list.csv"], tmp_path / "d") == 0
    assert payloads(tmp_path / "d") == {"a/0.jpg": {"folder": "a", "n": 1}}
    assert "a/gone.jpg" in (tmp_path / "d" / "unreadable.tsv").read_text()
    files.rm("/built", recursive=True)


def test_parts_of_any_source_make_the_whole(bundle: Path, shards: list[Path], tmp_path: Path) -> None:
    spec = shards[0].parent / "*.tar"
    assert build(bundle, [spec], tmp_path / "whole") == 0
    for i in (1, 2):
        assert build(bundle, [spec], tmp_path / f"part{i}", "--shard", f"{i}/2") == 0
    parts = [contents(tmp_path / f"part{i}") for i in (1, 2)]
    assert not parts[0].keys() & parts[1].keys()
    assert {**parts[0], **parts[1]}.keys() == contents(tmp_path / "whole").keys()


def test_refusals(bundle: Path, images: Path, shards: list[Path], tmp_path: Path, refused: Callable[..., str]) -> None:
    def sentence(*specs: object, more: Sequence[object] = (), verb: str = "build") -> str:
        named = [flag for spec in specs for flag in ("--images", spec)]
        return refused("index", verb, "--bundle", bundle, *named, "--out", tmp_path / "c", *more)

    assert "gives no picture that can be used" in sentence(f"{images}/*.nothing")
    assert "does not count up" in sentence("s-{3..1}.tar")
    assert "no pictures were named" in sentence("")
    assert "is not a folder, and sync follows one" in sentence(shards[0], verb="sync")
    assert "are not a folder, and sync follows one" in sentence(images, shards[0], verb="sync")
    (tmp_path / "l.csv").write_text("path,n\nabsent.png,1\n")
    assert "line 2 of the list names a file that cannot be opened" in sentence(tmp_path / "l.csv")
    (tmp_path / "l.csv").write_text("file\nabsent.png\n")
    assert "line 1 names no column 'path' or 'uri' (found: 'file')" in sentence(tmp_path / "l.csv")
    deep = json.dumps({"path": str(find_pictures(images)[0].path), "deep": json.loads("[" * 70 + "]" * 70)})
    (tmp_path / "l.jsonl").write_text(deep)
    assert "what the list says of" in (said := sentence(tmp_path / "l.jsonl")) and "nested more than 64 deep" in said
    (tmp_path / "t.csv").write_text("key,n\nx,1\n")
    said = sentence(shards[0], more=["--payload", tmp_path / "t.csv"])
    assert "its keys must be those of the sources, such as shard-0000/" in said
    assert not (tmp_path / "c" / "collection.json").exists()
    other = tmp_path / "not a collection"
    other.mkdir()
    (other / "file").touch()
    flags = ["--bundle", bundle, "--images", shards[0], "--out", other.rename(tmp_path / "other")]
    assert "exists and is not a collection" in refused("index", "build", *flags)
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["file"]


def test_a_thumbnail_is_no_size(bundle: Path, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for size in ("8", "5000", "-1"):
        assert main([*command(bundle, images, tmp_path / "c"), f"--thumbnails={size}"]) == 2
        assert "a thumbnail has 32 to 1024 pixels; 0 keeps none" in capfd.readouterr().err


def test_thumbnails_show_whole_pictures_and_follow_their_bytes(
    bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    images, out = tmp_path / "images", tmp_path / "c"
    images.mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6
    (images / "wide.jpg").write_bytes(encode(noise(400, 100), quality=95))
    (images / "turned.jpg").write_bytes(encode(noise(400, 100), exif=turned))
    (images / "small.png").write_bytes(encode(noise(50, 40), "PNG"))
    assert build(bundle, [images], out, "--thumbnails", 64) == 0
    found = thumbnails(out)
    assert {key: image.size for key, image in found.items()} == {
        "wide.jpg": (64, 16), "turned.jpg": (16, 64), "small.png": (50, 40)
    }  # fmt: skip
    shown, exact = (np.asarray(i.resize((16, 4)), float) for i in (found["wide.jpg"], noise(400, 100)))
    assert np.corrcoef(shown.ravel(), exact.ravel())[0, 1] > 0.98
    before = {key: image.tobytes() for key, image in found.items()}
    (images / "wide.jpg").write_bytes(encode(noise(100, 100, 7)))
    (images / "small.png").rename(images / "moved.png")
    (tmp_path / "t.csv").write_text("key,n\nturned.jpg,1\nmoved.png,2\nwide.jpg,3\n")
    capfd.readouterr()
    more = ["--payload", str(tmp_path / "t.csv"), "--max-delete", "1"]
    assert main(["index", "sync", *command(bundle, images, out)[2:], *more]) == 0
    found = thumbnails(out)
    assert found["wide.jpg"].size == (64, 64) and found.keys() == {"wide.jpg", "turned.jpg", "moved.png"}
    assert found["turned.jpg"].tobytes() == before["turned.jpg"] and found["moved.png"].tobytes() == before["small.png"]
    assert payloads(out)["turned.jpg"]["n"] == 1
    (images / "wide.jpg").write_bytes(encode(noise(100, 100, 8)))
    assert build(bundle, [images], out, "--thumbnails", 0) == 0
    assert thumbnails(out).keys() == {"turned.jpg", "moved.png"}
    assert not thumbnails_of_a_build_without(bundle, images, tmp_path / "d")


def thumbnails_of_a_build_without(bundle: Path, images: Path, out: Path) -> dict[str, Image.Image]:
    assert build(bundle, [images], out) == 0
    return thumbnails(out)


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """100 pictures, some of them none."""
    images = write_shapes(tmp_path / "many", 100)
    for i in (0, 7, 16, 17, 60, 99):
        find_pictures(images)[i].path.write_bytes(b"no picture")
    return images


def test_no_more_than_a_group_is_ever_in_memory(
    bundle: Path, many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert build(bundle, [many], tmp_path / "whole") == 0
    monkeypatch.setattr(service.embedding, "SHARD", 8)
    monkeypatch.setattr(service.build, "GROUP", 20)
    groups: list[int] = []
    real = Collection.add_table

    def watched(self: Collection, rows: pa.Table, vectors: Sequence[np.ndarray], origin: str = "client") -> None:
        assert len(rows) == sum(map(len, vectors)) <= 20 + 8
        assert all(not part.flags.owndata and not part.flags.writeable for part in vectors)  # mapped from the disk
        assert len(list((self.folder / "building").glob("*.arrow"))) <= 4  # what was added is gone
        groups.append(len(rows))
        real(self, rows, vectors, origin)

    monkeypatch.setattr(Collection, "add_table", watched)
    assert build(bundle, [many], tmp_path / "c") == 0
    assert len(groups) >= 4 and sum(groups) == 94
    whole, found = contents(tmp_path / "whole"), contents(tmp_path / "c")
    assert found.keys() == whole.keys()
    for key, row in whole.items():
        assert np.allclose(np.frombuffer(found[key], np.float32), np.frombuffer(row, np.float32), atol=1e-6)
    unreadable = [line.split("\t")[0] for line in (tmp_path / "c" / "unreadable.tsv").read_text().splitlines()]
    assert len(unreadable) == 6 and not (tmp_path / "c" / "building").exists()


@pytest.mark.parametrize("moment", ["before the commit", "after the commit", "after it was noted"])
def test_a_build_killed_between_groups_embeds_and_adds_nothing_twice(
    bundle: Path, many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    monkeypatch.setattr(service.embedding, "SHARD", 8)
    monkeypatch.setattr(service.build, "GROUP", 20)
    assert build(bundle, [many], tmp_path / "whole") == 0
    embedded: list[str] = []
    read, stored, add_table = Encoder.read, Embedder.stored, Collection.add_table
    monkeypatch.setattr(Encoder, "read", lambda self, p, *more: embedded.append(p.key) or read(self, p, *more))
    done: list[int] = []

    def kill_before(self: Collection, rows: pa.Table, *more: Any) -> None:
        if len(done) == 1 and moment == "before the commit":
            done.append(0)
            raise KeyboardInterrupt
        done.append(len(rows))
        add_table(self, rows, *more)

    def kill_after(self: Embedder, shards: Sequence[Shard]) -> None:
        if len(done) == 2 and moment == "after the commit":
            raise KeyboardInterrupt
        stored(self, shards)
        if len(done) == 2 and moment == "after it was noted":
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Collection, "add_table", kill_before)
        patched.setattr(Embedder, "stored", kill_after)
        assert build(bundle, [many], tmp_path / "c") == 130
    first = set(embedded)
    added = set(contents(tmp_path / "c"))
    assert len(added) == sum(done)
    embedded.clear()
    assert build(bundle, [many], tmp_path / "c") == 0
    assert contents(tmp_path / "c").keys() == contents(tmp_path / "whole").keys()
    assert not added & set(embedded)
    with opened(tmp_path / "c") as collection:
        assert sum(segment.rows for segment in collection.segments()) == 94  # none was written twice
    # What was read before and is read again: the next shard, that was being decoded; and, where the end of the group was
    # not noted, what could not be read of it.
    again = first & set(embedded)
    broken = {p.key for p in find_pictures(many) if p.read() == b"no picture"}
    if moment == "after the commit":
        assert len(again & broken) <= 4
    else:
        assert not again & broken - {p.key for p in find_pictures(many)[24:]}
    assert len(again - broken) <= 8
    unreadable = {line.split("\t")[0] for line in (tmp_path / "c" / "unreadable.tsv").read_text().splitlines()}
    assert unreadable == broken and not (tmp_path / "c" / "building").exists()


def test_sigkills_between_and_within_groups_end_with_the_same_items(bundle: Path, tmp_path: Path) -> None:
    images = write_shapes(tmp_path / "many", 400)
    program = (
        "import sys, service.embedding as e, service.build as b; e.SHARD, b.GROUP = 16, 48; "
        "from likewise import main; sys.exit(main(sys.argv[1:]))"
    )
    out, rng = tmp_path / "killed", random.Random(0)

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-c", program, *command(bundle, images, out)], stderr=subprocess.DEVNULL
        )

    for kills in range(3):
        process = start()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            if len(list((out / "segments").glob("[0-9]*"))) > 2 * kills:
                time.sleep(rng.uniform(0, 0.1))
                break
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL
    assert start().wait(120) == 0
    assert contents(out).keys() == {picture.key for picture in find_pictures(images)}
    with opened(out) as collection:
        assert collection.sequence == 400  # each was written once
    assert not (out / "building").exists()


def test_shards_are_found_again_by_what_is_in_them(bundle: Path, images: Path, tmp_path: Path) -> None:
    encoder = Encoder(Bundle.open(bundle), Embedding(bundle=bundle, device="cpu", threads=1))
    pictures = find_pictures(images)
    console = Console(quiet=True)

    def names(embedder: Embedder, count: int) -> list[str]:
        with closing(embedder.shards(pictures[:count])) as shards:
            return [shard.name for shard in shards]

    try:
        service.embedding.SHARD, real = 8, service.embedding.SHARD
        work = tmp_path / "work"
        first = names(Embedder(work, encoder, console), 20)
        times = {path.name: path.stat().st_mtime_ns for path in work.glob("*.arrow")}
        assert len(first) == 3 and times.keys() == {f"{name}.arrow" for name in first}
        damaged = work / f"{first[1]}.arrow"
        data = bytearray(damaged.read_bytes())
        data[len(data) // 2] ^= 1
        damaged.write_bytes(data)
        assert names(Embedder(work, encoder, console), 24)[:2] == first[:2]
        now = {path.name: path.stat().st_mtime_ns for path in work.glob("*.arrow")}
        assert now[f"{first[0]}.arrow"] == times[f"{first[0]}.arrow"]  # kept
        assert f"{first[2]}.arrow" not in now  # of other pictures: gone
        other = Embedder(work, encoder, console, thumbnail=32)
        with closing(other.shards(pictures)) as shards:
            shard = next(shards)
            assert shard.name not in first and shard.thumbnails[0].as_py()[:2] == b"\xff\xd8"
            assert shard.positions.tolist() == list(range(8)) and shard.vectors.shape == (8, encoder.dim)
    finally:
        service.embedding.SHARD = real
        encoder.close()


def test_without_a_terminal_progress_is_said_in_lines(
    bundle: Path, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.embedding, "SHARD", 8)
    monkeypatch.setattr(service.embedding, "SAID_EVERY", 0.0)
    assert build(bundle, [images], tmp_path / "c") == 0
    said = capfd.readouterr().err
    assert "8 of 24 pictures embedded, " in said and "/s, 0:00:0" in said and " left\n" in said


def test_names_that_cannot_be_keys_are_listed(bundle: Path, images: Path, tmp_path: Path) -> None:
    found = find_pictures(images)
    names = [str(found[0].path), "./" * 300 + str(found[1].path.name)]
    (found[1].path.parent / "l.jsonl").write_text("\n".join(json.dumps({"path": name}) for name in names))
    assert build(bundle, [found[1].path.parent / "l.jsonl"], tmp_path / "c") == 0
    assert contents(tmp_path / "c").keys() == {names[0]}
    assert "its key has more than 512 bytes" in (tmp_path / "c" / "unreadable.tsv").read_text()


def test_remote_pictures_are_fetched_a_bounded_number_ahead() -> None:
    begun: list[int] = []

    class Remote(NamedTuple):
        number: int

        def read(self, limits: DecodeLimits) -> bytes:
            begun.append(self.number)
            return b"%d" % self.number

    with ThreadPoolExecutor(4) as pool:
        line = _Line(pool, DEFAULT_LIMITS)
        fetched = [_Fetched(Remote(i), line) for i in range(300)]  # type: ignore[arg-type]
        for each in fetched:
            line.join(each)
        assert fetched[250].read() == b"250"  # out of turn: at once, and beside the others
        time.sleep(0.1)
        assert sorted(begun) == [*range(AHEAD), 250]
        for number in range(100):
            assert fetched[number].read() == b"%d" % number
        time.sleep(0.1)
        assert sorted(begun) == [*range(100 + AHEAD), 250]
        del fetched[250]
        assert [each.read() for each in fetched[100:]] == [b"%d" % i for i in range(100, 300) if i != 250]
