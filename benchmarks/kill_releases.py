"""Does an exchange of encoders survive SIGKILL of the server at any moment, while clients write?

    python -m benchmarks.kill_releases --out FOLDER [--kills 40]
    python -m benchmarks.kill_releases --out FOLDER --quick

A server holds a collection that keeps originals; three clients upsert and delete pictures, each keys of its own, while the
collection is switched to a release of another encoder and rolled back, again and again. The server is killed at a random
moment, most of them within an exchange, and started again. Then every acknowledged write must be there, none of what was
under way half, each with the vector of the encoder that is live; and the next exchange must go through.
"""

from __future__ import annotations

import argparse
import io
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.record import finish
from likewise import main as likewise
from service.client import CallError, Client, NewItem
from tests.service.running import address_of
from tests.shapes import write_shapes

WRITERS, KEYS = 3, 15
TINY = ["--encoder", "vit_nano", "--image-size", "32", "--patch-size", "8", "--threads", "1", "--device", "cpu"]


def picture(number: int) -> bytes:
    """A PNG of noise."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


class Writer:
    """A client that writes keys of its own, one after the other, until it is stopped or the server dies."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.sure: dict[str, int] = {}  # key → number of its picture
        self.pending: tuple[str, int | None] | None = None  # what was not acknowledged
        self.writes = 0
        self.problem = ""

    def run(self, address: str, stop: threading.Event) -> None:
        """Write."""
        rng = random.Random(self.number + 1000 * self.writes)
        with Client(address) as client:
            client._retries.budget = client._retries.most = 0  # a write is sent once
            while not stop.is_set():
                key = f"w{self.number}/{rng.randrange(KEYS)}"
                number = None if rng.random() < 0.2 else rng.randrange(1000)
                self.pending = (key, number)
                try:
                    if number is None:
                        client.delete("c", [key])
                    else:
                        (result,) = client.upsert("c", [NewItem(key, image=picture(number), payload={"n": number})])
                        if not isinstance(result, int):
                            raise result
                except CallError as e:
                    if e.code != "UNAVAILABLE" and not stop.is_set():
                        self.problem = str(e)
                    return
                self.settle(number is not None)
                self.writes += 1

    def settle(self, there: bool) -> None:
        """What was under way was carried out, or was not."""
        assert self.pending is not None
        key, number = self.pending
        if number is not None and there:
            self.sure[key] = number
        elif number is None:
            self.sure.pop(key, None)
        self.pending = None


def check(client: Client, writers: list[Writer]) -> list[str]:
    """What is not as it should be."""
    wrong: list[str] = []
    held = {item.key: item for item in client.items("c", with_vectors=True)}
    expected: dict[str, int] = {}
    for writer in writers:
        if writer.problem:
            wrong.append(f"refused: {writer.problem}")
        if writer.pending is not None:
            key, number = writer.pending
            now = int(held[key].payload["n"]) if key in held else None
            if now == number:
                writer.settle(there=True)
            writer.pending = None
        expected |= writer.sure
    wrong += [f"{key} is not as it was acknowledged" for key in set(held) ^ set(expected)]
    keys = sorted(set(held) & set(expected))
    made = client.embed_many((picture(expected[key]) for key in keys), collection="c")
    for key, vector in zip(keys, made, strict=True):
        if held[key].payload["n"] != expected[key]:
            wrong.append(f"{key} has another payload")
        elif not isinstance(vector, np.ndarray) or float(vector @ held[key].vector) < 0.999:
            wrong.append(f"{key} has a vector of another picture or encoder")
    return wrong


def prepare(out: Path) -> None:
    """Two bundles and an empty collection."""
    write_shapes(out / "shapes", 64)
    for place, seed in (("own", 0), ("releases/v2/bundle", 7)):
        run = [
            "train",
            str(out / "shapes"),
            "--out",
            str(out / f"run{seed}"),
            "--steps",
            "0",
            "--seed",
            str(seed),
            *TINY,
        ]
        assert likewise(run) == 0
        (out / place).parent.mkdir(parents=True, exist_ok=True)
        assert likewise(["export", str(out / f"run{seed}"), "--out", str(out / place)]) == 0


def start(out: Path, port: int) -> subprocess.Popen[str]:
    """A server, ready."""
    flags = [
        "--bundle",
        str(out / "own"),
        "--collections",
        str(out / "collections"),
        "--releases",
        str(out / "releases"),
    ]
    server = subprocess.Popen(
        [sys.executable, "-m", "likewise", "serve", *flags, "--port", str(port), "--metrics-port", "0", "--threads", "1"],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    address_of(server)
    threading.Thread(target=server.stderr.read, daemon=True).start()  # type: ignore[union-attr]
    return server


def exchange(address: str, during: threading.Event, done: Counter[str]) -> None:
    """Switch and roll back until the server dies."""
    try:
        with Client(address, timeout=60) as client:
            while True:
                found = client.release("c")
                standby = found.standby
                if standby is None or standby.state == "failed":
                    client.prepare_release("c", "v2")
                elif standby.state in ("ready", "previous"):
                    during.set()
                    client.switch_release("c", "v2") if found.live == "" else client.roll_back_release("c")
                    done["exchanges"] += 1
                time.sleep(0.02)
    except CallError as e:
        if e.code != "UNAVAILABLE":
            done[f"exchange refused: {e}"] += 1


def trial(out: Path, port: int, writers: list[Writer], rng: random.Random, done: Counter[str]) -> list[str]:
    """Start, let them write and exchange, kill, start again, look."""
    address = f"127.0.0.1:{port}"
    server = start(out, port)
    with Client(address) as client:
        if not client.collections():
            client.create_collection("c", keep_originals=True)
    stop, during = threading.Event(), threading.Event()
    threads = [threading.Thread(target=writer.run, args=(address, stop)) for writer in writers]
    threads.append(threading.Thread(target=exchange, args=(address, during, done)))
    for thread in threads:
        thread.start()
    during.wait(60)
    time.sleep(rng.random() * 1.5)
    stop.set()
    server.send_signal(signal.SIGKILL)
    server.wait()
    for thread in threads:
        thread.join()
    server = start(out, port)
    with Client(address) as client:
        wrong = check(client, writers)
        done[f"live after a kill: {client.release('c').live or 'own'}"] += 1
    server.terminate()
    server.wait()
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    kills = 2 if args.quick else args.kills
    shutil.rmtree(args.out, ignore_errors=True)
    prepare(args.out)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rng, writers, done = random.Random(args.seed), [Writer(i) for i in range(WRITERS)], Counter[str]()
    sound = 0
    for number in range(1, kills + 1):
        wrong = trial(args.out, port, writers, rng, done)
        sound += not wrong
        print(f"kill {number}: {'; '.join(wrong) or 'nothing lost'}   {dict(done)}", flush=True)
    writes = sum(writer.writes for writer in writers)
    print(f"\n{kills} kills, {writes:,} acknowledged writes, {done['exchanges']} exchanges")
    figures: dict[str, float] = {"kills": kills, "writes": writes, "exchanges": done["exchanges"]}
    figures |= {name: count for name, count in done.items() if name.startswith("live")}
    refusals = sum(count for name, count in done.items() if "refused" in name)
    finish(
        "kill_releases", figures, [("kills_that_lost_nothing", sound, kills), ("exchanges_not_refused", -refusals, 0)],
        args.seed, args.quick,
    )  # fmt: skip


if __name__ == "__main__":
    main()
