"""Near-duplicate pictures by perceptual hash: the same picture encoded or resized again, never a judgement of content.

KoLeo pushes each embedding away from its nearest; copies of one picture must not be pushed apart.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from export.preprocess import Pixels

Hashes = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float32]

_ROWS, _COLUMNS = 16, 16
_FLAT = 2.0  # grey levels: a smaller rise is noise, and the same bit in every copy
MAX_DISTANCE = 16
"""Bits of 256 in which copies may differ."""
_STRUCTURED = 64  # ones, or zeros; a hash with fewer comes from a picture with little structure, and must agree better
_PLAIN = 16  # ones, or zeros; fewer say nothing
_PLAIN_CHANGES = (
    12  # between neighbouring bits of 240, along rows or columns: fewer are stripes, slopes and empty areas
)
_BLOCK = 512


def difference_hash(pixels: Pixels) -> Hashes:
    """256-bit difference hashes [N, 4] of pictures uint8 [N, S, S, 3]: whether grey rises from each of 16×17 cells to its
    right neighbour (Krawetz 2013, with a dead zone: flat areas give zeros)."""
    side = pixels.shape[1]
    down, across = _area(side, _ROWS), _area(side, _COLUMNS + 1)
    out = np.empty((len(pixels), 4), np.uint64)
    for low in range(0, len(pixels), 256):
        part = pixels[low : low + 256]
        grey = part @ np.array([0.299, 0.587, 0.114], np.float32)
        cells = down @ grey @ across.T
        bits = (cells[:, :, 1:] - cells[:, :, :-1]) > _FLAT
        out[low : low + 256] = np.packbits(bits.reshape(len(part), -1), axis=1).view(np.uint64)
    return out


def perceptual_hash(pixels: Pixels) -> tuple[Hashes, npt.NDArray[np.bool_]]:
    """`difference_hash` [N, 4], and which pictures [N] are too plain for it: those have the SHA-256 of their pixels
    instead, so that they group with equal pixels only (stripes, drawings of low contrast and blank pages agree in their
    zeros without being copies)."""
    hashes = difference_hash(pixels)
    bits = np.unpackbits(hashes.view(np.uint8), axis=1).reshape(-1, _ROWS, _COLUMNS)
    ones = bits.sum((1, 2), dtype=np.int64)
    changes = np.minimum(np.diff(bits, axis=1).astype(bool).sum((1, 2)), np.diff(bits, axis=2).astype(bool).sum((1, 2)))
    plain: npt.NDArray[np.bool_] = (np.minimum(ones, _ROWS * _COLUMNS - ones) < _PLAIN) | (changes < _PLAIN_CHANGES)
    for i in np.flatnonzero(plain).tolist():
        hashes[i] = np.frombuffer(hashlib.sha256(pixels[i].tobytes()).digest(), np.uint64)
    return hashes, plain


def _area(source: int, cells: int) -> Floats:
    """Weights [cells, source] of the mean over equal stretches of `source` pixels."""
    edges = np.linspace(0, source, cells + 1)
    pixel = np.arange(source)
    overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    weights: Floats = (np.clip(overlap, 0, None) * (cells / source)).astype(np.float32)
    return weights


def near_duplicates(hashes: Hashes, max_distance: int = MAX_DISTANCE, threads: int = 1) -> npt.NDArray[np.int64]:
    """Group ids [N] from hashes uint64 [N, W]: pictures within `max_distance` bits share one, and so do chains of them.

    Where two hashes have fewer than 64 ones (or zeros) on average, `max_distance` shrinks in proportion: two flat
    pictures agree in most bits without being copies. Exact: all pairs are compared whose numbers of ones allow it, by
    their first word before the others; memory does not grow with the pairs. A group's id is the smallest position in it.
    """
    unique, inverse = np.unique(hashes, axis=0, return_inverse=True)
    ones = np.bitwise_count(unique).sum(1, dtype=np.int64)
    order = np.argsort(ones, kind="stable")
    sorted_hashes, sorted_ones = np.ascontiguousarray(unique[order].T), ones[order]
    sorted_structure = np.minimum(sorted_ones, 64 * hashes.shape[1] - sorted_ones)
    ends = np.searchsorted(sorted_ones, sorted_ones + max_distance, side="right")

    def pairs(low: int) -> npt.NDArray[np.int64]:
        high = min(low + _BLOCK, len(unique))
        end = int(ends[high - 1])
        found = []
        # A piece of the columns at a time stays in the processor's cache.
        for start in range(low, end, 8192):
            stop = min(start + 8192, end)
            close = np.bitwise_count(sorted_hashes[0, low:high, None] ^ sorted_hashes[0, None, start:stop])
            i, j = np.nonzero(close <= max_distance)
            i, j = i + low, j + start
            i, j = i[i < j], j[i < j]
            distance = np.bitwise_count(sorted_hashes[:, i] ^ sorted_hashes[:, j]).sum(0, dtype=np.int64)
            structure = (sorted_structure[i] + sorted_structure[j]) / (2 * _STRUCTURED)
            near = distance <= max_distance * np.minimum(1.0, structure)
            found.append(np.stack([i[near], j[near]], 1))
        return np.concatenate(found)

    parent = list(range(len(unique)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    with ThreadPoolExecutor(threads) as pool:
        for part in pool.map(pairs, range(0, len(unique), _BLOCK)):
            for i, j in part.tolist():
                a, b = root(i), root(j)
                if a != b:
                    parent[max(a, b)] = min(a, b)
    of_unique = np.empty(len(unique), np.int64)
    of_unique[order] = [root(i) for i in range(len(unique))]
    component = of_unique[inverse.reshape(-1)]
    _, first, back = np.unique(component, return_index=True, return_inverse=True)
    groups: npt.NDArray[np.int64] = first[back].astype(np.int64)
    return groups
