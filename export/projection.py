"""Fewer dimensions: an encoder's unit rows onto the principal axes of real pictures, inside the graph.

y = (x − m) V diag(s)^(−w), then length 1; m the mean of the pictures' rows x, V their leading principal axes, s the standard
deviations along these, w the whitening in 0 … 1 (0: plain PCA; 1: all axes count alike). Jégou and Chum 2012, "Negative
evidences and co-occurrences in image retrieval: the benefit of PCA and whitening".
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.bundle import Embeddings, ProjectionSpec, RefusalError, tensors_sha256
from export.onnx_graph import check_structure, unit_length
from export.preprocess import Pixels, UnreadablePictureError, find_pictures, preprocess
from export.source import Source

PICTURES = 10_000
PER_DIMENSION = 4
"""Fewer pictures than this for each dimension do not know the axes."""
_BATCH = 64


def fit_projection(rows: Embeddings, dimensions: int, whitening: float) -> tuple[Embeddings, Embeddings]:
    """The mean [C] and the matrix [C, dimensions] of the formula above, from unit rows [N, C]; float32."""
    wide = rows.astype(np.float64)
    mean = wide.mean(0)
    values, axes = np.linalg.eigh(np.cov(wide, rowvar=False, bias=True))  # ascending
    deviation = np.sqrt(np.maximum(values[::-1][:dimensions], 1e-12))
    matrix = axes[:, ::-1][:, :dimensions] * deviation**-whitening
    # The sign of an axis is the linear algebra library's choice: the largest part of each is positive.
    matrix *= np.sign(matrix[np.abs(matrix).argmax(0), np.arange(dimensions)])
    return mean.astype(np.float32), (matrix / np.abs(matrix).max()).astype(np.float32)


def project(rows: Embeddings, mean: Embeddings, matrix: Embeddings) -> Embeddings:
    """Unit rows [N, C] → unit rows [N, d]."""
    moved = (rows - mean) @ matrix
    unit: Embeddings = moved / np.maximum(np.linalg.norm(moved, axis=1, keepdims=True), 1e-12)
    return unit


def projected(
    source: Source, folder: Path, dimensions: int, whitening: float, say: Callable[[str], None] = lambda _: None
) -> Source:
    """The source with its rows projected, fitted to up to 10,000 pictures spread over `folder`. Raises `RefusalError`."""
    width = source.encoder.embedding_dim
    if dimensions >= width:
        raise RefusalError(f"--dimensions {dimensions} is not below the encoder's {width}: leave it out")
    if source.patches is not None:
        raise RefusalError("--dimensions projects the pictures' rows, not their patches': leave --patches out")
    found = find_pictures(folder)
    chosen = np.random.default_rng(0).permutation(len(found))[:PICTURES]
    say(f"finding {dimensions} of {width} dimensions on up to {len(chosen):,} pictures of {folder.name}")
    parts: list[Embeddings] = []
    pixels: list[Pixels] = []
    for n, i in enumerate(chosen, 1):
        with suppress(UnreadablePictureError):  # the others tell the axes
            pixels.append(preprocess(found[i].read(), source.preprocess).pixels)
        if pixels and (len(pixels) == _BATCH or n == len(chosen)):
            parts.append(source.embed(np.stack(pixels)))
            pixels = []
        if n % 1000 == 0:
            say(f"  {n:,}")
    rows = np.concatenate(parts) if parts else np.zeros((0, width), np.float32)
    if len(rows) < PER_DIMENSION * dimensions:
        raise RefusalError(
            f"{folder} holds {len(rows):,} readable pictures, {dimensions} dimensions need {PER_DIMENSION * dimensions:,} "
            "to be found: pass --images with more pictures, or ask for fewer dimensions"
        )
    mean, matrix = fit_projection(rows, dimensions, whitening)
    digest = tensors_sha256({"mean": mean, "matrix": matrix})
    spec = ProjectionSpec(dimensions=dimensions, whitening=whitening, pictures=len(rows), sha256=digest)

    def write(path: Path, opset: int) -> None:
        source.write(path, opset)
        append_projection(path, mean, matrix)
        check_structure(path, source.encoder.image_size)

    def embed(pixels: Pixels) -> Embeddings:
        return project(source.embed(pixels), mean, matrix)

    encoder = source.encoder.model_copy(update={"embedding_dim": dimensions, "projection": spec})
    return replace(source, encoder=encoder, write=write, embed=embed)


def append_projection(path: Path, mean: Embeddings, matrix: Embeddings) -> None:
    """Put a projection behind a graph's `embedding`, in place."""
    model = onnx.load(str(path))
    graph = model.graph
    before = "projection/before"
    for node in graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                if name == "embedding":
                    names[i] = before
    constants = {"mean": mean[None], "matrix": matrix, "epsilon": np.float32(1e-12), "axes": np.array([1], np.int64)}
    graph.initializer.extend(numpy_helper.from_array(np.asarray(v), f"projection/{n}") for n, v in constants.items())
    (opset,) = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    graph.node.extend(
        [
            helper.make_node("Sub", [before, "projection/mean"], ["projection/centred"]),
            helper.make_node("MatMul", ["projection/centred", "projection/matrix"], ["projection/rows"]),
            *unit_length("projection/rows", "embedding", "projection", opset),
        ]
    )
    (place,) = [i for i, value in enumerate(graph.output) if value.name == "embedding"]
    shape = ["batch", matrix.shape[1]]
    graph.output[place].CopyFrom(helper.make_tensor_value_info("embedding", TensorProto.FLOAT, shape))
    kept = [value for value in graph.value_info if value.name != "embedding"]
    del graph.value_info[:]
    graph.value_info.extend(kept)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
