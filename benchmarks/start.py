"""How long from the start of `likewise serve` until its health service says SERVING, and what does it take?

    python -m benchmarks.start --out FOLDER [--rows 100000] [--quick]

ViT-S/16 at 224 px (384 dimensions) with one collection. A start is timed from the outside, by asking grpc.health.v1 every 20
ms; medians of five. The first start on a machine measures the bundle's graphs and keeps what it finds, later ones read it.
Processor time is that of the server, which other work on the machine changes less. The stages come from other starts, of the
same server with a clock around its parts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.record import cpu_name, finish
from export.bundle import Bundle
from likewise import main as likewise
from service.collection import Collection
from service.records import NewRow
from tests.service.test_server import free_port
from tests.shapes import write_shapes

GOAL_SECONDS = 5.0
# Runs `serve` with a clock around its parts, and ends once it is ready.
_STAGES = """
import json, sys, time
begun, arguments, spent = float(sys.argv[1]), sys.argv[2:], {}
spent["python"] = time.time() - begun
def clocked(owner, name, stage):
    call = getattr(owner, name)
    def timed(*given, **named):
        start = time.perf_counter()
        try:
            return call(*given, **named)
        finally:
            spent[stage] = spent.get(stage, 0) + time.perf_counter() - start
    setattr(owner, name, timed)
start = time.perf_counter()
import likewise
from service import server
spent["imports"] = time.perf_counter() - start
clocked(server.Bundle, "open", "bundle: checksums")
clocked(server, "Model", "encoder: graph, canary, first batches")
clocked(server, "Store", "collections")
class Timed(server.Server):
    async def start(self):
        start = time.perf_counter()
        await super().start()
        spent["ports, canary picture and query"] = time.perf_counter() - start
        spent["in all"] = time.time() - begun
        print(json.dumps(spent), flush=True)
        server.os._exit(0)
server.Server = Timed
likewise.main(arguments)
"""


def wait(address: str, process: subprocess.Popen[bytes]) -> None:
    """Until it says SERVING. Raises `RuntimeError` when it ends instead."""
    # The first connections are refused: gRPC would wait a second and longer before the next.
    options = [(f"grpc.{name}_reconnect_backoff_ms", 20) for name in ("initial", "min", "max")]
    request = health_pb2.HealthCheckRequest()
    with grpc.insecure_channel(address, options) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        while process.poll() is None:
            try:
                if check(request, timeout=5).status == health_pb2.HealthCheckResponse.SERVING:
                    return
            except grpc.RpcError:
                pass
            time.sleep(0.02)
    raise RuntimeError("the server ended before it was ready")


def started(command: list[str]) -> tuple[float, float]:
    """Seconds until ready: on the clock, and of the processor."""
    port = free_port()
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "likewise", *command, "--port", str(port)], stderr=subprocess.DEVNULL
    )
    try:
        wait(f"127.0.0.1:{port}", process)
        seconds = time.perf_counter() - start
        stat = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        return seconds, (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")
    finally:
        process.terminate()
        process.wait()


def stages(command: list[str]) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", _STAGES, str(time.time()), *command, "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True,
    )  # fmt: skip
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    found["the rest"] = 2 * found["in all"] - sum(found.values())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    rows, rounds = (2000, 1) if args.quick else (args.rows, 5)
    encoder = ["vit_micro"] if args.quick else ["vit_small_patch16_224", "--image-size", "224", "--patch-size", "16"]

    made = args.out / encoder[0]
    folder, collections = made / "bundle", made / f"collections-{rows}"
    if not folder.is_dir():
        shapes = write_shapes(made / "shapes", 64)
        flags = ["--out", str(made / "run"), "--steps", "0", "--resume", "--encoder", *encoder]
        assert likewise(["train", str(shapes), *flags]) == 0
        assert likewise(["export", str(made / "run"), "--out", str(folder)]) == 0
    bundle = Bundle.open(folder)
    if not (collections / "c").is_dir():
        rng = np.random.default_rng(0)
        centres = rng.normal(size=(256, bundle.dim))
        vectors = (centres[rng.integers(0, 256, rows)] + 0.5 * rng.normal(size=(rows, bundle.dim))).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        collection = Collection.create(collections / "c", bundle.space_id, bundle.dim)
        collection.add_segment([NewRow(f"item/{i:07d}.jpg") for i in range(rows)], vectors)
        collection.close()

    command = ["serve", "--bundle", str(folder), "--collections", str(collections), "--device", "cpu"]
    command += ["--metrics-port", str(free_port())]
    known = folder / "machine.json"
    first, later, parts = [], [], []
    for _ in range(rounds):
        known.unlink(missing_ok=True)
        first.append(started(command))
        assert known.is_file()
        later.append(started(command))
        parts.append(stages(command))
    figures = {
        "seconds to ready": statistics.median(wall for wall, _ in later),
        "seconds of the processor": statistics.median(cpu for _, cpu in later),
        "seconds to ready, first start on a machine": statistics.median(wall for wall, _ in first),
        "seconds of the processor, first start on a machine": statistics.median(cpu for _, cpu in first),
        "all": later,
    }
    figures |= {"stages": {name: statistics.median(part[name] for part in parts) for name in parts[0]}}
    figures |= {"load_average": os.getloadavg(), "rows": rows, "dimensions": bundle.dim, "encoder": encoder[0]}
    print(f"\n{cpu_name()}, {encoder[0]}, {rows:,} × {bundle.dim} vectors, medians of {rounds}")
    for name, value in (figures | figures["stages"]).items():
        if isinstance(value, float):
            print(f"  {name:<52}{value:>8.2f}")
    print()
    goals = [("start_goal_over_seconds", GOAL_SECONDS / figures["seconds to ready"], 1.0)]
    finish("start", figures, goals, 0, args.quick)


if __name__ == "__main__":
    main()
