"""Likewise beside other servers on this machine, with the same network, weights, pictures and load: Infinity, LitServe and
the backend of clip-retrieval.

    python -m benchmarks.serve_peers --out FOLDER --peers FOLDER [--network small|base] [--rows 100000] [--quick]

`--peers` holds their environments; a peer whose environment is not there is left out. The .pth file lends them our torch:

    for name in infinity litserve clip; do
      python -m venv $name && echo OUR/site-packages > $name/lib/python3.11/site-packages/zz_likewise.pth; done
    litserve/bin/pip install litserve
    infinity/bin/pip install --no-deps infinity-emb
    infinity/bin/pip install 'transformers<5' 'sentence-transformers<4' 'click<8.2' 'typer<0.13' 'uvicorn[standard]<0.33' \\
      fastapi orjson prometheus-fastapi-instrumentator 'optimum[onnxruntime]>=1.24' einops diskcache posthog
    clip/bin/pip install --no-deps clip-retrieval
    clip/bin/pip install 'transformers<5' 'sentence-transformers<4' 'all_clip<2' 'flask_cors<5' 'fire<0.6' 'pyarrow<16' \\
      'webdataset<0.3' 'setuptools<81' flask flask_restful h5py autofaiss aiohttp img2dataset multilingual-clip \\
      clip-anytorch wandb

The network is the picture half of a CLIP with random weights: Infinity and clip-retrieval load it as a checkpoint of
Hugging Face's form (both run it with torch), Likewise and LitServe run its ONNX file with ONNX Runtime, as fp32. LitServe
decodes with Pillow as we do, in threads, and runs our bundle's graph. Each peer's settings are the fastest of a few, found
first; Likewise runs as it comes. All servers stand side by side and are asked in turn, 32 pictures in flight, JPEGs of
640×480 (base64 where a peer takes JSON); rates are medians of the rounds, latencies those of all rounds. Processor time is
that of the server and what it began, which other work on the machine changes less than rates. A peer whose vectors are not
ours (cosine below 0.999) is refused.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import numpy as np

from benchmarks.record import cpu_name, finish
from benchmarks.serve_search import photographs
from export.bundle import Bundle
from likewise import main as likewise
from service.collection import Collection
from service.pb import likewise_pb2 as pb
from service.pb import likewise_pb2_grpc as pb_grpc
from service.records import NewRow
from tests.service.running import address_of
from tests.service.test_server import free_port

IN_FLIGHT = 32
BATCH = 16
CORES = os.cpu_count() or 1
NETWORKS = {
    "small": {
        "hidden_size": 192,
        "num_attention_heads": 3,
        "patch_size": 16,
        "intermediate_size": 768,
    },  # as DeiT-Ti/16
    "base": {
        "hidden_size": 768,
        "num_attention_heads": 12,
        "patch_size": 32,
        "intermediate_size": 3072,
    },  # CLIP ViT-B/32
}
# Runs in Infinity's environment: a checkpoint, and its picture half as ONNX.
_MAKE = """
import json, sys, torch
from pathlib import Path
from transformers import CLIPConfig, CLIPImageProcessor, CLIPImageProcessorFast, CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.models.clip.tokenization_clip import bytes_to_unicode
out, vision = Path(sys.argv[1]), json.loads(sys.argv[2]) | {"num_hidden_layers": 12, "image_size": 224}
torch.manual_seed(0)
text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 1}
model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=384)).eval()
characters = list(bytes_to_unicode().values())
words = [*characters, *(c + "</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
colours = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
for folder, processor in ((out, CLIPImageProcessor), (out / "fast", CLIPImageProcessorFast)):
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    CLIPProcessor(processor(**colours), tokenizer).save_pretrained(folder)
class Pictures(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = model
    def forward(self, pixel_values):
        return self.model.get_image_features(pixel_values=pixel_values)
torch.onnx.export(
    Pictures().eval(), (torch.randn(2, 3, 224, 224),), str(out / "image.onnx"), input_names=["pixel_values"],
    output_names=["image_embeds"], opset_version=20, dynamo=True, external_data=False,
    dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}}, verbose=False)
"""
_LITSERVE = """
import base64, io, sys
from concurrent.futures import ThreadPoolExecutor
import litserve, numpy as np, onnxruntime
from PIL import Image
graph, port, workers, threads, batch = sys.argv[1], *map(int, sys.argv[2:])
def pixels(data):
    image = Image.open(io.BytesIO(data))
    image.draft(None, (224, 224))
    image = image.convert("RGB")
    side = min(image.size)
    x, y = (image.width - side) // 2, (image.height - side) // 2
    return np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC, box=(x, y, x + side, y + side)))
class Api(litserve.LitAPI):
    def setup(self, device):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self.name = self.session.get_inputs()[0].name
        self.pool = ThreadPoolExecutor(threads)
    def decode_request(self, request):
        return base64.b64decode(request["image"])
    def batch(self, inputs):
        return np.stack(list(self.pool.map(pixels, inputs)))
    def predict(self, x):
        return self.session.run(["embedding"], {self.name: x})[0]
    def unbatch(self, rows):
        return list(rows)
    def encode_response(self, row):
        return {"embedding": base64.b64encode(row.tobytes()).decode()}
if __name__ == "__main__":
    api = Api(max_batch_size=batch, batch_timeout=0.005)
    litserve.LitServer(api, accelerator="cpu", workers_per_device=workers, timeout=300).run(
        host="127.0.0.1", port=port, log_level="error", generate_client_file=False)
"""
# Runs in clip-retrieval's environment: the folder that it serves, its index made by autofaiss.
_INDEX = """
import json, sys, numpy, pandas
from autofaiss import build_index
from pathlib import Path
out, rows = Path(sys.argv[1]), numpy.load(sys.argv[2])
(out / "c" / "metadata").mkdir(parents=True, exist_ok=True)
build_index(rows, index_path=str(out / "c/image.index"), index_infos_path=str(out / "infos.json"), metric_type="ip",
            max_index_memory_usage="2GB", current_memory_available="4GB")
pandas.DataFrame({"image_path": [f"item/{i:07d}.jpg" for i in range(len(rows))]}).to_parquet(
    out / "c/metadata/metadata_0.parquet")
(out / "indices.json").write_text(json.dumps({"c": str(out / "c")}))
"""

# What is sent for the i-th call; answered with the vectors, or with None where neighbours come.
Ask = Callable[[int], Awaitable[np.ndarray | None]]


@dataclass
class Server:
    """One that answers: its calls by name, and the process that began it."""

    name: str
    settings: str
    process: subprocess.Popen[Any]
    calls: dict[str, Ask]
    pictures: dict[str, int] = field(default_factory=dict)  # per call, where not one


def family_of(process: subprocess.Popen[Any]) -> dict[int, float]:
    """A process and what it began: seconds of processor time by id."""
    stats = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            stats[int(entry.parent.name)] = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
    family = {process.pid}
    while more := {pid for pid, stat in stats.items() if int(stat[1]) in family} - family:
        family |= more
    ticks = os.sysconf("SC_CLK_TCK")
    return {pid: sum(map(int, stats[pid][11:15])) / ticks for pid in family}


def memory(process: subprocess.Popen[Any]) -> float:
    """MiB of a process and what it began, shared pages counted once."""
    family = family_of(process)
    pages = (Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in family if Path(f"/proc/{pid}").exists())
    return sum(int(line.split()[1]) for text in pages for line in text.splitlines() if line.startswith("Pss:")) / 1024


@contextmanager
def begun(log: Path, command: list[object], **environment: str) -> Iterator[subprocess.Popen[Any]]:
    """A server in a session of its own, as ours is (the kernel shares processors by session), which ends with it."""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "PYTHONWARNINGS": "ignore"} | environment
    with log.open("w") as file:
        process = subprocess.Popen(
            [str(part) for part in command], stdout=file, stderr=file, env=env, cwd=log.parent, start_new_session=True
        )
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def vectors_of(text: str) -> np.ndarray:
    row = np.frombuffer(base64.b64decode(text), np.float32)
    return row / np.linalg.norm(row)


class Bench:
    """Folders, pictures and the peers' environments."""

    def __init__(self, out: Path, peers: Path, network: str, rows: int) -> None:
        self.out, self.peers, self.rows = out.resolve(), peers.resolve(), rows
        self.pictures = photographs(64)
        self.texts = [base64.b64encode(data).decode() for data in self.pictures]
        self.model, self.bundle_folder = self.out / f"clip-{network}", self.out / f"bundle-{network}"
        self.collections = self.out / f"collections-{network}-{rows}"
        self.index = self.out / f"autofaiss-{network}-{rows}"
        self.session: aiohttp.ClientSession

    def make(self, network: str) -> None:
        """What the servers serve, once."""
        self.out.mkdir(parents=True, exist_ok=True)
        photos = self.out / "photographs"
        photos.mkdir(exist_ok=True)
        for i, data in enumerate(self.pictures):
            (photos / f"{i:02d}.jpg").write_bytes(data)
        if not (self.model / "image.onnx").is_file():
            python = self.peers / "infinity/bin/python"
            subprocess.run([python, "-W", "ignore", "-c", _MAKE, self.model, json.dumps(NETWORKS[network])], check=True)
        if not self.bundle_folder.is_dir():
            flags = ["--normalization", "imagenet", "--images", str(photos), "--out", str(self.bundle_folder)]
            assert likewise(["export", str(self.model / "image.onnx"), *flags]) == 0
        bundle = Bundle.open(self.bundle_folder)
        rng = np.random.default_rng(0)
        centres = rng.normal(size=(256, bundle.dim))
        vectors = centres[rng.integers(0, 256, self.rows)] + 0.5 * rng.normal(size=(self.rows, bundle.dim))
        vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
        if not (self.collections / "c").is_dir():
            collection = Collection.create(self.collections / "c", bundle.space_id, bundle.dim)
            collection.add_segment([NewRow(f"item/{i:07d}.jpg") for i in range(self.rows)], vectors)
            collection.close()
        if self.has("clip") and not (self.index / "indices.json").is_file():
            np.save(self.out / "vectors.npy", vectors)
            python = self.peers / "clip/bin/python"
            subprocess.run([python, "-W", "ignore", "-c", _INDEX, self.index, self.out / "vectors.npy"], check=True)

    def has(self, peer: str) -> bool:
        return (self.peers / peer / "bin/python").is_file()

    def version(self, peer: str, package: str) -> str:
        code = f"from importlib import metadata; print(metadata.version({package!r}))"
        done = subprocess.run(
            [self.peers / peer / "bin/python", "-c", code], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    def picture(self, i: int) -> bytes:
        return self.pictures[i % len(self.pictures)]

    async def post(self, url: str, body: dict[str, Any]) -> Any:
        async with self.session.post(url, json=body) as response:
            if response.status != 200:
                raise RuntimeError(f"{url} answers {response.status}: {(await response.text())[:200]}")
            return await response.json()

    # Each of these starts a server with some settings and gives its calls; `stack` ends it.

    async def likewise(self, stack: ExitStack) -> Server:
        command = ["serve", "--bundle", self.bundle_folder, "--collections", self.collections, "--port", "0"]
        process = subprocess.Popen(
            [sys.executable, "-m", "likewise", *map(str, command), "--metrics-port", "0", "--device", "cpu"],
            stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        stack.callback(process.wait)
        stack.callback(process.terminate)
        channel = grpc.aio.insecure_channel(await asyncio.to_thread(address_of, process))
        encoder, searcher = pb_grpc.EncoderServiceStub(channel), pb_grpc.SearchServiceStub(channel)

        async def embed(i: int, count: int = 1) -> np.ndarray:
            images = [pb.Image(content=self.picture(n)) for n in range(i * count, (i + 1) * count)]
            reply = await encoder.Embed(pb.EmbedRequest(images=images))
            return np.array([result.embedding.values for result in reply.results], np.float32)

        async def search(i: int) -> None:
            query = pb.Query(image=pb.Image(content=self.picture(i)))
            reply = await searcher.Search(pb.SearchRequest(collection="c", query=query, top_k=10))
            assert len(reply.neighbors) == 10

        calls: dict[str, Ask] = {"embed": embed, "batch": lambda i: embed(i, BATCH), "search": search}
        return Server("Likewise", "as it comes", process, calls, {"batch": BATCH})

    async def litserve(self, stack: ExitStack, workers: int, threads: int, batch: int) -> Server:
        (self.out / "lit.py").write_text(_LITSERVE)
        port, graph = free_port(), Bundle.open(self.bundle_folder).graph()
        command = [self.peers / "litserve/bin/python", self.out / "lit.py", graph, port, workers, threads, batch]
        process = stack.enter_context(begun(self.out / "litserve.log", command))

        async def embed(i: int) -> np.ndarray:
            body = {"image": self.texts[i % len(self.texts)]}
            reply = await self.post(f"http://127.0.0.1:{port}/predict", body)
            return vectors_of(reply["embedding"])[None]

        settings = f"workers_per_device={workers}, {threads} threads, max_batch_size={batch}, batch_timeout=5 ms"
        return await self.ready(Server("LitServe", settings, process, {"embed": embed}))

    async def infinity(self, stack: ExitStack, batch: int, processor: str, compiled: bool, threads: int) -> Server:
        port, model = free_port(), self.model / "fast" if processor == "fast" else self.model
        flags = [
            "--engine",
            "torch",
            "--device",
            "cpu",
            "--batch-size",
            batch,
            "--no-bettertransformer",
            "--port",
            port,
        ]
        flags += ["--served-model-name", "m", "--compile" if compiled else "--no-compile", "--log-level", "error"]
        command = [self.peers / "infinity/bin/infinity_emb", "v2", "--model-id", model, *flags]
        process = stack.enter_context(begun(self.out / "infinity.log", command, OMP_NUM_THREADS=str(threads)))

        async def embed(i: int, count: int = 1) -> np.ndarray:
            texts = (self.texts[n % len(self.texts)] for n in range(i * count, (i + 1) * count))
            body = {"model": "m", "modality": "image", "encoding_format": "base64"}
            body["input"] = [f"data:image/jpeg;base64,{text}" for text in texts]  # type: ignore[assignment]
            reply = await self.post(f"http://127.0.0.1:{port}/embeddings", body)
            return np.stack([vectors_of(each["embedding"]) for each in reply["data"]])

        settings = f"torch, --batch-size {batch}, {processor} processor, {threads} threads" + ", --compile" * compiled
        calls: dict[str, Ask] = {"embed": embed, "batch": lambda i: embed(i, BATCH)}
        return await self.ready(Server("Infinity", settings, process, calls, {"batch": BATCH}))

    async def clip(self, stack: ExitStack, threads: int) -> Server:
        port = free_port()
        flags = [
            "--indices-paths",
            self.index / "indices.json",
            "--port",
            port,
            "--clip-model",
            f"hf_clip:{self.model}",
        ]
        flags += ["--enable-mclip-option", False, "--provide-aesthetic-embeddings", False, "--use-jit", False]
        command = [self.peers / "clip/bin/clip-retrieval", "back", *flags]
        process = stack.enter_context(begun(self.out / "clip.log", command, OMP_NUM_THREADS=str(threads)))

        async def search(i: int) -> None:
            body = {"image": self.texts[i % len(self.texts)], "modality": "image", "num_images": 10, "indice_name": "c"}
            reply = await self.post(f"http://127.0.0.1:{port}/knn-service", {**body, "deduplicate": False})
            assert len(reply) == 10

        return await self.ready(Server("clip-retrieval", f"{threads} threads", process, {"search": search}))

    async def ready(self, server: Server) -> Server:
        """Once it answers. Raises `RuntimeError` when it ends instead."""
        deadline = time.monotonic() + 300
        while True:
            try:
                for call in server.calls.values():
                    await call(0)
                return server
            except (aiohttp.ClientConnectionError, RuntimeError) as e:
                if server.process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{server.name} ({server.settings}) does not answer: {e}") from e
                await asyncio.sleep(0.5)


async def load(ask: Ask, count: int, in_flight: int, seconds: list[float]) -> float:
    """Calls per second with so many in flight (closed loop); how long each took goes into `seconds`."""
    numbers = iter(range(count))

    async def worker() -> None:
        for i in numbers:
            start = time.perf_counter()
            await ask(i)
            seconds.append(time.perf_counter() - start)

    start = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(in_flight)))
    return count / (time.perf_counter() - start)


async def fastest(start: Callable[..., Awaitable[Server]], tried: list[tuple[Any, ...]], call: str, count: int) -> Any:
    """The settings with the highest rate of two trials each, and what all of them reached."""
    rates: dict[tuple[Any, ...], float] = {}
    said: dict[str, Any] = {}
    for settings in tried:
        with ExitStack() as stack:
            try:
                server = await start(stack, *settings)
                await load(server.calls[call], IN_FLIGHT, IN_FLIGHT, [])
                rates[settings] = max([await load(server.calls[call], min(48, count), IN_FLIGHT, []) for _ in range(2)])
            except RuntimeError as e:
                said[str(settings)] = str(e)
                continue
            said[server.settings] = round(rates[settings], 2)
            print(f"  {server.name}, {server.settings}: {rates[settings]:.1f}/s")
    return max(rates, key=lambda s: rates[s]), said


async def measure(bench: Bench, rounds: int, count: int, quick: bool) -> dict[str, Any]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as bench.session:
        grids: dict[str, tuple[str, Callable[..., Awaitable[Server]], str, list[tuple[Any, ...]]]] = {
            "litserve": ("litserve", bench.litserve, "embed",
                [(1, CORES, 8), (1, CORES, 32), (CORES, 1, 8)]),
            "infinity": ("infinity-emb", bench.infinity, "embed",
                [(8, "slow", False, CORES), (32, "slow", False, CORES), (8, "fast", False, CORES),
                 (8, "fast", True, CORES)]),
            "clip": ("clip-retrieval", bench.clip, "search", [(1,), (CORES,)]),
        }  # fmt: skip
        figures: dict[str, Any] = {"peers": {}, "servers": {}}
        with ExitStack() as stack:
            chosen = []
            for peer, (package, start, call, tried) in grids.items():
                if not bench.has(peer):
                    continue
                best, said = await fastest(start, tried[:1] if quick else tried, call, count)
                figures["peers"][peer] = {"version": bench.version(peer, package), "trials": said}
                chosen.append((start, best))
            servers = [await bench.likewise(stack), *[await start(stack, *best) for start, best in chosen]]
            ours = servers[0]
            expected = await ours.calls["batch"](0)
            assert expected is not None
            for server in servers:
                for name in set(server.calls) - {"search"}:
                    rows = await server.calls[name](0)
                    assert rows is not None
                    cosine = float((rows * expected[: len(rows)]).sum(1).min())
                    assert cosine > 0.999, f"{server.name} embeds otherwise: cosine {cosine}"
            runs = [(s, name) for name in ("embed", "batch", "search") for s in servers if name in s.calls]
            rates: dict[str, list[float]] = {f"{s.name}, {name}": [] for s, name in runs}
            seconds: dict[str, list[float]] = {key: [] for key in rates}
            alone: dict[str, list[float]] = {key: [] for key in rates}
            worked: dict[str, list[float]] = {key: [] for key in rates}
            loads = []
            for s, name in runs:  # warm
                await load(s.calls[name], 4, 2, [])
            for number in range(rounds):
                loads.append(os.getloadavg()[0])
                for s, name in runs if number % 2 == 0 else reversed(runs):
                    key, size = f"{s.name}, {name}", s.pictures.get(name, 1)
                    calls, before = max(2, count // size), sum(family_of(s.process).values())
                    rate = await load(s.calls[name], calls, max(2, IN_FLIGHT // size), seconds[key])
                    rates[key].append(size * rate)
                    worked[key].append((sum(family_of(s.process).values()) - before) / (calls * size))
                    await load(s.calls[name], 4, 1, alone[key])
            for s, name in runs:
                key = f"{s.name}, {name}"
                p50, p99 = map(float, np.percentile(seconds[key], [50, 99]))
                figures["servers"][key] = {
                    "settings": s.settings, "images_per_second": statistics.median(rates[key]), "rounds": rates[key],
                    "ours_over_it": statistics.median(
                        a / b for a, b in zip(rates[f"{ours.name}, {name}"], rates[key], strict=True)
                    ),
                    "p50_ms": 1000 * p50, "p99_ms": 1000 * p99, "alone_p50_ms": 1000 * statistics.median(alone[key]),
                    "cpu_ms_per_image": 1000 * statistics.median(worked[key]), "memory_mib": memory(s.process),
                }  # fmt: skip
            figures["load_average"] = loads
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--peers", type=Path, required=True)
    parser.add_argument("--network", choices=NETWORKS, default="small")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pictures", type=int, default=128, help="per server and round")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.rows, args.rounds, args.pictures = 2000, 1, 32
    bench = Bench(args.out, args.peers, args.network, args.rows)
    bench.make(args.network)
    figures = asyncio.run(measure(bench, args.rounds, args.pictures, args.quick))
    figures |= {"network": args.network, "rows": args.rows, "in_flight": IN_FLIGHT, "batch": BATCH}
    print(f"\n{cpu_name()}, {args.network}, {IN_FLIGHT} pictures in flight, medians of {args.rounds}")
    print(
        f"  {'':<26}{'images/s':>9}{'ours/it':>9}{'p50 ms':>9}{'p99 ms':>9}{'alone ms':>9}{'CPU ms':>8}{'MiB':>7}  settings"
    )
    for key, it in figures["servers"].items():
        print(
            f"  {key:<26}{it['images_per_second']:>9.1f}{it['ours_over_it']:>9.2f}{it['p50_ms']:>9.0f}{it['p99_ms']:>9.0f}"
            f"{it['alone_p50_ms']:>9.0f}{it['cpu_ms_per_image']:>8.1f}{it['memory_mib']:>7.0f}  {it['settings']}"
        )
    print()
    goals = []
    for key, it in figures["servers"].items():
        name, call = key.split(", ")
        if name != "Likewise":
            label = f"{call}_over_{name.lower().replace('-', '_')}"
            goals += [(label, it["ours_over_it"], 1.0)]
            goals += [(f"{label}_p99", it["p99_ms"] / figures["servers"][f"Likewise, {call}"]["p99_ms"], 1.0)]
    finish(f"serve_peers_{args.network}", figures, goals, 0, args.quick)


if __name__ == "__main__":
    main()
