"""Real pictures that a bundle is proven on."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from export.bundle import RefusalError
from export.preprocess import Pixels, PreprocessSpec, UnreadablePictureError, find_pictures, preprocess

CANARIES = 4
PARITY_PICTURES = 1000
MIN_PARITY_PICTURES = 8


class Sample(NamedTuple):
    """Real pictures."""

    pixels: Pixels
    """Prepared, uint8 [N, S, S, 3]."""
    encoded: list[bytes]
    """The first few as they came."""
    labels: list[str] | None
    """Names of their folders, where there are several."""


def read_sample(
    folder: Path, spec: PreprocessSpec, least: int = MIN_PARITY_PICTURES, most: int = PARITY_PICTURES,
    purpose: str = "prove parity: pass --images FOLDER",
) -> Sample:  # fmt: skip
    """`least` to `most` readable pictures, spread over the folder. Raises `RefusalError`, which ends in `purpose` and what
    to do, where there are fewer."""
    found = find_pictures(folder)
    pixels: list[Pixels] = []
    encoded: list[bytes] = []
    folders: list[str] = []
    for i in np.random.default_rng(0).permutation(len(found)):
        if len(pixels) == most:
            break
        try:
            data = found[i].read()
            pixels.append(preprocess(data, spec).pixels)
        except UnreadablePictureError:
            continue
        folders.append(found[i].folder)
        if len(encoded) < CANARIES:
            encoded.append(data)
    if len(pixels) < least:
        raise RefusalError(f"{folder} holds {len(pixels)} readable pictures, at least {least} are needed to {purpose}")
    labelled = 1 < len(set(folders)) <= len(folders) // 2 and "" not in folders
    return Sample(np.stack(pixels), encoded, folders if labelled else None)
