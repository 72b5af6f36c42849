"""Requests that nobody means: does every one get an answer that the API knows, and does the server stay?

    python -m benchmarks.fuzz_calls --out FOLDER [--calls 100000] [--seed 0]
    python -m benchmarks.fuzz_calls --out FOLDER --quick

Every method of a running server gets requests with random values in random fields (numbers that are none, counts out of
range, odd text, tokens and filters, broken pictures), and a quarter of them as bytes that were mangled. Allowed: OK, or a
status of the API with its ErrorInfo; never UNKNOWN, INTERNAL or DATA_LOSS. After every hundred calls the server has to be
ready, and at the end to have the memory of a server that was asked sensibly.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import grpc
import numpy as np

from benchmarks.record import finish
from benchmarks.serving import ServerProcess, made_bundle
from service.client import Client, NewItem
from tests.faults.messages import Hail


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="scratch folder; the collections in it are removed")
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    calls = 1000 if args.quick else args.calls
    folder, log = args.out / "collections", args.out / "server.log"
    shutil.rmtree(folder, ignore_errors=True)
    log.unlink(missing_ok=True)
    server = ServerProcess(made_bundle(args.out), folder, log, "--snapshots", str(args.out / "snapshots"))
    start = time.monotonic()
    ready = True
    memory = []
    with Client(server.address) as client, grpc.insecure_channel(server.address) as channel:
        dimensions = client.encoder().dimensions
        client.create_collection("many", thumbnail_pixels=64)
        rows = np.random.default_rng(0).standard_normal((300, dimensions))
        client.upsert("many", [NewItem(f"k{i:03d}", vector=row, payload={"i": i}) for i, row in enumerate(rows[:250])])
        hail = Hail(channel, args.seed, dimensions)
        for i in range(calls):
            hail.call()
            if i % 100 == 99:
                ready = ready and client.ready()
                memory.append(server.now().rss)
            if i % 5000 == 4999:
                print(f"{i + 1:>9,} calls   {len(hail.wrong)} wrong   {memory[-1]:.0f} MiB", flush=True)
        found = client.search("many", vector=rows[0])
    code = server.stop()
    for method, what, request in hail.wrong[:20]:
        print(f"{method}: {what}\n    {request[:300]!r}")
    events = server.events()
    figures = {
        "calls": calls, "calls/s": round(calls / (time.monotonic() - start), 1), "wrong": len(hail.wrong),
        "outcomes": dict(sorted(hail.outcomes.items())), "events in the log": dict(events), "exit code": code,
        "RSS in MiB: after a tenth, at the end": [round(memory[len(memory) // 10]), round(memory[-1])],
    }  # fmt: skip
    print(json.dumps(figures, indent=1))
    goals = [
        ("answers_that_the_api_knows", 1 - len(hail.wrong) / calls, 1.0),
        ("server_stays_ready", float(ready and bool(found) and code == 0 and not events["failure"]), 1.0),
    ]
    finish("fuzz_calls", figures, goals, args.seed, args.quick)


if __name__ == "__main__":
    main()
