"""Encoded pictures → pixels, off the event loop: in threads, or in processes that can be killed.

Threads are faster and enough for pictures of one's own. A decoder stuck in a crafted file cannot be stopped in a thread:
where strangers send pictures, processes put a limit on time and memory, and one that dies takes one picture with it.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import resource
import signal
import struct
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

import numpy as np

from export.preprocess import DecodeLimits, PreprocessSpec, UnreadablePictureError
from service.encoder import Decoded, Encoder, decode

# Address space of a decoding process beyond what it has at its start, per pixel accepted, and at least.
_BYTES_PER_PIXEL, _LEAST = 24, 512 * 2**20
_START = 60.0  # seconds that a process may take to start
_ASK = struct.Struct("<I")  # longer side of the thumbnail, or 0
_HEAD = struct.Struct("<?d?I")  # decoded?, seconds, animated, bytes of the thumbnail


class ThreadDecoder:
    """Decodes in the encoder's own threads."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self.workers = encoder.decoders._max_workers

    async def decode(self, data: bytes, thumbnail: int | None = None) -> Decoded:
        """Pixels. Raises `UnreadablePictureError`."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._encoder.decoders, self._encoder.decode, data, thumbnail)

    def close(self) -> None:
        """Nothing: the encoder stops its threads."""


class ProcessDecoder:
    """Decodes in processes, each of which has so many seconds for a picture and is replaced when it takes longer or dies."""

    def __init__(self, spec: PreprocessSpec, limits: DecodeLimits, workers: int, seconds: float) -> None:
        self._spec, self._limits, self._seconds = spec, limits, seconds
        self.workers = workers
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        for worker in [_Worker(spec, limits) for _ in range(workers)]:  # they start together
            worker.wait_ready()
            self._idle.put(worker)

    async def decode(self, data: bytes, thumbnail: int | None = None) -> Decoded:
        """Pixels. Raises `UnreadablePictureError`."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._decode, data, thumbnail)

    def _decode(self, data: bytes, thumbnail: int | None) -> Decoded:
        worker = self._idle.get()
        try:
            return worker.decode(data, thumbnail, self._seconds)
        except (EOFError, OSError, TimeoutError) as e:
            worker.kill()
            worker = _Worker(self._spec, self._limits)
            worker.wait_ready()
            if isinstance(e, TimeoutError):
                raise UnreadablePictureError(
                    "IMAGE_TOO_SLOW",
                    f"the picture was not decoded within {self._seconds:g} s: shrink it, or save it in another format",
                ) from None
            raise UnreadablePictureError(
                "IMAGE_UNDECODABLE", "the decoder died of the picture, or needed too much memory: replace the file"
            ) from None
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """Stop the processes; what is being decoded is finished first."""
        self._threads.shutdown(wait=True)
        while not self._idle.empty():
            self._idle.get().kill()


class _Worker:
    """One decoding process, used by one thread at a time."""

    def __init__(self, spec: PreprocessSpec, limits: DecodeLimits) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy locks that threads of this process hold
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, spec, limits), name="decode", daemon=True)
        self._process.start()
        theirs.close()

    def wait_ready(self) -> None:
        """Raises `EOFError` or `TimeoutError` where it ended or hangs instead."""
        if not self._pipe.poll(_START):
            raise TimeoutError("a decoding process does not start")
        self._pipe.recv_bytes()

    def decode(self, data: bytes, thumbnail: int | None, seconds: float) -> Decoded:
        """Raises `UnreadablePictureError`; `TimeoutError`, `EOFError` and `OSError` where the process has to go."""
        self._pipe.send_bytes(_ASK.pack(thumbnail or 0) + data)
        if not self._pipe.poll(seconds):
            raise TimeoutError
        answer = self._pipe.recv_bytes()
        decoded, took, animated, small = _HEAD.unpack_from(answer)
        if not decoded:
            raise UnreadablePictureError(*json.loads(answer[_HEAD.size :]))
        shape = struct.unpack_from("<3I", answer, _HEAD.size)
        pixels = np.frombuffer(answer, np.uint8, int(np.prod(shape)), _HEAD.size + 12).reshape(shape)
        return Decoded(pixels, took, animated, thumbnail=answer[len(answer) - small :] if small else None)

    def kill(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _work(pipe: Connection[Any, Any], spec: PreprocessSpec, limits: DecodeLimits) -> None:
    """In the process: decode what comes until nobody is there any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server stops it
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    room = used + max(_LEAST, limits.max_pixels * _BYTES_PER_PIXEL)
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    pipe.send_bytes(b"ready")
    while True:
        try:
            data = pipe.recv_bytes()
        except (EOFError, OSError):
            return
        try:
            done = decode(data[_ASK.size :], spec, limits, _ASK.unpack_from(data)[0] or None)
            small = done.thumbnail or b""
            head = _HEAD.pack(True, done.seconds, done.animated, len(small))
            pipe.send_bytes(head + struct.pack("<3I", *done.pixels.shape) + done.pixels.tobytes() + small)
        except UnreadablePictureError as e:
            pipe.send_bytes(_HEAD.pack(False, 0.0, False, 0) + json.dumps([e.reason, str(e)]).encode())
