"""The label-free score: the score's ends, paired comparison."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from PIL import Image

from export.bundle import RefusalError
from export.edits import EDITS, editing_side
from export.preprocess import PreprocessSpec, preprocess
from tests.conftest import encode, noise
from tests.shapes import SHAPES, draw_shape
from training.evaluate.descriptors import difference_hash, raw_pixels
from training.evaluate.label_free import (
    compare,
    label_free,
    label_free_all,
    neighbor_agreement,
)
from training.evaluate.retrieval import unit_rows

SPEC = PreprocessSpec(size=32, fit="pad")


@pytest.fixture(scope="module")
def files() -> list[bytes]:
    rng = np.random.default_rng(0)
    return [encode(draw_shape(SHAPES[i % 8], rng, 48), "PNG") for i in range(24)]


def collapsed(pixels: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    return np.tile(np.eye(1, 8, dtype=np.float32), (len(pixels), 1))


def test_the_score_is_perfect_for_the_edit_that_does_nothing_and_zero_for_a_collapsed_encoder(
    files: list[bytes],
) -> None:
    nothing = {"nothing": lambda image, rng: image}
    perfect = label_free(raw_pixels, files, SPEC, seed=0, edits=nothing)
    # Resampled twice instead of once, so not the same bytes, but the nearest all the same.
    assert perfect.recall_at_1.mean == perfect.mean_reciprocal_rank.mean == 1.0
    # All cosines tie: a score that breaks ties in favour of the original would call this perfect.
    point = label_free(collapsed, files, SPEC, seed=0, edits=nothing)
    assert point.recall_at_1.mean == 0.0 and point.mean_reciprocal_rank.mean == pytest.approx(1 / 24)


def test_scores_repeat_and_belong_to_their_queries(files: list[bytes]) -> None:
    first = label_free(difference_hash, files, SPEC, seed=0, queries=10)
    again = label_free(difference_hash, files, SPEC, seed=0, queries=10)
    assert np.array_equal(first.ranks, again.ranks) and first.queries_sha256 == again.queries_sha256
    assert first.ranks.shape == (len(EDITS), 10) and first.gallery == 24 and set(first.by_edit) == set(EDITS)
    assert first.recall_at_1.mean == pytest.approx((first.ranks == 0).mean())
    assert first.mean_reciprocal_rank.mean == pytest.approx((1 / (first.ranks + 1)).mean())
    for other in (
        label_free(difference_hash, files, SPEC, seed=1, queries=10),
        label_free(difference_hash, files[::-1], SPEC, seed=0, queries=10),
    ):
        assert other.queries_sha256 != first.queries_sha256
        with pytest.raises(ValueError, match="measured on different"):
            compare(first, other)


def test_images_and_a_given_gallery_give_the_same_score(files: list[bytes]) -> None:
    pixels = np.stack([preprocess(data, SPEC).pixels for data in files])
    from_bytes = label_free(raw_pixels, files, SPEC, seed=0, queries=8)
    given = label_free(raw_pixels, files, SPEC, seed=0, queries=8, gallery=raw_pixels(pixels))
    assert np.array_equal(from_bytes.ranks, given.ranks)
    images = [Image.fromarray(preprocess(data, PreprocessSpec(size=48)).pixels) for data in files]
    assert np.array_equal(from_bytes.ranks, label_free(raw_pixels, images, SPEC, seed=0, queries=8).ranks)


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_thin_pictures_are_edited(files: list[bytes], fit: Literal["crop", "pad"]) -> None:
    thin = [encode(noise(400, 5, seed), "PNG") for seed in (1, 2)] + [encode(noise(5, 400, 3), "PNG")]
    found = label_free(raw_pixels, [*files[:3], *thin], PreprocessSpec(size=32, fit=fit), seed=0)
    assert found.ranks.shape == (len(EDITS), 6) and found.unreadable == 0


def test_pictures_that_cannot_be_read_are_left_out_and_counted(files: list[bytes]) -> None:
    broken = [files[0], b"no picture", *files[1:5], b""]
    found = label_free(raw_pixels, broken, SPEC, seed=0)
    assert found.pictures.tolist() == [0, 2, 3, 4, 5] and (found.gallery, found.unreadable) == (5, 2)
    assert (found.ranks < 5).all()
    # With features made before the file was damaged: it is still searched, but no longer edited.
    rows = np.stack([preprocess(data, SPEC).pixels for data in files[:6]])
    damaged = [*files[:5], b"no picture"]
    later = label_free(raw_pixels, damaged, SPEC, seed=0, gallery=raw_pixels(rows))
    assert later.pictures.tolist() == [0, 1, 2, 3, 4] and (later.gallery, later.unreadable) == (6, 1)
    whole = label_free(raw_pixels, files[:6], SPEC, seed=0, gallery=raw_pixels(rows))
    np.testing.assert_array_equal(later.ranks, whole.ranks[:, :5])
    with pytest.raises(RefusalError, match="at least 2"):
        label_free(raw_pixels, [files[0], b"no picture"], SPEC, seed=0)


def test_encoders_of_two_input_sizes_are_compared_on_the_same_edited_pictures(files: list[bytes]) -> None:
    small, large = SPEC, PreprocessSpec(size=64, fit="pad")
    seen: list[tuple[int, int]] = []

    def watch(image: Image.Image, rng: np.random.Generator) -> Image.Image:
        seen.append(image.size)
        return image

    alone = [label_free(raw_pixels, files, spec, seed=0, queries=4, edits={"watch": watch}) for spec in (small, large)]
    assert set(seen[:4]) == {(64, 64)} and set(seen[4:]) == {(128, 128)}
    with pytest.raises(ValueError, match="measured on different"):
        compare(*alone)
    seen.clear()
    side = editing_side(32, 64)
    compare(*(label_free(raw_pixels, files, spec, 0, 4, {"watch": watch}, side=side) for spec in (small, large)))
    assert set(seen) == {(128, 128)}


def test_comparison_is_paired_and_signed(files: list[bytes]) -> None:
    rng = np.random.default_rng(0)
    blind = rng.normal(size=(32 * 32 * 3, 2))

    def weak(pixels: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        return unit_rows(raw_pixels(pixels) @ blind)

    scores = label_free_all({"hash": difference_hash, "weak": weak}, files, SPEC, seed=0)
    found = compare(scores["weak"], scores["hash"])
    expected = scores["hash"].mean_reciprocal_rank.mean - scores["weak"].mean_reciprocal_rank.mean
    assert found.mean_reciprocal_rank.mean == pytest.approx(expected)
    assert found.verdict == "better" and compare(scores["hash"], scores["weak"]).verdict == "worse"
    same = compare(scores["hash"], scores["hash"])
    assert same.verdict == "no difference" and same.mean_reciprocal_rank == (0, 0, 0, 0)
    # Paired: the error of the difference of two alike encoders is far below that of either.
    alike = label_free(lambda p: unit_rows(difference_hash(p) + 0.01), files, SPEC, seed=0)
    paired = compare(scores["hash"], alike).mean_reciprocal_rank.standard_error
    assert paired < 0.5 * scores["hash"].mean_reciprocal_rank.standard_error


def test_too_few_pictures_are_refused(files: list[bytes]) -> None:
    with pytest.raises(RefusalError, match="at least 2"):
        label_free(raw_pixels, files[:1], SPEC, seed=0)


def test_neighbor_agreement_between_the_same_and_between_unrelated_encoders() -> None:
    rng = np.random.default_rng(0)
    a, b = unit_rows(rng.normal(size=(200, 8))), unit_rows(rng.normal(size=(200, 8)))
    rotation = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    assert neighbor_agreement(a, a) == 1.0
    assert neighbor_agreement(a, unit_rows(a @ rotation)) == pytest.approx(1.0, abs=0.005)
    assert neighbor_agreement(a, b) == pytest.approx(10 / 199, abs=0.02)
