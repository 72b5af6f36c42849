"""Calls of the services without a connection: a gRPC server's interceptors and handlers, and a context to call them with.

Whoever calls has to bring what HTTP/2 brings to gRPC: deadlines, limits of size, and the cancellation of a call whose
caller has left.
"""

from __future__ import annotations

import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import grpc
from google.rpc.status_pb2 import Status

Metadata = tuple[tuple[str, str | bytes], ...]


class _Details(NamedTuple):
    """grpc.HandlerCallDetails."""

    method: str
    invocation_metadata: Metadata


class CallContext:
    """What grpc.aio.ServicerContext gives a method, as far as ours use it.

    Attributes: `status`, why the call failed, None where it did not.
    """

    def __init__(
        self,
        metadata: Metadata,
        peer: str,
        read: Callable[[], Awaitable[Any]],
        write: Callable[[Any], Awaitable[None]],
        deadline: float | None = None,
        common_name: str = "",
    ) -> None:
        """`read` gives the next request, or grpc.aio.EOF; `deadline` in seconds of `time.monotonic`; `common_name` of the
        caller's certificate."""
        self._metadata, self._peer, self._deadline, self._common_name = metadata, peer, deadline, common_name
        self._read, self._write = read, write
        self._trailing: Metadata = ()
        self._code: Any = 0
        self._gone = False
        self.status: Status | None = None

    def invocation_metadata(self) -> Metadata:
        """What came with the call."""
        return self._metadata

    def peer(self) -> str:
        """The caller's address."""
        return self._peer

    def auth_context(self) -> dict[str, list[bytes]]:
        """Of the caller's certificate."""
        return {"x509_common_name": [self._common_name.encode()]} if self._common_name else {}

    def time_remaining(self) -> float | None:
        """Seconds until the caller leaves."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def set_trailing_metadata(self, metadata: Metadata) -> None:
        """To go with the end."""
        self._trailing = tuple(metadata)

    def trailing_metadata(self) -> Metadata:
        """As it was set."""
        return self._trailing

    def code(self) -> Any:
        """Of the end; 0 before it."""
        return self._code

    def done(self) -> bool:
        """Whether the caller has left."""
        return self._gone

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()) -> None:
        """End the call. Raises `grpc.aio.AbortError`."""
        self._code, self._trailing = code, tuple(trailing_metadata)
        self.status = Status(code=code.value[0], message=details)
        for name, value in self._trailing:
            if name == "grpc-status-details-bin" and isinstance(value, bytes):
                self.status.ParseFromString(value)
        raise grpc.aio.AbortError(details)

    async def read(self) -> Any:
        """The next request, or grpc.aio.EOF."""
        return await self._read()

    async def write(self, answer: Any) -> None:
        """Send an answer."""
        try:
            await self._write(answer)
        except ConnectionError:
            self._gone = True
            raise


class InProcessServer:
    """Takes services as `grpc.aio.Server` does."""

    def __init__(
        self, interceptors: Sequence[grpc.aio.ServerInterceptor], options: Sequence[tuple[str, int]] = ()
    ) -> None:
        """`options` are those of a connection, which there is not."""
        self._handlers: list[grpc.GenericRpcHandler] = []
        self._find: Callable[[Any], Awaitable[Any]] = self._handler
        for interceptor in reversed(interceptors):
            self._find = functools.partial(interceptor.intercept_service, self._find)

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """A service."""
        self._handlers += handlers

    def add_registered_method_handlers(self, service: str, handlers: Any) -> None:
        """The same service once more."""

    async def call(self, method: str, context: CallContext) -> None:
        """Call a method, such as likewise.v1.SearchService/Search, until it is over. Who may not call is refused before the
        first request is read. Raises what reading the request of a unary method raises."""
        try:
            handler = await self._find(_Details(f"/{method}", context.invocation_metadata()))
            if handler is None:
                await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"there is no method {method}")
            request = _all(context) if handler.request_streaming else await context.read()
            behave = handler.stream_stream or handler.stream_unary or handler.unary_stream or handler.unary_unary
            answer = behave(request, context)
            if hasattr(answer, "__aiter__"):
                async for each in answer:
                    await context.write(each)
            elif handler.response_streaming:
                await answer  # it writes by itself
            else:
                await context.write(await answer)
        except grpc.aio.AbortError:
            pass  # the context says why

    async def _handler(self, details: Any) -> Any:
        found = (handler.service(details) for handler in self._handlers)
        return next((each for each in found if each is not None), None)


async def _all(context: CallContext) -> AsyncIterator[Any]:
    while (request := await context.read()) is not grpc.aio.EOF:
        yield request
