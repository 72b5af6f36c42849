"""The API as JSON: its methods by path, messages in protobuf's JSON mapping, errors as the Connect protocol says them.

Everything is read from the proto's descriptor: a method that is added to it appears here by itself.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2 as details
from google.rpc.code_pb2 import Code
from google.rpc.status_pb2 import Status

from service.errors import InvalidArgumentError, ServiceError
from service.pb import likewise_pb2 as pb

# As the Connect protocol has it (https://connectrpc.com/docs/protocol#error-codes).
HTTP_STATUS = {
    "CANCELLED": 499, "UNKNOWN": 500, "INVALID_ARGUMENT": 400, "DEADLINE_EXCEEDED": 504, "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409, "PERMISSION_DENIED": 403, "RESOURCE_EXHAUSTED": 429, "FAILED_PRECONDITION": 400, "ABORTED": 409,
    "OUT_OF_RANGE": 400, "UNIMPLEMENTED": 501, "INTERNAL": 500, "UNAVAILABLE": 503, "DATA_LOSS": 500,
    "UNAUTHENTICATED": 401,
}  # fmt: skip
# What only HTTP knows has a status of its own.
HTTP_REASONS = {
    "UNKNOWN_PATH": 404, "BAD_VERB": 405, "BODY_STALLED": 408, "MESSAGE_TOO_LARGE": 413, "BAD_CONTENT_TYPE": 415,
    "ORIGIN_REFUSED": 403,
}  # fmt: skip
_BOOLS = {"true": True, "1": True, "false": False, "0": False}


class Method(NamedTuple):
    """An RPC."""

    path: str
    """Service and method, such as likewise.v1.SearchService/Search."""
    request: type[Message]
    response: type[Message]
    streams_in: bool
    """Whether the request is a stream of messages."""
    streams_out: bool
    """Whether the response is one."""


def _methods() -> Iterator[Method]:
    for service in pb.DESCRIPTOR.services_by_name.values():
        for method in service.methods:
            yield Method(
                f"{service.full_name}/{method.name}", GetMessageClass(method.input_type),
                GetMessageClass(method.output_type), method.client_streaming, method.server_streaming,
            )  # fmt: skip


METHODS = {method.path: method for method in _methods()}


class HttpError(ServiceError):
    """What only HTTP knows."""

    def __init__(self, message: str, code: int, reason: str, **metadata: object) -> None:
        super().__init__(message, reason, **metadata)  # type: ignore[arg-type]
        self.code = code


def message_from(text: bytes, kind: type[Message]) -> Message:
    """A message from its JSON; unknown fields are refused. Raises `InvalidArgumentError`."""
    try:
        if text.lstrip()[:1] != b"{":
            raise ValueError("it is no object: write {…}")
        return json_format.Parse(text, kind())
    except (json_format.ParseError, ValueError, RecursionError) as e:
        raise _unusable("the body", kind, e) from None


def message_of_bytes(data: bytes, kind: type[Message]) -> Message:
    """A message as protobuf writes it. Raises `InvalidArgumentError`."""
    try:
        return kind.FromString(data)
    except DecodeError:
        raise InvalidArgumentError(
            f"the body is no {kind.DESCRIPTOR.full_name}: send one, or JSON", "BAD_BODY"
        ) from None


def message_of_parameters(given: Mapping[str, str], kind: type[Message]) -> Message:
    """A message from the names and values of a query string: fields of one value each, as text. Raises
    `InvalidArgumentError`."""
    fields = parameters(kind)
    known = {name: field for field in fields for name in (field.name, field.json_name)}
    values: dict[str, Any] = {}
    for name, value in given.items():
        field = known.get(name)
        if field is None:
            raise InvalidArgumentError(
                f"there is no parameter {name[:80]!r}: use one of {', '.join(sorted(f.name for f in fields))}",
                field=name[:80],
            )
        values[field.name] = _BOOLS.get(value.lower(), value) if field.type == FieldDescriptor.TYPE_BOOL else value
    try:
        return json_format.ParseDict(values, kind())
    except (json_format.ParseError, ValueError) as e:
        raise _unusable("a parameter", kind, e) from None


def parameters(kind: type[Message]) -> list[Any]:
    """Fields that a query string can hold: one value each, no messages; the collection is in the path."""
    return [
        f for f in kind.DESCRIPTOR.fields if f.message_type is None and not f.is_repeated and f.name != "collection"
    ]


def _unusable(what: str, kind: type[Message], error: Exception) -> InvalidArgumentError:
    said = "it is nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())[:300]
    return InvalidArgumentError(
        f"{what} is no JSON of {kind.DESCRIPTOR.full_name} ({said}): see /openapi.json", "BAD_JSON"
    )


def json_of(message: Message) -> bytes:
    """One line."""
    return json_format.MessageToJson(message, indent=None, ensure_ascii=False).encode()


def error_of(status: Status) -> dict[str, Any]:
    """A status as Connect's error JSON. `debug` has each detail's fields, for people and programs without protobuf."""
    found: dict[str, Any] = {"code": connect_code(status.code), "message": status.message}
    if status.details:
        found["details"] = [
            {"type": each.TypeName(), "value": base64.b64encode(each.value).decode().rstrip("="), "debug": _debug(each)}
            for each in status.details
        ]
    return found


def _debug(detail: Any) -> dict[str, Any]:
    try:
        fields = json_format.MessageToDict(detail)
    except TypeError:  # a type that this process does not know
        return {}
    fields.pop("@type", None)
    return fields


def connect_code(code: int) -> str:
    """Such as not_found."""
    name = Code.Name(code)
    return "canceled" if name == "CANCELLED" else name.lower()


def http_status(status: Status) -> int:
    """What its reason or code is in HTTP."""
    info = details.ErrorInfo()
    known = any(each.Unpack(info) for each in status.details) and info.reason in HTTP_REASONS
    return HTTP_REASONS[info.reason] if known else HTTP_STATUS[Code.Name(status.code)]


def retry_after(status: Status) -> int | None:
    """Whole seconds, at least 1, where a RetryInfo says when to try again."""
    retry = details.RetryInfo()
    if not any(each.Unpack(retry) for each in status.details):
        return None
    seconds: float = retry.retry_delay.ToTimedelta().total_seconds()
    return max(1, math.ceil(seconds))


def seconds_of(header: str | None) -> float | None:
    """Connect-Timeout-Ms in seconds. Raises `InvalidArgumentError`."""
    if header is None:
        return None
    if not re.fullmatch(r"[0-9]{1,10}", header):
        raise InvalidArgumentError(
            f"Connect-Timeout-Ms is {header[:40]!r}: write milliseconds of at most 10 digits",
            field="Connect-Timeout-Ms",
        )
    return int(header) / 1000
