"""Checkpoints as other code bases write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from export.bundle import RefusalError
from export.weights import fit_state, read_state

KWARGS: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8}


def vit(**changed: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, **{**KWARGS, **changed})


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


HEAD = {"mlp.0.weight": torch.zeros(3, 32), "last_layer.weight_v": torch.zeros(3, 3)}


def layouts(mine: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Name of a code base → its checkpoint, where `mine` is what should be found."""
    other = {name: value + 1.0 for name, value in mine.items()}
    both = {**prefixed(mine, "teacher.backbone."), **prefixed(other, "student.backbone.")}
    return {
        "timm": mine,
        "timm with head": {**mine, "head.weight": torch.zeros(10, 32), "fc_norm.weight": torch.zeros(32)},
        "timm with averaged weights": {"state_dict": other, "state_dict_ema": mine, "epoch": 3},
        "DINO and SOP": {
            "student": {**prefixed(other, "module.backbone."), **prefixed(HEAD, "module.head.")},
            "teacher": {**prefixed(mine, "backbone."), **prefixed(HEAD, "head.")},
            "optimizer": {"state": {}, "param_groups": []}, "epoch": 7,
        },
        "iBOT's extracted backbone": {"state_dict": {**mine, "mask_token": torch.zeros(1, 32)}},
        "MoCo v3": {
            "state_dict": {
                **prefixed(other, "module.base_encoder."), **prefixed(mine, "module.momentum_encoder."),
                **prefixed(HEAD, "module.predictor."),
            },
            "arch": "vit",
        },
        "Lightning": {"state_dict": both, "pytorch-lightning_version": "2.5", "global_step": 1},
        "MoCo v2": {"state_dict": {**prefixed(other, "module.encoder_q."), **prefixed(mine, "module.encoder_k.")}},
        "solo-learn": {"state_dict": {**prefixed(other, "backbone."), **prefixed(mine, "momentum_backbone.")}},
        "averaged beside the model": {"state_dict": {**prefixed(other, "model."), **prefixed(mine, "model_ema.module.")}},
        "compiled": prefixed(mine, "_orig_mod.model."),
    }  # fmt: skip


@pytest.mark.parametrize("name", layouts({}))
def test_the_teacher_is_found_without_its_wrappers(name: str, tmp_path: Path) -> None:
    model = vit()
    mine = {key: value.clone() for key, value in model.state_dict().items()}
    torch.save(layouts(mine)[name], tmp_path / "weights.pth")
    found = fit_state(read_state(tmp_path / "weights.pth"), model, "it", "do this")
    assert found.keys() == mine.keys()
    assert all(torch.equal(found[key], mine[key]) for key in mine)


def test_convolutional_encoders_and_safetensors(tmp_path: Path) -> None:
    model = timm.create_model("resnet18", num_classes=0)
    state = {f"backbone.{name}": value for name, value in model.state_dict().items()}
    save_file({**state, "projector.0.weight": torch.zeros(2, 2)}, tmp_path / "weights.safetensors")
    found = fit_state(read_state(tmp_path / "weights.safetensors"), model, "it", "do this")
    assert found.keys() == model.state_dict().keys()


def test_weights_of_half_precision_are_the_same_weights(tmp_path: Path) -> None:
    state = {name: value.to(torch.bfloat16) for name, value in vit().state_dict().items()}
    save_file(state, tmp_path / "half.safetensors")
    torch.save({name: nn.Parameter(value.float()) for name, value in state.items()}, tmp_path / "full.pth")
    half, full = read_state(tmp_path / "half.safetensors"), read_state(tmp_path / "full.pth")
    assert all(half[name].dtype == torch.float32 and not full[name].requires_grad for name in state)
    assert all(torch.equal(half[name], full[name]) for name in state)


def test_position_embeddings_are_resized(tmp_path: Path) -> None:
    small, large = vit(), vit(img_size=64)
    found = fit_state(small.state_dict(), large, "it", "do this")
    assert found["pos_embed"].shape == large.state_dict()["pos_embed"].shape
    assert torch.equal(found["pos_embed"][:, 0], small.state_dict()["pos_embed"][:, 0])  # the class token's own


def test_refusals_name_what_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(RefusalError, match=r"1[0-9] missing \(blocks\.1.*: do this"):
        fit_state(vit(depth=1).state_dict(), vit(), "it", "do this")
    with pytest.raises(RefusalError, match=r"unknown \(blocks\.1"):
        fit_state(vit().state_dict(), vit(depth=1), "it", "do this")
    torch.save({"epoch": 3, "model": {"note": "none"}}, tmp_path / "odd.pth")
    with pytest.raises(RefusalError, match="holds a dict that is no state dict"):
        read_state(tmp_path / "odd.pth")
    (tmp_path / "broken.pth").write_bytes(b"PK\x03\x04")
    with pytest.raises(RefusalError, match="cannot be read as weights"):
        read_state(tmp_path / "broken.pth")
    with pytest.raises(RefusalError, match="is not a file"):
        read_state(tmp_path / "gone.pth")
