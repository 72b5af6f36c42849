"""Drawn palettes: a procedural, labelled picture set that a short training run learns and pixels do not tell apart.

A class is a pair of opposite hues; how much of each a picture shows, where, in which pattern and in what light is
random. Pixels compare places and mean colours, and both say little here; that the same two hues occur says all.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image

from tests.shapes import write_classes

CLASSES = 8
_U = np.array([1.0, -1.0, 0.0]) / math.sqrt(2)
_V = np.array([1.0, 1.0, -2.0]) / math.sqrt(6)


def draw_palette(kind: int, rng: np.random.Generator, size: int = 48) -> Image.Image:
    """One picture of class `kind` in 0…7, `size` × `size` pixels."""
    y, x = np.mgrid[:size, :size].astype(np.float64)
    wavelength = rng.uniform(12.0, 30.0)
    angles, phases = rng.uniform(0, 2 * math.pi, (2, 12))
    field = sum(
        np.cos(2 * math.pi / wavelength * (x * math.cos(a) + y * math.sin(a)) + p)
        for a, p in zip(angles, phases, strict=True)
    )
    field = (field - np.quantile(field, rng.uniform(0.35, 0.65))) / field.std()
    turn = math.pi * (kind + rng.uniform(-0.2, 0.2)) / CLASSES
    hue = math.cos(turn) * _U + math.sin(turn) * _V
    tint = 80 * np.tanh(4 * field)[..., None] * hue
    light = rng.normal(0, 25) + rng.normal(0, 15) * (x / size - 0.5) + rng.normal(0, 15) * (y / size - 0.5)
    pixels = 128 + tint + light[..., None] + rng.normal(0, 10, (size, size, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def write_palettes(folder: Path, count: int, seed: int = 0, size: int = 48) -> Path:
    """Write `count` pictures as `folder/CLASS/NNNNN.png`; returns the folder."""
    names = [f"hues-{kind}" for kind in range(CLASSES)]
    return write_classes(
        folder, names, lambda name, rng, side: draw_palette(names.index(name), rng, side), count, seed, size
    )
