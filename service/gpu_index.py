"""Indexes on a GPU: a copy of what a segment has mapped, searched there where it is allowed, fits and is quicker.

A GPU's indexes ignore selectors without an error (faiss #3114, #3924) and find at most 2,048 rows in at most 2,048 lists. So
more rows are fetched than are asked for, and those that may not be found are dropped; where that is not enough, the CPU's
index, which stays mapped, answers. faiss comes from `service.index`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from export.bundle import Embeddings

Rows = npt.NDArray[np.int64]
Bitmap = npt.NDArray[np.uint8]
Search = Callable[[Embeddings, int], tuple[Embeddings, Rows]]
"""Queries [Q, D], k → scores and rows [Q, k], best first; −1 where there are fewer."""

MOST = 2048
"""Rows and lists of one search on a GPU (FAISS's GPU_MAX_SELECTION_K)."""
_TEMPORARY = 256 * 2**20  # of FAISS's working memory; more is allocated where a search needs it
_PADDED = 1.25  # of an index's bytes: lists are padded, and rows have norms
# More than this many rows are not compared one by one on a GPU, either, as the CPU may have to take over.
EXACT_ON_GPU = 200_000
_allowed = True


def keep_to_cpu() -> None:
    """From here on, no index of this process is copied to a GPU."""
    global _allowed
    _allowed = False


def suits_gpu(factory: str) -> bool:
    """Whether FAISS has a GPU index of this kind: no graphs, no four-bit codes, no rotations."""
    return re.fullmatch(r"Flat|SQfp16|IVF\d+,(Flat|SQfp16|SQ8|PQ\d+(x8)?)", factory) is not None


def gpu_bytes(size: int) -> float:
    """GPU memory that an index of so many bytes takes, working memory included."""
    return _PADDED * size + _TEMPORARY


class Gpu:
    """The first GPU that FAISS sees. FAISS's resources belong to one thread at a time: `lock` is held for each call that
    uses or frees an index on it."""

    def __init__(self, faiss: Any) -> None:
        self.lock = threading.RLock()
        self._faiss = faiss
        self._resources = faiss.StandardGpuResources()
        self._resources.setTempMemory(_TEMPORARY)
        self._resources.setPinnedMemory(0)  # for batches of queries of 256 MiB and more

    def free(self) -> float:
        """Bytes of its memory that are free, by the CUDA runtime that FAISS has loaded; ∞ where it does not say."""
        for name in ("libcudart.so.12", "libcudart.so.13"):
            with contextlib.suppress(OSError):  # FAISS was built for the other
                runtime = ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
                free, total = ctypes.c_size_t(), ctypes.c_size_t()
                if runtime.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)) == 0:
                    return float(free.value)
        return float("inf")

    def copy_of(self, index: Any) -> Any:
        """An index on the GPU. Raises `RuntimeError` where FAISS cannot, or has not the memory."""
        options = self._faiss.GpuClonerOptions()
        # cuVS is opt-in, and has no scalar quantiser that the cloner knows.
        options.use_cuvs = "CUVS" in self._faiss.get_compile_options() and isinstance(
            index, (self._faiss.IndexFlat, self._faiss.IndexIVFFlat)
        )
        with self.lock:
            return self._faiss.index_cpu_to_gpu(self._resources, 0, index, options)


@functools.lru_cache(1)
def _first(faiss: Any) -> Gpu | None:
    # faiss-cpu counts none, or does not count.
    return Gpu(faiss) if getattr(faiss, "get_num_gpus", int)() > 0 else None


def gpu_of(faiss: Any) -> Gpu | None:
    """The GPU that indexes may be copied to."""
    return _first(faiss) if _allowed else None


class GpuIndex:
    """An index of the CPU and, from the first search on, its copy on a GPU. Thread-safe."""

    def __init__(self, cpu: Any, size: int, gpu: Gpu, parameters: Callable[[int], Any]) -> None:
        """`size`: bytes of the index; `parameters`: gives search parameters for so many visits."""
        self.cpu = cpu
        self.ntotal: int = cpu.ntotal
        self.d: int = cpu.d
        self.why_not = ""
        """Why the CPU answers; empty where the GPU does, or nothing was searched yet."""
        self._size, self._gpu, self._parameters = size, gpu, parameters
        self._copy: Any = None

    def search(
        self, queries: Embeddings, k: int, visits: int, live: Bitmap | None, on_cpu: Search
    ) -> tuple[Embeddings, Rows]:
        """Scores and rows [Q, k] of the best rows whose bit in `live` is set, in the `visits` nearest lists (0: of all);
        −1 where there are fewer. `on_cpu`: the same on the CPU, for what the GPU cannot."""
        found = None
        if 0 < k <= MOST and visits <= MOST and not self.why_not:
            with self._gpu.lock:
                found = self._on_gpu(queries, k, visits, live)
        if found is None:
            return on_cpu(queries, k)
        scores, rows, short = found
        if short.any():
            scores[short], rows[short] = on_cpu(queries[short], k)
        return scores, rows

    def _on_gpu(
        self, queries: Embeddings, k: int, visits: int, live: Bitmap | None
    ) -> tuple[Embeddings, Rows, npt.NDArray[np.bool_]] | None:
        ask = functools.partial(self._ask, visits)
        try:
            if not self._copied():
                return None
            if live is not None:
                return post_filtered(ask, queries, k, live, self.ntotal)
            return *ask(queries, k), np.zeros(len(queries), bool)
        except RuntimeError as e:  # such as memory that another process took: from here on the CPU's index answers
            self._copy = None
            self._say(str(e).rsplit(":", 1)[-1].strip())
            return None

    def _ask(self, visits: int, queries: Embeddings, k: int) -> tuple[Embeddings, Rows]:
        parameters = self._parameters(visits) if visits else None
        scores, rows = self._copy.search(np.ascontiguousarray(queries, np.float32), k, params=parameters)
        scores[rows < 0] = -np.inf
        return scores, rows

    def _copied(self) -> bool:
        if self._copy is None and not self.why_not:
            needed, free = gpu_bytes(self._size), self._gpu.free()
            if needed > free:
                self._say(f"{needed / 2**20:,.0f} MiB of GPU memory are needed, {free / 2**20:,.0f} are free")
            else:
                self._copy = self._gpu.copy_of(self.cpu)
        return self._copy is not None

    def _say(self, reason: str) -> None:
        self.why_not = reason
        print(f"likewise: an index of {self.ntotal:,} rows is searched on the CPU: {reason}", file=sys.stderr)

    def __del__(self) -> None:
        gpu = getattr(self, "_gpu", None)
        if gpu is not None:
            with gpu.lock:
                self._copy = None


def post_filtered(
    search: Search, queries: Embeddings, k: int, live: Bitmap, total: int, most: int = MOST
) -> tuple[Embeddings, Rows, npt.NDArray[np.bool_]]:
    """The best rows [Q, k] whose bit in `live` is set, by a search among `total` rows that knows no selector and finds at
    most `most`; −1 where there are fewer. And for which queries [Q] it might have found more, but for `most`."""
    count = int(np.bitwise_count(live).sum())
    scores = np.full((len(queries), k), -np.inf, np.float32)
    rows = np.full((len(queries), k), -1, np.int64)
    most = min(most, total)
    open_ = np.arange(len(queries)) if count else np.zeros(0, np.int64)
    # A quarter more than hold k that live where these lie evenly.
    fetch = min(most, -(-5 * k * total // (4 * max(count, 1))) + 8)
    while len(open_):
        found_scores, found = search(queries[open_], fetch)
        passing = (live[np.maximum(found, 0) >> 3] >> (found & 7)) & 1 == 1
        passing &= found >= 0
        order = np.argsort(~passing, axis=1, kind="stable")[:, :k]  # those that pass first, best first
        kept = np.take_along_axis(passing, order, 1)
        width = order.shape[1]
        scores[open_, :width] = np.where(kept, np.take_along_axis(found_scores, order, 1), -np.inf)
        rows[open_, :width] = np.where(kept, np.take_along_axis(found, order, 1), -1)
        # Fewer than were fetched: there are no more. Otherwise the rest lies further down.
        open_ = open_[(passing.sum(axis=1) < min(k, count)) & (found[:, -1] >= 0)]
        if fetch == most:
            break
        fetch = min(most, 4 * fetch)
    short = np.zeros(len(queries), bool)
    if most < total:  # else every row was seen
        short[open_] = True
    return scores, rows, short
