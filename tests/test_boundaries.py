"""Who may import whom (docs/architecture.md), and what a server must not load."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ("bundle", "edits", "machine", "preprocess", "providers", "runtime", "shipped", "tune")
CONTRACT = {f"export.{name}" for name in SHARED}
CONTRACT |= {f"export.sources.{name}" for name in ("listing", "lists", "picture")}
ALLOWED = {
    "training": CONTRACT | {"export.weights"},
    "export": set(),
    "service": CONTRACT,
}
OURS = {"training", "export", "service", "tests", "benchmarks", "runs", "likewise"}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return found


def files(room: str) -> list[Path]:
    return sorted(p for p in (ROOT / room).rglob("*.py") if "pb" not in p.parts)


@pytest.mark.parametrize("room", ALLOWED)
def test_rooms_import_what_they_may(room: str) -> None:
    for path in files(room):
        for module in imports(path):
            top = module.split(".")[0]
            if top not in OURS or top == room:
                continue
            if path.name == "__main__.py" and module == "likewise":
                continue
            assert module in ALLOWED[room], f"{path.relative_to(ROOT)} imports {module}"


def test_heavy_packages_have_one_importer() -> None:
    importers: dict[str, set[str]] = {}
    for room in ALLOWED:
        for path in files(room):
            for module in imports(path):
                importers.setdefault(module.split(".")[0], set()).add(str(path.relative_to(ROOT)))
    assert importers["onnxruntime"] == {"export/runtime.py", "export/quantise.py"}
    assert importers["faiss"] == {"service/index.py", "training/evaluate/ranking.py"}
    assert importers["matplotlib"] == {
        "export/plot.py",
        "training/evaluate/plots.py",
        "training/curves.py",
        "training/report.py",
    }
    assert importers["sqlite3"] == {"service/records.py"}
    assert importers["pyarrow"] == {
        "export/sources/lists.py",
        "service/build.py",
        "service/collection.py",
        "service/embedding.py",
        "service/filter.py",
        "service/merge.py",
        "service/payload.py",
        "service/reading.py",
        "service/segment.py",
        "service/transfer.py",
        "service/view.py",
    }
    assert importers["aiohttp"] == {"service/http_body.py", "service/http_server.py"}
    assert importers["timm"] <= {
        "training/encoder.py",
        "training/loop.py",
        "export/onnx_graph.py",
        "export/weights.py",
        "export/source.py",
        "export/adopt.py",
    }
    torch_in_export = {p for p in importers["torch"] if p.startswith("export/")}
    assert torch_in_export == {"export/onnx_graph.py", "export/source.py", "export/weights.py"}
    assert not any(p.startswith("service/") for p in importers["torch"])


@pytest.mark.parametrize(
    "module",
    [
        "service.server",
        "service.build",
        "service.evaluate",
        "service.client",
        "likewise",
        "training.config",
        "training.evaluate.config",
    ],
)
def test_serving_and_help_do_not_load_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
