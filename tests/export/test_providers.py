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
from export.runtime import FixedBatches, Runtime, offered
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
    free, limited = (options(session_providers(CUDA, 224, GpuOptions(gib), tmp_path), CUDA) for gib in (None, 1.5))
    assert "gpu_mem_limit" not in free and limited["gpu_mem_limit"] == 3 * 2**29
    assert limited["arena_extend_strategy"] == "kSameAsRequested" and limited["use_tf32"] == "0"


def test_tensorrt_covers_every_batch_and_computes_what_the_graph_says(tmp_path: Path) -> None:
    found = options(session_providers(TENSORRT, 96, GpuOptions(), tmp_path), TENSORRT)
    assert found["trt_profile_min_shapes"] == "images:1x96x96x3"
    assert found["trt_profile_max_shapes"] == f"images:{BUCKETS[-1]}x96x96x3"
    assert not found.keys() & {"trt_fp16_enable", "trt_bf16_enable", "trt_int8_enable"}  # else it is not strongly typed
    assert found["trt_engine_cache_path"] == str(tmp_path)
    # onnxruntime's Python layer parses these itself and takes no other words.
    assert {value for name, value in found.items() if name.endswith("_enable")} == {"True"}


def test_cuda_graphs_are_captured_only_where_asked(tmp_path: Path) -> None:
    assert "enable_cuda_graph" not in options(session_providers(CUDA, 96, GpuOptions(), tmp_path), CUDA)
    assert options(session_providers(CUDA, 96, GpuOptions(graphs=True), tmp_path), CUDA)["enable_cuda_graph"] == "1"


def test_fixed_buffers_give_what_free_ones_give_from_many_threads(bundle: Path) -> None:
    """What CUDA graphs replay: the same addresses for every batch of a size, all of them from one thread."""
    opened = Bundle.open(bundle)
    session = ort.InferenceSession(str(opened.graph()), providers=[CPU])
    side = opened.manifest.encoder.image_size
    pixels = [np.random.default_rng(i).integers(0, 256, (1 + i % 3, side, side, 3), np.uint8) for i in range(6)]
    expected = [session.run(["embedding"], {"images": one})[0] for one in pixels]
    fixed = FixedBatches(session, opened.dim, "cpu")
    used: set[int] = set()
    real = fixed._run

    def run(images: np.ndarray) -> np.ndarray:
        used.add(threading.get_ident())
        return real(images)

    fixed._run = run  # type: ignore[method-assign]
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
    assert not wrong and len(used) == 1 and threading.get_ident() not in used
    assert sorted(fixed._bound) == [1, 2, 3]


@pytest.mark.parametrize(
    ("gpu", "flag"), [(GpuOptions(graphs=True), "--cuda-graphs"), (GpuOptions(2.0), "--gpu-memory")]
)
def test_what_is_for_a_gpu_is_refused_on_a_cpu(bundle: Path, gpu: GpuOptions, flag: str) -> None:
    with pytest.raises(RefusalError, match=f"{flag} needs {CUDA}, and {CPU} is what runs here"):
        open_runtime(Bundle.open(bundle), "cpu", 1, gpu=gpu)


@pytest.mark.skipif(CUDA in ort.get_available_providers(), reason="CUDA may load here")
@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_does_not_load_is_said_or_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Bundle.open(bundle)
    with pytest.raises(
        RefusalError, match=f"{CUDA} was asked for, but onnxruntime .* loaded .* on {CPU}: check the driver"
    ):
        Runtime(opened, "auto", 1, provider=CUDA)
    real = offered
    monkeypatch.setattr("export.tune.offered", lambda device: [CUDA] if device != "cpu" else real(device))
    said: list[str] = []
    runtime = open_runtime(opened, "auto", 1, say=said.append)
    assert runtime.provider == CPU and "cannot be used" in runtime.provider_reason
    assert any("the GPU cannot be used, the CPU is" in line for line in said)
    for device, required in (("auto", True), ("cuda", False)):
        with pytest.raises(RefusalError, match=f"{CUDA} was asked for"):
            open_runtime(opened, device, 1, require_provider=required)  # type: ignore[arg-type]


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
