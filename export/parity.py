"""Does a graph do what the network does? Measured on real pictures, through the runtime that will serve."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from pydantic import Field, ValidationError

from export.bundle import Bundle, Contract, Embeddings, RefusalError
from export.preprocess import Pixels
from export.providers import BUCKETS
from export.runtime import Runtime

BATCHES = (1, 3, BUCKETS[-1])
MIN_COSINE = {"fp32": 0.99999, "fp16": 0.999}
INT8_OVERLAP = 0.95
INT8_MAP_LOSS = 1.0  # points
GATE_PICTURES = 200  # fewer say nothing about neighbours: of eleven, all share their ten
SPEED_BATCHES = (1, 8, 32)
SPEED_SECONDS = 0.3  # per batch size


class Speed(Contract):
    """How fast batches of one size went."""

    batch: int
    """Pictures per run."""
    images_per_second: float
    """At the median time."""
    milliseconds: float
    """Median time of a run."""


class Parity(Contract):
    """One variant on one provider of one machine, beside the network itself."""

    variant: str = "fp32"
    """Which graph."""
    provider: str
    """ONNX Runtime's execution provider."""
    machine: str
    """Where it was measured: processor, threads, runtime."""
    pictures: int
    """Real pictures compared."""
    not_finite: int
    """Of them, how many embeddings were not finite in some batch size."""
    minimum_cosine: float
    """Lowest cosine between the network's and the runtime's embedding of one picture, over `batch_sizes`."""
    mean_cosine: float
    """Its mean."""
    maximum_difference: float
    """Largest absolute difference of a coordinate."""
    neighbor_overlap_at_1: float = Field(ge=0, le=1)
    """Share of the pictures whose nearest neighbour is the same."""
    neighbor_overlap_at_10: float = Field(ge=0, le=1)
    """Share of each picture's ten nearest neighbours (fewer in small sets) that both agree on."""
    map_loss: float | None = None
    """By how many points the mean average precision falls, folder names as labels; None without labels."""
    batch_sizes: tuple[int, ...] = BATCHES
    """Batch sizes compared."""
    speed: list[Speed]
    """Time per batch size."""
    peak_memory_mib: float | None
    """Largest resident memory of the process while it embedded; None where the system does not say."""


class ParityReport(Contract):
    """parity.json: what was measured, on which machine; outside every hash."""

    format_version: int = 1
    """Format of the file."""
    measurements: list[Parity]
    """One per variant, provider and machine."""

    def with_(self, new: Parity) -> ParityReport:
        """The same with one measurement added, or in the place of an older one of its kind."""
        same = [
            m
            for m in self.measurements
            if (m.variant, m.provider, m.machine) == (new.variant, new.provider, new.machine)
        ]
        if any(m.pictures > max(new.pictures, GATE_PICTURES) for m in same):
            return self  # more pictures know better
        return ParityReport(measurements=[*(m for m in self.measurements if m not in same), new])


def read_parity(bundle: Bundle) -> ParityReport:
    """What parity.json holds; nothing where it is absent or damaged: it may be measured again."""
    try:
        return ParityReport.model_validate_json((bundle.folder / "parity.json").read_bytes())
    except (OSError, ValidationError):
        return ParityReport(measurements=[])


def measure_parity(
    embed: Callable[[Pixels], Embeddings], runtime: Runtime, pixels: Pixels, labels: Sequence[str] | None = None
) -> Parity:
    """Compare the network's own `embed` with the runtime on pixels uint8 [N, H, W, 3], N ≥ 2, of pictures with `labels`."""
    source = np.concatenate([embed(part) for part in _parts(pixels, 32)])
    cosines, differences = [], []
    bad: set[int] = set()
    served: Embeddings = source
    reset = _reset_peak_memory()
    for size in BATCHES:
        some = pixels if size == BATCHES[-1] else pixels[: 16 * size]
        served = np.concatenate([runtime.embed(part) for part in _parts(some, size)])
        bad.update(np.flatnonzero(~np.isfinite(served).all(1)).tolist())
        cosines.append(np.sum(served * source[: len(some)], axis=1))
        differences.append(np.abs(served - source[: len(some)]).max())
    peak = _peak_memory() if reset else None
    flat = np.concatenate(cosines)
    finite = np.nan_to_num(served)
    loss = None
    if labels is not None and len(set(labels)) > 1:
        loss = 100 * (mean_average_precision(source, labels) - mean_average_precision(finite, labels))
    return Parity(
        variant=runtime.variant,
        provider=runtime.provider,
        machine=runtime.machine,
        pictures=len(pixels),
        not_finite=len(bad),
        minimum_cosine=float(flat.min()),
        mean_cosine=float(flat.mean()),
        maximum_difference=float(max(differences)),
        neighbor_overlap_at_1=neighbor_overlap(source, finite, 1),
        neighbor_overlap_at_10=neighbor_overlap(source, finite, 10),
        map_loss=loss,
        speed=[measure_speed(runtime, pixels, size) for size in SPEED_BATCHES],
        peak_memory_mib=peak,
    )


def measure_speed(runtime: Runtime, pixels: Pixels, batch: int, seconds: float = SPEED_SECONDS) -> Speed:
    """Median over the runs that fit into `seconds`, at least three after a first one."""
    some = pixels[np.arange(batch) % len(pixels)]
    runtime.embed(some)
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        start = time.perf_counter()
        runtime.embed(some)
        times.append(time.perf_counter() - start)
    median = float(np.median(times))
    return Speed(batch=batch, images_per_second=batch / median, milliseconds=1000 * median)


def require_parity(parity: Parity) -> None:
    """The gate of a variant. Raises `RefusalError` when it must not be written."""
    found = (
        f"lowest cosine {parity.minimum_cosine:.7f}, neighbour overlap@10 {parity.neighbor_overlap_at_10:.3f} over "
        f"{parity.pictures} pictures on {parity.provider}"
    )
    if parity.not_finite:
        raise RefusalError(
            f"the {parity.variant} graph gives {parity.not_finite} of {parity.pictures} pictures embeddings that are not "
            "finite: it was not written; use another variant"
        )
    floor = MIN_COSINE.get(parity.variant)
    if floor is not None and not parity.minimum_cosine >= floor:  # also catches NaN
        what = (
            "no bundle was written: report this with the versions of torch, onnxscript and onnxruntime"
            if parity.variant == "fp32"
            else "it was not written; use fp32"
        )
        raise RefusalError(
            f"the {parity.variant} graph differs from the network: {found}, a cosine of at least {floor} is needed; {what}"
        )
    if floor is None and parity.pictures < GATE_PICTURES:
        raise RefusalError(
            f"{parity.pictures} pictures do not show whether {parity.variant} finds the same neighbours, at least "
            f"{GATE_PICTURES} are needed: pass --images with more; it was not written"
        )
    by_map = parity.map_loss is not None and parity.map_loss <= INT8_MAP_LOSS
    if floor is None and not (parity.neighbor_overlap_at_10 >= INT8_OVERLAP or by_map):
        said = "" if parity.map_loss is None else f", mAP loss {parity.map_loss:.2f} points"
        raise RefusalError(
            f"the {parity.variant} graph finds other neighbours: {found}{said}; an overlap of at least {INT8_OVERLAP} or a "
            f"mAP loss of at most {INT8_MAP_LOSS:g} point is needed: it was not written; use fp32"
        )


def neighbor_overlap(a: Embeddings, b: Embeddings, k: int) -> float:
    """Mean share of the k nearest rows of each row (itself left out) that are the same in a and b [N, D]."""
    k = min(k, len(a) - 1)

    def nearest(x: Embeddings) -> list[set[int]]:
        similarity = x @ x.T
        np.fill_diagonal(similarity, -2.0)
        return [set(row) for row in np.argpartition(-similarity, k - 1, axis=1)[:, :k].tolist()]

    return float(np.mean([len(p & q) / k for p, q in zip(nearest(a), nearest(b), strict=True)]))


def mean_average_precision(rows: Embeddings, labels: Sequence[str]) -> float:
    """Mean over rows [N, D] of the average precision of those with its label among all others, 0…1; rows whose label has no
    other row are left out."""
    names = np.asarray(labels)
    similarity = rows @ rows.T
    np.fill_diagonal(similarity, -2.0)
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :-1]
    right = names[order] == names[:, None]
    counts = right.sum(1)
    ranks = np.arange(1, right.shape[1] + 1)
    precision = (right.cumsum(1) / ranks * right).sum(1) / np.maximum(counts, 1)
    return float(precision[counts > 0].mean()) if counts.any() else 0.0


def table(report: ParityReport) -> str:
    """The measurements as lines of text."""
    lines = [
        f"{'variant':<8}{'provider':<26}{'min cosine':>11}{'overlap@1':>10}{'@10':>7}  images/s at batch "
        + " / ".join(str(size) for size in SPEED_BATCHES)
    ]
    for m in report.measurements:
        speeds = " / ".join(f"{s.images_per_second:,.0f}" for s in m.speed)
        lines.append(
            f"{m.variant:<8}{m.provider:<26}{m.minimum_cosine:>11.7f}{m.neighbor_overlap_at_1:>10.3f}"
            f"{m.neighbor_overlap_at_10:>7.3f}  {speeds}"
        )
    return "\n".join(lines)


def _parts(pixels: Pixels, size: int) -> list[Pixels]:
    return [pixels[low : low + size] for low in range(0, len(pixels), size)]


def _reset_peak_memory() -> bool:
    if platform.system() != "Linux":
        return False
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM
        return True
    return False


def _peak_memory() -> float | None:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return None
