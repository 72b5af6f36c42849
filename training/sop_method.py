"""SOP and MaSSL as methods of the loop: memories, draws, losses and stabilisers."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from training.config import Recipe
from training.device import send
from training.distributed import all_mean
from training.memory import RingMemory
from training.method import Method, Moment, Outputs
from training.prototypes import Prototypes, draw_many, draw_prototypes
from training.seeds import derive
from training.sop import image_loss_given, patch_loss, vote_statistics
from training.stabilisers import koleo, mean_entropy_gap, sigreg, sinkhorn, variance_hinge
from training.vote import vote


class SOP(Method):
    """Self-Organizing Visual Prototypes (Silva et al., ICML 2025): `training/sop.py` applied to two ring memories."""

    centre: Tensor

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.memory = RingMemory(recipe.memory, recipe.head_dim, recipe.seed)
        self.patch_memory = RingMemory(recipe.patch_memory, recipe.head_dim, recipe.seed + 1)
        self.register_buffer("centre", torch.zeros(recipe.head_dim))
        self.keeps_patches = recipe.mim_weight > 0

    def terms(self, outputs: Outputs, moment: Moment, generator: torch.Generator) -> dict[str, Tensor]:
        r = self.recipe
        student, teacher = self._centred(outputs.student), self._centred(outputs.teacher)
        parts = [
            self._image_terms(student, teacher, outputs.views, prototypes, moment)
            for prototypes in self.draw(generator, moment)
        ]
        terms = {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}
        loss = terms["loss_image"]
        if r.mean_entropy_weight:
            loss = loss + r.mean_entropy_weight * terms["mean_entropy_gap"]
        views = outputs.student[: 2 * outputs.pictures].chunk(2)
        if any(r.koleo_weight):  # the same terms at every step, though the weight may reach 0
            terms["koleo"] = torch.stack([koleo(view, outputs.groups) for view in views]).mean()
            loss = loss + moment.koleo_weight * terms["koleo"]
        if r.variance_weight:
            terms["variance"] = torch.stack([variance_hinge(view) for view in views]).mean()
            loss = loss + r.variance_weight * terms["variance"]
        if r.sigreg_weight:
            terms["sigreg"] = torch.stack([sigreg(view, generator) for view in views]).mean()
            loss = loss + r.sigreg_weight * terms["sigreg"]
        if outputs.mask is not None:
            rows = self.drawn_from(self.patch_memory, moment.step, r.patch_anchors, r.patch_support)
            patches = draw_prototypes(
                rows, r.patch_anchors, r.patch_support, generator, r.smoothing,
                support_weight=r.support_weight,
            )  # fmt: skip
            terms["loss_patch"] = patch_loss(
                outputs.student_masked, outputs.teacher_masked, outputs.mask, patches,
                r.student_temperature, moment.teacher_temperature, outputs.masked_at,
            )  # fmt: skip
            loss = loss + r.mim_weight * terms["loss_patch"]
        return {**terms, "loss": loss}

    def drawn_from(self, memory: RingMemory, step: int, anchors: int, support: int) -> Tensor:
        """The rows of a memory [n, d] that a step's prototypes are drawn from."""
        r = self.recipe
        written = step * r.batch_size  # known without asking the device
        enough = anchors * (2 if r.halved_anchors else 1) + max(1, support)
        if r.anchors_from == "all" or not enough <= written < len(memory.rows):
            return memory.rows
        return memory.rows[:written]

    def draw(self, generator: torch.Generator, moment: Moment) -> list[Prototypes]:
        """The prototype sets of one step: T independent draws, whose losses are averaged (1.6)."""
        r = self.recipe
        rows = self.drawn_from(self.memory, moment.step, r.anchors, r.support)
        return draw_many(
            rows, r.tasks, r.anchors, r.support, generator, r.smoothing,
            halved_anchors=r.halved_anchors, support_weight=r.support_weight,
        )  # fmt: skip

    def _image_terms(
        self, student: Tensor, teacher: Tensor, views: int, prototypes: Prototypes, moment: Moment
    ) -> dict[str, Tensor]:
        r = self.recipe
        with torch.no_grad():
            targets = vote(teacher, prototypes, moment.teacher_temperature)
            if r.teacher_votes == "sinkhorn":
                targets = sinkhorn(targets)
        terms = {"loss_image": image_loss_given(targets, student, views, prototypes, r.student_temperature)}
        if r.mean_entropy_weight:
            terms["mean_entropy_gap"] = mean_entropy_gap(vote(student, prototypes, r.student_temperature))
        return terms

    def _centred(self, rows: Tensor) -> Tensor:
        if self.recipe.teacher_votes != "centred":
            return rows
        return F.normalize(rows - self.centre, dim=-1, eps=1e-6)

    @torch.no_grad()
    def update(self, outputs: Outputs, moment: Moment) -> None:
        teacher = outputs.teacher
        if self.recipe.teacher_votes == "centred":
            teacher = self._centred(teacher)
            self.centre.lerp_(all_mean(outputs.teacher.mean(0)), 0.1)
        self.memory.push(teacher[outputs.pictures :])
        if self.keeps_patches:
            self.patch_memory.push(outputs.teacher_drawn)

    @torch.no_grad()
    def diagnostics(self, heads: Tensor, moment: Moment) -> dict[str, float]:
        r = self.recipe
        generator = torch.Generator().manual_seed(derive(r.seed, "health", 0))
        rows = self.drawn_from(self.memory, moment.step, r.anchors, r.support).cpu().float()
        prototypes = draw_prototypes(
            rows, r.anchors, r.support, generator, r.smoothing, support_weight=r.support_weight
        )
        if r.teacher_votes == "centred":
            heads = F.normalize(heads - self.centre.cpu().float(), dim=-1)
        votes = vote_statistics(heads, prototypes, moment.teacher_temperature)
        found = {
            "vote_entropy": votes.entropy,
            "mean_vote_entropy": votes.entropy_of_mean,
            "max_entropy": math.log(r.anchors),
            "voter_entropy": votes.voter_entropy,
            "voter_max_entropy": math.log(r.anchors * (r.support + 1)),
            "leak": votes.leak,
            "support_cosine": votes.support_cosine,
            "memory_age": min(moment.step, r.memory / r.batch_size),
        }
        return {name: value for name, value in found.items() if not math.isnan(value)}


class MaSSL(SOP):
    """MaSSL (Silva et al. 2024): every row of the memory is its own class, in random blocks of P whose losses are
    averaged. It is SOP with k = 0 and ε = 0, drawn over all N / P blocks of one permutation (spec/sop.md section 6)."""

    def draw(self, generator: torch.Generator, moment: Moment) -> list[Prototypes]:
        """All blocks of one permutation of the memory."""
        rows = self.drawn_from(self.memory, moment.step, self.recipe.anchors, 0)
        order = send(torch.randperm(len(rows), generator=generator), rows.device)
        blocks = order[: len(rows) // self.recipe.anchors * self.recipe.anchors].view(-1, self.recipe.anchors)
        return [Prototypes(rows[block][:, None], rows.new_ones(len(block), 1)) for block in blocks]
