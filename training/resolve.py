"""From what was asked to a recipe: the presets, and each automatic choice with its reason."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from export.bundle import EncoderSpec, RefusalError, RunManifest, read_run
from training.config import Hardware, Recipe, Train

MIN_PICTURES = 32

# Fields whose change leaves the result the same are not in Recipe. Values: spec/sop.md 2.1 (paper), section 8 (small).
_PAPER: dict[str, Any] = {
    "global_scale": (0.25, 1.0), "local_scale": (0.05, 0.25), "local_crops": 10, "batch_size": 1024,
    "min_lr": 1e-6, "lr_warmup": 0.1, "weight_decay": (0.04, 0.4), "clip": 3.0,
    "memory": 65536, "patch_memory": 8192, "anchors": 4096, "patch_anchors": 512, "support": 8, "patch_support": 0,
    "smoothing": 0.1, "head_dim": 256, "head_hidden": 2048, "weight_init": "trunc_normal",
    "student_temperature": 0.1, "teacher_temperature": (0.04, 0.07), "temperature_warmup": 0.1, "momentum": 0.996,
    "tasks": 1, "prototypes": 65536, "prototype_freeze": 0.01, "centre_momentum": 0.9, "teacher_votes": "softmax",
    "koleo_weight": (0.0, 0.0), "variance_weight": 0.0, "sigreg_weight": 0.0, "mean_entropy_weight": 0.0,
    "support_weight": "cosine", "halved_anchors": False, "anchors_from": "all", "head_steps": 0, "backbone_lr": 1.0,
    "layer_decay": 1.0,
    "mim_weight": 1.0, "mask_kind": "block", "mask_probability": 0.5, "mask_ratio": (0.1, 0.5), "drop_path": 0.1,
}  # fmt: skip
_SMALL: dict[str, Any] = {
    **_PAPER,
    "global_scale": (0.4, 1.0), "local_scale": (0.1, 0.4), "local_crops": 2, "batch_size": 64,
    "weight_decay": (0.04, 0.04), "support": 4, "smoothing": 0.0, "head_dim": 128, "head_hidden": 512,
    "weight_init": "default", "teacher_temperature": (0.04, 0.04), "temperature_warmup": 0.2, "momentum": 0.99,
    "koleo_weight": (0.1, 0.1), "mim_weight": 0.0, "prototypes": 1024, "drop_path": 0.0,
}  # fmt: skip

# Wider backbones, as MaSSL's published commands have it; the paper's own values are not known (spec/sop.md 2.1).
_PAPER_WIDE: dict[str, Any] = {"global_scale": (0.32, 1.0), "local_scale": (0.05, 0.32), "min_lr": 2e-6}
_PAPER_EPOCHS = {384: 800, 768: 400, 1024: 250}
# What `--init` changes (section 8): the head alone until the memory has turned over, then a careful backbone.
_ADAPT: dict[str, Any] = {"backbone_lr": 0.1, "layer_decay": 0.7}

# Flags that a recipe takes over unchanged.
_TAKEN_AS_GIVEN = (
    "support", "smoothing", "tasks", "prototypes", "head_dim", "student_temperature", "momentum", "variance_weight",
    "sigreg_weight", "mean_entropy_weight", "teacher_votes", "mim_weight", "local_crops", "support_weight",
    "halved_anchors", "anchors_from", "mask_kind", "mask_ratio", "mask_probability", "patch_anchors", "patch_support",
    "weight_decay",
)  # fmt: skip
SMALL_BELOW = 50_000
# timm's own class at sizes that two cores train: about 1 M and 0.1 M parameters.
_OWN: dict[str, dict[str, Any]] = {
    "vit_micro": {"embed_dim": 128, "depth": 5, "num_heads": 4},
    "vit_nano": {"embed_dim": 64, "depth": 2, "num_heads": 4},
}


def resolve(
    asked: Train, pictures: int, hardware: Hardware, views: tuple[str, str] = ("photographs", "natural photographs")
) -> tuple[Recipe, dict[str, str]]:
    """Turn a request into a recipe; also returns the reason of each automatic choice. `steps` may be 0 with `minutes`.

    `views` is what the pictures suggest, with the reason.

    Raises `RefusalError` on contradictions.
    """
    if pictures < MIN_PICTURES:
        raise RefusalError(
            f"{' '.join(asked.pictures)}: {pictures} readable pictures, at least {MIN_PICTURES} are needed to train: add "
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

    begun = _begun_with(asked)
    values.update(_choose_encoder(asked, begun, hardware, why))
    size, patch = values["image_size"], values["patch_size"]
    if size % patch:
        raise RefusalError(f"--image-size {size} is not a multiple of the patch size {patch}: choose another")
    values["local_size"] = max(2 * patch, round(size * 3 / 7 / patch) * patch)  # 96 beside 224
    values["cache_size"] = -(-size * 3 // 2 // 8) * 8

    batch = asked.batch_size or min(values["batch_size"], 1 << (max(2, pictures // 4).bit_length() - 1))
    if asked.batch_size is None:
        batch = max(1, batch // hardware.processes) * hardware.processes
    if batch % hardware.processes:
        raise RefusalError(
            f"--batch-size {batch} does not divide over {hardware.processes} processes: choose a multiple of "
            f"{hardware.processes}"
        )
    if batch > pictures:
        raise RefusalError(f"--batch-size {batch} exceeds the {pictures:,} readable pictures: choose a smaller one")
    values["batch_size"] = batch
    if asked.batch_size is None:
        why["batch_size"] = f"preset {preset}, at most a quarter of {pictures:,} pictures"

    half = max(64, 1 << (max(2, pictures // 2).bit_length() - 1))
    memory = asked.memory or min(values["memory"], half)
    if asked.memory is None:
        why["memory"] = (
            f"at most half of {pictures:,} pictures, at least 64: in a larger memory an anchor's support is its own picture"
        )
    elif asked.memory > max(64, pictures):
        raise RefusalError(
            f"--memory {asked.memory} exceeds the {pictures:,} readable pictures: choose at most {max(64, pictures // 2)}"
        )
    if batch > memory:
        raise RefusalError(f"the batch of {batch} does not fit the memory of {memory} rows: lower --batch-size")
    values["memory"] = memory
    values["patch_memory"] = asked.patch_memory or max(min(values["patch_memory"], 4 * memory), batch)
    if batch > values["patch_memory"]:
        raise RefusalError(
            f"the batch of {batch} does not fit the patch memory of {asked.patch_memory} rows, which gets one row per "
            "picture: lower --batch-size or raise --patch-memory"
        )
    anchors = asked.anchors or min(values["anchors"], max(16, memory // 16))
    if asked.anchors is None:
        why["anchors"] = f"a sixteenth of the memory's {memory:,} rows, at least 16"
    values["anchors"] = anchors
    values["patch_anchors"] = min(values["patch_anchors"], values["patch_memory"] // 2)
    values["drop_path"] = values["drop_path"] if asked.drop_path is None else asked.drop_path
    for name in _TAKEN_AS_GIVEN:
        if getattr(asked, name) is not None:
            values[name] = getattr(asked, name)
    _refuse_foreign(asked)
    if asked.method != "sop":  # the baselines carry none of SOP's support embeddings, stabilisers or patch loss
        values.update(support=0, smoothing=0.0, koleo_weight=(0.0, 0.0), mim_weight=0.0)
    if asked.koleo_weight is not None or asked.koleo_final_weight is not None:
        start = values["koleo_weight"][0] if asked.koleo_weight is None else asked.koleo_weight
        values["koleo_weight"] = (start, start if asked.koleo_final_weight is None else asked.koleo_final_weight)
    _check_masks(values)
    drawn = anchors * (2 if asked.halved_anchors else 1)
    if drawn + max(values["support"], 1) > memory:
        raise RefusalError(
            f"{drawn} anchors with {values['support']} support embeddings need more than the memory's {memory} rows: "
            "lower --anchors or raise --memory"
        )
    if values["patch_anchors"] + values["patch_support"] > values["patch_memory"]:
        raise RefusalError(
            f"{values['patch_anchors']} anchors with {values['patch_support']} support embeddings need more than the patch "
            f"memory's {values['patch_memory']} rows: lower --patch-anchors or raise --patch-memory"
        )
    if asked.teacher_temperature is not None:
        values["teacher_temperature"] = (min(0.04, asked.teacher_temperature), asked.teacher_temperature)

    wide = preset == "paper" and values["width"] >= 768
    if wide:
        values.update(_PAPER_WIDE)
    for name in ("global_scale", "local_scale"):
        low, high = values[name] = getattr(asked, name) or values[name]
        if not 0 < low <= high <= 1:
            raise RefusalError(
                f"--{name.replace('_', '-')} {low} {high} is not an interval within 0 … 1: give the smaller share first"
            )
    if asked.lr is not None:
        values["lr"] = asked.lr
    elif preset == "small":
        values["lr"] = 1e-3
        why["lr"] = "1e-3 holds for small encoders and batches"
    else:
        base = 7.5e-4 if wide else 5e-4
        values["lr"] = base * batch / 256
        why["lr"] = f"{base:g} × batch / 256"

    per_epoch = pictures // batch
    if asked.steps is not None:
        values["steps"] = asked.steps
    elif asked.minutes is not None:
        values["steps"] = 0
    elif asked.epochs is not None:
        values["steps"] = asked.epochs * per_epoch
    else:
        epochs = _paper_epochs(values["width"]) if preset == "paper" else 40
        values["steps"] = max(epochs * per_epoch, 2000)
        why["steps"] = f"{epochs} epochs of {per_epoch:,} steps, at least 2,000 updates"
    fit = asked.fit or ("crop" if begun is None else begun.preprocess.fit)
    if asked.fit is None and begun is not None:
        why["fit"] = "that of --init"
    values.update(method=asked.method, fit=fit, seed=asked.seed, views=asked.views)
    if asked.views == "auto":
        values["views"], why["views"] = views
    if preset == "paper" and values["steps"]:  # published in epochs: 10, and 30 for S or 50 for B and L
        epochs = values["steps"] / per_epoch
        values["lr_warmup"] = min(0.1, 10 / epochs)
        values["temperature_warmup"] = min(0.3, (50 if wide else 30) / epochs)
    _start_from(asked, begun, values, why)
    del values["width"]
    return Recipe(**values), why


# Flags that mean nothing to a method.
_OF_SOP = ("support", "support_weight", "smoothing", "halved_anchors", "tasks", "mim_weight", "patch_memory",
           "patch_anchors", "patch_support", "mask_ratio", "mask_probability")  # fmt: skip
_FOREIGN = {
    "sop": ("prototypes",),
    "massl": ("prototypes", *_OF_SOP),
    "dino": (
        *_OF_SOP, "memory", "anchors", "anchors_from", "variance_weight", "sigreg_weight", "mean_entropy_weight",
        "teacher_votes",
    ),
}  # fmt: skip


def _refuse_foreign(asked: Train) -> None:
    for name in _FOREIGN[asked.method]:
        if getattr(asked, name) != Train.model_fields[name].default and getattr(asked, name) != 0:
            raise RefusalError(f"--{name.replace('_', '-')} is not part of --method {asked.method}: leave it out")


def _check_masks(values: dict[str, Any]) -> None:
    low, high = values["mask_ratio"]
    if not 0 <= low <= high < 1:
        raise RefusalError(f"--mask-ratio {low} {high} is not an interval within 0 … 1: give the smaller share first")


def _start_from(asked: Train, begun: RunManifest | None, values: dict[str, Any], why: dict[str, str]) -> None:
    """What initial weights change."""
    values["init"] = str(asked.init) if asked.init else None
    values["mean"], values["std"] = _normalization(asked, begun, values["model"], why)
    for name in ("head_steps", "backbone_lr", "layer_decay"):
        given = getattr(asked, name)
        if given is not None and asked.init is None:
            raise RefusalError(
                f"--{name.replace('_', '-')} is for runs that start from trained weights: add --init FILE"
            )
    if asked.init is None:
        return
    values.update(_ADAPT)
    turnover = -(-values["memory"] // values["batch_size"])
    values["head_steps"] = min(turnover, values["steps"] // 3) if values["steps"] else turnover
    why["head_steps"] = "the head alone, until the memory has turned over once, at most a third of the run"
    for name in ("head_steps", "backbone_lr", "layer_decay"):
        if getattr(asked, name) is not None:
            values[name] = getattr(asked, name)
            why.pop(name, None)
    if asked.backbone_lr is None:
        why["backbone_lr"] = "trained weights move carefully"


def _normalization(
    asked: Train, begun: RunManifest | None, model: str, why: dict[str, str]
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    if begun is not None:
        return begun.encoder.mean, begun.encoder.std
    if asked.normalization == "model":
        from training.encoder import native_normalization

        mean, std = native_normalization(model)
        why["mean"] = f"timm's for {model}"
        return mean, std
    fields = EncoderSpec.model_fields
    mean, std = fields["mean"].default, fields["std"].default
    if asked.init is not None:
        from training.encoder import native_normalization

        with suppress(RefusalError):  # timm names none: nothing to compare with
            theirs = native_normalization(model)
            if theirs != (mean, std):
                why["mean"] = (
                    f"ImageNet's; timm's weights of {model} expect {theirs[0]}: --normalization model for those"
                )
    return mean, std


def _begun_with(asked: Train) -> RunManifest | None:
    """The run whose weights --init names. Where it is gone, this one's own manifest, which keeps what it was."""
    run = asked.init if asked.init is None or asked.init.exists() else asked.out
    return read_run(run) if run is not None and (run / "run.json").is_file() else None


def _paper_epochs(width: int) -> int:
    return next((epochs for least, epochs in sorted(_PAPER_EPOCHS.items(), reverse=True) if width >= least), 800)


def _choose_encoder(asked: Train, begun: RunManifest | None, hardware: Hardware, why: dict[str, str]) -> dict[str, Any]:
    from training.encoder import architecture

    name, own_size = asked.encoder, None
    if name is None and begun is not None:
        why["model"] = "that of --init"
        name = model = begun.encoder.model
        kwargs = begun.encoder.kwargs
        patch = kwargs.get("patch_size", architecture(model).patch)
        if asked.patch_size not in (None, patch):
            raise RefusalError(f"--init holds an encoder with patches of {patch} px: leave --patch-size out")
    else:
        if name is None:
            name = "vit_micro" if hardware.device == "cpu" else "vit_small_patch16_224"
            why["model"] = f"training on {hardware.name}"
        if name in _OWN:
            patch, own_size, model = asked.patch_size or 8, 48, "vit_tiny_patch16_224"
            kwargs = {**_OWN[name], "patch_size": patch}
        else:
            model, patch = name, asked.patch_size or architecture(name).patch
            kwargs = {"patch_size": patch} if patch != architecture(name).patch else {}
    native = architecture(model)
    size = asked.image_size or own_size or native.size
    spec = None if begun is None else begun.encoder
    if asked.image_size is None and spec is not None and (spec.model, spec.kwargs) == (model, kwargs):
        size, why["image_size"] = spec.image_size, "that of --init"
    if native.convolutional:
        _require_adaptation(asked, name, why)
    chosen = {
        "model": model, "model_kwargs": kwargs, "image_size": size, "patch_size": patch,
        "width": kwargs.get("embed_dim", native.width),
    }  # fmt: skip
    return chosen | {"mim_weight": 0.0} if native.convolutional else chosen


def _require_adaptation(asked: Train, name: str, why: dict[str, str]) -> None:
    """A convolutional network has no patches to hide, and its batch normalisation needs statistics to start from."""
    if asked.init is None:
        raise RefusalError(
            f"{name} is a convolutional network, which can be adapted but not pretrained: give its weights with --init "
            "FILE, or choose a ViT such as vit_small_patch16_224"
        )
    for flag in ("patch_size", "mim_weight"):
        if getattr(asked, flag):
            raise RefusalError(
                f"{name} is a convolutional network, it has no patches: leave --{flag.replace('_', '-')} out"
            )
    why["mim_weight"] = "a convolutional network has no patches to hide"
