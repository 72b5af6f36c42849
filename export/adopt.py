"""An ONNX file of others as a bundle: inspected, wrapped from pixels to unit rows, and compared with what it gave before."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx.compose
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console

from export.bundle import Embeddings, EncoderSpec, RefusalError
from export.config import Export
from export.onnx_graph import OPSETS, check_structure, reduce_node, unit_length
from export.preprocess import Pixels, PreprocessSpec
from export.runtime import open_graph
from export.source import IMAGENET, Source, exported_with

UNIT = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


class _Shape(NamedTuple):
    """What a graph takes and gives."""

    input: str
    pixels: bool  # uint8 [batch, H, W, 3], as ours; otherwise float32 [batch, 3, H, W]
    size: int
    output: str
    tokens: bool  # [batch, T, D], otherwise [batch, D]
    dim: int


def adopt(asked: Export, console: Console) -> Source:
    """The encoder in an ONNX file. Raises `RefusalError` where it is none, or does not say enough."""
    path = asked.source
    model = _load(path)
    shape = _inspect(asked, model)
    mean, std = _normalization(asked, shape)
    pooling = asked.pooling or "model"
    if shape.tokens and pooling not in ("cls", "mean"):
        raise RefusalError(
            f"{path} gives [batch, tokens, {shape.dim}]: say how they become one vector with --pooling cls (the first "
            "token) or --pooling mean (all but the first)"
        )
    if not shape.tokens and pooling != "model":
        raise RefusalError(f"{path} gives one vector per picture already: leave --pooling out")
    for name in ("patch_size", "patches"):
        if getattr(asked, name):
            raise RefusalError(f"{path} is an ONNX file: leave --{name.replace('_', '-')} out")
    if asked.opset != "auto" or asked.weights != "auto":
        raise RefusalError(f"{path} is an ONNX file, it has its opset and weights: leave --opset and --weights out")
    digest = hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()  # weights beside the file included
    (opset,) = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    if not 13 <= opset <= max(OPSETS):
        raise RefusalError(f"{path} has opset {opset}, 13 to {max(OPSETS)} can be adopted: export it again")
    spec = EncoderSpec(
        model="onnx", kwargs={"output": shape.output}, image_size=shape.size, embedding_dim=shape.dim, pooling=pooling,
        mean=mean, std=std,
    )  # fmt: skip
    console.print(
        f"{path.name}: input {shape.input} at {shape.size} px, output {shape.output} of {shape.dim}; normalised with mean "
        f"{mean} and deviation {std}; pooling {pooling}"
    )
    run = open_graph(path)

    def embed(pixels: Pixels) -> Embeddings:
        """The file as it came, on prepared pixels, one by one where its batch is fixed."""
        x: Any = pixels
        if not shape.pixels:
            scaled = pixels.astype(np.float32) / 255.0
            x = ((scaled - np.array(mean, np.float32)) / np.array(std, np.float32)).transpose(0, 3, 1, 2)
        parts = x[:, None] if _fixed_batch(model) else [x]
        rows = np.concatenate([run({shape.input: np.ascontiguousarray(part)}, shape.output) for part in parts])
        if shape.tokens:
            rows = rows[:, 0] if pooling == "cls" else rows[:, 1:].mean(1)
        unit: Embeddings = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
        return unit.astype(np.float32)

    def write(out: Path, _: int) -> None:
        onnx.save(_wrapped(model, shape, mean, std, pooling, opset), str(out))
        check_structure(out, shape.size)
        _require_free_batch(out, path)

    provenance = {
        "kind": "onnx", "file": path.name, "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "exported_with": exported_with(),
    }  # fmt: skip
    return Source(
        spec, PreprocessSpec(size=shape.size, fit=asked.fit or "crop"), digest, provenance, None, None, write,
        embed, opset,
    )  # fmt: skip


def _load(path: Path) -> onnx.ModelProto:
    try:
        model = onnx.load(str(path))
        onnx.checker.check_model(model)
    except Exception as e:  # protobuf and onnx raise types of their own
        first = (str(e) or type(e).__name__).splitlines()[0]
        raise RefusalError(f"{path} cannot be read as an ONNX model ({first}): export it again") from e
    return model


def _inspect(asked: Export, model: onnx.ModelProto) -> _Shape:
    inputs = _inputs(model)
    if len(inputs) != 1:
        raise RefusalError(
            f"{asked.source} takes {len(inputs)} inputs ({', '.join(v.name for v in inputs)}), an image encoder takes one: "
            "export the image part alone"
        )
    kind, dims = inputs[0].type.tensor_type.elem_type, _dims(inputs[0])
    pixels = kind == TensorProto.UINT8 and len(dims) == 4 and dims[3] == 3
    if not pixels and not (kind == TensorProto.FLOAT and len(dims) == 4 and dims[1] == 3):
        raise RefusalError(
            f"{asked.source} takes {TensorProto.DataType.Name(kind).lower()} {dims}, float [batch, 3, H, W] or uint8 "
            "[batch, H, W, 3] is expected: export it so"
        )
    height, width = dims[1:3] if pixels else dims[2:4]
    sizes = {side for side in (height, width) if isinstance(side, int) and side > 0}
    if len(sizes) > 1:
        raise RefusalError(f"{asked.source} takes pictures of {height} × {width}, only squares are served")
    if not sizes and asked.image_size is None:
        raise RefusalError(f"{asked.source} takes pictures of any size: choose one with --image-size")
    if sizes and asked.image_size not in (None, *sizes):
        raise RefusalError(f"{asked.source} takes pictures of {sizes.pop()} px: leave --image-size out")
    floats = [v for v in model.graph.output if v.type.tensor_type.elem_type == TensorProto.FLOAT]
    found = [v for v in floats if v.name == asked.output] if asked.output else [v for v in floats if len(_dims(v)) == 2]
    found = found or ([] if asked.output else [v for v in floats if len(_dims(v)) == 3])
    if len(found) != 1:
        known = ", ".join(f"{v.name} {_dims(v)}" for v in model.graph.output)
        raise RefusalError(f"{asked.source} gives {known}: say which is the embedding with --output NAME")
    out = _dims(found[0])
    if len(out) not in (2, 3) or not isinstance(out[-1], int) or out[-1] < 1:
        raise RefusalError(
            f"the output {found[0].name} of {asked.source} is {out}, [batch, D] or [batch, tokens, D] is expected: choose "
            "another with --output"
        )
    size = sizes.pop() if sizes else int(asked.image_size or 0)
    return _Shape(inputs[0].name, pixels, size, found[0].name, len(out) == 3, out[-1])


def _dims(value: onnx.ValueInfoProto) -> list[int | str]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


def _inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """What a caller gives: old exporters list the weights as inputs, too."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in weights]


def _fixed_batch(model: onnx.ModelProto) -> bool:
    (given,) = _inputs(model)
    return _dims(given)[0] == 1


def _normalization(asked: Export, shape: _Shape) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    if shape.pixels and asked.normalization not in (None, "none"):
        raise RefusalError(f"{asked.source} takes uint8 pixels and normalises them itself: leave --normalization out")
    if shape.pixels or asked.normalization == "none":
        return UNIT
    if asked.normalization == "imagenet":
        return IMAGENET
    if asked.normalization == "model" and asked.model:
        import timm

        config = timm.get_pretrained_cfg(asked.model) if timm.is_model(asked.model) else None
        if config is not None and config.mean:
            (r, g, b), (dr, dg, db) = config.mean, config.std
            return (r, g, b), (dr, dg, db)
        raise RefusalError(f"timm names no normalization for {asked.model!r}: choose --normalization imagenet or none")
    raise RefusalError(
        f"{asked.source} takes floating-point pixels and does not say how they are scaled: pass --normalization imagenet "
        "(mean 0.485, 0.456, 0.406), --normalization model with --model NAME of timm, or --normalization none for 0…1"
    )


def _wrapped(
    model: onnx.ModelProto, shape: _Shape, mean: tuple[float, ...], std: tuple[float, ...], pooling: str, opset: int
) -> onnx.ModelProto:
    """uint8 [batch, H, W, 3] → normalised input → the model → unit rows."""
    wrapped = onnx.ModelProto()
    wrapped.CopyFrom(model)
    wrapped = onnx.compose.add_prefix(wrapped, "theirs/")  # its own names may be ours
    shape = shape._replace(input=f"theirs/{shape.input}", output=f"theirs/{shape.output}")
    graph = wrapped.graph
    del graph.input[:]  # old exporters list weights there, too
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", shape.size, shape.size, 3])
    graph.input.insert(0, images)
    del graph.value_info[:]  # shapes inside may hold the old batch
    add: Callable[[str, Any], None] = lambda name, value: graph.initializer.append(  # noqa: E731
        numpy_helper.from_array(np.asarray(value), f"likewise/{name}")
    )
    before: list[onnx.NodeProto] = []
    if shape.pixels:
        before.append(helper.make_node("Identity", ["images"], [shape.input]))
    else:
        add("mean", 255.0 * np.array(mean, np.float32).reshape(1, 3, 1, 1))
        add("std", 255.0 * np.array(std, np.float32).reshape(1, 3, 1, 1))
        before += [
            helper.make_node("Transpose", ["images"], ["likewise/nchw"], perm=[0, 3, 1, 2]),
            helper.make_node("Cast", ["likewise/nchw"], ["likewise/float"], to=TensorProto.FLOAT),
            helper.make_node("Sub", ["likewise/float", "likewise/mean"], ["likewise/centred"]),
            helper.make_node("Div", ["likewise/centred", "likewise/std"], [shape.input]),
        ]
    row = shape.output
    after: list[onnx.NodeProto] = []
    if shape.tokens and pooling == "cls":
        add("first", np.int64(0))
        after.append(helper.make_node("Gather", [row, "likewise/first"], ["likewise/row"], axis=1))
        row = "likewise/row"
    elif shape.tokens:
        for name, value in (("from", [1]), ("to", [2**31 - 1]), ("axis", [1])):
            add(name, np.array(value, np.int64))
        after.append(
            helper.make_node("Slice", [row, "likewise/from", "likewise/to", "likewise/axis"], ["likewise/rest"])
        )
        after.append(reduce_node("ReduceMean", "likewise/rest", "likewise/row", "likewise", opset, keepdims=0))
        row = "likewise/row"
    add("epsilon", np.float32(1e-12))
    after += unit_length(row, "embedding", "likewise", opset)
    if opset >= 18:
        add("axes", np.array([1], np.int64))
    nodes = [*before, *graph.node, *after]
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", shape.dim]))
    return wrapped


def _require_free_batch(out: Path, path: Path) -> None:
    """A batch of one that is written into the graph shows when two go in."""
    (size,) = {d.dim_value for d in onnx.load(str(out)).graph.input[0].type.tensor_type.shape.dim[1:3]}
    run = open_graph(out)
    for count in (1, 3):
        try:
            rows = run({"images": np.zeros((count, size, size, 3), np.uint8)}, "embedding")
        except Exception as e:  # onnxruntime raises types of its own
            why = (
                "its batch size is fixed inside; export it again with a dynamic batch"
                if count > 1
                else "export it again"
            )
            raise RefusalError(
                f"{path} cannot embed {count} pictures at a time ({str(e).splitlines()[0][:160]}): {why}"
            ) from e
        if len(rows) != count:
            raise RefusalError(
                f"{path} gives {len(rows)} embeddings for {count} pictures: its batch size is fixed inside; export it "
                "again with a dynamic batch"
            )
