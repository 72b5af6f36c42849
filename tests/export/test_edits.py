"""Edits change what they are given a copy of, whatever its shape."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from export.edits import EDITS, prepared
from export.preprocess import PreprocessSpec
from tests.conftest import noise


@pytest.mark.parametrize("name", EDITS)
def test_edits_change_the_picture_repeatably_and_keep_its_size(name: str) -> None:
    image = noise(70, 50, seed=3)
    before = image.tobytes()
    edited = EDITS[name](image, np.random.default_rng(1))
    assert image.tobytes() == before  # the argument is left alone
    assert edited.mode == "RGB" and (edited.size == image.size or name == "jpeg")
    assert edited.tobytes() == EDITS[name](image, np.random.default_rng(1)).tobytes()
    drawn = {EDITS[name](image, np.random.default_rng(seed)).tobytes() for seed in range(8)}
    assert len(drawn) > 1
    difference = np.abs(np.asarray(edited.resize(image.size), float) - np.asarray(image, float)).mean()
    assert difference > 2


@pytest.mark.parametrize("size", [(4, 4), (9, 300), (300, 9), (64, 1), (1, 64)])
@pytest.mark.parametrize("name", EDITS)
def test_edits_take_thin_and_tiny_pictures(name: str, size: tuple[int, int]) -> None:
    assert EDITS[name](Image.new("RGB", size, (10, 200, 30)), np.random.default_rng(0)).width > 0


def test_perspective_moves_the_corners_inwards() -> None:
    white = Image.new("RGB", (80, 60), (255, 255, 255))
    edited = np.asarray(EDITS["perspective"](white, np.random.default_rng(0)))[..., 0]
    assert edited[30, 40] == 255 and (edited == 128).mean() > 0.05


def test_a_picture_that_an_edit_made_thin_is_prepared() -> None:
    assert prepared(Image.new("RGB", (64, 1)), PreprocessSpec(size=8)).shape == (8, 8, 3)
