"""Does a collection survive SIGKILL at any moment? Acknowledged writes stay, none is half applied, the rest can go on.

    python -m benchmarks.kill_collections --out FOLDER [--kills 240]
    python -m benchmarks.kill_collections --out FOLDER --quick

A process does one thing after the other, as it is told: upserts, deletions, moves, flushes, merges, whole segments and
snapshots of a collection; `likewise index sync` of a folder of pictures that changes all the time. It is killed at a random
moment of one of them. Then the collection must be as a model says, with all or nothing of what was under way, in exact
search and item by item; a snapshot is whole or absent; and a sync that is run again ends with one item for each file.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import finish
from export.bundle import Embeddings, RefusalError
from likewise import main as likewise
from service.collection import Collection
from service.records import NewRow
from service.snapshot import restore, take
from tests.shapes import write_shapes

DIM = 16
Model = dict[str, int]  # key → seed of its vector


def vector(seed: int) -> Embeddings:
    """[16], of length 1."""
    row = np.random.default_rng(seed).standard_normal(DIM).astype(np.float32)
    unit: Embeddings = row / np.linalg.norm(row)
    return unit


def apply(model: Model, said: dict[str, Any]) -> Model:
    """What the collection holds after it."""
    after = dict(model)
    for key, seed in said.get("put", {}).items():
        after[key] = seed
    for key in said.get("delete", []):
        after.pop(key, None)
    for old, new in said.get("move", {}).items():
        after[new] = after.pop(old)
    return after


def do(collection: Collection, folder: Path, said: dict[str, Any]) -> None:
    """One thing."""
    put = [(NewRow(key, json.dumps({"seed": seed})), vector(seed)) for key, seed in said.get("put", {}).items()]
    rows, matrix = [row for row, _ in put], np.stack([v for _, v in put]) if put else np.zeros((0, DIM), np.float32)
    match said["what"]:
        case "upsert":
            collection.upsert(rows, matrix)
        case "segment":
            collection.add_segment(rows, matrix)
        case "delete":
            collection.delete(said["delete"])
        case "move":
            moves = [(old, NewRow(new, json.dumps({"seed": said["seeds"][old]}))) for old, new in said["move"].items()]
            collection.move(moves)
        case "flush":
            collection.flush()
        case "merge":
            collection.compact(everything=said["everything"])
        case "snapshot":
            take(folder, folder.with_name(said["name"]), lambda _: None)


def worker(folder: Path) -> None:
    """Do what comes on standard input, and say when it is done."""
    collection = Collection(folder)
    print("ready", flush=True)
    for line in sys.stdin:
        do(collection, folder, json.loads(line))
        print("done", flush=True)


def drawn(rng: np.random.Generator, model: Model, number: int) -> dict[str, Any]:
    """Something to do."""
    what = str(
        rng.choice(["upsert", "upsert", "upsert", "delete", "move", "segment", "flush", "merge", "merge", "snapshot"])
    )
    keys = [f"k{i}" for i in rng.choice(200, int(rng.integers(1, 40)), replace=False).tolist()]
    said: dict[str, Any] = {"what": what}
    if what in ("upsert", "segment"):
        said["put"] = {key: 1000 * number + i for i, key in enumerate(keys)}
    elif what == "delete":
        said["delete"] = keys
    elif what == "move":
        there = sorted(model)[: int(rng.integers(1, 6))]
        free = [key for key in keys if key not in model][: len(there)]
        moved = dict(zip(there, free, strict=False))
        said |= {"move": moved, "seeds": {old: model[old] for old in moved}}
    elif what == "merge":
        said["everything"] = bool(rng.random() < 0.5)
    elif what == "snapshot":
        said["name"] = f"snapshot-{number}"
    return said


def holds(collection: Collection, model: Model) -> str:
    """What differs between a collection and a model; nothing where they agree."""
    if len(collection) != len(model):
        return f"{len(collection)} items instead of {len(model)}"
    query = vector(7)
    (hits,) = collection.search(query[None], len(model) + 5)
    found = [hit.row.key for hit in hits]
    if sorted(found) != sorted(model):
        return "a search finds other items"
    scores = [float(vector(model[key]) @ query) for key in found]
    if any(later > sooner + 2e-6 for sooner, later in pairwise(scores)):  # nearer than that they come by key
        return "a search finds them in another order"
    for key, seed in model.items():
        item = collection.get(key)
        if not np.array_equal(item.vector, vector(seed)) or json.loads(item.row.payload) != {"seed": seed}:
            return f"the item {key} has another vector or payload"
    return ""


def writes(out: Path, kills: int, seed: int) -> Counter[str]:
    """Kill writers; returns how often during what. Raises `AssertionError` on any loss."""
    rng = np.random.default_rng(seed)
    folder, model, number = out / "killed", Model(), 0
    Collection.create(folder, "lw1-kill", DIM).close()
    counts: Counter[str] = Counter()
    typical: dict[str, float] = {}
    for kill in range(kills):
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.kill_collections", "--worker", str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        spared = int(rng.integers(0, 12))
        while True:
            number += 1
            said = drawn(rng, model, number)
            start = time.perf_counter()
            process.stdin.write(json.dumps(said) + "\n")
            process.stdin.flush()
            if spared == 0:
                time.sleep(float(rng.uniform(0, 0.9 * typical.get(said["what"], 0.02))))
                process.send_signal(signal.SIGKILL)
                done = process.stdout.read() == "done\n"
                process.wait()
                break
            assert process.stdout.readline() == "done\n"
            typical[said["what"]] = time.perf_counter() - start
            model = apply(model, said)
            spared -= 1
        counts[said["what"] + (" (was done)" if done else "")] += 1
        collection = Collection(folder)
        after = apply(model, said)
        before_differs, after_differs = holds(collection, model), holds(collection, after)
        assert not after_differs or (not done and not before_differs), f"kill {kill} in {said['what']}: {after_differs}"
        model = model if after_differs else after
        collection.close()
        for snapshot in out.glob("snapshot-*"):
            restore(snapshot, out / "restored", lambda _: None)
            shutil.rmtree(out / "restored")
            shutil.rmtree(snapshot)
        print(f"kill {kill + 1} of {kills}: {len(model)} items as they must be, in {said['what']}", flush=True)
    return counts


def follows(out: Path, kills: int, seed: int) -> Counter[str]:
    """Kill `likewise index sync` of a folder that changes; returns how often it was killed."""
    rng = np.random.default_rng(seed + 1)
    shapes, images, folder = out / "shapes", out / "images", out / "followed"
    write_shapes(shapes, 40)
    tiny = ["--encoder", "vit_nano", "--image-size", "32", "--patch-size", "8", "--steps", "0", "--threads", "1"]
    assert likewise(["train", str(shapes), "--out", str(out / "run"), *tiny]) == 0
    assert likewise(["export", str(out / "run"), "--out", str(out / "bundle")]) == 0
    pictures = sorted(shapes.rglob("*.png"))
    images.mkdir()
    flags = ["--bundle", str(out / "bundle"), "--images", str(images), "--out", str(folder), "--max-delete", "1"]
    command = [sys.executable, "-m", "likewise", "index", "sync", *flags]
    counts: Counter[str] = Counter()
    start = time.perf_counter()
    for picture in pictures[:30]:
        shutil.copyfile(picture, images / picture.name)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    whole = time.perf_counter() - start
    for kill in range(kills + 1):
        for _ in range(30):  # new, replaced, moved and deleted files
            there = sorted(images.iterdir())
            turn = rng.random()
            if turn < 0.55 or len(there) < 10:
                shutil.copyfile(
                    pictures[int(rng.integers(len(pictures)))], images / f"{int(rng.integers(300)):03d}.png"
                )
            elif turn < 0.8:
                there[int(rng.integers(len(there)))].rename(images / f"{int(rng.integers(300)):03d}.png")
            else:
                there[int(rng.integers(len(there)))].unlink()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if kill < kills:
            time.sleep(float(rng.uniform(0.5 * whole, 0.95 * whole)))
            process.send_signal(signal.SIGKILL)
            counts["sync" if process.wait() == -signal.SIGKILL else "sync (was done)"] += 1
            if (folder / "collection.json").is_file():
                Collection(folder).close()  # sound, whatever it holds
        if kill % 5 == 4 or kill == kills:
            if kill < kills:
                process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            assert process.wait() == 0
            collection = Collection(folder)
            files = collection.files()
            assert sorted(files) == sorted(path.name for path in images.iterdir()), "items and files differ"
            for path in images.iterdir():
                state = files[path.name]
                assert state.size == path.stat().st_size, f"{path.name} has the item of another file"
            collection.close()
            print(f"sync killed {kill + 1} times: {len(files)} items, one for each file", flush=True)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, help="scratch folder; what it held before is removed")
    parser.add_argument("--kills", type=int, default=240)
    parser.add_argument("--seed", type=int, default=int(os.environ.get("SEED", "0")))
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.worker:
        worker(args.worker)
        return
    if args.out is None:
        raise RefusalError("pass --out FOLDER")
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    kills = 12 if args.quick else args.kills
    counts = writes(args.out, kills * 5 // 6, args.seed) + follows(args.out, kills - kills * 5 // 6, args.seed)
    for what, count in sorted(counts.items()):
        print(f"{what:<24}{count:>6}")
    finish(
        "kill_collections",
        dict(counts),
        [("kills that lost nothing", float(counts.total()), float(kills))],
        args.seed,
        args.quick,
    )


if __name__ == "__main__":
    main()
