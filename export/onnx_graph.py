"""The encoder as one ONNX file: uint8 pixels in, unit rows out."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import onnx
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.bundle import EncoderSpec, Pooling, RefusalError

OPSETS = (20, 23)
# 23 writes attention as one operator. 1.24 still ran it on the CPU beside CUDA without a word (onnxruntime #28025); the CUDA
# kernel came with #27542 in March 2026.
MINIMUM_ONNXRUNTIME = {20: "1.18.0", 23: "1.26.0"}
OPSET_REASONS = {
    20: "runs on every onnxruntime from 1.18 on, on every provider",
    23: "attention as one operator; older runtimes would run it on the CPU without a word and are refused",
}


def minimum_onnxruntime(opset: int) -> str:
    """Oldest runtime that a graph of this opset is run on."""
    return MINIMUM_ONNXRUNTIME[min(known for known in OPSETS if known >= opset)]


class EmbeddingGraph(nn.Module):
    """Scaling, mean and deviation, encoder, pooling, unit length: all of it inside the graph.

    `patches`: also give the patches' unit rows [B, h, w, D'].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: nn.Module, spec: EncoderSpec, patches: bool = False) -> None:
        super().__init__()
        self.encoder = encoder
        self.pooling: Pooling = spec.pooling
        self.patches = patches
        self.register_buffer("mean", 255.0 * torch.tensor(spec.mean).view(1, 3, 1, 1))
        self.register_buffer("std", 255.0 * torch.tensor(spec.std).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """uint8 [B, H, W, 3] → float32 [B, D], unit rows; with `patches` also [B, h, w, D']."""
        x = (images.permute(0, 3, 1, 2).float() - self.mean) / self.std
        if self.pooling == "model" and not self.patches:
            return F.normalize(self.encoder(x), dim=-1)
        features = self.encoder.forward_features(x)  # type: ignore[operator]
        cls, patches = split_features(self.encoder, features)
        own = self.encoder.forward_head(features, pre_logits=True) if self.pooling == "model" else None  # type: ignore[operator]
        row = F.normalize(pool(self.pooling, cls, patches.flatten(1, 2)) if own is None else own, dim=-1)
        return (row, F.normalize(patches, dim=-1)) if self.patches else row

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """The first output alone."""
        found = self(images)
        row: Tensor = found[0] if isinstance(found, tuple) else found
        return row


def has_class_token(encoder: nn.Module) -> bool:
    """Whether the first of its last features is a class token (ViT, DINOv3's Eva, BEiT, …)."""
    return bool(getattr(encoder, "has_class_token", False)) or getattr(encoder, "cls_token", None) is not None


def split_features(encoder: nn.Module, features: Tensor) -> tuple[Tensor | None, Tensor]:
    """timm's last features → class token [B, C] or None, patches [B, h, w, C] (registers are dropped)."""
    if features.ndim == 4:
        last = getattr(encoder, "output_fmt", "NCHW") == "NHWC"
        return None, features if last else features.permute(0, 2, 3, 1)
    prefix = int(getattr(encoder, "num_prefix_tokens", 0))
    patches = features[:, prefix:]
    side = math.isqrt(patches.shape[1])
    cls = features[:, 0] if has_class_token(encoder) else None
    return cls, patches.unflatten(1, (side, -1))  # type: ignore[no-untyped-call]


def pool(pooling: Pooling, cls: Tensor | None, patches: Tensor) -> Tensor:
    """Class token [B, C] and patches [B, L, C] → [B, D] (`export.bundle.Pooling`)."""
    if pooling == "gem":
        return patches.clamp_min(1e-6).pow(3).mean(1).pow(1 / 3)
    if pooling == "mean":
        return patches.mean(1)
    assert cls is not None
    if pooling == "cls":
        return cls
    return torch.cat([F.normalize(cls, dim=-1), F.normalize(patches.mean(1), dim=-1)], -1)


def build_encoder(spec: EncoderSpec) -> nn.Module:
    """The network of a specification, without weights. Raises `RefusalError`."""
    if not timm.is_model(spec.model):
        raise RefusalError(f"timm {timm.__version__} has no model {spec.model!r}: install the timm that it comes from")
    common = {"pretrained": False, "num_classes": 0, **spec.kwargs}
    try:
        try:
            encoder = timm.create_model(spec.model, img_size=spec.image_size, **common)
        except TypeError:  # convolutional networks take any size
            encoder = timm.create_model(spec.model, **common)
    except (TypeError, ValueError, RuntimeError, AssertionError) as e:
        raise RefusalError(
            f"timm cannot build {spec.model} with {spec.kwargs} at {spec.image_size} px ({str(e).splitlines()[0]}): choose "
            "another --image-size or --patch-size"
        ) from e
    if spec.pooling != "model" and isinstance(getattr(encoder, "norm", None), nn.Identity):
        raise RefusalError(
            f"{spec.model} normalises after its own pooling, so that {spec.pooling} of its last features has no scale: "
            "choose --pooling model"
        )
    if spec.pooling in ("cls", "cls+mean") and not has_class_token(encoder):
        raise RefusalError(f"{spec.model} has no class token to pool: choose --pooling mean, gem or model")
    return encoder


def load_encoder(spec: EncoderSpec, state: Mapping[str, Tensor], source: str, patches: bool = False) -> EmbeddingGraph:
    """The network with its weights, in evaluation mode. Raises `RefusalError`, which names `source`."""
    encoder = build_encoder(spec)
    try:
        encoder.load_state_dict(state)
    except RuntimeError as e:
        raise RefusalError(
            f"{source} does not fit the network that is described ({str(e).splitlines()[0]}): resume the run so that it "
            "writes both again"
        ) from e
    return EmbeddingGraph(encoder, spec, patches).eval()


def count_dimensions(graph: EmbeddingGraph, image_size: int) -> tuple[int, tuple[int, int, int] | None]:
    """Length of an embedding, and the shape of the patches [h, w, D'] where the graph gives them."""
    with torch.no_grad():
        found = graph(torch.zeros(1, image_size, image_size, 3, dtype=torch.uint8))
    if not isinstance(found, tuple):
        return found.shape[1], None
    _, h, w, c = found[1].shape
    return found[0].shape[1], (h, w, c)


def write_graph(graph: EmbeddingGraph, image_size: int, path: Path, opset: int) -> None:
    """Write the ONNX file: dynamic batch named `batch`, fixed size, weights inside. Raises `RefusalError`."""
    # Two pictures: a batch of one would be taken for a constant by some exporters.
    example = torch.zeros(2, image_size, image_size, 3, dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1, max=4096)
    loggers = [logging.getLogger(name) for name in ("onnxscript", "torch.onnx", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # the exporter narrates
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                graph, (example,), input_names=["images"],
                output_names=["embedding", "patches"] if graph.patches else ["embedding"],
                dynamic_shapes={"images": {0: batch}}, opset_version=opset, dynamo=True, external_data=False,
                verbose=False,
            )  # fmt: skip
            assert program is not None
            program.save(str(path), external_data=False)
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    check_structure(path, image_size, attentions(graph.encoder) if opset >= 23 else None)


def reduce_node(kind: str, x: str, y: str, prefix: str, opset: int, keepdims: int) -> onnx.NodeProto:
    """Over axis 1; the constant `prefix`/axes, [1], is used from opset 18 on, where axes became an input."""
    if opset >= 18:
        return onnx.helper.make_node(kind, [x, f"{prefix}/axes"], [y], keepdims=keepdims)
    return onnx.helper.make_node(kind, [x], [y], axes=[1], keepdims=keepdims)


def unit_length(row: str, out: str, prefix: str, opset: int) -> list[onnx.NodeProto]:
    """Nodes from rows [batch, D] to rows of length 1; the constants `prefix`/axes and `prefix`/epsilon are the caller's."""
    norm, length = f"{prefix}/norm", f"{prefix}/length"
    return [
        reduce_node("ReduceL2", row, norm, prefix, opset, keepdims=1),
        onnx.helper.make_node("Max", [norm, f"{prefix}/epsilon"], [length]),
        onnx.helper.make_node("Div", [row, length], [out]),
    ]


def attentions(encoder: nn.Module) -> int:
    """How many fused attentions the network has: each becomes one operator from opset 23 on."""
    inside = [m for name, m in encoder.named_modules() if not name.startswith("attn_pool")]  # that one pools, by itself
    return sum(bool(getattr(module, "fused_attn", False)) for module in inside)


def check_structure(path: Path, image_size: int, attentions: int | None = None) -> None:
    """What every graph of a bundle must be: one file, uint8 in, a free batch, no control flow, `attentions` Attention
    operators where the opset has them. Raises `RefusalError`."""
    model = onnx.load(str(path))
    onnx.checker.check_model(model)
    (given,) = model.graph.input
    shape = [d.dim_param or d.dim_value for d in given.type.tensor_type.shape.dim]
    if shape != ["batch", image_size, image_size, 3] or given.type.tensor_type.elem_type != onnx.TensorProto.UINT8:
        raise RefusalError(
            f"the exporter gave the input shape {shape} instead of [batch, {image_size}, {image_size}, 3]"
        )
    kinds = Counter(node.op_type for node in model.graph.node)
    if kinds["If"] or kinds["Loop"]:
        raise RefusalError(f"the exported graph holds control flow ({kinds['If']} If, {kinds['Loop']} Loop)")
    if attentions is not None and kinds["Attention"] != attentions:
        raise RefusalError(
            f"the exported graph holds {kinds['Attention']} Attention operators, the network {attentions}: use --opset 20"
        )
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in model.graph.initializer):
        raise RefusalError("the exporter kept weights outside the file")
