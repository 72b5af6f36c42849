"""What needs no learning: pixels, colours and a perceptual hash, as unit rows that rank by inner product.

They stand beside every figure: an encoder that does not beat them has learnt nothing that they lack.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from export.bundle import Embeddings
from export.preprocess import Pixels
from training.evaluate.retrieval import unit_rows
from training.knn import pixel_features

Embed = Callable[[Pixels], Embeddings]

HASH_SIDE = 16
HSV_BINS = (16, 4, 4)


def raw_pixels(pixels: Pixels) -> Embeddings:
    """uint8 [M, S, S, 3] → RGB at 32 px or less [M, D]."""
    return unit_rows(pixel_features(torch.from_numpy(pixels), grey=False).numpy())


def grey_pixels(pixels: Pixels) -> Embeddings:
    """uint8 [M, S, S, 3] → luminance at 32 px or less, each picture's mean removed [M, D]."""
    return unit_rows(pixel_features(torch.from_numpy(pixels), grey=True).numpy())


def color_histogram(pixels: Pixels) -> Embeddings:
    """uint8 [M, S, S, 3] → square roots of an HSV histogram's shares [M, 16·4·4]; the inner product is the Bhattacharyya
    coefficient of two histograms."""
    rows = []
    for picture in pixels:
        hsv = np.asarray(Image.fromarray(picture).convert("HSV")).reshape(-1, 3).astype(np.int64)
        h, s, v = (hsv[:, i] * bins // 256 for i, bins in enumerate(HSV_BINS))
        cell = (h * HSV_BINS[1] + s) * HSV_BINS[2] + v
        rows.append(np.sqrt(np.bincount(cell, minlength=int(np.prod(HSV_BINS))) / len(cell)))
    return unit_rows(np.stack(rows))


def difference_hash(pixels: Pixels) -> Embeddings:
    """uint8 [M, S, S, 3] → the 256 signs of horizontal differences at 17×16 px as ±1/16 [M, 256].

    The inner product is 1 − 2·h / 256 for Hamming distance h.
    """
    rows = []
    for picture in pixels:
        small = Image.fromarray(picture).convert("L").resize((HASH_SIDE + 1, HASH_SIDE), Image.Resampling.BILINEAR)
        grey = np.asarray(small, np.int64)
        rows.append(np.where(grey[:, 1:] > grey[:, :-1], 1.0, -1.0).ravel() / HASH_SIDE)
    return np.stack(rows).astype(np.float32)


BASELINES: dict[str, Embed] = {
    "raw pixels": raw_pixels,
    "grey, normalised pixels": grey_pixels,
    "HSV colour histogram": color_histogram,
    "perceptual hash": difference_hash,
}
"""Name, as it is printed → function."""
