"""Generate service/pb from proto/ (or into another folder: `generate_proto.py FOLDER`)."""

from __future__ import annotations

import shutil
import sys
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent


def generate(root: Path) -> None:
    """Write `root/service/pb/likewise_pb2*.py*`."""
    # Bare names as in an activated environment; protoc finds its plugins on PATH or where it is told.
    plugins = [
        f"--plugin=protoc-gen-{name}={shutil.which(f'protoc-gen-{name}', path=str(Path(sys.executable).parent))}"
        for name in ("mypy", "mypy_grpc")
    ]
    # The virtual path makes the generated modules import each other as service.pb, without any rewriting.
    arguments = [
        "protoc", f"-Iservice/pb={ROOT / 'proto/likewise/v1'}", f"-I{ROOT / 'proto/third_party'}",
        f"-I{resources.files('grpc_tools') / '_proto'}", *plugins,
        f"--python_out={root}", f"--grpc_python_out={root}", f"--mypy_out=quiet:{root}", f"--mypy_grpc_out=quiet:{root}",
        "service/pb/likewise.proto",
    ]  # fmt: skip
    if protoc.main(arguments):
        raise SystemExit(1)


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
