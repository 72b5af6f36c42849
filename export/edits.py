"""Edits of a picture that training never makes: does an edited picture find its original?

`likewise evaluate` asks an encoder (training/evaluate/label_free.py), `likewise index evaluate` a collection
(service/self_retrieval.py).

training/views.py crops, flips, rotates, jitters colours, greys, blurs and solarises. Nothing of that is here: an encoder
must not be measured on the invariances that it was given.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from export.preprocess import DecodeLimits, Pixels, PreprocessSpec, preprocess

Edit = Callable[[Image.Image, np.random.Generator], Image.Image]


def jpeg(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Half the size, then JPEG at quality 15 to 30."""
    small = image.resize((max(8, image.width // 2), max(8, image.height // 2)), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=int(rng.integers(15, 31)))
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


def perspective(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Each corner moved inwards by up to a quarter of the side; grey outside."""
    w, h = image.size
    inward = rng.uniform(0.0, 0.25, (4, 2)) * (w, h)
    corners = np.array([[0, 0], [w, 0], [w, h], [0, h]], np.float64)
    target = corners + inward * np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]])
    return image.transform((w, h), Image.Transform.PERSPECTIVE, _homography(target, corners), _FILTER, fillcolor=_GREY)


def shear(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Sheared by 15 to 25 degrees along either axis; grey outside."""
    w, h = image.size
    t = math.tan(math.radians(rng.uniform(15, 25))) * rng.choice((-1.0, 1.0))
    across = (1.0, t, -t * h / 2, 0.0, 1.0, 0.0)
    along = (1.0, 0.0, 0.0, t, 1.0, -t * w / 2)
    matrix = across if rng.random() < 0.5 else along
    return image.transform((w, h), Image.Transform.AFFINE, matrix, _FILTER, fillcolor=_GREY)


def overlay(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A caption on a bar and a disc as a logo, together about a third of the picture."""
    image = image.copy()
    w, h = image.size
    pen = ImageDraw.Draw(image)
    bar, ink, disc = (tuple(int(v) for v in rng.integers(0, 256, 3)) for _ in range(3))
    top = int(rng.uniform(0, 0.75) * h)
    pen.rectangle((0, top, w, top + 0.22 * h), fill=bar)
    text = "".join(chr(int(c)) for c in rng.integers(65, 91, 12))
    # Drawn at the font's own size, then scaled: the same on every Pillow with or without FreeType.
    label = Image.new("L", (6 * len(text) + 8, 12), 0)
    ImageDraw.Draw(label).text((4, 0), text, fill=255)
    label = label.resize((max(1, int(0.9 * w)), max(1, int(0.16 * h))), Image.Resampling.BILINEAR)
    image.paste(ink, (int(0.05 * w), int(top + 0.03 * h)), label)
    r = 0.16 * min(w, h)
    x, y = rng.uniform(r, w - r), rng.uniform(r, h - r)
    pen.ellipse((x - r, y - r, x + r, y + r), fill=disc)
    return image


def paste(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Shrunk to 45–60 % and pasted somewhere on a patchy background of random colours."""
    w, h = image.size
    patches = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    canvas = Image.fromarray(patches).resize((w, h), Image.Resampling.BICUBIC)
    scale = rng.uniform(0.45, 0.6)
    small = image.resize((max(1, round(w * scale)), max(1, round(h * scale))), Image.Resampling.BICUBIC)
    canvas.paste(small, (int(rng.uniform(0, w - small.width)), int(rng.uniform(0, h - small.height))))
    return canvas


def gamma(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A gamma of 0.35 to 0.5, or one over that."""
    power = rng.uniform(0.35, 0.5) ** rng.choice((-1.0, 1.0))
    table = np.rint(255 * (np.arange(256) / 255) ** power).astype(np.uint8)
    return image.point([*table.tolist()] * 3)


def posterize(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Two bits per channel, thresholds shifted at random."""
    values = np.asarray(image).astype(np.int64) + rng.integers(-24, 25, 3)
    return Image.fromarray((np.clip(values, 0, 255) // 64 * 85).astype(np.uint8))


def salt(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """15 to 30 % of the cells of a grid of 64 along the longer side become black or white."""
    values = np.asarray(image).copy()
    cell = max(1, max(image.size) // 64)
    rows, columns = -(-image.height // cell), -(-image.width // cell)
    drawn = rng.random((rows, columns))
    share = rng.uniform(0.15, 0.3)
    for hit, value in ((drawn < share / 2, 0), (drawn > 1 - share / 2, 255)):
        values[np.kron(hit, np.ones((cell, cell), bool))[: image.height, : image.width]] = value
    return Image.fromarray(values)


def mosaic(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Square cells, 10 to 16 along the longer side."""
    scale = rng.integers(10, 17) / max(image.size)
    small = image.resize(
        (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.BOX
    )
    return small.resize(image.size, Image.Resampling.NEAREST)


EDITS: dict[str, Edit] = {
    "jpeg": jpeg,
    "perspective": perspective,
    "shear": shear,
    "overlay": overlay,
    "paste": paste,
    "gamma": gamma,
    "posterize": posterize,
    "salt": salt,
    "mosaic": mosaic,
}
"""Name → edit. Each takes an RGB picture and a generator, and leaves the picture as it is."""

_GREY = (128, 128, 128)
_FILTER = Image.Resampling.BICUBIC
# An edit may leave less than the 4 px per side that a user's picture needs: a panorama is thin once it is shrunk.
_THIN = DecodeLimits(min_side=1)


def editing_side(*sizes: int) -> int:
    """Longer side, in pixels, at which pictures are edited for encoders of these input sizes: twice the largest one,
    within 64 … 512, and never below it, so that an encoder's resampling does not undo the edit."""
    return int(np.clip(2 * max(sizes), 64, max(512, *sizes)))


def prepared(edited: Image.Image, spec: PreprocessSpec) -> Pixels:
    """An edited picture as an encoder sees it: as `preprocess` prepares a file written without loss."""
    buffer = io.BytesIO()
    edited.save(buffer, "BMP")
    return preprocess(buffer.getvalue(), spec, _THIN).pixels


def _homography(source: np.ndarray, target: np.ndarray) -> list[float]:
    """Pillow's eight numbers that take output points `source` [4, 2] to input points `target` [4, 2]."""
    rows, values = [], []
    for (x, y), (u, v) in zip(source, target, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    return [float(c) for c in np.linalg.solve(np.asarray(rows), np.asarray(values))]
