"""Contact sheets: a query and its neighbours as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from export.bundle import RefusalError, printable
from export.preprocess import DEFAULT_LIMITS, PreprocessSpec, UnreadablePictureError, preprocess
from export.sources.picture import picture_at

SIDE = 144
_GAP, _TEXT = 8, 18
_PAPER, _INK, _BLANK = (255, 255, 255), (40, 40, 40), (225, 225, 225)
_FRAME = {"right": (46, 125, 50), "wrong": (198, 40, 40), "none": _PAPER}


Mark = Literal["right", "wrong", "none"]


class Tile(NamedTuple):
    """One picture of a sheet: encoded bytes (None where it cannot be had) and a caption."""

    data: bytes | None
    caption: str
    mark: Mark = "none"
    """Colour of the frame, where the truth is known."""


def picture_of(source_uri: str, key: str, images: Path | None) -> bytes | None:
    """The bytes of an item's picture, if its file is on this machine: below `images`, or where it was indexed.

    Both come from a server, so only regular files of a sensible size are read, and keys cannot leave `images`.
    """
    try:
        if images is not None and not Path(key).is_absolute() and ".." not in Path(key).parts:
            path = images / key
            if path.is_file() and path.stat().st_size <= DEFAULT_LIMITS.max_bytes:
                return path.read_bytes()
        there = picture_at(source_uri, key)
        if isinstance(there.where, Path) and there.where.is_file():
            return there.read()
    except (OSError, ValueError, RefusalError):  # not here, not readable, or no address at all: drawn as a blank tile
        return None
    return None


def draw_sheet(rows: Sequence[tuple[Tile, Sequence[Tile]]], path: Path) -> None:
    """Write a sheet with one row per query: the query, a gap, its neighbours in order. Raises `RefusalError`."""
    columns = 1 + max(len(neighbors) for _, neighbors in rows)
    width = columns * (SIDE + _GAP) + 2 * _GAP
    height = len(rows) * (SIDE + _TEXT + _GAP) + _GAP
    sheet = Image.new("RGB", (width, height), _PAPER)
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(11)
    for r, (query, neighbors) in enumerate(rows):
        top = _GAP + r * (SIDE + _TEXT + _GAP)
        for c, tile in enumerate((query, *neighbors)):
            left = _GAP + c * (SIDE + _GAP) + (_GAP if c else 0)
            pen.rectangle((left - 3, top - 3, left + SIDE + 2, top + SIDE + 2), fill=_FRAME[tile.mark])
            sheet.paste(_thumbnail(tile.data), (left, top))
            pen.text((left, top + SIDE + 4), _shorten(printable(tile.caption), font), fill=_INK, font=font)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path)
    except (OSError, ValueError) as e:
        raise RefusalError(f"{path} cannot be written ({e}): choose another --out, ending in .png or .jpg") from e


def _thumbnail(data: bytes | None) -> Image.Image:
    if data is not None:
        try:
            return Image.fromarray(preprocess(data, PreprocessSpec(size=SIDE, fit="pad")).pixels)
        except UnreadablePictureError:
            pass  # drawn as a blank tile, as a picture that is not here
    return Image.new("RGB", (SIDE, SIDE), _BLANK)


def _shorten(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if font.getlength(text) <= SIDE:
        return text
    while len(text) > 1 and font.getlength(text + "…") > SIDE:
        text = text[:-1]
    return text + "…"
