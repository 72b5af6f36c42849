"""`likewise train --plan`: what a run would take, before it runs."""

from __future__ import annotations

import resource
import shutil
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from training.loop import Trainer


class Whole(NamedTuple):
    """All pictures of a run, where a plan looked at a sample of them."""

    pictures: int
    """How many are readable."""
    decode_seconds: float
    """Expected time to decode them; 0 where they are decoded."""


class Plan(NamedTuple):
    """Expected needs of a run."""

    minutes: float
    """From the first step to the end, measurements, checkpoints and the verdict of initial weights included."""
    seconds_per_step: float
    """Measured on this machine."""
    memory_bytes: int
    """Peak of the device (GPU) or of the process (CPU)."""
    disk_bytes: int
    """Of the run folder: cache, checkpoint while it is replaced, encoder."""


def make_plan(trainer: Trainer, whole: Whole) -> Plan:
    """Measure a few steps and a forward pass, and add up."""
    trainer._settle_steps(None)
    step_seconds = trainer.seconds_per_step(3.0)
    if trainer.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(trainer.device)
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    state = sum(_bytes(value) for value in trainer.learner.state().values())
    encoder = sum(p.numel() * 4 for p in trainer.learner.teacher.backbone.parameters())
    # AdamW's two moments appear with its first step; a checkpoint is written beside the one that it replaces.
    moments = 2 * sum(p.numel() * p.element_size() for p in trainer.learner.student.parameters())
    pixels = trainer.cache.bytes * whole.pictures // max(1, len(trainer.cache))
    if trainer.cache.resident:
        memory += pixels - trainer.cache.bytes
    disk = pixels + 2 * (state + moments) + 2 * encoder
    minutes = (trainer.recipe.steps * step_seconds * 1.05 + trainer.watching_seconds()) / 60
    return Plan(minutes, step_seconds, memory, disk)


def print_plan(trainer: Trainer, whole: Whole) -> int:
    """Print the announcement and the plan; returns 0."""
    plan = make_plan(trainer, whole)
    trainer._announce()
    r = trainer.recipe
    free = shutil.disk_usage(trainer.run).free
    decoding = ""
    if whole.decode_seconds:
        decoding = f", and {_duration(whole.decode_seconds / 60)} to decode {whole.pictures:,} pictures once"
    trainer.console.print(
        f"plan: preset {r.preset}, {r.steps:,} steps of {r.batch_size} pictures, {plan.seconds_per_step:.3f} s each: "
        f"{_duration(plan.minutes)}{decoding}; memory {plan.memory_bytes / 2**30:.1f} GiB on {trainer.hardware.name}; disk "
        f"{plan.disk_bytes / 2**30:.2f} GiB of {free / 2**30:.0f} GiB free (the decoded pictures are kept in {trainer.run})"
    )
    return 0


def _bytes(value: object) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(_bytes(v) for v in value.values())
    return 0


def _duration(minutes: float) -> str:
    if minutes < 90:
        return f"{minutes:.1f} minutes"
    return f"{minutes / 60:.1f} hours"
