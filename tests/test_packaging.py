"""Generated code is fresh, the wheel holds what it must, the proto is clean."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import likewise
from export.shipped import DEFAULT_NAME

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_generated_code_is_fresh(tmp_path: Path) -> None:
    (tmp_path / "service" / "pb").mkdir(parents=True)
    subprocess.run([sys.executable, str(ROOT / "runs" / "generate_proto.py"), str(tmp_path)], check=True)
    made = sorted((tmp_path / "service" / "pb").iterdir())
    assert {p.name for p in made} == {
        "likewise_pb2.py", "likewise_pb2.pyi", "likewise_pb2_grpc.py", "likewise_pb2_grpc.pyi",
    }  # fmt: skip
    for path in made:
        assert path.read_bytes() == (ROOT / "service" / "pb" / path.name).read_bytes(), f"{path.name}: run make proto"


def test_generated_documents_are_fresh() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "runs.generate_api", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_buf_lint_is_clean() -> None:
    buf = Path(sys.executable).parent / "buf"
    done = subprocess.run([str(buf), "lint"], cwd=ROOT / "proto", capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_every_message_field_and_rpc_is_documented_or_obvious() -> None:
    """Every message, service and RPC has a comment of its own, empty ones and request/response pairs aside."""
    text = (ROOT / "proto/likewise/v1/likewise.proto").read_text().splitlines()
    for number, line in enumerate(text):
        named = re.match(r"\s*(service|rpc|message) (\w+)", line)
        if named and not named[2].endswith(("Request", "Response")):
            assert text[number - 1].strip().startswith("//"), f"line {number + 1}: {line.strip()} has no comment"


def test_the_wheel_holds_the_rooms_and_nothing_else(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        entry = next(n for n in names if n.endswith("entry_points.txt"))
        assert "likewise = likewise:main" in archive.read(entry).decode()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"service", "training", "export", "likewise.py", next(t for t in tops if t.endswith(".dist-info"))}
    assert {"service/pb/likewise_pb2.py", "export/runtime.py", "training/sop.py"} <= set(names)
    assert {"service/openapi.json", "service/page.html"} <= set(names)
    assert any(n.endswith("licenses/LICENSE") for n in names)
    kept = subprocess.run(["git", "ls-files", "export/encoders"], cwd=ROOT, check=True, capture_output=True, text=True)
    encoders = set(kept.stdout.split())
    assert encoders == {name for name in names if name.startswith("export/encoders/")}
    assert f"export/encoders/{DEFAULT_NAME}/model.onnx" in encoders


def test_versions_agree() -> None:
    assert PROJECT["project"]["version"] == likewise.VERSION
    pinned = next(d for d in PROJECT["project"]["optional-dependencies"]["dev"] if d.startswith("grpcio-tools"))
    gencode = re.search(r"GRPC_GENERATED_VERSION = '([\d.]+)'", (ROOT / "service/pb/likewise_pb2_grpc.py").read_text())
    assert gencode and pinned == f"grpcio-tools=={gencode[1]}"
    assert f"grpcio>={gencode[1]}" in PROJECT["project"]["optional-dependencies"]["serve"]
