"""What machine is this? Cores, memory, processor, GPU: the names that measurements are kept under, and a place for them."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path


def cpu_quota() -> int:
    """Cores this process may use: its affinity, cut by the container's CPU quota (cgroup v2 or v1)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    for quota_file, period_file in (
        ("/sys/fs/cgroup/cpu.max", None),
        ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us"),
    ):
        try:
            fields = Path(quota_file).read_text().split()
            quota = fields[0]
            period = fields[1] if period_file is None else Path(period_file).read_text().strip()
            if quota not in ("max", "-1"):
                cores = min(cores, max(1, -(-int(quota) // int(period))))
        except (OSError, ValueError, IndexError):
            continue
    return cores


def free_memory() -> int:
    """Bytes of memory that this process may still take: the machine's, cut by the container's limit (cgroup v2)."""
    found = re.search(r"^MemAvailable:\s*(\d+) kB$", _read(Path("/proc/meminfo")), re.MULTILINE)
    free = int(found[1]) * 1024 if found else 0
    limit, used = (_read(Path("/sys/fs/cgroup") / name).strip() for name in ("memory.max", "memory.current"))
    return min(free, int(limit) - int(used)) if limit.isdigit() and used.isdigit() else free


def cpu_model() -> str:
    """The processor as the kernel names it, with the instructions that decide speed."""
    text = _read(Path("/proc/cpuinfo"))
    if not text:
        return platform.processor() or platform.machine()
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^flags\s*:\s*(.+)$", text, re.MULTILINE)
    known = flags[1].split() if flags else []
    kinds = [kind for kind, flag in (("AMX", "amx_tile"), ("AVX-512", "avx512f"), ("AVX2", "avx2")) if flag in known]
    return f"{name[1] if name else platform.machine()} ({kinds[0] if kinds else 'no AVX2'})"


def gpu_model(driver: Path = Path("/proc/driver/nvidia")) -> str:
    """The first NVIDIA GPU and its driver's version, as the kernel names them."""
    cards = sorted(driver.glob("gpus/*/information"))
    name = re.search(r"^Model:\s*(.+?)\s*$", _read(cards[0]) if cards else "", re.MULTILINE)
    version = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)\s", _read(driver / "version"))
    return f"{name[1] if name else 'NVIDIA GPU'}, driver {version[1] if version else 'unknown'}"


def cache_folder() -> Path:
    """Where this user keeps what can be made again (XDG base directory specification)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "likewise"


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
