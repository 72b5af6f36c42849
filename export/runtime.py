"""Bundle → embeddings on ONNX Runtime: the only importer of onnxruntime, so that parity, evaluation and the service
run the same session."""

from __future__ import annotations

import hashlib
import os
import platform
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort

from export.bundle import Bundle, Embeddings, RefusalError
from export.preprocess import Pixels, preprocess

Device = Literal["auto", "cpu", "cuda"]
# On a GPU, batches are padded to these sizes: a bounded set of shapes keeps the memory arena flat.
BUCKETS = (1, 2, 4, 8, 16, 32, 64)


def cpu_quota() -> int:
    """Cores this process may use: its affinity, cut by the container's CPU quota (cgroup v2 or v1)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    for quota_file, period_file in (
        ("/sys/fs/cgroup/cpu.max", None),
        ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us"),
    ):
        try:
            fields = Path(quota_file).read_text().split()
            quota = fields[0]
            period = fields[1] if period_file is None else Path(period_file).read_text().strip()
            if quota not in ("max", "-1"):
                cores = min(cores, max(1, -(-int(quota) // int(period))))
        except (OSError, ValueError, IndexError):
            continue
    return cores


def cpu_model() -> str:
    """The processor as the kernel names it, with the instructions that decide speed."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^flags\s*:\s*(.+)$", text, re.MULTILINE)
    known = flags[1].split() if flags else []
    kinds = [kind for kind, flag in (("AMX", "amx_tile"), ("AVX-512", "avx512f"), ("AVX2", "avx2")) if flag in known]
    return f"{name[1] if name else platform.machine()} ({kinds[0] if kinds else 'no AVX2'})"


class Runtime:
    """A loaded bundle.

    Attributes: `bundle`, `variant`, `provider` (what ONNX Runtime chose), `provider_reason` (a sentence), `threads`.
    """

    def __init__(
        self, bundle: Bundle, device: Device = "auto", threads: int | None = None, variant: str = "fp32"
    ) -> None:
        """Load the graph and check the canary. Raises `RefusalError` when this machine cannot run it faithfully."""
        path = bundle.graph(variant)
        needed, found = bundle.manifest.variants[variant].minimum_onnxruntime, ort.__version__
        if _version(found) < _version(needed):
            raise RefusalError(
                f"the bundle {bundle.folder} needs onnxruntime {needed} or later, {found} is installed: "
                f"pip install -U 'onnxruntime>={needed}'"
            )
        self.bundle = bundle
        self.variant = variant
        self.threads = threads or cpu_quota()
        providers, self.provider_reason = _choose_providers(device)
        if len(providers) > 1 and hasattr(ort, "preload_dlls"):
            ort.preload_dlls()  # without torch beside it, nothing else finds the CUDA libraries that pip installed
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Idle spinning steals the cores that decode the next batch.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = ort.InferenceSession(str(path), options, providers=providers)
        except Exception as e:  # onnxruntime raises its own pybind types
            raise RefusalError(f"{path} cannot be loaded by onnxruntime {found} ({e})") from e
        self.provider: str = self._session.get_providers()[0]
        if device == "cuda" and self.provider != "CUDAExecutionProvider":
            raise RefusalError(
                f"--device cuda was asked for, but onnxruntime loaded on {self.provider}: check the driver, or pass "
                "--device cpu"
            )
        self._pads = self.provider != "CPUExecutionProvider"
        graph_input = self._session.get_inputs()[0]
        size = bundle.manifest.encoder.image_size
        if graph_input.type != "tensor(uint8)" or list(graph_input.shape[1:]) != [size, size, 3]:
            raise RefusalError(
                f"{path} takes {graph_input.type} {graph_input.shape}, the manifest says uint8 "
                f"[batch, {size}, {size}, 3]: export it again"
            )
        self.check_canary()

    @property
    def machine(self) -> str:
        """Processor, threads and runtime: what a measurement holds for."""
        processor = cpu_model() if self.provider == "CPUExecutionProvider" else self.provider
        return f"{processor}, {self.threads} threads, onnxruntime {ort.__version__}"

    def embed(self, images: Pixels) -> Embeddings:
        """uint8 [N, H, W, 3] → float32 [N, D], unit rows. Thread-safe. N = 0 gives an empty array."""
        count = len(images)
        if count == 0:
            return np.zeros((0, self.bundle.dim), np.float32)
        if self._pads and count > BUCKETS[-1]:
            parts = [self.embed(images[lo : lo + BUCKETS[-1]]) for lo in range(0, count, BUCKETS[-1])]
            return np.concatenate(parts)
        if self._pads:
            bucket = next(size for size in BUCKETS if size >= count)
            images = np.concatenate([images, np.zeros((bucket - count, *images.shape[1:]), np.uint8)])
        (rows,) = self._session.run(["embedding"], {"images": np.ascontiguousarray(images)})
        result: Embeddings = rows[:count]
        return result

    def check_canary(self) -> float:
        """Decode and embed the canary pictures; return the lowest cosine to what is expected.

        Raises `RefusalError` when pixels or embeddings differ from the manifest's.
        """
        manifest = self.bundle.manifest
        pixels = canary_pixels(self.bundle)
        expected = np.asarray([picture.embedding for picture in manifest.canary], np.float32)
        cosines = np.sum(self.embed(pixels) * expected, axis=1)
        lowest, floor = float(cosines.min()), manifest.variants[self.variant].floor(self.provider)
        if not lowest >= floor:  # also catches NaN
            raise RefusalError(
                f"the bundle {self.bundle.folder} gives a canary picture an embedding with cosine {lowest:.6f} to the "
                f"expected one on {self.provider}, at least {floor} is needed: do not serve it here; try --device cpu"
            )
        return lowest


def open_graph(path: Path) -> Callable[[dict[str, Any], str], Any]:
    """A plain session of any ONNX file on the CPU: (inputs by name, name of an output) → array. Raises `RefusalError`."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = cpu_quota()
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as e:  # onnxruntime raises its own pybind types
        raise RefusalError(f"{path} cannot be loaded by onnxruntime {ort.__version__} ({e})") from e
    return lambda inputs, output: session.run([output], inputs)[0]


def canary_pixels(bundle: Bundle) -> Pixels:
    """The canary's preprocessed pixels, uint8 [N, H, W, 3]. Raises `RefusalError` when they decode differently."""
    rows = []
    for picture in bundle.manifest.canary:
        pixels = preprocess((bundle.folder / picture.file).read_bytes(), bundle.manifest.preprocess).pixels
        found = hashlib.sha256(pixels.tobytes()).hexdigest()
        if found != picture.pixels_sha256:
            raise RefusalError(
                f"{bundle.folder / picture.file} decodes to other pixels here ({found[:12]}…) than at export "
                f"({picture.pixels_sha256[:12]}…): this Pillow or libjpeg differs; install the Pillow version named in "
                "the manifest's provenance, or export the bundle again here"
            )
        rows.append(pixels)
    return np.stack(rows)


def _choose_providers(device: Device) -> tuple[Sequence[str | tuple[str, dict[str, Any]]], str]:
    available = ort.get_available_providers()
    cuda = (
        "CUDAExecutionProvider",
        {"arena_extend_strategy": "kSameAsRequested", "cudnn_conv_algo_search": "HEURISTIC"},
    )
    if device == "cpu":
        return ["CPUExecutionProvider"], "asked for"
    if device == "cuda":
        if "CUDAExecutionProvider" not in available:
            raise RefusalError(
                "--device cuda was asked for, but this onnxruntime has no CUDA provider: pip install 'likewise[gpu]' "
                "in an environment without likewise[cpu]"
            )
        return [cuda, "CPUExecutionProvider"], "asked for"
    if "CUDAExecutionProvider" in available and Path("/dev/nvidiactl").exists():
        return [cuda, "CPUExecutionProvider"], "onnxruntime has the CUDA provider and an NVIDIA driver is present"
    return ["CPUExecutionProvider"], "no NVIDIA driver or no CUDA provider on this machine"


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])
