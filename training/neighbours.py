"""Exact nearest neighbours by inner product among many rows, without their similarity matrix.

Two ideas, both exact. (1) Each tile of TILE rows keeps only its largest similarity to a query. The `count` tiles of
largest maximum hold the `count` nearest rows, because a row outside them has at least those maxima above it. Only their
rows are compared once more and ranked. (2) The maxima may come from cheap, rounded similarities: then some more tiles
are taken, and a query whose answer the rounding could have changed is searched again in full precision.
"""

from __future__ import annotations

import platform
from typing import Literal, Protocol

import torch
from torch import Tensor

TILE = 8
Precision = Literal["full", "int8", "bfloat16"]


@torch.no_grad()
def nearest_rows(
    queries: Tensor,
    bank: Tensor,
    pool: Tensor,
    count: int,
    block: int | None = None,
    precision: Precision | None = None,
) -> tuple[Tensor, Tensor]:
    """The `count` rows of bank[pool] most similar to each query: similarities and bank indices, [Q, count], descending.

    queries [Q, d] and bank [N, d] have unit rows, pool [M] are different indices of bank rows, count ≤ M.
    The similarities are of the queries' own precision and the rows are those of brute force, up to ties within its
    rounding. Memory: about Q·M/TILE similarities. `block` pool rows are compared at a time. `precision` is that of the
    first comparison: by default int8 for large searches on x86 processors, bfloat16 on GPUs (see `_margin`).
    """
    precision = precision or _fastest(queries, len(pool))
    tiles = len(pool) // TILE
    taken = count if precision == "full" else 2 * count + 4
    if tiles <= taken:
        top, index = (queries @ bank[pool].T).topk(count, dim=1)
        return top, pool[index]
    tiled, tail = pool[: tiles * TILE], pool[tiles * TILE :]
    block = max(block or (8192 if queries.is_cuda else 512), TILE) // TILE * TILE
    at_once = 65536 if queries.is_cuda else 2048
    similarity: _Similarity = _SIMILARITIES[precision](bank, tiled)
    maxima = queries.new_empty(tiles, len(queries))
    margins = []
    for start in range(0, len(queries), at_once):
        margins.append(similarity.ask(queries[start : start + at_once]))
        for low in range(0, len(tiled), block):
            found = similarity.of(slice(low, min(low + block, len(tiled))))  # [block, queries]
            into = maxima[low // TILE : low // TILE + len(found) // TILE, start : start + at_once]
            torch.amax(found.view(-1, TILE, found.shape[1]), 1, out=into)
    margin = torch.cat(margins)
    tops, indices, unsure = [], [], []
    within = torch.arange(TILE, device=pool.device)
    for start in range(0, len(queries), at_once // 32):
        rows = slice(start, start + at_once // 32)
        best = maxima[:, rows].T.contiguous().topk(taken + 1, dim=1)
        candidates = tiled[(best.indices[:, :taken, None] * TILE + within).flatten(1)]
        candidates = torch.cat([candidates, tail.expand(len(candidates), -1)], 1)
        exact = (bank[candidates] @ queries[rows, :, None]).squeeze(2)
        top, keep = exact.topk(count, dim=1)
        tops.append(top)
        indices.append(candidates.gather(1, keep))
        unsure.append(best.values[:, taken] + margin[rows] > top[:, -1])  # a tile left out may hold a nearer row
    similarities, index = torch.cat(tops), torch.cat(indices)
    if precision != "full":
        again = torch.cat(unsure).nonzero().squeeze(1)
        if len(again):
            similarities[again], index[again] = nearest_rows(queries[again], bank, pool, count, block, "full")
    return similarities, index


def _fastest(queries: Tensor, pool: int) -> Precision:
    """The precision for which processors have the fastest units; small searches are not worth a second step."""
    if queries.dtype != torch.float32 or queries.numel() * pool < 1 << 32:
        return "full"
    if queries.is_cuda:
        return "bfloat16"
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return (
        "int8"
        if x86 and torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_pointwise")
        else "full"
    )


def _margin(query_error: Tensor, row_error: Tensor, dim: int) -> Tensor:
    """How far a rounded similarity of unit rows may be off, given the norms of the rounding errors of both.

    At most their sum (Cauchy–Schwarz). Rounding errors have no direction in common with the other row, so that the
    product of both has a standard deviation of norm / √d: six of them are the bound where that is less.
    """
    certain = query_error + row_error * (1.0 + query_error)
    return torch.minimum(certain, 6.0 * (query_error.square() + row_error.square()).sqrt() / dim**0.5) + 1e-6


class _Similarity(Protocol):
    def __init__(self, bank: Tensor, pool: Tensor) -> None: ...

    def ask(self, queries: Tensor) -> Tensor:
        """Take queries [q, d]; returns how far their similarities may be off, [q]."""

    def of(self, rows: slice) -> Tensor:
        """Similarities [rows, q] of a slice of the pool."""


class _Full:
    def __init__(self, bank: Tensor, pool: Tensor) -> None:
        self.bank, self.pool = bank, pool
        self.buffer = bank.new_empty(0)

    def ask(self, queries: Tensor) -> Tensor:
        self.queries = queries
        return queries.new_zeros(len(queries))

    def of(self, rows: slice) -> Tensor:
        picked = self.bank[self.pool[rows]]
        wanted = len(picked) * len(self.queries)
        if self.buffer.numel() < wanted:
            self.buffer = picked.new_empty(wanted)
        out = self.buffer[:wanted].view(len(picked), len(self.queries))
        return torch.mm(picked, self.queries.T, out=out)


class _BFloat16:
    def __init__(self, bank: Tensor, pool: Tensor) -> None:
        self.rows = bank[pool].bfloat16()
        self.error = torch.linalg.vector_norm(bank[pool] - self.rows, dim=1).amax()

    def ask(self, queries: Tensor) -> Tensor:
        self.queries = queries.bfloat16()
        error = torch.linalg.vector_norm(queries - self.queries, dim=1)
        return _margin(error, self.error, queries.shape[1]) + 2.0**-8  # the result is rounded too

    def of(self, rows: slice) -> Tensor:
        return (self.rows[rows] @ self.queries.T).float()


class _Int8:
    """Rows in 7 bits (pairs of products then fit the 16 bits of AVX2), queries in 8, each with a scale of its own."""

    def __init__(self, bank: Tensor, pool: Tensor) -> None:
        self.rows = torch.empty(len(pool), bank.shape[1], dtype=torch.uint8)
        self.scale = bank.new_empty(len(pool), 1)
        self.error = bank.new_zeros(())
        for low in range(0, len(pool), 4096):
            part = slice(low, low + 4096)
            picked = bank[pool[part]]
            self.scale[part] = picked.abs().amax(1, keepdim=True).clamp_min(1e-12) / 63
            whole = (picked / self.scale[part]).round_()
            self.rows[part] = (whole + 64).to(torch.uint8)
            error = torch.linalg.vector_norm(picked.sub_(whole.mul_(self.scale[part])), dim=1).amax()
            self.error = torch.maximum(self.error, error)

    def ask(self, queries: Tensor) -> Tensor:
        scale = queries.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
        whole = (queries / scale).round_()
        self.queries = torch.ops.onednn.qlinear_prepack(whole.to(torch.int8), None)
        self.query_scale = scale.flatten()
        self.zero = torch.zeros(len(queries), dtype=torch.int32)
        error = torch.linalg.vector_norm(queries - whole * scale, dim=1)
        return _margin(error, self.error, queries.shape[1])

    def of(self, rows: slice) -> Tensor:
        found: Tensor = torch.ops.onednn.qlinear_pointwise(
            self.rows[rows], 1.0, 64, self.queries, self.query_scale, self.zero, None, 1.0, 0, torch.float32,
            "none", [], "",
        )  # fmt: skip
        return found.mul_(self.scale[rows])


_SIMILARITIES: dict[Precision, type[_Similarity]] = {"full": _Full, "bfloat16": _BFloat16, "int8": _Int8}
