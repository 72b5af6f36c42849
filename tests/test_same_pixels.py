"""A picture becomes the same bytes wherever the product embeds it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from export.bundle import Bundle, Embeddings
from export.parity import measure_parity
from export.preprocess import Pixels, preprocess
from export.runtime import Runtime
from export.sample import read_sample
from likewise import main
from service.client import Client
from tests.conftest import encode, noise
from tests.service.running import Running


def kinds(seed: int) -> dict[str, bytes]:
    """One file of each kind that goes wrong somewhere."""
    base = noise(90, 70, seed)
    turned = Image.Exif()
    turned[0x0112] = 6
    grey16 = Image.fromarray(np.asarray(base.convert("L")).astype(np.uint16) * 257)
    alpha = base.convert("RGBA")
    alpha.putalpha(base.convert("L"))
    return {
        "exif.jpg": encode(base, exif=turned, quality=90),
        "cmyk.jpg": encode(base.convert("CMYK"), quality=90),
        "palette.png": encode(base.convert("P", palette=Image.Palette.ADAPTIVE), "PNG"),
        "16bit.png": encode(grey16, "PNG"),
        "grey.jpg": encode(base.convert("L"), quality=90),
        "alpha.png": encode(alpha, "PNG"),
        "odd.webp": encode(noise(33, 47, seed), "WEBP", quality=80),
        "wide.jpg": encode(noise(1200, 9, seed), quality=90),
        "tall.png": encode(noise(7, 900, seed), "PNG"),
        "large.jpg": encode(noise(1000, 750, seed), quality=90),  # decoded at a scale
        "progressive.jpg": encode(noise(300, 200, seed), quality=90, progressive=True),
    }


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], set[str]]]:
    """Hashes of the pixels that the runtime has embedded since the last call."""
    hashes: set[str] = set()
    real = Runtime.embed

    def embed(self: Runtime, images: Pixels) -> Embeddings:
        hashes.update(hashlib.sha256(row.tobytes()).hexdigest() for row in images)
        return real(self, images)

    monkeypatch.setattr(Runtime, "embed", embed)

    def take() -> set[str]:
        taken = set(hashes)
        hashes.clear()
        return taken

    yield take


def test_evaluation_parity_and_the_served_embed_see_the_same_pixels(
    bundle: Path, tmp_path: Path, seen: Callable[[], set[str]]
) -> None:
    folder = tmp_path / "pictures"
    files: list[bytes] = []
    for seed in (1, 2):
        (folder / f"class{seed}").mkdir(parents=True)
        for name, data in kinds(seed).items():
            (folder / f"class{seed}" / name).write_bytes(data)
            files.append(data)
    opened = Bundle.open(bundle)
    spec = opened.manifest.preprocess
    expected = {hashlib.sha256(preprocess(data, spec).pixels.tobytes()).hexdigest() for data in files}
    assert len(expected) == len(files)

    runtime = Runtime(opened, "cpu", 1)
    canary = seen()
    measure_parity(runtime.embed, runtime, read_sample(folder, spec).pixels)
    assert seen() - canary == expected

    flags = ["--threads", "1", "--device", "cpu", "--no-baselines", "--tasks", "retrieval"]
    assert main(["evaluate", str(bundle), str(folder), "--out", str(tmp_path / "out"), *flags]) == 0
    assert seen() - canary == expected

    out = tmp_path / "collections" / "all"
    built = ["--bundle", str(bundle), "--images", str(folder), "--out", str(out), "--threads", "1", "--device", "cpu"]
    assert main(["index", "build", *built]) == 0
    assert seen() - canary == expected

    server = Running(bundle=bundle, collections=out.parent, device="cpu", variant="fp32")
    try:
        seen()
        with Client(server.address) as client:
            rows = client.embed(files)
        assert all(isinstance(row, np.ndarray) for row in rows)
        assert seen() - canary == expected
    finally:
        server.stop()
