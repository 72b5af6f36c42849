"""Views: one picture's view depends on nothing else, crops are true in the original picture, presets do what they say."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from training.presets import COLOUR_SHORTCUT, VIEW_PRESETS, PerKind, ViewPreset, ViewRecipe, choose_views
from training.views import ViewDraw, Views, _filter, _resample

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
PLAIN_MEAN, PLAIN_STD = (0.0,) * 3, (1.0,) * 3
NONE = PerKind(0.0, 0.0, 0.0)
GEOMETRY = ViewRecipe(flip=0.0, jitter=0.0, grey=0.0, blur=NONE, solarize=NONE)  # crops only


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_pictures(count: int, side: int = 48) -> Tensor:
    return torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=generator(9))


def identity(count: int, **changes: Tensor) -> ViewDraw:
    """A draw that changes nothing."""
    one, zero = torch.ones(count), torch.zeros(count)
    draw = ViewDraw(
        box=torch.tensor([[0.5, 0.5, 1.0, 1.0]]).repeat(count, 1),
        aspect=one,
        angle=zero,
        flip=one,
        colour=torch.eye(3).repeat(count, 1, 1),
        brightness=one,
        contrast=one,
        gamma=one,
        sigma=zero,
        solarize=zero.bool(),
    )
    return draw._replace(**changes)


def disc(width: int, height: int, side: int, radius: float, centre: tuple[float, float] = (0.5, 0.5)) -> Tensor:
    """A white disc of `radius` pixels on black in a picture of width × height, squeezed to side × side."""
    image = Image.new("RGB", (width, height))
    x, y = centre[0] * width, centre[1] * height
    ImageDraw.Draw(image).ellipse((x - radius, y - radius, x + radius, y + radius), fill="white")
    return torch.from_numpy(np.array(image.resize((side, side), Image.Resampling.BICUBIC)))[None]


def roundness(view: Tensor) -> float:
    """Width / height of the bright region of [3, s, s], by second moments."""
    weight = view[0].double()
    at = torch.arange(view.shape[1], dtype=torch.float64)
    x, y = weight.sum(0) / weight.sum(), weight.sum(1) / weight.sum()
    mx, my = (x * at).sum(), (y * at).sum()
    return float(((x * (at - mx) ** 2).sum() / (y * (at - my) ** 2).sum()).sqrt())


@pytest.mark.parametrize("preset", get_args(ViewPreset))
@pytest.mark.parametrize("kind", ["first", "second", "local"])
def test_views_differ_per_sample_and_repeat_per_seed(preset: ViewPreset, kind: str) -> None:
    pictures = random_pictures(1).expand(6, -1, -1, -1)
    views = Views(preset, MEAN, STD)
    a, b = (views(pictures, 32, (0.3, 1.0), kind, generator(1)) for _ in range(2))  # type: ignore[arg-type]
    assert a.shape == (6, 3, 32, 32) and a.dtype == torch.float32 and torch.equal(a, b)
    assert (a >= -2.0001).all() and (a <= 2.0001).all()  # (0 − 0.5) / 0.25 … (1 − 0.5) / 0.25
    assert all(not torch.allclose(a[0], other, atol=0.05) for other in a[1:])


@pytest.mark.parametrize("preset", get_args(ViewPreset))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_slice_of_the_draw_gives_the_slice_of_the_views(preset: ViewPreset, dtype: torch.dtype) -> None:
    pictures, aspects = random_pictures(12), torch.linspace(0.4, 2.5, 12)
    views = Views(preset, MEAN, STD, dtype)
    for kind in ("first", "second", "local"):
        draw = views.draw(12, 24, (0.2, 1.0), kind, generator(), aspects)  # type: ignore[arg-type]
        whole = views.apply(pictures, draw, 24)
        assert whole.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 1e-12
        for low, high in ((0, 4), (4, 5), (5, 12)):
            part = views.apply(pictures[low:high], draw.slice(low, high), 24)
            assert torch.allclose(part, whole[low:high], atol=tolerance, rtol=0)


def test_the_number_of_draws_depends_on_the_count_alone() -> None:
    after = []
    for preset in VIEW_PRESETS:
        g = generator()
        Views(preset, MEAN, STD).draw(7, 32, (0.1, 0.4), "second", g)  # type: ignore[arg-type]
        after.append(torch.rand(4, generator=g))
    assert all(torch.equal(after[0], other) for other in after[1:])


@pytest.mark.parametrize("size", [16, 48, 64])
def test_resampling_is_torchs_antialiased_bicubic(size: int) -> None:
    x = random_pictures(3).permute(0, 3, 1, 2).double()
    whole = _filter(torch.zeros(3, dtype=x.dtype), torch.ones(3, dtype=x.dtype), 48, size)
    expected = F.interpolate(x, size=(size, size), mode="bicubic", antialias=True)
    assert torch.allclose(_resample(x, whole, whole), expected, atol=2e-3)
    mirrored = _filter(torch.ones(3, dtype=x.dtype), -torch.ones(3, dtype=x.dtype), 48, size)
    assert torch.allclose(_resample(x, whole, mirrored), expected.flip(3), atol=2e-3)


def test_a_crop_is_the_crop_of_the_picture() -> None:
    """Whole pixels cut out, then resized, agree with one resampling up to the crop's border."""
    pictures = F.interpolate(torch.rand(2, 3, 8, 8, generator=generator()), size=60, mode="bicubic").clamp(0, 1)
    pixels = (pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    box = torch.tensor([[(10 + 15) / 60, (20 + 12) / 60, 30 / 60, 24 / 60]]).repeat(2, 1)
    view = Views(GEOMETRY, PLAIN_MEAN, PLAIN_STD).apply(pixels, identity(2, box=box), 16)
    cut = pixels[:, 20:44, 10:40].permute(0, 3, 1, 2).float() / 255
    expected = F.interpolate(cut, size=(16, 16), mode="bicubic", antialias=True).clamp(0, 1)
    assert (view - expected).abs().mean() < 0.004 and (view - expected)[:, :, 2:-2, 2:-2].abs().max() < 0.01


@pytest.mark.parametrize(("width", "height"), [(300, 100), (100, 250), (120, 120)])
@pytest.mark.parametrize("rotation", [0.0, 180.0])
def test_a_circle_stays_a_circle(width: int, height: int, rotation: float) -> None:
    """Square crops of a squeezed picture, rotated or not, show the original's proportions."""
    recipe = ViewRecipe(rotation=rotation, aspect=(1.0, 1.0), jitter=0.0, grey=0.0, blur=NONE, solarize=NONE)
    aspect, pixels = torch.tensor([width / height]), disc(width, height, 96, 0.3 * min(width, height))
    squeezed = roundness(pixels[0].permute(2, 0, 1))
    assert squeezed == pytest.approx(height / width, rel=0.03)
    short = min(width, height)
    box = torch.tensor([[0.5, 0.5, 0.9 * short / width, 0.9 * short / height]])  # a centred square
    for angle in torch.arange(0, 1 if rotation == 0 else 6).float():
        draw = identity(1, box=box, aspect=aspect, angle=angle.view(1))
        view = Views(recipe, PLAIN_MEAN, PLAIN_STD).apply(pixels, draw, 64)
        assert roundness(view[0]) == pytest.approx(1.0, rel=0.03)


def test_rotation_turns_by_its_angle_in_the_original_picture() -> None:
    """A mark right of the centre of a 3:1 picture lies where a rotation of the original by 30 degrees puts it."""
    recipe = ViewRecipe(rotation=180.0, jitter=0.0, grey=0.0, blur=NONE, solarize=NONE)
    pixels = disc(300, 100, 96, 6, centre=(0.5 + 30 / 300, 0.5))
    box, angle = torch.tensor([[0.5, 0.5, 90 / 300, 90 / 100]]), torch.tensor([math.pi / 6])
    draw = identity(1, box=box, aspect=torch.tensor([3.0]), angle=angle)
    view = Views(recipe, PLAIN_MEAN, PLAIN_STD).apply(pixels, draw, 90)[0, 0].double()
    at = torch.arange(90, dtype=torch.float64) + 0.5 - 45
    x, y = float((view.sum(0) * at).sum() / view.sum()), float((view.sum(1) * at).sum() / view.sum())
    # The view's axes are turned by +30°: the mark at (30, 0) is seen at 30·(cos 30°, −sin 30°).
    assert x == pytest.approx(30 * math.cos(math.pi / 6), abs=1) and y == pytest.approx(-15, abs=1)


def test_crops_have_the_drawn_area_and_aspect_and_stay_inside() -> None:
    aspect = torch.linspace(0.3, 3.0, 4000)
    cx, cy, w, h = Views(GEOMETRY, MEAN, STD).draw(4000, 32, (0.2, 0.6), "first", generator(), aspect).box.T
    assert ((w <= 1) & (h <= 1) & (w > 0) & (h > 0)).all()
    for centre, side in ((cx, w), (cy, h)):
        assert ((centre - side / 2 >= -1e-6) & (centre + side / 2 <= 1 + 1e-6)).all()
    ratio, area = w * aspect / h, w * h
    assert ratio.min() >= 3 / 4 - 1e-4 and ratio.max() <= 4 / 3 + 1e-4
    ordinary = (aspect > 0.7) & (aspect < 1.4)
    assert area[ordinary].min() > 0.19 and area[ordinary].max() < 0.61
    assert (area <= 0.6 + 1e-4).all()
    # A crop too wide for its picture becomes the largest that fits.
    wide = Views(GEOMETRY, MEAN, STD).draw(50, 32, (1.0, 1.0), "first", generator(), torch.full((50,), 3.0)).box
    assert torch.allclose(wide[:, 3], torch.ones(50)) and torch.allclose(wide[:, 2] * 3.0, torch.full((50,), 4 / 3))
    # Turned crops stay inside where they fit.
    turned = Views("orientation-free", MEAN, STD).draw(2000, 32, (0.05, 0.2), "local", generator())
    cos, sin = turned.angle.cos().abs(), turned.angle.sin().abs()
    cx, cy, w, h = turned.box.T
    reach = (cos * w + sin * h) / 2
    assert ((cx - reach >= -1e-5) & (cx + reach <= 1 + 1e-5)).all()


def test_strong_shrinking_does_not_alias() -> None:
    """One-pixel stripes shrunk 3.4 times become even grey; point sampling would show stripes of another width."""
    stripes = torch.zeros(1, 96, 96, 3, dtype=torch.uint8)
    stripes[:, :, ::2] = 255
    for recipe in (GEOMETRY, ViewRecipe(rotation=1e-9, flip=0.0, jitter=0.0, grey=0.0, blur=NONE, solarize=NONE)):
        view = Views(recipe, PLAIN_MEAN, PLAIN_STD).apply(stripes, identity(1), 28)
        assert view[..., 2:-2].std() < 0.02 and view.mean().item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("rotation", [0.0, 180.0])
def test_blur_has_its_radius(rotation: float) -> None:
    """A line of one pixel blurred by σ has standard deviation σ; unblurred rows are untouched."""
    recipe = ViewRecipe(rotation=rotation, flip=0.0, jitter=0.0, grey=0.0, solarize=NONE)
    line = torch.zeros(2, 64, 64, 3, dtype=torch.uint8)
    line[:, :, 31] = 255
    views = Views(recipe, PLAIN_MEAN, PLAIN_STD, torch.float64)
    draw = identity(2, sigma=torch.tensor([0.0, 2.5]))
    sharp, soft = views.apply(line, draw, 64)[:, 0]
    unblurred = views.apply(line, draw._replace(sigma=torch.zeros(2)), 64)[:, 0]
    assert torch.equal(sharp, unblurred[0])
    at = torch.arange(64, dtype=torch.float64)

    def variance(view: Tensor) -> float:
        p = view[32] / view[32].sum()
        return float((p * (at - (p * at).sum()) ** 2).sum())

    assert variance(soft) - variance(unblurred[1]) == pytest.approx(2.5**2, rel=0.02)


def test_product_views_keep_the_colour() -> None:
    red = torch.tensor([200, 40, 40], dtype=torch.uint8).expand(64, 48, 48, 3)
    for preset, keeps in (("products", True), ("photographs", False)):
        seen = Views(preset, PLAIN_MEAN, PLAIN_STD)(red, 16, (0.5, 1.0), "first", generator())  # type: ignore[arg-type]
        r, g, b = seen.mean((2, 3)).T
        assert bool(((r > g + 0.2) & ((g - b).abs() < 0.02)).all()) is keeps


def test_greyscale_views_stay_grey_and_documents_upright() -> None:
    grey = random_pictures(40)[..., :1].expand(-1, -1, -1, 3).contiguous()
    view = Views("greyscale", PLAIN_MEAN, PLAIN_STD)(grey, 32, (0.3, 1.0), "second", generator())
    assert torch.allclose(view[:, 0], view[:, 1], atol=1e-5) and torch.allclose(view[:, 0], view[:, 2], atol=1e-5)
    draw = Views("greyscale", MEAN, STD).draw(2000, 32, (0.3, 1.0), "second", generator())
    assert 14 < math.degrees(draw.angle.abs().max()) <= 15 and set(draw.flip.tolist()) == {-1.0, 1.0}
    assert not draw.solarize.any() and draw.gamma.min() < 0.7 and draw.gamma.max() > 1.4
    draw = Views("documents", MEAN, STD).draw(2000, 32, (0.05, 0.25), "local", generator())
    assert (draw.flip == 1).all() and math.degrees(draw.angle.abs().max()) <= 5 and not draw.solarize.any()
    assert (draw.box[:, 2] * draw.box[:, 3]).min() > 0.29  # local crops are not smaller than that either


def test_probabilities_follow_the_kind_of_view() -> None:
    views = Views("photographs", MEAN, STD)
    for kind, blur, solarize in (("first", 1.0, 0.0), ("second", 0.1, 0.2), ("local", 0.5, 0.0)):
        draw = views.draw(4000, 224, (0.3, 1.0), kind, generator())  # type: ignore[arg-type]
        assert (draw.sigma > 0).float().mean().item() == pytest.approx(blur, abs=0.03)
        assert draw.solarize.float().mean().item() == pytest.approx(solarize, abs=0.03)
        assert draw.sigma.max() <= 2.0 and (draw.flip < 0).float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert views.draw(400, 112, (0.3, 1.0), "first", generator()).sigma.max() <= 1.0  # scales with the view


def test_the_colour_shortcut_leaves_the_colours() -> None:
    """What makes it bad: two views of a picture of one colour are equal, and of another colour are not."""
    colours = torch.randint(0, 256, (20, 1, 1, 3), dtype=torch.uint8, generator=generator()).expand(-1, 32, 32, -1)
    views = Views(COLOUR_SHORTCUT, PLAIN_MEAN, PLAIN_STD)
    a, b = (views(colours, 16, (0.2, 1.0), kind, generator(1)).mean((2, 3)) for kind in ("first", "second"))  # type: ignore[arg-type]
    assert torch.allclose(a, b, atol=1e-4) and torch.cdist(a, b).argmin(1).tolist() == list(range(20))


def text_pages(count: int, side: int) -> Tensor:
    """White pages with lines of dark words."""
    rng = np.random.default_rng(0)
    pages = []
    for _ in range(count):
        image = Image.new("RGB", (400, 560), (250, 250, 246))
        pen = ImageDraw.Draw(image)
        for y in range(40, 520, 22):
            words = " ".join("".join(rng.choice(list("abcdefghilmnoprstu"), rng.integers(2, 9))) for _ in range(8))
            pen.text((30, y), words, fill=(20, 20, 30), font_size=14)
        pages.append(np.array(image.resize((side, side), Image.Resampling.BICUBIC)))
    return torch.from_numpy(np.stack(pages))


def test_the_preset_follows_the_pictures() -> None:
    colourful = random_pictures(40, 96)
    assert choose_views(colourful)[0] == "photographs"
    grey = colourful[..., :1].expand(-1, -1, -1, 3)
    name, reason = choose_views(grey)
    assert name == "greyscale" and "40 pictures have no colour" in reason
    assert choose_views(torch.cat([grey[:30], colourful[:10]]))[0] == "photographs"
    name, reason = choose_views(text_pages(10, 336))
    assert name == "documents" and "paper" in reason
    # A product on white is no document: its dark parts are not strokes.
    product = torch.full((10, 96, 96, 3), 255, dtype=torch.uint8)
    product[:, 30:66, 30:66] = torch.tensor([40, 20, 90], dtype=torch.uint8)
    assert choose_views(product)[0] == "photographs"
    assert choose_views(colourful[:0]) == ("photographs", "no picture to look at")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("preset", get_args(ViewPreset))
def test_views_on_a_gpu_are_those_of_the_cpu(preset: ViewPreset) -> None:
    pictures, aspects = random_pictures(12), torch.linspace(0.4, 2.5, 12)
    views = Views(preset, MEAN, STD, torch.float64)
    draw = views.draw(12, 24, (0.2, 1.0), "second", generator(), aspects)
    expected = views.apply(pictures, draw, 24)
    on_gpu = views.apply(pictures.cuda(), draw, 24)
    # A pixel at the border of solarisation may fall on either side.
    assert ((on_gpu.cpu() - expected).abs() < 1e-6).double().mean() > 0.9999
