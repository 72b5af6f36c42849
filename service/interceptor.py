"""What happens around every call: its id, its key, its trace, its line in the log."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from service import logs
from service.call import Call, begin, current, request_id
from service.errors import ServiceError
from service.metrics import Metrics
from service.pb import likewise_pb2 as pb
from service.security import _REFLECTION, Guard, admin_port_only, common_name
from service.servicer import abort, code_name, lenient, watched
from service.tracing import Tracing

REQUEST_ID = "x-request-id"
# Known methods alone: a name that a caller makes up must not become a label or a line.
METHODS = {
    f"{service.full_name}/{method.name}"
    for service in pb.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
# What is among our methods: a stream of requests with one response is not.
_KINDS = ("unary_unary", "unary_stream", "stream_stream")

Handler = Any  # grpc.RpcMethodHandler: its types do not say which of its four behaviours is there
Context = grpc.aio.ServicerContext[Any, Any]


class CallInterceptor(grpc.aio.ServerInterceptor):
    """The outermost one. Who may not call is refused before their message is read."""

    def __init__(
        self,
        metrics: Metrics,
        guard: Guard | None = None,
        tracing: Tracing | None = None,
        log_calls: bool = False,
        admin_elsewhere: bool = False,
        certificates: bool = False,
    ) -> None:
        """`admin_elsewhere`: admin methods have a port of their own, not this. `certificates`: clients show them."""
        self.certificates, self.log_calls = certificates, log_calls
        self._metrics, self._guard, self._tracing = metrics, guard, tracing
        self._admin_elsewhere = admin_elsewhere
        self._made: dict[str, tuple[Handler, Handler]] = {}  # by method: handler, and what it became

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        """Health is open; reflection asks for a key where there are any; our own methods get everything."""
        method = details.method.removeprefix("/")
        reflection = False
        if method not in METHODS:
            reflection = method.partition("/")[0] in _REFLECTION
            if not reflection or self._guard is None:
                return await continuation(details)
        headers = {name: value for name, value in details.invocation_metadata or () if isinstance(value, str)}
        call = Call(method, request_id(headers.get(REQUEST_ID)))
        begin(call)
        if self._tracing is not None and not reflection:
            call.span = self._tracing.begin(method, headers, call.request_id)
        try:
            refused = admin_port_only(method) if self._admin_elsewhere else None
            if refused is not None:
                raise refused
            if self._guard is not None:
                call.key = await self._guard.admit(method, headers.get("authorization"))
                call.client = call.key.name
        except ServiceError as e:
            return self._refusal(call, e)
        handler = await continuation(details)
        return handler if handler is None or reflection else self._wrapped(method, handler)

    def _refusal(self, call: Call, error: ServiceError) -> Handler:
        """Of the streaming kind whatever the method: that one begins before a message was received."""

        async def refuse(_: Any, context: Context) -> None:
            with _Around(self, call, context):
                await self._refuse(call, context, error)

        return grpc.stream_stream_rpc_method_handler(refuse)

    async def _refuse(self, call: Call, context: Context, error: ServiceError) -> None:
        method = call.method if call.method in METHODS else "reflection"
        self._metrics.requests.labels(method=method, code=code_name(error)).inc()
        await abort(context, error)

    def _wrapped(self, method: str, handler: Handler) -> Handler:
        """A method's handler with what happens around it; made once, as there are thousands of calls a second."""
        before, wrapped = self._made.get(method, (None, None))
        if before is not handler:
            wrapped = self._wrap(method, handler)
            self._made[method] = handler, wrapped
        return wrapped

    def _wrap(self, method: str, handler: Handler) -> Handler:
        kind = next(kind for kind in _KINDS if getattr(handler, kind) is not None)
        inner = watched(method, getattr(handler, kind), self._metrics)
        streams = handler.request_streaming

        async def behave(request: Any, context: Context) -> Any:
            call = current()
            assert call is not None
            with _Around(self, call, context):
                if self._guard is not None:
                    await self._charge(call, context, request)
                    if streams:
                        context = self._paced(call, context)
                return await inner(request, context)  # one answer, or a stream that writes by itself

        make = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(
            behave,
            request_deserializer=lenient(handler.request_deserializer, streams),
            response_serializer=handler.response_serializer,
        )

    async def _charge(self, call: Call, context: Context, request: Any) -> None:
        """A batch of searches counts as that many calls."""
        if self._guard is not None and call.key is not None and isinstance(request, pb.BatchSearchRequest):
            try:
                self._guard.charge_calls(call.key, len(request.requests) - 1)
            except ServiceError as e:
                await self._refuse(call, context, e)

    def _paced(self, call: Call, context: Context) -> Context:
        if self._guard is None or call.key is None or call.key.calls_per_second is None:
            return context
        paced: Any = _Paced(context, functools.partial(self._guard.pace, call.key))
        return paced  # type: ignore[no-any-return]


class _Around:
    """What is said of a call to its caller, its trace and the log, whatever becomes of it. A class, as a generator in its
    place takes five times as long."""

    __slots__ = ("_call", "_context", "_interceptor")

    def __init__(self, interceptor: CallInterceptor, call: Call, context: Context) -> None:
        self._interceptor, self._call, self._context = interceptor, call, context

    def __enter__(self) -> None:
        call, context = self._call, self._context
        context.set_trailing_metadata(((REQUEST_ID, call.request_id),))
        if self._interceptor.certificates and not call.client:
            call.client = common_name(context.auth_context())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        call, code = self._call, "OK"
        if error is not None:
            found: Any = self._context.code()  # an enum or 0, whatever its type says
            code = found.name if found else "UNKNOWN" if isinstance(error, Exception) else "CANCELLED"
        if call.span is not None:
            call.span.end(code)
        if self._interceptor.log_calls:
            logs.log_call(call, code)


class _Paced:
    """A stream's context that is read no faster than a key allows: whoever sends faster is slowed down by HTTP/2."""

    def __init__(self, context: Context, pace: Callable[[], Awaitable[None]]) -> None:
        self._context, self._pace = context, pace
        self._began = False

    async def read(self) -> Any:
        if self._began:  # the first message came with the call, which was counted
            await self._pace()
        self._began = True
        return await self._context.read()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)
