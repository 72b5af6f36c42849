"""Half an hour, or a night, of everything at once: does anything grow, fail or get lost?

    python -m benchmarks.soak --out FOLDER [--minutes 30] [--rate 1.0]
    python -m benchmarks.soak --out FOLDER --quick

A server process, and clients that embed, search with filters and groups, upsert, delete, list, stream, make and delete
collections, find duplicates and compact; some send bad pictures, some have deadlines that cannot be kept, some vanish in
the middle of a stream. Each second the server's memory, files and threads are read. At the end every acknowledged write has
to be there, by a model beside it, from the running server and in the collection that it closed. `rate` scales how often
clients ask; at 1 server and clients take less than a core together. `soak.png` in the folder shows memory and latency.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import random
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from google.rpc import error_details_pb2, status_pb2
from PIL import Image

from benchmarks.record import cpu_name, finish
from benchmarks.serving import Sample, ServerProcess, flatness, made_bundle, percentiles, slope
from service.collection import Collection
from service.pb import likewise_pb2 as pb
from service.pb import likewise_pb2_grpc as pb_grpc

KEYS = 1500
NAME = "soak"
BAD = (b"", b"no picture", b"\xff\xd8\xff\xe0" + bytes(200), b"GIF89a\xff\xff\xff\xff\x00\x00\x00")


def vector(seed: int, dim: int) -> np.ndarray:
    """[dim], of length 1."""
    row = np.random.default_rng(seed).standard_normal(dim).astype(np.float32)
    return row / np.linalg.norm(row)


def small_picture(seed: int) -> bytes:
    """A JPEG of some 200×150."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize((200 + seed % 40, 150), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


class Model:
    """What the collection may hold: by key the seeds of writes that count, None for absent. Each key has one writer."""

    def __init__(self) -> None:
        self.acknowledged: dict[str, int | None] = {}
        self.unknown: defaultdict[str, set[int | None]] = defaultdict(set)
        """Writes whose answer did not come: they may count, even after later ones."""

    def may_be(self, key: str) -> set[int | None]:
        """Seeds that a key may have."""
        return {self.acknowledged.get(key)} | self.unknown.get(key, set())


class Soak:
    """The clients."""

    def __init__(self, address: str, dim: int, seed: int, rate: float) -> None:
        self._address, self._dim, self._rate = address, dim, rate
        self._random = random.Random(seed)
        self._channel = grpc.aio.insecure_channel(address)
        self.encoder = pb_grpc.EncoderServiceStub(self._channel)
        self.searches = pb_grpc.SearchServiceStub(self._channel)
        self.collections = pb_grpc.CollectionServiceStub(self._channel)
        self._pictures = [small_picture(i) for i in range(40)]
        self._seed = 0
        self.model = Model()
        self.counts: Counter[str] = Counter()
        self.latency: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
        self.unexpected: Counter[str] = Counter()
        self._start = time.monotonic()

    # --- what they send -----------------------------------------------------------------------------------------------

    def _next(self) -> int:
        self._seed += 1
        return self._seed

    def _image(self) -> pb.Image:
        return pb.Image(content=self._random.choice(self._pictures))

    def _item(self, key: str, seed: int) -> pb.NewItem:
        item = pb.NewItem(key=key, source_uri=f"file:///soak/{key}")
        if self._random.random() < 0.1:
            item.image.CopyFrom(self._image())
        else:
            item.vector.values.extend(vector(seed, self._dim).tolist())
        item.payload.update({"seed": seed, "price": seed % 100, "colour": ("red", "green", "blue")[seed % 3]})
        return item

    def _lot(self, writer: str, count: int) -> list[tuple[str, int]]:
        keys = self._random.sample(range(KEYS), count)
        return [(f"{writer}/{key}", self._next()) for key in keys]

    def _query(self) -> pb.SearchRequest:
        request = pb.SearchRequest(collection=NAME, top_k=self._random.choice((1, 10, 50)))
        kind = self._random.random()
        if kind < 0.15:
            request.query.image.CopyFrom(self._image())
        else:
            request.query.vector.values.extend(vector(self._random.randrange(10**6), self._dim).tolist())
        request.filter = self._random.choice(("", "", "price < 30", 'colour = "red" AND price >= 50', "NOT price = 7"))
        if self._random.random() < 0.1:
            request.group_by = "colour"
        elif self._random.random() < 0.1:
            request.expansion.neighbors = 3
        return request

    # --- what they do -------------------------------------------------------------------------------------------------

    async def embed(self) -> None:
        bad = self._random.random() < 0.2
        images = [self._image() for _ in range(self._random.randrange(1, 5))]
        if bad:
            images.append(pb.Image(content=self._random.choice(BAD)))
        reply = await self.encoder.Embed(pb.EmbedRequest(images=images), timeout=20)
        for i, result in enumerate(reply.results):
            if bad and i == len(images) - 1:
                self._check(reason(result.error).startswith("IMAGE_"), "a bad picture was embedded")
            else:
                self._check(len(result.embedding.values) == self._dim, f"embed: {result.error.message}")

    async def search(self) -> None:
        request = self._query()
        reply = await self.searches.Search(request, timeout=20)
        if reply.next_page_token and self._random.random() < 0.2:
            request.page_token = reply.next_page_token
            await self.searches.Search(request, timeout=20)
        for neighbour in reply.neighbors:
            if request.filter == "price < 30":
                self._check(neighbour.item.payload["price"] < 30, "a filter let something through")

    async def batch(self) -> None:
        requests = [self._query() for _ in range(20)]
        reply = await self.searches.BatchSearch(pb.BatchSearchRequest(collection=NAME, requests=requests), timeout=20)
        for result in reply.results:
            self._check(not result.HasField("error"), f"batch: {result.error.message}")

    async def upsert(self) -> None:
        lot = self._lot("unary", self._random.randrange(1, 20))
        items = [self._item(*each) for each in lot]
        reply = await self.collections.UpsertItems(pb.UpsertItemsRequest(collection=NAME, items=items), timeout=20)
        self._acknowledged(lot, reply.results)

    def _acknowledged(self, lot: list[tuple[str, int]], results: Any) -> None:
        for (key, seed), result in zip(lot, results, strict=False):
            self._check(not result.HasField("error"), f"upsert: {result.error.message}")
            self.model.acknowledged[key] = seed

    async def delete(self) -> None:
        keys = [key for key, _ in self._lot("unary", 5)]
        await self.collections.DeleteItems(pb.DeleteItemsRequest(collection=NAME, keys=keys), timeout=20)
        for key in keys:
            self.model.acknowledged[key] = None

    async def read(self) -> None:
        request = pb.ListItemsRequest(collection=NAME, page_size=50, filter=self._random.choice(("", "price = 3")))
        page = await self.collections.ListItems(request, timeout=20)
        if page.items:
            try:
                await self.collections.GetItem(pb.GetItemRequest(collection=NAME, key=page.items[0].key), timeout=20)
            except grpc.aio.AioRpcError as e:  # deleted meanwhile
                self._check(e.code() is grpc.StatusCode.NOT_FOUND, f"get: {e.details()}")

    async def stream_embed(self) -> None:
        def requests() -> Iterator[pb.StreamEmbedRequest]:
            for i in range(20):
                yield pb.StreamEmbedRequest(id=i, image=self._image() if i % 7 else pb.Image(content=b"?"))

        answers = {a.id: a async for a in self.encoder.StreamEmbed(requests(), timeout=30)}
        self._check(sorted(answers) == list(range(20)), "a stream of pictures was not answered whole")

    async def stream_search(self) -> None:
        requests = [pb.StreamSearchRequest(id=i, request=self._query()) for i in range(50)]
        answers = [a async for a in self.searches.StreamSearch(iter(requests), timeout=30)]
        self._check(len(answers) == 50 and not any(a.HasField("error") for a in answers), "a stream of searches failed")

    async def stream_upsert(self) -> None:
        lot = self._lot("stream", 60)
        requests = (
            pb.StreamUpsertRequest(collection=NAME, items=[self._item(*each) for each in lot[low : low + 10]])
            for low in range(0, 60, 10)
        )
        results = [r async for a in self.collections.StreamUpsert(requests, timeout=30) for r in a.results]
        self._check(len(results) == 60, "a stream of items was not acknowledged whole")
        self._acknowledged(lot, results)

    async def vanish(self) -> None:
        """A client of its own, that is gone in the middle of a stream; what it was told of counts."""
        lot = self._lot("gone", 80)
        for key, seed in lot:
            self.model.unknown[key].add(seed)
        async with grpc.aio.insecure_channel(self._address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            upload = pb_grpc.CollectionServiceStub(channel).StreamUpsert(timeout=30)
            pictures = pb_grpc.EncoderServiceStub(channel).StreamEmbed(timeout=30)
            found = pb_grpc.SearchServiceStub(channel).StreamSearch(timeout=30)
            told = 0
            for low in range(0, 80, 10):
                items = [self._item(*each) for each in lot[low : low + 10]]
                await upload.write(pb.StreamUpsertRequest(collection=NAME, items=items))
                await pictures.write(pb.StreamEmbedRequest(id=low, image=self._image()))
                await found.write(pb.StreamSearchRequest(id=low, request=self._query()))
                if low == 40:
                    answer = await upload.read()
                    if answer is not grpc.aio.EOF:
                        self._acknowledged(lot[: len(answer.results)], answer.results)
                        told = len(answer.results)
            if self._random.random() < 0.5:
                for call in (upload, pictures, found):
                    call.cancel()
        self.counts["vanished with writes acknowledged"] += told > 0

    async def hurry(self) -> None:
        """Deadlines that are too short, mostly."""
        images = [self._image() for _ in range(30)]
        try:
            await self.encoder.Embed(pb.EmbedRequest(images=images), timeout=self._random.uniform(0.001, 0.05))
        except grpc.aio.AioRpcError as e:
            late = e.code() in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED)
            self._check(late, f"hurry: {e.code().name} {e.details()}")
            self.counts["deadlines that passed"] += 1

    async def wrong(self) -> None:
        """Requests that are refused."""
        call = self._random.choice(
            (
                lambda: self.searches.Search(pb.SearchRequest(collection="none"), timeout=20),
                lambda: self.searches.Search(pb.SearchRequest(collection=NAME, filter="price <"), timeout=20),
                lambda: self.collections.GetItem(pb.GetItemRequest(collection=NAME, key="never"), timeout=20),
                lambda: self.encoder.Embed(pb.EmbedRequest(), timeout=20),
            )
        )
        try:
            await call()
            self._check(False, "a wrong request was answered")
        except grpc.aio.AioRpcError as e:
            refused = e.code() in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT)
            self._check(refused, f"wrong: {e.code().name}")

    async def come_and_go(self) -> None:
        name = f"c{self._next()}"
        await self.collections.CreateCollection(pb.CreateCollectionRequest(name=name, thumbnail_pixels=64), timeout=20)
        items = [pb.NewItem(key=str(i), image=self._image()) for i in range(3)]
        await self.collections.UpsertItems(pb.UpsertItemsRequest(collection=name, items=items), timeout=20)
        query = pb.Query(key="0")
        await self.searches.Search(pb.SearchRequest(collection=name, query=query, with_thumbnails=True), timeout=20)
        await self.collections.DeleteCollection(pb.DeleteCollectionRequest(name=name), timeout=20)

    async def care(self) -> None:
        request = pb.FindDuplicatesRequest(collection=NAME, min_score=0.9)
        _ = [answer async for answer in self.collections.FindDuplicates(request, timeout=120)]
        await self.collections.CompactCollection(pb.CompactCollectionRequest(name=NAME), timeout=120)

    # --- how often ----------------------------------------------------------------------------------------------------

    def _check(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.unexpected[otherwise] += 1

    async def _repeat(self, call: Callable[[], Awaitable[None]], rate: float, until: float) -> None:
        name = call.__name__  # type: ignore[attr-defined]
        while True:
            pause = self._random.expovariate(rate * self._rate)
            if time.monotonic() + pause > until:
                return
            await asyncio.sleep(pause)
            start = time.monotonic()
            try:
                await call()
            except grpc.aio.AioRpcError as e:
                self.unexpected[f"{name}: {e.code().name} {e.details()}"] += 1
            self.counts[name] += 1
            self.latency[name].append((start - self._start, time.monotonic() - start))

    async def run(self, seconds: float) -> None:
        """For so long."""
        until = time.monotonic() + seconds
        rates: tuple[tuple[Callable[[], Awaitable[None]], float], ...] = (
            (self.embed, 4), (self.search, 12), (self.batch, 0.5), (self.upsert, 3), (self.delete, 1), (self.read, 1),
            (self.stream_embed, 0.3), (self.stream_search, 0.3), (self.stream_upsert, 0.3), (self.vanish, 0.5),
            (self.hurry, 0.5), (self.wrong, 1), (self.come_and_go, 0.2), (self.care, 1 / 20),
        )  # fmt: skip
        await asyncio.gather(*(self._repeat(call, rate, until) for call, rate in rates))

    async def differences(self) -> list[str]:
        """Where the server holds something else than the model allows."""
        found: dict[str, pb.Item] = {}
        request = pb.ListItemsRequest(collection=NAME, page_size=1000, with_vectors=True)
        while True:
            page = await self.collections.ListItems(request, timeout=60)
            found |= {item.key: item for item in page.items}
            if not page.next_page_token:
                break
            request.page_token = page.next_page_token
        wrong = [f"{key} was never written" for key in found.keys() - self._keys()]
        for key in self._keys():
            seed = int(found[key].payload["seed"]) if key in found else None
            if seed not in self.model.may_be(key):
                wrong.append(f"{key} has {seed} instead of {self.model.may_be(key)}")
        return wrong

    def _keys(self) -> set[str]:
        return set(self.model.acknowledged) | set(self.model.unknown)

    async def close(self) -> None:
        await self._channel.close()


def reason(status: status_pb2.Status) -> str:
    info = error_details_pb2.ErrorInfo()
    return str(info.reason) if status.details and status.details[0].Unpack(info) else ""


async def soaked(server: ServerProcess, soak: Soak, seconds: float) -> list[str]:
    await soak.collections.CreateCollection(pb.CreateCollectionRequest(name=NAME, keep_originals=True))
    running = asyncio.create_task(soak.run(seconds))
    async for said in _progress(server, soak, running):
        print(said, flush=True)
    await running
    await asyncio.sleep(2)
    return await soak.differences()


async def _progress(server: ServerProcess, soak: Soak, running: asyncio.Task[None]) -> AsyncIterator[str]:
    while not running.done():
        await asyncio.wait([running], timeout=30)
        now = server.now()
        yield (
            f"{sum(soak.counts.values()):>8,} calls   {now.rss:7.1f} MiB   {now.files:.0f} files   {now.threads:.0f} threads"
            f"   {sum(soak.unexpected.values())} unexpected"
        )


def draw(samples: list[Sample], soak: Soak, path: Path) -> None:
    """Memory, and latency per method, over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(10, 7), sharex=True)
    above.plot([s.at / 60 for s in samples], [s.rss for s in samples], linewidth=1)
    above.set_ylabel("memory (RSS) in MiB")
    above.set_ylim(bottom=0)
    for name in ("embed", "search", "upsert", "stream_upsert"):
        by_time: defaultdict[int, list[float]] = defaultdict(list)
        for at, seconds in soak.latency[name]:
            by_time[int(at // 30)].append(1000 * seconds)
        lots = sorted(by_time)
        below.plot([(k + 0.5) / 2 for k in lots], [percentiles(by_time[k])["p95"] for k in lots], label=name)
    below.set_yscale("log")
    below.set_ylabel("p95 of half a minute in ms")
    below.set_xlabel("minutes")
    below.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="scratch folder; the collections in it are removed")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--rate", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    seconds = 15.0 if args.quick else 60 * args.minutes
    bundle, folder, log = made_bundle(args.out), args.out / "collections", args.out / "server.log"
    shutil.rmtree(folder, ignore_errors=True)
    log.unlink(missing_ok=True)
    server = ServerProcess(bundle, folder, log, "--check-seconds", "5")

    async def everything() -> tuple[Soak, list[str]]:
        async with grpc.aio.insecure_channel(server.address) as channel:
            described = await pb_grpc.EncoderServiceStub(channel).GetEncoder(pb.GetEncoderRequest())
        soak = Soak(server.address, described.encoder.dimensions, args.seed, args.rate)
        server.sample_each(1.0)
        try:
            return soak, await soaked(server, soak, seconds)
        finally:
            await soak.close()

    try:
        soak, wrong = asyncio.run(everything())
    finally:
        code = server.stop()
    opened = Collection(folder / NAME)
    kept = {
        key for key, seed in soak.model.acknowledged.items() if seed is not None and not soak.model.unknown.get(key)
    }
    lost = kept - opened.files().keys()
    opened.close()
    events = server.events()
    samples = server.samples
    draw(samples, soak, args.out / "soak.png")
    late = samples[len(samples) // 3 :]  # caches and pools are full by then
    times = [s.at for s in late]
    figures: dict[str, Any] = {
        "minutes": round(samples[-1].at / 60, 1),
        "calls": sum(soak.counts.values()),
        "by kind": dict(soak.counts),
        "unexpected": dict(soak.unexpected),
        "differences from the model": wrong[:20] + [f"{key} is not in the closed collection" for key in sorted(lost)[:20]],
        "events in the log": dict(events),
        "exit code": code,
        "RSS in MiB: after a third, at the end, most": [
            round(rss) for rss in (late[0].rss, late[-1].rss, max(s.rss for s in samples))
        ],
        "RSS, MiB per hour": round(slope(times, [s.rss for s in late]) * 3600, 1),
        "files: median, most": [np.median([s.files for s in late]).item(), max(s.files for s in late)],
        "threads: median, most": [np.median([s.threads for s in late]).item(), max(s.threads for s in late)],
        "cores of the server": round(samples[-1].cpu / samples[-1].at, 2),
        "milliseconds": {
            name: {p: round(1000 * v, 1) for p, v in percentiles([s for _, s in found]).items()}
            for name, found in sorted(soak.latency.items())
        },
    }  # fmt: skip
    print(f"\n{cpu_name()}")
    print(json.dumps(figures, indent=1))
    faults = sum(soak.unexpected.values()) + events["failure"] + events["not_ready"] + events["text"] + (code != 0)
    goals = [
        ("calls_without_a_fault", 1 - faults / max(1, sum(soak.counts.values())), 1.0),
        ("writes_as_the_model_says", 1 - (len(wrong) + len(lost)) / max(1, len(soak.model.acknowledged)), 1.0),
        ("memory_flat_over_an_hour", flatness(times, [s.rss for s in late]), 0.95),
        ("files_flat_over_an_hour", flatness(times, [s.files for s in late]), 0.95),
        ("threads_flat_over_an_hour", flatness(times, [s.threads for s in late]), 0.95),
    ]
    finish("soak", figures, goals, args.seed, args.quick)


if __name__ == "__main__":
    main()
