"""Bidirectional streams: read only while there is room, answered as the answers come, freed whole when the client leaves."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Generic, NamedTuple, TypeVar

import grpc

from service.errors import UnavailableError

# Items of a stream that are worked on at a time, and their bytes: as long as there are fewer, the next request is read.
WINDOW = 256
WINDOW_BYTES = 64 * 2**20

Request = TypeVar("Request")
Response = TypeVar("Response")


class Load(NamedTuple):
    """What a request takes of the window."""

    items: int
    bytes: int


class Stream(Generic[Request, Response]):
    """One stream on its way; the event loop's own."""

    def __init__(self, context: Any, window: int = WINDOW) -> None:
        self._context, self._window = context, window
        self._items = self._bytes = 0
        self._room = asyncio.Event()
        self._changed = asyncio.Event()
        self._reading: asyncio.Task[None] | None = None
        self._draining = False

    async def run(
        self,
        begin: Callable[[Request], Awaitable[Load]],
        collect: Callable[[], Awaitable[tuple[Response, Load] | None]],
    ) -> None:
        """Until the client has sent its last and has every response.

        `begin` starts the work of a request; `collect` gives a response that is ready and what it frees, None where there
        is none yet: `notice` says when to ask again. Raises what `begin` does, once all before it is answered.
        """
        self._reading = asyncio.create_task(self._read(begin))
        self._reading.add_done_callback(self.notice)
        if self._draining:
            self._reading.cancel()
        try:
            while True:
                self._changed.clear()
                made = await collect()
                if made is not None:
                    await self._context.write(made[0])
                    self._items -= made[1].items
                    self._bytes -= made[1].bytes
                    self._room.set()
                elif self._reading.done() and not self._items:
                    break
                else:
                    await self._changed.wait()
        finally:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
        if self._draining:
            raise UnavailableError("the server is shutting down: go on at another replica after the last response")
        self._reading.result()

    def notice(self, _: object = None) -> None:
        """Something was finished."""
        self._changed.set()

    def drain(self) -> None:
        """Read no more; what was read is still answered."""
        self._draining = True
        if self._reading is not None:
            self._reading.cancel()

    async def _read(self, begin: Callable[[Request], Awaitable[Load]]) -> None:
        while True:
            while self._items >= self._window or self._bytes >= WINDOW_BYTES:
                self._room.clear()
                await self._room.wait()
            request = await self._context.read()
            if request is grpc.aio.EOF:
                return
            load = await begin(request)
            self._items += load.items
            self._bytes += load.bytes


class Unordered(Generic[Response]):
    """Responses in the order in which they become ready."""

    def __init__(self, notice: Callable[[], None], failed: Callable[[int, BaseException], Response]) -> None:
        """`failed`: the response to a request, by its id, whose work raised."""
        self._notice, self._failed = notice, failed
        self._working: set[asyncio.Future[Response]] = set()
        self._ready: deque[tuple[Response, Load]] = deque()

    def work(self, number: int, work: asyncio.Future[Response], load: Load) -> None:
        """Its result answers the request of that id."""
        self._working.add(work)

        def finished(done: asyncio.Future[Response]) -> None:
            self._working.discard(done)
            if not done.cancelled():
                error = done.exception()
                self.put(done.result() if error is None else self._failed(number, error), load)

        work.add_done_callback(finished)

    def put(self, response: Response, load: Load) -> None:
        """A response that is ready."""
        self._ready.append((response, load))
        self._notice()

    async def collect(self) -> tuple[Response, Load] | None:
        """The next that is ready."""
        return self._ready.popleft() if self._ready else None

    def close(self) -> None:
        """Nobody waits any more."""
        for work in list(self._working):
            work.cancel()
