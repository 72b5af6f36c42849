"""Weight files of this project and of others → a timm model's state dict: the only reader of foreign checkpoints.

Understood: .safetensors and torch files (.pth, .pt, .bin, .ckpt) that hold a state dict or a dict with one inside, as the
SOP, DINO, iBOT, MoCo, CO-SSL, Lightning and timm code bases write them. Of a student and a teacher the teacher is taken.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from export.bundle import RefusalError, RunManifest, tensors_sha256

# Where training codes keep the encoder, best first: the moving average before the network that it averages.
_WRAPPERS = (
    "teacher",
    "state_dict_ema",
    "model_ema",
    "momentum_encoder",
    "target_encoder",
    "state_dict",
    "model",
    "student",
)
# What they put before its names. Stripped one after the other, as often as one fits every encoder tensor.
_PREFIXES = (
    "module.", "_orig_mod.", "teacher.", "teacher_", "momentum_encoder.", "momentum_backbone.", "target_encoder.",
    "target_network.", "model_ema.", "ema_model.", "ema_encoder.", "ema.", "encoder_k.", "base_encoder.", "student.",
    "encoder_q.", "online_encoder.", "online_network.", "encoder.", "backbone.", "model.", "vit.", "net.",
)  # fmt: skip
# Heads, projectors and what only training uses.
_NOT_ENCODER = re.compile(
    r"^(head|heads|fc|classifier|last_layer|projector|projection|predictor|mask_token|prototypes|queue|memory)(\.|_|$)"
)

# The first layer of timm's and torchvision's encoders.
_STEM = re.compile(r"(?:^|(?<=[.\n]))(patch_embed|conv1|conv_stem|stem|stem_0|features\.0)\.", re.MULTILINE)


_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.safetensors$")


def read_state(path: Path) -> dict[str, Tensor]:
    """The encoder's tensors in a file, or in a folder of shards NAME-00001-of-00002.safetensors, names as far as possible
    without wrappers. Raises `RefusalError`."""
    if path.is_dir():
        return _read_shards(path)
    if not path.is_file():
        raise RefusalError(f"{path} is not a file: give a state dict (.safetensors, .pth) or a run folder")
    try:
        state: Any = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception as e:  # torch and safetensors raise types of their own
        first = (str(e) or type(e).__name__).splitlines()[0]
        raise RefusalError(f"{path} cannot be read as weights ({first}): give .safetensors or .pth") from e
    while isinstance(state, Mapping) and not _is_state(state):
        inner = next((state[name] for name in _WRAPPERS if isinstance(state.get(name), Mapping)), None)
        if inner is None:
            break
        state = inner
    if not _is_state(state):
        raise RefusalError(
            f"{path} holds a {type(state).__name__} that is no state dict (name → tensor): save model.state_dict()"
        )
    return unwrapped(
        {name: value.detach().float() if value.is_floating_point() else value.detach() for name, value in state.items()}
    )


def _read_shards(folder: Path) -> dict[str, Tensor]:
    found = {file: match for file in sorted(folder.iterdir()) if (match := _SHARD.search(file.name))}
    if not found:
        raise RefusalError(
            f"{folder} is no folder of weights: expected a run (run.json), or shards such as "
            "encoder-00001-of-00002.safetensors"
        )
    names = {file.name[: match.start()] for file, match in found.items()}
    counts = {int(match[2]) for match in found.values()}
    numbers = [int(match[1]) for match in found.values()]
    if len(names) > 1 or len(counts) > 1 or numbers != list(range(1, max(counts) + 1)):
        raise RefusalError(
            f"{folder} holds {len(found)} shards ({', '.join(file.name for file in list(found)[:3])}), all of one set are "
            "needed and no other: copy them again"
        )
    state: dict[str, Tensor] = {}
    for file in found:
        state |= read_state(file)
    return state


def read_run_weights(path: Path, run: RunManifest) -> dict[str, Tensor]:
    """A weight file of a run, compared with the digest in its run.json. Raises `RefusalError`."""
    if not path.is_file():
        raise RefusalError(f"{path} is missing: resume the run so that it writes its encoder")
    try:
        state: dict[str, Tensor] = load_file(path)
    except Exception as e:  # safetensors raises a type of its own
        raise RefusalError(f"{path} cannot be read as weights ({e}): resume the run so that it writes it again") from e
    found = tensors_sha256({name: value.numpy() for name, value in state.items()})
    if found != run.weights_sha256:
        raise RefusalError(
            f"{path} has weights {found[:12]}…, run.json says {run.weights_sha256[:12]}…: the run was interrupted while "
            "saving; continue it with --resume"
        )
    return state


def halved(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Floating-point tensors as float16, ready to be saved."""
    return {n: (value.half() if value.is_floating_point() else value).contiguous() for n, value in state.items()}


def unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without the prefixes that training codes add; of several encoders in one dict the first of `_PREFIXES`."""
    again = True
    while again:
        again = False
        for prefix in _PREFIXES:
            under = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            if under and (len(under) == len(state) or _STEM.search("\n".join(under))) and not _has_stem(state):
                state, again = under, True
                break
    return state


def fit_state(state: Mapping[str, Tensor], model: nn.Module, source: str, advice: str) -> dict[str, Tensor]:
    """The tensors of `state` that `model` has, position embeddings resized; heads are left out.

    Raises `RefusalError`, "`source` holds weights of another architecture …: `advice`", when they do not fit.
    """
    own = model.state_dict()
    fitted = {name: value for name, value in state.items() if name in own or not _NOT_ENCODER.match(name)}
    position, mine = fitted.get("pos_embed"), own.get("pos_embed")
    if position is not None and mine is not None and position.shape != mine.shape and position.ndim == mine.ndim == 3:
        prefix = 0 if getattr(model, "no_embed_class", False) else int(getattr(model, "num_prefix_tokens", 0))
        if math.isqrt(max(0, position.shape[1] - prefix)) ** 2 == position.shape[1] - prefix > 0:
            grid: Any = model.patch_embed.grid_size  # type: ignore[union-attr]
            fitted["pos_embed"] = resample_abs_pos_embed(position, new_size=list(grid), num_prefix_tokens=prefix)
    missing = sorted(own.keys() - fitted.keys())
    unknown = sorted(fitted.keys() - own.keys())
    wrong = sorted(name for name in own.keys() & fitted.keys() if own[name].shape != fitted[name].shape)
    if missing or unknown or wrong:
        parts = [
            f"{len(names)} {what} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
            for what, names in (("missing", missing), ("unknown", unknown), ("of another shape", wrong))
            if names
        ]
        raise RefusalError(
            f"{source} holds weights of another architecture than this encoder: {'; '.join(parts)}: {advice}"
        )
    return fitted


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(x, Tensor) for x in value.values())


def _has_stem(names: Mapping[str, Tensor]) -> bool:
    """Whether these are the names of an encoder without wrapper: its first layer is there."""
    return any(_STEM.match(name) for name in names)
