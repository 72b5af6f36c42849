"""Batch building: complete, resumable, and kind about bad files."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import service.build
import service.embedding
from export.bundle import Bundle
from likewise import main
from service.collection import Collection
from service.config import Embedding
from service.encoder import Encoder
from tests.conftest import encode, noise
from tests.shapes import write_shapes


def contents(folder: Path) -> dict[str, bytes]:
    """Key → vector of everything in a collection."""
    collection = Collection(folder)
    try:
        return {key: collection.get(key).vector.tobytes() for key in collection.files()}
    finally:
        collection.close()


def command(bundle: Path, images: Path, out: Path) -> list[str]:
    return ["index", "build", "--bundle", str(bundle), "--images", str(images), "--out", str(out), "--threads", "1"]


def test_a_collection_holds_every_picture(bundle: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "things"
    assert main(command(bundle, pictures, out)) == 0
    found = contents(out)
    assert len(found) == 64 and "star/00003.png" in found
    encoder = Encoder(Bundle.open(bundle), Embedding(bundle=bundle, device="cpu", threads=1))
    pixels = encoder.decode((pictures / "star/00003.png").read_bytes()).pixels
    expected = encoder.embed(pixels[None])[0]
    assert np.allclose(np.frombuffer(found["star/00003.png"], np.float32), expected, atol=1e-6)
    encoder.close()
    assert {p.name for p in out.iterdir()} >= {"collection.json", "records.sqlite", "segments", "unreadable.tsv"}
    assert not (out / "building").exists()


def test_bad_files_are_listed_and_skipped(bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "mixed pictures ü"
    write_shapes(folder, 16)
    (folder / "sub dir").mkdir()
    (folder / "sub dir" / "größe.jpg").write_bytes(encode(noise(40, 30)))
    (folder / "[").mkdir()
    (folder / "[" / "b] [old].png").write_bytes(encode(noise(40, 30), "PNG"))
    (folder / "[" / "b] [cut].png").write_bytes(encode(noise(40, 30), "PNG")[:99])
    (folder / os.fsdecode(b"not utf-8 \xff.png")).write_bytes(encode(noise(20, 20), "PNG"))
    (folder / "tab\tline\n.png").write_bytes(b"")
    (folder / "text.jpg").write_text("hello")
    (folder / "empty.png").write_bytes(b"")
    (folder / "cut.jpg").write_bytes(encode(noise(64, 64))[:500])
    (folder / "dot.png").write_bytes(encode(noise(1, 1), "PNG"))
    (folder / "moving.gif").write_bytes(
        encode(noise(20, 20), "GIF", save_all=True, append_images=[noise(20, 20, 1), noise(20, 20, 2)])
    )
    out = tmp_path / "mixed"
    assert main(command(bundle, folder, out)) == 0
    assert (
        len(contents(out)) == 20
        and {"sub dir/größe.jpg", "[/b] [old].png", "not utf-8 \ufffd.png"} <= contents(out).keys()
    )
    listed = dict(line.split("\t") for line in (out / "unreadable.tsv").read_text().splitlines())
    assert listed.keys() == {"text.jpg", "empty.png", "cut.jpg", "dot.png", "[/b] [cut].png", "tab\ufffdline\ufffd.png"}
    assert "0 bytes" in listed["empty.png"] and "1×1" in listed["dot.png"] and "damaged" in listed["cut.jpg"]
    said = capfd.readouterr().err
    assert "skipped dot.png: the picture is 1×1 pixels" in said and "1 pictures are animated" in said


@pytest.mark.parametrize("seed", [0])
def test_three_sigkills_end_with_the_same_collection(bundle: Path, tmp_path: Path, seed: int) -> None:
    images = write_shapes(tmp_path / "many", 600)
    program = (
        "import sys, service.embedding as e; e.SHARD = 20; from likewise import main; sys.exit(main(sys.argv[1:]))"
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    rng = random.Random(seed)

    def start(out: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-c", program, *command(bundle, images, out)], stderr=subprocess.DEVNULL
        )

    assert start(whole).wait(120) == 0
    shards = 0
    for _ in range(3):
        process = start(killed)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            if len(list((killed / "building").glob("*.json"))) > shards:
                time.sleep(rng.uniform(0, 0.02))
                break
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL
        left = len(list((killed / "building").glob("*.json")))
        assert left > shards  # what was finished stays
        shards = left
    assert start(killed).wait(120) == 0
    assert contents(killed) == contents(whole)


def test_finished_shards_are_not_made_again(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = write_shapes(tmp_path / "some", 48)
    monkeypatch.setattr(service.embedding, "SHARD", 16)
    embedded: list[int] = []
    real = Encoder.embed

    def counting(self: Encoder, pixels: np.ndarray) -> np.ndarray:
        embedded.append(len(pixels))
        if len(embedded) == 3:
            raise KeyboardInterrupt
        return real(self, pixels)

    monkeypatch.setattr(Encoder, "embed", counting)
    assert main(command(bundle, images, tmp_path / "c")) == 130
    assert main(command(bundle, images, tmp_path / "c")) == 0
    assert embedded == [16, 16, 16, 16]  # the interrupted shard was the only one to be made twice
    assert len(contents(tmp_path / "c")) == 48


def test_a_shard_that_was_damaged_is_made_again(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = write_shapes(tmp_path / "some", 32)
    monkeypatch.setattr(service.embedding, "SHARD", 16)
    assert main(command(bundle, images, tmp_path / "whole")) == 0
    real = shutil.rmtree

    def interrupted(path: Path, **options: bool) -> None:
        if Path(path).name == "building":
            raise KeyboardInterrupt
        real(path, **options)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    assert main(command(bundle, images, tmp_path / "c")) == 130  # stopped after the commit, before the clean-up
    monkeypatch.undo()
    assert main(command(bundle, images, tmp_path / "c")) == 0
    assert contents(tmp_path / "c") == contents(tmp_path / "whole")


def test_building_again_adds_what_is_new_or_changed(
    bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    images = write_shapes(tmp_path / "some", 24)
    out = tmp_path / "c"
    assert main(command(bundle, images, out)) == 0
    before = contents(out)
    assert main(command(bundle, images, out)) == 0
    assert "0 to embed" in capfd.readouterr().err
    (images / "new.png").write_bytes(encode(noise(32, 32, 5), "PNG"))
    changed = images / "star" / "00003.png"
    changed.write_bytes(encode(noise(32, 32, 6), "PNG"))
    (images / "ring" / "00005.png").unlink()
    assert main(command(bundle, images, out)) == 0
    after = contents(out)
    assert "1 items have no file" in capfd.readouterr().err
    assert after.keys() == before.keys() | {"new.png"}
    assert {k for k in before if after[k] != before[k]} == {"star/00003.png"}


def test_refusals(
    bundle: Path, other_bundle: Path, pictures: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    assert "nope does not exist: give a folder" in refused(*command(bundle, tmp_path / "nope", tmp_path / "c"))
    (tmp_path / "empty").mkdir()
    assert "holds no pictures" in refused(*command(bundle, tmp_path / "empty", tmp_path / "c"))
    assert "is not a bundle" in refused(*command(tmp_path, pictures, tmp_path / "c"))
    assert "cannot be a collection's name" in refused(*command(bundle, pictures, tmp_path / "My Pictures"))
    assert "exists and is not a collection" in refused(*command(bundle, pictures, pictures.parent / "pictures"))
    assert main(command(bundle, pictures, tmp_path / "c")) == 0
    sentence = refused(*command(other_bundle, pictures, tmp_path / "c"))
    assert "MODEL_INDEX_MISMATCH" in sentence and "build it again" in sentence
    holder = Collection(tmp_path / "c")
    assert f"process {os.getpid()} on" in refused(*command(bundle, pictures, tmp_path / "c"))
    holder.close()
    assert len(contents(tmp_path / "c")) == 64


def test_paths_that_cannot_be_written_get_a_sentence(
    bundle: Path, pictures: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "file").write_text("x")
    assert "Not a directory" in refused(*command(bundle, pictures, tmp_path / "file" / "c"))
    assert "is a file" in refused(*command(bundle, pictures, tmp_path / "file"))
