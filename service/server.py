"""The gRPC server: assembly, readiness, graceful stop."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import ipaddress
import os
import resource
import signal
from collections.abc import Callable, Coroutine
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from export.bundle import Bundle, Embeddings, RefusalError
from service import logs
from service.config import Serve
from service.errors import InternalError, NotFoundError
from service.follower import Follower
from service.following import Following
from service.gpu_index import keep_to_cpu
from service.in_process import InProcessServer
from service.interceptor import CallInterceptor
from service.items import CollectionService
from service.logs import LOG
from service.metrics import Metrics
from service.model import Model
from service.pb import likewise_pb2 as pb
from service.pb import likewise_pb2_grpc as pb_grpc
from service.reading import Readable
from service.release_service import ReleaseService
from service.releases import Releases
from service.search import SearchService
from service.searching import Searcher
from service.security import Guard, server_context, server_credentials
from service.servicer import EncoderService, Engine
from service.store import Store, read_pointers
from service.tracing import Tracing, tracing

if TYPE_CHECKING:
    from service.http_server import HttpServer

SERVICES = tuple(service.full_name for service in pb.DESCRIPTOR.services_by_name.values())
# Health of the process as such: answered by the event loop alone, whatever the encoder and the collections do.
LIVENESS = "liveness"
_M_MMAP_THRESHOLD = -3  # malloc.h
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_SERVING = health_pb2.HealthCheckResponse.SERVING


def serve(asked: Serve) -> int:
    """Run `likewise serve` until SIGTERM or SIGINT. Raises `RefusalError`."""
    # Each collection keeps some ten files open; shells allow 1,024 at first and far more on request.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    _give_memory_back()
    return _run(_serve(asked))


def _run(work: Coroutine[Any, Any, int]) -> int:
    """In uvloop's event loop where it is installed, extra [fast]: a call is some twenty turns of callbacks."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(work)
    found: int = uvloop.run(work)
    return found


def _give_memory_back() -> None:
    """Large blocks are mapped, and unmapped when they are freed. Else glibc raises its threshold up to 32 MiB by itself:
    after two dozen compactions of 5,000 items a server held 450 MiB instead of 250."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)


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
            "that only your own network reaches it", server.host_for_others, extra={"event": "open"},
        )  # fmt: skip
    elif asked.keys is not None and asked.tls.certificate is None and server.host_for_others is not None:
        LOG.warning(
            "keys travel unencrypted: give --tls.certificate and --tls.key, or put a proxy with TLS in front",
            extra={"event": "plain"},
        )
    LOG.info(
        "serving %s on %s:%s   %s on %s (%s)   collections: %s", encoder.space_id, asked.host, server.port,
        runtime.variant, runtime.provider, runtime.provider_reason, names,
        extra={"event": "serving", "fields": {"port": server.port, "admin_port": server.admin_port}},
    )  # fmt: skip
    if asked.http_port is not None:
        scheme = "http" if asked.tls.certificate is None else "https"
        LOG.info(
            "HTTP and JSON on %s://%s:%s", scheme, asked.http_host, server.http_port,
            extra={"event": "http", "fields": {"http_port": server.http_port}},
        )  # fmt: skip
    if asked.metrics_port:
        LOG.info("metrics on http://%s:%s/metrics", asked.host, asked.metrics_port)
    await stop.wait()
    LOG.info("draining", extra={"event": "draining"})
    await server.stop()
    LOG.info("stopped", extra={"event": "stopped"})
    return 0


def _http_server(asked: Serve, metrics: Metrics) -> HttpServer | None:
    """Raises `RefusalError`."""
    if asked.http_port is None:
        return None
    try:
        from service.http_server import HttpServer
    except ModuleNotFoundError as e:
        raise RefusalError(f"--http-port needs the package {e.name!r}: pip install 'likewise[http]'") from e
    return HttpServer(asked, metrics, server_context(asked.tls))


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


def _bundles(asked: Serve) -> list[Path]:
    """The server's own, the others, and those of the releases that collections are served from. Raises `RefusalError`."""
    live = {pointer.live for pointer in read_pointers(asked.collections).values() if pointer.live}
    if live and asked.releases is None:
        raise RefusalError(
            f"collections of {asked.collections} are served from the releases {', '.join(sorted(live))}: give the folder of "
            "releases with --releases"
        )
    folder = asked.releases or Path()
    return [asked.bundle, *asked.other_bundles, *(folder / name / "bundle" for name in sorted(live))]


class Server:
    """A server in this process's event loop; tests and `serve` use it alike.

    Attributes: `engine`, `port`, `admin_port` and `http_port` (after `start`).
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
        self._http = _http_server(asked, metrics)
        self._traces = traces or tracing(asked)
        if asked.device == "cpu":
            keep_to_cpu()
        charge = None if self._guard is None else self._guard.charge_pictures

        self._doubted = asyncio.Event()  # set when a batch found an encoder to be ill

        def model_of(bundle: Bundle, say: Callable[[str], None] = lambda _: None) -> Model:
            model = Model(bundle, asked, metrics, charge, say)
            model.pipeline.doubted = self._doubted
            return model

        models: dict[str, Model] = {}
        for folder in _bundles(asked):
            bundle = Bundle.open(folder)
            if bundle.space_id not in models:
                models[bundle.space_id] = model_of(bundle, say)
        store = Store(asked.collections, models, asked.releases, asked.follow)
        own = next(iter(models.values())).encoder
        metrics.build_info.labels(
            version=metadata.version("likewise"), space_id=own.space_id, provider=own.runtime.provider
        ).set(1)
        searcher = Searcher(own.runtime.threads, asked.search_limit, metrics)
        self.engine = Engine(models, searcher, store, metrics, asked.snapshots)
        self._search = SearchService(self.engine)  # one for all ports: it keeps items
        self._releases = Releases(self.engine, model_of, asked.releases)
        self._following = Following(self.engine, model_of, asked.collections, asked.releases) if asked.follow else None
        metrics.watch(store, self._releases.said)
        self._health = health.aio.HealthServicer()
        self._checks: asyncio.Task[None] | None = None
        self.port = 0
        self.admin_port: int | None = None
        self.http_port: int | None = None

    @property
    def host_for_others(self) -> str | None:
        """An address of it that other machines can reach."""
        hosts = [self._asked.host, *([] if self._http is None else [self._asked.http_host])]
        return next((host for host in hosts if not _is_loopback(host)), None)

    @property
    def is_open_to_all(self) -> bool:
        """Whether other machines reach it, and may do everything."""
        known = self._guard is not None or self._asked.tls.client_ca is not None
        return not known and self.host_for_others is not None

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
        try:
            if self._http is not None:
                self.http_port = await self._http.open()
            if asked.metrics_port:
                self.engine.metrics.serve(asked.host, asked.metrics_port)
        except RefusalError:
            if self._http is not None:
                await self._http.close()
            self._close()
            raise
        for model in self.engine.models.values():
            model.pipeline.start()
        if self._following is not None:
            self._following.start()
        await self._health.set(LIVENESS, _SERVING)
        await self._set_ready(await self._check())
        for server in self._servers:
            await server.start()
        if self._http is not None:
            await self._http.start(self._made(admin=False, make=InProcessServer), self._is_ready)
        self._checks = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Answer NOT_SERVING, drain, finish what is in flight, close the store."""
        if self._checks is not None:
            self._checks.cancel()
            await asyncio.gather(self._checks, return_exceptions=True)
        await self._set_ready(False)  # and alive: nobody should kill what drains
        await asyncio.sleep(self._asked.drain_seconds)
        self.engine.drain()
        ports = [*self._servers, *([] if self._http is None else [self._http])]
        await asyncio.gather(*(port.stop(self._asked.grace_seconds) for port in ports))
        await self._releases.stop()
        if self._following is not None:
            await self._following.stop()
        await asyncio.gather(*(model.pipeline.stop() for model in self.engine.models.values()))
        await asyncio.get_running_loop().run_in_executor(None, self._close)

    def _made(self, admin: bool, make: Callable[..., Any] = grpc.aio.server) -> Any:
        """A server of everything, or of what its port answers; `make`: of which kind."""
        asked, metrics = self._asked, self.engine.metrics
        size = asked.max_message_mb * 2**20
        calls = CallInterceptor(
            metrics, self._guard, self._traces, asked.log_format == "json" if asked.log_calls is None else asked.log_calls,
            admin_elsewhere=asked.admin_port is not None and not admin, certificates=asked.tls.client_ca is not None,
        )  # fmt: skip
        server = make(
            interceptors=[calls],
            options=[
                ("grpc.max_receive_message_length", size),
                ("grpc.max_send_message_length", size),
                ("grpc.so_reuseport", 0),  # a second server on the port must fail, not share it
                *asked.connections.options(),
            ],
        )
        pb_grpc.add_EncoderServiceServicer_to_server(EncoderService(self.engine), server)
        pb_grpc.add_SearchServiceServicer_to_server(self._search, server)
        pb_grpc.add_CollectionServiceServicer_to_server(CollectionService(self.engine, self._releases), server)
        pb_grpc.add_ReleaseServiceServicer_to_server(ReleaseService(self.engine, self._releases), server)
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
        self._releases.close()
        self.engine.close()
        if self._traces is not None:
            self._traces.close()

    async def _watch(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):  # what a batch found out changes readiness at once
                await asyncio.wait_for(self._doubted.wait(), self._asked.check_seconds)
            self._doubted.clear()
            await self._set_ready(await self._check())
            for model in list(self.engine.models.values()):
                if not model.pipeline.sound:  # one that no collection is served with, too, has to be found well again
                    with model.uses, contextlib.suppress(Exception):
                        await asyncio.wait_for(model.check(), self._asked.check_seconds)

    async def _check(self) -> bool:
        """The canary picture through each encoder, and its vector through the collections of it, within the interval."""
        try:
            async with contextlib.AsyncExitStack() as used, asyncio.timeout(self._asked.check_seconds):
                everything = self.engine.store.all_served()
                asked = {self.engine.encoder.space_id, *(served.collection.space_id for served in everything)}
                models = [self.engine.models[space] for space in asked]
                for uses in (*(model.uses for model in models), *(served.uses for served in everything)):
                    used.enter_context(uses)
                vectors = {model.space_id: (await model.check()).vector for model in models}
                for served in everything:
                    with contextlib.suppress(NotFoundError):  # deleted meanwhile
                        await self._query(served.collection, vectors[served.collection.space_id])
        except Exception as e:  # whatever it is, the answer is "not ready", and the next check comes
            said = "it took too long" if isinstance(e, TimeoutError) else f"{type(e).__name__}: {e}"
            LOG.warning("not ready, the canary failed: %s", said, extra={"event": "not_ready"})
            return False
        return True

    async def _query(self, collection: Readable, vector: Embeddings) -> None:
        """Raises `InternalError` where a collection does not answer a vector of its space."""
        name = collection.name
        if isinstance(collection, Follower) and collection.problem is not None and collection.is_there:
            raise InternalError(f"the collection {name!r} cannot be followed: {collection.problem}")
        expected = min(1, len(collection))
        (hits,) = await self.engine.read(collection.search, vector[None], 1)
        if (len(hits) < expected and len(collection) > 0) or any(not abs(h.score) <= 1 for h in hits):
            raise InternalError(f"the collection {name!r} does not answer the canary query")

    async def _is_ready(self) -> bool:
        return bool((await self._health.Check(health_pb2.HealthCheckRequest(), None)).status == _SERVING)

    async def _set_ready(self, ready: bool) -> None:
        for name in ("", *SERVICES):
            await self._health.set(name, _SERVING if ready else _NOT_SERVING)
        self.engine.metrics.ready.set(ready)
