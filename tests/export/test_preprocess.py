"""Every kind of picture that users have, and every kind of file that is none."""

from __future__ import annotations

import os
import struct
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from export.preprocess import (
    DecodeLimits,
    PreprocessSpec,
    UnreadablePictureError,
    find_pictures,
    preprocess,
    whole_picture,
)
from tests.conftest import encode, noise

SPEC = PreprocessSpec(size=32)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims to be huge in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "reason", "words"),
    [
        (b"", "IMAGE_EMPTY", "0 bytes"),
        (b"just some text\n", "IMAGE_UNDECODABLE", "not a picture in a supported format (JPEG"),
        (encode(noise(64, 64))[:900], "IMAGE_UNDECODABLE", "damaged"),
        (encode(noise(1, 1), "PNG"), "IMAGE_TOO_SMALL", "1×1 pixels, at least 4×4"),
        (png_header(30_000, 30_000), "IMAGE_TOO_LARGE", "900,000,000 pixels, at most 89,478,485"),
        (png_header(9_600, 9_600), "IMAGE_TOO_LARGE", "pixels, at most 89,478,485"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "IMAGE_UNDECODABLE", "not a picture"),
    ],
)
def test_unusable_pictures_get_a_reason_and_a_sentence(data: bytes, reason: str, words: str) -> None:
    with pytest.raises(UnreadablePictureError, match=None) as caught:
        preprocess(data, SPEC)
    assert caught.value.reason == reason and words in str(caught.value)


def test_limits_are_the_callers() -> None:
    data = encode(noise(50, 40), "PNG")
    for limits, words in (
        (DecodeLimits(max_bytes=100), "at most 100"),
        (DecodeLimits(max_pixels=1999), "50×40 = 2,000 pixels"),
        (DecodeLimits(min_side=41), "at least 41×41"),
    ):
        with pytest.raises(UnreadablePictureError, match=words):
            preprocess(data, SPEC, limits)


def test_every_kind_of_picture_becomes_rgb() -> None:
    base = noise(80, 60)
    palette = base.convert("P", palette=Image.Palette.ADAPTIVE)
    grey16 = Image.fromarray(np.asarray(base.convert("L")).astype(np.uint16) * 257)
    cases = {
        "jpeg": encode(base, quality=95),
        "png": encode(base, "PNG"),
        "webp": encode(base, "WEBP", lossless=True),
        "bmp": encode(base, "BMP"),
        "tiff": encode(base, "TIFF"),
        "cmyk": encode(base.convert("CMYK"), quality=95),
        "palette": encode(palette, "PNG"),
        "gif": encode(palette, "GIF", save_all=True, append_images=[palette.rotate(90 * i) for i in (1, 2, 3)]),
        "opaque rgba": encode(base.convert("RGBA"), "PNG"),
    }
    expected = preprocess(encode(base, "PNG"), SPEC).pixels.astype(int)
    for name, data in cases.items():
        prepared = preprocess(data, SPEC)
        assert prepared.pixels.shape == (32, 32, 3) and prepared.pixels.dtype == np.uint8
        assert np.abs(prepared.pixels - expected).mean() < 6, name
        assert (prepared.width, prepared.height) == (80, 60)
        assert prepared.animated == (name == "gif")
    grey = preprocess(encode(base.convert("L"), "PNG"), SPEC).pixels.astype(int)
    assert np.abs(preprocess(encode(grey16, "PNG"), SPEC).pixels - grey).mean() < 1.5  # 16 bits
    assert (grey[..., 0] == grey[..., 1]).all()


def test_transparency_is_laid_on_the_background() -> None:
    clear = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    assert (preprocess(encode(clear, "PNG"), SPEC).pixels == 255).all()
    black = PreprocessSpec(size=32, background=(0, 0, 0))
    assert (preprocess(encode(clear, "PNG"), black).pixels == 0).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = noise(96, 64, seed=3)
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,  # stored turned left, shown turned right
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = upright if undo is None else upright.transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    expected = preprocess(encode(upright, "PNG"), SPEC).pixels.astype(int)
    for kind in ("PNG", "TIFF", "WEBP", "JPEG", "AVIF"):
        options = {"lossless": True} if kind == "WEBP" else {} if kind in ("PNG", "TIFF") else {"quality": 95}
        prepared = preprocess(encode(stored, kind, exif=exif, **options), SPEC)
        assert np.abs(prepared.pixels - expected).mean() < 4, kind
        assert (prepared.width, prepared.height) == (96, 64), kind


def test_fit_crops_the_centre_or_pads() -> None:
    wide = Image.new("RGB", (90, 30), (0, 0, 255))
    wide.paste((255, 0, 0), (30, 0, 60, 30))  # the centre is red
    data = encode(wide, "PNG")
    crop = preprocess(data, SPEC).pixels
    assert (crop[:, 2:-2, 0] > 250).all()
    pad = preprocess(data, PreprocessSpec(size=30, fit="pad")).pixels
    assert (pad[:9] == 255).all() and (pad[21:] == 255).all()
    assert (pad[14, 14] == (255, 0, 0)).all() and (pad[14, 2] == (0, 0, 255)).all()


def test_scaled_decoding_stays_close_and_belongs_to_the_identity() -> None:
    data = encode(noise(640, 480), quality=92)
    fast, slow = PreprocessSpec(size=64), PreprocessSpec(size=64, scaled_jpeg=False)
    difference = np.abs(preprocess(data, fast).pixels.astype(int) - preprocess(data, slow).pixels)
    assert difference.mean() < 3
    assert fast.sha256() != slow.sha256()


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns of damaged metadata
@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_bytes_never_escape_as_another_error(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "AVIF"]))
    raw = bytearray(encode(noise(24, 16), kind))
    for _ in range(data.draw(st.integers(1, 8))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(1, len(raw)))
    try:
        pixels = preprocess(bytes(raw[:cut]), SPEC).pixels
    except UnreadablePictureError as e:
        assert str(e)
    else:
        assert pixels.shape == (32, 32, 3)


def test_pictures_are_found_by_key(tmp_path: Path) -> None:
    folder = tmp_path / "my pictures ü"
    decomposed = unicodedata.normalize("NFD", "crème brûlée")
    (folder / decomposed).mkdir(parents=True)
    (folder / "a b").mkdir()
    for name in (f"{decomposed}/1.JPG", "a b/é.png", "top.webp", ".hidden.png", "notes.txt"):
        (folder / name).write_bytes(b"x")
    (folder / "link.png").symlink_to(folder / "top.webp")
    (folder / "dangling.png").symlink_to(folder / "nothing")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    os.mkfifo(folder / "pipe.png")
    found = find_pictures(folder)
    assert [p.key for p in found] == ["a b/é.png", "crème brûlée/1.JPG", "link.png", "top.webp"]
    assert [p.folder for p in found] == ["a b", "crème brûlée", "", ""]
    assert all(p.path.is_file() for p in found)


def test_two_spellings_of_one_name_get_two_keys(tmp_path: Path) -> None:
    for form in ("NFC", "NFD"):
        (tmp_path / f"{unicodedata.normalize(form, 'é')}.png").write_bytes(b"x")
    keys = [p.key for p in find_pictures(tmp_path)]
    assert len(keys) == len(set(keys)) == 2


def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "sparse.jpg").open("wb") as file:
        file.truncate(3 * 2**30)
    (picture,) = find_pictures(tmp_path)
    with pytest.raises(UnreadablePictureError, match="3,221,225,472 bytes, at most 67,108,864"):
        picture.read()


def test_a_folder_that_cannot_be_listed_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "open.png").write_bytes(b"x")
    real = os.scandir

    def scandir(path: object) -> object:
        if str(path).endswith("closed"):  # root may list everything, so the refusal is made here
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    unreadable: list[tuple[str, str]] = []
    assert [p.key for p in find_pictures(tmp_path, unreadable)] == ["open.png"]
    assert unreadable == [("closed", "the folder cannot be listed (Permission denied)")]


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (33, 33), (200, 7)])
def test_a_whole_picture_is_not_padded(size: tuple[int, int]) -> None:
    image = whole_picture(encode(Image.new("RGB", size, (0, 90, 0)), "PNG"), 50)
    assert max(image.size) == 50
    assert image.width / image.height == pytest.approx(size[0] / size[1], rel=0.15)
    assert (np.asarray(image) == (0, 90, 0)).all()  # no white border
