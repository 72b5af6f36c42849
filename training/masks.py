"""Masks of global crops for SOP-MIM (spec/sop.md 1.7): block-wise as in BEiT and iBOT, or uniformly random patches.

iBOT's options translate to (`probability`, `ratio`): pred_ratio 0.3, var 0 → (1, (0.3, 0.3)); pred_ratio 0 0.3,
var 0 0.2 → (0.5, (0.1, 0.5)).
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

MaskKind = Literal["block", "random"]

_LOG_STRETCH = math.log(1 / 0.3)  # aspect ratios lie in 0.3 … 1 / 0.3, log-uniformly
_TRIES = 10


def draw_masks(
    count: int, height: int, width: int, probability: float, ratio: tuple[float, float], kind: MaskKind,
    generator: torch.Generator,
) -> Tensor:  # fmt: skip
    """Masks [count, height·width], bool, on the CPU; True is masked.

    Each mask is empty with probability 1 − `probability`; otherwise its share is r ~ U(`ratio`) of the L = height·width
    patches: exactly round(r·L) of them for "random", at most r·L for "block" (blocks of aspect ratio in (0.3, 1/0.3)).
    `generator` is a CPU generator; the number of draws from it does not depend on their values.
    """
    L = height * width
    chance, share = torch.rand(2, count, generator=generator, dtype=torch.float64)
    wanted = (ratio[0] + share * (ratio[1] - ratio[0])) * L
    if kind == "random":
        chosen = torch.where(chance < probability, wanted.round(), 0.0).int()
        rank = torch.rand(count, L, generator=generator).numpy().argsort(1).argsort(1)
        return torch.from_numpy(rank < chosen.unsqueeze(1).numpy())
    numbers = random.Random(int(torch.randint(2**62, (1,), generator=generator)))
    sizes = torch.where(chance < probability, wanted.floor(), 0.0).int().tolist()
    blocks = _block_table(height, width)
    stride = -(-L // 8)
    packed = b"".join(
        _cover(size, height, width, blocks, numbers.random).to_bytes(stride, "little") if size else bytes(stride)
        for size in sizes
    )
    bits = np.unpackbits(np.frombuffer(packed, np.uint8).reshape(count, stride), axis=1, count=L, bitorder="little")
    return torch.from_numpy(bits.view(np.bool_))


@functools.lru_cache(8)
def _block_table(height: int, width: int) -> list[list[int]]:
    """Blocks of h rows and w columns at the top left, as the bits of an integer (bit row·width + column)."""
    table = []
    for h in range(height + 1):
        column = sum(1 << row * width for row in range(h))
        table.append([column * ((1 << w) - 1) for w in range(width + 1)])
    return table


def _cover(wanted: int, height: int, width: int, blocks: list[list[int]], draw: Callable[[], float]) -> int:
    """A mask of at most `wanted` patches, as bits.

    The area of a block is U((min(height, width)//3)², what is left); it is accepted when it adds 1 … what is left new
    patches; ten failures in a row end the mask.
    """
    mask, left, failures = 0, wanted, 0
    smallest = max(1, min(height, width) // 3) ** 2
    while left and failures < _TRIES:
        failures += 1
        low = smallest if smallest < left else left
        side = math.sqrt(low + draw() * (left - low))
        stretch = math.exp((draw() - 0.5) * _LOG_STRETCH)  # √ of the aspect ratio
        h, w = int(side * stretch + 0.5), int(side / stretch + 0.5)
        if not (0 < h <= height and 0 < w <= width):
            continue
        corner = int(draw() * (height - h + 1)) * width + int(draw() * (width - w + 1))
        block = blocks[h][w] << corner
        new = (block & ~mask).bit_count()
        if 0 < new <= left:
            mask |= block
            left -= new
            failures = 0
    return mask


def block_masks(
    count: int, height: int, width: int, probability: float, ratio: tuple[float, float], generator: torch.Generator
) -> Tensor:
    """`draw_masks` of kind "block"."""
    return draw_masks(count, height, width, probability, ratio, "block", generator)
