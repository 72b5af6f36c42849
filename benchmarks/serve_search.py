"""The gRPC server against its ceilings, in one run: embedding against raw decoding and ONNX Runtime; search by vector, one
by one and as a stream, against echo RPCs with messages of the same size and against raw FAISS; batches of searches against
raw FAISS.

    python -m benchmarks.serve_search --out FOLDER [--rows 100000] [--encoder vit_small_patch16_224] [--images 512] [--quick]

Server and client are two processes on the same cores; 32 calls in flight; ceilings and server alternate, medians of five.
Raw FAISS is the collection's own index, opened a second time. Calls to the server and to the echo send bytes that were made
before, and leave the answers unread, so that both are measured with the same client.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
from PIL import Image

from benchmarks.record import cpu_name, finish
from export.bundle import Bundle
from likewise import main as likewise
from service.collection import Collection
from service.config import Embedding
from service.encoder import Encoder
from service.index import Effort, search_index
from service.pb import likewise_pb2 as pb
from service.pb import likewise_pb2_grpc as pb_grpc
from service.records import NewRow
from service.segment import Segment
from tests.service.running import address_of
from tests.shapes import write_shapes

IN_FLIGHT = 32
ROUNDS = 5
BATCH = 200
BATCHES_IN_FLIGHT = 4
_ECHO = """
import asyncio, sys, grpc
async def main():
    reply = bytes(int(sys.argv[1]))
    async def echo(request, context):
        return reply
    async def stream(requests, context):
        while await context.read() is not grpc.aio.EOF:
            await context.write(reply)
    server = grpc.aio.server()
    method = {
        "Echo": grpc.unary_unary_rpc_method_handler(echo),
        "Stream": grpc.stream_stream_rpc_method_handler(stream),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("x.Echo", method),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()
asyncio.run(main())
"""


def photographs(count: int) -> list[bytes]:
    """JPEGs of 640×480 with structure at every scale."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        layers = []
        for h, w in ((6, 8), (30, 40), (120, 160)):
            small = Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8))
            layers.append(np.asarray(small.resize((640, 480), Image.Resampling.BICUBIC)))
        buffer = io.BytesIO()
        Image.fromarray(np.mean(layers, axis=0).astype(np.uint8)).save(buffer, "JPEG", quality=88)
        found.append(buffer.getvalue())
    return found


async def rate(call: Callable[[int], Awaitable[object]], count: int, in_flight: int = IN_FLIGHT) -> float:
    """Calls per second with so many in flight (closed loop)."""
    numbers = iter(range(count))

    async def worker() -> None:
        for i in numbers:
            await call(i)

    start = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(in_flight)))
    return count / (time.perf_counter() - start)


async def stream_rate(call: Callable[[], grpc.aio.StreamStreamCall], requests: list[bytes], count: int) -> float:
    """Answers per second of one stream with 32 requests in flight."""
    stream = call()
    room = asyncio.Semaphore(IN_FLIGHT)

    async def send() -> None:
        for i in range(count):
            await room.acquire()
            await stream.write(requests[i % len(requests)])
        await stream.done_writing()

    start = time.perf_counter()
    sending = asyncio.create_task(send())
    received = 0
    while await stream.read() is not grpc.aio.EOF:
        received += 1
        room.release()
    await sending
    assert received == count, f"{received} of {count} answers came"
    return count / (time.perf_counter() - start)


def raw_embedding(encoder: Encoder, pictures: list[bytes], count: int) -> float:
    """Pictures per second of decoding threads and the runtime alone, in batches of 32."""
    start = time.perf_counter()
    todo = [pictures[i % len(pictures)] for i in range(count)]
    with ThreadPoolExecutor(encoder.runtime.threads) as pool:
        decoded = pool.map(encoder.decode, todo)
        batch = []
        for item in decoded:
            batch.append(item.pixels)
            if len(batch) == 32:
                encoder.embed(np.stack(batch))
                batch = []
        if batch:
            encoder.embed(np.stack(batch))
    return count / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument(
        "--encoder", default="vit_small_patch16_224", help="whose vectors have 384 values; vit_micro: 128"
    )
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", default="serve_search", help="of the results' file")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    rows, images, queries, rounds = (2000, 64, 200, 1) if args.quick else (args.rows, args.images, 2000, ROUNDS)

    folder = args.out / args.encoder
    bundle_folder, collections = folder / "bundle", folder / f"collections-{rows}"
    if not bundle_folder.is_dir():
        shapes = write_shapes(args.out / "shapes", 64)
        run = ["train", str(shapes), "--out", str(folder / "run"), "--steps", "0", "--encoder", args.encoder]
        run += ["--image-size", "48", "--patch-size", "8", "--resume"]
        assert likewise(run) == 0 and likewise(["export", str(folder / "run"), "--out", str(bundle_folder)]) == 0
    bundle = Bundle.open(bundle_folder)
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(256, bundle.dim))
    vectors = (centres[rng.integers(0, 256, rows)] + 0.5 * rng.normal(size=(rows, bundle.dim))).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    if not (collections / "c").is_dir():
        collection = Collection.create(collections / "c", bundle.space_id, bundle.dim)
        collection.add_segment([NewRow(f"item/{i:07d}.jpg") for i in range(rows)], vectors)
        collection.close()

    serve = ["serve", "--bundle", str(bundle_folder), "--collections", str(collections), "--port", "0"]
    server = subprocess.Popen(
        [sys.executable, "-m", "likewise", *serve, "--metrics-port", "0", "--device", args.device],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    address = address_of(server)
    try:
        figures = asyncio.run(measure(address, bundle, collections, vectors, args.device, images, queries, rounds))
    finally:
        server.terminate()
        server.wait()
    print(f"\n{cpu_name()}, {rows:,} × {bundle.dim} vectors, 32 in flight, medians of {rounds}")
    for name, value in figures.items():
        print(f"  {name:<44}{value:>10.1f}")
    print()
    goals = [
        (
            "embed_share_of_ceiling",
            figures["embed over gRPC, images/s"] / figures["decode + ONNX Runtime, images/s"],
            0.90,
        ),
        (
            "search_share_of_ceiling",
            figures["search over gRPC, queries/s"]
            / min(figures["echo RPC, calls/s"], figures["raw FAISS, single queries/s"]),
            0.70,
        ),
        (
            "stream_search_share_of_ceiling",
            figures["StreamSearch, queries/s"]
            / min(figures["echo stream, messages/s"], figures["raw FAISS, single queries/s"]),
            0.70,
        ),
        (
            "batch_search_share_of_ceiling",
            figures["BatchSearch of 200, queries/s"] / figures["raw FAISS, batches of 200, queries/s"],
            0.75,
        ),
    ]
    finish(args.name, figures, goals, 0, args.quick)


async def measure(
    address: str,
    bundle: Bundle,
    collections: Path,
    vectors: np.ndarray,
    device: str,
    images: int,
    queries: int,
    rounds: int,
) -> dict[str, float]:
    pictures = photographs(16)
    encoder = Encoder(bundle, Embedding.model_validate({"bundle": bundle.folder, "device": device}))
    segment = Segment(next((collections / "c" / "segments").iterdir()))
    index, info = segment._index, segment.info
    asked = [v.tolist() for v in vectors[:: max(1, len(vectors) // 500)]]
    async with grpc.aio.insecure_channel(address) as channel:
        embed = pb_grpc.EncoderServiceStub(channel).Embed
        service = "/likewise.v1.SearchService"
        search, batch_search = channel.unary_unary(f"{service}/Search"), channel.unary_unary(f"{service}/BatchSearch")
        messages = [
            pb.SearchRequest(collection="c", query=pb.Query(vector=pb.Vector(values=values))) for values in asked
        ]
        singles = [message.SerializeToString() for message in messages]
        streamed = [
            pb.StreamSearchRequest(id=i, request=message).SerializeToString() for i, message in enumerate(messages)
        ]
        shift = range(0, len(messages), 50)
        batches = [
            pb.BatchSearchRequest(
                collection="c", requests=[messages[(low + i) % len(messages)] for i in range(BATCH)]
            ).SerializeToString()
            for low in shift
        ]

        def ask(i: int) -> Awaitable[bytes]:
            return search(singles[i % len(singles)])

        async def ask_batches() -> float:
            return BATCH * await rate(
                lambda i: batch_search(batches[i % len(batches)]), queries // 20, BATCHES_IN_FLIGHT
            )

        def picture(i: int) -> Awaitable[pb.EmbedResponse]:
            return embed(pb.EmbedRequest(images=[pb.Image(content=pictures[i % len(pictures)])]))

        size = len(await ask(0))
        await ask_batches()
        echo = subprocess.Popen([sys.executable, "-c", _ECHO, str(size)], stdout=subprocess.PIPE, text=True)
        assert echo.stdout is not None
        port = int(echo.stdout.readline())
        found: dict[str, list[float]] = {}
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as echo_channel:
                call = echo_channel.unary_unary("/x.Echo/Echo")
                stream, streams = (
                    echo_channel.stream_stream("/x.Echo/Stream"),
                    channel.stream_stream(f"{service}/StreamSearch"),
                )
                for _ in range(rounds):
                    for name, value in (
                        ("decode + ONNX Runtime, images/s", raw_embedding(encoder, pictures, images)),
                        ("embed over gRPC, images/s", await rate(picture, images)),
                        ("echo RPC, calls/s", await rate(lambda i: call(singles[i % len(singles)]), queries)),
                        ("raw FAISS, single queries/s", raw_faiss(index, info.effort, asked, queries)),
                        ("search over gRPC, queries/s", await rate(ask, queries)),
                        ("echo stream, messages/s", await stream_rate(stream, singles, queries)),
                        ("StreamSearch, queries/s", await stream_rate(streams, streamed, queries)),
                        ("raw FAISS, batches of 200, queries/s", raw_batches(index, info.effort, asked, queries)),
                        ("BatchSearch of 200, queries/s", await ask_batches()),
                    ):
                        found.setdefault(name, []).append(value)
        finally:
            echo.terminate()
            echo.wait()
    encoder.close()
    return {name: statistics.median(values) for name, values in found.items()} | {
        "recall@10 of the index, in %": 100 * info.recall_at_10
    }


def raw_faiss(index: object, effort: Effort, asked: list[list[float]], count: int) -> float:
    """Single queries per second of the index itself, from as many threads as the server uses."""
    queries = np.array(asked, np.float32)
    start = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda i: search_index(index, queries[i % len(queries)][None], 10, effort, None), range(count)))
    return count / (time.perf_counter() - start)


def raw_batches(index: object, effort: Effort, asked: list[list[float]], count: int) -> float:
    """Queries per second of the index itself in batches of 200, from as many threads as the server uses."""
    queries = np.array(asked, np.float32)
    batches = [np.roll(queries, -50 * i, axis=0)[:BATCH] for i in range(count // 20)]
    start = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda batch: search_index(index, batch, 10, effort, None), batches))
    return sum(map(len, batches)) / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
