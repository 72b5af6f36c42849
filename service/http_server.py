"""The API over HTTP/1.1 and JSON, for browsers and curl.

    POST /likewise.v1.SearchService/Search            every RPC: Connect's unary JSON; streams as one JSON object per line
    POST /v1/collections/NAME:search?top_k=3          a picture as it is, or a form; the answer of Search
    GET  /healthz  /readyz  /openapi.json  /          alive, ready, the API's description, a page to try it

Each call goes through the interceptors and services of the gRPC port (service/in_process.py) with the caller's key, id,
trace, deadline, address and certificate: keys, roles and rates are those of gRPC, because they are gRPC's. A call begins
before its body is read, so that whoever may not call is refused first.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import hashlib
import ipaddress
import json
import re
import ssl
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import grpc
from aiohttp import web
from google.protobuf.message import Message
from google.rpc.code_pb2 import Code
from google.rpc.status_pb2 import Status

from export.bundle import RefusalError
from service.call import request_id
from service.config import Serve
from service.errors import InvalidArgumentError, ServiceError, UnavailableError
from service.http_body import form, lines, too_large, whole
from service.in_process import CallContext, InProcessServer
from service.interceptor import REQUEST_ID
from service.metrics import Metrics
from service.pb import likewise_pb2 as pb
from service.servicer import as_refusal
from service.transcode import (
    METHODS,
    HttpError,
    Method,
    error_of,
    http_status,
    json_of,
    message_from,
    message_of_bytes,
    message_of_parameters,
    retry_after,
    seconds_of,
)

JSON, PROTO, LINES = "application/json", "application/proto", "application/x-ndjson"
SEARCH = METHODS["likewise.v1.SearchService/Search"]
# A connection without a request is closed after that.
IDLE_SECONDS = 75.0
# Larger messages are converted in a thread: meanwhile the event loop answers others.
LARGE = 64 * 2**10
_BYTES, _FORM = "application/octet-stream", "multipart/form-data"
_ALLOWED_HEADERS = (
    "Authorization, Content-Type, Connect-Protocol-Version, Connect-Timeout-Ms, Traceparent, X-Request-Id"
)
_ID = web.RequestKey("id", str)

T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class _CallError(Exception):
    """An answer that is an error."""

    def __init__(self, status: Status) -> None:
        super().__init__(status.message)
        self.status = status


class HttpServer:
    """Serves one port, in this process's event loop."""

    def __init__(self, asked: Serve, metrics: Metrics, tls: ssl.SSLContext | None) -> None:
        self._asked, self._metrics, self._tls = asked, metrics, tls
        self._most = asked.max_message_mb * 2**20
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="json")
        self._running = 0
        self._idle = asyncio.Event()
        self._calls: set[asyncio.Task[None]] = set()
        self._stopping = False
        application = web.Application(middlewares=[self._around])
        application.on_response_prepare.append(self._with_headers)
        router = application.router
        for method in METHODS.values():
            router.add_post(f"/{method.path}", functools.partial(self._rpc, method))
        router.add_post("/v1/collections/{name:[^/]+}:search", self._search)
        router.add_get("/healthz", self._alive)
        router.add_get("/readyz", self._ready)
        if asked.reflection == "on":
            router.add_get("/openapi.json", self._openapi)
            router.add_get("/", self._page)
        # Bodies stay as they are sent: one that is compressed may be a thousand times larger than it looks.
        self._runner = web.AppRunner(
            application, handler_cancellation=True, access_log=None, auto_decompress=False, shutdown_timeout=1.0,
            keepalive_timeout=IDLE_SECONDS,
        )  # fmt: skip
        self._listener: asyncio.Server | None = None

    async def open(self) -> int:
        """Take the port, and return it. Raises `RefusalError`."""
        host, port = self._asked.http_host, self._asked.http_port
        await self._runner.setup()
        assert self._runner.server is not None
        try:
            self._listener = await asyncio.get_running_loop().create_server(
                self._runner.server, host.strip("[]"), port, ssl=self._tls, start_serving=False
            )
        except OSError:
            raise RefusalError(
                f"{host}:{port} cannot be opened: another server has the port, or the address is not of this machine; stop "
                "that one, or pass another --http-port or --http-host"
            ) from None
        return int(self._listener.sockets[0].getsockname()[1])

    async def start(self, services: InProcessServer, is_ready: Callable[[], Awaitable[bool]]) -> None:
        """Listen."""
        assert self._listener is not None
        self._services, self._is_ready = services, is_ready
        await self._listener.start_serving()

    async def stop(self, grace: float) -> None:
        """No new calls; those in flight have `grace` seconds, and are then told."""
        self._stopping = True
        if self._listener is not None:
            self._listener.close()
        if not await self._is_idle(grace):
            for call in self._calls:
                call.cancel()
            await self._is_idle(1.0)
        await self.close()

    async def close(self) -> None:
        """Free what was opened."""
        if self._listener is not None:
            self._listener.close()
        await self._runner.cleanup()
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _is_idle(self, seconds: float) -> bool:
        """Whether every request is answered by then."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._running:
                    await self._idle.wait()
        return not self._running

    # --- around every request -----------------------------------------------------------------------------------------

    @web.middleware
    async def _around(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        request[_ID] = request_id(request.headers.get(REQUEST_ID))
        self._running += 1
        self._idle.clear()
        try:
            return await self._answered(request, handler)
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    async def _answered(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            self._check_origin(request)
            if request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers:
                return web.Response(status=204)
            encoding = request.headers.get("Content-Encoding", "identity")
            if encoding != "identity":
                raise _unsupported("Content-Encoding", encoding, "send the body as it is")
            return await handler(request)
        except _CallError as e:
            refused = e
        except web.HTTPNotFound:
            message = f"there is nothing at {request.path[:200]!r}: see /openapi.json"
            refused = _of(HttpError(message, Code.UNIMPLEMENTED, "UNKNOWN_PATH"))
        except web.HTTPMethodNotAllowed as e:
            allowed = ", ".join(sorted(e.allowed_methods - {"HEAD"}))
            message = f"{request.method[:20]} is not for this path: use {allowed}"
            refused = _of(HttpError(message, Code.UNIMPLEMENTED, "BAD_VERB"))
        except ConnectionError:  # the caller has left: nobody reads this
            return web.Response(status=499)
        except Exception as e:
            refused = _of(as_refusal(request.path, e))
        return self._refusal(request, refused)

    def _refusal(self, request: web.Request, refused: _CallError) -> web.Response:
        status = refused.status
        body = json.dumps(error_of(status), ensure_ascii=False).encode()
        response = web.Response(body=body, content_type=JSON, status=http_status(status))
        seconds = retry_after(status)
        if seconds is not None:
            response.headers["Retry-After"] = str(seconds)
        if status.code == Code.UNAUTHENTICATED:
            response.headers["WWW-Authenticate"] = "Bearer"
        if not request.content.at_eof():  # the rest of the body is not waited for
            response.force_close()
        return response

    async def _with_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        headers = response.headers
        headers["X-Content-Type-Options"] = "nosniff"
        headers["Cache-Control"] = "no-store"
        headers["Server"] = "likewise"
        if _ID in request:
            headers["X-Request-Id"] = request[_ID]
        if self._stopping:
            response.force_close()
        if not self._asked.http_origins:
            return
        headers["Vary"] = "Origin"
        origin = request.headers.get("Origin")
        if origin is None or not self._is_allowed(origin):
            return
        headers["Access-Control-Allow-Origin"] = origin
        headers["Access-Control-Expose-Headers"] = "Retry-After, X-Request-Id"
        if request.method == "OPTIONS":
            headers["Access-Control-Allow-Methods"] = "GET, POST"
            headers["Access-Control-Allow-Headers"] = _ALLOWED_HEADERS
            headers["Access-Control-Max-Age"] = "7200"

    def _check_origin(self, request: web.Request) -> None:
        """Pages of other origins may not even send: a form needs nobody's leave to be sent, only to be answered."""
        origin = request.headers.get("Origin")
        if origin is not None and not self._is_allowed(origin) and not _is_own(origin, request.headers.get("Host", "")):
            raise _of(HttpError(
                f"pages of {origin[:200]!r} may not call this server: name it in --http-origins", Code.PERMISSION_DENIED,
                "ORIGIN_REFUSED", origin=origin[:200],
            ))  # fmt: skip

    def _is_allowed(self, origin: str) -> bool:
        return origin in self._asked.http_origins or "*" in self._asked.http_origins

    # --- calls --------------------------------------------------------------------------------------------------------

    async def _rpc(self, method: Method, request: web.Request) -> web.StreamResponse:
        # Strictly: a page of anybody may send a form or plain text to any server without asking it first, but not JSON.
        expected = (LINES,) if method.streams_in else (JSON,) if method.streams_out else (JSON, PROTO)
        if request.content_type not in expected:
            raise _unsupported("Content-Type", request.content_type, f"send {' or '.join(expected)}")
        if method.streams_out:
            return await self._streamed(request, method)
        return await self._one(request, method, self._message)

    async def _search(self, request: web.Request) -> web.StreamResponse:
        """A picture as it is, or a form with one; the rest of the SearchRequest as parameters."""
        if not (request.content_type.startswith("image/") or request.content_type in (_BYTES, _FORM)):
            raise _unsupported(
                "Content-Type", request.content_type, f"send a picture as image/… or {_BYTES}, or {_FORM}"
            )
        return await self._one(request, SEARCH, self._search_request)

    async def _one(
        self, request: web.Request, method: Method, read: Callable[[web.Request, Method], Awaitable[Message]]
    ) -> web.StreamResponse:
        """One message, one answer."""
        answers: list[bytes] = []

        async def write(answer: Message) -> None:
            as_it_is = request.content_type == PROTO
            answers.append(self._fitting(answer).SerializeToString() if as_it_is else await self._json(answer))

        await self._call(request, method, lambda: read(request, method), write)
        return web.Response(body=answers[0], content_type=PROTO if request.content_type == PROTO else JSON)

    async def _streamed(self, request: web.Request, method: Method) -> web.StreamResponse:
        """Lines {"result": …}; the last is {"error": …} where something went wrong after the first."""
        response = web.StreamResponse(headers={"Content-Type": LINES})

        async def write(answer: Message) -> None:
            if not response.prepared:
                await response.prepare(request)
            await response.write(b'{"result": ' + await self._json(answer) + b"}\n")

        async with contextlib.aclosing(self._numbered(request, method)) as numbered:
            each = functools.partial(anext, numbered, grpc.aio.EOF)
            message = functools.partial(self._message, request, method)
            try:
                await self._call(request, method, each if method.streams_in else message, write)
            except _CallError as e:
                if not response.prepared:
                    raise
                await response.write(json.dumps({"error": error_of(e.status)}, ensure_ascii=False).encode() + b"\n")
        if not response.prepared:
            await response.prepare(request)
        await response.write_eof()
        return response

    async def _numbered(self, request: web.Request, method: Method) -> AsyncGenerator[Message]:
        """Every line as a message."""
        number = 0
        async for line in lines(request, self._most):
            number += 1
            if line.strip():
                try:
                    message = await self._in_thread(message_from, line, method.request, large=len(line) > LARGE)
                    yield self._fitting(message)
                except InvalidArgumentError as e:
                    raise InvalidArgumentError(f"line {number}: {e}", e.reason, line=number) from None

    async def _call(
        self,
        request: web.Request,
        method: Method,
        read: Callable[[], Awaitable[Any]],
        write: Callable[[Any], Awaitable[None]],
    ) -> None:
        """Call a method until it is over, its deadline has passed, or the caller has left. Raises `_CallError`."""
        if self._stopping:
            raise _draining()
        try:
            seconds = seconds_of(request.headers.get("Connect-Timeout-Ms"))
            deadline = None if seconds is None else time.monotonic() + seconds
            metadata = ((REQUEST_ID, request[_ID]), *_passed_on(request))
            context = CallContext(metadata, f"http:{request.remote}", read, write, deadline, _common_name(request))
            # A task of its own: what is remembered of a call must not be there in the connection's next.
            call = asyncio.create_task(self._services.call(method.path, context))
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)
            async with asyncio.timeout(seconds):
                await call
        except TimeoutError:
            raise _CallError(
                Status(code=Code.DEADLINE_EXCEEDED, message=f"the {seconds:g} s of Connect-Timeout-Ms have passed")
            ) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():  # the caller has left
                raise
            raise _draining() from None
        except ServiceError as e:  # the services count what reaches them; this did not
            self._metrics.requests.labels(method=method.path, code=Code.Name(e.code)).inc()
            raise
        if context.status is not None:
            raise _CallError(context.status)

    async def _message(self, request: web.Request, method: Method) -> Message:
        body = await whole(request, self._most)
        if request.content_type == PROTO:
            return message_of_bytes(body, method.request)
        return self._fitting(await self._in_thread(message_from, body, method.request, large=len(body) > LARGE))

    async def _search_request(self, request: web.Request, _: Method) -> Message:
        given: dict[str, str] = {}
        if request.content_type == _FORM:
            image, fields = await form(request, self._most)
        else:
            image, fields = await whole(request, self._most), []
        for name, value in [*request.query.items(), *fields]:
            if name in given:
                raise InvalidArgumentError(
                    f"the parameter {name[:80]!r} was given twice: give it once", field=name[:80]
                )
            given[name] = value
        message: Any = message_of_parameters(given, pb.SearchRequest)
        message.collection = request.match_info["name"]
        message.query.image.content = image
        return message  # type: ignore[no-any-return]

    async def _json(self, message: Message) -> bytes:
        return await self._in_thread(json_of, self._fitting(message), large=message.ByteSize() > LARGE)

    def _fitting(self, message: Message) -> Message:
        """As gRPC counts: numbers may take more than their JSON. Raises `HttpError`."""
        if message.ByteSize() > self._most:
            raise too_large(self._most)
        return message

    async def _in_thread(self, call: Callable[..., T], *arguments: Any, large: bool) -> T:
        if not large:
            return call(*arguments)
        return await asyncio.get_running_loop().run_in_executor(self._pool, call, *arguments)

    # --- what is not a call -------------------------------------------------------------------------------------------

    async def _alive(self, _: web.Request) -> web.Response:
        return web.Response(text="alive\n")

    async def _ready(self, _: web.Request) -> web.Response:
        """As grpc.health.v1 has it."""
        ready = await self._is_ready()
        return web.Response(text="ready\n" if ready else "not ready\n", status=200 if ready else 503)

    async def _openapi(self, _: web.Request) -> web.Response:
        return web.Response(body=_file("openapi.json"), content_type=JSON)

    async def _page(self, _: web.Request) -> web.Response:
        headers = {"Content-Security-Policy": _policy()}
        return web.Response(body=_file("page.html"), content_type="text/html", charset="utf-8", headers=headers)


@functools.cache
def _file(name: str) -> bytes:
    return Path(__file__).with_name(name).read_bytes()


@functools.cache
def _policy() -> str:
    """The page may run its own script and style, and talk to this server; nothing else."""
    rules = ["default-src 'none'", "connect-src 'self'", "img-src data: blob:", "base-uri 'none'", "form-action 'none'"]
    for kind in ("script", "style"):
        (inline,) = re.findall(rb"<%b>(.*?)</%b>" % (kind.encode(), kind.encode()), _file("page.html"), re.DOTALL)
        rules.append(f"{kind}-src 'sha256-{base64.b64encode(hashlib.sha256(inline).digest()).decode()}'")
    return "; ".join([*rules, "frame-ancestors 'none'"])


def _of(error: ServiceError) -> _CallError:
    return _CallError(error.status())


def _draining() -> _CallError:
    return _of(UnavailableError("the server is shutting down: try again, at another replica where there is one"))


def _unsupported(header: str, found: str, advice: str) -> _CallError:
    message = f"{header} is {found[:80]!r}: {advice}"
    return _of(HttpError(message, Code.INVALID_ARGUMENT, "BAD_CONTENT_TYPE"))


def _is_own(origin: str, host: str) -> bool:
    """A page of this server, by address: a name that points here may be anybody's."""
    try:
        own = urlsplit(origin)
        name = own.hostname or ""
        if name != "localhost":
            ipaddress.ip_address(name)
    except ValueError:
        return False
    return own.netloc == host


def _common_name(request: web.Request) -> str:
    """Of the client's certificate; '' where it showed none."""
    certificate = request.get_extra_info("peercert") or {}
    names = [value for part in certificate.get("subject", ()) for key, value in part if key == "commonName"]
    return names[0] if names else ""


def _passed_on(request: web.Request) -> Iterator[tuple[str, str]]:
    """The headers that mean something to the services."""
    for name in ("authorization", "traceparent", "tracestate"):
        value = request.headers.get(name)
        if value is not None and value.isascii():
            yield name, value
