"""What depends on the device: copies that do not wait for it, and how much memory it has left."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from export.machine import free_memory


def send(x: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on `device`. To a GPU through pinned memory, so that the host does not wait for what the GPU does."""
    if device.type != "cuda" or x.is_cuda:
        return x.to(device)
    return x.contiguous().pin_memory().to(device, non_blocking=True)


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
