"""Bundle → embeddings on ONNX Runtime: the only place that runs it, so that parity, evaluation and the service run the
same session (`export/quantise.py` uses its converters)."""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
import platform
import re
from collections import Counter
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
CUDA = "CUDAExecutionProvider"
OPENVINO = "OpenVINOExecutionProvider"
_ON_GPU = (CUDA, "TensorrtExecutionProvider")


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


def runtime_name(device: Device, threads: int | None = None) -> str:
    """Processor or GPU provider, threads and runtime: what a measurement holds for."""
    first = offered(device)[0]
    processor = first if first in _ON_GPU else cpu_model()
    return f"{processor}, {threads or cpu_quota()} threads, onnxruntime {ort.__version__}"


def offered(device: Device) -> list[str]:
    """The execution providers that can be tried on a device here, the usual one first. Raises `RefusalError`."""
    if device != "cpu":
        available = ort.get_available_providers()
        if CUDA in available and (device == "cuda" or Path("/dev/nvidiactl").exists()):
            return [CUDA]
        if device == "cuda":
            raise RefusalError(
                "--device cuda was asked for, but this onnxruntime has no CUDA provider: pip install 'likewise[gpu]' "
                "in an environment without likewise[cpu]"
            )
    return ["CPUExecutionProvider", *([OPENVINO] if _openvino_devices() else [])]


class Runtime:
    """A loaded bundle.

    Attributes: `bundle`, `variant`, `provider` (what ONNX Runtime chose), `provider_reason` (a sentence), `threads`.
    """

    def __init__(
        self, bundle: Bundle, device: Device = "auto", threads: int | None = None, variant: str = "fp32",
        provider: str | None = None, require_provider: bool = False,
    ) -> None:  # fmt: skip
        """Load the graph and check the canary. `provider`: one of `offered(device)`, the first where absent. With
        `require_provider` all of it must run there. Raises `RefusalError` when this machine cannot run it faithfully."""
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
        asked_for = provider or offered(device)[0]
        self.provider_reason = _reason(device, asked_for)
        if asked_for in _ON_GPU and hasattr(ort, "preload_dlls"):
            ort.preload_dlls()  # without torch beside it, nothing else finds the CUDA libraries that pip installed
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Idle spinning steals the cores that decode the next batch.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if asked_for != "CPUExecutionProvider":
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        try:
            if asked_for == OPENVINO:
                options.add_provider_for_devices(_openvino_devices(), {})
                self._session = ort.InferenceSession(str(path), options)
            else:
                self._session = ort.InferenceSession(str(path), options, providers=_with_options(asked_for))
        except Exception as e:  # onnxruntime raises its own pybind types
            raise RefusalError(f"{path} cannot be loaded by onnxruntime {found} ({e})") from e
        self.provider: str = self._session.get_providers()[0]
        if self.provider != asked_for and device != "auto":
            raise RefusalError(
                f"--device {device} was asked for and means {asked_for}, but onnxruntime loaded on {self.provider}: check "
                "the driver, or pass --device cpu"
            )
        if self.provider != asked_for:
            self.provider_reason = f"{asked_for} did not load: check the driver"
        elif asked_for != "CPUExecutionProvider" and hasattr(self._session, "get_provider_graph_assignment_info"):
            placed = [(part.ep_name, node.op_type) for part in self._session.get_provider_graph_assignment_info()
                      for node in part.get_nodes()]  # fmt: skip
            elsewhere = misplaced(placed, asked_for)
            if elsewhere:
                self.provider_reason += f"; {elsewhere}"
            if elsewhere and require_provider:
                raise RefusalError(
                    f"{path} does not run on {asked_for} alone: {elsewhere}; leave --require-provider out, or export it "
                    "with --opset 20"
                )
        if self.provider != asked_for and require_provider:
            raise RefusalError(
                f"{path} was loaded on {self.provider}, {asked_for} did not load: check the driver, or leave "
                "--require-provider out"
            )
        self._pads = self.provider in _ON_GPU
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
        return runtime_name("cuda" if self.provider in _ON_GPU else "cpu", self.threads)

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


# What ONNX Runtime computes on the CPU on purpose beside a GPU: the arithmetic of shapes.
_OF_SHAPES = frozenset(
    {"Shape", "Size", "Gather", "Slice", "Squeeze", "Unsqueeze", "Concat", "Cast", "Range", "Constant", "ConstantOfShape",
     "Equal", "Where", "Mul", "Add", "Sub", "Div", "Expand", "Reshape", "Identity", "ReduceProd"}
)  # fmt: skip


def misplaced(placed: Sequence[tuple[str, str]], provider: str) -> str:
    """Which operators (provider, kind) run elsewhere than on `provider`, as a phrase; empty where none does. The arithmetic
    of shapes does not count."""
    elsewhere = Counter(kind for where, kind in placed if where != provider and kind not in _OF_SHAPES)
    if not elsewhere:
        return ""
    kinds = ", ".join(f"{count} {kind}" for kind, count in elsewhere.most_common(5))
    return f"{sum(elsewhere.values())} of {len(placed)} operators run elsewhere ({kinds})"


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


def _with_options(provider: str) -> Sequence[str | tuple[str, dict[str, Any]]]:
    if provider == CUDA:
        own = {"arena_extend_strategy": "kSameAsRequested", "cudnn_conv_algo_search": "HEURISTIC"}
        return [(CUDA, own), "CPUExecutionProvider"]
    return [provider]


def _reason(device: Device, provider: str) -> str:
    if device != "auto":
        return "asked for"
    if provider == CUDA:
        return "onnxruntime has the CUDA provider and an NVIDIA driver is present"
    return "no NVIDIA driver or no CUDA provider on this machine"


@functools.cache
def _openvino_devices() -> list[Any]:
    """The CPU as the OpenVINO plugin offers it (PyPI onnxruntime-ep-openvino); nothing without the plugin, and nothing on
    processors that it does not take, which only it knows."""
    try:
        plugin: Any = importlib.import_module("onnxruntime_ep_openvino")
        ort.register_execution_provider_library("likewise-openvino", plugin.get_library_path())
    except ImportError:
        return []
    except Exception as e:  # onnxruntime raises its own pybind types
        raise RefusalError(
            f"the OpenVINO plugin does not load into onnxruntime {ort.__version__} ({e}): upgrade onnxruntime-ep-openvino, "
            "or uninstall it"
        ) from e
    kind = ort.OrtHardwareDeviceType.CPU
    return [d for d in ort.get_ep_devices() if d.ep_name == OPENVINO and d.device.type == kind]


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])
