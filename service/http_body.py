"""What comes in the body of an HTTP request: whole, line by line, or as a form; never more than a message may have."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import NamedTuple, TypeVar

from aiohttp import BodyPartReader, web
from aiohttp.http_exceptions import HttpProcessingError
from google.rpc.code_pb2 import Code

from service.errors import InvalidArgumentError
from service.transcode import HttpError

# A body of which nothing comes for so long is given up.
STALL_SECONDS = 60.0
_PARTS = 32

T = TypeVar("T")


class Form(NamedTuple):
    """multipart/form-data."""

    image: bytes
    fields: list[tuple[str, str]]


async def whole(request: web.Request, most: int) -> bytes:
    """Raises `HttpError`, `InvalidArgumentError`."""
    if (request.content_length or 0) > most:
        raise too_large(most)
    body = bytearray()
    while chunk := await _soon(request.content.readany()):
        body += chunk
        if len(body) > most:
            raise too_large(most)
    return bytes(body)


async def lines(request: web.Request, most: int) -> AsyncIterator[bytes]:
    """As they come, without their ends; a stream may pause. Raises `HttpError`, `InvalidArgumentError`."""
    rest = bytearray()
    try:
        async for chunk in request.content.iter_any():
            begin, searched = 0, len(rest)
            rest += chunk
            while (end := rest.find(b"\n", max(begin, searched))) >= 0:
                yield bytes(rest[begin:end])
                begin = end + 1
            del rest[:begin]
            if len(rest) > most:
                raise too_large(most)
    except web.RequestPayloadError:
        raise _cut_off() from None
    yield bytes(rest)


async def form(request: web.Request, most: int) -> Form:
    """The picture is the part `image`. Raises `HttpError`, `InvalidArgumentError`."""
    image: bytes | None = None
    fields: list[tuple[str, str]] = []
    left = most
    try:
        reader = await request.multipart()
        for number in range(_PARTS + 1):
            part = await _soon(reader.next())
            if part is None:
                break
            if number == _PARTS or not isinstance(part, BodyPartReader) or part.name is None:
                raise ValueError(f"more than {_PARTS} parts, or one without a name or with parts of its own")
            content = bytearray()
            while chunk := await _soon(part.read_chunk()):
                content += chunk
                left -= len(chunk)
                if left < 0:
                    raise too_large(most)
            if part.name != "image":
                fields.append((part.name, content.decode()))
            elif image is None:
                image = bytes(content)
            else:
                raise ValueError("two parts named image")
    except (ValueError, AssertionError, HttpProcessingError) as e:  # aiohttp asserts what senders have to keep to
        said = " ".join(str(e).split())[:200]
        raise InvalidArgumentError(f"the form cannot be read ({said}): send one file named image", "BAD_BODY") from None
    if image is None:
        raise InvalidArgumentError("the form has no part named image: send the picture as that", "BAD_BODY", "image")
    return Form(image, fields)


def too_large(most: int) -> HttpError:
    """Of a body, or a message."""
    return HttpError(
        f"a message may have {most / 2**20:g} MiB: send, or ask for, less at once", Code.RESOURCE_EXHAUSTED,
        "MESSAGE_TOO_LARGE", limit=most,
    )  # fmt: skip


async def _soon(reading: Awaitable[T]) -> T:
    try:
        async with asyncio.timeout(STALL_SECONDS):
            return await reading
    except TimeoutError:
        raise HttpError(
            f"no more of the body came for {STALL_SECONDS:g} s: send it again", Code.DEADLINE_EXCEEDED, "BODY_STALLED"
        ) from None
    except web.RequestPayloadError:
        raise _cut_off() from None


def _cut_off() -> InvalidArgumentError:
    return InvalidArgumentError("the body ended before it was whole: send it again", "BAD_BODY")
