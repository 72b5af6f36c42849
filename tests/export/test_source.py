"""Encoders of every kind become bundles, or are refused in a sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn

from export.bundle import Bundle, EncoderSpec, RefusalError, read_run, tensors_sha256
from export.command import write_bundle
from export.onnx_graph import EmbeddingGraph, attentions, build_encoder, has_class_token, load_encoder
from export.preprocess import PreprocessSpec, find_pictures, preprocess
from export.runtime import Runtime, open_graph
from export.sample import read_sample
from export.source import of_network
from likewise import main

QUIET = Console(quiet=True)
SMALL: dict[str, dict[str, Any]] = {  # the published architectures, as shallow as they go
    "vit_tiny_patch16_224": {"depth": 2},
    "vit_small_patch16_224": {"depth": 1},
    "vit_base_patch16_224": {"depth": 1},
    "vit_small_patch14_reg4_dinov2": {"depth": 1},
    "swin_tiny_patch4_window7_224": {"depths": (1, 1), "embed_dim": 32, "num_heads": (1, 2)},
    "convnext_atto": {"depths": (1, 1, 1, 1)},
    "resnet50": {"layers": (1, 1, 1, 1)},
}


def scrambled(spec: EncoderSpec) -> nn.Module:
    """A network whose parts all matter: timm starts some at 0 or 1."""
    torch.manual_seed(0)
    encoder = build_encoder(spec)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if parameter.ndim < 2 or "pos_embed" in name or "token" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return encoder


@pytest.mark.parametrize(
    ("model", "pooling", "patches", "opset"),
    [
        ("vit_tiny_patch16_224", "cls+mean", True, 23),
        ("vit_small_patch16_224", "cls", False, 20),
        ("vit_base_patch16_224", "gem", False, 20),
        ("vit_small_patch14_reg4_dinov2", "mean", False, 23),
        ("swin_tiny_patch4_window7_224", "mean", True, 20),
        ("convnext_atto", "model", False, 20),
        ("resnet50", "gem", False, 20),
    ],
)
def test_architectures(model: str, pooling: Any, patches: bool, opset: int, pictures: Path, tmp_path: Path) -> None:
    size = 56 if "14" in model or "swin" in model else 64
    spec = EncoderSpec(model=model, kwargs=SMALL[model], image_size=size, embedding_dim=1, pooling=pooling)
    state = scrambled(spec).state_dict()
    graph = load_encoder(spec, state, "test", patches)
    digest = tensors_sha256({name: value.numpy() for name, value in state.items()})
    source = of_network(graph, spec, PreprocessSpec(size=size), digest, {}, None)
    sample = read_sample(pictures, source.preprocess)
    bundle = write_bundle(source, sample, tmp_path / "b", opset, QUIET)
    runtime = Runtime(Bundle.open(tmp_path / "b"), "cpu", 1)
    expected = source.embed(sample.pixels)
    assert expected.shape == (64, bundle.dim) and np.allclose(np.linalg.norm(expected, axis=1), 1, atol=1e-5)
    for count in (1, 3, 32):
        assert np.abs(runtime.embed(sample.pixels[:count]) - expected[:count]).max() < 2e-5
    kinds = [node.op_type for node in onnx.load(str(tmp_path / "b" / "model.onnx")).graph.node]
    assert kinds.count("Attention") == (attentions(graph.encoder) if opset == 23 else 0)
    if patches:
        assert bundle.manifest.patches is not None
        h, w, c = bundle.manifest.patches
        found = open_graph(bundle.graph())({"images": sample.pixels[:3]}, "patches")
        assert found.shape == (3, h, w, c) and np.allclose(np.linalg.norm(found, axis=-1), 1, atol=1e-5)
        with torch.no_grad():
            assert np.abs(graph(torch.from_numpy(sample.pixels[:3]))[1].numpy() - found).max() < 2e-5


def test_what_the_poolings_are() -> None:
    spec = EncoderSpec(model="vit_tiny_patch16_224", kwargs={"depth": 1}, image_size=32, embedding_dim=1)
    state = scrambled(spec).state_dict()
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8, generator=torch.manual_seed(0))

    def embed(**changed: Any) -> torch.Tensor:
        return load_encoder(spec.model_copy(update=changed), state, "test").embed(pixels)

    encoder = load_encoder(spec, state, "test").encoder
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (spec.mean, spec.std))
    with torch.no_grad():
        tokens = encoder.forward_features((pixels.permute(0, 3, 1, 2) / 255 - mean) / std)  # type: ignore[operator]
    unit = torch.nn.functional.normalize
    cls, patches = tokens[:, 0], tokens[:, 1:]
    assert torch.allclose(embed(pooling="cls"), unit(cls), atol=1e-5)
    assert torch.allclose(embed(pooling="mean"), unit(patches.mean(1)), atol=1e-5)
    both = torch.cat([unit(cls), unit(patches.mean(1))], 1)
    assert torch.allclose(embed(pooling="cls+mean"), unit(both), atol=1e-5)
    gem = (patches.clamp_min(1e-6) ** 3).mean(1) ** (1 / 3)
    assert torch.allclose(embed(pooling="gem"), unit(gem), atol=1e-5)
    with torch.no_grad():
        own = encoder((pixels.permute(0, 3, 1, 2) / 255 - mean) / std)
    assert torch.allclose(embed(pooling="model"), unit(own), atol=1e-5)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DINO checkpoint of a ResNet-10."""
    torch.manual_seed(1)
    state = timm.create_model("resnet10t", num_classes=0).state_dict()
    path = tmp_path_factory.mktemp("weights") / "dino.pth"
    torch.save({"teacher": {f"backbone.{name}": value for name, value in state.items()}, "epoch": 3}, path)
    return path


@pytest.mark.slow
def test_weights_of_another_code_base(
    weights: Path, pictures: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    out = tmp_path / "b"
    flags = ["--model", "resnet10t", "--image-size", "64", "--images", str(pictures)]
    assert main(["export", str(weights), "--out", str(out), *flags]) == 0
    bundle = Bundle.open(out)
    assert bundle.manifest.encoder.pooling == "model" and bundle.manifest.provenance["kind"] == "weights"
    assert Runtime(bundle, "cpu", 1).check_canary() > 0.9999
    # Another pooling or preprocessing is another space.
    other = ["export", str(weights), "--out", str(tmp_path / "c"), *flags, "--pooling", "gem", "--fit", "pad"]
    assert main(other) == 0 and Bundle.open(tmp_path / "c").space_id != bundle.space_id
    assert "name its architecture with --model" in refused("export", weights, "--out", tmp_path / "d")
    assert "pass --images" in refused("export", weights, "--out", tmp_path / "d", *flags[:4])
    assert "no class token" in refused("export", weights, "--out", tmp_path / "d", *flags, "--pooling", "cls")
    assert "another architecture" in refused(
        "export", weights, "--out", tmp_path / "d", "--model", "resnet18", *flags[4:]
    )
    assert "--normalization model or --normalization imagenet" in refused(
        "export", weights, "--out", tmp_path / "d", "--model", "vit_tiny_patch16_224", *flags[4:]
    )
    assert "has no model 'resnet10x'" in refused("export", weights, "--out", tmp_path / "d", "--model", "resnet10x")
    assert not (tmp_path / "d").exists()


def test_a_run_knows_its_network(run: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "leave out --model" in refused("export", run, "--out", tmp_path / "b", "--model", "resnet18")
    assert main(["export", str(run), "--out", str(tmp_path / "b"), "--pooling", "cls+mean"]) == 0
    assert Bundle.open(tmp_path / "b").dim == 128


def test_a_run_can_take_larger_pictures_than_it_saw(run: Path, pictures: Path, tmp_path: Path) -> None:
    assert main(["export", str(run), "--out", str(tmp_path / "b"), "--image-size", "48"]) == 0
    larger, about = Bundle.open(tmp_path / "b"), read_run(run)
    assert larger.manifest.preprocess == about.preprocess.model_copy(update={"size": 48})
    assert larger.manifest.weights_sha256 == about.weights_sha256  # they are the run's, and the space is another
    net = build_encoder(about.encoder.model_copy(update={"image_size": 48}))
    state = load_file(run / "encoder.safetensors")
    grid = state["pos_embed"][:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, (6, 6), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    net.load_state_dict({**state, "pos_embed": torch.cat([state["pos_embed"][:, :1], grid], 1)})
    graph = EmbeddingGraph(net.eval(), larger.manifest.encoder)
    pixels = np.stack([preprocess(p.read(), larger.manifest.preprocess).pixels for p in find_pictures(pictures)[:5]])
    rows = Runtime(larger, "cpu", 1).embed(pixels)
    assert np.abs(rows - graph.embed(torch.from_numpy(pixels)).numpy()).max() < 1e-5


# --- ONNX files -------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """What others export: normalised pixels in, something out."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.kind = kind
        self.vit = timm.create_model(
            "vit_tiny_patch16_224", num_classes=0, img_size=32, depth=1, embed_dim=48, num_heads=3, patch_size=8
        )

    def forward(self, x: torch.Tensor) -> Any:
        if self.kind == "raw":
            x = x.permute(0, 3, 1, 2).float() / 255 - 0.5
        tokens = self.vit.forward_features(x)
        if self.kind == "frozen":
            return tokens[:, 0].reshape(1, 48)
        return (
            tokens if self.kind == "tokens" else (tokens[:, 0], tokens.mean(1)) if self.kind == "two" else tokens[:, 0]
        )


def foreign(kind: str, folder: Path, opset: int = 17) -> Path:
    raw = kind == "raw"
    example = torch.zeros(2, 32, 32, 3, dtype=torch.uint8) if raw else torch.zeros(2, 3, 32, 32)
    shapes = ({0: torch.export.Dim("n", min=1, max=64)},)
    if kind == "frozen":
        example, shapes = example[:1], None  # type: ignore[assignment]
    program = torch.onnx.export(
        Plain(kind).eval(), (example,), input_names=["images" if kind == "named" else "pixel_values"],
        dynamic_shapes=shapes, opset_version=max(18, opset), dynamo=True, external_data=False, verbose=False,
        output_names=["first", "second"] if kind == "two" else ["embedding" if kind == "named" else "output"],
    )  # fmt: skip
    assert program is not None
    path = folder / f"{kind}.onnx"
    program.save(str(path))
    return path


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ("plain", ["--normalization", "imagenet"]),
        ("named", ["--normalization", "imagenet"]),  # as ours are
        ("raw", []),
        ("tokens", ["--normalization", "model", "--model", "vit_tiny_patch16_224", "--pooling", "mean"]),
        ("two", ["--normalization", "none", "--output", "second"]),
    ],
)
def test_an_onnx_file_is_adopted(kind: str, flags: list[str], pictures: Path, tmp_path: Path) -> None:
    path = foreign(kind, tmp_path)
    out = tmp_path / "b"
    assert main(["export", str(path), "--out", str(out), "--images", str(pictures), *flags]) == 0
    bundle = Bundle.open(out)
    sample = read_sample(pictures, bundle.manifest.preprocess)
    mean, std = (np.array(x, np.float32) for x in (bundle.manifest.encoder.mean, bundle.manifest.encoder.std))
    plain = torch.from_numpy(((sample.pixels / 255.0 - mean) / std).astype(np.float32)).permute(0, 3, 1, 2)
    with torch.no_grad():
        found = Plain(kind).eval()(torch.from_numpy(sample.pixels) if kind == "raw" else plain)
    rows = found[:, 1:].mean(1) if kind == "tokens" else found[1] if kind == "two" else found
    expected = torch.nn.functional.normalize(rows, dim=1).numpy()
    assert np.abs(Runtime(bundle, "cpu", 1).embed(sample.pixels) - expected).max() < 1e-5
    assert bundle.manifest.encoder.model == "onnx" and bundle.dim == 48


@pytest.mark.slow
def test_onnx_files_that_do_not_say_enough_are_refused(
    pictures: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    plain, tokens, two, frozen = (foreign(kind, tmp_path) for kind in ("plain", "tokens", "two", "frozen"))
    common = ["--out", tmp_path / "b", "--images", pictures]
    assert "does not say how they are scaled" in refused("export", plain, *common)
    imagenet = ["--normalization", "imagenet", *common]
    assert "--pooling cls" in refused("export", tokens, *imagenet)
    assert "with --output NAME" in refused("export", two, *imagenet)
    assert "leave --pooling out" in refused("export", plain, *imagenet, "--pooling", "mean")
    assert "leave --image-size out" in refused("export", plain, *imagenet, "--image-size", "64")
    assert "its batch size is fixed inside" in refused("export", frozen, *imagenet)
    (tmp_path / "torn.onnx").write_bytes(plain.read_bytes()[:1000])
    assert "cannot be read as an ONNX model" in refused("export", tmp_path / "torn.onnx", *imagenet)
    assert not (tmp_path / "b").exists()
    with pytest.raises(RefusalError, match="holds no variant 'int8'"):
        assert main(["export", str(plain), *map(str, imagenet)]) == 0
        Bundle.open(tmp_path / "b").graph("int8")


def test_the_space_is_that_of_weights_and_output(pictures: Path, tmp_path: Path) -> None:
    two = foreign("two", tmp_path)
    flags = ["--normalization", "none", "--images", str(pictures)]
    spaces = set()
    for output in ("first", "second"):
        out = tmp_path / output
        assert main(["export", str(two), "--out", str(out), "--output", output, *flags]) == 0
        spaces.add(Bundle.open(out).space_id)
    # Weights in a file of their own: the graph's file stays the same where they differ.
    model = onnx.load(str(foreign("plain", tmp_path)))
    for change in (0.0, 0.1):
        folder = tmp_path / f"external-{change}"
        folder.mkdir()
        largest = max(model.graph.initializer, key=lambda t: len(t.raw_data))
        largest.raw_data = (np.frombuffer(largest.raw_data, np.float32) + np.float32(change)).tobytes()
        onnx.save(model, str(folder / "m.onnx"), save_as_external_data=True, location="m.data", size_threshold=1024)
        onnx.load_external_data_for_model(model, str(folder))
        assert main(["export", str(folder / "m.onnx"), "--out", str(folder / "b"), *flags]) == 0
        spaces.add(Bundle.open(folder / "b").space_id)
    assert len(spaces) == 4


def test_dinov3_has_a_class_token() -> None:
    encoder = timm.create_model("vit_small_patch16_dinov3", num_classes=0, img_size=32, depth=1)
    assert has_class_token(encoder)
    with pytest.raises(RefusalError, match="choose --pooling model"):
        build_encoder(EncoderSpec(model="beit_base_patch16_224", kwargs={"depth": 1}, image_size=224, embedding_dim=1))


@pytest.mark.slow
def test_safetensors_of_a_timm_model(pictures: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    state = timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=32).state_dict()
    save_file(state, tmp_path / "w.safetensors")
    flags = ["--model", "vit_tiny_patch16_224", "--image-size", "64", "--normalization", "model"]
    flags += ["--images", str(pictures)]
    assert main(["export", str(tmp_path / "w.safetensors"), "--out", str(tmp_path / "b"), *flags]) == 0
    spec = Bundle.open(tmp_path / "b").manifest.encoder
    assert spec.mean == (0.5, 0.5, 0.5) and spec.pooling == "cls" and spec.image_size == 64
