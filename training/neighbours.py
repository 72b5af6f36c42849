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
    rounding. Memory: about one more copy of the pool's rows. `block` pool rows are compared at a time. `precision` is
    that of the first comparison (see `_margin` for when a rounded one is trusted); left out, int8 serves large searches
    on x86 processors, and small searches are brute force.
    """
    tiles = len(pool) // TILE
    brute = precision is None and len(queries) * len(pool) <= 1 << 22
    precision = precision or _fastest(queries, len(pool))
    taken = count if precision == "full" else 3 * count
    if brute or tiles <= taken:
        top, index = (queries @ bank[pool].T).topk(count, dim=1)
        return top, pool[index]
    tiled, tail = pool[: tiles * TILE], pool[tiles * TILE :]
    block = max(block or (8192 if queries.is_cuda else 1024), TILE) // TILE * TILE
    at_once = 65536 if queries.is_cuda else 1024
    similarity: _Similarity = _SIMILARITIES[precision](bank[tiled])
    maxima = queries.new_empty(tiles * min(at_once, len(queries)))
    within = torch.arange(TILE, device=pool.device)
    gathered = bank.new_empty(0)
    tops, indices, unsure = [], [], []
    for group in queries.split(at_once):
        margin = similarity.ask(group)
        tile_maxima = maxima[: tiles * len(group)].view(tiles, len(group))
        for low in range(0, len(tiled), block):
            found = similarity.of(slice(low, min(low + block, len(tiled))))  # [block, group]
            into = tile_maxima[low // TILE : low // TILE + len(found) // TILE]
            torch.amax(found.view(-1, TILE, len(group)), 1, out=into)
        best = tile_maxima.T.contiguous().topk(taken + 1, dim=1)
        for part, values, tile, slack in zip(*(x.split(at_once // 32) for x in (group, *best, margin))):
            candidates = tiled[(tile[:, :taken, None] * TILE + within).flatten(1)]
            candidates = torch.cat([candidates, tail.expand(len(part), -1)], 1)
            wanted = candidates.numel() * bank.shape[1]
            if gathered.numel() < wanted:
                gathered = bank.new_empty(wanted)
            rows = torch.index_select(bank, 0, candidates.flatten(), out=gathered[:wanted].view(-1, bank.shape[1]))
            exact = (part[:, None] @ rows.view(*candidates.shape, -1).transpose(1, 2)).squeeze(1)
            top, keep = exact.topk(count, dim=1)
            tops.append(top)
            indices.append(candidates.gather(1, keep))
            unsure.append(values[:, taken] + slack > top[:, -1])  # a tile left out may hold a nearer row
    similarities, index = torch.cat(tops), torch.cat(indices)
    if precision != "full":
        again = torch.cat(unsure).nonzero().squeeze(1)
        if len(again):
            similarities[again], index[again] = nearest_rows(queries[again], bank, pool, count, block, "full")
    return similarities, index


def _fastest(queries: Tensor, pool: int) -> Precision:
    """int8 where it pays: large float32 searches on x86, whose float32 product takes most of the time.

    GPUs compare in full precision: it takes them milliseconds, and searching the unsure again would wait for the device.
    """
    large = queries.dtype == torch.float32 and queries.numel() * pool >= 1 << 32
    x86 = queries.device.type == "cpu" and platform.machine().lower() in ("x86_64", "amd64")
    return "int8" if large and x86 and hasattr(torch.ops.onednn, "qlinear_pointwise") else "full"


def _margin(query_error: Tensor, row_error: Tensor, dim: int) -> Tensor:
    """How far a rounded similarity of unit rows may be off, given the norms of the rounding errors of both.

    At most their sum (Cauchy–Schwarz). Rounding errors have no direction in common with the other row, so that the
    product of both has a standard deviation of norm / √d: six of them are the bound where that is less.
    """
    certain = query_error + row_error * (1.0 + query_error)
    return torch.minimum(certain, 6.0 * (query_error.square() + row_error.square()).sqrt() / dim**0.5) + 1e-6


class _Similarity(Protocol):
    def __init__(self, rows: Tensor) -> None: ...

    def ask(self, queries: Tensor) -> Tensor:
        """Take queries [q, d]; returns how far their similarities may be off, [q]."""

    def of(self, part: slice) -> Tensor:
        """Similarities [part, q] of a slice of the rows; valid until the next call."""


class _Full:
    def __init__(self, rows: Tensor) -> None:
        self.rows, self.buffer = rows, rows.new_empty(0)

    def ask(self, queries: Tensor) -> Tensor:
        self.queries = queries
        return queries.new_zeros(len(queries))

    def of(self, part: slice) -> Tensor:
        rows = self.rows[part]
        wanted = len(rows) * len(self.queries)
        if self.buffer.numel() < wanted:
            self.buffer = rows.new_empty(wanted)
        return torch.mm(rows, self.queries.T, out=self.buffer[:wanted].view(len(rows), len(self.queries)))


class _BFloat16:
    def __init__(self, rows: Tensor) -> None:
        self.rows = rows.bfloat16()
        self.error = torch.linalg.vector_norm(rows - self.rows, dim=1).amax()

    def ask(self, queries: Tensor) -> Tensor:
        self.queries = queries.bfloat16()
        error = torch.linalg.vector_norm(queries - self.queries, dim=1)
        return _margin(error, self.error, queries.shape[1]) + 2.0**-8  # the result is rounded too

    def of(self, part: slice) -> Tensor:
        return (self.rows[part] @ self.queries.T).float()


class _Int8:
    """Rows in 7 bits (pairs of products then fit the 16 bits of AVX2), queries in 8, each with a scale of its own."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = torch.empty(rows.shape, dtype=torch.uint8)
        self.scale = rows.abs().amax(1, keepdim=True).clamp_min(1e-12) / 63
        errors = []
        for part, scale, into in zip(*(x.split(1024) for x in (rows, self.scale, self.rows))):
            whole = (part / scale).round_()
            errors.append(torch.linalg.vector_norm(torch.addcmul(part, whole, scale, value=-1), dim=1).amax())
            into.copy_(whole.add_(64))
        self.error = torch.stack(errors).amax()

    def ask(self, queries: Tensor) -> Tensor:
        scale = queries.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
        whole = (queries / scale).round_()
        self.queries = torch.ops.onednn.qlinear_prepack(whole.to(torch.int8), None)
        self.query_scale = scale.flatten()
        self.zero = torch.zeros(len(queries), dtype=torch.int32)
        error = torch.linalg.vector_norm(queries - whole * scale, dim=1)
        return _margin(error, self.error, queries.shape[1])

    def of(self, part: slice) -> Tensor:
        found: Tensor = torch.ops.onednn.qlinear_pointwise(
            self.rows[part], 1.0, 64, self.queries, self.query_scale, self.zero, None, 1.0, 0, torch.float32,
            "none", [], "",
        )  # fmt: skip
        return found.mul_(self.scale[part])


_SIMILARITIES: dict[Precision, type[_Similarity]] = {"full": _Full, "bfloat16": _BFloat16, "int8": _Int8}
