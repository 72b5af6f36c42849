"""Which graph on which provider is fastest on this machine? Measured for about a second when a bundle is first opened here
(TensorRT builds its engines first), kept beside the bundle, and said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import ValidationError

from export.bundle import Bundle, Contract, RefusalError, write_file
from export.machine import cache_folder, cpu_quota
from export.parity import GATE_PICTURES, measure_speed, read_parity
from export.providers import CPU, CUDA, ON_GPU, TENSORRT, GpuOptions
from export.runtime import Device, Runtime, offered, runtime_name, tensorrt_problem
from export.shipped import is_shipped

MIN_OVERLAP = 0.98
"""Vectors of two variants are one collection's, and a faster variant takes fp32's place, from this stored overlap@10 on."""
FLOAT32 = (CPU, CUDA)  # OpenVINO chooses bfloat16 where the processor has it, TensorRT TF32 where the GPU has it
BATCH = 8
SECONDS = 0.4  # per candidate


class Candidate(NamedTuple):
    """A way to run a bundle."""

    variant: str
    provider: str
    lanes: int

    def __str__(self) -> str:
        return f"{self.variant} on {self.provider}{f' in {self.lanes} lanes' if self.lanes > 1 else ''}"


class Timing(Contract):
    """One candidate on one machine."""

    variant: str
    """Which graph."""
    provider: str
    """ONNX Runtime's execution provider."""
    lanes: int = 1
    """How many of one thread each share the pictures of a batch; 1: all threads compute each picture together."""
    images_per_second: float
    """In batches of 8."""

    @property
    def candidate(self) -> Candidate:
        """What was timed."""
        return Candidate(self.variant, self.provider, self.lanes)


class Timings(Contract):
    """machine.json beside a bundle."""

    format_version: int = 1
    """Format of the file."""
    seal: str
    """Of the manifest that was measured: other graphs, other speeds."""
    machines: dict[str, list[Timing]]
    """Processor, threads and runtime → candidates."""


def open_runtime(
    bundle: Bundle, device: Device = "auto", threads: int | None = None, variant: str = "auto",
    say: Callable[[str], None] = lambda _: None, require_provider: bool = False,
    gpu: GpuOptions = GpuOptions(),
) -> Runtime:  # fmt: skip
    """The fastest faithful runtime of a bundle on this machine; or of one variant, where asked for. Raises `RefusalError`.

    Candidates are fp32, and the variants meant for the device whose stored overlap with the network is at least 0.98, on
    every provider that ONNX Runtime offers here. Where none runs on a GPU that was found by itself, the CPU does, and that
    is said, unless `require_provider`.
    """
    providers = offered(device)
    if providers[0] in ON_GPU and tensorrt_problem():
        say(str(tensorrt_problem()))
    if gpu.memory_gib is not None or gpu.graphs:
        providers = [provider for provider in providers if provider != TENSORRT]
    try:
        return _fastest(bundle, device, threads, variant, say, require_provider, gpu, providers)
    except RefusalError as e:
        if device != "auto" or require_provider or providers[0] not in ON_GPU:
            raise
        say(f"the GPU cannot be used, the CPU is: {e}")
        runtime = open_runtime(bundle, "cpu", threads, variant, say)
        runtime.provider_reason = f"{providers[0]} cannot be used: {e}"
        return runtime


def _fastest(
    bundle: Bundle, device: Device, threads: int | None, variant: str, say: Callable[[str], None],
    require_provider: bool, gpu: GpuOptions, providers: Sequence[str],
) -> Runtime:  # fmt: skip
    runs = [(name, provider) for provider in providers for name in _eligible(bundle, provider, variant)]
    if not runs:  # asked for against its purpose: it runs, slowly
        runs = [(variant, provider) for provider in providers]
    most = threads or cpu_quota()
    candidates = [
        Candidate(name, provider, lanes)
        for name, provider in runs
        for lanes in ((1, most) if most > 1 and provider == CPU else (1,))
    ]
    if len(candidates) == 1:
        return Runtime(bundle, device, threads, *runs[0], require_provider, gpu)
    memory = [] if gpu.memory_gib is None else [f"{gpu.memory_gib:g} GiB"]
    asked = [*([] if variant == "auto" else [variant]), *(["CUDA graphs"] if gpu.graphs else []), *memory]
    machine = ", ".join([runtime_name(device, threads), *asked])
    kept = read_timings(bundle)
    known = {t.candidate: t for t in kept.machines.get(machine, [])}
    missing = [candidate for candidate in candidates if candidate not in known]
    refused: dict[Candidate, str] = {}
    if missing:
        say(f"measuring {len(missing)} configurations once on {machine}")
        if any(candidate.provider == TENSORRT for candidate in missing):
            say("TensorRT builds its engines first: that takes minutes, once")
    for candidate in missing:
        try:
            timing = _time(bundle, device, threads, candidate, gpu)
        except RefusalError as e:  # it may run another time: not kept
            refused[candidate] = str(e)
            say(f"  {candidate}: {e}")
            continue
        known[candidate] = timing
        say(f"  {candidate!s:<52}{timing.images_per_second:>9,.1f} images/s")
    timings = [known[candidate] for candidate in candidates if candidate in known]
    if not timings:
        raise RefusalError(next(iter(refused.values())))
    if len(refused) < len(missing):
        _write(bundle, Timings(seal=bundle.manifest.seal, machines={**kept.machines, machine: timings}))
    best = max(timings, key=lambda t: t.images_per_second)
    try:
        runtime = Runtime(bundle, device, threads, best.variant, best.provider, require_provider, gpu, best.lanes)
    except RefusalError as e:  # since it was measured, something was upgraded or broke
        if require_provider:
            raise
        say(f"{best.candidate} does not run any more, fp32 does: {e}")
        runtime = Runtime(bundle, device, threads, gpu=gpu)
    others = ", ".join(f"{t.candidate} {t.images_per_second:,.1f}" for t in timings if t != best)
    measured = f"{best.candidate} {best.images_per_second:,.1f} images/s here, {others or 'nothing else'}"
    runtime.provider_reason = f"{runtime.provider_reason}; {measured}"
    return runtime


def overlap(bundle: Bundle, variant: str, provider: str) -> float | None:
    """Lowest stored overlap@10 of a variant on a provider with the network, over the machines that measured it on enough
    pictures; None where none did. That of fp32 is 1 where it computes in float32: its gate is stricter."""
    if variant == "fp32" and provider in FLOAT32:
        return 1.0
    found = [
        m.neighbor_overlap_at_10 for m in read_parity(bundle).measurements
        if (m.variant, m.provider) == (variant, provider) and m.pictures >= GATE_PICTURES
    ]  # fmt: skip
    return min(found) if found else None


def mixing_refusal(bundle: Bundle, origin: str, stored: set[str]) -> str | None:
    """Why vectors of `origin` (variant/provider) may not join a collection with those of `stored`; None where they may."""
    for name in sorted(stored - {origin}):
        for one in (origin, name):
            found = overlap(bundle, *one.split("/", 1))
            if found is None or found < MIN_OVERLAP:
                known = "was not measured" if found is None else f"is {found:.3f}"
                return (
                    f"the collection holds vectors of {name}, this encoder is {origin}, and the neighbour overlap of {one} "
                    f"{known}, {MIN_OVERLAP} is needed to mix them: pass --variant {name.split('/')[0]}, measure it with "
                    "`likewise bundle verify --images`, or build another collection"
                )
    return None


def _eligible(bundle: Bundle, provider: str, variant: str) -> list[str]:
    found = []
    for name, about in bundle.manifest.variants.items():
        meant = "*" in about.providers or provider in about.providers
        close = (overlap(bundle, name, provider) or 0.0) >= MIN_OVERLAP
        if meant and (name == variant or (variant == "auto" and close)):
            found.append(name)
    return found


def _time(bundle: Bundle, device: Device, threads: int | None, candidate: Candidate, gpu: GpuOptions) -> Timing:
    variant, provider, lanes = candidate
    runtime = Runtime(bundle, device, threads, variant, provider, gpu=gpu, lanes=lanes)
    size = bundle.manifest.encoder.image_size
    noise = np.random.default_rng(0).integers(0, 256, (BATCH, size, size, 3), np.uint8)
    speed = measure_speed(runtime, noise, BATCH, SECONDS)
    return Timing(variant=variant, provider=provider, lanes=lanes, images_per_second=speed.images_per_second)


def _places(bundle: Bundle) -> list[Path]:
    """Beside the bundle; where that cannot be written, or is part of the package, in the user's cache."""
    cached = cache_folder() / f"{bundle.manifest.seal[:32]}.json"
    return [cached] if is_shipped(bundle.folder) else [bundle.folder / "machine.json", cached]


def read_timings(bundle: Bundle) -> Timings:
    """What was measured of this bundle, on any machine."""
    machines: dict[str, list[Timing]] = {}
    for path in reversed(_places(bundle)):
        try:
            found = Timings.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):
            continue  # absent or damaged: measured again
        if found.seal == bundle.manifest.seal:
            machines.update(found.machines)
    return Timings(seal=bundle.manifest.seal, machines=machines)


def _write(bundle: Bundle, timings: Timings) -> None:
    for path in _places(bundle):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, timings.model_dump_json(indent=2))
        except OSError:
            continue  # a read-only folder: the next place
        return
