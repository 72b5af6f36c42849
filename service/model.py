"""An encoder behind its pipeline, as a server embeds with it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from export.bundle import Bundle, Embeddings
from export.preprocess import Pixels
from export.runtime import canary_pixels
from service.config import Serve
from service.decoding import ProcessDecoder, ThreadDecoder
from service.encoder import Encoder
from service.errors import InternalError
from service.metrics import Metrics
from service.pipeline import Embedded, Pipeline
from service.served import Uses


class Model:
    """An encoder behind its pipeline: one embedding space of a server.

    Attributes: `encoder`, `pipeline`, `uses` (the calls that embed with it).
    """

    def __init__(
        self, bundle: Bundle, asked: Serve, metrics: Metrics, charge: Callable[[str, int], None] | None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:  # fmt: skip
        """Loads the graph and checks its canary; `charge` is told of pictures before they are admitted. Raises
        `RefusalError`."""
        self.encoder = encoder = Encoder(bundle, asked, say)
        self._decoder: ThreadDecoder | ProcessDecoder = ThreadDecoder(encoder)
        if asked.decoders == "processes":
            spec, workers = bundle.manifest.preprocess, self._decoder.workers
            self._decoder = ProcessDecoder(spec, asked.limits, workers, asked.decode_seconds)
        self.pipeline = Pipeline(
            self._decoder.decode, self._decoder.workers, encoder.embed, asked.max_batch, asked.max_wait_ms / 1000,
            asked.queue_limit, metrics, encoder.runtime.lanes,
        )  # fmt: skip
        if charge is not None:
            self.pipeline.admission.charge = charge
        self.uses = Uses()
        self._canary: Pixels = canary_pixels(bundle)[0]
        self._expected = np.asarray(bundle.manifest.canary[0].embedding, np.float32)
        self._floor = bundle.manifest.variants[encoder.runtime.variant].floor(encoder.runtime.provider)
        self.pipeline.watch(self._canary, self._is_right)

    @property
    def space_id(self) -> str:
        """The space of its vectors."""
        return self.encoder.space_id

    async def check(self) -> Embedded:
        """The canary picture's vector. Raises `ServiceError` where it is not what it should be."""
        found = await self.pipeline.embed(self._canary)
        self.pipeline.sound = self._is_right(found.vector)
        if not self.pipeline.sound:
            raise InternalError(f"the encoder {self.space_id} makes another vector of the canary than the bundle says")
        return found

    def _is_right(self, vector: Embeddings) -> bool:
        return float(vector @ self._expected) >= self._floor

    async def stop(self) -> None:
        """Once nobody uses it: stop the pipeline, and free the encoder."""
        await self.uses.ended()
        await self.pipeline.stop()
        self.close()

    def close(self) -> None:
        """Free what it holds; the pipeline has been stopped, or was never started."""
        self._decoder.close()
        self.encoder.close()
