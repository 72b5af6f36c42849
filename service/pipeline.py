"""Encoded pictures → vectors under load: bounded, fair, by priority, and nothing is computed that nobody waits for.

    admit ─▶ queue (by priority, clients in turn) ─▶ decode (threads or processes) ─▶ batch ─▶ infer (a thread per lane)

A stage takes work only when the next one has room, so what arrives later and is more urgent still overtakes what waits.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from export.bundle import Embeddings
from export.preprocess import Pixels, UnreadablePictureError
from export.runtime import PIECES
from service.call import Call, current
from service.encoder import Decoded
from service.errors import (
    ExpiredError,
    InternalError,
    QueueFullError,
    RateLimitedError,
    ServiceError,
    UnavailableError,
)
from service.metrics import Metrics
from service.pace import SHARE, Pace
from service.tracing import batch_span

# Of so many pictures one is taken from the bulk, however many interactive ones wait.
BULK_TURN = 8
# A client counts for so many seconds after it last asked.
RECENT = 10.0


class Priority(IntEnum):
    """What goes first."""

    INTERACTIVE = 0
    BULK = 1


class Embedded(NamedTuple):
    """A vector, and where its time went, in seconds."""

    vector: Embeddings
    decode_seconds: float
    queue_seconds: float
    infer_seconds: float
    thumbnail: bytes | None = None
    """JPEG, where one was asked for."""


@dataclass(eq=False)
class Job:
    """A picture on its way to its vector."""

    client: str
    priority: Priority
    deadline: float | None
    """In seconds of `time.monotonic`."""
    done: asyncio.Future[Embedded]
    content: bytes = b""
    thumbnail: int | None = None
    """Longer side of the thumbnail to be made, in pixels."""
    decoded: Decoded | None = None
    queued: float = field(default_factory=time.monotonic)
    ready: float = 0.0
    """When it was decoded."""
    call: Call | None = field(default_factory=current)
    """Which call it belongs to."""


class FairQueue:
    """Jobs by priority; within a priority the clients take turns (Nagle 1985, RFC 970), each in its own order."""

    def __init__(self) -> None:
        self._lanes: dict[Priority, OrderedDict[str, deque[Job]]] = {p: OrderedDict() for p in Priority}
        self._taken = 0

    def __len__(self) -> int:
        return sum(len(jobs) for lane in self._lanes.values() for jobs in lane.values())

    def put(self, job: Job) -> None:
        """Behind the other jobs of its client."""
        self._lanes[job.priority].setdefault(job.client, deque()).append(job)

    def ahead(self, client: str, priority: Priority) -> int:
        """How many have their turn before another job of this client, as things are."""
        found = 0
        for level in Priority:
            if level > priority:
                break
            turns = len(self._lanes[level].get(client, ())) + 1 if level == priority else None
            found += sum(len(jobs) if turns is None else min(len(jobs), turns) for jobs in self._lanes[level].values())
        return found

    def pop(self) -> Job:
        """The next one. Raises `IndexError` where there is none."""
        self._taken += 1
        order = [Priority.INTERACTIVE, Priority.BULK]
        if self._taken % BULK_TURN == 0:
            order.reverse()
        for priority in order:
            lane = self._lanes[priority]
            if lane:
                client, jobs = next(iter(lane.items()))
                job = jobs.popleft()
                if jobs:
                    lane.move_to_end(client)
                else:
                    del lane[client]
                return job
        raise IndexError("the queue is empty")


class Admission:
    """How many pictures may be inside, altogether and of one client. Not thread-safe: the event loop's own."""

    def __init__(self, limit: int, metrics: Metrics) -> None:
        self._limit, self._metrics = limit, metrics
        self._held: dict[str, int] = {}
        self._seen: dict[str, float] = {}
        self._inside = 0
        self._rate = 0.0  # pictures a second, lately
        self._since = time.monotonic()
        self._finished = 0
        self._left = asyncio.Event()  # set, and replaced, when somebody leaves
        #: told of each claim before it is granted; may raise `RateLimitedError` and `QuotaError`
        self.charge: Callable[[str, int], None] = lambda client, count: None

    @property
    def inside(self) -> int:
        """Pictures that were admitted and are not answered."""
        return self._inside

    def enter(self, client: str, count: int) -> None:
        """Claim room for `count` pictures, before they are decoded; pair with `leave`. Raises `QueueFullError`: all are
        refused at once, rather than kept waiting. Where others have asked lately, one client may hold half of the room."""
        said = self._entered(client, count)
        if said is None:
            return
        self._metrics.rejected.labels(reason="QUEUE_FULL").inc(count)
        raise QueueFullError(
            f"{said}: try again shortly, or send fewer at once", retry_seconds=self._delay(),
            queue_depth=self._inside, limit=self._limit,
        )  # fmt: skip

    async def enter_patiently(self, client: str, count: int) -> None:
        """`enter`, once there is room. Raises `QueueFullError` where there never is."""
        while True:
            try:
                if self._entered(client, count) is None:
                    return
            except RateLimitedError as e:
                await asyncio.sleep(e.retry_seconds or 0)
                continue
            if count > self._limit:
                self.enter(client, count)
            await self._left.wait()

    def _entered(self, client: str, count: int) -> str | None:
        """Room claimed; or why there is none."""
        now = time.monotonic()
        self._seen[client] = now
        if len(self._seen) > 1:
            self._seen = {name: at for name, at in self._seen.items() if now - at < RECENT}
        mine = self._held.get(client, 0)
        share = self._limit if len(self._seen) == 1 else max(1, self._limit // 2)
        if self._inside + count > self._limit:
            return f"{self._inside} pictures are waiting, {self._limit} are allowed"
        if mine + count > share and mine:
            return f"{mine} pictures of this client are waiting, {share} are allowed while others ask, too"
        self.charge(client, count)
        self._held[client] = mine + count
        self._inside += count
        self._metrics.queue_depth.inc(count)
        return None

    def leave(self, client: str, count: int) -> None:
        """Give the room back."""
        self._left.set()
        self._left = asyncio.Event()
        self._inside -= count
        self._held[client] -= count
        if not self._held[client]:
            del self._held[client]
        self._metrics.queue_depth.dec(count)
        self._finished += count
        passed = time.monotonic() - self._since
        if passed > 1:
            rate = self._finished / passed
            self._rate = rate if not self._rate else 0.5 * (self._rate + rate)
            self._since, self._finished = time.monotonic(), 0

    def _delay(self) -> float:
        """Seconds until half of what waits is done, as far as is known."""
        return min(30.0, max(0.05, 0.5 * self._inside / self._rate)) if self._rate else 0.5


class Pipeline:
    """Pictures in, vectors out.

    `decode` maps encoded bytes, and a thumbnail's longer side or None, to pixels; `run` maps uint8 [N, H, W, 3] to float32
    [N, D]. With several `lanes` (`export.runtime`) `run` is called in as many threads at a time, each with a small batch, a
    part of `max_batch`: no lane waits for another. A batch that fails is tried again picture by picture, so that a poisonous
    one fails alone; unless the canary (`watch`) fails, too: then it is the encoder, and pictures are refused until it is
    `sound` again.
    """

    def __init__(
        self,
        decode: Callable[[bytes, int | None], Awaitable[Decoded]],
        decoders: int,
        run: Callable[[Pixels], Embeddings],
        max_batch: int,
        max_wait: float,
        limit: int,
        metrics: Metrics,
        lanes: int = 1,
    ) -> None:
        self._decode, self._decoders = decode, decoders
        self._run, self._max_wait, self._lanes = run, max_wait, lanes
        self._max_batch = max_batch if lanes == 1 else -(-max_batch // (PIECES * lanes))
        self._metrics = metrics
        self.admission = Admission(limit, metrics)
        self._queue = FairQueue()
        self._waiting = asyncio.Semaphore(0)  # one per job in the queue
        self._decoded: asyncio.Queue[Job] = asyncio.Queue(2 * max_batch)
        self._pace = Pace()
        self._coming = 0  # jobs before the batch
        self._thread = ThreadPoolExecutor(lanes, thread_name_prefix="infer")
        self._canary: Pixels | None = None
        self._is_right: Callable[[Embeddings], bool] = lambda vector: True
        #: whether the encoder computes what it must, as far as is known; who looks after it sets it again
        self.sound = True
        #: set when it was found not to
        self.doubted = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def watch(self, canary: Pixels, is_right: Callable[[Embeddings], bool]) -> None:
        """Where a batch fails, try these pixels, [H, W, 3]: unless their vector is right, the encoder is at fault."""
        self._canary, self._is_right = canary, is_right

    def start(self) -> None:
        """Begin to work; inside a running event loop."""
        loops = [self._decode_next] * self._decoders + [self._infer_next] * self._lanes
        self._tasks = [asyncio.create_task(_forever(step)) for step in loops]

    async def stop(self) -> None:
        """Stop; jobs that still wait are refused."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        left = [self._queue.pop() for _ in range(len(self._queue))]
        left += [self._decoded.get_nowait() for _ in range(self._decoded.qsize())]
        for job in left:
            _fail(job, _stopping())
        self._thread.shutdown(wait=True)

    def enter(self, client: str, count: int, priority: Priority, deadline: float | None) -> None:
        """Claim room for `count` pictures; pair with `admission.leave`. Raises `QueueFullError` where there is none, or
        where they would be ready after their `deadline` only: not where nothing is ahead of them."""
        if deadline is not None and self.admission.inside:
            left = deadline - time.monotonic()
            beyond = self.admission.inside - len(self._queue)  # decoded, or being so
            wait = self._pace.seconds(
                self._queue.ahead(client, priority) + beyond + count, self._max_batch * self._lanes
            )
            if wait > SHARE * left > 0:
                self._metrics.rejected.labels(reason="QUEUE_FULL").inc(count)
                raise QueueFullError(
                    f"{wait:.2f} s of work are ahead, and the deadline is in {left:.2f} s: try again shortly, or allow more "
                    "time", max(0.05, wait - left), wait_seconds=round(wait, 3), left_seconds=round(left, 3),
                )  # fmt: skip
        self.admission.enter(client, count)

    def submit(
        self, content: bytes, client: str, priority: Priority, deadline: float | None, thumbnail: int | None = None
    ) -> asyncio.Future[Embedded]:
        """Queue an encoded picture that was admitted; `deadline`: in seconds of `time.monotonic`. The future raises
        `UnreadablePictureError` or `ServiceError`."""
        job = Job(client, priority, deadline, asyncio.get_running_loop().create_future(), content, thumbnail)
        if not self.sound:
            _fail(job, _unhealthy())
            return job.done
        self._queue.put(job)
        self._coming += 1
        self._waiting.release()
        return job.done

    async def embed(self, pixels: Pixels, deadline: float | None = None) -> Embedded:
        """Embed pixels, uint8 [H, W, 3], ahead of what waits to be decoded."""
        done: asyncio.Future[Embedded] = asyncio.get_running_loop().create_future()
        job = Job("", Priority.INTERACTIVE, deadline, done, decoded=Decoded(pixels, 0.0, False))
        await self._decoded.put(job)
        return await done

    async def _decode_next(self) -> None:
        await self._waiting.acquire()
        job = self._queue.pop()
        try:
            if not self._is_wanted(job):
                return
            start = time.monotonic()
            self._metrics.queue_seconds.labels(stage="decode").observe(start - job.queued)
            try:
                job.decoded = await self._decode(job.content, job.thumbnail)
            except (UnreadablePictureError, ServiceError) as e:
                _fail(job, e)
                return
            except Exception as e:  # a fault of ours: this picture's, and not the end of this worker
                _fail(job, InternalError(f"the picture could not be decoded ({type(e).__name__}: {e}): report it"))
                return
            job.content, job.ready = b"", time.monotonic()
            if job.call is not None:
                job.call.stage("decode", start, job.ready)
            self._metrics.decode_seconds.observe(job.decoded.seconds)
            await self._decoded.put(job)
        except asyncio.CancelledError:
            _fail(job, _stopping())
            raise
        finally:
            self._coming -= 1

    async def _infer_next(self) -> None:
        jobs = [await self._decoded.get()]
        try:
            await self._infer(await self._joined(jobs))
        except asyncio.CancelledError:
            for job in jobs:
                _fail(job, _stopping())
            raise

    async def _joined(self, jobs: list[Job]) -> list[Job]:
        """The first job's batch, appended to `jobs`; those of it that somebody still waits for."""
        # What is decoded goes along; then a short wait, while there is anything on its way.
        closing = time.monotonic() + self._max_wait
        while len(jobs) < self._max_batch:
            if not self._decoded.empty():
                jobs.append(self._decoded.get_nowait())
                continue
            left = closing - time.monotonic()
            if not self._coming or left <= 0:
                break
            try:
                jobs.append(await asyncio.wait_for(self._decoded.get(), left))
            except TimeoutError:
                break
        return [job for job in jobs if self._is_wanted(job)]

    def _is_wanted(self, job: Job) -> bool:
        """Whether somebody still waits for it; one that came too late is told so."""
        if job.done.done():  # cancelled by its caller
            self._metrics.rejected.labels(reason="CANCELLED").inc()
            return False
        now = time.monotonic()
        if job.deadline is not None and now >= job.deadline:
            self._metrics.rejected.labels(reason="EXPIRED_IN_QUEUE").inc()
            _fail(
                job, ExpiredError(f"the deadline passed after {now - job.queued:.3f} s in the queue: allow more time")
            )
            return False
        return True

    async def _infer(self, jobs: list[Job]) -> None:
        if not jobs:
            self._pace.took(0, len(self._queue) + self._decoded.qsize())
            return
        start = time.monotonic()
        decoded = [job.decoded for job in jobs if job.decoded is not None]
        pixels = [each.pixels for each in decoded]
        results = await asyncio.get_running_loop().run_in_executor(self._thread, self._embed_isolated, pixels)
        seconds = time.monotonic() - start
        if self.sound and any(isinstance(result, UnavailableError) for result in results):
            self.sound = False
            self.doubted.set()
        self._pace.took(len(jobs), len(self._queue) + self._decoded.qsize())
        self._metrics.batch_size.observe(len(jobs))
        self._metrics.inference_seconds.observe(seconds)
        batch = batch_span((job.call for job in jobs), start, start + seconds, len(jobs))
        for job, each, result in zip(jobs, decoded, results, strict=True):
            if isinstance(result, ServiceError):
                _fail(job, result)
            elif not job.done.done():
                waited = max(0.0, start - job.queued - each.seconds)
                if job.ready:
                    self._metrics.queue_seconds.labels(stage="batch").observe(start - job.ready)
                if job.call is not None:
                    job.call.stage("queue", start - waited, start)
                    job.call.batched(len(jobs), start, start + seconds, batch)
                job.done.set_result(Embedded(result, each.seconds, waited, seconds, each.thumbnail))

    def _embed_isolated(self, pictures: list[Pixels]) -> list[Embeddings | ServiceError]:
        try:
            rows = self._run(np.stack(pictures))
            if np.isfinite(rows).all():
                return list(rows)
            problem = "the embedding is not finite"
        except Exception as e:  # whatever the runtime raises must reach its caller, not end this task
            problem = f"{type(e).__name__}: {e}"
        if not self._canary_is_right():
            return [_unhealthy() for _ in pictures]
        if len(pictures) == 1:
            return [InternalError(f"the encoder failed on this picture ({problem}): report it with the picture")]
        return [result for picture in pictures for result in self._embed_isolated([picture])]

    def _canary_is_right(self) -> bool:
        if self._canary is None:
            return True
        try:
            return self._is_right(self._run(self._canary[None])[0])
        except Exception:  # whatever it is, the encoder does not compute
            return False


async def _forever(step: Callable[[], Awaitable[None]]) -> None:
    while True:
        await step()


def _stopping() -> UnavailableError:
    return UnavailableError("the server is shutting down: try another replica")


def _unhealthy() -> UnavailableError:
    return UnavailableError(
        "the encoder fails on its own canary picture: try again shortly, or another replica", "ENCODER_UNHEALTHY"
    )


def _fail(job: Job, error: Exception) -> None:
    if not job.done.done():
        job.done.set_exception(error)
