"""Before a build: what it will take; and a build that several machines share."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from likewise import main
from service.collection import Collection
from service.index import bytes_of
from service.records import NewRow


def said(capfd: pytest.CaptureFixture[str], *arguments: object) -> dict[str, object]:
    capfd.readouterr()
    assert main(["index", "plan", *(str(a) for a in arguments), "--json"]) == 0
    found: dict[str, object] = json.loads(capfd.readouterr().out)
    return found


def test_a_plan_of_rows_follows_the_constraints(capfd: pytest.CaptureFixture[str]) -> None:
    free = said(capfd, "--rows", 1_000_000, "--dim", 384)
    assert free["index_bytes"] == bytes_of(str(free["index"]), 1_000_000, 384) and "warning" not in free
    tight = said(capfd, "--rows", 1_000_000, "--dim", 384, "--max-memory", "1M")
    assert "no index that is known here is so small" in str(tight["warning"])
    graph = said(capfd, "--rows", 1_000_000, "--dim", 384, "--index", "HNSW32,SQfp16", "--stored", "float16")
    assert graph["index"] == "HNSW32,SQfp16" and int(str(graph["disk_bytes"])) < int(str(free["disk_bytes"])) + 2**30
    assert main(["index", "plan", "--rows", "10000000", "--dim", "384"]) == 0
    assert " MiB" in capfd.readouterr().out


def test_a_plan_of_pictures_and_of_a_collection(
    bundle: Path, indexed: Path, pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = said(capfd, "--images", pictures, "--bundle", bundle, "--sample", 16)
    assert (found["pictures"], found["dimensions"], found["index"]) == (64, 64, "Flat")
    assert float(str(found["pictures_per_second"])) > 0 and str(found["embedding_with"]).startswith("fp32/")
    shutil.copytree(indexed / "shapes", tmp_path / "c")
    collection = Collection(tmp_path / "c")
    collection.upsert([NewRow("from a client")], np.ones((1, 64), np.float32))
    gone = replace_uri(collection, "star/00003.png", "file:///nowhere/00003.png")
    found = said(capfd, "--collection", tmp_path / "c", "--bundle", bundle, "--sample", 16)  # it is in use
    collection.close()
    counts = {name: found[name] for name in found if name.startswith(("items", "embeddable", "from_", "without_"))}
    assert counts == {
        "items": 65,
        "embeddable": 63,
        "from_files": 63,
        "without_client_vectors": 1,
        "without_files_gone": 1,
    }
    assert float(str(found["pictures_per_second"])) > 0 and gone == "star/00003.png"
    assert main(["index", "plan", "--collection", str(tmp_path / "c"), "--bundle", str(bundle), "--sample", "8"]) == 0
    assert "without_files_gone        1" in capfd.readouterr().out


def replace_uri(collection: Collection, key: str, uri: str) -> str:
    size, mtime_ns, sha256, _ = collection.files()[key]
    collection.move([(key, NewRow(key, "{}", uri, "", size, mtime_ns, sha256))])
    return key


def test_the_peak_of_memory_grows_with_a_segment_not_with_the_collection(capfd: pytest.CaptureFixture[str]) -> None:
    peaks = [
        int(str(said(capfd, "--rows", rows, "--dim", 128, "--index", "HNSW32,SQfp16")["peak_memory_bytes"]))
        for rows in (1_000_000, 5_000_000, 500_000_000)
    ]
    assert peaks[0] < peaks[1] == peaks[2]


def test_plans_that_say_too_little_are_refused(refused: Callable[..., str], pictures: Path) -> None:
    for arguments, sentence in (
        ([], "give one of"),
        (["--rows", 5, "--images", pictures], "give one of"),
    ):
        assert sentence in refused("index", "plan", *arguments)


def test_shards_become_the_collection_that_one_machine_would_build(
    bundle: Path, indexed: Path, pictures: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    flags = ["--bundle", str(bundle), "--images", str(pictures), "--threads", "1"]
    for i in (1, 2, 3):
        assert main(["index", "build", *flags, "--out", str(tmp_path / f"part{i}"), "--shard", f"{i}/3"]) == 0
    parts = [tmp_path / f"part{i}" for i in (1, 2, 3)]
    sizes = []
    for part in parts:
        collection = Collection(part)
        sizes.append(len(collection))
        collection.close()
    assert sum(sizes) == 64 and min(sizes) > 8
    assert main(["index", "merge", *map(str, parts), "--out", str(tmp_path / "whole")]) == 0
    shutil.copytree(indexed / "shapes", tmp_path / "one")
    whole, one = Collection(tmp_path / "whole"), Collection(tmp_path / "one")
    assert whole.files() == one.files() and whole.origins == one.origins
    for key in one.files():
        a, b = whole.get(key), one.get(key)
        # Batches of other sizes: the same vectors up to rounding.
        assert np.allclose(a.vector, b.vector, atol=1e-5) and a.row.payload == b.row.payload and a.origin == b.origin
    assert len(whole.segments()) == 1
    whole.close()
    one.close()
    # It can be followed like any other.
    assert main(["index", "sync", *flags, "--out", str(tmp_path / "whole")]) == 0
    assert "there is no shard 4 of 3" in refused("index", "build", *flags, "--out", tmp_path / "x", "--shard", "4/3")
    assert "cannot follow a folder" in refused("index", "sync", *flags, "--out", tmp_path / "part1", "--shard", "1/3")
    assert "is one of the collections" in refused("index", "merge", parts[0], parts[1], "--out", parts[1])
