"""Block-wise masks of global crops (spec/sop.md 1.7)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def block_masks(
    count: int, height: int, width: int, probability: float, ratio: tuple[float, float], generator: torch.Generator
) -> Tensor:
    """Masks [count, height·width], bool. Each is empty with probability 1 − `probability`, else covers at most r·L
    patches, r ~ U(ratio), by blocks of aspect ratio in (0.3, 1/0.3)."""
    masks = torch.zeros(count, height, width, dtype=torch.bool)
    for mask in masks:
        # Fixed number of draws up front: the stream does not depend on what a mask accepts.
        chance, share = torch.rand(2, generator=generator).tolist()
        if chance < probability:
            r = ratio[0] + share * (ratio[1] - ratio[0])
            _fill(mask, int(r * height * width), generator)
    return masks.flatten(1)


def _fill(mask: Tensor, wanted: int, generator: torch.Generator) -> None:
    height, width = mask.shape
    smallest = max(1, min(height, width) // 3) ** 2
    log_aspect = math.log(0.3), math.log(1 / 0.3)
    done = 0
    while done < wanted:
        added = 0
        for _ in range(10):
            a, b, c, d = torch.rand(4, generator=generator).tolist()
            left = wanted - done
            low = min(smallest, left)
            area = low + a * (left - low)
            aspect = math.exp(log_aspect[0] + b * (log_aspect[1] - log_aspect[0]))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (0 < h <= height and 0 < w <= width):
                continue
            top, start = int(c * (height - h + 1)), int(d * (width - w + 1))
            block = mask[top : top + h, start : start + w]
            new = int((~block).sum())
            if 0 < new <= left:
                block.fill_(True)
                added = new
                break
        if not added:
            return
        done += added
