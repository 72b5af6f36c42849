"""OpenTelemetry traces: a span per call, and in it one per stage; a batch's span links the calls in it. Extra [otel].

likewise.v1.SearchService/Search
├── decode       a picture's bytes → pixels
├── queue        its wait for a batch
├── infer        the batch that it was in   ──link──▶  batch   ──links──▶  every call in it
└── search       the index, and the answer
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any

from export.bundle import RefusalError

if TYPE_CHECKING:
    from service.call import Call
    from service.config import Serve

# Spans of one call; of a stream of a million pictures the rest is counted.
MOST_SPANS = 256
_FAULTS = {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}


class Span:
    """The span of a call."""

    def __init__(self, tracing: Tracing, span: Any) -> None:
        self._tracing, self.otel = tracing, span
        self._left = MOST_SPANS

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits."""
        return f"{self.otel.get_span_context().trace_id:032x}"

    @property
    def is_recording(self) -> bool:
        """Whether this call was sampled."""
        return bool(self.otel.is_recording())

    def stage(self, name: str, start: float, end: float, attributes: Mapping[str, Any]) -> None:
        """A stage that took from `start` to `end`, in seconds of `time.monotonic`."""
        self._left -= 1
        if self._left >= 0 and self.is_recording:
            self._tracing.child(self.otel, name, start, end, attributes)

    def end(self, code: str) -> None:
        """The call is over, with the name of its status code."""
        if self._left < 0:
            self.otel.set_attribute("likewise.spans_left_out", -self._left)
        self._tracing.end(self.otel, code)


class Tracing:
    """Makes spans with a tracer provider of OpenTelemetry's SDK."""

    def __init__(self, provider: Any) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._trace = trace
        self._provider = provider
        self._tracer = provider.get_tracer("likewise", metadata.version("likewise"))
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, method: str, headers: Mapping[str, str], request_id: str) -> Span:
        """A call's span, in the trace that its W3C `traceparent` names, or in one of its own."""
        service, _, name = method.partition("/")
        attributes = {
            "rpc.system": "grpc", "rpc.service": service, "rpc.method": name, "likewise.request_id": request_id,
        }  # fmt: skip
        parent = self._propagator.extract(dict(headers))
        kind = self._trace.SpanKind.SERVER
        return Span(self, self._tracer.start_span(method, context=parent, kind=kind, attributes=attributes))

    def child(self, parent: Any, name: str, start: float, end: float, attributes: Mapping[str, Any]) -> Any:
        """A span that is over."""
        given = {f"likewise.{key}": value for key, value in attributes.items() if key != "link"}
        links = [self._trace.Link(attributes["link"])] if "link" in attributes else []
        context = self._trace.set_span_in_context(parent)
        span = self._tracer.start_span(name, context=context, start_time=_wall(start), attributes=given, links=links)
        span.end(_wall(end))
        return span

    def batch(self, spans: Iterable[Span], start: float, end: float, size: int) -> Any:
        """What the stages of a batch's members link: the span of the batch, which links them. It stands in the trace of the
        first of them. None where no member was sampled."""
        members = {id(each.otel): each.otel for each in spans if each.is_recording}
        if not members:
            return None
        first = next(iter(members.values()))
        span = self._tracer.start_span(
            "batch", context=self._trace.set_span_in_context(first), start_time=_wall(start),
            attributes={"likewise.batch": size}, links=[self._trace.Link(m.get_span_context()) for m in members.values()],
        )  # fmt: skip
        span.end(_wall(end))
        return span.get_span_context()

    def end(self, span: Any, code: str) -> None:
        """See `Span.end`."""
        import grpc

        span.set_attribute("rpc.grpc.status_code", grpc.StatusCode[code].value[0])
        if code in _FAULTS:
            span.set_status(self._trace.Status(self._trace.StatusCode.ERROR, code))
        span.end()

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


def batch_span(calls: Iterable[Call | None], start: float, end: float, size: int) -> Any:
    """The context of a batch's span, where any of its calls is traced."""
    spans = [call.span for call in calls if call is not None and call.span is not None]
    return spans[0]._tracing.batch(spans, start, end, size) if spans else None


def tracing(asked: Serve) -> Tracing | None:
    """Traces that go to an OTLP collector; None where none is asked for. Raises `RefusalError`."""
    if asked.otlp_endpoint is None:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
    except ImportError as e:
        raise RefusalError(f"--otlp-endpoint needs the package {e.name!r}: pip install 'likewise[otel]'") from e
    resource = Resource.create({"service.name": "likewise", "service.version": metadata.version("likewise")})
    provider = TracerProvider(resource=resource, sampler=ParentBased(TraceIdRatioBased(asked.trace_share)))
    insecure = not asked.otlp_endpoint.startswith("https://")
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(asked.otlp_endpoint, insecure=insecure)))
    return Tracing(provider)


def _wall(monotonic: float) -> int:
    """Nanoseconds since 1970 of a time of `time.monotonic`."""
    return time.time_ns() - int((time.monotonic() - monotonic) * 1e9)
