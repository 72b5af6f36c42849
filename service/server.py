"""The gRPC server: assembly, readiness, graceful stop."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import resource
import signal
from collections.abc import Callable, Coroutine
from importlib import metadata
from typing import Any

import grpc
import numpy as np
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from export.bundle import Bundle, RefusalError
from export.preprocess import Pixels
from export.runtime import canary_pixels
from service import logs
from service.config import Serve
from service.decoding import ProcessDecoder, ThreadDecoder
from service.encoder import Encoder
from service.errors import InternalError
from service.gpu_index import keep_to_cpu
from service.interceptor import CallInterceptor
from service.items import CollectionService
from service.logs import LOG
from service.metrics import Metrics
from service.pb import likewise_pb2 as pb
from service.pb import likewise_pb2_grpc as pb_grpc
from service.pipeline import Pipeline
from service.search import SearchService
from service.searching import Searcher
from service.security import Guard, server_credentials
from service.servicer import EncoderService, Engine
from service.store import Store
from service.tracing import Tracing, tracing

SERVICES = tuple(service.full_name for service in pb.DESCRIPTOR.services_by_name.values())
# Health of the process as such: answered by the event loop alone, whatever the encoder and the collections do.
LIVENESS = "liveness"
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_SERVING = health_pb2.HealthCheckResponse.SERVING


def serve(asked: Serve) -> int:
    """Run `likewise serve` until SIGTERM or SIGINT. Raises `RefusalError`."""
    # Each collection keeps some ten files open; shells allow 1,024 at first and far more on request.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return _run(_serve(asked))


def _run(work: Coroutine[Any, Any, int]) -> int:
    """In uvloop's event loop where it is installed, extra [fast]: a call is some twenty turns of callbacks."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(work)
    found: int = uvloop.run(work)
    return found


async def _serve(asked: Serve) -> int:
    logs.set_up(asked.log_format)
    server = Server(asked, LOG.info)
    await server.start()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _stop, stop, number)
    loop.add_signal_handler(signal.SIGHUP, server.reload)
    names = ", ".join(f"{c.name} ({len(c):,})" for c in server.engine.store.all()) or "none yet"
    encoder = server.engine.encoder
    runtime = encoder.runtime
    if asked.admin_port is not None:
        LOG.info("admin methods on %s:%s", asked.admin_host, server.admin_port)
    if server.is_open_to_all:
        LOG.warning(
            "%s can be reached from other machines, and everybody may do everything: give --keys or --tls.client-ca, or see "
            "that only your own network reaches it", asked.host, extra={"event": "open"},
        )  # fmt: skip
    elif asked.keys is not None and asked.tls.certificate is None and not _is_loopback(asked.host):
        LOG.warning(
            "keys travel unencrypted: give --tls.certificate and --tls.key, or put a proxy with TLS in front",
            extra={"event": "plain"},
        )
    LOG.info(
        "serving %s on %s:%s   %s on %s (%s)   collections: %s", encoder.space_id, asked.host, server.port,
        runtime.variant, runtime.provider, runtime.provider_reason, names,
        extra={"event": "serving", "fields": {"port": server.port, "admin_port": server.admin_port}},
    )  # fmt: skip
    if asked.metrics_port:
        LOG.info("metrics on http://%s:%s/metrics", asked.host, asked.metrics_port)
    await stop.wait()
    LOG.info("draining", extra={"event": "draining"})
    await server.stop()
    LOG.info("stopped", extra={"event": "stopped"})
    return 0


def _stop(stop: asyncio.Event, number: int) -> None:
    """The first signal drains. The second ends this process at once: what was acknowledged is on the disk."""
    if stop.is_set():
        LOG.warning("a second signal: calls in flight are cut off", extra={"event": "killed"})
        os._exit(128 + number)
    stop.set()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class Server:
    """A server in this process's event loop; tests and `serve` use it alike.

    Attributes: `engine`, `port` and `admin_port` (after `start`).
    """

    def __init__(
        self, asked: Serve, say: Callable[[str], None] = lambda _: None, traces: Tracing | None = None
    ) -> None:
        """Load everything; `say` hears what is measured; `traces` where they are not those that `asked` names. Raises
        `RefusalError`."""
        self._asked = asked
        metrics = Metrics()
        # What is wrong with these is said before the bundle is loaded.
        self._credentials = server_credentials(asked.tls)
        self._guard = None if asked.keys is None else Guard(asked.keys, metrics)
        self._traces = traces or tracing(asked)
        if asked.device == "cpu":
            keep_to_cpu()
        bundle = Bundle.open(asked.bundle)
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
        if self._guard is not None:
            pipeline.admission.charge = self._guard.charge_pictures
        searcher = Searcher(encoder.runtime.threads, asked.search_limit, metrics)
        self.engine = Engine(encoder, pipeline, searcher, store, metrics, asked.snapshots)
        self._canary: Pixels = canary_pixels(bundle)[0]
        self._expected = np.asarray(bundle.manifest.canary[0].embedding, np.float32)
        self._floor = bundle.manifest.variants[encoder.runtime.variant].floor(encoder.runtime.provider)
        self._health = health.aio.HealthServicer()
        self._checks: asyncio.Task[None] | None = None
        self.port = 0
        self.admin_port: int | None = None

    @property
    def is_open_to_all(self) -> bool:
        """Whether other machines reach it, and may do everything."""
        known = self._guard is not None or self._asked.tls.client_ca is not None
        return not known and not _is_loopback(self._asked.host)

    def reload(self) -> None:
        """Read the keys again, where there are any."""
        if self._guard is None:
            return
        try:
            self._guard.reload()
        except RefusalError as e:
            LOG.error("the keys stay as they were: %s", e, extra={"event": "reload"})
        else:
            LOG.info("%d keys were read", len(self._guard), extra={"event": "reload"})

    async def start(self) -> None:
        """Listen; ready once the canary came back right. Raises `RefusalError` when a port is taken."""
        asked = self._asked
        self._servers = [self._made(admin=False)]
        self.port = self._opened(self._servers[0], asked.host, asked.port, "--port or --host")
        if asked.admin_port is not None:
            self._servers.append(self._made(admin=True))
            self.admin_port = self._opened(
                self._servers[1], asked.admin_host, asked.admin_port, "--admin-port or --admin-host"
            )
        if asked.metrics_port:
            try:
                self.engine.metrics.serve(asked.host, asked.metrics_port)
            except RefusalError:
                self._close()
                raise
        self.engine.pipeline.start()
        await self._health.set(LIVENESS, _SERVING)
        await self._set_ready(await self._check())
        for server in self._servers:
            await server.start()
        self._checks = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Answer NOT_SERVING, drain, finish what is in flight, close the store."""
        if self._checks is not None:
            self._checks.cancel()
            await asyncio.gather(self._checks, return_exceptions=True)
        await self._set_ready(False)  # and alive: nobody should kill what drains
        await asyncio.sleep(self._asked.drain_seconds)
        self.engine.drain()
        await asyncio.gather(*(server.stop(self._asked.grace_seconds) for server in self._servers))
        await self.engine.pipeline.stop()
        await asyncio.get_running_loop().run_in_executor(None, self._close)

    def _made(self, admin: bool) -> grpc.aio.Server:
        """A server of everything, or of what its port answers."""
        asked, metrics = self._asked, self.engine.metrics
        size = asked.max_message_mb * 2**20
        calls = CallInterceptor(
            metrics, self._guard, self._traces, asked.log_format == "json" if asked.log_calls is None else asked.log_calls,
            admin_elsewhere=asked.admin_port is not None and not admin, certificates=asked.tls.client_ca is not None,
        )  # fmt: skip
        server = grpc.aio.server(
            interceptors=[calls],
            options=[
                ("grpc.max_receive_message_length", size),
                ("grpc.max_send_message_length", size),
                ("grpc.so_reuseport", 0),  # a second server on the port must fail, not share it
                *asked.connections.options(),
            ],
        )
        pb_grpc.add_EncoderServiceServicer_to_server(EncoderService(self.engine), server)
        pb_grpc.add_SearchServiceServicer_to_server(SearchService(self.engine), server)
        pb_grpc.add_CollectionServiceServicer_to_server(CollectionService(self.engine), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if asked.reflection == "on" or (asked.reflection == "admin" and admin):
            reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        return server

    def _opened(self, server: grpc.aio.Server, host: str, port: int, flags: str) -> int:
        """The port. Raises `RefusalError`."""
        try:
            if self._credentials is None:
                return server.add_insecure_port(f"{host}:{port}")
            return server.add_secure_port(f"{host}:{port}", self._credentials)
        except RuntimeError:
            self._close()
            raise RefusalError(
                f"{host}:{port} cannot be opened: another server has the port, or the address is not of this machine; stop "
                f"that one, or pass another {flags}"
            ) from None

    def _close(self) -> None:
        self._decoder.close()
        self.engine.close()
        if self._traces is not None:
            self._traces.close()

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
            LOG.warning("not ready, the canary failed: %s", said, extra={"event": "not_ready"})
            return False
        return float(vector @ self._expected) >= self._floor

    async def _set_ready(self, ready: bool) -> None:
        for name in ("", *SERVICES):
            await self._health.set(name, _SERVING if ready else _NOT_SERVING)
        self.engine.metrics.ready.set(ready)
