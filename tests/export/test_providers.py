"""What ONNX Runtime's providers are asked for, and the parts of the GPU path that a CPU can run."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from export.bundle import Bundle, RefusalError
from export.machine import gpu_model
from export.providers import BUCKETS, CPU, CUDA, TENSORRT, GpuOptions, session_providers
from export.runtime import FixedBatch, Runtime
from export.tune import open_runtime


def options(found: Any, name: str) -> dict[str, Any]:
    return dict(entry for entry in found if isinstance(entry, tuple))[name]


def test_each_provider_falls_to_the_next_and_never_silently_to_another_order(tmp_path: Path) -> None:
    def order(provider: str) -> list[str]:
        found = session_providers(provider, 224, GpuOptions(), tmp_path)
        return [entry if isinstance(entry, str) else entry[0] for entry in found]

    assert order(CPU) == [CPU]
    assert order(CUDA) == [CUDA, CPU]
    assert order(TENSORRT) == [TENSORRT, CUDA, CPU]


def test_memory_is_limited_where_asked(tmp_path: Path) -> None:
    free, limited = (session_providers(TENSORRT, 224, GpuOptions(gib), tmp_path) for gib in (None, 1.5))
    assert "gpu_mem_limit" not in options(free, CUDA) and "trt_max_workspace_size" not in options(free, TENSORRT)
    assert options(limited, CUDA)["gpu_mem_limit"] == options(limited, TENSORRT)["trt_max_workspace_size"] == 3 * 2**29
    assert options(limited, CUDA)["arena_extend_strategy"] == "kSameAsRequested"


def test_tensorrt_covers_every_batch_and_computes_what_the_graph_says(tmp_path: Path) -> None:
    found = options(session_providers(TENSORRT, 96, GpuOptions(), tmp_path), TENSORRT)
    assert found["trt_profile_min_shapes"] == "images:1x96x96x3"
    assert found["trt_profile_max_shapes"] == f"images:{BUCKETS[-1]}x96x96x3"
    assert not found.keys() & {"trt_fp16_enable", "trt_bf16_enable", "trt_int8_enable"}  # else it is not strongly typed
    assert found["trt_engine_cache_path"] == str(tmp_path)


def test_cuda_graphs_are_captured_only_where_asked(tmp_path: Path) -> None:
    assert "enable_cuda_graph" not in options(session_providers(CUDA, 96, GpuOptions(), tmp_path), CUDA)
    assert options(session_providers(CUDA, 96, GpuOptions(graphs=True), tmp_path), CUDA)["enable_cuda_graph"] == "1"


def test_fixed_buffers_give_what_free_ones_give_from_many_threads(bundle: Path) -> None:
    """What a CUDA graph replays: the same addresses for every batch, one run at a time."""
    opened = Bundle.open(bundle)
    session = ort.InferenceSession(str(opened.graph()), providers=[CPU])
    side = opened.manifest.encoder.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, side, side, 3), np.uint8)
    expected = [session.run(["embedding"], {"images": one})[0] for one in pixels]
    fixed = FixedBatch(session, (4, side, side, 3), opened.dim, "cpu")
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(20):
            if not np.array_equal(fixed.embed(pixels[number]), expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_cuda_graphs_on_a_cpu_are_refused(bundle: Path) -> None:
    with pytest.raises(RefusalError, match=f"--cuda-graphs needs {CUDA}, and {CPU} is what runs here"):
        open_runtime(Bundle.open(bundle), "cpu", 1, gpu=GpuOptions(graphs=True))


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_does_not_load_is_said_or_refused(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    runtime = Runtime(opened, "auto", 1, provider=CUDA)
    assert runtime.provider == CPU and f"{CUDA} did not load" in runtime.provider_reason
    with pytest.raises(
        RefusalError, match=f"was loaded on {CPU}, {CUDA} did not load: .* leave --require-provider out"
    ):
        Runtime(opened, "auto", 1, provider=CUDA, require_provider=True)
    with pytest.raises(
        RefusalError, match=f"--device cuda was asked for and means {CUDA}, but onnxruntime loaded on {CPU}"
    ):
        Runtime(opened, "cuda", 1, provider=CUDA)


def test_the_gpu_is_named_with_its_driver(tmp_path: Path) -> None:
    card = tmp_path / "gpus" / "0000:01:00.0"
    card.mkdir(parents=True)
    (card / "information").write_text("Model: \t\t NVIDIA H200\nIRQ:   \t\t 100\nGPU UUID: \t GPU-1\n")
    for line in (
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (x)",
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue Sep 23 10:11:16 UTC 2025",
    ):
        (tmp_path / "version").write_text(f"{line}\nGCC version: 13\n")
        assert gpu_model(tmp_path) == "NVIDIA H200, driver 580.95.05"
    assert gpu_model(tmp_path / "absent") == "NVIDIA GPU, driver unknown"
