"""Searches that wait at one time go through the index together.

A search alone takes a tenth of a millisecond; handing it to a thread and its answer back takes far longer, as both threads
want Python's lock all the time. So searches that are known to be short run on the event loop, a few milliseconds of them at
a time. All others go to threads: one takes all that wait for the same collection, searches them as one batch, makes their
answers, and returns them in one go.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from export.bundle import Embeddings
from service.call import Call, current
from service.errors import ExpiredError, QueueFullError, UnavailableError
from service.filter import Filter
from service.metrics import Metrics
from service.pace import SHARE, Pace
from service.reading import Readable
from service.view import Read

# Searches of one batch.
TOGETHER = 64
# Seconds that the event loop may search at a time.
AT_ONCE = 0.002
# Seconds that searches which go together may take in a thread, about: one that comes next waits for them.
LONGEST = 0.1
# Seconds that an exact search takes for each value of a collection's vectors, about, in a batch.
PER_VALUE = 2e-10
# Turns of the event loop without another search after which those that wait begin, and seconds after which they do anyway:
# four together take half the time of each alone.
PATIENCE = 8
GATHERED = 0.002
# Neighbours that a search on the event loop may ask for.
FEW = 100


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
    answer: Callable[[list[Any]], Any]
    """Makes the answer, in the thread that searched."""
    read: Read[Any] | None
    """What is read of the rows that were found; None: they themselves, as hits."""
    done: asyncio.Future[Any]
    queued: float
    call: Call | None = field(default_factory=current)
    """Which call it belongs to."""
    began: float = 0.0
    """When it left the queue, and when it was answered."""
    ended: float = 0.0

    def goes_with(self, other: Search) -> bool:
        """Whether both may go through the index together."""
        return (
            self.collection is other.collection
            and self.k == other.k
            and self.min_score == other.min_score
            and self.read is other.read
        )


class Searcher:
    """Threads that search; used from one event loop."""

    def __init__(self, threads: int, limit: int, metrics: Metrics) -> None:
        self._threads, self._limit, self._metrics = threads, limit, metrics
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="search")
        self._waited = metrics.queue_seconds.labels(stage="search")
        self._lock = threading.Lock()
        self._waiting: deque[Search] = deque()
        self._working = 0
        self._searching = 0  # searches that threads are at
        self._pace = Pace()  # of the threads; under the lock
        # Searches that run on the event loop, and seconds that one takes lately: the loop's own.
        self._short: deque[Search] = deque()
        self._seconds: weakref.WeakKeyDictionary[Readable, float] = weakref.WeakKeyDictionary()

    def submit(
        self,
        collection: Readable,
        query: Embeddings,
        k: int,
        answer: Callable[[list[Any]], Any],
        min_score: float | None = None,
        wanted: Filter | None = None,
        leave_out: frozenset[str] = frozenset(),
        deadline: float | None = None,
        blocks: bool = True,
        read: Read[Any] | None = None,
    ) -> asyncio.Future[Any]:
        """What `answer` makes of the k nearest rows of a query [D]: of hits, or where `read` is given of pairs of what it
        reads of a row and its score; the query has length 1 then. Raises `QueueFullError`; the future raises what the
        search or `answer` does, and `ExpiredError` when `deadline` (monotonic) passes while it waits. `blocks`: whether
        `answer` may wait for the disk."""
        loop = asyncio.get_running_loop()
        search = Search(
            collection, query, k, min_score, wanted, leave_out, deadline, answer, read, loop.create_future(),
            time.monotonic(),
        )  # fmt: skip
        waiting = len(self._waiting) + len(self._short)
        if waiting >= self._limit:
            self._metrics.rejected.labels(reason="QUEUE_FULL").inc()
            raise QueueFullError(
                f"{waiting} searches are waiting, {self._limit} are allowed: try again shortly",
                0.1, queue_depth=waiting, limit=self._limit,
            )  # fmt: skip
        short = not blocks and wanted is None and k <= FEW and self._seconds.get(collection, AT_ONCE) < AT_ONCE / 2
        if short:
            if not self._short:
                loop.call_soon(self._gather_short, loop, 0, 0)
            self._short.append(search)
            return search.done
        with self._lock:
            wait = self._pace.seconds(len(self._waiting) + self._searching + 1, self._most(collection, LONGEST))
            left = math.inf if deadline is None else deadline - search.queued
            if wait > SHARE * left > 0 and self._working:
                self._metrics.rejected.labels(reason="QUEUE_FULL").inc()
                raise QueueFullError(
                    f"{wait:.2f} s of searches are ahead, and the deadline is in {left:.2f} s: try again shortly, or allow "
                    "more time", max(0.05, wait - left), wait_seconds=round(wait, 3), left_seconds=round(left, 3),
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

    def _gather_short(self, loop: asyncio.AbstractEventLoop, seen: int, quiet: int) -> None:
        """Wait for other searches as long as they keep arriving: the loop takes several turns to receive a call.
        `seen`: searches before this turn; `quiet`: turns without another."""
        count = len(self._short)
        quiet = quiet + 1 if count == seen else 0
        if quiet >= PATIENCE or count >= TOGETHER or time.monotonic() - self._short[0].queued >= GATHERED:
            self._search_short(loop)
        else:
            loop.call_soon(self._gather_short, loop, count, quiet)

    def _search_short(self, loop: asyncio.AbstractEventLoop) -> None:
        """Some of the short searches, on the event loop; then it is others' turn."""
        first = self._short[0]
        most = self._most(first.collection, AT_ONCE)
        together: list[Search] = []
        while self._short and len(together) < most and self._short[0].goes_with(first):
            together.append(self._short.popleft())
        start = time.thread_time()
        outcomes = self._searched(together)
        self._deliver(together, outcomes, time.thread_time() - start)
        if self._short:
            loop.call_soon(self._gather_short, loop, 0, 0)

    def _most(self, collection: Readable, seconds: float) -> int:
        """How many searches take so long together; where that is not known yet, as if every row were compared."""
        each = self._seconds.get(collection)
        if each is None:
            each = len(collection) * collection.dim * PER_VALUE
        return min(TOGETHER, max(1, int(seconds / max(1e-9, each))))

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        together: list[Search] = []
        while True:
            with self._lock:
                self._searching -= len(together)
                self._pace.took(len(together), len(self._waiting))
                together = self._next()
                self._searching += len(together)
                if not together:
                    self._working -= 1
                    return
            start = time.thread_time()  # how long others held Python's lock says nothing of the search
            outcomes = self._searched(together)
            try:
                loop.call_soon_threadsafe(self._deliver, together, outcomes, time.thread_time() - start)
            except RuntimeError:  # the loop was closed meanwhile: nobody waits any more
                continue

    def _next(self) -> list[Search]:
        """The search that has waited longest, and those that go with it. Under the lock."""
        if not self._waiting:
            return []
        first = self._waiting[0]
        together: list[Search] = []
        left: deque[Search] = deque()
        most = self._most(first.collection, LONGEST)
        for search in self._waiting:
            if len(together) < most and search.goes_with(first):
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
            queries = np.stack([together[i].query for i in kept])
            filters, left_out = [together[i].wanted for i in kept], [together[i].leave_out for i in kept]
            found: list[list[Any]]
            if first.read is None:
                found = list(
                    first.collection.search(queries, first.k, first.min_score, filters=filters, leave_out=left_out)
                )
            else:
                found = first.collection.nearest(queries, first.k, first.min_score, filters, left_out, first.read)
        except Exception as e:
            if len(kept) == 1:
                outcomes[kept[0]] = e
            else:  # one of them spoils it: each alone
                for i in kept:
                    (outcomes[i],) = self._searched([together[i]])
            return outcomes
        scanned = time.monotonic()
        self._metrics.search_seconds.observe(scanned - now)
        best: list[float] = [
            hits[0][1] for i, hits in zip(kept, found, strict=True)
            if hits and together[i].wanted is None and not together[i].leave_out
        ]  # fmt: skip
        self._metrics.drift.searched(first.collection, queries, best)
        for i, hits in zip(kept, found, strict=True):
            search = together[i]
            search.began, search.ended = now, scanned
            self._waited.observe(now - search.queued)
            try:
                outcomes[i] = search.answer(hits)
            except Exception as e:
                outcomes[i] = e
        self._metrics.answer_seconds.observe(time.monotonic() - scanned)
        return outcomes

    def _deliver(self, together: Sequence[Search], outcomes: Sequence[Any], seconds: float) -> None:
        """On the event loop; `seconds`: that all of them took."""
        first = together[0]
        if first.k <= FEW and first.wanted is None:
            each = seconds / len(together)
            self._seconds[first.collection] = 0.8 * self._seconds.get(first.collection, each) + 0.2 * each
        for search, outcome in zip(together, outcomes, strict=True):
            if search.done.done():
                continue
            if search.call is not None and search.ended:
                search.call.stage("search_queue", search.queued, search.began)
                search.call.stage("search", search.began, search.ended, together=len(together))
            if isinstance(outcome, Exception):
                search.done.set_exception(outcome)
            else:
                search.done.set_result(outcome)
