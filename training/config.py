"""What a run is asked for (`Train`), what that resolves to (`Recipe`), and what the choices depend on (`Hardware`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator
from pydantic_settings import CliPositionalArg

from export.shipped import run_folder


class Train(BaseModel):
    """Pretrain a ViT encoder on a folder of pictures with SOP. Labels are not needed.

    What is left out is chosen from the number of pictures and the hardware, and printed with its reason.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    pictures: CliPositionalArg[list[str]]
    """Where the pictures are: folders (subfolders are searched), globs, lists (.csv, .tsv, .jsonl, .parquet), tar
    shards (WebDataset, shard-{0000..0099}.tar), or URLs of these (s3://, gs://, https://)."""
    out: Path
    """The run folder to write."""
    resume: bool = False
    """Continue the run in `--out` from its last checkpoint (starts it where there is none yet)."""
    init: Annotated[Path | None, BeforeValidator(run_folder)] = None
    """Start from these weights: `default` (the encoder that comes with likewise) or the name of another of those, a run
    folder, or a timm state dict (.safetensors, .pth)."""
    normalization: Literal["imagenet", "model"] = "imagenet"
    """Mean and deviation of the input: ImageNet's, or those that timm names for the encoder (with --init of a timm state
    dict; a run folder brings its own)."""

    # --- affects results
    preset: Literal["auto", "small", "paper"] = "auto"
    """small: the settings that hold below 50,000 pictures (with KoLeo). paper: the published ones (no stabiliser)."""
    encoder: str | None = None
    """A timm ViT, such as vit_small_patch16_224, vit_micro (1 M parameters) or vit_nano (0.1 M); that of --init's run where
    absent."""
    image_size: int | None = Field(None, ge=16, le=1024)
    """Input height and width, in pixels; a multiple of the patch size."""
    patch_size: int | None = Field(None, ge=2, le=64)
    """Side of a patch, in pixels."""
    fit: Literal["crop", "pad"] | None = None
    """How whole pictures become squares at inference: crop the centre (where absent, or as --init's run does), or pad to the
    longer side."""
    views: Literal["auto", "photographs", "products", "orientation-free", "documents", "greyscale"] = "auto"
    """photographs: flips, colour jitter, grey, blur. products: colours are kept. orientation-free: adds free rotation
    and colour mixing (microscopy, aerial pictures, parts, drawn shapes). documents: no flips, hardly any rotation.
    greyscale: light only, mild rotation (medical). auto looks at the pictures; it cannot tell products apart."""
    batch_size: int | None = Field(None, ge=2)
    """Pictures per step."""
    global_scale: tuple[float, float] | None = None
    """Smallest and largest share of a picture's area that a global crop shows."""
    local_scale: tuple[float, float] | None = None
    """The same of the small crops."""
    local_crops: int | None = Field(None, ge=0)
    """Small crops per picture beside the two global ones."""
    epochs: int | None = Field(None, ge=1)
    """Passes over the pictures."""
    steps: int | None = Field(None, ge=0)
    """Optimiser steps, instead of epochs; 0 writes the untrained network."""
    minutes: float | None = Field(None, gt=0)
    """Time to spend, instead of epochs: the steps that fit are measured first."""
    lr: float | None = Field(None, gt=0)
    """Peak learning rate."""
    weight_decay: tuple[float, float] | None = None
    """AdamW's weight decay at the start and, by a cosine, at the end."""
    drop_path: float | None = Field(None, ge=0, lt=1)
    """Stochastic depth of the student: the share of blocks that the last one is skipped in."""
    method: Literal["sop", "massl", "dino"] = "sop"
    """sop, or a baseline in the same loop: massl (SOP without support embeddings, over all blocks), dino."""
    memory: int | None = Field(None, ge=8)
    """N_C, rows of the global memory."""
    patch_memory: int | None = Field(None, ge=8)
    """N_P, rows of the patch memory."""
    patch_anchors: int | None = Field(None, ge=2)
    """Prototypes drawn from the patch memory per step."""
    patch_support: int | None = Field(None, ge=0)
    """k_local, support embeddings per anchor of the patch memory."""
    anchors: int | None = Field(None, ge=2)
    """P, self-organizing prototypes per step (the paper's K)."""
    support: int | None = Field(None, ge=0)
    """k, support embeddings per anchor."""
    support_weight: Literal["cosine", "rescaled", "constant"] | None = None
    """How much of its vote a support embedding gives to its anchor: its cosine (paper), that above the memory's random
    level, or all."""
    halved_anchors: bool = False
    """Repeat the released code's quirk: 2P anchors are drawn, half of them kept."""
    anchors_from: Literal["all", "written"] = "all"
    """Rows that prototypes are drawn from: the whole memories, random rows at first (paper), or those written so far as
    soon as they are enough."""
    smoothing: float | None = Field(None, ge=0, lt=1)
    """ε, what the anchor's vote lacks to 1."""
    tasks: int | None = Field(None, ge=1)
    """T, independent draws of prototypes per step, whose losses are averaged."""
    prototypes: int | None = Field(None, ge=2)
    """K, learnable prototypes of DINO."""
    head_dim: int | None = Field(None, ge=8)
    """d, length of the rows in the memories."""
    student_temperature: float | None = Field(None, gt=0)
    """τ_s."""
    teacher_temperature: float | None = Field(None, gt=0)
    """τ_t at the end of its warm-up."""
    momentum: float | None = Field(None, ge=0, le=1)
    """EMA momentum of the teacher at the start; it rises to 1."""
    koleo_weight: float | None = Field(None, ge=0)
    """Weight of the KoLeo term that keeps embeddings apart."""
    koleo_final_weight: float | None = Field(None, ge=0)
    """Where a cosine takes that weight by the end of the run; the same as at the start where absent."""
    variance_weight: float | None = Field(None, ge=0)
    """Weight of VICReg's variance term, another stabiliser."""
    sigreg_weight: float | None = Field(None, ge=0)
    """Weight of SIGReg (isotropic embeddings), another stabiliser."""
    mean_entropy_weight: float | None = Field(None, ge=0)
    """Weight of the mean vote's entropy gap, another stabiliser."""
    teacher_votes: Literal["softmax", "centred", "sinkhorn"] | None = None
    """How the teacher's votes become targets: as they are (paper), from embeddings centred by their running mean, or
    balanced over the batch by Sinkhorn–Knopp."""
    mim_weight: float | None = Field(None, ge=0)
    """Weight of the SOP-MIM loss on masked patches."""
    mask_kind: Literal["block", "random"] = "block"
    """Shape of the masks."""
    mask_ratio: tuple[float, float] | None = None
    """Smallest and largest masked share of a masked crop's patches."""
    mask_probability: float | None = Field(None, ge=0, le=1)
    """Share of the global crops that are masked."""
    head_steps: int | None = Field(None, ge=0)
    """With --init: steps in which the head alone learns; until the memory has turned over once where absent."""
    backbone_lr: float | None = Field(None, gt=0)
    """With --init: the backbone's learning rate, as a share of the head's."""
    layer_decay: float | None = Field(None, gt=0, le=1)
    """With --init: factor on the learning rate per block, from the last to the first."""
    seed: int = 0
    """Random seed."""

    # --- speed only
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""
    precision: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Of the backbone; similarities and losses are float32 (float64: everything, for comparisons)."""
    accumulate: int = Field(1, ge=1)
    """Compute each batch in this many parts: less memory, a third more time, the same result."""
    compile: bool = False
    """torch.compile of every block: pays off in long runs on a GPU."""
    checkpoint_activations: bool = False
    """Less memory, a third more time: blocks are computed again in the backward pass."""
    shard: bool = False
    """Under torchrun: split the student's weights, gradients and optimizer state over the processes (FSDP2), for ViT-L
    and larger; the same result."""
    threads: int | None = Field(None, ge=1)
    """CPU threads; the process's quota where absent."""
    checkpoint_minutes: float = Field(2.0, gt=0)
    """Time between checkpoints."""
    plan: bool = False
    """Print what would run and how long, how much memory and disk it takes, then stop."""
    tensorboard: bool = False
    """Also write the metrics to `run/tensorboard/`."""

    @field_validator("pictures", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return [str(value)] if isinstance(value, (str, Path)) else value

    def cli_cmd(self) -> int:
        """Run the command."""
        from training.command import train

        return train(self)


class Report(BaseModel):
    """Write a run's report.html again, from what the run folder holds."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    run: CliPositionalArg[Path]
    """The run folder."""

    def cli_cmd(self) -> int:
        """Run the command."""
        from training.report import write_report

        print(write_report(self.run))
        return 0


class Recipe(BaseModel):
    """A resolved configuration: what the loop runs on, what run.json stores, what a resume must match."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    method: Literal["sop", "massl", "dino"]
    """See `Train`."""
    preset: Literal["small", "paper"]
    """Which column of the tables it started from."""
    model: str
    """timm's name."""
    model_kwargs: dict[str, Any]
    """Beside the name, for `timm.create_model`."""
    image_size: int
    """Side of a global crop."""
    local_size: int
    """Side of a local crop."""
    patch_size: int
    """Side of a patch."""
    cache_size: int
    """Side at which pictures are kept for cropping."""
    fit: Literal["crop", "pad"]
    """See `Train`."""
    views: Literal["photographs", "products", "orientation-free", "documents", "greyscale"]
    """See `Train`."""
    global_scale: tuple[float, float]
    """Area of a global crop, as a share of the picture."""
    local_scale: tuple[float, float]
    """Area of a local crop."""
    local_crops: int
    """V_l."""
    batch_size: int
    """B."""
    steps: int
    """Optimiser steps."""
    lr: float
    """Peak learning rate."""
    min_lr: float
    """Where its cosine ends."""
    lr_warmup: float
    """Share of the steps with a rising learning rate."""
    weight_decay: tuple[float, float]
    """Start and end of its cosine."""
    clip: float
    """Largest norm of each parameter's gradient."""
    memory: int
    """N_C."""
    patch_memory: int
    """N_P."""
    anchors: int
    """P of the image loss."""
    patch_anchors: int
    """P of SOP-MIM."""
    support: int
    """k of the image loss."""
    patch_support: int
    """k of SOP-MIM."""
    support_weight: Literal["cosine", "rescaled", "constant"]
    """See `Train`."""
    halved_anchors: bool
    anchors_from: Literal["all", "written"]
    """See `Train`."""
    smoothing: float
    """ε."""
    tasks: int
    """T."""
    prototypes: int
    """K of DINO."""
    prototype_freeze: float
    """Share of the steps during which they do not move."""
    centre_momentum: float
    """Of DINO's centre."""
    teacher_votes: Literal["softmax", "centred", "sinkhorn"]
    """See `Train`."""
    head_dim: int
    """d."""
    head_hidden: int
    """Width of the head's hidden layers."""
    weight_init: Literal["default", "trunc_normal"]
    """Of every linear layer, where no --init is given: PyTorch's own, or truncated normal 0.02."""
    student_temperature: float
    """τ_s."""
    teacher_temperature: tuple[float, float]
    """τ_t at the start and after its warm-up."""
    temperature_warmup: float
    """Share of the steps over which τ_t rises."""
    momentum: float
    """EMA momentum at the start."""
    koleo_weight: tuple[float, float]
    """Weight of KoLeo at the start and the end of its cosine."""
    variance_weight: float
    """Weight of VICReg's variance term."""
    sigreg_weight: float
    """Weight of SIGReg."""
    mean_entropy_weight: float
    """Weight of the mean vote's entropy gap."""
    mim_weight: float
    """Weight of SOP-MIM."""
    mask_kind: Literal["block", "random"]
    """See `Train`."""
    mask_probability: float
    """Share of the global crops that are masked."""
    mask_ratio: tuple[float, float]
    """Masked share of a masked crop's patches, drawn uniformly."""
    drop_path: float
    """Stochastic depth of the student's last block."""
    init: str | None
    """Initial weights."""
    mean: tuple[float, float, float]
    """RGB mean that is subtracted from pixels scaled to 0…1."""
    std: tuple[float, float, float]
    """RGB deviation that they are divided by."""
    head_steps: int
    """Steps with a frozen backbone."""
    backbone_lr: float
    """The backbone's learning rate, as a share of the head's."""
    layer_decay: float
    """Factor on it per block, from the last to the first."""
    seed: int
    """Random seed."""


@dataclass(frozen=True)
class Hardware:
    """What the choices depend on."""

    device: Literal["cpu", "cuda"]
    name: str
    threads: int
    fast_bf16: bool
    processes: int = 1
