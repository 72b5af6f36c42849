"""What an evaluation is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic_settings import CliPositionalArg

from export.shipped import BundleFolder

Task = Literal["knn", "linear", "retrieval", "copies", "label-free", "revisited"]


class Evaluate(BaseModel):
    """Measure an encoder on pictures: kNN, linear probe, retrieval, copy detection, a score that needs no labels.

    What the folder offers is measured, with baselines that need no learning beside every figure.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    source: CliPositionalArg[BundleFolder]
    """A run folder, a bundle folder, the name of an encoder that comes with likewise (`default`), or a file of timm weights
    (with --model)."""
    data: CliPositionalArg[Path]
    """Folder of pictures: the queries, or everything where no other folder is given."""
    out: Path
    """Folder for results.json, plots and the features that a repeated evaluation reuses."""
    tasks: list[Task] | None = None
    """Which tasks, separated by commas; what the data offer where absent."""
    against: BundleFolder | None = None
    """A second encoder, measured beside the first: neighbour agreement and paired differences."""

    bank: Path | None = None
    """Labelled training pictures for kNN and the linear probe; the gallery where absent."""
    gallery: Path | None = None
    """Pictures that are searched; the bank where absent, and the other queries without either."""
    labels: Path | None = None
    """CSV or .jsonl with `path` and `label`; the first folder's name is the label where absent."""
    pairs: Path | None = None
    """Copy detection: CSV or .jsonl with `query` and `original`; a query with no original is a negative."""
    ground_truth: Path | None = None
    """Revisited Oxford or Paris: its ground truth as JSON (docs/evaluation.md says how to convert it)."""

    model: str | None = None
    """timm's name of the architecture, for a file of weights."""
    patch_size: int | None = Field(None, ge=2, le=64)
    """Side of a patch, for a file of weights whose patches are not the model's usual ones."""
    normalization: Literal["imagenet", "model"] | None = None
    """For a file of weights: mean and deviation of ImageNet (where absent), or those that timm names for the model."""
    image_size: int | None = Field(None, ge=16, le=2048)
    """Input height and width, in pixels; for revisited, the longer side. Runs and weights only."""
    fit: Literal["crop", "pad"] | None = None
    """Crop the centre, or pad to the longer side; as the run says where absent (weights: crop). Runs and weights only."""

    baselines: bool = True
    """Also measure what needs no learning: pixels, colour histogram, perceptual hash, and the untrained network."""
    variant: Literal["auto", "fp32", "fp16", "int8"] = "fp32"
    """Of a bundle: which graph."""
    label_free_queries: int = Field(500, ge=2)
    """Pictures that are edited for the label-free score."""
    seed: int = 0
    """Random seed: edits, bootstrap, linear probe, untrained network."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute features."""
    threads: int | None = Field(None, ge=1)
    """CPU threads; the process's quota where absent."""
    batch_size: int = Field(64, ge=1)
    """Pictures per forward pass."""

    def cli_cmd(self) -> int:
        """Run the command."""
        from training.evaluate.command import evaluate

        return evaluate(self)
