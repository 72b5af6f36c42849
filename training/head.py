"""The projection head: one MLP shared by [CLS] and patch tokens (spec/sop.md 1.2)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Head(nn.Module):
    """Linear, GELU, Linear, GELU, Linear, then unit length. No batch norm, no prototypes."""

    def __init__(self, dim: int, hidden: int, out: int, init: Literal["default", "trunc_normal"] = "default") -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, out)
        )
        if init == "trunc_normal":
            for layer in self.mlp:
                if isinstance(layer, nn.Linear):
                    nn.init.trunc_normal_(layer.weight, std=0.02)
                    nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[M, C] → [M, d], unit rows, float32 (float64 stays)."""
        x = self.mlp(x)
        with torch.autocast(x.device.type, enabled=False):
            return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1, eps=1e-6)
