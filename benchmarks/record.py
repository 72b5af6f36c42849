"""What every benchmark writes: machine, versions, figures and goals."""

from __future__ import annotations

import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "timm", "onnxruntime", "faiss-cpu", "grpcio", "numpy", "Pillow")


def cpu_name() -> str:
    """The processor as the kernel names it, with the instruction sets that decide speed."""
    text = Path("/proc/cpuinfo").read_text()
    name = next((line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")), "?")
    flags = next((line.split(":", 1)[1].split() for line in text.splitlines() if line.startswith("flags")), [])
    kinds = [kind for kind, flag in (("AMX", "amx_tile"), ("AVX-512", "avx512f"), ("AVX2", "avx2")) if flag in flags]
    return f"{name} ({kinds[0] if kinds else 'no AVX2'})"


def versions() -> dict[str, str]:
    """Versions of the packages that matter, as far as installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def finish(name: str, figures: dict[str, Any], goals: list[tuple[str, float, float]], seed: int, quick: bool) -> bool:
    """Print `figure value goal met|missed` (higher is better) and write the result; returns whether all were met."""
    met = True
    for figure, value, goal in goals:
        ok = value >= goal
        met &= ok
        print(f"{figure} {value:.3f} {goal:.3f} {'met' if ok else 'missed'}")
    if not quick:
        RESULTS.mkdir(exist_ok=True)
        record = {
            "cpu": cpu_name(), "versions": versions(), "seed": seed, "figures": figures,
            "goals": [{"figure": f, "value": v, "goal": g, "met": v >= g} for f, v, g in goals],
        }  # fmt: skip
        (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    return met
