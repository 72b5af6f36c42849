"""Views, cache and kNN."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from export.preprocess import PreprocessSpec, find_pictures, preprocess
from tests.shapes import write_shapes
from training.cache import build_cache
from training.knn import knn_accuracy, pixel_features
from training.views import Views

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


@pytest.mark.parametrize("preset", ["photographs", "products", "orientation-free"])
@pytest.mark.parametrize("kind", ["first", "second", "local"])
def test_views_differ_per_sample_and_repeat_per_seed(preset: str, kind: str) -> None:
    pictures = torch.randint(0, 256, (1, 48, 48, 3), dtype=torch.uint8).expand(6, -1, -1, -1)
    views = Views(preset, MEAN, STD)
    a = views(pictures, 32, (0.3, 1.0), kind, torch.Generator().manual_seed(1))
    b = views(pictures, 32, (0.3, 1.0), kind, torch.Generator().manual_seed(1))
    assert a.shape == (6, 3, 32, 32) and torch.equal(a, b)
    assert (a >= -2.0001).all() and (a <= 2.0001).all()  # (0 − 0.5) / 0.25 … (1 − 0.5) / 0.25
    assert all(not torch.allclose(a[0], other, atol=0.05) for other in a[1:])


def test_a_whole_view_without_colour_is_the_picture() -> None:
    views = Views("photographs", MEAN, STD)
    theta = views._geometry(50, (1.0, 1.0), torch.Generator().manual_seed(0))
    assert ((theta[:, 0, 0].abs() + theta[:, 0, 2].abs()) <= 1.0001).all()  # nothing outside the picture
    assert ((theta[:, 1, 1].abs() + theta[:, 1, 2].abs()) <= 1.0001).all()
    assert theta[:, 0, 0].abs().min() > 0.8  # the whole area, up to the aspect ratio
    assert set(torch.sign(theta[:, 0, 0]).tolist()) == {-1.0, 1.0}  # flips
    assert theta[:, 0, 1].abs().max() == 0  # no rotation
    turned = Views("orientation-free", MEAN, STD)._geometry(50, (1.0, 1.0), torch.Generator().manual_seed(0))
    assert turned[:, 0, 1].abs().max() > 0.5


def test_product_views_keep_the_colour() -> None:
    red = torch.tensor([200, 40, 40], dtype=torch.uint8).expand(64, 48, 48, 3)
    for preset, keeps in (("products", True), ("photographs", False)):
        seen = Views(preset, (0.0,) * 3, (1.0,) * 3)(red, 16, (0.5, 1.0), "first", torch.Generator().manual_seed(0))
        r, g, b = seen.mean((2, 3)).T
        assert bool(((r > g + 0.2) & ((g - b).abs() < 0.02)).all()) is keeps


def test_cache_keeps_whole_shards_and_makes_the_rest(tmp_path: Path) -> None:
    folder = write_shapes(tmp_path / "p", 24)
    (folder / "bad.jpg").write_bytes(b"x")
    spec = PreprocessSpec(size=24)
    found = find_pictures(folder)
    seen: list[int] = []
    cache = build_cache(tmp_path / "cache", found, folder, spec, 2, seen.append)
    assert len(cache) == 24 and sum(seen) == 25 and cache.unreadable[0][0] == "bad.jpg"
    shard = tmp_path / "cache" / "pixels-00000.npy"
    before = shard.stat().st_mtime_ns
    again = build_cache(tmp_path / "cache", found, folder, spec, 2, seen.append)
    assert shard.stat().st_mtime_ns == before and again.fingerprint == cache.fingerprint
    # Cut short by a kill: the note is missing, so the shard is made again.
    (tmp_path / "cache" / "pixels-00000.json").unlink()
    build_cache(tmp_path / "cache", found, folder, spec, 2, seen.append)
    assert shard.stat().st_mtime_ns != before
    expected = preprocess((folder / cache.pictures[5].key).read_bytes(), spec).pixels
    got = cache.gather(torch.tensor([5]), torch.device("cpu"))[0].numpy()
    assert np.array_equal(got, expected)
    cache.load(torch.device("cpu"))
    assert np.array_equal(cache.gather(torch.tensor([5]), torch.device("cpu"))[0].numpy(), expected)


def test_a_changed_picture_changes_the_fingerprint(tmp_path: Path) -> None:
    folder = write_shapes(tmp_path / "p", 4)
    spec = PreprocessSpec(size=24)
    first = build_cache(tmp_path / "a", find_pictures(folder), folder, spec, 1, lambda _: None).fingerprint
    victim = find_pictures(folder)[0].path
    victim.write_bytes(victim.read_bytes() + b"\0")
    second = build_cache(tmp_path / "b", find_pictures(folder), folder, spec, 1, lambda _: None).fingerprint
    assert first.sha256 != second.sha256


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
        assert torch.equal(value, stored[f"vit.{name}"])
