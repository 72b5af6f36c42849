"""`likewise doctor` and `likewise config print`: what is wrong here, and what a server would run with."""

from __future__ import annotations

import platform
import re
import resource
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, PrivateAttr

from export.bundle import Bundle, RefusalError, printable
from export.machine import cpu_model, cpu_quota, gpu_model
from export.shipped import BundleFolder
from service.config import Serve

# Files that a server has open for each collection, and what it needs besides.
_FILES_EACH, _FILES_BESIDE = 12, 256
# STRICT tables.
_SQLITE = (3, 37)
_REMOTE = {
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "9p",
    "ceph",
    "fuse.sshfs",
    "fuse.s3fs",
    "fuse.gcsfuse",
    "glusterfs",
    "lustre",
}


class Finding(NamedTuple):
    """What was found of one thing."""

    level: Literal["ok", "note", "wrong"]
    name: str
    text: str


class Doctor(BaseModel):
    """Say what is wrong with this machine and its packages: exit code 1 where anything is."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    collections: Path = Path("collections")
    """Where collections are, or are to be."""
    bundle: BundleFolder | None = None
    """A bundle to check, too."""

    def cli_cmd(self) -> int:
        """Run the command."""
        found = list(findings(self))
        for each in found:
            print(f"{each.level:<6}{each.name:<13}{printable(each.text)}")
        return 1 if any(each.level == "wrong" for each in found) else 0


def findings(asked: Doctor) -> Iterator[Finding]:
    """One after the other, the cheap ones first."""
    level: Literal["ok", "wrong"] = "ok" if sys.version_info >= (3, 11) else "wrong"
    yield Finding(level, "python", f"{platform.python_version()} ({platform.platform()})")
    yield Finding("ok", "processor", f"{cpu_model()}, {cpu_quota()} usable")
    yield from _wheels()
    yield from _packages()
    yield from _gpus()
    yield _files()
    yield from _disk(asked.collections)
    yield _sqlite()
    if asked.bundle is not None:
        try:
            bundle = Bundle.open(asked.bundle)
            yield Finding("ok", "bundle", f"{asked.bundle}: {bundle.space_id}, {bundle.dim} dimensions")
        except RefusalError as e:
            yield Finding("wrong", "bundle", str(e))


def _wheels() -> Iterator[Finding]:
    """Two wheels that install one import name overwrite each other's files."""
    owners = metadata.packages_distributions()
    for name in ("onnxruntime", "faiss"):
        found = sorted(set(owners.get(name, ())))
        if not found:
            yield Finding("wrong", name, "not installed: pip install 'likewise[cpu,serve]', or [gpu,serve]")
        elif len(found) > 1:
            yield Finding(
                "wrong", name, f"{' and '.join(found)} are installed, and overwrite each other: pip uninstall -y "
                f"{' '.join(found)}, then pip install 'likewise[cpu]' or 'likewise[gpu]'",
            )  # fmt: skip
        else:
            yield Finding("ok", name, f"{found[0]} {metadata.version(found[0])}")


def _packages() -> Iterator[Finding]:
    names = ("likewise", "numpy", "Pillow", "grpcio", "protobuf", "pyarrow", "pydantic", "opentelemetry-sdk")
    versions = []
    for name in names:
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            if name not in ("likewise", "opentelemetry-sdk"):
                yield Finding("wrong", name, "not installed: pip install 'likewise[cpu,serve]', or [gpu,serve]")
    yield Finding("ok", "packages", ", ".join(versions))
    try:  # generated code refuses a runtime that is older than it
        from service.pb import likewise_pb2_grpc as _  # noqa: F401
    except (ImportError, RuntimeError) as e:
        yield Finding("wrong", "grpc", str(e).splitlines()[0])


def _gpus() -> Iterator[Finding]:
    from export.runtime import offered, tensorrt_problem
    from service.metrics import gpu_memory

    gpus = gpu_memory()
    for number, (used, total) in enumerate(gpus):
        yield Finding("ok", f"gpu {number}", f"{gpu_model()}, {used / 2**30:.1f} of {total / 2**30:.1f} GiB in use")
    try:
        providers = offered("auto")
    except RefusalError as e:
        yield Finding("wrong", "provider", str(e))
        return
    if gpus and not providers[0].startswith("CUDA"):
        text = "there is a GPU, but this onnxruntime cannot use it: pip install 'likewise[gpu]' in a new environment"
        yield Finding("note", "provider", f"{providers[0]}; {text}")
    else:
        yield Finding("ok", "provider", ", ".join(providers))
    problem = tensorrt_problem()
    if problem:
        yield Finding("note", "tensorrt", problem)


def _files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    room = (hard - _FILES_BESIDE) // _FILES_EACH
    text = f"{hard:,} open files ({soft:,} until a server asks for more): enough for some {max(0, room):,} collections"
    return Finding("ok" if room >= 100 else "note", "files", text if room >= 100 else f"{text}; raise `ulimit -Hn`")


def _disk(folder: Path) -> Iterator[Finding]:
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    usage = shutil.disk_usage(there)
    text = f"{there}: {usage.free / 2**30:.1f} of {usage.total / 2**30:.1f} GiB free"
    yield Finding("ok" if usage.free > 2**30 else "wrong", "disk", text)
    kind = _file_system(there)
    if kind in _REMOTE:
        yield Finding(
            "wrong", "disk", f"{there} is on {kind}: SQLite's write-ahead log and memory maps need a local disk; move the "
            "collections, and copy them with `likewise index snapshot`",
        )  # fmt: skip


def _file_system(folder: Path, mounts: Path = Path("/proc/mounts")) -> str:
    """What kind a folder is on; '' where the system does not say."""
    best, kind = -1, ""
    for line in mounts.read_text().splitlines() if mounts.exists() else ():
        _, point, found, *_ = line.split(" ")
        point = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), point)
        if folder.is_relative_to(point) and len(point) > best:
            best, kind = len(point), found
    return kind


def _sqlite() -> Finding:
    from service.records import sqlite_version

    version = sqlite_version()
    if version < _SQLITE:
        return Finding("wrong", "sqlite", f"{_dotted(version)}, {_dotted(_SQLITE)} is needed: use a newer Python build")
    return Finding("ok", "sqlite", _dotted(version))


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


class ConfigPrint(Serve):
    """Say what `likewise serve` would run with, and where each setting comes from; passwords in addresses are left out."""

    _sources: dict[str, str] = PrivateAttr(default_factory=dict)

    def from_sources(self, sources: dict[str, str]) -> None:
        """Where settings come from, by dotted name; those that are not there have their default."""
        self._sources.update(sources)

    def cli_cmd(self) -> int:
        """Run the command."""
        resolved = _resolved(self)
        for name, value in _flat(self):
            source = self._sources.get(name, "default")
            value, reason = resolved.get(name, (value, ""))
            print(f"{name.replace('_', '-')} = {_shown(value)}  ({source}{f': {reason}' if reason else ''})")
        return 0


def _flat(model: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name in type(model).model_fields:
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _resolved(asked: Serve) -> dict[str, tuple[Any, str]]:
    """What automatic settings come to here, and why."""
    from export.runtime import offered

    found: dict[str, tuple[Any, str]] = {}
    if asked.threads is None:
        found["threads"] = (cpu_quota(), "the process's CPU quota")
    if asked.device == "auto":
        found["device"] = (f"auto → {offered('auto')[0]}", "what onnxruntime and this machine have")
    if asked.variant == "auto":
        found["variant"] = ("auto", "the fastest that finds fp32's neighbours, measured at the first start")
    if asked.log_calls is None:
        found["log_calls"] = (asked.log_format == "json", "follows --log-format")
    return found


def _shown(value: Any) -> str:
    text = "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return re.sub(r"(\w+://)[^/@\s]+@", r"\1**********@", text)
