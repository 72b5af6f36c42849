"""The gRPC server: assembly, readiness, graceful stop."""

from __future__ import annotations

import asyncio
import resource
import signal
import sys
from collections.abc import Callable
from importlib import metadata

import grpc
import numpy as np
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from rich.console import Console

from export.bundle import Bundle, RefusalError
from export.preprocess import Pixels
from export.runtime import canary_pixels
from service.config import Serve
from service.decoding import ProcessDecoder, ThreadDecoder
from service.encoder import Encoder
from service.errors import InternalError
from service.gpu_index import keep_to_cpu
from service.metrics import Metrics
from service.pb import likewise_pb2 as pb
from service.pb import likewise_pb2_grpc as pb_grpc
from service.pipeline import Pipeline
from service.search import SearchService
from service.searching import Searcher
from service.servicer import CollectionService, EncoderService, Engine, ErrorInterceptor
from service.store import Store

SERVICES = tuple(service.full_name for service in pb.DESCRIPTOR.services_by_name.values())
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_SERVING = health_pb2.HealthCheckResponse.SERVING


def serve(asked: Serve) -> int:
    """Run `likewise serve` until SIGTERM or SIGINT. Raises `RefusalError`."""
    # Each collection keeps some ten files open; shells allow 1,024 at first and far more on request.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return asyncio.run(_serve(asked))


async def _serve(asked: Serve) -> int:
    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    server = Server(asked, console.print)
    await server.start()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    names = ", ".join(f"{c.name} ({len(c):,})" for c in server.engine.store.all()) or "none yet"
    encoder = server.engine.encoder
    runtime = encoder.runtime
    console.print(
        f"serving {encoder.space_id} on {asked.host}:{server.port}   {runtime.variant} on {runtime.provider} "
        f"({runtime.provider_reason})   collections: {names}"
    )
    if asked.metrics_port:
        console.print(f"metrics on http://{asked.host}:{asked.metrics_port}/metrics")
    await stop.wait()
    console.print("draining")
    await server.stop()
    console.print("stopped")
    return 0


class Server:
    """A server in this process's event loop; tests and `serve` use it alike.

    Attributes: `engine`, `port` (after `start`).
    """

    def __init__(self, asked: Serve, say: Callable[[str], None] = lambda _: None) -> None:
        """Load everything; `say` hears what is measured. Raises `RefusalError`."""
        self._asked = asked
        if asked.device == "cpu":
            keep_to_cpu()
        bundle = Bundle.open(asked.bundle)
        metrics = Metrics()
        encoder = Encoder(bundle, asked, say)
        store = Store(asked.collections, bundle.space_id, bundle.dim)
        metrics.watch(store)
        metrics.build_info.labels(
            version=metadata.version("likewise"), space_id=bundle.space_id, provider=encoder.runtime.provider
        ).set(1)
        self._decoder: ThreadDecoder | ProcessDecoder = ThreadDecoder(encoder)
        if asked.decoders == "processes":
            spec, workers = bundle.manifest.preprocess, self._decoder.workers
            self._decoder = ProcessDecoder(spec, asked.limits, workers, asked.decode_seconds)
        pipeline = Pipeline(
            self._decoder.decode, self._decoder.workers, encoder.embed, asked.max_batch, asked.max_wait_ms / 1000,
            asked.queue_limit, metrics,
        )  # fmt: skip
        searcher = Searcher(encoder.runtime.threads, asked.search_limit, metrics)
        self.engine = Engine(encoder, pipeline, searcher, store, metrics)
        self._canary: Pixels = canary_pixels(bundle)[0]
        self._expected = np.asarray(bundle.manifest.canary[0].embedding, np.float32)
        self._floor = bundle.manifest.variants[encoder.runtime.variant].floor(encoder.runtime.provider)
        self._health = health.aio.HealthServicer()
        self._checks: asyncio.Task[None] | None = None
        self.port = 0

    async def start(self) -> None:
        """Listen; ready once the canary came back right. Raises `RefusalError` when a port is taken."""
        asked = self._asked
        size = asked.max_message_mb * 2**20
        self._server = grpc.aio.server(
            interceptors=[ErrorInterceptor(self.engine.metrics)],
            options=[
                ("grpc.max_receive_message_length", size),
                ("grpc.max_send_message_length", size),
                ("grpc.so_reuseport", 0),  # a second server on the port must fail, not share it
            ],
        )
        pb_grpc.add_EncoderServiceServicer_to_server(EncoderService(self.engine), self._server)
        pb_grpc.add_SearchServiceServicer_to_server(SearchService(self.engine), self._server)
        pb_grpc.add_CollectionServiceServicer_to_server(CollectionService(self.engine), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        try:
            self.port = self._server.add_insecure_port(f"{asked.host}:{asked.port}")
        except RuntimeError:
            self._close()
            raise RefusalError(
                f"{asked.host}:{asked.port} cannot be opened: another server has the port, or the address is not of this "
                "machine; stop that one, or pass another --port or --host"
            ) from None
        if asked.metrics_port:
            try:
                self.engine.metrics.serve(asked.host, asked.metrics_port)
            except RefusalError:
                self._close()
                raise
        self.engine.pipeline.start()
        await self._set_ready(await self._check())
        await self._server.start()
        self._checks = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Answer NOT_SERVING, drain, finish what is in flight, close the store."""
        if self._checks is not None:
            self._checks.cancel()
        await self._health.enter_graceful_shutdown()
        self.engine.metrics.ready.set(0)
        await asyncio.sleep(self._asked.drain_seconds)
        await self._server.stop(self._asked.grace_seconds)
        await self.engine.pipeline.stop()
        await asyncio.get_running_loop().run_in_executor(None, self._close)

    def _close(self) -> None:
        self._decoder.close()
        self.engine.close()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._asked.check_seconds)
            await self._set_ready(await self._check())

    async def _check(self) -> bool:
        """One canary picture through the encoder, and its vector through every collection, within the interval."""
        try:
            async with asyncio.timeout(self._asked.check_seconds):
                vector = (await self.engine.pipeline.embed(self._canary)).vector
                for collection in self.engine.store.all():
                    expected = min(1, len(collection))
                    (hits,) = await self.engine.read(collection.search, vector[None], 1)
                    if (len(hits) < expected and len(collection) > 0) or any(not abs(h.score) <= 1 for h in hits):
                        raise InternalError(f"the collection {collection.name!r} does not answer the canary query")
        except Exception as e:  # whatever it is, the answer is "not ready", and the next check comes
            said = "it took too long" if isinstance(e, TimeoutError) else f"{type(e).__name__}: {e}"
            print(f"likewise: not ready, the canary failed: {said}", file=sys.stderr, flush=True)
            return False
        return float(vector @ self._expected) >= self._floor

    async def _set_ready(self, ready: bool) -> None:
        for name in ("", *SERVICES):
            await self._health.set(name, _SERVING if ready else _NOT_SERVING)
        self.engine.metrics.ready.set(ready)
