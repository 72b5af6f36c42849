"""Checkpoints, and what a run folder looks like.

run/
    run.json              what ran, on what, with which reasons (export.bundle.RunManifest)
    metrics.jsonl         one line per logged step and per measurement
    unreadable.tsv        pictures that were skipped, with the reason
    encoder.safetensors   the teacher's backbone after the last checkpoint
    best.safetensors      that of the measurement with the highest kNN, and best.json (labelled pictures)
    checkpoints/last.pt   everything needed to continue bit-identically
    cache/                shrunk pictures
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from export.bundle import RefusalError, make_folder, write_file

NAME = "checkpoints/last.pt"


def save_checkpoint(run: Path, identity: dict[str, Any], step: int, state: dict[str, Any]) -> None:
    """Replace the last checkpoint; the old one stays whole until the new one is durable.

    `identity` is what a resume must match: the recipe's fields, the data's digest, the precision.
    """
    buffer = io.BytesIO()
    torch.save({"identity": json.dumps(identity), "step": step, "state": state}, buffer)
    make_folder(run / "checkpoints")
    try:
        write_file(run / NAME, buffer.getvalue())
    except OSError as e:
        raise RefusalError(
            f"the checkpoint of step {step} cannot be written ({e.strerror}); the one before is intact: free "
            f"{len(buffer.getvalue()) / 2**20:.0f} MiB and run again with --resume"
        ) from e


class Checkpoint(NamedTuple):
    """A stored state."""

    identity: dict[str, Any]
    step: int
    state: dict[str, Any]

    def require(self, identity: dict[str, Any], run: Path) -> None:
        """Raises `RefusalError` when it belongs to another configuration, precision or set of pictures."""
        different = sorted(
            key for key in identity.keys() | self.identity.keys() if identity.get(key) != self.identity.get(key)
        )
        if different == ["data"]:
            raise RefusalError(
                f"the pictures are not those that {run} was started on (digest {str(identity['data'])[:12]}…, not "
                f"{str(self.identity['data'])[:12]}…): restore them to continue it, or choose another --out"
            )
        if different:
            shown = ", ".join(f"{key} {self.identity.get(key)} → {identity.get(key)}" for key in different[:4])
            shown += f" and {len(different) - 4} more" if len(different) > 4 else ""
            raise RefusalError(
                f"{run} holds step {self.step} of another configuration ({shown}): repeat its flags to continue it, or "
                "choose another --out"
            )


def load_checkpoint(run: Path) -> Checkpoint | None:
    """The last checkpoint, or None where there is none. Raises `RefusalError` when it is damaged."""
    path = run / NAME
    if not path.is_file():
        return None
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
        return Checkpoint(json.loads(stored["identity"]), stored["step"], stored["state"])
    except Exception as e:  # torch raises types of its own for damaged files
        raise RefusalError(
            f"{path} cannot be read ({type(e).__name__}): it is damaged; choose another --out to start again"
        ) from e


def save_offending_step(
    run: Path, identity: dict[str, Any], step: int, state: dict[str, Any], keys: list[str], terms: dict[str, Tensor]
) -> None:
    """Keep what a step with a loss that is not finite began with: state, pictures (their keys) and loss terms."""
    buffer = io.BytesIO()
    stored = {"identity": json.dumps(identity), "step": step, "state": state, "pictures": keys, "terms": terms}
    torch.save(stored, buffer)
    write_file(run / "offending-step.pt", buffer.getvalue())
