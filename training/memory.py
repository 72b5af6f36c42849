"""The ring memories of teacher embeddings (spec/sop.md 1.3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.distributed import gather_rows


class RingMemory(nn.Module):
    """A first-in first-out memory of unit rows; it starts with random ones.

    Buffers: `rows` [N, d] float32, `head` (where the next row goes).
    """

    rows: Tensor
    head: Tensor

    def __init__(self, size: int, dim: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("rows", F.normalize(torch.randn(size, dim, generator=generator), dim=1))
        self.register_buffer("head", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def push(self, rows: Tensor) -> None:
        """Write the rows [b, d] of every rank, in rank order and b·W ≤ N, over the oldest ones; a row that is not finite
        leaves the old one. Push after the loss: a batch never votes on itself."""
        rows = gather_rows(rows)
        size, count = len(self.rows), len(rows)
        if count > size:
            raise ValueError(f"{count} rows do not fit a memory of {size}")
        at = (self.head + torch.arange(count, device=self.rows.device)) % size
        rows = rows.to(self.rows.dtype)
        self.rows[at] = torch.where(rows.isfinite().all(1, keepdim=True), rows, self.rows[at])
        self.head.copy_((self.head + count) % size)
