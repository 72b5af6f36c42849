"""The cache of decoded pictures, and kNN."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import training.cache
from export.bundle import RefusalError
from export.preprocess import PreprocessSpec, find_pictures, preprocess
from export.sources.picture import Picture
from likewise import main
from tests.conftest import TINY, encode, noise
from tests.shapes import write_shapes
from training.cache import PictureCache, build_cache
from training.knn import knn_accuracy, pixel_features

CPU = torch.device("cpu")


def build(folder: Path, items: Sequence[Picture], size: int = 24, **options: Any) -> PictureCache:
    return build_cache(folder, items, "test", size, 2, lambda _: None, **options)


def only(tmp_path: Path, name: str) -> Path:
    """The one file of that name in the caches below tmp_path/cache."""
    (path,) = (tmp_path / "cache").glob(f"*/{name}")
    return path


def test_cache_keeps_whole_shards_and_makes_the_rest(tmp_path: Path) -> None:
    folder = write_shapes(tmp_path / "p", 24)
    (folder / "bad.jpg").write_bytes(b"x")
    found = find_pictures(folder)
    seen: list[int] = []
    cache = build_cache(tmp_path / "cache", found, str(folder), 24, 2, seen.append)
    assert len(cache) == 24 and sum(seen) == 25 and cache.unreadable[0][0] == "bad.jpg"
    assert cache.bytes == 24 * 24 * 24 * 3 and cache.labels[0] == cache.pictures[0].folder
    shard = only(tmp_path, "pixels-00000.npy")
    before = shard.stat().st_mtime_ns
    again = build(tmp_path / "cache", found)
    assert shard.stat().st_mtime_ns == before and again.fingerprint.sha256 == cache.fingerprint.sha256
    assert torch.equal(again.aspects, cache.aspects) and torch.equal(again.groups, cache.groups)
    # Cut short by a kill: the note is missing, so the shard is made again.
    only(tmp_path, "pixels-00000.json").unlink()
    build(tmp_path / "cache", found)
    assert shard.stat().st_mtime_ns != before
    # Another size is another cache.
    assert build(tmp_path / "cache", found, 32).gather(torch.tensor([0]), CPU).shape == (1, 32, 32, 3)


def test_the_whole_picture_is_kept_with_its_shape(tmp_path: Path) -> None:
    image = noise(120, 40)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter: 40×120 as seen
    (tmp_path / "a.png").write_bytes(encode(image, "PNG"))
    (tmp_path / "b.jpg").write_bytes(encode(image, exif=exif))
    cache = build(tmp_path / "cache", find_pictures(tmp_path))
    assert cache.aspects.tolist() == pytest.approx([3.0, 1 / 3])
    expected = np.asarray(image.resize((24, 24), Image.Resampling.BICUBIC))
    assert np.array_equal(cache.gather(torch.tensor([0]), CPU)[0].numpy(), expected)


def test_squeezing_left_the_hash_of_other_specifications_alone() -> None:
    """It is part of every bundle's space_id."""
    assert PreprocessSpec(size=224).sha256().startswith("77d89e26c65a1be0")
    assert PreprocessSpec(size=64, fit="pad").sha256().startswith("c58e828457f6c969")


def test_gathering_is_the_same_from_disk_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.cache, "SHARD_PICTURES", 64)
    folder = write_shapes(tmp_path / "p", 150, size=16)
    cache = build(tmp_path / "cache", find_pictures(folder))
    assert len(list((tmp_path / "cache").glob("*/pixels-*.npy"))) == 3
    wanted = torch.tensor([149, 0, 63, 64, 127, 128, 0])
    from_disk = cache.gather(wanted, CPU)
    spec = PreprocessSpec(size=24, fit="squeeze")
    for row, index in zip(from_disk, wanted.tolist(), strict=True):
        assert np.array_equal(row.numpy(), preprocess(cache.pictures[index].read(), spec).pixels)
    assert not cache.resident
    cache.load(CPU)
    assert cache.resident and torch.equal(cache.gather(wanted, CPU), from_disk)


@pytest.mark.parametrize("verify", ["full", "sampled", "auto"])
def test_a_flipped_byte_is_noticed_and_its_shard_decoded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verify: str
) -> None:
    monkeypatch.setattr(training.cache, "SHARD_PICTURES", 64)
    folder = write_shapes(tmp_path / "p", 100, size=16)
    found = find_pictures(folder)
    good = build(tmp_path / "cache", found)
    expected = good.gather(torch.arange(100), CPU)
    victim, other = (only(tmp_path, f"pixels-0000{i}.npy") for i in (1, 0))
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    untouched = other.stat().st_mtime_ns
    cache = build(tmp_path / "cache", found, verify=verify)
    assert any("pixels-00001.npy does not match its checksum" in notice for notice in cache.notices)
    assert torch.equal(cache.gather(torch.arange(100), CPU), expected) and other.stat().st_mtime_ns == untouched
    assert not any("checksum" in notice for notice in build(tmp_path / "cache", found, verify=verify).notices)
    # A note that was changed by hand is made again too.
    note = only(tmp_path, "pixels-00000.json")
    note.write_text(json.dumps({**json.loads(note.read_text()), "aspects": [9.0] * 64}))
    assert build(tmp_path / "cache", found, verify=verify).aspects.max() == 1.0


def test_a_killed_build_continues(tmp_path: Path) -> None:
    """SIGKILL while the third shard is decoded: the finished shards are kept, and the result is that of a whole build."""
    folder = write_shapes(tmp_path / "p", 256, size=16)
    code = f"""
import os, signal, sys
from pathlib import Path
import training.cache
from export.preprocess import find_pictures
training.cache.SHARD_PICTURES = 64
done = []
def progress(count):
    done.append(count)
    if len(done) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
training.cache.build_cache(Path({str(tmp_path / "cache")!r}), find_pictures(Path({str(folder)!r})), "test", 24, 1, progress)
"""
    killed = subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[2])
    assert killed.returncode == -signal.SIGKILL
    shards = sorted((tmp_path / "cache").glob("*/pixels-*.npy"))
    assert len(shards) == 2
    (shards[0].parent / "pixels-00002.tmp").write_bytes(b"half")  # as a kill while writing leaves it
    before = [p.stat().st_mtime_ns for p in shards]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.cache, "SHARD_PICTURES", 64)
        cache = build(tmp_path / "cache", find_pictures(folder))
        whole = build(tmp_path / "whole", find_pictures(folder))
    assert [p.stat().st_mtime_ns for p in shards] == before
    assert cache.fingerprint == whole.fingerprint and torch.equal(cache.groups, whole.groups)
    assert torch.equal(cache.gather(torch.arange(256), CPU), whole.gather(torch.arange(256), CPU))


def test_copies_are_marked_as_near_duplicates(tmp_path: Path) -> None:
    for i in range(6):
        image = noise(160, 120, i)
        (tmp_path / f"{i}.png").write_bytes(encode(image, "PNG"))
        if i < 2:
            (tmp_path / f"{i}-copy.jpg").write_bytes(encode(image.resize((80, 60)), quality=60))
    cache = build(tmp_path / "cache", find_pictures(tmp_path), 48)
    by_key = {picture.key: int(group) for picture, group in zip(cache.pictures, cache.groups, strict=True)}
    assert by_key["0.png"] == by_key["0-copy.jpg"] and by_key["1.png"] == by_key["1-copy.jpg"]
    assert len(set(by_key.values())) == 6
    assert any(notice.startswith("4 of 8 pictures have near-duplicates, in 2 groups") for notice in cache.notices)
    rows = [line.split("\t") for line in only(tmp_path, "near-duplicates.tsv").read_text().splitlines()]
    assert {key: int(group) for group, key in rows} == {k: v for k, v in by_key.items() if k[0] in "01"}


def test_pictures_that_the_hash_cannot_tell_apart_are_not_marked(tmp_path: Path) -> None:
    image = noise(64, 64)
    for i in range(40):
        (tmp_path / f"{i:02d}.jpg").write_bytes(encode(image, quality=60 + i))
    cache = build(tmp_path / "cache", find_pictures(tmp_path))
    assert cache.groups.tolist() == list(range(40)) and any("look alike" in notice for notice in cache.notices)


def test_pictures_too_plain_for_the_hash_are_counted_and_marked_when_equal_only(tmp_path: Path) -> None:
    for i in range(10):
        (tmp_path / f"{i}.png").write_bytes(encode(Image.new("RGB", (16, 16), (i, 2 * i, 3 * i)), "PNG"))
    (tmp_path / "again.bmp").write_bytes(encode(Image.new("RGB", (16, 16), (4, 8, 12)), "BMP"))
    (tmp_path / "n.png").write_bytes(encode(noise(64, 64), "PNG"))
    cache = build(tmp_path / "cache", find_pictures(tmp_path))
    assert any(notice.startswith("11 of 12 pictures have too little structure") for notice in cache.notices)
    assert any(notice.startswith("2 of 12 pictures have near-duplicates, in 1 groups") for notice in cache.notices)
    assert cache.groups.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 4, 11][: len(cache)]


def test_a_cache_without_room_is_refused_before_it_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_shapes(tmp_path / "p", 8)
    full = shutil._ntuple_diskusage(10**9, 10**9 - 100, 100)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(RefusalError, match="the picture cache needs"):
        build(tmp_path / "cache", find_pictures(folder))
    assert not list((tmp_path / "cache").glob("*/*"))


def test_room_is_asked_for_shards_that_are_absent_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.cache, "SHARD_PICTURES", 64)
    found = find_pictures(write_shapes(tmp_path / "p", 192, size=16))
    build(tmp_path / "cache", found)
    only(tmp_path, "pixels-00000.json").unlink()
    # Room for one shard of three.
    tight = shutil._ntuple_diskusage(10**9, 10**9, 64 * 3 * 24 * 24 + 100)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: tight)
    assert len(build(tmp_path / "cache", found)) == 192
    only(tmp_path, "pixels-00000.json").unlink()
    only(tmp_path, "pixels-00002.json").unlink()
    with pytest.raises(RefusalError, match="the picture cache needs"):
        build(tmp_path / "cache", found)


def state(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Inode, time of change and contents of every file."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(f.relative_to(folder)): (f.stat().st_ino, f.stat().st_mtime_ns, f.read_bytes()) for f in files}


def test_opening_a_finished_cache_writes_nothing(tmp_path: Path) -> None:
    """Processes 1…W-1 of a run open it at the same time."""
    found = find_pictures(write_shapes(tmp_path / "p", 24))
    first = build(tmp_path / "cache", found)
    before = state(tmp_path / "cache")
    second = build(tmp_path / "cache", found)
    assert state(tmp_path / "cache") == before and second.notices == first.notices
    only(tmp_path, "near-duplicates.tsv").unlink()
    build(tmp_path / "cache", found)
    after = state(tmp_path / "cache")
    assert {name: data for name, (_, _, data) in after.items()} == {name: data for name, (_, _, data) in before.items()}


def test_three_processes_open_a_finished_cache_at_once(tmp_path: Path) -> None:
    found = find_pictures(write_shapes(tmp_path / "p", 24, size=16))
    expected = build(tmp_path / "cache", found)
    with ThreadPoolExecutor(3) as pool:
        opened = list(pool.map(lambda _: build(tmp_path / "cache", found), range(60)))
    assert all(torch.equal(cache.groups, expected.groups) for cache in opened)


@pytest.mark.parametrize("kept", [0, 10, 200, 0.5, -1])
def test_damaged_groups_are_made_again(tmp_path: Path, kept: float) -> None:
    found = find_pictures(write_shapes(tmp_path / "p", 24))
    expected = build(tmp_path / "cache", found).groups
    path = only(tmp_path, "groups.npz")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept) if isinstance(kept, float) else kept])
    assert torch.equal(build(tmp_path / "cache", found).groups, expected)
    assert np.load(path)["groups"].tolist() == expected.tolist()


def test_other_pictures_or_another_size_leave_a_cache_alone_and_it_is_named(tmp_path: Path) -> None:
    folder = write_shapes(tmp_path / "p", 24)
    found = find_pictures(folder)
    build(tmp_path / "cache", found)
    before = state(tmp_path / "cache")
    for items, size, others in ((found, 32, 1), (found[:20], 24, 2)):
        cache = build(tmp_path / "cache", items, size)
        assert any(f"of {others} other cache(s)" in notice for notice in cache.notices)
        after = state(tmp_path / "cache")
        assert {name: after[name] for name in before} == before


class Disk:
    """Files that `Path.read_bytes` cannot read for now."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failing: dict[str, OSError] = {}
        self.read: list[str] = []
        original = Path.read_bytes

        def read_bytes(path: Path) -> bytes:
            self.read.append(path.name)
            if path.name in self.failing:
                raise self.failing[path.name]
            return original(path)

        monkeypatch.setattr(Path, "read_bytes", read_bytes)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    """All files can be read until `failing` says otherwise."""
    return Disk(monkeypatch)


def test_what_could_not_be_read_for_a_while_is_read_at_the_next_opening(tmp_path: Path, disk: Disk) -> None:
    folder = tmp_path / "p"
    folder.mkdir()
    for i in range(12):
        (folder / f"{i:02d}.png").write_bytes(encode(noise(20, 10 + i, i), "PNG"))
    (folder / "bad.png").write_bytes(b"x")
    found = find_pictures(folder)
    whole = build(tmp_path / "whole", found)
    disk.failing = {
        "03.png": OSError(errno.EIO, "Input/output error"),
        "07.png": PermissionError(errno.EACCES, "denied"),
    }
    first = build(tmp_path / "cache", found)
    assert len(first) == 10 and sorted(key for key, _ in first.unreadable) == ["03.png", "07.png", "bad.png"]
    assert any("Input/output error" in reason for _, reason in first.unreadable)
    before = state(tmp_path / "cache")
    disk.read.clear()
    assert len(build(tmp_path / "cache", found)) == 10 and state(tmp_path / "cache") == before  # still failing
    assert {name for name in disk.read if name.endswith("png")} == {"03.png", "07.png"}
    disk.failing.clear()
    kept = build(tmp_path / "cache", found, retry=False)
    assert kept.fingerprint == first.fingerprint and state(tmp_path / "cache") == before
    disk.read.clear()
    cache = build(tmp_path / "cache", found)
    assert {name for name in disk.read if name.endswith("png")} == {
        "03.png",
        "07.png",
    }  # the others are decoded already
    assert cache.fingerprint.sha256 == whole.fingerprint.sha256 and [key for key, _ in cache.unreadable] == ["bad.png"]
    assert torch.equal(cache.gather(torch.arange(12), CPU), whole.gather(torch.arange(12), CPU))
    assert torch.equal(cache.aspects, whole.aspects) and torch.equal(cache.groups, whole.groups)
    assert not any("checksum" in notice for notice in build(tmp_path / "cache", found).notices)


def test_a_disk_that_does_not_answer_stops_the_build_and_keeps_what_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: Disk
) -> None:
    monkeypatch.setattr(training.cache, "SHARD_PICTURES", 64)
    found = find_pictures(write_shapes(tmp_path / "p", 128, size=16))
    disk.failing = {p.path.name: OSError(errno.EIO, "Input/output error") for p in found[64:71]}
    with pytest.raises(RefusalError, match=r"^7 of 64 pictures .*Input/output error") as refusal:
        build(tmp_path / "cache", found)
    assert "\n" not in str(refusal.value)
    only(tmp_path, "pixels-00000.json")
    disk.failing.popitem()  # 6 of 64 are less than a tenth
    assert len(build(tmp_path / "cache", found)) == 122
    # Pictures that vanished are no fault of the disk.
    disk.failing = {p.path.name: FileNotFoundError(errno.ENOENT, "No such file") for p in found}
    assert len(build(tmp_path / "other", found)) == 0


def files(run: Path) -> dict[str, tuple[int, int, bytes]]:
    """`state` of a run, tar indices and the list of a later opening left out."""
    return {name: found for name, found in state(run).items() if name != "cache/unreadable.tsv"}


def test_a_plan_or_a_wrong_resume_leaves_a_run_and_its_cache_as_they_are(
    run: Path, pictures: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    mine = shutil.copytree(run, tmp_path / "run")
    (bad := tmp_path / "some" / "bad.png").parent.mkdir()
    for path in sorted(pictures.glob("[cs]*/*")):
        shutil.copy(path, bad.parent / f"{path.parent.name}-{path.name}")
    bad.write_bytes(b"x")
    flags = ["--out", str(mine), "--steps", "3", *TINY]
    before = files(mine)
    assert main(["train", str(pictures), *flags, "--image-size", "64", "--plan"]) == 0
    assert {name: found for name, found in files(mine).items() if name in before} == before
    assert all(name.startswith("cache/") for name in files(mine).keys() - before.keys())
    assert "the pictures are not those that" in refused("train", bad.parent, *flags, "--resume")
    assert {name: found for name, found in files(mine).items() if name in before} == before
    assert "bad.png" in (mine / "cache" / "unreadable.tsv").read_text()
    assert main(["train", str(pictures), *flags, "--resume"]) == 0


def test_no_picture_is_no_error_here(tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"x")
    cache = build(tmp_path / "cache", find_pictures(tmp_path))
    assert len(cache) == 0 and cache.fingerprint.unreadable == 1 and cache.groups.shape == (0,)
    cache.load(CPU)


def test_a_changed_picture_changes_the_fingerprint(tmp_path: Path) -> None:
    folder = write_shapes(tmp_path / "p", 4)
    first = build(tmp_path / "a", find_pictures(folder)).fingerprint
    victim = find_pictures(folder)[0].path
    victim.write_bytes(victim.read_bytes() + b"\0")
    assert first.sha256 != build(tmp_path / "b", find_pictures(folder)).fingerprint.sha256


def test_knn_by_hand() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    labels = torch.tensor([0, 0, 1])
    queries = torch.tensor([[1.0, 0.05], [0.05, 1.0], [0.1, 1.0]])
    assert knn_accuracy(bank, labels, queries, torch.tensor([0, 1, 0]), k=1) == pytest.approx(2 / 3)
    # Left out, the third row's nearest others are all of class 0.
    assert knn_accuracy(bank, labels, bank, labels, k=1, leave_one_out=True) == pytest.approx(2 / 3)


def test_pixel_baselines_ignore_what_they_should() -> None:
    picture = torch.randint(0, 200, (1, 40, 40, 3), dtype=torch.uint8)
    brighter = (picture.int() + 40).to(torch.uint8)
    grey = pixel_features(torch.cat([picture, brighter]), grey=True)
    assert grey.shape == (2, 32 * 32) and torch.allclose(grey[0], grey[1], atol=1e-4)
    assert pixel_features(picture, grey=False).shape == (1, 3 * 32 * 32)


def test_the_exported_encoder_is_the_teacher(run: Path) -> None:
    stored = torch.load(run / "checkpoints" / "last.pt", weights_only=True)["state"]["teacher"]
    for name, value in load_file(run / "encoder.safetensors").items():
        assert torch.equal(value, stored[f"backbone.{name}"])
