"""What a pretraining method is to the loop: the loss of a step, what it keeps between steps, and what it reports.

The loop owns student, teacher, views and optimiser; a method sees only rows of the projection head (`Outputs`). Methods:
`SOP` and `MaSSL` (training/sop_method.py), `DINO` (training/dino.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Outputs(NamedTuple):
    """The heads' unit rows of one step on this rank: B pictures, V = 2 + local crops, crop-major."""

    student: Tensor
    """[CLS] of all crops [V·B, d], with gradient."""
    teacher: Tensor
    """[CLS] of the two global crops [2·B, d]."""
    student_masked: Tensor
    """Masked tokens of the student's global crops [M, d], row-major; [0, d] without masks."""
    teacher_masked: Tensor
    """The teacher's rows at the same tokens [M, d]."""
    teacher_drawn: Tensor
    """One patch per picture, from the second global crop [B, d], for a patch memory; [0, d] where none is kept."""
    mask: Tensor | None
    """[2·B, L] bool, which tokens were masked."""
    groups: Tensor | None
    """[B] int64: pictures of equal number are near-duplicates."""
    masked_at: Tensor | None = None
    """[M] int64: positions of the masked tokens in the flattened mask."""

    @property
    def pictures(self) -> int:
        """B."""
        return len(self.teacher) // 2

    @property
    def views(self) -> int:
        """V."""
        return len(self.student) // self.pictures


class Moment(NamedTuple):
    """Where a run stands: the scheduled values of a step."""

    step: int
    steps: int
    lr: float
    weight_decay: float
    momentum: float
    """EMA momentum of the teacher."""
    teacher_temperature: float
    koleo_weight: float


class Method(nn.Module, ABC):
    """A method's own state is its buffers (memories, centres) and parameters (prototypes): both are checkpointed."""

    keeps_patches: bool = False
    """Whether the teacher draws one patch per picture."""

    @abstractmethod
    def terms(self, outputs: Outputs, moment: Moment, generator: torch.Generator) -> dict[str, Tensor]:
        """The loss terms of a step, with their weighted sum as `loss`. `generator` (CPU) is alike on all ranks."""

    @abstractmethod
    def update(self, outputs: Outputs, moment: Moment) -> None:
        """After the optimiser's step: memories, centres, moving averages."""

    @abstractmethod
    def diagnostics(self, heads: Tensor, moment: Moment) -> dict[str, float]:
        """What the teacher's head rows [M, d] of a fixed sample say about the method; entropies in nats."""


def crop_targets(teacher: Tensor, views: int) -> Tensor:
    """Σ_{j≠i} of the two teacher targets [2·B, P] for every crop i: [V·B, P], crop-major.

    Cross-entropy is linear in its target: the 2V − 2 pairs of 1.6 need one cross-entropy per crop.
    """
    first, second = teacher.chunk(2)
    parts = [second, first]
    if views > 2:
        parts += [first + second] * (views - 2)
    return torch.cat(parts)
