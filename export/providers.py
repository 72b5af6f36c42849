"""How each of ONNX Runtime's execution providers is asked to run a bundle's graph."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
OPENVINO = "OpenVINOExecutionProvider"
ON_GPU = (CUDA, TENSORRT)
# On a GPU, batches are padded to these sizes: a bounded set of shapes keeps the memory arena flat, and is what CUDA graphs
# and TensorRT's engines are made for.
BUCKETS = (1, 2, 4, 8, 16, 32, 64)


class GpuOptions(NamedTuple):
    """What the caller may say about a GPU."""

    memory_gib: float | None = None
    """Most memory for the CUDA provider's arena, in GiB. TensorRT's provider knows no such limit."""
    graphs: bool = False
    """Capture one CUDA graph per batch size and replay it."""


def session_providers(
    provider: str, side: int, options: GpuOptions, engines: Path
) -> Sequence[str | tuple[str, dict[str, Any]]]:
    """`provider` with its settings for pictures of `side` pixels, then those that take the operators it leaves.

    TensorRT's engines are kept in `engines`. None of its precision flags is set: since onnxruntime 1.18 its network is then
    strongly typed, that is, it computes what the graph says, float16 where the graph is (microsoft/onnxruntime#18707).
    """
    if provider == CPU:
        return [CPU]
    cuda: dict[str, Any] = {
        "arena_extend_strategy": "kSameAsRequested",  # the default doubles
        "cudnn_conv_algo_search": "HEURISTIC",  # a ViT has one convolution
        "use_tf32": "0",  # fp32 is float32; who wants speed takes fp16
    }
    if options.memory_gib is not None:
        cuda["gpu_mem_limit"] = int(options.memory_gib * 2**30)
    if provider == CUDA:
        if options.graphs:
            cuda["enable_cuda_graph"] = "1"
        return [(CUDA, cuda), CPU]
    shapes = {
        f"trt_profile_{name}_shapes": f"images:{size}x{side}x{side}x3"
        for name, size in (("min", BUCKETS[0]), ("opt", BUCKETS[-2]), ("max", BUCKETS[-1]))
    }
    kept = {
        "trt_engine_cache_enable": "True",  # "1" is refused
        "trt_engine_cache_path": str(engines),
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(engines),
    }
    return [(TENSORRT, {**shapes, **kept}), (CUDA, cuda), CPU]
