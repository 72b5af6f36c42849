"""Dynamic batching: pictures of many requests run through the encoder together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from export.bundle import Embeddings
from export.preprocess import Pixels
from service.errors import ExpiredError, InternalError, QueueFullError, ServiceError, UnavailableError
from service.metrics import Metrics


class Embedded(NamedTuple):
    """A vector and what it waited for."""

    vector: Embeddings
    queue_seconds: float
    infer_seconds: float


class _Job(NamedTuple):
    pixels: Pixels
    deadline: float | None  # time.monotonic()
    queued: float
    done: asyncio.Future[Embedded]


class Batcher:
    """A bounded queue in front of one thread that runs the encoder.

    `run` maps uint8 [N, H, W, 3] to float32 [N, D]. A batch that fails is tried again picture by picture, so that a
    poisonous one fails alone.
    """

    def __init__(
        self, run: Callable[[Pixels], Embeddings], max_batch: int, max_wait: float, queue_limit: int, metrics: Metrics
    ) -> None:
        self._run = run
        self._max_batch, self._max_wait, self._limit = max_batch, max_wait, queue_limit
        self._metrics = metrics
        self._queue: asyncio.Queue[_Job] = asyncio.Queue()
        self._admitted = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="infer")
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to work; inside a running event loop."""
        self._task = asyncio.create_task(self._work())

    async def stop(self) -> None:
        """Stop; jobs still queued are refused."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        while not self._queue.empty():
            job = self._queue.get_nowait()
            if not job.done.done():
                job.done.set_exception(UnavailableError("the server is shutting down: try another replica"))
        self._thread.shutdown(wait=True)

    def admit(self, count: int) -> None:
        """Claim room for `count` pictures, before they are decoded. Raises `QueueFullError`; pair with `release`."""
        if self._admitted + count > self._limit:
            self._metrics.rejected.labels(reason="QUEUE_FULL").inc(count)
            raise QueueFullError(
                f"{self._admitted} pictures are waiting, {self._limit} are allowed: try again shortly, or send fewer at "
                "once",
                queue_depth=self._admitted,
                limit=self._limit,
            )
        self._admitted += count
        self._metrics.queue_depth.set(self._admitted)

    def release(self, count: int) -> None:
        """Give the room back."""
        self._admitted -= count
        self._metrics.queue_depth.set(self._admitted)

    async def embed(self, pixels: Pixels, deadline: float | None) -> Embedded:
        """Embed one picture, uint8 [H, W, 3]. Raises `ExpiredError` when `deadline` (monotonic) passes while it waits."""
        job = _Job(pixels, deadline, time.monotonic(), asyncio.get_running_loop().create_future())
        self._queue.put_nowait(job)
        return await job.done

    async def _work(self) -> None:
        while True:
            jobs = self._alive([await self._queue.get()])
            # What is queued already goes along; then a short wait for more, unless the batch is full.
            closing = time.monotonic() + self._max_wait
            while jobs and len(jobs) < self._max_batch:
                try:
                    left = closing - time.monotonic()
                    job = self._queue.get_nowait() if left <= 0 else await asyncio.wait_for(self._queue.get(), left)
                except (TimeoutError, asyncio.QueueEmpty):
                    break
                jobs += self._alive([job])
            jobs = self._alive(jobs)
            if jobs:
                await self._infer(jobs)

    def _alive(self, jobs: list[_Job]) -> list[_Job]:
        """The jobs that somebody still waits for; expired ones are told so, before any compute."""
        now = time.monotonic()
        kept = []
        for job in jobs:
            if job.done.done():  # cancelled by its caller
                self._metrics.rejected.labels(reason="CANCELLED").inc()
            elif job.deadline is not None and now >= job.deadline:
                self._metrics.rejected.labels(reason="EXPIRED_IN_QUEUE").inc()
                job.done.set_exception(
                    ExpiredError(f"the deadline passed after {now - job.queued:.3f} s in the queue: allow more time")
                )
            else:
                kept.append(job)
        return kept

    async def _infer(self, jobs: list[_Job]) -> None:
        start = time.monotonic()
        results = await asyncio.get_running_loop().run_in_executor(
            self._thread, self._embed_isolated, [job.pixels for job in jobs]
        )
        seconds = time.monotonic() - start
        self._metrics.batch_size.observe(len(jobs))
        self._metrics.inference_seconds.observe(seconds)
        for job, result in zip(jobs, results, strict=True):
            if job.done.done():
                continue
            if isinstance(result, ServiceError):
                job.done.set_exception(result)
            else:
                self._metrics.queue_seconds.observe(start - job.queued)
                job.done.set_result(Embedded(result, start - job.queued, seconds))

    def _embed_isolated(self, pictures: list[Pixels]) -> list[Embeddings | ServiceError]:
        try:
            rows = self._run(np.stack(pictures))
            if np.isfinite(rows).all():
                return list(rows)
            problem = "the embedding is not finite"
        except Exception as e:  # whatever the runtime raises must reach its caller, not end this task
            problem = f"{type(e).__name__}: {e}"
        if len(pictures) == 1:
            return [InternalError(f"the encoder failed on this picture ({problem}): report it with the picture")]
        return [result for picture in pictures for result in self._embed_isolated([picture])]
