"""A server that follows: it serves what another process of this machine writes, collections and releases that come and go
included."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from export.bundle import Bundle
from service.logs import LOG
from service.model import Model
from service.served import Served
from service.servicer import Engine
from service.store import read_pointers

# Seconds between looks at what was committed, and at which collections there are.
COMMITS, COLLECTIONS = 0.05, 1.0


class Following:
    """Keeps a store that follows up to date. The event loop's own."""

    def __init__(
        self, engine: Engine, model_of: Callable[[Bundle], Model], collections: Path, releases: Path | None
    ) -> None:
        """`model_of` loads a bundle, such as that of a release which the writer has switched to."""
        self._engine, self._model_of = engine, model_of
        self._collections, self._releases = collections, releases
        self._spaces: dict[str, str] = {}  # of releases whose bundle was opened: it is not, again, every second
        self._tasks: set[asyncio.Task[Any]] = set()
        self._said = ""

    def start(self) -> None:
        """Inside a running event loop."""
        for every, look in ((COMMITS, self._look), (COLLECTIONS, self._rescan)):
            self._start(self._repeat(every, look))

    async def stop(self) -> None:
        """End."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _repeat(self, every: float, look: Callable[[], Any]) -> None:
        while True:
            await asyncio.sleep(every)
            try:
                await look()
                said = "; ".join(sorted(self._engine.store.problems.values()))
            except Exception as e:  # whatever it is, what is served goes on, and it looks again
                said = f"{type(e).__name__}: {e}"
            if said and said != self._said:
                LOG.error("not everything can be followed: %s", said, extra={"event": "following"})
            self._said = said or self._said

    async def _look(self) -> None:
        await self._engine.look(self._engine.store.look)

    async def _rescan(self) -> None:
        for space, model in (await self._engine.look(self._new_models)).items():
            model.pipeline.start()
            self._engine.models[space] = model
        for served in await self._engine.look(self._engine.store.rescan):
            self._start(self._let_go(served))

    def _new_models(self) -> dict[str, Model]:
        """Those of releases that are served now, and were not before."""
        found: dict[str, Model] = {}
        for pointer in read_pointers(self._collections).values():
            known = self._spaces.get(pointer.live)
            if pointer.live and self._releases is not None and known not in self._engine.models:
                bundle = Bundle.open(self._releases / pointer.live / "bundle")
                self._spaces[pointer.live] = bundle.space_id
                if bundle.space_id not in self._engine.models and bundle.space_id not in found:
                    found[bundle.space_id] = self._model_of(bundle)
        return found

    async def _let_go(self, served: Served) -> None:
        """Close a collection once no call uses it, and its encoder where no other does."""
        await served.uses.ended()
        await self._engine.look(served.collection.close)
        await self._engine.free_models()
