"""Masks for SOP-MIM (spec/sop.md 1.7)."""

from __future__ import annotations

import math

import pytest
import torch

from training.masks import MaskKind, block_masks, draw_masks


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", ["block", "random"])
def test_masks_repeat_per_seed_and_keep_their_share(kind: MaskKind) -> None:
    masks = draw_masks(400, 14, 14, 0.5, (0.1, 0.5), kind, generator())
    assert masks.shape == (400, 196) and masks.dtype == torch.bool
    share = masks.float().mean(1)
    assert 0.42 < (share > 0).float().mean().item() < 0.58
    assert share.max().item() <= 0.5 + 0.5 / 196
    assert 0.2 < share[share > 0].mean().item() < 0.35
    assert torch.equal(masks, draw_masks(400, 14, 14, 0.5, (0.1, 0.5), kind, generator()))
    assert not torch.equal(masks, draw_masks(400, 14, 14, 0.5, (0.1, 0.5), kind, generator(1)))
    # Every place is masked about as often as any other.
    if kind == "random":
        often = masks[share > 0].float().mean(0)
        assert often.min() > 0.15 and often.max() < 0.45


@pytest.mark.parametrize(("height", "width"), [(14, 14), (6, 6), (3, 5), (1, 4), (16, 7)])
def test_random_masks_are_exact(height: int, width: int) -> None:
    for r in (0.0, 0.3, 1.0):
        masks = draw_masks(20, height, width, 1.0, (r, r), "random", generator())
        assert (masks.sum(1) == round(r * height * width)).all()


def test_ibots_fixed_ratio_is_expressible() -> None:
    masks = draw_masks(200, 14, 14, 1.0, (0.3, 0.3), "block", generator())
    covered = masks.sum(1)
    assert covered.max() <= math.floor(0.3 * 196) and covered.float().mean() > 0.9 * 0.3 * 196 and covered.min() > 0


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_probability_bounds(probability: float) -> None:
    masks = draw_masks(50, 8, 8, probability, (0.2, 0.4), "block", generator())
    assert (masks.any(1).float().mean() == probability).item()


def test_the_generator_moves_on_by_the_same_amount_whatever_was_drawn() -> None:
    after = []
    for probability in (0.0, 1.0):
        g = generator()
        draw_masks(8, 14, 14, probability, (0.1, 0.5), "block", g)
        after.append(torch.rand(3, generator=g))
    assert torch.equal(*after)


def test_masks_are_unions_of_blocks() -> None:
    """With one block's worth of patches, the mask is a rectangle of the allowed aspect ratio."""
    masks = draw_masks(300, 12, 12, 1.0, (16 / 144, 16 / 144), "block", generator()).view(-1, 12, 12)
    rectangles = 0
    for mask in masks:
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        h, w = int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1
        if int(mask.sum()) == h * w:
            rectangles += 1
            if h * w >= 12:
                assert 0.25 <= h / w <= 4.0  # (0.3, 1 / 0.3), up to the rounding of the sides
    assert rectangles > 60


def test_block_masks_is_the_block_kind() -> None:
    a = block_masks(30, 14, 14, 0.5, (0.1, 0.5), generator(3))
    assert torch.equal(a, draw_masks(30, 14, 14, 0.5, (0.1, 0.5), "block", generator(3)))
