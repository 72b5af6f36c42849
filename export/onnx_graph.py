"""The encoder as one ONNX file: uint8 pixels in, unit rows out."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections import Counter
from pathlib import Path

import onnx
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from export.bundle import EncoderSpec, RefusalError

# 20 is the newest opset that every runtime we accept runs everywhere; 23's Attention falls back to the CPU
# without an error in older onnxruntime-gpu.
OPSET = 20
MINIMUM_ONNXRUNTIME = "1.18.0"


class EmbeddingGraph(nn.Module):
    """Scaling, mean and deviation, encoder, class token, unit length: all of it inside the graph."""

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: nn.Module, spec: EncoderSpec) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("mean", 255.0 * torch.tensor(spec.mean).view(1, 3, 1, 1))
        self.register_buffer("std", 255.0 * torch.tensor(spec.std).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] → float32 [B, D], unit rows."""
        x = (images.permute(0, 3, 1, 2).float() - self.mean) / self.std
        tokens = self.encoder.forward_features(x)  # type: ignore[operator]
        return F.normalize(tokens[:, 0], dim=-1)


def load_encoder(spec: EncoderSpec, weights: Path) -> EmbeddingGraph:
    """The network that a run describes, with its weights, in evaluation mode. Raises `RefusalError`."""
    try:
        encoder = timm.create_model(
            spec.model, pretrained=False, num_classes=0, img_size=spec.image_size, **spec.kwargs
        )
        encoder.load_state_dict(load_file(weights))
    except (RuntimeError, TypeError, FileNotFoundError) as e:
        raise RefusalError(
            f"{weights} does not fit the network that run.json describes ({str(e).splitlines()[0]}): resume the run so "
            "that it writes both again"
        ) from e
    return EmbeddingGraph(encoder, spec).eval()


def write_graph(graph: EmbeddingGraph, image_size: int, path: Path) -> None:
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
                graph, (example,), input_names=["images"], output_names=["embedding"],
                dynamic_shapes={"images": {0: batch}}, opset_version=OPSET, dynamo=True, external_data=False,
                verbose=False,
            )  # fmt: skip
            assert program is not None
            program.save(str(path), external_data=False)
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    _check_structure(path, image_size)


def _check_structure(path: Path, image_size: int) -> None:
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
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in model.graph.initializer):
        raise RefusalError("the exporter kept weights outside the file")
