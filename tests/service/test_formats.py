"""Collections of earlier formats are opened, searched, written to and upgraded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from export.bundle import RefusalError
from service.collection import Collection
from service.filter import Filter
from service.policy import IndexPolicy
from service.reading import COLLECTION_FORMAT
from tests.service.formats import small

FORMATS = sorted(int(path.name.split(".")[0]) for path in small.HERE.glob("*.tar.gz"))


def test_every_format_is_kept() -> None:
    assert [*range(1, COLLECTION_FORMAT + 1)] == FORMATS


def check(collection: Collection) -> None:
    """It holds what `small.make` wrote."""
    vectors, live = small.vectors(), small.live()
    assert len(collection) == len(live)
    (hits,) = collection.search(vectors[:1], 100)
    expected = sorted(live, key=lambda key: -float(vectors[live[key]] @ vectors[0]))
    assert [hit.row.key for hit in hits] == expected
    for key, i in live.items():
        item, new = collection.get(key), small.new_row(i)
        assert (item.row.key, item.row.payload, item.row.source_uri, item.origin) == (
            key,
            new.payload,
            new.source_uri,
            new.origin,
        )
        assert np.array_equal(item.vector, vectors[i])
    wanted = Filter.parse('colour = red AND tags:t1 AND NOT box.wide = true AND key != "folder/02.jpg"')
    (hits,) = collection.search(vectors[:1], 100, filters=wanted)
    passed = {key for key, i in live.items() if i % 2 == 0 and i % 3 == 1 and i <= 20}
    assert {hit.row.key for hit in hits} == passed and len(passed) == 3


@pytest.mark.parametrize("version", FORMATS)
def test_a_format_is_read_written_and_upgraded(version: int, tmp_path: Path) -> None:
    folder = small.unpack(version, tmp_path)
    collection = Collection(folder)
    check(collection)
    collection.upsert([small.new_row(3)], small.vectors()[3:4])
    collection.flush()  # a segment of the present format beside the old ones
    collection.delete([small.new_row(3).key])
    collection.close()
    collection = Collection(folder)
    check(collection)
    collection.upgrade()
    check(collection)
    collection.close()
    for file in [folder / "collection.json", *folder.glob("segments/*/segment.json")]:
        assert json.loads(file.read_bytes())["format_version"] == COLLECTION_FORMAT
    collection = Collection(folder)
    check(collection)
    assert len(collection.segments()) == 1 and collection.segments()[0].dead == 0
    collection.close()


def test_formats_of_the_future_are_refused_and_left_alone(tmp_path: Path) -> None:
    folder = small.unpack(FORMATS[-1], tmp_path)
    path = folder / "collection.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "format_version": COLLECTION_FORMAT + 1}))
    with pytest.raises(RefusalError, match="install the version that wrote it"):
        Collection(folder)


def test_a_policy_is_kept_and_rebuilds_the_segments(tmp_path: Path) -> None:
    folder = small.unpack(FORMATS[-1], tmp_path)
    collection = Collection(folder)
    policy = IndexPolicy(index="HNSW8", vectors="float16")
    collection.keep_to(policy)
    assert collection.manifest.policy == policy
    collection.close()
    collection = Collection(folder)
    assert collection.manifest.policy == policy
    (segment,) = collection.segments()
    assert segment.info.factory == "HNSW8" and segment.rows == len(collection) == len(small.live())
    for key, i in small.live().items():
        vector = collection.get(key).vector
        assert np.allclose(vector, small.vectors()[i], atol=1e-3) and abs(np.linalg.norm(vector) - 1) < 1e-6
    halves = np.load(collection.folder / "segments" / f"{segment.number:04d}" / "vectors.npy")
    assert halves.dtype == np.float16
    before = shutil.disk_usage(folder).free
    assert before > 0
    collection.close()
