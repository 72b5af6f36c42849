"""Checkpoints, and what a run folder looks like.

run/
    run.json              what ran, on what, with which reasons (export.bundle.RunManifest)
    metrics.jsonl         one line per logged step and per measurement
    unreadable.tsv        pictures that were skipped, with the reason
    encoder.safetensors   the teacher's backbone after the last checkpoint
    checkpoints/last.pt   everything needed to continue bit-identically
    cache/                shrunk pictures
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch

from export.bundle import RefusalError, write_file
from training.config import Recipe

NAME = "checkpoints/last.pt"


def save_checkpoint(run: Path, recipe: Recipe, step: int, state: dict[str, Any]) -> None:
    """Replace the last checkpoint; the old one stays whole until the new one is durable."""
    buffer = io.BytesIO()
    torch.save({"recipe": recipe.model_dump_json(), "step": step, "state": state}, buffer)
    (run / "checkpoints").mkdir(exist_ok=True)
    try:
        write_file(run / NAME, buffer.getvalue())
    except OSError as e:
        raise RefusalError(
            f"the checkpoint of step {step} cannot be written ({e.strerror}); the one before is intact: free "
            f"{len(buffer.getvalue()) / 2**20:.0f} MiB and run again with --resume"
        ) from e


def load_checkpoint(run: Path, recipe: Recipe) -> tuple[int, dict[str, Any]] | None:
    """(steps done, state), or None where there is none. Raises `RefusalError` when it belongs to another recipe."""
    path = run / NAME
    if not path.is_file():
        return None
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises types of its own for damaged files
        raise RefusalError(
            f"{path} cannot be read ({type(e).__name__}): it is damaged; choose another --out to start again"
        ) from e
    theirs, ours = json.loads(stored["recipe"]), json.loads(recipe.model_dump_json())
    different = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    if different:
        shown = ", ".join(f"{key} {theirs.get(key)} → {ours.get(key)}" for key in different[:4])
        raise RefusalError(
            f"{run} holds step {stored['step']} of another configuration ({shown}): repeat its flags to continue it, "
            "or choose another --out"
        )
    return stored["step"], stored["state"]
