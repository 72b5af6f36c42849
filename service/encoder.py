"""Encoded pictures → unit vectors: decoding threads in front of the runtime."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

from export.bundle import Bundle, Embeddings
from export.machine import cpu_quota
from export.preprocess import (
    DEFAULT_LIMITS,
    DecodeLimits,
    Pixels,
    PreprocessSpec,
    UnreadablePictureError,
    preprocess,
    thumbnail_of,
)
from export.providers import GpuOptions
from export.shipped import is_shipped, licence
from export.tune import mixing_refusal, open_runtime
from service.config import Embedding

# Every picture of a build runs in a batch of this size or of its shard's remainder, so that a build that was killed
# and continued computes the same bits.
BUILD_BATCH = 32


class Decoded(NamedTuple):
    """Pixels, the time they took, and whether there are more frames than the first."""

    pixels: Pixels
    seconds: float
    animated: bool
    sha256: str = ""
    """Of the encoded bytes, where they came from a file."""
    thumbnail: bytes | None = None
    """JPEG of the whole picture, where one was asked for."""


def decode(data: bytes, spec: PreprocessSpec, limits: DecodeLimits, thumbnail: int | None = None) -> Decoded:
    """Pixels of an encoded picture, and a JPEG of it whose longer side has at most `thumbnail` pixels. Raises
    `UnreadablePictureError`."""
    start = time.perf_counter()
    prepared = preprocess(data, spec, limits)
    seconds, small = time.perf_counter() - start, None
    if thumbnail is not None:
        small = thumbnail_of(data, min(thumbnail, max(prepared.width, prepared.height)), limits)
    return Decoded(prepared.pixels, seconds, prepared.animated, thumbnail=small)


class Encoded(Protocol):
    """An encoded picture, such as those of sources."""

    def read(self, limits: DecodeLimits = DEFAULT_LIMITS) -> bytes:
        """Its bytes. Raises `UnreadablePictureError`."""


class Encoder:
    """A bundle that embeds pictures.

    Attributes: `bundle`, `runtime`, `limits`, `decoders` (the thread pool that decoding runs in).
    """

    def __init__(self, bundle: Bundle, asked: Embedding, say: Callable[[str], None] = lambda _: None) -> None:
        """Loads the graph and checks its canary; `say` hears what is measured. Raises `RefusalError`."""
        self.bundle = bundle
        if is_shipped(bundle.folder):
            say(
                f"the encoder {bundle.folder.name} comes with likewise; licence of its weights: {licence(bundle.folder)}"
            )
        self.limits = asked.limits
        gpu = GpuOptions(asked.gpu_memory, asked.cuda_graphs)
        self.runtime = open_runtime(
            bundle, asked.device, asked.threads, asked.variant, say, asked.require_provider, gpu
        )
        self.decoders = ThreadPoolExecutor(asked.threads or cpu_quota(), thread_name_prefix="decode")

    @property
    def space_id(self) -> str:
        """The space of its vectors."""
        return self.bundle.space_id

    @property
    def dim(self) -> int:
        """Their length."""
        return self.bundle.dim

    def decode(self, data: bytes, thumbnail: int | None = None) -> Decoded:
        """Pixels of an encoded picture, and a JPEG of it whose longer side has at most `thumbnail` pixels. Raises
        `UnreadablePictureError`."""
        return decode(data, self.bundle.manifest.preprocess, self.limits, thumbnail)

    def read(self, picture: Encoded, thumbnail: int | None = None) -> Decoded | UnreadablePictureError:
        """`decode` a picture, or the refusal as a value."""
        try:
            data = picture.read(self.limits)
            return self.decode(data, thumbnail)._replace(sha256=hashlib.sha256(data).hexdigest())
        except UnreadablePictureError as e:
            return e

    @property
    def origin(self) -> str:
        """What made its vectors: variant and provider."""
        return f"{self.runtime.variant}/{self.runtime.provider}"

    def mixing_refusal(self, stored: set[str]) -> str | None:
        """Why its vectors may not join a collection with vectors of `stored` origins; None where they may."""
        return mixing_refusal(self.bundle, self.origin, stored)

    def embed(self, pixels: Pixels) -> Embeddings:
        """uint8 [N, H, W, 3] → float32 [N, D], unit rows."""
        return self.runtime.embed(pixels)

    def close(self) -> None:
        """Stop the decoding threads."""
        self.decoders.shutdown(wait=False, cancel_futures=True)
