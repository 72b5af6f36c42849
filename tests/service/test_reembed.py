"""A collection in the space of another encoder holds what the old one holds, whatever is written or killed meanwhile."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import service.embedding
from export.bundle import Bundle, RefusalError
from likewise import main
from service.collection import Collection
from service.config import Embedding
from service.encoder import Encoder
from service.follower import Follower
from service.originals import place_of
from service.records import NewRow
from service.reembed import Reembedding
from service.snapshot import restore, take
from tests.conftest import encode, noise

State = dict[str, tuple[Any, ...]]


def state(folder: Path) -> State:
    """Key → everything but the vector, of what a collection holds; it may be in use."""
    follower = Follower(folder, every=None)
    try:
        found: State = {}
        at = 0
        while at < follower.latest():
            writes = follower.writes(at, 100)
            thumbnails = follower.thumbnails([each.id for each in writes.live])
            for each in writes.live:
                about = each.row._replace(origin="", thumbnail=thumbnails.get(each.id))
                found[each.row.key] = (*about, follower.original(each.id))
            at = writes.upto
        assert len(found) == len(follower)
        return found
    finally:
        follower.close()


def vectors_of(folder: Path) -> dict[str, np.ndarray]:
    follower = Follower(folder, every=None)
    try:
        blocks = list(follower.scan())
        return {key: v for rows, block in blocks for key, v in zip(rows["key"].to_pylist(), block, strict=True)}
    finally:
        follower.close()


def command(old: Path, bundle: Path, out: Path, *more: str) -> list[str]:
    return ["index", "reembed", str(old), "--bundle", str(bundle), "--out", str(out), "--threads", "1", *more]


@pytest.fixture
def old(indexed: Path, tmp_path: Path) -> Path:
    """A collection of 64 files."""
    return Path(shutil.copytree(indexed / "shapes", tmp_path / "shapes"))


@pytest.fixture
def shop(bundle: Path, tmp_path: Path) -> Iterator[Collection]:
    """An empty one that keeps originals, open for writing."""
    opened = Bundle.open(bundle)
    collection = Collection.create(tmp_path / "shop", opened.space_id, opened.dim, keep_originals=True)
    yield collection
    collection.close()


def put(collection: Collection, keys: list[str], seed: int = 0, **payload: object) -> None:
    """Pictures that came as bytes, and were embedded by somebody."""
    rng = np.random.default_rng(seed)
    rows = [NewRow(key, json.dumps(payload), f"shop:{key}", "fp32/CPUExecutionProvider") for key in keys]
    pictures = [encode(noise(12, 9, int(rng.integers(1000)))) for _ in keys]
    collection.upsert(rows, rng.standard_normal((len(keys), collection.dim)).astype(np.float32), pictures)


def test_it_holds_the_same_items_with_the_vectors_of_the_other_encoder(
    old: Path, other_bundle: Path, pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    holder = Collection(old)  # as a server would
    try:
        assert main(command(old, other_bundle, tmp_path / "new")) == 0
    finally:
        holder.close()
    said = capfd.readouterr().err
    assert "64 items to embed (64 from files)" in said and "a lag of 0 (64 embedded now, 0 left out)" in said
    assert state(tmp_path / "new") == state(old)
    flags = ["--bundle", str(other_bundle), "--images", str(pictures), "--threads", "1"]
    assert main(["index", "build", *flags, "--out", str(tmp_path / "built")]) == 0
    built, new = vectors_of(tmp_path / "built"), vectors_of(tmp_path / "new")
    assert built.keys() == new.keys() and all(np.allclose(built[key], new[key], atol=1e-5) for key in built)
    assert not (tmp_path / "new" / "building").exists()
    collection = Collection(tmp_path / "new")
    assert len(collection.segments()) == 1 and collection.fresh_count == 0
    collection.verify()
    collection.close()
    capfd.readouterr()
    assert main(command(old, other_bundle, tmp_path / "new")) == 0
    assert "has caught up" in capfd.readouterr().err
    assert main(["index", "info", str(tmp_path / "new")]) == 0
    assert "follows    the collection" in capfd.readouterr().out
    # The new one goes on following the folder: its files are known.
    assert main(["index", "sync", *flags, "--out", str(tmp_path / "new")]) == 0
    assert "64 as they were, 0 to embed" in capfd.readouterr().err


def test_many_rows_with_other_fields_do_not_wait_in_memory(
    old: Path, other_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(command(old, other_bundle, tmp_path / "new")) == 0
    collection = Collection(old)
    for key, row in collection.files().items():
        new = NewRow(key, '{"seen": true}', row.uri, "fp32/CPUExecutionProvider", row.size, row.mtime_ns, row.sha256)
        collection.move([(key, new)])
    collection.close()
    monkeypatch.setattr("service.reembed.FLUSHED", 16)
    monkeypatch.setattr("service.reembed.PAGE", 8)
    waiting: list[int] = []
    move = Collection.move

    def counted(self: Collection, moves: Sequence[tuple[str, NewRow]]) -> None:
        move(self, moves)
        waiting.append(self.fresh_count)

    monkeypatch.setattr(Collection, "move", counted)
    assert main(command(old, other_bundle, tmp_path / "new")) == 0
    assert len(waiting) == 8 and max(waiting) == 16
    assert state(tmp_path / "new") == state(old)


def test_what_cannot_be_embedded_again_is_counted_first_and_left_out_when_told(
    old: Path, other_bundle: Path, tmp_path: Path, refused: Callable[..., str], capfd: pytest.CaptureFixture[str],
    pictures: Path,
) -> None:  # fmt: skip
    images = Path(shutil.copytree(pictures, tmp_path / "images"))
    collection = Collection(old)
    files = collection.files()
    moved = sorted(key for key in files if key.startswith("star/"))
    rows = [
        NewRow(key, "{}", (images / key).as_uri(), "fp32/CPUExecutionProvider", *files[key][:3])
        for key in sorted(files)
    ]
    collection.move([(row.key, row) for row in rows])
    random_vectors = np.random.default_rng(0).standard_normal((3, collection.dim)).astype(np.float32)
    trusted = (images / moved[0]).as_uri()
    collection.upsert(
        [NewRow("v1"), NewRow("v2", source_uri=trusted), NewRow("b", origin="fp32/CPUExecutionProvider")],
        random_vectors,
    )
    collection.close()
    gone, longer, edited = (images / key for key in moved[:3])
    data = gone.read_bytes()
    gone.unlink()
    longer.write_bytes(longer.read_bytes() + b"\0")
    edited.write_bytes(edited.read_bytes()[:-1] + b"\0")  # as long as before
    out = tmp_path / "new"
    sentence = refused(*command(old, other_bundle, out))
    assert "6 items of" in sentence and "2 came as vectors, without a picture (v1, v2)" in sentence
    assert "1 came as bytes that were not kept" in sentence and "(b)" in sentence
    assert f"1 have no file any more ({moved[0]})" in sentence
    assert (
        f"2 have a file whose bytes changed since: sync the old collection first ({moved[1]}, {moved[2]})" in sentence
    )
    assert not out.exists()
    capfd.readouterr()
    assert main(command(old, other_bundle, out, "--leave-out")) == 0
    listed = dict(line.split("\t") for line in (out / "unreadable.tsv").read_text().splitlines())
    assert listed.keys() == {"v1", "v2", "b", *moved[:3]}
    assert "whose bytes changed" in listed[moved[2]]
    whole = state(old)
    assert state(out) == {key: about for key, about in whole.items() if key not in listed}
    # Back again: the same command finds it, and what is still missing.
    gone.write_bytes(data)
    longer.write_bytes(longer.read_bytes()[:-1])
    assert "4 items of" in refused(*command(old, other_bundle, out))
    assert main(command(old, other_bundle, out, "--leave-out", "--trust-sources")) == 0
    listed = dict(line.split("\t") for line in (out / "unreadable.tsv").read_text().splitlines())
    assert listed.keys() == {"v1", "b", moved[2]}
    again = state(out)
    assert again == {key: about for key, about in state(old).items() if key not in listed}
    assert again["v2"][6] is None  # no digest: nothing is kept of it


def test_originals_are_embedded_and_kept(
    shop: Collection, other_bundle: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    put(shop, ["a", "b", "c", "d"], price=3)
    shop.delete(["d"])
    out = tmp_path / "new"
    assert main(command(shop.folder, other_bundle, out)) == 0
    assert state(out) == state(shop.folder)
    new = Collection(out)
    assert new.manifest.keep_originals and new.sweep() == (0, 0)
    new.verify()
    new.close()
    digest = shop.files()["a"].sha256
    assert digest is not None
    put(shop, ["e"], 5)
    place_of(shop.originals.folder, digest).write_bytes(b"damaged")
    place_of(shop.originals.folder, str(shop.files()["e"].sha256)).unlink()
    assert "1 have lost the original that was kept (e)" in refused(*command(shop.folder, other_bundle, out))
    sentence = refused(*command(shop.folder, other_bundle, tmp_path / "third", "--leave-out")[:-1])
    assert "(e)" in sentence
    assert main(command(shop.folder, other_bundle, tmp_path / "third", "--leave-out")) == 0
    listed = dict(line.split("\t") for line in (tmp_path / "third/unreadable.tsv").read_text().splitlines())
    assert "was damaged" in listed["a"] and "lost the original" in listed["e"]
    assert state(tmp_path / "third").keys() == {"b", "c"}


class _Writer(threading.Thread):
    """Writes to a collection until told to stop, every kind of write."""

    def __init__(self, collection: Collection, seed: int = 0) -> None:
        super().__init__()
        self._collection, self._rng = collection, random.Random(seed)
        self._stopping = threading.Event()
        self.failed: BaseException | None = None

    def run(self) -> None:
        rng, turn = self._rng, 0
        try:
            while not self._stopping.wait(0.002):
                turn += 1
                keys = rng.sample([f"k{i:02d}" for i in range(40)], 3)
                kind = rng.random()
                if kind < 0.6:
                    put(self._collection, keys, rng.randrange(10**6), turn=turn)
                elif kind < 0.85:
                    self._collection.delete(keys)
                elif kind < 0.95:
                    self._collection.flush()
                else:
                    self._collection.compact()
                    self._collection.sweep()
        except BaseException as e:
            self.failed = e

    def stop(self) -> None:
        self._stopping.set()
        self.join(60)
        assert self.failed is None and not self.is_alive()


def test_it_catches_up_with_a_writer(
    shop: Collection, other_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whenever nothing is written any more and the lag is nil, both hold the same."""
    for i in range(8):
        put(shop, [f"old{i}{j}" for j in range(8)], i)
    writer = _Writer(shop)
    writer.start()
    try:
        for _ in range(3):
            assert main(command(shop.folder, other_bundle, tmp_path / "new", "--lag", "6")) == 0
    finally:
        writer.stop()
    assert "writes of" in capfd.readouterr().err
    assert main(command(shop.folder, other_bundle, tmp_path / "new")) == 0
    assert state(tmp_path / "new") == state(shop.folder)
    new = Collection(tmp_path / "new")
    assert new.followed == shop.sequence
    new.verify()
    new.close()


_SMALL = (
    "import sys, service.embedding; service.embedding.SHARD = 16; from likewise import main; "
    "sys.exit(main(sys.argv[1:]))"
)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
def test_kills_while_it_is_written_to(shop: Collection, other_bundle: Path, tmp_path: Path, seed: int) -> None:
    """Killed three times at any point, with a writer all the while: at the end both hold the same."""
    rng = random.Random(seed)
    for i in range(20):
        put(shop, [f"old{i:02d}{j:02d}" for j in range(20)], i)
    out = tmp_path / "new"
    writer = _Writer(shop, seed)
    writer.start()
    come = 0
    try:
        for _ in range(3):
            process = subprocess.Popen(
                [sys.executable, "-c", _SMALL, *command(shop.folder, other_bundle, out, "--lag", "10")],
                stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and process.poll() is None and _followed(out) <= come:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.05))
            process.send_signal(signal.SIGKILL)
            process.wait(30)
            assert _followed(out) >= come  # what was noted stays
            come = _followed(out)
    finally:
        writer.stop()
    assert come > 0
    assert main(command(shop.folder, other_bundle, out)) == 0
    assert state(out) == state(shop.folder)
    new = Collection(out)
    new.verify()
    new.close()


def _followed(folder: Path) -> int:
    if not (folder / "collection.json").is_file():
        return 0
    follower = Follower(folder, every=None)
    try:
        with follower._reader.moment():
            return follower._reader.counter("followed")
    finally:
        follower.close()


@pytest.fixture
def encoder(other_bundle: Path) -> Iterator[Encoder]:
    encoder = Encoder(Bundle.open(other_bundle), Embedding(bundle=other_bundle, device="cpu", threads=1))
    yield encoder
    encoder.close()


def following(shop: Collection, encoder: Encoder, out: Path) -> Collection:
    return Collection.create(out, encoder.space_id, encoder.dim, follows=shop.uid, keep_originals=True)


def test_a_server_can_let_it_run_beside_its_writes(
    shop: Collection, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `ReleaseService` will do: the old collection is this process's own, and steps come as they may."""
    new = following(shop, encoder, tmp_path / "new")
    work = Reembedding(shop, new, encoder, Console(quiet=True))
    assert work.lag == 0 and work.step()
    put(shop, ["a", "b", "c"], price=1)
    assert work.lag == 3 and work.step() and work.lag == 0
    embedded = work.embedded
    before = new.get("a").vector
    # Another payload with the same bytes: nothing is embedded again.
    put(shop, ["a", "b", "c"], price=2)
    assert work.step() and work.embedded == embedded == 3
    assert json.loads(new.get("a").row.payload) == {"price": 2} and np.array_equal(new.get("a").vector, before)
    assert new.get("a").origin == encoder.origin
    # A picture is replaced by a vector that means nothing to the new encoder: the picture of before must not stay.
    shop.upsert([NewRow("a")], np.ones((1, shop.dim), np.float32))
    shop.delete(["b"])
    assert work.step() and set(new.files()) == {"c"} and work.left_out == {"a": "client_vectors"}
    put(shop, ["a"], 7)
    assert work.step() and set(new.files()) == {"a", "c"} and work.left_out == {}
    # More writes than one step takes, and keys that change places.
    monkeypatch.setattr("service.reembed.ROUND", 2)
    put(shop, ["d", "e"], 8)
    digests = {key: found.sha256 for key, found in shop.files().items()}
    shop.move([("d", NewRow("e", file_sha256=digests["d"])), ("e", NewRow("d", file_sha256=digests["e"]))])
    shop.delete(["c"])
    steps = 0
    while not work.step():
        steps += 1
    assert steps >= 1 and work.lag == 0
    work.close()
    new.close()
    assert state(tmp_path / "new") == state(shop.folder)


def test_an_original_that_was_swept_meanwhile_is_met_again_by_its_tombstone(
    shop: Collection, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = following(shop, encoder, tmp_path / "new")
    work = Reembedding(shop, new, encoder, Console(quiet=True))
    put(shop, ["a", "b"])
    shop.upsert([NewRow("c")], np.ones((1, shop.dim), np.float32))
    real = Encoder.embed

    def embed(self: Encoder, pixels: np.ndarray) -> np.ndarray:
        shop.delete(["a"])
        shop.sweep()
        return real(self, pixels)

    monkeypatch.setattr(Encoder, "embed", embed)
    work.step()
    assert set(new.files()) == {"b"} and work.left_out == {"a": "originals_gone", "c": "client_vectors"}
    monkeypatch.undo()
    work.settle()  # whoever stops here has one write to catch up with, and one item that cannot be had
    assert work.left_out == {"c": "client_vectors"} and work.lag == 1
    assert work.step() and work.left_out == {"c": "client_vectors"} and work.lag == 0
    work.close()
    new.close()


def test_a_picture_that_the_new_encoder_refuses_is_listed_and_tried_again(
    shop: Collection, other_bundle: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    put(shop, ["a"])
    vector = np.ones((1, shop.dim), np.float32)
    shop.upsert([NewRow("tiny", origin="fp32/CPUExecutionProvider")], vector, [encode(noise(1, 1), "PNG")])
    out = tmp_path / "new"
    sentence = refused(*command(shop.folder, other_bundle, out))
    assert "1 items could not be embedded, such as tiny (the picture is 1×1 pixels" in sentence
    assert state(out).keys() == {"a"}
    assert "could not be embedded, such as tiny" in refused(*command(shop.folder, other_bundle, out))
    assert main(command(shop.folder, other_bundle, out, "--leave-out")) == 0
    assert (out / "unreadable.tsv").read_text().startswith("tiny\tthe picture is 1×1 pixels")


def test_only_what_follows_is_followed(
    shop: Collection, bundle: Path, other_bundle: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    put(shop, ["a", "b"])
    assert "is of the bundle's space" in refused(*command(shop.folder, bundle, tmp_path / "new"))
    assert "cannot be a collection's name" in refused(*command(shop.folder, other_bundle, tmp_path / "No Good"))
    assert "is not a collection" in refused(*command(tmp_path / "nope", other_bundle, tmp_path / "new"))
    assert "MODEL_INDEX_MISMATCH" in refused(*command(shop.folder, other_bundle, shop.folder))
    opened = Bundle.open(other_bundle)
    Collection.create(tmp_path / "own", opened.space_id, opened.dim).close()
    assert "follows no other collection" in refused(*command(shop.folder, other_bundle, tmp_path / "own"))
    Collection.create(tmp_path / "far", opened.space_id, opened.dim, follows="f" * 32).close()
    assert f"follows the collection {'f' * 32}" in refused(*command(shop.folder, other_bundle, tmp_path / "far"))
    out = tmp_path / "new"
    take(shop.folder, tmp_path / "before", lambda _: None)
    put(shop, ["c"])
    assert main(command(shop.folder, other_bundle, out)) == 0
    take(shop.folder, tmp_path / "after", lambda _: None)
    for name in ("before", "after"):
        restore(tmp_path / name, tmp_path / f"{name}-again", lambda _: None)
    # What was restored from before the new one's last write has another history; from after it, the same so far.
    assert "choose another --out" in refused(*command(tmp_path / "before-again", other_bundle, out))
    assert main(command(tmp_path / "after-again", other_bundle, out)) == 0
    assert "choose another --out" in refused(
        *command(shop.folder, other_bundle, out)
    )  # it follows the restored one now
    restored = Collection(tmp_path / "after-again")
    put(restored, ["d"])
    restored.close()
    assert main(command(tmp_path / "after-again", other_bundle, out)) == 0
    assert state(out) == state(tmp_path / "after-again")
    # A copy of the folder from before is not followed back.
    shutil.copytree(tmp_path / "after-again", tmp_path / "copy")
    later = Collection(tmp_path / "after-again")
    put(later, ["e"])
    later.close()
    assert main(command(tmp_path / "after-again", other_bundle, out)) == 0
    assert "so it is an earlier copy" in refused(*command(tmp_path / "copy", other_bundle, out))


def test_shards_of_a_killed_run_are_not_embedded_again(
    old: Path, other_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.embedding, "SHARD", 16)
    embedded: list[int] = []
    real = Encoder.embed

    def counting(self: Encoder, pixels: np.ndarray) -> np.ndarray:
        embedded.append(len(pixels))
        if len(embedded) == 3:
            raise KeyboardInterrupt
        return real(self, pixels)

    monkeypatch.setattr(Encoder, "embed", counting)
    assert main(command(old, other_bundle, tmp_path / "new")) == 130
    assert main(command(old, other_bundle, tmp_path / "new")) == 0
    assert embedded == [16, 16, 16, 16, 16]  # the interrupted shard was the only one to be made twice
    assert state(tmp_path / "new") == state(old)


def test_a_folder_made_anew_is_not_followed(shop: Collection, encoder: Encoder, tmp_path: Path) -> None:
    follower = Follower(shop.folder, every=None)
    other = Collection.create(tmp_path / "other", shop.space_id, shop.dim)
    new = following(shop, encoder, tmp_path / "new")
    with pytest.raises(RefusalError, match="choose another --out"):
        Reembedding(other, new, encoder, Console(quiet=True))
    for collection in (follower, other, new):
        collection.close()
