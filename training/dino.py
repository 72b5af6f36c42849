"""DINO (Caron et al., ICCV 2021) as a method of the loop: the baseline that every claim about SOP is measured against.

The same student, teacher, head and views; what differs is the loss: K learnable prototypes, their softmax, and a centre
that is subtracted from the teacher's logits.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.config import Recipe
from training.distributed import all_mean
from training.method import Method, Moment, Outputs, crop_targets
from training.stabilisers import koleo


class DINO(Method):
    """Parameters: `prototypes` [K, d] of the student (used with unit rows: weight normalisation with its gain fixed to
    1, as published). Buffers: `teacher_prototypes`, their moving average, and `centre` [K]."""

    teacher_prototypes: Tensor
    centre: Tensor

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.prototypes = nn.Parameter(torch.empty(recipe.prototypes, recipe.head_dim))
        nn.init.trunc_normal_(self.prototypes, std=0.02)
        self.register_buffer("teacher_prototypes", self.prototypes.detach().clone())
        self.register_buffer("centre", torch.zeros(recipe.prototypes))

    def terms(self, outputs: Outputs, moment: Moment, generator: torch.Generator) -> dict[str, Tensor]:
        prototypes: Tensor = self.prototypes
        if moment.step < self.recipe.prototype_freeze * moment.steps:  # published: frozen during the first epoch
            prototypes = prototypes.detach()
        logits = outputs.student @ F.normalize(prototypes, dim=1).T / self.recipe.student_temperature
        targets = crop_targets(self._targets(outputs.teacher, moment), outputs.views)
        pairs = (2 * outputs.views - 2) * outputs.pictures
        loss = -(targets * logits.log_softmax(-1)).sum() / pairs
        if not any(self.recipe.koleo_weight):
            return {"loss_image": loss, "loss": loss}
        views = outputs.student[: 2 * outputs.pictures].chunk(2)  # as DINOv2, on the head's unit rows here
        spread = torch.stack([koleo(view, outputs.groups) for view in views]).mean()
        return {"loss_image": loss, "koleo": spread, "loss": loss + moment.koleo_weight * spread}

    @torch.no_grad()
    def _targets(self, teacher: Tensor, moment: Moment) -> Tensor:
        return ((self._logits(teacher) - self.centre) / moment.teacher_temperature).softmax(-1)

    def _logits(self, teacher: Tensor) -> Tensor:
        return teacher @ F.normalize(self.teacher_prototypes, dim=1).T

    @torch.no_grad()
    def update(self, outputs: Outputs, moment: Moment) -> None:
        logits = self._logits(outputs.teacher)  # of the prototypes that made this step's targets
        self.centre.lerp_(all_mean(logits.mean(0)), 1.0 - self.recipe.centre_momentum)
        self.teacher_prototypes.lerp_(self.prototypes.detach(), 1.0 - moment.momentum)

    @torch.no_grad()
    def diagnostics(self, heads: Tensor, moment: Moment) -> dict[str, float]:
        targets = self._targets(heads.to(self.centre), moment).double()
        mean = targets.mean(0)
        return {
            "vote_entropy": float(-(targets * targets.clamp_min(1e-12).log()).sum(-1).mean()),
            "mean_vote_entropy": float(-(mean * mean.clamp_min(1e-12).log()).sum()),
            "max_entropy": math.log(self.recipe.prototypes),
        }
