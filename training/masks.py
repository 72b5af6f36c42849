"""Masks of global crops for SOP-MIM (spec/sop.md 1.7): block-wise as in BEiT and iBOT, or uniformly random patches.

iBOT's options translate to (`probability`, `ratio`): pred_ratio 0.3, var 0 → (1, (0.3, 0.3)); pred_ratio 0 0.3,
var 0 0.2 → (0.5, (0.1, 0.5)).
"""

from __future__ import annotations

import math
import random
from typing import Literal

import numpy as np
import torch
from torch import Tensor

MaskKind = Literal["block", "random"]

_LOG_ASPECT = math.log(0.3), math.log(1 / 0.3)
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
        order = torch.rand(count, L, generator=generator).argsort(1)
        chosen = torch.where(chance < probability, wanted.round(), 0.0)
        rank = torch.empty_like(order).scatter_(1, order, torch.arange(L).expand(count, L))
        return rank < chosen.unsqueeze(1)
    numbers = random.Random(int(torch.randint(2**62, (1,), generator=generator)))
    sizes = torch.where(chance < probability, wanted.floor(), 0.0).int().tolist()
    stride = -(-L // 8)
    packed = b"".join(_blocks(size, height, width, numbers).to_bytes(stride, "little") for size in sizes)
    bits = np.unpackbits(np.frombuffer(packed, np.uint8).reshape(count, stride), axis=1, count=L, bitorder="little")
    return torch.from_numpy(bits.astype(np.bool_))


def _blocks(wanted: int, height: int, width: int, numbers: random.Random) -> int:
    """Blocks of at most `wanted` patches in all, as the bits of an integer (bit row·width + column).

    The area of a block is U((min(height, width)//3)², what is left); it is accepted when it adds 1 … what is left new
    patches; ten failures in a row end the mask.
    """
    mask, left = 0, wanted
    smallest = max(1, min(height, width) // 3) ** 2
    draw = numbers.random
    while left > 0:
        for _ in range(_TRIES):
            low = min(smallest, left)
            area = low + draw() * (left - low)
            aspect = math.exp(_LOG_ASPECT[0] + draw() * (_LOG_ASPECT[1] - _LOG_ASPECT[0]))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (0 < h <= height and 0 < w <= width):
                continue
            top, start = int(draw() * (height - h + 1)), int(draw() * (width - w + 1))
            block = _column(h, width) * ((1 << w) - 1) << (top * width + start)
            new = (block & ~mask).bit_count()
            if 0 < new <= left:
                mask |= block
                left -= new
                break
        else:
            return mask
    return mask


def _column(h: int, width: int) -> int:
    """Bits 0, width, 2·width … (h − 1)·width."""
    return ((1 << h * width) - 1) // ((1 << width) - 1)


def block_masks(
    count: int, height: int, width: int, probability: float, ratio: tuple[float, float], generator: torch.Generator
) -> Tensor:
    """`draw_masks` of kind "block"."""
    return draw_masks(count, height, width, probability, ratio, "block", generator)
