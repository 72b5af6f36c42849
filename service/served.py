"""A collection behind its name, and who uses it."""

from __future__ import annotations

import asyncio
from typing import Self

from service.collection import Collection
from service.errors import InvalidArgumentError, PreconditionError
from service.reading import Readable


class Uses:
    """How many are inside (`with`). The event loop's own."""

    def __init__(self) -> None:
        self._count = 0
        self._nobody = asyncio.Event()
        self._nobody.set()

    def __enter__(self) -> Self:
        self._count += 1
        self._nobody.clear()
        return self

    def __exit__(self, *_: object) -> None:
        self._count -= 1
        if not self._count:
            self._nobody.set()

    async def ended(self) -> None:
        """Once nobody is inside."""
        await self._nobody.wait()


class MovedError(Exception):
    """A name stands for another collection since this one was looked up: look it up again."""


class Served:
    """A collection that a name stands for.

    Attributes: `collection`; `uses`, the calls that read it; `writes`, those that are under way.
    """

    def __init__(self, collection: Readable, was_another: bool = False) -> None:
        """`was_another`: the name stood for a collection of another space lately, so that vectors have to say theirs."""
        self.collection = collection
        self.uses, self.writes = Uses(), Uses()
        self.was_another = was_another
        self._moved = False
        self._held: asyncio.Event | None = None

    def __enter__(self) -> Self:
        self.uses.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.uses.__exit__()

    @property
    def writer(self) -> Collection:
        """The collection, to be written to. Raises `PreconditionError` where another process does that."""
        if not isinstance(self.collection, Collection):
            raise read_only()
        return self.collection

    @property
    def has_moved(self) -> bool:
        """Whether the name stands for another collection by now."""
        return self._moved

    async def writable(self) -> None:
        """Once writes are not held back. Raises `MovedError` where they have to go elsewhere."""
        while self._held is not None:
            await self._held.wait()
        if self._moved:
            raise MovedError

    async def hold(self) -> None:
        """Hold writes back, once those under way are done."""
        self._held = asyncio.Event()
        await self.writes.ended()

    def release(self, moved: bool) -> None:
        """Let them go on: here, or where the name stands for now (`moved`)."""
        self._moved = moved
        if self._held is not None:
            self._held.set()
            self._held = None

    def check_space(self, space_id: str, path: str) -> None:
        """Raises `InvalidArgumentError` where a vector would have to say what space it is of, and does not."""
        if self.was_another and not space_id:
            raise InvalidArgumentError(
                f"the encoder of the collection {self.collection.name!r} was exchanged, and the vector does not say which "
                f"one it comes from: set space_id (here {self.collection.space_id})", "SPACE_UNNAMED", f"{path}.space_id",
            )  # fmt: skip


def read_only() -> PreconditionError:
    """What a server that follows says to writes."""
    return PreconditionError(
        "this server follows what another process writes (--follow): send writes to that one", "READ_ONLY"
    )
