"""Values that change over the steps."""

from __future__ import annotations

import math


def cosine(step: int, steps: int, start: float, end: float) -> float:
    """From `start` at step 0 to `end` at the last step, along half a cosine."""
    t = min(1.0, step / max(1, steps - 1))
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * t))


def warmup_cosine(step: int, steps: int, peak: float, end: float, warmup: float) -> float:
    """Linear from 0 to `peak` over `warmup` (a share of the steps), then a cosine to `end`."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return peak * (step + 1) / rising
    return cosine(step - rising, steps - rising, peak, end)


def linear_warmup(step: int, steps: int, start: float, end: float, warmup: float) -> float:
    """Linear from `start` to `end` over `warmup` (a share of the steps), then constant."""
    return start + (end - start) * min(1.0, step / max(1, round(warmup * steps)))
