"""A server that tests talk to."""

from __future__ import annotations

import asyncio
import subprocess
import threading
from typing import Any

from service.config import Serve
from service.server import Server


def address_of(server: subprocess.Popen[str]) -> str:
    """Where a `likewise serve` process listens, once it says so on its standard error."""
    assert server.stderr is not None
    said = ""
    for line in server.stderr:  # it ends with the process
        if line.startswith("serving lw1-"):
            return line.split(" on ")[1].split()[0]
        said += line
    raise AssertionError(said)


class Running:
    """A server in a thread of this process."""

    def __init__(self, traces: Any = None, **settings: Any) -> None:
        self._traces = traces
        self.settings = {
            "port": 0,
            "metrics_port": 0,
            "threads": 1,
            "check_seconds": 0.3,
            "grace_seconds": 3,
            **settings,
        }
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()))
        self._thread.start()
        assert self._started.wait(30)
        self.address = f"127.0.0.1:{self.server.port}"

    async def _main(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        try:
            self.server = Server(Serve(**self.settings), traces=self._traces)
            await self.server.start()
        finally:
            self._started.set()
        await self._stop.wait()
        await self.server.stop()

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)
        assert not self._thread.is_alive()
