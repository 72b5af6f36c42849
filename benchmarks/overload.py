"""At three times what the server can do: does it still do nine tenths of it, in time, and refuse the rest at once?

    python -m benchmarks.overload --out FOLDER [--rows 1000000] [--seconds 20]
    python -m benchmarks.overload --out FOLDER --quick

Capacity is measured first, closed loop, 32 in flight, once before and once after the overload, and the larger one
counts. Then calls arrive at three times that rate at random moments (Poisson), whatever became of those before, each
with a deadline. Goodput are the answers that came within it. Three cases: pictures to embed with a deadline that is
longer than the full queue takes, so that the queue's limit refuses; pictures with one that is shorter, so that
deadlines have to; searches by vector. Client and server share the cores, so both take milliseconds of work each (an
encoder of 160 px, an exact index of so many rows): of short searches no client in Python could send three times what
the server answers, and what it takes to send and refuse calls is missing to the server. Calls send bytes that were
made before and leave the answers unread. What arrives in the first moments, until the queue is full, and in the last
half second is not counted.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
import urllib.request
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from google.rpc import error_details_pb2, status_pb2

from benchmarks.record import cpu_name, finish
from benchmarks.serve_search import photographs, rate
from benchmarks.serving import ServerProcess, made_bundle, percentiles
from export.bundle import Bundle
from service.collection import Collection
from service.config import Constraints
from service.pb import likewise_pb2 as pb
from service.records import NewRow
from tests.service.test_server import free_port

TIMES = 3.0
EDGE = 0.5

Call = Callable[[int, float | None], Awaitable[bytes]]


async def open_loop(call: Call, per_second: float, seconds: float, deadline: float) -> dict[str, Any]:
    """Calls that arrive at random moments, and what became of them."""
    rng = random.Random(0)
    outcomes: list[tuple[float, float, str, bool]] = []  # arrival, seconds, code and reason, whether RetryInfo came

    async def one(number: int, arrived: float) -> None:
        start = time.perf_counter()
        said, retry = "OK", False
        try:
            await call(number, deadline)
        except grpc.aio.AioRpcError as e:
            reason, retry = details(e)
            said = f"{e.code().name} {reason}".strip()
        outcomes.append((arrived, time.perf_counter() - start, said, retry))

    tasks: set[asyncio.Task[None]] = set()
    start = time.perf_counter()
    at, number, late = 0.0, 0, 0.0
    while at < seconds:
        at += rng.expovariate(per_second)
        wait = at - (time.perf_counter() - start)
        if wait > 0:
            await asyncio.sleep(wait)
        late = max(late, -wait)
        task = asyncio.create_task(one(number, at))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        number += 1
    sent_in = time.perf_counter() - start
    await asyncio.gather(*tasks)
    counted = [each for each in outcomes if EDGE + deadline <= each[0] < seconds - EDGE]
    took = seconds - 2 * EDGE - deadline
    good = [each[1] for each in counted if each[2] == "OK"]
    refused = [each for each in counted if each[2].startswith("RESOURCE_EXHAUSTED")]
    return {
        "arrivals/s": round(number / sent_in, 1),
        "latest start after its arrival, s": round(late, 3),
        "goodput/s": len(good) / took,
        "accepted, ms": {name: round(1000 * value, 1) for name, value in percentiles(good).items()},
        "refused, ms": {name: round(1000 * value, 1) for name, value in percentiles([r[1] for r in refused]).items()},
        "outcomes": dict(Counter(each[2] for each in counted)),
        "answered, of all arrivals": sum(each[2] == "OK" for each in outcomes),
        "refusals without RetryInfo": sum(not each[3] for each in refused),
    }


def details(error: grpc.aio.AioRpcError) -> tuple[str, bool]:
    """Its reason, and whether it says when to come again."""
    reason, retry = "", False
    for name, value in error.trailing_metadata() or ():
        if name == "grpc-status-details-bin":
            for detail in status_pb2.Status.FromString(value).details:
                info = error_details_pb2.ErrorInfo()
                if detail.Unpack(info):
                    reason = info.reason
                retry = retry or detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR)
    return reason, retry


def scraped(port: int) -> dict[str, float]:
    """The server's metrics."""
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
    lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in lines}


async def case(
    server: ServerProcess, port: int, call: Call, seconds: float, deadline: float, work: str
) -> dict[str, Any]:
    """One kind of call: capacity, overload, capacity. `work`: the metric that counts what was computed."""

    async def capacity(count: int) -> float:
        return await rate(lambda i: call(i, None), count)

    await rate(lambda i: call(i, None), 120, 60)  # batches as large as they get
    count = int(seconds / 2 * await capacity(100))
    before = await capacity(count)
    first, low = scraped(port), len(server.samples)
    found = await open_loop(call, TIMES * before, seconds + deadline, deadline)
    own = [sample.own for sample in server.samples[low:]]
    await asyncio.sleep(deadline)
    last = scraped(port)
    after = await capacity(count)
    found["capacity/s, before and after"] = [round(before, 1), round(after, 1)]
    found["share"] = found["goodput/s"] / max(before, after)
    found["computed, of all arrivals"] = last.get(work, 0) - first.get(work, 0)
    rejected = "likewise_queue_rejected_total"
    for reason in ("QUEUE_FULL", "EXPIRED_IN_QUEUE", "CANCELLED"):
        name = f'{rejected}{{reason="{reason}"}}'
        found[f"not computed: {reason}"] = last.get(name, 0) - first.get(name, 0)
    third = len(own) // 3
    found["memory of its first and last third, MiB"] = [
        round(statistics.median(own[:third])), round(statistics.median(own[-third:]))
    ]  # fmt: skip
    return found


async def measure(server: ServerProcess, port: int, vectors: np.ndarray, quick: bool, seconds: float) -> dict[str, Any]:
    pictures = [pb.EmbedRequest(images=[pb.Image(content=p)]).SerializeToString() for p in photographs(16)]
    searches = [
        pb.SearchRequest(collection="c", query=pb.Query(vector=pb.Vector(values=v.tolist()))).SerializeToString()
        for v in vectors[:: max(1, len(vectors) // 500)]
    ]
    channels = [grpc.aio.insecure_channel(server.address, [("grpc.use_local_subchannel_pool", 1)]) for _ in range(4)]
    embeds = [channel.unary_unary("/likewise.v1.EncoderService/Embed") for channel in channels]
    finds = [channel.unary_unary("/likewise.v1.SearchService/Search") for channel in channels]

    def embed(i: int, timeout: float | None) -> Awaitable[bytes]:
        return embeds[i % 4](pictures[i % len(pictures)], timeout=timeout)

    def search(i: int, timeout: float | None) -> Awaitable[bytes]:
        return finds[i % 4](searches[i % len(searches)], timeout=timeout)

    found = {}
    long, short = (2.0, 0.5) if quick else (6.0, 1.5)
    images = "likewise_batch_size_sum"
    for name, call, deadline, work in (
        ("embed, long deadline", embed, long, images),
        ("embed, short deadline", embed, short, images),
        ("search, short deadline", search, 0.5, 'likewise_queue_wait_seconds_count{stage="search"}'),
    ):
        found[name] = {"deadline, s": deadline}
        found[name] |= await case(server, port, call, seconds, deadline, work)
        print(f"{name}: {found[name]['share']:.3f} of the capacity", flush=True)
        print(found[name])
    for channel in channels:
        await channel.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    rows, seconds = (200_000, 3.0) if args.quick else (args.rows, args.seconds)
    folder = made_bundle(args.out, "--image-size", "160")
    bundle, collections = Bundle.open(folder), args.out / f"collections-{rows}"
    vectors = np.random.default_rng(0).standard_normal((rows, bundle.dim)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    if not (collections / "c").is_dir():
        policy = Constraints(index="exact").policy()
        collection = Collection.create(collections / "c", bundle.space_id, bundle.dim, policy)
        collection.add_segment([NewRow(f"item/{i:07d}.jpg") for i in range(rows)], vectors)
        collection.close()
    port = free_port()
    log = args.out / "server.log"
    log.unlink(missing_ok=True)
    server = ServerProcess(folder, collections, log, "--queue-limit", "64", metrics_port=port)
    server.sample_each(0.2)
    try:
        figures = asyncio.run(measure(server, port, vectors, args.quick, seconds))
    finally:
        server.stop()
    figures["events in the log"] = dict(server.events())
    print(f"\n{cpu_name()}, {TIMES:g} times the capacity, {rows:,} × {bundle.dim} vectors, exact")
    goals = []
    for name, found in figures.items():
        if "share" not in found:
            continue
        print(f"\n{name}")
        for what, value in found.items():
            print(f"  {what:<36}{round(value, 3) if isinstance(value, float) else value}")
        label = name.replace(",", "").replace(" ", "_")
        memory = found["memory of its first and last third, MiB"]
        goals.append((f"goodput_{label}", found["share"], 0.9))
        goals.append((f"retry_info_{label}", 1.0 - (found["refusals without RetryInfo"] > 0), 1.0))
        goals.append((f"memory_{label}", memory[0] / memory[1], 0.95))
    finish("overload", figures, goals, 0, args.quick)


if __name__ == "__main__":
    main()
