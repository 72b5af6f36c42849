"""Drawn textures: a procedural, labelled picture set that a short training run learns and pixels do not tell apart.

Eight classes: four patterns (stripes, checks, dots, grain), each fine and coarse. Direction, phase and the two colours
are random per picture, so that colour is a cue that all crops of a picture share and that says nothing about the class.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image

from tests.shapes import write_classes

PATTERNS = ("stripes", "checks", "dots", "grain")
CLASSES = tuple(f"{size}-{pattern}" for pattern in PATTERNS for size in ("fine", "coarse"))


def draw_texture(kind: str, rng: np.random.Generator, size: int = 48) -> Image.Image:
    """One picture of `size` × `size` pixels."""
    scale, pattern = kind.split("-")
    wavelength = rng.uniform(4.0, 5.0) if scale == "fine" else rng.uniform(11.0, 14.0)
    y, x = np.mgrid[:size, :size].astype(np.float64)
    turn, phases = rng.uniform(0, math.pi), rng.uniform(0, 2 * math.pi, 3)
    directions = {"stripes": (0.0,), "checks": (0.0, math.pi / 2), "dots": (0.0, math.pi / 3, 2 * math.pi / 3)}
    if pattern == "grain":  # waves of one length in all directions
        angles, phases = rng.uniform(0, 2 * math.pi, 24), rng.uniform(0, 2 * math.pi, 24)
    else:
        angles = np.array(directions[pattern])
    waves = [
        np.cos(2 * math.pi / wavelength * (x * math.cos(turn + a) + y * math.sin(turn + a)) + p)
        for a, p in zip(angles, phases, strict=False)
    ]
    field = np.prod(waves, 0) if pattern == "checks" else np.sum(waves, 0)
    field = 0.5 + 0.5 * np.tanh(1.5 * (field - field.mean()) / field.std())
    background, ink = rng.uniform(0, 255, (2, 3))
    while np.abs(background - ink).sum() < 150:
        background, ink = rng.uniform(0, 255, (2, 3))
    pixels = background + field[..., None] * (ink - background) + rng.normal(0, 6, (size, size, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def write_textures(folder: Path, count: int, seed: int = 0, size: int = 48) -> Path:
    """Write `count` pictures as `folder/CLASS/NNNNN.png`; returns the folder."""
    return write_classes(folder, CLASSES, draw_texture, count, seed, size)
