"""Picture sets, labels, and features that are kept and never confused."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from export.bundle import RefusalError
from export.preprocess import Pixels, PreprocessSpec
from tests.conftest import noise
from training.evaluate import features as module
from training.evaluate.descriptors import BASELINES, color_histogram, difference_hash
from training.evaluate.features import Extractor, extract
from training.evaluate.pictures import Labels, read_pairs, read_set

SPEC = PreprocessSpec(size=16)


class Counting:
    """Mean colour, and how many pictures it was asked for."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, pixels: Pixels) -> np.ndarray:  # type: ignore[type-arg]
        self.seen += len(pixels)
        return pixels.reshape(len(pixels), -1, 3).mean(1).astype(np.float32) / 255


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(7):
        path = tmp_path / "pictures" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(20, 24, i).save(path)
    (tmp_path / "pictures" / "class0" / "broken.jpg").write_bytes(b"no picture")
    return tmp_path / "pictures"


def test_features_are_reused_only_for_the_same_extractor_spec_and_pictures(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHARD", 3)
    skipped: list[tuple[str, str]] = []
    count = Counting()
    extractor = Extractor("mean", "digest 1", SPEC, count)
    first = extract(read_set("data", folder, []), [extractor], tmp_path / "cache", skipped)
    assert count.seen == 7 and [key for key, _ in skipped] == ["class0/broken.jpg"]
    assert first.kept.tolist() == [0, 1, 2, 3, 5, 6, 7]
    again = extract(read_set("data", folder, []), [extractor], tmp_path / "cache", skipped)
    assert count.seen == 7 and len(skipped) == 2
    np.testing.assert_array_equal(again.rows["mean"], first.rows["mean"])
    np.testing.assert_array_equal(again.kept, first.kept)
    # Other weights, another preprocessing: everything anew.
    extract(read_set("data", folder, []), [extractor._replace(digest="digest 2")], tmp_path / "cache", [])
    assert count.seen == 14
    extract(read_set("data", folder, []), [extractor._replace(spec=PreprocessSpec(size=17))], tmp_path / "cache", [])
    assert count.seen == 21
    # One picture changed: its shard anew (two readable pictures and it), the others from the cache.
    noise(20, 24, 99).save(folder / "class1" / "5.png")
    changed = extract(read_set("data", folder, []), [extractor], tmp_path / "cache", [])
    assert count.seen == 21 + 2
    assert np.flatnonzero((changed.rows["mean"] != first.rows["mean"]).any(1)).tolist() == [6]


def test_a_folder_whose_keys_sizes_and_times_are_those_of_another_has_features_of_its_own(tmp_path: Path) -> None:
    for name, value in (("train", 10), ("test", 200)):
        path = tmp_path / name / "a.bmp"
        path.parent.mkdir()
        Image.new("RGB", (16, 16), (value, 0, 0)).save(path)
        os.utime(path, ns=(0, 0))
    extractor = Extractor("mean", "digest", SPEC, Counting())
    train, test = (
        extract(read_set(name, tmp_path / name, []), [extractor], tmp_path / "cache", []).rows["mean"][0, 0]
        for name in ("train", "test")
    )
    assert (train, test) == pytest.approx((10 / 255, 200 / 255))


def test_a_damaged_or_foreign_shard_is_made_again(folder: Path, tmp_path: Path) -> None:
    count = Counting()
    extractor = Extractor("mean", "digest", SPEC, count)
    pictures = read_set("data", folder, [])
    whole = extract(pictures, [extractor], tmp_path / "cache", [])
    (shard,) = (tmp_path / "cache").iterdir()
    shard.write_bytes(shard.read_bytes()[:100])
    np.testing.assert_array_equal(
        extract(pictures, [extractor], tmp_path / "cache", []).rows["mean"], whole.rows["mean"]
    )
    assert count.seen == 14
    extract(pictures, [extractor._replace(digest="other")], tmp_path / "cache", [])
    other = next(p for p in (tmp_path / "cache").iterdir() if p != shard)
    shutil.copy(other, shard)  # a file of this name that was made by another extractor
    extract(pictures, [extractor], tmp_path / "cache", [])
    assert count.seen == 28


def test_nothing_readable_and_features_that_are_not_finite_are_refused(folder: Path, tmp_path: Path) -> None:
    def nan(pixels: Pixels) -> np.ndarray:  # type: ignore[type-arg]
        return np.full((len(pixels), 3), np.nan, np.float32)

    with pytest.raises(RefusalError, match="not finite"):
        extract(read_set("data", folder, []), [Extractor("nan", "x", SPEC, nan)], None, [])
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_bytes(b"nothing")
    with pytest.raises(RefusalError, match="none of the 1 pictures"):
        extract(read_set("data", tmp_path / "bad", []), [Extractor("mean", "x", SPEC, Counting())], None, [])
    (tmp_path / "empty").mkdir()
    with pytest.raises(RefusalError, match="holds no pictures"):
        read_set("data", tmp_path / "empty", [])


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_labels_from_a_list(folder: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"labels.{kind}"
    rows = {"class0/0.png": "a", str(folder / "class1" / "1.png"): "b"}
    if kind == "csv":
        path.write_text("path,label,more\n" + "".join(f"{p},{v},x\n" for p, v in rows.items()))
    else:
        path.write_text("".join(f'{{"path": "{p}", "label": "{v}"}}\n' for p, v in rows.items()))
    pictures = read_set("data", folder, [])
    found = dict(zip([p.key for p in pictures.pictures], Labels(path).of(pictures), strict=True))
    assert {k: v for k, v in found.items() if v} == {"class0/0.png": "a", "class1/1.png": "b"}
    assert Labels(None).of(pictures) == [p.key.split("/")[0] for p in pictures.pictures]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("path,name\na,b\n", "lacks 'label' in row 1"),
        ("", "holds no rows"),
        ("path,label\nx.jpg,1\n", "names none of the"),
    ],
)
def test_a_wrong_list_is_refused(folder: Path, tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "labels.csv"
    path.write_text(text)
    with pytest.raises(RefusalError, match=said):
        Labels(path).of(read_set("data", folder, []))


def test_pairs_keep_several_originals_and_negatives(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("query,original\nq.jpg,a.jpg\nq.jpg,b.jpg\nn.jpg,\nq.jpg,a.jpg\ne\u0301.jpg,\n")
    assert read_pairs(path) == {"q.jpg": ["a.jpg", "b.jpg"], "n.jpg": [], "\u00e9.jpg": []}


def test_labels_may_be_empty_and_decomposed_but_not_two(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    noise(20, 24, 7).save(folder / "caf\u00e9.png")
    pictures = read_set("data", folder, [])
    path.write_text("path,label\nclass0/0.png,\nclass0/2.png,a\nclass0/2.png,a\ncafe\u0301.png,b\n")
    found = dict(zip([p.key for p in pictures.pictures], Labels(path).of(pictures), strict=True))
    assert {k: v for k, v in found.items() if v is not None} == {"class0/2.png": "a", "caf\u00e9.png": "b"}
    path.write_text("path,label\nclass0/2.png,a\nclass0/2.png,b\n")
    with pytest.raises(RefusalError, match=r"gives class0/2\.png the labels 'a' and 'b'"):
        Labels(path)


def test_a_row_that_fits_pictures_of_two_folders_is_refused_unless_paths_are_absolute(
    folder: Path, tmp_path: Path
) -> None:
    bank = tmp_path / "bank"
    shutil.copytree(folder, bank)
    path = tmp_path / "labels.csv"
    path.write_text("path,label\nclass0/0.png,a\n")
    labels = Labels(path)
    assert labels.of(read_set("data", folder, [])).count("a") == 1
    assert labels.of(read_set("data", folder, [])).count("a") == 1  # the same pictures again
    with pytest.raises(RefusalError, match=r"names class0/0\.png, which fits both .*pictures/.* and .*bank/"):
        labels.of(read_set("bank", bank, []))
    path.write_text(f"path,label\n{folder}/class0/0.png,a\n{bank}/class0/0.png,b\nclass0/0.png,c\n")
    labels = Labels(path)
    assert {*labels.of(read_set("data", folder, []))} == {"a", None}
    assert {*labels.of(read_set("bank", bank, []))} == {"b", None}


def test_descriptors_are_what_they_say() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    for name, embed in BASELINES.items():
        rows = embed(pixels)
        assert rows.dtype == np.float32 and rows.shape[0] == 5, name
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    hashes = difference_hash(pixels)
    hamming = (hashes[0] != hashes[1]).sum()
    assert hashes.shape == (5, 256) and hashes[0] @ hashes[1] == pytest.approx(1 - 2 * hamming / 256)
    # Brightness leaves the hash; a permutation of the pixels leaves the histogram.
    dark = (pixels // 2).astype(np.uint8)
    assert (difference_hash(dark) * hashes > 0).mean() > 0.95
    mixed = pixels.reshape(5, -1, 3)[:, rng.permutation(1024)].reshape(pixels.shape)
    np.testing.assert_allclose(color_histogram(mixed), color_histogram(pixels))
    red, blue = np.zeros((2, 1, 8, 8, 3), np.uint8)
    red[..., 0], blue[..., 2] = 255, 255
    assert (color_histogram(red) @ color_histogram(blue).T).item() == 0
