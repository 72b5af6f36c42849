"""Convolutional networks are adapted: from trained weights, by the image-level objective, with the statistics that their
batch normalisation came with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from export.bundle import Bundle, read_run, read_verdict
from export.preprocess import find_pictures, preprocess
from export.runtime import Runtime
from likewise import main
from training.encoder import architecture, blocks, build_backbone, encode, layers, width

MODEL = "mobilenetv2_035"
FLAGS = ["--encoder", MODEL, "--image-size", "64", "--threads", "1", "--device", "cpu", "--batch-size", "8"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a network whose batch normalisation has seen something."""
    torch.manual_seed(0)
    net = timm.create_model(MODEL, pretrained=False).train()
    with torch.no_grad():
        net(torch.rand(16, 3, 64, 64))
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    save_file(net.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def adapted(weights: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps from them."""
    out = tmp_path_factory.mktemp("adapted") / "run"
    flags = ["--init", str(weights), "--steps", "6", "--head-steps", "2", *FLAGS]
    assert main(["train", str(pictures), "--out", str(out), *flags]) == 0
    return out


def test_convolutions_learn_and_statistics_stay(weights: Path, adapted: Path) -> None:
    before, after = load_file(weights), load_file(adapted / "encoder.safetensors")
    assert set(after) == {name for name in before if not name.startswith("classifier")}
    changed = {name for name, value in after.items() if not torch.equal(value.float(), before[name].float())}
    statistics = {name for name in after if "running" in name or "num_batches" in name}
    assert statistics and not statistics & changed
    assert "blocks.6.0.conv_pw.weight" in changed and "conv_head.weight" in changed


def test_a_run_says_what_it_is_and_exports_what_it_learned(adapted: Path, pictures: Path, tmp_path: Path) -> None:
    run = read_run(adapted)
    assert run.encoder.pooling == "model" and run.config["mim_weight"] == 0.0 and run.encoder.embedding_dim == 1280
    assert "no patches" in run.reasons["mim_weight"]
    assert read_verdict(adapted) is not None
    assert main(["export", str(adapted), "--out", str(tmp_path / "b"), "--weights", "adapted"]) == 0
    pictures = [preprocess(p.read(), run.preprocess).pixels for p in find_pictures(pictures)[:4]]
    rows = Runtime(Bundle.open(tmp_path / "b"), device="cpu").embed(np.stack(pictures))
    net = build_backbone(MODEL, {}, 64).eval()
    net.load_state_dict(load_file(adapted / "encoder.safetensors"))
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (run.encoder.mean, run.encoder.std))
    with torch.no_grad():
        expected = net((torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255.0 - mean) / std)
    expected = nn.functional.normalize(expected, dim=1)
    assert float((torch.from_numpy(rows) * expected).sum(1).min()) > 0.9999


def test_it_goes_on_where_it_was(
    weights: Path, adapted: Path, pictures: Path, tmp_path: Path, stop_at: Callable[[int], None]
) -> None:
    flags = [
        "--init",
        str(weights),
        "--head-steps",
        "2",
        *FLAGS,
        "--resume",
        "--out",
        str(tmp_path / "r"),
        "--steps",
        "6",
    ]
    stop_at(3)
    assert main(["train", str(pictures), *flags]) == 130
    assert main(["train", str(pictures), *flags]) == 0
    whole, parts = (load_file(folder / "encoder.safetensors") for folder in (adapted, tmp_path / "r"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_evaluation_takes_runs_and_weights(weights: Path, adapted: Path, pictures: Path, tmp_path: Path) -> None:
    common = [str(pictures), "--tasks", "knn", "--threads", "1"]
    assert main(["evaluate", str(adapted), *common, "--out", str(tmp_path / "a")]) == 0
    flags = ["--model", MODEL, "--image-size", "64", "--out", str(tmp_path / "b")]
    assert main(["evaluate", str(weights), *common, *flags]) == 0


def test_what_it_cannot_do_is_refused(
    weights: Path, pictures: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    start = ["train", pictures, "--out", tmp_path / "r", *FLAGS, "--steps", "2"]
    assert "--init FILE" in refused(*start)
    assert "no patches: leave --mim-weight out" in refused(*start, "--init", weights, "--mim-weight", "1")
    assert "no patches: leave --patch-size out" in refused(*start, "--init", weights, "--patch-size", "16")
    swin = ["--encoder", "swin_tiny_patch4_window7_224"]
    assert "neither a ViT" in refused("train", pictures, "--out", tmp_path / "r", "--steps", "2", *swin)


@pytest.mark.parametrize("model", ["mobilenetv2_035", "resnet18", "convnext_atto", "mobilenetv3_small_050"])
def test_families_of_convolutional_networks(model: str) -> None:
    found = architecture(model)
    net = build_backbone(model, {}, 64)
    x = torch.rand(2, 3, 64, 64)
    rows, patches = encode(net, x)
    assert found.convolutional and found.patch == 32 and found.width == width(net) == rows.shape[1]
    assert patches.shape[:2] == (2, 4)
    places = layers(net)
    assert set(places) == {name for name, _ in net.named_parameters()}
    first = next(name for name, _ in net.named_parameters())
    assert places[first] == 0 and max(places.values()) > 2
    assert len(blocks(net)) >= 1
    assert torch.allclose(rows, net.eval()(x), atol=1e-5)  # nothing that training mode changes
