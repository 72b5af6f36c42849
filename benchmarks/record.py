"""What every benchmark writes: machine, versions, figures and goals."""

from __future__ import annotations

import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from export.machine import cpu_model as cpu_name

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "timm", "onnxruntime", "openvino", "faiss-cpu", "grpcio", "numpy", "Pillow")


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
