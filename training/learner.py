"""One run's networks, method and optimiser, and the step that moves them. No files, no console: see training/loop.py."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from training.config import Recipe
from training.device import send
from training.dino import DINO
from training.distributed import average_gradients, rank, world_size
from training.encoder import Student, Teacher, blocks, build_backbone, layers, load_initial, reset_linear_layers, width
from training.head import Head
from training.loader import Batch
from training.masks import draw_masks
from training.method import Method, Moment, Outputs
from training.schedules import cosine, linear_warmup, warmup_cosine
from training.seeds import derive
from training.sharding import (
    gathered_parts,
    load_whole,
    load_whole_optimizer,
    local,
    norms,
    require_grad,
    shard,
    sync_gradients,
    whole,
)  # fmt: skip
from training.sop_method import SOP, MaSSL
from training.views import ViewDraw, ViewKind, Views

METHODS: dict[str, type[Method]] = {"sop": SOP, "massl": MaSSL, "dino": DINO}


class Speed(NamedTuple):
    """What changes speed and memory, not the result."""

    dtype: torch.dtype = torch.float32
    """Of parameters and losses: float32, or float64 for comparisons."""
    bf16: bool = False
    """Backbone and head in bfloat16 (autocast)."""
    accumulate: int = 1
    """Parts that a rank's batch is computed in; the loss is that of the whole batch all the same."""
    compile: bool = False
    """torch.compile of every block."""
    checkpoint_activations: bool = False
    """Compute the student's blocks again in the backward pass instead of keeping their activations."""
    shard: bool = False
    """Split the student's weights, gradients and moments over the ranks (FSDP2)."""


class Crops(NamedTuple):
    """Views of b pictures."""

    globals_: Tensor
    """[2·b, 3, H, W], crop-major."""
    locals_: Tensor | None
    """[V_l·b, 3, h, w]."""
    mask: Tensor | None
    """[2·b, L] bool."""
    drawn: Tensor | None
    """[b] int64, the patch of each second global crop that enters the patch memory."""
    masked_at: Tensor | None = None
    """[M] int64, positions of the masked tokens in the flattened mask."""


class NotFiniteError(Exception):
    """A step's loss or gradients are not finite; nothing was updated. `terms`: its loss terms."""

    def __init__(self, terms: dict[str, Tensor]) -> None:
        super().__init__("the loss or its gradients are not finite")
        self.terms = {name: value.detach() for name, value in terms.items()}


class Learner:
    """Student, teacher, method and optimiser of a recipe. `init`: file or run folder of the weights to start from."""

    def __init__(
        self, recipe: Recipe, device: torch.device, speed: Speed, views: Views, init: Path | None = None
    ) -> None:
        self.recipe, self.device, self.speed, self.views = recipe, device, speed, views
        torch.manual_seed(recipe.seed)
        backbone = build_backbone(recipe.model, recipe.model_kwargs, recipe.image_size, recipe.drop_path)
        if recipe.weight_init == "default":
            reset_linear_layers(backbone)
        if init is not None:
            load_initial(init, backbone)
        head = Head(width(backbone), recipe.head_hidden, recipe.head_dim, recipe.weight_init)
        still = build_backbone(
            recipe.model, recipe.model_kwargs, recipe.image_size
        )  # the teacher has no stochastic depth
        still.load_state_dict(backbone.state_dict())
        self.method: Method = METHODS[recipe.method](recipe)
        self.student = Student(backbone, head)
        self.teacher = Teacher(still, copy.deepcopy(head))
        if not recipe.mim_weight:
            self.student.mask_token.requires_grad_(False)
        for module in (self.method, self.student, self.teacher):
            module.to(device=device, dtype=speed.dtype)
        if speed.checkpoint_activations:
            backbone.set_grad_checkpointing()  # type: ignore[operator]
        if speed.compile:
            for block in (*blocks(backbone), *blocks(still)):
                block.compile()
        if speed.shard:
            shard(self.student)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.student, self.method, recipe), lr=recipe.lr, fused=True
        )
        self._replica: nn.Module | None = None
        self._frozen = False
        self.checks_at_once = device.type == "cpu"
        """Whether each step looks at its own loss and gradients; a GPU would have to be waited for."""
        self._bad = torch.zeros((), device=device)

    # --- schedules ----------------------------------------------------------------------------------------------

    @property
    def head_steps(self) -> int:
        """Steps with a frozen backbone, at most a third of the run."""
        return min(self.recipe.head_steps, self.recipe.steps // 3)

    def moment(self, step: int) -> Moment:
        """The scheduled values of a step."""
        r = self.recipe
        at = {"step": step, "steps": r.steps}
        start, end = r.teacher_temperature
        return Moment(
            **at,
            lr=warmup_cosine(**at, peak=r.lr, end=r.min_lr, warmup=r.lr_warmup),
            weight_decay=cosine(**at, start=r.weight_decay[0], end=r.weight_decay[1]),
            momentum=cosine(**at, start=r.momentum, end=1.0),
            teacher_temperature=linear_warmup(**at, start=start, end=end, warmup=r.temperature_warmup),
            koleo_weight=cosine(**at, start=r.koleo_weight[0], end=r.koleo_weight[1]),
        )

    def _schedule(self, now: Moment) -> None:
        r = self.recipe
        frozen = now.step < self.head_steps
        # The backbone's own warm-up starts where it is let go.
        backbone = warmup_cosine(
            now.step - self.head_steps, now.steps - self.head_steps, peak=r.lr, end=r.min_lr, warmup=r.lr_warmup
        )
        for group in self.optimizer.param_groups:
            lr = (0.0 if frozen else backbone) if group["backbone"] else now.lr
            group["lr"] = lr * group["scale"]
            group["weight_decay"] = now.weight_decay if group["decays"] else 0.0
        if self._replica is None or self._frozen != frozen:
            require_grad(self.student, backbone=not frozen)
            self._replica, self._frozen = self._wrapped(), frozen

    def _wrapped(self) -> nn.Module:
        if world_size() == 1 or self.speed.shard:
            return self.student
        return DistributedDataParallel(
            self.student, broadcast_buffers=False, gradient_as_bucket_view=True,
            device_ids=[self.device.index] if self.device.type == "cuda" else None,
        )  # fmt: skip

    # --- the step -----------------------------------------------------------------------------------------------

    def step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """One optimiser step on this rank's part of a batch; returns the loss terms (on the device, detached).

        Where the loss or a gradient is not finite, parameters and optimiser stay as they are. On a CPU `NotFiniteError` is
        raised at once; a GPU is not waited for: the loss of this step and of all later ones reads nan, none of them
        updates the student, and what stays finite of teacher and memories moves on until the loop looks at the losses.
        """
        now = self.moment(step)
        self._schedule(now)
        generator = torch.Generator().manual_seed(derive(self.recipe.seed, "prototypes", step))
        terms, outputs = self._backward(self._parts(batch, step), batch.groups, now, generator)
        average_gradients(list(self.method.parameters()))
        gradient_norms = clip_each([*self.student.parameters(), *self.method.parameters()], self.recipe.clip)
        all_finite = (terms["loss"].detach().isfinite() & gradient_norms.isfinite().all()).to(torch.float32)
        if world_size() > 1:
            torch.distributed.all_reduce(all_finite, torch.distributed.ReduceOp.MIN)
        if self.checks_at_once and not bool(all_finite):
            raise NotFiniteError(terms)
        self._bad = torch.maximum(self._bad, 1.0 - all_finite)  # once bad, no further update
        self.optimizer.found_inf = self._bad  # type: ignore[attr-defined]  # the fused kernel skips where it is 1
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for names in gathered_parts(self.student):
            self.teacher.follow(self.student, now.momentum, names)
        self.method.update(outputs, now)
        terms["loss"] = torch.where(self._bad > 0, math.nan, terms["loss"].detach())
        return {name: value.detach() for name, value in terms.items()}

    def _parts(self, batch: Batch, step: int) -> list[Crops]:
        """The views of this rank's pictures, in `accumulate` parts. All numbers are drawn for the global batch."""
        r = self.recipe
        generator = torch.Generator().manual_seed(derive(r.seed, "step", step))
        b = len(batch.pixels)
        count, low = b * world_size(), b * rank()
        aspects = batch.aspects.new_ones(count)
        aspects[low : low + b] = batch.aspects  # the other ranks' rows are drawn and dropped

        def draw(size: int, scale: tuple[float, float], kind: ViewKind) -> ViewDraw:
            return self.views.draw(count, size, scale, kind, generator, aspects).slice(low, low + b)

        large = [draw(r.image_size, r.global_scale, "first"), draw(r.image_size, r.global_scale, "second")]
        small = [draw(r.local_size, r.local_scale, "local") for _ in range(r.local_crops)]
        mask = drawn = masks = None
        if r.mim_weight:
            side = r.image_size // r.patch_size
            masks = draw_masks(2 * count, side, side, r.mask_probability, r.mask_ratio, r.mask_kind, generator)
            masks = masks.view(2, count, -1)[:, low : low + b]  # on the CPU, where their positions are counted
            mask = send(masks, self.device)
            drawn = send(torch.randint(side * side, (count,), generator=generator)[low : low + b], self.device)

        def see(draws: list[ViewDraw], side: int, start: int, end: int) -> Tensor:
            return torch.cat([self.views.apply(batch.pixels[start:end], d.slice(start, end), side) for d in draws])

        size = math.ceil(b / self.speed.accumulate)
        return [
            Crops(
                see(large, r.image_size, at, min(b, at + size)),
                see(small, r.local_size, at, min(b, at + size)) if small else None,
                None if mask is None else mask[:, at : at + size].flatten(0, 1),
                None if drawn is None else drawn[at : at + size],
                None if masks is None else send(masks[:, at : at + size].flatten().nonzero()[:, 0], self.device),
            )
            for at in range(0, b, size)
        ]

    def _backward(
        self, parts: list[Crops], groups: Tensor, now: Moment, generator: torch.Generator
    ) -> tuple[dict[str, Tensor], Outputs]:
        if len(parts) == 1:
            outputs = self._outputs(parts[0], groups, now, 0)
            terms = self.method.terms(outputs, now, generator)
            terms["loss"].backward()
            return terms, outputs
        # KoLeo, Sinkhorn and their like couple the pictures of a batch: the loss is taken of all rows at once, and its
        # gradient with respect to the rows goes back part by part, through a second forward pass (Gao et al. 2021).
        with torch.no_grad():
            whole = join([self._outputs(part, None, now, i) for i, part in enumerate(parts)])
        student, masked = whole.student.requires_grad_(), whole.student_masked.requires_grad_()
        outputs = whole._replace(student=student, student_masked=masked, groups=groups)
        terms = self.method.terms(outputs, now, generator)
        terms["loss"].backward()
        gradients = split(student.grad, masked.grad, parts)
        for i, (part, gradient) in enumerate(zip(parts, gradients, strict=True)):
            if isinstance(self._replica, DistributedDataParallel):
                self._replica.require_backward_grad_sync = i == len(parts) - 1
            sync_gradients(self.student, i == len(parts) - 1)
            rows = self._student(part, now, i)
            pairs = [(r, g) for r, g in zip(rows, gradient, strict=True) if g is not None and len(r)]
            torch.autograd.backward([r for r, _ in pairs], [g for _, g in pairs])
        return terms, outputs

    def _outputs(self, crops: Crops, groups: Tensor | None, now: Moment, part: int) -> Outputs:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.speed.bf16):
            teacher, teacher_masked, drawn = self.teacher(crops.globals_, crops.mask, crops.drawn, crops.masked_at)
        student, masked = self._student(crops, now, part)
        return Outputs(student, teacher, masked, teacher_masked, drawn, crops.mask, groups, crops.masked_at)

    def _student(self, crops: Crops, now: Moment, part: int) -> tuple[Tensor, Tensor]:
        assert self._replica is not None
        torch.manual_seed(derive(self.recipe.seed, f"drop path {rank()} {part}", now.step))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.speed.bf16):
            rows: tuple[Tensor, Tensor] = self._replica(crops.globals_, crops.mask, crops.locals_, crops.masked_at)
        return rows

    # --- state --------------------------------------------------------------------------------------------------

    def state(self, keep: bool = True) -> dict[str, Any]:
        """Everything that a step changes, whole. Every rank must take part; one that does not `keep` it saves memory."""
        return {
            "student": whole(self.student.state_dict(), keep),
            "teacher": self.teacher.state_dict(),
            "method": self.method.state_dict(),
            "optimizer": whole(self.optimizer.state_dict(), keep),
        }

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.teacher.load_state_dict(_renamed(state["teacher"]))
        self.method.load_state_dict(state["method"])
        load_whole(self.student, _renamed(state["student"]))
        load_whole_optimizer(self.optimizer, state["optimizer"])
        self._bad.zero_()


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as they are now: checkpoints of before 2026-11-23 call the backbone `vit`."""
    return {re.sub(r"^vit\.", "backbone.", name): value for name, value in state.items()}


def parameter_groups(student: Student, method: Method, recipe: Recipe) -> list[dict[str, Any]]:
    """AdamW's groups: weights decay, biases and other vectors do not (1.8); with initial weights the backbone's learning
    rate is `backbone_lr` of the head's and falls by `layer_decay` for every block further from it (section 8)."""
    places = layers(student.backbone)
    last = max(places.values())
    groups: dict[tuple[float, bool, bool, bool], dict[str, Any]] = {}
    named = [*student.named_parameters(), *((f"method.{name}", p) for name, p in method.named_parameters())]
    for name, parameter in named:
        backbone = name.startswith("backbone.")
        scale = 1.0
        if backbone:
            scale = recipe.backbone_lr * recipe.layer_decay ** (last - places[name.removeprefix("backbone.")])
        decays = parameter.ndim > 1
        # The method's own are never shards, and the fused kernel takes no mixture.
        group = groups.setdefault((scale, decays, backbone, name.startswith("method.")), {"params": []})
        group["params"].append(parameter)
        group.update(scale=scale, decays=decays, backbone=backbone)
    return list(groups.values())


def join(parts: list[Outputs]) -> Outputs:
    """The outputs of consecutive parts of a batch as those of the whole: crop-major, masked rows row-major."""
    views = parts[0].views

    def by_crop(tensors: list[Tensor], crops: int) -> Tensor:
        return torch.cat([x.unflatten(0, (crops, -1)) for x in tensors], 1).flatten(0, 1)

    masks = [p.mask for p in parts if p.mask is not None]
    student_masked, teacher_masked, index = parts[0].student_masked, parts[0].teacher_masked, None
    if masks:
        index, order = _places(parts).sort()
        student_masked = torch.cat([p.student_masked for p in parts])[order]
        teacher_masked = torch.cat([p.teacher_masked for p in parts])[order]
    return Outputs(
        by_crop([p.student for p in parts], views), by_crop([p.teacher for p in parts], 2), student_masked,
        teacher_masked, torch.cat([p.teacher_drawn for p in parts]), by_crop(masks, 2) if masks else None, None, index,
    )  # fmt: skip


def split(
    student: Tensor | None, masked: Tensor | None, parts: list[Crops]
) -> list[tuple[Tensor | None, Tensor | None]]:
    """Rows of the whole batch as those of its parts: the inverse of `join`."""
    sizes = [len(part.globals_) // 2 for part in parts]
    of_student: list[Tensor | None] = [None] * len(parts)
    of_masked: list[Tensor | None] = [None] * len(parts)
    if student is not None:
        of_student = [rows.flatten(0, 1) for rows in student.unflatten(0, (-1, sum(sizes))).split(sizes, 1)]
    if masked is not None and parts[0].masked_at is not None:
        ranks = _places(parts).argsort().argsort()  # the row of each part's token among those of the whole
        of_masked = list(masked[ranks].split([0 if part.masked_at is None else len(part.masked_at) for part in parts]))
    return list(zip(of_student, of_masked, strict=True))


def _places(parts: list[Outputs] | list[Crops]) -> Tensor:
    """Positions of the parts' masked tokens, in their order, in the flattened mask of the whole batch."""
    whole = sum(_pictures(part) for part in parts)
    places, start = [], 0
    for part in parts:
        assert part.masked_at is not None and part.mask is not None
        b, length = _pictures(part), part.mask.shape[1]
        crop, token = part.masked_at // length, part.masked_at % length
        view, picture = crop // b, crop % b
        places.append(((view * whole + start + picture) * length) + token)
        start += b
    return torch.cat(places)


def _pictures(part: Outputs | Crops) -> int:
    return part.pictures if isinstance(part, Outputs) else len(part.globals_) // 2


def clip_each(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale down each parameter's own gradient to norm `limit` (1.8: per tensor, not over all); returns the norms."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    found = norms(gradients)
    torch._foreach_mul_(local(gradients), list((limit / (found + 1e-6)).clamp_(max=1.0).unbind()))
    return found
