"""Pictures under load: order, fairness, limits, deadlines; and decoders that hang or die."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from export.preprocess import DecodeLimits, PreprocessSpec, UnreadablePictureError, preprocess, thumbnail_of
from service.decoding import ProcessDecoder
from service.encoder import Decoded
from service.errors import ExpiredError, InternalError, QueueFullError, UnavailableError
from service.metrics import Metrics
from service.pipeline import BULK_TURN, Admission, FairQueue, Job, Pipeline, Priority

PIXELS = np.zeros((2, 2, 3), np.uint8)


def job(client: str, priority: Priority = Priority.INTERACTIVE, content: bytes = b"") -> Job:
    return Job(client, priority, None, done=None, content=content)  # type: ignore[arg-type]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(list(Priority))), max_size=60))
def test_clients_take_turns_and_each_keeps_its_order(asked: list[tuple[str, Priority]]) -> None:
    queue = FairQueue()
    for number, (client, priority) in enumerate(asked):
        queue.put(job(client, priority, str(number).encode()))
    assert len(queue) == len(asked)
    popped = [queue.pop() for _ in asked]
    with pytest.raises(IndexError):
        queue.pop()
    for each in {(j.client, j.priority) for j in popped}:
        order = [int(j.content) for j in popped if (j.client, j.priority) == each]
        assert order == sorted(order)
    for priority in Priority:  # while two clients wait, neither gets two turns before the other gets one
        turns = [j.client for j in popped if j.priority == priority]
        left = Counter(turns)
        for at, client in enumerate(turns[:-1]):
            left[client] -= 1
            if turns[at + 1] == client:
                assert not any(count for other, count in left.items() if other != client)


def test_bulk_waits_but_does_not_starve() -> None:
    queue = FairQueue()
    for _ in range(40):
        queue.put(job("a"))
        queue.put(job("b", Priority.BULK))
    first = [queue.pop().priority for _ in range(4 * BULK_TURN)]
    assert first.count(Priority.BULK) == 4 and first[0] == Priority.INTERACTIVE


def test_one_client_cannot_take_all_the_room_while_others_ask() -> None:
    admission = Admission(10, Metrics())
    admission.enter("greedy", 10)  # alone it may
    with pytest.raises(QueueFullError, match="10 pictures are waiting, 10 are allowed"):
        admission.enter("modest", 1)
    admission.leave("greedy", 2)
    with pytest.raises(QueueFullError, match="8 pictures of this client are waiting, 5 are allowed"):
        admission.enter("greedy", 1)
    admission.enter("modest", 2)
    admission.leave("modest", 2)
    admission.leave("greedy", 8)
    admission.enter("greedy", 6)  # what comes in one request is not divided


def test_how_long_to_wait_follows_from_how_fast_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    admission = Admission(100, Metrics())
    for _ in range(10):
        admission.enter("a", 20)
        clock[0] += 1.01
        admission.leave("a", 20)
    admission.enter("a", 100)
    with pytest.raises(QueueFullError) as refused:
        admission.enter("a", 1)
    assert refused.value.retry_seconds == pytest.approx(50 / 19.8, rel=0.02)


class Stage:
    """A pipeline with a decoder and an encoder of the test's own."""

    def __init__(self, decode: Callable[[bytes, int | None], Awaitable[Decoded]] | None = None, **given: Any) -> None:
        self.decoded: list[bytes] = []
        self.batches: list[int] = []
        self.gate = threading.Event()
        self.gate.set()

        async def decoded(content: bytes, thumbnail: int | None) -> Decoded:
            self.decoded.append(content)
            return Decoded(PIXELS, 0.0, False)

        def run(pixels: np.ndarray) -> np.ndarray:
            assert self.gate.wait(10)
            self.batches.append(len(pixels))
            return np.ones((len(pixels), 4), np.float32)

        settings = {"decoders": 2, "max_batch": 4, "max_wait": 0.05, "limit": 1000, **given}
        self.pipeline = Pipeline(decode or decoded, run=run, metrics=Metrics(), **settings)

    async def __aenter__(self) -> Stage:
        self.pipeline.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.gate.set()
        await self.pipeline.stop()

    def ask(self, content: bytes = b"x", client: str = "a", **given: Any) -> asyncio.Future[Any]:
        settings = {"priority": Priority.INTERACTIVE, "deadline": None, **given}
        return self.pipeline.submit(content, client, **settings)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 30))  # type: ignore[arg-type]


def test_one_picture_alone_does_not_wait_for_others() -> None:
    async def scenario() -> None:
        async with Stage(max_wait=10.0) as stage:
            start = time.monotonic()
            await stage.ask()
            assert time.monotonic() - start < 5 and stage.batches == [1]

    run(scenario)


def test_pictures_on_their_way_join_the_batch() -> None:
    async def scenario() -> None:
        async def slow(content: bytes, thumbnail: int | None) -> Decoded:
            await asyncio.sleep(0.02 * int(content))
            return Decoded(PIXELS, 0.0, False)

        async with Stage(slow, max_wait=10.0, decoders=3) as stage:
            await asyncio.gather(*(stage.ask(str(i).encode()) for i in range(3)))
            assert stage.batches == [3]

    run(scenario)


def test_what_is_urgent_overtakes_what_waits() -> None:
    async def scenario() -> None:
        async with Stage(decoders=1, max_batch=1) as stage:
            stage.gate.clear()
            bulk = [stage.ask(b"bulk%d" % i, priority=Priority.BULK) for i in range(20)]
            await asyncio.sleep(0.05)  # the first few are beyond the queue already
            urgent = stage.ask(b"urgent")
            stage.gate.set()
            await asyncio.gather(*bulk, urgent)
            assert stage.decoded.index(b"urgent") < 6

    run(scenario)


def test_a_stage_takes_no_more_than_the_next_one_can_hold() -> None:
    async def scenario() -> None:
        async with Stage(decoders=2, max_batch=4) as stage:
            stage.gate.clear()
            asked = [stage.ask() for _ in range(50)]
            await asyncio.sleep(0.2)
            # One batch in the encoder, two ahead of it, one picture in each decoder's hands.
            assert len(stage.decoded) <= 4 + 8 + 2
            stage.gate.set()
            await asyncio.gather(*asked)

    run(scenario)


def test_nothing_is_decoded_or_computed_that_nobody_waits_for() -> None:
    async def scenario() -> None:
        async with Stage(decoders=1, max_batch=1) as stage:
            stage.gate.clear()
            first = [stage.ask(b"first") for _ in range(4)]  # encoder, its queue, and the decoder's hands are full
            await asyncio.sleep(0.05)
            late = stage.ask(b"late", deadline=time.monotonic() + 0.05)
            left = stage.ask(b"left")
            left.cancel()
            await asyncio.sleep(0.1)
            stage.gate.set()
            with pytest.raises(ExpiredError, match="in the queue"):
                await late
            await asyncio.gather(*first)
            assert stage.decoded == [b"first"] * 4 and stage.batches == [1] * 4

    run(scenario)


def test_a_fault_of_a_decoder_does_not_end_its_worker() -> None:
    async def scenario() -> None:
        async def fragile(content: bytes, thumbnail: int | None) -> Decoded:
            if content == b"bad":
                raise ZeroDivisionError("oh")
            return Decoded(PIXELS, 0.0, False)

        async with Stage(fragile, decoders=1) as stage:
            with pytest.raises(InternalError, match="ZeroDivisionError"):
                await stage.ask(b"bad")
            assert (await stage.ask(b"good")).vector.shape == (4,)

    run(scenario)


def test_stopping_refuses_what_waits() -> None:
    async def scenario() -> None:
        stage = Stage(decoders=1, max_batch=1)
        stage.pipeline.start()
        stage.gate.clear()
        asked = [stage.ask() for _ in range(12)]
        await asyncio.sleep(0.05)
        stopping = asyncio.create_task(stage.pipeline.stop())
        await asyncio.sleep(0)
        stage.gate.set()
        await stopping
        outcomes = await asyncio.gather(*asked, return_exceptions=True)
        assert sum(isinstance(o, UnavailableError) for o in outcomes) >= 9
        assert all(not isinstance(o, BaseException) or isinstance(o, UnavailableError) for o in outcomes)

    run(scenario)


# --- decoding in processes ------------------------------------------------------------------------------------------


SPEC = PreprocessSpec(size=16)


def png(side: int = 32) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


def test_processes_decode_as_threads_do() -> None:
    async def scenario() -> None:
        decoder = ProcessDecoder(SPEC, DecodeLimits(max_pixels=10_000), 2, 30.0)
        try:
            pictures = [png(side) for side in range(8, 40)]
            found = await asyncio.gather(*map(decoder.decode, pictures))
            for each, data in zip(found, pictures, strict=True):
                assert np.array_equal(each.pixels, preprocess(data, SPEC).pixels)
            small = await decoder.decode(png(100), 40)
            assert small.thumbnail == thumbnail_of(png(100), 40) and small.pixels.shape == (16, 16, 3)
            for bad, reason in (
                (b"no picture", "IMAGE_UNDECODABLE"),
                (b"", "IMAGE_EMPTY"),
                (png(101), "IMAGE_TOO_LARGE"),
            ):
                with pytest.raises(UnreadablePictureError) as refused:
                    await decoder.decode(bad)
                assert refused.value.reason == reason
        finally:
            decoder.close()

    run(scenario)


def test_a_decoder_that_hangs_or_dies_takes_one_picture_with_it() -> None:
    async def scenario() -> None:
        decoder = ProcessDecoder(SPEC, DecodeLimits(), 1, 0.5)
        try:
            assert (await decoder.decode(png())).pixels.shape == (16, 16, 3)
            worker = decoder._idle.get()
            decoder._idle.put(worker)
            first = worker._process.pid
            assert first is not None
            os.kill(first, signal.SIGSTOP)  # as one that is stuck in a crafted file
            with pytest.raises(UnreadablePictureError, match=r"not decoded within 0\.5 s") as refused:
                await decoder.decode(png())
            assert refused.value.reason == "IMAGE_TOO_SLOW"
            assert (await decoder.decode(png())).pixels.shape == (16, 16, 3)
            worker = decoder._idle.get()
            decoder._idle.put(worker)
            assert worker._process.pid not in (None, first)
            os.kill(worker._process.pid or 0, signal.SIGKILL)
            with pytest.raises(UnreadablePictureError, match="died of the picture"):
                await decoder.decode(png())
            assert (await decoder.decode(png())).pixels.shape == (16, 16, 3)
        finally:
            decoder.close()

    run(scenario)


def test_lanes_compute_small_batches_beside_each_other() -> None:
    async def scenario() -> None:
        both = threading.Barrier(2)  # passed only where two lanes compute at one time

        async with Stage(lanes=2, max_batch=32, max_wait=0.0) as stage:
            plain = stage.pipeline._run
            first = [True, True]

            def run(pixels: np.ndarray) -> np.ndarray:
                if first:
                    first.pop()
                    both.wait(10)
                return plain(pixels)

            stage.pipeline._run = run
            found = await asyncio.gather(*(stage.ask() for _ in range(40)))
            assert len(found) == 40 and sum(stage.batches) == 40
            assert max(stage.batches) <= 4 and len(stage.batches) >= 10  # 32 / (4 pieces · 2 lanes)

    run(scenario)
