"""Smaller graphs from the fp32 one: fp16 for GPUs, int8 for CPUs. Whether they may be used is for the gate to say."""

from __future__ import annotations

import logging
import math
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

from export.bundle import RefusalError
from export.preprocess import Pixels

# Sums and powers over a row leave float16's range or precision (onnxruntime #11384, #13639).
FLOAT32_IN_FP16 = ("Pow", "ReduceMean", "ReduceSum", "ReduceL2", "LpNormalization")
CALIBRATION_PICTURES = 128
# Smaller tensors are kept as they are: biases and scales, constants of shapes, and a convolutional network's first layers.
# Those are a twentieth of MobileNetV2's file and six sevenths of what rounding costs (docs/lab-log.md).
_LARGE, _LARGE_SHARE, _ALWAYS_LARGE = 1024, 1 / 128, 16_384

Int8Recipe = Literal["dynamic", "static"]
"""dynamic: the weights of matrix products per channel, activations scaled as they come. static: convolutions and matrix
products, activations scaled by what calibration pictures gave."""


def store_fp16(graph: Path) -> None:
    """Keep the large weights of a float32 graph as float16, each with a Cast to float32 behind it, in place: half the file,
    the same arithmetic. ONNX Runtime casts them once, when it loads the graph. Raises `RefusalError` for a weight that
    float16 cannot hold."""
    model = onnx.load(str(graph))
    casts = []
    weights = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    large = min(max(_LARGE, _LARGE_SHARE * sum(math.prod(t.dims) for t in weights)), _ALWAYS_LARGE)
    for tensor in weights:
        if math.prod(tensor.dims) < large:
            continue
        values = numpy_helper.to_array(tensor)
        if not np.abs(values).max() <= np.finfo(np.float16).max:
            raise RefusalError(
                f"the weight {tensor.name} of {graph} reaches {np.abs(values).max():.3g}, float16 ends at 65504: leave "
                "--stored at float32"
            )
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}/float16"))
        casts.append(onnx.helper.make_node("Cast", [tensor.name], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.checker.check_model(model)
    onnx.save(model, str(graph))


def write_fp16(graph: Path, out: Path) -> None:
    """float16 inside, the same input and output."""
    try:
        with _quiet():
            half = convert_float_to_float16(
                onnx.load(str(graph)), keep_io_types=True, op_block_list=[*DEFAULT_OP_BLOCK_LIST, *FLOAT32_IN_FP16]
            )
    except Exception as e:  # the converter raises whatever its parts do
        first = (str(e) or type(e).__name__).splitlines()[0][:200]
        raise RefusalError(f"onnxruntime cannot convert {graph} to float16 ({first}): leave fp16 out") from e
    onnx.save(half, str(out))


def int8_recipes(graph: Path) -> tuple[Int8Recipe, ...]:
    """Which recipes are worth trying, best first: transformers lose least dynamically, convolutions have only static."""
    kinds = Counter(node.op_type for node in onnx.load(str(graph)).graph.node)
    return ("dynamic", "static") if kinds["MatMul"] + kinds["Gemm"] > kinds["Conv"] else ("static",)


def write_int8(graph: Path, out: Path, recipe: Int8Recipe, pixels: Pixels) -> None:
    """8-bit weights and products, the same input and output. `pixels` [N, S, S, 3] calibrate the static recipe.

    Weights keep to 7 bits: on CPUs without VNNI two products of full range overflow their 16-bit sum.
    """
    with tempfile.TemporaryDirectory() as folder, _quiet():
        prepared = Path(folder) / "prepared.onnx"
        try:
            quant_pre_process(str(graph), str(prepared), skip_symbolic_shape=True)
            if recipe == "dynamic":
                quantize_dynamic(
                    prepared, out, op_types_to_quantize=["MatMul", "Gemm"], per_channel=True, reduce_range=True,
                    weight_type=QuantType.QInt8,
                )  # fmt: skip
            else:
                quantize_static(
                    prepared, out, _Pictures(pixels[:CALIBRATION_PICTURES]), quant_format=QuantFormat.QDQ,
                    op_types_to_quantize=["Conv", "MatMul", "Gemm"], per_channel=True, reduce_range=True,
                    activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
                    calibrate_method=CalibrationMethod.MinMax,
                )  # fmt: skip
        except Exception as e:  # the quantiser raises whatever its parts do
            first = (str(e) or type(e).__name__).splitlines()[0][:200]
            raise RefusalError(f"onnxruntime cannot quantise {graph} ({recipe}: {first}): leave int8 out") from e


class _Pictures(CalibrationDataReader):  # type: ignore[misc]
    """Batches of eight."""

    def __init__(self, pixels: Pixels) -> None:
        self._batches: Iterator[Pixels] = iter(np.array_split(pixels, max(1, len(pixels) // 8)))

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"images": np.ascontiguousarray(batch)}


@contextmanager
def _quiet() -> Iterator[None]:
    """The converters warn of each rounded weight and advise what was done already."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
