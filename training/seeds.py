"""Seeds of independent random streams, one per purpose and step, so that a resume draws what it would have drawn."""

from __future__ import annotations

import hashlib


def derive(seed: int, purpose: str, number: int) -> int:
    """A seed in 0 … 2⁶³ − 1 for one purpose at one step: independent streams, the same after a resume."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
