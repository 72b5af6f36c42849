"""Does the exported graph do what the network does? Measured on real pictures, through the runtime that will serve."""

from __future__ import annotations

import platform
from collections.abc import Callable

import numpy as np
from pydantic import Field

from export.bundle import Contract, Embeddings, RefusalError
from export.preprocess import Pixels
from export.runtime import Runtime

MIN_COSINE = 0.99999  # fp32
BATCHES = (1, 3, 32)


class Parity(Contract):
    """One variant on one provider of one machine, beside the network itself."""

    variant: str = "fp32"
    """Which graph."""
    provider: str
    """ONNX Runtime's execution provider."""
    machine: str
    """Where it was measured."""
    pictures: int
    """Real pictures compared."""
    minimum_cosine: float
    """Lowest cosine between torch's and the runtime's embedding of one picture, over batches of 1, 3 and 32."""
    mean_cosine: float
    """Its mean."""
    maximum_difference: float
    """Largest absolute difference of a coordinate."""
    neighbor_overlap_at_10: float = Field(ge=0, le=1)
    """Share of each picture's ten nearest neighbours (fewer in small sets) that both agree on."""
    batch_sizes: tuple[int, ...] = BATCHES
    """Batch sizes compared."""


class ParityReport(Contract):
    """parity.json: what was measured, on which machine; outside every hash."""

    format_version: int = 1
    """Format of the file."""
    measurements: list[Parity]
    """One per variant, provider and machine."""


def measure_parity(embed: Callable[[Pixels], Embeddings], runtime: Runtime, pixels: Pixels) -> Parity:
    """Compare the network's own `embed` with the runtime on pixels uint8 [N, H, W, 3], N ≥ 2."""
    source = np.concatenate([embed(part) for part in _parts(pixels, 32)])
    cosines, differences = [], []
    served: Embeddings = source
    for size in BATCHES:
        some = pixels if size == BATCHES[-1] else pixels[: 16 * size]
        served = np.concatenate([runtime.embed(part) for part in _parts(some, size)])
        cosines.append(np.sum(served * source[: len(some)], axis=1))
        differences.append(np.abs(served - source[: len(some)]).max())
    flat = np.concatenate(cosines)
    return Parity(
        provider=runtime.provider,
        machine=f"{platform.machine()} {platform.system()}",
        pictures=len(pixels),
        minimum_cosine=float(flat.min()),
        mean_cosine=float(flat.mean()),
        maximum_difference=float(max(differences)),
        neighbor_overlap_at_10=neighbor_overlap(source, served, 10),
    )


def require_parity(parity: Parity) -> None:
    """Raises `RefusalError` when the bundle must not be written."""
    if not parity.minimum_cosine >= MIN_COSINE:  # also catches NaN
        raise RefusalError(
            f"the exported graph differs from the network: lowest cosine {parity.minimum_cosine:.7f} over "
            f"{parity.pictures} pictures on {parity.provider}, at least {MIN_COSINE} is needed; no bundle was written: "
            "report this with the versions of torch, onnxscript and onnxruntime"
        )


def neighbor_overlap(a: Embeddings, b: Embeddings, k: int) -> float:
    """Mean share of the k nearest rows of each row (itself left out) that are the same in a and b [N, D]."""
    k = min(k, len(a) - 1)

    def nearest(x: Embeddings) -> list[set[int]]:
        similarity = x @ x.T
        np.fill_diagonal(similarity, -2.0)
        return [set(row) for row in np.argpartition(-similarity, k - 1, axis=1)[:, :k].tolist()]

    return float(np.mean([len(p & q) / k for p, q in zip(nearest(a), nearest(b), strict=True)]))


def _parts(pixels: Pixels, size: int) -> list[Pixels]:
    return [pixels[low : low + size] for low in range(0, len(pixels), size)]
