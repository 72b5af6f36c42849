"""Bundle → embeddings on ONNX Runtime: the only place that runs it, so that parity, evaluation and the service run the
same session (`export/quantise.py` uses its converters)."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib
import re
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort

from export.bundle import Bundle, Embeddings, RefusalError
from export.machine import cache_folder, cpu_model, cpu_quota, gpu_model
from export.preprocess import Pixels, preprocess
from export.providers import BUCKETS, CPU, CUDA, ON_GPU, OPENVINO, TENSORRT, GpuOptions, session_providers

Device = Literal["auto", "cpu", "cuda"]

PIECES = 4
"""Into so many pieces per lane a batch is cut."""


def runtime_name(device: Device, threads: int | None = None) -> str:
    """Processor or GPU, threads, runtime and plugins: what a measurement holds for."""
    providers = offered(device)
    plugins = [f", {name} {_installed(packages)}" for provider, name, packages in (
        (OPENVINO, "OpenVINO plugin", ("onnxruntime-ep-openvino",)),
        (TENSORRT, "TensorRT", ("tensorrt-cu13-libs", "tensorrt-cu12-libs")),
    ) if provider in providers]  # fmt: skip
    processor = gpu_model() if providers[0] in ON_GPU else cpu_model()
    return f"{processor}, {threads or cpu_quota()} threads, onnxruntime {ort.__version__}{''.join(plugins)}"


def offered(device: Device) -> list[str]:
    """The execution providers that can be tried on a device here, the usual one first. Raises `RefusalError`."""
    if device != "cpu":
        available = ort.get_available_providers()
        if CUDA in available and (device == "cuda" or Path("/dev/nvidiactl").exists()):
            return [CUDA, *([TENSORRT] if TENSORRT in available and tensorrt_problem() == "" else [])]
        if device == "cuda":
            raise RefusalError(
                "--device cuda was asked for, but this onnxruntime has no CUDA provider: pip install 'likewise[gpu]' "
                "in an environment without likewise[cpu]"
            )
    return [CPU, *([OPENVINO] if _openvino_devices() else [])]


class Runtime:
    """A loaded bundle.

    Attributes: `bundle`, `variant`, `provider`, `provider_reason` (a sentence), `threads`, `lanes`.
    """

    def __init__(
        self, bundle: Bundle, device: Device = "auto", threads: int | None = None, variant: str = "fp32",
        provider: str | None = None, require_provider: bool = False, gpu: GpuOptions = GpuOptions(), lanes: int = 1,
    ) -> None:  # fmt: skip
        """Load the graph, on a GPU run every batch size once, and check the canary. `provider`: one of `offered(device)`,
        the first where absent; with `require_provider` each operator must run there. On a CPU, a batch can be computed in
        `lanes` of one thread each, which take a few pictures at a time: no waiting for each other within an operator, at
        the price of the weights once more in memory. Raises `RefusalError` when this machine cannot run it faithfully:
        nothing falls back to another provider here."""
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
        self.provider = provider or offered(device)[0]
        self.provider_reason = _reason(device, self.provider)
        given = [flag for flag, value in (("--cuda-graphs", gpu.graphs), ("--gpu-memory", gpu.memory_gib)) if value]
        if given and self.provider != CUDA:
            raise RefusalError(f"{given[0]} needs {CUDA}, and {self.provider} is what runs here: leave it out")
        size = bundle.manifest.encoder.image_size
        self.lanes = lanes
        engines = cache_folder() / "tensorrt" / bundle.manifest.files[path.name].sha256[:32]
        self._session = _load(path, self.provider, self.threads, size, gpu, engines)
        self._narrow: ort.InferenceSession | None = None
        if lanes > 1:  # with one thread a session computes in the thread that calls it, in any number of them at a time
            self._narrow = _load(path, self.provider, 1, size, gpu, engines)
            self._pool = ThreadPoolExecutor(lanes - 1, thread_name_prefix="embed")
        self._running, self._lock = 0, threading.Lock()
        if self.provider != CPU and hasattr(self._session, "get_provider_graph_assignment_info"):
            placed = [(part.ep_name, node.op_type) for part in self._session.get_provider_graph_assignment_info()
                      for node in part.get_nodes()]  # fmt: skip
            elsewhere = misplaced(placed, self.provider)
            if elsewhere:
                self.provider_reason += f"; {elsewhere}"
            if elsewhere and require_provider:
                raise RefusalError(
                    f"{path} does not run on {self.provider} alone: {elsewhere}; leave --require-provider out, or export "
                    "it with --opset 20"
                )
        graph_input = self._session.get_inputs()[0]
        if graph_input.type != "tensor(uint8)" or list(graph_input.shape[1:]) != [size, size, 3]:
            raise RefusalError(
                f"{path} takes {graph_input.type} {graph_input.shape}, the manifest says uint8 "
                f"[batch, {size}, {size}, 3]: export it again"
            )
        self._pads = self.provider in ON_GPU
        self._fixed = FixedBatches(self._session, bundle.dim, "cuda") if gpu.graphs else None
        if self._pads:
            try:  # the largest first, so that the arena grows once; whoever waits, waits before "ready"
                for batch in reversed(BUCKETS):
                    self.embed(np.zeros((batch, size, size, 3), np.uint8))
            except Exception as e:  # onnxruntime raises its own pybind types
                advice = f"without {' and '.join(given)}, or " if given else ""
                raise RefusalError(
                    f"{path} does not run in batches of up to {BUCKETS[-1]} on {self.provider} ({e}): try {advice}"
                    "--device cpu"
                ) from e
        self.check_canary()

    @property
    def machine(self) -> str:
        """Processor, threads and runtime: what a measurement holds for."""
        return runtime_name("cuda" if self.provider in ON_GPU else "cpu", self.threads)

    def embed(self, images: Pixels) -> Embeddings:
        """uint8 [N, H, W, 3] → float32 [N, D], unit rows. Thread-safe; with lanes a call beside others has the
        thread that it comes in, and a call alone has all. N = 0 gives an empty array."""
        count = len(images)
        if count == 0:
            return np.zeros((0, self.bundle.dim), np.float32)
        if self._pads and count > BUCKETS[-1]:
            parts = [self.embed(images[lo : lo + BUCKETS[-1]]) for lo in range(0, count, BUCKETS[-1])]
            return np.concatenate(parts)
        if self._pads:
            bucket = next(size for size in BUCKETS if size >= count)
            images = np.concatenate([images, np.zeros((bucket - count, *images.shape[1:]), np.uint8)])
        images = np.ascontiguousarray(images)
        if self._fixed is not None:
            return self._fixed.embed(images)[:count]
        if self._narrow is None:
            return _rows(self._session, images)[:count]
        with self._lock:
            alone = not self._running
            self._running += 1
        try:
            if not alone:
                return _rows(self._narrow, images)
            return _rows(self._session, images) if 2 * count <= self.lanes else self._in_lanes(images, self._narrow)
        finally:
            with self._lock:
                self._running -= 1

    def _in_lanes(self, images: Pixels, session: ort.InferenceSession) -> Embeddings:
        """A batch, some pictures at a time by whichever lane is free: one that other work holds up holds up no other. How
        it is cut depends on its size alone, so that equal batches give equal bits."""
        rows = np.empty((len(images), self.bundle.dim), np.float32)
        size = -(-len(images) // (PIECES * self.lanes))
        starts = iter(range(0, len(images), size))  # shared: `next` of a range's iterator is one step

        def work() -> None:
            for low in starts:
                rows[low : low + size] = _rows(session, images[low : low + size])

        others = [self._pool.submit(work) for _ in range(self.lanes - 1)]
        work()
        for other in others:
            other.result()
        return rows

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


class FixedBatches:
    """Buffers that stay where they are, per batch size: CUDA graphs, captured at the first run of a size, read and write
    them.

    A session with captured graphs may be run from one thread only, and the CUDA provider keeps graphs per thread
    (onnxruntime's CUDA provider, "Using CUDA Graphs"); so everything runs on a thread of its own.
    """

    def __init__(self, session: ort.InferenceSession, dim: int, place: str) -> None:
        """For a session that gives rows [N, `dim`], on the device `place`."""
        self._session, self._dim, self._place = session, dim, place
        self._bound: dict[int, tuple[ort.OrtValue, ort.OrtValue, Any, ort.RunOptions]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cuda-graphs")

    def embed(self, images: Pixels) -> Embeddings:
        """uint8 [N, H, W, 3] → float32 [N, D]. Thread-safe."""
        return self._thread.submit(self._run, images).result()

    def _run(self, images: Pixels) -> Embeddings:
        count = len(images)
        if count not in self._bound:
            self._bound[count] = self._bind(images.shape)
        given, rows, binding, options = self._bound[count]
        given.update_inplace(images)
        self._session.run_with_iobinding(binding, options)
        found: Embeddings = np.array(rows.numpy())
        return found

    def _bind(self, shape: Sequence[int]) -> tuple[ort.OrtValue, ort.OrtValue, Any, ort.RunOptions]:
        given = ort.OrtValue.ortvalue_from_shape_and_type(list(shape), np.uint8, self._place, 0)
        rows = ort.OrtValue.ortvalue_from_shape_and_type([shape[0], self._dim], np.float32, self._place, 0)
        binding = self._session.io_binding()
        binding.bind_ortvalue_input("images", given)
        binding.bind_ortvalue_output("embedding", rows)
        options = ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(shape[0]))  # one graph per batch size; 0 is reserved
        return given, rows, binding, options


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
    try:
        session = ort.InferenceSession(str(path), _session_options(cpu_quota()), providers=[CPU])
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


def _rows(session: ort.InferenceSession, images: Pixels) -> Embeddings:
    (rows,) = session.run(["embedding"], {"images": images})
    found: Embeddings = rows
    return found


def _session_options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what it would log is raised
    # Idle spinning steals the cores that decode the next batch.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _load(path: Path, provider: str, threads: int, size: int, gpu: GpuOptions, engines: Path) -> ort.InferenceSession:
    """A session on the provider. Raises `RefusalError` where that does not load."""
    options = _session_options(threads)
    if provider in ON_GPU and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # without torch beside it, nothing else finds the CUDA libraries that pip installed
    if provider != CPU:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    try:
        if provider == OPENVINO:
            options.add_provider_for_devices(_openvino_devices(), {})
            session = ort.InferenceSession(str(path), options, enable_fallback=0)
        else:
            if provider == TENSORRT:
                engines.mkdir(parents=True, exist_ok=True)
            providers = session_providers(provider, size, gpu, engines)
            # onnxruntime's own fallback would drop every option and hide the reason.
            session = ort.InferenceSession(str(path), options, providers=providers, enable_fallback=0)
    except Exception as e:  # onnxruntime raises its own pybind types
        raise RefusalError(f"{path} cannot be loaded by onnxruntime {ort.__version__} on {provider} ({e})") from e
    loaded = session.get_providers()[0]
    if loaded != provider:
        cause = "check the driver" if provider in ON_GPU else "it is not in this onnxruntime"
        raise RefusalError(
            f"{provider} was asked for, but onnxruntime {ort.__version__} loaded {path} on {loaded}: {cause}, or pass "
            "--device cpu"
        )
    return session


def _reason(device: Device, provider: str) -> str:
    if device != "auto":
        return "asked for"
    if provider in ON_GPU:
        return "onnxruntime has the provider and an NVIDIA driver is present"
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


@functools.cache
def tensorrt_problem() -> str | None:
    """Why TensorRT cannot be used though it is installed, as a sentence; '' where it can, None where it is not installed.

    Loads TensorRT 10's libraries from where pip put them (PyPI tensorrt-cu13-libs<11): nothing else makes them found.
    """
    spec = find_spec("tensorrt_libs")
    if spec is None or not spec.submodule_search_locations:
        return None
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # they need CUDA's
    folder = Path(spec.submodule_search_locations[0])
    try:
        for name in ("libnvinfer.so.10", "libnvinfer_plugin.so.10", "libnvonnxparser.so.10"):
            ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
    except OSError as e:
        return (
            f"TensorRT is installed, but is left out because it does not load ({e}): onnxruntime {ort.__version__} needs "
            "TensorRT 10, pip install 'tensorrt-cu13-libs<11'"
        )
    return ""


def _installed(packages: Sequence[str]) -> str:
    for package in packages:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return "of unknown version"


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])
