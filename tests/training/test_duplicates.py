"""Perceptual hashes and the groups made from them."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw

from export.preprocess import Pixels, PreprocessSpec, preprocess
from tests.conftest import encode, noise
from training.duplicates import MAX_DISTANCE, Hashes, difference_hash, near_duplicates, perceptual_hash

SPEC = PreprocessSpec(size=48, fit="squeeze")


def squeezed(data: bytes) -> Pixels:
    return preprocess(data, SPEC).pixels


def distances(a: Hashes, b: Hashes) -> np.ndarray:
    return np.bitwise_count(a ^ b).sum(-1, dtype=np.int64)


def test_a_copy_encoded_or_resized_again_is_found_and_other_pictures_are_not() -> None:
    originals = [noise(200, 150, seed) for seed in range(12)]
    copies: list[bytes] = []
    for image in originals:
        first = encode(image, quality=95)
        again = Image.open(io.BytesIO(first))
        copies += [
            first,
            encode(again, quality=40),
            encode(again.resize((90, 68)), quality=85),
            encode(again, "PNG"),
        ]
    groups = near_duplicates(difference_hash(np.stack([squeezed(c) for c in copies])))
    assert np.array_equal(groups, np.repeat(np.arange(12) * 4, 4))


def test_the_hash_is_what_its_definition_says() -> None:
    """Rising from left to right gives ones, falling gives zeros, and so does a rise below the dead zone."""
    rising = np.broadcast_to(np.linspace(0, 255, 48, dtype=np.uint8)[None, :, None], (48, 48, 3))
    flat = np.full((48, 48, 3), 90, np.uint8)
    flat[:, 24:] += 1
    upper = rising.copy()
    upper[24:] = upper[24:, ::-1]
    hashes = difference_hash(np.stack([rising, rising[:, ::-1], flat, upper]))
    assert np.bitwise_count(hashes).sum(1).tolist() == [256, 0, 0, 128]
    assert (hashes[3] == 2**64 - 1).tolist() == [True, True, False, False]  # row by row from the top


@pytest.mark.parametrize("max_distance", [0, 5, 16])
def test_groups_are_the_connected_components_of_all_pairs(max_distance: int) -> None:
    rng = np.random.default_rng(0)
    centres = rng.integers(0, 2**63, (40, 4)).astype(np.uint64)
    rows = []
    for i in range(300):
        bits = np.unpackbits(centres[i % 40].view(np.uint8))
        bits[rng.choice(256, rng.integers(0, 12), replace=False)] ^= 1
        if i % 40 == 0:
            bits[rng.random(256) < 0.9] = 0  # little structure
        if i % 40 == 1:
            bits[rng.random(256) < 0.9] = 1
        rows.append(np.packbits(bits).view(np.uint64))
    hashes = np.stack(rows)
    ones = np.bitwise_count(hashes).sum(1, dtype=np.int64)
    structure = np.minimum(ones, 256 - ones)
    allowed = max_distance * np.minimum(1, (structure[:, None] + structure) / 128)
    near = distances(hashes[:, None], hashes) <= allowed
    reach = near.copy()
    while True:
        wider = (reach.astype(np.int64) @ near.astype(np.int64)) > 0
        if np.array_equal(wider, reach):
            break
        reach = wider
    expected = reach.argmax(1)  # the smallest position in the component
    for threads in (1, 3):
        assert np.array_equal(near_duplicates(hashes, max_distance, threads), expected)
    distinct = len({h.tobytes() for h in hashes})
    assert (len(set(expected.tolist())) == distinct) is (max_distance == 0)


def test_flat_pictures_are_not_copies_of_each_other() -> None:
    pictures = np.stack([np.full((48, 48, 3), 100, np.uint8) for _ in range(3)])
    pictures[1, 4:10, 4:10] = 250  # a few bits each, in different places
    pictures[2, 30:36, 30:36] = 250
    hashes = difference_hash(pictures)
    assert 0 < distances(hashes[1], hashes[2]) <= MAX_DISTANCE
    assert near_duplicates(hashes).tolist() == [0, 1, 2]


def stripes(rng: np.random.Generator) -> Pixels:
    """Rows of random grey, as the hash sees nothing of."""
    return np.repeat(np.repeat(rng.integers(0, 256, (48, 1, 1), dtype=np.uint8), 48, 1), 3, 2)


def drawing(rng: np.random.Generator) -> Pixels:
    """Four faint lines on grey paper."""
    image = Image.new("L", (48, 48), 200)
    for _ in range(4):
        ends = [tuple(rng.integers(0, 48, 2).tolist()) for _ in range(2)]
        ImageDraw.Draw(image).line(ends, fill=200 - int(rng.integers(4, 14)))
    return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("kind", ["horizontal", "vertical", "slopes", "drawings"])
def test_different_plain_pictures_are_not_marked_but_equal_ones_are(kind: str) -> None:
    rng = np.random.default_rng(1)
    if kind == "slopes":
        ends = rng.integers(120, 256, 100)
        rows = [np.linspace(0, end, 48, dtype=np.uint8) for end in np.unique(ends)]
        pictures = np.stack([np.broadcast_to(row[None, :, None], (48, 48, 3)) for row in rows])
    else:
        pictures = np.stack([drawing(rng) if kind == "drawings" else stripes(rng) for _ in range(100)])
        pictures = pictures.transpose(0, 2, 1, 3) if kind == "vertical" else pictures
    count = len(pictures)
    hashes, plain = perceptual_hash(np.concatenate([pictures, pictures[:3]]))
    assert plain.mean() > 0.7
    assert near_duplicates(hashes).tolist() == [*range(count), 0, 1, 2]


def test_pictures_with_structure_keep_their_difference_hash() -> None:
    pictures = np.stack([squeezed(encode(noise(200, 150, seed))) for seed in range(12)])
    hashes, plain = perceptual_hash(pictures)
    assert not plain.any() and np.array_equal(hashes, difference_hash(pictures))


def test_no_pictures() -> None:
    empty, plain = perceptual_hash(np.zeros((0, 48, 48, 3), np.uint8))
    assert empty.shape == (0, 4) and plain.shape == (0,) and near_duplicates(empty).shape == (0,)
