"""Batches by step: which pictures, in which order, and their pixels on the device before they are asked for."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from export.bundle import RefusalError
from training.cache import PictureCache
from training.device import send
from training.seeds import derive


class Batch(NamedTuple):
    """One rank's part of a step's pictures; b = global batch / ranks."""

    pixels: Tensor
    """uint8 [b, S, S, 3], on the device."""
    aspects: Tensor
    """Width / height of the original pictures, float32 [b], on the CPU (views are drawn there)."""
    groups: Tensor
    """Ids of near-duplicate groups, int64 [b], on the device."""
    indices: Tensor
    """Positions in the cache, int64 [b], on the CPU."""


class Batches:
    """The pictures of every step, the same for each (seed, global batch), whatever the number of ranks.

    An epoch is a permutation drawn from the seed; the pictures beyond its last whole batch wait for another epoch. A
    cache that is in memory (`PictureCache.load`) is indexed there; otherwise a thread gathers the next `prefetch` steps,
    into pinned memory where the device is a GPU. Any step may be asked for; the thread assumes that the next follows.

    Raises `RefusalError` when the batch exceeds the pictures or does not divide over the ranks.
    """

    def __init__(
        self,
        cache: PictureCache,
        global_batch: int,
        seed: int,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
        prefetch: int = 2,
    ) -> None:
        if global_batch > len(cache):
            raise RefusalError(
                f"a batch of {global_batch} exceeds the {len(cache):,} readable pictures: lower --batch-size"
            )
        if global_batch % world:
            raise RefusalError(
                f"a batch of {global_batch} does not divide over {world} processes: choose a multiple of {world}"
            )
        self._cache, self._seed, self._device = cache, seed, device
        self._global = global_batch
        self._part = global_batch // world
        self._low = rank * self._part
        self._prefetch = 0 if cache.resident else max(0, prefetch)
        self._groups = cache.groups.to(device)
        self._orders: dict[int, Tensor] = {}  # the permutations of the last two epochs: prefetching spans their border
        self._thread = ThreadPoolExecutor(1, "gather") if self._prefetch else None
        self._ahead: dict[int, Future[Tensor]] = {}
        self._waited = 0.0

    @property
    def waited(self) -> float:
        """Seconds that `local` waited for pixels since this was last read."""
        seconds, self._waited = self._waited, 0.0
        return seconds

    def indices(self, step: int) -> Tensor:
        """Positions in the cache of the whole batch of a step, int64 [global batch], on the CPU."""
        epoch, within = divmod(step, len(self._cache) // self._global)
        if epoch not in self._orders:
            while len(self._orders) > 1:
                del self._orders[next(iter(self._orders))]
            generator = torch.Generator().manual_seed(derive(self._seed, "epoch", epoch))
            self._orders[epoch] = torch.randperm(len(self._cache), generator=generator)
        return self._orders[epoch][within * self._global : (within + 1) * self._global]

    def local(self, step: int) -> Batch:
        """This rank's rows of a step: those from rank · b to (rank + 1) · b of the whole batch."""
        mine = self._mine(step)
        start = time.monotonic()
        if self._thread is None:
            pixels = self._cache.gather(mine, self._device)
        else:
            pixels = self._fetch(step, mine)
        self._waited += time.monotonic() - start
        if self._device.type == "cuda" and not pixels.is_cuda:
            pixels = pixels.to(self._device, non_blocking=True)
        return Batch(pixels, self._cache.aspects[mine], self._groups[send(mine, self._device)], mine)

    def close(self) -> None:
        """End the thread."""
        for future in self._ahead.values():
            future.cancel()
        self._ahead.clear()
        if self._thread is not None:
            self._thread.shutdown()

    def _mine(self, step: int) -> Tensor:
        return self.indices(step)[self._low : self._low + self._part]

    def _fetch(self, step: int, mine: Tensor) -> Tensor:
        assert self._thread is not None
        wanted = range(step, step + 1 + self._prefetch)
        for other in [s for s in self._ahead if s not in wanted]:  # a resume or a measurement jumped
            self._ahead.pop(other).cancel()
        for other in wanted:
            if other not in self._ahead:
                rows = mine if other == step else self._mine(other)
                self._ahead[other] = self._thread.submit(self._gather, rows)
        return self._ahead.pop(step).result()

    def _gather(self, rows: Tensor) -> Tensor:
        pixels = self._cache.gather(rows, torch.device("cpu"))
        return pixels.pin_memory() if self._device.type == "cuda" else pixels
