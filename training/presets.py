"""Named recipes of random views, every number visible, and an automatic choice among them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor

ViewPreset = Literal["photographs", "products", "orientation-free", "documents", "greyscale"]


class PerKind(NamedTuple):
    """One probability for each kind of view."""

    first: float
    """First global view."""
    second: float
    """Second global view."""
    local: float
    """Local views."""


_NONE = PerKind(0.0, 0.0, 0.0)
_BLUR = PerKind(1.0, 0.1, 0.5)
_SOLARIZE = PerKind(0.0, 0.2, 0.0)


@dataclass(frozen=True)
class ViewRecipe:
    """How views differ from their picture. The defaults are DINO's (spec/sop.md 1.8)."""

    flip: float = 0.5
    """Probability of mirroring left to right."""
    rotation: float = 0.0
    """Rotation in the original picture, ± this many degrees; 180 is free."""
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Width / height of a crop, in original pixels, drawn log-uniformly."""
    smallest_crop: float = 0.0
    """No crop is a smaller share of the picture than this, whatever scale is asked for."""
    jitter: float = 0.8
    """Probability of each of: brightness, contrast and gamma together; saturation and hue together."""
    brightness: float = 0.4
    """± this share."""
    contrast: float = 0.4
    """± this share."""
    gamma: float = 1.0
    """Exponent in 1/gamma … gamma, drawn log-uniformly."""
    saturation: float = 0.2
    """± this share."""
    hue: float = 0.1
    """± this share of the colour circle."""
    grey: float = 0.2
    """Probability of losing all colour."""
    mix: float = 0.0
    """Probability of a random mixture of the colour channels."""
    blur: PerKind = _BLUR
    """Probability of a Gaussian blur."""
    blur_radius: tuple[float, float] = (0.1, 2.0)
    """Its standard deviation, drawn uniformly, in pixels of a 224-pixel view; smaller views scale it."""
    solarize: PerKind = _SOLARIZE
    """Probability of inverting the bright half."""


VIEW_PRESETS: dict[str, ViewRecipe] = {
    "photographs": ViewRecipe(),
    # Colour tells products apart: views must agree on it.
    "products": ViewRecipe(brightness=0.2, contrast=0.2, saturation=0.1, hue=0.0, grey=0.0, solarize=_NONE),
    # Microscopy, aerial pictures, parts on a belt: neither direction nor colour must identify a picture.
    "orientation-free": ViewRecipe(rotation=180.0, mix=0.8),
    # Writing has a direction, and its strokes vanish in small crops.
    "documents": ViewRecipe(
        flip=0.0, rotation=5.0, smallest_crop=0.3, brightness=0.2, contrast=0.3, saturation=0.1, hue=0.02, grey=0.2,
        blur=PerKind(0.5, 0.1, 0.3), blur_radius=(0.1, 1.0), solarize=_NONE,
    ),
    # Radiographs and other pictures without colour: intensity is all that may change.
    "greyscale": ViewRecipe(
        rotation=15.0, brightness=0.3, contrast=0.3, gamma=1.5, saturation=0.0, hue=0.0, grey=0.0,
        blur=PerKind(0.5, 0.1, 0.3), solarize=_NONE,
    ),
}  # fmt: skip

# Deliberately bad: both views carry the same colours, so that matching them needs no look at the content. What the
# shortcut alarm is tested with; no preset.
COLOUR_SHORTCUT = ViewRecipe(
    jitter=0.0, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0, grey=0.0, blur=_NONE, solarize=_NONE
)


def choose_views(sample: Tensor) -> tuple[str, str]:
    """The name of a preset and the reason for it, from pictures uint8 [M, S, S, 3].

    documents: most pictures are mostly paper (near-white) with thin dark strokes; greyscale: nearly all pictures have
    no colour; otherwise photographs. products and orientation-free depend on what is searched for, and are never chosen.
    """
    count = len(sample)
    if count == 0:
        return "photographs", "no picture to look at"
    x = sample.permute(0, 3, 1, 2).float()
    low, high = x.amin(1), x.amax(1)
    colourless = ((high - low) <= 12).float().mean((1, 2)) >= 0.99
    paper = low >= 200
    ink = high <= 140
    near_paper = F.max_pool2d(paper.float().unsqueeze(1), 5, stride=1, padding=2).squeeze(1) > 0
    inked = ink.float().mean((1, 2))
    thin = (ink & near_paper).float().sum((1, 2)) >= 0.9 * ink.float().sum((1, 2))
    document = (paper.float().mean((1, 2)) >= 0.5) & (inked >= 0.005) & thin
    share = float(document.float().mean())
    if share >= 0.8:
        return "documents", f"{share:.0%} of {count} pictures are paper with thin dark strokes"
    share = float(colourless.float().mean())
    if share >= 0.95:
        return "greyscale", f"{share:.0%} of {count} pictures have no colour"
    return "photographs", f"{1 - share:.0%} of {count} pictures have colour"
