"""Exact ranking: FAISS and torch give the same answer, ties go by gallery order."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from training.evaluate.ranking import faiss_searcher, full_rankings, top_k, torch_searcher
from training.evaluate.retrieval import unit_rows


def rows(count: int, dim: int, seed: int) -> np.ndarray:  # type: ignore[type-arg]
    return unit_rows(np.random.default_rng(seed).normal(size=(count, dim)))


@pytest.mark.parametrize("kind", ["random", "duplicates", "hashes"])
def test_faiss_and_torch_agree_and_equal_the_full_ranking(kind: str) -> None:
    gallery, queries = rows(300, 24, 0), rows(40, 24, 1)
    if kind == "duplicates":  # every picture 30 times: far more ties than the margin of the shortlist
        gallery = np.repeat(gallery[:10], 30, axis=0)[np.random.default_rng(2).permutation(300)]
    if kind == "hashes":
        gallery, queries = np.sign(gallery) / 24**0.5, np.sign(queries) / 24**0.5
        gallery, queries = gallery.astype(np.float32), queries.astype(np.float32)
    (_, whole), *rest = full_rankings(queries, gallery, chunk=100)
    assert not rest
    cosines = (queries.astype(np.float64) @ gallery.T.astype(np.float64)).astype(np.float32)
    np.testing.assert_array_equal(whole.rows, np.argsort(-cosines, axis=1, kind="stable"))
    for searcher in (faiss_searcher, torch_searcher):
        found = top_k(queries, gallery, 7, searcher=searcher)
        np.testing.assert_array_equal(found.rows, whole.rows[:, :7])
        np.testing.assert_array_equal(found.scores, whole.scores[:, :7])


@pytest.mark.parametrize("searcher", [faiss_searcher, torch_searcher])
def test_leave_one_out_never_returns_the_query(searcher: object) -> None:
    gallery = np.repeat(rows(20, 8, 3), 2, axis=0)  # row 2i and 2i + 1 are the same picture
    own = np.arange(40)
    found = top_k(gallery, gallery, 5, own, searcher)  # type: ignore[arg-type]
    assert not (found.rows == own[:, None]).any()
    np.testing.assert_array_equal(found.rows[:, 0], own ^ 1)
    everything = top_k(gallery, gallery, 1000, own, searcher)  # type: ignore[arg-type]
    assert everything.rows.shape == (40, 39)
    ((_, ranked),) = full_rankings(gallery, gallery, own)
    np.testing.assert_array_equal(ranked.rows, everything.rows)


def test_without_faiss_torch_searches() -> None:
    code = (
        "import sys; sys.modules['faiss'] = None\n"
        "import training.evaluate.ranking as r, numpy as np\n"
        "assert r.default_searcher() is r.torch_searcher\n"
        "x = np.eye(5, dtype=np.float32)\n"
        "assert r.top_k(x, x, 1).rows.ravel().tolist() == [0, 1, 2, 3, 4]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
