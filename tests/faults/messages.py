"""Requests of every kind, sound, odd and broken, and what a server may answer to them."""

from __future__ import annotations

import base64
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import grpc
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from service.pb import likewise_pb2 as pb
from tests.conftest import encode, noise

PICTURE = encode(noise(24, 20), "PNG")
TEXTS = (
    "", "many", "shapes", "none", "k001", "../up", "a" * 600, "\0", "a\0b", "é", "e\u0301", "\U0001f600" * 40, "\ufffe",
    "\u202e",
    "'; DROP TABLE items; --", "%s%n", " ", "\n", "KEY", "a/b/../c", "\ud7ff", "x" * 70_000,
)  # fmt: skip
FILTERS = (
    "", "i = 1", "i < 3 AND i > -1e308", "i", "i =", "= 3", "(" * 70 + "i = 1", "NOT " * 200 + "i = 1", "i = (1 OR", "i:*",
    '"', "'\\", "i = 1e999", "i = nan", "i = -9223372036854775809", " OR ".join(["i = 1"] * 1100), "payload.a.b.c = null",
    'key = "k*"', "sequence < 1e30", "sequence = 99999999999999999999999", "i." * 80 + "j = 1", "\0 = 1", "i = \0", "-i = 1",
    "ä = 1", "i = true", "i != null OR i = null", "source_uri:*", "*", "i = *", "i < *", "key < (1 OR 2)",
)  # fmt: skip
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-45, 3.4e38, -3.4e38, math.nan, math.inf, -math.inf, 0.5, 1e-20)
INTEGERS = (0, 1, -1, 2, 10, 64, 100, 101, 256, 1000, 1001, 10_000, 2**31 - 1, -(2**31))
LONG = (*INTEGERS, 2**53, 2**63 - 1, -(2**63))


def _coded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode()


TOKENS = (
    "x", "====", "MTA6YWJj", "é", "a" * 5000, _coded(b"10:"), _coded(b"\xff"), _coded(b"9" * 5000 + b":a"),
    _coded(json.dumps([["a"], 1]).encode()), _coded(b"[" * 3000), _coded(b'["x", [1e400, 2]]'),
)  # fmt: skip


class Maker:
    """Makes requests."""

    def __init__(self, seed: int, dimensions: int) -> None:
        self.random = random.Random(seed)
        self._dimensions = dimensions
        self.tokens = list(TOKENS)
        """Those of the server's answers come along."""

    def request(self, message: type[Message], depth: int = 0) -> Message:
        """Random values in random fields."""
        made = message()
        self._fill(made, depth)
        return made

    def mangled(self, data: bytes) -> bytes:
        """Bytes that may be no message any more."""
        kind = self.random.randrange(5)
        if kind == 0:
            return self.random.randbytes(self.random.randrange(200))
        broken = bytearray(data or b"\x0a\x02ab")
        for _ in range(self.random.randrange(1, 8)):
            at = self.random.randrange(len(broken))
            if kind == 1:
                broken[at] = self.random.randrange(256)
            elif kind == 2:
                broken[at] ^= 1 << self.random.randrange(8)
            elif kind == 3:
                del broken[at:]
                break
            else:
                broken[at:at] = broken[at : at + self.random.randrange(1, 40)]
            if not broken:
                break
        return bytes(broken)

    def _fill(self, made: Message, depth: int) -> None:
        random, kind = self.random, made.DESCRIPTOR.name
        if kind == "Struct":
            self._struct(made)
            return
        for field in self._chosen(made.DESCRIPTOR):
            if field.message_type is not None and depth > 5:
                continue
            if field.is_repeated:
                if field.name == "values":
                    values: Any = getattr(made, field.name)
                    values.extend(self._vector())
                    continue
                for _ in range(random.choice((0, 1, 1, 2, 3, 3, 70, 260, 1001) if depth == 0 else (0, 1, 2, 3))):
                    if field.message_type is None:
                        getattr(made, field.name).append(self._value(field))
                    else:
                        self._fill(getattr(made, field.name).add(), depth + 1)
                    if made.ByteSize() > 300_000:
                        break
            elif field.message_type is not None:
                inner = getattr(made, field.name)
                inner.SetInParent()
                self._fill(inner, depth + 1)
            else:
                setattr(made, field.name, self._value(field))

    def _chosen(self, descriptor: Descriptor) -> Iterator[FieldDescriptor]:
        """One of each oneof, mostly; the others as it comes."""
        taken = set()
        for field in self.random.sample(list(descriptor.fields), len(descriptor.fields)):
            group = field.containing_oneof
            if group is not None and len(group.fields) > 1:
                if group.name in taken or self.random.random() < 0.05:
                    continue
                taken.add(group.name)
                yield field
            elif self.random.random() < (0.95 if field.name in ("collection", "key", "query") else 0.5):
                yield field

    def _value(self, field: FieldDescriptor) -> Any:
        random, name = self.random, field.name
        match field.type:
            case FieldDescriptor.TYPE_STRING:
                if name in ("collection", "name") and random.random() < 0.85:
                    return "many"
                if name == "filter":
                    return random.choice(FILTERS)
                if name == "page_token":
                    return random.choice(["", "", *self.tokens])
                if name == "space_id" and random.random() < 0.8:
                    return ""
                if name == "group_by":
                    return random.choice(("", "i", "i.j", "i..j", ".", "payload", "key", '"', "é"))
                return random.choice((*TEXTS, f"k{random.randrange(100):03d}", f"new{random.randrange(50)}"))
            case FieldDescriptor.TYPE_BYTES:
                return random.choice((b"", b"x", PICTURE, PICTURE, self.mangled(PICTURE)))
            case FieldDescriptor.TYPE_BOOL:
                return random.random() < 0.5
            case FieldDescriptor.TYPE_FLOAT | FieldDescriptor.TYPE_DOUBLE:
                return random.choice(FLOATS)
            case FieldDescriptor.TYPE_INT64:
                return random.choice(LONG)
            case _:  # int32 and enums: any number goes over the wire
                return random.choice((*INTEGERS, 1, 3, 5, 10))

    def _vector(self) -> list[float]:
        random = self.random
        length = random.choice([self._dimensions] * 8 + [0, 1, self._dimensions - 1, 5000])
        if random.random() < 0.3:
            return [random.choice(FLOATS) for _ in range(length)]
        values = [random.gauss(0, 1) for _ in range(length)]
        if values and random.random() < 0.2:
            values[random.randrange(length)] = random.choice(FLOATS)
        return values

    def _struct(self, struct: Any, depth: int = 0) -> None:
        random = self.random
        for _ in range(random.randrange(4)):
            value = struct.fields[random.choice((*TEXTS[:-1], "i", "price"))]
            kind = random.randrange(7)
            if kind == 0:
                value.number_value = random.choice(FLOATS)
            elif kind == 1:
                value.string_value = random.choice(TEXTS)
            elif kind == 2:
                value.null_value = 0
            elif kind == 3 and depth < 30:
                self._struct(value.struct_value, depth + random.choice((1, 1, 10)))
            elif kind == 4:
                value.list_value.SetInParent()
            elif kind == 5:
                value.bool_value = True


METHODS = {
    f"/{service.full_name}/{method.name}": method
    for service in pb.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
# They would undo what the others need, or take long.
RARE = ("DeleteCollection", "CompactCollection", "SnapshotCollection", "CreateCollection", "FindDuplicates")


class Hail:
    """Calls of every method, and what came back."""

    def __init__(self, channel: grpc.Channel, seed: int, dimensions: int) -> None:
        self._channel = channel
        self._maker = Maker(seed, dimensions)
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[tuple[str, str, bytes]] = []
        """Method, what was wrong, and the (last) request."""

    def call(self, timeout: float = 30.0) -> None:
        """One call, somehow."""
        random = self._maker.random
        name = random.choice(list(METHODS))
        method = METHODS[name]
        if method.name in RARE and random.random() < 0.7:
            return
        kind: Any = getattr(pb, method.input_type.name)
        requests = []
        for _ in range(random.choice((0, 1, 2, 5, 20)) if method.client_streaming else 1):
            made = self._maker.request(kind)
            if method.name == "DeleteCollection" and getattr(made, "name", "") == "many":
                made.name = "other"  # type: ignore[attr-defined]
            data = made.SerializeToString()
            requests.append(self._maker.mangled(data) if random.random() < 0.25 else data)
        sides = "_".join("stream" if s else "unary" for s in (method.client_streaming, method.server_streaming))
        call: Callable[..., Any] = getattr(self._channel, sides)(name)
        try:
            answer = call(iter(requests) if method.client_streaming else requests[0], timeout=timeout)
            answers = list(answer) if method.server_streaming else [answer]
        except grpc.RpcError as e:
            self._refused(method.name, e, requests)
            return
        self.outcomes[f"{method.name} OK"] += 1
        for data in answers:
            message = getattr(pb, method.output_type.name).FromString(data)
            token = getattr(message, "next_page_token", "")
            if token:
                self._maker.tokens[10 + random.randrange(20) :] = [token]
            for result in getattr(message, "results", [message]):
                if "error" in result.DESCRIPTOR.fields_by_name and result.HasField("error"):
                    self._judge(method.name, result.error, requests)

    def _refused(self, method: str, error: Any, requests: list[bytes]) -> None:
        details = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin")
        if details is None:
            self.wrong.append((method, f"{error.code().name} without details: {error.details()}", requests[-1]))
            return
        self._judge(method, status_pb2.Status.FromString(details), requests)

    def _judge(self, method: str, status: status_pb2.Status, requests: list[bytes]) -> None:
        info = error_details_pb2.ErrorInfo()
        code = next(c for c in grpc.StatusCode if c.value[0] == status.code)
        if not status.details or not status.details[0].Unpack(info) or info.domain != "likewise" or not info.reason:
            self.wrong.append((method, f"{code.name} without ErrorInfo: {status.message}", requests[-1]))
        elif code in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.DATA_LOSS):
            self.wrong.append((method, f"{code.name} {status.message}", requests[-1]))
        self.outcomes[f"{method} {code.name} {info.reason}"] += 1
