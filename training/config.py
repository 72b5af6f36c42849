"""What a run is asked for (`Train`), and what that resolves to (`Recipe`), each automatic choice with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic_settings import CliPositionalArg

from export.bundle import RefusalError

MIN_PICTURES = 32


class Train(BaseModel):
    """Pretrain a ViT encoder on a folder of pictures with SOP. Labels are not needed.

    What is left out is chosen from the number of pictures and the hardware, and printed with its reason.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    pictures: CliPositionalArg[Path]
    """Folder of pictures; subfolders are searched."""
    out: Path
    """The run folder to write."""
    resume: bool = False
    """Continue the run in `--out` from its last checkpoint (starts it where there is none yet)."""
    init: Path | None = None
    """Start from these weights: a timm state dict (.safetensors, .pth) or another run folder."""

    # --- affects results
    preset: Literal["auto", "small", "paper"] = "auto"
    """small: the settings that hold below 50,000 pictures (with KoLeo). paper: the published ones (no stabiliser)."""
    encoder: str | None = None
    """A timm ViT, such as vit_small_patch16_224, vit_micro (1 M parameters) or vit_nano (0.1 M)."""
    image_size: int | None = Field(None, ge=16, le=1024)
    """Input height and width, in pixels; a multiple of the patch size."""
    patch_size: int | None = Field(None, ge=2, le=64)
    """Side of a patch, in pixels."""
    fit: Literal["crop", "pad"] = "crop"
    """How whole pictures become squares at inference: crop the centre, or pad to the longer side."""
    views: Literal["photographs", "products", "orientation-free"] = "photographs"
    """photographs: flips, colour jitter, grey, blur. products: colours are kept. orientation-free: adds free rotation
    and colour mixing (microscopy, aerial pictures, parts, drawn shapes)."""
    batch_size: int | None = Field(None, ge=2)
    """Pictures per step."""
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
    memory: int | None = Field(None, ge=8)
    """N_C, rows of the global memory."""
    anchors: int | None = Field(None, ge=2)
    """P, self-organizing prototypes per step (the paper's K)."""
    support: int | None = Field(None, ge=0)
    """k, support embeddings per anchor."""
    smoothing: float | None = Field(None, ge=0, lt=1)
    """ε, what the anchor's vote lacks to 1."""
    head_dim: int | None = Field(None, ge=8)
    """d, length of the rows in the memories."""
    teacher_temperature: float | None = Field(None, gt=0)
    """τ_t at the end of its warm-up."""
    momentum: float | None = Field(None, ge=0, le=1)
    """EMA momentum of the teacher at the start; it rises to 1."""
    koleo_weight: float | None = Field(None, ge=0)
    """Weight of the KoLeo term that keeps embeddings apart."""
    mim_weight: float | None = Field(None, ge=0)
    """Weight of the SOP-MIM loss on masked patches."""
    seed: int = 0
    """Random seed."""

    # --- speed only
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the backbone; similarities and losses are float32 always."""
    threads: int | None = Field(None, ge=1)
    """CPU threads; the process's quota where absent."""
    checkpoint_minutes: float = Field(2.0, gt=0)
    """Time between checkpoints."""
    tensorboard: bool = False
    """Also write the metrics to `run/tensorboard/`."""

    def cli_cmd(self) -> int:
        """Run the command."""
        from training.loop import train

        return train(self)


class Recipe(BaseModel):
    """A resolved configuration: what the loop runs on, what run.json stores, what a resume must match."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

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
    views: Literal["photographs", "products", "orientation-free"]
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
    smoothing: float
    """ε."""
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
    koleo_weight: float
    """Weight of KoLeo."""
    mim_weight: float
    """Weight of SOP-MIM."""
    mask_probability: float
    """Share of the global crops that are masked."""
    mask_ratio: tuple[float, float]
    """Masked share of a masked crop's patches, drawn uniformly."""
    drop_path: float
    """Stochastic depth of the student's last block."""
    init: str | None
    """Initial weights."""
    seed: int
    """Random seed."""


# Fields whose change leaves the result the same are not in Recipe. Values: spec/sop.md 2.1 (paper), section 8 (small).
_PAPER: dict[str, Any] = {
    "global_scale": (0.25, 1.0), "local_scale": (0.05, 0.25), "local_crops": 10, "batch_size": 1024,
    "min_lr": 1e-6, "lr_warmup": 0.1, "weight_decay": (0.04, 0.4), "clip": 3.0,
    "memory": 65536, "patch_memory": 8192, "anchors": 4096, "patch_anchors": 512, "support": 8, "patch_support": 0,
    "smoothing": 0.1, "head_dim": 256, "head_hidden": 2048, "weight_init": "trunc_normal",
    "student_temperature": 0.1, "teacher_temperature": (0.04, 0.07), "temperature_warmup": 0.1, "momentum": 0.996,
    "koleo_weight": 0.0, "mim_weight": 1.0, "mask_probability": 0.5, "mask_ratio": (0.1, 0.5), "drop_path": 0.1,
}  # fmt: skip
_SMALL: dict[str, Any] = {
    **_PAPER,
    "global_scale": (0.4, 1.0), "local_scale": (0.1, 0.4), "local_crops": 2, "batch_size": 64,
    "weight_decay": (0.04, 0.04), "support": 4, "smoothing": 0.0, "head_dim": 128, "head_hidden": 512,
    "weight_init": "default", "teacher_temperature": (0.04, 0.04), "temperature_warmup": 0.2, "momentum": 0.99,
    "koleo_weight": 0.1, "mim_weight": 0.0, "drop_path": 0.0,
}  # fmt: skip

SMALL_BELOW = 50_000
# timm's own class at sizes that two cores train: about 1 M and 0.1 M parameters.
_OWN: dict[str, dict[str, Any]] = {
    "vit_micro": {"embed_dim": 128, "depth": 5, "num_heads": 4},
    "vit_nano": {"embed_dim": 64, "depth": 2, "num_heads": 4},
}


@dataclass(frozen=True)
class Hardware:
    """What the choices depend on."""

    device: Literal["cpu", "cuda"]
    name: str
    threads: int
    fast_bf16: bool


def resolve(asked: Train, pictures: int, hardware: Hardware) -> tuple[Recipe, dict[str, str]]:
    """Turn a request into a recipe; also returns the reason of each automatic choice. `steps` may be 0 with `minutes`.

    Raises `RefusalError` on contradictions.
    """
    if pictures < MIN_PICTURES:
        raise RefusalError(
            f"{asked.pictures} holds {pictures} readable pictures, at least {MIN_PICTURES} are needed to train: add "
            "pictures, or index them with a bundle that exists"
        )
    given = {"epochs": asked.epochs, "steps": asked.steps, "minutes": asked.minutes}
    if sum(value is not None for value in given.values()) > 1:
        names = " and ".join(f"--{name}" for name, value in given.items() if value is not None)
        raise RefusalError(f"{names} were given together: choose one")

    why: dict[str, str] = {}
    values: dict[str, Any] = {}
    preset = asked.preset
    if preset == "auto":
        preset = "small" if pictures < SMALL_BELOW or hardware.device == "cpu" else "paper"
        why["preset"] = (
            f"{pictures:,} pictures, fewer than {SMALL_BELOW:,}: without a stabiliser the objective collapses"
            if pictures < SMALL_BELOW
            else f"{pictures:,} pictures on {hardware.name}"
        )
    values.update(_PAPER if preset == "paper" else _SMALL)
    values["preset"] = preset

    values.update(_choose_encoder(asked, hardware, why))
    size, patch = values["image_size"], values["patch_size"]
    if size % patch:
        raise RefusalError(f"--image-size {size} is not a multiple of the patch size {patch}: choose another")
    values["local_size"] = max(2 * patch, round(size * 3 / 7 / patch) * patch)  # 96 beside 224
    values["cache_size"] = -(-size * 3 // 2 // 8) * 8

    batch = asked.batch_size or min(values["batch_size"], 1 << (max(2, pictures // 4).bit_length() - 1))
    if batch > pictures:
        raise RefusalError(f"--batch-size {batch} exceeds the {pictures:,} readable pictures: choose a smaller one")
    values["batch_size"] = batch
    if asked.batch_size is None:
        why["batch_size"] = f"preset {preset}, at most a quarter of {pictures:,} pictures"

    half = max(64, 1 << (max(2, pictures // 2).bit_length() - 1))
    memory = asked.memory or min(values["memory"], half)
    if asked.memory is None:
        why["memory"] = (
            f"at most half of {pictures:,} pictures: in a larger memory an anchor's support is its own picture"
        )
    elif asked.memory > pictures:
        raise RefusalError(
            f"--memory {asked.memory} exceeds the {pictures:,} readable pictures: choose at most {max(64, pictures // 2)}"
        )
    if batch > memory:
        raise RefusalError(f"the batch of {batch} does not fit the memory of {memory} rows: lower --batch-size")
    values["memory"] = memory
    values["patch_memory"] = max(min(values["patch_memory"], 4 * memory), batch)
    anchors = asked.anchors or min(values["anchors"], max(16, memory // 16))
    if asked.anchors is None:
        why["anchors"] = f"a sixteenth of the memory's {memory:,} rows, at least 16"
    values["anchors"] = anchors
    values["patch_anchors"] = min(values["patch_anchors"], values["patch_memory"] // 2)
    for name in ("support", "smoothing", "head_dim", "momentum", "koleo_weight", "mim_weight", "local_crops"):
        if getattr(asked, name) is not None:
            values[name] = getattr(asked, name)
    if anchors + max(values["support"], 1) > memory:
        raise RefusalError(
            f"{anchors} anchors with {values['support']} support embeddings need more than the memory's {memory} rows: "
            "lower --anchors or raise --memory"
        )
    if asked.teacher_temperature is not None:
        values["teacher_temperature"] = (min(0.04, asked.teacher_temperature), asked.teacher_temperature)

    if asked.lr is not None:
        values["lr"] = asked.lr
    else:
        values["lr"] = 1e-3 if preset == "small" else 5e-4 * batch / 256
        why["lr"] = "1e-3 holds for small encoders and batches" if preset == "small" else "5e-4 × batch / 256"

    per_epoch = pictures // batch
    if asked.steps is not None:
        values["steps"] = asked.steps
    elif asked.minutes is not None:
        values["steps"] = 0
    elif asked.epochs is not None:
        values["steps"] = asked.epochs * per_epoch
    else:
        epochs = 100 if preset == "paper" else 40
        values["steps"] = max(epochs * per_epoch, 2000)
        why["steps"] = f"{epochs} epochs of {per_epoch:,} steps, at least 2,000 updates"
    values.update(fit=asked.fit, views=asked.views, seed=asked.seed, init=str(asked.init) if asked.init else None)
    return Recipe(**values), why


def _choose_encoder(asked: Train, hardware: Hardware, why: dict[str, str]) -> dict[str, Any]:
    name = asked.encoder
    if name is None:
        name = "vit_micro" if hardware.device == "cpu" else "vit_small_patch16_224"
        why["model"] = f"training on {hardware.name}"
    if name in _OWN:
        patch = asked.patch_size or 8
        size = asked.image_size or 48
        kwargs = {**_OWN[name], "patch_size": patch}
        return {"model": "vit_tiny_patch16_224", "model_kwargs": kwargs, "image_size": size, "patch_size": patch}
    from training.encoder import native_sizes

    native_patch, native_size = native_sizes(name)
    patch = asked.patch_size or native_patch
    kwargs = {"patch_size": patch} if patch != native_patch else {}
    return {
        "model": name,
        "model_kwargs": kwargs,
        "image_size": asked.image_size or native_size,
        "patch_size": patch,
    }
