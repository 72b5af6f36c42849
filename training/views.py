"""Random views of pictures, drawn per sample, as batched tensor operations: the same code on CPU and GPU.

Geometry (crop, flip, rotation) is one resampling; brightness, contrast, saturation, hue, grey and mixing are one 3×3
matrix and offset per sample; blur is one depthwise convolution. All random numbers come from a CPU generator, so that
a step's views depend on its seed alone.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ViewPreset = Literal["photographs", "products", "orientation-free"]
ViewKind = Literal["first", "second", "local"]

# Probability of blur and of solarisation per kind of view (DINO's recipe, spec/sop.md 1.8).
_BLUR = {"first": 1.0, "second": 0.1, "local": 0.5}
_SOLARIZE = {"first": 0.0, "second": 0.2, "local": 0.0}


class _Colour(NamedTuple):
    """How far a preset changes colours; the first row is DINO's recipe."""

    light: float
    """Brightness and contrast, ± this share."""
    saturation: float
    """± this share."""
    hue: float
    """± this share of the colour circle."""
    grey: float
    """Probability of losing all colour."""
    solarize: bool
    """Whether `_SOLARIZE` applies."""


_COLOURS: dict[str, _Colour] = {
    "photographs": _Colour(0.4, 0.2, 0.1, 0.2, True),
    # Colour tells products apart: views must agree on it.
    "products": _Colour(0.2, 0.1, 0.0, 0.0, False),
    "orientation-free": _Colour(0.4, 0.2, 0.1, 0.2, True),
}


class Views:
    """Draws views of one size; `mean` and `std` normalise RGB in 0…1."""

    def __init__(self, preset: ViewPreset, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.preset = preset
        self._change = _COLOURS[preset]
        self.mean, self.std = torch.tensor(mean).view(1, 3, 1, 1), torch.tensor(std).view(1, 3, 1, 1)

    def __call__(
        self, pictures: Tensor, size: int, scale: tuple[float, float], kind: ViewKind, generator: torch.Generator
    ) -> Tensor:
        """uint8 [B, S, S, 3] → float32 [B, 3, size, size], normalised."""
        x = pictures.permute(0, 3, 1, 2).float().div_(255.0)
        count = len(x)
        theta = self._geometry(count, scale, generator).to(x.device)
        grid = F.affine_grid(theta, [count, 3, size, size], align_corners=False)
        x = F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
        x = self._colour(x, generator)
        x = _blur(x, _BLUR[kind], generator)
        if self._change.solarize and _SOLARIZE[kind]:
            hit = (torch.rand(count, generator=generator) < _SOLARIZE[kind]).to(x.device).view(-1, 1, 1, 1)
            x = torch.where(hit & (x >= 0.5), 1.0 - x, x)
        return (x - self.mean.to(x.device)) / self.std.to(x.device)

    def normalise(self, pictures: Tensor) -> Tensor:
        """uint8 [B, S, S, 3] → float32 [B, 3, S, S], no randomness."""
        x = pictures.permute(0, 3, 1, 2).float().div(255.0)
        return (x - self.mean.to(x.device)) / self.std.to(x.device)

    def _geometry(self, count: int, scale: tuple[float, float], generator: torch.Generator) -> Tensor:
        """Affine maps [B, 2, 3] from view to picture coordinates in −1…1."""
        r = torch.rand(6, count, generator=generator)
        area = scale[0] + r[0] * (scale[1] - scale[0])
        log_aspect = math.log(3 / 4) + r[1] * (math.log(4 / 3) - math.log(3 / 4))
        w = (area * log_aspect.exp()).sqrt().clamp(max=1.0)
        h = (area / log_aspect.exp()).sqrt().clamp(max=1.0)
        cx, cy = (2 * r[2] - 1) * (1 - w), (2 * r[3] - 1) * (1 - h)
        flip = torch.where(r[4] < 0.5, -1.0, 1.0)
        angle = 2 * math.pi * r[5] if self.preset == "orientation-free" else torch.zeros(count)
        cos, sin = angle.cos(), angle.sin()
        first = torch.stack([w * cos * flip, -w * sin, cx], 1)
        second = torch.stack([h * sin * flip, h * cos, cy], 1)
        return torch.stack([first, second], 1)

    def _colour(self, x: Tensor, generator: torch.Generator) -> Tensor:
        count = len(x)
        change = self._change
        matrix = _jitter(count, change, generator)
        if self.preset == "orientation-free":
            # Any mixture of the channels: colour must not identify a picture.
            mix = torch.rand(count, 3, 3, generator=generator) * 2 - 0.5
            mix = mix / mix.sum(2, keepdim=True).clamp(min=0.5)
            use = (torch.rand(count, generator=generator) < 0.8).view(-1, 1, 1)
            matrix = torch.where(use, mix @ matrix, matrix)
        contrast = 1 + change.light * (2 * torch.rand(count, generator=generator) - 1)
        brightness = 1 + change.light * (2 * torch.rand(count, generator=generator) - 1)
        jitter = (torch.rand(count, generator=generator) < 0.8).float()
        contrast = (1 + jitter * (contrast - 1)).view(-1, 1, 1, 1).to(x.device)
        brightness = (1 + jitter * (brightness - 1)).view(-1, 1, 1, 1).to(x.device)
        x = torch.bmm(matrix.to(x.device), x.flatten(2)).view_as(x) * brightness
        mean = x.mean((1, 2, 3), keepdim=True)
        return ((x - mean) * contrast + mean).clamp_(0.0, 1.0)


_GREY = torch.tensor([0.299, 0.587, 0.114])
_TO_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])


def _jitter(count: int, change: _Colour, generator: torch.Generator) -> Tensor:
    """Saturation and hue with probability 0.8, and grey, as matrices [B, 3, 3] on RGB."""
    r = torch.rand(4, count, generator=generator)
    grey = _GREY.expand(3, 3)
    saturation = (1 + change.saturation * (2 * r[0] - 1)).view(-1, 1, 1)
    turn = 2 * math.pi * change.hue * (2 * r[1] - 1)
    rotation = torch.zeros(count, 3, 3)
    rotation[:, 0, 0] = 1.0
    rotation[:, 1, 1] = rotation[:, 2, 2] = turn.cos()
    rotation[:, 1, 2], rotation[:, 2, 1] = -turn.sin(), turn.sin()
    hue = _TO_YIQ.inverse() @ rotation @ _TO_YIQ
    matrix = hue @ (saturation * torch.eye(3) + (1 - saturation) * grey)
    matrix = torch.where((r[2] < 0.8).view(-1, 1, 1), matrix, torch.eye(3))
    return torch.where((r[3] < change.grey).view(-1, 1, 1), grey, matrix)


def _blur(x: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Gaussian blur of radius U(0.1, 2) pixels of a 224-pixel view, scaled with the view's size."""
    count, _, height, width = x.shape
    sigma = (0.1 + 1.9 * torch.rand(count, generator=generator)) * width / 224
    hit = torch.rand(count, generator=generator) < probability
    if not bool(hit.any()) or float(sigma[hit].max()) < 0.2:  # below that the kernel is the identity
        return x
    reach = max(1, math.ceil(2 * 2.0 * width / 224))
    at = torch.arange(-reach, reach + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (at / sigma.clamp(min=0.05).view(-1, 1)) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)
    kernel = torch.where(hit.view(-1, 1), kernel, (at == 0).float())
    weight = kernel.repeat_interleave(3, 0).to(x.device)  # 3B taps
    y = F.pad(x.reshape(1, count * 3, height, width), (reach, reach, reach, reach), mode="reflect")
    y = F.conv2d(y, weight.view(count * 3, 1, -1, 1), groups=count * 3)
    y = F.conv2d(y, weight.view(count * 3, 1, 1, -1), groups=count * 3)
    return y.view_as(x)
