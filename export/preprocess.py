"""Encoded pictures → pixels: the only decoding, orientation, colour conversion and resize in the product.

Training's cache, evaluation, parity and the served Embed all call `preprocess`, so that the same file gives the same
bytes everywhere. What changes pixels is in `PreprocessSpec` (part of a bundle's identity); what only protects the
machine is in `DecodeLimits`.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import io
import os
import re
import stat
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field

Pixels = npt.NDArray[np.uint8]

# The formats we ask Pillow for. Its others run external programs (EPS) or are never photographs.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
SUFFIXES = frozenset(
    f".{name}"
    for name in "jpg jpeg jpe jfif mpo png webp gif bmp dib tif tiff ppm pgm pnm avif".split()  # noqa: SIM905
)

THUMBNAIL_QUALITY = 85

_ORIENTATION_TAG = 0x0112  # EXIF 2.32, table 4
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class PreprocessSpec(BaseModel):
    """How an encoded picture becomes `uint8 [size, size, 3]` pixels. Any change is another embedding space."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    version: Literal["likewise-preprocess/1"] = "likewise-preprocess/1"
    """Name of the procedure below; a change to its code is a new version."""
    size: int
    """Height and width of the result, in pixels."""
    fit: Literal["crop", "pad", "squeeze"] = "crop"
    """crop: the shorter side becomes `size`, the centre is kept. pad: the longer side does, the rest is background.
    squeeze: both sides do, whatever the shape (the training cache)."""
    background: tuple[int, int, int] = (255, 255, 255)
    """RGB under transparent pixels and in the padding."""
    interpolation: Literal["bicubic"] = "bicubic"
    """Resampling filter (antialiased, as Pillow does it)."""
    scaled_jpeg: bool = True
    """Decode JPEGs at the smallest scale (1/2, 1/4, 1/8) that is not below the result. Faster; changes pixels."""

    def sha256(self) -> str:
        """Hex digest of this specification."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


# Above this Pillow takes a picture for a decompression bomb; a limit of ours beyond it would have no effect.
MAX_PIXELS = 89_478_485


class DecodeLimits(BaseModel):
    """What is refused before it costs memory."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    max_bytes: int = 64 * 2**20
    """Largest encoded picture, in bytes."""
    max_pixels: int = Field(MAX_PIXELS, le=MAX_PIXELS)
    """Largest width × height, read from the header before any pixel is decoded (decompression bombs)."""
    min_side: int = 4
    """Smallest width or height, in pixels."""


DEFAULT_LIMITS = DecodeLimits()

UnreadableReason = Literal["IMAGE_EMPTY", "IMAGE_UNDECODABLE", "IMAGE_TOO_LARGE", "IMAGE_TOO_SMALL", "IMAGE_TOO_SLOW"]


class UnreadablePictureError(ValueError):
    """A picture that cannot be used; the message is a whole sentence.

    Attributes: `reason`, one of the upper-case words that the gRPC API also answers with.
    """

    def __init__(self, reason: UnreadableReason, message: str) -> None:
        super().__init__(message)
        self.reason: UnreadableReason = reason


class Prepared(NamedTuple):
    """A decoded picture."""

    pixels: Pixels
    """uint8 [size, size, 3], RGB."""
    width: int
    """Width of the source after EXIF orientation, in pixels."""
    height: int
    """Height of the source after EXIF orientation, in pixels."""
    animated: bool
    """Whether the file holds more than one frame; the first one is used."""


def preprocess(data: bytes, spec: PreprocessSpec, limits: DecodeLimits = DEFAULT_LIMITS) -> Prepared:
    """Decode, orient, convert to RGB and resize one encoded picture.

    Greyscale, palette, CMYK, 16-bit and transparent pictures are converted; of an animation the first frame counts;
    embedded colour profiles are ignored (sRGB is assumed).

    Raises `UnreadablePictureError` when the bytes are no usable picture.
    """
    if not data:
        raise UnreadablePictureError("IMAGE_EMPTY", "the picture is empty (0 bytes): send the encoded file's bytes")
    if len(data) > limits.max_bytes:
        raise UnreadablePictureError(
            "IMAGE_TOO_LARGE",
            f"the picture has {len(data):,} bytes, at most {limits.max_bytes:,} are accepted: shrink it first",
        )
    try:
        return _decode(data, spec, limits)
    except UnreadablePictureError:
        raise
    except UnidentifiedImageError:
        raise UnreadablePictureError(
            "IMAGE_UNDECODABLE",
            f"the bytes are not a picture in a supported format ({', '.join(_formats())})",
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:  # Pillow's own check comes before ours
        pixels = re.search(r"\d{6,}", str(e))
        raise UnreadablePictureError(
            "IMAGE_TOO_LARGE",
            f"the picture has {int(pixels[0]) if pixels else MAX_PIXELS + 1:,} pixels, at most {limits.max_pixels:,} are "
            "accepted: shrink it first",
        ) from None
    except MemoryError:
        raise UnreadablePictureError(
            "IMAGE_TOO_LARGE", "the picture needs more memory than there is: shrink it first"
        ) from None
    except Exception as e:  # damaged files make Pillow's decoders raise anything, RuntimeError and KeyError included
        raise UnreadablePictureError("IMAGE_UNDECODABLE", f"the picture is damaged ({e}): replace the file") from None


def whole_picture(data: bytes, longer_side: int, limits: DecodeLimits = DEFAULT_LIMITS) -> Image.Image:
    """The whole picture, aspect kept, its longer side `longer_side` px: `fit` pad without its padding.

    Raises `UnreadablePictureError`.
    """
    done = preprocess(data, PreprocessSpec(size=longer_side, fit="pad"), limits)
    scale = longer_side / max(done.width, done.height)
    width, height = (min(longer_side, max(1, round(side * scale))) for side in (done.width, done.height))
    left, top = (longer_side - width) // 2, (longer_side - height) // 2
    return Image.fromarray(done.pixels[top : top + height, left : left + width])


def thumbnail_of(data: bytes, longer_side: int, limits: DecodeLimits = DEFAULT_LIMITS) -> bytes:
    """A small JPEG of the whole picture, its longer side `longer_side` px. Raises `UnreadablePictureError`."""
    buffer = io.BytesIO()
    whole_picture(data, longer_side, limits).save(buffer, "JPEG", quality=THUMBNAIL_QUALITY)
    return buffer.getvalue()


@functools.cache
def _formats() -> tuple[str, ...]:
    """`FORMATS` as far as this build of Pillow has them."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _decode(data: bytes, spec: PreprocessSpec, limits: DecodeLimits) -> Prepared:
    with Image.open(io.BytesIO(data), formats=_formats()) as image:
        width, height = image.size
        if width * height > limits.max_pixels:
            raise UnreadablePictureError(
                "IMAGE_TOO_LARGE",
                f"the picture is {width}×{height} = {width * height:,} pixels, at most {limits.max_pixels:,} are "
                "accepted: shrink it first",
            )
        if min(width, height) < limits.min_side:
            raise UnreadablePictureError(
                "IMAGE_TOO_SMALL",
                f"the picture is {width}×{height} pixels, at least {limits.min_side}×{limits.min_side} are needed",
            )
        animated = image.format in ("GIF", "WEBP", "PNG", "AVIF") and bool(getattr(image, "is_animated", False))
        if spec.scaled_jpeg and image.format in ("JPEG", "MPO"):
            scale = spec.size / (max(width, height) if spec.fit == "pad" else min(width, height))
            wanted = (max(1, int(np.ceil(width * scale))), max(1, int(np.ceil(height * scale))))
            image.draft(None, wanted)
        image.load()
        orientation = _orientation(image)  # after loading: Pillow turns TIFFs by itself, and then says so
        colours = _to_rgb(image)
    if orientation in _TRANSPOSE:
        colours = colours.transpose(_TRANSPOSE[orientation])
        if orientation >= 5:
            width, height = height, width
    fitted = _fit(colours, spec)
    if fitted.mode == "RGBA":  # after shrinking: a large picture is never held in more copies than needed
        fitted = Image.alpha_composite(Image.new("RGBA", fitted.size, (*spec.background, 255)), fitted).convert("RGB")
    return Prepared(np.array(fitted), width, height, animated)


def _orientation(image: ImageFile.ImageFile) -> int:
    """The EXIF orientation, 1 (upright) where the metadata is absent or damaged."""
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # damaged metadata, of which Pillow raises anything
        return 1


# 16-bit grey to 8 bits.
_TO_8_BITS = np.rint(np.arange(65536) * (255 / 65535)).astype(np.uint8)


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB, or RGBA where the picture has transparency."""
    if image.mode.startswith("I"):  # 16-bit grey, in whichever of Pillow's modes it arrives
        image = Image.fromarray(_TO_8_BITS[np.clip(np.asarray(image), 0, 65535)])
    elif image.mode == "F":  # float pictures span 0…1 or 0…255
        values = np.nan_to_num(np.asarray(image))
        scale = 255.0 if float(values.max(initial=0.0)) <= 1.0 else 1.0
        image = Image.fromarray(np.clip(np.rint(values * scale), 0, 255).astype(np.uint8))
    mode = "RGBA" if image.has_transparency_data else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _fit(colours: Image.Image, spec: PreprocessSpec) -> Image.Image:
    size, (width, height) = spec.size, colours.size
    if spec.fit == "squeeze":
        return colours.resize((size, size), Image.Resampling.BICUBIC)
    if spec.fit == "crop":
        # The centred square of the source, in fractional source pixels: one resampling, no intermediate.
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
        return colours.resize((size, size), Image.Resampling.BICUBIC, box=box)
    scale = size / max(width, height)
    new = (max(1, round(width * scale)), max(1, round(height * scale)))
    canvas = Image.new(colours.mode, (size, size), spec.background)
    canvas.paste(colours.resize(new, Image.Resampling.BICUBIC), ((size - new[0]) // 2, (size - new[1]) // 2))
    return canvas


class PictureFile(NamedTuple):
    """A picture file below a folder."""

    key: str
    """Path relative to the folder, with `/`, in Unicode NFC: the item's key (architecture 3.3)."""
    path: Path
    """Where it lies."""
    size: int
    """Bytes."""
    mtime_ns: int
    """Time of last change, in nanoseconds since 1970."""

    @property
    def folder(self) -> str:
        """The first folder of the key (a label where pictures are sorted into class folders), or ''."""
        return first_folder(self.key)

    @property
    def uri(self) -> str:
        """Where it lies; of a link: where that lies, not where it leads."""
        return file_uri(self.path)

    def read(self, limits: DecodeLimits = DEFAULT_LIMITS) -> bytes:
        """The file's bytes. Raises `UnreadablePictureError` when it is too large, or (from the `OSError`) cannot be read."""
        if self.size > limits.max_bytes:
            raise UnreadablePictureError(
                "IMAGE_TOO_LARGE",
                f"the picture has {self.size:,} bytes, at most {limits.max_bytes:,} are accepted: shrink it first",
            )
        try:
            return self.path.read_bytes()
        except OSError as e:
            raise UnreadablePictureError("IMAGE_UNDECODABLE", f"the file cannot be read ({e.strerror})") from e


def file_uri(path: Path) -> str:
    """`file:///…` of a path whose last part is not followed where it is a link."""
    return (_resolved(path.parent.absolute()) / path.name).as_uri()


@functools.lru_cache(4096)
def _resolved(folder: Path) -> Path:
    return folder.resolve()


def first_folder(key: str) -> str:
    """The first folder of a key, or ''."""
    return key.split("/", 1)[0] if "/" in key else ""


def find_pictures(folder: Path, unreadable: list[tuple[str, str]] | None = None) -> list[PictureFile]:
    """The picture files below `folder` (by suffix, hidden ones left out), sorted by key.

    Symbolic links to files are followed, links to folders are not. Folders that cannot be listed, and files of which not
    even the size can be read, are skipped and appended to `unreadable` with the reason. Bytes of a name that are not UTF-8
    become U+FFFD in the key.
    """
    found: dict[str, PictureFile] = {}
    unreadable = [] if unreadable is None else unreadable
    for path in _walk(folder, folder, unreadable):
        if path.suffix.lower() not in SUFFIXES:
            continue
        try:
            status = path.stat()
        except OSError as e:
            if e.errno != errno.ENOENT or path.is_symlink():  # no rights, a link that leads nowhere: not gone
                unreadable.append((key_of(path, folder), f"the file cannot be read ({e.strerror})"))
            continue
        if not stat.S_ISREG(status.st_mode):
            continue
        key = key_of(path, folder)
        while key in found:  # two spellings of one name
            key += "~"
        found[key] = PictureFile(key, path, status.st_size, status.st_mtime_ns)
    return sorted(found.values(), key=lambda picture: picture.key)


def key_of(path: Path, folder: Path) -> str:
    """The key of a file below a folder."""
    relative = path.relative_to(folder).as_posix()
    return unicodedata.normalize("NFC", os.fsencode(relative).decode("utf-8", "replace"))


def _walk(folder: Path, root: Path, unreadable: list[tuple[str, str]]) -> Iterator[Path]:
    try:
        with os.scandir(folder) as entries:
            listed = sorted((e.name, e.is_dir(follow_symlinks=False)) for e in entries if not e.name.startswith("."))
    except OSError as e:
        if folder == root:
            raise
        unreadable.append((key_of(folder, root), f"the folder cannot be listed ({e.strerror})"))
        return
    for name, is_folder in listed:
        if is_folder:
            yield from _walk(folder / name, root, unreadable)
        else:
            yield folder / name
