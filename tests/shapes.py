"""Drawn shapes: a procedural, labelled picture set for tests and for the small training recipe.

Eight shapes with random colours, place, size, rotation and noise: what tells the classes apart is neither colour nor
position nor orientation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "crescent", "bars")


def draw_shape(kind: str, rng: np.random.Generator, size: int = 32) -> Image.Image:
    """One picture of `size` × `size` pixels."""
    big = size * 4  # drawn large, then shrunk: smooth edges
    background, ink = rng.integers(0, 256, (2, 3))
    while np.abs(background - ink).sum() < 120:
        background, ink = rng.integers(0, 256, (2, 3))
    image = Image.new("RGB", (big, big), tuple(int(v) for v in background))
    pen = ImageDraw.Draw(image)
    fill, hole = tuple(int(v) for v in ink), tuple(int(v) for v in background)
    r = big * rng.uniform(0.16, 0.4)
    cx, cy = rng.uniform(0.8 * r, big - 0.8 * r, 2)
    turn = rng.uniform(0, 2 * math.pi)

    def points(*polar: tuple[float, float]) -> list[tuple[float, float]]:
        return [(cx + r * d * math.cos(turn + a), cy + r * d * math.sin(turn + a)) for d, a in polar]

    if kind in ("circle", "ring", "crescent"):
        pen.ellipse((cx - r, cy - r, cx + r, cy + r), fill=fill)
        if kind == "ring":
            pen.ellipse((cx - 0.55 * r, cy - 0.55 * r, cx + 0.55 * r, cy + 0.55 * r), fill=hole)
        elif kind == "crescent":
            ((x, y),) = points((0.5, 0.0))
            pen.ellipse((x - 0.8 * r, y - 0.8 * r, x + 0.8 * r, y + 0.8 * r), fill=hole)
    elif kind in ("square", "triangle"):
        corners = 4 if kind == "square" else 3
        pen.polygon(points(*((1.0, 2 * math.pi * i / corners) for i in range(corners))), fill=fill)
    elif kind == "star":
        pen.polygon(points(*((1.0 if i % 2 == 0 else 0.4, math.pi * i / 5) for i in range(10))), fill=fill)
    else:
        angles = (0.0, math.pi / 2) if kind == "cross" else (0.0, 0.0)
        for index, angle in enumerate(angles):
            shift = 0.0 if kind == "cross" else (0.5 if index else -0.5)
            box = [(-1.0, shift - 0.22), (1.0, shift - 0.22), (1.0, shift + 0.22), (-1.0, shift + 0.22)]
            pen.polygon(points(*((math.hypot(x, y), math.atan2(y, x) + angle) for x, y in box)), fill=fill)
    small = np.asarray(image.resize((size, size), Image.Resampling.BOX)).astype(np.float32)
    slope = rng.normal(0, 40, 2)  # uneven light
    at = np.linspace(-1, 1, size)
    light = (slope[0] * at[:, None] + slope[1] * at[None, :])[..., None]
    noisy = small + light + rng.normal(0, 12, small.shape)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def write_shapes(folder: Path, count: int, seed: int = 0, size: int = 32) -> Path:
    """Write `count` pictures as `folder/SHAPE/NNNNN.png`; returns the folder."""
    return write_classes(folder, SHAPES, draw_shape, count, seed, size)


def write_classes(
    folder: Path, classes: Sequence[str], draw: Callable[[str, np.random.Generator, int], Image.Image], count: int,
    seed: int, size: int,
) -> Path:  # fmt: skip
    """Write `count` pictures, the classes in turn, as `folder/CLASS/NNNNN.png`; returns the folder."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        kind = classes[i % len(classes)]
        (folder / kind).mkdir(parents=True, exist_ok=True)
        draw(kind, rng, size).save(folder / kind / f"{i:05d}.png")
    return folder
