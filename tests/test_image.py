"""The container image without a container engine: its steps in a clean environment, and a linter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.service.running import address_of
from tests.service.test_server import free_port

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def test_the_dockerfile_passes_a_linter() -> None:
    linter = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([str(linter), str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_is_not_root_checks_itself_and_takes_every_room() -> None:
    assert re.search(r"^USER \d+$", DOCKERFILE, re.M)
    assert 'CMD ["likewise", "healthcheck"]' in DOCKERFILE
    assert len(re.findall(r"^FROM ", DOCKERFILE, re.M)) == 2
    ignored = (ROOT / ".dockerignore").read_text()
    for name in re.findall(r"^COPY ([\w.]+) \./", DOCKERFILE, re.M):
        assert f"!{name}" in ignored


@pytest.mark.slow
def test_its_steps_make_a_server_without_torch(tmp_path: Path) -> None:
    step = re.search(r"^RUN (python -m venv .*?)(?:\n\n|\nFROM)", DOCKERFILE, re.M | re.S)
    assert step is not None
    prefix = tmp_path / "likewise"
    script = (
        step[1].replace("\\\n", " ").replace("/opt/likewise", str(prefix)).replace("python -m", f"{sys.executable} -m")
    )
    source = tmp_path / "src"
    source.mkdir()
    for name in re.findall(r"^COPY (?!--from)(.+) \./", DOCKERFILE, re.M):
        for part in name.split():
            subprocess.run(["cp", "-r", str(ROOT / part), str(source)], check=True)
    subprocess.run(["bash", "-ec", script], cwd=source, check=True, env={**os.environ, "VARIANT": "cpu"})
    installed = {p.name.split("-")[0].lower() for p in prefix.glob("lib/python3*/site-packages/*.dist-info")}
    assert {"onnxruntime", "faiss_cpu", "grpcio", "likewise"} <= installed
    assert not installed & {"torch", "timm", "torchvision", "onnxruntime_gpu"}
    size = sum(p.stat().st_size for p in prefix.rglob("*") if p.is_file() and not p.is_symlink())
    assert size < 1e9

    likewise, port = str(prefix / "bin" / "likewise"), free_port()
    serve = [likewise, "serve", "--collections", str(tmp_path / "collections")]  # with the encoder in the box
    server = subprocess.Popen(
        [*serve, "--port", str(port), "--metrics-port", "0"], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    try:
        assert address_of(server) == f"127.0.0.1:{port}"
        check = subprocess.run([likewise, "healthcheck", "--server", f"127.0.0.1:{port}"], cwd=tmp_path, check=False)
        assert check.returncode == 0
    finally:
        server.terminate()
        assert server.wait(20) == 0
        assert server.stderr is not None
        server.stderr.close()
