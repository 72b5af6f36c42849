"""Random views of pictures, drawn per sample, as batched tensor operations: the same code on CPU and GPU.

Drawing and applying are separate: `Views.draw` makes every random number with a CPU generator, `Views.apply` is a
function of one picture and its row of the draw. A global batch is drawn once and sliced over ranks and micro-batches.

Crops are drawn in the coordinates of the original picture (torchvision's RandomResizedCrop), though the cache keeps it
squeezed to a square. A crop is resampled by two matrix products per picture, with Pillow's antialiased bicubic filter;
blur multiplies into the same matrices. Brightness, contrast, saturation, hue, grey and mixing are one 3×3 matrix, a
gain and an offset per sample. Blur acts before colour here, after it in DINO: both are linear, so that only clamping
tells the orders apart.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from training.device import send
from training.presets import VIEW_PRESETS, ViewPreset, ViewRecipe

ViewKind = Literal["first", "second", "local"]

_GREY = torch.tensor([0.299, 0.587, 0.114])
_TO_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_FROM_YIQ = torch.linalg.inv(_TO_YIQ)
_TRIES = 10


class ViewDraw(NamedTuple):
    """The random numbers of `count` views, on the CPU until `to`; row i belongs to picture i."""

    box: Tensor
    """Centre x, y and width, height of the crop before rotation, as shares of the picture's sides. [count, 4]"""
    aspect: Tensor
    """Width / height of the original picture. [count]"""
    angle: Tensor
    """Rotation of the crop in the original picture, in radians. [count]"""
    flip: Tensor
    """−1 where mirrored left to right, else 1. [count]"""
    colour: Tensor
    """Matrix on RGB. [count, 3, 3]"""
    brightness: Tensor
    """Factor. [count]"""
    contrast: Tensor
    """Factor on the distance from the view's mean. [count]"""
    gamma: Tensor
    """Exponent. [count]"""
    sigma: Tensor
    """Standard deviation of the blur in pixels of the view; 0 for none. [count]"""
    solarize: Tensor
    """Whether bright pixels are inverted. [count], bool"""

    def slice(self, low: int, high: int) -> Self:
        """Rows low … high − 1."""
        return type(self)(*(value[low:high] for value in self))

    def to(self, device: torch.device) -> Self:
        """On `device`; through pinned memory where that is a GPU."""
        return type(self)(*(send(value, device) for value in self))


class Views:
    """Draws views with a recipe or a named preset of `VIEW_PRESETS`.

    `mean` and `std` normalise RGB in 0…1; `dtype` is that of the views.
    """

    def __init__(
        self,
        recipe: ViewRecipe | ViewPreset,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.recipe = VIEW_PRESETS[recipe] if isinstance(recipe, str) else recipe
        self.dtype = dtype
        self.mean, self.std = (torch.tensor(v, dtype=dtype).view(1, 3, 1, 1) for v in (mean, std))

    def __call__(
        self,
        pictures: Tensor,
        size: int,
        scale: tuple[float, float],
        kind: ViewKind,
        generator: torch.Generator,
        aspects: Tensor | None = None,
    ) -> Tensor:
        """`draw`, then `apply`: uint8 [B, S, S, 3] → [B, 3, size, size], normalised."""
        return self.apply(pictures, self.draw(len(pictures), size, scale, kind, generator, aspects), size)

    def draw(
        self,
        count: int,
        size: int,
        scale: tuple[float, float],
        kind: ViewKind,
        generator: torch.Generator,
        aspects: Tensor | None = None,
    ) -> ViewDraw:
        """All random numbers of `count` views of `size` pixels; how many are taken from `generator` is fixed by `count`.

        `scale` bounds the area of a crop as a share of the picture; `aspects` [count] are width / height of the
        original pictures (1 where absent).
        """
        recipe = self.recipe
        aspect = torch.ones(count) if aspects is None else aspects.float().cpu()
        r = torch.rand(12, count, generator=generator)
        angle = math.radians(recipe.rotation) * (2 * r[0] - 1)
        jitter = r[1] < recipe.jitter
        sigma = (recipe.blur_radius[0] + (recipe.blur_radius[1] - recipe.blur_radius[0]) * r[2]) * size / 224
        return ViewDraw(
            box=_crop(scale, recipe, aspect, angle, generator),
            aspect=aspect,
            angle=angle,
            flip=torch.where(r[3] < recipe.flip, -1.0, 1.0),
            colour=self._colour(r[4:8], generator),
            brightness=torch.where(jitter, 1 + recipe.brightness * (2 * r[8] - 1), 1.0),
            contrast=torch.where(jitter, 1 + recipe.contrast * (2 * r[9] - 1), 1.0),
            gamma=torch.where(jitter, torch.exp(math.log(recipe.gamma) * (2 * r[10] - 1)), 1.0),
            sigma=torch.where(r[11] < getattr(recipe.blur, kind), sigma, 0.0),
            solarize=torch.rand(count, generator=generator) < getattr(recipe.solarize, kind),
        )

    def apply(self, pictures: Tensor, draw: ViewDraw, size: int) -> Tensor:
        """uint8 [B, S, S, 3] → [B, 3, size, size], normalised; row i is a function of picture i and row i of `draw`."""
        # Contiguous while a byte each: `to` would keep the order of the strides, and the products would copy again.
        x = pictures.permute(0, 3, 1, 2).contiguous().to(self.dtype)
        blurred, solarized = (_rows(chosen, x.device) for chosen in (draw.sigma > 0, draw.solarize))
        d = ViewDraw(*(v.to(self.dtype) if v.is_floating_point() else v for v in draw.to(x.device)))
        x = _rotated(x, d, size, blurred) if self.recipe.rotation else _upright(x, d, size, blurred)
        x = self._recolour(x.clamp_(0.0, 1.0), d)
        if len(solarized):
            rows = x[solarized]
            x[solarized] = torch.where(rows >= 0.5, 1.0 - rows, rows)
        mean, std = self._statistics(x.device)
        return x.sub_(mean).div_(std)

    def normalise(self, pictures: Tensor) -> Tensor:
        """uint8 [B, S, S, 3] → [B, 3, S, S], no randomness."""
        x = pictures.permute(0, 3, 1, 2).to(self.dtype).div(255.0)
        mean, std = self._statistics(x.device)
        return x.sub_(mean).div_(std)

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and deviation, copied once: a copy in every step would wait for the GPU."""
        if self.mean.device != device:
            self.mean, self.std = self.mean.to(device), self.std.to(device)
        return self.mean, self.std

    def _colour(self, r: Tensor, generator: torch.Generator) -> Tensor:
        """Saturation, hue, grey and mixing as matrices [count, 3, 3] on RGB; `r` [4, count] are uniform."""
        recipe, count = self.recipe, r.shape[1]
        grey = _GREY.expand(3, 3)
        saturation = (1 + recipe.saturation * (2 * r[0] - 1)).view(-1, 1, 1)
        turn = 2 * math.pi * recipe.hue * (2 * r[1] - 1)
        rotation = torch.zeros(count, 3, 3)
        rotation[:, 0, 0] = 1.0
        rotation[:, 1, 1] = rotation[:, 2, 2] = turn.cos()
        rotation[:, 1, 2], rotation[:, 2, 1] = -turn.sin(), turn.sin()
        hue = _FROM_YIQ @ rotation @ _TO_YIQ
        matrix = hue @ (saturation * torch.eye(3) + (1 - saturation) * grey)
        matrix = torch.where((r[2] < recipe.jitter).view(-1, 1, 1), matrix, torch.eye(3))
        matrix = torch.where((r[3] < recipe.grey).view(-1, 1, 1), grey, matrix)
        # Any mixture of the channels: colour must not identify a picture.
        mix = torch.rand(count, 3, 3, generator=generator) * 2 - 0.5
        mix = mix / mix.sum(2, keepdim=True).clamp(min=0.5)
        use = torch.rand(count, generator=generator) < recipe.mix
        return torch.where(use.view(-1, 1, 1), mix @ matrix, matrix)

    def _recolour(self, x: Tensor, d: ViewDraw) -> Tensor:
        def column(v: Tensor) -> Tensor:
            return v.view(-1, 1, 1, 1)

        x = torch.bmm(d.colour * d.brightness.view(-1, 1, 1), x.flatten(2)).view_as(x)
        mean = x.mean((1, 2, 3), keepdim=True)
        x = x.sub_(mean).mul_(column(d.contrast)).add_(mean).clamp_(0.0, 1.0)
        return x.pow(column(d.gamma)) if self.recipe.gamma != 1.0 else x


def _rows(chosen: Tensor, device: torch.device) -> Tensor:
    """Positions of the rows that are `chosen` (on the CPU, so that no GPU is waited for), on `device`."""
    return torch.nonzero(chosen.cpu(), as_tuple=True)[0].to(device, non_blocking=True)


def _crop(
    scale: tuple[float, float], recipe: ViewRecipe, aspect: Tensor, angle: Tensor, generator: torch.Generator
) -> Tensor:
    """Boxes [count, 4] of RandomResizedCrop in the original picture: area U(scale), log aspect ratio uniform, the first of
    ten tries that fits, otherwise the largest that does; placed so that its rotation stays inside where that is possible."""
    count = len(aspect)
    low, high = (max(share, recipe.smallest_crop) for share in scale)
    bounds = math.log(recipe.aspect[0]), math.log(recipe.aspect[1])
    r = torch.rand(2, _TRIES, count, generator=generator)
    area = low + r[0] * (high - low)
    ratio = torch.exp(bounds[0] + r[1] * (bounds[1] - bounds[0]))
    w, h = (area * ratio / aspect).sqrt(), (area * aspect / ratio).sqrt()
    fits = (w <= 1) & (h <= 1)
    first = fits.int().argmax(0, keepdim=True)  # 0 where none fits
    w, h, some = w.gather(0, first)[0], h.gather(0, first)[0], fits.any(0)
    nearest = aspect.clamp(*recipe.aspect)  # the whole picture, cut to an allowed aspect ratio
    w = torch.where(some, w, (nearest / aspect).clamp(max=1.0))
    h = torch.where(some, h, (aspect / nearest).clamp(max=1.0))
    # Extent of the rotated crop; the share of it that exceeds the picture is filled by reflection.
    cos, sin = angle.cos().abs(), angle.sin().abs()
    wide, tall = cos * w + sin * h / aspect, sin * w * aspect + cos * h
    at = torch.rand(2, count, generator=generator)
    cx = 0.5 + (at[0] - 0.5) * (1 - wide).clamp(min=0.0)
    cy = 0.5 + (at[1] - 0.5) * (1 - tall).clamp(min=0.0)
    return torch.stack([cx, cy, w, h], 1)


def _upright(x: Tensor, d: ViewDraw, size: int, blurred: Tensor) -> Tensor:
    """The crop, resampled and, for the rows in `blurred`, blurred by the same two products."""
    cx, cy, w, h = d.box.unbind(1)
    across = _filter(cx - w / 2 * d.flip, w * d.flip, x.shape[3], size)
    down = _filter(cy - h / 2, h, x.shape[2], size).div_(255.0)
    if len(blurred):
        blur = _gaussian(d.sigma[blurred], size)
        across[blurred], down[blurred] = blur @ across[blurred], blur @ down[blurred]
    return _resample(x, down, across)


def _rotated(x: Tensor, d: ViewDraw, size: int, blurred: Tensor) -> Tensor:
    """The part of the picture that holds the rotated crop, resampled to √2 times the view, then turned."""
    cx, cy, w, h = d.box.unbind(1)
    cos, sin, aspect = d.angle.cos(), d.angle.sin(), d.aspect
    # View (u, v) in −1…1 → picture in −1…1: scale and mirror, rotate in original coordinates, then squeeze.
    to_picture = torch.stack(
        [w * cos * d.flip, -h * sin / aspect, 2 * cx - 1, w * aspect * sin * d.flip, h * cos, 2 * cy - 1], 1
    ).view(-1, 2, 3)
    reach = to_picture[:, :, :2].abs().sum(2)  # half extent, x and y
    low = (to_picture[:, :, 2] - reach).clamp(-1.0, 1.0)
    high = (to_picture[:, :, 2] + reach).clamp(-1.0, 1.0)
    side = math.ceil(size * math.sqrt(2))
    start, extent = (low + 1) / 2, (high - low) / 2
    across = _filter(start[:, 0], extent[:, 0], x.shape[3], side)
    canvas = _resample(x, _filter(start[:, 1], extent[:, 1], x.shape[2], side).div_(255.0), across)
    scale = 1 / extent
    theta = to_picture * scale.unsqueeze(2)
    theta[:, :, 2] -= (low + high) / 2 * scale
    grid = F.affine_grid(theta, [len(x), 3, size, size], align_corners=False)
    view = F.grid_sample(canvas, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    if len(blurred):
        blur = _gaussian(d.sigma[blurred], size)
        view[blurred] = _resample(view[blurred], blur, blur)
    return view


def _resample(x: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """Product along both axes: [B, 3, H, W] by `down` [B, h, H] and `across` [B, w, W] → [B, 3, h, w]."""
    B, C, H, W = x.shape
    x = torch.bmm(x.reshape(B, C * H, W), across.transpose(1, 2)).view(B, C, H, -1)
    return torch.matmul(down.unsqueeze(1), x)


def _filter(start: Tensor, extent: Tensor, source: int, size: int) -> Tensor:
    """Weights [B, size, source] of antialiased bicubic resampling (Pillow's, a = −0.5) of a stretch of `source` pixels.

    `start` and `extent` [B] are shares of the picture's side; a negative extent mirrors.
    """
    at = torch.arange(size, dtype=start.dtype, device=start.device) + 0.5
    step = extent.view(-1, 1) * source / size
    centre = start.view(-1, 1) * source + at * step  # [B, size], in source pixels
    pixel = torch.arange(source, dtype=start.dtype, device=start.device) + 0.5
    t = (pixel - centre.unsqueeze(2)).abs_().div_(step.abs().clamp(min=1.0).unsqueeze(2)).clamp_(max=2.0)
    # Keys' cubic with a = −0.5; (t − 1)(t − 2)² and the near branch written so that few temporaries are needed.
    near = (1.5 * t).sub_(2.5).mul_(t).mul_(t).add_(1.0)
    far = (t - 2.0).square_().mul_(t.sub(1.0)).mul_(-0.5)
    weight = torch.where(t < 1.0, near, far)
    return weight.div_(weight.sum(2, keepdim=True))


def _gaussian(sigma: Tensor, size: int) -> Tensor:
    """Matrices [B, size, size] that blur a row of pixels."""
    at = torch.arange(size, dtype=sigma.dtype, device=sigma.device)
    squared = (at.view(-1, 1) - at).square_()
    weight = torch.exp(-0.5 * squared / sigma.clamp(min=0.05).square().view(-1, 1, 1))
    return weight.div_(weight.sum(2, keepdim=True))
