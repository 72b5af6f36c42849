"""Searches that wait for a thread at one time go through the index together.

A search alone takes a tenth of a millisecond; handing it to a thread and its answer back takes as long. So a thread takes
all that wait for the same collection, searches them as one batch, makes their answers, and returns them in one go.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from export.bundle import Embeddings
from service.errors import ExpiredError, QueueFullError, UnavailableError
from service.filter import Filter
from service.metrics import Metrics
from service.reading import Readable
from service.view import Hit

# Searches of one batch.
TOGETHER = 64


@dataclass(eq=False)
class Search:
    """A search on its way to its answer."""

    collection: Readable
    query: Embeddings
    """[D]"""
    k: int
    min_score: float | None
    wanted: Filter | None
    leave_out: frozenset[str]
    deadline: float | None
    """In seconds of `time.monotonic`."""
    answer: Callable[[list[Hit]], Any]
    """Makes the answer, in the thread that searched."""
    done: asyncio.Future[Any]
    queued: float

    def goes_with(self, other: Search) -> bool:
        """Whether both may go through the index together."""
        return (self.collection, self.k, self.min_score) == (other.collection, other.k, other.min_score)


class Searcher:
    """Threads that search; used from one event loop."""

    def __init__(self, threads: int, limit: int, metrics: Metrics) -> None:
        self._threads, self._limit, self._metrics = threads, limit, metrics
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="search")
        self._lock = threading.Lock()
        self._waiting: deque[Search] = deque()
        self._working = 0

    def submit(
        self,
        collection: Readable,
        query: Embeddings,
        k: int,
        answer: Callable[[list[Hit]], Any],
        min_score: float | None = None,
        wanted: Filter | None = None,
        leave_out: frozenset[str] = frozenset(),
        deadline: float | None = None,
    ) -> asyncio.Future[Any]:
        """What `answer` makes of the k nearest rows of a query [D]. Raises `QueueFullError`; the future raises what the
        search or `answer` does, and `ExpiredError` when `deadline` (monotonic) passes while it waits."""
        loop = asyncio.get_running_loop()
        search = Search(
            collection, query, k, min_score, wanted, leave_out, deadline, answer, loop.create_future(), time.monotonic()
        )
        with self._lock:
            if len(self._waiting) >= self._limit:
                self._metrics.rejected.labels(reason="QUEUE_FULL").inc()
                raise QueueFullError(
                    f"{len(self._waiting)} searches are waiting, {self._limit} are allowed: try again shortly",
                    0.1, queue_depth=len(self._waiting), limit=self._limit,
                )  # fmt: skip
            self._waiting.append(search)
            start = self._working < self._threads
            self._working += start
        if start:
            self._pool.submit(self._work, loop)
        return search.done

    def close(self) -> None:
        """Finish what waits, and stop the threads."""
        self._pool.shutdown(wait=True)

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        while True:
            with self._lock:
                together = self._next()
                if not together:
                    self._working -= 1
                    return
            outcomes = self._searched(together)
            try:
                loop.call_soon_threadsafe(_deliver, together, outcomes)
            except RuntimeError:  # the loop was closed meanwhile: nobody waits any more
                continue

    def _next(self) -> list[Search]:
        """The search that has waited longest, and those that go with it. Under the lock."""
        if not self._waiting:
            return []
        first = self._waiting[0]
        together: list[Search] = []
        left: deque[Search] = deque()
        for search in self._waiting:
            if len(together) < TOGETHER and search.goes_with(first):
                together.append(search)
            else:
                left.append(search)
        self._waiting = left
        return together

    def _searched(self, together: Sequence[Search]) -> list[Any]:
        """What became of each: an answer, or an exception."""
        now = time.monotonic()
        outcomes: list[Any] = [None] * len(together)
        kept = []
        for i, search in enumerate(together):
            if search.done.cancelled():
                self._metrics.rejected.labels(reason="CANCELLED").inc()
                outcomes[i] = UnavailableError("nobody waits for it")
            elif search.deadline is not None and now >= search.deadline:
                self._metrics.rejected.labels(reason="EXPIRED_IN_QUEUE").inc()
                outcomes[i] = ExpiredError(
                    f"the deadline passed after {now - search.queued:.3f} s in the queue: allow more time"
                )
            else:
                kept.append(i)
        if not kept:
            return outcomes
        first = together[0]
        try:
            found = first.collection.search(
                np.stack([together[i].query for i in kept]), first.k, first.min_score,
                filters=[together[i].wanted for i in kept], leave_out=[together[i].leave_out for i in kept],
            )  # fmt: skip
        except Exception as e:
            if len(kept) == 1:
                outcomes[kept[0]] = e
            else:  # one of them spoils it: each alone
                for i in kept:
                    (outcomes[i],) = self._searched([together[i]])
            return outcomes
        self._metrics.search_seconds.observe(time.monotonic() - now)
        for i, hits in zip(kept, found, strict=True):
            try:
                outcomes[i] = together[i].answer(hits)
            except Exception as e:
                outcomes[i] = e
        return outcomes


def _deliver(together: Sequence[Search], outcomes: Sequence[Any]) -> None:
    for search, outcome in zip(together, outcomes, strict=True):
        if search.done.done():
            continue
        if isinstance(outcome, Exception):
            search.done.set_exception(outcome)
        else:
            search.done.set_result(outcome)
