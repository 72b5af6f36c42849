"""Copy detection: who must find whom, and the figures by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from export.bundle import RefusalError
from export.preprocess import PictureFile
from training.evaluate import copies
from training.evaluate.copies import CopyTask, by_stem, detect, from_pairs, roles


def files(*keys: str) -> list[PictureFile]:
    return [PictureFile(key, Path("somewhere") / key, 1, 0) for key in sorted(keys)]


def test_folders_by_role_pair_by_stem() -> None:
    pictures = files(
        "gallery/a.jpg", "gallery/b.jpg", "neg:blur/a.jpg", "q:blur/a.png", "q-crop50/b.jpg", "queries/b.jpg"
    )
    task = roles(pictures)
    assert task is not None
    found = {pictures[row].key: (o, t) for row, o, t in zip(task.queries, task.originals, task.transforms, strict=True)}
    assert found == {
        "neg:blur/a.jpg": ([], "blur"), "q:blur/a.png": ([0], "blur"), "q-crop50/b.jpg": ([1], "crop50"),
        "queries/b.jpg": ([1], ""),
    }  # fmt: skip


def test_file_names_by_role_pair_by_folder() -> None:
    pictures = files(
        "-001/neg-flip-000009.jpg", "0002/gallery-000002.jpg", "0002/q-jpeg20-000007.jpg", "0003/gallery-3.jpg"
    )
    task = roles(pictures)
    assert task is not None
    assert [pictures[i].key for i in task.gallery] == ["0002/gallery-000002.jpg", "0003/gallery-3.jpg"]
    assert dict(zip(task.transforms, task.originals, strict=True)) == {"flip": [], "jpeg20": [0]}


def test_class_folders_are_no_copy_detection_layout() -> None:
    assert roles(files("cat/1.jpg", "dog/2.jpg")) is None
    assert roles(files("gallery/1.jpg", "dog/2.jpg")) is None
    assert roles(files("gallery/1.jpg", "queries/1.jpg", "dog/2.jpg")) is None


def test_pairs_and_stems_across_two_folders() -> None:
    queries, gallery = files("blur/x.jpg", "y.jpg"), files("b/one.jpg", "b/two.jpg")
    task = from_pairs(queries, gallery, {"blur/x.jpg": ["two.jpg"], "y.jpg": []})
    assert task == CopyTask([0, 1], [2, 3], [[1], []], ["blur", ""])
    with pytest.raises(RefusalError, match=r"names three\.jpg"):
        from_pairs(queries, gallery, {"y.jpg": ["three.jpg"]})
    assert by_stem(files("q/one.png"), gallery).originals == [[0]]
    with pytest.raises(RefusalError, match="none of the 2 queries has an original"):
        by_stem(queries, gallery)


def test_an_original_that_is_named_twice_counts_once_and_rows_of_one_query_are_merged() -> None:
    queries, gallery = files("blur/x.jpg", "y.jpg"), files("b/one.jpg", "b/two.jpg", "b/three.jpg")
    task = from_pairs(queries, gallery, {"blur/x.jpg": ["b/two.jpg", "two.jpg"], "x.jpg": ["one.jpg"]})
    assert [sorted(found) for found in task.originals] == [[0, 2], []]


def test_a_mistyped_query_is_refused() -> None:
    queries, gallery = files("x.jpg", "a/z.jpg", "b/z.jpg"), files("one.jpg")
    for typo in ("X.jpg", "z.jpg"):  # two pictures are called z.jpg
        with pytest.raises(RefusalError, match=f"1 of the 2 queries that --pairs names .* for example {typo}"):
            from_pairs(queries, gallery, {"x.jpg": ["one.jpg"], typo: []})


def test_queries_without_an_original_of_their_name_are_counted() -> None:
    assert by_stem(files("one.png", "other.png"), files("one.jpg")).lost == 1
    task = roles(files("gallery/a.jpg", "neg:blur/c.jpg", "q:blur/a.jpg", "q:blur/b.jpg"))
    assert task is not None and task.lost == 1  # the negative is meant to be one


def features(cosines: list[list[float]]) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    return np.asarray(cosines, np.float32), np.eye(len(cosines[0]), dtype=np.float32)


def test_figures_by_hand() -> None:
    # Queries 0 and 1 have originals 0 and 1; query 2 is a negative that looks much like picture 2.
    queries, gallery = features([[0.9, 0.1, 0.2], [0.6, 0.5, 0.3], [0.05, 0.15, 0.8]])
    task = CopyTask([0, 1, 2], [3, 4, 5], [[0], [1], []], ["blur", "crop", "blur"])
    found = detect(queries, gallery, task)
    # All pairs by score: .9 right, .8 wrong, .6 wrong, .5 right, the rest wrong → ½·1 + ½·2/4.
    assert found.micro_ap == pytest.approx(0.5 + 0.5 * 2 / 4)
    # Best candidates: .9 right, .8 wrong, .6 wrong → ½.
    assert found.micro_ap_best == pytest.approx(0.5)
    assert found.recall_at_precision_90 == found.recall_at_1 == 0.5
    assert found.mean_average_precision == pytest.approx((1 + 1 / 2) / 2)
    assert found.by_transform == {"blur": 1.0, "crop": 0.0}  # the negative counts in neither
    assert found.candidates == 3


def test_a_negative_that_scores_high_costs_precision_only_where_it_exists() -> None:
    queries, gallery = features([[0.9, 0.1], [0.2, 0.95]])
    both = CopyTask([0, 1], [2, 3], [[0], [1]], ["", ""])
    one = CopyTask([0, 1], [2, 3], [[0], []], ["", ""])
    assert detect(queries, gallery, both).micro_ap == 1.0
    assert detect(queries, gallery, one).micro_ap == pytest.approx(0.5)


def test_large_sets_use_the_best_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    gallery = rng.normal(size=(60, 16))
    queries = gallery[:30] + 0.4 * rng.normal(size=(30, 16))
    unit = [(x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for x in (queries, gallery)]
    task = CopyTask(list(range(30)), list(range(30, 90)), [[i] if i % 3 else [] for i in range(30)], [""] * 30)
    whole = detect(*unit, task)
    monkeypatch.setattr(copies, "MAX_PAIRS", 100)
    monkeypatch.setattr(copies, "CANDIDATES", 20)
    cut = detect(*unit, task)
    assert cut.candidates == 20 and whole.candidates == 60
    assert cut.micro_ap_best == whole.micro_ap_best and cut.recall_at_1 == whole.recall_at_1
    assert cut.micro_ap == pytest.approx(whole.micro_ap, abs=0.01)
