"""The revisited protocol on a set small enough to compute by hand, junk included."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from export.bundle import RefusalError
from export.preprocess import PictureFile
from training.evaluate.revisited import (
    GroundTruth,
    QueryTruth,
    find_named,
    read_ground_truth,
    revisited,
    score_rankings,
)

TRUTH = GroundTruth(
    imlist=list("abcdef"),
    qimlist=["q0", "q1"],
    gnd=[QueryTruth(easy=[0, 3], hard=[4], junk=[1]), QueryTruth(easy=[], hard=[5], junk=[0, 2])],
)
# Best first. Query 0: junk at rank 0.
ORDER = np.array([[1, 0, 2, 4, 3, 5], [2, 3, 5, 0, 1, 4]])


def test_map_with_junk_by_hand() -> None:
    found = score_rankings(ORDER, TRUTH)
    # Easy, query 0: junk {1} and hard {4} leave 0, 2, 3, 5; relevant at 0 and 2 → (1 + (1/2 + 2/3)/2) / 2. Query 1 has none.
    assert found["easy"].counted == 1
    assert found["easy"].mean_average_precision == pytest.approx((1 + (1 / 2 + 2 / 3) / 2) / 2, abs=1e-15)
    # Medium, query 0: 0, 2, 4, 3, 5; relevant at 0, 2, 3. Query 1: 3, 5, 1, 4; relevant at 1 → (0/1 + 1/2)/2.
    first = (1 + (1 / 2 + 2 / 3) / 2 + (2 / 3 + 3 / 4) / 2) / 3
    assert found["medium"].counted == 2
    assert found["medium"].mean_average_precision == pytest.approx((first + 1 / 4) / 2, abs=1e-15)
    # Hard, query 0: easy and junk leave 2, 4, 5; relevant at 1 → 1/4. Query 1 as before.
    assert found["hard"].mean_average_precision == pytest.approx(1 / 4, abs=1e-15)
    # mP@5 looks no further than the last relevant picture: query 0 has 3 of the first 4, query 1 has 1 of the first 2.
    assert found["medium"].mean_precision_at == pytest.approx({1: 0.5, 5: (3 / 4 + 1 / 2) / 2, 10: (3 / 4 + 1 / 2) / 2})


def test_junk_is_neither_right_nor_wrong() -> None:
    with_junk = score_rankings(ORDER, TRUTH)["medium"]
    moved = np.array([[0, 2, 4, 3, 5, 1], [3, 5, 1, 4, 2, 0]])  # junk last
    assert score_rankings(moved, TRUTH)["medium"] == with_junk
    as_wrong = GroundTruth(
        imlist=TRUTH.imlist, qimlist=TRUTH.qimlist, gnd=[q.model_copy(update={"junk": []}) for q in TRUTH.gnd]
    )
    assert score_rankings(ORDER, as_wrong)["medium"].mean_average_precision < with_junk.mean_average_precision


def test_features_are_ranked_by_cosine() -> None:
    gallery = np.eye(6, dtype=np.float32)
    weights = np.array([[5, 6, 4, 2, 3, 1], [3, 2, 6, 5, 1, 4]], np.float32)  # descending: ORDER
    queries = weights / np.linalg.norm(weights, axis=1, keepdims=True)
    assert revisited(queries, gallery, TRUTH) == score_rankings(ORDER, TRUTH)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"gnd": []}, "2 queries and 0 entries"),
        ({"imlist": ["a"]}, "names position"),
        ({"gnd": [{"easy": [0], "hard": []}, {"easy": [], "hard": [], "junk": []}]}, "gnd.0.junk"),
        ({"imlist": None}, "imlist"),
        ({"gnd": [{"easy": [0, 3], "hard": [4], "junk": [3]}, TRUTH.gnd[1].model_dump()]}, "3 in both easy and junk"),
        (
            {"gnd": [TRUTH.gnd[0].model_dump(), {"easy": [], "hard": [5], "junk": [5]}]},
            "q1 has position 5 in both hard",
        ),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, change: dict[str, object], said: str) -> None:
    path = tmp_path / "truth.json"
    path.write_text(json.dumps({**TRUTH.model_dump(), "bbx": [1, 2], **change}))
    with pytest.raises(RefusalError, match=said):
        read_ground_truth(path)


def test_pictures_are_found_by_name_and_a_name_of_several_is_refused(tmp_path: Path) -> None:
    names = ("a/one.jpg", "b/one.png", "b/two.jpg", "b/caf\u00e9.jpg")
    pictures = [PictureFile(key, tmp_path / key, 1, 0) for key in names]
    found = find_named(["two", "two.jpg", "a/one", "one.png", "b/one.png", "cafe\u0301"], pictures, tmp_path)
    assert [p.key for p in found] == [
        "b/two.jpg",
        "b/two.jpg",
        "a/one.jpg",
        "b/one.png",
        "b/one.png",
        "b/caf\u00e9.jpg",
    ]
    with pytest.raises(RefusalError, match=r"names one, which 2 pictures .* a/one\.jpg and b/one\.png"):
        find_named(["two", "one"], pictures, tmp_path)
    with pytest.raises(RefusalError, match=r"lacks 1 of the 2 pictures .* three"):
        find_named(["two", "three"], pictures, tmp_path)


def test_a_good_file_is_read_and_a_pickle_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(TRUTH.model_dump()))
    assert read_ground_truth(path) == TRUTH
    with pytest.raises(RefusalError, match="is a pickle"):
        read_ground_truth(tmp_path / "gnd_roxford5k.pkl")  # refused by its name, before anything is read
