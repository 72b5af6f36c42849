"""What depends on the device: copies that do not wait for it, and how much memory it has left."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor


def send(x: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on `device`. To a GPU through pinned memory, so that the host does not wait for what the GPU does."""
    if device.type != "cuda" or x.is_cuda:
        return x.to(device)
    return x.contiguous().pin_memory().to(device, non_blocking=True)


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and limit.read_text().strip().isdigit():  # the container's own limit
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
